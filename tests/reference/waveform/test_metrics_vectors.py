import copy

import pytest

from ..loading import load, load_tensors
from . import metrics_checks


@pytest.mark.parametrize("check", metrics_checks.CHECKS, ids=lambda check: check.__name__)
def test_metrics(check):
    check(load_tensors("waveform", "metrics_inputs"), load("waveform", "metrics_expected"))


def values(node, path=()):
    """Paths of all numbers and key names."""
    if isinstance(node, (dict, list)):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from values(item, (*path, key))
    elif path != ("mrstft_cfg",):  # says in words how the numbers were made
        yield path


def altered(data, path):
    """A copy in which one number is 1 % larger (one near zero: by 0.01), or one text longer."""
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    if isinstance(value, str):
        holder[path[-1]] = value + "x"
    else:
        holder[path[-1]] = value * 1.01 if abs(value) > 1e-6 else value + 0.01
    return data


@pytest.mark.parametrize("path", list(values(load("waveform", "metrics_expected"))), ids=str)
def test_every_number_counts(path):
    expected = altered(load("waveform", "metrics_expected"), path)
    with pytest.raises(AssertionError):
        metrics_checks.check_all(load_tensors("waveform", "metrics_inputs"), expected)


@pytest.mark.parametrize("name", sorted(load_tensors("waveform", "metrics_inputs")))
def test_every_input_counts(name):
    inputs = load_tensors("waveform", "metrics_inputs")
    inputs[name] = metrics_checks.rolled(inputs[name])
    with pytest.raises(AssertionError):
        metrics_checks.check_all(inputs, load("waveform", "metrics_expected"))
