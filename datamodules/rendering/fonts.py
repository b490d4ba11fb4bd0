"""Fonts: where they come from, which one draws a character, and what to install when none does."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import regex
from lightning.pytorch.utilities import rank_zero_warn

VARIABLE = "LIT_FONTS"
"""Environment variable with font files, separated like a search path, for renderers that name none."""

# The fonts of the `fonts` extra in the order they are tried (SIL Open Font License).
_NOTO: tuple[str, ...] = (
    "",
    "Arabic",
    "Hebrew",
    "Devanagari",
    "Bengali",
    "Gurmukhi",
    "Gujarati",
    "Oriya",
    "Tamil",
    "Telugu",
    "Kannada",
)
_NOTO += ("Malayalam", "Sinhala", "Thai", "Lao", "Myanmar", "Khmer", "Ethiopic", "Georgian", "Armenian", "Symbols")
_SETS = {
    "noto": [("manimgx_fonts", f"NotoSans{script}[wght].ttf") for script in _NOTO]
    + [("manimgx_fonts", "NotoEmoji[wght].ttf"), ("manimgx_fonts_cjk", "NotoSansCJK-VF.otf.ttc")]
}
_EMOJI = regex.compile(r"\p{Emoji_Presentation}|\ufe0f|[\U0001f000-\U0001faff]")
# Characters that change others or nothing: a font need not have them.
_IGNORABLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cc}]")


def bundled(name: str) -> str:
    """Path of a DejaVu font, which comes with Matplotlib (Bitstream Vera licence).

    Args:
        name: such as `DejaVuSans.ttf`.
    """
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "mpl-data/fonts/ttf" / name)


def resolve(fonts: Sequence[str] | None, monospaced: bool = False) -> list[str]:
    """Font files to use: those named, else those of the environment variable, else DejaVu Sans.

    Args:
        fonts: paths, and names of sets such as `noto`.
        monospaced: put DejaVu Sans Mono first where nothing else is asked for.

    Returns:
        Paths, the most important font first.

    Raises:
        ValueError: if a file does not exist, or the package of a set is not installed.
    """
    key = "renderer.fonts"
    if fonts is None and os.environ.get(VARIABLE):
        fonts, key = os.environ[VARIABLE].split(os.pathsep), VARIABLE
    if fonts is None:
        names = ["DejaVuSansMono.ttf", "DejaVuSans.ttf"] if monospaced else ["DejaVuSans.ttf"]
        return [bundled(name) for name in names]
    paths = [path for name in fonts for path in (_set(name) if name in _SETS else [name])]
    if not paths:
        raise ValueError(f"{key}: the list is empty; name a font file, a set ({', '.join(_SETS)}), or leave it out")
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{key}: there is no font file {path!r}; give a path, or a set ({', '.join(_SETS)})")
    return paths


def _set(name: str) -> list[str]:
    paths = []
    for package, file in _SETS[name]:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"renderer.fonts: the set {name!r} needs the package {package.replace('_', '-')}; "
                "pip install 'lit-models[fonts]'"
            )
        paths.append(str(Path(spec.origin).parent / file))
    return paths


@cache
def sha256(path: str) -> str:
    """Hash of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def script(character: str) -> str:
    """Script of a character, as the first word of its Unicode name, such as `DEVANAGARI` or `CJK`."""
    return unicodedata.name(character, "UNKNOWN").split()[0]


@dataclass(frozen=True)
class Face:
    """A font at its size.

    Attributes:
        font: `uharfbuzz.Font`, whose units are 1/64 pixel.
        emoji: whether it is for emoji.
        colour: how colour glyphs are stored.
    """

    font: Any
    emoji: bool
    colour: Literal["png", "paint"] | None


