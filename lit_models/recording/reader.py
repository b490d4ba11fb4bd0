"""Reading a run, finished or not."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lit_models._ranks import warn
from lit_models.recording.files import PART, Part, part_paths, read_info, read_part
from lit_models.recording.ids import Ids, interleaved, is_outside, outside, pool_of


@dataclass
class _Rank:
    """The parts of one process."""

    parts: list[Part]

    @functools.cached_property
    def steps(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *(part.step for part in self.parts)])

    @functools.cached_property
    def world_sizes(self) -> NDArray[np.int64]:
        """Number of processes at each step."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(np.full(len(part.step), part.world_size) for part in self.parts)]
        )

    def check(self) -> None:
        """Steps go on from part to part without a gap."""
        last: int | None = None
        for part in self.parts:
            steps = part.step if last is None else np.concatenate([[last], part.step])
            for before in np.flatnonzero(np.diff(steps) != 1)[:1]:
                left, right = int(steps[before]), int(steps[before + 1])
                if right <= left:
                    raise ValueError(f"{part.path}: step {right} comes after step {left}, but steps ascend; remove it")
                raise ValueError(
                    f"{part.path}: step {left + 1} is missing, since step {left} is followed by {right}; "
                    "restore the file that held it"
                )
            last = int(steps[-1]) if len(steps) else last


