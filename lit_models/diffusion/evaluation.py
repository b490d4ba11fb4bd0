"""What is measured of generated sounds: how close they come to real ones, and whether they are what was asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import torch
import torchaudio.functional as audio
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_models.diffusion.metrics.clap import ClapEmbedding
from lit_models.diffusion.metrics.embeddings import LogMel
from lit_models.diffusion.metrics.probes import (
    ClapProbe,
    Clips,
    CountProbe,
    DistanceProbe,
    DiversityProbe,
    KeyProbe,
    LevelProbe,
    NearestProbe,
    PitchProbe,
    Probe,
    Sample,
    TagProbe,
    TempoProbe,
    embed,
)
from lit_models.diffusion.metrics.tagger import SoundTagger

TEMPOS = {"slow": 72.0, "medium": 104.0, "fast": 144.0}
"""Beats per minute by tempo word."""
LOG_MEL = "logmel"
"""Name of the embedding that needs no weights."""
LOWEST_RATE = 500
LOUDEST = 1e9
"""Amplitude beyond which energies overflow."""


@dataclass
class Evaluation:
    """What is measured of generated sounds in tests.

    Distances (FAD, KAD) compare the windows of all generated clips with those of all real ones of the test set, in
    LogMel features, and with a CLAP model in its embeddings, too. A clip shorter than a window counts as one. They grow
    as windows get fewer: compare only runs of equal size.

    What is asked of generated clips is also measured of the real ones, as `real/NAME`: no generator can be expected to
    do better. `rms` is the strength of all clips, `clips` their number, and `invalid` that of clips with samples that
    are no numbers, which are left out of everything else.

    Args:
        fad: Fréchet audio distance, `fad`.
        kad: kernel audio distance, `kad`, which small sets do not bias.
        key: whether clips have the key in column `key`, `key/accuracy` and `key/weighted`.
        tempo: whether clips have the tempo in column `tempo`, a word or beats per minute, `tempo/accuracy` and
            `tempo/octave_accuracy`.
        pitch: whether frames have the pitch (Hz, a hundred times a second) in column `pitches`, or else of the real
            clip, `pitch/accuracy` and `pitch/chroma_accuracy`. The latter means something where the melody is given, as
            when sound is continued or varied.
        diversity: mean distance of clips for one prompt, `diversity`; needs `samples_per_prompt` of 2 or more, or
            prompts that occur twice.
        tagger: folder of a `SoundTagger`. For each of its attributes A: `relevance/A`, how often it finds what the
            column A says, and `relevance/all`; `kl/A`, divergence of its tags from those of the real clip; and
            `inception/A`, the inception score.
        clap: folder or hub id of a CLAP model, for `clap`, the mean cosine of clips and prompts, `retrieval/R@k`, and
            `fad_clap` and `kad_clap` beside `fad` and `kad`.
        known: file of `save_embeddings` of the training clips, for `nearest/mean`, `nearest/max` and `nearest/copies`,
            cosines with the nearest of them.
        tempos: beats per minute by tempo word; null takes slow 72, medium 104, fast 144.
        samples_per_prompt: clips that are generated for each prompt.
        steps: steps of the sampler; null takes the module's.
        guidance: scale of the guidance; null takes the module's.
        limit: most prompts of each process; null takes all.

    Raises:
        ValueError: naming the key, if a number is out of its range.
    """

    fad: bool = True
    kad: bool = False
    key: bool = False
    tempo: bool = False
    pitch: bool = False
    diversity: bool = False
    tagger: str | None = None
    clap: str | None = None
    known: str | None = None
    tempos: dict[str, float] | None = None
    samples_per_prompt: int = 1
    steps: int | None = None
    guidance: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check numbers."""
        for name in ("samples_per_prompt", "steps", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name}: {value} must be at least 1")
        for word, tempo in (self.tempos or {}).items():
            if not tempo > 0:
                raise ValueError(f"evaluation.tempos: {word!r} is {tempo} beats per minute; give a positive number")

    def build(self, sample_rate: int) -> "SampleMetrics":
        """Make the metrics.

        Args:
            sample_rate: of generated sounds, in Hz.

        Returns:
            The metrics, on the CPU.

        Raises:
            ValueError: naming the key, if a model or file cannot be read or belongs to something else, or the sample
                rate is too low for a metric.
        """
        return SampleMetrics(self, sample_rate)


