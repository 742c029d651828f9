"""Entropies or bytes -> patch starts, for whole rows or one byte at a time (section 2).

``patch_starts`` is the one truth about patches; ids, lengths and counts are derived from it by the functions below.
In every rule the first id of a document (its BOS) is a patch of its own: positions 0 and 1 always start one.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from blt.byte_ids import BYTE_OFFSET, EOS, VOCAB_SIZE, positions_in_document
from blt.config import PatchingConfig
from blt.shapes import (
    ByteIds,
    Entropies,
    EntropyCodes,
    EntropyEdges,
    NewestClosedPatch,
    PatchIds,
    PatchLengths,
    PatchStarts,
)

MAX_ENTROPY = math.log(VOCAB_SIZE)  # nats


def patch_starts(byte_ids: ByteIds, entropies: Entropies | None, config: PatchingConfig) -> PatchStarts:
    """Where patches begin under the config's rule, the unknown next id included; bytes after t never change entry t.

    Raises ValueError where the rule needs entropies or a threshold that are not there.
    """
    positions = positions_in_document(byte_ids)
    if config.uses_entropies:
        starts = _starts_by_entropy(entropies, config) | (positions < _always_starts(config))
    elif config.rule == "space":
        starts = starts_after_spaces(byte_ids) | (positions < _always_starts(config))
    else:
        assert config.patch_bytes is not None
        starts = (positions == 0) | ((positions - 1) % config.patch_bytes == 0)
    return starts if config.max_patch_bytes is None else split_long_patches(starts, config.max_patch_bytes)


def patch_starts_of_documents(entropies: Entropies, config: PatchingConfig) -> PatchStarts:
    """``patch_starts`` of rows that hold one document each, under a rule that reads nothing but their entropies.

    >>> config = PatchingConfig(threshold_nats=1.0)
    >>> patch_starts_of_documents(torch.tensor([[float("nan"), 0.5, 0.1, 2.0]]), config).int().tolist()
    [[1, 1, 0, 1]]
    """
    starts = _starts_by_entropy(entropies, config)
    starts[:, : _always_starts(config)] = True
    return starts if config.max_patch_bytes is None else split_long_patches(starts, config.max_patch_bytes)


def _starts_by_entropy(entropies: Entropies | None, config: PatchingConfig) -> PatchStarts:
    if entropies is None or config.threshold_nats is None:
        raise ValueError(
            f"patching rule {config.rule!r} needs entropies and a threshold; train the model first, which calibrates it"
        )
    if config.rounded_entropies:
        entropies = rounded_up(entropies)
    return starts_above(entropies, config.threshold_nats, rises=config.rule == "entropy_rise")


def starts_above(entropies: Entropies, threshold_nats: float, rises: bool = False) -> PatchStarts:
    """A patch begins where the entropy exceeds the threshold (eq. 1), or rises by more than it (``rises``, eq. 2).

    The first id of a row, whose entropy is nan, never compares above; the callers start a patch there anyway.

    >>> entropies = torch.tensor([[float("nan"), 3.0, 0.1, 2.0, 2.5]])
    >>> starts_above(entropies, 1.0).int().tolist(), starts_above(entropies, 1.0, rises=True).int().tolist()
    ([[0, 1, 0, 1, 1]], [[0, 0, 0, 1, 0]])
    """
    if rises:
        rise = entropies[:, 1:] - entropies[:, :-1]
        entropies = torch.cat([entropies[:, :1], rise], dim=1)
    return entropies > threshold_nats


def entropy_edges(threshold_nats: float | None = None) -> EntropyEdges:
    """The entropies that a byte's codes tell apart: 254 even steps over [0, ln 260], and the threshold where one is given.

    >>> edges = entropy_edges(threshold_nats=1.0)
    >>> len(edges), 1.0 in edges.tolist()
    (255, True)
    """
    edges = torch.arange(1, 255, dtype=torch.float64) * (MAX_ENTROPY / 255)
    if threshold_nats is not None:
        edges = torch.cat([edges, torch.tensor([threshold_nats], dtype=torch.float64)])
    return edges.float().sort().values


def entropy_codes(entropies: Entropies, edges: EntropyEdges) -> EntropyCodes:
    """How many edges lie below each entropy, so that ``entropy > edges[j]`` is ``code > j``; entry 0, a nan, is left out.

    >>> entropy_codes(torch.tensor([[float("nan"), 0.1, 1.0, 9.0]]), torch.tensor([0.5, 1.0])).tolist()
    [[0, 1, 2]]
    """
    return torch.bucketize(entropies[:, 1:].contiguous(), edges).to(torch.uint8)


def entropies_of_codes(codes: EntropyCodes, edges: EntropyEdges) -> Entropies:
    """The highest entropy that has each code: every comparison with an edge comes out as that of what was encoded.

    >>> entropies_of_codes(torch.tensor([[0, 1, 2]], dtype=torch.uint8), torch.tensor([0.5, 1.0])).tolist()
    [[nan, 0.5, 1.0, inf]]
    """
    highest = F.pad(edges, (0, 1), value=math.inf)
    return F.pad(highest[codes.long()], (1, 0), value=math.nan)


def rounded_up(entropies: Entropies) -> Entropies:
    """Entropies at the even edges, whether they were encoded before or not: what ``rounded_entropies`` compares."""
    edges = torch.from_numpy(_ROUNDED).to(entropies.device)
    rounded = edges[torch.bucketize(entropies, edges[:-1])]
    return rounded.masked_fill(entropies.isnan(), math.nan)


def starts_after_spaces(byte_ids: ByteIds) -> PatchStarts:
    """A patch begins after a space-like byte, unless the patch before would hold nothing but space-like bytes (2.2).

    >>> text = torch.tensor([[1, *(byte + 4 for byte in b"a, b")]])
    >>> starts_after_spaces(text).int().tolist()  # BOS a , _ b ?
    [[0, 0, 0, 1, 0, 0]]
    """
    space_like = is_space_like(byte_ids)
    starts = torch.zeros(byte_ids.shape[0], byte_ids.shape[1] + 1, dtype=torch.bool, device=byte_ids.device)
    starts[:, 2:] = space_like[:, 1:] & ~space_like[:, :-1]
    return starts


def is_space_like(byte_ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Bytes that are no latin letter, digit or UTF-8 continuation byte (2.2, after SpaceByte); control ids too.

    >>> is_space_like(torch.tensor([byte + 4 for byte in "aé 1".encode()])).int().tolist()
    [0, 1, 0, 1, 0]
    """
    byte = byte_ids - BYTE_OFFSET
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    letter = ((byte | 0x20) >= ord("a")) & ((byte | 0x20) <= ord("z"))
    return ~(digit | letter | ((byte >= 0x80) & (byte < 0xC0)))


