"""Gradient influence against the reference vectors, and proof that every stored number is really compared."""

import copy
import shutil

import pytest
import torch

from ..loading import DEFAULT_ROOT, load, load_tensors
from . import tracin_checks

CHECKS = {
    "losses": tracin_checks.check_losses,
    "norms": tracin_checks.check_norms,
    "dots": tracin_checks.check_dots,
    "scores": tracin_checks.check_scores,
    "trajectory": tracin_checks.check_trajectory,
}
# What each check compares with.
RESULTS = {
    "losses": ["losses"],
    "norms": ["grad_norm", "self_full"],
    "dots": ["dot_full", "dot_last_layer"],
    "scores": ["tracincp_full", "tracincp_self", "graddot_full", "gradcos_full"],
    "trajectory": ["traj.pred_mean_reduction", "traj.pred_sum_reduction"],
}
WEIGHTS = ["in.emb", "in.W1", "in.b1", "in.W2"]


@pytest.fixture
def data():
    return load_tensors("influence", "tracin")


def fails(name, data):
    with pytest.raises(AssertionError):
        CHECKS[name](data)


@pytest.mark.parametrize("name", CHECKS)
def test_vectors(name, data):
    CHECKS[name](data)


def test_scale():
    tracin_checks.check_scale(load("influence", "meta")["metrics"]["rescale"])


def test_all_results_are_compared(data):
    compared = {key for keys in RESULTS.values() for key in keys}
    assert {key for key in data if ".in." not in key and not key.startswith("in.")} == compared | {"released_fast_dot"}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in RESULTS for key in RESULTS[name]])
def test_one_percent_of_any_result_fails(name, key, data):
    """All at once, and the largest in each place of the first axis."""
    true = data[key]
    data[key] = true * 1.01
    fails(name, data)
    for number, part in enumerate(true):
        data[key] = true.clone()
        place = part.abs().argmax()
        data[key][number].view(-1)[place] *= 1.01
        fails(name, data)


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("name", CHECKS)
def test_one_percent_of_any_weight_fails(name, key, data):
    data[key] = data[key] * 1.01
    fails(name, data)


@pytest.mark.parametrize("name", ["scores", "trajectory"])
def test_one_percent_of_a_learning_rate_fails(name, data):
    for number in range(3):
        changed = copy.deepcopy(data)
        changed["in.lr"][number] *= 1.01
        fails(name, changed)


@pytest.mark.parametrize("name", ["losses", "norms", "dots", "scores", "trajectory"])
def test_other_tokens_and_labels_fail(name, data):
    changed = copy.deepcopy(data)
    changed["in.labels"][[0, 5], 3] = -100
    fails(name, changed)
    changed = copy.deepcopy(data)
    changed["in.input_ids"][[0, 5], 4] = 7
    fails(name, changed)
    changed = copy.deepcopy(data)
    changed["in.attention_mask"][[0, 5], 4] = 0
    fails(name, changed)


def test_another_step_fails(data):
    data["traj.in.ids"] = data["traj.in.ids"].flip(0)
    fails("trajectory", data)


@pytest.mark.parametrize("key", ["gt", "cum_influence"])
def test_another_scale_fails(key):
    case = load("influence", "meta")["metrics"]["rescale"]
    case[key] = (torch.tensor(case[key]) * 1.01).tolist()
    with pytest.raises(AssertionError):
        tracin_checks.check_scale(case)


def last_layer_parts(data):
    """Error (C,8,6,V) and input (C,8,7,H) of the last layer at each position; errors are those of the mean loss."""
    errors, inputs = [], []
    for checkpoint in tracin_checks.checkpoints(data):
        model = tracin_checks.PositionWise(*data["in.emb"].shape[1:])
        model.load_state_dict(checkpoint)
        with torch.no_grad():
            inputs.append(torch.tanh(model.first(model.emb(data["in.input_ids"]))))
            probabilities = model.last(inputs[-1]).softmax(-1)[:, :-1]
        targets = data["in.labels"][:, 1:, None]
        ones = torch.zeros_like(probabilities).scatter(-1, targets.clamp(min=0), 1.0)
        kept = (targets != -100).float()
        errors.append((probabilities - ones) * kept / kept.sum(1, keepdim=True))
    return torch.stack(errors), torch.stack(inputs)


def test_last_layer_in_closed_form(data):
    errors, inputs = last_layer_parts(data)
    train, test = slice(0, 5), slice(5, None)
    between = torch.einsum("cisv,cjtv->cijst", errors[:, train], errors[:, test])
    between = between * torch.einsum("cish,cjth->cijst", inputs[:, train, :-1], inputs[:, test, :-1])
    torch.testing.assert_close(between.sum((-1, -2)), data["dot_last_layer"], rtol=1e-4, atol=1e-5)


def test_released_shortcut_is_another_number(data):
    """The released code sums errors and inputs over all positions before it multiplies them."""
    errors, inputs = last_layer_parts(data)
    errors, inputs = errors.sum(2), inputs.sum(2)
    product = (errors[:, :5] @ errors[:, 5:].mT) * (inputs[:, :5] @ inputs[:, 5:].mT)
    tokens = (data["in.labels"][:5, 1:] != -100).sum(1)[:, None]
    factor = data["released_fast_dot"] / (product * tokens)  # its loss is a sum over answer tokens up to a constant
    torch.testing.assert_close(factor, factor[0, 0, 0].expand_as(factor), rtol=1e-3, atol=0.0)
    pairs = torch.stack([data["released_fast_dot"].flatten(), data["dot_last_layer"].flatten()])
    assert torch.corrcoef(pairs)[0, 1] < 0.7


@pytest.mark.parametrize("folder", ["influence", "."])
def test_root_from_the_environment(folder, tmp_path, monkeypatch, data):
    from safetensors.torch import save_file

    (tmp_path / folder).mkdir(exist_ok=True)
    save_file(data | {"losses": data["losses"] * 1.01}, tmp_path / folder / "tracin.safetensors")
    shutil.copy(DEFAULT_ROOT / "influence/meta.json", tmp_path / folder)
    monkeypatch.setenv("REFERENCE_ROOT", str(tmp_path))
    fails("losses", load_tensors("influence", "tracin"))
