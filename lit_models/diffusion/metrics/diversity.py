"""How different the samples for a prompt are, and how different from what the model was trained on."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class PromptDiversity(Metric):
    """Mean Euclidean distance of the embeddings of two samples for one prompt, averaged over prompts.

    Args:
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    rows: list[Tensor]
    prompts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        for name in ("rows", "prompts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, rows: Tensor, prompts: Tensor) -> None:
        """Add samples.

        Args:
            rows: (B,D) float, one embedding per clip.
            prompts: (B,) int64, number of the prompt of each clip.
        """
        self.rows.append(rows.double())
        self.prompts.append(prompts)

    def compute(self) -> Tensor:
        """() float32 in units of the embedding; NaN if no prompt has two samples."""
        if not len(self.rows):
            return torch.tensor(torch.nan, device=self.device)
        rows, prompts = dim_zero_cat(self.rows), dim_zero_cat(self.prompts)
        values = [F.pdist(rows[prompts == prompt]).mean() for prompt in prompts.unique()]
        return torch.stack(values).nanmean().float()


class NearestCosine(Metric):
    """How close generated clips come to those the model was trained on.

    Args:
        training: (N,D) float, one embedding per training clip.
        threshold: cosine from which a clip counts as a copy.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if there are no training clips, or the threshold is no cosine.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    known: Tensor
    total: Tensor
    copies: Tensor
    count: Tensor
    largest: Tensor

    def __init__(self, training: Tensor, threshold: float = 0.95, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if training.ndim != 2 or not len(training):
            raise ValueError(f"training has shape {tuple(training.shape)}; give one row for each of one or more clips")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is no cosine; choose one between -1 and 1")
        self.threshold = threshold
        self.register_buffer("known", F.normalize(training.double(), dim=-1), persistent=False)
        for name in ("total", "copies", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(-1.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, rows: Tensor) -> None:
        """Add generated clips.

        Args:
            rows: (B,D) float, one embedding per clip.
        """
        nearest = (F.normalize(rows.double(), dim=-1) @ self.known.mT).amax(-1)
        self.total += nearest.sum()
        self.copies += (nearest >= self.threshold).sum()
        self.count += len(nearest)
        self.largest = torch.maximum(self.largest, nearest.amax())

    def compute(self) -> dict[str, Tensor]:
        """`mean` and `max` of the cosine with the nearest training clip, and the share of `copies`; () float32."""
        return {
            "mean": (self.total / self.count).float(),
            "max": self.largest.float(),
            "copies": (self.copies / self.count).float(),
        }
