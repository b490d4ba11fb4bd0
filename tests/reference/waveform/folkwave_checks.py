"""Comparisons of tunes and synthetic sound with the reference vectors."""

from fractions import Fraction

import numpy as np

from datamodules.synth import INSTRUMENTS, render

NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"]
SHARPS = {"G major": "F", "D major": "FC", "A major": "FCG", "G lydian": "FC"}


def check_synth(data):
    assert data["slices"] == "first=y[100:116], mid=y[3200:3216]"
    events = [tuple(event) for event in data["events"]]
    samples = round(data["seconds"] * data["sample_rate"])
    assert set(data["out"]) == set(INSTRUMENTS)
    for name, expected in data["out"].items():
        wave = render(
            events, INSTRUMENTS[name], data["bpm"], data["sample_rate"], data["transpose"], samples=samples
        ).astype(np.float64)
        np.testing.assert_allclose(wave[100:116], expected["first"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(wave[3200:3216], expected["mid"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.sqrt(np.square(wave).mean()), expected["rms"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.abs(wave).max(), expected["peak"], rtol=0, atol=1e-5)


def check_abc(case, tune):
    """Titles are compared without case, since the files write some in capitals."""
    assert tune.title.casefold() == case["title"].casefold()
    assert (tune.rhythm, tune.key, tune.meter) == (case["rhythm"], case["key"], case["meter"])
    assert [[pitch, round(duration, 4)] for pitch, duration in tune.events] == case["events"]


def check_builtin(cases, rows, tunes, profiles):
    """The estimated key follows from the notes: pitch classes weighted by duration, against the 24 profiles."""
    assert len(cases) == len(rows) == len(tunes)
    for case, row, tune in zip(cases, rows, tunes, strict=True):
        assert {**row, "ks_key": case["ks_key"], "meter": None} == {**case, "meter": None}
        assert (tune.title, tune.composer, tune.rhythm) == (case["title"], case["composer"], case["genre"])
        assert (tune.mood, tune.key) == (case["mood"], case["key"])
        assert estimated_key(tune.events, profiles) == case["ks_key"]


def estimated_key(events, profiles):
    histogram = np.zeros(12)
    for pitch, duration in events:
        if pitch is not None:
            histogram[pitch % 12] += duration
    scores = {
        f"{NAMES[tonic]} {mode}": np.corrcoef(np.roll(profiles[mode], tonic), histogram)[0, 1]
        for mode in ("major", "minor")
        for tonic in range(12)
    }
    return max(scores, key=scores.__getitem__)


def as_abc(case):
    """Write a case in ABC notation; accidentals that are not in the key end the bar after their note."""
    lines = ["X:1", f"T:{case['title']} -- {case['rhythm']}", f"R:{case['rhythm']}", f"M:{case['meter']}", "L:1/16"]
    words = []
    for pitch, quarters in case["events"]:
        length = Fraction(quarters).limit_denominator(6) * 4
        name, ends = ("z", "") if pitch is None else _abc_pitch(pitch, SHARPS[case["key"]])
        words.append(f"{name}{length.numerator}/{length.denominator}{ends}")
    return "\n".join([*lines, f"K:{case['key']}", " ".join(words), ""])


def _abc_pitch(pitch, signature):
    octave, step = divmod(pitch, 12)
    letter, sharp = "CCDDEFFGGAAB"[step], step in (1, 3, 6, 8, 10)
    sign = "" if sharp == (letter in signature) else "^" if sharp else "="
    name = letter.lower() + "'" * (octave - 6) if octave > 5 else letter + "," * (5 - octave)
    return sign + name, " |" if sign else ""
