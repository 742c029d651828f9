"""Muon against torch's, against singular values, and in a network: what it moves, what it leaves to AdamW, what it resumes."""

import copy
import math

import pytest
import torch
from tiny import random_models, tiny_config
from torch import Tensor, nn

from blt.config import TrainingConfig
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.muon import QUINTIC, ROUNDS, Muon, orthogonal
from blt.optimise import build_optimizer

ADAMW = {"betas": (0.8, 0.9), "eps": 1e-8, "fused": True}
SHAPES = ((8, 8), (8, 24), (24, 8), (8, 24), (5, 7))


def matrices(shapes: tuple[tuple[int, int], ...] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def muon(weights: list[nn.Parameter], dtype: torch.dtype = torch.float32) -> Muon:
    groups = [{"params": weights, "orthogonal": True, "weight_decay": 0.3}]
    return Muon(groups, dtype, lr=0.05, **ADAMW)


def test_it_is_torchs_muon_but_for_the_rounding_of_bf16() -> None:
    ours, theirs = matrices(), matrices()
    optimizer = muon(ours, torch.bfloat16)
    oracle = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for weight, same in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            same.grad = weight.grad.clone()
        optimizer.step()
        oracle.step()
    for weight, same, begun in zip(ours, theirs, matrices(), strict=True):
        moved = (same - begun).norm()
        assert (weight - same).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(6, 6), (6, 15)])
def test_an_update_keeps_singular_vectors_and_makes_singular_values_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = values / values.norm()
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        expected = a * expected + b * expected**3 + c * expected**5
    assert expected.min() > 0.6 and expected.max() < 1.3
    torch.testing.assert_close(orthogonal(matrix[None])[0], left @ expected.diag() @ right)


def test_singular_values_from_a_hundredth_on_come_between_the_bounds_that_are_documented() -> None:
    values = torch.logspace(-2, 0, 1000, dtype=torch.float64)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.68 and values.max() < 1.135


def test_a_matrix_without_gradient_stays_and_a_gradient_of_zero_moves_nothing_but_by_decay() -> None:
    still, zero = matrices(((4, 6), (6, 4)))
    before = zero.detach().clone()
    zero.grad = torch.zeros(6, 4)
    muon([still, zero]).step()
    assert still.equal(matrices(((4, 6),))[0])
    torch.testing.assert_close(zero.detach(), before * (1 - 0.05 * 0.3), atol=0, rtol=1e-6)


def test_updates_have_the_size_of_adamws() -> None:
    weight = matrices(((40, 100),))[0]
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "orthogonal": True}], torch.float32, lr=0.01, weight_decay=0.0, **ADAMW)
    weight.grad = torch.randn(40, 100, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    moved = weight.detach() - before
    expected = orthogonal(weight.grad[None])[0]  # of rms 1/10, if its 40 singular values were 1, in 40 x 100 numbers
    torch.testing.assert_close(moved, -0.2 * 0.01 * 10 * expected, atol=1e-6, rtol=0)
    assert 0.68 < float(moved.square().mean().sqrt()) / (0.2 * 0.01) < 1.14
    assert weight.grad.std() > 0.9  # it is there for whoever looks afterwards


def test_of_a_network_matrices_are_muons_and_heads_embeddings_tables_and_norms_adamws() -> None:
    network = random_models(tiny_config())[1]
    optimizer = build_optimizer(network, training())
    assert isinstance(optimizer, Muon) and optimizer.dtype == torch.bfloat16
    names = {id(weight): name for name, weight in network.named_parameters()}
    mine = {names[id(w)] for group in optimizer.param_groups if group.get("orthogonal") for w in group["params"]}
    others = {names[id(w)] for group in optimizer.param_groups if not group.get("orthogonal") for w in group["params"]}
    assert mine.isdisjoint(others) and mine | others == set(names.values())
    assert mine == {
        name
        for name, weight in network.named_parameters()
        if weight.ndim == 2 and not name.endswith(("embedding.weight", "tables.weight", "head.weight"))
    }
    assert "local_decoder.head.weight" in others


def test_latent_layers_have_their_own_rate_under_muon_too() -> None:
    network = random_models(tiny_config())[1]
    groups = build_optimizer(network, training(latent_learning_rate_factor=0.1)).param_groups
    rates = {id(weight): (group["peak_lr"], group.get("orthogonal")) for group in groups for weight in group["params"]}
    latent = network.latent_transformer.transformer.layers[0]
    assert rates[id(latent.attention.q_proj.weight)] == (pytest.approx(1e-3), True)
    assert rates[id(network.local_encoder.slot_proj.weight)] == (1e-2, True)


def test_a_saved_state_goes_on_to_the_bit() -> None:
    network = random_models(tiny_config())[1]
    optimizer = build_optimizer(network, training())
    take(network, optimizer, steps=2)
    again, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    optimizer_again = build_optimizer(again, training())
    optimizer_again.load_state_dict(state)
    take(network, optimizer, steps=2)
    take(again, optimizer_again, steps=2)
    for weight, same in zip(network.parameters(), again.parameters(), strict=True):
        assert weight.equal(same)


def training(**changes: object) -> TrainingConfig:
    settings = {"learning_rate": 1e-2, "matrix_optimizer": "muon", "dtype": "bfloat16", **changes}
    return TrainingConfig(total_bytes=1000, **settings)


def take(network: ByteLatentTransformer, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    row = torch.arange(40)[None] % 23 + 60
    starts = torch.arange(41)[None] % 4 < 2
    for _ in range(steps):
        loss: Tensor = network(row, starts).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.isfinite(loss.item())
