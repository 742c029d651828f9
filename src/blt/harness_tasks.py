"""A benchmark's own files at a path -> lm-eval tasks: what is asked in what words, and what counts as right.

Nothing of a benchmark is kept here: questions, prompts and answers are read from where ``--task-data`` says. docs/design.md
has the prompt forms. Names differ from those of lm-eval's own tasks, which read the hub.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from blt.benchmark_files import find_files
from blt.noise import NOISES

Config = dict[str, Any]  # of one lm-eval task
Row = dict[str, Any]  # of a benchmark: one question
Rows = list[Row]
FEW_SHOT_WORDS = 16  # of a dictionary, held apart to show how it is done
SHOWN_WORDS = 8  # of them, unless --few-shot says otherwise
PLACES = ("prompt", "completion", "both")  # of noise


@dataclass(frozen=True)
class Members:
    """A group of tasks or of groups; it reports the plain mean of its tasks' metrics."""

    metrics: tuple[str, ...]
    tasks: "dict[str, Config | Members]"


Tree = dict[str, Config | Members]


@dataclass(frozen=True)
class BenchmarkFolder:
    """Where the files of a benchmark are looked for."""

    root: Path
    home: str  # where to get them

    def find(self, pattern: str, holding: bytes = b"") -> dict[str, bytes]:
        """As ``find_files``, but FileNotFoundError where there is none."""
        if found := find_files(self.root, pattern, holding):
            return found
        sought = f"{pattern} that holds {holding.decode()}" if holding else pattern
        raise FileNotFoundError(
            f"no file {sought} below {self.root} or in an archive there; get it from {self.home} and give its folder or "
            "archive with --task-data"
        )

    def first(self, pattern: str, holding: bytes = b"") -> tuple[str, bytes]:
        """The path and the content of the first of them."""
        return next(iter(self.find(pattern, holding).items()))


# multiple choice and last words


def read_hellaswag(folder: BenchmarkFolder) -> Tree:
    """The clean task, and each noise in each place."""
    path, data = folder.first("hellaswag_val*.jsonl")

    @cache
    def rows() -> Rows:
        return [
            {
                "query": _hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                "choices": [_hellaswag_text(ending) for ending in row["endings"]],
                "gold": int(row["label"]),
                "seed": number,
            }
            for number, row in enumerate(json_lines(path, data, "activity_label", "ctx_a", "ctx_b", "endings", "label"))
        ]

    def noised(noise: str, place: str) -> Config:
        garble, in_prompt, in_completion = NOISES[noise], place != "completion", place != "prompt"

        def text(row: Row) -> str:
            return garble(row["query"], row["seed"]) if in_prompt else row["query"]

        def choices(row: Row) -> list[str]:
            if not in_completion:
                return row["choices"]
            return [garble(choice, f"{row['seed']} {number}") for number, choice in enumerate(row["choices"])]

        return multiple_choice(rows, doc_to_text=text, doc_to_choice=choices)

    metrics = ("acc", "acc_norm")
    by_noise: dict[str, Config | Members] = {
        f"hellaswag_noised_{noise}": Members(
            metrics, {f"hellaswag_noised_{noise}_{place}": noised(noise, place) for place in PLACES}
        )
        for noise in NOISES
    }
    return {"hellaswag_local": multiple_choice(rows), "hellaswag_noised": Members(metrics, by_noise)}


def _hellaswag_text(text: str) -> str:
    """The text without the marks that its how-to half is left with, as lm-eval reads it.

    >>> _hellaswag_text("Baking: [header] Baking bread [title] Knead it. [step] For long")
    'Baking: Baking bread. Knead it. For long'
    """
    sentences = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", sentences).replace("  ", " ")


def read_arc(folder: BenchmarkFolder, difficulty: str) -> Tree:
    """The test questions; those of the validation file, where there is one, are the few shots."""
    path, data = folder.first(f"arc[-_]{difficulty}[-_]test.jsonl")
    validation = find_files(folder.root, f"arc[-_]{difficulty}[-_][dv]*.jsonl")

    def rows() -> Rows:
        return [_arc_row(row, path) for row in json_lines(path, data)]

    def shots() -> Rows:
        return [_arc_row(row, path) for path, data in validation.items() for row in json_lines(path, data)]

    return {f"arc_{difficulty}_local": multiple_choice(rows, shots if validation else None)}


