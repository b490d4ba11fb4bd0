"""Loaders that continue where a checkpoint left them, on any number of ranks and workers."""

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, default_collate

from datamodules.positions import Position, Positioned
from lit_models.signals import shield_worker


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class ResumableSampler(DistributedSampler[Any]):
    """Row numbers of this rank for whole batches, starting at a position.

    Rank r of W takes every W-th row number of the (shuffled) order, so batch k of all ranks together holds the same
    rows for every W with the same global batch. Rows that do not fill a last global batch are left out; a data set
    smaller than one global batch gives one short batch of all rows, in which ranks may differ by one row.

    Args:
        data_source: data set with a length.
        batch_size: rows per batch and rank.
        shuffle: draw a new order for every pass; otherwise the rows stay in their order.
        seed: seed of the orders.

    Raises:
        ValueError: if there are fewer rows than ranks.
    """

    def __init__(self, data_source: Sized, batch_size: int, shuffle: bool = True, seed: int = 0) -> None:
        # The base class is wanted for its name only: the trainer leaves such samplers as they are.
        Sampler.__init__(self)
        self.rows = len(data_source)
        self.batch_size = batch_size
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.num_replicas = rank_and_world()
        if 0 < self.rows < self.num_replicas:
            raise ValueError(
                f"data: {self.rows} training rows cannot be divided among {self.num_replicas} processes; give more "
                f"rows, or set trainer.devices and trainer.num_nodes to {self.rows} processes at most"
            )
        self.position = Position(batch_size * self.num_replicas, self.rows, seed)
        self.used = self.rows // self.position.global_batch * self.position.global_batch or self.rows

    def __len__(self) -> int:
        """Rows of one whole pass on this rank."""
        return len(range(self.rank, self.used, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Row numbers from the position to the end of the pass."""
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.position.epoch, self.position.pass_]).permutation(self.rows)
        own = order[self.rank : self.used : self.num_replicas]
        yield from own[self.position.batches * self.batch_size :].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; the trainer calls this."""
        self.position.set_epoch(epoch)


class EvaluationSampler(DistributedSampler[Any]):
    """Every row exactly once, over all ranks together, in the order of the data set.

    Nothing is padded or left out, so sums and counts over ranks are exact. Ranks may hold one row, and with it one
    batch, more than others; where every batch needs all ranks (sharded networks), see `EvenBatches`.

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


def even_bounds(rows: int, batch_size: int, world: int) -> list[int]:
    """Divide rows into global batches of which every rank has a part.

    All are full but the last one; if that has fewer rows than there are ranks, the one before lends it one per rank.

    Args:
        rows: how many there are.
        batch_size: most rows per batch and rank.
        world: number of ranks.

    Returns:
        First row of every global batch, and `rows` at the end.

    Raises:
        ValueError: if it cannot be done: with fewer rows than ranks, or with batches of one row.
    """
    bounds = [*range(0, rows, batch_size * world), rows]
    left = rows % (batch_size * world)
    if 0 < left < world:
        if rows < world or batch_size == 1:
            remedy = f"at least {world} rows" if rows < world else f"{rows - left} rows, or batches of 2"
            raise ValueError(
                f"data.val_batch_size: {rows} rows in batches of {batch_size} can't be divided among {world} processes "
                f"with equally many batches each, without which sharded networks would hang; take {remedy}"
            )
        bounds[-2] -= world
    return bounds


class EvenBatches(EvaluationSampler):
    """Every row exactly once, over all ranks together, in as many batches on every rank.

    The batches are those of an `EvaluationSampler`, but for the last ones; see `even_bounds`. Sharded networks
    communicate in every batch and would wait for ever for a rank that has none left.

    Args:
        data_source: data set with a length.
        batch_size: most rows per batch and rank.
    """

    def __init__(self, data_source: Sized, batch_size: int) -> None:
        super().__init__(data_source)
        bounds = even_bounds(len(data_source), batch_size, self.num_replicas)
        self.batches = [list(range(first + self.rank, last, self.num_replicas)) for first, last in pairwise(bounds)]

    def __len__(self) -> int:
        """Batches of every rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """Lists of row numbers."""
        return iter(self.batches)


class ByBatch(Dataset[list[Any]]):
    """Rows of a data set, many at a time.

    Args:
        dataset: data set with a length.
    """

    def __init__(self, dataset: Any) -> None:  # noqa: ANN401
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.dataset)

    def __getitem__(self, index: int | Sequence[int]) -> Any:  # noqa: ANN401
        """The rows of a batch; of a row number alone, as the trainer asks when it overfits, a batch of one."""
        rows = [index] if isinstance(index, int) else index
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(rows)
        return [self.dataset[row] for row in rows]


def until_one_ends(batches: Iterable[Any], group: Any, needed: bool) -> Iterator[Any]:  # noqa: ANN401
    """Batches of this rank, until the first rank has none left.

    Ranks that read a stream each by itself cannot know how much the others have. All must iterate at the same time.

    Args:
        batches: of this rank.
        group: process group in which they agree; one on the CPU does not wait for the GPU.
        needed: whether there must be any.

    Yields:
        The batches.

    Raises:
        ValueError: if a rank has none at all although some are needed.
    """
    for number, batch in enumerate(chain(batches, repeat(None))):
        left = torch.tensor(int(batch is not None))
        torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MIN, group)
        if not left and needed and number == 0:
            raise ValueError(
                "data.stream_shares: of the files, or of every so manieth row, one of the processes has not a single "
                "batch, so that nothing would be done; set it to batches, or divide the data into more files"
            )
        if not left:
            return
        yield batch


