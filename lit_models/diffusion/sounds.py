"""Generated sound as files, pictures and numbers, and models from wherever training left them."""

import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lit_models.diffusion.pipeline import TextToWaveformPipeline

Waveform: TypeAlias = NDArray[np.float32]
"""(C, L) in [-1, 1]."""

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
"""Formats that are written, by the end of the file name."""
PIPELINE = "TextToWaveformPipeline"
FLOOR = -80.0
"""Level in dB, relative to the loudest, below which pictures are black."""
PIECE = 4096
"""Samples that are written at once; libsndfile crashes on long pieces of Ogg Vorbis."""
WINDOW = 0.032
"""Seconds of sound behind each column of a picture, roughly."""


# -- numbers -----------------------------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """What is heard in a clip.

    Args:
        seconds: length.
        pitch: median in Hz, meant for a single voice; None without any.
        pitched: share of the time that has a pitch.
        level: root mean square in dB, 0 for values of 1; -inf for silence.
        peak: largest absolute value in dB.
    """

    seconds: float
    pitch: float | None
    pitched: float
    level: float
    peak: float

    def __str__(self) -> str:
        pitch = "no pitch" if self.pitch is None else f"pitch {self.pitch:.1f} Hz in {100 * self.pitched:.0f} %"
        level = "silent" if self.level == -math.inf else f"level {self.level:.1f} dB, peak {self.peak:.1f} dB"
        return f"{self.seconds:.2f} s, {pitch}, {level}"


def measure(audio: Waveform, sample_rate: int) -> Measures:
    """Measure a clip.

    Args:
        audio: (C, L) float32.
        sample_rate: in Hz.

    Returns:
        Its length, pitch and level.
    """
    import torch

    from lit_models.diffusion.metrics.music import estimate_pitch

    sound = torch.from_numpy(audio)
    pitch, pitched = None, 0.0
    lowest, highest = 40.0, min(2000.0, sample_rate / 4)
    if lowest < highest:
        found = estimate_pitch(sound[None], sample_rate, lowest, highest)[0]
        voiced = found[found > 0]
        if len(voiced):
            pitch, pitched = float(voiced.median()), len(voiced) / len(found)

    def decibels(value: float) -> float:
        return 20 * math.log10(value) if value > 0 else -math.inf

    level, peak = decibels(float(sound.square().mean().sqrt())), decibels(float(sound.abs().max()))
    return Measures(sound.shape[1] / sample_rate, pitch, pitched, level, peak)


# -- files -------------------------------------------------------------------------------------------------------------


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and move it there, so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        allowed = os.umask(0)
        os.umask(allowed)
        temporary.chmod(0o666 & ~allowed)  # temporary files are private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sound(path: str | Path, audio: Waveform, sample_rate: int) -> None:
    """Write a sound file with 16 bits per sample; a file that is there is replaced at once.

    Args:
        path: file name ending in .wav, .flac or .ogg.
        audio: (C, L) float32; values beyond [-1, 1] are clipped.
        sample_rate: in Hz.

    Raises:
        ValueError: if the name ends in something else.
    """
    import soundfile

    path = Path(path)
    kind = sound_format(path)

    def write(to: Path) -> None:
        with soundfile.SoundFile(to, "w", sample_rate, len(audio), format=kind) as file:
            for start in range(0, audio.shape[1], PIECE):
                file.write(audio[:, start : start + PIECE].clip(-1, 1).T)

    _replace(path, write)


def sound_format(path: str | Path) -> str:
    """Format of a sound file by its name.

    Args:
        path: file name.

    Raises:
        ValueError: if it is none that is written.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"out: {str(path)!r} is no sound file; end its name in one of {', '.join(FORMATS)}")
    return kind


