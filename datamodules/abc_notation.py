"""Tunes as notes: a reader of ABC notation, and of the compact notation of the shipped melodies.

Only what one voice needs is read. Repeats are not expanded, grace notes, ornaments, chord symbols and words are left
out, and of a chord only the first note is kept. Source: the ABC standard, version 2.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

Event: TypeAlias = tuple[int | None, float]
"""Pitch as a MIDI number, or None for a rest; and the duration in quarter notes."""

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_SHARPS = "FCGDAEB"
_FIFTHS = {"F": -1, "C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5}
_MODES = {
    "": ("major", 0),
    "maj": ("major", 0),
    "ion": ("major", 0),
    "m": ("minor", -3),
    "min": ("minor", -3),
    "aeo": ("minor", -3),
    "dor": ("dorian", -2),
    "phr": ("phrygian", -4),
    "lyd": ("lydian", 1),
    "mix": ("mixolydian", -1),
    "loc": ("locrian", -5),
}
_ACCIDENTALS = {"^^": 2, "^": 1, "=": 0, "_": -1, "__": -2}
_TUPLETS = {2: 3, 3: 2, 4: 3, 5: 2, 6: 2, 7: 2, 8: 3, 9: 2}
_KEY = re.compile(r"(?P<tonic>[A-G])(?P<sign>[#b]?)\s*(?P<mode>[A-Za-z]*)")
_KEY_ACCIDENTAL = re.compile(r"(?<!\S)(\^\^|__|[\^=_])([A-Ga-g])(?!\S)")
_LENGTH = r"(?P<{0}a>\d*)(?P<{0}s>/*)(?P<{0}b>\d*)"
_PITCH = r"(?P<acc>\^\^|__|[\^=_])?(?P<letter>[A-Ga-g])(?P<octave>[,']*)" + _LENGTH.format("n")
_NOTE = re.compile(_PITCH)
_TOKEN = re.compile(
    r"\[(?P<field>[A-Za-z]):(?P<value>[^\]]*)\]"  # [K:D], in the line
    r"|\[(?P<chord>[^\]|:\d\s\"][^\]]*)\]" + _LENGTH.format("c") + r"|\((?P<p>\d)(?::(?P<q>\d*))?(?::(?P<r>\d*))?"
    rf"|{_PITCH}"
    r"|(?P<rest>[zxZX])" + _LENGTH.format("r") + r"|(?P<bar>[\[\]:]*\|[\[\]:|]*\d*|::)"
    r"|(?P<broken>>+|<+)"
    r"|(?P<tie>-)"
)
_DROPPED = re.compile(r'"[^"]*"|\{[^}]*\}|![^!\n]*!|[`\\]')
_FIELD = re.compile(r"([A-Za-z+]):(?![|:])")  # `A:|` is a note before a repeat
_COMPACT = re.compile(r"(?:r|([A-G])([#b]?)(-?\d))(?::(\d+\.?\d*|\.\d+))?")


@dataclass(frozen=True)
class Tune:
    """A melody with what is known about it.

    Args:
        source: name of its collection and file, and its number there, such as `oneills1850/0001-0050.abc#7`.
        title: title, "" if there is none.
        composer: composer, "" if unknown.
        rhythm: kind of tune in lower case, such as `reel`; "" if unknown.
        mood: mood, "" if unknown.
        key: tonic and mode, such as `E dorian`.
        meter: such as `6/8`, "" if free.
        events: notes and rests.
    """

    source: str
    title: str
    composer: str
    rhythm: str
    mood: str
    key: str
    meter: str
    events: tuple[Event, ...]

    @property
    def num_notes(self) -> int:
        """Events that are not rests."""
        return sum(pitch is not None for pitch, _ in self.events)

    @property
    def quarters(self) -> float:
        """Length in quarter notes."""
        return sum(duration for _, duration in self.events)


def key_signature(text: str) -> tuple[str, dict[str, int]]:
    """Read a key.

    Args:
        text: such as `Gmin`, `D dorian`, `F# mix` or `Am ^g`; bagpipe keys (`HP`, `Hp`) have F and C sharp.

    Returns:
        The key as `tonic mode` (C major for `none`), and letter -> semitones of its accidentals.
    """
    text = text.strip()
    if text[:2].lower() == "hp":
        return "A mixolydian", {"F": 1, "C": 1}
    match = _KEY.match(text)
    if match is None or text.lower().startswith("none"):
        tonic, mode, fifths = "C", "major", 0
    else:
        # Words that are no mode (`treble`, `exp`) leave the key major.
        mode, shift = _MODES["m"] if match["mode"] == "m" else _MODES.get(match["mode"][:3].lower(), _MODES[""])
        sign = {"#": 1, "b": -1, "": 0}[match["sign"]]
        tonic, fifths = match["tonic"] + match["sign"], _FIFTHS[match["tonic"]] + 7 * sign + shift
    letters = _SHARPS if fifths >= 0 else _SHARPS[::-1]
    signature = {letters[number % 7]: 0 for number in range(abs(fifths))}
    for number in range(abs(fifths)):
        signature[letters[number % 7]] += 1 if fifths > 0 else -1
    for accidental, letter in _KEY_ACCIDENTAL.findall(text):
        signature[letter.upper()] = _ACCIDENTALS[accidental]
    return f"{tonic} {mode}", signature


def _meter(text: str) -> str:
    text = text.strip()
    return {"C": "4/4", "C|": "2/2", "none": ""}.get(text, text)


def _fraction(text: str) -> Fraction | None:
    match = re.fullmatch(r"\(?([\d+ ]+)\)?\s*/\s*(\d+)", text.strip())
    if match is None or int(match[2]) == 0:
        return None
    return Fraction(sum(int(part) for part in match[1].split("+") if part.strip()), int(match[2]))


def _length(match: re.Match[str], prefix: str) -> Fraction:
    """Factor of a note's length: `3`, `/`, `//`, `3/2`."""
    slashes, below = len(match[prefix + "s"]), match[prefix + "b"]
    above = Fraction(int(match[prefix + "a"] or 1))
    return above / int(below) if below and int(below) else above / 2**slashes


