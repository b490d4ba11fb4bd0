"""The closed form of free factors in a fit: rows are collected and solved for several λ, of which one is kept."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_models.influence import functional
from lit_models.influence.functional import Factors
from lit_models.influence.metrics import TrajectoryErrors
from lit_models.influence.rows import Batch

if TYPE_CHECKING:
    from lit_models.influence.modeling import InfluenceSimulator


@dataclass(frozen=True)
class Ridge:
    """The closed form.

    Args:
        penalties: values of λ; the one with the smallest error of roll-outs in validation is kept, or the first one
            without validation.

    Raises:
        ValueError: if there is none, or one is not positive.
    """

    penalties: tuple[float, ...] = (1.0, 0.1, 10.0)

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"model.ridge.penalties must be positive numbers, at least one, got {self.penalties}")


@dataclass
class Candidate:
    """A fit that validation rates.

    Args:
        penalty: λ.
        factors: its factors.
        meters: its errors, one meter per metric.
    """

    penalty: float
    factors: Factors
    meters: list[TrajectoryErrors]

    def error(self, weights: Tensor) -> float:
        """Mean squared error of all steps over metrics, by weight; infinite if it is not a number."""
        errors = torch.stack([meter.compute()["all_steps_mse"] for meter in self.meters])
        mean = float((errors * weights.to(errors)).sum() / weights.sum())
        return math.inf if math.isnan(mean) else mean


class ClosedForm:
    """Collects rows and solves them.

    Args:
        options: values of λ.
    """

    def __init__(self, options: Ridge) -> None:
        self.options = options
        self.rows: list[dict[str, Tensor]] = []
        self.solved = True
        self.candidates: list[Candidate] = []

    def collect(self, net: "InfluenceSimulator", batch: Batch) -> None:
        """Keep rows on the CPU.

        Args:
            net: the simulator.
            batch: rows of `clean_rows` with all tests.
        """
        ids = batch["ids"]
        scale = net.scale(ids, batch.get("lr_scale"))
        kept = {
            "ids": net.train_rows(ids),
            "history": net.history(batch["history"]),
            "target": batch["target"],
            "mask": batch["mask"],
            "scale": torch.ones(len(ids), device=ids.device) if scale is None else scale,
        }
        self.rows.append({name: value.cpu() for name, value in kept.items()})
        self.solved = False

    def solve(self, net: "InfluenceSimulator") -> None:
        """Fit the factors for every λ, and give the simulator those of the first one.

        Args:
            net: the simulator.

        Raises:
            ValueError: if the prior needs the batch size and it is not known.
        """
        config, device = net.config, net.device
        prior = 0.0
        if not config.identity_offset:
            if config.batch_reference is None:
                raise ValueError("model.batch_reference: without identity_offset, ridge starts from 1 over it; set it")
            prior = 1 / config.batch_reference
        width = max(rows["ids"].shape[1] for rows in self.rows)
        ids = [pad(rows["ids"], (0, width - rows["ids"].shape[1]), value=-1) for rows in self.rows]
        history, target, mask, scale = (
            torch.cat([rows[name] for rows in self.rows]) for name in ("history", "target", "mask", "scale")
        )
        number, offset = len(net.train_ids), config.identity_offset
        fits = functional.ridge(
            torch.cat(ids), history, target, number, self.options.penalties, mask, scale, offset, (prior, 0.0)
        )
        for penalty, fit in zip(self.options.penalties, fits, strict=True):
            factors = Factors(fit.A.float().to(device), fit.B.float().to(device))
            meters = [TrajectoryErrors(config.given).to(device) for _ in config.metrics]
            self.candidates.append(Candidate(penalty, factors, meters))
        net.set_factors(self.candidates[0].factors)
        self.solved = True

    def choose(self, net: "InfluenceSimulator") -> Candidate:
        """Keep the fit with the smallest error.

        Args:
            net: the simulator; it gets the factors.

        Returns:
            The fit.
        """
        weights = torch.tensor(net.config.metric_weights)
        best = min(self.candidates, key=lambda candidate: candidate.error(weights))
        net.set_factors(best.factors)
        self.candidates = []
        return best

    def end_epoch(self, net: "InfluenceSimulator") -> None:
        """Solve what no validation asked for, and forget the rows."""
        if not self.solved:
            self.solve(net)
        self.rows, self.candidates, self.solved = [], [], True
