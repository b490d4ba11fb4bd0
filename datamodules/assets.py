"""Files that are shipped with the package."""

from importlib.resources import files
from pathlib import Path

_ROOT = "assets"


def asset_path(name: str) -> str:
    """Give the absolute path of a shipped file or folder.

    Args:
        name: path below the assets folder, e.g. `movie_snippets/tokenizer`.

    Returns:
        The absolute path.

    Raises:
        ValueError: if there is no such asset; the message lists those that exist.
    """
    root = Path(str(files("datamodules") / _ROOT))
    path = root / name
    if not name or not path.exists():
        known = sorted(str(entry.relative_to(root)) for entry in root.glob("*/*") if entry.name != "LICENSE")
        raise ValueError(f"asset: {name!r} is not shipped; choose one of {', '.join(known)} or one of their folders")
    return str(path)
