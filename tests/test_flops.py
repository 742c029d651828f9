"""The analytic counts: the released parameter counts to the digit, and FLOPs against arithmetic done by hand."""

from itertools import pairwise

import pytest

from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    NgramEntropyModelConfig,
    PatchingConfig,
    TransformerConfig,
)
from blt.config_file import read_run_config
from blt.flops import (
    cache_bytes_per_byte,
    flops_per_byte,
    parameter_counts,
    saving_table,
    token_model_flops_per_byte,
    training_bytes,
    transformer_flops,
    weight_bytes,
)
from blt.model.ngram_entropy_model import NgramEntropyModel

TINY = ModelConfig(
    entropy_model=EntropyModelConfig(num_layers=1, width=4, num_heads=2, ffn_width=6, window_positions=3),
    hash_embeddings=HashEmbeddingsConfig(ngram_bytes=(3, 4), table_rows=10),
    local_encoder=TransformerConfig(num_layers=1, width=4, num_heads=2, ffn_width=6, window_positions=5),
    latent=TransformerConfig(num_layers=2, width=6, num_heads=1, ffn_width=10),
    local_decoder=TransformerConfig(num_layers=2, width=4, num_heads=2, ffn_width=6, window_positions=5),
    slots_per_patch=2,  # 2 x 4 differs from the latent width 6, so there is a token_embedding_projection
)
PRESETS = {name: read_run_config(name).model for name in ("blt_1b", "blt_8b")}


@pytest.mark.parametrize(
    ("preset", "network", "hash_tables"),
    [("blt_1b", 4_533_879_808, 3_072_012_288), ("blt_8b", 10_553_570_560, 3_840_015_360)],
)
def test_presets_have_the_released_parameter_counts(preset: str, network: int, hash_tables: int) -> None:
    counts = parameter_counts(PRESETS[preset])
    assert counts["network"] == network
    assert counts["hash_tables"] == hash_tables
    assert counts["entropy_model"] == 99_512_064
    assert counts["total"] == network + 99_512_064


def test_parameters_of_a_tiny_model_are_what_a_hand_counts() -> None:
    block = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4  # q k v o, SwiGLU, two norms at width 4
    cross_attention = 4 * 4 * 4 + 2 * 4
    assert parameter_counts(TINY) == {
        "entropy_model": 260 * 4 + block + 4 + 4 * 260,
        "byte_embedding": 260 * 4,
        "hash_tables": 2 * 10 * 4,
        "local_encoder": block + cross_attention + 4 * 8,
        "latent": 2 * (4 * 6 * 6 + 3 * 6 * 10 + 2 * 6) + 8 * 6,
        "local_decoder": 2 * block + 2 * cross_attention + 6 * 8 + 4 + 4 * 260,
        "network": 1040 + 80 + 248 + 720 + 1524,
        "total": 1040 + 80 + 248 + 720 + 1524 + 2228,
    }


def test_flops_of_a_tiny_model_are_what_a_hand_counts() -> None:
    flops = flops_per_byte(TINY, mean_patch_bytes=4, context_bytes=20)  # 5 patches, half a slot per byte
    projections, feed_forward = 4 * 2 * 4 * 4, 3 * 2 * 4 * 6  # of one byte-level layer
    byte_layer = projections + 4 * 4 * (5 + 1) / 2 + feed_forward  # a window of 5 keys
    head = 2 * 4 * 260
    assert flops.entropy_model == projections + 4 * 4 * (3 + 1) / 2 + feed_forward + head == 2384
    assert flops.local_encoder == byte_layer == 320
    # a query: q and o, k and v of 2 bytes per slot, attention to 4 bytes; then 4 -> 8 once per patch of 4 bytes
    assert flops.encoder_cross_attention == ((2 + 2 * 2) * 2 * 16 + 4 * 4 * (4 + 1) / 2) / 2 + 2 * 4 * 8 / 4 == 132
    # two layers and 8 -> 6, once per patch
    latent_layer = 4 * 2 * 6 * 6 + 4 * 6 * (5 + 1) / 2 + 3 * 2 * 6 * 10
    assert flops.latent == (2 * latent_layer + 2 * 8 * 6) / 4 == 384
    # two layers: q and o, k and v of half a slot per byte, attention to 2 slots; then 6 -> 8 once per patch
    assert flops.decoder_cross_attention == 2 * ((2 + 2 / 2) * 2 * 16 + 4 * 4 * (2 + 1) / 2) + 2 * 6 * 8 / 4 == 264
    assert flops.local_decoder == 2 * byte_layer + head == 2720
    assert flops.inference == 2384 + 320 + 132 + 384 + 264 + 2720 == 6204
    assert flops.network == 6204 - 2384
    assert flops.training == 3 * 3820 + 2384  # the entropy model is frozen: forward only


