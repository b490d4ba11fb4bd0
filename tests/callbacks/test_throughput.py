import math
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import Throughput
from callbacks.throughput import peak_memory
from tests.callbacks.tiny import Tiny, trainer

KEYS = {"perf/tokens_per_s", "perf/step_s", "perf/data_s", "perf/memory_gib"}


class SlowValidation(Callback):
    """Validation that takes far longer than a step."""

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            time.sleep(0.3)


class Values(Callback):
    """What was logged after each batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({key: float(trainer.callback_metrics[key]) for key in KEYS})


def fit(folder, *callbacks, **options):
    values = Values()
    trainer(folder, callbacks=[Throughput(window=4), *callbacks, values], **options).fit(Tiny())
    return values.rows


def test_all_keys_are_logged_and_finite(tmp_path):
    rows = fit(tmp_path)
    assert len(rows) == 12
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["perf/step_s"] > 0
        assert row["perf/data_s"] >= 0
        assert row["perf/tokens_per_s"] == pytest.approx(100 / (row["perf/step_s"] + row["perf/data_s"]), rel=1e-3)


def test_validation_is_not_waiting_for_data(tmp_path):
    rows = fit(tmp_path, SlowValidation(), val_check_interval=3, max_epochs=1)
    assert max(row["perf/data_s"] for row in rows) < 0.05  # a fourth of the validation would be 0.075


def test_a_module_without_token_counts_has_a_rate_of_zero(tmp_path):
    model = Tiny()
    model.step_stats = dict
    run = trainer(tmp_path, callbacks=[Throughput()], max_epochs=1)
    run.fit(model)
    assert run.callback_metrics["perf/tokens_per_s"] == 0


def test_peak_memory_is_that_of_a_python_process():
    assert 0.01 < peak_memory() < 200


def test_a_run_resumed_within_an_epoch_did_not_wait_since_the_machine_started(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=3).fit(Tiny())
    values = Values()
    resumed = trainer(tmp_path, callbacks=[Throughput(), values], max_steps=4)
    resumed.fit(Tiny(), ckpt_path=tmp_path / "two.ckpt")
    assert [row["perf/data_s"] < 1 for row in values.rows] == [True, True]


class UnequalRanks(Tiny):
    """Each process has its own number of tokens."""

    def step_stats(self):
        return {"tokens": 100.0 + 200.0 * self.global_rank}

    def on_train_end(self):
        seconds = self.trainer.callback_metrics["perf/step_s"] + self.trainer.callback_metrics["perf/data_s"]
        tokens = float(self.trainer.callback_metrics["perf/tokens_per_s"] * seconds)
        (Path(self.trainer.default_root_dir) / f"{self.global_rank}.txt").write_text(str(tokens))


@pytest.mark.slow
def test_tokens_of_all_processes_are_added(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: float(next(clock)))  # one second per look
    run = trainer(tmp_path, callbacks=[Throughput()], devices=2, strategy="ddp_fork", max_epochs=1, limit_val_batches=0)
    run.fit(UnequalRanks())
    assert [float((tmp_path / f"{rank}.txt").read_text()) for rank in (0, 1)] == pytest.approx([400.0, 400.0])


class SlowSaving(Callback):
    """A checkpoint that takes far longer than a step."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        time.sleep(0.3)


def test_writing_a_checkpoint_is_not_waiting_for_data(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    rows = fit(tmp_path, SlowSaving(), saver, enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
    assert max(row["perf/data_s"] for row in rows) < 0.05
