"""A path that a person has put a benchmark at -> its files, out of folders, archives and compressed files alike."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from blt.documents import open_stream

COMPRESSED = (".gz", ".xz", ".zst")
ARCHIVES = (".tar", *(f".tar{suffix}" for suffix in COMPRESSED), ".tgz", ".txz", ".zip")


def find_files(root: Path, pattern: str, holding: bytes = b"") -> dict[str, bytes]:
    """The contents of all files whose path ends as ``pattern`` says and that hold some bytes, by path and in its order.

    ``root`` is a folder, which is searched with all below it, or a file. A compressed file goes by its name without the
    compression's ending. Archives are looked into only if no file outside of them matches. Upper and lower case are one.

    Raises FileNotFoundError for a root that is missing, ValueError naming a damaged file.
    """
    if not root.exists():
        raise FileNotFoundError(f"no file or folder {root} to read the task from; check --task-data")
    root = root.resolve()
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    archives = [path for path in files if path.name.lower().endswith(ARCHIVES)]
    plain = {path: _uncompressed_name(path) for path in files if path not in archives}
    chosen = [path for path, name in plain.items() if matches(str(path.with_name(name)), pattern)]
    found = {str(path): data for path in chosen if holding in (data := _content(path))}
    for archive in () if found else archives:
        found |= {f"{archive}/{name}": data for name, data in _members(archive, pattern) if holding in data}
    return dict(sorted(found.items()))


def matches(path: str, pattern: str) -> bool:
    """Does a path end as a pattern says?

    >>> matches("cute/words/Spell.tsv", "words/*.tsv"), matches("words/more/spell.tsv", "words/*.tsv")
    (True, False)
    """
    return PurePosixPath(path.lower()).match(pattern.lower())


def _uncompressed_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def _content(path: Path) -> bytes:
    suffix = path.suffix.lower()
    try:
        with open_stream(path, suffix if suffix in COMPRESSED else "") as stream:
            return stream.read()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The matching files of an archive, in its order."""
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for name in opened.namelist():
                    if matches(name, pattern):
                        yield name, opened.read(name)
            return
        compression = {".tgz": ".gz", ".txz": ".xz", ".tar": ""}.get(archive.suffix.lower(), archive.suffix.lower())
        with open_stream(archive, compression) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                content = members.extractfile(member) if matches(member.name, pattern) else None
                if content is not None:
                    yield member.name, content.read()
    except (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _damaged(archive, error) from None


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error  # the system's trouble, not the file's
    return ValueError(f"{path} is damaged, or not what its name says: {error}; get it again")
