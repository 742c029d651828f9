"""Keys and values kept between steps, so that a new position costs the same however many came before.

Position p of a row stands in slot p modulo the number of slots. A cache of a windowed stack is a ring a little longer than
its window: positions that were written and then not accepted only ever overwrite what no window reaches any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from blt.config import TransformerConfig
from blt.model.rotary import rotary_rotation
from blt.shapes import Rotation

SPARE_SLOTS = 32  # beyond the window: the longest block of positions that can be written before it is accepted
FIRST_SLOTS = 128  # of a cache without a window, which doubles whenever it is full

NewHeads = Float[Tensor, "row head new head_dim"]
KeptLayer = Float[Tensor, "all_rows head slot head_dim"]


class Span(NamedTuple):
    """The new positions of one row: ``first``, ``first + 1``, ...; each reads no position before its ``oldest``."""

    first: int
    oldest: list[int]


@dataclass(frozen=True)
class Place:
    """Where a block of new positions goes and what it may read: the same for every layer, so worked out once."""

    rows: Int[Tensor, " row"]  # of the cache, in the order of the block; always on the CPU
    slots: Int[Tensor, "row new"]
    rotation: Rotation  # [row, 1, new, half_head_dim, 2]
    allowed: Float[Tensor, "row 1 new key"] | None  # added to the scores: 0 or -inf; None: every key is read
    keys_used: int  # slots that hold anything
    beside: bool  # the block is too long to be written first: it is read beside what the cache holds
    may_compile: bool  # one row, and the compiler is asked for

    @property
    def compiled(self) -> bool:
        """Does the compiler work out this block? It does single positions only."""
        return self.may_compile and self.slots.numel() == 1

    def at(self, number: int) -> "Place":
        """The place of one of the block's positions, to write it alone."""
        one = torch.tensor([number], device=self.slots.device)
        allowed = None if self.allowed is None else self.allowed.index_select(2, one)
        slots, rotation = self.slots.index_select(1, one), self.rotation.index_select(2, one)
        return replace(self, slots=slots, rotation=rotation, allowed=allowed)


class KeyValueCache:
    """Of every layer of one stack, for rows of different lengths."""

    def __init__(
        self, config: TransformerConfig, rows: int, device: torch.device, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        self.window = config.window_positions
        self.slots = FIRST_SLOTS if self.window is None else self.window + SPARE_SLOTS
        self.keys_values = torch.zeros(
            config.num_layers, 2, rows, config.num_heads, self.slots, config.head_dim, device=device, dtype=dtype
        )
        self.theta = config.rope_theta
        self.rotation = rotary_rotation(FIRST_SLOTS, config.head_dim, self.theta, device)
        self.compiled = compiled
        if compiled:
            torch._dynamo.maybe_mark_dynamic(self.keys_values, 4)

    def shares_places_with(self, other: "KeyValueCache") -> bool:
        """Is the place of a block the same in both, given the same spans? Not where each must grow by itself."""
        mine, its = ((cache.window, cache.theta, cache.rotation.shape[1]) for cache in (self, other))
        return self.window is not None and mine == its

    def place(self, rows: list[int], spans: Sequence[Span], new: int) -> Place:
        """Where the new positions of these rows go, every span padded at its end to ``new`` positions.

        A row whose block is padded goes on from its own length next time; the padding is overwritten unread.
        """
        device = self.keys_values.device
        last = [span.first + new - 1 for span in spans]
        self._make_room(max(last) + 1)
        beside = self.window is not None and new > SPARE_SLOTS
        assert not beside or all(len(span.oldest) == new for span in spans), "a long block cannot be padded"
        window = self.window or max(last) + 1
        positions = [list(range(span.first, span.first + new)) for span in spans]
        oldest = [[*span.oldest, *span.oldest[-1:] * (new - len(span.oldest))] for span in spans]
        position, first_read = torch.tensor([positions, oldest])
        first_read = first_read.maximum(position - (window - 1))
        used = min(self.slots, max(last) + 1)
        newest = position[:, :1] - 1 if beside else position[:, -1:]
        in_slot = newest - (newest - torch.arange(used)) % self.slots  # the position that each slot holds
        if beside:
            in_slot = torch.cat([in_slot, position], dim=1)
        may_attend = in_slot[:, None, :] >= first_read[..., None]
        if new > 1:
            may_attend &= in_slot[:, None, :] <= position[..., None]
        may_compile = self.compiled and len(rows) == 1
        allowed, position = None, position.to(device)
        if may_compile or not bool(may_attend.all()):
            allowed = torch.where(may_attend, 0.0, -torch.inf).to(device, self.keys_values.dtype)[:, None]
        rotation = self.rotation[position][:, None]
        return Place(torch.tensor(rows), position % self.slots, rotation, allowed, used, beside, may_compile)

    def attend(self, layer: int, queries: NewHeads, keys: NewHeads, values: NewHeads, place: Place) -> NewHeads:
        """Write the block's keys and values of this layer, and read what each of its queries may."""
        if torch.compiler.is_compiling():
            arguments = (self.keys_values, layer, queries, keys, values, place.allowed, place.rows, place.slots)
            return torch.ops.blt.write_then_read(*arguments)
        if place.beside:
            return self._read_beside(layer, queries, keys, values, place)
        return write_then_read(
            self.keys_values, layer, queries, keys, values, place.allowed, place.rows, place.slots, place.keys_used
        )

    def _read_beside(self, layer: int, queries: NewHeads, keys: NewHeads, values: NewHeads, place: Place) -> NewHeads:
        """For a long block: read first, then write what its end leaves in the ring."""
        kept = [part[place.rows, :, : place.keys_used] for part in self.keys_values[layer]]
        all_keys, all_values = (torch.cat(pair, dim=2) for pair in zip(kept, (keys, values), strict=True))
        mixed = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=place.allowed)
        tail = slice(-self.slots, None)
        for part, new in zip(self.keys_values[layer], (keys, values), strict=True):
            _write(part, new[:, :, tail], place.rows, place.slots[:, tail])
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
            self.rotation = rotary_rotation(twice, 2 * self.rotation.shape[1], self.theta, self.rotation.device)
        if self.window is None and self.slots < positions:
            old, self.slots = self.keys_values, max(positions, 2 * self.slots)
            self.keys_values = old.new_zeros(*old.shape[:4], self.slots, old.shape[5])
            self.keys_values[..., : old.shape[4], :] = old
            if self.compiled:  # one compiled function for every number of slots
                torch._dynamo.maybe_mark_dynamic(self.keys_values, 4)


