"""Queries, keys and values -> what the heads read: causal, within documents and windows, and no work outside of them.

What a query may read is one number: the oldest position in its reach. On CUDA that makes a block mask for FlexAttention;
everywhere else the queries go tile by tile, each tile with the stretch of keys that its queries may read, so that time grows
with the row and memory does not hold the scores (the backward pass works them out again).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blt.model.rotary import Heads
from blt.shapes import DocumentIds, OldestRead

TILE_QUERIES = 128  # or half a window, if that is less; 64 and 256 are slower in bf16 (docs/log.md)
KEYS_STEP = (
    64  # a tile's keys begin at multiples: few shapes, as the first product of each costs half a millisecond in bf16
)
TILES_TOGETHER = 4  # of one row; of more rows fewer

FlatHeads = Float[Tensor, "batch_head position head_dim"]
TileHeads = Float[Tensor, "batch_head tile in_tile head_dim"]
FlatTiles = Float[Tensor, "batch_head_tile in_tile head_dim"]
TileScores = Float[Tensor, "batch_head_tile query key"]


class Edge(NamedTuple):
    """Some of a tile's keys, counted from the tile's first, of which some queries may read only a part."""

    keys: slice
    bias: Float[Tensor, "batch_or_one tile_or_one query key"]  # -inf where a query must not read, else 0


class Tile(NamedTuple):
    """Neighbouring queries, and the stretch of keys that holds all that they may read; all of it but for the edges.

    ``num_tiles`` tiles of one shape, end to end, are worked out together; the keys of each begin as much after those of the one
    before as its queries.
    """

    queries: slice  # of all of them
    first_key: int  # of the first
    num_keys: int  # of each
    edges: list[Edge]
    num_tiles: int = 1

    @property
    def num_queries(self) -> int:
        """Of each."""
        return (self.queries.stop - self.queries.start) // self.num_tiles

    def of_queries(self, states: FlatHeads) -> TileHeads:
        """The part of each tile's queries; a view."""
        return states[:, self.queries].unflatten(1, (self.num_tiles, -1))

    def of_keys(self, states: FlatHeads) -> TileHeads:
        """The part of each tile's keys; a view, in which tiles overlap."""
        end = self.first_key + (self.num_tiles - 1) * self.num_queries + self.num_keys
        return states[:, self.first_key : end].unfold(1, self.num_keys, self.num_queries).mT

    def add_to_keys(self, sums: FlatHeads, parts: FlatTiles) -> None:
        """Add to each key's sum what each tile has for it."""
        for tile, part in enumerate(parts.unflatten(0, (-1, self.num_tiles)).unbind(1)):
            begin = self.first_key + tile * self.num_queries
            sums[:, begin : begin + self.num_keys].add_(part)


Reach = list[Tile] | BlockMask  # which positions each position may read, as ``attend`` wants it


def oldest_read(documents: DocumentIds, window_positions: int | None) -> OldestRead:
    """The first position that each position may read: of its own document, at most ``window_positions`` with itself.

    >>> oldest_read(torch.tensor([[0, 0, 0, 0, 1]]), 3).tolist(), oldest_read(torch.tensor([[0, 0, 1]]), None).tolist()
    ([[0, 0, 0, 1, 4]], [[0, 0, 2]])
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    oldest = begins.cummax(1).values
    return oldest if window_positions is None else oldest.maximum(index - window_positions + 1)


def positions_in_reach(documents: DocumentIds, window_positions: int | None) -> Reach:
    """Which positions each may read, for all layers of a stack: its document's, not after it, in its window."""
    oldest = oldest_read(documents, window_positions)
    if documents.device.type == "cuda":
        return block_mask(oldest)
    return tiles(oldest, window_positions)


