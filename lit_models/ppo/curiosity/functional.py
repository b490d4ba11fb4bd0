"""Formulas of the intrinsic reward: whitening and gating, without any state."""

from typing import Literal

import torch
from torch import Tensor

from lit_models.ppo.functional import AllReduce, masked_var, whiten

Whitening = Literal["mean_std", "std_only", "running", "none"]


def intrinsic_reward(
    errors: Tensor,
    mask: Tensor,
    gate: Tensor | None,
    whitening: Whitening = "mean_std",
    running_std: Tensor | None = None,
    rows: int | None = None,
    all_columns: bool = False,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """Turn prediction errors into rewards (CD-RLHF, equation 5).

    Args:
        errors: (B,R) float32.
        mask: (B,R).
        gate: (B,R) bool, the tokens that are rewarded; None rewards all.
        whitening: `mean_std` gives the valid columns mean 0 and variance 1, `std_only` divides by the standard
            deviation, `running` by `running_std`, `none` leaves the errors as they are.
        running_std: scalar, for `running`.
        rows: rows that share the statistics; None for the batch of all processes.
        all_columns: take the statistics over all columns, padded ones as 0, and leave what whitening makes of the
            padding in the result, as the released code does.
        all_reduce: sums a tensor over processes.

    Returns:
        (B,R) float32, 0 outside the mask unless `all_columns` is set.
    """
    valid = mask.bool()
    errors = errors.float().masked_fill(~valid, 0.0)
    columns = torch.ones_like(valid) if all_columns else valid
    if whitening in ("mean_std", "std_only"):
        shift = whitening == "mean_std"
        if rows is None:
            errors = _whiten(errors, columns, shift, all_reduce)
        else:
            pieces = zip(errors.split(rows), columns.split(rows), strict=True)
            errors = torch.cat([_whiten(piece, part, shift, None) for piece, part in pieces])
    elif whitening == "running":
        assert running_std is not None
        errors = errors / running_std.clamp(min=1e-8)
    if gate is not None:
        errors = errors * gate.float()
    return errors


def _whiten(errors: Tensor, columns: Tensor, shift: bool, all_reduce: AllReduce | None) -> Tensor:
    if shift:
        return whiten(errors, columns, all_reduce=all_reduce)
    return torch.where(columns, errors * (masked_var(errors, columns, all_reduce) + 1e-8).rsqrt(), 0.0)
