"""The steps of PPO as functions: generate, score, shape, estimate advantages, and the losses of an update.

`LitPPO` runs them under the Trainer; they run as well in a loop of your own (see `examples/ppo_plain.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_models.backbones import adapters_off
from lit_models.ppo.advantages import AdvantageEstimator, AllReduce
from lit_models.ppo.functional import (
    entropy,
    extend_mask,
    gather_logprobs,
    place_scores,
    policy_loss,
    reduce_loss,
    value_loss,
)
from lit_models.ppo.generation import Generator, RowNoise
from lit_models.ppo.rewards import Reward, total_scores
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import Shaper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ScoreOptions:
    """How the score of a response becomes a token reward.

    Args:
        clip: bound on the absolute score, or null for none.
        position: `last_token` pays at the last generated token; `after_last` one column later where padding follows,
            as the released code of MA-RLHF and CD-RLHF does.
        missing_eos_penalty: subtracted from the score of responses cut off at the length limit.
    """

    clip: float | None = None
    position: Literal["last_token", "after_last"] = "last_token"
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"scores.clip must be positive or null, got {self.clip}")
        if self.missing_eos_penalty < 0:
            raise ValueError(f"scores.missing_eos_penalty must not be negative, got {self.missing_eos_penalty}")


@dataclass
class PPOLoss:
    """The clipped losses of actor and critic.

    Args:
        clip_low: how far the ratio may fall below 1.
        clip_high: how far the ratio may rise above 1.
        dual_clip: bound on the loss of tokens with negative advantage, as a multiple of the advantage; null for none.
        value_clip: how far a value may move from the old one; null for no limit.
        vf_coef: weight of the critic's loss.
        entropy_coef: weight of the entropy bonus.
        norm: `global_tokens` divides by the tokens of the whole minibatch on all processes, `micro_batch` by those of
            each micro-batch (as the released code), `sequence` averages the means of the rows.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    vf_coef: float = 1.0
    entropy_coef: float = 0.0
    norm: Literal["global_tokens", "micro_batch", "sequence"] = "global_tokens"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"loss.clip_low must lie in [0, 1] and loss.clip_high be >= 0, got {self.clip_low}, {self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip must be greater than 1 or null, got {self.dual_clip}")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"loss.value_clip must be positive or null, got {self.value_clip}")


@dataclass
class Updates:
    """How a rollout is used for optimizer steps.

    Args:
        epochs: passes over the rollout.
        minibatch_size: rows per optimizer step on each process; null for all.
        micro_batch_size: rows per forward and backward pass; null for all rows of the minibatch.
        max_grad_norm: each network's gradient is clipped to this norm; null for no clipping.
    """

    epochs: int = 1
    minibatch_size: int | None = None
    micro_batch_size: int | None = None
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        for name in ("epochs", "minibatch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"updates.{name} must be at least 1, got {value}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"updates.max_grad_norm must be positive or null, got {self.max_grad_norm}")

    def single(self, rows: int) -> bool:
        """Whether a rollout of `rows` rows is used in exactly one forward pass, so that old and new policy are one."""
        return self.epochs == 1 and all(
            size is None or size >= rows for size in (self.minibatch_size, self.micro_batch_size)
        )


