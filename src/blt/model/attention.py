"""Layers: self-attention over positions, cross-attention between bytes and the patches that hold them (3.2.2, 3.3.1).

Cross-attention computes exactly what it must: a patch's slots meet that patch's bytes only, and a byte meets the slots
of one patch only, so no bytes x patches matrix ever exists.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.rotary import Heads, rotate
from blt.shapes import Rotation, Segments

States = Float[Tensor, "batch position width"]


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions, no biases; the caller says which keys the queries meet in between."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.o_proj = Linear(width, width)

    def project(self, states: States, rotation: Rotation) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values; the first two turned to their positions."""
        return (
            rotate(self._split_heads(self.q_proj(states)), rotation),
            rotate(self._split_heads(self.k_proj(states)), rotation),
            self._split_heads(self.v_proj(states)),
        )

    def merge(self, mixed: Heads) -> States:
        """What the heads read, as one output."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, states: States) -> Heads:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """What both directions share: norms and projections of queries and keys; no positions, no biases."""

    def __init__(self, width: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = RMSNorm(width, eps=norm_eps)
        self.k_norm = RMSNorm(width, eps=norm_eps)
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.o_proj = Linear(width, width)

    def queries(self, states: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes head head_dim"]:
        return self.q_proj(self.q_norm(states)).unflatten(-1, (self.num_heads, -1))

    def keys_values(
        self, states: Float[Tensor, "*axes width"]
    ) -> tuple[Float[Tensor, "*axes head head_dim"], Float[Tensor, "*axes head head_dim"]]:
        states, split = self.k_norm(states), (self.num_heads, -1)
        return self.k_proj(states).unflatten(-1, split), self.v_proj(states).unflatten(-1, split)


class EncoderCrossAttention(CrossAttention):
    """Each slot of a patch reads the bytes of that patch (3.2.2): a softmax over segments of the bytes."""

    def forward(
        self,
        slots: Float[Tensor, "patch slot width"],
        byte_states: Float[Tensor, "flat_byte width"],
        segments: Segments,
    ) -> Float[Tensor, "patch slot width"]:
        queries = self.queries(slots)
        keys, values = self.keys_values(byte_states)
        num_patches = slots.shape[0]
        scores = (select_rows(queries, segments) * keys[:, None]).sum(-1).float() * keys.shape[-1] ** -0.5
        scores = scores - _segment_max(scores.detach(), segments, num_patches)[segments]
        weights = scores.exp()
        totals = _segment_sum(weights, segments, num_patches)
        weights = (weights / select_rows(totals, segments)).to(values.dtype)
        mixed = _segment_sum(weights[..., None] * values[:, None], segments, num_patches)
        return self.o_proj(mixed.flatten(2))


class DecoderCrossAttention(CrossAttention):
    """Each byte reads the slots of the newest closed patch (3.3.1)."""

    def read_patches(
        self,
        byte_states: States,
        keys: Float[Tensor, "patch slot head head_dim"],
        values: Float[Tensor, "patch slot head head_dim"],
        read: Segments | None = None,
    ) -> States:
        """``read``: the patch that each byte reads, all rows flattened; absent: keys and values are those of each byte."""
        flat = byte_states.flatten(0, 1)
        queries = self.queries(flat)
        if read is None:
            mixed = _mix(_slot_weights(queries, keys), values)
        else:
            mixed = _SlotAttention.apply(queries, keys, values, read)
        # twice the residual, as in the released weights
        return (2 * flat + self.o_proj(mixed.flatten(1))).view_as(byte_states)


def _slot_weights(
    queries: Float[Tensor, "flat_byte head head_dim"], keys: Float[Tensor, "flat_byte slot head head_dim"]
) -> Float[Tensor, "flat_byte slot head"]:
    """How much each byte takes of each slot, in fp32."""
    # products and sums: as matrix products, of a few numbers for each byte and head, they take three times as long
    scores = (queries[:, None] * keys).sum(-1).float() * keys.shape[-1] ** -0.5
    return scores.softmax(1)


def _mix(
    weights: Float[Tensor, "flat_byte slot head"], values: Float[Tensor, "flat_byte slot head head_dim"]
) -> Float[Tensor, "flat_byte head head_dim"]:
    return (weights.to(values.dtype)[..., None] * values).sum(1)


class _SlotAttention(torch.autograd.Function):
    """Each byte reads the slots of one patch. Their keys and values are kept for each patch, not for each of its bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "flat_byte head head_dim"],
        keys: Float[Tensor, "patch slot head head_dim"],
        values: Float[Tensor, "patch slot head head_dim"],
        read: Segments,
    ) -> Float[Tensor, "flat_byte head head_dim"]:
        weights = _slot_weights(queries, select_rows(keys, read))
        ctx.save_for_backward(queries, keys, values, read, weights)
        return _mix(weights, select_rows(values, read))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, read, weights = ctx.saved_tensors
        of_mixed = gradients[0][:, None]
        of_weights = (of_mixed * select_rows(values, read)).sum(-1).float()
        of_values = _segment_sum(weights.to(values.dtype)[..., None] * of_mixed, read, len(values))
        of_scores = weights * (of_weights - (weights * of_weights).sum(1, keepdim=True)) * keys.shape[-1] ** -0.5
        of_scores = of_scores.to(keys.dtype)[..., None]
        of_queries = (of_scores * select_rows(keys, read)).sum(1)
        of_keys = _segment_sum(of_scores * queries[:, None], read, len(keys))
        return of_queries, of_keys, of_values, None


def select_rows(values: Tensor, rows: Int[Tensor, " row"]) -> Tensor:
    """These rows along axis 0. Flat: torch's gradient of a selection from more than two axes is twenty times slower."""
    return values.flatten(1).index_select(0, rows).view(-1, *values.shape[1:])


def _segment_sum(values: Tensor, segments: Segments, num_segments: int) -> Tensor:
    """The sum of each segment along axis 0."""
    flat = values.flatten(1)
    sums = flat.new_zeros(num_segments, flat.shape[1]).index_add(0, segments, flat)
    return sums.view(-1, *values.shape[1:])


def _segment_max(values: Tensor, segments: Segments, num_segments: int) -> Tensor:
    """The largest value of each segment along axis 0; 0 for an empty segment."""
    index = segments.view(-1, *([1] * (values.ndim - 1))).expand_as(values)
    return values.new_zeros(num_segments, *values.shape[1:]).scatter_reduce(
        0, index, values, "amax", include_self=False
    )
