"""Training, evaluation and sampling of text-to-waveform diffusion under the Trainer."""

import copy
import dataclasses
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMA, RNGState
from lit_models.base import LitBase
from lit_models.diffusion import draws, functional
from lit_models.diffusion.evaluation import Evaluation
from lit_models.diffusion.module import LitWaveform
from lit_models.diffusion.network import NetworkInput, forward_flops
from lit_models.diffusion.options import Sampling, Times, WaveformLoss
from lit_models.diffusion.pipeline import TextToWaveformPipeline
from lit_models.diffusion.recipes import PretrainedWaveform, UnconditionalUNet1D, WaveformUNet
from lit_models.diffusion.samplers import Guidance
from lit_models.diffusion.text import PretrainedText, SmallText, TextStates, encode, tokenize
from tests.callbacks.tiny import ResumableLoader

SGD = partial(torch.optim.SGD, lr=0.1)
RATE, LENGTH, SEED = 1000, 96, 7
UNET = WaveformUNet(
    sample_size=LENGTH,
    sample_rate=RATE,
    in_channels=1,
    channels=[8, 16],
    patch=2,
    rep=1,
    attn_from_level=2,
    head_dim=8,
    data_scale=2.0,
)
TEXT = SmallText("byt5", d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=16, max_tokens=64)
TEXTS = ["a flute", "a low harp, slow", "", "reel", "a violin at night", "x", "two", "the last of the eight"]


def batch(rows=4, first=0, channels=1, length=LENGTH, **more):
    """Tones of different pitch whose ends are silent."""
    numbers = torch.arange(first, first + rows)
    times = torch.arange(length) / RATE
    valid = length - 7 * (numbers % 5)
    sound = (
        torch.sin(2 * torch.pi * (40 + 15 * numbers[:, None]) * times)
        * 0.5
        * functional.valid_mask(valid, length)[:, 0]
    )
    return {
        "audio": sound[:, None].repeat(1, channels, 1),
        "text": [TEXTS[number % len(TEXTS)] for number in numbers.tolist()],
        "valid_length": valid,
        "index": numbers,
        "columns": {"name": [f"clip {number}" for number in numbers.tolist()]},
        **more,
    }


def loader(batches):
    return DataLoader(batches, batch_size=None)


def joined(batches):
    """Batches one after the other."""
    whole = {name: torch.cat([rows[name] for rows in batches]) for name in ("audio", "valid_length", "index")}
    return whole | {"text": [text for rows in batches for text in rows["text"]]}


