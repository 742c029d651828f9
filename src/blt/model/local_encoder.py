"""Bytes and patches -> byte states and patch states (3.2)."""

from torch import nn

from blt.byte_ids import VOCAB_SIZE
from blt.config import HashEmbeddingsConfig, TransformerConfig
from blt.model.attention import EncoderCrossAttention
from blt.model.hash_embeddings import HashEmbeddings
from blt.model.transformer import Transformer
from blt.shapes import ByteIds, ByteStates, DocumentIds, PatchIds, PatchStates


class LocalEncoder(nn.Module):
    """Byte and n-gram embeddings, a light transformer over bytes, then each patch gathers its own bytes.

    A patch starts as the element-wise maximum of its bytes' states, projected to ``slots_per_patch`` queries; they
    attend to the patch's bytes, and side by side they are the patch state.
    """

    def __init__(self, config: TransformerConfig, hash_embeddings: HashEmbeddingsConfig, slots_per_patch: int) -> None:
        super().__init__()
        self.slots_per_patch = slots_per_patch
        self.byte_embedding = nn.Embedding(VOCAB_SIZE, config.width)
        self.hash_embeddings = HashEmbeddings(hash_embeddings, config.width)
        self.transformer = Transformer(config)
        self.slot_proj = nn.Linear(config.width, slots_per_patch * config.width, bias=False)
        self.cross_attention = EncoderCrossAttention(config.width, config.num_heads, config.norm_eps)

    def forward(self, byte_ids: ByteIds, patch_ids: PatchIds, documents: DocumentIds) -> tuple[ByteStates, PatchStates]:
        byte_states = self.byte_embedding(byte_ids) + self.hash_embeddings(byte_ids)
        byte_states = self.transformer(byte_states, documents)
        slots = self.slot_proj(max_over_patches(byte_states, patch_ids)).unflatten(-1, (self.slots_per_patch, -1))
        # twice the residual, as in the released weights: slots + (slots + attention)
        slots = 2 * slots + self.cross_attention(slots, byte_states, patch_ids)
        return byte_states, slots.flatten(2)


def max_over_patches(byte_states: ByteStates, patch_ids: PatchIds) -> PatchStates:
    """The element-wise maximum over each patch's bytes; 0 for the empty patches beyond a row's last.

    >>> import torch
    >>> states = torch.tensor([[[1.0, 0.0], [2.0, -3.0], [0.5, -1.0]]])
    >>> max_over_patches(states, torch.tensor([[0, 1, 1]])).tolist()
    [[[1.0, 0.0], [2.0, -1.0]]]
    """
    batch, _, width = byte_states.shape
    pooled = byte_states.new_zeros(batch, int(patch_ids.max()) + 1, width)
    index = patch_ids[..., None].expand_as(byte_states)
    return pooled.scatter_reduce(1, index, byte_states, "amax", include_self=False)
