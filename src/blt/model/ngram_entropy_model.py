"""Bytes -> entropies without a network: counts of byte n-grams say how hard each next byte is, by table look-ups.

The doubt after a context is blended from the entropies of what followed its last 0, 1, ..., ``max_order`` bytes in the
training text, each as far as it is to be trusted. The arithmetic is that of whole numbers, so whole rows, prefixes, batches
and one byte at a time agree to the bit, on any device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int, Int32, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from blt.byte_ids import BYTE_OFFSET, EOS
from blt.config import NgramEntropyModelConfig
from blt.shapes import ByteIds, Entropies

REACH = 8  # bytes of context that are looked at, as two words of four; max_order is at most this
BLOCK = 65_536  # positions worked out together: what they need stays in a core's second-level cache
MOST_ON_HOST = 32  # new ids of a row, at a few microseconds each
EXACT_ORDER = 2  # of this order and below every context has a number of its own, above contexts share hashed slots
MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)  # of the newer and the older word, odd; the slot is the product's highest bits

NATS_PER_CODE = 1 / 32  # of a slot's entropy, so that 8 bits reach up to 7.97 nats
MOST_NATS = 255 * NATS_PER_CODE
FRACTION_BITS = 14  # of a blended doubt, below a slot's 8 bits: doubt x confidence still fits into 31 bits
DOUBTS_PER_NAT = 2**FRACTION_BITS / NATS_PER_CODE  # a power of two: doubts become fp32 exactly

Doubts = Int32[Tensor, " position"]  # blended entropies as whole numbers, DOUBTS_PER_NAT to the nat
Words = Int32[Tensor, " position"]  # four bytes of context each, the newest in the highest bits
Starts = Int[Tensor, " document"]  # the positions at which documents begin, ascending, none twice
Text = UInt8[Tensor, " byte"]
Counted = NDArray[np.uint64]  # sorted: a context's index in the highest 24 bits, the next byte in 8, how often in 32


class NgramEntropyModel(nn.Module):
    """Look-up tables: one doubt for every two bytes, and of each higher order slots of an entropy and a confidence.

    The doubt starts as that of the last two bytes (orders 0 to 2, blended when the model was fitted). Each higher order k
    then moves it towards the entropy that its slot holds, as far as the slot is confident: H += lambda_k (H_k - H).
    A context is what the document holds before a byte, BOS as a NUL, and NULs before that; an EOS closes the document.
    """

    def __init__(self, config: NgramEntropyModelConfig) -> None:
        super().__init__()
        self.config = config
        self.pair_doubts: Tensor
        self.slots: Tensor
        self.register_buffer("pair_doubts", torch.zeros(2**16, dtype=torch.int32))
        # confidence * 256 + entropy of each slot, as 16 bits; the index is order - EXACT_ORDER - 1
        self.register_buffer("slots", torch.zeros(config.hashed_orders, 2**config.table_bits, dtype=torch.int16))

    def entropies(self, byte_ids: ByteIds) -> Entropies:
        """Doubt about each id given the ids before it, in nats; entry 0 is nan, the last is about the unknown next id."""
        batch, num_bytes = byte_ids.shape
        rows = F.pad((byte_ids - BYTE_OFFSET).clamp_(min=0).to(torch.uint8), (REACH, 0))
        starts = F.pad(byte_ids == EOS, (REACH, 0)).flatten().nonzero().flatten() + 1 - REACH
        entropies = F.pad(self._flat_entropies(rows.flatten(), starts), (0, REACH - 1))
        entropies = entropies.view(batch, num_bytes + REACH)[:, : num_bytes + 1].clone()
        entropies[:, 0] = float("nan")
        return entropies

    def text_entropies(self, text: Text) -> Entropies:
        """``entropies`` of one row, BOS and then this text of any length, without making ids of it."""
        entropies = self._flat_entropies(F.pad(text, (REACH + 1, 0)), text.new_zeros(0, dtype=torch.long))
        entropies[0] = float("nan")
        return entropies[None]

    def _flat_entropies(self, padded: Text, starts: Starts) -> Float32[Tensor, " position"]:
        """Of each position that has ``REACH`` bytes before it, and of the one behind the last."""
        number = len(padded) - REACH + 1
        entropies = torch.empty(number, dtype=torch.float32, device=padded.device)
        for begin in range(0, number, BLOCK):
            newer, older = context_words(padded[begin : begin + BLOCK + REACH - 1])
            if len(starts):
                newer, older = cut_at_starts(newer, older, starts - begin)
            entropies[begin : begin + BLOCK].copy_(self._doubts(newer, older)).mul_(1 / DOUBTS_PER_NAT)
        return entropies

    def _doubts(self, newer: Words, older: Words) -> Doubts:
        bits = self.config.table_bits
        doubts = self.pair_doubts.index_select(0, context_index(newer, older, EXACT_ORDER, bits))
        for order, slots in enumerate(self.slots, EXACT_ORDER + 1):
            found = slots.index_select(0, context_index(newer, older, order, bits)).int()
            confidence = (found >> 8).bitwise_and_(0xFF)
            towards = found.bitwise_and_(0xFF).bitwise_left_shift_(FRACTION_BITS).sub_(doubts)
            doubts += towards.mul_(confidence).bitwise_right_shift_(8)
        return doubts

    def extend(self, ids: Sequence[int], new: int, tables: "HostTables") -> list[float]:
        """Nats of doubt after each of the last ``new`` of these ids, before which the row's last ``REACH`` stand.

        Few are looked up on the host, in ``tables``; many, those of a prompt, where the model is. Both say the same.
        """
        if new > MOST_ON_HOST:
            return self.entropies(torch.tensor([ids], device=self.slots.device))[0, -new:].tolist()
        return [tables.entropy_after(ids[max(0, end - REACH) : end]) for end in range(len(ids) - new + 1, len(ids) + 1)]

    def on_host(self) -> "HostTables":
        """The tables as the CPU reads them one number at a time; a copy where they are on another device."""
        slots = [slots.numpy().data for slots in self.slots.cpu()]
        return HostTables(self.pair_doubts.cpu().numpy().data, slots, self.config.table_bits)


class HostTables(NamedTuple):
    """The stepwise twin of ``NgramEntropyModel.entropies``: plain numbers, no tensor."""

    pair_doubts: memoryview
    slots: list[memoryview]
    table_bits: int

    def entropy_after(self, ids: Sequence[int]) -> float:
        """Nats of doubt about the id after these; the last ``REACH`` of a row are enough."""
        newer = older = 0
        for place, byte_id in enumerate(reversed(ids[-REACH:])):
            if byte_id == EOS:
                break
            byte = max(0, byte_id - BYTE_OFFSET)
            if place < 4:
                newer |= byte << 8 * (3 - place)
            else:
                older |= byte << 8 * (7 - place)
        doubt: int = self.pair_doubts[newer >> 16]
        for order, slots in enumerate(self.slots, EXACT_ORDER + 1):
            product = (newer >> 8 * max(0, 4 - order)) * MULTIPLIERS[0]
            if order > 4:
                product += (older >> 8 * (8 - order)) * MULTIPLIERS[1]
            found = slots[(product & 0xFFFFFFFF) >> 32 - self.table_bits]
            doubt += (((found & 0xFF) << FRACTION_BITS) - doubt) * (found >> 8 & 0xFF) >> 8
        return doubt / DOUBTS_PER_NAT


def context_words(text: Text) -> tuple[Words, Words]:
    """The last four bytes before a position and the four before them, from ``REACH`` bytes on.

    >>> newer, older = context_words(torch.arange(1, 10, dtype=torch.uint8))
    >>> [hex(word) for word in newer.tolist()], [hex(word) for word in older.tolist()]
    (['0x8070605', '0x9080706'], ['0x4030201', '0x5040302'])
    """
    numbers = text.int()
    pairs = (numbers[1:] << 8).bitwise_or_(numbers[:-1])
    words = (pairs[2:] << 16).bitwise_or_(pairs[:-2])
    return words[4:], words[:-4]


def cut_at_starts(newer: Words, older: Words, starts: Starts) -> tuple[Words, Words]:
    """The words with NULs for what stands before the start of a position's document.

    >>> newer, older = torch.full((6,), 0x04030201, dtype=torch.int32), torch.full((6,), 0x08070605, dtype=torch.int32)
    >>> newer, older = cut_at_starts(newer, older, torch.tensor([-4, 3]))
    >>> [hex(word) for word in newer.tolist()]
    ['0x4030201', '0x4030201', '0x4030201', '0x0', '0x4000000', '0x4030000']
    >>> [hex(word) for word in older.tolist()]
    ['0x0', '0x8000000', '0x8070000', '0x0', '0x0', '0x0']
    """
    behind = torch.arange(REACH, device=starts.device)  # positions of a document that lack some of their context
    next_start = torch.cat([starts[1:], starts.new_full((1,), len(newer) + REACH)])
    near = starts[:, None] + behind
    within = (near >= 0) & (near < len(newer)) & (near < next_start[:, None])
    positions, known = near[within], behind.expand_as(near)[within]
    newer, older = newer.clone(), older.clone()
    newer[positions] &= _highest_bytes(known)
    older[positions] &= _highest_bytes(known - 4)
    return newer, older


def _highest_bytes(number: Tensor) -> Words:
    """A mask of so many of a word's bytes from the newest on: none below 0, all from 4 on."""
    lower_bits = 8 * (4 - number.clamp(0, 4))
    return (torch.full_like(number, -1) << lower_bits).int()


