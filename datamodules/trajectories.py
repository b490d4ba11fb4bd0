"""Recorded runs as aligned arrays, and the rows that simulators of training runs are fitted to.

Shapes: K runs, T steps, b ids of the longest step, Q metrics, M tests, C = Q·M columns (all tests of the first metric,
then all of the second one). A skipped update changed nothing, so its step is left out of everything here.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from datamodules.gptdynamics import LOSS, Recorded, decaying_lr, find_all, natural, repeated_steps

Gap: TypeAlias = Literal["unroll", "released"]
HistoryPad: TypeAlias = Literal["repeat", "zero", "skip"]
Paths: TypeAlias = str | list[str]
Ranges: TypeAlias = list[list[int]] | list[str]
"""Ranges with both ends, `[[0, 199], [300, 310]]`; or as in the released code all starts and ends, `["0,300",
"199,310"]`."""


def find_recorded(paths: Paths, key: str) -> list[Path]:
    """Folders of runs.

    Args:
        paths: folders of runs or of their parents, or patterns such as `runs/seed-*`, in either layout.
        key: name of the option, for messages.

    Returns:
        The folders in the order of the paths, those of one path with the numbers in their names in numerical order.

    Raises:
        ValueError: if a path holds no run, or a run is found twice.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path]
        runs = [run for match in matches for run in find_all(match)]
        if not runs:
            raise ValueError(f"{key}: {path} holds no recorded run; name a folder of runs that a recorder wrote")
        found += sorted(runs, key=lambda run: natural(str(run))) if len(matches) > 1 else runs
    names = [path.resolve() for path in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{key}: the run {found[number]} is named twice; name it once")
    return found


def in_ranges(ids: NDArray[np.int64], ranges: Ranges | None, key: str) -> NDArray[np.bool_]:
    """Which ids lie in one of some ranges.

    Args:
        ids: int64 of any shape.
        ranges: see `Ranges`; None for all ids.
        key: name of the option, for messages.

    Returns:
        Bool, in the shape of `ids`.

    Raises:
        ValueError: if the ranges have another form.
    """
    if ranges is None:
        return np.ones(ids.shape, np.bool_)
    result = np.zeros(ids.shape, np.bool_)
    for first, last in _pairs(ranges, key):
        result |= (ids >= first) & (ids <= last)
    return result


def _pairs(ranges: Ranges, key: str) -> list[tuple[int, int]]:
    rows: Sequence[Sequence[int | str]]
    try:
        if all(isinstance(part, str) for part in ranges):
            starts, ends = (part.split(",") for part in ranges)  # type: ignore[union-attr]
            rows = list(zip(starts, ends, strict=True))
        else:
            rows = ranges
        pairs = [(int(first), int(last)) for first, last in rows]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or any(first > last for first, last in pairs):
        raise ValueError(
            f"{key}: {ranges} are no ranges; give pairs of a first and a last id such as [[0, 199], [300, 310]]"
        )
    return pairs


@dataclass
class Trajectories:
    """Runs of the same pool and tests, aligned at their first common record.

    Attributes:
        names: K names.
        ids: (K,T,b) int64, pool ids of each step, -1 padded.
        values: (K,T+1,Q,M) float32, recorded values, NaN where not measured; the first ones are the start.
        lr: (K,T) float32, mean over parameter groups; None where unknown.
        length: (K,) int64, steps of each run.
        steps: (K,T+1) int64, optimizer step after which each value stands, as it was recorded.
        test_ids: (M,) int64.
    """

    names: list[str]
    ids: Tensor
    values: Tensor
    lr: Tensor | None
    length: Tensor
    steps: Tensor
    test_ids: Tensor

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.names)

    def columns(self) -> Tensor:
        """(K,T+1,C) view of the values."""
        return self.values.flatten(2)

    def select(self, runs: Sequence[int]) -> "Trajectories":
        """Some of the runs.

        Args:
            runs: their numbers.

        Returns:
            The runs, without the steps that only others have.
        """
        rows = torch.tensor(runs, dtype=torch.int64)
        length = self.length[rows]
        steps = int(length.max()) if len(rows) else 0
        width = int((self.ids[rows, :steps] >= 0).sum(-1).max()) if steps else 0
        return Trajectories(
            [self.names[run] for run in runs],
            self.ids[rows, :steps, :width],
            self.values[rows, : steps + 1],
            None if self.lr is None else self.lr[rows, :steps],
            length,
            self.steps[rows, : steps + 1],
            self.test_ids,
        )


