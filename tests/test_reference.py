"""The whole network against the plainest program that computes it: one row, dense masks, explicit sums, in float64."""

import math
import random

import pytest
import torch
from tiny import SHAPE, random_models, random_row, tiny_config
from torch import Tensor, nn

from blt.byte_ids import BOS, EOS
from blt.config import ModelConfig, TransformerConfig
from blt.config_file import read_run_config
from blt.flops import parameter_counts
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.hash_embeddings import PRIMES

Weights = dict[str, Tensor]

PROJECTED = tiny_config(
    slots_per_patch=4,  # 4 x 16 is not the latent width
    local_encoder=TransformerConfig(num_layers=2, window_positions=5, **SHAPE),
    latent=TransformerConfig(num_layers=2, width=24, num_heads=2, ffn_width=40),
    local_decoder=TransformerConfig(num_layers=1, window_positions=None, **SHAPE),
)
WINDOWED_LATENT = tiny_config(
    latent=TransformerConfig(num_layers=2, width=32, num_heads=2, ffn_width=24, window_positions=3),
)
CONFIGS = {"two_slots": tiny_config(), "four_slots_projected": PROJECTED, "windowed_latent": WINDOWED_LATENT}
EOS_PLACES = {"no_eos": (), "one_eos": (9,), "three_eos": (4, 12, 20), "eos_last": (23,)}


