"""Reward shaping: what is added to the rewards before advantages are computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_models.ppo.functional import kl_estimate
from lit_models.ppo.rollout import Rollout


class Shaper(ABC):
    """Changes the token rewards of a rollout, or adds a token loss to that of the policy."""

    @abstractmethod
    def shape(self, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Shape the rewards.

        Args:
            rollout: with log-probabilities, values, scores and `reward_mask`.
            rewards: (B,R) float32.

        Returns:
            (B,R) float32, and named (B,) values per row to log.
        """

    def token_loss(self, rollout: Rollout, logprobs: Tensor) -> Tensor | None:
        """Differentiable loss per token, summed like the policy's; none by default.

        Args:
            rollout: the rows of one micro-batch.
            logprobs: (B,R) float32 under the current policy, with gradients.

        Returns:
            (B,R) float32 or None.
        """
        return None


@dataclass
class KLPenalty(Shaper):
    """Keeps the policy near the reference model (RLHF base, KL-shaped reward).

    Args:
        coef: weight of the penalty.
        estimator: of the divergence from samples: k1 is the log-ratio, k2 half its square, k3 the always positive
            unbiased one, abs its absolute value.
        place: whether the penalty is part of the reward or of the loss.
    """

    coef: float = 0.05
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    place: Literal["reward", "loss"] = "reward"

    def __post_init__(self) -> None:
        """Check the coefficient.

        Raises:
            ValueError: if it is negative.
        """
        if self.coef < 0:
            raise ValueError(f"shapers.coef of KLPenalty must not be negative, got {self.coef}")

    def shape(self, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Subtract the penalty from every valid column."""
        if self.place == "loss":
            return rewards, {}
        assert rollout.old_logprobs is not None
        assert rollout.ref_logprobs is not None
        assert rollout.reward_mask is not None
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, self.estimator) * rollout.reward_mask
        return rewards - self.coef * kl, {"reward/kl": -self.coef * kl.sum(1)}

    def token_loss(self, rollout: Rollout, logprobs: Tensor) -> Tensor | None:
        """Penalty with gradients, where it is placed in the loss."""
        if self.place == "reward":
            return None
        assert rollout.ref_logprobs is not None
        return self.coef * kl_estimate(logprobs, rollout.ref_logprobs, self.estimator)
