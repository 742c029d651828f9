"""Speculation saves passes and changes nothing else: greedy bytes stay the same, drawn ones are distributed the same."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import pytest
import torch
from naive import RULES, continuations, language_model, networks_of, next_logits, random_prompts
from torch import Tensor

from blt.byte_ids import BYTE_OFFSET, EOS, encode, incomplete_suffix_length
from blt.config import PatchingConfig
from blt.config_file import read_run_config
from blt.generate import Batch, GenerationStats, Request, start_writer
from blt.incremental import Networks, State, prefill, start, step
from blt.language_model import LanguageModel
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.kv_cache import SPARE_SLOTS
from blt.model.latent_transformer import LatentTransformer
from blt.sampling import NextLogits, Probabilities, Sampling, draw, next_probabilities
from blt.speculate import Drawer, Round, advance, draft, draft_limit, verify

MAX_BYTES = 36
CONFIDENCE = 3.0  # between a tenth and nine tenths of the drafted bytes are accepted
UNUSUAL, IMPOSSIBLE = 1e-3, 1e-9  # p-values; seeds are fixed, so what passes once passes always

Sequences = Counter[tuple[int, ...]]


def decided_prompts(lm: LanguageModel, seed: int, count: int = 4) -> list[bytes]:
    """Prompts whose greedy continuation no rounding can change."""
    prompts = random_prompts(count + 2, seed)
    texts = continuations(lm, prompts, MAX_BYTES)
    decided = [prompt for prompt, text in zip(prompts, texts, strict=True) if text is not None]
    assert len(decided) >= count
    return decided[:count]


def write_in_rounds(lm: LanguageModel, prompts: Sequence[bytes], drafted: int) -> tuple[list[bytes], list[Round]]:
    """Greedy texts with drafts of so many bytes, however few are accepted; and the rounds that it took."""
    networks, rounds = networks_of(lm), []
    batch = Batch(networks)
    writers = [batch.add(Request(encode(prompt), MAX_BYTES))[0] for prompt in prompts]
    while batch.writers:
        assert batch.state is not None
        limits = [min(drafted, MAX_BYTES - writer.num_bytes - 1) for writer in batch.writers]
        rounds.append(advance(networks, batch.state, [writer.drawer for writer in batch.writers], limits))
        for writer, ids in zip(batch.writers, rounds[-1].ids, strict=True):
            writer.write(ids)
        for row in reversed(range(len(batch.writers))):
            if batch.writers[row].finished:
                batch.state.remove(row)
                batch.writers[row] = batch.writers[-1]
                batch.writers.pop()
    return [bytes(writer.text) for writer in writers], rounds


# greedy


@pytest.mark.parametrize("drafted", [*range(1, 17), SPARE_SLOTS - 1])
def test_greedy_text_is_the_same_whatever_is_drafted(drafted: int) -> None:
    lm = language_model(RULES[drafted % 4], seed=drafted, confidence=CONFIDENCE)
    prompts = decided_prompts(lm, seed=drafted)
    plain = lm.generate(prompts, MAX_BYTES)
    texts, rounds = write_in_rounds(lm, prompts, drafted)
    assert texts == plain
    assert 0 < sum(done.accepted for done in rounds) < sum(done.drafted for done in rounds)
    assert max(done.drafted for done in rounds) > (drafted - 1) * len(prompts) // 2  # long drafts really were made
    assert lm.generate(prompts, MAX_BYTES, speculate=drafted) == plain
    assert [lm.generate(prompt, MAX_BYTES, speculate=drafted) for prompt in prompts[:2]] == plain[:2]


def test_eos_inside_an_accepted_draft_ends_the_text() -> None:
    lm = language_model("space", 1, CONFIDENCE)
    prompt = decided_prompts(lm, seed=1, count=1)[0]
    text = lm.generate(prompt, MAX_BYTES)
    head, found_inside = lm.network.local_decoder.head.weight.data, 0
    for byte in sorted(set(text), key=text.index)[3::4]:
        both = [EOS, byte + BYTE_OFFSET]
        head[both] = head[both[::-1]]  # EOS where the byte was
        texts, rounds = write_in_rounds(lm, [prompt], 6)
        head[both] = head[both[::-1]]
        assert texts == [text[: text.index(byte)]]
        found_inside += EOS in rounds[-1].ids[0][:-1]
    assert found_inside >= 2


def test_a_round_is_one_latent_pass_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, run = [], LatentTransformer.extend

    def counted(*arguments: Tensor) -> Tensor:
        passes.append(arguments)
        return run(*arguments)

    lm = language_model("fixed", 17, CONFIDENCE, patching=PatchingConfig(rule="fixed", patch_bytes=2))
    prompt = decided_prompts(lm, seed=17, count=1)[0]
    monkeypatch.setattr(LatentTransformer, "extend", counted)
    calls = []
    for speculate in (0, 6):
        passes.clear()
        stats = GenerationStats()
        assert len(lm.generate(prompt, MAX_BYTES, speculate=speculate, stats=stats)) == MAX_BYTES
        assert len(passes) == 1 + stats.latent_calls  # the prompt's is left out
        rounds = MAX_BYTES - 1 - stats.accepted_bytes
        assert stats.latent_calls <= rounds
        calls.append(stats.latent_calls)
    assert 0 < stats.accepted_bytes < stats.drafted_bytes
    assert calls[1] < calls[0]


# sampling


def p_value(found: Sequences, expected: Mapping[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square test; sequences expected fewer than 5 times share a cell."""
    count = found.total()
    if not found.keys() <= expected.keys():
        return 0.0
    often = [sequence for sequence, probability in expected.items() if probability * count >= 5]
    cells = [(found[sequence], expected[sequence] * count) for sequence in often]
    seldom = count - sum(size for _, size in cells)
    if seldom > 1:
        cells.append((count - sum(seen for seen, _ in cells), seldom))
    statistic = sum((seen - size) ** 2 / size for seen, size in cells)
    halves = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


