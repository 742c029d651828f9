"""What ``blt.load`` returns does what the interface promises, and generation is the plain re-forward."""

from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

import blt
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, ModelConfig, PatchingConfig, TransformerConfig
from blt.generate import GenerationStats
from blt.language_model import LanguageModel
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.transformer import initialise

RULES = {
    "entropy": PatchingConfig(rule="entropy", threshold_nats=5.3),
    "entropy_rise": PatchingConfig(rule="entropy_rise", threshold_nats=0.01),
    "space": PatchingConfig(rule="space"),
    "fixed": PatchingConfig(rule="fixed", patch_bytes=4, max_patch_bytes=3),
}


def tiny_model(rule: str = "entropy") -> LanguageModel:
    stack = {"num_layers": 1, "width": 16, "num_heads": 2, "ffn_width": 24}
    patching = RULES[rule]
    config = ModelConfig(
        entropy_model=EntropyModelConfig(**stack, window_positions=16) if patching.uses_entropies else None,
        patching=patching,
        hash_embeddings=HashEmbeddingsConfig(table_rows=50),
        local_encoder=TransformerConfig(**stack),
        latent=TransformerConfig(**stack | {"width": 32}),
        local_decoder=TransformerConfig(**stack),
        max_bytes=200,
    )
    generator = torch.Generator().manual_seed(1)
    network = ByteLatentTransformer(config)
    entropy_model = EntropyModel(config.entropy_model) if config.entropy_model else None
    for module in (network, entropy_model):
        if module is not None:
            initialise(module, generator)
            for weight in module.parameters():  # far from uniform, so that decisions are not ties
                weight.data *= 2
    return LanguageModel(config, entropy_model, network)


@pytest.mark.parametrize("rule", RULES)
def test_greedy_generation_is_the_argmax_of_a_full_forward_for_every_byte(rule: str) -> None:
    lm = tiny_model(rule)
    ids = lm.encode("to be")
    for _ in range(12):
        logits = lm.network(ids, lm.patch_starts(ids))[0, -1].detach()
        logits[[0, 1, 3]] = -torch.inf
        next_id = int(logits.argmax())
        if next_id == 2:
            break
        ids = torch.cat([ids, torch.tensor([[next_id]])], dim=1)
    assert lm.generate("to be", 12) == bytes(ids[0, 6:] - 4)


def test_a_list_of_prompts_gives_what_each_gives_alone() -> None:
    lm = tiny_model()
    prompts = ["a", "longer prompt", ""]
    together = lm.generate(prompts, 10, temperature=1.0, seed=5)
    assert together == [lm.generate(one, 10, temperature=1.0, seed=5 + row) for row, one in enumerate(prompts)]


@pytest.mark.parametrize("rule", RULES)
def test_speculation_changes_no_greedy_byte_of_one_prompt_or_several(rule: str) -> None:
    lm, prompts = tiny_model(rule), ["to be", "", "a longer prompt"]
    plain = [lm.generate(prompt, 14) for prompt in prompts]
    assert [lm.generate(prompt, 14, speculate=6) for prompt in prompts] == plain
    assert lm.generate(prompts, 14, speculate=6) == plain


def test_stats_grow_with_the_stream() -> None:
    lm, stats, seen = tiny_model("fixed"), GenerationStats(), []
    for _ in lm.stream("x", 20, temperature=1.0, seed=3, speculate=4, stats=stats):
        seen.append((stats.latent_calls, stats.drafted_bytes, stats.accepted_bytes))
    assert seen == sorted(seen) and seen[0] == (0, 0, 0) and len(set(seen)) > 3
    assert 0 < stats.accepted_bytes <= stats.drafted_bytes


def test_streamed_pieces_join_to_what_generate_returns() -> None:
    lm = tiny_model()
    assert b"".join(lm.stream("x", 20, temperature=1.0, seed=3)) == lm.generate("x", 20, temperature=1.0, seed=3)


@pytest.mark.parametrize("rule", RULES)
def test_patches_join_to_the_text_also_beyond_the_models_limit(rule: str) -> None:
    lm = tiny_model(rule)
    for text in (b"", b"x", b"some text, in patches", bytes(range(256)) * 2):
        pieces = lm.patches(text)
        assert b"".join(pieces) == text
        assert all(pieces)


