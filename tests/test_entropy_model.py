"""Entropies are those of the module's own predictions, in fp32, and look back exactly as far as they should."""

import math

import pytest
import torch
from tiny import SHAPE, random_row, randomise
from torch import Tensor

from blt.byte_ids import BOS, EOS, NEWLINE, VOCAB_SIZE
from blt.config import EntropyModelConfig
from blt.model.entropy_model import EntropyModel


def random_entropy_model(**changes: object) -> EntropyModel:
    config = EntropyModelConfig.model_validate({"num_layers": 2, "window_positions": 4, **SHAPE, **changes})
    model = EntropyModel(config)
    randomise(model, seed=0)
    return model


def newlines_at(row: Tensor, *positions: int) -> Tensor:
    """The row with newlines at these positions and nowhere else."""
    row = torch.where(row == NEWLINE, NEWLINE + 1, row)
    row[:, list(positions)] = NEWLINE
    return row


def test_an_entropy_is_minus_the_sum_of_p_ln_p_of_the_prediction_one_id_earlier() -> None:
    model = random_entropy_model()
    rows = torch.cat([random_row(20, seed=0), random_row(20, seed=1, eos_at=(7,))])
    entropies = model.entropies(rows)
    assert entropies.shape == (2, 21)
    assert entropies[:, 0].isnan().all()
    with torch.no_grad():
        logits = model(rows).double()
    exponentials = logits.exp()
    p = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(entropies[:, 1:].double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=0)
    assert entropies[:, 1:].min() > 0 and entropies[:, 1:].max() < math.log(VOCAB_SIZE)


def test_a_model_that_knows_nothing_has_the_entropy_of_260_equal_chances_and_a_sure_one_has_none() -> None:
    model = random_entropy_model()
    with torch.no_grad():
        model.head.weight.zero_()
        assert model.entropies(random_row(5, seed=0))[0, 1:].tolist() == pytest.approx([math.log(260)] * 5)
        model.norm.weight.fill_(1.0)
        model.byte_embedding.weight.fill_(1.0)
        for layer in model.transformer.layers:
            layer.attention.o_proj.weight.zero_()
            layer.ffn.down_proj.weight.zero_()
        model.head.weight[70] = 100.0  # logit 1600 against 0: some probabilities are 0, and 0 ln 0 is 0
        assert model.entropies(random_row(5, seed=0))[0, 1:].tolist() == [0.0] * 5


def test_entropies_are_fp32_and_the_same_to_the_bit_under_bf16_autocast() -> None:
    model = random_entropy_model()
    row = random_row(30, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        entropies = model.entropies(row)
        assert model(row).dtype == torch.bfloat16  # the autocast is on, only entropies leave it
    assert entropies.dtype == torch.float32
    assert entropies[:, 1:].equal(model.entropies(row)[:, 1:])


def test_entropies_keep_no_graph() -> None:
    assert not random_entropy_model().entropies(random_row(5, seed=0)).requires_grad


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_an_entropy_looks_back_over_layers_times_the_window_and_no_farther(num_layers: int, window: int) -> None:
    model = random_entropy_model(num_layers=num_layers, window_positions=window)
    row = random_row(40, seed=4)
    changed = row.clone()
    changed[0, 10] = row[0, 10] - 1 if row[0, 10] > 4 else 9
    same = (model.entropies(row) == model.entropies(changed))[0, 1:]
    # The prediction at position t reads ids t - layers * (window - 1) .. t, and is entry t + 1.
    last = 10 + num_layers * (window - 1) + 1
    assert same.logical_not().nonzero().flatten().add(1).tolist() == list(range(11, last + 1))


def test_without_a_window_an_entropy_looks_back_over_the_whole_document() -> None:
    model = random_entropy_model(num_layers=1, window_positions=None)
    row = random_row(40, seed=3)
    changed = row.clone()
    changed[0, 1] = row[0, 1] - 1 if row[0, 1] > 4 else 9
    assert (model.entropies(row) != model.entropies(changed))[0, 2:].all()


@pytest.mark.parametrize("window", [4, None])
def test_an_entropy_ignores_the_documents_before_its_own(window: int | None) -> None:
    model = random_entropy_model(window_positions=window)
    row = random_row(24, seed=4, eos_at=(11,))
    changed = torch.cat([random_row(11, seed=5), row[:, 11:]], dim=1)
    # The doubt about the BOS after an EOS is the old document's; from that BOS on nothing of it is left.
    assert model.entropies(row)[0, 13:].equal(model.entropies(changed)[0, 13:])
    assert not model.entropies(row)[0, 12].equal(model.entropies(changed)[0, 12])
    alone = model.entropies(row[:, 12:])
    torch.testing.assert_close(model.entropies(row)[:, 13:], alone[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [5, None])
def test_with_the_reset_an_entropy_ignores_the_lines_before_its_own(window: int | None) -> None:
    model = random_entropy_model(window_positions=window, reset_at_newline=True)
    row = newlines_at(random_row(30, seed=6), 9, 20)
    for newline in (9, 20):
        changed = torch.cat([newlines_at(random_row(newline, seed=7), 3), row[:, newline:]], dim=1)
        # The doubt about the newline itself is the old line's; what follows is predicted from the newline on.
        assert model.entropies(row)[0, newline + 1 :].equal(model.entropies(changed)[0, newline + 1 :])
        assert not model.entropies(row)[0, newline].equal(model.entropies(changed)[0, newline])
        line = model.entropies(row[:, newline:])
        torch.testing.assert_close(model.entropies(row)[:, newline + 1 :], line[:, 1:], atol=1e-5, rtol=0)


def test_without_the_reset_an_entropy_remembers_the_line_before() -> None:
    model = random_entropy_model(window_positions=None)
    row = newlines_at(random_row(20, seed=6), 9)
    changed = torch.cat([newlines_at(random_row(9, seed=7), 3), row[:, 9:]], dim=1)
    assert (model.entropies(row) != model.entropies(changed))[0, 10:].all()


def test_the_reset_keeps_the_boundaries_of_documents() -> None:
    model = random_entropy_model(window_positions=None, reset_at_newline=True)
    row = torch.tensor([[BOS, 70, NEWLINE, 71, EOS, BOS, 72, NEWLINE, 73]])
    changed = torch.tensor([[BOS, 80, NEWLINE, 81, EOS, BOS, 72, NEWLINE, 73]])
    assert (model.entropies(row) == model.entropies(changed))[0].tolist() == [
        *[False, True, False, True, False, False],  # nan; after BOS; 70, 80; after the newline; 71, 81; EOS
        *[True, True, True, True],
    ]
