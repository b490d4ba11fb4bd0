import math
import time

import pytest
from lightning.pytorch import Callback

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
