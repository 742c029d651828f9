"""What the scripts of all claims share: their options, the list of runs to do, and the file of results."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import HERE, Contender, machine, run
from texts import mixed, paths_of

BUDGETS = {
    "smoke": 100_000,
    "minutes": 15_000_000,
    "hour": 50_000_000,
    "longer": 200_000_000,
}  # bytes that a run learns from
ABOUT = ("train_bytes", "train_flops", "inference_flops_per_byte", "machine")
HELD_OUT_BYTES = {"smoke": 40_000, "minutes": 300_000, "hour": 300_000, "longer": 1_000_000}


@dataclass(frozen=True)
class Plan:
    """One run to do: a contender by its name, a text mix, a seed."""

    name: str
    contender: Contender
    mix: str
    seed: int
    train_bytes: int
    flops: float  # per byte, forward

    @property
    def label(self) -> str:
        """What ``--only`` looks into."""
        return f"{self.mix}, {self.name}, seed {self.seed}"

    def folder(self, work: Path) -> Path:
        size = f"{self.train_bytes / 1e6:g}MB.{self.flops / 1e6:.2f}MF"
        return work / "runs" / self.mix / size / f"{self.name.replace(', ', '.').replace(' ', '_')}.{self.seed}"


def options(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments of every claim's script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/ and eval/")
    parser.add_argument(
        "--budget", choices=tuple(BUDGETS), default="smoke", help="smoke: 5 minutes in all; minutes, hour: a run"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="runs whose labels, as they are printed, hold one of these")
    parser.add_argument("--dtype", default="auto", help="of matrix products: auto (measured), float32, bfloat16")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="where runs are kept, and found again")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return parser


def is_large(budget: str) -> bool:
    """Whether its models are those of four times the FLOPs: what an hour's text is worth does not fit into the small."""
    return BUDGETS[budget] >= BUDGETS["hour"]


def train_text(chosen: argparse.Namespace, mix: str, num_bytes: int) -> Path:
    """The text that all contenders learn from."""
    file = chosen.work / "texts" / f"{mix}.train.{num_bytes}.jsonl"
    return mixed(paths_of(chosen.data, mix, "train"), num_bytes, file)


def test_texts(chosen: argparse.Namespace, mix: str) -> dict[str, Path]:
    """The held-out text of a mix, one for each of its sources, of equal size."""
    paths, num_bytes = paths_of(chosen.data, mix, "test"), HELD_OUT_BYTES[chosen.budget]
    share = num_bytes // len(paths)
    return {
        path.name.split(".jsonl")[0].split(".txt")[0]: mixed(
            [path], share, chosen.work / "texts" / f"{path.name}.{share}.jsonl"
        )
        for path in paths
    }


def do(plans: Iterable[Plan], chosen: argparse.Namespace, found: Callable[[list[dict[str, Any]]], None]) -> None:
    """Do all runs that are not done; ``found`` hears of all that are after each."""
    plans = list(plans)
    for plan in plans:
        if chosen.only and not any(words in plan.label for words in chosen.only):
            continue
        text, held_out = train_text(chosen, plan.mix, plan.train_bytes), test_texts(chosen, plan.mix)
        figures = run(plan.contender, text, held_out, plan.folder(chosen.work), plan.flops, plan.seed, chosen.dtype)
        mean = mean_bits(figures)
        print(f"{plan.label}, {figures['train_bytes']:,} bytes: {mean:.4f}", flush=True)
        found(done(plans, chosen.work, chosen))


def done(plans: Iterable[Plan], work: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """What is known of those runs that are done: kept in ``work``, or, if a run's folder is not here, told by the results."""
    told, known = results_before(chosen.out).get("runs", []), []
    for plan in plans:
        file = plan.folder(work) / "result.json"
        figures = json.loads(file.read_text()) if file.exists() else None
        if figures is not None and chosen.dtype in ("auto", figures["training"]["dtype"]):
            known.append({"mix": plan.mix, "name": plan.name, "mean_bits_per_byte": mean_bits(figures), **figures})
        else:
            known += [run for run in told if is_of(run, plan, chosen.dtype)][:1]
    return known


def results_before(out: Path) -> dict[str, Any]:
    """What the file of results says so far; nothing if there is none."""
    return json.loads(out.read_text()) if out.exists() else {}


def about(plan: Plan, work: Path) -> dict[str, Any]:
    """What a model is that other scripts than that of its own claim measure, as their results say it."""
    figures = json.loads((plan.folder(work) / "result.json").read_text())
    return {"name": plan.name, "seed": plan.seed} | {name: figures[name] for name in ABOUT}


def models_before(chosen: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """Of results with a list of models: those of the same budget and dtype, by name and seed, whose runs may be elsewhere."""
    before = results_before(chosen.out)
    same = (before.get("budget"), before.get("dtype")) == (chosen.budget, chosen.dtype)
    return {(model["name"], model["seed"]): model for model in before["models"]} if same else {}


def is_of(run: Mapping[str, Any], plan: Plan, dtype: str) -> bool:
    """Whether this run is the planned one. A run learns from a little less than its text, of which 1% is held out, and its
    FLOPs are those of the patches that it got.
    """
    same = (run["mix"], run["name"], run["seed"]) == (plan.mix, plan.name, plan.seed)
    near = (run["train_bytes"] / plan.train_bytes, run["inference_flops_per_byte"] / plan.flops)
    return same and dtype in ("auto", run["training"]["dtype"]) and all(abs(ratio - 1) < 0.15 for ratio in near)


def mean_bits(figures: Mapping[str, Any]) -> float:
    """Over the held-out texts of a mix, each with the same weight."""
    bits = figures["bits_per_byte"].values()
    return sum(bits) / len(bits)


def write(out: Path, content: Mapping[str, Any]) -> None:
    """The results, with the command that makes all of them: without the ``--only`` of one that did a part, which comes last."""
    arguments = sys.argv[1 : sys.argv.index("--only") if "--only" in sys.argv else None]
    command = " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *arguments])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": command, "machine": machine(), **content}, indent=2) + "\n")


def subplots(*rows_and_columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure that is drawn into a file, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*rows_and_columns, **options)
