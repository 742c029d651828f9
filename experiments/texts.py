"""What the claims are trained and scored on: so many bytes of a language mix, in pieces drawn from all its documents alike."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from blt.documents import read_documents

PIECE_CHARACTERS = 16_000
MIXES = {
    "english": {
        "train": ("en_books.00.jsonl.xz", "en_wiki2016.jsonl.xz", "en_modern.jsonl.xz"),
        "valid": ("en_books.valid.jsonl.xz", "en_modern.valid.jsonl.xz"),
        "test": ("en_books.test.jsonl.xz", "wikitext2_raw_test.txt.xz", "en_modern.test.jsonl.xz"),
    },
    "code": {
        "train": ("code.jsonl.xz",),
        "valid": ("code.valid.jsonl.xz",),
        "test": ("code.test.jsonl.xz",),
    },
    "multilingual": {
        "train": ("multilingual.jsonl.xz", "ml_gnome_docs.jsonl.xz"),
        "valid": ("ml_commonvoice.valid.jsonl.xz",),
        "test": ("ml_commonvoice.test.jsonl.xz",),
    },
}


def paths_of(data: Path, mix: str, part: str) -> list[Path]:
    """The files of one part of a mix. Raises FileNotFoundError that says what to give."""
    folder = data / ("train" if part == "train" else "eval")
    paths = [folder / name for name in MIXES[mix][part]]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}; give the folder that holds train/ and eval/ with --data")
    return paths


def mixed(paths: Sequence[Path], num_bytes: int, file: Path, seed: int = 0) -> Path:
    """A .jsonl of about so many bytes of text, the same share of each path as far as that has it; written once.

    Documents are cut into pieces, which are shuffled, so a short mix has something of as many documents as it can.
    """
    if not file.exists():
        texts = [_shuffled_pieces(path, seed) for path in paths]
        shares = even_shares([sum(len(piece.encode()) for piece in pieces) for pieces in texts], num_bytes)
        chosen = [piece for pieces, share in zip(texts, shares, strict=True) for piece in _first(pieces, share)]
        random.Random(seed).shuffle(chosen)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")  # others may need it at the same time
        partial.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), "utf-8")
        partial.replace(file)
    return file


def even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """What to take of each to have ``total``: the same, and where one has less, all of it.

    >>> even_shares([100, 4, 100], 30), even_shares([5, 4], 30)
    ([13, 4, 13], [5, 4])
    """
    shares, left = [0] * len(sizes), total
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= shares[index]
    return shares


def _shuffled_pieces(path: Path, seed: int) -> list[str]:
    pieces = [
        piece for document in read_documents([path]) for piece in _pieces(document.data.decode("utf-8", "replace"))
    ]
    random.Random(seed).shuffle(pieces)
    return pieces


def _first(pieces: Sequence[str], num_bytes: int) -> Iterator[str]:
    """Pieces until they have so many bytes, the last one cut."""
    for piece in pieces:
        if num_bytes <= 0:
            return
        cut = piece.encode()[:num_bytes].decode("utf-8", "ignore")
        num_bytes -= len(cut.encode()) or num_bytes
        yield cut


def _pieces(text: str) -> list[str]:
    return [text[begin : begin + PIECE_CHARACTERS] for begin in range(0, len(text), PIECE_CHARACTERS)]
