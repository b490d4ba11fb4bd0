"""Sharding of networks with FSDP2 (`fully_shard`) under Lightning's ModelParallelStrategy."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from lit_models.nn.casting import cast_inputs, cast_weights
from lit_models.nn.meta import drop_weights, materialise, whole_weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass
class Sharding:
    """How networks are sharded, recomputed and compiled.

    Args:
        activation_checkpointing: recompute each block of the networks in the backward pass to save memory.
        compile: compile each network in place; state-dict keys stay as they are.
        param_dtype: type of the gathered parameters and of the computation under `fully_shard`.
        gather_to_generate: keep all weights of a sharded policy on every process while it generates, instead of
            gathering each block again for every token. It takes the memory of the whole network in `param_dtype`.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    gather_to_generate: bool = True


@dataclass(frozen=True)
class ShardingNeeds:
    """What a network asks of `shard`, as its class attribute `sharding_needs`.

    Args:
        units: names of the classes that are gathered one at a time; by default those in `_no_split_modules`, or the
            members of the outermost module lists. An empty tuple gathers the network as a whole.
        cast_inputs: whether floating inputs of the network are cast to the type of the computation, those in containers
            and dataclasses too.
        cast_unit_inputs: the same for its units.
        float32: names of classes that are gathered and computed in float32, with all that they contain.
    """

    units: tuple[str, ...] | None = None
    cast_inputs: bool = True
    cast_unit_inputs: bool = True
    float32: tuple[str, ...] = ()


def needs_of(network: nn.Module) -> ShardingNeeds:
    """What a network and its parts ask for, taken together."""
    declared: list[ShardingNeeds] = [
        needs for module in network.modules() if (needs := getattr(type(module), "sharding_needs", None)) is not None
    ]
    units = [needs.units for needs in declared if needs.units is not None]
    return ShardingNeeds(
        units=tuple(sorted({name for names in units for name in names})) if units else None,
        cast_inputs=all(needs.cast_inputs for needs in declared),
        cast_unit_inputs=all(needs.cast_unit_inputs for needs in declared),
        float32=tuple(sorted({name for needs in declared for name in needs.float32})),
    )


def block_classes(network: nn.Module) -> set[str]:
    """Names of the classes of a network that are gathered, or recomputed, one at a time; maybe none."""
    asked = needs_of(network).units
    names = set(asked or ())
    for module in network.modules():
        if getattr(type(module), "sharding_needs", None) is None:
            names |= set(getattr(module, "_no_split_modules", None) or ())
    return names


def wrapping_units(network: nn.Module) -> list[nn.Module]:
    """Modules of a network that are gathered, or recomputed, one at a time; inner ones before outer ones.

    Args:
        network: see `ShardingNeeds.units` for how they are found.

    Returns:
        The modules, without the network itself; those without parameters are left out.
    """
    names = block_classes(network)
    found = [module for module in network.modules() if type(module).__name__ in names]
    if not names and needs_of(network).units is None:
        found = _listed(network)
    return [unit for unit in reversed(found) if unit is not network and any(True for _ in unit.parameters())]


def _listed(module: nn.Module) -> list[nn.Module]:
    """Members of the outermost module lists."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        if members and not any(isinstance(member, (nn.ModuleList, nn.ModuleDict)) for member in members):
            found += members
        else:
            found += _listed(child)
    return found


def shard(
    network: nn.Module,
    mesh: "DeviceMesh | None",
    options: Sharding,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Apply the options to a network in place.

    Under a mesh, all processes get their parts of the weights of the first one; the others may have none.

    Args:
        network: any module; a Hugging Face network or one that contains some tells its blocks.
        mesh: the strategy's device mesh, or None outside ModelParallelStrategy, which then shards nothing.
        options: what to apply.
        weights: state of the network to take in place of its own, on the first process.
        dtype: type to keep the weights in, and to compute in; None leaves them. Buffers, and what `ShardingNeeds` says
            to be float32, stay.

    Returns:
        The same network.
    """
    if dtype is not None:
        keep_weights_in(network, dtype, casts=mesh is None)
    if options.activation_checkpointing and any(parameter.requires_grad for parameter in network.parameters()):
        checkpoint_activations(network)
    if mesh is not None:
        _fully_shard(network, mesh, options, weights, dtype)
    if options.compile:
        network.compile()
    return network


