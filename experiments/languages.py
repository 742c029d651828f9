"""Does a Byte Latent Transformer keep up in languages that are rare or absent in what it learned from?

The models of as_good_as_tokens.py that learned the multilingual mix score the same news text in 36 languages and one Sanskrit
text in 20 scripts: bits for the whole text, so that scripts of one, two or three bytes a character compare.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from as_good_as_tokens import plans
from claim import about, do, models_before, options, subplots, write
from contenders import load, scores
from texts import paths_of

from blt.documents import open_stream

COMPARED = ("BLT, entropy", "BLT, space", "BLT, all n-grams", "bytes", "BPE")
LINES = {"smoke": 3, "minutes": 100, "hour": 100, "longer": 500}  # of each language, the same ones
RARE_BYTES = 350_000  # a language with less text than this in the whole mix is rare there
# the codes of the news text in the codes of the training text; those that are missing are absent from it
CODES = {
    "arb": "ar", "ben": "bn", "deu": "de", "ell": "el", "eng": "en", "est": "et", "fas": "fa", "fin": "fi", "fra": "fr",
    "hin": "hi", "hun": "hu", "ind": "id", "jpn": "ja", "kat": "ka", "kaz": "kk", "khm": "khm", "kor": "ko", "mal": "ml",
    "pol": "pl", "rus": "ru", "spa": "es", "tam": "ta", "tel": "te", "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi",
    "zho-CN": "zh-CN",
}  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with open_stream(path, path.suffix) as stream:
        return [json.loads(line) for line in stream]


def first_lines(path: Path, key: str, number: int) -> dict[str, bytes]:
    """The first lines of each text, by its language or script."""
    return {row[key]: "\n".join(row["text"].split("\n")[:number]).encode() for row in rows(path)}


def bytes_by_language(paths: Sequence[Path]) -> dict[str, int]:
    """How much of each language there is to learn from."""
    found: dict[str, int] = {}
    for path in paths:
        for row in rows(path):
            found[row["lang"]] = found.get(row["lang"], 0) + len(row["text"].encode())
    return found


def presence(language: str, learned: Mapping[str, int]) -> str:
    """Present, rare or absent in what was learned from.

    >>> presence("yor", {"ka": 1}), presence("kat", {"ka": 1}), presence("kat", {"ka": 10**6})
    ('absent', 'rare', 'present')
    """
    num_bytes = learned.get(CODES.get(language, ""), 0)
    return "present" if num_bytes >= RARE_BYTES else "rare" if num_bytes else "absent"


def measure(folder: Path, texts: Mapping[str, bytes]) -> dict[str, float]:
    """Bits of each text by one model; kept in its folder."""
    file = folder / f"languages.{sum(map(len, texts.values()))}.json"
    if not file.exists():
        found = scores(load(folder), list(texts.values()))
        bits = {name: score.bits for name, score in zip(texts, found, strict=True)}
        file.write_text(json.dumps(bits, indent=2) + "\n")
    return json.loads(file.read_text())


def mean_bits(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By contender and text, the mean of the seeds."""
    names = dict.fromkeys(model["name"] for model in models)
    of = {name: [model["bits"] for model in models if model["name"] == name] for name in names}
    return {name: {text: sum(run[text] for run in runs) / len(runs) for text in runs[0]} for name, runs in of.items()}


def draw(bits: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str], path: Path) -> None:
    """What BLT needs of the bits that BPE needs, by language and script."""
    colours = {"present": "tab:blue", "rare": "tab:green", "absent": "tab:red", "script": "tab:purple"}
    ratios = {text: bits["BLT, entropy"][text] / bits["BPE"][text] for text in bits["BPE"]}
    texts = sorted(ratios, key=lambda text: (list(colours).index(kinds[text]), ratios[text]))
    figure, axes = subplots(figsize=(13, 4))
    axes.set_yscale("log", base=2)
    axes.scatter(texts, [ratios[text] for text in texts], color=[colours[kinds[text]] for text in texts])
    ticks = (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("bits of BLT / bits of BPE")
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    for kind, colour in colours.items():
        axes.scatter([], [], color=colour, label=kind)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "languages")
    chosen = parser.parse_args()
    wanted = [
        plan for plan in plans(chosen.budget, chosen.seeds) if plan.mix == "multilingual" and plan.name in COMPARED
    ]
    number = LINES[chosen.budget]
    try:
        do(wanted, chosen, lambda runs: None)
        learned = bytes_by_language(paths_of(chosen.data, "multilingual", "train"))
        news = first_lines(chosen.data / "eval" / "ntrex_36.jsonl.xz", "lang", number)
        sanskrit = first_lines(chosen.data / "eval" / "sanskrit_20_scripts.jsonl.xz", "script", number)
    except FileNotFoundError as error:
        parser.error(str(error))
    kinds = {language: presence(language, learned) for language in news} | dict.fromkeys(sanskrit, "script")
    known = models_before(chosen)
    for plan in wanted:
        if (plan.folder(chosen.work) / "result.json").exists():
            bits_of = measure(plan.folder(chosen.work), news | sanskrit)
            known[plan.name, plan.seed] = {**about(plan, chosen.work), "bits": bits_of}
    models = [known[plan.name, plan.seed] for plan in wanted if (plan.name, plan.seed) in known]
    for model in models:
        mean = sum(model["bits"][language] for language in news) / len(news) / model["bits"]["eng"]
        print(f"{model['name']}, seed {model['seed']}: {mean:.3f} times the bits of English, on average", flush=True)
    bits = mean_bits(models)
    relative = {name: {text: of[text] / of["eng"] for text in news} for name, of in bits.items()}
    sizes = {text: len(data) for text, data in (news | sanskrit).items()}
    found = {
        "budget": chosen.budget,
        "dtype": chosen.dtype,
        "lines": number,
        "presence": kinds,
        "bytes": sizes,
        "bits": bits,
    }
    found |= {"relative_to_english": relative}
    write(chosen.out, {**found, "models": models})
    if {"BLT, entropy", "BPE"} <= set(bits):
        draw(bits, kinds, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
