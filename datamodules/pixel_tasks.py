"""Labelled texts as strips of pixels, as tokens, or as both: classification, regression and tagging."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.assets import asset_path
from datamodules.base import Split
from datamodules.formats import lookup
from datamodules.pixel_collate import IGNORED, Item
from datamodules.pixels import PixelData, TokenEncoder, snippet_rows
from datamodules.rendering.base import Renderer
from datamodules.sources import Rows, chunks, load_rows, require_columns

Perturb: TypeAlias = Callable[[str, random.Random], str]
Input: TypeAlias = Literal["pixel", "text", "pair"]
Kind: TypeAlias = Literal["classification", "regression"]
GlueTask: TypeAlias = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]

_GLUE_SPACES = (
    *((f" {mark}", mark) for mark in (",", ".", "!", "?", "#", "/")),
    *((old, mark) for mark in ('"', "'") for old in (f" {mark}", f"{mark} ")),
    (" n't", "n't"),
    ("( ", "("),
    (" )", ")"),
    ("[ ", "["),
    (" ]", "]"),
)
"""Replacements of PIXEL's clean-up (xplip/pixel), in their order."""


def glue_clean(text: str) -> str:
    """Remove the spaces that tokenised corpora have around punctuation, as PIXEL does before it draws GLUE.

    Args:
        text: a sentence.

    Returns:
        The sentence without them.
    """
    for old, new in _GLUE_SPACES:
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class TaskMaker:
    """Texts of a row to an item.

    Args:
        renderer: draws; None where only tokens are wanted.
        encoder: tokenises; None where only pixels are wanted.
        max_tokens: most tokens of an item.
        clean: function applied to texts before they are drawn, e.g. `glue_clean`.
        perturb: function applied to texts before they are drawn and tokenised.
        seed: seed of the perturbation.
    """

    renderer: Renderer | None
    encoder: TokenEncoder | None
    max_tokens: int
    clean: Callable[[str], str] | None
    perturb: Perturb | None
    seed: int

    def __call__(self, texts: Sequence[tuple[str, ...]], numbers: Sequence[int]) -> list[Item]:
        """Make items.

        Args:
            texts: one or two texts per row.
            numbers: row numbers; a row is perturbed alike in every batch.

        Returns:
            One item per row.
        """
        if self.perturb is not None:
            texts = [self._perturbed(row, number) for row, number in zip(texts, numbers, strict=True)]
        items: list[Item] = [{} for _ in texts] if self.renderer is None else [self._draw(row) for row in texts]
        if self.encoder is not None:
            for item, ids in zip(items, self._tokens(texts), strict=True):
                item["ids"] = ids
        return items

    def _perturbed(self, texts: tuple[str, ...], number: int) -> tuple[str, ...]:
        assert self.perturb is not None
        generator = random.Random(f"{self.seed} {number}")
        return tuple(self.perturb(text, generator) for text in texts)

    def _draw(self, texts: tuple[str, ...]) -> Item:
        assert self.renderer is not None
        if self.clean is not None:
            texts = tuple(self.clean(text) for text in texts)
        first, *second = texts
        strip = self.renderer.render_pair(first, second[0]) if second else self.renderer.render(first)
        return {"pixels": strip.trimmed, "num_text_patches": strip.num_text_patches}

    def _tokens(self, texts: Sequence[tuple[str, ...]]) -> list[NDArray[np.int32]]:
        """`<s> a`, or `<s> a <s> b`; of a pair that is too long the longer text is cut, or both."""
        assert self.encoder is not None
        width = len(texts[0])
        parts = self.encoder.encode([text for row in texts for text in row], end=False)
        rows = [parts[start : start + width] for start in range(0, len(parts), width)]
        if width == 1:
            return [row[0][: self.max_tokens] for row in rows]
        return [np.concatenate(_longest_first(first, second, self.max_tokens)) for first, second in rows]


