"""The command line: one LightningCLI over all modules, data modules and callbacks."""

import importlib.resources
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import callbacks
import datamodules
import lit_models
from callbacks.requeue import EXIT_CODE, Requeue
from callbacks.run_folder import check_writable
from callbacks.stopped_runs import newest_checkpoint
from lit_models.errors import own_words
from lit_models.launching import (
    check_options,
    check_processes,
    end_children,
    passed_on,
    trainer_message,
    watched_join,
)
from lit_models.shards import is_in_shards
from lit_models.slurm import prepare_step
from lit_models.suggestions import explain

CONFIG_FLAGS = ("--config", "-c")


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
        """Build the Trainer, whose checkpoints are written atomically unless a plugin writes them otherwise.

        Raises:
            ValueError: if it cannot be built, or not started in the way that this process was.
        """
        options = {**self._get(self.config_init, "trainer", default={})}
        if options.get("accelerator") == "auto" and MPSAccelerator.is_available():
            kwargs.setdefault("accelerator", "cpu")  # Apple's GPUs have no float64; see LitBase.setup
        check_options(options)
        configured = options.get("callbacks") or []
        if any(isinstance(callback, Requeue) for callback in configured):
            default = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [part for part in default if not isinstance(part, Requeue)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ValueError(trainer_message(error, options)) from error
        check_processes(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = callbacks.AtomicCheckpointIO()
        strategy: Any = trainer.strategy
        join = strategy.setup_environment

        def join_in_time() -> None:
            with watched_join(trainer):
                join()

        strategy.setup_environment = join_in_time
        return trainer

    def before_fit(self) -> None:
        """Make sure that the run can write to its folder."""
        check_writable(self.trainer)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let `last` mean the checkpoint of a stopped run, too.

        Raises:
            ValueError: if there is no checkpoint of that name.
        """
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        path = arguments.get("ckpt_path")
        if path == "last":
            arguments["ckpt_path"] = str(newest_checkpoint(self.trainer) or "last")
            if subcommand != "fit" and not has_last(self.trainer):
                folder = self.trainer.default_root_dir
                raise ValueError(
                    f"ckpt_path: last is asked for, but no run in {folder} has saved a checkpoint; give the path of "
                    "one, or null for networks as they are configured"
                )
        elif path == "best":
            raise ValueError("ckpt_path: which checkpoint is best only the process that trained knows; give its path")
        elif path == "hpc":
            if self.trainer._checkpoint_connector._hpc_resume_path is None:
                folder = self.trainer.default_root_dir
                raise ValueError(f"ckpt_path: hpc is asked for, but no run in {folder} was stopped; take last")
        elif path is not None and "://" not in str(path):
            check_checkpoint(Path(path))
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; after an error no process of it is left waiting for this one."""
        try:
            with passed_on(self.trainer):
                super()._run_subcommand(subcommand)
        except ProcessExitedException as error:  # a forked process
            if error.exit_code == EXIT_CODE:
                sys.exit(EXIT_CODE)
            raise ValueError(f"{error.msg}, without a word why") from error
        except ProcessRaisedException as error:
            said = own_words(str(error))
            if said is None:
                raise
            raise ValueError(said) from error
        except Exception:
            end_children(self.trainer)
            raise


def has_last(trainer: Trainer) -> bool:
    """Whether there is a checkpoint that `ckpt_path: last` means."""
    if "://" in str(trainer.default_root_dir) or newest_checkpoint(trainer) is not None:
        return True
    return any(
        callback._find_last_checkpoints(trainer)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    )


def check_checkpoint(path: Path) -> None:
    """Make sure that something is a checkpoint, before processes are started and networks are built.

    Args:
        path: `ckpt_path`.

    Raises:
        ValueError: if it is none.
    """
    if not path.exists():
        raise ValueError(f"ckpt_path: there is no checkpoint at {path}; last stands for the newest one of this run")
    if not (is_in_shards(path) if path.is_dir() else is_zipfile(path)):
        raise ValueError(
            f"ckpt_path: {path} is no checkpoint, or not all of one; take a file or folder named *.ckpt that a run "
            "has written, or last"
        )


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
    prepare_step()
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
    # That a checkpoint of PPO holds the weights after the step is what one expects.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


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
