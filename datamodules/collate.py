"""Padding of token lists to rectangular batches, without loops over tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def pad_right(rows: Sequence[ArrayLike], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad token lists behind their last token.

    Args:
        rows: one list of token ids per row; empty ones are allowed.
        pad_id: id that fills the rest.
        length: width T of the result in tokens; None takes the longest row.

    Returns:
        Ids (B, T) int64 and mask (B, T) int64 with 1 where a token is, by length and never by id.

    Raises:
        ValueError: if a row is longer than `length`.
    """
    return _pad(rows, pad_id, length, left=False)


def pad_left(rows: Sequence[ArrayLike], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad token lists before their first token.

    Args:
        rows: one list of token ids per row; empty ones are allowed.
        pad_id: id that fills the rest.
        length: width T of the result in tokens; None takes the longest row.

    Returns:
        Ids (B, T) int64 and mask (B, T) int64 with 1 where a token is, by length and never by id.

    Raises:
        ValueError: if a row is longer than `length`.
    """
    return _pad(rows, pad_id, length, left=True)


def _pad(rows: Sequence[ArrayLike], pad_id: int, length: int | None, left: bool) -> tuple[Tensor, Tensor]:
    arrays: list[NDArray[np.int64]] = [np.asarray(row, dtype=np.int64) for row in rows]
    lengths = np.array([array.size for array in arrays], dtype=np.int64)
    width = int(lengths.max(initial=0)) if length is None else length
    if lengths.max(initial=0) > width:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit into the padded length {width}")
    columns = np.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    ids = np.full((len(arrays), width), pad_id, dtype=np.int64)
    if arrays:
        ids[mask] = np.concatenate(arrays)  # row-major order of the mask is the order of the tokens
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
