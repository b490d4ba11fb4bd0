import math

import pytest
import torch

from lit_models.ppo import functional as F

LENGTHS = torch.tensor([6, 1, 3, 0, 5])


def ragged(lengths=LENGTHS, columns=6):
    return (torch.arange(columns) < lengths[:, None]).float()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Log-probabilities


def test_logprobs_and_entropy_agree_with_float64():
    logits, ids = 5 * noise(3, 7, 50), torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    exact = (logits.double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(
        F.gather_logprobs(logits, ids, 0.7).double(), exact.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(F.entropy(logits, 0.7).double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 8, 20])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens):
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for chunk in (10**6, chunk_tokens):
        logits = noise(3, 7, 11).requires_grad_()
        logprobs, entropy = F.gather_logprobs(logits, ids, 0.8, chunk), F.entropy(logits, 0.8, chunk)
        (logprobs * noise(3, 7, seed=2) + entropy * noise(3, 7, seed=3)).sum().backward()
        results.append((logprobs, entropy, logits.grad))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)


def test_chunks_keep_no_float32_logits_for_the_backward_pass():
    logits, ids = noise(3, 7, 11).bfloat16().requires_grad_(), torch.zeros(3, 7, dtype=torch.long)

    def kept(chunk_tokens):
        saved = []

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            F.gather_logprobs(logits, ids, 0.8, chunk_tokens)
        return sum(tensor.numel() for tensor in saved if tensor.dtype == torch.float32)

    assert kept(1000) >= logits.numel()
    assert kept(4) == 0


def test_logprobs_of_bfloat16_are_float32():
    logits, ids = noise(2, 3, 9).bfloat16(), torch.zeros(2, 3, dtype=torch.long)
    logprobs = F.gather_logprobs(logits, ids)
    assert logprobs.dtype == F.entropy(logits).dtype == torch.float32
    torch.testing.assert_close(logprobs, F.gather_logprobs(logits.float(), ids))


def test_entropy_of_uniform_and_forbidden_tokens():
    logits = torch.zeros(1, 2, 8)
    logits[0, 1, 4:] = -torch.inf
    torch.testing.assert_close(F.entropy(logits), torch.tensor([[math.log(8), math.log(4)]]))


def test_entropy_gradient_with_forbidden_tokens_is_finite():
    logits = noise(1, 2, 8)
    logits[..., 4:] = -torch.inf
    logits.requires_grad_()
    F.entropy(logits).sum().backward()
    assert logits.grad.isfinite().all()


# Masks and positions


def test_position_ids_ignore_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    positions = F.position_ids(mask)
    assert positions.dtype == torch.int64
    for row in range(3):
        assert positions[row][mask[row].bool()].tolist() == [0, 1, 2]
    assert positions.min() == 0


def test_response_mask_ends_at_the_first_end_token():
    ids = torch.tensor([[5, 2, 5, 2], [2, 0, 0, 0], [5, 5, 5, 5], [5, 3, 2, 0], [0, 0, 5, 2]])
    mask = F.response_mask(ids, [2, 3])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert mask.dtype == torch.float32
    assert mask.tolist() == expected


def test_last_index_and_extended_mask():
    mask = ragged()
    assert F.last_index(mask).tolist() == [5, 0, 2, 0, 4]
    assert F.extend_mask(mask).sum(1).tolist() == [6, 2, 4, 0, 6]
    assert mask.sum(1).tolist() == LENGTHS.tolist(), "the input must stay as it is"
    assert torch.equal(F.extend_mask(mask.bool()), F.extend_mask(mask))


def test_last_index_with_a_hole_in_the_row():
    assert F.last_index(torch.tensor([[1, 0, 1, 0]])).tolist() == [2]
    assert F.extend_mask(torch.tensor([[1, 0, 1, 0]])).tolist() == [[1, 0, 1, 1]]


# Rewards


