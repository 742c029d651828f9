"""The claims' scripts compare like with like: the same text, the same FLOPs, bits that are summed over the same bytes."""

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablations
import as_good_as_tokens
import claim
import contenders
import copying
import drift
import evidence
import fixed_inference_flops
import latent_learning
import numpy as np
import pytest
import spelling
import texts
import token_transformer
import torch
import under_noise
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_models, tiny_config

from blt.byte_ids import encode
from blt.config import HashEmbeddingsConfig, PatchingConfig
from blt.config_file import read_run_config
from blt.corpus import BatchReader, build_shards, open_shard
from blt.documents import Document
from blt.evaluate import Score
from blt.flops import flops_per_byte, token_model_flops_per_byte
from blt.language_model import LanguageModel
from blt.model.entropy_model import EntropyModel, entropy_contexts
from blt.progress import Reporter

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
TABLES = HashEmbeddingsConfig(ngram_bytes=(2, 3), table_rows=64, min_count=2, filter_bits=8)
TEXT = "The cat sat on the mat, and the dog sat on the cat; naïve ones were 貓.\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all files of the mixes, of a few sentences."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    mixes = texts.MIXES
    for parts in mixes.values():
        for part, names in parts.items():
            for name in names:
                file = folder / ("train" if part == "train" else "eval") / name.removesuffix(".xz")
                file.parent.mkdir(exist_ok=True)
                written = [" ".join(chance.choices(TEXT.split(), k=60)) for _ in range(20)]
                rows = "".join(json.dumps({"text": text, "lang": "en"}) + "\n" for text in written)
                file.write_text(rows if ".jsonl" in name else "\n".join(written))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            mixes,
            "english",
            {part: tuple(n.removesuffix(".xz") for n in names) for part, names in mixes["english"].items()},
        )
        yield folder


