"""Is a Byte Latent Transformer as good as a token model, at equal training FLOPs per byte and equal bytes?

Contenders learn from the same text in one pass and are scored on text by others, in bits per byte. Every run is kept in --work:
one that was cut goes on, one that is done is read, and the results hold all that are done.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claim import BUDGETS, Plan, do, is_large, options, results_before, subplots, test_texts, write
from contenders import CONTENDERS, LARGE_CONTENDERS, LARGE_FLOPS, REFERENCE_FLOPS, documents_of, load, scores
from texts import MIXES

OURS = "BLT, entropy"
RESAMPLES = 1000


def plans(budget: str, seeds: int) -> Iterator[Plan]:
    """From an hour on fewer and larger ones."""
    large = is_large(budget)
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


def bits_by_document(folder: Path, held_out: Mapping[str, Path]) -> dict[str, list[float]]:
    """Of each held-out text; kept in the run's folder."""
    file = folder / "bits_by_document.json"
    if not file.exists():
        model = load(folder)
        bits = {name: [score.bits for score in scores(model, documents_of(path))] for name, path in held_out.items()}
        file.write_text(json.dumps(bits) + "\n")
    return json.loads(file.read_text())


def relative(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray]
) -> list[float]:
    """How far theirs is above ours, in per cent, and the interval that holds 95% of what other documents would have said.

    Each text's bits by document, and its documents' bytes. Documents are drawn anew with replacement, the same for both sides,
    as they differ much more from each other than the two sides do.

    >>> bits, sizes = {"a": np.array([1.0, 9.0])}, {"a": np.array([5, 5])}
    >>> relative(bits, {"a": 1.1 * bits["a"]}, sizes)
    [10.0, 10.0, 10.0]
    """
    chance, means = np.random.default_rng(0), np.zeros((2, 1 + RESAMPLES))
    draws = [{name: chance.integers(len(of), size=len(of)) for name, of in sizes.items()} for _ in range(RESAMPLES)]
    for name, size in sizes.items():
        chosen = np.stack([np.arange(len(size)), *(draw[name] for draw in draws)])  # the texts as they are first
        means += np.stack([side[name][chosen].sum(1) for side in (ours, theirs)]) / size[chosen].sum(1)
    above = 100 * (means[1] / means[0] - 1)
    return [round(float(value), 3) for value in (above[0], *np.quantile(above[1:], (0.025, 0.975)))]


def above_ours(wanted: Sequence[Plan], chosen: argparse.Namespace) -> dict[str, dict[str, dict[str, list[float]]]]:
    """``relative`` for each mix and contender, the mean of the seeds that both sides have: of all texts, and of each.

    It takes the models; for contenders whose runs are not here, what the results said before of these is kept.
    """
    before, names = results_before(chosen.out), {plan.name for plan in wanted}
    told = before.get("above_ours", {}) if before.get("budget") == chosen.budget else {}
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        mix: {name: above for name, above in of.items() if name in names} for mix, of in told.items()
    }
    done = [plan for plan in wanted if (plan.folder(chosen.work) / "result.json").exists()]
    for mix in dict.fromkeys(plan.mix for plan in done):
        texts = test_texts(chosen, mix)
        sizes = {name: np.array([len(document) for document in documents_of(path)]) for name, path in texts.items()}
        bits = {
            (plan.name, plan.seed): bits_by_document(plan.folder(chosen.work), texts)
            for plan in done
            if plan.mix == mix
        }
        for name in dict.fromkeys(name for name, _ in bits if name != OURS):
            seeds = [seed for of, seed in bits if of == name and (OURS, seed) in bits]
            if seeds:
                sides = [
                    {text: np.mean([bits[side, seed][text] for seed in seeds], axis=0) for text in texts}
                    for side in (OURS, name)
                ]
                of_each = {text: relative(*sides, {text: size}) for text, size in sizes.items()}
                found.setdefault(mix, {})[name] = {"all": relative(*sides, sizes), **of_each}
    return found


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A line per contender and mix, the mean of its seeds, of which each is a dot."""
    means = table(runs)
    figure, panels = subplots(1, len(means), figsize=(3.4 * len(means), 3.8), squeeze=False)
    for axes, (mix, of) in zip(panels[0], means.items(), strict=True):
        names = [name for name in {**CONTENDERS, **LARGE_CONTENDERS} if name in of]
        colours = [
            "tab:blue" if name == "BLT, entropy" else "tab:orange" if name == "BPE" else "grey" for name in names
        ]
        axes.scatter(names, [of[name] for name in names], color=colours, marker="_", s=600, linewidth=3)
        for run in runs:
            if run["mix"] == mix:
                axes.plot(run["name"], run["mean_bits_per_byte"], "k.", markersize=4)
        axes.margins(x=0.15)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(mix, fontsize=10)
        axes.tick_params(axis="x", rotation=60)
    panels[0][0].set_ylabel("held-out bits per byte")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "as_good_as_tokens")
    chosen = parser.parse_args()
    wanted = list(plans(chosen.budget, chosen.seeds))

    def found(runs: list[dict[str, Any]]) -> None:
        above = above_ours(wanted, chosen)
        write(chosen.out, {"budget": chosen.budget, "bits_per_byte": table(runs), "above_ours": above, "runs": runs})
        draw(runs, chosen.out.with_suffix(".png"))

    try:
        do(wanted, chosen, found)
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
