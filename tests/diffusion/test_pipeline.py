import json
import math
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, EDMDPMSolverMultistepScheduler, UNet1DModel
from torch import nn

from lit_models.diffusion import functional, samplers
from lit_models.diffusion.modeling import WaveformUNet1DModel
from lit_models.diffusion.pipeline import TextToWaveformPipeline
from lit_models.diffusion.samplers import Guidance, VDDIMScheduler, VDPMSolverScheduler, ddim_options
from lit_models.diffusion.text import SmallText, TextStates, load_text_encoder, word_tokenizer

PROMPTS = ["a reel", "a slow waltz on the harp in a low register", ""]
SMALL = {
    "sample_size": 256,
    "sample_rate": 1000,
    "in_channels": 1,
    "channels": [16, 32, 32],
    "patch": 2,
    "rep": 1,
    "attn_from_level": 3,
    "data_scale": 4.0,
}
TEXT = {"text_dim": 64, "fuse": "concat", "adaln": True, "adaln_dim": 16}
DANCE = {
    "sample_size": 256,
    "sample_rate": 1000,
    "in_channels": 2,
    "out_channels": 2,
    "extra_in_channels": 16,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 16,
    "flip_sin_to_cos": False,
    "use_timestep_embedding": False,
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"],
    "up_block_types": ["AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"],
}


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def unet(**options):
    """Small network whose every part matters."""
    torch.manual_seed(1)
    network = WaveformUNet1DModel(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(network=None, scheduler=None, text=True, **options):
    """Pipeline with a small T5 that reads bytes."""
    torch.manual_seed(2)
    parts = SmallText("byt5").build() if text else (None, None)
    if network is None:
        network = unet(**TEXT) if text else unet()
    return quiet(TextToWaveformPipeline(network, scheduler or VDDIMScheduler(), *parts, **options))


@pytest.fixture(scope="module")
def pipeline():
    return make()


def run(pipeline, *args, seed=0, steps=4, **options):
    options.setdefault("generator", seeded(seed))
    return pipeline(*args, num_inference_steps=steps, output_type="pt", **options).audios


class Gaussian(nn.Module):
    """In place of a network: the best velocity for normal data, whose mean may be told by a text."""

    def __init__(self, mean, std, channels=1, length=8, data_scale=1.0, reads_text=False):
        super().__init__()
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)
        self.uses_vector = reads_text
        self.null_vector = torch.zeros(64) if reads_text else None
        self.config = types.SimpleNamespace(
            in_channels=channels, sample_size=length, sample_rate=1000, data_scale=data_scale
        )

    def forward(self, sample, timestep, text_vector=None):
        mean = self.mean
        if text_vector is not None:
            mean = text_vector[:, None, : sample.shape[-1]]
        return types.SimpleNamespace(sample=functional.gaussian_velocity(sample, timestep, mean, self.std))


# -- the sampler law (acceptance experiment A) -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
def test_normal_data_ends_where_the_law_says(steps):
    mean, std = normal(2, 8), normal(2, 8, seed=1).abs() + 0.1
    law = make(Gaussian(mean, std, channels=2), text=False)
    z = normal(16, 2, 8, seed=2)
    audios = run(law, steps=steps, latents=z, clip=False)
    angles = [torch.atan2(*reversed(functional.alpha_sigma(torch.tensor(1 - k / steps)))) for k in range(steps + 1)]
    assert angles[0] == pytest.approx(math.pi / 2)
    phi = [torch.atan2(angle.sin(), std * angle.cos()) for angle in angles]
    shrink = torch.stack([(a - b).cos() for a, b in pairwise(phi)]).prod(0)
    torch.testing.assert_close(audios, mean + z * std * shrink, rtol=0, atol=1e-5)


def test_deviation_after_fifty_steps():
    audios = run(make(Gaussian(0.0, 1.0, length=1), text=False), num_waveforms_per_prompt=4096, steps=50, clip=False)
    assert audios.shape == (4096, 1, 1)
    assert audios.std().item() == pytest.approx(0.9756, abs=0.01)
    assert audios.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_each_prompt_has_its_mean(steps):
    law = make(Gaussian(0.0, 1e-6, length=32, reads_text=True))
    audios = run(law, PROMPTS, guidance_scale=1.0, steps=steps, clip=False)
    means = law.encode_prompt(PROMPTS).vector[:, None, :32]
    assert (means[0] - means[1]).abs().max() > 0.1
    torch.testing.assert_close(audios, means, rtol=0, atol=1e-5)


