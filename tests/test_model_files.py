"""A model comes back as it was written: keys, shapes, dtypes, bits and logits, by way of transformers and of ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_models, random_row, randomise, tiny_config
from torch import Tensor
from transformers import BltConfig, BltForCausalLM
from transformers.utils.logging import disable_progress_bar

import blt
from blt.config import ModelConfig, NgramEntropyModelConfig, PatchingConfig
from blt.huggingface import inexpressible
from blt.model_files import convert, load_model, named_weights, save_model

disable_progress_bar()
TABLES = "network.local_encoder.hash_embeddings.tables.weight"


def of_transformers(folder: Path, dtype: torch.dtype) -> Path:
    """A tiny random model, written by transformers."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    config = BltConfig(
        patching_threshold=5.0,
        local_attention_window_len=13,
        cross_attn_k=2,
        encoder_hash_byte_group_size=[3, 5],
        encoder_hash_byte_group_vocab=101,
        patcher_config={**shape, "num_hidden_layers": 2, "sliding_window": 7},
        encoder_config={**shape, "num_hidden_layers": 1, "sliding_window": 13, "hidden_size_global": 32},
        decoder_config={**shape, "num_hidden_layers": 2, "hidden_size_global": 32},
        global_config={**shape, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40},
    )
    theirs = BltForCausalLM(config)
    randomise(theirs, seed=3)
    theirs.to(dtype).save_pretrained(folder)
    return folder


def their_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return BltForCausalLM.from_pretrained(folder).eval()(input_ids=random_row(90, seed=1), use_cache=False).logits


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and found[name].equal(weight), name


