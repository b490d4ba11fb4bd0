"""Texts worth reading: samples during training, predictions on disk."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger

Row = dict[str, Any]


def markdown_table(rows: list[Row]) -> str:
    """A Markdown table of rows that share their keys."""
    names = list(rows[0])

    def cell(value: object) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(rows: list[Row], title: str) -> None:
    """Print rows that share their keys."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:  # as Text, since samples may hold what looks like markup
        table.add_row(*(Text(f"{value:.3f}" if isinstance(value, float) else str(value)) for value in row.values()))
    Console().print(table)


def remove_later(folder: Path, name: re.Pattern[str], step: int) -> None:
    """Remove what was written after the step that a run goes on from; at step 0 everything.

    Args:
        folder: where to look; it need not exist.
        name: of files or folders that are meant; its first group is the step.
        step: the last one to keep.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = name.fullmatch(path.name)
        if match and (step == 0 or int(match[1]) > step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class SampleTable(Callback):
    """Appends rows of the module's `samples()` to a JSONL file and to TensorBoard.

    Args:
        every_n_steps: batches between two tables.
        num_rows: rows of each table.
        filename: name of the JSONL file in the run's folder; each line holds `step`, the `split` ("train" or
            "val") that the row is of, and the row.
        print_rows: also print each table.

    Note:
        A resumed run removes the lines after the step it resumes from, so that no step appears twice.

    Example::

        Trainer(callbacks=[SampleTable(every_n_steps=10)])
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        num_rows: int = 4,
        filename: str = "samples.jsonl",
        print_rows: bool = False,
    ) -> None:
        if every_n_steps < 1 or num_rows < 1:
            raise ValueError(
                f"callbacks.SampleTable: every_n_steps and num_rows must be at least 1, "
                f"got {every_n_steps} and {num_rows}"
            )
        self.every_n_steps, self.num_rows, self.filename = every_n_steps, num_rows, filename
        self.print_rows = print_rows
        self._batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines of steps that will be run again."""
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            # Split at "\n" alone, as texts may hold U+2028; what follows the last one was cut off by a kill.
            lines = path.read_bytes().split(b"\n")[:-1] if trainer.global_step > 0 else []
            path.write_bytes(b"".join(b"%s\n" % row for row in lines if json.loads(row)["step"] <= trainer.global_step))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Write a table every `every_n_steps` batches."""
        self._batches += 1
        if self._batches % self.every_n_steps == 0:
            self._write(trainer, pl_module, "train")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a table of the newest validation batch, while training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def state_dict(self) -> dict[str, int]:
        """The number of batches seen."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of batches seen."""
        self._batches = state_dict["batches"]

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / self.filename

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        samples: Any = pl_module.samples
        # Where networks are sharded, no process can use them alone.
        asked = trainer.is_global_zero or pl_module.device_mesh is not None
        rows: list[Row] = samples()[: self.num_rows] if asked else []
        self._write_rows(trainer, [{"step": trainer.global_step, "split": split, **row} for row in rows], split)

    def _write_rows(self, trainer: Trainer, rows: list[Row], tag: str = "") -> None:
        """Append rows to the file, and show them where that is wanted, without what is the same for all of them."""
        path = self._path(trainer)  # on all ranks, since log_dir is broadcast
        if not rows or not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        shown = [{name: value for name, value in row.items() if name not in ("step", "split")} for row in rows]
        if self.print_rows:
            print_table(shown, ", ".join(filter(None, [f"step {trainer.global_step}", tag])))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                name = "/".join(filter(None, [Path(self.filename).stem, tag]))
                logger.experiment.add_text(name, markdown_table(shown), trainer.global_step)


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns as JSON lines, one file per process.

    Args:
        filename: name in the run's folder; with several processes the rank is put before its ending.

    Note:
        `predict_step` must return a list of dicts, or a dict of equally long lists and tensors.

    Example::

        Trainer(callbacks=[PredictionWriter()])
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty file."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch."""
        with self._path(trainer).open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in as_rows(prediction))

    def _path(self, trainer: Trainer) -> Path:
        path = Path(trainer.default_root_dir) / self.filename
        return path if trainer.world_size == 1 else path.with_suffix(f".{trainer.global_rank}{path.suffix}")


def as_rows(prediction: Any) -> list[Row]:  # noqa: ANN401
    """Rows of a batch of predictions, given as rows or as columns."""
    if isinstance(prediction, list):
        return prediction
    columns = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in prediction.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
