"""Settings of parameter groups."""

from dataclasses import asdict, dataclass


@dataclass
class GroupOptions:
    """Settings of one network's parameter groups that differ from the optimizer's own.

    Args:
        lr: base learning rate.
        weight_decay: decay of matrices; biases and norms never decay.
    """

    lr: float | None = None
    weight_decay: float | None = None

    def values(self) -> dict[str, float]:
        """The settings that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}
