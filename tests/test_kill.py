"""Runs of every stage killed at arbitrary moments, and a disk that fills up, through the command line."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_models.__main__ import main

FORK = multiprocessing.get_context("fork")  # the children start with everything imported
EVERY_STEP = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", save_last: true, every_n_train_steps: 1}
"""
EXTRAS = {
    "sft": "    - {class_path: callbacks.EMA, init_args: {decay: 0.9}}\n",
    "reward": "",
    "ppo": "    - {class_path: callbacks.EMA, init_args: {decay: 0.9}}\n"
    "    - {class_path: callbacks.KLController, init_args: {target: 0.1, horizon: 50}}\n",
}
STEPS = 12


def command(stage, folder, *more):
    """A run that saves after every step, with all that has a state of its own."""
    extra = folder / "every_step.yaml"
    extra.write_text(EVERY_STEP + EXTRAS[stage])
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    length = f"--trainer.max_steps={STEPS}"
    return ["fit", "--config", f"{stage}/tiny.yaml", "--config", str(extra), length, *quiet, *more]


def child(folder, args, limit=None):
    """The command in a process of its own."""
    os.environ["LIT_RUNS"] = str(folder)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = (folder / "stderr.txt").open("a")
    main(args)


def start(folder, args, limit=None):
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=child, args=(folder, args, limit))
    process.start()
    return process


def run(folder, args, limit=None):
    process = start(folder, args, limit)
    process.join(300)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def kill_later(folder, args, last, draws):
    """Let a run go on until it has saved something new, then kill it a random moment later; whether it still ran."""
    before = last.stat().st_mtime_ns if last.exists() else 0
    process = start(folder, args)
    while process.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
        time.sleep(0.005)
    time.sleep(draws.uniform(0.0, 0.15))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def leaves(value, path=()):
    """Everything in a checkpoint, by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))
    else:
        yield path, value


def same_state(one: Path, other: Path, parts):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    for part in parts:
        if part not in one and part not in other:
            continue
        left, right = dict(leaves(one[part])), dict(leaves(other[part]))
        assert left.keys() == right.keys()
        for path, value in left.items():
            assert torch.equal(value, right[path]) if torch.is_tensor(value) else value == right[path], (part, path)


@pytest.mark.parametrize("stage", EXTRAS)
def test_a_run_killed_again_and_again_ends_with_the_same_weights(stage, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run(whole, command(stage, whole)) == 0, (whole / "stderr.txt").read_text()[-3000:]
    last = killed / f"{stage}-tiny/checkpoints/last.ckpt"
    draws = random.Random(0)
    args = command(stage, killed)
    kills = kill_later(killed, args, last, draws)
    resume = [*args, "--ckpt_path=last"]
    kills += kill_later(killed, resume, last, draws) + kill_later(killed, resume, last, draws)
    assert kills >= 2, "the runs were too fast to be killed"
    assert run(killed, resume) == 0, (killed / "stderr.txt").read_text()[-3000:]
    parts = ["state_dict", "optimizer_states", "lr_schedulers", "ppo", "global_step", "epoch"]
    same_state(whole / f"{stage}-tiny/checkpoints/last.ckpt", last, parts)


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path):
    args = command("sft", tmp_path)
    assert run(tmp_path, [*args, "--trainer.max_steps=3"]) == 0
    last = tmp_path / "sft-tiny/checkpoints/last.ckpt"
    assert run(tmp_path, [*args, "--ckpt_path=last"], limit=last.stat().st_size // 2) == 1
    message = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert message.startswith("error: the checkpoint ")
    assert "checkpoints written before are intact" in message
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert run(tmp_path, [*args, "--ckpt_path=last"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == STEPS
