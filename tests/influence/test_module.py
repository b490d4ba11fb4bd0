"""Fitting simulators under the Trainer: forms of batches, roll-outs, closed form, checkpoints."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import PredictionWriter
from lit_models.base import CheckpointMismatchError, LitBase
from lit_models.influence import LitInfluence, SimulatorOptions, functional, metrics, rows
from lit_models.influence.closed_form import Ridge
from lit_models.influence.modeling import InfluenceSimulator
from lit_models.influence.module import EarlyStop, RolloutLoss
from lit_models.nn import WarmupLinear

SGD = partial(torch.optim.SGD, lr=0.05)
ADAM = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
N, M, D, T, B = 10, 6, 5, 12, 3
RUNS = 14
SIZES = {"num_train": N, "num_test": M, "feature_dim": D, "lr_reference": 1e-3, "batch_reference": B}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TRAIN, TEST = draw(N, D), draw(M, D, seed=1)
RATE = torch.linspace(1.0, 0.2, T)


def truth(train=TRAIN, test=TEST):
    """Factors that made the runs: low-rank in the features."""
    W, U = draw(D, 2, seed=3), draw(D, 2, seed=4)
    return functional.Factors(0.01 * ((train @ W) @ (test @ U).T)[None], 0.02 * (train @ W.flip(1)) @ (test @ U).T)


def recorded(numbers, train=TRAIN, test=TEST, first=0):
    """Runs by number: the keys of evaluation."""
    generator = torch.Generator().manual_seed(99)
    ids = torch.randint(0, len(train), (RUNS, T, B), generator=generator)[numbers]
    start = 1 + 0.5 * torch.rand(RUNS, M, generator=generator)[numbers][:, : len(test)]
    rate = RATE.expand(len(numbers), -1)
    values = functional.rollout(start, ids, *truth(train, test), rate)
    return {"ids": ids + first, "values": values, "lr_scale": rate, "run": torch.tensor(numbers)}


TRAINING, VALIDATION, TESTING = list(range(8)), [8, 9], [10, 11, 12]


def matrix(runs, order=1):
    """The same runs in the matrix form."""
    batch = rows.run_rows(runs, order, "repeat")
    return {name: value for name, value in batch.items()}


def pairs(runs):
    """The same runs in the row form."""
    batch = matrix(runs)
    number = len(batch["ids"])
    return {
        "order_ids": batch["ids"].repeat_interleave(M, 0),
        "test_ids": torch.arange(M).repeat(number),
        "prev": batch["history"].transpose(1, 2).reshape(-1, 1),
        "target": batch["target"].flatten(),
        "lr_scale": batch["lr_scale"].repeat_interleave(M),
    }


def loader(batches):
    return DataLoader(batches, batch_size=None)


class Runs(LightningDataModule):
    """Recorded runs, with the attributes that the module asks for."""

    def __init__(self, train=None, val=None, test=None, predict=None):
        super().__init__()
        self.pool_ids, self.test_ids = list(range(N)), torch.arange(M)
        self.train_features, self.test_features = TRAIN.numpy(), TEST
        self.lr_reference, self.batch_reference = 1e-3, B
        self.batches = {
            "train": train or [matrix(recorded(TRAINING))],
            "val": val or [recorded(VALIDATION)],
            "test": test or [recorded(TESTING)],
            "predict": predict or [recorded([13])],
        }
        self.mean_trajectory = metrics.mean_trajectory(recorded(TRAINING)["values"])

    def train_dataloader(self):
        return loader(self.batches["train"])

    def val_dataloader(self):
        return loader(self.batches["val"])

    def test_dataloader(self):
        return loader(self.batches["test"])

    def predict_dataloader(self):
        return loader(self.batches["predict"])


class Recorder(Callback):
    """Logged values of every batch and validation."""

    def __init__(self):
        self.values, self.validations = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, module):
        self.validations.append(float(trainer.callback_metrics.get("val/all_steps_mse", math.nan)))


def build(configured=True, optimizer=SGD, options=None, **arguments):
    """A module with features; by itself, without data."""
    torch.manual_seed(5)
    options = SimulatorOptions(**({"width": 8} | (options or {})))
    module = LitInfluence(options, **(SIZES if configured else {}), optimizer=optimizer, **arguments)
    if configured:
        module.configure_model()
        if module.net.config.has_features:
            module.net.set_examples(train_features=TRAIN, test_features=TEST)
    return module


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrix", "pairs", "runs"])
def test_all_forms_train_the_same(quiet_trainer, form):
    runs = recorded(TRAINING)
    batch = {"matrix": matrix, "pairs": pairs, "runs": lambda runs: runs}[form](runs)
    module, recorder = build(), Recorder()
    reference = copy.deepcopy(module.net)
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([batch]))
    whole = matrix(runs)
    prediction = reference.forward_matrix(whole["ids"], whole["history"], whole["lr_scale"])
    loss = (prediction - whole["target"]).square().mean()
    assert recorder.values[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    SGD(reference.parameters()).step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["matrix", "pairs", "runs"])
def test_what_was_not_measured_does_not_count(quiet_trainer, form):
    """The same loss and gradient as without the rows and tests that are unknown."""
    runs = recorded([0, 1])
    runs["values"][0, 3, 2], runs["values"][1, 5:] = torch.nan, torch.nan
    batch = {"matrix": matrix, "pairs": pairs, "runs": lambda runs: runs}[form](runs)
    if form != "pairs":
        batch = {name: value.bfloat16() if name == "values" else value for name, value in batch.items()}
    module, recorder = build(), Recorder()
    reference = copy.deepcopy(module.net)
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([batch]))
    whole = matrix(runs if form == "pairs" else batch | {"values": batch["values"].float()} if form == "runs" else runs)
    with torch.no_grad():
        errors = reference.forward_matrix(whole["ids"], whole["history"], whole["lr_scale"]) - whole["target"]
    known = errors.isfinite()
    assert 0 < int(known.sum()) < known.numel()
    assert recorder.values[0]["train/loss"] == pytest.approx(float(errors[known].square().mean()), rel=1e-4)
    assert all(parameter.isfinite().all() for parameter in module.net.parameters())


def test_a_mask_leaves_entries_out(quiet_trainer):
    batch = matrix(recorded([0]))
    batch["mask"] = draw(T, M) > 0
    module, recorder = build(), Recorder()
    with torch.no_grad():
        errors = module.net.forward_matrix(batch["ids"], batch["history"], batch["lr_scale"]) - batch["target"]
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([batch]))
    assert recorder.values[0]["train/loss"] == pytest.approx(float(errors[batch["mask"]].square().mean()), rel=1e-5)


def test_released_penalty_is_part_of_the_loss(quiet_trainer):
    module = build(options={"kind": "linear", "compat": "released", "l2_norm": 0.5})
    reference, batch, recorder = copy.deepcopy(module.net), matrix(recorded([0])), Recorder()
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([batch]))
    mse = functional.masked_mse(reference.forward_matrix(batch["ids"], batch["history"]), batch["target"])
    assert recorder.values[0]["train/penalty"] == pytest.approx(reference.penalty().item())
    assert recorder.values[0]["train/loss"] == pytest.approx(mse.item(), rel=1e-5)
    (mse + reference.penalty()).backward()
    SGD(reference.parameters()).step()
    torch.testing.assert_close(module.net.emb.weight, reference.emb.weight)


def test_values_of_every_kth_step(quiet_trainer):
    """Rows of three steps with one target, the last one shorter: the loss of an unrolled simulator."""
    runs = recorded([0, 1])
    ids, rate = (runs[name][:, :11].clone() for name in ("ids", "lr_scale"))
    ids = torch.cat([ids, torch.full_like(ids[:, :1], -1)], 1)  # the last interval has two steps
    rate = torch.cat([rate, torch.ones(2, 1)], 1)
    batch = {
        "ids": ids.reshape(8, 3, B),
        "lr_scale": rate.reshape(8, 3),
        "history": runs["values"][:, [0, 3, 6, 9]].reshape(8, 1, M),
        "target": runs["values"][:, [3, 6, 9, 11]].reshape(8, M),
    }
    module, recorder = build(), Recorder()
    with torch.no_grad():
        rollout = module.net.rollout(batch["history"], batch["ids"], batch["lr_scale"])
    last = rollout[torch.arange(8), torch.tensor([3, 3, 3, 2] * 2)]
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([batch]))
    expected = float((last - batch["target"]).square().mean())
    assert recorder.values[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_drawn_tests_are_those_of_the_step(quiet_trainer):
    module, recorder = build(optimizer=partial(torch.optim.SGD, lr=0.0), tests_per_step=2), Recorder()
    batch = matrix(recorded([0]))
    with torch.no_grad():
        errors = module.net.forward_matrix(batch["ids"], batch["history"], batch["lr_scale"]) - batch["target"]
    quiet_trainer(max_epochs=6, callbacks=[recorder]).fit(module, loader([batch]))
    losses = [values["train/loss"] for values in recorder.values]
    possible = [float(errors[:, [a, b]].square().mean()) for a in range(M) for b in range(a)]
    assert len({round(loss, 8) for loss in losses}) > 1
    assert all(min(abs(loss - other) for other in possible) < 1e-7 for loss in losses)


def test_windows_of_free_running(quiet_trainer):
    module, recorder = build(rollout=RolloutLoss(weight=0.5, window=5)), Recorder()
    runs = recorded([0, 1])
    reference = copy.deepcopy(module.net)
    batch = matrix(runs)
    shuffled = torch.randperm(2 * T, generator=torch.Generator().manual_seed(0))
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(
        module, loader([{name: value[shuffled] for name, value in batch.items()}])
    )
    forced = functional.masked_mse(
        reference.forward_matrix(batch["ids"], batch["history"], batch["lr_scale"]), batch["target"]
    )
    errors = []
    for first in (0, 5):  # the last two steps of a run are no window
        window = slice(first, first + 5)
        free = reference.rollout(runs["values"][:, first], runs["ids"][:, window], runs["lr_scale"][:, window])
        errors.append((free[:, 1:] - runs["values"][:, first + 1 : first + 6]).square().mean())
    free = torch.stack(errors).mean()
    assert recorder.values[0]["train/rollout_loss"] == pytest.approx(free.item(), rel=1e-4)
    (forced + 0.5 * free).backward()
    SGD(reference.parameters()).step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=1e-3, atol=1e-6, msg=name)


def test_windows_follow_one_another():
    run = torch.tensor([3, 3, 3, 3, 1, 1, 3, 1])
    step = torch.tensor([4, 1, 2, 3, 7, 8, 9, 5])
    assert rows.windows(run, step, 2).tolist() == [[4, 5], [1, 2], [3, 0]]
    assert rows.windows(run, step, 4).tolist() == [[1, 2, 3, 0]]
    assert rows.windows(run, step, 5).shape == (0, 5)
    assert rows.windows(run[:1], step[:1], 2).shape == (0, 2)


@pytest.mark.parametrize("pad", ["zero", "repeat", "skip"])
def test_first_steps_of_higher_orders(quiet_trainer, pad):
    """Rows of whole runs lack a history at first."""
    options = {"order": 3, "history_pad": pad}
    module, runs, recorder = build(options=options), recorded([0, 1]), Recorder()
    net, values = copy.deepcopy(module.net), runs["values"]
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([runs]))
    errors = []
    for step in range(T):
        if pad == "skip" and step < 2:
            continue
        history = functional.pad_history(values[:, max(0, step - 2) : step + 1], 3, pad)
        with torch.no_grad():
            prediction = net.forward_matrix(runs["ids"][:, step], history, runs["lr_scale"][:, step])
        errors.append((prediction - values[:, step + 1]).square().mean())
    assert recorder.values[0]["train/loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_training_finds_the_simulator_that_made_the_runs(quiet_trainer):
    module = build(configured=False, optimizer=partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0))
    trainer = quiet_trainer(max_epochs=150, check_val_every_n_epoch=50, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=Runs())
    (values,) = trainer.test(module, datamodule=Runs(), verbose=False)
    assert values["test/all_steps_mse"] < 0.05 * values["test/persistence/all_steps_mse"]
    assert values["test/all_steps_mse"] < 0.1 * values["test/mean_trajectory/all_steps_mse"]
    assert values["test/final_spearman"] > 0.8


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_simulates_whole_runs(quiet_trainer, stage):
    runs = recorded(TESTING) | {"length": torch.tensor([T, 7, T])}
    runs["values"][0, 4, 1] = torch.nan
    batches = [{name: value[part] for name, value in runs.items()} for part in (slice(0, 2), slice(2, 3))]
    module, data = build(), Runs(val=batches, test=batches)
    for _ in range(2):  # totals start anew
        (values,) = getattr(quiet_trainer(), stage)(module, datamodule=data, verbose=False)
    prefix = "val" if stage == "validate" else "test"
    start = runs["values"][:, 0]
    guesses = {
        "": module.net.rollout(start, runs["ids"], runs["lr_scale"], runs["length"]).detach(),
        "persistence/": start[:, None].expand(-1, T + 1, -1),
        "mean_trajectory/": data.mean_trajectory.expand(3, -1, -1),
    }
    for name, guess in guesses.items():
        meter = metrics.TrajectoryErrors()
        meter.update(guess, runs["values"], runs["length"])
        expected = meter.compute()
        for key in ("all_steps_mse", "all_steps_mae", "final_spearman"):
            found = values[f"{prefix}/{name}{key}"]
            assert found == pytest.approx(float(expected[key]), rel=1e-4, nan_ok=True), name + key
    assert {f"{prefix}/all_steps_mse_std", f"{prefix}/final_spearman_undefined", f"{prefix}/curve_r2"} <= values.keys()


def test_trivial_predictions_without_a_mean(quiet_trainer):
    (values,) = quiet_trainer().validate(build(), loader([recorded([8])]), verbose=False)
    assert "val/persistence/all_steps_mse" in values
    assert not any("mean_trajectory" in name for name in values)


def test_start_before_the_first_recorded_value(quiet_trainer):
    """The published data starts after the first step."""
    runs = recorded(TESTING)
    module = build(options={"order": 2})
    past = torch.stack([runs["values"][:, 0], runs["values"][:, 1]], 1)
    later = {name: value[:, 1:] for name, value in runs.items() if name != "run"} | {"start": past}
    (values,) = quiet_trainer().test(module, loader([later]), verbose=False)
    with torch.no_grad():
        expected = module.net.rollout(past, later["ids"], later["lr_scale"])
    error = float((expected - later["values"])[:, 1:].square().mean())
    assert values["test/all_steps_mse"] == pytest.approx(error, rel=1e-4)


def test_runs_of_tests_without_a_start_are_left_out(quiet_trainer):
    runs, whole = recorded(TESTING), recorded(TESTING)
    runs["values"][1, 0, 2] = torch.nan
    module = build()
    (values,) = quiet_trainer().test(module, loader([runs]), verbose=False)
    with torch.no_grad():
        expected = module.net.rollout(whole["values"][:, 0], whole["ids"], whole["lr_scale"])
    errors = (expected - whole["values"])[:, 1:].square().mean(1)
    errors[1, 2] = torch.nan
    assert values["test/all_steps_mse"] == pytest.approx(float(errors.nanmean()), rel=1e-4)
    persistent = (whole["values"][:, :1] - whole["values"])[:, 1:].square().mean(1)
    persistent[1, 2] = torch.nan
    assert values["test/persistence/all_steps_mse"] == pytest.approx(float(persistent.nanmean()), rel=1e-4)


def test_skipped_first_values_are_given_to_roll_outs(quiet_trainer):
    runs = recorded(TESTING)
    module = build(options={"order": 3, "history_pad": "skip"})
    (values,) = quiet_trainer().test(module, loader([runs]), verbose=False)
    with torch.no_grad():
        expected = module.net.rollout(runs["values"][:, :3], runs["ids"][:, 2:], runs["lr_scale"][:, 2:])
    error = float((expected[:, 1:] - runs["values"][:, 3:]).square().mean())
    assert values["test/all_steps_mse"] == pytest.approx(error, rel=1e-4)
    persistent = float((runs["values"][:, 2:3] - runs["values"][:, 3:]).square().mean())
    assert values["test/persistence/all_steps_mse"] == pytest.approx(persistent, rel=1e-4)
    start = {name: runs[name] for name in ("ids", "lr_scale")} | {"start": runs["values"][:, 0]}
    with pytest.raises(ValueError, match="history_pad: skip needs 3 recorded values"):
        quiet_trainer().predict(module, loader([start]))


def test_divergence_counts_in_validation_and_ends_a_test(quiet_trainer):
    module = build(options={"kind": "linear", "init": "normal"})
    with torch.no_grad():
        module.net.emb.weight.mul_(1e8)
    with pytest.warns(UserWarning, match="roll-outs of validation leave the range of numbers"):
        (values,) = quiet_trainer().validate(module, loader([recorded([8])]), verbose=False)
    assert math.isinf(values["val/all_steps_mse"])
    with pytest.raises(ValueError, match=r"roll-out: run 10, test \d becomes .* at step \d"):
        quiet_trainer().test(module, loader([recorded([10])]), verbose=False)
    with pytest.raises(ValueError, match="roll-out: run 11"):
        quiet_trainer().predict(module, loader([recorded([11])]))


def test_unseen_examples_of_the_data(quiet_trainer):
    """Runs on pool and test examples that no training run has seen, by ids of their own."""
    train, test = draw(4, D, seed=7), draw(3, D, seed=8)
    runs = recorded([10, 11], train, test, first=100) | {"test_ids": torch.tensor([52, 50, 51])}
    runs["values"] = runs["values"][..., [2, 0, 1]]
    module, data = build(), Runs(test=[runs, recorded([12])])
    data.unseen_pool_ids, data.unseen_train_features = [100, 101, 102, 103], train
    data.unseen_test_ids, data.unseen_test_features = [50, 51, 52], test.numpy()
    (values,) = quiet_trainer().test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        factors = module.net.factors(train, test)
        unseen = functional.rollout(runs["values"][:, 0, [1, 2, 0]], runs["ids"] - 100, *factors, runs["lr_scale"])
        seen = module.net.rollout(recorded([12])["values"][:, 0], recorded([12])["ids"], RATE[None])
    errors = [(unseen[..., [2, 0, 1]] - runs["values"])[:, 1:], (seen - recorded([12])["values"])[:, 1:]]
    pooled = torch.cat([error.square().mean(1).flatten() for error in errors])
    assert values["test/all_steps_mse"] == pytest.approx(float(pooled.mean()), rel=1e-4)
    assert module.net.config.num_train == N
    with pytest.raises(ValueError, match=r"train_ids: id 10[0-9] is not one of"):
        quiet_trainer().test(module, loader([recorded([10], first=100)]), verbose=False)
    with pytest.raises(ValueError, match="test_ids: id 52 is not one of"):
        quiet_trainer().test(module, loader([runs]), verbose=False)


@pytest.mark.parametrize("names", [None, ["seen", "unseen"]])
def test_loaders_are_told_apart(quiet_trainer, names):
    module, data = build(), Runs()
    data.test_dataloader = lambda: [loader([recorded([run])]) for run in (10, 11)]
    data.test_names = names
    together = quiet_trainer().test(module, datamodule=data, verbose=False)
    values = {key: value for part in together for key, value in part.items()}
    for run, prefix in ((10, "test"), (11, "test/1" if names is None else "test/unseen")):
        (single,) = quiet_trainer().test(build(), datamodule=Runs(test=[recorded([run])]), verbose=False)
        for key in ("all_steps_mse", "persistence/all_steps_mae", "mean_trajectory/final_spearman"):
            assert values[f"{prefix}/{key}"] == pytest.approx(single[f"test/{key}"]), key


def test_prediction_of_curricula(quiet_trainer, tmp_path):
    module, runs = build(), recorded([12, 13])
    batch = {
        "ids": runs["ids"],
        "start": runs["values"][:, 0],
        "lr_scale": runs["lr_scale"],
        "length": torch.tensor([T, 4]),
    }
    trainer = quiet_trainer(callbacks=[PredictionWriter()])
    (found,) = trainer.predict(module, loader([batch]))
    with torch.no_grad():
        expected = module.net.rollout(batch["start"], runs["ids"], runs["lr_scale"], batch["length"])
    assert torch.equal(found["trajectory"], expected)
    assert found["trajectory"].shape == (2, T + 1, M)
    assert (found["length"].tolist(), found["run"].tolist()) == ([T, 4], [0, 1])
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines[1]["trajectory"][4] == pytest.approx(expected[1, 4].tolist())


def test_samples_show_start_and_end(quiet_trainer):
    module, runs = build(), recorded(TESTING)
    assert module.samples() == []
    quiet_trainer().test(module, loader([runs | {"length": torch.tensor([7, T, T])}]), verbose=False)
    samples = module.samples()
    assert [row["test"] for row in samples] == ["0", "1", "2", "3"]
    assert {row["run"] for row in samples} == {"10"}
    assert samples[1]["recorded"] == pytest.approx(float(runs["values"][0, 7, 1]))
    assert samples[1]["start"] == pytest.approx(float(runs["values"][0, 0, 1]))
    quiet_trainer().predict(
        module, loader([{"ids": runs["ids"], "start": runs["values"][:, 0], "lr_scale": runs["lr_scale"]}])
    )
    assert module.samples()[0].keys() == {"run", "test", "start", "simulated"}


# -- several metrics ---------------------------------------------------------------------------------------------------


def test_several_metrics(quiet_trainer):
    """Losses are weighed, errors logged by metric, and their mean by weight."""
    options = {"metrics": ("loss", "bleu"), "metric_weights": (1.0, 0.25), "clamp": {"bleu": [0.0, 100.0]}}
    module, runs, recorder = build(options=options), recorded([0, 1]), Recorder()
    both = {**runs, "values": torch.stack([runs["values"], 20 * runs["values"]], 2)}
    net = copy.deepcopy(module.net)
    trainer = quiet_trainer(max_steps=1, callbacks=[recorder], num_sanity_val_steps=0)
    trainer.fit(module, loader([both]), loader([both]))
    whole = matrix(runs)
    history = torch.cat([whole["history"], 20 * whole["history"]], -1)
    with torch.no_grad():
        prediction = net.forward_matrix(whole["ids"], history, whole["lr_scale"])
    first, second = (prediction - history.new_tensor([1.0] * M + [20.0] * M) * whole["target"].repeat(1, 2)).chunk(2, 1)
    expected = float((first.square().mean() + 0.25 * second.square().mean()) / 2)
    assert recorder.values[0]["train/loss"] == pytest.approx(expected, rel=1e-4)
    logged = trainer.callback_metrics
    parts = [float(logged[f"val/{name}/all_steps_mse"]) for name in ("loss", "bleu")]
    assert float(logged["val/all_steps_mse"]) == pytest.approx((parts[0] + 0.25 * parts[1]) / 1.25, rel=1e-5)
    assert "val/bleu/persistence/all_steps_mae" in logged
    prediction = quiet_trainer().predict(module, loader([both]))[0]["trajectory"]
    assert prediction.shape == (2, T + 1, 2, M)
    assert torch.equal(prediction[:, 0], both["values"][:, 0])
    single = {**pairs(runs), "metric": torch.ones(2 * T * M, dtype=torch.int64)}
    single |= {name: 20 * single[name] for name in ("prev", "target")}
    fresh, values = build(options=options), Recorder()
    quiet_trainer(max_steps=1, callbacks=[values]).fit(fresh, loader([single]))
    assert values.values[0]["train/loss"] == pytest.approx(0.25 * float(second.square().mean()), rel=1e-4)


# -- closed form -------------------------------------------------------------------------------------------------------


def ridge_module(**arguments):
    options = SimulatorOptions(kind="linear")
    return LitInfluence(options, solver="ridge", ridge=Ridge((1.0, 1e-4, 100.0)), **arguments)


@pytest.mark.parametrize("form", ["matrix", "runs"])
def test_closed_form_takes_one_epoch_and_the_best_penalty(quiet_trainer, form):
    runs = recorded(TRAINING)
    parts = [{name: value[part] for name, value in runs.items()} for part in (slice(0, 5), slice(5, 8))]
    parts[1] = parts[1] | {"ids": torch.cat([parts[1]["ids"], torch.full((3, T, 1), -1)], 2)}
    module = ridge_module()
    data = Runs(train=[matrix(part) for part in parts] if form == "matrix" else parts)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    whole = matrix(runs)
    fits = functional.ridge(
        whole["ids"], whole["history"], whole["target"], N, [1.0, 1e-4, 100.0], scale=whole["lr_scale"]
    )
    held_out = recorded(VALIDATION)
    errors = []
    for fit in fits:
        prediction = functional.rollout(held_out["values"][:, 0], held_out["ids"], *fit, held_out["lr_scale"])
        errors.append(float((prediction - held_out["values"])[:, 1:].square().mean()))
    best = min(range(3), key=lambda number: errors[number])
    assert float(trainer.callback_metrics["ridge/penalty"]) == pytest.approx([1.0, 1e-4, 100.0][best])
    assert float(trainer.callback_metrics["val/all_steps_mse"]) == pytest.approx(errors[best], rel=1e-3)
    torch.testing.assert_close(module.net.factors().A, fits[best].A.float(), rtol=1e-4, atol=1e-5)
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    assert values["val/all_steps_mse"] == pytest.approx(errors[best], rel=1e-3)


def test_closed_form_without_validation_takes_the_first_penalty(quiet_trainer):
    module, runs = ridge_module(**SIZES), recorded(TRAINING)
    quiet_trainer(max_epochs=2).fit(module, loader([matrix(runs)]))
    whole = matrix(runs)
    (fit,) = functional.ridge(whole["ids"], whole["history"], whole["target"], N, [1.0], scale=whole["lr_scale"])
    torch.testing.assert_close(module.net.factors().B, fit.B.float(), rtol=1e-4, atol=1e-5)


def test_closed_form_recovers_the_system(quiet_trainer):
    module = LitInfluence(SimulatorOptions(kind="linear"), solver="ridge", ridge=Ridge((1e-6,)))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=Runs())
    (values,) = trainer.test(module, datamodule=Runs(), verbose=False)
    assert values["test/all_steps_mse"] < 1e-3 * values["test/persistence/all_steps_mse"]


def test_closed_form_without_offset_starts_from_the_batch_size(quiet_trainer):
    options = SimulatorOptions(kind="linear", identity_offset=0.0, lr_scaling=False)
    module = LitInfluence(options, solver="ridge", **SIZES)
    batch = matrix(recorded(TRAINING))
    quiet_trainer(max_epochs=1).fit(module, loader([batch]))
    (fit,) = functional.ridge(batch["ids"], batch["history"], batch["target"], N, [1.0], offset=0.0, prior=(1 / B, 0.0))
    torch.testing.assert_close(module.net.factors().A, fit.A.float(), rtol=1e-4, atol=1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a run too early."""


