"""Training: the loss falls, and a run that stops at any moment goes on as if it had not."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import blt.train
from blt.byte_ids import BOS
from blt.checkpoint import load_state, save_state, saved_steps
from blt.config import ModelConfig, RunConfig, TrainingConfig
from blt.corpus import num_rows, open_shard, row_ids
from blt.language_model import LanguageModel, load
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.patching import mean_patch_bytes, patch_starts
from blt.model.transformer import initialise
from blt.optimise import Metrics, build_optimizer, learning_rate_factor, next_id_loss
from blt.progress import Reporter
from blt.train import train

CPU = torch.device("cpu")
STACK = {"num_layers": 1, "width": 16, "num_heads": 2, "ffn_width": 24}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    words = random.Random(0).choices(["def", "return", "x", "y", "=", "+", "(", ")", ":", "\n    ", "value"], k=4000)
    (tmp_path / "text").mkdir()
    for part in range(8):
        (tmp_path / "text" / f"{part}.txt").write_text(" ".join(words[part * 500 : (part + 1) * 500]))
    return tmp_path / "text"


def run_config(text: Path, rule: str = "entropy", **training: object) -> RunConfig:
    shape = {"row_bytes": 64, "rows_per_step": 4, "steps_per_report": 4, "steps_per_save": 5, "evaluation_bytes": 500}
    shape |= {"learning_rate": 1e-2, "warmup_steps": 2, "dtype": "float32", "steps_per_evaluation": 10}
    entropic = rule.startswith("entropy")
    return RunConfig.model_validate(
        {
            "data": {"paths": [str(text)], "held_out_fraction": 0.3},
            "model": {
                "entropy_model": STACK | {"window_positions": 32} if entropic else None,
                "patching": {"rule": rule} | ({"patch_bytes": 4} if rule == "fixed" else {}),
                "hash_embeddings": {"table_rows": 64},
                "local_encoder": STACK,
                "latent": STACK | {"width": 32},
                "local_decoder": STACK,
            },
            "entropy_training": {**shape, "total_bytes": 4 * 64 * 12} if entropic else None,
            "calibration": {"target_patch_bytes": 3.0, "sample_bytes": 2000},
            "training": {**shape, "total_bytes": 4 * 64 * 20, **training},
        }
    )


def run(config: RunConfig, folder: Path, resume: bool = False) -> LanguageModel:
    with Reporter(quiet=True) as reporter:
        return train(config, folder, CPU, resume, reporter)


def losses(folder: Path) -> list[tuple[str, int, float]]:
    reports = Metrics(folder / "metrics.jsonl").read()
    return [(r["phase"], r["step"], r["train_bits_per_byte"]) for r in reports if "train_bits_per_byte" in r]


def weights_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    assert lm.entropy_model is not None
    return {**lm.network.state_dict(), **{f"entropy.{k}": v for k, v in lm.entropy_model.state_dict().items()}}


class StopAfter:
    """Asks the loop to stop once it has asked this many times: a Ctrl-C at a known step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("rule", ["entropy", "entropy_rise", "space", "fixed"])
def test_twenty_steps_lower_the_loss(rule: str, text_file: Path, tmp_path: Path) -> None:
    run(run_config(text_file, rule), tmp_path / "run")
    of_network = [loss for phase, _, loss in losses(tmp_path / "run") if phase == "network"]
    assert of_network[-1] < of_network[0] - 0.5