def test_shapes_are_those_of_the_interface() -> None:
    lm = tiny_model()
    ids = lm.encode("text")
    assert ids.tolist() == [[1, *(byte + 4 for byte in b"text")]]
    entropies, starts = lm.entropies(ids), lm.patch_starts(ids)
    assert entropies.shape == starts.shape == (1, 6)
    assert entropies[0, 0].isnan()
    assert lm.network(ids, starts).shape == (1, 5, 260)
    assert lm.score("text").bits_per_byte > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_model_loads_equal(rule: str, tmp_path: Path) -> None:
    lm = tiny_model(rule)
    lm.save(tmp_path)
    again = blt.load(tmp_path, device="cpu")
    ids = lm.encode("some text")
    assert torch.equal(lm.network(ids, lm.patch_starts(ids)), again.network(ids, again.patch_starts(ids)))
    assert again.config == lm.config


def test_bf16_loads_and_keeps_its_entropy_model_in_fp32(tmp_path: Path) -> None:
    lm = tiny_model()
    lm.save(tmp_path)
    half = blt.load(tmp_path, device="cpu", dtype="bfloat16")
    assert half.entropy_model is not None
    assert {weight.dtype for weight in half.network.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in half.entropy_model.parameters()} == {torch.float32}
    ids = lm.encode("some text")
    assert torch.equal(lm.patch_starts(ids), half.patch_starts(ids))
    logits, of_half = lm.network(ids, lm.patch_starts(ids)), half.network(ids, half.patch_starts(ids))
    assert (logits - of_half).abs().max() < 0.05 * logits.abs().max()


def test_a_prompt_beyond_the_limit_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="exceed the 199 bytes this model can hold"):
        tiny_model().stream("x" * 150, 60)


def test_rows_beyond_the_limit_are_refused() -> None:
    lm = tiny_model("space")
    with pytest.raises(ValueError, match="beyond this model's limit of 200"):
        lm.patch_starts(torch.full((1, 201), 70))


def test_entropies_of_a_model_without_an_entropy_model_say_why_not() -> None:
    lm = tiny_model("space")
    with pytest.raises(ValueError, match="no entropy model: its patching rule is 'space'"):
        lm.entropies(lm.encode("x"))


def test_a_stock_training_loop_can_use_the_network() -> None:
    lm = tiny_model("fixed")
    optimizer = torch.optim.SGD(lm.network.parameters(), lr=0.1)
    ids = lm.encode("abcabcabcabc")
    starts, losses = lm.patch_starts(ids), []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(lm.network(ids, starts)[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_int8_rounds_the_network_alone_and_is_not_saved(tmp_path: Path) -> None:
    lm = tiny_model()
    lm.save(tmp_path)
    rounded = blt.load(tmp_path, device="cpu", dtype="int8")
    ids = lm.encode("some text")
    assert torch.equal(lm.patch_starts(ids), rounded.patch_starts(ids))
    logits, of_rounded = lm.network(ids, lm.patch_starts(ids)), rounded.network(ids, rounded.patch_starts(ids))
    assert 0 < (logits - of_rounded).abs().max() < 0.05 * logits.abs().max()
    assert len(rounded.generate("some text", max_bytes=20)) == 20
    with pytest.raises(ValueError, match="load it without dtype='int8'"):
        rounded.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_compiled_steps_without_a_compiler_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", nowhere)
    with pytest.raises(ValueError, match=r"install one \(apt install g\+\+\)"):
        tiny_model().generate("some text", max_bytes=2, compiled=True)


def test_one_stop_string_needs_no_list() -> None:
    lm = tiny_model()
    whole = lm.generate("to be", 30)
    stop = whole[4:7]
    for given in (stop, [stop], (b"never", stop)):
        assert lm.generate("to be", 30, stop=given) == whole[: whole.index(stop)]
        assert lm.generate(["to be"], 30, stop=given) == [whole[: whole.index(stop)]]
    assert lm.generate("to be", 30, stop="never") == whole


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_a_dtype_that_is_none_of_ours_is_told_those_that_are(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype float16 is none of auto, float32, bfloat16 and int8"):
        blt.load("builtin", dtype=dtype)


def test_device_and_dtype_may_be_torchs() -> None:
    lm = blt.load("builtin", torch.device("cpu"), torch.bfloat16)
    assert lm.device == torch.device("cpu") and next(lm.network.latent_transformer.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("window_bytes", [1, 0, -3])
def test_windows_without_a_byte_score_nothing(window_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2, BOS and a byte, got {window_bytes}"):
        tiny_model().score("to be", window_bytes)
