"""The renderer of the released PIXEL and PixelGPT data, pixel by pixel: no shaping, no reading order, one font."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from datamodules.rendering.base import MARGIN, Line, Pixels, Renderer
from datamodules.rendering.fonts import resolve, sha256

WORD_TOP = 3
"""Rows above the baseline's usual place that words of lists are moved down by."""


class PygameRenderer(Renderer):
    """Draws text with PyGame's FreeType as the released code does, for its data and numbers.

    Letters are not shaped: Arabic letters stand alone in reversed order, vowel signs of Hindi are displaced, and
    characters that the font lacks are boxes. Every text is centred by its ink. `TextRenderer` has none of this.

    Code: https://github.com/xplip/pixel, https://github.com/ernie-research/pixelgpt.

    Args:
        max_seq_length: S, patches of a strip.
        patch_size: p, side of a patch and height of the strip in pixels.
        font_size: in points.
        dpi: dots per inch.
        font: font file; None takes DejaVu Sans.
        truncation: see `Renderer`.

    Raises:
        ImportError: if pygame is not installed.
        ValueError: if a number is too small or there is no such font.
    """

    def __init__(
        self,
        max_seq_length: int = 1024,
        patch_size: int = 16,
        font_size: float = 8.0,
        dpi: int = 120,
        font: str | None = None,
        truncation: Literal["longest_first", "official"] = "longest_first",
    ) -> None:
        super().__init__(max_seq_length, patch_size, 1, truncation)
        self.font_size, self.dpi = font_size, dpi
        (self.font,) = resolve(None if font is None else [font])[:1]
        _freetype()

    @cached_property
    def _font(self) -> Any:  # noqa: ANN401
        freetype = _freetype()
        font = freetype.Font(self.font, self.font_size, resolution=self.dpi)
        font.fgcolor = (0, 0, 0)
        return font

    def __getstate__(self) -> dict[str, Any]:
        """Configuration without the loaded font."""
        return {key: value for key, value in self.__dict__.items() if key != "_font"}

    def fingerprint(self) -> dict[str, str]:
        """Backend, versions, font and settings that the pixels depend on."""
        import pygame

        freetype = ".".join(str(part) for part in pygame.freetype.get_version())
        settings = ("patch_size", "font_size", "dpi", "truncation")
        return {
            "backend": "pygame",
            "pygame": pygame.version.ver,
            "freetype": freetype,
            "fonts": f"{Path(self.font).name}:{sha256(self.font)}",
        } | {name: str(getattr(self, name)) for name in settings}

    def line(self, text: str, limit: int, offsets: bool = False) -> Line:
        """Draw a text, centred by its ink.

        Args:
            text: without control characters.
            limit: pixels that can be seen; all is drawn.
            offsets: must be false, as pygame does not tell where characters are.

        Raises:
            ValueError: if offsets are asked for.
        """
        if offsets:
            raise ValueError("renderer: PygameRenderer cannot tell where characters are; use TextRenderer for offsets")
        surface, rect = self._font.render(text)
        return Line(self._ink(surface, self.height // 2 - rect.height // 2, MARGIN), MARGIN + rect.width + MARGIN)

    def word(self, text: str, last: bool) -> tuple[Pixels, int]:
        """Draw a word of a list, on a fixed baseline.

        Args:
            text: the word.
            last: whether no blank follows.
        """
        surface, rect = self._font.render(text if last else f"{text} ")
        return self._ink(surface, WORD_TOP + self.patch_size // 2 - rect.top, 0), rect.width

    def clean(self, text: str) -> str:
        """Text as pygame takes it; line breaks and tabs are drawn as boxes."""
        return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")

    def _ink(self, surface: Any, top: int, left: int) -> Pixels:  # noqa: ANN401
        import pygame

        canvas = pygame.Surface((left + surface.get_width(), self.height), depth=32)
        canvas.fill((255, 255, 255))
        canvas.blit(surface, (left, top))
        return 255 - pygame.surfarray.array3d(canvas)[..., 0]


def _freetype() -> Any:  # noqa: ANN401
    import os

    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from pygame import freetype
    except ImportError as error:
        raise ImportError(
            "renderer: PygameRenderer needs the package pygame-ce; pip install 'lit-models[pygame]'"
        ) from error
    freetype.init()
    return freetype
