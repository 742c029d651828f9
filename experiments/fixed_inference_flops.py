"""Do larger patches with a larger latent transformer scale better, at the same inference FLOPs per byte?

Patches of 4, 6 and 8 bytes, each with the latent transformer that brings the whole model to the same FLOPs per byte, a token
model of as many, and a Byte Latent Transformer of half as many learn from three amounts of text.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from claim import Plan, do, done, is_large, options, results_before, subplots, test_texts, write
from contenders import (
    CONTENDERS,
    LARGE_BPE,
    LARGE_FLOPS,
    LARGE_LOCAL,
    LARGE_PAPER_BLT,
    PAPER_BLT,
    REFERENCE_FLOPS,
    ROW_BYTES,
    Contender,
    documents_of,
    load,
    scores,
)
from token_transformer import TokenModel

from blt.flops import flops_per_byte, token_model_flops_per_byte

POINTS = {
    "smoke": (30_000, 60_000, 120_000),
    "minutes": (2_000_000, 6_000_000, 15_000_000),
    "hour": (5_000_000, 15_000_000, 50_000_000),
    "longer": (20_000_000, 60_000_000, 200_000_000),
}
# Latent widths by patch size, wider where a latent step has more to spend
LATENT_WIDTHS = {4: 128, 6: 160, 8: 192}
LARGE_LATENT_WIDTHS = {4: 256, 6: 320, 8: 384}
TIMED_BYTES, TURNS = 40_000, 9
MEASURED = ("bytes_per_second", "held_out_flops_per_byte")  # of the runs of most text, once all are here
HALF = "BLT of half the FLOPs"


def contenders(large: bool = False) -> dict[str, Contender]:
    """By name; all but one are brought to the same FLOPs. One layer in each local part: what is asked is about latents."""
    blt = LARGE_PAPER_BLT.but(model__local_decoder={**LARGE_LOCAL, "window_positions": 512}) if large else PAPER_BLT
    of_patches = {
        f"BLT, patches of {size}": blt.but(
            calibration__target_patch_bytes=float(size),
            model__latent__width=width,
            model__latent__num_heads=max(2, width // 64),
            model__latent__ffn_width=width * 11 // 4,
        )
        for size, width in (LARGE_LATENT_WIDTHS if large else LATENT_WIDTHS).items()
    }
    # local parts of about half the FLOPs, too
    local = {"num_layers": 1, "width": 64, "num_heads": 1, "ffn_width": 64, "window_positions": 64}
    if not large:
        local |= {"width": 32, "ffn_width": 88, "window_positions": 32}
    half = blt.but(
        calibration__target_patch_bytes=6.0,
        model__local_encoder=local,
        model__local_decoder={**local, "window_positions": 512} if large else local,
    )
    return {**of_patches, "BPE": LARGE_BPE if large else CONTENDERS["BPE"], HALF: half}


def plans(budget: str, seeds: int) -> Iterator[Plan]:
    """From an hour on of models of four times the FLOPs."""
    large = is_large(budget)
    for seed in range(seeds):
        for num_bytes in POINTS[budget]:
            for name, contender in contenders(large).items():
                flops = (LARGE_FLOPS if large else REFERENCE_FLOPS) / (2 if name == HALF else 1)
                yield Plan(name, contender, "english", seed, num_bytes, flops)


def bytes_per_second(folders: Mapping[str, Path], text: Path) -> dict[str, float]:
    """How fast each reads held-out text, in windows that overlap by half; they take turns, and the median of nine counts."""
    models = {name: load(folder) for name, folder in folders.items()}
    excerpt = b"\n".join(documents_of(text))[:TIMED_BYTES]
    excerpt = excerpt.decode("utf-8", "ignore").encode()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            begin = time.perf_counter()
            scores(model, [excerpt])
            seconds[name].append(time.perf_counter() - begin)
    return {name: len(excerpt) / sorted(of)[TURNS // 2] for name, of in seconds.items()}


def held_out_flops(folder: Path) -> float:
    """A run's FLOPs per byte of the held-out texts, whose patches and tokens are not as long as those of training."""
    model, units = load(folder), json.loads((folder / "result.json").read_text())["unit_bytes"].values()
    if isinstance(model, TokenModel):
        of_each = [token_model_flops_per_byte(model.config, ROW_BYTES, unit, model.num_ids) for unit in units]
    else:
        of_each = [flops_per_byte(model.config, unit, ROW_BYTES).inference for unit in units]
    return sum(of_each) / len(of_each)


