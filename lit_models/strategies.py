"""Strategies of the Trainer."""

import ctypes
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_models.base import LitBase
from lit_models.shards import EXTRA, is_in_shards, shard_shapes

# Trainers look for checkpoints by parts of their names, so neither carries the name of what it is.
DRAFT = ".incomplete-shards"
"""Name of a checkpoint that is being written."""
OLD = ".replaced-shards"
"""Name of a checkpoint that is being removed."""


class FullyShardStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for networks that every process holds a shard of (FSDP2), made safe.

    In addition to what it extends,

    * all devices of all nodes share the weights, without their number being given;
    * a checkpoint is written beside its name and takes its place when it is complete, so that a killed run leaves the
      previous one as it was;
    * a run resumes from a checkpoint of any strategy and number of processes, if it belongs to the module, which is
      checked; with optimizers that keep no state, and with parameters that were never trained, too.

    Args:
        save_distributed_checkpoint: write a folder, to which each process adds its shards, or one file, for which the
            first process gathers all.
        process_group_backend: of torch.distributed; that of the devices by default.
        timeout: time after which a process gives up waiting for another.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Make one group of all processes."""
        self._data_parallel_size: int | Literal["auto"] = self.num_nodes * self.num_processes
        super().setup_environment()

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:  # noqa: ANN401
        """Write a checkpoint and put it in the place of the previous one of its name.

        All processes must call it, on a file system that they share.

        Args:
            checkpoint: what to write.
            filepath: final name; that of the first process counts.
            storage_options: not supported.

        Raises:
            OSError: if it can't be written; the previous one is intact then.
        """
        target = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if is_in_shards(target) and self.is_global_zero:
                _discard(target)
            super().save_checkpoint(checkpoint, target, storage_options)
            return
        draft = target.with_name(DRAFT)
        if self.is_global_zero:
            for left_behind in (draft, target.with_name(OLD)):
                shutil.rmtree(left_behind, ignore_errors=True)
        self.barrier()
        failure: BaseException | None = None
        try:
            super().save_checkpoint(checkpoint, draft, storage_options)  # returns when all have written
            if self.is_global_zero:
                _sync_files(draft)
                _take_place(draft, target)
        except Exception as error:  # whatever it is, the others must not wait for this process
            failure = error
        except CheckpointException as error:  # which is no Exception, and holds those of all processes
            failure = next(iter(error.failures.values()))[0]
        if self.reduce_boolean_decision(failure is not None, all=False):
            if self.is_global_zero:
                shutil.rmtree(draft, ignore_errors=True)
            raise OSError(
                f"the checkpoint {target} could not be written ({failure or 'see the messages of other processes'}); "
                "checkpoints written before are intact, free some space and resume with --ckpt_path last"
            ) from failure

    # -- loading -----------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and the states of optimizers.

        Args:
            checkpoint_path: file or folder of shards; that of the first process counts.
            weights_only: see `torch.load`; only what it finds safe is loaded by default.

        Returns:
            The rest of the checkpoint.

        Raises:
            CheckpointMismatchError: if it is of another model.
            ValueError: if there is no checkpoint.
        """
        path = Path(self.broadcast(checkpoint_path))
        weights_only = True if weights_only is None else weights_only
        if is_in_shards(path):
            return self._load_shards(path, weights_only)
        if not path.is_file():
            raise ValueError(f"ckpt_path: there is no checkpoint at {path}")
        return self._load_file(path, weights_only)

    def _load_shards(self, path: Path, weights_only: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.checkpoint.state_dict_loader import load

        module = self._module()
        shapes = shard_shapes(path)
        module.check_state(_below(shapes, "state_dict."))
        state: dict[str, Any] = {"state_dict": get_model_state_dict(module)}
        load(state, storage_reader=FileSystemReader(path))
        module.load_state_dict(state["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = {key: get_optimizer_state_dict(module, optimizer)}
            # Parameters that were never trained have no state.
            planner = DefaultLoadPlanner(allow_partial_load=True)
            load(state, storage_reader=FileSystemReader(path), planner=planner)
            set_optimizer_state_dict(module, optimizer, state[key], options=StateDictOptions(cpu_offload=True))
            saved = _below(shapes, f"{key}.state.")
            for name, parameter in module.named_parameters():
                if not any(entry.startswith(f"{name}.") for entry in saved):
                    optimizer.state.pop(parameter, None)
        rest: dict[str, Any] = torch.load(path / EXTRA, map_location="cpu", weights_only=weights_only)
        return rest

    def _load_file(self, path: Path, weights_only: bool) -> dict[str, Any]:
        """Take this process's part of everything; nothing else is read from the disk."""
        module = self._module()
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        weights: dict[str, Tensor] = checkpoint.pop("state_dict")
        module.check_state({name: tuple(value.shape) for name, value in weights.items()})
        own = module.state_dict()
        module.load_state_dict({name: _part(value, own[name]) for name, value in weights.items() if name in own})
        for optimizer, saved in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            # Parameters are numbered in the order of the groups, here and there.
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {key: _part(value, parameter) for key, value in saved["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=False)
                if number in saved["state"]
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        return checkpoint

    def _module(self) -> LitBase:
        module = self.lightning_module
        if not isinstance(module, LitBase):
            raise TypeError(
                f"trainer.strategy: FullyShardStrategy trains modules of this collection, not {type(module).__name__}; "
                "take ModelParallelStrategy"
            )
        return module


def _below(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _part(value: Any, like: Tensor) -> Any:  # noqa: ANN401
    """This process's part of a whole tensor, divided like another one of its shape; other values as they are."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sync_files(folder: Path) -> None:
    """Have a folder and its files on the disk before it takes the place of another."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take_place(new: Path, target: Path) -> None:
    """Put a folder in the place of another, or of a file or nothing, in one move where the system can."""
    if target.is_file():
        target.unlink()
    if target.is_dir() and _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    if target.is_dir():
        _discard(target)
    new.rename(target)


def _discard(folder: Path) -> None:
    """Remove a folder, which is gone from its name at once."""
    old = folder.with_name(OLD)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two folders in one move; False where the system or file system knows no such move."""
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0
