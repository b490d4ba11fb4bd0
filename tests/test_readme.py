"""The commands of the README, pasted into a shell; those of make are what runs these tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORTER = {"diffusion/folkwave.yaml": "diffusion/folkwave.yaml --trainer.max_steps=20"}
"""Runs that take minutes are cut short, and otherwise what the README says."""


def commands():
    """Lines of the README's code blocks, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.split(" #")[0].strip() for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


def test_every_command_works_when_pasted(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "LIT_RUNS"} | {"PATH": path}
    assert len(commands()) >= 7
    for command in commands():
        for name, shorter in SHORTER.items():
            command = command.replace(name, shorter)
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "export/actor/config.json").is_file()
