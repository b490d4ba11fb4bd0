"""Exponential moving average of weights."""

from lightning.pytorch import Callback, LightningModule, Trainer


class EMA(Callback):
    """Has the module keep an exponential moving average of one network, updated after each optimizer step.

    The average is the module's sub-module `ema`: it is saved, sharded and exported like the networks.

    Args:
        decay: weight of the old average, in (0, 1).
        part: name of the averaged network; the module's own choice by default (the actor of PPO).

    Raises:
        ValueError: if `decay` is out of range.

    Note:
        A checkpoint with averaged weights is resumed with this callback only.

    Example::

        Trainer(callbacks=[EMA(decay=0.992)])
    """

    def __init__(self, decay: float = 0.992, part: str | None = None) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"callbacks.EMA.decay must lie between 0 and 1, got {decay}")
        self.decay, self.part = decay, part

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the average before the networks are built."""
        enable = getattr(pl_module, "enable_ema", None)
        if enable is None:
            raise ValueError(
                f"callbacks.EMA needs a module with enable_ema(decay, part); {type(pl_module).__name__} has none"
            )
        enable(self.decay, self.part)
