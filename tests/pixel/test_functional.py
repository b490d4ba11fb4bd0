import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from lit_models.pixel import functional
from lit_models.pixel.functional import MaskedMean


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_elements_of_a_patch_are_in_the_order_row_column_channel():
    size, channels = 4, 3
    image = random(2, channels, size, 5 * size)
    patches = functional.patchify(image, size)
    assert patches.shape == (2, 5, size * size * channels)
    for patch, row, column, channel in [(0, 0, 0, 0), (3, 1, 2, 0), (4, 3, 3, 2), (2, 0, 3, 1)]:
        value = image[1, channel, row, patch * size + column]
        assert patches[1, patch, (row * size + column) * channels + channel] == value


@pytest.mark.parametrize("columns", [1, 2, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_strips_of_any_width_survive(columns, channels):
    image = (random(3, channels, 8, 8 * columns) * 255).to(torch.uint8)
    patches = functional.patchify(image, 8)
    assert patches.dtype == torch.uint8
    assert torch.equal(functional.unpatchify(patches, 8), image)


def test_images_of_several_rows_are_cut_row_by_row():
    image = random(1, 1, 4, 6)
    patches = functional.patchify(image, 2)
    assert torch.equal(patches[0, 4].view(2, 2), image[0, 0, 2:4, 2:4])
    assert torch.equal(functional.unpatchify(patches, 2, columns=3), image)


def test_display_wraps_and_fills_the_last_line():
    strip = random(1, 1, 2, 10)
    wrapped = functional.unpatchify(functional.patchify(strip, 2), 2, columns=2, fill=0.5)
    assert wrapped.shape == (1, 1, 6, 4)
    assert torch.equal(wrapped[0, 0, 2:4], strip[0, 0, :, 4:8])
    assert torch.equal(wrapped[0, 0, 4:, :2], strip[0, 0, :, 8:])
    assert (wrapped[0, 0, 4:, 2:] == 0.5).all()


def test_bytes_and_floats_give_the_same_pixels():
    image = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(functional.to_unit(image), image.double().div(255).float())
    assert functional.to_unit(image)[255] == 1.0
    assert functional.to_unit(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_normalised_target_divides_by_the_unbiased_deviation():
    patch = torch.tensor([[0.0, 0.5, 1.0, 0.25]])
    mean = 0.4375
    variance = sum((value - mean) ** 2 for value in (0.0, 0.5, 1.0, 0.25)) / 3
    expected = [(value - mean) / math.sqrt(variance + 1e-6) for value in (0.0, 0.5, 1.0, 0.25)]
    torch.testing.assert_close(functional.normalize_patches(patch), torch.tensor([expected]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.7, 254 / 255, 1.0])
@pytest.mark.parametrize("size", [192, 256, 768])
def test_constant_patches_become_exactly_zero(value, size):
    patches = torch.full((1, 2, size), value)
    assert not functional.normalize_patches(patches).any()
    assert not functional.inked(patches).any()


def test_targets_are_float32_under_bfloat16():
    patches = random(1, 3, 48).bfloat16()
    assert functional.normalize_patches(patches).dtype == torch.float32
    assert torch.equal(functional.normalize_patches(patches), functional.normalize_patches(patches.float()))


def test_denormalising_undoes_normalising():
    patches = random(2, 3, 48)
    restored = functional.denormalize_patches(
        functional.normalize_patches(patches), *functional.patch_statistics(patches)
    )
    torch.testing.assert_close(restored, patches, atol=1e-5, rtol=0)


def test_ink_is_variance():
    patches = torch.ones(1, 4, 256)
    patches[0, 1, 7] = 0.9  # variance 4e-5
    patches[0, 2, 7] = 0.99  # variance 4e-7
    patches[0, 3] = 0.0
    assert functional.inked(patches).tolist() == [[False, True, False, False]]
    assert functional.separators(patches).tolist() == [[False, False, False, True]]


def test_recent_ink_takes_the_last_attended_inked_patches():
    patches = random(2, 6, 16)
    patches[0, 2] = 1.0
    patches[1, :] = 1.0
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    mean, scale, found = functional.recent_ink(patches, mask, 3)
    assert found.tolist() == [[True] * 3, [False] * 3]
    expected = patches[0, [1, 3, 4]]
    torch.testing.assert_close(mean[0], expected.mean(-1))
    torch.testing.assert_close(scale[0], (expected.var(-1) + 1e-6).sqrt())
    mean, _, found = functional.recent_ink(patches, mask, 9)
    assert found[0].tolist() == [False] * 5 + [True] * 4
    torch.testing.assert_close(mean[0, 5:], patches[0, [0, 1, 3, 4]].mean(-1))


def test_last_positions():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert functional.last_position(mask).tolist() == [1, 3, 2, 0]
    text = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    assert functional.pair_last_position(mask, text, compact=False).tolist() == [5, 6, 4, 5]
    assert functional.pair_last_position(mask, text, compact=True).tolist() == [3, 6, 2, 1]


def test_right_padding_is_recognised():
    assert functional.is_right_padded(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]))
    assert not functional.is_right_padded(torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert not functional.is_right_padded(torch.tensor([[1, 0, 1]]))
    assert functional.is_right_padded(torch.tensor([[1]]))


@pytest.mark.parametrize("compact", [False, True])
def test_sequence_of_a_pair(compact):
    pixel, text = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 0], [1, 1]])
    order, place = functional.pair_sequence(pixel, text, compact, torch.tensor([False, True]))
    padded = [[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]
    assert order.tolist() == ([[0, 1, 3, 2, 4], [3, 4, 0, 1, 2]] if compact else padded)
    assert torch.equal(order.gather(1, place), torch.arange(5).expand(2, 5))


def test_documents_see_their_own_past_only():
    ids = torch.tensor([[0, 0, 1, 1, -1]])
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    assert torch.equal(functional.document_mask(ids), expected[None, None])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    assert functional.target_mask(mask).tolist() == [[False, True, True, True, False]]
    assert functional.target_mask(mask, ids).tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("kind", ["mse", "bce", "smooth_l1"])
def test_loss_is_a_mean_over_the_attended_targets_of_the_batch(kind):
    prediction, target = 3 * random(3, 5, 12), random(3, 5, 12, seed=1)
    mask = functional.pixel_mask(torch.tensor([4, 1, 0]), 5)
    loss = functional.npp_loss(prediction, target, functional.target_mask(mask), kind)
    function = {"mse": lambda q, t: (q - t) ** 2, "bce": _bce, "smooth_l1": _smooth}[kind]
    terms = [
        function(prediction[row, i], target[row, i + 1]).mean()
        for row in range(3)
        for i in range(4)
        if mask[row, i + 1]
    ]
    assert loss.number == len(terms) == 5
    torch.testing.assert_close(loss.mean, torch.stack(terms).mean())


def _bce(logits, target):
    return binary_cross_entropy_with_logits(logits, target, reduction="none")


def _smooth(prediction, target):
    return smooth_l1_loss(prediction, target, reduction="none")


def test_what_does_not_count_has_no_influence():
    prediction, target = random(2, 4, 6), random(2, 4, 6, seed=1)
    counted = functional.target_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    expected = functional.npp_loss(prediction, target, counted).mean
    prediction[0, 2:] = math.inf
    prediction[1, 1:] = math.nan
    target[1, 2:] = math.inf
    loss = functional.npp_loss(prediction, target, counted).mean
    assert torch.equal(loss, expected)


def test_nothing_to_predict_gives_zero():
    target = random(2, 1, 6)
    loss = functional.npp_loss(target, target, functional.target_mask(torch.ones(2, 1)))
    assert (loss.mean, loss.number) == (0, 0)
    loss = functional.ntp_loss(random(2, 1, 5), torch.zeros(2, 1, dtype=torch.long))
    assert (loss.mean, loss.number) == (0, 0)


def test_means_can_be_joined():
    prediction, target = random(4, 5, 6), random(4, 5, 6, seed=1)
    counted = functional.target_mask(functional.pixel_mask(torch.tensor([4, 1, 0, 2]), 5))
    whole = functional.npp_loss(prediction, target, counted)
    parts = [functional.npp_loss(prediction[rows], target[rows], counted[rows]) for rows in ([0], [1, 2, 3])]
    joined = MaskedMean(*(sum(values) for values in zip(*parts, strict=True)))
    torch.testing.assert_close(joined.mean, whole.mean)


def test_losses_are_float32_under_bfloat16():
    prediction, target = random(2, 5, 6).bfloat16(), random(2, 5, 6, seed=1)
    counted = torch.ones(2, 5)
    loss = functional.npp_loss(prediction, target, counted)
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, functional.npp_loss(prediction.float(), target, counted).total)


