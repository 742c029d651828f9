"""Next-id logits -> a distribution -> a drawn id."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, incomplete_suffix_length, utf8_allowed_next

NextLogits = Float[Tensor, " vocab"]
Probabilities = Float[Tensor, " vocab"]
NEVER_EMITTED = (BOE, BOS, 3)


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. Temperature 0 is greedy; the filters apply in the order top-k, top-p, min-p."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k most probable ids
    top_p: float | None = None  # only the most probable ids that together reach probability p
    min_p: float | None = None  # only ids at least min_p times as probable as the most probable one
    utf8: bool = False  # only bytes that keep the text well-formed UTF-8, by renormalising

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def next_probabilities(logits: NextLogits, sampling: Sampling, text: bytes) -> Probabilities:
    """The distribution the next id is drawn from, after the bytes ``text``.

    >>> logits = torch.zeros(260); logits[101] = 3.0; logits[102] = 2.0
    >>> next_probabilities(logits, Sampling(temperature=1.0, top_k=2), b"").nonzero().flatten().tolist()
    [101, 102]
    """
    logits = logits.float().clone()
    logits[list(NEVER_EMITTED)] = -torch.inf
    if sampling.utf8:
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[[byte + BYTE_OFFSET for byte in utf8_allowed_next(text)]] = True
        allowed[EOS] = incomplete_suffix_length(text) == 0
        logits[~allowed] = -torch.inf
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(0)
    if sampling.top_k is not None:
        smallest_kept = probabilities.topk(min(sampling.top_k, len(probabilities))).values[-1]
        probabilities = torch.where(probabilities >= smallest_kept, probabilities, 0)
    if sampling.top_p is not None:
        ordered, order = (probabilities / probabilities.sum()).sort(descending=True)
        before = ordered.cumsum(0) - ordered
        probabilities = torch.zeros_like(probabilities).scatter_(
            0, order, torch.where(before < sampling.top_p, ordered, 0)
        )
    if sampling.min_p is not None:
        probabilities = torch.where(probabilities >= sampling.min_p * probabilities.max(), probabilities, 0)
    return probabilities / probabilities.sum()


def draw(probabilities: Probabilities, generator: torch.Generator) -> int:
    """An id, with the probability that it has here (up to a common factor): one uniform number of the generator each.

    >>> draw(torch.tensor([0.0, 0.0, 2.0, 0.0]), torch.Generator())
    2
    """
    cumulative = probabilities.double().cumsum(0)
    # below the last sum also after rounding, as the uniform number has 24 bits: an id of probability 0 is never drawn
    level = torch.rand((), generator=generator).double() * cumulative[-1]
    return int(torch.searchsorted(cumulative, level, right=True))
