"""Distances between sets of embeddings of generated and of real music."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Kernel = Literal["gaussian", "iq", "imq"]
CHUNK = 1024
"""Rows whose distances to all others are held at a time."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Fréchet (2-Wasserstein) distance of two normal distributions.

    Args:
        mean_a: (D,) float64.
        cov_a: (D,D) float64, may be singular.
        mean_b: (D,) float64.
        cov_b: (D,D) float64, may be singular.

    Returns:
        () float64: |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½). Rounding can make it just negative.
    """
    # Eigenvalues of a product of two covariances are not negative; those of a singular one may round below zero.
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D,D), float64, of (N,D) rows with N >= 2."""
    rows = rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.mT @ centred / (len(rows) - 1)


def extrapolated_frechet_distance(
    generated: Tensor, reference: Tensor, smallest: int = 500, steps: int = 25, seed: int = 0
) -> dict[str, Tensor]:
    """Fréchet distance that infinitely many generated rows would have (FAD-inf of arXiv 2311.01616).

    The distance of draws, with replacement, of several sizes is regressed on one over the size. Draws depend on the
    seed and on the set of rows, not on their order.

    Args:
        generated: (N,D).
        reference: (M,D), M >= 2.
        smallest: size of the smallest draw; the largest has N rows.
        steps: number of sizes.
        seed: of the draws.

    Returns:
        `fad_inf`, the `slope` and the coefficient of determination `r2` of the regression, each () float64.

    Raises:
        ValueError: if there are fewer generated rows than `smallest`, or no two sizes.
    """
    if not 2 <= smallest < len(generated) or steps < 2:
        raise ValueError(
            f"smallest={smallest}, steps={steps}: the extrapolation needs at least two sizes between 2 and the number "
            f"of generated windows, {len(generated)}; generate more or lower `smallest`"
        )
    mean, cov = moments(reference)
    rows = generated.double()
    order = np.lexsort(rows.cpu().numpy().T)
    rows = rows[torch.from_numpy(order).to(rows.device)]
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, len(rows), steps, dtype=torch.float64).long()
    distances = torch.stack(
        [
            frechet_distance(*moments(rows[torch.randint(len(rows), (size,), generator=generator)]), mean, cov)
            for size in sizes.tolist()
        ]
    )
    inverse = 1 / sizes.to(rows)
    design = torch.stack([torch.ones_like(inverse), inverse], 1)
    fit = torch.linalg.lstsq(design, distances[:, None]).solution[:, 0]
    residual = (distances - design @ fit).square().sum()
    r2 = 1 - residual / (distances - distances.mean()).square().sum()
    return {"fad_inf": fit[0], "slope": fit[1], "r2": r2}


def median_distance(rows: Tensor) -> Tensor:
    """Median, () float64, of the Euclidean distances of all pairs of (N,D) rows; of two middle ones, the lower."""
    return nn.functional.pdist(rows.double()).median()


def kernel_distance(
    generated: Tensor, reference: Tensor, kernel: Kernel = "gaussian", bandwidth: float | Tensor | None = None
) -> Tensor:
    """Kernel audio distance (arXiv 2502.15602): unbiased squared maximum mean discrepancy, times 100.

    Args:
        generated: (N,D), N >= 2.
        reference: (M,D), M >= 2.
        kernel: with u = squared distance / (2 bandwidth²): "gaussian" is e^-u, "iq" 1/(1+u) and "imq" 1/sqrt(1+u).
        bandwidth: in units of the embedding; None takes the median distance within the reference.

    Returns:
        () float64; negative where the sets are as close as two draws of one distribution can be.
    """
    generated, reference = generated.double(), reference.double()
    scale = median_distance(reference) if bandwidth is None else torch.as_tensor(bandwidth, device=generated.device)
    gamma = 1 / (2 * scale.double().square() + 1e-8)

    def total(rows: Tensor, others: Tensor) -> Tensor:
        values = rows.new_zeros(())
        for part in rows.split(CHUNK):
            # Without the shortcut over inner products, which loses small distances.
            u = gamma * torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist").square()
            if kernel == "gaussian":
                values = values + (-u).exp().sum()
            else:
                values = values + (1 + u).pow(-1.0 if kernel == "iq" else -0.5).sum()
        return values

    n, m = len(generated), len(reference)
    # A row's distance to itself is 0 and its kernel 1.
    within = (total(generated, generated) - n) / (n * (n - 1)) + (total(reference, reference) - m) / (m * (m - 1))
    return 100 * (within - 2 * total(generated, reference) / (n * m))


