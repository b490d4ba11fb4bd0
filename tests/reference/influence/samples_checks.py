"""Comparison of training rows with the reference vectors: functions that raise AssertionError."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from datamodules.dynamics import DynamicsData

SUFFIXES = {"train_samples_id": ".json", "all_loss_trajectory": ".out"}
KEYS = {"cur_step", "cur_loss", "prev_loss", "prev_step", "samples_id", "test_sample_id"}


def write_run(run: dict, folder: Path) -> None:
    """Write a run of the vectors in the released layout."""
    folder.mkdir(parents=True)
    for name, suffix in SUFFIXES.items():
        (folder / f"{name}{suffix}").write_text("".join(json.dumps(row) + "\n" for row in run[name]))


def released_rows(folder: Path, args: dict) -> dict[str, torch.Tensor]:
    """All rows of the run, as the released data set makes them with these arguments."""
    data = DynamicsData(
        str(folder),
        mode="pairs",
        gap="released",
        val_runs=0,
        test_runs=0,
        interval=args.get("cp_interval", 1),
        order=args.get("order_n", 1),
        history_pad="zero",
        step_threshold=args.get("step_thres"),
        test_ranges=[args["lo"], args["hi"]] if "lo" in args else None,
        batch_size=None,
    )
    data.setup("fit")
    rows = data.datasets["train"]
    return rows.__getitems__(range(len(rows)))


def check_case(run: dict, case: dict) -> None:
    """Rows of one combination of arguments: steps, values, ids and their order."""
    args, samples = case["args"], case["samples"]
    assert set(args) <= {"cp_interval", "order_n", "step_thres", "lo", "hi"}
    with TemporaryDirectory() as folder:
        write_run(run, Path(folder) / "run")
        rows = released_rows(Path(folder) / "run", args)
    assert len(rows["target"]) == len(samples)
    order = args.get("order_n", 1)
    expected_keys = KEYS | ({"prev_n_steps", "prev_n_losses"} if order > 1 else set())
    assert all(set(sample) == expected_keys for sample in samples)

    def column(key: str) -> list:
        return [sample[key] for sample in samples]

    assert rows["step"].tolist() == column("cur_step")
    assert (rows["step"] - 1).tolist() == column("prev_step")  # the run has values of every step
    assert rows["order_ids"].tolist() == column("samples_id")
    assert rows["test_ids"].tolist() == column("test_sample_id")
    near(rows["target"], column("cur_loss"))
    near(rows["prev"][:, -1], column("prev_loss"))
    if order > 1:
        near(rows["prev"], column("prev_n_losses"))
        back = rows["step"][:, None] + torch.arange(-order, 0)
        assert torch.where(back >= 1, back, -1).tolist() == column("prev_n_steps")


def near(actual: torch.Tensor, expected: list) -> None:
    """Compare values; those of the rows are float32."""
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-6)


def check_samples(data: dict) -> None:
    """All cases."""
    (run,) = data["runs"]
    for case in data["cases"]:
        check_case(run, case)
