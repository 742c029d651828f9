"""Bytes per second of training on this machine: ours beside transformers' BLT and a token model of equal FLOPs.

    python benchmarks/train.py [--quick] [--json] [--out FILE] [--data PATH] [--dtype D ...] [--set KEY=VALUE ...]

A step is forward, backward, clipping and AdamW on rows of real text; networks begin with random weights. All sides of a
comparison take turns in one process, a short stretch each, so that whatever else the machine does meets all alike; a
figure is the median of its stretches. Three comparisons, each row of figures says which (`comparison`):

`huggingface`: ours and `BltForCausalLM` with the same weights, one row a step, from 512 bytes up. Both work out entropies in
the step, in fp32, and cut at the same threshold, 4.5 bytes a patch; their losses must agree to 1e-4 nats before they are timed.
`hf_fp32_*`: theirs in fp32, as it is loaded unless one asks for another dtype, at one length (4,096 bytes).
`growth`: what a byte costs, over what it costs in rows of 1,024 bytes. Where transformers' side finds no memory or takes
too long, its keys are absent and `hf_reason` says why.
`tokens`: a token model, our own transformer with an embedding and a head, trained by the same steps on as many bytes.
Its BPE of 4,096 ids is learnt from the same text; its layers and feed-forward width are chosen so that a byte costs the
training FLOPs that it costs ours, within 2% (`token_flops_ratio`): of our network alone where entropies are `precomputed`
(read from a sidecar, or from a patcher that costs next to nothing), with the entropy model where they come `on the fly`.
`tables`: hash tables of few and of many rows; `table_cost_ratio` is what a byte costs over what it costs with few.

`mfu`: training FLOPs (three forwards of the network, one of the entropy model) per second, over those of a product of
1,024 x 1,024 matrices in the same dtype just before. `*_beyond_bytes`: how far resident memory rose above weights and
optimiser state during a step, gradients and activations together, in a fresh process; `hf_memory_ratio`: ours over theirs.
`*_peak_bytes`: that, and weights and optimiser state. `--set` reaches every key of [training].
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from machine import BEGIN, available_bytes, facts, parser_of, publish, rounded, say
from train_memory import SHARE, Measured, Request, measure_in_child

if TYPE_CHECKING:
    from train_sides import Mode, Ours, Step, Text

Row = dict[str, Any]
Case = tuple[int, int]  # bytes of a row, rows of a step
COMPARISONS = ("huggingface", "tokens", "tables")
GROWTH_FROM = 1024  # bytes of the row that others are compared with


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    huggingface: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # config: bytes of a row, turns of transformers'
    tokens: tuple[tuple[str, Case], ...]
    tables: tuple[tuple[str, Case], ...]
    table_rows: tuple[int, int]
    vocabulary: int  # of the token model
    text_bytes: int
    turns: int  # of ours and of the token model
    long_turns: int  # of rows of more than 4,096 bytes
    stretch_bytes: int  # in one turn, at least
    warm_bytes: int  # that ours reads before it is timed
    as_loaded: int  # bytes of the row at which transformers' side runs in fp32, too
    child_seconds: float  # for all cases of one side


FULL = Plan(
    huggingface=(
        ("25m", ((512, 3), (1024, 3), (2048, 3), (4096, 2), (8192, 1), (32_768, 0))),
        ("110m", ((512, 3), (1024, 3), (2048, 2), (4096, 2), (8192, 1), (32_768, 0))),
    ),
    tokens=(("25m", (512, 8)), ("25m", (4096, 1)), ("110m", (512, 8)), ("110m", (4096, 1))),
    tables=(("demo", (512, 4)), ("110m", (512, 4))),
    table_rows=(5_000, 500_002),
    vocabulary=4096,
    text_bytes=4_000_000,
    turns=3,
    long_turns=2,
    stretch_bytes=2048,
    warm_bytes=24576,
    as_loaded=4096,
    child_seconds=180,
)
QUICK = Plan(
    huggingface=(("25m", ((512, 2), (1024, 2), (2048, 2), (8192, 0))),),
    tokens=(("25m", (512, 8)),),
    tables=(("demo", (512, 4)),),
    table_rows=(5_000, 500_002),
    vocabulary=4096,
    text_bytes=1_000_000,
    turns=3,
    long_turns=2,
    stretch_bytes=1024,
    warm_bytes=16384,
    as_loaded=2048,
    child_seconds=60,
)
TINY = Plan(
    huggingface=(("tiny", ((64, 2), (128, 1), (256, 0))),),
    tokens=(("tiny", (128, 2)), ("tiny", (128, 1))),
    tables=(("tiny", (64, 2)),),
    table_rows=(50, 500),
    vocabulary=300,
    text_bytes=20_000,
    turns=2,
    long_turns=2,
    stretch_bytes=128,
    warm_bytes=128,
    as_loaded=128,
    child_seconds=60,
)
STEPS_IN_A_ROW = 3  # the first of a turn finds other things in the caches
COLUMNS = {
    **{"comparison": "comparison", "config": "config", "row_bytes": "row bytes", "rows_per_step": "rows"},
    **{"table_rows": "table rows", "dtype": "dtype", "entropies": "entropies"},
    **{"ours_bytes_per_second": "bytes/s", "mfu": "of peak FLOPs", "hf_ratio": "x HF BLT", "token_ratio": "x tokens"},
    **{"growth": "cost / 1,024", "table_cost_ratio": "cost / few rows", "ours_beyond_bytes": "memory beyond"},
    **{
        "hf_memory_ratio": "/ HF's",
        "hf_fp32_ratio": "x HF in fp32",
        "hf_fp32_memory_ratio": "memory / that",
        "hf_reason": "HF absent as",
        "reason": "absent as",
    },
}


@dataclass
class Contestant:
    """One side in one case, and what it has done so far."""

    side: Any  # one of train_sides
    case: Case
    text: Any  # whose rows it reads
    turns: int
    stretch_bytes: int
    threshold: float | None = None
    precomputed: bool = False
    made: "list[Step]" = field(default_factory=list)

    def take_turn(self, turn: int) -> None:
        from train_sides import Step

        made = [self.step(seed=turn * self.steps + one) for one in range(self.steps)]
        self.made.append(Step(*(sum(values) for values in zip(*(vars(one).values() for one in made), strict=True))))

    @property
    def steps(self) -> int:
        """In one turn."""
        return max(1, self.stretch_bytes // (self.case[0] * self.case[1]))

    def step(self, seed: int) -> "Step":
        """One update; the first of a side is slower than those that follow, and is not timed."""
        if self.threshold is not None:
            self.side.set_threshold(self.threshold)
            self.side.precomputed = self.precomputed
        step: Step = self.side.step(self.text.rows(*self.case, seed=seed))
        return step

    @property
    def rates(self) -> list[float]:
        return [part.num_bytes / part.seconds for part in self.made]

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(self.rates)


@dataclass
class Bench:
    """What all comparisons share."""

    plan: Plan
    text: "Text"
    modes: "list[Mode]"
    threads: int

    def turns(self, case: Case) -> int:
        return self.plan.long_turns if case[0] > 4096 else self.plan.turns

    def enter(self, ours: "Ours", case: Case, **changes: Any) -> Contestant:
        """A contestant of ours, with a threshold for the rows that it is going to read, warmed up."""
        import torch

        stretch = changes.pop("stretch_bytes", self.plan.stretch_bytes)
        found = Contestant(ours, case, self.text, self.turns(case), stretch, **changes)
        seeds = range(found.turns * found.steps)
        found.threshold = ours.threshold_for(torch.cat([self.text.rows(*case, seed=seed) for seed in seeds]))
        for seed in range(max(1, self.plan.warm_bytes // (case[0] * case[1]))):
            found.step(seed)
        return found

    def memory(
        self, side: str, config: str, mode: "Mode", cases: Sequence[Case], table_rows: int | None = None
    ) -> Measured:
        say(f"{config}: memory of {side} in a process of its own")
        asked = Request(side, config, asdict(mode), tuple(cases), "", self.threads, table_rows)
        return measure_in_child(asked, self.text.data[: self.plan.text_bytes], self.plan.child_seconds)


def take_turns(contestants: Sequence[Contestant]) -> dict[str, list[float]]:
    """All turns; of each turn the FLOPs per second of a matrix product in each dtype."""
    import torch

    from blt.processor import product_flops_per_second

    dtypes = {one.side.dtype for one in contestants}
    peaks: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    turns = max(one.turns for one in contestants)
    for turn in range(turns):
        for dtype in dtypes:
            peaks[dtype].append(product_flops_per_second(getattr(torch, dtype), torch.device("cpu")))
        shown = ", ".join(f"{dtype} {peaks[dtype][-1] / 1e9:.0f}" for dtype in dtypes)
        say(f"turn {turn + 1} of {turns}: matrix products at {shown} GFLOP/s")
        for one in contestants:
            if turn < one.turns:
                one.take_turn(turn)
    return peaks


def row_of(comparison: str, config: str, ours: Contestant, mode: "Mode", peaks: dict[str, list[float]]) -> Row:
    """What is said of ours whatever it is compared with."""
    flops = ours.side.flops(ours.case[0])
    per_byte = 3 * flops.network if ours.precomputed else flops.training
    rates = zip(ours.rates, peaks[ours.side.dtype], strict=False)
    return {
        "comparison": comparison,
        "config": config,
        "row_bytes": ours.case[0],
        "rows_per_step": ours.case[1],
        "table_rows": ours.side.models.config.hash_embeddings.table_rows,
        "dtype": ours.side.dtype,
        **mode.options,
        "entropies": "precomputed" if ours.precomputed else "on the fly",
        "mean_patch_bytes": sum(part.num_bytes for part in ours.made) / sum(part.patches for part in ours.made),
        "ours_bytes_per_second": ours.bytes_per_second,
        "ours_ms_per_byte": 1000 / ours.bytes_per_second,
        "training_flops_per_byte": per_byte,
        "mfu": statistics.median(per_byte * rate / peak for rate, peak in rates),
    }


def memory_of(name: str, case: Case, measured: Measured) -> Row:
    """The keys about one side's memory; where it was not measured why, if that is known."""
    found = measured.cases.get(case)
    if found is None:
        return {f"{name}_memory_reason": measured.reason} if measured.reason else {}
    return {f"{name}_beyond_bytes": found.beyond_bytes, f"{name}_peak_bytes": found.peak_bytes}


