import copy

import pytest

from ..loading import load, load_tensors
from . import process_checks as checks

INFO = load("waveform", "info")


def test_schedule():
    checks.check_schedule(load_tensors("waveform", "schedule"))


def test_targets_and_loss():
    checks.check_v_target(load_tensors("waveform", "v_target"))


def test_decay_of_the_average():
    checks.check_ema(load("waveform", "ema"))


@pytest.mark.parametrize("name", checks.SAMPLERS)
def test_sampler(name):
    checks.SAMPLERS[name](load_tensors("waveform", "samplers"), INFO)


@pytest.mark.parametrize("name", checks.GUIDANCE)
def test_guidance(name):
    checks.GUIDANCE[name](load_tensors("waveform", "cfg"), INFO)


def test_spectral_term():
    checks.check_stft(load_tensors("waveform", "metrics_inputs"), load("waveform", "metrics_expected"))


# -- every stored number is really compared ----------------------------------------------------------------------------

FILES = {"schedule": checks.check_schedule, "v_target": checks.check_v_target}
PARTS = {"samplers": checks.SAMPLERS, "cfg": checks.GUIDANCE}
# The tensors of one check carry its name at their beginning; everything else is data that several checks share.
OWNERS = {
    "crash_ddim_": "ddim_",
    "sat_ddim_": "ddim_",
    "diffusers_ddim_": "ddim_",
    "diffusers_edm": "edm",
    "kd.": "edm",
    "gmm_": "mixture",
    "sat_w3.0_phi": "defect",
    "exact_ode": "exact",
}


def run_check(file, name, data, info=INFO):
    if file in FILES:
        FILES[file](data)
        return
    key = name
    for prefix, owner in OWNERS.items():
        if name.startswith(prefix):
            key = name.replace(prefix, owner) if owner.endswith("_") else owner
    for ending in (".y", ".trace", ".noise"):
        key = key.removesuffix(ending)
    if key.startswith("eta"):
        key = key.removesuffix("_10")
    if key.split(".")[0] in ("var", "inp", "ipndm"):
        key = key.split(".")[0]
    default = {"samplers": "ddim_5", "cfg": "guidance"}[file]
    PARTS[file].get(key, PARTS[file][default])(data, info)


# Where values of the data are independent, what is kept never acts on the rest, and so its noise has no effect at all.
WITHOUT_EFFECT = {"inp.noise"}
TENSORS = [
    (file, name) for file in (*FILES, *PARTS) for name in load_tensors("waveform", file) if name not in WITHOUT_EFFECT
]


def altered(tensor, index=None):
    tensor = tensor.clone()
    if not tensor.is_floating_point():
        tensor.view(-1)[0] ^= True
        return tensor
    flat = tensor.view(-1)
    flat[slice(None) if index is None else index] *= 1.01
    return tensor


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_one_percent_of_a_tensor_fails(file, name):
    data = load_tensors("waveform", file)
    run_check(file, name, data)
    data[name] = altered(data[name])
    with pytest.raises(AssertionError):
        run_check(file, name, data)


# The source is read where it is kept only, and the start elsewhere.
PARTLY_READ = {"inp.source", "inp.mask", "inp.start"}


@pytest.mark.parametrize(("file", "name"), [pair for pair in TENSORS if pair[1] not in PARTLY_READ])
def test_one_percent_of_one_number_fails(file, name):
    original = load_tensors("waveform", file)
    flat = original[name].view(-1)
    large = (flat.abs() > 5e-3).nonzero()[:, 0]  # 1 % of smaller numbers is within the tolerance
    for index in {large[0].item(), large[-1].item(), flat.abs().argmax().item()}:
        data = dict(original)
        data[name] = altered(original[name], index)
        with pytest.raises(AssertionError):
            run_check(file, name, data)


@pytest.mark.parametrize(
    ("owner", "path"),
    [
        ("var", ("var_t0",)),
        ("var", ("var_steps",)),
        ("inp", ("inpaint", "steps")),
        ("inp", ("inpaint", "resamples")),
        *(("guidance", ("cfg", "ws", index)) for index in range(3)),
        *(("guidance", ("cfg", "phis", index)) for index in range(3)),
        ("mixture", ("cfg", "gsteps")),
    ],
    ids=str,
)
def test_every_option_counts(owner, path):
    info = copy.deepcopy(INFO)
    holder = info
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    holder[path[-1]] = value + 1 if isinstance(value, int) else value * 1.01 + 0.01
    file = "samplers" if owner in checks.SAMPLERS else "cfg"
    with pytest.raises((AssertionError, KeyError)):  # the names of results hold options
        PARTS[file][owner](load_tensors("waveform", file), info)


@pytest.mark.parametrize("key", checks.EMA)
def test_every_decay_counts(key):
    for index in range(len(load("waveform", "ema")["steps"])):
        data = load("waveform", "ema")
        data[key][index] = data[key][index] * 1.01 + 1e-5
        with pytest.raises(AssertionError):
            checks.check_ema(data)


def test_steps_of_the_decay_count():
    data = load("waveform", "ema")
    data["steps"] = [step + 1 for step in data["steps"]]
    with pytest.raises(AssertionError):
        checks.check_ema(data)


@pytest.mark.parametrize("key", ["mrstft_auraloss", "stft_single_auraloss", "wav_x", "wav_y"])
def test_every_number_of_the_spectral_term_counts(key):
    inputs, expected = load_tensors("waveform", "metrics_inputs"), load("waveform", "metrics_expected")
    holder = inputs if key in inputs else expected
    holder[key] = holder[key] * 1.01
    with pytest.raises(AssertionError):
        checks.check_stft(inputs, expected)
