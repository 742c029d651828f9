"""Held-out text -> bits per byte and patch statistics, each byte scored once, beside what compressors reach."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blt.byte_ids import BOE, encode
from blt.documents import Document
from blt.progress import Reporter
from blt.shapes import ByteIds, Logits, PatchStarts

Predictor = Callable[[ByteIds], tuple[Logits, Logits | None, PatchStarts]]  # network logits, entropy model's, starts


@dataclass(frozen=True)
class Score:
    """What a model makes of some bytes. Sums, so that scores of parts add up to the score of the whole."""

    bytes: int = 0
    bits: float = 0.0
    patches: int = 0  # BOS patches left out
    entropy_model_bits: float | None = None  # None: the model has no entropy model

    def __add__(self, other: "Score") -> "Score":
        both = self.entropy_model_bits is not None and other.entropy_model_bits is not None
        return Score(
            self.bytes + other.bytes,
            self.bits + other.bits,
            self.patches + other.patches,
            self.entropy_model_bits + other.entropy_model_bits if both else None,  # type: ignore[operator]
        )

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(1, self.bytes)

    @property
    def mean_patch_bytes(self) -> float:
        return self.bytes / max(1, self.patches)

    @property
    def entropy_model_bits_per_byte(self) -> float | None:
        return None if self.entropy_model_bits is None else self.entropy_model_bits / max(1, self.bytes)

    def as_json(self) -> dict[str, Any]:
        """The keys of ``blt evaluate --json``."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "bytes": self.bytes,
            "patches": self.patches,
            "mean_patch_bytes": self.mean_patch_bytes,
            "entropy_model_bits_per_byte": self.entropy_model_bits_per_byte,
        }


def total_score(scores: Sequence[Score]) -> Score:
    """The score of everything together."""
    return sum(scores[1:], scores[0]) if scores else Score()


@dataclass(frozen=True)
class Window:
    """A stretch of one document as a row: BOS, then bytes; those from ``first_scored`` on are scored here."""

    ids: list[int]
    first_scored: int  # index into ids


