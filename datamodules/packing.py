"""Long documents to strips: what goes onto one strip, and several short documents onto one strip.

Nothing here depends on how text is drawn; all lengths come from the renderer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import ArrayLike, NDArray

from datamodules.rendering.base import MARGIN, Renderer, clean

_SENTENCE_END = regex.compile(r"(?<=[.!?…。！？؟।]['\"”’»)\]]*)\s+")


class Block(NamedTuple):
    """Text of one strip.

    Attributes:
        text: the text.
        patches: attended patches of its strip, separator included; 0 if it was not measured.
    """

    text: str
    patches: int


def split_lines(document: str) -> list[str]:
    """Lines of a document, without blanks at their ends and without empty ones."""
    return [line for part in document.splitlines() if (line := clean(part).strip())]


def split_sentences(line: str) -> list[str]:
    """Sentences of a line: it is cut at blanks behind `.`, `!`, `?` and their like, closing quotes included."""
    return [sentence for sentence in _SENTENCE_END.split(line) if sentence]


def greedy_starts(sizes: ArrayLike, capacity: int, gap: int = 0) -> NDArray[np.int64]:
    """Divide a sequence into groups: each takes items until the next one would not fit.

    Args:
        sizes: (n,) sizes of the items, >= 0; one above the capacity is a group of its own.
        capacity: most that a group may hold.
        gap: what lies between two items of a group.

    Returns:
        First item of every group, and n at the end.
    """
    ends = _ends(sizes, gap)
    starts = [0]
    while starts[-1] < ends.size - 1:
        starts.append(_stop(ends, starts[-1], capacity + gap))
    return np.array(starts, dtype=np.int64)


def document_ids(patches: Sequence[int]) -> NDArray[np.int64]:
    """Number of the document at every patch of a packed strip.

    Args:
        patches: attended patches of the documents, separators included.

    Returns:
        (sum of `patches`,) 0 at the patches of the first document, 1 at those of the second, and so on.
    """
    return np.repeat(np.arange(len(patches)), patches)


def cut_word(word: str, renderer: Renderer, limit: int) -> list[str]:
    """Cut a text without blanks at the borders of characters (grapheme clusters).

    Args:
        word: the text.
        renderer: tells widths.
        limit: most pixels of a piece; a single character may be wider.

    Returns:
        The pieces; together they are the text, and all but the last one are as long as they can be.
    """
    pieces = []
    while word:
        window = 64  # grows until it is too wide, so that a long text is not measured again for every piece
        while window < len(word) and renderer.width(word[:window]) <= limit:
            window *= 2
        if window >= len(word) and renderer.width(word) <= limit:
            pieces.append(word)
            break
        first = regex.match(r"\X", word)
        piece = renderer.prefix(word[:window], limit + 2 * MARGIN) or (first.group() if first else word)
        pieces.append(piece)
        word = word[len(piece) :]
    return pieces


class BlockBuilder:
    """Documents to blocks, each the text of one strip.

    The recipe of PIXEL (xplip/pixel, scripts/data/prerendering): the lines of a document are added to a block while
    their widths stay below p*S - 2p, joined with one space; then a new block begins. No block holds text of two
    documents. Beyond the recipe, the spaces count, so nothing is cut off; and a line that is too long is divided into
    sentences, a sentence into words, a word into characters.

    Args:
        renderer: tells widths.
        split_long: divide documents that are longer than a strip; otherwise each is one block, which drawing cuts.
        measure: give the number of patches of every block even where it is not needed to divide.
    """

    def __init__(self, renderer: Renderer, split_long: bool = True, measure: bool = True) -> None:
        self.renderer, self.split_long, self.measure = renderer, split_long, measure
        self.limit = renderer.patch_size * (renderer.max_seq_length - 2) - 1
        self.gap = max(0, renderer.width("n n") - 2 * renderer.width("n"))

    def blocks(self, document: str) -> list[Block]:
        """Blocks of one document.

        Args:
            document: its text; lines are joined with one space.

        Returns:
            The blocks; none for a document without visible text.
        """
        lines = split_lines(document)
        if not lines:
            return []
        if not self.split_long:
            text = " ".join(lines)
            return [self._block(text, self.renderer.width(text)) if self.measure else Block(text, 0)]
        units = [unit for line in lines for unit in self._units(line, 0)]
        texts, widths = [text for text, _ in units], [width for _, width in units]
        ends = _ends(widths, self.gap)
        found = []
        start = 0
        while start < len(units):
            stop = _stop(ends, start, self.limit + self.gap)
            text, width = texts[start], widths[start]
            # Joined text is not exactly as wide as the sum (kerning, words on patch borders): what is too much goes on.
            while stop > start + 1:
                text = " ".join(texts[start:stop])
                if (width := self.renderer.width(text)) <= self.limit:
                    break
                stop -= 1
                text, width = texts[start], widths[start]
            found.append(self._block(text, width))
            start = stop
        return found

    def _units(self, text: str, level: int) -> list[tuple[str, int]]:
        """Parts of a text that fit, with their widths; level 0 is a line, 1 a sentence, 2 a word."""
        width = self.renderer.width(text)
        if width <= self.limit:
            return [(text, width)]
        if level == 2:
            return [(piece, self.renderer.width(piece)) for piece in cut_word(text, self.renderer, self.limit)]
        parts = split_sentences(text) if level == 0 else text.split()
        if level == 0 and len(parts) == 1:
            parts, level = text.split(), 1
        return [unit for part in parts for unit in self._units(part, level + 1)]

    def _block(self, text: str, width: int) -> Block:
        patches = -(-(width + 2 * MARGIN) // self.renderer.patch_size) + 1
        return Block(text, min(patches, self.renderer.max_seq_length))


def _ends(sizes: ArrayLike, gap: int) -> NDArray[np.int64]:
    """Running sums of sizes with a gap behind each, from 0."""
    array = np.asarray(sizes, dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(array + gap)])


def _stop(ends: NDArray[np.int64], start: int, room: int) -> int:
    """Item behind the last one that fits into the room, at least one."""
    return max(start + 1, int(np.searchsorted(ends, ends[start] + room, side="right")) - 1)