def keep_weights_in(network: nn.Module, dtype: torch.dtype, casts: bool = True) -> None:
    """Keep the weights of a network in another type, in place.

    Args:
        network: not sharded.
        dtype: type of the weights, except of parts that are to be float32.
        casts: whether the network and its units cast their inputs to it, as `fully_shard` has them do.
    """
    needs = needs_of(network)
    precise = {part for module in _precise(network, needs) for part in module.modules()}
    cast_weights(network, dtype, precise)
    if casts:
        units = [(unit, needs.cast_unit_inputs) for unit in wrapping_units(network)]
        for module, wanted in ((network, needs.cast_inputs), *units):
            if wanted and module not in precise:
                cast_inputs(module, dtype)


def _precise(network: nn.Module, needs: ShardingNeeds) -> list[nn.Module]:
    """Modules that are gathered and computed in float32."""
    return [module for module in network.modules() if type(module).__name__ in needs.float32]


def _fully_shard(
    network: nn.Module,
    mesh: "DeviceMesh",
    options: Sharding,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh.mesh_dim_names and "data_parallel" in mesh.mesh_dim_names:
        mesh = mesh["data_parallel"]
    is_cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device(mesh.device_type)
    if weights is None:
        weights = whole_weights(network)
    drop_weights(network)
    needs = needs_of(network)
    if dtype is None and options.param_dtype != "float32":
        dtype = getattr(torch, options.param_dtype)
    outer, inner, full = (
        MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=cast)
        for kind, cast in ((dtype, needs.cast_inputs), (dtype, needs.cast_unit_inputs), (None, False))
    )
    precise = _precise(network, needs)
    inside = {part for module in precise for part in module.modules()}
    units = set(wrapping_units(network)) | set(precise)
    for module in reversed(list(network.modules())):
        if module in units or module is network:
            policy = full if module in inside else outer if module is network else inner
            fully_shard(module, mesh=mesh, mp_policy=policy)
    materialise(network, device)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, cast(dict[str, Any], weights), options=whole)


def checkpoint_activations(network: nn.Module) -> None:
    """Have each block of a network compute its activations again in the backward pass, in place.

    Args:
        network: parts that offer it (transformers, diffusers) are told so; otherwise see `wrapping_units`.
    """
    told: set[nn.Module] = set()
    for module in network.modules():
        if module not in told and _tell(module):
            told |= set(module.modules())
    for unit in wrapping_units(network):
        if unit not in told:
            _recompute(unit)


def _tell(module: nn.Module) -> bool:
    """Enable a module's own checkpointing; False if it has none."""
    flags = ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")
    if not all(getattr(module, flag, True) for flag in flags):
        return False
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")
    for name in names:  # transformers from 5.23 on, transformers before, diffusers
        enable: Any = getattr(module, name, None)
        if enable is not None:
            enable()
            return True
    return False


def _recompute(unit: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    forward = unit.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = recomputed  # type: ignore[method-assign]


def has_shards(network: nn.Module) -> bool:
    """Whether a network, or one around it, is sharded; to be asked when no weights are gathered."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has distributed this very network's weights over processes."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Keep all weights of a sharded network on every process, for many uses in a row.

    Meanwhile its weights are plain tensors, passes need no other process, and methods other than `forward` work too.
    All processes must enter and leave it. A network that is not sharded stays as it is.

    Args:
        network: what `shard` returned; not for training.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    inner = [unit for unit in units if unit is not network]  # the outermost unit is never freed after a pass
    run_gathered(network, _nothing)  # or a part that is used before the whole would count as outermost
    for unit in inner:
        unit.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in inner:
            unit.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()


def run_gathered(network: nn.Module, function: Callable[[], T]) -> T:
    """Call a function that trains a network by other ways than its `forward`.

    A sharded network gathers its own weights for it, as for a forward pass, and the gradients of what the function
    returns reach them. Parts of the network that are gathered one at a time must be called as modules inside.

    Args:
        network: the network, sharded or not.
        function: without arguments, so that no gradient passes through these.

    Returns:
        What the function returned.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    if not is_sharded(network):
        return function()
    whole: Any = network
    if not hasattr(whole, "_call_gathered"):
        whole._call_gathered = _call
        register_fsdp_forward_method(whole, "_call_gathered")
    result: T = whole._call_gathered(function)
    return result


def _call(function: Callable[[], T]) -> T:
    return function()


def _nothing() -> None:
    """Use nothing of a network."""


def free_gathered(network: nn.Module) -> None:
    """Let go of weights that a sharded network still has gathered, as it has after a pass without a backward pass."""
    if is_sharded(network):
        outermost: Any = network
        outermost.reshard()
