"""A small entropy model that learns from a large one: it comes closer to its teacher than text alone would bring it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import stop_after

from blt.config_file import read_run_config
from blt.corpus import num_rows, open_shard, rows_of
from blt.language_model import LanguageModel, load
from blt.optimise import distillation_loss, next_id_loss
from blt.progress import Reporter
from blt.train import train

Blt = Callable[..., Any]
CPU = torch.device("cpu")
STUDENT = ["model.entropy_model.width=8", "model.entropy_model.ffn_width=16", "training.total_bytes=128"]
STUDENT += ["entropy_training.total_bytes=7680", "entropy_training.steps_per_report=5"]


def student(tiny_toml: Path, run: Path, *more: str, resume: bool = False) -> LanguageModel:
    with Reporter(quiet=True) as reporter:
        return train(read_run_config(tiny_toml, [*STUDENT, *more]), run, CPU, resume, reporter)


def entropy_reports(run: Path) -> list[dict[str, Any]]:
    reports = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [report for report in reports if report["phase"] == "entropy model" and "train_bits_per_byte" in report]


@torch.no_grad()
def divergence(teacher: LanguageModel, learned: LanguageModel, ids: torch.Tensor) -> float:
    """Mean KL divergence in nats of a student's predictions from its teacher's."""
    assert teacher.entropy_model is not None and learned.entropy_model is not None
    predictions = [lm.entropy_model(ids).log_softmax(-1).flatten(0, 1) for lm in (learned, teacher)]
    return float(F.kl_div(*predictions, log_target=True, reduction="batchmean"))


def test_a_student_comes_closer_to_its_teacher_than_text_alone_brings_it(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path
) -> None:
    teacher = load(tiny_training.run, device="cpu")
    taught = student(tiny_toml, tmp_path / "taught", f"entropy_teacher={tiny_training.run}")
    alone = student(tiny_toml, tmp_path / "alone")
    held_out = open_shard(tmp_path / "alone" / "corpus", "held_out")
    ids = rows_of(held_out, range(num_rows(held_out, 32)), 32)
    assert divergence(teacher, taught, ids) < 0.8 * divergence(teacher, alone, ids)


def test_the_reported_figure_is_of_the_text_and_the_teachers_work_is_counted(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path
) -> None:
    student(tiny_toml, tmp_path / "taught", f"entropy_teacher={tiny_training.run}")
    student(tiny_toml, tmp_path / "alone")
    taught, alone = entropy_reports(tmp_path / "taught"), entropy_reports(tmp_path / "alone")
    assert taught[0]["train_bits_per_byte"] == pytest.approx(alone[0]["train_bits_per_byte"], rel=0.05)
    assert taught[-1]["train_bits_per_byte"] < taught[0]["train_bits_per_byte"]
    assert taught[-1]["train_flops"] > alone[-1]["train_flops"]


def test_a_lesson_that_stops_at_any_step_resumes_to_the_bit(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teaching = f"entropy_teacher={tiny_training.run}"
    whole = student(tiny_toml, tmp_path / "whole", teaching)
    with monkeypatch.context() as patched:
        patched.setattr("blt.train.stop_after_this_step", stop_after(13))
        with pytest.raises(KeyboardInterrupt):
            student(tiny_toml, tmp_path / "cut", teaching)
    cut = student(tiny_toml, tmp_path / "cut", teaching, resume=True)
    assert whole.entropy_model is not None and cut.entropy_model is not None
    for name, weight in whole.entropy_model.state_dict().items():
        assert torch.equal(weight, cut.entropy_model.state_dict()[name]), name
    losses = [[report["train_bits_per_byte"] for report in entropy_reports(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_the_loss_of_a_certain_teacher_is_that_of_the_text() -> None:
    targets = torch.tensor([[70, 2, 1, 0], [80, 81, 0, 0]])
    logits = torch.randn(2, 4, 260, generator=torch.Generator().manual_seed(0))
    certain = 1e4 * F.one_hot(targets, 260).float()
    assert distillation_loss(logits, certain, targets) == pytest.approx(next_id_loss(logits, targets).item())


def test_a_student_that_predicts_as_its_teacher_has_no_gradient() -> None:
    targets = torch.tensor([[70, 71, 2, 1]])
    teacher = torch.randn(1, 4, 260, generator=torch.Generator().manual_seed(0))
    logits = teacher.clone().requires_grad_()
    distillation_loss(logits, teacher, targets).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


# what cannot teach


def test_a_teacher_without_somebody_to_teach_is_refused(tiny_toml: Path, blt_command: Blt) -> None:
    options = ["entropy_teacher=runs/demo", "entropy_training=none", "pretrained_entropy_model=runs/demo"]
    refused = blt_command("train", tiny_toml, *(word for option in options for word in ("--set", option)), "--dry-run")
    assert refused.code == 1 and "entropy_teacher" in refused.stderr and "needs [entropy_training]" in refused.stderr


def test_a_teacher_that_cannot_teach_is_refused_before_the_run_folder_is_claimed(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    def refused(*options: str) -> str:
        settings = [word for option in options for word in ("--set", option)]
        finished = blt_command("train", tiny_toml, *settings, "--out", tmp_path / "new")
        assert finished.code == 1 and not (tmp_path / "new").exists()
        return str(finished.stderr)

    assert "no such model folder" in refused("entropy_teacher=./nonesuch")
    long_rows = ["model.max_bytes=1024", "entropy_training.row_bytes=513"]
    assert "exceeds the 512 positions" in refused(f"entropy_teacher={tiny_training.run}", *long_rows)
    spaces = ["entropy_training=none", "model.entropy_model=none", "model.patching.rule=space"]
    options = [word for value in [*spaces, "training.total_bytes=128"] for word in ("--set", value)]
    assert blt_command("train", tiny_toml, *options, "--out", tmp_path / "spaces").code == 0
    assert "has no entropy model" in refused(f"entropy_teacher={tmp_path / 'spaces'}")
