"""Patch states -> latent states: the large transformer, which runs once per patch (3.1)."""

import torch
from torch import nn

from blt.byte_ids import EOS
from blt.config import TransformerConfig
from blt.model.kv_cache import Kept
from blt.model.linear import Linear
from blt.model.transformer import Transformer
from blt.shapes import ByteIds, DocumentIds, LatentStates, PatchIds, PatchStates


class LatentTransformer(nn.Module):
    """A projection where patch states have another width, then a causal stack over patches, without a final norm."""

    def __init__(self, config: TransformerConfig, patch_state_width: int) -> None:
        super().__init__()
        same_width = patch_state_width == config.width
        self.input_proj = nn.Identity() if same_width else Linear(patch_state_width, config.width)
        self.transformer = Transformer(config)

    def forward(self, patch_states: PatchStates, documents: DocumentIds) -> LatentStates:
        return self.transformer(self.input_proj(patch_states), documents)

    def extend(self, patch_states: PatchStates, kept: Kept) -> LatentStates:
        """``forward`` for newly closed patches."""
        return self.transformer.extend(self.input_proj(patch_states), kept)


def patch_documents(byte_ids: ByteIds, patch_ids: PatchIds) -> DocumentIds:
    """Which document each patch belongs to: a patch that holds an EOS is the last of its document.

    >>> patch_documents(torch.tensor([[1, 70, 2, 1, 71]]), torch.tensor([[0, 1, 1, 2, 3]])).tolist()
    [[0, 0, 1, 1]]
    """
    closes = torch.zeros(byte_ids.shape[0], int(patch_ids.max()) + 1, dtype=torch.long, device=byte_ids.device)
    closes = closes.scatter_reduce(1, patch_ids, (byte_ids == EOS).long(), "amax")
    return closes.cumsum(1) - closes
