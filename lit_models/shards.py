"""Checkpoints in shards, which a strategy of sharded networks writes, as whole ones (plain torch; a leaf module).

Such a checkpoint is a folder: one file per process, `.metadata`, which tells where each tensor lies, and `meta.pt`,
with all that is not in shards.
"""

from pathlib import Path
from typing import Any

import torch

EXTRA = "meta.pt"
"""File beside the tensors: hyperparameters, loops, callbacks."""


def is_in_shards(path: str | Path) -> bool:
    """Whether a path is a checkpoint in shards."""
    return (Path(path) / EXTRA).is_file() and (Path(path) / ".metadata").is_file()


def read_shards(folder: str | Path, optimizers: bool = True) -> dict[str, Any]:
    """Read a checkpoint in shards as a whole one, which must fit in memory.

    Args:
        folder: the checkpoint.
        optimizers: whether to read the states of optimizers too.

    Returns:
        What Lightning would have written to one file.

    Raises:
        ValueError: if the folder holds no checkpoint in shards.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    folder = Path(folder)
    if not is_in_shards(folder):
        raise ValueError(f"{folder} is a folder, but not one with a sharded checkpoint")
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys=None if optimizers else {"state_dict"})
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    found = [state.pop(f"optimizer_{number}") for number in range(sum(key.startswith("optimizer_") for key in state))]
    whole: dict[str, Any] = state | torch.load(folder / EXTRA, map_location="cpu", weights_only=True)
    if optimizers:
        whole["optimizer_states"] = [_by_number(optimizer) for optimizer in found]
    return whole


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """State of an optimizer by the numbers of its parameters, which shards hold by their names."""
    groups = optimizer["param_groups"]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in optimizer.get("state", {}).items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def merge_shards(folder: str | Path, file: str | Path, optimizers: bool = True) -> Path:
    """Write a checkpoint in shards as one file, which any strategy resumes from.

    Args:
        folder: the checkpoint; it must fit in memory.
        file: where to write.
        optimizers: whether to keep the states of optimizers, without which no training resumes.

    Returns:
        The file.

    Raises:
        ValueError: if the folder holds no checkpoint in shards.
    """
    draft = Path(file).with_suffix(".merged")
    torch.save(read_shards(folder, optimizers), draft)
    return draft.replace(file)


def shard_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint in shards, by names such as `state_dict.net.weight`."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
