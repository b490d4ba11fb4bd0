"""Recorded runs as data: alignment, rows, splits, evaluation, features, curricula, resume and refusals."""

import json
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.numpy import save_file

from datamodules.assets import asset_path
from datamodules.dynamics import DynamicsData
from lit_models.recording import DynamicsRun, RunWriter, find_runs, read_examples, write_examples, write_run

POOL, TESTS, STEPS = 10, 4, 6
TINY = asset_path("dynamics_tiny")


def values_of(run, steps=STEPS, tests=TESTS):
    """(steps+1, tests), a number that tells run, step and test."""
    table = 100.0 * run + np.arange(steps + 1)[:, None] + np.arange(tests) / 10
    return table.astype(np.float32)


def ids_of(run, steps=STEPS, batch=2):
    return [[(run + step + place) % POOL for place in range(batch)] for step in range(steps)]


def lr_of(run, steps=STEPS):
    return 0.4 - 0.05 * np.arange(steps)


def save(folder, run, values=None, ids=None, lr=None, rec_step=None, skipped=None, metrics=None, **info):
    values = values_of(run) if values is None else values
    rec_step = list(range(len(values))) if rec_step is None else rec_step
    ids = ids_of(run) if ids is None else ids
    info = {"test_ids": list(range(10, 10 + values.shape[1])), "pool_size": POOL, "pool_fingerprint": "a"} | info
    lr = lr_of(run, len(ids)) if lr is None else lr
    write_run(folder / f"run-{run}", info, ids, lr, rec_step, metrics or {"loss": values}, skipped)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with ten whole runs."""
    folder = tmp_path_factory.mktemp("runs")
    for run in range(10):
        save(folder, run)
    return str(folder)


def make(path, stage="fit", **options):
    data = DynamicsData(path, **({"val_runs": 0, "test_runs": 0} | options))
    data.setup(stage)
    return data


def whole(data, split="train"):
    """All rows of a split in one batch."""
    rows = data.datasets[split]
    return rows.__getitems__(range(len(rows)))


def shapes(batch):
    return {key: tuple(value.shape) for key, value in batch.items()}


# -- splits ------------------------------------------------------------------------------------------------------------


def test_split_is_that_of_the_released_code(runs):
    data = make(runs, val_runs=2, test_runs=5)
    names = [f"run-{number}" for number in range(10)]
    random.Random(42).shuffle(names)
    assert [data.run_names[number] for number in data.split_runs["val"]] == names[:2]
    assert [data.run_names[number] for number in data.split_runs["test"]] == names[2:7]
    assert [data.run_names[number] for number in data.split_runs["train"]] == names[7:]
    assert data.run_names[10:] == []


def test_named_runs_leave_the_list_before_the_shuffle(runs):
    data = make(runs, val_runs=2, test_runs=["run-8", "run-9"])
    names = [f"run-{number}" for number in range(8)]
    random.Random(42).shuffle(names)
    assert data.split_runs["test"] == [8, 9]
    assert [data.run_names[number] for number in data.split_runs["val"]] == names[:2]
    assert [data.run_names[number] for number in data.split_runs["train"]] == names[2:]


def test_another_seed_and_fewer_training_runs(runs):
    first = make(runs, val_runs=2, test_runs=2).split_runs
    assert make(runs, val_runs=2, test_runs=2, split_seed=7).split_runs != first
    assert make(runs, val_runs=2, test_runs=2, limit_train=3).split_runs["train"] == first["train"][:3]


def test_every_run_is_in_one_split(runs):
    splits = make(runs, val_runs=3, test_runs=3).split_runs
    assert sorted(number for part in splits.values() for number in part) == list(range(10))


def test_patterns_and_lists_of_runs(runs, tmp_path):
    assert make(f"{runs}/run-[0-3]").run_names == ["run-0", "run-1", "run-2", "run-3"]
    assert make([f"{runs}/run-7", f"{runs}/run-2"]).run_names == ["run-7", "run-2"]
    save(tmp_path / "more", 10)
    assert make([runs, str(tmp_path / "more")]).run_names[8:] == ["run-8", "run-9", "run-10"]


# -- rows of steps -----------------------------------------------------------------------------------------------------


def test_matrix_rows(runs):
    data = make(f"{runs}/run-[0-1]", split_seed=0)
    numbers = data.split_runs["train"]
    batch = whole(data)
    assert shapes(batch) == {
        "ids": (12, 2),
        "history": (12, 1, TESTS),
        "target": (12, TESTS),
        "mask": (12, TESTS),
        "step": (12,),
        "run": (12,),
        "lr_scale": (12,),
    }
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].all()
    assert {batch[key].dtype for key in ("ids", "step", "run")} == {torch.int64}
    assert batch["run"].tolist() == [numbers[0]] * 6 + [numbers[1]] * 6
    assert batch["step"].tolist() == [1, 2, 3, 4, 5, 6] * 2
    for row in range(12):
        run, step = int(batch["run"][row]), int(batch["step"][row])
        assert batch["ids"][row].tolist() == ids_of(run)[step - 1]
        assert batch["history"][row, 0].tolist() == pytest.approx(values_of(run)[step - 1].tolist())
        assert batch["target"][row].tolist() == pytest.approx(values_of(run)[step].tolist())
        assert float(batch["lr_scale"][row]) == pytest.approx(lr_of(run)[step - 1] / 0.4, rel=1e-6)


@pytest.mark.parametrize(
    ("pad", "first", "second"),
    [("repeat", [0, 0, 0], [0, 0, 1]), (None, [0, 0, 0], [0, 0, 1]), ("zero", [-1, -1, 0], [-1, 0, 1])],
)
def test_history_begins_with_the_oldest_value(runs, pad, first, second):
    batch = whole(make(f"{runs}/run-1", order=3, history_pad=pad))
    table = np.vstack([values_of(1), np.zeros((1, TESTS))])  # place -1 is the made-up 0
    for row, places in enumerate([first, second, [0, 1, 2]]):
        assert batch["history"][row].numpy() == pytest.approx(table[places])
    assert batch["mask"].all()


def test_rows_without_their_history_do_not_count(runs):
    data = make(f"{runs}/run-1", order=3, history_pad="skip")
    batch = whole(data)
    assert batch["mask"].any(1).tolist() == [False, False, True, True, True, True]
    assert batch["history"][0].isnan().any(1).tolist() == [True, True, False]
    assert len(make(f"{runs}/run-1", order=3, history_pad="skip", mode="pairs").datasets["train"]) == 4 * TESTS


def test_batches_of_different_sizes_are_padded(tmp_path):
    path = save(tmp_path, 0, ids=[[1, 2], [3], [], [4, 5, 4], [6], [7]])
    batch = whole(make(path))
    assert batch["ids"].tolist() == [[1, 2, -1], [3, -1, -1], [-1] * 3, [4, 5, 4], [6, -1, -1], [7, -1, -1]]


def test_values_that_were_not_measured_do_not_count(tmp_path):
    values = values_of(0)
    values[2, 1] = np.nan
    batch = whole(make(save(tmp_path, 0, values)))
    # Test 1 goes from step 1 over two steps to step 3; the others go on step by step.
    rows = [(int(step), mask.tolist()) for step, mask in zip(batch["step"], batch["mask"], strict=True)]
    every, others, alone = [True] * 4, [True, False, True, True], [False, True, False, False]
    assert sorted(rows) == sorted(
        [(1, every), (2, others), (3, alone), (3, others), (4, every), (5, every), (6, every)]
    )
    row = rows.index((3, alone))
    assert batch["ids"][row].tolist() == [ids_of(0)[1], ids_of(0)[2]]
    assert batch["lr_scale"][row].tolist() == pytest.approx([0.35 / 0.4, 0.3 / 0.4])
    assert float(batch["history"][row, 0, 1]) == pytest.approx(1.1)
    assert float(batch["target"][row, 1]) == pytest.approx(3.1)
    single = rows.index((1, every))
    assert batch["ids"][single].tolist() == [ids_of(0)[0], [-1, -1]]
    assert float(batch["lr_scale"][single, 1]) == 0


def test_records_every_two_steps_are_unrolled(tmp_path):
    path = save(tmp_path, 0, values_of(0)[::2], rec_step=[0, 2, 4, 6])
    data = make(path)
    batch = whole(data)
    assert batch["ids"].tolist() == [ids_of(0)[start : start + 2] for start in (0, 2, 4)]
    assert batch["step"].tolist() == [2, 4, 6]
    assert batch["target"][:, 0].tolist() == [2, 4, 6]
    assert batch["history"][:, 0, 0].tolist() == [0, 2, 4]
    assert whole(make(path, order=2))["history"][1, :, 0].tolist() == [1, 2]  # the line between 0 and 2


def test_interval_leaves_values_out(runs):
    batch = whole(make(f"{runs}/run-0", interval=3))
    assert batch["step"].tolist() == [3, 6]
    assert batch["ids"].shape == (2, 3, 2)
    assert batch["history"][:, 0, 0].tolist() == [0, 3]


def test_released_intervals(tmp_path, runs):
    batch = whole(make(f"{runs}/run-0", gap="released", interval=4))
    assert batch["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch["ids"].tolist() == ids_of(0)
    assert batch["history"][:, 0, 0].tolist() == [0, 0, 0, 0, 4, 4]
    assert batch["target"][:, 0].tolist() == [4, 4, 4, 4, 6, 6]
    path = save(tmp_path / "sparse", 0, values_of(0)[[0, 4, 6]], rec_step=[0, 4, 6])
    sparse = whole(make(path, gap="released"))
    for key, value in batch.items():
        assert torch.equal(value, sparse[key]), key


def test_tests_measured_in_turns(tmp_path):
    values = values_of(0)
    values[1:, :2][::2] = np.nan
    values[1:, 2:][1::2] = np.nan
    batch = whole(make(save(tmp_path, 0, values)))
    counted = {
        (int(step), int((ids >= 0).any(-1).sum())): mask.tolist()
        for step, ids, mask in zip(batch["step"], batch["ids"], batch["mask"], strict=True)
    }
    first, last = [True, True, False, False], [False, False, True, True]
    assert counted == {(2, 2): first, (4, 2): first, (6, 2): first, (1, 1): last, (3, 2): last, (5, 2): last}


def test_skipped_updates_are_left_out(tmp_path):
    values = values_of(0)
    values[3] = values[2]
    path = save(tmp_path, 0, values, skipped=[False, False, True, False, False, False])
    data = make(path)
    batch = whole(data)
    assert batch["step"].tolist() == [1, 2, 4, 5, 6]
    assert batch["ids"].tolist() == [ids for step, ids in enumerate(ids_of(0), 1) if step != 3]
    assert batch["history"][2, 0, 0] == 2
    assert batch["lr_scale"].tolist() == pytest.approx([1, 0.875, 0.625, 0.5, 0.375])
    data.datasets["test"] = data.datasets["train"]
    run = make(path, mode="runs")
    batch = whole(run)
    assert batch["length"].tolist() == [5]
    assert batch["values"][0, :, 0].tolist() == [0, 1, 2, 4, 5, 6]


def test_a_skipped_step_may_be_the_only_one_that_was_measured(tmp_path):
    values = values_of(0)[[0, 3, 6]]
    path = save(tmp_path, 0, values, rec_step=[0, 3, 6], skipped=[False, False, True, False, False, False])
    batch = whole(make(path))
    assert batch["ids"].tolist() == [[*ids_of(0)[:2], [-1, -1]], ids_of(0)[3:]]
    assert batch["target"][:, 0].tolist() == [3, 6]


def test_skipped_updates_are_inferred(tmp_path):
    values = values_of(0)
    values[3:] -= 1  # steps 2 and 3 are alike
    path = save(tmp_path, 0, values)
    assert whole(make(path))["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert whole(make(path, infer_skipped=True))["step"].tolist() == [1, 2, 4, 5, 6]
    values[3, 0] += 0.001
    path = save(tmp_path / "other", 0, values)
    assert whole(make(path, infer_skipped=True))["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_step_threshold(runs):
    assert whole(make(f"{runs}/run-0", step_threshold=4))["step"].tolist() == [4, 5, 6]
    pairs = whole(make(f"{runs}/run-0", step_threshold=4, mode="pairs"))
    assert pairs["step"].tolist() == [4, 5, 6] * TESTS


def test_pairs(runs):
    data = make(f"{runs}/run-[0-1]", mode="pairs", order=2, history_pad="zero")
    batch = whole(data)
    assert len(batch["target"]) == 2 * STEPS * TESTS
    assert set(batch) == {"order_ids", "test_ids", "prev", "target", "lr_scale", "step", "run"}
    first = data.split_runs["train"][0]
    assert batch["test_ids"][: 2 * STEPS].tolist() == [10] * STEPS + [11] * STEPS
    for row in (0, 1, STEPS, 3 * STEPS + 2, len(batch["target"]) - 1):
        run, step, test = (int(batch[key][row]) for key in ("run", "step", "test_ids"))
        table = values_of(run)[:, test - 10]
        assert batch["order_ids"][row].tolist() == ids_of(run)[step - 1]
        assert float(batch["target"][row]) == pytest.approx(table[step])
        before = 0.0 if step == 1 else table[step - 2]
        assert batch["prev"][row].tolist() == pytest.approx([before, table[step - 1]])
    assert int(batch["run"][0]) == first


def test_pairs_of_what_was_measured(tmp_path):
    values = values_of(0)
    values[2, 1] = values[6, 3] = np.nan
    batch = whole(make(save(tmp_path, 0, values), mode="pairs", gap="released"))
    left = {(int(test) - 10, int(step)) for test, step in zip(batch["test_ids"], batch["step"], strict=True)}
    assert left == {(test, step) for test in range(4) for step in range(1, 7)} - {(1, 2), (1, 3), (3, 6)}
    assert batch["target"].isfinite().all()
    assert batch["prev"].isfinite().all()


def test_both_forms_hold_the_same_values(runs):
    matrix = whole(make(f"{runs}/run-[0-2]", order=2))
    pairs = whole(make(f"{runs}/run-[0-2]", order=2, mode="pairs"))
    keyed = {
        (int(run), int(step)): (history, target)
        for run, step, history, target in zip(
            matrix["run"], matrix["step"], matrix["history"], matrix["target"], strict=True
        )
    }
    assert len(pairs["target"]) == matrix["mask"].sum()
    for run, step, test, prev, target in zip(
        pairs["run"], pairs["step"], pairs["test_ids"], pairs["prev"], pairs["target"], strict=True
    ):
        history, targets = keyed[int(run), int(step)]
        assert torch.equal(history[:, test - 10], prev)
        assert targets[test - 10] == target


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    for run in range(3):
        table = values_of(run)
        save(tmp_path, run, metrics={"loss": table, "accuracy": table / 1000})
    return str(tmp_path)


def test_several_metrics(several):
    batch = whole(make(several, metric=["loss", "accuracy"]))
    assert batch["history"].shape == (18, 1, 2, TESTS)
    assert batch["target"].shape == batch["mask"].shape == (18, 2, TESTS)
    assert torch.allclose(batch["target"][:, 0], batch["target"][:, 1] * 1000, rtol=1e-4)
    pairs = whole(make(several, metric=["loss", "accuracy"], mode="pairs"))
    assert pairs["metric"].sum() == len(pairs["metric"]) / 2
    chosen = pairs["metric"] == 1
    assert pairs["target"][chosen].max() < 1
    data = make(several, metric=["loss", "accuracy"], val_runs=1)
    assert whole(data, "val")["values"].shape == (1, STEPS + 1, 2, TESTS)
    assert data.mean_trajectory.shape == (STEPS + 1, 2, TESTS)


def test_one_of_several_metrics(several):
    assert whole(make(several, metric="accuracy"))["target"].max() < 1


def test_metrics_with_intervals_of_their_own(tmp_path):
    sparse = values_of(0) / 1000
    sparse[1::2] = np.nan
    save(tmp_path, 0, metrics={"loss": values_of(0), "accuracy": sparse})
    batch = whole(make(str(tmp_path), metric=["loss", "accuracy"]))
    counted = batch["mask"].any(-1)
    lengths = (batch["ids"] >= 0).any(-1).sum(1)
    assert (lengths[counted[:, 0]] == 1).all()
    assert (lengths[counted[:, 1]] == 2).all()
    assert counted.sum(0).tolist() == [6, 3]


# -- tests and pool ----------------------------------------------------------------------------------------------------


def test_subsets_of_tests(runs):
    assert make(runs, tests=[13, 10]).test_ids.tolist() == [10, 13]
    assert make(runs, test_ranges=[[10, 11], [13, 20]]).test_ids.tolist() == [10, 11, 13]
    assert make(runs, test_ranges=["10,13", "11,20"]).test_ids.tolist() == [10, 11, 13]
    data = make(runs, tests=[10, 11, 13], test_ranges=[[11, 13]])
    assert data.test_ids.tolist() == [11, 13]
    assert whole(data)["target"].shape[1] == 2
    assert whole(data)["target"][0, 1] - whole(data)["target"][0, 0] == pytest.approx(0.2, abs=1e-4)


def test_columns_are_found_by_their_ids(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, values_of(1)[:, ::-1], test_ids=[13, 12, 11, 10])
    batch = whole(make(str(tmp_path)))
    assert torch.allclose(batch["target"][:, 1] - batch["target"][:, 0], torch.tensor(0.1), atol=1e-4)


def test_tests_without_values_are_left_out(tmp_path):
    values = values_of(0)
    values[:, 2] = np.nan
    with pytest.warns(UserWarning, match="1 of 4 tests have no values and are left out, such as test 12"):
        data = make(save(tmp_path, 0, values))
    assert data.test_ids.tolist() == [10, 11, 13]


def test_pool(runs, tmp_path):
    assert make(runs).pool_ids.tolist() == list(range(POOL))
    save(tmp_path / "sparse", 0, ids=[[3, 40]] * STEPS, pool_ids=[3, 5, 40], pool_size=3)
    assert make(str(tmp_path / "sparse")).pool_ids.tolist() == [3, 5, 40]
    save(tmp_path / "unknown", 0, ids=[[3, 40]] * STEPS, pool_size=None)
    assert make(str(tmp_path / "unknown")).pool_ids.tolist() == [3, 40]
    write_examples(tmp_path / "unknown/pool.jsonl", [{"id": number, "text": "a"} for number in (3, 40, 41)])
    assert make(str(tmp_path / "unknown")).pool_ids.tolist() == [3, 40, 41]


def test_references(tmp_path):
    for run, top in enumerate([0.4, 0.2, 0.8]):
        save(tmp_path, run, lr=np.linspace(top, 0, STEPS), ids=[[1], [2, 3], [4, 5], [6, 7], [8, 9], [1, 2]])
    data = make(str(tmp_path), val_runs=["run-2"])
    assert data.lr_reference == pytest.approx(0.4)
    assert data.batch_reference == 2
    assert data.mean_trajectory.numpy() == pytest.approx((values_of(0) + values_of(1)) / 2)
    assert float(whole(data, "val")["lr_scale"][0, 0]) == pytest.approx(2)
    assert float(whole(make(str(tmp_path), lr_reference=0.1))["lr_scale"].max()) == pytest.approx(8)


def test_learning_rates_of_groups_are_averaged(tmp_path):
    save(tmp_path, 0, lr=np.stack([lr_of(0), np.full(STEPS, np.nan), lr_of(0) / 3], 1))
    assert whole(make(str(tmp_path), lr_reference=0.1))["lr_scale"].tolist() == pytest.approx(
        (lr_of(0) * 2 / 3 / 0.1).tolist(), rel=1e-5
    )


def test_without_learning_rates(tmp_path):
    save(tmp_path, 0, lr=np.full(STEPS, np.nan))
    data = make(str(tmp_path))
    assert "lr_scale" not in whole(data)
    assert data.lr_reference is None
    batch = whole(make(str(tmp_path), initial_lr=0.3))
    assert batch["lr_scale"].tolist() == pytest.approx([1 - step / 6 for step in range(6)])


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_rows(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, values_of(1, 4), ids_of(1, 4, 3))
    save(tmp_path, 2, values_of(2)[::3], rec_step=[0, 3, 6])
    data = make(str(tmp_path), val_runs=["run-0", "run-1"], test_runs=[])
    (batch,) = list(data.val_dataloader())
    assert shapes(batch) == {
        "ids": (2, 6, 3),
        "values": (2, 7, TESTS),
        "start": (2, TESTS),
        "length": (2,),
        "run": (2,),
        "lr_scale": (2, 6),
    }
    assert batch["length"].tolist() == [6, 4]
    assert batch["run"].tolist() == [0, 1]
    assert batch["ids"][0].tolist() == [[*row, -1] for row in ids_of(0)]
    assert batch["ids"][1, :4].tolist() == ids_of(1, 4, 3)
    assert (batch["ids"][1, 4:] == -1).all()
    assert batch["values"][1, 5:].isnan().all()
    assert torch.equal(batch["start"], batch["values"][:, 0])
    assert batch["values"][0].numpy() == pytest.approx(values_of(0))
    (batch,) = list(make(str(tmp_path), "test", test_runs=["run-2"]).test_dataloader())
    assert batch["values"][0, :, 0].isnan().tolist() == [False, True, True, False, True, True, False]


def test_evaluation_in_batches_of_runs(runs):
    data = make(runs, "test", test_runs=5, val_batch_size=2)
    assert [len(batch["run"]) for batch in data.test_dataloader()] == [2, 2, 1]
    assert len(make(runs, "test", test_runs=5).test_dataloader()) == 1


def test_simulation_starts_where_all_tests_were_measured(tmp_path):
    values = values_of(0)
    values[0, 1] = np.nan
    save(tmp_path, 0, values)
    save(tmp_path, 1)
    data = make(str(tmp_path), mode="runs")
    batch = whole(data)
    assert batch["length"].tolist() == [5, 5]
    assert sorted(batch["values"][:, 0, 0].tolist()) == [1, 101]
    assert batch["ids"][data.split_runs["train"].index(0)].tolist() == ids_of(0)[1:]


def test_runs_as_training_rows(runs):
    data = make(runs, mode="runs", val_runs=2, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["values"].shape == (4, STEPS + 1, TESTS)


# -- unseen examples ---------------------------------------------------------------------------------------------------


@pytest.fixture
def general(tmp_path):
    """Runs on ids 0 to 5, others on 6 to 9, and features of everything."""
    folder = tmp_path / "runs"
    for run in range(4):
        save(folder, run, ids=[[(run + step) % 6] for step in range(STEPS)])
    for run in (4, 5):
        save(folder, run, ids=[[6 + (run + step) % 4] for step in range(STEPS)])
    tables = {"pool": np.arange(20.0).reshape(10, 2), "tests": -np.arange(8.0).reshape(4, 2)}
    arrays = {key: value.astype(np.float32) for key, value in tables.items()}
    ids = {"pool_ids": np.arange(10), "test_ids": np.arange(10, 14)}
    save_file(arrays | ids, tmp_path / "features.safetensors")
    return {
        "path": str(folder),
        "unseen_train": [f"{folder}/run-4", f"{folder}/run-5"],
        "train_ranges": [[0, 5]],
        "test_ranges": [[10, 12]],
        "features": str(tmp_path / "features.safetensors"),
        "test_runs": 1,
        "val_runs": 1,
    }


def test_seen_examples_only(general):
    data = make(stage="test", **general)
    assert len(data.run_names) == 4
    assert data.pool_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.unseen_pool_ids is None
    assert data.unseen_test_ids is None
    assert data.train_features.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    assert data.test_features.tolist() == (-np.arange(6.0).reshape(3, 2)).tolist()
    assert "test_ids" not in whole(data, "test")


@pytest.mark.parametrize("test_on", ["unseen_train", "unseen_test", "unseen_both"])
def test_unseen_examples(general, test_on):
    data = make(stage="test", test_on=test_on, **general)
    batch = whole(data, "test")
    is_train, is_test = test_on != "unseen_test", test_on != "unseen_train"
    assert data.pool_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.test_ids.tolist() == [10, 11, 12]
    assert {data.run_names[run] for run in batch["run"]} <= ({"run-4", "run-5"} if is_train else set(data.run_names))
    assert len(batch["run"]) == (2 if is_train else 1)
    if is_train:
        assert data.unseen_pool_ids.tolist() == [6, 7, 8, 9]
        assert data.unseen_train_features.tolist() == np.arange(12.0, 20).reshape(4, 2).tolist()
    else:
        assert data.unseen_pool_ids is None
    if is_test:
        assert data.unseen_test_ids.tolist() == batch["test_ids"].tolist() == [13]
        assert data.unseen_test_features.tolist() == [[-6, -7]]
        assert batch["values"].shape == (len(batch["run"]), STEPS + 1, 1)
    else:
        assert "test_ids" not in batch
        assert batch["values"].shape[2] == 3
    data.setup("fit")
    train, val = whole(data), whole(data, "val")
    assert train["target"].shape[1] == val["values"].shape[2] == 3
    assert int(train["ids"].max()) < 6
    assert data.mean_trajectory.shape == (STEPS + 1, 3)


def test_the_training_runs_stay_the_same(general):
    splits = [make(stage="test", test_on=on, **general).split_runs["train"] for on in ("seen", "unseen_both")]
    assert splits[0] == splits[1]


def test_unseen_tests_in_a_range(general):
    general["test_ranges"] = [[10, 11]]
    data = make(stage="test", test_on="unseen_test", unseen_test=[[13, 13]], **general)
    assert data.unseen_test_ids.tolist() == [13]


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_in_other_files(runs, tmp_path):
    pool, tests = np.arange(30.0).reshape(10, 3), np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "pool.npy", pool)
    order = np.array([13, 10, 12, 11])
    save_file({"features": tests[order - 10], "ids": order}, tmp_path / "tests.safetensors")
    files = {"pool": str(tmp_path / "pool.npy"), "tests": str(tmp_path / "tests.safetensors")}
    data = make(runs, features=files)
    assert data.train_features.dtype == torch.float32
    assert data.train_features.numpy() == pytest.approx(pool)
    assert data.test_features.numpy() == pytest.approx(tests)


def test_features_of_several_processes(runs, tmp_path):
    for rank in range(2):
        pool, tests = np.arange(rank, 10, 2), np.arange(10 + rank, 14, 2)
        arrays = {"pool": pool[:, None], "tests": tests[:, None]}
        arrays = {key: value.astype(np.float16) for key, value in arrays.items()}
        save_file(arrays | {"pool_ids": pool, "test_ids": tests}, tmp_path / f"features-r{rank}.safetensors")
    data = make(runs, features=str(tmp_path))
    assert data.train_features.flatten().tolist() == list(range(10))
    assert data.test_features.flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pool": (10, 2)}, "there are no features of tests"),
        ({"pool": (9, 2), "tests": (14, 2)}, r"there are none of id 9 of pool; make them for all 10 examples"),
        ({"pool": (10, 2), "tests": (14, 3)}, "pool examples have 2 features and tests 3"),
        ({"pool": (10,), "tests": (14, 3)}, r"of shape \(10,\); give \(N,D\)"),
        ({"table": (10, 2)}, "has table and neither pool nor tests"),
    ],
)
def test_wrong_features(runs, tmp_path, arrays, message):
    path = tmp_path / "features.safetensors"
    save_file({key: np.zeros(shape, np.float32) for key, shape in arrays.items()}, path)
    with pytest.raises(ValueError, match=rf"^data\.features: .*{message}"):
        make(runs, features=str(path))


def test_missing_files_of_features(runs, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.features: there is no file .*nowhere"):
        make(runs, features=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ValueError, match=r"^data\.features: 'train' is neither pool nor tests$"):
        make(runs, features={"train": "a.npy"})


# -- prediction --------------------------------------------------------------------------------------------------------


def curricula(tmp_path, content):
    path = tmp_path / "curricula.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_one_curriculum(runs, tmp_path):
    data = make(f"{runs}/run-[0-3]", "predict", curricula=curricula(tmp_path, [[1, 2], [3], []]))
    (batch,) = list(data.predict_dataloader())
    assert set(batch) == {"ids", "start", "length", "run", "lr_scale"}
    assert batch["ids"].tolist() == [[[1, 2], [3, -1], [-1, -1]]]
    assert batch["length"].tolist() == [3]
    assert batch["lr_scale"].tolist() == [pytest.approx([1, 0.875, 0.75])]
    assert batch["start"][0].tolist() == pytest.approx(np.mean([values_of(run)[0] for run in range(4)], 0).tolist())


def test_several_curricula(runs, tmp_path):
    content = [
        {"ids": [[1, 2], [3]], "lr": 0.2, "start": [1.0, 2.0, 3.0, 4.0]},
        {"ids": [[4], [5], [6, 7, 8]], "lr": [0.4, 0.2, 0.1]},
    ]
    batch = whole(make(runs, "predict", curricula=curricula(tmp_path, content)), "predict")
    assert batch["ids"].shape == (2, 3, 3)
    assert batch["length"].tolist() == [2, 3]
    assert batch["lr_scale"].tolist() == [pytest.approx([0.5, 0.5, 0]), pytest.approx([1, 0.5, 0.25])]
    assert batch["start"][0].tolist() == [1, 2, 3, 4]


def test_curricula_may_name_unseen_examples_that_have_features(general, tmp_path):
    general |= {"curricula": curricula(tmp_path, [[0, 7]])}
    data = make(stage="predict", **general)
    assert whole(data, "predict")["ids"].tolist() == [[[0, 7]]]
    assert 7 in data.unseen_pool_ids
    with pytest.raises(ValueError, match=r"curriculum 0 has id 7 at step 1, which is not one of the 6 pool examples"):
        make(stage="predict", **(general | {"features": None}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1, 20]], "has id 20 at step 1, which is not one of the 10 pool examples"),
        ([[1]] * 7, "has 7 steps, but the training runs tell learning rates of 6; give `lr`"),
        ({"ids": [[1], [2]], "lr": [0.1]}, "has 2 steps but 1 values of lr"),
        ({"ids": [[1], [2]], "start": [0.1]}, "has 1 values in start, but there are 4"),
        ({"ids": [[1]], "rate": 1}, "has the key 'rate'"),
        ([1, 2], "has no list of lists of ids"),
        ([[1, -1]], "has no list of lists of ids"),
        ([], "has no list of lists of ids"),
    ],
)
def test_wrong_curricula(runs, tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"^data\.curricula: .*curricula\.json: curriculum 0 {message}"):
        make(runs, "predict", curricula=curricula(tmp_path, content))


def test_prediction_without_curricula_is_of_the_test_runs(runs):
    assert len(make(runs, "predict", test_runs=3).datasets["predict"]) == 3
    assert len(make(runs, "predict", val_runs=2).datasets["predict"]) == 2


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_all_rows_in_one_batch(runs):
    data = make(runs, batch_size=None)
    for _ in range(2):
        (batch,) = list(data.train_dataloader())
        assert torch.equal(batch["target"], whole(data)["target"])


def test_shuffled_rows(runs):
    data = make(runs, batch_size=16)
    batches = list(data.train_dataloader())
    assert [len(batch["target"]) for batch in batches] == [16, 16, 16]  # 60 rows
    seen = [(int(run), int(step)) for batch in batches for run, step in zip(batch["run"], batch["step"], strict=True)]
    assert len(set(seen)) == 48
    assert seen != sorted(seen)
    again = list(make(runs, batch_size=16).train_dataloader())
    assert all(torch.equal(first["target"], second["target"]) for first, second in zip(batches, again, strict=True))


def test_worker_processes_give_the_same_batches(runs):
    both = [list(make(runs, batch_size=16, num_workers=number).train_dataloader()) for number in (0, 2)]
    for first, second in zip(*both, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


class Collect(LightningModule):
    """Keeps what it sees, and saves a checkpoint after some steps."""

    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.save_at, self.path = save_at, path

    def training_step(self, batch, batch_idx):
        self.seen.append(sum(float(value.nan_to_num().sum()) for value in batch.values()))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("mode", "size"), [("matrix", 20), ("pairs", 80), ("runs", 3), ("matrix", None)])
def test_training_goes_on_where_it_was_left(runs, tmp_path, quiet_trainer, mode, size):
    def fit(steps, ckpt_path=None, **options):
        data = DynamicsData(runs, mode=mode, val_runs=0, test_runs=0, batch_size=size)
        model = Collect(**options)
        quiet_trainer(max_steps=steps, max_epochs=-1).fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.seen

    path = tmp_path / "half.ckpt"
    unbroken, first = fit(8), fit(4, save_at=4, path=path)  # three batches an epoch
    assert first + fit(8, ckpt_path=path) == unbroken
    assert len(set(unbroken)) > (4 if size else 0)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"^data\.order must be at least 1, got 0$"),
        ({"interval": 0}, r"^data\.interval must be at least 1"),
        ({"initial_lr": 0.0}, r"^data\.initial_lr must be positive"),
        ({"mode": "runs", "step_threshold": 3}, r"^data\.mode: rows of runs are whole ones"),
        ({"mode": "runs", "gap": "released"}, r"^data\.mode: rows of runs are whole ones"),
        ({"metric": []}, r"^data\.metric must be different names"),
        ({"metric": ["loss", "loss"]}, r"^data\.metric must be different names"),
        ({"test_on": "unseen_train"}, r"^data\.test_on: unseen_train needs runs on unseen examples"),
        ({"batch_size": 0}, r"^data\.batch_size: 0 must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicsData("runs", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_runs": 5, "test_runs": 5}, r"^data\.val_runs, data\.test_runs: of 10 runs none is left to train on"),
        ({"val_runs": ["run-77"]}, r"^data\.val_runs: 'run-77' is none of the 10 runs that are left"),
        ({"metric": "bleu"}, r"^data\.metric: .*run-0 recorded no 'bleu'; set one of loss$"),
        ({"tests": [10, 99]}, r"^data\.tests: test 99 is none of the 4 recorded ones; remove it$"),
        ({"test_ranges": [[50, 60]]}, r"^data\.tests, data\.test_ranges: no recorded test is left; widen them$"),
        ({"test_ranges": [[5, 3]]}, r"^data\.test_ranges: \[\[5, 3\]\] are no ranges; give pairs"),
        ({"test_ranges": ["1,2", "3"]}, r"^data\.test_ranges: .* are no ranges"),
        ({"train_ranges": [[0, 5]]}, r"run-\d: step \d used id \d, which is not one of the 6 pool examples; widen"),
        ({"step_threshold": 7}, r"^data\.runs: the training runs have no two values of the same test"),
        ({"order": 2, "gap": "released", "interval": 3}, r"^data\.gap: released rows over 3 steps have no history"),
        ({"mode": "pairs", "interval": 2}, r"^data\.mode: rows of pairs are single steps, but up to 2 steps lie"),
        ({"order": 2, "interval": 2, "history_pad": "skip"}, r"^data\.history_pad: skip needs values of 2 steps"),
        ({"test_on": "unseen_test", "test_ranges": [[10, 11]]}, r"^data\.test_on: unseen_test needs features"),
        ({"test_on": "unseen_test"}, r"^data\.unseen_test: no recorded test is left that is not trained on"),
    ],
)
def test_options_that_contradict_the_runs(runs, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(runs, **options)
    assert "\n" not in str(error.value)


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.runs: .* holds no recorded run; name a folder"):
        make(str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.runs: .*run-\* holds no recorded run"):
        make(str(tmp_path / "run-*"))


def test_a_run_that_is_named_twice(runs):
    with pytest.raises(ValueError, match=r"^data\.runs: the run .*run-0 is named twice; name it once$"):
        make([runs, f"{runs}/run-0"])


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"pool_fingerprint": "b"}, r"run-1/run\.json: the run was recorded with another pool than .*run-0; leave one"),
        ({"pool_size": 12}, r"run-1/run\.json: the run was recorded with a pool of another size than .*run-0"),
        ({"test_ids": [10, 11, 12, 15]}, r"run-1: test 13 was recorded here or in .*run-0, but not in both"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, info, message):
    save(tmp_path, 0)
    save(tmp_path, 1, **info)
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path))


def test_a_pool_without_a_fingerprint_may_be_the_same(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, pool_fingerprint=None)
    assert len(make(str(tmp_path)).run_names) == 2


def test_a_run_that_is_too_short(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, values_of(1)[:1], ids=[], lr=np.zeros((0, 1)))
    with pytest.raises(ValueError, match=r"run-1: the run has no step after step 0, from which all runs are simulated"):
        make(str(tmp_path))


def test_a_run_without_a_start(tmp_path):
    values = values_of(0)
    values[:, 1] = np.nan
    values[3, 1] = 1.0
    values[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"run-0: no step has values of all tests .* loss of test 11 is missing at"):
        make(save(tmp_path, 0, values))


def test_an_unfinished_run_without_a_start_is_called_unfinished(tmp_path):
    values = values_of(0)
    values[:, 1] = np.nan
    values[3, 1] = 1.0
    values[3, 2] = np.nan
    path = save(tmp_path, 0, values)
    facts = next(tmp_path.rglob("run.json"))
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"complete": False}))
    with pytest.raises(ValueError, match=r"run-0: the run is unfinished and .* leave it out of data\.runs"):
        make(path)


def test_runs_without_a_common_start(tmp_path):
    save(tmp_path, 0, values_of(0)[::2], rec_step=[0, 2, 4, 6])
    save(tmp_path, 1, values_of(1)[1::2], rec_step=[1, 3, 5])
    with pytest.raises(ValueError, match=r"run-1: all tests were measured at step 1 first, .* at step 0, and at no"):
        make(str(tmp_path))


def test_a_learning_rate_that_is_missing(tmp_path):
    save(tmp_path, 0)
    save(tmp_path, 1, lr=np.full(STEPS, np.nan))
    with pytest.raises(ValueError, match=r"run-1: the learning rate of step 1 is unknown, but others are not; rec"):
        make(str(tmp_path))
    assert "lr_scale" in whole(make(str(tmp_path), initial_lr=0.4))


def test_rows_of_runs_need_every_step(tmp_path):
    path = save(tmp_path, 0, values_of(0)[::2], rec_step=[0, 2, 4, 6])
    with pytest.raises(ValueError, match=r"^data\.mode: rows of runs need values of successive steps"):
        make(path, mode="runs")


def test_a_stage_without_runs(runs):
    data = make(runs, "test")
    with pytest.raises(ValueError, match=r"^data\.test_runs: no run is set aside for test; set it to 1 or more$"):
        data.test_dataloader()


def test_an_unfinished_run_counts_as_far_as_it_goes(tmp_path):
    save(tmp_path, 0)
    run = RunWriter(tmp_path / "run-1", {"test_ids": [10, 11, 12, 13], "metrics": ["loss"], "pool_size": POOL})
    run.begin()
    run.record(0, "loss", values_of(1)[0])
    for step in (1, 2):
        run.step(step, ids_of(1)[step - 1], 0.1)
        run.record(step, "loss", values_of(1)[step])
    run.flush()
    data = make(str(tmp_path), mode="runs")
    assert sorted(whole(data)["length"].tolist()) == [2, 6]


# -- shipped runs ------------------------------------------------------------------------------------------------------


def test_shipped_runs():
    data = make(TINY, val_runs=2, test_runs=2, features=f"{TINY}/features.safetensors")
    assert [len(data.split_runs[split]) for split in ("train", "val", "test")] == [6, 2, 2]
    batch = whole(data)
    assert shapes(batch)["target"] == (108, 12)
    assert batch["mask"].all()
    assert data.train_features.shape == (32, 16)
    assert data.test_features.shape == (12, 16)
    assert (data.batch_reference, data.lr_reference) == (4, pytest.approx(1e-3))
    for folder in find_runs(TINY):
        run = DynamicsRun.open(folder, strict=True)
        assert run.pool_size == 32
        assert run.ids.counts(32).sum(0).max() == 3  # once an epoch
        assert np.isfinite(run.values()).all()


def test_the_runs_differ_as_their_data_does():
    """Runs with more good examples lower the losses of good tests, and raise those of bad ones."""
    tests = [row["target"] for row in read_examples(f"{TINY}/tests.jsonl")]
    pool = [row["target"] for row in read_examples(f"{TINY}/pool.jsonl")]
    good = np.array([target == " good" for target in tests])
    shares, changes = [], []
    for folder in find_runs(TINY):
        run = DynamicsRun.open(folder)
        shares.append(np.mean([pool[place] == " good" for place in run.ids.values]))
        change = run.values()[-1] - run.values()[0]
        changes.append(change[good].mean() - change[~good].mean())
    assert np.corrcoef(shares, changes)[0, 1] < -0.9
