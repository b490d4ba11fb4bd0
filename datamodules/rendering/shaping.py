"""Characters to positioned glyphs with HarfBuzz."""

from typing import Any, NamedTuple

from datamodules.rendering.fonts import FontChain


class Glyph(NamedTuple):
    """A glyph at its place; lengths in 1/64 pixel.

    Attributes:
        font: number of the font in the chain.
        glyph: its number in the font.
        x: from the beginning of the text to the glyph's origin.
        y: above the baseline.
        cluster: first character it belongs to.
        advance: how far the next glyph begins.
    """

    font: int
    glyph: int
    x: int
    y: int
    cluster: int
    advance: int


def shape_run(font: Any, text: str, rtl: bool, start: int = 0, end: int | None = None) -> tuple[list[Any], list[Any]]:  # noqa: ANN401
    """Shape characters of one font and direction, seen together with those around them.

    Args:
        font: `uharfbuzz.Font`.
        text: the context.
        rtl: whether they are read from right to left.
        start: first character.
        end: character after the last one; None takes all.

    Returns:
        HarfBuzz's glyph infos and positions, from left to right.
    """
    import uharfbuzz as hb

    buffer = hb.Buffer()
    buffer.add_str(text, start, -1 if end is None else end - start)
    buffer.direction = "rtl" if rtl else "ltr"
    buffer.guess_segment_properties()
    buffer.language = "und"  # else that of the process, so that pixels would depend on the locale
    hb.shape(font, buffer)
    infos = buffer.glyph_infos
    return infos, buffer.glyph_positions if infos else []


def shape(fonts: FontChain, text: str, rtl: bool, start: int = 0, end: int | None = None) -> tuple[list[Glyph], int]:
    """Shape characters of one direction, with fallback fonts.

    Args:
        fonts: the fonts.
        text: the context.
        rtl: whether they are read from right to left.
        start: first character.
        end: character after the last one; None takes all.

    Returns:
        Glyphs from left to right, and the width of all in 1/64 pixel.
    """
    end = len(text) if end is None else end
    pieces = fonts.runs(text[start:end])
    glyphs: list[Glyph] = []
    x = 0
    for number, first, last in reversed(pieces) if rtl else pieces:
        infos, positions = shape_run(fonts.faces[number].font, text, rtl, start + first, start + last)
        for info, position in zip(infos, positions, strict=True):
            place = (x + position.x_offset, position.y_offset)
            glyphs.append(Glyph(number, info.codepoint, *place, info.cluster, position.x_advance))
            x += position.x_advance
    return glyphs, x
