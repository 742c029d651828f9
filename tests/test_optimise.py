"""What the training loop sets up and reports: recomputed layers, tables in bf16, utilisation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import random_models, random_row, tiny_config
from torch import Tensor

from blt.config import TrainingConfig
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.optimise import (
    Job,
    Loss,
    ReportWindow,
    build_optimizer,
    next_id_loss,
    prepare,
    train_step,
)

CPU = torch.device("cpu")


def training(**changes: object) -> TrainingConfig:
    return TrainingConfig(total_bytes=1000, row_bytes=60, rows_per_step=1, **changes)


def loss_of(network: ByteLatentTransformer, row: Tensor) -> Tensor:
    starts = torch.arange(row.shape[1] + 1)[None] % 4 < 2
    return next_id_loss(network(row, starts), row)


def saved_bytes(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a forward pass gives, and how many bytes it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(part: Tensor) -> Tensor:
        kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        result = forward()
    return result, sum(kept.values())


def test_recomputed_layers_give_the_same_gradients_and_keep_less() -> None:
    row = random_row(200, seed=0)
    found = []
    for recompute in (False, True):
        network = random_models(tiny_config())[1]
        prepare(network, training(recompute_activations=recompute))
        loss, kept = saved_bytes(lambda network=network: loss_of(network, row))
        loss.backward()
        found.append((loss, kept, [weight.grad for weight in network.parameters()]))
    (loss, kept, gradients), (again, kept_again, gradients_again) = found
    assert loss.equal(again)
    assert kept_again < 0.7 * kept
    for gradient, same in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(gradient.to_dense(), same.to_dense(), atol=0, rtol=0)


def test_tables_in_bf16_train_beside_a_network_in_fp32() -> None:
    network = random_models(tiny_config())[1]
    config = training(table_dtype="bfloat16", table_learning_rate=0.05, learning_rate=1e-3)
    prepare(network, config)
    tables = network.local_encoder.hash_embeddings.tables.weight
    assert tables.dtype == torch.bfloat16
    assert {weight.dtype for weight in network.parameters() if weight is not tables} == {torch.float32}
    optimizer, window, row = build_optimizer(network, config), ReportWindow(), random_row(60, seed=1)
    job = job_of(network, config)
    before = tables.detach().clone()
    for _ in range(5):
        train_step(job, optimizer, row[:, :-1], row[:, 1:], None, window)
    assert float(loss_of(network, row[:, :-1]).detach()) < window.nats / 5
    assert not tables.equal(before)


def job_of(network: ByteLatentTransformer, config: TrainingConfig) -> Job:
    def loss(inputs: Tensor, targets: Tensor, entropies: Tensor | None) -> Loss:
        nats = loss_of(network, inputs)
        return Loss(nats, nats, patches=15)

    return Job("network", network, config, Path(), loss, dict, lambda: None, lambda mean_patch: 1e6)


def test_the_report_says_how_many_flops_a_second_were_computed() -> None:
    window = ReportWindow(nats=10.0, targets=4, bytes=50, patches=10, seconds=2.0)
    figures = window.close(lambda mean_patch: 100 * mean_patch)
    assert figures["flops_per_second"] == pytest.approx(100 * 5 * 50 / 2)
