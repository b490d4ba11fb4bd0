"""Logged values of PPO, reduced over rows, micro-batches and processes by sum and count."""

import torch
from torch import Tensor

from lit_models.ppo.advantages import AllReduce
from lit_models.ppo.functional import explained_variance
from lit_models.ppo.rollout import Rollout


class Meter:
    """Collects sums and counts on the device; one reduction over processes turns them into means."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._spread: dict[str, tuple[str, str]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values, those outside the mask left out; to be divided by how many there were."""
        values = values.detach().double()
        weights = torch.ones_like(values) if mask is None else mask.double()
        self._sums[name] = self._sums.get(name, 0) + torch.where(weights > 0, values, 0).sum()
        self._counts[name] = self._counts.get(name, 0) + weights.sum()

    def add_spread(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values whose mean `NAME/mean` and standard deviation `NAME/std` are wanted."""
        self.add(f"{name}/mean", values, mask)
        self.add(f"{name}/std", values.double().square(), mask)
        self._spread[f"{name}/std"] = (f"{name}/mean", f"{name}/std")

    def compute(self, all_reduce: AllReduce) -> dict[str, float]:
        """Means over everything added on all processes, which must have added the same names."""
        if not self._sums:
            return {}
        names = list(self._sums)
        stacked = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names])
        total = all_reduce(stacked).cpu()
        means = dict(zip(names, (total[:, 0] / total[:, 1].clamp(min=1)).tolist(), strict=True))
        for name, (mean, square) in self._spread.items():
            means[name] = max(0.0, means[square] - means[mean] ** 2) ** 0.5
        return means


def add_rollout(meter: Meter, rollout: Rollout, parts: dict[str, Tensor]) -> None:
    """Add what a finished rollout is worth logging.

    Args:
        meter: collects.
        rollout: from `steps.advantages`.
        parts: (B,) values per row under their logged names.
    """
    assert rollout.scores is not None
    assert rollout.rewards is not None
    assert rollout.old_logprobs is not None
    assert rollout.ref_logprobs is not None
    assert rollout.old_values is not None
    assert rollout.advantages is not None
    assert rollout.returns is not None
    mask = rollout.response_mask
    meter.add_spread("score", sequence_scores(rollout))
    meter.add("reward/total", rollout.rewards.sum(1))
    meter.add("kl/ref", summed_kl(rollout))
    meter.add_spread("adv", rollout.advantages, mask)
    meter.add_spread("return", rollout.returns, mask)
    meter.add("value/mean", rollout.old_values, mask)
    meter.add("response/len_mean", rollout.lengths.float())
    meter.add("response/eos_frac", rollout.ended.float())
    meter.add("response/truncated_frac", 1 - rollout.ended.float())
    for name, values in parts.items():
        meter.add(name, values)


def add_losses(meter: Meter, stats: dict[str, Tensor], mask: Tensor) -> None:
    """Add the per-token statistics of a micro-batch.

    Args:
        meter: collects.
        stats: of `steps.Losses`.
        mask: (B,R) float32.
    """
    meter.add("policy/loss", stats["policy_loss"], mask)
    meter.add("value/loss", stats["value_loss"], mask)
    meter.add("policy/clip_frac", stats["clipped"], mask)
    meter.add("policy/ratio_mean", stats["ratio"], mask)
    meter.add("policy/entropy", stats["entropy"], mask)
    meter.add("value/clip_frac", stats["value_clipped"], mask)
    meter.add("kl/old_new", -stats["log_ratio"], mask)
    meter.add("kl/old_new_k2", 0.5 * stats["log_ratio"].square(), mask)


def sequence_scores(rollout: Rollout) -> Tensor:
    """(B,) float32: scores of whole responses plus the summed token rewards, before clipping."""
    assert rollout.scores is not None
    return rollout.scores if rollout.token_scores is None else rollout.scores + rollout.token_scores.sum(1)


def summed_kl(rollout: Rollout) -> Tensor:
    """(B,) float32: log-ratio to the reference summed over each response (the k1 estimate)."""
    assert rollout.old_logprobs is not None
    assert rollout.ref_logprobs is not None
    return ((rollout.old_logprobs - rollout.ref_logprobs) * rollout.response_mask).sum(1)


def rollout_explained_variance(rollout: Rollout, all_reduce: AllReduce) -> Tensor:
    """Scalar: share of the variance of the returns that the old values explain."""
    assert rollout.old_values is not None
    assert rollout.returns is not None
    return explained_variance(rollout.old_values, rollout.returns, rollout.response_mask, all_reduce)