@dataclass
class _Single:
    """One run without its skipped steps.

    Attributes:
        run: the run.
        ids: ids of each step.
        lr: (s,), NaN where unknown.
        steps: (s+1,), recorded number of each step, the one before training first.
        values: (s+1,Q,M).
    """

    run: Recorded
    ids: list[NDArray[np.int64]]
    lr: NDArray[np.float32]
    steps: NDArray[np.int64]
    values: NDArray[np.float32]


def align(
    runs: Sequence[Recorded],
    metrics: Sequence[str],
    tests: Sequence[int],
    initial_lr: float | None = None,
    infer_skipped: bool = False,
) -> Trajectories:
    """Put runs into arrays.

    Args:
        runs: the runs.
        metrics: Q names.
        tests: M ids.
        initial_lr: learning rate of the first step of runs that recorded none; it falls linearly to 0.
        infer_skipped: take steps after which all losses are exactly those before as skipped updates.

    Returns:
        The runs from the first step on after which all of them measured all tests.

    Raises:
        ValueError: naming the run, if a metric, a test, a start or a learning rate is missing, or a run is too short.
    """
    singles = [_read(run, metrics, tests, initial_lr, infer_skipped) for run in runs]
    start = _common_start(singles, metrics, tests)
    begins = [int(np.searchsorted(single.steps, start)) for single in singles]
    lengths = np.array([len(single.ids) - begin for single, begin in zip(singles, begins, strict=True)], np.int64)
    if not lengths.all():
        raise ValueError(
            f"{singles[int(lengths.argmin())].run.folder}: the run has no step after step {start}, from which all runs "
            "are simulated; leave it out of data.runs, or record it to its end"
        )
    number, steps = len(singles), int(lengths.max())
    width = max((len(row) for single in singles for row in single.ids), default=0)
    ids = np.full((number, steps, width), -1, np.int64)
    values = np.full((number, steps + 1, len(metrics), len(tests)), np.nan, np.float32)
    lr = np.full((number, steps), np.nan, np.float32)
    labels = np.full((number, steps + 1), -1, np.int64)
    for place, (single, begin, length) in enumerate(zip(singles, begins, lengths, strict=True)):
        for step, row in enumerate(single.ids[begin:]):
            ids[place, step, : len(row)] = row
        values[place, : length + 1] = single.values[begin:]
        lr[place, :length] = single.lr[begin:]
        labels[place, : length + 1] = single.steps[begin:]
    known = ~np.isnan(lr) | (np.arange(steps) >= lengths[:, None])
    if not known.all() and not np.isnan(lr).all():
        place, step = np.argwhere(~known)[0]
        raise ValueError(
            f"{singles[place].run.folder}: the learning rate of step {labels[place, step + 1]} is unknown, but others "
            "are not; record it, or set data.initial_lr for runs without"
        )
    return Trajectories(
        [single.run.run_id for single in singles],
        torch.from_numpy(ids),
        torch.from_numpy(values),
        torch.from_numpy(np.nan_to_num(lr)) if known.all() else None,
        torch.from_numpy(lengths),
        torch.from_numpy(labels),
        torch.tensor(list(tests), dtype=torch.int64),
    )


