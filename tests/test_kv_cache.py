"""Rings, growth and masks against attention over a plain list of all keys and values that ever counted."""

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from blt.config import TransformerConfig
from blt.model.kv_cache import FIRST_SLOTS, SPARE_SLOTS, KeyValueCache, Place, Span
from blt.model.rotary import rotary_rotation

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 4
CPU = torch.device("cpu")


def new_cache(window: int | None, rows: int, theta: float = 100.0) -> KeyValueCache:
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        width=NUM_HEADS * HEAD_DIM,
        num_heads=NUM_HEADS,
        ffn_width=8,
        rope_theta=theta,
        window_positions=window,
    )
    return KeyValueCache(config, rows, CPU, torch.float32)


@dataclass
class Past:
    """Of one row: keys and values of all positions that were accepted, ``[layer, head, position, head_dim]``."""

    keys: Tensor = field(default_factory=lambda: torch.zeros(NUM_LAYERS, NUM_HEADS, 0, HEAD_DIM))
    values: Tensor = field(default_factory=lambda: torch.zeros(NUM_LAYERS, NUM_HEADS, 0, HEAD_DIM))
    document_start: int = 0

    def __len__(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class NewBlock:
    """Random queries, keys and values ``[layer, row, head, new, head_dim]``, and where each row's own positions stand."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    spans: list[Span]


def random_block(rng: random.Random, pasts: list[Past], lengths: list[int]) -> NewBlock:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (NUM_LAYERS, len(pasts), NUM_HEADS, max(lengths), HEAD_DIM)
    queries, keys, values = (torch.randn(shape, generator=generator) for _ in range(3))
    spans = []
    for past, length in zip(pasts, lengths, strict=True):
        oldest = []
        for position in range(len(past), len(past) + length):
            oldest.append(past.document_start)
            if rng.random() < 0.05:  # the document ends here
                past.document_start = position + 1
        spans.append(Span(len(past), oldest))
    return NewBlock(queries, keys, values, spans)


def expected_reads(block: NewBlock, row: int, past: Past, window: int | None) -> Tensor:
    """What each position of a row reads, one at a time, ``[layer, head, own, head_dim]``; appends nothing."""
    span = block.spans[row]
    keys = torch.cat([past.keys, block.keys[:, row]], dim=2)
    values = torch.cat([past.values, block.values[:, row]], dim=2)
    reads = []
    for number, oldest in enumerate(span.oldest):
        position = span.first + number
        first = oldest if window is None else max(oldest, position - window + 1)
        near = slice(first, position + 1)
        scores = block.queries[:, row, :, number, None] @ keys[:, :, near].mT * HEAD_DIM**-0.5
        reads.append((scores.softmax(-1) @ values[:, :, near])[:, :, 0])
    return torch.stack(reads, dim=2)


def keep(block: NewBlock, row: int, past: Past, length: int) -> None:
    past.keys = torch.cat([past.keys, block.keys[:, row, :, :length]], dim=2)
    past.values = torch.cat([past.values, block.values[:, row, :, :length]], dim=2)


def attend(cache: KeyValueCache, block: NewBlock, place: Place) -> Tensor:
    """What the cache says of a block, ``[layer, row, head, new, head_dim]``."""
    parts = zip(block.queries, block.keys, block.values, strict=True)
    return torch.stack([cache.attend(layer, *part, place) for layer, part in enumerate(parts)])


def read_block(cache: KeyValueCache, rows: list[int], block: NewBlock) -> Tensor:
    """``attend`` at the place of the block, which turns each position by its own angle."""
    place = cache.place(rows, block.spans, block.queries.shape[3])
    assert place.rotation.equal(turns(block, cache.rope[0]))
    return attend(cache, block, place)


def read_one_by_one(cache: KeyValueCache, rows: list[int], block: NewBlock) -> Tensor:
    """``read_block``, but position after position; each at its part of the place of them all."""
    place, rotation, found = cache.place(rows, block.spans, block.queries.shape[3]), turns(block, cache.rope[0]), []
    for number in range(block.queries.shape[3]):
        one, piece = place.at(number), (slice(None), slice(None), slice(None), slice(number, number + 1))
        assert one.rotation.equal(rotation[:, :, number : number + 1])
        part = replace(block, queries=block.queries[piece], keys=block.keys[piece], values=block.values[piece])
        found.append(attend(cache, part, one))
    return torch.cat(found, dim=3)


def turns(block: NewBlock, theta: float) -> Tensor:
    new = block.queries.shape[3]
    rotation = rotary_rotation(max(span.first for span in block.spans) + new, HEAD_DIM, theta, CPU)
    return torch.stack([rotation[span.first : span.first + new] for span in block.spans])[:, None]


def assert_reads(found: Tensor, block: NewBlock, pasts: list[Past], window: int | None) -> None:
    for row, past in enumerate(pasts):
        expected = expected_reads(block, row, past, window)
        torch.testing.assert_close(found[:, row, :, : expected.shape[2]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("seed", range(6))
def test_positions_read_what_was_accepted_within_their_window_and_document(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    cache, pasts = new_cache(window, rows=3), [Past() for _ in range(3)]
    for _ in range(25):
        rows = rng.sample(range(3), rng.randint(1, 3))  # here and there, in any order
        some = [pasts[row] for row in rows]
        longest = rng.choice([1, 1, 4, SPARE_SLOTS])
        lengths = [rng.randint(1, longest) for _ in rows]
        block = random_block(rng, some, lengths)
        read = read_one_by_one if rng.random() < 0.2 else read_block
        assert_reads(read(cache, rows, block), block, some, window)
        for number, (past, length) in enumerate(zip(some, lengths, strict=True)):
            accepted = rng.choice([length, rng.randint(0, length)])
            past.document_start = [*block.spans[number].oldest, past.document_start][accepted]
            keep(block, number, past, accepted)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_block_longer_than_the_ring_reads_as_if_it_were_short(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    cache, pasts = new_cache(window, rows=3), [Past() for _ in range(3)]
    for _ in range(8):
        rows = rng.sample(range(3), rng.randint(1, 3))
        some = [pasts[row] for row in rows]
        block = random_block(rng, some, [rng.choice([1, SPARE_SLOTS, SPARE_SLOTS + 1, 80])] * len(rows))
        assert_reads(read_block(cache, rows, block), block, some, window)
        for number, past in enumerate(some):
            keep(block, number, past, len(block.spans[number].oldest))


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_move_or_come_from_another_cache_read_on(window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    cache, pasts = new_cache(window, rows=1), [Past()]
    for _ in range(12):
        if rng.random() < 0.6:
            joining, past = new_cache(window, rows=1), Past()
            for length in rng.choices([3, 20, FIRST_SLOTS - 20, FIRST_SLOTS + 20], k=2):
                block = random_block(rng, [past], [length])
                read_block(joining, [0], block)
                keep(block, 0, past, length)
            cache.append(joining, len(pasts))
            pasts.append(past)
        elif len(pasts) > 1:
            gone = rng.randrange(len(pasts))
            cache.move_row(len(pasts) - 1, gone)
            pasts[gone] = pasts[-1]
            pasts.pop()
        block = random_block(rng, pasts, [rng.randint(1, 9) for _ in pasts])
        assert_reads(read_block(cache, list(range(len(pasts))), block), block, pasts, window)
        for row, past in enumerate(pasts):
            keep(block, row, past, len(block.spans[row].oldest))


def test_caches_that_share_places_need_no_place_of_their_own() -> None:
    rng, sharing = random.Random(0), []
    shapes = [(None, 100.0), (None, 99.0), (5, 100.0), (5, 99.0), (6, 100.0)]
    for (window, theta), (other_window, other_theta) in itertools.product(shapes, shapes):
        one, other, past = new_cache(window, 1, theta), new_cache(other_window, 1, other_theta), Past()
        if other.shares_places_with(one):
            sharing.append((window, other_window))
            for length in (1, 20, FIRST_SLOTS, 1, 3, 2 * FIRST_SLOTS, 1):
                block = random_block(rng, [past], [length])
                place = one.place([0], block.spans, length)
                assert place.rotation.equal(turns(block, other_theta))
                assert_reads(attend(other, block, place), block, [past], other_window)
                keep(block, 0, past, length)
    assert (5, 5) in sharing


@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_ring_never_grows_and_a_cache_without_a_window_grows_by_a_quarter(window: int) -> None:
    ring, whole = new_cache(window, rows=1), new_cache(None, rows=1)
    sizes = set()
    for position in range(0, 5 * FIRST_SLOTS, 10):
        for cache in (ring, whole):
            cache.place([0], [Span(position, [0] * 10)], 10)
        sizes.add(whole.keys_values.shape[4])
        assert ring.keys_values.shape[4] == window + SPARE_SLOTS
    assert sorted(sizes) == [128, 160, 200, 250, 312, 390, 487, 608, 760]
