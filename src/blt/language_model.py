"""Entropy model, patching and network in one object: what ``blt.load`` returns."""

import errno
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blt import byte_ids
from blt.config import ModelConfig
from blt.evaluate import Score, score_documents
from blt.generate import Batch, GenerationStats, Request, stream, write_all
from blt.incremental import Networks
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel, entropies_of
from blt.model.linear import Int8Linear, round_to_int8
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.patching import patch_starts, patch_starts_of_documents
from blt.model_card import ModelCard, read_card
from blt.model_files import load_model, save_model
from blt.sampling import Sampling
from blt.shapes import ByteIds, Entropies, Logits, PatchStarts

Text = str | bytes
PACKAGE = Path(__file__).parent
BUILTIN = "builtin"  # names the model that comes with the package, and its folder there
LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"
# What of a hub's model is downloaded: of either format, and no pickles but the official format's own
HUB_FILES = ["*.json", "*.safetensors", "entropy_model/*", "README.md", "LICENSE*"]


class LanguageModel:
    """A Byte Latent Transformer with all it needs to read and write text."""

    def __init__(
        self,
        config: ModelConfig,
        entropy_model: EntropyModel | NgramEntropyModel | None,
        network: ByteLatentTransformer,
        card: ModelCard = ModelCard(),
    ) -> None:
        self.config = config
        self.entropy_model = entropy_model
        self.network = network
        self.card = card  # licence, source, figures: what is saved beside the weights

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "LanguageModel":
        for module in (self.entropy_model, self.network):
            if module is not None:
                module.to(device)
        return self

    def encode(self, text: Text) -> ByteIds:
        """The ids of a prompt as one row, BOS first."""
        return torch.tensor([byte_ids.encode(text)], device=self.device)

    def entropies(self, ids: ByteIds) -> Entropies:
        """Nats, one entry more than the row: entry t is the doubt about id t given the ids before; entry 0 is nan.

        Raises ValueError for a model whose patching rule needs no entropy model and that has none.
        """
        if self.entropy_model is None:
            raise ValueError(f"this model has no entropy model: its patching rule is {self.config.patching.rule!r}")
        self._check_length(ids)
        return self.entropy_model.entropies(ids)

    def patch_starts(self, ids: ByteIds) -> PatchStarts:
        """Where patches start, one entry more than the row: would the next, unknown byte start one?"""
        self._check_length(ids)
        entropies = self.entropies(ids) if self.config.patching.uses_entropies else None
        return patch_starts(ids, entropies, self.config.patching)

    def patches(self, text: Text) -> list[bytes]:
        """The text cut where the model's patches start, BOS left out."""
        data = byte_ids.as_bytes(text)
        starts = self.text_patch_starts(data)[0, 1:-1].nonzero().flatten().tolist()
        return [data[begin:end] for begin, end in pairwise([*starts, len(data)])]

    def text_patch_starts(self, text: Text) -> PatchStarts:
        """``patch_starts`` of one row, BOS and a text of any length.

        Text beyond the model's limit of positions is cut in stretches of that length, each a document of its own. An n-gram
        entropy model knows no limit: to it the text is one document, read at tens of megabytes a second.
        """
        data, longest = byte_ids.as_bytes(text), self.config.max_bytes - 1
        if isinstance(self.entropy_model, NgramEntropyModel) and self.config.patching.uses_entropies:
            numbers = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(self.device)
            return patch_starts_of_documents(self.entropy_model.text_entropies(numbers), self.config.patching)
        stretches = [data[begin : begin + longest] for begin in range(0, max(1, len(data)), longest)]
        starts = [self.patch_starts(self.encode(stretch)) for stretch in stretches]
        return torch.cat([starts[0][:, :1], *(found[:, 1:-1] for found in starts), starts[-1][:, -1:]], dim=1)

    def predict(self, ids: ByteIds) -> tuple[Logits, Logits | None, PatchStarts]:
        """Logits of the network and of the entropy model, and the patch starts between them, for whole rows."""
        self._check_length(ids)
        if not isinstance(self.entropy_model, EntropyModel):  # n-gram statistics predict no id
            starts = self.patch_starts(ids)
            return self.network(ids, starts), None, starts
        entropy_logits = self.entropy_model(ids)
        starts = patch_starts(ids, entropies_of(entropy_logits), self.config.patching)
        return self.network(ids, starts), entropy_logits, starts

    def score(self, text: Text, window_bytes: int = 4096) -> Score:
        """Bits per byte and patch statistics of a text, as one document; see ``evaluate.windows`` for long ones.

        Raises ValueError for an empty text, and for windows that hold no byte.
        """
        if not text:
            raise ValueError("an empty text has no bits per byte")
        if window_bytes < 2:
            raise ValueError(f"window_bytes must be at least 2, BOS and a byte, got {window_bytes}")
        window = min(window_bytes, self.config.max_bytes)
        return score_documents(self.predict, [byte_ids.as_bytes(text)], window, self.device)[0]

    def generate(self, prompt: Text | Sequence[Text], max_bytes: int = 200, **options: Any) -> bytes | list[bytes]:
        """What the model writes after the prompt, the prompt left out; for a list of prompts a list.

        The rows of a list are written together. Row i draws with ``seed + i``, so it is what the prompt alone gives with
        that seed. Options as in ``stream``.
        """
        if isinstance(prompt, str | bytes):
            return b"".join(self.stream(prompt, max_bytes, **options))
        seed, stop = options.pop("seed", 0), _stop_words(options.pop("stop", ()))
        stats, speculate, compiled = (
            options.pop("stats", None),
            options.pop("speculate", 0),
            options.pop("compiled", False),
        )
        requests = [
            self._request(one, max_bytes, seed=seed + row, stop=stop, **options) for row, one in enumerate(prompt)
        ]
        return write_all(self._networks(compiled), requests, speculate, stats)

    def stream(
        self,
        prompt: Text,
        max_bytes: int = 200,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Text | Iterable[Text] = (),
        utf8: bool = False,
        speculate: int = 0,
        compiled: bool = False,
        stats: GenerationStats | None = None,
    ) -> Iterator[bytes]:
        """Pieces of what the model writes, as they come: whole UTF-8 characters, up to a stop string, EOS or the limit.

        ``stop`` is one text or several. ``utf8``: only bytes that keep what is written well-formed, and at the limit no
        beginning of a character. Temperature 0 is greedy. ``speculate``: draft up to so many bytes a round and verify them
        in one pass (same bytes when greedy, same distribution when not; 0: plain). ``compiled``: steps of one row are
        compiled by torch, which takes a minute at first. ``stats`` is filled as the stream goes on.

        Raises ValueError where prompt and ``max_bytes`` exceed the model's limit.
        """
        request = self._request(
            prompt,
            max_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            utf8=utf8,
        )
        return stream(Batch(self._networks(compiled), speculate, stats), request)

    def save(self, folder: str | Path) -> None:
        """Write the model in Hugging Face's ``blt`` format, in bf16 if that holds all its numbers, and what its card says.

        Raises ValueError for one that was loaded in int8, OSError for a place that cannot be written.
        """
        if any(isinstance(part, Int8Linear) for part in self.network.modules()):
            raise ValueError("the weights of this model are rounded to int8; load it without dtype='int8' to save it")
        save_model(Path(folder), self.config, self.entropy_model, self.network, self.card)

    def _request(
        self, prompt: Text, max_bytes: int, *, seed: int = 0, stop: Text | Iterable[Text] = (), **sampling: Any
    ) -> Request:
        prompt_ids = byte_ids.encode(prompt)
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        if len(prompt_ids) + max_bytes > self.config.max_bytes:
            raise ValueError(
                f"a prompt of {len(prompt_ids) - 1} bytes and max_bytes {max_bytes} exceed the {self.config.max_bytes - 1} "
                "bytes this model can hold; shorten one of them"
            )
        return Request(prompt_ids, max_bytes, Sampling(**sampling), seed, _stop_words(stop))

    def _networks(self, compiled: bool) -> Networks:
        if self.config.patching.uses_entropies and self.config.patching.threshold_nats is None:
            raise ValueError("this model has no threshold yet, it is only begun; train it first: blt train --help")
        if compiled and self.device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler

            try:
                get_cpp_compiler()
            except InvalidCxxCompiler as error:
                raise ValueError(
                    "torch finds no C++ compiler, which compiled steps need; install one (apt install g++) or name it in CXX, "
                    "or leave compiled steps (--compile) out"
                ) from error
        return Networks(self.config, self.entropy_model, self.network, compiled)

    def _check_length(self, ids: ByteIds) -> None:
        if ids.shape[1] > self.config.max_bytes:
            raise ValueError(
                f"a row of {ids.shape[1]} ids is beyond this model's limit of {self.config.max_bytes}; cut the text"
            )


