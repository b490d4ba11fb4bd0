"""Which process of a run this is, for code that knows neither Lightning nor a Trainer; imports nothing of ours."""

import os
import sys
import warnings

VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""What launchers tell processes before these have found each other, the most reliable first."""


def is_first_process() -> bool:
    """Whether this process speaks for its run: the one of rank 0, or the only one."""
    distributed = sys.modules.get("torch.distributed")  # nobody has set it up where it was never imported
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    ranks = [os.environ[name] for name in VARIABLES if os.environ.get(name, "").isdigit()]
    return not ranks or int(ranks[0]) == 0


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn, in the process of rank 0 alone.

    Args:
        message: what all processes would say alike.
        stacklevel: as in `warnings.warn`, counted from the caller.
    """
    if is_first_process():
        warnings.warn(message, stacklevel=stacklevel + 1)
