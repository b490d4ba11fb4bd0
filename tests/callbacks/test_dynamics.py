"""The recorder, on a small classifier with dropout and on causal language models."""

import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset

from callbacks import RNGState
from callbacks.dynamics import TrainingDynamicsRecorder
from datamodules.loaders import train_loader
from lit_models.recording import DynamicsRun, write_examples
from tests.callbacks.tiny import trainer

NUM, TESTS, CLASSES = 27, 5, 3


class Points(Dataset):
    """Points in four dimensions with a class, without ids."""

    def __init__(self, num: int, seed: int = 0, ids: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num, 4, generator=generator)
        self.y = torch.randint(CLASSES, (num,), generator=generator)
        self.ids = ids

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        row = {"x": self.x[index], "y": self.y[index], "seen": index}
        return row | {"id": 100 + index} if self.ids else row


class Classifier(LightningModule):
    """Two layers with dropout and a batch norm, trained with a schedule; notes what it saw."""

    def __init__(self, per_example=True, schedule=True, **data):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
            )
        self.schedule, self.data = schedule, data
        self.seen, self.rates = [], []
        if per_example:
            self.per_example_metrics = self._per_example

    def _per_example(self, batch):
        logits = self.net(batch["x"])
        return {
            "loss": F.cross_entropy(logits, batch["y"], reduction="none"),
            "accuracy": (logits.argmax(-1) == batch["y"]).float(),
        }

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["seen"].tolist())
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            [{"params": [*self.parameters()][:2], "lr": 0.05}, {"params": [*self.parameters()][2:]}], lr=0.1
        )
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_zero_grad(self, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def train_dataloader(self):
        options = {"batch_size": 4, "shuffle": True, "drop_last": False} | self.data
        dataset = options.pop("dataset", None)
        return DataLoader(Points(NUM) if dataset is None else dataset, **options)


def recorder(folder, **options):
    defaults = {"test_dataset": Points(TESTS, seed=1, ids=True), "id_source": "sampler", "flush_every": 3}
    return TrainingDynamicsRecorder(str(folder), **(defaults | options))


def fit(folder, model=None, record=True, ckpt_path=None, extra=(), seed=5, options=None, **settings):
    """A run with everything seeded; the module and what was recorded."""
    seed_everything(seed, verbose=False)
    model = Classifier() if model is None else model
    callbacks = [*extra, *([recorder(folder / "run", **(options or {}))] if record else [])]
    run = trainer(folder, callbacks=callbacks, **({"max_epochs": 2, "limit_val_batches": 0} | settings))
    run.fit(model, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return model, DynamicsRun.open(folder / "run") if record else None


def same(one, other):
    for name in ("steps", "rec_step", "lr", "skipped", "train_loss", "test_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert [row.tolist() for row in one.ids] == [row.tolist() for row in other.ids]
    for metric in one.metrics:
        np.testing.assert_array_equal(one.values(metric), other.values(metric))


def same_weights(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def joined(seen, accumulate=1, per_epoch=None):
    """Ids of each step, from those of each batch."""
    per_epoch = per_epoch or len(seen)
    steps = []
    for begin in range(0, len(seen), per_epoch):
        epoch = seen[begin : begin + per_epoch]
        steps += [list(chain(*epoch[at : at + accumulate])) for at in range(0, len(epoch), accumulate)]
    return steps


# -- training is not disturbed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_the_same_bit_for_bit_with_and_without_recorder(tmp_path, per_example, workers):
    with_it, run = fit(tmp_path, Classifier(per_example, num_workers=workers))
    without, _ = fit(tmp_path, Classifier(per_example, num_workers=workers), record=False)
    same_weights(with_it, without)
    assert with_it.seen[: len(without.seen)] == without.seen
    assert run.n_steps == 14


def test_modes_of_sub_modules_survive(tmp_path):
    class Frozen(Classifier):
        def on_fit_start(self):
            self.net[1].eval()

        def training_step(self, batch, batch_idx):
            assert [part.training for part in self.net] == [True, False, True, True, True]
            assert torch.is_grad_enabled()
            return super().training_step(batch, batch_idx)

        def _per_example(self, batch):
            assert not any(part.training for part in self.modules())
            assert not torch.is_grad_enabled()
            return super()._per_example(batch)

    fit(tmp_path, Frozen())


def test_callbacks_have_no_attributes_that_lightning_replaces():
    assert not {"log", "log_dict"} & set(vars(recorder("x")))


# -- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_ids_are_those_that_training_saw(tmp_path, workers, accumulate, drop_last, limit):
    model, run = fit(
        tmp_path,
        Classifier(num_workers=workers, drop_last=drop_last, persistent_workers=workers > 0 and drop_last),
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
    )
    per_epoch = 3 if limit == 3 else 6 if drop_last else 7
    assert [row.tolist() for row in run.ids] == joined(model.seen, accumulate, per_epoch)
    assert len(run.ids) == 2 * math.ceil(per_epoch / accumulate)
    assert run.pool_size == NUM


def test_our_loaders_and_batches_with_ids(tmp_path):
    class Ours(Classifier):
        def train_dataloader(self):
            return train_loader(Points(NUM, ids=True), 4, seed=0, num_workers=2)

    model, by_row = fit(tmp_path / "a", Ours())
    assert [row.tolist() for row in by_row.ids] == model.seen
    model, by_key = fit(tmp_path / "b", Ours(), options={"id_source": "batch"})
    assert [(row - 100).tolist() for row in by_key.ids] == model.seen
    model, by_function = fit(tmp_path / "c", Ours(), options={"id_source": "tests.callbacks.test_dynamics.rows_seen"})
    assert [row.tolist() for row in by_function.ids] == model.seen


def rows_seen(batch):
    return batch["seen"]


def test_ids_are_noted_before_the_module_takes_them_from_the_batch(tmp_path):
    class Taker(Classifier):
        def training_step(self, batch, batch_idx):
            batch.pop("id").fill_(0)
            return super().training_step(batch, batch_idx)

    model, run = fit(tmp_path, Taker(dataset=Points(NUM, ids=True)), options={"id_source": "batch"})
    assert [(row - 100).tolist() for row in run.ids] == model.seen


def test_rows_of_parts_of_a_data_set_are_those_of_the_whole(tmp_path):
    part = Subset(Subset(Points(NUM), range(5, 20)), range(0, 15, 2))
    model, run = fit(tmp_path, Classifier(dataset=part, batch_size=3))
    assert [row.tolist() for row in run.ids] == model.seen
    assert set(run.ids.values.tolist()) == set(range(5, 20, 2))
    assert run.pool_size == NUM


def test_batch_samplers_of_any_size_and_ready_made_batches(tmp_path):
    class Growing(BatchSampler):
        def __iter__(self):
            yield from ([0, 1], [2, 3, 4], [5, 6, 7, 8])

        def __len__(self):
            return 3

    sizes = {"batch_size": 1, "shuffle": None, "batch_sampler": Growing(range(9), 1, False)}
    model, run = fit(tmp_path / "a", Classifier(**sizes))
    assert [row.tolist() for row in run.ids] == model.seen == [[0, 1], [2, 3, 4], [5, 6, 7, 8]] * 2

    class Bulk(Points):
        def __getitem__(self, rows):
            return {"x": self.x[rows], "y": self.y[rows], "seen": torch.tensor(rows)}

    bulk = {"dataset": Bulk(9), "batch_size": None, "shuffle": None, "sampler": Growing(range(9), 1, False)}
    model, run = fit(tmp_path / "b", Classifier(**bulk))
    assert [row.tolist() for row in run.ids] == model.seen


def test_validation_with_the_training_loader_adds_no_ids(tmp_path):
    loader = DataLoader(Points(NUM), batch_size=4, shuffle=True)

    class Same(Classifier):
        def train_dataloader(self):
            return loader

        def validation_step(self, batch, batch_idx):
            return None

        val_dataloader = train_dataloader

    model, run = fit(tmp_path, Same(), limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=2)
    assert [row.tolist() for row in run.ids] == model.seen
    assert type(loader.batch_sampler) is BatchSampler
    model, run = fit(tmp_path / "again", Same(), limit_val_batches=0)
    assert [row.tolist() for row in run.ids] == model.seen


class WritesSeen(Classifier):
    """Keeps what a rank saw in a file."""

    def on_train_end(self):
        path = Path(self.trainer.default_root_dir)
        (path / f"seen{self.global_rank}.json").write_text(json.dumps([self.seen, self.rates]))


@pytest.mark.parametrize(
    ("workers", "accumulate", "drop_last", "limit"), [(0, 1, False, 1.0), (2, 2, True, 1.0), (2, 2, False, 3)]
)
def test_two_processes(tmp_path, workers, accumulate, drop_last, limit):
    options = {"flush_every": 2, "max_eval_batch_size": 2, "metrics": {"loss": None, "accuracy": None}}
    settings = {"accumulate_grad_batches": accumulate, "options": options, "limit_train_batches": limit}
    pair = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True}
    _, run = fit(tmp_path, WritesSeen(num_workers=workers, drop_last=drop_last), **settings, **pair)
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text())[0] for rank in range(2)]
    steps = [joined(rows, accumulate, len(rows) // 2) for rows in seen]
    assert [row.tolist() for row in run.ids] == [left + right for left, right in zip(*steps, strict=True)]
    assert run.complete
    assert run.info["world_size"] == 2
    assert not np.isnan(run.values("loss")).any()
    columns = [load_file(tmp_path / f"run/part-r{rank}-00000.safetensors")["cols"].tolist() for rank in range(2)]
    assert columns == [[0, 2, 4], [1, 3]]
    _, single = fit(tmp_path / "single", Classifier(), options={"metrics": options["metrics"]})
    np.testing.assert_allclose(run.values("loss")[0], single.values("loss")[0], rtol=1e-5)  # before they part
    np.testing.assert_array_equal(run.values("accuracy")[0], single.values("accuracy")[0])


def test_two_processes_resume_and_equal_an_unbroken_run(tmp_path):
    pair = {"devices": 2, "strategy": "ddp_fork", "limit_train_batches": 4}
    _, whole = fit(tmp_path / "whole", WritesSeen(shuffle=False), **pair, max_epochs=3, extra=[RNGState()])
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, WritesSeen(shuffle=False), **pair, enable_checkpointing=True, max_epochs=2, extra=[RNGState(), saver])
    checkpoint = tmp_path / "ckpt/step=8.ckpt"
    _, run = fit(tmp_path, WritesSeen(shuffle=False), ckpt_path=checkpoint, **pair, max_epochs=3, extra=[RNGState()])
    same(run, whole)
    assert run.n_steps == 12


# -- steps -----------------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_before_the_step(tmp_path):
    _, run = fit(tmp_path)
    expected = [[0.05 / (1 + step), 0.1 / (1 + step)] for step in range(14)]
    np.testing.assert_allclose(run.lr, expected, rtol=1e-6)
    assert [group["lr"] for group in run.info["param_groups"]] == [0.05, 0.1]


def test_training_loss_is_the_mean_of_the_batches_of_a_step(tmp_path):
    losses = []

    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    _, run = fit(tmp_path, Noting(), accumulate_grad_batches=3, max_epochs=1)
    np.testing.assert_allclose(run.train_loss, [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]], rtol=1e-6)


def test_gradient_norm_is_that_before_clipping(tmp_path):
    norms = []

    class Clipped(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)))

    _, run = fit(tmp_path, Clipped(), gradient_clip_val=0.01, options={"grad_norm": True})
    np.testing.assert_allclose(run.grad_norm, norms, rtol=1e-5)
    assert fit(tmp_path / "b")[1].grad_norm is None


