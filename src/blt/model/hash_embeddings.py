"""Bytes -> embeddings of the hashed n-grams that end at each byte (3.2.1, eq. 3-5)."""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
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

    With a ``min_count`` (not in the paper) only n-grams that training text has as often read a row of their own hash. All
    others read their table's last row, so that what was never learned is not mistaken for something that was.
    """

    frequent: UInt8[Tensor, "table byte"]  # bits; with min_count only

    def __init__(self, config: HashEmbeddingsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.Embedding(config.num_tables * config.table_rows, width)
        if config.min_count > 1:
            self.register_buffer(
                "frequent", torch.zeros(config.num_tables, 2**config.filter_bits // 8, dtype=torch.uint8)
            )

    def forward(self, byte_ids: ByteIds) -> ByteStates:
        return self.look_up(self.rows(byte_ids))

    def rows(self, byte_ids: ByteIds) -> TableRows:
        """The rows of the stacked tables that each byte's n-grams select: ``table_rows``, the last of a table for rare ones."""
        if self.config.min_count == 1:
            return table_rows(byte_ids, self.config)
        hashes, first_row = _hashes_and_first_rows(byte_ids, self.config)
        last, bits = self.config.table_rows - 1, filter_places(hashes, self.config)
        table = torch.arange(self.config.num_tables, device=byte_ids.device)
        frequent = (self.frequent[table, bits >> 3] >> (bits & 7)) & 1
        return torch.where(frequent.bool(), hashes.remainder(last), last) + first_row

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
    hashes, first_row = _hashes_and_first_rows(byte_ids, config)
    return hashes.remainder(config.table_rows) + first_row


class FrequentNgrams:
    """Counts each table's n-grams in training text, by their places in the filter, up to 255."""

    def __init__(self, config: HashEmbeddingsConfig) -> None:
        self.config = config
        self.counts = np.zeros((config.num_tables, 2**config.filter_bits), np.uint8)

    def add(self, byte_ids: ByteIds) -> None:
        """Count what rows of ids will look up, a hundred thousand ids at a time to keep memory small."""
        for some in byte_ids.split(max(1, 2**17 // byte_ids.shape[1])):
            places = filter_places(_hashes_and_first_rows(some, self.config)[0], self.config)
            for counts, of_table in zip(self.counts, places.flatten(0, 1).T, strict=True):
                found, times = np.unique(of_table.numpy(), return_counts=True)
                counts[found] = np.minimum(counts[found] + times, 255)

    def bits(self) -> UInt8[Tensor, "table byte"]:
        """A bit for each place: whether what stands there was met ``min_count`` times."""
        return torch.from_numpy(np.packbits(self.counts >= self.config.min_count, axis=1, bitorder="little"))


def filter_places(
    hashes: Int[Tensor, "batch byte table"], config: HashEmbeddingsConfig
) -> Int[Tensor, "batch byte table"]:
    """Where n-grams have their bit, by other bits of their hash than those that choose the row."""
    mixed = (hashes ^ (hashes >> 31)) * 0x5851F42D4C957F2D
    return (mixed >> 17) & (2**config.filter_bits - 1)


def _hashes_and_first_rows(
    byte_ids: ByteIds, config: HashEmbeddingsConfig
) -> tuple[Int[Tensor, "batch byte table"], Int[Tensor, " table"]]:
    powers, first_row = _powers_and_first_rows(config, byte_ids.device)
    longest = len(powers)
    windows = F.pad(byte_ids.long(), (longest - 1, 0)).unfold(1, longest, 1)
    return (windows[..., None] * powers).sum(2), first_row


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
