"""Test examples: where they come from, their ids, and their share on this process as batches on the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, default_collate

from callbacks.recorder.causal import OPTION

Collate: TypeAlias = Callable[[list[Any]], Any]
IdsFrom: TypeAlias = Literal["auto", "key", "position"]


def entry(batch: Any, key: str) -> Any:  # noqa: ANN401
    """What a batch or an example holds under a key, as an entry or as an attribute; None without it."""
    return batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)


def collate_of(loader: Any) -> Collate:  # noqa: ANN401
    """Function from examples to a batch as a loader has it; torch's where it makes none."""
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        return loader.collate_fn
    return default_collate


def rows_in_whole(dataset: Any) -> tuple[NDArray[np.int64] | None, Any]:  # noqa: ANN401
    """Where the rows of a part of a data set stand in the whole.

    Args:
        dataset: any; parts are those that `torch.utils.data.Subset` and `random_split` make.

    Returns:
        Row numbers in the whole, or None where they are the same; the whole.
    """
    rows: NDArray[np.int64] | None = None
    while isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, np.int64)
        rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    return rows, dataset


@dataclass
class Examples:
    """Examples in the order of their data set.

    Attributes:
        items: the examples.
        rows: int64, their row numbers in the whole data set.
        collate: function from examples to a batch.
        option: name of the option that gave them, for messages.
    """

    items: list[Any]
    rows: NDArray[np.int64]
    collate: Collate
    option: str

    @classmethod
    def of(cls, source: Any, collate: Collate) -> "Examples":  # noqa: ANN401
        """All examples of a data set or loader.

        Args:
            source: data set, sequence or `DataLoader`. A loader's sampler only says which rows are meant, since tests
                are divided among processes in another way.
            collate: used unless the loader has its own.

        Returns:
            The examples.

        Raises:
            ValueError: if there are none, or the loader gives ready-made batches.
        """
        if not isinstance(source, DataLoader):
            return cls._of_dataset(source, None, collate, "test_dataset")
        if source.batch_sampler is None:
            raise ValueError(f"{OPTION}.test_dataloader must make batches of examples; set its batch_size")
        rows = None
        distributed = isinstance(getattr(source.batch_sampler, "sampler", None), DistributedSampler)
        if not isinstance(source.dataset, IterableDataset) and not distributed:
            rows = sorted({int(row) for batch in source.batch_sampler for row in batch})
        return cls._of_dataset(source.dataset, rows, source.collate_fn, "test_dataloader")

    @classmethod
    def _of_dataset(cls, dataset: Any, rows: list[int] | None, collate: Collate, option: str) -> "Examples":  # noqa: ANN401
        if isinstance(dataset, IterableDataset):
            items = list(dataset)
            numbers = np.arange(len(items))
        else:
            numbers = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
            items = [dataset[int(row)] for row in numbers]
            mapped, _ = rows_in_whole(dataset)
            numbers = numbers if mapped is None else mapped[numbers]
        if not items:
            raise ValueError(f"{OPTION}.{option}: there are no tests; give some, or remove the callback")
        return cls(items, numbers, collate, option)

    def ids(self, key: str, source: IdsFrom, by_row: bool) -> list[int]:
        """Ids of the examples.

        Args:
            key: entry or attribute of the examples, or of the batches that are made of them.
            source: `key`, `position`, or `auto`: the former where the examples have that key.
            by_row: whether `auto` may take row numbers.

        Returns:
            One id per example.

        Raises:
            ValueError: if there are none, they are no whole numbers or one occurs twice.
        """
        values: list[Any] = [] if source == "position" else self._under(key)
        if source == "position" or (source == "auto" and by_row and not values):
            values = self.rows.tolist()
        if not values:
            raise ValueError(
                f"{OPTION}.{self.option}: test examples have no {key!r}; add it, set id_key, or number them by their "
                "rows with test_ids: position"
            )
        ids = _whole_numbers(values)
        if ids is None:
            raise ValueError(
                f"{OPTION}.{self.option}: test ids must be whole numbers, got {values[0]!r}; number the tests, or set "
                "test_ids: position"
            )
        if len(set(ids)) < len(ids):
            twice = next(value for place, value in enumerate(ids) if value in ids[:place])
            raise ValueError(
                f"{OPTION}.{self.option}: test id {twice} occurs twice; give every test an id of its own, or set "
                "test_ids: position"
            )
        return ids

    def _under(self, key: str) -> list[Any]:
        """What all examples, or the batches of one of them, hold under a key; empty if it is missing somewhere."""
        values = [entry(item, key) for item in self.items]
        if any(value is None for value in values) and entry(self.collate(self.items[:1]), key) is not None:
            values = [entry(self.collate([item]), key) for item in self.items]
        return [] if any(value is None for value in values) else values

    def groups(self, key: str) -> tuple[list[int], NDArray[np.int64]]:
        """Groups of the examples.

        Args:
            key: entry or attribute that names the group, a whole number.

        Returns:
            Groups in ascending order, and the place among them of each example's group.

        Raises:
            ValueError: if an example has none.
        """
        numbers = _whole_numbers(self._under(key))
        if not numbers:
            raise ValueError(f"{OPTION}.reduce: test examples have no group of whole numbers under {key!r}; add it")
        names, places = np.unique(numbers, return_inverse=True)
        return names.tolist(), places


