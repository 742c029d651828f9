"""Patch states -> latent states: the large transformer, which runs once per patch (3.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blt.byte_ids import EOS
from blt.config import TransformerConfig
from blt.model.kv_cache import Kept
from blt.model.linear import Linear
from blt.model.transformer import Transformer
from blt.shapes import ByteIds, DocumentIds, LatentStates, PatchIds, PatchPositions, PatchStates, Segments


class LatentTransformer(nn.Module):
    """A projection where patch states have another width, then a causal stack over patches, without a final norm."""

    def __init__(self, config: TransformerConfig, patch_state_width: int) -> None:
        super().__init__()
        same_width = patch_state_width == config.width
        self.input_proj = nn.Identity() if same_width else Linear(patch_state_width, config.width)
        self.transformer = Transformer(config)

    def forward(self, patch_states: PatchStates, documents: DocumentIds, positions: PatchPositions) -> LatentStates:
        """The patches of all rows one after another, as one row of documents: no patch is padding."""
        return self.transformer(self.input_proj(patch_states)[None], documents, positions)[0]

    def extend(
        self, patch_states: Float[Tensor, "row new slots_dim"], kept: Kept
    ) -> Float[Tensor, "row new latent_dim"]:
        """``forward`` for newly closed patches."""
        return self.transformer.extend(self.input_proj(patch_states), kept)


def patch_documents(byte_ids: ByteIds, segments: Segments, num_patches: int) -> Int[Tensor, "1 patch"]:
    """Which document each patch belongs to, all rows in one: a patch that holds an EOS, or a row's end, is the last of its own.

    >>> rows, segments = torch.tensor([[1, 70, 2, 1, 71], [1, 70, 70, 70, 70]]), torch.tensor([0, 1, 1, 2, 3, 4, 5, 5, 5, 5])
    >>> patch_documents(rows, segments, 7).tolist()
    [[0, 0, 1, 1, 2, 2, 3]]
    """
    is_last = byte_ids == EOS
    is_last[:, -1] = True
    closes = torch.zeros(num_patches, dtype=torch.long, device=byte_ids.device)
    closes = closes.scatter_reduce(0, segments, is_last.flatten().long(), "amax")
    return (closes.cumsum(0) - closes)[None]


def patch_positions(ids: PatchIds, segments: Segments, num_patches: int) -> PatchPositions:
    """Which patch of its row each is, all rows one after another.

    >>> patch_positions(torch.tensor([[0, 1, 1], [0, 1, 2]]), torch.tensor([0, 1, 1, 2, 3, 4]), 6).tolist()
    [0, 1, 0, 1, 2, 5]
    """
    positions = torch.arange(num_patches, device=ids.device)
    return positions.scatter(0, segments, ids.flatten())
