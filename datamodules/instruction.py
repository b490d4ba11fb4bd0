"""Demonstrations for supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from datamodules.base import Collator
from datamodules.collate import pad_right
from datamodules.formats import COLUMNS
from datamodules.text import Encoded, RowEncoder, RowFormat, TextData

LossOn: TypeAlias = Literal["completion", "all", "official"]
IGNORED = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class InstructionRows:
    """Rows to prompt + completion + end token, cut at the right, and the place where the completion begins.

    Args:
        source: conversion to texts, and the tokenizer.
        max_length: most tokens of a text.
        loss_on: see `InstructionData`.
    """

    source: RowFormat
    max_length: int
    loss_on: LossOn

    @property
    def dropped(self) -> str:
        """Why rows are left out."""
        return f"rows whose prompt alone fills data.max_length={self.max_length}"

    def __call__(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Encoded]:
        """Encode rows."""
        field = "chosen" if self.source.name in COLUMNS else "completion"
        texts = self.source.texts(rows, numbers, (field,))
        prompts = [text.get("prompt", "") for text in texts]
        answers = [text[field] for text in texts]
        encoder = self.source.encoder
        if self.loss_on != "completion":
            whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            return [{"ids": ids, "start": 0} for ids in encoder.encode(whole, True, self.max_length)]
        encoded = zip(*encoder.encode_pairs(prompts, answers, self.max_length), strict=True)
        return [{"ids": ids, "start": start} for ids, start in encoded if start < ids.size]


def collate_texts(rows: Sequence[Encoded], pad_id: int, length: int | None, loss_on: LossOn) -> dict[str, torch.Tensor]:
    """Make a batch of texts.

    Args:
        rows: encoded rows.
        pad_id: padding id.
        length: width of the batch in tokens; None takes the longest text.
        loss_on: see `InstructionData`.

    Returns:
        The batch described in `InstructionData`.
    """
    ids, mask = pad_right([row["ids"] for row in rows], pad_id, length)
    labels = ids.clone()
    if loss_on != "official":
        starts = torch.tensor([row["start"] for row in rows])
        before = torch.arange(ids.shape[1]) < starts[:, None]
        labels[before | (mask == 0)] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class InstructionData(TextData):
    """Prompts with the answers to learn, ended by an end-of-sequence token.

    The known data sets (`format`) give their preferred answer.

    Batch:
        * `input_ids`: (B, T) int64, right padded
        * `attention_mask`: (B, T) int64, 1 where a token is
        * `labels`: (B, T) int64, the ids, or -100 where nothing is learnt

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        tokenizer: hub id or folder of the tokenizer.
        prompt_column: column of the prompt; None if there are only whole texts. A dot reaches into records.
        completion_column: column of the answer, or of the whole text.
        max_length: tokens at which a text is cut.
        loss_on: `completion` learns answer and end token; `all` the prompt too; `official` every position of texts
            padded to `max_length`, padding included (what DeepSpeed-Chat does).
        options: see `datamodules.text.TextData`.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        prompt_column: str | None = "prompt",
        completion_column: str = "completion",
        max_length: int = 1024,
        loss_on: LossOn = "completion",
        **options: Any,  # noqa: ANN401
    ) -> None:
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.max_length, self.loss_on = max_length, loss_on
        super().__init__(path, tokenizer, **options)
        self.save_hyperparameters(logger=False)

    def columns(self) -> dict[str, str]:
        """Prompt and answer."""
        prompt = {} if self.prompt_column is None else {"prompt": self.prompt_column}
        return {**prompt, "completion": self.completion_column}

    def row_encoder(self, source: RowFormat) -> RowEncoder:
        """Tokenise texts."""
        return InstructionRows(source, self.max_length, self.loss_on)

    def collator(self) -> Collator:
        """Pad on the right and mark what is learnt."""
        length = self.max_length if self.loss_on == "official" else None
        return partial(collate_texts, pad_id=self.pad_id, length=length, loss_on=self.loss_on)
