import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.rng import RNGState
from lit_models.base import LitBase
from lit_models.pixel.functional import inked, patchify
from lit_models.pixel.mae_module import LitPIXEL
from lit_models.pixel.mae_recipes import FromPIXELConfig, FromPIXELPretrained
from lit_models.pixel.masking import SpanMasking, draw_masks

from .test_mae import OPTIONS, L, P, strips

SGD = partial(torch.optim.SGD, lr=0.1)
SEED = 7
TRAIN, EVALUATE = 0, 1


def batch(lengths=(16, 9, 5), seed=0, channels=1):
    pixels, mask = strips(lengths, seed=seed, channels=channels)
    return {"pixel_values": pixels, "pixel_mask": mask, "num_text_patches": mask.sum(1) - 1}


def loader(batches):
    return DataLoader(batches, batch_size=None)


def build(optimizer=SGD, masking=SpanMasking(), **values):
    torch.manual_seed(0)
    module = LitPIXEL(FromPIXELConfig(OPTIONS | values), masking, SEED, optimizer=optimizer)
    module.configure_model()
    return module


def errors(net, rows, number, stage=TRAIN, masking=SpanMasking(), first=0):
    """(B,L) errors and targets of a batch with the masks that the module must have drawn."""
    lengths = rows["pixel_mask"].sum(1).numpy()
    numbers = range(first, first + len(lengths))
    masks, noise = draw_masks(L, 0.25, lengths, (SEED, stage, 0, number), masking, numbers)
    output = net(rows["pixel_values"], rows["pixel_mask"], masks, noise)
    return output.errors, output.targets


def mean(parts):
    errors, targets = (torch.cat(values) for values in zip(*parts, strict=True))
    return errors[targets].mean()


class Recorder(Callback):
    def __init__(self):
        self.losses, self.tokens, self.masks = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.tokens.append(module.step_stats()["tokens"])
        self.masks.append(batch["patch_mask"])


@pytest.fixture
def module():
    return build()


@pytest.fixture
def reference(module):
    return copy.deepcopy(module.net)


@pytest.mark.parametrize("masking", [SpanMasking(), SpanMasking(spacing=0), None])
def test_training_loss_is_the_mean_over_hidden_attended_patches(masking, quiet_trainer):
    module = build(masking=masking)
    reference = copy.deepcopy(module.net)
    assert module.step_stats() == {}
    assert module.samples() == []
    assert module.strips() == {}
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader([batch()]))
    expected = mean([errors(reference, batch(), 0, masking=masking)])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected.item(), abs=1e-6)
    assert module.step_stats() == {"tokens": 30, "patches": 30}


def test_masks_change_from_batch_to_batch_and_follow_the_seed(quiet_trainer):
    recorders = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(recorders))  # the global generator must not matter
        recorder = Recorder()
        module = LitPIXEL(FromPIXELConfig(OPTIONS), seed=seed, optimizer=SGD)
        quiet_trainer(max_epochs=2, callbacks=[recorder]).fit(module, loader([batch(), batch()]))
        recorders.append(recorder.masks)
    first, second, other = recorders
    assert len(first) == 4
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not any(torch.equal(first[0], mask) for mask in first[1:])
    assert not torch.equal(first[0], other[0])


def test_accumulated_batches_give_the_gradient_of_the_mean_over_all_their_patches(module, reference, quiet_trainer):
    batches = [batch((16, 16, 16), 0), batch((6, 7, 5), 1), batch((10, 2, 3), 2)]  # the last window holds one batch
    quiet_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(batches))
    optimizer = SGD(reference.parameters())
    for window in ([0, 1], [2]):
        parts = [errors(reference, batches[number], number) for number in window]
        optimizer.zero_grad()
        mean(parts).backward()
        optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_weighs_patches_not_batches(module, quiet_trainer, stage):
    batches = [batch((16, 16, 16), 0), batch((4,), 1)]
    batches[0]["pixel_values"][0, :, :, : 6 * P] = 255  # blank patches within the text
    trainer = quiet_trainer()
    for _ in range(2):  # totals and masks start anew
        (metrics,) = getattr(trainer, stage)(module, loader(batches), verbose=False)
    parts = [errors(module.net, rows, 0, EVALUATE, first=first) for first, rows in zip((0, 3), batches, strict=True)]
    key = "val" if stage == "validate" else "test"
    assert metrics[f"{key}/loss"] == pytest.approx(float(mean(parts)), abs=1e-6)
    with_ink = [
        (error, targets & inked(patchify(rows["pixel_values"] / 255, P)))
        for (error, targets), rows in zip(parts, batches, strict=True)
    ]
    assert sum(int(targets.sum()) for _, targets in with_ink) < sum(int(targets.sum()) for _, targets in parts)
    assert metrics[f"{key}/loss_inked"] == pytest.approx(float(mean(with_ink)), abs=1e-6)


