"""Parts of an evaluation: each measures one thing of generated clips, and of the real ones where that makes sense.

A probe turns a batch into what its metrics take. All of them are updated and computed on all processes, whatever the
batches hold, so that collective calls meet; what could not be measured is left out of the results.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lit_models.diffusion.metrics.clap import ClapEmbedding
from lit_models.diffusion.metrics.distances import FrechetAudioDistance, KernelAudioDistance
from lit_models.diffusion.metrics.diversity import NearestCosine, PromptDiversity
from lit_models.diffusion.metrics.embeddings import LogMel
from lit_models.diffusion.metrics.music import KeyAgreement, PitchAgreement, TempoAgreement, estimate_pitch, key_index
from lit_models.diffusion.metrics.scores import (
    InceptionScore,
    RelevanceAccuracy,
    Retrieval,
    TaggerDivergence,
    TextAudioSimilarity,
    _Sums,
)
from lit_models.diffusion.metrics.tagger import SoundTagger

Embedding = LogMel | ClapEmbedding

REAL = "real/"
"""Prefix of what is measured of real clips."""
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:bpm)?\s*", re.IGNORECASE)


@dataclass
class Clips:
    """Clips of different lengths, and whose they are.

    Args:
        waveforms: (N,C,T) float32, silent after the clips' ends.
        lengths: (N,) int64, samples of each clip, at least 1.
        prompts: (N,) int64, which of the batch's prompts each belongs to.
        invalid: clips that are left out, since they hold what is no number.
    """

    waveforms: Tensor
    lengths: Tensor
    prompts: Tensor
    invalid: int = 0
    _embedded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def embed(self, network: Embedding) -> tuple[Tensor, Tensor]:
        """Rows of all windows (W,D), and the mean row of each clip (N,D); computed once for each network."""
        if id(network) not in self._embedded:
            self._embedded[id(network)] = embed(network, self.waveforms, self.lengths)
        return self._embedded[id(network)]


@dataclass
class Sample:
    """What was generated for a batch.

    Args:
        generated: clips that count.
        real: clips with the same descriptions, if there are any.
        columns: facts by name, one for each prompt.
        text: prompts, if there are any.
        first: number of the first prompt among those of this process.
        size: number of prompts.
        count: generated clips, with those that do not count.
    """

    generated: Clips
    real: Clips | None
    columns: Mapping[str, Sequence[Any]]
    text: Sequence[str] | None
    first: int
    size: int
    count: int

    def sides(self) -> dict[str, Clips]:
        """Generated and real clips, by the prefix of their metrics, without a side that has none."""
        sides = {"": self.generated} if self.real is None else {"": self.generated, REAL: self.real}
        return {prefix: clips for prefix, clips in sides.items() if len(clips.waveforms)}


def embed(network: Embedding, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Embed clips of different lengths.

    Args:
        network: what embeds them.
        waveforms: (N,C,T) float.
        lengths: (N,) int64, at least 1.

    Returns:
        Rows of all windows (W,D) float32, and the mean row of each clip (N,D).
    """
    if isinstance(network, ClapEmbedding):
        rows, owners = network.windows(waveforms, lengths)
        counts = torch.bincount(owners, minlength=len(waveforms))[:, None]
        return rows, rows.new_zeros(len(waveforms), rows.shape[-1]).index_add(0, owners, rows) / counts
    parts = [network(clip[None, :, : int(length)]) for clip, length in zip(waveforms, lengths, strict=True)]
    if not parts:
        empty = torch.zeros(0, network.num_features, dtype=torch.float32, device=waveforms.device)
        return empty, empty
    return torch.cat(parts), torch.stack([part.mean(0) for part in parts])