@pytest.mark.parametrize(
    ("dtype", "loaded_in"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16")],
    ids=str,
)
def test_a_model_of_transformers_comes_back_to_the_bit_in_the_dtype_it_had(
    dtype: torch.dtype, loaded_in: str, tmp_path: Path
) -> None:
    theirs = of_transformers(tmp_path / "theirs", dtype)
    blt.load(theirs, device="cpu", dtype=loaded_in).save(tmp_path / "ours")
    assert_same(weights_of(tmp_path / "ours"), weights_of(theirs))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert their_logits(tmp_path / "ours").equal(their_logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_converting_a_model_of_transformers_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = of_transformers(tmp_path / "theirs", dtype)
    convert(theirs, tmp_path / "ours", "hf", shard_bytes=20_000)
    assert_same(weights_of(tmp_path / "ours"), weights_of(theirs))
    assert their_logits(tmp_path / "ours").equal(their_logits(theirs))


OWN_TYPE = tiny_config(patching=PatchingConfig(rule="entropy_rise", threshold_nats=0.1))


@pytest.mark.parametrize("config", [tiny_config(), OWN_TYPE], ids=["blt", "blt-lm"])
def test_a_model_split_over_files_is_read_whole_and_smaller_saves_leave_none_of_them(
    config: ModelConfig, tmp_path: Path
) -> None:
    entropy_model, network = random_models(config)
    expected, stem = named_weights(entropy_model, network), "blt-lm" if inexpressible(config) else "model"
    counts = []
    for shard_bytes in (20_000, 60_000, 10**9, 60_000):
        save_model(tmp_path, config, entropy_model, network, shard_bytes=shard_bytes)
        written = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
        assert all(name.startswith(stem) for name in written)
        counts.append(len([name for name in written if name.endswith(".safetensors")]))
        assert (f"{stem}.safetensors.index.json" in written) == (counts[-1] > 1)
        _, entropies, again = load_model(tmp_path, torch.float32)
        assert_same(named_weights(entropies, again), expected)
    assert counts[0] > counts[1] > counts[2] == 1 and counts[3] == counts[1]


def test_transformers_splits_over_files_of_the_same_names_and_reads_ours(tmp_path: Path) -> None:
    theirs = of_transformers(tmp_path / "theirs", torch.float32)
    config, entropy_model, network = load_model(theirs, torch.float32)
    save_model(tmp_path / "ours", config, entropy_model, network, shard_bytes=30_000)
    BltForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again", max_shard_size=30_000)
    ours, again = ({path.name for path in (tmp_path / name).glob("model*")} for name in ("ours", "again"))
    assert ours == again and "model.safetensors.index.json" in ours
    assert_same(weights_of(tmp_path / "again"), weights_of(theirs))


def test_saving_another_kind_of_model_over_one_leaves_nothing_of_it(tmp_path: Path) -> None:
    for config, stem in ((tiny_config(), "model"), (OWN_TYPE, "blt-lm"), (tiny_config(), "model")):
        save_model(tmp_path, config, *random_models(config), shard_bytes=30_000)
        assert all(path.name.startswith(stem) for path in tmp_path.glob("*.safetensors*"))


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00009.safetensors.partial").write_bytes(b"half of it")
    save_model(tmp_path, tiny_config(), *random_models(tiny_config()))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    theirs = of_transformers(tmp_path, torch.bfloat16)
    expected = {name: weight.clone() for name, weight in weights_of(theirs).items()}
    lm = blt.load(tmp_path, device="cpu", dtype="bfloat16")
    lm.save(tmp_path)
    assert_same(weights_of(tmp_path), expected)
    assert lm.generate("x", max_bytes=3) == blt.load(tmp_path, device="cpu", dtype="bfloat16").generate(
        "x", max_bytes=3
    )


@pytest.fixture
def stored_in_bf16(tmp_path: Path) -> Path:
    entropy_model, network = random_models(tiny_config())
    save_model(tmp_path, tiny_config(), entropy_model.bfloat16(), network.bfloat16())
    return tmp_path


def test_tables_stay_in_bf16_and_give_the_logits_of_fp32_ones(stored_in_bf16: Path) -> None:
    lm, wide = (blt.load(stored_in_bf16, device="cpu") for _ in range(2))
    wide.network.float()
    tables, others = split(named_weights(None, lm.network))
    assert tables.dtype == torch.bfloat16 and {weight.dtype for weight in others} == {torch.float32}
    row = random_row(200, seed=2)
    starts = lm.patch_starts(row)
    logits = lm.network(row, starts)  # also where gradients are wanted
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wide.network(row, starts), atol=1e-5, rtol=0)
    assert lm.generate("some text", max_bytes=30) == wide.generate("some text", max_bytes=30)
    assert lm.generate("some text", max_bytes=30, speculate=5) == wide.generate("some text", max_bytes=30)


def split(weights: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    return weights[TABLES], [weight for name, weight in weights.items() if name != TABLES]


def test_a_stock_training_loop_trains_narrow_tables_too(stored_in_bf16: Path) -> None:
    lm, row = blt.load(stored_in_bf16, device="cpu"), random_row(40, seed=5)
    starts, losses = lm.patch_starts(row), []
    optimizer = torch.optim.SGD(lm.network.parameters(), lr=0.05)
    before = lm.network.local_encoder.hash_embeddings.tables.weight.clone()
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(lm.network(row, starts)[0, :-1], row[0, 1:])
        loss.backward()
        gradient = lm.network.local_encoder.hash_embeddings.tables.weight.grad
        assert gradient is not None and gradient.is_sparse and gradient.dtype == torch.bfloat16
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not before.equal(lm.network.local_encoder.hash_embeddings.tables.weight)


def test_int8_keeps_tables_as_they_are_stored(stored_in_bf16: Path) -> None:
    rounded = blt.load(stored_in_bf16, device="cpu", dtype="int8")
    assert rounded.network.local_encoder.hash_embeddings.tables.weight.dtype == torch.bfloat16
    assert len(rounded.generate("some text", max_bytes=10)) == 10


def test_weights_stored_as_asked_share_the_mapping_of_their_file(stored_in_bf16: Path) -> None:
    _, _, network = load_model(stored_in_bf16, torch.bfloat16)
    size = (stored_in_bf16 / "model.safetensors").stat().st_size
    addresses = [weight.data_ptr() for weight in network.parameters()]
    assert max(addresses) - min(addresses) < size


def test_a_mixed_model_keeps_each_weight_as_it_is(tmp_path: Path) -> None:
    entropy_model, network = random_models(tiny_config())
    network.local_encoder.hash_embeddings.bfloat16()  # as training with table_dtype = "bfloat16" leaves them
    save_model(tmp_path, tiny_config(), entropy_model, network)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    _, again_entropies, again = load_model(tmp_path, torch.float32)
    assert_same(named_weights(again_entropies, again), named_weights(entropy_model, network))


def test_whole_numbers_of_ngram_tables_are_no_reason_for_fp32(tmp_path: Path) -> None:
    config = tiny_config(entropy_model=NgramEntropyModelConfig(kind="ngram", max_order=4, table_bits=8))
    entropy_model, network = random_models(config)
    save_model(tmp_path, config, entropy_model, network.bfloat16())
    stored = load_file(tmp_path / "blt-lm.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16, torch.int16, torch.int32}


def test_tables_stored_in_fp8_are_half_as_large_and_read_as_bf16_of_the_same_numbers(tmp_path: Path) -> None:
    entropy_model, network = random_models(tiny_config())
    tables = network.bfloat16().local_encoder.hash_embeddings.tables.to(torch.float8_e4m3fn)
    save_model(tmp_path / "fp8", tiny_config(), entropy_model.bfloat16(), network)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    convert(tmp_path / "fp8", tmp_path / "again", "hf")
    dtypes = [weight.dtype for weight in weights_of(tmp_path / "again").values()]
    assert dtypes.count(torch.float8_e4m3fn) == 1 and set(dtypes) == {torch.float8_e4m3fn, torch.bfloat16}
    read = blt.load(tmp_path / "again", device="cpu")
    assert torch.equal(read.network.local_encoder.hash_embeddings.tables.weight, tables.weight.bfloat16())
    read.save(tmp_path / "bf16")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("fp8", "bf16")}
    assert sizes["bf16"] - sizes["fp8"] == tables.weight.numel()
    assert len(read.generate("some text", max_bytes=10)) == 10
