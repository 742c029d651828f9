"""The Byte Latent Transformer: bytes and patch starts -> next-byte logits (3).

It never computes entropies: where patches start is an input, so every stage can be tried with a few bytes.
"""

from torch import nn

from blt.byte_ids import document_ids
from blt.config import ModelConfig
from blt.model.latent_transformer import LatentTransformer, patch_documents, patch_positions
from blt.model.local_decoder import LocalDecoder
from blt.model.local_encoder import LocalEncoder
from blt.model.patching import first_patches, newest_closed_patch, patch_ids, room_for
from blt.shapes import ByteIds, Logits, PatchStarts


class ByteLatentTransformer(nn.Module):
    """Local encoder, latent transformer, local decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        slots = config.slots_per_patch
        self.local_encoder = LocalEncoder(config.local_encoder, config.hash_embeddings, slots)
        self.latent_transformer = LatentTransformer(config.latent, slots * config.local_encoder.width)
        self.local_decoder = LocalDecoder(config.local_decoder, config.latent.width, slots)

    def forward(self, byte_ids: ByteIds, patch_starts: PatchStarts) -> Logits:
        """Logits of id t + 1 at position t. ``patch_starts`` has one entry more than the row: the unknown next id's.

        Padding goes on the right. Raises ValueError where a row's first two ids do not both start a patch.
        """
        if not bool(patch_starts[:, :2].all()):
            raise ValueError("the first two ids of every row start a patch (BOS is a patch of its own)")
        documents, ids = document_ids(byte_ids), patch_ids(patch_starts)
        first = first_patches(ids)[:, None]
        held_by, read = (ids + first).flatten(), (newest_closed_patch(patch_starts) + first).flatten()
        num_patches = room_for(int(held_by[-1]) + 1)
        byte_states, patch_states = self.local_encoder(byte_ids, held_by, documents, num_patches)
        of_patches = patch_documents(byte_ids, held_by, num_patches), patch_positions(ids, held_by, num_patches)
        latent_states = self.latent_transformer(patch_states, *of_patches)
        return self.local_decoder(byte_states, latent_states, read, documents)
