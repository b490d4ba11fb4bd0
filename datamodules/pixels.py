"""Texts as strips of pixels, as tokens, or as both, for pre-training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from datamodules.assets import asset_path
from datamodules.base import LitData, Split
from datamodules.encoding import Encoder
from datamodules.formats import lookup
from datamodules.loaders import EvaluationLoader, ResumableLoader, evaluation_loader, train_loader
from datamodules.mixture import EvaluationBatches, Index, Mixture, MixtureSampler, Mode, check_modes
from datamodules.packing import Block, BlockBuilder, document_ids, greedy_starts
from datamodules.pixel_collate import Item, PixelCollator, StripLayout
from datamodules.prerender import COUNT, decode_strip, differing_keys, image_column, stored_fingerprint
from datamodules.rendering.base import Pixels, Renderer
from datamodules.snippets import load_snippets
from datamodules.sources import Rows, TextUnit, chunks, load_rows, require_columns
from datamodules.streams import Shares, StreamedRows
from lit_models.tokenization import load_tokenizer

Document: TypeAlias = dict[str, Any]
Splits: TypeAlias = str | list[str] | None
SNIPPET_VALIDATION = 500
"""Shipped training sentences that are kept for validation."""


class TokenEncoder(Encoder):
    """Text to ids that always begin with the beginning token.

    Args:
        tokenizer: fast tokenizer with beginning and end tokens.

    Raises:
        ValueError: if it has no beginning token.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        super().__init__(tokenizer)
        if tokenizer.bos_token_id is None:
            raise ValueError(
                f"data.tokenizer: {tokenizer.name_or_path!r} has no beginning token, with which all texts begin; set "
                "bos_token in its tokenizer_config.json"
            )
        self.prefix = [tokenizer.bos_token_id]


