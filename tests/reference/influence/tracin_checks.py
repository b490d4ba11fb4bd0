"""Comparison of gradient influence with the reference vectors: one function per part, which raises AssertionError."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_models.influence.gradients import GradientOptions, PerSampleGradients
from lit_models.influence.tracin import (
    fit_scale,
    grad_cos,
    grad_dot,
    predict_trajectory,
    tracin_cp,
    tracin_self,
    trajectory_influence,
)

TRAIN = 5
"""Rows of the vectors that are train examples; the others are test examples."""


class PositionWise(nn.Module):
    """The language model of the vectors: W2 tanh(W1 emb[x] + b1) at each position."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, hidden)
        self.first = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(self.emb(input_ids))))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare shape and values with the tolerance of the reference's README, and as tightly where they are small."""
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


def source(data: dict[str, Tensor], **options: object) -> PerSampleGradients:
    """Gradients of the vectors' model."""
    model = PositionWise(*data["in.emb"].shape[1:])
    return PerSampleGradients(model, options=GradientOptions(**options))  # type: ignore[arg-type]


def checkpoints(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """State dict of each checkpoint."""
    names = {"emb.weight": "emb", "first.weight": "W1", "first.bias": "b1", "last.weight": "W2"}
    return [{name: data[f"in.{key}"][number] for name, key in names.items()} for number in range(len(data["in.emb"]))]


def rows(data: dict[str, Tensor], start: int, stop: int | None) -> dict[str, Tensor]:
    """Batch of some examples."""
    return {key: data[f"in.{key}"][start:stop] for key in ("input_ids", "attention_mask", "labels")}


def train(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batch of the train examples."""
    return rows(data, 0, TRAIN)


def test(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batch of the test examples."""
    return rows(data, TRAIN, None)


def check_losses(data: dict[str, Tensor]) -> None:
    """Loss of every example at every checkpoint."""
    gradients = source(data)
    found = [gradients.losses(rows(data, 0, None), checkpoint) for checkpoint in checkpoints(data)]
    assert_near(torch.stack(found), data["losses"])


def check_norms(data: dict[str, Tensor]) -> None:
    """Norms, and squared norms of the train examples."""
    gradients = source(data)
    found = [gradients.norms(rows(data, 0, None), checkpoint) for checkpoint in checkpoints(data)]
    assert_near(torch.stack(found), data["grad_norm"])
    assert_near(torch.stack(found)[:, :TRAIN].square(), data["self_full"])


def check_dots(data: dict[str, Tensor]) -> None:
    """Inner products over all parameters and over the last layer."""
    for params, key in (("all", "dot_full"), ("last_layer", "dot_last_layer")):
        gradients = source(data, params=params)
        found = [gradients.dots(train(data), test(data), checkpoint) for checkpoint in checkpoints(data)]
        assert_near(torch.stack(found).float(), data[key])


def check_scores(data: dict[str, Tensor]) -> None:
    """TracIn-CP, self-influence, Grad-Dot and Grad-Cos, with checkpoints from files."""
    gradients, lrs = source(data), data["in.lr"]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.safetensors" for number in range(len(lrs))]
        for file, state in zip(files, checkpoints(data), strict=True):
            save_file({key: value.contiguous() for key, value in state.items()}, file)
        assert_near(tracin_cp(gradients, files, lrs, train(data), test(data)), data["tracincp_full"])
        assert_near(tracin_self(gradients, files, lrs, train(data)), data["tracincp_self"])
        assert_near(grad_dot(gradients, train(data), test(data), files[-1]), data["graddot_full"])
        assert_near(grad_cos(gradients, train(data), test(data), files[-1]), data["gradcos_full"])


def check_trajectory(data: dict[str, Tensor]) -> None:
    """Losses that the gradients along a run predict."""
    gradients, ids = source(data), data["traj.in.ids"]
    start = gradients.losses(test(data), checkpoints(data)[0])
    for reduction in ("mean", "sum"):
        influence = trajectory_influence(
            gradients, checkpoints(data), range(len(ids)), ids, data["in.lr"], train(data), test(data), reduction
        )
        predicted, expected = predict_trajectory(start, influence), data[f"traj.pred_{reduction}_reduction"]
        # A step changes the loss by little, so the tolerance of the loss itself would hide its effect.
        torch.testing.assert_close(predicted, expected, rtol=0.0, atol=1e-6)


def check_scale(case: dict) -> None:
    """Least-squares factor, and the error that is left with it."""
    losses = torch.tensor(case["gt"], dtype=torch.float64).T
    influence = torch.tensor(case["cum_influence"], dtype=torch.float64).T
    scale = fit_scale([(influence, losses)])
    assert abs(scale - case["scale"]) < 1e-6
    left = (losses[0] - scale * influence - losses[1:]).square().sum()
    assert abs(float(left) - case["min_sse"]) < 1e-6
