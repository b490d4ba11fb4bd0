"""A CSV log that survives restarts."""

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class AppendingCSVLogger(Logger):
    """Writes `metrics.csv` and `hparams.yaml`; a resumed run goes on in the same file.

    Rows from the first step of the resumed run on are dropped, so that no step appears twice. Lightning's own logger
    deletes what was there.

    Args:
        save_dir: folder of the files.
        flush_every: rows kept in memory before they are written.

    Note:
        A new column rewrites the file once; a row costs constant time otherwise.

    Example::

        Trainer(logger=AppendingCSVLogger("runs/mine"))
    """

    def __init__(self, save_dir: str, flush_every: int = 20) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self.flush_every = flush_every
        self._columns: list[str] | None = None
        self._pending: list[dict[str, float]] = []

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
        return self._folder / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write plain hyperparameters to `hparams.yaml`."""
        values = vars(params) if isinstance(params, Namespace) else dict(params)
        plain = {
            name: value if isinstance(value, (int, float, str, bool, list, dict)) else str(value)
            for name, value in values.items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "hparams.yaml").write_text(yaml.safe_dump(plain, default_flow_style=False))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; values logged for the same step as the row before are joined to it."""
        row = {"step": float(step or 0), **{name: float(value) for name, value in metrics.items()}}
        if self._pending and self._pending[-1]["step"] == row["step"]:
            self._pending[-1].update(row)
            return
        if len(self._pending) >= self.flush_every:
            self.save()
        self._pending.append(row)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows kept in memory."""
        if not self._pending:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._columns is None:
            self._continue(self._pending[0]["step"])
        assert self._columns is not None
        new = [name for row in self._pending for name in row if name not in self._columns]
        if new:
            self._rewrite(list(dict.fromkeys([*self._columns, *new])), self._read())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerows([_written(row) for row in self._pending])
        self._pending.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _continue(self, step: float) -> None:
        """Take over an earlier file up to the step that is logged next."""
        rows = [row for row in self._read() if float(row["step"]) < step]
        columns = list(rows[0]) if rows else ["step"]
        self._rewrite(columns, rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        draft = self.path.with_suffix(".part")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)
        self._columns = columns


def _written(row: dict[str, float]) -> dict[str, float | int]:
    return {name: int(value) if name in ("step", "epoch") else value for name, value in row.items()}
