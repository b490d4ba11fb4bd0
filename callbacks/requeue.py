"""Runs that are told to stop save themselves, and go on later as if nothing had happened."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.rng import RandomState
from lit_models import signals

EXIT_CODE = 75
"""Of a run that was stopped and can go on: EX_TEMPFAIL of `sysexits.h`, that is, try again later."""
NAME = "hpc_ckpt_"
"""Lightning resumes from the checkpoint of this name and the highest number in `default_root_dir` when on SLURM."""
DRAFT = ".requeue-draft"
SCONTROL_S = 30.0
UNKNOWN_SAVE_S = 120.0
VAL_PROGRESS = "epoch_loop.val_loop.batch_progress"


class Preempted(SystemExit):
    """A run was stopped from outside; what it needs to go on is saved."""


class Requeue(Callback):
    """Stops a run that is told to, at a place it can go on from exactly, and has SLURM start the job again.

    On SIGUSR1 or SIGTERM to any process, and in time before the job's time limit, all processes finish the batch they
    are at, write `hpc_ckpt_N.ckpt` to `default_root_dir`, and end with exit code 75 (those of other ranks with 0). A
    signal that arrives earlier is heeded after the first batch, so that every start gets further than the one before.
    The ending is none of a finished run: no validation, no export, no test follows. On SLURM rank 0 requeues the job,
    which finds the checkpoint by itself; elsewhere `--ckpt_path last` does, or in Python `fit(ckpt_path=...)`.

    A validation that is interrupted is run again as a whole by the run that goes on. A run that ends normally removes
    the checkpoint it went on from. A second SIGTERM, one second or more after the first, ends the process at once.

    Args:
        margin: seconds before the job's end at which to stop. By default twice the longest recent batch, and twice the
            time of writing a checkpoint (120 s until one was written), and a minute; but at most half of the job's
            time. Without a time limit it never comes to that.
        every_n_batches: batches between two looks at whether to stop, each of which all processes take part in.
        requeue: whether to requeue the SLURM job.
        max_requeues: how often the job is requeued at most; without limit by default. A test or prediction that was
            not ready after half of the job's time is not requeued, since it would start anew and end the same way.

    Raises:
        ValueError: if an option is out of range.

    Note:
        It looks only after batches that made an optimizer step, since accumulated gradients are not in checkpoints. A
        module that optimizes by hand must not keep gradients from one batch to the next. Means that Lightning keeps
        over an epoch (`log(on_epoch=True)`) start anew in a resumed epoch. A callback that swaps weights for
        validation (`WeightAveraging`) makes it wait for the end of validation.

    Example::

        Trainer(callbacks=[RNGState(), Requeue()])
    """

    def __init__(
        self,
        margin: float | None = None,
        every_n_batches: int = 1,
        requeue: bool = True,
        max_requeues: int | None = None,
    ) -> None:
        if margin is not None and margin < 0:
            raise ValueError(f"callbacks.Requeue.margin must not be negative, got {margin}")
        if every_n_batches < 1:
            raise ValueError(f"callbacks.Requeue.every_n_batches must be at least 1, got {every_n_batches}")
        if max_requeues is not None and max_requeues < 0:
            raise ValueError(f"callbacks.Requeue.max_requeues must not be negative, got {max_requeues}")
        self.margin, self.every_n_batches = margin, every_n_batches
        self.requeue, self.max_requeues = requeue, max_requeues
        self.job = Job.of_process()
        self._installed = False
        self._begin()

    def _begin(self) -> None:
        self.pace = Pace()
        self._stopping = False  # all processes have agreed
        self._ended = False  # saved, where there was something to save
        self._saved: Path | str | None = None
        self._batches = 0  # finished since the process started
        self._max_steps: int | None = None  # the trainer's, while another one lets the last validation run
        self._validated = 0  # batches of validations before the present one
        self._again = False  # a resumed run is to begin with this validation
        self._before_validation: RandomState | None = None
        self._common: list[float] = []  # validation batches that every rank has, by loader

    # -- signals -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to signals if nobody does, and come after all other callbacks, whose state is to be saved."""
        self._installed |= signals.install()
        self._begin()
        run: Any = trainer
        run.callbacks = [*(callback for callback in run.callbacks if callback is not self), self]
        # Lightning's own handlers save, talk to other processes and end the run within the signal, wherever it strikes.
        run._signal_connector.register_signal_handlers = lambda: self._on_restored(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals as they were."""
        self._leave()

    def _leave(self) -> None:
        if self._installed:
            signals.uninstall()
            self._installed = False

    def _on_restored(self, trainer: Trainer) -> None:
        """Let a run go on that was stopped in the validation after its last step, though no step is left to take."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn == TrainerFn.FITTING and _no_steps_left(trainer) and _within_validation(trainer):
            self._max_steps, loop.max_steps = loop.max_steps, trainer.global_step + 1

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether all processes are to stop; a collective operation."""
        if not self._stopping:
            wanted = signals.received() is not None or self._time_is_up(trainer)
            self._stopping = bool(trainer.strategy.reduce_boolean_decision(wanted, all=False))
        return self._stopping

    def _time_is_up(self, trainer: Trainer) -> bool:
        if self.job is None or not trainer.is_global_zero:
            return False
        margin = self.pace.margin() if self.margin is None else self.margin
        return self.job.ends_within(margin)

    # -- places to stop at -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        self.pace.lap(counts=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """End the run that was saved after the batch before, whose values are logged by now."""
        if self._ended:
            raise Preempted(self._exit_code(trainer))
        if self._max_steps is not None:
            raise ValueError(
                "the run was stopped before its last validation, but with these options none is due now; set "
                "trainer.val_check_interval and trainer.check_val_every_n_epoch as they were"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Look whether to stop, and save."""
        self._batches += 1
        self.pace.lap()
        if (batch_idx + 1) % self.every_n_batches and not self._stopping:
            return
        if not _stepped(trainer) or _stops_by_itself(trainer) or not self._agreed(trainer):
            return
        # At its last batch an epoch is as good as complete; what belongs to its end would be left out by a resumed run.
        if not _last_of_epoch(trainer) and not _no_steps_left(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a saved run whose data ended unexpectedly."""
        if self._ended:
            raise Preempted(self._exit_code(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where validation started, and save there if it is not to start at all."""
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        progress.total.reset_on_restart()  # undoes the mark that made this run come back to validation
        self._validated = progress.total.completed - progress.current.completed
        self._before_validation = RandomState.now()
        self._common = _common_batches(trainer)
        self.pace.lap(counts=False)
        if self._ended or (self._stopping and self._may_stop_in_validation(trainer)):
            self._save_before_validation(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look whether to stop, and save as if validation had not started."""
        self.pace.lap()
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop_evaluation(trainer)
            return
        if trainer.sanity_checking or not self._may_stop_in_validation(trainer):
            return
        common = batch_idx + 1 < self._common[dataloader_idx]  # and it is not the last one
        if common and (batch_idx + 1) % self.every_n_batches == 0 and self._agreed(trainer):
            self._save_before_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the time of a batch."""
        self.pace.lap(counts=False)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
        """Stop a test, which starts anew in a requeued job."""
        self._stop_evaluation(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
        """Stop a prediction, which starts anew in a requeued job."""
        self._stop_evaluation(trainer)

    def _stop_evaluation(self, trainer: Trainer) -> None:
        # Not agreed on: nothing has to be saved, and ranks may have different numbers of batches.
        if signals.received() is not None:
            self._stopping = True
            raise Preempted(EXIT_CODE)

    def _may_stop_in_validation(self, trainer: Trainer) -> bool:
        # A validation that is the first thing a start does is finished: it might never be, otherwise.
        run: Any = trainer
        swapping = any(isinstance(callback, WeightAveraging) for callback in run.callbacks)
        return self._batches > 0 and _stepped(trainer) and not _stops_by_itself(trainer) and not swapping

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_before_validation(self, trainer: Trainer) -> None:
        assert self._before_validation is not None
        self._before_validation.restore()
        self._again = True
        self._save(trainer)
        raise Preempted(self._exit_code(trainer))

    def _save(self, trainer: Trainer) -> None:
        """Write a whole checkpoint beside its name, move it there, and remove those before; collective."""
        self._ended = True
        run: Any = trainer
        if run.fast_dev_run:
            return
        if _is_remote(trainer.default_root_dir):  # such systems have no move that is done or not
            self._saved = trainer.strategy.broadcast(run._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
            trainer.save_checkpoint(self._saved, weights_only=False)
            return
        root = Path(trainer.default_root_dir)
        old = saved_runs(root)
        number = trainer.strategy.broadcast(_number(old[-1]) + 1 if old else 1)
        draft, path = root / DRAFT, root / f"{NAME}{number}.ckpt"
        if trainer.is_global_zero:
            _remove(draft)
        trainer.strategy.barrier("requeue draft")
        trainer.save_checkpoint(draft, weights_only=False)  # ends with a barrier
        if trainer.is_global_zero:
            os.replace(draft, path)
            for obsolete in old:
                _remove(obsolete)
        trainer.strategy.barrier("requeue")
        self._saved = path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark a checkpoint written in validation so that the resumed run starts this validation first."""
        self.pace.begin_save()
        if self._again:
            seen = self._validated
            # By a batch that was begun and not processed Lightning knows that validation was left in the middle.
            checkpoint["loops"]["fit_loop"][VAL_PROGRESS] = {
                "total": {"ready": seen + 1, "started": seen + 1, "processed": seen, "completed": seen},
                "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
                "is_last_batch": False,
            }

    # -- ends --------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint that this run went on from, which a later run in the same folder must not find."""
        resumed = str(trainer.ckpt_path or "")
        if not trainer.is_global_zero or not Path(resumed).name.startswith(NAME):
            return
        if _is_remote(resumed):
            url_to_fs(resumed)[0].rm(resumed, recursive=True)
        else:
            _remove(Path(resumed))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Requeue the job of a run that was stopped, and say how to go on."""
        stopped = isinstance(exception, Preempted) or self._saved is not None
        if stopped and trainer.is_global_zero:
            self._report(trainer)
        self._leave()

    def _exit_code(self, trainer: Trainer) -> int:
        # Launchers that see one process fail kill the others; 0 lets these end in peace.
        return EXIT_CODE if trainer.is_global_zero else 0

    def _report(self, trainer: Trainer) -> None:
        cause = signals.received() or ("the end of the job's time" if self.job else "a signal to another process")
        kept = f"{self._saved} is saved" if self._saved else "nothing had to be saved"
        again = f"go on with --ckpt_path last, or --ckpt_path {self._saved}" if self._saved else "start it again"
        fate = again
        if self.job is not None:
            refusal = self._refusal(self.job) or self.job.requeue()
            fate = f"job {self.job.id} is requeued" if refusal is None else f"job {self.job.id} {refusal}; {again}"
            if refusal is None and self._batches == 1 and not self.job.half_over():
                fate += "; it should be given more time than --signal says, since it was told to stop at its start"
        rank_zero_info(f"stopped by {cause} after {trainer.global_step} steps: {kept}; {fate}")

    def _refusal(self, job: "Job") -> str | None:
        """Why a job is not to be requeued."""
        if not self.requeue:
            return "is not requeued, since callbacks.Requeue.requeue is off"
        if self.max_requeues is not None and job.restarts >= self.max_requeues:
            return f"is not requeued, since it was {job.restarts} times (callbacks.Requeue.max_requeues)"
        if self._batches == 0 and job.half_over():
            return "is not requeued, since it would not be ready in time then either; give it more"
        return None


class Pace:
    """How long batches and checkpoints take, learnt while they pass."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._save_begun: float | None = None
        self.batch_s = 0.0  # longest of the recent ones
        self.save_s: float | None = None

    def lap(self, counts: bool = True) -> None:
        """Note that a batch, or something else, has ended."""
        now = time.monotonic()
        if self._save_begun is not None:
            self.save_s = max(now - self._save_begun, self.save_s or 0.0)
        elif counts and self._last is not None:
            self.batch_s = max(now - self._last, 0.95 * self.batch_s)  # forgets a long first batch slowly
        self._last, self._save_begun = now, None

    def begin_save(self) -> None:
        """Note that a checkpoint is begun; the next lap ends it."""
        self._save_begun = self._save_begun or time.monotonic()

    def margin(self) -> float:
        """Seconds that stopping needs for sure."""
        save_s = UNKNOWN_SAVE_S if self.save_s is None else self.save_s
        return 60.0 + 2 * self.batch_s + 2 * save_s


class Job:
    """The SLURM job of this process.

    Args:
        id: number of the job, or of an array job and its task, as `12_3`.
        restarts: how often it was requeued before.
    """

    def __init__(self, id: str, restarts: int) -> None:
        self.id, self.restarts = id, restarts
        self._span = _environment_span()
        self._asked = False

    @classmethod
    def of_process(cls) -> "Job | None":
        """The job by the environment; None outside of SLURM and in interactive sessions."""
        id = os.environ.get("SLURM_JOB_ID", "")
        if not id.isdecimal() or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        # Of the tasks of an array job one has the number of the whole, and requeueing that would restart them all.
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
        return cls(id, int(os.environ.get("SLURM_RESTART_COUNT") or 0))

    def ends_within(self, margin: float) -> bool:
        """Whether the job ends within a time.

        Args:
            margin: seconds; half of the job's time where that is less.
        """
        if not self._asked:
            self._ask()
        if not self._over(margin):
            return False
        self._ask()  # the limit may have been raised in the meantime
        return self._over(margin)

    def _over(self, margin: float) -> bool:
        if self._span is None:
            return False
        start, end = self._span
        return end - time.time() <= min(margin, (end - start) / 2)

    def half_over(self) -> bool:
        """Whether half of the job's time has passed; not where it has no limit."""
        if not self._asked:
            self._ask()
        return self._over(float("inf"))

    def _ask(self) -> None:
        self._asked = True
        facts = self.facts()
        times = [_local_time(facts.get(name, "")) for name in ("StartTime", "EndTime")]
        if times[0] is not None and times[1] is not None:
            self._span = (times[0], times[1])
        elif facts:
            self._span = None  # without limit

    def facts(self) -> dict[str, str]:
        """What SLURM says about the job, by its own names; empty if it can't be asked."""
        try:
            output = _scontrol("show", "job", "--oneliner", self.id)
        except OSError:
            return {}
        return dict(re.findall(r"(\w+)=(\S+)", output))

    def requeue(self) -> str | None:
        """Have SLURM start the job again.

        Returns:
            Why it does not; None if it does.
        """
        facts = self.facts()
        state = facts.get("JobState", "RUNNING")
        if state != "RUNNING":  # somebody cancelled it, or the scheduler has requeued it already
            return f"is not requeued, since SLURM has its state as {state}"
        try:
            _scontrol("requeue", self.id)
        except OSError as error:
            return f"could not be requeued ({error})"
        return None


def _environment_span() -> tuple[float, float] | None:
    """Start and end of the job as newer versions of SLURM tell it, for containers that have no `scontrol`."""
    names = ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")
    start, end = (os.environ.get(name, "") for name in names)
    return (float(start), float(end)) if start.isdecimal() and end.isdecimal() else None


def _scontrol(*args: str) -> str:
    """Output of SLURM's `scontrol`; OSError if there is none, or it fails."""
    try:
        done = subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=SCONTROL_S, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.strip() or f"scontrol {args[0]} failed") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"scontrol {args[0]} did not answer") from error
    return done.stdout


def _local_time(text: str) -> float | None:
    """Unix time of SLURM's time of day; None for `Unknown`."""
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return None


# -- checkpoints on the disk -------------------------------------------------------------------------------------------


def saved_runs(folder: Path) -> list[Path]:
    """Checkpoints of stopped runs in a folder, the newest last."""
    found = [path for path in folder.glob(f"{NAME}*.ckpt") if path.stem.removeprefix(NAME).isdecimal()]
    return sorted(found, key=_number)


def newest_checkpoint(trainer: Trainer) -> Path | str | None:
    """The checkpoint of a stopped run, unless the run has gone on since and saved a later one.

    Args:
        trainer: says where checkpoints are.

    Returns:
        The path, or None if `ckpt_path: last` of the trainer is right.
    """
    if _is_remote(trainer.default_root_dir):
        remote: str | None = trainer._checkpoint_connector._hpc_resume_path
        return remote
    runs = saved_runs(Path(trainer.default_root_dir))
    if not runs:
        return None
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    last = [path for folder in folders if folder for path in Path(folder).glob("last*.ckpt")]
    later = any(path.stat().st_mtime > runs[-1].stat().st_mtime for path in last)
    return None if later else runs[-1]


def _is_remote(path: object) -> bool:
    return "://" in str(path)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix(NAME))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- where a run is ----------------------------------------------------------------------------------------------------


def _stepped(trainer: Trainer) -> bool:
    """Whether the newest batch made an optimizer step, so that no gradients wait."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches == 0 or _last_of_epoch(trainer)


def _last_of_epoch(trainer: Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch or progress.current.ready == trainer.num_training_batches)


def _no_steps_left(trainer: Trainer) -> bool:
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def _stops_by_itself(trainer: Trainer) -> bool:
    """Whether training ends after this batch before its limit, which a resumed run would not know."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def _within_validation(trainer: Trainer) -> bool:
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return bool(total.started > total.processed)


def _common_batches(trainer: Trainer) -> list[float]:
    """Validation batches that every rank has, by loader; a collective operation."""
    sizes = [float(size) for size in trainer.num_val_batches]
    if trainer.world_size == 1:
        return sizes
    sizes = [0.0 if size == float("inf") else size for size in sizes]  # unknown, so don't count on any
    from torch import distributed

    ranks: list[Any] = [None] * trainer.world_size
    distributed.all_gather_object(ranks, sizes)
    return [min(column) for column in zip(*ranks, strict=True)]
