"""Going on with a model that is there: on new text, on prompts and responses, in whole or by low-rank adapters."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_models, random_row, stop_after, tiny_config
from torch import nn

from blt.config import LORA_TARGETS, LoraConfig, RunConfig, TrainingConfig
from blt.config_file import read_run_config
from blt.language_model import LanguageModel, load
from blt.lora import add_adapters, merged
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.optimise import build_optimizer
from blt.progress import Reporter
from blt.train import train

Blt = Callable[..., Any]
CPU = torch.device("cpu")
SHORT = [
    "training.row_bytes=64",
    "training.rows_per_step=4",
    "training.steps_per_report=5",
    "training.steps_per_save=7",
]
SHORT += ["training.steps_per_evaluation=100", "training.evaluation_bytes=500", "training.dtype=float32"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words and themselves backwards."""
    file, chosen = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(1)
    words = ["".join(chosen.choices("abcde", k=5)) for _ in range(300)]
    file.write_text("".join(json.dumps({"prompt": f"{word}>", "response": word[::-1]}) + "\n" for word in words))
    return file


def config_of(init: Path, data: Path, *more: str) -> RunConfig:
    overrides = [*SHORT, f"init={json.dumps(str(init))}", f"data.paths={json.dumps([str(data)])}", *more]
    return read_run_config("finetune", overrides, load(init, device="cpu").config)


def tuned(init: Path, data: Path, run: Path, *more: str, resume: bool = False) -> LanguageModel:
    with Reporter(quiet=True) as reporter:
        return train(config_of(init, data, *more), run, CPU, resume, reporter)


def losses(run: Path) -> list[float]:
    reports = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [report["train_bits_per_byte"] for report in reports if "train_bits_per_byte" in report]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


def test_a_run_goes_on_from_the_models_weights_with_its_patches(
    tiny_training: Any, pairs: Path, tmp_path: Path, blt_command: Blt
) -> None:
    settings = [word for option in [*SHORT, "training.total_bytes=5120"] for word in ("--set", option)]
    command = ["train", "--init", tiny_training.run, "--data", pairs, *settings]
    finished = blt_command(*command, "--out", tmp_path / "tuned", "--json")
    before, after = load(tiny_training.run, device="cpu"), load(tmp_path / "tuned", device="cpu")
    assert after.config == before.config and finished.json["bits_per_byte"] > 0
    assert before.entropy_model is not None and after.entropy_model is not None
    for name, weight in before.entropy_model.state_dict().items():
        assert weight.equal(after.entropy_model.state_dict()[name]), name
    moved = [
        float((weight - after.network.state_dict()[name]).abs().max())
        for name, weight in before.network.state_dict().items()
    ]
    assert 0 < max(moved) < 0.1  # it went on from there; fresh weights would be further away
    again = blt_command(*command, "--out", tmp_path / "tuned")
    assert again.code == 1 and "holds a run already" in again.stderr


def test_pairs_are_learned_better_than_by_the_model_that_has_not_seen_them(
    tiny_training: Any, pairs: Path, tmp_path: Path, blt_command: Blt
) -> None:
    rate = "training.learning_rate=1e-2"
    tuned(tiny_training.run, pairs, tmp_path / "run", "training.total_bytes=40960", rate)

    def bits(model: Path) -> float:
        return float(blt_command("evaluate", model, "--data", pairs, "--json").json["bits_per_byte"])

    assert bits(tmp_path / "run") < 0.5 * bits(tiny_training.run)


