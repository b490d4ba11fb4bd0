"""Recipes for pixel language models: where the weights come from.

A recipe is plain data, so it can be written in YAML, saved in a checkpoint and built again anywhere.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from lit_models.pixel.configuration import PixelLMConfig
    from lit_models.pixel.modeling import (
        PixelForCausalLM,
        PixelForSequenceClassification,
        PixelForTokenClassification,
        PixelPreTrainedModel,
    )


class PixelBackbone(ABC):
    """Recipe for a pixel language model, or for a classifier or tagger on its trunk."""

    @abstractmethod
    def load(self, model_class: "type[PixelPreTrainedModel]", **options: Any) -> Any:  # noqa: ANN401
        """Make a network.

        Args:
            model_class: class of the network.
            **options: fields of the configuration that depend on the task.
        """

    def build(self) -> "PixelForCausalLM":
        """Make the language model, in training mode."""
        from lit_models.pixel.modeling import PixelForCausalLM

        model: PixelForCausalLM = self.load(PixelForCausalLM).train()
        return model

    def build_classifier(self, num_labels: int) -> "PixelForSequenceClassification":
        """Make the classifier, in training mode; with one label it rates.

        Args:
            num_labels: number of classes.
        """
        from lit_models.pixel.modeling import PixelForSequenceClassification

        model: PixelForSequenceClassification = self.load(PixelForSequenceClassification, num_labels=num_labels).train()
        return model

    def build_tagger(self, num_labels: int) -> "PixelForTokenClassification":
        """Make the tagger, in training mode.

        Args:
            num_labels: number of tags.
        """
        from lit_models.pixel.modeling import PixelForTokenClassification

        model: PixelForTokenClassification = self.load(PixelForTokenClassification, num_labels=num_labels).train()
        return model


@dataclass
class FromPixelConfig(PixelBackbone):
    """A model trained from scratch.

    Args:
        overrides: fields of `PixelLMConfig` that replace the defaults, which are those of PixelGPT.
        dtype: type of the weights.
        attn: attention implementation, for example "sdpa" or "flash_attention_2".
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn: str | None = None

    def config(self, **options: Any) -> "PixelLMConfig":  # noqa: ANN401
        """The configuration.

        Args:
            **options: further fields.

        Raises:
            ValueError: if an override is not a field of the configuration, or its value is out of range.
        """
        from lit_models.pixel.configuration import PixelLMConfig

        _check_fields(self.overrides)
        return PixelLMConfig(**(self.overrides | options))

    def load(self, model_class: "type[PixelPreTrainedModel]", **options: Any) -> Any:  # noqa: ANN401
        """Initialise a network; see `PixelBackbone.load`."""
        attn = {} if self.attn is None else {"attn_implementation": self.attn}
        return model_class._from_config(self.config(**options), dtype=_dtype(self.dtype), **attn)


@dataclass
class FromPixelPretrained(PixelBackbone):
    """A model by hub id or local folder, such as a released checkpoint or what `callbacks.ExportPretrained` wrote.

    Args:
        name: hub id or folder.
        dtype: type of the weights, whatever type they were saved in.
        channels: how colour weights become grey ones, if `overrides` has `num_channels: 1`: "mean" of the kernel over
            the channels as the released fine-tuning does, or "sum", which keeps the projection of grey input.
        overrides: fields of the configuration that replace the saved ones.
        attn: attention implementation, for example "sdpa" or "flash_attention_2".
        revision: branch, tag or commit on the hub.
    """

    name: str
    dtype: str = "float32"
    channels: Literal["mean", "sum"] = "mean"
    overrides: dict[str, Any] = field(default_factory=dict)
    attn: str | None = None
    revision: str | None = None

    def load(self, model_class: "type[PixelPreTrainedModel]", **options: Any) -> Any:  # noqa: ANN401
        """Load a network; see `PixelBackbone.load`.

        Raises:
            ValueError: if there is no such model, or an override is not a field of the configuration.
        """
        _check_fields(self.overrides)
        attn = {} if self.attn is None else {"attn_implementation": self.attn}
        try:
            return model_class.from_pretrained(
                self.name,
                dtype=_dtype(self.dtype),
                revision=self.revision or "main",
                resize_channels=self.channels,
                **attn,
                **(self.overrides | options),
            )
        except OSError as error:
            raise ValueError(
                f"name: {self.name!r} is neither a model on the hub nor a local folder with one; pre-training writes "
                "such a folder with callbacks.ExportPretrained"
            ) from error


def _check_fields(overrides: dict[str, Any]) -> None:
    from lit_models.pixel.configuration import PixelLMConfig

    known = PixelLMConfig()
    for name in overrides:
        if not hasattr(known, name):
            raise ValueError(f"overrides: {name!r} is not an option of PixelLMConfig; see its documentation")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r} is not a torch type such as float32 or bfloat16")
    return dtype
