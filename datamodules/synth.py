"""Synthetic instruments: melodies rendered by adding harmonics, without recordings and without chance.

The same arguments give the same samples up to rounding of the mathematical library (about 1e-7), at any sample rate
without aliasing, and any window of a melody can be rendered alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.abc_notation import Event

Level: TypeAlias = Literal["peak", "std"]
VIBRATO_HZ = 5.5
TOP = 0.475
"""Highest frequency of a harmonic, as a share of the sample rate."""


@dataclass(frozen=True)
class Instrument:
    """Sound of one note.

    Args:
        harmonics: amplitudes of the multiples of the note's frequency.
        attack: seconds until a note has its full strength.
        decay: seconds in which the fundamental falls to 1/e; higher harmonics fall faster; infinite keeps the strength.
        release: seconds a note sounds after its end.
        vibrato: depth in semitones.
    """

    harmonics: tuple[float, ...]
    attack: float
    decay: float
    release: float
    vibrato: float


INSTRUMENTS = MappingProxyType(
    {
        "organ": Instrument((1, 0.7, 0.5, 0.4, 0, 0.25, 0, 0.2), 0.01, np.inf, 0.03, 0),
        "flute": Instrument((1, 0.25, 0.08, 0.03), 0.05, np.inf, 0.05, 0.08),
        "violin": Instrument(tuple(1 / k for k in range(1, 16)), 0.06, np.inf, 0.06, 0.25),
        "clarinet": Instrument((1, 0, 0.6, 0, 0.4, 0, 0.25, 0, 0.15), 0.03, np.inf, 0.04, 0),
        "harp": Instrument((1, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08), 0.003, 0.35, 0.1, 0),
        "piano": Instrument((1, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1, 0.08, 0.05), 0.004, 0.9, 0.08, 0),
    }
)
"""Instruments by name."""


def instrument(name: str) -> Instrument:
    """Look up an instrument.

    Args:
        name: its name.

    Returns:
        The instrument.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in INSTRUMENTS:
        raise ValueError(f"data.instruments: {name!r} is not one of {', '.join(INSTRUMENTS)}")
    return INSTRUMENTS[name]


@dataclass(frozen=True)
class _Notes:
    """Sounding notes of a melody.

    Args:
        frequency: float64 [N], Hz.
        seconds: float64 [N], notated durations.
        onset: int64 [N], first samples.
        count: int64 [N], samples with the release.
    """

    frequency: NDArray[np.float64]
    seconds: NDArray[np.float64]
    onset: NDArray[np.int64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, events: Sequence[Event], voice: Instrument, bpm: float, sample_rate: int, transpose: float) -> "_Notes":
        durations = np.array([duration for _, duration in events], np.float64) * (60 / bpm)
        begins = np.cumsum(durations) - durations
        sounding = np.array([pitch is not None for pitch, _ in events], np.bool_)
        pitches = np.array([pitch for pitch, _ in events if pitch is not None], np.float64)
        seconds = durations[sounding]
        return cls(
            440.0 * 2.0 ** ((pitches + transpose - 69) / 12),
            seconds,
            np.rint(begins[sounding] * sample_rate).astype(np.int64),
            ((seconds + voice.release) * sample_rate).astype(np.int64),
        )

    def within(self, first: int, end: int) -> "_Notes":
        """Those that sound somewhere from sample `first` to before `end`."""
        kept = (self.onset < end) & (self.onset + self.count > first)
        return _Notes(self.frequency[kept], self.seconds[kept], self.onset[kept], self.count[kept])


def num_samples(events: Sequence[Event], voice: Instrument, bpm: float, sample_rate: int) -> int:
    """Samples until the last note has ended, with its release.

    Args:
        events: notes and rests.
        voice: the instrument.
        bpm: quarter notes per minute.
        sample_rate: Hz.

    Returns:
        The number; 0 without notes.
    """
    notes = _Notes.of(events, voice, bpm, sample_rate, 0)
    return int((notes.onset + notes.count).max(initial=0))


