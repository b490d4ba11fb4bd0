import copy
import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lit_models.diffusion.blocks import ConditionalSelfAttention, PlaneConv1d, ResConvBlock
from lit_models.diffusion.modeling import PAPER_CHANNELS, WaveformUNet1DModel
from lit_models.diffusion.resampling import HALF_KERNELS, Downsample1d, Upsample1d, fold, unfold

TEXT_DIM = 12
SMALL = {
    "in_channels": 2,
    "channels": [8, 16, 32],
    "head_dim": 8,
    "attn_from_level": 2,
    "rep": 2,
    "text_dim": TEXT_DIM,
    "init_scale": 1.0,
}


def small(**options):
    torch.manual_seed(0)
    model = WaveformUNet1DModel(**(SMALL | options))
    for name, parameter in model.named_parameters():  # what starts at zero would hide mistakes
        if "modulate" in name or name == "null_vector":
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(length=48, channels=2, batch=2, tokens=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, channels, length, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "text_vector": torch.randn(batch, TEXT_DIM, generator=generator),
        "text_states": torch.randn(batch, tokens, TEXT_DIM, generator=generator),
        "text_mask": torch.arange(tokens) < torch.tensor([[tokens], [2]])[:batch],
    }


def run(model, **options):
    with torch.no_grad():
        return model(**options).sample


# -- sizes -------------------------------------------------------------------------------------------------------------


def counted(channels, io, planes, attn_from, text_dim=None, rep=3, kernel=5):
    """Parameters by hand."""

    def block(inputs, mid, outputs, last=False):
        convolutions = kernel * (inputs * mid + mid * outputs) + mid + outputs
        norms = 2 * mid + (0 if last else 2 * outputs)
        return convolutions + norms + (inputs * outputs if inputs != outputs else 0)

    def attention(width):
        text = 0 if text_dim is None else 2 * width * (text_dim + 1)
        return 2 * width + 3 * width * (width + 1) + width * (width + 1) + text

    total = 0
    for number, width in enumerate(channels):
        before = channels[number - 1] if number else io
        entry = before if number else io + planes
        inner = width if number == len(channels) - 1 else 2 * width
        total += block(entry, width, width) + (rep - 1) * block(width, width, width)
        total += block(inner, width, width) + (rep - 2) * block(width, width, width)
        total += block(width, width, before, last=number == 0)
        if attn_from is not None and number + 1 >= attn_from:
            total += (2 * rep - 1) * attention(width) + attention(before)
    return total


@pytest.mark.parametrize("text_dim", [None, 768])
def test_number_of_parameters_at_paper_scale(text_dim):
    with torch.device("meta"):
        model = WaveformUNet1DModel(text_dim=text_dim)
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = counted(PAPER_CHANNELS, 2, 16 + (text_dim or 0), 8, text_dim)
    if text_dim is None:
        assert total == expected + 8
        assert total == 227_699_210
    else:
        assert total == expected + 8 + text_dim


def test_initialisation_is_scaled():
    torch.manual_seed(0)
    whole = WaveformUNet1DModel(**SMALL)
    torch.manual_seed(0)
    half = WaveformUNet1DModel(**(SMALL | {"init_scale": 0.5}))
    for name, parameter in whole.named_parameters():
        assert_close(half.get_parameter(name), parameter * (0.5 if "levels" in name else 1.0))
    assert half.down_levels[0].blocks[0].norm_1.weight.eq(0.5).all()


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_constant_planes_equal_planes_spread_over_time(length, kernel):
    torch.manual_seed(0)
    convolution = PlaneConv1d(3 + 20, 6, kernel).double()
    x, planes = torch.randn(2, 3, length).double(), torch.randn(2, 20).double()
    spread = torch.cat([x, planes[..., None].expand(-1, -1, length)], 1)
    expected = convolution(spread)
    # Planes are summed in float32.
    assert_close(convolution(x, planes), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(convolution(x, planes).square().sum(), list(convolution.parameters()))
    others = torch.autograd.grad(expected.square().sum(), list(convolution.parameters()))
    assert_close(gradients, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [8, 23])
def test_block_with_planes(outputs):
    torch.manual_seed(0)
    block = ResConvBlock(3 + 20, 10, outputs)  # with 23 outputs the skip connection is the identity
    x, planes = torch.randn(2, 3, 9), torch.randn(2, 20)
    spread = torch.cat([x, planes[..., None].expand(-1, -1, 9)], 1)
    assert (block.skip is None) == (outputs == 23)
    assert_close(block(x, planes=planes), block(spread), rtol=1e-4, atol=1e-5)


def test_modulation_scales_and_shifts_the_first_norm():
    torch.manual_seed(0)
    block = ResConvBlock(4, 6, 5, modulation_dim=3)
    x, vector = torch.randn(2, 4, 9), torch.randn(2, 3)
    plain = ResConvBlock(4, 6, 5)
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if "modulate" not in name})
    assert torch.equal(block(x, vector), plain(x))
    torch.nn.init.normal_(block.modulate.weight)
    scale, shift = block.modulate(vector)[..., None].chunk(2, 1)
    h = F.gelu(block.norm_1(block.conv_1(x)) * (1 + scale) + shift)
    expected = F.gelu(block.norm_2(block.conv_2(h))) + block.skip(x)
    assert_close(block(x, vector), expected)


