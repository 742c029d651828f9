"""The official release format: what it says comes back to the bit through every format, and what it cannot say is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SHAPE, random_models, random_row, tiny_config
from torch import Tensor
from transformers import BltForCausalLM

import blt
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, ModelConfig, PatchingConfig, TransformerConfig
from blt.model_files import convert, load_model, named_weights, read_model_config, save_model
from blt.official import not_official

Blt = Callable[..., Any]
LOCAL: dict[str, Any] = {**SHAPE, "ffn_width": 48, "window_positions": 9}  # 8/3 x 16, rounded up to a multiple of 16
OFFICIAL = tiny_config(
    entropy_model=EntropyModelConfig(num_layers=2, **LOCAL | {"window_positions": 6}),
    hash_embeddings=HashEmbeddingsConfig(ngram_bytes=(5, 2), num_functions=2, table_rows=31),
    patching=PatchingConfig(threshold_nats=5.0, max_patch_bytes=7),
    local_encoder=TransformerConfig(num_layers=1, **LOCAL),
    latent=TransformerConfig(num_layers=2, width=24, num_heads=2, ffn_width=64),
    local_decoder=TransformerConfig(num_layers=2, **LOCAL),
)
FILES = ["README.md", "config.json", "entropy_model/consolidated.pth", "entropy_model/params.json", "model.safetensors"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in Hugging Face's format."""
    entropy_model, network = random_models(OFFICIAL)
    save_model(tmp_path / "ours", OFFICIAL, entropy_model.to(request.param), network.to(request.param))
    return tmp_path / "ours"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A model in the official format, of bf16 weights as the released ones."""
    entropy_model, network = random_models(OFFICIAL)
    save_model(tmp_path / "ours", OFFICIAL, entropy_model.bfloat16(), network.bfloat16())
    convert(tmp_path / "ours", tmp_path / "released", "official")
    return tmp_path / "released"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits_of(folder: Path) -> Tensor:
    lm, row = blt.load(folder, device="cpu"), random_row(80, seed=3)
    with torch.no_grad():
        return lm.network(row, lm.patch_starts(row))


def test_ours_to_official_to_hugging_face_to_official_changes_no_bit(ours: Path, tmp_path: Path) -> None:
    convert(ours, tmp_path / "official", "official")
    convert(tmp_path / "official", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "official")
    assert sorted(files_of(tmp_path / "official")) == sorted(FILES)
    assert files_of(tmp_path / "hf") == files_of(ours)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "official")
    assert logits_of(tmp_path / "official").equal(logits_of(ours))
    assert read_model_config(tmp_path / "official") == OFFICIAL


def test_a_converted_model_is_transformers_own_and_writes_the_same_logits(released: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "hf", "hf")
    theirs = BltForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    row = random_row(80, seed=3)
    with torch.no_grad():
        logits = theirs(input_ids=row, use_cache=False).logits
    # with a longest patch, transformers drops the patch that the unknown next id opens
    torch.testing.assert_close(logits_of(released)[:, :-1], logits[:, :-1], atol=1e-5, rtol=0)


TRANSLATED = {  # official -> Hugging Face, of what both name within a part
    **{f".attention.w{letter}.": f".self_attn.{letter}_proj." for letter in "qkvo"},
    **{f".w{letter}.": f".{letter}_proj." for letter in "qkvo"},
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".cross_attn_norm_q.": ".q_norm.",
    ".cross_attn_norm_kv.": ".k_norm.",
    ".tok_embeddings.": ".embed_tokens.",
    ".patcher.output.": ".patcher.lm_head.",
    "model.local_decoder.output.": "lm_head.",
}


def test_every_weight_has_its_official_name(released: Path) -> None:
    theirs = {f"model.{name}": weight for name, weight in load_file(released / "model.safetensors").items()}
    entropy_model = torch.load(released / "entropy_model" / "consolidated.pth", weights_only=True)
    assert entropy_model.keys() == {"model"}
    theirs |= {f"model.patcher.{name}": weight for name, weight in entropy_model["model"].items()}
    tables = [theirs.pop(f"model.encoder_hash_tok_embedding.{table}.weight") for table in range(4)]
    translated = {"model.encoder_hash_tok_embedding.weight": torch.cat(tables)}
    for name, weight in theirs.items():
        for official, huggingface in TRANSLATED.items():
            name = name.replace(official, huggingface)
        translated[name] = weight
    ours = load_file(released.parent / "ours" / "model.safetensors")
    assert translated.keys() == ours.keys()
    assert all(translated[name].equal(ours[name]) for name in ours)
    assert "model.global_transformer.token_embedding_projection.weight" in ours


def test_hash_tables_are_the_rows_of_our_one_table_in_order(released: Path) -> None:
    _, entropy_model, network = load_model(released, torch.bfloat16)
    tables = named_weights(entropy_model, network)["network.local_encoder.hash_embeddings.tables.weight"]
    theirs = load_file(released / "model.safetensors")
    assert tables.equal(torch.cat([theirs[f"encoder_hash_tok_embedding.{table}.weight"] for table in range(4)]))


def test_keys_that_change_nothing_and_numbers_written_as_floats_are_read(released: Path) -> None:
    change(released, "config.json", "args", recompute_attn=True, dim_global=24.0, attn_impl="flex", rope_theta=500000)
    change(released, "entropy_model/params.json", "entropy_model", n_layers=2.0, dropout=0.1)
    assert read_model_config(released) == OFFICIAL


def test_cross_attention_after_every_encoder_layer_is_refused_where_there_are_several(released: Path) -> None:
    change(released, "config.json", "args", cross_attn_all_layers_encoder=True)
    assert read_model_config(released) == OFFICIAL  # of one layer it is the same
    change(released, "config.json", "args", n_layers_local_encoder=2)
    with pytest.raises(ValueError, match="cross_attn_all_layers_encoder is True, and only False is supported"):
        read_model_config(released)


def change(folder: Path, file: str, section: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    content[section] |= values
    for key in [key for key, value in values.items() if value == "absent"]:
        del content[section][key]
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "section", "key", "value", "said"),
    [
        ("config.json", "args", "patching_mode", "space", "'space', and only 'entropy' is supported"),
        ("config.json", "args", "monotonicity", True, "True, and only False"),
        ("config.json", "args", "cross_attn_all_layers_decoder", False, "False, and only True"),
        ("config.json", "args", "cross_attn_nheads", 5, "for the local_encoder: cross_attn_nheads is 5, and only 2"),
        ("config.json", "args", "n_kv_heads_global", 1, "n_kv_heads_global is 1"),
        ("config.json", "args", "vocab_size", 256, "vocab_size is 256, and only 260"),
        ("config.json", "args", "dim_global", "wide", "width: Input should be a valid integer"),
        ("config.json", "args", "cross_attn_k", None, "slots_per_patch"),
        ("config.json", "args", "encoder_hash_byte_group_size", 3, "of another kind"),
        ("config.json", "args", "dim_global", 32, "[32, 32]"),
        ("config.json", "args", "n_layers_global", 3, "lacks 9 of the model's weights"),
        ("config.json", "args", "n_layers_global", 1, "holds global_transformer.layers.1"),
        ("config.json", "args", "encoder_hash_byte_group_vocab", 30, "encoder_hash_tok_embedding.0.weight"),
        ("entropy_model/params.json", "data", "patcher_args", {"threshold": 1.0, "monotonicity": True}, "monotonicity"),
        ("entropy_model/params.json", "data", "patcher_args", {"threshold": "high"}, "threshold_nats: "),
        ("entropy_model/params.json", "entropy_model", "n_heads", "absent", "lack the key 'n_heads'"),
    ],
)
def test_what_would_be_another_function_is_refused_by_key_and_value(
    file: str, section: str, key: str, value: Any, said: str, released: Path, blt_command: Blt
) -> None:
    change(released, file, section, **{key: value})
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and said in refused.stderr and str(released) in refused.stderr, refused.stderr
    assert "unexpected" not in refused.stderr


@pytest.mark.parametrize("content", [{"args": None}, {"args": [1]}, {"args": {}}])
def test_args_of_another_form_are_refused(content: dict[str, Any], released: Path, blt_command: Blt) -> None:
    (released / "config.json").write_text(json.dumps(content))
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and str(released / "config.json") in refused.stderr
    assert "unexpected" not in refused.stderr


@pytest.mark.parametrize("file", FILES[2:])
def test_a_file_that_is_missing_is_named(file: str, released: Path, blt_command: Blt) -> None:
    (released / file).unlink()
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and file in refused.stderr and "unexpected" not in refused.stderr


@pytest.mark.parametrize("file", ["entropy_model/params.json", "entropy_model/consolidated.pth"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x02", bytes(range(256))])
def test_a_damaged_file_is_named(file: str, content: bytes, released: Path, blt_command: Blt) -> None:
    (released / file).write_bytes(content)
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and f"{file} is damaged" in refused.stderr, refused.stderr


def test_an_entropy_model_cut_short_is_damaged(released: Path, blt_command: Blt) -> None:
    file = released / "entropy_model" / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-2000])
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and "consolidated.pth is damaged" in refused.stderr, refused.stderr


class Bomb:
    """Unpickling it makes the file it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(
    zipped: bool, released: Path, tmp_path: Path, blt_command: Blt
) -> None:
    file, bomb = released / "entropy_model" / "consolidated.pth", Bomb(tmp_path / "ran")
    if zipped:
        torch.save({"model": bomb}, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and str(file) in refused.stderr
    assert not zipped or "could run code and is not read" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_an_entropy_model_of_other_things_than_tensors_is_told_apart(released: Path, blt_command: Blt) -> None:
    torch.save({"model": {"norm.weight": 3}}, released / "entropy_model" / "consolidated.pth")
    refused = blt_command("generate", released, "x")
    assert refused.code == 1 and "is not the entropy model of a BLT" in refused.stderr


def test_a_table_of_another_dtype_than_its_neighbours_is_read_in_fp32(released: Path) -> None:
    file = released / "model.safetensors"
    weights = load_file(file)
    before = torch.cat([weights[f"encoder_hash_tok_embedding.{table}.weight"] for table in range(4)])
    name = "encoder_hash_tok_embedding.1.weight"
    save_file(weights | {name: weights[name].float()}, file, {"format": "pt"})
    tables = load_model(released, torch.float32)[2].local_encoder.hash_embeddings.tables.weight
    assert tables.dtype == torch.float32 and tables.equal(before.float())


STACK = TransformerConfig(num_layers=1, **LOCAL)
NOT_OFFICIAL: dict[str, ModelConfig] = {
    "patching rule 'space'": tiny_config(patching=PatchingConfig(rule="space"), entropy_model=None),
    "a rope_theta of each part's own": OFFICIAL.model_copy(
        update={"local_encoder": STACK.model_copy(update={"rope_theta": 10.0})}
    ),
    "different numbers of heads": OFFICIAL.model_copy(
        update={"local_encoder": STACK.model_copy(update={"num_heads": 4})}
    ),
    "feed-forward widths other than": tiny_config(),
}


@pytest.mark.parametrize("reason", NOT_OFFICIAL)
def test_what_the_official_format_has_no_keys_for_is_refused_and_nothing_is_written(
    reason: str, tmp_path: Path, blt_command: Blt
) -> None:
    config = NOT_OFFICIAL[reason]
    entropy_model, network = random_models(config if config.entropy_model else tiny_config(patching=config.patching))
    save_model(tmp_path / "ours", config, entropy_model if config.entropy_model else None, network)
    refused = blt_command("convert", tmp_path / "ours", tmp_path / "official", "--to", "official")
    assert refused.code == 1 and reason in refused.stderr and "--to hf" in refused.stderr, refused.stderr
    assert not (tmp_path / "official").exists()


def test_the_shapes_of_released_models_are_official() -> None:
    for preset in ("blt_1b", "blt_8b"):
        from blt.config_file import read_run_config

        assert not_official(read_run_config(preset, ["model.patching.threshold_nats=1.3"]).model) == []


def test_the_command_converts_and_says_what_it_wrote(ours: Path, tmp_path: Path, blt_command: Blt) -> None:
    finished = blt_command("convert", ours, tmp_path / "there", "--to", "official", "--json")
    weights = sum(
        path.stat().st_size for path in (tmp_path / "there").rglob("*") if path.suffix in (".safetensors", ".pth")
    )
    assert finished.json["format"] == "official"
    assert weights - 60_000 < finished.json["weight_bytes"] < weights
    back = blt_command("convert", tmp_path / "there", tmp_path / "back")
    assert back.code == 0 and str(tmp_path / "back") in back.stdout.decode()
    assert files_of(tmp_path / "back") == files_of(ours)


def test_a_folder_that_holds_something_is_not_converted_into(ours: Path, tmp_path: Path, blt_command: Blt) -> None:
    (tmp_path / "there").mkdir()
    assert blt_command("convert", ours, tmp_path / "there").code == 0  # it was empty
    before = files_of(tmp_path / "there")
    refused = blt_command("convert", ours, tmp_path / "there")
    assert refused.code == 1 and "is not empty; name a folder that is not there yet" in refused.stderr
    assert files_of(tmp_path / "there") == before
    refused = blt_command("convert", ours, tmp_path / "there" / "config.json")
    assert refused.code == 1 and "is a file" in refused.stderr


def test_a_full_disk_leaves_no_half_converted_folder(
    ours: Path, tmp_path: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    refused = blt_command("convert", ours, tmp_path / "there", "--to", "official")
    assert (
        refused.code == 1 and "No space left on device" in refused.stderr and str(tmp_path / "there") in refused.stderr
    )
    assert not (tmp_path / "there").exists()