class _Reader:
    """State while the notes of one tune are read."""

    def __init__(self, unit: Fraction | None, meter: str, key: str) -> None:
        self.events: list[tuple[int | None, Fraction]] = []
        self.meter, self.unit = meter, unit
        self.signature = key_signature(key)[1]
        self.measure: dict[tuple[str, int], int] = {}  # accidentals of this bar
        self.broken = Fraction(1)  # factor of the next note
        self.tied = False
        self.last = ("", 0)  # letter and octave of the latest note
        self.tuplet, self.tuplet_left = Fraction(1), 0

    @property
    def quarter_unit(self) -> Fraction:
        """Unit of length in quarter notes."""
        if self.unit is not None:
            return 4 * self.unit
        meter = _fraction(self.meter)
        return Fraction(1, 2) if meter is None or meter >= Fraction(3, 4) else Fraction(1, 4)

    def field(self, letter: str, value: str) -> None:
        """Change key, unit or meter."""
        if letter == "K":
            self.signature = key_signature(value)[1]
        elif letter == "L":
            self.unit = _fraction(value) or self.unit
        elif letter == "M":
            self.meter = _meter(value)

    def token(self, match: re.Match[str]) -> None:
        """Take one token of the notes."""
        if match["field"]:
            self.field(match["field"], match["value"])
        elif match["chord"] is not None:
            note = _NOTE.search(match["chord"])
            if note is not None:
                self._add(self._pitch(note), _length(note, "n") * _length(match, "c"))
        elif match["p"]:
            self._begin_tuplet(int(match["p"]), match["q"], match["r"])
        elif match["letter"]:
            self._add(self._pitch(match), _length(match, "n"))
        elif match["rest"]:
            self._rest(match)
        elif match["bar"]:
            self.measure.clear()
        elif match["broken"]:
            self._break(match["broken"])
        elif match["tie"]:
            self.tied = bool(self.events) and self.events[-1][0] is not None

    def _pitch(self, match: re.Match[str]) -> int:
        letter = match["letter"].upper()
        octave = 5 * (match["letter"].islower()) or 4
        octave += match["octave"].count("'") - match["octave"].count(",")
        natural = 12 * (octave + 1) + _STEPS[letter]
        place = (letter, octave)
        carried = self.tied and self.last == place and place not in self.measure
        self.last = place
        if match["acc"]:
            self.measure[place] = _ACCIDENTALS[match["acc"]]
        elif carried and (before := self.events[-1][0]) is not None:
            return before  # a tie takes its accidental over the bar line
        return natural + self.measure.get(place, self.signature.get(letter, 0))

    def _add(self, pitch: int | None, length: Fraction) -> None:
        duration = length * self.quarter_unit * self.broken
        self.broken = Fraction(1)
        if self.tuplet_left:
            duration *= self.tuplet
            self.tuplet_left -= 1
        if self.tied and self.events[-1][0] == pitch:
            self.events[-1] = (pitch, self.events[-1][1] + duration)
        else:
            self.events.append((pitch, duration))
        self.tied = False

    def _rest(self, match: re.Match[str]) -> None:
        length = _length(match, "r")
        if match["rest"] in "ZX":  # whole bars
            length *= 4 * (_fraction(self.meter) or 1) / self.quarter_unit
        self._add(None, length)

    def _begin_tuplet(self, count: int, instead_of: str | None, notes: str | None) -> None:
        time = int(instead_of) if instead_of else _TUPLETS.get(count, count)
        if count in (5, 7, 9) and not instead_of and self.meter in ("6/8", "9/8", "12/8"):
            time = 3
        self.tuplet, self.tuplet_left = Fraction(time, max(count, 1)), int(notes) if notes else count

    def _break(self, signs: str) -> None:
        if not self.events:
            return
        short = Fraction(1, 2 ** len(signs))
        long = 2 - short
        first, self.broken = (long, short) if signs[0] == ">" else (short, long)
        pitch, duration = self.events[-1]
        self.events[-1] = (pitch, duration * first)


