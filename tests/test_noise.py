"""The five noises: what the paper says of each holds for any text, and the seed decides all that is drawn."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.noise import NOISES, antspeak, drop, random_case, repeat, upper_case

LONG = "It is a truth universally acknowledged, and so on. " * 200
seeds = st.integers(0, 5) | st.text(max_size=5)


@given(st.text(), seeds, st.sampled_from(sorted(NOISES)))
def test_a_noise_is_a_function_of_text_and_seed(text: str, seed: int | str, name: str) -> None:
    assert NOISES[name](text, seed) == NOISES[name](text, seed)


@pytest.mark.parametrize("name", ["drop", "random_case", "repeat"])
def test_another_seed_draws_another_text(name: str) -> None:
    assert NOISES[name](LONG, 0) != NOISES[name](LONG, 1)


@given(st.text())
def test_antspeak_is_upper_case_with_a_space_between_any_two_characters(text: str) -> None:
    assert antspeak(text)[::2] == upper_case(text) and set(antspeak(text)[1::2]) <= {" "}


@given(st.text(), seeds)
def test_what_is_not_dropped_stays_in_order(text: str, seed: int | str) -> None:
    left = iter(text)
    assert all(character in left for character in drop(text, seed))  # a subsequence


@given(st.text(alphabet=st.characters(max_codepoint=127)), seeds)  # beyond ASCII some upper cases are two characters
def test_random_case_changes_nothing_but_case(text: str, seed: int | str) -> None:
    assert random_case(text, seed).lower() == text.lower()


@given(st.lists(st.sampled_from("abcdefg"), min_size=1).map("".join), seeds)
def test_a_repeated_character_stands_two_to_four_times(text: str, seed: int | str) -> None:
    alternating = "".join(character + "|" for character in text)
    runs = [(character, len(list(run))) for character, run in groupby(repeat(alternating, seed))]
    assert "".join(character for character, _ in runs) == alternating and max(length for _, length in runs) <= 4


def test_as_many_characters_are_touched_as_the_paper_says() -> None:
    assert 0.08 < 1 - len(drop(LONG)) / len(LONG) < 0.12
    letters = [(old, new) for old, new in zip(LONG, random_case(LONG), strict=True) if old.isalpha()]
    assert 0.47 < sum(new.isupper() for _, new in letters) / len(letters) < 0.53
    distinct = "abcdefghij" * 1000  # no two alike beside each other
    runs = [len(list(run)) for _, run in groupby(repeat(distinct))]
    assert 0.18 < sum(length > 1 for length in runs) / len(distinct) < 0.22 and set(runs) == {1, 2, 3, 4}
