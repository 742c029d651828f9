"""What repetition does to patches: an entropy model that can copy is sure of what comes again, so patches grow (paper, 4.4).

One network learns from pairs of passages, most of them twice the same, then cuts a text that says one passage again and again,
under three rules with the same weights: entropies above a threshold, entropies that forget what was before the line, entropies
that rise. Counts of n-grams, which see a few bytes, stand beside them. Each threshold is set for patches of 4.5 bytes in text
as it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from claim import options, subplots, test_texts, train_text, write
from contenders import CONFIG, CPU, documents_of
from copying import PASSAGE_BYTES, passages
from torch import Tensor

from blt.byte_ids import BOS, BYTE_OFFSET
from blt.config import PatchingConfig
from blt.config_file import read_run_config
from blt.model.entropy_model import EntropyModel
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.patching import mean_patch_bytes, patch_starts, threshold_for_patch_size
from blt.progress import Reporter
from blt.train import train

TEXT_BYTES, PARTS = 4096, 8
TEXTS = {"smoke": 2, "minutes": 40, "hour": 40, "longer": 200}
TARGET_PATCH_BYTES = 4.5
BYTES = {"smoke": 60_000, "minutes": 6_000_000, "hour": 24_000_000, "longer": 100_000_000}
ROW_BYTES = 512
NETWORK = {
    "kind": "transformer",
    "num_layers": 2,
    "width": 64,
    "num_heads": 1,
    "ffn_width": 176,
    "window_positions": ROW_BYTES,
}
SHAPE = "{" + ", ".join(f"{name} = {json.dumps(value)}" for name, value in NETWORK.items()) + "}"


def pairs(documents: Sequence[bytes], num_bytes: int, folder: Path) -> Path:
    """A file of texts of two passages, which in three of four texts are the same: who learned from such alone would be sure of
    all that comes late, whether it has been there or not.
    """
    chosen = passages(documents, num_bytes // 2, 0)
    others = passages(documents, num_bytes // 2, 1)
    second = [other if index % 4 == 0 else own for index, (own, other) in enumerate(zip(chosen, others, strict=True))]
    rows = (json.dumps({"text": f"{own}\n{next_one}"}) + "\n" for own, next_one in zip(chosen, second, strict=True))
    file = folder / f"drift.{num_bytes}.jsonl"
    file.write_text("".join(rows), "utf-8")
    return file


def copying_network(text: Path, num_bytes: int, folder: Path, dtype: str, reporter: Reporter) -> EntropyModel:
    """An entropy model of 2 x 64 after one pass over the text; of the rest of the run, which nobody looks at, one step."""
    settings = [
        f"data.paths={json.dumps([str(text)])}",
        f"model.entropy_model={SHAPE}",
        f"entropy_training={{total_bytes = {num_bytes}, row_bytes = {ROW_BYTES}, rows_per_step = 4, learning_rate = 8e-3, "
        f'matrix_optimizer = "muon", dtype = "{dtype}"}}',
        f"training.total_bytes={8 * ROW_BYTES}",
    ]
    lm = train(read_run_config(CONFIG, settings), folder, CPU, (folder / "config.toml").exists(), reporter)
    assert isinstance(lm.entropy_model, EntropyModel)
    return lm.entropy_model


def forgetting(model: EntropyModel) -> EntropyModel:
    """The same weights, used line by line."""
    other = type(model)(model.config.model_copy(update={"reset_at_newline": True}))
    other.load_state_dict(model.state_dict())
    return other


def as_rows(texts: Sequence[bytes], length: int) -> Tensor:
    """The beginnings of texts, BOS first, those that are shorter left out."""
    rows = [
        torch.tensor([BOS, *(BYTE_OFFSET + byte for byte in text[:length])]) for text in texts if len(text) >= length
    ]
    return torch.stack(rows)


def repeated(passage: str, length: int) -> bytes:
    """A passage as a line, again and again.

    >>> repeated("a\\nb", 10)
    b'a b\\na b\\na '
    """
    line = passage.replace("\n", " ").encode() + b"\n"
    return (line * (length // len(line) + 1))[:length]


@torch.no_grad()
def along(
    model: EntropyModel | NgramEntropyModel, rule: PatchingConfig, usual: Tensor, texts: Mapping[str, Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Mean patch (bytes) and mean entropy (nats) in each part of the texts, with the threshold that usual rows ask for."""
    threshold = threshold_for_patch_size(model.entropies(usual), usual, rule, TARGET_PATCH_BYTES)
    found = {}
    for name, rows in texts.items():
        entropies = model.entropies(rows)
        starts = patch_starts(rows, entropies, rule.model_copy(update={"threshold_nats": threshold}))
        parts = [slice(1 + part * TEXT_BYTES // PARTS, 1 + (part + 1) * TEXT_BYTES // PARTS) for part in range(PARTS)]
        found[name] = {
            "patch_bytes": [mean_patch_bytes(rows[:, of], starts[:, of.start : of.stop + 1]) for of in parts],
            "entropy_nats": [float(entropies[:, of].mean()) for of in parts],
        }
    return found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Patches along the text that repeats itself, and along one that goes on."""
    figure, panels = subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, text in zip(panels, next(iter(found.values())), strict=True):
        for name, of in found.items():
            axes.plot(range(1, PARTS + 1), of[text]["patch_bytes"], marker="o", markersize=3, label=name)
        axes.set_title(text, fontsize=10)
        axes.set_xlabel(f"eighth of {TEXT_BYTES:,} bytes")
        axes.set_yscale("log", base=2)
    panels[0].set_yticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    panels[0].set_ylabel("mean patch, bytes")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, "drift")
    chosen = parser.parse_args()
    num_bytes, number = BYTES[chosen.budget], TEXTS[chosen.budget]
    try:
        train_file, test = train_text(chosen, "english", 15_000_000), test_texts(chosen, "english")
    except FileNotFoundError as error:
        parser.error(str(error))
    documents = [document for path in test.values() for document in documents_of(path)]
    with Reporter() as reporter:
        text = pairs(documents_of(train_file), num_bytes, chosen.work / "texts")
        folder = chosen.work / "runs" / "drift" / f"{num_bytes / 1e6:g}MB"
        network = copying_network(text, num_bytes, folder, chosen.dtype, reporter)
        counts = folder.with_name(f"{folder.name}.ngrams")
        settings = [f"data.paths={json.dumps([str(text)])}", f"training.total_bytes={8 * ROW_BYTES}"]
        started = (counts / "config.toml").exists()
        counted = train(read_run_config(CONFIG, settings), counts, CPU, started, reporter).entropy_model
    assert isinstance(counted, NgramEntropyModel)
    lines = passages(documents, number * PASSAGE_BYTES, 0)
    texts = {
        "one passage again and again": as_rows([repeated(line, TEXT_BYTES) for line in lines], TEXT_BYTES),
        "a text": as_rows(documents, TEXT_BYTES)[:number],
    }
    usual = as_rows(documents, ROW_BYTES)
    above, rises = (PatchingConfig.model_validate({"rule": rule}) for rule in ("entropy", "entropy_rise"))
    found = {
        "entropy above a threshold": along(network, above, usual, texts),
        "the same, reset at newlines": along(forgetting(network), above, usual, texts),
        "entropy rises": along(network, rises, usual, texts),
        "n-gram counts": along(counted, above, usual, texts),
    }
    for name, of in found.items():
        first, *_, last = of["one passage again and again"]["patch_bytes"]
        print(f"{name}: patches of {first:.2f} bytes in the first eighth, {last:.2f} in the last", flush=True)
    write(chosen.out, {"budget": chosen.budget, "network": NETWORK, "train_bytes": num_bytes, "rules": found})
    draw(found, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
