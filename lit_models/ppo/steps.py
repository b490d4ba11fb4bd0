"""The steps of PPO as functions: generate, score, shape, estimate advantages, and the losses of an update.

`LitPPO` runs them under the Trainer; they run as well in a loop of your own (see `examples/ppo_plain.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
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
from lit_models.ppo.macro.functional import macro_log_ratio, segment_starts, segment_sum, to_tokens
from lit_models.ppo.rewards import Reward, total_scores
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import Shaper
from lit_models.ppo.states import StateRecorder, embed_actions

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
        ratio: `token` clips the ratio of each token; `macro` that of each macro action, the product over its tokens
            (MA-RLHF); `macro_geo` their geometric mean.
        value_loss: whether the critic is compared with the returns at each `token`, or once per `macro` action with
            the values aggregated as for the advantages.
        norm: `global_tokens` divides by the tokens of the whole minibatch on all processes, `micro_batch` by those of
            each micro-batch (as the released code), `sequence` averages the means of the rows.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    vf_coef: float = 1.0
    entropy_coef: float = 0.0
    ratio: Literal["token", "macro", "macro_geo"] = "token"
    value_loss: Literal["token", "macro"] = "token"
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

    @property
    def needs_segments(self) -> bool:
        """Whether a loss is taken over macro actions."""
        return self.ratio != "token" or self.value_loss != "token"


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
        with torch.compiler.set_stance("force_eager"):  # compiled code would round, and so sample, differently
            made = generator.generate(actor, prompt_ids, prompt_mask, noise, all_done)
    finally:
        actor.train(training)
    response_ids, response_mask, ended, gate = made
    prompts, responses = _kept(prompt_ids, prompt_mask), _kept(response_ids, response_mask)
    columns = {
        name: [value for value in values for _ in range(samples)] for name, values in batch.get("columns", {}).items()
    }
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        ended=ended,
        prompts=tokenizer.batch_decode(prompts, skip_special_tokens=True),
        responses=tokenizer.batch_decode(responses, skip_special_tokens=True),
        columns=columns,
        gate=gate,
        noise=noise,
    )


def _kept(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row, read from the device at once instead of row by row."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]


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
    states: str | None = None,
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
        states: hidden states to keep, with the embeddings of the tokens: `ref_last` and `actor_last` are those after
            the last layer, `ref_layer_N` those after N layers of the reference.

    Returns:
        (B,) score per reward label.
    """
    pieces = rollout.split(batch_size)
    watched = actor if reference is None or states == "actor_last" else reference
    recorder = None if states is None else StateRecorder(watched, states)
    if not skip_trained:
        rollout.old_logprobs = torch.cat([policy_logprobs(actor, piece, temperature) for piece in pieces])
        rollout.old_values = torch.cat([critic_values(critic, piece) for piece in pieces])
    with nullcontext() if recorder is None or states == "actor_last" else recorder:
        if reference is None:
            with adapters_off(actor):
                rollout.ref_logprobs = torch.cat([policy_logprobs(actor, piece, temperature) for piece in pieces])
        else:
            rollout.ref_logprobs = torch.cat([policy_logprobs(reference, piece, temperature) for piece in pieces])
    if recorder is not None:
        if states == "actor_last":
            with recorder:
                for piece in pieces:
                    policy_logits(actor, piece)
        rollout.hidden = recorder.states(rollout.response_ids.shape[1])
        rollout.action_embeddings = embed_actions(actor, rollout.response_ids)
    rollout.scores, rollout.token_scores, parts = total_scores(rollout, rewards, networks)
    return parts


@torch.no_grad()
def shape(
    rollout: Rollout, shapers: Sequence[Shaper], options: ScoreOptions, all_reduce: AllReduce | None = None
) -> dict[str, Tensor]:
    """Fill in the token rewards: the placed score, token rewards, and what the shapers add.

    Args:
        rollout: from `score`; filled in place.
        shapers: applied in order.
        options: clipping and place of the score.
        all_reduce: sums a tensor over processes.

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
    metrics: dict[str, Tensor] = {"reward/extrinsic": rewards.sum(1)}
    for shaper in shapers:
        rewards, more = shaper.shape(rollout, rewards, all_reduce)
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
        generator: shuffles the rows of each epoch, alike on all processes; the order of the rollout without one.

    Yields:
        Micro-batches whose gradients belong together.
    """
    rows = len(rollout)
    device = rollout.prompt_ids.device
    if updates.single(rows):
        yield [rollout]
        return
    for _ in range(updates.epochs):
        size = updates.minibatch_size or rows
        indices = torch.arange(rows).split(size) if generator is None else shuffled(rollout, size, generator)
        for index in indices:
            yield rollout.rows(index.to(device)).split(updates.micro_batch_size)


