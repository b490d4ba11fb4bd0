"""Which sampled tokens count as exploration; decided in the sampling loop, so that no scores need to be kept."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass
class Gate:
    """Marks tokens that the policy did not expect (CD-RLHF, gated intrinsic reward).

    Args:
        kind: `topk` marks tokens that are not among the k likeliest ones of their step; `prob` those with less than a
            given probability.
        topk: k.
        threshold: probability, for `prob`.
        temperature: of the probabilities.
    """

    kind: Literal["topk", "prob"] = "topk"
    topk: int = 1
    threshold: float = 0.5
    temperature: float = 1.0

    def __call__(self, logits: Tensor, token: Tensor) -> Tensor:
        """Decide for one token per row.

        Args:
            logits: (B,V) that the tokens were sampled from.
            token: (B,) int64.

        Returns:
            (B,) bool.
        """
        if self.kind == "topk":
            top = logits.topk(min(self.topk, logits.shape[-1]), dim=-1).indices
            return (top != token[:, None]).all(-1)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        return probabilities.gather(1, token[:, None]).squeeze(1) < self.threshold


class GateRecorder:
    """Logits processor for `model.generate` that marks each token once it is known, one step later.

    Args:
        gate: decides.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._scores: Tensor | None = None
        self._marks: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Decide for the newest token and keep the scores of the next one."""
        self._resolve(input_ids[:, -1])
        self._scores = scores
        return scores

    def _resolve(self, token: Tensor) -> None:
        if self._scores is not None:
            self._marks.append(self.gate(self._scores, token))

    def marks(self, last: Tensor) -> Tensor:
        """Decide for the last tokens (B,) int64, and return all decisions (B,R) bool."""
        self._resolve(last)
        return torch.stack(self._marks, 1)
