"""A run as tables for other programs."""

from pathlib import Path

import numpy as np

from lit_models.recording.files import OPTIONAL
from lit_models.recording.reader import DynamicsRun


def write_parquet(run: DynamicsRun, folder: str | Path) -> tuple[Path, Path]:
    """Write a run as two tables.

    Args:
        run: the run.
        folder: where to; it is made.

    Returns:
        `steps.parquet` with `run_id`, `step`, `ids`, `lr`, `skipped` (and `train_loss`, `grad_norm` where recorded),
        and `values.parquet` with `run_id`, `step`, `test_id` and a column per metric, null where not measured.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow; install it with `pip install pyarrow`") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = run.ids
    columns = {
        "run_id": pa.array([run.run_id] * len(run.steps), pa.string()),
        "step": pa.array(run.steps),
        "ids": pa.ListArray.from_arrays(pa.array(ids.offsets, pa.int32()), pa.array(ids.values)),
        "lr": pa.array(list(run.lr), pa.list_(pa.float32())),
        "skipped": pa.array(run.skipped),
    }
    for key in OPTIONAL:
        row = run._optional(key)
        if row is not None:
            columns[key] = pa.array(row)
    steps = folder / "steps.parquet"
    pq.write_table(pa.table(columns), steps)
    records, tests = len(run.rec_step), len(run.test_ids)
    table = {
        "run_id": pa.array([run.run_id] * (records * tests), pa.string()),
        "step": pa.array(np.repeat(run.rec_step, tests)),
        "test_id": pa.array(np.tile(run.test_ids, records)),
    }
    for metric in run.metrics:
        table[metric] = pa.array(run.values(metric).reshape(-1), mask=~run.measured(metric).reshape(-1))
    values = folder / "values.parquet"
    pq.write_table(pa.table(table), values)
    return steps, values
