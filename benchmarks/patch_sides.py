"""What ``patch.py`` lets cut text: entropy models, rules without any, and tokenizers; and how far two of them agree."""

import json
import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bpe import as_tiktoken
from torch import Tensor

from blt import load
from blt.byte_ids import BOS, BYTE_OFFSET
from blt.config import CorpusConfig, NgramEntropyModelConfig, PatchingConfig
from blt.config_file import read_run_config
from blt.corpus import is_held_out
from blt.documents import read_documents
from blt.language_model import LanguageModel
from blt.model.ngram_entropy_model import NgramCounts, NgramEntropyModel
from blt.model.patching import mean_patch_bytes, patch_starts, patch_starts_of_documents, threshold_for_patch_size
from blt.progress import Reporter
from blt.train import train

ROW_BYTES, ROWS_AT_ONCE = 512, 8  # as training reads them
PATCH_BYTES = 4.5
COUNTED_BYTES = 2**20  # of training text at a time, for n-grams
FORCED = 2  # BOS and the first byte of a row start a patch under every rule
EVALUATION = ("code.test", "en_modern.test", "en_books.test", "ntrex_36")  # .jsonl.xz, by their field `lang` if any


class Rule:
    """``space`` or ``fixed``: bytes decide, no model."""

    model, threshold_nats = None, None

    def __init__(self, patching: PatchingConfig) -> None:
        self.name, self.patching = str(patching.rule), patching

    def cut(self, text: bytes) -> Tensor:
        return patch_starts(one_row(text), None, self.patching)

    def starts(self, rows: Tensor) -> Tensor:
        return patch_starts(rows, None, self.patching)


class TransformerPatcher:
    """The entropy model of a run, read in rows of 512 ids, eight at once, each a document of its own."""

    name = "transformer"

    def __init__(self, run: Path) -> None:
        self.lm, self.model = load(run, device="cpu", dtype="float32"), run.name
        self.threshold_nats = self.lm.config.patching.threshold_nats

    def cut(self, text: bytes) -> Tensor:
        assert self.threshold_nats is not None
        patching = PatchingConfig(threshold_nats=self.threshold_nats)
        batches = rows_of(text).split(ROWS_AT_ONCE)
        return torch.cat([patch_starts(rows, self.lm.entropies(rows), patching) for rows in batches])

    def entropies(self, rows: Tensor) -> Tensor:
        return torch.cat([self.lm.entropies(part) for part in rows.split(ROWS_AT_ONCE)])


