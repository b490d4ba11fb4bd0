"""Features of examples at the start of a run, such as projected loss gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.recorder.causal import OPTION
from callbacks.recorder.examples import Collate
from callbacks.recorder.meter import Meter, parse_metrics

TOGETHER = 64
"""Examples whose gradients are projected with the same pass over the matrices."""


class ProjectedGradients:
    """Loss gradients of single examples, projected to few dimensions.

    Every trained parameter has a matrix of normal numbers of variance 1/dims from a seed of its own, made in pieces and
    never kept; the result is the sum over parameters.

    Args:
        module: its parameters that require gradients take part, in their order.
        meter: measures `loss`; None makes one.
        dims: dimensions of the result.
        seed: of the matrices.
        chunk: numbers of a matrix made at a time.
    """

    def __init__(
        self, module: LightningModule, meter: Meter | None, dims: int, seed: int = 0, chunk: int = 2**24
    ) -> None:
        self.meter = Meter(module, parse_metrics(None, 1)) if meter is None else meter
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.dims, self.seed, self.chunk = dims, seed, chunk

    def gradient(self, batch: Any) -> list[Tensor]:  # noqa: ANN401
        """Gradient of the loss of the only example of a batch, by parameter, as float32 vectors.

        Raises:
            ValueError: if the loss has no gradient.
        """
        loss = self.meter(batch, 1, ["loss"])["loss"].sum()
        if not loss.requires_grad:
            raise ValueError(f"{OPTION}.grad_features: the loss is computed without gradients; remove no_grad there")
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return [gradient.float().flatten() for gradient in gradients]

    def __call__(self, batches: Sequence[Any]) -> Tensor:
        """Features of some examples.

        Args:
            batches: one example each.

        Returns:
            (len(batches),dims) float32 on the CPU.
        """
        rows = [self.gradient(batch) for batch in batches]
        result = torch.zeros(len(rows), self.dims)
        for number, columns in enumerate(zip(*rows, strict=True)):
            table = torch.stack(columns).cpu()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            width = max(1, self.chunk // self.dims)
            for begin in range(0, table.shape[1], width):
                part = table[:, begin : begin + width]
                result += part @ torch.randn(part.shape[1], self.dims, generator=generator)
        return result / self.dims**0.5


def features(
    function: ProjectedGradients | Callable[[LightningModule, Any], Tensor],
    module: LightningModule,
    items: Iterator[Any],
    collate: Collate,
    place: Callable[[Any], Any],
    size: int,
) -> Tensor:
    """Features of examples.

    Args:
        function: projected gradients, or a function of the module and a batch that gives (B,D).
        module: the trained module.
        items: the examples.
        collate: function from examples to a batch.
        place: moves a batch to the device.
        size: most examples in a batch of a function.

    Returns:
        (n,D) float32 on the CPU.
    """
    single = isinstance(function, ProjectedGradients)
    result: list[Tensor] = []
    waiting: list[Any] = []
    for item in items:
        waiting.append(place(collate([item])) if single else item)
        if len(waiting) == (TOGETHER if single else size):
            result.append(_some(function, module, waiting, collate, place))
            waiting = []
    if waiting:
        result.append(_some(function, module, waiting, collate, place))
    return torch.cat(result) if result else torch.zeros(0, 0)


def _some(
    function: ProjectedGradients | Callable[[LightningModule, Any], Tensor],
    module: LightningModule,
    waiting: list[Any],
    collate: Collate,
    place: Callable[[Any], Any],
) -> Tensor:
    if isinstance(function, ProjectedGradients):
        return function(waiting)
    values = function(module, place(collate(waiting)))
    if values.ndim != 2 or len(values) != len(waiting):
        raise ValueError(
            f"{OPTION}.grad_features: {len(waiting)} examples must give a table with {len(waiting)} rows, got shape "
            f"{tuple(values.shape)}"
        )
    return values.detach().float().cpu()