def test_resampling_equals_dense_filters():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20)
    for kernel, half in HALF_KERNELS.items():
        taps = torch.tensor([*half, *reversed(half)])
        size = len(taps)
        dense = torch.zeros(3, 3, size)
        dense[torch.arange(3), torch.arange(3)] = taps
        padded = F.pad(x, [size // 2 - 1] * 2, "reflect")
        assert_close(Downsample1d(kernel)(x), F.conv1d(padded, dense, stride=2))
        padded = F.pad(x, [size // 4] * 2, "reflect")
        # With odd size // 4 one more sample than the kernel's length less one belongs to the padding.
        cut = (2 * padded.shape[2] + size - 2 - 2 * x.shape[2]) // 2
        assert_close(Upsample1d(kernel)(x), F.conv_transpose1d(padded, 2 * dense, stride=2, padding=cut))
    constant = torch.ones(1, 1, 16)
    assert_close(Upsample1d()(Downsample1d()(constant)), constant)


def test_filters_survive_the_meta_device_and_short_dtypes():
    with torch.device("meta"):
        layer = Upsample1d("lanczos3")
    expected = Upsample1d("lanczos3").taps
    assert torch.equal(layer.to_empty(device="cpu").taps, expected)
    assert torch.equal(layer.to(torch.bfloat16).to(torch.float32).taps, expected)
    assert layer.state_dict() == {}
    assert torch.equal(Downsample1d().to(torch.bfloat16).taps.float(), Downsample1d().taps)


def test_folding():
    x = torch.arange(24.0).view(1, 2, 12)
    frames = fold(x, 4)
    assert frames.shape == (1, 8, 3)
    for channel in range(2):
        for phase in range(4):
            assert torch.equal(frames[0, channel * 4 + phase], x[0, channel, phase::4])
    assert torch.equal(unfold(frames, 4), x)
    assert fold(x, 1) is x


def test_attention_without_text_equals_a_text_that_is_masked_out():
    torch.manual_seed(0)
    layer = ConditionalSelfAttention(16, TEXT_DIM, head_dim=8)
    x, states = torch.randn(2, 16, 7), torch.full((2, 3, TEXT_DIM), 1e4)
    hidden = layer(x, states, torch.zeros(2, 3, dtype=torch.bool))
    assert_close(hidden, layer(x))
    assert not torch.allclose(layer(x, states), layer(x))


# -- network -----------------------------------------------------------------------------------------------------------


VARIANTS = {
    "concat": {},
    "projected": {"fuse_dim": 6},
    "sum": {"fuse": "sum"},
    "none": {"fuse": "none"},
    "adaln": {"adaln": True},
    "adaln only": {"adaln": True, "fuse": "none", "text_attention": False},
    "vector": {"text_attention": False},
    "patch": {"patch": 4},
    "strides": {"strides": [4, 3]},
    "mixed strides": {"strides": [3, 2]},
    "linear": {"resampling": "linear"},
    "lanczos": {"resampling": "lanczos3"},
    "one block": {"rep": 1},
    "wide heads": {"channels": [8, 12, 24], "head_dim": 8},
    "matching": {"channels": [16, 32], "in_channels": 4, "time_dim": 12, "fuse": "sum"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_reads_what_it_should(name, tmp_path):
    model = small(**VARIANTS[name])
    options = inputs(channels=model.config.in_channels)
    if not model.uses_tokens:
        del options["text_states"], options["text_mask"]
    if not model.uses_vector:
        del options["text_vector"]
    output = run(model, **options)
    assert output.shape == options["sample"].shape
    for key in options:
        other = ~options[key] if key == "text_mask" else options[key] * 0.5
        changed = options | {key: other}
        assert not torch.allclose(run(model, **changed), output, atol=1e-5), key
    model(**options).sample.square().mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == (
        ["null_vector"] if model.uses_vector else []
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["channels"] == list(model.config.channels)
    again = WaveformUNet1DModel.from_pretrained(tmp_path).eval()
    assert all(again.config[key] == value for key, value in model.config.items() if not key.startswith("_"))
    assert torch.equal(run(again, **options), output)


@pytest.mark.parametrize("length", [1, 2, 7, 31, 48, 63, 100])
@pytest.mark.parametrize("name", ["concat", "patch", "mixed strides", "lanczos", "matching"])
def test_any_length(length, name):
    model = small(**VARIANTS[name])
    options = inputs(length, model.config.in_channels) | ({} if model.uses_vector else {"text_vector": None})
    output = run(model, **options)
    assert output.shape == options["sample"].shape
    padded = model.padded_length(length)
    assert padded == model.padded_length(padded) >= length
    whole = options | {"sample": F.pad(options["sample"], (0, padded - length))}
    assert_close(run(model, **whole)[..., :length], output)


def test_padded_length():
    model = small(patch=2)
    assert [model.padded_length(length) for length in (1, 24, 25, 32, 33)] == [24, 24, 32, 32, 40]
    assert small(strides=[4, 3]).padded_length(13) == 24
    with torch.device("meta"):
        paper = WaveformUNet1DModel()
    assert paper.padded_length(paper.config.sample_size) == 327680
    assert paper.padded_length(320000) == 327680


def test_planes_in_the_network_equal_planes_spread_over_time():
    model, options = small(), inputs()
    output = run(model, **options)
    first = model.down_levels[0]
    plain = first.forward
    first.forward = lambda x, modulation, text, mask, planes: plain(
        torch.cat([x, planes[..., None].expand(-1, -1, x.shape[2])], 1), modulation, text, mask
    )
    assert_close(run(model, **options), output, rtol=1e-4, atol=1e-5)


def test_attention_starts_at_its_level():
    for start in (2, 3, None):
        model = small(attn_from_level=start)
        for levels in (model.down_levels, model.up_levels):
            attending = [number for number, half in enumerate(levels, 1) if len(half.attentions)]
            assert attending == ([] if start is None else list(range(start, 4)))
        layers = [module for module in model.modules() if isinstance(module, ConditionalSelfAttention)]
        assert sorted(layer.index for layer in layers) == list(range(len(layers)))


def test_hidden_tokens_do_not_matter():
    model, options = small(), inputs()
    output = run(model, **options)
    noisy = options | {"text_states": options["text_states"].masked_fill(~options["text_mask"][..., None], 1e3)}
    assert_close(run(model, **noisy), output)
    short = {key: value[1:] for key, value in options.items()}
    short |= {"text_states": short["text_states"][:, :2], "text_mask": None}
    assert_close(run(model, **short), output[1:], rtol=1e-4, atol=1e-5)
    integers = options | {"text_mask": options["text_mask"].long()}
    assert torch.equal(run(model, **integers), output)


def test_dropped_condition_equals_no_text():
    model, options = small(), inputs()
    drop = torch.tensor([False, True])
    vector, mask = model.drop_condition(drop, options["text_vector"], options["text_mask"].long())
    output = run(model, **(options | {"text_vector": vector, "text_mask": mask}))
    assert_close(output[:1], run(model, **options)[:1])
    assert_close(output[1:], run(model, sample=options["sample"], timestep=options["timestep"])[1:])
    with pytest.raises(ValueError, match="text_mask is missing"):
        model.drop_condition(drop, options["text_vector"])
    assert model.drop_condition(drop, None, mask)[0] is None
    vector_only = small(text_attention=False)
    dropped, _ = vector_only.drop_condition(drop, options["text_vector"])
    assert torch.equal(dropped[1], vector_only.null_vector)
    dropped.sum().backward()
    assert vector_only.null_vector.grad.eq(1).all()


def test_precomputed_text():
    model, options = small(), inputs()
    output = run(model, **options)
    with torch.no_grad():
        cached = model.text_key_values(options["text_states"])
    assert torch.equal(run(model, **(options | {"text_states": None, "text_key_values": cached})), output)


def test_scalar_times_and_tuples():
    model, options = small(), inputs()
    expected = run(model, **(options | {"timestep": torch.full((2,), 0.25)}))
    assert torch.equal(run(model, **(options | {"timestep": 0.25})), expected)
    assert torch.equal(run(model, **(options | {"timestep": torch.tensor(0.25)})), expected)
    with torch.no_grad():
        assert torch.equal(model(**(options | {"timestep": 0.25}), return_dict=False)[0], expected)


@pytest.mark.parametrize("levels", [1, 2, None])
def test_checkpointing_gives_equal_gradients(levels):
    plain, options = small(adaln=True), inputs()
    model = copy.deepcopy(plain)
    if levels is None:
        model.gradient_checkpointing_enable()
    else:
        model = small(adaln=True, checkpoint_levels=levels)
    assert model.is_gradient_checkpointing
    calls = []
    model.down_levels[0].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for network in (plain, model):
        network(**options).sample.square().mean().backward()
    assert len(calls) == 2
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)
    assert sum(half.gradient_checkpointing for half in model.down_levels) == (levels or 3)


@pytest.mark.parametrize("cast", ["weights", "autocast"])
@pytest.mark.parametrize("name", ["concat", "adaln", "patch", "mixed strides"])
def test_bfloat16_is_close_to_float32(cast, name):
    model = small(**VARIANTS[name])
    options = inputs()
    expected = run(model, **options)
    if cast == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        output = run(model, **options)
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(output, expected)


def test_time_stays_in_float32_in_bfloat16(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    loaded = WaveformUNet1DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.time_features.weight, model.time_features.weight)
    assert loaded.down_levels[0].blocks[0].conv_1.weight.dtype == torch.bfloat16
    expected = run(model, **inputs())
    assert (run(loaded, **inputs()) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [8]}, "channels has 1 levels: give at least two"),
        ({"channels": [8, 12, 33]}, r"channels \[33\] cannot be split into heads"),
        ({"attn_from_level": 1}, "attn_from_level is 1: give a level from 2 to 3"),
        ({"attn_from_level": 8}, "attn_from_level is 8"),
        ({"strides": [2]}, r"strides is \[2\]: give 2 numbers"),
        ({"strides": [2, 1]}, r"strides is \[2, 1\]"),
        ({"resampling": "sinc"}, "resampling is 'sinc': choose one of linear, cubic, lanczos3"),
        ({"kernel_size": 4}, "kernel_size is 4: give an odd number"),
        ({"time_dim": 3}, "time_dim is 3: give an even number"),
        ({"fuse": "product"}, "fuse is 'product': choose one of concat, sum, none"),
        ({"fuse": "sum", "fuse_dim": 4}, "fuse_dim has no effect with fuse 'sum'"),
        ({"fuse": "none", "text_attention": False}, "nothing reads the text"),
        ({"patch": 0}, "patch is 0: give a positive number"),
        ({"text_dim": 0}, "text_dim is 0"),
        ({"checkpoint_levels": 4}, "checkpoint_levels is 4: give a number from 0 to 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        ({}, {"sample": torch.zeros(2, 1, 48)}, "in_channels is 2 but the sample has shape"),
        ({}, {"text_vector": torch.zeros(2, 3)}, "text_vector has width 3 but the network reads vectors of width 12"),
        ({}, {"text_states": torch.zeros(2, 5, 3)}, "text_states have width 3 but text_dim is 12"),
        ({}, {"text_states": None}, "text_mask is given without a text"),
        ({"text_attention": False}, {}, "text_states are given but not read"),
        ({"text_dim": None}, {"text_states": None, "text_mask": None}, "the network reads none"),
    ],
)
def test_bad_input(network, change, message):
    with pytest.raises(ValueError, match=message):
        run(small(**network), **(inputs() | change))
