"""Does a Byte Latent Transformer lose less than a token model when text is noised?

The models of as_good_as_tokens.py, which saw no noise, read text under the paper's five noises and with misspellings that
people made (codespell's list): bits per byte of the clean text, grammatical judgements (BLiMP) and the last word of a passage
(LAMBADA).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from as_good_as_tokens import plans
from claim import about, do, models_before, options, subplots, test_texts, write
from contenders import documents_of, load, scores

from blt.benchmark_files import find_files
from blt.documents import read_documents
from blt.noise import NOISES, Noise

MISSPELLED = 0.25  # of the words that a misspelling is known for
COMPARED = ("BLT, entropy", "BLT, space", "BLT, all n-grams", "bytes", "BPE")
PAIRS = {"smoke": 2, "minutes": 30, "hour": 30, "longer": 100}  # of each of BLiMP's 67 paradigms
PASSAGES = {"smoke": 50, "minutes": 1000, "hour": 1000, "longer": 5153}
TEXT_BYTES = {"smoke": 4_000, "minutes": 60_000, "hour": 60_000, "longer": 300_000}  # of each test text


def misspellings(dictionary: str) -> dict[str, list[str]]:
    """What people write for a word, from codespell's lines ``wrong->right`` (of several rights the first is meant).

    >>> misspellings("teh->the\\nthw->the, thaw\\n")
    {'the': ['teh', 'thw']}
    """
    found: dict[str, list[str]] = {}
    for line in dictionary.splitlines():
        wrong, _, rights = line.partition("->")
        found.setdefault(rights.split(",")[0].strip(), []).append(wrong)
    return found


def with_typos(known: Mapping[str, Sequence[str]]) -> Noise:
    """A noise that writes a quarter of the words that a misspelling is known for as somebody has."""

    def noised(text: str, seed: int | str = 0) -> str:
        chance = Random(seed)

        def perhaps_wrong(match: re.Match[str]) -> str:
            word = match[0]
            choices = known.get(word.lower())
            if not choices or chance.random() >= MISSPELLED:
                return word
            wrong = chance.choice(choices)
            return wrong.capitalize() if word[0].isupper() else wrong

        return re.sub(r"[A-Za-z']+", perhaps_wrong, text)

    return noised


def all_noises() -> dict[str, Noise]:
    """Clean, the five of the paper, and typos."""
    try:
        import codespell_lib
    except ImportError:
        raise ValueError(
            "codespell is not installed, whose list of misspellings this needs: pip install codespell"
        ) from None
    dictionary = (Path(codespell_lib.__file__).parent / "data" / "dictionary.txt").read_text("utf-8")
    return {"clean": lambda text, seed=0: text, **NOISES, "typos": with_typos(misspellings(dictionary))}


def bits_per_clean_byte(model: Any, texts: Sequence[str], noise: Noise) -> float:
    """Bits of the noised texts over the bytes of the clean ones."""
    noised = [noise(text, seed).encode() for seed, text in enumerate(texts)]
    return sum(score.bits for score in scores(model, noised)) / sum(len(text.encode()) for text in texts)


def judged_right(model: Any, pairs: Sequence[tuple[str, str]], noise: Noise) -> float:
    """How often a good sentence is more probable than its bad twin, both under the same noise."""
    sentences = [noise(sentence, seed).encode() for seed, pair in enumerate(pairs) for sentence in pair]
    bits = [score.bits for score in scores(model, sentences)]
    return sum(good < bad for good, bad in zip(bits[::2], bits[1::2], strict=True)) / len(pairs)


def last_word_bits(model: Any, passages: Sequence[str], noise: Noise) -> float:
    """Bits of a passage's last word, clean, after the noised rest of it: the mean."""
    split = [passage.rpartition(" ") for passage in passages]
    contexts = [noise(before, seed).encode() for seed, (before, _, _) in enumerate(split)]
    words = [f" {word}".encode() for _, _, word in split]
    return sum(score.bits for score in scores(model, words, contexts)) / len(passages)


