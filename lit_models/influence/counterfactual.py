"""What a simulator says about runs that never took place: other curricula, examples left out, ranked or chosen.

Shapes: N pool examples, M tests, K curricula, T steps, b places of a batch, n the order. A curriculum is (T, b) int64,
pool ids of each step with -1 where a batch has no further example, or lists of ids of any lengths. `start` holds the
values (M,) before its first step, or the last k ones (k, M), the oldest first; `lr` the learning rate of every step,
(T,), or one for all. Columns are the tests asked for, by default all in the order of the simulator; of several metrics
one is looked at. An effect is a change of the metric, so that of a loss is negative where an example helps. Results are
float32 and lie on the device of the simulator.

Examples that the simulator was not trained on join it with their features (`InfluenceSimulator.with_examples`), and are
then asked about like all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lit_models.influence import functional
from lit_models.influence.configuration import SimulatorConfig, clamps
from lit_models.influence.curricula import Curriculum, as_ids
from lit_models.influence.curricula import leave_out as leave_out
from lit_models.influence.curricula import stack as stack
from lit_models.influence.functional import Factors

if TYPE_CHECKING:
    from lit_models.influence.modeling import InfluenceSimulator

Rates: TypeAlias = Tensor | Sequence[float] | float | None
Goal = Literal["min", "max"]


# -- simulations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def simulate(
    simulator: "InfluenceSimulator",
    curriculum: Curriculum,
    start: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    lr: Rates = None,
    metric: str | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Simulate one curriculum, or several at once.

    Args:
        simulator: a trained one.
        curriculum: (T, b) or lists, or (K, T, b) of several.
        start: (M,) or (k, M), see above; for several curricula (M,), (K, M) or (K, k, M).
        tests: ids of the columns; all by default.
        lr: learning rates, (T,) or one number; also (K, T) for several. Simulators without `lr_scaling` don't need it.
        metric: one of the simulated ones; the first by default.
        lengths: (K,) int64, steps of each of several curricula. After its last one a trajectory stays as it is.

    Returns:
        (T+1, M), the start first; for several curricula (K, T+1, M).

    Raises:
        ValueError: if an id is unknown, shapes don't fit, learning rates are missing, or a value is not finite.
    """
    ids = as_ids(curriculum).to(simulator.device)
    factors, rows = simulator.occurring(ids, _tests(simulator, tests))
    return _rollout(simulator, rows, start, factors, tests, lr, metric, lengths)


@dataclass(frozen=True)
class Change:
    """What another curriculum changes.

    Args:
        before: (T+1, M), trajectory of the curriculum as it was.
        after: (T'+1, M) of the other one, or (K, T'+1, M) of several, such as draws of substitutes.
    """

    before: Tensor
    after: Tensor

    @property
    def difference(self) -> Tensor:
        """(M,) what the metric is more in the end, averaged over the other curricula."""
        return (self.after[..., -1, :] - self.before[-1]).reshape(-1, self.before.shape[1]).mean(0)


def what_if(
    simulator: "InfluenceSimulator",
    curriculum: Curriculum,
    changed: Curriculum,
    start: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    lr: Rates = None,
    metric: str | None = None,
    changed_lr: Rates = None,
) -> Change:
    """Simulate a curriculum as it was and as it might have been.

    Args:
        simulator: a trained one.
        curriculum: (T, b) or lists.
        changed: (T', b') or lists, such as `leave_out` gives; or (K, T', b') of several.
        start: (M,) or (k, M).
        tests: ids of the columns; all by default.
        lr: learning rates of the curriculum.
        metric: one of the simulated ones; the first by default.
        changed_lr: those of the other one; the same by default.

    Returns:
        Both trajectories, and the difference in the end.

    Raises:
        ValueError: as `simulate`; also if a simulator without identity offset is asked about smaller batches.
    """
    ids, others = as_ids(curriculum), as_ids(changed)
    if not simulator.config.identity_offset:
        sizes = (ids >= 0).sum(-1)
        if not bool(torch.isin((others >= 0).sum(-1), sizes).all()):
            raise ValueError(_needs_offset("mode: a batch of another size", "or keep the size with mode replace"))
    before = simulate(simulator, ids, start, tests, lr, metric)
    after = simulate(simulator, others, start, tests, lr if changed_lr is None else changed_lr, metric)
    return Change(before, after)


def _needs_offset(what: str, otherwise: str) -> str:
    return (
        f"{what} means nothing to a simulator without identity_offset, whose values follow the number of examples; "
        f"train one with model.simulator.identity_offset 1, {otherwise}"
    )


# -- effects of single examples ----------------------------------------------------------------------------------------


