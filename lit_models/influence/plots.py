"""Pictures of what simulators say, each with its numbers in the caption.

The caption is also kept in the PNG file, as its description.
Shapes: K runs, T steps, M tests, N pool examples.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_models.influence.counterfactual import Change, Ranking
from lit_models.influence.metrics import TrajectoryErrors, spearman, trajectory_errors
from lit_models.influence.mislabels import Inspection

TRUE, SIMULATED, OTHER, REFERENCE = "#222222", "#1f77b4", "#d95f02", "#999999"
TEXT_WIDTH = 60
"""Characters of a text beside a bar."""


# -- trajectories ------------------------------------------------------------------------------------------------------


def trajectory_caption(prediction: Tensor, truth: Tensor, given: int = 1) -> str:
    """How well trajectories are simulated, over all tests and steps.

    Args:
        prediction: (T+1, M) or (K, T+1, M).
        truth: of the same shape, NaN where not measured.
        given: values at the start that were not predicted.

    Returns:
        Mean squared error of all steps and rank correlation over tests at the last one.
    """
    meter = TrajectoryErrors(given)
    shape = (-1, *prediction.shape[-2:])
    meter.update(prediction.cpu().reshape(shape), truth.cpu().reshape(shape))
    values = meter.compute()
    tests = prediction.shape[-1]
    return (
        f"all-steps MSE {float(values['all_steps_mse']):.4g}, final-step Spearman "
        f"{float(values['final_spearman']):.3f}, over {tests} tests"
    )


def spread_tests(prediction: Tensor, truth: Tensor | None, count: int, given: int = 1) -> list[int]:
    """Columns to show, from the best simulated test to the worst one, in even steps.

    Args:
        prediction: (T+1, M).
        truth: (T+1, M), NaN where not measured; without it tests are ordered by how much they change.
        count: number of columns.
        given: values at the start that were not predicted.

    Returns:
        At most `count` different columns.
    """
    if truth is None:
        score = (prediction[-1] - prediction[0]).double()
    else:
        score = trajectory_errors(prediction[None], truth[None], given).mse[0]
    order = score.nan_to_num(nan=torch.inf).argsort().tolist()
    places = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long().tolist()
    return [order[place] for place in places]


def plot_trajectories(
    prediction: Tensor,
    truth: Tensor | None,
    tests: Sequence[int] | Tensor,
    path: str | Path,
    metric: str = "loss",
    title: str | None = None,
    shown: int = 6,
    given: int = 1,
    steps: Tensor | None = None,
) -> Path:
    """Draw simulated and true curves of a few tests, from the best simulated one to the worst.

    Args:
        prediction: (T+1, M).
        truth: (T+1, M), NaN where not measured; None where nobody knows it.
        tests: (M,) ids.
        path: PNG to write.
        metric: its name.
        title: heading.
        shown: number of tests.
        given: values at the start that were not predicted.
        steps: (T+1,) number of the step of each value; from 0 by default.

    Returns:
        The path.

    Raises:
        ValueError: if there are no tests.
    """
    prediction, truth = prediction.detach().cpu(), None if truth is None else truth.cpu()
    names = [int(test) for test in tests]
    if not names:
        raise ValueError("tests: there are none to draw; name some")
    columns = spread_tests(prediction, truth, shown, given)
    wide = min(3, len(columns))
    figure = _figure(3.4 * wide, 2.5 * -(-len(columns) // wide) + 0.5)
    steps = torch.arange(len(prediction)) if steps is None else steps
    for place, column in enumerate(columns):
        axes = _axes(figure, -(-len(columns) // wide), wide, place + 1)
        label = f"test {names[column]}"
        if truth is not None:
            known = truth[:, column].isfinite()
            dots = "." if int(known.sum()) < len(steps) else None
            axes.plot(steps[known], truth[known, column], color=TRUE, lw=1.6, marker=dots, label="recorded")
            error = trajectory_errors(prediction[None, :, column, None], truth[None, :, column, None], given).mse
            label += f", MSE {float(error):.2g}"
        axes.plot(steps, prediction[:, column], color=SIMULATED, lw=1.4, ls="--", label="simulated")
        axes.set_title(label, fontsize=9)
        if place % wide == 0:
            axes.set_ylabel(metric, fontsize=8)
        if place >= len(columns) - wide:
            axes.set_xlabel("step", fontsize=8)
        if place == 0 and truth is not None:
            axes.legend(fontsize=8, frameon=False)
    if truth is None:
        start, end = float(prediction[0].mean()), float(prediction[-1].mean())
        caption = (
            f"mean over {len(names)} tests: {start:.4g} at the start, {end:.4g} simulated at step {int(steps[-1])}"
        )
    else:
        caption = trajectory_caption(prediction, truth, given)
    return _save(figure, path, title, caption)


# -- other curricula ---------------------------------------------------------------------------------------------------


def change_caption(change: Change, truth: Change | None = None) -> str:
    """What another curriculum changes in the end, on average over tests.

    Args:
        change: simulated.
        truth: what training said, if anyone tried.

    Returns:
        The mean difference; with the truth also its mean and the rank correlation of the differences over tests.
    """
    simulated = change.difference
    text = f"mean change in the end: {float(simulated.mean()):+.4g} simulated"
    if truth is None:
        return f"{text}, over {len(simulated)} tests"
    true = truth.difference.to(simulated.device)
    rho = float(spearman(simulated, true))
    return (
        f"{text}, {float(true.nanmean()):+.4g} retrained; Spearman of the changes {rho:.3f} over {len(simulated)} tests"
    )


def plot_change(
    change: Change,
    path: str | Path,
    truth: Change | None = None,
    metric: str = "loss",
    title: str | None = None,
    names: tuple[str, str] = ("as it was", "changed"),
    steps: Tensor | None = None,
) -> Path:
    """Draw the mean over tests of both curricula, and the change of every test.

    Args:
        change: simulated.
        path: PNG to write.
        truth: what training said, NaN where not measured; None where nobody tried.
        metric: its name.
        title: heading.
        names: of the two curricula.
        steps: number of the step of each value; from 0 by default.

    Returns:
        The path.
    """
    figure = _figure(9.2, 3.7)
    axes = _axes(figure, 1, 2, 1)
    parts = ((change, "simulated", "--"), (truth, "trained", "-"))
    for part, kind, line in parts:
        if part is None:
            continue
        after = part.after.reshape(-1, *part.after.shape[-2:]).mean(0)
        for values, name, colour in ((part.before, names[0], SIMULATED), (after, names[1], OTHER)):
            mean = values.detach().cpu().nanmean(1)
            known = mean.isfinite()
            places = torch.arange(len(mean)) if steps is None or len(steps) != len(mean) else steps
            axes.plot(places[known], mean[known], color=colour, ls=line, lw=1.5, label=f"{name}, {kind}")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(f"{metric}, mean over tests", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes = _axes(figure, 1, 2, 2)
    simulated = change.difference.detach().cpu()
    if truth is None:
        axes.bar(range(len(simulated)), sorted(simulated.tolist()), color=OTHER, width=1.0)
        axes.set_xlabel("tests, sorted", fontsize=8)
        axes.set_ylabel(f"simulated change of the final {metric}", fontsize=8)
    else:
        true = truth.difference.detach().cpu()
        axes.scatter(true, simulated, s=12, color=OTHER, alpha=0.7, lw=0)
        known = torch.cat([true[true.isfinite()], simulated])
        low, high = float(known.min()), float(known.max())
        axes.plot([low, high], [low, high], color=REFERENCE, lw=1, ls=":")
        axes.set_xlabel(f"true change of the final {metric}", fontsize=8)
        axes.set_ylabel("simulated change", fontsize=8)
    return _save(figure, path, title, change_caption(change, truth))


def plot_ranking(
    ranking: Ranking,
    path: str | Path,
    texts: Mapping[int, str] | None = None,
    count: int = 8,
    title: str | None = None,
    what: str = "effect of one occurrence, the most helpful on top",
) -> Path:
    """Draw the numbers of the first and of the last examples of a ranking.

    Args:
        ranking: the most helpful first.
        path: PNG to write.
        texts: texts by id.
        count: examples of either end.
        title: heading.
        what: what the numbers are.

    Returns:
        The path.

    Raises:
        ValueError: if there are no examples.
    """
    number = len(ranking.ids)
    if not number:
        raise ValueError("ranking: there are no examples to draw; rank some")
    rows = sorted({*range(min(count, number)), *range(max(0, number - count), number)})
    ids, effects = ranking.ids[rows].tolist(), ranking.effects[rows].tolist()
    figure = _figure(9.2 if texts else 6.0, 0.24 * len(rows) + 1.3)
    axes = _axes(figure, 1, 1, 1)
    axes.barh(range(len(rows)), effects, color=[SIMULATED if effect < 0 else OTHER for effect in effects])
    axes.margins(y=0.02)
    axes.grid(False, axis="y")
    labels = [f"{example}" + (f"  {_short(texts.get(example, ''))}" if texts else "") for example in ids]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=TRUE, lw=0.8)
    caption = (
        f"{what}: {len(rows)} of {number} examples, from {float(ranking.effects[0]):+.3g} "
        f"to {float(ranking.effects[-1]):+.3g}"
    )
    return _save(figure, path, title, caption)


# -- wrong labels ------------------------------------------------------------------------------------------------------


def inspection_caption(curves: Mapping[str, Inspection]) -> str:
    """Area under the ROC curve of every score, and what is found at 40% where that is known."""
    parts = []
    for name, curve in curves.items():
        found = curve.values.get("found_40")
        parts.append(
            f"{name}: AUC {curve.values['auc']:.3f}" + ("" if found is None else f", {found:.0%} found at 40%")
        )
    return "; ".join(parts)


def plot_inspection(
    curves: Mapping[str, Inspection],
    path: str | Path,
    accuracies: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    title: str | None = None,
) -> Path:
    """Draw which part of the wrong labels is found by looking at a part of the pool.

    Args:
        curves: by score.
        path: PNG to write.
        accuracies: by score, (part inspected and put right, accuracy after training again), for a second panel.
        title: heading.

    Returns:
        The path.

    Raises:
        ValueError: if there are no curves.
    """
    if not curves:
        raise ValueError("curves: there are none to draw; inspect the pool by some score")
    panels = 2 if accuracies else 1
    figure = _figure(4.6 * panels, 3.9 + 0.2 * len(curves))
    axes = _axes(figure, 1, panels, 1)
    for name, curve in curves.items():
        axes.plot(curve.inspected.cpu(), curve.found.cpu(), lw=1.6, label=name)
    axes.plot([0, 1], [0, 1], color=REFERENCE, lw=1, ls=":", label="by chance")
    axes.set_xlabel("part of the pool inspected", fontsize=8)
    axes.set_ylabel("part of the wrong labels found", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    if accuracies:
        axes = _axes(figure, 1, 2, 2)
        for name, points in accuracies.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.4, label=name)
        axes.set_xlabel("part of the pool inspected and put right", fontsize=8)
        axes.set_ylabel("accuracy after training again", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path, title, inspection_caption(curves).replace("; ", "\n"))


# -- figures -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:  # noqa: ANN401
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Any, rows: int, columns: int, place: int) -> Any:  # noqa: ANN401
    axes = figure.add_subplot(rows, columns, place)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(figure: Any, path: str | Path, title: str | None, caption: str) -> Path:  # noqa: ANN401
    """Write a figure under another name and move it into place."""
    if title:
        figure.suptitle(title, fontsize=11)
    figure.supxlabel(caption, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=120, metadata={"Description": caption})
    os.replace(draft, path)
    return path


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # a pair of dollar signs would be set as mathematics
    return text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 1]}…"
