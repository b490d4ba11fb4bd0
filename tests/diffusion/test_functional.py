import math

import pytest
import torch

from lit_models.diffusion import functional
from lit_models.diffusion.functional import TimeSampler, alpha_sigma, diffuse, sound_and_noise, velocity, velocity_loss
from lit_models.nn.averaging import ema_decay


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- process -----------------------------------------------------------------------------------------------------------


def test_ends_of_the_schedule_are_exact():
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha.tolist() == [1.0, 0.0]
    assert sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_process_is_float32_at_least(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t, x = torch.tensor([0.25, 1.0], dtype=dtype), normal(2, 1, 6).to(dtype)
    for result in (*alpha_sigma(t), functional.log_snr(t), functional.crash_time(t), functional.edm_sigma(t)):
        assert result.dtype == wide
    for result in (diffuse(x, x, t), velocity(x, x, t), *sound_and_noise(x, x, t)):
        assert result.dtype == wide
    assert velocity_loss(x, x + 1).mean.dtype == wide


def test_log_snr_is_finite_in_float32():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(functional.log_snr(t), torch.tensor([80.0, 0.0, -80.0]))
    assert functional.log_snr(t, limit=3.0).tolist()[2] == -3.0


@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("channels", [1, 2])
def test_velocity_holds_sound_and_noise(length, channels):
    x, noise, t = normal(5, channels, length), normal(5, channels, length, seed=1), torch.tensor([0, 0.1, 0.5, 0.9, 1])
    x0, epsilon = sound_and_noise(diffuse(x, noise, t), velocity(x, noise, t), t)
    torch.testing.assert_close(x0, x)
    torch.testing.assert_close(epsilon, noise)
    assert torch.equal(diffuse(x, noise, t)[0], x[0])
    assert torch.equal(velocity(x, noise, t)[4], -x[4])


def test_velocity_is_the_derivative_of_the_angle():
    x, noise = normal(1, 1, 4).double(), normal(1, 1, 4, seed=1).double()
    t, step = torch.tensor(0.3, dtype=torch.float64), 1e-6
    slope = (diffuse(x, noise, t + step) - diffuse(x, noise, t - step)) / (2 * step * math.pi / 2)
    torch.testing.assert_close(velocity(x, noise, t), slope, rtol=0.0, atol=1e-8)


def test_one_time_serves_all_clips():
    x, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    torch.testing.assert_close(diffuse(x, noise, torch.tensor(0.3)), diffuse(x, noise, torch.full((3,), 0.3)))


def test_transition_and_posterior_belong_to_the_process():
    s, t = torch.tensor([0.0, 0.2, 0.5, 0.6]).double(), torch.tensor([0.3, 0.4, 1.0, 0.6]).double()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(s), alpha_sigma(t)
    factor, variance = functional.transition(s, t)
    torch.testing.assert_close(factor * alpha_s, alpha_t)
    torch.testing.assert_close(factor.square() * sigma_s.square() + variance, sigma_t.square())
    assert variance[3] == 0
    torch.testing.assert_close(variance[1], (1 - (log(t[1]) - log(s[1])).exp()) * sigma_t[1].square())
    # E[z_s | z_t, x] is the regression of z_s on z_t for given x
    gain = factor * sigma_s.square() / (factor.square() * sigma_s.square() + variance)
    of_z, of_x = functional.posterior(s, t)
    torch.testing.assert_close(of_z, gain)
    torch.testing.assert_close(of_x, alpha_s - gain * alpha_t)
    assert torch.isfinite(of_z).all()


def log(t):
    return functional.log_snr(t)


def test_edm_ratios_and_times_are_inverse():
    t = torch.tensor([0.0, 0.1, 0.5, 0.99])
    torch.testing.assert_close(functional.time_of_edm_sigma(functional.edm_sigma(t)), t)
    assert torch.isfinite(functional.edm_sigma(torch.tensor(1.0)))


def test_crash_times_prefer_little_noise():
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    crash = functional.crash_time(t)
    assert crash[0] == 0
    assert crash[-1] == 1
    assert (crash[1:-1] < t[1:-1]).all()
    torch.testing.assert_close(functional.crash_time_inverse(crash), t, rtol=0.0, atol=1e-7)


# -- the best velocity of normal data ----------------------------------------------------------------------------------


def test_gaussian_velocity_is_the_regression():
    mean, std, t = torch.tensor(0.7), torch.tensor(0.4), torch.tensor(0.35)
    x = mean + std * normal(400_000, 1, 1)
    noise = normal(400_000, 1, 1, seed=1)
    z, v = diffuse(x, noise, t)[:, 0, 0], velocity(x, noise, t)[:, 0, 0]
    slope = ((z - z.mean()) * (v - v.mean())).mean() / z.var()
    best = functional.gaussian_velocity(torch.tensor([[[0.0]], [[1.0]]]), t, mean, std)[:, 0, 0]
    torch.testing.assert_close(best[1] - best[0], slope, rtol=0.0, atol=0.01)
    torch.testing.assert_close(best[0], v.mean() - slope * z.mean(), rtol=0.0, atol=0.01)


def test_gaussian_law_shrinks_unit_deviation_as_published():
    expected = {1: 0, 2: 0.5, 5: 0.77809, 10: 0.88349, 20: 0.94012, 50: 0.97562, 100: 0.98774, 250: 0.99508}
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for steps, std in expected.items():
        law = functional.gaussian_ddim(one, torch.linspace(1, 0, steps + 1, dtype=torch.float64), zero, one)
        assert law.item() == pytest.approx(std, abs=5e-6)
        assert law.item() == pytest.approx(math.cos(math.pi / 2 / steps) ** steps, abs=1e-12)


# -- times -------------------------------------------------------------------------------------------------------------

SEQUENCES = ["sobol", "stratified", "random"]


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("law", ["uniform", "crash", "logit_normal"])
def test_times_follow_their_law(law, sequence):
    sampler = TimeSampler(law, sequence, mean=-0.5, std=1.5, seed=3)
    t = torch.cat([sampler(64) for _ in range(256)])
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() <= 1
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        expected = {
            "uniform": quantile,
            "crash": functional.crash_time(torch.tensor(quantile)).item(),
            "logit_normal": 1 / (1 + math.exp(0.5 - 1.5 * torch.special.ndtri(torch.tensor(quantile)).item())),
        }
        assert t.quantile(quantile).item() == pytest.approx(expected[law], abs=0.02)


@pytest.mark.parametrize("sequence", ["sobol", "stratified"])
def test_low_discrepancy_puts_one_time_in_each_bin(sequence):
    counts = torch.histc(TimeSampler(sequence=sequence, seed=5)(64), bins=64, min=0, max=1)
    assert counts.eq(1).all()


def test_sobol_covers_over_several_steps():
    sampler = TimeSampler(seed=5)
    t = torch.cat([sampler(8) for _ in range(8)])
    assert torch.histc(t, bins=64, min=0, max=1).eq(1).all()


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_times_resume_and_differ_between_seeds(sequence):
    sampler = TimeSampler(sequence=sequence, seed=1)
    sampler(5)
    state = sampler.state_dict()
    expected = [sampler(6), sampler(3)]
    resumed = TimeSampler(sequence=sequence, seed=1)
    resumed(11)
    resumed.load_state_dict(state)
    for t in expected:
        assert torch.equal(resumed(len(t)), t)
    other = TimeSampler(sequence=sequence, seed=2)
    other.load_state_dict(state)
    assert (other(6) - expected[0]).abs().max() > 0.01
    assert len(set(torch.cat(expected).tolist())) == 9


def test_sobol_begins_again_at_its_end(monkeypatch):
    monkeypatch.setattr(functional, "SOBOL_POINTS", 16)
    sampler = TimeSampler(seed=1)
    first = sampler(12)
    assert torch.equal(sampler(12), first)
    assert sampler.state_dict() == {"drawn": 12}


def test_unknown_choices_of_times_are_named():
    with pytest.raises(ValueError, match="law: 'beta' is unknown"):
        TimeSampler("beta")
    with pytest.raises(ValueError, match="sequence: 'halton' is unknown"):
        TimeSampler(sequence="halton")
    with pytest.raises(ValueError, match="std: 0 is not positive"):
        TimeSampler("logit_normal", std=0)


def test_extreme_uniform_numbers_stay_times():
    t = functional.time_from_uniform(torch.tensor([0.0, 1.0]), "logit_normal", std=20.0)
    assert torch.isfinite(t).all()
    assert t[0] >= 0
    assert t[1] <= 1


def test_grid_of_validation():
    assert functional.time_grid(4).tolist() == [0.125, 0.375, 0.625, 0.875]


# -- amplitude and losses ----------------------------------------------------------------------------------------------


def test_unit_scale_ignores_padding():
    x = 0.1 * normal(4, 1, 100)
    x[:, :, 60:] = 0
    valid = functional.valid_mask(torch.full((4,), 60), 100)
    scale = functional.unit_scale(x, valid)
    assert (x[:, :, :60] * scale).square().mean().item() == pytest.approx(1.0)
    assert functional.unit_scale(x) == pytest.approx(scale * math.sqrt(100 / 60))


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 4), torch.zeros(1, 1, 0)])
def test_silent_data_has_no_scale(x):
    with pytest.raises(ValueError, match="data_scale: the training clips are silent"):
        functional.unit_scale(x)


