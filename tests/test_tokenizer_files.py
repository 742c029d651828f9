"""The oracle is byte_ids: what transformers' AutoTokenizer makes of the files we write."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_models, tiny_config
from transformers import AutoTokenizer

from blt.byte_ids import BOE, BOS, EOS, VOCAB_SIZE, decode, encode
from blt.config import NgramEntropyModelConfig
from blt.model_files import save_model
from blt.tokenizer_files import SPECIAL


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tiny_config(), *random_models(tiny_config()))
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
def test_ids_are_ours_for_any_text_and_decode_to_it(text: str, theirs: Any) -> None:
    ids = theirs(text)["input_ids"]
    assert ids == encode(text)
    assert theirs.decode(ids, skip_special_tokens=True) == text


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_decoding_drops_control_ids_and_shows_what_is_no_utf8(ids: list[int], theirs: Any) -> None:
    assert theirs.decode(ids, skip_special_tokens=True) == decode(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("name", SPECIAL)
def test_a_control_ids_name_in_a_text_is_plain_bytes(name: str, theirs: Any) -> None:
    text = f"a{name} b{name}"
    assert theirs(text)["input_ids"] == theirs.encode(text) == encode(text)
    assert theirs.decode(encode(text), skip_special_tokens=True) == text


def test_control_ids_are_known_by_name(theirs: Any) -> None:
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (BOS, EOS, 3)
    assert sorted(theirs.all_special_ids) == [BOE, BOS, EOS, 3]
    assert len(theirs) == VOCAB_SIZE
    assert theirs.model_max_length == tiny_config().max_bytes


def test_two_texts_are_one_row_and_batches_are_padded_with_the_pad_id(theirs: Any) -> None:
    assert theirs("ab", "c")["input_ids"] == encode("abc")
    assert theirs(["ab", "c"], padding=True)["input_ids"] == [encode("ab"), [*encode("c"), 3]]


def test_a_model_that_only_we_can_load_has_the_files_too(tmp_path: Path) -> None:
    config = tiny_config(entropy_model=NgramEntropyModelConfig(kind="ngram", max_order=4, table_bits=8))
    save_model(tmp_path, config, *random_models(config))
    assert AutoTokenizer.from_pretrained(tmp_path).encode("é") == encode("é")


def test_a_megabyte_takes_seconds(theirs: Any) -> None:
    text = "def f(x):\n    return 'é' * x  # no spaces are needed for it to be fast\n" * 14_000
    theirs.model_max_length = 2**40  # or it warns
    started = time.perf_counter()
    ids = theirs(text)["input_ids"]
    assert time.perf_counter() - started < 20  # 0.7 on a quiet machine; merges would make it minutes
    assert ids == encode(text)