class Manual(Classifier):
    """Two optimizers; the second one steps in every other batch, the first one twice in a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        parameters = [*self.parameters()]
        return torch.optim.SGD(parameters[:4], lr=0.1), torch.optim.SGD(parameters[4:], lr=0.2)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx == 2:
            return loss  # its gradients go into the next step
        first.step()
        first.param_groups[0]["lr"] *= 0.5
        if batch_idx % 2 == 0:
            second.step()
        first.step()
        first.zero_grad()
        second.zero_grad()
        return loss


def test_manual_optimization_gives_a_row_per_batch_with_a_step(tmp_path):
    model, run = fit(tmp_path, Manual(), max_epochs=1)
    seen = model.seen
    assert [row.tolist() for row in run.ids] == [seen[0], seen[1], seen[2] + seen[3], *seen[4:]]
    np.testing.assert_allclose(run.lr[:, 0], [0.05 / 2**step for step in range(6)], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(run.lr[:, 1]), [False, True, True, False, True, False])
    assert run.rec_step.tolist() == list(range(7))
    assert run.info["recorder"]["steps"] == "batches with optimizer steps"


def test_manual_optimization_resumes_by_its_own_steps(tmp_path):
    _, whole = fit(tmp_path / "whole", Manual(), max_epochs=2)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="one", save_top_k=-1, every_n_epochs=1)
    fit(tmp_path, Manual(), max_epochs=1, extra=[saver], enable_checkpointing=True)
    assert torch.load(tmp_path / "ckpt/one.ckpt", weights_only=True)["global_step"] == 15
    # The order of the second epoch depends on the random states, so only what does not is compared.
    _, run = fit(tmp_path, Manual(), max_epochs=2, ckpt_path=tmp_path / "ckpt/one.ckpt")
    assert run.n_steps == whole.n_steps == 12
    np.testing.assert_array_equal(run.values()[:7], whole.values()[:7])
    np.testing.assert_array_equal(run.lr[:, 1], whole.lr[:, 1])


def test_updates_skipped_by_the_gradient_scaler_are_marked(tmp_path):
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Exploding(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx in (2, 5) else 1)

    amp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2))
    _, run = fit(tmp_path, Exploding(schedule=False), plugins=[amp], max_epochs=1)
    assert np.flatnonzero(run.skipped).tolist() == [2, 5]
    losses = run.values()
    unchanged = (np.diff(losses, axis=0) == 0).all(1)
    assert not unchanged[[0, 1, 3, 4]].any()


def test_a_step_resumed_within_an_accumulation_has_the_batches_whose_gradients_took_part(tmp_path):
    class Plain(Classifier):
        def train_dataloader(self):
            return train_loader(Points(NUM), 4, seed=0)

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "open.ckpt")

    model, _ = fit(tmp_path, Plain(), extra=[SaveAt()], accumulate_grad_batches=2, max_epochs=1)
    resumed, run = fit(tmp_path, Plain(), ckpt_path=tmp_path / "open.ckpt", accumulate_grad_batches=2, max_epochs=1)
    assert resumed.seen == model.seen[3:]
    assert [row.tolist() for row in run.ids] == [
        model.seen[0] + model.seen[1],
        model.seen[3],
        model.seen[4] + model.seen[5],
    ]


# -- metrics ---------------------------------------------------------------------------------------------------------


class Truth(Callback):
    """Losses of the tests after each step, computed in another way."""

    def __init__(self):
        self.losses = []

    def note(self, module):
        tests = Points(TESTS, seed=1)
        net = module.net.train(False)
        with torch.no_grad():
            self.losses.append(F.cross_entropy(net(tests.x), tests.y, reduction="none"))
        net.train(True)

    def on_train_start(self, trainer, pl_module):
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note(pl_module)


@pytest.mark.parametrize("per_example", [True, False])
def test_losses_are_those_of_the_module_in_evaluation(tmp_path, per_example):
    truth = Truth()
    _, run = fit(tmp_path, Classifier(per_example), extra=[truth], options={"max_eval_batch_size": 2})
    np.testing.assert_allclose(run.values(), torch.stack(truth.losses), rtol=1e-5, atol=1e-6)
    assert run.rec_step.tolist() == list(range(15))
    assert run.test_ids.tolist() == [100, 101, 102, 103, 104]


def margin(module, batch, power=1):
    logits = module.net(batch["x"])
    return (logits.gather(1, batch["y"][:, None]).squeeze(1) - logits.mean(1)) ** power


def test_metrics_by_name_function_and_interval(tmp_path):
    metrics = {
        "loss": None,
        "accuracy": {"every_n_steps": 2},
        "margin": "tests.callbacks.test_dynamics.margin",
        "square": {"function": "tests.callbacks.test_dynamics.margin", "power": 2, "every_n_steps": 5},
        "python": margin,
    }
    _, run = fit(tmp_path, options={"metrics": metrics, "every_n_steps": 3, "record_end": False})
    assert run.metrics == ("loss", "accuracy", "margin", "square", "python")
    assert run.rec_step.tolist() == [0, 2, 3, 4, 5, 6, 8, 9, 10, 12, 14]
    at = {name: run.rec_step[run.measured(name).all(1)].tolist() for name in run.metrics}
    assert at["loss"] == at["margin"] == [0, 3, 6, 9, 12]
    assert at["accuracy"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert at["square"] == [0, 5, 10]
    np.testing.assert_allclose(run.values("square")[0], run.values("margin")[0] ** 2, rtol=1e-5)
    np.testing.assert_array_equal(run.values("python"), run.values("margin"))


def test_start_and_end(tmp_path):
    _, run = fit(tmp_path / "a", options={"every_n_steps": 5})
    assert run.rec_step.tolist() == [0, 5, 10, 14]
    _, run = fit(tmp_path / "b", options={"every_n_steps": 5, "record_start": False, "record_end": False})
    assert run.rec_step.tolist() == [5, 10]
    assert run.n_steps == 14


def test_tests_take_turns(tmp_path):
    _, whole = fit(tmp_path / "whole")
    _, run = fit(tmp_path / "turns", options={"tests_per_record": 2})
    measured = run.measured()
    assert measured[0].all()
    assert measured[-1].all()
    assert (measured[1:-1].sum(1) <= 2).all()
    assert all(measured[start : start + 3].sum(0).tolist() == [1] * TESTS for start in range(1, 11))
    values = run.values()
    np.testing.assert_allclose(values[measured], whole.values()[measured], rtol=1e-5)
    assert np.isnan(values[~measured]).all()


def test_means_of_groups(tmp_path):
    class Grouped(Points):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"task": 7 if index < 2 else 3}

    _, whole = fit(tmp_path / "whole")
    _, run = fit(tmp_path / "groups", options={"test_dataset": Grouped(TESTS, 1), "reduce": "task"})
    assert run.test_ids.tolist() == [3, 7]
    values = whole.values()
    np.testing.assert_allclose(run.values(), np.stack([values[:, 2:].mean(1), values[:, :2].mean(1)], 1), rtol=1e-5)


def test_mixed_precision(tmp_path):
    kinds = set()

    class Kinds(Classifier):
        def _per_example(self, batch):
            kinds.add(self.net(batch["x"]).dtype)
            return super()._per_example(batch)

    with_it, run = fit(tmp_path, Kinds(), precision="bf16-mixed")
    assert kinds == {torch.bfloat16}
    assert run.info["precision"] == "bf16-mixed"
    without, _ = fit(tmp_path, precision="bf16-mixed", record=False)
    same_weights(with_it, without)


def test_losses_that_are_no_numbers_give_one_warning(tmp_path):
    class Broken(Classifier):
        def _per_example(self, batch):
            losses = super()._per_example(batch)
            losses["loss"][1] = float("nan")
            return losses

    with pytest.warns(UserWarning, match=r"loss of test 101 is NaN at step 0") as caught:
        _, run = fit(tmp_path, Broken())
    assert sum("is NaN" in str(warning.message) for warning in caught) == 1
    assert np.isnan(run.values()[:, 1]).all()
    assert run.measured().all()


def test_tests_of_the_validation_loader(tmp_path):
    class Validated(Classifier):
        def val_dataloader(self):
            return DataLoader(Subset(Points(9, seed=1), [1, 2, 4]), batch_size=2)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", F.cross_entropy(self.net(batch["x"]), batch["y"]))

    options = {"test_dataloader": "val", "test_dataset": None}
    _, run = fit(tmp_path / "a", Validated(), options=options)
    assert run.test_ids.tolist() == [1, 2, 4]
    _, more = fit(tmp_path / "b", Validated(), options=options, limit_val_batches=1.0)
    np.testing.assert_array_equal(run.values()[0], more.values()[0])
    assert more.test_ids.tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match=r"test_dataloader: val needs one validation DataLoader, found none"):
        fit(tmp_path / "c", options=options)


def test_loaders_as_tests_are_taken_without_their_order(tmp_path):
    loader = DataLoader(Points(TESTS, seed=1, ids=True), batch_size=2, shuffle=True)
    _, whole = fit(tmp_path / "a")
    _, run = fit(tmp_path / "b", options={"test_dataloader": loader, "test_dataset": None})
    assert run.test_ids.tolist() == whole.test_ids.tolist()
    np.testing.assert_allclose(run.values(), whole.values(), rtol=1e-5)


# -- modules that know nothing of this -------------------------------------------------------------------------------


def test_validation_steps_run_apart_from_the_module(tmp_path):
    from torchmetrics import MeanMetric

    class Plain(Classifier):
        def __init__(self):
            super().__init__(per_example=False)
            self.total, self.batches, self.mean = torch.zeros(1), [], MeanMetric()

        def validation_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
            self.total += loss.detach()
            self.batches.append(batch)
            self.mean.update(loss)
            self.log("val_loss", loss)
            self.log_dict({"val_acc": 0.5})

    with pytest.warns(
        UserWarning, match="has no per_example_metrics.*one by one through its validation_step"
    ) as caught:
        model, run = fit(tmp_path, Plain())
    assert sum("one by one" in str(warning.message) for warning in caught) == 1
    assert model.total == 0
    assert model.batches == []
    assert model.mean.update_count == 0
    _, other = fit(tmp_path / "other")
    np.testing.assert_allclose(run.values(), other.values(), rtol=1e-5, atol=1e-6)


def test_manual_optimization_needs_a_way_to_the_loss(tmp_path):
    model = Manual()
    del model.per_example_metrics
    with pytest.raises(ValueError, match="Manual optimizes by itself in training_step and has no validation_step"):
        fit(tmp_path, model)


# -- stopping and resuming -------------------------------------------------------------------------------------------


class Resumable(Classifier):
    """Goes on in the middle of an epoch; its dropout is drawn from the states that are saved."""

    def train_dataloader(self):
        return train_loader(Points(NUM), 4, seed=0)


@pytest.mark.parametrize("stop", [5, 6, 9])
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 4, "tests_per_record": 3}])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, stop, options):
    settings = {"options": options, "max_epochs": 4}
    model, whole = fit(tmp_path / "whole", Resumable(), extra=[RNGState()], **settings)
    saver = ModelCheckpoint(tmp_path, filename="stop", every_n_train_steps=stop, save_top_k=1)
    save = {"enable_checkpointing": True}
    fit(tmp_path, Resumable(), extra=[RNGState(), saver], **settings, **save, max_steps=stop)
    first = DynamicsRun.open(tmp_path / "run", strict=True)
    assert (first.n_steps, first.measured()[-1].all()) == (stop, True)
    resumed, run = fit(tmp_path, Resumable(), extra=[RNGState()], ckpt_path=tmp_path / "stop.ckpt", **settings)
    same_weights(resumed, model)
    same(run, whole)
    assert run.complete


def test_rows_beyond_the_checkpoint_are_cut(tmp_path):
    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 10:
                raise RuntimeError("stop here")

    _, whole = fit(tmp_path / "whole", Resumable(), extra=[RNGState()])
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_on_exception=False)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, Resumable(), extra=[RNGState(), Stop(), saver], enable_checkpointing=True)
    broken = DynamicsRun.open(tmp_path / "run")
    assert (broken.n_steps, broken.complete) == (10, False)
    _, run = fit(tmp_path, Resumable(), extra=[RNGState()], ckpt_path=tmp_path / "step=4.ckpt")
    same(run, whole)


def test_fitting_on_goes_on_in_the_same_files(tmp_path):
    seed_everything(5, verbose=False)
    model = Classifier()
    run = trainer(tmp_path, callbacks=[recorder(tmp_path / "run")], max_epochs=1, limit_val_batches=0)
    run.fit(model)
    assert DynamicsRun.open(tmp_path / "run").n_steps == 7
    run.fit_loop.max_epochs = 2
    run.fit(model)
    recorded = DynamicsRun.open(tmp_path / "run", strict=True)
    assert [row.tolist() for row in recorded.ids] == model.seen
    assert recorded.rec_step.tolist() == list(range(15))


def test_a_folder_in_the_way(tmp_path):
    _, run = fit(tmp_path)
    with pytest.raises(ValueError, match=r"out_dir: .*run already holds the run 'run' with 14 steps; choose another"):
        fit(tmp_path)
    same(DynamicsRun.open(tmp_path / "run"), run)
    _, again = fit(tmp_path, options={"overwrite": True}, max_epochs=1)
    assert again.n_steps == 7


def test_a_checkpoint_of_another_run_or_other_tests(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(tmp_path, extra=[saver], enable_checkpointing=True)
    checkpoint = tmp_path / "step=7.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["TrainingDynamicsRecorder"]
    assert state == {"step": 7, "run_id": "run"}
    with pytest.raises(ValueError, match="was recorded with another test set"):
        fit(tmp_path, ckpt_path=checkpoint, options={"test_dataset": Points(4, seed=1, ids=True)})
    fit(tmp_path / "other", max_epochs=1)
    (tmp_path / "other/run").rename(tmp_path / "other/b")
    info = tmp_path / "other/b/run.json"
    info.write_text(info.read_text().replace('"run"', '"b"'))
    seed_everything(5, verbose=False)
    wrong = trainer(tmp_path, callbacks=[recorder(tmp_path / "other", run_id="b")], limit_val_batches=0)
    with pytest.raises(ValueError, match="holds the run 'b', but the checkpoint is of the run 'run'"):
        wrong.fit(Classifier(), ckpt_path=checkpoint)
    with pytest.warns(UserWarning, match="holds no run, so recording begins at step 7"):
        _, run = fit(tmp_path / "new", ckpt_path=checkpoint)
    assert run.steps.tolist() == list(range(8, 15))
    assert run.rec_step.tolist() == list(range(7, 15))


def test_files_that_end_before_the_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(tmp_path, extra=[saver], enable_checkpointing=True)
    fit(tmp_path, options={"overwrite": True}, max_steps=3)
    with pytest.raises(ValueError, match="ends at step 3, but training goes on at step 7"):
        fit(tmp_path, ckpt_path=tmp_path / "step=7.ckpt")


def test_fast_dev_runs_leave_nothing(tmp_path):
    seed_everything(5, verbose=False)
    trainer(tmp_path, callbacks=[recorder(tmp_path / "run")], fast_dev_run=3).fit(Classifier())
    assert not (tmp_path / "run").exists()


# -- checkpoints, features, pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "steps"), [([0, 3, 14], [0, 3, 14]), (3, [0, 7, 14]), ([], [])])
def test_checkpoints_for_gradient_methods(tmp_path, when, steps):
    model, _ = fit(tmp_path, options={"save_checkpoints_at": when})
    saved = sorted((tmp_path / "run").glob("checkpoints/*"), key=lambda path: int(path.stem[5:]))
    assert [path.name for path in saved] == [f"step-{step}.ckpt" for step in steps]
    if steps:
        first, last = (torch.load(path, weights_only=True) for path in (saved[0], saved[-1]))
        assert "optimizer_states" not in first
        same_weights_of(first, Classifier())
        same_weights_of(last, model)
        without, _ = fit(tmp_path, record=False)
        same_weights(model, without)


def same_weights_of(checkpoint, module):
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in checkpoint["state_dict"].items())


def test_the_end_is_kept_where_it_comes_early(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 5

    fit(tmp_path, extra=[Stop()], options={"save_checkpoints_at": 3})
    assert {path.stem for path in (tmp_path / "run/checkpoints").glob("*")} == {"step-0", "step-5"}


def test_projected_gradients_are_features(tmp_path):
    with_it, run = fit(tmp_path / "a", options={"grad_features": 2000})
    without, _ = fit(tmp_path / "b", record=False)
    same_weights(with_it, without)
    ids, tests = run.features("tests")
    assert ids.tolist() == [100, 101, 102, 103, 104]
    rows, pool = run.features("pool")
    assert rows.tolist() == list(range(NUM))
    assert tests.shape == (TESTS, 2000)
    module, points = Classifier().eval(), Points(TESTS, seed=1)
    gradients = []
    for number in range(TESTS):
        module.zero_grad()
        F.cross_entropy(module.net(points.x[number : number + 1]), points.y[number : number + 1]).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    exact = torch.stack(gradients) @ torch.stack(gradients).T
    # Random projections keep inner products up to about 1/sqrt(dims) of the norms.
    np.testing.assert_allclose(tests @ tests.T, exact, atol=0.15 * float(exact.diagonal().max()))
    assert pool.shape == (NUM, 2000)


def means(module, batch):
    return batch["x"][:, :2]


def test_features_by_a_function_on_two_processes(tmp_path):
    options = {"grad_features": "tests.callbacks.test_dynamics.means", "id_source": "batch"}
    data = Points(NUM, ids=True)
    pair = {"devices": 2, "strategy": "ddp_fork", "max_steps": 2}
    _, run = fit(tmp_path, Classifier(dataset=data), options=options, **pair)
    ids, pool = run.features("pool")
    assert ids.tolist() == [100 + row for row in range(NUM)]
    np.testing.assert_array_equal(pool, data.x[:, :2])
    np.testing.assert_array_equal(run.features("tests")[1], Points(TESTS, 1).x[:, :2])
    with pytest.raises(ValueError, match="has no features; record with"):
        fit(tmp_path / "b")[1].features("pool")


def test_the_pool_of_an_experiment(tmp_path):
    rows = [{"id": 100 + number, "text": str(number)} for number in range(NUM)]
    print_ = write_examples(tmp_path / "pool.jsonl", rows)
    options = {"run_id": "r", "id_source": "batch"}
    seed_everything(5, verbose=False)
    recording = trainer(tmp_path, callbacks=[recorder(tmp_path, **options)], max_epochs=1, limit_val_batches=0)
    recording.fit(Classifier(dataset=Points(NUM, ids=True)))
    run = DynamicsRun.open(tmp_path / "r")
    assert (run.pool_size, run.info["pool_fingerprint"]) == (NUM, print_)
    assert run.info["pool_ids"] == [row["id"] for row in rows]
    run.check()
    with pytest.raises(ValueError, match=r"step 1 used id 1\d\d, but the pool has 5 examples, 0 to 4"):
        fit(tmp_path / "b", Classifier(dataset=Points(NUM, ids=True)), options={"id_source": "batch", "pool": 5})


def test_run_json_tells_how_the_run_was_made(tmp_path):
    _, run = fit(tmp_path, accumulate_grad_batches=2)
    info = run.info
    assert (info["seed"], info["batch_size"], info["accumulate_grad_batches"], info["world_size"]) == (5, 4, 2, 1)
    assert info["optimizer"] == ["torch.optim.sgd.SGD"]
    assert info["precision"] == "32-true"
    assert info["hparams"] == {"per_example": True, "schedule": True}
    assert info["recorder"]["every_n_steps"] == {"loss": 1}
    assert {"created", "lightning", "torch"} <= set(info)


# -- wrong input -----------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter([Points(4)[row] for row in range(4)])


class Several(Classifier):
    def train_dataloader(self):
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}


class Twice(Points):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"id": 3}


class Text(Points):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"id": f"row {index}"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Classifier(),
            {"id_source": "batch"},
            r"id_key: training batches hold no 'id' but the keys \['seen', 'x', 'y'\]",
        ),
        (
            Classifier(dataset=Endless(), shuffle=None),
            {},
            r"id_source: sampler can't number the rows of the iterable Endless; .* use id_source: batch",
        ),
        (Several(), {}, "id_source: sampler needs exactly one training loader"),
        (Classifier(), {"test_dataset": Points(3), "id_source": rows_seen}, "test_dataset: test examples have no 'id'"),
        (Classifier(), {"test_dataset": Points(3), "test_ids": "key"}, "test_dataset: test examples have no 'id'"),
        (Classifier(), {"test_dataset": Twice(3)}, "test_dataset: test id 3 occurs twice"),
        (Classifier(), {"test_dataset": Text(3)}, "test ids must be whole numbers, got 'row 0'"),
        (Classifier(), {"test_dataset": []}, "test_dataset: there are no tests"),
        (Classifier(), {"reduce": "task"}, "reduce: test examples have no group of whole numbers under 'task'"),
        (Classifier(), {"metrics": {"bleu": None}}, r"metrics.bleu: per_example_metrics of Classifier gives only"),
        (Classifier(False), {"metrics": {"bleu": None}}, r"metrics.bleu: Classifier has no per_example_metrics"),
        (Classifier(), {"metrics": {"bleu": {"max_new_tokens": 3}}}, "metrics.bleu needs a module with one causal"),
        (Classifier(), {"metrics": {"a": lambda *_: torch.zeros(2)}}, "metrics.a: 5 examples must give 5 values"),
        (Classifier(), {"pool": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
    ],
)
def test_one_sentence_for_what_cannot_be_recorded(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, options=options)
    fit(tmp_path, max_epochs=1)  # what was left behind is not in the way


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"callbacks\.TrainingDynamicsRecorder\.every_n_steps must be at least 1, got 0"),
        ({"flush_every": 0}, "flush_every must be at least 1"),
        ({"tests_per_record": 0}, "tests_per_record must be at least 1"),
        ({"test_dataset": None}, "set test_dataset or test_dataloader, and only one"),
        ({"test_dataloader": "val"}, "set test_dataset or test_dataloader, and only one"),
        ({"test_dataset": None, "test_dataloader": "test"}, "must be a DataLoader or `val`, got 'test'"),
        ({"dtype": "bf16"}, "dtype must be float32 or float16"),
        ({"test_ids": "row"}, "test_ids must be auto, key or position"),
        ({"save_checkpoints_at": 1}, "a number of checkpoints must be at least 2"),
        ({"reduce": "task", "tests_per_record": 2}, "reduce needs all tests"),
        ({"reduce": "task", "grad_features": 2}, "reduce keeps no single tests"),
        ({"id_source": "nobody.knows"}, r"id_source .*'nobody.knows' can't be imported"),
        ({"grad_features": "torch.nothing"}, "grad_features: 'torch.nothing' can't be imported"),
        ({"metrics": {"loss": "torch.nothing"}}, r"metrics\.loss\.function: 'torch.nothing' can't be imported"),
        ({"metrics": {"loss": {"every_n_steps": 0}}}, r"metrics\.loss\.every_n_steps must be a whole number"),
        ({"metrics": {"loss": 3}}, r"metrics\.loss must be a function, its import path or options, got 3"),
        ({"metrics": {"accuracy": {"choice": [1]}}}, r"metrics\.accuracy: .*unexpected keyword argument 'choice'"),
        ({"metrics": {"accuracy": {"choices": ["a"]}}}, r"metrics\.accuracy\.choices: there must be at least 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        recorder("x", **options)


def test_more_ways_not_to_know_the_rows(tmp_path):
    class Rows:
        def __iter__(self):
            return iter([])

    class Alien(Classifier):
        def train_dataloader(self):
            return Rows()

    with pytest.raises(ValueError, match="sampler needs a torch DataLoader, got Rows"):
        fit(tmp_path, Alien())
    with pytest.raises(ValueError, match="in the order they are drawn; set in_order=True"):
        fit(tmp_path, Classifier(num_workers=1, in_order=False))
    loader = DataLoader(Points(4), batch_size=None)
    with pytest.raises(ValueError, match="test_dataloader must make batches of examples"):
        fit(tmp_path, options={"test_dataset": None, "test_dataloader": loader})


def test_all_options_can_stand_in_yaml():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    text = """
- class_path: callbacks.dynamics.TrainingDynamicsRecorder
  init_args:
    out_dir: runs
    run_id: a
    test_dataset: {class_path: tests.callbacks.test_dynamics.Points, init_args: {num: 3, ids: true}}
    metrics:
      loss: null
      accuracy: {every_n_steps: 5, choices: [" yes", " no"]}
      margin: {function: tests.callbacks.test_dynamics.margin, power: 2}
    every_n_steps: 2
    tests_per_record: 4
    id_source: tests.callbacks.test_dynamics.rows_seen
    save_checkpoints_at: [0, 5]
    grad_features: 16
    pool: 10
- class_path: callbacks.dynamics.TrainingDynamicsRecorder
  init_args:
    out_dir: runs
    test_dataloader: val
    save_checkpoints_at: 3
    grad_features: tests.callbacks.test_dynamics.means
"""
    first, second = parser.instantiate_classes(parser.parse_args([f"--callbacks={text}"])).callbacks
    assert (len(first.tests), first.folder, first.pool) == (3, Path("runs/a"), 10)
    assert [(measure.name, measure.every_n_steps) for measure in first.measures] == [
        ("loss", 2),
        ("accuracy", 5),
        ("margin", 2),
    ]
    assert first.measures[1].function.choices == [" yes", " no"]
    assert first.ids.source is rows_seen or first.ids.source.__name__ == "rows_seen"
    assert (first.grad_features, first.save_checkpoints_at) == (16, [0, 5])
    assert (second.tests, second.save_checkpoints_at, second.folder) == ("val", 3, Path("runs"))
    assert second.grad_features.__name__ == "means"
