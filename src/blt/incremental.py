"""Ids -> next-id logits, with all that came before kept: one state, which reads a block of new ids at a time.

A block may be a whole prompt, one sampled byte, or a draft of which only a part is accepted: ``extend`` works it out in
parallel beside the state, ``accept`` makes the state stand after as many of its ids as the caller says. The latent
transformer runs for the patches that the block closes and for nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blt.byte_ids import EOS, NEWLINE
from blt.config import ModelConfig
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel, entropies_of
from blt.model.hash_embeddings import TableRows
from blt.model.kv_cache import Kept, KeyValueCache, Place, Span
from blt.model.linear import COMPILED_ROWS
from blt.model.local_decoder import LayerSlots, LocalDecoder
from blt.model.local_encoder import LocalEncoder
from blt.model.ngram_entropy_model import REACH, HostTables, NgramEntropyModel
from blt.model.patching import PatchingState, step_patching
from blt.shapes import ByteIds

T = TypeVar("T")

DraftPlace = tuple[Place, Place]  # of drafted ids in the encoder's cache and in the decoder's
PREFILL_BLOCK = 1024  # ids of a prompt read in one pass, so that memory does not grow with its square


class Networks(NamedTuple):
    """What it takes to read ids."""

    config: ModelConfig
    entropy_model: EntropyModel | NgramEntropyModel | None
    network: ByteLatentTransformer
    compiled: bool = False  # steps of one row compiled by torch: a minute at first, then twice as fast (docs/log.md)

    def run(self, step: Callable[..., T], *arguments: Any, kept: Sequence[Kept]) -> T:
        """A stage's step on what is kept for it, compiled where the place of its block says so."""
        if not kept[0][1].compiled:
            return step(*arguments, *kept)
        weights = self.network.local_decoder.head.weight.dtype
        result, fresh = _compiled(step, self.config, weights)(arguments, kept)
        for (cache, place), keys_values in zip(kept, fresh, strict=True):
            cache.write(keys_values, place)
        return result


@functools.cache
def _compiled(
    step: Callable[..., T], config: ModelConfig, weights: torch.dtype
) -> Callable[..., tuple[T, list[Tensor]]]:
    """A stage's step compiled by torch for networks of this config and kind of weights; its first call takes seconds.

    It leaves the caches as they are, and gives back what is to be written there. Nothing about the network is checked again
    at each call, which is why each of them gets a compilation of its own.
    """

    def beside(arguments: tuple[Any, ...], kept: Sequence[Kept]) -> tuple[T, list[Tensor]]:
        places = [cache.with_allowed(place) for cache, place in kept]
        result = step(*arguments, *((cache, place) for (cache, _), place in zip(kept, places, strict=True)))
        return result, [torch.stack(place.fresh) for place in places]

    without_checks = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "size_asserts": False,
    }
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack isolate_recompiles
        beside, dynamic=False, isolate_recompiles=True, options=without_checks
    )


class Standing(NamedTuple):
    """Where a row stands after the ids it has read: all of its state that is no tensor. As it is before any id."""

    num_ids: int = 0
    document_start: int = 0  # position
    context_start: int = 0  # position from which the entropy model looks back on
    num_patches: int = 0  # closed ones
    patch_document_start: int = 0  # patch
    patching: PatchingState = PatchingState()

    def after(self, byte_id: int, next_entropy: float | None, config: ModelConfig) -> "Standing":
        """One id later; ``next_entropy`` as in ``step_patching``."""
        patching = step_patching(self.patching, byte_id, next_entropy, config.patching)
        num_ids, num_patches = self.num_ids + 1, self.num_patches + patching.next_starts
        if byte_id == EOS:  # closes its document, and as the next document's first id starts a patch, its patch too
            return Standing(num_ids, num_ids, num_ids, num_patches, num_patches, patching)
        line_start = self.num_ids if byte_id == NEWLINE and _resets(config) else self.context_start
        return Standing(num_ids, self.document_start, line_start, num_patches, self.patch_document_start, patching)