def compare_with_huggingface(bench: Bench, config: str, cases: Sequence[tuple[int, int]]) -> list[Row]:
    """Ours and transformers' BLT, one row a step, from short rows to long ones."""
    from train_sides import HuggingFaceBlt, Ours, require_same_loss, sized

    lengths = [(row_bytes, 1) for row_bytes, _ in cases]
    theirs_at = {(row_bytes, 1): turns for row_bytes, turns in cases if turns}
    memory = {index: bench.memory("ours", config, mode, lengths) for index, mode in enumerate(bench.modes)}
    sides = [Ours(sized(config), mode) for mode in bench.modes]
    wanted = {ours.dtype: theirs_at for ours in sides}
    wanted.setdefault("float32", {case: turns for case, turns in theirs_at.items() if case[0] == bench.plan.as_loaded})
    their_memory: dict[str, Measured] = {}
    theirs: dict[tuple[str, Case], Contestant] = {}
    entered = [
        (index, bench.enter(ours, case, stretch_bytes=STEPS_IN_A_ROW * case[0]))
        for index, ours in enumerate(sides)
        for case in lengths
    ]
    thresholds = {one.case: one.threshold for _, one in entered}
    for dtype, turns_at in wanted.items():
        if not turns_at:
            continue
        mode = replace(bench.modes[0], dtype=dtype)
        their_memory[dtype] = bench.memory("hf", config, mode, list(turns_at))
        like = next((ours for ours in sides if ours.dtype == dtype), sides[0])
        side, row = HuggingFaceBlt(like.models, mode), bench.text.rows(*lengths[0], seed=0)
        for one in (like, side):
            one.set_threshold(like.threshold_for(row))
        if like.dtype == dtype:
            say(f"{config}: both losses agree to {require_same_loss(like, side, row):.1e} nats per byte")
        for case, turns in turns_at.items():
            if case in their_memory[dtype].cases or not their_memory[dtype].reason:
                in_a_row = 1 if case[0] > bench.plan.as_loaded else STEPS_IN_A_ROW
                one = Contestant(side, case, bench.text, turns, in_a_row * case[0], thresholds[case])
                theirs[dtype, case] = one
                one.step(seed=0)
    peaks = take_turns([*(one for _, one in entered), *theirs.values()])
    costs = {(index, ours.case): 1 / ours.bytes_per_second for index, ours in entered}
    base = (GROWTH_FROM, 1) if (GROWTH_FROM, 1) in lengths else lengths[0]
    rows = []
    for index, ours in entered:
        row = row_of("huggingface", config, ours, bench.modes[index], peaks)
        row |= {"growth": costs[index, ours.case] / costs[index, base], **memory_of("ours", ours.case, memory[index])}
        found = theirs.get((ours.side.dtype, ours.case))
        if found is not None:
            row["hf_bytes_per_second"] = found.bytes_per_second
            row["hf_ratio"] = ours.bytes_per_second / found.bytes_per_second
            row |= memory_of("hf", ours.case, their_memory[ours.side.dtype])
            if {"ours_beyond_bytes", "hf_beyond_bytes"} <= row.keys():
                row["hf_memory_ratio"] = row["ours_beyond_bytes"] / row["hf_beyond_bytes"]
        elif ours.case in theirs_at:
            row["hf_reason"] = their_memory[ours.side.dtype].reason
        loaded = theirs.get(("float32", ours.case))
        if loaded is not None:
            row["hf_fp32_ratio"] = ours.bytes_per_second / loaded.bytes_per_second
            in_fp32 = memory_of("hf", ours.case, their_memory["float32"])
            if "ours_beyond_bytes" in row and "hf_beyond_bytes" in in_fp32:
                row["hf_fp32_memory_ratio"] = row["ours_beyond_bytes"] / in_fp32["hf_beyond_bytes"]
        rows.append(row)
    return rows


