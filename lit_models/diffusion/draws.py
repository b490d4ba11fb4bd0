"""Random numbers of training and evaluation that follow from a sample's place in the run, and from nothing else.

The n-th sample of a run gets the n-th time, noise of its own, and its own chance of losing its text. So it makes no
difference over how many ranks and accumulated batches the samples are spread, nor whether the run was interrupted.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TRAIN, VALIDATE, TEST, PREDICT, SOUNDS = range(5)
"""What numbers are drawn for, so that no two uses share them."""
GRID = 64
"""Number of times at which validation looks."""


class Draws(NamedTuple):
    """Numbers of some samples.

    Args:
        uniform: (B,) float64 in [0, 1).
        seeds: B seeds of generators.
    """

    uniform: Tensor
    seeds: list[int]


def sample_numbers(before: int, batch_size: int, rank: int = 0, world: int = 1) -> list[int]:
    """Places in the run of the samples of a batch, where rank r of W takes every W-th sample.

    Args:
        before: samples that all ranks together had before this batch.
        batch_size: B, the same on all ranks.
        rank: r.
        world: W.

    Returns:
        B numbers.
    """
    return [before + row * world + rank for row in range(batch_size)]


def draw(seed: int, use: int, numbers: list[int]) -> Draws:
    """Draw the numbers of some samples.

    Args:
        seed: of the run.
        use: what for, such as `TRAIN`.
        numbers: places of the samples.

    Returns:
        Numbers that are the same wherever and whenever they are drawn.
    """
    generators = [np.random.default_rng((seed, use, number)) for number in numbers]
    uniform = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    return Draws(uniform, [int(generator.integers(2**63)) for generator in generators])


def normal_noise(seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, that of each sample from its own seed.

    Args:
        seeds: B seeds.
        shape: of the noise of a sample.
        device: where it is drawn; kinds of devices draw different numbers.

    Returns:
        (B, *shape) float32.
    """
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), *shape, device=device, dtype=torch.float32)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


def generators(seeds: list[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def evaluation_times(numbers: list[int]) -> Tensor:
    """Times at which samples are evaluated, (i + 1/2)/64, so ordered that few samples are spread over [0, 1] too.

    Args:
        numbers: places of the samples.

    Returns:
        (B,) float32.
    """
    bits = GRID.bit_length() - 1
    # Read backwards, the digits of successive numbers fall into all parts of the grid in turn.
    places = [int(f"{number % GRID:0{bits}b}"[::-1], 2) for number in numbers]
    return (torch.tensor(places, dtype=torch.float32) + 0.5) / GRID
