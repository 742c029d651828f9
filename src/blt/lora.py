"""Small matrices that learn beside those of a network, which stay as they are (LoRA, arXiv 2106.09685); and the sum of both."""

import importlib.util
from typing import Any

import torch
from torch import nn

from blt.config import LoraConfig
from blt.model.byte_latent_transformer import ByteLatentTransformer

ADAPTER = "default"


def check_adapters(network: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError where peft is not installed or a target names no matrix of the network."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("[lora] needs peft: pip install 'blt-lm[hf]' -c constraints.txt")
    matrices = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise ValueError(f"lora.targets: no matrix of the network is called {target!r}; there are {known}")


def add_adapters(network: ByteLatentTransformer, config: LoraConfig, seed: int) -> None:
    """Freeze the network and put a low-rank adapter, which adds nothing yet, beside each matrix that the config names.

    The entropy model is no part of the network, so it is never adapted. Raises ValueError as ``check_adapters``.
    """
    check_adapters(network, config)
    import peft

    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, network, ADAPTER)


def merged(network: ByteLatentTransformer) -> ByteLatentTransformer:
    """A network without adapters that computes the same: each adapter's product is added to its matrix. One without any is
    given back.

    The adapted network stays as it is; weights that have no adapter are shared with it.
    """
    if not any(name.endswith(f"lora_A.{ADAPTER}") for name, _ in network.named_modules()):
        return network
    from peft.tuners.lora import LoraLayer

    adapted: dict[str, Any] = {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}
    weights = {}
    for name, weight in network.state_dict().items():
        holder, _, inner = name.partition(".base_layer.")
        if holder in adapted and inner == "weight":
            layer = adapted[holder]
            weights[f"{holder}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight)
        elif ".lora_" not in name:
            weights[name] = weight
    with torch.device("meta"):
        plain = type(network)(network.config)
    plain.load_state_dict(weights, assign=True)
    return plain.train(network.training)
