"""Bits per byte: every byte is scored once, with the context it was promised."""

import gzip
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt.byte_ids import BYTE_OFFSET, decode, encode
from blt.documents import Document
from blt.evaluate import Score, compressor_bits_per_byte, evaluate_inputs, score_documents, total_score, windows
from blt.progress import Reporter

CPU = torch.device("cpu")


def uniform(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model that holds all 256 bytes equally likely, and starts a patch at every third position."""
    logits = torch.zeros(*ids.shape, 260)
    logits[..., :BYTE_OFFSET] = -torch.inf
    starts = (torch.arange(ids.shape[1] + 1) % 3 == 1).expand(len(ids), -1)
    return logits, 2 * logits, starts


@given(st.binary(min_size=1, max_size=60), st.integers(2, 20))
def test_windows_score_each_byte_once_with_half_a_window_of_context(data: bytes, window_bytes: int) -> None:
    scored = b""
    for window in windows(encode(data), window_bytes):
        assert len(window.ids) <= window_bytes
        assert window.ids[0] == 1
        before = decode(window.ids[: window.first_scored])
        assert scored.endswith(before)
        everything_before = len(before) == len(scored)
        assert everything_before or window.first_scored >= window_bytes // 2
        scored += decode(window.ids[window.first_scored :])
    assert scored == data


def test_a_uniform_model_gives_eight_bits_per_byte() -> None:
    documents = [b"abc" * 50, b"x", bytes(range(256))]
    scores = score_documents(uniform, documents, 16, CPU)
    assert [score.bytes for score in scores] == [150, 1, 256]
    for score in scores:
        assert score.bits_per_byte == pytest.approx(8.0, abs=1e-6)
        assert score.entropy_model_bits_per_byte == pytest.approx(8.0, abs=1e-6)


def test_the_score_of_a_batch_is_the_score_of_each_document_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(260, 260, generator=generator)

    def bigram(ids: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return table[ids], None, torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)

    documents = [b"hello world, this is text", b"", b"short", b"another one of some length here"]
    together = score_documents(bigram, documents, 12, CPU)
    for data, score in zip(documents, together, strict=True):
        (alone,) = score_documents(bigram, [data], 12, CPU)
        assert score.bits == pytest.approx(alone.bits)
        assert (score.bytes, score.patches) == (alone.bytes, alone.patches)
    # windows give a bigram model all the context it can use, so the sum must be the plain one
    ids = torch.tensor([1, *(byte + BYTE_OFFSET for byte in documents[0])])
    nats = -table[ids[:-1]].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    assert together[0].bits == pytest.approx(float(nats.sum()) / math.log(2), rel=1e-5)


def test_scores_add_up() -> None:
    total = total_score([Score(10, 20.0, 2, 30.0), Score(30, 20.0, 6, 50.0)])
    assert (total.bits_per_byte, total.mean_patch_bytes, total.entropy_model_bits_per_byte) == (1.0, 5.0, 2.0)
    assert total_score([Score(1, 1.0, 1, None), Score(1, 1.0, 1, 2.0)]).entropy_model_bits_per_byte is None


def test_compressors_are_given_the_documents_in_one_piece() -> None:
    documents = [b"the same text " * 20] * 3
    bits = compressor_bits_per_byte(documents)
    assert bits["gzip_bits_per_byte"] == 8 * len(gzip.compress(b"".join(documents), 9, mtime=0)) / 840
    assert bits["xz_bits_per_byte"] < 8


def test_the_report_counts_what_it_skipped_and_splits_by_input() -> None:
    inputs = {"a": [Document("1", b"abcdef"), Document("2", b"")], "b": [Document("3", b"xyz")]}
    figures = evaluate_inputs(uniform, inputs, 8, CPU, Reporter(quiet=True))
    assert figures["bytes"] == 9
    assert figures["empty_documents_skipped"] == 1
    assert figures["files"]["a"]["bytes"] == 6
    assert figures["files"]["b"]["bits_per_byte"] == pytest.approx(8.0, abs=1e-6)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_inputs(uniform, {"a": [Document("1", b"")]}, 8, CPU, Reporter(quiet=True))
