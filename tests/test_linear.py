"""Matrix products with rounded weights."""

import pytest
import torch
from torch import nn

from blt.model.linear import Int8Linear, Linear, round_to_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_8_bits_are_within_half_a_step_of_their_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear(40, 7).to(dtype)
    linear.weight.data[3] *= 1000
    linear.weight.data[5] = 0
    rounded = Int8Linear(linear)
    assert rounded.weight.dtype == torch.int8 and rounded.scale.dtype == dtype
    steps = linear.weight.float().abs().amax(1) / 127
    error = (rounded(torch.eye(40, dtype=dtype)).T.float() - linear.weight.float()).abs().amax(1)
    slack = torch.finfo(dtype).eps * 127 * steps  # the products themselves are rounded to the dtype
    assert (error <= steps / 2 + slack).all()
    assert error[5] == 0


def test_every_product_of_a_module_is_rounded_and_nothing_else() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(Linear(4, 4), nn.RMSNorm(4)), nn.Linear(4, 2))
    embedding = module[0].weight.clone()
    round_to_int8(module)
    assert [type(part) for part in module.modules() if not isinstance(part, nn.Sequential)] == [
        nn.Embedding,
        Int8Linear,
        nn.RMSNorm,
        nn.Linear,
    ]
    assert module[0].weight.equal(embedding)
