"""Checkpoints that are whole or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_models.shards import read_shards

# Trainers look for checkpoints by parts of their names, so a draft must not carry the name of what it will be.
DRAFT = ".unfinished-"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and moves it there when it is complete and on the disk.

    A process killed while writing, or a full disk, leaves the previous checkpoint as it was. What a killed process
    left behind is removed when the next checkpoint is written to the same folder.

    Note:
        Only local paths; others are written by Lightning as usual. Two runs must not write to one folder.

    Example::

        Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            path: final name.
            storage_options: not supported for local paths.

        Raises:
            OSError: if the file can't be written; the message says that the previous checkpoint is intact.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        draft = target.with_name(f"{DRAFT}{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for left_behind in target.parent.glob(f"{DRAFT}*"):
                left_behind.unlink()
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.is_dir():  # shards of a run under another strategy
                shutil.rmtree(target)
            os.replace(draft, target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            raise OSError(
                f"the checkpoint {target} could not be written ({reason}); checkpoints written before are intact, "
                "free some space and resume with --ckpt_path last"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def load_checkpoint(self, path: _PATH, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Read a checkpoint; one in shards, as `FullyShardStrategy` writes it, is put together in memory.

        Args:
            path: file, or folder of shards.
            *args: see `TorchCheckpointIO`.
            **kwargs: see `TorchCheckpointIO`.

        Returns:
            The checkpoint.

        Raises:
            ValueError: if the path is a folder of anything else.
        """
        if "://" not in str(path) and Path(path).is_dir():
            return read_shards(path)
        return super().load_checkpoint(path, *args, **kwargs)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The failed write behind an error; torch reports one as a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Put the move itself on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
