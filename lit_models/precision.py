"""Precisions of the Trainer that keep weights in another type than float32."""

from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision

TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Types of weights."""


class WeightPrecision(Precision):
    """Networks in another type, and everything else as it is in float32.

    It takes the place of Lightning's plugins of the same names, which change the batches, the type of all new tensors,
    averages and metrics too: targets, times, noise and rewards would be rounded to three digits.

    Args:
        replaced: the plugin of Lightning.
    """

    def __init__(self, replaced: HalfPrecision | DoublePrecision) -> None:
        self.replaced = replaced
        self.precision: Any = replaced.precision
        self.dtype = TYPES[replaced.precision]


def take_over(trainer: Trainer, stage: str) -> None:
    """Have the precision of a trainer concern the weights of networks only.

    Args:
        trainer: before its networks are built; other precisions and plugins of your own stay.
        stage: "fit" and so on.

    Raises:
        ValueError: if nothing can be trained in this precision.
    """
    plugin = trainer.precision_plugin
    precision = str(plugin.precision)
    if stage == "fit" and precision == "16-true":
        raise ValueError(
            "trainer.precision: 16-true keeps gradients and the optimizer in float16, where small numbers become 0 and "
            "the weights NaN; take bf16-true, or bf16-mixed"
        )
    if type(plugin) in (HalfPrecision, DoublePrecision):
        trainer.strategy.precision_plugin = WeightPrecision(cast(HalfPrecision, plugin))


def give_back(trainer: Trainer) -> None:
    """Undo `take_over`, since the next module of a trainer may not cast its weights by itself."""
    plugin = trainer.precision_plugin
    if isinstance(plugin, WeightPrecision):
        trainer.strategy.precision_plugin = plugin.replaced


def weight_type(trainer: Trainer | None) -> torch.dtype | None:
    """Type that a trainer wants weights in; None to leave them as they are."""
    plugin = None if trainer is None else trainer.precision_plugin
    return plugin.dtype if isinstance(plugin, WeightPrecision) else None
