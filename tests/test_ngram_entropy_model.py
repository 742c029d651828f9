"""Look-ups agree to the bit however a text comes, and hold what a dictionary of contexts would hold."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import continuations, language_model, random_prompts
from safetensors.torch import load, save
from tiny import random_row
from torch import Tensor

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, encode
from blt.config import NgramEntropyModelConfig
from blt.incremental import Networks, prefill, step
from blt.language_model import LanguageModel
from blt.model.ngram_entropy_model import BLOCK, DOUBTS_PER_NAT, MOST_ON_HOST, NgramCounts, NgramEntropyModel
from blt.report import patched_text

CONFIG = NgramEntropyModelConfig(kind="ngram", max_order=8, table_bits=16, backoff=2.0)
DOCUMENTS = [b"the cat sat on the mat; the cat ate. " * 3, b"x", b"a hat on the cat\n" * 2, b"th", b"the mat sat"]
LETTERS = b" aceht\n\xff"

texts = st.lists(st.sampled_from(LETTERS), max_size=30).map(bytes)
rows_of_ids = st.lists(st.sampled_from([BOE, BOS, EOS, *encode(LETTERS)[1:]]), min_size=1, max_size=40)


def counted(documents: list[bytes], config: NgramEntropyModelConfig = CONFIG, stretch: int = 10**6) -> NgramCounts:
    """The counts of documents that come in stretches of so many bytes."""
    counts = NgramCounts(config)
    text = np.frombuffer(b"".join(documents), np.uint8)
    starts = np.cumsum([0, *map(len, documents[:-1])])
    for begin in range(0, len(text), stretch):
        within = starts[(starts >= begin) & (starts < begin + stretch)]
        counts.add(text[begin : begin + stretch], within - begin)
    return counts


MODEL = counted(DOCUMENTS).model()


def entropies(ids: list[int]) -> Tensor:
    """Of one row, without the nan."""
    return MODEL.entropies(torch.tensor([ids]))[0, 1:]


def naive_doubt(documents: list[bytes], context: bytes, config: NgramEntropyModelConfig = CONFIG) -> float:
    """The doubt after a context, in nats, from a dictionary and without rounding."""
    followers: dict[bytes, Counter[int]] = defaultdict(Counter)
    for document in documents:
        padded = bytes(8) + document
        for position, byte in enumerate(document, 8):
            for order in range(config.max_order + 1):
                followers[padded[position - order : position]][byte] += 1
    doubt = math.log(256)
    for order in range(config.max_order + 1):
        counts = followers[(bytes(8) + context)[8 + len(context) - order :]].values()
        n = sum(counts)
        if n < 2:
            continue
        trusted = (n - 1) / (n - 1 + config.backoff * len(counts))
        of_choice = -trusted * math.log(trusted) - (1 - trusted) * math.log(1 - trusted)
        entropy = sum(count / n * math.log(n / count) for count in counts)
        doubt += trusted * (entropy + of_choice / 2 / trusted - doubt)
    return doubt


def test_the_tables_hold_what_a_dictionary_of_contexts_holds() -> None:
    text = DOCUMENTS[0][:60] + b" never seen " + DOCUMENTS[2]
    found = entropies(encode(text))
    for position in range(0, len(text) + 1, 3):
        # 8 bits of entropy and of confidence in each of six tables
        assert float(found[position]) == pytest.approx(naive_doubt(DOCUMENTS, text[:position]), abs=0.03)


def test_contexts_that_were_seen_once_say_nothing() -> None:
    once = counted([b"abcdefghij"]).model()
    assert not once.slots.any()


@pytest.mark.parametrize("stretch", [1, 2, 7, 8, 9, 50])
def test_a_text_counted_in_stretches_makes_the_same_tables(stretch: int) -> None:
    counts = counted(DOCUMENTS, stretch=stretch)
    assert counts.num_bytes == sum(map(len, DOCUMENTS))
    assert counts.num_contexts(3) == counted(DOCUMENTS).num_contexts(3)
    model = counts.model()
    assert model.slots.equal(MODEL.slots) and model.pair_doubts.equal(MODEL.pair_doubts)


def test_the_order_of_documents_does_not_matter_to_the_tables() -> None:
    model = counted(DOCUMENTS[::-1]).model()
    assert model.slots.equal(MODEL.slots) and model.pair_doubts.equal(MODEL.pair_doubts)


@given(rows_of_ids)
def test_one_id_at_a_time_gives_the_same_bits_as_the_whole_row(ids: list[int]) -> None:
    tables = MODEL.on_host()
    assert [tables.entropy_after(ids[:length]) for length in range(1, len(ids) + 1)] == entropies(ids).tolist()
    last = [tables.entropy_after(ids[max(0, length - 8) : length]) for length in range(1, len(ids) + 1)]
    assert last == entropies(ids).tolist()


@given(rows_of_ids, st.integers(1, 40))
def test_a_prefix_gives_the_same_bits_as_the_whole_row(ids: list[int], length: int) -> None:
    assert entropies(ids[:length]).equal(entropies(ids)[:length])


@given(st.lists(texts, min_size=1, max_size=4))
def test_packed_documents_give_the_same_bits_as_each_alone(documents: list[bytes]) -> None:
    packed = [byte_id for document in documents for byte_id in [*encode(document), EOS]]
    alone = [entropies([*encode(document), EOS])[: len(document) + 1] for document in documents]
    found, begin = entropies(packed), 0
    for document, expected in zip(documents, alone, strict=True):
        assert found[begin : begin + len(expected)].equal(expected)
        begin += len(document) + 2


@given(st.lists(rows_of_ids, min_size=1, max_size=4))
def test_a_row_gives_the_same_bits_in_a_padded_batch(rows: list[list[int]]) -> None:
    longest = max(map(len, rows))
    batch = MODEL.entropies(torch.tensor([row + [BOE] * (longest - len(row)) for row in rows]))
    assert batch[:, 0].isnan().all() and batch.shape == (len(rows), longest + 1)
    for row, found in zip(rows, batch, strict=True):
        assert found[1 : len(row) + 1].equal(entropies(row))


@given(rows_of_ids, st.integers(0, 39), st.sampled_from(encode(LETTERS)[1:]))
def test_an_entropy_ignores_later_ids_and_what_is_longer_ago_than_the_longest_context(
    ids: list[int], place: int, other: int
) -> None:
    place %= len(ids)
    changed = [*ids[:place], other, *ids[place + 1 :]]
    same = entropies(ids) == entropies(changed)
    assert same[:place].all()
    if ids[place] != EOS:
        assert same[place + CONFIG.max_order :].all()


@given(texts)
def test_a_text_gives_the_same_bits_as_its_ids(text: bytes) -> None:
    found = MODEL.text_entropies(torch.tensor(list(text), dtype=torch.uint8))
    assert found[0, 1:].equal(entropies(encode(text)))


def test_texts_longer_than_a_block_give_the_same_bits() -> None:
    ids = torch.randint(0, 260, (2, BLOCK), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[0, -7:-5] = torch.tensor([EOS, BOS])
    found = MODEL.entropies(ids)
    assert found[1:, -30:].equal(MODEL.entropies(ids[1:, -60:])[:, -30:])
    text = (ids[1:].clamp(min=4) - BYTE_OFFSET).to(torch.uint8)[0].repeat(2)
    of_text = MODEL.text_entropies(text)
    assert of_text[0, -30:].equal(MODEL.text_entropies(text[-60:])[0, -30:])
    assert of_text[0, BLOCK - 19 : BLOCK + 21].equal(MODEL.text_entropies(text[BLOCK - 60 : BLOCK + 19])[0, -40:])


def test_entropies_lie_between_0_and_8_nats_and_are_fp32_without_loss() -> None:
    ids = torch.randint(0, 260, (1, 3000), generator=torch.Generator().manual_seed(1))
    found = MODEL.entropies(ids)[0, 1:]
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() < 8
    assert (found.double() * DOUBTS_PER_NAT % 1 == 0).all()


def test_tables_are_kept_by_safetensors_and_stay_whole_numbers() -> None:
    again = NgramEntropyModel(CONFIG)
    again.load_state_dict(load(save(MODEL.state_dict())))
    ids = torch.tensor([encode(DOCUMENTS[0])])
    assert again.entropies(ids)[:, 1:].equal(MODEL.entropies(ids)[:, 1:])
    assert again.slots.dtype == torch.int16 and again.pair_doubts.dtype == torch.int32
    assert not list(again.parameters())


# in a whole model


def random_model(rule: str, seed: int = 0) -> LanguageModel:
    tables = NgramEntropyModelConfig(kind="ngram", max_order=3 + seed % 6, table_bits=10)
    return language_model(rule, seed, entropy_model=tables)


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_generation_is_naive_generation_byte_for_byte(rule: str, speculate: int) -> None:
    lm = random_model(rule)
    prompts = random_prompts(6, seed=1)
    expected = continuations(lm, prompts, 15)
    found = lm.generate(prompts, 15, speculate=speculate)
    sure = [row for row, text in enumerate(expected) if text is not None]
    assert len(sure) > 2
    assert [found[row] for row in sure] == [expected[row] for row in sure]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_read_in_any_blocks_a_row_has_the_patches_of_the_whole_row(rule: str, seed: int) -> None:
    lm = random_model(rule, seed)
    row = random_row(3 * MOST_ON_HOST, seed, eos_at=(5, 9, MOST_ON_HOST + 20))
    starts, ids = lm.patch_starts(row)[0], row[0].tolist()
    networks = Networks(lm.config, lm.entropy_model, lm.network)
    state, read = None, 0
    for block in (1, 2, 7, MOST_ON_HOST + 5, MOST_ON_HOST, 1, 1, len(ids)):
        if state is None:
            state, _ = prefill(networks, ids[:block])
        elif ids[read : read + block]:
            step(networks, state, [ids[read : read + block]])
        read += block
        standing = state.rows[0].standing
        assert standing.num_patches == int(starts[1 : standing.num_ids + 1].sum())
        assert standing.patching.next_starts == bool(starts[standing.num_ids])
        assert not math.isnan(standing.patching.last_entropy)


def test_rows_that_are_read_together_are_as_each_alone() -> None:
    lm = random_model("entropy", seed=3)
    prompts = random_prompts(5, seed=2)
    together = lm.generate(prompts, 12, temperature=1.0, seed=5)
    assert together == [lm.generate(p, 12, temperature=1.0, seed=5 + row) for row, p in enumerate(prompts)]


@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_a_text_beyond_the_models_limit_is_cut_as_one_document(rule: str) -> None:
    lm = random_model(rule, seed=1)
    text = bytes(random_row(3000, seed=0).clamp(min=4).sub(4).flatten().tolist())
    starts = lm.text_patch_starts(text)
    assert starts.shape == (1, len(text) + 2) and len(text) > lm.config.max_bytes
    short = lm.config.max_bytes - 1
    assert lm.text_patch_starts(text[:short]).equal(lm.patch_starts(lm.encode(text[:short])))
    assert starts[:, :short].equal(lm.text_patch_starts(text[:short])[:, :short])
    assert b"".join(lm.patches(text)) == text and len(lm.patches(text)) == int(starts[0, 1:-1].sum())
    assert lm.patches(b"") == []


def test_a_model_has_entropies_and_a_picture_but_no_bits_of_its_entropy_model() -> None:
    lm = random_model("entropy")
    score = lm.score("some text")
    assert score.entropy_model_bits_per_byte is None and score.bits_per_byte > 0
    logits, entropy_logits, starts = lm.predict(lm.encode("text"))
    assert entropy_logits is None and logits.shape == (1, 5, 260) and starts.equal(lm.patch_starts(lm.encode("text")))
    text = patched_text(lm, "some text")
    assert text.entropies_nats == lm.entropies(lm.encode("some text"))[0, 1:-1].tolist()