def init_worker(worker_id: int) -> None:
    """Begin a worker process: no scheduler's signal ends it before its parent, and it has random streams of its own.

    Args:
        worker_id: its number.
    """
    shield_worker(worker_id)
    if os.environ.get("PL_SEED_WORKERS") == "1":  # the trainer does so by itself only where there is no such function
        pl_worker_init_function(worker_id)


class _Loader(DataLoader[Any]):
    """DataLoader of streams too of which ranks may hold different numbers of batches.

    Where the process uses a GPU, batches come in pinned memory, from which they are copied while the GPU works.
    """

    _group: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        if self.worker_init_fn is None:
            self.worker_init_fn = init_worker

    def _batches(self, first: int = 0) -> Iterator[Any]:
        """Batches from a place in a pass on."""
        self.pin_memory = self.pin_memory or torch.cuda.is_initialized()
        batches: Iterator[Any] = super().__iter__()
        if not getattr(self.dataset, "unequal", False):
            return batches
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return until_one_ends(batches, self._group, needed=first == 0)


class ResumableLoader(_Loader):
    """DataLoader whose place in the data is part of the trainer's checkpoint.

    Give it a `ResumableSampler`, or an iterable data set with a `position` (and then no persistent workers, which would
    never see it change). The number of workers may change between saving and resuming.
    """

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
        for batch in self._batches(0 if position is None else position.batches):
            if position is not None:
                position.advance()
            yield batch
        if position is not None:
            position.finish()

    def state_dict(self) -> dict[str, int | None]:
        """Place in the data; see `datamodules.positions.Position`."""
        return {} if self.position is None else self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a stored place."""
        if state and self.position is not None:
            self.position.restore(state)


class EvaluationLoader(_Loader):
    """DataLoader of data in which a rank may have no row.

    Its length is never 0 unless the data set is empty: the trainer would skip the evaluation on that rank alone, while
    the others wait for it where they sum up.
    """

    def __len__(self) -> int:
        """Batches of this rank, or 1 if it has none."""
        batches = super().__len__()
        return max(batches, 1) if len(self.dataset) else batches  # type: ignore[arg-type]

    def __iter__(self) -> Any:  # noqa: ANN401  # the base class names its private iterator
        """Batches of this rank."""
        return self._batches()


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
    if isinstance(dataset, IterableDataset):
        return ResumableLoader(dataset, batch_size, drop_last=True, generator=generator, **options)
    sampler = ResumableSampler(dataset, batch_size, shuffle, seed)
    persistent = options.get("num_workers", 0) > 0
    return ResumableLoader(
        dataset, batch_size, sampler=sampler, generator=generator, persistent_workers=persistent, **options
    )


def evaluation_loader(dataset: Any, batch_size: int, even: bool = False, **options: Any) -> EvaluationLoader:  # noqa: ANN401
    """Build the loader of a validation, test or prediction set; see `EvaluationSampler`.

    Args:
        dataset: rows with a length, or an iterable data set of rows, or of lists of rows if it is `batched`.
        batch_size: rows per batch and rank.
        even: give all ranks equally many batches; see `EvenBatches`.
        options: further arguments of `DataLoader`.

    Returns:
        The loader.

    Raises:
        ValueError: if the batches cannot be divided evenly.
    """
    generator = torch.Generator().manual_seed(0)
    # By keyword, since the trainer builds the loader anew for prediction with a batch size of its own.
    if isinstance(dataset, IterableDataset):
        size = None if getattr(dataset, "batched", False) else batch_size
        return EvaluationLoader(dataset, batch_size=size, generator=generator, **options)
    if even:
        batches = EvenBatches(dataset, batch_size)
        options.setdefault("collate_fn", default_collate)
        return EvaluationLoader(ByBatch(dataset), batch_size=None, sampler=batches, generator=generator, **options)
    sampler = EvaluationSampler(dataset)
    return EvaluationLoader(dataset, batch_size=batch_size, sampler=sampler, generator=generator, **options)
