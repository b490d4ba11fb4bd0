"""Rows of sounds with texts: where they come from and what their cells mean."""

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.audio_io import SUFFIXES, AudioError
from datamodules.formats import lookup
from datamodules.sources import DataFiles, load_rows

if TYPE_CHECKING:
    from datasets import Dataset

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst"}


def load_sounds(
    path: str, split: str, name: str | None = None, data_files: DataFiles | None = None
) -> tuple["Dataset", Path]:
    """Open one split of a data set of sounds; nothing is decoded.

    Args:
        path: folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet`; folder of sound files, each with its
            text beside it in a file of the same name that ends in `.txt`; or what `datamodules.sources.load_rows`
            reads. The first two have the column `file_name`, and may be divided into folders named like the splits.
        split: name of the split, or a slice such as `train[:95%]`. A folder that is not divided holds only `train`.
        name: configuration of the data set.
        data_files: split -> file or files.

    Returns:
        The rows, with sounds still encoded, and the folder from which relative paths in them start.

    Raises:
        ValueError: if there is no such data set or split.
    """
    folder = Path(path)
    whole, bracket, part = split.partition("[")
    if data_files is None and folder.is_dir():
        places = [(folder, split)]
        if (folder / whole).is_dir():
            places.insert(0, (folder / whole, f"train{bracket}{part}"))
        for place, wanted in places:
            for file in _METADATA:
                if (place / file).is_file():
                    return _undecoded(load_rows(str(place / file), wanted)), place
        if _TABLES.isdisjoint(file.suffix.lower() for file in folder.rglob("*.*")):
            place, wanted = places[0]
            return _files_with_texts(place, wanted), place
    rows = load_rows(path, split, name, data_files=data_files)
    return _undecoded(rows), folder if folder.is_dir() else folder.parent


def _files_with_texts(folder: Path, split: str) -> "Dataset":
    """Sound files below a folder, and the texts beside them."""
    import datasets

    files = sorted(file for file in folder.rglob("*.*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"data.path: {str(folder)!r} holds no sounds ({', '.join(SUFFIXES)}) and no table of them; put a "
            "metadata.csv with the columns file_name and text there"
        )
    if split.partition("[")[0] != "train":
        raise ValueError(
            f"data: the folder {str(folder)!r} holds only the split 'train', not {split!r}; use slices such as "
            "train[95%:], or data.val_fraction, or put the files of each split into a folder of its name"
        )
    texts = [file.with_suffix(".txt") for file in files]
    rows = datasets.Dataset.from_dict(
        {
            "file_name": [str(file.relative_to(folder)) for file in files],
            "text": [text.read_text(encoding="utf-8").strip() if text.is_file() else "" for text in texts],
        }
    )
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _undecoded(rows: Any) -> "Dataset":  # noqa: ANN401
    """Keep sounds encoded: `datasets` decodes them as a whole, and only with torchcodec."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Audio):
            rows = rows.cast_column(column, datasets.Audio(decode=False))
    return rows


def plain_columns(rows: "Dataset") -> list[str]:
    """Columns without sounds.

    Args:
        rows: see `load_sounds`.

    Returns:
        Their names.
    """
    import datasets

    def holds_bytes(feature: Any) -> bool:  # noqa: ANN401
        if isinstance(feature, datasets.Audio):
            return True
        if isinstance(feature, dict):
            return any(holds_bytes(part) for part in feature.values())
        return "binary" in str(getattr(feature, "dtype", ""))

    return [column for column, feature in rows.features.items() if not holds_bytes(feature)]


def top_column(column: str, rows: "Dataset") -> str:
    """Column of the data set that a name reaches into.

    Args:
        column: its name, or with dots that of a field in it.
        rows: the data set.

    Returns:
        The name without fields.
    """
    return column if column in rows.column_names else column.split(".")[0]


def sound_in(value: Any, folder: Path) -> tuple[str | bytes, str]:  # noqa: ANN401
    """Find the sound of a cell.

    Args:
        value: path, encoded bytes, or a dict with `bytes` or `path`.
        folder: where relative paths start.

    Returns:
        Absolute path, or bytes; and a name for errors.

    Raises:
        AudioError: if there is none.
    """
    data, path = value, value
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
    if isinstance(data, bytes):
        return data, path if isinstance(path, str) else "bytes"
    if isinstance(path, str) and path:
        return str(folder / path), str(folder / path)
    kind = f"a record of {', '.join(map(str, value))}" if isinstance(value, Mapping) else repr(value)[:50]
    raise AudioError(f"it holds {kind} instead of a path or the bytes of a sound file")


def texts_in(value: Any) -> list[str]:  # noqa: ANN401
    """Read the texts of a cell.

    Args:
        value: a text, or a list of texts of the same sound; numbers count as texts.

    Returns:
        Those that are not empty.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text for part in value for text in texts_in(part)]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    return [text] if text else []


def tags_in(value: Any) -> list[str]:  # noqa: ANN401
    """Read the tags of a cell.

    Args:
        value: list of tags, tags separated by commas, or a list written as text, as in MusicCaps: `['slow', 'piano']`.

    Returns:
        Those that are not empty.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip()) if value.lstrip().startswith("[") else value.split(",")
        except (ValueError, SyntaxError):  # no list after all
            value = value.split(",")
    return texts_in(value)


def seconds_in(row: Mapping[str, Any], column: str | None, key: str) -> float | None:
    """Read a time.

    Args:
        row: the row.
        column: where it stands; None for nowhere.
        key: configuration key of the column.

    Returns:
        Seconds, or None if the cell is empty.

    Raises:
        AudioError: if the cell holds something else.
    """
    words = texts_in(None if column is None else lookup(row, column))
    if not words:
        return None
    try:
        return float(words[0])
    except ValueError:
        raise AudioError(f"data.{key}: column {column!r} holds {words[0]!r} instead of seconds") from None


def hold_out(names: Sequence[str | None], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose rows for validation such that no file is in both parts.

    Args:
        names: file of every row; None for one of its own.
        fraction: share of the rows.
        seed: seed of the choice.

    Returns:
        Bool (rows,): whether a row is held out. At least one file is, and at least one is not.

    Raises:
        ValueError: if there is only one file.
    """
    numbers: dict[object, int] = {}
    keys = [row if name is None else name for row, name in enumerate(names)]
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    if len(numbers) < 2:
        raise ValueError(
            f"data.val_fraction: {len(names)} rows of {len(numbers)} file cannot be divided; set data.val_split"
        )
    order = np.random.default_rng(seed).permutation(len(numbers))
    rows_so_far = np.cumsum(np.bincount(groups)[order])
    count = int(np.searchsorted(rows_so_far, fraction * len(names))) + 1
    return np.isin(groups, order[: min(count, len(numbers) - 1)])
