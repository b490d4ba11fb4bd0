import math

import pytest
import torch

from callbacks import LearningCurves
from callbacks.curves import plot_curves, running_mean
from tests.callbacks.tiny import Tiny, trainer

PNG = b"\x89PNG"


def fit(folder, callback, ckpt_path=None, **options):
    run = trainer(folder, callbacks=[callback], **options)
    run.fit(Tiny(), ckpt_path=ckpt_path, weights_only=True)
    return run


def test_history_holds_each_logged_value_once(tmp_path):
    curves = LearningCurves()
    fit(tmp_path, curves, val_check_interval=3)
    assert [step for step, _ in curves.history["train/loss"]] == list(range(1, 13))
    assert curves.history["constant"] == [(step, 1.0) for step in range(1, 13)]
    assert [step for step, _ in curves.history["val/loss"]] == [3, 6, 9, 12]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.glob("*.png")] == ["curves.png"]


def test_values_are_kept_as_often_as_the_trainer_logs(tmp_path):
    curves = LearningCurves(["train/loss"])
    fit(tmp_path, curves, log_every_n_steps=5)
    steps = [step for step, _ in curves.history["train/loss"]]
    assert {5, 10} <= set(steps) <= {5, 6, 10, 12}  # and at the ends of epochs and validations
    assert list(curves.history) == ["train/loss"]


def test_a_resumed_run_draws_whole_curves(tmp_path):
    whole = LearningCurves()
    run = fit(tmp_path, whole, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    resumed = LearningCurves()
    fit(tmp_path, resumed, tmp_path / "a.ckpt")
    assert [step for step, _ in resumed.history["train/loss"]] == list(range(1, 13))
    assert resumed.history["train/loss"][:6] == whole.history["train/loss"]


def test_a_run_killed_after_its_last_step_is_drawn_when_it_resumes(tmp_path):
    fit(tmp_path, LearningCurves()).save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "curves.png").unlink()
    fit(tmp_path, LearningCurves(), tmp_path / "a.ckpt")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("every", "pictures"), [(None, 1), (4, 4), (5, 3)])
def test_pictures_are_drawn_across_epochs(tmp_path, monkeypatch, every, pictures):
    drawn = []
    monkeypatch.setattr("callbacks.curves.plot_curves", lambda history, path: drawn.append(path))
    fit(tmp_path, LearningCurves(every_n_steps=every, filename="a.png"))
    assert drawn == [tmp_path / "a.png"] * pictures


@pytest.mark.slow
def test_two_processes_draw_one_picture(tmp_path):
    fit(tmp_path, LearningCurves(every_n_steps=2), devices=2, strategy="ddp_fork", max_epochs=1)
    assert (tmp_path / "curves.png").is_file()


def test_runs_are_drawn_over_each_other(tmp_path):
    long = [(step, math.sin(step / 9)) for step in range(200)]
    runs = {"one": {"loss": long, "kl": [(1, 2.0)]}, "two": {"loss": [(1, 1.0), (2, math.nan), (3, 0.5)]}}
    path = plot_curves(runs, tmp_path / "deep" / "a.png", title="two runs", labels={"kl": "divergence"})
    assert path.read_bytes().startswith(PNG)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.LearningCurves\.metrics"):
        plot_curves({}, tmp_path / "a.png")


def test_running_mean():
    assert running_mean([1.0, 2.0, 6.0, math.nan], 1) == [1.5, 3.0, 4.0, 6.0]
    assert math.isnan(running_mean([math.nan, math.inf], 0)[1])
