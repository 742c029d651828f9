"""Attention tile by tile against the full square of scores, in values and in gradients; FlexAttention's mask too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from blt.model.causal_attention import attend, block_mask, oldest_read, positions_in_reach, tiles


def may_attend(documents: Tensor, window: int | None) -> Tensor:
    """By its definition, ``[batch, query, key]``: of the same document, not after the query, within the window."""
    index = torch.arange(documents.shape[1])
    distance = index[:, None] - index
    near = (distance >= 0) & (distance < (window or len(index)))
    return near & (documents[:, :, None] == documents[:, None, :])


def naive(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor, window: int | None) -> Tensor:
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    return scores.masked_fill(~may_attend(documents, window)[:, None], -math.inf).softmax(-1) @ values


def random_heads(batch: int, heads: int, positions: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and a gradient, laid out as the projections lay them out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, positions, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(4)]


def documents_of(*lengths_of_row: list[int]) -> Tensor:
    """Rows of documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths_of_row])


def assert_same_as_naive(documents: Tensor, window: int | None, heads: int = 2, head_dim: int = 8) -> None:
    *inputs, direction = random_heads(len(documents), heads, documents.shape[1], head_dim)
    for part in inputs:
        part.requires_grad_()
    found = attend(*inputs, positions_in_reach(documents, window))
    expected = naive(*inputs, documents, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(found, inputs, direction)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [1, 100, 512, 5000, None])
@pytest.mark.parametrize("positions", [1, 127, 128, 129, 1000])
def test_tiles_give_the_numbers_and_gradients_of_the_full_square(positions: int, window: int | None) -> None:
    assert_same_as_naive(torch.zeros(2, positions, dtype=torch.long), window)


@pytest.mark.parametrize("window", [512, None])
def test_so_they_do_on_rows_of_4096(window: int | None) -> None:
    assert_same_as_naive(torch.zeros(1, 4096, dtype=torch.long), window, heads=1)
    assert_same_as_naive(documents_of([1, 700, 2, 2000, 1393]), window, heads=1)


@pytest.mark.parametrize("window", [30, 200, None])
def test_so_they_do_in_batches_of_rows_with_different_documents(window: int | None) -> None:
    assert_same_as_naive(documents_of([600], [1, 1, 98, 500], [300, 300], [599, 1], [150] * 4), window)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    others=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 12),
)
def test_a_tile_forbids_just_what_no_query_may_read(lengths: list[int], others: list[int], window: int | None) -> None:
    positions = min(sum(lengths), sum(others))
    documents = torch.stack([documents_of(row)[0, :positions] for row in (lengths, others)])
    read = torch.zeros(2, positions, positions, dtype=torch.bool)
    for tile in tiles(oldest_read(documents, window), window):
        for one in range(tile.num_tiles):
            begin, first = (start + one * tile.num_queries for start in (tile.queries.start, tile.first_key))
            square = read[:, begin : begin + tile.num_queries, first : first + tile.num_keys]
            square[:] = True
            for edge in tile.edges:
                square[..., edge.keys] &= edge.bias[:, min(one, edge.bias.shape[1] - 1)] == 0
    assert torch.equal(read, may_attend(documents, window))


def scores_worked_out(documents: Tensor, window: int | None) -> int:
    found = tiles(oldest_read(documents, window), window)
    return sum(tile.num_tiles * tile.num_queries * tile.num_keys for tile in found)


def test_the_work_grows_with_the_row_not_with_its_square() -> None:
    rows = {positions: torch.zeros(1, positions, dtype=torch.long) for positions in (4096, 32_768)}
    work = {positions: scores_worked_out(row, 512) / positions for positions, row in rows.items()}
    assert work[32_768] < 1.1 * work[4096]
    assert work[32_768] < 1.3 * 512
    found = tiles(oldest_read(rows[32_768], 512), 512)
    assert len({id(edge.bias) for tile in found for edge in tile.edges}) <= 10  # and the masks do not grow at all


def test_documents_of_a_long_row_cost_what_they_would_alone() -> None:
    alone = scores_worked_out(documents_of([512]), None)
    assert scores_worked_out(documents_of([512] * 16), None) == 16 * alone


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [100, None])
def test_the_mask_for_flex_attention_says_the_same(window: int | None) -> None:
    """Its kernels run on CUDA only; what they compute is defined by this mask, which runs anywhere."""
    documents = documents_of([300], [1, 1, 98, 200])
    queries, keys, values, _ = random_heads(2, 2, 300, 16)
    read = flex_attention(queries, keys, values, block_mask=block_mask(oldest_read(documents, window)))
    torch.testing.assert_close(read, naive(queries, keys, values, documents, window), atol=1e-5, rtol=0)


def test_under_autocast_it_computes_in_bf16_and_stays_close() -> None:
    documents = documents_of([300], [100, 200])
    *inputs, direction = random_heads(2, 2, 300, 16)
    for part in inputs:
        part.requires_grad_()
    expected = naive(*inputs, documents, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*inputs, positions_in_reach(documents, 64))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)
    gradients = torch.autograd.grad(found, inputs, direction.bfloat16())
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=0.05, rtol=0)


def test_ragged_documents_have_few_shapes_of_tiles() -> None:
    """The first product of every new shape is slow, and is remembered in half a megabyte."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(100):
        lengths = torch.randint(50, 200, (10,), generator=generator).tolist()
        documents = documents_of([*lengths, 2048 - sum(lengths)])[:, :1024]
        shapes |= {(tile.num_queries, tile.num_keys) for tile in tiles(oldest_read(documents, None), None)}
    assert len(shapes) <= 16
