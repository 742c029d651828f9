"""Sampling, stopping, streaming: what comes out is what the logits allow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.byte_ids import BYTE_OFFSET, EOS, incomplete_suffix_length, utf8_allowed_next
from blt.generate import GenerationStats, Sampling, generate_ids, next_probabilities, stream_text

VOCAB = 260


def logits_favouring(byte: int) -> torch.Tensor:
    logits = torch.zeros(VOCAB)
    logits[byte + BYTE_OFFSET] = 5.0
    return logits


def scripted(data: bytes, then_eos: bool = True):
    """A model that writes ``data`` whatever it reads, then EOS."""

    def next_logits(ids: list[int]) -> torch.Tensor:
        written = len(ids) - 1
        logits = torch.zeros(VOCAB)
        logits[data[written] + BYTE_OFFSET if written < len(data) else EOS] = 9.0
        return logits

    return next_logits


def write(data: bytes, max_bytes: int = 100, stop: tuple[bytes, ...] = ()) -> list[bytes]:
    ids = generate_ids(scripted(data), [1], max_bytes, Sampling(), torch.Generator(), GenerationStats())
    return list(stream_text(ids, stop))


def test_eos_ends_the_text_and_is_not_part_of_it() -> None:
    assert b"".join(write(b"abc")) == b"abc"


def test_the_limit_counts_bytes_and_may_fall_inside_a_character() -> None:
    assert b"".join(write("aé".encode(), max_bytes=2)) == b"a\xc3"


def test_no_bytes_are_asked_for_and_none_come() -> None:
    assert write(b"abc", max_bytes=0) == []


def test_a_stop_string_that_straddles_pieces_is_found_and_left_out() -> None:
    assert b"".join(write(b"one two three", stop=(b"o th", b"never"))) == b"one tw"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert b"".join(write(b"abcdef", stop=(b"ef", b"cd"))) == b"ab"


def test_text_that_only_begins_like_a_stop_string_is_not_lost() -> None:
    assert b"".join(write(b"ab</", stop=(b"</s>",))) == b"ab</"


@given(st.text(max_size=30))
def test_no_piece_of_a_stream_breaks_a_character(text: str) -> None:
    pieces = list(stream_text(iter([byte + BYTE_OFFSET for byte in text.encode()])))
    assert b"".join(pieces) == text.encode()
    for piece in pieces:
        piece.decode()  # raises where a character is cut


@given(st.binary(max_size=30))
def test_a_stream_of_any_bytes_loses_none(data: bytes) -> None:
    assert b"".join(stream_text(iter([byte + BYTE_OFFSET for byte in data]))) == data


def test_the_forward_pass_that_drew_eos_is_counted() -> None:
    stats = GenerationStats()
    assert len(list(generate_ids(scripted(b"abc"), [1], 9, Sampling(), torch.Generator(), stats))) == 3
    assert stats.latent_calls == 4


def test_a_temperature_near_zero_is_greedy_and_not_nan() -> None:
    probabilities = next_probabilities(logits_favouring(77), Sampling(temperature=1e-40), b"")
    assert probabilities[77 + BYTE_OFFSET] == 1


def test_control_ids_are_never_drawn_however_probable() -> None:
    logits = torch.zeros(VOCAB)
    logits[[0, 1, 3]] = 50.0
    probabilities = next_probabilities(logits, Sampling(temperature=1.0), b"")
    assert probabilities[[0, 1, 3]].sum() == 0
    assert probabilities[EOS] > 0


def test_greedy_takes_the_most_probable_id() -> None:
    assert next_probabilities(logits_favouring(77), Sampling(), b"").argmax() == 77 + BYTE_OFFSET


def test_filters_keep_what_they_say() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for sampling, kept in (
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_p=0.6), 2),
        (Sampling(temperature=1.0, top_p=0.5), 1),
        (Sampling(temperature=1.0, min_p=0.25), 3),
        (Sampling(temperature=1.0, top_k=2, min_p=0.9), 1),
    ):
        probabilities = next_probabilities(logits, sampling, b"")
        assert int((probabilities > 0).sum()) == kept, sampling
        assert math.isclose(float(probabilities.sum()), 1.0, rel_tol=1e-6)


def test_temperature_sharpens_as_it_should() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[10, 11]] = torch.tensor([0.8, 0.2]).log()
    cold = next_probabilities(logits, Sampling(temperature=0.5), b"")
    assert math.isclose(float(cold[10]), 0.64 / 0.68, rel_tol=1e-5)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[70, 71]] = torch.tensor([0.75, 0.25]).log()

    def draw(seed: int, count: int) -> list[int]:
        sampling, generator = Sampling(temperature=1.0), torch.Generator().manual_seed(seed)
        return list(generate_ids(lambda ids: logits, [1], count, sampling, generator, GenerationStats()))

    assert draw(0, 50) == draw(0, 50) != draw(1, 50)
    share = draw(2, 2000).count(70) / 2000
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_utf8_sampling_writes_only_well_formed_text(seed: int, max_bytes: int) -> None:
    flat, sampling = torch.zeros(VOCAB), Sampling(temperature=1.0, utf8=True)
    flat[EOS] = -torch.inf
    ids = generate_ids(
        lambda ids: flat, [1], max_bytes, sampling, torch.Generator().manual_seed(seed), GenerationStats()
    )
    data = b"".join(stream_text(ids))
    whole = data[: len(data) - incomplete_suffix_length(data)]
    whole.decode()  # raises for overlong forms, surrogates, values past U+10FFFF


def test_utf8_sampling_never_ends_inside_a_character() -> None:
    logits = torch.zeros(VOCAB)
    logits[EOS] = 50.0
    assert next_probabilities(logits, Sampling(temperature=1.0, utf8=True), b"\xe2\x82")[EOS] == 0


def test_utf8_next_bytes_agree_with_python_about_every_prefix() -> None:
    fillers = (b"", b"\x80", b"\x80\x80", b"\xbf", b"\xbf\xbf", b"\xbf\xbf\xbf", b"\x80\x80\x80")
    prefixes = [bytes([a]) for a in range(0xC2, 0xF5)]
    prefixes += [bytes([a, b]) for a in range(0xE0, 0xF5) for b in sorted(utf8_allowed_next(bytes([a])))]
    for prefix in prefixes:
        for byte in range(256):
            possible = any(_is_utf8(prefix + bytes([byte]) + filler) for filler in fillers)
            assert (byte in utf8_allowed_next(prefix)) == possible, (prefix, byte)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be above 0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
