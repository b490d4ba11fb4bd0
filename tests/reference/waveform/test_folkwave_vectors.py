import copy
import importlib.util
import json
from pathlib import Path

import pytest

from datamodules.abc_notation import parse_abc, read_abc
from datamodules.assets import asset_path
from datamodules.folkwave import load_tunes

from ..loading import load
from . import folkwave_checks as checks

CASES = load("waveform", "abc_check")
SMALLEST = 2e-3
"""1 % of smaller numbers is within the tolerance."""


def paths(node, path=()):
    """Paths of all texts and numbers in a JSON value."""
    if isinstance(node, (dict, list)):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from paths(item, (*path, key))
    elif node is not None:
        yield path


def altered(data, path, factor=1.01):
    """A copy in which a number is 1 % larger (a small one 0.01, an integer at least 1) or a text one letter longer.

    Another factor replaces the 1 %.
    """
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    if isinstance(value, str):
        holder[path[-1]] = value + "x"
    elif isinstance(value, int):
        holder[path[-1]] = value + max(1, abs(value) // 100)
    else:
        holder[path[-1]] = value * factor if abs(value) > SMALLEST else value + 0.01
    return data


def test_synth():
    checks.check_synth(load("waveform", "synth_check"))


@pytest.mark.parametrize("path", list(paths(load("waveform", "synth_check"))), ids=str)
def test_every_value_of_synth_counts(path):
    # The last note lasts to the end of the window: it may only become shorter.
    factor = 0.99 if path == ("events", 2, 1) else 1.01
    with pytest.raises(AssertionError):
        checks.check_synth(altered(load("waveform", "synth_check"), path, factor))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_tunes_written_as_abc(case):
    (tune,) = parse_abc(checks.as_abc(case), case["file"])
    assert tune.source == case["file"] + "#1"
    checks.check_abc(case, tune)


@pytest.mark.skipif(importlib.util.find_spec("music21") is None, reason="the files are part of music21")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_tunes_of_the_collection(case):
    (folder,) = importlib.util.find_spec("music21").submodule_search_locations
    (tune,) = read_abc(Path(folder) / "corpus" / case["file"])
    assert tune.source == case["file"] + "#1"
    checks.check_abc(case, tune)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_every_value_of_a_tune_counts(case):
    (tune,) = parse_abc(checks.as_abc(case))
    compared = [path for path in paths(case) if path != ("file",)]
    assert len(compared) > 200
    for path in compared:
        with pytest.raises(AssertionError):
            checks.check_abc(altered(case, path), tune)


@pytest.fixture
def shipped():
    rows = [json.loads(line) for line in Path(asset_path("folk_tunes/tunes.jsonl")).read_text().splitlines()]
    return rows, load_tunes("builtin"), load("waveform", "metrics_expected")["krumhansl_weights"]


def test_shipped_tunes(shipped):
    checks.check_builtin(load("waveform", "builtin_tunes"), *shipped)


def test_every_value_of_shipped_tunes_counts(shipped):
    data = load("waveform", "builtin_tunes")
    for path in paths(data):
        with pytest.raises(AssertionError):
            checks.check_builtin(altered(data, path), *shipped)
