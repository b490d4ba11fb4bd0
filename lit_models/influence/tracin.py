"""Influence of train examples by their gradients: TracIn-CP, Grad-Dot, Grad-Cos, self-influence, loss trajectories.

Shapes: N train examples, M test examples, C checkpoints, T optimizer steps, B examples of a step. Influence is positive
where training on an example lowers the loss of another.
Sources: TracIn (arXiv 2002.08484), GPTfluence (arXiv 2404.07840).
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lit_models.influence.checkpoints import Checkpoint
from lit_models.influence.gradients import PerSampleGradients

Reduction = Literal["mean", "sum"]
Scale = Literal["raw", "val", "oracle"]
FEW_RUNS = 4
"""With fewer validation runs the fitted scale of a trajectory says little; it can even come out negative."""


# -- scores ------------------------------------------------------------------------------------------------------------


def tracin_cp(
    source: PerSampleGradients,
    checkpoints: Iterable[Checkpoint],
    lrs: Iterable[float] | Tensor,
    train: Any,  # noqa: ANN401
    test: Any,  # noqa: ANN401
    aggregate: bool = False,
) -> Tensor:
    """Influence of train examples on test examples, summed over checkpoints; positive = lowers the loss.

    Args:
        source: computes the gradients.
        checkpoints: C checkpoints, of which one is in memory at a time where they are paths or functions.
        lrs: learning rate at each of them.
        train: N examples.
        test: M examples.
        aggregate: sum over the test examples before anything is compared, which needs memory for one gradient.

    Returns:
        (N, M) float32 on the CPU, or (N,) of the aggregate.

    Raises:
        ValueError: if there are no checkpoints, or not one learning rate for each.
    """
    train, test = source.examples(train), source.examples(test)
    return _over_checkpoints(
        checkpoints, lrs, lambda checkpoint: source.dots(train, test, checkpoint, aggregate=aggregate)
    )


def tracin_self(
    source: PerSampleGradients,
    checkpoints: Iterable[Checkpoint],
    lrs: Iterable[float] | Tensor,
    examples: Any,  # noqa: ANN401
) -> Tensor:
    """Influence of each example on itself: the squared norm of its gradient, summed over checkpoints.

    Args:
        source: computes the gradients.
        checkpoints: C checkpoints.
        lrs: learning rate at each of them.
        examples: N examples.

    Returns:
        (N,) float32 on the CPU; examples with a wrong label tend to have large values.
    """
    examples = source.examples(examples)
    return _over_checkpoints(checkpoints, lrs, lambda checkpoint: source.norms(examples, checkpoint).double().square())


def _over_checkpoints(
    checkpoints: Iterable[Checkpoint], lrs: Iterable[float] | Tensor, score: Callable[[Checkpoint], Tensor]
) -> Tensor:
    rates = [float(lr) for lr in lrs]
    total: Tensor | None = None
    number = 0
    for checkpoint in checkpoints:
        if number < len(rates):
            value = rates[number] * score(checkpoint)
            total = value if total is None else total + value
        number += 1
    if total is None or number != len(rates):
        raise ValueError(f"lrs: {len(rates)} learning rates for {number} checkpoints; give one for each")
    return total.float()


def grad_dot(
    source: PerSampleGradients,
    train: Any,  # noqa: ANN401
    test: Any,  # noqa: ANN401
    checkpoint: Checkpoint = None,
    aggregate: bool = False,
) -> Tensor:
    """Inner products of gradients at one checkpoint, usually the last.

    Args:
        source: computes the gradients.
        train: N examples.
        test: M examples.
        checkpoint: None takes the weights of the model.
        aggregate: sum over the test examples.

    Returns:
        (N, M) float32 on the CPU, or (N,) of the aggregate.
    """
    return source.dots(train, test, checkpoint, aggregate=aggregate).float()


def grad_cos(
    source: PerSampleGradients,
    train: Any,  # noqa: ANN401
    test: Any,  # noqa: ANN401
    checkpoint: Checkpoint = None,
    aggregate: bool = False,
) -> Tensor:
    """Cosines between gradients at one checkpoint.

    Args:
        source: computes the gradients.
        train: N examples.
        test: M examples.
        checkpoint: None takes the weights of the model.
        aggregate: sum over the test examples.

    Returns:
        (N, M) float32 on the CPU, 0 where a gradient is 0; or (N,) of the aggregate.
    """
    return source.dots(train, test, checkpoint, normalize=True, aggregate=aggregate).float()


# -- trajectories ------------------------------------------------------------------------------------------------------


def checkpoint_of_step(total: int, saved_at: Sequence[int]) -> list[int]:
    """Checkpoint that each step is computed with: the latest one that was saved before it.

    Args:
        total: T.
        saved_at: steps after which the C checkpoints were saved, ascending; 0 is before training.

    Returns:
        Index of the checkpoint for the steps 1 to T; the gradients of step t belong to the weights after t-1.

    Raises:
        ValueError: if there is none before the first step.
    """
    if not saved_at or saved_at[0] != 0 or any(a >= b for a, b in pairwise(saved_at)):
        raise ValueError(
            f"saved_at: checkpoints must ascend and begin at step 0, before training, got {list(saved_at)[:5]}; "
            "save the start of the run as well"
        )
    return [sum(step <= t for step in saved_at) - 1 for t in range(total)]


def trajectory_influence(
    source: PerSampleGradients,
    checkpoints: Sequence[Checkpoint],
    saved_at: Sequence[int],
    ids: Tensor | Sequence[Sequence[int]],
    lrs: Sequence[float] | Tensor,
    train: Any,  # noqa: ANN401
    test: Any,  # noqa: ANN401
    reduction: Reduction = "mean",
) -> Tensor:
    """What the gradients say about the loss that each step of a run takes away.

    Only the gradients of examples that the run uses at a checkpoint are computed, beside those of the tests. Grad-Dot
    is this with the last checkpoint alone, said to be saved at 0.

    Args:
        source: computes the gradients.
        checkpoints: C checkpoints, of the run itself or of another one.
        saved_at: steps after which they were saved, ascending from 0; with all of 0 to T-1 each step has its own.
        ids: rows of `train` that each of the T steps uses, (T, B) int64 with -1 for none, or a list of lists.
        lrs: (T,) learning rate of each step.
        train: N examples.
        test: M examples.
        reduction: whether the trained loss was the mean over the examples of a step, or their sum.

    Returns:
        (T, M) float32: the decrease of the loss from the start to after each step.

    Raises:
        ValueError: if the lengths don't fit or an id is not a row of `train`.
    """
    train, test = source.examples(train), source.examples(test)
    steps = [[int(row) for row in step if int(row) != -1] for step in ids]
    if len(steps) != len(lrs) or len(checkpoints) != len(saved_at):
        raise ValueError(
            f"lrs and saved_at must have an entry for each of {len(steps)} steps and {len(checkpoints)} checkpoints, "
            f"got {len(lrs)} and {len(saved_at)}"
        )
    if bad := [row for step in steps for row in step if not 0 <= row < len(train)]:
        raise ValueError(f"ids: {bad[0]} is not a row of the {len(train)} train examples; map ids to rows first")
    effect = torch.zeros(len(steps), len(test), dtype=torch.float64)
    places = checkpoint_of_step(len(steps), saved_at)
    for number, checkpoint in enumerate(checkpoints):
        own = [t for t, place in enumerate(places) if place == number]
        used = sorted({row for t in own for row in steps[t]})
        if not used:
            continue
        column = {row: place for place, row in enumerate(used)}
        counts = torch.zeros(len(own), len(used), dtype=torch.float64)
        for line, t in enumerate(own):
            share = float(lrs[t]) / (len(steps[t]) if reduction == "mean" else 1)
            for row in steps[t]:
                counts[line, column[row]] += share
        effect[own] = counts @ source.dots(train.subset(used), test, checkpoint)
    return effect.cumsum(0).float()


def predict_trajectory(start: Tensor, influence: Tensor, scale: float = 1.0) -> Tensor:
    """Losses that the gradients predict.

    Args:
        start: (M,) loss before training.
        influence: (T, M), see `trajectory_influence`.
        scale: factor of the influence.

    Returns:
        (T+1, M) float32; row 0 is the start.
    """
    return torch.cat([start[None], start - scale * influence.to(start)]).float()


def fit_scale(runs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Least-squares factor between what gradients say and what was measured.

    Args:
        runs: for each run its (T, M) influence and its (T+1, M) losses, NaN where one wasn't measured.

    Returns:
        sum(I d) / sum(I^2) over all runs, steps and tests, where d is the first loss minus a later one.

    Raises:
        ValueError: if nothing was measured or all influence is 0.
    """
    product = square = 0.0
    for influence, losses in runs:
        decrease = (losses[0] - losses[1:]).double()
        known = ~decrease.isnan()
        product += float((influence.double() * decrease)[known].sum())
        square += float(influence.double().square()[known].sum())
    if square == 0.0:
        raise ValueError("scale: there is no measured influence to fit it to; give runs, or set scale to raw")
    return product / square