@pytest.mark.parametrize("stop_after", [3, 12, 15, 27])
def test_a_run_stopped_at_any_step_resumes_to_the_bit(
    stop_after: int, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(text_file, micro_batches=2)
    whole = run(config, tmp_path / "whole")

    class Stopping:
        def __enter__(self) -> StopAfter:
            return StopAfter(stop_after)

        def __exit__(self, *_: object) -> None:
            pass

    with monkeypatch.context() as patched:
        patched.setattr(blt.train, "stop_after_this_step", Stopping)
        if stop_after != 12:  # at the very end of the entropy model there is nothing to interrupt
            with pytest.raises(KeyboardInterrupt):
                run(config, tmp_path / "cut")
        else:
            run(config, tmp_path / "cut")
    resumed = run(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def with_ngrams(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with n-gram statistics instead of the transformer."""
    values = config.model_dump() | {"entropy_training": None} | changes
    values["model"]["entropy_model"] = {"kind": "ngram", "max_order": 4, "table_bits": 10, "backoff": 4.0}
    values["model"]["hash_embeddings"] |= {"min_count": 3, "filter_bits": 12}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("stop_after", [1, 12])
def test_a_run_with_ngram_statistics_resumes_to_the_bit(
    stop_after: int, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_ngrams(run_config(text_file))
    whole = run(config, tmp_path / "whole")
    stopping = contextlib.nullcontext(StopAfter(stop_after))
    with monkeypatch.context() as patched:
        patched.setattr(blt.train, "stop_after_this_step", lambda: stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    resumed = run(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    assert resumed.network.local_encoder.hash_embeddings.frequent.any()
    reports = Metrics(tmp_path / "cut" / "metrics.jsonl").read()
    (counted,) = [report for report in reports if report["phase"] == "entropy model"]
    assert counted["bytes_seen"] == open_shard(tmp_path / "cut" / "corpus", "train").num_bytes
    assert counted["contexts"].keys() == {"2", "3", "4"} and counted["train_seconds"] > 0


def test_ngram_statistics_that_are_counted_again_are_the_same(text_file: Path, tmp_path: Path) -> None:
    """A run that dies before its network has a state counts its text once more."""
    config = with_ngrams(run_config(text_file))
    first = run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    again = run(config, tmp_path / "run", resume=True)
    for name, weight in weights_of(first).items():
        assert torch.equal(weight, weights_of(again)[name]), name
    phases = [report["phase"] for report in Metrics(tmp_path / "run" / "metrics.jsonl").read()]
    assert phases.count("entropy model") == 1


def test_a_model_with_ngram_statistics_is_the_same_on_disk_and_gives_them_to_other_runs(
    text_file: Path, tmp_path: Path
) -> None:
    lm = run(with_ngrams(run_config(text_file)), tmp_path / "run")
    again = load(tmp_path / "run", device="cpu")
    assert again.config == lm.config
    for name, weight in weights_of(lm).items():
        assert torch.equal(weight, weights_of(again)[name]), name
    assert lm.generate("value = ", 20) == again.generate("value = ", 20)
    taken = with_ngrams(run_config(text_file), pretrained_entropy_model=str(tmp_path / "run"))
    other = run(taken, tmp_path / "other")
    assert weights_of(other)["entropy.slots"].equal(weights_of(lm)["entropy.slots"])


def test_gradient_accumulation_changes_the_memory_and_not_the_loss(text_file: Path, tmp_path: Path) -> None:
    run(run_config(text_file, "fixed"), tmp_path / "one")
    run(run_config(text_file, "fixed", micro_batches=4), tmp_path / "four")
    for (_, _, one), (_, _, four) in zip(losses(tmp_path / "one"), losses(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, abs=2e-3)


def test_the_model_on_disk_is_the_model_in_memory(text_file: Path, tmp_path: Path) -> None:
    lm = run(run_config(text_file), tmp_path / "run")
    again = load(tmp_path / "run", device="cpu")
    assert again.config == lm.config
    ids = lm.encode("value = x + y")
    assert torch.equal(lm.network(ids, lm.patch_starts(ids)), again.network(ids, again.patch_starts(ids)))


def test_calibration_reports_the_patch_size_it_reached_on_both_sides(text_file: Path, tmp_path: Path) -> None:
    lm = run(run_config(text_file), tmp_path / "run")
    (report,) = [r for r in Metrics(tmp_path / "run" / "metrics.jsonl").read() if r["phase"] == "calibration"]
    assert report["train_patch_bytes"] == pytest.approx(3.0, rel=0.02)
    held_out = open_shard(tmp_path / "run" / "corpus", "held_out")
    rows = torch.stack([torch.from_numpy(row_ids(held_out, row, 64)[:-1]) for row in range(num_rows(held_out, 64))])
    assert report["valid_patch_bytes"] == pytest.approx(mean_patch_bytes(rows, lm.patch_starts(rows)), rel=0.05)
    assert lm.config.patching.threshold_nats == report["threshold_nats"]


def test_a_threshold_in_the_config_is_kept(text_file: Path, tmp_path: Path) -> None:
    config = run_config(text_file)
    patching = config.model.patching.model_copy(update={"threshold_nats": 2.5})
    config = config.model_copy(update={"model": config.model.model_copy(update={"patching": patching})})
    assert run(config, tmp_path / "run").config.patching.threshold_nats == 2.5


def test_an_entropy_model_from_another_run_is_taken_as_it_is(text_file: Path, tmp_path: Path) -> None:
    first = run(run_config(text_file), tmp_path / "first")
    values = run_config(text_file).model_dump()
    values |= {"entropy_training": None, "pretrained_entropy_model": str(tmp_path / "first")}
    second = run(RunConfig.model_validate(values), tmp_path / "second")
    assert first.entropy_model is not None
    assert second.entropy_model is not None
    for name, weight in first.entropy_model.state_dict().items():
        assert torch.equal(weight, second.entropy_model.state_dict()[name])


def test_an_entropy_model_of_another_shape_is_refused(text_file: Path, tmp_path: Path) -> None:
    run(run_config(text_file), tmp_path / "first")
    values = run_config(text_file).model_dump()
    values |= {"entropy_training": None, "pretrained_entropy_model": str(tmp_path / "first")}
    values["model"]["entropy_model"]["num_layers"] = 2
    with pytest.raises(ValueError, match=r"another entropy model than \[model.entropy_model\]"):
        run(RunConfig.model_validate(values), tmp_path / "second")


def test_a_folder_with_a_run_is_not_overwritten(text_file: Path, tmp_path: Path) -> None:
    run(run_config(text_file, "fixed"), tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        run(run_config(text_file, "fixed"), tmp_path / "run")


@pytest.mark.parametrize("leftover", ["corpus", "state", "model"])
def test_a_folder_with_something_of_that_name_is_not_taken_over(leftover: str, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / leftover).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=f"{leftover} is there, but no config.toml"):
        run(run_config(text_file, "fixed"), tmp_path / "run")


def test_an_unreachable_patch_size_costs_no_training(text_file: Path, tmp_path: Path) -> None:
    config = run_config(text_file)
    impossible = config.calibration.model_copy(update={"target_patch_bytes": 5000.0})
    with pytest.raises(ValueError, match=r"set another calibration\.target_patch_bytes"):
        run(config.model_copy(update={"calibration": impossible}), tmp_path / "run")
    trained = saved_steps(tmp_path / "run" / "state" / "entropy_model")
    run(config, tmp_path / "run", resume=True)
    assert trained == [12]
    assert losses(tmp_path / "run")[-1][:2] == ("network", 20)


def test_resuming_with_another_config_is_refused(text_file: Path, tmp_path: Path) -> None:
    run(run_config(text_file, "fixed"), tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_text()
    shutil.rmtree(tmp_path / "run" / "state")
    other = run_config(text_file, "fixed", learning_rate=0.5)
    other = other.model_copy(update={"calibration": other.calibration.model_copy(update={"target_patch_bytes": 9.0})})
    with pytest.raises(ValueError, match="started with another config"):
        run(other, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_a_loss_that_explodes_stops_the_run_with_advice(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower learning_rate"):
        run(run_config(text_file, "fixed", learning_rate=1e30, clip_norm=1e30), tmp_path / "run")


def test_twenty_kills_while_saving_leave_a_loadable_state(tmp_path: Path) -> None:
    """A child saves without pause and is killed at random moments; what is there loads, and is one whole step."""
    random_pause, folder, last_seen = random.Random(1), tmp_path / "state", 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            model, optimizer = _model_at(0)
            for step in range(last_seen + 1, last_seen + 10_000):
                _set_all(model, optimizer, step)
                save_state(folder, step, model, optimizer, {"rows_read": step})
            os._exit(0)
        while saved_steps(folder)[-1:] <= [last_seen]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(random_pause.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model, optimizer = _model_at(0)
        step, position = load_state(folder, model, optimizer, {"rows_read": 0})
        assert step > last_seen
        assert position == {"rows_read": step}
        assert all(bool((weight == step).all()) for weight in model.parameters())
        last_seen = step


def _model_at(value: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    _set_all(model, optimizer, value)
    return model, optimizer


@torch.no_grad()
def _set_all(model: nn.Module, optimizer: torch.optim.Optimizer, value: int) -> None:
    for weight in model.parameters():
        weight.fill_(value)
        optimizer.state[weight]["exp_avg"].fill_(value)


def test_a_damaged_state_is_named_with_the_way_out(tmp_path: Path) -> None:
    model, optimizer = _model_at(1)
    save_state(tmp_path, 1, model, optimizer, {"rows_read": 1})
    for file in (tmp_path / "step-1").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-1 is damaged .*delete it"):
        load_state(tmp_path, model, optimizer, {"rows_read": 0})


def test_a_save_that_fails_leaves_the_last_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _model_at(1)
    save_state(tmp_path, 1, model, optimizer, {"rows_read": 1})

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.distributed.checkpoint, "save", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*--resume"):
        save_state(tmp_path, 2, model, optimizer, {"rows_read": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_metrics_cut_by_a_dying_process_are_mended(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.write({"phase": "network", "step": step})
    with metrics.path.open("a") as file:
        file.write('{"phase": "netw')
    metrics.forget_after("network", 20)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [10, 20]


def test_matrices_decay_and_norms_and_tables_do_not(text_file: Path) -> None:
    from blt.model.byte_latent_transformer import ByteLatentTransformer

    network = ByteLatentTransformer(run_config(text_file, "fixed").model)
    training = TrainingConfig(total_bytes=1, table_learning_rate=0.5, weight_decay=0.3)
    groups = build_optimizer(network, training).param_groups
    names = {id(weight): name for name, weight in network.named_parameters()}
    decayed, bytes_, tables, rest = ({names[id(weight)] for weight in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0, 0.0]
    assert [group["peak_lr"] == 0.5 for group in groups] == [False, True, True, False]
    assert [group.get("by_row", False) for group in groups] == [False, False, True, False]
    assert all(name.endswith("norm.weight") for name in rest)
    assert bytes_ == {"local_encoder.byte_embedding.weight"}
    assert tables == {"local_encoder.hash_embeddings.tables.weight"}
    assert len(decayed) + len(bytes_) + len(tables) + len(rest) == len(names)


def test_the_schedules_warm_up_and_end_at_zero() -> None:
    shape = {"total_bytes": 400, "row_bytes": 4, "rows_per_step": 1, "warmup_steps": 10}
    cosine = TrainingConfig(**shape)
    stable = TrainingConfig(**shape, schedule="warmup_stable_decay", decay_fraction=0.2)
    for config in (cosine, stable):
        factors = [learning_rate_factor(step, config) for step in range(100)]
        assert factors[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert 0 < factors[-1] < 0.06
    assert learning_rate_factor(79, stable) == 1.0
    assert learning_rate_factor(55, cosine) == pytest.approx(0.5)


def test_padding_and_the_bos_after_an_eos_are_not_targets() -> None:
    logits = torch.zeros(1, 4, 260)
    nats = next_id_loss(logits, torch.tensor([[70, 2, 1, 0]]))
    assert nats == pytest.approx(2 * torch.tensor(260.0).log().item())


def test_auto_precision_is_decided_once_and_written_down(text_file: Path, tmp_path: Path) -> None:
    config = run_config(text_file, "fixed", dtype="auto")
    run(config, tmp_path / "run")
    assert 'dtype = "auto"' not in (tmp_path / "run" / "config.toml").read_text()
    shutil.rmtree(tmp_path / "run" / "state")
    run(config, tmp_path / "run", resume=True)


def test_bf16_training_stays_close_to_fp32(text_file: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        run(run_config(text_file, "fixed", dtype=dtype), tmp_path / dtype)
    assert losses(tmp_path / "bfloat16")[-1][2] == pytest.approx(losses(tmp_path / "float32")[-1][2], abs=0.15)


def test_the_latent_transformer_learns_what_local_parts_cannot_see() -> None:
    """One of 8 letters comes again after 15 bytes that tell nothing; windows of 6 bytes do not reach from one to the other."""
    local = STACK | {"window_positions": 6}
    patching = {"rule": "fixed", "patch_bytes": 4}
    tables = {"table_rows": 1}
    config = ModelConfig.model_validate(
        {"entropy_model": None, "patching": patching, "hash_embeddings": tables, "local_encoder": local}
        | {"latent": STACK | {"num_layers": 2, "width": 32}, "local_decoder": local}
    )
    network, chance = ByteLatentTransformer(config), torch.Generator().manual_seed(0)
    initialise(network, chance)
    training = TrainingConfig(total_bytes=1, learning_rate=1e-2, matrix_optimizer="muon", dtype="float32")
    optimizer = build_optimizer(network, training)
    for _ in range(120):
        letters = torch.randint(200, 208, (32, 1), generator=chance)
        filler = torch.arange(100, 115).expand(32, -1)
        ids = torch.cat([torch.full_like(letters, BOS), letters, filler, letters], dim=1)
        before_it = network(ids, patch_starts(ids, None, config.patching))[:, -2]
        nats = F.cross_entropy(before_it, letters.squeeze(1))
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
    assert nats < 0.5 * math.log(8)
