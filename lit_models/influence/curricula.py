"""Curricula: what each step of a run trains on, as lists, tables, files or recorded runs.

Shapes: K curricula, T steps, b places of a batch, M tests. A curriculum is (T, b) int64, pool ids of each step with -1
where a batch has no further example, or lists of ids of any lengths.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lit_models.influence import functional
from lit_models.recording import DynamicsRun

if TYPE_CHECKING:
    from lit_models.influence.modeling import InfluenceSimulator

Curriculum: TypeAlias = "Tensor | Sequence[Sequence[int]]"
Mode = Literal["drop", "replace"]


def as_ids(curriculum: Curriculum) -> Tensor:
    """A curriculum as a table.

    Args:
        curriculum: lists of ids, or a table, which may also be (K, T, b), of several.

    Returns:
        (T, b) or (K, T, b) int64, -1 at padding.

    Raises:
        ValueError: if a table has another shape or holds no whole numbers.
    """
    if not isinstance(curriculum, Tensor):
        return functional.pad_ids([[int(example) for example in batch] for batch in curriculum])
    if curriculum.ndim not in (2, 3) or curriculum.is_floating_point():
        raise ValueError(
            f"curriculum must be a table of ids with a row per step, got {curriculum.dtype} of shape "
            f"{tuple(curriculum.shape)}; pad shorter batches with -1"
        )
    return curriculum.long()


def stack(curricula: Sequence[Curriculum]) -> tuple[Tensor, Tensor]:
    """Several curricula of any lengths and batch sizes as one table.

    Args:
        curricula: K of them.

    Returns:
        (K, T, b) int64, -1 at padding; (K,) int64, steps of each.
    """
    tables = [as_ids(curriculum) for curriculum in curricula]
    lengths = torch.tensor([len(table) for table in tables])
    stacked = torch.full((len(tables), int(lengths.max()), max(table.shape[1] for table in tables)), -1)
    for place, table in zip(stacked, tables, strict=True):
        place[: table.shape[0], : table.shape[1]] = table
    return stacked, lengths


def leave_out(
    curriculum: Curriculum,
    removed: Sequence[int] | Tensor,
    mode: Mode = "drop",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A curriculum without some examples.

    Args:
        curriculum: what was trained on; it is not changed.
        removed: ids to take out wherever they occur.
        mode: "drop" makes batches smaller, which only simulators with an identity offset understand; "replace" puts
            other examples of the same curriculum in their places, drawn for every batch anew, and none twice in a batch
            as long as there are enough.
        generator: draws the substitutes.

    Returns:
        (T, b) int64; what is dropped leaves a -1.

    Raises:
        ValueError: if there is no such mode, or nothing is left to draw from.
    """
    if mode not in ("drop", "replace"):
        raise ValueError(f"mode must be drop or replace, got {mode!r}")
    ids = as_ids(curriculum)
    gone = torch.isin(ids, torch.as_tensor(removed, device=ids.device)) & (ids >= 0)
    if mode == "drop" or not bool(gone.any()):
        return ids.masked_fill(gone, -1)
    rest = ids[(ids >= 0) & ~gone].unique()
    if not len(rest):
        raise ValueError("removed: it holds every example of the curriculum, so nothing can replace them; drop them")
    steps = gone.any(-1).nonzero().flatten()
    batches, holes = ids[steps], gone[steps]
    present = torch.zeros(len(steps), len(rest), dtype=torch.bool)
    row, place = ((batches >= 0) & ~holes).cpu().nonzero(as_tuple=True)
    present[row, torch.searchsorted(rest.cpu(), batches.cpu()[row, place])] = True
    keys = torch.rand(len(steps), len(rest), generator=generator) + present  # those of the batch itself come last
    order = keys.argsort(1).to(ids.device)
    number = (holes.long().cumsum(1) - 1).clamp(min=0) % len(rest)
    result = ids.clone()
    result[steps] = torch.where(holes, rest[order.gather(1, number)], batches)
    return result


