"""Sampling, stopping, streaming, batches: what comes out is what the logits of a plain forward allow."""

import math
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import RULES, continuations, language_model, networks_of, random_prompts
from tiny import SHAPE

from blt.byte_ids import BOS, BYTE_OFFSET, EOS, encode, incomplete_suffix_length, utf8_allowed_next
from blt.config import PatchingConfig, TransformerConfig
from blt.generate import ROWS_TOGETHER, Batch, GenerationStats, Pieces, Request, start_writer, stream, write_all
from blt.incremental import Networks, State, extend, prefill, start, step
from blt.language_model import LanguageModel
from blt.model.kv_cache import FIRST_SLOTS
from blt.sampling import NextLogits, Probabilities, Sampling, draw, next_probabilities
from blt.speculate import Drawer, advance

VOCAB = 260


def logits_favouring(byte: int) -> torch.Tensor:
    logits = torch.zeros(VOCAB)
    logits[byte + BYTE_OFFSET] = 5.0
    return logits


def scripted(data: bytes) -> list[int]:
    """The ids of a model that writes ``data`` whatever it reads, then EOS and then more."""
    return [*(byte + BYTE_OFFSET for byte in data), EOS, 70, 71]


def write(data: bytes, max_bytes: int = 100, stop: tuple[bytes, ...] = ()) -> list[bytes]:
    writer, pieces = start_writer(Request([1], max_bytes, stop=stop)), []
    for byte_id in scripted(data):
        pieces.append(writer.write([byte_id]))
        if writer.finished:
            break
    at_once = start_writer(Request([1], max_bytes, stop=stop))
    at_once.write(scripted(data))
    assert b"".join(pieces) == writer.text == at_once.text
    return [piece for piece in pieces if piece]


def pieces_of(data: bytes) -> list[bytes]:
    pieces = Pieces()
    return [*(pieces.push(byte) for byte in data), pieces.end()]


def test_eos_ends_the_text_and_is_not_part_of_it() -> None:
    assert b"".join(write(b"abc")) == b"abc"


def test_the_limit_counts_bytes_and_may_fall_inside_a_character() -> None:
    assert b"".join(write("aé".encode(), max_bytes=2)) == b"a\xc3"


def test_a_stop_string_that_straddles_pieces_is_found_and_left_out() -> None:
    assert b"".join(write(b"one two three", stop=(b"o th", b"never"))) == b"one tw"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert b"".join(write(b"abcdef", stop=(b"ef", b"cd"))) == b"ab"


def test_text_that_only_begins_like_a_stop_string_is_not_lost() -> None:
    assert b"".join(write(b"ab</", stop=(b"</s>",))) == b"ab</"


@given(st.text(max_size=30))
def test_no_piece_of_a_stream_breaks_a_character(text: str) -> None:
    pieces = pieces_of(text.encode())
    assert b"".join(pieces) == text.encode()
    for piece in pieces:
        piece.decode()  # raises where a character is cut


@given(st.binary(max_size=30))
def test_a_stream_of_any_bytes_loses_none(data: bytes) -> None:
    assert b"".join(pieces_of(data)) == data


def test_a_temperature_near_zero_is_greedy_and_not_nan() -> None:
    probabilities = next_probabilities(logits_favouring(77), Sampling(temperature=1e-40), b"")
    assert probabilities[77 + BYTE_OFFSET] == 1


def test_control_ids_are_never_drawn_however_probable() -> None:
    logits = torch.zeros(VOCAB)
    logits[[0, 1, 3]] = 50.0
    probabilities = next_probabilities(logits, Sampling(temperature=1.0), b"")
    assert probabilities[[0, 1, 3]].sum() == 0
    assert probabilities[EOS] > 0


def test_greedy_takes_the_most_probable_id() -> None:
    assert next_probabilities(logits_favouring(77), Sampling(), b"").argmax() == 77 + BYTE_OFFSET


def test_filters_keep_what_they_say() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for sampling, kept in (
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_p=0.6), 2),
        (Sampling(temperature=1.0, top_p=0.5), 1),
        (Sampling(temperature=1.0, min_p=0.25), 3),
        (Sampling(temperature=1.0, top_k=2, min_p=0.9), 1),
    ):
        probabilities = next_probabilities(logits, sampling, b"")
        assert int((probabilities > 0).sum()) == kept, sampling
        assert math.isclose(float(probabilities.sum()), 1.0, rel_tol=1e-6)


