"""Arguments of modules as plain data, which checkpoints hold and load with `weights_only=True`."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def plain(value: Any) -> Any:  # noqa: ANN401
    """Turn an argument into the data that YAML would hold for it.

    Args:
        value: scalar, container, dataclass, class or `functools.partial` of one, or a Hugging Face model.

    Returns:
        Scalars and containers; objects become `{"class_path": ..., "init_args": ...}`.

    Raises:
        TypeError: if the value has no such form.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.dtype, Path)):
        return str(value).removeprefix("torch.")
    if isinstance(value, functools.partial):
        # jsonargparse hides the class among the arguments of its own function.
        factory = next((item for item in value.args if isinstance(item, type)), value.func)
        return {"class_path": _path(factory), "init_args": plain(_defaults(factory) | value.keywords)}
    if isinstance(value, type):
        return {"class_path": _path(value), "init_args": plain(_defaults(value))}
    if hasattr(value, "plain"):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value) if item.init}
        is_option_group = type(value).__bases__ == (object,)
        return fields if is_option_group else {"class_path": _path(type(value)), "init_args": fields}
    if inspect.isfunction(value):
        return _path(value)
    raise TypeError(
        f"{type(value).__name__} can't be saved in a checkpoint's hyperparameters; "
        "pass a recipe from lit_models.backbones, a dataclass, or a class with functools.partial"
    )


def _defaults(factory: Any) -> dict[str, Any]:  # noqa: ANN401
    """Scalar defaults of a factory; left unsaid, a CLI would fill them with those of the module's default class."""
    parameters = inspect.signature(factory).parameters.values()
    return {item.name: item.default for item in parameters if isinstance(item.default, (bool, int, float, str, tuple))}


def _path(value: Any) -> str:  # noqa: ANN401
    return f"{value.__module__}.{value.__qualname__}"
