"""Queries, keys and values -> what the heads read: causal, within documents and windows, and no work outside of them.

What a query may read is one number: the oldest position in its reach. On CUDA that makes a block mask for FlexAttention;
everywhere else the queries go tile by tile, each tile with the stretch of keys that its queries may read, so that time grows
with the row and memory does not hold the scores (the backward pass works them out again).
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blt.model.rotary import Heads
from blt.shapes import DocumentIds, OldestRead

TILE_QUERIES = 128  # or half a window, if that is less; 64 and 256 are slower in bf16 (docs/log.md)

FlatHeads = Float[Tensor, "batch_head position head_dim"]


class Edge(NamedTuple):
    """Some of a tile's keys, counted from the tile's first, of which some queries may read only a part."""

    keys: slice
    forbidden: Bool[Tensor, "batch_or_one 1 query key"]


class Tile(NamedTuple):
    """Neighbouring queries, and the stretch of keys that holds all that they may read; all of it but for the edges."""

    queries: slice
    keys: slice
    edges: list[Edge]


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


def positions_in_reach(documents: DocumentIds, window_positions: int | None, row_starts: Sequence[int] = (0,)) -> Reach:
    """Which positions each may read, for all layers of a stack: its document's, not after it, in its window.

    ``row_starts``: where rows begin, if several follow one another in one; no document reaches across.
    """
    oldest = oldest_read(documents, window_positions)
    if documents.device.type == "cuda":
        return block_mask(oldest)
    return tiles(oldest, window_positions, row_starts)


def attend(queries: Heads, keys: Heads, values: Heads, reach: Reach) -> Heads:
    """Softmax attention (scores over the square root of the head's width) of each query to what it may read."""
    if isinstance(reach, BlockMask):
        return _compiled_flex_attention()(queries, keys, values, block_mask=reach)
    kind, dtype = queries.device.type, values.dtype
    # training asks for fast products; weights that are in bf16 should not cost the scores their precision as well
    inner = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
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


def tiles(oldest: OldestRead, window_positions: int | None, row_starts: Sequence[int] = (0,)) -> list[Tile]:
    """The queries in tiles, each with its keys; a row that begins begins a tile.

    Rows that hold one document share the tiles' edges, and so do all tiles beyond the first window.
    """
    num_positions = oldest.shape[1]
    index = torch.arange(num_positions, device=oldest.device)
    plain = 0 if window_positions is None else (index - window_positions + 1).clamp(min=0)
    alike = bool((oldest == plain).all())
    oldest = oldest[:1] if alike else oldest
    size = TILE_QUERIES if window_positions is None else min(TILE_QUERIES, -(-window_positions // 2))
    bounds = [*row_starts, num_positions]
    begins = [begin for start, stop in pairwise(bounds) for begin in range(start, stop, size)]
    ends = [*begins[1:], num_positions]
    first_keys = oldest[:, begins].amin(0).tolist()
    newest_first = oldest[:, [end - 1 for end in ends]].amax(0).tolist()
    known: dict[tuple[int, ...], list[Edge]] = {}
    found = []
    for begin, end, first, last_first in zip(begins, ends, first_keys, newest_first, strict=True):
        shape = (end - begin, begin - first, last_first - first)
        if not alike or shape not in known:
            # what all queries may read lies from the newest of their oldest keys to the first query
            parts = (
                [(0, end - first)] if last_first >= begin else [(0, last_first - first), (begin - first, end - first)]
            )
            known[shape] = [
                Edge(slice(*keys), _forbidden(index[first:][slice(*keys)], index[begin:end], oldest[:, begin:end]))
                for keys in parts
                if keys[0] < keys[1]
            ]
        found.append(Tile(slice(begin, end), slice(first, end), known[shape]))
    return found


def _forbidden(
    keys: Int[Tensor, " key"], queries: Int[Tensor, " query"], oldest: Int[Tensor, "batch_or_one query"]
) -> Bool[Tensor, "batch_or_one 1 query key"]:
    return ((keys > queries[:, None]) | (keys < oldest[..., None]))[:, None]


class _TiledAttention(torch.autograd.Function):
    """One tile at a time, forward and backward; what is kept in between is as long as the row."""

    @staticmethod
    def forward(ctx: Any, queries: Heads, keys: Heads, values: Heads, found: list[Tile]) -> Heads:
        batch = queries.shape[0]
        flat_queries, flat_keys, flat_values = (part.flatten(0, 1) for part in (queries, keys, values))
        flat_queries = flat_queries * queries.shape[-1] ** -0.5
        mixed = torch.empty_like(flat_values)
        with torch.autocast(queries.device.type, enabled=False):
            for tile in found:
                weights = _weights(flat_queries[:, tile.queries], flat_keys[:, tile.keys], tile, batch)
                mixed[:, tile.queries] = torch.bmm(weights, flat_values[:, tile.keys])
        ctx.save_for_backward(flat_queries, flat_keys, flat_values, mixed)
        ctx.found, ctx.batch = found, batch
        return mixed.unflatten(0, (batch, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Heads) -> tuple[Heads, Heads, Heads, None]:
        queries, keys, values, mixed = ctx.saved_tensors
        of_mixed = gradients[0].flatten(0, 1)
        # the softmax's gradient needs, of each query, its weights times their gradients: that is what it read times its own
        of_weights_mean = (of_mixed * mixed).sum(-1, keepdim=True)
        of_queries = torch.empty_like(queries)
        of_keys, of_values = (torch.zeros_like(part, dtype=torch.float32) for part in (keys, values))
        for tile in ctx.found:
            own_queries, read_keys = (
                _contiguous_in_bf16(queries[:, tile.queries]),
                _contiguous_in_bf16(keys[:, tile.keys]),
            )
            weights, own = _weights(own_queries, read_keys, tile, ctx.batch), of_mixed[:, tile.queries]
            of_values[:, tile.keys] += torch.bmm(weights.mT, own)
            of_scores = torch.bmm(own, values[:, tile.keys].mT).sub_(of_weights_mean[:, tile.queries]).mul_(weights)
            of_queries[:, tile.queries] = torch.bmm(of_scores, read_keys)
            of_keys[:, tile.keys] += torch.bmm(of_scores.mT, own_queries)
        of_queries *= queries.shape[-1] ** -0.5
        found = (of_queries, of_keys.to(keys.dtype), of_values.to(values.dtype))
        of_query_heads, of_key_heads, of_value_heads = (part.unflatten(0, (ctx.batch, -1)) for part in found)
        return of_query_heads, of_key_heads, of_value_heads, None


def _contiguous_in_bf16(part: FlatHeads) -> FlatHeads:
    """bf16 products copy what is not contiguous, each of them anew; those in fp32 need no copy."""
    return part.contiguous() if part.dtype == torch.bfloat16 else part


def _weights(
    queries: Float[Tensor, "batch_head query head_dim"],
    keys: Float[Tensor, "batch_head key head_dim"],
    tile: Tile,
    batch: int,
) -> Float[Tensor, "batch_head query key"]:
    """How much each query of a tile takes of each key: the softmax of the scores; ``queries`` come scaled."""
    scores = torch.bmm(queries, keys.mT)
    for edge in tile.edges:
        scores.unflatten(0, (batch, -1))[..., edge.keys].masked_fill_(edge.forbidden, -torch.inf)
    return scores.softmax(-1)
