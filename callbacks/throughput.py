"""How fast a run is, and what it waits for."""

import resource
import sys
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs tokens per second of all processes, the time of a step and of waiting for data, and peak memory.

    Logs `perf/tokens_per_s`, `perf/step_s`, `perf/data_s` and `perf/memory_gib` (CUDA peak, else the process's peak).

    Args:
        window: steps that the rates are averaged over.

    Note:
        Tokens are those the module reports in `step_stats()`; what PPO spends on generating, scoring and updating it
        logs itself as `time/*`. Validation and the writing of checkpoints count neither as steps nor as waiting.

    Example::

        Trainer(callbacks=[Throughput()])
    """

    def __init__(self, window: int = 10) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._begun = self._waited = 0.0
        self._idle_since: float | None = None  # unknown after a pause that is no waiting for data

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to wait for data."""
        self._idle_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Begin a step."""
        self._begun = time.perf_counter()
        self._waited = 0.0 if self._idle_since is None else self._begun - self._idle_since

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """End a step and log the window's averages."""
        now = time.perf_counter()
        stats: Any = pl_module.step_stats
        self._steps.append((stats().get("tokens", 0.0), now - self._begun, self._waited))
        tokens, steps, waits = (sum(column) for column in zip(*self._steps, strict=True))
        pl_module.log("perf/tokens_per_s", tokens / (steps + waits), sync_dist=True, reduce_fx="sum")
        values = {
            "perf/step_s": steps / len(self._steps),
            "perf/data_s": waits / len(self._steps),
            "perf/memory_gib": peak_memory(),
        }
        pl_module.log_dict(values)
        self._idle_since = time.perf_counter()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock, since a checkpoint is about to be written."""
        self._idle_since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to wait for data again, since validation is no waiting."""
        self._idle_since = time.perf_counter()


def peak_memory() -> float:
    """Peak memory in GiB: of CUDA where it is used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