class SampleMetrics(nn.Module):
    """All metrics of an `Evaluation`, fed with the same batches.

    The metrics and their networks are no sub-modules: checkpoints, optimizers, wrappers and casts of the module around
    this one do not see them. They follow it to its device.

    Args:
        options: what is measured.
        sample_rate: of generated sounds, in Hz.

    Raises:
        ValueError: naming the key, if a model or file cannot be read or belongs to something else, or the sample rate
            is too low for a metric.

    Example::

        metrics = Evaluation(key=True).build(sample_rate=16_000)
        metrics.update(generated, batch["audio"], batch["valid_length"], batch["columns"])
        metrics.compute()["key/accuracy"]
    """

    def __init__(self, options: Evaluation, sample_rate: int) -> None:
        super().__init__()
        if sample_rate < LOWEST_RATE:
            raise ValueError(f"sample_rate={sample_rate}: metrics of sound need at least {LOWEST_RATE} Hz")
        self.options, self.sample_rate = options, sample_rate
        self._device = torch.device("cpu")
        self._prompts = 0
        with torch.device("cpu"), _float32():  # wherever, and in whatever precision, the module around is made
            self._probes = tuple(_probes(options, sample_rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampleMetrics":
        device = fn(torch.empty(0, dtype=torch.float32, device=self._device)).device
        if device.type != "meta":
            self._move(device)
        return super()._apply(fn, recurse)

    def _move(self, device: torch.device) -> None:
        for probe in self._probes:
            probe.move(device)
        self._device = device

    def room(self, prompts: int) -> int:
        """How many of the next prompts are to be evaluated on this process, until `limit`.

        Args:
            prompts: how many there are.

        Returns:
            From 0 to `prompts`.
        """
        return prompts if self.options.limit is None else max(min(prompts, self.options.limit - self._prompts), 0)

    def update(
        self,
        generated: Tensor,
        real: Tensor | None,
        valid_length: Tensor | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        sample_rate: int | None = None,
        text: Sequence[str] | None = None,
    ) -> None:
        """Add what was generated for a batch.

        A generated clip counts up to the end of its real clip, since the data are not expected to go on either. Real
        clips without any sample are left out, with what was generated for them.

        Args:
            generated: (B·k,C,L) float, k clips for each of B prompts, those of a prompt one after the other.
            real: (B,C,T) float, clips with these descriptions, or None; then nothing is compared with real sound.
            valid_length: (B,) int64, samples before the end of each real clip; None means T.
            columns: facts about the clips by name, B each; "" where unknown.
            sample_rate: of all waveforms, in Hz; None takes that of `build`. Others are resampled.
            text: B prompts, for CLAP and diversity.

        Raises:
            ValueError: if the numbers of clips do not fit each other.
        """
        columns = columns or {}
        size = self._size(generated, real, columns, text)
        if generated.device != self._device:
            self._move(generated.device)
        with torch.no_grad(), _float32(), torch.autocast(generated.device.type, enabled=False):
            made, whole = self._clips(generated, real, valid_length, size, sample_rate or self.sample_rate)
            sample = Sample(made, whole, columns, text, self._prompts, size, len(generated))
            for probe in self._probes:
                probe.update(sample)
        self._prompts += size

    def _size(
        self, generated: Tensor, real: Tensor | None, columns: Mapping[str, Sequence[Any]], text: Sequence[str] | None
    ) -> int:
        """Number of prompts."""
        sizes = {f"columns.{name}": len(values) for name, values in columns.items()}
        sizes |= {} if text is None else {"text": len(text)}
        sizes |= {} if real is None else {"real": len(real)}
        sizes = sizes or {"generated": len(generated) // self.options.samples_per_prompt}
        size = max(sizes.values())
        if set(sizes.values()) != {size} or (len(generated) % size if size else len(generated)):
            raise ValueError(
                f"generated: {len(generated)} clips do not fit the rest of the batch ({sizes}); give one entry for "
                "each prompt, and equally many clips for each"
            )
        return size

    def _clips(
        self, generated: Tensor, real: Tensor | None, valid_length: Tensor | None, size: int, sample_rate: int
    ) -> tuple[Clips, Clips | None]:
        """Generated and real clips that count, at the metrics' rate."""
        device = self._device
        lengths = torch.full((size,), generated.shape[-1], device=device)
        ends = lengths if real is None else torch.full((size,), real.shape[-1], device=device)
        if valid_length is not None:
            # A clip that fills its place does not end there, so neither need the generated one.
            full = ends
            ends = torch.minimum(valid_length.to(device), full)
            lengths = torch.where(ends == full, lengths, torch.minimum(ends, lengths))
        prompts = torch.arange(size, device=device)
        owners = prompts.repeat_interleave(len(generated) // size if size else 1)
        lengths = torch.where(ends > 0, lengths, 0)
        made = self._prepared(generated, lengths[owners], owners, sample_rate)
        return made, None if real is None else self._prepared(real, ends, prompts, sample_rate)

    def _prepared(self, waveforms: Tensor, lengths: Tensor, prompts: Tensor, sample_rate: int) -> Clips:
        waveforms = waveforms.to(lengths.device).float()
        places = torch.arange(waveforms.shape[-1], device=waveforms.device)
        waveforms = torch.where(places < lengths[:, None, None], waveforms, 0.0)
        sound = (waveforms.abs() < LOUDEST).flatten(1).all(-1)  # which numbers are that are no NaN
        kept = sound & (lengths > 0)
        waveforms, lengths, prompts = waveforms[kept], lengths[kept], prompts[kept]
        if sample_rate != self.sample_rate and len(waveforms):
            waveforms = audio.resample(waveforms, sample_rate, self.sample_rate)
            lengths = (-(-lengths * self.sample_rate // sample_rate)).clamp(max=waveforms.shape[-1])
        return Clips(waveforms, lengths, prompts, int((~sound).sum()))

    def compute(self) -> dict[str, Tensor]:
        """All results over all processes, which must all call this.

        Returns:
            () float32 by name, without those that could not be measured, about which a warning tells.
        """
        with _float32():
            return {name: value for probe in self._probes for name, value in probe.compute().items()}

    def reset(self) -> None:
        """Forget all clips."""
        self._prompts = 0
        for probe in self._probes:
            probe.reset()


def _probes(options: Evaluation, sample_rate: int) -> Iterator[Probe]:
    logmel = LogMel(sample_rate)
    clap = None if options.clap is None else ClapEmbedding(options.clap, sample_rate)
    yield CountProbe()
    yield LevelProbe()
    if options.fad or options.kad:
        yield DistanceProbe(logmel, options.fad, options.kad)
        if clap is not None:
            yield DistanceProbe(clap, options.fad, options.kad, "_clap")
    if clap is not None:
        yield ClapProbe(clap)
    if options.diversity:
        yield DiversityProbe(logmel)
    if options.known is not None:
        rows, embedding = load_embeddings(options.known)
        if embedding not in (LOG_MEL, options.clap):
            raise ValueError(
                f"evaluation.known: {options.known} holds embeddings of {embedding!r}, but evaluation.clap is "
                f"{options.clap!r}; set it to that model, or write the file again"
            )
        network = logmel if embedding == LOG_MEL or clap is None else clap
        yield NearestProbe(network, rows)
    if options.key:
        yield KeyProbe(sample_rate)
    if options.tempo:
        yield TempoProbe(sample_rate, options.tempos or TEMPOS)
    if options.pitch:
        yield PitchProbe(sample_rate)
    if options.tagger is not None:
        yield TagProbe(_load_tagger(options.tagger), sample_rate)


def _load_tagger(folder: str) -> SoundTagger:
    try:
        tagger: SoundTagger = SoundTagger.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"evaluation.tagger: {folder!r} holds no SoundTagger ({str(error).splitlines()[0]}); train one with "
            "SoundTagger.fit and save_pretrained"
        ) from error
    return tagger


def save_embeddings(
    path: str | Path,
    batches: Iterable[Mapping[str, Any]],
    sample_rate: int,
    clap: str | None = None,
    limit: int | None = None,
) -> int:
    """Embed clips and write them to a file, with which generated clips are compared (`Evaluation.known`).

    Args:
        path: file ending in `.safetensors`; its folder is made.
        batches: with `audio` (B,C,T) and `valid_length` (B,), for example a loader of training data.
        sample_rate: of the clips, in Hz.
        clap: folder or hub id of a CLAP model; None takes LogMel features.
        limit: most clips.

    Returns:
        The number of clips; those without a sample are left out.

    Raises:
        ValueError: if there are fewer than two clips.
    """
    network = LogMel(sample_rate) if clap is None else ClapEmbedding(clap, sample_rate)
    parts: list[Tensor] = []
    for batch in batches:
        heard = batch["valid_length"] > 0
        parts.append(embed(network, batch["audio"][heard].float(), batch["valid_length"][heard])[1].cpu())
        if limit is not None and sum(map(len, parts)) >= limit:
            break
    rows = torch.cat(parts)[:limit] if parts else torch.zeros(0, 0)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} clips are too few to compare others with; give at least 2")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"clips": rows.contiguous()}, path, {"embedding": LOG_MEL if clap is None else clap})
    return len(rows)


def load_embeddings(path: str | Path) -> tuple[Tensor, str]:
    """Read a file of `save_embeddings`.

    Args:
        path: the file.

    Returns:
        Rows (N,D) float32, and the name of what embedded them.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("clips"), file.metadata()["embedding"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"evaluation.known: {path} is no file of embeddings ({error}); write it with save_embeddings"
        ) from error


@contextmanager
def _float32() -> Iterator[None]:
    """Make new tensors in float32, also where a module runs in 16 bits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
