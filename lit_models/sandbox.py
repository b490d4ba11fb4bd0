"""Running of programs that nobody has read, in processes with limits."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

# The program limits itself before it begins: a function between fork and exec is not safe beside other threads.
BOOT = """
import resource, runpy, sys
seconds, memory, size, processes = map(int, sys.argv[1:])
for kind, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", size), ("CORE", 0), ("NPROC", processes)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name="__main__")
"""
Status = Literal["ok", "compile_error", "runtime_error", "timeout"]


@dataclass(frozen=True)
class Execution:
    """What became of a program.

    Args:
        status: whether it ran to its end, and if not, why.
        output: what it printed; the beginning of it, where it printed a lot.
        error: the end of what it printed as errors.
    """

    status: Status
    output: str = ""
    error: str = ""


class Executor(ABC):
    """Runs programs."""

    @abstractmethod
    def run(self, program: str, inputs: list[str]) -> list[Execution]:
        """Run one program once per input.

        Args:
            program: source text.
            inputs: texts of the standard input.

        Returns:
            What became of each run; the same compile error for all of them where the program is no program.
        """

    def run_all(self, jobs: list[tuple[str, list[str]]]) -> list[list[Execution]]:
        """Run several programs, each with its inputs."""
        return [self.run(program, inputs) for program, inputs in jobs]


@dataclass
class SubprocessExecutor(Executor):
    """Runs Python programs in processes of their own, with limits on time, memory, processes and files.

    Each run has an empty folder of its own and no environment. This keeps mistakes in check, not attacks: the network
    and readable files of the machine stay within reach, so run untrusted policies in a container.

    Args:
        timeout: seconds of wall-clock time per run; processor time is limited to as much.
        memory_mb: address space of a run.
        max_processes: processes and threads of the user with which the program may still start one; the system does
            not count those of root. All that a run started is ended with it.
        max_output: bytes of output that are kept, and largest file a run may write.
        workers: runs at the same time.
    """

    timeout: float = 4.0
    memory_mb: int = 512
    max_processes: int = 0
    max_output: int = 65536
    workers: int = 2

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ValueError: naming the option.
        """
        for name in ("timeout", "memory_mb", "max_output", "workers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"executor.{name} must be positive, got {getattr(self, name)}")
        if self.max_processes < 0:
            raise ValueError(f"executor.max_processes must not be negative, got {self.max_processes}")

    def run(self, program: str, inputs: list[str]) -> list[Execution]:
        """Run; see `Executor.run`."""
        return self.run_all([(program, inputs)])[0]

    def run_all(self, jobs: list[tuple[str, list[str]]]) -> list[list[Execution]]:
        """Run several programs side by side."""
        broken = [compile_error(program) for program, _ in jobs]
        tasks = [
            (program, text)
            for (program, inputs), error in zip(jobs, broken, strict=True)
            if error is None
            for text in inputs
        ]
        with ThreadPoolExecutor(self.workers) as pool:
            finished = iter(list(pool.map(lambda task: self._one(*task), tasks)))
        return [
            [error] * len(inputs) if error is not None else [next(finished) for _ in inputs]
            for (_, inputs), error in zip(jobs, broken, strict=True)
        ]

    def _one(self, program: str, text: str) -> Execution:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "program.py")
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(program)
            with (
                open(os.path.join(folder, "output"), "w+b") as output,
                open(os.path.join(folder, "error"), "w+b") as error,
            ):
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", BOOT, *map(str, self._limits())],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=error,
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8"},
                    start_new_session=True,
                )
                timed_out = False
                try:
                    process.communicate(text.encode(), self.timeout)
                except subprocess.TimeoutExpired:
                    timed_out = True
                finally:
                    kill_group(process)
                output.seek(0)
                error.seek(0)
                printed = output.read(self.max_output).decode(errors="replace")
                complaint = error.read()[-2000:].decode(errors="replace")
        if timed_out or process.returncode == -signal.SIGXCPU:
            return Execution("timeout", printed, complaint)
        return Execution("ok" if process.returncode == 0 else "runtime_error", printed, complaint)

    def _limits(self) -> list[int]:
        return [int(self.timeout) + 1, self.memory_mb * 2**20, self.max_output, self.max_processes]


def compile_error(program: str) -> Execution | None:
    """Why a text is no Python program, or None if it is one."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            compile(program, "program.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return Execution("compile_error", error=f"{type(error).__name__}: {error}")
    return None


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # where all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