def test_kl_estimates():
    logprobs, reference = noise(4, 5), noise(4, 5, seed=1)
    d = logprobs - reference
    expected = {"k1": d, "abs": d.abs(), "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}
    for kind, value in expected.items():
        torch.testing.assert_close(F.kl_estimate(logprobs, reference, kind, clamp=None), value)
    assert (F.kl_estimate(logprobs, reference, "k3") >= 0).all()


def test_kl_clamp_holds_for_k2_and_k3_only():
    logprobs, reference = torch.tensor([[-100.0, 0.0]]), torch.tensor([[0.0, -100.0]])
    assert F.kl_estimate(logprobs, reference, "k1").tolist() == [[-100.0, 100.0]]
    assert F.kl_estimate(logprobs, reference, "abs").tolist() == [[100.0, 100.0]]
    for kind in ("k2", "k3"):
        assert F.kl_estimate(logprobs, reference, kind).tolist() == [[10.0, 10.0]]
        assert F.kl_estimate(logprobs, reference, kind, clamp=3.0).tolist() == [[3.0, 3.0]]


def test_gradient_of_a_clamped_k3_is_finite():
    logprobs = torch.tensor([[-1000.0, 0.0]], requires_grad=True)
    F.kl_estimate(logprobs, torch.zeros(1, 2), "k3").sum().backward()
    assert logprobs.grad.isfinite().all()


def test_scores_go_to_the_last_token():
    scores = torch.tensor([1.0, -9.0, 3.0, 4.0, 5.0])
    placed = F.place_scores(scores, ragged(), clip=2.5)
    assert placed.sum(1).tolist() == [1.0, -2.5, 2.5, 0.0, 2.5]
    assert [placed[row, column].item() for row, column in [(0, 5), (1, 0), (2, 2), (4, 4)]] == [1.0, -2.5, 2.5, 2.5]


def test_scores_per_token_stay_in_their_columns():
    scores = 3 * noise(5, 6)
    torch.testing.assert_close(F.place_scores(scores, ragged()), scores * ragged())
    torch.testing.assert_close(F.place_scores(scores, ragged(), clip=1.0), scores.clamp(-1, 1) * ragged())


# Advantages


def naive_gae(rewards, values, mask, gamma, lam):
    """Row by row over the valid tokens alone, in Python floats."""
    advantages, returns = torch.zeros_like(mask), torch.zeros_like(mask)
    for row in range(len(mask)):
        advantage = next_value = 0.0
        for column in reversed(mask[row].nonzero().flatten().tolist()):
            value = values[row, column].item()
            delta = rewards[row, column].item() + gamma * next_value - value
            advantage = delta + gamma * lam * advantage
            next_value = value
            advantages[row, column], returns[row, column] = advantage, advantage + value
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_agrees_with_a_loop_on_random_masks(gamma, lam, seed):
    rewards, values = noise(6, 9, seed=seed), noise(6, 9, seed=seed + 10)
    mask = (noise(6, 9, seed=seed + 20) > -0.5).float()
    mask[0], mask[1] = 0.0, 1.0
    for actual, expected in zip(
        F.gae(rewards, values, mask, gamma, lam), naive_gae(rewards, values, mask, gamma, lam), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gae_ignores_what_padding_holds():
    rewards, values, mask = noise(5, 6), noise(5, 6, seed=1), ragged()
    poisoned = [torch.where(mask.bool(), x, torch.nan) for x in (rewards, values)]
    for clean, other in zip(F.gae(rewards, values, mask), F.gae(*poisoned, mask), strict=True):
        assert torch.equal(clean, other)


def test_gae_with_another_lambda_for_the_critic():
    rewards, values, mask = noise(5, 6), noise(5, 6, seed=1), ragged()
    advantages, returns = F.gae(rewards, values, mask, lam=0.5, lam_critic=1.0)
    assert torch.equal(advantages, F.gae(rewards, values, mask, lam=0.5)[0])
    assert torch.equal(returns, F.gae(rewards, values, mask, lam=1.0)[1])
    # With λ = γ = 1 a return is the sum of the rewards that follow.
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go)


def test_gae_is_float32_and_detached():
    values = noise(5, 6, seed=1).bfloat16().requires_grad_()
    for result in F.gae(noise(5, 6).bfloat16(), values, ragged().bool()):
        assert result.dtype == torch.float32
        assert not result.requires_grad


def test_gae_of_a_single_token():
    advantages, returns = F.gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.ones(1, 1))
    assert advantages.item() == 1.5
    assert returns.item() == 2.0


# Masked statistics


def test_masked_statistics():
    x, mask = noise(5, 6), ragged()
    valid = x[mask.bool()]
    poisoned = torch.where(mask.bool(), x, torch.nan)
    torch.testing.assert_close(F.masked_sum(poisoned, mask), valid.sum())
    torch.testing.assert_close(F.masked_mean(poisoned, mask), valid.mean())
    torch.testing.assert_close(F.masked_var(poisoned, mask), valid.var(unbiased=False))
    rows = [x[row, :length].mean().item() if length else 0.0 for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(F.masked_mean(poisoned, mask, dim=1), torch.tensor(rows))


def test_statistics_of_nothing_are_zero():
    x, mask = noise(2, 3), torch.zeros(2, 3)
    for result in (F.masked_sum(x, mask), F.masked_mean(x, mask), F.masked_var(x, mask), F.whiten(x, mask).sum()):
        assert result.item() == 0.0


def test_variance_survives_a_large_mean():
    x = noise(4, 50) + 1e5
    exact = x.double().var(unbiased=False)
    torch.testing.assert_close(F.masked_var(x, torch.ones_like(x)).double(), exact, rtol=1e-5, atol=0)


def test_whitening():
    x, mask = 3 * noise(5, 6) + 2, ragged()
    valid = F.whiten(x, mask)[mask.bool()]
    assert abs(valid.mean().item()) < 1e-6
    assert valid.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert not F.whiten(x, mask)[~mask.bool()].any()

    kept = F.whiten(x, mask, shift_mean=False)[mask.bool()]
    torch.testing.assert_close(kept.mean(), x[mask.bool()].mean())
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)


