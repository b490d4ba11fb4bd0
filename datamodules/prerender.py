"""Strips drawn before training, as Parquet files; `python -m datamodules.prerender --help`.

Columns: `image` (PNG bytes of the attended part of the strip), `num_patches` (patches before the last separator),
`sep_patches` (indices of the black patches) and `text`. The schema's metadata holds the fingerprint of the renderer.
`datamodules.pixels.PixelTexts` reads a folder of such files, and data sets with the columns of the released ones.
"""

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from datamodules.formats import lookup
from datamodules.packing import BlockBuilder
from datamodules.rendering.base import Pixels, Renderer, Strip
from datamodules.sources import Rows, TextUnit, load_rows, require_columns

if TYPE_CHECKING:
    import pyarrow

Fingerprint: TypeAlias = dict[str, str]
IMAGES = ("pixel_values", "image")
"""Columns that hold strips, in the order they are looked for."""
COUNT = "num_patches"
_FINGERPRINT = b"renderer"
_STEP = b"prerender"


def encode_strip(strip: Strip) -> bytes:
    """Compress the attended part of a strip without loss.

    Args:
        strip: the strip.

    Returns:
        A PNG file.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(strip.trimmed).save(file, "PNG", compress_level=3)  # 7 % larger than level 6 in 60 % of the time
    return file.getvalue()


def decode_strip(image: Any, count: int, renderer: Renderer) -> tuple[Pixels, int]:  # noqa: ANN401
    """Read a stored strip.

    Args:
        image: bytes of an image file, the same in base64, a PIL image, or a record with `bytes`.
        count: `num_patches` of the row.
        renderer: gives the size and colours wanted; it draws nothing.

    Returns:
        Attended part (H, p*n) or (H, p*n, 3), and the number of patches before the last separator. A strip longer than
        `max_seq_length` is cut, with the separator on its last patch.

    Raises:
        ValueError: if the size of the image does not fit to the renderer or to `count`.
    """
    from PIL import Image

    if isinstance(image, dict):
        image = image["bytes"]
    if isinstance(image, str):
        image = base64.b64decode(image)
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    pixels: NDArray[np.uint8] = np.asarray(image.convert("L" if renderer.channels == 1 else "RGB"))
    p, last = renderer.patch_size, renderer.max_seq_length - 1
    attended = min(count, last) + 1
    if pixels.shape[0] != renderer.height or pixels.shape[1] < p * min(attended, count):
        raise ValueError(
            f"data.path: a stored strip has {pixels.shape[0]} x {pixels.shape[1]} pixels and {count} num_patches, "
            f"which does not fit to patches of {p} pixels; set data.renderer to the one that drew the strips"
        )
    attended = min(attended, pixels.shape[1] // p)  # text up to the very end has its separator on the last patch
    pixels = pixels[:, : p * attended]
    if count > last:
        pixels = pixels.copy()
        pixels[:, -p:] = 0
    return pixels, min(count, attended - 1)


def image_column(columns: Sequence[str] | None) -> str | None:
    """Column of the strips in a data set of drawn texts, or None if it holds plain texts."""
    if columns is None or COUNT not in columns:
        return None
    return next((column for column in IMAGES if column in columns), None)


def stored_fingerprint(path: str) -> Fingerprint | None:
    """Fingerprint of the renderer that drew a folder or file, or None if it was not written by this step.

    Args:
        path: folder of Parquet files, or one of them.
    """
    files = sorted(Path(path).glob("**/*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or files[0].suffix != ".parquet" or not files[0].is_file():
        return None
    metadata = _metadata(files[0])
    return json.loads(metadata[_FINGERPRINT]) if _FINGERPRINT in metadata else None


def differing_keys(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Keys of two fingerprints whose values differ or that only one of them has."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


@dataclass(frozen=True)
class Job:
    """What one process needs to draw and write shards.

    Args:
        rows: the texts.
        column: column of the text.
        renderer: draws.
        split_long: see `BlockBuilder`.
        rows_per_shard: rows of the source behind one file.
        folder: where the files go.
        split: first part of their names.
        step: what the shards depend on besides the renderer.
    """

    rows: Any
    column: str
    renderer: Renderer
    split_long: bool
    rows_per_shard: int
    folder: Path
    split: str
    step: Mapping[str, Any]

    def file(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"{self.split}-{shard:05d}.parquet"

    def schema(self) -> "pyarrow.Schema":
        """Columns, fingerprint and settings."""
        import pyarrow as pa

        fields = [
            ("image", pa.binary()),
            (COUNT, pa.int32()),
            ("sep_patches", pa.list_(pa.int32())),
            ("text", pa.string()),
        ]
        metadata = {_FINGERPRINT: json.dumps(self.renderer.fingerprint()), _STEP: json.dumps(self.step)}
        return pa.schema(fields, metadata=metadata)

    def write(self, shard: int) -> int:
        """Draw and write one shard; a file has its name only when it is complete.

        Args:
            shard: number of the shard.

        Returns:
            Number of strips.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        first = shard * self.rows_per_shard
        last = min(first + self.rows_per_shard, len(self.rows))
        builder = BlockBuilder(self.renderer, self.split_long, measure=False)
        texts = [block.text for text in self._texts(first, last) for block in builder.blocks(text)]
        strips = [self.renderer.render(text) for text in texts]
        columns = {
            "image": [encode_strip(strip) for strip in strips],
            COUNT: [strip.num_text_patches for strip in strips],
            "sep_patches": [list(strip.sep_patches) for strip in strips],
            "text": texts,
        }
        target = self.file(shard)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        pq.write_table(pa.Table.from_pydict(columns, schema=self.schema()), unfinished)
        unfinished.replace(target)
        return len(strips)

    def _texts(self, first: int, last: int) -> Iterable[str]:
        for number in range(first, last):
            text = lookup(self.rows[number], self.column)
            if not isinstance(text, str):
                raise ValueError(
                    f"--text_column: column {self.column!r} of row {number} holds {text!r} instead of text"
                )
            yield text


