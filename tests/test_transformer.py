"""The feed-forward layer: its own gradient against autograd's, and rounded weights whether or not gradients are on."""

import pytest
import torch
import torch.nn.functional as F

from blt.model.linear import round_to_int8
from blt.model.transformer import SwiGLU


def test_the_gated_product_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    layer, states = SwiGLU(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    learns = [states, *layer.parameters()]
    found = layer(states)
    expected = layer.down_proj(F.silu(layer.gate_proj(states)) * layer.up_proj(states))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad(found, learns, direction)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, learns, direction), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_rounded_weights_compute_the_same_with_gradients_on(frozen: bool) -> None:
    torch.manual_seed(0)
    layer, states = SwiGLU(6, 10).requires_grad_(not frozen), torch.randn(2, 3, 6)
    round_to_int8(layer)
    with torch.no_grad():
        expected = layer(states)
    assert layer(states).equal(expected)
