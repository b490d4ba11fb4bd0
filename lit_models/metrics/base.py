"""Metrics of sets of texts."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SetMetric(Metric):
    """A number per set of texts, averaged over sets.

    With `corpus=True` the sets are turned around: the first texts of all sets are one set, the second ones another, and
    so on, which tells how alike the answers to different prompts are. All texts are kept until `compute` then.

    Args:
        corpus: whether to compare across the given sets.
        kwargs: see `torchmetrics.Metric`.
    """

    name = "set"
    """Short name for logs."""
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, corpus: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.corpus = corpus
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._kept: list[Sequence[str]] = []

    @abstractmethod
    def value(self, texts: Sequence[str]) -> float:
        """The metric of one set."""

    def update(self, sets: Sequence[Sequence[str]]) -> None:
        """Add sets.

        Args:
            sets: texts of each set, usually the responses to one prompt.
        """
        if self.corpus:
            self._kept.extend(sets)
            return
        for texts in sets:
            self._add(texts)

    def _add(self, texts: Sequence[str]) -> None:
        self.total += self.value(texts)
        self.count += 1

    def compute(self) -> Tensor:
        """Mean over sets; with several processes, `corpus` compares the sets of each one by itself."""
        if self.corpus:
            self.total, self.count = torch.zeros_like(self.total), torch.zeros_like(self.count)
            for texts in zip(*self._kept, strict=True):
                self._add(texts)
        return (self.total / self.count.clamp(min=1)).float()

    def reset(self) -> None:
        """Forget all sets."""
        super().reset()
        self._kept = []