class Probe:
    """Base of all probes.

    Attributes:
        metrics: by the name of their results.
        networks: whatever else must follow to a device.
        states: what the list states of metrics hold where a process saw no clip; collective calls need the shapes.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.networks: list[nn.Module] = []
        self.states: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        raise NotImplementedError

    def rows(self, *names: str, width: int) -> None:
        """Say that list states of these names hold float64 rows of a width."""
        self.states |= {name: torch.zeros(0, width, dtype=torch.float64) for name in names}

    def move(self, device: torch.device) -> None:
        """Bring everything to a device."""
        for part in (*self.networks, *self.metrics.values()):
            part.to(device)

    def compute(self) -> dict[str, Tensor]:
        """Results by name, each () float32; collective."""
        results: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            found = self._value(name, metric)
            values = {name: found} if isinstance(found, Tensor) else {f"{name}/{key}": found[key] for key in found}
            if any(value.isnan() for value in values.values()):
                self.missing(name)
            else:
                results |= {key: value.float() for key, value in values.items()}
        return results

    def missing(self, name: str) -> None:
        """Say that a metric has no value, unless that has been explained."""
        if not self._warned and not name.startswith(REAL):
            self.warn(name, f"{name} is not measured: no clip of the data tells what to expect")

    def _value(self, name: str, metric: Metric) -> Tensor | dict[str, Tensor]:
        for state, default in metric._defaults.items():
            if isinstance(default, list) and not len(getattr(metric, state)):
                getattr(metric, state).append(self.states[state].to(metric.device))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # it has got no clip
                return metric.compute()  # type: ignore[no-any-return]
        except ValueError as error:  # too few clips, on all processes alike
            if metric._is_synced:
                metric.unsync()
            self.warn(name, f"{name} is not measured: {error}")
            return {}

    def warn(self, topic: str, message: str) -> None:
        """Warn once about a topic, on the first process."""
        if topic not in self._warned and process() == 0:
            warnings.warn(message, stacklevel=2)
        self._warned.add(topic)

    def column(self, sample: Sample, name: str, measured: str) -> Sequence[Any] | None:
        """A column of a batch, or None, with a warning."""
        if name in sample.columns:
            return sample.columns[name]
        known = ", ".join(sample.columns) or "none"
        self.warn(name, f"the data has no column {name!r}, so {measured} is not measured; its columns are: {known}")
        return None

    def reset(self) -> None:
        """Forget all clips."""
        for metric in self.metrics.values():
            metric.reset()


def process() -> int:
    """Number of this process."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


class Total(_Sums):
    """A sum over all batches and processes."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__({"total": ()})

    def update(self, value: int) -> None:
        """Add a number."""
        self.total += value

    def compute(self) -> Tensor:
        """() float32."""
        return self.total.float()


class CountProbe(Probe):
    """Numbers of generated clips, and of those that hold what is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"clips": Total(), "invalid": Total()}

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        self.metrics["clips"].update(sample.count)
        self.metrics["invalid"].update(sample.generated.invalid)


class Level(_Sums):
    """Root of the mean square of samples."""

    energy: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__({"energy": (), "samples": ()})

    def update(self, clips: Clips) -> None:
        """Add clips."""
        self.energy += clips.waveforms.double().square().mean(1).sum()
        self.samples += clips.lengths.sum()

    def compute(self) -> Tensor:
        """() float32; NaN without samples."""
        return (self.energy / self.samples).sqrt().float()


