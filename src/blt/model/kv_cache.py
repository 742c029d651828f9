"""Keys and values kept between steps, so that a new position costs the same however many came before.

Position p of a row stands in slot p modulo the number of slots. A cache of a windowed stack is a ring a little longer than
its window: positions that were written and then not accepted only ever overwrite what no window reaches any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from blt.config import TransformerConfig
from blt.model.rotary import rotary_rotation
from blt.shapes import Rotation

SPARE_SLOTS = 32  # beyond the window: the longest block of positions that can be written before it is accepted
FIRST_SLOTS = 128  # of a cache without a window, which grows by a quarter whenever it is full

NewHeads = Float[Tensor, "row head new head_dim"]
KeptLayer = Float[Tensor, "all_rows head slot head_dim"]
KeysValues = Float[Tensor, "2 head new head_dim"]  # of one row


class Span(NamedTuple):
    """The new positions of one row: ``first``, ``first + 1``, ...; each reads no position before its ``oldest``."""

    first: int
    oldest: list[int]


@dataclass(frozen=True)
class Place:
    """Where a block of new positions goes and what it may read: the same for every layer, so worked out once."""

    rows: Int[Tensor, " row"]  # of the cache, in the order of the block; always on the CPU
    positions: Int[Tensor, "row new"]
    oldest: Int[Tensor, "row new"]  # the first position that each of them reads
    rotation: Rotation  # [row, 1, new, half_head_dim, 2]
    allowed: Float[Tensor, "row 1 new key"] | None  # added to the scores: 0 or -inf; None: every key is read
    keys_used: int  # slots that hold anything
    beside: bool  # the block is read beside what the cache holds, and written afterwards
    compiled: bool = False  # by torch's compiler, which makes ``allowed`` by itself
    fresh: list[KeysValues] = field(default_factory=list)  # where a compiled stage collects what is to be written

    def at(self, number: int) -> "Place":
        """The place of one of the block's positions, to write it alone."""
        one = torch.tensor([number], device=self.positions.device)
        positions, oldest = self.positions.index_select(1, one), self.oldest.index_select(1, one)
        allowed = None if self.allowed is None else self.allowed.index_select(2, one)
        rotation = self.rotation.index_select(2, one)
        return replace(self, positions=positions, oldest=oldest, rotation=rotation, allowed=allowed)


