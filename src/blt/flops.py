"""A model config -> its parameters, FLOPs per byte by part, and memory, all without building the network.

Section 4.5 and eq. 13-17 of arXiv 2412.09871, counted for what the network here computes: a multiplication and its
addition are 2 FLOPs, table lookups (all that an n-gram entropy model does) and elementwise work are 0. Where we count
other than the paper:

- the feed-forward network is the config's own SwiGLU, three matrices; at a width of 8/3 h they cost the paper's 16 h^2;
- the encoder has one cross-attention, after its last layer (the released shape), not one per layer;
- the output head has 260 ids, the paper writes 256;
- the projections between widths are not in the paper's equations but are real work: each patch_embedding_projection is
  in its cross-attention's part, the token_embedding_projection in the latent part;
- the entropy model is not in eq. 13: it is a part of its own, and in the total.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blt.config import EntropyModelConfig, ModelConfig, NgramEntropyModelConfig, TransformerConfig

NUM_IDS = 260  # rows of the byte embedding, outputs of the head
LLAMA_3_VOCABULARY = 128_256
LLAMA_3_BYTES_PER_TOKEN = 4.4  # the paper's mean


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; ``network`` is what training updates, ``total`` is that and the entropy model.

    The parameters of an n-gram entropy model are the entries of its tables.
    """
    encoder, decoder, latent = config.local_encoder, config.local_decoder, config.latent
    slots_width = config.slots_per_patch * encoder.width
    encoder_cross = _cross_attention_parameters(encoder.width) + encoder.width * slots_width
    decoder_cross = decoder.num_layers * _cross_attention_parameters(decoder.width) + latent.width * slots_width
    token_embedding_projection = slots_width * latent.width if _latent_input_is_projected(config) else 0
    network = {
        "byte_embedding": NUM_IDS * encoder.width,
        "hash_tables": config.hash_embeddings.num_tables * config.hash_embeddings.table_rows * encoder.width,
        "local_encoder": _block_parameters(encoder) + encoder_cross,
        "latent": _block_parameters(latent) + token_embedding_projection,
        "local_decoder": _block_parameters(decoder) + decoder_cross + decoder.width + decoder.width * NUM_IDS,
    }
    entropy_model = 0
    if config.entropy_model is not None:
        entropy_model = _entropy_model_parameters(config.entropy_model)
    in_network = sum(network.values())
    return {"entropy_model": entropy_model, **network, "network": in_network, "total": entropy_model + in_network}


@dataclass(frozen=True)
class FlopsPerByte:
    """Forward FLOPs for one byte of text, by part, each a mean over the bytes of a patch and of the context."""

    entropy_model: float
    local_encoder: float
    encoder_cross_attention: float
    latent: float
    decoder_cross_attention: float
    local_decoder: float  # with the output head

    @property
    def network(self) -> float:
        """All but the entropy model: eq. 13."""
        return self.inference - self.entropy_model

    @property
    def inference(self) -> float:
        """The whole forward pass, the entropy model included."""
        return sum(asdict(self).values())

    @property
    def training(self) -> float:
        """Three forwards of the network (backward is twice the forward), one of the entropy model.

        The entropy model is frozen while the network trains, so it has no backward; with cached entropies not even this
        forward is spent. Training the entropy model itself is another run, not counted here.
        """
        return 3 * self.network + self.entropy_model

    def rows(self) -> list[tuple[str, float, float]]:
        """(part, inference, training) for every part in the order data flows, then the total."""
        parts = asdict(self)
        rows = [(part, flops, flops if part == "entropy_model" else 3 * flops) for part, flops in parts.items()]
        return [*rows, ("total", self.inference, self.training)]


