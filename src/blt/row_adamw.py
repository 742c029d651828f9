"""AdamW whose cost, for an embedding table, is that of the rows that a step has read, however many there are.

A table's gradient is row-sparse: the rows that were looked up, and nothing for the others. What happens to a row is
what AdamW (arXiv 1711.05101) does to a tensor of its own that takes part in those steps only that read it: moments,
bias correction and weight decay stand still in between. Dense AdamW also moves rows that a step has not read, along what
is left of their momentum, and pays for all rows at every step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Rows = Int[Tensor, " touched"]
RowValues = Float[Tensor, "touched width"]


class RowAdamW(torch.optim.AdamW):
    """Fused AdamW; in groups that say ``by_row`` each row of a parameter counts its own steps.

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
            state["step"] = torch.zeros(len(table), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        beta_1, beta_2 = group["betas"]
        gradient = gradient.float()
        steps = state["step"].index_select(0, rows) + 1
        mean = state["exp_avg"].index_select(0, rows).float().lerp_(gradient, 1 - beta_1)
        square = state["exp_avg_sq"].index_select(0, rows).float().mul_(beta_2)
        square.addcmul_(gradient, gradient, value=1 - beta_2)
        for name, value in (("step", steps), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[name].index_copy_(0, rows, value.to(state[name].dtype))
        rate = group["lr"] / (1 - beta_1**steps)
        spread = square.div_((1 - beta_2**steps)[:, None]).sqrt_().add_(group["eps"])
        weights = table.index_select(0, rows).float().mul_(1 - group["lr"] * group["weight_decay"])
        weights.sub_(mean.mul_(rate[:, None]).div_(spread))
        if table.dtype == torch.bfloat16:
            state["rounding_seed"] = state.get("rounding_seed", torch.zeros((), dtype=torch.int64)) + 1
            weights = round_at_random(weights, int(state["rounding_seed"]))
        table.index_copy_(0, rows, weights)


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
    """A row-sparse gradient in which each row stands once, its parts summed; faster than torch's own.

    >>> values = [[1.0, 1.0], [2.0, 0.0], [0.5, 0.0]]
    >>> twice = torch.sparse_coo_tensor([[5, 2, 5]], values, (9, 2), check_invariants=True)
    >>> coalesced(twice).indices().tolist(), coalesced(twice).values().tolist()
    ([[2, 5]], [[2.0, 0.0], [1.5, 1.0]])
    """
    if gradient.is_coalesced():
        return gradient
    ordered = gradient._indices()[0].sort(stable=True)
    rows, counts = ordered.values.unique_consecutive(return_counts=True)
    values = gradient._values()
    if len(rows):
        first = F.pad(counts.cumsum(0)[:-1], (1, 0))
        values = F.embedding_bag(ordered.indices, values, first, mode="sum")
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, is_coalesced=True, check_invariants=False)


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