@dataclass
class FontChain:
    """Fonts that are tried in order.

    Args:
        paths: font files.
        ppem: pixels per em.
        on_missing: what to do about characters that no font has: `warn` once per script and draw the box of the
            first font, or `raise`.
    """

    paths: list[str]
    ppem: float
    on_missing: Literal["warn", "raise"] = "warn"
    faces: list[Face] = field(init=False)
    missing: dict[str, int] = field(init=False, default_factory=dict)
    """Drawn clusters without a glyph, per script."""
    _plain: set[str] = field(init=False, default_factory=set, repr=False)  # characters of the first font

    def __post_init__(self) -> None:
        self.faces = [self._load(path) for path in self.paths]

    def _load(self, path: str) -> Face:
        import uharfbuzz as hb

        face = hb.Face(hb.Blob.from_file_path(path))
        if face.glyph_count == 0:
            raise ValueError(f"renderer.fonts: {path!r} is no font that HarfBuzz can read; give a TTF, OTF or TTC file")
        font = hb.Font(face)
        scale = round(64 * self.ppem)
        font.scale = (scale, scale)
        if any(axis.tag == "wght" for axis in face.axis_infos):  # the default of some variable fonts is hair-thin
            font.set_variations({"wght": 400})
        colour: Literal["png", "paint"] | None = "png" if face.has_color_png else None
        if colour is None and (face.has_color_paint or face.has_color_layers):
            colour = "paint"
        return Face(font, colour is not None or "emoji" in Path(path).name.lower(), colour)

    def extents(self) -> tuple[float, float]:
        """Ascent and descent of the first font in pixels, both positive."""
        extents = self.faces[0].font.get_font_extents("ltr")
        return extents.ascender / 64, -extents.descender / 64

    def runs(self, text: str) -> list[tuple[int, int, int]]:
        """Cut a text where the font changes.

        Args:
            text: any.

        Returns:
            (number of the font, start, end) for each stretch; font 0 where no font has the characters.
        """
        if self._plain.issuperset(text):
            return [(0, 0, len(text))] if text else []
        if self._covers(0, text) and not _EMOJI.search(text):
            self._plain.update(text)
            return [(0, 0, len(text))] if text else []
        found: list[tuple[int, int, int]] = []
        for match in regex.finditer(r"\X", text):
            number = self._choose(match.group(), found[-1][0] if found else 0)
            if found and found[-1][0] == number:
                found[-1] = (number, found[-1][1], match.end())
            else:
                found.append((number, match.start(), match.end()))
        return found

    def _choose(self, cluster: str, before: int) -> int:
        if cluster.isspace() and not self.faces[before].emoji and self._covers(before, cluster):
            return before
        wants_emoji = _EMOJI.search(cluster) is not None and "\ufe0e" not in cluster  # U+FE0E asks for text
        order = sorted(range(len(self.faces)), key=lambda number: self.faces[number].emoji != wants_emoji)
        for number in order:
            if self._covers(number, cluster):
                return number
        for number in order:  # marks that no font combines: the letter below them is better than a box
            if self.faces[number].font.get_nominal_glyph(ord(cluster[0])) is not None:
                self._report(cluster[1:])
                return number
        self._report(cluster)
        return 0

    def _covers(self, number: int, text: str) -> bool:
        glyph = self.faces[number].font.get_nominal_glyph
        return all(glyph(ord(char)) is not None or _IGNORABLE.match(char) is not None for char in text)

    def _report(self, characters: str) -> None:
        absent = next(char for char in characters if not any(self._covers(n, char) for n in range(len(self.faces))))
        name = script(absent)
        first = name not in self.missing
        self.missing[name] = self.missing.get(name, 0) + 1
        package = (
            "choose fonts that have it"
            if "noto" in self.paths[0].lower()
            else "pip install 'lit-models[fonts]' and set renderer.fonts to [noto], or name a font file that has it"
        )
        message = (
            f"renderer.fonts: no font has {name} characters, such as U+{ord(absent):04X}, so they are drawn as empty "
            f"boxes; {package}"
        )
        if self.on_missing == "raise":
            raise ValueError(message)
        if first:
            rank_zero_warn(message)
