"""Reading of reference vectors."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_ROOT = Path(__file__).parents[1] / "data" / "reference"


def load(folder: str, name: str) -> Any:
    """Read `<root>/<folder>/<name>.json` or `<root>/<name>.json`, with the root from `REFERENCE_ROOT` if set."""
    root = Path(os.environ.get("REFERENCE_ROOT") or DEFAULT_ROOT)
    candidates = [root / folder / f"{name}.json", root / f"{name}.json"]
    for path in candidates:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"no reference vectors: neither {candidates[0]} nor {candidates[1]} exists")


def load_tensors(folder: str, name: str) -> "dict[str, Tensor]":
    """Read the tensors stored beside the vectors, as `load` does."""
    from safetensors.torch import load_file

    root = Path(os.environ.get("REFERENCE_ROOT") or DEFAULT_ROOT)
    (path,) = [path for path in (root / folder / f"{name}.safetensors", root / f"{name}.safetensors") if path.is_file()]
    return load_file(path)
