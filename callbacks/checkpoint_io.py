"""Checkpoints that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO

SUFFIX = ".part"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and moves it there when it is complete and on the disk.

    A process killed while writing, or a full disk, leaves the previous checkpoint as it was.

    Note:
        Only local paths; others are written by Lightning as usual.

    Example::

        Trainer(plugins=[AtomicCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            path: final name.
            storage_options: not supported by this plugin.

        Raises:
            OSError: if the file can't be written; the message says that the previous checkpoint is intact.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(target.name + SUFFIX)
        try:
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            draft.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {target} could not be written ({error}); checkpoints written before are intact, free some "
                "space and resume with --ckpt_path last"
            ) from error
        os.replace(draft, target)
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Put the move itself on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