BEFORE_ANY_ID = Standing()


@dataclass
class Row:
    """What is kept of one row beside the caches."""

    standing: Standing = BEFORE_ANY_ID
    ids: list[int] = field(default_factory=list)  # all that it has read
    open_states: list[Float[Tensor, "byte byte_dim"]] = field(default_factory=list)  # of its open patch, in pieces


@dataclass
class State:
    """All that is kept of the rows that are read together; nothing is remembered anywhere else."""

    rows: list[Row]
    entropy_cache: KeyValueCache | None
    encoder_cache: KeyValueCache
    latent_cache: KeyValueCache
    decoder_cache: KeyValueCache
    newest_slots: LayerSlots  # what bytes read of each row's newest closed patch
    entropy_tables: HostTables | None  # of n-gram statistics, which need nothing of a row but its last ids

    @property
    def caches(self) -> list[KeyValueCache]:
        found = (self.entropy_cache, self.encoder_cache, self.latent_cache, self.decoder_cache)
        return [cache for cache in found if cache is not None]

    def remove(self, row: int) -> None:
        """Let a row go; the last row takes its number."""
        last = len(self.rows) - 1
        for cache in self.caches:
            cache.move_row(last, row)
        self.rows[row] = self.rows[last]
        self.rows.pop()
        order = [last if index == row else index for index in range(last)]
        self.newest_slots = [(keys[order], values[order]) for keys, values in self.newest_slots]

    def append(self, other: "State") -> None:
        """Take in a copy of the first row of another state of the same networks, or of this one, as the last."""
        for cache, joining in zip(self.caches, other.caches, strict=True):
            cache.append(joining, len(self.rows))
        row = copy(other.rows[0])
        row.ids, row.open_states = list(row.ids), list(row.open_states)
        self.rows.append(row)
        self.newest_slots = [
            (torch.cat([keys, more_keys[:1]]), torch.cat([values, more_values[:1]]))
            for (keys, values), (more_keys, more_values) in zip(self.newest_slots, other.newest_slots, strict=True)
        ]


@dataclass
class Block:
    """New ids of every row, worked out beside the state and not yet part of it."""

    ids: list[list[int]]  # of each row; their number may differ
    standings: list[list[Standing]]  # of each row, after each of its ids
    logits: Float[Tensor, "row new vocab"]  # entry i predicts the id after ids[i]; padding after a row's own ids
    byte_states: Float[Tensor, "row new byte_dim"]
    slots_of_byte: LayerSlots  # what each new byte read, all rows flattened

    @property
    def latent_calls(self) -> int:
        """1 where a patch was closed, else 0: all rows share the call."""
        return int(any(standing.patching.next_starts for row in self.standings for standing in row))


def start(networks: Networks, rows: int = 1) -> State:
    """The state before any id, of so many rows."""
    config, entropy_model, network, _ = networks
    weight = network.local_encoder.byte_embedding.weight
    device, dtype, decoder = weight.device, weight.dtype, config.local_decoder
    entropy_cache, entropy_tables = None, None
    if config.patching.uses_entropies:
        assert entropy_model is not None
        if isinstance(entropy_model, NgramEntropyModel):
            entropy_tables = entropy_model.on_host()
        else:
            entropy_cache = KeyValueCache(entropy_model.config, rows, device, entropy_model.head.weight.dtype)
    nothing = torch.zeros(rows, config.slots_per_patch, decoder.num_heads, decoder.head_dim, device=device, dtype=dtype)
    return State(
        [Row() for _ in range(rows)],
        entropy_cache,
        KeyValueCache(config.local_encoder, rows, device, dtype),
        KeyValueCache(config.latent, rows, device, dtype),
        KeyValueCache(decoder, rows, device, dtype),
        [(nothing, nothing)] * decoder.num_layers,
        entropy_tables,
    )


