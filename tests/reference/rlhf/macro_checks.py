"""Macro actions against the reference vectors: one function per file, which raises AssertionError."""

import torch
from torch import Tensor

from lit_models.ppo import functional as ppo
from lit_models.ppo.macro import MacroGAE
from lit_models.ppo.macro import functional as macro
from lit_models.ppo.macro.parsing import TokenMismatchError, Tree, constituent_starts
from lit_models.ppo.macro.segmenters import Fixed, Token, segments_of_cuts, segments_of_lengths, segments_of_rises
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.steps import PPOLoss, loss_masks

from .checks import assert_near


def rollout_of(mask: Tensor, **fields: object) -> Rollout:
    """Rollout of responses alone."""
    rows = len(mask)
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    return Rollout(
        prompt_ids=empty,
        prompt_mask=empty,
        response_ids=torch.ones(mask.shape, dtype=torch.int64),
        response_mask=mask.float(),
        prompts=[""] * rows,
        responses=[""] * rows,
        ended=torch.ones(rows, dtype=torch.bool),
        **fields,
    )


def _segments(case: dict, mask: Tensor) -> Tensor:
    """What the rule of a case makes of valid columns."""
    rule = case["rule"]
    if rule == "fixed":
        return Fixed(case["n"]).segment(rollout_of(mask))[0]
    if rule == "token":
        return Token().segment(rollout_of(mask))[0]
    if rule == "sequence":
        return macro.segments_from_starts(torch.zeros_like(mask), mask)
    if rule == "randomized":
        return segments_of_lengths(torch.tensor(case["lengths"]).expand(len(mask), -1), mask)
    assert rule == "ppl"
    ppl = torch.tensor(case["ppl"]).reshape(len(mask), -1)
    return segments_of_rises(ppl.log(), mask)  # the order of perplexities is that of negative log-probabilities


def _starts(segment_ids: Tensor) -> list[int]:
    return macro.segment_starts(segment_ids)[0].nonzero().squeeze(1).tolist()


def check_boundaries(data: dict) -> None:
    for case in data["cases"]:
        first, length = case["start"], case["resp_len"]
        assert first == case["prompt_len"] - 1
        mask = torch.tensor(case["mask"])[None]
        assert mask.shape[1] == first + length
        mask = mask[:, first:]
        ids = _segments(case, mask)
        assert ids[0].tolist() == case["segment_ids"]
        assert sorted(set(case["official"])) == case["clean"]
        last = first + length - 1
        isolated = [first + start for start in _starts(macro.isolate_last(ids))]
        if case["rule"] == "ppl":
            # The released code begins a macro action one token too early, and then knows nothing of the rules at all.
            early = [first + start - 1 for start in _starts(ids)[1:]]
            assert case["official"] == [first, *early, last] or case["clean"] == sorted({first, *early, last})
            assert case["official_when_ppl_nested_as_released"] == sorted({first, last})
            continue
        assert macro.isolate_last(ids)[0].tolist() == case["segment_ids_isolated"]
        assert isolated == case["clean"]
        assert [first + start for start in _starts(ids)] + [last] == case["official"]
        if case["rule"] == "randomized":
            import random

            pool = [length for length in (1, 2, 3, 5, 10) for _ in range(case["repeat_times"])]
            random.seed(case["python_random_seed"])
            random.shuffle(pool)
            assert pool == case["lengths"]


def check_parsing(data: dict) -> None:
    for case in data["cases"]:
        trees = [Tree.from_brackets(text) for text in case["trees"]]
        words = "".join("".join(tree.leaves) for tree in trees)
        if case["official"] is None:
            assert words != case["text"].replace(" ", "")
            assert case["error"].startswith("IndexError")
            try:
                constituent_starts(trees[0], [1] * case["resp_len"], case["cutoff"])
            except TokenMismatchError:
                continue
            raise AssertionError("a tree that does not fit was accepted")
        assert words == case["text"].replace(" ", "")
        offset, starts = 0, {0}
        for tree, counts in zip(trees, case["leaf_token_counts"], strict=True):
            starts |= {offset + start for start in constituent_starts(tree, counts, case["cutoff"])}
            offset += sum(counts)
        assert offset == case["resp_len"] - 1  # what is left is the end token
        assert sorted(starts) == case["official_relative"]
        assert [case["prompt_len"] - 1 + start for start in sorted(starts)] == case["official"]
        ids = segments_of_cuts([sorted(starts)], torch.ones(1, case["resp_len"]))
        assert _starts(ids) == case["official_relative"]


KINDS = {"equal": "equal", "position": "position_official"}
SPEC = {
    "equal": "equal",
    "unit": "unit",
    "position_decayed_paper": "position_decayed",
    "position_official": "position_official",
}


def check_macro_values(data: dict) -> None:
    for case in data["cases"]:
        first = case["prompt_len"] - 1
        values = torch.tensor(case["values"])[None, first:]
        mask = torch.tensor(case["mask"])[None, first:]
        assert mask.shape[1] == case["resp_len"] == values.shape[1]
        plain = Fixed(case["n"]).segment(rollout_of(mask))[0]
        isolated = macro.isolate_last(plain)
        for name, ids in (("plain", plain), ("isolated", isolated)):
            spec = case["spec"][name]
            assert ids[0].tolist() == spec["segment_ids"]
            assert_near(macro.segment_sum(values, ids)[0], spec["sum"])
            for key, kind in SPEC.items():
                assert_near(macro.segment_sum(macro.aggregation_weights(ids, kind) * values, ids)[0], spec[key])
        raw, clean = case["boundaries"], case["clean_boundaries"]
        assert [first + start for start in _starts(isolated)] == clean == sorted(set(raw))
        assert [first + start for start in _starts(plain)] + [first + case["resp_len"] - 1] == raw
        empty = [number for number in range(len(raw) - 1) if raw[number] == raw[number + 1]]
        for key, kind in KINDS.items():
            found = macro.segment_sum(macro.aggregation_weights(isolated, kind) * values, isolated)[0].tolist()
            assert_near(found, case["official_clean"][key])
            for number in empty:  # the released code also forms macro actions without tokens
                found.insert(number, 0.0)
            assert_near(found, case["official"][key])
        assert case["official"]["unit"] == "raises IndexError"


