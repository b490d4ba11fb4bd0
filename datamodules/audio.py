"""Sound files with texts: folders, tables and hub data sets, read in windows while training runs."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from datamodules.audio_io import AudioError, AudioReader, Samples
from datamodules.audio_rows import (
    hold_out,
    load_sounds,
    plain_columns,
    seconds_in,
    sound_in,
    tags_in,
    texts_in,
    top_column,
)
from datamodules.base import Split
from datamodules.clips import (
    ClipData,
    Draw,
    PromptFormat,
    check_least,
    choose_format,
    generators,
    join_tags,
    random_crop,
)
from datamodules.formats import lookup
from datamodules.loaders import rank_and_world
from datamodules.sources import chunks, load_rows, require_columns
from lit_models._ranks import warn

if TYPE_CHECKING:
    import datasets

EvalCrop: TypeAlias = Literal["first", "centre"]
Scale: TypeAlias = Literal["none", "peak", "std"]
MissingText: TypeAlias = Literal["drop", "keep", "error"]
Unreadable: TypeAlias = Literal["skip", "error"]
_T = TypeVar("_T")
_TRIES = 100  # sounds in a row that may be unusable before the run stops
_SILENCE = 1e-4  # -80 dB; what is quieter is not made louder
_SLOTS = 64  # of a counter that worker processes share
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class AudioOptions:
    """How sounds are read and described; see `AudioTexts`.

    Args:
        audio_column: column of the sounds.
        text_column: column of free texts; None if there is none.
        tags_column: column of tags; None if there is none.
        start_column: column of the second at which a sound begins in its file; None for 0.
        end_column: column of the second at which it ends; None for the end of the file.
        duration_column: column of its seconds, instead.
        sample_rate: Hz.
        channels: of an example.
        length: samples of an example.
        eval_crop: which part is taken outside training.
        prompt_format: kind of text.
        scale: what `level` is.
        level: strength of an example.
        gain_db: training examples are made quieter by up to this.
        flip: half of the training examples are turned upside down.
        min_seconds: shorter sounds are unusable.
        unreadable: what to do with unusable sounds.
    """

    audio_column: str
    text_column: str | None
    tags_column: str | None
    start_column: str | None
    end_column: str | None
    duration_column: str | None
    sample_rate: int
    channels: int
    length: int
    eval_crop: EvalCrop
    prompt_format: PromptFormat
    scale: Scale
    level: float
    gain_db: float
    flip: bool
    min_seconds: float
    unreadable: Unreadable

    def words(self, row: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Free texts and tags of a row.

        Args:
            row: the row.

        Returns:
            Both lists, which may be empty.
        """
        texts = [] if self.text_column is None else texts_in(lookup(row, self.text_column))
        return texts, [] if self.tags_column is None else tags_in(lookup(row, self.tags_column))

    def described(self, row: dict[str, Any]) -> bool:
        """Whether a row has a text of the wanted format.

        Args:
            row: the row.

        Returns:
            True if it has.
        """
        texts, tags = self.words(row)
        return bool({"free": texts, "tags": tags, "mixed": texts + tags}[self.prompt_format])


def scale_to(window: Samples, scale: Scale, level: float) -> Samples:
    """Give a sound a strength.

    Args:
        window: (channels, samples).
        scale: `peak` makes `level` the largest absolute value, `std` the standard deviation, `none` changes nothing.
        level: see `scale`.

    Returns:
        The sound; silence (below -80 dB) is left as it is.
    """
    if scale == "none":
        return window
    present = float(np.abs(window).max() if scale == "peak" else window.std())
    return window if present < _SILENCE else window * np.float32(level / present)


