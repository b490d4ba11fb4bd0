"""UNet that predicts the velocity of noisy waveforms, with or without a text.

Shapes: B waveforms, C channels of audio, L samples, D levels, n text tokens, E width of the text encoder.
Sources: ERNIE-Music (arXiv 2302.04456), which has no public code, and the network of Dance Diffusion, whose layout and
sizes it shares.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_models.diffusion.blocks import (
    ConditionalSelfAttention,
    KeysValues,
    ResConvBlock,
    TimeFeatures,
    attention_heads,
)
from lit_models.diffusion.resampling import (
    HALF_KERNELS,
    Downsample1d,
    ResampleKernel,
    StridedDownsample1d,
    StridedUpsample1d,
    Upsample1d,
    fold,
    unfold,
)
from lit_models.nn.sharding import ShardingNeeds

Fuse = Literal["concat", "sum", "none"]

ALIGNMENT = 64
"""Bytes to whose multiples torch aligns its own tensors."""
PAPER_CHANNELS = (128, 128, 256, 256, *[512] * 10)
"""Channels of the 14 levels of ERNIE-Music and Dance Diffusion."""


@dataclass
class WaveformUNetOutput(BaseOutput):
    """What the network returns.

    Args:
        sample: (B, C, L) float32, the predicted velocity.
    """

    sample: Tensor


class HalfLevel(nn.Module):
    """Blocks of one level on the way down, after a change of rate, or on the way up, before it.

    Args:
        widths: channels before the first block and after each.
        mid_channels: channels inside the blocks.
        kernel_size: samples that a kernel covers.
        last: whether the last block gives the output of the network.
        attention: options of the attention after each block, except its channels; None for none.
        index: number of the first attention layer.
        modulation_dim: width of the vector that modulates norms; None for none.
        down: halves the rate, or None.
        up: doubles it, or None.
    """

    def __init__(
        self,
        widths: list[int],
        mid_channels: int,
        kernel_size: int,
        last: bool = False,
        attention: Mapping[str, Any] | None = None,
        index: int = 0,
        modulation_dim: int | None = None,
        down: nn.Module | None = None,
        up: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.down, self.up = down, up
        self.blocks = nn.ModuleList(
            ResConvBlock(before, mid_channels, after, kernel_size, last and number == len(widths) - 2, modulation_dim)
            for number, (before, after) in enumerate(pairwise(widths))
        )
        self.attentions = nn.ModuleList()
        if attention is not None:
            self.attentions.extend(
                ConditionalSelfAttention(width, index=index + number, **attention)
                for number, width in enumerate(widths[1:])
            )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor | None = None,
        text: Tensor | tuple[KeysValues, ...] | None = None,
        text_mask: Tensor | None = None,
        planes: Tensor | None = None,
    ) -> Tensor:
        """Apply the blocks.

        Args:
            x: (B, channels, samples).
            modulation: (B, modulation_dim), if norms are modulated.
            text: states of the text, or keys and values of all layers.
            text_mask: (B, n) bool, true for tokens that are attended.
            planes: (B, P), further channels of the first block that are constant in time.

        Returns:
            (B, last of `widths`, samples of the level that follows).
        """
        first: Any = self.blocks[0]
        x = x.to(first.conv_1.weight.dtype)  # sharded weights are gathered in another type than they have
        if self.down is not None:
            x = self.down(x)
        for number, block in enumerate(self.blocks):
            x = block(x, modulation, planes if number == 0 else None)
            if self.attentions:
                x = self.attentions[number](x, text, text_mask)
        return x if self.up is None else self.up(x)


class WaveformUNet1DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """UNet on raw waveforms whose input is fused with the time and a text, and whose attention reads the text.

    The defaults are the sizes of ERNIE-Music, without a text encoder. What the paper leaves open follows Dance
    Diffusion. All arguments are saved by `save_pretrained`.

    Args:
        sample_size: usual length in samples; any length is accepted.
        sample_rate: samples per second. Like `sample_size` and `data_scale`, it is only kept for whoever uses the
            network.
        data_scale: factor on waveforms before they are diffused, by which generated ones are divided.
        in_channels: C, 2 for stereo.
        channels: channels of each level, at least two levels.
        strides: factor between each level and the next, D-1 numbers; 2 is a fixed filter, others are trained
            convolutions. By default all are 2.
        resampling: the fixed filter, "cubic", "linear" or "lanczos3".
        patch: samples that are folded into channels at the input and unfolded at the output.
        rep: blocks of each level on the way down, and on the way up.
        kernel_size: samples that a kernel covers, odd.
        attn_from_level: first level with attention, counted from 1; null for none. Dance Diffusion's option
            `n_attn_layers` is D minus this.
        head_dim: channels per attention head; channels that are no multiple of it give fewer, wider heads if they can.
        time_dim: features of the time, even.
        text_dim: E, or null for a network without text.
        text_attention: whether attention reads the tokens of the text; off for a vector alone, such as a class.
        fuse: how the vector of the text joins the time at the input: "concat" appends it, "sum" adds it after a
            projection, "none" leaves it out.
        fuse_dim: width to which the vector is projected before it is appended; null to append it as it is.
        adaln: whether the time and the vector also scale and shift the first norm of every block, which is not in the
            paper.
        adaln_dim: width of the network that computes those.
        init_scale: factor on the default initialisation of all levels.
        checkpoint_levels: first levels whose activations are computed again in the backward pass;
            `enable_gradient_checkpointing` does so for all.

    Raises:
        ValueError: if an argument is out of its range or contradicts another, naming it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["HalfLevel"]  # type: ignore[assignment]  # noqa: RUF012
    _keep_in_fp32_modules = ["time_features"]  # type: ignore[assignment]  # noqa: RUF012
    sharding_needs = ShardingNeeds(
        units=("HalfLevel",), cast_inputs=False, cast_unit_inputs=False, float32=("TimeFeatures",)
    )

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 327680,
        sample_rate: int = 16000,
        data_scale: float = 1.0,
        in_channels: int = 2,
        channels: list[int] | tuple[int, ...] = PAPER_CHANNELS,
        strides: list[int] | None = None,
        resampling: ResampleKernel = "cubic",
        patch: int = 1,
        rep: int = 3,
        kernel_size: int = 5,
        attn_from_level: int | None = 8,
        head_dim: int = 32,
        time_dim: int = 16,
        text_dim: int | None = None,
        text_attention: bool = True,
        fuse: Fuse = "concat",
        fuse_dim: int | None = None,
        adaln: bool = False,
        adaln_dim: int = 128,
        init_scale: float = 0.5,
        checkpoint_levels: int = 0,
    ) -> None:
        super().__init__()
        self._check()
        depth = len(channels)
        self.in_channels, self.patch, self.fuse, self.text_dim = in_channels, patch, fuse, text_dim
        self.resampling, self.shortest_filtered = resampling, len(HALF_KERNELS[resampling]) // 2 + 1
        self.strides = [2] * (depth - 1) if strides is None else list(strides)
        self.uses_vector = text_dim is not None and (fuse != "none" or adaln)
        self.uses_tokens = text_dim is not None and text_attention and attn_from_level is not None
        if text_dim is not None and not (self.uses_vector or self.uses_tokens):
            raise ValueError("text_dim is set but nothing reads the text: set fuse, adaln or text_attention")

        self.time_features = TimeFeatures(time_dim)
        self.null_vector = nn.Parameter(torch.zeros(text_dim)) if text_dim and self.uses_vector else None
        planes = time_dim
        self.project: nn.Linear | None = None
        if text_dim is not None and fuse == "sum":
            self.project = nn.Linear(text_dim, time_dim)
        elif text_dim is not None and fuse == "concat":
            if fuse_dim is not None:
                self.project = nn.Linear(text_dim, fuse_dim)
            planes += text_dim if fuse_dim is None else fuse_dim
        self.modulation: nn.Sequential | None = None
        if adaln:
            width = time_dim + (text_dim or 0)
            self.modulation = nn.Sequential(
                nn.Linear(width, adaln_dim), nn.GELU(), nn.Linear(adaln_dim, adaln_dim), nn.GELU()
            )

        attention = {"text_dim": text_dim if self.uses_tokens else None, "head_dim": head_dim}
        signal = in_channels * patch
        down, up = [], []
        for level, width in enumerate(channels, 1):
            outer = channels[level - 2] if level > 1 else signal
            attends = attn_from_level is not None and level >= attn_from_level
            first = (level - attn_from_level) * 2 * rep if attends and attn_from_level is not None else 0
            options: dict[str, Any] = {
                "mid_channels": width,
                "kernel_size": kernel_size,
                "attention": attention if attends else None,
                "modulation_dim": adaln_dim if adaln else None,
            }
            lower, upper = self._resamplers(level, outer)
            entry = outer if level > 1 else signal + planes
            inner = 2 * width if level < depth else width
            down.append(HalfLevel([entry, *[width] * rep], index=first, down=lower, **options))
            widths = [inner, *[width] * (rep - 1), outer]
            up.append(HalfLevel(widths, last=level == 1, index=first + rep, up=upper, **options))
        self.down_levels, self.up_levels = nn.ModuleList(down), nn.ModuleList(up)
        for half in (*down[:checkpoint_levels], *up[:checkpoint_levels]):
            half.gradient_checkpointing = True
        with torch.no_grad():
            for parameter in (*self.down_levels.parameters(), *self.up_levels.parameters()):
                parameter.mul_(init_scale)

    def _check(self) -> None:
        """Refuse arguments that make no network."""
        config: Any = self.config
        depth = len(config.channels)
        if depth < 2:
            raise ValueError(f"channels has {depth} levels: give at least two")
        positive = ("in_channels", "patch", "rep", "head_dim", "data_scale", "sample_rate", "sample_size", "adaln_dim")
        for name in positive:
            if not config[name] > 0:
                raise ValueError(f"{name} is {config[name]}: give a positive number")
        if config.resampling not in HALF_KERNELS:
            raise ValueError(f"resampling is {config.resampling!r}: choose one of {', '.join(HALF_KERNELS)}")
        for name in ("text_dim", "fuse_dim"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"{name} is {config[name]}: give a positive number or null")
        if config.kernel_size < 1 or config.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {config.kernel_size}: give an odd number")
        if config.time_dim < 2 or config.time_dim % 2:
            raise ValueError(f"time_dim is {config.time_dim}: give an even number")
        if config.fuse not in get_args(Fuse):
            raise ValueError(f"fuse is {config.fuse!r}: choose one of {', '.join(get_args(Fuse))}")
        if config.fuse_dim is not None and config.fuse != "concat":
            raise ValueError(f"fuse_dim has no effect with fuse {config.fuse!r}: leave it out or set fuse to 'concat'")
        if config.strides is not None and (len(config.strides) != depth - 1 or min(config.strides) < 2):
            raise ValueError(f"strides is {list(config.strides)}: give {depth - 1} numbers of at least 2, or null")
        if not 0 <= config.checkpoint_levels <= depth:
            raise ValueError(f"checkpoint_levels is {config.checkpoint_levels}: give a number from 0 to {depth}")
        if (start := config.attn_from_level) is not None:
            if not 2 <= start <= depth:
                raise ValueError(f"attn_from_level is {start}: give a level from 2 to {depth}, or null")
            if odd := [w for w in config.channels[start - 2 :] if w % attention_heads(w, config.head_dim)]:
                raise ValueError(
                    f"channels {odd} cannot be split into heads, as attention from level {start} needs: make them "
                    f"multiples of head_dim {config.head_dim}, or change head_dim or attn_from_level"
                )

    def _resamplers(self, level: int, width: int) -> tuple[nn.Module | None, nn.Module | None]:
        """Changes of rate between a level and the one above it, which has `width` channels."""
        if level == 1:
            return None, None
        stride = self.strides[level - 2]
        if stride == 2:
            return Downsample1d(self.resampling), Upsample1d(self.resampling)
        return StridedDownsample1d(width, width, stride), StridedUpsample1d(width, width, stride)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any] | None, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load a network, as `ModelMixin.from_pretrained` does.

        Weights that lie anywhere in a file are moved to aligned memory, without which the same network would run more
        slowly and round differently than before it was saved.

        Args:
            pretrained_model_name_or_path: folder or name on the hub.
            **kwargs: see `ModelMixin.from_pretrained`.

        Returns:
            The network in evaluation mode, and the report of loading if asked for.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    def gradient_checkpointing_enable(self) -> None:
        """Compute the activations of all levels again in the backward pass; transformers' name for it."""
        self.enable_gradient_checkpointing()

    def padded_length(self, length: int) -> int:
        """Length to which the network pads a waveform on the right, with zeros, and crops its output again.

        Args:
            length: L in samples.

        Returns:
            The next multiple of `patch` times all `strides` that is also long enough for the fixed filters.
        """
        shortest = 1
        for level, stride in enumerate(self.strides):
            if stride == 2:  # reflection at the ends needs more samples than it adds
                deeper = math.prod(self.strides[level + 1 :])
                shortest = max(shortest, math.ceil(self.shortest_filtered / deeper))
        unit = self.patch * math.prod(self.strides)
        return max(math.ceil(length / unit), shortest) * unit

    def text_key_values(self, text_states: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of a text in all attention layers, to be computed once for all steps of a sampler.

        Args:
            text_states: (B, n, E).

        Returns:
            A pair for each layer; pass it to `forward`.
        """
        layers = [module for module in self.modules() if isinstance(module, ConditionalSelfAttention)]
        return tuple(layer.text_key_values(text_states) for layer in sorted(layers, key=lambda layer: layer.index))

    def drop_condition(
        self, drop: Tensor, text_vector: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take the text away from some waveforms, without a change of shapes.

        Args:
            drop: (B,) bool, true where the text is taken away.
            text_vector: (B, E).
            text_mask: (B, n) bool or integer, which attention must then be given; all zero gives attention without
                text.

        Returns:
            The vector, replaced by the null vector where dropped, and the mask, false there.

        Raises:
            ValueError: if attention reads the text but there is no mask to hide it.
        """
        if self.uses_tokens and text_mask is None:
            raise ValueError(
                "text_mask is missing, so attention would still read a dropped text: give it or unset text_attention"
            )
        if text_vector is not None and self.null_vector is not None:
            text_vector = torch.where(drop[:, None], self.null_vector, text_vector)
        if text_mask is not None:
            text_mask = text_mask.bool() & ~drop[:, None]
        return text_vector, text_mask

    def _condition(self, timestep: Tensor, text_vector: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Planes (B, P) of the first block, float32, and the vector that modulates norms."""
        time = self.time_features(timestep)
        vector = time[:, :0]
        if self.null_vector is not None:
            chosen = self.null_vector.expand(len(time), -1) if text_vector is None else text_vector
            vector = chosen.float()
        modulation = None
        if self.modulation is not None:
            features = torch.cat([time, vector], 1)
            first: Any = self.modulation[0]
            modulation = self.modulation(features.to(first.weight.dtype))
        if self.fuse == "none":
            return time, modulation
        if self.project is not None:
            vector = self.project(vector.to(self.project.weight.dtype)).float()
            if self.fuse == "sum":
                return time + vector, modulation
        return torch.cat([time, vector], 1), modulation

    def _check_input(self, sample: Tensor, text_vector: Tensor | None, text: Any, text_mask: Tensor | None) -> None:  # noqa: ANN401
        if sample.ndim != 3 or sample.shape[1] != self.in_channels:
            raise ValueError(
                f"in_channels is {self.in_channels} but the sample has shape {tuple(sample.shape)}: "
                "give (batch, channels, length)"
            )
        width = self.text_dim
        if text_vector is not None and (not self.uses_vector or text_vector.shape[-1] != width):
            raise ValueError(
                f"text_vector has width {text_vector.shape[-1]} but the network reads "
                f"{f'vectors of width {width}' if self.uses_vector else 'none'}: set text_dim and fuse to match"
            )
        if text is not None and not self.uses_tokens:
            raise ValueError("text_states are given but not read: set text_dim, text_attention and attn_from_level")
        if isinstance(text, Tensor) and text.shape[-1] != width:
            raise ValueError(f"text_states have width {text.shape[-1]} but text_dim is {width}: make them equal")
        if text is None and text_mask is not None:
            raise ValueError("text_mask is given without a text: give text_states too")

    def _run(self, half: nn.Module, *args: object) -> Tensor:
        if not (half.gradient_checkpointing and torch.is_grad_enabled()):
            return half(*args)
        chosen: Any = getattr(half, "_gradient_checkpointing_func", None)
        return checkpoint(half, *args, use_reentrant=False) if chosen is None else chosen(half, *args)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text_vector: Tensor | None = None,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_key_values: tuple[KeysValues, ...] | None = None,
        return_dict: bool = True,
    ) -> WaveformUNetOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            sample: (B, C, L), noisy waveforms of any length.
            timestep: (B,), (), or a number, in [0, 1]; 1 is noise.
            text_vector: (B, E), vector of the whole text; by default the null vector.
            text_states: (B, n, E), states of its tokens; by default attention is without text.
            text_mask: (B, n) bool or integer, true for real tokens; by default all are.
            text_key_values: what `text_key_values` returned, instead of `text_states`.
            return_dict: whether to return an object.

        Returns:
            The velocity, (B, C, L) float32, in an object or in a tuple.

        Raises:
            ValueError: if shapes do not fit the network, or a text is given that it does not read.
        """
        text = text_states if text_key_values is None else text_key_values
        self._check_input(sample, text_vector, text, text_mask)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))
        planes, modulation = self._condition(timestep, text_vector)
        mask = None if text_mask is None else text_mask.bool()
        length = sample.shape[2]
        # Not `self.dtype`, which may be that of the features of the time.
        x = sample.to(next(self.down_levels.parameters()).dtype)
        x = nn.functional.pad(x, (0, self.padded_length(length) - length))
        x = self._run(self.down_levels[0], fold(x, self.patch), modulation, text, mask, planes)
        skips = []
        for half in self.down_levels[1:]:
            skips.append(x)
            x = self._run(half, x, modulation, text, mask)
        for half in reversed(self.up_levels):
            x = self._run(half, x, modulation, text, mask)
            if skips:
                x = torch.cat([x, skips.pop()], 1)
        velocity = unfold(x, self.patch)[..., :length].float()
        return WaveformUNetOutput(sample=velocity) if return_dict else (velocity,)


