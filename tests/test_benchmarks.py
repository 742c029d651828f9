"""Benchmarks run, measure what they say, and compare like with like; how fast anything is, no test says."""

import importlib
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import Training
from torch import nn

from blt.incremental import Networks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
IN_EVERY_TRAINING_ROW = {
    *("comparison", "config", "row_bytes", "rows_per_step", "table_rows", "dtype", "entropies"),
    *("ours_bytes_per_second", "mean_patch_bytes", "training_flops_per_byte", "mfu"),
}
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


def test_train_reports_every_comparison_in_one_json_object(
    script: Callable[[str], ModuleType], tiny_training: Training, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "train.json"
    arguments = ["--size", "tiny", "--json", "--data", tiny_training.run.parent / "text", "--dtype", "float32"]
    script("train").main([str(argument) for argument in [*arguments, "--set", "clip_norm=2.0", "--out", out]])
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    assert found["command"].startswith("python benchmarks/train.py --size tiny")
    rows = found["rows"]
    assert all(row.keys() >= IN_EVERY_TRAINING_ROW and row["clip_norm"] == 2.0 for row in rows)
    assert not [value for row in rows for value in row.values() if isinstance(value, list | dict)]
    huggingface, tokens, tables = (
        [row for row in rows if row["comparison"] == name] for name in ("huggingface", "tokens", "tables")
    )
    assert [(row["row_bytes"], row.get("hf_ratio", 0) > 0) for row in huggingface] == [
        *((64, True), (128, True)),
        (256, False),  # not asked of transformers
    ]
    assert all("growth" in row and 4 < row["mean_patch_bytes"] < 5 for row in huggingface)
    assert [row["entropies"] for row in tokens] == ["precomputed", "precomputed", "on the fly"]
    assert all(row["token_ratio"] > 0 and row["token_flops_ratio"] == pytest.approx(1, abs=0.02) for row in tokens)
    assert [row["table_rows"] for row in tables] == [50, 500] and tables[0]["table_cost_ratio"] == 1
    if sys.platform == "linux":
        assert all(row["ours_peak_bytes"] > row["ours_beyond_bytes"] > 0 for row in huggingface + tables)
        assert [row["hf_memory_ratio"] > 0 for row in huggingface[:2]] == [True, True]


def test_tables_updates_few_rows_and_many(
    script: Callable[[str], ModuleType], tiny_training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    script("tables").main(["--size", "tiny", "--json", "--data", str(tiny_training.run.parent / "text")])
    few, many = json.loads(capsys.readouterr().out)["rows"]
    assert few["table_rows"] < many["table_rows"] and few["rows_touched"] < many["rows_touched"]
    assert few["cost_ratio"] == 1.0 and many["ms"] / few["ms"] == pytest.approx(many["cost_ratio"], rel=1e-2)


def test_train_refuses_to_time_models_that_compute_different_losses(script: Callable[[str], ModuleType]) -> None:
    sides = script("train_sides")
    mode = sides.Mode("float32")
    ours, text = sides.Ours(sides.sized("tiny"), mode), sides.Text(bytes(range(256)) * 4)
    theirs, row = sides.HuggingFaceBlt(ours.models, mode), text.rows(64, 1, seed=0)
    for side in (ours, theirs):
        side.set_threshold(ours.threshold_for(row))
    assert sides.require_same_loss(ours, theirs, row) <= 1e-5
    for side in (ours, theirs):
        assert side.step(row).num_bytes == 64
    tables = ours.models.config.hash_embeddings  # of whose rows ours remembers when each was read
    last_read = 4 * tables.num_tables * tables.table_rows
    assert ours.kept_bytes() - last_read == pytest.approx(theirs.kept_bytes(), rel=1e-4)
    with torch.no_grad():
        theirs.model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="nothing to compare"):
        sides.require_same_loss(ours, theirs, row)


def test_transformers_side_of_train_cuts_where_ours_cuts_in_bfloat16_too(script: Callable[[str], ModuleType]) -> None:
    sides = script("train_sides")
    ours, text = sides.Ours(sides.sized("tiny"), sides.Mode("bfloat16")), sides.Text(bytes(range(256)) * 4)
    theirs, rows = sides.HuggingFaceBlt(ours.models, sides.Mode("bfloat16")), text.rows(128, 1, seed=0)
    for side in (ours, theirs):
        side.set_threshold(ours.threshold_for(rows))
    lengths: list[int] = []
    patcher = theirs.model.model.patcher
    patcher.register_forward_hook(lambda module, given, returned: lengths.extend(returned[1][0].tolist()))
    theirs.step(rows)
    starts = ours.models.patch_starts(rows[:, :-1])[0].nonzero().flatten()
    assert lengths == torch.diff(starts, append=torch.tensor([128])).tolist()


@pytest.mark.parametrize("wanted", [6e6, 4.7e7, 3e8])
def test_a_token_model_costs_the_flops_per_byte_that_it_is_asked_for(
    script: Callable[[str], ModuleType], wanted: float
) -> None:
    from blt.flops import token_model_flops_per_byte

    sides = script("train_sides")
    like = sides.sized("25m").latent
    found = sides.equal_flops_config(like, wanted, row_bytes=512, bytes_per_token=3.5, vocabulary=4096)
    assert token_model_flops_per_byte(found, 512, 3.5, 4096) == pytest.approx(wanted, rel=0.02)
    with pytest.raises(ValueError, match="no token model"):
        sides.equal_flops_config(like, 10.0, row_bytes=512, bytes_per_token=3.5, vocabulary=4096)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what a process holds")
def test_a_process_that_takes_too_much_memory_or_time_is_ended_with_a_reason(
    script: Callable[[str], ModuleType],
) -> None:
    memory = script("train_memory")
    asked = memory.Request("ours", "tiny", {"dtype": "float32"}, ((64, 1),), text="", threads=1)
    assert "more than the 0.0 GB" in memory.measure_in_child(asked, b"text" * 100, seconds=60, limit_bytes=1).reason
    assert "not done after 0 seconds" in memory.measure_in_child(asked, b"text" * 100, seconds=0).reason


def test_an_option_that_training_does_not_have_is_named(
    script: Callable[[str], ModuleType], tiny_training: Training
) -> None:
    text = str(tiny_training.run.parent / "text")
    with pytest.raises(SystemExit, match=r"train\.py: --set: nonesuch: unknown key"):
        script("train").main(["--size", "tiny", "--data", text, "--set", "nonesuch=1"])


@pytest.fixture
def evaluation_texts(tmp_path: Path) -> Path:
    """A folder with one evaluation file of two languages."""
    with lzma.open(tmp_path / "code.test.jsonl.xz", "wt", encoding="utf-8") as file:
        for lang in ("python", "go", "python"):
            file.write(json.dumps({"lang": lang, "text": f"for line in {lang}: print(line, 'ü')\n" * 20}) + "\n")
    return tmp_path


def test_patch_reports_speed_and_cuts_in_one_json_object(
    script: Callable[[str], ModuleType],
    tiny_training: Training,
    evaluation_texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, text = tiny_training.run, tiny_training.run.parent / "text"
    arguments = ["--size", "tiny", "--json", "--model", run, "--data", text, "--texts", evaluation_texts]
    script("patch").main([str(argument) for argument in arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["tokenizers_make_the_same_ids"]
    rows = found["rows"]
    assert not [value for row in rows for value in row.values() if isinstance(value, list | dict)]
    speeds = {row["patcher"]: row for row in rows if "megabytes_per_second" in row}
    assert speeds.keys() >= {"transformer", "space", "fixed", "tiktoken", "tokenizers"}
    assert all(row["megabytes_per_second"] > 0 and row["tokenizer_ratio"] > 0 for row in speeds.values())
    assert speeds["tiktoken"]["tokenizer_ratio"] == 1
    cuts = [row for row in rows if "boundary_f1" in row]
    assert {(row["patcher"], row["text"]) for row in cuts} >= {
        (patcher, text) for patcher in ("space", "fixed") for text in ("text", "code python", "code go")
    }
    assert all(0 <= row["boundary_f1"] <= 1 and 0 <= row["random_f1"] < 1 for row in cuts)
    assert {(row["reference"], row["reference_trained_on"]) for row in cuts} == {("run", "text")}


def test_patch_without_texts_says_so_and_goes_on(
    script: Callable[[str], ModuleType], tiny_training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_training.run.parent / "text"
    arguments = ["--size", "tiny", "--json", "--model", tiny_training.run, "--data", text, "--texts", tmp_path / "no"]
    script("patch").main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert "give --texts FOLDER" in printed.err
    assert {row["text"] for row in json.loads(printed.out)["rows"]} == {"text"}


def test_starts_agree_with_themselves_and_not_with_others(
    script: Callable[[str], ModuleType], tiny_training: Training
) -> None:
    sides = script("patch_sides")
    starts = torch.tensor([[True, False, True, False]])
    assert sides.boundary_f1(starts, starts) == 1 and sides.boundary_f1(starts, ~starts) == 0
    assert sides.boundary_f1(starts, torch.ones_like(starts)) == pytest.approx(2 / 3)
    reference, rows = sides.TransformerPatcher(tiny_training.run), sides.rows_of(b"def x(y): return y + 1\n" * 40)
    found = sides.agreement(reference, reference, rows, reference.entropies(rows))
    assert found.boundary_f1 == 1 > found.random_f1 and found.mean_patch_bytes == pytest.approx(4.5, abs=0.5)


def test_both_tokenizers_make_the_same_ids_of_the_same_bytes(script: Callable[[str], ModuleType]) -> None:
    bpe, text = script("bpe"), "def naïve(x):\n    return  x + 1  # größer\n\n" * 5
    tokenizer = bpe.learn([text], vocabulary=300)
    ids = tokenizer.encode(text).ids
    assert bpe.as_tiktoken(tokenizer).encode_ordinary(text) == ids and min(ids) > bpe.BOS
    assert b"".join(bpe.pieces(tokenizer)[number] for number in ids) == text.encode()
    assert len(ids) < len(text)


@pytest.mark.parametrize("package", ["tokenizers", "tiktoken"])
def test_a_missing_package_is_named_with_its_extra(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    bpe = script("bpe")
    tokenizer = bpe.learn(["text"], vocabulary=260)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package} is not installed.*blt-lm\[bench\]"):
        bpe.as_tiktoken(bpe.learn(["text"], 260) if package == "tokenizers" else tokenizer)


def test_train_without_transformers_says_so_before_it_begins(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"transformers is not installed.*blt-lm\[bench\]"):
        script("train").main(["--size", "tiny"])


@pytest.mark.parametrize("name", ["decode.py", "train.py", "tables.py", "patch.py"])
def test_help_of_benchmarks_does_not_wait_for_torch(name: str) -> None:
    timed = [sys.executable, "-X", "importtime", str(BENCHMARKS / name), "--help"]
    child = subprocess.run(timed, capture_output=True, text=True, check=True)
    assert child.stdout.startswith(f"usage: {name}") and "--quick" in child.stdout
    imported = {line.split("|")[-1].strip() for line in child.stderr.splitlines() if line.startswith("import time:")}
    assert "machine" in imported and not imported & {"torch", "transformers", "numpy"}
