"""FSDP2 (`fully_shard`) on two CPU processes over gloo: equality with one process, save, resume, export."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STRATEGY = """
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {{data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: {sharded}}}
"""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
PPO = ["-m", "lit_models", "fit", "--config", "ppo/tiny.yaml"]
METHODS = ["--config", "ppo/method-ma.yaml", "--config", "ppo/method-cd.yaml"]


def run(folder, port, *args):
    """A command of Python; with a port, in two processes of torch's launcher that meet there."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"] if port else []
    environment = os.environ | {"LIT_RUNS": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *args]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def strategy(folder, sharded):
    path = folder / "fsdp2.yaml"
    path.write_text(STRATEGY.format(sharded=str(sharded).lower()))
    return ["--config", str(path)]


@pytest.mark.slow
def test_sharded_run_equals_one_process_resumes_and_exports(tmp_path, free_port):
    pair, single = tmp_path / "pair", tmp_path / "single"
    pair.mkdir()
    single.mkdir()
    two = [*PPO, *METHODS, *strategy(pair, sharded=False), "--data.init_args.batch_size=4", *QUIET]
    run(pair, free_port, *two, "--trainer.max_steps=6")
    run(single, None, *PPO, *METHODS, "--data.init_args.batch_size=8", *QUIET, "--trainer.max_steps=6")
    files = [folder / "ppo-tiny/checkpoints/last.ckpt" for folder in (pair, single)]
    sharded, whole = (torch.load(path, weights_only=True)["state_dict"] for path in files)
    assert sharded.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sharded[key], value, atol=1e-5, rtol=1e-5)

    run(pair, free_port, *two, "--ckpt_path=last")
    saved = torch.load(files[0], weights_only=True)
    assert saved["global_step"] == 12
    assert saved["ppo"]["rollouts"] == 12
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"actor", "critic", "icm", "reference"}
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(pair / "ppo-tiny/export/actor").state_dict()
    for key, value in exported.items():
        assert torch.equal(value, saved["state_dict"][f"actor.{key}"]), key


@pytest.mark.slow
def test_a_checkpoint_in_shards_resumes_and_exports_as_an_uninterrupted_run(tmp_path, free_port):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    options = [*strategy(tmp_path, sharded=True), "--data.init_args.batch_size=4", *QUIET]
    run(whole, free_port, *PPO, *options)
    run(broken, free_port, *PPO, *options, "--trainer.max_steps=6")
    run(broken, free_port, *PPO, *options, "--ckpt_path=last")
    last = broken / "ppo-tiny/checkpoints/last.ckpt"
    assert last.is_dir()
    run(broken, None, "-m", "lit_models.export", str(last), str(broken / "out"))
    from safetensors.torch import load_file

    weights = [load_file(folder / "actor/model.safetensors") for folder in (whole / "ppo-tiny/export", broken / "out")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
