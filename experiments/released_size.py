"""How much memory does a model of the released 1b's size take to convert and to write with, on a CPU?

Writes a folder in the official format with random bf16 weights (9.3 GB), converts it, and generates from both. Each command
is a process of its own; its peak is its largest resident set, pages mapped from the disk included. Takes 20 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from blt.config_file import read_run_config
from blt.model_card import ModelCard
from blt.model_files import StoredModel, convert, weight_shapes, write_model
from blt.weights_file import Weight

THRESHOLD = "model.patching.threshold_nats=1.335442066192627"
BLOCK_ROWS = 8192


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Weight:
    """Normal numbers, in pieces; a large table repeats a block of them, shifted."""

    def pieces() -> Iterator[torch.Tensor]:
        if len(shape) == 1:
            yield torch.ones(shape, dtype=torch.bfloat16)
            return
        scale = 0.02 if "embedding" in name else shape[1] ** -0.5
        rows = min(BLOCK_ROWS, shape[0])
        block = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed)).mul_(scale).bfloat16()
        for begin in range(0, shape[0], rows):
            yield block.roll(begin % 977, 0)[: shape[0] - begin]

    return Weight(torch.bfloat16, shape, pieces)


def peak_gigabytes(*arguments: object) -> tuple[float, float]:
    """Of a command: its largest resident set, and seconds."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "blt", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"blt {arguments[0]} failed")
    return usage.ru_maxrss * 1024 / 1e9, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/released_size"), help="a new folder, removed at the end"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "released_size.json")
    options = parser.parse_args()
    first, official, hf = (options.work / name for name in ("first", "official", "hf"))
    config = read_run_config("blt_1b", [THRESHOLD]).model
    shapes = weight_shapes(config)
    weights = {name: random_weight(name, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    write_model(first, StoredModel(config, weights), ModelCard())
    convert(first, official, "official")
    shutil.rmtree(first)
    prompt = ["my name is", "--max-bytes", 20]
    commands = {
        "convert": ["convert", official, hf],
        "generate, hf, float32": ["generate", hf, *prompt],
        "generate, hf, bfloat16": ["generate", hf, *prompt, "--dtype", "bfloat16"],
        "generate, official, float32": ["generate", official, *prompt],
        "generate, official, bfloat16": ["generate", official, *prompt, "--dtype", "bfloat16"],
    }
    rows = []
    for name, arguments in commands.items():
        peak, seconds = peak_gigabytes(*arguments)
        rows.append({"command": name, "peak_gigabytes": round(peak, 2), "seconds": round(seconds)})
        print(rows[-1], flush=True)
    parameters = sum(weight.num_bytes // 2 for weight in weights.values())
    results = {"command": "python experiments/released_size.py", "parameters": parameters, "rows": rows}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
