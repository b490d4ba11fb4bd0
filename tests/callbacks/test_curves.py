import pytest
import torch

from callbacks import LearningCurves
from callbacks.curves import plot_curves
from tests.callbacks.tiny import Tiny, trainer

PNG = b"\x89PNG\r\n\x1a\n"


def fit(folder, callback, ckpt_path=None, **options):
    run = trainer(folder, callbacks=[callback], **options)
    run.fit(Tiny(), ckpt_path=ckpt_path, weights_only=True)
    return run


def is_png(path):
    return path.read_bytes().startswith(PNG)


def steps(callback, metric):
    return [step for step, _ in callback.history[metric]]


def test_draws_a_png_of_all_metrics_at_the_end(tmp_path):
    curves = LearningCurves()
    fit(tmp_path, curves)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert is_png(tmp_path / "curves.png")
    assert steps(curves, "train/loss") == list(range(1, 13))
    assert steps(curves, "val/loss") == [6, 12]  # the sanity check before training leaves nothing


def test_keeps_the_chosen_metrics_only(tmp_path):
    curves = LearningCurves(["val/loss"], filename="one.png")
    fit(tmp_path, curves, max_epochs=1)
    assert list(curves.history) == ["val/loss"]
    assert is_png(tmp_path / "one.png")


def test_draws_every_n_batches_across_epochs(tmp_path, monkeypatch):
    drawn = []
    curves = LearningCurves(every_n_steps=4)
    monkeypatch.setattr("callbacks.curves.plot_curves", lambda history, path: drawn.append(history["train/loss"][-1]))
    fit(tmp_path, curves)
    assert [step for step, _ in drawn] == [4, 8, 12, 12]


def test_history_survives_a_resume(tmp_path):
    whole = LearningCurves(["train/loss"])
    run = fit(tmp_path, whole, max_steps=4, limit_val_batches=0)
    run.save_checkpoint(tmp_path / "four.ckpt")
    saved = torch.load(tmp_path / "four.ckpt", weights_only=True)
    assert len(saved["callbacks"]["LearningCurves"]["history"]["train/loss"]) == 4
    resumed = LearningCurves(["train/loss"])
    fit(tmp_path, resumed, ckpt_path=tmp_path / "four.ckpt", limit_val_batches=0)
    assert steps(resumed, "train/loss") == list(range(1, 13))
    assert resumed.history["train/loss"][:4] == whole.history["train/loss"]


def test_no_values_no_picture(tmp_path):
    fit(tmp_path, LearningCurves(["misspelt"]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"callbacks\.LearningCurves\.metrics"):
        plot_curves({}, tmp_path / "curves.png")


def test_several_runs_in_one_picture(tmp_path):
    runs = {"a": {"score": [(1, 0.0), (2, 1.0)], "kl": [(1, 0.0)]}, "b": {"score": [(1, 0.5)]}}
    path = plot_curves(runs, tmp_path / "new" / "both.png", title="two runs")
    assert path == tmp_path / "new" / "both.png"
    assert is_png(path)


@pytest.mark.slow
def test_two_processes_draw_one_picture(tmp_path):
    fit(tmp_path, LearningCurves(every_n_steps=2), devices=2, strategy="ddp_fork", max_epochs=1, num_sanity_val_steps=0)
    assert is_png(tmp_path / "curves.png")