def attend(queries: Heads, keys: Heads, values: Heads, reach: Reach) -> Heads:
    """Softmax attention (scores over the square root of the head's width) of each query to what it may read."""
    if isinstance(reach, BlockMask):
        return _compiled_flex_attention()(queries, keys, values, block_mask=reach)
    kind, dtype = queries.device.type, values.dtype
    inner = _inner_dtype(kind)
    mixed = _TiledAttention.apply(queries.to(inner), keys.to(inner), values.to(inner), reach)
    return mixed if torch.is_autocast_enabled(kind) else mixed.to(dtype)


def block_mask(oldest: OldestRead) -> BlockMask:
    """What FlexAttention wants to know: which blocks of keys it may skip, and which keys inside the others."""
    batch, num_positions = oldest.shape
    return create_block_mask(
        lambda row, head, query, key: (key <= query) & (key >= oldest[row, query]),
        *(batch, None, num_positions, num_positions),
        device=oldest.device,
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def tiles(oldest: OldestRead, window_positions: int | None) -> list[Tile]:
    """The queries in tiles, each with its keys; neighbours of one shape are one entry.

    Rows that hold one document share the tiles' edges, and so do all tiles beyond the first window.
    """
    index = torch.arange(oldest.shape[1], device=oldest.device)
    plain = 0 if window_positions is None else (index - window_positions + 1).clamp(min=0)
    alike = bool((oldest == plain).all())
    together = max(1, TILES_TOGETHER // len(oldest))
    size = TILE_QUERIES if window_positions is None else min(TILE_QUERIES, -(-window_positions // 2))
    parts = (oldest[:1] if alike else oldest).split(size, 1)
    limits = torch.stack([torch.stack([part.amin(), part.amax()]) for part in parts]).tolist()
    shapes = []  # queries, keys before them, keys that some of them may not read
    for tile, (part, (first, newest)) in enumerate(zip(parts, limits, strict=True)):
        first -= first % KEYS_STEP
        shapes.append((part.shape[1], tile * size - first, newest - first))
    known: dict[tuple[int, int, int], list[Edge]] = {}
    found = []
    tile = 0
    while tile < len(parts):
        count = next(
            (n for n in range(1, together) if shapes[tile + n : tile + n + 1] != shapes[tile : tile + 1]), together
        )
        shape, begin = shapes[tile], tile * size
        num_queries, before, _ = shape
        if not alike or shape not in known:
            own = parts[tile : tile + (1 if alike else count)]
            firsts = [(tile + n) * size - before for n in range(len(own))]
            known[shape] = _edges(
                torch.stack([part - first for part, first in zip(own, firsts, strict=True)], 1), shape
            )
        queries = slice(begin, begin + count * num_queries)
        found.append(Tile(queries, begin - before, before + num_queries, known[shape], count))
        tile += count
    return found


def _edges(oldest: Int[Tensor, "batch_or_one tile query"], shape: tuple[int, int, int]) -> list[Edge]:
    """The edges of tiles of one shape; ``oldest`` counts from each tile's first key."""
    num_queries, before, unread = shape
    index = torch.arange(before + num_queries, device=oldest.device)
    queries = index[before:, None]
    # what all queries may read lies from the newest of their oldest keys to the first query
    parts = [index] if unread >= before else [index[:unread], index[before:]]
    edges = []
    for keys in parts:
        if len(keys):
            forbidden = (keys > queries) | (keys < oldest[..., None])
            bias = torch.zeros_like(forbidden, dtype=_inner_dtype(oldest.device.type)).masked_fill_(
                forbidden, -torch.inf
            )
            edges.append(Edge(slice(int(keys[0]), int(keys[-1]) + 1), bias))
    return edges


def _inner_dtype(kind: str) -> torch.dtype:
    """Training asks for fast products; weights that are in bf16 should not cost the scores their precision as well."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class _TiledAttention(torch.autograd.Function):
    """One tile at a time, forward and backward; what is kept in between is as long as the row."""

    @staticmethod
    def forward(ctx: Any, queries: Heads, keys: Heads, values: Heads, found: list[Tile]) -> Heads:
        batch = queries.shape[0]
        flat_queries, flat_keys, flat_values = (part.flatten(0, 1) for part in (queries, keys, values))
        flat_queries = flat_queries * queries.shape[-1] ** -0.5
        mixed = torch.empty_like(flat_values)
        space = _Workspace(flat_queries, found, batch)
        with torch.autocast(queries.device.type, enabled=False):
            for tile in found:
                own, read_keys = _flat(tile.of_queries(flat_queries)), _flat(tile.of_keys(flat_keys))
                read = torch.bmm(space.weights(own, read_keys, tile), _flat(tile.of_keys(flat_values)))
                tile.of_queries(mixed).copy_(read.unflatten(0, (-1, tile.num_tiles)))
        ctx.save_for_backward(flat_queries, flat_keys, flat_values)
        ctx.found, ctx.batch = found, batch
        return mixed.unflatten(0, (batch, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Heads) -> tuple[Heads, Heads, Heads, None]:
        queries, keys, values = ctx.saved_tensors
        of_mixed = gradients[0].flatten(0, 1)
        of_queries = torch.empty_like(queries)
        of_keys, of_values = (torch.zeros_like(part, dtype=torch.float32) for part in (keys, values))
        space = _Workspace(queries, ctx.found, ctx.batch)
        for tile in ctx.found:
            own_queries, own = _flat(tile.of_queries(queries)), _flat(tile.of_queries(of_mixed))
            read_keys, read_values = _flat(tile.of_keys(keys)), _flat(tile.of_keys(values))
            weights = space.weights(own_queries, read_keys, tile)
            tile.add_to_keys(of_values, torch.bmm(weights.mT, own))
            of_weights = torch.bmm(own, read_values.mT, out=space.scores(tile))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_weights)
            tile.of_queries(of_queries).copy_(torch.bmm(of_scores, read_keys).unflatten(0, (-1, tile.num_tiles)))
            tile.add_to_keys(of_keys, torch.bmm(of_scores.mT, own_queries))
        of_queries *= queries.shape[-1] ** -0.5
        found = (of_queries, of_keys.to(keys.dtype), of_values.to(values.dtype))
        of_query_heads, of_key_heads, of_value_heads = (part.unflatten(0, (ctx.batch, -1)) for part in found)
        return of_query_heads, of_key_heads, of_value_heads, None


def _flat(part: TileHeads) -> FlatTiles:
    """All heads' tiles. bf16 products copy what is not contiguous, each of them anew; those in fp32 need no copy."""
    part = part.flatten(0, 1)
    return part.contiguous() if part.dtype == torch.bfloat16 else part


class _Workspace:
    """Memory for the scores and the weights of one tile after another: what was just in use is in the processor's cache."""

    def __init__(self, queries: FlatHeads, found: list[Tile], batch: int) -> None:
        self.num_heads, self.batch = len(queries), batch
        largest = max((tile.num_tiles * tile.num_queries * tile.num_keys for tile in found), default=0)
        self.memory = queries.new_empty(2, self.num_heads * largest)

    def scores(self, tile: Tile) -> TileScores:
        """Room for a tile's scores; the next ones go to the same place."""
        return self._room(tile, 0)

    def weights(
        self,
        queries: Float[Tensor, "batch_head_tile query head_dim"],
        keys: Float[Tensor, "batch_head_tile key head_dim"],
        tile: Tile,
    ) -> TileScores:
        """How much each query of a tile takes of each key: the softmax of the scores; ``queries`` come scaled."""
        scores = torch.bmm(queries, keys.mT, out=self.scores(tile))
        of_rows = scores.unflatten(0, (self.batch, -1, tile.num_tiles))
        for edge in tile.edges:
            of_rows[..., edge.keys].add_(edge.bias[:, None])
        return torch.softmax(scores, -1, out=self._room(tile, 1))

    def _room(self, tile: Tile, which: int) -> TileScores:
        shape = self.num_heads * tile.num_tiles, tile.num_queries, tile.num_keys
        return self.memory[which, : math.prod(shape)].view(shape)
