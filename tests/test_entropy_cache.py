"""Training on kept entropies is training without them, and those of another specification are refused."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import change_entropy_model, stop_after

from blt.checkpoint import saved_steps
from blt.corpus import open_shard, rows_of
from blt.entropy_cache import open_entropies
from blt.language_model import LanguageModel, load
from blt.model.patching import patch_starts

Blt = Callable[..., Any]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without report.html, which takes longer than their training."""
    monkeypatch.setattr("blt.train.can_draw", lambda: False)


def trained_on(tiny: Any, config: Path, blt_command: Blt, *options: object) -> Any:
    """``blt train`` with the tiny run's entropy model and threshold, which finishes or says why not."""
    threshold = load(tiny.run).config.patching.threshold_nats
    values = [f"pretrained_entropy_model={tiny.run}", f"model.patching.threshold_nats={threshold}"]
    values = ["entropy_training=none", *values, *(option for option in map(str, options) if "=" in option)]
    settings = [word for value in values for word in ("--set", value)]
    return blt_command("train", config, *settings, *(option for option in options if "=" not in str(option)), "--json")


def figures(run: Path, of: str = "train_bits_per_byte") -> list[dict[str, Any]]:
    """The reports of a run that hold this figure."""
    return [report for report in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if of in report]


def test_training_on_kept_entropies_is_training_without_the_entropy_model_to_the_bit(
    tiny_training: Any, tiny_toml: Path, scored: Path, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    starts = LanguageModel.patch_starts
    monkeypatch.setattr(LanguageModel, "patch_starts", lambda lm, ids: asked.append(len(ids)) or starts(lm, ids))
    steps = ["training.micro_batches=2", "training.steps_per_report=1", "training.total_bytes=1280"]
    for name, more in (("plain", []), ("kept", ["--entropies", scored])):
        asked.clear()
        trained = trained_on(tiny_training, tiny_toml, blt_command, *steps, *more, "--out", tmp_path / name)
        assert trained.code == 0, trained.stderr
        assert asked.count(2) == (20 if name == "plain" else 0)  # rows of a training step's part
    plain, kept = figures(tmp_path / "plain"), figures(tmp_path / "kept")
    for key in ("train_bits_per_byte", "mean_patch_bytes", "gradient_norm"):
        assert [report[key] for report in kept] == [report[key] for report in plain]
    assert kept[-1]["train_flops"] < plain[-1]["train_flops"]
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("plain", "kept")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_a_threshold_calibrated_on_kept_entropies_cuts_all_entropies_alike(
    rule: str, tiny_training: Any, tiny_toml: Path, scored: Path, tmp_path: Path, blt_command: Blt
) -> None:
    rises = ["model.patching.rounded_entropies=true"] if rule == "entropy_rise" else []
    options = [f"model.patching.rule={rule}", "model.patching.threshold_nats=none", "training.total_bytes=640"]
    trained = trained_on(
        tiny_training, tiny_toml, blt_command, *options, *rises, "--entropies", scored, "--out", tmp_path / "run"
    )
    assert trained.code == 0, trained.stderr
    lm, kept = load(tmp_path / "run", device="cpu"), open_entropies(scored)
    assert lm.config.patching.rule == rule and lm.config.patching.rounded_entropies == (rule == "entropy_rise")
    inputs = rows_of(open_shard(scored / "corpus", "train"), range(kept.spec.num_rows), 32)[:, :-1]
    from_codes = patch_starts(inputs, kept.entropies(range(len(inputs))), lm.config.patching)
    assert from_codes.equal(lm.patch_starts(inputs))
    (report,) = figures(tmp_path / "run", "train_patch_bytes")
    assert report["train_patch_bytes"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["training.row_bytes=64"], "other row_bytes (32, not 64)"),
        (["data.held_out_fraction=0.2"], "another held_out_fraction (0.3, not 0.2)"),
        (["--data", "other.txt"], "other text"),
        (["model.patching.threshold_nats=2.5"], "does not tell entropies above 2.5 nats"),
    ],
)
def test_training_refuses_entropies_of_something_else_and_leaves_its_folder_free(
    options: list[str],
    said: str,
    tiny_training: Any,
    tiny_toml: Path,
    scored: Path,
    tmp_path: Path,
    blt_command: Blt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("some other text\n" * 100)
    refused = trained_on(tiny_training, tiny_toml, blt_command, "--entropies", scored, "--out", "run", *options)
    assert refused.code == 1 and said in refused.stderr and not Path("run").exists()
    assert "blt entropies " in refused.stderr or "leave it out to have it calibrated" in refused.stderr


def test_the_command_that_a_refusal_gives_is_the_way_out(
    tiny_training: Any, tiny_toml: Path, scored: Path, tmp_path: Path, blt_command: Blt
) -> None:
    options = ["training.row_bytes=64", "training.total_bytes=640", "--out", tmp_path / "run", "--entropies"]
    refused = trained_on(tiny_training, tiny_toml, blt_command, *options, scored).stderr
    command = refused.split("what this run reads: blt ")[1].replace("FOLDER", str(tmp_path / "again")).split()
    assert blt_command(*command, "--processes", 1).code == 0
    assert trained_on(tiny_training, tiny_toml, blt_command, *options, tmp_path / "again").code == 0


def test_training_refuses_entropies_of_another_model(
    trained_run: Path, tiny_training: Any, tiny_toml: Path, scored: Path, tmp_path: Path, blt_command: Blt
) -> None:
    change_entropy_model(trained_run)
    changed = dataclasses.replace(tiny_training, run=trained_run)
    refused = trained_on(changed, tiny_toml, blt_command, "--entropies", scored, "--out", tmp_path / "new")
    assert refused.code == 1 and "was scored with another entropy model" in refused.stderr


def unfinished(folder: Path) -> None:
    (folder / "progress.json").write_text('{"rows": 5}')


def cut(folder: Path) -> None:
    os.truncate(folder / "train.entropies.bin", 1000)


def grown(folder: Path) -> None:
    with (folder / "train.entropies.bin").open("ab") as file:
        file.write(b"x")


def tampered(folder: Path) -> None:
    spec = (folder / "spec.json").read_text()
    (folder / "spec.json").write_text(spec.replace('"row_bytes": 32', '"row_bytes": 16'))


def garbled(folder: Path) -> None:
    (folder / "spec.json").write_text("[]")


def gone(folder: Path) -> None:
    (folder / "spec.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (unfinished, "is not finished, 5 of"),
        (cut, "is not finished, 31 of"),
        (grown, "train.entropies.bin is damaged"),
        (tampered, "spec.json is damaged"),
        (garbled, "spec.json is damaged"),
        (gone, "holds no entropies"),
    ],
)
def test_training_refuses_what_is_not_whole(
    damage: Callable[[Path], None], said: str, tiny_training: Any, tiny_toml: Path, copied: Path, blt_command: Blt
) -> None:
    damage(copied)
    run = copied.parent / "run"
    refused = trained_on(tiny_training, tiny_toml, blt_command, "--entropies", copied, "--out", run)
    assert refused.code == 1 and said in refused.stderr and "Traceback" not in refused.stderr and not run.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "data.entropies needs pretrained_entropy_model"),
        (["model.patching.rule=space", "model.entropy_model=none", "entropy_training=none"], "reads no entropies"),
        (
            ["model.patching.rule=entropy_rise", "entropy_training=none", "pretrained_entropy_model=runs/demo"],
            "model.patching.rounded_entropies = true",
        ),
    ],
)
def test_a_config_that_cannot_use_entropies_says_why(
    options: list[str], said: str, tiny_toml: Path, blt_command: Blt
) -> None:
    settings = [word for option in options for word in ("--set", option)]
    refused = blt_command("train", tiny_toml, *settings, "--entropies", "scored", "--dry-run")
    assert refused.code == 1 and said in refused.stderr


def test_a_run_on_kept_entropies_resumes(
    tiny_training: Any, tiny_toml: Path, scored: Path, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["training.steps_per_report=1", "training.total_bytes=1280", "--entropies", scored, "--out"]
    assert trained_on(tiny_training, tiny_toml, blt_command, *options, tmp_path / "whole").code == 0
    with monkeypatch.context() as patched:
        patched.setattr("blt.train.stop_after_this_step", stop_after(7))
        assert trained_on(tiny_training, tiny_toml, blt_command, *options, tmp_path / "cut").code == 130
    assert saved_steps(tmp_path / "cut" / "state" / "network") == [7]
    assert trained_on(tiny_training, tiny_toml, blt_command, *options, tmp_path / "cut", "--resume").code == 0
    losses = [[report["train_bits_per_byte"] for report in figures(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]
