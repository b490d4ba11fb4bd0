"""The recurrence, roll-outs and the closed form, against loops over single numbers."""

import pytest
import torch

from lit_models.influence import functional
from lit_models.influence.functional import Factors, alpha_beta, pad_history, ridge, rollout, step, step_scale

N, M = 9, 4


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids_of(*shape, seed=0):
    return torch.randint(0, N, shape, generator=torch.Generator().manual_seed(seed))


def loop(start, ids, A, B, scale=None, offset=1.0, lengths=None, pad="repeat", bounds=None):
    """A roll-out one run, test and step at a time."""
    runs, steps = ids.shape[:2]
    order = len(A)
    result = torch.zeros(runs, steps + 1, B.shape[1])
    for run in range(runs):
        for test in range(B.shape[1]):
            past = [float(value) for value in (start[run] if start.ndim == 3 else start[run][None])[:, test]]
            result[run, 0, test] = past[-1]
            for number in range(steps):
                if lengths is not None and number >= lengths[run]:
                    result[run, number + 1, test] = past[-1]
                    continue
                history = past[-order:]
                filling = 0.0 if pad == "zero" else history[0]
                history = [filling] * (order - len(history)) + history
                change = 0.0
                for example in ids[run, number].tolist():
                    if example >= 0:
                        change += sum(float(A[k, example, test]) * history[k] for k in range(order))
                        change += float(B[example, test])
                change *= 1.0 if scale is None else float(scale[run, number])
                value = offset * past[-1] + change
                if bounds is not None:
                    value = min(max(value, bounds[0]), bounds[1])
                past.append(value)
                result[run, number + 1, test] = value
    return result


# -- batches -----------------------------------------------------------------------------------------------------------


def test_lists_of_ids_are_padded():
    assert functional.pad_ids([[3, 1], [], [2, 2, 2]]).tolist() == [[3, 1, -1], [-1, -1, -1], [2, 2, 2]]
    assert functional.pad_ids([[3]], 2).tolist() == [[3, -1]]
    assert functional.pad_ids([]).shape == (0, 0)
    assert functional.pad_ids([[], []]).shape == (2, 0)


def test_counts_of_repeated_and_missing_ids():
    table = functional.counts(torch.tensor([[[2, 2, -1], [-1, -1, -1]], [[0, 1, 2], [0, 0, 0]]]), 4)
    assert table.tolist() == [[[0, 0, 2, 0], [0, 0, 0, 0]], [[1, 1, 1, 0], [3, 0, 0, 0]]]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(5, 3), (2, 6, 3), (1, 1), (3, 0)])
def test_gathering_equals_counting(shape, order):
    A, B, ids = draw(order, N, M), draw(N, M, seed=1), ids_of(*shape)
    if ids.numel():
        ids[..., -1] = -1
        ids[..., 0] = 3
    results, gradients = [], []
    for form in ("gather", "counts", None, "floating"):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        batch = functional.counts(ids, N) if form == "floating" else ids
        alpha, beta = alpha_beta(a, b, batch, None if form == "floating" else form)
        assert alpha.shape == (order, *shape[:-1], M)
        assert beta.shape == (*shape[:-1], M)
        (alpha.square().sum() + (beta**3).sum()).backward()
        results.append((alpha, beta))
        gradients.append((a.grad, b.grad))
    for other in range(1, 4):
        for first, second in zip(results[0] + gradients[0], results[other] + gradients[other], strict=True):
            torch.testing.assert_close(second, first)


def test_padding_adds_nothing_and_repeats_count_twice():
    A, B = draw(1, N, M), draw(N, M, seed=1)
    alpha, beta = alpha_beta(A, B, torch.tensor([[4, 4, -1], [4, -1, -1], [-1, -1, -1]]))
    torch.testing.assert_close(alpha[0], torch.stack([2 * A[0, 4], A[0, 4], 0 * A[0, 4]]))
    torch.testing.assert_close(beta, torch.stack([2 * B[4], B[4], 0 * B[4]]))


def test_an_infinite_factor_of_another_example_does_no_harm():
    A, B = draw(1, N, M), draw(N, M, seed=1)
    A[:, 0] = torch.inf  # what padding reads
    alpha, _ = alpha_beta(A, B, torch.tensor([[4, 5]]), "gather")
    assert alpha.isfinite().all()