def test_a_swiglu_of_eight_thirds_the_width_costs_what_the_paper_counts() -> None:
    width, context = 12, 9
    config = TransformerConfig(num_layers=1, width=width, num_heads=2, ffn_width=8 * width // 3)
    # eq. 14-17 per layer: attention, projections at r = 1, feed-forward 2 * 2 * h * 4h
    assert transformer_flops(config, context) == 4 * width * (context + 1) / 2 + 8 * width**2 + 16 * width**2


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_list_every_part_and_end_with_their_sum(preset: str) -> None:
    flops = flops_per_byte(PRESETS[preset], 4.5, 8_192)
    *parts, total = flops.rows()
    assert len(parts) == 6
    assert total == ("total", pytest.approx(sum(row[1] for row in parts)), pytest.approx(sum(row[2] for row in parts)))
    assert total == ("total", flops.inference, flops.training)


@pytest.mark.parametrize("config", [TINY, *PRESETS.values()], ids=["tiny", *PRESETS])
def test_larger_patches_cost_fewer_flops(config: ModelConfig) -> None:
    costs = [flops_per_byte(config, size, 8_192).inference for size in (1, 1.5, 2, 4, 4.5, 6, 8, 16, 100)]
    assert all(larger < smaller for smaller, larger in pairwise(costs))


def test_only_the_latent_part_grows_beyond_the_windows() -> None:
    near, far = (flops_per_byte(PRESETS["blt_8b"], 4, context_bytes) for context_bytes in (512, 8_192))
    assert far.latent > near.latent
    assert (far.entropy_model, far.local_encoder, far.local_decoder) == (
        near.entropy_model,
        near.local_encoder,
        near.local_decoder,
    )


def test_a_model_without_an_entropy_model_pays_nothing_for_one() -> None:
    config = TINY.model_copy(
        update={"entropy_model": None, "patching": PatchingConfig(rule="fixed", patch_bytes=4)},
    )
    flops = flops_per_byte(config, 4, 20)
    assert flops.entropy_model == 0
    assert flops.inference == flops.network == flops_per_byte(TINY, 4, 20).network
    assert flops.training == 3 * flops.inference
    assert parameter_counts(config)["total"] == parameter_counts(TINY)["network"]
    assert cache_bytes_per_byte(config, 4, 20)["entropy_model"] == 0


def test_ngram_statistics_cost_memory_and_no_flops() -> None:
    ngrams = NgramEntropyModelConfig(kind="ngram", max_order=4, table_bits=10)
    config = TINY.model_copy(update={"entropy_model": ngrams})
    counts = parameter_counts(config)
    assert counts["entropy_model"] == 256 * 256 + 2 * 1024
    assert counts["network"] == parameter_counts(TINY)["network"]
    tables = NgramEntropyModel(ngrams).state_dict().values()
    assert sum(table.numel() for table in tables) == counts["entropy_model"]
    size = sum(table.nbytes for table in tables)
    assert weight_bytes(config, 2) - 2 * counts["network"] == weight_bytes(config, 4) - 4 * counts["network"] == size
    assert training_bytes(config) - size == training_bytes(TINY) - 4 * parameter_counts(TINY)["entropy_model"]
    assert flops_per_byte(config, 4, 20).entropy_model == 0
    assert cache_bytes_per_byte(config, 4, 20)["entropy_model"] == 0


@pytest.mark.parametrize("mean_patch_bytes", [0, 0.5, 21])
def test_a_mean_patch_outside_the_context_is_refused(mean_patch_bytes: float) -> None:
    with pytest.raises(ValueError, match=f"got {mean_patch_bytes}"):
        flops_per_byte(TINY, mean_patch_bytes, context_bytes=20)


def test_a_token_model_pays_its_transformer_and_vocabulary_once_per_token() -> None:
    latent_layer = 4 * 2 * 6 * 6 + 4 * 6 * (5 + 1) / 2 + 3 * 2 * 6 * 10
    flops = token_model_flops_per_byte(TINY.latent, context_bytes=20, bytes_per_token=4, vocabulary=100)
    assert flops == (2 * latent_layer + 2 * 6 * 100) / 4 == 660


def test_the_saving_table_holds_one_minus_the_ratio_to_the_token_model() -> None:
    (row,) = saving_table(TINY, patch_sizes=[4], context_bytes=20)
    tokens = 20 / 4.4
    latent_layer = 4 * 2 * 6 * 6 + 4 * 6 * (tokens + 1) / 2 + 3 * 2 * 6 * 10
    token_model = (2 * latent_layer + 2 * 6 * 128_256) / 4.4
    assert row.blt_flops_per_byte == 6204
    assert row.token_model_flops_per_byte == pytest.approx(token_model)
    assert row.saved_fraction == pytest.approx(1 - 6204 / token_model)
    assert row.saved_fraction_without_entropy_model == pytest.approx(1 - 3820 / token_model)


def test_the_8b_model_costs_more_than_tokens_at_4_bytes_per_patch_and_saves_from_6() -> None:
    at_4, at_6, at_8 = saving_table(PRESETS["blt_8b"])
    assert (at_4.mean_patch_bytes, at_6.mean_patch_bytes, at_8.mean_patch_bytes) == (4, 6, 8)
    assert at_4.saved_fraction < 0 < at_6.saved_fraction < at_8.saved_fraction
    for row in (at_4, at_6, at_8):
        assert row.saved_fraction < row.saved_fraction_without_entropy_model


def test_training_memory_has_two_moments_for_all_and_a_gradient_for_all_but_tables_and_the_frozen_entropy_model() -> (
    None
):
    in_tables = 20 * TINY.local_encoder.width  # two tables of ten rows
    assert weight_bytes(TINY, bytes_per_parameter=2) == 2 * (3612 + 2228)
    assert training_bytes(TINY) == (4 + 8) * 3612 + 4 * (3612 - in_tables) + 4 * 20 + 4 * 2228


def test_byte_level_caches_stop_growing_at_their_windows() -> None:
    cache = cache_bytes_per_byte(TINY, mean_patch_bytes=4, context_bytes=20, bytes_per_number=2)
    assert cache == {  # keys and values x layers x width x positions x 2 bytes, over 20 bytes of text
        "entropy_model": 2 * 1 * 4 * 3 * 2 / 20,
        "local_encoder": 2 * 1 * 4 * 5 * 2 / 20,
        "latent": 2 * 2 * 6 * 5 * 2 / 20,
        "local_decoder": 2 * 2 * 4 * 5 * 2 / 20,
        "total": (24 + 40 + 120 + 80) * 2 / 20,
    }
    doubled = cache_bytes_per_byte(TINY, mean_patch_bytes=4, context_bytes=40, bytes_per_number=2)
    assert doubled["latent"] == cache["latent"]
    assert doubled["local_decoder"] == cache["local_decoder"] / 2
