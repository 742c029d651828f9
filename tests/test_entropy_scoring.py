"""A text is scored as training would score it, whatever happens on the way, and nothing else is taken for it."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import change_entropy_model, stop_after

import blt.entropy_scoring
from blt.corpus import num_rows, open_shard, rows_of
from blt.entropy_cache import open_entropies
from blt.entropy_scoring import Scorer
from blt.language_model import load
from blt.model.patching import entropy_codes, patch_starts

Blt = Callable[..., Any]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a chunk, each on disk at once."""
    monkeypatch.setattr(blt.entropy_scoring, "CHUNK_IDS", 256)
    monkeypatch.setattr(blt.entropy_scoring, "SECONDS_PER_MARK", -1.0)


# what is scored


def test_every_row_has_the_codes_of_what_training_scores(tiny_training: Any, scored: Path) -> None:
    lm, kept = load(tiny_training.run, device="cpu"), open_entropies(scored)
    shard = open_shard(tiny_training.run / "corpus", "train")
    inputs = rows_of(shard, range(num_rows(shard, 32)), 32)[:, :-1]
    entropies = lm.entropies(inputs)
    assert kept.codes.shape == inputs.shape
    found = torch.from_numpy(kept.codes.copy())
    assert (
        found.int() - entropy_codes(entropies, kept.edges).int()
    ).abs().max() <= 1  # sums of other batches round otherwise
    starts = patch_starts(inputs, kept.entropies(range(len(inputs))), lm.config.patching)
    assert starts.equal(lm.patch_starts(inputs))


def test_the_figures_say_what_was_scored(tiny_training: Any, scored: Path, blt_command: Blt) -> None:
    before = (scored / "train.entropies.bin").stat().st_mtime_ns
    finished = blt_command("entropies", tiny_training.run, "--out", scored, "--json")
    shard = open_shard(tiny_training.run / "corpus", "train")
    expected = {"bytes": shard.num_bytes, "rows": num_rows(shard, 32), "rows_scored_now": 0, "out": str(scored)}
    assert finished.json.items() >= expected.items()
    assert "is finished already" in finished.stderr
    assert (scored / "train.entropies.bin").stat().st_mtime_ns == before


def test_the_spec_names_model_text_rows_and_edges(tiny_training: Any, scored: Path) -> None:
    spec = json.loads((scored / "spec.json").read_text())
    lm = load(tiny_training.run)
    assert lm.entropy_model is not None
    assert spec["entropy_model"] == lm.entropy_model.config.model_dump(mode="json")
    assert spec["fingerprint"] == json.loads((scored / "corpus" / "summary.json").read_text())["fingerprint"]
    assert (spec["row_bytes"], spec["held_out_fraction"]) == (32, 0.3)
    assert len(spec["edges_nats"]) == 255 and torch.tensor(lm.config.patching.threshold_nats) in torch.tensor(
        spec["edges_nats"]
    )


# stops, kills, processes


