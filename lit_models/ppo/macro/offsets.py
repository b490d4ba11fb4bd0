"""Which characters of a response each generated token wrote."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 4
"""Tokens decoded before each token; a character of UTF-8 has at most as many bytes."""


def token_ends(tokenizer: "PreTrainedTokenizerBase", ids: list[list[int]]) -> list[list[int]]:
    """Number of characters of the decoded text up to and including each token.

    The generated tokens themselves are decoded, not a new tokenization of their text. A token that only begins a
    character has its end where the placeholder of the unfinished character ends.

    Args:
        tokenizer: of the policy.
        ids: tokens of each row, of any lengths.

    Returns:
        End per token and row; special tokens write nothing.
    """
    windows, before = [], []
    for row in ids:
        for number in range(len(row)):
            first = max(0, number - WINDOW)
            windows.append(row[first : number + 1])
            before.append(row[first:number])
    texts = decode(tokenizer, windows + before)
    written = iter(
        len(text) - len(rest) for text, rest in zip(texts[: len(windows)], texts[len(windows) :], strict=True)
    )
    ends = []
    for row in ids:
        end, row_ends = 0, []
        for _ in row:
            end += next(written)
            row_ends.append(end)
        ends.append(row_ends)
    return ends


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[list[int]]) -> list[str]:
    """Texts of tokens without special tokens, with all spaces as they are.

    Args:
        tokenizer: of the policy.
        ids: tokens of each row.

    Returns:
        Text per row.
    """
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        texts: list[str] = fast.decode_batch(ids, skip_special_tokens=True)
        return texts
    return [
        str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))  # type: ignore[arg-type]
        for row in ids
    ]


def starts_at(ends: list[int], boundaries: list[int]) -> list[int]:
    """Tokens that write the characters at which pieces of the text begin.

    Args:
        ends: of `token_ends`, one row.
        boundaries: characters at which pieces begin, ascending.

    Returns:
        Numbers of the tokens, ascending and distinct; boundaries after the last character give the next token.
    """
    found = torch.searchsorted(torch.tensor(ends), torch.tensor(boundaries, dtype=torch.int64), right=True)
    return sorted({int(token) for token in found if token < len(ends)})


def rows_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Valid tokens of each row.

    Args:
        ids: (B, R) int64.
        mask: (B, R).

    Returns:
        Tokens per row.
    """
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
