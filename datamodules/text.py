"""What all data modules of tokenised text share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.base import LitData, Split
from datamodules.encoding import Encoder
from datamodules.formats import COLUMNS, Format, FormatName, Texts, lookup, make_format
from datamodules.sources import Rows, chunks, load_rows, require_columns
from datamodules.splits import stage_indices
from datamodules.streams import Shares, StreamedBatches, StreamedRows
from lit_models.tokenization import load_tokenizer

Encoded: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """Conversion of raw rows to checked texts, with all that names their origin in errors.

    Args:
        convert: function from a row to its texts.
        encoder: the tokenizer.
        columns: field -> column.
        name: name of the format.
        keep_columns: columns passed on with their raw values.
    """

    convert: Format
    encoder: Encoder
    columns: Mapping[str, str]
    name: FormatName
    keep_columns: Sequence[str]

    def texts(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], full: Sequence[str]) -> list[Texts]:
        """Format rows.

        Args:
            rows: raw rows.
            numbers: their positions in the split.
            full: fields that must not be empty.

        Returns:
            Field -> text of every row.

        Raises:
            ValueError: if a field is no text, or empty although it must not be.
        """
        converted = [self.convert(row) for row in rows]
        for number, fields in zip(numbers, converted, strict=True):
            for field, text in fields.items():
                if not isinstance(text, str):
                    raise ValueError(f"{self.origin(field)} of row {number} holds {text!r} instead of text")
                if field in full and not text:
                    raise ValueError(f"{self.origin(field)} of row {number} is empty; remove the row")
        return converted

    def origin(self, field: str) -> str:
        """Configuration key and column behind a field."""
        if self.name in COLUMNS:
            return f"data.format: {self.name}: the {field} text"
        return f"data.{field}_column: column {self.columns.get(field)!r}"

    def kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Raw values that are passed on."""
        return {column: lookup(row, column) for column in self.keep_columns}


