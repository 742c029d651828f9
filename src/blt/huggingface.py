"""Hugging Face's ``blt`` format: two tables, config keys and weight names, read in both directions.

``transformers`` loads what its ``BltForCausalLM`` can express. Anything else (another patching rule, a newline reset,
other windows) is written under our own ``model_type``, which ``transformers`` refuses instead of computing something else.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import ValidationError

from blt.byte_ids import BOS, EOS, VOCAB_SIZE
from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    PatchingConfig,
    TransformerConfig,
    problems,
    validated,
)

HF_PAD = 3
# Models that transformers' class cannot express: config.json holds our ModelConfig, and the weights have a name that no
# class of transformers looks for, since BltForCausalLM asked by name does not read the model_type.
OWN_MODEL_TYPE = "blt-lm"
WEIGHTS, OWN_WEIGHTS = "model", "blt-lm"  # what the names of their files begin with
GENERATION = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": HF_PAD, "use_cache": False}

# what released models have and this code computes; a config.json that says otherwise is refused
ONLY_SUPPORTED: dict[tuple[str, ...], Any] = {
    ("patching_mode",): "entropy",
    ("patch_in_forward",): True,
    ("tie_word_embeddings",): False,
    ("encoder_config", "cross_attn_all_layers"): False,
    ("decoder_config", "cross_attn_all_layers"): True,
    **{(f"{part}_config", "hidden_act"): "silu" for part in ("patcher", "encoder", "decoder", "global")},
}

STACK_KEYS = {  # of patcher_config, encoder_config, decoder_config, global_config
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}

ROPE_SCALING_KEYS = {  # of rope_parameters
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}

WEIGHT_NAMES = (  # ours, theirs; the first prefix that fits is replaced, then the names inside a block
    ("entropy_model.byte_embedding.", "model.patcher.embed_tokens."),
    ("entropy_model.transformer.", "model.patcher."),
    ("entropy_model.norm.", "model.patcher.norm."),
    ("entropy_model.head.", "model.patcher.lm_head."),
    ("network.local_encoder.byte_embedding.", "model.local_encoder.embed_tokens."),
    ("network.local_encoder.hash_embeddings.tables.", "model.encoder_hash_tok_embedding."),
    ("network.local_encoder.transformer.", "model.local_encoder."),
    ("network.local_encoder.slot_proj.", "model.local_encoder.patch_embedding_projection."),
    ("network.local_encoder.cross_attention.", "model.local_encoder.cross_attn_layers.0."),
    ("network.latent_transformer.input_proj.", "model.global_transformer.token_embedding_projection."),
    ("network.latent_transformer.transformer.", "model.global_transformer."),
    ("network.local_decoder.slot_proj.", "model.local_decoder.patch_embedding_projection."),
    ("network.local_decoder.cross_attentions.", "model.local_decoder.cross_attn_layers."),
    ("network.local_decoder.transformer.", "model.local_decoder."),
    ("network.local_decoder.norm.", "model.local_decoder.norm."),
    ("network.local_decoder.head.", "lm_head."),
)
BLOCK_NAMES = (
    (".attention.", ".self_attn."),
    (".ffn.", ".mlp."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def weight_name(name: str) -> str:
    """Hugging Face's name of one of our weights.

    >>> weight_name("network.local_decoder.transformer.layers.0.ffn.up_proj.weight")
    'model.local_decoder.layers.0.mlp.up_proj.weight'
    """
    return renamed(name, WEIGHT_NAMES, BLOCK_NAMES)


def renamed(name: str, prefixes: Iterable[tuple[str, str]], inside: Iterable[tuple[str, str]]) -> str:
    """A weight's name with the first of the prefixes that fits replaced, then what stands inside it.

    >>> renamed("network.head.norm.weight", [("network.", ""), ("network.head.", "out.")], [(".norm.", ".n.")])
    'head.n.weight'
    """
    name = next((theirs + name.removeprefix(ours) for ours, theirs in prefixes if name.startswith(ours)), name)
    for ours, theirs in inside:
        name = name.replace(ours, theirs)
    return name


def inexpressible(config: ModelConfig) -> list[str]:
    """What of this model transformers' class cannot compute; empty: it loads there and computes the same."""
    reasons = []
    if config.patching.rule != "entropy":
        reasons.append(f"patching rule {config.patching.rule!r}")
    elif config.patching.threshold_nats is None:
        reasons.append("a threshold that is not calibrated yet")
    entropy_model = config.entropy_model
    if entropy_model is not None and entropy_model.kind == "ngram":
        reasons.append("an entropy model of n-gram statistics")
    elif entropy_model is not None and entropy_model.reset_at_newline:
        reasons.append("an entropy context that is reset at newlines")
    if config.hash_embeddings.min_count > 1:
        reasons.append("n-grams that are looked up only if training text has them often enough")
    if config.local_encoder.window_positions != config.local_decoder.window_positions:
        reasons.append("different windows in local encoder and decoder")
    if config.local_encoder.window_positions is None or config.latent.window_positions is not None:
        reasons.append("windows other than a local one")
    if entropy_model is not None and entropy_model.kind == "transformer" and entropy_model.window_positions is None:
        reasons.append("an entropy model without a window")
    return reasons


