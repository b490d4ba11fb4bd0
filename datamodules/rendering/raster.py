"""Glyphs to ink: outlines and colour images on rows of fixed height."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.rendering.fonts import FontChain
from datamodules.rendering.shaping import Glyph

Ink = NDArray[np.uint8]
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue (ITU-R BT.601)."""


class Rasteriser:
    """Draws shaped glyphs as columns of ink, 0 for the ground and 255 for black.

    Args:
        fonts: the fonts, whose units are 1/64 pixel.
        height: H, rows.
        baseline: rows above the baseline.
        channels: 1 draws colour glyphs by their luminance, 3 in their colours.
    """

    def __init__(self, fonts: FontChain, height: int, baseline: int, channels: int) -> None:
        import uharfbuzz as hb

        self.fonts, self.height, self.baseline, self.channels = fonts, height, baseline, channels
        self._outlines = hb.RasterDraw()
        self._outlines.scale_factor = (64, 64)

    def draw(self, glyphs: Sequence[Glyph], phase: int = 0) -> tuple[Ink, int]:
        """Draw glyphs.

        Args:
            glyphs: with their places.
            phase: shift to the right in 1/64 pixel.

        Returns:
            Columns (n, H) or (n, H, 3), and the pixel of the first one, which may be negative; nothing to be seen gives
            no column.
        """
        images: list[tuple[int, Ink]] = []
        plain = 0
        for glyph in glyphs:
            face = self.fonts.faces[glyph.font]
            if face.colour is not None and (image := self._colour(face, glyph, phase)) is not None:
                images.append(image)
                continue
            self._outlines.transform = (1, 0, 0, 1, phase + glyph.x, glyph.y)
            self._outlines.draw_glyph(face.font, glyph.glyph)
            plain += 1
        if plain and (image := self._render()) is not None:
            images.append(image)
        if not images:
            return self._blank(0), 0
        left = min(x for x, _ in images)
        ink = self._blank(max(x + len(columns) for x, columns in images) - left)
        for x, columns in images:
            part = ink[x - left : x - left + len(columns)]
            np.maximum(part, columns, out=part)
        return ink, left

    def _blank(self, columns: int) -> Ink:
        shape = (columns, self.height)
        return np.zeros(shape if self.channels == 1 else (*shape, self.channels), np.uint8)

    def _render(self) -> tuple[int, Ink] | None:
        image = self._outlines.render()
        extents = image.extents
        if not extents or not extents.width or not extents.height:
            return None
        rows = np.frombuffer(image.buffer, np.uint8).reshape(extents.height, extents.stride)[::-1, : extents.width]
        if self.channels == 3:
            rows = np.repeat(rows[..., None], 3, axis=2)
        return extents.x_origin, self._place(rows, self.baseline - extents.y_origin - extents.height)

    def _place(self, rows: Ink, top: int) -> Ink:
        """Columns of full height with an image whose first row is `top`; what lies outside is cut."""
        ink = self._blank(rows.shape[1])
        first, last = max(0, top), min(self.height, top + len(rows))
        if first < last:
            ink[:, first:last] = rows[first - top : last - top].swapaxes(0, 1)
        return ink

    def _colour(self, face: Any, glyph: Glyph, phase: int) -> tuple[int, Ink] | None:  # noqa: ANN401
        """A colour glyph over the ground; None if this glyph has only an outline."""
        extents = face.font.get_glyph_extents(glyph.glyph)
        if extents is None or not extents.width:
            return None
        image = self._png(face, glyph, extents) if face.colour == "png" else self._paint(face, glyph, extents)
        if image is None:
            return None
        rgba, left, above = image
        colour, opacity = rgba[..., :3].astype(np.float64), rgba[..., 3:] / 255
        ink = (255 - colour) * opacity  # distance from the white ground
        if self.channels == 1:
            ink = ink @ LUMINANCE
        x = math.floor((phase + glyph.x) / 64 + left + 0.5)
        top = self.baseline - math.floor(glyph.y / 64 + above + 0.5)
        return x, self._place(np.rint(ink).astype(np.uint8), top)

    def _png(self, face: Any, glyph: Glyph, extents: Any) -> tuple[Ink, float, float] | None:  # noqa: ANN401
        """Pixels (h, w, 4) of an embedded picture, and their left and upper edge from the origin in pixels."""
        from PIL import Image

        blob = face.font.get_glyph_color_png(glyph.glyph)
        if not blob or not len(blob.data):
            return None
        size = tuple(max(1, round(abs(side) / 64)) for side in (extents.width, extents.height))
        image = Image.open(io.BytesIO(bytes(blob.data))).convert("RGBA").resize(size, Image.Resampling.BOX)
        return np.asarray(image), extents.x_bearing / 64, extents.y_bearing / 64

    def _paint(self, face: Any, glyph: Glyph, extents: Any) -> tuple[Ink, float, float] | None:  # noqa: ANN401
        """Pixels (h, w, 4) of a layered glyph, and their left and upper edge from the origin in pixels."""
        import uharfbuzz as hb

        paint = hb.RasterPaint()
        paint.scale_factor = (64, 64)
        if not paint.set_glyph_extents(extents) or not paint.paint_glyph_or_fail(face.font, glyph.glyph):
            return None
        image = paint.render()
        box = image.extents
        bgra = np.frombuffer(image.buffer, np.uint8).reshape(box.height, box.stride)[::-1, : 4 * box.width]
        bgra = bgra.reshape(box.height, box.width, 4).astype(np.float64)
        opacity = bgra[..., 3:]  # colours are multiplied by it
        colour = np.divide(255 * bgra[..., 2::-1], opacity, out=np.zeros_like(bgra[..., :3]), where=opacity > 0)
        rgba = np.rint(np.concatenate([colour, opacity], axis=-1)).clip(0, 255).astype(np.uint8)
        return rgba, box.x_origin, box.y_origin + box.height