def check_macro_gae(data: dict) -> None:
    for case in data["cases"]:
        values = torch.tensor(case["values"])
        advantages, returns = macro.macro_gae(
            torch.tensor(case["rewards"]), values, torch.ones_like(values), case["gamma"], case["lam"]
        )
        assert_near(advantages, case["advantages"])
        assert_near(returns, case["returns"])


def check_macro_losses(data: dict) -> None:
    for case in data["cases"]:
        ids = torch.tensor(case["segment_ids"])[None]
        mask = (ids >= 0).float()
        assert mask.shape[1] == case["resp_len"]
        assert [case["prompt_len"] - 1 + start for start in _starts(ids)] == case["boundaries"]
        advantages = macro.to_tokens(torch.tensor(case["advantages"]), ids)
        returns = macro.to_tokens(torch.tensor(case["returns"]), ids)
        clip, old = case["cliprange"], torch.tensor(case["old_logprobs"])
        logprobs = torch.tensor(case["logprobs"], requires_grad=True)
        loss = ppo.masked_mean(ppo.policy_loss(logprobs, old, advantages, mask, clip, clip)[0], mask)
        loss.backward()
        assert_near(loss.detach(), case["actor_loss"])
        assert_near(logprobs.grad, case["actor_grad_logprobs"])
        joint = macro.macro_log_ratio(logprobs.detach(), old, ids)
        per_macro, _ = ppo.policy_loss(joint, torch.zeros_like(joint), advantages, mask, clip, clip)
        assert_near(ppo.masked_mean(per_macro, macro.segment_starts(ids)), case["joint_ratio_loss_mean_over_macros"])
        values = torch.tensor(case["values"], requires_grad=True)
        per_token, _ = ppo.value_loss(values, torch.tensor(case["old_values"]), returns, mask, case["cliprange_value"])
        loss = ppo.masked_mean(per_token, mask)
        loss.backward()
        assert_near(loss.detach(), case["critic_loss"])
        assert_near(values.grad, case["critic_grad_values"])


def _ragged(actual: Tensor, expected: list) -> None:
    for row, values in zip(actual, expected, strict=True):
        assert_near(row[: len(values)], values)
        assert not row[len(values) :].any()


def check_spec_macro_batch(data: dict) -> None:
    for case in data["cases"]:
        lengths = torch.tensor(case["valid_lens"])
        width = len(case["rewards"][0])
        mask = (torch.arange(width) < lengths[:, None]).float()
        rewards, values, logprobs, old_logprobs, new_values = (
            torch.tensor(case[key]) for key in ("rewards", "values", "logprobs", "old_logprobs", "new_values")
        )
        ids = _segments(case, mask)
        cut = macro.isolate_last(ids) if case["isolate_last"] else ids
        assert cut.tolist() == case["segment_ids"]
        rollout = rollout_of(mask, rewards=rewards * mask, old_values=values, reward_mask=mask)
        estimator = MacroGAE(
            _Given(ids),
            value_aggregation=case["value_aggregation"],
            reward_aggregation=case["reward_aggregation"],
            isolate_last=case["isolate_last"],
            gamma=case["gamma"],
            lam=case["lam"],
        )
        advantages, returns, _ = estimator.estimate(rollout)
        rollout.advantages, rollout.returns, rollout.old_logprobs = advantages, returns, old_logprobs
        assert_near(advantages, case["token_advantages"])
        assert_near(returns, case["token_returns"])
        weights = rollout.segment_weights
        _ragged(macro.segment_sum(weights * values, cut), case["macro_values"])
        rewarded = rewards * mask if case["reward_aggregation"] == "sum" else weights * rewards
        _ragged(macro.segment_sum(rewarded, cut), case["macro_rewards"])
        starts = macro.segment_starts(cut)
        for row in range(len(mask)):
            assert_near(advantages[row][starts[row]], case["advantages"][row])
            assert_near(returns[row][starts[row]], case["returns"][row])
        units = [masks.sum() for masks in loss_masks(rollout, PPOLoss(ratio="macro", value_loss="token"))]
        assert [int(unit) for unit in units] == [case["num_macros"], case["num_tokens"]]

        clip, clip_value = case["cliprange"], case["cliprange_value"]
        token = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, clip, clip)[0]
        assert_near(ppo.masked_mean(token, mask), case["policy_loss_token_ratio"])
        joint = macro.macro_log_ratio(logprobs, old_logprobs, cut)
        product = ppo.policy_loss(joint, torch.zeros_like(joint), advantages, mask, clip, clip)[0]
        assert_near(ppo.masked_mean(product, starts), case["policy_loss_joint_ratio"])
        token = ppo.value_loss(new_values, values, returns, mask, clip_value)[0]
        assert_near(ppo.masked_mean(token, mask), case["value_loss_token"])
        new, old = (macro.to_tokens(macro.segment_sum(weights * value, cut), cut) for value in (new_values, values))
        assert_near(
            ppo.masked_mean(ppo.value_loss(new, old, returns, mask, clip_value)[0], starts), case["value_loss_macro"]
        )


class _Given(Fixed):
    """Segmenter that returns given ids."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return self.ids, {}