def reference_logits(config: ModelConfig, weights: Weights, ids: list[int], starts: list[bool]) -> Tensor:
    """Next-byte logits of one row, ``[byte, vocab]``."""
    num_bytes, num_patches, k = len(ids), sum(starts[:-1]), config.slots_per_patch
    patch_of = [sum(starts[: t + 1]) - 1 for t in range(num_bytes)]
    newest_closed = [sum(starts[: t + 2]) - 2 for t in range(num_bytes)]
    document_of = [ids[:t].count(EOS) for t in range(num_bytes)]
    bytes_of = [[t for t in range(num_bytes) if patch_of[t] == patch] for patch in range(num_patches)]
    closes_document = [any(ids[t] == EOS for t in bytes_of[patch]) for patch in range(num_patches)]
    document_of_patch = [sum(closes_document[:patch]) for patch in range(num_patches)]

    # local encoder
    states = torch.stack([byte_embedding(config, weights, ids, t) for t in range(num_bytes)])
    states = blocks(config.local_encoder, weights, "local_encoder.transformer.", states, document_of)
    pooled = torch.stack([torch.stack([states[t] for t in own]).amax(0) for own in bytes_of])
    slots = linear(weights, "local_encoder.slot_proj", pooled).reshape(num_patches * k, -1)
    own_bytes = [[patch_of[t] == slot // k for t in range(num_bytes)] for slot in range(num_patches * k)]
    read = cross_attention(config.local_encoder, weights, "local_encoder.cross_attention.", slots, states, own_bytes)
    patches = (slots + (slots + read)).reshape(num_patches, -1)

    # latent transformer
    if patches.shape[1] != config.latent.width:
        patches = linear(weights, "latent_transformer.input_proj", patches)
    latents = blocks(config.latent, weights, "latent_transformer.transformer.", patches, document_of_patch)

    # local decoder
    slots = linear(weights, "local_decoder.slot_proj", latents).reshape(num_patches * k, -1)
    closed = [[newest_closed[t] == slot // k for slot in range(num_patches * k)] for t in range(num_bytes)]
    for layer in range(config.local_decoder.num_layers):
        name = f"local_decoder.cross_attentions.{layer}."
        states = states + (states + cross_attention(config.local_decoder, weights, name, states, slots, closed))
        name = f"local_decoder.transformer.layers.{layer}."
        states = block(config.local_decoder, weights, name, states, document_of)
    return linear(weights, "local_decoder.head", norm(config.local_decoder, weights, "local_decoder.norm", states))


def byte_embedding(config: ModelConfig, weights: Weights, ids: list[int], t: int) -> Tensor:
    """The byte's own embedding plus a row of every table."""
    embedding = weights["local_encoder.byte_embedding.weight"][ids[t]]
    hashes, table = config.hash_embeddings, 0
    for prime in PRIMES[: hashes.num_functions]:
        for size in hashes.ngram_bytes:
            ngram = [ids[s] if s >= 0 else 0 for s in range(t - size + 1, t + 1)]
            value = sum(byte_id * prime**j for j, byte_id in enumerate(ngram))
            wrapped = (value + 2**63) % 2**64 - 2**63
            row = table * hashes.table_rows + wrapped % hashes.table_rows
            embedding = embedding + weights["local_encoder.hash_embeddings.tables.weight"][row]
            table += 1
    return embedding


def blocks(config: TransformerConfig, weights: Weights, name: str, states: Tensor, document_of: list[int]) -> Tensor:
    for layer in range(config.num_layers):
        states = block(config, weights, f"{name}layers.{layer}.", states, document_of)
    return states


def block(config: TransformerConfig, weights: Weights, name: str, states: Tensor, document_of: list[int]) -> Tensor:
    window = config.window_positions or len(states)
    allowed = [
        [s <= t and t - s < window and document_of[s] == document_of[t] for s in range(len(states))]
        for t in range(len(states))
    ]
    y = norm(config, weights, name + "attention_norm", states)
    queries, keys, values = (linear(weights, f"{name}attention.{part}_proj", y) for part in "qkv")
    queries, keys = (rotated(config, side) for side in (queries, keys))
    states = states + linear(weights, name + "attention.o_proj", attention(config, queries, keys, values, allowed))
    y = norm(config, weights, name + "ffn_norm", states)
    gate = linear(weights, name + "ffn.gate_proj", y)
    silu = gate / (1 + torch.exp(-gate))
    return states + linear(weights, name + "ffn.down_proj", silu * linear(weights, name + "ffn.up_proj", y))


def cross_attention(
    config: TransformerConfig, weights: Weights, name: str, readers: Tensor, read: Tensor, allowed: list[list[bool]]
) -> Tensor:
    readers = norm(config, weights, name + "q_norm", readers)
    read = norm(config, weights, name + "k_norm", read)
    queries = linear(weights, name + "q_proj", readers)
    keys, values = linear(weights, name + "k_proj", read), linear(weights, name + "v_proj", read)
    return linear(weights, name + "o_proj", attention(config, queries, keys, values, allowed))


def attention(
    config: TransformerConfig, queries: Tensor, keys: Tensor, values: Tensor, allowed: list[list[bool]]
) -> Tensor:
    """Head by head: a dense matrix of scores, its exponentials where allowed, divided by their sum."""
    mixed = []
    for head in range(config.num_heads):
        part = slice(head * config.head_dim, (head + 1) * config.head_dim)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(config.head_dim)
        exponentials = torch.exp(scores) * torch.tensor(allowed)
        mixed.append(exponentials / exponentials.sum(1, keepdim=True) @ values[:, part])
    return torch.cat(mixed, dim=1)


def rotated(config: TransformerConfig, states: Tensor) -> Tensor:
    """Pair i of each head turned by position * theta^(-2i / head_dim), by cosine and sine."""
    columns: list[Tensor] = []
    positions = torch.arange(len(states), dtype=torch.float64)
    for first in range(0, config.width, 2):
        i = first % config.head_dim // 2
        angles = positions * config.rope_theta ** (-2 * i / config.head_dim)
        x, y = states[:, first], states[:, first + 1]
        columns += [x * angles.cos() - y * angles.sin(), x * angles.sin() + y * angles.cos()]
    return torch.stack(columns, dim=1)


def linear(weights: Weights, name: str, states: Tensor) -> Tensor:
    return states @ weights[name + ".weight"].T


def norm(config: TransformerConfig, weights: Weights, name: str, states: Tensor) -> Tensor:
    mean_square = (states**2).sum(1, keepdim=True) / states.shape[1]
    return states / torch.sqrt(mean_square + config.norm_eps) * weights[name + ".weight"]


def random_starts(num_ids: int, seed: int, ids: list[int] | None = None) -> list[bool]:
    """Starts at random; where ``ids`` are given also at the first two ids of each document, as every rule has it."""
    coin = random.Random(seed)
    starts = [position < 2 or coin.random() < 0.4 for position in range(num_ids + 1)]
    for position, byte_id in enumerate(ids or []):
        if byte_id == EOS:
            starts[position + 1 : position + 3] = [True] * len(starts[position + 1 : position + 3])
    return starts


def float64_weights(network: nn.Module) -> Weights:
    return {name: weight.detach().double().requires_grad_() for name, weight in network.named_parameters()}


@pytest.mark.parametrize("patches", ["within_documents", "across_documents"])
@pytest.mark.parametrize("eos", EOS_PLACES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_computes_what_the_dense_reference_computes(name: str, eos: str, patches: str) -> None:
    config = CONFIGS[name]
    _, network = random_models(config)
    row = random_row(24, seed=1, eos_at=EOS_PLACES[eos])
    ids = row[0].tolist()
    starts = random_starts(24, seed=2, ids=ids if patches == "within_documents" else None)
    with torch.no_grad():
        logits = network(row, torch.tensor([starts]))
        expected = reference_logits(config, float64_weights(network), ids, starts)
    torch.testing.assert_close(logits[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_ids", [1, 2, 3])
def test_the_shortest_rows_compute_what_the_dense_reference_computes(num_ids: int) -> None:
    _, network = random_models(PROJECTED)
    row = random_row(num_ids, seed=3)
    for last_starts in (True, False) if num_ids > 1 else (True,):
        starts = [True] * num_ids + [last_starts]
        with torch.no_grad():
            logits = network(row, torch.tensor([starts]))
            expected = reference_logits(PROJECTED, float64_weights(network), row[0].tolist(), starts)
        torch.testing.assert_close(logits[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_a_batch_with_ragged_patches_and_padding_compute_their_own_reference(name: str) -> None:
    config = CONFIGS[name]
    _, network = random_models(config)
    rows = [random_row(n, seed=n, eos_at=eos)[0].tolist() for n, eos in ((24, ()), (24, (11,)), (17, ()), (2, ()))]
    starts = [[True] * 25, [True, True] + [False] * 23, random_starts(17, seed=5), [True, True, False]]
    batch = torch.tensor([row + [0] * (24 - len(row)) for row in rows])
    batch_starts = torch.tensor([row + [False] * (25 - len(row)) for row in starts])
    with torch.no_grad():
        logits = network(batch, batch_starts)
        for row, own_starts, own_logits in zip(rows, starts, logits, strict=True):
            expected = reference_logits(config, float64_weights(network), row, own_starts)
            torch.testing.assert_close(own_logits[: len(row)].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_all_weights_are_those_of_the_dense_reference(name: str) -> None:
    config = CONFIGS[name]
    _, network = random_models(config)
    row = random_row(20, seed=6, eos_at=(8,))
    ids = row[0].tolist()
    starts = random_starts(20, seed=7, ids=ids)
    targets = row[0, 1:]
    nn.functional.cross_entropy(network(row, torch.tensor([starts]))[0, :-1], targets).backward()
    weights = float64_weights(network)
    nn.functional.cross_entropy(reference_logits(config, weights, ids, starts)[:-1], targets).backward()
    for weight_name, weight in network.named_parameters():
        assert weight.grad is not None, weight_name
        torch.testing.assert_close(weight.grad.to_dense().double(), weights[weight_name].grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("starts", [[False, True, True, True], [True, False, True, True]])
def test_a_row_whose_first_two_ids_do_not_start_patches_is_refused(starts: list[bool]) -> None:
    _, network = random_models(tiny_config())
    with pytest.raises(ValueError, match="first two ids"):
        network(torch.tensor([[BOS, 70, 71]]), torch.tensor([starts]))


@pytest.mark.parametrize("name", ["tiny", "projected", "blt_1b", "blt_8b"])
def test_counted_parameters_are_those_of_the_modules(name: str) -> None:
    tiny = {"tiny": tiny_config(), "projected": PROJECTED}
    config = tiny[name] if name in tiny else read_run_config(name).model
    assert config.entropy_model is not None
    with torch.device("meta"):
        entropy_model, network = EntropyModel(config.entropy_model), ByteLatentTransformer(config)

    def size(module: nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters())

    encoder = network.local_encoder
    byte_embedding, hash_tables = size(encoder.byte_embedding), size(encoder.hash_embeddings)
    assert parameter_counts(config) == {
        "entropy_model": size(entropy_model),
        "byte_embedding": byte_embedding,
        "hash_tables": hash_tables,
        "local_encoder": size(encoder) - byte_embedding - hash_tables,
        "latent": size(network.latent_transformer),
        "local_decoder": size(network.local_decoder),
        "network": size(network),
        "total": size(entropy_model) + size(network),
    }
