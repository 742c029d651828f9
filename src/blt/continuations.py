"""Contexts and continuations -> how probable each continuation is after its context: the natural logarithm, exactly.

Two ways give the same numbers. *Whole rows*: BOS, context and continuation as one row, many rows in a batch. *On the
caches*: a context that several continuations share is read once, and each of them goes on from there as a row of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blt.byte_ids import BOE, BOS, encode
from blt.generate import ROWS_TOGETHER
from blt.incremental import Networks, State, accept, extend, prefill
from blt.language_model import LanguageModel, Text
from blt.model.kv_cache import SPARE_SLOTS
from blt.sampling import NEVER_EMITTED

BATCH_IDS = 8192  # positions of whole rows in one batch
LEAST_SAVING = 3.0  # the caches are taken where whole rows would read so many times the positions (docs/log.md)

Judgement = tuple[Float[Tensor, "row new"], Bool[Tensor, "row new"]]  # nats, the greedy choice?; on the CPU


@dataclass
class Continuation:
    """One continuation as ids, what it continues, and what is known of it so far."""

    context: tuple[int, ...]  # BOS, and as much of the context's end as fits
    ids: list[int]
    num_scored: int = 0
    log_likelihood: float = 0.0  # of the ids scored, over all 260 ids each time
    is_greedy: bool = True  # greedy generation would write them

    def add(self, nats: Float[Tensor, " new"], greedy: Bool[Tensor, " new"]) -> None:
        """Take in the next ids' log-probabilities, and whether each is the greedy choice."""
        self.num_scored += len(nats)
        self.log_likelihood += float(nats.sum())
        self.is_greedy = self.is_greedy and bool(greedy.all())

    def unread(self) -> list[int]:
        """What is to be read to score more: the next ids up to the last but one, as nothing follows the last.

        >>> continuation = Continuation((1,), [70, 71, 72], num_scored=1)
        >>> continuation.unread(), Continuation((1,), [70], num_scored=1).unread()
        ([70, 71], [])
        """
        return self.ids[self.num_scored - 1 : -1][:SPARE_SLOTS]


def cut_to_fit(context: Text, continuation: Text, max_bytes: int) -> Continuation:
    """The two as ids, the context's beginning left out where both exceed the ``max_bytes`` positions of a model.

    >>> cut_to_fit("abcd", "ef", max_bytes=5).context, cut_to_fit("abcd", "efgh", max_bytes=5).context
    ((1, 103, 104), (1,))
    """
    ids, before = encode(continuation)[1:], encode(context)[1:]
    room = max_bytes - 1 - len(ids)
    if room < 0:
        raise ValueError(
            f"a continuation of {len(ids)} bytes is beyond the {max_bytes - 1} bytes this model can hold; "
            "leave the task out, or take a model with a larger max_bytes"
        )
    return Continuation((BOS, *before[max(0, len(before) - room) :]), ids)


@torch.no_grad()
def score_continuations(
    lm: LanguageModel,
    pairs: Iterable[tuple[Text, Text]],
    least_saving: float = LEAST_SAVING,
    on_scored: Callable[[int], None] = lambda number: None,
) -> list[Continuation]:
    """Every pair of context and continuation, scored; an empty context is BOS alone. ``on_scored`` hears how many were.

    A position on the caches costs about three times one of a whole row, as it is read in shorter blocks of fewer rows; so
    contexts are shared only where that saves at least a factor of ``least_saving`` in positions, as with few-shot prompts.
    Raises ValueError for a continuation beyond the model's limit.
    """
    found = [cut_to_fit(context, continuation, lm.config.max_bytes) for context, continuation in pairs]
    sharing: dict[tuple[int, ...], list[Continuation]] = defaultdict(list)
    for continuation in found:
        sharing[continuation.context].append(continuation)
    whole: list[Continuation] = []
    together: list[list[Continuation]] = []
    for context, group in sharing.items():
        num_ids = sum(len(continuation.ids) for continuation in group)
        if num_ids + len(group) * len(context) >= least_saving * (num_ids + len(context)):
            together += [group[begin : begin + ROWS_TOGETHER] for begin in range(0, len(group), ROWS_TOGETHER)]
        else:
            whole += group
    _score_whole_rows(lm, whole, on_scored)
    _score_on_caches(Networks(lm.config, lm.entropy_model, lm.network), together, on_scored)
    return found


