"""The oracle is transformers' BltForCausalLM: the same files give the same boundaries and the same logits, both ways.

Rows hold no EOS: transformers has no document masks.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    SHAPE,
    random_entropy_model,
    random_models,
    random_row,
    randomise,
    threshold_between,
    tiny_config,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BltConfig, BltForCausalLM
from transformers.utils.logging import disable_progress_bar

from blt.byte_ids import encode
from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    NgramEntropyModelConfig,
    PatchingConfig,
    RopeScalingConfig,
    TransformerConfig,
)
from blt.huggingface import OWN_WEIGHTS, WEIGHTS, inexpressible
from blt.language_model import load
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.patching import patch_starts
from blt.model_files import load_model, named_weights, save_model

disable_progress_bar()

LENGTHS = (1, 2, 3, 5, 17, 100, 511, 512, 513, 600)
WRITTEN_BY_TRANSFORMERS = "written_by_transformers"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md")


def local(num_layers: int, window_positions: int | None = 9, **changes: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=num_layers, window_positions=window_positions, **{**SHAPE, **changes})


def entropy_model(num_layers: int, window_positions: int | None = 6, **changes: Any) -> EntropyModelConfig:
    return EntropyModelConfig(num_layers=num_layers, window_positions=window_positions, **{**SHAPE, **changes})


SHORT_WINDOWS = tiny_config()  # 2 x 16 is the latent width: no projection, as in the released 1b
PROJECTED = tiny_config(  # 4 x 16 is not, as in the released 7b
    slots_per_patch=4,
    entropy_model=entropy_model(1, window_positions=11),
    local_decoder=local(1),
    latent=TransformerConfig(num_layers=3, width=24, num_heads=2, ffn_width=40),
)
RELEASED_WINDOWS = tiny_config(
    entropy_model=entropy_model(1, window_positions=512, num_heads=4, norm_eps=1e-3),
    local_encoder=local(1, window_positions=512, norm_eps=1e-2),
    local_decoder=local(2, window_positions=512, num_heads=4, ffn_width=32, rope_theta=10_000.0),
)
DEEP = tiny_config(
    slots_per_patch=4,
    entropy_model=entropy_model(3),
    local_encoder=local(3),
    local_decoder=local(3),
    latent=TransformerConfig(num_layers=1, width=64, num_heads=2, ffn_width=40, rope_theta=1000.0),
)
MANY_TABLES = tiny_config(
    hash_embeddings=HashEmbeddingsConfig(ngram_bytes=(8, 2, 3), num_functions=2, table_rows=31),
    slots_per_patch=3,
)
ALL_PRIMES = tiny_config(hash_embeddings=HashEmbeddingsConfig(ngram_bytes=(6, 1), num_functions=11, table_rows=500))
SPLIT_AT_3 = tiny_config(patching=PatchingConfig(threshold_nats=5.0, max_patch_bytes=3))
SCALED = RopeScalingConfig(
    factor=4.0, high_freq_factor=3.0, original_positions=40
)  # as Llama 3.1 is, for shorter texts
SCALED_POSITIONS = tiny_config(
    local_decoder=local(2, rope_scaling=SCALED, rope_theta=100.0),
    latent=TransformerConfig(num_layers=2, width=32, num_heads=2, ffn_width=40, rope_theta=1000.0, rope_scaling=SCALED),
)
CONFIGS = {
    "scaled_positions": SCALED_POSITIONS,
    "short_windows": SHORT_WINDOWS,
    "projected": PROJECTED,
    "released_windows": RELEASED_WINDOWS,
    "deep": DEEP,
    "many_tables": MANY_TABLES,
    "all_primes": ALL_PRIMES,
    "split_at_3": SPLIT_AT_3,
}


@dataclass(frozen=True)
class Pair:
    """The same weights in both implementations."""

    config: ModelConfig
    entropy_model: EntropyModel
    network: ByteLatentTransformer
    theirs: BltForCausalLM

    @torch.no_grad()
    def our_answer(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        entropies = self.entropy_model.entropies(row)
        starts = patch_starts(row, entropies, self.config.patching)
        return entropies, starts, self.network(row, starts)

    @torch.no_grad()
    def their_answer(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entropies and patch lengths as their patcher returned them inside the forward that gave the logits."""
        returned = []
        hook = self.theirs.model.patcher.register_forward_hook(lambda module, inputs, output: returned.append(output))
        logits = self.theirs(input_ids=row, use_cache=False).logits
        hook.remove()
        ((entropies, lengths, _),) = returned
        return entropies, lengths, logits


