"""Samplers of v-diffusion as diffusers schedulers, guidance, and what is done with sound that exists already.

Shapes: B clips, C channels, L samples. All samplers hold z, noisy sound of unit variance, in float32, and take the
velocity of the network; see `functional` for the process. A predictor is any function of z and of the time as a number
that returns a `Prediction`. Sound is never clipped here, since `data_scale` may give it any amplitude.
Sources: ERNIE-Music (arXiv 2302.04456), DDIM (arXiv 2010.02502), DPM-Solver++ (arXiv 2211.01095), classifier-free
guidance (arXiv 2207.12598), its rescaling (arXiv 2305.08891), its interval (arXiv 2404.07724), CFG++ (arXiv
2406.08070), RePaint (arXiv 2201.09865).
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lit_models.diffusion import functional

Spacing = Literal["linear", "crash"]
Branch = Literal["conditional", "unconditional", "both"]
Generators = torch.Generator | list[torch.Generator] | None


class Prediction(NamedTuple):
    """What a predictor says about noisy sound.

    Args:
        velocity: (B, C, L), guided.
        unconditional: (B, C, L) velocity without the text, from which CFG++ takes the noise; None elsewhere.
    """

    velocity: Tensor
    unconditional: Tensor | None = None


Predictor = Callable[[Tensor, float], Prediction]


@dataclass
class WaveformSchedulerOutput(BaseOutput):
    """Result of a step.

    Args:
        prev_sample: (B, C, L) float32, z at the next, less noisy time.
        pred_original_sample: (B, C, L) float32, the clean sound that the velocity implies.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


# -- guidance ----------------------------------------------------------------------------------------------------------


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance, v_u + w (v_c - v_u).

    Args:
        conditional: (B, C, L) velocity with the text.
        unconditional: (B, C, L) velocity without it, or with the negative prompt.
        scale: w; 1 gives the conditional velocity and 0 the unconditional one.
        rescale: share, in [0, 1], of the result that gets the deviation of the conditional velocity back. Deviations
            are those of whole clips, so that mono is fine.

    Returns:
        (B, C, L).
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale:
        dims = tuple(range(1, guided.dim()))
        ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        guided = rescale * guided * ratio + (1 - rescale) * guided
    return guided


@dataclass(frozen=True)
class Guidance:
    """How strongly a sample follows its text.

    Args:
        scale: weight of the text; 1 for none beyond the conditional velocity, 0 to ignore the text.
        rescale: see `guide`; with it, loud scales stay quiet.
        interval: guide only where σ is in this closed interval, and sample with scale 1 elsewhere.
        plus: CFG++: the clean sound comes from the guided velocity and the noise from the unconditional one. Meant for
            scales between 0 and 1.

    Raises:
        ValueError: if a value is out of its range, naming it.
    """

    scale: float = 3.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    plus: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale: {self.rescale} is not in [0, 1]; 0 switches rescaling off and 0.7 is usual.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"interval: {self.interval} is not two rising numbers in [0, 1]; use [0.0, 1.0] for all.")

    def scale_at(self, time: float) -> float:
        """The scale at a time."""
        sigma = math.sin(functional.HALF_PI * time)
        return self.scale if self.interval[0] <= sigma <= self.interval[1] else 1.0

    def branch_at(self, time: float) -> Branch:
        """Which velocities are needed at a time; both cost twice as much as one."""
        scale = self.scale_at(time)
        if scale == 0:
            return "unconditional"
        return "conditional" if scale == 1 and not self.is_plus_at(time) else "both"

    def is_plus_at(self, time: float) -> bool:
        """Whether the noise comes from the unconditional velocity at a time; outside the interval it does not."""
        sigma = math.sin(functional.HALF_PI * time)
        return self.plus and self.interval[0] <= sigma <= self.interval[1]

    def predictor(self, network: Callable[[Tensor, Tensor, Branch], Tensor]) -> Predictor:
        """A predictor that asks a network for no more than is needed.

        Args:
            network: function of z, t (rows,) float32 and the branch, to velocities. For "both", z and t come twice and
                the first half is to be conditional, so that it is one forward pass.
        """

        def predict(z: Tensor, time: float) -> Prediction:
            branch, scale = self.branch_at(time), self.scale_at(time)
            rows = len(z) * (2 if branch == "both" else 1)
            t = torch.full((rows,), time, device=z.device, dtype=torch.float32)
            if branch != "both":
                return Prediction(functional.precise(network(z, t, branch)))
            both = functional.precise(network(torch.cat([z, z]), t, branch))
            conditional, unconditional = both.chunk(2)
            guided = guide(conditional, unconditional, scale, self.rescale)
            return Prediction(guided, unconditional if self.is_plus_at(time) else None)

        return predict


