"""The official release format of BLT (``facebook/blt-1b``): config keys and weight names, read and written.

A folder holds config.json ({"args": ...}) and model.safetensors for the network, entropy_model/params.json and
entropy_model/consolidated.pth for the entropy model. Names as in transformers' conversion script; nothing here is the
released code. Weights decide about feed-forward widths, which the keys give only by a formula.
"""

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from blt.byte_ids import VOCAB_SIZE
from blt.config import (
    EntropyModelConfig,
    HashEmbeddingsConfig,
    ModelConfig,
    PatchingConfig,
    TransformerConfig,
    problems,
)
from blt.huggingface import inexpressible, renamed
from blt.weights_file import Weight, in_memory, rows_of, stacked

PARAMS, ENTROPY_WEIGHTS = "entropy_model/params.json", "entropy_model/consolidated.pth"
TABLES = "network.local_encoder.hash_embeddings.tables.weight"  # one matrix of ours, one of theirs for each table

WEIGHT_NAMES = (  # ours, theirs; the first prefix that fits is replaced, then the names inside a block
    ("entropy_model.byte_embedding.", "tok_embeddings."),
    ("entropy_model.transformer.", ""),
    ("entropy_model.norm.", "norm."),
    ("entropy_model.head.", "output."),
    ("network.local_encoder.byte_embedding.", "local_encoder.tok_embeddings."),
    ("network.local_encoder.transformer.", "local_encoder."),
    ("network.local_encoder.slot_proj.", "local_encoder.patch_embedding_projection."),
    ("network.local_encoder.cross_attention.", "local_encoder.cross_attn_layers.0."),
    ("network.latent_transformer.input_proj.", "global_transformer.token_embedding_projection."),
    ("network.latent_transformer.transformer.", "global_transformer."),
    ("network.local_decoder.slot_proj.", "local_decoder.patch_embedding_projection."),
    ("network.local_decoder.cross_attentions.", "local_decoder.cross_attn_layers."),
    ("network.local_decoder.transformer.", "local_decoder."),
    ("network.local_decoder.norm.", "local_decoder.norm."),
    ("network.local_decoder.head.", "local_decoder.output."),
)
BLOCK_NAMES = (
    *((f".{ours}_proj.", f".w{ours}.") for ours in "qkvo"),
    (".q_norm.", ".cross_attn_norm_q."),
    (".k_norm.", ".cross_attn_norm_kv."),
    (".ffn.gate_proj.", ".feed_forward.w1."),
    (".ffn.down_proj.", ".feed_forward.w2."),
    (".ffn.up_proj.", ".feed_forward.w3."),
)

ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {  # of "args"; a key that is absent is what released models have
    "vocab_size": (VOCAB_SIZE,),
    "patching_mode": ("entropy",),
    "patching_threshold_add": (None, 0),
    "monotonicity": (False,),
    "pm_size": (None, 0),
    "hidden_act": ("silu",),
    "cross_attn_all_layers_decoder": (True,),
}
ONLY_SUPPORTED_OF_PATCHER: dict[str, tuple[Any, ...]] = {"threshold_add": (None, 0), "monotonicity": (None, False)}
ONLY_SUPPORTED_OF_ENTROPY_MODEL: dict[str, tuple[Any, ...]] = {"vocab_size": (VOCAB_SIZE,)}
WINDOW = 512  # of the local networks and the entropy model, where the keys do not say it
MULTIPLES = tuple(2**power for power in range(8, -1, -1))  # of feed-forward widths; the released models': 256


def is_official(values: Any) -> bool:
    """Whether a config.json is one of this format."""
    return isinstance(values, dict) and "args" in values


def weight_name(name: str) -> str:
    """The official name of one of our weights; those of the entropy model are in a file of their own.

    >>> weight_name("network.local_decoder.transformer.layers.0.ffn.up_proj.weight")
    'local_decoder.layers.0.feed_forward.w3.weight'
    """
    return renamed(name, WEIGHT_NAMES, BLOCK_NAMES)


