"""Learning curves as a picture."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

History = dict[str, list[tuple[int, float]]]
SMOOTHED = 60  # points from which on a running mean is drawn over the values


def plot_curves(
    runs: Mapping[str, Any],
    path: str | Path,
    title: str | None = None,
    columns: int = 3,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw metrics over steps as small panels.

    Args:
        runs: metric -> [(step, value), ...]; or run -> that, to draw several runs over each other.
        path: PNG to write; replaced in one move.
        title: heading.
        columns: panels per row.
        labels: metric -> heading of its panel; the metric's name by default.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
            _draw_line(axes, history.get(metric, []), name)
        axes.set_title((labels or {}).get(metric, metric), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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


def _draw_line(axes: Any, points: list[tuple[int, float]], name: str) -> None:  # noqa: ANN401
    """One run's values of a metric; many values also as their running mean."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    mark = "o" if len(points) < 3 else None
    if len(points) < SMOOTHED:
        axes.plot(steps, values, label=name or None, marker=mark, lw=1.4)
        return
    (line,) = axes.plot(steps, values, lw=0.8, alpha=0.3)
    means = running_mean(values, len(values) // 30)
    axes.plot(steps, means, label=name or None, color=line.get_color(), lw=1.6)


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and up to `width` values on both sides; values that are not finite are left out.

    Args:
        values: any number of them.
        width: neighbours on each side.

    Returns:
        As many means; NaN where no value is finite.
    """
    means = []
    for centre in range(len(values)):
        near = [value for value in values[max(0, centre - width) : centre + width + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


class LearningCurves(Callback):
    """Keeps logged metrics by optimizer step and draws them as a PNG.

    Values are kept as often as the trainer logs (`log_every_n_steps`), and after each validation and epoch.

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
        self._kept: dict[str, Tensor] = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Keep the newest values."""
        batches = trainer.fit_loop.total_batch_idx + 1
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
        if log_every and batches % log_every == 0:
            self._keep(trainer)
        if self.every_n_steps and batches % self.every_n_steps == 0:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep values of the epoch."""
        self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep values of validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture, also of a run that was killed after its last step and then resumed."""
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
            # Lightning holds the same tensor until the metric is logged again.
            if (self.metrics is not None and name not in self.metrics) or self._kept.get(name) is value:
                continue
            self._kept[name] = value
            points = self.history.setdefault(name, [])
            if points and points[-1][0] == trainer.global_step:
                points.pop()
            points.append((trainer.global_step, float(value)))

    def _draw(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on all ranks, since log_dir is broadcast
        if self.history and trainer.is_global_zero:
            plot_curves(self.history, folder / self.filename)
