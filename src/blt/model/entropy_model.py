"""Bytes -> entropies: a small causal byte transformer says how hard each next byte is (2.3, 4.2)."""

import torch
import torch.nn.functional as F
from torch import nn

from blt.byte_ids import NEWLINE, VOCAB_SIZE, document_ids
from blt.config import EntropyModelConfig
from blt.model.attention import States
from blt.model.kv_cache import Kept
from blt.model.linear import Linear
from blt.model.norm import RMSNorm
from blt.model.transformer import Transformer
from blt.shapes import ByteIds, DocumentIds, Entropies, EntropyLogits


class EntropyModel(nn.Module):
    """Embedding, windowed transformer, norm, untied head."""

    def __init__(self, config: EntropyModelConfig) -> None:
        super().__init__()
        self.config = config
        self.byte_embedding = nn.Embedding(VOCAB_SIZE, config.width)
        self.transformer = Transformer(config)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = Linear(config.width, VOCAB_SIZE)

    def forward(self, byte_ids: ByteIds) -> EntropyLogits:
        contexts = entropy_contexts(byte_ids, self.config.reset_at_newline)
        return self.predict(self.transformer(self.byte_embedding(byte_ids), contexts))

    def extend(self, byte_ids: ByteIds, kept: Kept) -> EntropyLogits:
        """``forward`` for new ids of rows whose earlier ones are in the cache."""
        states = self.transformer.extend(self.byte_embedding(byte_ids), kept)
        return self.predict(states)

    def predict(self, states: States) -> EntropyLogits:
        """Logits, from the last layer's states."""
        return self.head(self.norm(states))

    @torch.no_grad()
    def entropies(self, byte_ids: ByteIds) -> Entropies:
        """Entropy of each id given the ids before it, in nats over all 260 ids; entry 0 is nan, the last is about the
        unknown next id. Always fp32: in bf16 a prefix and its whole row disagree about patches now and then.
        """
        with torch.autocast(byte_ids.device.type, enabled=False):
            return entropies_of(self(byte_ids))


def entropies_of(logits: EntropyLogits) -> Entropies:
    """The entropies of a model's predictions, shifted to the ids they are about; entry 0 is nan."""
    log_probabilities = logits.float().log_softmax(-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return F.pad(entropies, (1, 0), value=float("nan"))


def entropy_contexts(byte_ids: ByteIds, reset_at_newline: bool) -> DocumentIds:
    """The stretch of ids each position's entropy may look back on: its document, or with the reset its line.

    A newline opens its line, as BOS opens a document, so that a line's first byte is predicted from the newline alone.

    >>> entropy_contexts(torch.tensor([[1, 70, 14, 71, 2, 1]]), reset_at_newline=True).tolist()
    [[0, 0, 1, 1, 1, 2]]
    """
    contexts = document_ids(byte_ids)
    if reset_at_newline:
        contexts = contexts + (byte_ids == NEWLINE).long().cumsum(1)
    return contexts
