"""Files of a run: `run.json` and its parts."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Arrays: TypeAlias = dict[str, NDArray[Any]]

SCHEMA = 1
PART = re.compile(r"part-r(\d+)-(\d+)\.safetensors")
FILE = re.compile(r"(?:part|features)-r(\d+)(?:-\d+)?\.safetensors")
OPTIONAL = ("train_loss", "grad_norm")


def read_lines(path: Path, missing: str, broken: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of JSON lines.

    Args:
        path: the file.
        missing: what to do if it is not there, for the error.
        broken: what to do about a line that is no JSON object, for the error.

    Yields:
        Number of the line, from 1, and its object; empty lines are left out.

    Raises:
        ValueError: if the file is missing, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; {missing}")
    # Split at "\n" alone, as texts may hold U+2028.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object; {broken}")
        yield number, row


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its final name and move it there when it is on the disk.

    Args:
        path: final name; its folder is made.
        content: the whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the move itself
    finally:
        os.close(handle)


def find_runs(folder: str | Path) -> list[Path]:
    """Folders of the runs of an experiment.

    Args:
        folder: their parent, or a run itself.

    Returns:
        Folders with a `run.json`, with the numbers in their names in numerical order.
    """
    folder = Path(folder)
    if (folder / "run.json").is_file():
        return [folder]

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"(\d+)", path.name)]

    return sorted((path.parent for path in folder.glob("*/run.json")), key=order)


def read_info(folder: str | Path) -> dict[str, Any]:
    """Contents of a run's `run.json`.

    Args:
        folder: the run.

    Returns:
        What the file holds.

    Raises:
        ValueError: if there is none, or it is of another schema.
    """
    path = Path(folder) / "run.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no recorded run, since it has no run.json; name the folder of a run"
        ) from None
    except ValueError:
        raise ValueError(f"{path} is no JSON; restore it from a copy, or record the run again") from None
    if info.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of schema {info.get('schema')}, and this version reads schema {SCHEMA}")
    for key in ("test_ids", "metrics", "complete", "n_steps"):
        if key not in info:
            raise ValueError(f"{path} lacks {key!r}; restore it from a copy, or record the run again")
    tests = info["test_ids"]
    if len(set(tests)) != len(tests):
        raise ValueError(f"{path}: test id {first_repeat(tests)} occurs twice; every test needs an id of its own")
    return info


@dataclass
class Part:
    """A part file; `step` and `rec_step` are read at once, everything else when it is asked for.

    Attributes:
        path: the file.
        rank: process that wrote it.
        number: of the part, counted by its process.
        world_size: number of processes at that time.
        extra: whether it holds values measured beyond the plan, at the end of training.
        keys: arrays in it.
        step: int64 [s].
        rec_step: int64 [q].
    """

    path: Path
    rank: int
    number: int
    world_size: int
    extra: bool
    keys: frozenset[str]
    step: NDArray[np.int64]
    rec_step: NDArray[np.int64]

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Open a file, which must have the name of a part."""
        match = PART.fullmatch(path.name)
        assert match is not None
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            part = cls(
                path,
                int(match[1]),
                int(match[2]),
                int(metadata.get("world_size", 1)),
                metadata.get("extra") == "1",
                frozenset(file.keys()),
                file.get_tensor("step"),
                file.get_tensor("rec_step"),
            )
        for name, steps in (("steps", part.step), ("recorded steps", part.rec_step)):
            later = np.flatnonzero(np.diff(steps) <= 0)
            if len(later):
                before, after = steps[later[0]], steps[later[0] + 1]
                raise ValueError(f"{path}: {name} must ascend, but {before} is followed by {after}; remove the file")
        return part

    def get(self, key: str) -> NDArray[Any]:
        """One array."""
        with safe_open(str(self.path), "numpy") as file:
            array: NDArray[Any] = file.get_tensor(key)
            return array

    def all(self) -> Arrays:
        """All arrays."""
        return {key: self.get(key) for key in self.keys}

    @property
    def metadata(self) -> dict[str, str]:
        """Header of the file."""
        return metadata(self.rank, self.world_size, self.extra)

    def span(self) -> tuple[int, int]:
        """First and last step, or recorded step where it has no others."""
        steps = self.step if len(self.step) else self.rec_step
        return (int(steps[0]), int(steps[-1])) if len(steps) else (0, 0)


def metadata(rank: int, world_size: int, extra: bool) -> dict[str, str]:
    """Header of a part."""
    return {"schema": str(SCHEMA), "rank": str(rank), "world_size": str(world_size), "extra": str(int(extra))}


def part_paths(folder: Path) -> list[Path]:
    """Part files, by rank and number."""
    found = [(PART.fullmatch(path.name), path) for path in folder.glob("part-r*.safetensors")]
    numbered = [(int(match[1]), int(match[2]), path) for match, path in found if match]
    return [path for _, _, path in sorted(numbered)]


def cut(arrays: Arrays, last: int) -> Arrays:
    """The rows of a part up to a step."""
    steps = int(np.searchsorted(arrays["step"], last, "right"))
    records = int(np.searchsorted(arrays["rec_step"], last, "right"))
    result: Arrays = {}
    for key, value in arrays.items():
        if key == "cols":
            result[key] = value
        elif key == "ids":
            result[key] = value[: arrays["offsets"][steps]]
        elif key == "offsets":
            result[key] = value[: steps + 1]
        elif key.startswith("nan."):
            result[key] = value[value[:, 0] < records]
        else:
            result[key] = value[: records if key == "rec_step" or key.startswith("m.") else steps]
    return {key: np.ascontiguousarray(value) for key, value in result.items()}


def read_part(path: Path) -> Part:
    """Open a part.

    Args:
        path: the file.

    Returns:
        The part.

    Raises:
        ValueError: if it cannot be read (then with a cause), or its steps do not ascend.
    """
    try:
        return Part.read(path)
    except (SafetensorError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); restore it from a copy, or remove it") from error


def first_repeat(values: Sequence[int]) -> int:
    """The first value that occurs a second time."""
    return next(value for position, value in enumerate(values) if value in values[:position])
