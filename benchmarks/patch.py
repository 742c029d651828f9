"""Megabytes per second of cutting text into patches, beside tokenizers on the same text, and where the cuts fall.

    python benchmarks/patch.py [--quick] [--json] [--out FILE] [--data PATH] [--model RUN ...] [--texts FOLDER]

Speed: bytes of `--data` in, patch starts out, one thread each. Patchers are the entropy models of the runs, n-gram counts of
the first run's training text, and the rules `space` and `fixed`, which need no model. `tokenizers` learns a byte-level BPE of
4,096 ids from that training text; `tiktoken` has the same merges and makes the same ids (text in, ids out). All take turns, a
short stretch of text each, so that whatever else the machine does meets all alike; a figure is the median of its stretches,
`tokenizer_ratio` is over tiktoken.

Cuts: `boundary_f1` is the F1 of a patcher's starts against those of the `reference`, a transformer entropy model (if no run has
one, the demo's is trained on `--data` first), when both
cut this text into patches of the same mean size (thresholds are calibrated for each text; a rule has the size that it has, and
the reference's threshold follows). Starts that every patcher makes, BOS and the first byte of a row, do not count.
`random_f1` is what as many starts anywhere reach. Texts: what the first run holds out of `--data`, and of FOLDER code, English
and 36 languages. A transformer is a poor judge of text unlike what it was trained on, which `reference_trained_on` says.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import BEGIN, facts, parser_of, publish, rounded, say

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    turns: int
    stretch_seconds: float
    speed_bytes: int  # from which stretches are taken
    learn_bytes: int  # of training text, for the BPE
    vocabulary: int
    agreement_bytes: int  # of each text


FULL = Plan(
    7, stretch_seconds=0.5, speed_bytes=8_000_000, learn_bytes=8_000_000, vocabulary=4096, agreement_bytes=65_536
)
QUICK = Plan(
    5, stretch_seconds=0.2, speed_bytes=4_000_000, learn_bytes=2_000_000, vocabulary=4096, agreement_bytes=16_384
)
TINY = Plan(2, stretch_seconds=0.01, speed_bytes=20_000, learn_bytes=10_000, vocabulary=300, agreement_bytes=2_000)
DEFAULT_RUN = Path("runs/demo")
PILOT_BYTES = 16_384  # cut once to know how much makes a stretch
LEAST_BYTES = 4096  # of a stretch
FIXED_BYTES = 4  # of every patch of the rule `fixed`
COLUMNS = {
    **{"patcher": "patcher", "model": "model", "text": "text", "megabytes_per_second": "MB/s"},
    **{
        "tokenizer_ratio": "x tiktoken",
        "mean_patch_bytes": "bytes/patch",
        "boundary_f1": "F1",
        "random_f1": "random F1",
    },
    **{"reference": "reference", "reference_trained_on": "trained on"},
}


@dataclass
class Contestant:
    """A patcher or tokenizer, and how fast it was."""

    patcher: Any  # one of patch_sides
    data: bytes
    is_tokenizer: bool = False
    stretch_bytes: int = PILOT_BYTES
    rates: list[float] = field(default_factory=list)  # bytes per second

    def prepare(self, stretch_seconds: float) -> None:
        """What is slow only once is done; how much text makes a stretch."""
        self.cut(0)
        self.stretch_bytes = max(LEAST_BYTES, min(len(self.data), round(self.cut(0) * stretch_seconds)))

    def cut(self, turn: int) -> float:
        """Bytes per second of one stretch, another in each turn."""
        begin = turn * self.stretch_bytes % max(1, len(self.data) - self.stretch_bytes)
        data = self.data[begin : begin + self.stretch_bytes]
        text = data.decode("utf-8", "ignore") if self.is_tokenizer else data
        num_bytes = len(text.encode()) if isinstance(text, str) else len(data)
        started = time.perf_counter()
        self.patcher.cut(text)
        return num_bytes / (time.perf_counter() - started)

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(self.rates)


def race(contestants: Sequence[Contestant], plan: Plan) -> None:
    """All turns of all."""
    for one in contestants:
        one.prepare(plan.stretch_seconds)
    for turn in range(plan.turns):
        say(f"turn {turn + 1} of {plan.turns}")
        for one in contestants:
            one.rates.append(one.cut(turn))


def patchers_of(runs: Sequence[Path], training: Sequence[bytes], sample: bytes, data: str) -> list[Any]:
    """The patchers of all runs, n-gram counts where no run has them, and the rules, each ready to cut."""
    from patch_sides import PATCH_BYTES, NgramPatcher, Rule, patcher_of_run, rows_of

    from blt.config import PatchingConfig
    from blt.model.patching import threshold_for_patch_size

    found: list[Any] = [patcher_of_run(run) for run in runs]
    if not any(isinstance(patcher, NgramPatcher) for patcher in found):
        say(f"n-grams of {sum(map(len, training)) / 1e6:.1f} MB are counted")
        found.append(NgramPatcher.counted(training, f"counts of {Path(data).name}"))
    rows = rows_of(sample)
    for patcher in found:
        if patcher.threshold_nats is None:
            entropies = patcher.entropies(rows)
            patcher.threshold_nats = threshold_for_patch_size(entropies, rows, PatchingConfig(), PATCH_BYTES)
    rules = [PatchingConfig(rule="space"), PatchingConfig(rule="fixed", patch_bytes=FIXED_BYTES)]
    return found + [Rule(rule) for rule in rules]


def measure_speed(patchers: Sequence[Any], training: bytes, text: bytes, plan: Plan) -> tuple[list[Row], Row]:
    """A row for each patcher and tokenizer, and what is to be said of the tokenizers."""
    from bpe import learn
    from patch_sides import Tiktoken, Tokenizers

    say(f"a BPE of {plan.vocabulary:,} ids is learnt")
    tokenizer = learn([training[: plan.learn_bytes].decode("utf-8", "replace")], plan.vocabulary)
    tiktoken = Contestant(Tiktoken(tokenizer), text, is_tokenizer=True)
    tokenizers = Contestant(Tokenizers(tokenizer), text, is_tokenizer=True)
    contestants = [*(Contestant(patcher, text) for patcher in patchers), tiktoken, tokenizers]
    race(contestants, plan)
    rows = []
    for one in contestants:
        row = {"patcher": one.patcher.name, **model_of(one.patcher)}
        row |= {"megabytes_per_second": one.bytes_per_second / 1e6, "stretch_bytes": one.stretch_bytes, "threads": 1}
        rows.append(row | {"tokenizer_ratio": one.bytes_per_second / tiktoken.bytes_per_second})
    checked = text[: plan.agreement_bytes].decode("utf-8", "ignore")
    ids = [list(one.patcher.cut(checked)) for one in (tiktoken, tokenizers)]
    about = {"vocabulary": tokenizer.get_vocab_size(), "tokenizers_make_the_same_ids": ids[0] == ids[1]}
    return rows, about | {"bytes_per_token": len(checked.encode()) / len(ids[0])}


def measure_cuts(patchers: Sequence[Any], runs: Sequence[Path], texts: dict[str, bytes]) -> list[Row]:
    """Each patcher beside the transformer of each run, in each text."""
    from patch_sides import TransformerPatcher, agreement, rows_of, trained_on

    rows = []
    for run, reference in zip(runs, patchers, strict=False):  # the patchers of the runs come first
        if not isinstance(reference, TransformerPatcher):
            continue
        say(f"cuts in {len(texts)} texts beside those of {run.name}, which was trained on {trained_on(run)}")
        for name, text in texts.items():
            matrix = rows_of(text)
            entropies = reference.entropies(matrix)
            for patcher in patchers:
                if patcher is not reference:
                    found = asdict(agreement(patcher, reference, matrix, entropies))
                    row = {"patcher": patcher.name, **model_of(patcher), "text": name, "reference": run.name}
                    row |= {"reference_trained_on": trained_on(run)}
                    rows.append(row | {key: value for key, value in found.items() if value is not None})
    return rows


def model_of(patcher: Any) -> Row:
    return {} if patcher.model is None else {"model": patcher.model}


def joined(speeds: Sequence[Row], cuts: Sequence[Row]) -> list[Row]:
    """The rows of both; of the first text and reference, on which speed was measured too, in one."""
    rest, found = list(cuts), []
    for speed in speeds:
        same = [row for row in rest if (row["text"], row["reference"]) == (cuts[0]["text"], cuts[0]["reference"])]
        own = [row for row in same if (row["patcher"], row.get("model")) == (speed["patcher"], speed.get("model"))]
        found.append({**speed, "text": cuts[0]["text"], **(own[0] if own else {})})
        rest = [row for row in rest if row not in own[:1]]
    return found + rest


def measure(plan: Plan, runs: Sequence[Path], data: str, folder: Path, scratch: Path, command: str) -> dict[str, Any]:
    """All of it: machine, command, rows, summary."""
    import torch
    from patch_sides import TransformerPatcher, documents_of_run, evaluation_texts, patcher_of_run, train_reference

    machine, name = facts(), Path(data).name
    runs = [run for run in runs if run != DEFAULT_RUN or run.exists()]
    if not any(isinstance(patcher_of_run(run), TransformerPatcher) for run in runs):
        say("no transformer among the models: the demo's is trained, which takes about half a minute")
        runs.append(train_reference(data, scratch / "transformer"))
    torch.set_num_threads(1)
    training, held_out = documents_of_run(data, runs[0])
    text = b"".join([*held_out, *training])[: plan.speed_bytes]
    sample = b"".join(held_out)[: plan.agreement_bytes]
    patchers = patchers_of(runs, training, sample, data)
    speeds, about = measure_speed(patchers, b"".join(training), text, plan)
    texts = {name: sample}
    try:
        texts |= dict(evaluation_texts(folder, plan.agreement_bytes))
    except FileNotFoundError as error:
        say(f"cuts are compared on {name} alone, as {error}; give --texts FOLDER")
    rows = joined(speeds, measure_cuts(patchers, runs, texts))
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    summary = {"text_bytes": len(text), **about, "seconds": round(time.perf_counter() - BEGIN)}
    return {"machine": machine, "command": command, "rows": [rounded(row) for row in rows], "summary": rounded(summary)}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("patch.py", __doc__, quick="less than a minute: shorter stretches, less text")
    parser.add_argument("--data", metavar="PATH", default="stdlib", help="text of the first run (%(default)s)")
    parser.add_argument(
        "--model", type=Path, metavar="RUN", nargs="+", default=[DEFAULT_RUN], help=f"trained ({DEFAULT_RUN})"
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FOLDER", default=Path("../shared/data/eval"), help="other texts (%(default)s)"
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    plan = TINY if options.size == "tiny" else QUICK if options.quick else FULL
    command = " ".join(["python benchmarks/patch.py", *given])
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(plan, options.model, options.data, options.texts, Path(scratch), command)
    except (ValueError, OSError) as error:
        sys.exit(f"patch.py: {error}")
    publish(result, COLUMNS, options.json, options.out)


if __name__ == "__main__":
    main()
