r"""Record training runs of a small language model, for simulators of training runs.

The model learns to answer a question about a line of text: is a film review good or bad (`snippets`, shipped with the
package), or which topic is a docstring of the Python library on (`docstrings`). Before, it is trained on other lines
with random answers, so that it knows the form and all runs start from the same even guess. Every run then trains on its
own sample of a pool, with its own share of each answer, and after every step the loss of all tests is recorded.

    python examples/record_dynamics.py runs/dynamics --runs 16
    lit-models fit --config influence/tiny.yaml --data.runs runs/dynamics \
        --data.features runs/dynamics/features.safetensors

The shipped `datamodules/assets/dynamics_tiny` was made by

    python examples/record_dynamics.py datamodules/assets/dynamics_tiny --tiny
"""

import argparse
import itertools
import logging
import os
import random
import shutil
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file

from callbacks import TrainingDynamicsRecorder
from datamodules.assets import asset_path
from datamodules.docstrings import ASK, TOPICS, answer, draw_docstrings, train_docstring_tokenizer
from datamodules.instruction import InstructionData
from datamodules.pool import PoolData
from datamodules.snippets import load_snippets
from lit_models.backbones import FromConfig, FromPretrained
from lit_models.influence.features import GradFeatures
from lit_models.nn import WarmupLinear
from lit_models.recording import write_examples
from lit_models.sft import LitSFT
from lit_models.tokenization import load_tokenizer

Row = dict[str, Any]
START = "start"
"""Folder of the model and the tokenizer that all runs start from."""


@dataclass(frozen=True)
class Setting:
    """Sizes of an experiment.

    Args:
        runs: recorded runs on the pool.
        unseen_runs: further runs, on examples that no other run holds.
        pool: examples of the pool.
        unseen_pool: further examples, for `unseen_runs`.
        tests: recorded tests.
        unseen_tests: further ones.
        sample: examples of a run.
        epochs: passes over them.
        width: of the model.
        pretraining: steps before all runs.
        dims: numbers that are left of a gradient, as features.
    """

    runs: int = 16
    unseen_runs: int = 0
    pool: int = 200
    unseen_pool: int = 0
    tests: int = 40
    unseen_tests: int = 0
    sample: int = 48
    epochs: int = 4
    width: int = 64
    pretraining: int = 400
    dims: int = 192


SETTINGS = {
    "snippets": Setting(),
    "docstrings": Setting(36, 4, 400, 400, 48, 48, pretraining=600),
    "tiny": Setting(10, 0, 32, 0, 12, 0, sample=24, epochs=3, width=32, pretraining=300, dims=16),
}


@dataclass(frozen=True)
class Material:
    """What a model is trained on.

    Args:
        pool: rows that runs draw from, sorted by answer, those of unseen runs last.
        tests: rows of the tests.
        prompts: of other lines.
        answers: all possible ones.
        tokenizer: tokenizer of the model.
    """

    pool: list[Row]
    tests: list[Row]
    prompts: list[str]
    answers: list[str]
    tokenizer: Any


def snippets(setting: Setting) -> Material:
    """Clearly good and clearly bad sentences from film reviews, as many of each."""
    parts = []
    for split in ("train", "test"):
        found = [snippet for snippet in load_snippets(split) if abs(snippet.rating) >= 1 and len(snippet.text) < 120]
        random.Random(0).shuffle(found)
        good, bad = ([snippet.text for snippet in found if (snippet.rating > 0) == wanted] for wanted in (True, False))
        pairs = zip(good, bad, strict=False)
        parts.append([row for first, second in pairs for row in (_rated(first, "good"), _rated(second, "bad"))])
    size = setting.pool + setting.unseen_pool
    tests = numbered(parts[1][: setting.tests + setting.unseen_tests])
    rest = [row["context"] for row in parts[0][size:]]
    tokenizer = load_tokenizer(asset_path("movie_snippets/tokenizer"))
    return Material(by_answer(parts[0][:size], setting.pool), tests, rest, [" good", " bad"], tokenizer)


def _rated(text: str, word: str) -> Row:
    context, target = f"{text} This film is", f" {word}"
    return {"text": context + target, "context": context, "target": target}


def docstrings(setting: Setting) -> Material:
    """First lines of docstrings, as many of each topic."""
    pool, tests, rest = draw_docstrings(setting.pool, setting.tests, setting.unseen_pool, setting.unseen_tests)
    answers = [answer(topic) for topic in TOPICS]
    tokenizer = train_docstring_tokenizer(rest)
    return Material(by_answer(pool, setting.pool), tests, [line.text + ASK for line in rest], answers, tokenizer)


