"""Reading block by block against one pass over everything: no split, batch, draft or cache changes what comes out."""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, random_models, threshold_between, tiny_config
from torch import Tensor, nn

from blt.byte_ids import BOS, BYTE_OFFSET, EOS, NEWLINE, VOCAB_SIZE
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, PatchingConfig, RopeScalingConfig, TransformerConfig
from blt.incremental import (
    PREFILL_BLOCK,
    Networks,
    Standing,
    State,
    accept,
    draft_logits,
    draft_place,
    extend,
    prefill,
    start,
    step,
)
from blt.model.kv_cache import FIRST_SLOTS, SPARE_SLOTS, KeyValueCache
from blt.model.patching import patch_starts

TOLERANCE = 1e-5

every_rule = pytest.mark.parametrize("rule", ["entropy", "entropy_rise", "space", "fixed"])


SCALED = RopeScalingConfig(factor=8.0, original_positions=12)


@dataclass(frozen=True)
class Case:
    """Networks of a random shape, random rows of ids, and what one pass over each whole row says of it."""

    networks: Networks
    rows: list[list[int]]
    entropies: list[list[float]]  # of each row, the unknown next id's included; nan where the rule needs none
    starts: list[list[bool]]  # likewise
    logits: list[Tensor]  # of each row, [byte, vocab]


def draw_case(rule: str, seed: int, lengths: Sequence[int], **changes: object) -> Case:
    """The case of this number; ``changes`` to its config come last."""
    rng = random.Random(f"{rule} {seed}")
    windows, slots = (None, 1, 6, 9, 17, 40), rng.choice([1, 2, 4])
    latent_width = rng.choice([16 * slots, 24])
    longest_patch = rng.choice([None, None, 1, 3, 7])
    config = tiny_config(
        entropy_model=EntropyModelConfig(
            num_layers=rng.choice([1, 2]),
            window_positions=rng.choice(windows),
            reset_at_newline=rng.choice([False, True]),
            **SHAPE,
        ),
        patching=PatchingConfig(
            rule=rule, patch_bytes=rng.randint(1, 5) if rule == "fixed" else None, max_patch_bytes=longest_patch
        ),
        hash_embeddings=HashEmbeddingsConfig(
            ngram_bytes=rng.choice([(1,), (2,), (3, 4, 5), (8, 1), (3, 4, 5, 6, 7, 8)]),
            num_functions=rng.choice([1, 2]),
            table_rows=50,
            min_count=1 + seed % 2,
            filter_bits=8,
        ),
        local_encoder=TransformerConfig(num_layers=rng.choice([1, 2]), window_positions=rng.choice(windows), **SHAPE),
        latent=TransformerConfig(
            num_layers=rng.choice([1, 2]),
            width=latent_width,
            num_heads=2,
            ffn_width=24,
            window_positions=rng.choice([None, 1, 3, 11]),
            rope_scaling=SCALED if seed % 3 == 0 else None,
        ),
        local_decoder=TransformerConfig(num_layers=rng.choice([1, 2]), window_positions=rng.choice(windows), **SHAPE),
        slots_per_patch=slots,
    )
    config = config.model_copy(update=changes)
    entropy_model, network = random_models(config, seed)
    rows = [random_text(rng, length) for length in lengths]
    if config.patching.uses_entropies:
        doubts = [entropy_model.entropies(torch.tensor([row]))[0] for row in rows]
        values = torch.cat([found if rule == "entropy" else found.diff() for found in doubts])
        patching = config.patching.model_copy(update={"threshold_nats": threshold_between(values)})
        config = config.model_copy(update={"patching": patching})
    networks = Networks(config, entropy_model if config.patching.uses_entropies else None, network)
    return Case(networks, rows, *map(list, zip(*(whole_pass(networks, row) for row in rows), strict=True)))


def random_text(rng: random.Random, length: int) -> list[int]:
    """BOS and what rules and caches look at: words, spaces, newlines, any other id, and often documents that end."""
    documents = rng.choice([0.0, 0.0, 0.04, 0.1])
    row = [BOS]
    while len(row) < length:
        kind = rng.random()
        if kind < documents:
            row += [EOS, *[BOS] * (rng.random() < 0.8)]
        elif kind < documents + 0.1:
            row.append(rng.choice([NEWLINE, ord(" ") + BYTE_OFFSET]))
        else:
            row.append(rng.choice([rng.randint(97, 122) + BYTE_OFFSET, rng.randint(EOS + 1, VOCAB_SIZE - 1)]))
    return row[:length]


