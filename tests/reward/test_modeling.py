import math

import pytest
import torch
from torch.nn.functional import logsigmoid, pad

from lit_models.reward import modeling as M

PAD = 0
CHOSEN = [[5, 6, 7, 8], [5, 6, 9], [4, 4, 4, 4, 4, 4], [7, 8]]
REJECTED = [[5, 6, 9, 8, 7, 6], [5, 8, 9], [4, 4, 4, 4, 4, 4], [7, 8, 9, 9]]


def pair_batch(columns=6):
    rows = CHOSEN + REJECTED
    ids = torch.tensor([row + [PAD] * (columns - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_per_token(scores, ids, lengths):
    """One pair after the other, in float64."""
    pairs, columns = len(ids) // 2, ids.shape[1]
    losses, means = [], []
    for row in range(pairs):
        other = row + pairs
        different = (ids[row] != ids[other]).nonzero().flatten().tolist()
        first = different[0] if different else columns - 1
        end = max(lengths[row], lengths[other]) if different else columns
        chosen, rejected = scores[row, first:end].double(), scores[other, first:end].double()
        losses.append(-logsigmoid(chosen - rejected).mean())
        means.append((chosen.mean(), rejected.mean()))
    return torch.stack(losses).mean(), *map(torch.stack, zip(*means, strict=True))


# Ends of texts


def test_end_index_of_masks_and_lengths():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert M.end_index(mask).tolist() == [3, 3, 4, 4, 0]
    assert M.end_index(mask.bool()).tolist() == [3, 3, 4, 4, 0]
    assert M.end_index(torch.tensor([3, 1])).tolist() == [3, 1]


def test_pad_end():
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8], [5, 0, 0, 0], [0, 0, 0, 0]])
    assert M.pad_end(ids, 0).tolist() == [2, 4, 1, 0]
    ids = torch.tensor([[1, 6, 1, 1], [1, 6, 7, 8], [1, 1, 1, 1]])
    assert M.pad_end(ids, 1, num_padding_at_beginning=1).tolist() == [2, 4, 1]


def test_end_scores_do_not_depend_on_the_side_of_padding():
    scores, mask = noise(1, 4), torch.ones(1, 4, dtype=torch.long)
    expected = scores[0, 3]
    for left, right in [(0, 0), (3, 0), (0, 2), (2, 3)]:
        padded = M.end_scores(pad(scores, (left, right), value=9.0), M.end_index(pad(mask, (left, right))))
        assert torch.equal(padded[0], expected)


def test_end_scores_are_float32():
    assert M.end_scores(noise(2, 3).bfloat16(), torch.tensor([1, 3])).dtype == torch.float32


# Losses


def test_divergence():
    ids, lengths = pair_batch()
    first, end = M.divergence(*ids.chunk(2), *lengths.chunk(2))
    assert first.tolist() == [2, 1, 5, 2]
    assert end.tolist() == [6, 3, 6, 4]


def test_divergence_in_the_first_token_names_the_pair():
    ids, lengths = pair_batch()
    ids[1, 0] = 11
    with pytest.raises(ValueError, match="Pair 1 "):
        M.per_token_loss(noise(8, 6), ids, lengths)


@pytest.mark.parametrize("seed", range(3))
def test_per_token_loss_agrees_with_a_loop(seed):
    ids, lengths = pair_batch()
    scores = noise(8, 6, seed=seed)
    for actual, expected in zip(
        M.per_token_loss(scores, ids, lengths), naive_per_token(scores, ids, lengths), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [7, 12])
def test_right_padding_changes_no_loss(columns):
    ids, lengths = pair_batch()
    # The identical pair is compared in the last column, which padding moves; its scores there are equal in training.
    keep = torch.tensor([0, 1, 3, 4, 5, 7])
    ids, lengths, scores = ids[keep], lengths[keep], noise(6, 6)
    wide_ids, wide_scores = pad(ids, (0, columns - 6), value=PAD), pad(scores, (0, columns - 6), value=torch.nan)
    for wide, narrow in zip(
        M.per_token_loss(wide_scores, wide_ids, lengths), M.per_token_loss(scores, ids, lengths), strict=True
    ):
        torch.testing.assert_close(wide, narrow)
    torch.testing.assert_close(M.end_token_loss(wide_scores, lengths), M.end_token_loss(scores, lengths))


def test_gradient_of_padding_is_zero():
    ids, lengths = pair_batch(8)
    scores = noise(8, 8).requires_grad_()
    (M.end_token_loss(scores, lengths) + M.per_token_loss(scores, ids, lengths)[0]).backward()
    keep = torch.tensor([0, 1, 3, 4, 5, 7])
    assert not scores.grad[keep][:, 6:].any()
    assert scores.grad[:, :6].any(1)[keep].all()


def test_end_token_loss_with_margin_and_centring():
    scores = torch.tensor([[0.0, 2.0], [1.0, 9.0], [0.0, 0.5], [3.0, 9.0]])
    lengths = torch.tensor([2, 1, 2, 1])

    def expected(margin):
        differences = (2.0 - 0.5 - margin[0], 1.0 - 3.0 - margin[1])
        return sum(math.log1p(math.exp(-difference)) for difference in differences) / 2

    assert M.end_token_loss(scores, lengths).item() == pytest.approx(expected((0.0, 0.0)))
    margin = torch.tensor([0.5, 1.0])
    assert M.end_token_loss(scores, lengths, margin).item() == pytest.approx(expected((0.5, 1.0)))
    centred = M.end_token_loss(scores, lengths, margin, center_coefficient=0.1).item()
    assert centred == pytest.approx(expected((0.5, 1.0)) + 0.1 * (2.5**2 + 4.0**2) / 2)


def test_loss_of_far_apart_scores_is_finite():
    scores = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    loss = M.end_token_loss(scores, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    torch.testing.assert_close(scores.grad, torch.tensor([[-1.0], [1.0]]))


def test_losses_of_bfloat16_are_float32():
    ids, lengths = pair_batch()
    scores = noise(8, 6).bfloat16()
    exact = M.per_token_loss(scores.double().float(), ids, lengths)
    for result, expected in zip(M.per_token_loss(scores, ids, lengths), exact, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
    assert M.end_token_loss(scores, lengths).dtype == torch.float32


def test_equal_scores_cost_log_two():
    ids, lengths = pair_batch()
    assert M.per_token_loss(torch.zeros(8, 6), ids, lengths)[0].item() == pytest.approx(math.log(2))
    assert M.end_token_loss(torch.zeros(8, 6), lengths).item() == pytest.approx(math.log(2))


# Metrics


def test_pair_metrics_count_ties_as_wrong():
    metrics = M.pair_metrics(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0]))
    assert {name: value.item() for name, value in metrics.items()} == {
        "accuracy": 0.5,
        "chosen_mean": 1.5,
        "rejected_mean": 1.25,
        "margin": 0.25,
    }
