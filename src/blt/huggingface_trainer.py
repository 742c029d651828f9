"""The network as ``transformers.Trainer`` wants a model: ids and labels in, a loss out."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from blt.language_model import LanguageModel
from blt.shapes import ByteIds

NO_TARGET = -100  # transformers' label of what is not learned


class TrainerModel(nn.Module):
    """A language model's network, which is trained in place: afterwards ``lm.save`` writes what it has become.

    The entropy model, frozen, says where patches start; it is no part of this module, so that no optimiser and no adapter gets
    hold of it. Gradients of hash tables are dense here, as stock optimisers and clipping want them: with large tables,
    ``blt train`` is many times faster.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.lm, self.network = lm, lm.network
        lm.card = replace(lm.card, training=None, figures=())  # what it says of these weights will no longer be true
        lm.network.local_encoder.hash_embeddings.tables.weight.register_post_accumulate_grad_hook(_make_dense)

    def forward(
        self,
        input_ids: ByteIds,
        labels: Int[Tensor, "batch byte"] | None = None,
        attention_mask: Int[Tensor, "batch byte"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """``logits`` (entry t predicts id t + 1) and, with ``labels`` (of each id, -100 where it is not learned), ``loss``: the
        mean nats of the labels that are predicted here, or their sum over ``num_items_in_batch``.

        Rows begin with BOS and are padded on the right, with any id. Raises ValueError where they are padded on the left.
        """
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError(
                "rows are padded on the left; pad them on the right, positions count from a row's beginning"
            )
        self.lm.to(input_ids.device)
        with torch.no_grad():
            starts = self.lm.patch_starts(input_ids)
        logits = self.network(input_ids, starts)
        if labels is None:
            return {"logits": logits}
        targets = labels[:, 1:].flatten()
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=NO_TARGET, reduction="sum")
        if num_items_in_batch is None:
            num_items_in_batch = (targets != NO_TARGET).sum().clamp(min=1)
        return {"loss": nats / num_items_in_batch, "logits": logits}


def _make_dense(table: Tensor) -> None:
    assert table.grad is not None
    table.grad = table.grad.to_dense() if table.grad.is_sparse else table.grad