def disable_dropout(network: nn.Module) -> None:
    """Turn dropout off for good, so that the policy that sampled and the policy that learns agree."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def generate(
    actor: "PreTrainedModel",
    generator: Generator,
    tokenizer: "PreTrainedTokenizerBase",
    batch: dict[str, Any],
    noise: RowNoise,
    samples: int = 1,
    all_done: Callable[[bool], bool] = bool,
) -> Rollout:
    """Sample responses to a batch of prompts.

    Args:
        actor: the policy.
        generator: how to sample.
        tokenizer: decodes the texts.
        batch: `prompt_ids` (B,P) int64 and `prompt_mask` (B,P) int64, left-padded; optional `columns`.
        noise: random numbers for the B·samples rows.
        samples: responses per prompt, which become consecutive rows.
        all_done: turns "this process has finished" into "all processes have", for sharded models.

    Returns:
        The rollout, with texts and nothing later filled in.
    """
    prompt_ids = batch["prompt_ids"].repeat_interleave(samples, 0)
    prompt_mask = batch["prompt_mask"].repeat_interleave(samples, 0)
    training = actor.training
    actor.eval()  # gradient checkpointing in training mode would rule out the key-value cache
    try:
        response_ids, response_mask, ended = generator.generate(actor, prompt_ids, prompt_mask, noise, all_done)
    finally:
        actor.train(training)
    kept = [ids[mask] for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True)]
    columns = {
        name: [value for value in values for _ in range(samples)] for name, values in batch.get("columns", {}).items()
    }
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        ended=ended,
        prompts=tokenizer.batch_decode(kept, skip_special_tokens=True),
        responses=tokenizer.batch_decode(
            [ids[mask] for ids, mask in zip(response_ids, response_mask.bool(), strict=True)], skip_special_tokens=True
        ),
        columns=columns,
    )


def policy_logits(actor: "PreTrainedModel", rollout: Rollout) -> Tensor:
    """Logits that predict the response tokens, (B,R,V)."""
    length = rollout.response_ids.shape[1]
    output = actor(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=rollout.position_ids,
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits: Tensor = output.logits[:, -length - 1 : -1]
    return logits


def policy_logprobs(actor: "PreTrainedModel", rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the response tokens, (B,R) float32, with gradients where they are enabled."""
    return gather_logprobs(policy_logits(actor, rollout), rollout.response_ids, temperature)


def critic_values(critic: nn.Module, rollout: Rollout) -> Tensor:
    """Values before each response token, (B,R) float32, with gradients where they are enabled."""
    length = rollout.response_ids.shape[1]
    values: Tensor = critic(rollout.input_ids, rollout.attention_mask, rollout.position_ids)
    return values[:, -length - 1 : -1]


@torch.no_grad()
def score(
    rollout: Rollout,
    actor: "PreTrainedModel",
    critic: nn.Module,
    reference: "PreTrainedModel | None",
    rewards: Sequence[Reward],
    networks: Sequence[nn.Module | None],
    temperature: float = 1.0,
    batch_size: int | None = None,
    skip_trained: bool = False,
) -> dict[str, Tensor]:
    """Fill in log-probabilities, values and scores.

    Args:
        rollout: from `generate`; filled in place.
        actor: the policy.
        critic: per-token scorer.
        reference: frozen policy; None where the actor without its adapters is the reference.
        rewards: what to sum.
        networks: what each reward's `build` made.
        temperature: of the log-probabilities of policy and reference.
        batch_size: rows per forward pass; None for all.
        skip_trained: leave `old_logprobs` and `old_values` to the caller, who takes them from the forward pass of
            the only update.

    Returns:
        (B,) score per reward label.
    """
    pieces = rollout.split(batch_size)
    if not skip_trained:
        rollout.old_logprobs = torch.cat([policy_logprobs(actor, piece, temperature) for piece in pieces])
        rollout.old_values = torch.cat([critic_values(critic, piece) for piece in pieces])
    if reference is None:
        with adapters_off(actor):
            rollout.ref_logprobs = torch.cat([policy_logprobs(actor, piece, temperature) for piece in pieces])
    else:
        rollout.ref_logprobs = torch.cat([policy_logprobs(reference, piece, temperature) for piece in pieces])
    rollout.scores, rollout.token_scores, parts = total_scores(rollout, rewards, networks)
    return parts


@torch.no_grad()
def shape(rollout: Rollout, shapers: Sequence[Shaper], options: ScoreOptions) -> dict[str, Tensor]:
    """Fill in the token rewards: the placed score, token rewards, and what the shapers add.

    Args:
        rollout: from `score`; filled in place.
        shapers: applied in order.
        options: clipping and place of the score.

    Returns:
        Named (B,) values per row to log.
    """
    assert rollout.scores is not None
    mask = rollout.response_mask
    rollout.reward_mask = extend_mask(mask) if options.position == "after_last" else mask
    scores = rollout.scores - options.missing_eos_penalty * (~rollout.ended).float()
    rewards = place_scores(scores, rollout.reward_mask, options.clip)
    if rollout.token_scores is not None:
        rewards = rewards + rollout.token_scores
    metrics: dict[str, Tensor] = {}
    for shaper in shapers:
        rewards, more = shaper.shape(rollout, rewards)
        metrics |= more
    rollout.rewards = rewards * rollout.reward_mask
    return metrics