def render(
    events: Sequence[Event],
    voice: Instrument,
    bpm: float,
    sample_rate: int,
    transpose: float = 0,
    start: int = 0,
    samples: int | None = None,
    scale: Level = "peak",
    level: float = 0.9,
) -> NDArray[np.float32]:
    """Render a melody or a window of it.

    A note of d seconds has a vibrato of 5.5 Hz around its pitch, rises linearly during the attack and falls
    linearly during the release after d; harmonic k decays sqrt(k) times as fast as the fundamental. Harmonics above
    0.475 of the sample rate are left out.

    Args:
        events: notes and rests.
        voice: the instrument.
        bpm: quarter notes per minute.
        sample_rate: Hz.
        transpose: semitones.
        start: first sample of the window.
        samples: length of the window; None goes to the end of the last note. Beyond it there is silence.
        scale: what `level` is: the largest absolute value of the window, or the standard deviation of its samples
            before the end of the melody.
        level: target of the scaling; silence stays silent.

    Returns:
        Float32 [samples].

    Raises:
        ValueError: if a number is out of its range.
    """
    if not (bpm > 0 and sample_rate > 0 and level > 0 and start >= 0):
        raise ValueError(
            f"data: tempo {bpm}, sample_rate {sample_rate} and level {level} must be positive and start {start} at "
            "least 0; correct the one that is not"
        )
    if scale not in get_args(Level):
        raise ValueError(f"data.scale: {scale!r} is not one of {', '.join(get_args(Level))}")
    notes = _Notes.of(events, voice, bpm, sample_rate, transpose)
    end = int((notes.onset + notes.count).max(initial=0))
    length = max(end - start, 0) if samples is None else samples
    wave = _add_notes(notes.within(start, start + length), voice, sample_rate, start, length)
    heard = wave[: max(end - start, 0)]
    if heard.size:
        strength = np.abs(heard).max() if scale == "peak" else heard.std()
        if strength > 0:
            wave *= level / strength
    return wave.astype(np.float32)


def _add_notes(notes: _Notes, voice: Instrument, sample_rate: int, start: int, length: int) -> NDArray[np.float64]:
    """Sum of the notes from sample `start` on, before scaling; float64 [length].

    The samples of all notes lie one after the other in flat arrays.
    """
    first = np.maximum(notes.onset, start)
    counts = np.minimum(notes.onset + notes.count, start + length) - first
    total = int(counts.sum())
    if total == 0:
        return np.zeros(length)
    # Position of every sample: within the flat array, minus where its note begins there, plus where that is in time.
    position = np.arange(total) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    time = (position - np.repeat(notes.onset, counts)) / sample_rate
    frequency = np.repeat(notes.frequency, counts)
    phase = 2 * np.pi * frequency * time
    if voice.vibrato:
        depth = frequency * ((2 ** (voice.vibrato / 12) - 1) / VIBRATO_HZ)
        phase += depth * (1 - np.cos(2 * np.pi * VIBRATO_HZ * time))
    sound = _add_harmonics(phase, time, frequency, voice, TOP * sample_rate)
    envelope = np.minimum(time / voice.attack, 1)
    envelope *= np.clip((np.repeat(notes.seconds, counts) + voice.release - time) / voice.release, 0, 1)
    return np.bincount(position - start, weights=sound * envelope, minlength=length).astype(np.float64, copy=False)


def _add_harmonics(
    phase: NDArray[np.float64],
    time: NDArray[np.float64],
    frequency: NDArray[np.float64],
    voice: Instrument,
    top: float,
) -> NDArray[np.float64]:
    """Sum of a_k sin(k phase) exp(-time sqrt(k) / decay) over the harmonics below `top` Hz, over the norm of a; [N].

    Sines of multiples follow from sin((k+1)p) = 2 cos(p) sin(kp) - sin((k-1)p): two transcendental functions in all.
    """
    amplitudes = np.array(voice.harmonics, np.float64)
    before, sine, twice_cosine = np.zeros_like(phase), np.sin(phase), 2 * np.cos(phase)
    sound = np.zeros_like(phase)
    lowest = frequency.min()
    highest = frequency.max()
    for k, amplitude in enumerate(amplitudes, start=1):
        if k * lowest >= top:
            break
        if amplitude:
            part = amplitude * sine
            if np.isfinite(voice.decay):
                part *= np.exp(time * (-np.sqrt(k) / voice.decay))
            if k * highest >= top:
                part *= k * frequency < top
            sound += part
        before, sine = sine, twice_cosine * sine - before
    return sound / np.sqrt(np.square(amplitudes).sum())
