"""Trains the small model that comes with the package: n-grams counted in all of English, code and other languages that there is
to learn from, the network on a part of it.

Its weights are rounded to bf16, those of its hash tables to fp8, and written to src/blt/builtin, with a card that tells what it
learned from and its bits per byte in each domain. A run that was cut goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from claim import HELD_OUT_BYTES, write
from contenders import HERE, documents_of
from texts import MIXES, mixed, paths_of

from blt.config_file import read_run_config
from blt.corpus import open_shard
from blt.documents import Document
from blt.evaluate import evaluate_inputs
from blt.language_model import LanguageModel
from blt.model_card import ModelCard, with_figures
from blt.progress import Reporter
from blt.train import train

CONFIG = HERE / "builtin_model.toml"
PACKAGED = HERE.parent / "src" / "blt" / "builtin"
MOST_BYTES = 16_000_000  # on disk
TABLES = torch.float8_e4m3fn  # costs 0.03% more bits than bf16 does, where twice the rows are worth more
# what is in the text, by licence; the text itself is no part of the project
SOURCES = {
    "public domain or CC0": "English books, Python's enhancement proposals, 82 languages of Common Voice, wisesight, Aozora",
    "MIT, Apache-2.0 or PSF-2.0": "The Algorithms in five programming languages, Rust RFCs, the library of CPython 3.13",
    "CC BY 4.0": "tldr pages",
    "CC BY-SA 3.0 or 4.0": "English and Malayalam Wikipedia, GNOME's user guides in 34 languages, FLORES",
}


def trained(data: Path, run: Path, settings: list[str], reporter: Reporter) -> LanguageModel:
    """The model after the part of the training text that the config says."""
    paths = [path for mix in MIXES for path in paths_of(data, mix, "train")]
    config = read_run_config(CONFIG, [f"data.paths={json.dumps([str(path) for path in paths])}", *settings])
    return train(config, run, torch.device("cpu"), (run / "config.toml").exists(), reporter)


def rounded(lm: LanguageModel) -> LanguageModel:
    """With weights that bf16 holds exactly, and tables that fp8 does: two bytes each on the disk, and one byte."""
    lm.network.to(torch.bfloat16).to(torch.float32)
    lm.network.local_encoder.hash_embeddings.tables.to(TABLES).to(torch.float32)
    return lm


def figures_by_domain(
    lm: LanguageModel, data: Path, work: Path, num_bytes: int, window: int, reporter: Reporter
) -> dict[str, Any]:
    """Bits per byte on held-out text of each domain, beside compressors."""
    inputs = {}
    for mix in MIXES:
        paths = paths_of(data, mix, "test")
        file = mixed(paths, num_bytes, work / "texts" / f"{mix}.test.{num_bytes}.jsonl")
        inputs[mix] = [Document(mix, text) for text in documents_of(file)]
    return evaluate_inputs(lm.predict, inputs, window, lm.device, reporter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with train/ and eval/")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as of blt train")
    parser.add_argument("--budget", choices=tuple(HELD_OUT_BYTES), default="hour", help="how much text is scored")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"))
    parser.add_argument("--folder", type=Path, default=PACKAGED, help="where the model is written")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "builtin_model.json")
    chosen = parser.parse_args()
    with Reporter() as reporter:
        try:
            lm = rounded(trained(chosen.data, chosen.work / "builtin", chosen.settings, reporter))
        except FileNotFoundError as error:
            parser.error(str(error))
        config = read_run_config(chosen.work / "builtin" / "config.toml")
        window = config.training.row_bytes
        found = figures_by_domain(lm, chosen.data, chosen.work, HELD_OUT_BYTES[chosen.budget], window, reporter)
    learned_from = "; ".join(f"{what} ({licence})" for licence, what in SOURCES.items())
    all_bytes = open_shard(chosen.work / "builtin" / "corpus", "train").num_bytes
    how = (
        f"from nothing on {config.training.total_bytes / 1e6:.0f} MB, drawn from {all_bytes / 1e6:.0f} MB whose n-grams were "
        f"counted: {learned_from}; none of this text is in the package"
    )
    lm.card = with_figures(ModelCard(license="apache-2.0"), found, how)
    lm.network.local_encoder.hash_embeddings.tables.to(TABLES)
    lm.save(chosen.folder)
    on_disk = sum(file.stat().st_size for file in chosen.folder.rglob("*") if file.is_file())
    write(chosen.out, {"bytes_on_disk": on_disk, "total_bytes": config.training.total_bytes, **found})
    if on_disk > MOST_BYTES:
        parser.error(f"{chosen.folder} has {on_disk:,} bytes, more than {MOST_BYTES:,}")


if __name__ == "__main__":
    main()
