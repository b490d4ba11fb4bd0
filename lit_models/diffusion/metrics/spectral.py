"""Distance of a reconstruction from its target, in several short-time spectra."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

FLOOR = 1e-8
"""Smallest energy of a bin."""


def magnitudes(waveforms: Tensor, n_fft: int) -> Tensor:
    """(..., T) waveforms to (N,n_fft/2+1,F) magnitudes, Hann window, a quarter of it from frame to frame."""
    window = torch.hann_window(n_fft, dtype=waveforms.dtype, device=waveforms.device)
    flat = waveforms.reshape(-1, waveforms.shape[-1])
    spectrum = torch.stft(flat, n_fft, n_fft // 4, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=FLOOR).sqrt()


def stft_errors(prediction: Tensor, target: Tensor, n_fft: int) -> Tensor:
    """What the distance in one resolution is made of.

    Args:
        prediction: (..., T) float, T > n_fft/2.
        target: (..., T) float.
        n_fft: samples in a frame.

    Returns:
        (4,): sums over all bins of (S - S')², of S², of |ln S - ln S'|, and the number of bins.
    """
    found, wanted = magnitudes(prediction, n_fft), magnitudes(target, n_fft)
    logarithms = (found.log() - wanted.log()).abs().sum()
    bins = wanted.new_tensor(wanted.numel())
    return torch.stack([(found - wanted).square().sum(), wanted.square().sum(), logarithms, bins])


class STFTDistance(Metric):
    """Mean over resolutions of spectral convergence plus mean distance of log-magnitudes (arXiv 1910.11480).

    Spectral convergence is |S - S'| / |S| in the Frobenius norm over all clips together, so loud ones count more. For
    tasks with a target only (inpainting, restoration); a sample has none.

    Args:
        n_ffts: samples in a frame, for each resolution.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if there is no resolution, or one is not a multiple of 4.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, n_ffts: Sequence[int] = (2048, 1024, 512), **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if not n_ffts or any(size < 4 or size % 4 for size in n_ffts):
            raise ValueError(f"n_ffts={list(n_ffts)} must be multiples of 4, at least one; for example 2048, 1024, 512")
        self.n_ffts = tuple(n_ffts)
        self.add_state("sums", torch.zeros(len(self.n_ffts), 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add clips of one length.

        Args:
            prediction: (..., T) float; every channel counts as a clip.
            target: (..., T) float; not symmetric, convergence is relative to it.

        Raises:
            ValueError: if shapes differ, or clips are too short for the largest frame.
        """
        if prediction.shape != target.shape or 2 * target.shape[-1] <= max(self.n_ffts):
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape, with more "
                f"than {max(self.n_ffts) // 2} samples for the largest of n_ffts; choose smaller n_ffts for short clips"
            )
        prediction, target = prediction.double(), target.double()
        self.sums += torch.stack([stft_errors(prediction, target, size) for size in self.n_ffts])

    def compute(self) -> Tensor:
        """() float32: the distance; NaN without clips."""
        error, energy, logarithms, bins = self.sums.unbind(-1)
        return ((error / energy).sqrt() + logarithms / bins).mean().float()