def test_whitening_a_single_token_gives_zero():
    assert F.whiten(torch.tensor([[7.0, 3.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]


def split_reduce(parts, function):
    """Results of `function(part, all_reduce)` for each part, as if every part lived on a rank of its own."""
    sums = []
    while True:
        requests, done = [], []
        for part in parts:
            replies = iter(sums)

            def all_reduce(tensor, replies=replies, requests=requests):
                reply = next(replies, None)
                if reply is None:
                    requests.append(tensor)
                    raise StopIteration
                return reply

            try:
                done.append(function(part, all_reduce))
            except StopIteration:
                continue
        if not requests:
            return done
        sums.append(torch.stack(requests).sum(0))


def test_whitening_a_split_batch_equals_the_whole():
    x, mask = 3 * noise(5, 6) + 2, ragged()
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    pieces = split_reduce(parts, lambda part, reduce: F.whiten(x[part], mask[part], all_reduce=reduce))
    torch.testing.assert_close(torch.cat(pieces), F.whiten(x, mask), rtol=1e-6, atol=1e-6)


def test_explained_variance():
    returns, mask = noise(5, 6), ragged()
    values = returns + 0.5 * noise(5, 6, seed=1)
    valid = mask.bool()
    expected = 1 - (returns - values)[valid].var(unbiased=False) / returns[valid].var(unbiased=False)
    torch.testing.assert_close(F.explained_variance(values, returns, mask), expected)
    assert F.explained_variance(returns, returns, mask).item() == 1.0
    parts = split_reduce(
        [slice(0, 2), slice(2, 5)],
        lambda part, reduce: F.explained_variance(values[part], returns[part], mask[part], reduce),
    )
    for part in parts:
        torch.testing.assert_close(part, expected)


# Losses


def ratio_loss(ratio, advantage, **options):
    """Loss, gradient with respect to the log-probability, and statistics of one token."""
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = F.policy_loss(logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), **options)
    loss.sum().backward()
    return loss.item(), logprob.grad.item(), {name: value.item() for name, value in stats.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.25, 2.0, -2.5, 0),
        (1.5, 2.0, -2.6, 1),
        (0.5, 2.0, -1.0, 0),
        (1.5, -2.0, 3.0, 0),
        (0.85, -2.0, 1.8, 1),
        (0.95, -2.0, 1.9, 0),
    ],
)
def test_clip_bounds_differ_below_and_above(ratio, advantage, loss, clipped):
    value, gradient, stats = ratio_loss(ratio, advantage, clip_low=0.1, clip_high=0.3)
    assert value == pytest.approx(loss)
    assert stats["clipped"] == clipped
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage)
    assert stats["ratio"] == pytest.approx(ratio)
    assert stats["log_ratio"] == pytest.approx(math.log(ratio))


def test_dual_clip_bounds_negative_advantages_only():
    assert ratio_loss(5.0, -2.0)[0] == pytest.approx(10.0)
    value, gradient, stats = ratio_loss(5.0, -2.0, dual_clip=3.0)
    assert (value, gradient, stats["clipped"]) == (pytest.approx(6.0), 0.0, 1.0)
    assert ratio_loss(2.0, -2.0, dual_clip=3.0)[0] == pytest.approx(4.0)
    assert ratio_loss(5.0, 2.0, dual_clip=3.0) == ratio_loss(5.0, 2.0)


def test_policy_loss_at_the_first_update():
    logprobs, advantages, mask = noise(5, 6), noise(5, 6, seed=1), ragged()
    loss, stats = F.policy_loss(logprobs, logprobs, advantages, mask)
    torch.testing.assert_close(loss, -advantages * mask)
    assert (stats["ratio"] == 1).all()
    assert not stats["clipped"].any()


def test_policy_loss_stays_finite():
    old, mask = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    logprobs = torch.tensor([[500.0, -500.0, torch.nan]], requires_grad=True)
    advantages = torch.tensor([[-1.0, 1.0, torch.nan]])
    loss, stats = F.policy_loss(logprobs, old, advantages, mask)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert stats["log_ratio"].tolist() == [[20.0, -20.0, 0.0]]


def test_losses_of_bfloat16_are_float32():
    x, mask = noise(5, 6).bfloat16(), ragged()
    assert F.policy_loss(x, x, x, mask)[0].dtype == torch.float32
    assert F.value_loss(x, x, x, mask)[0].dtype == torch.float32
    assert F.kl_estimate(x, x).dtype == F.place_scores(x[:, 0], mask).dtype == F.whiten(x, mask).dtype == torch.float32
    assert F.reduce_loss(x, mask, "sequence").dtype == torch.float32