@torch.no_grad()
def prefill(networks: Networks, ids: Sequence[int]) -> tuple[State, Float[Tensor, "1 vocab"]]:
    """The state of one row that has read these ids (at least one), and the logits of the id after them."""
    state = start(networks)
    for begin in range(0, len(ids), PREFILL_BLOCK):
        logits = step(networks, state, [ids[begin : begin + PREFILL_BLOCK]])
    return state, logits


def step(networks: Networks, state: State, ids: Sequence[Sequence[int]]) -> Float[Tensor, "row vocab"]:
    """Read these new ids, at least one for each row, and say the logits of the id after them."""
    block = extend(networks, state, ids)
    return accept(state, block, [len(row) for row in ids])


@torch.no_grad()
def extend(networks: Networks, state: State, ids: Sequence[Sequence[int]], new: int = 0) -> Block:
    """The block of these ids, at least one for each row.

    ``new``: how many positions to pad it to. Who gives one says that blocks of this length come again and again, as those
    of one id do: they are compiled, if the networks are.
    """
    config, entropy_model, network, fast = networks
    fast = fast and (new > 0 or all(len(row) == 1 for row in ids))
    entropies: list[list[float | None]] = [[None] * len(row) for row in ids]
    new = new or max(len(row) for row in ids)
    if isinstance(entropy_model, NgramEntropyModel) and state.entropy_tables is not None:
        tables = state.entropy_tables
        with_past = [[*row.ids[-REACH:], *new_ids] for row, new_ids in zip(state.rows, ids, strict=True)]
        entropies = [
            [*entropy_model.extend(row, len(new_ids), tables)] for row, new_ids in zip(with_past, ids, strict=True)
        ]
    elif state.entropy_cache is not None:
        assert entropy_model is not None
        place = _place(state, state.entropy_cache, ids, new, fast, lines=_resets(config))
        id_rows = _as_rows(ids, new, state)
        entropies = networks.run(_entropies, entropy_model, id_rows, kept=[(state.entropy_cache, place)]).tolist()
    standings = [
        _standings(row.standing, new_ids, doubts, config)
        for row, new_ids, doubts in zip(state.rows, ids, entropies, strict=True)
    ]
    place = _place(state, state.encoder_cache, ids, new, fast)
    id_rows, table_rows = _with_table_rows(networks, state, ids, new)
    encoder, decoder = network.local_encoder, network.local_decoder
    byte_states = networks.run(LocalEncoder.extend, encoder, id_rows, table_rows, kept=[(state.encoder_cache, place)])
    slots_of_byte = _slots_of_byte(networks, state, standings, byte_states, fast)
    if not state.decoder_cache.shares_places_with(state.encoder_cache):
        place = _place(state, state.decoder_cache, ids, new, fast)
    logits = networks.run(LocalDecoder.extend, decoder, byte_states, slots_of_byte, kept=[(state.decoder_cache, place)])
    return Block([list(row) for row in ids], standings, logits, byte_states, slots_of_byte)


def accept(state: State, block: Block, lengths: Sequence[int]) -> Float[Tensor, "row vocab"]:
    """Make the first ids of a block, so many of each row and at least one, part of the state; the logits after them.

    What the caches hold of the ids that are not accepted is overwritten before it could be read.
    """
    new = block.logits.shape[1]
    for index, (row, length) in enumerate(zip(state.rows, lengths, strict=True)):
        row.standing = block.standings[index][length - 1]
        row.ids += block.ids[index][:length]
        patching = row.standing.patching
        if patching.next_starts:
            row.open_states = []
        elif patching.patch_bytes > length:
            row.open_states.append(block.byte_states[index, :length])
        else:
            row.open_states = [block.byte_states[index, length - patching.patch_bytes : length]]
    if new == 1:
        state.newest_slots = block.slots_of_byte
        return block.logits[:, 0]
    last = torch.tensor([row * new + length - 1 for row, length in enumerate(lengths)], device=block.logits.device)
    state.newest_slots = [(keys[last], values[last]) for keys, values in block.slots_of_byte]
    return block.logits.flatten(0, 1)[last]