def context_index(newer: Words, older: Words, order: int, table_bits: int) -> Words:
    """Which entry of its table a context of ``order`` bytes has.

    Two bytes are their own index, the newest in its higher bits; above, it is the highest bits of a product that wraps.
    """
    if order == EXACT_ORDER:
        return (newer >> 16).bitwise_and_(0xFFFF)
    product = newer if order >= 4 else (newer >> 8 * (4 - order)).bitwise_and_(2 ** (8 * order) - 1)
    product = product * _signed(MULTIPLIERS[0])
    if order > 4:
        rest = older if order == 8 else (older >> 8 * (8 - order)).bitwise_and_(2 ** (8 * (order - 4)) - 1)
        product += rest * _signed(MULTIPLIERS[1])
    return product.bitwise_right_shift_(32 - table_bits).bitwise_and_(2**table_bits - 1)


def _signed(word: int) -> int:
    """The signed number with the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word


class NgramCounts:
    """What followed each context in the training text, counted in one pass, a stretch of it at a time.

    Kept of each order as a few sorted runs; runs of like size are merged, so that all is the work of one merge sort. Memory
    grows with the number of different n-grams, 8 bytes for each and order, not with the text.
    """

    def __init__(self, config: NgramEntropyModelConfig) -> None:
        self.config = config
        self.num_bytes = 0
        self._runs: dict[int, list[Counted]] = {order: [] for order in range(EXACT_ORDER, config.max_order + 1)}
        self._past = np.zeros(REACH, np.uint8)  # what a document that goes on has left behind, NULs before it

    def add(self, text: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        """Count the next stretch, at least one byte of it; ``starts``: where documents begin there, ascending."""
        padded = np.concatenate([self._past, text])
        newer, older = context_words(torch.from_numpy(padded[:-1]))
        newer, older = cut_at_starts(newer, older, torch.from_numpy(starts))
        for order, runs in self._runs.items():
            contexts = context_index(newer, older, order, self.config.table_bits).numpy().astype(np.uint64)
            runs.append(summed((contexts << np.uint64(40)) | (text.astype(np.uint64) << np.uint64(32)) | np.uint64(1)))
            while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
                runs.append(summed(np.concatenate([runs.pop(), runs.pop()])))
        self.num_bytes += len(text)
        self._past = padded[-REACH:].copy()
        if len(starts):
            self._past[: max(0, REACH - len(text) + int(starts[-1]))] = 0

    def num_contexts(self, order: int) -> int:
        """How many contexts of this order, or slots of them, were seen."""
        return len(np.unique(self._counted(order) >> np.uint64(40)))

    def model(self) -> NgramEntropyModel:
        """The entropy model of what was counted, at least one byte."""
        model, backoff = NgramEntropyModel(self.config), self.config.backoff
        pairs, doubts = self._counted(EXACT_ORDER), np.full(1, math.log(2**8))
        for order in range(EXACT_ORDER + 1):
            entropies, confidences = evidence(_of_shorter_contexts(pairs, order), 2 ** (8 * order), backoff)
            doubts = np.resize(doubts.repeat(2**8), len(entropies))  # of the context without its oldest byte
            doubts += confidences * (entropies - doubts)
        model.pair_doubts.copy_(torch.from_numpy(np.rint(doubts * DOUBTS_PER_NAT)))
        for order, slots in enumerate(model.slots, EXACT_ORDER + 1):
            entropies, confidences = evidence(self._counted(order), len(slots), backoff)
            codes = np.rint(entropies / NATS_PER_CODE) + 2**8 * np.rint(confidences * 2**8).clip(max=2**8 - 1)
            slots.copy_(torch.from_numpy(codes.astype(np.uint16).view(np.int16)))
        return model

    def _counted(self, order: int) -> Counted:
        """All of one order."""
        self._runs[order] = [summed(np.concatenate(self._runs[order]))]
        return self._runs[order][0]


def summed(counted: Counted) -> Counted:
    """Sorted, with the counts of the same context and next byte added up, to 2^32 - 1 at most.

    >>> summed(np.array([7 << 32 | 1, 5 << 32 | 2, 7 << 32 | 3], np.uint64)).tolist() == [5 << 32 | 2, 7 << 32 | 4]
    True
    >>> summed(np.array([7 << 32 | 3 * 10**9] * 2, np.uint64)).tolist() == [7 << 32 | 2**32 - 1]
    True
    """
    counted = np.sort(counted)
    keys = counted >> np.uint64(32)
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    most = np.uint64(2**32 - 1)
    return (keys[first] << np.uint64(32)) | np.minimum(np.add.reduceat(counted & most, first), most)


def _of_shorter_contexts(pairs: Counted, order: int) -> Counted:
    """What followed the last ``order`` bytes of each two."""
    kept = np.uint64(2**40 - 1)
    contexts = (pairs >> np.uint64(40)) >> np.uint64(8 * (EXACT_ORDER - order))
    return summed((contexts << np.uint64(40)) | (pairs & kept))


def evidence(counted: Counted, number: int, backoff: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each of ``number`` contexts the entropy of what followed it, in nats, and how far to trust it, from 0 to below 1.

    Text that was counted meets each of its contexts once more than new text would: one occurrence of each is not believed,
    and a context that was met once says nothing. Of the n - 1 others, each different follower takes ``backoff`` away:
    lambda = (n - 1) / (n - 1 + backoff * followers), after Witten and Bell, who have 1 there.

    The entropy of a mixture of two distributions is above the mixture of their entropies, by at most the entropy of the
    choice between them, if they have no byte in common. Half of that is added.
    """
    contexts = (counted >> np.uint64(40)).astype(np.int64)
    counts = (counted & np.uint64(2**32 - 1)).astype(np.float64)
    occurrences = np.bincount(contexts, counts, number)
    followers = np.bincount(contexts, minlength=number)
    seen = np.maximum(occurrences, 1)
    entropies = np.log(seen) - np.bincount(contexts, counts * np.log(counts), number) / seen
    believed = np.maximum(occurrences - 1, 0)
    confidences = believed / np.maximum(believed + backoff * followers, 1)
    inner = confidences.clip(1e-9, 1 - 1e-9)
    of_choice = -inner * np.log(inner) - (1 - inner) * np.log(1 - inner)
    entropies = (entropies + 0.5 * of_choice / inner).clip(0, MOST_NATS)
    return np.where(confidences > 0, entropies, 0), confidences
