"""Formulas of macro actions: consecutive tokens that share one value, one reward and one advantage.

Shapes: B rows, R padded response columns, M macro actions of the longest row. `segment_ids` (B, R) int64 number the
macro actions of each row 0, 1, 2, ... in the order of the tokens; -1 stands for padding and for tokens that are not the
policy's. All work is one scatter or gather over them. Results are float32.
Source: MA-RLHF (arXiv 2410.02743), section 3.
"""

from typing import Literal

import torch
from torch import Tensor

from lit_models.ppo.functional import MAX_LOG_RATIO, last_index

Aggregation = Literal["equal", "unit", "position_decayed", "position_official", "first"]


def segments_from_starts(starts: Tensor, mask: Tensor) -> Tensor:
    """Number the macro actions.

    Args:
        starts: (B, R), nonzero at every token that begins a macro action; the first token always does.
        mask: (B, R), 1 for the policy's tokens.

    Returns:
        (B, R) int64.
    """
    valid = mask.bool()
    begins = (starts.bool() | (ordinals(mask) == 0)) & valid
    return (begins.long().cumsum(1) - 1).masked_fill(~valid, -1)


def ordinals(mask: Tensor) -> Tensor:
    """Number of each valid token in its row, from 0.

    Args:
        mask: (B, R).

    Returns:
        (B, R) int64; -1 outside the mask.
    """
    return mask.long().cumsum(1).masked_fill(~mask.bool(), 0) - 1


def segment_starts(segment_ids: Tensor) -> Tensor:
    """First token of every macro action.

    Args:
        segment_ids: (B, R) int64.

    Returns:
        (B, R) bool.
    """
    highest = segment_ids.cummax(1).values
    before = torch.cat([highest.new_full((len(highest), 1), -1), highest[:, :-1]], 1)
    return segment_ids > before


def isolate_last(segment_ids: Tensor) -> Tensor:
    """Give the last token of every row a macro action of its own.

    Args:
        segment_ids: (B, R) int64.

    Returns:
        (B, R) int64.
    """
    valid = segment_ids >= 0
    last = torch.zeros_like(valid).scatter(1, last_index(valid)[:, None], True)
    return segments_from_starts(segment_starts(segment_ids) | last, valid)


def check_segments(segment_ids: Tensor, mask: Tensor, name: str) -> None:
    """Check what a segmenter returned.

    Args:
        segment_ids: (B, R).
        mask: (B, R).
        name: of the segmenter, for the message.

    Raises:
        ValueError: naming the segmenter and what is wrong.
    """
    if segment_ids.shape != mask.shape or segment_ids.is_floating_point():
        raise ValueError(
            f"advantage.rule: {name} must return int64 ids of shape {tuple(mask.shape)}, "
            f"got {segment_ids.dtype} {tuple(segment_ids.shape)}"
        )
    expected = segments_from_starts(segment_starts(segment_ids), mask)
    wrong = (expected != segment_ids).any(1)
    if wrong.any():
        row = int(wrong.long().argmax())
        raise ValueError(
            f"advantage.rule: {name} must number the macro actions of a row 0, 1, 2, ... without gaps, with -1 on "
            f"padding; row {row} got {segment_ids[row].tolist()} for {int(mask[row].sum())} tokens"
        )


def count_segments(segment_ids: Tensor) -> Tensor:
    """Macro actions of each row.

    Args:
        segment_ids: (B, R) int64.

    Returns:
        (B,) int64.
    """
    return segment_ids.amax(1) + 1


def segment_sum(values: Tensor, segment_ids: Tensor, count: int | None = None) -> Tensor:
    """Sum over the tokens of each macro action.

    Args:
        values: (B, R); what it holds outside the macro actions does not matter.
        segment_ids: (B, R) int64.
        count: columns of the result; as many as the longest row needs by default.

    Returns:
        (B, M) float32, 0 where a row has no such macro action.
    """
    if count is None:
        count = max(int(segment_ids.max()) + 1, 1)
    valid = segment_ids >= 0
    index = segment_ids.masked_fill(~valid, count)  # padding is collected in a column that is cut off
    sums = torch.zeros(len(values), count + 1, device=values.device)
    return sums.scatter_add(1, index, torch.where(valid, values.float(), 0.0))[:, :count]


