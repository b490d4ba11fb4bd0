"""The released layout of recorded runs: reading, conversion in both directions, and refusals."""

import json

import numpy as np
import pytest
import torch

from datamodules.dynamics import DynamicsData
from datamodules.gptdynamics import (
    ReleasedRun,
    decaying_lr,
    export_gptdynamics,
    find_released,
    import_gptdynamics,
    read_texts,
    repeated_steps,
)
from lit_models.recording import DynamicsRun, find_runs, fingerprint, read_examples

STEPS, TESTS = 5, 3
# Loss of a released example: the value of step 3 is repeated at step 4.
LOSSES = [[2.5, 2.25, 2.0, 2.0, 1.5], [1.0, 1.5, 1.75, 1.75, 2.0], [3.0, 3.0, 2.5, 2.5, 2.25]]
IDS = [[4, 0], [1, 3], [0, 2], [3, 4], [2, 1]]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def trajectories(table, tests=(200, 201, 7), leave_out=()):
    return [
        {
            "id": test,
            "loss_trajectory": [
                {"step": step, "loss": loss} for step, loss in enumerate(row, 1) if (test, step) not in leave_out
            ],
        }
        for test, row in zip(tests, table, strict=True)
    ]


def write(folder, samples=None, **metrics):
    folder.mkdir(parents=True)
    samples = [{"step": step, "samples_id": ids} for step, ids in enumerate(IDS, 1)] if samples is None else samples
    (folder / "train_samples_id.json").write_text(lines(samples))
    for name, rows in (metrics or {"loss": trajectories(LOSSES)}).items():
        (folder / f"all_{name}_trajectory.out").write_text(lines(rows))
    return folder


@pytest.fixture
def released(tmp_path):
    """Parent of three runs; the second one has another metric too, of two tests only."""
    parent = tmp_path / "rte"
    for seed in (1, 2, 10):
        metrics = {"loss": trajectories(np.array(LOSSES) + seed)}
        if seed == 2:
            metrics["bleu"] = trajectories(np.array(LOSSES[:2]) * 10, (201, 200))
        write(parent / f"output_rte_bs-4_seed-{seed}", **metrics)
    return parent


def test_reading(released):
    run = ReleasedRun.open(released / "output_rte_bs-4_seed-2")
    assert run.run_id == "output_rte_bs-4_seed-2"
    assert run.metrics == ("loss", "bleu")
    assert run.steps.tolist() == run.rec_step.tolist() == [1, 2, 3, 4, 5]
    assert run.test_ids.tolist() == [200, 201, 7]
    assert [row.tolist() for row in run.ids] == IDS
    assert run.values().T.tolist() == (np.array(LOSSES) + 2).tolist()
    bleu = run.values("bleu")
    assert bleu[:, 0].tolist() == [10.0, 15.0, 17.5, 17.5, 20.0]
    assert bleu[:, 1].tolist() == [25.0, 22.5, 20.0, 20.0, 15.0]
    assert np.isnan(bleu[:, 2]).all()
    assert run.lr.shape == (5, 0)
    assert not run.skipped.any()
    with pytest.raises(ValueError, match=r"seed-2: there is no metric 'rougeL'; there are loss, bleu"):
        run.values("rougeL")


def test_steps_that_were_not_measured(tmp_path):
    run = ReleasedRun.open(write(tmp_path / "a", loss=trajectories(LOSSES, leave_out={(200, 3), (7, 1), (7, 2)})))
    assert np.argwhere(np.isnan(run.values())).tolist() == [[0, 2], [1, 2], [2, 0]]


def test_of_lines_with_the_same_step_the_last_one_counts(tmp_path):
    samples = [{"step": 1, "samples_id": [9, 9]}] + [
        {"step": step, "samples_id": ids} for step, ids in enumerate(IDS, 1)
    ]
    assert [row.tolist() for row in ReleasedRun.open(write(tmp_path / "a", samples)).ids] == IDS


def test_runs_are_found_in_the_order_of_their_numbers(released):
    assert [path.name[-2:].strip("-") for path in find_released(released)] == ["1", "2", "10"]
    assert find_released(released / "output_rte_bs-4_seed-1") == [released / "output_rte_bs-4_seed-1"]
    assert find_released(released.parent / "nowhere") == []


