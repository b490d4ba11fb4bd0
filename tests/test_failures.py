"""What goes wrong on several machines: every process ends, and the error that caused it can be read."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.requeue import EXIT_CODE
from lit_models import errors
from lit_models.__main__ import main
from lit_models.launching import trainer_message
from tests.stopping import added
from tests.test_preemption import FORK, QUIET, ROOT, SMALL, run, strategy, two_ranks

ENDS_S = 60
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
FIT = ["-m", "lit_models", "fit", "--config", "sft/tiny.yaml", *SMALL, *TWO, *QUIET]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)  # of runs before


class Command:
    """A command in a session of its own, of which nothing may be left.

    Args:
        folder: for its output.
        args: of Python.
    """

    def __init__(self, folder, *args):
        self.output = folder / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *args], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def text(self):
        return self.output.read_text()

    def wait_for(self, words):
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)

    def ended(self):
        """Its exit code, once all of its processes are gone."""
        try:
            code = self.process.wait(ENDS_S)
            deadline = time.monotonic() + ENDS_S
            while self._lives():
                assert time.monotonic() < deadline, f"processes are left\n{self.text()}"
                time.sleep(0.1)
        finally:
            if self._lives():
                os.killpg(self.process.pid, signal.SIGKILL)
        return code

    def _lives(self):
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "failing"),
    [
        ("lightning", 0),
        ("lightning", 1),
        ("torchrun", 1),
    ],
)
def test_one_process_fails_while_the_other_waits(launcher, failing, tmp_path, free_port):
    fails = added(tmp_path, "RaiseAt", place="batch", at=3, rank=failing)
    args = [*FIT, *fails]
    if launcher == "lightning":  # the other one waits for good, as NCCL does
        args += added(tmp_path, "HangAt", place="batch", at=3, rank=1 - failing)
    else:
        args = [*TORCHRUN, f"--master_port={free_port}", *args]
    command = Command(tmp_path, *args)
    command.wait_for("the original error")
    assert command.ended() not in (0, EXIT_CODE)
    text = command.text()
    assert "RuntimeError: the original error\n" in text
    assert "closed by peer" not in text  # what others say of it
    assert launcher != "torchrun" or text.rfind("RuntimeError: the original error") > text.rfind("Root Cause")
    assert not list(tmp_path.rglob("export"))


@pytest.mark.parametrize("node", [0, 1])
def test_a_missing_node(node, tmp_path, free_port, monkeypatch):
    """Neither the first node, which waits for others to call, nor another, which calls, waits for good."""
    monkeypatch.setenv("LIT_MODELS_JOIN_TIMEOUT", "2")
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port, "NODE_RANK": node}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    process = FORK.Process(target=alone, args=(tmp_path,))
    process.start()
    process.join(ENDS_S)
    code = process.exitcode
    process.kill()
    assert code == 1
    (line,) = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if line.startswith("error: ")]
    assert f"process {node} of 2 waited 2 s at 127.0.0.1:{free_port} for the others" in line
    assert "LIT_MODELS_JOIN_TIMEOUT" in line


def alone(folder):
    """One of two nodes."""
    sys.stderr = (folder / "stderr.txt").open("a")
    options = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2"]
    main(["fit", "--config", "sft/tiny.yaml", *options, *QUIET])


def test_a_timeout_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_MODELS_JOIN_TIMEOUT", "soon")
    monkeypatch.setenv("NODE_RANK", "0")
    options = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2"]
    assert run(tmp_path, "sft", *options) == "error: LIT_MODELS_JOIN_TIMEOUT must be a number of seconds, got 'soon'"


@pytest.mark.slow
def test_a_stopped_run_in_shards_goes_on_elsewhere(tmp_path, free_port):
    """On one process, with the same global batch; with another one it is told what to set."""
    stop = added(tmp_path, "SignalAt", place="batch", at=2)
    options = [*SMALL, *strategy(tmp_path, "shards")]
    assert two_ranks(tmp_path, free_port, "sft", *options, *stop) == [EXIT_CODE, 0]
    with pytest.warns(UserWarning, match="checkpoint holds those of 2 processes and this run has 1"):
        assert run(tmp_path, "sft", *SMALL, "--data.batch_size=8", "--ckpt_path=last") == 0
    assert Path(tmp_path / "sft-tiny/export/model/config.json").is_file()


CPU = ["--trainer.accelerator=cpu"]
IN_SHARDS = "--config trainer/fsdp2.yaml trains in shards"
NO_DEVICES = "trainer.devices must be auto, or a positive number of processes, got "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*CPU, "--trainer.devices=0"], f"{NO_DEVICES}'0'"),
        ([*CPU, "--trainer.devices=-1"], f"{NO_DEVICES}'-1'"),
        ([*CPU, "--trainer.devices=two"], f"{NO_DEVICES}'two'"),
        ([*CPU, "--trainer.num_nodes=0"], "trainer.num_nodes: `num_nodes` must be a positive integer, but got 0"),
        ([*CPU, "--trainer.num_nodes=2"], "trainer.num_nodes: nothing says which of 2 nodes this is; start on each"),
        ([*CPU, "--trainer.strategy=none"], f"trainer.strategy: there is no 'none'; take auto or ddp, and {IN_SHARDS}"),
        ([*TWO, "--trainer.strategy=fsdp"], f"trainer.strategy: fsdp is not supported; {IN_SHARDS}"),
        ([*TWO, "--trainer.strategy=ddp_spawn"], "trainer.strategy: processes that are started by 'spawn' do not hear"),
        ([*CPU, "--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ([*CPU, "--trainer.limit_val_batches=1.5"], "trainer.limit_val_batches: You have passed invalid value 1.5"),
        (["--trainer.accelerator=abc"], "trainer.accelerator: You selected an invalid accelerator name"),
        ([*CPU, "--ckpt_path=no/such.ckpt"], "ckpt_path: there is no checkpoint at no/such.ckpt; last stands for the"),
        ([*CPU, f"--ckpt_path={__file__}"], f"ckpt_path: {__file__} is no checkpoint, or not all of one; take a file"),
        ([*CPU, f"--ckpt_path={ROOT}"], f"ckpt_path: {ROOT} is no checkpoint, or not all of one; take a file"),
        ([*CPU, "--ckpt_path=best"], "ckpt_path: which checkpoint is best only the process that trained knows"),
        ([*CPU, "--ckpt_path=hpc"], "ckpt_path: hpc is asked for, but no run in "),
    ],
)
def test_options_that_cannot_work_are_one_sentence(options, words, tmp_path):
    end = run(tmp_path, "sft", *options)
    assert str(end).startswith(f"error: {words}")
    assert len(str(end).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("preset", ["gpu", "ddp", "fsdp2"])
def test_presets_for_gpus_without_one(preset, tmp_path):
    end = run(tmp_path, "sft", "--config", f"trainer/{preset}.yaml")
    assert end.startswith("error: trainer.accelerator: gpu is asked for, but torch")
    assert end.endswith("take --trainer.accelerator=cpu --trainer.precision=32-true")


def test_more_gpus_than_there_are():
    error = MisconfigurationException("You requested gpu: [0, 1]\n But your machine only has: [0]")
    words = "trainer.devices: You requested gpu: [0, 1] But your machine only has: [0]; set it to auto, or to what is"
    assert trainer_message(error, {"devices": 2}).startswith(words)
    assert trainer_message(ValueError("a `profiler` of sorts"), {"devices": 2, "profiler": "x"}) == (
        "trainer.profiler: a `profiler` of sorts"
    )


def test_a_strategy_that_is_not_installed(tmp_path):
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    end = run(tmp_path, "sft", *TWO, "--trainer.strategy=deepspeed")
    assert end.startswith("error: trainer.strategy: To use the `DeepSpeedStrategy`")
    assert end.endswith(f"But {IN_SHARDS} without it")


def test_torchrun_with_other_numbers_than_the_options(tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    words = "trainer.devices x trainer.num_nodes is 1 x 1, but torchrun started 2 processes; set them to"
    assert run(tmp_path, "sft", *CPU).startswith(f"error: {words}")


def test_the_last_checkpoint_of_no_run(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: ckpt_path: last is asked for, but no run in .*sft-tiny has saved"):
        main(["test", "--config", "sft/tiny.yaml", *CPU, *QUIET, "--ckpt_path=last"])


def test_a_check_that_fails_in_forked_processes_is_one_sentence(tmp_path):
    end = run(tmp_path, "sft", *TWO, "--trainer.strategy=ddp_fork", "--data.limit_train=1")
    assert end.startswith("error: data: 1 training rows cannot be divided among 2 processes")
    assert len(end.splitlines()) == 1


def traceback_of(function):
    try:
        function()
    except Exception:
        return traceback.format_exc()


def wrapped():
    try:
        find_charset()
    except ValueError as error:
        raise RuntimeError("a library is at a loss") from error


def find_charset():
    from lit_models.tokenization import load_tokenizer

    load_tokenizer("/no/such/folder")


def test_words_of_other_processes():
    trace = traceback_of(find_charset)
    said = errors.own_words(f"-- Process 1 terminated with the following error:\n{trace}")
    assert said.startswith("tokenizer: '/no/such/folder' is neither a tokenizer on the hub nor a local folder")
    assert errors.own_words(traceback_of(wrapped)) == said
    assert errors.own_words(traceback_of(lambda: int("x"))) is None


def test_torchrun_is_told_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv(errors.TORCHRUN_FILE, str(tmp_path / "error.json"))
    end = run(tmp_path, "sft", *CPU, "--trainer.accumulate_grad_batches=0")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"] == end