def test_two_processes_that_stop_and_one_that_goes_on_score_what_one_does(
    tiny_training: Any,
    scored: Path,
    tmp_path: Path,
    blt_command: Blt,
    monkeypatch: pytest.MonkeyPatch,
    small_chunks: None,
) -> None:
    command = ["entropies", tiny_training.run, "--out", tmp_path / "cut"]
    with monkeypatch.context() as patched:
        patched.setattr(blt.entropy_scoring, "stop_after_this_step", stop_after(3))
        stopped = blt_command(*command, "--processes", 2)
    assert stopped.code == 130 and "go on with the same command" in stopped.stderr and "Traceback" not in stopped.stderr
    assert json.loads((tmp_path / "cut" / "progress.json").read_text()) == {"rows": 3 * 256 // 32}
    gone_on = blt_command(*command, "--processes", 1, "--json").json
    assert gone_on["rows_scored_now"] == gone_on["rows"] - 3 * 256 // 32
    assert (tmp_path / "cut" / "spec.json").read_bytes() == (scored / "spec.json").read_bytes()
    cut, whole = open_entropies(tmp_path / "cut").codes, open_entropies(scored).codes
    assert abs(cut.astype(int) - whole).max() <= 1 and (cut != whole).mean() < 1e-3  # other chunks, other roundings


def test_kills_at_any_moment_leave_what_goes_on_to_the_same_file(
    tiny_training: Any, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    command = ["entropies", tiny_training.run, "--processes", 1, "--out"]
    assert blt_command(*command, tmp_path / "whole").code == 0
    codes = Scorer.codes

    def slowly(scorer: Scorer, row_indices: range) -> Any:
        time.sleep(0.01)
        return codes(scorer, row_indices)

    monkeypatch.setattr(Scorer, "codes", slowly)
    killed, done = 0, []
    for _ in range(50):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(blt_command(*command, tmp_path / "cut").code)
        time.sleep(0.1 + 0.02 * killed)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        killed += 1
        with pytest.raises((ValueError, FileNotFoundError), match=r"is not finished|holds no entropies"):
            open_entropies(tmp_path / "cut")
        progress = tmp_path / "cut" / "progress.json"
        done.append(json.loads(progress.read_text())["rows"] if progress.exists() else 0)
    assert killed > 2 and done == sorted(done) and len(set(done)) > 2
    names = ("train.entropies.bin", "spec.json")
    assert [(tmp_path / "cut" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


def test_a_scoring_process_that_dies_is_one_message(
    tiny_training: Any, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    monkeypatch.setattr(blt.entropy_scoring, "_enter_worker", os.abort)
    died = blt_command("entropies", tiny_training.run, "--out", tmp_path / "scored", "--processes", 2, "--quiet")
    assert died.code == 1 and "a scoring process died" in died.stderr and died.stderr.count("\n") == 1


def test_a_full_disk_says_where_and_goes_on_once_there_is_space(
    tiny_training: Any, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["entropies", tiny_training.run, "--out", tmp_path / "scored", "--processes", 1, "--quiet"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused = blt_command(*command)
    assert refused.code == 1 and "train.entropies.bin: No space left on device" in refused.stderr
    assert blt_command(*command).code == 0


# a folder that holds something else


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--row-bytes", "64"], "other row_bytes (32, not 64)"),
        (["--held-out-fraction", "0.2"], "another held_out_fraction (0.3, not 0.2)"),
        (["--data", "stdin.txt"], "other text"),
    ],
)
def test_a_folder_of_another_specification_is_not_gone_on_with(
    options: list[str], said: str, tiny_training: Any, copied: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.parent)
    Path("stdin.txt").write_text("some other text\n" * 100)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    refused = blt_command("entropies", tiny_training.run, "--out", copied, *options)
    assert refused.code == 1 and said in refused.stderr and "give another --out" in refused.stderr
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_damaged_end_is_scored_again(tiny_training: Any, scored: Path, copied: Path, blt_command: Blt) -> None:
    os.truncate(copied / "train.entropies.bin", 1000)
    assert blt_command("entropies", tiny_training.run, "--out", copied, "--processes", 1).code == 0
    assert abs(open_entropies(copied).codes.astype(int) - open_entropies(scored).codes).max() <= 1


def changed_threshold(run: Path) -> None:
    file = run / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"patching_threshold": config["patching_threshold"] + 0.001}))


@pytest.mark.parametrize(
    ("change", "said"), [(change_entropy_model, "another entropy model"), (changed_threshold, "another threshold")]
)
def test_another_model_is_not_gone_on_with(
    change: Callable[[Path], None], said: str, trained_run: Path, copied: Path, blt_command: Blt
) -> None:
    change(trained_run)
    refused = blt_command("entropies", trained_run, "--out", copied)
    assert refused.code == 1 and said in refused.stderr and "give another --out" in refused.stderr


def test_a_folder_of_something_else_is_left_alone(tiny_training: Any, tmp_path: Path, blt_command: Blt) -> None:
    (tmp_path / "notes.txt").touch()
    refused = blt_command("entropies", tiny_training.run, "--out", tmp_path)
    assert refused.code == 1 and "holds notes.txt and no spec.json" in refused.stderr and "--out" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--row-bytes", "3"], "row_bytes must be 4 to 512"),
        (["--row-bytes", "513"], "row_bytes must be 4 to 512"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--held-out-fraction", "1.5"], "held_out_fraction"),
        (["--data", "nonesuch"], "no file or folder nonesuch"),
    ],
)
def test_an_option_that_cannot_work_is_refused_before_anything_is_written(
    options: list[str], said: str, tiny_training: Any, tmp_path: Path, blt_command: Blt
) -> None:
    refused = blt_command("entropies", tiny_training.run, "--out", tmp_path / "scored", *options)
    assert refused.code == 1 and said in refused.stderr and not (tmp_path / "scored" / "spec.json").exists()


def test_a_model_folder_needs_a_text_and_a_model_needs_an_entropy_model(
    tiny_training: Any, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    refused = blt_command("entropies", tiny_training.run / "model", "--out", tmp_path / "scored")
    assert refused.code == 1 and "--data" in refused.stderr
    spaces = ["entropy_training=none", "model.entropy_model=none", "model.patching.rule=space"]
    options = [word for value in [*spaces, "training.total_bytes=128"] for word in ("--set", value)]
    assert blt_command("train", tiny_toml, *options, "--out", tmp_path / "spaces").code == 0
    refused = blt_command("entropies", tmp_path / "spaces", "--out", tmp_path / "scored")
    assert refused.code == 1 and "has no entropy model to score with: its patching rule is 'space'" in refused.stderr


def test_models_that_count_ngrams_are_neither_scored_nor_taken_as_teachers(
    tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    counted = ["entropy_training=none", 'model.entropy_model={kind="ngram", table_bits=8}', "training.total_bytes=128"]
    options = [word for value in counted for word in ("--set", value)]
    assert blt_command("train", tiny_toml, *options, "--out", tmp_path / "ngrams").code == 0
    refused = blt_command("entropies", tmp_path / "ngrams", "--out", tmp_path / "scored")
    assert refused.code == 1 and "n-gram tables as fast as it could read them" in refused.stderr
    taught = ["--set", f"entropy_teacher={tmp_path / 'ngrams'}", "--out", tmp_path / "taught"]
    refused = blt_command("train", tiny_toml, *taught)
    assert refused.code == 1 and "counts n-grams and predicts no byte" in refused.stderr
    sidecar = ["--set", "data.entropies=scored", "--out", tmp_path / "read"]
    refused = blt_command("train", tiny_toml, *options, *sidecar)
    assert refused.code == 1 and "looks them up as fast as they are read" in refused.stderr
