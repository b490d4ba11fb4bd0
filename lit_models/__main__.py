"""Command line: `lit-models` and `python -m lit_models`."""

import os
import sys
import traceback
from pathlib import Path

from lit_models._help import asks_for_help, show_help
from lit_models.signals import noted

OURS = ("lit_models", "datamodules", "callbacks")


def raised_here(error: BaseException) -> bool:
    """Whether an exception was raised by this collection's own checks rather than inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    folder = Path(__file__).resolve().parent.parent
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder / name) for name in OURS)


def own_error(error: BaseException) -> BaseException | None:
    """The exception of this collection's own checks behind an exception, which libraries may have wrapped."""
    current: BaseException | None = error
    while current is not None and not raised_here(current):
        current = current.__cause__ or current.__context__
    return current


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    An error found by one of this collection's checks ends it with that one sentence; `LIT_MODELS_TRACEBACK=1` shows
    where it came from. A run that SIGUSR1 or SIGTERM stopped ends with exit code 75, see `callbacks.Requeue`.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    with noted():  # before anything heavy is imported, since a scheduler's warning may come at any time
        command = sys.argv[1:] if args is None else args
        if asks_for_help(command):
            show_help(command, lambda: run(args))
        else:
            run(args)


def run(args: list[str] | None) -> None:
    """Run one command, as `main` does, without the shortcut for help pages."""
    from lit_models.cli import main as run_cli

    try:
        run_cli(args)
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        own = own_error(error)
        if own is None or os.environ.get("LIT_MODELS_TRACEBACK"):
            raise
        sys.exit(f"error: {own}")


if __name__ == "__main__":
    main()
