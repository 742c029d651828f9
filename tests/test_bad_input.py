"""What a user can do wrong ends in one message that says what, where and what to do, and leaves what is whole whole."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Blt = Callable[..., Any]


def assert_refused(finished: Any, *said: str, code: int = 1) -> None:
    """One message, with every one of ``said`` in it, and nothing that only a programmer reads."""
    assert finished.code == code and finished.stdout == b"", finished
    message = finished.stderr
    assert message.startswith("blt: ") and message.endswith("\n"), message
    for unreadable in ("Traceback", "unexpected", "pydantic"):
        assert unreadable not in message, message
    for word in said:
        assert word in message, message


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# paths and hubs


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("generate", ["x", "--top-k", "5"], "give a --temperature above 0"),
        ("evaluate", ["--limit", "5"], "name some with --tasks"),
        ("evaluate", ["--raw"], "name some with --data"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    tiny_training: Any, blt_command: Blt, command: str, options: list[str], said: str
) -> None:
    assert_refused(blt_command(command, tiny_training.run, *options), said)


@pytest.mark.parametrize("command", ["evaluate", "generate", "patch", "flops"])
def test_a_missing_model_is_named(command: str, blt_command: Blt) -> None:
    text = ["text"] if command in ("generate", "patch") else []
    assert_refused(blt_command(command, "./nonesuch", *text), "nonesuch", "no such model folder")


def test_a_missing_data_path_is_named_and_nothing_is_begun(tiny_training: Any, blt_command: Blt) -> None:
    assert_refused(blt_command("evaluate", tiny_training.run, "--data", "nonesuch.txt"), "nonesuch.txt", "stdlib")


def test_a_mistyped_data_path_does_not_claim_the_run_folder(tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    refused = blt_command("train", tiny_toml, "--data", "nonesuch", "--out", tmp_path / "run")
    assert_refused(refused, "nonesuch", "stdlib")
    assert not (tmp_path / "run").exists()  # else the corrected command would be refused


def test_a_missing_config_is_answered_with_the_presets(blt_command: Blt) -> None:
    assert_refused(blt_command("train", "nonesuch.toml"), "nonesuch.toml", "demo", "blt_1b")
    assert_refused(blt_command("flops", "nonesuch.toml"), "nonesuch.toml", "demo", "blt_1b")


def test_a_folder_without_a_model_is_told_apart_from_a_missing_one(blt_command: Blt, tmp_path: Path) -> None:
    assert_refused(blt_command("generate", tmp_path, "x"), str(tmp_path), "no config.json")


def test_a_run_that_has_no_model_yet_names_the_command_that_goes_on(trained_run: Path, blt_command: Blt) -> None:
    shutil.rmtree(trained_run / "model")
    assert_refused(blt_command("generate", trained_run, "x"), "without a model yet", "blt train", "--resume")


def test_a_hub_name_without_a_network_says_what_to_do(blt_command: Blt, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # where it was imported before
    assert_refused(blt_command("generate", "nobody/nothing-at-all", "x"), "nobody/nothing-at-all", "network", "folder")


def test_an_existing_folder_is_never_looked_up_on_the_hub(
    blt_command: Blt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "itazap" / "blt-1b-hf").mkdir(parents=True)
    assert_refused(blt_command("generate", "itazap/blt-1b-hf", "x"), "no config.json")


def test_a_model_without_held_out_text_asks_for_data(tiny_training: Any, blt_command: Blt) -> None:
    assert_refused(blt_command("evaluate", tiny_training.run / "model"), "--data")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "nonesuch", "meta"])
def test_a_device_that_is_not_there_is_named_with_one_that_is(
    device: str, tiny_training: Any, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused = blt_command("generate", tiny_training.run, "x", "--device", device)
    assert_refused(refused, device, "--device cpu")


# configs


def test_an_unknown_key_names_the_file_and_the_key(tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text(tiny_toml.read_text().replace("max_bytes", "max_byts"))
    refused = blt_command("train", config, "--out", tmp_path / "run")
    assert_refused(refused, str(config), "model.max_byts: unknown key")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "-1"], "seed"),
        (["--set", "training.row_bytes=600"], "row_bytes 600"),
        (["--set", "training.betas=[0.9, 1.5]"], "betas"),
        (["--set", "training.row_byts=3"], "training.row_byts: unknown key"),
        (["--set", "training.seed"], "section.key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_cannot_work_is_refused_before_the_run_folder_is_claimed(
    options: list[str], said: str, tiny_toml: Path, blt_command: Blt, tmp_path: Path
) -> None:
    refused = blt_command("train", tiny_toml, *options, "--out", tmp_path / "run", "--quiet")
    assert_refused(refused, said)
    assert not (tmp_path / "run").exists()


def test_a_model_that_holds_few_bytes_can_be_trained_all_the_same(
    tiny_toml: Path, blt_command: Blt, tmp_path: Path
) -> None:
    """Samples and pictures made on the way must fit into what the model can hold."""
    short = ["--set", "model.max_bytes=48", "--set", "training.total_bytes=128", "--quiet"]
    trained = blt_command("train", tiny_toml, *short, "--out", tmp_path / "run", "--json")
    assert trained.code == 0, trained.stderr


# models


def changed(folder: Path, **values: Any) -> Path:
    """The config.json of a model folder, some values changed."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return file


