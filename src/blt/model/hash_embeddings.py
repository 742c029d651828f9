"""Bytes -> embeddings of the hashed n-grams that end at each byte (3.2.1, eq. 3-5)."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from blt.config import HashEmbeddingsConfig
from blt.shapes import ByteIds, ByteStates

TableRows = Int[Tensor, "batch byte table"]

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
        return self.look_up(table_rows(byte_ids, self.config))

    def look_up(self, rows: TableRows) -> ByteStates:
        """The sum of these rows for each byte. The tables' gradient is sparse: it holds these rows and no others.

        Outside of training it is formed in fp32 whatever the tables are in, so that narrow tables give what wide ones would.
        """
        table = self.tables.weight
        sums = _SummedRows.apply(table, rows.flatten(0, 1), not self.training and table.dtype != torch.float32)
        return sums.unflatten(0, rows.shape[:2])


class _SummedRows(torch.autograd.Function):
    """Each bag's sum of a table's rows. Backward, a row's sum is formed at once, and not first a gradient for each reading."""

    @staticmethod
    def forward(
        ctx: Any, table: Float[Tensor, "row width"], bags: Int[Tensor, "bag size"], in_fp32: bool
    ) -> Float[Tensor, "bag width"]:
        ctx.save_for_backward(bags)
        ctx.shape = table.shape
        if in_fp32:  # one table after the other, so that no more than the sum is as large as the row of bytes
            sums = F.embedding(bags[:, 0], table).float()
            for column in bags[:, 1:].unbind(1):
                sums += F.embedding(column, table)
            return sums
        return F.embedding_bag(bags, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "bag width"]) -> tuple[Tensor, None, None]:
        (bags,) = ctx.saved_tensors
        return sums_by_row(bags, gradients[0], ctx.shape), None, None


def sums_by_row(
    rows: Int[Tensor, "value reading"], values: Float[Tensor, "value width"], shape: tuple[int, ...]
) -> Float[Tensor, "row width"]:
    """A row-sparse matrix: at each row the sum of the values that name it, in their order. Faster than torch's own.

    >>> found = sums_by_row(torch.tensor([[5, 2], [5, 7]]), torch.tensor([[1.0, 1.0], [0.5, 0.0]]), (9, 2))
    >>> found.indices().tolist(), found.values().tolist()
    ([[2, 5, 7]], [[1.0, 1.0], [1.5, 1.0], [0.5, 0.0]])
    """
    ordered = rows.flatten().sort(stable=True)
    found, counts = ordered.values.unique_consecutive(return_counts=True)
    first = F.pad(counts.cumsum(0), (1, 0))[: len(found)]
    readings = ordered.indices.div(rows.shape[1], rounding_mode="floor")
    sums = F.embedding_bag(readings, values, first, mode="sum") if len(found) else values[:0]
    return torch.sparse_coo_tensor(found[None], sums, shape, is_coalesced=True, check_invariants=False)


def table_rows(byte_ids: ByteIds, config: HashEmbeddingsConfig) -> TableRows:
    """The rows of the stacked tables that each byte's n-grams select.

    The hash of the g ids that end at t is the sum of id[t-g+1+j] * prime^j over j in 0..g-1, in wrapping int64; ids
    before the row are 0.

    >>> config = HashEmbeddingsConfig(ngram_bytes=(1, 2), table_rows=10)
    >>> table_rows(torch.tensor([[7, 5]]), config).tolist()  # 7, 0 + 7p; 5, 7 + 5p; p = 1000000007
    [[[7, 19], [5, 12]]]
    """
    powers, first_row = _powers_and_first_rows(config, byte_ids.device)
    longest = len(powers)
    windows = F.pad(byte_ids.long(), (longest - 1, 0)).unfold(1, longest, 1)
    hashes = (windows[..., None] * powers).sum(2)
    return hashes.remainder(config.table_rows) + first_row


@functools.cache
def _powers_and_first_rows(
    config: HashEmbeddingsConfig, device: torch.device
) -> tuple[Int[Tensor, "place table"], Int[Tensor, " table"]]:
    """What each id of the longest n-gram is multiplied with for each table (0: not in it), and where tables begin."""
    longest = max(config.ngram_bytes)
    columns = [
        [0] * (longest - size) + [_wrap(prime**place) for place in range(size)]
        for prime in PRIMES[: config.num_functions]
        for size in config.ngram_bytes
    ]
    first_row = torch.arange(config.num_tables, device=device) * config.table_rows
    return torch.tensor(columns, device=device).T.contiguous(), first_row


def _wrap(number: int) -> int:
    """The signed 64-bit integer that this number is modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
