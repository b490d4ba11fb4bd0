"""Weights of a model at the moments of its training that were kept."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_models.shards import is_in_shards, read_shards

Checkpoint: TypeAlias = "Mapping[str, Tensor] | str | Path | nn.Module | Callable[[], Any] | None"


def read_checkpoint(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """State dict of a checkpoint.

    Args:
        checkpoint: a state dict, a module, a Lightning checkpoint in memory, a function that gives any of these, or the
            path of a Lightning checkpoint (file or sharded folder), of a torch or safetensors file, or of a Hugging
            Face folder.

    Returns:
        Tensors by name; those of files are read when they are used where the format allows it.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        inner = checkpoint.get("state_dict")
        return inner if isinstance(inner, Mapping) else checkpoint
    if isinstance(checkpoint, (str, Path)):
        return _read_path(Path(checkpoint))
    if callable(checkpoint):
        return read_checkpoint(checkpoint())
    raise ValueError(f"checkpoints: {type(checkpoint).__name__} is no checkpoint; give a state dict, path or function")


def _read_path(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    if path.is_file():
        if path.suffix == ".safetensors":
            return load_file(path)
        return read_checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    if is_in_shards(path):
        return read_checkpoint(read_shards(path, optimizers=False))
    if files := sorted(path.glob("*.safetensors")):
        return {key: value for file in files for key, value in load_file(file).items()}
    raise ValueError(
        f"checkpoints: {path} is neither a checkpoint file nor a folder with one; "
        "give a file such as step=10.ckpt or a folder written by save_pretrained"
    )


def _prefix(state: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """What stands before the names of the model in those of a checkpoint, such as `net.`."""
    names = list(names)
    if any(name in state for name in names):
        return ""
    found: dict[str, int] = {}
    for name in names:
        for key in state:
            if key.endswith(f".{name}"):
                prefix = key.removesuffix(name)
                found[prefix] = found.get(prefix, 0) + 1
    found = {prefix: number for prefix, number in found.items() if not prefix.startswith("ema.")} or found
    best = [prefix for prefix, number in found.items() if number == max(found.values())]
    if not best:
        raise ValueError("checkpoints: a checkpoint holds no weights of this model; give those of the same network")
    if len(best) > 1:
        raise ValueError(
            f"checkpoints: a checkpoint holds several networks ({', '.join(sorted(best))}); "
            "give a function that returns the state dict of one of them"
        )
    return best[0]


def state_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameters and buffers of a model at a checkpoint; the model stays as it is.

    Names in a checkpoint may have a prefix, such as that of a network in a LightningModule, and averaged weights
    (`ema.`) are passed over. Frozen parameters and buffers that the checkpoint lacks are those of the model.

    Args:
        model: the model.
        checkpoint: see `read_checkpoint`; None takes the weights of the model.

    Returns:
        Tensors by the names in the model, each shared parameter once.

    Raises:
        ValueError: if it is a checkpoint of another model.
    """
    own = dict(model.named_parameters())
    values = {name: value.detach() for name, value in (*own.items(), *model.named_buffers())}
    if checkpoint is None:
        return values
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    state = read_checkpoint(checkpoint)
    prefix = _prefix(state, own)
    for name, value in values.items():
        shared = aliases[id(own[name])] if name in own else [name]
        keys = [f"{prefix}{alias}" for alias in shared if f"{prefix}{alias}" in state]
        if not keys and name in own and own[name].requires_grad:
            raise ValueError(
                f"checkpoints: a checkpoint lacks the weight {name!r} of {type(model).__name__}; "
                "give those of the same network"
            )
        if keys and state[keys[0]].shape != value.shape:
            raise ValueError(
                f"checkpoints: {name!r} has shape {tuple(state[keys[0]].shape)} in a checkpoint and "
                f"{tuple(value.shape)} in the model; give those of the same network"
            )
        values[name] = state[keys[0]].detach() if keys else value
    return values