def draft_place(networks: Networks, state: State, drafted: int) -> DraftPlace:
    """Where the pending id of every row goes and so many drafted ones after it, the last left out: nobody reads it."""
    spans = [Span(row.standing.num_ids, [row.standing.document_start]) for row in state.rows]
    every_row = list(range(len(state.rows)))
    in_encoder = state.encoder_cache.place(every_row, spans, drafted, networks.compiled)
    if state.decoder_cache.shares_places_with(state.encoder_cache):
        return in_encoder, in_encoder
    return in_encoder, state.decoder_cache.place(every_row, spans, drafted, networks.compiled)


@torch.no_grad()
def draft_logits(
    networks: Networks, state: State, blocks: Sequence[Sequence[int]], place: DraftPlace
) -> Float[Tensor, "row vocab"]:
    """A guess at the logits after each row's block, from the newest latent that the state has, whatever is closed by then.

    Reads the last id of each block, as the calls before have read those before it; the state stays as it is. A block that
    was not lengthened since the last call is read for nothing.
    """
    number = max(len(ids) for ids in blocks) - 1
    caches = (state.encoder_cache, state.decoder_cache)
    kept = [(cache, whole.at(number)) for cache, whole in zip(caches, place, strict=True)]
    return networks.run(
        _draft, networks.network, *_with_table_rows(networks, state, blocks, 1), state.newest_slots, kept=kept
    )


def _draft(
    network: ByteLatentTransformer,
    byte_ids: ByteIds,
    rows: TableRows,
    slots: LayerSlots,
    in_encoder: Kept,
    in_decoder: Kept,
) -> Float[Tensor, "row vocab"]:
    """Encoder and decoder alone, for one byte of each row."""
    byte_states = network.local_encoder.extend(byte_ids, rows, in_encoder)
    return network.local_decoder.extend(byte_states, slots, in_decoder)[:, 0]


def _with_table_rows(
    networks: Networks, state: State, ids: Sequence[Sequence[int]], new: int
) -> tuple[ByteIds, TableRows]:
    """The last ``new`` ids of each row's block, or all and some padding where it has fewer, and what their n-grams select."""
    reach = max(networks.config.hash_embeddings.ngram_bytes)  # ids back, one more than an n-gram needs
    with_past = [
        [*[0] * reach, *row.ids[-reach:], *block][-reach - len(block[-new:]) :]
        for row, block in zip(state.rows, ids, strict=True)
    ]
    id_rows = _as_rows(with_past, reach + new, state)
    return id_rows[:, reach:], networks.network.local_encoder.hash_embeddings.rows(id_rows)[:, reach:]


def _slots_of_byte(
    networks: Networks,
    state: State,
    standings: list[list[Standing]],
    byte_states: Float[Tensor, "row new byte_dim"],
    fast: bool,
) -> LayerSlots:
    """Close the patches that end in the block, and look up for each new byte the newest patch closed by then."""
    new = byte_states.shape[1]
    before = [row.standing.num_patches for row in state.rows]
    closing = [row for row, found in enumerate(standings) if found[-1].num_patches > before[row]]
    if not closing:
        if new == 1:
            return state.newest_slots
        old = torch.arange(len(state.rows), device=byte_states.device).repeat_interleave(new)
        return [(keys[old], values[old]) for keys, values in state.newest_slots]
    fresh = _close_patches(networks, state, standings, byte_states, closing, fast)
    if new == len(state.rows) == 1:
        return fresh
    # rows of the table: the newest patch that each row came with, then the closed ones of each closing row
    most = len(fresh[0][0]) // len(closing)
    index = []
    for row, found in enumerate(standings):
        begin = len(standings) + closing.index(row) * most - 1 if row in closing else 0
        closed = [standing.num_patches - before[row] for standing in found]
        closed += closed[-1:] * (new - len(closed))
        index += [begin + count if count else row for count in closed]
    table = torch.tensor(index, device=byte_states.device)
    return [
        (torch.cat([keys, new_keys])[table], torch.cat([values, new_values])[table])
        for (keys, values), (new_keys, new_values) in zip(state.newest_slots, fresh, strict=True)
    ]


