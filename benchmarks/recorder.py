"""What recording a training run costs; every comparison takes turns in one process.

`python benchmarks/recorder.py [steps|tests|writing|loading]`

steps    a training step with the recorder against one without, while nothing is measured
tests    measuring after every step, against the bare forward passes of the tests
writing  files of a run with 1000 tests, per step
loading  32 runs of 288 steps and 1055 tests, against the same values as JSON lines
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

import lit_models._compat  # noqa: F401  (before transformers models)
from callbacks.dynamics import TrainingDynamicsRecorder
from lit_models.recording import DynamicsRun, RunWriter, find_runs, write_run

TURNS, STEPS, WARM_UP = 7, 60, 5
BATCH, PROMPT, TESTS = 4, 30, 96
"""A batch, its tokens before the answer, and the tests."""


def rows(num: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 30 tokens with an answer of one token."""
    tokens = torch.randint(4, 1024, (num, PROMPT + 2), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1] % 4
    return [{"id": row, "input_ids": tokens[row], "labels": labels[row]} for row in range(num)]


class LM(LightningModule):
    """GPT-2 with 2 layers of width 64 and a vocabulary of 1024."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Loss of the answers."""
        return self.net(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Laps(Callback):
    """CPU seconds of each step, from the beginning of a batch to the beginning of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time."""
        self.starts.append(time.process_time())

    def seconds(self) -> list[float]:
        """Seconds of all steps but the first ones."""
        return np.diff(self.starts)[WARM_UP:].tolist()


def steps_of(recorder: Callable[[str], Callback] | None) -> list[float]:
    """CPU seconds of training steps."""
    seed_everything(0, verbose=False)
    laps, module = Laps(), LM()
    loader = DataLoader(rows(400, 1), batch_size=BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [] if recorder is None else [recorder(folder)]
        Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*made, laps],
        ).fit(module, loader)
    return laps.seconds()


def forward_of_tests() -> list[float]:
    """CPU seconds of the bare forward passes of all tests, with their losses."""
    seed_everything(0, verbose=False)
    net = LM().net.eval()
    batches = [torch.utils.data.default_collate(rows(TESTS, 2)[start : start + 64]) for start in range(0, TESTS, 64)]
    seconds = []
    for _ in range(STEPS):
        begin = time.process_time()
        with torch.no_grad():
            for batch in batches:
                logits = net(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
                labels = batch["labels"][:, 1:]
                kept = labels != -100
                torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")
        seconds.append(time.process_time() - begin)
    return seconds[WARM_UP:]


def in_turns(sides: dict[str, Callable[[], list[float]]]) -> dict[str, float]:
    """Median seconds of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS + 1):
        for name, run in sides.items():
            measured = run()
            if turn:
                times[name] += measured
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rare(folder: str, source: str = "batch") -> Callback:
    """A recorder that measures nothing but the start."""
    tests: Any = rows(TESTS, 2)
    return TrainingDynamicsRecorder(
        folder, test_dataset=tests, every_n_steps=10_000, record_end=False, id_source=source
    )


def often(folder: str) -> Callback:
    """A recorder that measures all tests after every step."""
    tests: Any = rows(TESTS, 2)
    return TrainingDynamicsRecorder(folder, test_dataset=tests)


def steps() -> None:
    """Cost of a step whose tests are not measured."""
    sides = {
        "bare": lambda: steps_of(None),
        "ids of batches": lambda: steps_of(rare),
        "ids of the sampler": lambda: steps_of(lambda folder: rare(folder, "sampler")),
    }
    medians = in_turns(sides)
    for name, seconds in medians.items():
        extra = seconds - medians["bare"]
        ratio = seconds / medians["bare"]
        print(f"  {name:20} {1000 * seconds:8.3f} ms a step   + {1e6 * extra:5.0f} us   x {ratio:.3f}")


def tests() -> None:
    """Cost of measuring after every step."""
    medians = in_turns(
        {
            "bare": lambda: steps_of(None),
            "measuring every step": lambda: steps_of(often),
            "forward of the tests": forward_of_tests,
        }
    )
    for name, seconds in medians.items():
        print(f"  {name:20} {1000 * seconds:8.3f} ms")
    ratio = (medians["measuring every step"] - medians["bare"]) / medians["forward of the tests"]
    print(f"  what measuring adds to a step / bare forward passes: x {ratio:.3f} ({TESTS} tests)")


def writing() -> None:
    """Cost of the files alone."""
    info = {"test_ids": list(range(1000)), "metrics": ["loss"], "pool_size": 1200}
    values = torch.rand(1000)
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run", info)
        writer.begin()
        begin = time.perf_counter(), time.process_time()
        for step in range(1, 501):
            writer.step(step, torch.arange(8), [1e-3])
            writer.record(step, "loss", values)
            if writer.ready():
                writer.flush()
        writer.finish()
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        size = sum(path.stat().st_size for path in (Path(folder) / "run").iterdir())
    print(f"  {2 * wall:.3f} ms a step by the clock, {2 * cpu:.3f} ms of CPU, {size / 500:.0f} bytes a step")


def loading() -> None:
    """Reading 32 runs."""
    generator = np.random.default_rng(0)
    runs, length, tests = 32, 288, 1055
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            values = generator.random((length, tests), np.float32)
            ids = generator.integers(0, 1200, (length, 8))
            info = {"test_ids": list(range(tests)), "pool_size": 1200}
            write_run(
                Path(folder) / f"run-{run}", info, ids, np.full(length, 1e-3), range(1, length + 1), {"loss": values}
            )
            with (Path(folder) / f"run-{run}.out").open("w") as file:
                for test in range(tests):
                    points = [{"step": k + 1, "loss": float(values[k, test])} for k in range(length)]
                    file.write(json.dumps({"id": test, "loss_trajectory": points}) + "\n")

        def ours() -> None:
            for path in find_runs(folder):
                run = DynamicsRun.open(path)
                assert run.values().shape == (length, tests)
                assert len(run.ids) == length

        def lines() -> None:
            for path in sorted(Path(folder).glob("*.out")):
                rows = [json.loads(line) for line in path.open()]
                table = np.array([[point["loss"] for point in row["loss_trajectory"]] for row in rows], np.float32).T
                assert table.shape == (length, tests)

        times: dict[str, list[float]] = {"ours": [], "JSON lines": []}
        for _ in range(2):
            for name, read in (("ours", ours), ("JSON lines", lines)):
                begin = time.process_time()
                read()
                times[name].append(time.process_time() - begin)
    best = {name: min(seconds) for name, seconds in times.items()}
    ratio = best["JSON lines"] / best["ours"]
    print(f"  ours {best['ours']:.3f} s, JSON lines {best['JSON lines']:.3f} s of CPU: x {ratio:.0f}")


PARTS = {"steps": steps, "tests": tests, "writing": writing, "loading": loading}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.parts or PARTS:
        print(name, flush=True)
        PARTS[name]()