def _score_whole_rows(
    lm: LanguageModel, continuations: Sequence[Continuation], on_scored: Callable[[int], None]
) -> None:
    rows = sorted(
        ((len(one.context) + len(one.ids), [*one.context, *one.ids], one) for one in continuations),
        key=lambda row: -row[0],
    )
    while rows:
        longest = rows[0][0]
        number = max(1, BATCH_IDS // longest)
        batch, rows = rows[:number], rows[number:]
        ids = torch.tensor([row + [BOE] * (longest - length) for length, row, _ in batch], device=lm.device)
        nats, greedy = _judge(lm.predict(ids)[0][:, :-1], ids[:, 1:])
        for index, (length, _, one) in enumerate(batch):
            own = slice(len(one.context) - 1, length - 1)  # entry t is about id t + 1
            one.add(nats[index, own], greedy[index, own])
        on_scored(len(batch))


def _score_on_caches(
    networks: Networks, groups: Iterable[Sequence[Continuation]], on_scored: Callable[[int], None]
) -> None:
    """Each group shares a context. As soon as there is room for a group it enters, as in ``generate.write_all``."""
    waiting, reading = list(groups)[::-1], list[Continuation]()
    state: State | None = None
    while waiting or reading:
        while waiting and len(reading) < ROWS_TOGETHER:
            group = waiting.pop()
            after_context, logits = prefill(networks, group[0].context)
            begun = [one for one in group if one.ids]
            _add_all(begun, logits.expand(len(begun), 1, -1), [one.ids[:1] for one in begun])
            for one in group:
                if len(one.ids) > 1:
                    if reading:
                        assert state is not None
                        state.append(after_context)
                    else:
                        state = after_context
                    reading.append(one)
            on_scored(len(group) - sum(len(one.ids) > 1 for one in group))
        if reading:
            assert state is not None
            blocks = [one.unread() for one in reading]
            targets = [one.ids[one.num_scored :][: len(block)] for one, block in zip(reading, blocks, strict=True)]
            block = extend(networks, state, blocks)
            accept(state, block, [len(ids) for ids in blocks])
            _add_all(reading, block.logits, targets)
            for row in reversed(range(len(reading))):
                if not reading[row].unread():
                    state.remove(row)
                    reading[row] = reading[-1]
                    reading.pop()
                    on_scored(1)


def _add_all(
    continuations: Sequence[Continuation], logits: Float[Tensor, "row new vocab"], targets: Sequence[list[int]]
) -> None:
    """Give each continuation what the logits say of its next ids; rows may have fewer of them than the longest."""
    if not continuations:
        return
    padded = [[*ids, *[BOE] * (logits.shape[1] - len(ids))] for ids in targets]
    nats, greedy = _judge(logits, torch.tensor(padded, device=logits.device))
    for row, (one, ids) in enumerate(zip(continuations, targets, strict=True)):
        one.add(nats[row, : len(ids)], greedy[row, : len(ids)])


def _judge(logits: Float[Tensor, "row new vocab"], targets: Int[Tensor, "row new"]) -> Judgement:
    """Each target's log-probability, and whether greedy generation would emit it.

    >>> logits = torch.zeros(1, 1, 260); logits[..., 0], logits[..., 70] = 9.0, 1.0
    >>> _judge(logits, torch.tensor([[70]]))[1].item()  # 0 is more probable, and never emitted
    True
    """
    nats = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    emitted = logits.clone()
    emitted[..., list(NEVER_EMITTED)] = -torch.inf
    return nats.cpu().double(), (emitted.argmax(-1) == targets).cpu()  # some devices have no float64
