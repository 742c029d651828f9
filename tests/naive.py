"""Generation by its definition: for every byte one forward over all ids so far, and nothing kept. The oracle of the rest."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from tiny import SHAPE, random_models, random_row, threshold_between, tiny_config
from torch import Tensor

from blt.byte_ids import EOS, decode, encode
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, PatchingConfig, TransformerConfig
from blt.incremental import Networks
from blt.language_model import LanguageModel
from blt.sampling import NEVER_EMITTED, Sampling, next_probabilities

RULES = ("entropy", "entropy_rise", "space", "fixed")
# How far a decision has to be from its alternative: rounding in another order of sums reaches less than a tenth of these.
LOGITS_APART, NATS_APART, LEVEL_APART = 1e-4, 1e-5, 5e-6


def networks_of(lm: LanguageModel) -> Networks:
    return Networks(lm.config, lm.entropy_model, lm.network)


def language_model(rule: str, seed: int, confidence: float = 1.0, **changes: Any) -> LanguageModel:
    """A tiny model of random weights and of a shape that the seed decides; ``changes`` to its config come last.

    ``confidence`` multiplies its logits: at 5 and above, most often one byte is much more probable than all others.
    """
    rng = random.Random(f"{rule} {seed}")
    windows, slots = (None, 1, 6, 9, 17, 40), rng.choice([1, 2, 4])
    window = rng.choice(windows)
    config = tiny_config(
        entropy_model=EntropyModelConfig(
            num_layers=1, window_positions=rng.choice(windows), reset_at_newline=rng.choice([False, True]), **SHAPE
        ),
        patching=PatchingConfig(
            rule=rule,
            patch_bytes=rng.choice([2, 3, 5]) if rule == "fixed" else None,
            threshold_nats=0.0 if rule.startswith("entropy") else None,
            max_patch_bytes=rng.choice([None, None, 1, 3, 7]),
        ),
        hash_embeddings=HashEmbeddingsConfig(
            ngram_bytes=rng.choice([(1,), (3, 4, 5), (2, 8)]), table_rows=50, min_count=1 + seed % 2, filter_bits=8
        ),
        local_encoder=TransformerConfig(num_layers=1, window_positions=window, **SHAPE),
        latent=TransformerConfig(num_layers=rng.choice([1, 2]), width=32, num_heads=4, ffn_width=40),
        local_decoder=TransformerConfig(
            num_layers=rng.choice([1, 2]), window_positions=rng.choice([window, rng.choice(windows)]), **SHAPE
        ),
        slots_per_patch=slots,
    )
    config = type(config).model_validate(dict(config) | changes)
    entropy_model, network = random_models(config, seed)
    with torch.no_grad():
        network.local_decoder.head.weight *= confidence
        for cross_attention in network.local_decoder.crosses:  # patches are as loud as bytes: a wrong one is noticed
            cross_attention.o_proj.weight *= 10
    if config.patching.threshold_nats == 0:
        entropies = entropy_model.entropies(random_row(100, seed))
        values = entropies if rule == "entropy" else entropies.diff()
        patching = config.patching.model_copy(update={"threshold_nats": threshold_between(values)})
        config = config.model_copy(update={"patching": patching})
    return LanguageModel(config, entropy_model, network)


def random_prompts(count: int, seed: int, longest: int = 40) -> list[bytes]:
    """Prompts of different lengths, of which some are empty, some text and lines, and some any bytes."""
    rng = random.Random(seed)
    alphabets = (b"ab \n", b"the quick, brown\nfox. ", bytes(range(256)))
    return [
        bytes(rng.choices(rng.choice(alphabets), k=rng.choice([0, 1, rng.randint(2, longest)]))) for _ in range(count)
    ]


@torch.no_grad()
def next_logits(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[bool]]:
    """The logits of the id after each row; is every entropy of the row on its side of the threshold beyond doubt?"""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    logits = lm.network(ids, lm.patch_starts(ids))
    beyond_doubt = [True] * len(rows)
    patching = lm.config.patching
    if patching.threshold_nats is not None:
        values = lm.entropies(ids)
        if patching.rule == "entropy_rise":
            values = values.diff(prepend=values[:, :1])
        near = (values - patching.threshold_nats).abs() < NATS_APART
        beyond_doubt = [not bool(near[row, : len(row_ids) + 1].any()) for row, row_ids in enumerate(rows)]
    return [logits[row, len(row_ids) - 1] for row, row_ids in enumerate(rows)], beyond_doubt


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[int, bool]:
    """The id that is drawn; is it beyond doubt?"""
    if temperature == 0:
        logits[list(NEVER_EMITTED)] = -torch.inf
        best = logits.topk(2)
        return int(best.indices[0]), bool(best.values[0] - best.values[1] > LOGITS_APART)
    cumulative = next_probabilities(logits, Sampling(temperature), b"").double().cumsum(0)
    level = torch.rand((), generator=generator).double() * cumulative[-1]
    return int((cumulative <= level).sum()), bool((cumulative - level).abs().min() > LEVEL_APART)


def continuations(
    lm: LanguageModel, prompts: Sequence[bytes], max_bytes: int, temperature: float = 0.0, seed: int = 0
) -> list[bytes | None]:
    """What follows each prompt, row i drawn with ``seed + i``; None where rounding could have decided otherwise."""
    rows = [encode(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(rows))]
    going_on, doubtful = list(range(len(rows))), set()
    for _ in range(max_bytes):
        found, beyond_doubt = next_logits(lm, [rows[row] for row in going_on])
        for row, logits, boundaries_sure in zip(list(going_on), found, beyond_doubt, strict=True):
            chosen, choice_sure = choose(logits, temperature, generators[row])
            if not (boundaries_sure and choice_sure):
                doubtful.add(row)
            if row in doubtful or chosen == EOS:
                going_on.remove(row)
            else:
                rows[row].append(chosen)
        if not going_on:
            break
    return [
        None if row in doubtful else decode(ids)[len(prompt) :]
        for row, (ids, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]
