"""A run's config -> what the run begins from: network and card of a model, an entropy model, a teacher, scored entropies."""

from dataclasses import replace
from pathlib import Path

import torch

from blt.config import NETWORK_SECTIONS, ModelConfig, RunConfig
from blt.entropy_cache import EntropyCache, open_entropies
from blt.language_model import model_folder, model_folder_and_card
from blt.lora import check_adapters
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.transformer import initialise
from blt.model_card import ModelCard
from blt.model_files import load_entropy_model, load_model, read_model_config
from blt.token_teacher import Lesson, load_token_teacher


def check_beginning(config: RunConfig) -> None:
    """Raises ValueError where the model to go on from has another network than [model], or [lora] does not fit it."""
    if config.init is not None:
        found = read_model_config(model_folder(config.init))
        for name in NETWORK_SECTIONS:
            if getattr(found, name) != getattr(config.model, name):
                raise ValueError(
                    f"the network of {config.init} has another {name} than [model]: {getattr(found, name)!r}; leave "
                    f"model.{name} as it is there"
                )
        if config.lora is not None and found.patching.uses_entropies and found.patching.threshold_nats is None:
            raise ValueError(f"{config.init} is only begun, its local parts are fresh: train it in whole before [lora]")
    if config.lora is not None:
        with torch.device("meta"):
            check_adapters(ByteLatentTransformer(config.model), config.lora)


def first_card(config: RunConfig) -> ModelCard:
    """Licence and source of the model that training goes on from; its figures are no longer true."""
    if config.init is None:
        return ModelCard()
    _, card = model_folder_and_card(config.init)
    return replace(card, source=card.source or model_name(config.init), training=None, figures=())


def model_name(model: str) -> str:
    """A hub id, or of a folder only its own name, as the folders above may tell more than they should."""
    is_hub_id = not Path(model).exists() and model.count("/") == 1 and not model.startswith(("/", ".", "~"))
    return model if is_hub_id else Path(model).resolve().name


def first_network(config: RunConfig, model_config: ModelConfig) -> ByteLatentTransformer:
    """The network that training begins with: that of ``init``, or fresh weights."""
    if config.init is None:
        network = ByteLatentTransformer(model_config)
        initialise(network, torch.Generator().manual_seed(config.training.seed))
        return network
    _, _, network = load_model(model_folder(config.init), torch.float32)
    network.config = model_config
    return network


def pretrained_entropy_model(config: RunConfig, device: torch.device) -> EntropyModel | NgramEntropyModel | None:
    """The entropy model of the model that the config names, if it does. Raises ValueError for one of another shape."""
    source = config.entropy_model_source
    if source is None or config.model.entropy_model is None:
        return None
    _, found = load_entropy_model(model_folder(source))
    if found is None or found.config != config.model.entropy_model:
        raise ValueError(
            f"{source} has another entropy model than [model.entropy_model] describes: "
            f"{found.config if found else 'none'}"
        )
    return found.to(device)


def scored_entropies(config: RunConfig, pretrained: EntropyModel | NgramEntropyModel | None) -> EntropyCache | None:
    """The entropies that the config names, if it does. Raises ValueError for those of another model or other rows."""
    if config.data.entropies is None:
        return None
    assert isinstance(pretrained, EntropyModel)
    scored = open_entropies(Path(config.data.entropies))
    scored.check_scored_by(str(config.entropy_model_source), pretrained, config.data, config.training.row_bytes)
    patching = config.model.patching
    if patching.rule == "entropy" and patching.threshold_nats is not None:
        scored.check_threshold(patching.threshold_nats)
    return scored


def entropy_teacher(config: RunConfig, device: torch.device) -> EntropyModel | None:
    """The entropy model that teaches this run's, if the config names one. Raises ValueError for one that cannot."""
    if config.entropy_teacher is None:
        return None
    assert config.entropy_training is not None
    teachers_config, found = load_entropy_model(model_folder(config.entropy_teacher))
    if found is None:
        raise ValueError(f"entropy_teacher {config.entropy_teacher} has no entropy model; name a model that has one")
    if isinstance(found, NgramEntropyModel):
        raise ValueError(
            f"entropy_teacher {config.entropy_teacher} counts n-grams and predicts no byte; name another model"
        )
    if config.entropy_training.row_bytes > teachers_config.max_bytes:
        raise ValueError(
            f"entropy_training.row_bytes {config.entropy_training.row_bytes} exceeds the {teachers_config.max_bytes} "
            f"positions that entropy_teacher {config.entropy_teacher} can read"
        )
    return found.to(device)


def token_lesson(config: RunConfig, device: torch.device) -> Lesson | None:
    """What a token model teaches this run's network, if the config names one. Raises as ``load_token_teacher``."""
    if config.token_teacher is None:
        return None
    teacher = load_token_teacher(config.token_teacher.folder, device)
    positions = getattr(teacher.model.config, "max_position_embeddings", None)
    if positions is not None and positions <= config.training.row_bytes:
        raise ValueError(
            f"{config.token_teacher.folder} can read {positions} tokens, and a row of {config.training.row_bytes} bytes may "
            "be as many; lower training.row_bytes"
        )
    return Lesson(teacher, config.token_teacher.weight)
