"""Requests to stop a run, noted from the first lines of a process on.

A scheduler warns by SIGUSR1 (`#SBATCH --signal`) or SIGTERM, and may do so while torch is still being imported. The
handlers of this module only take a note; `callbacks.Requeue` acts on it where a run can be continued from. Only the
standard library is imported, and importing this module installs nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGUSR1", "SIGTERM")
REPEAT_S = 1.0
"""Seconds within which a second SIGTERM is the same request: launchers pass on what the process group got already."""


class _Note:
    """What was received, by which process."""

    def __init__(self) -> None:
        self.owner: int | None = None
        self.name: str | None = None
        self.terminated_at: float | None = None
        self.ends = False  # a second SIGTERM can't make it end any sooner
        self.previous: dict[int, Any] = {}
        self.launcher: int | None = None  # the process of torchrun that started this one
        self.hooked = False  # forked processes look whether they are to listen
        self.relays = False  # to processes that are forked while this is so


_note = _Note()


def received() -> str | None:
    """Name of the first signal that asked this process to stop since it began to listen; None without one.

    That the torchrun which started it has died counts as one, since nobody would end the process any more.
    """
    if not listening():
        return None
    if _note.name is None and _note.launcher not in (None, os.getppid()):
        _note.name = "the end of torchrun"
    return _note.name


def listening() -> bool:
    """Whether this very process (not the one it was forked from) takes note of signals."""
    return _note.owner == os.getpid()


def install() -> bool:
    """Begin to take note of SIGUSR1 and SIGTERM, with nothing received yet.

    Returns:
        Whether it was begun: not where this process listens already, nor outside of the main thread, whose privilege
        handlers are.
    """
    if listening() or threading.current_thread() is not threading.main_thread():
        return False
    _note.name, _note.terminated_at, _note.ends, _note.owner = None, None, False, os.getpid()
    _note.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    _note.previous = {number: signal.signal(number, _take_note) for number in _numbers()}
    return True


def uninstall() -> None:
    """Put the handlers back that `install` replaced."""
    if not listening() or threading.current_thread() is not threading.main_thread():
        return
    for number, handler in _note.previous.items():
        # None stands for a handler that Python did not install and so cannot put back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _note.owner, _note.name, _note.previous = None, None, {}


def let_end() -> None:
    """Let this process end in peace, now that it ends: a scheduler that starts a job again ends the old one first."""
    _note.ends = True


@contextmanager
def noted(last: bool = False) -> Iterator[None]:
    """Take note of signals while the block runs.

    Args:
        last: the process ends with the block, so signals are ignored afterwards: what was to be saved is saved, and a
            signal would make a finished process, and its job, a failed one.
    """
    begun = install()
    try:
        yield
    finally:
        if begun and last:
            _note.previous = dict.fromkeys(_numbers(), signal.SIG_IGN)
        if begun:
            uninstall()


@contextmanager
def relayed() -> Iterator[None]:
    """Pass signals on to processes that are forked while the block runs, and listen from their first moment on."""
    if not _note.hooked:
        os.register_at_fork(after_in_child=_adopt)
        _note.hooked = True
    _note.relays = True
    try:
        yield
    finally:
        _note.relays = False


def _adopt() -> None:
    """Listen in a process that was just forked, and remember what was received before."""
    if _note.relays:
        _note.relays, _note.owner = False, os.getpid()


def shield_worker(worker_id: int = 0) -> None:
    """Keep a worker process of a data loader alive when its whole process group is told to stop.

    Schedulers signal every process of a job. A worker that dies takes the run with it, before it could save. With
    this as (part of) `worker_init_fn`, a worker obeys SIGTERM from its parent only.

    Args:
        worker_id: ignored; given by the loader.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows, where no scheduler does that
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="obey-parent", daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _numbers() -> list[int]:
    """Numbers of the signals that this system has."""
    return [int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)]


def _take_note(number: int, frame: FrameType | None) -> None:
    if _note.owner != os.getpid():  # a forked child, which nobody asks whether it should stop
        if number == signal.SIGTERM:
            _die(number)
        return
    if _note.relays:
        from multiprocessing import active_children  # loaded long ago, since there are such processes

        for process in active_children():
            with suppress(ProcessLookupError):
                os.kill(process.ident or os.getpid(), number)
    now = time.monotonic()
    if number == signal.SIGTERM:
        if _note.terminated_at is not None and now - _note.terminated_at > REPEAT_S and not _note.ends:
            _die(number)
        _note.terminated_at = _note.terminated_at or now
    if _note.name is None:
        _note.name = signal.Signals(number).name


def _die(number: int) -> None:
    """End this process as the signal would without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
