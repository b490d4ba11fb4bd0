"""Random states in checkpoints, for resumes that go on as if nothing had happened."""

import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed


@dataclass
class RandomState:
    """States of the generators of Python, NumPy, torch and the process's CUDA device."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """The present states of this process, which uses no GPU for it that it does not use yet."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators of this process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(self.cuda)

    def plain(self) -> dict[str, Any]:
        """Tensors, numbers and lists only, so that `torch.load(weights_only=True)` reads them."""
        version, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "torch": self.torch,
            "cuda": self.cuda,
        }

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> "RandomState":
        """The states that `plain` gave."""
        version, words, gauss = state["python"]
        keys, *rest = state["numpy"]
        cuda = state["cuda"]
        return cls(
            python=(version, tuple(words), gauss),
            numpy=("MT19937", keys.cpu().numpy().astype(np.uint32), *rest),
            torch=state["torch"].cpu(),
            cuda=None if cuda is None else cuda.cpu(),
        )


class RNGState(Callback):
    """Saves the random states of every process, so that a resumed run draws the numbers the whole run would have drawn.

    Training batches have a random stream of their own: the states that a batch leaves behind are those the next one
    finds. What is drawn in between (by validation, by loaders as they start, by other callbacks) comes from a second
    stream, and so changes nothing in training. Checkpoints hold both streams of each process. A checkpoint written
    after a batch, in the middle of an epoch, after validation or at an epoch's end resumes bitwise.

    Note:
        Random numbers of data loading are the loader's own affair. With another number of processes than the
        checkpoint was written by, nothing is restored, with a warning.

    Example::

        Trainer(callbacks=[RNGState()])
    """

    def __init__(self) -> None:
        self._training: RandomState | None = None
        self._between: RandomState | None = None
        self._loaded: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Go to the training stream; the first time after a resume, to the streams of the checkpoint."""
        if not self._take_over(trainer):
            self._between = RandomState.now()
        if self._training is not None:
            self._training.restore()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the stream of the checkpoint where a resumed run goes on with validation."""
        if trainer.state.fn == TrainerFn.FITTING and self._take_over(trainer) and self._between is not None:
            self._between.restore()

    def _take_over(self, trainer: Trainer) -> bool:
        """Take the streams of the checkpoint, once; whether there were any for this process."""
        loaded, self._loaded = self._loaded, []
        if len(loaded) == trainer.world_size:
            own = loaded[trainer.global_rank]
            self._training, self._between = (RandomState.from_plain(own[name]) for name in ("training", "between"))
            return True
        if loaded and trainer.is_global_zero:
            warnings.warn(
                f"random states are not restored, since the checkpoint holds those of {len(loaded)} processes and "
                f"this run has {trainer.world_size}",
                stacklevel=2,
            )
        return False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Leave the training stream."""
        self._training = RandomState.now()
        if self._between is not None:
            self._between.restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the streams of all processes to this callback's state; collective, as is saving itself."""
        between = RandomState.now()
        own = {"training": (self._training or between).plain(), "between": between.plain()}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            distributed.all_gather_object(ranks, own)
        checkpoint["callbacks"][self.state_key] = {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first batch."""
        self._loaded = state_dict["ranks"]
