"""Properties of every patching rule: patches tile the row, decisions never look ahead, and stepwise they are the same."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blt.byte_ids import BOS, BYTE_OFFSET, EOS, VOCAB_SIZE
from blt.config import PatchingConfig
from blt.model.patching import (
    MAX_ENTROPY,
    PatchingState,
    entropies_of_codes,
    entropy_codes,
    entropy_edges,
    is_space_like,
    mean_patch_bytes,
    newest_closed_patch,
    patch_ids,
    patch_lengths,
    patch_starts,
    rounded_up,
    split_long_patches,
    step_patching,
    threshold_for_patch_size,
)

RULES = ("entropy", "entropy_rise", "space", "fixed")

# Any ids in any order, but often those that decide something. Entropies are multiples of 1/8: exact in fp32.
ids_lists = st.lists(
    st.sampled_from([BOS, EOS, EOS, *(byte + BYTE_OFFSET for byte in b"  ,az\n9\xc3\xa9")]) | st.integers(0, 259),
    min_size=1,
    max_size=24,
)
nats = st.integers(0, 44).map(lambda eighths: eighths / 8)


@dataclass(frozen=True)
class Case:
    """One row of ids, its entropies (one more), and a config."""

    ids: list[int]
    nats: list[float]
    config: PatchingConfig

    def starts(self) -> Tensor:
        return patch_starts(self.byte_ids(), self.entropies(), self.config)

    def byte_ids(self) -> Tensor:
        return torch.tensor([self.ids])

    def entropies(self) -> Tensor:
        return torch.tensor([self.nats])


@st.composite
def configs(draw: st.DrawFn, rule: str, limited: bool | None = None) -> PatchingConfig:
    limit = st.integers(1, 6)
    return PatchingConfig(
        rule=rule,
        threshold_nats=draw(nats) / (4 if rule == "entropy_rise" else 1) if rule.startswith("entropy") else None,
        patch_bytes=draw(st.integers(1, 6)) if rule == "fixed" else None,
        max_patch_bytes=draw({None: st.none() | limit, True: limit, False: st.none()}[limited]),
    )


@st.composite
def cases(draw: st.DrawFn, rule: str, limited: bool | None = None) -> Case:
    ids = draw(ids_lists)
    values = draw(st.lists(nats, min_size=len(ids), max_size=len(ids)))
    return Case(ids, [math.nan, *values], draw(configs(rule, limited)))


def property_of_every_rule(test):
    """The test for each rule, on many drawn cases."""
    drawn = given(data=st.data())(test)
    return pytest.mark.parametrize("rule", RULES)(settings(deadline=None, max_examples=60)(drawn))


def positions_in_documents(ids: list[int]) -> list[int]:
    """How many ids of its document stand before each id and before the unknown next one."""
    positions = [0]
    for byte_id in ids:
        positions.append(0 if byte_id == EOS else positions[-1] + 1)
    return positions


@property_of_every_rule
def test_patch_lengths_tile_the_row_and_each_document_opens_with_two_patches(rule: str, data: st.DataObject) -> None:
    case = data.draw(cases(rule))
    starts = case.starts()
    lengths = patch_lengths(patch_ids(starts))[0].tolist()
    assert starts.shape == (1, len(case.ids) + 1)
    assert min(lengths) > 0
    assert sum(lengths) == len(case.ids)
    assert starts[0, :-1].nonzero().flatten().tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert all(starts[0, t] for t, position in enumerate(positions_in_documents(case.ids)) if position < 2)


@property_of_every_rule
def test_boundaries_ignore_later_bytes(rule: str, data: st.DataObject) -> None:
    case = data.draw(cases(rule))
    starts = case.starts()
    for n in range(1, len(case.ids) + 1):  # the last entry of a prefix is about an id that it does not hold
        prefix = patch_starts(case.byte_ids()[:, :n], case.entropies()[:, : n + 1], case.config)
        assert prefix.equal(starts[:, : n + 1])


@property_of_every_rule
def test_boundaries_ignore_batch_mates_and_padding_on_the_right(rule: str, data: st.DataObject) -> None:
    config = data.draw(configs(rule))
    mates = [data.draw(cases(rule)) for _ in range(3)]
    longest = max(len(mate.ids) for mate in mates)
    filler = data.draw(st.integers(0, VOCAB_SIZE - 1))
    ids = torch.tensor([mate.ids + [filler] * (longest - len(mate.ids)) for mate in mates])
    entropies = torch.tensor([mate.nats + [math.nan] * (longest - len(mate.ids)) for mate in mates])
    batch = patch_starts(ids, entropies, config)
    for row, mate in zip(batch, mates, strict=True):
        alone = Case(mate.ids, mate.nats, config).starts()
        assert row[: len(mate.ids) + 1].equal(alone[0])


@property_of_every_rule
def test_deciding_one_byte_at_a_time_gives_the_starts_of_the_whole_row(rule: str, data: st.DataObject) -> None:
    case = data.draw(cases(rule))
    state = PatchingState()
    decisions = [state.next_starts]
    for byte_id, next_entropy in zip(case.ids, case.nats[1:], strict=True):
        state = step_patching(state, byte_id, next_entropy if case.config.uses_entropies else None, case.config)
        decisions.append(state.next_starts)
    assert decisions == case.starts()[0].tolist()


@settings(deadline=None, max_examples=300)
@given(values=st.lists(st.floats(0, 5.5, width=32), min_size=2, max_size=8), data=st.data())
@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_single_bytes_and_whole_rows_round_alike_where_an_entropy_lies_at_the_threshold(
    rule: str, values: list[float], data: st.DataObject
) -> None:
    entropies = torch.tensor([[math.nan, *values]])
    found = (entropies if rule == "entropy" else entropies.diff(dim=1)).flatten()
    at_or_beside = data.draw(st.sampled_from(found[~found.isnan()].tolist())) + data.draw(
        st.sampled_from([0.0, 1e-12, -1e-12, 1e-8, -1e-8])  # what fp64 can tell apart and fp32 cannot
    )
    config = PatchingConfig(rule=rule, threshold_nats=at_or_beside)
    state = PatchingState()
    decisions = [state.next_starts]
    for next_entropy in values:
        state = step_patching(state, ord("a"), next_entropy, config)
        decisions.append(state.next_starts)
    assert decisions == patch_starts(torch.full((1, len(values)), ord("a")), entropies, config)[0].tolist()


@property_of_every_rule
def test_no_patch_is_longer_than_the_maximum_and_none_is_split_before_it(rule: str, data: st.DataObject) -> None:
    case = data.draw(cases(rule, limited=True))
    longest = case.config.max_patch_bytes
    assert longest is not None
    starts = case.starts()[0].tolist()
    unlimited = Case(case.ids, case.nats, case.config.model_copy(update={"max_patch_bytes": None})).starts()[0].tolist()
    since_start = 0
    for split, unsplit in zip(starts, unlimited, strict=True):
        assert split == (unsplit or since_start == longest)  # the unknown next id counts
        since_start = 1 if split else since_start + 1


@settings(deadline=None, max_examples=200)
@given(cases("entropy", limited=False))
def test_an_entropy_above_the_threshold_starts_a_patch_and_one_at_it_does_not(case: Case) -> None:
    assert case.config.threshold_nats is not None
    positions = positions_in_documents(case.ids)
    expected = [p < 2 or h > case.config.threshold_nats for p, h in zip(positions, case.nats, strict=True)]
    assert case.starts()[0].tolist() == expected


@settings(deadline=None, max_examples=200)
@given(cases("entropy_rise", limited=False))
def test_a_rise_above_the_threshold_starts_a_patch_from_the_third_byte_of_a_document(case: Case) -> None:
    assert case.config.threshold_nats is not None
    rises = [math.nan, *(after - before for before, after in zip(case.nats, case.nats[1:], strict=False))]
    positions = positions_in_documents(case.ids)
    expected = [p < 3 or rise > case.config.threshold_nats for p, rise in zip(positions, rises, strict=True)]
    assert case.starts()[0].tolist() == expected


@settings(deadline=None, max_examples=200)
@given(cases("fixed", limited=False))
def test_fixed_patches_are_equally_long_after_the_first_id_of_a_document_until_its_end(case: Case) -> None:
    assert case.config.patch_bytes is not None
    for document in documents_of(case):
        bos, *others, last = document if len(document) > 1 else [*document, [EOS]]
        assert len(bos) == 1
        assert all(len(patch) == case.config.patch_bytes for patch in others)
        assert len(last) <= case.config.patch_bytes


@settings(deadline=None, max_examples=300)
@given(cases("space", limited=False))
def test_space_patches_are_spaces_then_others_then_one_space(case: Case) -> None:
    case = Case([BOS, *case.ids], [*case.nats, 0.0], case.config)
    for document in documents_of(case):
        if document[0] == [BOS]:
            kinds = ["".join("S" if naive_space_like(byte_id) else "N" for byte_id in patch) for patch in document]
            # All but the first and the last patch hold a byte that is not space-like, and end where a run of those ends.
            assert all(re.fullmatch("S*N+S", patch) for patch in kinds[1:-1])
            assert re.fullmatch("S*N*S?", kinds[-1])


def documents_of(case: Case) -> list[list[list[int]]]:
    """The patches of each document; an EOS, and the end of the row, end a document."""
    documents: list[list[list[int]]] = []
    starts = case.starts()[0].tolist()
    for t, position in enumerate(positions_in_documents(case.ids)[:-1]):
        if position == 0:
            documents.append([])
        if starts[t]:
            documents[-1].append([])
        documents[-1][-1].append(case.ids[t])
    return documents


def naive_space_like(byte_id: int) -> bool:
    """Neither latin letter, digit nor UTF-8 continuation byte."""
    byte = byte_id - BYTE_OFFSET
    return byte < 0 or not (bytes([byte]).isalnum() or 0b10000000 <= byte <= 0b10111111)


def test_space_like_bytes_are_all_but_letters_digits_and_continuation_bytes() -> None:
    assert is_space_like(torch.arange(VOCAB_SIZE)).tolist() == [naive_space_like(i) for i in range(VOCAB_SIZE)]


@property_of_every_rule
def test_a_byte_reads_the_patch_before_the_one_that_holds_the_next_byte(rule: str, data: st.DataObject) -> None:
    case = data.draw(cases(rule))
    starts = case.starts()
    holder = starts.long().cumsum(1) - 1  # of each id, the unknown next one included
    assert patch_ids(starts).equal(holder[:, :-1])
    newest = newest_closed_patch(starts)
    assert newest.equal(holder[:, 1:] - 1)
    # closed: it ends at t or before; newest: the patch after it does not
    lengths = patch_lengths(patch_ids(starts))[0]
    ends = lengths.cumsum(0)
    for t, patch in enumerate(newest[0].tolist()):
        assert ends[patch] <= t + 1
        assert patch + 1 == len(ends) or ends[patch + 1] > t + 1 or not starts[0, t + 1]


def test_patch_lengths_of_a_batch_are_zero_beyond_a_rows_last_patch() -> None:
    starts = torch.tensor([[True, True, True, True, False], [True, True, False, False, True]])
    assert patch_lengths(patch_ids(starts)).tolist() == [[1, 1, 1, 1], [1, 3, 0, 0]]


@settings(deadline=None, max_examples=100)
@given(
    longest=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_a_long_patch_is_split_into_full_ones_and_a_rest(longest: int, lengths: list[int]) -> None:
    starts = torch.zeros(1, sum(lengths) + 1, dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths) + 1)]] = True
    pieces = split_long_patches(starts, longest)[0].nonzero().flatten().diff().tolist()
    expected = [[longest] * (length // longest) + [length % longest] * (length % longest > 0) for length in lengths]
    assert pieces == [piece for patch in expected for piece in patch]


def random_entropies(rule: str, seed: int = 0) -> tuple[Tensor, Tensor, PatchingConfig]:
    """Two rows with documents inside, entropies as an untrained eye would expect them, and a config to calibrate."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BYTE_OFFSET, VOCAB_SIZE, (2, 200), generator=generator)
    ids[:, 0] = BOS
    ids[0, 70], ids[0, 71] = EOS, BOS
    entropies = torch.rand(2, 201, generator=generator) * math.log(VOCAB_SIZE)
    entropies[:, 0] = math.nan
    return ids, entropies, PatchingConfig(rule=rule)


