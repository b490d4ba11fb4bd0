"""Learning-rate schedules: a linear warm-up followed by a decay, per parameter group."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Warmup = int | float | dict[str, int | float]


class _Warmup(LambdaLR):
    """A multiplier that rises linearly from 0 during warm-up and then follows `_decay`.

    Every parameter group keeps its own base learning rate and may have its own warm-up, found by the group's `name`.
    """

    needs_total = True
    """Whether the multiplier depends on the length of the run even without a warm-up given as a share."""

    def __init__(self, optimizer: Optimizer, warmup: Warmup = 0, total: int | None = None) -> None:
        if total is not None and total < 1:
            raise ValueError(
                f"lr_scheduler.total must be at least 1, got {total}; the presets use the trainer's max_steps"
            )
        self.total = total
        super().__init__(
            optimizer, [self._multiplier(group.get("name", ""), warmup) for group in optimizer.param_groups]
        )

    def _decay(self, progress: float) -> float:
        """Multiplier after warm-up at `progress` in [0, 1]."""
        raise NotImplementedError

    def _multiplier(self, name: str, warmup: Warmup) -> Callable[[int], float]:
        if isinstance(warmup, dict):
            warmup = warmup.get(name, warmup.get(name.removesuffix("_no_decay"), 0))
        if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
            raise ValueError(
                f"lr_scheduler.warmup takes steps (int) or a share of total (float in [0, 1]), got {warmup}"
            )

        def multiplier(step: int) -> float:
            if step == 0:  # asked for at construction, when a total to be found by the module is not known yet
                return 0.0 if warmup > 0 else self._decay(0.0)
            steps = round(warmup * self._known_total()) if isinstance(warmup, float) else warmup
            if step < steps:
                return step / steps
            if not self.needs_total:
                return self._decay(0.0)
            return self._decay(min(1.0, (step - steps) / max(1, self._known_total() - steps)))

        return multiplier

    def _known_total(self) -> int:
        if self.total is None:
            raise ValueError(
                "lr_scheduler.total is not set and no trainer knows it; give the number of optimizer steps"
            )
        return self.total


class WarmupConstant(_Warmup):
    """Linear warm-up, then constant.

    Args:
        optimizer: the optimizer to schedule.
        warmup: steps (int), share of `total` (float), or one of these per parameter-group name.
        total: number of optimizer steps of the run, of which `warmup` may be a share; under a trainer, by default,
            those it will take.

    Raises:
        ValueError: if `warmup` or `total` is out of range.
    """

    needs_total = False

    def _decay(self, progress: float) -> float:
        return 1.0


class WarmupLinear(_Warmup):
    """Linear warm-up, then linear decay to `floor` at `total` steps.

    Args:
        optimizer: the optimizer to schedule.
        warmup: steps (int), share of `total` (float), or one of these per parameter-group name.
        total: number of optimizer steps of the run; under a trainer, by default, those it will take.
        floor: final multiplier.

    Raises:
        ValueError: if `warmup` or `total` is out of range.
    """

    def __init__(self, optimizer: Optimizer, total: int | None = None, warmup: Warmup = 0, floor: float = 0.0) -> None:
        self.floor = floor
        super().__init__(optimizer, warmup, total)

    def _decay(self, progress: float) -> float:
        return 1.0 - (1.0 - self.floor) * progress


class WarmupCosine(_Warmup):
    """Linear warm-up, then half a cosine down to `floor` at `total` steps.

    Args:
        optimizer: the optimizer to schedule.
        warmup: steps (int), share of `total` (float), or one of these per parameter-group name.
        total: number of optimizer steps of the run; under a trainer, by default, those it will take.
        floor: final multiplier.

    Raises:
        ValueError: if `warmup` or `total` is out of range.
    """

    def __init__(self, optimizer: Optimizer, total: int | None = None, warmup: Warmup = 0, floor: float = 0.0) -> None:
        self.floor = floor
        super().__init__(optimizer, warmup, total)

    def _decay(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
