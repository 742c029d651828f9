"""What every benchmark says about the machine that it ran on, and how it hands its rows over."""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
READ_BYTES = 512 * 2**20  # in one pass of the bandwidth measurement: far more than any cache holds


def facts() -> dict[str, Any]:
    """Processor, threads, versions, and how busy the machine is as the run begins."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "tokenizers": _version("tokenizers"),
        "tiktoken": _version("tiktoken"),
        "load_at_begin": round(os.getloadavg()[0], 2),
    }


def read_bandwidth(compiled: bool) -> float:
    """Bytes per second that all threads together read from memory: the best that any of several ways shows."""
    import torch

    numbers = torch.ones(READ_BYTES // 4)
    matrix, states = numbers.view(-1, 4096), torch.ones(4096)
    ways: list[Callable[[], Any]] = [numbers.sum, numbers.max, lambda: numbers.dot(numbers)]
    if compiled:
        product = _compiled_product()
        ways.append(lambda: product(matrix, states))
    with torch.no_grad():
        return READ_BYTES / min(_fastest(way) for way in ways)


@functools.cache
def _compiled_product() -> Callable[..., Any]:
    import torch

    return torch.compile(lambda matrix, states: (matrix * states).sum(-1))


def _fastest(action: Callable[[], Any], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def resident_rise(action: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rose above where it stood while the action ran; None where the system hides it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory_line("VmRSS")
    except (OSError, AttributeError, LookupError):
        action()
        return None
    action()
    return _memory_line("VmHWM") - before


def resident_bytes(process: int | str = "self") -> int | None:
    """What a process holds in memory now; None where the system hides it, or where the process has ended."""
    try:
        return _memory_line("VmRSS", process)
    except (OSError, StopIteration):
        return None


def available_bytes() -> int | None:
    """Memory that new work can have without swapping; None where the system hides it.

    What this process has freed is given back first, which training does not do.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _memory_line(name: str, process: int | str = "self") -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def say(line: str) -> None:
    """A line of progress on stderr, with the seconds since the script began."""
    print(f"{time.perf_counter() - BEGIN:4.0f} s  {line}", file=sys.stderr, flush=True)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Six digits are more than any figure here is good for, and a small one is not rounded to nothing."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def parser_of(name: str, about: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; ``about`` is the script's own docstring."""
    first, _, more = (about or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        name, description=first, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object here, too")
    return parser


def publish(result: dict[str, Any], columns: dict[str, str], as_json: bool, out: Path | None) -> None:
    """The result on stdout, as one JSON object or as a table of these row keys under these headings; as JSON in ``out``."""
    text = json.dumps(result, indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", "utf-8")
    if as_json:
        print(text)
        return
    from rich.console import Console
    from rich.table import Table

    shown = {key: heading for key, heading in columns.items() if any(key in row for row in result["rows"])}
    table = Table(*shown.values(), caption=result["command"])
    for row in result["rows"]:
        table.add_row(*(_cell(row.get(key, "")) for key in shown))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
    for part in ("summary", "machine"):
        console.print(f"{part}: " + ", ".join(f"{key} {_cell(value)}" for key, value in result[part].items()))


def _cell(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if _number(value)
        else str(value)
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
