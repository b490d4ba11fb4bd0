"""Where a run is in its data, and how many batches its trainer has taken."""

from math import inf
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


class TrainerProgress:
    """Batches that a trainer has taken from now on, and its count of those of an epoch.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._progress = trainer.fit_loop.epoch_loop.batch_progress
        self._epochs = trainer.fit_loop.epoch_progress
        self._before = self._progress.total.ready

    def same_run(self, other: "TrainerProgress") -> bool:
        """Whether both are of one trainer."""
        return self._progress is other._progress

    @property
    def taken(self) -> int:
        """Batches taken. Without a length of the data, the trainer fetches one more ahead, which is not among them."""
        return self._progress.total.ready - self._before

    @property
    def epoch_over(self) -> bool:
        """Whether the newest batch was the last one of its epoch."""
        return bool(self._progress.is_last_batch)

    def mend(self) -> None:
        """Put the counts of a trainer right that was restored from a checkpoint written right after a batch.

        A trainer that was restored after the last batch of an epoch does not count the next one as begun; restored
        again after the last batch of that one, it would not leave it, and go through the same rows a second time.
        """
        progress: Any = self._progress
        if progress.total.completed >= progress.total.processed:
            return
        for count in (self._epochs.total, self._epochs.current):
            count.ready = count.started = count.completed + 1  # type: ignore[attr-defined]
            count.processed = count.completed  # type: ignore[attr-defined]
        # The trainer sees that an epoch is over by the number of its batches, which may be unknown, or another one now.
        if self.epoch_over:
            progress.current.completed = inf

    def move(self, batches: int) -> None:
        """Let a restored trainer count a number of batches more in the present epoch."""
        current: Any = self._progress.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + batches)


class Position:
    """Place in a stream of batches that is passed through again and again.

    Args:
        global_batch: rows of a batch on all ranks together.
        rows: how many there are; None if that is not known.
        seed: seed of the orders.

    Attributes:
        epoch: epoch of the trainer.
        pass_: passes through the data that were begun before the present one in this epoch.
        batches: batches of the present pass that were yielded on this rank.
        leads: whether an epoch of the trainer ends with a pass; not if other data are longer.
    """

    def __init__(self, global_batch: int = 1, rows: int | None = None, seed: int | None = None) -> None:
        self.global_batch, self.rows, self.seed = global_batch, rows, seed
        self.leads = True
        self._progress: TrainerProgress | None = None
        self._reset(0)

    def _reset(self, epoch: int) -> None:
        self.epoch, self.pass_, self.batches = epoch, 0, 0
        self._restored = False  # whether the next iteration begins within a pass
        self._first = 0  # where this one began
        self._yielded = 0  # since there is a trainer to ask what it has taken

    def follow(self, progress: TrainerProgress) -> None:
        """Ask a trainer from now on which of the yielded batches it has taken; that of another run starts anew."""
        if self._progress is not None:
            self._give_back()
            if not progress.same_run(self._progress):
                self._reset(0)
        self._progress, self._yielded = progress, 0

    @property
    def waiting(self) -> int:
        """Batches that were yielded, but not taken yet."""
        return 0 if self._progress is None else self._yielded - self._progress.taken

    def _give_back(self) -> None:
        """Let batches that wait be the next ones again."""
        waiting = self.waiting
        self.batches, self._yielded = self.batches - waiting, self._yielded - waiting
        self._restored |= waiting > 0 and self.batches == self._first

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of another epoch; does nothing within the present one."""
        if epoch != self.epoch:
            yielded = self._yielded
            self._reset(epoch)
            self._yielded = yielded

    def begin(self) -> None:
        """Start to iterate: at the restored place, or else with a new pass if the last one was left half-way."""
        self._give_back()
        if self.batches and not self._restored:
            self.finish()
        self._restored, self._first = False, self.batches

    def advance(self) -> None:
        """Count a batch that is yielded."""
        self.batches, self._yielded = self.batches + 1, self._yielded + 1

    def finish(self) -> None:
        """Leave the present pass."""
        self.pass_, self.batches = self.pass_ + 1, 0

    def state_dict(self) -> dict[str, int | None]:
        """Place of the batches taken, and what decides which rows come next."""
        return {
            "epoch": self.epoch,
            "pass": self.pass_,
            "batches": self.batches - self.waiting,
            "global_batch": self.global_batch,
            "rows": self.rows,
            "seed": self.seed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a stored place, and let the trainer count from there.

        Args:
            state: what `state_dict` gave; of earlier versions `epoch`, `pass`, `batches` and perhaps `global_batch`.

        Warns:
            UserWarning: if the rest of the pass is not what it would have been.
        """
        self.epoch, self.pass_, self.batches = state["epoch"], state["pass"], state["batches"]
        if self._progress is not None:
            self._progress.mend()
            if self._progress.epoch_over and self.batches:
                self.finish()
        self._restored = True
        if self.batches:
            self._compare(state)

    def _compare(self, state: dict[str, Any]) -> None:
        stored = state.get("global_batch", self.global_batch)
        if stored != self.global_batch:
            self.batches, again = divmod(state["batches"] * stored, self.global_batch)
            rank_zero_warn(
                f"data.batch_size: the checkpoint was written with {stored} rows per batch on all processes together, "
                f"and now there are {self.global_batch}; training goes on at the same row of the data"
                + (f", with {again} rows seen twice" if again else "")
            )
            if self._progress is not None and self.leads:
                self._progress.move(self.batches - state["batches"])
        others = "so this pass goes on in another order, in which rows may come twice or not at all"
        if state.get("rows") is not None and self.rows is not None and state["rows"] != self.rows:
            rank_zero_warn(
                f"data: the checkpoint was written with {state['rows']} training rows, and now there are {self.rows}, "
                + others
            )
        if state.get("seed") is not None and self.seed is not None and state["seed"] != self.seed:
            rank_zero_warn(
                f"data.seed: the checkpoint was written with {state['seed']}, and now it is {self.seed}, " + others
            )


@runtime_checkable
class Positioned(Protocol):
    """Sampler or iterable data set that starts at `position`."""

    position: Position
