"""Simulators and metrics against the reference vectors, and proof that every stored number is really compared."""

import pytest
import torch

from ..loading import load, load_tensors
from . import simulator_checks as checks
from .simulator_checks import Vectors, compare

# Networks of the released code that none of its results depends on.
WITHOUT_EFFECT = ("enc_concat.param.mlp_a", "enc_concat.param.mlp_b")


def vectors():
    return Vectors(
        load_tensors("influence", "simulators"), load_tensors("influence", "extensions"), load("influence", "meta")
    )


FUNCTIONS = checks.all_results(vectors())
COMPUTED = {name: function(vectors()) for name, function in FUNCTIONS.items()}
RESULTS = sorted({key for results in COMPUTED.values() for key in results})
STORED = vectors().stored()
TENSORS = [*vectors().simulators, *vectors().extensions]
INPUTS = sorted(set(TENSORS) - set(RESULTS))
METRIC_INPUTS = sorted(
    {name for name in STORED if name.startswith("metrics.")} - set(RESULTS) - {"metrics.spearman_constant.b"}
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_equal_the_stored_ones(name):
    assert COMPUTED[name]
    compare(COMPUTED[name], STORED)


def test_every_result_is_compared():
    results = {name for name in TENSORS if any(part in name for part in (".out.", ".grad.", ".pred", "ridge_l"))}
    assert results | {"feat.A", "feat.B"} == {name for name in RESULTS if name in TENSORS}
    numbers = set(STORED) - set(TENSORS)
    given = ("gt", "cum_influence", "a", "b", "score", "is_noise", "subset_ids", "subset_target")
    inputs = {name for name in numbers if name.startswith("metrics.") and name.rpartition(".")[2] in given}
    sizes = {"seed", "n_train", "n_test", "embed_dim", "run_batch", "rows"}
    assert numbers - inputs - sizes == set(RESULTS) - set(TENSORS)


@pytest.mark.parametrize("key", RESULTS)
def test_one_percent_of_any_number_of_a_result_fails(key):
    """One number at a time: the greatest one of every row, and each one whose hundredth exceeds the tolerance."""
    stored = STORED[key].double()
    for name, results in COMPUTED.items():
        if key not in results:
            continue
        value, relative, absolute = results[key]
        altered = 1.01 * stored
        noticed = (value.double() - altered).abs() > absolute + relative * altered.abs()
        assert bool(noticed[stored.abs() > 300 * absolute].all()), name
        rows = stored.reshape(len(stored), -1) if stored.ndim else stored.reshape(1, 1)
        for row in range(0, len(rows), max(1, len(rows) // 6)):
            column = int(rows[row].abs().argmax())
            if abs(rows[row, column]) <= 300 * absolute:
                continue
            changed = rows.clone()
            changed[row, column] *= 1.01
            with pytest.raises(AssertionError):
                compare({key: results[key]}, {key: changed.reshape(stored.shape)})


def test_most_numbers_are_larger_than_the_tolerance():
    for results in COMPUTED.values():
        for key, (_, _, absolute) in results.items():
            stored = STORED[key].abs()
            stored = stored[stored > 0]
            assert not len(stored) or float((stored > 300 * absolute).double().mean()) > 0.5, key


def fails(changed, *names):
    """Whether a result that depends on an altered input differs."""
    stored = STORED
    for name, function in FUNCTIONS.items():
        if not names or name.split(":")[0] in names:
            try:
                compare(function(changed), stored)
            except (AssertionError, RuntimeError, ValueError):
                return True
    return False


def users(name):
    """Functions that read an input."""
    if name.startswith(("feat.", "rollout.in")):
        return ("extensions", "ridge") if "rollout" not in name else ("extensions", "ridge", "rollout")
    return ("rollout",) if name.startswith("rollout.") else ("row_form", "factors")


@pytest.mark.parametrize("name", INPUTS)
def test_another_input_fails(name):
    data = vectors()
    file = data.simulators if name in data.simulators else data.extensions
    stored = file[name]
    whole = stored + 1 if not stored.is_floating_point() else 1.01 * stored
    if not stored.is_floating_point():
        whole = whole % (data.meta["n_test"] if name == "in.test_ids" else data.meta["n_train"])
    if name == "feat.in.lr":  # only ratios of learning rates count
        whole = stored.flip(0)
    file[name] = whole
    assert fails(data, *users(name)) != name.startswith(WITHOUT_EFFECT)


@pytest.mark.parametrize("name", [name for name in INPUTS if ".in." in name or name.startswith("in.")])
def test_another_row_of_an_input_fails(name):
    data = vectors()
    file = data.simulators if name in data.simulators else data.extensions
    stored = file[name]
    used = set(data.simulators["in.order_ids"].flatten().tolist())
    for row in range(len(stored)):
        unused = name == "in.h_test" and row not in data.simulators["in.test_ids"].tolist()
        unused |= name == "in.h_train" and row not in used
        if not bool(stored[row].any()) or (unused and "rollout" not in users(name)):
            continue
        file[name] = stored.clone()
        size = data.meta["n_test"] if name == "in.test_ids" else data.meta["n_train"]
        file[name][row] = 1.01 * stored[row] if stored.is_floating_point() else (stored[row] + 1) % size
        assert fails(data, *users(name)), row


@pytest.mark.parametrize("name", METRIC_INPUTS)
def test_another_input_of_a_metric_fails(name):
    *path, last = name.split(".")
    data = vectors()
    node = data.meta
    for key in path:
        node = node[key]
    node[last] = node[last][::-1] if name != "metrics.spearman_constant.a" else [1.0, 2.0, 3.0, 4.0]
    assert fails(data, "metrics")


@pytest.mark.parametrize("name", ["n_train", "n_test", "embed_dim", "run_batch", "rows"])
def test_another_size_fails(name):
    data = vectors()
    data.meta = data.meta | {name: data.meta[name] + 1}
    assert fails(data)


def test_vectors_are_finite():
    assert all(bool(torch.isfinite(value).all()) for value in STORED.values())


def test_root_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("REFERENCE_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="meta"):
        load("influence", "meta")
