"""The oracle is transformers' generate() without a cache, over its own forward for one row at a time.

One row at a time, as padding and batch mates change what transformers computes.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_models, random_row, threshold_between, tiny_config
from torch import Tensor
from transformers import BltForCausalLM, DynamicCache, LlamaConfig, LogitsProcessor, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.logging import disable_progress_bar

import blt
from blt import huggingface_generate
from blt.byte_ids import EOS, encode
from blt.huggingface import HF_PAD
from blt.huggingface_generate import ByteStreamer, fast_generate, networks_of
from blt.model_files import save_model
from blt.speculate import Round, advance

disable_progress_bar()

OFTEN_ENDING = [EOS, *range(20, 30)]
RETURN_ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class RowByRow(BltForCausalLM):
    """Transformers' model, but each row goes alone and without padding: what its batches should be."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> CausalLMOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = [ids[kept.bool()][None] for ids, kept in zip(input_ids, attention_mask, strict=True)]
        return CausalLMOutput(
            logits=torch.cat([super(RowByRow, self).forward(row, use_cache=False).logits[:, -1:] for row in rows])
        )


def saved_model(folder: Path, seed: int) -> Path:
    """A model with sharp predictions, so that drafts are dared, and patches of one byte and of many."""
    config = tiny_config()
    entropy_model, network = random_models(config, seed)
    network.local_decoder.head.weight.data *= 6
    entropies = torch.cat([entropy_model.entropies(random_row(100, seed=row))[0] for row in range(4)])
    patching = config.patching.model_copy(update={"threshold_nats": threshold_between(entropies)})
    save_model(folder, config.model_copy(update={"patching": patching}), entropy_model, network)
    return folder


@pytest.fixture(scope="module", params=range(2))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowByRow:
    return RowByRow.from_pretrained(saved_model(tmp_path_factory.mktemp("model"), request.param)).eval()


@pytest.fixture
def one(tmp_path: Path) -> BltForCausalLM:
    """A stock model, to do anything with."""
    return BltForCausalLM.from_pretrained(saved_model(tmp_path, 7)).eval()


def prompt(num_ids: int, seed: int = 0) -> Tensor:
    """A row that holds no padding: transformers would guess a mask from it."""
    row = random_row(num_ids, seed)
    return torch.where(row == HF_PAD, 99, row)


