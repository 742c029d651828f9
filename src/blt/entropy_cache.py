"""Entropies of a whole corpus, kept as a byte each beside what they were scored with: what ``blt entropies`` leaves behind.

``folder/corpus`` holds the shards that were scored, ``spec.json`` what scored them, ``train.entropies.bin`` a code for every
input of every training row, ``progress.json`` how many rows are on disk. Training refuses what does not fit it.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blt import corpus
from blt.config import CorpusConfig
from blt.model.entropy_model import EntropyModel
from blt.model.patching import entropies_of_codes
from blt.shapes import Entropies, EntropyEdges

FORMAT = 1
SPEC, CODES, PROGRESS = "spec.json", "train.entropies.bin", "progress.json"


@dataclass(frozen=True)
class Spec:
    """What was scored, with what, and how it is kept; two folders with equal specs hold the same entropies."""

    format: int
    entropy_model: dict[str, Any]  # its config: shape, window, newline reset
    weights_hash: str
    edges_nats: list[float]
    row_bytes: int
    held_out_fraction: float
    fingerprint: str  # of the corpus
    num_rows: int

    @property
    def hash(self) -> str:
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def difference(self, other: "Spec") -> str | None:
        """What a person has to know of the first thing that tells two specs apart; None where nothing does."""
        for name, meaning in _MEANING.items():
            own, its = getattr(self, name), getattr(other, name)
            if own != its:
                return meaning if name in ("edges_nats", "entropy_model") else f"{meaning} ({own}, not {its})"
        return None


_MEANING = {
    "format": "another version of the format",
    "entropy_model": "an entropy model of another shape",
    "weights_hash": "another entropy model",
    "edges_nats": "another threshold",
    "row_bytes": "other row_bytes",
    "held_out_fraction": "another held_out_fraction",
    "fingerprint": "other text",
    "num_rows": "another number of rows",
}


@dataclass(frozen=True)
class EntropyCache:
    """The entropies of a corpus's training rows, memory-mapped."""

    folder: Path
    spec: Spec
    codes: NDArray[np.uint8]

    @property
    def edges(self) -> EntropyEdges:
        return torch.tensor(self.spec.edges_nats)

    def entropies(self, row_indices: Sequence[int]) -> Entropies:
        """Of the inputs of these rows, each at the upper end of what its code stands for."""
        return entropies_of_codes(torch.from_numpy(self.codes[list(row_indices)]), self.edges)

    def edge_below(self, threshold_nats: float) -> float:
        """The threshold that cuts the kept entropies as this one does, and others in the same way."""
        edges = self.edges
        return float(edges[max(0, int((edges <= threshold_nats).sum()) - 1)])

    def check_threshold(self, threshold_nats: float) -> None:
        """Raises ValueError where the codes cannot tell which entropies exceed the threshold."""
        if float(np.float32(threshold_nats)) not in self.spec.edges_nats:
            beside = sorted(self.spec.edges_nats, key=lambda edge: abs(edge - threshold_nats))[:2]
            raise ValueError(
                f"{self.folder} does not tell entropies above {threshold_nats} nats from those below; set "
                f"model.patching.threshold_nats to {min(beside)!r} or {max(beside)!r}, or leave it out to have it calibrated"
            )

    def check_scored_by(self, model: str, entropy_model: EntropyModel, data: CorpusConfig, row_bytes: int) -> None:
        """Raises ValueError where another entropy model scored these rows, or rows of another kind."""
        wanted: dict[str, Any] = {
            "entropy_model": entropy_model.config.model_dump(mode="json"),
            "weights_hash": weights_hash(entropy_model),
            "row_bytes": row_bytes,
            "held_out_fraction": data.held_out_fraction,
        }
        self._refuse(replace(self.spec, **wanted), model, data, row_bytes)

    def check_corpus(self, shard: corpus.ByteShard, model: str, data: CorpusConfig) -> None:
        """Raises ValueError where this is not the text that was scored."""
        self._refuse(replace(self.spec, fingerprint=shard.fingerprint), model, data, self.spec.row_bytes)

    def _refuse(self, wanted: Spec, model: str, data: CorpusConfig, row_bytes: int) -> None:
        difference = self.spec.difference(wanted)
        if difference:
            raw = ["--raw"] if data.raw else []
            command = ["blt", "entropies", model, "--data", *data.paths, *raw, "--row-bytes", str(row_bytes)]
            command += ["--held-out-fraction", str(data.held_out_fraction), "--out", "FOLDER"]
            raise ValueError(
                f"{self.folder} was scored with {difference}; score what this run reads: {shlex.join(command)}"
            )


def open_entropies(folder: Path) -> EntropyCache:
    """The finished entropies in a folder. Raises FileNotFoundError or ValueError for what is missing, unfinished or damaged."""
    spec = read_spec(folder)
    done = rows_done(folder)
    if done < spec.num_rows:
        raise ValueError(
            f"{folder} is not finished, {done:,} of {spec.num_rows:,} rows are scored; run its blt entropies command again"
        )
    codes = folder / CODES
    expected = spec.num_rows * spec.row_bytes
    if not codes.is_file() or codes.stat().st_size != expected:
        found = f"{codes.stat().st_size:,} bytes" if codes.is_file() else "nothing"
        raise ValueError(
            f"{codes} is damaged, {found} where {expected:,} bytes were; delete {folder} and score it again"
        )
    return EntropyCache(folder, spec, np.memmap(codes, np.uint8, "r", shape=(spec.num_rows, spec.row_bytes)))


def weights_hash(entropy_model: EntropyModel) -> str:
    """A hash of an entropy model's weights, by name."""
    found = blake2b(digest_size=16)
    for name, weight in sorted(entropy_model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def read_spec(folder: Path) -> Spec:
    """Of a folder that is begun. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    file = folder / SPEC
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no entropies: there is no {SPEC} in it; make some with blt entropies")
    try:
        values = json.loads(file.read_text("utf-8"))
        stored = values.pop("spec_hash")
        spec = Spec(**values)
    except (ValueError, LookupError, TypeError, AttributeError):
        stored, spec = "", None
    if spec is None or spec.hash != stored:
        raise ValueError(f"{file} is damaged; delete {folder} and score it again")
    return spec


def rows_done(folder: Path) -> int:
    """How many rows are on disk for certain."""
    spec, codes, progress = read_spec(folder), folder / CODES, folder / PROGRESS
    if not (codes.is_file() and progress.is_file()):
        return 0
    try:
        marked = int(json.loads(progress.read_text("utf-8"))["rows"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{progress} is damaged; delete it to score {folder} from its first row") from None
    return min(marked, codes.stat().st_size // spec.row_bytes)