class AudioClips(Dataset[dict[str, Any]]):
    """Examples of sounds with texts.

    An integer gives the first or the middle crop with a text that depends on the row only; (place, epoch, pass) gives
    a random crop and text. In place of a sound that turns out to be unusable comes another one, which follows from the
    same numbers; `failures` counts them.

    Args:
        rows: sounds still encoded, see `datamodules.audio_rows.load_sounds`.
        folder: where relative paths start.
        options: sound and text.
        numbers: the rows that are used.
        keep_columns: columns whose raw values are passed on; None takes all without sounds.
        seed: seed of random crops and texts.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        folder: Path,
        options: AudioOptions,
        numbers: NDArray[np.int64],
        keep_columns: Sequence[str] | None,
        seed: int,
    ) -> None:
        self.options, self.folder, self.numbers, self.seed = options, folder, numbers, seed
        plain = plain_columns(rows)
        self.keep_columns = plain if keep_columns is None else list(keep_columns)
        self.sounds = rows.select_columns([top_column(options.audio_column, rows)])
        self.rows = rows.select_columns(plain)  # so that texts are read without sounds
        self._failures = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()  # one slot per process: no locks

    def __len__(self) -> int:
        """Number of sounds."""
        return len(self.numbers)

    @property
    def failures(self) -> int:
        """How often another sound took the place of an unusable one, in all worker processes of this rank."""
        return int(self._failures.sum())

    def source(self, place: int) -> tuple[str | bytes, str]:
        """Where a sound is.

        Args:
            place: in this data set.

        Returns:
            Path or encoded bytes, and a name.

        Raises:
            AudioError: if the row names none.
        """
        number = int(self.numbers[place])
        try:
            return sound_in(lookup(self.sounds[number], self.options.audio_column), self.folder)
        except AudioError as error:
            raise AudioError(f"row {number}: data.audio_column {self.options.audio_column!r}: {error}") from None

    def open(self, place: int, source: tuple[str | bytes, str] | None = None) -> AudioReader:
        """Open a sound.

        Args:
            place: in this data set.
            source: see `source`; None asks for it.

        Returns:
            The open sound, with the sample rate and channels of examples.

        Raises:
            AudioError: if it is unusable.
        """
        options, number = self.options, int(self.numbers[place])
        data, name = self.source(place) if source is None else source
        name = f"row {number}: {name}"
        start, end, duration = None, None, None
        if options.start_column or options.end_column or options.duration_column:
            row = self.rows[number]
            try:
                start = seconds_in(row, options.start_column, "start_column")
                end = seconds_in(row, options.end_column, "end_column")
                duration = seconds_in(row, options.duration_column, "duration_column")
            except AudioError as error:
                raise AudioError(f"{name}: {error}") from None
        start = start or 0.0
        duration = duration if end is None else end - start
        sound = AudioReader(data, options.sample_rate, options.channels, start, duration, name)
        if (seconds := sound.num_samples / options.sample_rate) < options.min_seconds:
            sound.close()
            raise AudioError(f"{name}: it has {seconds:.2f} s, less than data.min_seconds {options.min_seconds}")
        return sound

    def _generators(self, place: int, draw: Sequence[int]) -> tuple[np.random.Generator, np.random.Generator]:
        return generators([*([self.seed, *draw] if draw else []), int(self.numbers[place])])

    def _text(self, row: dict[str, Any], draw: Sequence[int], rng: np.random.Generator) -> tuple[str, str, list[str]]:
        """Format, text and tags."""
        texts, tags = self.options.words(row)
        format_ = choose_format(self.options.prompt_format, rng)
        if self.options.prompt_format == "mixed" and not (texts and tags):
            format_ = "free" if texts else "tags"
        if format_ == "tags":
            return format_, join_tags(tags, rng if draw else None), tags
        choice = int(rng.integers(len(texts))) if draw and texts else 0
        return format_, texts[choice] if texts else "", tags

    def text(self, index: int | Draw) -> str:
        """Text of an example, without reading the sound.

        Args:
            index: place, or (place, epoch, pass).

        Returns:
            The text of the example, unless its sound turns out to be unusable.
        """
        place, *draw = index if isinstance(index, tuple) else (index,)
        row = self.rows[int(self.numbers[place])]
        return self._text(row, draw, self._generators(place, draw)[1])[1]

    def _example(self, place: int, draw: Sequence[int]) -> dict[str, Any]:
        options, number = self.options, int(self.numbers[place])
        sound_rng, text_rng = self._generators(place, draw)
        source = self.source(place)
        with self.open(place, source) as sound:
            spare = max(sound.num_samples - options.length, 0)
            first, gain = spare // 2 if options.eval_crop == "centre" else 0, np.float32(1)
            if draw:
                first, gain = random_crop(sound.num_samples, options.length, options.gain_db, options.flip, sound_rng)
            window = sound.read(first, options.length)
        window = scale_to(window.clip(-1, 1), options.scale, options.level) * gain
        audio = torch.zeros(options.channels, options.length)
        audio[:, : window.shape[1]] = torch.from_numpy(window)
        row = self.rows[number]
        format_, text, tags = self._text(row, draw, text_rng)
        return {
            "audio": audio,
            "text": text,
            "valid_length": window.shape[1],
            "index": number,
            "columns": {column: lookup(row, column) for column in self.keep_columns}
            | {"source": source[1], "tags": tags, "format": format_},
        }

    def _candidates(self, place: int, draw: Sequence[int]) -> Iterator[int]:
        """The place itself, and others in random order."""
        yield place
        rng = np.random.default_rng([self.seed, *draw, place])
        yield from rng.choice(len(self), min(_TRIES, len(self)), replace=False).tolist()

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        """Example: the keys of a batch, without the batch dimension."""
        place, *draw = index if isinstance(index, tuple) else (index,)
        reason: AudioError | None = None
        for candidate in self._candidates(place, draw):
            try:
                return self._example(candidate, draw)
            except AudioError as error:
                if self.options.unreadable == "error":
                    raise ValueError(f"data.path: {error}; repair it, or set data.unreadable to skip") from error
                reason = error
                self._count(error)
        raise ValueError(
            f"data.path: {min(_TRIES, len(self))} sounds drawn one after another cannot be used, the last one is "
            f"{reason}; check the files"
        )

    def _count(self, error: AudioError) -> None:
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_SLOTS - 1)
        self._failures[slot] += 1
        number = int(self._failures[slot])
        if number & (number - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: always told, and never in thousands of lines
            warn(
                f"data.path: another sound took the place of an unusable one, {self.failures} times so far; the last "
                f"one is {error}",
                stacklevel=2,
            )


class Prompts(Dataset[dict[str, Any]]):
    """Texts alone, to make sounds of.

    Args:
        texts: the texts.
        seconds: length of every sound; None leaves it to the model.
    """

    def __init__(self, texts: Sequence[str], seconds: Sequence[float] | None) -> None:
        self.texts, self.seconds = list(texts), None if seconds is None else list(seconds)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`text`, `index`, and `seconds` if they are given."""
        row = {"text": self.texts[index], "index": index}
        return row if self.seconds is None else row | {"seconds": self.seconds[index]}


