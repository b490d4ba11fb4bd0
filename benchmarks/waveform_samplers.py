"""Error of samplers by the number of network calls, on data whose best network is known.

`python benchmarks/waveform_samplers.py [--seeds 1 2 3] [--coordinates 4096]`

Each coordinate has a Gaussian law of its own, with a mean of standard deviation 0.5 and a deviation between 0.05 and 1,
the range of music. The optimal velocity stands for the network, and the exact solution of the flow is known. The error
is the greatest and the root mean square over all coordinates; the mean over seeds is printed.
"""

import lit_models._compat  # noqa: F401  (must run before diffusers is imported)

# isort: split
import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler, IPNDMScheduler
from torch import Tensor

from lit_models.diffusion import VDDIMScheduler, VDPMSolverScheduler
from lit_models.diffusion.functional import gaussian_velocity
from lit_models.diffusion.samplers import Prediction, denoise, heun

CALLS = (5, 10, 20, 40, 100)
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "v-DDIM": VDDIMScheduler,
    "v-DDIM, crash grid": lambda: VDDIMScheduler(spacing="crash"),
    "DPM-Solver++(2M)": VDPMSolverScheduler,
    "diffusers EDM DPM++(2M)": lambda: EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "diffusers IPNDM": IPNDMScheduler,
}


class Gaussians:
    """Laws of the coordinates, and the count of calls of their network."""

    def __init__(self, seed: int, coordinates: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mean = 0.5 * torch.randn(1, 1, coordinates, generator=generator)
        self.std = 0.05 + 0.95 * torch.rand(1, 1, coordinates, generator=generator)
        self.noise = torch.randn(1, 1, coordinates, generator=generator)
        self.calls = 0

    def __call__(self, z: Tensor, time: float) -> Prediction:
        """The optimal velocity."""
        self.calls += 1
        return Prediction(gaussian_velocity(z, torch.tensor([time]), self.mean, self.std))

    def errors(self, sample: Tensor) -> Tensor:
        """(2,) greatest and root mean square error of a sample."""
        difference = sample - (self.mean + self.std * self.noise)
        return torch.stack([difference.abs().max(), difference.square().mean().sqrt()])


def with_scheduler(make: Callable[[], Any], calls: int, laws: Gaussians) -> Tensor:
    """Sample with a scheduler."""
    scheduler = make()
    scheduler.set_timesteps(calls)
    return denoise(laws, scheduler, laws.noise * scheduler.init_noise_sigma)


def with_heun(calls: int, laws: Gaussians) -> Tensor:
    """Sample with Heun's method on the grid of DPM-Solver++, two calls per step but one in the last."""
    scheduler = VDPMSolverScheduler()
    scheduler.set_timesteps((calls + 1) // 2)
    start = scheduler.times[0]
    return heun(laws, tuple(scheduler.times), scheduler.init_noise_sigma * laws.noise if start == 1 else laws.noise)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--coordinates", type=int, default=4096)
    options = parser.parse_args()
    samplers = {
        name: lambda calls, laws, make=make: with_scheduler(make, calls, laws) for name, make in SCHEDULERS.items()
    }
    samplers["Heun"] = with_heun
    print(f"{'greatest / rms error after':26s}" + "".join(f"{calls:>16d}" for calls in CALLS) + "  calls")
    for name, sample in samplers.items():
        cells = []
        for calls in CALLS:
            errors, spent = [], 0
            for seed in options.seeds:
                laws = Gaussians(seed, options.coordinates)
                errors.append(laws.errors(sample(calls, laws)))
                spent = laws.calls
            assert spent <= calls, (name, spent)
            greatest, rms = torch.stack(errors).mean(0).tolist()
            cells.append(f"{greatest:8.3f} / {rms:.3f}")
        print(f"{name:26s}" + "".join(f"{cell:>16s}" for cell in cells))


if __name__ == "__main__":
    main()