# -- schedulers --------------------------------------------------------------------------------------------------------


def _shares(time: float) -> tuple[float, float]:
    """α and σ in double precision; as numbers, they don't wait for a device."""
    return math.cos(functional.HALF_PI * time), math.sin(functional.HALF_PI * time)


def ddim_update(
    z: Tensor,
    v: Tensor,
    time: float,
    next_time: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
    noise_velocity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DDIM in terms of velocities.

    Args:
        z: (B, C, L) at `time`.
        v: (B, C, L) velocity there.
        time: in (0, 1].
        next_time: in [0, time].
        eta: share of fresh noise, 0 for none and 1 for as much as ancestral sampling adds.
        noise: (B, C, L) standard normal, needed where `eta` is above 0 and `next_time` too.
        noise_velocity: velocity from which the noise is taken; None for `v`.

    Returns:
        z at `next_time` and the clean sound that `v` implies, both (B, C, L) float32 or float64.
    """
    (alpha, sigma), (next_alpha, next_sigma) = _shares(time), _shares(next_time)
    z, v = functional.precise(z), functional.precise(v)
    x0 = alpha * z - sigma * v
    epsilon = sigma * z + alpha * (v if noise_velocity is None else functional.precise(noise_velocity))
    if next_time == 0:
        return x0, x0
    if eta == 0 or noise is None:
        return next_alpha * x0 + next_sigma * epsilon, x0
    fresh = eta * next_sigma / sigma * math.sqrt(max(0.0, 1 - (alpha / next_alpha) ** 2))
    kept = math.sqrt(max(0.0, next_sigma**2 - fresh**2))
    return next_alpha * x0 + kept * epsilon + fresh * noise, x0


class _WaveformScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A grid of times, and the place in it."""

    order = 1

    times: tuple[float, ...]
    """The grid as numbers, n+1 times that fall to 0; empty before `set_timesteps`."""
    timesteps: Tensor
    """The times at which the network is called, (n,) float32."""
    num_inference_steps: int | None

    def _reset(self, times: list[float], device: torch.device | str | None) -> None:
        if any(later >= earlier for earlier, later in pairwise(times)) or not 0 < times[0] <= 1:
            raise ValueError("timesteps: the times don't fall from at most 1 to 0; give falling times above 0.")
        self.times = tuple(times)
        self.timesteps = torch.tensor(times[:-1], dtype=torch.float32, device=device)
        self.num_inference_steps = len(times) - 1
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _clear(self) -> None:
        self.times, self.timesteps, self.num_inference_steps = (), torch.empty(0), None
        self._step_index = self._begin_index = None

    @staticmethod
    def _check_grid(num_inference_steps: int | None, start: float) -> int:
        if num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: {num_inference_steps} is not a number of steps; use 1 or more.")
        if not 0 < start <= 1:
            raise ValueError(f"start: {start} is not in (0, 1]; use 1.0 to start from noise.")
        return num_inference_steps

    @property
    def step_index(self) -> int | None:
        """Number of the next step, or None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first step, where it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step comes first, instead of finding it by its time."""
        self._begin_index = begin_index

    def _advance(self, timestep: float | Tensor) -> tuple[int, float, float]:
        """Number of this step, its time and the next one; counts on."""
        if not self.times:
            raise ValueError("num_inference_steps: the scheduler has no grid yet; call set_timesteps before step.")
        if self._step_index is None:
            self._step_index = self._begin_index
        if self._step_index is None:
            wanted = float(timestep)
            self._step_index = min(range(len(self.times) - 1), key=lambda index: abs(self.times[index] - wanted))
        index = self._step_index
        if index >= len(self.times) - 1:
            raise ValueError("num_inference_steps: the grid is used up; call set_timesteps before another sample.")
        self._step_index += 1
        return index, self.times[index], self.times[index + 1]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: z has unit variance at all times."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy sound at the given times, as in training; see `functional.diffuse`."""
        return functional.diffuse(original_samples, noise, timesteps.to(original_samples.device))


class VDDIMScheduler(_WaveformScheduler):
    """DDIM for velocities at continuous times, in n calls of the network for n steps.

    Options are given by name, because diffusers takes those given by place for defaults.

    Args:
        spacing: "linear" times, or "crash" for smaller steps at little noise.
        eta: share of fresh noise, 0 for none and 1 for as much as ancestral sampling adds.

    Raises:
        ValueError: if `spacing` is unknown or `eta` not in [0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, *, spacing: Spacing = "linear", eta: float = 0.0) -> None:
        if spacing not in get_args(Spacing):
            raise ValueError(f"spacing: {spacing!r} is unknown; choose one of {', '.join(get_args(Spacing))}.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: {eta} is not in [0, 1]; use 0.0 for sampling without fresh noise.")
        self.spacing, self.eta = spacing, eta
        self._clear()

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the noise that sampling starts from."""
        return 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        start: float = 1.0,
        timesteps: list[float] | None = None,
    ) -> None:
        """Lay out a grid.

        Args:
            num_inference_steps: n.
            device: where `timesteps` is to be.
            start: first time; below 1 to vary existing sound.
            timesteps: the times themselves, without the 0 at the end, in place of the other options.

        Raises:
            ValueError: if an option is out of its range.
        """
        if timesteps is not None:
            self._reset([*map(float, timesteps), 0.0], device)
            return
        count = self._check_grid(num_inference_steps, start)
        line = torch.arange(count, -1, -1, dtype=torch.float64) / count
        if self.spacing == "crash":
            first = functional.crash_time_inverse(torch.tensor(start, dtype=torch.float64))
            times = functional.crash_time(line * first)
        else:
            times = line * start
        self._reset([start, *times[1:].tolist()], device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        unconditional_output: Tensor | None = None,
        return_dict: bool = True,
    ) -> WaveformSchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the next time.

        Args:
            model_output: (B, C, L) velocity.
            timestep: time of the sample, which tells the place in the grid at the first step.
            sample: (B, C, L) z.
            generator: source of the fresh noise.
            variance_noise: (B, C, L) the fresh noise itself.
            unconditional_output: (B, C, L) velocity that gives the noise, for CFG++; None for `model_output`.
            return_dict: whether to return names, or a tuple of the same.

        Returns:
            z at the next time and the clean sound that the velocity implies.
        """
        _, time, following = self._advance(timestep)
        noise = variance_noise
        if self.eta > 0 and following > 0 and noise is None:
            noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
        z, x0 = ddim_update(sample, model_output, time, following, self.eta, noise, unconditional_output)
        return WaveformSchedulerOutput(prev_sample=z, pred_original_sample=x0) if return_dict else (z, x0)


class VDPMSolverScheduler(_WaveformScheduler):
    """DPM-Solver++ of second order, which needs half the calls or fewer for an error that v-DDIM reaches.

    The ratio of noise to sound falls by one factor per step, from `sigma_max` to `sigma_min`, and then to 0.
    Options are given by name, as those of `VDDIMScheduler`.

    Args:
        sigma_max: first σ/α. Starting there instead of at ∞ leaves an error of about 1/sigma_max of the data's scale,
            however many steps follow.
        sigma_min: last σ/α above 0; matters at high amplitudes only, see `data_scale`.

    Raises:
        ValueError: if not 0 < sigma_min < sigma_max.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, *, sigma_max: float = 80.0, sigma_min: float = 0.02) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min: {sigma_min} is not between 0 and sigma_max {sigma_max}; lower it.")
        self.sigma_max, self.sigma_min = sigma_max, sigma_min
        self._clear()
        self._previous: Tensor | None = None

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the noise that sampling starts from: σ of the first time, almost 1."""
        return self.sigma_max / math.sqrt(1 + self.sigma_max**2)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None, start: float = 1.0
    ) -> None:
        """Lay out a grid.

        Args:
            num_inference_steps: n.
            device: where `timesteps` is to be.
            start: first time; it counts where it is less noisy than `sigma_max`.

        Raises:
            ValueError: if an option is out of its range, or `start` is less noisy than `sigma_min`.
        """
        count = self._check_grid(num_inference_steps, start)
        highest = min(self.sigma_max, math.tan(functional.HALF_PI * min(start, functional.LATEST)))
        if highest <= self.sigma_min and count > 1:
            raise ValueError(f"start: {start} is less noisy than sigma_min {self.sigma_min}; raise it or lower that.")
        ratio = self.sigma_min / highest
        sigmas = [highest * ratio ** (step / (count - 1)) for step in range(1, count)]
        times = [math.atan(sigma) / functional.HALF_PI for sigma in (highest, *sigmas)]
        self._reset([*times, 0.0], device)
        self._previous = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> WaveformSchedulerOutput | tuple[Tensor, Tensor]:
        """Go to the next time; the arguments are those of `VDDIMScheduler.step`, and nothing is random."""
        index, time, following = self._advance(timestep)
        (alpha, sigma), (next_alpha, next_sigma) = _shares(time), _shares(following)
        z, v = functional.precise(sample), functional.precise(model_output)
        x0 = alpha * z - sigma * v
        if following == 0:
            z = x0
        else:
            step = math.log(next_alpha * sigma / (alpha * next_sigma))
            clean = x0
            if self._previous is not None:
                before = math.log(
                    alpha * _shares(self.times[index - 1])[1] / (_shares(self.times[index - 1])[0] * sigma)
                )
                clean = x0 + (x0 - self._previous) * (step / (2 * before))
            z = next_sigma / sigma * z - next_alpha * math.expm1(-step) * clean
        self._previous = x0
        return WaveformSchedulerOutput(prev_sample=z, pred_original_sample=x0) if return_dict else (z, x0)


def ddim_options(train_steps: int = 1000) -> dict[str, Any]:
    """Options with which diffusers' own `DDIMScheduler` follows this process on a grid of times.

    Args:
        train_steps: number of times of the grid, a multiple of the number of sampling steps; see `model_times`.
    """
    kept = [math.cos(functional.HALF_PI * (step + 1) / train_steps) ** 2 for step in range(train_steps - 1)]
    kept = [1.0, *kept, 0.0]
    return {
        "num_train_timesteps": train_steps,
        "trained_betas": [1 - later / earlier for earlier, later in pairwise(kept)],
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
    }


def model_times(scheduler: Any) -> list[float]:  # noqa: ANN401  (any scheduler of diffusers)
    """The times t to call the network at, one per step of a scheduler, of whichever class.

    Args:
        scheduler: one of ours, one of diffusers with σ/α in `sigmas` (the EDM ones), or a DDIM on a grid; after
            `set_timesteps`.

    Raises:
        ValueError: if the scheduler has neither.
    """
    if isinstance(scheduler, _WaveformScheduler):
        return list(scheduler.times[:-1])
    name = type(scheduler).__name__
    if name.startswith("IPNDM"):  # its own times are those of this process
        return scheduler.timesteps.tolist()
    if hasattr(scheduler.config, "sigma_data"):
        if scheduler.config.get("prediction_type") != "v_prediction" or scheduler.config.sigma_data != 1:
            raise ValueError(f"scheduler: {name} is not set up for velocities; use v_prediction and sigma_data 1.0.")
        return functional.time_of_edm_sigma(scheduler.sigmas[: len(scheduler.timesteps)].double()).tolist()
    if name.startswith("DDIM"):
        return ((scheduler.timesteps.double() + 1) / scheduler.config.num_train_timesteps).tolist()
    raise ValueError(f"scheduler: {name} does not follow v-diffusion; use VDDIMScheduler or an EDM scheduler.")


# -- sampling loops ----------------------------------------------------------------------------------------------------


def denoise(
    predict: Predictor,
    scheduler: Any,  # noqa: ANN401  (any scheduler of diffusers)
    z: Tensor,
    generator: Generators = None,
    on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Sample with a scheduler on which `set_timesteps` was called.

    Args:
        predict: see the module.
        scheduler: any that `model_times` knows.
        z: (B, C, L) start: noise times `init_noise_sigma`, or noisy sound (`add_noise`) at the first time of our own
            schedulers.
        generator: source of fresh noise, for schedulers that add any.
        on_step: called after each step with its number, its time and z; what it returns, if anything, replaces z.

    Returns:
        (B, C, L) float32, clean sound times `data_scale`.

    Raises:
        ValueError: if the scheduler cannot do CFG++ and the predictor asks for it.
    """
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
    z = functional.precise(z)
    for index, (time, timestep) in enumerate(zip(model_times(scheduler), scheduler.timesteps, strict=True)):
        prediction = predict(scheduler.scale_model_input(z, timestep), time)
        if prediction.unconditional is not None:
            if "unconditional_output" not in accepted:
                raise ValueError("guidance.plus: this scheduler has no CFG++; use VDDIMScheduler, or plus: false.")
            options["unconditional_output"] = prediction.unconditional
        else:
            options.pop("unconditional_output", None)
        z = scheduler.step(prediction.velocity, timestep, z, return_dict=False, **options)[0]
        if on_step is not None:
            changed = on_step(index, time, z)
            z = z if changed is None else changed
    return z


