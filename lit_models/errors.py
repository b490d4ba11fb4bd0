"""Errors of a run as one sentence, where this collection's own checks found them; imports the standard library only."""

import json
import os
import re
import time
import traceback
from pathlib import Path

OURS = ("lit_models", "datamodules", "callbacks")
KINDS = (ValueError, TypeError, ImportError, OSError, FloatingPointError)
"""What checks raise; other errors are shown with their traceback."""
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: file for what it is to say in its summary of processes that failed."""
LOST = "error: the connection to another process of this run was lost; its own error, if it had one, says why"
LOST_S = 5.0
"""Seconds in which a launcher may notice the process that failed, rather than those that lost it."""

_START = "Traceback (most recent call last):"
_FRAME = re.compile(r'^ *File "(.+)", line \d+', re.MULTILINE)
_SAID = re.compile(r"^(?:[\w.]+\.)?(\w+): (.*)", re.MULTILINE | re.DOTALL)
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|ncclRemoteError|Read timeout on store"
)


def is_ours(file: str) -> bool:
    """Whether a file belongs to this collection."""
    root = Path(__file__).resolve().parent.parent
    return any(Path(file).resolve().is_relative_to(root / name) for name in OURS)


def own_error(error: BaseException) -> BaseException | None:
    """The exception of this collection's own checks behind an exception, which libraries may have wrapped."""
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        if frames and is_ours(frames[-1].filename):
            return current
        current = current.__cause__ or current.__context__
    return None


def own_words(trace: str) -> str | None:
    """What a check of this collection said in another process, whose traceback is all that came over.

    Args:
        trace: text of one or several tracebacks, the outermost exception last.

    Returns:
        The message; None if no check of this collection raised the exception.
    """
    names = {kind.__name__ for kind in (*KINDS, FileNotFoundError, ModuleNotFoundError)}
    for part in reversed(trace.split(_START)[1:]):
        frames = list(_FRAME.finditer(part))
        if not frames or not is_ours(frames[-1].group(1)):
            continue
        said = _SAID.search(part, frames[-1].end())
        if said is not None and (said.group(1) in names or said.group(1).startswith("Checkpoint")):
            return said.group(2).split("\n\n")[0].strip()
    return None


def lost_connection(error: BaseException) -> bool:
    """Whether an error says only that another process is gone, whose own error is the one to read."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def tell_torchrun(message: str) -> None:
    """Have torchrun end its summary with an error, instead of a hint where such could be found.

    Args:
        message: sentence or traceback.
    """
    path = os.environ.get(TORCHRUN_FILE)
    if path is None:
        return
    facts = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    Path(path).write_text(json.dumps({"message": facts}))