def measure(
    folder: Path, texts: Sequence[str], pairs: Sequence[tuple[str, str]], passages: Sequence[str]
) -> dict[str, Any]:
    """All figures of one model; kept in its folder."""
    file = folder / f"under_noise.{len(texts)}.{len(pairs)}.{len(passages)}.json"
    if not file.exists():
        model = load(folder)
        figures = {
            name: {
                "bits_per_clean_byte": bits_per_clean_byte(model, texts, noise),
                "blimp": judged_right(model, pairs, noise),
                "last_word_bits": last_word_bits(model, passages, noise),
            }
            for name, noise in all_noises().items()
        }
        file.write_text(json.dumps(figures, indent=2) + "\n")
    return json.loads(file.read_text())


def blimp_pairs(folder: Path, of_each: int) -> list[tuple[str, str]]:
    files = find_files(folder / "eval" / "blimp.tar.xz", "*.jsonl", b"sentence_good")
    rows = [json.loads(line) for data in files.values() for line in data.splitlines()[:of_each]]
    return [(row["sentence_good"], row["sentence_bad"]) for row in rows]


def table(models: Sequence[Mapping[str, Any]], figure: str) -> dict[str, dict[str, float]]:
    """By contender and noise, the mean of the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for model in models:
        for noise, figures in model["noises"].items():
            found.setdefault(model["name"], {}).setdefault(noise, []).append(figures[figure])
    return {name: {noise: sum(of) / len(of) for noise, of in noises.items()} for name, noises in found.items()}


def draw(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How many more bits each noise costs."""
    bits = table(models, "bits_per_clean_byte")
    noises = [noise for noise in next(iter(bits.values())) if noise != "clean"]
    figure, axes = subplots(figsize=(9, 4))
    width = 0.8 / len(bits)
    for place, name in enumerate(bits):
        at = [index + (place - (len(bits) - 1) / 2) * width for index in range(len(noises))]
        axes.bar(at, [bits[name][noise] - bits[name]["clean"] for noise in noises], width, label=name)
    axes.set_ylabel("more bits per clean byte than clean")
    axes.set_xticks(range(len(noises)), noises)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "under_noise")
    chosen = parser.parse_args()
    of_english = [
        plan for plan in plans(chosen.budget, chosen.seeds) if plan.mix == "english" and plan.name in COMPARED
    ]
    try:
        all_noises()
        do(of_english, chosen, lambda runs: None)
        texts = [
            text for path in test_texts(chosen, "english").values() for text in excerpt(path, TEXT_BYTES[chosen.budget])
        ]
        pairs = blimp_pairs(chosen.data, PAIRS[chosen.budget])
        passages = [data.data.decode() for data in read_documents([chosen.data / "eval" / "lambada_test.jsonl.xz"])]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    known = models_before(chosen)
    for plan in of_english:
        if (plan.folder(chosen.work) / "result.json").exists():
            noises = measure(plan.folder(chosen.work), texts, pairs, passages[: PASSAGES[chosen.budget]])
            known[plan.name, plan.seed] = {**about(plan, chosen.work), "noises": noises}
            print(
                f"{plan.name}, seed {plan.seed}: "
                + ", ".join(f"{k} {v['bits_per_clean_byte']:.3f}" for k, v in noises.items()),
                flush=True,
            )
    models = [known[plan.name, plan.seed] for plan in of_english if (plan.name, plan.seed) in known]
    write(chosen.out, {"budget": chosen.budget, "dtype": chosen.dtype, "models": models})
    draw(models, chosen.out.with_suffix(".png"))


def excerpt(path: Path, num_bytes: int) -> list[str]:
    """The beginnings of a text's documents, so many bytes of them in all."""
    documents = documents_of(path)
    return [data[: num_bytes // len(documents)].decode("utf-8", "ignore") for data in documents]


if __name__ == "__main__":
    main()
