"""Hashed n-grams against Python's unbounded integers, wrapped to int64 by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomise

from blt.byte_ids import VOCAB_SIZE
from blt.config import HashEmbeddingsConfig
from blt.model.hash_embeddings import PRIMES, FrequentNgrams, HashEmbeddings, table_rows

RELEASED_PRIMES = (  # of the released checkpoints, in their order
    *(1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899),
    *(9576890767, 3628273133, 2860486313, 5463458053, 3367900313),
)


def reference_row(ids: list[int], t: int, size: int, prime: int, rows: int) -> int:
    """The row of one table: the oldest id times prime^0, ids before the row are 0."""
    ngram = [ids[s] if s >= 0 else 0 for s in range(t - size + 1, t + 1)]
    unbounded = sum(byte_id * prime**j for j, byte_id in enumerate(ngram))
    int64 = (unbounded + 2**63) % 2**64 - 2**63
    return int64 % rows  # Python's % is the floor-mod: never negative


def test_the_primes_are_those_of_the_released_code() -> None:
    assert PRIMES == RELEASED_PRIMES


@settings(deadline=None, max_examples=100)
@given(
    ids=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
    ngram_bytes=st.permutations(range(1, 9)).flatmap(lambda sizes: st.integers(1, 8).map(lambda n: tuple(sizes[:n]))),
    num_functions=st.integers(1, 11),
    rows=st.sampled_from([1, 2, 10, 97, 4096, 500_002]),
)
def test_rows_are_hashes_in_wrapping_int64_by_function_then_size(
    ids: list[int], ngram_bytes: tuple[int, ...], num_functions: int, rows: int
) -> None:
    config = HashEmbeddingsConfig(ngram_bytes=ngram_bytes, num_functions=num_functions, table_rows=rows)
    tables = [(prime, size) for prime in RELEASED_PRIMES[:num_functions] for size in ngram_bytes]
    expected = [
        [table * rows + reference_row(ids, t, size, prime, rows) for table, (prime, size) in enumerate(tables)]
        for t in range(len(ids))
    ]
    assert table_rows(torch.tensor([ids]), config).tolist() == [expected]


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("function", range(11))
def test_every_prime_and_size_wraps_as_int64_does(function: int, size: int) -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(size,), num_functions=11, table_rows=500_002)
    ids = [259, 1, 0, 258, 259, 259, 2, 255, 254, 253, 259, 259]
    rows = table_rows(torch.tensor([ids]), config)[0, :, function] - function * 500_002
    assert rows.tolist() == [reference_row(ids, t, size, RELEASED_PRIMES[function], 500_002) for t in range(len(ids))]
    if size >= 4:  # where the released sizes leave the 63 bits
        assert 259 * RELEASED_PRIMES[function] ** (size - 1) > 2**63


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=12), data=st.data())
def test_an_ngram_that_reaches_before_the_row_reads_zeros_there(ids: list[int], data: st.DataObject) -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(3, 8), num_functions=2, table_rows=1000)
    zeros = data.draw(st.integers(1, 9))
    shifted = table_rows(torch.tensor([[0] * zeros + ids]), config)
    assert table_rows(torch.tensor([ids]), config).equal(shifted[:, zeros:])


def test_an_embedding_is_the_sum_of_its_rows() -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(3, 2, 5), num_functions=2, table_rows=13)
    embeddings = HashEmbeddings(config, width=4)
    randomise(embeddings, seed=0)
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = table_rows(ids, config)
    assert embeddings.tables.weight.shape == (6 * 13, 4)
    assert rows.shape == (2, 9, 6)
    expected = embeddings.tables.weight[rows].sum(2)
    torch.testing.assert_close(embeddings(ids), expected, atol=1e-6, rtol=0)


def test_every_table_row_that_is_read_gets_the_gradient_of_its_readers() -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(1, 2), table_rows=7)
    embeddings = HashEmbeddings(config, width=3)
    ids = torch.tensor([[5, 6, 5, 6]])
    embeddings(ids).sum().backward()
    reads = table_rows(ids, config).flatten().bincount(minlength=14)
    gradient = embeddings.tables.weight.grad
    assert gradient is not None
    assert gradient.is_sparse and gradient._values().shape == (
        int((reads > 0).sum()),
        3,
    )  # of what was read, and nothing else
    assert gradient.to_dense().equal(reads[:, None].expand(14, 3).float())


@settings(deadline=None, max_examples=50)
@given(
    learned=st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=5),
    read=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    min_count=st.integers(2, 4),
)
def test_an_ngram_that_was_met_too_seldom_reads_the_last_row(
    learned: list[list[int]], read: list[int], min_count: int
) -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(1, 3), num_functions=2, table_rows=10, min_count=min_count)
    counts, embeddings = FrequentNgrams(config), HashEmbeddings(config, width=1)
    for row in learned:
        counts.add(torch.tensor([row]))
    embeddings.frequent.copy_(counts.bits())

    def ngrams(ids: list[int], size: int) -> list[tuple[int, ...]]:
        padded = [0] * (size - 1) + ids
        return [tuple(padded[t : t + size]) for t in range(len(ids))]

    tables = [(prime, size) for prime in RELEASED_PRIMES[:2] for size in (1, 3)]
    for table, (prime, size) in enumerate(tables):
        met = Counter(ngram for row in learned for ngram in ngrams(row, size))
        own = [reference_row(read, t, size, prime, 9) for t in range(len(read))]
        expected = [row if met[of] >= min_count else 9 for row, of in zip(own, ngrams(read, size), strict=True)]
        found = embeddings.rows(torch.tensor([read]))[0, :, table]
        assert (found - 10 * table).tolist() == expected


def test_counts_end_at_255_and_rows_are_counted_wherever_they_are_cut() -> None:
    config = HashEmbeddingsConfig(ngram_bytes=(2,), table_rows=10, min_count=255)
    together, singly = FrequentNgrams(config), FrequentNgrams(config)
    rows = torch.full((700, 300), 70)  # more ids than are counted at a time
    together.add(rows)
    for row in rows:
        singly.add(row[None])
    assert (together.counts == singly.counts).all() and together.counts.max() == 255
    assert together.bits().count_nonzero() == 2  # of 70 70 and, where rows begin, 0 70
