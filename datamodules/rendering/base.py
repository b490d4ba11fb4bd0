"""Geometry of strips, shared by all backends."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
Span: TypeAlias = tuple[int, int]

MARGIN = 2
"""Pixels left of a text, and at least between a text and its separator."""

_UNCLEAN = re.compile(r"[\x00-\x1f\ud800-\udfff]")
_CLEANING = {code: None for code in range(32)} | {ord(blank): " " for blank in "\n\r\t"}
_CLEANING |= {code: "\ufffd" for code in range(0xD800, 0xE000)}


def clean(text: str) -> str:
    """Text as it is drawn: line breaks and tabs are spaces, control characters vanish, lone surrogates are U+FFFD."""
    return text.translate(_CLEANING) if _UNCLEAN.search(text) else text


@dataclass(frozen=True)
class Strip:
    """One rendered text, pair or list of words.

    Attributes:
        pixel_values: (H, p*S) uint8, or (H, p*S, 3) in colour; ground 255, ink 0.
        num_text_patches: patches before the last separator, separators between texts included.
        sep_patches: indices of the black patches.
        word_starts: for lists of words, the patch each one begins at; the last entry is the separator.
        offset_mapping: for every patch the characters (start, end) drawn in it, (0, 0) where there are none; of a pair,
            those of the second text refer to that text.
        patch_size: p, side of a patch in pixels.
    """

    pixel_values: Pixels
    num_text_patches: int
    sep_patches: tuple[int, ...]
    word_starts: tuple[int, ...] | None = None
    offset_mapping: tuple[Span, ...] | None = None
    patch_size: int = 16

    @property
    def num_attended(self) -> int:
        """Patches that a model reads: those of the text and the last separator."""
        return min(self.num_text_patches + 1, self.pixel_values.shape[1] // self.patch_size)

    @property
    def trimmed(self) -> Pixels:
        """The attended part of the pixels."""
        return self.pixel_values[:, : self.patch_size * self.num_attended]


@dataclass(frozen=True)
class Line:
    """A drawn text without its separator.

    Attributes:
        ink: (n, H) or (n, H, 3) uint8, one row per column of pixels from the line's left end; 0 ground, 255 black.
        end: where the text ends in pixels, gap included; the separator follows in the next patch.
        boxes: (left pixel, right pixel, first character, last character + 1) of every cluster, if asked for.
    """

    ink: Pixels
    end: int
    boxes: Sequence[tuple[float, float, int, int]] = ()


class Renderer(ABC):
    """Draws texts on strips of `max_seq_length` patches.

    Args:
        max_seq_length: S, patches of a strip.
        patch_size: p, side of a patch and height of the strip in pixels.
        channels: 1 for grey strips, 3 for colour.
        truncation: what happens to pairs that do not fit. `longest_first` shortens the longer text, then both, at
            the borders of characters; `official` cuts behind the last patch, which loses the second text if the first
            one fills the strip, as the released code does.

    Raises:
        ValueError: if a number is too small.
    """

    def __init__(
        self,
        max_seq_length: int,
        patch_size: int,
        channels: int,
        truncation: Literal["longest_first", "official"] = "longest_first",
    ) -> None:
        if patch_size < 4:
            raise ValueError(f"renderer.patch_size: {patch_size} pixels cannot hold a letter; use at least 4")
        if max_seq_length < 4:
            raise ValueError(
                f"renderer.max_seq_length: {max_seq_length} patches cannot hold a pair of texts; use at least 4"
            )
        self.max_seq_length, self.patch_size, self.channels = max_seq_length, patch_size, channels
        self.truncation = truncation

    @property
    def height(self) -> int:
        """Height of the strips in pixels."""
        return self.patch_size

    @abstractmethod
    def line(self, text: str, limit: int, offsets: bool = False) -> Line:
        """Draw a text.

        Args:
            text: without control characters.
            limit: pixels that can be seen; what lies beyond need not be drawn.
            offsets: also give the boxes of the characters.

        Returns:
            The line.
        """

    @abstractmethod
    def word(self, text: str, last: bool) -> tuple[Pixels, int]:
        """Draw a word of a list.

        Args:
            text: the word.
            last: whether it is the last one, which has no space behind it.

        Returns:
            Ink (n, H) or (n, H, 3) from the word's left end, and its width in pixels.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What the pixels depend on; strips with equal fingerprints are drawn alike."""

    def clean(self, text: str) -> str:
        """Text as this backend draws it; see the function `clean`.

        Args:
            text: any text.
        """
        return clean(text)

    def width(self, text: str) -> int:
        """Pixels that a text takes, without margins.

        Args:
            text: any text.
        """
        return self._end(self.clean(text)) - 2 * MARGIN

    def prefix(self, text: str, limit: int) -> str:
        """The longest beginning of a text that ends within some pixels, at the border of a character.

        Args:
            text: without control characters.
            limit: pixels, margins included.
        """
        import regex

        borders = [match.end() for match in regex.finditer(r"\X", text[: 64 * max(limit, 1)])]
        low, high = 0, len(borders)  # so many characters fit; more than so many do not
        while low < high:
            middle = (low + high + 1) // 2
            if self._end(text[: borders[middle - 1]]) <= limit:
                low = middle
            else:
                high = middle - 1
        return text[: borders[low - 1]] if low else ""

    def render(self, text: str, offsets: bool = False) -> Strip:
        """Draw one text: a margin, the text, a black patch.

        Args:
            text: any text; an empty one gives a blank patch and the separator.
            offsets: also give the characters of each patch.

        Returns:
            The strip; a text that is too long is cut, with the separator on the last patch.

        Raises:
            TypeError: if it is no text.
        """
        canvas = self._blank()
        line = self._line(_text(text), self._limit, offsets)
        end = self._paint(canvas, line, 0)
        return self._strip(canvas, (end,), [(line, 0)] if offsets else None)

    def render_pair(self, first: str, second: str, offsets: bool = False) -> Strip:
        """Draw two texts, each followed by a black patch.

        Args:
            first: first text.
            second: second text.
            offsets: also give the characters of each patch.

        Returns:
            The strip; see `truncation` for pairs that are too long.

        Raises:
            TypeError: if one is no text.
        """
        first, second = _text(first), _text(second)
        if self.truncation == "longest_first":
            first, second = self._shorten(first, second)
        canvas = self._blank()
        left = self._line(first, self._limit, offsets)
        middle = self._paint(canvas, left, 0)
        start = middle + self.patch_size
        right = self._line(second, max(0, self._limit - start), offsets)
        end = self._paint(canvas, right, start)
        return self._strip(canvas, (middle, end), [(left, 0), (right, start)] if offsets else None)

    def render_words(self, words: Sequence[str]) -> Strip:
        """Draw words, each from the beginning of a patch, and a black patch.

        Args:
            words: at least one.

        Returns:
            The strip with `word_starts`; words behind the last patch are not drawn.

        Raises:
            ValueError: if there is no word.
        """
        if not words:
            raise ValueError("words: the list is empty; give at least one word")
        canvas = self._blank()
        x, starts = MARGIN, [0]
        for number, word in enumerate(words):
            last = number == len(words) - 1
            ink, width = self.word(self.clean(_text(word)), last)
            self._stamp(canvas, ink, x)
            x = self._next_patch(x + width + (MARGIN if last else 0))
            starts.append(x // self.patch_size)
            if x == self._limit:
                break
        return self._strip(canvas, (x,), None, tuple(starts))

    # -- geometry ----------------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        """Left edge of the last patch, which is kept for a separator."""
        return self.patch_size * (self.max_seq_length - 1)

    def _next_patch(self, x: int) -> int:
        return min(self.patch_size * math.ceil(x / self.patch_size), self._limit)

    def _blank(self) -> Pixels:
        shape = (self.height, self.patch_size * self.max_seq_length)
        return np.full(shape if self.channels == 1 else (*shape, self.channels), 255, np.uint8)

    def _end(self, text: str) -> int:
        """End of a line of this text, however long."""
        return self.line(text, 1 << 40).end

    def _line(self, text: str, limit: int, offsets: bool) -> Line:
        return self.line(self.clean(text), limit, offsets)

    def _paint(self, canvas: Pixels, line: Line, start: int) -> int:
        """Put a line at a pixel; where its separator begins."""
        self._stamp(canvas, line.ink, start)
        return self._next_patch(start + line.end)

    def _stamp(self, canvas: Pixels, ink: Pixels, x: int) -> None:
        ink = ink[: max(0, self._limit - x)]
        np.subtract(255, ink.swapaxes(0, 1), out=canvas[:, x : x + len(ink)])

    def _shorten(self, first: str, second: str) -> tuple[str, str]:
        """Shorten the longer text of a pair, or both, until they fit."""
        texts = [self.clean(first), self.clean(second)]
        room = self.max_seq_length - 2
        needed = [math.ceil(self.line(text, self._limit + 1).end / self.patch_size) for text in texts]
        if sum(needed) > room:
            shorter = min(*needed, room // 2)
            kept = [min(patches, room - shorter) if patches > shorter else patches for patches in needed]
            kept[1] = room - kept[0]  # both were long: what an odd number of patches leaves goes to the second
            texts = [
                text if patches >= wanted else self.prefix(text, patches * self.patch_size)
                for text, patches, wanted in zip(texts, kept, needed, strict=True)
            ]
        return texts[0], texts[1]

    def _strip(
        self,
        canvas: Pixels,
        separators: tuple[int, ...],
        lines: Sequence[tuple[Line, int]] | None,
        word_starts: tuple[int, ...] | None = None,
    ) -> Strip:
        for x in separators:
            canvas[:, x : x + self.patch_size] = 0
        patches = tuple(x // self.patch_size for x in separators)
        mapping = None if lines is None else self._offsets(lines, patches)
        return Strip(canvas, patches[-1], patches, word_starts, mapping, self.patch_size)

    def _offsets(self, lines: Sequence[tuple[Line, int]], separators: tuple[int, ...]) -> tuple[Span, ...]:
        spans: list[Span] = [(0, 0)] * self.max_seq_length
        for line, start in lines:
            for left, right, first, last in line.boxes:
                begin = int((start + left) // self.patch_size)
                end = max(begin, math.ceil((start + right) / self.patch_size) - 1)
                for patch in range(begin, min(end, self.max_seq_length - 1) + 1):
                    low, high = spans[patch]
                    spans[patch] = (first, last) if low == high else (min(low, first), max(high, last))
        for patch in separators:
            spans[patch] = (0, 0)
        return tuple(spans)


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: the renderer takes str, got {type(text).__name__}: {text!r:.40}")
    return text