def _whole_numbers(values: Sequence[Any]) -> list[int] | None:
    arrays = [np.asarray(value) for value in values]
    if any(array.size != 1 or array.dtype.kind not in "iu" for array in arrays):
        return None
    return [int(array.reshape(())) for array in arrays]


@dataclass
class TestBatch:
    """Some tests as one batch on the device.

    Attributes:
        batch: what the module gets.
        rows: numbers of its tests among those of this process.
        num: number of examples in the batch; those beyond `rows` are repeats that count for nothing.
    """

    __test__ = False  # not a test of pytest's
    batch: Any
    rows: NDArray[np.int64]
    num: int


class Share:
    """The tests of one process.

    All processes get equally many, some of them as repeats, so that they run equally many forward passes.

    Args:
        ids: ids of all tests.
        rank: number of the process.
        world: number of processes.
        places: group of each test, whose means are kept in place of single tests; groups are never divided.

    Attributes:
        columns: int64, places of this process's tests (or groups) among all.
        own: int64, numbers of its tests.
    """

    def __init__(self, ids: Sequence[int], rank: int, world: int, places: NDArray[np.int64] | None = None) -> None:
        self.places = places
        spread = np.arange(len(ids)) if places is None else places
        self.columns = np.arange(rank, len(ids) if places is None else places.max() + 1, world)
        self.own = np.flatnonzero(spread % world == rank)
        self._column = spread[self.own] // world
        self.padded = int(np.bincount(spread % world, minlength=world).max())

    def blocks(
        self, examples: Examples, per_block: int | None, size: int, place: Callable[[Any], Any]
    ) -> list[list[TestBatch]]:
        """Batches of equally long tests.

        Args:
            examples: all tests.
            per_block: tests measured together; None for all.
            size: most examples in a batch.
            place: moves a batch to the device.

        Returns:
            Batches of each block.
        """
        numbers = np.full(self.padded, self.own[0] if len(self.own) else 0)
        numbers[: len(self.own)] = self.own
        rows = np.where(np.arange(self.padded) < len(self.own), np.arange(self.padded), -1)
        count = 1 if per_block is None else -(-self.padded // min(per_block, self.padded))
        return [_batches(examples, numbers[start::count], rows[start::count], size, place) for start in range(count)]

    def reduced(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], Any]:
        """Means of groups.

        Args:
            rows: numbers of some of this process's tests, whole groups.
            values: float [m].

        Returns:
            Numbers of the groups among those of this process, and their means.
        """
        groups = self._column[rows]
        counts = np.bincount(groups, minlength=len(self.columns))
        known = np.flatnonzero(counts)
        return known, np.bincount(groups, values, len(self.columns))[known] / counts[known]


def _length(example: Any) -> int:  # noqa: ANN401
    """Tokens of an example, so that batches hold equally long ones; 0 where it has none."""
    tokens = entry(example, "input_ids")
    return 0 if tokens is None else len(tokens)


def _batches(
    examples: Examples, numbers: NDArray[Any], rows: NDArray[Any], size: int, place: Callable[[Any], Any]
) -> list[TestBatch]:
    lengths = [_length(examples.items[number]) for number in numbers]
    order = np.argsort(lengths, kind="stable")
    batches = []
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        chosen = np.concatenate([chosen[rows[chosen] >= 0], chosen[rows[chosen] < 0]])
        batch = place(examples.collate([examples.items[number] for number in numbers[chosen]]))
        batches.append(TestBatch(batch, rows[chosen][rows[chosen] >= 0], len(chosen)))
    return batches
