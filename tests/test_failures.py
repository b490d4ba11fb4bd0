"""What goes wrong on several machines: every process ends, and the error that caused it can be read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from callbacks.requeue import EXIT_CODE
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
    assert "RuntimeError: the original error\n" in command.text()
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
    from lit_models.__main__ import main

    sys.stderr = (folder / "stderr.txt").open("a")
    options = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2"]
    main(["fit", "--config", "sft/tiny.yaml", *options, *QUIET])


def test_a_timeout_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_MODELS_JOIN_TIMEOUT", "soon")
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
