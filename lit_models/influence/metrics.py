"""How well trajectories are simulated, wrong labels found and retrained subsets ranked.

Everything is computed in float64. What was not measured is NaN and does not count; predictions that are not finite
count as infinitely wrong.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

INSPECTED = (0.1, 0.2, 0.4)
"""Parts of the data of which `MislabelDetection` tells how many wrong labels they hold."""


# -- rank correlation --------------------------------------------------------------------------------------------------


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs.

    Args:
        values: (..., N), without NaN.

    Returns:
        (..., N) float64.
    """
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    return (below + torch.searchsorted(ordered, values, right=True) + 1).double() / 2


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation along the last axis, over places where both are numbers.

    Args:
        first: (..., N) in any floating dtype.
        second: (..., N) likewise.

    Returns:
        (...) float64; NaN where one of them is constant or fewer than two places are left.
    """
    flat_first, flat_second = (value.double().reshape(-1, value.shape[-1]) for value in (first, second))
    rows = [_spearman(a, b) for a, b in zip(flat_first, flat_second, strict=True)]
    return torch.stack(rows).reshape(first.shape[:-1]) if rows else first.new_zeros(first.shape[:-1]).double()


def _spearman(first: Tensor, second: Tensor) -> Tensor:
    both = ~(first.isnan() | second.isnan())
    ranks = average_ranks(torch.stack([first[both], second[both]]))
    centred = ranks - ranks.mean(1, keepdim=True)
    a, b = centred
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()  # 0/0 where one is constant


# -- trajectories ------------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Errors of each run and test, (K, M) float64, NaN where nothing was measured.

    Args:
        mse: mean over steps of (prediction - truth)².
        mae: mean over steps of |prediction - truth|.
        r2: 1 - squared error over the squared deviation from the curve's own mean; NaN for constant curves too.
    """

    mse: Tensor
    mae: Tensor
    r2: Tensor


def trajectory_errors(prediction: Tensor, truth: Tensor, given: int = 1) -> Errors:
    """Compare trajectories from the first predicted value on.

    Args:
        prediction: (K, T+1, M) in any floating dtype.
        truth: (K, T+1, M), NaN where not measured or after the end of a run.
        given: values at the start that were given and not predicted.

    Returns:
        Errors of each run and test.
    """
    prediction, truth = prediction[:, given:].double(), truth[:, given:].double()
    measured = truth.isfinite()
    count = measured.sum(1).double()
    errors = torch.where(measured, prediction - truth, 0.0).nan_to_num(nan=torch.inf)
    squares = errors.square().sum(1)
    mean = torch.where(measured, truth, 0.0).sum(1, keepdim=True) / count[:, None]
    spread = torch.where(measured, truth - mean, 0.0).square().sum(1)
    r2 = torch.where(spread > 0, 1 - squares / spread, torch.nan)
    return Errors(squares / count, errors.abs().sum(1) / count, r2)