@torch.no_grad()
def whole_pass(networks: Networks, row: Sequence[int]) -> tuple[list[float], list[bool], Tensor]:
    """Entropies, patch starts and logits of a row: the truth that the increments are held to."""
    ids = torch.tensor([row])
    if networks.entropy_model is None:
        entropies = torch.full((1, len(row) + 1), torch.nan)
    else:
        entropies = networks.entropy_model.entropies(ids)
    starts = patch_starts(ids, entropies, networks.config.patching)
    return entropies[0].tolist(), starts[0].tolist(), networks.network(ids, starts)[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def assert_stands(standing: Standing, case: Case, row: int, num_ids: int) -> None:
    """A row that has read so many ids knows of its next one what the whole pass knows."""
    assert standing.num_ids == num_ids
    assert standing.patching.next_starts == case.starts[row][num_ids]
    assert standing.num_patches == sum(case.starts[row][: num_ids + 1]) - 1
    assert standing.patching.last_entropy == nearly(case.entropies[row][num_ids])


def nearly(entropy: float) -> object:
    return pytest.approx(entropy, abs=TOLERANCE, nan_ok=True)


def within_reach(cache: KeyValueCache, row: int, first: int, end: int) -> Tensor:
    """What a cache holds of the positions that the one after them may read, none before ``first``; oldest to newest."""
    oldest = first if cache.window is None else max(first, end - cache.window + 1)
    return cache.keys_values[:, :, row, :, [position % cache.slots for position in range(oldest, end)]]


def without_rounding(standing: Standing) -> Standing:
    return standing._replace(patching=standing.patching._replace(last_entropy=0.0))


def assert_same_row(state: State, row: int, other: State, other_row: int) -> None:
    """Whatever can be read of a row later is the same in both."""
    one, two = state.rows[row], other.rows[other_row]
    standing = one.standing
    assert one.ids == two.ids
    assert without_rounding(standing) == without_rounding(two.standing)
    assert standing.patching.last_entropy == nearly(two.standing.patching.last_entropy)
    nothing = state.decoder_cache.keys_values.new_zeros(0, SHAPE["width"])
    assert_close(torch.cat([nothing, *one.open_states]), torch.cat([nothing, *two.open_states]))
    for (keys, values), (other_keys, other_values) in zip(state.newest_slots, other.newest_slots, strict=True):
        assert_close(keys[row], other_keys[other_row])
        assert_close(values[row], other_values[other_row])
    for name, first, end in (
        ("entropy_cache", standing.context_start, standing.num_ids),
        ("encoder_cache", standing.document_start, standing.num_ids),
        ("latent_cache", standing.patch_document_start, standing.num_patches),
        ("decoder_cache", standing.document_start, standing.num_ids),
    ):
        cache, other_cache = getattr(state, name), getattr(other, name)
        if cache is not None:
            assert_close(within_reach(cache, row, first, end), within_reach(other_cache, other_row, first, end))


@every_rule
@pytest.mark.parametrize("seed", range(16))
def test_reading_one_id_at_a_time_gives_the_logits_and_patches_of_whole_rows(rule: str, seed: int) -> None:
    rows, length = random.Random(seed).choice([(1, 10), (1, 16), (1, 30), (3, 20)])
    case = draw_case(rule, seed, [length] * rows)
    state, logits = start(case.networks, rows), []
    for t in range(length):
        logits.append(step(case.networks, state, [[row[t]] for row in case.rows]))
        for index, row in enumerate(state.rows):
            assert_stands(row.standing, case, index, t + 1)
    assert_close(torch.stack(logits, dim=1), torch.stack(case.logits))


def read_in_blocks(case: Case, sizes: Iterator[int], num_ids: int) -> State:
    """The state after so many ids of the first row; every block says of all its ids what the whole pass says."""
    state = start(case.networks)
    (row,), (logits,) = case.rows, case.logits
    begin, found = 0, []
    while begin < num_ids:
        ids = row[begin : min(begin + next(sizes), num_ids)]
        end = begin + len(ids)
        block = extend(case.networks, state, [ids])
        found.append(block.logits[0])
        for read, standing in enumerate(block.standings[0], begin + 1):
            assert_stands(standing, case, 0, read)
        assert accept(state, block, [len(ids)]).equal(block.logits[:, -1])
        begin = end
    assert_close(torch.cat(found), logits[:num_ids])
    return state


LONGER_THAN_ANY_RING = 40 + SPARE_SLOTS + 1
SPLITS: list[Sequence[int]] = [  # sizes of blocks to draw from
    range(1, SPARE_SLOTS + 1),
    range(SPARE_SLOTS + 1, LONGER_THAN_ANY_RING + 30),
    (1, 2, SPARE_SLOTS, SPARE_SLOTS + 1, LONGER_THAN_ANY_RING),
]
ONE_MORE_SPLIT: list[Sequence[int]] = [(1,), (1, 2, 3), (2, 9), (7,), (16, 17), (SPARE_SLOTS,)]


@every_rule
@pytest.mark.parametrize("seed", range(len(ONE_MORE_SPLIT)))
def test_any_split_of_the_ids_gives_the_same_state_and_goes_on_alike(rule: str, seed: int) -> None:
    rng = random.Random(seed)
    num_ids = rng.randint(90, 130)
    case = draw_case(rule, seed + 100, [num_ids + 10])
    state = read_in_blocks(case, iter([num_ids]), num_ids)
    for number, sizes in enumerate([ONE_MORE_SPLIT[seed], *SPLITS], 1):
        other = read_in_blocks(case, (rng.choice(sizes) for _ in range(num_ids)), num_ids)
        assert_same_row(state, 0, other, 0)
        state.append(other)
        assert_same_row(state, number, other, 0)
    for t in range(num_ids, num_ids + 10):
        logits = step(case.networks, state, [[case.rows[0][t]]] * len(state.rows))
        assert_close(logits, case.logits[0][t].expand_as(logits))


def test_a_prompt_is_read_in_blocks_that_do_not_grow_with_it() -> None:
    case = draw_case(
        "entropy",
        0,
        [2 * PREFILL_BLOCK + 10],
        latent=TransformerConfig(num_layers=1, width=32, num_heads=2, ffn_width=24),
    )
    longest = 0

    def note_length(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        nonlocal longest
        longest = max(longest, arguments[0].shape[1])

    case.networks.network.local_encoder.transformer.blocks[0].attention_norm.register_forward_hook(note_length)
    state, logits = prefill(case.networks, case.rows[0])
    assert longest == PREFILL_BLOCK
    assert_close(logits[0], case.logits[0][-1])
    assert state.rows[0].ids == case.rows[0]


def any_id(rng: random.Random) -> int:
    return rng.choice([EOS, NEWLINE, BOS, *(rng.randrange(VOCAB_SIZE) for _ in range(9))])


@every_rule
@pytest.mark.parametrize("seed", range(200, 210))
def test_ids_that_are_not_accepted_leave_no_trace(rule: str, seed: int) -> None:
    rng = random.Random(seed)
    num_rows, longest = rng.randint(1, 4), rng.choice([2, 9, SPARE_SLOTS])
    case = draw_case(rule, seed, [rng.randint(100, 140) for _ in range(num_rows)])
    networks, state = case.networks, start(case.networks, num_rows)
    positions = [0] * num_rows
    for _ in range(12):
        kept = [rng.randint(1, longest) for _ in case.rows]
        after = [position + length for position, length in zip(positions, kept, strict=True)]
        if any(end > len(row) for end, row in zip(after, case.rows, strict=True)):
            break
        blocks = []
        for row, position, end, length in zip(case.rows, positions, after, kept, strict=True):
            refused = [any_id(rng) for _ in range(rng.randint(0, longest - length))]
            blocks.append([*row[position:end], *refused])
        logits = accept(state, extend(networks, state, blocks), kept)
        assert_close(logits, torch.stack([found[end - 1] for found, end in zip(case.logits, after, strict=True)]))
        positions = after
    for index, (row, position) in enumerate(zip(case.rows, positions, strict=True)):
        untouched, _ = prefill(networks, row[:position])
        assert_same_row(state, index, untouched, 0)


@every_rule
@pytest.mark.parametrize("seed", range(300, 303))
def test_rows_that_enter_read_together_and_leave_are_as_if_alone(rule: str, seed: int) -> None:
    rng = random.Random(seed)
    case = draw_case(rule, seed, [rng.choice([9, 30, 60, 100]) for _ in range(7)])
    networks, waiting = case.networks, list(range(7))
    state: State | None = None
    inside: list[
        tuple[int, int]
    ] = []  # of each row of the state: which of the case it is, and how many ids it has read
    while waiting or inside:
        if waiting and (not inside or (len(inside) < 5 and rng.random() < 0.4)):
            row = waiting.pop()
            position = rng.randint(1, len(case.rows[row]) - 4)
            entering, logits = prefill(networks, case.rows[row][:position])
            assert_close(logits[0], case.logits[row][position - 1])
            if state is None:
                state = entering
            else:
                state.append(entering)
            inside.append((row, position))
        assert state is not None
        longest = rng.choice([1, 1, 1, 5])
        ends = [min(position + rng.randint(1, longest), len(case.rows[row])) for row, position in inside]
        blocks = [case.rows[row][position:end] for (row, position), end in zip(inside, ends, strict=True)]
        logits = step(networks, state, blocks)
        inside = [(row, end) for (row, _), end in zip(inside, ends, strict=True)]
        assert [row.ids for row in state.rows] == [case.rows[row][:end] for row, end in inside]
        assert_close(logits, torch.stack([case.logits[row][end - 1] for row, end in inside]))
        for found, (row, end) in zip(state.rows, inside, strict=True):
            assert_stands(found.standing, case, row, end)
        for index in reversed(range(len(inside))):
            row, end = inside[index]
            if end == len(case.rows[row]) or rng.random() < 0.08:
                alone, _ = prefill(networks, case.rows[row][:end])
                assert_same_row(state, index, alone, 0)
                state.remove(index)
                inside[index] = inside[-1]
                inside.pop()


def test_caches_grow_with_rows_and_positions_whoever_was_there_first() -> None:
    whole = {"window_positions": None, **SHAPE}
    stack = TransformerConfig(num_layers=1, **whole)
    lengths = [2 * FIRST_SLOTS + 20, 20, FIRST_SLOTS + 20, FIRST_SLOTS - 5]
    case = draw_case(
        "fixed",
        0,
        lengths,
        **{"patching": PatchingConfig(rule="fixed", patch_bytes=1), "slots_per_patch": 1},
        **{"local_encoder": stack, "latent": stack, "local_decoder": stack},
    )
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]):
        state, _ = prefill(case.networks, case.rows[order[0]][: lengths[order[0]] - 12])
        for row in order[1:]:
            state.append(prefill(case.networks, case.rows[row][: lengths[row] - 12])[0])
        for back in range(12, 0, -1):
            logits = step(case.networks, state, [[case.rows[row][-back]] for row in order])
            assert_close(logits, torch.stack([case.logits[row][-back] for row in order]))


