"""Sounds on disk: what a model generates while it is trained, and predictions."""

import csv
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from callbacks.rng import RandomState
from callbacks.samples import SampleTable, remove_later
from callbacks.strips import Image, write_png

Waveform: TypeAlias = NDArray[np.float32]
SampleFormat = Literal["pcm16", "float32"]

FLOOR_DB = -90.0
"""Quietest level that a spectrogram tells from silence; a sine of amplitude 1 has 0 dB."""
WINDOW_SECONDS = 0.064
FRAMES = 2000
"""Most columns of a spectrogram."""
_SUBTYPES = {"pcm16": "PCM_16", "float32": "FLOAT"}
_STEP = re.compile(r"step=(\d+)(-val)?")
_UNSAFE = re.compile(r"[^\w.=+-]+")
_SOUND = re.compile(r"(\d+-)?\d{6,}(-\d+)?\.wav")


def as_waveform(sound: Any, name: str) -> Waveform:  # noqa: ANN401
    """Bring a sound to the form that is written.

    Args:
        sound: (C,T) or (T,) array or tensor of any float dtype.
        name: for messages.

    Returns:
        (C,T) float32; samples that are no numbers are silent, with a warning.

    Raises:
        ValueError: if it has another shape, or no sample.
    """
    array = sound.detach().float().cpu().numpy() if isinstance(sound, torch.Tensor) else np.asarray(sound)
    array = np.atleast_2d(array.astype(np.float32))
    if array.ndim != 2 or not array.size:
        raise ValueError(f"sound {name!r} has shape {array.shape}; waveforms are (channels, samples) or (samples,)")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        warnings.warn(f"sound {name!r}: {bad} samples are no numbers; they are written as silence", stacklevel=2)
        array = np.where(np.isfinite(array), array, np.float32(0))
    return array


def within_range(waveform: Waveform) -> Waveform:
    """Make a sound beyond [-1,1] quieter as a whole; cutting it would add what was not there."""
    return waveform / np.float32(max(float(np.abs(waveform).max()), 1.0))


