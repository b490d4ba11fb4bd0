"""Comparisons of the diffusion process and its samplers with the reference vectors of waveform diffusion."""

import math

import torch
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, IPNDMScheduler

from lit_models.diffusion import functional
from lit_models.diffusion.functional import (
    alpha_sigma,
    crash_time,
    diffuse,
    gaussian_velocity,
    sound_and_noise,
    velocity,
    velocity_loss,
)
from lit_models.diffusion.samplers import (
    Guidance,
    Prediction,
    VDDIMScheduler,
    VDPMSolverScheduler,
    ddim_options,
    denoise,
    guide,
    heun,
    inpaint,
)
from lit_models.nn.averaging import ema_decay


def close(ours, expected, tolerance):
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=tolerance)


# -- schedule, targets, decay ------------------------------------------------------------------------------------------


def check_schedule(data):
    t = data["t"]
    alpha, sigma = alpha_sigma(t)
    close(alpha, data["alpha"], 1e-9)
    close(sigma, data["sigma"], 1e-9)
    close(functional.log_snr(t), data["log_snr"], 1e-9)
    close(functional.time_of(data["alpha"], data["sigma"]), data["t_from_alpha_sigma"], 1e-9)
    close(data["t_from_alpha_sigma"], t, 1e-9)
    close(crash_time(t), data["crash_t"], 1e-9)
    close(functional.crash_time_inverse(data["crash_t"]), t, 1e-7)
    torch.testing.assert_close(functional.edm_sigma(t), data["edm_sigma"], rtol=1e-6, atol=0.0)
    close(functional.min_snr_weight(t), data["min_snr5_weight_v"], 1e-9)


def check_v_target(data):
    x, t, noise, z = data["x"], data["t"], data["eps"], data["z"]
    close(diffuse(x, noise, t), z, 1e-6)
    close(velocity(x, noise, t), data["v"], 1e-6)
    close(0.3 * z, data["pred"], 1e-6)
    loss = velocity_loss(data["pred"], data["v"])
    close(loss.mean, data["mse_loss"], 1e-6)
    close(loss.per_clip, data["per_sample_mse"], 1e-6)
    x0, epsilon = sound_and_noise(z, data["pred"], t)
    close(x0, data["x0_from_pred"], 1e-6)
    close(epsilon, data["eps_from_pred"], 1e-6)


EMA = {
    "ema_pytorch_beta0_9999_power0_75_after1": {"warmup": "power", "delay": 1},
    "diffusers_warmup_power0_75": {"warmup": "power", "delay": 0},
    "diffusers_default": {"warmup": "ratio", "delay": 0},
}


def check_ema(data):
    assert set(data) == {"steps", *EMA}
    for name, options in EMA.items():
        for step, expected in zip(data["steps"], data[name], strict=True):
            assert math.isclose(ema_decay(step, 0.9999, **options), expected, rel_tol=0.0, abs_tol=1e-6), (name, step)


# -- samplers on normal data -------------------------------------------------------------------------------------------


def gaussian(data):
    """Predictor that knows the data to be normal."""

    def predict(z, time):
        return Prediction(gaussian_velocity(z, torch.tensor(time), data["mu"], data["s"]))

    return predict


def run(data, scheduler, steps):
    scheduler.set_timesteps(steps)
    z = data["z1"] * scheduler.init_noise_sigma
    return denoise(gaussian(data), scheduler, z)


def check_ddim(data, steps):
    states = [data["z1"]]
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(steps)
    y = denoise(gaussian(data), scheduler, data["z1"], on_step=lambda _, __, z: states.append(z))
    close(torch.stack(states), data[f"ddim_{steps}.trace"], 1e-5)
    for name in (f"ddim_{steps}.y", f"sat_ddim_{steps}.y"):
        close(y, data[name], 1e-5)
    grid = torch.tensor(scheduler.times, dtype=torch.float64)
    law = functional.gaussian_ddim(data["z1"].double(), grid, data["mu"].double(), data["s"].double())
    close(data[f"ddim_{steps}.y"].double(), law, 1e-5)
    close(run(data, VDDIMScheduler(spacing="crash"), steps), data[f"crash_ddim_{steps}.y"], 1e-5)
    # 5e-6 between v-DDIM and diffusers, and the same again between diffusers' arithmetic and itself on other machines
    theirs = DDIMScheduler(**ddim_options(1000))
    close(run(data, theirs, steps), data[f"diffusers_ddim_{steps}.y"], 1e-5)
    close(y, data[f"diffusers_ddim_{steps}.y"], 1e-5)


