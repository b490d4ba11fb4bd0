"""Command line: `lit-models` and `python -m lit_models`."""

import os
import sys
import time
import traceback

from lit_models._help import asks_for_help, show_help
from lit_models.errors import KINDS, LOST, LOST_S, lost_connection, own_error, tell_torchrun
from lit_models.signals import noted, received


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    An error found by one of this collection's checks ends it with that one sentence; `LIT_MODELS_TRACEBACK=1` shows
    where it came from. A run that SIGUSR1 or SIGTERM stopped ends with exit code 75, see `callbacks.Requeue`.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    # Before anything heavy is imported, and to the end, since a scheduler's warning may come at any time.
    with noted(last=args is None):
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
    except Exception as error:
        own = own_error(error) if isinstance(error, KINDS) else None
        traced = bool(os.environ.get("LIT_MODELS_TRACEBACK"))
        if own is None and lost_connection(error) and not traced:
            deadline = time.monotonic() + LOST_S
            while received() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            tell_torchrun(LOST)
            sys.exit(LOST)
        if own is None or traced:
            tell_torchrun(traceback.format_exc())
            raise
        tell_torchrun(f"error: {own}")
        sys.exit(f"error: {own}")


if __name__ == "__main__":
    main()
