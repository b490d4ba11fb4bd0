"""Networks with weights of another type, which is no concern of what is around them."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

_CASTS = "_casts_inputs_to"


def cast_weights(network: nn.Module, dtype: torch.dtype, kept: Collection[nn.Module] = ()) -> None:
    """Turn the parameters of a network into another type, in place; buffers, such as tables of positions, stay.

    Args:
        network: any module.
        dtype: type of its floating parameters.
        kept: modules whose own parameters stay.
    """
    for module in network.modules():
        if module not in kept:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
                    parameter.grad = None


def cast_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    """Have a module cast the floating inputs of its `forward`, those in containers and dataclasses too.

    Args:
        module: may be told so again.
        dtype: of the inputs.
    """
    if not hasattr(module, _CASTS):
        module.register_forward_pre_hook(_cast, with_kwargs=True)
    setattr(module, _CASTS, dtype)


def _cast(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401
    dtype: torch.dtype = getattr(module, _CASTS)

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return apply(cast, args), apply(cast, kwargs)


def apply(function: Callable[[Tensor], Tensor], value: Any) -> Any:  # noqa: ANN401
    """Apply a function to all tensors in containers and dataclasses; other things stay as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(apply(function, part) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(apply(function, part) for part in value))
    if type(value) in (dict, OrderedDict):
        return type(value)((key, apply(function, part)) for key, part in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value) if item.init]
        return dataclasses.replace(value, **{name: apply(function, getattr(value, name)) for name in names})
    return value
