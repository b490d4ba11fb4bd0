import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from lit_models.diffusion import functional
from lit_models.diffusion.samplers import (
    Guidance,
    Prediction,
    VDDIMScheduler,
    VDPMSolverScheduler,
    continuation,
    continued,
    ddim_options,
    ddim_update,
    denoise,
    guide,
    heun,
    inpaint,
    model_times,
)

EDM_OPTIONS = {
    "sigma_min": 0.02,
    "sigma_max": 80.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(mean, std):
    """Predictor for normal data."""

    def predict(z, time):
        t = torch.tensor(time, dtype=z.dtype)
        return Prediction(functional.gaussian_velocity(z, t, torch.as_tensor(mean), torch.as_tensor(std)))

    return predict


def mixed(z, time):
    """Predictor under which all values of a clip act on each other."""
    return Prediction(torch.tanh(z.flip(-1)) + z.mean((1, 2), keepdim=True) * time)


def sample(scheduler, steps, predict, z, **options):
    scheduler.set_timesteps(steps)
    return denoise(predict, scheduler, z * scheduler.init_noise_sigma, **options)


# -- the law of normal data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("spacing", ["linear", "crash"])
def test_ddim_follows_the_law_exactly(steps, spacing):
    mean, std, z = normal(2, 9), normal(2, 9, seed=1).abs() + 0.1, normal(4, 2, 9, seed=2)
    scheduler = VDDIMScheduler(spacing=spacing)
    y = sample(scheduler, steps, gaussian(mean, std), z)
    law = functional.gaussian_ddim(z, torch.tensor(scheduler.times), mean, std)
    torch.testing.assert_close(y, law, rtol=0.0, atol=1e-5)


def test_deviation_after_fifty_steps():
    y = sample(VDDIMScheduler(), 50, gaussian(0.0, 1.0), normal(4096, 1, 8))
    assert y.std().item() == pytest.approx(0.97562, abs=0.01)
    assert y.std().item() < 0.99 * normal(4096, 1, 8).std().item()


def test_solvers_converge_to_the_exact_marginal():
    mean, std, z = torch.tensor(0.6).double(), torch.tensor(0.3).double(), normal(2048, 1, 4, dtype=torch.float64)
    exact = mean + std * z

    def error(scheduler, steps):
        return (sample(scheduler, steps, gaussian(mean, std), z) - exact).abs().max().item()

    ddim = [error(VDDIMScheduler(), steps) for steps in (50, 100, 200)]
    assert ddim[0] / ddim[1] == pytest.approx(2, rel=0.1)
    assert ddim[1] / ddim[2] == pytest.approx(2, rel=0.1)
    # σ/α between bounds so wide that only the steps make errors
    multistep = [error(VDPMSolverScheduler(sigma_max=1e4, sigma_min=1e-4), steps) for steps in (60, 120, 240)]
    assert multistep[0] / multistep[1] > 3.2
    assert multistep[1] / multistep[2] > 3.2
    assert multistep[2] < ddim[2] / 10


def test_second_order_needs_half_the_calls():
    mean, std, z = 0.3 * normal(2, 10), normal(2, 10, seed=1).abs() / 2 + 0.2, normal(64, 2, 10, seed=2)
    exact = mean + std * z
    first = (sample(VDDIMScheduler(), 20, gaussian(mean, std), z) - exact).abs().max()
    second = (sample(VDPMSolverScheduler(), 10, gaussian(mean, std), z) - exact).abs().max()
    assert second < first


def test_ancestral_sampling_keeps_the_marginal():
    generator = torch.Generator().manual_seed(0)
    z = normal(4096, 1, 4)
    y = sample(VDDIMScheduler(eta=1.0), 100, gaussian(0.5, 0.5), z, generator=generator)
    assert y.mean().item() == pytest.approx(0.5, abs=0.02)
    assert y.std().item() == pytest.approx(0.5, abs=0.02)
    correlation = ((y - y.mean()) * z).mean() / (y.std() * z.std())
    assert abs(correlation) < 0.1  # nothing of the start is left


@pytest.mark.parametrize("start", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("scheduler", [VDDIMScheduler(), VDDIMScheduler(spacing="crash"), VDPMSolverScheduler()])
def test_variation_reaches_the_marginal(scheduler, start):
    x, noise = 0.5 + 0.5 * normal(4096, 1, 4), normal(4096, 1, 4, seed=1)
    scheduler.set_timesteps(100, start=start)
    assert scheduler.timesteps[0].item() == pytest.approx(start)
    y = denoise(gaussian(0.5, 0.5), scheduler, scheduler.add_noise(x, noise, scheduler.timesteps[0]))
    assert y.mean().item() == pytest.approx(0.5, abs=0.02)
    assert y.std().item() == pytest.approx(0.5, abs=0.02)
    correlation = ((y - 0.5) * (x - 0.5)).mean() / 0.25
    ratio = math.tan(math.pi * start / 2) / 0.5
    assert correlation.item() == pytest.approx(1 / math.sqrt(1 + ratio**2), abs=0.03)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_last_step_returns_the_sound():
    z, v = normal(1, 1, 5), normal(1, 1, 5, seed=1)
    y, x0 = ddim_update(z, v, 0.2, 0.0, eta=1.0)
    assert torch.equal(y, x0)
    torch.testing.assert_close(x0, functional.sound_and_noise(z, v, torch.tensor(0.2))[0])


def test_first_step_starts_from_noise():
    z, v = normal(1, 1, 5), normal(1, 1, 5, seed=1)
    y, x0 = ddim_update(z, v, 1.0, 0.5)
    torch.testing.assert_close(x0, -v)
    torch.testing.assert_close(y, (z - v) * math.sqrt(0.5))


def test_full_eta_is_the_posterior():
    z, v, noise, s, t = normal(2, 1, 5), normal(2, 1, 5, seed=1), normal(2, 1, 5, seed=2), 0.3, 0.7
    y, x0 = ddim_update(z, v, t, s, eta=1.0, noise=noise)
    of_z, of_x = functional.posterior(torch.tensor(s), torch.tensor(t))
    mean = ddim_update(z, v, t, s, eta=1.0, noise=torch.zeros_like(noise))[0]
    torch.testing.assert_close(mean, of_z * z + of_x * x0)
    _, sigma_s = functional.alpha_sigma(torch.tensor(s))
    factor, variance = functional.transition(torch.tensor(s), torch.tensor(t))
    posterior_variance = variance * sigma_s**2 / (variance + (factor * sigma_s) ** 2)
    torch.testing.assert_close(y - mean, posterior_variance.sqrt() * noise)


@pytest.mark.parametrize("scheduler", [VDDIMScheduler(), VDDIMScheduler(eta=0.5), VDPMSolverScheduler()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_is_float32(scheduler, dtype):
    scheduler.set_timesteps(3)
    z = normal(2, 1, 7).to(dtype)
    output = scheduler.step(mixed(z, 1.0).velocity, scheduler.timesteps[0], z)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.float32
    assert torch.isfinite(output.prev_sample).all()


def test_place_in_the_grid_is_found_by_the_time():
    z, v = normal(1, 1, 5), normal(1, 1, 5, seed=1)
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(4)
    y = scheduler.step(v, scheduler.timesteps[2], z).prev_sample
    torch.testing.assert_close(y, ddim_update(z, v, 0.5, 0.25)[0])
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    y = scheduler.step(v, scheduler.timesteps[1], z, return_dict=False)[0]
    torch.testing.assert_close(y, ddim_update(z, v, 0.75, 0.5)[0])
    assert scheduler.begin_index == 1


def test_generators_make_the_noise_repeatable():
    def run(seed):
        generators = [torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)]
        return sample(VDDIMScheduler(eta=1.0), 5, mixed, normal(2, 1, 6), generator=generators)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1)[0], run(2)[0])
    assert torch.equal(run(1)[1], run(2)[1])


def test_multistep_restarts_with_each_sample():
    scheduler = VDPMSolverScheduler()
    z = normal(2, 1, 6)
    assert torch.equal(sample(scheduler, 6, mixed, z), sample(scheduler, 6, mixed, z))


def test_one_step_of_the_multistep_solver():
    z = normal(1, 1, 6)
    scheduler = VDPMSolverScheduler()
    y = sample(scheduler, 1, mixed, z)
    time = scheduler.times[0]
    start = z * scheduler.init_noise_sigma
    torch.testing.assert_close(y, ddim_update(start, mixed(start, time).velocity, time, 0.0)[0])


@pytest.mark.parametrize(
    "scheduler",
    [VDDIMScheduler(spacing="crash", eta=0.5), VDDIMScheduler(), VDPMSolverScheduler(sigma_max=50.0, sigma_min=0.01)],
)
def test_schedulers_survive_saving(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    for key in inspect.signature(type(scheduler).__init__).parameters:
        assert key == "self" or loaded.config[key] == getattr(loaded, key) == getattr(scheduler, key)
    assert type(scheduler).from_config(scheduler.config).config == scheduler.config
    loaded.set_timesteps(7)
    scheduler.set_timesteps(7)
    assert loaded.times == scheduler.times


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VDDIMScheduler(spacing="cosine"), "spacing: 'cosine' is unknown"),
        (lambda: VDDIMScheduler(eta=2.0), "eta: 2.0 is not in"),
        (
            lambda: VDPMSolverScheduler(sigma_max=1.0, sigma_min=2.0),
            "sigma_min: 2.0 is not between 0 and sigma_max 1.0",
        ),
        (lambda: VDDIMScheduler().set_timesteps(0), "num_inference_steps: 0 is not"),
        (lambda: VDDIMScheduler().set_timesteps(), "num_inference_steps: None is not"),
        (lambda: VDDIMScheduler().set_timesteps(5, start=0.0), "start: 0.0 is not in"),
        (lambda: VDDIMScheduler().set_timesteps(timesteps=[0.5, 0.7]), "timesteps: the times don't fall"),
        (lambda: VDPMSolverScheduler().set_timesteps(5, start=0.01), "start: 0.01 is less noisy than sigma_min"),
        (lambda: VDDIMScheduler().step(torch.ones(1), 1.0, torch.ones(1)), "call set_timesteps before step"),
        (lambda: model_times(DPMSolverMultistepScheduler()), "DPMSolverMultistepScheduler does not follow"),
        (lambda: model_times(EDMEulerScheduler()), "EDMEulerScheduler is not set up for velocities"),
        (lambda: Guidance(rescale=2.0), "rescale: 2.0 is not in"),
        (lambda: Guidance(interval=(0.5, 0.1)), "interval: .* is not two rising numbers"),
        (lambda: inpaint(mixed, VDDIMScheduler(), *[torch.ones(1, 1, 2)] * 3, resamples=0), "resamples: 0 is not"),
        (lambda: inpaint(mixed, VDDIMScheduler(eta=1.0), *[torch.ones(1, 1, 2)] * 3), "eta: 1.0 is not possible"),
        (lambda: continuation(torch.ones(1, 1, 3), 8, 4), "overlap: 4 samples are not between 1 and 3"),
        (lambda: continuation(torch.ones(1, 1, 9), 8, 8), "overlap: 8 samples are not between 1 and 7"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_used_up_grid_is_an_error():
    scheduler = VDDIMScheduler()
    z = sample(scheduler, 1, mixed, normal(1, 1, 4))
    with pytest.raises(ValueError, match="the grid is used up"):
        scheduler.step(z, 0.0, z)


# -- schedulers of diffusers -------------------------------------------------------------------------------------------


def test_edm_schedulers_of_diffusers_agree():
    z, ours = normal(2, 2, 6), VDPMSolverScheduler()
    y = sample(ours, 12, mixed, z)
    theirs = EDMDPMSolverMultistepScheduler(**EDM_OPTIONS)
    torch.testing.assert_close(y, sample(theirs, 12, mixed, z), rtol=0.0, atol=1e-3)
    assert model_times(theirs) == pytest.approx(model_times(ours), abs=1e-6)
    euler = VDDIMScheduler()
    euler.set_timesteps(timesteps=list(ours.times[:-1]))
    y = denoise(mixed, euler, z * ours.init_noise_sigma)
    torch.testing.assert_close(y, sample(EDMEulerScheduler(**EDM_OPTIONS), 12, mixed, z), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_of_diffusers_agrees_on_its_grid(steps):
    scheduler = DDIMScheduler(**ddim_options(100))
    z = normal(2, 2, 6)
    theirs = sample(scheduler, steps, mixed, z)
    assert model_times(scheduler) == pytest.approx([1 - step / steps for step in range(steps)])
    torch.testing.assert_close(sample(VDDIMScheduler(), steps, mixed, z), theirs, rtol=0.0, atol=2e-5)


def test_heun_is_of_second_order():
    mean, std, z = torch.tensor(0.6).double(), torch.tensor(0.3).double(), normal(64, 1, 4, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        scheduler = VDPMSolverScheduler(sigma_max=1e3, sigma_min=1e-3)
        scheduler.set_timesteps(steps)
        y = heun(gaussian(mean, std), scheduler.times, z * scheduler.init_noise_sigma)
        errors.append((y - mean - std * z).abs().max().item())
    assert errors[0] / errors[1] > 3.2


# -- guidance ----------------------------------------------------------------------------------------------------------


def branches(calls):
    """A network that tells branches apart and notes what it was asked."""

    def network(z, t, branch):
        calls.append((branch, len(z)))
        assert t.shape == (len(z),)
        assert t.dtype == torch.float32
        halves = {"conditional": 1.0, "unconditional": -1.0}
        if branch == "both":
            first, second = z.chunk(2)
            assert torch.equal(first, second)
            return torch.cat([first + 1.0, second - 1.0]).bfloat16()
        return (z + halves[branch]).bfloat16()

    return network


@pytest.mark.parametrize(
    ("guidance", "time", "branch", "velocity"),
    [
        (Guidance(scale=1.0), 0.5, "conditional", 1.0),
        (Guidance(scale=0.0), 0.5, "unconditional", -1.0),
        (Guidance(scale=3.0), 0.5, "both", 5.0),
        (Guidance(scale=3.0, interval=(0.0, 0.5)), 0.5, "conditional", 1.0),
        (Guidance(scale=3.0, interval=(0.0, 0.75)), 0.5, "both", 5.0),
        (Guidance(scale=3.0, interval=(0.8, 1.0)), 0.5, "conditional", 1.0),
        (Guidance(scale=0.0, interval=(0.8, 1.0)), 0.5, "conditional", 1.0),
        (Guidance(scale=1.0, plus=True), 0.5, "both", 1.0),
        (Guidance(scale=0.0, plus=True), 0.5, "unconditional", -1.0),
        (Guidance(scale=0.5, plus=True, interval=(0.8, 1.0)), 0.5, "conditional", 1.0),
    ],
)
def test_only_needed_velocities_are_computed(guidance, time, branch, velocity):
    calls = []
    prediction = guidance.predictor(branches(calls))(torch.zeros(3, 1, 4), time)
    assert calls == [(branch, 6 if branch == "both" else 3)]
    assert prediction.velocity.dtype == torch.float32
    assert prediction.velocity.eq(velocity).all()
    assert (prediction.unconditional is not None) == (guidance.plus and branch == "both")


@pytest.mark.parametrize("channels", [1, 2])
def test_rescaling_restores_the_deviation(channels):
    conditional, unconditional = normal(3, channels, 50), normal(3, channels, 50, seed=1)
    plain = guide(conditional, unconditional, 4.0)
    full, half = (guide(conditional, unconditional, 4.0, rescale) for rescale in (1.0, 0.5))
    torch.testing.assert_close(full.std((1, 2)), conditional.std((1, 2)))
    torch.testing.assert_close(half, (plain + full) / 2)
    assert (plain.std((1, 2)) > 2 * full.std((1, 2))).all()


def test_plus_takes_the_noise_from_the_unconditional_velocity():
    z, guided, unconditional = normal(1, 1, 5), normal(1, 1, 5, seed=1), normal(1, 1, 5, seed=2)
    y, x0 = ddim_update(z, guided, 0.8, 0.4, noise_velocity=unconditional)
    t = torch.tensor(0.8)
    sound, noise = functional.sound_and_noise(z, guided, t)[0], functional.sound_and_noise(z, unconditional, t)[1]
    alpha, sigma = functional.alpha_sigma(torch.tensor(0.4))
    torch.testing.assert_close(x0, sound)
    torch.testing.assert_close(y, alpha * sound + sigma * noise)


def test_plus_needs_a_scheduler_that_can():
    predict = Guidance(scale=0.5, plus=True).predictor(branches([]))
    with pytest.raises(ValueError, match=r"guidance\.plus: this scheduler has no CFG\+\+"):
        sample(VDPMSolverScheduler(), 2, predict, normal(1, 1, 4))


# -- existing sound ----------------------------------------------------------------------------------------------------


def test_inpainting_is_what_its_definition_says():
    steps, resamples = 4, 3
    z, source = normal(2, 1, 6), normal(2, 1, 6, seed=1)
    mask = torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    noises = normal(steps * resamples, 2, 1, 6, seed=2)
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(steps)
    y = inpaint(mixed, scheduler, z, source, mask, resamples, noises=iter(noises))

    expected = z
    draws = iter(noises)
    for step in range(steps):
        for repeat in range(resamples):
            t = torch.tensor(1 - step / steps)
            level = torch.tensor(1 - (step + (repeat == resamples - 1)) / steps)
            sound, noise = functional.sound_and_noise(expected, mixed(expected, t.item()).velocity, t)
            kept, made = functional.diffuse(source, next(draws), level), functional.diffuse(sound, noise, level)
            expected = torch.where(mask, kept, made)
    torch.testing.assert_close(y, expected, rtol=0.0, atol=1e-5)
    assert torch.equal(y[..., mask], source[..., mask])
    assert torch.isfinite(y).all()


def test_inpainting_does_not_read_what_is_to_be_made():
    source = normal(1, 1, 6)
    mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    results = []
    for fill in (0.0, math.nan):
        scheduler = VDDIMScheduler()
        scheduler.set_timesteps(5)
        known = source.masked_fill(~mask, fill)
        generator = torch.Generator().manual_seed(0)
        results.append(inpaint(mixed, scheduler, normal(1, 1, 6, seed=1), known, mask, 2, generator))
    assert torch.equal(*results)


def test_inpainting_fits_what_is_made_to_what_is_kept():
    """Two values that are always equal: keeping one must give the other."""

    def predict(z, time):
        t = torch.tensor(time)
        alpha, sigma = functional.alpha_sigma(t)
        x0 = (alpha * z.sum(-1, keepdim=True) / (2 * alpha**2 + sigma**2)).expand_as(z)
        return Prediction((alpha * z - x0) / sigma)

    kept, mask = normal(512, 1, 1), torch.tensor([True, False])
    source = torch.cat([kept, torch.zeros_like(kept)], dim=-1)
    error = []
    for steps in (10, 50):
        scheduler = VDDIMScheduler()
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        y = inpaint(predict, scheduler, normal(512, 1, 2, seed=1), source, mask, generator=generator)
        error.append((y[..., 1] - kept[..., 0]).square().mean().item())
    assert error[1] < 0.05  # without taking notice, it would be 2
    assert error[1] < error[0] / 2


def test_steps_are_reported_and_can_be_changed():
    seen = []

    def on_step(index, time, z):
        seen.append((index, time))
        return torch.zeros_like(z) if index == 1 else None

    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(2)
    assert not denoise(mixed, scheduler, normal(1, 1, 4), on_step=on_step).any()
    assert seen == [(0, 1.0), (1, 0.5)]
    scheduler.set_timesteps(2)
    mask = torch.zeros(4)
    assert not inpaint(mixed, scheduler, normal(1, 1, 4), torch.zeros(1, 1, 4), mask, on_step=on_step).any()
    assert seen[2:] == seen[:2]


@pytest.mark.parametrize("overlap", [1, 3])
def test_continuation_goes_on_after_the_end(overlap):
    audio = normal(2, 2, 7)
    source, mask = continuation(audio, 6, overlap)
    assert source.shape == (2, 2, 6)
    assert mask.sum() == overlap
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(3)
    clip = inpaint(mixed, scheduler, normal(2, 2, 6, seed=1), source, mask, generator=torch.Generator().manual_seed(0))
    longer = continued(audio, clip, overlap)
    assert longer.shape == (2, 2, 7 + 6 - overlap)
    assert torch.equal(longer[..., :7], audio)
    assert torch.equal(longer[..., 7 - overlap :], clip)
