"""Callbacks that disturb a run at a known place: signals, errors, and waiting for somebody else's signal."""

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback

from lit_models import signals

WAIT_S = 300


class At(Callback):
    """Does something the n-th time that a run comes to a place.

    Args:
        place: `start`, `batch`, `validation`, `epoch`, `end` or `test`.
        at: how manieth time.
        rank: of the process that does it; None for all.
    """

    def __init__(self, place: str, at: int = 1, rank: int | None = 0) -> None:
        self.place, self.at, self.rank, self.seen = place, at, rank, 0

    def act(self, trainer):
        raise NotImplementedError

    def _come(self, trainer, place):
        if place == self.place and not trainer.sanity_checking:
            self.seen += 1
            if self.seen == self.at and self.rank in (None, trainer.global_rank):
                self.act(trainer)

    def on_fit_start(self, trainer, pl_module):
        self._come(trainer, "start")

    def on_train_batch_start(self, trainer, *_):
        self._come(trainer, "batch")

    def on_validation_batch_start(self, trainer, *_):
        self._come(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._come(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self._come(trainer, "end")

    def on_test_batch_start(self, trainer, *_):
        self._come(trainer, "test")


class SignalAt(At):
    """Sends a signal to its own process, or the one that forked it.

    Args:
        place: see `At`.
        at: see `At`.
        rank: see `At`.
        name: of the signal.
        parent: send it to the parent.
    """

    def __init__(
        self, place: str, at: int = 1, rank: int | None = 0, name: str = "SIGUSR1", parent: bool = False
    ) -> None:
        super().__init__(place, at, rank)
        self.name, self.parent = name, parent

    def act(self, trainer):
        os.kill(os.getppid() if self.parent else os.getpid(), getattr(signal, self.name))


class KillAt(At):
    """Kills its own process, as a node does that loses power; see `At`."""

    def act(self, trainer):
        os.kill(os.getpid(), signal.SIGKILL)


class WaitAt(At):
    """Waits for a signal from outside, in one start of a job only; the file says that it waits.

    Args:
        place: see `At`.
        at: see `At`.
        file: written when it waits.
        restarts: of the job, in the start that it waits in.
    """

    def __init__(self, place: str, at: int, file: str, restarts: int = 0) -> None:
        super().__init__(place, at)
        self.file, self.restarts = file, restarts

    def act(self, trainer):
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) != self.restarts:
            return
        Path(self.file).touch()
        deadline = time.monotonic() + WAIT_S
        while signals.received() is None:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody sent a signal")
            time.sleep(0.02)


class RaiseAt(At):
    """Fails.

    Args:
        place: see `At`.
        at: see `At`.
        rank: see `At`.
        message: of the error.
    """

    def __init__(self, place: str, at: int = 1, rank: int | None = 0, message: str = "the original error") -> None:
        super().__init__(place, at, rank)
        self.message = message

    def act(self, trainer):
        raise RuntimeError(self.message)


class HangAt(At):
    """Never comes back, as if waiting for other processes, whatever signal it gets.

    Args:
        place: see `At`.
        at: see `At`.
        rank: see `At`.
    """

    def act(self, trainer):
        while True:
            time.sleep(1)


def added(folder: Path, name: str, /, **options: object) -> list[str]:
    """Arguments of the command line that add one of these callbacks.

    Args:
        folder: for the configuration file.
        name: of the class.
        options: of the class.
    """
    path = folder / f"{name}.yaml"
    entry = json.dumps({"class_path": f"tests.stopping.{name}", "init_args": options})
    path.write_text(f"trainer:\n  callbacks+:\n    - {entry}\n")
    return ["--config", str(path)]
