"""Seconds until Python, `import lit_models` and the command line's help are there; median of 5 fresh processes."""

import statistics
import subprocess
import sys
import time

REPETITIONS = 5
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import lit_models": ["-c", "import lit_models"],
    "lit-models fit --help": ["-m", "lit_models", "fit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    for name, arguments in COMMANDS.items():
        seconds(arguments)  # fills the disk cache
        runs = [seconds(arguments) for _ in range(REPETITIONS)]
        print(f"{name:22} {statistics.median(runs):.3f} s; runs: {' '.join(f'{run:.3f}' for run in runs)}", flush=True)
