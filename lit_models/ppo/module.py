"""PPO under the Trainer: one training step is one rollout and its optimizer steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from lit_models._ranks import warn
from lit_models.backbones import Backbone, has_adapters
from lit_models.base import GroupOptions, LitBase, all_reduce_sum
from lit_models.nn.clipping import clip_gradients
from lit_models.nn.flops import forward_flops, training_flops, transformer_cost
from lit_models.nn.logprobs import token_nll
from lit_models.nn.sharding import Sharding
from lit_models.ppo import steps
from lit_models.ppo.advantages import GAE, AdvantageEstimator
from lit_models.ppo.functional import adaptive_kl, masked_sum, position_ids
from lit_models.ppo.generation import Generator, RowNoise, Sampler
from lit_models.ppo.macro.view import macro_texts
from lit_models.ppo.metrics import (
    Meter,
    add_losses,
    add_rollout,
    rollout_explained_variance,
    sequence_scores,
    summed_kl,
)
from lit_models.ppo.rewards import Reward, RewardModel
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import KLPenalty, Shaper
from lit_models.ppo.steps import PPOLoss, ScoreOptions, Updates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompts = dict[str, Any]


class LitPPO(LitBase):
    """Proximal policy optimization of a language model against rewards, near a reference model.

    A training batch is a batch of prompts (`prompt_ids`, `prompt_mask` (B,P) int64, left-padded, and `columns`), or
    `{"prompt": ..., "ptx": ...}` with a batch of texts (`input_ids`, `attention_mask`, `labels` (B,T) int64) for the
    pre-training loss. The global step counts optimizer steps, of which a rollout has `updates.epochs` times the number
    of its minibatches.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/1707.06347
    * https://arxiv.org/abs/2203.02155

    Args:
        actor: the policy.
        tokenizer: hub id or folder.
        rewards: scores of responses, summed with their weights.
        critic: the value network; by default like the first reward model, else the actor's trunk.
        reference: the frozen policy of the KL penalty; by default like the actor, and with adapters the actor itself
            with its adapters off.
        pad_token: token of the vocabulary to pad with instead of the tokenizer's own.
        generator: how responses are sampled.
        samples_per_prompt: responses per prompt.
        scores: clipping and place of the score.
        shapers: change the token rewards, in order.
        advantage: how advantages are estimated.
        loss: clips and weights.
        updates: epochs, minibatches and gradient clipping.
        optimizer: factory taking the parameter groups of both networks.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        actor_group: learning rate and weight decay of the actor, where they differ from the optimizer's.
        critic_group: the same for the critic.
        logprob_temperature: temperature of log-probabilities; that of sampling by default.
        zero_critic_head: start from a critic that predicts 0 everywhere.
        critic_warmup_rollouts: rollouts in which only the critic learns.
        ptx_coef: weight of the pre-training loss.
        score_batch_size: rows per forward pass without gradients; null for all.
        max_rollouts: stop after this many rollouts; `trainer.max_steps` counts optimizer steps.
        eval_temperature: sampling temperature in validation, test and prediction; 0 takes the likeliest token.
        predict_samples: responses per prompt in prediction.
        seed: of sampling; the responses to a prompt depend on it, on the rollout and on the row alone.
        sharding: sharding, activation checkpointing and compilation.
    """

    ema_part = "actor"

    def __init__(
        self,
        actor: Backbone,
        tokenizer: str,
        rewards: list[Reward],
        critic: Backbone | None = None,
        reference: Backbone | None = None,
        pad_token: str | None = None,
        generator: Generator = Sampler(),
        samples_per_prompt: int = 1,
        scores: ScoreOptions = ScoreOptions(),
        shapers: list[Shaper] | None = None,
        advantage: AdvantageEstimator = GAE(),
        loss: PPOLoss = PPOLoss(),
        updates: Updates = Updates(),
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        actor_group: GroupOptions = GroupOptions(),
        critic_group: GroupOptions = GroupOptions(),
        logprob_temperature: float | None = None,
        zero_critic_head: bool = False,
        critic_warmup_rollouts: int = 0,
        ptx_coef: float = 0.0,
        score_batch_size: int | None = None,
        max_rollouts: int | None = None,
        eval_temperature: float | None = None,
        predict_samples: int = 1,
        seed: int = 1234,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        self.automatic_optimization = False
        if advantage.compat == "official":
            scores, loss = replace(scores, position="last_token"), replace(loss, norm="sequence")
            logprob_temperature = 1.0
        if loss.needs_segments and isinstance(advantage, GAE):
            raise ValueError(
                "model.loss.ratio and model.loss.value_loss: macro needs macro actions; set model.advantage to "
                "lit_models.ppo.MacroGAE"
            )
        if not rewards:
            raise ValueError("model.rewards is empty; name at least one reward")
        self.actor_source, self.critic_source, self.reference_source = actor, critic, reference
        self.tokenizer_name, self.pad_token = tokenizer, pad_token
        self.rewards, self.shapers = rewards, [KLPenalty()] if shapers is None else shapers
        self.generator, self.samples_per_prompt = generator, samples_per_prompt
        self.scores, self.advantage, self.loss, self.updates = scores, advantage, loss, updates
        self.actor_group, self.critic_group = actor_group, critic_group
        self.temperature = logprob_temperature or generator.temperature or 1.0
        self.generator.gate = self._single_need("gate", [s.needed_gate(generator.temperature) for s in self.shapers])
        self.states = self._single_need("states", [shaper.needed_states() for shaper in self.shapers])
        self.zero_critic_head, self.critic_warmup_rollouts, self.ptx_coef = (
            zero_critic_head,
            critic_warmup_rollouts,
            ptx_coef,
        )
        self.score_batch_size, self.max_rollouts = score_batch_size, max_rollouts
        self.eval_temperature, self.predict_samples, self.seed = eval_temperature, predict_samples, seed
        self.actor: Any = None
        self.critic: Any = None
        self.reference: Any = None
        self.reward_networks: Any = None
        self.frozen = self._rebuilt()
        self.rollouts = 0
        self.last_kl = 0.0
        self.last_episodes = 0
        self.newest: Rollout | None = None
        self._totals = torch.zeros(5, dtype=torch.float64)  # of evaluated rows: score, KL, length, ended, number
        self._stats: dict[str, float | Tensor] = {}
        self._step_lengths: Tensor | None = None  # (2,B) of prompts with responses, and of responses, in training
        if generator.truncates:
            warn(
                "model.generator rules tokens out (top_k or top_p), so log-probabilities are not those of the sampled "
                "distribution and KL estimates may turn negative",
                stacklevel=2,
            )

    @staticmethod
    def _single_need(key: str, wanted: list[Any]) -> Any:  # noqa: ANN401
        """What the shapers ask of sampling and scoring, on which they must agree."""
        needs = [need for need in wanted if need is not None]
        if any(need != needs[0] for need in needs):
            raise ValueError(f"model.shapers: two of them differ in {key}, got {needs[0]} and {needs[1]}")
        return needs[0] if needs else None

    # -- networks ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build actor, critic, reference and the rewards' networks."""
        if self.actor is not None:
            return self.shard_built()
        from lit_models.tokenization import check_vocabulary, load_tokenizer

        self.tokenizer = load_tokenizer(self.tokenizer_name, self.pad_token)
        for part in (self.generator, self.advantage, *self.shapers):
            part.prepare(self.tokenizer)
        # One network after the other, so that no process ever holds the whole weights of two.
        actor = self.build(self.actor_source.build)
        check_vocabulary(self.tokenizer, actor)
        steps.disable_dropout(actor)
        if self.reference_source is None and not has_adapters(actor):
            self.reference = self.frozen_copy(actor)
        self.place("actor", actor)
        self.place("critic", self.build(self._new_critic))
        if self.reference_source is not None:
            self.reference = self.place_frozen(self.build(self.reference_source.build))
        for shaper in self.shapers:
            own = self._built_by(shaper, actor, actor if self.reference is None else self.reference)
            if own is not None:
                self._place_shaper(shaper.name, own)
        networks = [self._built_by(reward, self.tokenizer) for reward in self.rewards]
        self.reward_networks = nn.ModuleList(
            [nn.Identity() if network is None else self.place_frozen(network) for network in networks]
        )
        self.check_ema()

    def _new_critic(self) -> nn.Module:
        from lit_models.nn.scoring import init_score_head
        from lit_models.tokenization import check_vocabulary

        critic = self._critic_source().build_scorer()
        critic.model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.zero_critic_head:
            init_score_head(critic.model, zero=True)
        check_vocabulary(self.tokenizer, critic.model)
        steps.disable_dropout(critic)
        return critic

    def _built_by(self, part: "Reward | Shaper", *arguments: Any) -> nn.Module | None:  # noqa: ANN401
        """The network of a reward or shaper; what building it has left in the part is there on all processes."""

        def make() -> tuple[nn.Module | None, dict[str, Any]]:
            before = dict(vars(part))
            network = part.build(*arguments)
            new = {name for name, value in vars(part).items() if name not in before or before[name] is not value}
            return network, {name: vars(part)[name] for name in new}

        network, left = self.build(make)
        vars(part).update(left)
        return network

    def _rebuilt(self) -> tuple[str, ...]:
        """Frozen networks that their source gives back on resume; the others are saved."""
        names = ["reference"] if (self.reference_source or self.actor_source).reproducible else []
        for number, reward in enumerate(self.rewards):
            if not isinstance(reward, RewardModel) or reward.backbone.reproducible:
                names.append(f"reward_networks.{number}")
        return tuple(names)

    def _critic_source(self) -> Backbone:
        if self.critic_source is not None:
            return self.critic_source
        models = [
            reward.backbone for reward in self.rewards if isinstance(reward, RewardModel) and reward.tokenizer is None
        ]
        return models[0] if models else self.actor_source

    def _place_shaper(self, name: str, network: nn.Module) -> None:
        """Keep a shaper's network, always in full precision: it is small, and takes differences of similar states."""
        if not name or hasattr(self, name):
            raise ValueError(f"model.shapers: the network name {name!r} is taken; give each shaper one of its own")
        options = Sharding(activation_checkpointing=self.sharding.activation_checkpointing)
        setattr(self, name, self.shard(network, options=options, exact=True))

    def shaper_networks(self) -> dict[str, tuple[Shaper, nn.Module]]:
        """The shapers that train a network of their own, with it, by its name."""
        return {s.name: (s, getattr(self, s.name)) for s in self.shapers if s.name and hasattr(self, s.name)}

    def trained_networks(self) -> dict[str, nn.Module]:
        """Actor, critic, and the networks of shapers."""
        own = {name: network for name, (_, network) in self.shaper_networks().items()}
        return {"actor": self.actor, "critic": self.critic, **own}

    def group_options(self) -> dict[str, GroupOptions]:
        """Settings of the networks' parameter groups."""
        own = {name: shaper.group for name, (shaper, _) in self.shaper_networks().items()}
        return {"actor": self.actor_group, "critic": self.critic_group, **own}

    def optimizer_steps(self) -> int:
        """Optimizer steps of the run: those of a rollout for each batch of prompts."""
        steps = super().optimizer_steps()
        if self.trainer.max_steps > 0:
            return steps  # the trainer's limit counts optimizer steps already
        rows = self.samples_per_prompt * getattr(getattr(self.trainer, "datamodule", None), "batch_size", 1)
        return steps * self.updates.epochs * -(-rows // (self.updates.minibatch_size or rows))

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """Actor, critic and the averaged actor."""
        models = {"actor": self.actor, "critic": self.critic.model}
        if self.ema is not None:
            models["ema"] = self.ema.model if self.ema_part == "critic" else self.ema
        return models

    # -- KL coefficient ----------------------------------------------------------------------------------------------

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty; 0 without one."""
        return next((shaper.coef for shaper in self.shapers if isinstance(shaper, KLPenalty)), 0.0)

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        for shaper in self.shapers:
            if isinstance(shaper, KLPenalty):
                shaper.coef = value

    def adapt_kl(self, target: float, horizon: float = 10000.0) -> None:
        """Move the KL coefficient after a rollout so that the divergence approaches `target` (nats per response)."""
        self.kl_coef = adaptive_kl(self.kl_coef, self.last_kl, self.last_episodes, target, horizon)

    # -- checks before work starts -----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Check options that only show once the trainer is known.

        Raises:
            ValueError: naming the option and the remedy.
        """
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise ValueError(
                "trainer.precision: PPO clips each network's gradient by itself, which float16 scaling breaks; "
                "use bf16-mixed"
            )
        data = getattr(self.trainer, "datamodule", None)
        if self.ptx_coef > 0 and data is not None and getattr(data, "ptx", None) is None:
            raise ValueError(
                "model.ptx_coef is positive, but the data has no pre-training texts; use datamodules.PromptsWithText"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        """One rollout and its updates."""
        prompts, ptx = (batch["prompt"], batch["ptx"]) if "ptx" in batch else (batch, None)
        self._check_share(prompts)
        meter, clock = Meter(), _Clock(self.device)
        rollout = self.generate(prompts, self.rollouts, self.samples_per_prompt)
        clock.lap("time/generate")
        single = rollout.single_pass = self.updates.single(len(rollout))
        live = self._forward(rollout) if single else None
        if live is not None:
            rollout.old_logprobs, rollout.old_values = live[0].detach(), live[2].detach()
        parts = self.score(rollout, skip_trained=single)
        parts |= steps.shape(rollout, self.shapers, self.scores, self.all_reduce)
        parts |= steps.advantages(rollout, self.advantage, self.all_reduce)
        clock.lap("time/score")
        largest = {name: parts.pop(name) for name in list(parts) if name.endswith("_max")}
        add_rollout(meter, rollout, parts)
        norms, ratio = self._update(rollout, ptx, live, meter)
        clock.lap("time/update")
        self._finish(rollout, meter, norms, ratio, clock.laps, largest)

    def _check_share(self, prompts: Prompts) -> None:
        """Make sure that all processes have as many prompts: they take their optimizer steps together."""
        world, own = self.trainer.world_size, len(prompts["prompt_ids"])
        total = int(self.all_reduce(torch.tensor(own, device=self.device)))
        if total != own * world:
            raise ValueError(
                f"data.batch_size: the {total} prompts of a rollout cannot be divided equally among {world} processes; "
                f"train on a multiple of {world} prompts (data.limit_train), or on fewer processes (trainer.devices)"
            )

    def generate(self, batch: Prompts, rollout: int, samples: int = 1, stream: int = 0) -> Rollout:
        """Sample responses to this process's share of a global batch of prompts.

        Args:
            batch: `prompt_ids` and `prompt_mask` (B,P) int64, left-padded; optional `columns`.
            rollout: counter that the random numbers depend on.
            samples: responses per prompt.
            stream: separates the random numbers of training (0) from those of evaluation.

        Returns:
            The rollout with texts.
        """
        prompt_ids = batch["prompt_ids"]
        trainer = self._trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        noise = RowNoise(self.seed + 7919 * stream, rollout, len(prompt_ids) * world, samples, rank, world)
        together = self.device_mesh is not None and not self.sharding.gather_to_generate
        all_done = self._all_done if together else bool
        with nullcontext() if together else self.gathered(self.actor):
            return steps.generate(self.actor, self.generator, self.tokenizer, batch, noise, samples, all_done)

    def score(self, rollout: Rollout, skip_trained: bool = False) -> dict[str, Tensor]:
        """Fill in log-probabilities, values and scores; see `steps.score`."""
        networks = [None if isinstance(network, nn.Identity) else network for network in self.reward_networks]
        parts = steps.score(
            rollout,
            self.actor,
            self.critic,
            self.reference,
            self.rewards,
            networks,
            self.temperature,
            self.score_batch_size,
            skip_trained,
            self.states,
        )
        return {f"score/{name}": value for name, value in parts.items()} if len(parts) > 1 else {}

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        return all_reduce_sum(self, value)

    def _forward(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        return steps.forward(rollout, self.actor, self.critic, self.temperature, self.loss.entropy_coef > 0)

    def _all_done(self, done: bool) -> bool:
        return bool(self.trainer.strategy.reduce_boolean_decision(done, all=True))

    def _update(
        self, rollout: Rollout, ptx: Prompts | None, live: tuple[Tensor, Tensor, Tensor] | None, meter: Meter
    ) -> tuple[dict[str, float], Tensor]:
        """The optimizer steps of a rollout; returns the newest gradient norms and the largest ratio."""
        optimizer: Any = self.optimizers()
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + self.rollouts)
        policy_weight = 0.0 if self.rollouts < self.critic_warmup_rollouts else 1.0
        no_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        norms: dict[str, float] = {}
        ratio = rollout.response_mask.new_ones(())
        per_epoch = -(-len(rollout) // (self.updates.minibatch_size or len(rollout)))
        for step, micro_batches in enumerate(steps.minibatches(rollout, self.updates, shuffle)):
            tokens = self.all_reduce(steps.loss_units(micro_batches, self.loss))
            learning = self._learning_shapers(step // per_epoch)
            optimizer.zero_grad()
            for number, micro in enumerate(micro_batches):
                last = number == len(micro_batches) - 1
                with nullcontext() if last else no_sync():
                    result = steps.losses(
                        micro, self.actor, self.critic, self.loss, self.shapers, self.temperature, tokens, live
                    )
                    total = policy_weight * result.policy + self.loss.vf_coef * result.value
                    if self.loss.norm == "global_tokens":
                        total = total * self.trainer.world_size  # undoes the averaging of gradients over processes
                    else:
                        total = total / len(micro_batches)
                    total = total + self._shaper_losses(micro, learning, tokens[0], meter)
                    if ptx is not None and self.ptx_coef > 0 and last:
                        total = total + self.ptx_coef * self._ptx_loss(ptx, meter)
                    self.manual_backward(total)
                add_losses(meter, result.stats, micro.response_mask)
                ratio = torch.maximum(ratio, result.stats["ratio"].max())
            for name, (_, network) in self.shaper_networks().items():
                if name not in learning:
                    for parameter in network.parameters():
                        parameter.grad = None  # so that the optimizer leaves it alone, momentum included
            norms |= self._clip_gradients()
            optimizer.step()
            if (scheduler := self.lr_schedulers()) is not None:
                cast(Any, scheduler).step()
        return norms, ratio

    def _learning_shapers(self, epoch: int) -> set[str]:
        """Names of the shapers' networks that learn in a pass over the rollout."""
        return {name for name, (shaper, _) in self.shaper_networks().items() if epoch < shaper.epochs}

    def _shaper_losses(self, micro: Rollout, learning: set[str], tokens: Tensor, meter: Meter) -> Tensor:
        """Losses of the shapers' networks, averaged over the tokens of the minibatch on all processes."""
        total = tokens.new_zeros(())
        for name, (shaper, network) in self.shaper_networks().items():
            if name in learning and (loss := shaper.network_loss(micro)) is not None:
                meter.add(f"{name}/loss", loss, micro.response_mask)
                total = total + masked_sum(loss, micro.response_mask) / tokens.clamp(min=1)
            elif self.device_mesh is None:  # every parameter takes part in every backward pass, as DDP expects
                total = total + 0.0 * sum(p.sum() for p in network.parameters() if p.requires_grad)
        return total * self.trainer.world_size

    def _ptx_loss(self, batch: Prompts, meter: Meter) -> Tensor:
        """Language-model loss on texts, averaged over their tokens on all processes."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.actor(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        nll, counted = token_nll(logits, batch["labels"])
        meter.add("policy/ptx_loss", nll, counted)
        return nll.sum() * self.trainer.world_size / self.all_reduce(counted.sum().float()).clamp(min=1)

    def _clip_gradients(self) -> dict[str, float]:
        """Clip each network's gradient; returns the norms before clipping under their logged names."""
        limit = self.updates.max_grad_norm or float("inf")
        norms = {}
        labels = {"actor": "policy", "critic": "value"}
        for name, network in self.trained_networks().items():
            if all(parameter.grad is None for parameter in network.parameters()):
                continue
            name = labels.get(name, name)
            norms[f"{name}/grad_norm"] = float(clip_gradients(network.parameters(), limit))
        return norms

    def _finish(
        self,
        rollout: Rollout,
        meter: Meter,
        norms: dict[str, float],
        ratio: Tensor,
        laps: dict[str, float],
        largest: dict[str, Tensor],
    ) -> None:
        """Count the rollout, log it, and stop at `max_rollouts`."""
        metrics = meter.compute(self.all_reduce) | norms | laps
        metrics |= self._extremes(rollout, ratio, largest)
        metrics["value/explained_variance"] = float(rollout_explained_variance(rollout, self.all_reduce))
        metrics["kl/coef"] = self.kl_coef
        for name, value in self._learning_rates().items():
            metrics[name] = value
        tokens = float(rollout.attention_mask.sum())
        metrics["tokens_per_s"] = float(self.all_reduce(torch.tensor(tokens, device=self.device))) / sum(laps.values())
        shown = {name: metrics.pop(name) for name in ("score/mean", "kl/ref")}
        self.log_dict(metrics)
        self.log_dict(shown, prog_bar=True)
        self.rollouts += 1
        self.last_kl = shown["kl/ref"]
        self.last_episodes = len(rollout) * self.trainer.world_size
        self.newest = rollout
        self._step_lengths = torch.stack([rollout.attention_mask.sum(1), rollout.response_mask.sum(1).long()])
        self._stats = {
            "tokens": tokens,
            "responses": float(len(rollout)),
            "generate_s": laps["time/generate"],
            "score_s": laps["time/score"],
            "grad_norm": math.hypot(*norms.values()),
        }
        if self.max_rollouts is not None and self.rollouts >= self.max_rollouts:
            self.trainer.should_stop = True

    def _extremes(self, rollout: Rollout, ratio: Tensor, more: dict[str, Tensor]) -> dict[str, float]:
        """Largest and smallest values over all processes, those of named (B,) values per row among them."""
        score = sequence_scores(rollout)
        found = [score.max(), -score.min(), rollout.lengths.max().float(), ratio, *(row.max() for row in more.values())]
        largest = torch.stack(found).double()
        if self.trainer.world_size > 1:
            largest = self.trainer.strategy.reduce(largest, reduce_op="max")
        names = ("score/max", "score/min", "response/len_max", "policy/ratio_max", *more)
        values = dict(zip(names, largest.tolist(), strict=True))
        return values | {"score/min": -values["score/min"]}

    def _learning_rates(self) -> dict[str, float]:
        optimizer: Any = self.optimizers()
        rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        labels = {"actor": "policy", "critic": "value"}
        return {
            f"{labels.get(name, name)}/lr": rates.get(name, rates.get(f"{name}_no_decay", 0.0))
            for name in self.trained_networks()
        }

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score sampled responses to validation prompts."""
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/score`, `val/kl` (nats), `val/length` (tokens) and `val/eos_frac`, over all prompts and ranks."""
        self._log_evaluation("val")

    def test_step(self, batch: Prompts, batch_idx: int) -> None:
        """Score sampled responses to test prompts."""
        self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log `test/score`, `test/kl`, `test/length` and `test/eos_frac` in the same way."""
        self._log_evaluation("test")

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Responses and scores, `predict_samples` per prompt, one row per prompt."""
        with self._sampling_for_evaluation():
            return self._sets(batch, batch_idx, self.predict_samples, 2)

    def sample_sets(self, batch: Prompts, samples: int) -> list[dict[str, Any]]:
        """Several responses to each prompt, drawn as in training.

        Args:
            batch: of prompts.
            samples: responses per prompt.

        Returns:
            `prompt`, `responses` and `scores`, one dict per prompt.
        """
        return self._sets(batch, self.rollouts, samples, 4)

    def _sets(self, batch: Prompts, number: int, size: int, stream: int) -> list[dict[str, Any]]:
        rollout = self.generate(batch, number, size, stream)
        self.score(rollout)
        scores = sequence_scores(rollout).tolist()
        return [
            {
                "prompt": rollout.prompts[row],
                "responses": rollout.responses[row : row + size],
                "scores": scores[row : row + size],
            }
            for row in range(0, len(rollout), size)
        ]

    def _evaluate(self, batch: Prompts, batch_idx: int) -> None:
        with self._sampling_for_evaluation():
            rollout = self.generate(batch, batch_idx, stream=1)
        self.score(rollout)
        self.newest = rollout
        ended = rollout.ended
        rows = [sequence_scores(rollout), summed_kl(rollout), rollout.lengths, ended, torch.ones_like(ended)]
        self._totals += torch.stack([row.double().sum() for row in rows]).cpu()

    def _log_evaluation(self, stage: str) -> None:
        """Log the means over the rows of all ranks, of which some may have had none."""
        *sums, count = all_reduce_sum(self, self._totals).tolist()
        self._totals = torch.zeros_like(self._totals)
        names = ("score", "kl", "length", "eos_frac")
        means = {f"{stage}/{name}": total / max(count, 1) for name, total in zip(names, sums, strict=True)}
        self.log_dict(means, prog_bar=stage == "val", sync_dist=True)

    @contextmanager
    def _sampling_for_evaluation(self) -> Iterator[None]:
        """Sample at `eval_temperature`, where one is given."""
        usual = self.generator.temperature
        if self.eval_temperature is not None:
            self.generator.temperature = self.eval_temperature
        try:
            yield
        finally:
            self.generator.temperature = usual

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    def samples(self) -> list[dict[str, str | float]]:
        """Rows of the newest rollout: prompt, response, score, kl (nats) and length (tokens).

        With macro actions also the response cut into them, with the advantage of each.
        """
        rollout = self.newest
        if rollout is None:
            return []
        columns = (rollout.prompts, rollout.responses, sequence_scores(rollout), summed_kl(rollout), rollout.lengths)
        rows: list[dict[str, str | float]] = [
            {"prompt": prompt, "response": response, "score": float(score), "kl": float(kl), "length": float(length)}
            for prompt, response, score, kl, length in zip(*columns, strict=True)
        ]
        if rollout.segment_ids is not None and rollout.advantages is not None:
            for row, text in zip(rows, macro_texts(rollout, self.tokenizer), strict=True):
                row["macro_actions"] = text
        return rows

    def step_stats(self) -> dict[str, float | Tensor]:
        """What the newest rollout was on this process.

        Returns:
            `tokens` of prompts and responses, `responses`, the seconds `generate_s` and `score_s` that go before the
            updates, and `grad_norm`, that of all networks together before clipping, in the newest update.
        """
        return self._stats

    def step_flops(self) -> Tensor | None:
        """Operations for the newest rollout: generation, scores and updates.

        Left out are texts of the pre-training loss and the networks of shapers.
        """
        if self._step_lengths is None:
            return None
        lengths, responses = self._step_lengths
        head = transformer_cost(self.actor.get_output_embeddings(), config={})  # predicts the response alone
        actor, critic = transformer_cost(self.actor) - head, transformer_cost(self.critic)
        # The actor generates; the reference, or the actor in its place, and the rewards rate what it made. Before
        # several updates, the actor and the critic do so too.
        again = int(not self.updates.single(len(lengths)))
        fixed = [actor, actor, *[actor, critic] * again, *map(transformer_cost, self.reward_networks)]
        flops = forward_flops(head, responses) * (2 + again)
        flops = flops + torch.stack([forward_flops(cost, lengths) for cost in fixed]).sum()
        update = training_flops(actor, lengths) + training_flops(critic, lengths) + training_flops(head, responses)
        return flops + self.updates.epochs * update

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rollout counter, on which the random numbers depend, and the KL coefficient."""
        super().on_save_checkpoint(checkpoint)
        shapers = [shaper.state_dict() for shaper in self.shapers]
        checkpoint["ppo"] = {"rollouts": self.rollouts, "kl_coef": self.kl_coef, "shapers": shapers}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the rollout counter and the KL coefficient."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("ppo", {})
        self.rollouts = state.get("rollouts", 0)
        self.kl_coef = state.get("kl_coef", self.kl_coef)
        for shaper, saved in zip(self.shapers, state.get("shapers", []), strict=False):
            if saved:
                shaper.load_state_dict(saved)


class _Clock:
    """Seconds between laps, with the work of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.laps: dict[str, float] = {}
        self._device = device
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else its work would count in the lap that first waits for it
        now = time.perf_counter()
        self.laps[name] = now - self._start
        self._start = now