def read_prompts(prompts: Sequence[str] | str, seconds: float | None, text_column: str = "text") -> Prompts:
    """Read prompts.

    Args:
        prompts: texts; or a file with one text per line; or a CSV, TSV, JSON, JSONL or Parquet file with a column of
            texts and perhaps a column `seconds`.
        seconds: length of every sound for which the file tells none.
        text_column: column of the texts.

    Returns:
        The prompts.

    Raises:
        ValueError: if there is no such file, column or text, or a length is not positive.
    """
    lengths: list[float | None] = []
    if not isinstance(prompts, str):
        texts = list(prompts)
    elif not Path(prompts).is_file():
        raise ValueError(
            f"data.prompts: there is no file {prompts!r}; name a file with one prompt per line, or give a list "
            "of prompts"
        )
    elif Path(prompts).suffix in _TABLES:
        rows = load_rows(prompts, "train")
        require_columns(rows, {"data.text_column": text_column})
        cells = [texts_in(lookup(row, text_column)) for chunk in chunks(rows) for row in chunk]
        texts = [cell[0] if cell else "" for cell in cells]
        if "seconds" in rows.column_names:
            lengths = [seconds_in({"seconds": value}, "seconds", "prompts") for value in rows["seconds"]]
    else:
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError("data.prompts: there is no text; give at least one")
    filled = [seconds if value is None else value for value in lengths or [None] * len(texts)]
    known = [value for value in filled if value is not None]
    if wrong := [value for value in known if not 0 < value < math.inf]:
        raise ValueError(f"data.seconds: {wrong[0]} must be positive")
    if known and len(known) < len(texts):
        raise ValueError("data.seconds: some prompts have no length; set it for those whose file tells none")
    return Prompts(texts, known or None)


