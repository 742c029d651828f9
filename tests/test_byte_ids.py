"""Byte ids stand for bytes, all of them, and UTF-8 is what Python's own decoder says it is."""

import itertools
import os
from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.byte_ids import (
    BOS,
    EOS,
    as_bytes,
    decode,
    document_ids,
    encode,
    incomplete_suffix_length,
    positions_in_document,
    utf8_allowed_next,
)

# both ends of every range that table 3-7 of the Unicode standard tells apart
TELLING_BYTES = bytes.fromhex("00 41 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
ID_ROWS = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([0, 1, 2, 2, 3, 70, 259]), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


@given(st.binary(max_size=40))
def test_any_bytes_come_back_from_their_ids(data: bytes) -> None:
    ids = encode(data)
    assert ids[0] == BOS and len(ids) == len(data) + 1 and all(4 <= one < 260 for one in ids[1:])
    assert decode(ids) == data


@given(st.text(max_size=20))
def test_text_is_encoded_as_its_utf8_bytes(text: str) -> None:
    assert encode(text) == encode(text.encode())


@given(st.binary(max_size=40))
def test_bytes_that_python_smuggles_through_a_string_are_the_bytes_again(data: bytes) -> None:
    assert as_bytes(data.decode("utf-8", "surrogateescape")) == data
    assert as_bytes(os.fsdecode(data)) == data


def test_the_names_of_control_ids_are_plain_text() -> None:
    for text in ("</s>", "<s>", "<|endoftext|>", "\x00\x01\x02\x03"):
        assert EOS not in encode(text) and encode(text).count(BOS) == 1
        assert decode(encode(text)) == text.encode()


@given(st.lists(st.integers(0, 259), max_size=20))
def test_control_ids_are_no_bytes(ids: list[int]) -> None:
    assert decode(ids) == bytes(one - 4 for one in ids if one > 3)


@given(ID_ROWS)
def test_a_document_lasts_until_its_eos(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        document, of_row = 0, []
        for one in row:
            of_row.append(document)
            document += one == EOS
        expected.append(of_row)
    assert document_ids(torch.tensor(rows)).tolist() == expected


@given(ID_ROWS)
def test_positions_start_anew_after_an_eos_and_reach_the_unknown_next_id(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        position, of_row = 0, [0]
        for one in row:
            position = 0 if one == EOS else position + 1
            of_row.append(position)
        expected.append(of_row)
    assert positions_in_document(torch.tensor(rows)).tolist() == expected


TAILS = [bytes(tail) for length in range(4) for tail in itertools.product(b"\x80\x90\xbf", repeat=length)]


def is_utf8(data: bytes) -> bool:
    return data.decode(errors="ignore").encode() == data


@cache
def begins_a_character(data: bytes) -> bool:
    """Whether some tail makes one character of these bytes, says Python's strict decoder."""
    for tail in TAILS:
        try:
            if len((data + tail).decode()) == 1:
                return True
        except UnicodeDecodeError:
            continue
    return False


@cache
def undecided(data: bytes) -> bytes:
    """The bytes at the end that later ones can still make a character of."""
    for length in (3, 2, 1):
        if len(data) >= length and data[-length] > 0x7F and begins_a_character(data[-length:]):
            return b"" if is_utf8(data[-length:]) else data[-length:]
    return b""


@cache
def accepted_next(begun: bytes) -> frozenset[int]:
    """The bytes that lead on from the begun character, or, where none is begun, begin one."""
    return frozenset(byte for byte in range(256) if begins_a_character(begun + bytes([byte])))


def agrees_with_python(data: bytes) -> bool:
    begun = undecided(data)
    return incomplete_suffix_length(data) == len(begun) and utf8_allowed_next(data) == accepted_next(begun)


def test_every_telling_sequence_of_up_to_three_bytes_reads_as_in_python() -> None:
    for length in range(4):
        for data in itertools.product(TELLING_BYTES, repeat=length):
            assert agrees_with_python(bytes(data)), bytes(data)


@given(st.lists(st.sampled_from(TELLING_BYTES), max_size=9).map(bytes) | st.text(max_size=6).map(str.encode))
def test_longer_sequences_read_as_in_python_wherever_they_are_cut(data: bytes) -> None:
    assert all(agrees_with_python(data[:end]) for end in range(len(data) + 1)), data