class RowEncoder(Protocol):
    """Function from raw rows and their positions in the split to encoded rows, without those that cannot be used."""

    @property
    def dropped(self) -> str:
        """Why rows are left out, as words after "dropped n of m"."""
        ...

    def __call__(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[Encoded]:
        """Format and tokenise rows."""
        ...


class TextData(LitData):
    """Rows from a hub or from files, formatted and tokenised.

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        tokenizer: hub id or folder of the tokenizer.
        name: configuration of the data set.
        data_files: split -> file or files, for folders with several.
        pad_token: token used as padding where the tokenizer has none of its own.
        format: `plain` reads the columns named in the configuration, through the templates if given; `chat` puts them
            through the tokenizer's chat template; `tldr`, `hh`, `webgpt`, `ultrafeedback` and `apps` read the data
            sets of these names in the papers' layout.
        prompt_template: format string over a row's columns, e.g. `Human: {question} Assistant:`.
        response_template: format string over a row's columns and `{response}`, e.g. ` {response}`.
        train_split: training split or slice, e.g. `train[:95%]`.
        val_split: validation split or slice; None validates nothing.
        test_split: test split or slice; None tests nothing. Prediction uses it, or else the validation split.
        val_fraction: share of `train_split` that a shuffle with the seed holds out for validation, instead of a
            `val_split`.
        stage_fractions: shares of the stages of a pipeline; the training and validation rows are divided among them.
        stage: number of this stage, from 0.
        limit_train: use only the first rows of the training split (of this stage).
        limit_val: use only the first rows of the validation split (of this stage).
        streaming: read and tokenise rows while training instead of before; see `datamodules.streams.StreamedRows`.
        shuffle_buffer: when streaming, training rows among which the next one is drawn; 0 keeps their order.
        stream_shares: when streaming on several ranks, what each of them takes: its part of every global batch
            (`batches`), or its part of the source (`sources`), which is cheaper for many ranks, but makes the batches
            depend on their number; see `datamodules.streams.StreamedRows`.
        keep_columns: columns whose raw values are passed on with each row (where the batch has room for them).
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows and of the division among stages.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        name: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        pad_token: str | None = None,
        format: FormatName = "plain",
        prompt_template: str | None = None,
        response_template: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float | None = None,
        stage_fractions: list[float] | None = None,
        stage: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        stream_shares: Shares = "batches",
        keep_columns: list[str] | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed)
        for key, value in (("stage_fractions", stage_fractions), ("val_fraction", val_fraction)):
            if streaming and value is not None:
                raise ValueError(f"data.{key}: a stream has no length to divide; set data.streaming to false")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        if val_fraction is not None and val_split is not None:
            raise ValueError("data.val_fraction and data.val_split both say what to validate on; remove one of them")
        self.path, self.name, self.data_files = path, name, data_files
        self.tokenizer = load_tokenizer(tokenizer, pad_token)
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.format_name: FormatName = format
        self.prompt_template, self.response_template = prompt_template, response_template
        self.val_fraction = val_fraction
        if val_fraction is not None:
            val_split = train_split
        self.split_names: dict[Split, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
            "predict": test_split or val_split,
        }
        self.stage_fractions, self.stage = stage_fractions, stage
        self.limits: dict[Split, int | None] = {"train": limit_train, "val": limit_val}
        self.streaming, self.shuffle_buffer, self.stream_shares = streaming, shuffle_buffer, stream_shares
        self.keep_columns = list(keep_columns or [])

    def columns(self) -> dict[str, str]:
        """Fields of the formatted row (`prompt`, `chosen`, ...) and the columns that the user named for them."""
        raise NotImplementedError

    def extra_columns(self) -> dict[str, str]:
        """Configuration key -> column of further columns that must exist."""
        return {}

    def row_encoder(self, source: "RowFormat") -> "RowEncoder":
        """Function that tokenises rows; it travels to worker processes, so it must not hold the data module.

        Args:
            source: conversion of rows to texts, and the tokenizer.

        Returns:
            The function.
        """
        raise NotImplementedError

    def rows(self, split: str) -> Rows:
        """Open a split of the source; subclasses with data of their own override this.

        Args:
            split: name or slice.

        Returns:
            The rows.
        """
        return load_rows(self.path, split, self.name, self.streaming, self.data_files)

    def prepare_data(self) -> None:
        """Fill the local cache in one process before all others read it."""
        if not self.streaming:
            for split in {name for name in self.split_names.values() if name is not None}:
                self.rows(split)

    def build(self, split: Split) -> Any:  # noqa: ANN401
        """Build the encoded rows of one split: a list, or a stream.

        Args:
            split: which one.

        Returns:
            The rows, or None if the user asked for none.

        Raises:
            ValueError: if a column is missing or no row can be used.
        """
        name = self.split_names[split]
        if name is None:
            return None
        rows = self._hold_out(self.rows(name), split)
        require_columns(rows, self._required())
        return self._stream(rows, split) if self.streaming else self._encode_all(rows, split)

    def _hold_out(self, rows: Any, split: Split) -> Any:  # noqa: ANN401
        """The part of the training rows that a split may see, where `val_fraction` divides them."""
        if self.val_fraction is None or (split == "predict" and self.split_names["test"]) or split == "test":
            return rows
        parts = rows.train_test_split(self.val_fraction, seed=self.seed)
        return parts["train" if split == "train" else "test"]

    def _required(self) -> dict[str, str]:
        """Configuration key -> column."""
        known = COLUMNS.get(self.format_name)
        if known is not None:
            named = {f"data.format={self.format_name} (column {column})": column for column in known}
        else:
            named = {f"data.{field}_column": column for field, column in self.columns().items()}
            if self.prompt_template is not None:
                named.pop("data.prompt_column", None)
        named |= self.extra_columns()
        return named | {f"data.keep_columns[{number}]": column for number, column in enumerate(self.keep_columns)}

    def _encode_all(self, rows: Any, split: Split) -> list[Encoded]:  # noqa: ANN401
        total = len(rows)
        numbers = np.arange(total)
        if self.stage_fractions is not None and split in ("train", "val"):
            numbers = stage_indices(total, self.stage, self.stage_fractions, self.seed).astype(np.int64)
        numbers = numbers[: self.limits.get(split)]
        if numbers.size < total:
            rows = rows.select(numbers.tolist())
        encode = self._encoder()
        encoded: list[Encoded] = []
        first = 0
        for chunk in chunks(rows):
            encoded += encode(chunk, numbers[first : first + len(chunk)].tolist())
            first += len(chunk)
        self._report(numbers.size, len(encoded), split, encode.dropped)
        return encoded

    def _report(self, total: int, kept: int, split: Split, dropped: str) -> None:
        if kept == 0:
            reason = f"dropped {total} of {total} {dropped}" if total else "it is empty"
            raise ValueError(f"data: the {split} split {self.split_names[split]!r} has no usable row; {reason}")
        if kept < total:
            rank_zero_warn(f"dropped {total - kept} of {total} {dropped}")

    def _encoder(self) -> "RowEncoder":
        columns = self.columns()
        convert = make_format(self.format_name, columns, self.tokenizer, self.prompt_template, self.response_template)
        return self.row_encoder(
            RowFormat(convert, Encoder(self.tokenizer), columns, self.format_name, self.keep_columns)
        )

    def _stream(self, rows: Any, split: Split) -> StreamedRows:  # noqa: ANN401
        limit = self.limits.get(split)
        if limit is not None:
            rows = rows.take(limit)
        if split == "train":
            options: dict[str, Any] = {"shuffle_buffer": self.shuffle_buffer, "seed": self.seed}
            return StreamedRows(rows, self._encoder(), self.batch_size, shares=self.stream_shares, **options)
        options = {"drop_last": False, "even": self.even}
        return StreamedBatches(rows, self._encoder(), self.val_batch_size, shares=self.stream_shares, **options)
