"""Reading of sound files in windows, at any sample rate, without decoding the rest of the file."""

import io
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

import lit_models._compat  # noqa: F401  (must run before torchaudio is imported)

# isort: split
from torchaudio.functional import resample

Samples: TypeAlias = NDArray[np.float32]
"""Sound (channels, samples)."""
ReadSamples: TypeAlias = Callable[[int, int], Samples]
"""Function from the first sample and the number of samples to these samples of a file, at its own rate."""

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
"""File names that are taken for sounds."""

_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99  # defaults of torchaudio.functional.resample
_LARGEST_KERNEL = 2**20  # weights; torchaudio's filter for 44100 -> 16001 Hz would take gigabytes
_PIECE = 2**20  # samples that are resampled together
_EXACT = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # subtypes (FLAC's too) in which seeking alone is exact
_OGG_PAGE = 2**18  # more samples than a page of Ogg Vorbis can hold: 255 packets of 1,024
_MP3_PADDING = 2304  # samples by which the decoder may miss the announced end: two frames
_UNKNOWN = 2**62  # length that libsndfile reports, or more, if the header leaves it open


class AudioError(ValueError):
    """A sound that cannot be used; the message names it and says why."""


def filter_width(source_rate: int, rate: int) -> int:
    """Source samples on either side of an output sample that its value depends on.

    Args:
        source_rate: Hz of the file, divided by the greatest common divisor of both.
        rate: Hz of the output, divided by it as well.

    Returns:
        The number, as `torchaudio.functional.resample` has it by default.
    """
    return math.ceil(_ZERO_CROSSINGS * source_rate / (min(source_rate, rate) * _ROLLOFF))