def _read(
    run: Recorded, metrics: Sequence[str], tests: Sequence[int], initial_lr: float | None, infer_skipped: bool
) -> _Single:
    places = {int(test): place for place, test in enumerate(run.test_ids)}
    for test in tests:
        if test not in places:
            raise ValueError(f"{run.folder}: test {test} was not recorded; leave it out of data.tests")
    columns = [places[test] for test in tests]
    skipped = run.skipped.copy()
    if infer_skipped and LOSS in run.metrics:
        skipped |= repeated_steps(run)
    kept = np.flatnonzero(~skipped)
    # Where each recorded step stands among those that are left: a skipped one at the step before it.
    position = np.concatenate([[0], np.cumsum(~skipped)])
    first = int(run.steps[0]) - 1 if len(run.steps) else 0
    after = np.clip(run.rec_step - first, 0, len(run.steps))
    values = np.full((len(kept) + 1, len(metrics), len(tests)), np.nan, np.float32)
    for number, metric in enumerate(metrics):
        table = run.values(metric)[:, columns]
        for row, place in enumerate(position[after]):
            if run.rec_step[row] >= first:
                values[place, number] = np.where(np.isnan(table[row]), values[place, number], table[row])
    rates = run.lr
    if rates.shape[1]:
        measured = ~np.isnan(rates)
        with np.errstate(invalid="ignore", divide="ignore"):
            lr = (np.where(measured, rates, 0).sum(1) / measured.sum(1)).astype(np.float32)
    else:
        lr = np.full(len(run.steps), np.nan, np.float32)
    if initial_lr is not None and np.isnan(lr).all():
        lr = decaying_lr(len(lr), initial_lr)
    every = list(run.ids)
    return _Single(
        run,
        [every[step] for step in kept],
        lr[kept],
        np.concatenate([[first], run.steps[kept]]).astype(np.int64),
        values,
    )


def _common_start(singles: Sequence[_Single], metrics: Sequence[str], tests: Sequence[int]) -> int:
    """First step after which all runs measured all tests."""
    common: set[int] | None = None
    for single in singles:
        measured = np.isfinite(single.values)
        whole = {int(step) for step in single.steps[measured.all((1, 2))]}
        if not whole:
            best = int(measured.sum((1, 2)).argmax())
            metric, test = np.argwhere(~measured[best])[0]
            if not getattr(single.run, "complete", True):
                raise ValueError(
                    f"{single.run.folder}: the run is unfinished and has no step with values of all tests; let it end, "
                    "resume it, or leave it out of data.runs"
                )
            raise ValueError(
                f"{single.run.folder}: no step has values of all tests to start from, since {metrics[metric]} of test "
                f"{tests[test]} is missing at step {single.steps[best]}; record with record_start, or leave that test "
                "out with data.tests"
            )
        if common is not None and not common & whole:
            raise ValueError(
                f"{single.run.folder}: all tests were measured at step {min(whole)} first, those of the runs before it "
                f"at step {min(common)}, and at no common one; leave the run out of data.runs"
            )
        common = whole if common is None else common & whole
    assert common
    return min(common)