class KeyValueCache:
    """Of every layer of one stack, for rows of different lengths."""

    def __init__(self, config: TransformerConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.window = config.window_positions
        slots = FIRST_SLOTS if self.window is None else self.window + SPARE_SLOTS
        self.keys_values = torch.zeros(
            config.num_layers, 2, rows, config.num_heads, slots, config.head_dim, device=device, dtype=dtype
        )
        self.rope = config.rope_theta, config.rope_scaling
        self.rotation = self._rotation(FIRST_SLOTS, config.head_dim, device)
        self._mark_slots()

    def _rotation(self, num_positions: int, head_dim: int, device: torch.device) -> Rotation:
        theta, scaling = self.rope
        return rotary_rotation(num_positions, head_dim, theta, device, scaling)

    @property
    def slots(self) -> int:
        """How many positions of a row there is room for."""
        return self.keys_values.shape[4]

    def shares_places_with(self, other: "KeyValueCache") -> bool:
        """Is the place of a block the same in both, given the same spans? Not where each must grow by itself."""
        mine, its = ((cache.window, cache.rope, cache.rotation.shape[1]) for cache in (self, other))
        return self.window is not None and mine == its

    def place(self, rows: list[int], spans: Sequence[Span], new: int, compiled: bool = False) -> Place:
        """Where the new positions of these rows go, every span padded at its end to ``new`` positions.

        A row whose block is padded goes on from its own length next time; the padding is overwritten unread. With
        ``compiled`` the compiler works the block out if it can: it takes one row, and every ``new`` costs it seconds once.
        """
        last = [span.first + new - 1 for span in spans]
        self._make_room(max(last) + 1)
        too_long = self.window is not None and new > SPARE_SLOTS
        assert not too_long or all(len(span.oldest) == new for span in spans), "a long block cannot be padded"
        compiled = compiled and not too_long and len(rows) == 1 == self.keys_values.shape[2]
        beside = compiled or too_long
        reach = (self.window or max(last) + 1) - 1
        numbers = [list(range(span.first, span.first + new)) for span in spans]
        first_read = [
            [max(begun, number - reach) for begun, number in zip_longest(span.oldest, row, fillvalue=span.oldest[-1])]
            for span, row in zip(spans, numbers, strict=True)
        ]
        positions, oldest = torch.tensor([numbers, first_read], device=self.keys_values.device)
        used = min(self.slots, max(last) + 1)
        allowed = None if compiled else self._allowed(positions, oldest, used, beside)
        rotation = self.rotation[positions][:, None]
        return Place(torch.tensor(rows), positions, oldest, rotation, allowed, used, beside, compiled)

    def with_allowed(self, place: Place) -> Place:
        """The place with what the compiler makes by itself: all slots count as used."""
        allowed = self._allowed(place.positions, place.oldest, self.slots, beside=True)
        return Place(place.rows, place.positions, place.oldest, place.rotation, allowed, self.slots, True, True)

    def _allowed(
        self, positions: Int[Tensor, "row new"], oldest: Int[Tensor, "row new"], used: int, beside: bool
    ) -> Float[Tensor, "row 1 new key"] | None:
        """Which slots each position reads, and which of the block's own positions after them if it is beside."""
        newest = positions[:, :1] - 1 if beside else positions[:, -1:]
        of_slot = newest - (newest - torch.arange(used, device=positions.device)) % self.slots  # what each slot holds
        if beside:
            of_slot = torch.cat([of_slot, positions], dim=1)
        may_attend = of_slot[:, None, :] >= oldest[..., None]
        if positions.shape[1] > 1:
            may_attend &= of_slot[:, None, :] <= positions[..., None]
        if not torch.compiler.is_compiling() and bool(may_attend.all()):
            return None
        return torch.where(may_attend, 0.0, -torch.inf).to(self.keys_values.dtype)[:, None]

    def attend(self, layer: int, queries: NewHeads, keys: NewHeads, values: NewHeads, place: Place) -> NewHeads:
        """Write the block's keys and values of this layer, and read what each of its queries may."""
        if place.compiled:
            place.fresh.append(torch.stack([keys[0], values[0]]))
            return _read_beside(self.keys_values[layer], queries, keys, values, place)
        if place.beside:
            return self._read_then_write(layer, queries, keys, values, place)
        kept_keys, kept_values = self.keys_values[layer]
        slots = place.positions % self.slots
        _write(kept_keys, keys, place.rows, slots)
        _write(kept_values, values, place.rows, slots)
        kept_keys, kept_values = kept_keys[:, :, : place.keys_used], kept_values[:, :, : place.keys_used]
        chosen = place.rows.tolist()
        if chosen == list(range(len(chosen))):
            kept_keys, kept_values = kept_keys[: len(chosen)], kept_values[: len(chosen)]
            return F.scaled_dot_product_attention(queries, kept_keys, kept_values, attn_mask=place.allowed)
        mixed = []  # rows here and there: one by one, which copies no keys
        for index, row in enumerate(chosen):
            mask = None if place.allowed is None else place.allowed[index : index + 1]
            one = (queries[index : index + 1], kept_keys[row : row + 1], kept_values[row : row + 1])
            mixed.append(F.scaled_dot_product_attention(*one, attn_mask=mask))
        return torch.cat(mixed)

    def write(self, fresh: Float[Tensor, "layer 2 head new head_dim"], place: Place) -> None:
        """What a compiled stage has collected: keys and values of every layer, of the one row that there is."""
        self.keys_values[:, :, 0].index_copy_(3, place.positions[0] % self.slots, fresh)

    def _read_then_write(
        self, layer: int, queries: NewHeads, keys: NewHeads, values: NewHeads, place: Place
    ) -> NewHeads:
        """For a long block: read first, then write what its end leaves in the ring."""
        kept = [part[place.rows, :, : place.keys_used] for part in self.keys_values[layer]]
        all_keys, all_values = (torch.cat(pair, dim=2) for pair in zip(kept, (keys, values), strict=True))
        mixed = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=place.allowed)
        tail = slice(-self.slots, None)
        for part, new in zip(self.keys_values[layer], (keys, values), strict=True):
            _write(part, new[:, :, tail], place.rows, place.positions[:, tail] % self.slots)
        return mixed

    def move_row(self, origin: int, row: int) -> None:
        """Put what row ``origin`` holds into another row's place."""
        self.keys_values[:, :, row] = self.keys_values[:, :, origin]

    def append(self, other: "KeyValueCache", num_rows: int) -> None:
        """Take the first row of another cache of the same stack as the row after ``num_rows``."""
        self._make_room(max(other.slots, len(other.rotation)) if self.window is None else len(other.rotation))
        if num_rows == self.keys_values.shape[2]:
            self.keys_values = torch.cat([self.keys_values, torch.zeros_like(self.keys_values)], dim=2)
        self.keys_values[:, :, num_rows, :, : other.slots] = other.keys_values[:, :, 0]

    def _make_room(self, positions: int) -> None:
        """Slots and rotary angles for this many positions."""
        if len(self.rotation) < positions:
            twice = max(positions, 2 * len(self.rotation))
            self.rotation = self._rotation(twice, 2 * self.rotation.shape[1], self.rotation.device)
        if self.window is None and self.slots < positions:
            old = self.keys_values
            slots = max(positions, self.slots + self.slots // 4)
            self.keys_values = old.new_zeros(*old.shape[:4], slots, old.shape[5])
            self.keys_values[..., : old.shape[4], :] = old
            self._mark_slots()

    def _mark_slots(self) -> None:
        if self.window is None:  # one compiled function for every number of slots
            torch._dynamo.maybe_mark_dynamic(self.keys_values, 4)


Kept = tuple[KeyValueCache, Place]  # what a stage's step reads of the past, and where its own positions go


def _read_beside(
    kept: Float[Tensor, "2 1 head slot head_dim"], queries: NewHeads, keys: NewHeads, values: NewHeads, place: Place
) -> NewHeads:
    """One row's attention to what the cache holds and to the block itself, in operations that the compiler makes loops of."""
    assert place.allowed is not None
    (kept_keys, kept_values), keys, values = kept[:, 0], keys[0], values[0]
    slots, queries = kept_keys.shape[1], queries[0] * queries.shape[-1] ** -0.5  # [head, new, head_dim]
    scores = _products(queries, kept_keys) + place.allowed[0, :, :, :slots]
    own_scores = _products(queries, keys) + place.allowed[0, :, :, slots:]
    largest = torch.maximum(scores.amax(-1, keepdim=True), own_scores.amax(-1, keepdim=True))
    weights, own_weights = (scores - largest).exp(), (own_scores - largest).exp()
    total = weights.sum(-1, keepdim=True) + own_weights.sum(-1, keepdim=True)
    mixed = torch.bmm(weights.to(kept.dtype), kept_values) + torch.bmm(own_weights.to(kept.dtype), values)
    return (mixed / total).to(queries.dtype)[None]


def _products(
    queries: Float[Tensor, "head new head_dim"], keys: Float[Tensor, "head key head_dim"]
) -> Float[Tensor, "head new key"]:
    if queries.shape[1] == 1:  # one loop over the keys, with all that follows
        return (keys.float() * queries.float()).sum(-1)[:, None]
    return torch.bmm(queries, keys.mT).float()


def _write(kept: KeptLayer, new: NewHeads, rows: Int[Tensor, " row"], slots: Int[Tensor, "row new"]) -> None:
    if len(rows) == 1:
        kept[int(rows)].index_copy_(1, slots[0], new[0])
    else:
        kept[rows.to(slots.device)[:, None], :, slots] = new.transpose(1, 2)
