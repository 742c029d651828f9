"""A model's folder, in Hugging Face's or the official format -> config, entropy model and network; and back.

Both formats come down to the same thing, a config and weights under our names, each read when it is needed. So a model is
loaded, saved or converted by the same few steps, and no step holds more than one tensor that it does not have to keep.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blt import huggingface, official
from blt.checkpoint import files_together
from blt.config import ModelConfig
from blt.huggingface import OWN_WEIGHTS, WEIGHTS, inexpressible
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model_card import ModelCard, card_files, read_card
from blt.tokenizer_files import tokenizer_files
from blt.weights_file import (
    SHARD_BYTES,
    Weight,
    all_fit_bfloat16,
    converted,
    in_memory,
    index_name,
    read_weights,
    weight_files,
    write_weights,
)

Format = Literal["hf", "official"]
ONE_FILE = 2**63  # bytes: the official format has no index of files


@dataclass(frozen=True)
class StoredModel:
    """A model on disk or in memory: its weights, under our names, are read when they are asked for."""

    config: ModelConfig
    weights: Mapping[str, Weight]

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.weights.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its floating-point weights'."""
        dtypes = {weight.dtype for weight in self.weights.values() if weight.dtype.is_floating_point}
        return max(dtypes, key=lambda dtype: dtype.itemsize)


def load_model(
    folder: Path, dtype: torch.dtype
) -> tuple[ModelConfig, EntropyModel | NgramEntropyModel | None, ByteLatentTransformer]:
    """A model from its folder, the network in ``dtype``, the entropy model always in fp32 or whole numbers.

    Hash tables stay in what they are stored in where that is narrower (fp8 becomes bf16): a sum of their rows is formed in
    fp32. What needs no other dtype is mapped from the disk and not read before it is used.

    Raises FileNotFoundError or ValueError, naming the file, for anything missing, damaged or of another kind.
    """
    stored = stored_model(folder)
    entropy_model, network = _without_weights(stored.config)
    _fill(network, "network.", stored.weights, dtype)
    if entropy_model is not None:
        _fill(entropy_model, "entropy_model.", stored.weights, torch.float32)
    return stored.config, entropy_model, network.eval()


def load_entropy_model(folder: Path) -> tuple[ModelConfig, EntropyModel | NgramEntropyModel | None]:
    """A model's config and its entropy model in fp32, the network's weights left on disk. Raises as ``load_model``."""
    stored = stored_model(folder)
    entropy_model, _ = _without_weights(stored.config)
    if entropy_model is not None:
        _fill(entropy_model, "entropy_model.", stored.weights, torch.float32)
    return stored.config, entropy_model


