"""FSDP2 through the command line and torch's launcher, on two CPU processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_models import export
from lit_models.cli import main
from lit_models.shards import is_in_shards

ROOT = Path(__file__).parent.parent
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
PPO = ["fit", "--config", "ppo/tiny.yaml", "--config", "ppo/method-ma.yaml", "--config", "ppo/method-cd.yaml", *QUIET]
SHARDED = [
    *("--config", "trainer/fsdp2.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"),
    "--model.init_args.sharding.param_dtype=float32",
]


def launch(folder, port, *args):
    """A command in two processes of torch's launcher that meet at a port; without one, as Lightning launches it."""
    launcher = [] if port is None else ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    launcher += ["-m", "lit_models"]
    environment = os.environ | {"LIT_RUNS": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *args]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_preset_runs_in_shards_resumes_exports_and_equals_one_process(tmp_path, free_port, monkeypatch):
    pair, single = tmp_path / "pair", tmp_path / "single"
    pair.mkdir()
    two = [*PPO, *SHARDED, "--data.init_args.batch_size=4"]
    launch(pair, free_port, *two, "--trainer.max_steps=6")
    last = pair / "ppo-tiny/checkpoints/last.ckpt"
    assert is_in_shards(last)
    launch(pair, free_port, *two, "--ckpt_path=last")

    monkeypatch.setenv("LIT_RUNS", str(single))
    main([*PPO, "--data.init_args.batch_size=8"])
    whole = torch.load(single / "ppo-tiny/checkpoints/last.ckpt", weights_only=True)
    assert whole["global_step"] == 12
    export.main([str(last), str(pair / "out")])
    for name in ("actor", "critic"):
        folders = [single / "ppo-tiny/export", pair / "ppo-tiny/export", pair / "out"]
        expected, live, offline = (load_file(folder / name / "model.safetensors") for folder in folders)
        assert expected.keys() == live.keys() == offline.keys()
        for key, value in expected.items():
            torch.testing.assert_close(live[key], value, atol=1e-5, rtol=1e-5)
            assert torch.equal(live[key], offline[key]), key


# -- on GPUs: NCCL, and computation in bfloat16 ------------------------------------------------------------------------

on_gpus = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WORLD = min(2, torch.cuda.device_count())
DEVICES = [f"--trainer.devices={WORLD}"]
CURIOUS = ["--config", "ppo/method-ma.yaml", "--config", "ppo/method-cd.yaml"]
METHODS = {  # steps after which the preset saves, and what goes with it
    "sft/tiny": (10, []),
    "reward/tiny": (10, []),
    "ppo/tiny": (6, CURIOUS),
    "pixel/tiny": (10, []),
    "pixel/mae": (500, []),
    "pixel/task": (100, []),
    "influence/tiny": (20, []),
    "diffusion/tiny": (10, []),
}


def saved_twice(preset, folder, trainer):
    """The command of a preset in a folder, stopped halfway and resumed; returns it, and the folder of the run."""
    steps, more = METHODS[preset]
    command = ["--config", f"{preset}.yaml", *more, *trainer, *QUIET]
    launch(folder, None, "fit", *command, f"--trainer.max_steps={steps}")
    launch(folder, None, "fit", *command, f"--trainer.max_steps={2 * steps}", "--ckpt_path=last")
    return command, folder / preset.replace("/", "-")


def finite_weights(folder):
    """All weights of an exported folder, by file and name."""
    weights = {
        (path.relative_to(folder), name): value
        for path in folder.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }
    assert weights
    assert all(value.isfinite().all() for value in weights.values())
    return weights


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("preset", METHODS)
def test_gpus_train_in_shards_resume_and_export(preset, tmp_path):
    _, run = saved_twice(preset, tmp_path, ["--config", "trainer/fsdp2.yaml", *DEVICES])
    assert is_in_shards(run / "checkpoints/last.ckpt")
    export.main([str(run / "checkpoints/last.ckpt"), str(tmp_path / "out")])
    live, offline = finite_weights(run / "export"), finite_weights(tmp_path / "out")
    assert live.keys() == offline.keys()
    for key, value in live.items():
        assert torch.equal(value, offline[key]), key


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("preset", METHODS)
def test_one_gpu_trains_resumes_tests_and_predicts(preset, tmp_path):
    command, run = saved_twice(preset, tmp_path, ["--config", "trainer/gpu.yaml"])
    finite_weights(run / "export")
    for work in ("test", "predict"):
        launch(tmp_path, None, work, *command, f"--ckpt_path={run / 'checkpoints/last.ckpt'}")


@pytest.mark.gpu
@on_gpus
def test_gpus_in_float32_give_what_one_process_on_the_cpu_gives(tmp_path, monkeypatch):
    # Not Adam, which makes steps of full length out of gradients that are rounding errors.
    descent = ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=0.5"]
    preset = ["fit", "--config", "sft/tiny.yaml", *descent, *QUIET, "--trainer.max_steps=3"]
    sharded = [*preset, "--config", "trainer/fsdp2.yaml", "--model.init_args.sharding.param_dtype=float32", *DEVICES]
    launch(tmp_path, None, *sharded, "--data.init_args.batch_size=2")
    monkeypatch.setenv("LIT_RUNS", str(tmp_path / "single"))
    main([*preset, "--trainer.accelerator=cpu", f"--data.init_args.batch_size={2 * WORLD}"])
    folders = (tmp_path / "sft-tiny/export/model", tmp_path / "single/sft-tiny/export/model")
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, atol=1e-4, rtol=1e-3)
