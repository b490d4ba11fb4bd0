"""Checkpoints of stopped runs: one in the folder of a run, there as long as it is needed."""

import os
import shutil
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch import Trainer

NAME = "hpc_ckpt_"
"""Lightning resumes from the checkpoint of this name and the highest number in `default_root_dir` when on SLURM."""
DRAFT = ".requeue-draft"
"""Folder in which one is written; everything that a killed process may leave of it is in there."""


def save_stopped_run(trainer: Trainer) -> Path | str:
    """Write a whole checkpoint beside its name, move it there, and remove those before; a collective operation.

    Args:
        trainer: of the run, which goes into its `default_root_dir`.

    Returns:
        Where it is.
    """
    run: Any = trainer
    if is_remote(trainer.default_root_dir):  # such systems have no move that is done or not
        place: str = trainer.strategy.broadcast(run._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
        trainer.save_checkpoint(place, weights_only=False)
        return place
    root = Path(trainer.default_root_dir)
    old = saved_runs(root)
    number = trainer.strategy.broadcast(_number(old[-1]) + 1 if old else 1)
    path = root / f"{NAME}{number}.ckpt"
    draft = root / DRAFT / path.name
    if trainer.is_global_zero:
        _remove(draft.parent)
        draft.parent.mkdir(parents=True)
    trainer.strategy.barrier("requeue draft")
    try:
        trainer.save_checkpoint(draft, weights_only=False)  # ends with a barrier
    except Exception:
        if trainer.is_global_zero:
            _remove(draft.parent)
        raise
    if trainer.is_global_zero:
        os.replace(draft, path)
        for obsolete in (*old, draft.parent):
            _remove(obsolete)
    trainer.strategy.barrier("requeue")
    return path


def forget_stopped_runs(trainer: Trainer) -> None:
    """Remove what a run that is ready has needed to go on, so that no later run in its folder finds it.

    Args:
        trainer: of the run; nothing is removed if it did not go on from a checkpoint.
    """
    resumed = str(trainer.ckpt_path or "")
    is_own = Path(resumed).name.startswith(NAME)
    if is_remote(resumed):
        if is_own:
            url_to_fs(resumed)[0].rm(resumed, recursive=True)
        return
    if is_own:
        _remove(Path(resumed))
    root = Path(trainer.default_root_dir)
    if resumed and not is_remote(root) and Path(resumed).absolute().is_relative_to(root.absolute()):
        for path in (*saved_runs(root), root / DRAFT):
            _remove(path)


def saved_runs(folder: Path) -> list[Path]:
    """Checkpoints of stopped runs in a folder, the newest last."""
    found = [path for path in folder.glob(f"{NAME}*.ckpt") if path.stem.removeprefix(NAME).isdecimal()]
    return sorted(found, key=_number)


def newest_checkpoint(trainer: Trainer) -> Path | str | None:
    """The checkpoint of a stopped run, unless the run has gone on since and saved a later one.

    Args:
        trainer: says where checkpoints are.

    Returns:
        The path, or None if `ckpt_path: last` of the trainer is right.
    """
    if is_remote(trainer.default_root_dir):
        remote: str | None = trainer._checkpoint_connector._hpc_resume_path
        return remote
    runs = saved_runs(Path(trainer.default_root_dir))
    if not runs:
        return None
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    last = [path for folder in folders if folder for path in Path(folder).glob("last*.ckpt")]
    later = any(path.stat().st_mtime > runs[-1].stat().st_mtime for path in last)
    return None if later else runs[-1]


def is_remote(path: object) -> bool:
    """Whether a path is on a file system of another kind than the operating system's."""
    return "://" in str(path)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix(NAME))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