def compare_with_tokens(bench: Bench, config: str, case: Case, tokens: Any) -> list[Row]:
    """Ours with entropies worked out before, and with one row a step also in it, beside token models of as many FLOPs."""
    from train_sides import Ours, Tokens, sized

    pairs = []
    for mode in bench.modes:
        ours = Ours(sized(config), mode)
        flops = ours.flops(case[0])
        for precomputed in (True, False)[: 2 if case[1] == 1 else 1]:
            wanted = flops.network if precomputed else flops.training / 3
            side = Tokens(tokens, ours.models.config.latent, wanted, case[0], mode)
            stretch = max(bench.plan.stretch_bytes, STEPS_IN_A_ROW * case[0] * case[1])
            entered = bench.enter(ours, case, precomputed=precomputed, stretch_bytes=stretch)
            theirs = Contestant(side, case, tokens, bench.turns(case), stretch)
            theirs.step(seed=0)
            pairs.append((mode, entered, theirs))
    peaks = take_turns([one for _, entered, theirs in pairs for one in (entered, theirs)])
    rows = []
    for mode, entered, theirs in pairs:
        row = row_of("tokens", config, entered, mode, peaks)
        row["token_bytes_per_second"] = theirs.bytes_per_second
        row["token_ratio"] = entered.bytes_per_second / theirs.bytes_per_second
        row["token_flops_ratio"] = row["training_flops_per_byte"] / (3 * theirs.side.flops(case[0]))
        row |= {f"token_{name}": getattr(theirs.side.config, name) for name in ("num_layers", "width", "ffn_width")}
        rows.append(row | {"token_vocabulary": tokens.vocabulary, "bytes_per_token": tokens.bytes_per_token})
    return rows


