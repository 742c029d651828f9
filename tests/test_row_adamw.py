"""The row-sparse update against torch's AdamW, row by row; clipping; what it keeps and what it touches."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from blt.row_adamw import RowAdamW, clip_gradients, coalesced, round_at_random

WIDTH = 3
SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.05}


def table_of(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype))


def by_row(*tables: nn.Parameter) -> RowAdamW:
    return RowAdamW([{"params": list(tables), "by_row": True}], fused=True, **SETTINGS)


def sparse(rows: list[int], values: Tensor, num_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (num_rows, WIDTH), check_invariants=True)


def random_steps(count: int, num_rows: int, seed: int) -> list[Tensor]:
    """Row-sparse gradients; some rows stand twice in one of them, and some in none."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(count):
        rows = torch.randint(0, num_rows - 1, (5,), generator=generator).tolist()
        steps.append(sparse(rows, torch.randn(5, WIDTH, generator=generator), num_rows))
    return steps


@pytest.mark.parametrize("gap", [1, 2, 7])
def test_a_row_read_every_few_steps_is_where_dense_adamw_has_it_whenever_it_is_read(gap: int) -> None:
    table, dense = table_of(3), table_of(3)
    settings = SETTINGS | {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.0}
    optimizer = RowAdamW([{"params": [table], "by_row": True}], fused=True, **settings)
    oracle = torch.optim.AdamW([dense], **settings)
    generator = torch.Generator().manual_seed(1)
    distances = []
    for step in range(70 * gap):
        if step % gap == 0:
            distances.append(float((table - dense).detach().abs().max()))
        values = torch.randn(1, WIDTH, generator=generator) if step % gap == 0 else torch.zeros(0, WIDTH)
        table.grad = sparse([1] if step % gap == 0 else [], values, 3)
        dense.grad = table.grad.to_dense()
        optimizer.step()
        oracle.step()
    moved = float((dense - table_of(3)).detach()[1].abs().max())
    assert max(distances) < 0.1 * moved  # at the beginning: the first gap is not the next, and estimates are biased
    late = [abs(here - before) for before, here in pairwise(distances[40:])]
    assert max(late) < 1e-5  # from then on both move by the same
    assert table[0].equal(table_of(3)[0])  # never read: as it was to the bit


def test_where_every_step_reads_every_row_it_is_torchs_adamw() -> None:
    table, dense = table_of(4), table_of(4)
    optimizer, oracle = by_row(table), torch.optim.AdamW([dense], **SETTINGS)
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        gradient = torch.randn(4, WIDTH, generator=generator)
        table.grad, dense.grad = sparse([0, 1, 2, 3], gradient, 4), gradient.clone()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(table, dense, atol=1e-6, rtol=0)


def test_other_parameters_get_torchs_update_and_gradients_stay_where_they_are() -> None:
    table, matrix, dense = table_of(5), table_of(3, seed=4), table_of(3, seed=4)
    optimizer = RowAdamW([{"params": [matrix]}, {"params": [table], "by_row": True}], fused=True, **SETTINGS)
    oracle = torch.optim.AdamW([dense], fused=True, **SETTINGS)
    table.grad, matrix.grad, dense.grad = random_steps(1, 5, seed=0)[0], torch.ones(3, WIDTH), torch.ones(3, WIDTH)
    optimizer.step()
    oracle.step()
    assert matrix.equal(dense)
    assert table.grad is not None and matrix.grad is not None
    optimizer.zero_grad(set_to_none=True)
    assert table.grad is None and matrix.grad is None


def test_a_dense_gradient_counts_where_it_is_not_zero() -> None:
    table, other = table_of(4), table_of(4)
    table.grad, other.grad = torch.zeros(4, WIDTH), sparse([2], torch.ones(1, WIDTH), 4)
    table.grad[2] = 1.0
    for parameter in (table, other):
        by_row(parameter).step()
    assert table.equal(other)


def test_clipping_scales_sparse_and_dense_together_by_their_common_norm() -> None:
    table, matrix, step = table_of(7), table_of(2), random_steps(1, 7, seed=3)[0]
    dense_table, dense_matrix = table_of(7), table_of(2)
    table.grad, matrix.grad = step.clone(), torch.full((2, WIDTH), 2.0)
    dense_table.grad, dense_matrix.grad = step.to_dense(), torch.full((2, WIDTH), 2.0)
    norm = clip_gradients([table, matrix], 1.0)
    expected = nn.utils.clip_grad_norm_([dense_table, dense_matrix], 1.0)
    assert norm == pytest.approx(float(expected))
    assert table.grad.is_coalesced()
    torch.testing.assert_close(table.grad.to_dense(), dense_table.grad)
    torch.testing.assert_close(matrix.grad, dense_matrix.grad)
    assert clip_gradients([table, matrix], 5.0) == pytest.approx(1.0)
    torch.testing.assert_close(table.grad.to_dense(), dense_table.grad)  # short enough: as it is


def test_coalescing_is_torchs_to_rounding() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 40, (300,), generator=generator)
    gradient = torch.sparse_coo_tensor(
        rows[None], torch.randn(300, WIDTH, generator=generator), (50, WIDTH), check_invariants=True
    )
    own, theirs = coalesced(gradient), gradient.coalesce()
    assert own.indices().equal(theirs.indices())
    torch.testing.assert_close(own.values(), theirs.values(), atol=1e-5, rtol=0)
    assert coalesced(own) is own
    assert len(coalesced(sparse([], torch.empty(0, WIDTH), 9)).values()) == 0


def test_rounding_at_random_takes_a_neighbour_and_keeps_the_mean() -> None:
    value = 1.0 + 0.3 * 2**-7  # bf16 has 1 and 1 + 2^-7 here
    for sign in (1, -1):
        rounded = round_at_random(torch.full((20_000, 1), sign * value), seed=1).float() * sign
        assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
        assert float((rounded > 1).float().mean()) == pytest.approx(0.3, abs=0.02)
    exact = torch.tensor([[0.0, -0.5, 3.0]])
    assert round_at_random(exact, seed=0).float().equal(exact)


def test_tables_in_bf16_learn_from_updates_below_their_precision() -> None:
    table = nn.Parameter(torch.ones(2000, 1, dtype=torch.bfloat16))
    optimizer = RowAdamW([{"params": [table], "by_row": True}], **SETTINGS | {"lr": 1e-4, "weight_decay": 0.0})
    for _ in range(10):
        table.grad = torch.sparse_coo_tensor(
            torch.arange(2000)[None], torch.ones(2000, 1).bfloat16(), (2000, 1), check_invariants=True
        )
        optimizer.step()
    assert table.dtype == optimizer.state[table]["exp_avg"].dtype == torch.bfloat16
    assert float(table.detach().float().mean()) == pytest.approx(1 - 10 * 1e-4, abs=3e-4)


def test_the_state_of_a_table_loads_again() -> None:
    steps = random_steps(4, 7, seed=6)
    table, again = table_of(7), table_of(7)
    optimizer = by_row(table)
    for step in steps[:2]:
        table.grad = step
        optimizer.step()
    other = by_row(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.data.copy_(table.data)
    for step in steps[2:]:
        table.grad, again.grad = step, step
        optimizer.step()
        other.step()
    assert table.equal(again)
