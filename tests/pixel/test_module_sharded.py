"""Pre-training with sharded networks (FSDP2) on two CPU processes."""

import pytest
import torch
from safetensors.torch import load_file

from tests.test_fsdp2 import QUIET, run, strategy

TINY = ["-m", "lit_models", "fit", "--config", "pixel/tiny.yaml", "--model.init_args.lr_scheduler.init_args.total=20"]


@pytest.mark.slow
def test_sharded_run_equals_one_process(tmp_path, free_port):
    pair, single = tmp_path / "pair", tmp_path / "single"
    pair.mkdir()
    single.mkdir()
    options = ["--trainer.max_steps=8", "--trainer.accumulate_grad_batches=2", *QUIET]
    run(pair, free_port, *TINY, *strategy(pair, sharded=False), "--data.init_args.batch_size=4", *options)
    run(single, None, *TINY, "--data.init_args.batch_size=8", *options)
    files = [folder / "pixel-tiny/checkpoints/last.ckpt" for folder in (pair, single)]
    sharded, whole = (torch.load(path, weights_only=True)["state_dict"] for path in files)
    assert sharded.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sharded[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_sharded_images_resume_although_tokens_have_no_optimizer_state(tmp_path, free_port):
    broken, single = tmp_path / "broken", tmp_path / "single"
    broken.mkdir()
    single.mkdir()
    options = ["--data.init_args.modes=[image]", *QUIET]
    sharded = [*TINY, *strategy(tmp_path, sharded=True), "--data.init_args.batch_size=4", *options]
    run(broken, free_port, *sharded, "--trainer.max_steps=10")
    run(broken, free_port, *sharded, "--ckpt_path=last")
    run(single, None, *TINY, "--data.init_args.batch_size=8", *options)
    files = [folder / "pixel-tiny/export/model/model.safetensors" for folder in (broken, single)]
    resumed, whole = (load_file(path) for path in files)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, atol=1e-5, rtol=1e-5)
