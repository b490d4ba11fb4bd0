"""Results as tables with one observation per row, which are kept as Parquet files.

Shapes: K runs, T steps, M tests, N pool examples. A table is a dict of columns of one length.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_models.influence.counterfactual import Change, Pruned, Ranking
from lit_models.recording import write_atomically

Columns: TypeAlias = dict[str, NDArray[Any]]


def trajectory_table(
    values: Tensor,
    tests: Sequence[int] | Tensor,
    metric: str = "loss",
    runs: Sequence[str] | None = None,
    lengths: Tensor | None = None,
    steps: Tensor | None = None,
) -> Columns:
    """Trajectories of tests.

    Args:
        values: (K, T+1, M), or (T+1, M) of one run.
        tests: (M,) ids.
        metric: name of the column with the values.
        runs: names of the runs, for a column `run`; none by default.
        lengths: (K,) steps of each run; T by default.
        steps: (T+1,) number of the step of each value; from 0 by default.

    Returns:
        Columns `run` if there are names, `step`, `test_id` and the metric.
    """
    table = _array(values).reshape(-1, *values.shape[-2:])
    number, length = table.shape[:2]
    run, step, test = np.meshgrid(np.arange(number), np.arange(length), _array(tests), indexing="ij")
    last = np.full(number, length - 1) if lengths is None else _array(lengths)
    labels = np.arange(length) if steps is None else _array(steps)
    there = step <= last[:, None, None]
    named = {} if runs is None else {"run": np.asarray(list(runs))[run[there]]}
    return {**named, "step": labels[step[there]], "test_id": test[there], metric: table[there]}


def change_table(change: Change, tests: Sequence[int] | Tensor) -> Columns:
    """What another curriculum changes in the end.

    Args:
        change: such as `what_if` gives.
        tests: (M,) ids.

    Returns:
        Columns `test_id`, `before`, `after` and `difference`, the latter two averaged over several curricula.
    """
    before, difference = change.before[-1], change.difference
    return {
        "test_id": _array(tests),
        "before": _array(before),
        "after": _array(before + difference),
        "difference": _array(difference),
    }


def ranking_table(ranking: Ranking, pruned: Pruned | None = None, texts: Mapping[int, str] | None = None) -> Columns:
    """Ranked pool examples.

    Args:
        ranking: the most helpful first.
        pruned: what was dropped of them, for a column `kept`.
        texts: texts by id, for a column `text`.

    Returns:
        Columns `rank` from 1, `id`, `effect`, and those asked for.
    """
    ids = _array(ranking.ids)
    columns: Columns = {"rank": np.arange(1, len(ids) + 1), "id": ids, "effect": _array(ranking.effects)}
    if pruned is not None:
        columns["kept"] = np.isin(ids, _array(pruned.kept))
    if texts is not None:
        columns["text"] = np.array([texts.get(example, "") for example in ids.tolist()], dtype=object)
    return columns


def write_table(path: str | Path, columns: Mapping[str, Any]) -> Path:
    """Write a Parquet file.

    Args:
        path: the file; an earlier one is replaced when the new one is whole.
        columns: tensors, arrays or lists of one length.

    Returns:
        The path.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: if the columns differ in length.
    """
    arrow, parquet = _pyarrow()
    arrays = {name: _array(values) for name, values in columns.items()}
    if len({len(values) for values in arrays.values()}) > 1:
        raise ValueError(f"{path}: columns differ in length; give every row a value in each")
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({name: arrow.array(values) for name, values in arrays.items()}), buffer)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def read_table(path: str | Path) -> Columns:
    """Read a Parquet file.

    Args:
        path: the file.

    Returns:
        Its columns.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    _, parquet = _pyarrow()
    table = parquet.read_table(Path(path))
    return {name: table[name].to_numpy() for name in table.column_names}


def _array(values: Any) -> NDArray[Any]:  # noqa: ANN401
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow; install it with `pip install pyarrow`") from error
    return pyarrow, pyarrow.parquet