# -- recorded runs and files -------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A curriculum and what is known of its run, from the first recorded values on.

    Args:
        ids: (T, b) int64, steps after the start, without those whose update was skipped.
        lr: (T,) float32, or one number, or None where it is not known.
        start: (M,) float32 before the first of these steps, or (k, M), the last k values; None where it is not known.
        values: (T+1, M) float32, NaN where not measured; None for runs that never took place.
        steps: (T+1,) int64, number of the step after which each value stands, that of the start first.
    """

    ids: Tensor
    lr: Tensor | None
    start: Tensor | None
    values: Tensor | None
    steps: Tensor


def read_run(
    run: DynamicsRun | str | Path,
    simulator: "InfluenceSimulator",
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
) -> Recorded:
    """Read a recorded run as a curriculum.

    Args:
        run: the run, or its folder.
        simulator: tells the tests, and how many values stand before the first step.
        tests: ids of the columns; all of the simulator by default.
        metric: one of the simulated ones; the first by default.

    Returns:
        The curriculum with start and recorded values. The learning rate is the mean over parameter groups.

    Raises:
        ValueError: if the run lacks a test or the metric, or was measured nowhere.
    """
    run = DynamicsRun.open(run) if isinstance(run, (str, Path)) else run
    columns = simulator.test_ids if tests is None else torch.as_tensor(tests)
    places = {test: place for place, test in enumerate(run.test_ids.tolist())}
    missing = [test for test in columns.tolist() if test not in places]
    if missing:
        raise ValueError(f"{run.folder}: test {missing[0]} was not recorded; ask for others with tests")
    table = run.values(simulator.config.metrics[0] if metric is None else metric)
    table = table[:, [places[test] for test in columns.tolist()]]
    whole = np.flatnonzero(~np.isnan(table).any(1))
    given = simulator.config.given
    if len(whole) < given:
        raise ValueError(f"{run.folder}: no step has values of all tests to start from; record the start of runs")
    rows = whole[:given]
    first, begin = int(run.rec_step[rows[0]]), int(run.rec_step[rows[-1]])
    if begin - first != given - 1:
        raise ValueError(f"{run.folder}: history_pad: skip needs the first {given} steps in a row; record every step")
    kept = np.flatnonzero(~run.skipped & (run.steps > begin))
    steps = np.concatenate([[begin], run.steps[kept]]).astype(np.int64)
    values = np.full((len(steps), table.shape[1]), np.nan, np.float32)
    for place, row, step in zip(np.searchsorted(steps, run.rec_step, "right") - 1, table, run.rec_step, strict=True):
        if step >= begin:  # what was measured after a skipped update belongs to the step before it
            values[place] = np.where(np.isnan(row), values[place], row)
    rates = run.lr[kept]
    lr = torch.from_numpy(np.nanmean(rates, 1)) if rates.size and not np.isnan(rates).all(1).any() else None
    start = torch.from_numpy(table[rows])
    return Recorded(
        torch.from_numpy(run.ids.padded()[kept]),
        lr,
        start[0] if given == 1 else start,
        torch.from_numpy(values),
        torch.from_numpy(steps),
    )


def mean_of_runs(
    runs: Sequence[DynamicsRun | str | Path],
    simulator: "InfluenceSimulator",
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
) -> Tensor:
    """Mean trajectory of recorded runs, the usual reference of effects.

    Args:
        runs: recorded runs or their folders.
        simulator: tells the tests.
        tests: ids of the columns; all of the simulator by default.
        metric: one of the simulated ones; the first by default.

    Returns:
        (T+1, M) float32, T that of the longest run; NaN where nothing was measured.

    Raises:
        ValueError: if there are no runs; also as `read_run`.
    """
    tables = [read_run(run, simulator, tests, metric).values for run in runs]
    if not tables:
        raise ValueError("runs: there are none to take the mean of; name the folder of recorded runs")
    longest = max(len(table) for table in tables if table is not None)
    padded = [_extended(table, longest) for table in tables if table is not None]
    return torch.stack(padded).double().nanmean(0).float()


def _extended(table: Tensor, length: int) -> Tensor:
    """Rows of NaN after a table, up to a length."""
    return torch.cat([table, table.new_full((length - len(table), table.shape[1]), torch.nan)])


def read_curriculum(
    path: str | Path,
    simulator: "InfluenceSimulator",
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
) -> Recorded:
    """Read a curriculum from a recorded run or a file.

    Args:
        path: folder of a run; or a JSON file with a list of the ids of each step, or with an object of these `ids` and,
            where they are known, `lr` (a number, or one for each step) and `start`, values of all tests in the order of
            the simulator (of several metrics one after the other) or an object of them by test id. That is what
            `data.curricula` of `DynamicsData` reads too, but here it is a single one.
        simulator: tells the tests.
        tests: ids of the columns; all of the simulator by default.
        metric: one of the simulated ones; the first by default.

    Returns:
        The curriculum with what is known of it.

    Raises:
        ValueError: if the path holds neither, or something of another form.
    """
    path = Path(path)
    if path.is_dir():
        return read_run(path, simulator, tests, metric)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such run or file; name a recorded run, or a JSON file with lists of ids")
    try:
        content: Any = json.loads(path.read_text())
        if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
            content = content[0]
        content = content if isinstance(content, dict) else {"ids": content}
        ids = as_ids(content["ids"])
        lr = content.get("lr")
        rates = None if lr is None else torch.tensor(lr, dtype=torch.float32)
        start = content.get("start")
        start = None if start is None else _start(start, simulator, tests, metric)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing; it needs ids, and in start a value for every test") from None
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise ValueError(
            f"{path}: it holds no curriculum; write a list of the ids of each step, such as [[3, 1], [4, 1]], or an "
            "object with ids, lr and start, which has a value for every test"
        ) from None
    return Recorded(ids, rates, start, None, torch.arange(len(ids) + 1))


def _start(
    values: Any,  # noqa: ANN401
    simulator: "InfluenceSimulator",
    tests: Sequence[int] | Tensor | None,
    metric: str | None,
) -> Tensor:
    """Values (M,) of the tests of interest, from a list of all or an object."""
    columns = simulator.test_ids if tests is None else torch.as_tensor(tests)
    if isinstance(values, dict):
        known = {int(test): float(value) for test, value in values.items()}
        return torch.tensor([known[test] for test in columns.tolist()])
    metrics = simulator.config.metrics
    table = torch.tensor(values, dtype=torch.float32).reshape(len(metrics), len(simulator.test_ids))
    return table[0 if metric is None else metrics.index(metric), simulator.test_rows(columns)]
