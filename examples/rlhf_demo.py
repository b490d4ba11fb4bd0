"""The whole of RLHF on real human ratings: fine-tuning, reward model, PPO.

`make demo` runs this: three small models are trained with the shipped presets, and a table, sample responses and
`runs/demo.png` show what changed. About four minutes on two CPU cores.
"""

import csv
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from callbacks.curves import plot_curves
from lit_models.cli import main

RUNS = Path(os.environ.get("LIT_RUNS", "runs"))
CURVES = {
    "sft": {"train/loss": "fine-tuning: loss"},
    "reward": {"train/loss": "reward model: loss"},
    "ppo": {
        "score/mean": "PPO: score",
        "kl/ref": "PPO: KL to the reference",
        "response/len_mean": "PPO: response length",
        "policy/entropy": "PPO: entropy",
    },
}


def read_curves() -> dict[str, list[tuple[int, float]]]:
    """Logged values of the three stages as (step, value) under readable names."""
    history: dict[str, list[tuple[int, float]]] = {}
    for stage, names in CURVES.items():
        with (RUNS / f"{stage}-snippets" / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                for key, name in names.items():
                    if row.get(key):
                        history.setdefault(name, []).append((int(row["step"]), float(row[key])))
    return history


def show(console: Console, before: Any, after: Any) -> None:
    """Print the table of measurements and a few responses to the same prompts."""
    table = Table(title="PPO on test prompts")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, name in (
        ("score", "normalised score"),
        ("kl", "KL to the reference (nats)"),
        ("length", "response length (tokens)"),
    ):
        table.add_row(name, *(f"{float(metrics[f'val/{key}']):.2f}" for metrics, _ in (before, after)))
    console.print(table)
    samples = Table(title="Responses to the same prompts (score)", show_lines=True)
    for column in ("prompt", "before", "after"):
        samples.add_column(column)
    for old, new in list(zip(before[1], after[1], strict=True))[:4]:
        samples.add_row(old["prompt"], *(f"{row['response']} ({row['score']:.1f})" for row in (old, new)))
    console.print(samples)


def demo() -> None:
    """Run the stages and show the result."""
    console, start = Console(), time.time()
    console.rule("1/3 fine-tuning on movie-review snippets")
    main(
        ["fit", "--config", "sft/snippets.yaml", "--trainer.max_steps=600", "--trainer.val_check_interval=600"]
    )  # the preset itself trains longer
    console.rule("2/3 reward model from human ratings")
    reward = main(
        ["fit", "--config", "reward/snippets.yaml", "--trainer.max_steps=400", "--trainer.val_check_interval=400"]
    )
    accuracy = float(reward.trainer.callback_metrics["val/accuracy"])
    console.rule("3/3 PPO")
    before = main(["validate", "--config", "ppo/snippets.yaml"])
    measured_before = dict(before.trainer.callback_metrics), before.model.samples()
    after = main(["fit", "--config", "ppo/snippets.yaml"])
    after.trainer.validate(after.model, datamodule=after.datamodule, verbose=False)
    measured_after = dict(after.trainer.callback_metrics), after.model.samples()
    show(console, measured_before, measured_after)
    picture = RUNS / "demo.png"
    plot_curves(read_curves(), picture, title="RLHF on human-rated movie-review snippets")
    console.print(f"reward model: {accuracy:.3f} of the test pairs ranked as people did")
    console.print(f"learning curves: {picture}; networks: {RUNS}/*-snippets/export; {time.time() - start:.0f} s")


if __name__ == "__main__":
    demo()
