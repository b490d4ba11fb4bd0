"""Comparison of the formulas with the reference vectors: one function per file, which raises AssertionError."""

import torch
from torch import Tensor

from lit_models.ppo import functional as ppo
from lit_models.reward import modeling as reward


def assert_near(actual: Tensor | float, expected: object, tolerance: float = 1e-5) -> None:
    """Compare shape and values, with the tolerance absolute or relative."""
    actual = torch.as_tensor(actual, dtype=torch.float32)
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _response_mask(case: dict) -> Tensor:
    """Response columns of the stored mask, which must agree with the stored lengths."""
    start = case["prompt_len"] - 1
    mask = torch.tensor(case["action_mask"])[:, start:]
    assert mask.shape[1] == case["resp_len"]
    lengths = torch.tensor(case["valid_lens"])
    assert torch.equal(mask, (torch.arange(case["resp_len"]) < lengths[:, None]).long())
    assert torch.equal(ppo.last_index(mask), lengths - 1)
    return mask.float()


def check_kl_rewards(data: dict) -> None:
    for case in data["cases"]:
        start = case["prompt_len"] - 1
        mask = _response_mask(case)
        scores = torch.tensor(case["scores"])
        penalty = -case["kl_ctl"] * ppo.kl_estimate(torch.tensor(case["logprobs"]), torch.tensor(case["ref_logprobs"]))

        last_token = penalty[:, start:] * mask + ppo.place_scores(scores, mask, case["clip"])
        assert_near(last_token, case["spec_rewards_response_only"])

        extended = ppo.extend_mask(mask)
        official = penalty.clone()
        official[:, start:] += ppo.place_scores(scores, extended, case["clip"])
        assert_near(official, case["official_rewards"])
        official[:, start:] *= extended
        assert_near(official, case["official_rewards_zeroed_after_end"])


def _check_advantages(case: dict, mask: Tensor) -> None:
    start = case["prompt_len"] - 1
    rewards, values = torch.tensor(case["rewards"])[:, start:], torch.tensor(case["values"])[:, start:]
    options = {"gamma": case["gamma"], "lam": case["lam"]}

    advantages, returns = ppo.gae(rewards, values, ppo.extend_mask(mask), **options)
    assert_near(advantages, case["advantages"])
    assert_near(returns, case["returns"])

    advantages, returns = ppo.gae(rewards, values, mask, **options)
    assert len(case["clean_rows"]) == len(mask)
    for row, (clean, length) in enumerate(zip(case["clean_rows"], case["valid_lens"], strict=True)):
        assert_near(advantages[row, :length], clean["advantages"])
        assert_near(returns[row, :length], clean["returns"])
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def _check_losses(case: dict, mask: Tensor, clip: float, clip_value: float) -> None:
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    advantages = torch.tensor(case["advantages"])
    per_token, _ = ppo.policy_loss(logprobs, torch.tensor(case["old_logprobs"]), advantages, mask, clip, clip)
    loss = ppo.reduce_loss(per_token, mask, "micro_batch")
    loss.backward()
    assert_near(loss.detach(), case["actor_loss"])
    assert_near(logprobs.grad, case["actor_grad"])

    values = torch.tensor(case["new_values"], requires_grad=True)
    old_values = torch.tensor(case["values"])[:, case["prompt_len"] - 1 :]
    per_token, _ = ppo.value_loss(values, old_values, torch.tensor(case["returns"]), mask, clip_value)
    loss = ppo.reduce_loss(per_token, mask, "global_tokens", mask.sum())
    loss.backward()
    assert_near(loss.detach(), case["critic_loss"])
    assert_near(values.grad, case["critic_grad"])


def check_token_ppo(data: dict) -> None:
    for case in data["cases"]:
        mask = _response_mask(case)
        _check_advantages(case, mask)
        _check_losses(case, mask, data["cliprange"], data["cliprange_value"])


def _check_pairs(case: dict) -> None:
    ids, scores = torch.tensor(case["input_ids"]), torch.tensor(case["per_token_scores"])
    lengths = reward.pad_end(ids, case["pad_id"], case.get("num_padding_at_beginning", 0))
    official = case["official"]

    loss, chosen_mean, rejected_mean = reward.per_token_loss(scores, ids, lengths)
    assert_near(loss, official["loss"])
    assert_near(chosen_mean, official["chosen_token_scores"])
    assert_near(rejected_mean, official["rejected_token_scores"])

    chosen, rejected = reward.end_scores(scores, lengths).chunk(2)
    # The released code calls the scores at the last tokens "mean scores".
    assert_near(chosen, official["chosen_mean_scores"])
    assert_near(rejected, official["rejected_mean_scores"])
    if "end_token_bt_loss" in case:
        assert_near(reward.end_token_loss(scores, lengths), case["end_token_bt_loss"])
        assert_near(chosen, case["end_scores_chosen"])
        assert_near(rejected, case["end_scores_rejected"])


def _check_rollout_scores(case: dict) -> None:
    ids, prompt = torch.tensor(case["input_ids"]), case["prompt_length"]
    scores = torch.tensor(case["per_token_scores"])
    lengths = prompt + reward.pad_end(ids[:, prompt:], case["pad_id"])
    assert torch.equal(lengths, reward.end_index(ids != case["pad_id"]))
    assert_near(reward.end_scores(scores, lengths), case["end_scores"])


def check_reward_model(data: dict) -> None:
    assert len(data["pairwise"]) == 3
    for case in data["pairwise"]:
        _check_pairs(case)
    for case in data["forward_value"]:
        _check_rollout_scores(case)


def check_misc(data: dict) -> None:
    gathered = data["gather_log_probs"]
    for chunk_tokens in (1, 3, 2048):
        logprobs = ppo.gather_logprobs(
            torch.tensor(gathered["logits"]), torch.tensor(gathered["labels"]), chunk_tokens=chunk_tokens
        )
        assert_near(logprobs, gathered["out"])

    weights = data["weight_ema"]
    average = torch.tensor(weights["ema_before"])
    ppo.ema_([average], [torch.tensor(weights["online"])], weights["beta"])
    # The online weights enter with a factor of 0.008.
    assert_near(average, weights["ema_after"], tolerance=1e-6)

    series, mean, means = data["reward_ema"], None, []
    for value in series["inputs"]:
        mean = ppo.running_mean(mean, value, series["alpha"])
        means.append(mean)
    assert_near(torch.tensor(means), series["outputs"])