def compare_tables(bench: Bench, config: str, case: Case) -> list[Row]:
    """Ours with hash tables of few rows and of many."""
    from train_sides import Ours, sized

    from blt.flops import training_bytes

    few, many = bench.plan.table_rows
    shown = {
        "comparison": "tables",
        "config": config,
        "row_bytes": case[0],
        "rows_per_step": case[1],
        "table_rows": many,
    }
    needed = sum(training_bytes(sized(config, table_rows)) for table_rows in (few, many))
    available = available_bytes()
    if available is not None and needed > SHARE * available:
        reason = f"AdamW takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
        return [{**shown, "reason": reason}]
    rows = []
    for mode in bench.modes:
        memory = {size: bench.memory("ours", config, mode, [case], size) for size in (few, many)}
        entered = {size: bench.enter(Ours(sized(config, size), mode), case) for size in (few, many)}
        peaks = take_turns(list(entered.values()))
        for size, ours in entered.items():
            row = row_of("tables", config, ours, mode, peaks) | memory_of("ours", case, memory[size])
            rows.append(row | {"table_cost_ratio": entered[few].bytes_per_second / ours.bytes_per_second})
    return rows


def require_packages(only: Sequence[str]) -> None:
    """Raises ValueError for a package that one of these comparisons needs, before minutes are spent on another."""
    from bpe import missing

    for comparison, package in (("huggingface", "transformers"), ("tokens", "tokenizers")):
        if comparison in only and importlib.util.find_spec(package) is None:
            raise ValueError(missing(package))


