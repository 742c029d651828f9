"""What each part of a Byte Latent Transformer is worth.

Every variant changes one thing of the model that as_good_as_tokens.py calls "BLT, all n-grams", has a latent transformer that
brings it to the same FLOPs per byte, and learns from the same text. Only what changed code spares is not given to another part,
and the FLOPs of a network that says where patches begin come on top. What patches are worth is seen without tables of n-grams,
which know the last bytes so well that little is left for patches to say: such a variant is compared with "no n-grams".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from claim import Plan, done, mean_bits, options, subplots, test_texts, train_text, write
from contenders import FIXED_4, PAPER_BLT, REFERENCE_FLOPS, ROW_BYTES, SEEN_TWICE, SPACE, Contender, run
from torch import Tensor

from blt.byte_ids import BOS
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, TransformerConfig
from blt.flops import entropy_model_flops
from blt.model import byte_latent_transformer, local_encoder
from blt.model.attention import DecoderCrossAttention, EncoderCrossAttention
from blt.model.hash_embeddings import PRIMES, HashEmbeddings
from blt.model.local_decoder import LocalDecoder
from blt.model.local_encoder import LocalEncoder

BLT = PAPER_BLT
BLT_FIXED_4 = BLT.but(**FIXED_4)
WITHOUT = ", no n-grams"
BYTES = {"smoke": 60_000, "minutes": 8_000_000, "hour": 20_000_000, "longer": 100_000_000}
TRANSFORMER = {
    "model.entropy_model": {
        "kind": "transformer",
        "num_layers": 2,
        "width": 128,
        "num_heads": 2,
        "ffn_width": 352,
        "window_positions": 512,
    },
    "entropy_training": {"total_bytes": 1, "learning_rate": 3e-3, "warmup_steps": 50, "steps_per_evaluation": 100_000},
}  # fmt: skip


def transformer(**changes: Any) -> dict[str, Any]:
    shape = TRANSFORMER["model.entropy_model"] | changes
    return {**TRANSFORMER, "model.entropy_model": shape}


def entropy_model(**changes: Any) -> Contender:
    """Patches by a network. It may cost more than all else here, so its FLOPs come on top and are counted: see ``plans``."""
    return Contender("blt", {**BLT.settings, **transformer(**changes)})


TWO_LAYERS = BLT.but(model__local_decoder__num_layers=2)
SPLITS = {
    "encoder 1, decoder 2": TWO_LAYERS,
    "encoder 2, decoder 1": BLT.but(model__local_encoder__num_layers=2),
}
ABOUT_PATCHES: dict[str, Contender] = {  # each without n-grams
    **SPLITS,
    "no cross-attention in the encoder": BLT,
    "encoder queries without pooling": BLT,
    "encoder queries of the mean": BLT,
    "encoder 1, decoder 2, cross-attention in its first only": TWO_LAYERS,
    "no cross-attention at all": BLT,
    "no patches are read": BLT,
    "entropy model of 1 x 32": entropy_model(num_layers=1, width=32, num_heads=1, ffn_width=88),
    "entropy model of 1 x 64": entropy_model(num_layers=1, width=64, num_heads=1, ffn_width=176),
    "entropy model of 2 x 128": entropy_model(),
    "n-gram patcher of 4": BLT.but(model__entropy_model__max_order=4),
    "n-gram patcher of 8": BLT.but(model__entropy_model__max_order=8),
    "patches where entropy rises": BLT.but(model__patching__rule="entropy_rise"),
    "patches of at most 8": BLT.but(model__patching__max_patch_bytes=8),
    "patches at spaces": BLT.but(**SPACE),
    "patches of fixed 4": BLT_FIXED_4,
    "patches of 8": BLT.but(calibration__target_patch_bytes=8.0),
    "patches of fixed 8": BLT_FIXED_4.but(model__patching__patch_bytes=8),
    "tables of whole patches": BLT,
    "patches of fixed 4, tables of whole patches": BLT_FIXED_4,
}  # fmt: skip
VARIANTS: dict[str, Contender] = {
    "as it is": BLT,
    "n-gram tables of 2,048 rows": BLT.but(model__hash_embeddings__table_rows=2048),
    "n-gram tables of 262,144 rows": BLT.but(model__hash_embeddings__table_rows=262_144),
    "n-grams seen once share a row": BLT.but(**SEEN_TWICE),
    "n-grams of 3 to 5 only": BLT.but(model__hash_embeddings__ngram_bytes=[3, 4, 5]),
    "n-grams of 6 to 8 only": BLT.but(model__hash_embeddings__ngram_bytes=[6, 7, 8]),
    **SPLITS,
    "no patches are read": BLT,
    "patches of fixed 4": BLT_FIXED_4,
    "no n-grams": BLT.but(model__hash_embeddings__table_rows=1),
    **{name + WITHOUT: of.but(model__hash_embeddings__table_rows=1) for name, of in ABOUT_PATCHES.items()},
}
PATCH_TABLES = HashEmbeddingsConfig(ngram_bytes=(1, 2), table_rows=32_768)  # of a patch, and of it and the one before


def nothing_read(self: EncoderCrossAttention, slots: Tensor, byte_states: Tensor, segments: Tensor) -> Tensor:
    """In the place of the encoder's cross-attention: a patch is its pooled bytes."""
    return torch.zeros_like(slots)