def padded(lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    ids = torch.full((len(lengths), max(lengths)), HF_PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(ids.shape[1] - length, None) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = prompt(length, seed + row)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: BltForCausalLM, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What transformers writes and what we do, from the same random numbers."""
    torch.manual_seed(seed)
    expected = model.generate(**options)
    torch.manual_seed(seed)
    return expected, model.generate(custom_generate=fast_generate, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_rows_of_a_ragged_batch_are_what_stock_transformers_writes_for_each_alone(
    theirs: RowByRow, side: str
) -> None:
    lengths = [17, 1, 40, 2, 9, 40]
    batch = padded(lengths, side)
    stock = BltForCausalLM(theirs.config).eval()
    stock.load_state_dict(theirs.state_dict())
    options = {"max_new_tokens": 25, "eos_token_id": OFTEN_ENDING, "pad_token_id": HF_PAD}
    found = theirs.generate(**batch, custom_generate=fast_generate, **options)
    assert found[:, :40].equal(batch["input_ids"])
    ends = set()
    for row, length in enumerate(lengths):
        alone = stock.generate(prompt(length, row), use_cache=False, **options)[0, length:].tolist()
        assert found[row, 40:].tolist() == alone + [HF_PAD] * (found.shape[1] - 40 - len(alone))
        ends.add(len(alone))
    assert len(ends) > 2 and max(ends) == found.shape[1] - 40


def by_batch_row(batch_row: int, ids: Tensor) -> list[int]:
    return list(range(60 + batch_row, 250 - len(ids)))


class Averse(LogitsProcessor):
    """Takes from each id, in place, what it has been written often."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_add_(1, input_ids, torch.full(input_ids.shape, -0.5))


SAMPLED = {"do_sample": True, "top_k": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 12},
    "bad_words": {"bad_words_ids": [[70], [71, 72], *([byte] for byte in range(100, 200))]},
    "own_processor": {"logits_processor": [Averse()]},
    "by_batch_row": {"prefix_allowed_tokens_fn": by_batch_row},
    "temperature": SAMPLED | {"temperature": 1.7},
    "top_k": SAMPLED | {"top_k": 7, "temperature": 3.0},
    "top_p": SAMPLED | {"top_p": 0.8, "temperature": 2.0},
    "sampled_by_batch_row": SAMPLED | {"prefix_allowed_tokens_fn": by_batch_row, "temperature": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_processors_see_and_give_what_they_do_in_transformers_and_draws_are_the_same(
    theirs: RowByRow, options: dict[str, Any]
) -> None:
    always = {"max_new_tokens": 15, "eos_token_id": OFTEN_ENDING, **RETURN_ALL}
    expected, found = both(theirs, **padded([3, 20, 11]), **always, **options)
    assert found.sequences.equal(expected.sequences)
    assert type(found) is type(expected)
    unfinished = torch.ones(3, dtype=torch.bool)
    for step in range(found.sequences.shape[1] - 20):
        for ours, true in ((found.scores, expected.scores), (found.logits, expected.logits)):
            torch.testing.assert_close(ours[step][unfinished], true[step][unfinished], atol=1e-4, rtol=1e-5)
        unfinished &= ~torch.isin(found.sequences[:, 20 + step], torch.tensor(OFTEN_ENDING))
    assert len(found.scores) == len(found.logits) == len(expected.scores)


def test_without_the_names_of_scores_and_logits_none_are_kept(theirs: RowByRow) -> None:
    expected, found = both(theirs, input_ids=prompt(5), max_new_tokens=3, return_dict_in_generate=True)
    assert found.sequences.equal(expected.sequences)
    assert found.keys() == expected.keys() == {"sequences"}


def test_several_sequences_of_one_prompt_are_drawn_as_in_transformers(theirs: RowByRow) -> None:
    batch = padded([6, 9])
    expected, found = both(theirs, seed=5, **batch, **SAMPLED, num_return_sequences=3, max_new_tokens=10)
    assert found.equal(expected)
    assert len({tuple(row) for row in found.tolist()}) == 6


class EvenSum(StoppingCriteria):
    """Ends a row whose length and newest two ids make a multiple of 5."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return (input_ids[:, -2:].sum(1) + input_ids.shape[1]) % 5 == 0


@pytest.mark.parametrize("eos", [OFTEN_ENDING, None])
def test_criteria_end_each_row_where_they_do_in_transformers(theirs: RowByRow, eos: list[int] | None) -> None:
    # Without an EOS transformers pads no row: all go on until the last has ended
    without = {"suppress_tokens": [EOS]} if eos is None else {}
    theirs.generation_config.eos_token_id = eos
    options = {"eos_token_id": eos, "pad_token_id": HF_PAD, "stopping_criteria": [EvenSum()], "max_new_tokens": 30}
    expected, found = both(theirs, **padded([4, 13, 8, 8]), **options, **without)
    theirs.generation_config.eos_token_id = EOS
    assert found.equal(expected)
    assert found.shape[1] < 13 + 30
    assert bool((found[:, 13:] == HF_PAD).any()) == (eos is not None)


def test_criteria_are_given_the_scores_that_are_kept(theirs: RowByRow) -> None:
    given: list[int | None] = []

    class Recording(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            given.append(None if scores is None else len(scores))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for options in (RETURN_ALL, {}):
        theirs.generate(
            prompt(3),
            custom_generate=fast_generate,
            stopping_criteria=[Recording()],
            max_new_tokens=2,
            eos_token_id=None,
            **options,
        )
    assert given == [1, 2, None, None]


class RecordingStreamer:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.events.append(value.tolist())

    def end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("speculate", [0, 5])
def test_a_streamer_is_told_what_it_is_by_transformers(theirs: RowByRow, speculate: int) -> None:
    batch = padded([6])
    expected, found = RecordingStreamer(), RecordingStreamer()
    sequences = theirs.generate(**batch, streamer=expected, max_new_tokens=12)
    theirs.generate(**batch, custom_generate=fast_generate, speculate=speculate, streamer=found, max_new_tokens=12)
    assert found.events == expected.events
    assert found.events == [[sequences[0, :6].tolist()], *([drawn] for drawn in sequences[0, 6:].tolist()), "end"]


@pytest.mark.parametrize("streams", [dict, lambda: {"custom_generate": fast_generate}])
def test_a_byte_streamer_prints_the_prompt_and_what_is_written(
    one: BltForCausalLM, streams: Callable[[], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    row = torch.tensor([encode("naïve ")])
    sequences = one.generate(row, max_new_tokens=30, streamer=ByteStreamer(), **streams())
    written = bytes(byte_id - 4 for byte_id in sequences[0].tolist() if byte_id >= 4)
    assert capsys.readouterr().out == written.decode("utf-8", "replace")
    assert written.startswith("naïve ".encode())


def streamed(data: bytes, prompt_bytes: int, skip_prompt: bool) -> list[str]:
    pieces: list[str] = []
    streamer = ByteStreamer(skip_prompt, pieces.append)
    for _ in range(2):  # after its end a streamer begins anew
        pieces.clear()
        streamer.put(torch.tensor([encode(data[:prompt_bytes])]))
        for byte in data[prompt_bytes:]:
            streamer.put(torch.tensor([byte + 4]))
        streamer.put(torch.tensor([EOS]))
        streamer.end()
    return pieces


@given(st.binary(max_size=20) | st.text(max_size=20).map(str.encode), st.integers(0, 20))
def test_a_byte_streamer_loses_nothing(data: bytes, prompt_bytes: int) -> None:
    assert "".join(streamed(data, prompt_bytes, False)) == data.decode("utf-8", "replace")
    assert "".join(streamed(data, prompt_bytes, True)) == data[prompt_bytes:].decode("utf-8", "replace")


@given(st.text(max_size=20))
def test_a_byte_streamer_lets_each_character_go_as_soon_as_it_is_whole(text: str) -> None:
    assert streamed(text.encode(), 0, False) == list(text)


def test_a_byte_that_is_no_character_comes_out_at_once_as_a_replacement() -> None:
    assert streamed(b"a\xffb\xe2\x82c\xe2", 0, False) == ["a", "\ufffd", "b", "\ufffdc", "\ufffd"]


def test_a_byte_streamer_refuses_more_rows_than_one(one: BltForCausalLM) -> None:
    with pytest.raises(ValueError, match="one row, got 2"):
        one.generate(prompt(3).expand(2, -1), custom_generate=fast_generate, streamer=ByteStreamer(), max_new_tokens=2)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """All rounds that are advanced in a test."""
    found: list[Round] = []

    def recorded(*arguments: Any) -> Round:
        found.append(advance(*arguments))
        return found[-1]

    monkeypatch.setattr(huggingface_generate, "advance", recorded)
    return found


@pytest.mark.parametrize("speculate", [1, 31])
def test_with_drafts_the_greedy_ids_are_the_same(theirs: RowByRow, speculate: int, rounds: list[Round]) -> None:
    before = torch.get_rng_state()
    drafting = functools.partial(fast_generate, speculate=speculate)
    for row, options in enumerate(({}, {"repetition_penalty": 1.4}, {"bad_words_ids": [[70], [90]]})):
        always = {"input_ids": prompt(5 + 20 * row, row), "max_new_tokens": 50, **options}
        plain = theirs.generate(custom_generate=fast_generate, **always)
        assert theirs.generate(custom_generate=drafting, **always).equal(plain)
    assert sum(done.accepted for done in rounds) > 10
    assert sum(done.drafted - done.accepted for done in rounds) > 0
    assert torch.get_rng_state().equal(before)


def test_with_drafts_a_row_ends_at_the_very_byte_that_ends_it(theirs: RowByRow, rounds: list[Round]) -> None:
    dropped = 0
    for seed in range(8):
        options = {"stopping_criteria": [EvenSum()], "max_new_tokens": 7 + seed, "eos_token_id": OFTEN_ENDING}
        rounds.clear()
        plain = theirs.generate(prompt(9, seed), custom_generate=fast_generate, **options)
        drafted = theirs.generate(prompt(9, seed), custom_generate=fast_generate, speculate=6, **options)
        assert drafted.equal(plain)
        drawn = 1 + sum(len(done.ids[0]) for done in rounds)
        assert drawn <= 7 + seed
        dropped += drawn - (drafted.shape[1] - 9)
    assert dropped > 0


def by_length(batch_row: int, ids: Tensor) -> list[int]:
    return list(range(4 + 2 * len(ids), 104 + 2 * len(ids)))


def test_with_drafts_padding_is_cut_off_and_shown_to_processors_as_in_transformers(theirs: RowByRow) -> None:
    one_padded = {name: values[:1] for name, values in padded([3, 30]).items()}
    options = {"prefix_allowed_tokens_fn": by_length, "max_new_tokens": 30}
    expected, _ = both(theirs, **one_padded, **options)
    assert theirs.generate(**one_padded, custom_generate=fast_generate, speculate=4, **options).equal(expected)


def test_with_drafts_sampling_obeys_processors_and_the_global_generator(theirs: RowByRow, rounds: list[Round]) -> None:
    def sampled(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        drafting = functools.partial(fast_generate, speculate=8)
        return theirs.generate(prompt(8), custom_generate=drafting, max_new_tokens=40, do_sample=True, **options)

    assert sampled(0, top_k=1).equal(theirs.generate(prompt(8), custom_generate=fast_generate, max_new_tokens=40))
    warm = {"temperature": 1.3, "bad_words_ids": [[byte] for byte in range(130, 260)]}
    assert sampled(1, **warm).equal(sampled(1, **warm))
    assert not sampled(1, **warm).equal(sampled(2, **warm))
    assert int(sampled(3, **warm)[:, 8:].max()) < 130
    assert sum(done.accepted for done in rounds) > 10


def test_a_change_of_the_models_weights_is_a_change_of_ours(one: BltForCausalLM) -> None:
    row = prompt(12)
    _, before = both(one, input_ids=row, max_new_tokens=20)
    with torch.no_grad():
        for weight in one.parameters():
            weight += 0.3 * weight.roll(1, 0)
    expected, found = both(one, input_ids=row, max_new_tokens=20)
    assert found.equal(expected)
    assert not found.equal(before)


def test_the_models_weights_are_neither_copied_nor_told_to_need_gradients(one: BltForCausalLM) -> None:
    one.lm_head.weight.requires_grad_(False)
    networks = networks_of(one)
    pairs = (
        (networks.network.local_decoder.head.weight, one.lm_head.weight),
        (networks.entropy_model.head.weight, one.model.patcher.lm_head.weight),
    )
    assert [(ours.data_ptr(), true.requires_grad) for ours, true in pairs] == [
        (one.lm_head.weight.data_ptr(), False),
        (one.model.patcher.lm_head.weight.data_ptr(), True),
    ]


def test_a_model_in_bf16_writes_with_entropies_in_fp32(one: BltForCausalLM) -> None:
    wide = one.generate(prompt(20), custom_generate=fast_generate, max_new_tokens=5, **RETURN_ALL)
    one.to(torch.bfloat16)
    networks = networks_of(one)
    assert {weight.dtype for weight in networks.network.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in networks.entropy_model.parameters()} == {torch.float32}
    narrow = one.generate(prompt(20), custom_generate=fast_generate, max_new_tokens=5, **RETURN_ALL)
    assert narrow.sequences.shape == wide.sequences.shape
    assert narrow.scores[0].dtype == torch.float32
    error = (narrow.scores[0] - wide.scores[0]).square().mean().sqrt()
    assert error < 0.1 * wide.scores[0].std()
    drafted = one.generate(prompt(20), custom_generate=fast_generate, speculate=4, max_new_tokens=5)
    assert drafted.shape == wide.sequences.shape
    assert {weight.dtype for weight in one.parameters()} == {torch.bfloat16}


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "not assisted_generation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "nothing for output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "nothing for output_hidden_states"),
        ({"speculate": 32}, "speculate must be 0"),
        ({"speculate": -1}, "speculate must be 0"),
        ({"speculate": 2, "num_return_sequences": 2, "do_sample": True}, "for one row, got 2"),
        ({"speculate": 2, "output_scores": True, "return_dict_in_generate": True}, "output_scores needs speculate=0"),
        ({"speculate": 2, "output_logits": True, "return_dict_in_generate": True}, "output_logits needs speculate=0"),
        ({"past_key_values": filled_cache()}, "past_key_values"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "row 0 of input_ids is empty or all masked"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(one: BltForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one.generate(prompt(3), **{"custom_generate": fast_generate, "max_new_tokens": 2, **options})


def test_a_model_without_some_of_its_weights_is_refused(one: BltForCausalLM) -> None:
    one.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"holds no lm_head\.weight"):
        networks_of(one)
    del one.lm_head
    with pytest.raises(ValueError, match=r"holds no lm_head\.weight"):
        networks_of(one)


def test_a_model_of_another_kind_is_refused(one: BltForCausalLM) -> None:
    one.config = LlamaConfig()
    with pytest.raises(ValueError, match="'llama', not 'blt'"):
        networks_of(one)


def test_transformers_fails_with_its_cache_before_it_gets_to_us(one: BltForCausalLM) -> None:
    with pytest.raises(AttributeError, match="num_hidden_layers"):
        one.generate(prompt(3), use_cache=True, custom_generate=fast_generate, max_new_tokens=2)


@pytest.mark.parametrize("wrapped", [fast_generate, lambda *given, **named: fast_generate(*given, **named)])
def test_a_streamer_is_found_through_whatever_wraps_us(one: BltForCausalLM, wrapped: Callable[..., Any]) -> None:
    streamer, bound = RecordingStreamer(), RecordingStreamer()
    one.generate(prompt(3), streamer=streamer, custom_generate=wrapped, max_new_tokens=2)
    with_bound = functools.partial(fast_generate, streamer=bound)
    one.generate(prompt(3), custom_generate=with_bound, max_new_tokens=2)
    assert streamer.events == bound.events and len(bound.events) == 4


def test_the_public_names_come_without_transformers() -> None:
    code = "import sys, blt; blt.fast_generate, blt.ByteStreamer; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
    assert blt.fast_generate is fast_generate and blt.ByteStreamer is ByteStreamer
