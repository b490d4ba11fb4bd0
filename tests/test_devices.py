"""Every method on another device than the CPU, which finds what is made or left on the wrong one."""

import os
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import MPSAccelerator

from callbacks.rng import RandomState
from lit_models.cli import main
from tests import far_device
from tests.sharding_cases import together

STEPS = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
LESS = ["--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DEVICE = ["--trainer.accelerator=far", "--trainer.inference_mode=false"]
METHODS = {
    "sft": ["--trainer.val_check_interval=4", "--trainer.accumulate_grad_batches=2"],
    "reward": [],
    "ppo": ["--config", "ppo/method-ma.yaml", "--config", "ppo/method-cd.yaml"],
    "pixel": [],
    "pixel/mae": ["--data.init_args.batch_size=4"],
    "pixel/task": ["--data.init_args.batch_size=4"],
    "influence": [],
    "diffusion": ["--data.init_args.batch_size=4", "--data.init_args.limit_val=4"],
}
UNHURRIED = ("ppo", "pixel", "pixel/task", "influence")
"""Methods whose training steps read values: lengths of responses, sides of padding, labels, examples of a batch."""


class Watch(Callback):
    """Where networks are, and what the module itself waits for in training steps."""

    def __init__(self):
        self.devices, self.waits = set(), Counter()

    def on_train_start(self, trainer, pl_module):
        self.devices = {parameter.device.type for parameter in pl_module.parameters()}
        step = pl_module.training_step

        def watched(*args):
            with far_device.watched(self.waits):
                return step(*args)

        pl_module.training_step = watched


def run(method, folder, rank):
    """Train, test and predict on the device."""
    far_device.install()
    os.environ["LIT_RUNS"] = str(folder)
    preset = f"{method}.yaml" if "/" in method else f"{method}/tiny.yaml"
    watch = Watch()
    with mock.patch("lit_models.cli.callbacks.RNGState", return_value=watch):
        cli = main(["fit", "--config", preset, *STEPS, *LESS, *QUIET, *DEVICE, *METHODS[method]])
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    cli.trainer.predict(cli.model, cli.datamodule)
    waits = [place for place in watch.waits if "/lit_models/" in place]
    weights = [value.cpu() for value in cli.model.state_dict().values() if value.is_floating_point()]
    return watch.devices, cli.trainer.global_step, all(bool(value.isfinite().all()) for value in weights), waits


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_tests_and_predicts_on_a_device(method, tmp_path):
    ((devices, steps, finite, waits),) = together(partial(run, method, tmp_path), tmp_path / "work", world=1)
    assert devices == {"far"}
    assert steps >= 2
    assert finite
    assert not waits or method in UNHURRIED


def strictness(rank):
    """What the device of these tests refuses."""
    far_device.install()
    x = torch.ones(3, device="far")
    wrong = {
        "mix": lambda: x + torch.ones(3),
        "row": lambda: torch.stack([x[0], torch.ones(())]),
        "numpy": lambda: x.numpy(),
        "draw": lambda: torch.rand(3, device="far", generator=torch.Generator()),
        "index": lambda: torch.ones(3)[torch.zeros(1, device="far", dtype=torch.long)],
    }
    refused = set()
    for name, work in wrong.items():
        try:
            work()
        except (RuntimeError, TypeError):
            refused.add(name)
    waits = Counter()
    with far_device.watched(waits):
        x.sum() * torch.ones(())
        torch.ones(3).to("far", non_blocking=True)
        quiet = len(waits)
    with far_device.watched(waits):
        float(x[0])
    return refused, quiet, len(waits)


def test_device_is_as_strict_as_a_gpu(tmp_path):
    assert together(strictness, tmp_path / "work", world=1) == [({"mix", "row", "numpy", "draw", "index"}, 0, 1)]


def test_random_states_of_a_run_on_the_cpu_leave_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("took memory of a GPU"))
    assert RandomState.now().cuda is None


def test_random_state_of_a_gpu_in_use_is_kept_and_restored(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", kept.append)
    RandomState.from_plain(RandomState.now().plain()).restore()
    assert [state.tolist() for state in kept] == [[7]]


def test_gpus_of_apple_are_not_chosen_and_are_refused_with_the_key(monkeypatch, tmp_path):
    from lightning.pytorch import Trainer

    from lit_models.sft import LitSFT

    class Apple(MPSAccelerator):
        """Found on any machine."""

    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    cli = main(["fit", "--config", "sft/tiny.yaml", *QUIET, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    assert cli.trainer.strategy.root_device.type == "cpu"
    module = cli.model
    module._trainer = mock.Mock(spec=Trainer)
    module._trainer.strategy.root_device = torch.device("mps", 0)
    with pytest.raises(ValueError, match=r"trainer.accelerator.*cpu"):
        LitSFT.setup(module, "fit")