def flops_per_byte(config: ModelConfig, mean_patch_bytes: float, context_bytes: int) -> FlopsPerByte:
    """FLOPs per byte of a text of ``context_bytes`` whose patches hold ``mean_patch_bytes`` on average (eq. 13).

    Cross-attention uses the paper's attention term too, although no causal mask halves it there: at the released shapes
    that leaves out less than 0.01% of the total.
    """
    if not 1 <= mean_patch_bytes <= context_bytes:
        raise ValueError(f"mean_patch_bytes must be from 1 to context_bytes {context_bytes}, got {mean_patch_bytes}")
    encoder, decoder, latent = config.local_encoder, config.local_decoder, config.latent
    slots = config.slots_per_patch
    slots_width = slots * encoder.width
    slots_per_byte = slots / mean_patch_bytes

    entropy_model = 0.0
    if config.entropy_model is not None and config.entropy_model.kind == "transformer":
        entropy_model = entropy_model_flops(config.entropy_model, context_bytes)

    # one query per slot, over the bytes of its patch
    encoder_cross = slots_per_byte * (
        projection_flops(encoder.width, keys_per_query=mean_patch_bytes / slots)
        + attention_flops(encoder.width, keys=mean_patch_bytes)
    )
    encoder_cross += 2 * encoder.width * slots_width / mean_patch_bytes

    token_embedding_projection = 2 * slots_width * latent.width if _latent_input_is_projected(config) else 0
    per_patch = transformer_flops(latent, context_bytes / mean_patch_bytes) + token_embedding_projection

    # one query per byte, over the slots of one patch; keys and values are made once per patch
    decoder_cross = decoder.num_layers * (
        projection_flops(decoder.width, keys_per_query=slots_per_byte) + attention_flops(decoder.width, keys=slots)
    )
    decoder_cross += 2 * latent.width * slots_width / mean_patch_bytes

    return FlopsPerByte(
        entropy_model=entropy_model,
        local_encoder=transformer_flops(encoder, context_bytes),
        encoder_cross_attention=encoder_cross,
        latent=per_patch / mean_patch_bytes,
        decoder_cross_attention=decoder_cross,
        local_decoder=transformer_flops(decoder, context_bytes) + 2 * decoder.width * NUM_IDS,
    )


def transformer_flops(config: TransformerConfig, context_positions: float) -> float:
    """Forward FLOPs for one position of a stack without a head, a mean over a causal context (eq. 14-17).

    >>> config = TransformerConfig(num_layers=1, width=4, num_heads=1, ffn_width=10)
    >>> transformer_flops(config, 7)  # projections 2 * 4 * 16, attention 4 * 4 * 4, feed-forward 2 * 3 * 40
    432.0
    """
    keys = min(context_positions, config.window_positions or context_positions)
    return config.num_layers * (
        projection_flops(config.width, keys_per_query=1)
        + attention_flops(config.width, keys)
        + feed_forward_flops(config.width, config.ffn_width)
    )


def entropy_model_flops(config: EntropyModelConfig, context_bytes: int) -> float:
    """Forward FLOPs per byte of an entropy model, its head included."""
    return transformer_flops(config, context_bytes) + 2 * config.width * NUM_IDS


def attention_flops(width: int, keys: float) -> float:
    """FLOPs of one query's scores and weighted sum; (keys + 1) / 2 is the mean under a causal mask.

    A window of w keys counts as keys = w, as in the paper, so positions with a full window count half of it. At 4.5
    bytes per patch that leaves out 1.7% of blt_1b's total, 0.5% of blt_8b's.
    """
    return 4 * width * (keys + 1) / 2


def projection_flops(width: int, keys_per_query: float) -> float:
    """FLOPs of one query's own projections q and o, and of k and v for ``keys_per_query`` positions (the paper's r)."""
    return (2 * keys_per_query + 2) * 2 * width**2


def feed_forward_flops(width: int, ffn_width: int) -> int:
    """FLOPs of one position's SwiGLU; at ffn_width = 8/3 width this is the paper's 2 * 2 * h * 4h.

    >>> feed_forward_flops(width=3, ffn_width=8), 16 * 3**2
    (144, 144)
    """
    return 2 * 3 * width * ffn_width