def test_velocity_loss_is_the_weighted_loss_of_sound():
    x, noise, t, guess = (
        normal(3, 2, 8),
        normal(3, 2, 8, seed=1),
        torch.tensor([0.2, 0.5, 0.8]),
        normal(3, 2, 8, seed=2),
    )
    loss = velocity_loss(guess, velocity(x, noise, t))
    x0, _ = sound_and_noise(diffuse(x, noise, t), guess, t)
    alpha, sigma = alpha_sigma(t)
    weighted = (1 + alpha.square() / sigma.square()) * (x - x0).square().mean((1, 2))
    torch.testing.assert_close(loss.per_clip, weighted)
    torch.testing.assert_close(loss.mean, weighted.mean())


def test_masked_loss_counts_valid_samples_only():
    target, valid = normal(2, 2, 5), torch.tensor([5, 2])
    prediction = target + torch.tensor([1.0, 3.0])[:, None, None]
    prediction[1, :, 2:] = math.nan
    loss = velocity_loss(prediction, target, mask=functional.valid_mask(valid, 5))
    assert loss.mean.item() == pytest.approx((10 * 1 + 4 * 9) / 14)
    torch.testing.assert_close(loss.per_clip, torch.tensor([1.0, 9.0]))
    assert loss.number == 14
    nothing = velocity_loss(prediction, target, mask=torch.zeros(2, 1, 5))
    assert nothing.mean == 0
    assert not nothing.per_clip.any()


