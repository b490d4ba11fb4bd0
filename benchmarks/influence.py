"""How fast simulators train and simulate; every comparison takes turns in one process.

`python benchmarks/influence.py [training|rollout|ridge]`

training    samples (a step of a run and a test) per second with their gradients: the matrix form, the row form, and a
            plain implementation of the published algorithm, which passes every example of every sample through the
            networks in batches of 128 samples
rollout     steps (of a run and a test) per second: one scan over all runs and tests, and the published evaluation, one
            run, test and step after the other
ridge       seconds of the closed form for three penalties

The sizes are those of the first acceptance experiment: 29 runs of 48 steps with 4 of 400 examples, 48 tests and 384
features.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_models.influence.configuration import SimulatorConfig
from lit_models.influence.functional import masked_mse, ridge
from lit_models.influence.modeling import InfluenceSimulator

RUNS, STEPS, BATCH, POOL, TESTS, FEATURES = 29, 48, 4, 400, 48, 384
ROWS = 128
"""Samples of a batch of the published training."""
REPETITIONS = 5


class Published(nn.Module):
    """The published form: both factors of each pair from networks on the features of either side.

    Args:
        simulator: gives features and weights, which are shared.
    """

    def __init__(self, simulator: InfluenceSimulator) -> None:
        super().__init__()
        self.mlp_a, self.mlp_b = simulator.mlp_a, simulator.mlp_b
        self.train_features, self.test_features = simulator.train_features, simulator.test_features

    def forward(self, ids: Tensor, tests: Tensor, before: Tensor) -> Tensor:
        """Predict samples: (R,b), (R,) and (R,) -> (R,)."""
        pool, target = self.train_features[ids], self.test_features[tests]
        multiplicative = (self.mlp_a(pool) * self.mlp_a(target)[:, None]).sum(-1)
        additive = (self.mlp_b(pool) * self.mlp_b(target)[:, None]).sum(-1)
        return multiplicative.sum(1) * before + additive.sum(1)


def make() -> tuple[InfluenceSimulator, Tensor, Tensor]:
    """A simulator of the published kind, ids (K,T,b) and recorded values (K,T+1,M)."""
    generator = torch.Generator().manual_seed(0)
    simulator = InfluenceSimulator(SimulatorConfig(POOL, TESTS, FEATURES, kind="feat_shared", compat="released"))
    simulator.set_examples(
        train_features=torch.randn(POOL, FEATURES, generator=generator) / FEATURES**0.5,
        test_features=torch.randn(TESTS, FEATURES, generator=generator) / FEATURES**0.5,
    )
    with torch.no_grad():  # so that roll-outs stay small
        for parameter in simulator.parameters():
            parameter.mul_(0.2)
    ids = torch.randint(POOL, (RUNS, STEPS, BATCH), generator=generator)
    return simulator, ids, torch.rand(RUNS, STEPS + 1, TESTS, generator=generator)


def compare(sides: dict[str, Callable[[], int]], unit: str) -> None:
    """Print how much each side does in a second, and the ratio to the last one."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPETITIONS):
        for name, run in sides.items():
            start = time.perf_counter()
            done = run()
            rates[name].append(done / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    last = list(medians.values())[-1]
    for name, rate in medians.items():
        print(f"  {name:20} {rate:14,.0f} {unit}/s   x {rate / last:10.1f}", flush=True)


def difference(actual: Any, expected: Any) -> float:
    """Largest difference over the largest value."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


def training() -> None:
    """Forward and backward passes."""
    simulator, ids, values = make()
    published = Published(simulator)
    step_ids, before, after = ids.flatten(0, 1), values[:, :-1].flatten(0, 1), values[:, 1:].flatten(0, 1)
    weights = list(simulator.parameters())

    def matrix(steps: slice = slice(None)) -> tuple[Tensor, ...]:
        loss = masked_mse(simulator.forward_matrix(step_ids[steps], before[steps]), after[steps])
        return torch.autograd.grad(loss, weights)

    def samples(model: nn.Module, steps: Tensor, tests: Tensor) -> tuple[Tensor, ...]:
        loss = masked_mse(model(step_ids[steps], tests, before[steps, tests]), after[steps, tests])
        return torch.autograd.grad(loss, weights)

    few = torch.arange(8).repeat_interleave(TESTS), torch.arange(TESTS).repeat(8)
    for name, other in (("row form", simulator), ("published", published)):
        print(f"  gradients, matrix form against {name}: {difference(matrix(slice(0, 8)), samples(other, *few)):.1e}")
    generator = torch.Generator().manual_seed(0)

    def batches(model: nn.Module) -> int:
        for _ in range(4):
            steps = torch.randint(len(step_ids), (ROWS,), generator=generator)
            samples(model, steps, torch.randint(TESTS, (ROWS,), generator=generator))
        return 4 * ROWS

    def all_steps() -> int:
        for _ in range(4):
            matrix()
        return 4 * len(step_ids) * TESTS

    sides = {"matrix form": all_steps, "row form": lambda: batches(simulator), "published": lambda: batches(published)}
    compare(sides, "samples")


@torch.no_grad()
def rollout() -> None:
    """Simulated trajectories."""
    simulator, ids, values = make()
    published = Published(simulator)
    tests = torch.arange(TESTS)

    def loop(runs: int, columns: int) -> tuple[Tensor, int]:
        trajectories = torch.zeros(runs, STEPS + 1, columns)
        for run in range(runs):
            for test in range(columns):
                value = values[run, 0, test].item()
                trajectories[run, 0, test] = value
                for step in range(STEPS):
                    value = published(ids[run, step : step + 1], tests[test : test + 1], torch.tensor([value])).item()
                    trajectories[run, step + 1, test] = value
        return trajectories, runs * STEPS * columns

    def scan() -> int:
        simulator.rollout(values[:, 0], ids)
        return RUNS * STEPS * TESTS

    few, _ = loop(2, 3)
    print(f"  trajectories: {difference([simulator.rollout(values[:, 0], ids)[:2, :, :3]], [few]):.1e}")
    compare({"one scan": scan, "published": lambda: loop(1, 2)[1]}, "steps")


def closed_form() -> None:
    """Factors of all pairs."""
    _, ids, values = make()
    history, target = values[:, :-1].flatten(0, 1)[:, None], values[:, 1:].flatten(0, 1)
    start = time.perf_counter()
    ridge(ids.flatten(0, 1), history, target, POOL, [0.1, 1.0, 10.0])
    print(f"  {time.perf_counter() - start:.1f} s")


PARTS = {"training": training, "rollout": rollout, "ridge": closed_form}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.parts or PARTS:
        print(name, flush=True)
        PARTS[name]()
