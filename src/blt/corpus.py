"""Documents -> memory-mapped byte shards -> resumable batches of byte ids.

``build_shards`` writes documents end to end once, split into train and held out; training reads rows of ids out of a shard,
in an order that only the seed decides.
"""

import functools
import io
import json
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS
from blt.documents import Document
from blt.shapes import ByteIds

Split = Literal["train", "held_out"]


def is_held_out(data: bytes, fraction: float) -> bool:
    """Whether a document with this content is held out: a hash decides, so copies of it all fall on the same side.

    >>> [is_held_out(data, fraction=0.5) for data in (b"a", b"b", b"c", b"d", b"a")]
    [True, False, True, False, True]
    """
    return int.from_bytes(blake2b(data, digest_size=8).digest()) < fraction * 2**64


@dataclass(frozen=True)
class CorpusSummary:
    """What ``build_shards`` wrote; kept as summary.json beside the shards."""

    fingerprint: str  # of every document's content, their order, and the held-out fraction
    documents: dict[str, int]  # by split
    bytes: dict[str, int]  # by split
    empty_skipped: int

    @property
    def sentence(self) -> str:
        """The figures as a person reads them."""
        skipped = f"; {self.empty_skipped} empty documents skipped" if self.empty_skipped else ""
        return (
            f"corpus: {self.documents['train']:,} documents, {self.bytes['train'] / 1e6:.2f} MB to train on; "
            f"{self.documents['held_out']:,}, {self.bytes['held_out'] / 1e6:.2f} MB held out{skipped}"
        )


class _Fingerprint:
    """A hash over documents as they pass."""

    def __init__(self, held_out_fraction: float) -> None:
        self.hash = blake2b(repr(held_out_fraction).encode(), digest_size=16)

    def add(self, document: Document) -> None:
        if document.data:
            self.hash.update(len(document.data).to_bytes(8))
            self.hash.update(document.data)
            if document.prompt_bytes:
                self.hash.update(b"prompt" + document.prompt_bytes.to_bytes(8))

    def hexdigest(self) -> str:
        return self.hash.hexdigest()


def corpus_fingerprint(documents: Iterable[Document], held_out_fraction: float) -> str:
    """The fingerprint that ``build_shards`` gives these documents, without writing anything."""
    fingerprint = _Fingerprint(held_out_fraction)
    for document in documents:
        fingerprint.add(document)
    return fingerprint.hexdigest()