@pytest.fixture
def model(trained_run: Path) -> Path:
    return trained_run / "model"


def test_a_model_of_another_kind_is_told_apart(model: Path, blt_command: Blt) -> None:
    file = changed(model, model_type="llama")
    assert_refused(blt_command("generate", model, "x"), str(file), "'llama'", "no Byte Latent Transformer")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"patching_mode": "bpe"}, "'bpe'"),
        ({"encoder_config": {}}, "num_hidden_layers"),
        ({"encoder_config": []}, ""),
        ({"patcher_config": None}, ""),
        ({"cross_attn_k": 0}, ""),
        ({"cross_attn_k": "two"}, ""),
        ({"patching_threshold": "high"}, ""),
        ({"encoder_hash_byte_group_size": 5}, ""),
        ({"encoder_hash_byte_group_vocab": -1}, ""),
    ],
    ids=str,
)
def test_a_config_json_with_nonsense_in_it_is_named(
    values: dict[str, Any], said: str, model: Path, blt_command: Blt
) -> None:
    file = changed(model, **values)
    assert_refused(blt_command("generate", model, "x"), str(file), said)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "\ufeff{}", '{"model_type": "blt-lm", "model": 3}'])
def test_a_config_json_that_holds_no_config_is_named(text: str, model: Path, blt_command: Blt) -> None:
    (model / "config.json").write_text(text)
    assert_refused(blt_command("generate", model, "x"), str(model / "config.json"))
    assert_refused(blt_command("flops", model), str(model / "config.json"))


def test_a_config_json_that_asks_for_other_shapes_is_told_which(model: Path, blt_command: Blt) -> None:
    changed(model, encoder_hash_byte_group_vocab=65)
    weights = str(model / "model.safetensors")
    assert_refused(blt_command("generate", model, "x"), weights, "encoder_hash_tok_embedding", "[130, 16]")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def garbage_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def header_that_is_no_json(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"#" * 20 + data[28:])


def offsets_beyond_the_end(file: Path) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = re.sub(rb'"data_offsets":\[(\d+),\d+\]', rb'"data_offsets":[\1,999999999]', data[8 : 8 + size], count=1)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"weight": [0.0]}))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        cut_in_the_header,
        emptied,
        garbage_header,
        header_that_is_no_json,
        offsets_beyond_the_end,
        a_pickle,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_weight_file_is_named_with_the_way_out(
    damage: Callable[[Path], None], model: Path, blt_command: Blt
) -> None:
    weights = model / "model.safetensors"
    damage(weights)
    assert_refused(blt_command("generate", model, "x"), str(weights), "damaged", "copy the model again")


def test_a_weight_of_another_shape_is_named(model: Path, blt_command: Blt) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(260, 3)}, model / "model.safetensors", {"format": "pt"})
    refused = blt_command("generate", model, "x")
    assert_refused(refused, "model.safetensors", "lm_head.weight", "[260, 3]", "[260, 16]")