def _arc_row(row: Row, path: str) -> Row:
    """A question in any of the three forms that it is published in.

    >>> _arc_row({"question": {"stem": "Wet?", "choices": [{"text": "rain", "label": "A"}]}, "answerKey": "A"}, "")
    {'query': 'Question: Wet?\\nAnswer:', 'choices': ['rain'], 'gold': 0}
    """
    try:
        if "gold" in row:
            return {key: row[key] for key in ("query", "choices", "gold")}
        question: Any = row["question"]
        choices: Any = row.get("choices")
        if isinstance(question, dict):
            listed, question = question["choices"], question["stem"]
            choices = {key: [choice[key] for choice in listed] for key in ("text", "label")}
        gold = choices["label"].index(row["answerKey"])
        return {"query": f"Question: {question}\nAnswer:", "choices": choices["text"], "gold": gold}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} has a question in no form that ARC is published in: {json.dumps(row)[:200]}"
        ) from None


def read_blimp(folder: BenchmarkFolder) -> Tree:
    """A task for each file: of two sentences that differ in one thing, the grammatical one is to be more probable."""

    def pairs(path: str, data: bytes) -> Rows:
        kinds = ("sentence_good", "sentence_bad")
        both = ([row[kind] for kind in kinds] for row in json_lines(path, data, *kinds))
        return [{"query": "", "choices": pair, "gold": 0} for pair in both]

    tasks: dict[str, Config | Members] = {
        f"blimp_local_{Path(path).name.partition('.')[0]}": multiple_choice(
            partial(pairs, path, data), metrics=("acc",), target_delimiter="", num_fewshot=0
        )
        for path, data in folder.find("*.jsonl", holding=b'"sentence_good"').items()
    }
    return {"blimp_local": Members(("acc",), tasks)}


def read_lambada(folder: BenchmarkFolder) -> Tree:
    """The last word of each passage."""
    path, data = folder.first("lambada*test*.jsonl")

    def rows() -> Rows:
        split = (row["text"].rpartition(" ") for row in json_lines(path, data, "text"))
        return [{"before": before, "last": f" {word}"} for before, _, word in split]

    figures = [metric("perplexity", "perplexity", higher_is_better=False), metric("acc")]
    asked = {"doc_to_text": "before", "doc_to_target": "last", "target_delimiter": "", "metric_list": figures}
    return {"lambada_local": {"custom_dataset": dataset(rows), "output_type": "loglikelihood", **asked}}


# written answers


def read_cute(folder: BenchmarkFolder) -> Tree:
    """Each of CUTE's tasks in the words of its own prompts, and those on random strings in a group of their own."""
    path, data = folder.first("prompts.json", holding=b'"spell"')
    try:
        prompts = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; get CUTE again") from None
    words, random = dict[str, Config | Members](), dict[str, Config | Members]()
    for table, content in folder.find("*.tsv", holding=b"label").items():
        name = Path(table).name.partition(".")[0]
        if (prompt := prompts.get(name.removesuffix("_rand"))) is not None:
            (random if name.endswith("_rand") else words)[f"cute_{name}"] = _cute_task(prompt, table, content)
    groups: Tree = {"cute": Members(("exact_match",), words)}
    return groups | ({"cute_rand": Members(("exact_match",), random)} if random else {})


def _cute_task(prompt: str, path: str, table: bytes) -> Config:
    """The prompt ends where its own examples have an answer in quotes: the text up to the closing quote is the answer."""
    header, *lines = (line.split("\t") for line in table.decode().replace("\r\n", "\n").strip("\n").split("\n"))
    if "label" not in header:
        raise ValueError(f"{path} has no column label; get CUTE again")
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"{path} has a row of other than {len(header)} columns; get CUTE again")
    rows = [
        {"query": prompt.format(*line[: header.index("label")]) + ' Answer: "', "label": line[header.index("label")]}
        for line in lines
    ]

    def right(row: Row, written: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(written[0].strip() == row["label"].strip())}

    longest = max((len(row["label"].encode()) for row in rows), default=0)
    return written_answer(lambda: rows, right, ['"', "\n"], longest + 1, num_fewshot=0)


