"""Formulas of token-level PPO on response-only tensors, without any state.

Shapes: B rows, R padded response columns, V vocabulary entries. A mask is (B, R), float or bool, 1 for every generated
token up to and including the end token. Results are float32 whatever the dtype of the inputs, and columns outside the
mask are 0 unless a function says otherwise; what the inputs hold there, even NaN, does not matter.
Sources: PPO (Schulman et al., 2017), GAE (Schulman et al., 2016), RLHF base.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_models.nn.averaging import ema_ as ema_
from lit_models.nn.logprobs import entropy as entropy
from lit_models.nn.logprobs import gather_logprobs as gather_logprobs
from lit_models.nn.logprobs import position_ids as position_ids

AllReduce = Callable[[Tensor], Tensor]
KLKind = Literal["k1", "k2", "k3", "abs"]
LossNorm = Literal["global_tokens", "micro_batch", "sequence"]

# exp(20) is still far from overflow, and no useful update moves a token's probability by that factor.
MAX_LOG_RATIO = 20.0


# Masks


def response_mask(response_ids: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Mask of the generated tokens, up to and including the first end token.

    Args:
        response_ids: (B, R) int64, generated tokens and whatever fills the rest of the row.
        eos_ids: Ids that end a response.

    Returns:
        (B, R) float32.
    """
    ends = torch.isin(response_ids, torch.tensor(list(eos_ids), device=response_ids.device, dtype=response_ids.dtype))
    ended_before = ends.long().cumsum(1) - ends.long()
    return (ended_before == 0).float()


def last_index(mask: Tensor) -> Tensor:
    """Column of the last valid token of each row.

    Args:
        mask: (B, R).

    Returns:
        (B,) int64; 0 for a row without valid tokens.
    """
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.bool() * order).amax(1).sub(1).clamp(min=0)


def extend_mask(mask: Tensor) -> Tensor:
    """Add the column right after the last valid token, where the released code of MA-RLHF and TRL put the score.

    Args:
        mask: (B, R).

    Returns:
        (B, R) float32. Rows that fill R, and rows without valid tokens, stay as they are.
    """
    extended = mask.float().clone()
    following = (last_index(mask) + 1).clamp(max=mask.shape[1] - 1)
    return extended.scatter_(1, following[:, None], extended.amax(1, keepdim=True))


# Rewards


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1", clamp: float | None = 10.0) -> Tensor:
    """Per-token estimate of the divergence from the reference, with d = logprobs - ref_logprobs.

    Args:
        logprobs: (B, R) of the policy that sampled the tokens.
        ref_logprobs: (B, R) of the reference.
        kind: `k1` is d, `abs` is |d|, `k2` is d²/2, `k3` is exp(-d) - 1 + d (Schulman, "Approximating KL divergence").
        clamp: Largest value of `k2` and `k3`; None leaves them as they are. `k1` and `abs` are never clamped.

    Returns:
        (B, R) float32 in every column, padded ones included.
    """
    difference = logprobs.float() - ref_logprobs.float()
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        estimate = difference.square() / 2
    else:
        # The inner bound keeps the gradient finite where the outer clamp applies anyway.
        estimate = torch.exp((-difference).clamp(max=MAX_LOG_RATIO)) - 1 + difference
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


def place_scores(scores: Tensor, mask: Tensor, clip: float | None = None) -> Tensor:
    """Turn scores into per-token rewards.

    Args:
        scores: (B,), one score for each response, which goes to the last valid column of `mask`; or (B, R), one for
            each token, which stays in its column.
        mask: (B, R); pass `extend_mask(mask)` to have the score one column after the last token.
        clip: Bound on the absolute value of each score, or None.

    Returns:
        (B, R) float32; rows without valid tokens get nothing.
    """
    scores = scores.float() if clip is None else scores.float().clamp(-clip, clip)
    if scores.ndim == 1:
        placed = torch.zeros_like(mask, dtype=torch.float32)
        scores = placed.scatter(1, last_index(mask)[:, None], scores[:, None])
    return torch.where(mask.bool(), scores, 0.0)