def to_config_json(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The contents of config.json; ``dtype``: the widest that the weights are stored in."""
    dtype_name = str(dtype).removeprefix("torch.")
    if inexpressible(config):
        values = config.model_dump(mode="json", exclude_none=True)
        return {"model_type": OWN_MODEL_TYPE, "dtype": dtype_name, "model": values}
    assert config.entropy_model is not None and config.entropy_model.kind == "transformer"
    encoder, decoder, latent, k = config.local_encoder, config.local_decoder, config.latent, config.slots_per_patch
    local = {"vocab_size": VOCAB_SIZE, "cross_attn_k": k, "hidden_size_global": latent.width}
    longest = config.max_bytes
    projected = k * encoder.width if k * encoder.width != latent.width else None
    hashes = config.hash_embeddings
    return {
        "model_type": "blt",
        "architectures": ["BltForCausalLM"],
        "dtype": dtype_name,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": HF_PAD,
        "tie_word_embeddings": False,
        "use_cache": False,  # with it, transformers' own forward pass fails for models of this class
        "max_position_embeddings": longest,
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patching_threshold": config.patching.threshold_nats,
        "max_patch_length": config.patching.max_patch_bytes,
        "local_attention_window_len": encoder.window_positions,
        "cross_attn_k": k,
        "encoder_hash_byte_group_size": list(hashes.ngram_bytes),
        "encoder_hash_byte_group_vocab": hashes.table_rows,
        "encoder_hash_byte_group_nb_functions": hashes.num_functions,
        "patcher_config": {"vocab_size": VOCAB_SIZE, **_stack_json(config.entropy_model, longest)},
        "encoder_config": {**local, "cross_attn_all_layers": False, **_stack_json(encoder, longest)},
        "decoder_config": {**local, "cross_attn_all_layers": True, **_stack_json(decoder, longest)},
        "global_config": {"encoder_cross_output_size": projected, **_stack_json(latent, longest)},
    }


def from_config_json(values: dict[str, Any], origin: str) -> ModelConfig:
    """The model config that a config.json describes. Raises ValueError for models of another kind."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == OWN_MODEL_TYPE:
        return validated(ModelConfig, values.get("model", {}), origin)
    if kind != "blt":
        raise ValueError(f"{origin} describes a model of type {kind!r}, not 'blt': this is no Byte Latent Transformer")
    try:
        for path, supported in ONLY_SUPPORTED.items():
            found: Any = values
            for key in path:
                found = found.get(key, supported if key == path[-1] else {})
            if found != supported:
                raise ValueError(f"{origin}: {'.'.join(path)} is {found!r}, and only {supported!r} is supported")
        encoder = values["encoder_config"]
        return ModelConfig(
            entropy_model=EntropyModelConfig(**_stack_values(values["patcher_config"], windowed=True)),
            patching=PatchingConfig(
                rule="entropy",
                threshold_nats=values["patching_threshold"],
                max_patch_bytes=values.get("max_patch_length"),
            ),
            hash_embeddings=HashEmbeddingsConfig(
                ngram_bytes=tuple(values["encoder_hash_byte_group_size"]),
                table_rows=values["encoder_hash_byte_group_vocab"],
                num_functions=values["encoder_hash_byte_group_nb_functions"],
            ),
            local_encoder=TransformerConfig(
                **_stack_values(encoder), window_positions=values.get("local_attention_window_len", 512)
            ),
            latent=TransformerConfig(**_stack_values(values["global_config"])),
            local_decoder=TransformerConfig(
                **_stack_values(values["decoder_config"]),
                window_positions=values.get("local_attention_window_len", 512),
            ),
            slots_per_patch=values["cross_attn_k"],
            max_bytes=encoder.get("max_position_embeddings", 24_576),
        )
    except KeyError as error:
        raise ValueError(f"{origin} lacks the key {error}") from None
    except (AttributeError, TypeError):
        raise ValueError(
            f"{origin} is not the config.json of a blt model: its parts are not where they should be"
        ) from None
    except ValidationError as error:
        raise ValueError(f"{origin}: {problems(error)}") from None
    except ValueError as error:
        raise ValueError(str(error) if origin in str(error) else f"{origin}: {error}") from None


def _stack_json(config: TransformerConfig, longest: int) -> dict[str, Any]:
    return {
        **{theirs: getattr(config, ours) for ours, theirs in STACK_KEYS.items()},
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "rope_parameters": rope_json(config),
        "sliding_window": config.window_positions,
        "max_position_embeddings": longest,
    }


def _stack_values(values: dict[str, Any], windowed: bool = False) -> dict[str, Any]:
    window = {"window_positions": values.get("sliding_window", 512)} if windowed else {}
    return {ours: values[theirs] for ours, theirs in STACK_KEYS.items()} | rope_values(values) | window


def rope_json(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions as transformers describes them."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {
        "rope_theta": config.rope_theta,
        "rope_type": "llama3",
        **{theirs: getattr(scaling, ours) for ours, theirs in ROPE_SCALING_KEYS.items()},
    }


def rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """And back, from the config of one stack, as transformers 5 or an older one writes it. Raises ValueError for other kinds.

    >>> rope_values({"rope_theta": 10000.0}), rope_values({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    ({'rope_theta': 10000.0}, {'rope_theta': 500000.0})
    """
    rope = values.get("rope_parameters") or {"rope_theta": values["rope_theta"], **(values.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(rope["rope_theta"])}
    if kind != "llama3":
        raise ValueError(f"rotary positions are scaled as {kind!r}, and only 'llama3' and 'default' are supported")
    scaling = {ours: rope[theirs] for ours, theirs in ROPE_SCALING_KEYS.items()}
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}
