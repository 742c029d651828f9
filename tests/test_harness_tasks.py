"""Our tasks read each benchmark's own form of file, ask what its own words say, and know a right answer from a wrong one."""

import gzip
import json
import lzma
import math
import random
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks.hellaswag.utils import process_docs
from test_continuations import model

from blt.benchmark_files import find_files
from blt.harness import HarnessModel, evaluate_tasks
from blt.harness_tasks import INCLUDED, edit_distance
from blt.noise import NOISES
from blt.progress import Reporter

Blt = Callable[..., Any]

SPELL = 'Spell:\n  1. Spell "ox". Answer: "o x"\n  Question: Spell "{}".'
SWAP = 'Swap:\n  1. Swap "b" and "a" in "a b". Answer: "b a"\n  Question: Swap "{}" and "{}" in "{}".'
WORDS = {f"wörd{number}": [f"P{number % 3} R{number % 2} S", f"P{number % 3} T"] for number in range(20)}
SHOWS = [
    {
        "activity_label": "Baking",
        "ctx_a": f"[header] A {cook} bakes [title] Take it out.",
        "ctx_b": "she",
        "endings": ["[step] eats  it", "sings loudly", f"thanks the {cook}", "falls asleep [substeps]"],
        "label": str(number),
    }
    for number, cook in enumerate(("man", "woman", "friend"))
]
PAIR = {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."}
PASSAGES = ["It was there that he saw the sea", 'She said: "Go\nhome and sleep"']


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pronunciations(separator: str, numbered: bool) -> str:
    return "".join(
        f"{word}({count})" * (numbered and count > 1) + word * (not numbered or count == 1) + f"{separator}{spoken}\n"
        for word, all_spoken in WORDS.items()
        for count, spoken in enumerate(all_spoken, 1)
    )


FILES = {
    "cute/prompts.json": json.dumps({"spell": SPELL, "swap_word": SWAP}),
    "cute/words/spell.tsv": "input1\tlabel\nthe\tt h e\nsea\ts e a\n",
    "cute/words/spell_rand.tsv": "input1\tlabel\r\nxq\tx q\r\n",  # as Windows ends lines
    "cute/words/swap_word.tsv": "input1\tinput2\tinput3\tlabel\nI\tam\tI am.\tam I.\n",
    "hellaswag_val.jsonl": lines(SHOWS),
    "cmudict.dict": pronunciations(" ", numbered=True).replace("S\n", "S # place, danish\n", 1),
    "wikipron/tur_latn_broad.tsv": pronunciations("\t", numbered=False),
    "wikipron/ben_beng_broad.tsv": pronunciations("\t", numbered=False),
    "wikipron/ben_beng_dhaka_broad.tsv": pronunciations("\t", numbered=False),
    "blimp/verbs.jsonl": lines([PAIR, PAIR]),
    "blimp/nouns.jsonl": lines([PAIR]),
    "lambada_test.jsonl": lines([{"text": text} for text in PASSAGES]),
    "arc_easy_test.jsonl": lines(
        [{"id": "1", "query": "Question: Wet?\nAnswer:", "choices": ["rain", "sand", "fire"], "gold": 0}]
    ),
    "ARC-Challenge-Test.jsonl": lines(
        [
            {
                "id": "2",
                "question": {
                    "stem": "Hot?",
                    "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
                },
                "answerKey": "2",
            }
        ]
    ),
    "arc_challenge_validation.jsonl": lines(
        [{"id": "3", "question": "Dry?", "choices": {"text": ["sand"], "label": ["A"]}, "answerKey": "A"}]
    ),
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every benchmark in a folder of its own."""
    return write_files(tmp_path_factory.mktemp("published"), FILES)


class Answering(HarnessModel):
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, answer: Callable[[str], str] = lambda asked: "", right: Sequence[str] = ()) -> None:
        super().__init__(model("space"), 64, Reporter(quiet=True))
        self.answer, self.right, self.asked = answer, right, list[tuple[Any, ...]]()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(0.0, True) if request.args[1] in self.right else (-99.0, False) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]


# what is asked, and what is right


def test_cute_asks_in_its_own_words_up_to_the_quote_that_closes_an_answer(published: Path) -> None:
    spelled = {"the": "t h e", "sea": "s e e", "xq": " x q ", "I": "am I."}
    asking = Answering(
        lambda asked: next(end for word, end in spelled.items() if f'"{word}"' in asked.rsplit("\n")[-1])
    )
    figures = evaluate_tasks(asking, ["cute", "cute_rand"], published)
    assert figures["cute_spell"] == {"exact_match": 0.5, "documents": 2}
    assert figures["cute_swap_word"] == figures["cute_spell_rand"] == {"exact_match": 1.0, "documents": 1}
    assert figures["cute"] == {"exact_match": 0.75, "documents": 3}  # the mean of tasks, not of questions
    assert figures["cute_rand"]["exact_match"] == 1.0
    prompts = {asked for asked, _ in asking.asked}
    assert SPELL.format("the") + ' Answer: "' in prompts and SWAP.format("I", "am", "I am.") + ' Answer: "' in prompts
    options = {json.dumps(options) for _, options in asking.asked}
    assert options == {json.dumps({"until": ['"', "\n"], "max_gen_toks": most, "do_sample": False}) for most in (4, 6)}


def test_a_pronunciation_is_asked_for_after_some_that_are_held_apart(published: Path) -> None:
    asking = Answering(lambda asked: f" {WORDS[asked.rsplit(chr(10))[-1][:-1]][1]} ")
    figures = evaluate_tasks(asking, ["g2p", "g2p_tur"], published)
    assert figures["g2p"] == figures["g2p_tur"] == {"exact_match": 1.0, "phoneme_error_rate": 0.0, "documents": 4}
    for prompt, options in asking.asked:
        *shown, (word, nothing) = [line.split(":") for line in prompt.split("\n")]
        assert nothing == "" and options["until"] == ["\n"] and len(shown) == 8
        assert all(spoken == f" {WORDS[one][0]}" for one, spoken in shown) and word not in dict(shown)
    assert len({prompt.rpartition("\n")[0] for prompt, _ in asking.asked}) == 1  # the same for all
    asking = Answering()
    evaluate_tasks(asking, ["g2p_ben_beng_dhaka"], published, few_shot=0)
    assert {prompt[:-1] for prompt, _ in asking.asked} <= set(WORDS)


def test_the_nearest_pronunciation_counts_in_edits_for_each_of_its_phonemes(published: Path) -> None:
    wrong = evaluate_tasks(Answering(lambda asked: "X T"), ["g2p"], published)["g2p"]  # nearest to "P0 T"
    assert wrong == {"exact_match": 0.0, "phoneme_error_rate": 0.5, "documents": 4}
    silent = evaluate_tasks(Answering(lambda asked: ""), ["g2p"], published)["g2p"]
    assert silent["phoneme_error_rate"] == 1.0


def test_the_edit_distance_is_a_distance() -> None:
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("abc", k=drawn.randint(0, 7))) for _ in range(12)]
    for one in texts:
        assert edit_distance(one, one) == 0 and edit_distance(one, "") == len(one)
        for other in texts:
            between = edit_distance(one, other)
            assert between == edit_distance(other, one) and between >= abs(len(one) - len(other))
            assert all(between <= edit_distance(one, third) + edit_distance(third, other) for third in texts)


def test_hellaswag_reads_as_lm_evals_own_does(published: Path) -> None:
    asking = Answering(right=[" sings loudly"])
    figures = evaluate_tasks(asking, ["hellaswag_local"], published)["hellaswag_local"]
    assert figures["acc"] == pytest.approx(1 / 3) and figures["documents"] == 3
    assert asking.asked == [
        (theirs["query"], f" {ending}") for theirs in map(hellaswag_of_lm_eval, SHOWS) for ending in theirs["choices"]
    ]


def hellaswag_of_lm_eval(show: dict[str, Any]) -> dict[str, Any]:
    class One:
        def map(self, process: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
            return process(show)

    return process_docs(One())


@pytest.mark.parametrize("noise", NOISES)
def test_noise_falls_on_the_prompt_the_completion_or_both(noise: str, published: Path) -> None:
    asked: dict[str, list[tuple[Any, ...]]] = {}
    for name in (
        "hellaswag_local",
        *(f"hellaswag_noised_{noise}_{place}" for place in ("prompt", "completion", "both")),
    ):
        asking = Answering()
        evaluate_tasks(asking, [name], published)
        asked[name.removeprefix(f"hellaswag_noised_{noise}_")] = asking.asked
    clean = asked.pop("hellaswag_local")
    garbled = [
        (NOISES[noise](prompt, number // 4), " " + NOISES[noise](ending[1:], f"{number // 4} {number % 4}"))
        for number, (prompt, ending) in enumerate(clean)
    ]
    assert asked == {
        "prompt": [(new, old) for (new, _), (_, old) in zip(garbled, clean, strict=True)],
        "completion": [(old, new) for (_, new), (old, _) in zip(garbled, clean, strict=True)],
        "both": garbled,
    }


def test_noised_hellaswag_is_the_mean_over_noises_and_places(published: Path) -> None:
    figures = evaluate_tasks(Answering(right=[" SINGS LOUDLY", " sings loudly"]), ["hellaswag_noised"], published)
    accuracies = {name: of_task["acc"] for name, of_task in figures.items() if name.count("_") >= 3}
    single = [acc for name, acc in accuracies.items() if name.endswith(("prompt", "completion", "both"))]
    assert len(single) == 15 and set(figures) >= {f"hellaswag_noised_{noise}" for noise in NOISES}
    assert figures["hellaswag_noised"]["acc"] == pytest.approx(sum(single) / 15)
    assert figures["hellaswag_noised_upper_case"]["acc"] == pytest.approx(1 / 3)


def test_blimp_compares_whole_sentences_that_stand_alone(published: Path) -> None:
    asking = Answering(right=[PAIR["sentence_bad"]])
    figures = evaluate_tasks(asking, ["blimp_local"], published, few_shot=3)
    assert set(figures) == {"blimp_local", "blimp_local_nouns", "blimp_local_verbs"}
    assert figures["blimp_local"] == {"acc": 0.0, "documents": 3}
    assert asking.asked == [("", sentence) for _ in range(3) for sentence in PAIR.values()]


def test_lambada_asks_for_the_last_word(published: Path) -> None:
    asking = Answering(right=[" sea"])
    assert evaluate_tasks(asking, ["lambada_local"], published, limit=1)["lambada_local"] == {
        "perplexity": 1.0,
        "acc": 1.0,
        "documents": 1,
    }
    assert asking.asked == [("It was there that he saw the", " sea")]
    asking = Answering()
    evaluate_tasks(asking, ["lambada_local"], published)
    assert asking.asked[1] == ('She said: "Go\nhome and', ' sleep"')


def test_arc_is_read_in_every_form_that_it_is_published_in(published: Path) -> None:
    asking = Answering(right=[" rain", " fire"])
    figures = evaluate_tasks(asking, ["arc_easy_local", "arc_challenge_local"], published)
    assert figures["arc_easy_local"]["acc"] == figures["arc_challenge_local"]["acc_norm"] == 1.0
    hot = "Question: Hot?\nAnswer:"
    assert asking.asked[:1] + asking.asked[3:] == [("Question: Wet?\nAnswer:", " rain"), (hot, " ice"), (hot, " fire")]
    asking = Answering()
    evaluate_tasks(asking, ["arc_challenge_local"], published, few_shot=1)
    assert {prompt for prompt, _ in asking.asked} == {f"Question: Dry?\nAnswer: sand\n\n{hot}"}


def test_a_model_does_all_of_them_and_nobody_else_says_a_word(
    published: Path, tiny_training: Any, blt_command: Blt, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--task-data", published, "--limit", 1, "--json", "--quiet"]
    evaluated = blt_command("evaluate", tiny_training.run, "--tasks", *INCLUDED, *options)
    figures = evaluated.json["tasks"]
    assert set(INCLUDED) <= set(figures) and evaluated.stderr == "" and caplog.records == []
    assert all(math.isfinite(value) for of_task in figures.values() for value in of_task.values())
    assert all(0 <= of_task.get("acc", 0) <= 1 for of_task in figures.values())


# where the files are


def archive(kind: str, origin: Path, target: Path) -> None:
    """The benchmarks as one archive, or each file compressed."""
    if kind == "zip":
        with zipfile.ZipFile(target / "all.zip", "w") as zipped:
            for path in origin.rglob("*.*"):
                zipped.write(path, path.relative_to(origin))
    elif kind.startswith("tar"):
        with tarfile.open(target / f"all.{kind}", f"w:{kind.removeprefix('tar.')}" if "." in kind else "w") as packed:
            packed.add(origin, "benchmarks")
    else:
        opened = {"xz": lzma.open, "gz": gzip.open}[kind]
        for path in origin.rglob("*.*"):
            (target / path.relative_to(origin)).parent.mkdir(parents=True, exist_ok=True)
            with opened(target / f"{path.relative_to(origin)}.{kind}", "wb") as stream:
                stream.write(path.read_bytes())


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.xz", "tar.gz", "xz", "gz"])
def test_a_benchmark_is_found_however_it_is_packed(kind: str, published: Path, tmp_path: Path) -> None:
    archive(kind, published, tmp_path)
    for pattern in ("prompts.json", "*.tsv", "cmudict.dict", "arc[-_]challenge[-_]test.jsonl"):
        plain, packed = find_files(published, pattern), find_files(tmp_path, pattern)
        assert list(plain.values()) == list(packed.values()) != []
    assert find_files(tmp_path, "nonesuch") == {}
    single = next(path for path in tmp_path.iterdir() if path.is_file())
    assert find_files(single, single.name.removesuffix(f".{kind}") if kind in ("xz", "gz") else "prompts.json")


def test_of_files_of_one_name_those_that_hold_what_is_sought_are_taken(tmp_path: Path) -> None:
    plain = write_files(tmp_path / "plain", {"a/prompts.json": "{}", "b/prompts.json": '{"spell": 1}'})
    archive("tar", plain, tmp_path)
    for root in (plain, tmp_path / "all.tar"):
        assert list(find_files(root, "prompts.json", holding=b'"spell"').values()) == [b'{"spell": 1}']


# what is refused


def refused(name: str, folder: Path | None, blt: Blt, run: Path) -> str:
    data = [] if folder is None else ["--task-data", folder]
    finished = blt("evaluate", run, "--tasks", name, *data, "--quiet")
    assert finished.code == 1 and finished.stdout == b"" and finished.stderr.count("\n") == 1, finished
    assert "unexpected" not in finished.stderr and "Traceback" not in finished.stderr
    return finished.stderr


@pytest.mark.parametrize("name", INCLUDED)
def test_a_missing_file_is_named_and_where_to_get_it(
    name: str, blt_command: Blt, tiny_training: Any, tmp_path: Path
) -> None:
    unsaid = refused(name, None, blt_command, tiny_training.run)
    assert f"{name} reads the benchmark's own files" in unsaid and "https://" in unsaid and "--task-data" in unsaid
    empty = refused(name, tmp_path, blt_command, tiny_training.run)
    assert "no file " in empty and str(tmp_path) in empty and "https://" in empty
    assert "check --task-data" in refused(name, tmp_path / "nonesuch", blt_command, tiny_training.run)


@pytest.mark.parametrize("name", ["cute_nonesuch", "g2p_ben", "g2p_xyz", "blimp_local_adverbs"])
def test_a_task_that_the_files_do_not_have_is_answered_with_those_that_they_have(
    name: str, published: Path, blt_command: Blt, tiny_training: Any
) -> None:
    said = refused(name, published, blt_command, tiny_training.run)
    meant = {"cute": "cute_spell", "g2p": "g2p_ben_beng, g2p_ben_beng_dhaka, g2p_tur", "blimp": "blimp_local_nouns"}
    assert f"have no task {name}, only" in said and meant[name.partition("_")[0]] in said


@pytest.mark.parametrize(
    ("task", "file", "text", "said"),
    [
        ("lambada_local", "lambada_test.jsonl", "{", "lambada_test.jsonl, line 1 is no JSON object"),
        ("lambada_local", "lambada_test.jsonl", "\n", "lambada_local holds no questions"),
        ("hellaswag_local", "hellaswag_val.jsonl", '{"label": 1}', "line 1 has no activity_label, ctx_a"),
        ("blimp_local", "verbs.jsonl", '{"sentence_good": ""}', "line 1 has no sentence_bad"),
        ("arc_easy_local", "arc_easy_test.jsonl", '{"question": "x"}', "in no form that ARC is published in"),
        ("cute", "cute/prompts.json", '"spell"{', "prompts.json is no JSON"),
        ("cute", "cute/words/spell.tsv", "input1\tlabel\nthe", "spell.tsv has a row of other than 2 columns"),
        ("cute", "cute/words/swap_word.tsv", "input1\tmy_label\nI\tam\n", "swap_word.tsv has no column label"),
        ("g2p", "cmudict.dict", "word\n", "cmudict.dict has no phonemes for 'word'"),
        ("g2p_tur", "wikipron/tur_latn_broad.tsv", "word\t", "tur_latn_broad.tsv has no phonemes for 'word'"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    task: str, file: str, text: str, said: str, blt_command: Blt, tiny_training: Any, tmp_path: Path
) -> None:
    write_files(tmp_path, {**{name: FILES[name] for name in FILES if name.startswith("cute/")}, file: text})
    assert said in refused(task, tmp_path, blt_command, tiny_training.run)


@pytest.mark.parametrize("name", ["all.tar.xz", "all.zip", "all.tar", "prompts.json.xz", "prompts.json.gz"])
def test_a_damaged_archive_is_named(name: str, blt_command: Blt, tiny_training: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no archive at all" * 99)
    said = refused("cute", tmp_path, blt_command, tiny_training.run)
    assert f"{name} is damaged, or not what its name says" in said


def test_a_task_that_is_named_alone_and_in_its_group_is_refused(
    published: Path, blt_command: Blt, tiny_training: Any
) -> None:
    options = ["--task-data", published, "--quiet"]
    twice = blt_command("evaluate", tiny_training.run, "--tasks", "cute", "cute_spell", *options)
    assert twice.code == 1 and "Duplicate task 'cute_spell'" in twice.stderr
