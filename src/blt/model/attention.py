"""Self-attention over positions, and cross-attention between bytes and the patches that hold them (3.2.2, 3.3.1).

Cross-attention computes exactly what it must: a patch's slots meet that patch's bytes only, and a byte meets the slots
of one patch only, so no bytes x patches matrix ever exists.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from blt.model.norm import RMSNorm
from blt.shapes import DocumentIds, MayAttend, NewestClosedPatch, PatchIds, Rotation

Heads = Float[Tensor, "batch head position head_dim"]


def rotary_rotation(num_positions: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """Unit complex numbers that turn pair i of position p by ``p * theta^(-2i / head_dim)``, angles in fp32.

    >>> rotary_rotation(2, 4, 100.0, torch.device("cpu")).angle().round(decimals=4).tolist()
    [[0.0, 0.0], [1.0, 0.10000000149011612]]
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Heads, rotation: Rotation) -> Heads:
    """Rotary positions on interleaved pairs (x[2i], x[2i + 1])."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(heads.dtype)


def may_attend(documents: DocumentIds, window_positions: int | None) -> MayAttend | None:
    """Which keys each query may read: of its own document, not after it, at most ``window_positions`` with itself.

    None where that is plain causal attention, for which there are faster kernels.

    >>> may_attend(torch.tensor([[0, 0, 0, 1]]), 2).int().tolist()
    [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]
    """
    num_positions = documents.shape[1]
    one_document = bool((documents[:, -1:] == documents[:, :1]).all())
    if one_document and (window_positions is None or window_positions >= num_positions):
        return None
    index = torch.arange(num_positions, device=documents.device)
    distance = index[:, None] - index[None, :]
    near = distance >= 0
    if window_positions is not None:
        near &= distance < window_positions
    return near & (documents[:, :, None] == documents[:, None, :])


class SelfAttention(nn.Module):
    """Causal multi-head attention with rotary positions, no biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, states: Float[Tensor, "batch position width"], rotation: Rotation, allowed: MayAttend | None
    ) -> Float[Tensor, "batch position width"]:
        queries = rotate(self._split_heads(self.q_proj(states)), rotation)
        keys = rotate(self._split_heads(self.k_proj(states)), rotation)
        values = self._split_heads(self.v_proj(states))
        mask = None if allowed is None else allowed[:, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, states: Float[Tensor, "batch position width"]) -> Heads:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """What both directions share: norms and projections of queries and keys; no positions, no biases."""

    def __init__(self, width: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = RMSNorm(width, eps=norm_eps)
        self.k_norm = RMSNorm(width, eps=norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _project(self, queries_from: Tensor, keys_from: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries_from, keys_from = self.q_norm(queries_from), self.k_norm(keys_from)
        split = (self.num_heads, -1)
        return (
            self.q_proj(queries_from).unflatten(-1, split),
            self.k_proj(keys_from).unflatten(-1, split),
            self.v_proj(keys_from).unflatten(-1, split),
        )


class EncoderCrossAttention(CrossAttention):
    """Each slot of a patch reads the bytes of that patch (3.2.2): a softmax over segments of the row."""

    def forward(
        self,
        slots: Float[Tensor, "batch patch slot width"],
        byte_states: Float[Tensor, "batch byte width"],
        patch_ids: PatchIds,
    ) -> Float[Tensor, "batch patch slot width"]:
        queries, keys, values = self._project(slots, byte_states)
        batch, num_patches = slots.shape[:2]
        segments = _flat_index(patch_ids, num_patches)  # patches of all rows, one after another
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        queries = queries.flatten(0, 1)
        scores = torch.einsum("nshd,nhd->nsh", queries.index_select(0, segments), keys).float() * keys.shape[-1] ** -0.5
        scores = scores - _segment_max(scores.detach(), segments, batch * num_patches)[segments]
        weights = scores.exp()
        totals = weights.new_zeros(batch * num_patches, *weights.shape[1:]).index_add(0, segments, weights)
        # an empty patch (beyond its row's last one) has no bytes: its slots read nothing
        weights = (weights / totals.index_select(0, segments)).to(values.dtype)
        weighted = weights[..., None] * values[:, None]
        mixed = torch.zeros_like(queries, dtype=weighted.dtype).index_add(0, segments, weighted)
        return self.o_proj(mixed.flatten(2).unflatten(0, (batch, num_patches)))


class DecoderCrossAttention(CrossAttention):
    """Each byte reads the slots of the newest closed patch (3.3.1)."""

    def forward(
        self,
        byte_states: Float[Tensor, "batch byte width"],
        slots: Float[Tensor, "batch patch slot width"],
        newest_closed: NewestClosedPatch,
    ) -> Float[Tensor, "batch byte width"]:
        queries, keys, values = self._project(byte_states, slots)
        index = _flat_index(newest_closed, slots.shape[1])
        queries = queries.flatten(0, 1)
        keys, values = keys.flatten(0, 1).index_select(0, index), values.flatten(0, 1).index_select(0, index)
        scores = torch.einsum("nhd,nshd->nsh", queries, keys).float() * keys.shape[-1] ** -0.5
        mixed = torch.einsum("nsh,nshd->nhd", scores.softmax(1).to(values.dtype), values)
        return self.o_proj(mixed.flatten(1).unflatten(0, byte_states.shape[:2]))


def _flat_index(patch_ids: PatchIds, num_patches: int) -> Tensor:
    """Patch ids counted through all rows of a batch.

    >>> _flat_index(torch.tensor([[0, 1, 1], [0, 0, 1]]), 2).tolist()
    [0, 1, 1, 2, 2, 3]
    """
    row = torch.arange(patch_ids.shape[0], device=patch_ids.device)[:, None]
    return (patch_ids + row * num_patches).flatten()


def _segment_max(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """The largest value of each segment along axis 0; 0 for an empty segment."""
    index = segments.view(-1, *([1] * (values.ndim - 1))).expand_as(values)
    return values.new_zeros(num_segments, *values.shape[1:]).scatter_reduce(
        0, index, values, "amax", include_self=False
    )
