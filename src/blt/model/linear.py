"""The matrix product of every layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Shaped
from torch import Tensor, nn

COMPILED_ROWS = 4  # up to so many, the compiled product is faster than the BLAS library's (docs/log.md)


def product_dtype(states: Tensor) -> torch.dtype:
    """What matrix products of these states are worked out in: autocast's dtype where it is on, else their own."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class Linear(nn.Linear):
    """Weight times states, no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "*axes inputs"]) -> Float[Tensor, "*axes outputs"]:
        return _few_products(x, self.weight) if _compiles_few(x) else F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """Weight times states, the weights rounded to 8 bits, each output with a scale of its own.

    In a compiled step that is a quarter of the memory to read. Elsewhere it is slower than not to round, as every product
    begins by undoing it.
    """

    weight: Int8[Tensor, "outputs inputs"]
    scale: Float[Tensor, " outputs"]

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x: Float[Tensor, "*axes inputs"]) -> Float[Tensor, "*axes outputs"]:
        products = _few_products(x, self.weight) if _compiles_few(x) else F.linear(x, self.weight.to(x.dtype))
        return products * self.scale


def round_to_int8(module: nn.Module) -> None:
    """Round the weights of every matrix product in a module to 8 bits, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, Int8Linear(child))


def _compiles_few(x: Float[Tensor, "*axes inputs"]) -> bool:
    few = x.shape[:-1].numel() <= COMPILED_ROWS
    return torch.compiler.is_compiling() and few and not torch.is_grad_enabled() and x.device.type == "cpu"


def _few_products(
    x: Float[Tensor, "*axes inputs"], weight: Shaped[Tensor, "outputs inputs"]
) -> Float[Tensor, "*axes outputs"]:
    """The product as a loop of the compiler's, which reads each weight once for all rows.

    The time goes into reading the weights. The BLAS library read them at less than half of what the memory gave, this at
    three quarters and more of it for one row of a large matrix (docs/log.md).
    """
    weight = weight.float() if weight.dtype == torch.int8 else weight
    products = torch.stack([(weight * row).float().sum(-1) for row in x.flatten(0, -2)])
    return products.to(x.dtype).unflatten(0, x.shape[:-1])
