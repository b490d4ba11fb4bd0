"""Options of waveform diffusion, checked when they are read."""

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lit_models.diffusion import functional
from lit_models.diffusion.functional import LossWeighting, TimeLaw, TimeSampler, TimeSequence
from lit_models.diffusion.samplers import Guidance, VDDIMScheduler, VDPMSolverScheduler, ddim_options, model_times

_SCHEDULERS = {"ddim": VDDIMScheduler, "dpm": VDPMSolverScheduler}


@dataclass(frozen=True)
class Times:
    """How the times of training steps are drawn.

    Args:
        law: "uniform"; "crash", more at little noise; "logit_normal", the sigmoid of a normal number.
        sequence: "sobol" spreads the times of successive samples evenly; "stratified" those of one step; "random" draws
            them independently.
        mean: of the logit-normal law.
        std: of the logit-normal law.

    Raises:
        ValueError: if a choice is unknown or `std` is not positive.
    """

    law: TimeLaw = "uniform"
    sequence: TimeSequence = "sobol"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        try:
            self.sampler(0)
        except ValueError as error:
            raise ValueError(f"model.times.{error}") from error

    def sampler(self, seed: int) -> TimeSampler:
        """The sequence of times.

        Args:
            seed: of the run, the same on all ranks, which take turns in one sequence.
        """
        return TimeSampler(self.law, self.sequence, self.mean, self.std, seed)


@dataclass(frozen=True)
class WaveformLoss:
    """What is minimised.

    Args:
        weighting: "none" for the squared error of velocities; "min_snr" to let very clean sound count less.
        snr_limit: signal-to-noise ratio above which "min_snr" lets sound count no more.
        stft: weight of a spectral distance of the clean sound that a velocity implies; 0 for none.
        stft_sizes: window lengths of that distance, in samples.
        mask: leave padding out of the loss, so that it is the mean over all valid samples of an optimizer step; by
            default silence after the end of a clip is learnt, too.

    Raises:
        ValueError: if a number is out of its range.
    """

    weighting: LossWeighting = "none"
    snr_limit: float = 5.0
    stft: float = 0.0
    stft_sizes: tuple[int, ...] = functional.STFT_SIZES
    mask: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.weighting not in ("none", "min_snr"):
            raise ValueError(f"model.loss.weighting must be none or min_snr, got {self.weighting!r}")
        if not self.snr_limit > 0:
            raise ValueError(f"model.loss.snr_limit must be positive, got {self.snr_limit}")
        if not self.stft >= 0:
            raise ValueError(f"model.loss.stft must be at least 0, got {self.stft}")
        if not self.stft_sizes or min(self.stft_sizes) < 4:
            raise ValueError(
                f"model.loss.stft_sizes: {list(self.stft_sizes)} are no window lengths; give numbers of at least 4"
            )


@dataclass(frozen=True)
class Sampling:
    """How sound is generated, for tests, predictions and samples, and by default in the exported pipeline.

    Args:
        scheduler: "ddim" (`VDDIMScheduler`), "dpm" (`VDPMSolverScheduler`, as good in half the steps), or the class
            path of a scheduler of diffusers that can follow this process, see `samplers.model_times`.
        scheduler_options: arguments of the scheduler. For a DDIM or an EDM scheduler of diffusers, those that fit the
            process are the default.
        steps: calls of the network.
        guidance: how strongly the text is followed.
        negative_prompt: text to stay away from, in place of no text.
        seconds: length of what is generated; null takes that of the batch, or else the usual length of the network.

    Raises:
        ValueError: if an option is out of its range, or the scheduler cannot do what is asked for.
    """

    scheduler: str = "ddim"
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    steps: int = 50
    guidance: Guidance = field(default_factory=Guidance)
    negative_prompt: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.steps < 1:
            raise ValueError(f"model.sampler.steps must be at least 1, got {self.steps}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"model.sampler.seconds must be positive, got {self.seconds}")
        self.build()

    def build(self) -> Any:  # noqa: ANN401
        """Make the scheduler.

        Returns:
            A scheduler that `samplers.denoise` can use.
        """
        kind = self._class()
        options = _fitting(kind) | self.scheduler_options
        try:
            scheduler = kind(**options)
            scheduler.set_timesteps(self.steps)
            model_times(scheduler)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise ValueError(f"model.sampler: {str(error).strip()}") from error
        if self.guidance.plus and "unconditional_output" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"model.sampler.guidance.plus: {kind.__name__} has no CFG++; use ddim, or plus: false")
        return kind(**options)

    def _class(self) -> Any:  # noqa: ANN401
        if self.scheduler in _SCHEDULERS:
            return _SCHEDULERS[self.scheduler]
        module, _, name = self.scheduler.rpartition(".")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"model.sampler.scheduler: {self.scheduler!r} is neither {' nor '.join(_SCHEDULERS)} nor the class "
                "path of a scheduler"
            ) from error


def _fitting(kind: type) -> dict[str, Any]:
    """Arguments with which a scheduler of diffusers follows this process."""
    if kind.__name__ == "DDIMScheduler":
        return ddim_options()
    if "sigma_data" in inspect.signature(kind).parameters:
        return {"prediction_type": "v_prediction", "sigma_data": 1.0}
    return {}
