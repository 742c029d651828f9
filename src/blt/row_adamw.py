"""AdamW whose cost, for an embedding table, is that of the rows that a step has read, however many there are.

A table's gradient is row-sparse: the rows that were looked up, and nothing for the others. Dense AdamW (arXiv 1711.05101)
goes on moving those others along what is left of their momentum, and pays for every row at every step. Here a row that is
read after a gap of g steps moves at once as far as dense AdamW would move it in g steps without another gradient, the best
guess at when it is read next: its moments have decayed by beta^g, and the update is multiplied with the sum of r^i over
i in 0..g-1, r = beta_1 / sqrt(beta_2), which is how momentum over root mean square fades. So rows that are read at every
step get dense AdamW to the letter, rows that are read every g steps what it gives them from one reading to the next (but for
eps, and for a learning rate that changes in between), and rows that are never read stay as they are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blt.model.hash_embeddings import sums_by_row

Rows = Int[Tensor, " touched"]
RowValues = Float[Tensor, "touched width"]


class RowAdamW(torch.optim.AdamW):
    """Fused AdamW; in groups that say ``by_row`` the rows of a parameter are updated where they were read.

    Tables in bf16 have their moments in bf16, too; the update is worked out in fp32 and the new weight rounded up or down at
    random, in proportion to the distance, so that updates below bf16's precision are not lost.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        tables = [(group, table) for group in self.param_groups if group.get("by_row") for table in group["params"]]
        gradients = [table.grad for _, table in tables]
        for (group, table), gradient in zip(tables, gradients, strict=True):
            if gradient is not None:
                self._step_rows(group, table, *_rows_and_values(gradient))
            table.grad = None  # the dense update passes it by
        loss: Any = super().step(closure)
        for (_, table), gradient in zip(tables, gradients, strict=True):
            table.grad = gradient
        return loss

    def _step_rows(self, group: dict[str, Any], table: nn.Parameter, rows: Rows, gradient: RowValues) -> None:
        state = self.state[table]
        if not state:
            state["now"] = torch.zeros((), dtype=torch.int64)
            state["step"] = torch.zeros(len(table), device=table.device)  # at which each row was read last
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["now"] += 1
        now, (beta_1, beta_2), rate = int(state["now"]), group["betas"], group["lr"]
        gradient = gradient.float()
        gaps = (now - state["step"].index_select(0, rows))[:, None]
        mean = state["exp_avg"].index_select(0, rows).float().mul_(beta_1**gaps).add_(gradient, alpha=1 - beta_1)
        square = state["exp_avg_sq"].index_select(0, rows).float().mul_(beta_2**gaps)
        square.addcmul_(gradient, gradient, value=1 - beta_2)
        state["step"][rows] = float(now)
        for name, value in (("exp_avg", mean), ("exp_avg_sq", square)):
            state[name].index_copy_(0, rows, value.to(state[name].dtype))
        spread = square.div_(1 - beta_2**now).sqrt_().add_(group["eps"])
        moves = mean.mul_(rate / (1 - beta_1**now) * steps_of_momentum(gaps, beta_1 / beta_2**0.5)).div_(spread)
        weights = table.index_select(0, rows).float().mul_((1 - rate * group["weight_decay"]) ** gaps).sub_(moves)
        if table.dtype == torch.bfloat16:
            weights = round_at_random(weights, seed=now)
        table.index_copy_(0, rows, weights)


def steps_of_momentum(gaps: Float[Tensor, "touched 1"], ratio: float) -> Float[Tensor, "touched 1"]:
    """How many steps of now's size ``gaps`` steps are, where each is ``ratio`` of the one before.

    >>> steps_of_momentum(torch.tensor([[1.0], [2.0], [1000.0]]), ratio=0.5).flatten().tolist()
    [1.0, 1.5, 2.0]
    """
    return gaps if ratio >= 1 else (1 - ratio**gaps) / (1 - ratio)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients together to this norm if theirs is larger; the norm that they had.

    Row-sparse gradients are left coalesced: each row once, its parts summed in a fixed order.
    """
    dense, sparse = [], []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)
            sparse.append(parameter.grad.values())
        elif parameter.grad is not None:
            dense.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm([*dense, *sparse])
    factor = max_norm / (float(norm) + 1e-6)
    if factor < 1:
        torch._foreach_mul_([*dense, *sparse], factor)
    return float(norm)


def coalesced(gradient: Tensor) -> Tensor:
    """A row-sparse gradient in which each row stands once, its parts summed.

    >>> values = [[1.0, 1.0], [2.0, 0.0], [0.5, 0.0]]
    >>> twice = torch.sparse_coo_tensor([[5, 2, 5]], values, (9, 2), check_invariants=True)
    >>> coalesced(twice).indices().tolist(), coalesced(twice).values().tolist()
    ([[2, 5]], [[2.0, 0.0], [1.5, 1.0]])
    """
    if gradient.is_coalesced():
        return gradient
    return sums_by_row(gradient._indices().mT, gradient._values(), gradient.shape)


def round_at_random(values: RowValues, seed: int) -> RowValues:
    """fp32 numbers as bf16, up or down with the chances that keep their mean.

    >>> round_at_random(torch.full((4000, 1), 1 + 2**-9), seed=0).float().mean().round(decimals=3).item()
    1.00199...
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    bits = values.contiguous().view(torch.int32)  # bf16 is the upper half of fp32
    lower = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + lower) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _rows_and_values(gradient: Tensor) -> tuple[Rows, RowValues]:
    if gradient.is_sparse:
        gradient = coalesced(gradient)
        return gradient.indices()[0], gradient.values()
    rows = gradient.any(1).nonzero().flatten()
    return rows, gradient.index_select(0, rows)
