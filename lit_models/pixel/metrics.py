"""Numbers that tell how well patches and tokens are predicted, and how robust a reader is.

All metrics are sums until `compute`, so they are exact over batches of any size and over ranks.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_models.pixel.functional import PixelLoss, inked, mean_patch, npp_loss, pixel_targets

GLUE = ("cola", "mnli_matched", "mnli_mismatched", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
"""Entries of the GLUE average; MNLI counts twice."""
HALF_LEVEL = 0.5 / 255
"""Half the distance of two greys in [0, 1]."""


def glue_average(scores: Mapping[str, float]) -> float:
    """Mean of the ten numbers that papers on pixel models report for GLUE.

    Args:
        scores: accuracy of `mnli_matched`, `mnli_mismatched`, `qnli`, `sst2`, `rte` and `wnli`, F1 of `qqp` and
            `mrpc`, Matthews correlation of `cola` and Spearman correlation of `stsb`, all in the same unit.

    Returns:
        Their mean, as in arXiv 2207.06991.

    Raises:
        ValueError: if an entry is missing or unknown.
    """
    missing, unknown = sorted(set(GLUE) - set(scores)), sorted(set(scores) - set(GLUE))
    if missing or unknown:
        raise ValueError(
            f"scores: the GLUE average is over {', '.join(GLUE)}; missing: {', '.join(missing) or 'none'}, "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    return math.fsum(scores.values()) / len(GLUE)


def retention(noisy: float, clean: float, majority: float) -> float:
    """Share of what a classifier knows on clean text that is left on noisy text.

    Args:
        noisy: accuracy on noisy text.
        clean: accuracy on the same text without noise.
        majority: accuracy of always naming the most frequent label.

    Returns:
        (noisy - majority) / (clean - majority); NaN for a classifier that knows nothing on clean text.
    """
    return (noisy - majority) / (clean - majority) if clean != majority else math.nan


class Retention(Metric):
    """Retention of accuracy under noise, against the most frequent label of the same rows.

    Args:
        num_labels: number of labels.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    correct: Tensor
    labels: Tensor

    def __init__(self, num_labels: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("labels", torch.zeros(num_labels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, noisy: Tensor, clean: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            noisy: (N,) int64, predictions on noisy text.
            clean: (N,) int64, predictions on the same text without noise.
            labels: (N,) int64.
        """
        self.correct += torch.stack([(noisy == labels).sum(), (clean == labels).sum()])
        self.labels += labels.bincount(minlength=len(self.labels))

    def compute(self) -> Tensor:
        """() float32: retention over all rows."""
        noisy, clean, majority = (
            float(count) / max(float(self.labels.sum()), 1.0) for count in (*self.correct, self.labels.max())
        )
        return torch.tensor(retention(noisy, clean, majority), device=self.labels.device)


class PatchErrors(Metric):
    """Error of next-patch predictions, and of predictors that know nothing, on the same targets.

    The trivial predictors are a repetition of the previous patch, zeros, and the mean of all targets, which is taken
    from the evaluated data itself and so is the best constant in hindsight. Where the model predicts probabilities,
    zero is one half, and the previous patch is repeated with certainty but for half a level of grey.

    Args:
        size: values in a patch, p·p·C.
        normalize: whether the model predicts patches without their mean and contrast.
        loss: error of a value.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    errors: Tensor
    sums: Tensor
    targets: Tensor

    def __init__(self, size: int, normalize: bool = True, loss: PixelLoss = "mse", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.normalize, self.loss = normalize, loss
        # First all targets, then those with ink alone.
        for name, shape in {"errors": (2, 3), "sums": (2, size), "targets": (2,)}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, patches: Tensor, counted: Tensor) -> None:
        """Add strips.

        Args:
            prediction: (B,L,p·p·C); entry i is the prediction of patch i+1.
            patches: (B,L,p·p·C) float32 in [0, 1].
            counted: (B,L) bool, patches that are targets; nothing predicts the first one.
        """
        target = pixel_targets(patches, self.normalize)
        previous = target.logit(HALF_LEVEL) if self.loss == "bce" else target
        for number, chosen in enumerate((counted, counted & inked(patches))):
            for column, guess in enumerate((prediction, previous, torch.zeros_like(target))):
                self.errors[number, column] += npp_loss(guess, target, chosen, self.loss).total
            total, count = mean_patch(target, chosen)
            self.sums[number] += total
            self.targets[number] += count

    def compute(self) -> dict[str, Tensor]:
        """Errors per value of a target patch, each () float32.

        Returns:
            `npp`, `npp_copy`, `npp_zero` and `npp_mean` over all targets, `npp_inked` and `npp_inked_copy`,
            `npp_inked_zero`, `npp_inked_mean` over those with ink; what has no targets is left out, and so is the best
            constant of the smooth L1 error, which has no closed form.
        """
        values: dict[str, Tensor] = {}
        for number, name in enumerate(("npp", "npp_inked")):
            if not self.targets[number]:
                continue
            model, copy, zero = self.errors[number] / self.targets[number]
            mean = self.sums[number] / self.targets[number]
            values |= {name: model, f"{name}_copy": copy, f"{name}_zero": zero}
            if self.loss == "mse":
                values[f"{name}_mean"] = zero - mean.square().mean()
            elif self.loss == "bce":
                values[f"{name}_mean"] = (torch.special.entr(mean) + torch.special.entr(1 - mean)).mean()
        return {name: value.float() for name, value in values.items()}


class TokenErrors(Metric):
    """Error of next-token predictions."""

    full_state_update = False
    nll: Tensor
    targets: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        for name in ("nll", "targets", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, counted: Tensor, num_bytes: Tensor) -> None:
        """Add texts.

        Args:
            nll: (B,T) in nats, 0 where a token does not count.
            counted: (B,T) bool, tokens that count.
            num_bytes: (B,) int64, length of each text in UTF-8.
        """
        self.nll += nll.double().sum()
        self.targets += counted.sum()
        self.bytes += num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        """Each () float32.

        Returns:
            `ntp` in nats per token, its exponential `perplexity`, and `bits_per_byte` of the text; nothing without
            tokens.
        """
        if not self.targets:
            return {}
        ntp = self.nll / self.targets
        return {
            "ntp": ntp.float(),
            "perplexity": ntp.clamp(max=80.0).exp().float(),  # beyond this, float32 holds no exponential
            "bits_per_byte": (self.nll / math.log(2) / self.bytes.clamp(min=1)).float(),
        }
