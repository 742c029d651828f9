"""transformers' Trainer and any stock loop train our network: labels in, loss out, the entropy model as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import random_models, random_row, tiny_config
from torch import nn

from blt import TrainerModel
from blt.byte_ids import encode
from blt.config import ModelConfig, PatchingConfig
from blt.language_model import LanguageModel, load
from blt.model_card import ModelCard


def language_model(config: ModelConfig | None = None) -> LanguageModel:
    config = config or tiny_config()
    return LanguageModel(config, *random_models(config))


def test_the_loss_is_the_mean_of_the_labels_that_are_learned() -> None:
    lm, rows = language_model(), torch.cat([random_row(30, seed=seed) for seed in (1, 2)])
    labels = rows.clone()
    labels[0, :10] = -100
    found = TrainerModel(lm)(rows, labels=labels, attention_mask=torch.ones_like(rows))
    with torch.no_grad():
        logits = lm.network(rows, lm.patch_starts(rows))
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(2, 29)
    expected = (nats[0, 9:].sum() + nats[1].sum()) / (20 + 29)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["logits"], logits)
    summed = TrainerModel(lm)(rows, labels=labels, num_items_in_batch=7)["loss"]
    torch.testing.assert_close(summed, expected * 49 / 7)
    assert TrainerModel(lm)(rows).keys() == {"logits"}


def test_rows_of_which_nothing_is_learned_have_no_loss() -> None:
    row = random_row(12, seed=5)
    loss = TrainerModel(language_model())(row, labels=torch.full_like(row, -100))["loss"]
    loss.backward()
    assert loss.item() == 0


def test_a_card_forgets_what_is_no_longer_true() -> None:
    lm = language_model()
    lm.card = ModelCard(license="mit", training="on something", figures=({"bits_per_byte": 1.0},))
    TrainerModel(lm)
    assert lm.card == ModelCard(license="mit")


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused() -> None:
    model, row = TrainerModel(language_model()), random_row(20, seed=3)
    padded = F.pad(row, (0, 6), value=3)
    mask = F.pad(torch.ones_like(row), (0, 6))
    loss = model(row, labels=row)["loss"]
    torch.testing.assert_close(model(padded, labels=F.pad(row, (0, 6), value=-100), attention_mask=mask)["loss"], loss)
    with pytest.raises(ValueError, match="pad them on the right"):
        model(padded.flip(1), attention_mask=mask.flip(1))


def test_gradients_are_dense_and_the_same_and_a_stock_optimiser_takes_them() -> None:
    lm, row = language_model(), random_row(40, seed=4)
    lm.network(row, lm.patch_starts(row)).square().mean().backward()
    sparse = {name: weight.grad.to_dense() for name, weight in lm.network.named_parameters() if weight.grad is not None}
    lm.network.zero_grad()
    model = TrainerModel(lm)
    for _ in range(2):  # accumulated, as several micro-batches are
        model(row)["logits"].square().mean().backward()
    for name, weight in lm.network.named_parameters():
        assert weight.grad is not None and not weight.grad.is_sparse
        torch.testing.assert_close(weight.grad, 2 * sparse[name], atol=1e-6, rtol=1e-4)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()


def test_the_entropy_model_is_out_of_reach_of_optimisers_and_adapters() -> None:
    lm = language_model()
    model = TrainerModel(lm)
    assert lm.entropy_model is not None
    frozen = {id(weight) for weight in lm.entropy_model.parameters()}
    assert frozen and not frozen & {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in model.parameters()} == {id(weight) for weight in lm.network.parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("rule", ["entropy", "space"])
def test_transformers_trainer_trains_and_what_it_trained_is_saved(rule: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    patching = PatchingConfig(threshold_nats=5.0) if rule == "entropy" else PatchingConfig(rule=rule)
    lm = language_model(tiny_config(patching=patching))
    before = {name: weight.clone() for name, weight in lm.network.state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in [torch.tensor(encode("abcabcabcabc" * 2))] * 64]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        num_train_epochs=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=TrainerModel(lm), args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    moved = [name for name, weight in lm.network.state_dict().items() if not weight.equal(before[name])]
    assert {name.partition(".")[0] for name in moved} == {"local_encoder", "latent_transformer", "local_decoder"}
    lm.save(tmp_path / "model")
    ids = lm.encode("abcab")
    with torch.no_grad():
        saved = load(tmp_path / "model", device="cpu")
        assert saved.network(ids, saved.patch_starts(ids)).equal(lm.network(ids, lm.patch_starts(ids)))
