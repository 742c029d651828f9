"""Latent states and byte states -> next-byte logits (3.3)."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from blt.byte_ids import VOCAB_SIZE
from blt.config import TransformerConfig
from blt.model.attention import DecoderCrossAttention
from blt.model.kv_cache import Kept
from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.transformer import Transformer
from blt.shapes import ByteStates, DocumentIds, LatentStates, Logits, Segments

SlotHeads = Float[Tensor, "patch slot head head_dim"]
LayerSlots = list[tuple[SlotHeads, SlotHeads]]  # of each layer: keys and values of the patches' slots


class LocalDecoder(nn.Module):
    """Starts from the encoder's byte states; before every layer each byte reads the newest closed patch's latent."""

    def __init__(self, config: TransformerConfig, latent_width: int, slots_per_patch: int) -> None:
        super().__init__()
        self.slots_per_patch = slots_per_patch
        self.slot_proj = Linear(latent_width, slots_per_patch * config.width)
        self.cross_attentions = nn.ModuleList(
            DecoderCrossAttention(config.width, config.num_heads, config.norm_eps) for _ in range(config.num_layers)
        )
        self.transformer = Transformer(config)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, VOCAB_SIZE)

    def forward(
        self,
        byte_states: ByteStates,
        latent_states: LatentStates,
        read: Segments,
        documents: DocumentIds,
    ) -> Logits:
        """``read``: the newest closed patch of each byte."""
        slots = self.slot_keys_values(latent_states)
        rotation, reach = self.transformer.rotation_and_reach(documents)
        for layer, block in enumerate(self.transformer.blocks):
            byte_states = self.crosses[layer].read_patches(byte_states, *slots[layer], read)
            byte_states = self.transformer.run_block(block, byte_states, rotation, reach)
        return self.predict(byte_states)

    def extend(self, byte_states: ByteStates, slots_of_byte: LayerSlots, kept: Kept) -> Logits:
        """``forward`` for new bytes; each comes with the slots of its own newest closed patch, all rows flattened."""
        for layer, block in enumerate(self.transformer.blocks):
            byte_states = self.crosses[layer].read_patches(byte_states, *slots_of_byte[layer])
            byte_states = block.extend(byte_states, layer, kept)
        return self.predict(byte_states)

    def slot_keys_values(self, latent_states: LatentStates) -> LayerSlots:
        """What bytes will read of these patches in each layer."""
        slots = self.slot_proj(latent_states).unflatten(-1, (self.slots_per_patch, -1))
        return [cross_attention.keys_values(slots) for cross_attention in self.crosses]

    def predict(self, byte_states: ByteStates) -> Logits:
        """Logits, from the last layer's states."""
        return self.head(self.norm(byte_states)).float()

    @property
    def crosses(self) -> list[DecoderCrossAttention]:
        """The cross-attentions, as what they are."""
        return cast("list[DecoderCrossAttention]", list(self.cross_attentions))