# Advantages


def _advantages(rewards: Tensor, values: Tensor, valid: Tensor, gamma: float, lam: float) -> Tensor:
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage)
    columns = []
    for reward, value, keep in zip(
        reversed(rewards.unbind(1)), reversed(values.unbind(1)), reversed(valid.unbind(1)), strict=True
    ):
        delta = reward + gamma * next_value - value
        advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(keep, value, next_value)
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation by one reverse scan; the value after the end is 0.

    Columns outside the mask, also inside a row, are stepped over: the token before sees the token after as its
    successor.

    Args:
        rewards: (B, R).
        values: (B, R), critic output at the position before each token.
        mask: (B, R).
        gamma: Discount per token.
        lam: λ of the advantages.
        lam_critic: λ of the returns when it differs from `lam` (decoupled GAE).

    Returns:
        Advantages and returns, both (B, R) float32 and detached. Returns are advantages plus values.
    """
    valid = mask.bool()
    rewards, values = rewards.float(), values.float()
    advantages = _advantages(rewards, values, valid, gamma, lam)
    critic = advantages if lam_critic is None else _advantages(rewards, values, valid, gamma, lam_critic)
    return torch.where(valid, advantages, 0.0), torch.where(valid, critic + values, 0.0)


# Masked statistics


def _wide(tensor: Tensor) -> Tensor:
    # Apple's GPU backend has no float64.
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the valid columns.

    Args:
        x: (B, R).
        mask: (B, R).
        dim: Dimension to sum over; None sums over everything.

    Returns:
        float32 scalar, or the vector that is left.
    """
    return torch.where(mask.bool(), x.float(), 0.0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the valid columns, 0 where there are none.

    Args:
        x: (B, R).
        mask: (B, R).
        dim: Dimension to average over; None averages over everything.

    Returns:
        float32 scalar, or the vector that is left.
    """
    return masked_sum(x, mask, dim) / mask.float().sum(dim).clamp(min=1)


def masked_moments(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the valid columns, in two passes so that a large mean costs no digits.

    Args:
        x: (B, R).
        mask: (B, R).
        all_reduce: Sums a tensor over all ranks and returns it; None takes this process alone. It is called twice.

    Returns:
        float64 scalars (float32 where there is no float64).
    """
    valid, all_reduce = mask.bool(), all_reduce or _same
    wide = torch.where(valid, _wide(x), 0.0)
    count, total = all_reduce(torch.stack([_wide(valid.sum()), wide.sum()]))
    count = count.clamp(min=1)
    mean = total / count
    squares = all_reduce(torch.where(valid, wide - mean, 0.0).square().sum())
    return mean, squares / count


def masked_var(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Biased variance (divided by the count) over the valid columns, 0 for a single one.

    Args:
        x: (B, R).
        mask: (B, R).
        all_reduce: Sums a tensor over all ranks and returns it; None takes this process alone.

    Returns:
        float32 scalar.
    """
    return masked_moments(x, mask, all_reduce)[1].float()


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, all_reduce: AllReduce | None = None
) -> Tensor:
    """Scale the valid columns of the global batch to unit variance and, by default, mean 0.

    Args:
        x: (B, R).
        mask: (B, R).
        shift_mean: False keeps the mean and changes the spread only.
        eps: Added to the variance.
        all_reduce: Sums a tensor over all ranks and returns it; None takes this process alone. It is called twice.

    Returns:
        (B, R) float32.
    """
    valid = mask.bool()
    mean, variance = masked_moments(x, mask, all_reduce)
    scaled = (_wide(x) - mean) * (variance + eps).rsqrt()
    return torch.where(valid, scaled if shift_mean else scaled + mean, 0.0).float()


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Share of the variance of the returns that the critic explains: 1 - Var(G - V) / (Var(G) + 1e-8).

    Args:
        values: (B, R).
        returns: (B, R).
        mask: (B, R).
        all_reduce: Sums a tensor over all ranks and returns it; None takes this process alone.

    Returns:
        float32 scalar, at most 1.
    """
    residual = masked_var(returns.float() - values.float(), mask, all_reduce)
    return 1 - residual / (masked_var(returns, mask, all_reduce) + 1e-8)


# Losses


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO objective of each token, to be minimised.

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) of the policy that sampled.
        advantages: (B, R).
        mask: (B, R).
        clip_low: The ratio counts down to 1 - clip_low.
        clip_high: The ratio counts up to 1 + clip_high.
        dual_clip: Factor c > 1 that bounds the loss of a token with negative advantage by c·|A| (Ye et al., 2020);
            None leaves it open.

    Returns:
        The loss (B, R), and detached (B, R) statistics: `ratio` (1 outside the mask), `clipped` (1 where the clip
        stopped the gradient), `log_ratio` (new minus old).
    """
    valid = mask.bool()
    log_ratio = torch.where(valid, logprobs.float() - old_logprobs.float(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gain = torch.where(valid, advantages.float(), 0.0)
    free = -gain * ratio
    bounded = -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -dual_clip * gain
        clipped = clipped | ((gain < 0) & (ceiling < loss))
        loss = torch.where(gain < 0, torch.minimum(loss, ceiling), loss)
    stats = {"ratio": ratio.detach(), "clipped": clipped.float(), "log_ratio": log_ratio.detach()}
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic for each token, with the clip of PPO's original code.

    Args:
        values: (B, R) of the critic being trained.
        old_values: (B, R) from the rollout.
        returns: (B, R).
        mask: (B, R).
        clip: How far a value may move from the old one before its gradient stops; None does not clip.

    Returns:
        The loss (B, R), and (B, R) float32, 1 where the clip stopped the gradient.
    """
    valid = mask.bool()
    values, old_values, returns = (torch.where(valid, x.float(), 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(error)
    bounded = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(error, bounded) / 2, (bounded > error).float()


def reduce_loss(per_token: Tensor, mask: Tensor, norm: LossNorm, normalizer: Tensor | None = None) -> Tensor:
    """Turn the loss of each token into the number to differentiate.

    Args:
        per_token: (B, R).
        mask: (B, R).
        norm: `global_tokens` divides the sum by `normalizer`; `micro_batch` by the number of valid tokens here;
            `sequence` averages over rows the mean of each row, leaving out rows without valid tokens.
        normalizer: Scalar, the number of valid tokens over all ranks and accumulation steps. The caller multiplies
            the result by the number of ranks when gradients are averaged over them.

    Returns:
        float32 scalar.

    Raises:
        ValueError: If `norm` is `global_tokens` and there is no normalizer.
    """
    if norm == "sequence":
        return masked_mean(masked_mean(per_token, mask, dim=1), mask.bool().any(1))
    if norm == "micro_batch":
        return masked_mean(per_token, mask)
    if normalizer is None:
        raise ValueError("loss_norm `global_tokens` needs `normalizer`, the number of valid tokens on all ranks.")
    return masked_sum(per_token, mask) / normalizer.clamp(min=1)


# Controllers and averages


def adaptive_kl(coef: float, kl: float, episodes: int, target: float, horizon: float = 10000.0) -> float:
    """Move the KL coefficient towards the value that keeps the divergence at its target (Ziegler et al., 2019).

    Args:
        coef: Present coefficient.
        kl: Mean over the rows of the rollout, on all ranks, of the summed divergence.
        episodes: Number of those rows.
        target: Wanted divergence, in nats per response.
        horizon: Number of episodes over which the coefficient reacts.

    Returns:
        The next coefficient.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)


def running_mean(previous: float | None, value: float, alpha: float) -> float:
    """Exponential mean of a series of numbers.

    Args:
        previous: The mean so far, None at the start.
        value: Newest number.
        alpha: Share of the old mean that stays.

    Returns:
        alpha · previous + (1 - alpha) · value, or `value` at the start.
    """
    return value if previous is None else alpha * previous + (1 - alpha) * value
