"""How far memory rises above weights and optimiser state while one side of ``train.py`` makes a step, in a fresh process.

The child makes a step on a short row first, so that the optimiser's state exists, then one step per case, and prints what
each cost. Gradients and activations are in the rise on both sides; whatever the allocator kept is given back before.
A child that grows beyond what the machine has, or takes too long, is ended: the cases it finished count.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import available_bytes, resident_bytes, resident_rise

SHORT_ROW = 64
POLL_SECONDS = 0.1
SHARE = 0.9  # of the memory that is available when the child begins


@dataclass(frozen=True)
class Request:
    """What a child is asked to do."""

    side: str  # ours, hf
    config: str
    mode: dict[str, Any]
    cases: tuple[tuple[int, int], ...]  # bytes of a row, rows
    text: str  # a file of bytes
    threads: int
    table_rows: int | None = None


@dataclass(frozen=True)
class Memory:
    """What a step took."""

    kept_bytes: int  # weights and optimiser state
    beyond_bytes: int  # the rise above them while the step ran
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.kept_bytes + self.beyond_bytes


@dataclass(frozen=True)
class Measured:
    """The cases that a child finished, and why it did not finish the others."""

    cases: dict[tuple[int, int], Memory]
    reason: str = ""


def measure_in_child(request: Request, text: bytes, seconds: float, limit_bytes: int | None = None) -> Measured:
    """What each case takes, as far as memory (``limit_bytes``; absent: nine tenths of what is available) and time allow."""
    available = available_bytes()
    if limit_bytes is None and available is not None:
        limit_bytes = int(SHARE * available)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "out").open("w+") as out:
        file = Path(folder) / "text"
        file.write_bytes(text)
        asked = json.dumps({**asdict(request), "text": str(file)})
        child = subprocess.Popen([sys.executable, __file__, asked], stdout=out, stderr=subprocess.PIPE, text=True)
        reason, deadline = "", time.perf_counter() + seconds
        try:
            while child.poll() is None and not reason:
                time.sleep(POLL_SECONDS)
                resident = resident_bytes(child.pid)
                if limit_bytes is not None and resident is not None and resident > limit_bytes:
                    reason = f"a step takes more than the {limit_bytes / 1e9:.1f} GB that were available"
                elif time.perf_counter() > deadline:
                    reason = f"not done after {seconds:.0f} seconds"
        finally:
            child.kill()
            _, errors = child.communicate()
        if not reason and child.returncode:
            reason = f"ended with code {child.returncode}: {(errors.strip().splitlines() or ['nothing said'])[-1]}"
        out.seek(0)
        found = [json.loads(line) for line in out.read().splitlines() if line.endswith("}")]
    return Measured({tuple(one["case"]): Memory(**one["memory"]) for one in found}, reason)


def measure(request: Request) -> Iterator[tuple[tuple[int, int], Memory]]:
    """The child's part: each case, after a short step."""
    import torch
    from train_sides import HuggingFaceBlt, Mode, Ours, Text, sized

    torch.set_num_threads(request.threads)
    text, mode = Text(Path(request.text).read_bytes()), Mode(**request.mode)
    ours = Ours(sized(request.config, request.table_rows), mode)
    side: Any = ours if request.side == "ours" else HuggingFaceBlt(ours.models, mode)

    for case in ((SHORT_ROW, 1), *request.cases):
        drawn = text.rows(*case, seed=0)
        side.set_threshold(ours.threshold_for(drawn))
        if case[0] == SHORT_ROW:
            side.step(drawn)  # the optimiser's state is not the step's
        made: list[Any] = []
        rise = resident_rise(lambda drawn=drawn, made=made: made.append(side.step(drawn)))
        if rise is not None and case in request.cases:
            yield case, Memory(side.kept_bytes(), rise, made[0].seconds)


def main(arguments: Sequence[str]) -> None:
    asked = json.loads(arguments[0])
    cases = tuple((row_bytes, rows) for row_bytes, rows in asked.pop("cases"))
    for case, memory in measure(Request(cases=cases, **asked)):
        print(json.dumps({"case": case, "memory": asdict(memory)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
