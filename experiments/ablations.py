"""What each part of a Byte Latent Transformer is worth, and what long repetitive texts do to its patches.

Every variant changes one thing of the model that as_good_as_tokens.py calls "BLT, entropy", has a latent transformer that
brings it to the same FLOPs per byte, and learns from the same text. Only what changed code spares is not given to another part,
and the FLOPs of a network that says where patches begin come on top.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from claim import Plan, done, mean_bits, options, results_before, subplots, test_texts, train_text, write
from contenders import CONTENDERS, REFERENCE_FLOPS, ROW_BYTES, Contender, load, run
from torch import Tensor

from blt.byte_ids import BOS, encode
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, TransformerConfig
from blt.documents import read_documents
from blt.flops import entropy_model_flops
from blt.language_model import LanguageModel
from blt.model import byte_latent_transformer, local_encoder
from blt.model.attention import DecoderCrossAttention, EncoderCrossAttention
from blt.model.hash_embeddings import PRIMES, HashEmbeddings
from blt.model.local_decoder import LocalDecoder
from blt.model.local_encoder import LocalEncoder
from blt.model.patching import patch_starts

BLT = CONTENDERS["BLT, entropy"]
TWO_LAYERS = BLT.but(model__local_decoder__num_layers=2)
FIXED = CONTENDERS["BLT, fixed 4"]
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


VARIANTS: dict[str, Contender] = {
    "as it is": BLT,
    "no n-grams": BLT.but(model__hash_embeddings__table_rows=1),
    "n-gram tables of 2,048 rows": BLT.but(model__hash_embeddings__table_rows=2048),
    "n-gram tables of 262,144 rows": BLT.but(model__hash_embeddings__table_rows=262_144),
    "n-grams of 3 to 5 only": BLT.but(model__hash_embeddings__ngram_bytes=[3, 4, 5]),
    "n-grams of 6 to 8 only": BLT.but(model__hash_embeddings__ngram_bytes=[6, 7, 8]),
    "encoder 2, decoder 1": BLT.but(model__local_encoder__num_layers=2),
    "encoder 1, decoder 2": TWO_LAYERS,
    "no cross-attention in the encoder": BLT,
    "encoder queries without pooling": BLT,
    "encoder queries of the mean": BLT,
    "encoder 1, decoder 2, cross-attention in its first only": TWO_LAYERS,
    "no cross-attention at all": BLT,
    "no patches are read": BLT,
    "no patches are read, no n-grams": BLT.but(model__hash_embeddings__table_rows=1),
    "entropy model of 1 x 32": entropy_model(num_layers=1, width=32, num_heads=1, ffn_width=88),
    "entropy model of 1 x 64": entropy_model(num_layers=1, width=64, num_heads=1, ffn_width=176),
    "entropy model of 2 x 128": entropy_model(),
    "entropy model of 2 x 128, reset at newlines": entropy_model(reset_at_newline=True),
    "n-gram patcher of 4": BLT.but(model__entropy_model__max_order=4),
    "n-gram patcher of 8": BLT.but(model__entropy_model__max_order=8),
    "patches where entropy rises": BLT.but(model__patching__rule="entropy_rise"),
    "patches of at most 8": BLT.but(model__patching__max_patch_bytes=8),
    "patches at spaces": CONTENDERS["BLT, space"],
    "patches of fixed 4": FIXED,
    "patches of 8": BLT.but(calibration__target_patch_bytes=8.0),
    "patches of fixed 8": FIXED.but(model__patching__patch_bytes=8),
    "patches of fixed 4, no n-grams": FIXED.but(model__hash_embeddings__table_rows=1),
    "tables of whole patches": BLT,
    "patches at spaces, tables of whole patches": CONTENDERS["BLT, space"],
    "patches of fixed 4, tables of whole patches": FIXED,
}  # fmt: skip
DRIFTS = "patch_bytes_in_eighths_of_4096_bytes"
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
    "no cross-attention in the encoder": lambda: patch.object(EncoderCrossAttention, "forward", nothing_read),
    "encoder queries without pooling": lambda: patch.object(local_encoder, "max_over_patches", no_pooling),
    "encoder queries of the mean": lambda: patch.object(local_encoder, "max_over_patches", mean_over_patches),
    "encoder 1, decoder 2, cross-attention in its first only": lambda: patch.object(
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
    if name == "no cross-attention at all":
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


def drift(lm: LanguageModel, text: bytes, pieces: int) -> list[float]:
    """Mean bytes of a patch in each of so many parts of one long text, read as one row."""
    ids = torch.tensor([encode(text)])
    with torch.no_grad():
        assert lm.entropy_model is not None
        starts = patch_starts(ids, lm.entropy_model.entropies(ids), lm.config.patching)[0, 1:-1]
    return [len(part) / max(1, int(part.sum())) for part in starts.chunk(pieces)]


def long_texts(passage: bytes, length: int) -> dict[str, bytes]:
    """One that repeats a passage of 400 bytes, lines and all, and one that goes on."""
    repeated = passage[:400]
    return {
        "one passage again and again": (repeated * (length // len(repeated) + 1))[:length],
        "a text": passage[:length],
    }


def main() -> None:
    parser = options(__doc__, "ablations")
    chosen = parser.parse_args()
    wanted = list(plans(chosen.budget, chosen.seeds))
    drifts: dict[str, Any] = results_before(chosen.out).get(DRIFTS, {})
    try:
        text, held_out = train_text(chosen, "english", BYTES[chosen.budget]), test_texts(chosen, "english")
        (book, *_) = (document.data for document in read_documents([chosen.data / "eval" / "en_books.valid.jsonl.xz"]))
    except FileNotFoundError as error:
        parser.error(str(error))
    for plan in wanted:
        if chosen.only and not any(words in plan.label for words in chosen.only):
            continue
        with changed_code(plan.name):
            figures = run(
                plan.contender,
                text,
                held_out,
                plan.folder(chosen.work / "ablations"),
                plan.flops,
                plan.seed,
                chosen.dtype,
            )
        print(f"{plan.name}, seed {plan.seed}: {mean_bits(figures):.4f}", flush=True)
        runs = done(wanted, chosen.work / "ablations", chosen)
        write(chosen.out, {"budget": chosen.budget, "runs": runs, DRIFTS: drifts})
    for plan in wanted:
        folder = plan.folder(chosen.work / "ablations")
        if plan.seed == 0 and (folder / "result.json").exists() and drifting(plan.name):
            lm = load(folder)
            drifts[plan.name] = {name: drift(lm, long, 8) for name, long in long_texts(book[20_000:], 4096).items()}
    runs = done(wanted, chosen.work / "ablations", chosen)
    write(chosen.out, {"budget": chosen.budget, "runs": runs, DRIFTS: drifts})
    if any(run["name"] == "as it is" for run in runs):
        draw(runs, drifts, chosen.out.with_suffix(".png"))


def drifting(name: str) -> bool:
    return name == "as it is" or "entropy" in name


def draw(runs: Sequence[Mapping[str, Any]], drifts: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Bits more than the model as it is, by variant; and how patches change along a text that repeats itself."""
    names = [name for name in VARIANTS if any(run["name"] == name for run in runs)]
    base = {run["seed"]: run["mean_bits_per_byte"] for run in runs if run["name"] == "as it is"}
    figure, (left, right) = subplots(1, 2, figsize=(13, 6))
    for place, name in enumerate(names):
        more = [100 * (run["mean_bits_per_byte"] / base[run["seed"]] - 1) for run in runs if run["name"] == name]
        left.barh(place, sum(more) / len(more), color="lightsteelblue")
        left.plot(more, [place] * len(more), "k.", markersize=4)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("held-out bits per byte, % above the model as it is")
    for name, of in drifts.items():
        right.plot(of["one passage again and again"], marker="o", markersize=3, label=name)
    right.set_xlabel("eighth of a text of 4,096 bytes that repeats 400 bytes")
    right.set_ylabel("mean patch, bytes")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
