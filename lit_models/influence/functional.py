"""Recurrence, roll-outs and closed form of training-run simulators, without any state.

A simulator predicts a metric φ of test example j after step t from the pool examples c_t that the step trains on:

    φ_t(j) = o·φ_{t-1}(j) + s_t·(Σ_k α_k(t,j)·φ_{t-k}(j) + β(t,j)),   α_k(t,j) = Σ_{i∈c_t} A^(k)[i,j],
    β(t,j) = Σ_{i∈c_t} B[i,j],

where o is the identity offset (1, or 0 as published) and s_t a factor of the step, such as its learning rate.

Shapes: N pool examples, M tests (columns), K runs, T steps, R rows (steps of any runs), b places of a batch, n the
order, D features. Ids are int64, -1 where a batch has no further example; a repeated id counts as often as it occurs.
The axis n of factors and histories runs from the oldest value, φ_{t-n}, to the newest, φ_{t-1}. Everything is computed
in float32, the closed form in float64.
Sources: Simfluence (arXiv 2303.08114), GPTfluence (arXiv 2404.07840); offset, scales and closed form are ours.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HistoryPad = Literal["zero", "repeat", "skip"]
BatchReduce = Literal["sum", "mean"]
Bound = float | Tensor | None

ELEMENTS = 2**23
"""Numbers that intermediate results may hold before work is cut into parts."""
EPSILON = 1e-12
"""Least length of a vector that is normalised."""


class Factors(NamedTuple):
    """What every pool example does to every test example.

    Args:
        A: (n, N, M), multiplies the history.
        B: (N, M), is added.
    """

    A: Tensor
    B: Tensor


# -- batches -----------------------------------------------------------------------------------------------------------


def pad_ids(batches: Sequence[Sequence[int]], size: int | None = None) -> Tensor:
    """Lists of ids as a table.

    Args:
        batches: ids of each of T steps, lists of any lengths.
        size: b; the longest list by default.

    Returns:
        (T, b) int64, padded with -1 on the right.
    """
    size = max((len(batch) for batch in batches), default=0) if size is None else size
    rows = [[*batch, *[-1] * (size - len(batch))] for batch in batches]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), size)


def counts(ids: Tensor, num_train: int) -> Tensor:
    """How often each example occurs in each batch.

    Args:
        ids: (..., b) int64, -1 at padding.
        num_train: N.

    Returns:
        (..., N) float32.
    """
    table = torch.zeros(*ids.shape[:-1], num_train, device=ids.device, dtype=torch.float32)
    return table.scatter_add(-1, ids.clamp(min=0), (ids >= 0).float())


def alpha_beta(A: Tensor, B: Tensor, ids: Tensor, form: Literal["gather", "counts"] | None = None) -> Factors:
    """Sums of factors over batches.

    Args:
        A: (n, N, M).
        B: (N, M).
        ids: (..., b) int64, -1 at padding; or (..., N) floating, numbers of occurrences, which may be fractions and
            carry a gradient.
        form: how ids are summed, which changes nothing but the time: by reading their rows, or as a product with
            `counts`; None takes the cheaper one.

    Returns:
        α (n, ..., M) and β (..., M), float32; a batch without examples gives 0.
    """
    A, B = A.float(), B.float()
    order, num_train, columns = A.shape
    with torch.autocast(A.device.type, enabled=False):  # products would be rounded to 16 bits
        if ids.is_floating_point():
            return _weighted(A, B, ids.float())
        if form is None:  # a product takes about a twentieth of the time per number
            form = "gather" if 20 * ids.shape[-1] < num_train else "counts"
        if form == "counts" or not ids.numel():
            return _weighted(A, B, counts(ids, num_train))
        table = torch.cat([*A, B], -1)
        flat = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
        sums = F.embedding_bag(flat.clamp(min=0), table, mode="sum", per_sample_weights=(flat >= 0).to(table.dtype))
    *alpha, beta = sums.reshape(*ids.shape[:-1], order + 1, columns).unbind(-2)
    return Factors(torch.stack(alpha), beta)


def _weighted(A: Tensor, B: Tensor, occurrences: Tensor) -> Factors:
    """Sums of factors, each times a number of occurrences (..., N)."""
    return Factors(torch.einsum("...i,kim->k...m", occurrences, A), occurrences @ B)


def step_scale(
    ids: Tensor, lr_scale: Tensor | None = None, batch_reduce: BatchReduce = "sum", batch_reference: int | None = None
) -> Tensor | None:
    """Factor s_t of each step.

    Args:
        ids: (..., b) int64, -1 at padding; or (..., N) floating counts.
        lr_scale: (...), learning rate of the step over the reference rate; None for 1.
        batch_reduce: "mean" for runs whose loss is a mean over batches of varying size: sums are then divided by the
            size of the batch.
        batch_reference: size of a batch whose factor is 1 then.

    Returns:
        (...) float32; None if it is 1 everywhere.
    """
    scale = None if lr_scale is None else lr_scale.float()
    if batch_reduce == "mean":
        assert batch_reference is not None
        size = ids.float().sum(-1) if ids.is_floating_point() else (ids >= 0).sum(-1).float()
        share = batch_reference / size.clamp(min=torch.finfo(size.dtype).tiny)
        share = torch.where(size > 0, share, 0.0)
        scale = share if scale is None else scale * share
    return scale


# -- the recurrence ----------------------------------------------------------------------------------------------------


def pad_history(values: Tensor, order: int, pad: HistoryPad) -> Tensor:
    """Fill a history up to n values on the left.

    Args:
        values: (..., k, M), the oldest first; of more than n values, the newest are taken.
        order: n.
        pad: "zero" as published, or "repeat" the first value; "skip" never makes values up.

    Returns:
        (..., n, M).

    Raises:
        ValueError: if values are missing and `pad` is "skip".
    """
    values = values[..., -order:, :]
    missing = order - values.shape[-2]
    if missing <= 0:
        return values
    if pad == "skip":
        raise ValueError(
            f"history_pad: skip needs {order} recorded values to start from, got {values.shape[-2]}; give as many, or "
            "set history_pad to repeat"
        )
    first = values[..., :1, :]
    filling = torch.zeros_like(first) if pad == "zero" else first
    return torch.cat([filling.expand(*first.shape[:-2], missing, first.shape[-1]), values], -2)


def step(
    history: Tensor, alpha: Tensor, beta: Tensor, offset: float | Tensor = 1.0, scale: Tensor | None = None
) -> Tensor:
    """Predict the values after one step.

    Args:
        history: (..., n, M) in any floating dtype, the oldest value first.
        alpha: (n, ..., M).
        beta: (..., M).
        offset: o.
        scale: (...), s_t; None for 1.

    Returns:
        (..., M) float32.
    """
    history = history.float()
    effect = (alpha.movedim(0, -2) * history).sum(-2) + beta
    if scale is not None:
        effect = effect * scale[..., None]
    return effect + offset * history[..., -1, :]


def rollout(
    start: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor | None = None,
    offset: float = 1.0,
    clamp: tuple[Bound, Bound] | None = None,
    history_pad: HistoryPad = "repeat",
    lengths: Tensor | None = None,
    check: bool = True,
    runs: Sequence[object] | None = None,
    tests: Sequence[object] | None = None,
) -> Tensor:
    """Simulate whole runs, each step from the predictions before it.

    Args:
        start: (K, M), values before the first step; or (K, k, M), the last k values before it, the oldest first.
        ids: (K, T, b) int64, -1 at padding; or (K, T, N) floating counts, see `alpha_beta`.
        A: (n, N, M).
        B: (N, M).
        scale: (K, T), see `step_scale`; None for 1.
        offset: o.
        clamp: least and greatest value of a prediction, numbers or (M,); None for no bound.
        history_pad: what stands for values before the given ones.
        lengths: (K,) int64, steps of each run; T by default. Afterwards a trajectory keeps its last value.
        check: whether infinite or undefined predictions are an error.
        runs: names of the runs in its message; their numbers by default.
        tests: names of the tests; their columns by default.

    Returns:
        (K, T+1, M) float32, the start value first.

    Raises:
        ValueError: if a prediction is not finite, naming run, step and test.
    """
    start = start.float()
    window = pad_history(start if start.ndim == 3 else start[:, None], len(A), history_pad)
    clamp = None if clamp is None else _bounds(clamp, window)
    newest = window[:, -1]
    trajectory = [newest]
    runs_, steps = ids.shape[:2]
    block = max(1, ELEMENTS // max(1, runs_ * B.shape[1] * (len(A) + 1)))
    for first in range(0, steps, block):
        chunk = ids[:, first : first + block]
        alpha, beta = alpha_beta(A, B, chunk)
        if scale is not None:
            factor = scale[:, first : first + block, None].float()
            alpha, beta = alpha * factor, beta * factor
        if offset:
            alpha = torch.cat([alpha[:-1], alpha[-1:] + offset])
        going = None
        if lengths is not None:
            going = torch.arange(first, first + chunk.shape[1], device=ids.device) < lengths[:, None]
        for number, (alpha_t, beta_t) in enumerate(zip(alpha.unbind(2), beta.unbind(1), strict=True)):
            if len(A) == 1:
                value = torch.addcmul(beta_t, alpha_t[0], newest)
            else:
                value = torch.addcmul(beta_t, alpha_t[0], window[:, 0])
                for lag in range(1, len(A)):
                    value = torch.addcmul(value, alpha_t[lag], window[:, lag])
            if clamp is not None:  # the second term is 0, or shows that the first one hides an infinite value
                value = torch.clamp(value, *clamp) + 0 * value
            if going is not None:
                value = torch.where(going[:, number, None], value, newest)
            newest = value
            trajectory.append(newest)
            if len(A) > 1:
                window = torch.cat([window[:, 1:], newest[:, None]], 1)
    prediction = torch.stack(trajectory, 1)
    if check:
        check_finite(prediction, runs, tests)
    return prediction


def _bounds(clamp: tuple[Bound, Bound], like: Tensor) -> tuple[Tensor, Tensor]:
    """Both bounds as tensors, which may be infinite."""
    low, high = (
        torch.as_tensor(default if bound is None else bound, dtype=like.dtype, device=like.device)
        for bound, default in zip(clamp, (-torch.inf, torch.inf), strict=True)
    )
    return low, high


def check_finite(
    prediction: Tensor, runs: Sequence[object] | None = None, tests: Sequence[object] | None = None
) -> None:
    """Make sure that a roll-out did not leave the numbers.

    Args:
        prediction: (K, T+1, M).
        runs: names of the runs; their numbers by default.
        tests: names of the tests; their columns by default.

    Raises:
        ValueError: if it did, naming the earliest step and a run and test of it.
    """
    finite = prediction.isfinite()
    if bool(finite.all()):
        return
    time, run, test = (~finite).permute(1, 0, 2).nonzero()[0].tolist()
    place = f"run {run if runs is None else runs[run]}, test {test if tests is None else tests[test]}"
    value = float(prediction[run, time, test])
    if time == 0:
        raise ValueError(f"start: the value of {place} before step 1 is {value}; start where the metric was recorded")
    raise ValueError(
        f"roll-out: {place} becomes {value} at step {time}; the simulator diverges, so train it longer or with "
        "identity_offset 1 and tower_scale 1/P, or set clamp"
    )


# -- losses ------------------------------------------------------------------------------------------------------------


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Mean squared error over what was measured.

    Args:
        prediction: (..., M).
        target: (..., M) in any floating dtype.
        mask: (..., M) bool, entries that count; all by default.
        weight: (M,), weights of columns; 1 by default.

    Returns:
        () float32: Σ weight·(prediction - target)² over the number of entries that count; 0 without any.
    """
    errors = prediction.float() - target.float()
    if mask is not None:  # before the square, since what does not count may be NaN, and its gradient too
        errors = torch.where(mask, errors, 0.0)
    squares = errors.square()
    if weight is not None:
        squares = squares * weight
    return squares.mean() if mask is None else squares.sum() / mask.sum().clamp(min=1)


