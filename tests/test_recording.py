"""The files of recorded runs."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lit_models.recording import (
    DynamicsRun,
    Ids,
    RunWriter,
    find_runs,
    fingerprint,
    read_examples,
    write_examples,
    write_parquet,
    write_run,
)

INFO = {"run_id": "a", "test_ids": [5, 3, 9], "metrics": ["loss", "accuracy"], "pool_size": 10}
IDS = [[1, 2, 2], [0], [9, 8], [7, 7, 7, 1], [3, 4]]


def record(folder, steps=5, flush_every=2, **options):
    """A run of some steps; the loss after step t of test j is t + j/10."""
    writer = RunWriter(folder, INFO, flush_every=flush_every, **options)
    writer.begin()
    extend(writer, 0, steps)
    return writer


def extend(writer, first, last):
    for step in range(first, last + 1):
        if step:
            ids = torch.tensor(IDS[step - 1])
            writer.step(step, [ids[:1], ids[1:]], [0.1 / step, 0.2], step == 3, torch.tensor(2.0 / step))
        writer.record(step, "loss", step + torch.arange(3.0) / 10)
        if step % 2 == 0:
            writer.record(step, "accuracy", [1.0], [1])
        if writer.ready():
            writer.flush()


def same(one, other):
    for name in ("steps", "rec_step", "lr", "skipped", "train_loss", "test_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    np.testing.assert_array_equal(one.ids.values, other.ids.values)
    np.testing.assert_array_equal(one.ids.offsets, other.ids.offsets)
    for metric in one.metrics:
        np.testing.assert_array_equal(one.values(metric), other.values(metric))
        np.testing.assert_array_equal(one.measured(metric), other.measured(metric))


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush_every", [1, 2, 50])
def test_a_run_comes_back_as_it_was_written(tmp_path, flush_every):
    record(tmp_path / "a", flush_every=flush_every).finish()
    run = DynamicsRun.open(tmp_path / "a", strict=True)
    assert (run.run_id, run.complete, run.n_steps, run.pool_size) == ("a", True, 5, 10)
    assert [row.tolist() for row in run.ids] == IDS
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert run.rec_step.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.test_ids.tolist() == [5, 3, 9]
    np.testing.assert_allclose(run.lr, [[0.1 / step, 0.2] for step in range(1, 6)], rtol=1e-6)
    assert run.skipped.tolist() == [False, False, True, False, False]
    np.testing.assert_allclose(run.train_loss, [2 / step for step in range(1, 6)], rtol=1e-6)
    assert run.grad_norm is None
    np.testing.assert_allclose(run.values("loss"), np.arange(6)[:, None] + np.arange(3) / 10, rtol=1e-6)
    accuracy = run.values("accuracy")
    assert np.argwhere(~np.isnan(accuracy)).tolist() == [[0, 1], [2, 1], [4, 1]]
    assert (run.measured("accuracy") == ~np.isnan(accuracy)).all()
    run.check()


def test_files_have_the_keys_of_the_schema(tmp_path):
    record(tmp_path / "a").finish()
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [
        "part-r0-00000.safetensors",
        "part-r0-00001.safetensors",
        "part-r0-00002.safetensors",
        "run.json",
    ]
    part = load_file(tmp_path / "a/part-r0-00000.safetensors")
    shapes = {key: (str(value.dtype), value.shape) for key, value in part.items()}
    assert shapes == {
        "step": ("int64", (2,)),
        "offsets": ("int64", (3,)),
        "ids": ("int32", (4,)),
        "lr": ("float32", (2, 2)),
        "skipped": ("uint8", (2,)),
        "train_loss": ("float32", (2,)),
        "rec_step": ("int64", (3,)),
        "m.loss": ("float32", (3, 3)),
        "m.accuracy": ("float32", (3, 3)),
    }
    info = json.loads((tmp_path / "a/run.json").read_text())
    assert (info["schema"], info["complete"], info["n_steps"]) == (1, True, 5)
    assert info["parts"] == [
        {"file": "part-r0-00000.safetensors", "first_step": 1, "last_step": 2},
        {"file": "part-r0-00001.safetensors", "first_step": 3, "last_step": 4},
        {"file": "part-r0-00002.safetensors", "first_step": 5, "last_step": 5},
    ]


def test_half_precision(tmp_path):
    record(tmp_path / "a", dtype="float16").finish()
    assert load_file(tmp_path / "a/part-r0-00000.safetensors")["m.loss"].dtype == np.float16
    values = DynamicsRun.open(tmp_path / "a").values("loss")
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[2], [2.0, 2.1, 2.2], atol=1e-3)


def test_a_run_is_written_at_once(tmp_path):
    losses = np.array([[1.0, np.nan], [0.5, 0.25]])
    ids = [[0, 1], [1]]
    write_run(
        tmp_path / "b", {"test_ids": [4, 7], "pool_size": 2}, ids, [0.1, 0.2], [0, 2], {"loss": losses}, [False, True]
    )
    run = DynamicsRun.open(tmp_path / "b", strict=True)
    assert [row.tolist() for row in run.ids] == ids
    np.testing.assert_array_equal(run.values(), losses.astype(np.float32))
    assert run.lr.shape == (2, 1)
    assert run.skipped.tolist() == [False, True]
    assert run.rec_step.tolist() == [0, 2]


def test_writing_often_leaves_few_files(tmp_path):
    writer = RunWriter(tmp_path, INFO, flush_every=4)
    writer.begin()
    for step in range(5):
        extend(writer, step, step)
        writer.flush()
    assert sorted(path.name for path in tmp_path.glob("part*")) == ["part-r0-00000.safetensors"]
    assert DynamicsRun.open(tmp_path).n_steps == 4
    extend(writer, 5, 5)
    writer.finish()
    record(tmp_path / "whole", flush_every=50).finish()
    same(DynamicsRun.open(tmp_path), DynamicsRun.open(tmp_path / "whole"))


def test_measured_values_that_are_no_numbers_are_told_from_missing_ones(tmp_path):
    writer = RunWriter(tmp_path, INFO)
    writer.begin()
    writer.record(0, "loss", [1.0, float("nan")], [0, 2])
    writer.step(1, [1])
    writer.record(1, "loss", [float("nan")], [2])
    with pytest.warns(UserWarning, match=r"loss of test 9 is NaN at step 0; it is recorded") as caught:
        writer.finish()
    assert len(caught) == 1
    run = DynamicsRun.open(tmp_path)
    assert np.isnan(run.values()).tolist() == [[False, True, True], [True, True, True]]
    assert run.measured().tolist() == [[True, False, True], [False, False, True]]


# -- several processes -----------------------------------------------------------------------------------------------


def two_ranks(folder, steps=(5, 5), finish=True):
    writers = [RunWriter(folder, INFO, rank, 2, columns, flush_every=2) for rank, columns in enumerate(([0, 2], [1]))]
    for rank, writer in enumerate(writers):
        writer.begin()
        writer.record(0, "loss", np.arange(writer.width) + 10.0 * rank)
        for step in range(1, steps[rank] + 1):
            writer.step(step, IDS[step - 1][rank::2], [0.1], train_loss=float(rank))
            writer.record(step, "loss", np.arange(writer.width) + 10.0 * rank + step)
            if writer.ready():
                writer.flush()
        if finish:
            writer.finish()


def test_ids_of_processes_are_joined_in_their_order_and_columns_merged(tmp_path):
    two_ranks(tmp_path)
    run = DynamicsRun.open(tmp_path, strict=True)
    assert [row.tolist() for row in run.ids] == [[1, 2, 2], [0], [9, 8], [7, 7, 7, 1], [3, 4]]
    assert run.values()[2].tolist() == [2.0, 12.0, 3.0]
    assert run.train_loss.tolist() == [0.5] * 5


def test_an_unfinished_run_ends_where_all_processes_have_written(tmp_path):
    two_ranks(tmp_path, (5, 3), finish=False)
    run = DynamicsRun.open(tmp_path)
    assert not run.complete
    assert run.steps.tolist() == [1, 2]
    assert run.rec_step.tolist() == [0, 1, 2]
    assert len(run.ids) == 2
    assert not np.isnan(run.values()).any()
    with pytest.raises(ValueError, match="the run ended early, at step 2"):
        DynamicsRun.open(tmp_path, strict=True)


def test_a_missing_file_of_a_process_is_named(tmp_path):
    two_ranks(tmp_path)
    (tmp_path / "part-r1-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part-r1-\*\.safetensors: step 5 is in none of them; restore the file"):
        DynamicsRun.open(tmp_path)


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("flush_every", [2, 3])
def test_a_run_cut_and_continued_equals_an_unbroken_one(tmp_path, stop, flush_every):
    record(tmp_path / "whole", flush_every=flush_every).finish()
    record(tmp_path / "cut", flush_every=flush_every).finish()
    writer = RunWriter(tmp_path / "cut", INFO, flush_every=flush_every)
    (tmp_path / "cut/.part-r0-00001.safetensors.123.draft").write_text("half")
    assert writer.resume(stop) == stop
    assert not list((tmp_path / "cut").glob(".*"))
    prefix = DynamicsRun.open(tmp_path / "cut")
    assert (prefix.n_steps, prefix.complete, int(prefix.rec_step[-1])) == (stop, False, stop)
    extend(writer, stop + 1, 5)
    writer.finish()
    same(DynamicsRun.open(tmp_path / "cut", strict=True), DynamicsRun.open(tmp_path / "whole", strict=True))


def test_values_beyond_the_plan_are_removed_when_the_run_goes_on(tmp_path):
    writer = RunWriter(tmp_path, INFO)
    writer.begin()
    extend(writer, 0, 3)
    writer.end_part()
    writer.record(3, "accuracy", [0.0, 1.0, 0.0])
    writer.flush(extra=True)
    writer.finish()
    assert DynamicsRun.open(tmp_path).values("accuracy")[3].tolist() == [0.0, 1.0, 0.0]
    assert DynamicsRun.open(tmp_path).values("loss")[3].tolist() == pytest.approx([3.0, 3.1, 3.2])
    writer = RunWriter(tmp_path, INFO)
    writer.resume(3)
    extend(writer, 4, 5)
    writer.finish()
    record(tmp_path / "whole").finish()
    same(DynamicsRun.open(tmp_path), DynamicsRun.open(tmp_path / "whole"))


def test_a_process_less_after_resuming(tmp_path):
    two_ranks(tmp_path)
    writer = RunWriter(tmp_path, INFO, flush_every=2)
    assert writer.resume(3) == 3
    for step in (4, 5):
        writer.step(step, IDS[step - 1], [0.1])
        writer.record(step, "loss", [1.0, 2.0, 3.0])
    writer.finish()
    run = DynamicsRun.open(tmp_path, strict=True)
    assert [row.tolist() for row in run.ids] == IDS
    assert run.values()[3].tolist() == [3.0, 13.0, 4.0]
    assert run.values()[4].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_ids": [5, 3]}, "was recorded with another test set"),
        ({"metrics": ["loss"]}, "was recorded with another list of metrics"),
        ({"pool_fingerprint": "abc"}, "was recorded with another pool"),
    ],
)
def test_other_data_is_refused_on_resuming(tmp_path, change, message):
    record(tmp_path).finish()
    with pytest.raises(ValueError, match=message):
        RunWriter(tmp_path, INFO | change).resume(3)


def test_a_folder_with_a_run_is_not_overwritten_unless_asked(tmp_path):
    record(tmp_path).finish()
    with pytest.raises(ValueError, match="already holds a run"):
        RunWriter(tmp_path, INFO).begin()
    assert DynamicsRun.open(tmp_path).n_steps == 5
    RunWriter(tmp_path, INFO).begin(overwrite=True)
    assert DynamicsRun.open(tmp_path).n_steps == 0
    assert not list(tmp_path.glob("part*"))


# -- damage ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from lit_models.recording import RunWriter
writer = RunWriter(sys.argv[1], {"test_ids": [0, 1], "metrics": ["loss"]}, flush_every=3)
writer.begin()
for step in range(1, 100_000):
    writer.step(step, [step % 7, step % 5], [0.1])
    writer.record(step, "loss", [step, -step])
    if writer.ready():
        writer.flush()
"""


