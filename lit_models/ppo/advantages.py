"""Advantage estimation from token rewards and values."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lit_models.ppo.functional import gae, whiten
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AllReduce = Callable[[Tensor], Tensor]


class AdvantageEstimator(ABC):
    """Turns the rewards and values of a rollout into advantages and returns.

    An estimator with `compat = "official"` asks the module for the settings of the released code of MA-RLHF.
    """

    compat: Literal["official"] | None = None

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: B027 (nothing to do by default)
        """Take what is needed from the tokenizer, once, before training."""

    @abstractmethod
    def estimate(
        self, rollout: Rollout, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Estimate.

        Args:
            rollout: with `rewards`, `old_values` and `reward_mask`.
            all_reduce: sums a tensor over processes, for statistics of the global batch.

        Returns:
            Advantages and returns, (B,R) float32, and named (B,) values per row to log.
        """


@dataclass
class GAE(AdvantageEstimator):
    """Generalized advantage estimation over tokens (Schulman et al. 2016).

    Args:
        gamma: discount per token.
        lam: weight of longer returns in the advantages.
        lam_critic: the same in the critic's targets; equal to `lam` by default.
        whiten_rewards: divide the rewards by their standard deviation over the global batch, keeping the mean.
        whiten_advantages: give the advantages zero mean and unit variance over the global batch.
    """

    gamma: float = 1.0
    lam: float = 0.95
    lam_critic: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        for name in ("gamma", "lam", "lam_critic"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"advantage.{name} must lie in [0, 1], got {value}")

    def estimate(
        self, rollout: Rollout, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Estimate; see `AdvantageEstimator.estimate`."""
        assert rollout.rewards is not None
        assert rollout.old_values is not None
        assert rollout.reward_mask is not None
        rewards = rollout.rewards
        if self.whiten_rewards:
            rewards = whiten(rewards, rollout.reward_mask, shift_mean=False, all_reduce=all_reduce)
        advantages, returns = gae(
            rewards, rollout.old_values, rollout.reward_mask, self.gamma, self.lam, lam_critic=self.lam_critic
        )
        advantages = advantages * rollout.response_mask
        if self.whiten_advantages:
            advantages = whiten(advantages, rollout.response_mask, all_reduce=all_reduce)
        return advantages, returns * rollout.response_mask, {}