def test_the_data_module_reads_it(released):
    data = DynamicsData(str(released), val_runs=1, test_runs=1)
    data.setup("fit")
    assert data.run_names == [f"output_rte_bs-4_seed-{seed}" for seed in (1, 2, 10)]
    assert data.test_ids.tolist() == [200, 201, 7]
    assert data.pool_ids.tolist() == [0, 1, 2, 3, 4]
    rows = data.datasets["train"]
    batch = rows.__getitems__(range(len(rows)))
    assert batch["step"].tolist() == [2, 3, 4, 5]  # the first value is that after step 1
    assert batch["ids"].tolist() == IDS[1:]
    assert batch["target"].shape == (4, TESTS)
    assert "lr_scale" not in batch


def test_skipped_updates(released):
    run = ReleasedRun.open(released / "output_rte_bs-4_seed-1")
    assert repeated_steps(run).tolist() == [False, False, False, True, False]
    data = DynamicsData(str(released), val_runs=0, test_runs=0, infer_skipped=True)
    data.setup("fit")
    rows = data.datasets["train"]
    assert rows.__getitems__(range(3))["step"].tolist() == [2, 3, 5]
    assert rows.__getitems__(range(3))["ids"].tolist() == [IDS[1], IDS[2], IDS[4]]


def test_decaying_rate():
    assert decaying_lr(4, 0.8).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2])


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    pool = [
        {"id": number, "input": f"text {number} Answer: yes", "context": f"text {number} Answer:"}
        for number in range(5)
    ]
    tests = [{"id": number, "input": f"test {number}"} for number in (200, 201, 7)]
    (tmp_path / "pool.json").write_text(lines(pool))
    (tmp_path / "tests.json").write_text(lines(tests))
    return {"pool": tmp_path / "pool.json", "tests": tmp_path / "tests.json"}


def test_import(released, texts, tmp_path):
    out = tmp_path / "ours"
    written = import_gptdynamics(released, out, **texts, lr=1e-3, infer_skipped=True)
    assert written == find_runs(out)
    pool = read_examples(out / "pool.jsonl")
    assert pool[3] == {"id": 3, "text": "text 3 Answer: yes", "context": "text 3 Answer:", "target": " yes"}
    assert [row["id"] for row in read_examples(out / "tests.jsonl")] == [200, 201, 7]
    run = DynamicsRun.open(written[1], strict=True)
    assert run.info["pool_fingerprint"] == fingerprint(pool)
    assert run.pool_size == 5
    assert run.metrics == ("loss", "bleu")
    assert run.test_ids.tolist() == [200, 201, 7]
    assert [row.tolist() for row in run.ids] == IDS
    assert run.rec_step.tolist() == [1, 2, 3, 4, 5]
    assert run.lr[:, 0].tolist() == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert run.skipped.tolist() == [False, False, False, True, False]
    there = ReleasedRun.open(released / written[1].name)
    for metric in run.metrics:
        np.testing.assert_array_equal(run.values(metric), there.values(metric))


def test_import_of_a_single_run_without_texts(released, tmp_path):
    (written,) = import_gptdynamics(released / "output_rte_bs-4_seed-10", tmp_path / "ours")
    run = DynamicsRun.open(written)
    assert run.pool_size is None
    assert np.isnan(run.lr).all()
    assert not run.skipped.any()


def test_ids_with_gaps_are_kept(released, texts, tmp_path):
    rows = [json.loads(line) for line in texts["pool"].read_text().splitlines()]
    texts["pool"].write_text(lines([*rows, {"id": 9, "input": "more"}]))
    (written, *_) = import_gptdynamics(released, tmp_path / "ours", **texts)
    assert DynamicsRun.open(written).info["pool_ids"] == [0, 1, 2, 3, 4, 9]


