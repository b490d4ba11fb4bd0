"""Training steps of the waveform UNet beside diffusers' `UNet1DModel`, without and with a text vector.

`python benchmarks/waveform_speed.py [--repetitions 10] [--threads 1] [--width 256] [--length 32768]`

Forward and backward passes in float32, stereo, one clip; the sides take turns, after a step of warm-up. Both networks
have the same channels and attend from level 5; the peer is in the layout of Dance Diffusion. It has no text: the vector
is repeated along the clip and concatenated to the waveform, as its users do, which is also done to our network's input
("naive"). Seconds are CPU seconds, since clocks tell little on a busy machine; memory is the peak of activations that
the backward pass keeps.
"""

import lit_models._compat  # noqa: F401  (must run before diffusers models are imported)

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet1DModel
from torch import Tensor, nn

from lit_models.diffusion import WaveformUNet1DModel

CHANNELS = (32, 32, 64, 64, 128, 128)
ATTENTION_FROM = 5
STEREO, TIME_DIM = 2, 16

Step = Callable[[], Tensor]


def peer(extra: int = 0) -> UNet1DModel:
    """The diffusers network in the layout of Dance Diffusion, with further input channels."""
    depth = len(CHANNELS)
    plain = depth - 2 - (depth - ATTENTION_FROM + 1) + 1
    attention = depth - ATTENTION_FROM + 1
    return UNet1DModel(
        in_channels=STEREO + extra,
        out_channels=STEREO,
        extra_in_channels=TIME_DIM,
        time_embedding_type="fourier",
        flip_sin_to_cos=False,
        use_timestep_embedding=False,
        time_embedding_dim=TIME_DIM,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock1DNoSkip", *["DownBlock1D"] * plain, *["AttnDownBlock1D"] * attention),
        up_block_types=(*["AttnUpBlock1D"] * attention, *["UpBlock1D"] * plain, "UpBlock1DNoSkip"),
        mid_block_type="UNetMidBlock1D",
    )


def ours(text_dim: int | None = None, extra: int = 0) -> WaveformUNet1DModel:
    """Our network; with `text_dim` the text is a vector beside the waveform, with `extra` channels of it."""
    return WaveformUNet1DModel(
        in_channels=STEREO + extra,
        channels=CHANNELS,
        attn_from_level=ATTENTION_FROM,
        time_dim=TIME_DIM,
        text_dim=text_dim,
        text_attention=False,
    )


def step_of(network: nn.Module, waveform: Tensor, width: int, how: str) -> Step:
    """A forward and backward pass; `how` the text goes in: "none", "vector" or "planes"."""
    time_ = torch.full((len(waveform),), 0.5)
    text = torch.randn(len(waveform), width)

    def step() -> Tensor:
        sample = waveform
        if how == "planes":
            sample = torch.cat([waveform, text[..., None].expand(-1, -1, waveform.shape[2])], 1)
        options = {"text_vector": text} if how == "vector" else {}
        loss = network(sample, time_, **options).sample[:, :STEREO].square().mean()
        network.zero_grad()
        loss.backward()
        return loss

    return step


def kept_bytes(step: Step) -> int:
    """Bytes of activations kept for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def seconds(step: Step) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256, help="of the text vector")
    parser.add_argument("--length", type=int, default=32768, help="samples")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    waveform = torch.randn(1, STEREO, options.length)
    width = options.width
    sides = {
        "ours": (ours(), "none"),
        "diffusers": (peer(), "none"),
        f"ours, text {width}": (ours(text_dim=width), "vector"),
        f"ours naive, text {width}": (ours(extra=width), "planes"),
        f"diffusers, text {width}": (peer(width), "planes"),
    }
    steps = {name: step_of(network, waveform, width, how) for name, (network, how) in sides.items()}
    memory = {name: kept_bytes(step) for name, step in steps.items()}  # and a step of warm-up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repetitions):
        for name, step in steps.items():
            times[name].append(seconds(step))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, (network, _) in sides.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"{name:24s} {medians[name]:.3f} s ({min(times[name]):.3f}-{max(times[name]):.3f}), "
            f"{count / 1e6:.2f} M parameters, {memory[name] / 2**20:.0f} MiB kept, "
            f"{options.length / medians[name]:.0f} samples per CPU second"
        )
    plain, text = medians["ours"], medians[f"ours, text {width}"]
    print(f"diffusers over ours, no text: {medians['diffusers'] / plain:.2f}")
    print(f"diffusers over ours, text of width {width}: {medians[f'diffusers, text {width}'] / text:.2f}")
    print(f"naive over ours, text of width {width}: {medians[f'ours naive, text {width}'] / text:.2f}")


if __name__ == "__main__":
    main()