def resampled_length(samples: int, source_rate: int, rate: int) -> int:
    """Length of a whole sound after resampling.

    Args:
        samples: its length before.
        source_rate: Hz before.
        rate: Hz after.

    Returns:
        samples * rate / source_rate, rounded up.
    """
    return -(-samples * rate // source_rate)


def resample_window(read: ReadSamples, samples: int, source_rate: int, rate: int, first: int, length: int) -> Samples:
    """Read a window of a sound at another sample rate.

    The window equals the same samples of `torchaudio.functional.resample(whole, source_rate, rate)` with its default
    filter (sinc of six zero crossings, Hann window, roll-off 0.99): the source is read with the margin that the filter
    reaches over, from a place at which the filter's phases begin anew.

    Args:
        read: reads the source; it is only asked for samples that exist.
        samples: length of the source.
        source_rate: Hz of the source.
        rate: Hz of the window.
        first: first sample of the window, at `rate`.
        length: samples of the window, at least 1; it must end within the sound.

    Returns:
        The window (channels, length).
    """
    if source_rate == rate:
        return read(first, length)
    divisor = math.gcd(source_rate, rate)
    old, new = source_rate // divisor, rate // divisor
    width = filter_width(old, new)
    if new * (old + 2 * width) > _LARGEST_KERNEL:
        return _resample_directly(read, samples, old, new, first, length)
    # Every `new` outputs advance the source by `old` samples and use the same filters again.
    begin = max(first // new - -(-width // old), 0) * old
    end = ((first + length - 1) // new + 1) * old + width
    segment = _padded(read, samples, begin, end)
    skip = first - begin // old * new
    return resample(torch.from_numpy(segment), old, new)[:, skip : skip + length].numpy()


def _padded(read: ReadSamples, samples: int, begin: int, end: int) -> Samples:
    """Source samples from begin to end, zero where there are none."""
    start, stop = max(begin, 0), min(end, samples)
    return np.pad(read(start, stop - start), ((0, 0), (start - begin, end - stop)))


@lru_cache(maxsize=16)
def _filters(old: int, new: int) -> Samples:
    """Weights (new, 2 width + 1) of the source samples around each of the `new` different places of an output."""
    width = filter_width(old, new)
    base = min(old, new) * _ROLLOFF
    distance = (np.arange(-width, width + 1) - np.arange(new)[:, None] / new) / old * base
    distance = distance.clip(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(distance * np.pi / (2 * _ZERO_CROSSINGS)) ** 2
    return (np.sinc(distance) * window * base / old).astype(np.float32)


def _resample_directly(read: ReadSamples, samples: int, old: int, new: int, first: int, length: int) -> Samples:
    """The same sum as torchaudio's convolution, without the zeros of its filters; for rates with few common divisors.

    torchaudio's filters are as wide as a whole period of `old` samples, of which all but a few have no weight.
    """
    width = filter_width(old, new)
    weights = _filters(old, new)
    place, phase = np.divmod(np.arange(first, first + length) * old, new)
    segment = _padded(read, samples, int(place[0]) - width, int(place[-1]) + width + 1)
    around = np.lib.stride_tricks.sliding_window_view(segment, 2 * width + 1, axis=1)
    window = np.empty((len(segment), length), np.float32)
    for start in range(0, length, 4096):  # the gathered copies stay in the processor's cache
        part = slice(start, start + 4096)
        window[:, part] = np.einsum("cnt,nt->cn", around[:, place[part] - place[0]], weights[phase[part]])
    return window


def mix(sound: Samples, channels: int) -> Samples:
    """Change the number of channels.

    Args:
        sound: (channels of the file, samples).
        channels: wanted; one becomes several equal ones, several become their mean if one is wanted, and of more than
            are wanted the first ones are kept.

    Returns:
        The sound (channels, samples).

    Raises:
        ValueError: if several channels would have to become more.
    """
    present = len(sound)
    if present == channels:
        return sound
    if channels == 1:
        return sound.mean(axis=0, keepdims=True)
    if present == 1:
        return np.repeat(sound, channels, axis=0)
    if present < channels:
        raise ValueError(f"channels: {present} channels cannot become {channels}; ask for 1, or at most {present}")
    return sound[:channels]


class AudioReader:
    """An open sound, of which windows are read at a wanted sample rate and number of channels.

    Every window equals the same part of the whole decoded and resampled sound. Only the window is decoded, and in MP3,
    Vorbis and Opus a second before it, because their decoders need some time to settle after a jump.

    Args:
        source: path of a file that libsndfile reads (WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF, ...), or its bytes.
        sample_rate: Hz of the windows; None keeps that of the file.
        channels: of the windows, see `mix`; None keeps those of the file.
        start: seconds at which the sound begins within the file.
        duration: seconds after which it ends; None goes on to the end of the file.
        name: what errors call it; None takes the path.

    Attributes:
        source_rate: Hz of the file.
        source_channels: channels of the file.
        sample_rate: Hz of the windows.
        num_samples: samples of the sound, at `sample_rate`.

    Raises:
        AudioError: if the sound does not exist, cannot be decoded or is empty.

    Example::

        with AudioReader("song.mp3", sample_rate=16000, channels=1) as sound:
            window = sound.read(sound.num_samples // 2, 16000)  # one second from the middle
    """

    def __init__(
        self,
        source: str | Path | bytes,
        sample_rate: int | None = None,
        channels: int | None = None,
        start: float = 0.0,
        duration: float | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or ("bytes" if isinstance(source, bytes) else str(source))
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise AudioError(f"{self.name}: there is no such file")
        try:
            self._file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            raise AudioError(f"{self.name}: it cannot be read as a sound; {_reason(error)}") from error
        try:
            self.source_rate, self.source_channels = self._file.samplerate, self._file.channels
            self.sample_rate, self.channels = sample_rate or self.source_rate, channels
            if channels is not None and 1 < self.source_channels < channels:
                raise AudioError(f"{self.name}: its {self.source_channels} channels cannot become {channels}")
            subtype = self._file.subtype
            self._exact, self._vorbis, self._mp3 = subtype.startswith(_EXACT), subtype == "VORBIS", "MPEG" in subtype
            self._samples = self._file.frames
            if self._samples >= _UNKNOWN:
                raise AudioError(f"{self.name}: its header does not tell its length; write the file anew")
            self._first, self.num_samples = self._section(start, duration)
        except BaseException:
            self.close()
            raise

    def _section(self, start: float, duration: float | None) -> tuple[int, int]:
        """First sample and number of samples, at the wanted rate."""
        total = resampled_length(self._samples, self.source_rate, self.sample_rate)
        if total == 0:
            raise AudioError(f"{self.name}: it is empty")
        if not 0 <= start < math.inf or (duration is not None and not 0 < duration < math.inf):
            raise AudioError(f"{self.name}: a part from {start} s with a length of {duration} s does not exist")
        first = round(start * self.sample_rate)
        last = total if duration is None else min(total, first + round(duration * self.sample_rate))
        if first >= last:
            seconds = self._samples / self.source_rate
            raise AudioError(f"{self.name}: the part from {start:g} s on is empty; the file has {seconds:.2f} s")
        return first, last - first

    def read(self, first: int = 0, length: int | None = None) -> Samples:
        """Read a window.

        Args:
            first: its first sample, at `sample_rate`, from the beginning of the sound.
            length: its samples; None, or more than there are, reads to the end of the sound.

        Returns:
            Float32 (channels, samples). Integer formats lie in [-1,1]; float formats, lossy ones and resampling may
            go beyond.

        Raises:
            AudioError: if the file is damaged, or holds samples that are not finite.
            ValueError: if the window begins outside the sound.
        """
        if not 0 <= first < self.num_samples:
            raise ValueError(f"{self.name}: sample {first} is not one of its {self.num_samples}")
        stop = self.num_samples if length is None else min(self.num_samples, first + length)
        sizes = (self._samples, self.source_rate, self.sample_rate)
        pieces = [
            resample_window(self._decode, *sizes, self._first + begin, min(_PIECE, stop - begin))
            for begin in range(first, stop, _PIECE)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _decode(self, first: int, count: int) -> Samples:
        """Samples at the rate of the file, mixed."""
        begin = first
        if not self._exact:
            begin = first - self.source_rate
            if self._vorbis:  # libsndfile misplaces jumps into the last page
                begin = min(begin, self._samples - _OGG_PAGE - self.source_rate)
            begin = max(begin, 0)
        try:
            self._file.seek(begin)
            # In one call: libsndfile loses samples of Opus between two calls near the end.
            sound = self._file.read(first - begin + count, dtype="float32", always_2d=True)
        except (RuntimeError, OSError) as error:
            raise AudioError(f"{self.name}: it is damaged; {_reason(error)}") from error
        missing = first - begin + count - len(sound)
        if missing > (_MP3_PADDING if self._mp3 else 0):
            found, promised = ((begin + len(sound)) / self.source_rate, self._samples / self.source_rate)
            raise AudioError(f"{self.name}: it is damaged; it ends after {found:.2f} s instead of {promised:.2f} s")
        if not np.isfinite(sound).all():
            raise AudioError(f"{self.name}: it holds samples that are not finite numbers")
        window = np.zeros((sound.shape[1], count), np.float32)
        kept = sound[first - begin :]
        window[:, : len(kept)] = kept.T
        return window if self.channels is None else mix(window, self.channels)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "AudioReader":
        """The reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def _reason(error: Exception) -> str:
    """What libsndfile says, without the object it says it of."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")
