"""Runs that are told to stop save themselves, and go on later as if nothing had happened."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.loops import (
    common_batches,
    last_of_epoch,
    no_steps_left,
    stepped,
    stops_by_itself,
    validation_is_next,
    within_validation,
)
from callbacks.pace import Pace
from callbacks.rng import RandomState
from callbacks.run_folder import check_shared
from callbacks.stopped_runs import forget_stopped_runs, save_stopped_run
from lit_models import signals
from lit_models.slurm import Job

EXIT_CODE = 75
"""Of a run that was stopped and can go on: EX_TEMPFAIL of `sysexits.h`, that is, try again later."""
TRAIN_PROGRESS = "epoch_loop.batch_progress"
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

    A validation that is interrupted, or due at a checkpoint that another callback wrote, is run as a whole by the run
    that goes on. A run that ends normally removes the checkpoints of stops. A second SIGTERM, one second or more after
    the first, ends the process at once.

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
        if stage == "fit" and not run.fast_dev_run:
            check_shared(trainer)

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
        if trainer.state.fn == TrainerFn.FITTING and no_steps_left(trainer) and within_validation(trainer):
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
                "the checkpoint is of a run before its last validation, but with these options none is due now; set "
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
        if not stepped(trainer) or stops_by_itself(trainer) or not self._agreed(trainer):
            return
        # At its last batch an epoch is as good as complete; what belongs to its end would be left out by a resumed run.
        if not last_of_epoch(trainer) and not no_steps_left(trainer):
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
        self._common = common_batches(trainer)
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
        return self._batches > 0 and stepped(trainer) and not stops_by_itself(trainer) and not swapping

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_before_validation(self, trainer: Trainer) -> None:
        assert self._before_validation is not None
        self._before_validation.restore()
        self._again = True
        self._save(trainer)
        raise Preempted(self._exit_code(trainer))

    def _save(self, trainer: Trainer) -> None:
        """Write the checkpoint to go on from; collective."""
        self._ended = True
        if not getattr(trainer, "fast_dev_run", False):
            self._saved = save_stopped_run(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have a run that goes on from a checkpoint written in validation, or right before, start this validation."""
        self.pace.begin_save()
        due = validation_is_next(trainer)
        if not due and not self._again:
            return
        loops = checkpoint["loops"]["fit_loop"]
        seen = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed if due else self._validated
        # By a batch that was begun and not processed Lightning knows that validation was left in the middle, of which
        # no batch counts. Without that it would take this validation for done.
        loops[VAL_PROGRESS] = {
            "total": {"ready": seen + 1, "started": seen + 1, "processed": seen, "completed": seen},
            "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
            "is_last_batch": False,
        }
        for counts in (loops[TRAIN_PROGRESS]["total"], loops[TRAIN_PROGRESS]["current"]):
            counts["completed"] = counts["processed"]  # as it is when validation begins

    # -- ends --------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoints of stops, which a later run in the same folder must not find."""
        if trainer.is_global_zero:
            forget_stopped_runs(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Requeue the job of a run that was stopped, and say how to go on."""
        if isinstance(exception, Preempted) or self._saved is not None:
            signals.let_end()
            for logger in trainer.loggers:  # before SLURM ends this job
                logger.finalize("failed")
            if trainer.is_global_zero:
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
            if self._saved:  # another job has another folder
                again = f"go on with --trainer.default_root_dir {trainer.default_root_dir} --ckpt_path last"
            refusal = self._refusal(self.job) or self.job.requeue()
            fate = f"job {self.job.id} is requeued" if refusal is None else f"job {self.job.id} {refusal}; {again}"
            if refusal is None and self._batches == 1 and not self.job.half_over():
                fate += "; it should be given more time than --signal says, since it was told to stop at its start"
        rank_zero_info(f"stopped by {cause} after {trainer.global_step} steps: {kept}; {fate}")

    def _refusal(self, job: Job) -> str | None:
        """Why a job is not to be requeued."""
        if not self.requeue:
            return "is not requeued, since callbacks.Requeue.requeue is off"
        if self.max_requeues is not None and job.restarts >= self.max_requeues:
            return f"is not requeued, since it was {job.restarts} times (callbacks.Requeue.max_requeues)"
        if self._batches == 0 and job.half_over():
            return "is not requeued, since it would not be ready in time then either; give it more"
        return None