@torch.no_grad()
def mean_effects(
    simulator: "InfluenceSimulator",
    reference: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
) -> Tensor:
    """What one more occurrence of each pool example changes where runs usually are, at the reference learning rate.

    That is e = A·φ̄ + B, with φ̄ the mean of the reference over its steps; without identity offset, less the share φ̄/B of
    the value that an example of a batch of B carries over.

    Args:
        simulator: a trained one.
        reference: (T+1, M), such as the mean trajectory of the training runs, NaN where not measured; or (M,).
        tests: ids of the columns; all by default.
        metric: one of the simulated ones; the first by default.

    Returns:
        (N, M), the pool in the order of `simulator.train_ids`.

    Raises:
        ValueError: if the reference has other columns than the tests or no value for one of them.
    """
    factors = _whole_pool(simulator, tests, metric)
    mean = reference.to(factors.B.device).double().reshape(-1, reference.shape[-1]).nanmean(0).float()
    _fits("reference", mean, factors)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"reference: column {int((~mean.isfinite()).nonzero()[0])} has no finite value; leave it out")
    config = simulator.config
    share = 0.0
    if not config.identity_offset:
        if config.batch_reference is None:
            raise ValueError("batch_reference: effects without identity_offset need the batch size; set it")
        share = 1 / config.batch_reference
    return (factors.A.sum(0) - share) * mean + factors.B


def trajectory_effects(
    simulator: "InfluenceSimulator",
    curriculum: Curriculum,
    start: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    lr: Rates = None,
    metric: str | None = None,
) -> Tensor:
    """What one more occurrence of each pool example at each step changes in the end of one run.

    That is the gradient of the last value, averaged over tests, with regard to the number of times that a step uses an
    example: one backward pass gives all of them.

    Args:
        simulator: a trained one with identity offset.
        curriculum: (T, b) or lists.
        start: (M,) or (k, M).
        tests: ids of the tests to average over; all by default.
        lr: learning rates.
        metric: one of the simulated ones; the first by default.

    Returns:
        (T, N), the pool in the order of `simulator.train_ids`. Times `occurrences`, it tells to first order what the
        examples of the run did.

    Raises:
        ValueError: as `simulate`; also if the simulator has no identity offset.
    """
    if not simulator.config.identity_offset:
        raise ValueError(_needs_offset("trajectory_effects: one more example", "or ask for mean_effects"))
    with torch.no_grad():
        factors, _ = simulator.occurring(simulator.train_ids, _tests(simulator, tests))
    counts = occurrences(simulator, curriculum).requires_grad_()
    with torch.enable_grad():
        final = _rollout(simulator, counts, start, factors, tests, lr, metric)[-1].mean()
        (gradient,) = torch.autograd.grad(final, counts)
    return gradient


def occurrences(simulator: "InfluenceSimulator", curriculum: Curriculum) -> Tensor:
    """How often each step uses each example: (T, b) or lists -> (T, N) float32, in the order of `train_ids`."""
    rows = simulator.train_rows(as_ids(curriculum).to(simulator.device))
    return functional.counts(rows, len(simulator.train_ids))


# -- ranking and selection ---------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """Pool examples by what they do, the most helpful first.

    Args:
        ids: (N,) int64.
        effects: (N,) float32, change of the metric.
    """

    ids: Tensor
    effects: Tensor


def sort_effects(ids: Tensor, effects: Tensor, goal: Goal = "min") -> Ranking:
    """Sort examples by their effects.

    Args:
        ids: (N,) int64.
        effects: (N,).
        goal: whether the metric should be small, such as a loss, or large ("max").

    Returns:
        The ranking; of equal effects, the earlier example first.

    Raises:
        ValueError: if there is no such goal.
    """
    order = effects.argsort(descending=is_max(goal), stable=True)
    return Ranking(ids[order], effects[order])


def rank(
    simulator: "InfluenceSimulator",
    reference: Tensor,
    tests: Sequence[int] | Tensor | None = None,
    pool: Sequence[int] | Tensor | None = None,
    metric: str | None = None,
    goal: Goal = "min",
) -> Ranking:
    """Rank pool examples by their mean effect on the tests of interest.

    Args:
        simulator: a trained one.
        reference: see `mean_effects`; its columns are the tests.
        tests: ids of the tests of interest; all by default.
        pool: ids to rank; the whole pool by default, unseen examples included.
        metric: one of the simulated ones; the first by default.
        goal: whether the metric should be small or large.

    Returns:
        The ranking.

    Raises:
        ValueError: as `mean_effects`; also if an id is unknown.
    """
    ids, effects = simulator.train_ids, mean_effects(simulator, reference, tests, metric).mean(1)
    if pool is not None:
        rows = simulator.train_rows(torch.as_tensor(pool, device=ids.device))
        ids, effects = ids[rows], effects[rows]
    return sort_effects(ids, effects, goal)


class Pruned(NamedTuple):
    """A pool that was made smaller.

    Args:
        kept: ids in ascending order.
        dropped: ids, the most harmful first.
    """

    kept: Tensor
    dropped: Tensor


def prune(ranking: Ranking, fraction: float) -> Pruned:
    """Drop the most harmful examples.

    Args:
        ranking: of the pool.
        fraction: part of it to drop, from 0 to 1, rounded to whole examples.

    Returns:
        What is kept and what is dropped.

    Raises:
        ValueError: if the fraction is out of range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    number = len(ranking.ids) - round(fraction * len(ranking.ids))
    return Pruned(ranking.ids[:number].sort().values, ranking.ids[number:].flip(0))


