"""Whether generated music has the key, the tempo and the melody that were asked for."""

import re
from typing import Any

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import torch
import torchaudio.functional as audio
from torch import Tensor
from torch.nn import functional as F

from lit_models.diffusion.metrics.scores import _Sums

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MODES = {"major": 0, "ionian": 0, "minor": 12, "aeolian": 12} | dict.fromkeys(
    ("dorian", "phrygian", "lydian", "mixolydian", "locrian")
)
"""Mode -> number of the key on C, None without a profile."""
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.6, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
"""How well pitch classes fit a key, from its tonic up (Krumhansl and Kessler, 1982)."""
CHROMA_FFT, CHROMA_HOP = 4096, 1024
TEMPI = (30.0, 300.0)
"""Slowest and fastest tempo that is looked for, in beats per minute."""
HOPS_PER_SECOND = 100
DIP = 0.1
"""Largest aperiodicity of a frame with a pitch."""


def key_index(name: str) -> int:
    """Number of a key: 0 to 11 for C major to B major, 12 to 23 for C minor to B minor.

    Args:
        name: tonic with any sharps (#, ♯) or flats (b, ♭), then the mode, for example `Bb minor`.

    Returns:
        The number, or -1 for the other church modes, for which there are no profiles.

    Raises:
        ValueError: if it is no such name.
    """
    match = re.fullmatch(r"([A-Ga-g])([#♯b♭]*) +(\w+)", name.strip())
    if match is None or match[3].lower() not in MODES:
        raise ValueError(f"key {name!r} is unknown; write the tonic and the mode, for example `F# minor` or `D dorian`")
    tonic = PITCH_CLASSES.index(match[1].upper()) + sum(1 if sign in "#♯" else -1 for sign in match[2])
    offset = MODES[match[3].lower()]
    return -1 if offset is None else tonic % 12 + offset


def key_name(index: int) -> str:
    """Name of a key, with sharps; the inverse of `key_index`."""
    return f"{PITCH_CLASSES[index % 12]} {('major', 'minor')[index // 12]}"


def key_correlations(histograms: Tensor) -> Tensor:
    """Pearson correlation of pitch classes with the profiles of all keys.

    Args:
        histograms: (B,12) float, weights of the pitch classes from C.

    Returns:
        (B,24) float64 in the order of `key_index`; NaN where all weights are equal, for example in silence.
    """
    profiles = torch.tensor([MAJOR, MINOR], dtype=torch.float64, device=histograms.device)
    turns = (torch.arange(12)[None] - torch.arange(12)[:, None]) % 12  # (tonic, pitch class) -> step of the scale
    profiles = profiles[:, turns.to(profiles.device)].flatten(0, 1)
    rows = histograms.double()
    rows, profiles = rows - rows.mean(-1, keepdim=True), profiles - profiles.mean(-1, keepdim=True)
    return (rows @ profiles.mT) / (rows.norm(dim=-1, keepdim=True) * profiles.norm(dim=-1))