def token_model_flops_per_byte(
    latent: TransformerConfig,
    context_bytes: int,
    bytes_per_token: float = LLAMA_3_BYTES_PER_TOKEN,
    vocabulary: int = LLAMA_3_VOCABULARY,
) -> float:
    """Forward FLOPs per byte of a token model whose transformer is this latent one: one step and one head per token."""
    per_token = transformer_flops(latent, context_bytes / bytes_per_token) + 2 * latent.width * vocabulary
    return per_token / bytes_per_token


@dataclass(frozen=True)
class SavingRow:
    """A BLT against the token model with the same latent transformer and the same context in bytes."""

    mean_patch_bytes: float
    blt_flops_per_byte: float
    token_model_flops_per_byte: float
    saved_fraction: float  # of inference FLOPs, the entropy model counted; negative: BLT costs more
    saved_fraction_without_entropy_model: float  # as the paper counts


def saving_table(
    config: ModelConfig, patch_sizes: Sequence[float] = (4, 6, 8), context_bytes: int | None = None
) -> list[SavingRow]:
    """What patching saves at inference, one row per mean patch size; without ``context_bytes``: at max_bytes."""
    context_bytes = config.max_bytes if context_bytes is None else context_bytes
    token_model = token_model_flops_per_byte(config.latent, context_bytes)
    rows = []
    for mean_patch_bytes in (size for size in patch_sizes if size <= context_bytes):
        blt = flops_per_byte(config, mean_patch_bytes, context_bytes)
        rows.append(
            SavingRow(
                mean_patch_bytes=mean_patch_bytes,
                blt_flops_per_byte=blt.inference,
                token_model_flops_per_byte=token_model,
                saved_fraction=1 - blt.inference / token_model,
                saved_fraction_without_entropy_model=1 - blt.network / token_model,
            )
        )
    return rows


def weight_bytes(config: ModelConfig, bytes_per_parameter: int = 2) -> int:
    """Memory of all weights, the entropy model's included; 2 bytes per parameter are bfloat16, 4 are float32.

    An n-gram entropy model's tables are whole numbers, and as large in either.
    """
    counts = parameter_counts(config)
    return bytes_per_parameter * counts["network"] + _entropy_model_bytes(config, bytes_per_parameter)


def training_bytes(config: ModelConfig) -> int:
    """Memory of AdamW training in fp32, activations not counted.

    16 bytes per trained parameter (weight, gradient, two moments), 12 where it lies in a hash table, whose gradient holds the
    rows of a step only, 4 for each of a table's rows (when it was read last), and 4 per parameter of the frozen entropy model.
    """
    counts, tables = parameter_counts(config), config.hash_embeddings
    last_read = 4 * tables.num_tables * tables.table_rows
    trained = 16 * counts["network"] - 4 * counts["hash_tables"] + last_read
    return trained + _entropy_model_bytes(config, 4)


def cache_bytes_per_byte(
    config: ModelConfig, mean_patch_bytes: float, context_bytes: int, bytes_per_number: int = 2
) -> dict[str, float]:
    """Memory of cached self-attention keys and values per byte of a text of ``context_bytes``, by part and in total.

    The latent cache grows by one position per patch. Byte-level caches stop growing at their window, so their share
    falls with the context. Cross-attention reads one patch at a time and needs no cache that grows.
    """
    caches = {"entropy_model": 0.0}
    if config.entropy_model is not None and config.entropy_model.kind == "transformer":
        caches["entropy_model"] = _cached_numbers(config.entropy_model, context_bytes)
    caches["local_encoder"] = _cached_numbers(config.local_encoder, context_bytes)
    caches["latent"] = _cached_numbers(config.latent, context_bytes / mean_patch_bytes)
    caches["local_decoder"] = _cached_numbers(config.local_decoder, context_bytes)
    caches["total"] = sum(caches.values())
    return {part: bytes_per_number * numbers / context_bytes for part, numbers in caches.items()}


