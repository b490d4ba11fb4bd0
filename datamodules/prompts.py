"""Prompts for generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from datamodules.base import Collator
from datamodules.collate import pad_left
from datamodules.text import Encoded, RowEncoder, RowFormat, TextData


@dataclass(frozen=True)
class PromptRows:
    """Rows to prompts; those that are too long are left out, never cut.

    Args:
        source: conversion to texts, and the tokenizer.
        max_length: most tokens of a prompt.
        first_tokens: take only so many tokens of the text (besides the beginning token); None takes all.
    """

    source: RowFormat
    max_length: int
    first_tokens: int | None

    @property
    def dropped(self) -> str:
        """Why rows are left out."""
        return f"prompts longer than data.max_prompt_length={self.max_length}"

    def __call__(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Encoded]:
        """Encode rows."""
        source = self.source
        texts = [fields["prompt"] for fields in source.texts(rows, numbers, ())]
        length = None if self.first_tokens is None else self.first_tokens + len(source.encoder.prefix)
        encoded = []
        for row, number, ids in zip(rows, numbers, source.encoder.encode(texts, False, length), strict=True):
            if ids.size == 0:
                raise ValueError(
                    f"{source.origin('prompt')} of row {number} is empty and the tokenizer adds no beginning token, so "
                    "there is nothing to generate from; remove the row or give data.prompt_template"
                )
            if ids.size <= self.max_length:
                encoded.append({"ids": ids, "index": number, "columns": source.kept(row)})
        return encoded


def collate_prompts(rows: Sequence[Encoded], pad_id: int, length: int | None, columns: Sequence[str]) -> dict[str, Any]:
    """Make a batch of prompts.

    Args:
        rows: encoded rows.
        pad_id: padding id.
        length: width of the batch in tokens; None takes the longest prompt.
        columns: names of the columns that are passed on.

    Returns:
        The batch described in `PromptData`.
    """
    ids, mask = pad_left([row["ids"] for row in rows], pad_id, length)
    return {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "index": torch.from_numpy(np.array([row["index"] for row in rows], dtype=np.int64)),
        "columns": {column: [row["columns"][column] for row in rows] for column in columns},
    }


class PromptData(TextData):
    """Prompts, left padded; longer ones than `max_prompt_length` are left out.

    Batch:
        * `prompt_ids`: (B, P) int64, left padded to the longest prompt of the batch
        * `prompt_mask`: (B, P) int64, 1 where a token is
        * `index`: (B,) int64, position in the split (when streaming, in the stream that the rank reads)
        * `columns`: dict of lists, raw values of `keep_columns`

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        tokenizer: hub id or folder of the tokenizer.
        prompt_column: column of the prompt; a dot reaches into records (`question.text`).
        max_prompt_length: most tokens of a prompt.
        pad_to_max: pad every batch to `max_prompt_length` tokens.
        prompt_tokens: use only the first tokens of the text as prompt, so many of them (the beginning token, where the
            tokenizer adds one, comes on top); None uses all.
        options: see `datamodules.text.TextData`.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        prompt_column: str = "prompt",
        max_prompt_length: int = 512,
        pad_to_max: bool = False,
        prompt_tokens: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        self.prompt_column = prompt_column
        self.max_prompt_length, self.pad_to_max, self.prompt_tokens = max_prompt_length, pad_to_max, prompt_tokens
        super().__init__(path, tokenizer, **options)
        self.save_hyperparameters(logger=False)

    def columns(self) -> dict[str, str]:
        """The prompt."""
        return {"prompt": self.prompt_column}

    def row_encoder(self, source: RowFormat) -> RowEncoder:
        """Tokenise prompts."""
        return PromptRows(source, self.max_prompt_length, self.prompt_tokens)

    def collator(self) -> Collator:
        """Pad on the left."""
        length = self.max_prompt_length if self.pad_to_max else None
        return partial(collate_prompts, pad_id=self.pad_id, length=length, columns=self.keep_columns)
