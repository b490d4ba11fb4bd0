"""Features of pool and test examples, as files give them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

SIDES = {"pool": "pool_ids", "tests": "test_ids"}
"""Tables of a file, and the ids of their rows."""
Source: TypeAlias = str | list[str] | dict[str, str] | None

Table: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]
Features: TypeAlias = dict[str, Table]
"""Ids and features of each side, `pool` and `tests`."""


def read_features(source: Source) -> Features:
    """Read features of both sides.

    Args:
        source: see `features` of `datamodules.DynamicsData`.

    Returns:
        Ids and features of both sides, as they stand in the files; empty for None.

    Raises:
        ValueError: if a file is missing or of another form, or a side is missing.
    """
    if source is None:
        return {}
    found: dict[str, list[Table]] = {}
    if isinstance(source, dict):
        if set(source) - set(SIDES):
            raise ValueError(f"data.features: {sorted(set(source) - set(SIDES))[0]!r} is neither pool nor tests")
        found = {side: [_read_table(Path(name), side)] for side, name in source.items()}
    else:
        for path in _feature_files([source] if isinstance(source, str) else source):
            tables = _read_tensors(path)
            if not set(SIDES) & set(tables):
                raise ValueError(
                    f"data.features: {path} has {', '.join(sorted(tables))} and neither pool nor tests; give "
                    "{pool: FILE, tests: FILE}"
                )
            for side, name in SIDES.items():
                if side in tables and tables[side].size:
                    found.setdefault(side, []).append(_numbered(tables[side], tables.get(name), path, side))
    result: Features = {}
    for side, parts in found.items():
        widths = {table.shape[1] for _, table in parts}
        if len(widths) > 1:
            raise ValueError(f"data.features: files of {side} have {sorted(widths)} features; give those of one run")
        result[side] = np.concatenate([ids for ids, _ in parts]), np.concatenate([table for _, table in parts])
    for side in SIDES:
        if side not in result:
            raise ValueError(f"data.features: there are no features of {side}; add the file that holds them")
    return result


def _feature_files(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        found = sorted(path.glob("features*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"data.features: {path} holds no features*.safetensors; name the files")
        files += found
    return files


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise ValueError(f"data.features: there is no file {path}; name one that exists")
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"data.features: {path} is no safetensors file ({error}); name one") from error
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor.long()).numpy()
        for key, tensor in tensors.items()
    }


def _read_table(path: Path, side: str) -> Table:
    if path.suffix == ".npy":
        if not path.is_file():
            raise ValueError(f"data.features: there is no file {path}; name one that exists")
        return _numbered(np.load(path), None, path, side)
    tables = _read_tensors(path)
    for table, ids in (("features", "ids"), (side, SIDES[side])):
        if table in tables:
            return _numbered(tables[table], tables.get(ids), path, side)
    raise ValueError(f"data.features: {path} has {', '.join(sorted(tables))} and neither features nor {side}; add it")


def _numbered(table: NDArray[Any], ids: NDArray[Any] | None, path: Path, side: str) -> Table:
    """Ids and features of one table."""
    if table.ndim != 2 or (ids is not None and ids.shape != table.shape[:1]):
        shapes = f"{table.shape}" + ("" if ids is None else f" and ids of shape {ids.shape}")
        raise ValueError(f"data.features: {path} has features of {side} of shape {shapes}; give (N,D) and (N,)")
    numbers = np.arange(len(table)) if ids is None else ids.astype(np.int64)
    return numbers, table.astype(np.float32)


def rows_of(features: Features, side: str, ids: Tensor) -> Tensor:
    """Features of some examples.

    Args:
        features: of `read_features`.
        side: `pool` or `tests`.
        ids: (n,) int64.

    Returns:
        (n,D) float32.

    Raises:
        ValueError: if there are none of an example.
    """
    known, table = features[side]
    order = np.argsort(known, kind="stable")
    wanted = ids.numpy()
    places = np.searchsorted(known[order], wanted).clip(max=len(known) - 1)
    missing = known[order][places] != wanted
    if missing.any():
        raise ValueError(
            f"data.features: there are none of id {wanted[missing][0]} of {side}; make them for all {len(wanted)} "
            "examples"
        )
    return torch.from_numpy(table[order[places]])
