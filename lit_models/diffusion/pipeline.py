"""From texts to waveforms: network, sampler and text encoder as one diffusers pipeline.

Shapes: B prompts times waveforms per prompt, C channels, L samples, n tokens, E width of the text encoder. Sound and z,
noisy sound, are float32 whatever the dtype of the network.
Source: ERNIE-Music (arXiv 2302.04456); see `samplers` for guidance and for sound that is to stay.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.unets.unet_1d_blocks import Downsample1d
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_models.diffusion import samplers
from lit_models.diffusion.conditions import Condition, common_rows, conditioned, pair, spread
from lit_models.diffusion.modeling import ALIGNMENT
from lit_models.diffusion.samplers import Generators, Guidance
from lit_models.diffusion.text import (
    TextStates,
    check_text_options,
    encode_texts,
    without_dropout,
)

Audio = Tensor | NDArray[Any] | Sequence[Any]
OnStepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]

VARIATION = 0.5
"""Strength of a variation unless told otherwise: as much noise as sound."""
SHORTEST = 3
"""Samples that diffusers' network needs at its lowest rate, because of the reflection at both ends."""


class TextToWaveformPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Makes waveforms of any length from texts, from a class or another vector, or from nothing.

    It also varies sound, fills gaps in it, and continues it. `save_pretrained` writes all parts, and
    `TextToWaveformPipeline.from_pretrained` reads them. Use this very class: the general
    `diffusers.DiffusionPipeline.from_pretrained` fails on the folder, since it only knows pipelines of its own package.

    Args:
        unet: `WaveformUNet1DModel`, diffusers' `UNet1DModel` in the layout of Dance Diffusion, or a module that takes z
            and t as they do. Its configuration tells `in_channels`, `sample_size`, `sample_rate` and `data_scale`.
        scheduler: `VDDIMScheduler`, `VDPMSolverScheduler`, or one of diffusers that `samplers.model_times` knows.
        text_encoder: reads the prompts; see `text.load_text_encoder`.
        tokenizer: of the text encoder.
        pooling: how a prompt becomes one vector; see `text.resolve_pooling`.
        max_tokens: most tokens of a prompt; longer ones are cut.

    Raises:
        ValueError: if an encoder comes without a tokenizer, or an option is out of its range.

    Example::

        pipeline = TextToWaveformPipeline.from_pretrained("runs/diffusion-tiny/export/model")
        audio = pipeline("a slow waltz on the harp", generator=torch.Generator().manual_seed(0)).audios[0]
        soundfile.write("waltz.wav", audio.T, pipeline.sample_rate)
    """

    _optional_components = ["text_encoder", "tokenizer"]  # type: ignore[assignment]  # noqa: RUF012

    unet: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,  # noqa: ANN401  (any scheduler of diffusers)
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pooling: str = "auto",
        max_tokens: int = 128,
    ) -> None:
        super().__init__()
        check_text_options(pooling, max_tokens)
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("text_encoder: an encoder and its tokenizer belong together; give both or neither")
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(pooling=pooling, max_tokens=max_tokens)

    # -- what the network is like --------------------------------------------------------------------------------------

    def _setting(self, name: str) -> Any:  # noqa: ANN401
        """Entry of the network's configuration, or None."""
        config = getattr(self.unet, "config", None)
        return getattr(self.unet if config is None else config, name, None)

    @property
    def sample_rate(self) -> int | None:
        """Samples per second, or None if the network's configuration does not tell."""
        return self._setting("sample_rate")

    @property
    def channels(self) -> int:
        """C, channels of sound."""
        return int(self._setting("in_channels"))

    @property
    def data_scale(self) -> float:
        """Factor on waveforms before they are diffused."""
        return float(self._setting("data_scale") or 1.0)

    @property
    def reads_vector(self) -> bool:
        """Whether the network reads the vector of a text."""
        return bool(getattr(self.unet, "uses_vector", False))

    @property
    def reads_tokens(self) -> bool:
        """Whether the network attends to the tokens of a text."""
        return bool(getattr(self.unet, "uses_tokens", False))

    def _device_of_unet(self) -> torch.device:
        parameter = next(self.unet.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _samples(self, seconds: float) -> int:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"audio_length_in_s: {seconds} is not a length; give a positive number of seconds")
        if self.sample_rate is None:
            raise ValueError(
                "audio_length_in_s: the network's configuration has no sample_rate; set it, or leave the length out"
            )
        samples = round(seconds * self.sample_rate)
        if samples < 1:
            raise ValueError(
                f"audio_length_in_s: {seconds} s are less than one sample at {self.sample_rate} Hz; raise it"
            )
        return samples

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write all parts and `model_index.json`, as `DiffusionPipeline.save_pretrained` does.

        Args:
            save_directory: folder.
            *args: see `DiffusionPipeline.save_pretrained`.
            **kwargs: see there.
        """
        if self.text_encoder is not None:
            import transformers

            # Encoder halves such as BartEncoder are no top-level names of transformers, where diffusers would look.
            kind = type(self.text_encoder)
            if kind.__module__.startswith("transformers.") and not hasattr(transformers, kind.__name__):
                self.register_to_config(text_encoder=(kind.__module__, kind.__name__))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """Load what `save_pretrained` wrote, as `DiffusionPipeline.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: folder or name on the hub.
            **kwargs: see `DiffusionPipeline.from_pretrained`.

        Returns:
            The pipeline, with networks in evaluation mode.
        """
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if pipeline.text_encoder is not None:
            align_memory(pipeline.text_encoder)  # or the same text would be rounded differently than before
        return pipeline

    # -- conditions ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> TextStates:
        """What the text encoder says about prompts; pass it as `text_states` to use it again.

        Args:
            prompt: one or B texts.

        Returns:
            Vectors, states and mask, on the encoder's device.

        Raises:
            ValueError: if the pipeline has no text encoder, or something is not a text.
        """
        if self.text_encoder is None:
            raise ValueError(
                "prompt: the pipeline has no text encoder; give it text_encoder and tokenizer, or pass text_states or "
                "text_vector instead of a prompt"
            )
        texts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt: {prompt!r} is not a text; give a string or a list of strings")
        config: Any = self.config
        with without_dropout(self.text_encoder):
            return encode_texts(self.text_encoder, self.tokenizer, texts, config.pooling, config.max_tokens)

    def _condition(
        self,
        prompt: str | Sequence[str] | None,
        states: TextStates | None,
        vector: Tensor | None,
        prefix: str = "",
    ) -> Condition | None:
        """What the network reads of a text that is given in one of three ways; None without one."""
        given = {f"{prefix}prompt": prompt, f"{prefix}text_states": states, f"{prefix}text_vector": vector}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            return None
        if len(names) > 1:
            raise ValueError(f"{names[0]}: {' and '.join(names)} say the same; give one of them")
        if not (self.reads_vector or self.reads_tokens):
            raise ValueError(
                f"{names[0]}: the network was made without a text; leave it out, or set the unet's text_dim"
            )
        if vector is not None:
            if not self.reads_vector:
                raise ValueError(f"{names[0]}: the network reads no vector; set the unet's fuse or adaln")
            if vector.ndim != 2:
                raise ValueError(f"{names[0]}: shape {tuple(vector.shape)} is not (prompts, width); reshape it")
        elif states is None:
            assert prompt is not None
            states = self.encode_prompt(prompt)
        device = self._device_of_unet()
        condition = Condition(vector if vector is None else vector.to(device, torch.float32))
        if states is not None:
            states = TextStates(*states).to(device)
            condition = Condition(states.vector) if self.reads_vector else condition
            if self.reads_tokens:
                condition = condition._replace(states=states.states, mask=states.mask.bool())
        wanted = self._setting("text_dim")
        for part in (condition.vector, condition.states):
            if part is not None and wanted is not None and part.shape[-1] != wanted:
                raise ValueError(
                    f"{names[0]}: the text has width {part.shape[-1]} but the network reads {wanted}; use the encoder "
                    "it was trained with"
                )
        return condition

    # -- sound that exists already -------------------------------------------------------------------------------------

    def _audio(self, audio: Audio, name: str = "init_audio") -> Tensor:
        """(A, C, any length) float32 on the network's device."""
        sound = torch.as_tensor(np.asarray(audio) if isinstance(audio, (list, tuple)) else audio)
        if not sound.is_floating_point():
            raise ValueError(f"{name}: values of type {sound.dtype} are no waveform; give floats between -1 and 1")
        if not 1 <= sound.ndim <= 3 or sound.numel() == 0:
            raise ValueError(
                f"{name}: shape {tuple(sound.shape)} is not (length,), (channels, length) or (batch, channels, length)"
            )
        sound = sound[(None,) * (3 - sound.ndim)].to(self._device_of_unet(), torch.float32)
        if sound.shape[1] != self.channels:
            raise ValueError(
                f"{name}: it has {sound.shape[1]} channels in shape {tuple(sound.shape)} but the network makes "
                f"{self.channels}; repeat a mono channel, or average stereo ones"
            )
        if not sound.isfinite().all():
            raise ValueError(f"{name}: it holds NaN or infinite values; repair the sound first")
        return sound

    def _mask(self, mask: Audio, audio: Tensor, rows: int) -> Tensor:
        """(1 or rows, 1 or C, length of the audio) bool."""
        keep = torch.as_tensor(np.asarray(mask) if isinstance(mask, (list, tuple)) else mask)
        if not ((keep == 0) | (keep == 1)).all():
            raise ValueError("mask: values are neither true nor false; use true where the audio is to stay")
        length = audio.shape[-1]
        fits = 1 <= keep.ndim <= 3 and keep.shape[-1] == length
        shape = (1,) * (3 - keep.ndim) + tuple(keep.shape)
        if not fits or shape[1] not in (1, self.channels) or shape[0] not in (1, rows):
            raise ValueError(
                f"mask: shape {tuple(keep.shape)} does not fit audio of {length} samples; give ({length},), "
                f"(channels, {length}) or (batch, channels, {length}) with {self.channels} or 1 channels"
            )
        return keep.reshape(shape).bool().to(audio.device)

    # -- sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_plus: bool = False,
        num_waveforms_per_prompt: int = 1,
        generator: Generators = None,
        init_audio: Audio | None = None,
        strength: float | None = None,
        mask: Audio | None = None,
        resamples: int = 1,
        text_states: TextStates | None = None,
        negative_text_states: TextStates | None = None,
        text_vector: Tensor | None = None,
        negative_text_vector: Tensor | None = None,
        latents: Tensor | None = None,
        output_type: Literal["np", "pt"] = "np",
        clip: bool = True,
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> AudioPipelineOutput | tuple[Any]:
        """Make waveforms.

        Args:
            prompt: what they should sound like; None for no condition, which "" is not.
            negative_prompt: what they should not sound like, in place of the null condition of guidance; one for all
                prompts, or one each.
            audio_length_in_s: seconds, any; None for the length of `init_audio` or `latents`, or else the network's
                `sample_size`.
            num_inference_steps: steps of the sampler, each a call of the network.
            guidance_scale: weight of the prompt; 1 is without guidance, 0 ignores the prompt.
            guidance_rescale: share, in [0, 1], of the result that gets back the loudness it has without guidance.
            guidance_interval: guide only where the share σ of noise is in this interval.
            guidance_plus: CFG++, for scales between 0 and 1.
            num_waveforms_per_prompt: how many of each; they follow each other in the result.
            generator: source of all noise, or a list with one for each waveform. With a list, each waveform is the one
                that its prompt and generator give alone, whatever else is in the batch.
            init_audio: (L,), (C, L) or (B, C, L) floats in [-1, 1] at the network's sample rate: sound to vary or, with
                a mask, to keep in part. It is cut or filled with silence to `audio_length_in_s`.
            strength: how much it is varied: the time, in (0, 1], to which noise is added; 1 leaves nothing of it. By
                default 0.5, and 1 with a mask.
            mask: (L,), (C, L) or (B, C, L), bool or 0 and 1: **true where `init_audio` stays as it is, false where new
                sound is made**. What `audio_length_in_s` adds at the end is new.
            resamples: calls of the network per step where a mask is given.
            text_states: what `encode_prompt` returned, in place of a prompt.
            negative_text_states: the same in place of a negative prompt.
            text_vector: (B, E) vector alone, for example of a class, in place of a prompt; attention then has no text.
            negative_text_vector: the same in place of a negative prompt.
            latents: (B, C, L) standard normal noise to start from, or to add to `init_audio`. Without another length
                given, L decides it; L may also be the rounder length that the network needs for it.
            output_type: "np" for an array, "pt" for a tensor.
            clip: keep waveforms in [-1, 1], as sound files need; False gives them as the sampler made them.
            return_dict: whether to return an object.
            callback_on_step_end: called after each step with the pipeline, the number of the step, its time and
                {"latents": z}; z is longer than the waveforms where the network needs a rounder length. It may return a
                dictionary with a z that replaces it.

        Returns:
            `AudioPipelineOutput` whose `audios` are (B, C, L) float32, or a tuple of them.

        Raises:
            ValueError: if arguments contradict each other or the network, naming the argument.
        """
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type: {output_type!r} is unknown; choose np or pt")
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_waveforms_per_prompt", num_waveforms_per_prompt),
        ):
            if count < 1:
                raise ValueError(f"{name}: {count} is not a number of them; use 1 or more")
        positive = self._condition(prompt, text_states, text_vector)
        negative = self._condition(negative_prompt, negative_text_states, negative_text_vector, "negative_")
        source = None if init_audio is None else self._audio(init_audio)
        if source is None and (mask is not None or strength is not None):
            name = "strength" if mask is None else "mask"
            raise ValueError(f"{name}: there is no sound to keep; give init_audio")
        given = {"prompt": positive, "negative_prompt": negative}
        sizes = {name: condition.rows for name, condition in given.items() if condition is not None}
        prompts = common_rows(sizes if source is None else sizes | {"init_audio": len(source)})
        rows = prompts * num_waveforms_per_prompt
        if prompts == 1 and latents is not None and len(latents) and len(latents) % rows == 0:
            rows = len(latents)
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"generator: {len(generator)} generators do not fit {rows} waveforms; give one for each")

        length = self._length(audio_length_in_s, source, latents)
        padded = _padded_length(self.unet, length)
        keep = None
        if source is not None:
            keep = None if mask is None else spread(self._mask(mask, source, prompts), rows)
            source = spread(_fitted(source, length), rows)
            keep = None if keep is None else _fitted(keep, length)
        if strength is None:
            strength = 1.0 if keep is not None or source is None else VARIATION
        self._set_grid(num_inference_steps, strength, keep is not None)

        noise = self._noise((rows, self.channels, length), latents, generator, padded)
        z = noise * self.scheduler.init_noise_sigma
        if source is not None and strength < 1:
            scaled = _fitted(source * self.data_scale, padded)
            z = self.scheduler.add_noise(scaled, noise, self.scheduler.timesteps[0])
        guidance = _guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_plus)
        if positive is None and negative is None:
            guidance = Guidance(scale=1.0)
        predict = self._predictor(guidance, positive, negative, rows)

        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:

            def on_step(index: int, time: float, z: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                return (callback_on_step_end(self, index, time, {"latents": z}) or {}).get("latents")

            if keep is None or source is None:
                z = samplers.denoise(predict, self.scheduler, z, generator, on_step)
            else:
                scaled, stays = _fitted(source * self.data_scale, padded), _fitted(keep, padded)
                z = samplers.inpaint(predict, self.scheduler, z, scaled, stays, resamples, generator, on_step=on_step)

        sound = z[..., :length] / self.data_scale
        if keep is not None and source is not None:
            sound = torch.where(keep, source, sound)  # exactly, since scaling rounds
        sound = sound.clamp(-1, 1) if clip else sound
        audios: Any = sound.cpu().numpy() if output_type == "np" else sound
        return AudioPipelineOutput(audios=audios) if return_dict else (audios,)

    def continue_audio(
        self,
        audio: Audio,
        prompt: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        overlap_in_s: float | None = None,
        output_type: Literal["np", "pt"] = "np",
        **options: Any,  # noqa: ANN401
    ) -> AudioPipelineOutput:
        """Go on after the end of sound.

        The end of the sound is kept as the beginning of a new clip, to whose rest the network attends while it is made.

        Args:
            audio: (L,), (C, L) or (B, C, L), as `init_audio`.
            prompt: what should follow.
            audio_length_in_s: seconds of the new clip, overlap included; None for the network's usual length.
            overlap_in_s: seconds of the old sound that the network hears; None for half of the new clip, or all of the
                sound if it is shorter.
            output_type: "np" or "pt".
            **options: further arguments of the pipeline, except those about existing sound.

        Returns:
            The old sound with the new one after it, (B, C, old + new - overlap) float32.

        Raises:
            ValueError: as the pipeline does, or if the overlap is not shorter than both.
        """
        sound = self._audio(audio, "audio")
        length = self._length(audio_length_in_s, None, None)
        overlap = min(max(length // 2, 1), sound.shape[-1])
        if overlap_in_s is not None:
            overlap = self._samples(overlap_in_s)
        clip, keep = samplers.continuation(sound, length, overlap)
        made: Any = self(prompt, init_audio=clip, mask=keep, output_type="pt", **options)
        new = made.audios
        joined = samplers.continued(spread(sound, len(new)), new, overlap)
        audios: Any = joined.cpu().numpy() if output_type == "np" else joined
        return AudioPipelineOutput(audios=audios)

    def _length(self, seconds: float | None, source: Tensor | None, latents: Tensor | None) -> int:
        if seconds is not None:
            return self._samples(seconds)
        for given in (source, latents):
            if given is not None:
                return int(given.shape[-1])
        return int(self._setting("sample_size"))

    def _set_grid(self, steps: int, strength: float, keeps: bool) -> None:
        """Lay out the times of the scheduler."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength: {strength} is not in (0, 1]; 1 leaves nothing of init_audio")
        if keeps and not isinstance(self.scheduler, samplers.VDDIMScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(f"mask: {name} cannot keep sound; give the pipeline a VDDIMScheduler")
        options: dict[str, Any] = {}
        if strength < 1:
            if "start" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                name = type(self.scheduler).__name__
                raise ValueError(f"strength: {name} cannot start from sound; use VDDIMScheduler or VDPMSolverScheduler")
            options["start"] = strength
        self.scheduler.set_timesteps(steps, device=self._device_of_unet(), **options)

    def _noise(self, shape: tuple[int, int, int], latents: Tensor | None, generator: Generators, padded: int) -> Tensor:
        """Noise to start from, with more after it up to the length that the network needs."""
        device = self._device_of_unet()
        if latents is None:
            noise = randn_tensor(shape, generator, device, torch.float32)
        elif tuple(latents.shape) not in (shape, (*shape[:2], padded)):
            raise ValueError(f"latents: shape {tuple(latents.shape)} is not {shape}, (waveforms, channels, length)")
        else:
            noise = latents.to(device, torch.float32)
        if padded == noise.shape[-1]:
            return noise
        # Zeros would be no noise of unit variance. The same for all clips, so that results follow from the noise above.
        fixed = torch.Generator().manual_seed(0)
        rest = torch.randn(1, shape[1], padded - shape[2], generator=fixed, dtype=torch.float32)
        return torch.cat([noise, rest.to(device).expand(shape[0], -1, -1)], -1)

    def _predictor(
        self, guidance: Guidance, positive: Condition | None, negative: Condition | None, rows: int
    ) -> samplers.Predictor:
        branches = {guidance.branch_at(time) for time in samplers.model_times(self.scheduler)}
        if branches == {"conditional"}:
            condition = Condition() if positive is None else positive.spread(rows)
        else:
            plus, minus = (None if item is None else item.spread(rows) for item in (positive, negative))
            condition = pair(plus, minus, rows, self.unet)
        return guidance.predictor(conditioned(self.unet, condition, rows))


# -- helpers -----------------------------------------------------------------------------------------------------------


def _guidance(scale: float, rescale: float, interval: tuple[float, float], plus: bool) -> Guidance:
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale: {scale} is not a number; 1 is without guidance and 3 is usual")
    try:
        return Guidance(scale, rescale, tuple(interval), plus)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"guidance_{error}") from error


def _fitted(sound: Tensor, length: int) -> Tensor:
    """Cut, or add zeros at the end."""
    return nn.functional.pad(sound[..., :length], (0, max(0, length - sound.shape[-1])))


def _padded_length(unet: nn.Module, length: int) -> int:
    """Length in samples that a network can process without padding by itself."""
    if hasattr(unet, "padded_length"):
        network: Any = unet
        return int(network.padded_length(length))
    halvings = sum(isinstance(module, Downsample1d) for module in unet.modules())
    if not halvings:
        return length
    return max(math.ceil(length / 2**halvings), SHORTEST) * 2**halvings


def align_memory(network: nn.Module) -> None:
    """Move weights that lie anywhere in a file to where torch would put them; see `WaveformUNet1DModel`."""
    for parameter in network.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
