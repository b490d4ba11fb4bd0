"""Pictures of simulations: the files, and the numbers below them."""

import re

import pytest
import torch
from PIL import Image

from lit_models.influence.counterfactual import Change, Ranking
from lit_models.influence.metrics import TrajectoryErrors, spearman
from lit_models.influence.mislabels import inspect
from lit_models.influence.plots import (
    change_caption,
    inspection_caption,
    plot_change,
    plot_inspection,
    plot_ranking,
    plot_trajectories,
    spread_tests,
    trajectory_caption,
)

T, M = 9, 7


def curves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(T + 1, M, generator=generator).cumsum(0)
    return truth + torch.rand(T + 1, M, generator=generator) * torch.arange(1, M + 1), truth


def caption_of(path):
    """Caption that a picture holds; the file must be a picture with something in it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.convert("L").getcolors(256)) > 20
        return picture.text["Description"]


def test_captions_have_the_numbers_of_the_metrics(tmp_path):
    prediction, truth = curves()
    truth[3, 2] = truth[4] = torch.nan
    meter = TrajectoryErrors()
    meter.update(prediction[None], truth[None])
    values = meter.compute()
    path = plot_trajectories(prediction, truth, range(M), tmp_path / "a" / "curves.png", title="run")
    caption = caption_of(path)
    assert caption == trajectory_caption(prediction, truth)
    mse, rho, tests = re.fullmatch(
        r"all-steps MSE (\S+), final-step Spearman (\S+), over (\d+) tests", caption
    ).groups()
    assert float(mse) == pytest.approx(float(values["all_steps_mse"]), rel=1e-3)
    assert float(rho) == pytest.approx(float(values["final_spearman"]), abs=1e-3)
    assert int(tests) == M
    known = truth[1:].isfinite()
    assert float(mse) == pytest.approx(
        float(torch.stack([(prediction - truth)[1:, j][known[:, j]].square().mean() for j in range(M)]).mean()),
        rel=1e-3,
    )
    assert [item.name for item in path.parent.iterdir()] == ["curves.png"]


def test_captions_of_several_runs_are_over_all_of_them():
    pairs = [curves(seed) for seed in range(3)]
    prediction, truth = (torch.stack(part) for part in zip(*pairs, strict=True))
    meter = TrajectoryErrors()
    meter.update(prediction, truth)
    assert f"{float(meter.compute()['all_steps_mse']):.4g}" in trajectory_caption(prediction, truth)


def test_shown_tests_reach_from_the_best_to_the_worst():
    prediction, truth = curves()
    order = (prediction - truth)[1:].square().mean(0).argsort().tolist()
    assert spread_tests(prediction, truth, 3) == [order[0], order[3], order[-1]]
    assert spread_tests(prediction, truth, 20) == order
    moves = (prediction[-1] - prediction[0]).argsort().tolist()
    assert spread_tests(prediction, None, 2) == [moves[0], moves[-1]]


def test_curricula_without_truth_are_drawn_too(tmp_path):
    prediction, _ = curves()
    path = plot_trajectories(prediction, None, range(M), tmp_path / "x.png", steps=torch.arange(T + 1) + 3)
    expected = (
        f"{float(prediction[0].mean()):.4g} at the start, {float(prediction[-1].mean()):.4g} simulated at step 12"
    )
    assert expected in caption_of(path)
    with pytest.raises(ValueError, match="tests: there are none to draw"):
        plot_trajectories(prediction[:, :0], None, [], tmp_path / "x.png")


def test_changes_are_drawn_beside_the_truth(tmp_path):
    (before, true_before), (after, true_after) = curves(0), curves(1)
    change, truth = Change(before, after), Change(true_before, true_after)
    caption = caption_of(plot_change(change, tmp_path / "x.png", truth, names=("all", "without")))
    simulated, true = after[-1] - before[-1], true_after[-1] - true_before[-1]
    assert f"{float(simulated.mean()):+.4g} simulated, {float(true.mean()):+.4g} retrained" in caption
    assert f"Spearman of the changes {float(spearman(simulated, true)):.3f} over {M} tests" in caption
    draws = Change(before, torch.stack([after, after + 1]))
    assert caption_of(plot_change(draws, tmp_path / "y.png")) == change_caption(draws)
    assert f"{float(simulated.mean()) + 0.5:+.4g} simulated" in change_caption(draws)


def test_rankings_are_drawn_with_texts(tmp_path):
    ranking = Ranking(torch.arange(40), torch.linspace(-1, 2, 40))
    texts = {0: "costs $5 or $6", 39: "a long text " * 30}
    caption = caption_of(plot_ranking(ranking, tmp_path / "x.png", texts))
    assert caption.endswith("16 of 40 examples, from -1 to +2")
    assert "3 of 3 examples" in caption_of(plot_ranking(Ranking(*(part[:3] for part in ranking)), tmp_path / "y.png"))
    with pytest.raises(ValueError, match="ranking: there are no examples"):
        plot_ranking(Ranking(*(part[:0] for part in ranking)), tmp_path / "z.png")


def test_inspections_are_drawn_with_their_areas(tmp_path):
    flipped = torch.arange(20) % 3 == 0
    found = {"self_alpha": inspect(flipped + torch.rand(20), flipped), "train_loss": inspect(torch.rand(20), flipped)}
    path = plot_inspection(found, tmp_path / "x.png", {"self_alpha": [(0.0, 0.7), (0.4, 0.9)]})
    caption = caption_of(path)
    assert caption == inspection_caption(found).replace("; ", "\n")
    for name, curve in found.items():
        assert f"{name}: AUC {curve.values['auc']:.3f}, {curve.values['found_40']:.0%} found at 40%" in caption
    with pytest.raises(ValueError, match="curves: there are none"):
        plot_inspection({}, tmp_path / "y.png")
