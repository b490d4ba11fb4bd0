"""A small classifier of sounds: which instrument, which register, or whatever else clips were labelled with.

Its features are fixed, so that a few hundred labelled clips train it in seconds, and it hears through moderate noise,
since generated clips are never as clean as real ones.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torchaudio.functional as audio
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

BANDS, HARMONICS = 32, 8
LOWEST, HIGHEST = 40.0, 8000.0
"""Band of frequencies that are looked at, in Hz; the highest is at most half the sample rate."""
PITCHES = (48.0, 2100.0)
"""Lowest and highest fundamental that is looked for, in Hz."""
STEPS = 24
"""Fundamentals in an octave."""
FINE_STEPS = 9
"""Fundamentals around the best one that are looked at more closely."""
FADING = 0.84
"""Weight of a harmonic relative to the one below, where harmonics are summed (Hermes, 1988)."""
WINDOW_SECONDS, ENVELOPE_SECONDS = 0.128, 0.016
QUIETEST = 1e-5
"""Least share of the energy that is told from silence."""
CHUNK_SAMPLES = 1 << 22
"""Samples whose spectra are held at a time."""
SNR_DB = (5.0, 30.0)
"""Signal-to-noise ratios of noisy copies, in dB."""


class FixedPrecision(nn.Module):
    """A module that goes to other devices, but whose tensors keep their dtype, whatever casts the module around it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPrecision":
        def move(tensor: Tensor) -> Tensor:
            target = fn(tensor.new_empty(0)).device
            return fn(tensor) if target.type == "meta" or tensor.is_meta else tensor.to(target)

        return super()._apply(move, recurse)


