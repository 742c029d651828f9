"""Rotary positions: pairs of a head's numbers turn by an angle that grows with the position (RoPE)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from blt.config import RopeScalingConfig
from blt.shapes import Rotation

Heads = Float[Tensor, "batch head position head_dim"]


def rotary_rotation(
    num_positions: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScalingConfig | None = None
) -> Rotation:
    """Cosine and sine of the angle ``p * theta^(-2i / head_dim)`` by which pair i of position p turns, in fp32.

    >>> rotary_rotation(2, 4, 100.0, torch.device("cpu"))[:, :, 1].asin().round(decimals=4).tolist()
    [[0.0, 0.0], [1.0, 0.10000000149011612]]
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is not None:
        turns = frequencies * (scaling.original_positions / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * ((1 - kept) / scaling.factor + kept)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(heads: Heads, rotation: Rotation) -> Heads:
    """Rotary positions on interleaved pairs (x[2i], x[2i + 1]): a product of complex numbers."""
    pairs = heads.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real numbers only
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(heads.dtype)