def test_a_weight_that_is_missing_is_named(model: Path, blt_command: Blt) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert_refused(blt_command("generate", model, "x"), str(model), "lm_head.weight", "lacks 1 ")


def test_a_weight_that_belongs_nowhere_is_named(model: Path, blt_command: Blt) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    assert_refused(blt_command("generate", model, "x"), "model.safetensors", "extra.weight")


class Bomb:
    """Unpickling it makes the file it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.safetensors"])
def test_no_code_runs_from_a_model_file(name: str, model: Path, blt_command: Blt, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused = blt_command("generate", model, "x")
    assert_refused(refused, str(model), "safetensors")
    if name != "model.safetensors":
        assert name in refused.stderr and "pickle" in refused.stderr
    assert not (tmp_path / "ran").exists()
    pickle.loads((model / name).read_bytes())  # the trap does work
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_of_weight_files_is_named(text: str, model: Path, blt_command: Blt) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    assert_refused(blt_command("generate", model, "x"), str(model / "model.safetensors.index.json"))


def test_a_weight_file_that_the_index_names_and_is_not_there_is_named(model: Path, blt_command: Blt) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(blt_command("generate", model, "x"), "model-00001-of-00001.safetensors", "copy the model again")


# text


def test_a_prompt_beyond_the_limit_is_told_the_limit(tiny_training: Any, blt_command: Blt) -> None:
    run = tiny_training.run
    assert_refused(blt_command("generate", run, "x" * 500, "--max-bytes", "20"), "500 bytes", "511", "shorten")
    assert_refused(blt_command("patch", run, "x" * 600), "601", "512", "cut the text")
    assert blt_command("generate", run, "x" * 509, "--max-bytes", "2").code == 0  # 511 and BOS: exactly the limit


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--max-bytes", "-1"],
        *(
            [option, value, "--temperature", "1"]
            for option, value in (("--top-k", "0"), ("--top-p", "2"), ("--min-p", "0"))
        ),
    ],
    ids=lambda options: options[0],
)
def test_an_option_out_of_range_is_refused(options: list[str], tiny_training: Any, blt_command: Blt) -> None:
    assert_refused(blt_command("generate", tiny_training.run, "x", *options), options[0][2:].replace("-", "_"))


@pytest.mark.parametrize("window", ["1", "0", "-5"])
def test_a_window_that_holds_no_byte_is_refused(window: str, tiny_training: Any, blt_command: Blt) -> None:
    assert_refused(blt_command("evaluate", tiny_training.run, "--window-bytes", window), "window")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--context-bytes", "0"),
        ("--context-bytes", "-2"),
        *(("--patch-bytes", value) for value in ("0", "-2", "nan", "inf")),
    ],
)
def test_flops_of_no_bytes_are_refused(name: str, value: str, blt_command: Blt) -> None:
    assert_refused(blt_command("flops", "tiny", f"{name}={value}"), "must be at least 1", value)


def test_rows_of_no_bytes_are_refused(tiny_training: Any, blt_command: Blt, tmp_path: Path) -> None:
    refused = blt_command("entropies", tiny_training.run, "--row-bytes", "0", "--out", tmp_path / "entropies")
    assert_refused(refused, "row_bytes must be 4 to", "got 0")


def test_no_text_to_patch_is_said(tiny_training: Any, blt_command: Blt) -> None:
    assert_refused(blt_command("patch", tiny_training.run, stdin=b""), "no text", "stdin")


def test_empty_documents_are_skipped_and_counted(tiny_training: Any, blt_command: Blt, tmp_path: Path) -> None:
    assert "1 empty documents skipped" in tiny_training.finished.stderr
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": "x = 1"}\n{"text": ""}\n')
    figures = blt_command("evaluate", tiny_training.run, "--data", tmp_path, "--json").json
    assert figures["empty_documents_skipped"] == 3 and figures["bytes"] == 5


def test_a_corpus_of_nothing_is_refused(tiny_training: Any, tiny_toml: Path, blt_command: Blt, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert_refused(blt_command("evaluate", tiny_training.run, "--data", empty), str(empty), "empty")
    refused = blt_command("train", tiny_toml, "--data", empty, "--out", tmp_path / "run")
    assert_refused(refused, "1 empty documents", "--data")


def test_text_that_is_not_utf8_is_bytes(tiny_training: Any, blt_command: Blt, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café, naïve".encode("latin-1"))
    figures = blt_command("evaluate", tiny_training.run, "--data", tmp_path / "latin.txt", "--json").json
    assert figures["bytes"] == 11
    patches = blt_command("patch", tiny_training.run, "--json", stdin=b"caf\xe9").json["patches"]
    assert "".join(patches) == b"caf\xe9".hex()


def test_a_damaged_corpus_of_a_run_is_named_with_the_way_out(trained_run: Path, blt_command: Blt) -> None:
    truncated_shard = trained_run / "corpus" / "held_out.bin"
    truncated_shard.write_bytes(truncated_shard.read_bytes()[:-3])
    assert_refused(blt_command("evaluate", trained_run), str(trained_run / "corpus"), "build the corpus again")


# tracebacks


def test_debug_shows_the_traceback_that_is_hidden_without_it(model: Path, blt_command: Blt) -> None:
    changed(model, model_type="llama")
    with pytest.raises(ValueError, match="'llama'"):  # raised on, for the interpreter to print
        blt_command("generate", model, "x", "--debug")


def test_an_unforeseen_error_says_how_to_see_more(
    tiny_training: Any, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("what nobody foresaw")

    monkeypatch.setattr("blt.language_model.load_model", broken)
    failed = blt_command("generate", tiny_training.run, "x")
    assert failed.code == 1 and "what nobody foresaw" in failed.stderr and "--debug" in failed.stderr
    assert "Traceback" not in failed.stderr
    with pytest.raises(ZeroDivisionError):
        blt_command("generate", tiny_training.run, "x", "--debug")


# a full disk


def full_disk(path: Path, content: bytes) -> int:
    """What writing does where half of it fits."""
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_picture_whole(
    tiny_training: Any, blt_command: Blt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "patches.html"
    assert blt_command("patch", tiny_training.run, "old", "-o", picture).code == 0
    before = files_of(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    refused = blt_command("patch", tiny_training.run, "new", "-o", picture)
    assert_refused(refused, "No space left on device", str(picture))
    assert files_of(tmp_path) == before


def test_a_full_disk_while_saving_a_model_leaves_the_old_one_whole(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blt import weights_file
    from blt.language_model import load

    def half_written(path: Path, *_: object) -> None:
        full_disk(path, b"both halves of it")

    lm, before = load(trained_run), files_of(trained_run / "model")
    monkeypatch.setattr(weights_file, "_write_file", half_written)
    with pytest.raises(OSError, match=r"No space left on device") as refusal:
        lm.save(trained_run / "model")
    assert str(trained_run / "model") in str(refusal.value)
    assert files_of(trained_run / "model") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of the given size, or grows the one that is there; only root may."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a disk")
        mounted = True
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a failed test may still hold a file open


@pytest.mark.parametrize("size", ["12k", "60k", "200k", "420k"])
def test_training_that_fills_the_disk_says_where_and_goes_on_once_there_is_space(
    size: str, tiny_toml: Path, blt_command: Blt, small_disk: Callable[[str], Path]
) -> None:
    short = ["--set", "training.total_bytes=384", "--set", "training.steps_per_save=1", "--quiet"]
    run = small_disk(size) / "run"
    command = ["train", tiny_toml, *short, "--set", "entropy_training.total_bytes=384", "--out", run]
    refused = blt_command(*command)
    assert_refused(refused, "No space left on device", str(run))
    small_disk("64m")
    resume = ["--resume"] if (run / "config.toml").exists() else []  # full before there was anything to resume
    finished = blt_command(*command, *resume, "--json")
    assert finished.json["bits_per_byte"] > 0
    assert not list(run.rglob("*.partial"))