def _longest_first(first: NDArray[Any], second: NDArray[Any], room: int) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(first) + len(second) > room:
        shorter = min(len(first), len(second), room // 2)
        kept = room - shorter if len(first) > len(second) else shorter
        first, second = first[:kept], second[: room - min(kept, len(first))]
    return first, second


class TaskRows(Dataset[Item]):
    """Labelled rows, drawn and tokenised when they are asked for.

    Args:
        rows: data set with a length.
        columns: columns of the texts.
        labels: (n,) labels.
        maker: makes items.
    """

    def __init__(self, rows: Any, columns: Sequence[str], labels: NDArray[Any], maker: TaskMaker) -> None:  # noqa: ANN401
        self.rows, self.columns, self.labels, self.maker = rows, tuple(columns), labels, maker

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        """One item."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Items of a batch; torch's loaders ask so."""
        table = self.rows[list(indices)]
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        texts = [tuple(lookup(row, column) for column in self.columns) for row in rows]
        items = self.maker(texts, indices)
        for item, index in zip(items, indices, strict=True):
            item["label"] = self.labels[index]
        return items


class PixelTask(PixelData):
    """Labelled texts or pairs of texts.

    Every row is drawn anew at the renderer's `max_seq_length`, so a pair that is too long keeps both texts and both
    separators. Prediction needs no labels; rows without one have -1, or nan in a regression.

    Batch:
        * `pixel_values`: (B, C, H, W) uint8, ground 255, ink 0; W = L*p, right padded with white
        * `pixel_mask`: (B, L) int64, 1 at the patches of the text and at the separator behind it
        * `num_text_patches`: (B,) int64, patches before the last separator
        * `input_ids`: (B, T) int64, `<s> a`, or `<s> a <s> b`; right padded
        * `attention_mask`: (B, T) int64, 1 where a token is
        * `label`: (B,) int64 class, or float32 in a regression

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None where `input` is `pixel`.
        input: `pixel`, `text` (tokens) or `pair` (both).
        text_column: column of the (first) text.
        second_column: column of the second text; None if there is one.
        label_column: column of the label.
        task: `classification` or `regression`.
        labels: names of the classes in their order; None takes those that the data set declares. Labels may be
            numbers or these names.
        clean_up: remove the spaces around punctuation before drawing, see `glue_clean`; tokens keep them.
        perturb: function from a text and a `random.Random` to a noisy text, applied to the rows of validation, test and
            prediction; each row is changed alike every time.
        empty_text: `error` refuses rows with an empty text, `keep` draws a blank patch.
        options: see `datamodules.pixels.PixelData`. `val_split` and `test_split` may be lists; each has a loader.
    """

    def __init__(
        self,
        path: str,
        renderer: Renderer,
        tokenizer: str | None = None,
        input: Input = "pixel",
        text_column: str = "text",
        second_column: str | None = None,
        label_column: str = "label",
        task: Kind = "classification",
        labels: list[str] | None = None,
        clean_up: bool = False,
        perturb: Perturb | None = None,
        empty_text: Literal["error", "keep"] = "error",
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, renderer, tokenizer, **options)
        if task == "regression" and labels is not None:
            raise ValueError("data.labels: a regression has no classes; remove them or set data.task to classification")
        self.input, self.task, self.label_column = input, task, label_column
        self.columns = [text_column] if second_column is None else [text_column, second_column]
        self.labels = labels
        self.clean_up, self.perturb, self.empty_text = clean_up, perturb, empty_text
        self.encoder = None if input == "pixel" else self.token_encoder(f"data.input={input}")
        self.save_hyperparameters(ignore=["renderer", "perturb"], logger=False)

    def dataset(self, rows: Rows, split: Split) -> TaskRows:
        """Check texts and labels.

        Args:
            rows: the rows.
            split: what they are for.

        Returns:
            The items.

        Raises:
            ValueError: if a column is missing, or a text or label cannot be used.
        """
        keys = ["data.text_column", "data.second_column"]
        require_columns(rows, dict(zip(keys, self.columns, strict=False)))
        unlabelled = split == "predict" and self.label_column not in rows.column_names
        if not unlabelled:
            require_columns(rows, {"data.label_column": self.label_column})
        if not len(rows):
            raise ValueError(f"data: the {split} split {self.split_names[split]!r} is empty")
        self._check_texts(rows)
        missing = -1 if self.task == "classification" else math.nan
        values = [missing] * len(rows) if unlabelled else list(rows[self.label_column])
        labels = self._checked_labels(values, rows, optional=split == "predict")
        return TaskRows(self._texts(rows), self.columns, labels, self.maker(split))

    def maker(self, split: Split) -> TaskMaker:
        """Function from texts to items.

        Args:
            split: what they are for.
        """
        return TaskMaker(
            None if self.input == "text" else self.renderer,
            self.encoder,
            self.max_tokens,
            glue_clean if self.clean_up else None,
            None if split == "train" else self.perturb,
            self.seed,
        )

    def _texts(self, rows: Any) -> Any:  # noqa: ANN401
        return rows.select_columns(sorted({column.partition(".")[0] for column in self.columns}))

    def _check_texts(self, rows: Any) -> None:  # noqa: ANN401
        number = 0
        for chunk in chunks(self._texts(rows)):
            for row in chunk:
                for key, column in zip(("text", "second"), self.columns, strict=False):
                    text = lookup(row, column)
                    if not isinstance(text, str):
                        raise ValueError(
                            f"data.{key}_column: column {column!r} of row {number} holds {text!r} instead of text"
                        )
                    if self.empty_text == "error" and not text.strip():
                        raise ValueError(
                            f"data.{key}_column: column {column!r} of row {number} is empty; remove the row or set "
                            "data.empty_text to keep"
                        )
                number += 1

    def _checked_labels(self, values: list[Any], rows: Any, optional: bool) -> NDArray[Any]:  # noqa: ANN401
        where = f"data.label_column: column {self.label_column!r}"
        if self.task == "regression":
            for number, value in enumerate(values):
                if not optional and (not isinstance(value, (int, float)) or not math.isfinite(value)):
                    raise ValueError(f"{where} of row {number} holds {value!r}, which is no number to learn")
            return np.array([math.nan if value is None else value for value in values], dtype=np.float32)
        names = self.labels or getattr(rows.features.get(self.label_column), "names", None)
        if names is None and any(isinstance(value, str) for value in values):
            raise ValueError(
                f"data.labels: column {self.label_column!r} holds names of classes; list them in their order"
            )
        indices = {name: number for number, name in enumerate(names or [])}
        found = np.array([_class(value, indices) for value in values], dtype=np.int64)
        limit = len(names) if names else np.iinfo(np.int64).max
        wrong = np.flatnonzero((found < 0) | (found >= limit))
        if wrong.size and not optional:
            number = int(wrong[0])
            known = f"one of the {limit} classes {', '.join(names)}" if names else "a class number from 0"
            raise ValueError(
                f"{where} of row {number} holds {values[number]!r}, which is not {known}; set data.labels, or choose a "
                "split whose labels are public"
            )
        return np.where((found < 0) | (found >= limit), -1, found)


def _class(value: Any, indices: Mapping[str, int]) -> int:  # noqa: ANN401
    """Number of a class given as number or name; -1 if it is neither."""
    if isinstance(value, str):
        return indices.get(value, -1)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and value >= 0 else -1


# -- known data sets -----------------------------------------------------------------------------------------------


class Glue(PixelTask):
    """A task of the GLUE benchmark (`nyu-mll/glue`), cleaned up and drawn as in PIXEL.

    The labels of the test sets are not public: validation and test both use the validation set (of MNLI two, matched
    and mismatched, each with a loader of its own). For a submission, set `test_split` to `test` and predict.

    Paper: https://arxiv.org/abs/1804.07461. Batch: see `PixelTask`.

    Args:
        task: name of the task.
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None where `input` is `pixel`.
        input: `pixel`, `text` (tokens) or `pair` (both).
        path: hub id, or folder with files of the same columns (`train.jsonl`, `validation.jsonl`, ...).
        data_files: split -> file or files, for folders with other names and for MNLI with its two validation sets.
        val_split: validation split, or several; None takes that of the task.
        test_split: test split, or several; None takes that of validation.
        clean_up: remove the spaces around punctuation before drawing.
        perturb: see `PixelTask`.
        pad_token: token used as padding where the tokenizer has none of its own.
        max_tokens: tokens at which a row is cut; None takes the renderer's `max_seq_length`.
        limit_train: use only the first training rows.
        limit_val: use only the first rows of each validation split.
        pad_to: strips are padded to the longest one of their batch, rounded up to a multiple of so many patches.
        pad_to_max: pad all strips to the renderer's `max_seq_length`.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead and draw, per rank and loader.
        seed: seed of the order of the rows.
    """

    COLUMNS: ClassVar[dict[str, tuple[str, str | None]]] = {
        "cola": ("sentence", None),
        "mnli": ("premise", "hypothesis"),
        "mrpc": ("sentence1", "sentence2"),
        "qnli": ("question", "sentence"),
        "qqp": ("question1", "question2"),
        "rte": ("sentence1", "sentence2"),
        "sst2": ("sentence", None),
        "stsb": ("sentence1", "sentence2"),
        "wnli": ("sentence1", "sentence2"),
    }
    """Columns of the texts of each task."""
    LABELS: ClassVar[dict[str, list[str] | None]] = {
        "cola": ["unacceptable", "acceptable"],
        "mnli": ["entailment", "neutral", "contradiction"],
        "mrpc": ["not_equivalent", "equivalent"],
        "qnli": ["entailment", "not_entailment"],
        "qqp": ["not_duplicate", "duplicate"],
        "rte": ["entailment", "not_entailment"],
        "sst2": ["negative", "positive"],
        "stsb": None,
        "wnli": ["not_entailment", "entailment"],
    }
    """Classes of each task in the order of the data set; STS-B is a regression from 0 to 5."""

    def __init__(
        self,
        task: GlueTask,
        renderer: Renderer,
        tokenizer: str | None = None,
        input: Input = "pixel",
        path: str = "nyu-mll/glue",
        data_files: dict[str, str | list[str]] | None = None,
        val_split: str | list[str] | None = None,
        test_split: str | list[str] | None = None,
        clean_up: bool = True,
        perturb: Perturb | None = None,
        pad_token: str | None = None,
        max_tokens: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        pad_to: int = 16,
        pad_to_max: bool = False,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        if task not in self.COLUMNS:
            raise ValueError(f"data.task: {task!r} is not one of {', '.join(self.COLUMNS)}")
        dev: str | list[str] = ["validation_matched", "validation_mismatched"] if task == "mnli" else "validation"
        first, second = self.COLUMNS[task]
        super().__init__(
            path,
            renderer,
            tokenizer,
            input,
            first,
            second,
            task="regression" if task == "stsb" else "classification",
            labels=self.LABELS[task],
            clean_up=clean_up,
            perturb=perturb,
            empty_text="keep",  # a few questions of QQP are empty
            name=task if path == "nyu-mll/glue" else None,
            data_files=data_files,
            val_split=val_split or dev,
            test_split=test_split or val_split or dev,
            pad_token=pad_token,
            max_tokens=max_tokens,
            limit_train=limit_train,
            limit_val=limit_val,
            pad_to=pad_to,
            pad_to_max=pad_to_max,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["renderer", "perturb"], logger=False)
        self.loader_names = {
            split: [name.removeprefix("validation_").removeprefix("test_") for name in names]
            for split, names in self.split_names.items()
        }


XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


class Xnli(PixelTask):
    """Natural-language inference in fifteen languages (`facebook/xnli`).

    With `translate_train` the training sets of all languages are joined, and so are their validation sets; otherwise
    training and validation are English. Each language of the test has a loader, see `loader_names`.

    Paper: https://arxiv.org/abs/1809.05053. Batch: see `PixelTask`.

    Args:
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None where `input` is `pixel`.
        input: `pixel`, `text` (tokens) or `pair` (both).
        languages: languages that are tested, and those of training with `translate_train`; None takes all fifteen.
        translate_train: train on translations into all languages instead of English alone.
        path: hub id whose configurations are the languages; or a path with `{language}` in it, such as
            `data/xnli/{language}`, to folders with files of the same columns.
        data_files: split -> file or files, in which `{language}` is replaced as well.
        perturb: see `PixelTask`.
        pad_token: token used as padding where the tokenizer has none of its own.
        max_tokens: tokens at which a row is cut; None takes the renderer's `max_seq_length`.
        limit_train: use only the first training rows of each language.
        limit_val: use only the first validation rows of each language.
        pad_to: strips are padded to the longest one of their batch, rounded up to a multiple of so many patches.
        pad_to_max: pad all strips to the renderer's `max_seq_length`.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead and draw, per rank and loader.
        seed: seed of the order of the rows.
    """

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: str | None = None,
        input: Input = "pixel",
        languages: list[str] | None = None,
        translate_train: bool = False,
        path: str = "facebook/xnli",
        data_files: dict[str, str | list[str]] | None = None,
        perturb: Perturb | None = None,
        pad_token: str | None = None,
        max_tokens: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        pad_to: int = 16,
        pad_to_max: bool = False,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        self.languages = list(XNLI_LANGUAGES if languages is None else languages)
        unknown = [language for language in self.languages if language not in XNLI_LANGUAGES]
        if unknown or not self.languages:
            raise ValueError(
                f"data.languages: {', '.join(map(repr, unknown)) or 'the list is empty'}; choose among "
                f"{', '.join(XNLI_LANGUAGES)}"
            )
        self.translate_train = translate_train
        super().__init__(
            path,
            renderer,
            tokenizer,
            input,
            "premise",
            "hypothesis",
            labels=["entailment", "neutral", "contradiction"],
            perturb=perturb,
            empty_text="keep",
            data_files=data_files,
            val_split="validation",
            test_split="test",
            pad_token=pad_token,
            max_tokens=max_tokens,
            limit_train=limit_train,
            limit_val=limit_val,
            pad_to=pad_to,
            pad_to_max=pad_to_max,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["renderer", "perturb"], logger=False)
        self.loader_names |= {"test": self.languages, "predict": self.languages}

    def prepare_data(self) -> None:
        """Fill the local cache in one process before all others read it."""
        for language in self._trained():
            for split in ("train", "validation"):
                self._language(language, split)
        for language in self.languages:
            self._language(language, "test")

    def build(self, split: Split) -> Any:  # noqa: ANN401
        """Join the languages of training and validation; those of the test stay apart."""
        from datasets import concatenate_datasets

        if split in ("train", "val"):
            name = self.split_names[split][0]
            parts = [self.selected(self._language(language, name), split) for language in self._trained()]
            return self.dataset(concatenate_datasets(parts), split)
        built = [self.dataset(self._language(language, "test"), split) for language in self.languages]
        return built if len(built) > 1 else built[0]

    def _trained(self) -> list[str]:
        return self.languages if self.translate_train else ["en"]

    def _language(self, language: str, split: str) -> Any:  # noqa: ANN401
        def fill(name: str) -> str:
            return name.replace("{language}", language)

        files = None
        if self.data_files is not None:
            files = {
                key: fill(names) if isinstance(names, str) else [fill(name) for name in names]
                for key, names in self.data_files.items()
            }
        name = language if self.path == "facebook/xnli" else None
        rows = load_rows(fill(self.path), split, name, data_files=files)
        columns = ["premise", "hypothesis", "label"]
        require_columns(rows, {f"data.path ({language}, {split})": column for column in columns})
        return rows.select_columns(columns)  # files may declare more, and differ in it


class PixelSnippetRatings(PixelTask):
    """Film-review sentences with what people thought of the film, shipped with the package.

    Splits: see `datamodules.pixels.PixelSnippets`. Batch: see `PixelTask`.

    Args:
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None takes the shipped one.
        input: `pixel`, `text` (tokens) or `pair` (both).
        task: `classification` of the sign of the mean rating (`negative` includes 0, `positive`), or `regression` of
            the mean rating from -4 to 4.
        perturb: see `PixelTask`.
        max_tokens: tokens at which a text is cut.
        limit_train: use only the first training sentences.
        limit_val: use only the first validation sentences.
        pad_to: strips are padded to the longest one of their batch, rounded up to a multiple of so many patches.
        pad_to_max: pad all strips to the renderer's `max_seq_length`.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead and draw, per rank and loader.
        seed: seed of the order of the rows.
    """

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: str | None = None,
        input: Input = "pixel",
        task: Kind = "classification",
        perturb: Perturb | None = None,
        max_tokens: int = 64,
        limit_train: int | None = None,
        limit_val: int | None = None,
        pad_to: int = 16,
        pad_to_max: bool = False,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(
            asset_path("movie_snippets/snippets.tsv.gz"),
            renderer,
            tokenizer or asset_path("movie_snippets/tokenizer"),
            input,
            label_column="label" if task == "classification" else "rating",
            task=task,
            labels=["negative", "positive"] if task == "classification" else None,
            perturb=perturb,
            max_tokens=max_tokens,
            val_split="val",
            test_split="test",
            limit_train=limit_train,
            limit_val=limit_val,
            pad_to=pad_to,
            pad_to_max=pad_to_max,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["renderer", "perturb"], logger=False)

    def rows(self, split: str, streaming: bool = False) -> Rows:
        """The shipped sentences with `rating` and `label`.

        Args:
            split: `train`, `val` or `test`.
            streaming: not used.
        """
        rows: Any = snippet_rows(split)
        return rows.add_column("label", [int(rating > 0) for rating in rows["rating"]])


# -- tagging -------------------------------------------------------------------------------------------------------


class TaggedRows(Dataset[Item]):
    """Tagged words, drawn when they are asked for.

    Args:
        rows: data set with a length.
        column: column of the words.
        tags: tags of every row.
        renderer: draws.
        word_patch: see `PixelTagging`.
    """

    def __init__(
        self,
        rows: Any,  # noqa: ANN401
        column: str,
        tags: Sequence[NDArray[np.int64]],
        renderer: Renderer,
        word_patch: Literal["first", "last"],
    ) -> None:
        self.rows, self.column, self.tags = rows, column, tags
        self.renderer, self.word_patch = renderer, word_patch

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tags)

    def __getitem__(self, index: int) -> Item:
        """One item."""
        strip = self.renderer.render_words(self.rows[int(index)][self.column])
        assert strip.word_starts is not None
        starts = np.array(strip.word_starts, dtype=np.int64)
        patches = starts[:-1]
        if self.word_patch == "last":
            patches = np.maximum(starts[1:] - 1, patches)  # a word without any width shares its patch
        return {
            "pixels": strip.trimmed,
            "num_text_patches": strip.num_text_patches,
            "word_patches": patches,
            "tags": self.tags[index][: patches.size],
        }


class PixelTagging(PixelData):
    """Words with tags, each word drawn from the beginning of a patch.

    Words behind the end of the strip are left out, with their tags.

    Batch:
        * `pixel_values`: (B, C, H, W) uint8, ground 255, ink 0; W = L*p, right padded with white
        * `pixel_mask`: (B, L) int64, 1 at the patches of the words and at the separator behind them
        * `num_text_patches`: (B,) int64, patches before the separator
        * `word_patches`: (B, N) int64, the patch at which the tag of each word is read; 0 at padding
        * `tags`: (B, N) int64, or -100 at padding and where a word has no tag

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        renderer: draws the words.
        words_column: column of the lists of words.
        tags_column: column of the lists of tags, as many as words.
        tags: names of the tags in their order; None takes those that the data set declares. Tags may be numbers or
            these names; -100 and `_` are no tag.
        word_patch: `last` reads a word where a causal model has seen all of it; `first` is what PIXEL does.
        options: see `datamodules.pixels.PixelData`.
    """

    def __init__(
        self,
        path: str,
        renderer: Renderer,
        words_column: str = "words",
        tags_column: str = "tags",
        tags: list[str] | None = None,
        word_patch: Literal["first", "last"] = "last",
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, renderer, **options)
        self.words_column, self.tags_column, self.tags = words_column, tags_column, tags
        self.word_patch: Literal["first", "last"] = word_patch
        self.save_hyperparameters(ignore=["renderer"], logger=False)

    def dataset(self, rows: Rows, split: Split) -> TaggedRows:
        """Check words and tags.

        Args:
            rows: the rows.
            split: what they are for.

        Returns:
            The items.

        Raises:
            ValueError: if a column is missing, or words or tags cannot be used.
        """
        require_columns(rows, {"data.words_column": self.words_column, "data.tags_column": self.tags_column})
        names = self.tags or _declared_tags(rows.features[self.tags_column])
        indices = {name: number for number, name in enumerate(names or [])} | {"_": IGNORED}
        tags: list[NDArray[np.int64]] = []
        for chunk in chunks(rows.select_columns([self.words_column, self.tags_column])):
            for row in chunk:
                tags.append(self._checked(row[self.words_column], row[self.tags_column], len(tags), names, indices))
        if not tags:
            raise ValueError(f"data: the {split} split {self.split_names[split]!r} is empty")
        return TaggedRows(rows, self.words_column, tags, self.renderer, self.word_patch)

    def _checked(
        self,
        words: Any,  # noqa: ANN401
        tags: Any,  # noqa: ANN401
        number: int,
        names: list[str] | None,
        indices: Mapping[str, int],
    ) -> NDArray[np.int64]:
        if not words or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"data.words_column: column {self.words_column!r} of row {number} holds {words!r:.60} instead of a "
                "list of words"
            )
        where = f"data.tags_column: column {self.tags_column!r} of row {number}"
        if not isinstance(tags, (list, tuple)) or len(tags) != len(words):
            raise ValueError(f"{where} holds {tags!r:.60}, which is not one tag for each of the {len(words)} words")
        if names is None and any(isinstance(tag, str) and tag != "_" for tag in tags):
            raise ValueError(f"data.tags: column {self.tags_column!r} holds names of tags; list them in their order")
        limit = len(names) if names else np.iinfo(np.int64).max
        found = [indices.get(tag, -1) if isinstance(tag, str) else tag for tag in tags]
        for tag, original in zip(found, tags, strict=True):
            if tag != IGNORED and (not isinstance(tag, int) or not 0 <= tag < limit):
                known = f"one of the {limit} tags {', '.join(names)}" if names else "a tag number from 0"
                raise ValueError(f"{where} holds {original!r}, which is not {known}; set data.tags")
        return np.array(found, dtype=np.int64)


def _declared_tags(feature: Any) -> list[str] | None:  # noqa: ANN401
    return getattr(getattr(feature, "feature", None), "names", None)
