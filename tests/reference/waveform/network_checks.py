"""Comparison of the layers and the network on waveforms with stored inputs, weights and outputs."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from lit_models.diffusion.blocks import ConditionalSelfAttention, ResConvBlock, TimeFeatures
from lit_models.diffusion.modeling import WaveformUNet1DModel, convert_dance_diffusion
from lit_models.diffusion.resampling import Downsample1d, StridedDownsample1d, StridedUpsample1d, Upsample1d

BLOCK = {"main.0": "conv_1", "main.1": "norm_1", "main.3": "conv_2", "main.4": "norm_2", "skip": "skip"}


def under(tensors, prefix):
    """Entries whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(actual, stored, absolute, name=""):
    assert_close(actual, stored, rtol=0.0, atol=absolute, msg=lambda text: f"{name}: {text}")


@torch.no_grad()
def check_blocks(tensors):
    for name in ("res_proj", "res_same", "res_last"):
        case = under(tensors, f"{name}.")
        weights = {}
        for old, new in BLOCK.items():
            weights |= {f"{new}.{kind}": tensor for kind, tensor in under(case, f"{old}.").items()}
        mid, inputs, size = case["main.0.weight"].shape
        block = ResConvBlock(inputs, mid, len(case["main.3.weight"]), size, last="main.4.weight" not in case)
        block.load_state_dict(weights)
        close(block(case["x"]), case["y"], 1e-5, name)
    case = under(tensors, "attn.")
    attention = ConditionalSelfAttention(case["x"].shape[1], head_dim=case["x"].shape[1] // 2)
    names = {"norm": "norm", "qkv_proj": "to_qkv", "out_proj": "to_out"}
    attention.load_state_dict(
        {
            f"{new}.{kind}": case[f"{old}.{kind}"].squeeze(-1) if kind == "weight" else case[f"{old}.{kind}"]
            for old, new in names.items()
            for kind in ("weight", "bias")
        }
    )
    with sdpa_kernel(SDPBackend.MATH):
        close(attention(case["x"]), case["y"], 1e-5, "attn")
    # Fused kernels sum in another order, which large logits amplify.
    close(attention(case["x"]), case["y"], 1e-5 * case["y"].abs().max().item(), "attn, fused")


@torch.no_grad()
def check_csa(tensors):
    x, states, mask = tensors["x"], tensors["S"], tensors["mask"]
    attention = ConditionalSelfAttention(x.shape[1], states.shape[2], head_dim=x.shape[1] // 2)
    weights = {}
    for kind in ("weight", "bias"):
        old = {name: tensors[f"w.{name}.{kind}"] for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")}
        weights |= {
            f"norm.{kind}": tensors[f"w.group_norm.{kind}"],
            f"to_qkv.{kind}": torch.cat([old["to_q"], old["to_k"], old["to_v"]]),
            f"text_to_kv.{kind}": torch.cat([old["add_k_proj"], old["add_v_proj"]]),
            f"to_out.{kind}": tensors[f"w.to_out.0.{kind}"],
        }
    attention.load_state_dict(weights)
    close(attention(x, states), tensors["y_all_tokens"], 2e-4, "y_all_tokens")
    close(attention(x, states, mask), tensors["y_masked"], 2e-4, "y_masked")
    noisy = states.masked_fill(~mask[..., None], 1e4)
    close(attention(x, noisy, mask), tensors["y_masked"], 2e-4, "hidden tokens")
    keys_values = (attention.text_key_values(states),)
    close(attention(x, keys_values, mask), tensors["y_masked"], 2e-4, "precomputed text")


@torch.no_grad()
def check_fourier(tensors):
    features = TimeFeatures(2 * len(tensors["weight"]))
    features.load_state_dict({"weight": tensors["weight"]})
    embedding = features(tensors["t"])
    close(embedding, tensors["embedding"], 1e-5, "embedding")
    close(embedding[..., None].expand_as(tensors["planes"]), tensors["planes"], 1e-5, "planes")


@torch.no_grad()
def check_resample(tensors):
    seen = 0
    for name, stored in tensors.items():
        way, *rest = name.split("_")
        if way in ("down", "up"):
            kernel, length = rest
            layer = Downsample1d(kernel) if way == "down" else Upsample1d(kernel)
            close(layer(tensors[f"x_{length}"]), stored, 1e-6, name)
            seen += 1
    assert seen
    x = tensors["learned_x"]
    for way, kind in (("down", StridedDownsample1d), ("up", StridedUpsample1d)):
        stored = tensors[f"learned_{way}"]
        stride = max(stored.shape[2], x.shape[2]) // min(stored.shape[2], x.shape[2])
        layer = kind(x.shape[1], stored.shape[1], stride)
        layer.load_state_dict({"weight": tensors[f"learned_{way}_w"], "bias": tensors[f"learned_{way}_b"]})
        close(layer(x), stored, 1e-6, way)


def network(tensors, info):
    """The stored network with its weights."""
    channels = info["unet"]["ch"]
    start = len(channels) - info["unet"]["na"]
    model = WaveformUNet1DModel(
        in_channels=info["unet"]["io"],
        channels=channels,
        # The first level never attends, whatever the option says.
        attn_from_level=max(2, start) if info["unet"]["na"] else None,
        time_dim=2 * len(tensors["w.timestep_embed.weight"]),
    )
    model.load_state_dict(convert_dance_diffusion(under(tensors, "w.")))
    return model


def check_unet(tensors, info):
    model = network(tensors, info)
    assert sum(parameter.numel() for parameter in model.parameters()) == info["unet_params"]
    assert tensors["x"].shape[2] == info["unet"]["L"]
    output = model(tensors["x"], tensors["t"]).sample
    close(output, tensors["y"], 1e-4, "y")
    output.square().mean().backward()
    assert_close(model.time_features.weight.grad, tensors["grad_timestep_weight"], rtol=1e-3, atol=1e-6)