def test_value_loss_with_and_without_clip():
    values = torch.tensor([[1.0, 1.0, 0.1, 9.0]], requires_grad=True)
    old, returns, mask = torch.zeros(1, 4), torch.tensor([[2.0, -1.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss, clipped = F.value_loss(values, old, returns, mask, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([[1.62, 2.0, 1.805, 0.0]]))
    assert clipped.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 2.0, -1.9, 0.0]]))

    loss, clipped = F.value_loss(values.detach(), old, returns, mask, clip=None)
    torch.testing.assert_close(loss, torch.tensor([[0.5, 2.0, 1.805, 0.0]]))
    assert not clipped.any()


def test_loss_norms():
    per_token, mask = noise(5, 6), ragged()
    rows = [per_token[row, :length].mean() for row, length in enumerate(LENGTHS) if length]
    torch.testing.assert_close(F.reduce_loss(per_token, mask, "sequence"), torch.stack(rows).mean())
    torch.testing.assert_close(F.reduce_loss(per_token, mask, "micro_batch"), per_token[mask.bool()].mean())
    total = F.reduce_loss(per_token, mask, "global_tokens", torch.tensor(30.0))
    torch.testing.assert_close(total, per_token[mask.bool()].sum() / 30)
    with pytest.raises(ValueError, match="normalizer"):
        F.reduce_loss(per_token, mask, "global_tokens")


@pytest.mark.parametrize("norm", ["global_tokens", "micro_batch", "sequence"])
def test_loss_of_an_empty_batch_is_zero(norm):
    per_token = noise(2, 3).requires_grad_()
    loss = F.reduce_loss(per_token, torch.zeros(2, 3), norm, torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    assert not per_token.grad.any()


def test_global_token_norm_does_not_depend_on_the_split():
    per_token, mask = noise(5, 6), ragged()
    whole = F.reduce_loss(per_token, mask, "global_tokens", mask.sum())
    parts = [F.reduce_loss(per_token[i : i + 1], mask[i : i + 1], "global_tokens", mask.sum()) for i in range(5)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("shift", [1, 4])
def test_right_padding_changes_nothing(shift):
    old, new, rewards, values = (noise(5, 6, seed=seed) for seed in range(4))
    mask = ragged()

    def pad(x):
        return torch.nn.functional.pad(x, (0, shift), value=0.0)

    def losses(old, new, rewards, values, mask):
        shaped = rewards + F.place_scores(torch.arange(5.0), mask)
        advantages, returns = F.gae(shaped, values, mask)
        policy, _ = F.policy_loss(new, old, F.whiten(advantages, mask), mask)
        value, _ = F.value_loss(values + 0.1, values, returns, mask)
        return torch.stack(
            [F.reduce_loss(x, mask, norm) for x in (policy, value) for norm in ("micro_batch", "sequence")]
        )

    expected = losses(old, new, rewards, values, mask)
    actual = losses(*map(pad, (old, new, rewards, values, mask)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    scored = F.place_scores(torch.arange(5.0), mask)[order]
    assert torch.equal(scored, F.place_scores(torch.arange(5.0)[order], mask[order]))


# Controllers and averages


def test_adaptive_kl_moves_towards_the_target():
    assert F.adaptive_kl(0.1, kl=6.0, episodes=100, target=6.0) == 0.1
    assert F.adaptive_kl(0.1, kl=60.0, episodes=100, target=6.0) == pytest.approx(0.1 * 1.002)
    assert F.adaptive_kl(0.1, kl=-5.0, episodes=100, target=6.0, horizon=1000) == pytest.approx(0.1 * 0.98)
    assert F.adaptive_kl(0.1, kl=6.6, episodes=1000, target=6.0) == pytest.approx(0.1 * 1.01)


def test_ema_of_mixed_tensors():
    average = [torch.zeros(3), torch.zeros(2, dtype=torch.long), torch.ones(2, 2)]
    online = [torch.ones(3).bfloat16(), torch.tensor([4, 5]), torch.zeros(2, 2)]
    F.ema_(average, iter(online), 0.9)
    torch.testing.assert_close(average[0], torch.full((3,), 0.1))
    assert average[1].tolist() == [4, 5]
    torch.testing.assert_close(average[2], torch.full((2, 2), 0.9))


def test_ema_wants_as_many_tensors_on_both_sides():
    with pytest.raises(ValueError, match="zip"):
        F.ema_([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], 0.9)


def test_running_mean():
    assert F.running_mean(None, 3.0, 0.9) == 3.0
    assert F.running_mean(1.0, 2.0, 0.9) == pytest.approx(1.1)
