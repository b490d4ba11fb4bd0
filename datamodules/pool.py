"""Runs on samples of a pool, to be recorded: every example has an id, and every run draws its own examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.base import Collator
from datamodules.gptdynamics import read_texts
from datamodules.instruction import InstructionData, InstructionRows, collate_texts
from datamodules.sources import Rows
from datamodules.text import Encoded, RowEncoder, RowFormat
from datamodules.trajectories import in_ranges
from lit_models.recording import read_examples


@dataclass(frozen=True)
class PoolRows(InstructionRows):
    """Rows as those of `InstructionData`, with their ids.

    Args:
        source: conversion to texts, and the tokenizer.
        max_length: most tokens of a text.
        loss_on: see `InstructionData`.
        end_token: whether the answer ends with the end token.
    """

    end_token: bool = False

    def __call__(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Encoded]:
        """Encode rows, one by one since some may be left out."""
        encoded: list[Encoded] = []
        for row, number in zip(rows, numbers, strict=True):
            for item in super().__call__([row], [number]):
                ids = item["ids"]
                if not self.end_token and ids[-1] == self.source.encoder.tokenizer.eos_token_id:
                    ids = ids[:-1]
                if item["start"] < len(ids):
                    encoded.append({"ids": ids, "start": item["start"], "input_ids": ids, "id": int(row["id"])})
        return encoded


def collate_pool(rows: Sequence[Encoded], **options: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Make a batch of texts with ids; see `datamodules.instruction.collate_texts`."""
    return collate_texts(rows, **options) | {"id": torch.tensor([row["id"] for row in rows])}


class PoolData(InstructionData):
    """One of several runs over a pool, as recorders of training dynamics want it.

    Every run trains on a sample of the pool, drawn and put in order by its number; the tests are the validation and
    test rows. Files are those of `lit_models.recording.write_examples` (JSON lines with `id`, `text` and `context`, or
    `target`), or the released ones of GPTDynamics (`id`, `input` and `context`).

    Batch: see `InstructionData`, and
        * `id`: (B,) int64, ids of the examples

    Args:
        path: file of the pool.
        tests: file of the tests.
        tokenizer: hub id or folder of the tokenizer.
        run: number of the run; runs of the same number are alike.
        sample: examples that a run draws from every group, none twice, or with `mixture` from all groups together; null
            for all of them.
        groups: groups of the pool, as inclusive ranges of ids such as `[[0, 199], [200, 399]]`; null for one of all.
        mixture: draw with unequal odds for the groups, from a Dirichlet distribution with this concentration, so that
            runs differ more; null for equal ones.
        end_token: learn an end token after the answer.
        max_length: tokens at which a text is cut.
        loss_on: see `InstructionData`.
        pad_token: token used as padding where the tokenizer has none of its own.
        limit_tests: use only the first tests.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of all runs together; the order of the rows depends on it and on `run`.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        path: str,
        tests: str,
        tokenizer: str,
        run: int = 0,
        sample: int | None = 128,
        groups: list[list[int]] | None = None,
        mixture: float | None = None,
        end_token: bool = False,
        max_length: int = 1024,
        loss_on: Any = "completion",  # noqa: ANN401
        pad_token: str | None = None,
        limit_tests: int | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        if run < 0 or (sample is not None and sample < 1) or (mixture is not None and mixture <= 0):
            raise ValueError(
                f"data.run must be at least 0, data.sample at least 1 and data.mixture positive, got {run}, {sample}, "
                f"{mixture}"
            )
        self.tests, self.run, self.sample, self.groups, self.mixture = tests, run, sample, groups, mixture
        self.end_token, self.pool_seed = end_token, seed
        super().__init__(
            path,
            tokenizer,
            prompt_column="context",
            completion_column="target",
            max_length=max_length,
            loss_on=loss_on,
            pad_token=pad_token,
            val_split="tests",
            test_split="tests",
            limit_val=limit_tests,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed + run,
        )
        self.save_hyperparameters(logger=False)

    def rows(self, split: str) -> Rows:
        """The sample of the pool, or all tests."""
        from datasets import Dataset

        rows = read_pool(self.path if split == "train" else self.tests)
        if split == "train":
            rows = [rows[place] for place in self.drawn(np.array([row["id"] for row in rows], np.int64)).tolist()]
        columns = ("id", "context", "target")
        return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})

    def drawn(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw the sample of this run.

        Args:
            ids: (N,) int64, ids of the pool.

        Returns:
            (n,) int64, their places, in ascending order.

        Raises:
            ValueError: if a group has fewer examples than are drawn.
        """
        ranges = [None] if self.groups is None else [[part] for part in self.groups]
        groups = [np.flatnonzero(in_ranges(ids, part, "data.groups")) for part in ranges]
        generator = np.random.default_rng([self.pool_seed, self.run])
        everything = np.concatenate(groups)
        if self.sample is None:
            return np.sort(everything)
        least = min(map(len, groups)) if self.mixture is None else len(everything)
        if self.sample > least:
            raise ValueError(f"data.sample: {self.sample} examples cannot be drawn from {least}; set a smaller number")
        if self.mixture is None:
            return np.sort(np.concatenate([generator.choice(group, self.sample, replace=False) for group in groups]))
        odds = generator.dirichlet([self.mixture] * len(groups))
        weights = np.concatenate(
            [np.full(len(group), share / len(group)) for group, share in zip(groups, odds, strict=True)]
        )
        # Keys of this kind draw without replacement, and never run out where some weights are as good as 0.
        keys = np.log(generator.random(len(everything))) / np.maximum(weights, 1e-300)
        return np.sort(everything[np.argsort(-keys, kind="stable")[: self.sample]])

    def row_encoder(self, source: RowFormat) -> RowEncoder:
        """Tokenise texts, and keep ids."""
        return PoolRows(source, self.max_length, self.loss_on, self.end_token)

    def collator(self) -> Collator:
        """Pad on the right and mark what is learnt."""
        length = self.max_length if self.loss_on == "official" else None
        return partial(collate_pool, pad_id=self.pad_id, length=length, loss_on=self.loss_on)


def read_pool(path: str | Path) -> list[dict[str, Any]]:
    """Read a pool or tests in either form.

    Args:
        path: the file.

    Returns:
        Rows with `id`, `text`, `context` and `target`.

    Raises:
        ValueError: naming the file and the example, if it has no answer, or the text does not end with it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; name one with a line of JSON for every example")
    with Path(path).open("rb") as file:
        first = file.readline()
    try:
        keys = set(json.loads(first))
    except (ValueError, TypeError):
        keys = set()  # the reader says what is wrong
    rows = read_texts(path) if "input" in keys and "text" not in keys else read_examples(path)
    for row in rows:
        text, context, target = row["text"], row.get("context"), row.get("target")
        if context is None and target is not None and text.endswith(target):
            context = text[: len(text) - len(target)]
        if target is None and context is not None and text.startswith(context):
            target = text[len(context) :]
        if not target or context is None:
            raise ValueError(
                f"{path}: example {row['id']} has no answer; add its `context`, the text without it, or its `target`"
            )
        row["context"], row["target"] = context, target
    return rows
