"""Networks without weights: built on one process, known to all, and filled once they are sharded.

The first process builds a network as a single process would, random numbers included. The others get its structure:
parameters on the meta device, which take no memory, and everything else, buffers too, as it is. So nothing has to be
computed again after the parameters are materialised, whatever the network is made of.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def build_once(make: Callable[[], T]) -> T:
    """Build networks on the first process and have the others know their structure.

    All processes must call it. Global random numbers of torch go on everywhere as they do on the first process.

    Args:
        make: builds a module, or a container with modules and other things.

    Returns:
        What `make` returned; on other processes with parameters on the meta device.

    Raises:
        Exception: what `make` raised on the first process, on all of them.
    """
    message: list[Any] = [None]
    built: Any = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            built = make()
        except Exception as error:
            failure = error
            message = [("error", _portable(error), None)]
        else:
            message = [("structure", _structure(built), torch.get_rng_state())]
    dist.broadcast_object_list(message, src=0)
    kind, content, numbers = message[0]
    if failure is not None:
        raise failure
    if kind == "error":
        raise content
    if dist.get_rank() == 0:
        return built
    built = _from_structure(content, make)
    torch.set_rng_state(numbers)
    return built


def _portable(error: Exception) -> Exception:
    """The error, or its text where it can't be sent."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an error of any class may have any trouble here
        return RuntimeError(f"{type(error).__name__}: {error}")


class _StructurePickler(pickle.Pickler):
    """Leaves the values of parameters out; one that occurs twice, as tied weights do, stays one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:  # noqa: ANN401
        """Number and form of a parameter; None for anything else."""
        if not isinstance(obj, nn.Parameter):
            return None
        number = self._numbers.setdefault(id(obj), len(self._numbers))
        return number, tuple(obj.shape), obj.dtype, obj.requires_grad


class _StructureUnpickler(pickle.Unpickler):
    """Makes meta parameters where values were left out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._parameters: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:  # noqa: ANN401
        """The parameter of a number."""
        number, shape, dtype, requires_grad = pid
        if number not in self._parameters:
            self._parameters[number] = _meta_parameter(shape, dtype, requires_grad)
        return self._parameters[number]


def _structure(built: Any) -> bytes | None:  # noqa: ANN401
    file = io.BytesIO()
    try:
        _StructurePickler(file).dump(built)
    except Exception:  # code from anywhere may hold what can't be pickled; it is then built everywhere
        return None
    return file.getvalue()


def _from_structure(structure: bytes | None, make: Callable[[], T]) -> T:
    """Rebuild from a structure; where that is not possible, build with weights and let go of them."""
    if structure is not None:
        try:
            built: T = _StructureUnpickler(io.BytesIO(structure)).load()
        except Exception:  # classes of remote code may not be importable here before they are used
            structure = None
    if structure is None:
        built = make()
        networks = [value for value in _values(built) if isinstance(value, nn.Module)]
        if dist.get_rank() == 1 and any(True for network in networks for _ in network.parameters()):
            warnings.warn(
                f"the structure of {type(networks[0]).__name__} can't be sent between processes, so that each one "
                "builds it with weights first, which takes the memory of all of them",
                stacklevel=3,
            )
        for network in networks:
            drop_weights(network)
    return built


def _values(built: Any) -> list[Any]:  # noqa: ANN401
    if isinstance(built, dict):
        return list(built.values())
    return list(built) if isinstance(built, (list, tuple)) else [built]


def _meta_parameter(shape: Any, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:  # noqa: ANN401
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _replace_parameters(network: nn.Module, new: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter; one that occurs twice is replaced by one that occurs twice."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in replaced:
                    replaced[parameter] = new(parameter)
                module._parameters[name] = replaced[parameter]


def drop_weights(network: nn.Module) -> None:
    """Move the parameters of a network to the meta device, in place; buffers stay."""
    _replace_parameters(network, lambda old: _meta_parameter(old.shape, old.dtype, old.requires_grad))


def materialise(network: nn.Module, device: torch.device) -> None:
    """Give memory to parameters on the meta device, in place, without values; buffers stay.

    Args:
        network: parameters may be sharded.
        device: where to.
    """

    def new(old: nn.Parameter) -> nn.Parameter:
        if not old.is_meta:
            return old
        return nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)

    _replace_parameters(network, new)


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """State of a network on the first process, without copying it; nothing on the others."""
    if dist.get_rank() != 0:
        return {}
    return {name: value.detach() for name, value in network.state_dict().items()}


def without_weights(network: nn.Module) -> Any:  # noqa: ANN401
    """Copy of a network with parameters on the meta device, which costs the memory of its buffers only."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = _meta_parameter(parameter.shape, parameter.dtype, parameter.requires_grad)
    return copy.deepcopy(network, memo)