def convert_dance_diffusion(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a network of Dance Diffusion or stable-audio-tools, which has no text.

    Args:
        weights: state dict of its `DiffusionAttnUnet1D`; its fixed filters are left out, and trained ones are
            not converted.

    Returns:
        State dict of a `WaveformUNet1DModel` of the same sizes.
    """
    block = {"main.0": "conv_1", "main.1": "norm_1", "main.3": "conv_2", "main.4": "norm_2", "skip": "skip"}
    layer = {"norm": "norm", "qkv_proj": "to_qkv", "out_proj": "to_out"}
    converted = {}
    for name, tensor in weights.items():
        if name == "timestep_embed.weight":
            converted["time_features.weight"] = tensor
            continue
        *parts, kind = name.split(".")
        level = 0
        # Every level is nested in the one above: net.3 holds the second, main.7 each further one.
        while parts[:2] == (["net", "3"] if level == 0 else ["main", "7"]):
            parts, level = parts[2:], level + 1
        place, rest = int(parts[1]), ".".join(parts[2:])
        if not rest:  # a change of rate
            continue
        middle = 3 if level == 0 else 7
        half, first = ("down_levels", middle - 6 if level else 0) if place < middle else ("up_levels", middle + 1)
        number, is_attention = divmod(place - first, 2) if level else (place - first, 0)
        group, names = ("attentions", layer) if is_attention else ("blocks", block)
        if is_attention and tensor.ndim == 3:  # a convolution over one sample
            tensor = tensor[..., 0]
        converted[f"{half}.{level}.{group}.{number}.{names[rest]}.{kind}"] = tensor
    return converted
