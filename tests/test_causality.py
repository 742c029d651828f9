"""Nothing looks ahead: change a byte, and all that comes before it is the same to the bit.

To the bit where the two computations have the same shapes. The latent transformer's shape is the number of patches; where
a change adds or removes patches behind it, matrix products sum in another order, and logits agree to a few ULP.
"""

import pytest
import torch
from tiny import SHAPE, random_models, random_row, threshold_between, tiny_config
from torch import Tensor

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS
from blt.config import EntropyModelConfig, ModelConfig, PatchingConfig, TransformerConfig
from blt.model.patching import patch_starts

NUM_IDS = 32
A_FEW_ULP = {"atol": 5e-6, "rtol": 0.0}  # of logits up to about 5
CHANGES = [(1, "byte"), (2, "byte"), (15, "byte"), (15, "eos"), (16, "byte"), (30, "eos"), (31, "byte"), (31, "eos")]
CONFIGS = {
    "short_windows": tiny_config(),
    "windows_beyond_the_row": tiny_config(
        entropy_model=EntropyModelConfig(num_layers=2, window_positions=512, **SHAPE),
        local_encoder=TransformerConfig(num_layers=2, window_positions=512, **SHAPE),
        local_decoder=TransformerConfig(num_layers=2, window_positions=512, **SHAPE),
    ),
    "four_slots_projected": tiny_config(
        slots_per_patch=4, latent=TransformerConfig(num_layers=2, width=24, num_heads=2, ffn_width=40)
    ),
}
RULES = {
    "entropy": PatchingConfig(),
    "entropy_split_at_4": PatchingConfig(max_patch_bytes=4),
    "entropy_rise": PatchingConfig(rule="entropy_rise", threshold_nats=0.03),
    "space": PatchingConfig(rule="space"),
    "fixed": PatchingConfig(rule="fixed", patch_bytes=4),
}


class Model:
    """A random entropy model and network, and a threshold in a gap between the entropies of random rows."""

    def __init__(self, config: ModelConfig, patching: PatchingConfig) -> None:
        self.entropy_model, self.network = random_models(config)
        if patching.rule == "entropy":
            entropies = torch.cat([self.entropies(random_row(NUM_IDS, seed))[0] for seed in range(4)])
            patching = patching.model_copy(update={"threshold_nats": threshold_between(entropies)})
        self.patching = patching

    def entropies(self, row: Tensor) -> Tensor:
        return self.entropy_model.entropies(row)

    def starts(self, row: Tensor) -> Tensor:
        return patch_starts(row, self.entropies(row), self.patching)

    @torch.no_grad()
    def logits(self, row: Tensor, starts: Tensor) -> Tensor:
        return self.network(row, starts)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(CONFIGS[request.param], RULES["entropy"])


@pytest.fixture(scope="module", params=RULES)
def model_of_a_rule(request: pytest.FixtureRequest) -> Model:
    return Model(CONFIGS["short_windows"], RULES[request.param])


def with_another_id(row: Tensor, t: int, kind: str) -> Tensor:
    """The row with another byte, or an EOS, at position t."""
    changed = row.clone()
    changed[0, t] = EOS if kind == "eos" else BYTE_OFFSET + (int(row[0, t]) + 101) % 256
    assert not changed.equal(row)
    return changed


@pytest.mark.parametrize(("t", "kind"), CHANGES)
@pytest.mark.parametrize("eos_at", [(), (8,)])
def test_entropies_and_starts_up_to_a_changed_byte_are_the_same_to_the_bit(
    model: Model, t: int, kind: str, eos_at: tuple[int, ...]
) -> None:
    row = random_row(NUM_IDS, seed=1, eos_at=eos_at)
    changed = with_another_id(row, t, kind)
    before, after = model.entropies(row), model.entropies(changed)
    assert before[0, 1 : t + 1].equal(after[0, 1 : t + 1])
    assert before[0, t + 1] != after[0, t + 1]
    assert model.starts(row)[0, : t + 1].equal(model.starts(changed)[0, : t + 1])


@pytest.mark.parametrize(("t", "kind"), CHANGES)
@pytest.mark.parametrize("eos_at", [(), (8,)])
def test_logits_before_a_changed_byte_are_the_same_to_the_bit_and_logits_at_it_are_not(
    model: Model, t: int, kind: str, eos_at: tuple[int, ...]
) -> None:
    row = random_row(NUM_IDS, seed=1, eos_at=eos_at)
    starts = model.starts(row)
    before, after = model.logits(row, starts), model.logits(with_another_id(row, t, kind), starts)
    assert before[0, :t].equal(after[0, :t])
    assert (before[0, t] - after[0, t]).abs().max() > 1e-2