def l2_norms(table: Tensor) -> Tensor:
    """Published penalty of free factors: the Euclidean norms of the columns, not squared.

    Args:
        table: (pairs, columns).

    Returns:
        () float32, their sum.
    """
    return torch.linalg.vector_norm(table.float(), dim=0).sum()


# -- features ----------------------------------------------------------------------------------------------------------


def feature_mean(features: Tensor) -> Tensor:
    """Statistics of a pool for `standardize`: (N, D) in any floating dtype -> (D,) float32."""
    return features.double().mean(0).float()


def standardize(features: Tensor, mean: Tensor) -> Tensor:
    """Take the pool mean out of features and give each row the length sqrt(D).

    Args:
        features: (..., D) in any floating dtype.
        mean: (D,), see `feature_mean`.

    Returns:
        (..., D) float32; a row equal to the mean becomes 0.
    """
    centred = features.float() - mean.float()
    return F.normalize(centred, dim=-1, eps=EPSILON) * centred.shape[-1] ** 0.5


# -- closed form -------------------------------------------------------------------------------------------------------


def ridge(
    ids: Tensor,
    history: Tensor,
    target: Tensor,
    num_train: int,
    penalties: Sequence[float],
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    offset: float = 1.0,
    prior: tuple[float, float] = (0.0, 0.0),
    form: Literal["primal", "dual"] | None = None,
) -> list[Factors]:
    """Fit free factors by least squares, every test by itself.

    With x = s·[C·φ_{t-n}, …, C·φ_{t-1}, C] of a row, C its counts, the factors of a test are
    w = w0 + (XᵀX + λI)⁻¹ Xᵀ(y - o·φ_{t-1} - X·w0). Examples that occur in no row keep the prior w0.

    Args:
        ids: (R, b) int64, -1 at padding.
        history: (R, n, M) in any floating dtype, the oldest value first.
        target: (R, M), y.
        num_train: N.
        penalties: values of λ.
        mask: (R, M) bool, entries that count; all by default.
        scale: (R,), s, see `step_scale`; None for 1.
        offset: o.
        prior: w0 of A at the newest lag, and of B; that of other lags is 0.
        form: solve for factors (primal) or for rows (dual), which changes nothing but the time; None takes the smaller
            system.

    Returns:
        A (n, N, M) and B (N, M), float64, for each λ.

    Raises:
        ValueError: if a λ is not positive.
    """
    if min(penalties) <= 0:
        raise ValueError(f"ridge.penalties must be positive, got {list(penalties)}")
    rows, order, columns = history.shape
    history, target = history.double(), target.double()
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    factor = torch.ones(rows, dtype=torch.float64, device=ids.device) if scale is None else scale.double()
    present = ids.unique()
    present = present[present >= 0]
    local = torch.searchsorted(present, ids.clamp(min=0)).masked_fill(ids < 0, -1)
    size = len(present)
    design = counts(local, size).double() * factor[:, None]

    # Of an entry that does not count, all inputs are 0: it then asks for nothing.
    inputs = torch.where(mask[:, None], torch.cat([history, torch.ones_like(target)[:, None]], 1), 0.0)
    residual = target - offset * history[:, -1]
    residual = residual - design.sum(1, keepdim=True) * (prior[0] * history[:, -1] + prior[1])
    residual = torch.where(mask, residual, 0.0)

    dual = rows < (order + 1) * size if form is None else form == "dual"
    side = rows if dual else (order + 1) * size
    kernel = design @ design.T if dual else _pair_counts(local, size, factor)
    eye = torch.eye(side, dtype=torch.float64, device=ids.device)
    parts: list[list[Tensor]] = [[] for _ in penalties]
    width = max(1, ELEMENTS // max(1, side * side))
    for first in range(0, columns, width):
        x = inputs[..., first : first + width].permute(2, 0, 1)  # (m, R, n+1)
        y = residual[:, first : first + width].T[..., None]  # (m, R, 1)
        system = kernel * (x @ x.mT) if dual else _normal_matrix(kernel, design, x)
        moment = y if dual else (design.T @ (x * y)).mT.flatten(1)[..., None]
        for solved, penalty in zip(parts, penalties, strict=True):
            weights = torch.cholesky_solve(moment, torch.linalg.cholesky(system + penalty * eye))
            solved.append(design.T @ (x * weights) if dual else weights.reshape(-1, order + 1, size).mT)  # (m, N', n+1)

    fitted = []
    for solved in parts:
        factors = torch.zeros(order + 1, num_train, columns, dtype=torch.float64, device=ids.device)
        factors[-2], factors[-1] = prior
        factors[:, present] += torch.cat(solved).permute(2, 1, 0)
        fitted.append(Factors(factors[:-1], factors[-1]))
    return fitted


def _pair_counts(local: Tensor, size: int, factor: Tensor) -> Tensor:
    """(N'·N', R) sparse: how often two examples meet in a row, times the square of its factor."""
    places = (local[:, :, None] * size + local[:, None, :]).flatten(1)
    met = ((local[:, :, None] >= 0) & (local[:, None, :] >= 0)).flatten(1)
    row = torch.arange(len(local), device=local.device)[:, None].expand_as(places)
    values = factor.square()[:, None].expand_as(places)[met]
    indices = torch.stack([places[met], row[met]])
    return torch.sparse_coo_tensor(indices, values, (size * size, len(local)), check_invariants=False).coalesce()


def _normal_matrix(pairs: Tensor, design: Tensor, x: Tensor) -> Tensor:
    """XᵀX of m tests, (m, (n+1)·N', (n+1)·N'), from x (m, R, n+1)."""
    m, rows, roles = x.shape
    products = (x[..., :, None] * x[..., None, :]).permute(1, 0, 2, 3).reshape(rows, -1)
    size = design.shape[1]
    blocks = torch.sparse.mm(pairs, products).reshape(size, size, m, roles, roles)
    return blocks.permute(2, 3, 0, 4, 1).reshape(m, roles * size, roles * size)