def _stop_words(stop: Text | Iterable[Text]) -> list[bytes]:
    return [byte_ids.as_bytes(word) for word in ([stop] if isinstance(stop, str | bytes) else stop)]


def load(model: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> LanguageModel:
    """A model from a run folder, a folder in Hugging Face's ``blt`` format or the official release format, or a hub id such as
    ``itazap/blt-1b-hf``; ``builtin`` is the small one that comes with the package. A licence, where there is one, is
    said on stderr.

    ``dtype``: auto (bf16 on a GPU, fp32 elsewhere), float32, bfloat16, or int8, which rounds the network's matrices and makes
    compiled generation on a CPU faster. The entropy model stays in fp32, so the patches are the same in all of them. Weights
    that are stored as they are asked for are mapped from the disk; hash tables that are stored in bf16 stay so.

    An existing path is never looked up on the hub. Raises FileNotFoundError or ValueError that says what to do.
    """
    target, dtype = pick_device(str(device)), str(dtype).removeprefix("torch.")
    folder, card = model_folder_and_card(model)
    loaded = load_model(folder, pick_dtype("auto" if dtype == "int8" else dtype, target))
    found = LanguageModel(*loaded, card).to(target)
    if dtype == "int8":
        round_to_int8(found.network)
    return found


def model_folder_and_card(model: str | Path) -> tuple[Path, ModelCard]:
    """The folder that holds the model's files, and its card, whose licence is said on stderr."""
    folder = model_folder(model)
    return folder, card_of(folder, str(model))


def card_of(folder: Path, model: str) -> ModelCard:
    """The card in a folder that ``model`` stands for; its licence is said on stderr."""
    card = read_card(folder, None if Path(model).exists() or model == BUILTIN else model)
    if card.license_line:
        print(f"{model}: licence {card.license_line}", file=sys.stderr)
    return card


def model_folder(model: str | Path) -> Path:
    """The folder that holds the model's files: of a run its ``model`` folder; for a hub id, downloaded or cached."""
    path = Path(model)
    if str(model) == BUILTIN and not path.exists():
        return PACKAGE / BUILTIN
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if path.exists():
        if (path / "config.toml").is_file() and not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} is a run without a model yet; train on with: blt train {path}/config.toml "
                f"--out {path} --resume"
            )
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is a file; give the folder that holds the model's config.json")
        return path
    name = str(model)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(errno.ENOENT, "no such model folder", name)
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except GatedRepoError:  # a child of the next
        reason = f"it is gated; accept its licence on https://huggingface.co/{name}, then {LOG_IN}"
    except (RepositoryNotFoundError, HFValidationError):
        reason = f"the hub has no model of that name; check it, and if it is private, {LOG_IN}"
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = (
            f"it is not in the cache, and {'HF_HUB_OFFLINE forbids the network' if offline else 'there is no network'}; "
            f"download it where there is one with: hf download {name} --local-dir FOLDER, and give that folder"
        )
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = (
            f"the hub did not give it ({type(error).__name__}: {first_line}); check the network, or download it elsewhere "
            "and give its folder"
        )
    raise FileNotFoundError(f"{name} is no folder here, and cannot be had from the hub: {reason}")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU (mps has to be asked for: nobody has measured it yet).

    Raises ValueError for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
    if not (index.isdigit() or not index) or int(index or 0) >= count:
        raise ValueError(f"device {name} is not available here; use --device cpu, or auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU and fp32 elsewhere. Raises ValueError for another name."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"dtype {name} is none of auto, {', '.join(dtypes)} and int8")
    return dtypes[name]
