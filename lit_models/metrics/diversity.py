"""Distinct n-grams (CD-RLHF, section 4.2; the released evaluation code)."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

from lit_models.metrics.base import SetMetric

ORDERS = (1, 2, 3, 4, 5)


def repetition(texts: Sequence[str], order: int, include_last_ngram: bool = False) -> float:
    """Share of the n-grams of all texts, joined by spaces, that repeat an earlier one; rounded as a percentage.

    Args:
        texts: any.
        order: n.
        include_last_ngram: count the window at the end too, which the released code leaves out.

    Returns:
        Number from 0 to 1, 0 where there is no n-gram.
    """
    words = " ".join(texts).split()
    last = len(words) - order + int(include_last_ngram)
    grams = [tuple(words[start : start + order]) for start in range(max(0, last))]
    return round(100 * (1 - len(set(grams)) / len(grams)), 2) / 100 if grams else 0.0


def diversity(texts: Sequence[str], include_last_ngram: bool = False) -> float:
    """Product over n = 1 to 5 of the shares of distinct n-grams; n-grams cross the borders of texts.

    Args:
        texts: a set, such as the responses to one prompt.
        include_last_ngram: count the window at the end too, which the released code leaves out.

    Returns:
        Number from 0 to 1; higher is more diverse.
    """
    return prod(1 - repetition(texts, order, include_last_ngram) for order in ORDERS)


def distinct_words(text: str, strip_punct: Literal["fuse", "space"] = "fuse") -> list[str]:
    """Words of a text for `ead`.

    Args:
        text: any.
        strip_punct: `fuse` deletes full stops and line breaks, so that words around a line break become one, as in the
            released code; `space` puts a space there.

    Returns:
        Words without empty ones.
    """
    filler = "" if strip_punct == "fuse" else " "
    return [word for word in text.replace(".", filler).replace("\n", filler).split(" ") if word]


def ead_of_order(words: Sequence[Sequence[str]], order: int, vocab_size: int = 256000) -> float:
    """Distinct n-grams of a set over the number expected of a uniform draw (Liu et al., 2022).

    Args:
        words: words of each text; n-grams do not cross texts.
        order: n.
        vocab_size: V of the draw.

    Returns:
        Number of at least 0; 0 where there is no n-gram.
    """
    grams = [tuple(text[start : start + order]) for text in words for start in range(len(text) - order + 1)]
    if not grams:
        return 0.0
    expected = vocab_size * (1 - ((vocab_size - 1) / vocab_size) ** len(grams))
    return len(set(grams)) / expected


def ead(texts: Sequence[str], vocab_size: int = 256000, strip_punct: Literal["fuse", "space"] = "fuse") -> float:
    """Expectation-adjusted distinct n-grams, averaged over n = 1 to 5.

    Args:
        texts: a set.
        vocab_size: V of the draw; 256000 is that of Gemma.
        strip_punct: see `distinct_words`.

    Returns:
        Number of at least 0; higher is more diverse.
    """
    words = [distinct_words(text, strip_punct) for text in texts]
    return sum(ead_of_order(words, order, vocab_size) for order in ORDERS) / len(ORDERS)


class Diversity(SetMetric):
    """Mean `diversity` of sets of texts; higher is more diverse.

    Args:
        include_last_ngram: count the window at the end too, which the released code leaves out.
        options: see `SetMetric`.
    """

    name = "diversity"
    higher_is_better = True

    def __init__(self, include_last_ngram: bool = False, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.include_last_ngram = include_last_ngram

    def value(self, texts: Sequence[str]) -> float:
        """See `diversity`."""
        return diversity(texts, self.include_last_ngram)


class ExpectationAdjustedDistinct(SetMetric):
    """Mean `ead` of sets of texts; higher is more diverse.

    Args:
        vocab_size: V of the draw.
        strip_punct: see `distinct_words`.
        options: see `SetMetric`.
    """

    name = "ead"
    higher_is_better = True

    def __init__(
        self,
        vocab_size: int = 256000,
        strip_punct: Literal["fuse", "space"] = "fuse",
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**options)
        if vocab_size < 2:
            raise ValueError(f"metrics.vocab_size must be at least 2, got {vocab_size}")
        self.vocab_size, self.strip_punct = vocab_size, strip_punct

    def value(self, texts: Sequence[str]) -> float:
        """See `ead`."""
        return ead(texts, self.vocab_size, self.strip_punct)
