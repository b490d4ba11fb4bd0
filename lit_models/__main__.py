"""Command line: `lit-models` and `python -m lit_models`."""

import os
import sys
import traceback
from pathlib import Path

OURS = ("lit_models", "datamodules", "callbacks")


def raised_here(error: BaseException) -> bool:
    """Whether an exception was raised by this collection's own checks rather than inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    folder = Path(__file__).resolve().parent.parent
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder / name) for name in OURS)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    An error found by one of this collection's checks ends it with that one sentence; `LIT_MODELS_TRACEBACK=1` shows
    where it came from.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    from lit_models.cli import main as run

    try:
        run(args)
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        if not raised_here(error) or os.environ.get("LIT_MODELS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
