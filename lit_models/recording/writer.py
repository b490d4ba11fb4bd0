"""Writing a run while it happens, or at once."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save as to_bytes
from torch import Tensor

from lit_models.recording.files import (
    FILE,
    OPTIONAL,
    SCHEMA,
    Arrays,
    Part,
    cut,
    first_repeat,
    metadata,
    part_paths,
    read_info,
    read_part,
    write_atomically,
)
from lit_models.recording.ids import Ids, Numbers, as_ids, is_outside, outside, pool_of


@dataclass
class _Buffer:
    """Rows of the present part; tensors stay on their device until it is written.

    Attributes:
        steps: arguments of `step`.
        records: metric, positions and values by step.
        fresh: whether some of them are not on the disk yet.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    records: dict[int, list[tuple[str, NDArray[np.int64], Numbers]]] = field(default_factory=dict)
    fresh: bool = False

    def to_host(self) -> None:
        """Copy what lies on a device, once."""
        for row in self.steps:
            row["ids"] = as_ids(row["ids"])
            for key in OPTIONAL:
                row[key] = None if row[key] is None else _floats(row[key])
        for step, rows in self.records.items():
            self.records[step] = [(metric, where, _floats(values)) for metric, where, values in rows]


class RunWriter:
    """Writes the rows of one process of a run.

    Nothing here waits for other processes. Rank 0 also writes `run.json`, after its own part. Values may be tensors on
    any device; they are copied when a part is written.

    Args:
        folder: the run.
        info: contents of `run.json`: at least `test_ids` and `metrics`; `run_id`, `pool_size`, `pool_ids` (where they
            are not 0 to pool_size-1) and `pool_fingerprint` where they are known.
        rank: number of this process.
        world_size: number of processes that write.
        columns: positions of this process's tests in `test_ids`; all of them by default.
        flush_every: steps per part.
        dtype: of the metrics on disk.

    Raises:
        ValueError: if test ids occur twice or an option is out of range.

    Example::

        with RunWriter("runs/a", {"test_ids": [0, 1], "metrics": ["loss"], "pool_size": 4}) as run:
            run.record(0, "loss", [0.7, 0.6])
            run.step(1, ids=[3, 0], lr=0.1)
            run.record(1, "loss", [0.5, 0.6])
    """

    def __init__(
        self,
        folder: str | Path,
        info: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        columns: Sequence[int] | None = None,
        flush_every: int = 50,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1, got {flush_every}")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
        tests = list(info["test_ids"])
        if len(set(tests)) != len(tests):
            raise ValueError(f"test_ids: {first_repeat(tests)} occurs twice; every test needs an id of its own")
        self.folder = Path(folder)
        self.info: dict[str, Any] = {
            "schema": SCHEMA,
            "run_id": self.folder.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": False,
            "n_steps": 0,
            "pool_size": None,
            "pool_fingerprint": None,
            "world_size": world_size,
            **info,
            "test_ids": tests,
            "metrics": list(info["metrics"]),
            "parts": [],
        }
        self.rank, self.world_size = rank, world_size
        self.columns = None if columns is None else np.asarray(columns, np.int32)
        self.flush_every, self.dtype = flush_every, np.dtype(dtype)
        self.next_part = 0
        self._pool = pool_of(self.info)
        self._buffer = _Buffer()
        self._warned = False

    def __enter__(self) -> "RunWriter":
        """Begin a new run."""
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the run, or write what there is of it."""
        self.finish() if kind is None else self.flush()

    @property
    def width(self) -> int:
        """Number of tests of this process."""
        return len(self.info["test_ids"]) if self.columns is None else len(self.columns)

    # -- where a run begins ------------------------------------------------------------------------------------------

    def begin(self, overwrite: bool = False) -> None:
        """Start a new run with an empty `run.json`. Every process removes what it wrote to an earlier one.

        Args:
            overwrite: remove a run that is there.

        Raises:
            ValueError: if the folder holds a run and `overwrite` is false.
        """
        if self.rank == 0 and (self.folder / "run.json").exists():
            if not overwrite:
                raise ValueError(f"{self.folder} already holds a run; name another folder, or remove this one")
            (self.folder / "run.json").unlink()
        self._remove_drafts()
        for path in self.folder.glob("*-r*.safetensors"):
            match = FILE.fullmatch(path.name)
            if match and self._owns(int(match[1])):
                path.unlink()
        if self.rank == 0:
            self._write_info()

    def resume(self, step: int) -> int:
        """Go on with the run that is there, after removing every row beyond a step.

        Rows of other processes that are still part of the run are theirs to remove.

        Args:
            step: last step to keep.

        Returns:
            Last step that is there: `step`, or less if the run ends before it; -1 without any row.

        Raises:
            ValueError: if the folder holds no run, or its tests or pool are others.
        """
        there = read_info(self.folder)
        for key, what in (("test_ids", "test set"), ("pool_fingerprint", "pool"), ("metrics", "list of metrics")):
            if there.get(key) != self.info[key]:
                raise ValueError(
                    f"{self.folder} was recorded with another {what}; restore that one, or record into another folder"
                )
        self.info["created"], self.info["run_id"] = there["created"], there["run_id"]
        self._remove_drafts()
        kept: list[Part] = []
        changes: list[tuple[Part, Arrays | None]] = []
        for path in part_paths(self.folder):
            part = read_part(path)
            if not self._owns(part.rank):
                continue
            rows = cut(part.all(), step)
            if part.extra or not len(rows["step"]) + len(rows["rec_step"]):
                changes.append((part, None))
                continue
            if len(rows["step"]) < len(part.step) or len(rows["rec_step"]) < len(part.rec_step):
                changes.append((part, rows))
                part.step, part.rec_step = rows["step"], rows["rec_step"]
            if part.rank == self.rank:
                kept.append(part)
        self.next_part = kept[-1].number + 1 if kept else 0
        self.info["parts"] = [self._entry(part.path, part.span()) for part in kept]
        self.info["n_steps"] = max((part.span()[1] for part in kept), default=0)
        if self.rank == 0:
            self._write_info()  # before its parts go, so that it never names one that is not there
        for part, remaining in reversed(changes):
            if remaining is None:
                part.path.unlink()
            else:
                write_atomically(part.path, to_bytes(remaining, part.metadata))
        return self.info["n_steps"] if kept else -1

    def _remove_drafts(self) -> None:
        """Remove what this process was writing when an earlier one in its place was killed."""
        for name in (f".part-r{self.rank}-*.draft", *([".run.json.*.draft"] if self.rank == 0 else [])):
            for path in self.folder.glob(name):
                path.unlink()

    def _owns(self, rank: int) -> bool:
        """Whether the files of a process are this one's to change: its own, or those of processes that are no more."""
        return rank == self.rank or (self.rank == 0 and rank >= self.world_size)

    # -- rows --------------------------------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        ids: Numbers | Sequence[Tensor],
        lr: float | Sequence[float] = (),
        skipped: bool = False,
        train_loss: Numbers | None = None,
        grad_norm: Numbers | None = None,
    ) -> None:
        """Add an optimizer step.

        Args:
            step: its number, from 1.
            ids: pool ids that it used, in one piece or as those of each batch.
            lr: learning rate of each parameter group.
            skipped: whether the update was left out.
            train_loss: mean loss of its batches.
            grad_norm: norm of the gradient before clipping.
        """
        row = {"step": step, "ids": ids, "lr": lr, "skipped": skipped, "train_loss": train_loss, "grad_norm": grad_norm}
        self._buffer.steps.append(row)
        self._buffer.fresh = True

    def record(self, step: int, metric: str, values: Numbers, positions: ArrayLike | None = None) -> None:
        """Add measured values.

        Args:
            step: step after which they were measured, 0 before training.
            metric: one of `metrics`.
            values: float [m].
            positions: which of this process's tests they belong to; all of them by default.
        """
        if metric not in self.info["metrics"]:
            raise ValueError(f"metric {metric!r} is none of this run's, which are {self.info['metrics']}")
        where = np.arange(self.width) if positions is None else np.asarray(positions, np.int64).reshape(-1)
        self._buffer.records.setdefault(step, []).append((metric, where, values))
        self._buffer.fresh = True

    def ready(self) -> bool:
        """Whether the present part has all its steps."""
        return len(self._buffer.steps) >= self.flush_every

    def flush(self, extra: bool = False) -> None:
        """Write all rows.

        A part is written again with the rows that came since, until it has `flush_every` steps; so writing often costs
        little and leaves few files.

        Args:
            extra: end the part, and mark it as measured beyond the plan, so that `resume` removes it.

        Raises:
            ValueError: if an id is not of the pool; the rows before that step are written.
        """
        buffer = self._buffer
        if not buffer.fresh:
            return
        buffer.to_host()
        batches: list[NDArray[np.int64]] = []
        problem = None
        for row in buffer.steps:
            problem = self._problem(row, batches)
            if problem is not None:
                del buffer.steps[len(batches) :]
                buffer.records = {at: rows for at, rows in buffer.records.items() if at < row["step"]}
                break
        if buffer.steps or buffer.records:
            self._write_part(buffer, batches, extra)
        buffer.fresh = False
        if extra or problem is not None or self.ready():
            self.end_part()
        if problem is not None:
            raise ValueError(problem)

    def end_part(self) -> None:
        """Write all rows, and begin another part with the next one."""
        self.flush()
        if self._buffer.steps or self._buffer.records:
            self._buffer = _Buffer()
            self.next_part += 1

    def _problem(self, row: Mapping[str, Any], batches: list[NDArray[np.int64]]) -> str | None:
        """Append the ids of a step to those before it, or say what is wrong with them."""
        ids = row["ids"]
        if ids.size and ids.dtype.kind not in "iu":
            return (
                f"{self.folder}: step {row['step']} has ids that are no whole numbers, such as {ids[0]!r}; number them"
            )
        ids = ids.astype(np.int64)
        wrong = ids[is_outside(ids, self._pool)]
        if len(wrong):
            return f"{self.folder}: step {row['step']} used {outside(int(wrong[0]), self._pool)}"
        batches.append(ids)
        return None

    def finish(self) -> None:
        """Write all rows and mark the run as complete."""
        self.flush()
        self.info["complete"] = True
        if self.rank == 0:
            self._write_info()

    def _write_part(self, buffer: _Buffer, batches: list[NDArray[np.int64]], extra: bool) -> None:
        ids = Ids.from_lists(batches)
        records = sorted(buffer.records)
        groups = max((np.size(row["lr"]) for row in buffer.steps), default=0)
        lr = np.full((len(buffer.steps), groups), np.nan, np.float32)
        for number, row in enumerate(buffer.steps):
            lr[number, : np.size(row["lr"])] = row["lr"]
        arrays: Arrays = {
            "step": np.array([row["step"] for row in buffer.steps], np.int64),
            "offsets": ids.offsets,
            "ids": ids.values,
            "lr": lr,
            "skipped": np.array([row["skipped"] for row in buffer.steps], np.uint8),
            "rec_step": np.array(records, np.int64),
        }
        if self.columns is not None:
            arrays["cols"] = self.columns
        for key in OPTIONAL:
            if any(row[key] is not None for row in buffer.steps):
                arrays[key] = np.array([_floats(row[key]) for row in buffer.steps], np.float32).reshape(-1)
        for metric in self.info["metrics"]:
            arrays |= self._metric(metric, buffer, records)
        path = self.folder / f"part-r{self.rank}-{self.next_part:05d}.safetensors"
        write_atomically(path, to_bytes(arrays, metadata(self.rank, self.world_size, extra)))
        steps = arrays["step"] if len(arrays["step"]) else arrays["rec_step"]
        entry = self._entry(path, (int(steps[0]), int(steps[-1])))
        self.info["parts"] = [other for other in self.info["parts"] if other["file"] != path.name] + [entry]
        self.info["n_steps"] = max(self.info["n_steps"], int(steps[-1]))
        if self.rank == 0:
            self._write_info()

    def _metric(self, metric: str, buffer: _Buffer, records: list[int]) -> Arrays:
        """Table of a metric, and the places of measured values that are no numbers."""
        table = np.full((len(records), self.width), np.nan, self.dtype)
        bad: list[tuple[int, int]] = []
        for row, step in enumerate(records):
            for name, where, values in buffer.records[step]:
                if name == metric:
                    numbers = _floats(values).reshape(-1)
                    table[row, where] = numbers
                    bad.extend((row, int(column)) for column in where[np.isnan(numbers)])
        if not bad:
            return {f"m.{metric}": table}
        if not self._warned:
            self._warned = True
            row, column = bad[0]
            test = self.info["test_ids"][column if self.columns is None else self.columns[column]]
            warnings.warn(
                f"{self.folder}: {metric} of test {test} is NaN at step {records[row]}; it is recorded as it is, "
                "and so are further ones, without another warning",
                stacklevel=2,
            )
        return {f"m.{metric}": table, f"nan.{metric}": np.array(bad, np.int32)}

    def _entry(self, path: Path, span: tuple[int, int]) -> dict[str, Any]:
        return {"file": path.name, "first_step": span[0], "last_step": span[1]}

    def _write_info(self) -> None:
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.info.items())
        write_atomically(self.folder / "run.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write_run(
    folder: str | Path,
    info: Mapping[str, Any],
    ids: Iterable[Numbers],
    lr: Numbers,
    rec_step: Sequence[int],
    values: Mapping[str, Numbers],
    skipped: Sequence[bool] | None = None,
) -> None:
    """Write a whole run at once.

    Args:
        folder: the run; it must not hold one yet.
        info: see `RunWriter`; `metrics` may be left out.
        ids: pool ids of steps 1, 2, ...
        lr: float [s] or [s,groups].
        rec_step: steps after which metrics were measured, ascending.
        values: float [q,M] by metric, NaN where not measured.
        skipped: which updates were skipped.
    """
    rates = np.asarray(lr, np.float64)
    left_out = [False] * len(rates) if skipped is None else list(skipped)
    tables = {name: _floats(table) for name, table in values.items()}
    with RunWriter(folder, {"metrics": list(tables), **info}, flush_every=2**31) as run:
        for number, row in enumerate(ids):
            run.step(number + 1, row, np.atleast_1d(rates[number]).tolist(), bool(left_out[number]))
        for number, step in enumerate(rec_step):
            for name, table in tables.items():
                measured = np.flatnonzero(~np.isnan(table[number]))
                run.record(step, name, table[number, measured], measured)


def _floats(value: Any) -> NDArray[Any]:  # noqa: ANN401
    """Numbers on whichever device as float64; None as NaN."""
    if value is None:
        return np.array(np.nan)
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, np.float64)


def write_features(
    folder: str | Path, rank: int, test_ids: ArrayLike, tests: ArrayLike, pool_ids: ArrayLike, pool: ArrayLike
) -> None:
    """Write features of tests and of pool examples, as they are before the first step.

    Args:
        folder: the run.
        rank: process that has them; each one writes a file.
        test_ids: int [m].
        tests: float [m,D].
        pool_ids: int [n].
        pool: float [n,D].
    """
    arrays: Arrays = {
        "test_ids": np.asarray(test_ids, np.int64),
        "tests": np.asarray(tests, np.float32),
        "pool_ids": np.asarray(pool_ids, np.int64),
        "pool": np.asarray(pool, np.float32),
    }
    write_atomically(Path(folder) / f"features-r{rank}.safetensors", to_bytes(arrays))
