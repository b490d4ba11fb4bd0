"""Advantages over macro actions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_models.ppo.advantages import AdvantageEstimator, AllReduce
from lit_models.ppo.functional import explained_variance, last_index, whiten
from lit_models.ppo.macro.functional import (
    Aggregation,
    aggregation_weights,
    check_segments,
    count_segments,
    isolate_last,
    macro_gae,
    offsets,
    segment_mask,
    segment_sum,
    to_tokens,
)
from lit_models.ppo.macro.segmenters import RULES, Fixed, RuleName, Segmenter
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class MacroGAE(AdvantageEstimator):
    """Generalized advantage estimation over macro actions, each token getting the advantage of its own (MA-RLHF).

    If you use this estimator in your research, please cite:

    * https://arxiv.org/abs/2410.02743

    Args:
        rule: where macro actions end: a segmenter, or the name of one with its default options.
        n: tokens of a macro action for the rule `fixed` given by name.
        value_aggregation: how the values of tokens become that of a macro action; see
            `lit_models.ppo.macro.functional.aggregation_weights`.
        reward_aggregation: `sum` adds the rewards of the tokens; `weighted` averages them with the weights of the
            values, as the released code does, which divides the KL penalty by the length of the macro action.
        rho: discount of the rewards inside a macro action, for `sum`.
        isolate_last: the last token is always a macro action of its own, as in the released code.
        gamma: discount per macro action.
        lam: weight of longer returns in the advantages, per macro action.
        lam_critic: the same in the critic's targets; equal to `lam` by default.
        smdp_discount: discount by `gamma` per token instead of per macro action.
        whiten_rewards: divide the token rewards by their standard deviation over the global batch, keeping the mean.
        whiten_advantages: give the token advantages zero mean and unit variance over the global batch.
        compat: `official` reproduces the released code: it sets `isolate_last` and `reward_aggregation: weighted` here,
            and in the module `loss.norm: sequence`, `scores.position: last_token` and `logprob_temperature: 1.0`.
    """

    rule: Segmenter | RuleName = "fixed"
    n: int | None = None
    value_aggregation: Aggregation = "equal"
    reward_aggregation: Literal["sum", "weighted"] = "sum"
    rho: float = 1.0
    isolate_last: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    lam_critic: float | None = None
    smdp_discount: bool = False
    whiten_rewards: bool = False
    whiten_advantages: bool = False
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        """Check the options and make the segmenter.

        Raises:
            ValueError: naming the option.
        """
        for name in ("gamma", "lam", "lam_critic", "rho"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"advantage.{name} must lie in [0, 1], got {value}")
        if self.n is not None and self.rule != "fixed":
            raise ValueError(f"advantage.n belongs to advantage.rule: fixed, got rule {self.rule!r}; remove n")
        if self.n is not None and self.n < 1:
            raise ValueError(f"advantage.n must be at least 1, got {self.n}")
        if self.compat == "official":
            self.isolate_last, self.reward_aggregation = True, "weighted"
        self.segmenter = self._segmenter()

    def _segmenter(self) -> Segmenter:
        if isinstance(self.rule, Segmenter):
            return self.rule
        if self.rule not in RULES:
            raise ValueError(f"advantage.rule: {self.rule!r} is none of {', '.join(RULES)}; a segmenter does as well")
        return Fixed(self.n) if self.n is not None else RULES[self.rule]()

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Give the segmenter the tokenizer."""
        self.segmenter.prepare(tokenizer)

    def estimate(
        self, rollout: Rollout, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Estimate; see `AdvantageEstimator.estimate`. Fills in `segment_ids` and `segment_weights`."""
        assert rollout.rewards is not None
        assert rollout.old_values is not None
        assert rollout.reward_mask is not None
        mask = rollout.response_mask
        ids, metrics = self.segmenter.segment(rollout)
        check_segments(ids, mask, type(self.segmenter).__name__)
        if self.isolate_last:
            ids = isolate_last(ids)
        weights = aggregation_weights(ids, self.value_aggregation)
        rollout.segment_ids, rollout.segment_weights = ids, weights
        rewards = rollout.rewards
        if self.whiten_rewards:
            rewards = whiten(rewards, rollout.reward_mask, shift_mean=False, all_reduce=all_reduce)
        rewards = fold_into_last(rewards, mask)
        values = segment_sum(weights * rollout.old_values, ids)
        macro_rewards = self._aggregate(rewards, ids, weights)
        valid = segment_mask(ids)
        gamma: float | Tensor = self.gamma
        if self.smdp_discount:
            gamma = torch.pow(torch.tensor(self.gamma, device=ids.device), segment_sum(ids >= 0, ids))
        advantages, returns = macro_gae(macro_rewards, values, valid, gamma, self.lam)
        if self.lam_critic is not None:
            returns = macro_gae(macro_rewards, values, valid, gamma, self.lam_critic)[1]
        explained = explained_variance(values, returns, valid, all_reduce)
        per_token = to_tokens(advantages, ids)
        if self.whiten_advantages:
            per_token = whiten(per_token, mask, all_reduce=all_reduce)
        count = count_segments(ids).float()
        lengths = segment_sum(mask, ids)
        metrics |= {
            "macro/num_mean": count,
            "macro/len_mean": mask.sum(1) / count.clamp(min=1),
            "macro/len_max": lengths.amax(1),
            "macro/explained_variance": explained.expand(len(ids)),
        }
        return per_token, to_tokens(returns, ids), metrics

    def _aggregate(self, rewards: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.reward_aggregation == "weighted":
            return segment_sum(weights * rewards, ids)
        if self.rho != 1.0:
            rewards = rewards * torch.pow(torch.tensor(self.rho, device=ids.device), offsets(ids)[0])
        return segment_sum(rewards, ids)


def fold_into_last(rewards: Tensor, mask: Tensor) -> Tensor:
    """Pay what lies behind a response at its last token, which belongs to a macro action.

    Args:
        rewards: (B,R) float32.
        mask: (B,R).

    Returns:
        (B,R) float32, 0 outside the mask.
    """
    inside = rewards * mask
    behind = (rewards - inside).sum(1, keepdim=True)
    return inside.scatter_add(1, last_index(mask)[:, None], behind) * mask
