"""Can a Byte Latent Transformer spell, and edit words by their letters, where a token model cannot?

Both learn from questions in the words of CUTE's prompts (arXiv 2409.15452), made from a list of English words without those
that CUTE asks about, and answer CUTE's own. Rates and shapes are chosen (``--tune``) by other words that are held out:
CUTE's files choose nothing.
"""

import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from claim import BUDGETS, options, results_before, subplots, train_text, write
from contenders import CONTENDERS, PAPER_BLT, REFERENCE_FLOPS, load, run
from token_transformer import TokenModel

from blt.benchmark_files import find_files
from blt.byte_ids import BOE, encode
from blt.documents import read_documents
from blt.language_model import LanguageModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FLOPS = 4 * REFERENCE_FLOPS  # copying a letter takes two layers of attention at least
LOCAL = {"num_layers": 2, "width": 64, "num_heads": 2, "ffn_width": 176, "window_positions": 128}
BLT = PAPER_BLT.but(
    model__local_encoder={**LOCAL, "num_layers": 1},
    model__local_decoder=LOCAL,
    model__latent__width=192,
    model__latent__num_heads=3,
    model__latent__ffn_width=528,
    training__learning_rate=5e-3,
)
BPE = CONTENDERS["BPE"].but(width=192, vocabulary=4096, training__learning_rate=5e-3)
TRIALS = {
    "BLT": BLT,
    "BLT, rate 3e-3": BLT.but(training__learning_rate=3e-3),
    "BLT, rate 8e-3": BLT.but(training__learning_rate=8e-3),
    "BLT, rate 12e-3": BLT.but(training__learning_rate=12e-3),
    "BLT, rate 8e-3, no n-grams": BLT.but(training__learning_rate=8e-3, model__hash_embeddings__table_rows=1),
    "BLT, decoder of 3": BLT.but(model__local_decoder={**LOCAL, "num_layers": 3}),
    "BPE": BPE,
    "BPE, rate 3e-3": BPE.but(training__learning_rate=3e-3),
    "BPE, rate 8e-3": BPE.but(training__learning_rate=8e-3),
    "BPE, vocabulary 2048": BPE.but(vocabulary=2048),
    "BPE, vocabulary 1024": BPE.but(vocabulary=1024),
    "BPE, vocabulary 512": BPE.but(vocabulary=512),
}
COMPARED = {  # as the trials found them, and the tokens that are best in text
    "BLT, entropy": TRIALS["BLT, rate 8e-3"],
    "BLT, no n-grams": TRIALS["BLT, rate 8e-3, no n-grams"],
    "BPE of 512": TRIALS["BPE, vocabulary 512"],
    "BPE": BPE,
}
TUNED_BYTES = 4_000_000
ROWS = {"training__row_bytes": 1024, "training__rows_per_step": 4}
QUESTIONS_A_DOCUMENT = 24
MADE_UP = 0.5  # of the words in questions are strings of random letters,
FEW_LETTERS = 1 / 3  # and of these so many have 2 to 6 different ones: where letters repeat, to copy takes counting
OWN_WORDS = 2_000  # of the list, held out beside CUTE's
ROWS_AT_ONCE = 16
Question = tuple[tuple[str, ...], str]  # what the prompt asks about, and the answer


def spelled(word: str, chance: random.Random) -> Question:
    """
    >>> spelled("the", random.Random(0))
    (('the',), 't h e')
    """
    return (word,), " ".join(word)


def unspelled(word: str, chance: random.Random) -> Question:
    return (" ".join(word),), word


def contains(word: str, chance: random.Random) -> Question:
    letter = chance.choice(word if chance.random() < 0.5 else sorted(set(LETTERS) - set(word)))
    return (letter, word), "Yes" if letter in word else "No"


def inserted(word: str, chance: random.Random) -> Question:
    new, after = chance.choice(LETTERS), chance.choice(word)
    return (new, after, word), word.replace(after, after + new)


def deleted(word: str, chance: random.Random) -> Question:
    letter = chance.choice(word)
    return (letter, word), word.replace(letter, "")


def substituted(word: str, chance: random.Random) -> Question:
    old, new = chance.choice(word), chance.choice(LETTERS)
    return (old, new, word), word.replace(old, new)


def swapped(word: str, chance: random.Random) -> Question:
    """Two letters that the word has once each change places; for a word that ``can_be_swapped``.

    >>> swapped("no", random.Random(0))
    (('o', 'n', 'no'), 'on')
    """
    once = [letter for letter in word if word.count(letter) == 1]
    first, second = chance.sample(once, 2)
    return (first, second, word), word.translate(str.maketrans({first: second, second: first}))