def starts_from_lengths(lengths: Tensor, num_ids: int) -> Tensor:
    """Patch starts of a single row; a last patch of length 0 is the one that the unknown next id opens.

    >>> starts_from_lengths(torch.tensor([[1, 2, 0]]), 3).int().tolist()
    [[1, 1, 0, 1]]
    """
    starts = torch.zeros(1, num_ids + 1, dtype=torch.bool)
    starts[0, lengths[0].cumsum(0) - lengths[0]] = True
    return starts


def with_threshold_between(config: ModelConfig, model: EntropyModel) -> ModelConfig:
    """The config with a threshold in the middle of the entropies of all rows of ``LENGTHS``, but near none of them."""
    entropies = torch.cat([model.entropies(random_row(length, seed=length))[0] for length in LENGTHS])
    patching = config.patching.model_copy(update={"threshold_nats": threshold_between(entropies)})
    return config.model_copy(update={"patching": patching})


@pytest.fixture(scope="module", params=[*CONFIGS, WRITTEN_BY_TRANSFORMERS])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Transformers' model from the files we write, and once ours from the files transformers writes."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == WRITTEN_BY_TRANSFORMERS:
        theirs = transformers_random_model()
        theirs.save_pretrained(folder)
        config, entropy_model, network = load_model(folder, torch.float32)
        assert entropy_model is not None
        config = with_threshold_between(config, entropy_model)
        theirs.model.config.patching_threshold = config.patching.threshold_nats
        return Pair(config, entropy_model, network, theirs)
    entropy_model, network = random_models(CONFIGS[request.param])
    config = with_threshold_between(CONFIGS[request.param], entropy_model)
    save_model(folder, config, entropy_model, network)
    return Pair(config, entropy_model, network, BltForCausalLM.from_pretrained(folder).eval())


def transformers_random_model() -> BltForCausalLM:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    wider = {"hidden_size": 24, "head_dim": 12, "encoder_cross_output_size": 32}
    config = BltConfig(
        patching_threshold=1.0,
        local_attention_window_len=13,
        cross_attn_k=2,
        encoder_hash_byte_group_size=[3, 5],
        encoder_hash_byte_group_vocab=101,
        encoder_hash_byte_group_nb_functions=2,
        patcher_config={**shape, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 7},
        encoder_config={**shape, "num_hidden_layers": 1, "sliding_window": 13, "hidden_size_global": 24},
        decoder_config={**shape, "num_hidden_layers": 2, "head_dim": 8, "hidden_size_global": 24},
        global_config={**shape, "num_hidden_layers": 2, **wider},
    )
    theirs = BltForCausalLM(config).eval()
    randomise(theirs, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=generator)
    return theirs


@pytest.mark.parametrize("length", LENGTHS)
def test_transformers_finds_the_same_entropies_patches_and_logits(models: Pair, length: int) -> None:
    row = random_row(length, seed=length)
    their_entropies, their_lengths, their_logits = models.their_answer(row)
    entropies, starts, logits = models.our_answer(row)
    torch.testing.assert_close(entropies[:, 1:], their_entropies, atol=1e-5, rtol=0)
    their_starts = starts_from_lengths(their_lengths, length)
    if length == 1:
        their_starts[0, 1] = True  # left open where patches have a maximum, see below
    if models.config.patching.max_patch_bytes is not None and length > 1:
        # With a maximum, transformers drops the patch that the unknown next id opens, and the last position reads the
        # patch before the open one. All earlier positions, and so the rows that are longer, agree.
        assert not their_starts[0, -1]
        starts[0, -1] = False
        with torch.no_grad():
            logits = models.network(row, starts)
    assert starts.equal(their_starts)
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=0)


