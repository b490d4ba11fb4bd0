"""FSDP2 (`fully_shard`) on two CPU processes over gloo: train, save, resume, export."""

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
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo/tiny.yaml"])
def test_sharded_run_saves_resumes_and_exports(name, tmp_path, free_port):
    (tmp_path / "fsdp2.yaml").write_text(STRATEGY)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}",
        "-m", "lit_models", "fit", "--config", name, "--config", str(tmp_path / "fsdp2.yaml"),
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    environment = os.environ | {"LIT_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = [
        subprocess.run([*command, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        for more in (["--trainer.max_steps=6"], ["--ckpt_path=last"])
    ]
    assert [result.returncode for result in run] == [0, 0], run[0].stderr[-3000:] + run[1].stderr[-3000:]
    saved = torch.load(tmp_path / "ppo-tiny/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert saved["ppo"]["rollouts"] == 12
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"actor", "critic", "reference"}
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo-tiny/export/actor").state_dict()
    for key, value in exported.items():
        assert torch.equal(value, saved["state_dict"][f"actor.{key}"]), key
