"""Prompts and their responses: read whole, learned and scored in the response only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, decode, encode
from blt.corpus import (
    ByteShard,
    build_shards,
    corpus_fingerprint,
    num_cut_pairs,
    num_rows,
    open_shard,
    row_ids,
    rows_of,
    targets_of,
)
from blt.documents import Document, read_documents
from blt.evaluate import evaluate_inputs, score_documents, windows
from blt.progress import Reporter
from blt.shapes import ByteIds, Logits, PatchStarts

CPU = torch.device("cpu")
pairs = st.lists(st.tuples(st.binary(max_size=9), st.binary(min_size=1, max_size=12)), min_size=1, max_size=9)


def shard_of(found: list[tuple[bytes, bytes]]) -> ByteShard:
    texts = [prompt + response for prompt, response in found]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    prompts = np.array([len(prompt) for prompt, _ in found])
    return ByteShard(np.frombuffer(b"".join(texts), np.uint8), offsets, "train", "f", prompts)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# reading


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_a_pair_is_one_document_that_knows_its_prompt(name: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "né", "response": "oui"},
        {"prompt": "", "response": "x"},
        {"prompt": "unanswered", "response": ""},
    ]
    found = list(read_documents([write_rows(tmp_path / name, rows)]))
    assert [(document.data, document.prompt_bytes) for document in found[:2]] == [("néoui".encode(), 3), (b"x", 0)]
    assert found[2].data == b""  # nothing to learn, so it is skipped and counted as an empty document


def test_a_row_with_a_text_is_that_text_whatever_else_it_holds(tmp_path: Path) -> None:
    rows = [{"text": "a", "prompt": "b", "response": "c"}]
    for name in ("all.jsonl", "all.parquet"):
        (found,) = read_documents([write_rows(tmp_path / name, rows)])
        assert (found.data, found.prompt_bytes) == (b"a", 0)


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "response": None}, {"response": "a"}])
def test_half_a_pair_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(ValueError, match=r'line 1 has no string "text", nor "prompt" and "response"'):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.parquet"])
def test_a_row_whose_text_is_null_is_its_pair(name: str, tmp_path: Path) -> None:
    rows = [{"text": "t", "prompt": None, "response": None}, {"text": None, "prompt": "p", "response": "r"}]
    found = [(document.data, document.prompt_bytes) for document in read_documents([write_rows(tmp_path / name, rows)])]
    assert found == [(b"t", 0), (b"pr", 1)]


def test_a_column_of_numbers_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.parquet", [{"prompt": 1, "response": "r"}])
    with pytest.raises(ValueError, match="column 'prompt' holds int64, not text"):
        list(read_documents([path]))


# shards and rows


def test_prompts_survive_the_shards_and_count_in_the_fingerprint(tmp_path: Path) -> None:
    documents = [Document(str(i), f"question {i}: answer".encode(), 11 + i % 2) for i in range(40)]
    documents.append(Document("unanswered", b"", 5))
    summary = build_shards(documents, tmp_path / "corpus", 0.2)
    assert summary.fingerprint == corpus_fingerprint(documents, 0.2)
    documents.pop()
    lengths = {document.data: document.prompt_bytes for document in documents}
    found = [
        document for split in ("train", "held_out") for document in open_shard(tmp_path / "corpus", split).documents()
    ]
    assert len(found) == 40 and all(lengths[document.data] == document.prompt_bytes for document in found)
    without = [Document(document.name, document.data) for document in documents]
    assert summary.fingerprint != corpus_fingerprint(without, 0.2)
    build_shards(without, tmp_path / "plain", 0.2)
    assert open_shard(tmp_path / "plain", "train").prompt_bytes is None


def test_prompts_of_another_build_are_refused(tmp_path: Path) -> None:
    build_shards([Document(str(i), b"ab%d" % i, 1) for i in range(30)], tmp_path / "corpus", 0.2)
    np.save(tmp_path / "corpus" / "train.prompts.npy", np.array([1, 2]))
    with pytest.raises(ValueError, match=r"train\.prompts\.npy .* do not belong together.*delete"):
        open_shard(tmp_path / "corpus", "train")


def test_a_single_pair_is_cut_into_both_splits_with_its_prompt(tmp_path: Path) -> None:
    build_shards([Document("only", b"prompt" + b"r" * 94, 6)], tmp_path / "corpus", 0.1)
    train, held_out = (open_shard(tmp_path / "corpus", split).document(0) for split in ("train", "held_out"))
    assert (len(train.data), train.prompt_bytes) == (90, 6) and (len(held_out.data), held_out.prompt_bytes) == (10, 0)


@given(pairs, st.integers(4, 30))
def test_rows_cut_no_pair_that_fits_and_every_response_byte_and_end_is_a_target_once(
    found: list[tuple[bytes, bytes]], row_bytes: int
) -> None:
    shard = shard_of(found)
    rows = range(num_rows(shard, row_bytes))
    for prompt, response in found:
        whole = [BOS, *(byte + BYTE_OFFSET for byte in prompt + response), EOS]
        if len(whole) <= row_bytes:
            text = "".join(map(chr, whole))
            assert any(text in "".join(map(chr, row_ids(shard, row, row_bytes))) for row in rows)
    targets = targets_of(shard, rows, row_bytes)
    learned = [i for i in targets.flatten().tolist() if i not in (BOE, BOS)]
    assert learned == [i for _, response in found for i in (*(byte + BYTE_OFFSET for byte in response), EOS)]
    inputs = rows_of(shard, rows, row_bytes)
    assert inputs.shape == (len(rows), row_bytes + 1) and (inputs[:, 0] == BOS).all()
    kept = (targets != BOE) | (inputs[:, 1:] == BOE)
    assert targets[kept].equal(inputs[:, 1:][kept])  # what is hidden is hidden, the rest is the next id
    assert decode(inputs.flatten().tolist()) == b"".join(prompt + response for prompt, response in found)


def test_pairs_longer_than_a_row_are_counted() -> None:
    assert num_cut_pairs(shard_of([(b"abc", b"def"), (b"a", b"b")]), 7) == 1
    assert num_cut_pairs(shard_of([(b"abc", b"def"), (b"a", b"b")]), 8) == 0


def test_targets_of_plain_text_are_the_next_ids() -> None:
    shard = ByteShard(np.frombuffer(b"abcdefg", np.uint8), np.array([0, 3, 7]), "train", "f")
    assert targets_of(shard, range(3), 4).equal(rows_of(shard, range(3), 4)[:, 1:])


# scoring


def uniform(ids: ByteIds) -> tuple[Logits, None, PatchStarts]:
    return torch.zeros(*ids.shape, 260), None, torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)


@given(st.binary(min_size=1, max_size=40), st.integers(2, 20), st.integers(0, 39))
def test_windows_score_each_byte_after_the_prompt_once(data: bytes, window_bytes: int, prompt: int) -> None:
    prompt = min(prompt, len(data))
    scored = [window.ids[window.first_scored :] for window in windows(encode(data), window_bytes, prompt)]
    assert decode([i for ids in scored for i in ids]) == data[prompt:]
    assert all(
        0 < window.first_scored < len(window.ids) <= window_bytes
        for window in windows(encode(data), window_bytes, prompt)
    )


def test_only_responses_count_in_scores() -> None:
    documents = [b"prompt: yes", b"no prompt"]
    scores = score_documents(uniform, documents, 6, CPU, prompt_bytes=[8, 0])
    assert [score.bytes for score in scores] == [3, 9]
    with Reporter(quiet=True) as reporter:
        inputs = {"pairs": [Document("", documents[0], 8), Document("", documents[1])]}
        figures = evaluate_inputs(uniform, inputs, 6, CPU, reporter)
    assert figures["bytes"] == 12 and figures["bits_per_byte"] == pytest.approx(np.log2(260))
