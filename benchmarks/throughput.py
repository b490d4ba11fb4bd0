"""What watching a run costs: training steps with `callbacks.Throughput` and `callbacks.HangWatch`, and without.

`python benchmarks/throughput.py [--turns 7] [--log-every 10]`

CPU time per step; the variants take turns in one process, so that other work on the machine hits all of them.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from common import TOKENIZER, VOCABULARY
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

import lit_models._compat  # noqa: F401  (before transformers models)
from callbacks import Throughput
from callbacks.hang import HangWatch
from lit_models.backbones import FromConfig
from lit_models.sft import LitSFT

WARM_UP = 5
SIZES = {
    "tiny": {"width": 32, "layers": 2, "rows": 4, "length": 16, "steps": 100},
    "medium": {"width": 256, "layers": 6, "rows": 4, "length": 64, "steps": 20},
}
WATCHES: dict[str, Any] = {
    "nothing": lambda folder: [],
    "Throughput": lambda folder: [Throughput(peak_tflops=1.0)],
    "Throughput, no norm": lambda folder: [Throughput(grad_norm=False)],
    "HangWatch": lambda folder: [HangWatch(dirpath=folder)],
    "both": lambda folder: [Throughput(peak_tflops=1.0), HangWatch(dirpath=folder)],
}


class Laps(Callback):
    """CPU seconds from the beginning of a batch to the beginning of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time."""
        self.starts.append(time.process_time())

    def seconds(self) -> float:
        """Mean after the warm-up, in which rows of the log are as frequent as in a long run."""
        return (self.starts[-1] - self.starts[WARM_UP]) / (len(self.starts) - 1 - WARM_UP)


def module(width: int, layers: int) -> LitSFT:
    """A Llama under supervised fine-tuning."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 2),
        "num_key_value_heads": max(width // 64, 2),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LitSFT(FromConfig("llama", sizes), str(TOKENIZER), optimizer=partial(torch.optim.AdamW, lr=1e-4))


def step_seconds(size: dict[str, int], watch: Any, log_every: int) -> float:
    """CPU seconds of a training step."""
    ids = torch.randint(3, VOCABULARY, (size["rows"], size["length"]), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    laps = Laps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=size["steps"] + WARM_UP + 1,
            log_every_n_steps=log_every,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*watch(folder), laps],
        )
        trainer.fit(module(size["width"], size["layers"]), DataLoader([batch] * trainer.max_steps, batch_size=None))
    return laps.seconds()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, size in SIZES.items():
        found: dict[str, list[float]] = {watch: [] for watch in WATCHES}
        for _ in range(options.turns):
            for watch, make in WATCHES.items():
                found[watch].append(step_seconds(size, make, options.log_every))
        for watch, values in found.items():
            ratios = [value / base for value, base in zip(values, found["nothing"], strict=True)]
            best = min(values) / min(found["nothing"])
            print(
                f"{name:7} {watch:20} {1e3 * min(values):7.2f} ms per step at best, ratio {best:.3f}; "
                f"median ratio of turns {statistics.median(ratios):.3f}",
                flush=True,
            )