def _title(text: str, rhythm: str) -> str:
    """Title without the kind of tune, shouting or surrounding quotes."""
    text = re.sub(r"\s*--.*", "", text).strip()
    if rhythm and text.lower().endswith(f" {rhythm}"):
        text = text[: -len(rhythm) - 1]
    text = re.sub(r"(.+), (The|A)", r"\2 \1", text).strip(' ".')
    return " ".join(word.capitalize() for word in text.split()) if text.isupper() else text


def parse_abc(text: str, name: str = "") -> list[Tune]:
    r"""Read the tunes of a file in ABC notation.

    Args:
        text: the content.
        name: name of the collection and the file, the beginning of `Tune.source`.

    Returns:
        One tune per `X:` field that has a key, in order, also those without notes. Durations are exact to the
        float. Unknown signs are passed over.

    Example::

        (tune,) = parse_abc("X:1\nT:A scale\nM:4/4\nL:1/4\nK:G\nGABc | defg |]")
        assert tune.events[-2] == (78, 1.0)
    """
    tunes = []
    for part in re.split(r"(?m)^(?=X:)", text.replace("\r\n", "\n").replace("\r", "\n"))[1:]:
        lines = [line.strip() for line in re.sub(r"(?<!\\)%.*", "", part).split("\n")]
        fields: dict[str, str] = {}
        body = len(lines)
        for number, line in enumerate(lines):
            if match := _FIELD.match(line):
                fields.setdefault(match[1], line[2:].strip())
                if match[1] == "K":
                    body = number + 1
                    break
        if "K" in fields:
            tunes.append(_tune(fields, lines[body:], name))
    return tunes


def _tune(fields: Mapping[str, str], body: list[str], name: str) -> Tune:
    meter = _meter(fields.get("M", ""))
    reader = _Reader(_fraction(fields.get("L", "")), meter, fields["K"])
    # Pieces of notes between fields; what is dropped may go over the end of a line.
    pieces: list[str] = [""]
    for line in body:
        if match := _FIELD.match(line):
            pieces[-1] += f" [{match[1]}:{line[2:].replace(']', ' ')}] " if match[1] in "KLM" else ""
        else:
            pieces[-1] += line + "\n"
    for match in _TOKEN.finditer(_DROPPED.sub("", "".join(pieces))):
        reader.token(match)
    rhythm = fields.get("R", "").strip().lower()
    return Tune(
        source=f"{name}#{fields['X']}",
        title=_title(fields.get("T", ""), rhythm),
        composer=_name(fields.get("C", "")),
        rhythm=rhythm,
        mood="",
        key=key_signature(fields["K"])[0],
        meter=meter,
        events=tuple((pitch, float(duration)) for pitch, duration in reader.events if duration),
    )


def _name(text: str) -> str:
    """Name of a composer in ordinary letters, without quotes and a closing full stop."""
    text = text.strip(' ".')
    return " ".join(word.capitalize() for word in text.split()) if text.isupper() else text


def read_abc(path: str | Path, collection: str | None = None) -> list[Tune]:
    """Read a file in ABC notation.

    Args:
        path: the file, in UTF-8 or Latin-1.
        collection: name of its collection; None takes that of its folder.

    Returns:
        Its tunes; see `parse_abc`.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return parse_abc(text, f"{path.resolve().parent.name if collection is None else collection}/{path.name}")


def parse_notes(text: str) -> tuple[Event, ...]:
    """Read the compact notation of the shipped melodies.

    Args:
        text: notes with octave (C4 is MIDI 60) and, after a colon, quarter notes: `F#4 A4:.5 r:2 Bb4`; without a
            length it is one quarter note, and `r` is a rest.

    Returns:
        The events.

    Raises:
        ValueError: if a note cannot be read.
    """
    events: list[Event] = []
    for word in text.split():
        match = _COMPACT.fullmatch(word)
        if match is None:
            raise ValueError(f"notes: {word!r} is not a note such as F#4:1.5 or a rest such as r:2; correct it")
        letter, sign, octave, quarters = match.groups()
        pitch = None
        if letter is not None:
            pitch = 12 * (int(octave) + 1) + _STEPS[letter] + {"#": 1, "b": -1, "": 0}[sign]
        events.append((pitch, float(quarters or 1)))
    return tuple(events)


def tune_from_row(row: Mapping[str, Any], source: str) -> Tune:
    """Make a tune of a row of the shipped melodies.

    Args:
        row: texts `title`, `composer`, `genre`, `mood`, `key`, `meter` and `notes`; see `parse_notes`.
        source: name of the collection, the file and the number in it.

    Returns:
        The tune.
    """
    return Tune(
        source=source,
        title=row["title"],
        composer=row["composer"],
        rhythm=row["genre"],
        mood=row["mood"],
        key=row["key"],
        meter=row["meter"],
        events=parse_notes(row["notes"]),
    )
