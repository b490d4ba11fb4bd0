"""What SLURM says about a process, without SLURM: variables of a step, and folders that its nodes do not share."""

import os
import socket
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import TCPStore
from torch.multiprocessing import ProcessRaisedException

from callbacks import Requeue, run_folder
from callbacks.requeue import EXIT_CODE
from callbacks.run_folder import check_writable
from callbacks.stopped_runs import DRAFT, saved_runs
from lit_models import signals
from lit_models.launching import watched_join
from lit_models.slurm import check_launch, prepare_step
from tests.callbacks.tiny import Tiny, trainer
from tests.stopping import SignalAt, added
from tests.test_preemption import FORK, ROOT, SMALL, run


@pytest.fixture
def step(monkeypatch):
    """Function that sets the variables of a step of a job."""

    def make(tasks, counts=None, name="lit-models", **more):
        monkeypatch.setenv("SLURM_JOB_NAME", name)
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")  # of the job, which a step has a part of
        monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
        if counts is not None:
            monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", counts)
        for key, value in more.items():
            monkeypatch.setenv(key, value)

    return make


@pytest.mark.parametrize(
    ("tasks", "counts", "per_node"), [(1, "1", 1), (4, "2(x2)", 2), (6, "2(x2),2", 2), (3, "3", 3)]
)
def test_processes_per_node_are_those_of_the_step(step, tasks, counts, per_node):
    step(tasks, counts)
    prepare_step()
    assert os.environ["SLURM_NTASKS_PER_NODE"] == str(per_node)
    check_launch(tasks // per_node, per_node)
    with pytest.raises(ValueError, match=f"{tasks // per_node} x {per_node} in this SLURM step, but .* 2 x 9; add"):
        check_launch(2, 9)


def test_unequal_nodes(step):
    step(3, "2,1")
    with pytest.raises(ValueError, match=r"have 2, 1 processes, .* --ntasks-per-node instead of --ntasks"):
        prepare_step()


def test_a_batch_script_without_srun(step, monkeypatch):
    for tasks, devices in ((4, 1), (1, 4)):
        step(tasks)
        with pytest.raises(
            ValueError, match=f"has {tasks} tasks, and .* is 1 x {devices}, .* put srun before lit-models"
        ):
            check_launch(1, devices)
    check_launch(1, 1)
    monkeypatch.delenv("SLURM_NTASKS")
    check_launch(1, 4)  # a process that starts others


def test_what_is_started_by_hand_is_left_alone(step):
    step(4, "4", name="interactive")
    check_launch(1, 1)
    step(2, "1(x2)", TORCHELASTIC_RUN_ID="1")
    check_launch(2, 8)


def test_processes_of_srun_in_an_interactive_session(step, monkeypatch):
    step(2, "2", name="interactive")
    prepare_step()
    assert os.environ["SLURM_JOB_NAME"] == "interactive"  # a shell of the step has started this one
    monkeypatch.setattr("lit_models.slurm._started_by_srun", lambda: True)
    prepare_step()
    assert os.environ["SLURM_JOB_NAME"] not in ("interactive", "bash")


def test_a_run_of_two_processes_without_the_preset(step, tmp_path):
    step(2, "1(x2)", SLURM_NNODES="2", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_STEP_ID="0")
    words = "2 x 1 in this SLURM step, but trainer.num_nodes x trainer.devices is 1 x 1; add --config trainer/slurm"
    assert words in run(tmp_path, "sft")
    assert list(tmp_path.iterdir()) == []


SCRIPT = ROOT / "configs/slurm/train.sbatch"
PROGRAMS = {
    "scontrol": "echo n7; echo n8",
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"',
    "lit-models": 'kill -USR1 $$; kill -USR2 $$; kill -TERM $$; printf "<%s>" "$@" $MASTER_ADDR $MASTER_PORT; exit 3',
}


def script(folder, monkeypatch, *programs):
    """Run the shipped script with programs that stand for others."""
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    for name, value in {"SLURM_JOB_ID": "24007", "SLURM_JOB_NODELIST": "n[7-8]"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in programs:
        (folder / name).write_text(f"#!/bin/bash\n{PROGRAMS[name]}\n")
        (folder / name).chmod(0o755)
    command = ["bash", str(SCRIPT), "fit", "--model.name=two words", "a=b *", ""]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_script_passes_everything_on_and_survives_signals(tmp_path, monkeypatch):
    done = script(tmp_path, monkeypatch, *PROGRAMS)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "<fit><--model.name=two words><a=b *><><n7><20007>"


def test_the_script_without_the_environment(tmp_path, monkeypatch):
    done = script(tmp_path, monkeypatch, "scontrol", "srun")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no lit-models in PATH; activate its environment")


def test_the_script_finds_the_environment_of_its_folder(tmp_path, monkeypatch):
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "lit-models").write_text(f"#!/bin/bash\n{PROGRAMS['lit-models']}\n")
    (programs / "lit-models").chmod(0o755)
    assert script(tmp_path, monkeypatch, "scontrol", "srun").returncode == 3


def test_the_script_meets_at_the_address_of_a_node(tmp_path, monkeypatch):
    monkeypatch.setitem(PROGRAMS, "scontrol", 'test $2 = node && echo "   NodeAddr=10.0.0.$3 X=1" || echo "7"')
    assert "<10.0.0.7>" in script(tmp_path, monkeypatch, *PROGRAMS).stdout


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_port_that_is_in_use(nodes, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        words = f"port {port} of .* is in use .* MASTER_PORT"
        with pytest.raises(OSError, match=words), watched_join(SimpleNamespace(num_nodes=nodes)):
            TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)


def test_signals_are_ignored_in_the_end(tmp_path):
    """By default they would make a finished process, and with it the job, a failed one."""
    code = (
        "import atexit, os, signal\n"
        "from lit_models import signals\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGUSR1, signal.SIGTERM)])\n"
        "with signals.noted(last=True): pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REQUEUES = """#!{python}
import os, signal, sys, time
if sys.argv[1] == "requeue":
    time.sleep({seconds})
    os.kill(os.getppid(), signal.SIGTERM)
"""


def test_slurm_may_end_a_job_that_it_requeues(tmp_path, monkeypatch):
    """It sends SIGTERM to the processes that asked for it, which may have got one before."""
    program = tmp_path / "scontrol"
    program.write_text(REQUEUES.format(python=sys.executable, seconds=signals.REPEAT_S + 0.1))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    args = [*SMALL, *added(tmp_path, "SignalAt", place="batch", at=3, name="SIGTERM")]
    process = FORK.Process(target=lambda: sys.exit(run(tmp_path, "sft", *args)))
    process.start()
    process.join(100)
    assert process.exitcode == EXIT_CODE
    assert len((tmp_path / "sft-tiny/metrics.csv").read_text().splitlines()) == 1 + 3


def test_nothing_is_left_of_earlier_stops(tmp_path):
    """A node may die after a stopped run went on and saved, or while a run is being saved."""
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, every_n_epochs=1)
    options = {"callbacks": [saver, Requeue()], "enable_checkpointing": True}
    trainer(tmp_path, max_epochs=1, **options).fit(Tiny())
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    (tmp_path / DRAFT).mkdir()
    (tmp_path / DRAFT / "hpc_ckpt_2.ckpt").touch()
    trainer(tmp_path, max_epochs=1, **options).fit(Tiny())  # has nothing to do with them
    assert saved_runs(tmp_path)
    trainer(tmp_path, **options).fit(Tiny(), ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_nothing_is_left_of_a_stop_that_could_not_be_saved(tmp_path, monkeypatch):
    def full(self, checkpoint, path, storage_options=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.plugins.io.TorchCheckpointIO.save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, callbacks=[Requeue(), SignalAt("batch", 2)]).fit(Tiny())
    assert list(tmp_path.iterdir()) == []


# -- folders -----------------------------------------------------------------------------------------------------------


class Elsewhere(Callback):
    """Stands for a second node, with file systems of its own."""

    def __init__(self, root, ckpt_path):
        self.root, self.ckpt_path = root, ckpt_path

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            trainer._default_root_dir = str(self.root)
            trainer.ckpt_path = self.ckpt_path


def fit(tmp_path, ckpt_path=None, strategy="ddp_fork"):
    folders = [tmp_path / "one", tmp_path / "two"]
    apart = Elsewhere(folders[1], ckpt_path)
    trainer(folders[0], devices=2, strategy=strategy, max_epochs=1, callbacks=[apart, Requeue()]).fit(Tiny())
    return folders


def test_nodes_without_a_common_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEEN_S", 0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="process 1")
        words = (
            rf"process 1 \(on .*\) does not see what the first one writes to {tmp_path}/one; trainer.default_root_dir"
        )
        with pytest.raises(ProcessRaisedException, match=words):
            fit(tmp_path)
    one, _ = fit(tmp_path)  # trains, and saves on the first node
    assert not list(one.glob(".*"))
    with pytest.raises(ProcessRaisedException, match=r"finds .*hpc_ckpt_1.ckpt where the first one goes on from none"):
        fit(tmp_path, str(tmp_path / "hpc_ckpt_1.ckpt"))


def test_a_common_folder_is_not_talked_about(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="process")
        trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=1, callbacks=[Requeue()]).fit(Tiny())
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    for first in (True, False):
        run = SimpleNamespace(default_root_dir=str(tmp_path / "file/run"), is_global_zero=first)
        if first:
            with pytest.raises(ValueError, match=r"trainer.default_root_dir: .* can't be written to .Not a directory"):
                check_writable(run)
        else:
            check_writable(run)
    check_writable(SimpleNamespace(default_root_dir=str(tmp_path / "new/run"), is_global_zero=True))
    assert (tmp_path / "new/run").is_dir()
