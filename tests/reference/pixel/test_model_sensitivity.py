"""Every stored number of the networks is really compared: changing it makes a check fail."""

import copy

import pytest
import torch

from ..loading import load, load_tensors
from .model_checks import ABSOLUTE, CHECKS, Vectors, check_all, check_attention_mask

WITHOUT_EFFECT = {"rand_pred_seed_only"}  # says where `rand_pred` came from
POSITIONS = {
    f"{kind}.{name}": (kind, mask)
    for kind, name, mask in (
        ("text", "embed", "text_mask"),
        ("text", "last_hidden", "text_mask"),
        ("text", "logits", "text_mask"),
        ("pixel", "embed", "pixel_mask"),
        ("pixel", "last_hidden", "pixel_mask"),
        ("pixel", "pred", "pixel_mask"),
        ("pair", "logits", "text_mask"),
        ("pair", "pred", "pixel_mask"),
    )
}
FLOATS, INTEGERS = [], []
for file in ("model_weights", "model_io", "classifier"):
    for tensor_name, tensor in load_tensors("pixel", file).items():
        is_float = tensor.is_floating_point() and tensor_name != "pixel_mask"
        if tensor_name not in WITHOUT_EFFECT:
            (FLOATS if is_float else INTEGERS).append((file, tensor_name))


@pytest.fixture
def vectors():
    return Vectors(
        load("pixel", "model_config"),
        load_tensors("pixel", "model_weights"),
        load_tensors("pixel", "model_io"),
        load_tensors("pixel", "classifier"),
    )


def part(vectors, file):
    return {"model_weights": vectors.weights, "model_io": vectors.io, "classifier": vectors.classifier}[file]


def fails(vectors):
    for check in CHECKS.values():
        try:
            check(vectors)
        except AssertionError:
            return True
    return False


def test_unaltered_passes(vectors):
    check_all(vectors)


@pytest.mark.parametrize(("file", "name"), FLOATS)
def test_one_percent_fails(vectors, file, name):
    tensors = part(vectors, file)
    tensors[name] = tensors[name] * 1.01
    assert fails(vectors)


@pytest.mark.parametrize(("file", "name"), [pair for pair in FLOATS if pair[0] != "model_weights"])
def test_one_percent_of_one_row_fails(vectors, file, name):
    tensors = part(vectors, file)
    stored = tensors[name]
    for row in range(len(stored)):
        tensors[name] = stored.clone()
        tensors[name][row] *= 1.01
        if torch.equal(tensors[name], stored):  # a blank strip has targets of zero
            tensors[name][row] += 0.01 * stored.abs().max()
        assert fails(vectors), row


@pytest.mark.parametrize("name", sorted({*load_tensors("pixel", "model_io")} & POSITIONS.keys()))
def test_one_value_at_the_last_attended_position_fails(vectors, name):
    check, mask = POSITIONS[name]
    stored = vectors.io[name]
    for row, last in enumerate(vectors.io[mask].sum(1).long() - 1):
        vectors.io[name] = stored.clone()
        state = vectors.io[name][row, last]
        state[state.abs().argmax()] += 0.01 * stored.abs().max()
        with pytest.raises(AssertionError):
            CHECKS[check](vectors)


@pytest.mark.parametrize(("file", "name"), INTEGERS)
def test_other_integers_fail(vectors, file, name):
    tensors = part(vectors, file)
    stored = tensors[name]
    for row in range(len(stored)):
        tensors[name] = stored.clone()
        if name.endswith("_mask"):
            tensors[name][row, int(stored[row].sum()) - 1] = 0
        else:
            tensors[name].view(len(stored), -1)[row, 0] = (stored.view(len(stored), -1)[row, 0] + 1) % 3
        assert fails(vectors), row


@pytest.mark.parametrize("name", ["rope_theta", "norm_pix_loss"])
def test_other_options_fail(vectors, name):
    value = vectors.config[name]
    vectors.config[name] = value * 1.01 if isinstance(value, float) else not value
    assert fails(vectors)


@pytest.mark.parametrize("row", range(len(load("pixel", "attention_mask"))))
def test_other_attention_mask_fails(row):
    cases = load("pixel", "attention_mask")
    check_attention_mask(cases)
    altered = copy.deepcopy(cases)
    altered[row]["mask_sum"] += 1
    with pytest.raises(AssertionError):
        check_attention_mask(altered)


def test_one_percent_is_more_than_the_tolerance(vectors):
    for file, name in FLOATS:
        assert part(vectors, file)[name].abs().max() * 0.01 > ABSOLUTE, name
