"""What taggers, classifiers and text-audio encoders say about generated music."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

SMOOTHING = 1e-6
"""Added to the generated clip's independent probabilities, which can be 0."""


class _Sums(Metric):
    """A metric whose states are float64 sums."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class InceptionScore(_Sums):
    """Exponential of the mean divergence of a clip's tags from those of all clips (arXiv 1606.03498).

    One split over all clips, so it is exact over batches and ranks; scores averaged over splits are lower.

    Args:
        num_classes: tags of the tagger.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = True
    probabilities: Tensor
    information: Tensor
    count: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"probabilities": (num_classes,), "information": (), "count": ()}, **kwargs)

    def update(self, logits: Tensor) -> None:
        """Add clips.

        Args:
            logits: (B,num_classes) float, of tags that exclude each other.
        """
        log_p = logits.double().log_softmax(-1)
        self.probabilities += log_p.exp().sum(0)
        self.information += (log_p.exp() * log_p).sum()
        self.count += len(logits)

    def compute(self) -> Tensor:
        """() float32: from 1 to the number of classes; NaN without clips."""
        marginal = torch.special.entr(self.probabilities / self.count).sum()
        return (marginal + self.information / self.count).exp().float()


class TaggerDivergence(_Sums):
    """Mean divergence of the tags of a generated clip from those of its real counterpart, in nats.

    Papers differ in what they call it: "softmax" reads the tags as alternatives; "sigmoid" as independent, and sums
    p ln(p/q) of the tags being present alone, which is no true divergence and can be negative.

    Args:
        kind: "softmax" or "sigmoid".
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if the kind is unknown.
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, kind: Literal["softmax", "sigmoid"] = "softmax", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"total": (), "count": ()}, **kwargs)
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"kind={kind!r} is unknown; choose softmax (tags are alternatives) or sigmoid")
        self.kind = kind

    def update(self, generated: Tensor, reference: Tensor) -> None:
        """Add pairs of clips.

        Args:
            generated: (B,K) float, logits of the generated clips.
            reference: (B,K) float, logits of the real clips with the same prompts.
        """
        generated, reference = generated.double(), reference.double()
        if self.kind == "softmax":
            log_q, log_p = generated.log_softmax(-1), reference.log_softmax(-1)
            p = log_p.exp()
        else:
            log_q, log_p = (generated.sigmoid() + SMOOTHING).log(), F.logsigmoid(reference)
            p = reference.sigmoid()
        self.total += (p * (log_p - log_q)).sum()
        self.count += len(generated)

    def compute(self) -> Tensor:
        """() float32: divergence per pair; NaN without pairs."""
        return (self.total / self.count).float()


class RelevanceAccuracy(_Sums):
    """Share of generated clips in which a classifier of real clips finds what the prompt asks for.

    Args:
        attributes: names, for example `instrument` and `register`.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if there is no attribute, or one is called `all`.
    """

    higher_is_better = True
    hits: Tensor
    named: Tensor

    def __init__(self, attributes: Sequence[str], **kwargs: Any) -> None:  # noqa: ANN401
        size = len(attributes) + 1
        super().__init__({"hits": (size,), "named": (size,)}, **kwargs)
        if not attributes or "all" in attributes:
            raise ValueError(f"attributes={list(attributes)}: name at least one attribute, and none of them `all`")
        self.attributes = tuple(attributes)

    def update(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        """Add clips.

        Args:
            logits: attribute -> (B,K) float, what the classifier finds.
            labels: attribute -> (B,) int64, what the prompt asks for; negative where it says nothing.
        """
        named = torch.stack([labels[name] >= 0 for name in self.attributes], -1)
        hits = torch.stack([logits[name].argmax(-1) == labels[name] for name in self.attributes], -1)
        every = named.any(-1) & (hits | ~named).all(-1)
        self.named += torch.cat([named, named.any(-1, keepdim=True)], -1).sum(0)
        self.hits += torch.cat([hits & named, every[:, None]], -1).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy per attribute, and `all` for clips with everything that was asked for; each () float32.

        Attributes that no prompt named are left out.
        """
        counts = zip((*self.attributes, "all"), self.hits, self.named, strict=True)
        return {name: (hits / named).float() for name, hits, named in counts if named}


class TextAudioSimilarity(_Sums):
    """Mean cosine of the embeddings of a clip and of its prompt (CLAP score, with the embeddings of a CLAP model)."""

    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__({"total": (), "count": ()}, **kwargs)

    def update(self, audio: Tensor, text: Tensor) -> None:
        """Add pairs.

        Args:
            audio: (B,D) float.
            text: (B,D) float.
        """
        self.total += F.cosine_similarity(audio.double(), text.double(), dim=-1).sum()
        self.count += len(audio)

    def compute(self) -> Tensor:
        """() float32 in [-1, 1]; NaN without pairs."""
        return (self.total / self.count).float()


class Retrieval(Metric):
    """Share of clips whose own prompt is among the k most similar of all prompts (R@k, audio to text).

    Equal prompts are one: a clip is found if any row with its prompt's embedding ranks among the first k.

    Args:
        ks: values of k.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: if there is no k, or one is not positive.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    audio: list[Tensor]
    text: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ValueError(f"ks={list(ks)} must be positive numbers, for example 1, 5, 10")
        self.ks = tuple(ks)
        for name in ("audio", "text"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, audio: Tensor, text: Tensor) -> None:
        """Add pairs.

        Args:
            audio: (B,D) float.
            text: (B,D) float.
        """
        self.audio.append(F.normalize(audio.double(), dim=-1))
        self.text.append(F.normalize(text.double(), dim=-1))

    def compute(self) -> dict[str, Tensor]:
        """`R@k` for every k, each () float32; nothing without pairs."""
        if not len(self.audio):
            return {}
        audio, text = dim_zero_cat(self.audio), dim_zero_cat(self.text)
        distinct, own = text.unique(dim=0, return_inverse=True)
        similarity = audio @ distinct.mT
        better = (similarity > similarity.gather(1, own[:, None])).sum(-1)
        return {f"R@{k}": (better < k).float().mean() for k in self.ks}
