"""Rows that are read, tokenised and batched while training runs."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.loaders import even_bounds, rank_and_world
from datamodules.positions import Position
from datamodules.sources import chunks

if TYPE_CHECKING:
    import datasets

Encode = Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any]]]
Shares: TypeAlias = Literal["batches", "sources"]
T = TypeVar("T")


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Encoded rows of a stream, of which every rank takes its share.

    With the shares `batches`, every rank reads and encodes the whole stream and takes every W-th row of each global
    batch. The batches are then the same for any number of ranks, and training leaves out the last incomplete one.

    With `sources`, ranks divide what is read: files if their number is a multiple of the number of ranks, otherwise
    every W-th row. A rank encodes its own rows only, but which rows make a batch depends on the number of ranks. Ranks
    may hold different numbers of rows: a pass of training ends for all of them when the first has no whole batch left.

    Every worker reads and encodes what its rank does and keeps each n-th batch: the order does not depend on the number
    of workers, and one worker is enough to read ahead. Resuming reads the rows before the place again without using
    them.

    Args:
        rows: iterable data set.
        encode: function from rows and their numbers in the stream that this rank reads to encoded rows; it may drop
            some.
        batch_size: rows per batch and rank.
        shuffle_buffer: rows among which the next one is drawn; 0 keeps the order.
        seed: seed of the shuffle.
        shares: what a rank takes.
        drop_last: leave out the last incomplete global batch, as training does.
        even: all ranks must have equally many batches, even if rows of the shares `sources` are left out for it.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        encode: Encode,
        batch_size: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        shares: Shares = "batches",
        drop_last: bool = True,
        even: bool = False,
    ) -> None:
        self.rows, self.encode, self.batch_size = rows, encode, batch_size
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.shares, self.drop_last, self.even = shares, drop_last, even
        self.rank, self.world = rank_and_world()
        self.position = Position(batch_size * self.world, seed=seed)

    @property
    def unequal(self) -> bool:
        """Whether the loader must see to it that all ranks take equally many batches."""
        return self.shares == "sources" and self.world > 1 and (self.drop_last or self.even)

    def __iter__(self) -> Iterator[Any]:
        """Encoded rows of this worker, from the position on."""
        for _, rows in self._of_worker(self._batches(self._encoded(), self.position.batches)):
            yield from rows

    def _of_worker(self, batches: Iterator[T]) -> Iterator[tuple[int, T]]:
        """This worker's part of this rank's batches, with their numbers."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(enumerate(batches), number, None, workers)

    def _batches(self, rows: Iterator[T], skipped: int = 0) -> Iterator[list[T]]:
        """This rank's part of every batch.

        Args:
            rows: what this rank encodes.
            skipped: batches that are left out at the beginning.
        """
        rank, world = (0, 1) if self.shares == "sources" else (self.rank, self.world)
        size = self.batch_size * world
        batches = self._global_batches(islice(rows, skipped * size, None), size, world)
        return (own for batch in batches if (own := batch[rank::world]))

    def _global_batches(self, rows: Iterator[T], size: int, world: int) -> Iterator[list[T]]:
        """Global batches of `size` rows; for the last ones see `datamodules.loaders.even_bounds`."""
        held: list[T] = []
        while batch := list(islice(rows, size)):
            if len(batch) < size and self.drop_last:
                break
            if self.even and world > 1:
                if len(batch) < world:
                    even_bounds(len(held) + len(batch), self.batch_size, world)  # raises where it cannot be done
                    held, batch = held[:-world], held[-world:] + batch
                held, batch = batch, held
            if batch:
                yield batch
        if held:
            yield held

    def _ordered(self) -> "datasets.IterableDataset":
        """What this rank reads, in the order of the present pass.

        The order comes from a seed of its own: the library's `set_epoch` adds to a number that all workers share, and
        workers that start at the same time can add twice.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows
        if self.shuffle_buffer:
            seeds = np.random.SeedSequence([self.seed, self.position.epoch, self.position.pass_])
            rows = rows.shuffle(seed=int(seeds.generate_state(1)[0]), buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(rows, self.rank, self.world) if self.shares == "sources" else rows

    def _encoded(self) -> Iterator[dict[str, Any]]:
        first = 0
        for rows in chunks(self._ordered(), 256):
            yield from self.encode(rows, list(range(first, first + len(rows))))
            first += len(rows)


class StreamedBatches(StreamedRows):
    """Lists of encoded rows for evaluation: those of a batch, of which the last ones may be shorter."""

    batched = True

    def __iter__(self) -> Iterator[Any]:
        """This worker's part of this rank's batches."""
        for _, rows in self._of_worker(self._batches(self._encoded())):
            yield rows