def test_temperature_sharpens_as_it_should() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[10, 11]] = torch.tensor([0.8, 0.2]).log()
    cold = next_probabilities(logits, Sampling(temperature=0.5), b"")
    assert math.isclose(float(cold[10]), 0.64 / 0.68, rel_tol=1e-5)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[70, 71]] = torch.tensor([0.75, 0.25]).log()

    probabilities = next_probabilities(logits, Sampling(temperature=1.0), b"")

    def drawn(seed: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(probabilities, generator) for _ in range(count)]

    assert drawn(0, 50) == drawn(0, 50) != drawn(1, 50)
    share = drawn(2, 2000).count(70) / 2000
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_utf8_sampling_writes_only_well_formed_text(seed: int, max_bytes: int) -> None:
    flat = torch.zeros(VOCAB)
    flat[EOS] = -torch.inf
    writer = start_writer(Request([1], max_bytes, Sampling(temperature=1.0, utf8=True), seed))
    past = [1]
    while not writer.finished:
        past.append(draw(writer.drawer.distribution(flat, past[:-1], past[-1:]), writer.drawer.generator))
        writer.write(past[-1:])
    data = bytes(writer.text)
    assert max_bytes - 3 <= len(data) <= max_bytes  # no beginning of a character at the limit
    data.decode()  # raises for overlong forms, surrogates, values past U+10FFFF


def test_utf8_sampling_never_ends_inside_a_character() -> None:
    logits = torch.zeros(VOCAB)
    logits[EOS] = 50.0
    assert next_probabilities(logits, Sampling(temperature=1.0, utf8=True), b"\xe2\x82")[EOS] == 0


def test_utf8_next_bytes_agree_with_python_about_every_prefix() -> None:
    fillers = (b"", b"\x80", b"\x80\x80", b"\xbf", b"\xbf\xbf", b"\xbf\xbf\xbf", b"\x80\x80\x80")
    prefixes = [bytes([a]) for a in range(0xC2, 0xF5)]
    prefixes += [bytes([a, b]) for a in range(0xE0, 0xF5) for b in sorted(utf8_allowed_next(bytes([a])))]
    for prefix in prefixes:
        for byte in range(256):
            possible = any(_is_utf8(prefix + bytes([byte]) + filler) for filler in fillers)
            assert (byte in utf8_allowed_next(prefix)) == possible, (prefix, byte)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be above 0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# cached generation against forwards over everything


@pytest.mark.parametrize("rule", RULES)
def test_cached_generation_is_naive_generation_byte_for_byte(rule: str) -> None:
    compared: set[bytes] = set()
    for seed in range(8):
        lm, prompts, temperature = language_model(rule, seed), random_prompts(8, seed), float(seed % 2)
        naive = continuations(lm, prompts, 20, temperature, seed)
        together = lm.generate(prompts, 20, temperature=temperature, seed=seed)
        alone = lm.generate(prompts[0], 20, temperature=temperature, seed=seed)
        for naive_text, texts in zip(naive, ([together[0], alone], *zip(together[1:])), strict=True):
            assert naive_text is None or all(text == naive_text for text in texts)
        compared.update(text for text in naive if text is not None)
    assert len(compared) > 48 and sum(map(len, compared)) > 900


@pytest.mark.parametrize("rule", RULES)
def test_bytes_that_are_no_text_are_a_prompt_like_any_other(rule: str) -> None:
    lm = language_model(rule, seed=11)
    prompts = [b"", b"\xff", b"\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\x00\x00", b"a\xc3", bytes(range(248, 256))]
    naive = continuations(lm, prompts, 12)
    assert naive.count(None) <= 1
    for prompt, text in zip(prompts, naive, strict=True):
        if text is not None:
            assert lm.generate(prompt, 12) == lm.generate(prompt.decode("utf-8", "surrogateescape"), 12) == text


def test_nothing_is_computed_for_no_bytes() -> None:
    nothing = Networks(language_model("entropy", seed=0).config, None, None)  # any use of these fails
    assert list(stream(Batch(nothing), Request(encode("prompt"), 0))) == []
    assert write_all(nothing, [Request(encode(prompt), 0) for prompt in ("", "prompt")], speculate=4) == [b"", b""]


@pytest.mark.parametrize("rule", RULES)
def test_plain_generation_of_one_row_has_a_latent_call_for_every_closed_patch(rule: str) -> None:
    for seed in range(3):
        lm, stats = language_model(rule, seed, max_bytes=200), GenerationStats()
        text = lm.generate("a prompt", 30, temperature=1.0, seed=seed, stats=stats)
        read = lm.encode(b"a prompt" + text)
        if len(text) == 30:
            read = read[:, :-1]  # what follows the last byte is of no interest
        first_new = len(encode("a prompt"))
        assert stats.latent_calls == int(lm.patch_starts(read)[0, first_new + 1 :].sum())
        assert stats.drafted_bytes == stats.accepted_bytes == 0


