"""Norms of gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients of some parameters so that their common norm is at most a limit.

    As `torch.nn.utils.clip_grad_norm_`, but with a float32 norm for gradients of all types: that of torch is rounded to
    16 bits with them, tensor by tensor, and so differs between numbers of processes.

    Args:
        parameters: sharded or not; those without a gradient are left out.
        limit: largest norm; infinite for none.

    Returns:
        () float32 or wider, the norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    if gradients and limit != float("inf"):
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            part: Any = gradient
            (part.to_local() if hasattr(part, "to_local") else part).mul_(factor.to(gradient.device))
    return norm


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of tensors taken together, sharded or not.

    Args:
        tensors: of any floating types; all processes that share one must call this.

    Returns:
        () float32, or float64 where there is such a tensor; 0 without any.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        by_mesh.setdefault((getattr(tensor, "device_mesh", None), norm.dtype, norm.device), []).append(norm)
    norms: list[Any] = [torch.linalg.vector_norm(torch.stack(group)) for group in by_mesh.values()]
    whole: list[Tensor] = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    total = torch.zeros(())
    for norm in whole:
        total = torch.hypot(total.to(norm.device), norm)
    return total