def test_validation_does_not_disturb_the_masks_of_training(quiet_trainer):
    recorders = [Recorder(), Recorder()]
    for recorder, validation in zip(recorders, (None, loader([batch(), batch()])), strict=True):
        module = LitPIXEL(FromPIXELConfig(OPTIONS), seed=SEED, optimizer=SGD)
        quiet_trainer(max_epochs=2, callbacks=[recorder]).fit(module, loader([batch(), batch()]), validation)
    assert all(torch.equal(one, two) for one, two in zip(*(recorder.masks for recorder in recorders), strict=True))


def test_prediction_rates_rows(module, quiet_trainer):
    rows = batch((16, 9, 1))
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    error, targets = errors(module.net, rows, 0, EVALUATE)
    assert prediction["patches"].tolist() == targets.sum(1).tolist()
    assert prediction["loss"][0].item() == pytest.approx(error[0][targets[0]].mean().item(), abs=1e-6)
    empty = targets.sum(1) == 0
    assert (prediction["loss"][empty] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_show_text_masks_and_predictions(channels, quiet_trainer):
    module = build(num_channels=channels)
    rows = batch((16, 9, 5, 4, 12), channels=channels)
    quiet_trainer().validate(module, loader([rows]), verbose=False)
    images = module.strips()
    assert list(images) == ["row 0", "row 1", "row 2", "row 3"]
    image = images["row 1"]
    assert image.dtype == np.uint8
    assert image.shape == ((3 * P + 2, 9 * P) if channels == 1 else (3 * P + 2, 9 * P, 3))
    true = rows["pixel_values"][1, :, :, : 9 * P].permute(1, 2, 0).numpy()
    true = true[..., 0] if channels == 1 else true
    assert np.array_equal(image[:P], true)
    _, targets = errors(module.net, rows, 0, EVALUATE)
    hidden = targets[1, :9].repeat_interleave(P).numpy()
    assert hidden.any()
    seen, restored = image[P + 1 : 2 * P + 1], image[2 * P + 2 :]
    assert (seen[:, hidden] == 128).all()
    assert np.array_equal(seen[:, ~hidden], true[:, ~hidden])
    assert np.array_equal(restored[:, ~hidden], true[:, ~hidden])
    assert (restored[:, hidden] != true[:, hidden]).any()
    # Predictions get mean and contrast of the true patch, so that the two have about the same brightness.
    assert abs(restored[:, hidden].mean() - true[:, hidden].mean()) < 25


def test_samples_count_patches(module, quiet_trainer):
    quiet_trainer(max_steps=1).fit(module, loader([batch()]))
    rows = module.samples()
    assert [row["patches"] for row in rows] == [16, 9, 5]
    _, targets = errors(build().net, batch(), 0)
    assert [row["hidden"] for row in rows] == targets.sum(1).tolist()
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("checkpoint", ["epoch=1.ckpt", "step=3.ckpt"])
def test_checkpoints_resume_bitwise(checkpoint, quiet_trainer, tmp_path):
    def make():
        optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)
        return build(optimizer, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)

    batches = [batch(seed=seed) for seed in range(5)]
    savers = [
        ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1),
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1),
    ]
    whole = make()
    trainer = quiet_trainer(max_epochs=4, callbacks=[RNGState(), *savers], enable_checkpointing=True)
    trainer.fit(whole, loader(batches))
    if checkpoint.startswith("step"):  # in the middle of an epoch, what was trained on is skipped by the loader
        batches = Resumed(batches, 3)
    resumed = make()
    torch.manual_seed(99)
    trainer = quiet_trainer(max_epochs=4, callbacks=[RNGState()])
    trainer.fit(resumed, loader(batches), ckpt_path=tmp_path / checkpoint)
    assert resumed._masked[TRAIN, 0] == whole._masked[TRAIN, 0] == 20
    for (name, one), two in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


class Resumed(torch.utils.data.IterableDataset):
    """Batches that begin in the middle, the first time."""

    def __init__(self, batches, first):
        self.batches, self.first = batches, first

    def __iter__(self):
        first, self.first = self.first, 0
        return iter(self.batches[first:])

    def __len__(self):
        return len(self.batches)


