"""A token model in Llama's format -> the latent transformer of a BLT whose local parts are fresh (the paper's section 6.2).

Its layers do the same work on patches as they did on tokens: attention over what came before, then a feed-forward network.
What knew of tokens, embedding, head and final norm, stays behind.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from blt.checkpoint import write_whole
from blt.config import RunConfig, TransformerConfig, validated
from blt.config_file import to_toml
from blt.huggingface import BLOCK_NAMES, renamed, rope_values
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.ngram_entropy_model import NgramEntropyModel
from blt.model.transformer import Transformer, initialise
from blt.model_card import ModelCard
from blt.model_files import StoredModel, named_weights, write_model
from blt.weights_file import Weight, in_memory, read_weights, weight_files

LATENT = "network.latent_transformer.transformer."
LATENT_RATE = 0.1  # of the other parts' learning rate: the paper's, for latent layers that come from a token model
RUN_FILE = "train.toml"
ONLY_SUPPORTED = {  # what Llama's layers have in common with ours; anything else would compute something else
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

Rows = Float[Tensor, "outputs inputs"]


def convert_token_model(folder: Path, config: RunConfig, target: Path, card: ModelCard) -> RunConfig:
    """Write the BLT that ``config`` describes, its latent transformer that of a token model; how to train it stands beside it.

    The latent shape is the token model's, whatever the config says of it; its weights are kept to the bit but for the order of
    rows in queries and keys. Local parts and entropy model are fresh, and there is no threshold yet: training with the config
    that is returned (``train.toml`` in the folder) makes both.

    ``card``: the token model's own, whose licence holds for what is made of it.

    Raises FileNotFoundError or ValueError for a folder that holds no such model, FileExistsError for a target that holds
    something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; name a folder that is not there yet, or empty it")
    latent, weights = latent_of_token_model(folder)
    values = config.model_dump(exclude_none=True)
    values["model"] |= {"latent": latent.model_dump(exclude_none=True)}
    values["model"]["patching"].pop("threshold_nats", None)
    if "latent_learning_rate_factor" not in config.training.model_fields_set:
        values["training"] |= {"latent_learning_rate_factor": LATENT_RATE}
    values["init"] = str(target.resolve())
    made = validated(RunConfig, values, "the config to begin with")
    card = replace(card, training=None, figures=(), source=card.source or folder.resolve().name)
    write_model(target, StoredModel(made.model, _fresh_weights(made) | weights), card)
    write_whole(target / RUN_FILE, to_toml(made))
    return made


def latent_of_token_model(folder: Path) -> tuple[TransformerConfig, dict[str, Weight]]:
    """Shape and weights, under our names, of the latent transformer that a token model makes. Raises as above."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} holds no token model: there is no config.json in it")
    try:
        values = json.loads(config_file.read_text("utf-8"))
        shape = _latent_config(values, str(config_file))
        kv_heads = values.get("num_key_value_heads") or shape.num_heads
        if shape.num_heads % kv_heads:
            raise ValueError(f"{shape.num_heads} heads cannot share {kv_heads} keys and values")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file} is damaged, it is not JSON ({error}); copy the model again") from None
    except KeyError as error:
        raise ValueError(f"{config_file} lacks the key {error}") from None
    except (AttributeError, TypeError, ZeroDivisionError):
        raise ValueError(
            f"{config_file} is not the config.json of a Llama: its values are not what they should be; copy the model again"
        ) from None
    except ValueError as error:
        raise ValueError(str(error) if str(config_file) in str(error) else f"{config_file}: {error}") from None
    stored: dict[str, Weight] = {}
    for file in weight_files(folder, "model"):
        stored |= read_weights(file)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in Transformer(shape).state_dict().items()}
    found = {}
    for name, size in expected.items():
        theirs = _their_name(name)
        if theirs not in stored:
            raise ValueError(f"{folder} lacks the weight {theirs}; copy it again")
        weight = _as_ours(name, stored[theirs], shape, kv_heads)
        if weight.shape != size:
            raise ValueError(f"{folder}: {theirs} does not have the shape that its config.json asks for")
        found[LATENT + name] = weight
    return shape, found


def _latent_config(values: dict[str, Any], origin: str) -> TransformerConfig:
    for key, supported in ONLY_SUPPORTED.items():
        if values.get(key, supported) != supported or (key == "model_type" and key not in values):
            raise ValueError(
                f"{origin}: {key} is {values.get(key)!r}, and only {supported!r} can become a latent transformer"
            )
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"{origin}: head_dim is {values['head_dim']}, and only hidden_size / num_attention_heads is supported"
        )
    return validated(
        TransformerConfig,
        {
            "num_layers": values["num_hidden_layers"],
            "width": width,
            "num_heads": heads,
            "ffn_width": values["intermediate_size"],
            **rope_values({"rope_theta": 10_000.0, **values}),
            "norm_eps": values.get("rms_norm_eps", 1e-6),
        },
        origin,
    )


def _their_name(name: str) -> str:
    """
    >>> _their_name("layers.0.attention.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return renamed(name, [("", "model.")], BLOCK_NAMES)


def _as_ours(name: str, weight: Weight, config: TransformerConfig, kv_heads: int) -> Weight:
    """A weight as our layers have it: pairs of rotary positions side by side, and a key and a value for every head."""

    def changed(rows: Rows) -> Float[Tensor, "outputs_of_all_heads inputs"]:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            rows = rows.unflatten(0, (kv_heads, -1)).repeat_interleave(config.num_heads // kv_heads, 0).flatten(0, 1)
        return interleaved(rows, config.num_heads) if name.endswith(("q_proj.weight", "k_proj.weight")) else rows

    if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return weight
    shape = (
        weight.shape[0] * config.num_heads // kv_heads if "q_proj" not in name else weight.shape[0],
        *weight.shape[1:],
    )
    return Weight(weight.dtype, shape, lambda: iter([changed(weight.tensor(weight.dtype))]))


def interleaved(rows: Rows, num_heads: int) -> Rows:
    """Rows of queries or keys whose rotary pairs are (i, i + half a head) in the order in which they are (2i, 2i + 1).

    >>> interleaved(torch.arange(8.0)[:, None], num_heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _fresh_weights(config: RunConfig) -> dict[str, Weight]:
    """Everything but the latent layers, as training from nothing would begin."""
    with torch.device("meta"):
        network = ByteLatentTransformer(config.model)
    parts = [network.local_encoder, network.latent_transformer.input_proj, network.local_decoder]
    entropy_model: EntropyModel | NgramEntropyModel | None = None
    if config.model.entropy_model is not None and config.model.entropy_model.kind == "ngram":
        entropy_model = NgramEntropyModel(config.model.entropy_model)
    elif config.model.entropy_model is not None:
        entropy_model = EntropyModel(config.model.entropy_model)
        initialise(entropy_model, torch.Generator().manual_seed(config.training.seed))
    generator = torch.Generator().manual_seed(config.training.seed)
    for part in parts:
        initialise(part.to_empty(device="cpu"), generator)
    return {
        name: in_memory(weight) for name, weight in named_weights(entropy_model, network).items() if not weight.is_meta
    }