class SoundFeatures(FixedPrecision):
    """Fixed features of a clip: energies of bands and of harmonics, pitch, and the shape of its loudness.

    Per clip of any level:

    - of 32 mel bands, the logarithm of the share of the energy, and how much it varies over time,
    - of the pitch of each frame (by summing its harmonics), mean, spread and steps, and the mean logarithm of the share
      of the energy of 8 harmonics and of the rest,
    - of the logarithm of the loudness in steps of 8 ms, and of its change over one, four and eight steps: quantiles,
      mean and spread. They tell plucked from held notes.

    Args:
        sample_rate: of the waveforms, in Hz.

    Raises:
        ValueError: if the sample rate is below 500 Hz.
    """

    fbank: Tensor
    window: Tensor
    places: Tensor
    salience: Tensor
    decay: Tensor
    fine: Tensor
    quantiles: Tensor

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        if sample_rate < 500:
            raise ValueError(f"sample_rate={sample_rate}: sounds are told apart from 500 Hz on; resample the clips")
        self.sample_rate = sample_rate
        self.frame = 1 << round(math.log2(WINDOW_SECONDS * sample_rate))
        self.hop = self.frame // 4
        self.step = max(round(ENVELOPE_SECONDS * sample_rate / 2), 1)
        top = min(HIGHEST, sample_rate / 2)
        bins = self.frame + 1  # frames are padded to twice their length
        fbank = audio.melscale_fbanks(bins, LOWEST, top, BANDS, sample_rate)
        count = int(STEPS * math.log2(min(PITCHES[1], 0.4 * sample_rate) / PITCHES[0])) + 1
        pitches = PITCHES[0] * 2 ** (torch.arange(count, dtype=torch.float64) / STEPS)
        places = pitches[:, None] * torch.arange(1, HARMONICS + 1) * 2 * self.frame / sample_rate
        # Weight of every bin in the sum of a pitch's harmonics, which reach half-way to those of the next pitch.
        reach = (places * (2 ** (0.5 / STEPS) - 1)).clamp(min=1)
        distance = (places[..., None] - torch.arange(bins)).abs() / reach[..., None]
        decay = FADING ** torch.arange(HARMONICS, dtype=torch.float64)
        salience = ((1 - distance).clamp(min=0) * decay[:, None]).sum(1).T
        for name, value in {
            "fbank": fbank,
            "window": torch.hann_window(self.frame),
            "places": places,
            "salience": salience,
            "decay": decay,
            "fine": 2 ** (torch.linspace(-0.5, 0.5, FINE_STEPS, dtype=torch.float64) / STEPS),
            "quantiles": torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]),
        }.items():
            self.register_buffer(name, value.float().contiguous(), persistent=False)

    @property
    def num_features(self) -> int:
        """Width of a row."""
        return 2 * BANDS + HARMONICS + 4 + 4 * (len(self.quantiles) + 2)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Describe clips.

        Args:
            waveforms: (B,C,T) or (B,T) float; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.

        Returns:
            (B,F) float32, finite for finite clips, silent ones included; what lies beyond `lengths` has no influence.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            mono = (waveforms.float().mean(1) if waveforms.ndim == 3 else waveforms.float()).contiguous()
            if lengths is None:
                lengths = torch.full((len(mono),), mono.shape[-1], device=mono.device)
            if not len(mono):
                return mono.new_zeros(0, self.num_features)
            rows = max(CHUNK_SAMPLES // max(mono.shape[-1], self.frame), 1)
            parts = [self._describe(*part) for part in zip(mono.split(rows), lengths.split(rows), strict=True)]
            return torch.cat(parts)

    def _describe(self, mono: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.clamp(min=1)
        valid = torch.arange(mono.shape[-1], device=mono.device) < lengths[:, None]
        mono = torch.where(valid, mono, 0.0)
        level = (mono.square().sum(-1, keepdim=True) / lengths[:, None]).sqrt()
        mono = mono / level.clamp(min=1e-8)
        size = 2 * self.frame
        window = F.pad(self.window, (self.frame // 2, self.frame // 2))
        padded = F.pad(mono, (self.frame, self.frame))
        spectrum = torch.stft(padded, size, self.hop, window=window, center=False, return_complex=True).mT
        power = spectrum.real.square() + spectrum.imag.square()  # (B,F,bins)
        frames = torch.arange(power.shape[1], device=mono.device) < (lengths // self.hop + 1)[:, None]
        return torch.cat(
            [self._bands(power, frames), self._harmonics(power, frames), self._loudness(mono, lengths)], -1
        )

    def _bands(self, power: Tensor, frames: Tensor) -> Tensor:
        """(B,2*BANDS): logarithms of the shares of the bands, and their standard deviations over time."""
        bands = power @ self.fbank
        mean = (bands * frames[..., None]).sum(1)
        total = mean.sum(-1, keepdim=True).clamp(min=1e-8)
        number = frames.sum(1)[:, None]
        shares = (mean / total + QUIETEST).log()
        decibels = (bands * number[..., None] / total[..., None] + 1e-3).log()
        return torch.cat([shares, _spread(decibels, frames[..., None], 1)[1]], -1)

    def _harmonics(self, power: Tensor, frames: Tensor) -> Tensor:
        """(B,HARMONICS+4): logarithms of the shares of harmonics and rest; pitch in octaves, its spread and steps."""
        amplitude = power.sqrt()
        best = (amplitude @ self.salience).argmax(-1)
        places = self.places[best][:, :, None] * self.fine[:, None]  # (B,F,fine,HARMONICS)
        low = places.long().clamp(max=power.shape[-1] - 2)
        above, below = (amplitude.gather(-1, (low + step).flatten(2)).view_as(places) for step in (1, 0))
        sampled = torch.where(places < power.shape[-1] - 1, torch.lerp(below, above, places - low), 0.0)
        nearest = (sampled @ self.decay).argmax(-1, keepdim=True)  # (B,F,1)
        harmonics = sampled.gather(2, nearest[..., None].expand(-1, -1, -1, HARMONICS))[:, :, 0].square()
        energy = power.sum(-1) * frames
        energy = energy / energy.sum(-1, keepdim=True).clamp(min=1e-8)
        # A Hann window spreads a tone over bins whose energies sum to 3 times that of the middle one.
        shares = 3 * harmonics / power.sum(-1, keepdim=True).clamp(min=1e-8)
        rest = (1 - shares.sum(-1, keepdim=True)).clamp(min=0)
        logarithms = (torch.cat([shares, rest], -1) + 1e-4).log()
        octaves = best / STEPS + self.fine.log2()[nearest[..., 0]]
        centre = (octaves * energy).sum(-1, keepdim=True)
        spread = ((octaves - centre).square() * energy).sum(-1, keepdim=True).sqrt()
        steps = octaves.diff(dim=-1).abs().clamp(max=0.25) * energy[:, 1:]
        return torch.cat([(logarithms * energy[..., None]).sum(1), centre, spread, steps.sum(-1, keepdim=True)], -1)

    def _loudness(self, mono: Tensor, lengths: Tensor) -> Tensor:
        """(B,4*(quantiles+2)): quantiles, mean and standard deviation of loudness and of its changes."""
        size = 2 * self.step
        squares = F.pad(mono.square(), (0, max(size - mono.shape[-1], 0)))
        energy = squares.unfold(-1, size, self.step).mean(-1)
        loudness = (energy + 1e-4).log()  # 40 dB below the mean at least
        count = ((lengths - size) // self.step + 1).clamp(min=1)[:, None]
        places = torch.arange(loudness.shape[-1], device=mono.device)
        parts = []
        for lag in (0, 1, 4, 8):
            values = loudness[:, lag:] - loudness[:, : max(loudness.shape[-1] - lag, 0)] if lag else loudness
            inside = places[: values.shape[-1]] < count - lag
            masked = values.masked_fill(~inside, torch.nan)
            if values.shape[-1]:
                parts.append(masked.nanquantile(self.quantiles, dim=-1).mT.nan_to_num())
            else:
                parts.append(values.new_zeros(len(mono), len(self.quantiles)))
            parts += [part[:, None] for part in _spread(values, inside, 1)]
        return torch.cat(parts, -1)


class SoundTagger(FixedPrecision, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Says for each attribute, such as the instrument, which of the values it knows a clip has.

    One hidden layer on `SoundFeatures`. It is trained by `fit`, saved by `save_pretrained` and loaded by
    `from_pretrained`. Its arguments are those of a network without training.

    Args:
        attributes: values by attribute.
        sample_rate: that clips are brought to, in Hz.
        hidden: width of the hidden layer; 0 for a logistic regression.

    Raises:
        ValueError: if an attribute has fewer than two values, or there is none.

    Example::

        clips, lengths, labels = collect(data.train_dataloader(), ["instrument", "register"])
        tagger = SoundTagger.fit(clips, labels, sample_rate=4000, lengths=lengths)
        tagger.save_pretrained("tagger")
    """

    mean: Tensor
    scale: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, attributes: dict[str, list[str]], sample_rate: int = 16_000, hidden: int = 64) -> None:
        super().__init__()
        if not attributes or any(len(set(values)) < 2 for values in attributes.values()):
            counts = {name: len(set(values)) for name, values in attributes.items()}
            raise ValueError(f"attributes={counts}: give at least one, each with two or more different values")
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.features = SoundFeatures(sample_rate)
        width, total = self.features.num_features, sum(len(values) for values in self.attributes.values())
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float32))
        layers = [nn.Linear(width, hidden or total, dtype=torch.float32)]
        if hidden:
            layers += [nn.GELU(), nn.Linear(hidden, total, dtype=torch.float32)]  # type: ignore[list-item]
        self.net = nn.Sequential(*layers)

    @property
    def sample_rate(self) -> int:
        """That clips are brought to, in Hz."""
        return self.features.sample_rate

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, sample_rate: int | None = None
    ) -> dict[str, Tensor]:
        """Judge clips.

        Args:
            waveforms: (B,C,T) or (B,T) float of any level; channels are averaged.
            lengths: (B,) int64, samples of each clip, at least 1; None means T.
            sample_rate: of the waveforms, in Hz; None takes the tagger's.

        Returns:
            Attribute -> (B,K) float32, logits of its values.
        """
        return self._heads(self._features(waveforms, lengths, sample_rate))

    def indices(self, columns: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Numbers of the values that clips have.

        Args:
            columns: values by attribute; others are ignored.

        Returns:
            Attribute -> (B,) int64, -1 for values that the tagger does not know; only attributes in `columns`.
        """
        numbers = {
            name: {value: number for number, value in enumerate(self.attributes[name])}
            for name in columns
            if name in self.attributes
        }
        return {
            name: torch.tensor([known.get(str(value), -1) for value in columns[name]], dtype=torch.int64)
            for name, known in numbers.items()
        }

    def _features(self, waveforms: Tensor, lengths: Tensor | None, sample_rate: int | None) -> Tensor:
        rate = sample_rate or self.sample_rate
        if rate != self.sample_rate:
            mono = waveforms.float().mean(1) if waveforms.ndim == 3 else waveforms.float()
            if lengths is not None:  # what lies behind a clip must not ring into it
                mono = torch.where(torch.arange(mono.shape[-1], device=mono.device) < lengths[:, None], mono, 0.0)
                lengths = -(-lengths * self.sample_rate // rate)
            waveforms = audio.resample(mono, rate, self.sample_rate)
        return self.features(waveforms, lengths)

    def _heads(self, rows: Tensor) -> dict[str, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = self.net((rows - self.mean) / self.scale)
        sizes = [len(values) for values in self.attributes.values()]
        return dict(zip(self.attributes, logits.split(sizes, -1), strict=True))

    @classmethod
    def fit(
        cls,
        clips: Tensor,
        labels: Mapping[str, Sequence[str]],
        sample_rate: int,
        noise_copies: int = 2,
        lengths: Tensor | None = None,
        hidden: int = 64,
        steps: int = 300,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
        seed: int = 0,
    ) -> "SoundTagger":
        """Train on labelled clips and on copies of them with white noise of 5 to 30 dB signal-to-noise ratio.

        All clips together make a batch of AdamW, whose learning rate follows a half cosine. The result depends on the
        arguments alone; global random states are neither used nor changed.

        Args:
            clips: (N,C,T) or (N,T) float; training runs on their device.
            labels: N values by attribute, "" where unknown.
            sample_rate: of the clips, in Hz.
            noise_copies: noisy copies of each clip.
            lengths: (N,) int64, samples of each clip, at least 1; None means T.
            hidden: width of the hidden layer; 0 for a logistic regression.
            steps: of the optimizer.
            learning_rate: at the start.
            weight_decay: of the matrices.
            seed: of noise and of first weights.

        Returns:
            The tagger in evaluation mode.

        Raises:
            ValueError: if there are not as many labels as clips, an attribute has fewer than two values, or a clip
                holds samples that are no numbers.
        """
        for name, values in labels.items():
            if len(values) != len(clips):
                raise ValueError(f"labels[{name!r}] has {len(values)} values for {len(clips)} clips; give one for each")
        if not clips.isfinite().all():
            raise ValueError("clips hold samples that are no numbers; leave those clips out")
        attributes = {name: sorted({str(value) for value in values} - {""}) for name, values in labels.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tagger = cls(attributes, sample_rate, hidden).to(clips.device)
        generator = torch.Generator().manual_seed(seed)
        copies = [clips, *(add_noise(clips, generator, lengths) for _ in range(noise_copies))]
        rows = torch.cat([tagger.features(copy, lengths) for copy in copies])
        tagger.mean.copy_(rows.mean(0))
        tagger.scale.copy_(rows.std(0, correction=0).clamp(min=1e-3))
        targets = {name: index.repeat(len(copies)).to(rows.device) for name, index in tagger.indices(labels).items()}
        optimizer = torch.optim.AdamW(tagger.net.parameters(), learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                logits = tagger._heads(rows)
                losses = [F.cross_entropy(logits[name], target, ignore_index=-1) for name, target in targets.items()]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
        return tagger.requires_grad_(False).eval()


def add_noise(clips: Tensor, generator: torch.Generator, lengths: Tensor | None = None) -> Tensor:
    """Add white noise of 5 to 30 dB signal-to-noise ratio.

    Args:
        clips: (N,C,T) or (N,T) float.
        generator: of the ratios and the noise, on the CPU.
        lengths: (N,) int64, samples of each clip, of which its energy is the mean; None means T.

    Returns:
        Noisy copies, float32.
    """
    flat = clips.float().reshape(len(clips), -1)
    energy = flat.square().mean(-1)
    if lengths is not None:
        energy = energy * clips.shape[-1] / lengths.clamp(min=1)
    low, high = SNR_DB
    ratio = low + (high - low) * torch.rand(len(clips), generator=generator, dtype=torch.float32)
    noise = torch.randn(flat.shape, generator=generator, dtype=torch.float32).to(flat.device)
    amplitude = (energy * 10 ** (-ratio / 10).to(flat.device)).sqrt()
    return (flat + amplitude[:, None] * noise).reshape(clips.shape)


def collect(
    batches: Iterable[Mapping[str, Any]], attributes: Sequence[str], limit: int | None = None
) -> tuple[Tensor, Tensor, dict[str, list[str]]]:
    """Gather labelled clips from a loader, as `SoundTagger.fit` takes them.

    Args:
        batches: with `audio` (B,C,T), `valid_length` (B,) and `columns`.
        attributes: columns that are labels.
        limit: most clips.

    Returns:
        Clips (N,C,T) float32, their lengths (N,) int64, and N labels by attribute.

    Raises:
        ValueError: if a batch has no such column, or there is no clip.
    """
    clips: list[Tensor] = []
    lengths: list[Tensor] = []
    labels: dict[str, list[str]] = {name: [] for name in attributes}
    for batch in batches:
        for name in attributes:
            if name not in batch["columns"]:
                known = ", ".join(batch["columns"]) or "none"
                raise ValueError(f"the batch has no column {name!r}; choose attributes among its columns: {known}")
            labels[name] += [str(value) for value in batch["columns"][name]]
        clips.append(batch["audio"].float())
        lengths.append(batch["valid_length"])
        if limit is not None and sum(map(len, clips)) >= limit:
            break
    if not clips:
        raise ValueError("there are no clips to collect: the loader gave no batch")
    return torch.cat(clips)[:limit], torch.cat(lengths)[:limit], {name: row[:limit] for name, row in labels.items()}


def _spread(values: Tensor, valid: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the valid places of a dimension; 0 where there are none."""
    number = valid.sum(dim).clamp(min=1)
    mean = (values * valid).sum(dim) / number
    variance = ((values - mean.unsqueeze(dim)).square() * valid).sum(dim) / number
    return mean, variance.sqrt()