def _close_patches(
    networks: Networks,
    state: State,
    standings: list[list[Standing]],
    byte_states: Float[Tensor, "row new byte_dim"],
    closing: list[int],
    fast: bool,
) -> LayerSlots:
    """The slots of the patches that end in the block, of the rows where one does; each row padded to the most of any."""
    pieces: list[Tensor] = []
    patch_bytes: list[int] = []
    counts: list[int] = []
    spans: list[Span] = []
    for row in closing:
        ends = [index for index, standing in enumerate(standings[row]) if standing.patching.next_starts]
        pieces += [*state.rows[row].open_states, byte_states[row, : ends[-1] + 1]]
        patch_bytes += [standings[row][end].patching.patch_bytes for end in ends]
        counts.append(len(ends))
        before = [state.rows[row].standing, *standings[row]]
        spans.append(Span(before[0].num_patches, [before[end].patch_document_start for end in ends]))
    sizes = torch.tensor(patch_bytes, device=byte_states.device)
    segments = torch.arange(len(patch_bytes), device=byte_states.device).repeat_interleave(
        sizes, output_size=sum(patch_bytes)
    )
    network = networks.network
    patch_states = network.local_encoder.gather_patches(torch.cat(pieces), segments, len(patch_bytes))
    most = max(counts)
    fast = fast and most <= COMPILED_ROWS
    if fast:  # a few lengths only, as each is compiled
        most = next(length for length in (1, 2, COMPILED_ROWS) if most <= length)
    padded = pad_sequence(list(patch_states.split(counts)), batch_first=True)
    padded = F.pad(padded, (0, 0, 0, most - padded.shape[1]))
    place = state.latent_cache.place(closing, spans, most, fast)
    return networks.run(_slots_of_patches, network, padded, kept=[(state.latent_cache, place)])


def _entropies(entropy_model: EntropyModel, byte_ids: ByteIds, kept: Kept) -> Float[Tensor, "row new"]:
    """The entropy of the id after each new one."""
    return entropies_of(entropy_model.extend(byte_ids, kept))[:, 1:]


def _slots_of_patches(
    network: ByteLatentTransformer, patch_states: Float[Tensor, "row new patch_dim"], kept: Kept
) -> LayerSlots:
    """What bytes will read of patches that close, all rows flattened: their latent states, as the decoder's keys and values."""
    latent_states = network.latent_transformer.extend(patch_states, kept)
    return network.local_decoder.slot_keys_values(latent_states.flatten(0, 1))


def _standings(
    standing: Standing, ids: Sequence[int], doubts: Sequence[float | None], config: ModelConfig
) -> list[Standing]:
    found = []
    for byte_id, doubt in zip(ids, doubts[: len(ids)], strict=True):
        standing = standing.after(byte_id, doubt, config)
        found.append(standing)
    return found


def _place(
    state: State, cache: KeyValueCache, ids: Sequence[Sequence[int]], new: int, fast: bool, lines: bool = False
) -> Place:
    """Where a block of bytes goes in one of the byte caches; with ``lines`` a newline opens a context, too."""
    spans = []
    for row, new_ids in zip(state.rows, ids, strict=True):
        begun = row.standing.context_start if lines else row.standing.document_start
        oldest = []
        for position, byte_id in enumerate(new_ids, row.standing.num_ids):
            if lines and byte_id == NEWLINE:
                begun = position
            oldest.append(begun)
            if byte_id == EOS:
                begun = position + 1
        spans.append(Span(row.standing.num_ids, oldest))
    return cache.place(list(range(len(state.rows))), spans, new, fast)


def _as_rows(ids: Sequence[Sequence[int]], length: int, state: State) -> Int[Tensor, "row byte"]:
    """Ids as one tensor, each row padded with BOE to this length."""
    device = state.decoder_cache.keys_values.device
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in ids], device=device)


def _resets(config: ModelConfig) -> bool:
    entropy_model = config.entropy_model
    return entropy_model is not None and entropy_model.kind == "transformer" and entropy_model.reset_at_newline