class PixelData(LitData):
    """What all data modules of strips share: the source, the renderer, and its fingerprint in checkpoints.

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None where there are only pixels.
        name: configuration of the data set.
        data_files: split -> file or files, for folders with several.
        text_unit: what a row is in plain text files.
        pad_token: token used as padding where the tokenizer has none of its own.
        max_tokens: tokens at which a text is cut; None takes the renderer's `max_seq_length`.
        train_split: training split or slice, e.g. `train[:95%]`.
        val_split: validation split or slice; None validates nothing.
        test_split: test split or slice; None tests nothing.
        val_fraction: share of `train_split` that a shuffle with the seed holds out for validation, instead of a
            `val_split`.
        limit_train: use only the first rows of the training split.
        limit_val: use only the first rows of each validation split.
        pad_to: strips are padded to the longest one of their batch, rounded up to a multiple of so many patches.
        pad_to_max: pad all strips to the renderer's `max_seq_length`.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead and draw, per rank and loader.
        seed: seed of the order of the rows.
    """

    loader_names: dict[Split, list[str]]
    """Names of the loaders of each split, where there are several (e.g. the languages of a test)."""

    def __init__(
        self,
        path: str,
        renderer: Renderer,
        tokenizer: str | None = None,
        name: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        text_unit: TextUnit = "line",
        pad_token: str | None = None,
        max_tokens: int | None = None,
        train_split: str = "train",
        val_split: str | list[str] | None = None,
        test_split: str | list[str] | None = None,
        val_fraction: float | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        pad_to: int = 16,
        pad_to_max: bool = False,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}")
        if val_fraction is not None and val_split is not None:
            raise ValueError("data.val_fraction and data.val_split both say what to validate on; remove one of them")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"data.max_tokens: {max_tokens} must be at least 1")
        self.path, self.name, self.data_files, self.text_unit = path, name, data_files, text_unit
        self.renderer = renderer
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer, pad_token)
        self.max_tokens = max_tokens or renderer.max_seq_length
        self.val_fraction = val_fraction
        held_out: Splits = val_split if val_fraction is None else train_split
        self.split_names: dict[Split, list[str]] = {
            "train": _names(train_split),
            "val": _names(held_out),
            "test": _names(test_split),
            "predict": _names(test_split or held_out),
        }
        self.loader_names = dict(self.split_names)
        self.limits: dict[Split, int | None] = {"train": limit_train, "val": limit_val}
        self.layout = StripLayout.of(renderer, pad_to, pad_to_max)

    def rows(self, split: str, streaming: bool = False) -> Rows:
        """Open a split of the source; subclasses with data of their own override this.

        Args:
            split: name or slice.
            streaming: read rows when they are needed.

        Returns:
            The rows.
        """
        return load_rows(self.path, split, self.name, streaming, self.data_files, self.text_unit)

    def prepare_data(self) -> None:
        """Fill the local cache in one process before all others read it."""
        for split in {name for names in self.split_names.values() for name in names}:
            self.rows(split)

    def dataset(self, rows: Rows, split: Split) -> Any:  # noqa: ANN401
        """Build the data set of some rows.

        Args:
            rows: the rows of a split, already limited.
            split: what they are for.

        Returns:
            The data set.

        Raises:
            ValueError: if the rows cannot be used.
        """
        raise NotImplementedError

    def build(self, split: Split) -> Any:  # noqa: ANN401
        """Build the data sets of one split.

        Args:
            split: which one.

        Returns:
            A data set, a list if the split has several, or None if the user asked for none.
        """
        built = [self.dataset(self.selected(self.rows(name), split), split) for name in self.split_names[split]]
        return built if len(built) > 1 else next(iter(built), None)

    def selected(self, rows: Any, split: Split) -> Any:  # noqa: ANN401
        """The rows that a split may see: without those held out for validation, and no more than the limit.

        Args:
            rows: all rows.
            split: which split.
        """
        if self.val_fraction is not None and split != "test" and not (split == "predict" and self.split_names["test"]):
            parts = rows.train_test_split(self.val_fraction, seed=self.seed)
            rows = parts["train" if split == "train" else "test"]
        limit = self.limits.get(split)
        return rows if limit is None or limit >= len(rows) else rows.select(range(limit))

    def token_encoder(self, key: str) -> TokenEncoder:
        """Encoder of the tokenizer.

        Args:
            key: configuration key that makes tokens necessary.

        Raises:
            ValueError: if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"data.tokenizer: {key} asks for tokens; set it to a hub id or folder of a tokenizer")
        return TokenEncoder(self.tokenizer)

    def collator(self, learn: bool = False) -> PixelCollator:
        """Pad strips and tokens on the right.

        Args:
            learn: give token labels.
        """
        pad_id = 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)
        return PixelCollator(self.layout, pad_id, learn)

    def state_dict(self) -> dict[str, Any]:
        """Fingerprint of the renderer."""
        return {"renderer": self.renderer.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the renderer with that of a checkpoint.

        Args:
            state_dict: what `state_dict` gave.

        Warns:
            UserWarning: if they draw differently.
        """
        self._compare(state_dict.get("renderer"), "the checkpoint was trained on strips")

    def _compare(self, stored: Mapping[str, str] | None, origin: str) -> None:
        own = self.renderer.fingerprint()
        if stored is not None and (keys := differing_keys(stored, own)):
            changes = ", ".join(f"{key} ({stored.get(key)!s:.40}, now {own.get(key)!s:.40})" for key in keys)
            rank_zero_warn(f"data.renderer: {origin} drawn with other values of {changes}; results may differ")

    def _evaluation(self, split: Split) -> Any:  # noqa: ANN401
        datasets = self._dataset(split)
        if not isinstance(datasets, list):
            return self.evaluation_loader(datasets)
        return [self.evaluation_loader(dataset) for dataset in datasets]

    def evaluation_loader(self, dataset: Any) -> DataLoader[Any]:  # noqa: ANN401
        """Loader of one data set outside training.

        Args:
            dataset: what `dataset` gave.
        """
        options = {"collate_fn": self.collator(), "num_workers": self.num_workers}
        return evaluation_loader(dataset, self.val_batch_size, self.even, **options)


def _names(splits: Splits) -> list[str]:
    return [] if splits is None else [splits] if isinstance(splits, str) else list(splits)


# -- documents -----------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Function from raw rows and their numbers to documents, each of which fits onto one strip."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Document]:
        """Documents of some rows: `text`, `patches`, and `image` and `num_patches` if they are drawn already."""
        ...


@dataclass(frozen=True)
class TextReader:
    """Rows of plain text.

    Args:
        column: column of the text; a dot reaches into records.
        builder: divides long texts.
    """

    column: str
    builder: BlockBuilder

    def __call__(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Document]:
        """Blocks of the texts; none of an empty one.

        Raises:
            ValueError: if a column holds no text.
        """
        blocks: list[Block] = []
        for row, number in zip(rows, numbers, strict=True):
            text = lookup(row, self.column)
            if not isinstance(text, str):
                raise ValueError(
                    f"data.text_column: column {self.column!r} of row {number} holds {text!r} instead of text"
                )
            blocks += self.builder.blocks(text)
        return [{"text": block.text, "patches": block.patches} for block in blocks]


