"""The matrix product of every layer, and the compiler that makes it fast where few rows meet large weights."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from blt.config import Config

R = TypeVar("R")

COMPILED_ROWS = 8  # up to so many, the compiled product is faster than the BLAS library's (docs/log.md)


class Linear(nn.Linear):
    """Weight times states, no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "*axes inputs"]) -> Float[Tensor, "*axes outputs"]:
        if torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.device.type == "cpu":
            rows = x.flatten(0, -2)
            if len(rows) <= COMPILED_ROWS:
                # The time goes into reading the weights. BLAS libraries read them at a third of what the memory can do; the
                # loop that the compiler makes of this reads each weight once for all rows, at nine tenths (docs/log.md).
                products = (self.weight[:, None] * rows).float().sum(-1).T
                return products.to(x.dtype).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight)


@functools.cache
def compiled(function: Callable[..., R], config: Config) -> Callable[..., R]:
    """The function compiled by torch for networks of this config; the first call for each shape takes seconds.

    Nothing about the network is checked again at each call, which is why every config gets a compilation of its own.
    """
    without_checks = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack isolate_recompiles
        function, dynamic=False, isolate_recompiles=True, options=without_checks
    )