class DynamicsRun:
    """A recorded run.

    Only steps are read when it is opened; ids and metrics are read when they are asked for, and kept.

    Attributes:
        folder: where it is.
        info: contents of `run.json`.
        steps: int64 [s], the optimizer steps.
        rec_step: int64 [q], steps after which something was measured; 0 is before training.
        test_ids: int64 [M].

    Example::

        run = DynamicsRun.open("runs/a")
        loss = run.values("loss")  # [q, M]
    """

    def __init__(self, folder: Path, info: dict[str, Any], ranks: dict[int, _Rank], last: int) -> None:
        self.folder, self.info = folder, info
        self._ranks = ranks
        steps = ranks[0].steps if 0 in ranks else np.zeros(0, np.int64)
        self.steps: NDArray[np.int64] = steps[steps <= last]
        records = [part.rec_step for rank in ranks.values() for part in rank.parts]
        found = np.unique(np.concatenate([np.zeros(0, np.int64), *records]))
        self.rec_step: NDArray[np.int64] = found[found <= last]
        self.test_ids: NDArray[np.int64] = np.asarray(info["test_ids"], np.int64)
        self._tables: dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}

    @classmethod
    def open(cls, folder: str | Path, strict: bool = False) -> "DynamicsRun":
        """Open a run, finished or not.

        An unfinished run ends at the last step that all its processes have written. A last part that cannot be read
        (cut off while it was copied, say) ends the run before it, with a warning.

        Args:
            folder: the run.
            strict: refuse unfinished runs and unreadable last parts.

        Returns:
            The run.

        Raises:
            ValueError: naming file and step, if steps are missing or do not ascend, a part in the middle is missing or
                cannot be read, a finished run has fewer steps than it says, or `strict` is not met.
        """
        folder = Path(folder)
        info = read_info(folder)
        ranks, whole = _read_ranks(folder, info, strict)
        for rank in ranks.values():
            rank.check()
        last = _last_common_step(folder, ranks, bool(info["complete"]) and whole)
        run = cls(folder, info, ranks, last)
        if strict and not info["complete"]:
            raise ValueError(f"{folder / 'run.json'}: the run ended early, at step {run.n_steps}; record it to its end")
        if whole and info["complete"] and run.n_steps != info["n_steps"]:
            raise ValueError(
                f"{folder / 'run.json'} says {info['n_steps']} steps, but the parts end at step {run.n_steps}; "
                "restore the missing ones from a copy"
            )
        return run

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return str(self.info["run_id"])

    @property
    def complete(self) -> bool:
        """Whether the run was recorded to its end."""
        return bool(self.info["complete"])

    @property
    def n_steps(self) -> int:
        """Last step."""
        if len(self.steps):
            return int(self.steps[-1])
        return int(self.rec_step[-1]) if len(self.rec_step) else 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.info["metrics"])

    @property
    def pool_size(self) -> int | None:
        """Number of examples of the pool, where it is known."""
        size = self.info.get("pool_size")
        return None if size is None else int(size)

    # -- steps -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def ids(self) -> Ids:
        """Pool ids of each step, those of several processes in their order.

        Raises:
            ValueError: naming file and step, if an id is not of the pool.
        """
        pool = pool_of(self.info)
        per_rank = []
        for _, rank in sorted(self._ranks.items()):
            sizes, values = [], []
            for part in rank.parts:
                ids = Ids(part.get("ids"), part.get("offsets"))
                wrong = is_outside(ids.values.astype(np.int64), pool)
                if wrong.any():
                    place = int(np.flatnonzero(wrong)[0])
                    step = part.step[np.searchsorted(ids.offsets, place, "right") - 1]
                    raise ValueError(f"{part.path}: step {step} used {outside(int(ids.values[place]), pool)}")
                sizes.append(ids.sizes)
                values.append(ids.values)
            # A process may have taken part in some of the steps only.
            every = np.zeros(len(self.steps), np.int64)
            own = np.concatenate([np.zeros(0, np.int64), *sizes])
            kept = rank.steps <= (self.steps[-1] if len(self.steps) else -1)
            every[np.searchsorted(self.steps, rank.steps[kept])] = own[kept]
            flat = np.concatenate([np.zeros(0, np.int32), *values])[: own[kept].sum()]
            per_rank.append(Ids(flat, np.concatenate([[0], np.cumsum(every)]).astype(np.int64)))
        return interleaved(per_rank) if per_rank else Ids.from_lists([])

    @functools.cached_property
    def lr(self) -> NDArray[np.float32]:
        """Float32 [s,groups], learning rates used by each step; NaN for groups that did not step."""
        tables = [part.get("lr") for part in self._ranks[0].parts if len(part.step)] if 0 in self._ranks else []
        result = np.full((len(self.steps), max((table.shape[1] for table in tables), default=0)), np.nan, np.float32)
        begin = 0
        for table in tables:
            rows = table[: len(self.steps) - begin]
            result[begin : begin + len(rows), : table.shape[1]] = rows
            begin += len(rows)
        return result

    @functools.cached_property
    def skipped(self) -> NDArray[np.bool_]:
        """Bool [s], steps whose update was left out."""
        if 0 not in self._ranks:
            return np.zeros(0, np.bool_)
        flags = [part.get("skipped") for part in self._ranks[0].parts]
        return np.concatenate([np.zeros(0, np.uint8), *flags])[: len(self.steps)].astype(np.bool_)

    @property
    def train_loss(self) -> NDArray[np.float32] | None:
        """Float32 [s], mean training loss of each step over processes; None if it was not recorded."""
        return self._optional("train_loss")

    @property
    def grad_norm(self) -> NDArray[np.float32] | None:
        """Float32 [s], norm of the gradient before clipping; None if it was not recorded."""
        return self._optional("grad_norm")

    def _optional(self, key: str) -> NDArray[np.float32] | None:
        rows = []
        for rank in self._ranks.values():
            if not any(key in part.keys for part in rank.parts):
                continue
            row = np.full(len(self.steps), np.nan, np.float32)
            for part in rank.parts:
                kept = part.step <= (self.steps[-1] if len(self.steps) else -1)
                if key in part.keys:
                    row[np.searchsorted(self.steps, part.step[kept])] = part.get(key)[kept]
            rows.append(row)
        if not rows:
            return None
        table = np.stack(rows)
        known = ~np.isnan(table)
        total = np.where(known, table, 0).sum(0, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return (total / np.where(known.any(0), known.sum(0), np.nan)).astype(np.float32)

    # -- metrics -----------------------------------------------------------------------------------------------------

    def values(self, metric: str = "loss") -> NDArray[np.float32]:
        """A metric of all tests after each recorded step.

        Args:
            metric: one of `metrics`.

        Returns:
            Float32 [q,M], NaN where it was not measured (or is NaN, see `measured`).

        Raises:
            ValueError: if the run has no such metric.
        """
        return self._table(metric)[0]

    def measured(self, metric: str = "loss") -> NDArray[np.bool_]:
        """Where a metric was measured, even if the result is NaN.

        Args:
            metric: one of `metrics`.

        Returns:
            Bool [q,M].
        """
        return self._table(metric)[1]

    def _table(self, metric: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if metric not in self.metrics:
            raise ValueError(f"{self.folder}: metric {metric!r} was not recorded; recorded are {list(self.metrics)}")
        if metric not in self._tables:
            table = np.full((len(self.rec_step), len(self.test_ids)), np.nan, np.float32)
            measured = np.zeros(table.shape, np.bool_)
            last = self.rec_step[-1] if len(self.rec_step) else -1
            for rank in self._ranks.values():
                for part in rank.parts:
                    if f"m.{metric}" not in part.keys:
                        continue
                    kept = part.rec_step <= last
                    rows = np.searchsorted(self.rec_step, part.rec_step[kept])
                    columns = part.get("cols") if "cols" in part.keys else np.arange(len(self.test_ids))
                    values = part.get(f"m.{metric}")[kept].astype(np.float32)
                    known = ~np.isnan(values)
                    if f"nan.{metric}" in part.keys:
                        places = part.get(f"nan.{metric}")
                        places = places[places[:, 0] < len(rows)]
                        known[places[:, 0], places[:, 1]] = True
                    block = np.ix_(rows, columns)
                    table[block] = np.where(known, values, table[block])
                    measured[block] |= known
            self._tables[metric] = table, measured
        return self._tables[metric]

    def features(self, kind: Literal["tests", "pool"]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Features as they were before the first step.

        Args:
            kind: of which examples.

        Returns:
            Ids in ascending order int64 [n], and features float32 [n,D].

        Raises:
            ValueError: if none were recorded.
        """
        paths = sorted(self.folder.glob("features-r*.safetensors"))
        if not paths:
            raise ValueError(f"{self.folder} has no features; record with the recorder's grad_features")
        tables = [load_file(path) for path in paths]
        ids = np.concatenate([table["test_ids" if kind == "tests" else "pool_ids"] for table in tables])
        rows = np.concatenate([table[kind] for table in tables if len(table[kind])] or [np.zeros((0, 0), np.float32)])
        order = np.argsort(ids, kind="stable")
        return ids[order], rows[order]

    def check(self) -> None:
        """Read everything once.

        Raises:
            ValueError: naming file and step, if anything in the run is wrong.
        """
        _ = self.ids, self.lr, self.skipped, self.train_loss, self.grad_norm
        for metric in self.metrics:
            self.values(metric)


def _read_ranks(folder: Path, info: Mapping[str, Any], strict: bool) -> tuple[dict[int, _Rank], bool]:
    """Parts by process, and whether all of them could be read."""
    paths = part_paths(folder)
    names = {path.name for path in paths}
    for entry in info.get("parts", []):
        if entry["file"] not in names:
            raise ValueError(
                f"{folder / entry['file']} is missing, and with it steps {entry['first_step']} to "
                f"{entry['last_step']}; restore it from a copy"
            )
    ranks: dict[int, _Rank] = {}
    broken: dict[int, ValueError] = {}
    for path in paths:
        match = PART.fullmatch(path.name)
        assert match is not None
        number = int(match[1])
        if number in broken:
            raise broken[number]  # a part that is not the last one
        try:
            part = read_part(path)
            ranks.setdefault(number, _Rank([])).parts.append(part)
        except ValueError as error:
            if strict or error.__cause__ is None:  # readable, but wrong
                raise
            broken[number] = error
    for number, problem in broken.items():
        parts = ranks[number].parts if number in ranks else []
        last = parts[-1].span()[1] if parts else 0
        warn(f"{problem}; until then the run is read up to step {last}", stacklevel=3)
    return ranks, not broken


def _last_common_step(folder: Path, ranks: dict[int, _Rank], complete: bool) -> int:
    """Last step (or recorded step) that every process has written."""
    if 0 not in ranks:
        return -1
    first = ranks[0]
    for number, rank in ranks.items():
        inside = np.isin(rank.steps, first.steps) if number else np.ones(len(rank.steps), np.bool_)
        early = rank.steps[~inside & (rank.steps < first.steps.max(initial=0))]
        if len(early):
            raise ValueError(f"{folder}: rank {number} has step {early[0]}, but rank 0 has not; restore its part")
    present = np.zeros(len(first.steps), np.int64)
    for number, rank in ranks.items():
        present += np.isin(first.steps, rank.steps) & (number < first.world_sizes)
    lacking = np.flatnonzero(present < first.world_sizes)
    if not len(lacking):
        return max(part.span()[1] for part in first.parts) if first.parts else -1
    begin = int(lacking[0])
    step = int(first.steps[begin])
    if complete or len(lacking) < len(first.steps) - begin:
        who = next(
            number
            for number in range(int(first.world_sizes[begin]))
            if number not in ranks or step not in ranks[number].steps
        )
        missing = folder / f"part-r{who}-*.safetensors"
        raise ValueError(f"{missing}: step {step} is in none of them; restore the file that held it")
    return step - 1
