"""What the commands share: their common options, and how they print."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from blt.progress import Reporter

FROM_STDIN = "\0-"  # what main makes of a lone hyphen, which cyclopts takes for an option; no argument can hold a NUL
Paths = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Options of every command."""

    json: Annotated[bool, Parameter(negative=())] = False
    "Print one JSON object on stdout and nothing else there."
    quiet: Annotated[bool, Parameter(negative=())] = False
    "No progress."
    debug: Annotated[bool, Parameter(negative=())] = False
    "Show the traceback of an error."


@Parameter(name="*")
@dataclass(frozen=True)
class Options(Output):
    """Options of every command that runs a model."""

    device: str = "auto"
    "auto, cpu, cuda or mps."
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    "Of weights (int8: rounded, to generate), or of products in training. auto: bfloat16 on CUDA, measured in training."
    seed: int | None = None
    "Of everything that is drawn at random; default: the config's, else 0."


def reporter_for(options: Output) -> "Reporter":
    """Progress on stderr, as the options want it."""
    from blt.progress import Reporter

    return Reporter(options.quiet)


def print_json(figures: dict[str, Any]) -> None:
    """The one object on stdout."""
    print(json.dumps(figures))


def print_flops(counted: dict[str, Any]) -> None:
    """What ``blt.flops`` counted, as tables."""
    from rich.console import Console

    from blt.flops import tables

    console = Console()
    for table in tables(counted):
        console.print(table)


def print_tasks(figures: dict[str, dict[str, float]]) -> None:
    """The figures of tasks, a row each."""
    from rich.console import Console
    from rich.table import Table

    metrics = [*dict.fromkeys(metric for of_task in figures.values() for metric in of_task if metric != "documents")]
    table = Table("task", box=None)
    for heading in (*metrics, "documents"):
        table.add_column(heading, justify="right")
    for name, of_task in figures.items():
        shown = [f"{of_task[metric]:.4g}" if metric in of_task else "" for metric in metrics]
        table.add_row(name, *shown, f"{of_task.get('documents', 0):,}")
    Console().print(table)