class Selection(NamedTuple):
    """A curriculum that was made up.

    Args:
        ids: (T, b) int64.
        trajectory: (T+1, M) what is simulated for it.
    """

    ids: Tensor
    trajectory: Tensor


@torch.no_grad()
def select_batches(
    simulator: "InfluenceSimulator",
    start: Tensor,
    steps: int,
    batch_size: int,
    tests: Sequence[int] | Tensor | None = None,
    pool: Sequence[int] | Tensor | None = None,
    lr: Rates = None,
    metric: str | None = None,
    goal: Goal = "min",
    uses: int | None = 1,
) -> Selection:
    """Choose batch by batch what brings the mean over tests nearest to the goal after the next step.

    As effects within a batch add up, the best batch are the examples with the best effects at the present values.

    Args:
        simulator: a trained one with identity offset.
        start: (M,) or (k, M).
        steps: T.
        batch_size: b, examples of a batch, all different.
        tests: ids of the tests; all by default.
        pool: ids to choose from; the whole pool by default, unseen examples included.
        lr: learning rates.
        metric: one of the simulated ones; the first by default.
        goal: whether the metric should become small or large.
        uses: how often an example may be used in all; None for any number.

    Returns:
        The curriculum and its simulated trajectory.

    Raises:
        ValueError: if the pool is too small, or the simulator has no identity offset.
    """
    if not simulator.config.identity_offset:
        raise ValueError(_needs_offset("select_batches: the effect of an example", "or ask for mean_effects"))
    factors = _whole_pool(simulator, tests, metric)
    ids = simulator.train_ids
    chosen = torch.arange(len(ids), device=ids.device)
    if pool is not None:
        chosen = simulator.train_rows(torch.as_tensor(pool, device=ids.device)).unique()
    left = torch.full((len(chosen),), steps if uses is None else uses, device=ids.device)
    if batch_size < 1 or steps * batch_size > int(left.clamp(max=steps).sum()):
        limit = "any number of times" if uses is None else f"at most {uses} times each"
        raise ValueError(
            f"pool: {len(chosen)} examples, {limit}, do not fill {steps} batches of {batch_size} different ones; raise "
            "uses, or make fewer or smaller batches"
        )
    A, B = factors.A[:, chosen], factors.B[chosen]
    values = _window(simulator, start, factors)
    places = torch.zeros(steps, batch_size, dtype=torch.int64, device=ids.device)
    scale = simulator.scale(places, _lr_scale(simulator.config, lr, (steps,), ids.device))
    low, high = _bounds(simulator.config, metric)
    batches, trajectory = [], [values[-1]]
    best = torch.inf if is_max(goal) else -torch.inf
    for step in range(steps):
        effects = (torch.einsum("kim,km->im", A, values) + B).mean(1).masked_fill(left == 0, -best)
        _reserve(effects, left, steps - step, batch_size, best)
        rows = effects.topk(batch_size, largest=is_max(goal)).indices.sort().values
        left[rows] -= 1
        alpha, beta = A[:, rows].sum(1), B[rows].sum(0)
        value = functional.step(values, alpha, beta, 1.0, None if scale is None else scale[step]).clamp(low, high)
        batches.append(ids[chosen[rows]])
        trajectory.append(value)
        values = torch.cat([values[1:], value[None]])
    return Selection(torch.stack(batches), torch.stack(trajectory))


def _reserve(effects: Tensor, left: Tensor, steps: int, batch_size: int, best: float) -> None:
    """Give the best effect to examples that must be used now so that all later batches can be filled.

    Those that could be used in every step to come lose a use by being passed over; only so many uses are to spare.
    """
    always = left >= steps
    spare = int(left.clamp(max=steps).sum()) - steps * batch_size
    needed = int(always.sum()) - spare
    if needed > 0:
        candidates = effects.masked_fill(~always, -best)
        effects[candidates.topk(needed, largest=best > 0).indices] = best


