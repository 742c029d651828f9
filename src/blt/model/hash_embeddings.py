"""Bytes -> embeddings of the hashed n-grams that end at each byte (3.2.1, eq. 3-5)."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from blt.config import HashEmbeddingsConfig
from blt.shapes import ByteIds, ByteStates

# One per hash function, in the order of the released code.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


class HashEmbeddings(nn.Module):
    """One table per hash function and n-gram size, kept as one matrix in that order; a byte gets the sum of its rows.

    The sum is not divided by the number of tables, as in the released weights (the paper's eq. 5 divides).
    """

    def __init__(self, config: HashEmbeddingsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.Embedding(config.num_tables * config.table_rows, width)

    def forward(self, byte_ids: ByteIds) -> ByteStates:
        rows = table_rows(byte_ids, self.config)
        return F.embedding_bag(rows.flatten(0, 1), self.tables.weight, mode="sum").unflatten(0, byte_ids.shape)


def table_rows(byte_ids: ByteIds, config: HashEmbeddingsConfig) -> Int[Tensor, "batch byte table"]:
    """The rows of the stacked tables that each byte's n-grams select.

    The hash of the g ids that end at t is the sum of id[t-g+1+j] * prime^j over j in 0..g-1, in wrapping int64; ids
    before the row are 0. Built by Horner's rule: one id longer is ``id[t-g] + prime * hash``.

    >>> config = HashEmbeddingsConfig(ngram_bytes=(1, 2), table_rows=10)
    >>> table_rows(torch.tensor([[7, 5]]), config).tolist()  # 7, 0 + 7p; 5, 7 + 5p; p = 1000000007
    [[[7, 19], [5, 12]]]
    """
    byte_ids = byte_ids.long()  # the hash wraps at 64 bits
    rows = []
    for prime in PRIMES[: config.num_functions]:
        hashes = {1: byte_ids}
        for size in range(2, max(config.ngram_bytes) + 1):
            before = F.pad(byte_ids, (size - 1, 0))[:, : byte_ids.shape[1]]
            hashes[size] = before + prime * hashes[size - 1]
        rows += [hashes[size].remainder(config.table_rows) for size in config.ngram_bytes]
    first_row = torch.arange(config.num_tables, device=byte_ids.device) * config.table_rows
    return torch.stack(rows, dim=-1) + first_row
