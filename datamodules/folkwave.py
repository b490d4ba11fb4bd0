"""FolkWave: folk tunes played by synthetic instruments, with descriptions; rendered while training runs."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.abc_notation import Tune, read_abc, tune_from_row
from datamodules.assets import asset_path
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
from datamodules.synth import INSTRUMENTS, Level, instrument, num_samples, render

REGISTERS = MappingProxyType({"low": -24, "middle": -12, "high": 0})
"""Semitones by register."""
TEMPOS = MappingProxyType({"slow": 72.0, "medium": 104.0, "fast": 144.0})
"""Quarter notes per minute by tempo word."""
COLLECTIONS = ("ryansMammoth", "oneills1850", "airdsAirs")
"""Public-domain collections that the package music21 carries."""
TAGS = ("instrument", "genre", "key", "meter", "register", "tempo")
"""Facts that are tags unless others are asked for."""
_MORE_TAGS = ("mood", "title", "composer")
TEMPLATES = (
    "a {tempo} {genre} called {title}, played on the {instrument} in {key}, in a {register} register",
    "{title} by {composer}, for {instrument}, {register} and {tempo}",
    "the {instrument} plays {title} in {key}, {tempo}, with {register} notes",
    "{register} {instrument} music: a {genre} in {key} at a {tempo} tempo",
    "a solo for {instrument} in the {register} register, {tempo}, in {meter} time",
    "a {mood} {genre} on a {register} {instrument}, {tempo}",
    "this {genre} in {key} is a {tempo} melody for the {instrument}; its notes are {register}",
    "I want to hear {title} on the {instrument}, {tempo} and in a {register} range",
    "a {mood} melody by {composer}: {title}, with a {register} {instrument} at a {tempo} tempo",
    "a traditional {tradition} {genre} for a {register} {instrument}, {tempo} and {mood}",
    "a melody in {meter} and in {key}, {register} and {tempo}, played by the {instrument}",
)
"""Free-form descriptions; only those whose facts are all known are used for a tune."""
_BUILTIN = "builtin"
_TUNES = "folk_tunes/tunes.jsonl"
_TRADITIONAL = "traditional "
_VERSION = 1  # of the sound; part of the names of cached files
_SHUFFLE = 20230209  # of tunes and clips before limits are applied; the same for everybody
_FIELD = re.compile(r"(?:\b([Aa]) )?\{(\w+)\}")


def split_of(source: str) -> Literal["train", "val", "test"]:
    """Split of a tune: the CRC-32 of its source modulo 10 is 0 for test and 1 for validation.

    Args:
        source: see `Tune.source`.

    Returns:
        The split.
    """
    return {0: "test", 1: "val"}.get(zlib.crc32(source.encode()) % 10, "train")  # type: ignore[return-value]


def load_tunes(source: str) -> list[Tune]:
    """Read the tunes of one source.

    Args:
        source: `builtin`, a collection of the package music21 (`ryansMammoth`, `oneills1850`, `airdsAirs`), or the path
            of an ABC file or of a folder of such files.

    Returns:
        The tunes, in the order of the files.

    Raises:
        ValueError: if the source does not exist.
    """
    if source == _BUILTIN:
        lines = Path(asset_path(_TUNES)).read_text(encoding="utf-8").splitlines()
        return [tune_from_row(json.loads(line), f"{_TUNES}#{number}") for number, line in enumerate(lines, start=1)]
    if source in COLLECTIONS:
        spec = importlib.util.find_spec("music21")  # not imported, which would take seconds
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"data.sources: {source} is part of the package music21; run `pip install music21`, or choose "
                f"{_BUILTIN}"
            )
        return _read_folder(Path(spec.submodule_search_locations[0]) / "corpus" / source, source)
    path = Path(source)
    if path.is_file():
        return read_abc(path)
    if path.is_dir():
        return _read_folder(path, None)
    raise ValueError(
        f"data.sources: {source!r} is neither an ABC file, nor a folder, nor one of {_BUILTIN}, "
        f"{', '.join(COLLECTIONS)}; correct it"
    )


def _read_folder(folder: Path, collection: str | None) -> list[Tune]:
    tunes = [tune for path in sorted(folder.glob("*.abc")) for tune in read_abc(path, collection)]
    if not tunes:
        raise ValueError(f"data.sources: {folder} holds no tunes in files *.abc; name a folder that does")
    return tunes


def facts_of(tune: Tune, instrument: str, register: str, tempo: str) -> dict[str, str]:
    """What descriptions may tell of a clip.

    Args:
        tune: the tune.
        instrument: name of the instrument.
        register: name of the register.
        tempo: tempo word.

    Returns:
        `title`, `composer`, `tradition`, `genre`, `mood`, `key`, `meter`, `instrument`, `register` and `tempo`; "" for
        what is unknown. A composer such as `traditional French` counts as the tradition `French`.
    """
    traditional = tune.composer.lower().startswith(_TRADITIONAL)
    return {
        "title": tune.title,
        "composer": "" if traditional else tune.composer,
        "tradition": tune.composer[len(_TRADITIONAL) :] if traditional else "",
        "genre": tune.rhythm or "tune",
        "mood": tune.mood,
        "key": tune.key,
        "meter": tune.meter,
        "instrument": instrument,
        "register": register,
        "tempo": tempo,
    }


def usable_templates(facts: Mapping[str, str]) -> list[str]:
    """Templates whose facts are all known.

    Args:
        facts: see `facts_of`.

    Returns:
        Some of `TEMPLATES`, never none.
    """
    return [text for text in TEMPLATES if all(facts[name] for _, name in _FIELD.findall(text))]


def fill(template: str, facts: Mapping[str, str]) -> str:
    """Write a description.

    Args:
        template: one of `usable_templates`; `a {name}` becomes `an ...` before a vowel.
        facts: see `facts_of`.

    Returns:
        The description.
    """

    def word(match: re.Match[str]) -> str:
        article, value = match[1], facts[match[2]]
        if article is None:
            return value
        return f"{article}{'n' if value[0].lower() in 'aeiou' else ''} {value}"

    return _FIELD.sub(word, template)


class ClipCache:
    """Rendered clips: the latest in memory, all on disk if there is a folder.

    Args:
        megabytes: memory of this process for clips.
        folder: folder of files named by their content, which several runs and processes may share; None for none.
    """

    def __init__(self, megabytes: float, folder: str | None) -> None:
        self.limit = int(megabytes * 2**20)
        self.folder = None if folder is None else Path(folder)
        self._clips: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._bytes = 0

    def get(self, row: int, key: Callable[[], object], make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Take a clip, or make it.

        Args:
            row: its number.
            key: gives all that its sound depends on; asked for only if there is a folder.
            make: renders it.

        Returns:
            The clip; it must not be changed.
        """
        if row in self._clips:
            self._clips.move_to_end(row)
            return self._clips[row]
        clip = make() if self.folder is None else self._stored(self.folder, key(), make)
        if clip.nbytes <= self.limit:
            self._clips[row] = clip
            self._bytes += clip.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._clips.popitem(last=False)[1].nbytes
        return clip

    @staticmethod
    def _stored(folder: Path, key: object, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
        if path.is_file():
            stored: NDArray[np.float32] = np.load(path)
            return stored
        clip = make()
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that other processes never read a part of it.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.save(file, clip)
        os.replace(file.name, path)
        return clip

    def __getstate__(self) -> dict[str, Any]:
        """Without the clips, so that worker processes start quickly."""
        return self.__dict__ | {"_clips": OrderedDict(), "_bytes": 0}


@dataclass(frozen=True)
class ClipOptions:
    """How the clips of a data set sound and are described; see `FolkWave`.

    Args:
        sample_rate: Hz.
        channels: 1 or 2 equal ones.
        length: samples of an example.
        clip_samples: samples that are rendered together.
        instruments: names.
        registers: names.
        tempos: quarter notes per minute by tempo word.
        prompt_format: kind of text.
        tag_fields: facts that become tags.
        scale: what `level` is.
        level: strength of the clips.
        gain_db: training examples are made quieter by up to this.
        flip: half of the training examples are turned upside down.
    """

    sample_rate: int
    channels: int
    length: int
    clip_samples: int
    instruments: tuple[str, ...]
    registers: tuple[str, ...]
    tempos: tuple[tuple[str, float], ...]
    prompt_format: PromptFormat
    tag_fields: tuple[str, ...]
    scale: Level
    level: float
    gain_db: float
    flip: bool


class FolkClips(Dataset[dict[str, Any]]):
    """Clips of some tunes: every window of every tune on every instrument in every register and tempo.

    An integer gives the first crop with a text that depends on the clip only; (row number, epoch, pass) gives a random
    crop and text.

    Args:
        tunes: the tunes.
        options: sound and text.
        windows: most windows of a tune, each as long as a rendered clip; None takes all.
        limit: number of clips, drawn with a fixed seed; None takes all.
        seed: seed of random crops and texts.
        cache: rendered clips.
    """

    def __init__(
        self,
        tunes: Sequence[Tune],
        options: ClipOptions,
        windows: int | None,
        limit: int | None,
        seed: int,
        cache: ClipCache,
    ) -> None:
        self.tunes, self.options, self.seed, self.cache = tuple(tunes), options, seed, cache
        # A tune has the same number of windows at every tempo: those that the fastest fills.
        seconds = 60 / max(bpm for _, bpm in options.tempos)
        fill_ = [int(tune.quarters * seconds * options.sample_rate / options.clip_samples) for tune in tunes]
        counts = [max(1, count if windows is None else min(count, windows)) for count in fill_]
        self.places = [(tune, window) for tune, count in enumerate(counts) for window in range(count)]
        self.shape = (len(self.places), len(options.instruments), len(options.registers), len(options.tempos))
        self.rows = np.random.default_rng(_SHUFFLE).permutation(int(np.prod(self.shape)))[:limit]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.rows)

    def _clip(self, row: int) -> tuple[Tune, int, str, str, str, float]:
        """Tune, window, instrument, register, tempo word and tempo of a row."""
        place, voice, register, tempo = np.unravel_index(self.rows[row], self.shape)
        number, window = self.places[place]
        options = self.options
        return (
            self.tunes[number],
            window,
            options.instruments[voice],
            options.registers[register],
            *options.tempos[tempo],
        )

    def _facts(self, row: int) -> dict[str, str]:
        tune, _, voice, register, tempo, _ = self._clip(row)
        return facts_of(tune, voice, register, tempo)

    def _tags(self, facts: Mapping[str, str]) -> list[str]:
        return [facts[name] for name in self.options.tag_fields if facts[name]]

    def _generators(self, index: int | Draw) -> tuple[np.random.Generator, np.random.Generator]:
        if isinstance(index, tuple):
            row, epoch, pass_ = index
            return generators([self.seed, epoch, pass_, row])
        tune, *_ = self._clip(index)
        return generators([zlib.crc32(tune.source.encode()), int(self.rows[index])])

    def _text(self, facts: Mapping[str, str], index: int | Draw, rng: np.random.Generator) -> tuple[str, str]:
        """Format and text."""
        format_ = choose_format(self.options.prompt_format, rng)
        if format_ == "free":
            templates = usable_templates(facts)
            return format_, fill(templates[rng.integers(len(templates))], facts)
        return format_, join_tags(self._tags(facts), rng if isinstance(index, tuple) else None)

    def text(self, index: int | Draw) -> str:
        """Text of an example, without rendering it.

        Args:
            index: row number, or (row number, epoch, pass).

        Returns:
            The same text as the example has.
        """
        row = index[0] if isinstance(index, tuple) else index
        return self._text(self._facts(row), index, self._generators(index)[1])[1]

    def clip(self, row: int) -> tuple[NDArray[np.float32], int]:
        """Rendered clip and the number of its samples before the end of the tune.

        Args:
            row: its number.

        Returns:
            Float32 [clip_samples], which must not be changed, and the number.
        """
        tune, window, name, register, _, bpm = self._clip(row)
        options, voice = self.options, instrument(name)
        rate, samples = options.sample_rate, options.clip_samples
        start = window * samples
        sound = (tune.events, voice, bpm, rate, REGISTERS[register], start, samples, options.scale, options.level)
        wave = self.cache.get(row, lambda: (_VERSION, *sound), lambda: render(*sound))
        return wave, min(samples, max(num_samples(tune.events, voice, bpm, rate) - start, 0))

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        """Example: the keys of a batch, without the batch dimension."""
        row = index[0] if isinstance(index, tuple) else index
        options = self.options
        facts = self._facts(row)
        sound, words = self._generators(index)
        format_, text = self._text(facts, index, words)
        clip, valid = self.clip(row)
        first, gain = 0, np.float32(1)
        if isinstance(index, tuple):
            first, gain = random_crop(valid, options.length, options.gain_db, options.flip, sound)
        crop = clip[first : first + options.length] * gain
        tune, window, *_ = self._clip(row)
        return {
            "audio": torch.from_numpy(crop).expand(options.channels, -1),
            "text": text,
            "valid_length": min(max(valid - first, 0), options.length),
            "index": row,
            "columns": facts
            | {"source": tune.source, "window": window, "tags": self._tags(facts)}
            | {"format": format_},
        }


