"""Learning curves as a picture."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

History = dict[str, list[tuple[int, float]]]


def plot_curves(runs: Mapping[str, Any], path: str | Path, title: str | None = None, columns: int = 3) -> Path:
    """Draw metrics over steps as small panels.

    Args:
        runs: metric -> [(step, value), ...]; or run -> that, to draw several runs over each other.
        path: PNG to write; replaced in one move.
        title: heading.
        columns: panels per row.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named: dict[str, History] = (
        dict(runs) if all(isinstance(run, Mapping) for run in runs.values()) else {"": dict(runs)}
    )
    metrics = list(dict.fromkeys(metric for run in named.values() for metric in run))
    if not metrics:
        raise ValueError(
            "there are no logged values to draw; check callbacks.LearningCurves.metrics against the logged names"
        )
    columns = min(columns, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, panel + 1)
        for name, history in named.items():
            points = history.get(metric, [])
            mark = "o" if len(points) < 3 else None
            axes.plot(
                [step for step, _ in points], [value for _, value in points], label=name or None, marker=mark, lw=1.4
            )
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(named) > 1 and panel == 0:
            axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=120)
    os.replace(draft, path)
    return path


class LearningCurves(Callback):
    """Keeps logged metrics by step and draws them as a PNG.

    Args:
        metrics: names to draw; all that were logged by default.
        filename: name of the picture in the run's folder.
        every_n_steps: batches between two pictures; only at the end by default.

    Note:
        The history is part of the checkpoint, so a resumed run draws whole curves.

    Example::

        Trainer(callbacks=[LearningCurves(["score/mean", "kl/ref"])])
    """

    def __init__(
        self, metrics: list[str] | None = None, filename: str = "curves.png", every_n_steps: int | None = None
    ) -> None:
        self.metrics, self.filename, self.every_n_steps = metrics, filename, every_n_steps
        self.history: History = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Keep the newest values."""
        if trainer.is_global_zero:
            self._keep(trainer)
            if self.every_n_steps and (batch_idx + 1) % self.every_n_steps == 0:
                self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep values of validation."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        if trainer.is_global_zero:
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": {name: [list(point) for point in points] for name, points in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = {
            name: [(step, value) for step, value in points] for name, points in state_dict["history"].items()
        }

    def _keep(self, trainer: Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            if self.metrics is not None and name not in self.metrics:
                continue
            points = self.history.setdefault(name, [])
            if not points or points[-1][1] != float(value):  # a metric keeps its value until it is logged again
                points.append((trainer.global_step, float(value)))

    def _draw(self, trainer: Trainer) -> None:
        if self.history:
            plot_curves(self.history, Path(trainer.log_dir or trainer.default_root_dir) / self.filename)