def prerender(
    path: str,
    out: str,
    renderer: Renderer,
    split: str = "train",
    name: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    text_column: str = "text",
    text_unit: TextUnit = "line",
    split_long: bool = True,
    rows_per_shard: int = 2000,
    num_workers: int = 0,
) -> int:
    """Draw all texts of a split and write them as Parquet files.

    An interrupted run leaves complete files and goes on with those that are missing when it is started again.

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        out: folder for the files.
        renderer: draws the texts, e.g. `TextRenderer`; its options follow as `--renderer.max_seq_length 512`, or give a
            YAML file with `class_path` and `init_args`.
        split: split to draw, or a slice of it.
        name: configuration of the data set.
        data_files: split -> file or files.
        text_column: column of the text.
        text_unit: what a row is in plain text files.
        split_long: divide documents that are longer than a strip into several strips; otherwise they are cut.
        rows_per_shard: rows of the source behind each file.
        num_workers: processes that draw; 0 draws in this one.

    Returns:
        Number of strips that this run has written.

    Raises:
        ValueError: if the data cannot be read, or `out` holds files of another renderer or of other settings.
    """
    if rows_per_shard < 1:
        raise ValueError(f"--rows_per_shard: {rows_per_shard} must be at least 1")
    rows: Rows = load_rows(path, split, name, data_files=data_files, text_unit=text_unit)
    require_columns(rows, {"--text_column": text_column})
    step = {"path": path, "name": name, "split": split, "data_files": data_files, "rows": len(rows)}
    step |= {"text_column": text_column, "text_unit": text_unit, "split_long": split_long}
    step |= {"rows_per_shard": rows_per_shard, "max_seq_length": renderer.max_seq_length}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(rows, text_column, renderer, split_long, rows_per_shard, folder, split.partition("[")[0], step)
    missing = [shard for shard in range(-(-len(rows) // rows_per_shard)) if not _written(job, shard)]
    for leftover in folder.glob(f".{job.split}-*.parquet.*.tmp"):
        leftover.unlink()
    if num_workers == 0:
        return sum(map(job.write, missing))
    with ProcessPoolExecutor(num_workers, initializer=_begin, initargs=(job,)) as pool:
        try:
            return sum(done.result() for done in as_completed([pool.submit(_write, shard) for shard in missing]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _written(job: Job, shard: int) -> bool:
    """Whether a shard is there, drawn alike."""
    file = job.file(shard)
    if not file.exists():
        return False
    metadata = _metadata(file)
    stored = json.loads(metadata.get(_FINGERPRINT, b"{}")) | json.loads(metadata.get(_STEP, b"{}"))
    wanted = json.loads(json.dumps({**job.renderer.fingerprint(), **job.step}))
    if differing := differing_keys(stored, wanted):
        raise ValueError(
            f"--out: {file} was written with other values of {', '.join(differing)}; choose another folder or delete it"
        )
    return True


def _metadata(file: Path) -> dict[bytes, bytes]:
    import pyarrow.parquet as pq

    return pq.read_schema(file).metadata or {}


_job: Job | None = None


def _begin(job: Job) -> None:
    global _job
    _job = job


def _write(shard: int) -> int:
    assert _job is not None
    return _job.write(shard)


def main(args: list[str] | None = None) -> None:
    """Run the step from the command line.

    Args:
        args: options; those of the process by default.
    """
    from jsonargparse import auto_cli

    from datamodules.rendering import PygameRenderer, TextRenderer  # noqa: F401  (so that their short names are known)

    try:
        count = auto_cli(prerender, args=args, as_positional=False)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {count} strips")


if __name__ == "__main__":
    main()
