"""Processes of the command line: whether they fit the options, and how they wait, stop and end together."""

import functools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _interrupt
from torch.distributed import DistNetworkError

from lit_models import signals
from lit_models.slurm import check_launch

JOIN_TIMEOUT = "LIT_MODELS_JOIN_TIMEOUT"
"""Environment variable: seconds that a process waits for those of other nodes to join it."""
JOIN_S = 45.0
"""The same by default: with what comes before, a run without one of its nodes ends within a minute."""
CHILDREN_S = 5.0
"""Seconds in which the other processes of this machine may end by themselves after an error."""

IN_SHARDS = "--config trainer/fsdp2.yaml trains in shards"
_CPU = "--trainer.accelerator=cpu --trainer.precision=32-true"
# Words of the library's messages, and what to say in their place.
_REMEDIES = {
    r"No supported gpu backend|accelerator is not available": (
        "trainer.accelerator: {accelerator} is asked for, but torch {torch} finds none on this machine; take " + _CPU
    ),
    r"torch_xla": "trainer.accelerator: {message}",
    r"value is not a valid input|should be an `?int": (
        "trainer.devices must be auto, or a positive number of processes, got {devices!r}"
    ),
    r"But your machine only has": "trainer.devices: {message}; set it to auto, or to what is there",
    r"invalid strategy name": "trainer.strategy: there is no {strategy!r}; take auto or ddp, and " + IN_SHARDS,
    r"strategy `fsdp": "trainer.strategy: {strategy} is not supported; " + IN_SHARDS + ", on CPUs, too",
    r"DeepSpeed": "trainer.strategy: {message} But " + IN_SHARDS + " without it",
}


def trainer_message(error: Exception, options: Mapping[str, Any]) -> str:
    """One sentence for options that the Trainer refuses.

    Args:
        error: what it raised.
        options: those given to it.

    Returns:
        The key, what is wrong, and what to do.
    """
    message = " ".join(str(error).split())
    found = next((sentence for words, sentence in _REMEDIES.items() if re.search(words, message)), None)
    if found is not None:
        given = {name: options.get(name) for name in ("accelerator", "devices", "strategy")}
        return found.format(message=message, torch=torch.__version__, **given)
    named = re.findall(r"\w+", message)
    keys = [name for name in options if name in named and options[name] is not None]
    return f"{', '.join(f'trainer.{key}' for key in keys[:2]) or 'trainer'}: {message}"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse numbers that the Trainer takes and then divides by.

    Args:
        options: of the Trainer.

    Raises:
        ValueError: naming the key.
    """
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"):
        value, least = options.get(key), 0 if key.startswith("reload") else 1
        if value is not None and value < least:
            raise ValueError(f"trainer.{key} must be at least {least}, got {value}")


def check_processes(trainer: Trainer) -> None:
    """Make sure that a run is started in a way that works, before any other process is.

    Args:
        trainer: just made.

    Raises:
        ValueError: if not; the message names the key and what to do.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        # Lightning's checkpoints of it fail for modules that leave frozen networks out (pytorch-lightning#21124).
        raise ValueError(f"trainer.strategy: fsdp is not supported; {IN_SHARDS}")
    launcher = strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method != "fork":
        raise ValueError(
            f"trainer.strategy: processes that are started by {launcher._start_method!r} do not hear of signals while "
            "they start; take ddp, which starts as many by the same command"
        )
    check_launch(trainer.num_nodes, trainer.num_devices)
    started = os.environ.get("WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    if started.isdecimal() and int(started) != trainer.world_size:
        raise ValueError(
            f"trainer.devices x trainer.num_nodes is {trainer.num_devices} x {trainer.num_nodes}, but torchrun started "
            f"{started} processes; set them to --nproc-per-node and --nnodes"
        )
    alone = isinstance(getattr(strategy, "cluster_environment", None), LightningEnvironment)
    if alone and trainer.num_nodes > 1 and not {"NODE_RANK", "GROUP_RANK", "MASTER_ADDR"} & set(os.environ):
        raise ValueError(
            f"trainer.num_nodes: nothing says which of {trainer.num_nodes} nodes this is; start on each of them by "
            "torchrun or srun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment"
        )


# -- waiting for other nodes -------------------------------------------------------------------------------------------


def join_timeout() -> float:
    """Seconds to wait for the processes of other nodes: `LIT_MODELS_JOIN_TIMEOUT`, or `JOIN_S`."""
    text = os.environ.get(JOIN_TIMEOUT, str(JOIN_S))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{JOIN_TIMEOUT} must be a number of seconds, got {text!r}") from None


@contextmanager
def watched_join(trainer: Trainer) -> Iterator[None]:
    """End the process with one sentence if others do not join it in time.

    torch waits half an hour, and on some sides for good. Processes of a single node start together and are watched
    by their launcher, so nothing is done for them.
    """
    if trainer.num_nodes == 1:
        with _free_port():
            yield
        return
    seconds = join_timeout()
    joined = threading.Event()

    def watch() -> None:
        if joined.wait(seconds):
            return
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        sys.stderr.write(
            f"error: process {trainer.global_rank} of {trainer.world_size} waited {seconds:g} s at {place} for the "
            f"others; a node of the {trainer.num_nodes} (trainer.num_nodes) is missing, or can't reach that address; "
            f"set {JOIN_TIMEOUT} to wait longer\n"
        )
        sys.stderr.flush()
        end_children(trainer, patience=0.0)
        os._exit(1)

    threading.Thread(target=watch, name="join-watch", daemon=True).start()
    try:
        with _free_port():
            yield
    finally:
        joined.set()


@contextmanager
def _free_port() -> Iterator[None]:
    """Say in one sentence that the port to meet at is taken."""
    try:
        yield
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(
            f"port {os.environ.get('MASTER_PORT', '?')} of {socket.gethostname()} is in use by another program; set "
            "the environment variable MASTER_PORT to a free one, on all nodes alike"
        ) from error


# -- processes that this one has started -------------------------------------------------------------------------------


@contextmanager
def passed_on(trainer: Trainer) -> Iterator[None]:
    """Pass signals on to forked processes, which do all the work while this one waits for them."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _MultiProcessingLauncher):
        yield
        return
    work = launcher._wrapping_function
    launcher._wrapping_function = functools.partial(_end_well, work)  # type: ignore[method-assign]
    with signals.relayed():
        yield


def _end_well(work: Callable[..., None], index: int, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
    """Tell callbacks and loggers of a forked process why it ends, which the Trainer does in its parent only."""
    try:
        work(index, trainer, *args)
    except BaseException as error:
        _interrupt(trainer, error)
        raise


def end_children(trainer: Trainer, patience: float = CHILDREN_S) -> None:
    """End the processes that this one has started; those stuck in a collective operation heed no lesser signal.

    Args:
        trainer: whose launcher started them.
        patience: seconds in which they may end by themselves, and print their own error.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(process.poll() is None for process in launcher.procs):
        time.sleep(0.1)
    for process in launcher.procs:
        if process.poll() is None:
            process.kill()