def test_guidance_extrapolates_means():
    law = make(Gaussian(0.0, 1.0, length=32, reads_text=True))
    z = normal(2, 1, 32, seed=3)
    texts = law.encode_prompt(PROMPTS[:2]).vector[:, None, :32]
    plain = run(law, latents=z, steps=20, clip=False)
    audios = run(law, PROMPTS[:2], latents=z, guidance_scale=2.5, steps=20, clip=False)
    torch.testing.assert_close(audios, plain + 2.5 * texts, rtol=0, atol=1e-4)
    other = run(law, PROMPTS[:2], "harp", latents=z, guidance_scale=2.5, steps=20, clip=False)
    harp = law.encode_prompt("harp").vector[:, None, :32]
    torch.testing.assert_close(other, plain + harp + 2.5 * (texts - harp), rtol=0, atol=1e-4)


def test_data_scale_divides_and_sound_is_clipped():
    mean = torch.tensor([-8.0, -2.0, 0.0, 2.0, 8.0])
    law = make(Gaussian(mean, 1e-6, length=5, data_scale=4.0), text=False)
    clipped = run(law)[0, 0]
    torch.testing.assert_close(clipped, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(run(law, clip=False)[0, 0], mean / 4, rtol=0, atol=1e-5)


# -- texts -------------------------------------------------------------------------------------------------------------


def by_hand(pipeline, states, z, guidance, steps, negative=None):
    """The same with the network alone: a forward pass per branch, nothing kept between steps."""
    network = pipeline.unet

    def predict(z, time):
        t = torch.full((len(z),), time)
        conditional = network(z, t, states.vector, states.states, states.mask).sample
        if negative is None:
            unconditional = network(z, t).sample
        else:
            unconditional = network(z, t, negative.vector, negative.states, negative.mask).sample
        scale = guidance.scale_at(time)
        guided = unconditional + scale * (conditional - unconditional)
        if guidance.rescale and scale not in (0, 1):
            std = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
            guided = (guidance.rescale * std + 1 - guidance.rescale)[:, None, None] * guided
        return samplers.Prediction(guided, unconditional if guidance.is_plus_at(time) else None)

    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(steps)
    return samplers.denoise(predict, scheduler, z) / network.config.data_scale


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 3.0},
        {"scale": 1.0},
        {"scale": 0.0},
        {"scale": 4.0, "rescale": 0.7},
        {"scale": 4.0, "interval": (0.3, 0.9)},
        {"scale": 0.6, "plus": True},
    ],
)
@pytest.mark.parametrize(
    "negative", [None, "noise and a very long text about nothing at all", ["noise", "x", "silence"]]
)
def test_guidance_is_that_of_single_forward_passes(pipeline, options, negative):
    z = normal(3, 1, 256, seed=4)
    names = {"scale": "guidance_scale", "plus": "guidance_plus", "rescale": "guidance_rescale"}
    named = {names.get(key, f"guidance_{key}"): value for key, value in options.items()}
    audios = run(pipeline, PROMPTS, negative, latents=z, clip=False, **named)
    states = pipeline.encode_prompt(PROMPTS)
    if negative is not None:
        negative = pipeline.encode_prompt([negative] * 3 if isinstance(negative, str) else negative)
    expected = by_hand(pipeline, states, z, Guidance(**options), 4, negative)
    torch.testing.assert_close(audios, expected, rtol=1e-4, atol=1e-5)


