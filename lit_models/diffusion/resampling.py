"""Changes of rate inside networks on waveforms: fixed and trained resampling, and folding of samples into channels.

Shapes: B waveforms, C channels, L samples.
Source: the networks of Dance Diffusion and stable-audio-tools, whose dense kernels are depthwise here with the same
result.
"""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ResampleKernel = Literal["linear", "cubic", "lanczos3"]

HALF_KERNELS: dict[str, tuple[float, ...]] = {
    "linear": (1 / 8, 3 / 8),
    "cubic": (-0.01171875, -0.03515625, 0.11328125, 0.43359375),
    "lanczos3": (
        0.003689131001010537,
        0.015056144446134567,
        -0.03399861603975296,
        -0.066637322306633,
        0.13550527393817902,
        0.44638532400131226,
    ),
}
"""First half of each kernel; the second half is its mirror image."""


def fold(waveform: Tensor, patch: int) -> Tensor:
    """Move groups of neighbouring samples into channels.

    Args:
        waveform: (B, C, L), L a multiple of `patch`.
        patch: samples per group.

    Returns:
        (B, C·patch, L/patch); channel c·patch + i of frame n is sample n·patch + i of channel c.
    """
    return waveform.unflatten(2, (-1, patch)).transpose(2, 3).flatten(1, 2) if patch > 1 else waveform


def unfold(frames: Tensor, patch: int) -> Tensor:
    """Undo `fold`.

    Args:
        frames: (B, C·patch, L/patch).
        patch: samples per group.

    Returns:
        (B, C, L).
    """
    return frames.unflatten(1, (-1, patch)).transpose(2, 3).flatten(2, 3) if patch > 1 else frames


class _FixedResample(nn.Module):
    """Holds a kernel that is neither trained nor saved.

    Args:
        kernel: name of the kernel.
        gain: factor on its taps.
    """

    taps: Tensor

    def __init__(self, kernel: ResampleKernel, gain: float) -> None:
        super().__init__()
        half = HALF_KERNELS[kernel]
        self.values = [gain * tap for tap in (*half, *reversed(half))]
        self.register_buffer("taps", torch.tensor(self.values), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A kernel that was on the meta device or in a short dtype has lost its values.
        super()._apply(fn, recurse)
        if not self.taps.is_meta:
            self.taps.copy_(torch.tensor(self.values))
        return self

    def weight(self, x: Tensor) -> Tensor:
        """Kernel of a depthwise convolution of x, (C, 1, K)."""
        return self.taps.to(x.dtype).expand(x.shape[1], 1, -1)


class Downsample1d(_FixedResample):
    """Halve the rate with a fixed low-pass filter.

    Args:
        kernel: the filter.
    """

    def __init__(self, kernel: ResampleKernel = "cubic") -> None:
        super().__init__(kernel, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Filter every channel and keep every second sample.

        Args:
            x: (B, C, L), L above half of the kernel's length less one.

        Returns:
            (B, C, L // 2).
        """
        padding = len(self.values) // 2 - 1
        return F.conv1d(F.pad(x, (padding, padding), "reflect"), self.weight(x), stride=2, groups=x.shape[1])


class Upsample1d(_FixedResample):
    """Double the rate with a fixed low-pass filter.

    Args:
        kernel: the filter.
    """

    def __init__(self, kernel: ResampleKernel = "cubic") -> None:
        super().__init__(kernel, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Insert a sample between neighbours in every channel.

        Args:
            x: (B, C, L), L above a quarter of the kernel's length.

        Returns:
            (B, C, 2·L).
        """
        size = len(self.values)
        padded = F.pad(x, (size // 4, size // 4), "reflect")
        # What transposed convolution adds beyond both ends of the padded input is cut off.
        cut = size // 2 - 1 + 2 * (size // 4)
        return F.conv_transpose1d(padded, self.weight(x), stride=2, padding=cut, groups=x.shape[1])


class StridedDownsample1d(nn.Conv1d):
    """Divide the rate by any factor with a trained convolution.

    Args:
        in_channels: channels before.
        out_channels: channels after.
        stride: the factor, at least 2; L samples give L / stride, rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 2 * stride + 1, stride=stride, padding=stride)


class StridedUpsample1d(nn.ConvTranspose1d):
    """Multiply the rate by any factor with a trained transposed convolution.

    Args:
        in_channels: channels before.
        out_channels: channels after.
        stride: the factor, at least 2; L samples give L · stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            in_channels,
            out_channels,
            2 * stride,
            stride=stride,
            padding=stride // 2 + stride % 2,
            output_padding=stride % 2,
        )
