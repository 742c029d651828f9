"""Prompts -> text, as a stream of pieces: rows that are written together, each by its own rules, until each has ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from blt.byte_ids import BYTE_OFFSET, EOS, incomplete_suffix_length
from blt.incremental import Networks, State, prefill
from blt.model.kv_cache import SPARE_SLOTS
from blt.sampling import NextLogits, Probabilities, Sampling, draw, next_probabilities
from blt.speculate import Drawer, advance, draft_limit


@dataclass
class GenerationStats:
    """What a stream has cost so far, its prompt left out."""

    latent_calls: int = 0  # passes of the latent transformer
    drafted_bytes: int = 0
    accepted_bytes: int = 0

    def summary(self, new_bytes: int, seconds: float) -> str:
        """The costs of so many bytes in words."""
        words = [f"{new_bytes / seconds:.1f} bytes/s"]
        if self.latent_calls:
            words.append(f"{new_bytes / self.latent_calls:.2f} bytes per latent call")
        if self.drafted_bytes:
            words.append(f"{self.accepted_bytes} of {self.drafted_bytes} drafted bytes accepted")
        return ", ".join(words)


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """What to write."""

    prompt_ids: Sequence[int]  # at least one
    max_bytes: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: Sequence[bytes] = ()


class Pieces:
    """Bytes in, pieces of text out as soon as they are final: never a part of a UTF-8 character, never past a stop string.

    The stop string itself is left out. What is no UTF-8 at all comes out as it is; so does a character that the end cuts,
    unless all is to be ``utf8``.

    >>> pieces = Pieces(stop=[b"STOP"])
    >>> [pieces.push(byte) for byte in "é!STOP".encode()], pieces.stopped
    ([b'', b'\\xc3\\xa9', b'!', b'', b'', b'', b''], True)
    """

    def __init__(self, stop: Sequence[bytes] = (), utf8: bool = False) -> None:
        self.stop = stop
        self.utf8 = utf8
        self.stopped = False
        self._held = b""

    def push(self, byte: int) -> bytes:
        """Take in a byte; what has become final by it."""
        self._held += bytes([byte])
        found = [place for place in (self._held.find(word) for word in self.stop) if place >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.end()
        return self._release(
            len(self._held) - max(_begun_stop(self._held, self.stop), incomplete_suffix_length(self._held))
        )

    def end(self) -> bytes:
        """What was held back, as nothing more comes."""
        return self._release(len(self._held) - (incomplete_suffix_length(self._held) if self.utf8 else 0))

    def _release(self, size: int) -> bytes:
        ready, self._held = self._held[:size], self._held[size:]
        return ready


def _begun_stop(held: bytes, stop: Sequence[bytes]) -> int:
    """How many bytes at the end may be the beginning of a stop string.

    >>> _begun_stop(b"x</", [b"</s>"])
    2
    """
    return max((size for word in stop for size in range(1, len(word)) if held.endswith(word[:size])), default=0)


@dataclass
class Writer:
    """One text on its way."""

    request: Request
    drawer: Drawer
    pieces: Pieces
    text: bytearray = field(default_factory=bytearray)  # what is final of it
    num_bytes: int = 0  # drawn
    finished: bool = False

    def write(self, ids: Sequence[int]) -> bytes:
        """Take in drawn ids, up to the one that ends the text; what has become final by them."""
        ready = b""
        for byte_id in ids:
            if byte_id == EOS:
                self.finished = True
            else:
                ready += self.pieces.push(byte_id - BYTE_OFFSET)
                self.num_bytes += 1
                self.finished = self.pieces.stopped or self.num_bytes >= self.request.max_bytes
            if self.finished:
                ready += self.pieces.end()
                break
        self.text += ready
        return ready


def start_writer(request: Request) -> Writer:
    """A text of which nothing is written yet."""
    sampling = request.sampling

    def distribution(logits: NextLogits, past: list[int], new: list[int]) -> Probabilities:
        tail = [*past[-3:], *new][-3:] if sampling.utf8 else []
        text = bytes(byte_id - BYTE_OFFSET for byte_id in tail if byte_id >= BYTE_OFFSET)
        return next_probabilities(logits, sampling, text)

    drawer = Drawer(distribution, torch.Generator().manual_seed(request.seed))
    return Writer(request, drawer, Pieces([word for word in request.stop if word], sampling.utf8))


class Batch:
    """Rows that are written together; between steps one may enter, and those that have ended leave."""

    def __init__(self, networks: Networks, speculate: int = 0, stats: GenerationStats | None = None) -> None:
        if not 0 <= speculate < SPARE_SLOTS:
            raise ValueError(f"speculate must be 0 (plain) to {SPARE_SLOTS - 1} bytes, got {speculate}")
        self.networks = networks
        self.speculate = speculate
        self.stats = stats or GenerationStats()
        self.writers: list[Writer] = []
        self.state: State | None = None

    def add(self, request: Request) -> tuple[Writer, bytes]:
        """Read a request's prompt and draw its first byte; what of it is final."""
        writer = start_writer(request)
        if request.max_bytes == 0:
            writer.finished = True
            return writer, b""
        state, logits = prefill(self.networks, request.prompt_ids)
        drawer = writer.drawer
        drawer.pending = draw(drawer.distribution(logits[0].cpu(), state.rows[0].ids, []), drawer.generator)
        piece = writer.write([drawer.pending])
        if not writer.finished:
            if self.state is None or not self.writers:
                self.state = state
            else:
                self.state.append(state)
            self.writers.append(writer)
        return writer, piece

    def step(self) -> list[tuple[Writer, bytes]]:
        """One more byte of every row, or some where it speculates; each row's newly final bytes. Ended rows leave."""
        assert self.state is not None
        limits = [self._draft_limit(writer) for writer in self.writers]
        drawers = [writer.drawer for writer in self.writers]
        done = advance(self.networks, self.state, drawers, limits)
        self.stats.latent_calls += done.latent_calls
        self.stats.drafted_bytes += done.drafted
        self.stats.accepted_bytes += done.accepted
        pieces = [(writer, writer.write(ids)) for writer, ids in zip(self.writers, done.ids, strict=True)]
        for row in reversed(range(len(self.writers))):
            if self.writers[row].finished:
                self.state.remove(row)
                self.writers[row] = self.writers[-1]
                self.writers.pop()
        return pieces

    def _draft_limit(self, writer: Writer) -> int:
        left = writer.request.max_bytes - writer.num_bytes - 1
        return min(left, draft_limit(self.networks, writer.drawer.acceptance, self.speculate))


def stream(batch: Batch, request: Request) -> Iterator[bytes]:
    """The pieces of one text, as they come, from a batch of its own."""
    _, piece = batch.add(request)
    if piece:
        yield piece
    while batch.writers:
        for _, piece in batch.step():
            if piece:
                yield piece


ROWS_TOGETHER = 16


def write_all(
    networks: Networks, requests: Sequence[Request], speculate: int = 0, stats: GenerationStats | None = None
) -> list[bytes]:
    """All texts, so many rows at a time: as soon as one has ended the next enters."""
    batch, waiting = Batch(networks, speculate, stats), list(requests)[::-1]
    writers: list[Writer] = []
    while waiting or batch.writers:
        while waiting and len(batch.writers) < ROWS_TOGETHER:
            writers.append(batch.add(waiting.pop())[0])
        if batch.writers:
            batch.step()
    return [bytes(writer.text) for writer in writers]
