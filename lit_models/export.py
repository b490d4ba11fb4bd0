"""From checkpoints and live modules to Hugging Face folders.

`python -m lit_models.export CHECKPOINT FOLDER` writes one folder per network of a Lightning checkpoint.
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = """---
library_name: transformers
tags: [lit-models]
---
# {name}

Written by `{cls}` of lit-models after {steps} optimizer steps.

| metric | value |
|---|---|
{rows}
"""


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """State of a network on the CPU, gathered from all ranks where it is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_model_state_dict(network, options=options))  # type: ignore[arg-type]
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def write_pretrained(
    models: "Mapping[str, PreTrainedModel]",
    directory: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write models as folders that `from_pretrained` loads, adapters merged.

    Args:
        models: model per folder name.
        directory: parent of the folders.
        tokenizer: written beside each model.
        card: `class`, `steps` and `metrics` for the model card.

    Returns:
        Folder per model.
    """
    from lit_models.backbones import merged

    card = card or {}
    folders = {name: Path(directory) / name for name in models}
    for name, model in models.items():
        model = merged(model)
        state = full_state_dict(model)
        if dist.is_initialized() and dist.get_rank() != 0:
            continue
        config = copy.deepcopy(model.config)  # save_pretrained writes into the live configuration
        try:
            model.save_pretrained(folders[name], state_dict=state)
        finally:
            model.config = config
        if tokenizer is not None:
            tokenizer.save_pretrained(folders[name])
        rows = "\n".join(f"| {metric} | {value} |" for metric, value in sorted(card.get("metrics", {}).items()))
        text = CARD.format(name=name, cls=card.get("class", "lit_models"), steps=card.get("steps", 0), rows=rows)
        (folders[name] / "README.md").write_text(text)
    return folders


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
