import copy
import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from callbacks.samples import as_rows
from lit_models.pixel.finetune import LitPixelTask, Meter
from lit_models.pixel.mae_recipes import FromPIXELConfig
from lit_models.pixel.recipes import FromPixelConfig, FromPixelPretrained

SIDE = 8
TINY = {
    "image_size": [SIDE, 12 * SIDE],
    "patch_size": SIDE,
    "num_channels": 1,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_PIXEL = {
    "image_size": [SIDE, 16 * SIDE],
    "patch_size": SIDE,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
INPUTS = ["pixel", "text", "pair"]


def batch(kind="pixel", lengths=(9, 4, 6), tokens=(5, 7, 3), seed=0, labels=2, task="classification", width=None):
    """Strips of so many attended patches, and rows of so many tokens; the label is seen in both."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    label = torch.randint(0, labels, (rows,), generator=generator)
    made = {}
    if kind != "text":
        longest = width or max(lengths)
        pixels = torch.randint(0, 256, (rows, 1, SIDE, longest * SIDE), generator=generator, dtype=torch.uint8)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        pixels[:, 0, 0] = 255 * label[:, None].to(torch.uint8)
        shown = mask.repeat_interleave(SIDE, 1)[:, None, None].bool()
        made |= {"pixel_values": torch.where(shown, pixels, 255).to(torch.uint8), "pixel_mask": mask}
        made["num_text_patches"] = torch.tensor(lengths) - 1
    if kind != "pixel":
        longest = max(tokens[:rows])
        mask = (torch.arange(longest) < torch.tensor(tokens[:rows])[:, None]).long()
        ids = torch.randint(10, 300, mask.shape, generator=generator)
        ids[:, 1] = 3 + label
        made |= {"input_ids": ids * mask, "attention_mask": mask}
    if task == "tagging":
        words = torch.arange(3).repeat(rows, 1) * 2
        last = torch.arange(rows)[:, None] % 2 == 0
        gone = last & (torch.arange(3) == 2)  # every other row has two words
        tags = torch.randint(0, labels, words.shape, generator=generator)
        tags[0, 0] = -100  # a word without a tag
        return made | {"word_patches": words.masked_fill(gone, 0), "tags": tags.masked_fill(gone, -100)}
    if task == "regression":
        label = torch.randn(rows, generator=generator)
    return made | {"label": label}


def loader(batches):
    return DataLoader(batches, batch_size=None)


def network_input(rows):
    keys = ("pixel_values", "pixel_mask", "input_ids", "attention_mask", "word_patches")
    return {key: rows[key] for key in keys if key in rows}


def manual_loss(net, rows):
    logits = net(**network_input(rows)).logits
    if "tags" in rows:
        return cross_entropy(logits.flatten(0, 1), rows["tags"].flatten(), ignore_index=-100)
    if logits.shape[1] == 1:
        return mse_loss(logits[:, 0], rows["label"])
    return cross_entropy(logits, rows["label"])


class Recorder(Callback):
    def __init__(self):
        self.losses, self.tokens = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.tokens.append(module.step_stats()["tokens"])


@pytest.fixture
def make(tiny_tokenizer):
    """Function that makes a module with a network."""

    def build(**options):
        backbone = options.pop("backbone", FromPixelConfig(TINY))
        if options.get("task") != "regression" and "labels" not in options and "num_labels" not in options:
            options["labels"] = ["no", "yes"]
        options = {"tokenizer": str(tiny_tokenizer), "optimizer": SGD} | options
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = LitPixelTask(backbone, **options)
            module.configure_model()
        return module

    return build


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_training_takes_the_gradient_of_the_mean_over_rows(make, quiet_trainer, kind):
    module, rows, recorder = make(), batch(kind), Recorder()
    reference = copy.deepcopy(module.net)
    assert module.step_stats() == {}
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    loss = manual_loss(reference, rows)
    assert recorder.losses == [pytest.approx(loss.item(), abs=1e-5)]
    assert recorder.tokens == [{"pixel": 19, "text": 15, "pair": 34}[kind]]
    loss.backward()
    SGD(reference.parameters()).step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", ["regression", "tagging"])
def test_other_tasks_train_on_their_own_loss(make, quiet_trainer, task):
    module, rows, recorder = make(task=task), batch(task=task), Recorder()
    reference = copy.deepcopy(module.net)
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    assert recorder.losses == [pytest.approx(manual_loss(reference, rows).item(), abs=1e-5)]


def test_accumulated_batches_weigh_every_tag_alike(make, quiet_trainer):
    module = make(task="tagging")
    reference = copy.deepcopy(module.net)
    sizes = [(9, 8), (5, 6, 7, 8), (9, 9)]  # the last window holds one batch
    batches = [batch(lengths=size, task="tagging", seed=seed) for seed, size in enumerate(sizes)]
    quiet_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(batches))
    optimizer = SGD(reference.parameters())
    for window in (batches[:2], batches[2:]):
        counts = [int((rows["tags"] != -100).sum()) for rows in window]
        optimizer.zero_grad()
        losses = [count * manual_loss(reference, rows) for count, rows in zip(counts, window, strict=True)]
        (sum(losses) / sum(counts)).backward()
        optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", INPUTS)
def test_it_learns_and_resumes_bitwise(make, quiet_trainer, tmp_path, kind):
    batches = [batch(kind, lengths=(9, 4, 6, 8), tokens=(5, 7, 3, 4), seed=seed) for seed in range(4)]
    recorder = Recorder()
    whole = make(optimizer=ADAM)
    saving = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = quiet_trainer(max_epochs=8, callbacks=[recorder, saving], enable_checkpointing=True)
    trainer.fit(whole, loader(batches), loader(batches))
    assert sum(recorder.losses[-4:]) / 4 < 0.5 * sum(recorder.losses[:4]) / 4
    assert float(trainer.callback_metrics["val/accuracy"]) > 0.9
    resumed = make(optimizer=ADAM)
    quiet_trainer(max_epochs=8).fit(resumed, loader(batches), loader(batches), ckpt_path=tmp_path / "epoch=4.ckpt")
    for (name, one), two in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_bfloat16_keeps_losses_and_scores_in_float32(make, quiet_trainer):
    module, recorder = make(), Recorder()
    rows = batch("pair")
    exact = float(manual_loss(module.net, rows))
    quiet_trainer(max_steps=1, precision="bf16-mixed", callbacks=[recorder]).fit(module, loader([rows]))
    assert recorder.losses[0] == pytest.approx(exact, abs=0.02)
    (prediction,) = quiet_trainer(precision="bf16-mixed").predict(module, loader([rows]))
    assert prediction["probabilities"].dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in module.net.parameters())


class Uneven(LightningDataModule):
    """Two sets; the second rank has no row of the second one."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def val_dataloader(self):
        first = self.trainer.global_rank == 0
        part = {key: value[:2] if first else value[2:] for key, value in self.rows.items()}
        return [loader([part]), loader([self.rows] if first else [])]


def test_ranks_without_rows_do_not_spoil_correlations(make, quiet_trainer):
    module = make(task="regression")
    rows = batch(lengths=(9, 4, 6, 8, 7), task="regression")
    trainer = quiet_trainer(devices=2, strategy="ddp_fork")
    trainer.validate(module, datamodule=Uneven(rows), verbose=False)
    (alone,) = quiet_trainer().validate(module, loader([rows]), verbose=False)
    assert set(alone) == {"val/loss", "val/spearman", "val/pearson"}
    for key, value in alone.items():
        for name in (key, key.replace("val", "val/0"), key.replace("val", "val/1")):
            assert float(trainer.callback_metrics[name]) == pytest.approx(value, abs=1e-5), name


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_rows_without_padding_are_pooled_where_they_end(make, kind):
    module = make()
    module.eval()
    rows = batch(kind)  # the first strip and the second row of tokens fill the whole width
    scores = module(rows)
    for number in range(3):
        alone = {key: value[number : number + 1] for key, value in rows.items()}
        if "pixel_mask" in rows:
            length = int(rows["pixel_mask"][number].sum())
            alone["pixel_mask"] = alone["pixel_mask"][:, :length]
            alone["pixel_values"] = alone["pixel_values"][..., : length * SIDE]
        if "input_ids" in rows:
            length = int(rows["attention_mask"][number].sum())
            alone |= {key: alone[key][:, :length] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(module(alone)[0], scores[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_weighs_rows_not_batches(make, quiet_trainer, stage):
    module = make(num_labels=3, labels=None, metrics=["accuracy", "mcc", "f1"])
    whole = batch(lengths=(9, 4, 6, 8, 7, 5, 3), labels=3)
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 5), slice(5, 7))]
    trainer = quiet_trainer()
    for _ in range(2):  # numbers start anew
        (metrics,) = getattr(trainer, stage)(module, loader(parts), verbose=False)
    key = "val" if stage == "validate" else "test"
    predictions = module(whole).argmax(1)
    assert metrics[f"{key}/loss"] == pytest.approx(float(manual_loss(module.net, whole)), abs=1e-5)
    assert metrics[f"{key}/accuracy"] == pytest.approx(float((predictions == whole["label"]).float().mean()))
    assert set(metrics) == {f"{key}/{name}" for name in ("loss", "accuracy", "mcc", "f1")}


def test_classification_metrics_by_hand():
    meter = Meter(["accuracy", "mcc", "f1"], 2)
    predictions, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    meter.update(torch.arange(5.0), predictions, labels)
    meter.update(torch.zeros(0), predictions[:0], labels[:0])
    # Two hits, one miss and one false alarm of label 1, and one correct rejection.
    expected = {"loss": 2.0, "accuracy": 3 / 5, "f1": 2 / 3, "mcc": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}
    assert meter.compute() == pytest.approx(expected)
    macro = Meter(["f1"], 3)
    macro.update(torch.zeros(4), torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    assert macro.compute()["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations_by_hand():
    meter = Meter(["spearman", "pearson"], 1)
    predictions, labels = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    for half in (slice(0, 2), slice(2, 4)):
        meter.update(torch.ones(2), predictions[half], labels[half])
    expected = torch.corrcoef(torch.stack([predictions, labels]))[0, 1]
    assert meter.compute() == pytest.approx({"loss": 1.0, "spearman": 1 - 6 * 2 / (4 * 15), "pearson": float(expected)})


def test_correlation_with_a_constant_counts_as_zero():
    meter = Meter(["spearman", "pearson"], 1)
    meter.update(torch.ones(4), torch.full((4,), 2.0), torch.arange(4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.compute() == {"loss": 1.0, "spearman": 0.0, "pearson": 0.0}


def test_several_sets_have_their_own_numbers_and_a_mean(make, quiet_trainer):
    module = make(val_names=["m", "mm"])
    one, two = batch(seed=1), batch(lengths=(5, 6, 7, 8), seed=2)
    (m,) = quiet_trainer().validate(make(), loader([one]), verbose=False)
    (mm,) = quiet_trainer().validate(make(), loader([two]), verbose=False)
    trainer = quiet_trainer()
    trainer.validate(module, [loader([one]), loader([two])], verbose=False)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    expected = {}
    for name in ("loss", "accuracy"):
        values = m[f"val/{name}"], mm[f"val/{name}"]
        expected |= {f"val/m/{name}": values[0], f"val/mm/{name}": values[1], f"val/{name}": sum(values) / 2}
    assert found == pytest.approx(expected)


class Languages(LightningDataModule):
    loader_names = {"val": ["validation"], "test": ["de", "en"]}  # noqa: RUF012

    def train_dataloader(self):
        return loader([batch()])

    def val_dataloader(self):
        return loader([batch()])

    def test_dataloader(self):
        return [loader([batch(seed=1)]), loader([batch(seed=2)])]


def test_names_come_from_the_data_module(make, quiet_trainer):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(make(), Languages())
    assert {key for key in trainer.callback_metrics if key.startswith("val")} == {"val/loss", "val/accuracy"}
    trainer = quiet_trainer()
    trainer.test(make(), Languages(), verbose=False)
    assert {"test/de/accuracy", "test/en/accuracy", "test/accuracy"} <= set(trainer.callback_metrics)
    trainer = quiet_trainer()
    trainer.test(make(), [loader([batch()]), loader([batch()])], verbose=False)
    assert {"test/0/accuracy", "test/1/accuracy", "test/accuracy"} <= set(trainer.callback_metrics)


def test_early_stopping_and_best_checkpoint_follow_a_metric(make, quiet_trainer, tmp_path):
    callbacks = [
        EarlyStopping("val/m/accuracy", mode="max", patience=1),
        ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max"),
    ]
    trainer = quiet_trainer(max_epochs=50, callbacks=callbacks, enable_checkpointing=True)
    module = make(val_names=["m", "mm"], optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer.fit(module, loader([batch()]), [loader([batch(seed=1)]), loader([batch(seed=2)])])
    assert trainer.current_epoch == 2
    assert callbacks[1].best_model_path


def test_tagging_numbers_leave_padding_out(make, quiet_trainer):
    module = make(task="tagging", labels=["A", "B", "C"])
    rows = batch(task="tagging", labels=3)
    (metrics,) = quiet_trainer().validate(module, loader([rows]), verbose=False)
    counted = rows["tags"] != -100
    assert counted.sum() == 6
    right = module(rows).argmax(-1)[counted] == rows["tags"][counted]
    assert metrics["val/accuracy"] == pytest.approx(float(right.float().mean()))
    assert metrics["val/loss"] == pytest.approx(float(manual_loss(module.net, rows)), abs=1e-5)


# -- predictions and samples -----------------------------------------------------------------------------------------


def test_prediction_names_labels(make, quiet_trainer):
    module = make(labels=["low", "middle", "high"])
    rows = batch()
    rows["label"] = torch.full_like(rows["label"], -1)  # hidden
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    probabilities = module(rows).softmax(-1)
    torch.testing.assert_close(prediction["probabilities"], probabilities)
    assert prediction["prediction"] == [["low", "middle", "high"][number] for number in probabilities.argmax(1)]
    torch.testing.assert_close(prediction["probability"], probabilities.amax(1))
    assert [sorted(row) for row in as_rows(prediction)] == 3 * [["prediction", "probabilities", "probability"]]


def test_prediction_of_numbers_and_tags(make, quiet_trainer):
    module = make(task="regression")
    rows = batch(task="regression")
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    torch.testing.assert_close(prediction["prediction"], module(rows)[:, 0])
    tagger = make(task="tagging", labels=["A", "B", "C"])
    rows = batch(task="tagging", labels=3)
    (prediction,) = quiet_trainer().predict(tagger, loader([rows]))
    best = tagger(rows).argmax(-1)
    names = [["ABC"[number] for number in row] for row in best]
    assert prediction["prediction"] == [names[0][:2], names[1], names[2][:2]]
    assert [len(row) for row in prediction["probability"]] == [2, 3, 2]
    marked = rows | {"word_patches": rows["word_patches"].masked_fill(rows["tags"] == -100, -100)}
    marked["word_patches"][0, 0] = 0
    (same,) = quiet_trainer().predict(tagger, loader([marked]))
    assert same["prediction"] == prediction["prediction"]


def test_several_sets_can_be_predicted(make, quiet_trainer):
    predictions = quiet_trainer().predict(make(), [loader([batch(seed=1)]), loader([batch(seed=2)])])
    assert [len(prediction[0]["prediction"]) for prediction in predictions] == [3, 3]


def test_samples_show_label_prediction_and_text(make, quiet_trainer):
    module = make()
    assert module.samples() == []
    rows = batch("pair")
    quiet_trainer().validate(module, loader([rows]), verbose=False)
    shown = module.samples()
    best = module(rows).argmax(1)
    assert [row["label"] for row in shown] == [["no", "yes"][number] for number in rows["label"]]
    assert [row["prediction"] for row in shown] == [["no", "yes"][number] for number in best]
    assert [row["text"] for row in shown] == [
        module.tokenizer.decode(rows["input_ids"][i][:n]) for i, n in enumerate((5, 7, 3))
    ]
    tagger = make(task="tagging", labels=["A", "B"])
    rows = batch(task="tagging")
    quiet_trainer().validate(tagger, loader([rows]), verbose=False)
    shown = tagger.samples()[1]
    assert shown["label"] == " ".join("AB"[number] for number in rows["tags"][1])
    assert set(shown) == {"label", "prediction"}
    numbers = make(task="regression")
    rows = batch(task="regression", lengths=(9, 4, 6, 8, 7))
    quiet_trainer().validate(numbers, loader([rows]), verbose=False)
    assert [row["label"] for row in numbers.samples()] == pytest.approx(rows["label"][:4].tolist())


# -- export, linear probes, PIXEL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "regression", "tagging"])
def test_export_reloads_with_head_and_labels(make, quiet_trainer, tmp_path, task):
    module = make(task=task)
    rows = batch(task=task)
    quiet_trainer(max_steps=2).fit(module, loader([rows, rows]))
    folder = module.export_pretrained(tmp_path)["model"]
    auto = AutoModelForTokenClassification if task == "tagging" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder).eval()
    module.eval()
    torch.testing.assert_close(loaded(**network_input(rows)).logits, module(rows), rtol=1e-5, atol=1e-6)
    assert loaded.config.id2label == ({0: "LABEL_0"} if task == "regression" else {0: "no", 1: "yes"})
    again = make(task=task, backbone=FromPixelPretrained(str(folder)))
    again.eval()
    torch.testing.assert_close(again(rows), module(rows), rtol=1e-5, atol=1e-6)


def test_a_language_model_is_the_start(make, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FromPixelConfig(TINY).build()
    model.save_pretrained(tmp_path)
    module = make(backbone=FromPixelPretrained(str(tmp_path)))
    for name, value in model.model.state_dict().items():
        assert torch.equal(module.net.model.get_parameter(name), value), name


def test_a_checkpoint_file_is_not_a_folder():
    module = LitPixelTask(FromPixelPretrained("runs/pixel/last.ckpt"), num_labels=2)
    with pytest.raises(ValueError, match=r"model\.backbone\.name: 'runs/pixel/last\.ckpt' .* lit_models\.export"):
        module.configure_model()


def test_a_head_with_other_labels(make, tmp_path):
    FromPixelConfig(TINY).build_classifier(3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.labels or model\.num_labels: the head in .* does not have 2 outputs"):
        make(backbone=FromPixelPretrained(str(tmp_path)))


@pytest.mark.parametrize("backbone", [FromPixelConfig(TINY), FromPIXELConfig(TINY_PIXEL)], ids=["gpt", "mae"])
def test_linear_probe_trains_the_head_alone(make, quiet_trainer, tmp_path, backbone):
    options = {"backbone": backbone, "linear_probe": True, "optimizer": ADAM, "tokenizer": None}
    module = make(**options)
    before = copy.deepcopy(module.net.state_dict())
    saving, modes = ModelCheckpoint(tmp_path, save_last=True), ModeRecorder()
    trainer = quiet_trainer(max_steps=3, callbacks=[saving, modes], enable_checkpointing=True, val_check_interval=1)
    trainer.fit(module, loader([batch(width=16)] * 3), loader([batch(width=16)]))
    prefix = module.net.base_model_prefix + "."
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(prefix), name
    named = {parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert named == {parameter for name, parameter in module.net.named_parameters() if not name.startswith(prefix)}
    assert modes.trunk == [False, False, False]
    loaded = LitPixelTask.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.linear_probe
    for name, value in module.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name
    resumed = make(**options)
    quiet_trainer(max_steps=4).fit(resumed, loader([batch(width=16)] * 4), ckpt_path=tmp_path / "last.ckpt")


class ModeRecorder(Callback):
    def __init__(self):
        self.trunk = []

    def on_train_batch_start(self, trainer, module, *_):
        self.trunk.append(module.net.base_model.training)
        assert module.net.training


def test_pixel_is_fine_tuned_like_the_others(make, quiet_trainer, tmp_path):
    module = make(backbone=FromPIXELConfig(TINY_PIXEL), tokenizer=None)
    rows = batch(width=16)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, loader([rows, rows]), loader([rows]))
    folder = module.export_pretrained(tmp_path)["model"]
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    module.eval()
    logits = loaded(rows["pixel_values"], rows["pixel_mask"]).logits
    torch.testing.assert_close(logits.float(), module(rows), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"data: PIXELForSequenceClassification reads strips only"):
        quiet_trainer().validate(module, loader([batch("pair", width=16)]), verbose=False)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"model\.labels: classification needs the names of the labels; give them, or model\.num_labels"),
        ({"num_labels": 1}, r"model\.num_labels: classification needs at least 2 labels, got 1; .* regression"),
        ({"labels": ["a", "b"], "num_labels": 3}, r"model\.num_labels: 3 differs from the 2 model\.labels"),
        ({"labels": ["a", "b", "a"]}, r"model\.labels: 'a' stands there twice"),
        ({"task": "regression", "num_labels": 2}, r"model\.num_labels: regression has one output, got 2; set it to 1"),
        ({"task": "regression", "labels": ["a"]}, r"model\.labels: regression predicts a number"),
        ({"num_labels": 2, "metrics": ["spearman"]}, r"model\.metrics: 'spearman' is not a metric of classification"),
        ({"task": "regression", "metrics": ["f1"]}, r"model\.metrics: 'f1' .* take some of spearman, pearson"),
        ({"num_labels": 2, "val_names": ["a", "a"]}, r"model\.val_names: \['a', 'a'\] must be different"),
        (
            {"num_labels": 2, "test_names": ["a/b"]},
            r"model\.test_names: \['a/b'\] must be different words without slash",
        ),
    ],
)
def test_contradicting_options(options, message):
    with pytest.raises(ValueError, match=message):
        LitPixelTask(FromPixelConfig(TINY), **options)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"label": torch.tensor([0, 1, 2])}, r"the data holds label 2, but labels go from 0 to 1"),
        ({}, {"label": torch.tensor([0, -1, 1])}, r"holds label -1, .* a split whose labels are public"),
        ({}, {"label": torch.rand(3)}, r"model\.task: the labels are real numbers; set it to regression"),
        ({"tokenizer": None}, {}, r"model\.tokenizer: the batches hold tokens; set it to the tokenizer of the data"),
        ({"task": "tagging"}, {}, r"model\.task: tagging needs word_patches in the batches"),
    ],
)
def test_batches_that_do_not_fit(make, quiet_trainer, options, change, message):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(make(**options), loader([batch("pair") | change]))


def test_tags_out_of_range_and_missing_labels(make, quiet_trainer):
    rows = batch(task="tagging", labels=5, seed=1)
    with pytest.raises(ValueError, match=r"holds label [234], but labels go from 0 to 1"):
        quiet_trainer(max_steps=1).fit(make(task="tagging"), loader([rows]))
    del rows["tags"]
    with pytest.raises(ValueError, match=r"model\.task: tagging needs tags in the batches"):
        quiet_trainer(max_steps=1).fit(make(task="tagging"), loader([rows]))
    assert len(quiet_trainer().predict(make(task="tagging"), loader([rows]))) == 1


@pytest.mark.parametrize("monitor", ["val/acc", "val/m/accuracy"])
def test_unknown_monitors_are_found_before_training(make, quiet_trainer, monitor):
    trainer = quiet_trainer(max_steps=1, callbacks=[EarlyStopping(monitor)])
    with pytest.raises(ValueError, match=rf"EarlyStopping\.monitor is '{monitor}', .* of val/loss, val/accuracy, or"):
        trainer.fit(make(), loader([batch()]), loader([batch()]))


@pytest.mark.parametrize("sanity", [0, 2])
def test_wrong_number_of_set_names(make, quiet_trainer, sanity):
    trainer = quiet_trainer(max_steps=5, num_sanity_val_steps=sanity)
    message = r"model\.val_names: there are 2 names, but the data has 1 sets for this"
    with pytest.raises(ValueError, match=message):
        trainer.fit(make(val_names=["m", "mm"]), loader([batch()]), loader([batch()]))
    assert trainer.global_step == 0
