"""Runs of every method killed at arbitrary moments, and a disk that fills up, through the command line."""

import csv
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

from callbacks.checkpoint_io import DRAFT
from lit_models.__main__ import main
from tests.stopping import added

FORK = multiprocessing.get_context("fork")
CONFIGS = Path(__file__).parent.parent / "configs"
EVERY_STEP = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: "${trainer.default_root_dir}/checkpoints", save_last: true, every_n_train_steps: 1}
    - {class_path: callbacks.ExportPretrained, init_args: {dirpath: "${trainer.default_root_dir}/export"}}
"""
EMA = "    - {class_path: callbacks.EMA, init_args: {decay: 0.9}}\n"
KL = "    - {class_path: callbacks.KLController, init_args: {target: 0.1, horizon: 50}}\n"
FEW = ["--data.limit_train=200", "--data.limit_val=40"]
FEW_PAIRS = ["--data.n_train_pairs=200", "--data.n_test_pairs=40"]
SMALL = ["--data.batch_size=8", "--data.val_batch_size=8"]
MA_CD = ["ppo/tiny.yaml", "ppo/method-ma.yaml", "ppo/method-cd.yaml"]
TINY = """
model:
  init_args:
    backbone:
      init_args:
        overrides: {image_size: [16, 1024], num_channels: 1, vocab_size: 1000, hidden_size: 32, intermediate_size: 64,
          num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, pad_token_id: 0}
"""
# Configurations, more YAML (first of all callbacks with a state), and further options of every method.
METHODS = {
    "sft": (["sft/tiny.yaml"], EMA, FEW),
    "reward": (["reward/tiny.yaml"], "", FEW_PAIRS),
    "ppo": (["ppo/tiny.yaml"], EMA + KL, FEW),
    "ppo, macro and curious": (MA_CD, "", FEW),
    "pixel": (["pixel/tiny.yaml"], EMA, FEW),
    "pixel, masked": (["pixel/mae.yaml"], "", [*FEW, *SMALL]),
    "pixel, task": (["pixel/task.yaml"], TINY, [*FEW, *SMALL]),
    "influence": (["influence/tiny.yaml"], EMA, []),
    "diffusion": (["diffusion/tiny.yaml"], EMA, []),
}
KILLS = 10
STEPS = 32
PARTS = ["state_dict", "optimizer_states", "lr_schedulers", "ppo", "masked_batches", "waveform", "stopping"]
PARTS += ["ema_updates", "reward_statistics", "global_step", "epoch"]


def command(method, folder, *more):
    """A run that saves after every step, with all that has a state of its own."""
    configs, more_yaml, options = METHODS[method]
    extra = folder / "every_step.yaml"
    extra.write_text(EVERY_STEP + more_yaml)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    length = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=1"]
    files = [argument for name in (*configs, str(extra)) for argument in ("--config", name)]
    return ["fit", *files, *length, *options, *quiet, f"--trainer.default_root_dir={folder}/run", *more]


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


def saved(path):
    """When a file was written; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_later(folder, args, last, saves, delay):
    """Let a run go on until it has saved something new, then kill it; whether it still ran.

    Args:
        folder: of the run.
        args: command.
        last: newest checkpoint.
        saves: how often it saves before; 0 to kill it before it saves anything, "end" after its last step.
        delay: seconds until then; None to kill it while it writes the next checkpoint.
    """
    process = start(folder, args)
    seen, count = saved(last), 0
    end = f"*step={STEPS}.ckpt"
    while process.is_alive() and not (any(last.parent.glob(end)) if saves == "end" else count >= saves):
        time.sleep(0.001)
        if saved(last) != seen:
            seen, count = saved(last), count + 1
    due = time.monotonic() + (delay or 0.0)
    while process.is_alive() and not (any(last.parent.glob(f"{DRAFT}*")) if delay is None else time.monotonic() > due):
        time.sleep(0 if delay is None else 0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def plan(draws):
    """Moments of all kills: in the first seconds, in and between later steps, in checkpoints, and around the end."""
    yield 0, draws.uniform(0.0, 1.0)
    for kill in range(KILLS - 2):
        yield draws.choice([1, 1, 1, 2, 3]), None if kill % 3 == 1 else draws.uniform(0.0, 0.06)
    yield "end", draws.uniform(0.0, 0.2)


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


def test_every_method_is_here():
    named = {name for configs, *_ in METHODS.values() for name in configs}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/tiny.yaml")} <= named


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_again_and_again_ends_with_the_same_weights(method, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    main(command(method, whole))  # in this process, so that those below start with everything imported
    last = killed / "run/checkpoints/last.ckpt"
    args = [*command(method, killed), "--ckpt_path=last"]
    seed = random.SystemRandom().randrange(2**32)
    for saves, delay in plan(random.Random(seed)):
        ran = kill_later(killed, args, last, saves, delay)
        assert ran or saves == "end", f"the run was too fast to be killed ({seed=})"
        files = list(last.parent.glob("*.ckpt"))
        assert last in files or saves == 0
        for path in files:
            assert torch.load(path, weights_only=True)["global_step"] >= 1, seed
    assert run(killed, args) == 0, (killed / "stderr.txt").read_text()[-3000:]
    same_state(whole / "run/checkpoints/last.ckpt", last, PARTS)
    exported = [path.relative_to(whole) for path in whole.glob("run/export/**/*.safetensors")]
    assert exported
    assert all((killed / path).read_bytes() == (whole / path).read_bytes() for path in exported), seed


@pytest.mark.parametrize("steps", [10, 12])
def test_a_run_killed_between_a_checkpoint_and_its_validation(steps, tmp_path, monkeypatch):
    """It starts with this validation, whether that is the last one of the run or not."""
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    length = f"--trainer.max_steps={steps}"
    main(command("reward", whole, length))
    args = command("reward", killed, length)
    assert run(killed, [*args, *added(killed, "KillAt", place="validation")]) == -signal.SIGKILL
    assert run(killed, [*args, "--ckpt_path=last"]) == 0, (killed / "stderr.txt").read_text()[-3000:]
    # A resumed run saves once more at its end, and so after its last validation, too.
    parts = [*PARTS, "loops"] if steps == 12 else ["state_dict", "optimizer_states", "lr_schedulers", "global_step"]
    same_state(whole / "run/checkpoints/last.ckpt", killed / "run/checkpoints/last.ckpt", parts)
    one, other = (validated(folder / "run/metrics.csv") for folder in (whole, killed))
    assert one == other
    assert one
    files = [(folder / "run/export/model/config.json").read_text() for folder in (whole, killed)]
    assert files[0] == files[1]  # which holds the statistics of the scores


def validated(path):
    """Values of validations, by step."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith("val/")}
        for row in rows
        if row.get("val/loss")
    ]


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path):
    args = command("sft", tmp_path)
    assert run(tmp_path, [*args, "--trainer.max_steps=3"]) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert run(tmp_path, [*args, "--ckpt_path=last"], limit=last.stat().st_size // 2) == 1
    message = (tmp_path / "stderr.txt").read_text().splitlines()[-1]
    assert message.startswith("error: the checkpoint ")
    assert "checkpoints written before are intact" in message
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert run(tmp_path, [*args, "--ckpt_path=last"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == STEPS
