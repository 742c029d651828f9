"""Files -> documents: text of any kind that people have, plain or compressed, one file or folders of them."""

import gzip
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blt.byte_ids import as_bytes

STDLIB = "stdlib"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_COMPRESSED = {".gz", ".xz", ".zst"}
_NOT_TEXT = {".pyc", ".so", ".zip", ".tar", ".tgz", ".png", ".jpg", ".gif", ".pdf", ".npy", ".pth", ".safetensors"}
_SNIFFED_BYTES = 8192
PAIR = ("prompt", "response")


@dataclass(frozen=True)
class Document:
    """One text of a corpus; ``name`` tells a person where it came from."""

    name: str
    data: bytes
    prompt_bytes: int = 0  # of a prompt and its response: how many bytes at the beginning are read and not learned


def read_documents(paths: Sequence[str | Path], raw: bool = False) -> Iterator[Document]:
    """The documents of files and folders, in the order given; ``stdlib`` means this interpreter's library sources.

    A .jsonl or .parquet file holds one document per row, in field or column ``text``, or in ``prompt`` and ``response``,
    which are joined as they are; any other file is one document of its bytes, in whatever encoding; each may be compressed
    (.gz, .xz, .zst). ``raw`` takes every file as one document,
    as it lies on disk. A folder is read recursively in sorted order, without hidden entries, links to folders and,
    unless ``raw``, files that are not text. (A folder that is itself called stdlib: ``./stdlib``.)

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
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; mend it, or read bytes with --raw") from None
        fields = row if isinstance(row, dict) else {}
        names = PAIR if "text" not in fields and "prompt" in fields else ("text",)
        parts = [fields[name] for name in names if isinstance(fields.get(name), str)]
        if len(parts) < len(names):
            raise ValueError(
                f'{path}, line {number} has no string "text", nor "prompt" and "response"; give it one or the other, or read '
                "bytes with --raw"
            )
        yield _joined(f"{path}:{number}", [_lenient_bytes(part) for part in parts])


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
        found = file.schema_arrow.names
        columns = PAIR if "text" not in found and set(PAIR) <= set(found) else ("text",)
        if not set(columns) <= set(found):
            raise ValueError(
                f"{path} has no column 'text', nor 'prompt' and 'response', only {', '.join(found)}; rename those with the text"
            )
        batches = file.iter_batches(batch_size=1024, columns=list(columns))
        rows = (row for batch in batches for row in zip(*map(_byte_strings, batch.columns), strict=True))
        for number, parts in enumerate(rows, 1):
            yield _joined(f"{path}:{number}", parts)


def _byte_strings(column: pa.Array) -> list[bytes]:
    """Texts of any string type; a null is an empty one."""
    return [text or b"" for text in column.cast(pa.large_binary()).to_pylist()]