class FolkWave(ClipData):
    """Folk tunes on synthetic instruments, with texts that tell instrument, register, tempo and more.

    Nothing is stored: a clip is a window of a tune on one of the instruments, in one of the registers and tempos. It is
    rendered when it is first needed, in the worker processes. Tunes, not clips, are divided into training (8 of 10),
    validation and test by the CRC-32 of their source, so no melody is in two splits. Prediction uses the test clips.

    Training examples are random crops of clips with random texts, which follow from (seed, epoch, row) alone and hence
    survive an interruption; the others are the first crops with fixed texts.

    Batch, of B examples of T = `length` samples in C = `channels`:

    - audio: (B,C,T) float32 in [-1,1] (with `scale: peak`), zero after the end of a tune
    - text: list[str]
    - valid_length: (B,) int64, samples before the end of the tune
    - index: (B,) int64, row numbers in the data set
    - columns: dict of lists: `title`, `composer`, `tradition`, `genre`, `mood`, `key`, `meter`, `instrument`,
      `register`, `tempo` ("" where unknown), `source`, `window` (int), `tags` (list[str]), `format` (`free` or `tags`)

    Args:
        sources: where tunes come from: `builtin` (twelve melodies), collections of the package music21 (`ryansMammoth`,
            `oneills1850`, `airdsAirs`; install it yourself), ABC files or folders of them; None takes `builtin`.
        sample_rate: Hz.
        channels: 1, or 2 equal ones.
        length: samples of an example.
        clip_seconds: seconds that are rendered together and scaled, from which examples are cropped; None renders
            just one example.
        windows: most windows of `clip_seconds` of a tune, from its beginning; null takes all that are full.
        instruments: some of organ, flute, violin, clarinet, harp, piano; None takes all.
        registers: some of low (two octaves down), middle (one down), high (as written); None takes all.
        tempos: quarter notes per minute by tempo word; None takes slow 72, medium 104, fast 144.
        min_notes: notes a tune must have.
        limit_tunes: use only so many tunes of all splits together, drawn with a fixed seed.
        prompt_format: `free` descriptions, `tags` joined by commas (in random order while training), or `mixed`, either
            with equal probability.
        tag_fields: facts that become tags, in this order: some of instrument, genre, key, meter, register, tempo, mood,
            title, composer; None takes the first six.
        scale: whether `level` is the largest absolute value (`peak`) or the standard deviation (`std`) of a clip.
        level: strength of every clip.
        gain_db: training examples are made quieter by 0 to this.
        flip: turn half of the training examples upside down.
        cache_mb: memory for rendered clips, per worker process and split.
        cache_dir: folder for rendered clips, which runs may share; None keeps them in memory only.
        limit_train: use only so many training clips.
        limit_val: use only so many validation clips; 0 trains without validation.
        limit_test: use only so many test clips.
        batch_size: training examples per batch and rank.
        val_batch_size: examples per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that render ahead, per rank and loader.
        seed: seed of the order of the clips and of random crops and texts.

    Raises:
        ValueError: naming the key, if a value is unknown or out of range, or a split would have no tune.

    Example::

        data = FolkWave(sample_rate=4000, length=1024, clip_seconds=8.192, instruments=["flute", "harp"])
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
    """

    def __init__(
        self,
        sources: list[str] | None = None,
        sample_rate: int = 16000,
        channels: int = 1,
        length: int = 81920,
        clip_seconds: float | None = None,
        windows: int | None = 1,
        instruments: list[str] | None = None,
        registers: list[str] | None = None,
        tempos: dict[str, float] | None = None,
        min_notes: int = 16,
        limit_tunes: int | None = None,
        prompt_format: PromptFormat = "free",
        tag_fields: list[str] | None = None,
        scale: Level = "peak",
        level: float = 0.9,
        gain_db: float = 0.0,
        flip: bool = False,
        cache_mb: float = 256.0,
        cache_dir: str | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(sample_rate, channels, length, batch_size, val_batch_size, num_workers, seed)
        self.save_hyperparameters(logger=False)
        check_least(
            ("windows", windows, 1),
            ("min_notes", min_notes, 1),
            ("limit_tunes", limit_tunes, 1),
            ("gain_db", gain_db, 0),
            ("cache_mb", cache_mb, 0),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 0),
            ("limit_test", limit_test, 1),
        )
        tempos = dict(TEMPOS) if tempos is None else tempos
        for key, value in [("level", level), *((f"tempos.{word}", bpm) for word, bpm in tempos.items())]:
            if not 0 < value < float("inf"):
                raise ValueError(f"data.{key}: {value} must be positive")
        if scale == "peak" and level > 1:
            raise ValueError(f"data.level: a peak of {level} would be clipped in a sound file; set it to at most 1")
        if channels not in (1, 2):
            raise ValueError(f"data.channels: {channels} must be 1 or 2")
        if not tempos or "" in tempos:
            raise ValueError("data.tempos: name at least one tempo word, and give its quarter notes per minute")
        clip_samples = length if clip_seconds is None else round(clip_seconds * sample_rate)
        if clip_samples < length:
            raise ValueError(
                f"data.clip_seconds: {clip_seconds} s are {clip_samples} samples, fewer than data.length {length}; "
                "make clips longer or examples shorter"
            )
        _choose("scale", [scale], get_args(Level))
        _choose("prompt_format", [prompt_format], get_args(PromptFormat))
        self.sources = list(sources) if sources else [_BUILTIN]
        self.windows, self.min_notes, self.limit_tunes = windows, min_notes, limit_tunes
        self.cache_mb, self.cache_dir = cache_mb, cache_dir
        self.limits: dict[str, int | None] = {"train": limit_train, "val": limit_val, "test": limit_test}
        self.options = ClipOptions(
            sample_rate=sample_rate,
            channels=channels,
            length=length,
            clip_samples=clip_samples,
            instruments=_choose("instruments", instruments, tuple(INSTRUMENTS)),
            registers=_choose("registers", registers, tuple(REGISTERS)),
            tempos=tuple((word, float(bpm)) for word, bpm in tempos.items()),
            prompt_format=prompt_format,
            tag_fields=_choose("tag_fields", TAGS if tag_fields is None else tag_fields, (*TAGS, *_MORE_TAGS)),
            scale=scale,
            level=level,
            gain_db=gain_db,
            flip=flip,
        )

    @functools.cached_property
    def tunes(self) -> tuple[Tune, ...]:
        """Tunes of all splits; the files are read when they are first asked for."""
        tunes = [tune for source in self.sources for tune in load_tunes(source) if tune.num_notes >= self.min_notes]
        if self.limit_tunes is not None:
            order = np.random.default_rng(_SHUFFLE).permutation(len(tunes))[: self.limit_tunes]
            tunes = [tunes[number] for number in sorted(order)]
        return tuple(tunes)

    def build(self, split: Split) -> FolkClips | None:
        """Clips of the tunes of a split.

        Args:
            split: which one; `predict` is `test`.

        Returns:
            The clips, or None if there shall be no validation.

        Raises:
            ValueError: if the split has no tune.
        """
        name = "test" if split == "predict" else split
        if self.limits[name] == 0:
            return None
        tunes = [tune for tune in self.tunes if split_of(tune.source) == name]
        if not tunes:
            remedy = ", or set data.limit_val: 0" if name == "val" else ""
            raise ValueError(
                f"data.sources: none of the {len(self.tunes)} tunes falls to {name}; add sources, raise "
                f"data.limit_tunes or lower data.min_notes{remedy}"
            )
        cache = ClipCache(self.cache_mb, self.cache_dir)
        return FolkClips(tunes, self.options, self.windows, self.limits[name], self.seed, cache)

    def _dataset(self, split: Split) -> Any:  # noqa: ANN401
        if split == "val" and self.limits["val"] == 0:
            raise ValueError("data.limit_val: 0 leaves nothing to validate on; set it to null or a number of clips")
        return super()._dataset(split)


def _choose(key: str, names: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Check names against those that exist; None takes all."""
    chosen = tuple(known if names is None else names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"data.{key}: {name!r} is not one of {', '.join(known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"data.{key}: name at least one of {', '.join(known)}, each once")
    return chosen
