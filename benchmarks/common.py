"""What the comparisons share: a tiny model, a stopwatch, and repetitions that alternate between the two sides."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from datamodules.assets import asset_path

TOKENIZER = asset_path("movie_snippets/tokenizer")
VOCABULARY, FIRST_ORDINARY_TOKEN = 1000, 3  # padding, beginning and end come before
WARM_UP = 3
SIDES = ("ours", "trl")


class Stopwatch:
    """Times training steps by the moments they end, so that loading of data counts as well."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def lap(self) -> None:
        """Note the end of a step."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, float]:
        """Wall and CPU seconds per step after the warm-up."""
        first, last = self.ends[WARM_UP - 1], self.ends[-1]
        steps = len(self.ends) - WARM_UP
        return {"wall": (last[0] - first[0]) / steps, "cpu": (last[1] - first[1]) / steps}


def lightning_trainer(watch: Stopwatch, steps: int, **options: Any) -> Any:
    """Trainer that does nothing but train on the CPU, with a lap per step."""
    from lightning.pytorch import Callback, Trainer

    class Lap(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            watch.lap()

    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Lap()],
        **options,
    )


def trl_lap(watch: Stopwatch) -> Any:
    """The same lap as a callback of the other trainer."""
    from transformers import TrainerCallback

    class Lap(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.lap()

    return Lap()


def trl_options(steps: int, batch_size: int, folder: str) -> dict[str, Any]:
    """Settings under which the other trainer does nothing but train on the CPU in float32."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def tiny_gpt2(scorer: bool = False) -> Any:
    """GPT-2 of width 128 with 2 layers and 4 heads, without dropout; a language model or a scorer."""
    from lit_models import FromConfig

    sizes = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    recipe = FromConfig("gpt2", sizes | dropout | ids)
    return recipe.load_scorer() if scorer else recipe.load()


def compare(sides: dict[str, Callable[[int], Stopwatch]], steps: int, units: dict[str, int]) -> None:
    """Entry point of a comparison.

    Every measurement runs in a process of its own, and the sides take turns.

    Args:
        sides: training of a number of steps, by the names in `SIDES`.
        steps: timed steps.
        units: what a step processes, by name, for the rates.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help=f"timed steps, after {WARM_UP} of warm-up")
    parser.add_argument("--side", choices=SIDES, help="run one measurement in this process and print it as JSON")
    options = parser.parse_args()
    if options.side is not None:
        import torch

        torch.set_num_threads(options.threads[0])
        torch.manual_seed(0)
        print(json.dumps(sides[options.side](WARM_UP + options.steps).result()))
        return
    for threads in options.threads:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.repetitions):
            for side in SIDES:
                runs[side].append(_measure(side, threads, options.steps))
        _report(threads, runs, units)


def _measure(side: str, threads: int, steps: int) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, sys.argv[0], "--side", side, "--threads", str(threads), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])  # the trainers print before it
    return measured


def _report(threads: int, runs: dict[str, list[dict[str, float]]], units: dict[str, int]) -> None:
    """Print the medians of both sides and their ratios."""
    medians = {
        side: {clock: statistics.median(run[clock] for run in measured) for clock in ("wall", "cpu")}
        for side, measured in runs.items()
    }
    print(f"threads: {threads}")
    for side, median in medians.items():
        rates = ", ".join(f"{count / median['wall']:.0f} {unit}/s" for unit, count in units.items())
        walls = " ".join(f"{run['wall']:.4f}" for run in runs[side])
        print(f"  {side:4}  {median['wall']:.4f} s/step (CPU {median['cpu']:.4f} s), {rates}; runs: {walls}")
    ratios = {clock: medians["trl"][clock] / medians["ours"][clock] for clock in ("wall", "cpu")}
    print(f"  trl / ours: {ratios['wall']:.2f} by the clock, {ratios['cpu']:.2f} in CPU time", flush=True)