def test_the_checkpoint_holds_the_number_of_the_next_batch(quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(build(), loader([batch()] * 3))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(loaded, LitPIXEL)
    assert loaded._masked == {(TRAIN, 0): 2}
    assert loaded.masking == SpanMasking()
    assert loaded.seed == SEED
    for name, value in trainer.lightning_module.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value)


def test_the_exported_model_predicts_the_same(module, quiet_trainer, tmp_path):
    quiet_trainer(max_steps=1).fit(module, loader([batch()]))
    folders = module.export_pretrained(tmp_path)
    assert list(folders) == ["model"]
    loaded = FromPIXELPretrained(str(folders["model"])).build().eval()
    rows = batch()
    torch.testing.assert_close(errors(loaded, rows, 0)[0], errors(module.net.eval(), rows, 0)[0], rtol=0, atol=0)


def test_the_average_is_kept_and_exported(quiet_trainer, tmp_path):
    module = LitPIXEL(FromPIXELConfig(OPTIONS), seed=SEED, optimizer=SGD)
    module.enable_ema(0.5)
    quiet_trainer(max_steps=2).fit(module, loader([batch()] * 2))
    assert set(module.export_pretrained(tmp_path)) == {"model", "ema"}
    assert not torch.equal(module.ema.decoder.mask_token, module.net.decoder.mask_token)


def test_parameter_groups_leave_the_tables_out(module):
    groups = {group["name"]: group for group in module.param_groups()}
    assert set(groups) == {"model", "model_no_decay"}
    grouped = {id(parameter) for group in groups.values() for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in module.net.parameters()}
    assert groups["model_no_decay"]["weight_decay"] == 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision, quiet_trainer):
    recorder = Recorder()
    module = LitPIXEL(FromPIXELConfig(OPTIONS), seed=SEED, optimizer=SGD)
    trainer = quiet_trainer(max_steps=2, precision=precision, callbacks=[recorder])
    trainer.fit(module, loader([batch(), batch()]))
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32
    exact = Recorder()
    module = LitPIXEL(FromPIXELConfig(OPTIONS), seed=SEED, optimizer=SGD)
    quiet_trainer(max_steps=2, callbacks=[exact]).fit(module, loader([batch(), batch()]))
    assert all(torch.equal(one, two) for one, two in zip(recorder.masks, exact.masks, strict=True))
    np.testing.assert_allclose(recorder.losses, exact.losses, rtol=0.05)


def test_the_loss_falls_on_one_batch(quiet_trainer):
    torch.manual_seed(0)
    recorder = Recorder()
    options = OPTIONS | {"decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    module = LitPIXEL(FromPIXELConfig(options), seed=SEED, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    quiet_trainer(max_steps=180, callbacks=[recorder]).fit(module, loader([batch((16,))] * 180))
    assert np.mean(recorder.losses[:5]) > 0.8
    assert np.mean(recorder.losses[-20:]) < 0.5  # although other patches are hidden in every step


def test_batches_without_strips_are_refused(module):
    with pytest.raises(ValueError, match=r"data\.modes: PIXEL reads strips, but a batch holds only input_ids, labels"):
        module.on_before_batch_transfer({"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1, 2)}, 0)


def test_seed_must_not_be_negative():
    with pytest.raises(ValueError, match=r"model\.seed must be at least 0, got -1"):
        LitPIXEL(FromPIXELConfig(OPTIONS), seed=-1)


def test_configure_model_runs_once(module):
    net = module.net
    module.configure_model()
    assert module.net is net
    assert net.training


def test_preset_of_pixel_base_has_the_sizes_and_rates_of_the_paper():
    file = Path(__file__).parents[2] / "configs" / "pixel" / "model-pixel-base.yaml"
    preset = yaml.safe_load(file.read_text())
    arguments, data = preset["model"]["init_args"], preset["data"]["init_args"]
    with torch.device("meta"):
        net = FromPIXELConfig(**arguments["backbone"]["init_args"]).build()
    assert sum(parameter.numel() for parameter in net.parameters()) == 111_655_680
    config = net.config
    assert config.num_patches == data["renderer"]["init_args"]["max_seq_length"] == 529
    assert (config.mask_ratio, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.1, 0.1)
    optimizer, schedule = arguments["optimizer"]["init_args"], arguments["lr_scheduler"]["init_args"]
    assert optimizer["weight_decay"] == 0.05
    assert optimizer["lr"] == pytest.approx(1.5e-4 * (8 * data["batch_size"]) / 256)
    assert schedule["warmup"] == 0.05
    assert schedule["floor"] * optimizer["lr"] == pytest.approx(1e-5, rel=1e-3)
    assert preset["trainer"]["max_steps"] == 1_000_000
