"""Training rows as the released data set makes them, and whether every stored number is really compared."""

import copy
import shutil

import pytest

from datamodules.gptdynamics import ReleasedRun, export_gptdynamics, import_gptdynamics
from lit_models.recording import DynamicsRun

from ..loading import DEFAULT_ROOT, load
from .samples_checks import check_case, check_samples, released_rows, write_run

CASES = range(7)
VALUES = ("cur_loss", "prev_loss", "cur_step", "prev_step", "samples_id", "test_sample_id", "prev_n_steps")


@pytest.fixture(scope="module")
def data():
    return load("influence", "samples")


def changed(value):
    """1 % more of a number, and another id or step."""
    if isinstance(value, list):
        return [changed(value[0]), *value[1:]]
    return value * 1.01 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("number", CASES)
def test_rows_are_those_of_the_released_data_set(data, number):
    check_case(data["runs"][0], data["cases"][number])


def test_no_case_is_left_out(data):
    assert len(data["cases"]) == len(CASES)
    arguments = [case["args"] for case in data["cases"]]
    assert arguments == [
        {},
        {"cp_interval": 1},
        {"cp_interval": 3},
        {"order_n": 2},
        {"order_n": 3},
        {"step_thres": 3},
        {"lo": "0,3", "hi": "1,3"},
    ]


@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize("key", [*VALUES, "prev_n_losses"])
def test_one_percent_or_another_id_fails(data, number, key):
    case = copy.deepcopy(data["cases"][number])
    if key not in case["samples"][0]:
        assert case["args"].get("order_n", 1) == 1
        return
    for place in (0, len(case["samples"]) // 2, len(case["samples"]) - 1):
        sample = case["samples"][place]
        before, sample[key] = sample[key], changed(sample[key])
        if sample[key] == before:  # the made-up 0 before the first value
            sample[key] = [*before[:-1], changed(before[-1])]
        with pytest.raises(AssertionError):
            check_case(data["runs"][0], case)
        sample[key] = before


@pytest.mark.parametrize("test", range(5))
@pytest.mark.parametrize("step", range(9))
def test_every_value_of_the_run_counts(data, test, step):
    altered = copy.deepcopy(data)
    altered["runs"][0]["all_loss_trajectory"][test]["loss_trajectory"][step]["loss"] *= 1.01
    with pytest.raises(AssertionError):
        check_case(altered["runs"][0], altered["cases"][0])


@pytest.mark.parametrize("step", range(1, 9))
def test_every_batch_of_the_run_counts(data, step):
    altered = copy.deepcopy(data["runs"][0])
    altered["train_samples_id"][step]["samples_id"][1] += 1
    with pytest.raises(AssertionError):
        check_case(altered, data["cases"][0])


@pytest.mark.parametrize("number", CASES)
def test_rows_in_another_order_or_number_fail(data, number):
    case = copy.deepcopy(data["cases"][number])
    case["samples"][0], case["samples"][1] = case["samples"][1], case["samples"][0]
    with pytest.raises(AssertionError):
        check_case(data["runs"][0], case)
    with pytest.raises(AssertionError):
        check_case(data["runs"][0], data["cases"][number] | {"samples": data["cases"][number]["samples"][:-1]})


@pytest.mark.parametrize(("key", "value"), [("cp_interval", 2), ("order_n", 2), ("step_thres", 4)])
def test_other_arguments_fail(data, key, value):
    for case in data["cases"]:
        if case["args"].get(key) != value:
            with pytest.raises((AssertionError, ValueError)):  # an interval allows no order above 1
                check_case(data["runs"][0], {"args": case["args"] | {key: value}, "samples": case["samples"]})


def test_the_converted_run_gives_the_same_rows(data, tmp_path):
    write_run(data["runs"][0], tmp_path / "released")
    (converted,) = import_gptdynamics(tmp_path / "released", tmp_path / "ours")
    for case in data["cases"]:
        theirs, ours = (released_rows(folder, case["args"]) for folder in (tmp_path / "released", converted))
        assert theirs.keys() == ours.keys()
        assert all((theirs[key] == ours[key]).all() for key in theirs)
    export_gptdynamics(DynamicsRun.open(converted), tmp_path / "back")
    first, second = ReleasedRun.open(tmp_path / "released"), ReleasedRun.open(tmp_path / "back")
    assert (first.values() == second.values()).all()
    assert first.ids.padded().tolist() == second.ids.padded().tolist()


@pytest.mark.parametrize("folder", ["influence", "."])
def test_root_from_the_environment(folder, tmp_path, monkeypatch, data):
    import json

    (tmp_path / folder).mkdir(exist_ok=True)
    shutil.copy(DEFAULT_ROOT / "influence/samples.json", tmp_path / folder)
    monkeypatch.setenv("REFERENCE_ROOT", str(tmp_path))
    check_samples(load("influence", "samples"))
    altered = copy.deepcopy(data)
    altered["cases"][3]["samples"][5]["cur_loss"] *= 1.01
    (tmp_path / folder / "samples.json").write_text(json.dumps(altered))
    with pytest.raises(AssertionError):
        check_samples(load("influence", "samples"))