def windows(ids: list[int], window_bytes: int, prompt_bytes: int = 0) -> Iterator[Window]:
    """Overlapping rows of at most ``window_bytes`` ids that score each byte of a document, its prompt left out, once.

    Every row begins with BOS; all but the first score only their second half, so each byte has at least half a window
    of context, or all there is before it in the document.

    >>> [(len(w.ids), w.first_scored) for w in windows(encode("abcdefgh"), 5)]
    [(5, 1), (5, 3), (5, 3)]
    >>> [(len(w.ids), w.first_scored) for w in windows(encode("abcdefgh"), 5, prompt_bytes=5)]
    [(5, 4), (5, 3)]
    """
    first = 1 + prompt_bytes
    scored, half = min(len(ids), window_bytes), max(1, window_bytes // 2)
    if first < scored:
        yield Window(ids[:scored], first)
    while scored < len(ids):
        end = min(len(ids), scored + half)
        begin = max(1, end - (window_bytes - 1))
        if first < end:
            yield Window([ids[0], *ids[begin:end]], 1 + max(scored, first) - begin)
        scored = end


def score_documents(
    predict: Predictor, documents: Sequence[bytes], window_bytes: int, device: torch.device, **options: Any
) -> list[Score]:
    """One score per document; options as in ``score_ids``."""
    return score_ids(predict, [encode(data) for data in documents], window_bytes, device, **options)


@torch.no_grad()
def score_ids(
    predict: Predictor,
    documents: Sequence[list[int]],
    window_bytes: int,
    device: torch.device,
    batch_ids: int = 8192,
    on_scored: Callable[[int], None] = lambda num_bytes: None,
    prompt_bytes: Sequence[int] | None = None,
) -> list[Score]:
    """One score per document of ids, BOS first, ``batch_ids`` positions at a time; ``on_scored`` hears how many bytes each
    batch scored.

    EOS is not scored, nor are each document's first ``prompt_bytes``: bits of bytes over number of bytes.
    """
    scores = [Score(entropy_model_bits=0.0) for _ in documents]
    prompts = prompt_bytes or [0] * len(documents)
    rows = (
        (index, window)
        for index, (ids, prompt) in enumerate(zip(documents, prompts, strict=True))
        if len(ids) > 1
        for window in windows(ids, window_bytes, prompt)
    )
    while batch := list(islice(rows, max(1, batch_ids // window_bytes))):
        longest = max(len(window.ids) for _, window in batch)
        ids = torch.tensor([window.ids + [BOE] * (longest - len(window.ids)) for _, window in batch], device=device)
        logits, entropy_logits, starts = predict(ids)
        starts = starts.cpu()
        bits = _bits(logits, ids)
        entropy_bits = None if entropy_logits is None else _bits(entropy_logits, ids)
        for row, (index, window) in enumerate(batch):
            scored = slice(window.first_scored, len(window.ids))
            scores[index] += Score(
                bytes=len(window.ids) - window.first_scored,
                bits=float(bits[row, scored].sum()),
                patches=int(starts[row, scored].sum()),
                entropy_model_bits=None if entropy_bits is None else float(entropy_bits[row, scored].sum()),
            )
        on_scored(sum(len(window.ids) - window.first_scored for _, window in batch))
    return scores


def _bits(logits: Logits, ids: ByteIds) -> Tensor:
    """Bits that each id costs given the ids before it; entry 0, which nothing predicts, is 0."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return F.pad(nats.view(len(ids), -1).cpu().double() / math.log(2), (1, 0))  # some devices have no float64


def evaluate_inputs(
    predict: Predictor,
    inputs: Mapping[str, Sequence[Document]],
    window_bytes: int,
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Any]:
    """Figures over all inputs, beside compressors on the same bytes, and ``files``: the same for each input.

    Of a prompt and its response, the response is what counts. Empty documents are skipped and counted. Raises ValueError where
    there is nothing to score.
    """
    everything = [document for documents in inputs.values() for document in documents]
    total_bytes = sum(len(_scored_part(document)) for document in everything)
    if total_bytes == 0:
        raise ValueError(f"nothing to evaluate: every document of {', '.join(inputs)} is empty")
    done, files, of_inputs = 0, {}, []

    def on_scored(num_bytes: int) -> None:
        nonlocal done
        before, done = done, done + num_bytes
        if 10 * done // total_bytes > 10 * before // total_bytes:
            reporter.show("evaluation", done, total_bytes, f"{done / 1e6:.2f} MB")

    for name, documents in inputs.items():
        if not any(document.data for document in documents):
            continue
        texts, prompts = [document.data for document in documents], [document.prompt_bytes for document in documents]
        scored = total_score(
            score_documents(predict, texts, window_bytes, device, on_scored=on_scored, prompt_bytes=prompts)
        )
        files[name] = scored.as_json() | compressor_bits_per_byte([_scored_part(document) for document in documents])
        of_inputs.append(scored)
    empty = sum(not document.data for document in everything)
    figures = total_score(of_inputs).as_json() | compressor_bits_per_byte([*map(_scored_part, everything)])
    return figures | {"window_bytes": window_bytes, "empty_documents_skipped": empty, "files": files}


def _scored_part(document: Document) -> bytes:
    return document.data[document.prompt_bytes :]


def evaluation_line(figures: Mapping[str, Any]) -> str:
    """The figures of ``evaluate_inputs`` as a person reads them."""
    model, gzip_bits, xz_bits = (figures[f"{name}bits_per_byte"] for name in ("", "gzip_", "xz_"))
    entropy_model = figures["entropy_model_bits_per_byte"]
    own = "" if entropy_model is None else f"  entropy model {entropy_model:.3f}"
    patches = f"patches {figures['mean_patch_bytes']:.2f} bytes"
    return f"BLT {model:.3f}{own}  gzip -9 {gzip_bits:.3f}  xz -9e {xz_bits:.3f}  {patches}"


def compressor_bits_per_byte(documents: Sequence[bytes]) -> dict[str, float]:
    """What ``gzip -9`` and ``xz -9e`` make of the documents joined into one stream, their most favourable case."""
    joined = b"".join(documents)
    sizes = {
        "gzip_bits_per_byte": len(gzip.compress(joined, 9, mtime=0)),
        "xz_bits_per_byte": len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / max(1, len(joined)) for name, size in sizes.items()}
