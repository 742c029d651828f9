"""Is a Byte Latent Transformer as good as a token model, at equal training FLOPs per byte and equal bytes?

Contenders learn from the same text in one pass and are scored on text by others, in bits per byte. Every run is kept in --work:
one that was cut goes on, one that is done is read, and the results hold all that are done.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from claim import BUDGETS, Plan, do, options, subplots, write
from contenders import CONTENDERS, LARGE_CONTENDERS, LARGE_FLOPS, REFERENCE_FLOPS
from texts import MIXES


def plans(budget: str, seeds: int) -> Iterator[Plan]:
    """From an hour on fewer and larger ones: what half an hour of text is worth does not fit into the small."""
    large = BUDGETS[budget] >= BUDGETS["hour"]
    flops = LARGE_FLOPS if large else REFERENCE_FLOPS
    for seed in range(seeds):
        for mix in ("english", "multilingual") if large else MIXES:
            for name, contender in (LARGE_CONTENDERS if large else CONTENDERS).items():
                if mix == "multilingual" and contender.width == 128:  # shorter tokens there, and a dearer head
                    contender = contender.but(width=96)
                yield Plan(name, contender, mix, seed, BUDGETS[budget], flops)


def table(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Bits per byte, the mean of the seeds: by mix, then by contender."""
    means: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        means.setdefault(run["mix"], {}).setdefault(run["name"], []).append(run["mean_bits_per_byte"])
    return {mix: {name: sum(bits) / len(bits) for name, bits in of.items()} for mix, of in means.items()}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A bar per contender and mix; each seed is a dot."""
    means = table(runs)
    figure, panels = subplots(1, len(means), figsize=(3.4 * len(means), 3.8), squeeze=False)
    for axes, (mix, of) in zip(panels[0], means.items(), strict=True):
        names = [name for name in CONTENDERS if name in of]
        colours = [
            "tab:blue" if name == "BLT, entropy" else "tab:orange" if name == "BPE" else "lightgrey" for name in names
        ]
        axes.bar(names, [of[name] for name in names], color=colours)
        for run in runs:
            if run["mix"] == mix:
                axes.plot(run["name"], run["mean_bits_per_byte"], "k.", markersize=4)
        axes.set_ylim(0.9 * min(of.values()), 1.02 * max(of.values()))
        axes.set_title(mix, fontsize=10)
        axes.tick_params(axis="x", rotation=60)
    panels[0][0].set_ylabel("held-out bits per byte")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "as_good_as_tokens")
    chosen = parser.parse_args()

    def found(runs: list[dict[str, Any]]) -> None:
        write(chosen.out, {"budget": chosen.budget, "bits_per_byte": table(runs), "runs": runs})
        draw(runs, chosen.out.with_suffix(".png"))

    try:
        do(plans(chosen.budget, chosen.seeds), chosen, found)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
