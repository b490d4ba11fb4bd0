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
DEVICES: list[str] = []
"""Overrides of the preset's devices, which are all GPUs of the machine."""


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("stage", ["sft", "ppo", "pixel", "diffusion"])
def test_gpus_train_in_shards_resume_and_export(stage, tmp_path):
    more = ["--config", "ppo/method-ma.yaml", "--config", "ppo/method-cd.yaml"] if stage == "ppo" else []
    preset = ["fit", "--config", f"{stage}/tiny.yaml", *more, "--config", "trainer/fsdp2.yaml", *DEVICES, *QUIET]
    half, whole = (6, 12) if stage == "ppo" else (10, 20)  # at both of which the preset saves
    launch(tmp_path, None, *preset, f"--trainer.max_steps={half}")
    run = tmp_path / f"{stage}-tiny"
    assert is_in_shards(run / "checkpoints/last.ckpt")
    launch(tmp_path, None, *preset, f"--trainer.max_steps={whole}", "--ckpt_path=last")
    export.main([str(run / "checkpoints/last.ckpt"), str(tmp_path / "out")])
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors"))
    assert files
    for file in files:
        live, offline = load_file(run / "export" / file), load_file(tmp_path / "out" / file)
        assert live.keys() == offline.keys()
        for key, value in live.items():
            assert value.isfinite().all(), key
            assert torch.equal(value, offline[key]), key


@pytest.mark.gpu
@on_gpus
def test_gpus_in_float32_give_what_one_process_on_the_cpu_gives(tmp_path, monkeypatch):
    preset = ["fit", "--config", "sft/tiny.yaml", *QUIET, "--trainer.max_steps=3"]
    sharded = [*preset, "--config", "trainer/fsdp2.yaml", "--model.init_args.sharding.param_dtype=float32", *DEVICES]
    world = 2 if DEVICES else torch.cuda.device_count()
    launch(tmp_path, None, *sharded, "--data.init_args.batch_size=2")
    monkeypatch.setenv("LIT_RUNS", str(tmp_path / "single"))
    main([*preset, "--trainer.accelerator=cpu", f"--data.init_args.batch_size={2 * world}"])
    folders = (tmp_path / "sft-tiny/export/model", tmp_path / "single/sft-tiny/export/model")
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, atol=1e-4, rtol=1e-3)