# -- shapes and names --------------------------------------------------------------------------------------------------


def is_max(goal: Goal) -> bool:
    """Whether large values of the metric are wanted.

    Raises:
        ValueError: if there is no such goal.
    """
    if goal not in ("min", "max"):
        raise ValueError(f"goal must be min or max, got {goal!r}")
    return goal == "max"


def _number(config: SimulatorConfig, metric: str | None) -> int:
    """Number of a metric; the first one by default."""
    if metric is None:
        return 0
    if metric not in config.metrics:
        raise ValueError(f"metric: {metric!r} is not simulated; take one of {', '.join(config.metrics)}")
    return config.metrics.index(metric)


def _tests(simulator: "InfluenceSimulator", tests: Sequence[int] | Tensor | None) -> Tensor | None:
    return None if tests is None else torch.as_tensor(tests, device=simulator.device)


def _one_metric(config: SimulatorConfig, factors: Factors, metric: str | None) -> Factors:
    """Factors of all tests for one of the metrics."""
    number = _number(config, metric)
    A, B = (part.unflatten(-1, (len(config.metrics), -1))[..., number, :] for part in factors)
    return Factors(A, B)


def _whole_pool(simulator: "InfluenceSimulator", tests: Sequence[int] | Tensor | None, metric: str | None) -> Factors:
    """Factors of all pool examples, in the order of the simulator, for one metric."""
    factors, _ = simulator.occurring(simulator.train_ids, _tests(simulator, tests))
    return _one_metric(simulator.config, factors, metric)


def _bounds(config: SimulatorConfig, metric: str | None) -> tuple[float, float]:
    """Least and greatest value of one metric, which may be infinite."""
    name = config.metrics[_number(config, metric)]
    low, high = clamps(config.clamp, config.metrics)[name]
    return -torch.inf if low is None else low, torch.inf if high is None else high


def _fits(name: str, values: Tensor, factors: Factors) -> None:
    if values.shape[-1] != factors.B.shape[1]:
        raise ValueError(
            f"{name} has {values.shape[-1]} columns for {factors.B.shape[1]} tests; give one for each, in their order"
        )


def _window(simulator: "InfluenceSimulator", start: Tensor, factors: Factors) -> Tensor:
    """The values (n, M) before the first step of one curriculum."""
    start = start.to(factors.B.device).float()
    _fits("start", start, factors)
    return simulator.history(start if start.ndim == 2 else start[None])


def _lr_scale(config: SimulatorConfig, lr: Rates, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Learning rates over the reference rate, in the shape of the steps; None where they don't matter."""
    if not config.lr_scaling:
        return None
    if lr is None:
        raise ValueError(
            "lr: the simulator scales effects by the learning rate; give that of every step, or one for all"
        )
    if not config.lr_reference:
        raise ValueError("lr_reference: the simulator does not know the rate whose factor is 1; set it in its config")
    rates = torch.as_tensor(lr, dtype=torch.float32, device=device)
    if rates.ndim and rates.shape[-1] != shape[-1]:
        raise ValueError(f"lr has {rates.shape[-1]} rates for {shape[-1]} steps; give one for each")
    if not bool(rates.isfinite().all()):
        raise ValueError("lr holds a rate that is no finite number; give that of every step")
    return (rates / config.lr_reference).expand(shape)


def _rollout(
    simulator: "InfluenceSimulator",
    rows: Tensor,
    start: Tensor,
    factors: Factors,
    tests: Sequence[int] | Tensor | None,
    lr: Rates,
    metric: str | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Trajectories of rows of `factors`, (T, b) or (K, T, b), or of counts, for one metric of a table of all."""
    config, device = simulator.config, rows.device
    single = rows.ndim == 2
    factors = _one_metric(config, factors, metric)
    start = start.to(device).float()
    _fits("start", start, factors)
    if single:
        rows, start = rows[None], start[None]
    elif start.ndim == 1:
        start = start.expand(len(rows), -1)
    bounds = _bounds(config, metric)
    ids = simulator.test_ids if tests is None else _tests(simulator, tests)
    assert ids is not None
    prediction = functional.rollout(
        start,
        rows,
        *factors,
        scale=simulator.scale(rows, _lr_scale(config, lr, tuple(rows.shape[:2]), device)),
        offset=config.identity_offset,
        clamp=None if bounds == (-torch.inf, torch.inf) else bounds,
        history_pad=config.history_pad,
        lengths=None if lengths is None else lengths.to(device),
        tests=ids.tolist(),
    )
    return prediction[0] if single else prediction