def test_rows_of_the_comparison_hold_short_and_long_patches(models: Pair) -> None:
    _, starts, _ = models.our_answer(random_row(600, seed=600))
    lengths = starts[0].nonzero().flatten().diff()
    longest = models.config.patching.max_patch_bytes
    assert 1.2 < lengths.float().mean() < 4
    assert len(lengths.unique()) > 3 if longest is None else lengths.max() == longest


def test_a_batch_of_rows_with_different_patch_counts_gives_transformers_logits(models: Pair) -> None:
    rows = torch.cat([random_row(60, seed=seed) for seed in range(3)])
    _, starts, logits = models.our_answer(rows)
    assert len(starts[:, :-1].sum(1).unique()) > 1
    torch.testing.assert_close(logits[:, :-1], models.their_answer(rows)[2][:, :-1], atol=1e-5, rtol=0)


INEXPRESSIBLE = {
    "rises": ("patching rule 'entropy_rise'", tiny_config(patching=PatchingConfig(rule="entropy_rise"))),
    "spaces": ("patching rule 'space'", tiny_config(patching=PatchingConfig(rule="space"), entropy_model=None)),
    "fixed": ("patching rule 'fixed'", tiny_config(patching=PatchingConfig(rule="fixed", patch_bytes=4))),
    "uncalibrated": ("a threshold that is not calibrated yet", tiny_config(patching=PatchingConfig())),
    "newline_reset": (
        "an entropy context that is reset at newlines",
        tiny_config(entropy_model=entropy_model(1, reset_at_newline=True)),
    ),
    "two_local_windows": (
        "different windows in local encoder and decoder",
        tiny_config(local_decoder=local(2, window_positions=8)),
    ),
    "no_local_window": (
        "windows other than a local one",
        tiny_config(local_encoder=local(1, window_positions=None), local_decoder=local(1, window_positions=None)),
    ),
    "latent_window": (
        "windows other than a local one",
        tiny_config(latent=TransformerConfig(num_layers=1, width=32, num_heads=4, ffn_width=40, window_positions=5)),
    ),
    "ngrams": (
        "an entropy model of n-gram statistics",
        tiny_config(entropy_model=NgramEntropyModelConfig(kind="ngram", max_order=4, table_bits=8)),
    ),
    "rare_ngrams": (
        "n-grams that are looked up only if training text has them often enough",
        tiny_config(hash_embeddings=HashEmbeddingsConfig(table_rows=50, min_count=2, filter_bits=8)),
    ),
    "no_entropy_window": (
        "an entropy model without a window",
        tiny_config(entropy_model=entropy_model(1, window_positions=None)),
    ),
}
ALL_CONFIGS = CONFIGS | {name: config for name, (_, config) in INEXPRESSIBLE.items()}


