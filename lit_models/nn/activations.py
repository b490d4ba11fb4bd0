"""Activations in one kernel where transformers composes them of several."""

from torch import nn

COMPOSED_TANH_GELU = ("NewGELUActivation", "FastGELUActivation")
"""Classes of `transformers.activations` that spell out the tanh approximation of GELU, in memory-bound steps."""


def fuse_gelu(model: nn.Module) -> None:
    """Let a network compute the tanh approximation of GELU by torch's own kernel, in place.

    The function is the same up to rounding, and more precise in bfloat16. For a small GPT-2 on a CPU it is half of
    the time of a training step.

    Args:
        model: network of transformers' modules.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in COMPOSED_TANH_GELU:
                setattr(module, name, nn.GELU(approximate="tanh"))