def test_token_loss_is_the_mean_over_labels():
    logits = random(2, 4, 9)
    labels = torch.tensor([[1, 5, 3, 2], [1, 7, -100, -100]])
    loss = functional.ntp_loss(logits, labels)
    torch.testing.assert_close(loss.mean, cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert loss.number == 4


def test_stop_loss_asks_for_the_separator():
    patches = torch.ones(1, 4, 6)
    patches[0, 2] = 0.0
    counted = functional.target_mask(torch.tensor([[1, 1, 1, 0]]))
    right = functional.stop_loss(torch.tensor([[-9.0, 9.0, 9.0, 9.0]]), patches, counted)
    wrong = functional.stop_loss(torch.tensor([[9.0, -9.0, 9.0, 9.0]]), patches, counted)
    assert right.number == 2
    assert right.mean < 1e-3
    assert wrong.mean > 8


def test_baselines():
    target = torch.stack([random(5, 6), random(5, 6, seed=1)])
    mask = functional.pixel_mask(torch.tensor([4, 2]), 5)
    counted = functional.target_mask(mask)
    losses = functional.baseline_losses(target, counted)
    chosen = target[:, 1:][mask[:, 1:].bool()]
    torch.testing.assert_close(losses["zero"].mean, chosen.square().mean())
    torch.testing.assert_close(losses["mean"].mean, (chosen - chosen.mean(0)).square().mean())
    before = target[:, :-1][mask[:, 1:].bool()]
    torch.testing.assert_close(losses["copy"].mean, (chosen - before).square().mean())
    patch = functional.mean_patch(target, counted)
    torch.testing.assert_close(patch.mean, chosen.mean(0))
    torch.testing.assert_close(losses["mean"].mean, losses["zero"].mean - patch.mean.square().mean())
    given = functional.baseline_losses(target, counted, torch.full((6,), 0.5))
    torch.testing.assert_close(given["mean"].mean, (chosen - 0.5).square().mean())


def test_merged_channels():
    kernel = random(4, 3, 2, 2)
    assert torch.equal(functional.merge_kernel_channels(kernel, "mean"), kernel.mean(1)[:, None])
    assert torch.equal(functional.merge_kernel_channels(kernel, "sum"), kernel.sum(1)[:, None])
    head = random(12, 5)
    torch.testing.assert_close(functional.merge_head_channels(head, 3)[1], head[3:6].mean(0))
