"""Rows of numbers that are computed once and kept on disk, found again by the content they were computed from."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROWS = "rows"


class RowCache:
    """A folder of safetensors files, each with (b, D) `rows` and the digests of what they belong to.

    Files are written under a temporary name and renamed, so a reader never sees half a file, and several processes may
    add to one folder.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._places: dict[str, tuple[Path, int]] = {}
        self._seen: set[Path] = set()

    def _scan(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._seen:
                try:
                    with safe_open(path, "pt") as file:
                        digests = json.loads(file.metadata()["digests"])
                except (SafetensorError, KeyError, TypeError) as error:
                    raise ValueError(f"cache_dir: {path} is not a file of this cache; remove it") from error
                self._seen.add(path)
                self._places |= {digest: (path, row) for row, digest in enumerate(digests)}

    def missing(self, digests: Sequence[str]) -> list[int]:
        """Places in a list of digests whose rows are not in the cache, those that other processes added included."""
        if any(digest not in self._places for digest in digests):
            self._scan()
        return [place for place, digest in enumerate(digests) if digest not in self._places]

    def read(self, digests: Sequence[str]) -> Tensor:
        """Rows by digest.

        Args:
            digests: b digests, all of them in the cache.

        Returns:
            (b, D) in the type they were written in.
        """
        found: dict[Path, list[tuple[int, int]]] = {}
        for number, digest in enumerate(digests):
            path, row = self._places[digest]
            found.setdefault(path, []).append((number, row))
        rows: list[Tensor] = [torch.empty(0)] * len(digests)
        for path, places in found.items():
            with safe_open(path, "pt") as file:
                view = file.get_slice(ROWS)
                for number, row in places:
                    rows[number] = view[row : row + 1]
        return torch.cat(rows)

    def write(self, digests: Sequence[str], rows: Tensor) -> None:
        """Add rows.

        Args:
            digests: b digests.
            rows: (b, D).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{digest_of(list(digests))[:32]}.safetensors"
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            metadata = {"digests": json.dumps(list(digests))}
            save_file({ROWS: rows.detach().cpu().contiguous()}, temporary, metadata)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._seen.add(path)
        self._places |= {digest: (path, row) for row, digest in enumerate(digests)}


def _pieces(value: Any) -> Iterator[bytes]:  # noqa: ANN401
    """Bytes that tell values apart, types and borders of containers included."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        yield f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"map {len(value)};".encode()
        for key in sorted(value, key=str):
            yield from _pieces(str(key))
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"list {len(value)};".encode()
        for item in value:
            yield from _pieces(item)
    elif hasattr(value, "__array__"):
        yield from _pieces(torch.as_tensor(value))
    elif value is not None and not isinstance(value, (str, bytes, bool, int, float)):
        raise TypeError(f"a {type(value).__name__} can't be told from others by its content")
    else:
        text = repr(value).encode()
        yield f"{type(value).__name__} {len(text)};".encode()
        yield text


def digest_of(value: Any) -> str:  # noqa: ANN401
    """SHA-256 of a value's content.

    Args:
        value: tensors, arrays, texts, numbers and None, in lists, tuples and mappings of any depth; the order of the
            keys of a mapping doesn't matter.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if there is something else in it.
    """
    state = hashlib.sha256()
    for piece in _pieces(value):
        state.update(piece)
    return state.hexdigest()


def digest_of_path(path: str | Path) -> str:
    """Digest of a file, or of the files in a folder, by name, size and time of change.

    Args:
        path: a file or folder that exists.
    """
    root = Path(path).resolve()
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest_of(facts)
