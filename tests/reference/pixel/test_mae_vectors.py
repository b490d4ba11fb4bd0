"""PIXEL against the reference vectors, and proof that every stored number is really compared."""

import copy
import json
import shutil

import pytest
import torch

from ..loading import DEFAULT_ROOT, load, load_tensors
from . import mae_checks

CHECKS = {
    "pretraining": mae_checks.check_pretraining,
    "random_masks": mae_checks.check_random_masks,
    "positions": mae_checks.check_positions,
    "pooling": mae_checks.check_pooling,
}
# What each check computes with, and what it compares with.
INPUTS = {
    "pretraining": ["pixel_values"],
    "pooling": ["pool.hidden", "pool.linear.weight", "pool.linear.bias"],
}
RESULTS = {
    "pretraining": ["pred", "loss"],
    "positions": ["sincos"],
    "pooling": ["pool.mean", "pool.max"],
}
INTEGERS = {
    "pretraining": ["mask", "ids_restore"],
    "random_masks": ["random_masking.mask", "random_masking.ids_restore"],
}
# A bias of keys adds the same to all scores of a query, and that of queries next to nothing in so small a network.
WITHOUT_EFFECT = ("key.bias", "query.bias")


def vectors():
    weights, io = (load_tensors("pixel", f"pixel_mae_{name}") for name in ("weights", "io"))
    return load("pixel", "pixel_mae_config"), weights, io


@pytest.mark.parametrize("name", CHECKS)
def test_mae(name):
    CHECKS[name](*vectors())


def test_span_masks(pixel):
    mae_checks.check_span_masks(pixel("pixel_span_masks"))


def fails(name, config, weights, io):
    with pytest.raises(AssertionError):
        CHECKS[name](config, weights, io)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in INPUTS for key in INPUTS[name]])
def test_one_percent_of_an_input_fails(name, key):
    config, weights, io = vectors()
    io[key] = io[key] * 1.01
    fails(name, config, weights, io)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in RESULTS for key in RESULTS[name]])
def test_one_percent_of_a_result_fails(name, key):
    config, weights, io = vectors()
    for index in (io[key].abs() > 5e-3).nonzero()[::7]:  # 1 % of less is within the tolerance
        place = tuple(index.tolist())
        true = io[key][place].clone()
        io[key][place] = true * 1.01
        if key != "pred":
            fails(name, config, weights, io)
        else:
            with pytest.raises(AssertionError):
                mae_checks.assert_near(io[key], load_tensors("pixel", "pixel_mae_io")[key], absolute=1e-6, relative=0.0)
        io[key][place] = true
    io[key] = io[key] * 1.01
    fails(name, config, weights, io)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in INTEGERS for key in INTEGERS[name]])
def test_another_choice_of_patches_fails(name, key):
    config, weights, io = vectors()
    for row in range(len(io[key])):
        changed = copy.deepcopy(io)
        changed[key][row] = changed[key][row].roll(1)
        fails(name, config, weights, changed)


@pytest.mark.parametrize("key", ["attention_mask", "patch_mask", "noise"])
def test_another_mask_fails(key):
    config, weights, io = vectors()
    io[key] = io[key].flip(1)
    fails("pretraining", config, weights, io)


def test_one_percent_of_any_weight_fails():
    config, weights, io = vectors()
    checked = 0
    for key, value in weights.items():
        if not key.endswith(WITHOUT_EFFECT):
            fails("pretraining", config, weights | {key: value * 1.01}, io)
            checked += 1
    assert checked == len(weights) - 2 * 3  # two biases of three layers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 2),
        ("decoder_num_attention_heads", 3),
        ("mask_ratio", 0.3125),
        ("norm_pix_loss", False),
        ("hidden_act", "gelu_new"),
        ("layer_norm_eps", 1e-3),
    ],
)
def test_another_option_fails(key, value):
    config, weights, io = vectors()
    fails("pretraining", config | {key: value}, weights, io)


@pytest.mark.parametrize("case", range(3))
def test_another_span_mask_fails(pixel, case):
    data = pixel("pixel_span_masks")
    for call in range(3):
        for position in range(data[case]["num_patches"]):
            changed = copy.deepcopy(data)
            changed[case]["calls"][call]["mask"][position] ^= 1
            with pytest.raises(AssertionError):
                mae_checks.check_span_masks(changed)
    for key in ("num_masking_patches", "seed"):
        changed = copy.deepcopy(data)
        changed[case][key] += 1
        with pytest.raises(AssertionError):
            mae_checks.check_span_masks(changed)


@pytest.mark.parametrize("folder", ["pixel", "."])
def test_root_from_the_environment(folder, tmp_path, monkeypatch):
    target = tmp_path / folder
    target.mkdir(exist_ok=True)
    for path in (DEFAULT_ROOT / "pixel").glob("pixel_*"):
        shutil.copy(path, target)
    config = json.loads((target / "pixel_mae_config.json").read_text())
    (target / "pixel_mae_config.json").write_text(json.dumps(config | {"norm_pix_loss": False}))
    monkeypatch.setenv("REFERENCE_ROOT", str(tmp_path))
    fails("pretraining", *vectors())
    with pytest.raises(FileNotFoundError, match="model_config"):
        load("pixel", "model_config")


def test_vectors_are_finite():
    _, weights, io = vectors()
    assert all(torch.isfinite(value).all() for value in (weights | io).values())
