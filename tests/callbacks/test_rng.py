import random

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks import RNGState
from callbacks.rng import RandomState
from tests.callbacks.tiny import Tiny, trainer


class Losses(Callback):
    """Loss of every training step."""

    def __init__(self):
        self.values = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values[trainer.global_step] = outputs["loss"].item()


class SaveAtEvery(Callback):
    """Checkpoints at every place where one may be written."""

    def __init__(self, folder):
        self.folder = folder

    def _save(self, trainer, place):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{place}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch")


def fit(folder, workers=0, ckpt_path=None, save=False, validate=True, seed=5, extra=(), **options):
    """Losses by step and the trained module."""
    seed_everything(seed, verbose=False)
    model, losses = Tiny(workers), Losses()
    run = trainer(
        folder,
        callbacks=[RNGState(), losses, *extra, *([SaveAtEvery(folder)] if save else [])],
        **({"val_check_interval": 3} if validate else {"limit_val_batches": 0}),
        **options,
    )
    run.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return losses.values, model


def assert_resumes_exactly(folder, checkpoint, whole, **options):
    resumed, model = fit(folder, ckpt_path=checkpoint, seed=99, **options)
    losses, uninterrupted = whole
    assert resumed
    assert resumed == {step: losses[step] for step in resumed}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bitwise(tmp_path, workers):
    whole = fit(tmp_path, workers, save=True)
    # In the middle of an epoch, before and after a validation, and at the end of an epoch.
    places = ["batch-2", "batch-3", "validation-3", "batch-6", "validation-6", "epoch-6", "batch-8", "validation-9"]
    for place in places if workers == 0 else ["batch-2", "validation-3", "epoch-6"]:
        assert_resumes_exactly(tmp_path, tmp_path / f"{place}.ckpt", whole, workers=workers)


def test_resume_is_bitwise_after_model_checkpoint(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="saved", every_n_train_steps=4, save_top_k=1, save_last=True)
    whole = fit(tmp_path, extra=[saver], max_steps=10, enable_checkpointing=True)
    resumed = ModelCheckpoint(dirpath=tmp_path, filename="saved", every_n_train_steps=4, save_top_k=1, save_last=True)
    assert_resumes_exactly(
        tmp_path, tmp_path / "last.ckpt", whole, extra=[resumed], max_steps=10, enable_checkpointing=True
    )


def test_validation_changes_nothing_in_training(tmp_path):
    assert fit(tmp_path)[0] == fit(tmp_path, validate=False)[0]


def test_validation_after_a_resume_draws_the_same_numbers(tmp_path):
    _, whole = fit(tmp_path, save=True, max_epochs=1)
    _, resumed = fit(tmp_path, ckpt_path=tmp_path / "batch-2.ckpt", seed=99, max_epochs=1)
    assert resumed.trainer.callback_metrics["val/loss"] == whole.trainer.callback_metrics["val/loss"]


def test_all_generators_are_restored():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    random.gauss(0, 1)  # leaves the second of its two numbers in the state
    np.random.randn()
    state = RandomState.now().plain()
    drawn = draw()
    seed_everything(1, verbose=False)
    RandomState.from_plain(state).restore()
    assert draw() == drawn


def test_another_number_of_processes_restores_nothing(tmp_path):
    fit(tmp_path, save=True, max_epochs=1)
    checkpoint = torch.load(tmp_path / "batch-3.ckpt", weights_only=True)
    checkpoint["callbacks"]["RNGState"]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="holds those of 2 processes and this run has 1") as caught:
        fit(tmp_path, ckpt_path=tmp_path / "two.ckpt")
    assert sum("random states" in str(warning.message) for warning in caught) == 1


def draw_on_two_ranks(folder, ckpt_path=None):
    """Weights after training on two processes whose dropout differs."""
    model = Tiny()
    run = trainer(
        folder,
        callbacks=[DifferentRanks(), RNGState(), SaveAtEvery(folder)],
        devices=2,
        strategy="ddp_fork",
        max_epochs=1,
        limit_val_batches=0,
        limit_train_batches=4,
    )
    run.fit(model, ckpt_path=ckpt_path, weights_only=True)
    return model


class DifferentRanks(Callback):
    """Gives each process a seed of its own."""

    def on_fit_start(self, trainer, pl_module):
        torch.manual_seed(trainer.global_rank)


@pytest.mark.slow
def test_each_process_gets_its_own_states_back(tmp_path):
    whole = draw_on_two_ranks(tmp_path)
    ranks = torch.load(tmp_path / "batch-2.ckpt", weights_only=True)["callbacks"]["RNGState"]["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["training"]["torch"], ranks[1]["training"]["torch"])
    resumed = draw_on_two_ranks(tmp_path, tmp_path / "batch-2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
