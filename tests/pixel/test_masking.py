import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lit_models.pixel.masking import (
    SpanMasking,
    draw_masks,
    keep_lowest,
    num_kept,
    random_keep,
    random_scores,
    span_mask,
    span_masks,
)

SPACINGS = ["span", 0, 1, 3]


def runs(mask):
    """(first, length) of every run of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def one(num_patches, num_masked, text, seed, masking):
    return span_mask(num_patches, num_masked, text, random.Random(seed), masking)


def batched(num_patches, num_masked, text, seed, masking):
    return span_masks(num_patches, num_masked, [text], np.random.default_rng(seed), masking)[0]


@pytest.fixture(params=[one, batched], ids=["one", "batched"])
def draw(request):
    return request.param


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("quota", [1, 5, 16, 40])
def test_quota_and_lengths(draw, spacing, quota):
    masking = SpanMasking(spacing=spacing)
    for seed in range(20):
        mask = draw(64, quota, 30, seed, masking)
        assert mask.dtype == np.int64
        assert 0 < mask.sum() <= quota
        if spacing != 0:  # spans that touch look like one
            assert max(length for _, length in runs(mask)) <= 6


@pytest.mark.parametrize("spacing", ["span", 1, 3])
def test_spacing(draw, spacing):
    for seed in range(20):
        found = runs(draw(64, 30, 64, seed, SpanMasking(spacing=spacing)))
        for (start, length), (following, other) in pairwise(found):
            # With "span", the later of two neighbours kept as many patches free as it is long; the order is not known.
            assert following - start - length >= (min(length, other) if spacing == "span" else spacing)


def test_whole_quota_where_there_is_space(draw):
    # 16 of 64 patches with gaps as wide as the spans need about 48.
    assert np.mean([draw(256, 64, 256, seed, SpanMasking()).sum() for seed in range(10)]) > 63


@pytest.mark.parametrize("text", [1, 2, 7, 20])
def test_first_span_begins_in_the_text(draw, text):
    for seed in range(30):
        # With a quota of the longest span, the first draw is never refused.
        assert draw(64, 6, text, seed, SpanMasking())[:text].any()


def test_first_draw_is_spent_even_if_refused(draw):
    # Spans of 3 are refused, since 2 patches remain to be masked; only the very first draw looks at the text.
    masking = SpanMasking(cumulative_weights=(0.0, 0.5, 1.0), spacing=0)
    places = Counter(int(draw(1000, 2, 1, seed, masking)[:3].any()) for seed in range(200))
    assert 60 < places[1] < 140


@pytest.mark.parametrize("num_patches", [1, 2, 3, 5])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_tiny_strips(draw, num_patches, spacing):
    for seed in range(20):
        mask = draw(num_patches, 1, 1, seed, SpanMasking(spacing=spacing))
        assert mask.shape == (num_patches,)
        assert mask.sum() <= 1
    # A single patch holds no span shorter than the strip.
    assert not draw(1, 1, 1, 0, SpanMasking()).any()


def test_text_longer_than_the_strip(draw):
    assert draw(16, 4, 1000, 0, SpanMasking()).shape == (16,)


def test_nothing_to_mask(draw):
    assert not draw(16, 0, 16, 0, SpanMasking()).any()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("generators", [1, 3000])
def test_batched_masks_have_the_distribution_of_single_ones(spacing, generators):
    masking = SpanMasking(spacing=spacing)
    rng, size = random.Random(0), 3000
    single = np.stack([span_mask(24, 8, 10, rng, masking) for _ in range(size)])
    own = np.random.default_rng(0) if generators == 1 else [np.random.default_rng([0, row]) for row in range(size)]
    batch = span_masks(24, 8, [10] * size, own, masking)
    # Five standard errors of a difference of two shares.
    np.testing.assert_allclose(batch.mean(0), single.mean(0), atol=5 * 0.5 * (2 / size) ** 0.5)
    together = np.array([single[:, :-1] * single[:, 1:], batch[:, :-1] * batch[:, 1:]]).mean(1)
    np.testing.assert_allclose(together[1], together[0], atol=5 * 0.5 * (2 / size) ** 0.5)
    lengths = [Counter(length for row in masks for _, length in runs(row)) for masks in (single, batch)]
    total = sum(lengths[0].values())
    for length in lengths[0]:
        assert abs(lengths[0][length] - lengths[1][length]) < 6 * (2 * total) ** 0.5 * 0.5


def test_rows_of_a_batch_differ_in_their_text():
    masks = span_masks(64, 6, [4] * 50 + [60] * 50, np.random.default_rng(0))
    assert masks[:50, :4].any(1).all()
    assert masks[50:, :4].any(1).mean() < 0.6
    assert len({row.tobytes() for row in masks}) > 90


def test_keep_is_the_complement_of_the_mask():
    masks = torch.from_numpy(span_masks(64, 16, [40] * 8, np.random.default_rng(0)))
    noise = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    kept = random_keep(masks, noise, num_kept(64, 0.25))
    assert kept.ids_keep.shape == (8, 48)
    assert (kept.mask.sum(1) == 16).all()
    assert (kept.mask >= masks).all()  # what the spans leave of the quota is filled at random
    visible = torch.zeros(8, 64).scatter(1, kept.ids_keep, 1.0)
    assert torch.equal(visible, 1 - kept.mask)


def test_restoring_undoes_the_choice():
    scores = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    kept = keep_lowest(scores, 7)
    order = scores.argsort(1)
    values = torch.arange(30.0).view(3, 10)
    assert torch.equal(kept.ids_keep, order[:, :7])
    assert torch.equal(values.gather(1, order).gather(1, kept.ids_restore), values)


def test_ties_keep_the_first_patches():
    kept = keep_lowest(torch.zeros(1, 6), 4)
    assert kept.ids_keep.tolist() == [[0, 1, 2, 3]]
    assert kept.mask.tolist() == [[0, 0, 0, 0, 1, 1]]


def test_random_masks_hide_some_text():
    attended = torch.zeros(200, 40)
    attended[:, :2] = 1  # by chance alone, three of four rows would hide nothing of so short a text
    noise = torch.rand(200, 40, generator=torch.Generator().manual_seed(0))
    mask = keep_lowest(random_scores(attended, noise), 38).mask
    assert ((mask * attended).sum(1) >= 1).all()
    assert (mask.sum(1) == 2).all()
    # Beyond that one patch, all are equally likely.
    assert 0.01 < mask[:, 2:].mean() < 0.05


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"), [(529, 0.25, 396), (16, 0.25, 12), (1, 0.25, 0), (7, 0.5, 3)]
)
def test_number_of_visible_patches(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept


def test_draws_follow_from_the_numbers_that_name_the_batch():
    masks, noise = draw_masks(32, 0.25, [10, 20], (1, 0, 5, 0))
    again, same = draw_masks(32, 0.25, [10, 20], (1, 0, 5, 0))
    assert torch.equal(masks, again)
    assert torch.equal(noise, same)
    assert noise.dtype == torch.float32
    assert ((noise >= 0) & (noise < 1)).all()
    for other in [(2, 0, 5, 0), (1, 1, 5, 0), (1, 0, 6, 0), (1, 0, 5, 1)]:
        assert not torch.equal(noise, draw_masks(32, 0.25, [10, 20], other)[1])
    assert draw_masks(32, 0.25, [10, 20], (1,), masking=None)[0] is None


def test_masks_of_a_row_depend_on_its_number_alone():
    text = np.arange(10, 22)
    whole = draw_masks(64, 0.5, text, (1, 2), SpanMasking(spacing=1))
    for world in (2, 3, 4):
        for rank in range(world):
            part = draw_masks(64, 0.5, text[rank::world], (1, 2), SpanMasking(spacing=1), range(rank, 12, world))
            assert all(torch.equal(one[rank::world], two) for one, two in zip(whole, part, strict=True))


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (0.0,), (-0.1, 1.0)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"model\.masking\.cumulative_weights"):
        SpanMasking(cumulative_weights=weights)


@pytest.mark.parametrize("spacing", ["spans", -1, 1.5])
def test_impossible_spacing_is_refused(spacing):
    with pytest.raises(ValueError, match=r"model\.masking\.spacing"):
        SpanMasking(spacing=spacing)