@dataclass(frozen=True)
class StripReader:
    """Rows with strips that are drawn already.

    Args:
        image: column of the image.
        column: column of the text; None where only images are wanted.
        max_seq_length: most patches of a strip.
    """

    image: str
    column: str | None
    max_seq_length: int

    @property
    def columns(self) -> list[str]:
        """Columns that are read."""
        return [self.image, COUNT] if self.column is None else [self.image, COUNT, self.column]

    def __call__(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Document]:
        """One document per row."""
        return [
            {
                "image": row[self.image],
                COUNT: row[COUNT],
                "text": None if self.column is None else row[self.column],
                "patches": min(row[COUNT] + 1, self.max_seq_length),
            }
            for row in rows
        ]


class TextTable(Sequence[Document]):
    """Many texts in two arrays, which worker processes share instead of copying them one by one.

    Args:
        texts: the texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        first, last = self._ends[index], self._ends[index + 1]
        return {"text": self._bytes[first:last].tobytes().decode("utf-8", "surrogatepass")}


class StripTable(Sequence[Document]):
    """Rows with strips that are drawn already, read when they are needed.

    Args:
        rows: data set with a length.
        reader: reads a row.
    """

    def __init__(self, rows: Any, reader: StripReader) -> None:  # noqa: ANN401
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return self.reader([self.rows[int(index)]], [int(index)])[0]


# -- items ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemMaker:
    """Documents to the items that a collator joins; draws and tokenises in the process where it is called.

    Args:
        renderer: draws.
        encoder: tokenises; None where only images are wanted.
        max_tokens: tokens at which a text is cut.
        packed: an item may hold several documents.
    """

    renderer: Renderer
    encoder: TokenEncoder | None
    max_tokens: int
    packed: bool

    def __call__(self, examples: Sequence[Sequence[Document]], mode: Mode) -> list[Item]:
        """Make items of one mode.

        Args:
            examples: documents of each item; more than one only if packed.
            mode: the mode.

        Returns:
            One item per example.
        """
        items: list[Item] = [{} for _ in examples] if mode == "text" else [self._draw(docs) for docs in examples]
        if mode != "image":
            assert self.encoder is not None  # the data module sees to it
            ids = self.encoder.encode([docs[0]["text"] for docs in examples], True, self.max_tokens)
            for item, row in zip(items, ids, strict=True):
                item["ids"] = row
        return items

    def _draw(self, documents: Sequence[Document]) -> Item:
        strips = [self._strip(document) for document in documents]
        if not self.packed:
            return {"pixels": strips[0][0], "num_text_patches": strips[0][1]}
        size = self.renderer.max_seq_length * self.renderer.patch_size
        pixels = np.concatenate([pixels for pixels, _ in strips], axis=1)[:, :size]
        ids = document_ids([strip.shape[1] // self.renderer.patch_size for strip, _ in strips])
        ids = ids[: self.renderer.max_seq_length]
        return {"pixels": pixels, "num_text_patches": len(ids) - 1, "document_ids": ids}

    def _strip(self, document: Document) -> tuple[Pixels, int]:
        if "image" in document:
            return decode_strip(document["image"], document[COUNT], self.renderer)
        strip = self.renderer.render(document["text"])
        return strip.trimmed, strip.num_text_patches


class Strips(Dataset[Item]):
    """Items of documents, made when they are asked for.

    An index is a row number with a mode. A row number alone (as the trainer asks when it overfits on a few batches)
    has the mode of the batch that it is in when nothing is shuffled.

    Args:
        documents: the documents.
        starts: first document of every item, and their number at the end.
        maker: makes items.
        mixture: modes of the batches.
        batch_size: rows per batch.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        starts: NDArray[np.int64],
        maker: ItemMaker,
        mixture: Mixture,
        batch_size: int,
    ) -> None:
        self.documents, self.starts, self.maker = documents, starts, maker
        self.mixture, self.batch_size = mixture, batch_size

    def __len__(self) -> int:
        """Number of items."""
        return len(self.starts) - 1

    def __getitem__(self, index: int | Index | list[Index]) -> Any:  # noqa: ANN401
        """One item, or those of a whole batch."""
        return self.__getitems__(index) if isinstance(index, list) else self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Index]) -> list[Item]:
        """Items of a batch; torch's loaders ask so."""
        pairs = [index if isinstance(index, tuple) else (index, self._mode(index)) for index in indices]
        modes = {mode for _, mode in pairs}
        if len(modes) == 1:
            return self.maker([self._example(row) for row, _ in pairs], modes.pop())
        return [self.maker([self._example(row)], mode)[0] for row, mode in pairs]

    def _mode(self, row: int) -> Mode:
        return self.mixture.mode(0, 0, row // self.batch_size)

    def _example(self, row: int) -> list[Document]:
        return [self.documents[number] for number in range(self.starts[row], self.starts[row + 1])]


class StreamedStrips(StreamedRows):
    """Items of a stream, made by the worker that needs them; see `StreamedRows` for ranks, workers and resuming.

    Dividing long documents needs their widths, which every worker measures for all rows that its rank reads.

    Args:
        rows: iterable data set.
        reader: reads documents.
        maker: makes items.
        mixture: modes of the batches.
        batch_size: rows per batch and rank.
        capacity: patches among which documents are packed; 0 packs none.
        options: see `StreamedRows`.
    """

    def __init__(
        self,
        rows: Any,  # noqa: ANN401
        reader: Reader,
        maker: ItemMaker,
        mixture: Mixture,
        batch_size: int,
        capacity: int = 0,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(rows, reader, batch_size, **options)
        self.maker, self.mixture, self.capacity = maker, mixture, capacity

    def __iter__(self) -> Iterator[Any]:
        """Items of this worker, from the position on."""
        place = self.position
        epoch, pass_, first = place.epoch, place.pass_, place.batches
        for number, examples in self._of_worker(self._batches(self._examples(), first)):
            yield from self.maker(examples, self.mixture.mode(epoch, pass_, first + number))

    def _examples(self) -> Iterator[list[Document]]:
        documents = self._encoded()
        if not self.capacity:
            yield from ([document] for document in documents)
            return
        group: list[Document] = []
        filled = 0
        for document in documents:
            if group and filled + document["patches"] > self.capacity:
                yield group
                group, filled = [], 0
            group.append(document)
            filled += document["patches"]
        if group:
            yield group


class StreamedEvaluation(StreamedStrips):
    """Every item of a stream once in every mode, as whole batches of one mode; see `EvaluationBatches`."""

    def __iter__(self) -> Iterator[Any]:
        """Lists of items."""
        turns = ((examples, mode) for examples in self._batches(self._examples()) for mode in self.mixture.modes)
        for _, (examples, mode) in self._of_worker(turns):
            yield self.maker(examples, mode)


# -- data modules --------------------------------------------------------------------------------------------------


class PixelTexts(PixelData):
    """Texts for pre-training, drawn or tokenised (or both) while training runs.

    Every batch has one mode; the keys of a batch tell it: `image` has those of pixels, `text` those of tokens, `pair`
    both of the same text. Validation shows every row once in every mode, batches of the modes in turn.

    `path` may also hold strips that are drawn already: a folder written by `datamodules.prerender`, or a data set with
    an image column (`pixel_values`, or `image`, also in base64) and `num_patches`, such as the released ones.

    Batch:
        * `pixel_values`: (B, C, H, W) uint8, ground 255, ink 0; W = L*p, right padded with white
        * `pixel_mask`: (B, L) int64, 1 at the patches of the text and at the separator behind it
        * `num_text_patches`: (B,) int64, patches before the last separator
        * `document_ids`: (B, L) int64, only if packed: number of the document on its strip, -1 at padding
        * `input_ids`: (B, T) int64, beginning token, text, end token; right padded
        * `attention_mask`: (B, T) int64, 1 where a token is
        * `labels`: (B, T) int64, the ids, or -100 at padding

    Papers: https://arxiv.org/abs/2404.10710 (modes, mixture), https://arxiv.org/abs/2207.06991 (long documents).

    Args:
        path: hub id, folder or file; see `datamodules.sources.load_rows`.
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None where `modes` has only images.
        text_column: column of the text; its lines are joined with spaces, for pixels and tokens alike.
        modes: mode -> share, such as `{image: 4, text: 4, pair: 2}`, or the modes of successive batches, such as
            `[image, text, image, text, pair]`; see `datamodules.mixture.Mixture`. None takes only images.
        val_modes: modes in which rows are evaluated; None takes those of `modes`.
        split_long: divide documents that are longer than a strip into several strips, as PIXEL does; otherwise strips
            and token rows are cut.
        pack: put several documents onto one strip, with the black patch between them; only images.
        streaming: read and divide rows while training instead of before, which takes about a minute for every fifty
            thousand pages of text.
        shuffle_buffer: when streaming, training rows among which the next one is drawn; 0 keeps their order.
        stream_shares: when streaming on several ranks, what each of them takes: its part of every global batch
            (`batches`), or its part of the source (`sources`), which is cheaper for many ranks, but makes the batches
            depend on their number; see `datamodules.streams.StreamedRows`.
        options: see `PixelData`.
    """

    def __init__(
        self,
        path: str,
        renderer: Renderer,
        tokenizer: str | None = None,
        text_column: str = "text",
        modes: dict[str, float] | list[str] | None = None,
        val_modes: list[str] | None = None,
        split_long: bool = True,
        pack: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        stream_shares: Shares = "batches",
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(path, renderer, tokenizer, **options)
        if streaming and self.val_fraction is not None:
            raise ValueError("data.val_fraction: a stream has no length to divide; set data.streaming to false")
        self.mixture = Mixture({"image": 1.0} if modes is None else modes, self.seed)
        val_names = self.mixture.modes if val_modes is None else check_modes(val_modes, "data.val_modes")
        self.val_mixture = Mixture(list(val_names), self.seed)
        used = {*self.mixture.modes, *self.val_mixture.modes}
        if pack and used != {"image"}:
            raise ValueError(
                "data.pack: a strip of several documents has no row of tokens; set data.modes and data.val_modes to "
                "images only, or data.pack to false"
            )
        self.encoder = self.token_encoder("data.modes") if used != {"image"} else None
        self.text_column, self.split_long, self.pack = text_column, split_long, pack
        self.streaming, self.shuffle_buffer, self.stream_shares = streaming, shuffle_buffer, stream_shares
        self.save_hyperparameters(ignore=["renderer"], logger=False)

    def prepare_data(self) -> None:
        """Fill the local cache in one process before all others read it."""
        if not self.streaming:
            super().prepare_data()

    def setup(self, stage: str) -> None:
        """Build the data sets of a stage, after a look at the renderer of strips that are drawn already."""
        if not self.datasets:
            self._compare(stored_fingerprint(self.path), f"the strips of data.path={self.path!r} were")
        super().setup(stage)

    def build(self, split: Split) -> Any:  # noqa: ANN401
        """Build the items of one split: a data set with a length, or a stream."""
        if not self.streaming:
            return super().build(split)
        streams = [self._stream(self.rows(name, streaming=True), split) for name in self.split_names[split]]
        return streams if len(streams) > 1 else next(iter(streams), None)

    def dataset(self, rows: Rows, split: Split) -> Strips:
        """Read documents, divide long ones and pack short ones.

        Args:
            rows: the rows.
            split: what they are for.

        Returns:
            The items.

        Raises:
            ValueError: if a column is missing, or no row has any text.
        """
        reader = self._reader(rows)
        mixture = self.mixture if split == "train" else self.val_mixture
        documents: Sequence[Document]
        if isinstance(reader, StripReader):
            documents = StripTable(rows.select_columns(reader.columns), reader)
            patches = [min(count + 1, reader.max_seq_length) for count in rows[COUNT]] if self.pack else []
        else:
            documents, patches = self._read(rows, reader, split)
        if not len(documents):
            raise ValueError(f"data: the {split} split {self.split_names[split]!r} has no row with text")
        starts = greedy_starts(patches, self._capacity) if self.pack else np.arange(len(documents) + 1)
        batch_size = self.batch_size if split == "train" else self.val_batch_size
        return Strips(documents, starts, self._maker(), mixture, batch_size)

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the training rows, with a mode for every batch."""
        dataset = self._dataset("train")
        options: dict[str, Any] = {"collate_fn": self.collator(learn=True), "num_workers": self.num_workers}
        if self.streaming:
            loader = train_loader(dataset, self.batch_size, self.seed, **options)
        else:
            loader = ResumableLoader(
                dataset,
                self.batch_size,
                sampler=MixtureSampler(dataset, self.batch_size, self.mixture, self.seed),
                generator=torch.Generator().manual_seed(self.seed),  # not the global one
                persistent_workers=self.num_workers > 0,
                **options,
            )
        return self._follow(loader)

    def evaluation_loader(self, dataset: Any) -> DataLoader[Any]:  # noqa: ANN401
        """Loader of whole batches of one mode.

        Args:
            dataset: items or a stream of batches.
        """
        sampler = None
        if isinstance(dataset, Strips):
            sampler = EvaluationBatches(dataset, self.val_batch_size, self.val_mixture.modes, self.even)
        return EvaluationLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=self.collator(learn=True),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),
        )

    @property
    def _capacity(self) -> int:
        return self.renderer.max_seq_length if self.pack else 0

    def _maker(self) -> ItemMaker:
        return ItemMaker(self.renderer, self.encoder, self.max_tokens, self.pack)

    def _reader(self, rows: Rows) -> TextReader | StripReader:
        columns = rows.column_names
        image = image_column(columns)
        if image is None:
            require_columns(rows, {"data.text_column": self.text_column})
            return TextReader(self.text_column, BlockBuilder(self.renderer, self.split_long, measure=self.pack))
        if self.encoder is not None and self.text_column not in columns:
            raise ValueError(
                f"data.text_column: the drawn strips of {self.path!r} have no column {self.text_column!r} to tokenise; "
                "name the column of their text, or set data.modes and data.val_modes to images only"
            )
        return StripReader(image, None if self.encoder is None else self.text_column, self.renderer.max_seq_length)

    def _read(self, rows: Rows, reader: TextReader, split: Split) -> tuple[TextTable, list[int]]:
        texts: list[str] = []
        patches: list[int] = []
        first = empty = 0
        column = self.text_column.partition(".")[0]
        for chunk in chunks(rows.select_columns([column])):
            for number, row in enumerate(chunk, first):
                documents = reader([row], [number])
                empty += not documents
                texts += [document["text"] for document in documents]
                patches += [document["patches"] for document in documents]
            first += len(chunk)
        if empty and texts:
            rank_zero_warn(f"dropped {empty} of {first} rows of the {split} split that have no text")
        return TextTable(texts), patches

    def _stream(self, rows: Any, split: Split) -> StreamedStrips:  # noqa: ANN401
        reader = self._reader(rows)
        limit = self.limits.get(split)
        if limit is not None:
            rows = rows.take(limit)
        shared = (rows, reader, self._maker())
        if split == "train":
            options: dict[str, Any] = {"shuffle_buffer": self.shuffle_buffer, "seed": self.seed}
            sizes = (self.mixture, self.batch_size, self._capacity)
            return StreamedStrips(*shared, *sizes, shares=self.stream_shares, **options)
        options = {"drop_last": False, "even": self.even}
        sizes = (self.val_mixture, self.val_batch_size, self._capacity)
        return StreamedEvaluation(*shared, *sizes, shares=self.stream_shares, **options)


class PixelSnippets(PixelTexts):
    """Film-review sentences for pre-training, shipped with the package.

    Validation uses the last 500 sentences of `load_snippets("train")`, which are not trained on, and testing the 1,000
    of `load_snippets("test")`. Batch: see `PixelTexts`.

    Args:
        renderer: draws the texts.
        tokenizer: hub id or folder of the tokenizer; None takes the shipped one.
        modes: see `PixelTexts`.
        val_modes: modes in which rows are evaluated; None takes those of `modes`.
        max_tokens: tokens at which a text is cut.
        split_long: divide sentences that are longer than a strip.
        pack: put several sentences onto one strip; only images.
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
        modes: dict[str, float] | list[str] | None = None,
        val_modes: list[str] | None = None,
        max_tokens: int = 64,
        split_long: bool = False,
        pack: bool = False,
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
            modes=modes,
            val_modes=val_modes,
            max_tokens=max_tokens,
            split_long=split_long,
            pack=pack,
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
        self.save_hyperparameters(ignore=["renderer"], logger=False)

    def rows(self, split: str, streaming: bool = False) -> Rows:
        """The shipped sentences, with their `rating`.

        Args:
            split: `train`, `val` or `test`.
            streaming: not used.
        """
        return snippet_rows(split)


def snippet_rows(split: str) -> Rows:
    """Shipped film-review sentences.

    Args:
        split: `train`, `val` (the last 500 of those that `load_snippets` calls `train`) or `test`.

    Returns:
        Rows with `text` and `rating`, the mean human rating from -4 to 4.
    """
    from datasets import Dataset as Table

    parts = {"train": slice(-SNIPPET_VALIDATION), "val": slice(-SNIPPET_VALIDATION, None), "test": slice(None)}
    snippets = load_snippets("test" if split == "test" else "train")[parts[split]]
    return Table.from_dict(
        {"text": [snippet.text for snippet in snippets], "rating": [snippet.rating for snippet in snippets]}
    )