def save_model(
    folder: Path,
    config: ModelConfig,
    entropy_model: EntropyModel | NgramEntropyModel | None,
    network: ByteLatentTransformer,
    card: ModelCard = ModelCard(),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model in Hugging Face's format, in bf16 if that holds every one of its numbers exactly.

    So a bf16 model that was loaded in fp32 comes back to the bit. Hash tables that are fp8 in memory are written so, half as
    large; read again they are bf16, and saved as bf16. Raises OSError where it cannot be written; what was in the folder then
    stays as it was.
    """
    weights = {name: in_memory(weight) for name, weight in named_weights(entropy_model, network).items()}
    if all_fit_bfloat16(weights):
        wide = {name for name, weight in weights.items() if weight.dtype == torch.float32}
        weights |= {name: converted(weights[name], torch.bfloat16) for name in wide}
    write_model(folder, StoredModel(config, weights), card, shard_bytes)


def convert(
    source: Path,
    target: Path,
    to: Format,
    card: ModelCard | None = None,
    written: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the model of one folder into another, in the format asked for, tensor by tensor and to the bit; its weights' bytes.

    ``written`` hears how many bytes of how many are done. Raises FileExistsError for a folder that holds something,
    ValueError for a model that the format cannot express, and as ``load_model``.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a folder that is not there yet")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; name a folder that is not there yet, or empty it")
    stored, done = stored_model(source), 0
    card = read_card(source) if card is None else card
    total, is_new = stored.num_bytes, not target.exists()

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        written(done, total)

    if to == "official" and (reasons := official.not_official(stored.config)):
        raise ValueError(
            f"the official format cannot express this model: {'; '.join(reasons)}; --to hf can write every model"
        )
    try:
        if to == "official":
            _write_official(target, stored, card, count)
        else:
            write_model(target, stored, card, shard_bytes, count)
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise
    return total


def write_card(folder: Path, config: ModelConfig, card: ModelCard) -> None:
    """Replace the card of a folder that holds a model."""
    with files_together(folder) as path_of:
        for name, text in card_files(card, config, inexpressible(config)).items():
            path_of(name).write_text(text, "utf-8")


def read_model_config(folder: Path) -> ModelConfig:
    """The model config of a folder. Raises FileNotFoundError or ValueError as ``load_model``."""
    values = _config_json(folder)
    if official.is_official(values):
        return official.from_official(values, folder, _official_weights(folder))
    return huggingface.from_config_json(values, str(folder / "config.json"))


def stored_model(folder: Path) -> StoredModel:
    """The model of a folder in any format, its weights left on disk. Raises as ``load_model``."""
    values = _config_json(folder)
    if official.is_official(values):
        return _read_official(folder, values)
    config = huggingface.from_config_json(values, str(folder / "config.json"))
    shapes = weight_shapes(config)
    expected = {huggingface.weight_name(name): shape for name, shape in shapes.items()}
    found: dict[str, Weight] = {}
    is_own = values["model_type"] == huggingface.OWN_MODEL_TYPE
    for file in weight_files(folder, OWN_WEIGHTS if is_own else WEIGHTS):
        found |= _checked(read_weights(file), expected, file)
    _refuse_missing(expected, found, folder)
    return StoredModel(config, {name: found[huggingface.weight_name(name)] for name in shapes})


def named_weights(entropy_model: nn.Module | None, network: nn.Module) -> dict[str, Tensor]:
    """All weights of a model under our names."""
    modules = {"network": network} if entropy_model is None else {"entropy_model": entropy_model, "network": network}
    return {
        f"{prefix}.{name}": weight for prefix, module in modules.items() for name, weight in module.state_dict().items()
    }


def _config_json(folder: Path) -> Any:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    try:
        return json.loads(config_file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is damaged, it is not JSON ({error}); copy the model again") from None


def _read_official(folder: Path, values: dict[str, Any]) -> StoredModel:
    found = _official_weights(folder)
    config = official.from_official(values, folder, found)
    shapes = weight_shapes(config)
    expected = official.expected_weights(config, shapes)
    _checked(found, expected, folder)
    _refuse_missing(expected, found, folder)
    return StoredModel(config, official.to_our_names(config, found, shapes))


def _official_weights(folder: Path) -> dict[str, Weight]:
    found: dict[str, Weight] = {}
    for file in weight_files(folder, WEIGHTS):
        found |= read_weights(file)
    return found | official.read_entropy_weights(folder)


def _checked(found: dict[str, Weight], expected: Mapping[str, tuple[int, ...]], origin: Path) -> dict[str, Weight]:
    for name, weight in found.items():
        if name not in expected:
            raise ValueError(f"{origin} holds {name}, which the model of its config.json does not have")
        if weight.shape != expected[name]:
            raise ValueError(
                f"{origin}: {name} has shape {list(weight.shape)}, its config.json asks for {list(expected[name])}"
            )
    return found


def _refuse_missing(expected: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    missing = expected.keys() - found.keys()
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's weights, {min(missing)} among them; copy it again"
        )


def _without_weights(config: ModelConfig) -> tuple[EntropyModel | NgramEntropyModel | None, ByteLatentTransformer]:
    """The modules that a config describes, on the meta device."""
    entropy_model: EntropyModel | NgramEntropyModel | None = None
    with torch.device("meta"):
        if config.entropy_model is not None and config.entropy_model.kind == "ngram":
            entropy_model = NgramEntropyModel(config.entropy_model)
        elif config.entropy_model is not None:
            entropy_model = EntropyModel(config.entropy_model)
        return entropy_model, ByteLatentTransformer(config)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a model, under our names."""
    return {name: tuple(weight.shape) for name, weight in named_weights(*_without_weights(config)).items()}


def _fill(module: nn.Module, prefix: str, weights: Mapping[str, Weight], dtype: torch.dtype) -> None:
    """Floating-point weights in ``dtype``, tables at most; whole numbers stay what they are."""
    filled = {}
    for name, expected in module.state_dict().items():
        weight = weights[prefix + name]
        asked = dtype if expected.is_floating_point() else expected.dtype
        if prefix + name == official.TABLES:
            stored = torch.bfloat16 if weight.dtype == torch.float8_e4m3fn else weight.dtype
            asked = min(dtype, stored, key=lambda one: one.itemsize)
        filled[name] = weight.tensor(asked)
    module.load_state_dict(filled, assign=True)


def write_model(
    folder: Path,
    model: StoredModel,
    card: ModelCard,
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a model in Hugging Face's format, its weights as they are; ``written`` hears of every piece's bytes."""
    stem = OWN_WEIGHTS if inexpressible(model.config) else WEIGHTS
    weights = {huggingface.weight_name(name): weight for name, weight in model.weights.items()}
    contents = {"config.json": huggingface.to_config_json(model.config, model.dtype)}
    contents |= {"generation_config.json": huggingface.GENERATION} | tokenizer_files(model.config.max_bytes)
    with files_together(folder) as path_of:
        names = write_weights(stem, weights, path_of, shard_bytes, written)
        _write_texts(path_of, contents, card_files(card, model.config, inexpressible(model.config)))
    for one in (WEIGHTS, OWN_WEIGHTS):  # of an earlier model, of as many files as it had, or of a save that was killed
        for pattern in (
            f"{one}.safetensors",
            f"{one}-*-of-*.safetensors",
            index_name(one),
            f"{one}*.safetensors*.partial",
        ):
            for outdated in folder.glob(pattern):
                if outdated.name not in names:
                    outdated.unlink()


def _write_official(folder: Path, model: StoredModel, card: ModelCard, written: Callable[[int], None]) -> None:
    weights = official.to_official_names(model.config, model.weights)
    args, params = official.to_official(model.config)
    of_network = {name: weight for name, weight in weights.items() if " " not in name}
    with files_together(folder) as path_of:
        write_weights(WEIGHTS, of_network, path_of, ONE_FILE, written)
        path_of(official.ENTROPY_WEIGHTS).write_bytes(official.entropy_file(weights))
        _write_texts(
            path_of,
            {"config.json": args, official.PARAMS: params},
            card_files(card, model.config, inexpressible(model.config)),
        )


def _write_texts(path_of: Callable[[str], Path], contents: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    for name, content in contents.items():
        path_of(name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name, text in texts.items():
        path_of(name).write_text(text, "utf-8")