def final_spearman(prediction: Tensor, truth: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Rank correlation over tests at the last step of each run.

    Args:
        prediction: (K, T+1, M).
        truth: (K, T+1, M), NaN where not measured.
        lengths: (K,) int64, steps of each run; T by default.

    Returns:
        (K,) float64, NaN where undefined, such as for constant values.
    """
    last = torch.full((len(truth),), truth.shape[1] - 1, device=truth.device) if lengths is None else lengths
    rows = torch.arange(len(truth), device=truth.device)
    return spearman(prediction[rows, last], truth[rows, last])


def persistence(start: Tensor, steps: int) -> Tensor:
    """The trivial prediction that nothing changes: (K, M) -> (K, T+1, M)."""
    return start[:, None].expand(-1, steps + 1, -1)


def mean_trajectory(runs: Tensor) -> Tensor:
    """Mean of recorded runs at each step, the other trivial prediction.

    Args:
        runs: (K, T+1, M), NaN where not measured or after the end of a run.

    Returns:
        (T+1, M) in the dtype of the runs; where no run was measured, the last value before.
    """
    mean = runs.double().nanmean(0)
    steps = torch.arange(len(mean), device=mean.device)[:, None]
    newest = torch.where(mean.isnan(), -1, steps).cummax(0).values
    filled = mean.gather(0, newest.clamp(min=0))
    return torch.where(newest >= 0, filled, torch.nan).to(runs.dtype)


class TrajectoryErrors(Metric):
    """Errors of simulated trajectories.

    The standard deviations are those of the population: over all runs and tests for errors, over runs for the rank
    correlation.

    Args:
        given: values at the start of a trajectory that were given and not predicted, and so do not count.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    mse: list[Tensor]
    mae: list[Tensor]
    r2: list[Tensor]
    rho: list[Tensor]

    def __init__(self, given: int = 1, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.given = given
        for name in ("mse", "mae", "r2", "rho"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Of what is summed up over ranks, also by one without any run."""
        return torch.float64

    def update(self, prediction: Tensor, truth: Tensor, lengths: Tensor | None = None) -> None:
        """Add runs.

        Args:
            prediction: (K, T+1, M) in any floating dtype, the start value first.
            truth: (K, T+1, M), NaN where not measured.
            lengths: (K,) int64, steps of each run; T by default.
        """
        if lengths is not None:
            steps = torch.arange(truth.shape[1], device=truth.device)
            truth = truth.masked_fill((steps > lengths[:, None])[..., None], torch.nan)
        errors = trajectory_errors(prediction, truth, self.given)
        measured = ~errors.mse.isnan()
        self.mse.append(errors.mse[measured])
        self.mae.append(errors.mae[measured])
        self.r2.append(errors.r2[measured])
        self.rho.append(final_spearman(prediction, truth, lengths))

    def compute(self) -> dict[str, Tensor]:
        """Each () float32, over all runs.

        Returns:
            `all_steps_mse` and `all_steps_mae`, means over runs and tests, with `_std`; `final_spearman`, mean over the
            runs for which it is defined, `final_spearman_std` if these are several, and the number
            `final_spearman_undefined` of the others; `curve_r2`, the median over curves that are not constant. What is
            defined nowhere is NaN.
        """
        mse, mae, r2, rho = (dim_zero_cat(getattr(self, name)) for name in ("mse", "mae", "r2", "rho"))
        values = {"all_steps_mse": mse.mean(), "all_steps_mse_std": mse.std(correction=0)}
        values |= {"all_steps_mae": mae.mean(), "all_steps_mae_std": mae.std(correction=0)}
        defined = rho[~rho.isnan()]
        values["final_spearman"] = defined.mean()
        if len(defined) > 1:
            values["final_spearman_std"] = defined.std(correction=0)
        values["final_spearman_undefined"] = (len(rho) - torch.tensor(len(defined))).to(rho)
        values["curve_r2"] = r2.nanmedian() if len(r2) else r2.mean()
        return {name: value.float() for name, value in values.items()}


# -- scores of gradient methods ----------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Least-squares scale of influence sums.

    Args:
        scale: () float64, Σ I·d / Σ I²; 0 where all influence is 0.
        residual: () float64, sum of squared errors that is left at this scale.
    """

    scale: Tensor
    residual: Tensor


def fit_scale(influence: Tensor, truth: Tensor) -> Scale:
    """Fit how much a unit of summed influence lowers a metric.

    Args:
        influence: (..., T, M), influence of all steps up to each one, summed.
        truth: (..., T+1, M), recorded values, NaN where not measured; d is the first one minus the later ones.

    Returns:
        The scale and what it leaves.
    """
    influence, truth = influence.double(), truth.double()
    drop = truth[..., :1, :] - truth[..., 1:, :]
    measured = drop.isfinite()
    influence, drop = torch.where(measured, influence, 0.0), torch.where(measured, drop, 0.0)
    square, product = influence.square().sum(), (influence * drop).sum()
    scale = torch.where(square > 0, product / square.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return Scale(scale, (drop - scale * influence).square().sum())


# -- wrong labels ------------------------------------------------------------------------------------------------------


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve by average ranks, so that ties count half.

    Args:
        scores: (N,), greater for what is thought to be positive.
        positive: (N,) bool.

    Returns:
        () float64; NaN without positives or without negatives.
    """
    ranks, count = average_ranks(scores.double()), positive.sum().double()
    return (ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count))


def roc(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """ROC points after each inspected example, in descending order of scores; ties in the order given.

    Args:
        scores: (N,).
        positive: (N,) bool.

    Returns:
        Share of the positives that are found, and share of the negatives that are inspected in vain, both (N+1,)
        float64 from 0 to 1.
    """
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    found, vain = (torch.cat([value.new_zeros(1), value.cumsum(0)]) for value in (hits, 1 - hits))
    return found / hits.sum(), vain / (1 - hits).sum()


def found_at(scores: Tensor, positive: Tensor, inspected: float) -> Tensor:
    """Share of the positives among the examples of greatest scores.

    Args:
        scores: (N,).
        positive: (N,) bool.
        inspected: part of the examples that is looked at, rounded to whole ones.

    Returns:
        () float64. Of a group of equal scores that is looked at in part, this part of its positives counts.
    """
    number = round(inspected * len(scores))
    ordered = scores.sort().values
    upper = torch.searchsorted(ordered, scores, right=True)
    equal = upper - torch.searchsorted(ordered, scores)
    share = ((number - (len(scores) - upper)) / equal).clamp(0, 1).double()
    return share[positive].sum() / positive.sum()


class MislabelDetection(Metric):
    """How well scores find examples with wrong labels.

    Args:
        inspected: parts of the examples, in (0, 1], of which to tell how many wrong labels they hold.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    scores: list[Tensor]
    is_noise: list[Tensor]

    def __init__(self, inspected: Sequence[float] = INSPECTED, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.inspected = tuple(inspected)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("is_noise", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_noise: Tensor) -> None:
        """Add examples.

        Args:
            scores: (N,), greater for what is suspected more.
            is_noise: (N,) bool or 0 and 1, whether the label is wrong.
        """
        self.scores.append(scores.double())
        self.is_noise.append(is_noise.bool())

    def compute(self) -> dict[str, Tensor]:
        """Each () float32: `auc`, and `found_10` and so on, the share found among so many percent."""
        scores, is_noise = dim_zero_cat(self.scores), dim_zero_cat(self.is_noise)
        values = {"auc": auc(scores, is_noise)}
        values |= {f"found_{100 * part:g}": found_at(scores, is_noise, part) for part in self.inspected}
        return {name: value.float() for name, value in values.items()}

    def curve(self) -> tuple[Tensor, Tensor]:
        """ROC points over all examples; see `roc`."""
        return roc(dim_zero_cat(self.scores), dim_zero_cat(self.is_noise))


# -- retrained subsets -------------------------------------------------------------------------------------------------


def datamodeling_scores(scores: Tensor, subsets: Sequence[Sequence[int]] | Tensor, targets: Tensor) -> Tensor:
    """Linear datamodeling score (LDS) of each test.

    Args:
        scores: (N, M), influence of pool examples on tests.
        subsets: S lists of rows of `scores`, what each model was retrained on; or (S, k) int64.
        targets: (S, M), what the retrained models gave.

    Returns:
        (M,) float64, rank correlation over subsets of summed scores with targets; NaN where undefined.
    """
    sums = torch.stack([scores.double()[torch.as_tensor(subset, device=scores.device)].sum(0) for subset in subsets])
    return spearman(sums.T, targets.double().T)


class LinearDatamodelingScore(Metric):
    """LDS, the mean over tests of `datamodeling_scores`."""

    full_state_update = False
    rho: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.add_state("rho", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, subsets: Sequence[Sequence[int]] | Tensor, targets: Tensor) -> None:
        """Add tests; see `datamodeling_scores`."""
        self.rho.append(datamodeling_scores(scores, subsets, targets))

    def compute(self) -> dict[str, Tensor]:
        """Each () float32: `lds`, mean over the tests for which it is defined, and the number `undefined` of others."""
        rho = dim_zero_cat(self.rho)
        return {"lds": rho.nanmean().float(), "undefined": rho.isnan().sum().float()}
