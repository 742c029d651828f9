"""Held-out text -> bits per byte and patch statistics, each byte scored once, beside what compressors reach."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from blt.byte_ids import BOE, encode
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

    def as_json(self) -> dict[str, float | int | None]:
        """The keys of ``blt evaluate --json``."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "bytes": self.bytes,
            "patches": self.patches,
            "mean_patch_bytes": self.mean_patch_bytes,
            "entropy_model_bits_per_byte": self.entropy_model_bits_per_byte,
        }


@dataclass(frozen=True)
class Window:
    """A stretch of one document as a row: BOS, then bytes; those from ``first_scored`` on are scored here."""

    ids: list[int]
    first_scored: int  # index into ids


def windows(data: bytes, window_bytes: int) -> Iterator[Window]:
    """Overlapping rows of at most ``window_bytes`` ids that score each byte of a document once.

    Every row begins with BOS; all but the first score only their second half, so each byte has at least half a window
    of context, or all there is before it in the document.

    >>> [(len(w.ids), w.first_scored) for w in windows(b"abcdefgh", 5)]
    [(5, 1), (5, 3), (5, 3)]
    """
    ids = encode(data)
    scored, half = min(len(ids), window_bytes), max(1, window_bytes // 2)
    yield Window(ids[:scored], 1)
    while scored < len(ids):
        end = min(len(ids), scored + half)
        begin = max(1, end - (window_bytes - 1))
        yield Window([ids[0], *ids[begin:end]], 1 + scored - begin)
        scored = end


@torch.no_grad()
def score_documents(
    predict: Predictor, documents: Sequence[bytes], window_bytes: int, device: torch.device, batch_rows: int = 16
) -> list[Score]:
    """One score per document. EOS is not scored: bits of bytes over number of bytes."""
    scores = [Score(entropy_model_bits=0.0) for _ in documents]
    rows = ((index, window) for index, data in enumerate(documents) if data for window in windows(data, window_bytes))
    while batch := list(islice(rows, batch_rows)):
        longest = max(len(window.ids) for _, window in batch)
        ids = torch.tensor([window.ids + [BOE] * (longest - len(window.ids)) for _, window in batch], device=device)
        logits, entropy_logits, starts = predict(ids)
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
    return scores


def _bits(logits: Logits, ids: ByteIds) -> Tensor:
    """Bits that each id costs given the ids before it; entry 0, which nothing predicts, is 0."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return F.pad(nats.view(len(ids), -1).double() / math.log(2), (1, 0))


def compressor_bits_per_byte(documents: Sequence[bytes]) -> dict[str, float]:
    """What ``gzip -9`` and ``xz -9e`` make of the documents joined into one stream, their most favourable case."""
    joined = b"".join(documents)
    sizes = {
        "gzip -9": len(gzip.compress(joined, 9, mtime=0)),
        "xz -9e": len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / max(1, len(joined)) for name, size in sizes.items()}