def test_scales_of_steps():
    ids = torch.tensor([[1, 2, -1, -1], [1, -1, -1, -1], [-1, -1, -1, -1], [1, 1, 2, 3]])
    rate = torch.tensor([1.0, 0.5, 0.5, 0.25])
    assert step_scale(ids) is None
    assert step_scale(ids, rate).tolist() == rate.tolist()
    assert step_scale(ids, None, "mean", 2).tolist() == [1.0, 2.0, 0.0, 0.5]
    assert step_scale(ids, rate, "mean", 2).tolist() == [1.0, 1.0, 0.0, 0.125]
    assert step_scale(functional.counts(ids, 5), rate, "mean", 2).tolist() == [1.0, 1.0, 0.0, 0.125]


# -- the recurrence ----------------------------------------------------------------------------------------------------


def test_histories_are_filled_on_the_left():
    values = torch.arange(1.0, 7.0).reshape(1, 2, 3)
    assert pad_history(values, 4, "zero")[0, :, 0].tolist() == [0, 0, 1, 4]
    assert pad_history(values, 4, "repeat")[0, :, 0].tolist() == [1, 1, 1, 4]
    assert pad_history(values, 1, "skip")[0, :, 0].tolist() == [4]
    assert pad_history(values, 2, "skip") is not None
    with pytest.raises(ValueError, match="history_pad: skip needs 3 recorded values"):
        pad_history(values, 3, "skip")


def test_half_precision_is_raised_to_single():
    history, alpha, beta = draw(2, 1, M).bfloat16(), draw(1, 2, M), draw(2, M)
    value = step(history, alpha, beta)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, history[:, 0].float() * (1 + alpha[0]) + beta)
    A, B, ids = draw(1, N, M, scale=0.1), draw(N, M, scale=0.1), ids_of(2, 3, 2)
    start = draw(2, M).bfloat16()
    torch.testing.assert_close(
        rollout(start, ids, A.bfloat16(), B), rollout(start.float(), ids, A.bfloat16().float(), B)
    )


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("pad", ["zero", "repeat"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_roll_out_equals_a_loop(order, pad, offset):
    A, B = draw(order, N, M, scale=0.1), draw(N, M, seed=1, scale=0.1)
    start, ids = draw(3, M, seed=2), ids_of(3, 7, 3)
    ids[1, 2:, 1:] = -1
    ids[2, 3] = -1
    scale, lengths = torch.rand(3, 7), torch.tensor([7, 4, 0])
    before = [value.clone() for value in (start, ids, A, B, scale, lengths)]
    expected = loop(start, ids, A, B, scale, offset, lengths, pad)
    actual = rollout(start, ids, A, B, scale, offset, None, pad, lengths)
    torch.testing.assert_close(actual, expected)
    for value, copy in zip((start, ids, A, B, scale, lengths), before, strict=True):
        assert torch.equal(value, copy)


def test_given_history_is_used():
    A, B = draw(3, N, M, scale=0.1), draw(N, M, seed=1, scale=0.1)
    start, ids = draw(2, 2, M, seed=2), ids_of(2, 5, 2)
    torch.testing.assert_close(rollout(start, ids, A, B, history_pad="zero"), loop(start, ids, A, B, pad="zero"))
    assert torch.equal(rollout(start, ids, A, B)[:, 0], start[:, -1])


def test_blocks_of_steps_change_nothing(monkeypatch):
    A, B = draw(2, N, M, scale=0.1), draw(N, M, seed=1, scale=0.1)
    start, ids, lengths = draw(3, M, seed=2), ids_of(3, 7, 3), torch.tensor([7, 5, 2])
    whole = rollout(start, ids, A, B, lengths=lengths)
    monkeypatch.setattr(functional, "ELEMENTS", 3 * M * 3 * 2)
    torch.testing.assert_close(rollout(start, ids, A, B, lengths=lengths), whole)


def test_a_run_of_one_test_and_one_step():
    A, B = draw(1, N, 1), draw(N, 1)
    assert rollout(torch.ones(1, 1), torch.tensor([[[2]]]), A, B)[0, 1, 0] == pytest.approx(
        float(1 + A[0, 2, 0] + B[2, 0])
    )
    assert rollout(torch.ones(1, 1), torch.zeros(1, 0, 1, dtype=torch.int64), A, B).shape == (1, 1, 1)


def test_bounds_hold_inside_the_loop():
    A, B = torch.zeros(1, N, M), torch.full((N, M), -1.0)
    B[1] = 0.25
    ids = torch.tensor([[[0], [0], [1], [1]]])
    start = torch.full((1, M), 0.5)
    assert rollout(start, ids, A, B, clamp=(0.0, 0.3))[0, :, 0].tolist() == pytest.approx([0.5, 0, 0, 0.25, 0.3])
    upper = torch.tensor([0.1, 0.2, 0.3, torch.inf])
    last = rollout(start, ids, A, B, clamp=(0.0, upper))[0, -1]
    assert last.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5])
    free = rollout(start, ids, A, B, clamp=(None, None))
    torch.testing.assert_close(free, rollout(start, ids, A, B))


