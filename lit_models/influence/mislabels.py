"""Examples whose labels are likely to be wrong, by scores that simulators, gradients or losses give them.

Shapes: N pool examples, M tests. The greater a score, the sooner an example should be looked at.
Sources: GPTfluence (arXiv 2404.07840, section 4.6), TracIn (arXiv 2002.08484).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lit_models.influence import counterfactual, tracin
from lit_models.influence.counterfactual import Goal
from lit_models.influence.metrics import INSPECTED, MislabelDetection

if TYPE_CHECKING:
    from lit_models.influence.checkpoints import Checkpoint
    from lit_models.influence.gradients import PerSampleGradients
    from lit_models.influence.modeling import InfluenceSimulator

Score = Literal["self_alpha", "mean_effect", "tracin_self", "train_loss"]


def self_alpha(
    simulator: "InfluenceSimulator", train_features: Tensor | None = None, metric: str | None = None
) -> Tensor:
    """Factor of an example's own value, its features on both sides, summed over the history.

    Where both sides go through the same network, this is a scaled squared length, which is large for examples that move
    much; with gradients as features it finds wrong labels well, with others less so.

    Args:
        simulator: a trained one with shared networks.
        train_features: (N', D) of other examples; the own pool by default.
        metric: one of the simulated ones; the first by default.

    Returns:
        (N,) float32, in the order of `simulator.train_ids`.

    Raises:
        ValueError: if the networks of both sides differ, since training then says nothing about these factors.
    """
    if not simulator.config.is_shared:
        raise ValueError(
            f"score: self_alpha needs networks that pool and tests share, and those of {simulator.config.kind} were "
            "never trained on an example with itself; set model.simulator.kind to feat_shared, or take mean_effect"
        )
    with torch.no_grad():
        return simulator.self_influence(train_features, metric).A.sum(0)


def mean_effect(
    simulator: "InfluenceSimulator",
    reference: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
    goal: Goal = "min",
) -> Tensor:
    """Harm that an example does to tests with right labels; see `counterfactual.mean_effects`.

    Args:
        simulator: a trained one.
        reference: (T+1, M) or (M,), usual values of the tests.
        tests: ids of tests with right labels; all by default.
        metric: one of the simulated ones; the first by default.
        goal: whether the metric should be small or large.

    Returns:
        (N,) float32, in the order of `simulator.train_ids`.
    """
    effects = counterfactual.mean_effects(simulator, reference, tests, metric).mean(1)
    return -effects if counterfactual.is_max(goal) else effects


def suspicion(
    score: Score,
    simulator: "InfluenceSimulator | None" = None,
    reference: Tensor | None = None,
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
    goal: Goal = "min",
    source: "PerSampleGradients | None" = None,
    checkpoints: "Iterable[Checkpoint] | None" = None,
    lrs: Iterable[float] | Tensor | None = None,
    examples: Any = None,  # noqa: ANN401
    losses: Tensor | None = None,
) -> Tensor:
    """Score the pool by one of four methods.

    Args:
        score: "self_alpha" needs `simulator`; "mean_effect" needs `simulator` and `reference`; "tracin_self", the
            squared length of gradients over checkpoints, needs `source`, `checkpoints`, `lrs` and `examples`;
            "train_loss" needs `losses`.
        simulator: a trained one.
        reference: (T+1, M) or (M,), usual values of the tests.
        tests: ids of tests with right labels; all by default.
        metric: one of the simulated ones; the first by default.
        goal: whether the metric should be small or large.
        source: computes gradients.
        checkpoints: of a run over the pool.
        lrs: learning rate at each of them.
        examples: the pool.
        losses: (N,) losses of the pool, such as those after one epoch.

    Returns:
        (N,) float32; of a simulator's scores, in the order of `simulator.train_ids`.

    Raises:
        ValueError: if there is no such score, or something that it needs is missing.
    """
    given = {
        "simulator": simulator,
        "reference": reference,
        "source": source,
        "checkpoints": checkpoints,
        "lrs": lrs,
        "examples": examples,
        "losses": losses,
    }
    needs: dict[str, tuple[str, ...]] = {
        "self_alpha": ("simulator",),
        "mean_effect": ("simulator", "reference"),
        "tracin_self": ("source", "checkpoints", "lrs", "examples"),
        "train_loss": ("losses",),
    }
    if score not in needs:
        raise ValueError(f"score: {score!r} is not one of {', '.join(get_args(Score))}")
    missing = [name for name in needs[score] if given[name] is None]
    if missing:
        raise ValueError(f"{missing[0]}: score {score} needs {', '.join(needs[score])}; give {missing[0]}")
    if score == "train_loss":
        assert losses is not None
        return losses.float()
    if score == "tracin_self":
        assert source is not None
        assert checkpoints is not None
        assert lrs is not None
        return tracin.tracin_self(source, checkpoints, lrs, examples)
    assert simulator is not None
    if score == "self_alpha":
        return self_alpha(simulator, metric=metric)
    assert reference is not None
    return mean_effect(simulator, reference, tests, metric, goal)


@dataclass(frozen=True)
class Inspection:
    """What is found by looking at examples in the order of their scores.

    Args:
        order: (N,) int64, rows of the examples, the most suspicious first.
        inspected: (N+1,) float64, part of the pool that was looked at, from 0 to 1.
        found: (N+1,) float64, part of the wrong labels among it.
        values: `auc`, and `found_10` and so on, the part of them among so many percent of the pool.
    """

    order: Tensor
    inspected: Tensor
    found: Tensor
    values: dict[str, float]


def inspect(scores: Tensor, is_flipped: Tensor, percents: Sequence[float] = INSPECTED) -> Inspection:
    """Look at examples from the greatest score on.

    Args:
        scores: (N,).
        is_flipped: (N,) bool or 0 and 1, whether the label is wrong.
        percents: parts of the pool, in (0, 1], to give the result for.

    Returns:
        The curve and its numbers.

    Raises:
        ValueError: if the lengths differ, a score is not a number, or labels are all right or all wrong.
    """
    flipped = is_flipped.bool().to(scores.device)
    if scores.shape != flipped.shape or scores.ndim != 1:
        raise ValueError(f"is_flipped has shape {tuple(flipped.shape)} for {tuple(scores.shape)} scores; give one each")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: that of example {int(scores.isnan().nonzero()[0])} is not a number; leave it out")
    if bool(flipped.all()) or not bool(flipped.any()):
        raise ValueError("is_flipped: all labels are alike, so there is nothing to tell apart; mark the wrong ones")
    meter = MislabelDetection(percents).to(scores.device)
    meter.update(scores, flipped)
    found, _ = meter.curve()
    values = {name: float(value) for name, value in meter.compute().items()}
    share = torch.arange(len(scores) + 1, dtype=torch.float64, device=scores.device) / len(scores)
    return Inspection(scores.argsort(descending=True, stable=True), share, found, values)
