"""What SLURM says about a process: the step that started it, and the job that it belongs to.

Only the standard library is imported.
"""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

SCONTROL_S = 30.0
"""Seconds that SLURM has for an answer."""
SHELLS = ("bash", "interactive")
"""Names of jobs in which Lightning takes a process for one that somebody started by hand."""


def prepare_step() -> None:
    """Have the variables that Lightning and `trainer/slurm.yaml` read describe the step that this process is of.

    srun leaves some as they were for the whole job, and sets others only for some of its options.

    Raises:
        ValueError: if nodes of the step have different numbers of processes.
    """
    counts = _step_counts()
    if not counts:
        return
    if len(set(counts)) > 1:
        raise ValueError(
            f"the nodes of this SLURM step have {', '.join(map(str, counts))} processes, and Lightning needs equally "
            "many on each; give sbatch or srun --ntasks-per-node instead of --ntasks"
        )
    os.environ["SLURM_NTASKS_PER_NODE"] = str(counts[0])
    if os.environ.get("SLURM_JOB_NAME") in SHELLS and _started_by_srun():
        os.environ["SLURM_JOB_NAME"] = "srun"  # salloc, and srun in it, go by names that stand for shells


def check_launch(num_nodes: int, devices: int) -> None:
    """Compare what SLURM has started with what the Trainer is configured for.

    Args:
        num_nodes: of the Trainer.
        devices: of the Trainer, per node.

    Raises:
        ValueError: if they differ; processes would otherwise wait for others for good, or be runs of their own that
            write to one folder.
    """
    tasks = int(os.environ.get("SLURM_NTASKS") or 0)
    by_hand = os.environ.get("SLURM_JOB_NAME") in SHELLS or "TORCHELASTIC_RUN_ID" in os.environ
    if not tasks or by_hand or tasks == num_nodes * devices == 1:
        return
    counts = _step_counts()
    if not counts:
        raise ValueError(
            f"the SLURM job has {tasks} tasks, and trainer.num_nodes x trainer.devices is {num_nodes} x {devices}, but "
            "srun, which starts them, has not started this process; put srun before lit-models, as "
            "configs/slurm/train.sbatch does"
        )
    if (len(counts), counts[0]) != (num_nodes, devices):
        raise ValueError(
            f"nodes and processes on each are {len(counts)} x {counts[0]} in this SLURM step, but trainer.num_nodes x "
            f"trainer.devices is {num_nodes} x {devices}; add --config trainer/slurm.yaml, after the other files"
        )


def _step_counts() -> list[int]:
    """Processes on each node of the step; empty outside of steps."""
    counts = []
    for part in filter(None, os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        number, _, times = part.rstrip(")").partition("(x")
        counts += [int(number)] * int(times or 1)
    return counts


def _started_by_srun() -> bool:
    """Whether this is a process of a step, rather than one that somebody started in a shell of the step."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "slurmstepd"
    return False


class Job:
    """The SLURM job of this process.

    Args:
        id: number of the job, or of an array job and its task, as `12_3`.
        restarts: how often it was requeued before.
    """

    def __init__(self, id: str, restarts: int) -> None:
        self.id, self.restarts = id, restarts
        self._span = _environment_span()
        self._asked = False

    @classmethod
    def of_process(cls) -> "Job | None":
        """The job by the environment; None outside of SLURM and in interactive sessions."""
        id = os.environ.get("SLURM_JOB_ID", "")
        if not id.isdecimal() or os.environ.get("SLURM_JOB_NAME") in SHELLS:
            return None
        # Of the tasks of an array job one has the number of the whole, and requeueing that would restart them all.
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
        return cls(id, int(os.environ.get("SLURM_RESTART_COUNT") or 0))

    def ends_within(self, margin: float) -> bool:
        """Whether the job ends within a time.

        Args:
            margin: seconds; half of the job's time where that is less.
        """
        if not self._asked:
            self._ask()
        if not self._over(margin):
            return False
        self._ask()  # the limit may have been raised in the meantime
        return self._over(margin)

    def _over(self, margin: float) -> bool:
        if self._span is None:
            return False
        start, end = self._span
        return end - time.time() <= min(margin, (end - start) / 2)

    def half_over(self) -> bool:
        """Whether half of the job's time has passed; not where it has no limit."""
        if not self._asked:
            self._ask()
        return self._over(float("inf"))

    def _ask(self) -> None:
        self._asked = True
        facts = self.facts()
        times = [_local_time(facts.get(name, "")) for name in ("StartTime", "EndTime")]
        if times[0] is not None and times[1] is not None:
            self._span = (times[0], times[1])
        elif facts:
            self._span = None  # without limit

    def facts(self) -> dict[str, str]:
        """What SLURM says about the job, by its own names; empty if it can't be asked."""
        try:
            output = _scontrol("show", "job", "--oneliner", self.id)
        except OSError:
            return {}
        return dict(re.findall(r"(\w+)=(\S+)", output))

    def requeue(self) -> str | None:
        """Have SLURM start the job again.

        Returns:
            Why it does not; None if it does.
        """
        facts = self.facts()
        state = facts.get("JobState", "RUNNING")
        if state != "RUNNING":  # somebody cancelled it, or the scheduler has requeued it already
            return f"is not requeued, since SLURM has its state as {state}"
        try:
            _scontrol("requeue", self.id)
        except OSError as error:
            return f"could not be requeued ({error})"
        return None


def _environment_span() -> tuple[float, float] | None:
    """Start and end of the job as newer versions of SLURM tell it, for containers that have no `scontrol`."""
    names = ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")
    start, end = (os.environ.get(name, "") for name in names)
    return (float(start), float(end)) if start.isdecimal() and end.isdecimal() else None


def _scontrol(*args: str) -> str:
    """Output of SLURM's `scontrol`; OSError if there is none, or it fails."""
    try:
        done = subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=SCONTROL_S, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.strip() or f"scontrol {args[0]} failed") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"scontrol {args[0]} did not answer") from error
    return done.stdout


def _local_time(text: str) -> float | None:
    """Unix time of SLURM's time of day; None for `Unknown`."""
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return None