def save_random(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights, under our names, of a random model that is written to the folder."""
    network = ByteLatentTransformer(config)
    randomise(network, seed=0)
    entropy_model = None if config.entropy_model is None else random_entropy_model(config.entropy_model, seed=1)
    save_model(folder, config, entropy_model, network)
    return named_weights(entropy_model, network)


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_transformers_cannot_express_comes_back_to_us_whole_and_is_unknown_to_transformers(
    name: str, tmp_path: Path
) -> None:
    reason, config = INEXPRESSIBLE[name]
    assert inexpressible(config) == [reason]
    weights = save_random(tmp_path, config)
    again, entropy_model, network = load_model(tmp_path, torch.float32)
    assert again == config
    assert_equal_weights(named_weights(entropy_model, network), weights)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="blt-lm"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):  # by name it does not read the model_type
        BltForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_saving_what_was_loaded_writes_the_same_files_to_the_bit(name: str, tmp_path: Path) -> None:
    config = ALL_CONFIGS[name]
    weights = save_random(tmp_path / "first", config)
    again, entropy_model, network = load_model(tmp_path / "first", torch.float32)
    assert again == config
    assert_equal_weights(named_weights(entropy_model, network), weights)
    save_model(tmp_path / "second", again, entropy_model, network)
    files = [*FILES, f"{OWN_WEIGHTS if inexpressible(config) else WEIGHTS}.safetensors"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(files)
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def assert_equal_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)


def test_transformers_writes_back_the_weights_it_read_from_us(tmp_path: Path) -> None:
    save_random(tmp_path / "ours", PROJECTED)
    BltForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_equal_weights(*(load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")))
    assert load_model(tmp_path / "theirs", torch.float32)[0] == PROJECTED


def test_weights_that_transformers_splits_over_files_are_read_from_all_of_them(tmp_path: Path) -> None:
    weights = save_random(tmp_path / "ours", PROJECTED)
    BltForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    _, entropy_model, network = load_model(tmp_path / "split", torch.float32)
    assert_equal_weights(named_weights(entropy_model, network), weights)


def test_tables_of_ngrams_are_loaded_as_whole_numbers_whatever_the_dtype(tmp_path: Path) -> None:
    weights = save_random(tmp_path, INEXPRESSIBLE["ngrams"][1])
    _, entropy_model, network = load_model(tmp_path, torch.bfloat16)
    assert entropy_model is not None
    for name, table in entropy_model.state_dict().items():
        assert table.equal(weights[f"entropy_model.{name}"]) and not table.is_floating_point()
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}


def test_only_the_network_is_loaded_in_a_narrow_dtype(tmp_path: Path) -> None:
    save_random(tmp_path, SHORT_WINDOWS)
    _, entropy_model, network = load_model(tmp_path, torch.bfloat16)
    assert entropy_model is not None
    assert {weight.dtype for weight in entropy_model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}


@pytest.mark.skipif("BLT_1B" not in os.environ, reason="BLT_1B names no folder with the weights of itazap/blt-1b-hf")
def test_the_released_1b_weights_give_their_golden_values() -> None:
    model = load(os.environ["BLT_1B"], device="cpu", dtype="bfloat16")
    ids = torch.tensor([[1, 42, 21, 12, 43, 23, 1, 4]])
    golden = torch.tensor([-10.5, -10.6875, -6.25, -10.5625, -10.3125])
    with torch.no_grad():
        logits = model.network(ids, model.patch_starts(ids))
    torch.testing.assert_close(logits[0, 0, :5], golden, atol=0.125, rtol=0)  # two steps of bf16 at 10
    assert model.encode("my name is").tolist() == [encode("my name is")]
    written = b" alex and i am a student at the university of michigan. i am a senior majoring in computer science"
    assert model.generate("my name is", max_bytes=len(written)) == written


def test_saving_over_a_sharded_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    save_random(tmp_path, PROJECTED)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "old.safetensors"}}')
    weights = save_random(tmp_path, PROJECTED)
    _, entropy_model, network = load_model(tmp_path, torch.float32)
    assert_equal_weights(named_weights(entropy_model, network), weights)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_plain_forward_pass_of_transformers_works_on_what_we_save(tmp_path: Path) -> None:
    """Its default, a cache, fails for models of this class; our config.json turns it off."""
    save_random(tmp_path, SHORT_WINDOWS)
    theirs = BltForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert theirs(random_row(20, seed=1)).logits.shape == (1, 20, 260)


def test_a_model_of_transformers_without_windows_is_read(tmp_path: Path) -> None:
    """Its files are named as theirs are, though we would save it under our own type."""
    theirs = transformers_random_model()
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["patcher_config"]["sliding_window"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, entropy_model, _ = load_model(tmp_path, torch.float32)
    assert inexpressible(config) == ["an entropy model without a window"]
    assert entropy_model is not None
    wide, row = BltForCausalLM.from_pretrained(tmp_path).eval(), random_row(40, seed=2)
    with torch.no_grad():
        their_entropies, _, _ = wide.model.patcher(row)
    torch.testing.assert_close(entropy_model.entropies(row)[:, 1:], their_entropies, atol=1e-5, rtol=0)