@pytest.mark.parametrize("more", [[], ["lora.rank=3"]], ids=["whole", "adapters"])
def test_a_run_that_stops_goes_on_to_the_bit(
    more: list[str], tiny_training: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.total_bytes=5120", *more]
    whole = tuned(tiny_training.run, pairs, tmp_path / "whole", *settings)
    with monkeypatch.context() as patched:
        patched.setattr("blt.train.stop_after_this_step", stop_after(9))
        with pytest.raises(KeyboardInterrupt):
            tuned(tiny_training.run, pairs, tmp_path / "cut", *settings)
    cut = tuned(tiny_training.run, pairs, tmp_path / "cut", *settings, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, weight in whole.network.state_dict().items():
        assert weight.equal(cut.network.state_dict()[name]), name


def test_a_run_goes_on_when_the_model_that_it_began_from_is_gone(
    trained_run: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.total_bytes=5120"]
    config = config_of(trained_run, pairs, *settings)
    with Reporter(quiet=True) as reporter, monkeypatch.context() as patched:
        patched.setattr("blt.train.stop_after_this_step", stop_after(9))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", CPU, False, reporter)
    shutil.rmtree(trained_run)
    with Reporter(quiet=True) as reporter:
        train(config, tmp_path / "cut", CPU, True, reporter)
    assert len(losses(tmp_path / "cut")) == 4


# adapters


def adapted(targets: tuple[str, ...] = LORA_TARGETS) -> tuple[ByteLatentTransformer, ByteLatentTransformer]:
    """A tiny network, and the same with adapters that have learned something."""
    plain, network = random_models(tiny_config())[1], random_models(tiny_config())[1]
    add_adapters(network, LoraConfig(rank=2, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(5)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.3, generator=generator)
    return plain, network


def logits_of(network: ByteLatentTransformer) -> torch.Tensor:
    row = random_row(40, seed=2)
    return network(row, torch.arange(41)[None] % 3 < 2)


def test_adapters_add_nothing_at_first() -> None:
    plain, network = random_models(tiny_config())[1], random_models(tiny_config())[1]
    add_adapters(network, LoraConfig(), seed=0)
    with torch.no_grad():
        assert logits_of(network).equal(logits_of(plain))


def test_every_matrix_of_every_layer_is_adapted_by_default_and_nothing_else_learns() -> None:
    plain, network = adapted()
    expected = {
        name
        for name, part in plain.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in ("head", "slot_proj", "input_proj")
    }
    learns = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {name.partition(".lora_")[0] for name in learns} == expected
    stages = {name.partition(".")[0] for name in expected}
    assert stages == {"local_encoder", "latent_transformer", "local_decoder"}
    assert all(".lora_A." in name or ".lora_B." in name for name in learns)


@pytest.mark.parametrize("target", [*LORA_TARGETS, "slot_proj", "head"])
def test_each_kind_of_adapter_is_heard_in_training_and_in_evaluation_and_merging_keeps_it(target: str) -> None:
    plain, network = adapted((target,))
    sums = merged(network)
    trained = logits_of(network.train()).detach()
    with torch.no_grad():
        before, after = logits_of(network.eval()), logits_of(sums)
        assert not torch.allclose(before, logits_of(plain), atol=1e-3)
    torch.testing.assert_close(trained, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)
    assert (
        not any("lora" in name for name in sums.state_dict()) and sums.state_dict().keys() == plain.state_dict().keys()
    )


def test_every_adapter_gets_a_gradient_and_no_frozen_weight_does() -> None:
    _, network = adapted()
    logits_of(network.train()).square().sum().backward()
    for name, weight in network.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == weight.requires_grad, name


def test_a_run_with_adapters_exports_merged_weights_under_the_usual_names(
    tiny_training: Any, pairs: Path, tmp_path: Path
) -> None:
    settings = ["training.total_bytes=10240", "training.learning_rate=1e-2", "lora.rank=4"]
    lm = tuned(tiny_training.run, pairs, tmp_path / "run", *settings)
    before, after = weights_of(tiny_training.run), weights_of(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert changed and all(name.rpartition(".weight")[0].endswith(LORA_TARGETS) for name in changed)
    assert not any(name.startswith("model.patcher.") for name in changed)
    reloaded = load(tmp_path / "run", device="cpu")
    ids = lm.encode("abcde>")
    with torch.no_grad():
        assert lm.network(ids, lm.patch_starts(ids)).equal(reloaded.network(ids, reloaded.patch_starts(ids)))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


# rates


def test_latent_layers_have_their_own_rate_and_what_feeds_them_has_not() -> None:
    latent = {"num_layers": 1, "width": 24, "num_heads": 2, "ffn_width": 40}
    network = random_models(tiny_config(latent=latent))[1]
    training = TrainingConfig(total_bytes=100, learning_rate=1e-2, latent_learning_rate_factor=0.1)
    rates = {
        id(weight): group["peak_lr"]
        for group in build_optimizer(network, training).param_groups
        for weight in group["params"]
    }
    slow = {name for name, weight in network.named_parameters() if rates[id(weight)] == pytest.approx(1e-3)}
    assert slow == {
        name for name, _ in network.named_parameters() if name.startswith("latent_transformer.transformer.")
    }
    assert {id(weight) for weight in network.parameters()} == rates.keys()


# what cannot go on


def refusal(blt_command: Blt, *arguments: object) -> str:
    finished = blt_command("train", *arguments)
    assert finished.code == 1
    return str(finished.stderr)


def test_what_cannot_go_on_is_refused_in_a_sentence(
    tiny_training: Any, tiny_toml: Path, pairs: Path, tmp_path: Path, blt_command: Blt
) -> None:
    init = ["--init", tiny_training.run, "--data", pairs, "--out", tmp_path / "new"]
    assert "give a config, or a model to go on from (--init MODEL)" in refusal(blt_command)
    assert "finetune has no [model]" in refusal(blt_command, "finetune")
    assert "no such model folder" in refusal(blt_command, "--init", "./nonesuch")
    assert "model.hash_embeddings is" in refusal(blt_command, "small", *init)
    other = refusal(blt_command, *init, "--set", "model.slots_per_patch=1")
    assert "has another slots_per_patch than [model]: 2" in other
    assert "needs init" in refusal(blt_command, tiny_toml, "--set", "lora.rank=2")
    unknown = refusal(blt_command, *init, "--set", 'lora.targets=["query"]')
    assert "called 'query'" in unknown and "q_proj" in unknown
    frozen = refusal(blt_command, *init, "--set", f"pretrained_entropy_model={tiny_training.run}", "--dry-run")
    assert "stays as it is" in frozen
    assert "exceeds model.max_bytes" in refusal(blt_command, *init, "--set", "training.row_bytes=100000")
    assert "is of no use" in refusal(
        blt_command, tiny_toml, "--set", "entropy_training.latent_learning_rate_factor=0.1"
    )


def test_a_runs_own_config_may_be_given_with_itself_as_the_model(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    """What it says of training an entropy model is left out: that is there."""
    shown = blt_command("train", tiny_toml, "--init", tiny_training.run, "--dry-run", "--json").json
    assert shown["entropy_training"] is None and shown["init"] == str(tiny_training.run)
    assert shown["model"]["patching"]["threshold_nats"] == load(tiny_training.run).config.patching.threshold_nats


def test_peft_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'blt-lm\[hf\]'"):
        add_adapters(random_models(tiny_config())[1], LoraConfig(), seed=0)
