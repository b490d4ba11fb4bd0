"""Recipes for networks on waveforms: what is built, or where the weights come from.

A recipe is plain data, so it can be written in YAML, saved in a checkpoint and built again anywhere.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn


def _paper_channels() -> list[int]:
    return [128, 128, 256, 256, *[512] * 10]


class WaveformBackbone(ABC):
    """Recipe for a network that predicts velocities of waveforms."""

    @abstractmethod
    def load(self, text_dim: int | None) -> nn.Module:
        """Make the network.

        Args:
            text_dim: width of the text encoder; None without texts.
        """

    def build(self, text_dim: int | None = None) -> nn.Module:
        """Make the network, in training mode and with all weights trained.

        Args:
            text_dim: width of the text encoder that the network is to read; None without texts.

        Returns:
            A `WaveformUNet1DModel`, or diffusers' `UNet1DModel`.

        Raises:
            ValueError: if an option is out of its range, or the network cannot read texts of that width.
        """
        network = self.load(text_dim)
        # The frequencies of diffusers' own network are constants that it keeps as a parameter.
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith("time_proj."))
        return network.train()


@dataclass
class WaveformUNet(WaveformBackbone):
    """A `WaveformUNet1DModel` trained from scratch; the defaults are the sizes of ERNIE-Music.

    Args:
        sample_size: usual length in samples; any length is accepted.
        sample_rate: samples per second.
        data_scale: factor on waveforms before they are diffused, by which generated ones are divided. Best is one
            divided by the deviation of the data.
        in_channels: 1 for mono, 2 for stereo.
        channels: channels of each level, at least two levels.
        strides: factor between each level and the next; 2 is a fixed filter, others are trained convolutions. By
            default all are 2.
        resampling: the fixed filter.
        patch: samples that are folded into channels at the input and unfolded at the output.
        rep: blocks of each level on the way down, and on the way up.
        kernel_size: samples that a kernel covers, odd.
        attn_from_level: first level with attention, counted from 1; null for none.
        head_dim: channels per attention head.
        time_dim: features of the time, even.
        text_dim: width of the text encoder; null takes that of `model.text`. Set it to read vectors of that width from
            the batches instead of texts.
        text_attention: whether attention reads the tokens of the text; off for a vector alone.
        fuse: how the vector of the text joins the time at the input.
        fuse_dim: width to which the vector is projected before it is appended; null to append it as it is.
        adaln: whether the time and the vector also scale and shift the first norm of every block.
        adaln_dim: width of the network that computes those.
        init_scale: factor on the default initialisation of all levels.
        checkpoint_levels: first levels whose activations are computed again in the backward pass.
    """

    sample_size: int = 327680
    sample_rate: int = 16000
    data_scale: float = 1.0
    in_channels: int = 2
    channels: list[int] = field(default_factory=_paper_channels)
    strides: list[int] | None = None
    resampling: Literal["cubic", "linear", "lanczos3"] = "cubic"
    patch: int = 1
    rep: int = 3
    kernel_size: int = 5
    attn_from_level: int | None = 8
    head_dim: int = 32
    time_dim: int = 16
    text_dim: int | None = None
    text_attention: bool = True
    fuse: Literal["concat", "sum", "none"] = "concat"
    fuse_dim: int | None = None
    adaln: bool = False
    adaln_dim: int = 128
    init_scale: float = 0.5
    checkpoint_levels: int = 0

    def load(self, text_dim: int | None) -> nn.Module:
        """Initialise the network; see `WaveformBackbone.build`."""
        from lit_models.diffusion.modeling import WaveformUNet1DModel

        if text_dim is not None and self.text_dim not in (None, text_dim):
            raise ValueError(
                f"model.backbone.text_dim: {self.text_dim} is not the width of the text encoder, {text_dim}; "
                "leave it null"
            )
        try:
            return WaveformUNet1DModel(**(asdict(self) | {"text_dim": text_dim or self.text_dim}))
        except ValueError as error:
            raise ValueError(f"model.backbone: {error}") from error


@dataclass
class UnconditionalUNet1D(WaveformBackbone):
    """diffusers' `UNet1DModel` in the layout of Dance Diffusion, trained from scratch, as a peer without texts.

    Args:
        sample_size: usual length in samples.
        sample_rate: samples per second.
        in_channels: 1 for mono, 2 for stereo.
        channels: channels of each level, at least two levels.
        attn_from_level: first level with attention, counted from 1 and at least 2; null for none.
        time_dim: features of the time, even; their frequencies are not trained.
    """

    sample_size: int = 327680
    sample_rate: int = 16000
    in_channels: int = 2
    channels: list[int] = field(default_factory=_paper_channels)
    attn_from_level: int | None = 8
    time_dim: int = 16

    def load(self, text_dim: int | None) -> nn.Module:
        """Initialise the network; see `WaveformBackbone.build`."""
        import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

        # isort: split
        from diffusers.models.unets.unet_1d import UNet1DModel

        if text_dim is not None:
            raise ValueError("model.text: UnconditionalUNet1D reads no text; set model.text to null")
        depth = len(self.channels)
        if depth < 2:
            raise ValueError(f"model.backbone.channels: {depth} levels are too few; give at least two")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ValueError(f"model.backbone.time_dim: {self.time_dim} is not even; give an even number")
        if self.attn_from_level is not None and not 2 <= self.attn_from_level <= depth:
            raise ValueError(
                f"model.backbone.attn_from_level: {self.attn_from_level} is not a level from 2 to {depth}; choose one, "
                "or null"
            )
        attending = 0 if self.attn_from_level is None else depth + 1 - self.attn_from_level
        plain = depth - 1 - attending
        return UNet1DModel(
            sample_size=self.sample_size,
            sample_rate=self.sample_rate,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            extra_in_channels=self.time_dim,
            time_embedding_type="fourier",
            time_embedding_dim=self.time_dim,
            flip_sin_to_cos=False,
            use_timestep_embedding=False,
            down_block_types=("DownBlock1DNoSkip", *["DownBlock1D"] * plain, *["AttnDownBlock1D"] * attending),
            up_block_types=(*["AttnUpBlock1D"] * attending, *["UpBlock1D"] * plain, "UpBlock1DNoSkip"),
            block_out_channels=tuple(self.channels),
        )


@dataclass
class PretrainedWaveform(WaveformBackbone):
    """A network by folder or hub id: one that `save_pretrained` wrote, alone or in a pipeline.

    Args:
        name: folder or hub id of a `WaveformUNet1DModel` or `UNet1DModel`, or of a pipeline with such a `unet`.
        dtype: type of the weights, whatever type they were saved in.
        revision: branch, tag or commit on the hub.
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None

    def load(self, text_dim: int | None) -> nn.Module:
        """Load the network; see `WaveformBackbone.build`."""
        import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

        # isort: split
        from diffusers.models.unets.unet_1d import UNet1DModel

        from lit_models.diffusion.modeling import WaveformUNet1DModel

        classes: dict[str, Any] = {kind.__name__: kind for kind in (WaveformUNet1DModel, UNet1DModel)}
        config, place = self._config()
        kind = classes.get(str(config.get("_class_name")))
        if kind is None:
            raise ValueError(
                f"model.backbone.name: {self.name!r} holds a {config.get('_class_name')}, and not one of "
                f"{', '.join(classes)}; name another"
            )
        network: nn.Module = kind.from_pretrained(self.name, torch_dtype=_dtype(self.dtype), **place)
        width = getattr(network, "text_dim", None)
        if text_dim is not None and text_dim != width:
            reads = "no text" if width is None else f"texts of width {width}"
            raise ValueError(
                f"model.text: its encoder has width {text_dim}, but {self.name!r} reads {reads}; take the text encoder "
                "it was trained with, or set model.text to null"
            )
        return network

    def _config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Configuration of the network, and the options that find it."""
        from lit_models.diffusion.modeling import WaveformUNet1DModel

        place: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        for folder in ({}, {"subfolder": "unet"}):
            if Path(self.name).is_dir() and not Path(self.name, folder.get("subfolder", ""), "config.json").is_file():
                continue
            try:
                return WaveformUNet1DModel.load_config(self.name, **place, **folder), place | folder
            except OSError:  # not there: the other place, and then the message below
                continue
        raise ValueError(
            f"model.backbone.name: {self.name!r} is neither a network or pipeline on the hub nor a local folder with "
            "one; training writes such a folder with callbacks.ExportPretrained"
        )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model.backbone.dtype: {name!r} is not a torch type such as float32 or bfloat16")
    return dtype
