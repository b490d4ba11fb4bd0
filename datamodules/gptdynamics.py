"""GPTDynamics: the released layout of recorded runs, read, converted from and converted to.

A run is a folder with `train_samples_id.json`, lines `{"step": 1, "samples_id": [..]}`, and for every metric
`all_METRIC_trajectory.out`, lines `{"id": 0, "loss_trajectory": [{"step": 1, "loss": 2.5}, ..]}`; the values are under
`loss` whatever the metric is. It holds neither learning rates nor skipped updates. Texts are JSON lines with `id`,
`input` (the whole text with its answer) and mostly `context` (without it).

Source: data and code of GPTfluence (arXiv 2404.07840), hub id `ernie-research/GPTDynamics`.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lit_models.recording import DynamicsRun, Ids, find_runs, read_lines, write_atomically, write_examples, write_run

SAMPLES = "train_samples_id.json"
TRAJECTORY = re.compile(r"all_(.+)_trajectory\.out")
LOSS = "loss"

Series: TypeAlias = dict[int, float]
"""Values by step."""


class Recorded(Protocol):
    """What a recorded run tells, in whichever layout it is kept; see `lit_models.recording.DynamicsRun`."""

    @property
    def folder(self) -> Path:
        """Where it is."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Facts, among them `pool_size` and `pool_fingerprint` where they are known."""

    @property
    def run_id(self) -> str:
        """Its name."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """[s], the optimizer steps."""

    @property
    def rec_step(self) -> NDArray[np.int64]:
        """[q], steps after which something was measured; 0 is before training."""

    @property
    def test_ids(self) -> NDArray[np.int64]:
        """[M]."""

    @property
    def ids(self) -> Ids:
        """Pool ids of each step."""

    @property
    def lr(self) -> NDArray[np.float32]:
        """[s,groups], learning rates; without columns where they are unknown."""

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """[s], steps whose update was left out."""

    def values(self, metric: str = LOSS) -> NDArray[np.float32]:
        """[q,M], NaN where not measured."""


@dataclass
class ReleasedRun:
    """A run in the released layout.

    The attributes are those of `lit_models.recording.DynamicsRun`.

    Args:
        folder: where it is.
        steps: int64 [s], 1 to s.
        ids: pool ids of each step.
        rec_step: int64 [q].
        test_ids: int64 [M], in the order of the files.
        tables: float32 [q,M] by metric.

    Example::

        run = ReleasedRun.open("runs/rte/output_rte_seed-1")
    """

    folder: Path
    steps: NDArray[np.int64]
    ids: Ids
    rec_step: NDArray[np.int64]
    test_ids: NDArray[np.int64]
    tables: dict[str, NDArray[np.float32]]

    @classmethod
    def open(cls, folder: str | Path) -> "ReleasedRun":
        """Read a run.

        Args:
            folder: the run.

        Returns:
            The run.

        Raises:
            ValueError: naming file and line or step, if a file is missing or not of this layout, a step is missing, a
                test occurs twice or a value belongs to no step.
        """
        folder = Path(folder)
        ids = _read_samples(folder / SAMPLES)
        found = {match[1]: path for path in folder.iterdir() if (match := TRAJECTORY.fullmatch(path.name))}
        if not found:
            raise ValueError(f"{folder} has no all_METRIC_trajectory.out; restore it from the released data")
        # The loss first, whose order of tests is the one of the run.
        series = {
            name: _read_trajectories(found[name], name) for name in sorted(found, key=lambda name: (name != LOSS, name))
        }
        tests = list(dict.fromkeys(test for rows in series.values() for test in rows))
        rec_step = sorted({step for rows in series.values() for row in rows.values() for step in row})
        if not rec_step or rec_step[-1] > len(ids) or rec_step[0] < 0:
            outside = rec_step[-1] if rec_step else 0
            raise ValueError(
                f"{folder}: values were measured at step {outside}, but {SAMPLES} has steps 1 to {len(ids)}; restore "
                "the file"
            )
        return cls(
            folder,
            np.arange(1, len(ids) + 1),
            ids,
            np.array(rec_step, np.int64),
            np.array(tests, np.int64),
            {name: _table(rows, tests, rec_step) for name, rows in series.items()},
        )

    @property
    def info(self) -> dict[str, Any]:
        """Facts; nothing is known of the pool."""
        return {"run_id": self.run_id, "pool_size": None, "pool_fingerprint": None}

    @property
    def run_id(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the loss first."""
        return tuple(self.tables)

    @functools.cached_property
    def lr(self) -> NDArray[np.float32]:
        """[s,0], since they are unknown."""
        return np.zeros((len(self.steps), 0), np.float32)

    @functools.cached_property
    def skipped(self) -> NDArray[np.bool_]:
        """[s], none, since they are unknown."""
        return np.zeros(len(self.steps), np.bool_)

    def values(self, metric: str = LOSS) -> NDArray[np.float32]:
        """A metric of all tests.

        Args:
            metric: one of `metrics`.

        Returns:
            Float32 [q,M], NaN where not measured.

        Raises:
            ValueError: if the run has no such metric.
        """
        if metric not in self.tables:
            raise ValueError(f"{self.folder}: there is no metric {metric!r}; there are {', '.join(self.tables)}")
        return self.tables[metric]