def write_wav(path: Path, waveform: Waveform, sample_rate: int, sample_format: SampleFormat = "pcm16") -> None:
    """Write a WAV file in one move, so that nobody sees half of it.

    Args:
        path: file to write or to replace; its folder is made.
        waveform: (C,T) float32.
        sample_rate: in Hz.
        sample_format: 16-bit whole numbers, for which a sound beyond [-1,1] is made quieter as a whole, or float32 as
            it is.
    """
    import soundfile

    if sample_format == "pcm16":
        waveform = within_range(waveform)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{secrets.token_hex(4)}.part")  # processes may write the same sound
    soundfile.write(draft, waveform.T, sample_rate, _SUBTYPES[sample_format], format="WAV")
    os.replace(draft, path)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> None:
    """Write a CSV file in one move.

    Args:
        path: file to write or to replace; its folder must exist.
        rows: values by column.
        names: columns.
    """
    draft = path.with_suffix(".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


def spectrogram(waveform: Waveform, sample_rate: int) -> NDArray[np.float32]:
    """Levels of frequencies over time, with a Hann window of about 64 ms.

    Args:
        waveform: (T,) float32.
        sample_rate: in Hz.

    Returns:
        (bins, frames) float32 in dB, at least -90; a sine of amplitude 1 has 0 dB.
    """
    size = 1 << max(round(WINDOW_SECONDS * sample_rate).bit_length() - 1, 4)
    hop = max(size // 4, -(-len(waveform) // FRAMES))
    window = torch.hann_window(size, dtype=torch.float32)
    sound = torch.from_numpy(np.ascontiguousarray(waveform, np.float32))
    spectrum = torch.stft(sound, size, hop, window=window, pad_mode="constant", return_complex=True).abs()
    decibels = 20 * (spectrum * 2 / window.sum()).clamp(min=1e-10).log10()
    return decibels.clamp(min=FLOOR_DB).numpy()


def spectrogram_picture(waveform: Waveform, sample_rate: int, title: str = "") -> Image:
    """Draw the spectrograms of all channels under each other.

    Args:
        waveform: (C,T) float32.
        sample_rate: in Hz.
        title: above the picture.

    Returns:
        (H,W,3) uint8; the axes are seconds, Hz and dB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 1 + 2.5 * len(waveform)
    figure = Figure(figsize=(9, height), dpi=80)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(waveform), 1, squeeze=False, sharex=True)[:, 0]
    figure.subplots_adjust(left=0.09, right=0.97, bottom=0.5 / height, top=1 - 0.35 / height)
    seconds = waveform.shape[-1] / sample_rate
    for channel, (axis, sound) in enumerate(zip(axes, waveform, strict=True)):
        shown = axis.imshow(
            spectrogram(sound, sample_rate),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=FLOOR_DB,
            vmax=0,
            extent=(0, seconds, 0, sample_rate / 2),
        )
        axis.set_ylabel("Hz" if len(waveform) == 1 else f"channel {channel + 1}, Hz")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(shown, ax=list(axes), label="dB", pad=0.02, fraction=0.07)
    # Texts of users are not formulas.
    figure.suptitle(title if len(title) <= 120 else f"{title[:119]}…", fontsize=9, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # prompts are in any language
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


class AudioSamples(SampleTable):
    """Writes the sounds of the module's `sounds()` to WAV files with pictures of their spectra, and to TensorBoard.

    Each time a folder `step=N` is made, or `step=N-val` after validation, with a WAV and a PNG file for each sound, and
    `sounds.csv` with name, file, prompt (`text`), `seconds` and `peak`.

    Args:
        every_n_steps: batches between two times.
        num_sounds: most sounds of each kind; `real/0` and `real/1` are of one kind.
        folder: name of the folder in the run's folder.
        sample_format: of WAV files: `pcm16`, in which sounds beyond [-1,1] are made quieter, or `float32`.
        pictures: whether to draw spectrograms.

    Raises:
        ValueError: if a number is not positive, the format is unknown, or the module makes no sounds.

    Note:
        The module must have `sounds()`, which returns ((C,T) waveform, sample rate) by name; all processes call it, as
        generation may need them all, and the first one writes. `sound_texts()`, if there is one, gives prompts by name.
        Random numbers that it draws change nothing in training. A resumed run removes the folders after the step it
        resumes from; a new run removes all of them.

    Example::

        Trainer(callbacks=[AudioSamples(every_n_steps=1000)])
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        num_sounds: int = 4,
        folder: str = "sounds",
        sample_format: SampleFormat = "pcm16",
        pictures: bool = True,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_sounds", num_sounds)):
            if value < 1:
                raise ValueError(f"callbacks.AudioSamples.{name} must be at least 1, got {value}")
        _check_format("AudioSamples", sample_format)
        super().__init__(every_n_steps, num_sounds, folder)
        self.sample_format: SampleFormat = sample_format
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module makes sounds."""
        if stage == "fit" and not hasattr(pl_module, "sounds"):
            raise ValueError(
                f"callbacks.AudioSamples needs a module with sounds, and {type(pl_module).__name__} has none; "
                "take it out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove sounds of steps that will be run again."""
        folder = self._path(trainer)  # on all ranks, since log_dir is broadcast
        if trainer.is_global_zero:
            remove_later(folder, _STEP, trainer.global_step)

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        folder = self._path(trainer)  # on all ranks, since log_dir is broadcast
        make: Any = pl_module.sounds
        texts: Any = getattr(pl_module, "sound_texts", dict)
        before = RandomState.now()
        try:
            with torch.no_grad():
                sounds, prompts = self._chosen(make()), texts()
        finally:
            before.restore()
        if not sounds or not trainer.is_global_zero:
            return
        folder /= f"step={trainer.global_step}{'' if split == 'train' else '-val'}"
        files, rows = file_names(sounds), []
        for name, (sound, rate) in sounds.items():
            waveform, text = as_waveform(sound, name), str(prompts.get(name, ""))
            write_wav(folder / f"{files[name]}.wav", waveform, int(rate), self.sample_format)
            picture = None
            if self.pictures:
                picture = spectrogram_picture(waveform, int(rate), f"{name}: {text}" if text else name)
                write_png(picture, folder / f"{files[name]}.png")
            rows.append(
                {
                    "name": name,
                    "file": f"{files[name]}.wav",
                    "text": text,
                    "seconds": round(waveform.shape[-1] / rate, 4),
                    "peak": round(float(np.abs(waveform).max()), 4),
                }
            )
            self._log(trainer, f"{self.filename}/{split}/{name}", waveform, int(rate), picture, text)
        write_rows(folder / "sounds.csv", rows, list(rows[0]))

    def _chosen(self, sounds: Mapping[str, tuple[Any, int]]) -> dict[str, tuple[Any, int]]:
        """The first sounds of each kind."""
        seen: Counter[str] = Counter()
        chosen = {}
        for name, sound in sounds.items():
            kind = name.rpartition("/")[0]
            seen[kind] += 1
            if seen[kind] <= self.num_rows:
                chosen[name] = sound
        return chosen

    def _log(self, trainer: Trainer, tag: str, waveform: Waveform, rate: int, picture: Image | None, text: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                mono = torch.from_numpy(within_range(waveform).mean(0, keepdims=True))  # it plays one channel
                logger.experiment.add_audio(tag, mono, trainer.global_step, rate)
                if picture is not None:
                    logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")
                if text:
                    logger.experiment.add_text(tag, text, trainer.global_step)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """File names, without folders and ending, for names of sounds; all different, also where case is not told apart."""
    taken: set[str] = set()
    files = {}
    for name in names:
        stem = _UNSAFE.sub("-", name).strip(".-") or "sound"
        file, number = stem, 1
        while file.lower() in taken:
            number += 1
            file = f"{stem}-{number}"
        taken.add(file.lower())
        files[name] = file
    return files


def _check_format(callback: str, sample_format: str) -> None:
    if sample_format not in get_args(SampleFormat):
        raise ValueError(
            f"callbacks.{callback}.sample_format: {sample_format!r} is unknown; choose one of "
            f"{', '.join(get_args(SampleFormat))}"
        )


class AudioWriter(BasePredictionWriter):
    """Writes predicted sounds as WAV files, and a table of their prompts.

    The files are `INDEX.wav`, `INDEX-2.wav` and so on for further sounds of the same index, in the folder given;
    `prompts.csv` has `index`, `text`, `file` and `seconds` of each. With several processes each one writes its sounds,
    and the tables are joined in the end.

    Args:
        folder: name of the folder in the run's folder, or its path.
        sample_format: of WAV files: `pcm16`, in which sounds beyond [-1,1] are made quieter, or `float32`.

    Raises:
        ValueError: if the format is unknown, or predictions hold no audio.

    Note:
        `predict_step` must return a dict with `audio`, a (B,C,T) tensor or B waveforms (C,T), and `sample_rate`;
        `text` (B), `index` (B) and `valid_length` (B), the samples that count, are used if they are there. Sounds of
        an earlier prediction in the same folder are removed.

    Example::

        Trainer(callbacks=[AudioWriter()])
    """

    columns = ("index", "text", "file", "seconds")

    def __init__(self, folder: str = "predictions", sample_format: SampleFormat = "pcm16") -> None:
        super().__init__(write_interval="batch")
        _check_format("AudioWriter", sample_format)
        self.folder = folder
        self.sample_format: SampleFormat = sample_format
        self._counts: Counter[str] = Counter()
        self._unnumbered = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make an empty folder."""
        folder = self._path(trainer)
        self._counts.clear()
        self._unnumbered = 0
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean(folder)
        trainer.strategy.barrier("AudioWriter.start")
        write_rows(self._part(trainer), [], self.columns)

    def _clean(self, folder: Path) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        for table in folder.glob("prompts*.csv"):
            rows, names = _read_rows(table)
            if names != self.columns:
                continue
            for row in rows:
                if _SOUND.fullmatch(row["file"] or ""):
                    (folder / row["file"]).unlink(missing_ok=True)
            table.unlink()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the sounds of a batch."""
        if not isinstance(prediction, Mapping) or not {"audio", "sample_rate"} <= prediction.keys():
            held = ", ".join(map(str, prediction)) if isinstance(prediction, Mapping) else type(prediction).__name__
            raise ValueError(
                f"callbacks.AudioWriter needs predictions with audio and sample_rate, but those of "
                f"{type(pl_module).__name__} hold {held or 'nothing'}; take it out of trainer.callbacks, or use "
                "callbacks.PredictionWriter"
            )
        sounds, rate = prediction["audio"], int(prediction["sample_rate"])
        numbers = self._indices(trainer, prediction, batch_indices, len(sounds))
        texts = prediction.get("text") or [""] * len(sounds)
        lengths = prediction.get("valid_length")
        prefix = "" if _num_loaders(trainer) == 1 else f"{dataloader_idx}-"
        with self._part(trainer).open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, self.columns)
            for place, (sound, number, text) in enumerate(zip(sounds, numbers, texts, strict=True)):
                waveform = as_waveform(sound, f"{prefix}{number}")
                if lengths is not None:
                    waveform = waveform[:, : max(int(lengths[place]), 1)]
                name = self._name(f"{prefix}{number:06d}")
                write_wav(self._path(trainer) / name, waveform, rate, self.sample_format)
                seconds = round(waveform.shape[-1] / rate, 4)
                table.writerow({"index": number, "text": text, "file": name, "seconds": seconds})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the tables."""
        trainer.strategy.barrier("AudioWriter.end")
        folder = self._path(trainer)
        if not trainer.is_global_zero:
            return
        parts = sorted(folder.glob("prompts.*.csv"))
        # Samplers may give a row to two processes, to make their numbers equal.
        rows = {row["file"]: row for part in parts for row in _read_rows(part)[0]}
        write_rows(folder / "prompts.csv", [rows[file] for file in sorted(rows, key=_natural)], self.columns)
        for part in parts:
            part.unlink()

    def _indices(
        self, trainer: Trainer, prediction: Mapping[str, Any], batch_indices: Sequence[int] | None, size: int
    ) -> list[int]:
        """Numbers of sounds, as the module gives them, else those of the data set, else counted on all processes."""
        if prediction.get("index") is not None:
            return [int(number) for number in prediction["index"]]
        if batch_indices is not None and len(batch_indices) == size:
            return [int(number) for number in batch_indices]
        first, self._unnumbered = self._unnumbered, self._unnumbered + size
        return [(first + place) * trainer.world_size + trainer.global_rank for place in range(size)]

    def _name(self, stem: str) -> str:
        self._counts[stem] += 1
        count = self._counts[stem]
        return f"{stem}.wav" if count == 1 else f"{stem}-{count}.wav"

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder

    def _part(self, trainer: Trainer) -> Path:
        return self._path(trainer) / f"prompts.{trainer.global_rank}.csv"


def _read_rows(path: Path) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Rows and columns of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader), tuple(reader.fieldnames or ())


def _natural(name: str) -> list[int | str]:
    """Sorts `0-9` before `0-10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _num_loaders(trainer: Trainer) -> int:
    counts = trainer.num_predict_batches
    return len(counts) if isinstance(counts, list) else 1
