"""Files become documents, documents shards, shards rows of ids: nothing lost, nothing twice, and always the same."""

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, decode
from blt.corpus import (
    BatchReader,
    ByteShard,
    build_shards,
    is_held_out,
    num_rows,
    open_shard,
    row_ids,
)
from blt.documents import Document, read_documents

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def contents(*paths: Path | str, raw: bool = False) -> list[bytes]:
    return [document.data for document in read_documents(paths, raw)]


def shard_of(documents: list[bytes], fingerprint: str = "f") -> ByteShard:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return ByteShard(np.frombuffer(b"".join(documents), np.uint8), offsets, "train", fingerprint)


def numbered(count: int) -> list[Document]:
    return [Document(f"{i}", f"document {i}\n".encode() * (i % 7 + 1)) for i in range(count)]


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# reading


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet", ""])
def test_every_kind_of_file_is_read_through_every_compression(tmp_path: Path, kind: str, suffix: str) -> None:
    texts = ["first\n", "zweitens: äöü €", ""]
    data, expected = {
        ".jsonl": ("".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts).encode(), texts),
        ".parquet": (parquet_bytes(pa.table({"id": [1, 2, 3], "text": texts})), texts),
    }.get(kind, ("".join(texts).encode(), ["".join(texts)]))
    path = tmp_path / f"file{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    assert contents(path) == [text.encode() for text in expected]
    assert contents(tmp_path) == [text.encode() for text in expected]


def test_a_byte_order_mark_is_no_part_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8-sig")
    assert contents(path) == [b"one", b"two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_files_may_be_several_in_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"two.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
    assert contents(path) == [b"one two"]


def test_raw_files_are_one_document_as_they_lie_on_disk(tmp_path: Path) -> None:
    files = {"a.jsonl": b"{broken", "b.txt.gz": gzip.compress(b"text"), "c.png": b"\0\1\2"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert contents(tmp_path, raw=True) == list(files.values())


def test_text_that_is_not_utf8_is_bytes_and_fine(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    rows = [b'{"text": "caf\xe9"}', b'{"text": "half \\ud83d"}', b'{"text": "whole \\ud83d\\ude00"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    assert contents(tmp_path) == [b"caf\xe9", b"caf\xe9", b"half \xed\xa0\xbd", "whole 😀".encode()]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", "", "b"]).dictionary_encode(),
        pa.array([b"a", b"", b"b"]),
    ],
)
def test_parquet_text_may_be_any_kind_of_string(tmp_path: Path, column: pa.Array) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(pa.table({"text": column})))
    assert contents(tmp_path / "x.parquet") == [b"a", b"", b"b"]


def test_folders_are_read_sorted_without_hidden_and_binary_files(tmp_path: Path) -> None:
    files = ["b/2.txt", "b/1.txt", "a.txt", ".hidden.txt", ".git/config", "b/.x/y.txt", "c.png", "d.tar.gz", "e"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0 binary" if name == "e" else name.encode())
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert contents(tmp_path) == [b"a.txt", b"b/1.txt", b"b/2.txt"]
    assert contents(tmp_path / "e", tmp_path / "c.png") == [b"\0 binary", b"c.png"], "named files are always read"


def test_stdlib_is_megabytes_of_python_without_tests() -> None:
    documents = list(read_documents(["stdlib"]))
    assert sum(len(document.data) for document in documents) >= 5_000_000
    folders = {part for document in documents for part in Path(document.name).parts[:-1]}
    assert all(document.name.endswith(".py") for document in documents)
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_a_missing_path_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*check it.*stdlib"):
        next(read_documents([tmp_path / "there.txt", tmp_path / "nowhere"]))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, kind: str, suffix: str, damage: str) -> None:
    whole = COMPRESS[suffix](b'{"text": "abc"}\n' * 5000)
    path = tmp_path / f"file{kind}{suffix}"
    path.write_bytes(whole[:-7] if damage == "truncated" else b"plain text")
    for where in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"file{kind}{suffix} is damaged.*replace it or leave it out"):
            contents(where)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r'a\.jsonl, line 2 has no string "text".*--raw'),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1 has no string"),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1 has no string"),
        ("a.jsonl", b'{"text": ', r"a\.jsonl, line 1 is not JSON.*--raw"),
        (
            "a.parquet",
            parquet_bytes(pa.table({"id": [1], "body": ["x"]})),
            r"a\.parquet has no column 'text', nor 'prompt' and 'response', only id, b",
        ),
        ("a.parquet", parquet_bytes(pa.table({"text": [1]})), r"a\.parquet: column 'text' holds int64, not text"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is damaged"),
    ],
)
def test_rows_without_text_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        contents(tmp_path / name)


