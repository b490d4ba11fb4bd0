"""Spelling noise that people read through: accents, homoglyphs, digits for letters, typing errors.

Made to measure how much a model loses on noisy copies of the texts it was tested on. Every noise is plain data with
one rate, and draws from the generator it is given, so that a copy can be made again.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Noise(ABC):
    """Change of a text, letter by letter.

    Args:
        rate: probability in [0, 1] that a letter is changed.

    Raises:
        ValueError: if the rate is no probability.
    """

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate: {self.rate} of {type(self).__name__} must be a probability, from 0 to 1")

    @abstractmethod
    def __call__(self, text: str, rng: random.Random) -> str:
        """Make a noisy copy.

        Args:
            text: any text.
            rng: generator of all draws; in the same state it gives the same copy.

        Returns:
            The copy.
        """


class Substitution(Noise):
    """Noise that puts one of several forms in the place of a letter; other characters stay as they are.

    Args:
        rate: probability in [0, 1] that a letter which has other forms is changed.
    """

    forms: ClassVar[Mapping[str, str]] = {}
    """Letter -> the characters that may stand for it."""
    _letters: ClassVar[re.Pattern[str]]

    def __init_subclass__(cls) -> None:
        cls._letters = re.compile(f"[{''.join(cls.forms)}]")

    def __call__(self, text: str, rng: random.Random) -> str:
        """Make a noisy copy, of the same length.

        Args:
            text: any text.
            rng: generator of all draws.

        Returns:
            The copy.
        """

        def change(letter: re.Match[str]) -> str:
            return rng.choice(self.forms[letter[0]]) if rng.random() < self.rate else letter[0]

        return self._letters.sub(change, text)


class LookAlikes(Substitution):
    """Accented forms of the letters a e i o u c n y s l z A E O, as in visual attacks on text classifiers.

    After the visual perturber of Eger et al. (https://arxiv.org/abs/1903.11508), in its mildest form: marks above,
    below and through the letter, all in the range of Latin fonts.

    Args:
        rate: probability in [0, 1] that one of these letters is changed.
    """

    forms: ClassVar[Mapping[str, str]] = {
        "a": "àáâãäåā",
        "e": "èéêëēě",
        "i": "ìíîïī",
        "o": "òóôõöō",
        "u": "ùúûüūů",
        "c": "çćĉč",
        "n": "ñńňņ",
        "y": "ýÿŷ",
        "s": "śŝšş",
        "l": "ĺľłļ",
        "z": "źżž",
        "A": "ÀÁÂÃÄÅ",
        "E": "ÈÉÊË",
        "O": "ÒÓÔÕÖ",
    }


class Confusables(Substitution):
    """Cyrillic and Greek letters that look like Latin ones.

    The pairs are among those of Unicode's table of confusable characters (https://www.unicode.org/reports/tr39/). In
    most fonts they draw the same ink, so a reader of pixels hardly notices, while a tokenizer meets unknown words.

    Args:
        rate: probability in [0, 1] that a letter which has such a twin is changed.
    """

    forms: ClassVar[Mapping[str, str]] = {  # escaped, since an editor would show both sides alike
        "a": "\u0430",
        "c": "\u0441",
        "d": "\u0501",
        "e": "\u0435",
        "h": "\u04bb",
        "i": "\u0456",
        "j": "\u0458",
        "o": "\u043e\u03bf",
        "p": "\u0440\u03c1",
        "s": "\u0455",
        "u": "\u03c5",
        "v": "\u03bd",
        "x": "\u0445",
        "y": "\u0443",
        "A": "\u0410\u0391",
        "B": "\u0412\u0392",
        "C": "\u0421",
        "E": "\u0415\u0395",
        "H": "\u041d\u0397",
        "I": "\u0406\u0399",
        "J": "\u0408",
        "K": "\u041a\u039a",
        "M": "\u041c\u039c",
        "N": "\u039d",
        "O": "\u041e\u039f",
        "P": "\u0420\u03a1",
        "S": "\u0405",
        "T": "\u0422\u03a4",
        "X": "\u0425\u03a7",
        "Y": "\u03a5",
        "Z": "\u0396",
    }


class Leet(Substitution):
    """Digits and signs that stand for letters, as in "l33t".

    The customary signs of one character only, so that the length of a text stays.

    Args:
        rate: probability in [0, 1] that a letter which has such a sign is changed.
    """

    forms: ClassVar[Mapping[str, str]] = {
        letter: signs
        for pair, signs in {
            "aA": "4@",
            "bB": "8",
            "eE": "3",
            "gG": "9",
            "iI": "1!",
            "lL": "1",
            "oO": "0",
            "sS": "5$",
            "tT": "7+",
            "zZ": "2",
        }.items()
        for letter in pair
    }


def _neighbours() -> dict[str, str]:
    """Letters of a QWERTY keyboard and those that touch them, from where the keys lie, in widths of a key."""
    rows = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
    places = {key: (left + column, row) for row, (keys, left) in enumerate(rows) for column, key in enumerate(keys)}

    def touch(one: str, two: str) -> bool:
        (x, row), (other_x, other_row) = places[one], places[two]
        return one != two and abs(row - other_row) <= 1 and abs(x - other_x) <= (1 if row == other_row else 0.75)

    return {key: "".join(other for other in places if touch(key, other)) for key in places}


class Typos(Noise):
    """Typing errors.

    A letter that is hit is swapped with the character after it, left out, typed twice or replaced by a neighbour on a
    QWERTY keyboard in the same case, a quarter each. Letters outside a-z have no neighbour and share the other three.
    A character that was swapped forward is not hit again, and the last one of a text has nothing to be swapped with.

    The four kinds are those of Belinkov and Bisk's study of noise (https://arxiv.org/abs/1711.02173) and of keyboard
    typos elsewhere.

    Args:
        rate: probability in [0, 1] that a letter is hit.
    """

    neighbours: ClassVar[Mapping[str, str]] = _neighbours()
    """Lower-case letter -> the letters around its key."""

    def __call__(self, text: str, rng: random.Random) -> str:
        """Make a noisy copy.

        Args:
            text: any text.
            rng: generator of all draws.

        Returns:
            The copy.
        """
        pieces: list[str] = []
        done = 0  # characters of the text that are in the copy, changed or not
        for place, letter in enumerate(text):
            if place < done or not letter.isalpha() or rng.random() >= self.rate:
                continue
            pieces.append(text[done:place])
            done = place + 1
            around = self.neighbours.get(letter.lower(), "")
            kind = rng.randrange(4 if around else 3)
            if kind == 0:
                pieces.append(text[place + 1 : place + 2] + letter)
                done = place + 2
            elif kind == 1:
                continue
            elif kind == 2:
                pieces.append(2 * letter)
            else:
                other = rng.choice(around)
                pieces.append(other if letter.islower() else other.upper())
        return "".join([*pieces, text[done:]])
