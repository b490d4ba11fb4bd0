"""Loaders that continue where a checkpoint left them, on any number of ranks and workers."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class Position:
    """Place in a stream of batches that is passed through again and again.

    Attributes:
        epoch: epoch of the trainer.
        pass_: passes through the data that were begun before the present one in this epoch.
        batches: batches of the present pass that were yielded on this rank.
    """

    def __init__(self) -> None:
        self.epoch = self.pass_ = self.batches = 0
        self._restored = False

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of another epoch; does nothing within the present one."""
        if epoch != self.epoch:
            self.epoch, self.pass_, self.batches, self._restored = epoch, 0, 0, False

    def begin(self) -> None:
        """Start to iterate: at the restored place, or else with a new pass if the last one was left half-way."""
        if self.batches and not self._restored:
            self.finish()
        self._restored = False

    def finish(self) -> None:
        """Leave the present pass."""
        self.pass_, self.batches = self.pass_ + 1, 0

    def restore(self, state: dict[str, int]) -> None:
        """Go to a stored place."""
        self.epoch, self.pass_, self.batches = state["epoch"], state["pass"], state["batches"]
        self._restored = True


@runtime_checkable
class Positioned(Protocol):
    """Sampler or iterable data set that starts at `position`."""

    position: Position


class ResumableSampler(DistributedSampler[Any]):
    """Row numbers of this rank for whole batches, starting at a position.

    Rank r of W takes every W-th row number of the (shuffled) order, so batch k of all ranks together holds the same
    rows for every W with the same global batch. Rows that do not fill a last global batch are left out; a data set
    smaller than one global batch gives one short batch, filled up by repetition to the same size on all ranks.

    Args:
        data_source: data set with a length.
        batch_size: rows per batch and rank.
        shuffle: draw a new order for every pass; otherwise the rows stay in their order.
        seed: seed of the orders.
    """

    def __init__(self, data_source: Sized, batch_size: int, shuffle: bool = True, seed: int = 0) -> None:
        # The base class is wanted for its name only: the trainer leaves such samplers as they are.
        Sampler.__init__(self)
        self.position = Position()
        self.rows = len(data_source)
        self.batch_size = batch_size
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.num_replicas = rank_and_world()
        global_batch = batch_size * self.num_replicas
        per_rank = -(-self.rows // self.num_replicas)
        self.num_samples = self.rows // global_batch * batch_size or per_rank

    def __len__(self) -> int:
        """Rows of one whole pass on this rank."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        """Row numbers from the position to the end of the pass."""
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.position.epoch, self.position.pass_]).permutation(self.rows)
        order = np.resize(order, self.num_samples * self.num_replicas)  # cuts; repeats only in a short single batch
        yield from order[self.rank :: self.num_replicas][self.position.batches * self.batch_size :].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; the trainer calls this."""
        self.position.set_epoch(epoch)


class EvaluationSampler(DistributedSampler[Any]):
    """Every row exactly once, over all ranks together, in the order of the data set.

    Nothing is padded or left out, so sums and counts over ranks are exact. Ranks may hold one row, and with it one
    batch, more than others: code that runs a collective operation per batch (sharded models) must allow for that or
    use data whose length is a multiple of the global batch.

    Args:
        data_source: data set with a length.
    """

    def __init__(self, data_source: Sized) -> None:
        Sampler.__init__(self)
        self.rank, self.num_replicas = rank_and_world()
        self.order = range(self.rank, len(data_source), self.num_replicas)

    def __len__(self) -> int:
        """Rows of this rank."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Row numbers of this rank."""
        return iter(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the order is the same in every epoch."""


class ResumableLoader(DataLoader[Any]):
    """DataLoader whose place in the data is part of the trainer's checkpoint.

    Give it a `ResumableSampler`, or an iterable data set with a `position` (and then no persistent workers, which would
    never see it change). The number of workers may change between saving and resuming.
    """

    taken: Callable[[], int] | None = None
    """Batches that the consumer has taken since this loader was made; None if it takes each one when it is yielded."""

    yielded: int = 0
    """Batches yielded since this loader was made."""

    @property
    def position(self) -> Position | None:
        """Place in the data, or None for samplers without one (e.g. when the trainer overfits on a few batches)."""
        for part in (self.sampler, self.dataset):
            if isinstance(part, Positioned):
                return part.position
        return None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # the base class names its private iterator
        """Batches from the position on.

        A generator on purpose: the trainer asks for the iterator before it sets the epoch.
        """
        position = self.position
        if position is not None:
            position.begin()
        for batch in super().__iter__():
            self.yielded += 1
            if position is not None:
                position.batches += 1
            yield batch
        if position is not None:
            position.finish()

    def state_dict(self) -> dict[str, int]:
        """Epoch, pass and number of batches that were taken in it."""
        position = self.position
        if position is None:
            return {}
        waiting = 0 if self.taken is None else self.yielded - self.taken()
        return {"epoch": position.epoch, "pass": position.pass_, "batches": position.batches - waiting}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a stored place."""
        if state and self.position is not None:
            self.position.restore(state)


def train_loader(dataset: Any, batch_size: int, seed: int, shuffle: bool = True, **options: Any) -> ResumableLoader:  # noqa: ANN401
    """Build the loader of a training set.

    Args:
        dataset: rows with a length, or an iterable data set with a `position`.
        batch_size: rows per batch and rank.
        seed: seed of the order and of the workers.
        shuffle: draw a new order for every pass (iterable data sets shuffle themselves).
        options: further arguments of `DataLoader`.

    Returns:
        The loader.
    """
    generator = torch.Generator().manual_seed(seed)  # the loader must not draw from the global generator
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return ResumableLoader(dataset, batch_size, drop_last=True, generator=generator, **options)
    sampler = ResumableSampler(dataset, batch_size, shuffle, seed)
    persistent = options.get("num_workers", 0) > 0
    return ResumableLoader(
        dataset, batch_size, sampler=sampler, generator=generator, persistent_workers=persistent, **options
    )


def evaluation_loader(dataset: Any, batch_size: int, **options: Any) -> DataLoader[Any]:  # noqa: ANN401
    """Build the loader of a validation, test or prediction set; see `EvaluationSampler`.

    Args:
        dataset: rows with a length, or an iterable data set.
        batch_size: rows per batch and rank.
        options: further arguments of `DataLoader`.

    Returns:
        The loader.
    """
    generator = torch.Generator().manual_seed(0)
    sampler = None if isinstance(dataset, torch.utils.data.IterableDataset) else EvaluationSampler(dataset)
    # By keyword, since the trainer builds the loader anew for prediction with a batch size of its own.
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, generator=generator, **options)
