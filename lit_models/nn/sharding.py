"""Sharding of networks with FSDP2 (`fully_shard`) under Lightning's ModelParallelStrategy."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Sharding:
    """How networks are sharded, recomputed and compiled.

    Args:
        activation_checkpointing: recompute each transformer block in the backward pass to save memory.
        compile: compile each network in place; state-dict keys stay as they are.
        param_dtype: type of the gathered parameters and of the computation under `fully_shard`.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"


def block_classes(network: nn.Module) -> set[str]:
    """Names of the repeated block classes that a Hugging Face network declares."""
    names: set[str] = set()
    for module in network.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    return names


def shard(network: nn.Module, mesh: "DeviceMesh | None", options: Sharding) -> nn.Module:
    """Apply the options to a network in place.

    Args:
        network: a Hugging Face network or a module that contains one.
        mesh: the strategy's device mesh, or None outside ModelParallelStrategy, which then shards nothing.
        options: what to apply.

    Returns:
        The same network.
    """
    if options.activation_checkpointing:
        for module in network.modules():
            enable: Any = getattr(module, "gradient_checkpointing_enable", None)
            if enable is not None:
                enable()
                break
    if mesh is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if mesh.mesh_dim_names and "data_parallel" in mesh.mesh_dim_names:
            mesh = mesh["data_parallel"]
        dtype = getattr(torch, options.param_dtype)
        policy = MixedPrecisionPolicy(param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32)
        names = block_classes(network)
        for module in network.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
    if options.compile:
        network.compile()
    return network


def merge_shards(folder: Path, file: Path) -> Path:
    """Write a checkpoint that Lightning saved in shards as one file.

    Args:
        folder: the sharded checkpoint; it must fit in memory.
        file: where to write.

    Returns:
        The file.

    Raises:
        ValueError: if the folder holds no sharded checkpoint.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    extra = folder / "meta.pt"  # what Lightning keeps beside the tensors: hyperparameters, loops, callbacks
    if not extra.is_file():
        raise ValueError(f"{folder} is a folder, but not one with a sharded checkpoint")
    dcp_to_torch_save(folder, file)
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    rest = torch.load(extra, map_location="cpu", weights_only=True)
    merged = file.with_suffix(".merged")
    torch.save(tensors | rest, merged)
    return merged.replace(file)
