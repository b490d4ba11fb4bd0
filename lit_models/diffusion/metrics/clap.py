"""Embeddings of sounds and of texts by a CLAP model, in one space.

Source: Wu et al., Large-scale contrastive language-audio pretraining (arXiv 2211.06687), as in transformers.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from collections.abc import Sequence

import torch
import torchaudio.functional as audio
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

from lit_models.diffusion.metrics.tagger import FixedPrecision

FLOOR = 1e-10
"""Least energy of a mel band."""


class ClapEmbedding(FixedPrecision):
    """Embeds windows of sound, whole clips, and texts, all of length 1.

    Spectra are computed as the model's feature extractor does, but in torch and without its random crops: clips longer
    than the model's ten seconds are cut into windows, shorter ones are repeated until they fill it. Everything runs in
    float32.

    Args:
        name: folder or hub id of a `ClapModel` with feature extractor and tokenizer, for example
            `laion/larger_clap_music`.
        sample_rate: of the waveforms, in Hz; None takes the model's (48 kHz).
        hop_seconds: from one window to the next; None takes half a window.
        batch_size: windows or texts that the model sees at a time.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: if a number is not positive, or the model cannot be loaded.

    Example::

        clap = ClapEmbedding("laion/larger_clap_music", sample_rate=16_000)
        score = TextAudioSimilarity()
        score.update(clap.clips(waveforms), clap.texts(prompts))
    """

    window: Tensor
    fbank: Tensor

    def __init__(
        self,
        name: str,
        sample_rate: int | None = None,
        hop_seconds: float | None = None,
        batch_size: int = 16,
        revision: str = "main",
    ) -> None:
        super().__init__()
        for key, value in (("sample_rate", sample_rate), ("hop_seconds", hop_seconds), ("batch_size", batch_size)):
            if value is not None and not value > 0:
                raise ValueError(f"{key}={value} must be positive")
        try:
            extractor = AutoFeatureExtractor.from_pretrained(name, revision=revision)
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            model = ClapModel.from_pretrained(name, revision=revision, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clap: {name!r} could not be loaded ({str(error).splitlines()[0]}); give a folder or hub id of a CLAP "
                "model with its feature extractor and tokenizer"
            ) from error
        self.model = model.requires_grad_(False).eval()
        self.rate = int(extractor.sampling_rate)
        self.sample_rate = sample_rate or self.rate
        self.samples = int(extractor.nb_max_samples)
        self.hop = max(round(hop_seconds * self.rate), 1) if hop_seconds else self.samples // 2
        self.batch_size = batch_size
        self.n_fft, self.hop_length = int(extractor.fft_window_size), int(extractor.hop_length)
        self.padding = str(extractor.padding)
        fused = extractor.truncation == "fusion"
        self.copies = 4 if fused else 1
        fbank = torch.as_tensor(extractor.mel_filters if fused else extractor.mel_filters_slaney, dtype=torch.float32)
        window = torch.hann_window(self.n_fft, dtype=torch.float32)
        self.register_buffer("fbank", fbank, persistent=False)
        self.register_buffer("window", window, persistent=False)

    @property
    def num_features(self) -> int:
        """D, width of a row."""
        return int(self.model.config.projection_dim)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed windows.

        Args:
            waveforms: (B,C,T) or (B,T) float; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.

        Returns:
            (N,D) float32, the windows that lie within the clips, clip by clip; one for a clip shorter than a window.
        """
        return self.windows(waveforms, lengths)[0]

    def clips(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips: the directions of the means of their windows.

        Args:
            waveforms: (B,C,T) or (B,T) float; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.

        Returns:
            (B,D) float32.
        """
        rows, owners = self.windows(waveforms, lengths)
        return F.normalize(rows.new_zeros(len(waveforms), rows.shape[-1]).index_add(0, owners, rows), dim=-1)

    @torch.no_grad()
    def windows(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed windows, and tell whose they are.

        Args:
            waveforms: (B,C,T) or (B,T) float; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.

        Returns:
            Rows (N,D) float32 as of `forward`, and the clip (N,) int64 of each.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            mono = waveforms.float().mean(1) if waveforms.ndim == 3 else waveforms.float()
            if lengths is None:
                lengths = torch.full((len(mono),), mono.shape[-1], device=mono.device)
            lengths = lengths.clamp(min=1)
            mono = torch.where(torch.arange(mono.shape[-1], device=mono.device) < lengths[:, None], mono, 0.0)
            if self.sample_rate != self.rate:
                mono = audio.resample(mono, self.sample_rate, self.rate)
                lengths = (-(-lengths * self.rate // self.sample_rate)).clamp(max=mono.shape[-1])
            counts = ((lengths - self.samples).clamp(min=0) // self.hop) + 1
            owners = torch.repeat_interleave(torch.arange(len(mono), device=mono.device), counts)
            number = torch.arange(len(owners), device=mono.device) - (counts.cumsum(0) - counts)[owners]
            remaining = (lengths[owners] - number * self.hop).clamp(max=self.samples)
            rows = [mono.new_zeros(0, self.num_features)]
            for start in range(0, len(owners), self.batch_size):
                part = slice(start, start + self.batch_size)
                place = self._places(remaining[part])
                sound = mono[owners[part, None], (number[part, None] * self.hop + place).clamp(min=0)]
                rows.append(self._embed(torch.where(place >= 0, sound, 0.0)))
            return torch.cat(rows), owners

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: B of them; what the model has no positions for is cut off.

        Returns:
            (B,D) float32.
        """
        device = self.window.device
        positions = int(self.model.config.text_config.max_position_embeddings) - 2  # RoBERTa counts from 2
        most = min(int(self.tokenizer.model_max_length), positions)
        rows = [torch.zeros(0, self.num_features, dtype=torch.float32, device=device)]
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(texts), self.batch_size):
                part = list(texts[start : start + self.batch_size])
                tokens = self.tokenizer(part, padding=True, truncation=True, max_length=most, return_tensors="pt")
                ids, mask = tokens["input_ids"].long(), tokens["attention_mask"]
                if ids.shape[1] == 0:
                    ids = torch.full((len(part), 1), self.tokenizer.pad_token_id or 0)
                    mask = torch.ones_like(ids)
                mask[:, 0] = 1  # a text without tokens reads as padding, not as nothing at all
                rows.append(self.model.get_text_features(ids.to(device), mask.to(device)).pooler_output)
        return torch.cat(rows)

    def _places(self, lengths: Tensor) -> Tensor:
        """(N,samples) int64, which sample of a window of so many is heard when; -1 for silence."""
        places = torch.arange(self.samples, device=lengths.device).expand(len(lengths), -1)
        ends = lengths
        if self.padding == "repeatpad":  # whole repetitions only
            ends = self.samples // lengths * lengths
        elif self.padding == "repeat":
            ends = torch.full_like(lengths, self.samples)
        return torch.where(places < ends[:, None], places % lengths[:, None], -1)

    def _embed(self, windows: Tensor) -> Tensor:
        """(n,D) of (n,samples)."""
        spectrum = torch.stft(windows, self.n_fft, self.hop_length, window=self.window, return_complex=True)
        mel = spectrum.abs().square().mT @ self.fbank
        decibels = 10 * mel.clamp(min=FLOOR).log10()
        longer = torch.zeros(len(windows), 1, dtype=torch.bool, device=windows.device)
        features = decibels[:, None].expand(-1, self.copies, -1, -1)
        return self.model.get_audio_features(features, is_longer=longer).pooler_output
