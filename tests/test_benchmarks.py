"""Benchmarks run, measure what they say, and compare like with like; how fast anything is, no test says."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Training
from torch import nn

from blt.incremental import Networks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
IN_EVERY_ROW = {"model", "context", "batch", "mode", "ours_bytes_per_second", "bytes_per_latent_call"}


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of the benchmarks folder, which is no package, by its name; what takes long is made short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(importlib.import_module("machine"), "READ_BYTES", 2**20)
        patch.setattr(importlib.import_module("decode_sides"), "CALIBRATION_BYTES", 32)
        yield importlib.import_module


@pytest.fixture(scope="module")
def sides(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("decode_sides")


@pytest.fixture(scope="module")
def networks(sides: ModuleType) -> Networks:
    found = sides.random_networks(sides.shape("tiny"))
    assert isinstance(found, Networks)
    return found


def test_decode_reports_every_side_in_one_json_object(
    script: Callable[[str], ModuleType],
    tiny_training: Training,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text, out = tiny_training.run.parent / "text", tmp_path / "new" / "decode.json"
    arguments = ["--size", "tiny", "--json", "--model", tiny_training.run, "--data", text, "--out", out]
    script("decode").main([str(argument) for argument in arguments])
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    assert found["command"].startswith("python benchmarks/decode.py --size tiny")
    assert found["machine"].keys() >= {"cpu", "threads", "torch", "load_at_begin", "load_at_end", "read_gb_per_second"}
    assert found["summary"].keys() >= {"cost_ratio_60_to_20", "cost_ratio_60_to_20_llama", "cost_ratio_60_to_20_hf"}
    rows = found["rows"]
    assert all(row.keys() >= IN_EVERY_ROW for row in rows)
    assert not [value for row in rows for value in row.values() if isinstance(value, list | dict)]
    random, trained = ([row for row in rows if row["model"] == model] for model in ("tiny", "run"))
    eager = [row for row in random if row["mode"] == "eager"]
    assert [(row["context"], row["batch"], "hf_ratio" in row) for row in eager] == [
        (20, 1, True),
        (60, 1, True),
        (20, 2, False),  # transformers' batched generation is wrong
    ]
    assert all(row["llama_ratio"] > 0 and row["bandwidth_fraction"] > 0 for row in eager)
    assert {row["mode"] for row in random} == {"eager", "speculative", "long"}
    assert [(row["mode"], row["temperature"]) for row in trained] == [
        *(("eager", 0), ("speculative", 0)),
        *(("eager", 0.9), ("speculative", 0.9)),
    ]
    assert all(("speculation_ratio" in row) == (row["mode"] == "speculative") for row in random + trained)
    assert all(row["same_text"] for row in trained if row["temperature"] == 0)


def test_transformers_side_of_decode_writes_what_ours_writes(sides: ModuleType, networks: Networks) -> None:
    ours, theirs = sides.Ours(networks, temperature=0.0), sides.HuggingFaceBlt(sides.HuggingFaceBlt.model_of(networks))
    for side in (ours, theirs):
        side.read([sides.random_prompt(30, seed=1)])
        side.write(12)
    assert theirs.ids[0].tolist() == ours.text()
    assert ours.weight_bytes() == theirs.weight_bytes()


def test_every_weight_but_tables_is_read_by_a_step_or_by_a_latent_call(sides: ModuleType, networks: Networks) -> None:
    parts = [part for module in (networks.entropy_model, networks.network) if module for part in module.modules()]
    looked_up = sum(part.weight.nbytes for part in parts if isinstance(part, nn.Embedding))
    norms = sum(part.weight.nbytes for part in parts if isinstance(part, nn.RMSNorm))
    assert looked_up and norms
    rest = sides.Ours(networks, temperature=0.0).weight_bytes() - looked_up
    assert rest - norms <= sum(sides.matrices_read(networks)) <= rest


def test_a_token_of_the_llama_reads_as_much_as_a_patch_and_its_bytes(sides: ModuleType, networks: Networks) -> None:
    per_step, per_patch = sides.matrices_read(networks)
    model = sides.Llama.model_like(networks)
    read = sides.Llama(model).weight_bytes() - model.get_input_embeddings().weight.nbytes
    assert read == pytest.approx(per_patch + 4.4 * per_step, rel=0.01)


def test_help_of_benchmarks_does_not_wait_for_torch() -> None:
    timed = [sys.executable, "-X", "importtime", str(BENCHMARKS / "decode.py"), "--help"]
    child = subprocess.run(timed, capture_output=True, text=True, check=True)
    assert child.stdout.startswith("usage: decode.py") and "--quick" in child.stdout
    imported = {line.split("|")[-1].strip() for line in child.stderr.splitlines() if line.startswith("import time:")}
    assert "machine" in imported and not imported & {"torch", "transformers", "numpy"}