@pytest.mark.parametrize("t", range(1, NUM_IDS))
def test_bytes_decide_the_patches_behind_them_without_a_trace_in_the_logits_before(
    model_of_a_rule: Model, t: int
) -> None:
    row = random_row(NUM_IDS, seed=2, eos_at=(14,) if t != 14 else ())
    changed = with_another_id(row, t, "byte")
    starts, changed_starts = model_of_a_rule.starts(row), model_of_a_rule.starts(changed)
    assert starts[0, : t + 1].equal(changed_starts[0, : t + 1])
    before, after = model_of_a_rule.logits(row, starts), model_of_a_rule.logits(changed, changed_starts)
    if starts[:, :-1].sum() == changed_starts[:, :-1].sum():
        assert before[0, :t].equal(after[0, :t])
    else:
        torch.testing.assert_close(before[0, :t], after[0, :t], **A_FEW_ULP)
    assert (before[0, t] - after[0, t]).abs().max() > 1e-2


@pytest.mark.parametrize("num_ids", [1, 2, 3, 9, 20, 31])
def test_a_prefix_gives_the_entropies_starts_and_logits_of_the_whole_row(model: Model, num_ids: int) -> None:
    row = random_row(NUM_IDS, seed=3)
    prefix = row[:, :num_ids]
    entropies, starts = model.entropies(row), model.starts(row)
    torch.testing.assert_close(model.entropies(prefix)[:, 1:], entropies[:, 1 : num_ids + 1], **A_FEW_ULP)
    assert model.starts(prefix).equal(starts[:, : num_ids + 1])
    logits = model.logits(prefix, model.starts(prefix))
    torch.testing.assert_close(logits, model.logits(row, starts)[:, :num_ids], **A_FEW_ULP)


def test_the_start_of_the_next_byte_decides_which_patch_a_byte_reads(model: Model) -> None:
    """What makes the unknown next byte's entry of the starts part of the input."""
    row = random_row(NUM_IDS, seed=3)
    opens, stays = model.starts(row), model.starts(row)
    opens[0, -1], stays[0, -1] = True, False
    before, after = model.logits(row, opens), model.logits(row, stays)
    assert before[0, :-1].equal(after[0, :-1])
    assert (before[0, -1] - after[0, -1]).abs().max() > 1e-2


def test_rows_of_a_batch_have_the_entropies_starts_and_logits_they_have_alone(model: Model) -> None:
    rows = [
        random_row(NUM_IDS, seed=seed, eos_at=eos_at) for seed, eos_at in ((0, ()), (1, (10,)), (2, (31,)), (4, ()))
    ]
    batch = torch.cat(rows)
    entropies, starts = model.entropies(batch), model.starts(batch)
    assert len(starts[:, :-1].sum(1).unique()) > 1
    logits = model.logits(batch, starts)
    for i, row in enumerate(rows):
        torch.testing.assert_close(entropies[i : i + 1, 1:], model.entropies(row)[:, 1:], **A_FEW_ULP)
        assert starts[i : i + 1].equal(model.starts(row))
        torch.testing.assert_close(logits[i : i + 1], model.logits(row, starts[i : i + 1]), **A_FEW_ULP)


def test_other_batch_mates_leave_a_row_the_same_to_the_bit(model: Model) -> None:
    row, mate, other = (random_row(NUM_IDS, seed=seed) for seed in (0, 1, 2))
    starts = model.starts(row)
    logits = [model.logits(torch.cat([row, second]), torch.cat([starts, starts]))[0] for second in (mate, other)]
    assert logits[0].equal(logits[1])
    entropies = [model.entropies(torch.cat([row, second]))[0, 1:] for second in (mate, other)]
    assert entropies[0].equal(entropies[1])


@pytest.mark.parametrize("padding", [BOE, EOS, 70])
def test_padding_on_the_right_leaves_entropies_starts_and_logits(model: Model, padding: int) -> None:
    row = random_row(20, seed=5)
    padded = torch.cat([row, torch.full((1, 12), padding)], dim=1)
    entropies, starts = model.entropies(row), model.starts(row)
    torch.testing.assert_close(model.entropies(padded)[:, 1:21], entropies[:, 1:], **A_FEW_ULP)
    padded_starts = model.starts(padded)
    assert padded_starts[:, :21].equal(starts)
    logits = model.logits(padded, padded_starts)[:, :20]
    torch.testing.assert_close(logits, model.logits(row, starts), **A_FEW_ULP)


def test_a_document_ignores_the_ones_before_it_but_for_ngrams_that_reach_back(model: Model) -> None:
    """N-grams are hashed over the row, BOS and EOS included, as in the released weights; attention is not."""
    eos, reach = 15, max(model.network.config.hash_embeddings.ngram_bytes) - 1
    row = random_row(NUM_IDS, seed=6, eos_at=(eos,))
    starts = model.starts(row)
    before = model.logits(row, starts)
    for t in range(1, eos + 1 - reach):
        after = model.logits(with_another_id(row, t, "byte"), starts)
        assert before[0, eos + 1 :].equal(after[0, eos + 1 :])
    after = model.logits(with_another_id(row, eos + 2 - reach, "byte"), starts)
    assert not before[0, eos + 1 :].equal(after[0, eos + 1 :])
    assert row[0, eos + 1] == BOS