def test_a_killed_process_leaves_a_readable_prefix(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "a")])
    while process.poll() is None and not list((tmp_path / "a").glob("part*")):
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = DynamicsRun.open(tmp_path / "a")
    assert not run.complete
    assert run.n_steps >= 3
    assert run.n_steps % 3 == 0
    assert [row.tolist() for row in run.ids] == [[step % 7, step % 5] for step in run.steps.tolist()]
    assert (run.values()[:, 0] == run.steps).all()


def test_a_cut_off_last_part_ends_the_run_before_it(tmp_path):
    record(tmp_path)
    os.truncate(tmp_path / "part-r0-00001.safetensors", 300)
    with pytest.warns(UserWarning, match=r"part-r0-00001\.safetensors cannot be read.*read up to step 2"):
        run = DynamicsRun.open(tmp_path)
    assert [row.tolist() for row in run.ids] == IDS[:2]
    assert run.values().shape == (3, 3)
    with pytest.raises(ValueError, match=r"part-r0-00001\.safetensors cannot be read"):
        DynamicsRun.open(tmp_path, strict=True)


def test_a_cut_off_part_in_the_middle_is_an_error(tmp_path):
    record(tmp_path).finish()
    os.truncate(tmp_path / "part-r0-00001.safetensors", 5)
    with pytest.raises(ValueError, match=r"part-r0-00001\.safetensors cannot be read"):
        DynamicsRun.open(tmp_path)