def check_exact(data):
    close(data["mu"] + data["s"] * data["z1"], data["exact_ode"], 1e-6)
    error = [(run(data, VDDIMScheduler(), steps) - data["exact_ode"]).abs().max() for steps in (10, 100, 1000)]
    assert error[0] > 5 * error[1] > 25 * error[2]


def check_eta(data, eta):
    scheduler = VDDIMScheduler(eta=eta)
    noises = data[f"eta{eta}_10.noise"]
    scheduler.set_timesteps(len(noises) + 1)
    z, predict = data["z1"], gaussian(data)
    for index, time in enumerate(scheduler.timesteps):
        noise = noises[index] if index < len(noises) else None
        z = scheduler.step(predict(z, float(time)).velocity, time, z, variance_noise=noise).prev_sample
    close(z, data[f"eta{eta}_10.y"], 1e-5)


def check_variation(data, info):
    scheduler = VDDIMScheduler()
    start = scheduler.add_noise(data["var.init"], data["var.noise"], torch.tensor(info["var_t0"]))
    scheduler.set_timesteps(info["var_steps"], start=info["var_t0"])
    close(denoise(gaussian(data), scheduler, start), data["var.y"], 1e-5)


def check_inpainting(data, info):
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(info["inpaint"]["steps"])
    assert len(data["inp.noise"]) == info["inpaint"]["steps"] * info["inpaint"]["resamples"]
    y = inpaint(
        gaussian(data),
        scheduler,
        data["inp.start"],
        data["inp.source"],
        data["inp.mask"],
        info["inpaint"]["resamples"],
        noises=iter(data["inp.noise"]),
    )
    close(y, data["inp.y"], 1e-5)


