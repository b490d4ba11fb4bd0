"""Exponential moving average of weights."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer


class EMA(Callback):
    """Has the module keep an exponential moving average of one network, updated after each optimizer step.

    The average is the module's sub-module `ema`: it is saved, sharded and exported like the networks.

    Args:
        decay: weight of the old average, in (0, 1), after the warm-up.
        part: name of the averaged network; the module's own choice by default (the actor of PPO).
        warmup: how the weight grows to `decay` from 0, with k = updates - delay - 1: "power" is 1 - (1+k)^-power, as in
            ema-pytorch and diffusers, "ratio" is (1+k) / (10+k), and "none" is `decay` from the start. A short run
            needs one: without, the average is that of the first weights.
        power: exponent of "power".
        delay: first updates of a warm-up that copy the weights.

    Raises:
        ValueError: if an option is out of range.

    Note:
        A checkpoint with averaged weights is resumed with this callback only.

    Example::

        Trainer(callbacks=[EMA(decay=0.992)])
    """

    def __init__(
        self,
        decay: float = 0.992,
        part: str | None = None,
        warmup: Literal["none", "power", "ratio"] = "none",
        power: float = 0.75,
        delay: int = 1,
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"callbacks.EMA.decay must lie between 0 and 1, got {decay}")
        if not power > 0 or delay < 0:
            raise ValueError(
                f"callbacks.EMA: power must be positive and delay at least 0, got power {power}, delay {delay}"
            )
        if warmup not in ("none", "power", "ratio"):
            raise ValueError(f"callbacks.EMA.warmup must be none, power or ratio, got {warmup!r}")
        self.decay, self.part = decay, part
        self.warmup = {"warmup": warmup, "power": power, "delay": delay}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the average before the networks are built."""
        enable = getattr(pl_module, "enable_ema", None)
        if enable is None:
            raise ValueError(
                f"callbacks.EMA needs a module with enable_ema(decay, part, ...); {type(pl_module).__name__} has none"
            )
        enable(self.decay, self.part, **self.warmup)
