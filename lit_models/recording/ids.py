"""Ids of each step, of any number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Numbers: TypeAlias = Tensor | ArrayLike
"""One value or several of them, on any device."""
Pool: TypeAlias = int | NDArray[np.int64] | None
"""What ids may be: 0 to a size, some ids in ascending order, or any."""

LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Ids(Sequence[NDArray[np.int64]]):
    """The ids of each step, of any number.

    Attributes:
        values: int32 [sum of B], the ids of all steps one after the other.
        offsets: int64 [s+1], where each step begins and ends in them.
    """

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def from_lists(cls, rows: Iterable[Numbers]) -> "Ids":
        """Ids given step by step.

        Args:
            rows: ids of each step.

        Returns:
            The ids.
        """
        arrays = [np.asarray(row, np.int64).reshape(-1) for row in rows]
        values = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in arrays], dtype=np.int64)])
        return cls(values.astype(np.int32), offsets.astype(np.int64))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...

    @overload
    def __getitem__(self, index: slice) -> "Ids": ...

    def __getitem__(self, index: int | slice) -> "NDArray[np.int64] | Ids":
        """Ids of a step [B], or of a range of steps without gaps."""
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                return Ids.from_lists(self[row] for row in range(start, stop, stride))
            offsets = self.offsets[start : max(start, stop) + 1]
            return Ids(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        index = range(len(self))[index]
        return self.values[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """Ids of each step."""
        return (self[row] for row in range(len(self)))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Int64 [s], number of ids of each step."""
        return np.diff(self.offsets)

    def padded(self, width: int | None = None, fill: int = -1) -> NDArray[np.int64]:
        """Ids as one table.

        Args:
            width: columns; the longest step by default.
            fill: what stands after the ids of a shorter step.

        Returns:
            Int64 [s,width].

        Raises:
            ValueError: if a step has more ids than there are columns.
        """
        longest = int(self.sizes.max(initial=0))
        width = longest if width is None else width
        if longest > width:
            raise ValueError(f"a step has {longest} ids, more than the width of {width}; widen the table")
        table = np.full((len(self), width), fill, np.int64)
        table[np.arange(width) < self.sizes[:, None]] = self.values
        return table

    def counts(self, num: int) -> NDArray[np.float32]:
        """How often each example occurs in each step.

        Args:
            num: size of the pool.

        Returns:
            Float32 [s,num].

        Raises:
            ValueError: if an id is not of the pool.
        """
        wrong = self.values[is_outside(self.values.astype(np.int64), num)]
        if len(wrong):
            raise ValueError(f"the ids hold {outside(int(wrong[0]), num)}")
        steps = np.repeat(np.arange(len(self)), self.sizes)
        flat = np.bincount(steps * num + self.values, minlength=len(self) * num)
        return flat.reshape(len(self), num).astype(np.float32)


def interleaved(parts: Sequence[Ids]) -> Ids:
    """The ids of several processes, in their order within each step."""
    if len(parts) == 1:
        return parts[0]
    sizes = np.stack([part.sizes for part in parts])  # [ranks,s]
    offsets = np.concatenate([[0], np.cumsum(sizes.sum(0))]).astype(np.int64)
    values = np.empty(offsets[-1], np.int32)
    begins = offsets[:-1] + np.cumsum(sizes, 0) - sizes
    for part, begin in zip(parts, begins, strict=True):
        values[np.arange(len(part.values)) + np.repeat(begin - part.offsets[:-1], part.sizes)] = part.values
    return Ids(values, offsets)


def as_ids(value: Any) -> NDArray[Any]:  # noqa: ANN401
    """Ids of a step, given in one piece or batch by batch."""
    if isinstance(value, Tensor):
        value = value.cpu().numpy()
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Tensor, np.ndarray, list, tuple)) for item in value
    ):
        return np.concatenate([as_ids(item) for item in value])
    return np.asarray(value).reshape(-1)


def pool_of(info: Mapping[str, Any]) -> Pool:
    """What ids may be: a size, the ids themselves, or unknown."""
    if info.get("pool_ids") is not None:
        return np.sort(np.asarray(info["pool_ids"], np.int64))
    size = info.get("pool_size")
    return None if size is None else int(size)


def is_outside(ids: NDArray[np.int64], pool: Pool) -> NDArray[np.bool_]:
    """Which ids are none of a pool's; bool, in the shape of `ids`."""
    if isinstance(pool, np.ndarray):
        return ~np.isin(ids, pool)
    return (ids < 0) | (ids > (LARGEST_ID if pool is None else pool - 1))


def outside(number: int, pool: Pool) -> str:
    """What is wrong with an id that is none of a pool's, as the end of a sentence."""
    if isinstance(pool, np.ndarray):
        return f"id {number}, which is none of the {len(pool)} ids of the pool; record with the pool of the data"
    if pool is None:
        return f"id {number}; ids must lie between 0 and {LARGEST_ID}"
    return f"id {number}, but the pool has {pool} examples, 0 to {pool - 1}; record with the pool of the data"
