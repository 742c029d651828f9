"""Bytes per second of decoding on this machine: ours beside transformers' BLT and a Llama that reads as many weights.

    python benchmarks/decode.py [--quick] [--json] [--out FILE] [--model RUN]

First random weights of a 110-million-parameter model, after prompts of 256, 1,024 and 4,096 random bytes, one row and
sixteen; ours samples at temperature 1, the others decode greedily. Reading the prompt is not timed. All sides take turns,
a short stretch each, so that whatever else the machine does meets all alike; a figure is the median of its stretches.
Then a trained model, plain beside speculative, after snippets of text that it was not trained on. (Random weights
accept nearly every draft, as their latents say little: what speculation gains there is an upper bound.)

`bandwidth_fraction`: what a step must read (each weight matrix once per use, and the keys and values in reach), times
steps per second, over the bandwidth at which memory was read just before; the median of the turns.
`*_peak_bytes`: weights, and how far the process's resident memory rose above them from the prompt to the first bytes.
"""

import argparse
import importlib.util
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import BEGIN, facts, parser_of, publish, read_bandwidth, resident_rise, rounded, say

if TYPE_CHECKING:
    from decode_sides import Stretch

    from blt.incremental import Networks

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    cases: tuple[tuple[int, int], ...]  # bytes of the prompt, rows
    warm_bytes: int  # written before anything is timed: what is compiled is compiled then
    stretches: int
    stretch_bytes: int  # of each row
    huggingface_bytes: tuple[int, ...]  # of each case; 0: not measured
    compiled: bool
    drafts: tuple[int, ...]  # k of random weights
    snippets: int
    snippet_bytes: int
    text_bytes: int  # written after each snippet
    trained_drafts: tuple[int, ...]  # k of the trained model
    long_bytes: int  # written in one go; 0: not measured


FULL = Plan(
    cases=((256, 1), (1024, 1), (4096, 1), (256, 16), (1024, 16), (4096, 16)),
    warm_bytes=32,
    stretches=5,
    stretch_bytes=80,
    huggingface_bytes=(8, 4, 2, 0, 0, 0),
    compiled=True,
    drafts=(4, 8),
    snippets=8,
    snippet_bytes=400,
    text_bytes=300,
    trained_drafts=(2, 4, 8, 16),
    long_bytes=10_000,
)
QUICK = Plan(
    cases=((256, 1), (4096, 1), (256, 16)),
    warm_bytes=16,
    stretches=3,
    stretch_bytes=48,
    huggingface_bytes=(2, 1, 0),
    compiled=False,
    drafts=(),
    snippets=2,
    snippet_bytes=400,
    text_bytes=100,
    trained_drafts=(4, 8),
    long_bytes=0,
)
TINY = Plan(
    cases=((20, 1), (60, 1), (20, 2)),
    warm_bytes=4,
    stretches=2,
    stretch_bytes=8,
    huggingface_bytes=(2, 2, 0),
    compiled=False,
    drafts=(2,),
    snippets=1,
    snippet_bytes=60,
    text_bytes=12,
    trained_drafts=(4,),
    long_bytes=20,
)
HUGGINGFACE_STRETCHES = 2
COLUMNS = {
    **{"model": "model", "context": "context", "batch": "rows", "mode": "mode", "speculate": "k"},
    **{"temperature": "temperature", "ours_bytes_per_second": "bytes/s", "hf_ratio": "x HF BLT"},
    **{
        "llama_ratio": "x Llama",
        "bandwidth_fraction": "of bandwidth",
        "speculation_ratio": "x plain",
        "int8_ratio": "x fp32",
    },
    **{"acceptance": "accepted", "bytes_per_latent_call": "bytes/latent call", "ours_peak_bytes": "peak memory"},
}


@dataclass
class Contestant:
    """One side in one case, and what it has written so far."""

    name: str  # eager, compiled, speculative 4, hf, llama
    context: int
    side: Any  # one of decode_sides
    stretch_bytes: int
    stretches: int = 1
    written: "list[Stretch]" = field(default_factory=list)
    peak_bytes: int | None = None

    def prepare(self, prompts: Sequence[list[int]], warm_bytes: int) -> float:
        """Read the prompts and write a little, untimed; the seconds that the writing took."""
        seconds = 0.0

        def read_and_write() -> None:
            nonlocal seconds
            self.side.read(prompts)
            seconds = self.side.write(warm_bytes).seconds

        say(f"{self.name}: reads {len(prompts)} x {self.context} bytes")
        rise = resident_rise(read_and_write)
        self.peak_bytes = None if rise is None else self.side.weight_bytes() + rise
        return seconds

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(part.num_bytes / part.seconds for part in self.written)

    def total(self, name: str) -> float:
        return sum(getattr(part, name) for part in self.written)


