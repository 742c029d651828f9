"""The command line keeps its promises: exit codes, one JSON object on stdout, progress on stderr, bytes as they are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.config import RunConfig
from blt.language_model import load

Blt = Callable[..., Any]
COMMANDS = ["doctor", "demo", "train", "entropies", "evaluate", "generate", "patch", "flops"]
EVALUATION_KEYS = {"bits_per_byte", "bytes", "patches", "mean_patch_bytes", "entropy_model_bits_per_byte"}
GENERATION_KEYS = {"text", "bytes", "new_bytes", "seconds", "bytes_per_second", "latent_calls"}
SAMPLED = ["--temperature", "1", "--max-bytes", "30"]


@pytest.fixture
def run(tiny_training: Any) -> Path:
    """The tiny run, to be read only."""
    return tiny_training.run


# help and exit codes


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(command: str, blt_command: Blt) -> None:
    shown = blt_command(*command.split(), "--help")
    assert shown.code == 0 and shown.stdout.decode().startswith(f"Usage: blt {command}".rstrip())
    assert shown.stderr == ""


def test_without_a_command_the_commands_are_listed(blt_command: Blt) -> None:
    shown = blt_command()
    assert shown.code == 0 and all(command in shown.stdout.decode() for command in COMMANDS)


def test_the_version_is_the_packages(blt_command: Blt) -> None:
    import blt

    assert blt_command("--version").stdout.decode().strip() == blt.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonesuch"],
        ["generate"],
        ["flops", "demo", "--nonesuch"],
        ["flops", "demo", "--patch-bytes", "many"],
        ["generate", "model", "prompt", "--max-bytes", "many"],
        ["evaluate", "model", "--dtype", "float16"],
        ["patch", "model", "text", "more"],
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_understood_ends_with_code_2(arguments: list[str], blt_command: Blt) -> None:
    refused = blt_command(*arguments)
    assert refused.code == 2 and refused.stdout == b""
    assert refused.stderr.startswith("blt: ") and "--help" in refused.stderr and "Traceback" not in refused.stderr


def test_a_command_that_fails_ends_with_code_1_and_nothing_on_stdout(blt_command: Blt) -> None:
    failed = blt_command("patch", "./nonesuch", "text", "--json")
    assert failed.code == 1 and failed.stdout == b"" and failed.stderr.startswith("blt: ")


# train


def test_training_prints_its_evaluation_as_one_json_object(tiny_training: Any) -> None:
    figures = tiny_training.finished.json
    assert set(figures) >= EVALUATION_KEYS | {"files"}
    assert figures == json.loads((tiny_training.run / "evaluation.json").read_text())


def test_training_leaves_the_run_folder_that_is_documented(tiny_training: Any) -> None:
    run = tiny_training.run
    assert {"config.toml", "metrics.jsonl", "model", "state", "report.html"} <= {path.name for path in run.iterdir()}
    weights = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= weights
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "bytes_seen", "train_bits_per_byte", "bytes_per_second"} <= set(reports[0])
    assert any("valid_bits_per_byte" in report for report in reports)
    assert not list(run.rglob("*.partial*"))


def test_progress_goes_to_stderr_one_plain_line_per_report(tiny_training: Any) -> None:
    lines = tiny_training.finished.stderr.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines if line.startswith("network ")] == ["50", "100"]
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_dry_run_trains_nothing_and_leaves_nothing(tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = blt_command("train", tiny_toml, "--out", out, "--dry-run")
    assert shown.code == 0 and not out.exists()
    printed = shown.stdout.decode()
    assert "[model.local_encoder]" in printed and "Parameters" in printed and "FLOPs per byte" in printed


def test_a_run_is_not_trained_over_and_the_way_out_is_named(
    trained_run: Path, tiny_toml: Path, blt_command: Blt
) -> None:
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    refused = blt_command("train", tiny_toml, "--out", trained_run)
    assert refused.code == 1 and "--resume" in refused.stderr and "--out" in refused.stderr
    assert before == {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_ends_at_once_with_the_same_evaluation(
    trained_run: Path, tiny_toml: Path, tiny_training: Any, blt_command: Blt
) -> None:
    model, metrics = trained_run / "model" / "model.safetensors", trained_run / "metrics.jsonl"
    before = model.read_bytes(), metrics.read_bytes()
    again = blt_command("train", tiny_toml, "--out", trained_run, "--resume", "--json")
    assert again.json == tiny_training.finished.json
    assert "bits/byte" not in again.stderr  # no training step was reported
    assert (model.read_bytes(), metrics.read_bytes()) == before


def test_a_run_goes_on_from_its_own_config(trained_run: Path, tiny_training: Any, blt_command: Blt) -> None:
    again = blt_command("train", trained_run / "config.toml", "--out", trained_run, "--resume", "--json")
    assert again.json == tiny_training.finished.json


def test_the_data_of_the_command_line_is_what_is_trained_on(tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"the text of {name}, " * 40)
    short = ["--set", "training.total_bytes=128", "--set", "entropy_training.total_bytes=128", "--quiet"]
    data = ["--data", tmp_path / "one.txt", tmp_path / "two.txt"]
    trained = blt_command("train", tiny_toml, *data, *short, "--out", tmp_path / "run", "--seed", "5")
    assert trained.code == 0, trained.stderr
    summary = json.loads((tmp_path / "run" / "corpus" / "summary.json").read_text())
    assert sum(summary["bytes"].values()) == sum((tmp_path / name).stat().st_size for name in ("one.txt", "two.txt"))
    assert (tmp_path / "run" / "config.toml").read_text().count("seed = 5") == 2
    assert trained.stderr == "" and "held out, bits per byte" in trained.stdout.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_saves_and_resume_finishes(tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    longer = [
        "--set",
        "training.total_bytes=19200",
        "--set",
        "training.steps_per_report=1",
        "--out",
        str(tmp_path / "run"),
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "blt", "train", str(tiny_toml), *longer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("network "):
            child.send_signal(signal.SIGINT)
            break
    stdout, rest = child.communicate(timeout=60)
    assert child.returncode == 130, rest
    assert stdout == "" and "everything is saved" in rest and "--resume" in rest and "Traceback" not in rest
    reports = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stopped_at = max(report["step"] for report in reports if report["phase"] == "network")
    assert 0 < stopped_at < 150
    assert load(tmp_path / "run").patches("abc")  # what was saved is a whole model
    finished = blt_command("train", tiny_toml, *longer, "--resume", "--json")
    assert finished.json["bits_per_byte"] > 0 and "entropy model  " not in finished.stderr
    assert [path.name for path in (tmp_path / "run" / "state" / "network").iterdir()] == ["step-150"]


# evaluate


def test_an_evaluation_has_its_figures_in_all_and_per_input(run: Path, blt_command: Blt, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f(x): return x\n" * 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"x = \xff + y")
    (tmp_path / "b" / "two.txt").touch()
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b")]
    evaluated = blt_command("evaluate", run, "--data", *inputs, "--json")
    figures = evaluated.json
    assert set(figures) >= EVALUATION_KEYS | {"files", "empty_documents_skipped"}
    assert list(figures["files"]) == inputs
    for of_input, size in zip(figures["files"].values(), (57, 9), strict=True):
        assert set(of_input) >= EVALUATION_KEYS and of_input["bytes"] == size
    assert figures["bytes"] == 66 and figures["empty_documents_skipped"] == 1
    bits = sum(of_input["bits_per_byte"] * of_input["bytes"] for of_input in figures["files"].values())
    assert figures["bits_per_byte"] == pytest.approx(bits / 66)
    assert figures["patches"] == sum(of_input["patches"] for of_input in figures["files"].values())
    assert evaluated.stderr.startswith("evaluation ")


def test_without_data_a_run_is_evaluated_on_what_it_held_out(run: Path, tiny_training: Any, blt_command: Blt) -> None:
    summary = json.loads((run / "corpus" / "summary.json").read_text())
    figures = blt_command("evaluate", run, "--json", "--quiet").json
    assert figures["bytes"] == summary["bytes"]["held_out"] and list(figures["files"]) == ["held out"]
    assert figures["bits_per_byte"] == pytest.approx(tiny_training.finished.json["bits_per_byte"])


def test_an_evaluation_for_people_names_each_input_and_the_compressors(
    run: Path, tiny_toml: Path, blt_command: Blt
) -> None:
    text = tiny_toml.parent / "text"
    lines = blt_command("evaluate", run, "--data", text / "1.txt", text / "2.txt").stdout.decode().splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(text / "1.txt"), str(text / "2.txt"), "all"]
    assert all("gzip -9" in line and "xz -9e" in line for line in lines)


# generate


def test_a_generation_has_the_promised_keys_and_they_agree(run: Path, blt_command: Blt) -> None:
    figures = blt_command("generate", run, "def", *SAMPLED, "--json").json
    written = bytes.fromhex(figures["bytes"])
    assert set(figures) >= GENERATION_KEYS
    assert figures["text"] == written.decode("utf-8", "replace") and figures["new_bytes"] == len(written) > 0
    assert figures["bytes_per_second"] == pytest.approx(len(written) / figures["seconds"])
    assert 0 < figures["latent_calls"] <= len(written) + 1


def test_the_seed_decides_what_is_drawn(run: Path, blt_command: Blt) -> None:
    def drawn(*seed: str) -> str:
        return blt_command("generate", run, "def", *SAMPLED, *seed, "--json").json["bytes"]

    assert drawn("--seed", "3") == drawn("--seed", "3") != drawn("--seed", "4")
    assert drawn() == drawn("--seed", "0")


def test_raw_output_is_the_bytes_and_nothing_else(run: Path, blt_command: Blt) -> None:
    options = ["def", *SAMPLED, "--seed", "3"]
    written = bytes.fromhex(blt_command("generate", run, *options, "--json").json["bytes"])
    assert blt_command("generate", run, *options, "--raw").stdout == written
    shown = blt_command("generate", run, *options)
    assert shown.stdout.decode() == written.decode("utf-8", "replace") + "\n" and shown.stderr == ""


def test_a_dash_reads_the_prompt_from_stdin_whatever_its_bytes(run: Path, blt_command: Blt) -> None:
    from_stdin = blt_command("generate", run, "-", *SAMPLED, "--raw", stdin="é = ".encode()).stdout
    assert from_stdin == blt_command("generate", run, "é = ", *SAMPLED, "--raw").stdout
    odd = blt_command("generate", run, "-", *SAMPLED, "--raw", stdin=b"\xff\x00\xfe")
    assert odd.stdout == load(run).generate(b"\xff\x00\xfe", 30, temperature=1.0)


def test_text_ends_before_the_first_of_the_stop_strings(run: Path, blt_command: Blt) -> None:
    options = ["def", *SAMPLED, "--utf8", "--json"]
    whole = blt_command("generate", run, *options).json["text"]
    early, late = whole[5:8], whole[20:23]
    stopped = blt_command("generate", run, *options, "--stop", late, "--stop", early).json["text"]
    assert stopped == whole[: min(whole.index(early), whole.index(late))]


def test_with_utf8_nothing_malformed_is_written(run: Path, blt_command: Blt) -> None:
    hot = ["--temperature", "3", "--max-bytes", "40", "--json"]
    written = [bytes.fromhex(blt_command("generate", run, "x", *hot, *more).json["bytes"]) for more in ([], ["--utf8"])]
    assert "\ufffd" in written[0][:-3].decode("utf-8", "replace")
    assert 40 - 3 <= len(written[1]) <= 40 and written[1].decode()  # at the limit no character is begun


def test_speculation_writes_the_same_text_and_tells_what_was_drafted(run: Path, blt_command: Blt) -> None:
    options = ["generate", run, "def f(", "--max-bytes", "40", "--json"]
    plain, speculative = blt_command(*options).json, blt_command(*options, "--speculate", "4").json
    assert speculative["bytes"] == plain["bytes"] and speculative["new_bytes"] == 40
    assert set(speculative) - set(plain) == {"accepted_bytes", "drafted_bytes"}
    assert 0 < speculative["accepted_bytes"] <= speculative["drafted_bytes"]
    assert 0 < speculative["latent_calls"] <= plain["latent_calls"]


@pytest.mark.parametrize("speculate", ["-1", "32"])
def test_a_draft_length_out_of_range_is_refused_and_the_range_is_named(
    speculate: str, run: Path, blt_command: Blt
) -> None:
    refused = blt_command("generate", run, "x", f"--speculate={speculate}")
    assert refused.code == 1 and refused.stdout == b""
    assert "speculate must be 0 (plain) to 31 bytes" in refused.stderr and refused.stderr.count("\n") == 1


def test_stats_are_said_in_one_line_on_stderr(run: Path, blt_command: Blt) -> None:
    said = blt_command("generate", run, "x", "--max-bytes", "20", "--stats", "--speculate", "4")
    assert re.fullmatch(
        r"20 bytes in [\d.]+ s, [\d.]+ bytes/s, [\d.]+ bytes per latent call, \d+ of \d+ drafted bytes accepted\n",
        said.stderr,
    )
    assert "bytes/s" not in said.stdout.decode()
    plain = blt_command("generate", run, "x", "--max-bytes", "20", "--stats")
    assert "bytes per latent call" in plain.stderr and "drafted" not in plain.stderr
    assert plain.stdout == said.stdout


# patch


def test_patches_have_the_promised_keys_and_join_to_the_text(run: Path, blt_command: Blt) -> None:
    text = "def f(é):\n"
    figures = blt_command("patch", run, text, "--json").json
    assert set(figures) == {"patches", "entropies_nats", "threshold_nats"}
    assert b"".join(map(bytes.fromhex, figures["patches"])) == text.encode()
    assert len(figures["entropies_nats"]) == len(text.encode())


@pytest.mark.parametrize("dash", [["-"], []], ids=["dash", "nothing"])
def test_the_text_to_patch_may_come_from_stdin(dash: list[str], run: Path, blt_command: Blt) -> None:
    figures = blt_command("patch", run, *dash, "--json", stdin=b"a\xffb\x00").json
    assert "".join(figures["patches"]) == b"a\xffb\x00".hex()


def test_patches_for_people_are_bars_between_bytes(run: Path, blt_command: Blt) -> None:
    shown = blt_command("patch", run, "def f(x):").stdout.decode()
    patches = blt_command("patch", run, "def f(x):", "--json").json["patches"]
    first = shown.splitlines()[0]
    assert first == "".join("|" + bytes.fromhex(patch).decode() for patch in patches)
    assert f"9 bytes, {len(patches)} patches" in shown


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".json", b'{"patches"'), (".html", b"<!doctype"), (".svg", b"<?xml"), (".png", b"\x89PNG")]
)
def test_a_picture_is_written_in_every_promised_kind(
    suffix: str, begin: bytes, run: Path, blt_command: Blt, tmp_path: Path
) -> None:
    picture = tmp_path / f"patches{suffix}"
    drawn = blt_command("patch", run, "def f(x):\n\t$y$", "-o", picture)
    assert drawn.code == 0 and drawn.stderr == ""
    assert picture.read_bytes().startswith(begin) and list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_drawing_without_matplotlib_names_the_extra(
    suffix: str, run: Path, blt_command: Blt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    refused = blt_command("patch", run, "text", "-o", tmp_path / f"patches{suffix}")
    assert refused.code == 1 and "pip install 'blt-lm[plot]'" in refused.stderr
    assert blt_command("patch", run, "text", "-o", tmp_path / "patches.html").code == 0


def test_training_without_matplotlib_leaves_out_the_report_and_says_so(
    trained_run: Path, tiny_toml: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained_run / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trained = blt_command("train", tiny_toml, "--out", trained_run, "--resume")
    assert trained.code == 0 and "pip install 'blt-lm[plot]'" in trained.stderr
    assert not (trained_run / "report.html").exists()


# flops and doctor


def test_the_released_shape_has_the_released_number_of_parameters(blt_command: Blt) -> None:
    figures = blt_command("flops", "blt_1b", "--json").json
    assert figures["parameters"]["network"] == 4_533_879_808
    assert figures["parameters"]["entropy_model"] == 99_512_064
    assert figures["parameters"]["total"] == 4_533_879_808 + 99_512_064
    assert {"flops_per_byte", "weight_bytes_bfloat16", "training_bytes", "cache_bytes_per_byte"} <= set(figures)
    total = figures["flops_per_byte"]["total"]
    parts = [part for name, part in figures["flops_per_byte"].items() if name != "total"]
    assert total["inference"] == pytest.approx(sum(part["inference"] for part in parts))


def test_a_config_a_run_and_its_model_folder_count_the_same_parameters(
    run: Path, tiny_toml: Path, blt_command: Blt
) -> None:
    counted = [blt_command("flops", model, "--json").json["parameters"] for model in (tiny_toml, run, run / "model")]
    lm = load(run)
    assert counted[0] == counted[1] == counted[2]
    assert counted[0]["network"] == sum(weight.numel() for weight in lm.network.parameters())


def test_flops_for_people_are_tables(blt_command: Blt) -> None:
    shown = blt_command("flops", "demo").stdout.decode()
    assert "Parameters" in shown and "FLOPs per byte" in shown and "Memory" in shown


def test_doctors_findings_are_one_json_object_by_name(blt_command: Blt) -> None:
    figures = blt_command("doctor", "--json").json
    assert {"python", "torch", "device", "disk", "[plot]"} <= set(figures)
    assert all(set(finding) == {"found", "fix"} and finding["found"] for finding in figures.values())


# stdout and stderr


def test_json_is_alone_on_stdout_and_quiet_leaves_stderr_empty(run: Path, tiny_toml: Path, blt_command: Blt) -> None:
    for arguments in (
        ["evaluate", run],
        ["generate", run, "x", "--max-bytes", "3"],
        ["patch", run, "x"],
        ["flops", tiny_toml],
        ["train", tiny_toml, "--dry-run"],
        ["doctor"],
    ):
        finished = blt_command(*arguments, "--json", "--quiet")
        assert finished.json and finished.stdout.count(b"\n") == 1 and finished.stderr == "", arguments


def test_a_reader_that_stops_reading_is_no_reason_for_a_traceback() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "blt", "flops", "blt_1b", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 1 and errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_a_failure_in_one_line() -> None:
    started = time.monotonic()
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "blt", "flops", "blt_1b", "--json"]
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert child.returncode == 1 and b"No space left on device" in child.stderr and b"Traceback" not in child.stderr
    assert time.monotonic() - started < 60


def test_a_path_may_hold_any_character(tiny_toml: Path, tmp_path: Path, blt_command: Blt) -> None:
    text = tmp_path / '📁 é "quoted".txt'
    text.write_text("some text\n" * 300)
    shown = blt_command("train", tiny_toml, "--data", text, "--dry-run", "--json")
    assert shown.json["data"]["paths"] == [str(text)]


def test_the_demo_trains_with_the_entropy_model_that_is_asked_for(
    blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(config: RunConfig, *_: object, **__: object) -> None:
        asked.append((config.model.entropy_model.kind, config.entropy_training is not None))
        raise ValueError("enough")

    monkeypatch.setattr("blt.training_commands._train", refuse)
    for option in ([], ["--entropy-model", "transformer"], ["--entropy-model", "ngram"]):
        assert blt_command("demo", *option).code == 1
    assert asked == [("ngram", False), ("transformer", True), ("ngram", False)]
    assert blt_command("demo", "--entropy-model", "bigram").code == 2


def test_a_config_that_somebody_named_config_is_no_run(
    tiny_toml: Path, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(tiny_toml.read_text())
    trained = blt_command("train", "config.toml", "--set", "training.total_bytes=128", "--json")
    assert trained.code == 0 and Path("runs/config/model").is_dir(), trained.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "runs"]


def test_resuming_what_is_not_there_is_refused(tiny_toml: Path, tmp_path: Path, blt_command: Blt) -> None:
    refused = blt_command("train", tiny_toml, "--out", tmp_path / "nonesuch", "--resume")
    assert refused.code == 1 and "holds no run to resume" in refused.stderr
    assert not (tmp_path / "nonesuch").exists()


def test_a_runs_own_config_names_its_folder(trained_run: Path, blt_command: Blt) -> None:
    assert blt_command("train", trained_run / "config.toml", "--resume", "--json").code == 0
