"""Writes the tables of docs/evidence.md anew from the results; ``--check`` only says whether they are those of the results."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"
Results = Mapping[str, Any]


def lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(lines(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(row) + " |" if row else "|" + "---|" * len(heads) for row in (heads, [], *rows))


def tuning(found: Results) -> str:
    rows = [
        [name, f"{trial['bits_per_byte']['valid']:.4f}", f"{trial['train_seconds']:.0f}"]
        for name, trial in found["trials"].items()
    ]
    return lines(["trial", "bits per byte", "seconds"], rows)


def as_good_as_tokens(found: Results) -> str:
    rows = []
    groups: dict[tuple[str, int, str], list[Results]] = {}
    for run in found["runs"]:
        groups.setdefault((run["mix"], run["train_bytes"], run["name"]), []).append(run)
    for (mix, train_bytes, name), runs in groups.items():
        bits = [run["mean_bits_per_byte"] for run in runs]
        seeds = ", ".join(f"{value:.4f}" for value in bits)
        above, low, high = found["above_ours"].get(mix, {}).get(name, {}).get("all", (0.0, 0.0, 0.0))
        interval = f"{above:+.1f}% ({low:+.1f} to {high:+.1f})" if above else ""
        flops = f"{mean([run['inference_flops_per_byte'] for run in runs]) / 1e6:.2f}"
        seconds = f"{mean([run['train_seconds'] for run in runs]):.0f}"
        unit = f"{mean([mean(run['unit_bytes'].values()) for run in runs]):.2f}"
        million = f"{runs[0]['parameters']['total'] / 1e6:.1f}"
        rows.append([mix, f"{train_bytes / 1e6:.1f}", name, seeds, interval, flops, million, unit, seconds])
    heads = [
        "text",
        "MB",
        "contender",
        "bits per byte",
        "above BLT",
        "MFLOPs/byte",
        "M parameters",
        "bytes/unit",
        "seconds",
    ]
    return lines(heads, rows)


def by_text(found: Results) -> str:
    """How far contenders are above ours in each text, where a mix has more than one."""
    above = {mix: of for mix, of in found["above_ours"].items() if any(len(each) > 2 for each in of.values())}
    names = list(dict.fromkeys(name for of in above.values() for name in of))
    texts = [(mix, text) for mix, of in above.items() for text in next(iter(of.values())) if text != "all"]
    rows = [[text, *(f"{above[mix][name][text][0]:+.1f}%" for name in names)] for mix, text in texts]
    return lines(["held-out text", *names], rows)


def under_noise(found: Results) -> str:
    names = list(dict.fromkeys(model["name"] for model in found["models"]))
    of = {name: [model["noises"] for model in found["models"] if model["name"] == name] for name in names}

    def average(name: str, noise: str, figure: str) -> float:
        return mean([noises[noise][figure] for noises in of[name]])

    rows = []
    for noise in of[names[0]][0]:
        cells = [noise]
        for name in names:
            bits, clean = (average(name, which, "bits_per_clean_byte") for which in (noise, "clean"))
            judged, word = average(name, noise, "blimp"), average(name, noise, "last_word_bits")
            more = "" if noise == "clean" else f" ({bits - clean:+.3f})"
            cells.append(f"{bits:.3f}{more}, {100 * judged:.1f}%, {word:.1f}")
        rows.append(cells)
    return lines(["text", *names], rows)


def languages(found: Results) -> str:
    bits, kinds = found["bits"], found["presence"]
    rows = []
    for kind in ("present", "rare", "absent", "script"):
        texts = [text for text, own in kinds.items() if own == kind]
        ratios = [bits["BLT, entropy"][text] / bits["BPE"][text] for text in texts]
        below = sum(ratio < 1 for ratio in ratios)
        worst = texts[ratios.index(max(ratios))]
        english = bits["BLT, entropy"]["eng"] / bits["BPE"]["eng"]
        relative = f"{sum(ratio < english for ratio in ratios)} of {len(texts)}"
        cells = [f"{mean(ratios):.3f}", f"{below} of {len(texts)}", f"{max(ratios):.3f} ({worst})", relative]
        rows.append([kind, str(len(texts)), *cells])
    heads = ["bits of BLT / BPE, mean", "BLT below BPE", "highest", "below, each over its own bits of English"]
    return lines(["in training", "texts", *heads], rows)


def unseen_languages(found: Results) -> str:
    """Of the texts whose language was rare or absent in training: bits per byte of each model and seed."""
    names = list(dict.fromkeys(model["name"] for model in found["models"]))
    rows = []
    for text, kind in found["presence"].items():
        if kind in ("rare", "absent"):
            of = {
                name: [model["bits"][text] / found["bytes"][text] for model in found["models"] if model["name"] == name]
                for name in names
            }
            ratios = [ours / theirs for ours, theirs in zip(of["BLT, entropy"], of["BPE"], strict=True)]
            seeds = [", ".join(f"{value:.2f}" for value in of[name]) for name in names]
            rows.append([text, kind, *seeds, ", ".join(f"{ratio:.2f}" for ratio in ratios)])
    return lines(["language", "in training", *names, "BLT / BPE"], rows)


PAPER_CUTE = {  # right answers, %, of BLT and of Llama 3
    "spell": ("99.9", "1.1"),
    "spell_inverse": ("99.9", "30.1"),
    "contains_char": ("55.9", "0.0"),
    "contains_word": ("73.5", "55.1"),
    "del_char": ("35.9", "34.6"),
    "del_word": ("56.1", "75.5"),
    "ins_char": ("7.6", "7.5"),
    "ins_word": ("31.2", "33.5"),
    "orth": ("52.4", "43.1"),
    "sem": ("90.5", "65.0"),
    "sub_char": ("48.7", "0.4"),
    "sub_word": ("72.8", "16.4"),
    "swap_char": ("11.5", "2.6"),
    "swap_word": ("21.0", "20.1"),
}


def spelling(found: Results) -> str:
    """Right answers by task, each seed: about CUTE's words, and about others that were held out."""
    models = found["models"]
    names = list(dict.fromkeys(model["name"] for model in models))

    def cells(kind: str, task: str) -> list[str]:
        of = [[100 * model[kind][task] for model in models if model["name"] == name] for name in names]
        return [", ".join(f"{share:.1f}" for share in seeds) for seeds in of]

    rows = [[task, *cells("cute", task), *PAPER_CUTE.get(task, ("", ""))] for task in models[0]["cute"]]
    rows += [[f"{task}, our words", *cells("own_words", task), "", ""] for task in models[0]["own_words"]]
    return lines(["task", *names, "paper: BLT 8B", "paper: Llama 3 8B"], rows)