class LevelProbe(Probe):
    """Strength of generated and of real clips: models that know little are too quiet."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"rms": Level(), f"{REAL}rms": Level()}

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        for prefix, clips in sample.sides().items():
            self.metrics[f"{prefix}rms"].update(clips)

    def missing(self, name: str) -> None:
        """Say nothing: `clips` says that there are none."""


class DistanceProbe(Probe):
    """Distances between all generated and all real windows.

    Args:
        network: what embeds windows.
        fad: whether to measure the Fréchet distance.
        kad: whether to measure the kernel distance.
        suffix: of the names.
    """

    def __init__(self, network: Embedding, fad: bool, kad: bool, suffix: str = "") -> None:
        super().__init__()
        self.network, self.networks = network, [network]
        if fad:
            self.metrics[f"fad{suffix}"] = FrechetAudioDistance(network.num_features, keep_reference=False)
        if kad:
            self.metrics[f"kad{suffix}"] = KernelAudioDistance(keep_reference=False)
        self.rows("generated", "reference", width=network.num_features)

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        for metric in self.metrics.values():
            for prefix, clips in sample.sides().items():
                metric.update(clips.embed(self.network)[0], reference=prefix == REAL)


class DiversityProbe(Probe):
    """Distances between clips for the same prompt.

    Args:
        network: what embeds clips.
    """

    def __init__(self, network: Embedding) -> None:
        super().__init__()
        self.network, self.networks = network, [network]
        self.metrics["diversity"] = PromptDiversity()
        self.rows("rows", width=network.num_features)
        self.states["prompts"] = torch.zeros(0, dtype=torch.int64)

    def update(self, sample: Sample) -> None:
        """Add a batch; prompts are the same if their texts are, on whatever process."""
        clips = sample.generated
        if sample.text is None:
            numbers = [(process() << 40) + sample.first + place for place in range(sample.size)]
        else:
            digests = [hashlib.sha256(text.encode()).digest()[:8] for text in sample.text]
            numbers = [int.from_bytes(digest, "big") >> 1 for digest in digests]
        prompts = torch.tensor(numbers, dtype=torch.int64, device=clips.prompts.device)[clips.prompts]
        self.metrics["diversity"].update(clips.embed(self.network)[1], prompts)

    def missing(self, name: str) -> None:
        """Say what it needs."""
        self.warn(name, "diversity is not measured: no prompt has two clips; set evaluation.samples_per_prompt to 2")


class NearestProbe(Probe):
    """Cosines with the nearest training clips.

    Cosines of LogMel rows are those of their deviations from the mean training clip, in units of the standard deviation
    of each feature: all sounds are alike in what they have in common.

    Args:
        network: what embeds clips.
        known: (N,D) float, mean rows of the training clips.
    """

    def __init__(self, network: Embedding, known: Tensor) -> None:
        super().__init__()
        self.network, self.networks = network, [network]
        known = known.double()
        self.centre, self.spread = torch.zeros_like(known[0]), torch.ones_like(known[0])
        if isinstance(network, LogMel):
            self.centre, self.spread = known.mean(0), known.std(0, correction=0).clamp(min=1e-3)
        self.metrics["nearest"] = NearestCosine((known - self.centre) / self.spread)

    def move(self, device: torch.device) -> None:
        """Bring everything to a device."""
        super().move(device)
        self.centre, self.spread = self.centre.to(device), self.spread.to(device)

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        rows = sample.generated.embed(self.network)[1]
        if len(rows):
            self.metrics["nearest"].update((rows - self.centre) / self.spread)


class KeyProbe(Probe):
    """Agreement with the key in column `key`.

    Args:
        sample_rate: of the clips, in Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.metrics = {f"{prefix}key": KeyAgreement(sample_rate) for prefix in ("", REAL)}

    def update(self, sample: Sample) -> None:
        """Add a batch; clips without a key, or with one of another mode than major and minor, do not count."""
        names = self.column(sample, "key", "agreement with the key")
        if names is not None:
            keys = torch.tensor([self._index(name) for name in names], device=sample.generated.prompts.device)
            for prefix, clips in sample.sides().items():
                self.metrics[f"{prefix}key"].update(clips.waveforms, keys[clips.prompts])

    def _index(self, name: object) -> int:
        try:
            return key_index(str(name)) if name else -1
        except ValueError as error:
            self.warn("value", f"column 'key': {error}; clips with such a key are left out")
            return -1


class TempoProbe(Probe):
    """Agreement with the tempo in column `tempo`.

    Args:
        sample_rate: of the clips, in Hz.
        tempos: beats per minute by tempo word.
    """

    def __init__(self, sample_rate: int, tempos: Mapping[str, float]) -> None:
        super().__init__()
        self.tempos = dict(tempos)
        self.metrics = {f"{prefix}tempo": TempoAgreement(sample_rate) for prefix in ("", REAL)}

    def update(self, sample: Sample) -> None:
        """Add a batch; clips without a tempo do not count."""
        words = self.column(sample, "tempo", "agreement with the tempo")
        if words is not None:
            tempi = [self._tempo(word) for word in words]
            values = torch.tensor(tempi, dtype=torch.float32, device=sample.generated.prompts.device)
            for prefix, clips in sample.sides().items():
                self.metrics[f"{prefix}tempo"].update(clips.waveforms, values[clips.prompts])

    def _tempo(self, word: object) -> float:
        """Beats per minute of a word or a number; 0 if it is neither."""
        if word is None or word == "":
            return 0.0
        if str(word) in self.tempos:
            return self.tempos[str(word)]
        number = _NUMBER.fullmatch(str(word))
        if number is None:
            known = ", ".join(self.tempos)
            self.warn(
                "value",
                f"column 'tempo': {word!r} is neither a number nor one of {known}; clips with such a tempo are left "
                "out, unless it is added to evaluation.tempos",
            )
        return float(number[1]) if number else 0.0