def test_divergence_names_run_step_and_test():
    A, B = torch.zeros(1, N, M), torch.zeros(N, M)
    A[0, 3, 2] = 1e30
    ids = torch.tensor([[[0], [0], [0]], [[0], [3], [3]]])
    with pytest.raises(ValueError, match="run 1, test 2 becomes inf at step 3"):
        rollout(torch.ones(2, M), ids, A, B)
    with pytest.raises(ValueError, match="run second, test t2 becomes inf at step 3"):
        rollout(torch.ones(2, M), ids, A, B, runs=["first", "second"], tests=[f"t{number}" for number in range(M)])
    with pytest.raises(ValueError, match="run 1, test 2 becomes nan at step 3"):  # a bound does not hide it
        rollout(torch.ones(2, M), ids, A, B, clamp=(0.0, 1e35))
    assert rollout(torch.ones(2, M), ids, A, B, check=False)[1, 3, 2].isinf()


def test_an_unknown_start_is_named():
    start = torch.ones(2, M)
    start[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"start: the value of run 1, test 3 before step 1 is nan"):
        rollout(start, ids_of(2, 2, 1), torch.zeros(1, N, M), torch.zeros(N, M))


def test_gradients_of_fractional_counts():
    """The effect of a little more of an example, against finite differences."""
    A, B = draw(1, N, M, scale=0.1).double(), draw(N, M, seed=1, scale=0.1).double()
    counts = functional.counts(ids_of(1, 5, 2), N).requires_grad_()
    final = rollout(torch.ones(1, M), counts, A, B)[0, -1].mean()
    (gradient,) = torch.autograd.grad(final, counts)
    for time, example in ((0, 3), (4, 1)):
        shifted = counts.detach().clone()
        shifted[0, time, example] += 0.01
        higher = rollout(torch.ones(1, M), shifted, A, B)[0, -1].mean()
        shifted[0, time, example] -= 0.02
        lower = rollout(torch.ones(1, M), shifted, A, B)[0, -1].mean()
        assert float(gradient[0, time, example]) == pytest.approx(float((higher - lower) / 0.02), abs=2e-4)


def test_only_the_offset_gives_removal_a_meaning():
    """Taking an example without any effect out of each batch leaves the trajectory as it is."""
    size = 4
    ids = ids_of(1, 12, size, seed=3) % (N - 1)
    ids[..., -1] = N - 1
    less = torch.where(ids == N - 1, -1, ids)
    start = torch.ones(1, M)
    effect = Factors(0.01 * draw(1, N, M), 0.001 * draw(N, M, seed=1))
    effect.A[:, -1], effect.B[-1] = 0.0, 0.0
    torch.testing.assert_close(rollout(start, less, *effect), rollout(start, ids, *effect))
    released = Factors(effect.A + 1 / size, effect.B)
    whole = rollout(start, ids, *released, offset=0.0)
    torch.testing.assert_close(whole, rollout(start, ids, *effect))
    without = rollout(start, less, *released, offset=0.0)
    assert float(without[0, -1].abs().max()) < 0.1  # collapses by a quarter in each step


# -- losses and features -----------------------------------------------------------------------------------------------


def test_errors_count_where_measured_and_by_weight():
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[0.0, torch.nan], [1.0, 2.0]])
    mask = ~target.isnan()
    loss = functional.masked_mse(prediction, target, mask)
    assert loss.item() == pytest.approx((1 + 4 + 4) / 3)
    loss.backward()
    assert prediction.grad.isfinite().all()
    weighted = functional.masked_mse(prediction, target, mask, torch.tensor([2.0, 0.5]))
    assert weighted.item() == pytest.approx((2 * 1 + 2 * 4 + 0.5 * 4) / 3)
    assert functional.masked_mse(prediction, target, torch.zeros_like(mask)).item() == 0.0


def test_norms_of_columns():
    table = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    assert float(functional.l2_norms(table)) == 6.0