def to_tokens(macro: Tensor, segment_ids: Tensor) -> Tensor:
    """Give every token the value of its macro action.

    Args:
        macro: (B, M).
        segment_ids: (B, R) int64.

    Returns:
        (B, R) float32, 0 outside the macro actions.
    """
    return macro.float().gather(1, segment_ids.clamp(min=0)).masked_fill(segment_ids < 0, 0.0)


def offsets(segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each token in its macro action.

    Args:
        segment_ids: (B, R) int64.

    Returns:
        Number of the token in its macro action, from 0, and the length of that, both (B, R) float32.
    """
    valid = segment_ids >= 0
    lengths = to_tokens(segment_sum(valid, segment_ids), segment_ids)
    order = ordinals(valid)
    first = order.masked_fill(~segment_starts(segment_ids), 0).cummax(1).values
    return torch.where(valid, order - first, 0).float(), lengths


def aggregation_weights(segment_ids: Tensor, kind: Aggregation) -> Tensor:
    """Weights by which the values of the tokens become that of their macro action.

    Args:
        segment_ids: (B, R) int64.
        kind: `equal` averages; `unit` takes the last token; `position_decayed` weighs the token j of l by 1/(l-j), as
            in the paper; `position_official` by 1/(j+1), as the released code; `first` takes the first token, whose
            value is that of the state in which the macro action begins.

    Returns:
        (B, R) float32; the weights of a macro action sum to 1.
    """
    place, length = offsets(segment_ids)
    if kind == "equal":
        weights = torch.ones_like(place)
    elif kind == "unit":
        weights = (place == length - 1).float()
    elif kind == "first":
        weights = (place == 0).float()
    elif kind == "position_decayed":
        weights = 1 / (length - place).clamp(min=1)
    else:
        weights = 1 / (place + 1)
    weights = weights.masked_fill(segment_ids < 0, 0.0)
    total = to_tokens(segment_sum(weights, segment_ids), segment_ids)
    return weights / total.clamp(min=1e-12)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Which columns of (B, M) tensors hold a macro action.

    Args:
        segment_ids: (B, R) int64.

    Returns:
        (B, M) bool.
    """
    count = count_segments(segment_ids)
    return torch.arange(max(int(count.max()), 1), device=count.device) < count[:, None]


@torch.no_grad()
def macro_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over macro actions by one reverse scan.

    Args:
        rewards: (B, M).
        values: (B, M).
        mask: (B, M), without gaps.
        gamma: discount per macro action, or (B, M) of its own for each.
        lam: λ per macro action.

    Returns:
        Advantages and returns, both (B, M) float32 and detached.
    """
    valid = mask.bool()
    values = values.float().masked_fill(~valid, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    discount = torch.as_tensor(gamma, device=values.device).float().expand_as(values)
    deltas = (rewards.float() + discount * following - values).masked_fill(~valid, 0.0)
    decay = discount * lam
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    for delta, weight in zip(reversed(deltas.unbind(1)), reversed(decay.unbind(1)), strict=True):
        advantage = delta + weight * advantage  # still 0 in the padding after a row's last macro action
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def macro_log_ratio(logprobs: Tensor, old_logprobs: Tensor, segment_ids: Tensor, mean: bool = False) -> Tensor:
    """Log-ratio of whole macro actions, as every one of their tokens sees it.

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) of the policy that sampled.
        segment_ids: (B, R) int64.
        mean: average over the tokens instead of summing (the geometric mean of the ratios, as in GSPO).

    Returns:
        (B, R) float32, at most 20 in absolute value, 0 outside the macro actions.
    """
    difference = logprobs.float() - old_logprobs.float()
    total = segment_sum(difference, segment_ids)
    if mean:
        total = total / segment_sum(segment_ids >= 0, segment_ids).clamp(min=1)
    return to_tokens(total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), segment_ids)