def spelling_tuning(found: Results) -> str:
    """The two claimed tasks, and the mean of all, about held-out words."""
    rows = []
    for model in found["models"]:
        right = model["own_words"]
        shares = (right["spell"], right["spell_inverse"], mean(right.values()))
        bits, seconds = f"{model['held_out_bits_per_byte']:.3f}", f"{model['train_seconds']:.0f}"
        rows.append([model["name"], bits, *(f"{100 * share:.1f}" for share in shares), seconds])
    return lines(["trial", "bits per byte", "spell", "spell_inverse", "mean of 7 tasks", "seconds"], rows)


def fixed_inference_flops(found: Results) -> str:
    sizes = sorted({run["train_bytes"] for run in found["runs"]})
    rows = []
    for name in dict.fromkeys(run["name"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["name"] == name]
        at = [[run["mean_bits_per_byte"] for run in runs if run["train_bytes"] == size] for size in sizes]
        flops = f"{mean([run['inference_flops_per_byte'] for run in runs]) / 1e6:.2f}"
        held_out, speed = (found[figure].get(name) for figure in ("held_out_flops_per_byte", "bytes_per_second"))
        unit = f"{mean([run['train_unit_bytes'] for run in runs]):.2f}"
        measured = [f"{held_out / 1e6:.2f}" if held_out else "", f"{speed:,.0f}" if speed else ""]
        below = found["below_patches_of_4_from_bytes_on"].get(name, "")
        crossing = f"from {below / 1e6:.1f} MB on" if isinstance(below, float) else below
        rows.append([name, *(f"{mean(bits):.4f}" if bits else "" for bits in at), unit, flops, *measured, crossing])
    points = [f"{size / 1e6:.1f} MB" for size in sizes]
    heads = [
        "contender",
        *points,
        "bytes/unit",
        "MFLOPs/byte",
        "of held-out text",
        "bytes/s read",
        "below patches of 4",
    ]
    return lines(heads, rows)


def ablations(found: Results) -> str:
    rows = []
    for name in dict.fromkeys(run["name"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["name"] == name]
        more = [f"{value:+.2f}%" for value in found["above_base"].get(name, {}).values()]
        bits = ", ".join(f"{run['mean_bits_per_byte']:.4f}" for run in runs)
        million = f"{runs[0]['parameters']['network'] / 1e6:.1f}"
        rows.append([name, bits, ", ".join(more), million, f"{runs[0]['train_flops_per_byte'] / 1e6:.2f}"])
    return lines(["variant", "bits per byte", "above its base", "M parameters", "training MFLOPs/byte"], rows)


def drift(found: Results) -> str:
    """Patches in the first and the last part of each text, and the mean entropies there."""
    rows = []
    for name, of in found["rules"].items():
        cells = [
            f"{along[figure][0]:.2f} -> {along[figure][-1]:.2f}"
            for along in of.values()
            for figure in ("patch_bytes", "entropy_nats")
        ]
        rows.append([name, *cells])
    heads = [f"{figure}, {text}" for text in next(iter(found["rules"].values())) for figure in ("patches", "nats")]
    return lines(["rule", *heads], rows)


def latent_learning(found: Results) -> str:
    rows = [
        [run["matrix_optimizer"], f"{run['learning_rate']:g}", f"{run['letter_bits']:.3f}"] for run in found["runs"]
    ]
    return lines(["optimiser", "learning rate", f"bits of the letter (chance: {found['chance_bits']:.2f})"], rows)


def copying(found: Results) -> str:
    rows = [
        [
            model["name"],
            model["learned_from"],
            f"{model['inference_flops_per_byte'] / 1e6:.2f}",
            f"{model['latent']['num_layers']} x {model['latent']['width']}",
            f"{model['first']:.3f}",
            f"{model['again']:.3f}",
        ]
        for model in found["models"]
    ]
    heads = ["contender", "learned from", "MFLOPs/byte", "layers of the large transformer", "a passage", "again"]
    return lines(heads, rows)


def builtin_model(found: Results) -> str:
    figures = ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "mean_patch_bytes")
    rows = [[domain, *(f"{of[name]:.3f}" for name in figures)] for domain, of in found["files"].items()]
    return lines(["held-out text", "bits per byte", "gzip -9", "xz -9e", "bytes of a patch"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    table.__name__: table
    for table in (
        tuning,
        as_good_as_tokens,
        by_text,
        fixed_inference_flops,
        spelling,
        spelling_tuning,
        under_noise,
        languages,
        unseen_languages,
        ablations,
        drift,
        latent_learning,
        copying,
        builtin_model,
    )
}


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def with_tables(page: str, results: Path) -> str:
    """The page with every table between ``<!-- table NAME -->`` and ``<!-- end -->`` made from results/NAME.json, or, for
    ``NAME of FILE``, from results/FILE.json.
    """

    def table(match: re.Match[str]) -> str:
        name, _, file = match[1].partition(" of ")
        found = json.loads((results / f"{file or name}.json").read_text())
        return f"<!-- table {match[1]} -->\n{TABLES[name](found)}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    before = PAGE.read_text()
    after = with_tables(before, HERE / "results")
    if chosen.check and after != before:
        parser.error(f"tables of {PAGE.name} are not those of the results; run experiments/evidence.py")
    PAGE.write_text(after)


if __name__ == "__main__":
    main()