def check_edm(data):
    sigmas = data["kd.sigmas"].double()
    scheduler = VDPMSolverScheduler(sigma_max=80.0, sigma_min=0.02)
    steps = len(sigmas) - 1
    close(run(data, scheduler, steps), data["kd.dpmpp_2m.y"], 1e-5)
    for name in ("kd.sigmas", "diffusers_edm_dpmpp2m.sigmas"):
        ratios = functional.edm_sigma(torch.tensor(scheduler.times, dtype=torch.float64))
        torch.testing.assert_close(ratios, data[name].double(), rtol=1e-5, atol=1e-9)

    times = functional.time_of_edm_sigma(sigmas).tolist()
    start = data["z1"] * scheduler.init_noise_sigma
    euler = VDDIMScheduler()
    euler.set_timesteps(timesteps=times[:-1])
    close(denoise(gaussian(data), euler, start), data["kd.euler.y"], 1e-5)
    close(heun(gaussian(data), tuple(times), start), data["kd.heun.y"], 1e-5)

    theirs = EDMDPMSolverMultistepScheduler(
        sigma_min=0.02, sigma_max=80.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    close(run(data, theirs, steps), data["diffusers_edm_dpmpp2m.y"], 5e-5)
    close(data["kd.dpmpp_2m.y"], data["diffusers_edm_dpmpp2m.y"], 5e-4)


def check_ipndm(data):
    scheduler = IPNDMScheduler()
    steps = len(data["ipndm.timesteps"])
    close(run(data, scheduler, steps), data["ipndm.y"], 1e-5)
    close(scheduler.timesteps, data["ipndm.timesteps"], 1e-6)
    close(crash_time(1 - torch.arange(steps) / steps), data["ipndm.timesteps"], 1e-6)


# -- guidance ----------------------------------------------------------------------------------------------------------


def check_guidance(data, info):
    conditional, unconditional = data["v_cond"], data["v_uncond"]
    for scale in info["cfg"]["ws"]:
        close(guide(conditional, unconditional, scale), data[f"w{scale}"], 1e-5)
        for rescale in info["cfg"]["phis"]:
            close(guide(conditional, unconditional, scale, rescale), data[f"w{scale}_rescale{rescale}"], 1e-5)
    close(guide(conditional, unconditional, 3.0), data["sat_w3.0"], 1e-5)


def check_known_defect(data):
    """The rescaling of stable-audio-tools takes deviations over channels, which are NaN in mono."""
    conditional, guided = data["v_cond"], guide(data["v_cond"], data["v_uncond"], 3.0)
    ratio = conditional.std(1, keepdim=True) / guided.std(1, keepdim=True)
    close(guided * (0.7 * ratio + 0.3), data["sat_w3.0_phi0.7"], 1e-5)
    assert (guide(conditional, data["v_uncond"], 3.0, 0.7) - data["sat_w3.0_phi0.7"]).abs().max() > 0.1


def mixture_network(data):
    """Best velocities if the data is a mixture of normal clips, row i being told that it is of component i."""
    means, std = data["gmm_mus"], data["gmm_std"]

    def all_parts(z, t):
        z, means_ = z[:, None], means[None]
        alpha, sigma = alpha_sigma(t)
        shape = (-1, 1, 1, 1)
        v = gaussian_velocity(z, t, means_, std)
        variance = alpha.square() * std.square() + sigma.square()
        distance = (z - alpha.view(shape) * means_).square().flatten(2).sum(2)
        shares = (-0.5 * distance / variance[:, None]).softmax(1)
        return v, (shares[:, :, None, None] * v).sum(1)

    def network(z, t, branch):
        parts, mixed = all_parts(z, t)
        own = parts[torch.arange(len(z)), torch.arange(len(z)) % len(means)]
        half = len(z) // 2
        both = torch.cat([own[:half], mixed[half:]])
        return {"conditional": own, "unconditional": mixed, "both": both}[branch]

    return network


def check_mixture(data, info):
    steps = info["cfg"]["gsteps"]
    for scale in info["cfg"]["ws"]:
        for kind, plus in (("ddim", False), ("cfgpp", True)):
            scheduler = VDDIMScheduler()
            scheduler.set_timesteps(steps)
            predict = Guidance(scale=scale, plus=plus).predictor(mixture_network(data))
            close(denoise(predict, scheduler, data["gmm_z1"]), data[f"gmm_{kind}{steps}_w{scale}"], 1e-5)


# -- spectral term -----------------------------------------------------------------------------------------------------


def check_stft(inputs, expected):
    x, y = (inputs[name].transpose(0, 1) for name in ("wav_x", "wav_y"))  # auraloss takes one norm over all clips
    for name, sizes in {"mrstft_auraloss": (512, 256, 128), "stft_single_auraloss": (256,)}.items():
        assert math.isclose(functional.stft_distance(x, y, sizes).item(), expected[name], rel_tol=1e-6)


# -- all of it ---------------------------------------------------------------------------------------------------------

DDIM_STEPS = (1, 2, 5, 20, 100)
SAMPLERS = {
    **{f"ddim_{steps}": lambda data, _, steps=steps: check_ddim(data, steps) for steps in DDIM_STEPS},
    "exact": lambda data, _: check_exact(data),
    "eta0.5": lambda data, _: check_eta(data, 0.5),
    "eta1.0": lambda data, _: check_eta(data, 1.0),
    "var": check_variation,
    "inp": check_inpainting,
    "edm": lambda data, _: check_edm(data),
    "ipndm": lambda data, _: check_ipndm(data),
}
GUIDANCE = {
    "guidance": check_guidance,
    "defect": lambda data, _: check_known_defect(data),
    "mixture": check_mixture,
}