class AudioTexts(ClipData):
    """Sounds with texts: one's own files, tables of paths, and data sets of the hub.

    Only the window that an example needs is decoded and resampled (sinc filter of torchaudio); it equals the same part
    of the whole resampled file. Training examples are random crops with random texts, which follow from (seed, epoch,
    row) alone and hence survive an interruption; the others are fixed crops with fixed texts.

    Batch, of B examples of T = `length` samples in C = `channels`:

    - audio: (B,C,T) float32 in [-1,1] (beyond with `scale: std`), zero after the end of a sound
    - text: list[str]
    - valid_length: (B,) int64, samples before the end of the sound
    - index: (B,) int64, row numbers in the split
    - columns: dict of lists: raw values of `keep_columns`; `source` (path), `tags` (list[str]), `format` (`free` or
      `tags`)

    Batches of `prompts`: `text`, `index`, and `seconds` (B,) float32 if they are given.

    Sounds that do not exist, cannot be decoded, are empty or too short, or hold samples that are not finite are
    unusable; see `unreadable`.

    Args:
        path: folder with `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (columns `file_name`, `text`, `tags`,
            others are kept), which may be divided into folders named like the splits; or a folder of sounds whose
            texts stand beside them in files `.txt`; or a hub id, a folder written by `datasets`, or a CSV, JSONL or
            Parquet file with paths or encoded sounds. None serves for `prompts` only.
        name: configuration of the data set.
        data_files: split -> file or files.
        audio_column: column of the sounds: paths (relative to the table), encoded bytes, or `datasets` audio; None
            takes `audio`, or else `file_name`.
        text_column: column of free texts; of a list of texts one is drawn.
        tags_column: column of tags: a list, or text with commas.
        start_column: column of the second at which a sound begins in its file, e.g. `start_s`; None for 0.
        end_column: column of the second at which it ends; None goes on to the end of the file.
        duration_column: column of its seconds, instead of `end_column`.
        keep_columns: columns whose raw values are passed on; None takes all without sounds.
        sample_rate: Hz; files with other rates are resampled.
        channels: 1 takes the mean of all channels; more repeat a single channel, or take the first ones.
        length: samples of an example.
        eval_crop: part that is taken outside training: the `first` one or the `centre`.
        prompt_format: `free` texts, `tags` joined by commas (in random order while training), or `mixed`, either with
            equal probability where a row has both.
        missing_text: rows without a text of this format: `drop` them and tell how many, `keep` them with an empty text,
            or stop with an `error`.
        scale: `peak` makes `level` the largest absolute value of every example, `std` its standard deviation; `none`
            leaves it.
        level: see `scale`.
        gain_db: training examples are made quieter by 0 to this.
        flip: turn half of the training examples upside down.
        min_seconds: shorter sounds are unusable.
        unreadable: `skip` leaves unusable sounds out, or puts others in their place where it turns out late, and tells
            how many; `error` stops.
        check_files: so many files of each split, evenly spread, are opened before training; None opens all.
        train_split: training split or slice, e.g. `train[:95%]`.
        val_split: validation split or slice; None validates nothing.
        test_split: test split or slice; None tests nothing. Prediction uses it, or else the validation split.
        val_fraction: share of `train_split` that is drawn with the seed for validation, instead of a `val_split`; no
            file is in both parts.
        limit_train: use only the first rows of the training split.
        limit_val: use only the first rows of the validation split.
        limit_test: use only the first rows of the test split.
        prompts: texts to predict sounds for instead of a split: a list, a file with one per line, or a table with
            `text_column` and perhaps a column `seconds`.
        seconds: length of the sounds for `prompts`; None leaves it to the model.
        batch_size: training examples per batch and rank.
        val_batch_size: examples per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows and of random crops and texts.

    Raises:
        ValueError: naming the key, if a value is out of range, a column is missing, or nothing usable is left.

    Example::

        data = AudioTexts("my_music", sample_rate=16000, length=81920, val_fraction=0.1)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        audio_column: str | None = None,
        text_column: str = "text",
        tags_column: str = "tags",
        start_column: str | None = None,
        end_column: str | None = None,
        duration_column: str | None = None,
        keep_columns: list[str] | None = None,
        sample_rate: int = 16000,
        channels: int = 1,
        length: int = 81920,
        eval_crop: EvalCrop = "first",
        prompt_format: PromptFormat = "free",
        missing_text: MissingText = "drop",
        scale: Scale = "none",
        level: float = 0.9,
        gain_db: float = 0.0,
        flip: bool = False,
        min_seconds: float = 0.0,
        unreadable: Unreadable = "skip",
        check_files: int | None = 1000,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        prompts: list[str] | str | None = None,
        seconds: float | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(sample_rate, channels, length, batch_size, val_batch_size, num_workers, seed)
        self.save_hyperparameters(logger=False)
        check_least(
            ("gain_db", gain_db, 0),
            ("min_seconds", min_seconds, 0),
            ("check_files", check_files, 0),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 1),
            ("limit_test", limit_test, 1),
            ("seed", seed, 0),
        )
        for key, value, known in (
            ("eval_crop", eval_crop, get_args(EvalCrop)),
            ("prompt_format", prompt_format, get_args(PromptFormat)),
            ("missing_text", missing_text, get_args(MissingText)),
            ("scale", scale, get_args(Scale)),
            ("unreadable", unreadable, get_args(Unreadable)),
        ):
            if value not in known:
                raise ValueError(f"data.{key}: {value!r} is not one of {', '.join(known)}")
        if not 0 < level < math.inf:
            raise ValueError(f"data.level: {level} must be positive")
        if scale == "peak" and level > 1:
            raise ValueError(f"data.level: a peak of {level} would be clipped in a sound file; set it to at most 1")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        if val_fraction is not None and val_split is not None:
            raise ValueError("data.val_fraction and data.val_split both say what to validate on; remove one of them")
        if end_column is not None and duration_column is not None:
            raise ValueError("data.end_column and data.duration_column both say where a sound ends; remove one of them")
        if prompts is None and seconds is not None:
            raise ValueError("data.seconds: it is the length of the sounds for data.prompts; set those, or remove it")
        self.path, self.name, self.data_files = path, name, data_files
        self.audio_column, self.missing_text, self.check_files = audio_column, missing_text, check_files
        self.keep_columns, self.val_fraction = keep_columns, val_fraction
        self.prompts = None if prompts is None else read_prompts(prompts, seconds, text_column)
        held_out = val_split if val_fraction is None else train_split
        self.split_names: dict[Split, str | None] = {
            "train": train_split,
            "val": held_out,
            "test": test_split,
            "predict": test_split or held_out,
        }
        limits: dict[Split, int | None] = {"train": limit_train, "val": limit_val, "test": limit_test}
        self.limits = limits | {"predict": limit_val if test_split is None else limit_test}
        self.options = AudioOptions(
            audio_column=audio_column or "audio",
            text_column=text_column,
            tags_column=tags_column,
            start_column=start_column,
            end_column=end_column,
            duration_column=duration_column,
            sample_rate=sample_rate,
            channels=channels,
            length=length,
            eval_crop=eval_crop,
            prompt_format=prompt_format,
            scale=scale,
            level=level,
            gain_db=gain_db,
            flip=flip,
            min_seconds=min_seconds,
            unreadable=unreadable,
        )

    def rows(self, split: str) -> tuple["datasets.Dataset", Path]:
        """Open a split of the source; subclasses with data of their own override this.

        Args:
            split: name or slice.

        Returns:
            The rows, and the folder from which relative paths in them start.

        Raises:
            ValueError: if there is none.
        """
        if self.path is None:
            raise ValueError("data.path: there is nothing to train on; name the sounds (prompts serve to predict only)")
        return load_sounds(self.path, split, self.name, self.data_files)

    def prepare_data(self) -> None:
        """Fill the local cache in one process before all others read it."""
        predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        if not (predicting and self.prompts is not None):
            for split in {name for name in self.split_names.values() if name is not None}:
                self.rows(split)

    def build(self, split: Split) -> AudioClips | Prompts | None:
        """Sounds of a split, or prompts.

        Args:
            split: which one; `predict` is the prompts, or else `test` or `val`.

        Returns:
            The examples, or None if the user asked for none.

        Raises:
            ValueError: if a column is missing, or nothing usable is left.
        """
        if split == "predict" and self.prompts is not None:
            return self.prompts
        name = self.split_names[split]
        if name is None:
            return None
        rows, folder = self.rows(name)
        options = self._options_for(rows)
        numbers = self._held_out(rows, options, split)[: self.limits[split]]
        numbers = self._with_text(rows, options, numbers, name)
        clips = AudioClips(rows, folder, options, numbers, self.keep_columns, self.seed)
        self._leave_out_unusable(clips, name)
        return clips

    def _options_for(self, rows: "datasets.Dataset") -> AudioOptions:
        """Options with the columns that exist."""
        options, present = self.options, rows.column_names
        if self.audio_column is None and "audio" not in present and "file_name" in present:
            options = replace(options, audio_column="file_name")
        required: dict[str, str | None] = {"audio_column": options.audio_column}
        required |= {"text_column": options.text_column} if options.prompt_format != "tags" else {}
        required |= {"tags_column": options.tags_column} if options.prompt_format != "free" else {}
        required |= {key: getattr(options, key) for key in ("start_column", "end_column", "duration_column")}
        require_columns(rows, {f"data.{key}": column for key, column in required.items() if column is not None})
        kept = {f"data.keep_columns[{number}]": column for number, column in enumerate(self.keep_columns or [])}
        require_columns(rows.select_columns(plain_columns(rows)), kept)

        def if_present(column: str | None) -> str | None:
            return column if column is not None and top_column(column, rows) in present else None

        return replace(
            options, text_column=if_present(options.text_column), tags_column=if_present(options.tags_column)
        )

    def _held_out(self, rows: "datasets.Dataset", options: AudioOptions, split: Split) -> NDArray[np.int64]:
        """Rows that a split may see."""
        everything = np.arange(len(rows))
        shared = split in ("train", "val") or (split == "predict" and self.split_names["test"] is None)
        if self.val_fraction is None or not shared:
            return everything
        names: list[str | None] = [None] * len(rows)
        if options.audio_column in plain_columns(rows):
            names = [cell if isinstance(cell, str) else None for cell in rows[options.audio_column]]
        held = hold_out(names, self.val_fraction, self.seed)
        return everything[~held if split == "train" else held]

    def _with_text(
        self, rows: "datasets.Dataset", options: AudioOptions, numbers: NDArray[np.int64], name: str
    ) -> NDArray[np.int64]:
        """Rows whose text is not missing."""
        if self.missing_text == "keep":
            return numbers
        columns = {top_column(column, rows) for column in (options.text_column, options.tags_column) if column}
        words = rows.select_columns(sorted(columns)).select(numbers)
        described = [options.described(row) for chunk in chunks(words) for row in chunk]
        missing = numbers[~np.array(described, dtype=bool)]
        if not missing.size:
            return numbers
        key = "tags_column" if options.prompt_format == "tags" else "text_column"
        what = f"data.{key}: {missing.size} of {numbers.size} rows of the split {name!r} have no text"
        if self.missing_text == "error" or missing.size == numbers.size:
            raise ValueError(
                f"{what} in column {getattr(options, key)!r}, e.g. row {missing[0]}; fill it in, or set "
                f"data.missing_text to {'drop or keep' if missing.size < numbers.size else 'keep'}"
            )
        rank_zero_warn(f"{what} and are left out, e.g. row {missing[0]}")
        return np.setdiff1d(numbers, missing)

    def _leave_out_unusable(self, clips: AudioClips, name: str) -> None:
        """Open files before training, and leave out those that cannot be used."""
        if not len(clips):
            raise ValueError(f"data.path: the split {name!r} of {self.path!r} has no rows")
        count = len(clips) if self.check_files is None else min(len(clips), self.check_files)
        places = np.unique(np.linspace(0, len(clips) - 1, count).round().astype(np.int64)).tolist()
        bad, rates = on_rank_zero(lambda: _examine(clips, places))
        if bad:
            first = next(iter(bad.values()))
            if self.options.unreadable == "error":
                raise ValueError(f"data.path: {first}; repair it, or set data.unreadable to skip")
            what = f"data.path: {len(bad)} of {len(places)} sounds of the split {name!r} that were opened"
            if len(bad) == len(places):
                raise ValueError(f"{what} cannot be used, e.g. {first}; check the files and data.audio_column")
            rank_zero_warn(f"{what} cannot be used and are left out, e.g. {first}")
            clips.numbers = np.delete(clips.numbers, list(bad))
        if len(rates) > 1 or min(rates, default=self.sample_rate) < self.sample_rate:
            found = ", ".join(f"{number} with {rate} Hz" for rate, number in sorted(rates.items()))
            rank_zero_warn(
                f"data.sample_rate: the {sum(rates.values())} sounds of the split {name!r} that were opened are "
                f"{found}; all are resampled to {self.sample_rate} Hz"
            )

    def _dataset(self, split: Split) -> Any:  # noqa: ANN401
        if split == "predict" and split not in self.datasets:
            raise ValueError(
                "data.prompts, data.test_split, data.val_split: there is nothing to predict; set one of them"
            )
        return super()._dataset(split)


def _examine(clips: AudioClips, places: Sequence[int]) -> tuple[dict[int, str], Counter[int]]:
    """Open sounds: what is wrong, by place, and how many have which sample rate."""
    bad: dict[int, str] = {}
    rates: Counter[int] = Counter()
    for place in places:
        try:
            with clips.open(place) as sound:
                rates[sound.source_rate] += 1
        except AudioError as error:
            bad[place] = str(error)
    return bad, rates


def on_rank_zero(function: Callable[[], _T]) -> _T:
    """Call a function on rank 0 only: what it sees of the disk holds for all.

    Args:
        function: without arguments; its result must be picklable.

    Returns:
        Its result, on every rank.

    Raises:
        RuntimeError: on the other ranks, if it failed on rank 0.
    """
    rank, world = rank_and_world()
    if world == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # whatever it is, the others must not wait for it
            failure, outcome[1] = error, repr(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]