def test_both_layouts_give_the_same_data(released, tmp_path):
    import_gptdynamics(released, tmp_path / "ours", lr=0.4)
    batches = []
    for path, options in ((released, {"initial_lr": 0.4}), (tmp_path / "ours", {})):
        data = DynamicsData(str(path), val_runs=1, test_runs=1, **options)
        data.setup("fit")
        batches.append([next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())])
    for first, second in zip(*batches, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_export_and_import_return_the_same(released, tmp_path):
    for path in find_released(released):
        export_gptdynamics(path, tmp_path / "copy" / path.name)
        export_gptdynamics(import_gptdynamics(path, tmp_path / "ours")[0], tmp_path / "back" / path.name)
        for name in sorted(file.name for file in path.iterdir()):
            rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
            for folder in ("copy", "back"):
                written = (tmp_path / folder / path.name / name).read_text().splitlines()
                found = [json.loads(line) for line in written]
                by_id = {row["id"]: row for row in found} if "id" in rows[0] else None
                assert len(found) == len(rows)
                assert all((by_id[row["id"]] if by_id else found[place]) == row for place, row in enumerate(rows))


def test_export_of_chosen_metrics_and_of_the_start(tmp_path, released):
    from datamodules.assets import asset_path

    run = DynamicsRun.open(f"{asset_path('dynamics_tiny')}/run-0")
    export_gptdynamics(run, tmp_path / "tiny")
    back = ReleasedRun.open(tmp_path / "tiny")
    assert back.rec_step.tolist() == list(range(19))
    np.testing.assert_array_equal(back.values(), run.values())
    export_gptdynamics(released / "output_rte_bs-4_seed-2", tmp_path / "part", ["bleu"])
    assert {path.name for path in (tmp_path / "part").iterdir()} == {"train_samples_id.json", "all_bleu_trajectory.out"}


def test_texts(texts):
    assert read_texts(texts["tests"])[0] == {"id": 200, "text": "test 200"}


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"samples": [{"step": 1, "samples_id": [1]}, {"step": 3, "samples_id": [1]}]},
            r"train_samples_id\.json: step 2 is",
        ),
        ({"samples": []}, r"train_samples_id\.json: step 1 is missing"),
        ({"samples": [{"step": 1}]}, r"train_samples_id\.json: line 1 has no right 'samples_id'"),
        ({"samples": [{"step": 1, "samples_id": [-1]}]}, r"train_samples_id\.json: line 1 has no right 'samples_id'"),
        (
            {"samples": [{"step": 1, "samples_id": [1]}]},
            r"at step 5, but train_samples_id\.json has steps 1 to 1",
        ),
        ({"loss": trajectories(LOSSES, (1, 2, 1))}, r"all_loss_trajectory\.out: line 3 is a second one of test 1"),
        ({"loss": [{"id": 1}]}, r"all_loss_trajectory\.out: line 1 has no right 'loss_trajectory'"),
        ({"loss": [{"id": 1, "loss_trajectory": [{"step": 1, "loss": "a"}]}]}, r"line 1 has no right 'loss'"),
        ({"loss": [{"id": 1, "loss_trajectory": [{"step": 1, "lost": 1}]}]}, r"line 1 has no right 'loss'"),
        ({"loss": [{"id": "1", "loss_trajectory": []}]}, r"line 1 has no right 'id'"),
    ],
)
def test_broken_files(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ReleasedRun.open(write(tmp_path / "a", **options))
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_no_json(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "all_loss_trajectory.out").write_text("{}\nnothing\n")
    with pytest.raises(ValueError, match=r"all_loss_trajectory\.out: line 1 has no right 'id'"):
        ReleasedRun.open(folder)
    (folder / "all_loss_trajectory.out").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"all_loss_trajectory\.out: line 1 is not a JSON object; restore the file"):
        ReleasedRun.open(folder)
    (folder / "all_loss_trajectory.out").unlink()
    with pytest.raises(ValueError, match=r"/a has no all_METRIC_trajectory\.out; restore it"):
        ReleasedRun.open(folder)
    (folder / "train_samples_id.json").unlink()
    with pytest.raises(ValueError, match=r"train_samples_id\.json: there is no such file; restore it"):
        ReleasedRun.open(folder)
    with pytest.raises(ValueError, match=r"holds no released run, since no folder in it has a train_samples_id\.json"):
        import_gptdynamics(tmp_path / "a", tmp_path / "b")


def test_a_run_that_is_in_the_way(released, tmp_path):
    import_gptdynamics(released, tmp_path / "ours")
    with pytest.raises(ValueError, match="already holds a run"):
        import_gptdynamics(released, tmp_path / "ours")


def test_texts_without_a_key(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 1, "input": "a"}\n{"id": 2, "text": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.json: line 2 needs an integer 'id' and an 'input'; it has \['id', 't"):
        read_texts(tmp_path / "a.json")