def test_masked_loss_has_finite_gradients():
    prediction = torch.zeros(1, 1, 3, requires_grad=True)
    target = torch.tensor([[[1.0, 2.0, math.inf]]])
    velocity_loss(prediction, target, mask=torch.tensor([[[1, 1, 0]]])).mean.backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([[[-1.0, -2.0, 0.0]]]))


def test_min_snr_weights_clips_by_time():
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    alpha, sigma = alpha_sigma(t[1:3])
    snr = (alpha / sigma).square()
    expected = torch.cat([torch.zeros(1), snr.clamp(max=5) / (snr + 1), torch.zeros(1)])
    torch.testing.assert_close(functional.min_snr_weight(t), expected)
    loss = velocity_loss(torch.ones(4, 1, 3), torch.zeros(4, 1, 3), t, "min_snr")
    torch.testing.assert_close(loss.mean, expected.mean())
    assert loss.per_clip.eq(1).all()
    with pytest.raises(ValueError, match='loss_weighting: "min_snr" needs times'):
        velocity_loss(torch.ones(4, 1, 3), torch.zeros(4, 1, 3), weighting="min_snr")


def test_losses_by_time():
    sums, counts = functional.loss_by_time(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.24, 0.5, 1.0]))
    assert sums.tolist() == [3, 0, 4, 8]
    assert counts.tolist() == [2, 0, 1, 1]


def test_spectral_distance_of_a_scaled_clip():
    x = normal(2, 2, 1024)
    factor = torch.tensor([1.0, 2.0])
    distance = functional.stft_distance(factor[:, None, None] * x, x)
    torch.testing.assert_close(distance, factor - 1 + factor.log(), rtol=1e-4, atol=1e-6)


def test_spectral_term_counts_little_where_noise_is_high():
    x, guess = normal(2, 1, 600), normal(2, 1, 600, seed=1).requires_grad_()
    distance = functional.stft_distance(guess, x).detach()
    term = functional.stft_loss(guess, x, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(term, distance[0] / 4)
    term.backward()
    assert guess.grad[0].any()
    assert not guess.grad[1].any()


def test_spectral_term_of_silence_is_finite():
    guess = torch.zeros(1, 1, 600, requires_grad=True)
    functional.stft_loss(guess, torch.zeros(1, 1, 600), torch.zeros(1)).backward()
    assert torch.isfinite(guess.grad).all()


def test_spectral_term_names_clips_that_are_too_short():
    with pytest.raises(ValueError, match="stft_sizes: 512 is too long for clips of 256 samples"):
        functional.stft_distance(torch.zeros(1, 1, 256), torch.zeros(1, 1, 256))


# -- decay -------------------------------------------------------------------------------------------------------------


def test_decay_rises_to_its_maximum():
    for warmup in ("power", "ratio"):
        decays = [ema_decay(step, 0.9, warmup) for step in range(200)]
        assert decays[:3] == [0.0, 0.0, 0.0]
        assert decays == sorted(decays)
        assert decays[3] > 0
        assert decays[-1] == 0.9
    assert ema_decay(0, 0.9, "none") == 0.9