def split_long_patches(starts: PatchStarts, max_patch_bytes: int) -> PatchStarts:
    """Split a patch of L bytes into m, m, ..., rest, the unknown next id counted: after m bytes it starts a patch.

    >>> split_long_patches(torch.tensor([[True, True, False, False, False, False]]), 2).int().tolist()
    [[1, 1, 0, 1, 0, 1]]
    """
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    last_start = torch.where(starts, index, 0).cummax(1).values
    return starts | ((index - last_start) % max_patch_bytes == 0)


def patch_ids(starts: PatchStarts) -> PatchIds:
    """The patch that holds each byte, counted from 0.

    >>> patch_ids(torch.tensor([[True, True, False, True, False]])).tolist()
    [[0, 1, 1, 2]]
    """
    return starts[:, :-1].long().cumsum(1) - 1


def newest_closed_patch(starts: PatchStarts) -> NewestClosedPatch:
    """The patch before the one that holds byte t + 1: what byte t reads when it predicts byte t + 1.

    >>> newest_closed_patch(torch.tensor([[True, True, False, True, False]])).tolist()
    [[0, 0, 1, 1]]
    """
    return starts.long().cumsum(1)[:, 1:] - 2


def first_patches(ids: PatchIds) -> Int[Tensor, " batch"]:
    """Where each row's patches begin when those of all rows stand one after another, without padding between.

    >>> first_patches(torch.tensor([[0, 1, 1, 2], [0, 1, 1, 1]])).tolist()
    [0, 3]
    """
    counts = ids[:, -1] + 1
    return counts.cumsum(0) - counts


