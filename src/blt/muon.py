"""Muon (Jordan et al. 2024): updates of matrices whose singular values are all about alike; all else goes to RowAdamW.

A matrix's momentum U S V^T moves it by about U V^T, so every direction that has a gradient is learned, and none faster than the
learning rate says. At rates where AdamW leaves the latent transformer at chance, it learns so (docs/log.md). The update is
scaled to the root mean square that AdamW's has (arXiv 2502.16982), so that one learning rate serves both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blt.row_adamw import RowAdamW

MOMENTUM = 0.95
ADAMW_RMS = 0.2  # of AdamW's updates at learning rate 1, about
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: five rounds bring singular values from 0.01 on between 0.68 and 1.14
ROUNDS = 5
SMALLEST_NORM = 1e-7


class Muon(RowAdamW):
    """Muon in groups that say ``orthogonal``, RowAdamW in the others; ``dtype`` is that of its matrix products."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has overloads
        groups = [group for group in self.param_groups if group.get("orthogonal")]
        gradients = {matrix: matrix.grad for group in groups for matrix in group["params"] if matrix.grad is not None}
        for group in groups:
            matrices = [matrix for matrix in group["params"] if matrix in gradients]
            for matrix, update in zip(matrices, self._updates(matrices), strict=True):
                size = group["lr"] * ADAMW_RMS * math.sqrt(max(matrix.shape))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)
                matrix.grad = None  # AdamW passes it by
        loss = super().step(closure)
        for matrix, gradient in gradients.items():
            matrix.grad = gradient
        return loss

    def _updates(self, matrices: list[nn.Parameter]) -> list[Tensor]:
        """Of each matrix; those of one shape go through one batched product."""
        wide = [self._momentum(matrix).to(self.dtype) for matrix in matrices]
        wide = [update.mT if len(update) > update.shape[1] else update for update in wide]
        for shape in {update.shape for update in wide}:
            alike = [index for index, update in enumerate(wide) if update.shape == shape]
            for index, update in zip(alike, orthogonal(torch.stack([wide[index] for index in alike])), strict=True):
                wide[index] = update
        return [
            update.mT if update.shape != matrix.shape else update for matrix, update in zip(matrices, wide, strict=True)
        ]

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        """Nesterov's: the mean of the gradients so far, seen from one step ahead."""
        state = self.state[matrix]
        if not state:
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(matrix)
        state["step"] += 1  # where AdamW, which loads the state, looks for it
        assert matrix.grad is not None
        return matrix.grad.lerp(state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM), MOMENTUM)


def orthogonal(matrices: Float[Tensor, "matrix short long"]) -> Float[Tensor, "matrix short long"]:
    """About U V^T of each matrix U S V^T, by Newton-Schulz: a polynomial of the singular values in matrix products alone.

    >>> (10 * orthogonal(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.2, 0.0]]]))).round().int().tolist()
    [[[7, 0, 0], [0, 11, 0]]]
    """
    a, b, c = QUINTIC
    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ROUNDS):
        square = matrices @ matrices.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, factor, matrices, beta=a)
    return matrices
