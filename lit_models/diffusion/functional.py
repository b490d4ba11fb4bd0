"""The diffusion process on waveforms: schedule, velocities, times, and losses.

Shapes: B clips, C channels, L samples of sound. Time t runs from 0, clean sound, to 1, noise. The schedule is
variance preserving: α = cos(πt/2) and σ = sin(πt/2), noisy sound z = αx + σε, and the network predicts the velocity
v = αε - σx. Whatever the dtype of the network, all of this is float32, or float64 where the arguments are.
Sources: ERNIE-Music (arXiv 2302.04456), progressive distillation (arXiv 2202.00512) for v, min-SNR (arXiv 2303.09556).
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

TimeLaw = Literal["uniform", "crash", "logit_normal"]
TimeSequence = Literal["sobol", "stratified", "random"]
LossWeighting = Literal["none", "min_snr"]

HALF_PI = math.pi / 2
LATEST = 0.999999
"""Largest t of which σ/α is taken, since that is infinite at 1."""
SOBOL_POINTS = 2**30
"""Length of the Sobol sequence; torch's engine gives numbers far above 1 after it."""
STFT_SIZES = (512, 256, 128)
"""Window lengths of the spectral loss in samples; the hop is a quarter of each."""


def precise(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def per_clip(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1) with the dimensions of another tensor; a single value stays as it is."""
    return values.view(-1, *[1] * (like.dim() - 1)) if values.dim() else values


# -- schedule ----------------------------------------------------------------------------------------------------------


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of sound and noise.

    Args:
        t: times in [0, 1], any shape.

    Returns:
        α and σ of the same shape, float32 or float64; α² + σ² = 1.
    """
    angle = precise(t) * HALF_PI
    return angle.cos().clamp(min=0), angle.sin()  # in float32, π/2 is a little too large and its cosine negative


def time_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The time at which the shares are α and σ, or any positive multiple of them."""
    return torch.atan2(precise(sigma), precise(alpha)) / HALF_PI


def log_snr(t: Tensor, limit: float = 80.0) -> Tensor:
    """Logarithm of α²/σ², for logging and for comparisons with other schedules.

    Args:
        t: times in [0, 1], any shape.
        limit: largest absolute value returned; without it, clean sound and noise would give ±∞.
    """
    alpha, sigma = (share.clamp(min=torch.finfo(share.dtype).tiny).log() for share in alpha_sigma(t))
    return (2 * (alpha - sigma)).clamp(-limit, limit)


def edm_sigma(t: Tensor) -> Tensor:
    """Noise per unit of sound, σ/α = tan(πt/2); times above 0.999999 count as that."""
    return (precise(t).clamp(max=LATEST) * HALF_PI).tan()


def time_of_edm_sigma(ratio: Tensor) -> Tensor:
    """The time at which σ/α is `ratio`."""
    return precise(ratio).atan() / HALF_PI


def crash_time(t: Tensor) -> Tensor:
    """Time with more mass at little noise: where the noise share is sin²(πt/2).

    Args:
        t: times in [0, 1], any shape.

    Returns:
        Times in [0, 1] of the same shape; 0 and 1 stay.
    """
    sigma = (precise(t) * HALF_PI).sin().square()
    return time_of((1 - sigma.square()).clamp(min=0).sqrt(), sigma)


def crash_time_inverse(t: Tensor) -> Tensor:
    """The time that `crash_time` makes into t."""
    return (precise(t) * HALF_PI).sin().clamp(0, 1).sqrt().asin() / HALF_PI


# -- velocities --------------------------------------------------------------------------------------------------------


def diffuse(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noisy sound z = αx + σε.

    Args:
        x: (B, C, L) clean sound.
        noise: (B, C, L) standard normal.
        t: (B,) times, or () for one time.

    Returns:
        (B, C, L) float32 or float64.
    """
    alpha, sigma = (per_clip(share, x) for share in alpha_sigma(t))
    return alpha * precise(x) + sigma * precise(noise)


def velocity(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Target of the network, v = αε - σx; arguments and result as in `diffuse`."""
    alpha, sigma = (per_clip(share, x) for share in alpha_sigma(t))
    return alpha * precise(noise) - sigma * precise(x)


def sound_and_noise(z: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a velocity says is in noisy sound.

    Args:
        z: (B, C, L) noisy sound.
        v: (B, C, L) velocity, true or predicted.
        t: (B,) times, or () for one time.

    Returns:
        Clean sound αz - σv and noise σz + αv, both (B, C, L) float32 or float64.
    """
    alpha, sigma = (per_clip(share, z) for share in alpha_sigma(t))
    z, v = precise(z), precise(v)
    return alpha * z - sigma * v, sigma * z + alpha * v


def transition(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """How noise grows between two times: z_t given z_s is normal.

    Args:
        s: earlier times, below 1, any shape.
        t: later times of the same shape.

    Returns:
        Factor of z_s in the mean, and variance.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(s), alpha_sigma(t)
    factor = alpha_t / alpha_s
    return factor, (sigma_t.square() - (factor * sigma_s).square()).clamp(min=0)


def posterior(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of z_s given z_t and clean sound x, for the way back.

    Args:
        s: earlier times, below 1, any shape.
        t: later times of the same shape, above 0; 1 is fine.

    Returns:
        Factors of z_t and of x.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(s), alpha_sigma(t)
    ratio = sigma_s.square() / (alpha_s * sigma_t.square())  # in place of e^(λt-λs) αs/αt, which is 0 times ∞ at t = 1
    return alpha_t * ratio, alpha_s - alpha_t.square() * ratio


# -- data for which the best velocity is known -------------------------------------------------------------------------


def gaussian_velocity(z: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Velocity that minimises the loss if every value of the data is normal.

    A network in whose place this stands shows what a sampler does by itself.

    Args:
        z: (B, C, L) noisy sound.
        t: (B,) times, or () for one time.
        mean: of the data, broadcast to z.
        std: of the data, broadcast to z.

    Returns:
        (B, C, L).
    """
    alpha, sigma = (per_clip(share, z) for share in alpha_sigma(t))
    variance = std.square()
    pull = (precise(z) - alpha * mean) / (alpha.square() * variance + sigma.square())
    return alpha * sigma * pull - sigma * (mean + alpha * variance * pull)


def gaussian_ddim(noise: Tensor, times: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Where deterministic v-DDIM ends exactly, with the velocities of `gaussian_velocity`.

    The mean is exact for any number of steps, and the deviation is too small by the product of the cosines of the
    angles stepped; with infinitely many steps the result is mean + std · noise.

    Args:
        noise: (B, C, L) start at time 1.
        times: (n+1,) grid from 1 to 0.
        mean: of the data, broadcast to the noise.
        std: of the data, broadcast to the noise.

    Returns:
        (B, C, L).
    """
    alpha, sigma = (share.view(-1, *[1] * std.dim()) for share in alpha_sigma(times))
    angles = torch.atan2(sigma.expand(-1, *std.shape), std * alpha)
    return mean + noise * std * angles.diff(dim=0).cos().prod(0)


# -- times of training -------------------------------------------------------------------------------------------------


def time_from_uniform(u: Tensor, law: TimeLaw = "uniform", mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Make uniform numbers into times of another law, keeping their order and how evenly they are spread.

    Args:
        u: numbers in [0, 1], any shape.
        law: "uniform"; "crash", more mass at little noise; "logit_normal", the sigmoid of a normal number.
        mean: of that normal number.
        std: of that normal number.

    Returns:
        Times in [0, 1] of the same shape.
    """
    if law == "uniform":
        return precise(u)
    if law == "crash":
        return crash_time(u)
    margin = 2.0**-32  # the normal numbers of 0 and 1 are infinite
    normal = torch.special.ndtri(u.double().clamp(margin, 1 - margin))
    return torch.sigmoid(mean + std * normal).to(precise(u).dtype)


def time_grid(count: int) -> Tensor:
    """Times of validation, (i + 1/2)/count, (count,) float32: the same in every run, so that losses compare."""
    return (torch.arange(count) + 0.5) / count


class TimeSampler:
    """Times of training steps, with a state of one number that a checkpoint can hold.

    The state holds no seed, so that all ranks can restore the state of one rank and go on with their own seeds. That
    needs batches of one size on all ranks.

    Args:
        law: see `time_from_uniform`.
        sequence: "sobol" spreads the times of successive steps evenly over [0, 1]; "stratified" those of one step, as
            (u + i/B) mod 1; "random" draws them independently.
        mean: of the logit-normal law.
        std: of the logit-normal law.
        seed: must differ between ranks, or they all draw the same times.

    Raises:
        ValueError: if a choice is unknown or `std` is not positive.
    """

    def __init__(
        self,
        law: TimeLaw = "uniform",
        sequence: TimeSequence = "sobol",
        mean: float = 0.0,
        std: float = 1.0,
        seed: int = 0,
    ) -> None:
        for key, value, choices in (("law", law, TimeLaw), ("sequence", sequence, TimeSequence)):
            if value not in get_args(choices):
                raise ValueError(f"{key}: {value!r} is unknown; choose one of {', '.join(get_args(choices))}.")
        if std <= 0:
            raise ValueError(f"std: {std} is not positive; give the logit-normal law a spread such as 1.0.")
        self.law, self.sequence, self.mean, self.std, self.seed = law, sequence, mean, std, seed
        self.drawn = 0
        self._engine = SobolEngine(1, scramble=True, seed=seed) if sequence == "sobol" else None

    def __call__(self, batch_size: int, device: torch.device | str | None = None) -> Tensor:
        """Draw the times of one step, (B,) float32."""
        if self._engine is not None:
            if self.drawn + batch_size > SOBOL_POINTS:
                self._engine.reset()
                self.drawn = 0
            uniform = self._engine.draw(batch_size)[:, 0]
        else:
            generator = np.random.default_rng((self.seed, self.drawn))  # keyed, hence no state of its own
            if self.sequence == "stratified":
                uniform = torch.from_numpy((generator.random() + np.arange(batch_size) / batch_size) % 1)
            else:
                uniform = torch.from_numpy(generator.random(batch_size))
        self.drawn += batch_size
        return time_from_uniform(uniform.float(), self.law, self.mean, self.std).to(device)

    def state_dict(self) -> dict[str, Any]:
        """How many times were drawn since the sequence began."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler of the same arguments was."""
        self.drawn = int(state["drawn"])
        if self._engine is not None:
            self._engine.reset()
            self._engine.fast_forward(self.drawn)


# -- amplitude ---------------------------------------------------------------------------------------------------------


def unit_scale(waveforms: Tensor, valid: Tensor | None = None) -> float:
    """The `data_scale` that gives sound a deviation of 1, as the schedule assumes.

    Args:
        waveforms: (B, C, L) of training.
        valid: mask of the samples that count, broadcast to the waveforms; None for all.

    Returns:
        1 / deviation around 0; sound at its usual level, a deviation between 0.05 and 0.3, gives 3 to 20.

    Raises:
        ValueError: if the sound is silent.
    """
    power = waveforms.double().square()
    if valid is not None:
        power = power[valid.bool().expand_as(power)]
    deviation = power.mean().sqrt().item() if power.numel() else 0.0
    if deviation == 0:
        raise ValueError("data_scale: the training clips are silent; give audible clips, or set data_scale yourself.")
    return 1 / deviation


# -- losses ------------------------------------------------------------------------------------------------------------


class VelocityLoss(NamedTuple):
    """The loss of a batch, which can still be averaged over several batches or ranks.

    Args:
        total: weighted sum of the squared errors that count, () float32.
        number: number of values that count, () float32.
        per_clip: mean squared error of each clip without weight, (B,) float32; 0 where nothing counts.
    """

    total: Tensor
    number: Tensor
    per_clip: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss; 0 where nothing counts."""
        return self.total / self.number.clamp(min=1)


def valid_mask(valid_length: Tensor, length: int) -> Tensor:
    """Samples before the padding of each clip.

    Args:
        valid_length: (B,) int64.
        length: L.

    Returns:
        (B, 1, L) bool.
    """
    return (torch.arange(length, device=valid_length.device) < valid_length[:, None])[:, None]


def min_snr_weight(t: Tensor, limit: float = 5.0) -> Tensor:
    """Weight of the squared error of velocities, min(SNR, limit) / (SNR + 1).

    Args:
        t: times in [0, 1], any shape.
        limit: signal-to-noise ratio above which clean sound counts no more.
    """
    alpha, sigma = alpha_sigma(t)
    return torch.minimum(alpha.square(), limit * sigma.square())  # the same, since SNR + 1 = 1/σ²


def velocity_loss(
    prediction: Tensor,
    target: Tensor,
    t: Tensor | None = None,
    weighting: LossWeighting = "none",
    mask: Tensor | None = None,
    snr_limit: float = 5.0,
) -> VelocityLoss:
    """Squared error of velocities, which is that of clean sound times its SNR plus 1, without dividing by σ.

    Args:
        prediction: (B, C, L) in any floating dtype.
        target: (B, C, L), see `velocity`.
        t: (B,) times, for the weights.
        weighting: "none", or "min_snr".
        mask: samples that count, broadcast to the target; None for all, padding included.
        snr_limit: see `min_snr_weight`.

    Returns:
        Sum, number of values, and loss per clip.

    Raises:
        ValueError: if weights are asked for without times.
    """
    differences = (precise(prediction) - precise(target)).flatten(1)
    if mask is None:
        number = torch.full_like(differences[:, 0], differences.shape[1])
    else:
        counted = mask.bool().expand_as(target).flatten(1)
        differences = torch.where(counted, differences, 0.0)  # no product, since what does not count may be infinite
        number = counted.sum(1).to(differences.dtype)
    sums = differences.square().sum(1)
    total = sums.sum()
    if weighting == "min_snr":
        if t is None:
            raise ValueError('loss_weighting: "min_snr" needs times; pass t, or set loss_weighting to "none".')
        total = (sums * min_snr_weight(t, snr_limit)).sum()
    return VelocityLoss(total, number.sum(), sums / number.clamp(min=1))


def loss_by_time(per_clip_loss: Tensor, t: Tensor, bins: int = 4) -> tuple[Tensor, Tensor]:
    """Losses of equal parts of [0, 1], which show how noisy the sound is that a network fails on.

    Args:
        per_clip_loss: (B,), see `VelocityLoss`.
        t: (B,) times.
        bins: number of parts; 4 for quartiles.

    Returns:
        Sum of losses and number of clips, both (bins,) float32, so that means can be taken over much data.
    """
    index = (t * bins).long().clamp(0, bins - 1)
    zeros = torch.zeros(bins, device=t.device, dtype=per_clip_loss.dtype)
    return zeros.index_add(0, index, per_clip_loss), zeros.index_add(0, index, torch.ones_like(per_clip_loss))


def stft_distance(prediction: Tensor, target: Tensor, sizes: tuple[int, ...] = STFT_SIZES) -> Tensor:
    """Distance of spectra: relative error of magnitudes plus mean error of their logarithms, over several windows.

    Args:
        prediction: (B, C, L) in any floating dtype.
        target: (B, C, L); its spectra are those that errors are relative to.
        sizes: window lengths in samples; the hop is a quarter.

    Returns:
        (B,) float32, the mean over windows. Derivatives are finite for silence too.

    Raises:
        ValueError: if half a window is as long as the clips, or longer.
    """
    if prediction.shape[-1] <= max(sizes) // 2:
        length = prediction.shape[-1]
        raise ValueError(f"stft_sizes: {max(sizes)} is too long for clips of {length} samples; use shorter windows.")

    def magnitude(sound: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size, device=sound.device)
        spectra = torch.stft(sound.float().flatten(0, 1), size, size // 4, window=window, return_complex=True)
        power = torch.view_as_real(spectra).square().sum(-1)
        return power.clamp(min=1e-8).sqrt().unflatten(0, sound.shape[:2]).flatten(1)  # B, values of all channels

    distances = []
    for size in sizes:
        ours, theirs = magnitude(prediction, size), magnitude(target, size)
        convergence = (theirs - ours).norm(dim=1) / theirs.norm(dim=1)
        distances.append(convergence + (ours.log() - theirs.log()).abs().mean(1))
    return torch.stack(distances).mean(0)


def stft_loss(x0: Tensor, x: Tensor, t: Tensor, sizes: tuple[int, ...] = STFT_SIZES) -> Tensor:
    """Spectral term on the clean sound that a velocity implies, weighted by α² since it is a guess under much noise.

    Args:
        x0: (B, C, L) predicted clean sound, see `sound_and_noise`.
        x: (B, C, L) clean sound.
        t: (B,) times.
        sizes: see `stft_distance`.

    Returns:
        () float32, the mean over clips.
    """
    return (alpha_sigma(t)[0].square() * stft_distance(x0, x, sizes)).mean()