def heun(predict: Predictor, times: tuple[float, ...], z: Tensor) -> Tensor:
    """Sample with Heun's method in σ/α, two calls per step but one in the last.

    Args:
        predict: see the module; CFG++ is not possible.
        times: falling grid of n+1 times below 1 that ends at 0.
        z: (B, C, L) at the first time.

    Returns:
        (B, C, L) float32.
    """
    ratios = [math.tan(functional.HALF_PI * time) for time in times]
    z = functional.precise(z)
    for time, following, ratio, next_ratio in zip(times, times[1:], ratios, ratios[1:], strict=False):
        (alpha, sigma), (next_alpha, next_sigma) = _shares(time), _shares(following)
        v = functional.precise(predict(z, time).velocity)
        slope = sigma * z + alpha * v  # the noise is the derivative of z/α by σ/α
        if following == 0:
            return alpha * z - sigma * v
        guess = next_alpha * (z / alpha + (next_ratio - ratio) * slope)
        next_slope = next_sigma * guess + next_alpha * functional.precise(predict(guess, following).velocity)
        z = next_alpha * (z / alpha + (next_ratio - ratio) * (slope + next_slope) / 2)
    return z


def inpaint(
    predict: Predictor,
    scheduler: VDDIMScheduler,
    z: Tensor,
    source: Tensor,
    mask: Tensor,
    resamples: int = 1,
    generator: Generators = None,
    noises: Iterator[Tensor] | None = None,
    on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Sample around sound that is to stay.

    At each time, what is to stay is replaced by the source with fresh noise. As in audio-diffusion-pytorch, repeats
    before going on renew that noise only, while RePaint itself adds noise to the rest too; more steps fit the rest to
    the source better than more repeats do.

    Args:
        predict: see the module.
        scheduler: after `set_timesteps`; its `eta` must be 0, since the noise is renewed here.
        z: (B, C, L) noise.
        source: (B, C, L) sound times `data_scale`; where the mask is False it is not read.
        mask: True where the source is to stay, broadcast to it.
        resamples: calls of the network per step, all but the last of them repeats.
        generator: source of the fresh noise.
        noises: the fresh noise itself, n · resamples times (B, C, L).
        on_step: see `denoise`.

    Returns:
        (B, C, L) float32, equal to the source where the mask is True.

    Raises:
        ValueError: if `resamples` is below 1 or the scheduler adds noise.
    """
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} is not a number of calls; use 1 or more.")
    if scheduler.eta:
        raise ValueError(f"eta: {scheduler.eta} is not possible where sound is to stay; use 0.0.")
    source, mask, z = functional.precise(source), mask.bool(), functional.precise(z)
    for index, (time, following) in enumerate(pairwise(scheduler.times)):
        for repeat in range(resamples):
            target = following if repeat == resamples - 1 else time
            velocity, unconditional = predict(z, time)
            z, _ = ddim_update(z, velocity, time, target, noise_velocity=unconditional)
            fresh = next(noises) if noises else randn_tensor(z.shape, generator, z.device, torch.float32)
            alpha, sigma = _shares(target)
            z = torch.where(mask, alpha * source + sigma * fresh if target else source, z)
        if on_step is not None:
            changed = on_step(index, time, z)
            z = z if changed is None else changed
    return z


# -- longer sound ------------------------------------------------------------------------------------------------------


def continuation(audio: Tensor, length: int, overlap: int) -> tuple[Tensor, Tensor]:
    """Source and mask for `inpaint` that go on after the end of sound.

    Args:
        audio: (B, C, any length).
        length: L, samples that the network makes.
        overlap: samples from the end of the audio that come first in the new clip.

    Returns:
        Source (B, C, L), silent after the overlap, and mask (1, 1, L) bool.

    Raises:
        ValueError: if the overlap is not shorter than both.
    """
    if not 0 < overlap < length or overlap > audio.shape[-1]:
        most = min(length - 1, audio.shape[-1])
        raise ValueError(f"overlap: {overlap} samples are not between 1 and {most}; choose fewer.")
    source = audio.new_zeros(*audio.shape[:-1], length)
    source[..., :overlap] = audio[..., -overlap:]
    mask = torch.arange(length, device=audio.device) < overlap
    return source, mask[None, None]


def continued(audio: Tensor, clip: Tensor, overlap: int) -> Tensor:
    """Audio with a clip after it whose first samples repeat its last ones.

    Args:
        audio: (B, C, any length).
        clip: (B, C, L), made from what `continuation` gives.
        overlap: as there.

    Returns:
        (B, C, length + L - overlap).
    """
    return torch.cat([audio, clip[..., overlap:].to(audio.dtype)], dim=-1)