def crossings(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    """From how many bytes of training on each is better than patches of 4: see ``crossing``."""
    ours, *others = contenders()
    return {name: crossing(curve(runs, ours), curve(runs, name)) for name in others if curve(runs, name)}


def curve(runs: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Bits per byte, the mean of the seeds, by bytes of training, in their order."""
    points: dict[int, list[float]] = {}
    for run in runs:
        if run["name"] == name:
            points.setdefault(run["train_bytes"], []).append(run["mean_bits_per_byte"])
    return {num_bytes: sum(bits) / len(bits) for num_bytes, bits in sorted(points.items())}


def crossing(first: Mapping[int, float], second: Mapping[int, float]) -> float | str:
    """Where the second curve falls below the first and stays there, between two points on straight lines in the logarithm of
    bytes; of points that both have.

    >>> crossing({10: 2.0, 1000: 1.0}, {10: 2.1, 1000: 0.9})
    100.0
    >>> crossing({10: 2.0, 1000: 1.0}, {10: 2.1, 1000: 1.1}), crossing({10: 2.0, 1000: 1.0}, {10: 1.9, 1000: 0.8})
    ('not below', 'below from the first point on')
    """
    gaps = [(num_bytes, second[num_bytes] - bits) for num_bytes, bits in first.items() if num_bytes in second]
    if all(gap < 0 for _, gap in gaps):
        return "below from the first point on"
    if not gaps or gaps[-1][1] >= 0:
        return "not below"
    (before, gap), (after, next_gap) = next(pair for pair in reversed([*pairwise(gaps)]) if pair[0][1] >= 0)
    return round(before * (after / before) ** (gap / (gap - next_gap)), 6)


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out bits per byte against bytes of training, and how far they are above those of patches of 4."""
    figure, (left, right) = subplots(1, 2, figsize=(11, 4.2))
    base = curve(runs, next(iter(contenders())))
    for name in contenders():
        points = curve(runs, name)
        line = {"marker": "o", "markersize": 4, "label": name}
        left.plot([num_bytes / 1e6 for num_bytes in points], points.values(), **line)
        above = {
            num_bytes: 100 * (bits / base[num_bytes] - 1) for num_bytes, bits in points.items() if num_bytes in base
        }
        right.plot([num_bytes / 1e6 for num_bytes in above], above.values(), **line)
    places = [num_bytes / 1e6 for num_bytes in sorted({run["train_bytes"] for run in runs})]
    for axes, label in ((left, "held-out bits per byte"), (right, "% above patches of 4")):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:.1f}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel("training text, MB")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "fixed_inference_flops")
    chosen = parser.parse_args()
    wanted = list(plans(chosen.budget, chosen.seeds))

    def found(runs: list[dict[str, Any]], measured: Mapping[str, Mapping[str, float]] | None = None) -> None:
        measured = measured or {name: results_before(chosen.out).get(name, {}) for name in MEASURED}
        figures = {"below_patches_of_4_from_bytes_on": crossings(runs), **measured}
        write(chosen.out, {"budget": chosen.budget, **figures, "runs": runs})
        draw(runs, chosen.out.with_suffix(".png"))

    try:
        do(wanted, chosen, found)
    except FileNotFoundError as error:
        parser.error(str(error))
    last = POINTS[chosen.budget][-1]
    largest = {p.name: p.folder(chosen.work) for p in wanted if p.seed == 0 and p.train_bytes == last}
    if all((folder / "result.json").exists() for folder in largest.values()):
        speeds = bytes_per_second(largest, next(iter(test_texts(chosen, "english").values())))
        flops = {name: held_out_flops(folder) for name, folder in largest.items()}
        found(done(wanted, chosen.work, chosen), dict(zip(MEASURED, (speeds, flops), strict=True)))


if __name__ == "__main__":
    main()