def room_for(num_patches: int) -> int:
    """A number of patches, at most a sixteenth more, such that batches of about as many patches have shapes in common.

    >>> [room_for(n) for n in (1, 17, 33, 900, 910, 1000)]
    [1, 17, 34, 928, 928, 1024]
    """
    step = 1 << max(0, num_patches.bit_length() - 5)
    return -(-num_patches // step) * step


def patch_lengths(ids: PatchIds) -> PatchLengths:
    """Bytes in each patch; 0 beyond a row's last patch.

    >>> patch_lengths(torch.tensor([[0, 1, 1, 2], [0, 1, 1, 1]])).tolist()
    [[1, 2, 1], [1, 3, 0]]
    """
    lengths = torch.zeros(ids.shape[0], int(ids.max()) + 1, dtype=torch.long, device=ids.device)
    return lengths.scatter_add(1, ids, torch.ones_like(ids))


def threshold_for_patch_size(
    entropies: Entropies, byte_ids: ByteIds, config: PatchingConfig, target_patch_bytes: float
) -> float:
    """The threshold (nats) at which these rows' patches average ``target_patch_bytes``, by bisection (4.2).

    BOS patches do not count. Raises ValueError where no threshold reaches the target.
    """

    def mean_at(threshold: float) -> float:
        candidate = config.model_copy(update={"threshold_nats": threshold})
        return mean_patch_bytes(byte_ids, patch_starts(byte_ids, entropies, candidate))

    low, high = -6.0, 6.0  # entropies over 260 ids lie in [0, ln 260 = 5.56], so do the sizes of their rises
    if not mean_at(low) <= target_patch_bytes <= mean_at(high):
        raise ValueError(
            f"no threshold gives patches of {target_patch_bytes} bytes here: they can average "
            f"{mean_at(low):.2f} to {mean_at(high):.2f}; set another calibration.target_patch_bytes"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < target_patch_bytes else (low, middle)
    return min(low, high, key=lambda threshold: abs(mean_at(threshold) - target_patch_bytes))


def mean_patch_bytes(byte_ids: ByteIds, starts: PatchStarts) -> float:
    """Bytes per patch over whole rows, ids that are no bytes left out of both counts.

    >>> mean_patch_bytes(torch.tensor([[1, 70, 71, 72]]), torch.tensor([[True, True, False, True, True]]))
    1.5
    """
    is_byte = byte_ids >= BYTE_OFFSET
    return float(is_byte.sum()) / max(1, int((starts[:, :-1] & is_byte).sum()))


class PatchingState(NamedTuple):
    """What the stepwise decision remembers of a row: of the ids so far, only these numbers. As it is before any id."""

    next_starts: bool = True  # does the next, unknown id start a patch
    position: int = 0  # of the next id, in its document
    patch_bytes: int = 0  # ids in the open patch
    last_entropy: float = math.nan  # nats; the doubt about the next id
    last_is_space_like: bool = False


def step_patching(
    state: PatchingState, byte_id: int, next_entropy: float | None, config: PatchingConfig
) -> PatchingState:
    """Take in one more id and decide whether the id after it starts a patch: the stepwise twin of ``patch_starts``.

    ``next_entropy`` is the doubt about the unknown id after ``byte_id``, as in ``entropies[:, t + 1]``. Compares in fp32
    as the tensors do, so that both agree to the bit.

    >>> config, state = PatchingConfig(rule="fixed", patch_bytes=2), PatchingState()
    >>> for byte_id in (1, 70, 71):
    ...     state = step_patching(state, byte_id, None, config)
    ...     print(state.next_starts)
    True
    False
    True
    """
    position = 0 if byte_id == EOS else state.position + 1
    patch_bytes = 1 if state.next_starts else state.patch_bytes + 1
    space_like = False
    if config.uses_entropies:
        assert next_entropy is not None and config.threshold_nats is not None
        value, last = np.float32(next_entropy), np.float32(state.last_entropy)
        if config.rounded_entropies:
            value, last = (_ROUNDED[np.searchsorted(_ROUNDED[:-1], entropy)] for entropy in (value, last))
        if config.rule == "entropy_rise":
            value -= last
        starts = bool(value > np.float32(config.threshold_nats)) or position < _always_starts(config)
    elif config.rule == "space":
        space_like = bool(_IS_SPACE_LIKE[byte_id])
        starts = (space_like and not state.last_is_space_like) or position < _always_starts(config)
    else:
        assert config.patch_bytes is not None
        starts = position == 0 or (position - 1) % config.patch_bytes == 0
    if config.max_patch_bytes is not None:
        starts = starts or patch_bytes >= config.max_patch_bytes
    last_entropy = math.nan if next_entropy is None else next_entropy
    return PatchingState(starts, position, patch_bytes, last_entropy, space_like)


_ROUNDED = np.append(entropy_edges().numpy(), np.float32(MAX_ENTROPY))
_IS_SPACE_LIKE = is_space_like(torch.arange(VOCAB_SIZE)).tolist()


def _always_starts(config: PatchingConfig) -> int:
    """How many positions of a document start a patch whatever the rule says.

    BOS and the first byte; for rises also the second byte, whose entropy has none before it to rise from.
    """
    return 3 if config.rule == "entropy_rise" else 2