def read_cmudict(folder: BenchmarkFolder) -> Tree:
    """English words and their phonemes with stress, as the CMU dictionary has them."""
    path, data = folder.first("cmudict.dict")
    entries = (line.partition(" #")[0].split() for line in data.decode().split("\n") if line)
    return {"g2p": _pronunciation_task(path, ((word.partition("(")[0], phonemes) for word, *phonemes in entries))}


def read_wikipron(folder: BenchmarkFolder) -> Tree:
    """The broad transcriptions of each file; a language that has one file goes by its code alone."""
    found = folder.find("[a-z][a-z][a-z]_*_broad.tsv")
    files = {Path(path).name.partition("_broad")[0]: (path, data) for path, data in found.items()}
    languages = Counter(name[:3] for name in files)

    def entries(data: bytes) -> Iterator[tuple[str, list[str]]]:
        for line in data.decode().strip("\n").split("\n"):
            word, _, phonemes = line.partition("\t")
            yield word, phonemes.split()

    return {
        f"g2p_{name[:3] if languages[name[:3]] == 1 else name}": _pronunciation_task(path, entries(data))
        for name, (path, data) in files.items()
    }


def _pronunciation_task(path: str, entries: Iterable[tuple[str, list[str]]]) -> Config:
    """Write a word's phonemes, after some words with theirs; where a word has several pronunciations, the nearest counts.

    The words come in an order that is drawn once and for all, as those in a row of a dictionary are all alike.
    """
    spoken: dict[str, list[str]] = defaultdict(list)
    for word, phonemes in entries:
        if not phonemes:
            raise ValueError(f"{path} has no phonemes for {word!r}; get the dictionary again")
        spoken[word].append(" ".join(phonemes))
    rows = [{"word": word, "pronunciations": spoken[word]} for word in sorted(spoken)]
    Random(0).shuffle(rows)

    def right(row: Row, written: Sequence[str]) -> dict[str, Any]:
        answer = written[0].split()
        of_each = [(edit_distance(answer, one.split()), len(one.split())) for one in row["pronunciations"]]
        nearest = min(of_each, key=lambda found: found[0] / found[1])
        return {"exact_match": float(nearest[0] == 0), "phoneme_error_rate": nearest}

    longest = max(len(one.encode()) for row in rows for one in row["pronunciations"])
    return written_answer(
        lambda: rows[FEW_SHOT_WORDS:],
        right,
        ["\n"],
        longest + 1,
        shots=lambda: rows[:FEW_SHOT_WORDS],
        doc_to_text=lambda row: f"{row['word']}:",
        doc_to_target=lambda row: row["pronunciations"][0],
        fewshot_delimiter="\n",
        fewshot_config={"sampler": "first_n"},
        num_fewshot=SHOWN_WORDS,
        metric_list=[
            metric("exact_match"),
            metric("phoneme_error_rate", lambda found: sum(e for e, _ in found) / sum(n for _, n in found), False),
        ],
    )


# what all are made of


def multiple_choice(
    rows: Callable[[], Rows],
    shots: Callable[[], Rows] | None = None,
    metrics: Sequence[str] = ("acc", "acc_norm"),
    **changes: Any,
) -> Config:
    """Of a row's ``choices`` the one with the number ``gold`` is right after its ``query``."""
    return {
        "custom_dataset": dataset(rows, shots),
        "output_type": "multiple_choice",
        "fewshot_split": "shots" if shots else "test",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [metric(name) for name in metrics],
        **changes,
    }


def written_answer(
    rows: Callable[[], Rows],
    right: Callable[[Row, Sequence[str]], dict[str, Any]],
    stop: Sequence[str],
    max_new_bytes: int,
    shots: Callable[[], Rows] | None = None,
    **changes: Any,
) -> Config:
    """What the model writes after a row's ``query``, greedily and up to one of ``stop``, is judged by ``right``."""
    return {
        "custom_dataset": dataset(rows, shots),
        "output_type": "generate_until",
        "generation_kwargs": {"until": [*stop], "max_gen_toks": max_new_bytes, "do_sample": False},
        "fewshot_split": "shots" if shots else "test",
        "doc_to_text": "query",
        "doc_to_target": "label",
        "process_results": right,
        "metric_list": [metric("exact_match")],
        **changes,
    }