# rows that are written together


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, top_k=8),
    Sampling(temperature=1.5, top_p=0.3),
    Sampling(temperature=1.0, utf8=True),
)


def random_requests(count: int, seed: int) -> list[Request]:
    """Requests that differ in everything, and end after anything from no byte to 30."""
    rng, requests = random.Random(seed), []
    for prompt in random_prompts(count, seed):
        limit, stop = rng.randint(0, 30), rng.choice([(), (b"\x80",), (b"e", b"\xc3")])
        requests.append(Request(encode(prompt), limit, rng.choice(SAMPLINGS), rng.randrange(100), stop))
    return requests


@pytest.mark.parametrize(("rule", "speculate"), [("entropy", 0), ("space", 5), ("entropy_rise", 3), ("fixed", 0)])
def test_rows_that_come_and_go_are_what_each_is_alone(rule: str, speculate: int) -> None:
    networks = networks_of(language_model(rule, seed=21, confidence=2.0))
    requests = random_requests(2 * ROWS_TOGETHER, seed=21)
    alone = [b"".join(stream(Batch(networks, speculate), request)) for request in requests]
    assert write_all(networks, requests, speculate) == alone
    assert len(set(map(len, alone))) > 6 and len(set(alone)) > ROWS_TOGETHER
    greedy = [(request, text) for request, text in zip(requests, alone, strict=True) if request.sampling == Sampling()]
    assert [b"".join(stream(Batch(networks), request)) for request, _ in greedy] == [text for _, text in greedy]


def test_more_prompts_than_rows_together_draw_with_seeds_of_their_own() -> None:
    lm, prompts = language_model("entropy", seed=22), random_prompts(ROWS_TOGETHER + 4, seed=22)
    options = {"temperature": 1.0, "stop": [b"\x80", b"\xf0"]}
    together = lm.generate(prompts, 12, seed=7, **options)
    assert together == [lm.generate(prompt, 12, seed=7 + row, **options) for row, prompt in enumerate(prompts)]
    assert len(set(together)) == len(prompts) and len(set(map(len, together))) > 2


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_may_enter_while_others_are_being_written(rule: str, speculate: int) -> None:
    networks = networks_of(language_model(rule, seed=23, confidence=2.0))
    requests = [
        Request(encode(prompt), limit, Sampling(1.0, top_k=8), seed)
        for seed, (prompt, limit) in enumerate([(b"one", 40), (b"a longer\nprompt", 6), (b"", 25), (b"four" * 9, 20)])
    ]
    batch, writers, pieces = Batch(networks, speculate), [], {}
    for request in requests:
        writer, piece = batch.add(request)
        writers.append(writer)
        pieces[id(writer)] = piece
        for _ in range(3):
            for of_writer, piece in batch.step():
                pieces[id(of_writer)] += piece
    while batch.writers:
        for of_writer, piece in batch.step():
            pieces[id(of_writer)] += piece
    for request, writer in zip(requests, writers, strict=True):
        assert writer.text == pieces[id(writer)] == b"".join(stream(Batch(networks, speculate), request))


# where texts end


@pytest.mark.parametrize("speculate", [0, 5])
def test_nothing_of_a_stop_string_or_after_it_is_emitted(speculate: int) -> None:
    lm = language_model("space", seed=31, confidence=2.0)
    options = {"temperature": 1.0, "top_k": 20, "seed": 4, "speculate": speculate}
    text = lm.generate("a prompt", 36, **options)
    assert len(text) == 36
    for begin in range(0, 36, 3):
        stop = text[begin : begin + 1 + begin % 9]  # up to 7 bytes: more than a round gives
        assert lm.generate("a prompt", 36, stop=[b"never", stop], **options) == text[: text.index(stop)]


def test_a_character_that_the_limit_would_cut_is_left_out_and_nothing_before_it_changes() -> None:
    lm = language_model("entropy", seed=32)
    options = {"temperature": 1.0, "seed": 1, "utf8": True}
    text = lm.generate("é", 40, **options)
    inside = [limit for limit in range(1, 40) if incomplete_suffix_length(text[:limit])]
    assert len(inside) > 5
    for limit in inside[:6]:
        assert lm.generate("é", limit, **options) == text[: limit - incomplete_suffix_length(text[:limit])]


