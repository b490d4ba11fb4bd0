from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_models.backbones import FromPretrained
from lit_models.nn.scoring import TokenScorer
from lit_models.ppo import (
    GAE,
    KLPenalty,
    PPOLoss,
    RewardModel,
    Rollout,
    RowNoise,
    Sampler,
    ScoreOptions,
    Updates,
    steps,
)
from lit_models.ppo.functional import position_ids


@pytest.fixture(scope="module")
def parts(tiny_lm, tiny_reward, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    actor = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype="float32").eval()
    reference = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype="float32").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    critic = FromPretrained(tiny_reward).build_scorer().eval()
    sampler = Sampler(max_new_tokens=7)
    sampler.prepare(tokenizer)
    reward = RewardModel(FromPretrained(tiny_reward))
    network = reward.build(tokenizer).eval()
    return SimpleNamespace(
        tokenizer=tokenizer,
        actor=actor,
        reference=reference,
        critic=critic,
        sampler=sampler,
        rewards=[reward],
        networks=[network],
    )


def batch(rows=5, width=4):
    ids = torch.randint(3, 100, (rows, width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"prompt_ids": ids * mask, "prompt_mask": mask, "columns": {"answer": [str(row) for row in range(rows)]}}


def collect(parts, data, **score):
    rollout = steps.generate(parts.actor, parts.sampler, parts.tokenizer, data, RowNoise(0, 0, len(data["prompt_ids"])))
    return finish(parts, rollout, **score)


def finish(parts, rollout, **score):
    steps.score(rollout, parts.actor, parts.critic, parts.reference, parts.rewards, parts.networks, **score)
    steps.shape(rollout, [KLPenalty(0.1)], ScoreOptions(clip=2.5))
    steps.advantages(rollout, GAE())
    return rollout


PER_ROW = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns", "scores")


def assert_same_rows(one, other, width):
    for name in PER_ROW:
        left, right = getattr(one, name), getattr(other, name)
        if left.ndim == 2:
            mask = one.response_mask
            left, right = left[:, :width] * mask[:, :width], right[:, :width] * mask[:, :width]
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_order_or_padding(parts):
    rollout = collect(parts, batch())
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_same_rows(rollout.rows(order), finish(parts, rollout.rows(order)), rollout.response_ids.shape[1])
    wide = rollout.rows(torch.arange(5))
    pad = torch.nn.functional.pad
    wide.prompt_ids, wide.prompt_mask = pad(wide.prompt_ids, (3, 0)), pad(wide.prompt_mask, (3, 0))
    wide.response_ids, wide.response_mask = pad(wide.response_ids, (0, 2)), pad(wide.response_mask, (0, 2))
    assert_same_rows(rollout, finish(parts, wide), rollout.response_ids.shape[1])


def test_scoring_in_pieces_changes_nothing(parts):
    assert_same_rows(collect(parts, batch()), collect(parts, batch(), batch_size=2), 7)


def test_logprobs_are_those_of_the_unpadded_text(parts):
    rollout = collect(parts, batch())
    row = 0
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
    response = rollout.response_ids[row][rollout.response_mask[row].bool()]
    ids = torch.cat([prompt, response])[None]
    logits = parts.actor(ids).logits.log_softmax(-1)
    expected = logits[0, len(prompt) - 1 : -1].gather(1, response[:, None]).squeeze(1)
    torch.testing.assert_close(rollout.old_logprobs[row, : len(response)], expected, atol=1e-5, rtol=1e-5)
    values = parts.critic(ids, torch.ones_like(ids), position_ids(torch.ones_like(ids)))[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(rollout.old_values[row, : len(response)], values, atol=1e-5, rtol=1e-5)
    score = parts.networks[0](ids, torch.ones_like(ids), position_ids(torch.ones_like(ids)))[0, -1]
    torch.testing.assert_close(rollout.scores[row], score, atol=1e-5, rtol=1e-5)


def test_temperature_divides_the_logits(parts):
    rollout = collect(parts, batch(), temperature=0.5)
    logits = parts.actor(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=rollout.position_ids
    ).logits[:, 3:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(2, rollout.response_ids[..., None]).squeeze(2)
    torch.testing.assert_close(rollout.old_logprobs, expected, atol=1e-5, rtol=1e-5)


def test_first_update_has_ratio_one_and_no_clipping(parts):
    rollout = collect(parts, batch())
    (micro,) = next(steps.minibatches(rollout, Updates()))
    result = steps.losses(micro, parts.actor, parts.critic, PPOLoss())
    mask = micro.response_mask.bool()
    torch.testing.assert_close(result.stats["ratio"][mask], torch.ones(int(mask.sum())), atol=1e-5, rtol=0)
    assert result.stats["clipped"].sum() == 0


def test_micro_batches_sum_to_the_whole_gradient(parts):
    rollout = collect(parts, batch())
    gradients = []
    for size in (None, 2):
        parts.actor.zero_grad()
        micros = next(steps.minibatches(rollout, Updates(epochs=2, micro_batch_size=size)))
        units = steps.loss_units(micros, PPOLoss())
        for micro in micros:
            steps.losses(micro, parts.actor, parts.critic, PPOLoss(), normalizer=units).policy.backward()
        gradients.append(parts.actor.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_minibatches_cover_every_row_once_per_epoch(parts):
    rollout = collect(parts, batch())
    generator = torch.Generator().manual_seed(0)
    updates = list(steps.minibatches(rollout, Updates(epochs=3, minibatch_size=2, micro_batch_size=1), generator))
    assert len(updates) == 9
    for epoch in range(3):
        answers = [micro.columns["answer"][0] for update in updates[3 * epoch : 3 * epoch + 3] for micro in update]
        assert sorted(answers) == ["0", "1", "2", "3", "4"]


def test_token_rewards_missing_end_and_position(parts):
    rollout = collect(parts, batch())
    rollout.token_scores = 0.5 * rollout.response_mask
    rollout.ended[:] = False
    steps.shape(rollout, [], ScoreOptions(missing_eos_penalty=2.0))
    torch.testing.assert_close(
        rollout.rewards.sum(1), rollout.scores - 2.0 + 0.5 * rollout.lengths, atol=1e-5, rtol=1e-5
    )
    rollout.response_mask[:, 3:] = 0
    rollout.token_scores = None
    steps.shape(rollout, [], ScoreOptions(position="after_last"))
    assert (rollout.rewards[:, 3] != 0).all()
    assert (rollout.rewards[:, :3] == 0).all()


def test_kl_in_the_loss_gives_the_same_direction_as_its_gradient(parts):
    rollout = collect(parts, batch())
    shaper = KLPenalty(coef=0.3, estimator="k2", place="loss")
    rewards, metrics = shaper.shape(rollout, rollout.rewards)
    assert rewards is rollout.rewards
    assert metrics == {}
    logprobs = rollout.old_logprobs.clone().requires_grad_()
    shaper.token_loss(rollout, logprobs).sum().backward()
    torch.testing.assert_close(logprobs.grad, 0.3 * (rollout.old_logprobs - rollout.ref_logprobs), atol=1e-6, rtol=1e-5)


def test_scorer_without_a_score_head_is_refused(tiny_lm):
    with pytest.raises(TypeError, match="score"):
        TokenScorer(AutoModelForCausalLM.from_pretrained(tiny_lm))


def test_decoded_texts_hold_no_special_tokens(parts):
    rollout = collect(parts, batch())
    assert isinstance(rollout, Rollout)
    assert len(rollout.responses) == 5
    assert all("<pad>" not in text and "<eos>" not in text for text in rollout.prompts + rollout.responses)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PPOLoss(clip_low=2), "loss.clip_low"),
        (lambda: PPOLoss(dual_clip=0.5), "loss.dual_clip"),
        (lambda: PPOLoss(value_clip=0), "loss.value_clip"),
        (lambda: Updates(epochs=0), "updates.epochs"),
        (lambda: Updates(max_grad_norm=0), "updates.max_grad_norm"),
        (lambda: ScoreOptions(clip=0), "scores.clip"),
        (lambda: ScoreOptions(missing_eos_penalty=-1), "scores.missing_eos_penalty"),
        (lambda: KLPenalty(coef=-0.1), "coef"),
        (lambda: GAE(lam=1.5), "advantage.lam"),
    ],
)
def test_options_out_of_range_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()


class Rows(SimpleNamespace):
    """What a rollout knows of its rows."""

    def __len__(self):
        return self.noise.total // self.noise.world_size * self.noise.samples


@pytest.mark.parametrize(
    ("prompts", "samples", "size", "sizes"),
    [(12, 1, 4, [4] * 3), (12, 2, 8, [8] * 3), (12, 3, 12, [12] * 3), (24, 2, 36, [36, 12]), (12, 1, 12, [12])],
)
def test_minibatches_do_not_depend_on_the_number_of_processes(prompts, samples, size, sizes):
    """All processes together take the rows that one process would take, as many each, and others in every epoch."""

    def minibatches(rank, world):
        rollout = Rows(noise=RowNoise(0, 0, prompts, samples, rank, world))
        generator = torch.Generator().manual_seed(3)
        epochs = [steps.shuffled(rollout, size // world, generator) for _ in range(2)]
        assert all(sorted(torch.cat(epoch).tolist()) == list(range(len(rollout))) for epoch in epochs)
        return [[[named(row, rank, world) for row in index.tolist()] for index in epoch] for epoch in epochs]

    def named(row, rank, world):
        """Prompt and response of a row."""
        return row // samples * world + rank, row % samples

    alone = minibatches(0, 1)
    assert [len(rows) for rows in alone[0]] == sizes
    assert (alone[0] == alone[1]) == (len(sizes) == 1)
    for world in (2, 4):
        ranks = [minibatches(rank, world) for rank in range(world)]
        for epoch, *parts in zip(alone, *ranks, strict=True):
            for rows, *own in zip(epoch, *parts, strict=True):
                assert sorted(rows) == sorted(row for part in own for row in part)
                assert len({len(part) for part in own}) == 1
