"""Pairs of a preferred and a rejected answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from datamodules.base import Collator
from datamodules.collate import pad_right
from datamodules.formats import lookup
from datamodules.text import Encoded, RowEncoder, RowFormat, TextData


@dataclass(frozen=True)
class PreferenceRows:
    """Rows to two token lists, prompt + answer + end token, cut at the right.

    Args:
        source: conversion to texts, and the tokenizer.
        max_length: most tokens of a text.
        margin_column: column with the margin of each pair, or None.
    """

    source: RowFormat
    max_length: int
    margin_column: str | None

    dropped = "pairs"

    def __call__(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Encoded]:
        """Encode rows."""
        texts = self.source.texts(rows, numbers, ("chosen", "rejected"))
        sides = [
            self.source.encoder.encode([text.get("prompt", "") + text[side] for text in texts], True, self.max_length)
            for side in ("chosen", "rejected")
        ]
        encoded: list[Encoded] = [{"chosen": ids[0], "rejected": ids[1]} for ids in zip(*sides, strict=True)]
        if self.margin_column is not None:
            for row, number, entry in zip(rows, numbers, encoded, strict=True):
                entry["margin"] = self._margin(row, number, self.margin_column)
        return encoded

    def _margin(self, row: dict[str, Any], number: int, column: str) -> float:
        value = lookup(row, column)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"data.margin_column: column {column!r} of row {number} holds {value!r}, which is no number"
            ) from error


def collate_pairs(rows: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Make a batch of pairs.

    Args:
        rows: encoded rows.
        pad_id: padding id.

    Returns:
        The batch described in `PreferenceData`.
    """
    ids, mask = pad_right([row["chosen"] for row in rows] + [row["rejected"] for row in rows], pad_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if "margin" in rows[0]:
        batch["margin"] = torch.from_numpy(np.array([row["margin"] for row in rows], dtype=np.float32))
    return batch


class PreferenceData(TextData):
    """Pairs of a preferred and a rejected answer, with their prompt and an end-of-sequence token.

    Pairs of two equal answers stay in the data.

    Batch:
        * `input_ids`: (2B, T) int64, right padded; rows 0 to B-1 are the preferred texts, B to 2B-1 the rejected ones
        * `attention_mask`: (2B, T) int64, 1 where a token is
        * `margin`: (B,) float32, only with `margin_column`

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        tokenizer: hub id or folder of the tokenizer.
        prompt_column: column of the prompt; None if the answers are whole texts. A dot reaches into records.
        chosen_column: column of the preferred answer.
        rejected_column: column of the other one.
        margin_column: column with the wanted difference of the two scores; None for none.
        max_length: tokens at which a text is cut.
        options: see `datamodules.text.TextData`.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        prompt_column: str | None = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        margin_column: str | None = None,
        max_length: int = 1024,
        **options: Any,  # noqa: ANN401
    ) -> None:
        self.prompt_column, self.chosen_column, self.rejected_column = prompt_column, chosen_column, rejected_column
        self.margin_column, self.max_length = margin_column, max_length
        super().__init__(path, tokenizer, **options)
        self.save_hyperparameters(logger=False)

    def columns(self) -> dict[str, str]:
        """Prompt, preferred and rejected answer."""
        prompt = {} if self.prompt_column is None else {"prompt": self.prompt_column}
        return {**prompt, "chosen": self.chosen_column, "rejected": self.rejected_column}

    def extra_columns(self) -> dict[str, str]:
        """The margin."""
        return {} if self.margin_column is None else {"data.margin_column": self.margin_column}

    def row_encoder(self, source: RowFormat) -> RowEncoder:
        """Tokenise pairs."""
        return PreferenceRows(source, self.max_length, self.margin_column)

    def collator(self) -> Collator:
        """Stack and pad on the right."""
        return partial(collate_pairs, pad_id=self.pad_id)
