"""Reward shaping: what is added to the rewards before advantages are computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lit_models.nn.groups import GroupOptions
from lit_models.ppo.functional import AllReduce, kl_estimate
from lit_models.ppo.gate import Gate
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Shaper(ABC):
    """Changes the token rewards of a rollout, or adds a token loss to that of the policy.

    A shaper may bring a network of its own, which learns beside policy and critic: `build` makes it, `network_loss` is
    what it learns from, and `name` names its parameter group and its part of checkpoints.
    """

    name: str = ""
    epochs: int = 1
    """Passes over a rollout in which the shaper's network learns."""

    @abstractmethod
    def shape(
        self, rollout: Rollout, rewards: Tensor, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shape the rewards.

        Args:
            rollout: with log-probabilities, values, scores and `reward_mask`.
            rewards: (B,R) float32.
            all_reduce: sums a tensor over processes, for statistics of the global batch.

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

    @property
    def group(self) -> GroupOptions:
        """Settings of the network's parameter groups."""
        return GroupOptions()

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: B027 (nothing to do by default)
        """Take what is needed from the tokenizer, once, before training."""

    def needed_states(self) -> str | None:
        """Hidden states wanted in `Rollout.hidden`, see `steps.score`; none by default."""
        return None

    def needed_gate(self, temperature: float) -> Gate | None:
        """Gate wanted in the sampling loop at a sampling temperature; none by default."""
        return None

    def build(self, actor: "PreTrainedModel", reference: "PreTrainedModel") -> nn.Module | None:
        """Make the shaper's own network; none by default.

        Of either model, only configuration and shapes can be read: its weights may be on other processes.

        Args:
            actor: the policy.
            reference: the frozen policy, or the policy itself where its adapters make the difference.
        """
        return None

    def network_loss(self, rollout: Rollout) -> Tensor | None:
        """Loss of the shaper's network per token of a micro-batch, (B,R) float32, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides the network."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (nothing to do by default)
        """Take it back."""


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

    def shape(
        self, rollout: Rollout, rewards: Tensor, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
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