def write_then_read(
    keys_values: Tensor,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    allowed: Tensor | None,
    rows: Tensor,
    slots: Tensor,
    keys_used: int | None = None,
) -> Tensor:
    """Write keys and values [row, head, new, head_dim] to their slots of some rows, then attend to the slots in use."""
    kept_keys, kept_values = keys_values[layer]
    _write(kept_keys, keys, rows, slots)
    _write(kept_values, values, rows, slots)
    used = keys_used if allowed is None else allowed.shape[-1]
    kept_keys, kept_values = kept_keys[:, :, :used], kept_values[:, :, :used]
    chosen = rows.tolist()
    if chosen == list(range(len(chosen))):
        kept_keys, kept_values = kept_keys[: len(chosen)], kept_values[: len(chosen)]
        return F.scaled_dot_product_attention(queries, kept_keys, kept_values, attn_mask=allowed)
    mixed = []  # rows here and there: one by one, which copies no keys
    for index, row in enumerate(chosen):
        mask = None if allowed is None else allowed[index : index + 1]
        one = (queries[index : index + 1], kept_keys[row : row + 1], kept_values[row : row + 1])
        mixed.append(F.scaled_dot_product_attention(*one, attn_mask=mask))
    return torch.cat(mixed)


def _write(kept: KeptLayer, new: NewHeads, rows: Int[Tensor, " row"], slots: Int[Tensor, "row new"]) -> None:
    if len(rows) == 1:
        kept[int(rows)].index_copy_(1, slots[0], new[0])
    else:
        kept[rows.to(slots.device)[:, None], :, slots] = new.transpose(1, 2)


# For the compiler one operation that it does not look into: whatever the number of keys, it is compiled once, and the cache is
# never copied.
_LIBRARY = torch.library.Library("blt", "DEF")
_LIBRARY.define(
    "write_then_read(Tensor(a!) keys_values, int layer, Tensor queries, Tensor keys, Tensor values, Tensor? allowed, "
    "Tensor rows, Tensor slots) -> Tensor"
)
_LIBRARY.impl("write_then_read", write_then_read, "CompositeExplicitAutograd")
torch.library.register_fake(
    "blt::write_then_read", lambda keys_values, layer, queries, *rest: torch.empty_like(queries)
)