def summary(config: ModelConfig, mean_patch_bytes: float, context_bytes: int) -> dict[str, Any]:
    """Everything this module counts, as ``blt flops --json`` prints it."""
    per_byte = flops_per_byte(config, mean_patch_bytes, context_bytes)
    return {
        "parameters": parameter_counts(config),
        "mean_patch_bytes": mean_patch_bytes,
        "context_bytes": context_bytes,
        "flops_per_byte": {part: {"inference": i, "training": t} for part, i, t in per_byte.rows()},
        "savings": [asdict(row) for row in saving_table(config, context_bytes=context_bytes)],
        "weight_bytes_bfloat16": weight_bytes(config),
        "training_bytes": training_bytes(config),
        "cache_bytes_per_byte": cache_bytes_per_byte(config, mean_patch_bytes, context_bytes),
    }


def tables(counted: dict[str, Any]) -> list[Any]:
    """A summary as rich tables for a terminal, and a line about memory."""
    from rich.table import Table

    parameters = Table("part", "parameters", title="Parameters")
    for part, number in counted["parameters"].items():
        parameters.add_row(part, f"{number:,}")
    size = f"patches of {counted['mean_patch_bytes']} bytes, {counted['context_bytes']:,} bytes of context"
    per_byte = Table("part", "inference", "training", title="FLOPs per byte", caption=size)
    for part, flops in counted["flops_per_byte"].items():
        per_byte.add_row(part, f"{flops['inference']:,.0f}", f"{flops['training']:,.0f}")
    savings = Table("patch", "BLT", "token model", "saved", "without entropy model", title="Inference FLOPs per byte")
    savings.caption = "token model: the same latent transformer at 4.4 bytes per token, Llama 3's vocabulary"
    for row in counted["savings"]:
        savings.add_row(
            f"{row['mean_patch_bytes']} bytes",
            f"{row['blt_flops_per_byte']:,.0f}",
            f"{row['token_model_flops_per_byte']:,.0f}",
            f"{row['saved_fraction']:.1%}",
            f"{row['saved_fraction_without_entropy_model']:.1%}",
        )
    memory = (
        f"Memory: weights {counted['weight_bytes_bfloat16'] / 1e9:.3f} GB in bfloat16; AdamW training "
        f"{counted['training_bytes'] / 1e9:.3f} GB before activations; caches "
        f"{counted['cache_bytes_per_byte']['total'] / 1e3:.1f} kB per byte of text"
    )
    return [parameters, per_byte, savings, memory]


def _cached_numbers(config: TransformerConfig, context_positions: float) -> float:
    positions = min(context_positions, config.window_positions or context_positions)
    return 2 * config.num_layers * config.width * positions


def _entropy_model_parameters(config: EntropyModelConfig | NgramEntropyModelConfig) -> int:
    if config.kind == "ngram":
        return 2**16 + config.hashed_orders * 2**config.table_bits
    return NUM_IDS * config.width + _block_parameters(config) + config.width + config.width * NUM_IDS


def _entropy_model_bytes(config: ModelConfig, bytes_per_parameter: int) -> int:
    if config.entropy_model is None:
        return 0
    if config.entropy_model.kind == "ngram":  # 4 bytes for every two bytes, 2 for each slot
        return 4 * 2**16 + 2 * config.entropy_model.hashed_orders * 2**config.entropy_model.table_bits
    return bytes_per_parameter * _entropy_model_parameters(config.entropy_model)


def _block_parameters(config: TransformerConfig) -> int:
    """Of all blocks: q, k, v, o; three SwiGLU matrices; two norms. A norm after the last block is not among them."""
    width = config.width
    return config.num_layers * (4 * width**2 + 3 * width * config.ffn_width + 2 * width)


def _cross_attention_parameters(width: int) -> int:
    """Of one cross-attention: q, k, v, o, a norm for queries and one for keys and values."""
    return 4 * width**2 + 2 * width


def _latent_input_is_projected(config: ModelConfig) -> bool:
    return config.slots_per_patch * config.local_encoder.width != config.latent.width
