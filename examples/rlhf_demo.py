"""The whole of RLHF on real human ratings: fine-tuning, reward model, PPO with and without its two extensions.

`make demo` runs this: small models are trained with the shipped presets, and a table, sample responses and
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
STAGES = {"sft": ("train/loss", "fine-tuning: loss"), "reward": ("train/loss", "reward model: loss")}
METHODS = {
    "PPO": [],
    "MA-PPO": ["--config", "ppo/method-ma.yaml"],
    "CD-PPO": ["--config", "ppo/method-cd.yaml"],
}
CURVES = {
    "score/mean": "score",
    "kl/ref": "KL to the reference (nats)",
    "response/len_mean": "response length (tokens)",
    "policy/entropy": "entropy (nats per token)",
}
MEASURED = {"score": "normalised score", "kl": CURVES["kl/ref"], "length": CURVES["response/len_mean"]}


def folder(method: str) -> Path:
    """Run folder of a method."""
    return RUNS / f"{method.lower()}-snippets"


def read_curve(run: Path, key: str) -> list[tuple[int, float]]:
    """Logged values of a run as (step, value)."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]


def read_curves() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Curves of each method, and of the two stages before it, under readable names."""
    curves = {method: {name: read_curve(folder(method), key) for key, name in CURVES.items()} for method in METHODS}
    return curves | {"": {name: read_curve(RUNS / f"{stage}-snippets", key) for stage, (key, name) in STAGES.items()}}


def measured(cli: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and samples of the newest validation."""
    values = cli.trainer.callback_metrics
    return {key: float(values[f"val/{key}"]) for key in MEASURED}, cli.model.samples()


def show(console: Console, results: dict[str, tuple[dict[str, float], list[dict[str, Any]]]]) -> None:
    """Print the table of measurements and a few responses to the same prompts."""
    table = Table(title="Test prompts")
    samples = Table(title="Responses to the same prompts (score)", show_lines=True)
    table.add_column("")
    samples.add_column("prompt")
    for name in results:
        table.add_column(name, justify="right")
        samples.add_column(name)
    for key, label in MEASURED.items():
        table.add_row(label, *(f"{values[key]:.2f}" for values, _ in results.values()))
    for rows in list(zip(*(rows for _, rows in results.values()), strict=True))[:3]:
        samples.add_row(rows[0]["prompt"], *(f"{row['response']} ({row['score']:.1f})" for row in rows))
    console.print(table)
    console.print(samples)


def demo() -> None:
    """Run the stages and show the result."""
    console, start = Console(), time.time()
    console.rule("1/3 fine-tuning on movie-review snippets")
    main(
        ["fit", "--config", "sft/snippets.yaml", "--trainer.max_steps=500", "--trainer.val_check_interval=500"]
    )  # the preset itself trains longer
    console.rule("2/3 reward model from human ratings")
    reward = main(
        ["fit", "--config", "reward/snippets.yaml", "--trainer.max_steps=350", "--trainer.val_check_interval=350"]
    )
    accuracy = float(reward.trainer.callback_metrics["val/accuracy"])
    console.rule("3/3 PPO, over macro actions (MA-PPO), with curiosity (CD-PPO)")
    results = {"before": measured(main(["validate", "--config", "ppo/snippets.yaml"]))}
    for method, options in METHODS.items():
        console.rule(method)
        root = f"--trainer.default_root_dir={folder(method)}"
        results[method] = measured(main(["fit", "--config", "ppo/snippets.yaml", *options, root]))
    show(console, results)
    picture = RUNS / "demo.png"
    plot_curves(read_curves(), picture, title="RLHF on human-rated movie-review snippets")
    console.print(f"reward model: {accuracy:.3f} of the test pairs ranked as people did")
    console.print(f"learning curves: {picture}; networks: {RUNS}/*-snippets/export; {time.time() - start:.0f} s")


if __name__ == "__main__":
    demo()
