import csv
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import AppendingCSVLogger
from tests.callbacks.tiny import Tiny, trainer


def rows(folder, file="metrics.csv"):
    with (folder / file).open(newline="") as handle:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(handle)]


def steps(folder):
    return [int(row["step"]) for row in rows(folder)]


def log(folder, *values, **options):
    """Log (step, metrics) as one process of a resumed run does."""
    logger = AppendingCSVLogger(str(folder), **options)
    for step, metrics in values:
        logger.log_metrics(metrics, step)
        logger.save()
    return logger


def test_values_of_a_step_share_a_row(tmp_path):
    logger = log(tmp_path, (0, {"loss": 2.0, "epoch": 0}), (0, {"val": torch.tensor(0.5)}), (1, {"loss": 1.0}))
    logger.flush()
    logger.log_metrics({"late": 3.0}, 1)
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"step": "0", "loss": "2.0", "epoch": "0", "val": "0.5"},
        {"step": "1", "loss": "1.0", "late": "3.0"},
    ]


def test_new_columns_keep_old_rows(tmp_path):
    log(tmp_path, *((step, {f"m{step // 7}": step}) for step in range(50)), flush_every=3).flush()
    assert [(int(row["step"]), float(row[f"m{int(row['step']) // 7}"])) for row in rows(tmp_path)] == [
        (step, float(step)) for step in range(50)
    ]


def test_a_resumed_process_replaces_the_steps_it_runs_again(tmp_path):
    log(tmp_path, *((step, {"loss": 1.0, "old": 1.0}) for step in range(10))).flush()
    log(tmp_path, (6, {"loss": 2.0}), (7, {"loss": 2.0})).flush()
    assert steps(tmp_path) == list(range(8))
    assert [float(row["loss"]) for row in rows(tmp_path)] == [1.0] * 6 + [2.0] * 2
    assert rows(tmp_path)[6]["old"] == "1.0"  # what the same step had logged before the checkpoint
    assert "old" not in rows(tmp_path)[7]


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
    log(tmp_path, *((step, {"loss": 1.0, "other": 1.0}) for step in range(3))).flush()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,1.")
    log(tmp_path, (3, {"loss": 2.0})).flush()
    assert [row.get("loss") for row in rows(tmp_path)] == ["1.0", "1.0", "1.0", "2.0"]


def test_rows_cost_constant_time(tmp_path):
    logger = log(tmp_path, (0, {"loss": 1.0}))
    start = time.process_time()
    for step in range(1, 5001):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()
    assert time.process_time() - start < 2.0
    logger.finalize("success")
    assert steps(tmp_path) == list(range(5001))


def fit(folder, max_steps, ckpt_path=None):
    saver = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    run = trainer(
        folder,
        logger=AppendingCSVLogger(str(folder)),
        callbacks=[saver],
        enable_checkpointing=True,
        max_steps=max_steps,
        max_epochs=None,
        val_check_interval=3,
    )
    run.fit(Tiny(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("saved", [4, 8])
def test_a_resumed_run_has_every_step_once(tmp_path, saved):
    fit(tmp_path, 10)
    whole = rows(tmp_path)
    assert [int(row["step"]) for row in whole] == list(range(10))
    assert [int(row["step"]) for row in whole if "val/loss" in row] == [2, 5, 8]
    fit(tmp_path, 12, tmp_path / "ckpt" / f"step={saved}.ckpt")
    resumed = rows(tmp_path)
    assert [int(row["step"]) for row in resumed] == list(range(12))
    assert [int(row["step"]) for row in resumed if "val/loss" in row] == [2, 5, 8, 11]
    assert resumed[:saved] == whole[:saved]


def test_rows_are_on_the_disk_when_a_checkpoint_is(tmp_path):
    logger = log(tmp_path, (0, {"loss": 1.0}), (1, {"loss": 1.0}))
    logger.after_save_checkpoint(ModelCheckpoint(tmp_path))
    assert steps(tmp_path) == [0, 1]


def test_a_new_run_begins_a_new_file(tmp_path):
    fit(tmp_path, 10)
    fit(tmp_path, 2)
    assert steps(tmp_path) == [0, 1]


def test_evaluation_leaves_the_training_log_alone(tmp_path):
    fit(tmp_path, 4)
    before = (tmp_path / "metrics.csv").read_bytes()
    for _ in range(2):
        trainer(tmp_path, logger=AppendingCSVLogger(str(tmp_path))).test(Tiny(), verbose=False)
        trainer(tmp_path, logger=AppendingCSVLogger(str(tmp_path))).validate(Tiny(), verbose=False)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [list(row) for row in rows(tmp_path, "test.csv")] == [["step", "test/loss", "epoch"]]
    assert len(rows(tmp_path, "validate.csv")) == 1


def test_evaluation_after_training_is_in_the_training_log(tmp_path):
    run = fit(tmp_path, 4)
    run.test(run.lightning_module, verbose=False)
    assert "test/loss" in rows(tmp_path)[-1]
    assert not (tmp_path / "test.csv").exists()


def test_hyperparameters_may_hold_objects_inside_containers(tmp_path):
    logger = AppendingCSVLogger(str(tmp_path))
    logger.log_hyperparams({"rewards": [object()], "options": {"folder": tmp_path, "lr": 0.1}, "size": (1, 2)})
    text = (tmp_path / "hparams.yaml").read_text()
    assert str(tmp_path) in text
    assert "lr: 0.1" in text
