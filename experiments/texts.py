"""What the claims are trained and scored on: so many bytes of a language mix, in pieces drawn from all its documents alike."""

import json
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
    """A .jsonl of about so many bytes of text, the same share of each path; written once.

    Documents are cut into pieces, which are shuffled, so a short mix has something of as many documents as it can.
    """
    if not file.exists():
        chosen = [piece for path in paths for piece in _drawn(path, num_bytes // len(paths), seed)]
        random.Random(seed).shuffle(chosen)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), "utf-8")
        partial.replace(file)
    return file


def _drawn(path: Path, num_bytes: int, seed: int) -> Iterator[str]:
    pieces = [
        piece for document in read_documents([path]) for piece in _pieces(document.data.decode("utf-8", "replace"))
    ]
    random.Random(seed).shuffle(pieces)
    for piece in pieces:
        if num_bytes <= 0:
            return
        piece = piece.encode()[:num_bytes].decode("utf-8", "ignore")
        num_bytes -= len(piece.encode()) or num_bytes
        yield piece


def _pieces(text: str) -> list[str]:
    return [text[begin : begin + PIECE_CHARACTERS] for begin in range(0, len(text), PIECE_CHARACTERS)]
