"""Rows that are read, tokenised and batched while training runs."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.loaders import Position, rank_and_world
from datamodules.sources import chunks

if TYPE_CHECKING:
    import datasets

Encode = Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any]]]


class StreamedRows(IterableDataset[dict[str, Any]]):
    """Encoded rows of a stream, split by rank.

    Files are divided among the ranks if their number is a multiple of the number of ranks; otherwise each rank takes
    every W-th row. Every worker reads and encodes the whole stream of its rank and keeps each n-th batch: the order
    does not depend on the number of workers, and one worker is enough to read ahead. Resuming reads the rows before the
    place again without using them. Ranks may hold different numbers of rows, so stop training by `max_steps` or
    `limit_train_batches`, not at the end of the stream.

    Args:
        rows: iterable data set.
        encode: function from rows and their numbers in this rank's stream to encoded rows; it may drop some.
        batch_size: rows per batch and rank.
        shuffle_buffer: rows among which the next one is drawn; 0 keeps the order.
        seed: seed of the shuffle.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        encode: Encode,
        batch_size: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        self.rows, self.encode, self.batch_size = rows, encode, batch_size
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.rank, self.world = rank_and_world()
        self.position = Position()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Encoded rows of this worker, from the position on."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        skipped = self.position.batches
        for index, row in enumerate(islice(self._encoded(), skipped * self.batch_size, None)):
            if index // self.batch_size % workers == number:
                yield row

    def _ordered(self) -> "datasets.IterableDataset":
        """This rank's rows in the order of the present pass.

        The order comes from a seed of its own: the library's `set_epoch` adds to a number that all workers share, and
        workers that start at the same time can add twice.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows
        if self.shuffle_buffer:
            seeds = np.random.SeedSequence([self.seed, self.position.epoch, self.position.pass_])
            rows = rows.shuffle(seed=int(seeds.generate_state(1)[0]), buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(rows, self.rank, self.world)

    def _encoded(self) -> Iterator[dict[str, Any]]:
        first = 0
        for rows in chunks(self._ordered(), 256):
            yield from self.encode(rows, list(range(first, first + len(rows))))
            first += len(rows)
