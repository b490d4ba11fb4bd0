"""Batches of recorded runs: steps, single values, whole runs, and curricula to predict."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.trajectories import StepTable, Trajectories

Batch: TypeAlias = dict[str, Tensor]


class _Batches(Dataset[Any]):
    """Rows that are read many at once."""

    def __getitem__(self, index: int) -> Batch:
        """A batch of one row."""
        return self.__getitems__([index])

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """A batch of rows."""
        raise NotImplementedError


class RunRows(_Batches):
    """Whole runs; for the keys see `DynamicsData`.

    Args:
        runs: the runs.
        lr_reference: learning rate whose scale is 1.
        numbers: what the runs are called in a batch.
        named: name the tests of the columns.
    """

    def __init__(
        self, runs: Trajectories, lr_reference: float | None, numbers: Sequence[int], named: bool = False
    ) -> None:
        self.runs, self.lr_reference, self.named = runs, lr_reference, named
        self.numbers = torch.tensor(numbers, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.runs)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """A batch of runs, as long as the longest of them."""
        runs = self.runs.select(index)
        values = runs.values if runs.values.shape[2] > 1 else runs.values.squeeze(2)
        batch = {
            "ids": runs.ids,
            "values": values,
            "start": values[:, 0],
            "length": runs.length,
            "run": self.numbers[torch.tensor(index)],
        }
        if runs.lr is not None and self.lr_reference is not None:
            batch["lr_scale"] = runs.lr / self.lr_reference
        return batch | ({"test_ids": runs.test_ids} if self.named else {})


class MatrixRows(_Batches):
    """Steps of all tests; for the keys see `DynamicsData`.

    Args:
        table: the rows.
        lr_reference: learning rate whose scale is 1.
        numbers: what the runs are called in a batch.
        keep: keep a batch of all rows, which must not be changed in place then.
    """

    def __init__(
        self, table: StepTable, lr_reference: float | None, numbers: Sequence[int], keep: bool = False
    ) -> None:
        self.table, self.lr_reference = table, lr_reference
        self.numbers = torch.tensor(numbers, dtype=torch.int64)
        self.keep = keep
        self._kept: Batch | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """A batch of rows."""
        everything = self.keep and list(index) == list(range(len(self)))
        if everything and self._kept is not None:
            return dict(self._kept)
        batch = self.table.batch(torch.tensor(index, dtype=torch.int64))
        metrics = self.table.runs.values.shape[2]
        if metrics > 1:
            for key in ("history", "target", "mask"):
                batch[key] = batch[key].unflatten(-1, (metrics, -1))
        batch = _with_scale(batch, self.table.runs, self.lr_reference, self.numbers)
        if everything:
            self._kept = dict(batch)
        return batch


class PairRows(_Batches):
    """Steps of single tests; for the keys see `DynamicsData`.

    Args:
        table: the rows.
        lr_reference: learning rate whose scale is 1.
        numbers: what the runs are called in a batch.
    """

    def __init__(self, table: StepTable, lr_reference: float | None, numbers: Sequence[int]) -> None:
        self.table, self.lr_reference = table, lr_reference
        self.numbers = torch.tensor(numbers, dtype=torch.int64)
        self.rows, self.columns = (part.int() for part in table.pairs())  # there may be millions

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """A batch of rows."""
        chosen = torch.tensor(index, dtype=torch.int64)
        batch = self.table.pair_batch(self.rows[chosen].long(), self.columns[chosen].long())
        return _with_scale(batch, self.table.runs, self.lr_reference, self.numbers)


class CurriculumRows(_Batches):
    """Curricula to predict; for the keys see `DynamicsData`.

    Args:
        ids: pool ids of every step of each curriculum.
        start: (K,M) or (K,Q,M) values.
        lr_scale: (T,) each; None where learning rates are unknown.
    """

    def __init__(self, ids: list[list[list[int]]], start: Tensor, lr_scale: list[Tensor] | None) -> None:
        self.ids, self.start, self.lr_scale = ids, start, lr_scale

    def __len__(self) -> int:
        """Number of curricula."""
        return len(self.ids)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        """A batch of curricula."""
        chosen = [self.ids[number] for number in index]
        steps, width = max(map(len, chosen)), max(len(row) for curriculum in chosen for row in curriculum)
        ids = torch.full((len(chosen), steps, width), -1)
        scale = torch.zeros(len(chosen), steps)
        for place, (number, curriculum) in enumerate(zip(index, chosen, strict=True)):
            for step, row in enumerate(curriculum):
                ids[place, step, : len(row)] = torch.tensor(row, dtype=torch.int64)
            if self.lr_scale is not None:
                scale[place, : len(curriculum)] = self.lr_scale[number]
        numbers = torch.tensor(index, dtype=torch.int64)
        length = torch.tensor([len(curriculum) for curriculum in chosen])
        batch = {"ids": ids, "start": self.start[numbers], "length": length, "run": numbers}
        return batch if self.lr_scale is None else batch | {"lr_scale": scale}


def as_it_is(batch: Batch) -> Batch:
    """Collate what is a batch already."""
    return batch


def _with_scale(batch: Batch, runs: Trajectories, lr_reference: float | None, numbers: Tensor) -> Batch:
    """A batch with scales of learning rates and numbers of runs among all."""
    place, run = batch.pop("place"), batch["run"]
    if runs.lr is not None and lr_reference is not None:
        scale = torch.where(place >= 0, runs.lr[run[:, None], place.clamp(min=0)] / lr_reference, 0.0)
        batch["lr_scale"] = scale if place.shape[1] > 1 else scale.squeeze(1)
    batch["run"] = numbers[run]
    return batch


# -- curricula ---------------------------------------------------------------------------------------------------------


def read_curricula(path: str) -> "list[Curriculum]":
    """Read curricula to predict.

    Args:
        path: see `curricula` of `datamodules.DynamicsData`.

    Returns:
        The curricula.

    Raises:
        ValueError: if the file is missing or of another form.
    """
    origin = f"data.curricula: {path}"
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{origin} cannot be read as JSON ({error}); give lists of ids") from error
    rows = content if isinstance(content, list) and content and isinstance(content[0], dict) else [content]
    return [Curriculum(row, origin, number) for number, row in enumerate(rows)]


class Curriculum:
    """A curriculum of a file.

    Args:
        row: lists of ids, or an object with them.
        origin: option and file, for messages.
        number: its place in the file.

    Attributes:
        ids: pool ids of each step.

    Raises:
        ValueError: if the row has another form.
    """

    def __init__(self, row: Any, origin: str, number: int) -> None:  # noqa: ANN401
        self.origin = f"{origin}: curriculum {number}"
        content: Mapping[str, Any] = row if isinstance(row, dict) else {"ids": row}
        extra = sorted(set(content) - {"ids", "lr", "start"})
        ids = content.get("ids")
        right = isinstance(ids, list) and bool(ids) and all(isinstance(step, list) for step in ids)
        if extra or not right or not all(type(item) is int and item >= 0 for step in ids or [] for item in step):
            what = f"has the key {extra[0]!r}" if extra else "has no list of lists of ids"
            raise ValueError(
                f"{self.origin} {what}; give a list of ids for each step, under `ids` beside `lr`, `start`"
            )
        self.ids: list[list[int]] = ids  # type: ignore[assignment]
        self._lr, self._start = content.get("lr"), content.get("start")

    def check(self, known: Tensor) -> None:
        """Refuse ids that nothing is known of."""
        allowed = set(known.tolist())
        for step, row in enumerate(self.ids, 1):
            for item in row:
                if item not in allowed:
                    raise ValueError(
                        f"{self.origin} has id {item} at step {step}, which is not one of the {len(allowed)} pool "
                        "examples; replace it, or give features of it in data.features"
                    )

    def rates(self, default: Tensor) -> Tensor:
        """(T,) float32, learning rates, by default those of the training runs."""
        if self._lr is None:
            if len(self.ids) > len(default):
                raise ValueError(
                    f"{self.origin} has {len(self.ids)} steps, but the training runs tell learning rates of "
                    f"{len(default)}; give `lr`"
                )
            return default[: len(self.ids)].float()
        rates = torch.as_tensor(self._lr, dtype=torch.float32)
        if rates.ndim and rates.shape != (len(self.ids),):
            raise ValueError(f"{self.origin} has {len(self.ids)} steps but {rates.numel()} values of lr; give as many")
        return rates.expand(len(self.ids))

    def start(self, default: Tensor) -> Tensor:
        """(Q,M) float32, values before the first step."""
        if self._start is None:
            return default
        start = torch.as_tensor(self._start, dtype=torch.float32)
        if start.numel() != default.numel():
            raise ValueError(
                f"{self.origin} has {start.numel()} values in start, but there are {default.numel()}; give one per test"
            )
        return start.reshape(default.shape)