@every_rule
@pytest.mark.parametrize("seed", range(400, 401))
def test_the_latent_transformer_runs_for_patches_that_close_and_for_nothing_else(rule: str, seed: int) -> None:
    case = draw_case(rule, seed, [60, 60, 60])
    networks, state, runs = case.networks, start(case.networks, 3), []

    def note_shape(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        runs.append(tuple(output.shape[:2]))

    networks.network.latent_transformer.input_proj.register_forward_hook(note_shape)
    begin = 0
    for size in [1] * 30 + [7] * 3:
        runs.clear()
        before = [row.standing.num_patches for row in state.rows]
        block = extend(networks, state, [row[begin : begin + size] for row in case.rows])
        accept(state, block, [size] * 3)
        begin += size
        closed = [row.standing.num_patches - count for row, count in zip(state.rows, before, strict=True)]
        closing = [count for count in closed if count]
        assert runs == ([(len(closing), max(closing))] if closing else [])
        assert block.latent_calls == len(runs)
    assert sum(row.standing.num_patches for row in state.rows) == sum(
        sum(starts[: begin + 1]) - 1 for starts in case.starts
    )


def test_what_is_kept_of_a_row_grows_with_its_patches_only() -> None:
    case = draw_case(
        "space",
        0,
        [FIRST_SLOTS * 5],
        local_encoder=TransformerConfig(num_layers=1, window_positions=9, **SHAPE),
        local_decoder=TransformerConfig(num_layers=1, window_positions=40, **SHAPE),
        latent=TransformerConfig(num_layers=1, **SHAPE),
        slots_per_patch=1,
    )
    state, kept = start(case.networks), []
    for begin in range(0, FIRST_SLOTS * 5, 20):
        step(case.networks, state, [case.rows[0][begin : begin + 20]])
        kept.append([state.encoder_cache.keys_values.nbytes, state.decoder_cache.keys_values.nbytes])
        standing = state.rows[0].standing
        open_bytes = 0 if standing.patching.next_starts else standing.patching.patch_bytes
        assert sum(map(len, state.rows[0].open_states)) == open_bytes
        assert state.latent_cache.slots <= max(FIRST_SLOTS, 2 * standing.num_patches)
    assert kept == kept[:1] * len(kept)


@every_rule
@pytest.mark.parametrize("seed", range(500, 504))
def test_a_draft_reads_what_the_newest_latent_says_and_leaves_the_state_as_it_is(rule: str, seed: int) -> None:
    rng = random.Random(seed)
    case = draw_case(rule, seed, [rng.randint(50, 90) for _ in range(3)])
    networks, positions = case.networks, [rng.randint(1, len(row)) for row in case.rows]
    state, *others = [prefill(networks, row[:position])[0] for row, position in zip(case.rows, positions, strict=True)]
    for other in others:
        state.append(other)
    blocks: list[list[int]] = [[] for _ in case.rows]
    longest = rng.choice([1, 10, SPARE_SLOTS])
    place = draft_place(networks, state, longest)
    for length in range(1, longest + 1):
        going_on = [row for row, block in enumerate(blocks) if len(block) == length - 1]
        going_on = [row for row in going_on if length == 1 or rng.random() < 0.95]
        if not going_on:
            break
        for row in going_on:
            blocks[row].append(rng.randint(EOS + 1, VOCAB_SIZE - 1))
        guess = draft_logits(networks, state, blocks, place)
        row = rng.choice(going_on)
        ids = torch.tensor([case.rows[row][: positions[row]] + blocks[row]])
        starts = torch.zeros(1, ids.shape[1] + 1, dtype=torch.bool)  # no patch that begins in the draft is closed
        starts[0, : positions[row] + 1] = torch.tensor(case.starts[row][: positions[row] + 1])
        with torch.no_grad():
            assert_close(guess[row], networks.network(ids, starts)[0, -1])
    for index, (row, position) in enumerate(zip(case.rows, positions, strict=True)):
        assert_same_row(state, index, prefill(networks, row[:position])[0], 0)


BF16_TOLERANCE = 2**-5  # the step between bf16 numbers from 4 to 8, which is where the largest of these logits lie


@every_rule
@pytest.mark.parametrize("seed", range(600, 601))
def test_in_bf16_patches_are_equal_and_logits_agree_to_its_precision(rule: str, seed: int) -> None:
    case = draw_case(rule, seed, [50])
    networks = case.networks._replace(network=case.networks.network.bfloat16())
    *_, logits = whole_pass(networks, case.rows[0])
    state = start(networks)
    assert state.latent_cache.keys_values.dtype == torch.bfloat16
    assert state.entropy_cache is None or state.entropy_cache.keys_values.dtype == torch.float32
    for t, byte_id in enumerate(case.rows[0]):
        found = step(networks, state, [[byte_id]])
        torch.testing.assert_close(found[0], logits[t], atol=BF16_TOLERANCE, rtol=0)
        assert_stands(state.rows[0].standing, case, 0, t + 1)


COMPILED = """
import sys
sys.path.insert(0, TESTS)
from test_incremental import Networks, assert_close, draw_case, prefill, step, whole_pass
from tiny import SHAPE, random_models
from blt.config import TransformerConfig
from blt.generate import Batch, GenerationStats, Request, stream
from blt.model.linear import round_to_int8

stack = TransformerConfig(num_layers=1, **SHAPE)
local = stack.model_copy(update={"window_positions": 9})
changes = {"local_encoder": local, "latent": stack, "local_decoder": local, "slots_per_patch": 1}
case = draw_case("entropy", 0, [300], **changes)
row, config = case.rows[0], case.networks.config
for weights, in_8_bits in ((0, False), (7, False), (7, True)):  # the second are compiled already, and still are themselves
    networks = Networks(config, *random_models(config, weights), compiled=True)
    if in_8_bits:
        round_to_int8(networks.network)
    _, starts, logits = whole_pass(networks, row)
    state, _ = prefill(networks, row[:20])
    for t in range(20, 300):
        assert_close(step(networks, state, [[row[t]]])[0], logits[t])
        assert state.rows[0].standing.patching.next_starts == starts[t + 1]
    stats, texts = GenerationStats(), set()
    modes = [(networks._replace(compiled=False), 0), (networks, 0)]
    if not in_8_bits:  # each length of a block is compiled for each kind of weights, which is what takes long
        modes.append((networks, 3))
    for mode, speculate in modes:
        texts.add(b"".join(stream(Batch(mode, speculate, stats), Request(row[:20], 50))))
    assert len(texts) == 1 and (in_8_bits or stats.drafted_bytes > 0)
"""


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_give_the_logits_and_patches_of_the_whole_row() -> None:
    # a process of its own: the compiler does not understand the shape checks of conftest.py
    code = COMPILED.replace("TESTS", repr(str(Path(__file__).parent)))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
