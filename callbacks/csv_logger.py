"""A CSV log that survives restarts."""

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

Row = dict[str, Any]
WHOLE_NUMBERS = ("step", "epoch")


class AppendingCSVLogger(Logger):
    """Writes `metrics.csv`, one row per step, and `hparams.yaml`; a resumed run goes on in the same file.

    Rows after the step that a resumed run logs first are dropped, so that no step appears twice. A run that starts
    anew begins a new file. Lightning's own logger deletes what was there in either case.

    Args:
        save_dir: folder of the files.
        flush_every: rows kept in memory before they are written; all are written with every checkpoint and at the end.

    Note:
        A new column rewrites the file once; a row costs constant time otherwise. A process that only evaluates knows
        no step, so it writes `test.csv` or `validate.csv` and leaves `metrics.csv` alone.

    Example::

        Trainer(logger=AppendingCSVLogger("runs/mine"))
    """

    def __init__(self, save_dir: str, flush_every: int = 20) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._file = "metrics.csv"
        self.flush_every = flush_every
        self._begin(None)

    def _begin(self, fresh: Trainer | None) -> None:
        self._fresh = fresh  # a trainer at its first step, which may yet resume
        self._columns: list[str] | None = None  # of the file, once it was opened
        self._rows: list[Row] = []  # to be written; the last one still takes values of its step
        self._end = 0  # bytes of the file that need not be written again

    @property
    def name(self) -> str:
        """Empty: the folder is `save_dir` itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the folder is `save_dir` itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the files."""
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """Folder of the files."""
        return str(self._folder)

    @property
    def path(self) -> Path:
        """The CSV file."""
        return self._folder / self._file

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write plain hyperparameters to `hparams.yaml`."""
        values = vars(params) if isinstance(params, Namespace) else dict(params)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "hparams.yaml").write_text(yaml.safe_dump(_plain(values), default_flow_style=False))

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Tensor | None = None) -> None:  # type: ignore[override]
        """Choose the file, since this is where a logger meets the trainer, before anything is logged."""
        trainer = model.trainer
        fits = trainer.state.fn == "fit"
        if self._columns is not None and not fits:
            return  # an evaluation after training knows its step
        self.flush()
        self._file = "metrics.csv" if fits or trainer.state.fn is None else f"{trainer.state.fn.value}.csv"
        self._begin(trainer if fits and trainer.global_step == 0 else None)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = step or 0
        if self._columns is None:
            self._open(step)
        if not self._rows or int(self._rows[-1]["step"]) != step:
            self._rows.append({"step": step})
        for name, value in metrics.items():
            self._rows[-1][name] = int(value) if name in WHOLE_NUMBERS else float(value)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows kept in memory, if they are many; the trainer calls this after every value."""
        if len(self._rows) > self.flush_every:
            self.flush()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Write all rows, since a run resumed from this checkpoint won't log them again."""
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write all rows; the last one is written again when its step gets more values."""
        if not self._rows:
            return
        assert self._columns is not None
        new = [name for row in self._rows for name in row if name not in self._columns]
        if new:
            with self.path.open("r+") as file:
                file.truncate(self._end)
            self._rewrite(list(dict.fromkeys([*self._columns, *new])), self._read())
        with self.path.open("r+", newline="") as file:
            file.seek(self._end)
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writerows(self._rows[:-1])
            self._end = file.tell()
            writer.writerow(self._rows[-1])
            file.truncate()
        del self._rows[:-1]

    def _open(self, step: int) -> None:
        """Take over an earlier file up to the step that is logged first."""
        self._folder.mkdir(parents=True, exist_ok=True)
        anew = self._fresh is not None and not self._fresh.ckpt_path
        rows = [] if anew else [row for row in self._read() if int(row["step"]) <= step]
        if rows and int(rows[-1]["step"]) == step:
            self._rows.append({name: value for name, value in rows.pop().items() if value != ""})
        self._rewrite(list(rows[0]) if rows else ["step"], rows)

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if None not in row.values()]  # a killed process may leave half a row

    def _rewrite(self, columns: list[str], rows: list[Row]) -> None:
        draft = self.path.with_suffix(".part")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)
        self._columns = columns
        self._end = self.path.stat().st_size


def _plain(value: Any) -> Any:  # noqa: ANN401
    """What YAML can hold of a hyperparameter; other objects by their text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