class ByRank(torch.utils.data.Dataset):
    """Every W-th row of each batch, as the samplers of the data modules divide them."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return {
            name: value[rank::world]
            for name, value in self.batches[number].items()
            if isinstance(value, (Tensor, list))
        }


class Recorder(Callback):
    """What is logged, and what the network is given."""

    def __init__(self):
        self.values, self.inputs = [], []

    def on_train_start(self, trainer, module):
        # As a hook that copies, since a batch is not kept.
        module.net.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def losses(self):
        return [values["train/loss"] for values in self.values]


def build(text=TEXT, backbone=UNET, configured=True, **options):
    torch.manual_seed(5)
    options = {
        "train_text_encoder": text is not None,
        "text_lr_scale": 1.0,
        "p_uncond": 0.25,
        "seed": SEED,
        "optimizer": SGD,
        "sampler": Sampling(steps=2),
        **options,
    }
    module = LitWaveform(backbone, text, **options)
    if configured:
        module.configure_model()
    return module


def noised(rows, module, use=draws.TRAIN, before=0, t=None):
    """What the network is given for the samples of a batch, and the target, from their definition."""
    x = rows["audio"] * module.data_scale
    numbers = list(range(before, before + len(x)))
    t = module.times.sampler(module.seed)(before + len(x))[before:] if t is None else t
    noise = []
    for number in numbers:
        generator = np.random.default_rng((module.seed, use, number))
        generator.random()
        noise.append(torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(generator.integers(2**63)))))
    noise = torch.stack(noise)
    return functional.diffuse(x, noise, t), t, functional.velocity(x, noise, t)


def dropped(module, numbers):
    return torch.tensor([np.random.default_rng((module.seed, 0, n)).random() < module.p_uncond for n in numbers])


def tokens(module, rows):
    return tokenize(module.tokenizer, rows["text"], module.text.max_tokens)


def errors(net, module, rows, drop=None, **options):
    """Squared errors of all values, with the given rows without a text, and velocities with times."""
    z, t, v = noised(rows, module, **options)
    predicted = net(NetworkInput(z, t, tokens(module, rows), drop=drop))
    return (predicted - v).square(), predicted, (z, t, v)


def assert_same_weights(module, reference, tolerance=1e-6):
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=tolerance, msg=name)


# -- draws ------------------------------------------------------------------------------------------------------------


def test_draws_of_a_sample_follow_from_its_number_alone():
    numbers = draws.sample_numbers(10, 4, rank=1, world=3)
    assert numbers == [11, 14, 17, 20]
    some, all_ = draws.draw(3, draws.TRAIN, numbers), draws.draw(3, draws.TRAIN, list(range(30)))
    assert some.seeds == [all_.seeds[number] for number in numbers]
    assert torch.equal(some.uniform, all_.uniform[numbers])
    noise = draws.normal_noise(some.seeds, (2, 5))
    assert torch.equal(noise[2], draws.normal_noise(some.seeds[2:3], (2, 5))[0])
    assert noise.dtype == torch.float32
    others = [draws.draw(3, draws.VALIDATE, numbers).seeds, draws.draw(4, draws.TRAIN, numbers).seeds]
    assert not set(some.seeds) & {*others[0], *others[1]}
    assert abs(float(draws.normal_noise(all_.seeds, (100,)).std()) - 1) < 0.05


def test_times_of_evaluation_are_the_grid_and_spread_at_once():
    times = draws.evaluation_times(list(range(128)))
    assert torch.equal(times[:64].sort().values, functional.time_grid(64))
    assert torch.equal(times[:64], times[64:])
    for count in (4, 8, 16):
        assert torch.bincount((times[:count] * 4).long()).tolist() == [count // 4] * 4


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_step_minimises_the_error_of_the_velocity_with_some_texts_taken_away(quiet_trainer):
    module, recorder = build(), Recorder()
    reference = copy.deepcopy(module.net)
    rows = [batch(8), batch(8, 8)]
    assert module.step_stats() == {}
    assert module.step_flops() is None
    quiet_trainer(max_steps=2, callbacks=[recorder]).fit(module, loader(rows))
    seen = []
    for number, part in enumerate(rows):
        drop = dropped(module, range(8 * number, 8 * number + 8))
        seen.append(int(drop.sum()))
        squares, _, (z, t, _) = errors(reference, module, part, drop, before=8 * number)
        loss = squares.mean()
        assert recorder.losses[number] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert torch.equal(recorder.inputs[number].z, z)
        assert torch.equal(recorder.inputs[number].t, t)
        optimizer = SGD(reference.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 < sum(seen) < 16
    assert_same_weights(module, reference)
    assert recorder.values[0].keys() == {"train/loss"}
    assert module.step_stats() == {"examples": 8.0, "audio_seconds": 8 * LENGTH / RATE}
    assert module.step_flops() == 24 * forward_flops(module.net.unet, LENGTH) > 0


def test_a_dropped_text_changes_nothing(quiet_trainer):
    changed = batch(8) | {"text": ["something else"] * 8}
    losses = []
    for p_uncond, rows in ((1.0, batch(8)), (1.0, changed), (0.0, batch(8)), (0.0, changed)):
        module, recorder = build(p_uncond=p_uncond), Recorder()
        before = copy.deepcopy(module.net)
        quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
        losses += recorder.losses
        moved = not torch.equal(module.net.unet.null_vector, before.unet.null_vector)
        assert moved == (p_uncond == 1)
        weight = "text_encoder.shared.weight"
        assert torch.equal(module.net.get_parameter(weight), before.get_parameter(weight)) == (p_uncond == 1)
    assert losses[0] == losses[1]
    assert losses[2] != losses[3]


def spectral(predicted, z, t, rows, module, mask):
    """The spectral term per clip, from its definition."""
    alpha, sigma = functional.alpha_sigma(t)
    clean = alpha[:, None, None] * z - sigma[:, None, None] * predicted
    x = rows["audio"] * module.data_scale
    return alpha**2 * functional.stft_distance(clean * mask, x * mask, module.loss.stft_sizes)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("weighting", "stft"), [("none", 0.0), ("min_snr", 0.0), ("none", 0.5), ("min_snr", 0.25)])
def test_options_of_the_loss(weighting, stft, mask, quiet_trainer):
    module, recorder = build(loss=WaveformLoss(weighting, stft=stft, stft_sizes=(32, 16), mask=mask)), Recorder()
    reference, rows = copy.deepcopy(module.net), batch(8)
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    squares, predicted, (z, t, _) = errors(reference, module, rows, dropped(module, range(8)))
    counted = (
        functional.valid_mask(rows["valid_length"], LENGTH) if mask else torch.ones(8, 1, LENGTH, dtype=torch.bool)
    )
    snr = (1 / torch.tan(torch.pi / 2 * t)) ** 2
    weights = snr.clamp(max=5) / (snr + 1) if weighting == "min_snr" else torch.ones(8)
    plain = (squares * counted).sum((1, 2))
    counts = counted.sum((1, 2))
    expected = (weights * plain).sum() / counts.sum()
    if stft:
        expected = expected + stft * (spectral(predicted, z, t, rows, module, counted) * counts).sum() / counts.sum()
    assert recorder.losses[0] == pytest.approx(float(expected.detach()), rel=1e-4)
    mse = recorder.values[0].get("train/mse")
    assert (mse is None) == (weighting == "none" and not stft)
    assert mse is None or mse == pytest.approx(float((plain.sum() / counts.sum()).detach()), rel=1e-5)


def test_padding_is_not_looked_at_with_a_mask(quiet_trainer):
    loud = batch(8)
    beyond = ~functional.valid_mask(loud["valid_length"], LENGTH)
    loud["audio"] = torch.where(beyond, 3.0, loud["audio"])
    losses = {}
    for name, rows in (("plain", batch(8)), ("loud", loud)):
        for mask in (True, False):
            module = build(loss=WaveformLoss(mask=mask, stft=0.1, stft_sizes=(32,)))
            x, counted = rows["audio"], functional.valid_mask(rows["valid_length"], LENGTH) if mask else None
            z = t = torch.full((8,), 0.5)
            z = torch.zeros_like(x)
            total, number, _ = module._sums(z, z, z, x, t, counted)
            losses[name, mask] = float(total / number)
    assert losses["plain", True] == pytest.approx(losses["loud", True], rel=1e-6)
    assert losses["plain", False] != pytest.approx(losses["loud", False], rel=1e-2)


@pytest.mark.parametrize("loss", [WaveformLoss(), WaveformLoss("min_snr", stft=0.1, stft_sizes=(32,), mask=True)])
def test_accumulated_batches_train_as_one(loss, quiet_trainer):
    module, reference = build(loss=loss), build(loss=loss)
    parts = [batch(2), batch(2, 2), batch(2, 4), batch(2, 6)]
    quiet_trainer(max_steps=2, accumulate_grad_batches=2).fit(module, loader(parts))
    quiet_trainer(max_steps=2).fit(reference, loader([joined(parts[:2]), joined(parts[2:])]))
    assert_same_weights(module, reference.net)


@pytest.mark.parametrize("loss", [WaveformLoss(), WaveformLoss("min_snr", stft=0.1, stft_sizes=(32,), mask=True)])
def test_two_ranks_train_and_validate_as_one(loss, quiet_trainer):
    module, reference = build(loss=loss), build(loss=loss)
    rows, evaluated = [batch(8, 8 * n) for n in range(6)], [batch(8, 3), batch(8, 11)]
    common = {"max_epochs": 1, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    for each in (module, reference):  # as callbacks.EMA does, but in this process, which gets the forks' weights
        each.enable_ema(0.5)
    trainer = quiet_trainer(**common, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    trainer.fit(module, loader(ByRank(rows)), loader(ByRank(evaluated)))
    single = quiet_trainer(**common)
    single.fit(reference, loader(rows), loader(evaluated))
    assert_same_weights(module, reference.net, 1e-5)
    assert trainer.callback_metrics.keys() == single.callback_metrics.keys()
    for key, value in single.callback_metrics.items():
        assert float(trainer.callback_metrics[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


class Times_(Callback):
    """Gathers the times of all ranks."""

    def on_train_start(self, trainer, module):
        self.recorder = Recorder()
        self.recorder.on_train_start(trainer, module)

    def on_train_end(self, trainer, module):
        times = torch.stack([inputs.t for inputs in self.recorder.inputs])
        drops = torch.stack([inputs.drop for inputs in self.recorder.inputs]).float()
        everywhere = trainer.strategy.all_gather(torch.stack([times, drops]))
        module.seen = everywhere
        assert not torch.equal(everywhere[0, 0], everywhere[1, 0])
        order = everywhere[:, 0].permute(1, 2, 0).flatten()
        assert torch.equal(order, Times().sampler(SEED)(24))
        drop = torch.tensor([np.random.default_rng((SEED, 0, n)).random() < 0.25 for n in range(24)]).float()
        assert torch.equal(everywhere[:, 1].permute(1, 2, 0).flatten(), drop)


def test_ranks_take_turns_in_one_sequence_of_times(quiet_trainer):
    trainer = quiet_trainer(
        max_epochs=1, devices=2, strategy="ddp_fork", use_distributed_sampler=False, callbacks=[Times_()]
    )
    trainer.fit(build(), loader(ByRank([batch(8, 8 * n) for n in range(3)])))


@pytest.mark.parametrize("sequence", ["stratified", "random"])
@pytest.mark.parametrize("law", ["crash", "logit_normal"])
def test_other_times(sequence, law, quiet_trainer):
    recorder, times = Recorder(), Times(law, sequence, mean=-1.0, std=0.5)
    quiet_trainer(max_steps=2, callbacks=[recorder]).fit(build(times=times), loader([batch(8), batch(8, 8)]))
    sampler = functional.TimeSampler(law, sequence, -1.0, 0.5, SEED)
    for inputs in recorder.inputs:
        assert torch.equal(inputs.t, sampler(8))


def test_two_ranks_train_although_no_text_is_ever_taken_away(quiet_trainer):
    """The null vector gets a gradient of zero, without which the strategy would wait for ever."""
    module = build(p_uncond=0.0, sampler=Sampling(guidance=Guidance(1.0)))
    trainer = quiet_trainer(max_steps=2, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    trainer.fit(module, loader(ByRank([batch(8), batch(8, 8)])))
    assert not module.net.unet.null_vector.any()


def test_guidance_without_dropped_texts_gives_a_warning():
    with pytest.warns(UserWarning, match=r"model\.p_uncond: it is 0, .*guidance\.scale to 1"):
        build(p_uncond=0.0)


def test_text_encoder_has_a_learning_rate_of_its_own():
    module = build(text_lr_scale=0.1, optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1))
    groups = {group["name"]: group for group in module.configure_optimizers().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "model": 2e-3,
        "model_no_decay": 2e-3,
        "text": pytest.approx(2e-4),
        "text_no_decay": pytest.approx(2e-4),
    }
    assert groups["text_no_decay"]["weight_decay"] == 0.0
    grouped = {id(parameter) for group in groups.values() for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in module.net.parameters()}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision, quiet_trainer):
    recorder, exact = Recorder(), Recorder()
    options = {"loss": WaveformLoss(stft=0.1, stft_sizes=(32,), mask=True), "evaluation": Evaluation()}
    module = build(**options)
    trainer = quiet_trainer(max_steps=3, precision=precision, callbacks=[recorder, EMA(0.5)], num_sanity_val_steps=0)
    rows = [batch(8, 8 * n) for n in range(3)]
    trainer.fit(module, loader(rows), loader(rows[:1]))
    quiet_trainer(max_steps=3, callbacks=[exact]).fit(build(**options), loader(rows))
    for inputs, precise in zip(recorder.inputs[:3], exact.inputs, strict=True):
        assert inputs.z.dtype == inputs.t.dtype == torch.float32
        assert torch.equal(inputs.t, precise.t)
        torch.testing.assert_close(inputs.z, precise.z, rtol=0, atol=0.0 if precision == "bf16-mixed" else 2e-2)
    np.testing.assert_allclose(recorder.losses, exact.losses, rtol=0.05)
    assert all(value.dtype == torch.float32 for value in trainer.callback_metrics.values())
    trainer.test(module, loader(rows[:1]), verbose=False)
    made = trainer.predict(module, loader(rows[:1]))[0]["audio"]
    assert made.dtype == torch.float32
    assert all(clip.dtype == np.float32 for clip, _ in module.sounds().values())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_evaluates_and_samples(quiet_trainer, tmp_path):
    module = build(loss=WaveformLoss(stft=0.1, stft_sizes=(32,), mask=True), evaluation=Evaluation(kad=True))
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "num_sanity_val_steps": 0, "callbacks": [EMA(0.5)]}
    trainer = quiet_trainer(max_steps=3, **options)
    rows = [batch(8, 8 * n, length=2 * LENGTH) for n in range(3)]
    trainer.fit(module, loader(rows), loader(rows[:1]))
    assert trainer.test(module, loader(rows[:1]), verbose=False)[0]["test/kad"] is not None
    assert trainer.predict(module, loader([{"text": ["x"], "seconds": [0.05]}]))[0]["audio"].shape == (1, 1, 50)
    made = module.to("cuda").generate(["a flute"], seeds=[3])
    assert torch.equal(made, module.generate(["a flute"], seeds=[3]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert LitWaveform.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu").generate(["x"]).isfinite().all()


def test_the_loss_falls_on_one_clip(quiet_trainer):
    recorder = Recorder()
    module = build(
        p_uncond=0.0, optimizer=partial(torch.optim.AdamW, lr=1e-2), sampler=Sampling(steps=20, guidance=Guidance(1.0))
    )
    rows = batch(1) | {"valid_length": torch.tensor([LENGTH])}
    many = {
        name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in rows.items() if isinstance(value, Tensor)
    }
    quiet_trainer(max_steps=80, callbacks=[recorder]).fit(module, loader([many | {"text": rows["text"] * 8}] * 80))
    assert np.mean(recorder.losses[:3]) > 0.5
    assert np.mean(recorder.losses[-20:]) < 0.25
    made = module.generate(rows["text"], LENGTH, [3])[0, 0]
    assert float(torch.corrcoef(torch.stack([made, rows["audio"][0, 0]]))[0, 1]) > 0.8


# -- other conditions -------------------------------------------------------------------------------------------------


def test_vectors_in_place_of_texts(quiet_trainer):
    backbone = dataclasses.replace(UNET, text_dim=3, text_attention=False)
    rows = batch(8, embedding=torch.eye(3)[torch.arange(8) % 3])
    module, recorder = build(None, backbone), Recorder()
    reference = copy.deepcopy(module.net)
    trainer = quiet_trainer(max_steps=1, callbacks=[recorder])
    trainer.fit(module, loader([rows]), loader([rows]))
    z, t, v = noised(rows, module)
    predicted = reference(NetworkInput(z, t, vector=rows["embedding"], drop=dropped(module, range(8))))
    assert recorder.losses[0] == pytest.approx(float((predicted - v).square().mean()), rel=1e-5)
    made = trainer.predict(module, loader([{"embedding": torch.eye(3)}]))[0]
    assert made["audio"].shape == (3, 1, LENGTH)
    assert made["text"] == [""] * 3
    assert not torch.equal(made["audio"][0], made["audio"][1])
    assert set(module.sounds()) == {f"{kind}/{n}" for kind in ("real", "generated") for n in range(4)}


@pytest.mark.parametrize(
    "backbone", [UNET, UnconditionalUNet1D(LENGTH, RATE, 1, channels=[32, 32], attn_from_level=2, time_dim=4)]
)
def test_without_texts(backbone, quiet_trainer):
    module, recorder = build(None, backbone), Recorder()
    reference = copy.deepcopy(module.net.unet)
    rows = batch(4, length=90)  # a length that diffusers' network cannot take
    trainer = quiet_trainer(max_steps=1, callbacks=[recorder])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader([rows]), loader([rows]))
    unread = [str(item.message) for item in caught if "model.text: the batches hold texts" in str(item.message)]
    assert len(unread) == (backbone is UNET)
    z, t, v = noised(rows, module)
    fitted = torch.nn.functional.pad(z, (0, 2))
    predicted = reference(fitted if backbone is not UNET else z, t).sample[..., :90]
    assert recorder.losses[0] == pytest.approx(float((predicted - v).square().mean()), rel=1e-5)
    assert trainer.predict(module, loader([rows]))[0]["audio"].shape == (4, 1, 90)
    module.export_pretrained(trainer.default_root_dir)
    loaded = TextToWaveformPipeline.from_pretrained(trainer.default_root_dir + "/model")
    generators = draws.generators([1, 2])
    audio = loaded(
        num_waveforms_per_prompt=2, num_inference_steps=2, generator=generators, clip=False, output_type="pt"
    ).audios
    assert torch.equal(audio, module.generate(seeds=[1, 2]))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Folder with a text encoder that has a class token and a pooler."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS for word in text.replace(",", "").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return PretrainedText(str(folder))


def test_frozen_text_encoder_is_asked_once_and_not_saved(frozen, quiet_trainer, tmp_path):
    module, recorder = build(frozen, train_text_encoder=False), Recorder()
    reference, encoder = copy.deepcopy(module.net), module.text_encoder
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(encoder.state_dict())
    trainer = quiet_trainer(max_steps=3, callbacks=[recorder])
    trainer.fit(module, loader([batch(8)] * 3))
    assert len(calls) == 8
    assert not encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    rows = batch(8)
    z, t, v = noised(rows, module)
    with torch.no_grad():
        states = encode(encoder, tokenize(module.tokenizer, rows["text"], 128), "first")
    predicted = reference(NetworkInput(z, t, states=states, drop=dropped(module, range(8))))
    assert recorder.losses[0] == pytest.approx(float((predicted - v).square().mean()), rel=1e-5)

    path = tmp_path / "lean.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"net"}
    assert not any("text_encoder" in name for name in saved)
    loaded = LitBase.load_from_checkpoint(path)
    pipeline = loaded.pipeline()
    assert pipeline.config.pooling == "first"
    audio = pipeline(
        rows["text"], num_inference_steps=2, generator=draws.generators(range(8)), clip=False, output_type="pt"
    ).audios
    torch.testing.assert_close(audio, module.generate(rows["text"]), rtol=0, atol=1e-4)


def test_a_text_gives_the_same_states_whatever_it_comes_with(frozen):
    module, other = (build(frozen, train_text_encoder=False) for _ in range(2))
    alone = module.encode(["a flute"])
    together = other.encode(["the last of the eight", "a flute", ""])
    assert torch.equal(alone.vector[0], together.vector[1])
    assert torch.equal(alone.states[0], together.states[1, : alone.mask.shape[1]])
    assert together.mask.sum(1).tolist() == [7, 4, 2]
    assert isinstance(module.encode(["x"]), TextStates)


def test_states_on_disk_serve_other_runs(frozen, tmp_path):
    first, second = (build(frozen, train_text_encoder=False, text_cache_dir=str(tmp_path)) for _ in range(2))
    states = first.encode(TEXTS)
    second.text_encoder.register_forward_hook(lambda *_: pytest.fail("encoded again"))
    assert all(torch.equal(one, two) for one, two in zip(states, second.encode(TEXTS), strict=True))


def test_pretrained_text_encoder_trains_along_on_two_ranks(frozen, quiet_trainer):
    """No part of it is left without a gradient, which the strategy would refuse."""
    module = build(frozen)
    trainer = quiet_trainer(max_steps=2, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    before = copy.deepcopy(module.net.state_dict())
    trainer.fit(module, loader(ByRank([batch(8), batch(8, 8)])))
    moved = {name for name, value in module.net.state_dict().items() if not torch.equal(value, before[name])}
    assert "text_encoder.embeddings.word_embeddings.weight" in moved
    assert not any("pooler" in name for name in moved)


def test_frozen_random_encoder_is_part_of_the_checkpoint(quiet_trainer, tmp_path):
    module = build(train_text_encoder=False)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader([batch()]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitWaveform.load_from_checkpoint(tmp_path / "a.ckpt")
    for name, value in module.text_encoder.state_dict().items():
        assert torch.equal(loaded.text_encoder.state_dict()[name], value)
    assert torch.equal(loaded.generate(["x"]), module.generate(["x"]))


# -- evaluation -------------------------------------------------------------------------------------------------------


def validate(trainer, module, batches):
    return trainer.validate(module, loader(batches), verbose=False)[0]


@pytest.mark.parametrize("mask", [False, True])
def test_validation_looks_at_fixed_times_with_fixed_noise(mask, quiet_trainer):
    module = build(loss=WaveformLoss("min_snr", mask=mask))
    module.net.eval()
    rows = joined([batch(8), batch(8, 8), batch(1, 16)])
    t = draws.evaluation_times(list(range(17)))
    with torch.no_grad():
        squares, _, _ = errors(module.net, module, rows, t=t, use=draws.VALIDATE)
    counted = functional.valid_mask(rows["valid_length"], LENGTH) if mask else torch.ones_like(squares)
    sums, counts = (squares * counted).sum((1, 2)), counted.expand_as(squares).sum((1, 2))
    expected = {"val/loss": float(sums.sum() / counts.sum())}
    for part in range(4):
        chosen = (t * 4).long() == part
        expected[f"val/loss_t{part}"] = float((sums / counts)[chosen].mean())
    trainer = quiet_trainer()
    assert validate(trainer, module, [rows]) == pytest.approx(expected, rel=1e-5)
    parts = [batch(4, 4 * n) for n in range(4)] + [batch(1, 16)]
    assert validate(trainer, module, parts) == pytest.approx(expected, rel=1e-5)


def test_clips_of_padding_alone_count_nothing(quiet_trainer):
    module, rows = build(loss=WaveformLoss(mask=True)), batch(8)
    silent = rows | {"valid_length": torch.zeros(8, dtype=torch.long)}
    values = validate(quiet_trainer(), module, [silent])
    assert values == {"val/loss": 0.0}
    quiet_trainer(max_steps=1).fit(module, loader([silent]))
    assert all(parameter.isfinite().all() for parameter in module.net.parameters())


def test_averaged_weights_are_validated_sampled_and_exported(quiet_trainer, tmp_path):
    module = build(text=TEXT)
    start = copy.deepcopy(module.net)
    trainer = quiet_trainer(max_steps=3, callbacks=[EMA(0.9)], num_sanity_val_steps=0)
    rows = [batch(8, 8 * n) for n in range(3)]
    trainer.fit(module, loader(rows), loader(rows[:1]))
    assert module.ema.text_encoder is not None
    averaged, online = module.ema, module.net
    for name, parameter in averaged.named_parameters():
        assert not parameter.requires_grad
        between = (parameter - start.get_parameter(name)).norm() <= (
            online.get_parameter(name) - start.get_parameter(name)
        ).norm()
        assert between, name
    values = {"": averaged, "online_": online.eval()}
    for prefix, net in values.items():
        with torch.no_grad():
            squares, _, _ = errors(net, module, rows[0], t=draws.evaluation_times(list(range(8))), use=draws.VALIDATE)
        assert float(trainer.callback_metrics[f"val/{prefix}loss"]) == pytest.approx(float(squares.mean()), rel=1e-5)
    assert module.pipeline().unet is averaged.unet
    assert module.pipeline().text_encoder is averaged.text_encoder
    assert module.pipeline("online").unet is online.unet
    audio = module.generate(["a flute"], seeds=[4])
    loaded = TextToWaveformPipeline.from_pretrained(module.export_pretrained(tmp_path)["model"])
    for name, value in averaged.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
    again = loaded(
        "a flute", num_inference_steps=2, generator=draws.generators([4]), clip=False, output_type="pt"
    ).audios
    assert torch.equal(again, audio)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "TextToWaveformPipeline.from_pretrained" in card


def test_test_measures_what_is_generated_for_its_texts(quiet_trainer):
    seen = []
    module = build(evaluation=Evaluation(fad=True, samples_per_prompt=2, limit=6, steps=1, guidance=1.0))
    update = module.metrics.update
    module.metrics.update = lambda *args, **options: (seen.append((args, options)), update(*args, **options))
    trainer = quiet_trainer()
    rows = [batch(4, length=2 * LENGTH), batch(4, 4, length=2 * LENGTH)]
    values = trainer.test(module, loader(rows), verbose=False)[0]
    assert {"test/loss", "test/fad", "test/clips"} <= values.keys()
    assert values["test/clips"] == 12
    assert [len(args[0]) for args, _ in seen] == [8, 4]
    (generated, real, valid, columns), options = seen[1]
    assert torch.equal(real, rows[1]["audio"][:2])
    assert valid.tolist() == rows[1]["valid_length"][:2].tolist()
    assert columns == {"name": ["clip 4", "clip 5"]}
    assert options["text"] == rows[1]["text"][:2]
    seeds = draws.draw(SEED, draws.TEST, [8, 9, 10, 11]).seeds
    texts = [text for text in rows[1]["text"][:2] for _ in range(2)]
    expected = module.generate(texts, 2 * LENGTH, seeds, options=Sampling(steps=1, guidance=Guidance(1.0)))
    assert torch.equal(generated, expected)
    again = trainer.test(module, loader(rows), verbose=False)[0]
    assert again["test/clips"] == 12


# -- prediction and sampling ------------------------------------------------------------------------------------------


def test_prediction_makes_sound_for_texts_of_any_length(quiet_trainer):
    module, trainer = build(), quiet_trainer()
    prompts = {"text": TEXTS[:4], "seconds": torch.tensor([0.05, 0.08, 0.05, 0.0304])}
    made = trainer.predict(module, loader([prompts, {"text": TEXTS[4:6]}, batch(2, 5)]))
    assert [part["audio"].shape for part in made] == [(4, 1, 80), (2, 1, LENGTH), (2, 1, LENGTH)]
    assert [part["valid_length"].tolist() for part in made] == [[50, 80, 50, 30], [LENGTH] * 2, [LENGTH] * 2]
    assert [part["index"].tolist() for part in made] == [[0, 1, 2, 3], [4, 5], [5, 6]]
    assert [part["text"] for part in made] == [TEXTS[:4], TEXTS[4:6], TEXTS[5:7]]
    assert all(part["sample_rate"] == RATE for part in made)
    first = made[0]["audio"]
    assert not first[0, 0, 50:].any()
    alone = trainer.predict(module, loader([{"text": TEXTS[:1], "seconds": [0.05]}]))[0]["audio"]
    torch.testing.assert_close(alone[0], first[0, :, :50], rtol=0, atol=1e-5)
    none = trainer.predict(module, loader([{"text": ["x"], "seconds": [None]}]))[0]["audio"]
    assert none.shape == (1, 1, LENGTH)
    fixed = build(sampler=Sampling(steps=1, seconds=0.02))
    assert trainer.predict(fixed, loader([batch(2)]))[0]["audio"].shape == (2, 1, 20)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {"eta": 0.5}),
        ("dpm", {}),
        ("diffusers.DDIMScheduler", {}),
        ("diffusers.EDMDPMSolverMultistepScheduler", {"sigma_min": 0.01}),
    ],
)
def test_schedulers(scheduler, options):
    sampler = Sampling(scheduler, options, steps=4, guidance=Guidance(2.0, rescale=0.5), negative_prompt="noise")
    module = build(sampler=sampler)
    audio = module.generate(TEXTS[:2])
    assert audio.shape == (2, 1, LENGTH)
    assert audio.isfinite().all()
    assert torch.equal(module.generate(TEXTS[:2]), audio)
    scheduler = module.pipeline().scheduler
    for name, value in options.items():
        assert scheduler.config[name] == value


def test_negative_prompt_of_a_frozen_encoder(frozen):
    sampler = Sampling(steps=2, negative_prompt="x")
    module = build(frozen, train_text_encoder=False, sampler=sampler)
    plain = build(frozen, train_text_encoder=False)
    assert not torch.equal(module.generate(["a flute"]), plain.generate(["a flute"]))


def test_sampling_leaves_training_alone(quiet_trainer):
    """It neither moves the random state nor switches dropout off for good."""
    text = dataclasses.replace(TEXT, dropout=0.5)

    class Sample(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 1:
                module.sounds()

    runs = []
    for callbacks in ([], [Sample()]):
        module = build(text)
        quiet_trainer(max_steps=3, callbacks=callbacks).fit(module, loader([batch(8)] * 3))
        assert module.net.text_encoder.training
        runs.append(module)
    assert all(torch.equal(value, runs[1].net.state_dict()[name]) for name, value in runs[0].net.state_dict().items())


def test_sounds_of_the_newest_batch_and_of_prompts(quiet_trainer):
    module = build()
    assert module.sounds() == {}
    assert module.samples() == []
    quiet_trainer(max_steps=1).fit(module, loader([batch(8, 2)]))
    sounds = module.sounds()
    assert (
        set(sounds) == set(module.sound_texts()) == {f"{kind}/{n}" for kind in ("real", "generated") for n in range(4)}
    )
    clip, rate = sounds["real/1"]
    assert rate == RATE
    np.testing.assert_array_equal(clip, batch(8, 2)["audio"][1].numpy())
    assert module.sound_texts()["generated/1"] == TEXTS[3]
    again = module.sounds()
    np.testing.assert_array_equal(sounds["generated/2"][0], again["generated/2"][0])
    row = module.samples()[0]
    assert row["text"] == TEXTS[2]
    assert row["peak"] == pytest.approx(float(batch(8, 2)["audio"][0].abs().max()))
    prompted = build(prompts=["one", "two"])
    assert set(prompted.sounds()) == {"generated/0", "generated/1"}
    assert prompted.sound_texts() == {"generated/0": "one", "generated/1": "two"}
    assert prompted.sounds()["generated/0"][0].shape == (1, LENGTH)


def test_generated_sound_is_not_clipped(quiet_trainer):
    """Metrics would hear the difference; the writers of files see to peaks."""
    module = build(backbone=dataclasses.replace(UNET, data_scale=0.1))
    assert module.generate(["a flute"]).abs().max() > 1
    assert quiet_trainer().predict(module, loader([{"text": ["a flute"]}]))[0]["audio"].abs().max() > 1


def test_generation_needs_to_know_how_many():
    with pytest.raises(ValueError, match="give texts, vectors or seeds"):
        build().generate()


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Clips(torch.utils.data.Dataset):
    """Twelve clips."""

    def __len__(self):
        return 12

    def __getitem__(self, number):
        return {name: value[0] for name, value in batch(1, number).items() if name != "columns"}


def test_interrupted_run_goes_on_bit_for_bit(quiet_trainer, tmp_path):
    """With dropout in the trained encoder, an average, accumulation, and Adam, from the middle of an epoch."""
    text = dataclasses.replace(TEXT, dropout=0.3)
    adam = partial(torch.optim.AdamW, lr=1e-2)

    def fit(steps, folder, resume=None):
        torch.manual_seed(1)
        module, recorder = build(text, optimizer=adam, configured=False), Recorder()
        trainer = quiet_trainer(
            max_steps=steps,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            val_check_interval=2,
            default_root_dir=tmp_path / folder,
            callbacks=[
                RNGState(),
                EMA(0.9, warmup="ratio", delay=0),
                recorder,
                ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=1),
            ],
        )
        trainer.fit(module, ResumableLoader(Clips(), batch_size=2), loader([batch(4)]), ckpt_path=resume)
        return module, recorder

    whole, recorder = fit(5, "whole")
    fit(2, "part")
    resumed, rest = fit(5, "part", tmp_path / "part" / "last.ckpt")
    assert rest.losses == recorder.losses[4:]
    assert [inputs.t.tolist() for inputs in rest.inputs] == [
        inputs.t.tolist() for inputs in recorder.inputs[-len(rest.inputs) :]
    ]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert any(name.startswith("ema.text_encoder") for name in whole.state_dict())


def test_checkpoint_gives_module_and_pipeline_back(quiet_trainer, tmp_path):
    module = build(loss=WaveformLoss(mask=True), times=Times("crash"), evaluation=Evaluation(kad=True, limit=3))
    trainer = quiet_trainer(max_steps=2, callbacks=[EMA(0.5)])
    trainer.fit(module, loader([batch(), batch()]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(loaded) is LitWaveform
    assert loaded.backbone == module.backbone
    assert loaded.text == module.text
    assert (loaded.loss, loaded.times, loaded.sampler, loaded.evaluation) == (
        module.loss,
        module.times,
        module.sampler,
        module.evaluation,
    )
    pipeline = loaded.pipeline()
    assert not pipeline.unet.training
    assert pipeline.sample_rate == RATE
    audio = pipeline(
        "a flute", num_inference_steps=2, generator=draws.generators([0]), clip=False, output_type="pt"
    ).audios
    assert torch.equal(audio, module.generate(["a flute"]))


def test_export_from_the_command_line(quiet_trainer, tmp_path, capsys):
    from lit_models.export import main

    module = build()
    trainer = quiet_trainer(max_steps=1, callbacks=[EMA(0.5)])
    trainer.fit(module, loader([batch()]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    config = copy.deepcopy(module.net.text_encoder.config.to_dict())
    main([str(tmp_path / "a.ckpt"), str(tmp_path / "out")])
    assert f"model: {tmp_path}/out/model" in capsys.readouterr().out
    loaded = TextToWaveformPipeline.from_pretrained(tmp_path / "out" / "model")
    for name, value in module.ema.text_encoder.state_dict().items():
        assert torch.equal(loaded.text_encoder.state_dict()[name], value)
    module.export_pretrained(tmp_path / "live")
    assert module.net.text_encoder.config.to_dict() == config
    assert module.ema.text_encoder.config.to_dict() == config


def test_further_training_of_an_exported_pipeline(quiet_trainer, tmp_path):
    module = build()
    folder = module.export_pretrained(tmp_path)["model"]
    for name in (folder, folder / "unet"):
        net = PretrainedWaveform(str(name)).build(8)
        assert net.training
        assert all(parameter.requires_grad for parameter in net.parameters())
        for key, value in module.net.unet.state_dict().items():
            assert torch.equal(net.state_dict()[key], value)
    further = build(PretrainedText(str(folder), pooling="mean"), PretrainedWaveform(str(folder)))
    for key, value in module.net.state_dict().items():
        assert torch.equal(further.net.state_dict()[key], value), key
    quiet_trainer(max_steps=1).fit(further, loader([batch()]))
    with pytest.raises(ValueError, match=r"model\.text: its encoder has width 4, but .* reads texts of width 8"):
        PretrainedWaveform(str(folder)).build(4)
    (folder / "scheduler" / "scheduler_config.json").rename(folder / "scheduler" / "config.json")
    with pytest.raises(ValueError, match=r"model\.backbone\.name: .* holds a VDDIMScheduler"):
        PretrainedWaveform(str(folder / "scheduler")).build()
    with pytest.raises(ValueError, match=r"model\.backbone\.name: .* is neither a network or pipeline on the hub"):
        PretrainedWaveform(str(tmp_path / "nothing")).build()
    with pytest.raises(ValueError, match=r"model\.backbone\.dtype: 'half a byte'"):
        PretrainedWaveform(str(folder), dtype="half a byte").build()


# -- what goes wrong --------------------------------------------------------------------------------------------------


def nan(rows):
    rows["audio"][2, 0, 5] = float("nan")
    return rows


def mono(rows):
    return rows | {"audio": rows["audio"].repeat(1, 2, 1)}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (nan, {}, r"data: clip 2 holds samples that are NaN or infinite"),
        (mono, {}, r"data\.channels: the clips have 2 channels, but the network reads 1; .*in_channels to 2"),
        (lambda rows: rows | {"audio": rows["audio"][:, 0]}, {}, r"`audio` is torch.float32 of shape \(4, 96\)"),
        (lambda rows: rows | {"audio": rows["audio"].short()}, {}, r"`audio` is torch.int16"),
        (lambda rows: rows | {"audio": rows["audio"][..., :0]}, {}, r"`audio` is torch.float32 of shape \(4, 1, 0\)"),
        (lambda rows: {"text": rows["text"]}, {}, r"data: a batch holds only text, but there must be `audio`"),
        (lambda rows: {"audio": rows["audio"]}, {}, r"model\.text: the batches hold no `text` to encode"),
        (lambda rows: rows | {"text": rows["text"][:3]}, {}, r"data: a batch holds 4 of audio and 3 of text"),
        (lambda rows: rows | {"text": [None] * 4}, {}, r"data: `text` must be a list of strings"),
        (lambda rows: rows | {"valid_length": torch.tensor([97, 1, 1, 1])}, {}, r"`valid_length` must be one number"),
        (
            lambda rows: {"audio": rows["audio"], "text": rows["text"]},
            {"loss": WaveformLoss(mask=True)},
            r"model\.loss\.mask: the batches have no `valid_length`",
        ),
        (lambda rows: rows, {"loss": WaveformLoss(stft=1.0)}, r"model\.loss\.stft_sizes: a window of 512 samples"),
        (
            lambda rows: rows,
            {"text": None, "backbone": dataclasses.replace(UNET, text_dim=8)},
            r"model\.text: it is null, but the network reads texts of width 8",
        ),
        (
            lambda rows: rows | {"embedding": torch.zeros(4, 8)},
            {"text": None, "backbone": dataclasses.replace(UNET, text_dim=8)},
            r"model\.backbone\.text_attention: .* set it to false",
        ),
        (
            lambda rows: rows | {"embedding": torch.zeros(4, 5)},
            {"text": None, "backbone": dataclasses.replace(UNET, text_dim=8, text_attention=False)},
            r"model\.backbone\.text_dim: `embedding` must have shape \(clips, 8\), got \(4, 5\)",
        ),
        (
            lambda rows: rows | {"embedding": torch.zeros(4, 5)},
            {"text": None},
            r"model\.backbone\.text_dim: the batches hold an `embedding`, but the network reads no vector",
        ),
    ],
)
def test_batches_that_cannot_be_used_are_refused(change, options, words, quiet_trainer):
    module = build(**options)
    with pytest.raises(ValueError, match=words):
        quiet_trainer(max_steps=1).fit(module, loader([change(batch())]))


def test_another_sample_rate_is_refused(quiet_trainer):
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        sample_rate = 8000

        def train_dataloader(self):
            return loader([batch()])

    with pytest.raises(ValueError, match=r"data\.sample_rate: the clips have 8000 Hz, but .* made for 1000 Hz"):
        quiet_trainer(max_steps=1).fit(build(), Data())


@pytest.mark.parametrize(
    ("factor", "backbone", "words"),
    [
        (0.01, UNET, r"model\.backbone\.data_scale: .* deviation of only 0\.007.*; set it to about 28[0-9]"),
        (0.0, UNET, r"model\.backbone\.data_scale: .* deviation of only 0 "),
        (
            0.01,
            UnconditionalUNet1D(LENGTH, RATE, 1, channels=[32, 32], attn_from_level=None),
            r"data\.level: .* set data\.level so",
        ),
    ],
)
def test_quiet_sound_gives_a_warning(factor, backbone, words, quiet_trainer):
    module = build(TEXT if backbone is UNET else None, backbone)
    rows = batch()
    with pytest.warns(UserWarning, match=words):
        quiet_trainer(max_steps=1).fit(module, loader([rows | {"audio": rows["audio"] * factor}]))


def test_sound_of_usual_strength_gives_none(quiet_trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*data_scale.*")
        quiet_trainer(max_steps=1).fit(build(), loader([batch()]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p_uncond": 1.5}, r"model\.p_uncond must lie in \[0, 1\], got 1.5"),
        ({"text_lr_scale": 0.0}, r"model\.text_lr_scale must be positive"),
        ({"text_cache_mb": -1.0}, r"model\.text_cache_mb must be at least 0"),
        ({"seed": -1}, r"model\.seed must be at least 0"),
        ({"text": None, "train_text_encoder": True}, r"model\.train_text_encoder: there is no text encoder"),
        ({"backbone": UnconditionalUNet1D(channels=[8, 16])}, r"model\.text: UnconditionalUNet1D reads no text"),
        ({"backbone": dataclasses.replace(UNET, text_dim=9)}, r"model\.backbone\.text_dim: 9 is not the width .*, 8"),
        (
            {"backbone": dataclasses.replace(UNET, fuse="none", text_attention=False)},
            r"model\.backbone: text_dim is set",
        ),
        ({"backbone": dataclasses.replace(UNET, channels=[8])}, r"model\.backbone: channels has 1 levels"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Times(std=0.0), r"model\.times\.std: 0\.0 is not positive"),
        (lambda: Times(law="cosine"), r"model\.times\.law: 'cosine' is unknown"),
        (lambda: WaveformLoss(weighting="snr"), r"model\.loss\.weighting must be none or min_snr"),
        (lambda: WaveformLoss(snr_limit=0), r"model\.loss\.snr_limit must be positive"),
        (lambda: WaveformLoss(stft=-1), r"model\.loss\.stft must be at least 0"),
        (lambda: WaveformLoss(stft_sizes=()), r"model\.loss\.stft_sizes: \[\] are no window lengths"),
        (lambda: Sampling(steps=0), r"model\.sampler\.steps must be at least 1"),
        (lambda: Sampling(seconds=0.0), r"model\.sampler\.seconds must be positive"),
        (lambda: Sampling("euler"), r"model\.sampler\.scheduler: 'euler' is neither ddim nor dpm"),
        (lambda: Sampling("torch.nn.Linear"), r"model\.sampler: .*missing"),
        (lambda: Sampling("diffusers.DDPMScheduler"), r"model\.sampler: .* does not follow v-diffusion"),
        (lambda: Sampling(scheduler_options={"eta": 3}), r"model\.sampler: eta: 3 is not in"),
        (lambda: Sampling("dpm", guidance=Guidance(0.5, plus=True)), r"guidance\.plus: VDPMSolverScheduler has no CFG"),
        (lambda: UnconditionalUNet1D(channels=[8]).build(), r"model\.backbone\.channels: 1 levels"),
        (lambda: UnconditionalUNet1D(time_dim=3).build(), r"model\.backbone\.time_dim: 3 is not even"),
        (lambda: UnconditionalUNet1D(attn_from_level=1).build(), r"model\.backbone\.attn_from_level: 1 is not a level"),
    ],
)
def test_groups_of_options_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_frozen_random_encoder_cannot_be_shared_by_shards(monkeypatch):
    monkeypatch.setattr(LitWaveform, "device_mesh", property(lambda self: object()))
    with pytest.raises(ValueError, match=r"model\.train_text_encoder: .* SmallText; set it to true"):
        build(train_text_encoder=False)


def test_configure_model_runs_once():
    module = build()
    net = module.net
    module.configure_model()
    assert module.net is net
    assert net.training
