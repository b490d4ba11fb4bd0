"""Where each process is when a run stands still."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

HEADER = 200
"""Bytes of the line that tells where a process is."""
SLACK = 0.1
"""Share of the limit by which the alarm may come early; moving it with every batch would cost more than it tells."""
GRACE = 1.0
"""Seconds at least after which the alarm without Python follows, if no other thread could run until then."""


class HangWatch(Callback):
    """Writes where each process is, when a training step or an evaluation batch makes no progress for too long.

    Each process writes the Python stacks of all its threads to `hang-rank=N.txt` in the run's folder, tells so in one
    line on stderr, with its rank, host, process id, stage and batch, and goes on waiting. It does so again each time
    the limit has passed, and at once when it gets the signal SIGUSR2 (`kill -USR2 PID`; `scancel --signal=USR2 JOB`
    for all processes of a job). The first line of the file tells where the process is at the moment, so that it helps
    after a kill as well. Files of processes that never stood still are removed at the end of the run.

    Progress is the begin or end of a batch, of a backward pass and of an optimizer step. Waiting for data and for other
    processes, checkpoints, and the first compilation of a network count as part of what comes before or after them.

    Args:
        timeout_s: seconds without progress after which stacks are written; up to a tenth earlier.
        abort: end the process then with exit code 1, without cleaning up, so that a launcher ends the others and the
            run can start again, instead of going on waiting.
        dirpath: folder of the files; `trainer.default_root_dir` by default.

    Raises:
        ValueError: if the limit is not positive.

    Note:
        Where code in C holds the interpreter's lock, so that no other thread can run, stacks are written by a thread
        without Python, at most a tenth of the limit (or a second) later; the line on stderr then has to wait. Data is
        prepared and networks are built unwatched, but the signal is listened to from the callback's `setup` on, also by
        data loaders' worker processes that are forked. It is left alone where the program listens to it already, and
        ends processes that don't, as it always does. Stacks of threads without Python, such as NCCL's, are not shown.
        `timeout_s` must exceed the longest wait: a step of PPO counts by its parts, but generation is one of them. Of
        several in one Trainer the last one watches, so one that is added to a preset replaces the preset's.

    Example::

        Trainer(callbacks=[HangWatch(timeout_s=600)])
    """

    def __init__(self, timeout_s: float = 600.0, abort: bool = False, dirpath: str | None = None) -> None:
        if timeout_s <= 0:
            raise ValueError(f"callbacks.HangWatch.timeout_s must be positive, got {timeout_s}")
        self.timeout_s, self.abort, self.dirpath = timeout_s, abort, dirpath
        self._watch: _Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The options alone, since a watch belongs to its process."""
        return {"timeout_s": self.timeout_s, "abort": self.abort, "dirpath": self.dirpath, "_watch": None}

    def _at(self, where: str) -> None:
        if self._watch is not None:
            self._watch.progress(where)

    def _end(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # -- begin and end -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the signal."""
        self._end()
        everyone: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self is not [callback for callback in everyone if isinstance(callback, HangWatch)][-1]:
            return
        folder = Path(self.dirpath or trainer.default_root_dir)
        self._watch = _Watch(folder, trainer.global_rank, trainer.world_size, self.timeout_s, self.abort)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._at("begin of the sanity check")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._at("begin of training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._at("begin of validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._at("begin of the test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._at("begin of prediction")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell where the process is."""
        self._at("end of validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell where the process is."""
        self._at("end of training")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the watch."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the watch."""
        self._end()

    # -- progress ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Note progress."""
        self._at(f"training batch {batch_idx} of epoch {trainer.current_epoch}, step {trainer.global_step}")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note progress."""
        self._at(f"backward pass of training step {trainer.global_step}")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note progress."""
        self._at(f"after the backward pass of training step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note progress."""
        self._at(f"optimizer step {trainer.global_step}")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Note progress."""
        self._at(f"after training batch {batch_idx} of epoch {trainer.current_epoch}, step {trainer.global_step}")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note progress."""
        self._at(f"validation batch {batch_idx} after step {trainer.global_step}")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note progress."""
        self._at(f"after validation batch {batch_idx} after step {trainer.global_step}")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note progress."""
        self._at(f"test batch {batch_idx}")

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note progress."""
        self._at(f"prediction batch {batch_idx}")


class _Watch:
    """The alarm of one process, its file, and the thread that tells of it.

    Args:
        folder: of the file.
        rank: of this process.
        world_size: number of processes.
        timeout_s: seconds without progress.
        abort: whether the alarm ends the process.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout_s: float, abort: bool) -> None:
        self.timeout_s, self.abort = timeout_s, abort
        self.name = f"rank {rank} of {world_size}, host {socket.gethostname()}, pid {os.getpid()}"
        self.path = folder / f"hang-rank={rank}.txt"
        self.where, self.since = "", time.monotonic()
        self.armed = -float("inf")
        self.lock, self.done = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        # Not in append mode, in which the line could not be written over; what earlier runs wrote stays before it.
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.begin = os.lseek(self.file, 0, os.SEEK_END)
        os.write(self.file, self._line("not yet begun"))
        self.listens = _listen(self.file)

    def _line(self, where: str) -> bytes:
        text = f"{self.name}: {where}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        return text.encode()[: HEADER - 1].ljust(HEADER - 1) + b"\n"

    def progress(self, where: str) -> None:
        """Tell where the process is, and move the alarm, which is not worth it while it is far away."""
        self.where = where
        self.since = time.monotonic()
        os.pwrite(self.file, self._line(where), self.begin)
        if self.since - self.armed >= SLACK * self.timeout_s:
            self._arm()
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="HangWatch", daemon=True)
            self.thread.start()

    def _arm(self) -> None:
        """Set the alarm, and behind it the one without Python, for when code in C lets nobody else run.

        The latter must not go off in a process that runs, since it reads stacks that might change under its hands.
        """
        with self.lock:
            self.armed = time.monotonic()
            limit = self.timeout_s + max(GRACE, SLACK * self.timeout_s)
            faulthandler.dump_traceback_later(limit, repeat=not self.abort, file=self.file, exit=self.abort)

    def _run(self) -> None:
        """Write and tell where the process is, whenever the time has passed."""
        while not self.done.wait(max(self.armed + self.timeout_s - time.monotonic(), 0.0)):
            if time.monotonic() < self.armed + self.timeout_s:
                continue  # moved meanwhile
            line = f"{self.name}: no progress for {time.monotonic() - self.since:.0f} s since {self.where}"
            os.write(self.file, f"\n{line}\n".encode())
            faulthandler.dump_traceback(self.file, all_threads=True)
            then = "the process ends" if self.abort else "still waiting"
            print(f"HangWatch: {line}; stacks are in {self.path}; {then}", file=sys.stderr, flush=True)
            if self.abort:
                os._exit(1)
            self._arm()

    def close(self) -> None:
        """Take everything back, and the file as well if nothing was written to it."""
        self.done.set()
        if self.thread is not None:
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self.listens:
            faulthandler.unregister(signal.SIGUSR2)
        if os.lseek(self.file, 0, os.SEEK_END) == self.begin + HEADER:
            os.ftruncate(self.file, self.begin)
            if not self.begin:
                self.path.unlink(missing_ok=True)
        os.close(self.file)


def _listen(file: int) -> bool:
    """Let SIGUSR2 write stacks, where there is such a signal and nobody else listens to it."""
    unused = (signal.SIG_DFL, signal.SIG_IGN)
    if not hasattr(faulthandler, "register") or signal.getsignal(signal.SIGUSR2) not in unused:
        return False
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    return True