def is_released(folder: str | Path) -> bool:
    """Whether a folder is a run in the released layout."""
    return (Path(folder) / SAMPLES).is_file()


def find_released(folder: str | Path) -> list[Path]:
    """Folders of runs in the released layout.

    Args:
        folder: their parent, or a run itself.

    Returns:
        The folders, with the numbers in their names in numerical order.
    """
    folder = Path(folder)
    if is_released(folder):
        return [folder]
    return sorted((path.parent for path in folder.glob(f"*/{SAMPLES}")), key=lambda path: natural(path.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts the numbers in names in numerical order."""
    return [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"(\d+)", name)]


def repeated_steps(run: Recorded) -> NDArray[np.bool_]:
    """Steps that look like skipped updates: the losses of all tests are exactly those of the step before.

    Args:
        run: a run.

    Returns:
        Bool [s].
    """
    values, known = run.values(LOSS), ~np.isnan(run.values(LOSS))
    both = known[1:] & known[:-1]
    same = both.any(1) & (np.where(both, values[1:] == values[:-1], True)).all(1) & (np.diff(run.rec_step) == 1)
    return np.isin(run.steps, run.rec_step[1:][same])


def decaying_lr(steps: int, lr: float) -> NDArray[np.float32]:
    """Learning rates that fall linearly from the first step on and would be 0 after the last one, as in GPTDynamics.

    Args:
        steps: number of steps.
        lr: learning rate of the first step.

    Returns:
        Float32 [steps].
    """
    return (lr * (1 - np.arange(steps) / max(1, steps))).astype(np.float32)


def import_gptdynamics(
    folder: str | Path,
    out: str | Path,
    pool: str | Path | None = None,
    tests: str | Path | None = None,
    lr: float | None = None,
    infer_skipped: bool = False,
) -> list[Path]:
    """Convert released runs to the format of `lit_models.recording`.

    Args:
        folder: a run, or the parent of several.
        out: folder of the experiment to write; every run becomes a folder of its name in it.
        pool: released file with the texts of the pool, written to `pool.jsonl`.
        tests: released file with the texts of the tests, written to `tests.jsonl`.
        lr: learning rate of the first step, which falls linearly to 0; unknown by default.
        infer_skipped: mark steps after which all losses are exactly those before as skipped updates.

    Returns:
        Folders of the written runs.

    Raises:
        ValueError: if there are no runs, or one is broken or in the way.

    Example::

        import_gptdynamics("runs/rte", "rte", pool="rte_0_399_train.json", tests="rte_0_276_eval.json", lr=5e-7)
    """
    found, out = find_released(folder), Path(out)
    if not found:
        raise ValueError(f"{folder} holds no released run, since no folder in it has a {SAMPLES}; name their parent")
    facts: dict[str, Any] = {}
    if pool is not None:
        rows = read_texts(pool)
        facts = {"pool_size": len(rows), "pool_fingerprint": write_examples(out / "pool.jsonl", rows)}
        numbers = sorted(row["id"] for row in rows)
        if numbers != list(range(len(rows))):
            facts["pool_ids"] = numbers
    if tests is not None:
        write_examples(out / "tests.jsonl", read_texts(tests))
    written = []
    for path in found:
        run = ReleasedRun.open(path)
        rates = np.full((len(run.steps), 0), np.nan) if lr is None else decaying_lr(len(run.steps), lr)
        skipped = repeated_steps(run) if infer_skipped and LOSS in run.metrics else run.skipped
        info = {"test_ids": run.test_ids.tolist(), "source": "GPTDynamics", **facts}
        write_run(out / path.name, info, run.ids, rates, run.rec_step.tolist(), run.tables, skipped.tolist())
        written.append(out / path.name)
    return written


def export_gptdynamics(run: Recorded | str | Path, folder: str | Path, metrics: Sequence[str] | None = None) -> None:
    """Write a run in the released layout, which has no place for learning rates and skipped updates.

    Args:
        run: the run, or its folder.
        folder: where to; it is made.
        metrics: which ones; all by default.

    Raises:
        ValueError: if the run has no such metric.
    """
    folder = Path(folder)
    if isinstance(run, (str, Path)):
        run = open_run(run)
    tables = {name: run.values(name) for name in metrics or run.metrics}
    samples = [
        {"step": step, "samples_id": ids.tolist()} for step, ids in zip(run.steps.tolist(), run.ids, strict=True)
    ]
    _write_lines(folder / SAMPLES, samples)
    for name, table in tables.items():
        _write_lines(folder / f"all_{name}_trajectory.out", _trajectories(run, table))


def _trajectories(run: Recorded, table: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """One line for every test that was measured."""
    for test, column in zip(run.test_ids.tolist(), table.T, strict=True):
        known = ~np.isnan(column)
        pairs = zip(run.rec_step[known].tolist(), column[known].tolist(), strict=True)
        if known.any():
            yield {"id": test, "loss_trajectory": [{"step": step, LOSS: value} for step, value in pairs]}


def open_run(folder: str | Path) -> Recorded:
    """Open a run in either layout.

    Args:
        folder: the run.

    Returns:
        The run.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    return ReleasedRun.open(folder) if is_released(folder) else DynamicsRun.open(folder)


def find_all(folder: str | Path) -> list[Path]:
    """Folders of runs in either layout; see `find_released`."""
    return sorted([*find_runs(folder), *find_released(folder)], key=lambda path: natural(path.name))


def read_texts(path: str | Path) -> list[dict[str, Any]]:
    """Texts of a pool or of tests in the released form, as `lit_models.recording.write_examples` takes them.

    Args:
        path: JSON lines with `id`, `input` and mostly `context`.

    Returns:
        Rows with `id`, `text` and, where there is a context, `context` and `target`.

    Raises:
        ValueError: naming file and line, if a key is missing.
    """
    rows = []
    for number, line in _read_lines(Path(path)):
        if type(line.get("id")) is not int or not isinstance(line.get("input"), str):
            raise ValueError(f"{path}: line {number} needs an integer 'id' and an 'input'; it has {sorted(line)}")
        row = {"id": line["id"], "text": line["input"]}
        context = line.get("context")
        if isinstance(context, str):
            row["context"] = context
            if row["text"].startswith(context):
                row["target"] = row["text"][len(context) :]
        rows.append(row)
    return rows


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of the release, with the numbers of their lines."""
    return read_lines(path, "restore it from the released data", "restore the file from the released data")


def _write_lines(path: Path, rows: Sequence[Any] | Iterator[Any]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _get(row: Mapping[str, Any], key: str, is_right: Callable[[Any], bool], path: Path, number: int) -> Any:  # noqa: ANN401
    if key not in row or not is_right(row[key]):
        raise ValueError(f"{path}: line {number} has no right {key!r}; restore the file from the released data")
    return row[key]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_samples(path: Path) -> Ids:
    """Ids of each step; of lines with the same step, the last one counts, as in the released code."""
    rows: dict[int, list[int]] = {}
    for number, row in _read_lines(path):
        step = _get(row, "step", lambda value: type(value) is int, path, number)
        rows[step] = _get(
            row,
            "samples_id",
            lambda value: isinstance(value, list) and all(type(item) is int and item >= 0 for item in value),
            path,
            number,
        )
    missing = next((step for step in range(1, len(rows) + 1) if step not in rows), None)
    if missing is not None or not rows:
        raise ValueError(f"{path}: step {missing or 1} is missing; restore the file from the released data")
    return Ids.from_lists(rows[step] for step in range(1, len(rows) + 1))


def _read_trajectories(path: Path, metric: str) -> dict[int, Series]:
    """Values of each test by step."""
    rows: dict[int, Series] = {}
    for number, row in _read_lines(path):
        test = _get(row, "id", lambda value: type(value) is int, path, number)
        entries = _get(row, "loss_trajectory", lambda value: isinstance(value, list), path, number)
        if test in rows:
            raise ValueError(f"{path}: line {number} is a second one of test {test}; remove one of them")
        series: Series = {}
        for entry in entries:
            key = LOSS if LOSS in entry else metric
            step = _get(entry, "step", lambda value: type(value) is int, path, number)
            series[step] = _get(entry, key, _is_number, path, number)
        rows[test] = series
    return rows


def _table(rows: Mapping[int, Series], tests: Sequence[int], rec_step: Sequence[int]) -> NDArray[np.float32]:
    table = np.full((len(rec_step), len(tests)), np.nan, np.float32)
    places = {step: place for place, step in enumerate(rec_step)}
    columns = {test: column for column, test in enumerate(tests)}
    for test, series in rows.items():
        table[[places[step] for step in series], columns[test]] = list(series.values())
    return table