def modes_of(dtypes: Sequence[str], options: dict[str, Any]) -> "list[Mode]":
    """One for each dtype."""
    from train_sides import Mode

    modes = [Mode(dtype, options) for dtype in dtypes]
    # what cannot be is said before anything is measured, and auto means the same all the way
    return [replace(mode, dtype=mode.training(512, 1).dtype) for mode in modes]


def measure(plan: Plan, only: Sequence[str], data: str, modes: "list[Mode]", command: str) -> dict[str, Any]:
    """All of it: machine, command, rows, summary."""
    import torch
    from bpe import learn
    from train_sides import Text, TokenText, sized

    from blt.flops import parameter_counts

    machine, rows = facts(), []
    bench = Bench(plan, Text.read(data, plan.text_bytes), modes, torch.get_num_threads())
    configs = [config for part in only for config, _ in getattr(plan, part)]
    parameters = {f"parameters_{config}": parameter_counts(sized(config))["total"] for config in dict.fromkeys(configs)}
    summary: dict[str, Any] = {"growth_from": GROWTH_FROM, **parameters}
    if "huggingface" in only:
        for config, cases in plan.huggingface:
            rows += compare_with_huggingface(bench, config, cases)
    if "tokens" in only:
        say(f"a BPE of {plan.vocabulary:,} ids is learnt from {data}")
        tokens = TokenText(bench.text, learn([bench.text.data.decode("utf-8", "replace")], plan.vocabulary))
        for config, case in plan.tokens:
            say(f"{config}: token models, {case[1]} x {case[0]} bytes")
            rows += compare_with_tokens(bench, config, case, tokens)
    if "tables" in only:
        for config, case in plan.tables:
            rows += compare_tables(bench, config, case)
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    summary["seconds"] = round(time.perf_counter() - BEGIN)
    return {"machine": machine, "command": command, "rows": [rounded(row) for row in rows], "summary": summary}


def option(text: str) -> tuple[str, Any]:
    """``key=value`` in TOML's notation; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"--set wants key=value, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("train.py", __doc__, quick="a minute or two: the small config, fewer cases")
    parser.add_argument("--data", metavar="PATH", default="stdlib", help="text to learn from (%(default)s)")
    parser.add_argument("--dtype", nargs="+", metavar="D", default=["auto"], help="auto, float32, bfloat16 (auto)")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", type=option, default=[], help="of [training], of ours")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=COMPARISONS, help="these comparisons")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    plan = TINY if options.size == "tiny" else QUICK if options.quick else FULL
    command = " ".join(["python benchmarks/train.py", *given])
    try:
        require_packages(options.only)
        modes = modes_of(options.dtype, dict(options.set))
        result = measure(plan, options.only, options.data, modes, command)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    publish(result, COLUMNS, options.json, options.out)


if __name__ == "__main__":
    main()
