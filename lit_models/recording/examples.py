"""Texts of a pool or a test set, kept once per experiment."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_models.recording.files import read_lines, write_atomically

Example = dict[str, Any]


def write_examples(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write the examples of a pool or a test set, one JSON object a line.

    Args:
        path: `pool.jsonl` or `tests.jsonl`; an earlier file is replaced.
        rows: each with an integer `id` and a `text`; further keys such as `target` and `context` are kept.

    Returns:
        The fingerprint of the rows.

    Raises:
        ValueError: if a row lacks a key or an id occurs twice.
    """
    rows = [dict(row) for row in rows]
    _check_examples(rows, Path(path))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(path), lines.encode())
    return fingerprint(rows)


def read_examples(path: str | Path) -> list[Example]:
    """Read what `write_examples` wrote.

    Args:
        path: the file.

    Returns:
        The rows in their order.

    Raises:
        ValueError: if the file is missing, a line is no JSON object, a row lacks a key or an id occurs twice.
    """
    path = Path(path)
    missing, broken = "write it with lit_models.recording.write_examples", "every line holds one example"
    rows = [row for _, row in read_lines(path, missing, broken)]
    _check_examples(rows, path)
    return rows


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the contents of a pool, which does not depend on the order of rows and keys.

    Args:
        rows: examples with an `id`.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row["id"]):
        digest.update(json.dumps(dict(row), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _check_examples(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    seen: set[int] = set()
    for number, row in enumerate(rows, 1):
        if type(row.get("id")) is not int or not isinstance(row.get("text"), str):
            raise ValueError(f"{path}: row {number} needs an integer 'id' and a 'text'; it has the keys {sorted(row)}")
        if row["id"] in seen:
            raise ValueError(f"{path}: id {row['id']} occurs twice; every example needs an id of its own")
        seen.add(row["id"])
