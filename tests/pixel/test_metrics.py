"""Metrics of pre-training against direct formulas, and numbers of papers."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, smooth_l1_loss

from lit_models.pixel import functional
from lit_models.pixel.metrics import GLUE, PatchErrors, Retention, TokenErrors, glue_average, retention

PIXEL = {  # dev scores in the README of xplip/pixel
    "mnli_matched": 78.1,
    "mnli_mismatched": 78.9,
    "qqp": 84.5,
    "qnli": 87.8,
    "sst2": 89.6,
    "cola": 38.4,
    "stsb": 81.1,
    "mrpc": 88.2,
    "rte": 60.5,
    "wnli": 53.8,
}
BATCHES = [((5, 2, 7), 9), ((1, 3), 4)]  # attended patches of the rows, and length of the strips


@pytest.fixture(params=[*BATCHES, ((6, 1, 4), 6)], ids=lambda param: f"{len(param[0])}x{param[1]}")
def shape(request):
    return request.param


def patches(shape, seed=0, binary=False, size=12):
    """Patches of which some are white, and the mask of those that are predicted."""
    lengths, length = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(lengths), length, size, generator=generator)
    if binary:
        values = (values > 0.5).float()
    values[:, 2::4] = 1.0
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return values, functional.target_mask(mask)


def guesses(values, seed=7):
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


def listed(values, counted, prediction):
    """(previous, wanted, guess) of every target, row by row."""
    rows = []
    for row in range(values.shape[0]):
        for place in range(1, values.shape[1]):
            if counted[row, place]:
                rows.append((values[row, place - 1], values[row, place], prediction[row, place - 1]))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def normalized(patch):
    return (patch - patch.mean(-1, keepdim=True)) / (patch.var(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("normalize", [True, False])
def test_patch_errors_are_means_over_all_targets(normalize):
    metric = PatchErrors(12, normalize)
    seen = []
    for seed, shape in enumerate(BATCHES):
        values, counted = patches(shape, seed)
        prediction = guesses(values, seed)
        metric.update(prediction.bfloat16().float(), values, counted)
        seen.append(listed(values, counted, prediction.bfloat16().float()))
    previous, wanted, guess = (torch.cat(parts) for parts in zip(*seen, strict=True))
    ink = wanted.var(-1) > 1e-6
    if normalize:
        previous, wanted = normalized(previous), normalized(wanted)
    found = metric.compute()
    for prefix, kept in (("npp", slice(None)), ("npp_inked", ink)):
        for name, other in (("", guess), ("_copy", previous), ("_zero", torch.zeros_like(wanted)), ("_mean", None)):
            other = wanted[kept].mean(0) if other is None else other[kept]
            expected = (wanted[kept] - other).square().mean()
            torch.testing.assert_close(found[prefix + name], expected, rtol=1e-5, atol=1e-6)
    assert len(found) == 8


def test_smooth_l1(shape):
    values, counted = patches(shape)
    metric = PatchErrors(12, True, "smooth_l1")
    metric.update(guesses(values), values, counted)
    previous, wanted, guess = listed(values, counted, guesses(values))
    found = metric.compute()
    torch.testing.assert_close(found["npp"], smooth_l1_loss(guess, normalized(wanted)))
    torch.testing.assert_close(found["npp_copy"], smooth_l1_loss(normalized(previous), normalized(wanted)))
    assert not [name for name in found if name.endswith("_mean")]


def test_binary_cross_entropy(shape):
    values, counted = patches(shape, binary=True)
    metric = PatchErrors(12, False, "bce")
    metric.update(guesses(values), values, counted)
    previous, wanted, guess = listed(values, counted, guesses(values))
    found = metric.compute()
    torch.testing.assert_close(found["npp"], binary_cross_entropy(guess.sigmoid(), wanted))
    torch.testing.assert_close(found["npp_zero"], torch.tensor(math.log(2)))
    clipped = previous.clamp(0.5 / 255, 1 - 0.5 / 255)
    torch.testing.assert_close(found["npp_copy"], binary_cross_entropy(clipped, wanted), rtol=1e-4, atol=1e-5)
    mean = wanted.mean(0).expand_as(wanted)
    torch.testing.assert_close(found["npp_mean"], binary_cross_entropy(mean, wanted), rtol=1e-5, atol=1e-6)


def test_patches_that_are_not_targets_have_no_influence(shape):
    values, counted = patches(shape)
    prediction = guesses(values)
    first, second = PatchErrors(12), PatchErrors(12)
    first.update(prediction, values, counted)
    counted_or_first = counted.clone()
    counted_or_first[:, 0] = True  # the first patch stands before the first target
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(3))
    values = torch.where(counted_or_first[..., None], values, noise)
    prediction = torch.where(counted.roll(-1, 1)[..., None], prediction, torch.inf)
    second.update(prediction, values, counted)
    assert first.compute() == second.compute()


def test_nothing_is_computed_of_nothing():
    assert PatchErrors(12)._get_name()
    metric = PatchErrors(12)
    values, counted = patches(((1, 1), 3))  # no patch has one before it
    metric.update(guesses(values), values, counted)
    assert metric.compute() == {}
    values, counted = torch.ones(1, 3, 12), torch.tensor([[False, True, True]])
    metric.update(guesses(values), values, counted)
    assert metric.compute().keys() == {"npp", "npp_copy", "npp_zero", "npp_mean"}


def test_token_errors():
    metric = TokenErrors()
    for lengths, width in (((4, 2, 5), 5), ((1,), 3)):
        counted = torch.arange(width) < torch.tensor(lengths)[:, None]
        metric.update(counted * 0.5 * torch.arange(1, width + 1), counted, 3 * torch.tensor(lengths))
    nll = 0.5 * (10 + 3 + 15 + 1)
    found = {name: float(value) for name, value in metric.compute().items()}
    expected = {"ntp": nll / 12, "perplexity": math.exp(nll / 12), "bits_per_byte": nll / math.log(2) / 36}
    assert found == pytest.approx(expected, rel=1e-6)
    metric.reset()
    metric.update(torch.full((1, 1), 1e4), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]))
    assert all(math.isfinite(value) for value in metric.compute().values())


def test_sums_add_up_over_ranks():
    """What synchronisation does: states of the ranks are added before `compute`."""
    whole, parts = PatchErrors(12), [PatchErrors(12), PatchErrors(12)]
    for seed, (shape, part) in enumerate(zip(BATCHES, parts, strict=True)):
        values, counted = patches(shape, seed)
        for metric in (whole, part):
            metric.update(guesses(values), values, counted)
    assert {reduction.__name__ for reduction in whole._reductions.values()} == {"dim_zero_sum"}
    for name in whole._defaults:
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts[0].compute()[name], value)


def test_retention_is_the_share_of_knowledge_that_is_left():
    assert retention(0.6, 0.8, 0.4) == pytest.approx(0.5)
    assert retention(0.3, 0.8, 0.4) == pytest.approx(-0.25)
    assert math.isnan(retention(0.3, 0.4, 0.4))
    # Tables of the acceptance experiment: majority 0.441.
    assert retention(0.603, 0.609, 0.441) == pytest.approx(0.97, abs=0.01)
    assert retention(0.513, 0.738, 0.441) == pytest.approx(0.24, abs=0.01)


def test_retention_of_predictions():
    labels = torch.tensor([0, 0, 0, 1, 2])
    clean = torch.tensor([0, 0, 0, 1, 0])
    noisy = torch.tensor([0, 0, 1, 1, 2])
    metric = Retention(3)
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(noisy[part], clean[part], labels[part])
    assert float(metric.compute()) == pytest.approx((0.8 - 0.6) / (0.8 - 0.6))
    metric.update(torch.tensor([1]), torch.tensor([2]), torch.tensor([2]))
    assert float(metric.compute()) == pytest.approx((4 / 6 - 3 / 6) / (5 / 6 - 3 / 6))


def test_glue_average_is_that_of_the_paper():
    assert len(GLUE) == 10
    assert round(glue_average(PIXEL), 1) == 74.1
    with pytest.raises(ValueError, match=r"missing: rte, unknown: mnli$"):
        glue_average({name: 1.0 for name in GLUE if name != "rte"} | {"mnli": 1.0})