@torch.no_grad()
def advantages(
    rollout: Rollout, estimator: AdvantageEstimator, all_reduce: AllReduce | None = None
) -> dict[str, Tensor]:
    """Fill in advantages and returns.

    Args:
        rollout: from `shape`; filled in place.
        estimator: how to estimate.
        all_reduce: sums a tensor over processes.

    Returns:
        Named (B,) values per row to log.
    """
    rollout.advantages, rollout.returns, metrics = estimator.estimate(rollout, all_reduce)
    return metrics


def minibatches(
    rollout: Rollout, updates: Updates, generator: torch.Generator | None = None
) -> Iterator[list[Rollout]]:
    """The optimizer steps of a rollout, each as the list of its micro-batches.

    Args:
        rollout: from `advantages`.
        updates: epochs and sizes.
        generator: shuffles the rows of each epoch; the order of the rollout without one.

    Yields:
        Micro-batches whose gradients belong together.
    """
    rows = len(rollout)
    device = rollout.prompt_ids.device
    if updates.single(rows):
        yield [rollout]
        return
    for _ in range(updates.epochs):
        order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
        for index in order.to(device).split(updates.minibatch_size or rows):
            yield rollout.rows(index).split(updates.micro_batch_size)


@dataclass
class Losses:
    """Losses of one micro-batch.

    Args:
        policy: scalar, entropy bonus and token losses of shapers included.
        value: scalar, without its weight.
        stats: detached (B,R) float32 per-token statistics: `ratio`, `clipped`, `log_ratio`, `value_clipped`, `entropy`,
            `policy_loss`, `value_loss`.
    """

    policy: Tensor
    value: Tensor
    stats: dict[str, Tensor]


def losses(
    rollout: Rollout,
    actor: "PreTrainedModel",
    critic: nn.Module,
    options: PPOLoss,
    shapers: Sequence[Shaper] = (),
    temperature: float = 1.0,
    normalizer: Tensor | None = None,
    live: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Losses:
    """Losses of a micro-batch, with gradients.

    Args:
        rollout: the rows, from `minibatches`.
        actor: the policy.
        critic: per-token scorer.
        options: clips and weights.
        shapers: may add token losses.
        temperature: of the log-probabilities.
        normalizer: tokens of the minibatch, for `global_tokens`; those of this micro-batch by default.
        live: log-probabilities, entropies and values (B,R) of a forward pass already done.

    Returns:
        The losses and statistics.
    """
    assert rollout.old_logprobs is not None
    assert rollout.old_values is not None
    assert rollout.advantages is not None
    assert rollout.returns is not None
    mask = rollout.response_mask
    logprobs, entropies, values = live or forward(rollout, actor, critic, temperature, options.entropy_coef > 0)
    if normalizer is None:
        normalizer = mask.sum()
    policy, stats = policy_loss(
        logprobs, rollout.old_logprobs, rollout.advantages, mask, options.clip_low, options.clip_high, options.dual_clip
    )
    if options.entropy_coef > 0:
        policy = policy - options.entropy_coef * entropies
    for shaper in shapers:
        extra = shaper.token_loss(rollout, logprobs)
        policy = policy if extra is None else policy + extra
    value, value_clipped = value_loss(values, rollout.old_values, rollout.returns, mask, options.value_clip)
    stats |= {
        "value_clipped": value_clipped,
        "entropy": entropies.detach(),
        "policy_loss": policy.detach(),
        "value_loss": value.detach(),
    }
    return Losses(
        reduce_loss(policy, mask, options.norm, normalizer), reduce_loss(value, mask, options.norm, normalizer), stats
    )


def forward(
    rollout: Rollout, actor: "PreTrainedModel", critic: nn.Module, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values of the response tokens, (B,R) float32 each, with gradients."""
    logits = policy_logits(actor, rollout)
    logprobs = gather_logprobs(logits, rollout.response_ids, temperature)
    entropies = entropy(logits if entropy_grad else logits.detach(), temperature)
    return logprobs, entropies, critic_values(critic, rollout)
