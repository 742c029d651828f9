"""Who learns to copy? The bits of a passage where it comes a second time, within a row of training.

First of contenders that learn from nothing but passages that are there twice, then of the models of as_good_as_tokens.py, which
learn from text as it is: those runs of --work that are done. Of models that are not there, earlier figures stay.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import as_good_as_tokens
from claim import ABOUT, options, results_before, subplots, test_texts, train_text, write
from contenders import CONTENDERS, FIXED_4, LOCAL, PAPER_BLT, REFERENCE_FLOPS, documents_of, load, run, scores
from token_transformer import TokenModel

from blt.evaluate import total_score
from blt.language_model import LanguageModel

PASSAGE_BYTES = 230  # twice that fits into a row
BYTES = {"smoke": 60_000, "minutes": 3_000_000, "hour": 12_000_000, "longer": 50_000_000}
SEES_ALL = {**LOCAL, "window_positions": 512}
LATENT_OF_96 = {"model__latent__width": 96, "model__latent__ffn_width": 264, "model__latent__num_heads": 2}
TAUGHT = {
    "bytes": CONTENDERS["bytes"],
    "BPE": CONTENDERS["BPE"],
    "BPE of two layers": CONTENDERS["BPE"].but(width=96),
    "BLT, all n-grams": PAPER_BLT,
    "BLT, all n-grams, fixed 4": PAPER_BLT.but(**FIXED_4),
    "BLT, latent width 96": PAPER_BLT.but(**LATENT_OF_96),
    "BLT, decoder sees 512 bytes": PAPER_BLT.but(model__local_decoder=SEES_ALL),
    "BLT, latent width 96, decoder sees 512 bytes": PAPER_BLT.but(**LATENT_OF_96, model__local_decoder=SEES_ALL),
}


def passages(documents: Sequence[bytes], num_bytes: int, seed: int) -> list[str]:
    """Pieces of documents, drawn at random, about so many bytes in all.

    >>> [len(piece) for piece in passages([b"a" * 300, b"b"], 500, 0)]
    [230, 230, 230]
    """
    chance, found = random.Random(seed), []
    long = [document for document in documents if len(document) >= PASSAGE_BYTES]
    while num_bytes > 0:
        document = chance.choice(long)
        begin = chance.randint(0, len(document) - PASSAGE_BYTES)
        found.append(document[begin : begin + PASSAGE_BYTES].decode("utf-8", "ignore"))
        num_bytes -= PASSAGE_BYTES
    return found


def twice(documents: Sequence[bytes], num_bytes: int, folder: Path) -> Path:
    """A file of texts that are a passage of these documents and, on the next line, the same again."""
    text = folder / f"copying.{num_bytes}.jsonl"
    if not text.exists():
        chosen = passages(documents, num_bytes // 2, 0)
        text.write_text("".join(json.dumps({"text": f"{passage}\n{passage}"}) + "\n" for passage in chosen))
    return text


def first_and_again(model: LanguageModel | TokenModel, texts: Sequence[str]) -> tuple[float, float]:
    """Bits per byte of passages, and of the same where each comes again on the next line."""
    data = [text.encode() for text in texts]
    before = [text + b"\n" for text in data]
    return total_score(scores(model, data)).bits_per_byte, total_score(scores(model, data, before)).bits_per_byte


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Two bars a model: of the passage, and of the passage again."""
    figure, axes = subplots(figsize=(8, 0.34 * len(found) + 1.2))
    for place, model in enumerate(found):
        axes.barh(place - 0.2, model["first"], 0.4, color="lightgrey", label="a passage" if not place else None)
        axes.barh(place + 0.2, model["again"], 0.4, color="tab:blue", label="again" if not place else None)
    axes.set_yticks(range(len(found)), [f"{model['name']} ({model['learned_from']})" for model in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "copying")
    chosen = parser.parse_args()
    num_bytes = BYTES[chosen.budget]
    try:
        train, test = train_text(chosen, "english", 15_000_000), test_texts(chosen, "english")
    except FileNotFoundError as error:
        parser.error(str(error))
    asked = passages([document for path in test.values() for document in documents_of(path)], 15_000, 1)
    text = twice(documents_of(train), num_bytes, chosen.work / "texts")
    before = results_before(chosen.out)
    told = before["models"] if before.get("budget") == chosen.budget else []
    found: dict[tuple[str, str], dict[str, Any]] = {(model["name"], model["learned_from"]): model for model in told}

    def measured(name: str, learned_from: str, folder: Path) -> None:
        first, again = first_and_again(load(folder), asked)
        figures = json.loads((folder / "result.json").read_text())
        about = {name: figures[name] for name in ("seed", *ABOUT, "latent", "training")}
        model = {"name": name, "learned_from": learned_from, "first": first, "again": again, **about}
        found[name, learned_from] = model
        print(f"{name}, {learned_from}: {first:.3f}, again {again:.3f} bits per byte", flush=True)
        write(chosen.out, {"budget": chosen.budget, "models": list(found.values())})

    for name, contender in TAUGHT.items():
        folder = chosen.work / "runs" / "copying" / f"{num_bytes / 1e6:g}MB" / name.replace(", ", ".").replace(" ", "_")
        if not chosen.only or any(words in name for words in chosen.only) or (folder / "result.json").exists():
            run(contender, text, {}, folder, REFERENCE_FLOPS, dtype=chosen.dtype)
            measured(name, "passages twice", folder)
    for budget in ("minutes", "hour") if chosen.budget != "smoke" else ("smoke",):
        for plan in as_good_as_tokens.plans(budget, 1):
            folder = plan.folder(chosen.work)
            if plan.mix == "english" and (folder / "result.json").exists():
                measured(plan.name, f"{plan.train_bytes / 1e6:g} MB of English", folder)
    draw(list(found.values()), chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
