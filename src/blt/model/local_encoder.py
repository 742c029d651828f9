"""Bytes and patches -> byte states and patch states (3.2)."""

from jaxtyping import Float
from torch import Tensor, nn

from blt.byte_ids import VOCAB_SIZE
from blt.config import HashEmbeddingsConfig, TransformerConfig
from blt.model.attention import EncoderCrossAttention
from blt.model.hash_embeddings import HashEmbeddings, TableRows
from blt.model.kv_cache import Kept
from blt.model.linear import Linear, product_dtype
from blt.model.transformer import Transformer
from blt.shapes import ByteIds, ByteStates, DocumentIds, PatchStates, Segments


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
        self.slot_proj = Linear(config.width, slots_per_patch * config.width)
        self.cross_attention = EncoderCrossAttention(config.width, config.num_heads, config.norm_eps)

    def forward(
        self, byte_ids: ByteIds, segments: Segments, documents: DocumentIds, num_patches: int
    ) -> tuple[ByteStates, PatchStates]:
        embedded = self._embedded(byte_ids, self.hash_embeddings(byte_ids))
        # with bf16 products all states are in bf16, as half the memory takes half the time; norms are in fp32 inside
        byte_states = self.transformer(embedded.to(product_dtype(embedded)), documents)
        return byte_states, self.gather_patches(byte_states.flatten(0, 1), segments, num_patches)

    def extend(self, byte_ids: ByteIds, rows: TableRows, kept: Kept) -> ByteStates:
        """States of new bytes of rows whose earlier ones are in the cache; ``rows``: what their n-grams select."""
        return self.transformer.extend(self._embedded(byte_ids, self.hash_embeddings.look_up(rows)), kept)

    def _embedded(self, byte_ids: ByteIds, ngrams: ByteStates) -> ByteStates:
        """Bytes and n-grams, as wide as the bytes' embeddings: a sum of narrow tables' rows may come in fp32."""
        embedded = self.byte_embedding(byte_ids) + ngrams
        return embedded.to(self.byte_embedding.weight.dtype)

    def gather_patches(
        self, byte_states: Float[Tensor, "flat_byte byte_dim"], segments: Segments, num_patches: int
    ) -> PatchStates:
        """One state per patch, from the states of its bytes."""
        slots = self.slot_proj(max_over_patches(byte_states, segments, num_patches))
        slots = slots.unflatten(-1, (self.slots_per_patch, -1))
        # twice the residual, as in the released weights: slots + (slots + attention)
        return (2 * slots + self.cross_attention(slots, byte_states, segments)).flatten(1)


def max_over_patches(
    byte_states: Float[Tensor, "flat_byte byte_dim"], segments: Segments, num_patches: int
) -> Float[Tensor, "patch byte_dim"]:
    """The element-wise maximum over each patch's bytes; 0 for a patch without any.

    >>> import torch
    >>> states = torch.tensor([[1.0, 0.0], [2.0, -3.0], [0.5, -1.0]])
    >>> max_over_patches(states, torch.tensor([0, 1, 1]), 2).tolist()
    [[1.0, 0.0], [2.0, -1.0]]
    """
    pooled = byte_states.new_zeros(num_patches, byte_states.shape[1])
    index = segments[:, None].expand_as(byte_states)
    return pooled.scatter_reduce(0, index, byte_states, "amax", include_self=False)
