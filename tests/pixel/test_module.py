"""Pre-training of pixel language models under the Trainer."""

import copy
import math
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import EMA
from lit_models.base import LitBase
from lit_models.cli import main
from lit_models.pixel import FromPixelConfig, FromPixelPretrained, LitPixelLM, functional
from lit_models.pixel.module import ObjectiveWeights, batch_mode, complete_state
from tests.callbacks.tiny import ResumableLoader

SGD = partial(torch.optim.SGD, lr=0.1)
P, K = 4, 16  # side of a patch, values of a patch
OVERRIDES = {
    "image_size": [P, 64],
    "patch_size": P,
    "num_channels": 1,
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


GLYPHS = torch.randint(0, 256, (5, 3, P, P), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def strips(lengths, seed=0, width=None, channels=1):
    """Strips of so many patches, of which every third is white and the others repeat a cycle; then the separator."""
    width = width or max(lengths) + 1
    pixels = torch.full((len(lengths), channels, P, width * P), 255, dtype=torch.uint8)
    for row, length in enumerate(lengths):
        for place in range(length):
            if place % 3 != 1:
                pixels[row, :, :, place * P : (place + 1) * P] = GLYPHS[(seed + row + place) % 5, :channels]
        pixels[row, :, :, length * P : (length + 1) * P] = 0
    lengths = torch.tensor(lengths)
    return {
        "pixel_values": pixels,
        "pixel_mask": functional.pixel_mask(lengths, width),
        "num_text_patches": lengths,
    }


def tokens(lengths, seed=0, width=None, untrained=0):
    """Beginning token, random tokens, end token."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(100 + seed)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 300, (len(lengths), width), generator=generator)
    ids[:, 0] = 1
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    ids = ids.masked_fill(~mask, 0)
    labels = ids.masked_fill(~mask, -100)
    labels[:, :untrained] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def batch(mode, lengths=(6, 3, 5), seed=0, width=None):
    """Strips of so many patches before the separator, and one token less."""
    lengths = list(lengths)
    pixel = strips(lengths, seed, width)
    text = tokens([length - 1 for length in lengths], seed, width)
    return {"pixel": pixel, "text": text, "pair": pixel | text}[mode]


def joined(batches):
    return {key: torch.cat([rows[key] for rows in batches]) for key in batches[0]}


def loader(batches):
    return DataLoader(batches, batch_size=None)


def manual(net, rows):
    """Sums and numbers of targets of next-patch and next-token prediction, from predictions alone."""
    keys = ("pixel_values", "pixel_mask", "input_ids", "attention_mask")
    output = net(**{key: rows[key] for key in keys if key in rows}, return_loss=False)
    zero = torch.zeros(())
    npp = ntp = (zero, zero)
    if "pixel_values" in rows:
        patches = functional.patchify(rows["pixel_values"].float() / 255, P)
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        errors = (output.pixel_pred[:, :-1] - target[:, 1:]).square().mean(-1)
        mask = rows["pixel_mask"][:, 1:]
        npp = ((errors * mask).sum(), mask.sum())
    if "input_ids" in rows:
        kept = rows["labels"][:, 1:] != -100
        nll = -output.logits.log_softmax(-1)[:, :-1].gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
        ntp = (nll[kept].sum(), kept.sum())
    return npp, ntp


class ByRank(torch.utils.data.Dataset):
    """Batches of each rank."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index][torch.distributed.get_rank()]


def added(sums):
    """Sums over batches of what `manual` gives."""
    return [[sum(batch[kind][part] for batch in sums) for part in (0, 1)] for kind in (0, 1)]


def manual_loss(net, rows, pixel=1.0, text=1.0):
    (npp, patches), (ntp, count) = manual(net, rows)
    return pixel * npp / patches.clamp(min=1) + text * ntp / count.clamp(min=1)


class Recorder(Callback):
    def __init__(self):
        self.values, self.tokens = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.tokens.append(module.step_stats()["tokens"])


@pytest.fixture
def build(tiny_tokenizer):
    """Function that makes a module; with networks by default."""

    def make(configured=True, tokenizer=True, overrides=(), optimizer=SGD, **options):
        torch.manual_seed(5)
        backbone = FromPixelConfig(OVERRIDES | dict(overrides))
        module = LitPixelLM(backbone, str(tiny_tokenizer) if tokenizer else None, optimizer=optimizer, **options)
        if configured:
            module.configure_model()
            with torch.no_grad():  # otherwise losses are too alike
                for weight in (module.net.lm_pixel_head.weight, module.net.lm_token_head.weight):
                    weight.mul_(10)
        return module

    return make


@pytest.fixture
def module(build):
    return build()


@pytest.fixture
def reference(module):
    return copy.deepcopy(module.net)


def assert_same_weights(module, reference, tolerance=1e-6):
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=tolerance, msg=name)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pixel", "text", "pair"])
def test_training_loss_is_the_weighted_sum_of_means_over_targets(module, reference, quiet_trainer, mode):
    module.weights = ObjectiveWeights(pixel=2.0, text=0.5)
    rows, recorder = batch(mode), Recorder()
    assert module.step_stats() == {}
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    (npp, patches), (ntp, count) = manual(reference, rows)
    means = {"pixel": {"npp": npp / patches}, "text": {"ntp": ntp / count}}
    means["pair"] = means["pixel"] | means["text"]
    logged = recorder.values[0]
    for name, value in means[mode].items():
        assert logged.pop(f"train/{mode}/{name}") == pytest.approx(float(value.detach()), rel=1e-5)
    expected = float(manual_loss(reference, rows, 2.0, 0.5).detach())
    assert logged.pop("train/loss") == pytest.approx(expected, rel=1e-5)
    assert not logged
    assert recorder.tokens == [{"pixel": 17, "text": 11, "pair": 28}[mode]]
    SGD(reference.parameters()).zero_grad()
    manual_loss(reference, rows, 2.0, 0.5).backward()
    SGD(reference.parameters()).step()
    assert_same_weights(module, reference)


def test_weights_become_part_of_the_configuration(build):
    config = build(weights=ObjectiveWeights(0.25, 0.5, 2.0)).net.config
    assert (config.pixel_weight, config.text_weight, config.stop_weight) == (0.25, 0.5, 2.0)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_stop_head_is_trained_with_its_weight(build, quiet_trainer):
    module = build(overrides={"stop_head": True}, weights=ObjectiveWeights(stop=3.0))
    rows, recorder = batch("pixel"), Recorder()
    output = copy.deepcopy(module.net)(rows["pixel_values"], rows["pixel_mask"])
    before = module.net.lm_stop_head.weight.clone()
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    expected = float(output.loss_npp + 3 * output.loss_stop)
    assert recorder.values[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert recorder.values[0]["train/pixel/npp"] == pytest.approx(float(output.loss_npp), rel=1e-5)
    assert not torch.equal(module.net.lm_stop_head.weight, before)


@pytest.mark.parametrize("mode", ["pixel", "text"])
def test_accumulated_batches_of_one_kind_give_the_mean_over_all_their_targets(module, reference, quiet_trainer, mode):
    batches = [batch(mode, (9, 8)), batch(mode, (3, 4), 1), batch(mode, (12, 5, 7), 2)]  # the last one stands alone
    quiet_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(batches))
    optimizer = SGD(reference.parameters())
    for window in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        total, count = added([manual(reference, rows) for rows in window])[mode == "text"]
        (total / count).backward()
        optimizer.step()
    assert_same_weights(module, reference)


def test_accumulated_modes_count_by_their_rows(module, reference, quiet_trainer):
    """Three batches of equal texts: two rows of images, three of tokens, one pair; exact, as targets per row agree."""
    module.weights = ObjectiveWeights(pixel=2.0, text=0.5)
    batches = [batch("pixel", (6, 6)), batch("text", (6, 6, 6), 1), batch("pair", (6,), 2)]
    quiet_trainer(max_steps=1, accumulate_grad_batches=3, gradient_clip_val=0.3).fit(module, loader(batches))
    (npp, patches), (ntp, count) = added([manual(reference, rows) for rows in batches])
    (2.0 * 3 / 6 * npp / patches + 0.5 * 4 / 6 * ntp / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
    assert norm > 0.3
    SGD(reference.parameters()).step()
    assert_same_weights(module, reference)


def test_accumulated_pairs_keep_the_proportion_of_the_first_batch(module, reference, quiet_trainer):
    batches = [batch("pair", (6, 4)), batch("pair", (9,), 1) | tokens([3])]
    quiet_trainer(max_steps=1, accumulate_grad_batches=2).fit(module, loader(batches))
    sums = [manual(reference, rows) for rows in batches]
    scaled = [sum(rows[kind][0] for rows in sums) / sums[0][kind][1] for kind in (0, 1)]
    weight = sum(sum(rows[kind][1] for rows in sums) / sums[0][kind][1] for kind in (0, 1))
    ((scaled[0] + scaled[1]) * 2 / weight).backward()  # together they weigh 1 + 1, as for a single batch
    SGD(reference.parameters()).step()
    assert_same_weights(module, reference)


def test_ranks_with_different_modes_agree(build, quiet_trainer):
    """Against the contract of the data, but harmless: gradients are those of both batches."""
    module, reference = build(), build()
    trainer = quiet_trainer(max_steps=1, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    trainer.fit(module, loader(ByRank([[batch("pixel", (9, 8)), batch("text", (6, 3))]])))
    (npp, patches), _ = manual(reference.net, batch("pixel", (9, 8)))
    _, (ntp, count) = manual(reference.net, batch("text", (6, 3)))
    (0.5 * npp / patches + 0.5 * ntp / count).backward()
    SGD(reference.net.parameters()).step()
    assert_same_weights(module, reference.net, 1e-5)


@pytest.mark.parametrize("strategy", ["auto", "ddp_fork"])
def test_parts_that_no_batch_uses_stay_as_they_are(build, quiet_trainer, strategy):
    """Weight decay and momentum of the mode before would otherwise move them."""
    adam = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
    module = build(optimizer=adam)
    before = copy.deepcopy(module.net.state_dict())
    ranks = 1 if strategy == "auto" else 2
    rows = batch("pixel", (5, 5), width=6)
    data = [{key: value[row] for key, value in rows.items()} for row in (0, 1)] * ranks
    trainer = quiet_trainer(max_epochs=2, devices=ranks, strategy=strategy)
    trainer.fit(module, DataLoader(data, batch_size=2))
    moved = {name for name, value in module.net.state_dict().items() if not torch.equal(value, before[name])}
    assert set(before) - moved == {"model.embed_tokens.weight", "lm_token_head.weight"}


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_weighs_targets_not_batches(module, quiet_trainer, stage):
    pixel = [batch("pixel", (12, 9)), batch("pixel", (3,), 1)]
    text = [batch("text", (12, 9), 2), batch("text", (4,), 3)]
    pair = [batch("pair", (7, 5), 4)]
    trainer = quiet_trainer()
    for _ in range(2):  # totals start anew
        (metrics,) = getattr(trainer, stage)(module, loader(pixel + text + pair), verbose=False)
    prefix = "val" if stage == "validate" else "test"
    sums = {
        name: [manual(module.net, rows) for rows in rows]
        for name, rows in (("pixel", pixel), ("text", text), ("pair", pair))
    }

    def mean(kind, *names):
        parts = [rows[kind] for name in names for rows in sums[name]]
        return float(sum(part[0] for part in parts) / sum(part[1] for part in parts))

    assert metrics[f"{prefix}/pixel/npp"] == pytest.approx(mean(0, "pixel"), rel=1e-5)
    assert metrics[f"{prefix}/pair/npp"] == pytest.approx(mean(0, "pair"), rel=1e-5)
    assert metrics[f"{prefix}/text/ntp"] == pytest.approx(mean(1, "text"), rel=1e-5)
    assert metrics[f"{prefix}/pair/ntp"] == pytest.approx(mean(1, "pair"), rel=1e-5)
    assert metrics[f"{prefix}/text/perplexity"] == pytest.approx(math.exp(mean(1, "text")), rel=1e-4)
    rows = 8
    expected = 5 / rows * mean(0, "pixel", "pair") + 5 / rows * mean(1, "text", "pair")
    assert metrics[f"{prefix}/loss"] == pytest.approx(expected, rel=1e-5)


def test_only_modes_that_occur_are_logged(module, quiet_trainer):
    (metrics,) = quiet_trainer().validate(module, loader([batch("text")]), verbose=False)
    assert metrics.keys() == {"val/loss", "val/text/ntp", "val/text/perplexity", "val/text/bits_per_byte"}


def test_bits_per_byte_are_those_of_the_text(module, quiet_trainer):
    text = "A dull film; Zoë sleeps."
    ids = torch.tensor([[1, *module.tokenizer(text)["input_ids"], 2]])
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    (metrics,) = quiet_trainer().validate(module, loader([rows]), verbose=False)
    _, (nll, _) = manual(module.net, rows)
    expected = float(nll) / math.log(2) / len(text.encode())
    assert metrics["val/text/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    told = rows | {"num_bytes": torch.tensor([10])}
    (metrics,) = quiet_trainer().validate(module, loader([told]), verbose=False)
    assert metrics["val/text/bits_per_byte"] == pytest.approx(float(nll) / math.log(2) / 10, rel=1e-5)


def test_several_validation_loaders_are_one_set(module, quiet_trainer):
    loaders = [loader([batch("pixel")]), loader([batch("text")])]
    apart = quiet_trainer().validate(module, loaders, verbose=False)[0]
    together = quiet_trainer().validate(module, loader([batch("pixel"), batch("text")]), verbose=False)[0]
    assert apart == together


def test_padding_has_no_influence(module):
    wide = batch("pair", (6, 3))
    narrow = {key: value[1:] for key, value in wide.items()}
    narrow |= {key: narrow[key][:, :4] for key in ("pixel_mask",)} | {
        "pixel_values": narrow["pixel_values"][..., : 4 * P]
    }
    narrow |= {key: narrow[key][:, :2] for key in ("input_ids", "attention_mask", "labels")}
    noisy = copy.deepcopy(wide)
    noisy["pixel_values"][1, ..., 4 * P :] = 17
    noisy["input_ids"][1, 2:] = 77
    module.net.eval()
    with torch.no_grad():
        wide, narrow, noisy = (module.predict_step(rows, 0) for rows in (wide, narrow, noisy))
    for name in ("npp", "ntp"):
        assert wide[name][1] == pytest.approx(float(narrow[name][0]), rel=1e-5)
        assert wide[name][1] == noisy[name][1]


@pytest.mark.parametrize("mode", ["pixel", "text", "pair"])
def test_prediction_rates_rows_and_reads_strips(build, quiet_trainer, mode):
    module = build(max_read_tokens=3)
    rows = batch(mode, (9, 4, 6))
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    pixel, text = {"npp", "patches", "read"}, {"ntp", "perplexity", "tokens", "text"}
    assert prediction.keys() == {"pixel": pixel, "text": text, "pair": pixel | text}[mode]
    single = {key: value[1:2] for key, value in rows.items()}
    (npp, patches), (ntp, count) = manual(module.net, single)
    if mode != "text":
        assert prediction["npp"][1].item() == pytest.approx(float(npp / patches), rel=1e-5)
        assert prediction["patches"].tolist() == [9, 4, 6]
        ids = module.net.read(rows["pixel_values"], rows["pixel_mask"], max_new_tokens=3)
        assert prediction["read"] == module.tokenizer.batch_decode(ids, skip_special_tokens=True)
    if mode != "pixel":
        assert prediction["ntp"][1].item() == pytest.approx(float(ntp / count), rel=1e-5)
        assert prediction["tokens"].tolist() == [7, 2, 4]
        assert prediction["text"][1] == module.tokenizer.decode(rows["input_ids"][1, 1:2])


def test_prediction_needs_no_labels_and_no_tokenizer(build, quiet_trainer):
    unlabelled = batch("text")
    labelled = quiet_trainer().predict(build(), loader([batch("text")]))[0]
    del unlabelled["labels"]
    assert torch.equal(quiet_trainer().predict(build(), loader([unlabelled]))[0]["ntp"], labelled["ntp"])
    assert quiet_trainer().predict(build(tokenizer=False), loader([batch("pixel")]))[0].keys() == {"npp", "patches"}


def test_samples_are_texts_read_and_true(build, quiet_trainer):
    module = build(max_read_tokens=2)
    assert module.samples() == []
    ids = torch.tensor([[1, *module.tokenizer("A dog")["input_ids"], 2]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for mode, keys in (("pair", ["text", "read", "ntp"]), ("text", ["text", "ntp"]), ("pixel", ["read"])):
        rows = {"pair": strips([4]) | text, "text": text, "pixel": strips([4] * 6)}[mode]
        quiet_trainer().validate(module, loader([rows]), verbose=False)
        samples = module.samples()
        assert len(samples) == min(4, _rows(rows))
        assert list(samples[0]) == keys
        assert samples[0].get("text", "A dog") == "A dog"
    assert module.net.training
    module.max_read_tokens = 0
    assert module.samples() == []


def _rows(rows):
    return len(next(iter(rows.values())))


def test_strips_show_predictions_under_the_truth(module, quiet_trainer):
    assert module.strips() == {}
    rows = batch("pixel", (5, 2))
    quiet_trainer().validate(module, loader([rows]), verbose=False)
    images = module.strips()
    assert {name: image.shape for name, image in images.items()} == {"row 0": (9, 24), "row 1": (9, 12)}
    first = images["row 0"]
    assert torch.equal(torch.from_numpy(first[:P]), rows["pixel_values"][0, 0])
    assert (first[P] == 128).all()
    assert (first[P + 1 :, :P] == 128).all()  # nothing predicts the first patch
    patches = functional.patchify(rows["pixel_values"].float() / 255, P)
    guess = module.net(rows["pixel_values"], rows["pixel_mask"]).pixel_pred[0, 1].view(P, P)
    shown = guess * (patches[0, 2].var() + 1e-6).sqrt() + patches[0, 2].mean()
    expected = (shown.clamp(0, 1) * 255).round().byte()
    assert torch.equal(torch.from_numpy(first[P + 1 :, 2 * P : 3 * P]), expected)
    assert (first[P + 1 :, P : 2 * P] >= 254).all()  # a white patch has no contrast to show
    module.strip_scale = "none"
    raw = (guess.clamp(0, 1) * 255).round().byte()
    assert torch.equal(torch.from_numpy(module.strips()["row 0"][P + 1 :, 2 * P : 3 * P]), raw)
    quiet_trainer().validate(module, loader([batch("pixel", (3,)), batch("text")]), verbose=False)
    assert [image.shape for image in module.strips().values()] == [(9, 16)]  # of the newest batch that has strips
    quiet_trainer().validate(module, loader([batch("text")]), verbose=False)
    assert module.strips() == {}


def test_strips_in_colour(build, quiet_trainer):
    module = build(overrides={"num_channels": 3})
    rows = strips([3], channels=3)
    quiet_trainer(max_steps=1).fit(module, loader([rows]))
    image = module.strips()["row 0"]
    assert image.shape == (9, 16, 3)
    assert torch.equal(torch.from_numpy(image[:P]).permute(2, 0, 1), rows["pixel_values"][0])


# -- runs ------------------------------------------------------------------------------------------------------------

MODES = ("pixel", "text", "pair", "pixel", "text", "pair")


def test_loss_falls_and_checkpoint_resumes_bitwise_in_mid_epoch(build, quiet_trainer, tmp_path):
    adam = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    options = {"configured": False, "optimizer": adam, "weights": ObjectiveWeights(pixel=20.0)}
    batches = [batch(mode, seed=seed) for seed, mode in enumerate(MODES)]
    recorder = Recorder()
    whole = build(**options)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=225, save_top_k=-1)
    quiet_trainer(max_epochs=40, callbacks=[recorder, saver], enable_checkpointing=True).fit(
        whole, ResumableLoader(batches, batch_size=None)
    )
    for key in ("train/pixel/npp", "train/text/ntp", "train/pair/npp", "train/pair/ntp"):
        assert recorder.values[-1][key] < 0.7 * recorder.values[5][key], key
    resumed, again = build(**options), Recorder()
    trainer = quiet_trainer(max_epochs=40, callbacks=[again])
    trainer.fit(resumed, ResumableLoader(batches, batch_size=None), ckpt_path=tmp_path / "step=225.ckpt")
    assert again.values[0] == recorder.values[225]  # also of the kinds of which there was no batch yet
    for (name, one), two in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("pair_layout", ["compact", "padded"])
def test_bfloat16_precision(build, quiet_trainer, pair_layout):
    overrides = {"pair_layout": pair_layout}
    batches = [batch(mode, seed=seed) for seed, mode in enumerate(MODES)]
    half, full = (build(overrides=overrides) for _ in range(2))
    recorders = [Recorder(), Recorder()]
    for module, precision, recorder in zip((half, full), ("bf16-mixed", "32-true"), recorders, strict=True):
        quiet_trainer(max_epochs=1, precision=precision, callbacks=[recorder]).fit(
            module, loader(batches), loader(batches)
        )
    for key, value in recorders[1].values[-1].items():
        assert recorders[0].values[-1][key] == pytest.approx(value, rel=0.05), key
    assert half.net.lm_pixel_head.weight.dtype == torch.float32


def test_checkpoint_and_export_hold_everything(build, quiet_trainer, tmp_path):
    module = build(weights=ObjectiveWeights(text=0.5))
    trainer = quiet_trainer(max_steps=2, callbacks=[EMA(0.5)])
    trainer.fit(module, loader([batch("pair"), batch("pixel")]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not [
        key for key in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"] if key[:3] not in ("net", "ema")
    ]
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(loaded) is LitPixelLM
    assert loaded.weights == ObjectiveWeights(text=0.5)
    folders = loaded.export_pretrained(tmp_path)
    assert folders.keys() == {"model", "ema"}
    assert (folders["model"] / "tokenizer.json").is_file()
    again = LitPixelLM(FromPixelPretrained(str(folders["model"])), str(folders["model"]))
    again.configure_model()
    assert_same_weights(again, module.net, 0)
    assert not torch.equal(loaded.ema.lm_pixel_head.weight, loaded.net.lm_pixel_head.weight)
    assert build(tokenizer=False).export_pretrained(tmp_path / "plain")["model"].is_dir()


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, amsgrad=True),
        partial(torch.optim.Adam, lr=0.1, weight_decay=0.5),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
def test_completed_optimizer_state_changes_no_step(factory):
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    plain, completed = ([torch.nn.Parameter(row.clone()) for row in start] for _ in range(2))
    optimizers = [factory(plain), factory(completed)]
    complete_state(optimizers[1])
    assert len(optimizers[1].state) == 2
    for parameters, optimizer in zip((plain, completed), optimizers, strict=True):
        for step in range(4):
            if step == 2:
                complete_state(optimizers[1])  # of a resumed run: there is nothing to do
            parameters[0].grad = parameters[0].detach() - step
            parameters[1].grad = None if step < 2 else parameters[1].detach() + step
            optimizer.step()
    for one, two in zip(plain, completed, strict=True):
        assert torch.equal(one, two)
    assert optimizers[1].param_groups[0]["lr"] == 0.1


# -- configurations of the paper -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shares", "steps"),
    [
        ("pixelgpt", {"image": 1}, 51750),
        ("textgpt", {"text": 1}, 61000),
        ("monogpt", {"image": 1, "text": 1}, 12500),
        ("dualgpt", {"image": 4, "text": 4, "pair": 2}, 9625),
    ],
)
def test_models_of_the_paper(capsys, model, shares, steps):
    names = (f"pixel/model-{model}.yaml", "pixel/data-c4.yaml", "trainer/fsdp2.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *(argument for name in names for argument in ("--config", name)), "--print_config"])
    printed, error = capsys.readouterr()
    assert stop.value.code == 0, error
    config = yaml.safe_load(printed)
    arguments, options, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (arguments["tokenizer"] is None) == (model == "pixelgpt")
    assert options["tokenizer"] == arguments["tokenizer"]
    assert options["modes"] == shares
    assert (options["renderer"]["init_args"]["colour"], options["renderer"]["init_args"]["max_seq_length"]) == (
        "rgb",
        1024,
    )
    assert options["batch_size"] * trainer["accumulate_grad_batches"] * 8 == 8192
    assert (trainer["max_steps"], trainer["gradient_clip_val"]) == (steps, 1.0)
    optimizer, schedule = arguments["optimizer"]["init_args"], arguments["lr_scheduler"]["init_args"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (3e-4, [0.9, 0.95], 0.1)
    assert (schedule["warmup"], schedule["floor"], schedule["total"]) == (2000, 0.1, None)
    with torch.device("meta"):
        net = FromPixelConfig(**arguments["backbone"]["init_args"]).build()
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == 350.3


# -- errors ----------------------------------------------------------------------------------------------------------


def test_configure_model_runs_once(module):
    net = module.net
    module.configure_model()
    assert module.net is net
    assert net.training


def test_modes_are_told_by_the_keys():
    assert [batch_mode(batch(mode)) for mode in ("pixel", "text", "pair")] == ["pixel", "text", "pair"]


@pytest.mark.parametrize("missing", ["pixel_mask", "pixel_values", "attention_mask", "input_ids"])
def test_keys_without_a_mode_are_refused(missing):
    rows = batch("pair")
    del rows[missing]
    with pytest.raises(ValueError, match="has no mode; strips need pixel_values and pixel_mask"):
        batch_mode(rows)
    with pytest.raises(ValueError, match="has no mode"):
        batch_mode({"images": 0})
    with pytest.raises(ValueError, match="has no mode"):
        batch_mode(strips([2]) | {"labels": tokens([2])["labels"]})


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        (tokens([4]), False, r"model\.tokenizer: the batches hold tokens; set it to the tokenizer of the data"),
        (strips([4], channels=3), True, r"data\.renderer\.colour: .* the model reads 1 channels"),
        (
            {"pixel_values": torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "pixel_mask": torch.ones(1, 1)},
            True,
            r"data\.renderer\.patch_size: the strips are 8 x 8 pixels, but the model reads strips 4 high",
        ),
        (strips([4]) | {"pixel_mask": torch.ones(1, 3)}, True, r"pixel_mask has shape \(1, 3\) for 1 strips of 5"),
        ({key: value for key, value in tokens([4]).items() if key != "labels"}, True, "tokens without labels"),
    ],
)
def test_batches_that_do_not_fit_are_refused(build, quiet_trainer, rows, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(build(tokenizer=tokenizer), loader([rows]))


def test_vocabulary_larger_than_the_model_is_refused(build):
    with pytest.raises(ValueError, match=r"model\.tokenizer: .* has 300 tokens, but PixelForCausalLM embeds only 200"):
        build(overrides={"vocab_size": 200})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel": -1.0}, r"model\.weights\.pixel must be at least 0, got -1\.0"),
        ({"stop": -1.0}, r"model\.weights\.stop must be at least 0, got -1\.0"),
        ({"pixel": 0.0, "text": 0.0}, r"model\.weights: pixel and text are both 0"),
    ],
)
def test_weights_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveWeights(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_read_tokens": -1}, r"model\.max_read_tokens must be at least 0, got -1"),
        ({"strip_scale": "true"}, r"model\.strip_scale must be target or none, got 'true'"),
    ],
)
def test_options_out_of_range_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