Case = tuple[int, int]  # bytes of the prompt, rows
Contest = dict[Case, dict[str, Contestant]]


def contest(networks: "Networks", plan: Plan) -> tuple[Contest, float, list[float]]:
    """All sides in all cases, after their turns; the seconds of the first compiled steps; of each turn the bytes per second
    that memory was read at."""
    from decode_sides import HuggingFaceBlt, Llama, Ours, random_prompt

    from blt.model.linear import round_to_int8

    theirs = importlib.util.find_spec("transformers") is not None
    if theirs:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        blt_model, llama_model = HuggingFaceBlt.model_of(networks), Llama.model_like(networks)
    else:
        say("transformers is not installed, so ours runs alone: pip install 'blt-lm[dev]'")
    entered: Contest = {}
    compile_seconds = 0.0
    if plan.compiled:
        rounded_networks = networks._replace(network=deepcopy(networks.network), compiled=True)
        round_to_int8(rounded_networks.network)
    for (context, rows), huggingface_bytes in zip(plan.cases, plan.huggingface_bytes, strict=True):
        sides: dict[str, Any] = {"eager": Ours(networks, temperature=1.0)}
        if rows == 1:
            fastest = networks._replace(compiled=plan.compiled)
            if plan.compiled:
                sides["compiled"] = Ours(fastest, temperature=1.0)
                sides["int8"] = Ours(rounded_networks, temperature=1.0)
            sides |= {f"speculative {k}": Ours(fastest, temperature=1.0, speculate=k) for k in plan.drafts}
        if theirs:
            sides["llama"] = Llama(llama_model)
            if huggingface_bytes:
                sides["hf"] = HuggingFaceBlt(blt_model)
        found = entered[context, rows] = {}
        for name, side in sides.items():
            sizes = (huggingface_bytes, HUGGINGFACE_STRETCHES) if name == "hf" else (plan.stretch_bytes, plan.stretches)
            sizes = (sizes[0] // 4, sizes[1]) if rows > 1 else sizes  # many rows write as much in fewer steps
            found[name] = Contestant(name, context, side, *sizes)
            prompts = [random_prompt(context, seed) for seed in range(rows)]
            seconds = found[name].prepare(prompts, 1 if name == "hf" else plan.warm_bytes)
            if name == "compiled" and not compile_seconds:
                compile_seconds = seconds
                say(f"compiled in about {seconds:.0f} s, which counts in no figure")
                found[name].prepare(prompts, plan.warm_bytes)  # again for its memory, without the compiler's
    everyone = [contestant for found in entered.values() for contestant in found.values()]
    bandwidths = []
    for turn in range(plan.stretches):
        bandwidths.append(read_bandwidth(plan.compiled))
        say(f"turn {turn + 1} of {plan.stretches}: memory reads at {bandwidths[-1] / 1e9:.1f} GB/s")
        for contestant in everyone:
            if turn < contestant.stretches:
                contestant.written.append(contestant.side.write(contestant.stretch_bytes))
    return entered, compile_seconds, bandwidths


def rows_of(model: str, case: Case, found: dict[str, Contestant], bandwidths: Sequence[float]) -> list[Row]:
    """A row for each mode of ours that was measured in this case; of the speculative ones the fastest."""
    modes = [found[name] for name in ("eager", "compiled") if name in found]
    plain = modes[-1]
    drafting = [contestant for name, contestant in found.items() if name.startswith("speculative")]
    rows = []
    others = [found["int8"]] if "int8" in found else []
    others += sorted(drafting, key=lambda one: one.bytes_per_second)[-1:]
    for ours in [*modes, *others]:
        row = {"model": model, "context": case[0], "batch": case[1], **figures(ours)}
        for name in ("hf", "llama"):
            if name in found:
                row[f"{name}_ratio"] = ours.bytes_per_second / found[name].bytes_per_second
                row[f"{name}_bytes_per_second"] = found[name].bytes_per_second
                if found[name].peak_bytes is not None:
                    row[f"{name}_peak_bytes"] = found[name].peak_bytes
        if ours in modes:
            per_byte = ours.side.bytes_to_read(ours.written) / ours.total("num_bytes")
            fractions = [
                per_byte * part.num_bytes / part.seconds / bandwidth
                for part, bandwidth in zip(ours.written, bandwidths, strict=True)
            ]
            row |= {"read_per_byte": per_byte, "bandwidth_fraction": statistics.median(fractions)}
        else:
            row["int8_ratio" if ours.name == "int8" else "speculation_ratio"] = (
                ours.bytes_per_second / plain.bytes_per_second
            )
        rows.append(row)
    return rows


def figures(ours: Contestant) -> Row:
    """What is said of ours whatever it is compared with."""
    networks, speculate = ours.side.networks, ours.side.speculate
    mode = "speculative" if speculate else "compiled" if networks.compiled else "eager"
    mode = "int8" if ours.name == "int8" else mode
    row: Row = {
        "mode": mode,
        "compiled": networks.compiled,
        "ours_bytes_per_second": ours.bytes_per_second,
        "bytes_per_latent_call": ours.total("num_bytes") / max(1, ours.total("latent_calls")),
        "mean_patch_bytes": ours.total("num_bytes") / max(1, ours.total("patches")),
        "ours_cache_bytes": ours.side.cache_bytes(),
        "ours_weight_bytes": ours.side.weight_bytes(),
    }
    if ours.peak_bytes is not None:
        row["ours_peak_bytes"] = ours.peak_bytes
    if speculate:
        row |= {"speculate": speculate, "drafted_bytes": ours.total("drafted")}
        if ours.total("drafted"):
            row["acceptance"] = ours.total("accepted") / ours.total("drafted")
    return row


def measure_trained(run: Path, data: str, plan: Plan) -> list[Row]:
    """Plain beside speculative writing of a trained model, greedily and at temperature 0.9, after snippets of text."""
    from decode_sides import Ours

    from blt import load
    from blt.incremental import Networks

    model = load(run, device="cpu", dtype="float32")
    networks = Networks(model.config, model.entropy_model, model.network)
    prompts = snippets(run, data, plan)
    Contestant("once", plan.snippet_bytes, Ours(networks, 0.0), 0).prepare(
        prompts[:1], plan.warm_bytes
    )  # weights leave their file
    rows = []
    for temperature in (0.0, 0.9):
        say(f"{run.name}: temperature {temperature:g}, {len(prompts)} snippets of {plan.snippet_bytes} bytes")
        groups = []
        for compiled in (False, True)[: 1 + plan.compiled]:
            sides = [Ours(networks._replace(compiled=compiled), temperature, k) for k in (0, *plan.trained_drafts)]
            group = [Contestant(f"k {side.speculate}", plan.snippet_bytes, side, plan.text_bytes) for side in sides]
            groups.append(group)
            for ours in group:
                ours.prepare(prompts[:1], plan.warm_bytes)
        texts: dict[int, list[list[int]]] = {}
        for prompt in prompts:
            for ours in (ours for group in groups for ours in group):
                ours.side.read([prompt])
                ours.written.append(ours.side.write(ours.stretch_bytes))
                texts.setdefault(id(ours), []).append(ours.side.text()[: len(prompt) + plan.text_bytes])
        for plain, *drafting in groups:
            for ours in (plain, *drafting):
                row = {"model": run.name, "context": plan.snippet_bytes, "batch": 1, "temperature": temperature}
                row |= figures(ours)
                if ours is not plain:
                    pairs = zip(ours.written, plain.written, strict=True)
                    row["speculation_ratio"] = statistics.median(
                        (mine.num_bytes / mine.seconds) / (theirs.num_bytes / theirs.seconds) for mine, theirs in pairs
                    )
                if temperature == 0:
                    row["same_text"] = texts[id(ours)] == texts[id(groups[0][0])]
                rows.append(row)
    return rows


def snippets(run: Path, data: str, plan: Plan) -> list[list[int]]:
    """Ids of stretches of documents that the run's own rule holds out of its training, drawn with a seed."""
    from blt.byte_ids import encode
    from blt.config import CorpusConfig
    from blt.config_file import read_run_config
    from blt.corpus import is_held_out
    from blt.documents import read_documents

    config = run / "config.toml"
    fraction = (read_run_config(config).data if config.is_file() else CorpusConfig()).held_out_fraction
    documents = [document.data for document in read_documents([data]) if len(document.data) > plan.snippet_bytes]
    held_out = [document for document in documents if is_held_out(document, fraction)] or documents
    if not held_out:
        raise ValueError(f"{data} holds no document of more than {plan.snippet_bytes} bytes; give another --data")
    draw = random.Random(0)
    found = []
    for document in draw.choices(held_out, k=plan.snippets):
        begin = draw.randrange(len(document) - plan.snippet_bytes)
        found.append(encode(document[begin : begin + plan.snippet_bytes]))
    return found


def measure_long(model: str, networks: "Networks", plan: Plan) -> tuple[Row, list[float]]:
    """What a byte costs at the beginning and at the end of a long text; milliseconds per byte of each tenth of it."""
    from decode_sides import Ours, random_prompt

    context = plan.cases[0][0]
    ours = Contestant("long", context, Ours(networks._replace(compiled=plan.compiled), 1.0), plan.long_bytes // 10)
    ours.prepare([random_prompt(context, seed=0)], plan.warm_bytes)
    caches, reads = [], []
    for tenth in range(10):
        say(f"long text: {tenth * plan.long_bytes // 10} of {plan.long_bytes} bytes")
        stretch = ours.side.write(ours.stretch_bytes)
        ours.written.append(stretch)
        caches.append(ours.side.cache_bytes())
        reads.append(ours.side.bytes_to_read([stretch]) / stretch.num_bytes)
    costs = [1000 * part.seconds / part.num_bytes for part in ours.written]
    row = {"model": model, "context": context, "batch": 1, **figures(ours), "mode": "long"}
    row |= {"new_bytes": plan.long_bytes, "first_tenth_ms_per_byte": costs[0], "last_tenth_ms_per_byte": costs[-1]}
    row |= {
        "cost_ratio_last_to_first_tenth": costs[-1] / costs[0],
        "read_ratio_last_to_first_tenth": reads[-1] / reads[0],
    }
    row |= {"first_tenth_cache_bytes": caches[0], "last_tenth_cache_bytes": caches[-1]}
    return row, costs


def cost_ratios(entered: Contest) -> dict[str, float]:
    """How much dearer a byte is after the longest prompt than after the shortest, of each side that wrote alone."""
    contexts = [context for context, rows in entered if rows == 1]
    shortest, longest = entered[min(contexts), 1], entered[max(contexts), 1]
    key = f"cost_ratio_{max(contexts)}_to_{min(contexts)}"
    return {
        key if name == "eager" else f"{key}_{name}": shortest[name].bytes_per_second / longest[name].bytes_per_second
        for name in ("eager", "compiled", "llama", "hf")
        if name in shortest
    }


def measure(size: str, plan: Plan, run: Path, data: str, command: str) -> dict[str, Any]:
    """All of it: machine, command, rows, summary."""
    from decode_sides import random_networks, shape

    from blt.flops import parameter_counts

    machine, rows = facts(), []
    summary: dict[str, Any] = {}
    if plan.cases:
        say("weights are drawn and the threshold is calibrated")
        networks = random_networks(shape(size))
        entered, compile_seconds, bandwidths = contest(networks, plan)
        rows += [row for case, found in entered.items() for row in rows_of(size, case, found, bandwidths)]
        summary |= {"parameters": parameter_counts(networks.config)["total"], **cost_ratios(entered)}
        del entered
        if plan.compiled:
            summary["compile_seconds"] = compile_seconds
        machine["read_gb_per_second"] = round(statistics.median(bandwidths) / 1e9, 1)
        machine["read_gb_per_second_of_each_turn"] = [round(bandwidth / 1e9, 1) for bandwidth in bandwidths]
        if plan.long_bytes:
            row, costs = measure_long(size, networks, plan)
            rows.append(row)
            summary["long_ms_per_byte_of_each_tenth"] = [round(cost, 3) for cost in costs]
    if run.exists():
        rows += measure_trained(run, data, plan)
    else:
        say(f"no trained model at {run}, so nothing is said of one: run make demo, or give --model RUN")
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    summary["seconds"] = round(time.perf_counter() - BEGIN)
    return {"machine": machine, "command": command, "rows": [rounded(row) for row in rows], "summary": rounded(summary)}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("decode.py", __doc__, quick="about a minute: fewer cases, nothing compiled")
    parser.add_argument("--model", type=Path, metavar="RUN", default=Path("runs/demo"), help="trained (%(default)s)")
    parser.add_argument("--trained-only", action="store_true", help="nothing with random weights")
    parser.add_argument("--data", metavar="PATH", default="stdlib", help="text for the trained model (%(default)s)")
    parser.add_argument("--size", choices=("110m", "tiny"), default="110m", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    plan = TINY if options.size == "tiny" else QUICK if options.quick else FULL
    if options.trained_only:
        plan = replace(plan, cases=(), huggingface_bytes=(), long_bytes=0)
    command = " ".join(["python benchmarks/decode.py", *given])
    try:
        result = measure(options.size, plan, options.model, options.data, command)
    except (ValueError, OSError) as error:
        sys.exit(f"decode.py: {error}")
    publish(result, COLUMNS, options.json, options.out)


if __name__ == "__main__":
    main()
