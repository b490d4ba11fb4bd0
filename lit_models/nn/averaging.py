"""Averages of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float) -> None:
    """Move an average in place: average ← decay · average + (1 - decay) · online.

    Args:
        average: float32 tensors to change, since a small step rounds away in 16 bits.
        online: tensors of the same shapes in the same order, in any floating dtype.
        decay: share of the old average that stays.
    """
    averages = list(average)
    if averages:
        targets = [new.to(old.dtype) for old, new in zip(averages, online, strict=True)]
        torch._foreach_lerp_(averages, targets, 1 - decay)
