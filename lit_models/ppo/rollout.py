"""What the parts of PPO hand to each other."""

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_models.ppo.functional import last_index, position_ids

if TYPE_CHECKING:
    from lit_models.ppo.generation import RowNoise


@dataclass
class Rollout:
    """One batch of prompts with sampled responses, filled in step by step.

    B rows, P padded prompt length, R padded response length. Prompts are left-padded and responses right-padded, so
    every response starts at column P of `input_ids`.

    Args:
        prompt_ids: (B,P) int64.
        prompt_mask: (B,P) int64.
        response_ids: (B,R) int64.
        response_mask: (B,R) float32, 1 for every generated token including the end-of-sequence token.
        prompts: decoded prompts.
        responses: decoded responses without special tokens.
        ended: (B,) bool, whether the response ended by itself rather than at the length limit.
        columns: further columns of the prompt data, for rewards that need references.
        old_logprobs: (B,R) float32, log-probability of each response token under the policy that sampled it.
        ref_logprobs: (B,R) float32, the same under the reference model.
        old_values: (B,R) float32, critic output before each response token.
        scores: (B,) float32, weighted sum of the rewards, before clipping.
        token_scores: (B,R) float32, weighted sum of per-token rewards, or None.
        reward_mask: (B,R) float32, columns that carry rewards and values in advantage estimation.
        rewards: (B,R) float32, what advantages are computed from.
        advantages: (B,R) float32.
        returns: (B,R) float32, targets of the critic.
        segment_ids: (B,R) int64, macro action of each token, -1 on padding, or None.
        segment_weights: (B,R) float32, weight of each token's value in that of its macro action, or None.
        gate: (B,R) bool, tokens outside the sampler's top choices, or None.
        hidden: (B,R+1,H), hidden states from column P-1 on that a shaper asked for, or None.
        action_embeddings: (B,R,H), rows of the policy's embedding table for the response tokens, or None.
        noise: random numbers of the whole rollout, for what is drawn once per row after sampling.
        single_pass: whether the rollout is used in exactly one forward pass, whose results may then be computed early.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    prompts: list[str]
    responses: list[str]
    ended: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    scores: Tensor | None = None
    token_scores: Tensor | None = None
    reward_mask: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    segment_ids: Tensor | None = None
    segment_weights: Tensor | None = None
    gate: Tensor | None = None
    hidden: Tensor | None = None
    action_embeddings: Tensor | None = None
    noise: "RowNoise | None" = None
    single_pass: bool = False

    @property
    def input_ids(self) -> Tensor:
        """(B,P+R) int64: prompt and response."""
        return torch.cat([self.prompt_ids, self.response_ids], 1)

    @property
    def attention_mask(self) -> Tensor:
        """(B,P+R) int64."""
        return torch.cat([self.prompt_mask, self.response_mask.to(self.prompt_mask.dtype)], 1)

    @property
    def position_ids(self) -> Tensor:
        """(B,P+R) int64, counted from the first real token."""
        return position_ids(self.attention_mask)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens per response."""
        return last_index(self.response_mask) + 1

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def rows(self, index: Tensor) -> "Rollout":
        """The rows at `index` (N,) int64, in that order."""
        picked: dict[str, Any] = {}
        chosen = index.tolist()
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                picked[item.name] = value[index]
            elif isinstance(value, list):
                picked[item.name] = [value[row] for row in chosen]
            elif isinstance(value, dict):
                picked[item.name] = {name: [column[row] for row in chosen] for name, column in value.items()}
        return replace(self, **picked)

    def split(self, size: int | None) -> "list[Rollout]":
        """Consecutive pieces of at most `size` rows; the whole where `size` is None."""
        if size is None or size >= len(self):
            return [self]
        return [self.rows(index) for index in torch.arange(len(self), device=self.prompt_ids.device).split(size)]