def test_features_are_centred_and_scaled():
    features = draw(20, 5) + 10
    mean = functional.feature_mean(features)
    torch.testing.assert_close(mean, features.mean(0))
    result = functional.standardize(features.bfloat16(), mean)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.norm(dim=1), torch.full((20,), 5**0.5))
    centred = features.bfloat16().float() - mean
    torch.testing.assert_close(result, centred / centred.norm(dim=1, keepdim=True) * 5**0.5)
    assert functional.standardize(mean, mean).tolist() == [0.0] * 5


# -- closed form -------------------------------------------------------------------------------------------------------


def naive(ids, history, target, penalty, mask, scale, offset, prior):
    """One test after the other, by the formula."""
    order, columns = history.shape[1:]
    A, B = torch.zeros(order, N, columns, dtype=torch.float64), torch.zeros(N, columns, dtype=torch.float64)
    design = functional.counts(ids, N).double() * scale.double()[:, None]
    for test in range(columns):
        kept = mask[:, test]
        past = history[kept, :, test].double()
        X = torch.cat([design[kept] * past[:, [k]] for k in range(order)] + [design[kept]], 1)
        start = torch.zeros((order + 1) * N, dtype=torch.float64)
        start[(order - 1) * N : order * N], start[order * N :] = prior
        y = target[kept, test].double() - offset * past[:, -1] - X @ start
        w = start + torch.linalg.solve(X.T @ X + penalty * torch.eye(X.shape[1], dtype=torch.float64), X.T @ y)
        *a, b = w.reshape(order + 1, N)
        A[:, :, test], B[:, test] = torch.stack(a), b
    return Factors(A, B)


@pytest.mark.parametrize("form", ["primal", "dual", None])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("offset", "prior"), [(0.0, (0.25, 0.0)), (1.0, (0.0, 0.0)), (0.0, (0.1, 0.05))])
def test_closed_form_equals_the_formula(form, order, offset, prior):
    rows = 15
    ids = ids_of(rows, 3) % 7  # examples 7 and 8 never occur
    ids[4, 1:], ids[5, 2] = -1, ids[5, 1]
    history, target = draw(rows, order, M), draw(rows, M, seed=1)
    mask, scale = draw(rows, M, seed=2) > -1, torch.rand(rows)
    fits = ridge(ids, history.bfloat16().float(), target, N, [0.5, 2.0], mask, scale, offset, prior, form)
    for penalty, fit in zip((0.5, 2.0), fits, strict=True):
        expected = naive(ids, history.bfloat16().float(), target, penalty, mask, scale, offset, prior)
        torch.testing.assert_close(fit.A, expected.A)
        torch.testing.assert_close(fit.B, expected.B)
        assert fit.A[-1, 7:].unique().tolist() == [prior[0]]
        assert fit.B[7:].unique().tolist() == [prior[1]]


def test_tests_are_solved_in_parts(monkeypatch):
    ids, history, target = ids_of(15, 3), draw(15, 1, M), draw(15, M, seed=1)
    (whole,) = ridge(ids, history, target, N, [1.0])
    monkeypatch.setattr(functional, "ELEMENTS", 1)
    (parts,) = ridge(ids, history, target, N, [1.0])
    torch.testing.assert_close(parts.A, whole.A)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_closed_form_recovers_the_system_that_made_the_runs(offset):
    A, B = draw(1, N, M, scale=0.05), draw(N, M, seed=1, scale=0.05)
    if not offset:
        A = A + 1 / 3
    start, ids = draw(30, M, seed=2).abs() + 1, ids_of(30, 12, 3)
    scale = 0.5 + torch.rand(30, 12, generator=torch.Generator().manual_seed(0)) / 2 if offset else torch.ones(30, 12)
    values = rollout(start, ids, A, B, scale, offset).double()
    fit = ridge(
        ids.flatten(0, 1),
        values[:, :-1].flatten(0, 1)[:, None],
        values[:, 1:].flatten(0, 1),
        N,
        [1e-6],
        scale=scale.flatten(),
        offset=offset,
        prior=(0.0 if offset else 1 / 3, 0.0),
    )[0]
    torch.testing.assert_close(fit.A.float(), A, rtol=0, atol=2e-3)
    new = ids_of(4, 12, 3, seed=9)
    truth = rollout(start[:4], new, A, B, offset=offset)
    torch.testing.assert_close(rollout(start[:4], new, *fit, offset=offset), truth, rtol=0, atol=1e-3)


def test_closed_form_needs_a_positive_penalty():
    with pytest.raises(ValueError, match=r"ridge.penalties must be positive, got \[1.0, 0.0\]"):
        ridge(ids_of(3, 2), draw(3, 1, M), draw(3, M), N, [1.0, 0.0])