def metric(name: str, aggregation: str | Callable[[Any], float] = "mean", higher_is_better: bool = True) -> Config:
    """A metric as lm-eval wants it."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def dataset(rows: Callable[[], Rows], shots: Callable[[], Rows] | None = None) -> Callable[..., dict[str, Any]]:
    """Makes what lm-eval reads questions from, once it asks."""

    def read(name: str, version: int) -> dict[str, Any]:  # a task's metadata
        from datasets import Dataset

        if not (questions := rows()):
            raise ValueError(f"the file of task {name} holds no questions; get the benchmark again")
        return {"test": Dataset.from_list(questions)} | ({"shots": Dataset.from_list(shots())} if shots else {})

    return read


def json_lines(path: str, data: bytes, *needed: str) -> Iterator[Row]:
    """The objects of a .jsonl file; ValueError for a line that is none, or that lacks what is needed.

    >>> list(json_lines("x.jsonl", b'{"text": "a"}\\n', "text"))
    [{'text': 'a'}]
    """
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                missing = [key for key in needed if key not in row]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number} is no JSON object: {error}; get the benchmark again") from None
            if missing:
                raise ValueError(f"{path}, line {number} has no {', '.join(missing)}; is it the benchmark's own file?")
            yield row


def edit_distance(written: Sequence[str], right: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other.

    >>> edit_distance("K AE T S".split(), "K AH T".split())
    2
    """
    row = list(range(len(right) + 1))
    for number, one in enumerate(written, 1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(right, 1):
            diagonal, row[column] = row[column], min(diagonal + (one != other), row[column] + 1, row[column - 1] + 1)
    return row[-1]


# by name


@dataclass(frozen=True)
class Benchmark:
    """One that can be read from a path."""

    names: str  # of its groups and tasks, as a regular expression
    home: str
    read: Callable[[BenchmarkFolder], Tree]


_ARC = "https://huggingface.co/datasets/allenai/ai2_arc"
_BENCHMARKS = (
    Benchmark(r"cute(_\w+)?", "https://github.com/Leukas/CUTE", read_cute),
    Benchmark(r"hellaswag_(local|noised(_\w+)?)", "https://github.com/rowanz/hellaswag", read_hellaswag),
    Benchmark(r"g2p", "https://github.com/cmusphinx/cmudict", read_cmudict),
    Benchmark(r"g2p_\w+", "https://github.com/CUNY-CL/wikipron", read_wikipron),
    Benchmark(r"blimp_local(_\w+)?", "https://github.com/alexwarstadt/blimp", read_blimp),
    Benchmark(r"lambada_local", "https://huggingface.co/datasets/EleutherAI/lambada_openai", read_lambada),
    Benchmark(r"arc_easy_local", _ARC, partial(read_arc, difficulty="easy")),
    Benchmark(r"arc_challenge_local", _ARC, partial(read_arc, difficulty="challenge")),
)
INCLUDED = (
    *("cute", "cute_rand", "hellaswag_local", "hellaswag_noised", "g2p", "g2p_tur", "blimp_local", "lambada_local"),
    *("arc_easy_local", "arc_challenge_local"),
)  # for people; tasks within groups have names too


def is_included(name: str) -> bool:
    """Is this the name of one of our tasks, as far as can be told without its files?

    >>> is_included("cute_spell"), is_included("g2p_isl"), is_included("hellaswag")
    (True, True, False)
    """
    return any(re.fullmatch(benchmark.names, name) for benchmark in _BENCHMARKS)


def read_task(name: str, root: Path | None) -> Config | Members:
    """One of our tasks or groups, out of the benchmark's files below ``root``.

    Raises ValueError or FileNotFoundError that says what is missing and where to get it.
    """
    benchmark = next(one for one in _BENCHMARKS if re.fullmatch(one.names, name))
    if root is None:
        raise ValueError(
            f"{name} reads the benchmark's own files: get them from {benchmark.home} and give their folder or archive with "
            "--task-data PATH"
        )
    tree = benchmark.read(BenchmarkFolder(root, benchmark.home))
    named = dict(_all_of(tree))
    if name not in named:
        raise ValueError(f"the files below {root} have no task {name}, only {', '.join(sorted(named))}")
    return named[name]


def _all_of(tree: Mapping[str, Config | Members]) -> Iterator[tuple[str, Config | Members]]:
    for name, found in tree.items():
        yield name, found
        if isinstance(found, Members):
            yield from _all_of(found.tasks)