class NgramPatcher:
    """Counts of n-grams instead of a network: those of a run, or those of the text that a transformer was trained on.

    The one place that knows how such a model is made and asked.
    """

    name = "ngram"

    def __init__(self, model: NgramEntropyModel, name: str) -> None:
        self.counts, self.model = model, name
        self.threshold_nats: float | None = None

    @classmethod
    def counted(cls, documents: Sequence[bytes], name: str) -> "NgramPatcher":
        counts = NgramCounts(NgramEntropyModelConfig(kind="ngram"))
        text = np.frombuffer(b"".join(documents), np.uint8)
        starts = np.cumsum([0, *map(len, documents[:-1])])
        for begin in range(0, len(text), COUNTED_BYTES):
            within = (starts >= begin) & (starts < begin + COUNTED_BYTES)
            counts.add(text[begin : begin + COUNTED_BYTES], starts[within] - begin)
        return cls(counts.model(), name)

    def cut(self, text: bytes) -> Tensor:
        entropies = self.counts.text_entropies(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return patch_starts_of_documents(entropies, PatchingConfig(threshold_nats=self.threshold_nats))

    def entropies(self, rows: Tensor) -> Tensor:
        return self.counts.entropies(rows)


class Tiktoken:
    """``tiktoken`` with the merges of a ``tokenizers`` BPE: text in, ids out, in the form that it makes fastest."""

    name, model, threshold_nats = "tiktoken", None, None

    def __init__(self, tokenizer: Any) -> None:
        self.encoding = as_tiktoken(tokenizer)

    def cut(self, text: str) -> Any:
        return self.encoding.encode_ordinary(text)


class Tokenizers:
    """That BPE itself."""

    name, model, threshold_nats = "tokenizers", None, None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def cut(self, text: str) -> Any:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def patcher_of_run(run: Path) -> TransformerPatcher | NgramPatcher:
    """The patcher of a run's own entropy model. Raises ValueError for a run without one."""
    lm: LanguageModel = load(run, device="cpu", dtype="float32")
    if lm.entropy_model is None:
        raise ValueError(f"{run} has no entropy model; give a run whose patching rule needs one")
    is_transformer = hasattr(lm.entropy_model, "transformer")
    return TransformerPatcher(run) if is_transformer else NgramPatcher(lm.entropy_model, run.name)


def one_row(text: bytes) -> Tensor:
    """The ids of a text of any length, BOS first."""
    ids = torch.empty(1, len(text) + 1, dtype=torch.long)
    ids[0, 0] = BOS
    torch.add(torch.frombuffer(bytearray(text), dtype=torch.uint8), BYTE_OFFSET, out=ids[0, 1:])
    return ids


def rows_of(text: bytes) -> Tensor:
    """Rows of 512 ids, each with its own BOS; what does not fill a row is left out, unless there is no row without it."""
    in_row = min(ROW_BYTES - 1, len(text))
    rows = torch.frombuffer(bytearray(text[: len(text) // in_row * in_row]), dtype=torch.uint8).view(-1, in_row)
    return torch.cat([torch.full((len(rows), 1), BOS), rows.long() + BYTE_OFFSET], dim=1)


@dataclass(frozen=True)
class Agreement:
    """How far a patcher cuts where the reference cuts, both into patches of the same mean size."""

    boundary_f1: float
    random_f1: float  # of as many starts as the patcher's, anywhere
    mean_patch_bytes: float
    reference_threshold_nats: float
    threshold_nats: float | None  # of the patcher, where it has one


def agreement(patcher: Any, reference: TransformerPatcher, rows: Tensor, entropies: Tensor) -> Agreement:
    """A patcher beside the reference, whose ``entropies`` of these rows are given.

    Entropies are cut at thresholds that these rows' own patches of 4.5 bytes ask for. A rule has the patch size that it
    has, and the reference's threshold follows it.
    """
    config, threshold = PatchingConfig(), None
    if isinstance(patcher, Rule):
        starts = patcher.starts(rows)
        size = mean_patch_bytes(rows, starts)
    else:
        size, own = PATCH_BYTES, patcher.entropies(rows)
        threshold = threshold_for_patch_size(own, rows, config, size)
        starts = patch_starts(rows, own, PatchingConfig(threshold_nats=threshold))
    wanted = threshold_for_patch_size(entropies, rows, config, size)
    expected = patch_starts(rows, entropies, PatchingConfig(threshold_nats=wanted))
    found, truth = starts[:, FORCED:-1], expected[:, FORCED:-1]
    order = torch.randperm(found.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = found.flatten()[order].view_as(found)
    size = mean_patch_bytes(rows, starts)
    return Agreement(boundary_f1(found, truth), boundary_f1(shuffled, truth), size, wanted, threshold)


def boundary_f1(found: Tensor, truth: Tensor) -> float:
    """The harmonic mean of precision and recall of starts; 1 where neither has any."""
    both, either = int((found & truth).sum()), int(found.sum() + truth.sum())
    return 2 * both / either if either else 1.0


def train_reference(data: str, folder: Path) -> Path:
    """A run whose entropy model is the demo's transformer, trained on this text; its network has hardly begun to learn."""
    short = ["training.total_bytes=2048", "training.evaluation_bytes=512"]
    config = read_run_config("demo_transformer", [f"data.paths={json.dumps([data])}", *short])
    train(config, folder, torch.device("cpu"), resume=False, reporter=Reporter(quiet=True))
    return folder


def documents_of_run(data: str, run: Path) -> tuple[list[bytes], list[bytes]]:
    """The documents of a path that the run's own rule takes for training, and those that it holds out."""
    config = run / "config.toml"
    fraction = (read_run_config(config).data if config.is_file() else CorpusConfig()).held_out_fraction
    training: list[bytes] = []
    held_out: list[bytes] = []
    for document in read_documents([data]):
        if document.data:
            (held_out if is_held_out(document.data, fraction) else training).append(document.data)
    if not training:
        raise ValueError(f"{data} holds too few documents; give another --data")
    return training, held_out or training


def trained_on(run: Path) -> str:
    """The text that a run has seen, as its config names it: paths of files by their last part."""
    config = run / "config.toml"
    return ", ".join(os.path.basename(path) for path in read_run_config(config).data.paths) if config.is_file() else "?"


def evaluation_texts(folder: Path, num_bytes: int) -> Iterator[tuple[str, bytes]]:
    """(name, so many bytes) of each language of each evaluation file that is there. Raises FileNotFoundError for none."""
    files = [folder / f"{name}.jsonl.xz" for name in EVALUATION]
    if not any(file.exists() for file in files):
        raise FileNotFoundError(f"{folder} holds none of {', '.join(file.name for file in files)}")
    for file in files:
        if not file.exists():
            continue
        texts: dict[str, bytes] = {}
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                name = file.name.removesuffix(".jsonl.xz").removesuffix(".test")
                name = f"{name} {row['lang']}" if "lang" in row else name
                if len(texts.get(name, b"")) < num_bytes:
                    texts[name] = (texts.get(name, b"") + row["text"].encode())[:num_bytes]
        yield from texts.items()
