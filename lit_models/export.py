"""From checkpoints and live modules to Hugging Face folders.

`python -m lit_models.export CHECKPOINT FOLDER` writes one folder per network, or pipeline, of a Lightning checkpoint.
"""

import copy
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = """---
library_name: {library}
tags: [lit-models]
---
# {name}

Written by `{cls}` of lit-models after {steps} optimizer steps.{usage}

| metric | value |
|---|---|
{rows}
"""
PIPELINE = """ It holds all parts of a pipeline of diffusers:

```python
from {module} import {kind}

pipeline = {kind}.from_pretrained("this folder")
```"""


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """State of a network on the CPU, gathered from all ranks where it is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if _is_sharded(network):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = dict(get_model_state_dict(network, options=options))
        first: dict[nn.Parameter, str] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if first.setdefault(parameter, name) != name and name in state:
                state[name] = state[first[parameter]]  # tied weights were gathered twice
        return state
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def _is_sharded(network: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def is_pipeline(model: object) -> bool:
    """Whether a model is a pipeline of diffusers."""
    return hasattr(model, "register_modules") and hasattr(model, "components")


def write_pretrained(
    models: "Mapping[str, PreTrainedModel | Any]",
    directory: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write models as folders that `from_pretrained` loads, adapters merged.

    All ranks must call it; rank 0 writes.

    Args:
        models: model, or pipeline of diffusers, per folder name.
        directory: parent of the folders.
        tokenizer: written beside each model; pipelines have their own.
        card: `class`, `steps` and `metrics` for the model card.

    Returns:
        Folder per model.
    """
    folders = {name: Path(directory) / name for name in models}
    for name, model in models.items():
        write = _write_pipeline if is_pipeline(model) else _write_model
        write(model, folders[name])
        if dist.is_initialized() and dist.get_rank() != 0:
            continue
        if tokenizer is not None and not is_pipeline(model):
            tokenizer.save_pretrained(folders[name])
        (folders[name] / "README.md").write_text(_card(name, model, card or {}))
    return folders


def _card(name: str, model: object, facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {metric} | {value} |" for metric, value in sorted(facts.get("metrics", {}).items()))
    library, usage = "transformers", ""
    if is_pipeline(model):
        kind = type(model)
        library, usage = "diffusers", PIPELINE.format(module=kind.__module__, kind=kind.__name__)
    cls, steps = facts.get("class", "lit_models"), facts.get("steps", 0)
    return CARD.format(name=name, cls=cls, steps=steps, rows=rows, library=library, usage=usage)


def _write_model(model: Any, folder: Path) -> None:  # noqa: ANN401
    from lit_models.backbones import fold_adapters, merged

    sharded = _is_sharded(model)
    model = model if sharded else merged(model)
    state = full_state_dict(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if sharded:
        state = fold_adapters(model, state)
    config = copy.deepcopy(model.config)  # save_pretrained writes into the live configuration
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config = config


def _write_pipeline(pipeline: Any, folder: Path) -> None:  # noqa: ANN401
    """Write the pipeline with whole copies in place of sharded networks."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    sharded = {name: full_state_dict(part) for name, part in networks.items() if _is_sharded(part)}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    copies = {name: _rebuilt(networks[name], state) for name, state in sharded.items()}
    parameters = inspect.signature(type(pipeline).__init__).parameters
    options = {name: value for name, value in pipeline.config.items() if name in parameters}
    # transformers writes into the configuration of what it saves.
    configs = {name: part.config for name, part in networks.items() if hasattr(part, "_from_config")}
    for name, config in configs.items():
        networks[name].config = copy.deepcopy(config)
    try:
        type(pipeline)(**(options | pipeline.components | copies)).save_pretrained(folder)
    finally:
        for name, config in configs.items():
            networks[name].config = config


def _rebuilt(network: Any, state: dict[str, Tensor]) -> nn.Module:  # noqa: ANN401
    """Network of the same configuration, whole and on the CPU."""
    from torch.distributed.fsdp import FSDPModule

    kind: Any = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    config = copy.deepcopy(network.config)
    with torch.random.fork_rng(devices=[]):
        built: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)
    for name, value in built.state_dict(keep_vars=True).items():  # types may differ between parameters
        value.data = value.data.to(state[name].dtype)
    built.load_state_dict(state)
    return built.eval()


def kind_of(path: Path) -> str:
    """What a path holds: `lightning`, `sharded`, `huggingface` or `unknown`."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        return "sharded" if (path / ".metadata").is_file() else "unknown"
    return "lightning" if path.is_file() else "unknown"


def export_checkpoint(path: str | Path, directory: str | Path) -> dict[str, Path]:
    """Write the networks of a Lightning checkpoint as Hugging Face folders.

    Args:
        path: checkpoint file, or folder of a sharded checkpoint.
        directory: parent of the folders.

    Returns:
        Folder per network.

    Raises:
        ValueError: if the path is no Lightning checkpoint; the message says what it is and what to do.
    """
    from lit_models.base import LitBase

    kind = kind_of(Path(path))
    if kind == "huggingface":
        raise ValueError(f"{path} already is a Hugging Face folder; load it with from_pretrained")
    if kind == "unknown":
        raise ValueError(f"there is no checkpoint at {path}")
    module = LitBase.load_from_checkpoint(path, map_location="cpu")
    return module.export_pretrained(directory)


def main(args: list[str] | None = None) -> None:
    """Command line of the export."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lit_models.export", description=__doc__)
    parser.add_argument("checkpoint", help="Lightning checkpoint: a file, or a folder of shards")
    parser.add_argument("folder", help="where to write one folder per network")
    options = parser.parse_args(args)
    try:
        folders = export_checkpoint(options.checkpoint, options.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, folder in folders.items():
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