def chroma_filters(sample_rate: int, n_fft: int = CHROMA_FFT) -> Tensor:
    """Weights (12,n_fft/2+1) float64 of the bins of a power spectrum in pitch classes from C, for A4 = 440 Hz.

    Each bin is spread over its neighbouring classes by a Gaussian as wide as the bin, and at least a semitone; bins
    far from the octave above middle C count less (Ellis, 2007, as in librosa).
    """
    frequency = torch.arange(1, n_fft, dtype=torch.float64) * sample_rate / n_fft
    semitones = 12 * (frequency / 27.5).log2()  # above A0
    semitones = torch.cat([semitones[:1] - 18, semitones])  # the constant has no pitch: far below the first bin
    width = torch.cat([semitones.diff().clamp(min=1.0), semitones.new_ones(1)])
    classes = (torch.arange(12) - 9) % 12  # C is three semitones above A
    distance = (semitones - classes[:, None] + 6) % 12 - 6
    weights = F.normalize((-2 * (distance / width).square()).exp(), dim=0)
    weights *= (-0.5 * ((semitones / 12 - 5) / 2).square()).exp()
    return weights[:, : n_fft // 2 + 1]


def chroma(waveforms: Tensor, sample_rate: int) -> Tensor:
    """Strength of the pitch classes, the strongest of each frame being 1, averaged over frames.

    Args:
        waveforms: (B,C,T) or (B,T) float; channels are averaged.
        sample_rate: in Hz.

    Returns:
        (B,12) float32 from C; zeros for silence.
    """
    mono = _mono(waveforms)
    window = torch.hann_window(CHROMA_FFT, device=mono.device)
    spectrum = torch.stft(mono, CHROMA_FFT, CHROMA_HOP, window=window, pad_mode="constant", return_complex=True)
    frames = chroma_filters(sample_rate).to(mono) @ spectrum.abs().square()
    largest = frames.amax(1, keepdim=True)
    return (frames / largest.clamp(min=torch.finfo(frames.dtype).tiny)).mean(-1)


def estimate_tempo(waveforms: Tensor, sample_rate: int) -> Tensor:
    """Tempo from the periodicity of note onsets, with a preference for moderate tempi.

    Onsets are rises of mel energies; the period is the peak of their autocorrelation, weighted by a normal
    distribution of its octaves around 120 beats per minute (Ellis, 2007).

    Args:
        waveforms: (B,C,T) or (B,T) float; channels are averaged.
        sample_rate: in Hz.

    Returns:
        (B,) float32, beats per minute; NaN for clips without onsets, or shorter than two beats of the fastest tempo.
    """
    mono = _mono(waveforms)
    n_fft, hop = 1 << max(round(sample_rate * 0.09).bit_length() - 1, 4), max(sample_rate // HOPS_PER_SECOND, 1)
    window = torch.hann_window(n_fft, device=mono.device)
    spectrum = torch.stft(mono, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    bands = min(128, n_fft // 16)
    fbank = audio.melscale_fbanks(n_fft // 2 + 1, 30.0, sample_rate / 2, bands, sample_rate).to(mono)
    power = spectrum.abs().square().mT @ fbank  # (B,F,bands)
    loudest = power.amax((1, 2), keepdim=True)
    decibels = 10 * power.clamp(min=1e-10).maximum(1e-8 * loudest).log10()
    onsets = decibels.diff(dim=1).clamp(min=0).mean(-1)
    onsets = onsets - onsets.mean(-1, keepdim=True)
    rate = sample_rate / hop
    first, last = round(60 * rate / TEMPI[1]), round(60 * rate / TEMPI[0])
    last = min(last, onsets.shape[-1] - 2)
    if last <= first:
        return mono.new_full((len(mono),), torch.nan)
    transform = torch.fft.rfft(onsets, 2 * onsets.shape[-1])
    correlation = torch.fft.irfft(transform.abs().square())[:, : last + 2]
    lags = torch.arange(1, last + 2, device=mono.device)
    octaves = (60 * rate / lags / 120).log2()
    score = correlation[:, 1:].clamp(min=0) * (-0.5 * octaves.square()).exp()
    score[:, : first - 1] = 0
    place = score[:, :-1].argmax(-1) + 1
    tempo = 60 * rate / (place + _vertex(correlation, place))
    return tempo.masked_fill(correlation[:, 0] <= 1e-6, torch.nan)


def estimate_pitch(waveforms: Tensor, sample_rate: int, lowest: float = 40.0, highest: float = 2000.0) -> Tensor:
    """Pitch of a single voice by the YIN method (de Cheveigné and Kawahara, 2002), a hundred times a second.

    Args:
        waveforms: (B,C,T) or (B,T) float; channels are averaged.
        sample_rate: in Hz.
        lowest: in Hz; two periods must fit a frame, so low pitches blur fast notes.
        highest: in Hz, below a quarter of the sample rate.

    Returns:
        (B,F) float32 in Hz, frame f centred at f/100 s; 0 where nothing is periodic.

    Raises:
        ValueError: if the limits are no range that the sample rate can carry.
    """
    if not 0 < lowest < highest <= sample_rate / 4:
        raise ValueError(
            f"lowest={lowest}, highest={highest}: pitches must be looked for between 0 and a quarter of the sample "
            f"rate, {sample_rate / 4:g} Hz"
        )
    longest, shortest = int(sample_rate / lowest) + 2, max(int(sample_rate / highest), 2)
    mono = F.pad(_mono(waveforms), (longest, longest))
    frames = mono.unfold(-1, 2 * longest, max(sample_rate // HOPS_PER_SECOND, 1))
    size = 3 * longest
    products = torch.fft.rfft(frames[..., :longest], size).conj() * torch.fft.rfft(frames, size)
    correlation = torch.fft.irfft(products, size)[..., :longest]
    energy = F.pad(frames.square().cumsum(-1), (1, 0))
    shifted = energy[..., longest : 2 * longest] - energy[..., :longest]
    difference = (shifted[..., :1] + shifted - 2 * correlation).clamp(min=0)
    lags = torch.arange(longest, device=mono.device)
    aperiodicity = difference * lags / difference.cumsum(-1).clamp(min=torch.finfo(mono.dtype).tiny)
    inner = aperiodicity[..., 1:-1]
    dips = (inner <= aperiodicity[..., 2:]) & (inner < aperiodicity[..., :-2]) & (inner < DIP)
    dips[..., : shortest - 1] = False
    place = dips.byte().argmax(-1) + 1  # the first dip: later ones are multiples of the period
    audible = shifted[..., 0] > 1e-8 * longest
    pitch = sample_rate / (place + _vertex(difference, place))
    return pitch * (dips.any(-1) & audible)


def _mono(waveforms: Tensor) -> Tensor:
    return (waveforms.mean(1) if waveforms.ndim == 3 else waveforms).float()


def _vertex(values: Tensor, place: Tensor) -> Tensor:
    """How far, in [-0.5, 0.5], the extremum of a parabola through three neighbouring values lies from the middle."""
    before, middle, after = (values.gather(-1, place[..., None] + step)[..., 0] for step in (-1, 0, 1))
    bend = before - 2 * middle + after
    shift = 0.5 * (before - after) / torch.where(bend == 0, torch.ones_like(bend), bend)
    return shift.clamp(-0.5, 0.5)


class KeyAgreement(_Sums):
    """How well the keys of generated clips agree with those asked for.

    Args:
        sample_rate: in Hz.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = True
    hits: Tensor
    weights: Tensor
    count: Tensor

    def __init__(self, sample_rate: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"hits": (), "weights": (), "count": ()}, **kwargs)
        self.sample_rate = sample_rate

    def update(self, waveforms: Tensor, keys: Tensor) -> None:
        """Add clips.

        Args:
            waveforms: (B,C,T) or (B,T) float.
            keys: (B,) int64 as of `key_index`; negative where the prompt names none.
        """
        correlations = key_correlations(chroma(waveforms, self.sample_rate))
        found, named = correlations.argmax(-1), keys >= 0
        named_and_heard = named & ~correlations.isnan().any(-1)
        same_mode, interval = found // 12 == keys // 12, (found - keys) % 12
        exact, fifth = same_mode & (interval == 0), same_mode & (interval == 7)
        # The relative minor lies nine semitones above its major key.
        relative = ~same_mode & (interval == torch.where(keys < 12, 9, 3))
        parallel = ~same_mode & (interval == 0)
        weights = exact + 0.5 * fifth + 0.3 * relative + 0.2 * parallel
        self.hits += (exact & named_and_heard).sum()
        self.weights += (weights * named_and_heard).sum()
        self.count += named.sum()

    def compute(self) -> dict[str, Tensor]:
        """Each () float32, NaN without named keys.

        Returns:
            `accuracy`, and `weighted`, which gives half a point for the fifth above, 0.3 for the relative key and 0.2
            for the parallel one (MIREX). Silence has no key and counts as wrong.
        """
        return {"accuracy": (self.hits / self.count).float(), "weighted": (self.weights / self.count).float()}


class TempoAgreement(_Sums):
    """How often the tempo of generated clips is the one asked for.

    Args:
        sample_rate: in Hz.
        tolerance: relative deviation that is still right.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if the tolerance is not between 0 and 1/3, beyond which tempi an octave apart overlap.
    """

    higher_is_better = True
    hits: Tensor
    count: Tensor

    def __init__(self, sample_rate: int, tolerance: float = 0.04, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"hits": (2,), "count": ()}, **kwargs)
        if not 0 < tolerance < 1 / 3:
            raise ValueError(f"tolerance={tolerance} must lie between 0 and 1/3; 0.04 is usual")
        self.sample_rate, self.tolerance = sample_rate, tolerance

    def update(self, waveforms: Tensor, tempi: Tensor) -> None:
        """Add clips.

        Args:
            waveforms: (B,C,T) or (B,T) float.
            tempi: (B,) float, beats per minute; 0 where the prompt names none.
        """
        ratio = estimate_tempo(waveforms, self.sample_rate) / tempi
        octaves = torch.tensor([0.5, 1.0, 2.0], device=ratio.device)
        near = (ratio[:, None] / octaves - 1).abs() <= self.tolerance
        named = tempi > 0
        self.hits += torch.stack([(near[:, 1] & named).sum(), (near.any(-1) & named).sum()])
        self.count += named.sum()

    def compute(self) -> dict[str, Tensor]:
        """`accuracy`, and `octave_accuracy`, for which half and double are right too; () float32, NaN without tempi."""
        exact, tolerant = (self.hits / self.count).float()
        return {"accuracy": exact, "octave_accuracy": tolerant}


class PitchAgreement(_Sums):
    """How often the pitch of a single voice is that of the score, within a quarter tone.

    Args:
        sample_rate: in Hz.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = True
    hits: Tensor
    count: Tensor

    def __init__(self, sample_rate: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"hits": (2,), "count": ()}, **kwargs)
        self.sample_rate = sample_rate

    def update(self, waveforms: Tensor, pitches: Tensor) -> None:
        """Add clips.

        Args:
            waveforms: (B,C,T) or (B,T) float.
            pitches: (B,F) float in Hz, a hundred times a second from the clip's start; 0 in rests.
        """
        found = estimate_pitch(waveforms, self.sample_rate, highest=min(2000.0, self.sample_rate / 4))
        frames = min(found.shape[1], pitches.shape[1])
        found, wanted = found[:, :frames], pitches[:, :frames]
        both = (found > 0) & (wanted > 0)
        semitones = 12 * (torch.where(both, found, 1.0) / torch.where(both, wanted, 1.0)).log2()
        folded = (semitones + 6) % 12 - 6
        near = torch.stack([semitones.abs() <= 0.5, folded.abs() <= 0.5])
        self.hits += (near & both).sum((1, 2))
        self.count += (wanted > 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Shares of the frames with a note, each () float32, NaN without notes.

        Returns:
            `accuracy`, and `chroma_accuracy`, for which octaves are equal.
        """
        exact, folded = (self.hits / self.count).float()
        return {"accuracy": exact, "chroma_accuracy": folded}
