"""Text and bytes -> byte ids and back, without ever breaking a character on the way out.

Ids as in the released checkpoints: 0 BOE (padding in training), 1 BOS, 2 EOS, 3 unused, byte b -> b + 4.
"""

import torch

from blt.shapes import ByteIds, DocumentIds

BOE, BOS, EOS = 0, 1, 2
BYTE_OFFSET = 4
VOCAB_SIZE = 256 + BYTE_OFFSET
NEWLINE = ord("\n") + BYTE_OFFSET


def encode(text: str | bytes) -> list[int]:
    """The ids of a prompt: BOS, then one id per byte. Text is UTF-8; a literal ``</s>`` is plain bytes.

    >>> encode("Hé")
    [1, 76, 199, 173]
    """
    return [BOS, *(byte + BYTE_OFFSET for byte in as_bytes(text))]


def decode(ids: list[int]) -> bytes:
    """The bytes of a list of ids; control ids (below 4) are dropped.

    >>> decode([1, 76, 199, 173, 2])
    b'H\\xc3\\xa9'
    """
    return bytes(byte_id - BYTE_OFFSET for byte_id in ids if byte_id >= BYTE_OFFSET)


def as_bytes(text: str | bytes) -> bytes:
    """Bytes as they are; a string as UTF-8, its lone surrogates (from undecodable file names or arguments) as the raw
    bytes they stand for.
    """
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def document_ids(byte_ids: ByteIds) -> DocumentIds:
    """Which document each position belongs to: an EOS closes its document, so the count of EOS ids strictly before.

    >>> document_ids(torch.tensor([[1, 70, 2, 1, 71]])).tolist()
    [[0, 0, 0, 1, 1]]
    """
    closes = (byte_ids == EOS).int()
    return (closes.cumsum(1) - closes).long()


def positions_in_document(byte_ids: ByteIds) -> DocumentIds:
    """How many ids of its own document stand before each position, and before the unknown next id.

    >>> positions_in_document(torch.tensor([[1, 70, 2, 1, 71]])).tolist()
    [[0, 1, 2, 0, 1, 2]]
    """
    batch, num_bytes = byte_ids.shape
    index = torch.arange(num_bytes + 1, device=byte_ids.device).expand(batch, -1)
    after_eos = torch.zeros_like(index)
    after_eos[:, 1:] = torch.where(byte_ids == EOS, index[:, 1:], 0)
    return index - after_eos.cummax(1).values


def incomplete_suffix_length(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character that later bytes can still complete (0 to 3).

    >>> [incomplete_suffix_length(data) for data in (b"a", b"a\\xc3", b"\\xe2\\x82", b"\\xe2\\x82\\xac", b"\\xff")]
    [0, 1, 2, 0, 0]
    """
    for length in range(1, min(3, len(data)) + 1):
        if not 0x80 <= data[-length] <= 0xBF:  # the lead byte of the last character, or an ASCII byte
            return length if utf8_allowed_next(data[-length:]) != ANY_CHARACTER_START else 0
    return 0


ANY_CHARACTER_START = frozenset(range(0x80)) | frozenset(range(0xC2, 0xF5))
_CONTINUATION = frozenset(range(0x80, 0xC0))
# Second bytes that overlong forms, surrogates and the end of Unicode leave possible (Unicode 16, table 3-7).
_SECOND = {
    0xE0: frozenset(range(0xA0, 0xC0)),
    0xED: frozenset(range(0x80, 0xA0)),
    0xF0: frozenset(range(0x90, 0xC0)),
    0xF4: frozenset(range(0x80, 0x90)),
}


def utf8_allowed_next(data: bytes) -> frozenset[int]:
    """The bytes that can follow ``data`` in well-formed UTF-8; after malformed bytes any character may start.

    >>> sorted(utf8_allowed_next(b"\\xed"))[-1] == 0x9F  # a surrogate would need more
    True
    >>> utf8_allowed_next(b"abc") == ANY_CHARACTER_START
    True
    """
    for length in range(1, min(3, len(data)) + 1):
        lead = data[-length]
        if 0x80 <= lead <= 0xBF:
            continue
        expected = 4 if 0xF0 <= lead <= 0xF4 else 3 if lead >= 0xE0 else 2 if lead >= 0xC2 else 1
        if lead > 0xF4 or length >= expected:
            return ANY_CHARACTER_START
        seconds = _SECOND.get(lead, _CONTINUATION)
        if length == 1:
            return seconds
        return _CONTINUATION if data[-length + 1] in seconds else ANY_CHARACTER_START
    return ANY_CHARACTER_START
