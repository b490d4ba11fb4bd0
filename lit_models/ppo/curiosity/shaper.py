"""Curiosity as a reward shaper."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_models._ranks import warn
from lit_models.nn.groups import GroupOptions
from lit_models.ppo.curiosity.functional import Whitening, intrinsic_reward
from lit_models.ppo.curiosity.modeling import ICM, Encoder, Prediction, icm_loss, prediction_error
from lit_models.ppo.functional import AllReduce, masked_moments
from lit_models.ppo.gate import Gate
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import Shaper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLLAPSED = 1e-3
"""Standard deviation of the features over tokens below which the encoder says nothing any more."""
RATE = 0.1
"""Largest relative step of the entropy controller per rollout."""


@dataclass
class Curiosity(Shaper):
    """Rewards tokens after which the next hidden state is badly predicted (CD-RLHF).

    If you use this shaper in your research, please cite:

    * https://arxiv.org/abs/2501.11463

    Args:
        eta: weight of the whitened prediction error in the token rewards; 0 leaves the curiosity module out.
        schedule: `constant`; `linear` goes to `eta_end` over `schedule_rollouts`; `entropy` raises `eta` while the
            policy's entropy per token is below `target_entropy` and lowers it above.
        eta_end: last weight of the linear schedule.
        schedule_rollouts: length of the linear schedule.
        target_entropy: nats per token, for the entropy schedule.
        gate: `topk` rewards only tokens that are not among the k likeliest ones, `prob` only those with a probability
            below `threshold`, `none` all.
        topk: k.
        threshold: probability.
        whiten: see `lit_models.ppo.curiosity.functional.intrinsic_reward`; `running` keeps the decay of curiosity.
        whiten_rows: rows that share the statistics, such as those of a micro-batch; null for the global batch.
        whiten_mask: `valid` takes the statistics over valid tokens, `all` over padding too, as the released code does.
        states: hidden states: `ref_last` and `actor_last` are those of the last layer of reference and policy,
            `ref_layer_N` those after N layers of the reference.
        encoder: features of the states; see `lit_models.ppo.curiosity.modeling.ICM`.
        num_layers: linear layers of encoder and forward model.
        intermediate_size: width of the forward model; that of the policy's feed-forward layers by default.
        detach_target: no gradient into the features of the next state.
        inverse_model: also predict the action.
        loss: half the distance (`norm`) or half its square (`squared`).
        epochs: passes over a rollout in which the module learns; later ones leave it.
        lr: learning rate of the module; the optimizer's own by default.
        weight_decay: of the module; the optimizer's own by default.
    """

    eta: float = 0.04
    schedule: Literal["constant", "linear", "entropy"] = "constant"
    eta_end: float = 0.0
    schedule_rollouts: int = 0
    target_entropy: float | None = None
    gate: Literal["topk", "prob", "none"] = "topk"
    topk: int = 1
    threshold: float = 0.5
    whiten: Whitening = "mean_std"
    whiten_rows: int | None = None
    whiten_mask: Literal["valid", "all"] = "valid"
    states: str = "ref_last"
    encoder: Encoder = "mlp"
    num_layers: int = 3
    intermediate_size: int | None = None
    detach_target: bool = False
    inverse_model: bool = False
    loss: Literal["norm", "squared"] = "norm"
    epochs: int = 1
    lr: float | None = None
    weight_decay: float | None = None

    name = "icm"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option.
        """
        for key, least in (("eta", 0), ("eta_end", 0), ("topk", 1), ("num_layers", 2), ("epochs", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"shapers.{key} of Curiosity must be at least {least}, got {getattr(self, key)}")
        if self.schedule == "linear" and self.schedule_rollouts < 1:
            raise ValueError("shapers.schedule: linear needs shapers.schedule_rollouts, at least 1")
        if self.schedule == "entropy" and (self.target_entropy is None or self.target_entropy <= 0):
            raise ValueError("shapers.schedule: entropy needs shapers.target_entropy, in nats per token above 0")
        if not re.fullmatch(r"ref_last|actor_last|ref_layer_[1-9]\d*", self.states):
            raise ValueError(f"shapers.states must be ref_last, actor_last or ref_layer_N, got {self.states!r}")
        if self.whiten_rows is not None and self.whiten_rows < 1:
            raise ValueError(f"shapers.whiten_rows must be at least 1 or null, got {self.whiten_rows}")
        self.present_eta = self.eta
        self.network: Any = None
        self._warned = False
        self._kept: Prediction | None = None

    @property
    def group(self) -> GroupOptions:
        """Settings of the module's parameter groups."""
        return GroupOptions(self.lr, self.weight_decay)

    @property
    def active(self) -> bool:
        """Whether the module is needed at all."""
        return self.eta > 0 or (self.schedule == "linear" and self.eta_end > 0)

    def needed_states(self) -> str | None:
        """The hidden states."""
        return self.states if self.active else None

    def needed_gate(self, temperature: float) -> Gate | None:
        """The gate."""
        if self.gate == "none" or not self.active:
            return None
        return Gate(self.gate, self.topk, self.threshold, temperature or 1.0)

    def build(self, actor: "PreTrainedModel", reference: "PreTrainedModel") -> nn.Module | None:
        """Make the curiosity module.

        Raises:
            ValueError: if policy and reference differ in width.
        """
        if not self.active:
            return None
        table: Any = actor.get_input_embeddings()
        width = int(table.weight.shape[1])
        source = actor if self.states == "actor_last" else reference
        states = source.config.get_text_config().hidden_size
        if width != states:
            raise ValueError(
                f"shapers: Curiosity needs token embeddings of the policy as wide as its states, got {width} and "
                f"{states}; take a reference of the policy's size or shapers.states: actor_last"
            )
        inner = self.intermediate_size or feed_forward_size(actor.config)
        self.network = ICM(width, inner, self.num_layers, self.encoder, self.detach_target, self.inverse_model)
        return self.network  # type: ignore[no-any-return]

    def shape(
        self, rollout: Rollout, rewards: Tensor, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the weighted intrinsic reward.

        Raises:
            ValueError: if the generator has no gate.
        """
        if not self.active:
            return rewards, {}
        if self.gate != "none" and rollout.gate is None:
            raise ValueError(
                "shapers.gate: the generator returns no Generation.gate; set shapers.gate to none or let it call `gate`"
            )
        mask = rollout.response_mask
        with torch.set_grad_enabled(rollout.single_pass):
            prediction = self.network(rollout.hidden, rollout.action_embeddings)
        self._kept = prediction if rollout.single_pass else None  # what the only update would compute again
        errors = prediction_error(prediction).detach()
        mean, variance = masked_moments(errors, mask, all_reduce)
        self._schedule(rollout, all_reduce)
        bonus = intrinsic_reward(
            errors,
            mask,
            rollout.gate if self.gate != "none" else None,
            self.whiten,
            self._running_std(errors, mask, all_reduce),
            self.whiten_rows,
            self.whiten_mask == "all",
            all_reduce,
        )
        weighted = self.present_eta * bonus
        spread = feature_spread(prediction.target, mask, all_reduce)
        self._warn_of_collapse(spread)
        gated = mask if rollout.gate is None else mask * rollout.gate
        count = mask.sum(1).clamp(min=1)
        rows = torch.ones_like(count)
        metrics = {
            "icm/raw_mean": rows * mean.float(),
            "icm/raw_std": rows * variance.sqrt().float(),
            "icm/gate_frac": gated.sum(1) / count,
            "icm/bonus_mean": (weighted * mask).sum(1) / count,
            "icm/bonus_abs_sum_per_seq": (weighted * mask).abs().sum(1),
            "icm/phi_std": rows * spread,
            "icm/eta": rows * self.present_eta,
            "reward/intrinsic": (weighted * mask).sum(1),
        }
        return rewards + weighted, metrics

    def network_loss(self, rollout: Rollout) -> Tensor | None:
        """Prediction loss of each token of a micro-batch, (B,R) float32, with gradients."""
        if not self.active:
            return None
        assert rollout.hidden is not None
        assert rollout.action_embeddings is not None
        prediction, self._kept = self._kept, None
        if prediction is None:
            prediction = self.network(rollout.hidden, rollout.action_embeddings)
        return icm_loss(prediction, rollout.action_embeddings, self.loss)

    def state_dict(self) -> dict[str, Any]:
        """The weight that the entropy controller has reached."""
        return {"eta": self.present_eta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the weight back."""
        self.present_eta = state["eta"]

    def _schedule(self, rollout: Rollout, all_reduce: AllReduce | None) -> None:
        if self.schedule == "linear":
            done = min(1.0, (rollout.noise.rollout if rollout.noise is not None else 0) / self.schedule_rollouts)
            self.present_eta = self.eta + (self.eta_end - self.eta) * done
        elif self.schedule == "entropy":
            assert rollout.old_logprobs is not None
            assert self.target_entropy is not None
            entropy = -float(masked_moments(rollout.old_logprobs, rollout.response_mask, all_reduce)[0])
            error = (self.target_entropy - entropy) / self.target_entropy
            self.present_eta *= 1 + max(-RATE, min(RATE, error))

    def _running_std(self, errors: Tensor, mask: Tensor, all_reduce: AllReduce | None) -> Tensor | None:
        """Standard deviation of all errors so far, this rollout's included."""
        if self.whiten != "running":
            return None
        wide = torch.where(mask.bool(), errors.double(), 0.0)
        new = torch.stack([mask.double().sum(), wide.sum(), wide.square().sum()])
        moments = self.network.error_moments
        moments += all_reduce(new) if all_reduce is not None else new
        count = moments[0].clamp(min=1)
        return (moments[2] / count - (moments[1] / count).square()).clamp(min=0).sqrt().float()

    def _warn_of_collapse(self, spread: Tensor) -> None:
        if not self._warned and float(spread) < COLLAPSED:
            self._warned = True
            warn(
                f"the features of Curiosity hardly differ between tokens (standard deviation {float(spread):.1e}), so "
                "that its errors mean nothing; try shapers.detach_target: true or shapers.inverse_model: true",
                stacklevel=2,
            )


def feature_spread(features: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Standard deviation of features over the valid tokens, averaged over features.

    Args:
        features: (B,R,H).
        mask: (B,R).
        all_reduce: sums a tensor over processes; None takes this process alone. It is called twice.

    Returns:
        float32 scalar; 0 for fewer than two tokens.
    """
    tokens = features.detach()[mask.bool()].float()
    sums = torch.cat([tokens.new_tensor([len(tokens)]), tokens.sum(0)])
    sums = sums if all_reduce is None else all_reduce(sums)
    count = sums[0].clamp(min=1)
    squares = (tokens - sums[1:] / count).square().sum(0)
    squares = squares if all_reduce is None else all_reduce(squares)
    return (squares / count).sqrt().mean()


def feed_forward_size(config: Any) -> int:  # noqa: ANN401
    """Width of a model's feed-forward layers.

    Args:
        config: of a Hugging Face model.

    Returns:
        `intermediate_size`, or four times the hidden size for families that have no such entry.
    """
    text = config.get_text_config()
    return int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size)