def test_each_waveform_is_the_one_its_prompt_and_generator_give_alone(pipeline):
    together = run(pipeline, PROMPTS, num_waveforms_per_prompt=2, generator=seeded(*range(6)), audio_length_in_s=0.1)
    assert together.shape == (6, 1, 100)
    for number in range(6):
        alone = run(pipeline, PROMPTS[number // 2], generator=seeded(number), audio_length_in_s=0.1)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01
    texts = run(pipeline, PROMPTS[:2], generator=seeded(0, 0))
    assert (texts[0] - texts[1]).abs().max() > 0.01


def test_fresh_noise_of_a_sampler_keeps_to_its_generator():
    ancestral = make(scheduler=VDDIMScheduler(eta=1.0))
    together = run(ancestral, PROMPTS, generator=seeded(5, 6, 7))
    for number in range(3):
        alone = run(ancestral, PROMPTS[number], seed=5 + number)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-5)


def test_a_generator_alone_decides(pipeline):
    state = torch.get_rng_state()
    one, other = (run(pipeline, PROMPTS[0], seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, run(pipeline, PROMPTS[0], seed=4))


def test_texts_are_encoded_and_turned_into_keys_once(pipeline):
    calls = {"encoder": 0, "keys": 0, "unet": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    layers = [module.text_to_kv for module in pipeline.unet.modules() if hasattr(module, "text_to_kv")]
    hooks = [layer.register_forward_hook(count("keys")) for layer in layers]
    hooks += [pipeline.text_encoder.register_forward_hook(count("encoder"))]
    hooks += [pipeline.unet.register_forward_hook(count("unet"))]
    run(pipeline, PROMPTS, steps=6)
    for hook in hooks:
        hook.remove()
    assert len(layers) == 2
    assert calls == {"encoder": 1, "keys": 2, "unet": 6}


def test_states_in_place_of_prompts(pipeline):
    states, negative = pipeline.encode_prompt(PROMPTS), pipeline.encode_prompt("noise")
    assert isinstance(states, TextStates)
    expected = run(pipeline, PROMPTS, "noise", generator=seeded(0, 1, 2))
    bare = quiet(TextToWaveformPipeline(pipeline.unet, VDDIMScheduler()))
    options = {"text_states": states, "negative_text_states": negative, "generator": seeded(0, 1, 2)}
    assert torch.equal(run(bare, **options), expected)


def test_classes_by_their_vectors():
    classes = make(unet(text_dim=5, text_attention=False), text=False)
    vectors = torch.eye(5)[:3]
    audios = run(classes, text_vector=vectors, generator=seeded(7, 7, 7))
    assert audios.shape == (3, 1, 256)
    assert (audios[0] - audios[1]).abs().max() > 1e-3
    states = TextStates(vectors, torch.zeros(3, 1, 5), torch.zeros(3, 1).bool())
    assert torch.equal(run(classes, text_states=states, generator=seeded(7, 7, 7)), audios)
    z = normal(3, 1, 256)
    guided = run(classes, text_vector=vectors, negative_text_vector=torch.eye(5)[4:], latents=z, clip=False)
    network = classes.unet

    def predict(z, time):
        t = torch.full((3,), time)
        plus, minus = (network(z, t, vector).sample for vector in (vectors, torch.eye(5)[4:].expand(3, -1)))
        return samplers.Prediction(minus + 3 * (plus - minus))

    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(4)
    expected = samplers.denoise(predict, scheduler, z).detach() / 4
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


def test_networks_that_read_only_tokens_or_only_the_vector():
    for options in ({"fuse": "none"}, {"text_attention": False}):
        partly = make(unet(**{**TEXT, "adaln": False, **options}))
        texts = run(partly, PROMPTS[:2], generator=seeded(0, 0))
        assert (texts[0] - texts[1]).abs().max() > 1e-4


def test_without_a_prompt_the_null_condition_is_sampled(pipeline):
    z = normal(1, 1, 256)
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(4)

    def predict(z, time):
        return samplers.Prediction(pipeline.unet(z, time).sample)

    with torch.no_grad():
        expected = samplers.denoise(predict, scheduler, z) / 4
    for scale in (0.0, 1.0, 3.0):
        audios = run(pipeline, latents=z, guidance_scale=scale, clip=False)
        torch.testing.assert_close(audios, expected, rtol=1e-5, atol=1e-6)
    # A prompt that scale 0 ignores is none.
    ignored = run(pipeline, PROMPTS[0], latents=z, guidance_scale=0.0, clip=False)
    torch.testing.assert_close(ignored, expected, rtol=1e-5, atol=1e-6)
    assert (run(pipeline, "", latents=z, guidance_scale=1.0, clip=False) - expected).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:max_tokens")
def test_an_encoder_in_training_mode_has_no_dropout():
    torch.manual_seed(0)
    noisy = quiet(
        TextToWaveformPipeline(unet(**TEXT), VDDIMScheduler(), *SmallText("byt5", dropout=0.5).build(), "mean", 20)
    )
    assert torch.equal(run(noisy, PROMPTS), run(noisy, PROMPTS))
    assert noisy.text_encoder.training


def test_rescaled_guidance_is_finite_for_mono_and_as_loud_as_without(pipeline):
    z = normal(1, 1, 256)
    one_step = {"steps": 1, "latents": z, "clip": False}
    conditional = run(pipeline, PROMPTS[0], guidance_scale=1.0, **one_step)
    loud = run(pipeline, PROMPTS[0], guidance_scale=9.0, **one_step)
    rescaled = run(pipeline, PROMPTS[0], guidance_scale=9.0, guidance_rescale=1.0, **one_step)
    assert rescaled.isfinite().all()
    assert loud.std() > conditional.std()
    assert rescaled.std().item() == pytest.approx(conditional.std().item(), rel=1e-3)


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 255, 257, 1000])
def test_any_length(pipeline, length):
    audios = run(pipeline, PROMPTS[:2], audio_length_in_s=length / 1000)
    assert audios.shape == (2, 1, length)
    assert audios.isfinite().all()
    assert audios.abs().max() <= 1


def test_the_usual_length_and_types(pipeline):
    output = pipeline(PROMPTS[0], num_inference_steps=1, generator=seeded(0))
    assert isinstance(output.audios, np.ndarray)
    assert (output.audios.shape, output.audios.dtype) == ((1, 1, 256), np.float32)
    (audios,) = pipeline(PROMPTS[0], num_inference_steps=1, generator=seeded(0), return_dict=False)
    np.testing.assert_array_equal(audios, output.audios)
    np.testing.assert_array_equal(run(pipeline, PROMPTS[0], steps=1).numpy(), audios)


def test_what_the_network_needs_beyond_the_end_is_noise_too(pipeline):
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = normal(2, 1, 250)
    one = run(pipeline, latents=z, steps=1)
    hook.remove()
    assert seen[0].shape == (2, 1, 256)
    assert torch.equal(seen[0][..., :250], z)
    assert 0.2 < seen[0][..., 250:].std() < 3
    assert torch.equal(one, run(pipeline, latents=z, steps=1, seed=9))


def test_latents_may_have_the_length_that_the_network_needs(pipeline):
    z = normal(2, 1, 256)
    exact, longer = (run(pipeline, PROMPTS[:2], latents=z, audio_length_in_s=s, clip=False) for s in (0.256, 0.25))
    assert longer.shape == (2, 1, 250)
    torch.testing.assert_close(longer, exact[..., :250], rtol=0, atol=1e-6)


def test_the_default_dtype_does_not_matter(pipeline):
    expected = run(pipeline, PROMPTS, "noise", audio_length_in_s=0.25)
    keep = torch.arange(250) < 100
    kept = run(pipeline, PROMPTS[0], init_audio=tone(250), mask=keep)
    sound = tone(250)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(run(pipeline, PROMPTS, "noise", audio_length_in_s=0.25), expected)
        assert torch.equal(run(pipeline, PROMPTS[0], init_audio=sound, mask=keep), kept)
    finally:
        torch.set_default_dtype(torch.float32)


def test_latents_decide_the_number_and_the_length(pipeline):
    z = normal(4, 1, 120)
    assert run(pipeline, latents=z).shape == (4, 1, 120)
    assert run(pipeline, PROMPTS[0], latents=z).shape == (4, 1, 120)
    assert run(pipeline, PROMPTS[:2], latents=z, num_waveforms_per_prompt=2).shape == (4, 1, 120)
    assert torch.equal(run(pipeline, PROMPTS[0], latents=z[:1]), run(pipeline, PROMPTS[0], latents=z[:1], seed=5))
    own = torch.randn(1, 1, 120, generator=seeded(8))
    drawn = run(pipeline, PROMPTS[0], seed=8, audio_length_in_s=0.12)
    assert torch.equal(run(pipeline, PROMPTS[0], latents=own), drawn)


# -- sound that exists already -----------------------------------------------------------------------------------------


def tone(length=256, channels=1):
    return 0.2 * torch.sin(torch.arange(length) * 0.3).expand(channels, -1).contiguous()


def test_variation_starts_from_noisy_sound(pipeline):
    x, noise = tone()[None], normal(1, 1, 256)
    varied = run(pipeline, PROMPTS[0], init_audio=x, strength=0.4, latents=noise, guidance_scale=1.0, clip=False)
    scheduler = VDDIMScheduler()
    scheduler.set_timesteps(4, start=0.4)
    states = pipeline.encode_prompt(PROMPTS[0])

    def predict(z, time):
        return samplers.Prediction(pipeline.unet(z, time, states.vector, states.states, states.mask).sample)

    with torch.no_grad():
        expected = samplers.denoise(predict, scheduler, functional.diffuse(4 * x, noise, torch.tensor(0.4))) / 4
    torch.testing.assert_close(varied, expected, rtol=1e-5, atol=1e-6)


def test_weak_variations_stay_close():
    law = make(Gaussian(0.0, 1.0, length=4096), text=False)
    x = normal(1, 4096, seed=9)
    near, half, far = (
        (run(law, init_audio=x, strength=strength, steps=20, clip=False) * x).mean() / x.square().mean()
        for strength in (0.1, None, 1.0)
    )
    assert near > 0.95
    assert half == pytest.approx(math.cos(math.pi / 4), abs=0.05)  # the default
    assert abs(far) < 0.05


def test_variations_of_several_sounds(pipeline):
    sounds = torch.stack([tone(), -tone()])
    both = run(pipeline, PROMPTS[:2], init_audio=sounds, num_waveforms_per_prompt=2, generator=seeded(0, 1, 2, 3))
    for number in range(4):
        alone = run(pipeline, PROMPTS[number // 2], init_audio=sounds[number // 2], generator=seeded(number))
        torch.testing.assert_close(both[number : number + 1], alone, rtol=0, atol=1e-5)
    assert run(pipeline, PROMPTS, init_audio=tone()[0].numpy()).shape == (3, 1, 256)
    assert run(pipeline, init_audio=sounds).shape == (2, 1, 256)
    assert run(pipeline, PROMPTS[0], init_audio=tone(), audio_length_in_s=0.3).shape == (1, 1, 300)
    assert run(pipeline, PROMPTS[0], init_audio=tone(), audio_length_in_s=0.1).shape == (1, 1, 100)


@pytest.mark.parametrize("shape", [(250,), (1, 250), (1, 1, 250), (2, 1, 250)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_true_keeps_sound_and_false_makes_it(pipeline, shape, kind):
    keep = torch.zeros(250, dtype=kind)
    keep[:100] = keep[200:] = 1
    x = tone(250)
    made = run(pipeline, PROMPTS[:2], init_audio=x, mask=keep.expand(shape), steps=6)
    assert made.shape == (2, 1, 250)
    assert torch.equal(made[..., keep.bool()], x[:, keep.bool()].expand(2, 1, -1))
    assert (made[..., ~keep.bool()] - x[:, ~keep.bool()]).abs().mean() > 0.05


def test_masks_of_single_channels_and_clips(pipeline):
    stereo = make(unet(in_channels=2), text=False)
    keep = torch.zeros(2, 256).bool()
    keep[0] = True
    made = run(stereo, init_audio=tone(channels=2), mask=keep.numpy(), resamples=2)
    assert torch.equal(made[0, 0], tone()[0])
    assert (made[0, 1] - tone()[0]).abs().mean() > 0.05
    each = torch.zeros(2, 1, 256).bool()
    each[1] = True
    made = run(pipeline, PROMPTS[:2], init_audio=tone(), mask=each, num_waveforms_per_prompt=2)
    assert torch.equal(made[2:], tone().expand(2, 1, -1))
    assert (made[:2] - tone()).abs().mean() > 0.05


def test_a_gap_is_filled_to_fit():
    """Data whose values are all equal: the rest of a clip follows from what is kept."""

    class Constant(Gaussian):
        def forward(self, sample, timestep):
            mean = sample.mean(-1, keepdim=True)  # that of a level with deviation 1 and of noise that averages out
            alpha, sigma = (functional.per_clip(share, sample) for share in functional.alpha_sigma(timestep))
            level = alpha * mean / (alpha.square() + sigma.square() / sample.shape[-1])
            clean = level.expand_as(sample)
            noise = (sample - alpha * clean) / sigma
            return types.SimpleNamespace(sample=alpha * noise - sigma * clean)

    filler = make(Constant(0.0, 1.0, length=512), text=False)
    keep = torch.arange(512) < 400
    made = run(filler, init_audio=torch.full((512,), 0.6), mask=keep, steps=50)
    assert made[0, 0, 400:].mean().item() == pytest.approx(0.6, abs=0.1)


def test_a_mask_may_start_from_noisy_sound(pipeline):
    keep = torch.arange(256) < 128
    x = tone()
    weak, full = (
        run(pipeline, PROMPTS[0], init_audio=x, mask=keep, strength=strength, guidance_scale=1.0)
        for strength in (0.05, None)
    )
    assert (weak - x).abs().mean() < (full - x).abs().mean() / 2


def test_sound_is_extended_beyond_its_end(pipeline):
    keep = torch.ones(256).bool()
    made = run(pipeline, PROMPTS[0], init_audio=tone(), mask=keep, audio_length_in_s=0.4)
    assert made.shape == (1, 1, 400)
    assert torch.equal(made[..., :256], tone()[None])
    assert made[..., 256:].abs().mean() > 0.01


def test_sound_is_continued(pipeline):
    x = tone(700)
    options = {"num_inference_steps": 3, "generator": seeded(0)}
    longer = pipeline.continue_audio(x, PROMPTS[0], **options).audios
    assert isinstance(longer, np.ndarray)
    assert longer.shape == (1, 1, 700 + 128)  # half of 256 samples is new
    np.testing.assert_array_equal(longer[0, :, :700], x.numpy())
    assert np.abs(longer[..., 700:]).mean() > 0.01
    several = pipeline.continue_audio(
        x, PROMPTS, audio_length_in_s=0.2, overlap_in_s=0.05, output_type="pt", num_inference_steps=3
    ).audios
    assert several.shape == (3, 1, 700 + 150)
    assert pipeline.continue_audio(tone(10), PROMPTS[0], **options).audios.shape == (1, 1, 256)
    with pytest.raises(ValueError, match="overlap: 300 samples are not between 1 and 255"):
        pipeline.continue_audio(x, PROMPTS[0], overlap_in_s=0.3)


# -- samplers and networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps", "error"),
    [
        (DDIMScheduler(**ddim_options(1000)), 200, 2e-3),
        (VDPMSolverScheduler(), 30, 0.03),
        (
            EDMDPMSolverMultistepScheduler(
                sigma_min=0.02,
                sigma_max=80,
                sigma_data=1.0,
                sigma_schedule="exponential",
                prediction_type="v_prediction",
            ),
            30,
            0.03,
        ),
    ],
)
def test_samplers_of_all_kinds_agree(scheduler, steps, error):
    mean, std = 0.3 * normal(1, 8), normal(1, 8, seed=1).abs() / 4 + 0.1
    z = normal(8, 1, 8, seed=2)
    law = make(Gaussian(mean, std), scheduler, text=False)
    audios = run(law, latents=z, steps=steps, clip=False)
    reference = mean + std * z
    if isinstance(scheduler, DDIMScheduler):
        reference = functional.gaussian_ddim(z, torch.tensor([1 - k / steps for k in range(steps + 1)]), mean, std)
    torch.testing.assert_close(audios, reference, rtol=0, atol=error)


def test_guidance_with_the_solver_of_second_order():
    second = make(scheduler=VDPMSolverScheduler())
    audios = run(second, PROMPTS, steps=5)
    assert audios.isfinite().all()
    with pytest.raises(ValueError, match=r"CFG"):
        run(second, PROMPTS, guidance_plus=True)
    assert run(second, PROMPTS[0], init_audio=tone(), strength=0.3).isfinite().all()


@pytest.mark.parametrize("length", [256, 8, 1, 77])
def test_the_network_of_dance_diffusion(length, tmp_path):
    torch.manual_seed(0)
    dance = make(UNet1DModel(**DANCE).eval(), text=False)
    audios = run(dance, num_waveforms_per_prompt=2, audio_length_in_s=length / 1000)
    assert audios.shape == (2, 2, length)
    assert audios.isfinite().all()
    with pytest.raises(ValueError, match="prompt: the network was made without a text"):
        run(dance, "a reel")
    if length == 256:
        dance.save_pretrained(tmp_path)
        loaded = quiet(TextToWaveformPipeline.from_pretrained(tmp_path))
        assert loaded.text_encoder is None
        assert torch.equal(run(loaded, seed=3), run(dance, seed=3))
        assert run(dance.to(torch.bfloat16)).dtype == torch.float32


def test_bfloat16_networks_sample_in_float32(pipeline):
    exact = run(pipeline, PROMPTS, generator=seeded(0, 1, 2))
    half = make(unet(**TEXT).to(torch.bfloat16))
    half.text_encoder.to(torch.bfloat16)
    seen = []
    audios = run(
        half,
        PROMPTS,
        "noise",
        generator=seeded(0, 1, 2),
        callback_on_step_end=lambda pipe, index, time, tensors: seen.append(tensors["latents"].dtype),
    )
    assert seen == [torch.float32] * 4
    assert audios.dtype == torch.float32
    assert audios.isfinite().all()
    close = run(half, PROMPTS, generator=seeded(0, 1, 2), guidance_scale=1.0)
    exact = run(pipeline, PROMPTS, generator=seeded(0, 1, 2), guidance_scale=1.0)
    assert (close - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_under_autocast_the_sound_is_float32(pipeline):
    with torch.autocast("cpu", torch.bfloat16):
        audios = run(pipeline, PROMPTS)
    assert audios.dtype == torch.float32
    assert audios.isfinite().all()


def test_callbacks_see_and_may_change_each_step(pipeline):
    seen = []

    def look(pipe, index, time, tensors):
        assert pipe is pipeline
        seen.append((index, round(time, 4), tuple(tensors["latents"].shape)))

    plain = run(pipeline, PROMPTS[0], audio_length_in_s=0.25)
    watched = run(pipeline, PROMPTS[0], audio_length_in_s=0.25, callback_on_step_end=look)
    assert torch.equal(plain, watched)
    assert seen == [(0, 1.0, (1, 1, 256)), (1, 0.75, (1, 1, 256)), (2, 0.5, (1, 1, 256)), (3, 0.25, (1, 1, 256))]

    def silence(pipe, index, time, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not run(pipeline, PROMPTS[0], callback_on_step_end=silence).any()
    keep = torch.arange(256) < 100
    kept = run(pipeline, PROMPTS[0], init_audio=tone(), mask=keep, callback_on_step_end=silence)
    assert torch.equal(kept[0, :, :100], tone()[:, :100])
    assert not kept[0, :, 100:].any()


# -- saving ------------------------------------------------------------------------------------------------------------


def texts_of(kind, folder):
    if kind == "bytes":
        return SmallText("byt5").build()
    if kind == "words":
        word_tokenizer(PROMPTS, min_count=1).save_pretrained(folder)
        return SmallText(str(folder)).build()
    word_tokenizer(PROMPTS, min_count=1).save_pretrained(folder)
    sizes = {"d_model": 64, "vocab_size": 32, "pad_token_id": 0, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    transformers.BartModel(transformers.BartConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    return load_text_encoder(str(folder))


@pytest.mark.parametrize("kind", ["bytes", "words", "bart"])
def test_saved_pipelines_give_the_same_bits(kind, tmp_path):
    torch.manual_seed(0)
    encoder, tokenizer = texts_of(kind, tmp_path / "text")
    options = {"pooling": "mean", "max_tokens": 9}
    first = quiet(TextToWaveformPipeline(unet(**TEXT), VDDIMScheduler(eta=0.3), encoder.eval(), tokenizer, **options))
    first.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    assert {"unet", "scheduler", "text_encoder", "tokenizer"} <= set(index)
    second = quiet(TextToWaveformPipeline.from_pretrained(tmp_path / "pipeline"))
    assert (second.config.pooling, second.config.max_tokens, second.scheduler.eta) == ("mean", 9, 0.3)
    assert type(second.text_encoder) is type(encoder)
    assert (second.sample_rate, second.data_scale, second.channels) == (1000, 4.0, 1)
    for length in (0.256, 0.1):
        one, other = (
            run(pipe, PROMPTS, "noise", generator=seeded(3, 4, 5), audio_length_in_s=length) for pipe in (first, second)
        )
        assert torch.equal(one, other)
    encoder, tokenizer = load_text_encoder(str(tmp_path / "pipeline"))
    torch.testing.assert_close(
        encoder(torch.tensor([[3, 4, 5]])).last_hidden_state,
        first.text_encoder(torch.tensor([[3, 4, 5]])).last_hidden_state,
    )


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")  # its name in earlier releases of diffusers
def test_pipelines_load_in_bfloat16(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    half = quiet(TextToWaveformPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert half.unet.down_levels[0].blocks[0].conv_1.weight.dtype == torch.bfloat16
    assert half.unet.time_features.weight.dtype == torch.float32
    assert run(half, PROMPTS).isfinite().all()


def test_the_general_class_of_diffusers_does_not_know_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="TextToWaveformPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert "DiffusionPipeline.from_pretrained" in TextToWaveformPipeline.__doc__


# -- errors ------------------------------------------------------------------------------------------------------------

NAN = tone()
NAN[0, 3] = torch.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "mp3"}, "output_type: 'mp3' is unknown"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0"),
        ({"num_waveforms_per_prompt": 0}, "num_waveforms_per_prompt: 0"),
        ({"audio_length_in_s": -1.0}, r"audio_length_in_s: -1\.0 is not a length"),
        ({"audio_length_in_s": math.nan}, "audio_length_in_s: nan is not a length"),
        ({"audio_length_in_s": 1e-5}, "audio_length_in_s: 1e-05 s are less than one sample"),
        ({"guidance_scale": math.nan}, "guidance_scale: nan"),
        ({"guidance_rescale": 2.0}, r"guidance_rescale: 2\.0"),
        ({"guidance_interval": (0.9, 0.1)}, r"guidance_interval: \(0\.9, 0\.1\)"),
        ({"generator": seeded(0, 1)}, "generator: 2 generators do not fit 1"),
        ({"strength": 0.5}, "strength: there is no sound"),
        ({"mask": torch.ones(256)}, "mask: there is no sound"),
        ({"init_audio": tone(), "strength": 0.0}, r"strength: 0\.0 is not in"),
        ({"init_audio": tone(), "strength": 1.5}, r"strength: 1\.5 is not in"),
        ({"init_audio": NAN}, "init_audio: it holds NaN"),
        ({"init_audio": tone(channels=2)}, "init_audio: it has 2 channels .* the network makes 1"),
        ({"init_audio": torch.zeros(0)}, r"init_audio: shape \(0,\)"),
        ({"init_audio": torch.zeros(1, 1, 1, 9)}, "init_audio: shape"),
        ({"init_audio": torch.zeros(256, dtype=torch.int16)}, r"init_audio: values of type torch\.int16"),
        ({"init_audio": tone(), "mask": torch.ones(255)}, r"mask: shape \(255,\) does not fit audio of 256"),
        ({"init_audio": tone(), "mask": torch.ones(2, 256)}, "mask: shape"),
        ({"init_audio": tone(), "mask": torch.full((256,), 0.5)}, "mask: values are neither true nor false"),
        ({"init_audio": tone(), "mask": torch.ones(256), "resamples": 0}, "resamples: 0"),
        ({"prompt": PROMPTS, "init_audio": tone()[None].expand(2, -1, -1)}, "init_audio: 2 of them do not fit 3"),
        ({"prompt": PROMPTS, "negative_prompt": ["a", "b"]}, "negative_prompt: 2 of them do not fit 3 of prompt"),
        ({"latents": torch.zeros(1, 2, 256)}, "latents: shape"),
        ({"prompt": PROMPTS, "latents": torch.zeros(2, 1, 256)}, "latents: shape"),
        ({"latents": torch.zeros(1, 1, 99), "audio_length_in_s": 0.1}, "latents: shape"),
        ({"prompt": []}, "prompt: .* is not a text"),
        ({"prompt": 7}, "prompt: 7 is not a text"),
        ({"prompt": [None]}, "prompt: .* is not a text"),
        ({"prompt": "a", "text_vector": torch.zeros(1, 64)}, "prompt: prompt and text_vector say the same"),
        ({"text_vector": torch.zeros(1, 63)}, "text_vector: the text has width 63 but the network reads 64"),
        ({"text_vector": torch.zeros(64)}, r"text_vector: shape \(64,\)"),
    ],
)
def test_errors_name_the_argument(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_errors_of_networks_without_text():
    silent = make(text=False)
    with pytest.raises(ValueError, match="prompt: the network was made without a text"):
        silent("a reel")
    with pytest.raises(ValueError, match="negative_prompt: the network was made without a text"):
        silent(negative_prompt="a reel")
    with pytest.raises(ValueError, match="text_vector: the network reads no vector"):
        make(unet(text_dim=64, fuse="none"))(text_vector=torch.zeros(1, 64))
    with pytest.raises(ValueError, match="prompt: the pipeline has no text encoder"):
        make(unet(**TEXT), text=False)("a reel")


def test_errors_of_the_pipeline_itself():
    encoder, tokenizer = SmallText("byt5").build()
    with pytest.raises(ValueError, match="text_encoder: an encoder and its tokenizer"):
        TextToWaveformPipeline(unet(), VDDIMScheduler(), encoder)
    with pytest.raises(ValueError, match="pooling: 'last'"):
        TextToWaveformPipeline(unet(), VDDIMScheduler(), encoder, tokenizer, "last")
    with pytest.raises(ValueError, match="max_tokens: 0"):
        TextToWaveformPipeline(unet(), VDDIMScheduler(), encoder, tokenizer, "mean", 0)
    stereo = make(unet(in_channels=2), text=False)
    with pytest.raises(ValueError, match=r"init_audio: it has 1 channels .* the network makes 2"):
        stereo(init_audio=tone())
    for scheduler in (VDPMSolverScheduler(), DDIMScheduler(**ddim_options())):
        with pytest.raises(ValueError, match=f"mask: {type(scheduler).__name__} cannot keep sound"):
            make(scheduler=scheduler)(init_audio=tone(), mask=torch.ones(256))
    with pytest.raises(ValueError, match="strength: DDIMScheduler cannot start from sound"):
        make(scheduler=DDIMScheduler(**ddim_options()))(init_audio=tone())
    with pytest.raises(ValueError, match=r"eta: 0\.5 is not possible where sound is to stay"):
        make(scheduler=VDDIMScheduler(eta=0.5))(init_audio=tone(), mask=torch.ones(256))
    network = UNet1DModel(**{**DANCE, "sample_rate": None})
    with pytest.raises(ValueError, match="audio_length_in_s: the network's configuration has no sample_rate"):
        make(network, text=False)(audio_length_in_s=1.0)
