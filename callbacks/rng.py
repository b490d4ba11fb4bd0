"""Random states in checkpoints, for resumes that go on as if nothing had happened."""

import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch on this process, as tensors and plain lists."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])


class RNGState(Callback):
    """Saves the random states of every process and restores them before the first batch after a resume.

    Note:
        With another number of processes than the checkpoint was written by, the states are not restored.

    Example::

        Trainer(callbacks=[RNGState()])
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States of all processes, by rank; collective."""
        own = random_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return {"ranks": gathered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first batch."""
        self._loaded = state_dict["ranks"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Restore the states once, after everything else that draws random numbers at the start."""
        if self._loaded is None:
            return
        if len(self._loaded) == trainer.world_size:
            set_random_state(self._loaded[trainer.global_rank])
        else:
            warnings.warn(
                f"random states are not restored: the checkpoint holds those of {len(self._loaded)} processes, this run "
                f"has {trainer.world_size}",
                stacklevel=2,
            )
        self._loaded = None
