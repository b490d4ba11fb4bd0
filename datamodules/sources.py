"""Reading of rows from hubs, folders and files."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Rows: TypeAlias = "Dataset | IterableDataset"
DataFiles: TypeAlias = Mapping[str, str | list[str]]
TextUnit: TypeAlias = Literal["line", "paragraph", "document"]

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


def load_rows(
    path: str,
    split: str,
    name: str | None = None,
    streaming: bool = False,
    data_files: DataFiles | None = None,
    text_unit: TextUnit = "line",
) -> Rows:
    """Open one split of a data set.

    Args:
        path: hub id, folder written by `save_to_disk`, folder of data files, or one JSON, JSONL, CSV, TSV, Parquet or
            plain text file, which may be compressed (`.gz`).
        split: name of the split, or a slice such as `train[:95%]`. A single file holds only `train`.
        name: configuration of the data set, e.g. `comparisons`.
        streaming: read rows when they are needed instead of copying all of them to the local cache first.
        data_files: split -> file or files, relative to the folder `path`, or to the working folder if `path` is the
            name of a file format (`json`, `csv`, `parquet`, `text`).
        text_unit: what a row of plain text files is: a line, a paragraph (up to an empty line) or the whole file. Their
            column is `text`.

    Returns:
        The rows; an iterable data set when streaming.

    Raises:
        ValueError: if there is no such data set, file or split.
    """
    import datasets

    with _quiet():
        if _saved_to_disk(path):
            return _from_disk(path, split, streaming)
        builder, files = _resolve(path, split, data_files)
        options: dict[str, Any] = {}
        if files and _suffix(next(iter(files.values()))[0]) == ".tsv":
            options["delimiter"] = "\t"
        if builder == "text" or _text_folder(path):
            options["sample_by"] = text_unit
        whole = split.partition("[")[0]
        try:
            rows = datasets.load_dataset(
                builder, name, data_files=files, split=whole if streaming else split, streaming=streaming, **options
            )
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(_explain(path, split, name, error)) from error
    if streaming and whole != split:
        raise ValueError(
            f"data.streaming: the slice {split!r} needs all rows; name a whole split or set data.streaming to false"
        )
    return rows


def require_columns(rows: Rows, columns: Mapping[str, str]) -> None:
    """Check that columns exist.

    Args:
        rows: data set.
        columns: configuration key -> column it names; a dot reaches into a column of records (`answer.text`).

    Raises:
        ValueError: for the first column that is missing, with the nearest name that exists.
    """
    present = rows.column_names
    if present is None:  # a stream without declared columns: its first row tells them
        present = list(next(iter(rows), {}))
    for key, column in columns.items():
        if column in present or column.split(".")[0] in present:
            continue
        nearest = difflib.get_close_matches(column, present, n=1, cutoff=0.0)
        hint = f"the nearest name is {nearest[0]!r}; " if nearest else ""
        raise ValueError(f"{key}: there is no column {column!r}; {hint}the columns are {', '.join(present)}")


def chunks(rows: Rows, size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    """Iterate over rows in lists.

    Args:
        rows: data set.
        size: rows per list; the last one may hold fewer.

    Yields:
        Lists of rows.
    """
    for columns in rows.iter(batch_size=size):
        names = list(columns)
        yield [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars where nobody watches a terminal."""
    import datasets

    enabled = datasets.are_progress_bars_disabled() is False and not sys.stderr.isatty()
    if enabled:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


def _saved_to_disk(path: str) -> bool:
    return any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json"))


def _text_folder(path: str) -> bool:
    """Whether a folder holds plain text files and no other data."""
    suffixes = {_suffix(str(file)) for file in Path(path).rglob("*.*")} if Path(path).is_dir() else set()
    return suffixes & _BUILDERS.keys() == {".txt"}


def _from_disk(path: str, split: str, streaming: bool) -> Rows:
    import datasets

    whole = split.partition("[")[0]
    stored = datasets.load_from_disk(path)
    if isinstance(stored, datasets.DatasetDict):
        if whole not in stored:
            raise ValueError(_unknown_split(path, split, stored))
        stored = stored[whole]
    elif whole != str(stored.split or "train"):
        raise ValueError(_unknown_split(path, split, [str(stored.split or "train")]))
    if whole != split:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({whole: len(stored)})
        stored = stored.select(range(part.from_ or 0, len(stored) if part.to is None else part.to))
    return stored.to_iterable_dataset() if streaming else stored


def _suffix(path: str) -> str:
    """Suffix that tells the format, below one of a compression."""
    plain = Path(path)
    return (plain.with_suffix("") if plain.suffix in _COMPRESSIONS else plain).suffix


def _resolve(path: str, split: str, data_files: DataFiles | None) -> tuple[str, dict[str, list[str]] | None]:
    """Turn what the user wrote into a builder of `datasets` and its files."""
    if data_files is not None:
        folder = Path(path) if Path(path).is_dir() else Path()
        files = {
            key: [str(folder / name) for name in ([names] if isinstance(names, str) else names)]
            for key, names in data_files.items()
        }
        missing = [name for names in files.values() for name in names if not _exists(name)]
        if missing:
            raise ValueError(f"data.data_files: there is no file {missing[0]!r}")
        if path in _BUILDERS.values():
            return path, files
        return (_builder(files), files) if Path(path).is_dir() else (path, dict(files))
    if Path(path).is_file():
        if split.partition("[")[0] != "train":
            raise ValueError(
                f"data: the single file {path!r} holds only the split 'train', not {split!r}; use slices such as "
                "train[95%:] or give one file per split in data.data_files"
            )
        files = {"train": [path]}
        return _builder(files), files
    return path, None


def _exists(name: str) -> bool:
    return "://" in name or Path(name).exists() or bool(list(Path().glob(name)) if not Path(name).is_absolute() else [])


def _builder(files: Mapping[str, list[str]]) -> str:
    suffix = _suffix(next(iter(files.values()))[0])
    if suffix not in _BUILDERS:
        raise ValueError(f"data.path: files of type {suffix!r} cannot be read; use one of {', '.join(_BUILDERS)}")
    return _BUILDERS[suffix]


def _unknown_split(path: str, split: str, known: Iterable[str]) -> str:
    return f"data: {path!r} has no split {split!r}; it has {', '.join(known)}"


def _explain(path: str, split: str, name: str | None, error: Exception) -> str:
    """One sentence for the errors of `datasets`."""
    import datasets

    first = str(error).strip().split("\n")[0]
    if "nknown split" in first:
        return f"data: {path!r} has no split {split!r} ({first})"
    if isinstance(error, (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError)):
        return (
            f"data.path: {path!r} is neither a local file or folder with data nor a data set that the hub could "
            f"deliver; check data.path and the connection ({first})"
        )
    return f"data.path: {path!r} (data.name={name}, split {split!r}) cannot be read: {first}"