def test_a_folder_with_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="nothing to read in folder"):
        contents(tmp_path)


# splitting and building


@given(st.binary(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_document_held_out_at_a_fraction_is_held_out_at_larger_ones(data: bytes, one: float, two: float) -> None:
    assert is_held_out(data, min(one, two)) <= is_held_out(data, max(one, two))


def test_the_held_out_fraction_is_kept() -> None:
    held_out = sum(is_held_out(str(i).encode(), 0.1) for i in range(5000))
    assert held_out == pytest.approx(500, abs=100)


def test_splits_are_disjoint_and_do_not_depend_on_order_names_or_copies(tmp_path: Path) -> None:
    once = numbered(60)
    shuffled = [Document("other name", document.data) for document in reversed(once + once)]
    splits = []
    for name, documents in (("a", once), ("b", shuffled)):
        build_shards(documents, tmp_path / name, 0.2)
        sides = [open_shard(tmp_path / name, split) for split in ("train", "held_out")]
        splits.append([{side.document(i).data for i in range(side.num_documents)} for side in sides])
    assert splits[0] == splits[1]
    train, held_out = splits[0]
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == {document.data for document in once}


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    documents = numbered(40)
    documents[5:5] = [Document("empty", b"")] * 3
    summary = build_shards(documents, tmp_path / "corpus", 0.2)
    assert summary.empty_skipped == 3
    assert sum(summary.documents.values()) == 40
    assert sum(summary.bytes.values()) == sum(len(document.data) for document in documents)
    on_disk = json.loads((tmp_path / "corpus" / "summary.json").read_text())
    assert on_disk == vars(summary)
    for split in ("train", "held_out"):
        shard = open_shard(tmp_path / "corpus", split)
        assert (shard.num_documents, shard.num_bytes) == (summary.documents[split], summary.bytes[split])


def test_the_fingerprint_follows_contents_and_fraction(tmp_path: Path) -> None:
    def fingerprint(*contents: bytes, fraction: float = 0.5) -> str:
        documents = [Document("", data) for data in contents]
        return build_shards(documents, tmp_path / "corpus", fraction).fingerprint

    assert fingerprint(b"ab", b"cd") == fingerprint(b"ab", b"", b"cd")
    different = [fingerprint(b"ab", b"cd"), fingerprint(b"abc", b"d"), fingerprint(b"ab", b"cd", fraction=0.4)]
    assert len(set(different)) == 3


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_the_tail_of_a_single_document_is_held_out(tmp_path: Path, fraction: float) -> None:
    text = bytes(range(200))
    build_shards([Document("one", text)], tmp_path / "corpus", fraction)
    train, held_out = (open_shard(tmp_path / "corpus", split) for split in ("train", "held_out"))
    assert train.document(0).data + held_out.document(0).data == text
    assert held_out.num_bytes == max(1, int(200 * fraction))


@given(
    st.lists(st.binary(min_size=1, max_size=3), max_size=4), st.binary(min_size=2, max_size=4), st.floats(0.01, 0.99)
)
@settings(max_examples=40, deadline=None)
def test_no_split_is_ever_empty_and_no_byte_is_lost(
    tmp_path_factory: pytest.TempPathFactory, before: list[bytes], last: bytes, fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("build") / "corpus"
    summary = build_shards([Document("", data) for data in (*before, last)], folder, fraction)
    assert min(summary.bytes.values()) > 0
    written = b"".join(open_shard(folder, split).data.tobytes() for split in ("train", "held_out"))
    assert Counter(written) == Counter(b"".join([*before, last]))


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "no bytes"), ([b"", b""], r"no bytes \(2 empty documents\)"), ([b"x"], "too small to hold anything out")],
)
def test_a_corpus_of_next_to_nothing_is_an_error(tmp_path: Path, documents: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_shards([Document("", data) for data in documents], tmp_path / "corpus", 0.1)
    assert not (tmp_path / "corpus").exists()


def test_a_killed_build_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def documents_until_killed() -> Any:
        yield from numbered(10)
        killed()

    with pytest.raises(KeyboardInterrupt):
        build_shards(documents_until_killed(), folder, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            build_shards(numbered(20), folder, 0.2)
    with pytest.raises(FileNotFoundError, match=r"summary.json is missing.*build the corpus again"):
        open_shard(folder, "train")

    (tmp_path / "corpus.partial" / "left over").touch()
    summary = build_shards(numbered(30), folder, 0.2)
    assert sum(summary.documents.values()) == 30
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert not (folder / "left over").exists()


def test_a_build_replaces_a_corpus_and_nothing_else(tmp_path: Path) -> None:
    build_shards(numbered(10), tmp_path / "corpus", 0.2)
    assert sum(build_shards(numbered(20), tmp_path / "corpus", 0.2).documents.values()) == 20
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis exists and is no corpus; give another folder"):
        build_shards(numbered(10), tmp_path / "thesis", 0.2)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["summary.json", "train.bin", "train.index.npy"])
def test_missing_and_damaged_shard_files_are_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "corpus"
    build_shards(numbered(30), folder, 0.2)
    path = folder / name
    whole = path.read_bytes()
    for damaged in (whole[:-8], b"", b"[]", whole + b"more"):
        path.write_bytes(damaged)
        if name == "train.index.npy" and damaged.endswith(b"more"):
            continue  # bytes beyond the array are never read
        with pytest.raises(
            ValueError, match=rf"the train shard in {folder} is damaged.*delete .*build the corpus again"
        ):
            open_shard(folder, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; delete {folder} and build the corpus again"):
        open_shard(folder, "train")


def test_shards_of_two_builds_do_not_mix(tmp_path: Path) -> None:
    build_shards(numbered(30), tmp_path / "a", 0.2)
    build_shards(numbered(31), tmp_path / "b", 0.2)
    (tmp_path / "a" / "summary.json").write_bytes((tmp_path / "b" / "summary.json").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        open_shard(tmp_path / "a", "train")
    index = tmp_path / "b" / "train.index.npy"
    np.save(index, np.delete(np.load(index), 1))  # as many bytes in fewer documents
    with pytest.raises(ValueError, match="do not belong together"):
        open_shard(tmp_path / "b", "train")


def test_a_sample_is_whole_documents_and_one_cut_the_same_for_a_seed() -> None:
    documents = [document.data for document in numbered(30)]
    shard = shard_of(documents)

    def sampled(total_bytes: int, seed: int) -> list[bytes]:
        return [document.data for document in shard.sample(total_bytes, seed)]

    sample = sampled(200, seed=1)
    assert sum(map(len, sample)) == 200
    assert set(sample[:-1]) <= set(documents)
    assert any(document.startswith(sample[-1]) for document in documents)
    assert sample == sampled(200, seed=1) != sampled(200, seed=2)
    assert sorted(sampled(10**9, seed=1)) == sorted(documents)


# rows

some_documents = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=12)


@given(some_documents, st.integers(1, 40))
@settings(deadline=None)
def test_rows_tile_the_stream_of_documents(documents: list[bytes], row_bytes: int) -> None:
    shard = shard_of(documents)
    stream = [i for document in documents for i in (BOS, *(byte + BYTE_OFFSET for byte in document), EOS)]
    assert num_rows(shard, row_bytes) == len(range(0, len(stream), row_bytes))
    for row, start in enumerate(range(0, len(stream), row_bytes)):
        segment = stream[start : start + row_bytes]
        ids = segment if segment[0] == BOS else [BOS, *segment]
        assert row_ids(shard, row, row_bytes).tolist() == ids + [BOE] * (row_bytes + 1 - len(ids))


@given(some_documents, st.integers(1, 40))
@settings(deadline=None)
def test_every_byte_and_end_is_a_target_exactly_once(documents: list[bytes], row_bytes: int) -> None:
    shard = shard_of(documents)
    targets = [i for row in range(num_rows(shard, row_bytes)) for i in row_ids(shard, row, row_bytes)[1:].tolist()]
    assert decode(targets) == b"".join(documents)
    closed = [i for i in targets if i not in (BOE, BOS)]
    assert closed == [i for document in documents for i in (*(byte + BYTE_OFFSET for byte in document), EOS)]


def reader_of(fingerprint: str = "f", row_bytes: int = 16, rows_per_step: int = 3, seed: int = 0) -> BatchReader:
    shard = shard_of([document.data for document in numbered(10)], fingerprint)
    return BatchReader(shard, row_bytes, rows_per_step, seed)


def test_every_epoch_reads_each_row_once_in_an_order_of_its_own() -> None:
    reader = reader_of()
    rows = num_rows(reader.shard, 16)
    assert rows % 3, "an epoch ends within a batch"
    read = torch.cat([reader.next_batch() for _ in range(rows)]).tolist()  # three epochs
    in_order = [row_ids(reader.shard, row, 16).tolist() for row in range(rows)]
    epochs = [read[start : start + rows] for start in range(0, 3 * rows, rows)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order)
    assert all(one != other for one, other in zip([in_order, *epochs], [*epochs, in_order], strict=True))


def test_a_reader_stopped_after_any_batch_resumes_with_the_same_batches() -> None:
    whole = reader_of()
    batches = [whole.next_batch() for _ in range(40)]
    assert batches[0].dtype == torch.int64
    assert batches[0].shape == (3, 17)
    for stop in (0, 1, 7, 20, 39):
        stopped = reader_of()
        for _ in range(stop):
            stopped.next_batch()
        state = json.loads(json.dumps(stopped.state()))
        resumed = reader_of()
        resumed.next_batch()  # what it did before does not matter
        resumed.restore(state)
        assert all(torch.equal(resumed.next_batch(), batch) for batch in batches[stop:])


def test_batches_follow_the_seed() -> None:
    assert torch.equal(reader_of(seed=1).next_batch(), reader_of(seed=1).next_batch())
    assert not torch.equal(reader_of(seed=1).next_batch(), reader_of(seed=2).next_batch())


@pytest.mark.parametrize("changed", [{"fingerprint": "g"}, {"seed": 5}, {"row_bytes": 15}])
def test_a_state_of_another_run_is_refused(changed: dict[str, Any]) -> None:
    ((key, value),) = changed.items()
    with pytest.raises(ValueError, match=rf"belongs to {key} {value!r}, this run has .*; resume with"):
        reader_of().restore(reader_of(**changed).state())


def test_a_built_corpus_reads_back_through_batches(tmp_path: Path) -> None:
    build_shards(numbered(50), tmp_path / "corpus", 0.2)
    shard = open_shard(tmp_path / "corpus", "train")
    reader = BatchReader(shard, row_bytes=64, rows_per_step=num_rows(shard, 64), seed=3)
    assert Counter(decode(reader.next_batch()[:, 1:].flatten().tolist())) == Counter(shard.data.tobytes())
