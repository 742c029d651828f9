"""The matrix product of every layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

COMPILED_ROWS = 4  # up to so many, the compiled product is faster than the BLAS library's (docs/log.md)


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
                products = torch.stack([(self.weight * row).float().sum(-1) for row in rows])
                return products.to(x.dtype).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight)