@pytest.mark.parametrize("speculate", [0, 6])
@pytest.mark.parametrize("windows", [None, 3])
def test_a_model_is_filled_to_its_last_position(windows: int | None, speculate: int) -> None:
    stack = TransformerConfig(num_layers=1, window_positions=windows, **SHAPE)
    longest = FIRST_SLOTS + 12  # beyond the slots and angles that a cache begins with
    lm = language_model("space", seed=33, confidence=2.0, local_encoder=stack, local_decoder=stack, max_bytes=longest)
    prompt, temperature = b"x" * (FIRST_SLOTS - 10), 1.0 if speculate == 0 else 0.0
    naive = continuations(lm, [prompt], 21, temperature, seed=1)[0]
    assert naive is not None and len(naive) == 21
    assert lm.generate(prompt, 21, temperature=temperature, seed=1, speculate=speculate) == naive
    together = lm.generate([b"y", prompt], 21, temperature=temperature, seed=0, speculate=speculate)
    assert together[1] == naive
    with pytest.raises(ValueError, match="exceed"):
        lm.generate(prompt, 22)


# long texts


LONG_STACK = TransformerConfig(num_layers=1, window_positions=16, **SHAPE)


def long_model(max_bytes: int) -> LanguageModel:
    """One layer each and the rule ``space``: in a text so long an entropy would stand on the edge of any threshold."""
    latent = TransformerConfig(num_layers=1, width=32, num_heads=4, ffn_width=40)
    return language_model(
        "space",
        seed=41,
        patching=PatchingConfig(rule="space", max_patch_bytes=16),
        local_encoder=LONG_STACK,
        local_decoder=LONG_STACK,
        latent=latent,
        slots_per_patch=2,
        max_bytes=max_bytes,
    )


def patches_read(state: State) -> torch.Tensor:
    """What the latent transformer keeps of all patches so far: the end of a text hardly tells one of thousands."""
    return state.latent_cache.keys_values[:, :, 0, :, : state.rows[0].standing.num_patches]


def test_a_prompt_of_100_000_bytes_is_read_in_seconds_and_in_any_blocks() -> None:
    networks = networks_of(long_model(max_bytes=200_000))
    ids = encode(bytes(random.Random(0).choices(b"abcdefghijkl ", k=100_000)))
    started = time.process_time()
    state, logits = prefill(networks, ids)  # at once, its masks alone would fill 40 GB
    assert time.process_time() - started < 30  # takes 2 s
    other = start(networks)
    for begin in range(-650, len(ids), 700):
        of_other = step(networks, other, [ids[max(0, begin) : begin + 700]])
    assert state.rows[0].standing == other.rows[0].standing
    assert (patches_read(state) - patches_read(other)).abs().max() < 1e-4
    for byte_id in (70, 36, 71):
        assert (logits - of_other).abs().max() < 1e-5
        logits, of_other = step(networks, state, [[byte_id]]), step(networks, other, [[byte_id]])


def drawn_but_never_eos(logits: NextLogits, past: list[int], new: list[int]) -> Probabilities:
    return next_probabilities(logits.index_fill(0, torch.tensor(EOS), -torch.inf), Sampling(temperature=1.0), b"")


def test_after_10_000_bytes_the_state_is_that_of_a_fresh_reading_and_no_larger() -> None:
    networks = networks_of(long_model(max_bytes=20_000))
    drawer = Drawer(drawn_but_never_eos, torch.Generator().manual_seed(0), pending=BOS)
    state, written = start(networks), [BOS]
    bounded = [cache for cache in state.caches if cache is not state.latent_cache]
    shapes = [cache.keys_values.shape for cache in bounded]
    for checkpoint in (1_000, 5_000, 10_000):
        while len(written) <= checkpoint:
            written += advance(networks, state, [drawer], [0]).ids[0]
        fresh, expected = prefill(networks, written)
        assert (extend(networks, state, [written[-1:]]).logits[:, 0] - expected).abs().max() < 1e-5
        assert [cache.keys_values.shape for cache in bounded] == shapes
        num_patches = state.rows[0].standing.num_patches
        assert (patches_read(state) - patches_read(fresh)[..., :num_patches, :]).abs().max() < 1e-4
        assert 100 < num_patches <= state.latent_cache.slots <= 2 * num_patches
        assert sum(map(len, state.rows[0].open_states)) < 16
    assert state.rows[0].ids == written[:-1]
