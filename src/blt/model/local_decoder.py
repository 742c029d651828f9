"""Latent states and byte states -> next-byte logits (3.3)."""

from torch import nn

from blt.byte_ids import VOCAB_SIZE
from blt.config import TransformerConfig
from blt.model.attention import DecoderCrossAttention
from blt.model.norm import RMSNorm
from blt.model.transformer import Transformer
from blt.shapes import ByteStates, DocumentIds, LatentStates, Logits, NewestClosedPatch


class LocalDecoder(nn.Module):
    """Starts from the encoder's byte states; before every layer each byte reads the newest closed patch's latent."""

    def __init__(self, config: TransformerConfig, latent_width: int, slots_per_patch: int) -> None:
        super().__init__()
        self.slots_per_patch = slots_per_patch
        self.slot_proj = nn.Linear(latent_width, slots_per_patch * config.width, bias=False)
        self.cross_attentions = nn.ModuleList(
            DecoderCrossAttention(config.width, config.num_heads, config.norm_eps) for _ in range(config.num_layers)
        )
        self.transformer = Transformer(config)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, VOCAB_SIZE, bias=False)

    def forward(
        self,
        byte_states: ByteStates,
        latent_states: LatentStates,
        newest_closed: NewestClosedPatch,
        documents: DocumentIds,
    ) -> Logits:
        slots = self.slot_proj(latent_states).unflatten(-1, (self.slots_per_patch, -1))
        rotation, allowed = self.transformer.rotation_and_mask(documents)
        for cross_attention, layer in zip(self.cross_attentions, self.transformer.layers, strict=True):
            # twice the residual, as in the released weights
            byte_states = 2 * byte_states + cross_attention(byte_states, slots, newest_closed)
            byte_states = layer(byte_states, rotation, allowed)
        return self.head(self.norm(byte_states)).float()
