"""The sbatch script on a real SLURM: two nodes on this machine, a signal in the middle of a run, its requeue."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stopping import added
from tests.test_kill import same_state
from tests.test_preemption import QUIET, two_ranks

ROOT = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed (apt-get install slurm-wlm): no {MISSING}"),
]
CONF = """
ClusterName=one
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/ctl
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmctldPort={ports[0]}
KillWait=10
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
PRESETS = ["--config", "trainer/ddp.yaml", "--config", "trainer/slurm.yaml"]
CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.batch_size=4"]


def free_ports(number):
    servers = [socket.socket() for _ in range(number)]
    for server in servers:
        server.bind(("127.0.0.1", 0))
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


class Cluster:
    """A controller and two nodes."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("ctl", "spool_n1", "spool_n2"):
            (folder / name).mkdir()
        conf = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        conf.write_text(CONF.format(user=getpass.getuser(), folder=folder, ports=free_ports(3), host=host))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {
            "SLURM_CONF": str(conf),
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "LIT_RUNS": str(folder),
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self):
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            self.run(*command)
        self.until(lambda: self.run("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], 60, "idle nodes")

    def stop(self):
        self.run("scancel", "--user", getpass.getuser(), check=False)
        for file in self.folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)

    def run(self, *command, check=True):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self):
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    def until(self, condition, seconds, what):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what}\n{self.logs()}"
            time.sleep(0.2)

    def submit(self, *args, size=("--nodes=2", "--ntasks-per-node=1")):
        """The shipped script, for two processes without GPUs; number of the job."""
        rest = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
        script = ROOT / "configs/slurm/train.sbatch"
        command = ["sbatch", "--parsable", f"--chdir={self.folder}", *size, *rest, str(script), *args]
        return self.run(*command).strip()

    def facts(self, job):
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def ended(self, job, seconds=300):
        """What SLURM says about a job that has ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.until(lambda: self.facts(job)["JobState"] not in going, seconds, f"end of job {job}\n{self.output(job)}")
        return self.facts(job)

    def output(self, job):
        path = self.folder / f"lit-models-{job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes on this machine."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_a_job_that_is_requeued_ends_as_a_run_that_is_not(cluster, tmp_path, free_port):
    def submit(*extra, **size):
        return cluster.submit("fit", "--config", "sft/tiny.yaml", *PRESETS, *extra, *CPU, *QUIET, **size)

    waits, late = cluster.folder / "waits", cluster.folder / "late"
    in_the_middle = added(cluster.folder, "WaitAt", place="batch", at=8, file=str(waits))
    before_the_export = added(tmp_path, "WaitAt", place="end", at=1, file=str(late), restarts=1)
    broken = submit(*in_the_middle, *before_the_export)
    assert two_ranks(tmp_path, free_port, "sft", *PRESETS, *CPU, "--trainer.devices=2") == [0, 0]

    cluster.until(waits.exists, 300, f"batch 8\n{cluster.output(broken)}")
    cluster.run("scancel", "--signal=USR1", broken)
    cluster.until(late.exists, 300, f"end of the run\n{cluster.output(broken)}")
    cluster.run("scancel", "--signal=USR1", broken)  # too late, also for the other process, which may be at its end
    facts = cluster.ended(broken)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), cluster.output(broken)
    words = f"stopped by SIGUSR1 after 8 steps: {cluster.folder}/job-{broken}/hpc_ckpt_1.ckpt is saved; job {broken} is"
    assert words in cluster.output(broken)
    one, other = tmp_path / "job-local", cluster.folder / f"job-{broken}"
    same_state(
        one / "checkpoints/last.ckpt",
        other / "checkpoints/last.ckpt",
        ["state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"],
    )
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())

    # One rank fails while the other waits for it: the job ends, with the error. Not beside the other job:
    # without control groups, ending this one may signal processes of that one.
    # Of the script's --ntasks-per-node, which is larger, --ntasks makes an upper limit.
    failing = submit(*added(cluster.folder, "RaiseAt", place="batch", at=3, rank=1), size=("--nodes=1", "--ntasks=2"))
    assert cluster.ended(failing, 120)["JobState"] == "FAILED"
    assert "the original error" in cluster.output(failing)