def table_name(index: int) -> str:
    return f"encoder_hash_tok_embedding.{index}.weight"


def expected_weights(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a folder under official names, those of the entropy model with their file in front."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name == TABLES:
            of_one = (config.hash_embeddings.table_rows, shape[1])
            expected |= {table_name(index): of_one for index in range(config.hash_embeddings.num_tables)}
        else:
            expected[_with_file(name)] = shape
    return expected


def to_our_names(
    config: ModelConfig, found: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Weight]:
    """What a folder holds (named as ``expected_weights`` does) under our names, its tables below each other."""
    tables = stacked([found[table_name(index)] for index in range(config.hash_embeddings.num_tables)])
    return {name: tables if name == TABLES else found[_with_file(name)] for name in shapes}


def to_official_names(config: ModelConfig, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """All our weights named as ``expected_weights`` does, the tables apart."""
    rows, named = config.hash_embeddings.table_rows, {}
    for name, weight in weights.items():
        if name == TABLES:
            for index in range(config.hash_embeddings.num_tables):
                named[table_name(index)] = rows_of(weight, index * rows, (index + 1) * rows)
        else:
            named[_with_file(name)] = weight
    return named


def _with_file(name: str) -> str:
    """
    >>> _with_file("entropy_model.norm.weight"), _with_file("network.local_decoder.norm.weight")
    ('entropy_model/consolidated.pth norm.weight', 'local_decoder.norm.weight')
    """
    return f"{ENTROPY_WEIGHTS} {weight_name(name)}" if name.startswith("entropy_model.") else weight_name(name)


def read_entropy_weights(folder: Path) -> dict[str, Weight]:
    """The entropy model's weights under official names. Raises ValueError for a file that holds more than tensors."""
    file = folder / ENTROPY_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {ENTROPY_WEIGHTS}; copy the whole model, its entropy model too")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} is damaged, or a pickle of more than tensors, which could run code and is not read"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged or no file of torch.save ({reason}); copy the model again") from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f'{file} holds no tensors by name under "model"; it is not the entropy model of a BLT')
    return {f"{ENTROPY_WEIGHTS} {name}": in_memory(tensor) for name, tensor in tensors.items()}


def entropy_file(weights: Mapping[str, Weight]) -> bytes:
    """The contents of consolidated.pth: the entropy model's among these official weights."""
    prefix = f"{ENTROPY_WEIGHTS} "
    tensors = {
        name.removeprefix(prefix): weight.tensor(weight.dtype).cpu().clone()
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
    written = io.BytesIO()
    torch.save({"model": tensors}, written)
    return written.getvalue()


def from_official(values: dict[str, Any], folder: Path, found: Mapping[str, Weight]) -> ModelConfig:
    """The model config of a folder, from its config.json, entropy_model/params.json and the shapes of its weights.

    Raises ValueError or FileNotFoundError that names the file and the key for what this code does not compute.
    """
    origin, params_file = folder / "config.json", folder / PARAMS
    try:
        params = json.loads(params_file.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no {PARAMS}; copy the whole model, its entropy model too") from None
    except ValueError as error:
        raise ValueError(f"{params_file} is damaged, it is not JSON ({error}); copy the model again") from None
    try:
        args, of_entropy, of_patcher = values["args"], params["entropy_model"], params["data"]["patcher_args"]
        _refuse_unsupported(args, ONLY_SUPPORTED, f"{origin}: args")
        _refuse_unsupported(of_patcher, ONLY_SUPPORTED_OF_PATCHER, f"{params_file}: data.patcher_args")
        _refuse_unsupported(of_entropy, ONLY_SUPPORTED_OF_ENTROPY_MODEL, f"{params_file}: entropy_model")
        heads = {part: args[f"n_heads_{part}"] for part in ("local_encoder", "local_decoder")}
        for part in heads:  # theirs names one number for both, ours takes that of each part's self-attention
            _refuse_unsupported(args, {"cross_attn_nheads": (heads[part], None)}, f"{origin}: args, for the {part}")
        if args["n_layers_local_encoder"] > 1:  # after one layer it is the same
            _refuse_unsupported(args, {"cross_attn_all_layers_encoder": (False,)}, f"{origin}: args")
        _refuse_unsupported(args, {"n_kv_heads": (None, *heads.values())}, f"{origin}: args")
        _refuse_unsupported(args, {"n_kv_heads_global": (None, args["n_heads_global"])}, f"{origin}: args")
        _refuse_unsupported(of_entropy, {"n_kv_heads": (None, of_entropy["n_heads"])}, f"{params_file}: entropy_model")
        window = args.get("local_attention_window_len", WINDOW)
        parts = {part: _stack(args, part, found, window) for part in heads}
        threshold = of_patcher.get("threshold", args.get("patching_threshold"))
        return ModelConfig(
            entropy_model=EntropyModelConfig(
                num_layers=_whole(of_entropy["n_layers"]),
                width=_whole(of_entropy["dim"]),
                num_heads=_whole(of_entropy["n_heads"]),
                ffn_width=_ffn_width(found, f"{ENTROPY_WEIGHTS} "),
                rope_theta=of_entropy.get("rope_theta", 10_000.0),
                norm_eps=of_entropy.get("norm_eps", 1e-5),
                window_positions=of_entropy.get("sliding_window") or WINDOW,
            ),
            patching=PatchingConfig(
                threshold_nats=threshold, max_patch_bytes=_whole(of_patcher.get("max_patch_length"))
            ),
            hash_embeddings=HashEmbeddingsConfig(
                ngram_bytes=tuple(args["encoder_hash_byte_group_size"]),
                table_rows=_whole(args["encoder_hash_byte_group_vocab"]),
                num_functions=_whole(args["encoder_hash_byte_group_nb_functions"]),
            ),
            local_encoder=parts["local_encoder"],
            latent=_stack(args, "global", found, None),
            local_decoder=parts["local_decoder"],
            slots_per_patch=_whole(args["cross_attn_k"]),
            max_bytes=_whole(args.get("max_encoder_seq_length") or args["max_seqlen"]),
        )
    except KeyError as error:
        raise ValueError(f"{origin} and {params_file} lack the key {error}") from None
    except (AttributeError, TypeError):
        raise ValueError(f"{origin} or {params_file}: a value is not where it should be, or of another kind") from None
    except ValidationError as error:
        raise ValueError(f"{origin} and {params_file}: {problems(error)}") from None


def not_official(config: ModelConfig) -> list[str]:
    """What of this model the official format has no keys for; empty: it can be written."""
    encoder, decoder, latent = config.local_encoder, config.local_decoder, config.latent
    reasons = inexpressible(config)
    for key in ("rope_theta", "norm_eps"):
        if len({getattr(part, key) for part in (encoder, decoder, latent)}) > 1:
            reasons.append(f"a {key} of each part's own")
    if any(getattr(part, "rope_scaling", None) for part in (encoder, decoder, latent, config.entropy_model)):
        reasons.append("scaled rotary positions")
    if encoder.num_heads != decoder.num_heads:
        reasons.append("different numbers of heads in local encoder and decoder")
    if _multiple_of(encoder, decoder, latent) is None or (
        isinstance(config.entropy_model, EntropyModelConfig) and _multiple_of(config.entropy_model) is None
    ):
        reasons.append("feed-forward widths other than 8/3 of the width, rounded up to one multiple")
    return reasons


def to_official(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and of entropy_model/params.json, for a model with nothing in ``not_official``."""
    entropy_model, patching, hashes = config.entropy_model, config.patching, config.hash_embeddings
    assert isinstance(entropy_model, EntropyModelConfig) and not not_official(config)
    parts = {"local_encoder": config.local_encoder, "local_decoder": config.local_decoder, "global": config.latent}
    args: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_encoder_seq_length": config.max_bytes}
    args["max_seqlen"] = config.max_bytes
    for part, stack in parts.items():
        args |= {f"dim_{part}": stack.width, f"n_layers_{part}": stack.num_layers, f"n_heads_{part}": stack.num_heads}
    args |= {
        "multiple_of": _multiple_of(*parts.values()),
        "norm_eps": config.latent.norm_eps,
        "rope_theta": config.latent.rope_theta,
        "local_attention_window_len": config.local_encoder.window_positions,
        "cross_attn_k": config.slots_per_patch,
        "cross_attn_nheads": config.local_encoder.num_heads,
        "cross_attn_all_layers_encoder": False,
        "cross_attn_all_layers_decoder": True,
        "encoder_hash_byte_group_size": list(hashes.ngram_bytes),
        "encoder_hash_byte_group_vocab": hashes.table_rows,
        "encoder_hash_byte_group_nb_functions": hashes.num_functions,
        "patching_mode": "entropy",
        "patching_threshold": patching.threshold_nats,
        "max_patch_length": patching.max_patch_bytes,
    }
    of_entropy = {
        "vocab_size": VOCAB_SIZE,
        "dim": entropy_model.width,
        "n_layers": entropy_model.num_layers,
        "n_heads": entropy_model.num_heads,
        "multiple_of": _multiple_of(entropy_model),
        "norm_eps": entropy_model.norm_eps,
        "rope_theta": entropy_model.rope_theta,
        "sliding_window": entropy_model.window_positions,
        "max_seqlen": config.max_bytes,
    }
    of_patcher = {
        "patching_mode": "entropy",
        "threshold": patching.threshold_nats,
        "max_patch_length": patching.max_patch_bytes,
        "monotonicity": False,
    }
    return {"args": args}, {"entropy_model": of_entropy, "data": {"patcher_args": of_patcher}}


def _stack(args: dict[str, Any], part: str, found: Mapping[str, Weight], window: int | None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=_whole(args[f"n_layers_{part}"]),
        width=_whole(args[f"dim_{part}"]),
        num_heads=_whole(args[f"n_heads_{part}"]),
        ffn_width=_ffn_width(found, "global_transformer." if part == "global" else f"{part}."),
        rope_theta=args.get("rope_theta", 500_000.0),
        norm_eps=args.get("norm_eps", 1e-5),
        window_positions=_whole(window),
    )


def _ffn_width(found: Mapping[str, Weight], prefix: str) -> int:
    """The width of a part's first feed-forward layer, which all its layers are then checked against."""
    name = f"{prefix}layers.0.feed_forward.w1.weight"
    if name not in found:
        raise ValueError(f"the model lacks the weight {name}; copy it again")
    return found[name].shape[0]


def _refuse_unsupported(values: dict[str, Any], supported: dict[str, tuple[Any, ...]], origin: str) -> None:
    for key, allowed in supported.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{origin}: {key} is {values[key]!r}, and only {allowed[0]!r} is supported")


def _whole(number: Any) -> Any:
    """A number that some files write as 4.0, as a config wants it."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _multiple_of(*stacks: TransformerConfig) -> int | None:
    """The largest multiple that 8/3 of each width is rounded up to, to give its feed-forward width; None: there is none.

    >>> _multiple_of(TransformerConfig(num_layers=1, width=768, num_heads=12)), _multiple_of(
    ...     TransformerConfig(num_layers=1, width=16, num_heads=2, ffn_width=24))
    (256, None)
    """
    for multiple in MULTIPLES:
        if all(-(-(8 * stack.width // 3) // multiple) * multiple == stack.ffn_width for stack in stacks):
            return multiple
    return None
