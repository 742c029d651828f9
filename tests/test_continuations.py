"""Likelihoods of continuations: whole rows, the caches and the plain product over single bytes are the same number."""

import math
import random
from typing import Any

import pytest
import torch
from tiny import SHAPE, random_models, threshold_between, tiny_config

from blt.byte_ids import BYTE_OFFSET, EOS, VOCAB_SIZE
from blt.config import EntropyModelConfig, NgramEntropyModelConfig, PatchingConfig
from blt.continuations import Continuation, score_continuations
from blt.language_model import LanguageModel

TOLERANCE = 1e-5  # a byte
WHOLE_ROWS, CACHES = math.inf, 0.0  # how much the caches have to save
MODELS: dict[str, dict[str, Any]] = {
    "entropy": {},
    "newline reset": {
        "entropy_model": EntropyModelConfig(num_layers=1, window_positions=17, reset_at_newline=True, **SHAPE)
    },
    "n-grams": {"entropy_model": NgramEntropyModelConfig(kind="ngram", table_bits=8)},
    "space": {"patching": PatchingConfig(rule="space"), "entropy_model": None},
}
every_model = pytest.mark.parametrize("kind", MODELS)


words = random.Random(0)
SHARED = "\n".join("".join(words.choices("abc de\u00e9", k=30)) for _ in range(2))
LONGEST = "".join(words.choices("abc\n \u00e9", k=50))  # some blocks of the caches


def model(kind: str, **changes: Any) -> LanguageModel:
    """A tiny model of this kind, with a threshold that no entropy of the texts above is near."""
    config = tiny_config(**MODELS[kind])
    if config.entropy_model is None:
        return LanguageModel(config, None, random_models(tiny_config())[1])
    lm = LanguageModel(config, *random_models(config))
    threshold = threshold_between(lm.entropies(lm.encode(SHARED + LONGEST)))
    patched = config.model_copy(update={"patching": PatchingConfig(threshold_nats=threshold), **changes})
    return LanguageModel(patched, lm.entropy_model, lm.network)


PAIRS = [
    (SHARED, LONGEST[::-1]),
    *((SHARED, LONGEST[:size]) for size in (1, 2, 25, 26, 27, 50)),
    *(("", text) for text in ("b", "bc\n", LONGEST)),
    *((SHARED[:9], text) for text in (" ", "longer than its context")),
    ("a context by itself", " and what continues it"),
    ("nothing follows", ""),
    ("", ""),
]


@torch.no_grad()
def product_over_bytes(
    lm: LanguageModel, known: dict[bytes, torch.Tensor], context: str, continuation: str
) -> tuple[float, bool]:
    """Byte after byte, each from a pass of its own over all that stands before."""
    text, total, greedy = context.encode(), 0.0, True
    for byte in continuation.encode():
        if text not in known:
            ids = lm.encode(text)
            known[text] = lm.network(ids, lm.patch_starts(ids))[0, -1].double()
        total += float(known[text].log_softmax(-1)[byte + BYTE_OFFSET])
        greedy &= int(known[text][[EOS, *range(BYTE_OFFSET, VOCAB_SIZE)]].argmax()) == byte + 1
        text += bytes([byte])
    return total, greedy


def agree(found: list[Continuation], expected: list[tuple[float, bool]]) -> None:
    assert len(found) == len(expected)
    for one, (log_likelihood, greedy) in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(log_likelihood, abs=TOLERANCE * max(1, len(one.ids)))
        assert (one.num_scored, one.is_greedy) == (len(one.ids), greedy)


@every_model
def test_both_ways_are_the_product_over_single_bytes(kind: str) -> None:
    lm = model(kind)
    known: dict[bytes, torch.Tensor] = {}
    expected = [product_over_bytes(lm, known, *pair) for pair in PAIRS]
    for least_saving in (WHOLE_ROWS, CACHES):
        agree(score_continuations(lm, PAIRS, least_saving), expected)


@pytest.mark.parametrize("least_saving", [WHOLE_ROWS, CACHES])
def test_what_greedy_generation_writes_is_greedy_and_one_byte_else_is_not(least_saving: float) -> None:
    lm = model("entropy")
    written = lm.generate(SHARED, 40)
    assert isinstance(written, bytes) and len(written) == 40
    changed = [written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :] for place in (0, 20, 39)]
    found = score_continuations(lm, [(SHARED, text) for text in (written, *changed)], least_saving)
    assert [one.is_greedy for one in found] == [True, False, False, False]


@pytest.mark.parametrize("least_saving", [WHOLE_ROWS, CACHES])
def test_more_continuations_than_rows_fit_together_are_all_scored(least_saving: float) -> None:
    lm = model("entropy")
    pairs = [(SHARED[: 10 + group], LONGEST[: 1 + 3 * size]) for group in range(2) for size in range(18)]
    done: list[int] = []
    found = score_continuations(lm, pairs, least_saving, done.append)
    alone = [score_continuations(lm, [pair], WHOLE_ROWS)[0] for pair in pairs]
    agree(found, [(one.log_likelihood, one.is_greedy) for one in alone])
    assert sum(done) == len(pairs)


@pytest.mark.parametrize("least_saving", [WHOLE_ROWS, CACHES])
def test_a_context_that_does_not_fit_is_cut_on_the_left_behind_bos(least_saving: float) -> None:
    lm = model("entropy", max_bytes=64)
    context = SHARED[:100].encode()
    pairs = [(context, b"abc"), (context, b"abd"), (context, b"x" * 63)]
    cut = [(context[-60:], b"abc"), (context[-60:], b"abd"), (b"", b"x" * 63)]
    expected = [(one.log_likelihood, one.is_greedy) for one in score_continuations(lm, cut, WHOLE_ROWS)]
    agree(score_continuations(lm, pairs, least_saving), expected)


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="continuation of 64 bytes is beyond the 63 bytes this model can hold"):
        score_continuations(model("entropy", max_bytes=64), [("", "x" * 64)])


def test_the_caches_are_taken_where_they_save_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, read = model("entropy"), list[int]()
    predict = lm.predict

    def counted(ids: torch.Tensor) -> Any:
        read.append(len(ids))
        return predict(ids)

    monkeypatch.setattr(lm, "predict", counted)
    score_continuations(lm, [("x" * 90, "a" * 10)] * 4, least_saving=2.8)  # 4 x 101 positions against 91 + 40
    assert sum(read) == 0
    score_continuations(lm, [("x" * 90, "a" * 10)] * 4, least_saving=3.2)
    assert sum(read) == 4
