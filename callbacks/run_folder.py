"""Whether the folder of a run is what the run needs: it can be written to, and all processes see the same one."""

import os
import socket
import time
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

from callbacks.stopped_runs import is_remote

MARK = ".seen-by-all"
SEEN_S = 10.0
"""Seconds in which a file that one node has written may come to be seen by another."""


def check_writable(trainer: Trainer) -> None:
    """Make sure that the first process can write to the folder of the run.

    Args:
        trainer: whose `default_root_dir` it is; the folder is made.

    Raises:
        ValueError: if it can't.
    """
    root = trainer.default_root_dir
    if is_remote(root) or not trainer.is_global_zero:
        return
    reason = "no permission"
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror)
    if not os.access(root, os.W_OK | os.X_OK):
        raise ValueError(f"trainer.default_root_dir: {root} can't be written to ({reason}); give another folder")


def check_shared(trainer: Trainer) -> None:
    """Make sure that all processes go on from the same checkpoint, and see what the first one writes; collective.

    Args:
        trainer: about to fit.

    Warns:
        UserWarning: if processes do not share the folder, and only the first one writes to it.

    Raises:
        ValueError: if they do not share it, and each of them writes to it, or they would not go on from one checkpoint.
    """
    if trainer.world_size == 1:
        return
    found = str(trainer.ckpt_path or "")
    own = (found, not found or is_remote(found) or Path(found).exists(), _sees_mark(trainer), socket.gethostname())
    ranks = [own] * trainer.world_size
    distributed.all_gather_object(ranks, own)
    remedy = "trainer.default_root_dir must be on a file system that all nodes share, under one name"
    first = ranks[0][0]
    for rank, (path, exists, sees, host) in enumerate(ranks):
        who = f"process {rank} (on {host})"
        if path != first or not exists:
            there = path if path != first and path else "none"
            raise ValueError(f"{who} finds {there} where the first one goes on from {first or 'none'}; {remedy}")
        if not sees:
            text = f"{who} does not see what the first one writes to {trainer.default_root_dir}; {remedy}"
            if isinstance(trainer.strategy, ModelParallelStrategy):
                raise ValueError(text)
            rank_zero_warn(f"{text}, or the run can't go on from its checkpoints on other nodes")
            return


def _sees_mark(trainer: Trainer) -> bool:
    """Whether a file that the first process writes for a moment can be seen; collective."""
    if is_remote(trainer.default_root_dir):
        return True
    mark = Path(trainer.default_root_dir) / MARK
    if trainer.is_global_zero:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    trainer.strategy.barrier("mark written")
    deadline = time.monotonic() + SEEN_S
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    trainer.strategy.barrier("mark seen")
    if trainer.is_global_zero:
        mark.unlink(missing_ok=True)
    return seen