TASKS: dict[str, Callable[[str, random.Random], Question]] = {
    "spell": spelled,
    "spell_inverse": unspelled,
    "contains_char": contains,
    "ins_char": inserted,
    "del_char": deleted,
    "sub_char": substituted,
    "swap_char": swapped,
}


def can_be_swapped(word: str) -> bool:
    return sum(word.count(letter) == 1 for letter in word) >= 2


def word_list(text: Path, held_out: set[str]) -> list[str]:
    """Words of 2 to 14 small letters that a text has twice or more, without those held out, in an order of no meaning."""
    counts: Counter[str] = Counter()
    for document in read_documents([text]):
        counts.update(re.findall(r"\b[a-z]{2,14}\b", document.data.decode("utf-8", "replace")))
    words = sorted(word for word, number in counts.items() if number > 1 and word not in held_out)
    random.Random(0).shuffle(words)
    return words


def made_up(chance: random.Random, held_out: set[str], fits: Callable[[str], bool]) -> str:
    """Letters without an order, so that their answers cannot be had from knowing words; none of those held out."""
    while True:
        few = chance.random() < FEW_LETTERS
        letters = chance.sample(LETTERS, chance.randint(2, 6)) if few else LETTERS
        word = "".join(chance.choices(letters, k=chance.randint(2, 14)))
        if fits(word) and word not in held_out:
            return word


def documents(
    prompts: Mapping[str, str], words: Sequence[str], held_out: set[str], num_bytes: int, seed: int
) -> Iterator[str]:
    """Texts of one task each, twice as many of the two that are claimed: its prompt with the four examples, then questions with
    their answers.
    """
    chance = random.Random(seed)
    while num_bytes > 0:
        name = chance.choice([*TASKS, "spell", "spell_inverse"])
        introduction, _, question = prompts[name].rpartition("Question:")
        fits = can_be_swapped if name == "swap_char" else bool
        asked = []
        for _ in range(QUESTIONS_A_DOCUMENT):
            word = made_up(chance, held_out, fits) if chance.random() < MADE_UP else chance.choice(words)
            if fits(word):
                arguments, answer = TASKS[name](word, chance)
                asked.append(f'Question:{question.format(*arguments)} Answer: "{answer}"\n')
        text = introduction + "".join(asked)
        num_bytes -= len(text)
        yield text


def questions_about(words: Sequence[str], seed: int = 0) -> dict[str, list[Question]]:
    """One of each task about each word that has one."""
    chance = random.Random(seed)
    return {
        name: [make(word, chance) for word in words if name != "swap_char" or can_be_swapped(word)]
        for name, make in TASKS.items()
    }


def cute(data: Path) -> tuple[dict[str, str], dict[str, list[Question]]]:
    """CUTE's prompts, and the questions of all its files by their name."""
    archive = data / "eval" / "cute.tar.xz"
    (prompts,) = (json.loads(content) for content in find_files(archive, "prompts.json").values())
    questions = {}
    for path, table in find_files(archive, "*.tsv").items():
        lines = [line.split("\t") for line in table.decode().strip("\n").split("\n")[1:]]
        questions[Path(path).stem] = [(tuple(arguments), answer) for *arguments, answer in lines]
    return prompts, questions