def mean_at(threshold: float, ids: Tensor, entropies: Tensor, config: PatchingConfig) -> float:
    return mean_patch_bytes(ids, patch_starts(ids, entropies, config.model_copy(update={"threshold_nats": threshold})))


@pytest.mark.parametrize("longest", [None, 6])
@pytest.mark.parametrize("target", [1.3, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_the_calibrated_threshold_reaches_its_target_up_to_a_single_boundary(
    rule: str, target: float, longest: int | None
) -> None:
    ids, entropies, config = random_entropies(rule)
    config = config.model_copy(update={"max_patch_bytes": longest})
    values = entropies if rule == "entropy" else entropies.diff(dim=1)
    thresholds = [-6.0, *values[~values.isnan()].tolist()]
    reachable = {mean_at(threshold, ids, entropies, config) for threshold in thresholds}
    reached = mean_at(threshold_for_patch_size(entropies, ids, config, target), ids, entropies, config)
    assert reached in (max(m for m in reachable if m < target), min(m for m in reachable if m >= target))
    assert reached == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("target", [0.5, 500.0])
@pytest.mark.parametrize("longest", [None, 6])
@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_a_target_that_no_threshold_reaches_is_refused_with_the_range_that_can_be(
    rule: str, longest: int | None, target: float
) -> None:
    ids, entropies, config = random_entropies(rule)
    config = config.model_copy(update={"max_patch_bytes": longest})
    most = mean_at(math.inf, ids, entropies, config)
    with pytest.raises(ValueError, match=f"patches of {target} bytes .* average 1.00 to {most:.2f}"):
        threshold_for_patch_size(entropies, ids, config, target)


@pytest.mark.parametrize("rule", ["entropy", "entropy_rise"])
def test_a_rule_without_its_entropies_or_its_threshold_says_what_to_do(rule: str) -> None:
    ids, entropies, config = random_entropies(rule)
    calibrated = config.model_copy(update={"threshold_nats": 1.0})
    for given_entropies, given_config in ((None, calibrated), (entropies, config)):
        with pytest.raises(
            ValueError,
            match=f"rule '{rule}' needs entropies and a threshold; train the model first, which calibrates it",
        ):
            patch_starts(ids, given_entropies, given_config)


@pytest.mark.parametrize("config", [PatchingConfig(rule="space"), PatchingConfig(rule="fixed", patch_bytes=3)])
def test_rules_on_bytes_need_no_entropies(config: PatchingConfig) -> None:
    ids, entropies, _ = random_entropies("entropy")
    assert patch_starts(ids, None, config).equal(patch_starts(ids, entropies, config))


# entropies as a byte

any_nats = st.floats(0, 5.5625, width=32)  # rounding may lift an entropy a little above ln 260
thresholds = st.none() | any_nats | st.sampled_from(entropy_edges().tolist()) | st.floats(-1, 7, width=32)


@settings(deadline=None, max_examples=300)
@given(values=st.lists(any_nats, min_size=1, max_size=20), threshold=thresholds)
def test_a_code_compares_with_every_edge_as_its_entropy_does(values: list[float], threshold: float | None) -> None:
    edges = entropy_edges(threshold)
    beside = [*edges.tolist(), *torch.nextafter(edges, torch.tensor(9.0)).tolist(), *values]
    entropies = torch.tensor([[math.nan, *beside]])
    codes = entropy_codes(entropies, edges)
    kept = entropies_of_codes(codes, edges)
    assert len(edges) <= 255 and kept[0, 0].isnan()
    for edge in edges:
        assert (kept[:, 1:] > edge).equal(entropies[:, 1:] > edge)
    assert entropy_codes(kept, edges).equal(codes)


@settings(deadline=None, max_examples=100)
@given(case=cases("entropy"), data=st.data())
def test_codes_with_the_threshold_among_their_edges_start_the_same_patches(case: Case, data: st.DataObject) -> None:
    case.nats[1:] = data.draw(st.lists(any_nats, min_size=len(case.ids), max_size=len(case.ids)))
    assert case.config.threshold_nats is not None
    edges = entropy_edges(case.config.threshold_nats)
    kept = entropies_of_codes(entropy_codes(case.entropies(), edges), edges)
    assert patch_starts(case.byte_ids(), kept, case.config).equal(case.starts())


@settings(deadline=None, max_examples=200)
@given(case=cases("entropy_rise"), other_threshold=thresholds, data=st.data())
def test_rounded_rises_are_the_same_stepwise_and_from_codes_of_any_edges(
    case: Case, other_threshold: float | None, data: st.DataObject
) -> None:
    values = data.draw(st.lists(any_nats, min_size=len(case.ids), max_size=len(case.ids)))
    step = data.draw(st.integers(-3, 3)) * (MAX_ENTROPY / 255)  # what a rounded rise can be, or nearly
    threshold = data.draw(st.sampled_from([step, float(torch.tensor(step)), case.config.threshold_nats]))
    config = case.config.model_copy(update={"rounded_entropies": True, "threshold_nats": threshold})
    case = Case(case.ids, torch.tensor([math.nan, *values]).tolist(), config)
    edges = entropy_edges(other_threshold)
    kept = entropies_of_codes(entropy_codes(case.entropies(), edges), edges)
    assert patch_starts(case.byte_ids(), kept, config).equal(case.starts())
    state, decisions = PatchingState(), [True]
    for byte_id, next_entropy in zip(case.ids, case.nats[1:], strict=True):
        state = step_patching(state, byte_id, next_entropy, config)
        decisions.append(state.next_starts)
    assert decisions == case.starts()[0].tolist()


def test_rounding_moves_an_entropy_up_by_less_than_a_step() -> None:
    entropies = torch.cat([torch.tensor([math.nan]), torch.rand(1000) * MAX_ENTROPY])[None]
    moved = (rounded_up(entropies) - entropies)[0]
    assert moved[0].isnan() and moved[1:].min() >= 0 and moved[1:].max() < MAX_ENTROPY / 255 + 1e-6
