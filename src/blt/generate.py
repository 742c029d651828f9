"""Next-id logits -> sampled bytes, as a stream: one id at a time until a limit, a stop string or EOS."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, incomplete_suffix_length, utf8_allowed_next

NextLogits = Float[Tensor, " vocab"]
NEVER_EMITTED = (BOE, BOS, 3)


@dataclass
class GenerationStats:
    """What a stream has cost so far."""

    latent_calls: int = 0  # forward passes of the latent transformer


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


def next_probabilities(logits: NextLogits, sampling: Sampling, text: bytes) -> NextLogits:
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


def generate_ids(
    next_logits: Callable[[list[int]], NextLogits],
    prompt_ids: Sequence[int],
    max_bytes: int,
    sampling: Sampling,
    generator: torch.Generator,
    stats: GenerationStats,
) -> Iterator[int]:
    """Ids after the prompt, until EOS (not yielded) or ``max_bytes``. Recomputes everything for every byte.

    ``next_logits`` maps all ids so far to the logits of the next.
    """
    ids = list(prompt_ids)
    text = bytes(byte_id - BYTE_OFFSET for byte_id in ids if byte_id >= BYTE_OFFSET)
    for _ in range(max_bytes):
        probabilities = next_probabilities(next_logits(ids).cpu(), sampling, text[-3:])
        stats.latent_calls += 1
        byte_id = int(torch.multinomial(probabilities, 1, generator=generator))
        if byte_id == EOS:
            return
        ids.append(byte_id)
        text = text[-3:] + bytes([byte_id - BYTE_OFFSET])
        yield byte_id


def stream_text(ids: Iterator[int], stop: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Pieces of bytes as soon as they are final: never a part of a UTF-8 character, never past a stop string.

    The stop string itself is left out. What is no UTF-8 at all comes out as it is; so does a character that the end
    of the stream cuts.

    >>> list(stream_text(iter([4 + byte for byte in "é!STOP".encode()]), stop=[b"STOP"]))
    [b'\\xc3\\xa9', b'!']
    """
    held = b""
    for byte_id in ids:
        held += bytes([byte_id - BYTE_OFFSET])
        found = [place for place in (held.find(word) for word in stop) if place >= 0]
        if found:
            held = held[: min(found)]
            break
        ready = len(held) - max(_begun_stop(held, stop), incomplete_suffix_length(held))
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _begun_stop(held: bytes, stop: Sequence[bytes]) -> int:
    """How many bytes at the end may be the beginning of a stop string.

    >>> _begun_stop(b"x</", [b"</s>"])
    2
    """
    return max((size for word in stop for size in range(1, len(word)) if held.endswith(word[:size])), default=0)
