"""The pre-norm block that all four networks are stacks of: RMSNorm, causal self-attention, SwiGLU (no biases)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from blt.config import TransformerConfig
from blt.model.attention import SelfAttention, may_attend, rotary_rotation
from blt.model.norm import RMSNorm
from blt.shapes import DocumentIds, MayAttend, Rotation

States = Float[Tensor, "batch position width"]


class SwiGLU(nn.Module):
    """Gated feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, states: States) -> States:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width)

    def forward(self, states: States, rotation: Rotation, allowed: MayAttend | None) -> States:
        states = states + self.attention(self.attention_norm(states), rotation, allowed)
        return states + self.ffn(self.ffn_norm(states))


class Transformer(nn.Module):
    """A stack of blocks; positions are absolute in the row, attention stays within documents and the window."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, states: States, documents: DocumentIds) -> States:
        rotation, allowed = self.rotation_and_mask(documents)
        for layer in self.layers:
            states = layer(states, rotation, allowed)
        return states

    def rotation_and_mask(self, documents: DocumentIds) -> tuple[Rotation, MayAttend | None]:
        """What every layer of the stack shares: rotary rotation, and which positions may attend to which."""
        config = self.config
        rotation = rotary_rotation(documents.shape[1], config.head_dim, config.rope_theta, documents.device)
        return rotation, may_attend(documents, config.window_positions)


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