@torch.no_grad()
def answered_right(model: LanguageModel | TokenModel, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether a model's greedy answer is the right one: each of its ids, the closing quote included, is the likeliest.

    A token model may write the right answer in other tokens than the tokenizer's; where the likeliest differ, it writes.
    """
    found = []
    for begin in range(0, len(prompts), ROWS_AT_ONCE):
        pairs = list(zip(prompts[begin : begin + ROWS_AT_ONCE], answers[begin : begin + ROWS_AT_ONCE], strict=True))
        before = [ids_of(model, prompt) for prompt, _ in pairs]
        rows = [ids_of(model, f'{prompt}{answer}"') for prompt, answer in pairs]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [BOE] * (longest - len(row)) for row in rows])
        logits = model.network(ids) if isinstance(model, TokenModel) else model.predict(ids)[0]
        for (prompt, answer), first, row, best in zip(pairs, before, rows, logits.argmax(-1), strict=True):
            right = row[: len(first)] == first and best[len(first) - 1 : len(row) - 1].tolist() == row[len(first) :]
            if not right and isinstance(model, TokenModel):
                right = model.greedy(prompt.encode(), len(answer) + 2, stop=b'"') == answer.encode()
            found.append(right)
    return found


def ids_of(model: LanguageModel | TokenModel, text: str) -> list[int]:
    return model.ids(text.encode()) if isinstance(model, TokenModel) else encode(text)


def measure(folder: Path, prompts: Mapping[str, str], questions: Mapping[str, list[Question]]) -> dict[str, float]:
    """The share of right answers to the questions of each name; kept in the folder."""
    file = folder / f"right.{zlib.crc32(json.dumps(questions).encode()):08x}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    model = load(folder)
    for name, listed in questions.items():
        if name in found:
            continue
        prompt = prompts[name.removesuffix("_rand")]
        asked = [prompt.format(*arguments) + ' Answer: "' for arguments, _ in listed]
        right = answered_right(model, asked, [answer for _, answer in listed])
        found[name] = sum(right) / len(right)
        print(f"{folder.name} {name}: {found[name]:.1%}", flush=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def held_out_bits(folder: Path) -> float:
    """Bits per byte of the 1% of the text that training left out: questions about words it knows, and made-up ones."""
    (metrics,) = folder.glob("**/metrics.jsonl")
    reports = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [report["valid_bits_per_byte"] for report in reports if "valid_bits_per_byte" in report][-1]


def written(texts: Iterator[str], folder: Path) -> Path:
    """A file of these texts, named by what is in it."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = folder / f"spelling.{zlib.crc32(rows.encode()):08x}.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(rows)
        partial.replace(file)
    return file


def draw(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar for each of CUTE's tasks and each model, the mean of its seeds."""
    figure, axes = subplots(figsize=(12, 4))
    names = list(models[0]["cute"])
    contenders = list(dict.fromkeys(model["name"] for model in models))
    for place, contender in enumerate(contenders):
        seeds = [model["cute"] for model in models if model["name"] == contender]
        at = [index + (place - (len(contenders) - 1) / 2) * 0.8 / len(contenders) for index in range(len(names))]
        heights = [100 * sum(cute[name] for cute in seeds) / len(seeds) for name in names]
        axes.bar(at, heights, 0.8 / len(contenders), label=contender)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.margins(x=0.01)
    axes.set_ylabel("right answers, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(contenders), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "spelling")
    parser.add_argument("--tune", action="store_true", help=f"the trials, of {TUNED_BYTES / 1e6:g} MB, without CUTE")
    chosen = parser.parse_args()
    num_bytes = TUNED_BYTES if chosen.tune else BUDGETS[chosen.budget]
    most = 200 if chosen.tune else 20 if chosen.budget == "smoke" else 1000
    if chosen.tune and chosen.out.name == "spelling.json":
        chosen.out = chosen.out.with_name("spelling_tuning.json")
    try:
        prompts, questions = cute(chosen.data)
        asked = (text for listed in questions.values() for arguments, _ in listed for text in arguments)
        of_cute = {text.replace(" ", "") for text in asked}  # also the words that are asked for letter by letter
        listed = word_list(train_text(chosen, "english", 10_000_000), of_cute)
    except FileNotFoundError as error:
        parser.error(str(error))
    own, words = listed[:OWN_WORDS], listed[OWN_WORDS:]
    text = written(documents(prompts, words, of_cute | set(own), num_bytes, seed=0), chosen.work / "texts")
    told, trained = results_before(chosen.out), TRIALS if chosen.tune else COMPARED
    models = {}
    for model in told.get("models", []) if told.get("text") == text.stem else []:
        if model["name"] in trained and chosen.dtype in ("auto", model["training"]["dtype"]):
            models[model["name"], model["seed"]] = model
    for seed in range(chosen.seeds):
        for name, contender in trained.items():
            folder = chosen.work / "runs" / text.stem / f"{name.replace(', ', '.').replace(' ', '_')}.{seed}"
            skipped = chosen.only and not any(word in name for word in chosen.only)
            if skipped and not (folder / "result.json").exists():
                continue
            figures = run(contender.but(**ROWS), text, {}, folder, FLOPS, seed, chosen.dtype)
            figures["held_out_bits_per_byte"] = held_out_bits(folder)
            right = {"own_words": measure(folder, prompts, questions_about(own[:most]))}
            if not chosen.tune:
                right["cute"] = measure(folder, prompts, {name: listed[:most] for name, listed in questions.items()})
            models[name, seed] = {"name": name, **right, **figures}
            found = {"budget": chosen.budget, "text": text.stem, "words": len(words), "questions": most}
            in_order = sorted(models.values(), key=lambda model: (model["seed"], list(trained).index(model["name"])))
            write(chosen.out, {**found, "models": in_order})
            if not chosen.tune:
                draw(in_order, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
