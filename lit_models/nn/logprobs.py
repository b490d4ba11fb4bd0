"""Log-probabilities, entropy and positions of tokens, for every loss on a language model's logits.

Shapes: B rows, R columns, V vocabulary entries. Results are float32 whatever the dtype of the logits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _chunk_entropy(logits: Tensor, temperature: float) -> Tensor:
    logprobs = (logits.float() / temperature).log_softmax(-1)
    # A forbidden token has probability 0 and log-probability -inf; their product must be 0.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def _split(tensor: Tensor, chunk_tokens: int) -> list[tuple[Tensor, ...]]:
    """Cut (B, R, ...) into whole rows while they fit into `chunk_tokens`, otherwise into pieces of single rows."""
    rows = max(1, chunk_tokens // max(1, tensor.shape[1]))
    return [torch.split(row, chunk_tokens, dim=1) for row in torch.split(tensor, rows, dim=0)]


def _chunked(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], temperature: float, chunk_tokens: int
) -> Tensor:
    if tensors[0].shape[:2].numel() <= chunk_tokens:
        return function(*tensors, temperature)
    # Without recomputation autograd would keep one float32 copy of the logits per chunk until the backward pass.
    recompute = torch.is_grad_enabled() and tensors[0].requires_grad
    rows = []
    for pieces in zip(*(_split(tensor, chunk_tokens) for tensor in tensors), strict=True):
        columns = []
        for piece in zip(*pieces, strict=True):
            if recompute:
                value = checkpoint(function, *piece, temperature, use_reentrant=False, preserve_rng_state=False)
            else:
                value = function(*piece, temperature)
            columns.append(value)
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows, dim=0)


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0, chunk_tokens: int = 2048) -> Tensor:
    """Log-probability of the given tokens under softmax(logits / temperature).

    Args:
        logits: (B, R, V) in any floating dtype; column k is the prediction of `ids[:, k]`.
        ids: (B, R) int64.
        temperature: Divisor of the logits, the one used for sampling.
        chunk_tokens: Number of tokens that are converted to float32 at a time; bounds the extra memory, also in the
            backward pass.

    Returns:
        (B, R) float32 in every column, padded ones included.
    """
    return _chunked(_chunk_logprobs, (logits, ids), temperature, chunk_tokens)


def entropy(logits: Tensor, temperature: float = 1.0, chunk_tokens: int = 2048) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) in every column.

    Args:
        logits: (B, R, V) in any floating dtype.
        temperature: Divisor of the logits.
        chunk_tokens: Number of tokens that are converted to float32 at a time.

    Returns:
        (B, R) float32, padded columns included.
    """
    return _chunked(_chunk_entropy, (logits,), temperature, chunk_tokens)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count only the tokens, so that left padding does not shift the text.

    Args:
        attention_mask: (B, L), 1 for tokens and 0 for padding.

    Returns:
        (B, L) int64; 0 before the first token.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every token given the ones before it.

    Args:
        logits: (B, T, V) in any floating dtype, for the tokens of `labels`.
        labels: (B, T) int64, the tokens themselves, -100 where they don't count. No column predicts the first one.

    Returns:
        (B, T-1) float32 in nats, 0 where a token doesn't count; and the (B, T-1) bool mask of those that do.
    """
    targets = labels[:, 1:]
    counted = targets != -100
    nll = -gather_logprobs(logits[:, :-1], targets.clamp(min=0))
    return torch.where(counted, nll, 0.0), counted
