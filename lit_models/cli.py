"""The command line: one LightningCLI over all modules, data modules and callbacks."""

import importlib.resources
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf

import callbacks
import datamodules
import lit_models
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

    Values of a checkpoint given by `--ckpt_path` never replace those of configuration files and flags.
    """

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given, instead of merging the checkpoint's hyperparameters over it."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Build the Trainer, whose checkpoints are written atomically unless a plugin writes them otherwise."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = callbacks.AtomicCheckpointIO()
        return trainer


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
        trainer_defaults={"callbacks": [callbacks.RNGState()]},
        auto_configure_optimizers=False,
        args=args,
    )
