"""RMSNorm, computed in fp32 whatever the states' dtype."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blt.model.linear import product_dtype


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square of the last axis, times a learned scale; as in the released models, in fp32.

    A matrix product follows every norm, so under autocast the result has the dtype of those: it is rounded once, and not by
    each of the products.
    """

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        dtype = product_dtype(x)
        if torch.compiler.is_compiling():  # the compiler fuses operations that it can see
            return _normed(x.float(), self.eps or 0.0)[0].mul(self.weight.float()).to(dtype)
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """A third of the passes over memory that torch's own operations take, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], eps: float, dtype: torch.dtype
    ) -> Float[Tensor, "*batch width"]:
        normed, inverse = _normed(x.float(), eps)
        ctx.save_for_backward(x, inverse, weight)
        return normed.mul_(weight.float()).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        width, scale = x.shape[-1], weight.float()
        gradient, normed = gradients[0].float(), x.float() * inverse
        by_scale = (gradient * normed).view(-1, width)
        # what moves a state along itself changes nothing, as its length is divided out again
        along = by_scale.mv(scale).view_as(inverse).div_(-width)
        of_x = gradient.mul(scale).addcmul_(normed, along).mul_(inverse)
        return of_x.to(x.dtype), by_scale.sum(0).to(weight.dtype), None, None


def _normed(x: Float[Tensor, "*batch width"], eps: float) -> tuple[Tensor, Tensor]:
    """States of root mean square 1, and what they were multiplied with."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(x.shape[-1]).add(eps).rsqrt()
    return x * inverse, inverse