class StopAfter(Callback):
    """Ends a run after some batches."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.batches:
            raise Interrupted


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_a_resumed_run_ends_like_an_unbroken_one(quiet_trainer, tmp_path, solver):
    from tests.callbacks.tiny import ResumableLoader

    parts = [matrix(recorded([run])) for run in TRAINING[:4]]

    def module():
        if solver == "ridge":
            return ridge_module()
        schedule = partial(WarmupLinear, total=8, warmup=2)
        return build(configured=False, optimizer=ADAM, lr_scheduler=schedule, tests_per_step=4, stop=EarlyStop(20))

    class Resumable(Runs):
        def train_dataloader(self):
            return ResumableLoader(parts, batch_size=None)

    def fit(folder, module, **options):
        checkpoint = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=3, save_top_k=-1)
        trainer = quiet_trainer(
            max_epochs=2 if solver == "adam" else 1,
            enable_checkpointing=True,
            callbacks=[checkpoint, *options.pop("callbacks", [])],
        )
        trainer.fit(module, datamodule=Resumable(), **options)
        return trainer

    whole = module()
    fit("whole", whole)
    with pytest.raises(Interrupted):
        fit("part", module(), callbacks=[StopAfter(3)])
    resumed = module()
    trainer = fit("part", resumed, ckpt_path=str(tmp_path / "part/last.ckpt"))
    assert trainer.global_step == (8 if solver == "adam" else 4)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name
    assert resumed._stopping == whole._stopping


def test_a_checkpoint_loads_without_data(quiet_trainer, tmp_path):
    module, data = build(configured=False, optimizer=ADAM), Runs()
    data.pool_ids = torch.arange(N) + 20
    data.batches = {
        name: [batch | {"ids": batch["ids"] + 20} for batch in batches] for name, batches in data.batches.items()
    }
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "simulator.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "simulator.ckpt")
    assert type(loaded) is LitInfluence
    assert loaded.net.config.to_dict() == module.net.config.to_dict()
    assert loaded.net.config.lr_reference == 1e-3
    for name, value in module.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value), name
    assert loaded.options.width == 8
    (values,) = quiet_trainer().test(loaded, loader(data.batches["test"]), verbose=False)
    (before,) = trainer.test(module, datamodule=data, verbose=False)
    assert values["test/all_steps_mse"] == pytest.approx(before["test/all_steps_mse"])
    with pytest.raises(CheckpointMismatchError, match="another model than LitInfluence"):
        LitInfluence.load_from_checkpoint(tmp_path / "simulator.ckpt", num_train=N + 1)
    folder = loaded.export_pretrained(tmp_path / "export")["model"]
    exported = InfluenceSimulator.from_pretrained(folder)
    torch.testing.assert_close(exported.factors(), loaded.net.factors())


# -- early stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "errors", "validations"),
    [
        ("best", [5.0, 4.0, 4.5, 4.2, 3.9], 4),
        ("best", [5.0, 4.0, 4.5, 3.9, 4.0, 3.95, 3.0], 6),
        ("previous", [5.0, 4.0, 4.5, 4.2, 3.9, 4.0, 3.95, 4.1, 4.2, 9.0], 9),
        ("best", [5.0, math.inf, math.nan, 4.0], 3),
    ],
)
def test_training_stops_without_improvement(quiet_trainer, monkeypatch, reference, errors, validations):
    module, seen = build(stop=EarlyStop(2, reference), optimizer=partial(torch.optim.SGD, lr=0.0)), iter(errors)
    monkeypatch.setattr(
        LitInfluence, "_log_errors", lambda self, stage: {"val/all_steps_mse": torch.tensor(next(seen, 0.0))}
    )
    trainer = quiet_trainer(max_epochs=len(errors), num_sanity_val_steps=0)
    trainer.fit(module, loader([matrix(recorded([0]))]), loader([recorded([8])]))
    assert trainer.current_epoch == validations


def test_the_monitored_error_must_be_logged(quiet_trainer):
    module = build(stop=EarlyStop(2), monitor="val/loss")
    with pytest.raises(ValueError, match=r"model\.monitor: 'val/loss' is not logged; take one of val/"):
        quiet_trainer(max_epochs=1).fit(module, loader([matrix(recorded([0]))]), loader([recorded([8])]))


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "sgd"}, "model.solver must be adam or ridge"),
        ({"solver": "ridge"}, "model.solver: ridge solves for the factors of kind linear, not feat_mlp"),
        ({"tests_per_step": 0}, "model.tests_per_step must be at least 1"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        LitInfluence(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutLoss(-1.0), "model.rollout: weight must be at least 0"),
        (lambda: RolloutLoss(1.0, 1), "window at least 2"),
        (lambda: EarlyStop(0), "model.stop.patience must be at least 1"),
        (lambda: EarlyStop(1, "last"), "model.stop.reference must be best or previous"),
        (lambda: Ridge(()), "model.ridge.penalties must be positive"),
        (lambda: Ridge((0.0,)), "model.ridge.penalties must be positive"),
    ],
)
def test_bad_option_groups_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_without_data_are_explained(quiet_trainer):
    with pytest.raises(
        ValueError, match=r"model\.num_train is not set, and the data module has no pool_ids and test_ids"
    ):
        quiet_trainer(max_steps=1).fit(build(configured=False), loader([matrix(recorded([0]))]))
    data = Runs()
    data.train_features = data.test_features = None
    with pytest.raises(ValueError, match=r"model\.feature_dim is not set, and the data module has no train_features"):
        quiet_trainer(max_steps=1).fit(build(configured=False), datamodule=data)
    module = LitInfluence(**SIZES)
    with pytest.raises(ValueError, match="data: kind feat_mlp reads features, but the data has none"):
        quiet_trainer(max_steps=1).fit(module, loader([matrix(recorded([0]))]))


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


@pytest.mark.parametrize(
    ("arguments", "batch", "message"),
    [
        (
            {},
            lambda: without(matrix(recorded([0])), "lr_scale"),
            "model.simulator.lr_scaling: the batches have no lr_scale",
        ),
        ({}, lambda: without(matrix(recorded([0])), "target"), "lacks target; see LitInfluence"),
        ({}, lambda: without(pairs(recorded([0])), "test_ids"), "lacks test_ids; see LitInfluence"),
        ({"rollout": RolloutLoss(1.0)}, lambda: pairs(recorded([0])), "rows of pairs have no windows"),
        (
            {"rollout": RolloutLoss(1.0, 20)},
            lambda: matrix(recorded([0])),
            "model.rollout.window: no batch holds 20 steps of one run",
        ),
        ({"rollout": RolloutLoss(1.0)}, lambda: without(matrix(recorded([0])), "step"), "lacks step"),
        (
            {"solver": "ridge", "simulator": SimulatorOptions(kind="linear")},
            lambda: pairs(recorded([0])),
            "model.solver: ridge needs rows of single steps",
        ),
        (
            {},
            lambda: {**matrix(recorded([0])), "history": torch.ones(T, 1, 2), "target": torch.ones(T, 2)},
            "history has 2 columns, not the 6",
        ),
    ],
)
def test_bad_batches_are_explained(quiet_trainer, arguments, batch, message):
    module = LitInfluence(**{"optimizer": SGD, **SIZES, **arguments})
    module.configure_model()
    if module.net.config.has_features:
        module.net.set_examples(train_features=TRAIN, test_features=TEST)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(module, loader([batch()]))


def test_evaluation_with_other_columns_is_explained(quiet_trainer):
    runs = recorded([8])
    with pytest.raises(ValueError, match="data: the start of a run has 2 values, but there are 6 of all tests"):
        quiet_trainer().validate(build(), loader([{**runs, "values": runs["values"][..., :2]}]), verbose=False)
    with pytest.raises(ValueError, match="lacks values; see LitInfluence"):
        quiet_trainer().validate(build(), loader([without(runs, "values")]), verbose=False)
    some = {**runs, "values": runs["values"][..., [4, 1]], "test_ids": torch.tensor([4, 1])}
    (values,) = quiet_trainer().validate(build(), loader([some]), verbose=False)
    with torch.no_grad():
        expected = build().net.rollout(runs["values"][:, 0], runs["ids"], runs["lr_scale"])
    error = float((expected - runs["values"])[:, 1:, [4, 1]].square().mean())
    assert values["val/all_steps_mse"] == pytest.approx(error, rel=1e-4)
