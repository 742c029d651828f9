"""One round of generation: read what was drawn, draft on, verify the draft in one pass, draw the next id.

Self-speculation (BLT-S, arXiv 2605.08044): the local networks alone go on past the open patch, on the newest latent they
have, and draft some bytes; one pass of everything reads the draft, and what it confirms is kept, its latents included. So a
round costs one latent pass however many bytes it yields, and gives what plain generation would: the same bytes where
decoding is greedy, the same distribution where it samples. Without drafts a round is a plain step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from blt.byte_ids import EOS
from blt.incremental import Networks, State, accept, draft_logits, draft_place, extend
from blt.sampling import NextLogits, Probabilities, draw

# What the next id is drawn from: after the ids that a row has read and the new ones that it has not.
Distribution = Callable[[NextLogits, list[int], list[int]], Probabilities]

ADAPTATION = 0.1  # share of the newest byte in the running acceptance


@dataclass
class Drawer:
    """How a row's ids are drawn."""

    distribution: Distribution
    generator: torch.Generator
    pending: int = -1  # drawn and not yet read
    acceptance: float = 0.7  # running rate at which this row's drafted bytes are accepted


@dataclass(frozen=True)
class Round:
    """What a round has given each row: ids that follow the pending one; the last of them is pending now."""

    ids: list[list[int]]
    drafted: int
    accepted: int
    latent_calls: int


def advance(networks: Networks, state: State, drawers: Sequence[Drawer], draft_limits: Sequence[int]) -> Round:
    """Read each row's pending id, and at most so many drafted after it; draw the id after what was read."""
    blocks = [[drawer.pending] for drawer in drawers]
    beliefs = draft(networks, state, drawers, blocks, draft_limits)
    block = extend(networks, state, blocks, _next_power(max(map(len, blocks))) if networks.compiled else 0)
    logits = block.logits.cpu()
    found = [
        verify(drawer, row.ids, ids, believed, row_logits)
        for drawer, row, ids, believed, row_logits in zip(drawers, state.rows, blocks, beliefs, logits, strict=True)
    ]
    accept(state, block, [len(ids) for ids in found])
    drafted, accepted = (sum(map(len, part)) - len(drawers) for part in (blocks, found))
    return Round(found, drafted, accepted, block.latent_calls)


def draft(
    networks: Networks,
    state: State,
    drawers: Sequence[Drawer],
    blocks: list[list[int]],
    draft_limits: Sequence[int],
) -> list[list[Probabilities]]:
    """Lengthen each row's block by drafted ids; the distribution that each of them was drawn from."""
    beliefs: list[list[Probabilities]] = [[] for _ in drawers]
    going_on = [row for row, limit in enumerate(draft_limits) if limit > 0]
    place = draft_place(networks, state, max(draft_limits)) if going_on else None
    while going_on:
        assert place is not None
        logits = draft_logits(networks, state, blocks, place).cpu()
        for row in list(going_on):
            drawer, ids = drawers[row], blocks[row]
            beliefs[row].append(drawer.distribution(logits[row], state.rows[row].ids, ids))
            ids.append(draw(beliefs[row][-1], drawer.generator))
            if len(beliefs[row]) == draft_limits[row] or ids[-1] == EOS:
                going_on.remove(row)
    return beliefs


def verify(
    drawer: Drawer, past: list[int], ids: list[int], beliefs: list[Probabilities], logits: Float[Tensor, "new vocab"]
) -> list[int]:
    """The drafted ids up to the first that is refused, and one more that is drawn in its place or after them.

    A drafted id is kept with probability min(1, p / q), where q drew it and p should have; one that takes the place of a
    refused one is drawn from what p has more than q. So what comes out is distributed as p (arXiv 2211.17192).
    """
    for index, (drafted, believed) in enumerate(zip(ids[1:], beliefs, strict=True)):
        wanted = drawer.distribution(logits[index], past, ids[: index + 1])
        level = torch.rand((), generator=drawer.generator)
        kept = bool(level * believed[drafted] < wanted[drafted])
        drawer.acceptance += ADAPTATION * (kept - drawer.acceptance)
        if not kept:
            missing = (wanted - believed).clamp(min=0)
            drawer.pending = draw(missing if missing.any() else wanted, drawer.generator)
            return [*ids[1 : index + 1], drawer.pending]
    drawer.pending = draw(drawer.distribution(logits[len(ids) - 1], past, ids), drawer.generator)
    return [*ids[1:], drawer.pending]


def draft_limit(networks: Networks, acceptance: float, most: int) -> int:
    """How many bytes are worth drafting where each is accepted at this rate: most bytes for the work, counted in layers.

    Compiled networks have the choice between few, as each length of a block is compiled.

    >>> from blt.config_file import read_run_config
    >>> networks = Networks(read_run_config("small").model, None, None)
    >>> [draft_limit(networks, acceptance, 16) for acceptance in (0.2, 0.7, 0.9, 0.99)]
    [0, 2, 5, 16]
    >>> [draft_limit(networks._replace(compiled=True), acceptance, 16) for acceptance in (0.2, 0.7, 0.9, 0.99)]
    [0, 1, 3, 15]
    """
    config = networks.config
    local = config.local_encoder.num_layers + config.local_decoder.num_layers
    found = config.entropy_model
    entropy_model = found.num_layers if found and found.kind == "transformer" else 0
    whole = local + config.latent.num_layers + entropy_model

    def bytes_for_work(drafted: int) -> float:
        expected = sum(acceptance**accepted for accepted in range(drafted + 1))
        return expected / (whole + drafted * local)

    lengths: Sequence[int] = range(most + 1)
    if networks.compiled:
        lengths = [drafted for drafted in lengths if _next_power(drafted + 1) == drafted + 1]
    return max(lengths, key=bytes_for_work)


def _next_power(number: int) -> int:
    """The power of two from this number on.

    >>> [_next_power(number) for number in (1, 2, 3, 9)]
    [1, 2, 4, 16]
    """
    return 1 << (number - 1).bit_length()
