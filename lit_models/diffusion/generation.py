"""Sound from a module of waveform diffusion: the pipeline, generation, and samples for callbacks."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_models.base import LitBase
from lit_models.diffusion import draws
from lit_models.diffusion.network import WaveformNet
from lit_models.diffusion.options import Sampling
from lit_models.diffusion.text import (
    Pooling,
    TextCache,
    TextRecipe,
    TextStates,
    encode_texts,
    encoder_identity,
    stack_texts,
    without_dropout,
)
from lit_models.nn.sharding import gathered

if TYPE_CHECKING:
    from lit_models.diffusion.pipeline import TextToWaveformPipeline

Batch = dict[str, Any]

SAMPLES = 4
"""Rows of the newest batch that `sounds` and `samples` show."""


class WaveformGenerator(LitBase):
    """What a module needs to make sound; `LitWaveform` trains it."""

    net: WaveformNet
    """All that is trained."""
    text: TextRecipe | None
    """Recipe of the text encoder."""
    text_encoder: nn.Module | None
    """The text encoder, if it is frozen."""
    pooling: Pooling
    """How a text becomes one vector."""
    sampler: Sampling
    """How sound is generated."""
    prompts: list[str] | None
    """Texts of samples."""
    seed: int
    """Seed of noise."""
    text_cache_mb: float
    text_cache_dir: str | None
    _cache: TextCache | None
    _is_sampling: bool
    _newest: Batch

    def exported_models(self) -> dict[str, Any]:
        """The pipeline, with averaged weights where there are any."""
        return {"model": self.pipeline()}

    def pipeline(self, weights: Literal["ema", "online"] = "ema") -> "TextToWaveformPipeline":
        """Network, scheduler, text encoder and tokenizer as a pipeline, outside of training in evaluation mode.

        It shares the networks of this module. While these are sharded, use `generate`.

        Args:
            weights: averaged ones where there are any, or those of the last optimizer step.

        Returns:
            The pipeline.
        """
        from lit_models.diffusion.pipeline import TextToWaveformPipeline

        self.configure_model()
        net = cast(WaveformNet, self.ema) if weights == "ema" and self.ema is not None else self.net
        if self._trainer is None or not self.trainer.training:
            net.eval()
        encoder: Any = self.text_encoder if net.text_encoder is None else net.text_encoder
        options: dict[str, Any] = {}
        if self.text is not None:
            options = {"tokenizer": self.tokenizer, "pooling": self.pooling, "max_tokens": self.text.max_tokens}
        pipeline = TextToWaveformPipeline(net.unet, self.sampler.build(), encoder, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # -- what the network is like --------------------------------------------------------------------------------------

    @staticmethod
    def sample_rate_of(unet: Any) -> int:  # noqa: ANN401
        """Samples per second of the sound of a network.

        Args:
            unet: with a configuration of diffusers.

        Raises:
            ValueError: if the network does not know.
        """
        if not unet.config.sample_rate:
            raise ValueError("model.backbone.sample_rate: the network was saved without one; save it with its rate")
        return int(unet.config.sample_rate)

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.sample_rate_of(self.net.unet)

    @property
    def data_scale(self) -> float:
        """Factor on sound before it is diffused."""
        return float(cast(Any, self.net.unet).config.get("data_scale", 1.0))

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextStates:
        """What the frozen text encoder says about texts, remembered in the cache.

        Args:
            texts: B texts.

        Returns:
            States on the device of the module.
        """
        assert self.text is not None
        assert self.text_encoder is not None
        encoder, tokenizer, limit = self.text_encoder, self.tokenizer, self.text.max_tokens
        if self._cache is None:  # not before, since a checkpoint may have brought other weights
            identity = encoder_identity(encoder, tokenizer)
            self._cache = TextCache(identity, self.pooling, limit, self.text_cache_mb, self.text_cache_dir)

        def compute(unknown: list[str]) -> TextStates:
            # One by one, so that a text gives the same numbers whatever texts it comes with.
            return stack_texts([encode_texts(encoder, tokenizer, [text], self.pooling, limit) for text in unknown])

        with full_precision(self.device):
            return self._cache(texts, compute).to(self.device)

    def generate(
        self,
        texts: Sequence[str] | None = None,
        length: int | None = None,
        seeds: Sequence[int] | None = None,
        embedding: Tensor | None = None,
        options: Sampling | None = None,
    ) -> Tensor:
        """Generate sound, with averaged weights where there are any.

        While networks are sharded, all ranks must call this equally often; each may ask for sound of its own.

        Args:
            texts: B texts; not read by a model without a text encoder.
            length: L in samples; null takes `sampler.seconds`, or the usual length of the network.
            seeds: B seeds of the noise, one per clip; by default 0 to B-1.
            embedding: (B,E), the condition of a network that reads vectors.
            options: how, instead of `sampler`.

        Returns:
            (B,C,L) float32 on the CPU, not clipped.

        Raises:
            ValueError: if nothing says how many clips there shall be.
        """
        options = options or self.sampler
        counts = [len(given) for given in (texts, embedding, seeds) if given is not None]
        if not counts:
            raise ValueError("generate: give texts, vectors or seeds, one for each clip")
        seeds = range(counts[0]) if seeds is None else seeds
        pipeline = self.pipeline()
        if length is None and options.seconds is not None:
            length = self._samples_in(options.seconds)
        guidance = options.guidance
        with self._sampling():
            made: Any = pipeline(
                **self._prompt(texts, embedding, options, counts[0]),
                audio_length_in_s=None if length is None else length / self.sample_rate,
                num_inference_steps=options.steps,
                guidance_scale=guidance.scale,
                guidance_rescale=guidance.rescale,
                guidance_interval=guidance.interval,
                guidance_plus=guidance.plus,
                generator=draws.generators(list(seeds), self.device),
                clip=False,  # whoever writes sound decides what becomes of peaks
                output_type="pt",
            )
        audio: Tensor = made.audios
        return audio.float().cpu()

    def _prompt(
        self, texts: Sequence[str] | None, embedding: Tensor | None, options: Sampling, count: int
    ) -> dict[str, Any]:
        """Arguments of the pipeline for the condition."""
        if self.text is None or texts is None:
            vector = None if embedding is None else embedding.to(self.device, torch.float32)
            return {"num_waveforms_per_prompt": count} if vector is None else {"text_vector": vector}
        negative = options.negative_prompt
        if self.text_encoder is None:
            return {"prompt": list(texts), "negative_prompt": negative}
        return {
            "text_states": self.encode(texts),
            "negative_text_states": None if negative is None else self.encode([negative]),
        }

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Sample without gradients and dropout, whole networks, and the precision of training."""
        if self._is_sampling:
            yield
            return
        net = self.net if self.ema is None else self.ema
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_dropout(net))
            stack.enter_context(gathered(net))
            if self._trainer is not None:
                stack.enter_context(self.trainer.precision_plugin.forward_context())
            stack.enter_context(full_precision(None))
            self._is_sampling = True
            stack.callback(setattr, self, "_is_sampling", False)
            yield

    def _seeds(self, use: int, number: int, count: int = 1) -> list[int]:
        return draws.draw(self.seed, use, [number * count + each for each in range(count)]).seeds

    def _lengths(self, batch: Batch, size: int) -> list[int]:
        """Samples to generate for every row."""
        usual = int(cast(Any, self.net.unet).config.sample_size)
        if self.sampler.seconds is not None:
            return [self._samples_in(self.sampler.seconds)] * size
        if "audio" in batch:
            return [batch["audio"].shape[-1]] * size
        seconds = batch.get("seconds")
        if seconds is None:
            return [usual] * size
        given = seconds.tolist() if isinstance(seconds, Tensor) else seconds
        return [usual if value is None else self._samples_in(value) for value in given]

    def _samples_in(self, seconds: float) -> int:
        return max(1, round(seconds * self.sample_rate))

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    def _keep(self, batch: Batch) -> None:
        """Copy the first rows, so that the rest of the batch can go."""
        rows = first_rows(batch, SAMPLES)
        self._newest = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in rows.items()
            if name in ("audio", "text", "embedding")
        }

    def sounds(self) -> dict[str, tuple[NDArray[np.float32], int]]:
        """A few clips of the newest batch, and what is generated for their texts, always from the same noise.

        With the option `prompts`, sound is generated for those instead. All ranks must call this; only the first one
        gets sounds.

        Returns:
            (C,L) float32 and samples per second, by names such as `real/0` and `generated/0`.
        """
        if not (self._newest or self.prompts):
            return {}
        newest = self._newest
        texts, vectors, length = self.prompts, None, None
        sounds: dict[str, tuple[NDArray[np.float32], int]] = {}
        if texts is None:
            texts, vectors = newest.get("text"), newest.get("embedding")
            real = newest["audio"].float().cpu().numpy()
            sounds = {f"real/{number}": (clip, self.sample_rate) for number, clip in enumerate(real)}
        if newest and self.sampler.seconds is None:
            length = newest["audio"].shape[-1]
        count = len(texts) if texts is not None else len(newest["audio"])
        if self.global_rank != 0:
            with self._sampling():  # only takes part in gathering what is sharded
                return {}
        seeds = [self._seeds(draws.SOUNDS, number)[0] for number in range(count)]
        generated = self.generate(texts, length, seeds, vectors).numpy()
        return sounds | {f"generated/{number}": (clip, self.sample_rate) for number, clip in enumerate(generated)}

    def sound_texts(self) -> dict[str, str]:
        """The texts of `sounds`, by their names."""
        if self.prompts is not None:
            return {f"generated/{number}": text for number, text in enumerate(self.prompts)}
        kinds = ("real", "generated")
        return {f"{kind}/{number}": text for kind in kinds for number, text in enumerate(self._newest.get("text", []))}

    def samples(self) -> list[dict[str, str | float]]:
        """A few rows of the newest batch: `text`, and peak and deviation of its sound."""
        if not self._newest:
            return []
        audio = self._newest["audio"].float()
        texts = self._newest.get("text", [""] * len(audio))
        levels = zip(texts, audio.abs().amax((1, 2)).tolist(), audio.square().mean((1, 2)).sqrt().tolist(), strict=True)
        return [{"text": text, "peak": peak, "deviation": strength} for text, peak, strength in levels]


@contextmanager
def full_precision(device: torch.device | None) -> Iterator[None]:
    """Make new tensors in float32, and let nothing be cast to 16 bits, whatever the precision of the run.

    Args:
        device: where casting ends; None leaves it as it is.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    kind = "cpu" if device is None else device.type
    try:
        with torch.autocast(kind, enabled=device is None and torch.is_autocast_enabled(kind)):
            yield
    finally:
        torch.set_default_dtype(default)


def rows_of(batch: Batch) -> int:
    """B."""
    return next(len(batch[name]) for name in ("audio", "text", "embedding", "index", "seconds") if name in batch)


def first_rows(batch: Batch, count: int) -> Batch:
    """The first rows of a batch."""

    def cut(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {name: cut(part) for name, part in value.items()}
        return value[:count] if isinstance(value, (Tensor, list, tuple)) else value

    return cast(Batch, cut(batch))
