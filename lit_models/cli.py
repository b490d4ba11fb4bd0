"""The command line: one LightningCLI over all modules, data modules and callbacks."""

import importlib.resources
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import OmegaConf

import callbacks
import datamodules
import lit_models
from callbacks.requeue import Requeue, newest_checkpoint
from lit_models.suggestions import explain

CONFIG_FLAGS = ("--config", "-c")
JOIN_TIMEOUT = "LIT_MODELS_JOIN_TIMEOUT"
"""Environment variable: seconds that a process waits for those of other nodes to join it."""
CHILDREN_S = 5.0
"""Seconds in which the other processes of this machine may end by themselves after an error."""


class Parser(LightningArgumentParser):
    """Parser whose messages name the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # noqa: ANN401
        """Exit with one clear message, instead of the page of options that jsonargparse puts before it.

        Args:
            message: of the failed check.
            ex: the exception behind it.
        """
        sys.stderr.write(f"error: {explain(message, self)}\n")
        sys.exit(2)


class Cli(LightningCLI):
    """LightningCLI in subclass mode, with atomic checkpoints, exact random states and configuration that wins.

    Values of a checkpoint given by `--ckpt_path` never replace those of configuration files and flags. A run that was
    told to stop saves itself (`callbacks.Requeue`), and `--ckpt_path last` goes on from there.
    """

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given, instead of merging the checkpoint's hyperparameters over it."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Build the Trainer, whose checkpoints are written atomically unless a plugin writes them otherwise."""
        configured = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        if any(isinstance(callback, Requeue) for callback in configured):
            default = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [part for part in default if not isinstance(part, Requeue)]
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = callbacks.AtomicCheckpointIO()
        strategy: Any = trainer.strategy
        join = strategy.setup_environment

        def join_in_time() -> None:
            with watched_join(trainer):
                join()

        strategy.setup_environment = join_in_time
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let `last` mean the checkpoint of a stopped run, too."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and arguments.get("ckpt_path") == "last":
            arguments["ckpt_path"] = str(newest_checkpoint(self.trainer) or "last")
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; after an error no process of it is left waiting for this one."""
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            end_children(self.trainer)
            raise


def join_timeout(trainer: Trainer) -> float:
    """Seconds to wait for the processes of other nodes: `LIT_MODELS_JOIN_TIMEOUT`, by default 600 on SLURM, else 60."""
    default = "600" if "SLURM_JOB_ID" in os.environ else "60"
    text = os.environ.get(JOIN_TIMEOUT, default)
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
        yield
        return
    seconds = join_timeout(trainer)
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
        yield
    finally:
        joined.set()


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


def find_configs(args: list[str]) -> list[str]:
    """Replace names of shipped configuration files by their paths.

    Args:
        args: command line.

    Returns:
        The command line, in which each `--config NAME` that is no file in the working folder names the installed one.

    Raises:
        SystemExit: if there is no such file; the message lists the nearest names.
    """
    found = []
    for number, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if equals and flag in CONFIG_FLAGS:
            found.append(f"{flag}={_find_config(value)}")
        elif number > 0 and args[number - 1] in CONFIG_FLAGS:
            found.append(_find_config(arg))
        else:
            found.append(arg)
    return found


def _find_config(name: str) -> str:
    if Path(name).is_file() or not name.endswith((".yaml", ".yml")):
        return name
    root = Path(str(importlib.resources.files("configs")))
    if (root / name).is_file():
        return str(root / name)
    from difflib import get_close_matches

    shipped = sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))
    near = get_close_matches(name, shipped, n=3) or shipped
    sys.exit(f"error: --config {name}: no such file here or among the shipped configs; nearest: {', '.join(near)}")


def _asset(name: str) -> str:
    from datamodules.assets import asset_path

    return asset_path(name)


def prepare_process() -> None:
    """Settings of the process that every command needs: resolvers, quiet logs, offline-friendly defaults."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    OmegaConf.register_resolver("asset", _asset, replace=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when forked by data-loader workers
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from lit_models._quiet import quiet_trainer_tips

    quiet_trainer_tips()
    if "SLURM_JOB_ID" not in os.environ:  # a login node or a workstation
        warnings.filterwarnings("ignore", message=".*`srun` command is available")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")  # between Lightning 2.6 and torch 2.13
    warnings.filterwarnings(
        "ignore", message=".*in eval mode at the start of training"
    )  # frozen networks are meant to be


def import_classes(package: Any) -> None:  # noqa: ANN401
    """Import the public classes of a package, so that configurations may use their short names."""
    for name in package.__all__:
        getattr(package, name)


def main(args: list[str] | None = None) -> Cli:
    """Run one command.

    Args:
        args: such as `["fit", "--config", "ppo/tiny.yaml"]`; those of the process by default.

    Returns:
        The finished CLI, with `trainer`, `model` and `datamodule`.
    """
    prepare_process()
    if args is None:
        sys.argv[1:] = find_configs(sys.argv[1:])
    else:
        args = find_configs(args)
    for package in (lit_models, datamodules, callbacks):
        import_classes(package)
    return Cli(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+", "version": lit_models.__version__},
        seed_everything_default=1234,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [callbacks.RNGState(), Requeue()]},
        auto_configure_optimizers=False,
        args=args,
    )
