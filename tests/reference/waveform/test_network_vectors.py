import pytest
import torch

from lit_models.diffusion.modeling import convert_dance_diffusion

from ..loading import load, load_tensors
from . import network_checks

CHECKS = {
    "blocks": network_checks.check_blocks,
    "csa": network_checks.check_csa,
    "fourier": network_checks.check_fourier,
    "resample": network_checks.check_resample,
    "unet": lambda tensors: network_checks.check_unet(tensors, load("waveform", "info")),
}
ELSEWHERE = {("csa", "masked_mean")}  # a matter of the text encoder
NAMES = [(file, name) for file in CHECKS for name in load_tensors("waveform", file) if (file, name) not in ELSEWHERE]
OUTPUTS = [
    (file, name)
    for file, name in NAMES
    if name.split(".")[-1] == "y"
    or name.split("_")[0] in ("y", "down", "up", "grad")
    or name in ("embedding", "planes", "learned_down", "learned_up")
]


@pytest.mark.parametrize("file", CHECKS)
def test_vectors(file):
    CHECKS[file](load_tensors("waveform", file))


def fails(file, tensors):
    try:
        CHECKS[file](tensors)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize(("file", "name"), OUTPUTS)
def test_one_percent_of_one_row_fails(file, name):
    tensors = load_tensors("waveform", file)
    stored = tensors[name]
    for row in range(len(stored)):
        tensors[name] = stored.clone()
        tensors[name][row] *= 1.01
        assert fails(file, tensors), row


@pytest.mark.parametrize(("file", "name"), OUTPUTS)
def test_one_percent_of_one_value_fails(file, name):
    tensors = load_tensors("waveform", file)
    values = tensors[name].view(-1)
    values[values.abs().argmax()] *= 1.01
    assert fails(file, tensors)


# The softmax does not change when all keys are shifted, so these biases are without effect or nearly so.
NEUTRAL = {("csa", "w.to_k.bias")}


@pytest.mark.parametrize(
    ("file", "name"),
    [pair for pair in NAMES if pair not in OUTPUTS and pair not in NEUTRAL and pair[0] != "unet"],
)
def test_other_inputs_and_weights_fail(file, name):
    tensors = load_tensors("waveform", file)
    if tensors[name].dtype == torch.bool:
        tensors[name] = ~tensors[name]
    else:
        tensors[name] = tensors[name] * 1.1
    assert fails(file, tensors)


def test_every_weight_of_the_network_is_used():
    tensors, info = load_tensors("waveform", "unet"), load("waveform", "info")
    weights = [name for name in tensors if name.startswith("w.")]
    model = network_checks.network(tensors, info)
    assert len(list(model.parameters())) == len(weights)
    model(tensors["x"], tensors["t"]).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_changes_of_rate_are_not_converted():
    weights = network_checks.under(load_tensors("waveform", "unet"), "w.")
    filters = ("net.3.main.0.kernel", "net.3.main.14.kernel", "net.3.main.7.main.0.kernel", "net.3.main.7.main.14.bias")
    more = weights | dict.fromkeys(filters, torch.zeros(8))
    assert convert_dance_diffusion(more).keys() == convert_dance_diffusion(weights).keys()
    assert len(convert_dance_diffusion(weights)) == len(weights)
