"""What `run.json` says about a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.recorder.examples import rows_in_whole
from lit_models.recording import fingerprint, read_examples


def run_facts(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Facts of a run that the trainer and the module know.

    Args:
        trainer: the trainer, about to train.
        module: the trained module.

    Returns:
        What JSON can hold.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "seed": None if seed is None else int(seed),
        "batch_size": getattr(trainer.train_dataloader, "batch_size", None),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "optimizer": [f"{type(item).__module__}.{type(item).__qualname__}" for item in trainer.optimizers],
        "param_groups": [
            {"optimizer": number, **{name: plain(value) for name, value in group.items() if name != "params"}}
            for number, optimizer in enumerate(trainer.optimizers)
            for group in optimizer.param_groups
        ],
        "precision": str(trainer.precision),
        "lightning": lightning.__version__,
        "torch": torch.__version__,
        "hparams": plain(dict(module.hparams)),
    }


def pool_facts(pool: str | Path | int | None, trainer: Trainer, by_row: bool) -> dict[str, Any]:
    """Size and contents of the pool.

    Args:
        pool: `pool.jsonl`, the number of examples, or None.
        trainer: the trainer; where ids are row numbers, its training set is the pool.
        by_row: whether they are.

    Returns:
        `pool_size` and `pool_fingerprint`, None where unknown, and `pool_ids` where they are not 0, 1, 2, ...
    """
    if isinstance(pool, (str, Path)):
        rows = read_examples(pool)
        ids = sorted(row["id"] for row in rows)
        named = {} if ids == list(range(len(ids))) else {"pool_ids": ids}
        return {"pool_size": len(rows), "pool_fingerprint": fingerprint(rows), **named}
    if pool is None and by_row:
        loader: Any = trainer.train_dataloader
        pool = len(rows_in_whole(loader.dataset)[1])
    return {"pool_size": pool, "pool_fingerprint": None}


def plain(value: Any) -> Any:  # noqa: ANN401
    """What JSON can hold of an option; other objects by their text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
