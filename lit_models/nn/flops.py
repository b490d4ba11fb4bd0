"""Floating-point operations of networks, by which the utilisation of a device is judged.

An addition and a multiplication count as two operations. Counted is what the model needs, not what is computed: padding
and activations that are computed again in the backward pass do not count.

Sources: PaLM (arXiv 2204.02311), appendix B: training takes 6N + 12LHQT operations per token, with N weights, L layers,
H heads of width Q, and sequences of T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerCost:
    """What decides the cost of a transformer.

    Args:
        weights: N, weights that every token is multiplied by; a table of embeddings is none, but a head that shares it
            is.
        trained: those of them that are trained.
        attention: L·H·Q, width of attention in all layers together.
    """

    weights: int
    trained: int
    attention: int

    def __sub__(self, part: "TransformerCost") -> "TransformerCost":
        return TransformerCost(
            self.weights - part.weights, self.trained - part.trained, self.attention - part.attention
        )


def linear_layers(network: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[tuple[Tensor, int]]:
    """Weights that every token is multiplied by.

    Args:
        network: whole, sharded, or on the meta device.
        skip: beginnings of the names of layers that are left out.

    Yields:
        The weight of each linear layer, GPT-2's transposed ones included, and of each convolution that cuts its input
        into patches; and the number of its elements in all shards together.
    """
    for name, module in network.named_modules():
        if skip and f"{name}.".startswith(skip):
            continue
        if isinstance(module, nn.Linear):
            yield module.weight, module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            yield module.weight, module.nx * module.nf
        elif isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
            height, width = module.kernel_size
            yield module.weight, module.in_channels * module.out_channels * height * width // module.groups


def transformer_cost(network: nn.Module, config: Any = None, skip: tuple[str, ...] = ()) -> TransformerCost:  # noqa: ANN401
    """What decides the cost of a transformer.

    Experts of which a token sees only some, and windows of attention shorter than the text, are not known here.

    Args:
        network: whole, sharded, or on the meta device.
        config: its sizes, by the names of transformers; by default that of the network or of the first module in it
            that has one. Without layers in it there is no attention.
        skip: beginnings of the names of layers that are left out.

    Returns:
        The cost per token and per pair of tokens.
    """
    counts = [(count, weight.requires_grad) for weight, count in linear_layers(network, skip)]
    if config is None:
        config = next((module.config for module in network.modules() if hasattr(module, "config")), None)
    layers = getattr(config, "num_hidden_layers", 0)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return TransformerCost(
        weights=sum(count for count, _ in counts),
        trained=sum(count for count, trained in counts if trained),
        attention=layers * heads * width,
    )


def forward_flops(cost: TransformerCost, lengths: Tensor) -> Tensor:
    """Operations of a forward pass: 2N + 4LHQT per token.

    Args:
        cost: of the network.
        lengths: (B,) tokens of each sequence, of any type.

    Returns:
        () float32, on the device of the lengths.
    """
    tokens, pairs = _sums(lengths)
    return 2.0 * cost.weights * tokens + 4.0 * cost.attention * pairs


def training_flops(cost: TransformerCost, lengths: Tensor) -> Tensor:
    """Operations of a forward and a backward pass: 6N + 12LHQT per token, and 2 less per weight that is not trained.

    Args:
        cost: of the network.
        lengths: (B,) tokens of each sequence, of any type.

    Returns:
        () float32, on the device of the lengths.
    """
    tokens, pairs = _sums(lengths)
    return (4.0 * cost.weights + 2.0 * cost.trained) * tokens + 12.0 * cost.attention * pairs


def _sums(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, and pairs of tokens of one sequence; floating, since whole numbers of 64 bits are too small."""
    lengths = lengths.float()
    return lengths.sum(), lengths.square().sum()


def counted_flops(network: nn.Module, *inputs: Any, **options: Any) -> int:  # noqa: ANN401
    """Operations of a forward pass of any network, found by a run on shapes alone.

    Nothing is computed and no memory is taken. To be called before the network is sharded. Training takes three times
    as many where all weights are trained. Convolutions, matrix products and attention are counted.

    Args:
        network: its forward pass must not look at values.
        *inputs: its inputs; of tensors only shape and type are used, so `torch.empty(..., device="meta")` will do.
        **options: likewise.

    Returns:
        The number of operations.
    """
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: _on_meta(value) for name, value in (*network.named_parameters(), *network.named_buffers())}
    args = tuple(_on_meta(value) for value in inputs)
    named = {name: _on_meta(value) for name, value in options.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, state, args, named)
    return int(counter.get_total_flops())


def _on_meta(value: Any) -> Any:  # noqa: ANN401
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