class Tables:
    """What a model of three ids wants after every prefix, and what its drafts believe: some ids only one of them allows."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.wanted, self.believed = self._table(generator), self._table(generator)

    @staticmethod
    def _table(generator: torch.Generator) -> dict[tuple[int, ...], Probabilities]:
        table = {}
        for length in range(3):
            for prefix in product(range(3), repeat=length):
                weights = torch.rand(3, generator=generator) + 0.1
                if torch.rand((), generator=generator) < 0.3:
                    weights[int(torch.randint(3, (), generator=generator))] = 0
                table[prefix] = weights / weights.sum()
        return table

    def probability(self, sequence: tuple[int, ...]) -> float:
        """What it should have."""
        return float(torch.stack([self.wanted[sequence[:t]][byte_id] for t, byte_id in enumerate(sequence)]).prod())

    def drafts(self, generator: torch.Generator) -> tuple[int, ...]:
        drafted: tuple[int, ...] = ()
        for _ in range(2):
            drafted += (draw(self.believed[drafted], generator),)
        return drafted


def softmax_of(logits: NextLogits, past: list[int], new: list[int]) -> Probabilities:
    return logits.softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_verified_drafts_are_distributed_as_if_nothing_had_been_drafted(seed: int) -> None:
    tables, drawer = Tables(seed), Drawer(softmax_of, torch.Generator().manual_seed(seed))
    expected = {sequence: tables.probability(sequence) for sequence in product(range(3), repeat=3)}
    expected = {sequence: probability for sequence, probability in expected.items() if probability > 0}
    verified, only_drafted, first_accepted, count = Counter(), Counter(), 0, 4000
    for _ in range(count):
        drafted = tables.drafts(drawer.generator)
        prefixes = [drafted[:length] for length in range(3)]
        logits = torch.stack([tables.wanted[prefix].log() for prefix in prefixes])
        beliefs = [tables.believed[prefix] for prefix in prefixes[:2]]
        given = tuple(verify(drawer, [], [0, *drafted], beliefs, logits))
        assert drawer.pending == given[-1]
        first_accepted += len(given) > 1
        for sequences, begun in ((verified, given), (only_drafted, drafted)):
            while len(begun) < 3:  # plainly from here on
                begun += (draw(tables.wanted[begun], drawer.generator),)
            sequences[begun] += 1
    assert p_value(verified, expected) > UNUSUAL
    assert p_value(only_drafted, expected) < IMPOSSIBLE  # so many draws tell a wrong distribution
    # no scheme that keeps the distribution accepts more often: the overlap of both
    overlap = float(torch.minimum(tables.wanted[()], tables.believed[()]).sum())
    assert abs(first_accepted / count - overlap) < 4 * (overlap * (1 - overlap) / count) ** 0.5


def probabilities_of_texts(
    lm: LanguageModel, prompt: list[int], sampling: Sampling, num_ids: int
) -> dict[tuple[int, ...], float]:
    """Of every text that can be drawn, cut after so many ids or EOS; by a forward of each beginning."""
    texts = {(): 1.0}
    for _ in range(num_ids):
        unfinished = [text for text in texts if EOS not in text]
        logits, _ = next_logits(lm, [[*prompt, *text] for text in unfinished])
        for text, of_text in zip(unfinished, logits, strict=True):
            probability, following = texts.pop(text), next_probabilities(of_text, sampling, b"").double()
            for byte_id in following.nonzero().flatten().tolist():
                texts[*text, byte_id] = probability * float(following[byte_id])
    return texts


def begin_together(
    lm: LanguageModel, prompt: list[int], sampling: Sampling, seeds: range
) -> tuple[State, list[Drawer]]:
    """Rows that have read the same prompt, each with its first id drawn."""
    drawers = [start_writer(Request(prompt, 1, sampling, seed)).drawer for seed in seeds]
    state = start(networks_of(lm), rows=len(drawers))
    for drawer, logits in zip(drawers, step(networks_of(lm), state, [prompt] * len(drawers)), strict=True):
        drawer.pending = draw(drawer.distribution(logits, prompt, []), drawer.generator)
    return state, drawers


def up_to_eos(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(ids[: ids.index(EOS) + 1] if EOS in ids else ids)


@pytest.mark.parametrize(("rule", "seed"), [("entropy", 3), ("fixed", 0)])
def test_speculative_texts_are_distributed_as_plain_ones(rule: str, seed: int) -> None:
    lm, sampling, num_ids = language_model(rule, seed, confidence=8.0), Sampling(8.0, top_k=3), 4
    networks, prompt = networks_of(lm), encode("ab c")
    expected = probabilities_of_texts(lm, prompt, sampling, num_ids)
    assert len(expected) > 70
    speculative, drafted, accepted = Counter(), 0, 0
    for begin in range(0, 1000, 500):
        state, drawers = begin_together(lm, prompt, sampling, range(begin, begin + 500))
        texts = [[drawer.pending] for drawer in drawers]
        while min(map(len, texts)) < num_ids:
            done = advance(networks, state, drawers, [max(0, num_ids - 1 - len(text)) for text in texts])
            texts = [text + ids for text, ids in zip(texts, done.ids, strict=True)]
            drafted, accepted = drafted + done.drafted, accepted + done.accepted
        speculative.update(up_to_eos(text[:num_ids]) for text in texts)
    assert 0.2 < accepted / drafted < 0.8
    assert p_value(speculative, expected) > UNUSUAL
    state, drawers = begin_together(lm, prompt, sampling, range(500))
    unverified = [[drawer.pending] for drawer in drawers]
    draft(networks, state, drawers, unverified, [num_ids - 1] * len(drawers))
    assert p_value(Counter(map(up_to_eos, unverified)), expected) < IMPOSSIBLE  # fewer draws tell a wrong distribution


def test_speculative_sampling_writes_well_formed_utf8() -> None:
    stats, texts = GenerationStats(), []
    for seed, begun in enumerate([b"", b"caf\xc3", b"\xf0\x9f", b"\xe2\x82", b"plain", b"\xed"]):
        lm = language_model(RULES[seed % 4], seed, CONFIDENCE)
        texts.append(lm.generate(begun, 50, temperature=4.0, utf8=True, speculate=5, seed=seed, stats=stats))
        text = begun + texts[-1]
        text[: len(text) - incomplete_suffix_length(text)].decode()  # raises where it is malformed
    assert 0 < stats.accepted_bytes < stats.drafted_bytes
    assert any(byte >= 0xE0 for byte in b"".join(texts))


# drafts


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_leaves_no_trace(rule: str) -> None:
    lm = language_model(rule, seed=4, confidence=CONFIDENCE)
    networks, prompt = networks_of(lm), encode("some text, and more\n")
    plain, _ = prefill(networks, prompt)
    state, _ = prefill(networks, prompt)
    drawer, blocks = start_writer(Request(prompt, 40)).drawer, [[70]]
    beliefs = draft(networks, state, [drawer], blocks, [16])
    assert len(beliefs[0]) == len(blocks[0]) - 1 > 1
    for byte_id in (70, 71, 36, 72):  # other bytes than drafted
        assert torch.equal(step(networks, state, [[byte_id]]), step(networks, plain, [[byte_id]]))
    assert state.rows[0].standing == plain.rows[0].standing and state.rows[0].ids == plain.rows[0].ids


def test_a_draft_ends_at_eos_and_at_its_limit() -> None:
    lm = language_model("fixed", seed=5, confidence=CONFIDENCE)
    networks, prompt = networks_of(lm), encode("text")
    state, _ = prefill(networks, prompt)
    blocks: list[list[int]] = [[70]]
    draft(networks, state, [start_writer(Request(prompt, 40)).drawer], blocks, [5])
    assert len(blocks[0]) == 6 and len(set(blocks[0])) > 2
    head = lm.network.local_decoder.head.weight.data
    head[[EOS, blocks[0][3]]] = head[[blocks[0][3], EOS]]
    again: list[list[int]] = [[70]]
    draft(networks, state, [start_writer(Request(prompt, 40)).drawer], again, [5])
    assert again == [[*blocks[0][:3], EOS]]


def test_a_row_drafts_more_the_more_of_it_is_accepted() -> None:
    for preset in ("small", "blt_1b", "blt_8b"):
        with torch.device("meta"):
            networks = Networks(
                read_run_config(preset).model, None, ByteLatentTransformer(read_run_config("tiny").model)
            )
        for compiled, most in ((False, 12), (True, 7)):
            networks = networks._replace(compiled=compiled)
            limits = [draft_limit(networks, acceptance / 50, 12) for acceptance in range(51)]
            assert limits[0] == 0 and limits[-1] == most
            assert all(fewer <= more for fewer, more in pairwise(limits))


@pytest.mark.parametrize(("agrees", "limit"), [(True, 1.0), (False, 0.0)])
def test_the_running_acceptance_follows_what_is_accepted(agrees: bool, limit: float) -> None:
    drawer = Drawer(softmax_of, torch.Generator().manual_seed(0))
    wanted = torch.tensor([0.5, 0.5, 0.0, 0.0])
    believed = wanted if agrees else wanted.flip(0)
    for _ in range(60):
        drafted = draw(believed, drawer.generator)
        verify(drawer, [], [0, drafted], [believed], wanted.log().expand(2, -1))
    assert abs(drawer.acceptance - limit) < 0.01


@pytest.mark.parametrize("speculate", [-1, SPARE_SLOTS])
def test_drafts_longer_than_the_caches_have_room_for_are_refused(speculate: int) -> None:
    lm = language_model("space", seed=0)
    with pytest.raises(ValueError, match=f"speculate must be 0 .* to {SPARE_SLOTS - 1} bytes, got {speculate}"):
        lm.generate("text", 5, speculate=speculate)
    with pytest.raises(ValueError, match="speculate must be 0"):
        lm.generate(["text", "more"], 5, speculate=speculate)
