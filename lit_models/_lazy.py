"""Lazy public names for packages (PEP 562), so that importing one costs nothing."""

import importlib
from collections.abc import Callable
from typing import Any


def attach(package: str, exports: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    Args:
        package: `__name__` of the package.
        exports: public name -> sub-module that defines it, relative to the package.

    Returns:
        The three module attributes, in that order.
    """

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{exports[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(exports)

    return __getattr__, __dir__, sorted(exports)
