"""Averages of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor


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