def shuffled(rollout: Rollout, size: int, generator: torch.Generator) -> list[Tensor]:
    """Divide the rows of a rollout at random into minibatches, which are the same for any number of processes.

    No row leaves its process, yet all processes together take the minibatches that one process would take. To this end
    the N rows of all processes are written into a table with one column for each of the M rows of a minibatch. Every
    column is shuffled, and minibatch k is row k of the table. As processes own every W-th column, each has its share.

    Args:
        rollout: this process's rows, with the prompts of all processes taken in turns (`Rollout.noise`).
        size: rows of a minibatch on this process.
        generator: in the same state on all processes.

    Returns:
        Rows of this process for each minibatch, (m,) int64 in the order of their columns.
    """
    noise = rollout.noise
    if noise is None or noise.total * noise.samples != len(rollout) * noise.world_size:
        noise = RowNoise(0, 0, len(rollout))  # rows from elsewhere
    prompts, samples, world = noise.total, noise.samples, noise.world_size
    rows, columns = prompts * samples, size * world
    numbers = torch.rand(-(-rows // columns), columns, generator=generator)
    # The last row of the table may be incomplete: what is not there comes last in its column, whatever was drawn.
    table = torch.arange(numbers.numel()).view_as(numbers)
    drawn = table.gather(0, numbers.masked_fill(table >= rows, 2.0).argsort(0))
    minibatches = []
    for row in drawn:
        own = row[(row < rows) & (row % prompts % world == noise.rank)]
        # Row s P + p of the table is response s to prompt p; a process keeps the responses to a prompt together.
        minibatches.append(own % prompts // world * samples + own // prompts)
    return minibatches


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
        normalizer: (3,) of `loss_units` for the minibatch, for `global_tokens`; that of this micro-batch by default.
        live: log-probabilities, entropies and values (B,R) of a forward pass already done.

    Returns:
        The losses and statistics.
    """
    assert rollout.old_logprobs is not None
    assert rollout.old_values is not None
    assert rollout.advantages is not None
    assert rollout.returns is not None
    mask = rollout.response_mask
    policy_mask, value_mask = loss_masks(rollout, options)
    logprobs, entropies, values = live or forward(rollout, actor, critic, temperature, options.entropy_coef > 0)
    if normalizer is None:
        normalizer = loss_units([rollout], options)
    new, old = logprobs, rollout.old_logprobs
    if options.ratio != "token":
        assert rollout.segment_ids is not None
        new = macro_log_ratio(logprobs, old, rollout.segment_ids, mean=options.ratio == "macro_geo")
        old = torch.zeros_like(new)
    policy, stats = policy_loss(
        new, old, rollout.advantages, mask, options.clip_low, options.clip_high, options.dual_clip
    )
    total = reduce_loss(policy, policy_mask, options.norm, normalizer[1])
    extras = _token_extras(rollout, logprobs, entropies, options, shapers)
    if extras is not None:
        total = total + reduce_loss(extras, mask, options.norm, normalizer[0])
    old_values = rollout.old_values
    if options.value_loss == "macro":
        values, old_values = (_of_segments(rollout, value) for value in (values, old_values))
    value, value_clipped = value_loss(values, old_values, rollout.returns, mask, options.value_clip)
    stats |= {
        "value_clipped": value_clipped,
        "entropy": entropies.detach(),
        "policy_loss": (policy if extras is None else policy + extras).detach(),
        "value_loss": value.detach(),
    }
    return Losses(total, reduce_loss(value, value_mask, options.norm, normalizer[2]), stats)


def _token_extras(
    rollout: Rollout, logprobs: Tensor, entropies: Tensor, options: PPOLoss, shapers: Sequence[Shaper]
) -> Tensor | None:
    """Entropy bonus and token losses of the shapers, (B,R), or None where there are none."""
    parts = [-options.entropy_coef * entropies] if options.entropy_coef > 0 else []
    parts += [loss for shaper in shapers if (loss := shaper.token_loss(rollout, logprobs)) is not None]
    return sum(parts[1:], parts[0]) if parts else None


def _of_segments(rollout: Rollout, values: Tensor) -> Tensor:
    """Values aggregated over macro actions, (B,R): the same at all tokens of one."""
    assert rollout.segment_ids is not None
    assert rollout.segment_weights is not None
    return to_tokens(segment_sum(rollout.segment_weights * values, rollout.segment_ids), rollout.segment_ids)


def loss_masks(rollout: Rollout, options: PPOLoss) -> tuple[Tensor, Tensor]:
    """Columns that the losses of policy and critic are averaged over: tokens, or one for each macro action.

    Args:
        rollout: with advantages.
        options: of the losses.

    Returns:
        Two masks (B,R) float32.

    Raises:
        ValueError: if macro actions are needed and there are none.
    """
    if not options.needs_segments:
        return rollout.response_mask, rollout.response_mask
    if rollout.segment_ids is None or rollout.segment_weights is None:
        raise ValueError(
            "loss.ratio and loss.value_loss: macro needs macro actions; set model.advantage to lit_models.ppo.MacroGAE"
        )
    starts = segment_starts(rollout.segment_ids).float()
    tokens = rollout.response_mask
    return tokens if options.ratio == "token" else starts, tokens if options.value_loss == "token" else starts


def loss_units(micro_batches: Sequence[Rollout], options: PPOLoss) -> Tensor:
    """What the losses of a minibatch are divided by under `global_tokens`, on this process.

    Args:
        micro_batches: of one optimizer step.
        options: of the losses.

    Returns:
        (3,) float32: tokens, and the numbers of terms of the losses of policy and critic.
    """
    masks = [(micro.response_mask, *loss_masks(micro, options)) for micro in micro_batches]
    return torch.stack([torch.stack([mask.sum() for mask in row]) for row in masks]).sum(0)


def forward(
    rollout: Rollout, actor: "PreTrainedModel", critic: nn.Module, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values of the response tokens, (B,R) float32 each, with gradients."""
    logits = policy_logits(actor, rollout)
    logprobs = gather_logprobs(logits, rollout.response_ids, temperature)
    entropies = entropy(logits if entropy_grad else logits.detach(), temperature)
    return logprobs, entropies, critic_values(critic, rollout)