def numbered(rows: list[Row]) -> list[Row]:
    """Rows with their places as ids."""
    return [
        {"id": number} | {key: value for key, value in row.items() if key != "id"} for number, row in enumerate(rows)
    ]


def by_answer(rows: list[Row], seen: int) -> list[Row]:
    """Rows sorted by answer, the first `seen` ones before the others, and numbered anew."""

    def target(row: Row) -> str:
        return str(row["target"])

    return numbered(sorted(rows[:seen], key=target) + sorted(rows[seen:], key=target))


def groups_of(rows: list[Row]) -> list[list[int]]:
    """Ranges of ids with the same answer."""
    groups = itertools.groupby(rows, lambda row: row["target"])
    ids = [[row["id"] for row in group] for _, group in groups]
    return [[group[0], group[-1]] for group in ids]


def trainer(folder: str, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **options,
    )


def pretrain(material: Material, setting: Setting) -> None:
    """Train a new model on other lines with random answers, and write it to `start`."""
    tokenizer = material.tokenizer
    tokenizer.save_pretrained(START)
    draw = random.Random(0)
    texts = [prompt + draw.choice(material.answers) for prompt in material.prompts]
    write_examples(f"{START}/lines.jsonl", [{"id": number, "text": text} for number, text in enumerate(texts)])
    data = InstructionData(
        f"{START}/lines.jsonl", START, prompt_column=None, completion_column="text", max_length=64, loss_on="all",
        batch_size=32,
    )  # fmt: skip
    backbone = FromConfig(
        "gpt2",
        {
            "vocab_size": len(tokenizer), "n_positions": 80, "n_embd": setting.width, "n_layer": 2, "n_head": 4,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
    )  # fmt: skip
    model = LitSFT(backbone, START, optimizer=partial(torch.optim.AdamW, lr=2e-3), lr_scheduler=WarmupLinear)
    trainer(START, max_steps=setting.pretraining, max_epochs=-1).fit(model, data)
    model.net.save_pretrained(START)


def record(run: int, groups: list[list[int]], setting: Setting, folder: str) -> None:
    """Record one run."""
    seed_everything(run, verbose=False)
    data = PoolData(
        "pool.jsonl", "tests.jsonl", START, run=run, sample=setting.sample, groups=groups, mixture=1.0, max_length=80,
        batch_size=4,
    )  # fmt: skip
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.001, eps=1e-6)
    model = LitSFT(FromPretrained(START), START, optimizer=optimizer, lr_scheduler=WarmupLinear)
    recorder = TrainingDynamicsRecorder(folder, f"run-{run}", test_dataloader="val", pool="pool.jsonl")
    options = {"callbacks": [recorder], "limit_val_batches": 0, "max_epochs": setting.epochs}
    trainer(START, **options).fit(model, data)


def main() -> None:
    """Write pool, tests, runs and features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", choices=("snippets", "docstrings"), default="snippets")
    parser.add_argument("--runs", type=int, help="recorded runs")
    parser.add_argument("--tiny", action="store_true", help="few and short runs, whose start is not kept")
    options = parser.parse_args()
    setting = SETTINGS["tiny" if options.tiny else options.data]
    if options.runs is not None:
        setting = replace(setting, runs=options.runs)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    transformers.logging.disable_progress_bar()

    seed_everything(0, verbose=False)
    material = (snippets if options.data == "snippets" else docstrings)(setting)
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(options.out)  # what is recorded about the model then names no folder of this machine
    write_examples("pool.jsonl", material.pool)
    write_examples("tests.jsonl", material.tests)
    pretrain(material, setting)
    seen, unseen = material.pool[: setting.pool], material.pool[setting.pool :]
    for run in range(setting.runs + setting.unseen_runs):
        rows, folder = (seen, ".") if run < setting.runs else (unseen, "unseen")
        record(run, groups_of(rows), setting, folder)
        print(f"run {run + 1} of {setting.runs + setting.unseen_runs}", flush=True)
    gradients = GradFeatures(setting.dims, FromPretrained(START), START)
    features = {"pool": gradients.features(material.pool), "tests": gradients.features(material.tests)}
    ids = {"pool_ids": torch.arange(len(material.pool)), "test_ids": torch.arange(len(material.tests))}
    save_file(features | ids, "features.safetensors")
    if options.tiny:
        shutil.rmtree(START)


if __name__ == "__main__":
    main()
