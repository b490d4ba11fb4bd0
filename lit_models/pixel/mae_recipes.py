"""Recipes for PIXEL, the masked peer of the pixel language models."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lit_models.pixel.functional import ChannelMerge
from lit_models.pixel.recipes import PixelBackbone

if TYPE_CHECKING:
    from lit_models.pixel.modeling_mae import (
        PIXELConfig,
        PIXELForPreTraining,
        PIXELForSequenceClassification,
        PIXELForTokenClassification,
    )


class PIXELBackbone(PixelBackbone):
    """Recipe for PIXEL: encoder and decoder, or a classifier or tagger on the encoder."""

    @abstractmethod
    def load(self, model_class: Any, **options: Any) -> Any:  # noqa: ANN401
        """Make a network; see `PixelBackbone.load`."""

    def build(self) -> "PIXELForPreTraining":  # type: ignore[override]
        """Make encoder and decoder, in training mode."""
        from lit_models.pixel.modeling_mae import PIXELForPreTraining

        model: PIXELForPreTraining = self.load(PIXELForPreTraining).train()
        return model

    def build_classifier(self, num_labels: int) -> "PIXELForSequenceClassification":  # type: ignore[override]
        """Make the classifier, in training mode; with one label it rates.

        Args:
            num_labels: number of classes.
        """
        from lit_models.pixel.modeling_mae import PIXELForSequenceClassification

        model: PIXELForSequenceClassification = self.load(PIXELForSequenceClassification, num_labels=num_labels).train()
        return model

    def build_tagger(self, num_labels: int) -> "PIXELForTokenClassification":  # type: ignore[override]
        """Make the tagger, in training mode.

        Args:
            num_labels: number of tags.
        """
        from lit_models.pixel.modeling_mae import PIXELForTokenClassification

        model: PIXELForTokenClassification = self.load(PIXELForTokenClassification, num_labels=num_labels).train()
        return model


@dataclass
class FromPIXELConfig(PIXELBackbone):
    """A PIXEL trained from scratch.

    Args:
        overrides: fields of `PIXELConfig` that replace the defaults, which are those of PIXEL-base.
        dtype: type of the weights.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def config(self, **options: Any) -> "PIXELConfig":  # noqa: ANN401
        """The configuration.

        Args:
            **options: further fields.

        Raises:
            ValueError: if an override is not a field of the configuration, or its value is out of range.
        """
        from lit_models.pixel.modeling_mae import PIXELConfig

        _check_fields(self.overrides)
        return PIXELConfig(**(self.overrides | options))

    def load(self, model_class: Any, **options: Any) -> Any:  # noqa: ANN401
        """Initialise a network; see `PixelBackbone.load`."""
        return model_class._from_config(self.config(**options), dtype=_dtype(self.dtype))


@dataclass
class FromPIXELPretrained(PIXELBackbone):
    """A PIXEL by hub id or local folder, such as a released checkpoint or what `callbacks.ExportPretrained` wrote.

    Args:
        name: hub id or folder.
        dtype: type of the weights, whatever type they were saved in.
        channels: how colour weights become grey ones, if `overrides` has `num_channels: 1`: "mean" of the kernel over
            the channels as the released fine-tuning does, or "sum", which keeps the projection of grey input.
        overrides: fields of the configuration that replace the saved ones, such as `pooling` or a dropout.
        revision: branch, tag or commit on the hub.
    """

    name: str
    dtype: str = "float32"
    channels: ChannelMerge = "mean"
    overrides: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None

    def load(self, model_class: Any, **options: Any) -> Any:  # noqa: ANN401
        """Load a network; see `PixelBackbone.load`.

        Raises:
            ValueError: if there is no such model, or an override does not fit its weights.
        """
        _check_fields(self.overrides)
        options = self.overrides | options
        channels = options.pop("num_channels", None)
        try:
            model = model_class.from_pretrained(
                self.name, dtype=_dtype(self.dtype), revision=self.revision or "main", **options
            )
        except OSError as error:
            raise ValueError(
                f"name: {self.name!r} is neither a model on the hub nor a local folder with one; pre-training writes "
                "such a folder with callbacks.ExportPretrained"
            ) from error
        if channels not in (None, model.config.num_channels):
            if channels != 1:
                raise ValueError(
                    f"overrides.num_channels: the weights of {self.name!r} have {model.config.num_channels} channels, "
                    f"which cannot become {channels}; take {model.config.num_channels} or 1"
                )
            model.merge_channels(self.channels)
        return model


def _check_fields(overrides: dict[str, Any]) -> None:
    from lit_models.pixel.modeling_mae import PIXELConfig

    known = PIXELConfig()
    for name in overrides:
        if not hasattr(known, name):
            raise ValueError(f"overrides: {name!r} is not an option of PIXELConfig; see its documentation")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r} is not a torch type such as float32 or bfloat16")
    return dtype