def measured_tests(runs: Sequence[Recorded], metrics: Sequence[str], tests: Sequence[int]) -> list[int]:
    """Tests that have values of all metrics; others are left out with a warning.

    Args:
        runs: the runs.
        metrics: names.
        tests: ids.

    Returns:
        The ids that are left.

    Raises:
        ValueError: if none is left.
    """
    places = {test: place for place, test in enumerate(tests)}
    found = np.zeros((len(metrics), len(tests)), np.bool_)
    for run in runs:
        columns = [column for column, test in enumerate(run.test_ids.tolist()) if test in places]
        own = [places[test] for test in run.test_ids[columns].tolist()]
        for number, metric in enumerate(metrics):
            if metric in run.metrics:
                found[number, own] |= np.isfinite(run.values(metric)[:, columns]).any(0)
    kept = np.asarray(tests, np.int64)[found.all(0)].tolist()
    if not kept:
        raise ValueError(f"data.runs: no test has values of {' and '.join(metrics)}; set data.metric or data.tests")
    if len(kept) < len(tests):
        lost = next(test for test in tests if test not in set(kept))
        rank_zero_warn(
            f"data.runs: {len(tests) - len(kept)} of {len(tests)} tests have no values and are left out, such as test "
            f"{lost}",
            stacklevel=5,
        )
    return kept


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Which values a row goes from and to, and which steps lie between; int64 (R,) each.

    Args:
        run: number of the run.
        first: place of its first step.
        count: its steps.
        begin: place of the value it starts from.
        end: place of its target.
    """

    run: Tensor
    first: Tensor
    count: Tensor
    begin: Tensor
    end: Tensor

    def take(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        return Rows(self.run[index], self.first[index], self.count[index], self.begin[index], self.end[index])


class StepTable:
    """Rows of the matrix form over recorded runs.

    Args:
        runs: the runs.
        order: n, values of the history.
        gap: what becomes of steps without values. "unroll": a row goes from one measured value of a test to the next
            one over all the steps between them. "released": every step is a row of its own, from the last value on
            the grid of `interval` to the next one there (or the last value of all), as in the released code; so each
            learns the change of a whole interval.
        interval: use only every so manieth value from the start on; with "released" null is the distance of the first
            two measured values.
        history_pad: what stands for values before the start.
        step_threshold: leave rows of earlier steps out.

    Raises:
        ValueError: if the options contradict each other or the runs.

    Attributes:
        rows: the rows, run by run, in the order of steps.
    """

    def __init__(
        self,
        runs: Trajectories,
        order: int = 1,
        gap: Gap = "unroll",
        interval: int | None = None,
        history_pad: HistoryPad = "repeat",
        step_threshold: int | None = None,
    ) -> None:
        self.runs, self.order, self.history_pad = runs, order, history_pad
        values = runs.columns().clone()
        if interval is None and gap == "released":
            interval = self._interval(values)
        if interval is not None:
            places = torch.arange(values.shape[1])
            values[:, places % interval != 0] = torch.nan
        if gap == "released" and interval is not None and interval > 1 and order > 1:
            raise ValueError(
                f"data.gap: released rows over {interval} steps have no history of order {order}; set data.gap to "
                "unroll, or data.order to 1"
            )
        last = _last_measured(values)
        if gap == "released":
            assert interval is not None
            every = runs.columns()
            rows = _released_rows(runs.length, interval)
            self._values = every
            self._previous = None
        else:
            self._values = values
            self._previous = torch.cat([last.new_full((len(runs), 1, values.shape[2]), -1), last[:, :-1]], 1)
            rows = _unrolled_rows(values, self._previous)
        if step_threshold is not None:
            rows = rows.take(self._label(rows) >= step_threshold)
        self.rows = rows
        self.longest = int(rows.count.max()) if len(rows.run) else 0
        if not len(rows.run):
            raise ValueError(
                "data.runs: the training runs have no two values of the same test to learn a step from; record more "
                "steps, or lower data.step_threshold"
            )
        if history_pad == "skip" and order > 1 and self.longest > 1:
            raise ValueError(
                f"data.history_pad: skip needs values of {order} steps in a row, but up to {self.longest} steps lie "
                "between two values; set it to repeat"
            )
        if order > 1 and self.longest > 1:
            self._values = _interpolated(values, last)

    @staticmethod
    def _interval(values: Tensor) -> int:
        """Steps between the first two records."""
        later = values[:, 1:].isfinite().any(2).any(0)
        return int(later.int().argmax()) + 1

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows.run)

    def mask(self, rows: Rows) -> Tensor:
        """(R,C) bool, columns of which a row holds two successive values, and all of the history that is asked for."""
        target = self.target(rows)
        known = self.history(rows).isfinite().all(1) & target.isfinite()
        if self._previous is None:
            return known
        return known & (self._previous[rows.run, rows.end] == rows.begin[:, None])

    def history(self, rows: Rows, columns: Tensor | None = None) -> Tensor:
        """(R,n,C) values before each row, the oldest first; or (R,n), those of one column of each row."""
        places = rows.begin[:, None] + torch.arange(1 - self.order, 1)
        at = (rows.run[:, None], places.clamp(min=0))
        history = self._values[at] if columns is None else self._values[(*at, columns[:, None])]
        if self.history_pad != "repeat":
            filling = 0.0 if self.history_pad == "zero" else torch.nan
            inside = places >= 0
            history = torch.where(inside if columns is not None else inside[..., None], history, filling)
        return history

    def target(self, rows: Rows) -> Tensor:
        """(R,C) values after each row."""
        return self.runs.columns()[rows.run, rows.end]

    def _places(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(R,k) int64, places of the steps of each row, -1 after its last one; and (R,k,b) their ids."""
        places = torch.arange(self.longest)
        place = torch.where(places < rows.count[:, None], rows.first[:, None] + places, -1)
        ids = self.runs.ids[rows.run[:, None], place.clamp(min=0)]
        return place, torch.where((place >= 0)[..., None], ids, -1)

    def _label(self, rows: Rows) -> Tensor:
        """(R,) int64, optimizer step of each row, the last one of several."""
        return self.runs.steps[rows.run, rows.first + rows.count]

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Rows in the matrix form, without learning rates.

        Args:
            index: (R,) int64, which ones.

        Returns:
            `ids`, `history`, `target`, `mask`, `step` and `run` as in `DynamicsData`, and `place` (R,k) int64, places
            of the steps, -1 after the last one.
        """
        rows = self.rows.take(index)
        place, ids = self._places(rows)
        return {
            "ids": ids if self.longest > 1 else ids.squeeze(1),
            "history": self.history(rows),
            "target": self.target(rows),
            "mask": self.mask(rows),
            "step": self._label(rows),
            "run": rows.run,
            "place": place,
        }

    def pair_batch(self, index: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Rows in the form of pairs, without learning rates; they must be single steps.

        Args:
            index: (R,) int64, which rows.
            columns: (R,) int64, one column of each.

        Returns:
            `order_ids`, `test_ids`, `prev`, `target`, `step`, `run` and perhaps `metric` as in `DynamicsData`, and
            `place` as above.
        """
        rows, tests = self.rows.take(index), len(self.runs.test_ids)
        place, ids = self._places(rows)
        batch = {
            "order_ids": ids.squeeze(1),
            "test_ids": self.runs.test_ids[columns % tests],
            "prev": self.history(rows, columns),
            "target": self.runs.columns()[rows.run, rows.end, columns],
            "step": self._label(rows),
            "run": rows.run,
            "place": place,
        }
        return batch if self.runs.values.shape[2] == 1 else batch | {"metric": columns // tests}

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Row and column of every single value that can be learnt: run by run, test by test, in the order of steps.

        Returns:
            Two (P,) int64.
        """
        places, columns = [], []
        for run in range(len(self.runs)):
            own = torch.nonzero(self.rows.run == run).squeeze(1)
            column, row = self.mask(self.rows.take(own)).T.nonzero(as_tuple=True)
            places.append(own[row])
            columns.append(column)
        return torch.cat(places), torch.cat(columns)


def _last_measured(values: Tensor) -> Tensor:
    """(K,T+1,C) int32, place of the newest value up to each place; -1 before the first one."""
    places = torch.arange(values.shape[1], dtype=torch.int32)[None, :, None]
    return torch.where(values.isfinite(), places, -1).cummax(1).values


def _unrolled_rows(values: Tensor, previous: Tensor) -> Rows:
    """Every pair of places that hold successive values of some column."""
    begins = torch.where(values.isfinite(), previous, -1)
    # Most columns are those of their neighbour, and need not be sorted.
    fresh = begins >= 0
    fresh[..., 1:] &= begins[..., 1:] != begins[..., :-1]
    run, end, column = fresh.nonzero(as_tuple=True)
    begin = begins[run, end, column].long()
    run, end, begin = torch.stack([run, end, begin]).unique(dim=1)
    return Rows(run, begin, end - begin, begin, end)


def _released_rows(length: Tensor, interval: int) -> Rows:
    """One row per step, from its place on the grid to the next one there."""
    run = torch.repeat_interleave(torch.arange(len(length)), length)
    starts = torch.cumsum(length, 0) - length
    first = torch.arange(len(run)) - starts[run]
    begin = first // interval * interval
    end = torch.minimum(begin + interval, length[run])
    return Rows(run, first, torch.ones_like(first), begin, end)


def _interpolated(values: Tensor, last: Tensor) -> Tensor:
    """Values between two measured ones on the line between them; what lies before a row knows nothing of its target."""
    size = values.shape[1]
    places, last = torch.arange(size)[None, :, None], last.long()
    coming = torch.where(values.isfinite(), places, size).flip(1).cummin(1).values.flip(1)
    inside = (last >= 0) & (coming < size)
    left, right = last.clamp(min=0), coming.clamp(max=size - 1)
    share = (places - left) / (right - left).clamp(min=1)
    line = values.gather(1, left) * (1 - share) + values.gather(1, right) * share
    return torch.where(values.isfinite(), values, torch.where(inside, line, torch.nan))