class _SplitWriter:
    """Appends documents to an open file and remembers where each begins, and how much of it is a prompt."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file = file
        self.offsets = array("q", [0])
        self.prompt_bytes = array("q")

    def add(self, document: Document) -> None:
        self.file.write(document.data)
        self.offsets.append(self.offsets[-1] + len(document.data))
        self.prompt_bytes.append(document.prompt_bytes)


def build_shards(documents: Iterable[Document], folder: Path, held_out_fraction: float) -> CorpusSummary:
    """Write the documents to ``folder`` as two shards, train and held_out; read them with ``open_shard``.

    Both splits hold something: where the hash leaves one empty (a corpus of few documents), the last document goes to
    train except for its final ``held_out_fraction`` of bytes, at least one, which become a held-out document.

    Documents pass through one at a time. All is written to ``folder.partial`` and renamed at the end, so a build that
    was killed is never taken for a whole one; a corpus already in ``folder`` is replaced, anything else there refused.
    """
    if folder.exists() and not (folder / "summary.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no corpus; give another folder, or empty this one")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    fingerprint = _Fingerprint(held_out_fraction)
    empty_skipped = 0
    newest: Document | None = None  # written one document late, when it is known whether it is the last
    with (partial / "train.bin").open("wb") as train_file, (partial / "held_out.bin").open("wb") as held_out_file:
        writers = {"train": _SplitWriter(train_file), "held_out": _SplitWriter(held_out_file)}
        for document in documents:
            if not document.data:
                empty_skipped += 1
                continue
            fingerprint.add(document)
            if newest is not None:
                writers["held_out" if is_held_out(newest.data, held_out_fraction) else "train"].add(newest)
            newest = document
        if newest is None:
            raise ValueError(f"the corpus has no bytes ({empty_skipped} empty documents); give --data with text in it")
        _add_last(newest, writers["train"], writers["held_out"], held_out_fraction)

    for split, writer in writers.items():
        np.save(partial / f"{split}.index.npy", np.array(writer.offsets, dtype=np.int64))
        if any(any(writer.prompt_bytes) for writer in writers.values()):
            np.save(partial / f"{split}.prompts.npy", np.array(writer.prompt_bytes, dtype=np.int64))
    summary = CorpusSummary(
        fingerprint=fingerprint.hexdigest(),
        documents={split: len(writer.offsets) - 1 for split, writer in writers.items()},
        bytes={split: writer.offsets[-1] for split, writer in writers.items()},
        empty_skipped=empty_skipped,
    )
    (partial / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    return summary


def _add_last(last: Document, train: _SplitWriter, held_out: _SplitWriter, held_out_fraction: float) -> None:
    chosen, other = (held_out, train) if is_held_out(last.data, held_out_fraction) else (train, held_out)
    if other.offsets[-1]:
        chosen.add(last)
        return
    size, prompt = len(last.data), last.prompt_bytes
    train_bytes = size - max(1, int(size * held_out_fraction))
    if train_bytes:
        train.add(Document(last.name, last.data[:train_bytes], min(prompt, train_bytes)))
    elif not train.offsets[-1]:
        raise ValueError("the corpus is too small to hold anything out; give more text")
    held_out.add(Document(last.name, last.data[train_bytes:], max(0, prompt - train_bytes)))


@dataclass(frozen=True, eq=False)
class ByteShard:
    """The documents of one split, end to end, memory-mapped."""

    data: NDArray[np.uint8] | NDArray[np.uint16]  # wider than bytes: the units of a model that is compared with
    offsets: NDArray[np.int64]  # where each document begins in ``data``, and at last where the data ends
    split: Split
    fingerprint: str  # of the corpus
    prompt_bytes: NDArray[np.int64] | None = None  # of each document, where some are prompts and responses

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def document(self, index: int) -> Document:
        """One document; its name is its number."""
        data = self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return Document(str(index), data, 0 if self.prompt_bytes is None else int(self.prompt_bytes[index]))

    def documents(self) -> Iterator[Document]:
        """All documents in order."""
        return (self.document(index) for index in range(self.num_documents))

    def stretches(self, num_bytes: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """All text in order, so many bytes at a time, each with the positions in it at which documents begin.

        >>> shard = ByteShard(np.frombuffer(b"abc", np.uint8), np.array([0, 1, 3]), "train", fingerprint="")
        >>> [(text.tobytes(), starts.tolist()) for text, starts in shard.stretches(2)]
        [(b'ab', [0, 1]), (b'c', [])]
        """
        for begin in range(0, self.num_bytes, num_bytes):
            first, last = np.searchsorted(self.offsets[:-1], (begin, begin + num_bytes))
            yield np.array(self.data[begin : begin + num_bytes]), self.offsets[first:last] - begin

    def sample(self, total_bytes: int, seed: int) -> list[Document]:
        """Random documents until ``total_bytes`` are reached, the last one cut; all documents, where they have less."""
        chosen: list[Document] = []
        for index in np.random.default_rng(seed).permutation(self.num_documents).tolist():
            if total_bytes <= 0:
                break
            document = self.document(index)
            chosen.append(replace(document, data=document.data[: max(total_bytes, document.prompt_bytes + 1)]))
            total_bytes -= len(chosen[-1].data)
        return chosen


def open_shard(folder: Path, split: Split) -> ByteShard:
    """One split of the corpus in ``folder``, mapped, not read.

    Raises FileNotFoundError for a missing file, ValueError for files that do not belong together.
    """
    way_out = f"delete {folder} and build the corpus again"
    bytes_path, index_path = folder / f"{split}.bin", folder / f"{split}.index.npy"
    try:
        summary = CorpusSummary(**json.loads((folder / "summary.json").read_text()))
        offsets = np.load(index_path, mmap_mode="r")
        prompts_path = folder / f"{split}.prompts.npy"
        prompt_bytes = np.load(prompts_path, mmap_mode="r") if prompts_path.exists() else None
        num_bytes, num_documents = summary.bytes[split], summary.documents[split]
        if not bytes_path.stat().st_size == offsets[-1] == num_bytes or len(offsets) != num_documents + 1:
            raise ValueError(f"{bytes_path}, {index_path.name} and summary.json do not belong together")
        if prompt_bytes is not None and len(prompt_bytes) != num_documents:
            raise ValueError(f"{prompts_path} and {index_path.name} do not belong together")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing; {way_out}") from None
    except (ValueError, EOFError, TypeError, LookupError) as error:
        raise ValueError(f"the {split} shard in {folder} is damaged ({error}); {way_out}") from None
    return ByteShard(np.memmap(bytes_path, dtype=np.uint8, mode="r"), offsets, split, summary.fingerprint, prompt_bytes)


def num_rows(shard: ByteShard, row_bytes: int) -> int:
    """How many rows of ``row_bytes`` ids the shard's stream takes."""
    if shard.prompt_bytes is not None:
        return len(_bounds_of_whole_pairs(shard, row_bytes)) - 1
    return -(-_stream_start(shard, shard.num_documents) // row_bytes)


def row_ids(shard: ByteShard, row_index: int, row_bytes: int, hide_prompts: bool = False) -> NDArray[np.int64]:
    """One row of ``row_bytes + 1`` ids, BOS first: its inputs are all but the last, its targets all but the first.

    The shard is one stream of ids, BOS bytes EOS of each document in turn, and rows tile it: row r holds the ids from
    r * row_bytes on, behind a BOS, as in a prompt. Where the first of them is a document's own BOS, that is enough and
    the row has an id less. BOE fills a row's end and is nobody's target: over all rows, every byte and EOS is one once.

    Where documents are prompts and responses, a row ends before a document that it would cut, unless that fills a row and
    more. ``hide_prompts``: BOE in the place of every byte of a prompt, as in targets.

    >>> shard = ByteShard(np.frombuffer(b"abc", np.uint8), np.array([0, 2, 3]), "train", fingerprint="")
    >>> [row_ids(shard, row, row_bytes=3).tolist() for row in range(num_rows(shard, row_bytes=3))]
    [[1, 101, 102, 0], [1, 2, 1, 103], [1, 2, 0, 0]]
    """
    assert 0 <= row_index < num_rows(shard, row_bytes), f"there is no row {row_index}"
    start, stop = row_index * row_bytes, min((row_index + 1) * row_bytes, _stream_start(shard, shard.num_documents))
    if shard.prompt_bytes is not None:
        start, stop = _bounds_of_whole_pairs(shard, row_bytes)[row_index : row_index + 2]
    ids = _stream_ids(shard, start, stop, hide_prompts)
    if ids[0] != BOS:
        ids = np.concatenate([[BOS], ids])
    return np.pad(ids, (0, row_bytes + 1 - len(ids)), constant_values=BOE)


def rows_of(shard: ByteShard, row_indices: Iterable[int], row_bytes: int) -> ByteIds:
    """Several rows as one batch."""
    return torch.from_numpy(np.stack([row_ids(shard, row, row_bytes) for row in row_indices]))


def targets_of(shard: ByteShard, row_indices: Iterable[int], row_bytes: int) -> ByteIds:
    """What is to be predicted at each input of these rows: the next id, BOE where that is a byte of a prompt."""
    rows = [row_ids(shard, row, row_bytes, hide_prompts=True) for row in row_indices]
    return torch.from_numpy(np.stack(rows))[:, 1:]


def num_cut_pairs(shard: ByteShard, row_bytes: int) -> int:
    """How many documents, where some are prompts and responses, do not fit into a row with their BOS and EOS."""
    return 0 if shard.prompt_bytes is None else int((np.diff(shard.offsets) + 2 > row_bytes).sum())


@functools.lru_cache(maxsize=8)
def _bounds_of_whole_pairs(shard: ByteShard, row_bytes: int) -> list[int]:
    """The positions of the stream at which rows begin, and its end, where rows do not cut what would fit into one.

    >>> shard = ByteShard(np.frombuffer(b"abcdefghi", np.uint8), np.array([0, 2, 4, 9]), "train", "", np.array([1, 1, 1]))
    >>> _bounds_of_whole_pairs(shard, row_bytes=6)  # BOS a b EOS, BOS c d EOS, BOS e f g h i EOS
    [0, 4, 8, 14, 15]
    """
    starts = [_stream_start(shard, document) for document in range(shard.num_documents + 1)]
    bounds = [0]
    while bounds[-1] < starts[-1]:
        stop = min(bounds[-1] + row_bytes, starts[-1])
        cut = starts[bisect_right(starts, stop) - 1]  # where the document begins that the next row would go on with
        bounds.append(cut if cut > bounds[-1] else stop)
    return bounds


def _stream_ids(shard: ByteShard, start: int, stop: int, hide_prompts: bool = False) -> NDArray[np.int64]:
    """The ids at these positions of the shard's stream; ``hide_prompts`` as in ``row_ids``.

    >>> _stream_ids(ByteShard(np.frombuffer(b"abc", np.uint8), np.array([0, 2, 3]), "train", ""), 1, 6).tolist()
    [101, 102, 2, 1, 103]
    """
    first = bisect_right(range(shard.num_documents), start, key=lambda document: _stream_start(shard, document)) - 1
    last = bisect_right(range(shard.num_documents), stop - 1, key=lambda document: _stream_start(shard, document)) - 1
    starts = shard.offsets[first : last + 2] + 2 * np.arange(first, last + 2)  # of these documents and of what follows
    positions = np.arange(start, stop)
    documents = first + np.searchsorted(starts, positions, side="right") - 1
    byte_index = positions - 2 * documents - 1  # off the document at its BOS and EOS, which are written over it
    ids = shard.data.take(byte_index, mode="clip").astype(np.int64) + BYTE_OFFSET
    if hide_prompts and shard.prompt_bytes is not None:
        ids[byte_index - shard.offsets[documents] < shard.prompt_bytes[documents]] = BOE
    ids[np.isin(positions, starts)] = BOS
    ids[np.isin(positions + 1, starts)] = EOS
    return ids


def _stream_start(shard: ByteShard, document: int) -> int:
    """Where a document's BOS stands in the stream; of the number of documents: the stream's length."""
    return int(shard.offsets[document]) + 2 * document


class BatchReader:
    """Batches of a shard's rows; every epoch reads each row once, in an order of its own.

    Batch i depends only on the shard, the seed, the two sizes and i. ``state`` is how many rows were read, and of what.
    """

    def __init__(self, shard: ByteShard, row_bytes: int, rows_per_step: int, seed: int) -> None:
        self.shard = shard
        self.row_bytes = row_bytes
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.rows_read = 0
        self._order_of_epoch = (-1, np.empty(0, dtype=np.int64))

    def next_batch(self) -> ByteIds:
        """The next ``rows_per_step`` rows of ``row_bytes + 1`` ids."""
        return rows_of(self.shard, self.next_row_indices(), self.row_bytes)

    def next_row_indices(self) -> list[int]:
        """Which rows the next batch holds; an epoch may end within it."""
        places = range(self.rows_read, self.rows_read + self.rows_per_step)
        self.rows_read = places.stop
        return [self._row_at(place) for place in places]

    def state(self) -> dict[str, int | str]:
        """What ``restore`` needs to go on with the batch after the newest one."""
        return {
            "fingerprint": self.shard.fingerprint,
            "split": self.shard.split,
            "row_bytes": self.row_bytes,
            "seed": self.seed,
            "rows_read": self.rows_read,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Go on where a reader with this state stopped; ValueError where that one read other rows or another order."""
        for key, own in self.state().items():
            if key != "rows_read" and state.get(key) != own:
                raise ValueError(
                    f"the saved position belongs to {key} {state.get(key)!r}, this run has {own!r}; "
                    "resume with the data and settings of the saved run, or start a new one"
                )
        self.rows_read = int(state["rows_read"])

    def _row_at(self, place: int) -> int:
        epoch, index = divmod(place, num_rows(self.shard, self.row_bytes))
        if self._order_of_epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(num_rows(self.shard, self.row_bytes))
            self._order_of_epoch = (epoch, order)
        return int(self._order_of_epoch[1][index])