def test_a_missing_part_is_named_with_its_steps(tmp_path):
    record(tmp_path).finish()
    (tmp_path / "part-r0-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part-r0-00001\.safetensors is missing, and with it steps 3 to 4"):
        DynamicsRun.open(tmp_path)


def spoil(path, **changes):
    """Change arrays of a part."""
    arrays = load_file(path)
    save_file(arrays | {key: np.asarray(value, arrays[key].dtype) for key, value in changes.items()}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": [3, 5]}, r"part-r0-00001\.safetensors: step 4 is missing, since step 3 is followed by 5"),
        ({"step": [4, 5]}, r"part-r0-00001\.safetensors: step 3 is missing, since step 2 is followed by 4"),
        ({"step": [2, 3]}, r"part-r0-00001\.safetensors: step 2 comes after step 2, but steps ascend"),
        ({"step": [4, 3]}, r"part-r0-00001\.safetensors: steps must ascend, but 4 is followed by 3"),
        ({"rec_step": [4, 4]}, r"part-r0-00001\.safetensors: recorded steps must ascend"),
        ({"ids": [9, 8, 7, 7, 12, 1]}, r"part-r0-00001\.safetensors: step 4 used id 12, but the pool has 10"),
        ({"ids": [9, -1, 7, 7, 7, 1]}, r"part-r0-00001\.safetensors: step 3 used id -1"),
    ],
)
def test_wrong_rows_are_named_with_file_and_step(tmp_path, changes, message):
    record(tmp_path).finish()
    spoil(tmp_path / "part-r0-00001.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        DynamicsRun.open(tmp_path).check()


def test_a_finished_run_with_fewer_steps_than_it_says(tmp_path):
    record(tmp_path).finish()
    info = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(info | {"n_steps": 8}))
    with pytest.raises(ValueError, match=r"run\.json says 8 steps, but the parts end at step 5"):
        DynamicsRun.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no recorded run, since it has no run.json"),
        ("{", "is no JSON"),
        ('{"schema": 2}', "is of schema 2, and this version reads schema 1"),
        ('{"schema": 1, "test_ids": []}', "lacks 'metrics'"),
        (
            '{"schema": 1, "test_ids": [1, 2, 1], "metrics": [], "complete": true, "n_steps": 0}',
            "test id 1 occurs twice",
        ),
    ],
)
def test_wrong_run_json(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DynamicsRun.open(tmp_path)


def test_wrong_ids_end_a_recording_with_what_came_before(tmp_path):
    writer = record(tmp_path, steps=3, flush_every=50)
    writer.step(4, [3, 10])
    writer.record(4, "loss", [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="step 4 used id 10, but the pool has 10 examples, 0 to 9"):
        writer.flush()
    writer.flush()
    run = DynamicsRun.open(tmp_path)
    assert run.n_steps == 3
    assert run.rec_step.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ids", [[0.5], ["a"]])
def test_ids_must_be_whole_numbers(tmp_path, ids):
    writer = record(tmp_path, steps=0)
    writer.step(1, ids)
    with pytest.raises(ValueError, match="step 1 has ids that are no whole numbers"):
        writer.flush()


def test_pools_with_ids_of_their_own(tmp_path):
    writer = RunWriter(tmp_path, INFO | {"pool_ids": [40, 7]})
    writer.begin()
    writer.step(1, [7, 40])
    writer.step(2, [0])
    with pytest.raises(ValueError, match="step 2 used id 0, which is none of the 2 ids of the pool"):
        writer.flush()
    assert DynamicsRun.open(tmp_path).ids[0].tolist() == [7, 40]


def test_unknown_metrics(tmp_path):
    writer = record(tmp_path)
    with pytest.raises(ValueError, match="metric 'bleu' is none of this run's"):
        writer.record(1, "bleu", [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="metric 'bleu' was not recorded; recorded are"):
        DynamicsRun.open(tmp_path).values("bleu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flush_every": 0}, "flush_every must be at least 1"),
        ({"dtype": "int8"}, "dtype must be float32 or float16"),
        ({"info": {"test_ids": [1, 1], "metrics": []}}, "test_ids: 1 occurs twice"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RunWriter(tmp_path, **({"info": INFO} | options))


# -- ids, examples, other formats ------------------------------------------------------------------------------------


def test_ragged_ids():
    ids = Ids.from_lists([[1, 2], [], [3]])
    assert len(ids) == 3
    assert ids.sizes.tolist() == [2, 0, 1]
    assert ids.padded().tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert ids.padded(3, fill=0).tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert Ids.from_lists([[1, 1], [0]]).counts(3).tolist() == [[0, 2, 0], [1, 0, 0]]
    assert [row.tolist() for row in ids[1:]] == [[], [3]]
    assert [row.tolist() for row in ids[::2]] == [[1, 2], [3]]
    assert ids[-1].tolist() == [3]
    assert (ids[0].dtype, ids.values.dtype) == (np.int64, np.int32)
    with pytest.raises(IndexError):
        ids[3]
    with pytest.raises(ValueError, match="more than the width of 1"):
        ids.padded(1)
    with pytest.raises(ValueError, match="id 3, but the pool has 3 examples"):
        ids.counts(3)
    assert len(Ids.from_lists([])) == 0
    assert Ids.from_lists([]).padded().shape == (0, 0)


def test_examples_are_kept_once_and_have_a_fingerprint(tmp_path):
    rows = [{"id": 3, "text": "eins\u2028zwei", "target": "ja"}, {"id": 1, "text": "drei"}]
    print_ = write_examples(tmp_path / "pool.jsonl", rows)
    assert read_examples(tmp_path / "pool.jsonl") == rows
    assert print_ == fingerprint(rows[::-1]) == fingerprint([dict(reversed(row.items())) for row in rows])
    assert print_ != fingerprint([rows[0], {"id": 1, "text": "vier"}])
    assert len(print_) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "id 1 occurs twice"),
        ('{"id": "1", "text": "a"}\n', "row 1 needs an integer 'id' and a 'text'"),
        ('{"id": 1}\n', "row 1 needs an integer 'id'"),
        ('{"id": 1, "text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ('{"id": 1, "te', "line 1 is not a JSON object"),
    ],
)
def test_wrong_examples(tmp_path, text, message):
    (tmp_path / "pool.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "pool.jsonl")
    with pytest.raises(ValueError, match="there is no such file"):
        read_examples(tmp_path / "tests.jsonl")


def test_runs_are_found_in_numerical_order(tmp_path):
    for name in ("run-10", "run-9", "run-1"):
        RunWriter(tmp_path / name, INFO).begin()
    (tmp_path / "other").mkdir()
    assert [path.name for path in find_runs(tmp_path)] == ["run-1", "run-9", "run-10"]
    assert find_runs(tmp_path / "run-9") == [tmp_path / "run-9"]


def test_parquet(tmp_path):
    import pyarrow.parquet as pq

    record(tmp_path / "a").finish()
    steps, values = write_parquet(DynamicsRun.open(tmp_path / "a"), tmp_path / "out")
    steps, values = pq.read_table(steps).to_pylist(), pq.read_table(values).to_pylist()
    assert [row["ids"] for row in steps] == IDS
    assert steps[2]["skipped"]
    assert steps[1]["lr"] == pytest.approx([0.05, 0.2])
    assert values[4] == {"run_id": "a", "step": 1, "test_id": 3, "loss": pytest.approx(1.1), "accuracy": None}
    assert values[7]["accuracy"] == 1.0
