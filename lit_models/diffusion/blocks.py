"""Layers of the network on waveforms.

Shapes: B waveforms, C channels, L samples of the level, H heads, n text tokens, E width of the text encoder, P channels
that are constant in time ("planes").
Sources: ERNIE-Music (arXiv 2302.04456) for attention with text, Dance Diffusion and stable-audio-tools for the rest.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a text, each (B, H, n, C/H)."""


def attention_heads(channels: int, head_dim: int) -> int:
    """Number of attention heads of a layer, at least one.

    Args:
        channels: C.
        head_dim: channels per head, where C is a multiple of it.
    """
    return max(1, channels // head_dim)


class TimeFeatures(nn.Module):
    """Cosines and sines of the time at trained frequencies.

    Args:
        size: number of features, even.
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size // 2, 1))

    def forward(self, timestep: Tensor) -> Tensor:
        """Compute the features in float32, whatever the dtype of the weights.

        Args:
            timestep: (B,) in [0, 1].

        Returns:
            (B, size) float32, first the cosines.
        """
        angles = 2 * math.pi * timestep.float()[:, None] * self.weight.float()[:, 0]
        return torch.cat([angles.cos(), angles.sin()], 1)


class PlaneConv1d(nn.Conv1d):
    """Convolution with zero padding whose last input channels may be constant in time.

    Such channels add the same to every output sample, less what the padding takes away at both ends, so that they are
    never spread over time. The cost does not grow with their number.

    Args:
        in_channels: channels of the input and of the planes together.
        out_channels: channels of the output.
        kernel_size: samples that the kernel covers, odd.
        bias: whether to add a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor, planes: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, C, L).
            planes: (B, P), values of the other input channels.

        Returns:
            (B, out_channels, L).
        """
        if planes is None:
            return super().forward(x)
        weight, constant = self.weight.split([x.shape[1], planes.shape[1]], 1)
        padding = self.kernel_size[0] // 2
        out = F.conv1d(x, weight, self.bias, padding=padding)
        with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            taps = torch.einsum("ocj,bc->boj", constant.float(), planes.float())
            out = out + taps.sum(2, keepdim=True).to(out.dtype)
            if padding:
                # Taps that lie before the first sample, or after the last, met zeros.
                before = taps.cumsum(2)[..., :padding].flip(2)
                after = taps.flip(2).cumsum(2)[..., :padding]
                out[..., :padding] -= before[..., : out.shape[2]]
                out[..., -padding:] -= after[..., -out.shape[2] :]
        return out


class ResConvBlock(nn.Module):
    """Two convolutions, each with a norm and GELU, beside a skip connection.

    Args:
        in_channels: channels of the input, planes included.
        mid_channels: channels between the convolutions.
        out_channels: channels of the output.
        kernel_size: samples that a kernel covers, odd.
        last: whether the second convolution ends the branch.
        modulation_dim: width of the vector that scales and shifts the first norm; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int = 5,
        last: bool = False,
        modulation_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.conv_1 = PlaneConv1d(in_channels, mid_channels, kernel_size)
        self.norm_1 = nn.GroupNorm(1, mid_channels)
        self.conv_2 = PlaneConv1d(mid_channels, out_channels, kernel_size)
        self.norm_2 = None if last else nn.GroupNorm(1, out_channels)
        self.skip = None if in_channels == out_channels else PlaneConv1d(in_channels, out_channels, 1, bias=False)
        self.modulate: nn.Linear | None = None
        if modulation_dim is not None:
            self.modulate = nn.Linear(modulation_dim, 2 * mid_channels)
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, modulation: Tensor | None = None, planes: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: (B, C, L).
            modulation: (B, modulation_dim), if the block takes one.
            planes: (B, P), input channels that are constant in time.

        Returns:
            (B, out_channels, L).
        """
        h = self.norm_1(self.conv_1(x, planes))
        if self.modulate is not None:
            scale, shift = self.modulate(modulation)[..., None].chunk(2, 1)
            h = h * (1 + scale) + shift
        h = self.conv_2(F.gelu(h))
        if self.norm_2 is not None:
            h = F.gelu(self.norm_2(h))
        if self.skip is not None:
            return h + self.skip(x, planes)
        if planes is not None:  # the channels happen to match, so that the planes pass through as they are
            x = torch.cat([x, planes.to(x.dtype)[..., None].expand(-1, -1, x.shape[2])], 1)
        return h + x


class ConditionalSelfAttention(nn.Module):
    """Self-attention over samples whose keys and values are followed by those of a text.

    Samples always attend to each other, so a text that is masked out entirely leaves plain self-attention.

    Args:
        channels: C, a multiple of the number of heads.
        text_dim: E, or None for plain self-attention.
        head_dim: channels per head, more if C is no multiple of it.
        index: number of the layer in the network, its place in a list of precomputed keys and values.
    """

    def __init__(self, channels: int, text_dim: int | None = None, head_dim: int = 32, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.heads = attention_heads(channels, head_dim)
        self.norm = nn.GroupNorm(1, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.text_to_kv = None if text_dim is None else nn.Linear(text_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def _split(self, tokens: Tensor, parts: int) -> tuple[Tensor, ...]:
        return tokens.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def text_key_values(self, text_states: Tensor) -> KeysValues:
        """Keys and values of a text, which depend neither on the time nor on the waveform.

        Args:
            text_states: (B, n, E).

        Returns:
            Two tensors (B, H, n, C/H).
        """
        assert self.text_to_kv is not None
        keys, values = self._split(self.text_to_kv(text_states.to(self.text_to_kv.weight.dtype)), 2)
        return keys, values

    def forward(
        self,
        x: Tensor,
        text: Tensor | tuple[KeysValues, ...] | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, C, L).
            text: (B, n, E) states of the text, or keys and values of all layers of the network.
            text_mask: (B, n) bool, true for tokens that are attended; None for all.

        Returns:
            (B, C, L).
        """
        queries, keys, values = self._split(self.to_qkv(self.norm(x).transpose(1, 2)), 3)
        mask = None
        if text is not None and self.text_to_kv is not None:
            more_keys, more_values = self.text_key_values(text) if isinstance(text, Tensor) else text[self.index]
            keys = torch.cat([keys, more_keys.to(keys.dtype)], 2)
            values = torch.cat([values, more_values.to(values.dtype)], 2)
            if text_mask is not None:
                # Padding on the left stands for the samples.
                mask = F.pad(text_mask, (x.shape[2], 0), value=True)[:, None, None]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return x + self.to_out(attended.transpose(1, 2).flatten(2)).transpose(1, 2)
