"""Embeddings of music that need no trained weights."""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import torch
import torchaudio.functional as audio
from torch import Tensor, nn

SAMPLE_RATE, N_FFT, HOP = 16_000, 1024, 160
FLOOR = 0.1
"""Added to mel energies, so that inaudible noise does not count."""


class LogMel(nn.Module):
    """Mean and standard deviation of the logarithm of 64 mel bands, in windows of about a second.

    Silence after a clip's end has no influence, whatever the length of the batch. A clip that is shorter than a window
    gives one row, of the frames it has.

    Args:
        sample_rate: of the waveforms, in Hz; they are resampled to 16 kHz.
        frames: frames of 10 ms in a window.
        hop: frames from one window to the next.

    Raises:
        ValueError: if an argument is not positive.
    """

    fbank: Tensor
    window: Tensor

    def __init__(self, sample_rate: int = SAMPLE_RATE, frames: int = 96, hop: int = 48) -> None:
        super().__init__()
        if min(sample_rate, frames, hop) < 1:
            raise ValueError(
                f"sample_rate={sample_rate}, frames={frames}, hop={hop}: all three must be positive; "
                "the usual windows are frames=96, hop=48"
            )
        self.sample_rate, self.frames, self.hop = sample_rate, frames, hop
        # Not persistent: a checkpoint of a module with metrics would hold them.
        fbank = audio.melscale_fbanks(N_FFT // 2 + 1, 60.0, 7800.0, 64, SAMPLE_RATE)
        self.register_buffer("fbank", fbank, persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    @property
    def num_features(self) -> int:
        """Width of a row."""
        return 2 * self.fbank.shape[1]

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed windows.

        Args:
            waveforms: (B,C,T) or (B,T) float in [-1, 1]; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.

        Returns:
            (N,128) float32, the windows of all clips, clip by clip.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            mono = (waveforms.mean(1) if waveforms.ndim == 3 else waveforms).float()
            if lengths is None:
                lengths = torch.full((len(mono),), mono.shape[-1], device=mono.device)
            mono = mono.masked_fill(torch.arange(mono.shape[-1], device=mono.device) >= lengths[:, None], 0.0)
            if self.sample_rate != SAMPLE_RATE:
                mono = audio.resample(mono, self.sample_rate, SAMPLE_RATE)
                lengths = -(-lengths * SAMPLE_RATE // self.sample_rate)
            spectrum = torch.stft(mono, N_FFT, HOP, window=self.window, pad_mode="constant", return_complex=True)
            mel = (spectrum.abs().square().mT @ self.fbank + FLOOR).log()
            return self._windows(mel, lengths // HOP + 1)

    def _windows(self, mel: Tensor, counts: Tensor) -> Tensor:
        """Rows of the windows that lie within the clips, from (B,F,M) frames of which `counts` (B,) are valid."""
        if mel.shape[1] < self.frames:
            mel = nn.functional.pad(mel, (0, 0, 0, self.frames - mel.shape[1]))
        windows = mel.unfold(1, self.frames, self.hop)  # (B,W,M,frames)
        places = torch.arange(mel.shape[1], device=mel.device).unfold(0, self.frames, self.hop)
        valid = (places < counts[:, None, None])[:, :, None]
        number = valid.sum(-1).clamp(min=1)
        mean = (windows * valid).sum(-1) / number
        variance = ((windows - mean[..., None]).square() * valid).sum(-1) / number
        kept = places[:, -1] < counts[:, None]
        kept[:, 0] = True
        return torch.cat([mean, variance.sqrt()], -1)[kept]
