"""What an update of hash tables costs, however many rows they have: as wide as the 1B model's, in bf16.

    python benchmarks/tables.py [--quick] [--json] [--out FILE] [--data PATH]

Six tables of 1,024 numbers a row, of few rows and of the 500,002 that the 1B model has, take turns in one process. A step
looks the n-grams of 4,096 bytes of real text up, forms the gradient of their sums, clips it and updates the rows that were
read, as ``blt train`` does with ``table_dtype = "bfloat16"``; there is no network around it. A figure is the median of its
steps. `touched_bytes`: what a step reads and writes of weights and both moments, in bf16; `kept_bytes`: all of them.
`cost_ratio`: seconds of a step over those with few rows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from machine import BEGIN, available_bytes, facts, parser_of, publish, rounded, say

WIDTH, TABLES, BYTES, STEPS, WARM_STEPS = 1024, 6, 4096, 15, 5
ROWS = (5_000, 500_002)
QUICK_ROWS = (5_000, 50_000)
TINY_ROWS = (50, 500)
SHARE = 0.9  # of the memory that is available
COLUMNS = {
    **{"table_rows": "table rows", "rows_touched": "rows touched", "ms": "ms a step", "cost_ratio": "cost / few rows"},
    **{"touched_bytes": "bytes touched", "kept_bytes": "bytes kept", "reason": "absent as"},
}


class Tables:
    """Hash tables in bf16 that are updated on their own, and the moments of their rows."""

    def __init__(self, table_rows: int, width: int) -> None:
        import torch

        from blt.config import HashEmbeddingsConfig
        from blt.model.hash_embeddings import HashEmbeddings
        from blt.row_adamw import RowAdamW

        config = HashEmbeddingsConfig(table_rows=table_rows)
        with torch.device("meta"):
            empty = HashEmbeddings(config, width).to(torch.bfloat16)
        self.embeddings = empty.to_empty(device="cpu")
        weight = self.embeddings.tables.weight
        weight.detach().zero_()
        self.optimizer = RowAdamW([{"params": [weight], "by_row": True}], lr=1e-3, weight_decay=0.0, fused=True)
        self.direction = torch.randn(BYTES, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.seconds: list[float] = []
        self.rows_touched = 0

    def step(self, ids: Any, timed: bool) -> None:
        from blt.row_adamw import clip_gradients

        weight, started = self.embeddings.tables.weight, time.perf_counter()
        self.embeddings(ids)[0].backward(self.direction[: ids.shape[1]])
        clip_gradients([weight], 1.0)
        self.optimizer.step()
        assert weight.grad is not None
        self.rows_touched = weight.grad._values().shape[0]
        self.optimizer.zero_grad(set_to_none=True)
        if timed:
            self.seconds.append(time.perf_counter() - started)
        else:  # moments begin as memory that nobody has touched; all of it is in use before long
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment].mul_(1)

    @property
    def ms(self) -> float:
        return 1000 * statistics.median(self.seconds)


def measure(sizes: Sequence[int], width: int, data: str, command: str) -> dict[str, Any]:
    """All of it: machine, command, rows, summary."""
    from train_sides import Text

    from blt.processor import keep_freed_memory

    keep_freed_memory()
    machine, kept = facts(), [3 * 2 * TABLES * rows * width for rows in sizes]
    available = available_bytes()
    if available is not None and sum(kept) > SHARE * available:
        reason = f"they take {sum(kept) / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
        return {
            "machine": machine,
            "command": command,
            "rows": [{"table_rows": sizes[-1], "reason": reason}],
            "summary": {},
        }
    text = Text.read(data, 1_000_000)
    sides = []
    for rows in sizes:
        say(f"{TABLES} tables of {rows:,} x {width} in bf16")
        sides.append(Tables(rows, width))
    for step in range(WARM_STEPS + STEPS):
        ids = text.rows(BYTES, 1, seed=step)[:, :-1]
        for side in sides:
            side.step(ids, timed=step >= WARM_STEPS)
    found = [
        {
            "table_rows": rows,
            "rows_touched": side.rows_touched,
            "ms": side.ms,
            "cost_ratio": side.ms / sides[0].ms,
            "touched_bytes": side.rows_touched * width * 2 * 3 * 2,
            "kept_bytes": bytes_kept,
        }
        for rows, side, bytes_kept in zip(sizes, sides, kept, strict=True)
    ]
    summary = {
        "tables": TABLES,
        "width": width,
        "dtype": "bfloat16",
        "bytes_per_step": BYTES,
        "seconds": round(time.perf_counter() - BEGIN),
    }
    return {"machine": machine, "command": command, "rows": [rounded(row) for row in found], "summary": summary}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("tables.py", __doc__, quick="a tenth of the rows")
    parser.add_argument(
        "--data", metavar="PATH", default="stdlib", help="text whose n-grams are looked up (%(default)s)"
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    sizes = TINY_ROWS if options.size == "tiny" else QUICK_ROWS if options.quick else ROWS
    width = 8 if options.size == "tiny" else WIDTH
    try:
        result = measure(sizes, width, options.data, " ".join(["python benchmarks/tables.py", *given]))
    except (ValueError, OSError) as error:
        sys.exit(f"tables.py: {error}")
    publish(result, COLUMNS, options.json, options.out)


if __name__ == "__main__":
    main()
