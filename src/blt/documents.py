"""Files -> documents: text of any kind that people have, plain or compressed, one file or folders of them."""

import codecs
import gzip
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blt.byte_ids import as_bytes

STDLIB = "stdlib"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_COMPRESSED = {".gz", ".xz", ".zst"}
_NOT_TEXT = {".pyc", ".so", ".zip", ".tar", ".tgz", ".png", ".jpg", ".gif", ".pdf", ".npy", ".pth", ".safetensors"}
_SNIFFED_BYTES = 8192
PAIR = ("prompt", "response")
FIELDS = ("text", *PAIR)
_TEXT_TYPES = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
)


@dataclass(frozen=True)
class Document:
    """One text of a corpus; ``name`` tells a person where it came from."""

    name: str
    data: bytes
    prompt_bytes: int = 0  # of a prompt and its response: how many bytes at the beginning are read and not learned


def read_documents(paths: Sequence[str | Path], raw: bool = False) -> Iterator[Document]:
    """The documents of files and folders, in the order given; ``stdlib`` means this interpreter's library sources.

    A .jsonl or .parquet file holds one document per row, in field or column ``text``, or, where that is absent or null, in
    ``prompt`` and ``response``, which are joined as they are; any other file is one document of its bytes, in whatever
    encoding; each may be compressed (.gz, .xz, .zst). ``raw`` takes every file as one document, as it lies on disk. A folder
    is read recursively in sorted order, without hidden entries, links to folders and, unless ``raw``, files that are not
    text. (A folder that is itself called stdlib: ``./stdlib``.)

    Raises FileNotFoundError before anything is read, ValueError naming the file that cannot be read.
    """
    for path in paths:
        if str(path) != STDLIB and not Path(path).exists():
            raise FileNotFoundError(f"no file or folder {path}; check it, or give {STDLIB!r} for Python's own library")
    for path in paths:
        if str(path) == STDLIB:
            folder = Path(sysconfig.get_paths()["stdlib"])
            sources = (file for file in _files_below(folder, _NOT_STDLIB) if file.suffix == ".py")
            yield from _documents_of_folder(folder, sources, raw)
        elif Path(path).is_dir():
            yield from _documents_of_folder(Path(path), _files_below(Path(path), set()), raw)
        else:
            yield from _documents_of_file(Path(path), raw, text_only=False)


def _files_below(folder: Path, skipped_folders: set[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink() and entry.name not in skipped_folders:
            yield from _files_below(entry, skipped_folders)


def _documents_of_folder(folder: Path, files: Iterable[Path], raw: bool) -> Iterator[Document]:
    empty = True
    for file in files:
        for document in _documents_of_file(file, raw, text_only=not raw):
            empty = False
            yield document
    if empty:
        raise ValueError(f"nothing to read in folder {folder}; give one with text in it, or --raw to read any file")


def _documents_of_file(path: Path, raw: bool, text_only: bool) -> Iterator[Document]:
    if raw:
        yield Document(str(path), path.read_bytes())
        return
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    kind = (Path(path.stem) if compression else path).suffix.lower()
    if text_only and kind in _NOT_TEXT:
        return
    try:
        with open_stream(path, compression) as stream:
            if kind == ".jsonl":
                yield from _jsonl_documents(path, stream)
            elif kind == ".parquet":  # its reader jumps about, which compressed streams do badly
                yield from _parquet_documents(path, io.BytesIO(stream.read()) if compression else stream)
            else:
                head = stream.read(_SNIFFED_BYTES)
                if not (text_only and b"\0" in head):
                    yield Document(str(path), head + stream.read())
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's trouble, not the file's: the decompressors raise OSError without a number
        raise ValueError(f"{path} is damaged, or not what its name says: {error}; replace it or leave it out") from None


def open_stream(path: Path, compression: str) -> io.BufferedIOBase:
    """A file's bytes, or what its compression (.gz, .xz, .zst, or none: "") holds."""
    if compression == ".gz":
        return gzip.open(path)
    if compression == ".xz":
        return lzma.open(path)
    if compression == ".zst":  # by pyarrow: the zstandard package takes a truncated file for a whole one
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl_documents(path: Path, stream: io.BufferedIOBase) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; mend it, or read bytes with --raw") from None
        fields = row if isinstance(row, dict) else {}
        parts = _parts([fields.get(name) for name in FIELDS])
        if parts is None:
            raise ValueError(
                f'{path}, line {number} has no string "text", nor "prompt" and "response"; give it one or the other, or read '
                "bytes with --raw"
            )
        yield _joined(f"{path}:{number}", [_lenient_bytes(part) for part in parts])


def _parts(values: Sequence[Any]) -> list[Any] | None:
    """The text of a row, or its prompt and response, of ``FIELDS``; None where it has neither.

    >>> _parts(["a", None, None]), _parts([None, "b", "c"]), _parts([None, "b", None])
    (['a'], ['b', 'c'], None)
    """
    text, *pair = (value if isinstance(value, str | bytes) else None for value in values)
    found = pair if text is None else [text]
    return None if None in found else found


def _lenient_bytes(text: str) -> bytes:
    try:
        return as_bytes(text)
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape: no raw byte stands behind it
        return text.encode("utf-8", "surrogatepass")


def _joined(name: str, parts: Sequence[bytes]) -> Document:
    """A document of its text, or of prompt and response. A pair without a response has nothing to learn: it is empty."""
    return Document(name, b"".join(parts) if parts[-1] else b"", sum(map(len, parts[:-1])))


def _parquet_documents(path: Path, stream: io.BufferedIOBase) -> Iterator[Document]:
    with pq.ParquetFile(stream) as file:
        found = [name for name in FIELDS if name in file.schema_arrow.names]
        if "text" not in found and not set(PAIR) <= set(found):
            raise ValueError(
                f"{path} has no column 'text', nor 'prompt' and 'response', only {', '.join(file.schema_arrow.names)}; rename "
                "those with the text"
            )
        for name in found:
            kind = file.schema_arrow.field(name).type
            if not any(is_kind(kind) for is_kind in _TEXT_TYPES):
                raise ValueError(f"{path}: column {name!r} holds {kind}, not text; leave it out or rename it")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=found):
            columns = {name: batch.column(name).cast(pa.large_binary()).to_pylist() for name in found}
            nothing = [None] * batch.num_rows
            for row in zip(*(columns.get(name, nothing) for name in FIELDS), strict=True):
                number += 1
                yield _joined(f"{path}:{number}", _parts(row) or [b""])  # a null is an empty text
