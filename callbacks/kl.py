"""Control of the divergence from the reference model in PPO."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class KLController(Callback):
    """Adapts the KL coefficient after each rollout so that the divergence approaches a target (Ziegler et al. 2019).

    Args:
        target: wanted KL per response, in nats.
        horizon: responses over which the coefficient reacts.

    Raises:
        ValueError: if an argument is not positive.

    Note:
        The module keeps the coefficient in its checkpoint.

    Example::

        Trainer(callbacks=[KLController(target=6.0)])
    """

    def __init__(self, target: float, horizon: float = 10000.0) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"callbacks.KLController.target and horizon must be positive, got {target} and {horizon}")
        self.target, self.horizon = target, horizon

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has a KL coefficient.

        Raises:
            TypeError: if it has none.
        """
        if stage == "fit" and not hasattr(pl_module, "adapt_kl"):
            raise TypeError(
                f"callbacks.KLController adapts the KL coefficient of PPO, and {type(pl_module).__name__} has none; "
                "take it out of trainer.callbacks"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Let the module apply the controller's formula."""
        adapt: Any = pl_module.adapt_kl
        adapt(self.target, self.horizon)


class EarlyStopOnKL(Callback):
    """Stops training when the KL to the reference stays above a limit.

    Args:
        max_kl: limit of `kl/ref`, in nats per response.
        patience: consecutive rollouts above the limit that stop the run.

    Note:
        The value is that of the newest rollout, averaged over all processes.

    Example::

        Trainer(callbacks=[EarlyStopOnKL(max_kl=30.0, patience=3)])
    """

    def __init__(self, max_kl: float, patience: int = 1) -> None:
        if max_kl <= 0 or patience < 1:
            raise ValueError(
                f"callbacks.EarlyStopOnKL: max_kl must be positive and patience >= 1, got {max_kl} and {patience}"
            )
        self.max_kl, self.patience, self.above = max_kl, patience, 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Count rollouts above the limit."""
        if "kl/ref" not in trainer.callback_metrics:
            raise ValueError(
                f"callbacks.EarlyStopOnKL needs a module that logs kl/ref; {type(pl_module).__name__} does not"
            )
        kl = float(trainer.callback_metrics["kl/ref"])
        self.above = 0 if kl <= self.max_kl else self.above + 1  # NaN counts as above
        if self.above >= self.patience:
            rank_zero_info(f"stopped: kl/ref was above {self.max_kl} for {self.above} rollouts, at last {kl:.2f}")
            trainer.should_stop = True

    def state_dict(self) -> dict[str, int]:
        """The counter."""
        return {"above": self.above}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the counter."""
        self.above = state_dict["above"]
