"""Reading order: embedding levels and visual order of text (UAX #9), fast for long right-to-left texts."""

import re
import unicodedata
from typing import Literal, NamedTuple

Direction = Literal["auto", "ltr", "rtl"]

# Blocks of right-to-left scripts, and the controls that turn the direction.
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\u200f\u202b\u202e\u2067\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
# Letters of one direction with nothing but neutral characters between them: all of it is one level.
_STRETCH = re.compile("[RA](?:[RAWNM]*[RA])?|L(?:[LWNM]*L)?")


class Run(NamedTuple):
    """Characters `start` to `end` of one embedding level; odd levels are read from right to left."""

    start: int
    end: int
    level: int


_LETTERS = {"L": "L", "R": "R", "AL": "A", "WS": "W", "ON": "N", "NSM": "M"}


class _Classes(dict[int, str]):
    """One letter per character for its bidirectional class, remembered."""

    def __missing__(self, code: int) -> str:
        letter = _LETTERS.get(unicodedata.bidirectional(chr(code)), "-")
        self[code] = letter
        return letter


_CLASSES = _Classes()


def has_rtl(text: str) -> bool:
    """Whether a text holds anything that may be read from right to left."""
    return _RIGHT_TO_LEFT.search(text) is not None


def base_level(text: str, direction: Direction = "auto") -> int:
    """Level of the paragraph: 0 from left to right, 1 from right to left.

    Args:
        text: the paragraph.
        direction: `auto` follows the first strong character.
    """
    from bidi.algorithm import get_base_level

    return int(get_base_level(text)) if direction == "auto" else int(direction == "rtl")


def embedding_levels(text: str, direction: Direction = "auto") -> list[int]:
    """Embedding level of every character (UAX #9, rules P2 to I2 and L1).

    The last letter of a stretch of one direction stands for all of it while the rules are applied, which changes
    nothing: neutral characters between letters take their direction (rules N1 and N2).

    Args:
        text: one paragraph.
        direction: of the paragraph.

    Returns:
        One level per character; characters that rule X9 removes take the level before them.
    """
    level = base_level(text, direction)
    if not has_rtl(text) and level == 0:
        return [0] * len(text)
    classes = text.translate(_CLASSES)
    kept: list[int] = []  # characters that stand for a stretch or for themselves
    place = 0
    for match in _STRETCH.finditer(classes):
        kept.extend(range(place, match.start()))
        kept.append(match.end() - 1)
        place = match.end()
    kept.extend(range(place, len(text)))
    levels = _resolve("".join(text[index] for index in kept), level)
    result: list[int] = []
    for index, value in zip(kept, levels, strict=True):
        result.extend([value] * (index + 1 - len(result)))
    blanks = len(text) - len(text.rstrip())
    if blanks:
        result[len(text) - blanks :] = [level] * blanks  # rule L1
    return result


def _resolve(text: str, level: int) -> list[int]:
    from bidi import algorithm

    storage = algorithm.get_empty_storage()
    storage["base_level"], storage["base_dir"] = level, ("L", "R")[level]
    algorithm.get_embedding_levels(text, storage)
    for index, char in enumerate(storage["chars"]):
        char["index"] = index
    algorithm.explicit_embed_and_overrides(storage)
    algorithm.resolve_weak_types(storage)
    algorithm.resolve_neutral_types(storage, False)
    algorithm.resolve_implicit_levels(storage, False)
    levels = {char["index"]: char["level"] for char in storage["chars"]}
    result: list[int] = []
    for index in range(len(text)):
        result.append(levels.get(index, result[-1] if result else level))
    return result


def runs(text: str, direction: Direction = "auto") -> list[Run]:
    """Stretches of equal level, in the order of the text.

    Args:
        text: one paragraph.
        direction: of the paragraph.
    """
    found: list[Run] = []
    start = 0
    levels = embedding_levels(text, direction)
    for index in range(1, len(levels) + 1):
        if index == len(levels) or levels[index] != levels[start]:
            found.append(Run(start, index, levels[start]))
            start = index
    return found


def visual_order(found: list[Run]) -> list[Run]:
    """Runs from left to right as a reader sees them (rule L2).

    Args:
        found: runs in the order of the text.
    """
    order = list(found)
    if not order:
        return order
    lowest_odd = min((run.level | 1 for run in order), default=1)
    for level in range(max(run.level for run in order), lowest_odd - 1, -1):
        start = 0
        while start < len(order):
            end = start
            while end < len(order) and order[end].level >= level:
                end += 1
            order[start:end] = reversed(order[start:end])
            start = max(end, start + 1)
    return order
