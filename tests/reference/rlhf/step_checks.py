"""Whole updates of the released code against the steps of PPO, networks and gradients included."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from lit_models.nn.scoring import TokenScorer
from lit_models.ppo import GAE, KLPenalty, PPOLoss, ScoreOptions, steps
from lit_models.ppo.advantages import AdvantageEstimator
from lit_models.ppo.curiosity import ICM, Curiosity
from lit_models.ppo.curiosity.functional import intrinsic_reward
from lit_models.ppo.curiosity.modeling import prediction_error
from lit_models.ppo.functional import masked_mean
from lit_models.ppo.macro import MacroGAE
from lit_models.ppo.macro import functional as macro
from lit_models.ppo.rewards import Reward
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import Shaper

from .checks import assert_near
from .curiosity_checks import grad_norms


class _EndScore(Reward):
    """Score at the last token."""

    def score(self, rollout: Rollout, network: torch.nn.Module | None) -> Tensor:
        return network(rollout.input_ids, rollout.attention_mask, rollout.position_ids)[:, -1]


def _config(data: dict) -> GPT2Config:
    sizes = {key: data[key] for key in ("n_embd", "n_layer", "n_head", "n_positions")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(
        vocab_size=data["vocab"], bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=1, **sizes, **dropout
    )


def _language_model(data: dict, weights: dict[str, Tensor], part: str) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(_config(data))
    state = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.weight"]
    assert not result.unexpected_keys
    return model


def _scorer(data: dict, weights: dict[str, Tensor], part: str) -> TokenScorer:
    model = GPT2ForSequenceClassification(_config(data))
    state = {_ours(name, part): value for name, value in weights.items() if name.startswith(f"{part}.")}
    model.load_state_dict(state)
    return TokenScorer(model)


def _ours(name: str, part: str) -> str:
    name = name.removeprefix(f"{part}.")
    return "score.weight" if name == "v_head.weight" else name.replace("rwtransformer.", "transformer.")


class _Step:
    """Networks and rollout of a stored update."""

    def __init__(self, data: dict, weights: dict[str, Tensor], shapers: list[Shaper]) -> None:
        self.data, self.shapers, self.weights = data, shapers, weights
        assert sorted(weights) == sorted(data["param_names"])
        self.actor, self.critic = _language_model(data, weights, "actor"), _scorer(data, weights, "critic")
        self.reference = _language_model(data, weights, "ref")
        ids, prompt = torch.tensor(data["input_ids"]), data["prompt_len"]
        assert ids.shape[1] == prompt + data["resp_len"]
        rows = len(ids)
        self.rollout = Rollout(
            prompt_ids=ids[:, :prompt],
            prompt_mask=torch.ones(rows, prompt, dtype=torch.int64),
            response_ids=ids[:, prompt:],
            response_mask=torch.ones(rows, data["resp_len"]),
            prompts=[""] * rows,
            responses=[""] * rows,
            ended=torch.ones(rows, dtype=torch.bool),
        )
        states = next((need for shaper in shapers if (need := shaper.needed_states())), None)
        for shaper in shapers:
            shaper.build(self.actor, self.reference)
        steps.score(
            self.rollout,
            self.actor,
            self.critic,
            self.reference,
            [_EndScore()],
            [_scorer(data, weights, "reward")],
            states=states,
        )
        start = prompt - 1
        assert_near(self.rollout.ref_logprobs, torch.tensor(data["ref_logprobs"])[:, start:].tolist())
        assert_near(self.rollout.scores, data["scores"])
        # The update is one of a policy that has moved since it sampled.
        self.rollout.old_logprobs = torch.tensor(data["old_logprobs"])[:, start:]
        self.rollout.old_values = torch.tensor(data["old_values"])[:, start:]

    def update(self, estimator: AdvantageEstimator) -> steps.Losses:
        """Losses, with gradients in the networks."""
        data = self.data
        steps.shape(self.rollout, self.shapers, ScoreOptions(clip=2.5))
        steps.advantages(self.rollout, estimator)
        options = PPOLoss(data["cliprange"], data["cliprange"], value_clip=data["cliprange_value"], norm="sequence")
        result = steps.losses(self.rollout, self.actor, self.critic, options, self.shapers)
        (result.policy + result.value).backward()
        for part, network in (("actor", self.actor), ("critic", self.critic.model)):
            norms, stored = grad_norms(network), data[f"{part}_grad_norms"]
            assert len(norms) == len(stored)
            for name, value in stored.items():
                assert_near(norms[_ours(name, part)], value, 1e-4)
        return result


def check_full_step_ma(data: dict, weights: dict[str, Tensor]) -> None:
    step = _Step(data, weights, [KLPenalty(data["kl_ctl"])])
    assert data["last_token_isolated"]
    assert data["reward_aggregation"].startswith("weighted")
    estimator = MacroGAE(
        "fixed",
        n=data["ngram"],
        value_aggregation=data["value_function"],
        gamma=data["gamma"],
        lam=data["lam"],
        compat="official",
    )
    result = step.update(estimator)
    rollout = step.rollout
    starts = macro.segment_starts(rollout.segment_ids)
    assert [data["prompt_len"] - 1 + int(column) for column in starts[0].nonzero()] == data["boundaries"]
    assert_near(
        macro.segment_sum(rollout.segment_weights * rollout.old_values, rollout.segment_ids), data["macro_values"]
    )
    assert_near(
        macro.segment_sum(rollout.segment_weights * rollout.rewards, rollout.segment_ids), data["macro_rewards"]
    )
    assert_near(rollout.advantages[starts][None], data["advantages"])
    assert_near(rollout.returns[starts][None], data["returns"])
    assert_near(result.policy.detach(), data["actor_loss"])
    assert_near(result.value.detach(), data["critic_loss"])


def check_full_step_cd(data: dict, weights: dict[str, Tensor]) -> None:
    curiosity = Curiosity(eta=data["eta"], intermediate_size=data["icm_intermediate"])
    step = _Step(data, weights, [KLPenalty(data["kl_ctl"]), curiosity])
    assert data["icm_hidden"] == data["n_embd"]
    icm: ICM = curiosity.network
    icm.load_state_dict(
        {name.removeprefix("icm."): value for name, value in weights.items() if name.startswith("icm.")}
        | {"error_moments": icm.error_moments}
    )
    rollout = step.rollout
    rollout.gate = torch.tensor(data["gate"]).bool()
    result = step.update(GAE(data["gamma"], data["lam"]))
    loss = masked_mean(curiosity.network_loss(rollout), rollout.response_mask)
    loss.backward()
    norms = grad_norms(icm)
    for name, value in data["icm_grad_norms"].items():
        assert_near(norms[name], value, 1e-4)
    metrics, old = data["metrics"], torch.tensor(data["old_logprobs"])
    errors = prediction_error(icm(rollout.hidden, rollout.action_embeddings)).detach()
    advantages, returns = rollout.advantages, rollout.returns
    measured = {
        "actor_loss": result.policy.detach(),
        "critic_loss": result.value.detach(),
        "icm_loss": loss.detach(),
        "reward": rollout.scores.mean(),
        "intrinsic_number": rollout.gate.sum(),
        "advantages_mean": advantages.mean(),
        "advantages_std": advantages.std(),
        "advantages_norm": advantages.norm(dim=1).mean(),
        "returns_mean": returns.mean(),
        "returns_std": returns.std(),
        "returns_norm": returns.norm(dim=1).mean(),
        "kl": (data["kl_ctl"] * (old - torch.tensor(data["ref_logprobs"]))).norm(dim=1).mean(),
        "entropy": -old.sum(1).mean(),
        "intrinsic_rewards": intrinsic_reward(errors, rollout.response_mask, rollout.gate).norm(dim=1).mean(),
        "resp_length": float(data["resp_len"] + 1),
        "bleu_reward": 0.0,
    }
    assert measured.keys() == metrics.keys()
    for name, value in measured.items():
        assert_near(value, metrics[name], 1e-4)