def no_pooling(byte_states: Tensor, segments: Tensor, num_patches: int) -> Tensor:
    """In the place of the maximum over a patch: the same queries for all patches."""
    return byte_states.new_ones(num_patches, byte_states.shape[1])


def mean_over_patches(byte_states: Tensor, segments: Tensor, num_patches: int) -> Tensor:
    """In the place of the maximum over a patch."""
    index = segments[:, None].expand_as(byte_states)
    pooled = byte_states.new_zeros(num_patches, byte_states.shape[1])
    return pooled.scatter_reduce(0, index, byte_states, "mean", include_self=False)


def first_layer_only(self: LocalDecoder, latent_states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In the place of keys and values for each layer: zeros from the second layer on, so that nothing is read there."""
    slots = self.slot_proj(latent_states).unflatten(-1, (self.slots_per_patch, -1))
    first, *others = self.crosses
    keys, values = first.keys_values(slots)
    return [(keys, values), *((torch.zeros_like(keys), torch.zeros_like(values)) for _ in others)]


def nothing_of_patches(self: LocalDecoder, latent_states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In the place of keys and values: zeros, so that the local parts are alone. What that costs is what patches are worth."""
    return [
        (torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in first_layer_only(self, latent_states)
    ]


def latent_added(
    self: DecoderCrossAttention, byte_states: Tensor, keys: Tensor, values: Tensor, read: Tensor | None = None
) -> Tensor:
    """In the place of the decoder's cross-attention: the latent's projection is added to the byte, without a choice."""
    mixed = values.mean(1).flatten(1)
    mixed = mixed if read is None else mixed.index_select(0, read)
    return (2 * byte_states.flatten(0, 1) + self.o_proj(mixed)).view_as(byte_states)


class WithPatchTables(LocalEncoder):
    """In the place of the local encoder: what a token has by its embedding, a row of a table for a patch's bytes, and one for
    them and the patch's before, are added to the patch's state.
    """

    def __init__(self, config: TransformerConfig, hash_embeddings: HashEmbeddingsConfig, slots_per_patch: int) -> None:
        super().__init__(config, hash_embeddings, slots_per_patch)
        self.patch_tables = HashEmbeddings(PATCH_TABLES, slots_per_patch * config.width)

    def forward(self, byte_ids: Tensor, segments: Tensor, documents: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
        byte_states, patch_states = super().forward(byte_ids, segments, documents, num_patches)
        (rows,) = self.patch_tables.look_up(patch_rows(byte_ids, segments, num_patches)[None])
        return byte_states, patch_states + rows


def patch_rows(byte_ids: Tensor, segments: Tensor, num_patches: int) -> Tensor:
    """The rows of ``PATCH_TABLES`` for each patch: by its ids, and by them and those of the patch before in its text.

    >>> rows = patch_rows(torch.tensor([[1, 7, 8, 7, 8, 9, 1, 7, 8]]), torch.tensor([0, 1, 1, 2, 2, 3, 4, 5, 5]), 6)
    >>> (rows[1, 0] == rows[2, 0]).item(), (rows[1] == rows[5]).all().item(), (rows[1, 1] == rows[2, 1]).item()
    (True, True, False)
    """
    ids, first = byte_ids.flatten().long(), PRIMES[0]
    places = torch.arange(len(ids))
    begins = places.new_full((num_patches,), len(ids)).scatter_reduce(0, segments, places, "amin")
    powers = torch.full_like(ids, first).cumprod(0)  # wraps, as do all hashes
    own = ids.new_zeros(num_patches).scatter_add(0, segments, ids * powers[places - begins[segments]])
    before = torch.where(ids[begins.clamp(max=len(ids) - 1)] == BOS, 0, own.roll(1))
    size = PATCH_TABLES.table_rows
    return torch.stack([own.remainder(size), (own * first + before * PRIMES[2]).remainder(size) + size], dim=1)


CHANGED_CODE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no cross-attention in the encoder" + WITHOUT: lambda: patch.object(EncoderCrossAttention, "forward", nothing_read),
    "encoder queries without pooling" + WITHOUT: lambda: patch.object(local_encoder, "max_over_patches", no_pooling),
    "encoder queries of the mean" + WITHOUT: lambda: patch.object(local_encoder, "max_over_patches", mean_over_patches),
    "encoder 1, decoder 2, cross-attention in its first only" + WITHOUT: lambda: patch.object(
        LocalDecoder, "slot_keys_values", first_layer_only
    ),
    **dict.fromkeys(
        [name for name in VARIANTS if "no patches are read" in name],
        lambda: patch.object(LocalDecoder, "slot_keys_values", nothing_of_patches),
    ),
    **dict.fromkeys(
        [name for name in VARIANTS if "tables of whole patches" in name],
        lambda: patch.object(byte_latent_transformer, "LocalEncoder", WithPatchTables),
    ),
}


def changed_code(name: str) -> AbstractContextManager[Any]:
    """While this lasts, the package computes what the variant says."""
    if name == "no cross-attention at all" + WITHOUT:
        both = ExitStack()
        both.enter_context(patch.object(EncoderCrossAttention, "forward", nothing_read))
        both.enter_context(patch.object(DecoderCrossAttention, "read_patches", latent_added))
        return both
    return CHANGED_CODE[name]() if name in CHANGED_CODE else nullcontext()


def plans(budget: str, seeds: int) -> Iterator[Plan]:
    for seed in range(seeds):
        for name, contender in VARIANTS.items():
            shape = contender.settings.get("model.entropy_model")
            more = entropy_model_flops(EntropyModelConfig.model_validate(shape), ROW_BYTES) if shape else 0.0
            yield Plan(name, contender, "english", seed, BYTES[budget], REFERENCE_FLOPS + more)


def base_of(name: str) -> str:
    """The variant that another differs from in one thing."""
    if "in its first only" in name:
        return "encoder 1, decoder 2" + WITHOUT
    return "no n-grams" if name.endswith(WITHOUT) else "as it is"


def main() -> None:
    parser = options(__doc__, "ablations")
    chosen = parser.parse_args()
    wanted, work = list(plans(chosen.budget, chosen.seeds)), chosen.work / "ablations"
    try:
        text, held_out = train_text(chosen, "english", BYTES[chosen.budget]), test_texts(chosen, "english")
    except FileNotFoundError as error:
        parser.error(str(error))

    def record() -> None:
        runs = done(wanted, work, chosen)
        above = above_base(runs)
        write(chosen.out, {"budget": chosen.budget, "above_base": above, "runs": runs})
        draw(above, chosen.out.with_suffix(".png"))

    record()
    for plan in wanted:
        if chosen.only and not any(words in plan.label for words in chosen.only):
            continue
        with changed_code(plan.name):
            figures = run(plan.contender, text, held_out, plan.folder(work), plan.flops, plan.seed, chosen.dtype)
        print(f"{plan.name}, seed {plan.seed}: {mean_bits(figures):.4f}", flush=True)
        record()


def above_base(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How far each variant's bits are above its base's of the same seed, in per cent, by variant and seed."""
    bits = {(run["name"], run["seed"]): run["mean_bits_per_byte"] for run in runs}
    found: dict[str, dict[str, float]] = {}
    for (name, seed), own in bits.items():
        if name != base_of(name) and (base := bits.get((base_of(name), seed))):
            found.setdefault(name, {})[str(seed)] = 100 * (own / base - 1)
    return found


def draw(above: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Bits above a variant's base; each seed is a dot."""
    figure, axes = subplots(figsize=(9, 0.25 * len(above) + 1.2))
    for colour, changed in (("lightgrey", "as it is"), ("lightsteelblue", "no n-grams")):
        axes.barh(0, 0, color=colour, label=f"beside “{changed}”")
    for place, (name, seeds) in enumerate(above.items()):
        colour = "lightsteelblue" if name.endswith(WITHOUT) else "lightgrey"
        axes.barh(place, sum(seeds.values()) / len(seeds), color=colour)
        axes.plot(list(seeds.values()), [place] * len(seeds), "k.", markersize=4)
    axes.set_yticks(range(len(above)), list(above), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.legend(fontsize=8)
    axes.set_xlabel("held-out bits per byte, % above the model that differs in this alone")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
