"""The default renderer: HarfBuzz shapes and rasterises, the same pixels on every machine."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import regex
from numpy.typing import NDArray

from datamodules.rendering import bidi
from datamodules.rendering.base import MARGIN, Line, Pixels, Renderer
from datamodules.rendering.fonts import FontChain, resolve, sha256
from datamodules.rendering.raster import Rasteriser
from datamodules.rendering.shaping import shape

LAYOUT = "1"
"""Version of what this file does with glyphs; part of the fingerprint."""
CACHED = 1 << 16
"""Drawn words that are kept."""
LONGEST = 256
"""Characters of a word that are shaped at once, so that a text without blanks has no unbounded cost."""
CHUNK = 4096
"""Characters of a long text that are looked at together."""

# Scripts without blanks whose characters are shaped by themselves: each is placed where the one before ends, to a
# quarter of a pixel. All other words begin on a whole pixel.
_LOOSE = "\u0e01-\u0e30\u0e32\u0e3f-\u0e46\u0e4f-\u0eb0\u0eb2\u0ebd-\u0ec6\u0ed0-\u0eff"  # Thai and Lao without marks
_LOOSE += "\u2e80-\u3029\u3030-\u3098\u309b-\u312f\u3190-\ua4cf\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff"  # CJK
_MARKS = (
    "\u0300-\u036f\u0e31\u0e33-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb3-\u0ebc\u0ec8-\u0ece\u200c\u200d\u302a-\u302f\u3099\u309a"
)
_MARKS += "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_LOOSE_UNIT = re.compile(f"[{_LOOSE}]")
_UNITS = re.compile(f"[{_LOOSE}][{_MARKS}]* ?|[^ {_LOOSE}]+ ?| +")
_WORDS = re.compile("[^ ]+ ?| +")


class Piece(NamedTuple):
    """A drawn unit: a word with the blank behind it, or one character of a script without blanks.

    Attributes:
        ink: its columns one after the other, as bytes.
        columns: how many.
        left: pixel of the first one, from the place of the unit.
        advance: to the next unit in 1/64 pixel; whole pixels, unless it is loose.
        loose: whether it need not begin on a whole pixel.
    """

    ink: bytes
    columns: int
    left: int
    advance: int
    loose: bool


class Pieces(dict[str, Piece]):
    """Drawn units of one direction and phase, which are drawn when they are first asked for.

    Args:
        draw: function from a text to its piece.
        limit: number of pieces that are kept; 0 keeps none.
    """

    def __init__(self, draw: Callable[[str], Piece], limit: int) -> None:
        super().__init__()
        self.draw, self.limit = draw, limit

    def __missing__(self, text: str) -> Piece:
        piece = self.draw(text)
        if len(self) >= self.limit:
            self.clear()
        if self.limit:
            self[text] = piece
        return piece


class Layout(NamedTuple):
    """Units side by side.

    Attributes:
        pieces: from left to right.
        places: pixel at which each unit stands.
        width: of all in whole pixels.
    """

    pieces: list[Piece]
    places: NDArray[np.int64]
    width: int


RTLOrder: TypeAlias = Literal["visual", "logical"]
Units: TypeAlias = tuple[list[str], int, bool]
"""Units from left to right, the first character of the text they were cut from, and whether it is right to left."""

_INK, _COLUMNS, _LEFT, _ADVANCE, _IS_LOOSE = map(itemgetter, range(5))


def _split(text: str, rtl: bool = False) -> list[str]:
    """Cut a text of one direction into units, in its own order."""
    pattern = _UNITS if not rtl and _LOOSE_UNIT.search(text) else _WORDS
    units = pattern.findall(text)
    if len(text) > LONGEST and max(map(len, units)) > LONGEST:
        return [part for unit in units for part in _parts(unit)]
    return units


def _parts(word: str) -> Iterator[str]:
    """Cut a word that is too long to be shaped at once between characters."""
    while len(word) > LONGEST:
        cut = max((match.start() for match in regex.finditer(r"\X", word[: LONGEST + 1])), default=0) or LONGEST
        yield word[:cut]
        word = word[cut:]
    yield word


class TextRenderer(Renderer):
    """Draws text of any script with HarfBuzz: shaping, reading order (UAX #9), fallback fonts, emoji.

    The baseline is fixed for the whole strip. Words begin on whole pixels, so that a word looks alike wherever it
    stands; characters of Chinese, Japanese, Thai and Lao, which have no blanks, to a quarter of a pixel. Drawn words
    are remembered.

    Papers: https://arxiv.org/abs/2207.06991 (strips), https://arxiv.org/abs/2311.00522 (modes).

    Args:
        max_seq_length: S, patches of a strip.
        patch_size: p, side of a patch and height of the strip in pixels.
        font_size: in points.
        dpi: dots per inch; `font_size * dpi / 72` pixels per em.
        mode: `continuous` is ordinary text; `words` begins every word with a patch; `mono` gives every character cells
            of half a patch, two for wide ones; `bigrams` draws two characters of a word per patch, narrowed if need be.
        colour: `gray`; `rgb` keeps the colours of emoji; `binary` has only black (grey up to 127) and white.
        fonts: font files in the order they are tried, and names of sets; `noto` is that of the `fonts` extra. None
            takes the environment variable `LIT_FONTS`, or else DejaVu Sans.
        direction: of the paragraph; `auto` follows the first strong character.
        rtl_order: `visual` is what a reader sees; `logical` begins every run of one direction with a patch and orders
            runs, and the patches of right-to-left runs, so that a model reads in the order of the text.
        truncation: see `Renderer`.
        fit: make letters smaller where the font's ascent and descent exceed the strip.
        cache: remember drawn words; the pixels are the same.
        on_missing: for characters that no font has, `warn` once per script and draw boxes, or `raise`.

    Raises:
        ValueError: if a number is too small or a font cannot be found.
    """

    def __init__(
        self,
        max_seq_length: int = 1024,
        patch_size: int = 16,
        font_size: float = 8.0,
        dpi: int = 120,
        mode: Literal["continuous", "words", "mono", "bigrams"] = "continuous",
        colour: Literal["gray", "rgb", "binary"] = "gray",
        fonts: list[str] | None = None,
        direction: bidi.Direction = "auto",
        rtl_order: RTLOrder = "visual",
        truncation: Literal["longest_first", "official"] = "longest_first",
        fit: bool = False,
        cache: bool = True,
        on_missing: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__(max_seq_length, patch_size, 3 if colour == "rgb" else 1, truncation)
        if font_size <= 0 or dpi <= 0:
            raise ValueError(f"renderer.font_size and renderer.dpi must be positive, got {font_size} and {dpi}")
        self.font_size, self.dpi, self.mode, self.colour = font_size, dpi, mode, colour
        self.direction, self.rtl_order, self.fit, self.cache = direction, rtl_order, fit, cache
        self.on_missing = on_missing
        self.fonts = resolve(fonts, monospaced=mode == "mono")
        self._load()

    def _load(self) -> None:
        ppem = self.font_size * self.dpi / 72
        self.chain = FontChain(self.fonts, ppem, self.on_missing)
        ascent, descent = self.chain.extents()
        if self.fit and ascent + descent > self.height:
            self.chain = FontChain(self.fonts, ppem * self.height / (ascent + descent), self.on_missing)
            ascent, descent = self.chain.extents()
        self.baseline = round((self.height - (ascent + descent)) / 2 + ascent)
        self._rasteriser = Rasteriser(self.chain, self.height, self.baseline, self.channels)
        limit = CACHED if self.cache else 0
        self._pieces = [
            [Pieces(partial(self._piece, rtl=rtl, phase=phase), limit) for phase in (0, 16, 32, 48)]
            for rtl in (False, True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Configuration alone: fonts and drawn words are loaded anew in another process."""
        return {key: value for key, value in self.__dict__.items() if key not in ("chain", "_rasteriser", "_pieces")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def fingerprint(self) -> dict[str, str]:
        """Backend, versions, fonts and settings that the pixels depend on."""
        import uharfbuzz as hb

        settings = ("patch_size", "font_size", "dpi", "mode", "colour", "direction", "rtl_order", "truncation", "fit")
        return {
            "backend": "harfbuzz",
            "layout": LAYOUT,
            "harfbuzz": hb.version_string(),
            "python-bidi": version("python-bidi"),
            "fonts": " ".join(f"{Path(path).name}:{sha256(path)}" for path in self.fonts),
        } | {name: str(getattr(self, name)) for name in settings}

    # -- lines -------------------------------------------------------------------------------------------------------

    def line(self, text: str, limit: int, offsets: bool = False) -> Line:
        """Draw a text in the renderer's mode.

        Args:
            text: without control characters.
            limit: pixels that can be seen.
            offsets: also give the boxes of the characters.
        """
        if len(text) > CHUNK:
            text = self._visible(text, limit)
        if self.mode != "continuous":
            return self._cells(text, limit, offsets)
        if self.rtl_order == "logical" and bidi.has_rtl(text):
            return self._logical(text, offsets)
        units = self._visual(text)
        layout = self._layout(units)
        if layout.width + 2 * MARGIN > limit and bidi.has_rtl(text) and bidi.base_level(text, self.direction) == 1:
            units = self._visual(self.prefix(text, limit))  # else the cut would take away what is read first
            layout = self._layout(units)
        boxes = self._boxes(units, layout, MARGIN) if offsets else ()
        return Line(self._finish(self._compose(layout)), MARGIN + layout.width + MARGIN, boxes)

    def _end(self, text: str) -> int:
        if self.mode != "continuous" or (self.rtl_order == "logical" and bidi.has_rtl(text)):
            return super()._end(text)
        return self._layout(self._visual(text)).width + 2 * MARGIN  # nothing need be put together

    def word(self, text: str, last: bool) -> tuple[Pixels, int]:
        """Draw a word of a list.

        Args:
            text: the word.
            last: whether no blank follows.
        """
        layout = self._layout(self._visual(text if last else f"{text} "))
        return self._finish(self._compose(layout))[MARGIN:], layout.width

    def _visible(self, text: str, limit: int) -> str:
        """A beginning of a long text, cut behind a blank, that is at least as wide as what can be seen.

        Measured as ordinary text from left to right, which is less than twice as wide as any other way to draw it.
        """
        end, width = 0, 0
        while end < len(text) and width <= 2 * limit:
            start, end = end, min(len(text), end + CHUNK)
            blank = text.find(" ", end, end + CHUNK)
            end = end if blank < 0 else blank + 1
            width += self._layout([(_split(text[start:end]), start, False)]).width
        return text[:end]

    def _visual(self, text: str) -> list[Units]:
        """Units from left to right as a reader sees them."""
        if not bidi.has_rtl(text) and self.direction != "rtl":
            return [(_split(text), 0, False)]
        order: list[Units] = []
        for run in bidi.visual_order(bidi.runs(text, self.direction)):
            rtl = run.level % 2 == 1
            units = _split(text[run.start : run.end], rtl)
            order.append((units[::-1] if rtl else units, run.start, rtl))
        return order

    # -- units to ink ------------------------------------------------------------------------------------------------

    def _layout(self, groups: list[Units]) -> Layout:
        """Draw units side by side."""
        if len(groups) == 1 and not groups[0][2]:
            pieces = list(map(self._pieces[0][0].__getitem__, groups[0][0]))
            if not any(map(_IS_LOOSE, pieces)):  # the usual case: every piece has whole pixels
                ends = np.cumsum(np.fromiter(map(_ADVANCE, pieces), np.int64, len(pieces))) >> 6
                width = int(ends[-1]) if pieces else 0
                return Layout(pieces, np.concatenate([ends[:0], [0], ends[:-1]]) if pieces else ends, width)
        pieces, places = [], []
        x = 0  # in 1/64 pixel
        for units, _, rtl in groups:
            whole, *phases = self._pieces[rtl]
            for unit in units:
                piece = whole[unit]
                if not piece.loose:
                    x = (x + 32) & -64
                elif x & 48:
                    piece = phases[(x & 48) // 16 - 1][unit]
                pieces.append(piece)
                places.append(x >> 6)
                x += piece.advance
        return Layout(pieces, np.array(places, np.int64), -(-x // 64))

    def _piece(self, text: str, rtl: bool, phase: int) -> Piece:
        glyphs, advance = shape(self.chain, text, rtl)
        ink, left = self._rasteriser.draw(glyphs, phase)
        loose = not rtl and _LOOSE_UNIT.match(text) is not None
        return Piece(ink.tobytes(), len(ink), left, advance if loose else (advance + 32) & -64, loose)

    def _compose(self, layout: Layout) -> Pixels:
        """Put pieces on one canvas, where ink overlaps the darker.

        Returns:
            Columns (MARGIN + width + MARGIN, H*C) of ink; what sticks out further is cut.
        """
        size = self.height * self.channels
        total = layout.width + 2 * MARGIN
        canvas = np.zeros((total, size), np.uint8)
        number = len(layout.pieces)
        counts = np.fromiter(map(_COLUMNS, layout.pieces), np.int64, number)
        starts = layout.places + np.fromiter(map(_LEFT, layout.pieces), np.int64, number) + MARGIN
        # Neighbours may overlap, every second piece hardly ever does: two writes instead of one per piece.
        for parity in (0, 1):
            data = np.frombuffer(b"".join(map(_INK, layout.pieces[parity::2])), np.uint8).reshape(-1, size)
            count, start = counts[parity::2], starts[parity::2]
            if not len(data):
                continue
            ends = np.cumsum(count)
            columns = np.arange(ends[-1]) + np.repeat(start - ends + count, count)
            if columns[0] < 0 or columns[-1] >= total or bool((columns[1:] <= columns[:-1]).any()):
                inside = (columns >= 0) & (columns < total)
                np.maximum.at(canvas, columns[inside], data[inside])
            elif parity:
                canvas[columns] = np.maximum(canvas[columns], data)
            else:
                canvas[columns] = data
        return canvas

    def _finish(self, ink: Pixels) -> Pixels:
        if self.colour == "binary":
            ink = np.where(ink < 128, 0, 255).astype(np.uint8)
        return ink if self.channels == 1 else ink.reshape(len(ink), self.height, self.channels)

    def _boxes(self, groups: list[Units], layout: Layout, shift: int) -> list[tuple[float, float, int, int]]:
        """Boxes of the clusters of all units."""
        boxes = []
        places = iter(layout.places.tolist())
        for units, start, rtl in groups:
            firsts = np.cumsum([0, *map(len, units[::-1] if rtl else units)])[:-1].tolist()
            for unit, first in zip(units, reversed(firsts) if rtl else firsts, strict=True):
                x = shift + next(places)
                for left, right, begin, end in self._clusters(unit, rtl):
                    boxes.append((x + left, x + right, start + first + begin, start + first + end))
        return boxes

    def _clusters(self, text: str, rtl: bool) -> list[tuple[float, float, int, int]]:
        """Left and right pixel, first and last character of every cluster of a unit."""
        glyphs, _ = shape(self.chain, text, rtl)
        firsts = sorted({glyph.cluster for glyph in glyphs})
        ends = dict(zip(firsts, [*firsts[1:], len(text)], strict=True))
        spans: dict[int, tuple[float, float]] = {}
        x = 0.0
        for glyph in glyphs:
            low, high = spans.get(glyph.cluster, (x, x))
            spans[glyph.cluster] = (min(low, x), max(high, x + glyph.advance / 64))
            x += glyph.advance / 64
        return [(low, high, first, ends[first]) for first, (low, high) in spans.items()]

    # -- structured modes --------------------------------------------------------------------------------------------

    def _logical(self, text: str, offsets: bool) -> Line:
        """Runs in the order of the text, each from the beginning of a patch, right-to-left ones patch by patch."""
        patch = self.patch_size
        parts: list[Pixels] = []
        boxes: list[tuple[float, float, int, int]] = []
        begin = 0
        for run in bidi.runs(text, self.direction):
            rtl = run.level % 2 == 1
            units = _split(text[run.start : run.end], rtl)
            groups = [(units[::-1] if rtl else units, run.start, rtl)]
            layout = self._layout(groups)
            columns = patch * math.ceil((layout.width + 2 * MARGIN) / patch)
            part = np.zeros((columns, self.height * self.channels), np.uint8)
            ink = self._compose(layout)
            shift = columns - len(ink) if rtl else 0
            part[shift : shift + len(ink)] = ink
            found = self._boxes(groups, layout, shift + MARGIN) if offsets else []
            if rtl:
                part = part.reshape(columns // patch, patch, -1)[::-1].reshape(columns, -1)
                found = [box for wide in found for box in self._turned(wide, columns)]
            boxes.extend((begin + left, begin + right, first, last) for left, right, first, last in found)
            parts.append(part)
            begin += columns
        ink = np.concatenate(parts) if parts else np.zeros((0, self.height * self.channels), np.uint8)
        return Line(self._finish(ink), max(begin, 2 * MARGIN), boxes)

    def _turned(self, box: tuple[float, float, int, int], columns: int) -> Iterator[tuple[float, float, int, int]]:
        """The parts of a box after the order of the patches is turned round."""
        left, right, first, last = box
        patch = self.patch_size
        for number in range(int(left // patch), max(int(left // patch), math.ceil(right / patch) - 1) + 1):
            begin = columns - patch * (number + 1)
            low, high = max(left, number * patch), min(right, (number + 1) * patch)
            yield begin + low - number * patch, begin + high - number * patch, first, last

    def _cells(self, text: str, limit: int, offsets: bool) -> Line:
        """Modes that give words or characters cells of their own."""
        step = self.patch_size if self.mode != "mono" else self.patch_size // 2
        if self.rtl_order == "visual" and bidi.has_rtl(text) and bidi.base_level(text, self.direction) == 1:
            text = self._first_cells(text, limit, step)  # else the cut would take away what is read first
        parts: list[tuple[Pixels, int]] = []
        boxes: list[tuple[float, float, int, int]] = []
        x = MARGIN if self.mode == "words" else 0
        for ink, width, first, last in self._blocks(text, self.rtl_order):
            parts.append((ink, x))
            boxes.append((x, x + width, first, last))
            x = step * math.ceil((x + width) / step)
            if x > limit:
                break
        end = x if self.mode != "words" or not boxes else math.ceil(boxes[-1][1]) + MARGIN
        canvas = np.zeros((max(x, end), self.height * self.channels), np.uint8)
        for ink, place in parts:
            spot = canvas[place : place + len(ink)]
            np.maximum(spot, ink[: len(spot)], out=spot)
        return Line(self._finish(canvas), max(end, 2 * MARGIN), boxes if offsets else ())

    def _first_cells(self, text: str, limit: int, step: int) -> str:
        """The beginning of a text whose cells fit."""
        x = MARGIN if self.mode == "words" else 0
        for _, width, first, _ in self._blocks(text, "logical"):
            x = step * math.ceil((x + width) / step)
            if x > limit:
                return text[:first]
        return text

    def _blocks(self, text: str, order: RTLOrder) -> Iterator[tuple[Pixels, float, int, int]]:
        """Ink, width in pixels, and characters of the cells in an order."""
        words = self._words(text, order)
        for number, (word, start, rtl) in enumerate(words):
            last = number == len(words) - 1
            if self.mode == "words":
                layout = self._layout([([word if last else f"{word} "], start, rtl)])
                yield self._compose(layout)[MARGIN:], layout.width, start, start + len(word)
                continue
            borders = [match.span() for match in regex.finditer(r"\X", word)]
            size = 2 if self.mode == "bigrams" else 1
            groups = [borders[k : k + size] for k in range(0, len(borders), size)]
            turned = rtl and order == "visual"
            for group in reversed(groups) if turned else groups:
                yield self._cell(word, group[0][0], group[-1][1], rtl, start)
            if not last and self.mode == "mono":
                end = start + len(word)
                space = end if text[end : end + 1] == " " else max(0, start - 1)  # the one before, from right to left
                empty = np.zeros((0, self.height * self.channels), np.uint8)
                yield empty, self.patch_size / 2, space, space + 1

    def _words(self, text: str, order: RTLOrder) -> list[tuple[str, int, bool]]:
        """Words with their first character and direction, in an order."""
        runs = [bidi.Run(0, len(text), 0)]
        if bidi.has_rtl(text) or self.direction == "rtl":
            runs = bidi.runs(text, self.direction)
        words: list[tuple[str, int, bool]] = []
        for start, end, level in bidi.visual_order(runs) if order == "visual" else runs:
            rtl = level % 2 == 1
            found = [(match.group(), start + match.start(), rtl) for match in re.finditer("[^ ]+", text[start:end])]
            words.extend(reversed(found) if rtl and order == "visual" else found)
        return words

    def _cell(self, word: str, first: int, last: int, rtl: bool, start: int) -> tuple[Pixels, float, int, int]:
        """Characters of a word, shaped as they are within it, at the left of their cell."""
        glyphs, advance = shape(self.chain, word, rtl, first, last)
        ink, left = self._rasteriser.draw(glyphs)
        ink = ink.reshape(len(ink), self.height * self.channels)
        shift = max(0, left)
        if left < 0:  # the cell begins where the ink does
            advance -= 64 * left
        ink = np.concatenate([np.zeros((shift, ink.shape[1]), np.uint8), ink])
        cell = self.patch_size // 2
        if self.mode == "mono":
            return ink, cell * max(1, math.ceil(advance / 64 / cell - 0.1)), start + first, start + last
        if len(ink) > self.patch_size:
            from PIL import Image

            ink = np.asarray(Image.fromarray(ink).resize((ink.shape[1], self.patch_size), Image.Resampling.BOX))
        return ink, self.patch_size, start + first, start + last
