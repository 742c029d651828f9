"""The pre-norm block that all four networks are stacks of: RMSNorm, causal self-attention, SwiGLU (no biases)."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blt.config import TransformerConfig
from blt.model.attention import SelfAttention, States
from blt.model.causal_attention import Reach, attend, positions_in_reach
from blt.model.kv_cache import Kept
from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.rotary import Heads, rotary_rotation
from blt.shapes import DocumentIds, Rotation

Gated = Float[Tensor, "batch position ffn_width"]


class SwiGLU(nn.Module):
    """Gated feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, ffn_width)
        self.up_proj = Linear(width, ffn_width)
        self.down_proj = Linear(ffn_width, width)

    def forward(self, states: States) -> States:
        gate, up = self.gate_proj(states), self.up_proj(states)
        if torch.is_grad_enabled() and self.down_proj.weight.requires_grad:
            return _GatedProduct.apply(gate, up, self.down_proj.weight.to(gate.dtype))
        return self.down_proj(F.silu(gate) * up)


class _GatedProduct(torch.autograd.Function):
    """``silu(gate) * up``, times a weight; of the four tensors as wide as the layer two are kept, the others made again."""

    @staticmethod
    def forward(ctx: Any, gate: Gated, up: Gated, weight: Float[Tensor, "width ffn_width"]) -> States:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: States) -> tuple[Gated, Gated, Tensor]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        of_weight = gradients[0].flatten(0, -2).mT @ (activated * up).flatten(0, -2)
        of_gated = gradients[0] @ weight
        of_up = activated.mul_(of_gated)
        return torch.ops.aten.silu_backward(of_gated.mul_(up), gate), of_up, of_weight


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width)

    def forward(self, states: States, rotation: Rotation, reach: Reach) -> States:
        queries, keys, values = self.before_attention(states, rotation)
        return self.after_attention(states, attend(queries, keys, values, reach))

    def extend(self, states: States, layer: int, kept: Kept) -> States:
        """``forward`` for new positions of rows whose earlier ones are in the cache."""
        cache, place = kept
        queries, keys, values = self.before_attention(states, place.rotation)
        return self.after_attention(states, cache.attend(layer, queries, keys, values, place))

    def before_attention(self, states: States, rotation: Rotation) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values."""
        return self.attention.project(self.attention_norm(states), rotation)

    def after_attention(self, states: States, mixed: Heads) -> States:
        """The block's output, from its input and what its heads have read."""
        states = states + self.attention.merge(mixed)
        return states + self.ffn(self.ffn_norm(states))


class Transformer(nn.Module):
    """A stack of blocks; positions are absolute in the row, attention stays within documents and the window."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.recompute = False  # in the backward pass, what is inside each block: less memory, a third more time

    def forward(
        self, states: States, documents: DocumentIds, positions: Int[Tensor, " position"] | None = None
    ) -> States:
        """``positions``: where each state stands in its row, if several rows follow one another; absent: where it is."""
        rotation, reach = self.rotation_and_reach(documents, positions)
        for block in self.blocks:
            states = self.run_block(block, states, rotation, reach)
        return states

    def run_block(self, block: Block, states: States, rotation: Rotation, reach: Reach) -> States:
        """One layer, as the whole stack runs it."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, states, rotation, reach, use_reentrant=False)
        return block(states, rotation, reach)

    def extend(self, states: States, kept: Kept) -> States:
        """``forward`` for new positions of rows whose earlier ones are in the cache."""
        for layer, block in enumerate(self.blocks):
            states = block.extend(states, layer, kept)
        return states

    @property
    def blocks(self) -> list[Block]:
        """The layers, as what they are."""
        return cast("list[Block]", list(self.layers))

    def rotation_and_reach(
        self, documents: DocumentIds, positions: Int[Tensor, " position"] | None = None
    ) -> tuple[Rotation, Reach]:
        """What every layer of the stack shares: rotary rotation, and which positions each may read."""
        config, window = self.config, self.config.window_positions
        theta, scaling = config.rope_theta, config.rope_scaling
        rotation = rotary_rotation(documents.shape[1], config.head_dim, theta, documents.device, scaling)
        return rotation if positions is None else rotation[positions], positions_in_reach(documents, window)


RESIDUAL_OUTPUTS = ("o_proj", "down_proj")
RESIDUAL_SCALE = 0.1  # measured against 1 and 0.3 (docs/log.md)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fresh weights: linear layers normal with std inputs^-0.5, embeddings std 0.02, norms 1.

    Layers that write to the residual stream start at a tenth of that, so that the embeddings are heard at first.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            scale = RESIDUAL_SCALE if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            part.weight.normal_(0.0, scale * part.in_features**-0.5, generator=generator)
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, 0.02, generator=generator)
        elif isinstance(part, nn.RMSNorm):
            part.weight.fill_(1.0)
