"""Where a run is, by the progress that its loops keep."""

from typing import Any

from lightning.pytorch import Trainer


def stepped(trainer: Trainer) -> bool:
    """Whether the newest batch made an optimizer step, so that no gradients wait."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches == 0 or last_of_epoch(trainer)


def last_of_epoch(trainer: Trainer) -> bool:
    """Whether the newest batch was the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch or progress.current.ready == trainer.num_training_batches)


def no_steps_left(trainer: Trainer) -> bool:
    """Whether the run has taken all its steps."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def stops_by_itself(trainer: Trainer) -> bool:
    """Whether training ends after this batch before its limit, which a resumed run would not know."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def within_validation(trainer: Trainer) -> bool:
    """Whether the run was saved before the end of a validation."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return bool(total.started > total.processed)


def validation_is_next(trainer: Trainer) -> bool:
    """Whether the newest batch has just been trained on, and validation comes before the next one.

    Not where that depends on more than the number of the batch, which a resumed run would not see as due.
    """
    run: Any = trainer
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    fetcher = trainer.fit_loop._data_fetcher
    if total.completed == total.processed or fetcher is None:
        return False
    by_number = run._val_check_time_interval is None and not stops_by_itself(trainer)
    return by_number and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def common_batches(trainer: Trainer) -> list[float]:
    """Validation batches that every rank has, by loader; a collective operation."""
    sizes = [float(size) for size in trainer.num_val_batches]
    if trainer.world_size == 1:
        return sizes
    sizes = [0.0 if size == float("inf") else size for size in sizes]  # unknown, so don't count on any
    from torch import distributed

    ranks: list[Any] = [None] * trainer.world_size
    distributed.all_gather_object(ranks, sizes)
    return [min(column) for column in zip(*ranks, strict=True)]
