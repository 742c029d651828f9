"""Text -> the same text as a person might garble it: the five noises of the paper's noised HellaSwag (table 3).

Each noise is a pure function of a text and a seed; characters are code points. Each character's fate is drawn on its own.
"""

from collections.abc import Callable
from random import Random

Seed = int | str
Noise = Callable[[str, Seed], str]

DROPPED = 0.1  # of all characters
UPPER = 0.5
REPEATED = 0.2
MOST_IN_A_ROW = 4


def antspeak(text: str, seed: Seed = 0) -> str:
    """Upper case, with spaces between characters (those that were spaces included). Nothing is drawn.

    >>> antspeak("an ant")
    'A N   A N T'
    """
    return " ".join(text.upper())


def drop(text: str, seed: Seed = 0) -> str:
    """A tenth of the characters is missing.

    >>> drop("he goes on and on, and on", seed=1)
    'he goes  an on, d on'
    """
    chance = Random(seed)
    return "".join(character for character in text if chance.random() >= DROPPED)


def random_case(text: str, seed: Seed = 0) -> str:
    """Half of the characters in upper case, the others in lower case.

    >>> random_case("he goes on", seed=1)
    'He GOEs ON'
    """
    chance = Random(seed)
    return "".join(character.upper() if chance.random() < UPPER else character.lower() for character in text)


def repeat(text: str, seed: Seed = 0) -> str:
    """A fifth of the characters stands two to four times in a row.

    >>> repeat("he goes on", seed=1)
    'hhe goess on'
    """
    chance = Random(seed)
    return "".join(
        character * (chance.randint(2, MOST_IN_A_ROW) if chance.random() < REPEATED else 1) for character in text
    )


def upper_case(text: str, seed: Seed = 0) -> str:
    """All of it in upper case. Nothing is drawn.

    >>> upper_case("he goes on")
    'HE GOES ON'
    """
    return text.upper()


NOISES: dict[str, Noise] = {
    "antspeak": antspeak,
    "drop": drop,
    "random_case": random_case,
    "repeat": repeat,
    "upper_case": upper_case,
}
