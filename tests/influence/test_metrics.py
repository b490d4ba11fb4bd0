"""Errors of trajectories, rank correlations, wrong labels and retrained subsets, against plain computations."""

import math

import pytest
import torch

from lit_models.influence import metrics
from lit_models.influence.metrics import LinearDatamodelingScore, MislabelDetection, TrajectoryErrors

NAN = torch.nan


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank(values):
    """Average ranks, by counting."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def correlation(a, b):
    a, b = torch.tensor(rank(a), dtype=torch.float64), torch.tensor(rank(b), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# -- rank correlation --------------------------------------------------------------------------------------------------


def test_equal_values_share_their_ranks():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert metrics.average_ranks(values).tolist() == [[3.5, 1.0, 3.5, 2.0], [2.5] * 4]
    assert metrics.average_ranks(values.T[:, :1].T).dtype == torch.float64


def test_spearman_with_ties():
    a, b = (draw(7, 12) * 2).round(), (draw(7, 12, seed=1) * 2).round()
    expected = [correlation(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(metrics.spearman(a, b), torch.tensor(expected, dtype=torch.float64))
    assert float(metrics.spearman(a[0], -a[0])) == pytest.approx(-1.0)
    assert metrics.spearman(a.bfloat16().reshape(7, 1, 12), b.reshape(7, 1, 12)).shape == (7, 1)


def test_spearman_leaves_out_what_was_not_measured():
    a, b = torch.tensor([1.0, NAN, 3.0, 2.0, 9.0]), torch.tensor([1.0, 5.0, 2.0, 3.0, NAN])
    assert float(metrics.spearman(a, b)) == pytest.approx(correlation([1, 3, 2], [1, 2, 3]))


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1.0, NAN, NAN], [NAN, NAN, NAN]])
def test_spearman_of_constants_is_undefined(values):
    assert metrics.spearman(torch.tensor(values), torch.tensor([1.0, 2.0, 3.0])).isnan()


# -- trajectories ------------------------------------------------------------------------------------------------------


def test_errors_without_the_start_and_without_gaps():
    prediction = torch.tensor([[[7.0, 0.0], [1.0, 2.0], [2.0, 2.0], [4.0, 2.0]]])
    truth = torch.tensor([[[9.0, 9.0], [2.0, NAN], [2.0, NAN], [1.0, 5.0]]])
    errors = metrics.trajectory_errors(prediction, truth)
    assert errors.mse.tolist() == [pytest.approx([(1 + 0 + 9) / 3, 9.0])]
    assert errors.mae.tolist() == [pytest.approx([(1 + 0 + 3) / 3, 3.0])]
    mean = 5 / 3
    spread = 2 * (2 - mean) ** 2 + (1 - mean) ** 2
    assert float(errors.r2[0, 0]) == pytest.approx(1 - 10 / spread)
    assert errors.r2[0, 1].isnan()  # one value has no deviation
    later = metrics.trajectory_errors(prediction, truth, given=2)
    assert later.mse.tolist() == [pytest.approx([(0 + 9) / 2, 9.0])]


def test_means_and_population_deviations():
    prediction, truth = draw(5, 8, 6), draw(5, 8, 6, seed=1)
    truth[0, 3, 2], truth[2, 1:, 4] = NAN, NAN  # a value, and all of a test in a run
    meter = TrajectoryErrors()
    meter.update(prediction[:2], truth[:2])
    meter.update(prediction[2:], truth[2:])
    values = {name: float(value) for name, value in meter.compute().items()}
    mse, mae, rho = [], [], []
    for run in range(5):
        for test in range(6):
            kept = ~truth[run, 1:, test].isnan()
            if kept.any():
                error = (prediction[run, 1:, test] - truth[run, 1:, test])[kept]
                mse.append(float(error.square().mean()))
                mae.append(float(error.abs().mean()))
        kept = ~truth[run, -1].isnan()
        rho.append(correlation(prediction[run, -1][kept].tolist(), truth[run, -1][kept].tolist()))
    assert len(mse) == 29
    for name, numbers in (("all_steps_mse", mse), ("all_steps_mae", mae), ("final_spearman", rho)):
        mean = sum(numbers) / len(numbers)
        assert values[name] == pytest.approx(mean, rel=1e-5)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))
        assert values[f"{name}_std"] == pytest.approx(deviation, rel=1e-5)
    assert values["final_spearman_undefined"] == 0


def test_runs_of_different_lengths():
    prediction, truth = draw(2, 6, 4), draw(2, 6, 4, seed=1)
    together, apart = TrajectoryErrors(), TrajectoryErrors()
    together.update(prediction, truth, torch.tensor([5, 3]))
    apart.update(prediction[:1], truth[:1])
    apart.update(prediction[1:, :4], truth[1:, :4])
    for name, value in together.compute().items():
        assert float(value) == pytest.approx(float(apart.compute()[name])), name


def test_a_constant_run_is_left_out_and_counted():
    prediction, truth = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    truth[1, -1] = 1.0
    meter = TrajectoryErrors()
    meter.update(prediction, truth)
    values = meter.compute()
    rho = metrics.final_spearman(prediction, truth)
    assert values["final_spearman_undefined"] == 1
    assert float(values["final_spearman"]) == pytest.approx(float((rho[0] + rho[2]) / 2))
    assert float(values["final_spearman_std"]) == pytest.approx(float((rho[0] - rho[2]).abs() / 2))


def test_one_run_has_no_deviation_over_runs():
    meter = TrajectoryErrors()
    meter.update(draw(1, 4, 5), draw(1, 4, 5, seed=1))
    values = meter.compute()
    assert "final_spearman_std" not in values
    meter.reset()
    meter.update(torch.ones(1, 4, 5), torch.ones(1, 4, 5))
    values = meter.compute()
    assert values["all_steps_mse"] == values["all_steps_mse_std"] == 0
    assert values["final_spearman"].isnan()
    assert values["curve_r2"].isnan()
    assert values["final_spearman_undefined"] == 1


def test_predictions_that_left_the_numbers_are_infinitely_wrong():
    prediction, truth = draw(1, 4, 5), draw(1, 4, 5, seed=1)
    prediction[0, 2, 1], prediction[0, 3, 2] = NAN, torch.inf
    meter = TrajectoryErrors()
    meter.update(prediction, truth)
    assert meter.compute()["all_steps_mse"].isinf()


def test_perfect_predictions():
    truth = draw(2, 5, 4)
    meter = TrajectoryErrors()
    meter.update(truth.clone(), truth)
    values = meter.compute()
    assert values["all_steps_mae"] == 0
    assert values["final_spearman"] == pytest.approx(1.0)
    assert values["curve_r2"] == 1


def test_trivial_predictions():
    start = torch.tensor([[1.0, 2.0]])
    assert metrics.persistence(start, 2).tolist() == [[[1.0, 2.0]] * 3]
    runs = torch.tensor([[[1.0, 1.0], [2.0, NAN], [3.0, NAN]], [[3.0, 3.0], [4.0, NAN], [NAN, NAN]]])
    assert metrics.mean_trajectory(runs).tolist() == [[2.0, 2.0], [3.0, 2.0], [3.0, 2.0]]
    assert metrics.mean_trajectory(torch.full((1, 2, 1), NAN)).isnan().all()


# -- scale of influence ------------------------------------------------------------------------------------------------


def test_scale_by_least_squares():
    influence, truth = draw(3, 6, 4).cumsum(1), draw(3, 7, 4, seed=1)
    truth[0, 3, 2] = NAN
    fit = metrics.fit_scale(influence, truth)
    drop = truth[:, :1] - truth[:, 1:]
    kept = ~drop.isnan()

    def error(scale):
        return float((drop - scale * influence)[kept].double().square().sum())

    assert float(fit.residual) == pytest.approx(error(float(fit.scale)), rel=1e-5)
    assert error(float(fit.scale)) < min(error(float(fit.scale) + 0.01), error(float(fit.scale) - 0.01))
    exact = metrics.fit_scale(influence, torch.cat([torch.ones(3, 1, 4), 1 - 0.25 * influence], 1))
    assert float(exact.scale) == pytest.approx(0.25, rel=1e-5)
    assert metrics.fit_scale(torch.zeros(2, 3), draw(3, 3)).scale == 0


# -- wrong labels ------------------------------------------------------------------------------------------------------


def test_area_with_ties_is_the_chance_of_the_right_order():
    scores, positive = (draw(40) * 2).round(), draw(40, seed=1) > 0.3
    pairs = [(float(p > n) + 0.5 * float(p == n)) for p in scores[positive] for n in scores[~positive]]
    assert float(metrics.auc(scores, positive)) == pytest.approx(sum(pairs) / len(pairs))
    assert metrics.auc(scores, torch.ones(40, dtype=torch.bool)).isnan()


def test_found_after_inspecting_a_part():
    scores = torch.tensor([5.0, 4.0, 4.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0])
    positive = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1, 0, 0]).bool()
    assert float(metrics.found_at(scores, positive, 0.1)) == 0.25
    assert float(metrics.found_at(scores, positive, 0.2)) == pytest.approx((1 + 1 / 3) / 4)
    assert float(metrics.found_at(scores, positive, 0.4)) == 0.5
    assert float(metrics.found_at(scores, positive, 1.0)) == 1.0
    assert float(metrics.found_at(scores, positive, 0.0)) == 0.0


def test_detection_over_batches():
    scores, positive = draw(50), draw(50, seed=1) > 0
    meter = MislabelDetection((0.1, 0.5))
    meter.update(scores[:20], positive[:20])
    meter.update(scores[20:], positive[20:].long())
    values = meter.compute()
    assert values.keys() == {"auc", "found_10", "found_50"}
    assert float(values["auc"]) == pytest.approx(float(metrics.auc(scores, positive)))
    assert float(values["found_50"]) == pytest.approx(float(metrics.found_at(scores, positive, 0.5)))
    found, vain = meter.curve()
    assert found[0] == vain[0] == 0
    assert found[-1] == vain[-1] == 1
    assert float(torch.trapezoid(found, vain)) == pytest.approx(float(values["auc"]), rel=1e-5)
    assert float(found[25]) == pytest.approx(float(values["found_50"]))


# -- retrained subsets -------------------------------------------------------------------------------------------------


def test_datamodeling_scores():
    scores, targets = draw(10, 3), draw(6, 3, seed=1)
    subsets = [[5, 4, 7], [2, 6], [1, 0, 2, 3], [9], [8, 1], [3, 4, 5, 6]]
    rho = metrics.datamodeling_scores(scores, subsets, targets)
    for test in range(3):
        sums = [float(sum(scores[i, test] for i in subset)) for subset in subsets]
        assert float(rho[test]) == pytest.approx(correlation(sums, targets[:, test].tolist()))
    meter = LinearDatamodelingScore()
    meter.update(scores[:, :2], subsets, targets[:, :2])
    meter.update(scores[:, 2:], subsets, targets[:, 2:])
    meter.update(scores[:, 2:], subsets, torch.ones(6, 1))
    values = meter.compute()
    assert float(values["lds"]) == pytest.approx(float(rho.mean()))
    assert values["undefined"] == 1