def trajectory_scale(
    scale: Scale,
    validation: Sequence[tuple[Tensor, Tensor]] = (),
    tested: Sequence[tuple[Tensor, Tensor]] = (),
) -> float:
    """Factor of the influence in a predicted trajectory.

    Args:
        scale: `raw` takes 1, `val` fits it on the validation runs. `oracle` fits it on the very runs that are
            evaluated, as the released code does; its results are no forecast and must say so.
        validation: influence and losses of each validation run, see `fit_scale`.
        tested: the same of the runs that are evaluated.

    Returns:
        The factor.
    """
    if scale == "raw":
        return 1.0
    if scale == "val":
        if 0 < len(validation) < FEW_RUNS:
            warnings.warn(
                f"scale: {len(validation)} validation runs say little about the scale; record at least {FEW_RUNS}",
                stacklevel=2,
            )
        return fit_scale(validation)
    if scale == "oracle":
        return fit_scale(tested)
    raise ValueError(f"scale: {scale!r} is not one of raw, val, oracle")


# -- cost --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a computation of scores takes, told before it starts.

    Args:
        gradients: gradients of single examples that are computed.
        numbers: numbers in each of them, P.
        memory: bytes of gradients, projection included, that are in memory at a time; activations come on top.
        cache: bytes that `cache_dir` would grow by, 0 without one.
        multiplications: of the inner products and of the projection.
        seconds: by the time that one batch took; None where none was timed.
    """

    gradients: int
    numbers: int
    memory: int
    cache: int
    multiplications: int
    seconds: float | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.gradients} gradients of {self.numbers:,} numbers",
            f"{self.memory / 1e9:.2f} GB in memory",
            f"{self.cache / 1e9:.2f} GB on disk",
            f"{self.multiplications:.1e} multiplications between them",
        ]
        return ", ".join(parts + ([] if self.seconds is None else [f"about {self.seconds:.0f} s"]))


def estimate(
    source: PerSampleGradients,
    checkpoints: int,
    train: Any,  # noqa: ANN401
    test: Any = None,  # noqa: ANN401
    aggregate: bool = False,
    timed: bool = False,
) -> Cost:
    """Tell what `tracin_cp` would take, or `tracin_self` without test examples, without doing it.

    Args:
        source: would compute the gradients.
        checkpoints: C.
        train: N examples.
        test: M examples.
        aggregate: as for `tracin_cp`.
        timed: compute the gradients of one batch, twice, and take its time for all.

    Returns:
        The cost, as if nothing were in the cache yet.
    """
    train = source.examples(train)
    options, chunk = source.options, source.chunk
    n, m = len(train), len(source.examples(test)) if test is not None else 0
    rows, transposed, gradients = source.plan(n, m)
    held = min(rows, n if transposed else m)
    if aggregate or not m:
        gradients, held = n + m, min(m, 1)
    pairs = n * (1 if aggregate else max(m, 1))
    projection = source.size * source.width if options.proj_dim is not None else 0
    memory = held * source.width + min(chunk, max(n, m)) * source.size
    memory += projection if projection <= options.max_grad_elements else 0
    seconds: float | None = None
    if timed:
        weights, some = source.load(), train.order()[len(train) // 2 :][:chunk]
        source.compute(weights, train, some)
        start = time.perf_counter()
        source.compute(weights, train, some)
        seconds = (time.perf_counter() - start) / len(some) * checkpoints * gradients
    return Cost(
        gradients=checkpoints * gradients,
        numbers=source.size,
        memory=4 * memory,
        cache=4 * checkpoints * (n + m) * source.width if options.cache_dir is not None else 0,
        multiplications=checkpoints * (pairs * source.width + gradients * projection),
        seconds=seconds,
    )
