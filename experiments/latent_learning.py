"""At which learning rates does the latent transformer learn anything, by AdamW and by Muon?

Each document repeats one letter, drawn at random, after every 59 bytes of a text that is always the same. Local parts with
windows of 16 bytes cannot see the letter again: what is known of it beyond chance, log2 26 = 4.70 bits, came through the latent
transformer. All runs have the same text, model and number of steps.
"""

import itertools
import json
import math
import random
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from claim import options, subplots, write
from contenders import FIXED_4, LOCAL, PAPER_BLT, REFERENCE_FLOPS, ROW_BYTES, load, run

from blt.byte_ids import encode
from blt.language_model import LanguageModel

FILLER = "the quick brown fox jumps over a lazy dog and then runs away"[:59]
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
OPTIMIZERS = ("adamw", "muon")
BYTES = {"smoke": 100_000, "minutes": 5_000_000, "hour": 20_000_000, "longer": 100_000_000}
CHANCE_BITS = math.log2(len(ascii_lowercase))
NARROW = {**LOCAL, "window_positions": 16}
BLT = PAPER_BLT.but(**FIXED_4, model__local_encoder=NARROW, model__local_decoder=NARROW)


def document(chance: random.Random) -> str:
    """One letter, the filler, the letter again, ...: a row of training.

    >>> document(random.Random(0))[58:63]
    'wamth'
    """
    return ((chance.choice(ascii_lowercase) + FILLER) * 9)[: ROW_BYTES - 2]


def letter_bits(lm: LanguageModel, documents: list[str]) -> float:
    """Mean bits of the letter where it comes again."""
    ids = torch.tensor([encode(text) for text in documents])
    with torch.no_grad():
        expected = lm.predict(ids)[0].log_softmax(-1)[:, :-1]
    bits = -expected.gather(-1, ids[:, 1:, None])[..., 0] / math.log(2)
    return float(bits[:, len(FILLER) + 1 :: len(FILLER) + 1].mean())


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Bits of the letter by learning rate."""
    figure, axes = subplots(figsize=(5.5, 3.6))
    for optimizer in OPTIMIZERS:
        of = [run for run in runs if run["matrix_optimizer"] == optimizer]
        axes.plot([run["learning_rate"] for run in of], [run["letter_bits"] for run in of], "o-", label=optimizer)
    axes.axhline(CHANCE_BITS, color="grey", linewidth=0.8, label="chance")
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate of matrices")
    axes.set_ylabel("bits of a letter 60 bytes back")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    chosen = options(__doc__, "latent_learning").parse_args()
    num_bytes = BYTES[chosen.budget]
    text, made = chosen.work / "texts" / f"latent_learning.{num_bytes}.jsonl", random.Random(0)
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"text": document(made)}) + "\n" for _ in range(num_bytes // ROW_BYTES))
        text.write_text("".join(rows))
    runs, unseen = [], random.Random(1)
    documents = [document(unseen) for _ in range(64)]
    for seed, optimizer, rate in itertools.product(range(chosen.seeds), OPTIMIZERS, RATES):
        size, label = f"{num_bytes / 1e6:g}MB", f"{optimizer}, rate {rate:g}, seed {seed}"
        folder = chosen.work / "runs" / "latent_learning" / size / f"{optimizer}.{rate:g}.{seed}"
        skipped = chosen.only and not any(words in label for words in chosen.only)
        if skipped and not (folder / "result.json").exists():
            continue
        contender = BLT.but(training__learning_rate=rate, training__matrix_optimizer=optimizer)
        figures = run(contender, text, {}, folder, REFERENCE_FLOPS, seed, chosen.dtype)
        lm = load(folder)
        assert isinstance(lm, LanguageModel)
        about = {"matrix_optimizer": optimizer, "learning_rate": rate, "letter_bits": letter_bits(lm, documents)}
        runs.append({**about, **figures})
        print(f"{label}: {about['letter_bits']:.3f} bits", flush=True)
        write(chosen.out, {"budget": chosen.budget, "chance_bits": CHANCE_BITS, "runs": runs})
    draw(runs, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
