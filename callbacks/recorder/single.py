"""Losses of single examples from the steps of any LightningModule."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from callbacks.recorder.causal import OPTION


class SingleLoss:
    """Loss of single examples from the validation or training step of a module that offers nothing better.

    The step runs on a stand-in that shares networks and parameters with the module, but keeps attributes, torchmetrics
    and logged values to itself.

    Args:
        module: the module.

    Raises:
        ValueError: if the module trains with its own optimization and has no validation step.
    """

    def __init__(self, module: LightningModule) -> None:
        names = ["validation_step"] if is_overridden("validation_step", module) else []
        if module.automatic_optimization:
            names.append("training_step")
        if not names:
            raise ValueError(
                f"{OPTION}.metrics: {type(module).__name__} optimizes by itself in training_step and has no "
                "validation_step, so no loss can be asked for; give it per_example_metrics(batch), or name a function"
            )
        self.names = names
        self._stand_in: LightningModule | None = None
        self._logged: dict[str, Any] = {}
        rank_zero_warn(
            f"{OPTION}: {type(module).__name__} has no per_example_metrics(batch), so tests run one by one through its "
            f"{names[0]}, which is slow; give it one, or name a function in metrics.loss",
            stacklevel=5,
        )

    def begin(self) -> None:
        """Take the module as it is now; to be called before every measurement."""
        self._stand_in = None

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:  # noqa: ANN401
        """Loss of the only example of a batch, (1,)."""
        if self._stand_in is None:
            self._stand_in = _stand_in(module, self._logged)
        for name in tuple(self.names):
            self._logged.clear()
            step = getattr(self._stand_in, name)
            result = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
            loss = _loss_in(result, self._logged)
            if loss is not None:
                return loss.reshape(1)
            self.names.remove(name)
        raise ValueError(
            f"{OPTION}.metrics.loss: neither validation_step nor training_step of {type(module).__name__} returns or "
            "logs a loss; give it per_example_metrics(batch), or name a function"
        )


_FRAMEWORK = frozenset(vars(LightningModule()))


def _stand_in(module: LightningModule, logged: dict[str, Any]) -> LightningModule:
    """A module with the same networks and attributes of its own, which writes what it logs to a dict."""
    from torchmetrics import Metric

    def counts(part: nn.Module | None) -> bool:
        return (
            part is not None
            and any(isinstance(child, Metric) for child in part.modules())
            and not any(True for _ in part.parameters())
        )

    double: LightningModule = object.__new__(type(module))
    own = {name: value if name in _FRAMEWORK else _own(value) for name, value in vars(module).items()}
    own["_modules"] = {
        name: copy.deepcopy(part) if counts(part) else part for name, part in vars(module)["_modules"].items()
    }
    own["log"] = lambda name, value, *_, **__: logged.__setitem__(name, value)
    own["log_dict"] = lambda values, *_, **__: logged.update(values)
    vars(double).update(own)
    return double


def _own(value: Any) -> Any:  # noqa: ANN401
    """A copy of what a step might change in place: tensors and containers."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    if type(value) in (list, tuple, set):
        return type(value)(_own(item) for item in value)
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return value


def _loss_in(result: Any, logged: Mapping[str, Any]) -> Tensor | None:  # noqa: ANN401
    """The loss that a step returned or logged."""
    found = result.get("loss") if isinstance(result, Mapping) else result
    if found is None:
        names = sorted((name for name in logged if "loss" in name.lower()), key=len)
        found = logged[names[0]] if names else None
    if isinstance(found, (int, float)):
        return torch.tensor(float(found))
    return found.float() if isinstance(found, Tensor) and found.numel() == 1 else None
