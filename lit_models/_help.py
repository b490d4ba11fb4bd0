"""The help pages of the command line, remembered per installation: making one imports all of torch and Lightning."""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HELP_FLAGS = ("-h", "--help")
WIDTH = "100"
"""Columns of a page, whatever the terminal has, so that one page serves all of them."""
PACKAGES = ("lit_models", "datamodules", "callbacks")


def asks_for_help(args: list[str]) -> bool:
    """Whether a command line asks for nothing but the help of the program or of one sub-command."""
    *command, flag = args or [""]
    return flag in HELP_FLAGS and len(command) < 2 and not any(word.startswith("-") for word in command)


def show_help(args: list[str], run: Callable[[], object]) -> None:
    """Print a help page, from the cache if nothing it depends on has changed since it was made.

    Args:
        args: the command line.
        run: prints the page to the standard output and raises SystemExit.

    Raises:
        SystemExit: as `run` does, if that found an error.
    """
    page = cache_folder() / f"{fingerprint(args)}.txt"
    if page.is_file():
        sys.stdout.write(page.read_text())
        return
    output, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(output):
            run()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    sys.stdout.write(output.getvalue())
    with contextlib.suppress(OSError):  # a home that cannot be written to costs only time
        _write(page, output.getvalue())


def cache_folder() -> Path:
    """Folder of the remembered pages: `$XDG_CACHE_HOME/lit-models`, `~/.cache/lit-models` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-models"


def fingerprint(args: list[str]) -> str:
    """Digest of all that a help page depends on: the command, the installed packages and our sources."""
    facts = [*args, sys.version, sys.prefix]
    return hashlib.sha256("\n".join([*facts, *_installed(), *_sources()]).encode()).hexdigest()


def _installed() -> Iterator[str]:
    for folder in map(Path, sys.path):
        if folder.is_dir():
            yield from sorted(path.name for path in folder.glob("*.dist-info"))


def _sources() -> Iterator[str]:
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            state = path.stat()
            yield f"{path} {state.st_mtime_ns} {state.st_size}"


def _write(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=page.parent, suffix=".new", delete=False) as new:
        new.write(text)
    Path(new.name).replace(page)