class PitchProbe(Probe):
    """Agreement with the pitches in column `pitches`, or else with those of the real clip.

    Args:
        sample_rate: of the clips, in Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.metrics = {f"{prefix}pitch": PitchAgreement(sample_rate) for prefix in ("", REAL)}

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        sides = sample.sides()
        device = sample.generated.prompts.device
        if "pitches" in sample.columns:
            tracks = [torch.as_tensor(track, dtype=torch.float32) for track in sample.columns["pitches"]]
            wanted = nn.utils.rnn.pad_sequence(tracks, batch_first=True).to(device)
        elif sample.real is not None and REAL in sides:
            sides.pop(REAL)  # they agree with themselves
            found = estimate_pitch(sample.real.waveforms, self.sample_rate, highest=min(2000.0, self.sample_rate / 4))
            wanted = found.new_zeros(sample.size, found.shape[-1])
            wanted[sample.real.prompts] = found
        elif sample.real is None:
            self.column(sample, "pitches", "agreement with the pitch")
            return
        else:
            return
        for prefix, clips in sides.items():
            self.metrics[f"{prefix}pitch"].update(clips.waveforms, wanted[clips.prompts])


class TagProbe(Probe):
    """What a tagger finds in clips.

    Args:
        tagger: judges clips.
        sample_rate: of the clips, in Hz.
    """

    def __init__(self, tagger: SoundTagger, sample_rate: int) -> None:
        super().__init__()
        self.tagger, self.sample_rate, self.networks = tagger, sample_rate, [tagger]
        for prefix in ("", REAL):
            self.metrics[f"{prefix}relevance"] = RelevanceAccuracy(list(tagger.attributes))
            for name, values in tagger.attributes.items():
                self.metrics[f"{prefix}inception/{name}"] = InceptionScore(len(values))
        for name in tagger.attributes:
            self.metrics[f"kl/{name}"] = TaggerDivergence()

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        device = sample.generated.prompts.device
        labels = self.tagger.indices(sample.columns)
        for name in self.tagger.attributes:
            if self.column(sample, name, f"relevance of the {name}") is None:
                labels[name] = torch.full((sample.size,), -1)
        labels = {name: values.to(device) for name, values in labels.items()}
        logits = {}
        for prefix, clips in sample.sides().items():
            logits[prefix] = self.tagger(clips.waveforms, clips.lengths, self.sample_rate)
            asked = {name: values[clips.prompts] for name, values in labels.items()}
            self.metrics[f"{prefix}relevance"].update(logits[prefix], asked)
            for name, values in logits[prefix].items():
                self.metrics[f"{prefix}inception/{name}"].update(values)
        if sample.real is not None and len(logits) == 2:
            place = torch.full((sample.size,), -1, device=device)
            place[sample.real.prompts] = torch.arange(len(sample.real.prompts), device=device)
            partner = place[sample.generated.prompts]
            for name in self.tagger.attributes:
                self.metrics[f"kl/{name}"].update(
                    logits[""][name][partner >= 0], logits[REAL][name][partner[partner >= 0]]
                )

    def missing(self, name: str) -> None:
        """Say nothing: a tagger needs no columns to compare clips."""


class ClapProbe(Probe):
    """Agreement of clips with their prompts, as a CLAP model sees it.

    Args:
        network: embeds clips and prompts.
    """

    def __init__(self, network: ClapEmbedding) -> None:
        super().__init__()
        self.network, self.networks = network, [network]
        self.metrics = {"clap": TextAudioSimilarity(), f"{REAL}clap": TextAudioSimilarity(), "retrieval": Retrieval()}
        self.rows("audio", "text", width=network.num_features)

    def update(self, sample: Sample) -> None:
        """Add a batch."""
        if sample.text is None:
            self.warn("text", "the data has no prompts, so no CLAP score is measured; give batches `text`")
            return
        texts = self.network.texts(sample.text)
        for prefix, clips in sample.sides().items():
            rows = F.normalize(clips.embed(self.network)[1], dim=-1)
            self.metrics[f"{prefix}clap"].update(rows, texts[clips.prompts])
            if not prefix:
                self.metrics["retrieval"].update(rows, texts[clips.prompts])
