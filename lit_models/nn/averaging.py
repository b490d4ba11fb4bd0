"""Averages of weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EMAWarmup = Literal["none", "power", "ratio"]


@torch.no_grad()
def ema_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float) -> None:
    """Move an average in place: average ← decay · average + (1 - decay) · online.

    Args:
        average: Tensors to change; float32, since a small step rounds away in 16 bits. Integer tensors are copied.
        online: Tensors of the same shapes in the same order, in any floating dtype.
        decay: Share of the old average that stays.
    """
    floats: list[Tensor] = []
    targets: list[Tensor] = []
    for old, new in zip(average, online, strict=True):
        if old.is_floating_point():
            floats.append(old)
            targets.append(new.to(old.dtype))
        else:
            old.copy_(new)
    if floats:
        torch._foreach_lerp_(floats, targets, 1 - decay)


def ema_decay(
    step: int, maximum: float = 0.9999, warmup: EMAWarmup = "power", power: float = 0.75, delay: int = 1
) -> float:
    """Share of the old average of weights that stays after an update.

    Args:
        step: number of this update, counted from 0.
        maximum: decay after the warm-up.
        warmup: with k = step - delay - 1, "power" is 1 - (1+k)^-power and "ratio" (1+k) / (10+k), both 0 while k ≤ 0;
            "none" is `maximum` from the start.
        power: exponent of "power".
        delay: number of updates that copy the weights. ema-pytorch has 1, diffusers 0.

    Returns:
        Decay in [0, 1).
    """
    if warmup == "none":
        return maximum
    count = step - delay - 1
    if count <= 0:
        return 0.0
    return min(maximum, 1 - (1 + count) ** -power if warmup == "power" else (1 + count) / (10 + count))


@dataclass(frozen=True)
class EMASchedule:
    """How the decay of an average grows; see `ema_decay`.

    Args:
        decay: weight of the old average after the warm-up, in [0, 1).
        warmup: law of the warm-up.
        power: exponent of the law "power".
        delay: updates that copy the weights, unless there is no warm-up.
    """

    decay: float = 0.9999
    warmup: EMAWarmup = "none"
    power: float = 0.75
    delay: int = 1

    def at(self, step: int) -> float:
        """Decay of an update, counted from 0."""
        return ema_decay(step, self.decay, self.warmup, self.power, self.delay)