@pytest.fixture(scope="module", params=[None, TABLES], ids=["plain", "tables"])
def tokens(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """A small token model that nobody trained, with a tokenizer of TEXT; with and without tables of token n-grams."""
    tokenizer = token_transformer.learned_bpe([TEXT], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    config = contenders.TransformerConfig(num_layers=2, width=16, num_heads=2)
    torch.manual_seed(0)
    network = token_transformer.TokenTransformer(config, token_transformer.num_ids(tokenizer), request.param).eval()
    return token_transformer.TokenModel(network, config, tokenizer, 32)


def test_the_bits_of_tokens_are_those_of_a_plain_sum_over_bytes_of_text(tokens: Any) -> None:
    ids = tokens.ids(TEXT.encode())
    with torch.no_grad():
        logits = tokens.network(torch.tensor([ids]))[0]
    nats = -sum(float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(1, len(ids)))
    (score,) = tokens.scores([TEXT.encode()])
    assert len(ids) <= tokens.window_ids
    assert score.bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert (score.bytes, score.patches) == (len(TEXT.encode()), len(ids) - 1)


def test_what_follows_a_prompt_costs_what_it_adds_to_it(tokens: Any) -> None:
    whole, before, after = TEXT[:30].encode(), TEXT[:11].encode(), TEXT[11:30].encode()
    assert tokens.ids(before) + tokens.ids(after)[1:] == tokens.ids(whole)
    (together,), (first,) = tokens.scores([whole]), tokens.scores([before])
    (rest,) = tokens.scores([after], [before])
    assert rest.bits == pytest.approx(together.bits - first.bits, rel=1e-5)
    assert rest.bytes == len(after)


def test_every_token_of_a_long_text_is_scored_once(tokens: Any) -> None:
    (score,) = tokens.scores([(TEXT * 9).encode()])
    assert score.patches == len(tokens.ids((TEXT * 9).encode())) - 1 > 3 * tokens.window_ids


def test_a_shard_in_tokens_holds_the_same_text(tokens: Any, tmp_path: Path) -> None:
    documents = [Document(str(number), (TEXT * (number + 1)).encode()) for number in range(6)]
    build_shards(documents, tmp_path / "corpus", 0.2)
    shard = open_shard(tmp_path / "corpus", "train")
    units = token_transformer.in_tokens(shard, tokens.tokenizer)
    for document, index in zip(shard.documents(), range(units.num_documents), strict=True):
        cut = units.data[units.offsets[index] : units.offsets[index + 1]]
        assert tokens.tokenizer.decode(cut.tolist()).encode() == document.data
    rows = BatchReader(units, 16, 2, seed=0).next_batch()
    assert rows.max() < tokens.num_ids


def test_a_token_model_learns_resumes_and_loads_as_it_was_saved(tokens: Any, tmp_path: Path) -> None:
    documents = [Document(str(number), (TEXT * 8).encode() + bytes([65 + number])) for number in range(6)]
    build_shards(documents, tmp_path / "corpus", 0.2)
    shard = token_transformer.in_tokens(open_shard(tmp_path / "corpus", "train"), tokens.tokenizer)
    training = contenders.TrainingConfig(
        total_bytes=2000, row_bytes=16, rows_per_step=4, learning_rate=1e-2, warmup_steps=2, dtype="float32"
    )
    with Reporter(quiet=True) as reporter:
        tables = TABLES if tokens.network.hash_embeddings else None
        arguments = (shard, [TEXT.encode()], tokens.config, tokens.tokenizer, training, reporter, tables)
        trained = token_transformer.train_token_model(tmp_path / "run", *arguments)
        again = token_transformer.train_token_model(tmp_path / "run", *arguments)
    loaded = token_transformer.load_token_model(tmp_path / "run")
    (before,), (after,) = tokens.scores([TEXT.encode()]), trained.scores([TEXT.encode()])
    assert after.bits < 0.8 * before.bits
    assert loaded.scores([TEXT.encode()]) == again.scores([TEXT.encode()]) == [after]
    assert tables is None or trained.network.hash_embeddings.frequent.any()


def test_greedy_writing_takes_the_likeliest_token_each_time(tokens: Any) -> None:
    prompt = b"The cat"
    written = tokens.greedy(prompt, 3, stop=b"\0")
    ids = tokens.ids(prompt)
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(tokens.network(torch.tensor([ids]))[0, -1, 4:].argmax()) + 4)
    assert written == tokens.tokenizer.decode([number - 4 for number in ids[-3:]]).encode()
    assert tokens.greedy(prompt, 3, stop=written[-1:]) == written.partition(written[-1:])[0]


@pytest.mark.parametrize("patch_bytes", [4.0, 4.5, 6.0, 8.0])
def test_contenders_cost_the_same_flops(patch_bytes: float) -> None:
    wanted, config = contenders.REFERENCE_FLOPS, contenders.read_run_config(contenders.CONFIG)
    model = contenders.sized(config.model, patch_bytes, wanted, 512)
    assert flops_per_byte(model, patch_bytes, 512).inference == pytest.approx(wanted, rel=0.01)
    for width, bytes_per_id, vocabulary in ((48, 1.0, 260), (128, patch_bytes, 2052)):
        like = contenders.TransformerConfig(num_layers=1, width=width, num_heads=2)
        found = contenders.equal_flops_config(like, wanted, 512, bytes_per_id, vocabulary)
        assert token_model_flops_per_byte(found, 512, bytes_per_id, vocabulary) == pytest.approx(wanted, rel=0.01)
    with pytest.raises(ValueError, match="smaller width or vocabulary"):
        contenders.equal_flops_config(like, wanted, 512, 1.0, 2052)


def test_a_mix_has_an_equal_share_of_each_file_and_is_written_once(data: Path, tmp_path: Path) -> None:
    paths = texts.paths_of(data, "english", "train")
    file = texts.mixed(paths, 3000, tmp_path / "mix.jsonl")
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert sum(len(row.encode()) for row in rows) == pytest.approx(3000, abs=10)
    file.write_text("mine\n")
    assert texts.mixed(paths, 3000, tmp_path / "mix.jsonl").read_text() == "mine\n"
    with pytest.raises(FileNotFoundError, match="--data"):
        texts.paths_of(tmp_path, "english", "train")


@given(st.text("abcdefghij", min_size=2, max_size=14), st.integers(0, 2**32))
def test_answers_about_letters_are_right(word: str, seed: int) -> None:
    chance = random.Random(seed)
    for name, make in spelling.TASKS.items():
        if name == "swap_char" and not spelling.can_be_swapped(word):
            continue
        arguments, answer = make(word, chance)
        first, second = (*arguments, "")[:2]
        naive = {
            "spell": "".join(letter + " " for letter in word)[:-1],
            "spell_inverse": "".join(letter for letter in first if letter != " "),
            "contains_char": "Yes" if any(letter == first for letter in word) else "No",
            "ins_char": "".join(letter + first * (letter == second) for letter in word),
            "del_char": "".join(letter for letter in word if letter != first),
            "sub_char": "".join(second if letter == first else letter for letter in word),
            "swap_char": "".join({first: second, second: first}.get(letter, letter) for letter in word),
        }
        assert answer == naive[name]


def test_misspellings_are_those_of_the_list_and_nothing_else_changes() -> None:
    known = under_noise.misspellings("teh->the\nthw->the, thaw\nadn->and\n")
    text = "The cat and the dog. " * 50
    wrong = under_noise.with_typos(known)(text, 0)
    assert wrong == under_noise.with_typos(known)(text, 0)
    words = set(wrong.replace(".", "").split())
    assert words == {"The", "the", "cat", "dog", "and", "Teh", "teh", "Thw", "thw", "adn"}
    share = sum(word in ("Teh", "teh", "Thw", "thw", "adn") for word in wrong.split()) / 150
    assert share == pytest.approx(0.25, abs=0.1)


def test_a_claim_is_measured_and_read_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of the first claim, at a size at which it says nothing."""
    first = as_good_as_tokens
    monkeypatch.setitem(claim.BUDGETS, "smoke", 9000)
    monkeypatch.setitem(claim.HELD_OUT_BYTES, "smoke", 1500)
    monkeypatch.setattr(first, "MIXES", {"english": None})
    few_rows = tmp_path / "claims.toml"  # tables of millions of numbers are written and read for each contender
    few_rows.write_text(contenders.CONFIG.read_text().replace("table_rows = 65536", "table_rows = 1024"))
    monkeypatch.setattr(contenders, "CONFIG", few_rows)
    arguments = ["--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["as_good_as_tokens.py", *arguments, "--dtype", "float32"])
    first.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "found.png").stat().st_size > 1000
    runs = {run["name"]: run for run in found["runs"]}
    assert set(runs) == set(contenders.CONTENDERS) == set(found["bits_per_byte"]["english"])
    flops = [run["inference_flops_per_byte"] for run in runs.values()]
    assert max(flops) < 1.15 * min(flops)  # patches of so short a text are seldom of the size asked for
    assert len({run["train_bytes"] for run in runs.values()}) == 1
    assert all(np.isfinite(list(run["bits_per_byte"].values())).all() for run in runs.values())
    ours, theirs = (runs[name]["mean_bits_per_byte"] for name in ("BLT, entropy", "BPE"))
    low, above, high = (found["above_ours"]["english"]["BPE"]["all"][place] for place in (1, 0, 2))
    assert above == pytest.approx(100 * (theirs / ours - 1), abs=1e-3) and low <= above <= high
    first.main()
    assert json.loads((tmp_path / "found.json").read_text()) == found
    (bpe,) = (tmp_path / "work").glob("runs/english/*/BPE.0")
    shutil.rmtree(bpe)  # as if it had been done on another machine: what was found there stays
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "BPE with tables"])
    first.main()
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_a_run_of_another_kind_is_not_taken_for_one_that_is_not_here(tmp_path: Path) -> None:
    out, bpe = tmp_path / "found.json", contenders.CONTENDERS["BPE"]
    told = {"mix": "english", "name": "BPE", "seed": 0, "train_bytes": 9_900, "mean_bits_per_byte": 2.0}
    told |= {"inference_flops_per_byte": 1.05e6, "training": {"dtype": "bfloat16"}}
    out.write_text(json.dumps({"runs": [told]}))
    chosen = argparse.Namespace(out=out, dtype="auto")
    plans = [
        claim.Plan("BPE", bpe, "english", seed, size, flops)
        for seed in (0, 1)
        for size in (10_000, 30_000)
        for flops in (1e6, 4e6)
    ]
    assert [claim.done([plan], tmp_path, chosen) for plan in plans] == [[told]] + [[]] * 7
    assert not claim.done(plans, tmp_path, argparse.Namespace(out=out, dtype="float32"))
    plans[0].folder(tmp_path).mkdir(parents=True)
    here = {"bits_per_byte": {"a": 3.0, "b": 4.0}, "training": {"dtype": "float32"}}
    (plans[0].folder(tmp_path) / "result.json").write_text(json.dumps(here))
    assert claim.done(plans[:1], tmp_path, chosen)[0]["mean_bits_per_byte"] == 3.5
    assert claim.done(plans[:1], tmp_path, argparse.Namespace(out=out, dtype="bfloat16")) == [told]
    with pytest.raises(SystemExit, match="holds a run in float32; give another --work"):
        contenders.run(bpe, out, {}, plans[0].folder(tmp_path), 1e6, dtype="bfloat16")


def test_models_that_are_not_here_are_told_by_results_of_the_same_budget_and_dtype(tmp_path: Path) -> None:
    chosen = argparse.Namespace(out=tmp_path / "found.json", budget="minutes", dtype="float32")
    assert claim.models_before(chosen) == {}
    models = [{"name": "BPE", "seed": seed, "bits": {"eng": 1.0 + seed}} for seed in range(2)]
    chosen.out.write_text(json.dumps({"budget": "minutes", "dtype": "float32", "models": models}))
    assert claim.models_before(chosen) == {("BPE", 0): models[0], ("BPE", 1): models[1]}
    for other in ({"budget": "hour"}, {"dtype": "bfloat16"}, {"dtype": "auto"}):
        assert claim.models_before(argparse.Namespace(**{**vars(chosen), **other})) == {}


@pytest.mark.parametrize("large", [False, True])
def test_larger_patches_have_a_larger_latent_transformer_at_the_same_flops(large: bool) -> None:
    spent, widths = {}, []
    flops = contenders.LARGE_FLOPS if large else contenders.REFERENCE_FLOPS
    for name, contender in fixed_inference_flops.contenders(large).items():
        if contender.kind == "blt":
            settings = {"data.paths": ["text"], **contender.settings}
            config = read_run_config(contenders.CONFIG, [f"{k}={contenders._toml(v)}" for k, v in settings.items()])
            patch_bytes, share = config.calibration.target_patch_bytes, 0.5 if "half" in name else 1
            model = contenders.sized(config.model, patch_bytes, share * flops, 512)
            spent[name] = flops_per_byte(model, patch_bytes, 512).inference / share
            widths.append((model.latent.width, model.latent.ffn_width))
    assert len(spent) == 4
    assert list(spent.values()) == pytest.approx([flops] * 4, rel=0.01)
    assert widths[0] < widths[1] < widths[2]


def test_crossings_are_of_points_that_both_have() -> None:
    def runs(name: str, bits: dict[int, float]) -> list[dict[str, Any]]:
        return [{"name": name, "train_bytes": size, "mean_bits_per_byte": value} for size, value in bits.items()]

    ours = runs("BLT, patches of 4", {10: 2.0, 100: 1.8, 1000: 1.6})
    found = fixed_inference_flops.crossings(
        ours
        + runs("BLT, patches of 6", {100: 1.9, 1000: 1.5})
        + runs("BLT, patches of 8", {10: 1.9, 100: 1.9, 1000: 1.7})
        + runs("BPE", {1000: 1.5, 10: 1.9, 100: 1.7})
    )
    assert found == {
        "BLT, patches of 6": pytest.approx(100 * 10**0.5),
        "BLT, patches of 8": "not below",
        "BPE": "below from the first point on",
    }


def test_the_interval_holds_what_other_documents_say_nineteen_times_in_twenty() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(100):
        sizes = {"text": generator.integers(100, 1000, 40)}
        ours = {"text": sizes["text"] * generator.uniform(1, 4, 40)}  # theirs are truly 2% above
        theirs = {"text": ours["text"] * generator.normal(1.02, 0.03, 40)}
        _, low, high = as_good_as_tokens.relative(ours, theirs, sizes)
        held += low < 2 < high
    assert 88 <= held <= 99


def test_tables_of_the_evidence_are_those_of_the_results() -> None:
    page = evidence.PAGE.read_text()
    assert evidence.with_tables(page, EXPERIMENTS / "results") == page
    assert "<!-- table" in page


def test_changed_code_computes_something_else_and_only_while_it_lasts() -> None:
    torch.manual_seed(0)
    _, network = random_models(tiny_config())
    ids = torch.tensor([encode(TEXT)])
    starts = torch.arange(ids.shape[1] + 1)[None] % 3 < 2
    with torch.no_grad():
        before = network(ids, starts)
        names = [*ablations.CHANGED_CODE, "no cross-attention at all, no n-grams"]
        assert set(names) < set(ablations.VARIANTS)
        for name in names:
            if "tables of whole patches" in name:  # changes what is built, see below
                continue
            with ablations.changed_code(name):
                changed = network(ids, starts)
            assert changed.isfinite().all()
            assert not torch.allclose(changed, before)
            assert torch.equal(network(ids, starts), before)


def test_every_variant_has_a_base_that_is_a_variant() -> None:
    bases = {ablations.base_of(name) for name in ablations.VARIANTS}
    assert bases == {"as it is", "no n-grams", "encoder 1, decoder 2, no n-grams"} <= set(ablations.VARIANTS)
    runs = [
        {"name": name, "seed": seed, "mean_bits_per_byte": bits + seed}
        for name, bits in (("as it is", 2.0), ("no n-grams", 2.5), ("patches of 8, no n-grams", 2.6))
        for seed in (0, 1)
    ]
    above = ablations.above_base(runs[:-1])
    assert above["no n-grams"] == pytest.approx({"0": 25, "1": 100 / 6})
    assert above["patches of 8, no n-grams"] == pytest.approx({"0": 4})
    assert set(above) == {"no n-grams", "patches of 8, no n-grams"}


def test_entropies_of_lines_forget_repetition_and_thresholds_give_the_patches_asked_for() -> None:
    """A model that counts how often it has read the byte before is surer with every line, unless it forgets."""

    class Remembers(EntropyModel):
        def forward(self, byte_ids: torch.Tensor) -> torch.Tensor:
            contexts = entropy_contexts(byte_ids, self.config.reset_at_newline)
            same = (byte_ids[:, :, None] == byte_ids[:, None]) & (contexts[:, :, None] == contexts[:, None])
            before = same.tril().sum(-1)
            return torch.nn.functional.one_hot(byte_ids, 260) * before[..., None].float()

    model = Remembers(tiny_config().entropy_model.model_copy(update={"window_positions": 512}))
    texts = {"again": drift.as_rows([drift.repeated("some words of a line", 4096)], 4096)}
    usual = drift.as_rows([TEXT.encode() * 8], drift.ROW_BYTES)
    rule = PatchingConfig(rule="entropy")
    drifting, forgetful = (drift.along(of, rule, usual, texts)["again"] for of in (model, drift.forgetting(model)))
    assert drifting["entropy_nats"][-1] < 0.5 * drifting["entropy_nats"][0]
    assert drifting["patch_bytes"][-1] > drifting["patch_bytes"][0]
    assert forgetful["entropy_nats"][-1] == pytest.approx(forgetful["entropy_nats"][0], rel=0.05)


def test_tables_of_whole_patches_are_read_by_the_patches_that_follow() -> None:
    ids = torch.tensor([encode("aaaabbaaaa")])
    starts = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]]).bool()
    torch.manual_seed(0)
    _, before = random_models(tiny_config())
    torch.manual_seed(0)
    with ablations.changed_code("tables of whole patches, no n-grams"), torch.no_grad():
        _, network = random_models(tiny_config())
        network.load_state_dict(before.state_dict(), strict=False)
        network.local_encoder.patch_tables.tables.weight.zero_()
        assert torch.equal(network(ids, starts), before(ids, starts))
        rows = ablations.patch_rows(ids, torch.tensor([0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]), 4)
        network.local_encoder.patch_tables.tables.weight[rows[2, 0]] = 1.0  # of the patch "bb"
        changed = (network(ids, starts) != before(ids, starts)).any(-1)[0].tolist()
    assert changed.index(True) == 6  # the last byte of "bb", which predicts the next patch's first


def test_bits_of_a_letter_are_taken_where_it_comes_again_and_nowhere_else() -> None:
    documents = [latent_learning.document(random.Random(seed)) for seed in range(3)]
    ids = torch.tensor([encode(text) for text in documents])
    again = torch.tensor([place > 0 and place % 60 == 0 for place in range(len(documents[0]))])
    right = torch.nn.functional.one_hot(ids[:, 1:], 260) * 1000.0

    class Knows:
        def __init__(self, places: torch.Tensor) -> None:
            self.logits = torch.nn.functional.pad(right * places[:, None], (0, 0, 0, 1))

        def predict(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.logits,)

    assert latent_learning.letter_bits(Knows(again), documents) == pytest.approx(0)
    assert latent_learning.letter_bits(Knows(~again), documents) == pytest.approx(math.log2(260))


def test_made_up_words_are_none_of_those_asked_about() -> None:
    every_pair_but_one = {a + b for a in spelling.LETTERS for b in spelling.LETTERS} - {"qz"}
    fits = spelling.can_be_swapped
    made = [spelling.made_up(random.Random(seed), every_pair_but_one, fits) for seed in range(500)]
    assert not set(made) & every_pair_but_one
    assert all(fits(word) for word in made)
    longer = [word for seed in range(500) if len(word := spelling.made_up(random.Random(seed), set(), bool)) > 8]
    assert 0.2 < sum(len(set(word)) <= 6 for word in longer) / len(longer) < 0.6  # letters that come again


def test_questions_are_in_the_words_of_the_prompts_about_words_that_are_not_held_out(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("seen seen know know Name Name rare hidden hidden engineering engineering")
    words = spelling.word_list(file, {"hidden"})
    assert sorted(words) == ["engineering", "know", "seen"]
    prompts = {
        name: f'Do {name}:\n 1. Do "a". Answer: "b"\n\n Question: {name} ' + " ".join(["{}"] * places) + "."
        for name, places in zip(spelling.TASKS, (1, 1, 2, 3, 2, 3, 3), strict=True)
    }
    made = list(spelling.documents(prompts, words, {"hidden"}, 100_000, seed=0))
    assert made == list(spelling.documents(prompts, words, {"hidden"}, 100_000, seed=0))
    assert sum(map(len, made)) == pytest.approx(100_000, rel=0.05)
    assert not any("hidden" in text or "h i d d e n" in text for text in made)
    kinds = [text.split(":")[0].removeprefix("Do ") for text in made]
    assert kinds.count("spell") + kinds.count("spell_inverse") == pytest.approx(4 / 9 * len(made), rel=0.4)
    for kind, text in zip(kinds, made, strict=True):
        asked = text.removeprefix(prompts[kind].rpartition("Question:")[0]).strip().split("\n")
        for line in asked:
            assert line.startswith(f"Question: {kind} ") and line.endswith('"')
            if kind == "spell":
                assert line == f'Question: spell {(word := line.split()[2][:-1])}. Answer: "{" ".join(word)}"'


def test_an_answer_is_right_if_and_only_if_it_is_what_the_model_writes() -> None:
    class Writes(LanguageModel):
        """After what one of these texts begins with, its next byte; x where none does."""

        def __init__(self, texts: list[str]) -> None:
            self.rows = [encode(text) for text in texts]

        def predict(self, ids: torch.Tensor) -> Any:
            logits = torch.zeros(*ids.shape, 260)
            for row, column in np.ndindex(*ids.shape):
                read = ids[row, : column + 1].tolist()
                known = [own[column + 1] for own in self.rows if own[: column + 1] == read and len(own) > column + 1]
                logits[row, column, known[0] if known else encode("x")[-1]] = 1
            return logits, None, None

    model = Writes(['Spell no: "n o"', 'Spell it: "i t', 'Spell so: "s o o"', 'Spell a: "b"'])
    prompts, answers = [f'Spell {word}: "' for word in ("no", "it", "so", "a")], ["n o", "i t", "s o", "a"]
    assert spelling.answered_right(model, prompts, answers) == [True, False, False, False]


def test_a_passage_again_is_scored_after_itself_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(model: Any, documents: list[bytes], prompts: list[bytes] | None = None) -> list[Score]:
        before = prompts or [b""] * len(documents)
        known = [prompt == document + b"\n" for prompt, document in zip(before, documents, strict=True)]
        return [Score(len(d), 0.0 if k else 8.0 * len(d)) for d, k in zip(documents, known, strict=True)]

    monkeypatch.setattr(copying, "scores", scores)
    assert copying.first_and_again(None, ["some text", "other text, ünïcode"]) == (8.0, 0.0)