class _EmbeddingMetric(Metric):
    """Two sets of embeddings, of which the reference can outlive `reset`."""

    full_state_update = True  # the other way to make `forward` would count a kept reference twice
    is_differentiable = False
    reference_states: Sequence[str] = ()

    def __init__(self, embedding: nn.Module | None, keep_reference: bool, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.embedding = embedding.eval() if embedding is not None else None
        self.keep_reference = keep_reference

    @torch.no_grad()
    def _rows(self, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        """(N,D) float64 rows of a batch."""
        if self.embedding is None:
            rows = inputs
        else:
            rows = self.embedding(inputs) if lengths is None else self.embedding(inputs, lengths)
        return rows.reshape(-1, rows.shape[-1]).double()

    def _check(self, **counts: int) -> None:
        for name, count in counts.items():
            if count < 2:
                raise ValueError(
                    f"{type(self).__name__}: {count} {name} windows were seen, but at least 2 are needed; "
                    f"call update(..., reference={name == 'reference'}) with more clips first"
                )

    def reset(self) -> None:
        """Forget the generated rows, and the reference unless `keep_reference`."""
        kept = {}
        for name in self.reference_states if self.keep_reference else ():
            value = getattr(self, name)
            kept[name] = list(value) if isinstance(value, list) else value  # lists are cleared in place
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)


class FrechetAudioDistance(_EmbeddingMetric):
    """Fréchet audio distance of all windows of all clips; sums in float64, hence exact over batches and ranks.

    Args:
        num_features: D, width of a row of the embedding.
        embedding: maps waveforms, and their lengths where `update` gets them, to (..., D); None if rows are given.
        keep_reference: whether `reset` keeps what was seen of the reference.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = False
    reference_states = ("reference_sum", "reference_outer", "reference_count")
    generated_sum: Tensor
    generated_outer: Tensor
    generated_count: Tensor
    reference_sum: Tensor
    reference_outer: Tensor
    reference_count: Tensor

    def __init__(
        self,
        num_features: int,
        embedding: nn.Module | None = None,
        keep_reference: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(embedding, keep_reference, **kwargs)
        for side in ("generated", "reference"):
            for name, shape in {"sum": (num_features,), "outer": (num_features, num_features), "count": ()}.items():
                self.add_state(f"{side}_{name}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, inputs: Tensor, reference: bool, lengths: Tensor | None = None) -> None:
        """Add clips.

        Args:
            inputs: (B,C,T) waveforms, or (..., D) rows without an embedding.
            reference: whether they belong to the reference.
            lengths: (B,) int64, samples of each clip; None means T.
        """
        rows = self._rows(inputs, lengths)
        side = "reference" if reference else "generated"
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + rows.sum(0))
        setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + rows.mT @ rows)
        setattr(self, f"{side}_count", getattr(self, f"{side}_count") + len(rows))

    def compute(self) -> Tensor:
        """() float64: the distance.

        Raises:
            ValueError: if a set has fewer than 2 rows.
        """
        self._check(generated=int(self.generated_count), reference=int(self.reference_count))
        values = []
        for total, outer, count in (
            (self.generated_sum, self.generated_outer, self.generated_count),
            (self.reference_sum, self.reference_outer, self.reference_count),
        ):
            mean = total / count
            values += [mean, (outer - count * mean.outer(mean)) / (count - 1)]
        return frechet_distance(*values)


class _RowMetric(_EmbeddingMetric):
    """A distance that needs all rows."""

    reference_states = ("reference",)
    generated: list[Tensor]
    reference: list[Tensor]

    def __init__(
        self,
        embedding: nn.Module | None = None,
        keep_reference: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(embedding, keep_reference, **kwargs)
        for name in ("generated", "reference"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, inputs: Tensor, reference: bool, lengths: Tensor | None = None) -> None:
        """Add clips.

        Args:
            inputs: (B,C,T) waveforms, or (..., D) rows without an embedding.
            reference: whether they belong to the reference.
            lengths: (B,) int64, samples of each clip; None means T.
        """
        (self.reference if reference else self.generated).append(self._rows(inputs, lengths))

    def _sets(self) -> tuple[Tensor, Tensor]:
        """Generated and reference rows."""
        sets = [dim_zero_cat(rows) if len(rows) else torch.empty(0, 1) for rows in (self.generated, self.reference)]
        self._check(generated=len(sets[0]), reference=len(sets[1]))
        return sets[0], sets[1]


class ExtrapolatedFrechetAudioDistance(_RowMetric):
    """Fréchet audio distance that infinitely many generated clips would have; see `extrapolated_frechet_distance`.

    Args:
        embedding: maps waveforms, and their lengths where `update` gets them, to (..., D); None if rows are given.
        keep_reference: whether `reset` keeps what was seen of the reference.
        smallest: size of the smallest draw.
        steps: number of sizes.
        seed: of the draws.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(
        self,
        embedding: nn.Module | None = None,
        keep_reference: bool = True,
        smallest: int = 500,
        steps: int = 25,
        seed: int = 0,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(embedding, keep_reference, **kwargs)
        self.smallest, self.steps, self.seed = smallest, steps, seed

    def compute(self) -> dict[str, Tensor]:
        """`fad_inf`, `slope` and `r2`, each () float64.

        Raises:
            ValueError: if there are fewer generated rows than `smallest`, or fewer than 2 of the reference.
        """
        return extrapolated_frechet_distance(*self._sets(), self.smallest, self.steps, self.seed)


class KernelAudioDistance(_RowMetric):
    """Kernel audio distance; see `kernel_distance`. It is unbiased, so small sets can be compared.

    Args:
        embedding: maps waveforms, and their lengths where `update` gets them, to (..., D); None if rows are given.
        keep_reference: whether `reset` keeps what was seen of the reference.
        kernel: "gaussian", "iq" (inverse quadratic) or "imq" (inverse multiquadratic).
        bandwidth: in units of the embedding; None takes the median distance within the reference.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if the kernel is unknown or the bandwidth not positive.
    """

    higher_is_better = False

    def __init__(
        self,
        embedding: nn.Module | None = None,
        keep_reference: bool = True,
        kernel: Kernel = "gaussian",
        bandwidth: float | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(embedding, keep_reference, **kwargs)
        if kernel not in ("gaussian", "iq", "imq"):
            raise ValueError(f"kernel={kernel!r} is unknown; choose gaussian, iq or imq")
        if bandwidth is not None and bandwidth <= 0:
            raise ValueError(f"bandwidth={bandwidth} must be positive; leave it out for the reference's median")
        self.kernel: Kernel = kernel
        self.bandwidth = bandwidth

    def compute(self) -> Tensor:
        """() float64: the distance.

        Raises:
            ValueError: if a set has fewer than 2 rows.
        """
        return kernel_distance(*self._sets(), self.kernel, self.bandwidth)