def picture_format(path: str | Path) -> str:
    """Format of a picture by its name.

    Args:
        path: file name.

    Raises:
        ValueError: if it is none that is drawn.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kind = Path(path).suffix[1:].lower()
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"picture: {str(path)!r} is no picture; end its name in .png")
    return kind


def write_picture(path: str | Path, audios: Sequence[Waveform], sample_rate: int, titles: Sequence[str]) -> None:
    """Draw how strong each frequency is over time, one clip below the other; channels are averaged.

    Args:
        path: file name of the picture, for example ending in .png.
        audios: clips, each (C, L) float32.
        sample_rate: in Hz.
        titles: a line above each clip.

    Raises:
        ValueError: if the name of a picture cannot end so.
    """
    import torch
    from matplotlib.figure import Figure

    path, kind = Path(path), picture_format(path)
    figure = Figure(figsize=(9, 0.5 + 2.7 * len(audios)), layout="constrained")
    size = 1 << max(4, round(math.log2(WINDOW * sample_rate)))
    rows = figure.subplots(len(audios), squeeze=False)[:, 0]
    for axes, audio, title in zip(rows, audios, titles, strict=True):
        sound = torch.from_numpy(audio).mean(0)
        window = torch.hann_window(size)
        spectrum = torch.stft(sound, size, size // 4, window=window, pad_mode="constant", return_complex=True)
        decibels = 20 * spectrum.abs().clamp(min=1e-10).log10()
        loudest = float(decibels.max())
        picture = axes.imshow(
            decibels.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=loudest + FLOOR,
            vmax=loudest,
            extent=(0, len(sound) / sample_rate, 0, sample_rate / 2),
        )
        axes.set(ylabel="frequency [Hz]")
        axes.set_title(title, fontsize="medium", parse_math=False)
        figure.colorbar(picture, label="dB")
    rows[-1].set_xlabel("time [s]")
    _replace(path, lambda to: figure.savefig(to, dpi=120, format=kind))


def read_sound(path: str | Path, sample_rate: int, channels: int) -> Waveform:
    """Read a sound file as a model wants it.

    Args:
        path: wav, flac, ogg or mp3.
        sample_rate: of the model in Hz; other rates are converted.
        channels: of the model; mono is repeated, and more channels are averaged to mono.

    Returns:
        (C, L) float32.

    Raises:
        ValueError: if the file cannot be read, or has several channels but not those of the model.
    """
    import lit_models._compat  # noqa: F401  (must run before torchaudio is imported)

    # isort: split
    import soundfile
    import torch
    from torchaudio.functional import resample

    if not Path(path).is_file():
        raise ValueError(f"init: there is no file {str(path)!r}; give a sound file")
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"init: {str(path)!r} is no sound file; give wav, flac, ogg or mp3") from error
    sound = torch.from_numpy(values.T.copy())
    if len(sound) != channels:
        if len(sound) > 1 and channels > 1:
            raise ValueError(
                f"init: {str(path)!r} has {len(sound)} channels but the model makes {channels}; mix it to mono first"
            )
        sound = sound.mean(0, keepdim=True).expand(channels, -1)
    converted: Waveform = resample(sound, rate, sample_rate).contiguous().numpy()
    return converted


# -- models ------------------------------------------------------------------------------------------------------------


def load_pipeline(path: str | Path) -> "TextToWaveformPipeline":
    """Load a model from wherever training left it.

    Args:
        path: folder of an exported pipeline; or a Lightning checkpoint, a file or a folder of shards.

    Returns:
        The pipeline on the CPU, with averaged weights where there are any.

    Raises:
        ValueError: if there is no such thing, or it makes no waveforms; the message says what it is.
    """
    place = Path(path)
    index = place / "model_index.json"
    if not place.exists():
        raise ValueError(f"model: there is no {str(path)!r}; give the folder of an exported pipeline, or a checkpoint")
    if place.is_file() or (place / ".metadata").is_file():
        return _from_checkpoint(place)
    if not index.is_file():
        inside = next(iter(sorted(place.glob("*/model_index.json"))), None)
        hint = "give one with a model_index.json, or a checkpoint"
        if inside is not None:
            hint = f"did you mean {str(inside.parent)!r}?"
        raise ValueError(f"model: the folder {str(path)!r} is no exported pipeline; {hint}")
    name = json.loads(index.read_text()).get("_class_name")
    if name != PIPELINE:
        raise ValueError(f"model: {str(path)!r} is a {name}, not a {PIPELINE}; give a waveform model")

    from lit_models.diffusion.pipeline import TextToWaveformPipeline

    pipeline: TextToWaveformPipeline = TextToWaveformPipeline.from_pretrained(place)
    return pipeline


def _from_checkpoint(place: Path) -> "TextToWaveformPipeline":
    import torch

    from lit_models.base import LitBase

    if place.is_file():
        try:
            saved = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"model: {str(place)!r} is no checkpoint; give one that training wrote") from error
        if not isinstance(saved, dict) or "_class_path" not in saved.get(LitBase.CHECKPOINT_HYPER_PARAMS_KEY, {}):
            raise ValueError(f"model: {str(place)!r} is no checkpoint of this collection; give one that it wrote")
    module: Any = LitBase.load_from_checkpoint(place, map_location="cpu")
    if not hasattr(module, "pipeline"):
        raise ValueError(f"model: {str(place)!r} is a {type(module).__name__}, which makes no waveforms")
    pipeline: TextToWaveformPipeline = module.pipeline()
    return pipeline
