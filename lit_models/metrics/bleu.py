"""SelfBLEU: how well each text of a set is covered by the others."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from lit_models.metrics.base import SetMetric

ORDERS = (1, 2, 3, 4)
SMOOTHING = 0.1
Words = Sequence[Hashable]
Grams = Mapping[tuple[Hashable, ...], int]


def ngrams(words: Words, order: int) -> Grams:
    """Counts of the n-grams of a text."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def bleu(matches: Sequence[int], length: int, reference_length: int) -> float:
    """BLEU-4 with equal weights from the clipped matches of each order.

    An order without a match counts 0.1 over the number of its n-grams; without a common word the score is 0.

    Args:
        matches: clipped matches of 1- to 4-grams.
        length: words of the text.
        reference_length: words of the reference of the nearest length.

    Returns:
        Number from 0 to 1.
    """
    if matches[0] == 0:
        return 0.0
    total = 0.0
    for order, found in zip(ORDERS, matches, strict=True):
        total += math.log((found or SMOOTHING) / max(1, length - order + 1))
    brevity = 1.0 if length > reference_length else math.exp(1 - reference_length / length)
    return brevity * math.exp(total / len(ORDERS))


def nearest_length(length: int, lengths: Sequence[int]) -> int:
    """The length nearest to one; the shorter of two equally near ones."""
    return min(lengths, key=lambda other: (abs(other - length), other))


def bleu_against(text: Words, references: Sequence[Words]) -> float:
    """BLEU-4 of a text against references.

    Args:
        text: words or token ids.
        references: at least one.

    Returns:
        Number from 0 to 1.
    """
    matches = []
    for order in ORDERS:
        grams = ngrams(text, order)
        counts = [ngrams(reference, order) for reference in references]
        matches.append(sum(min(count, max(other.get(gram, 0) for other in counts)) for gram, count in grams.items()))
    return bleu(matches, len(text), nearest_length(len(text), [len(reference) for reference in references]))


def self_bleu_scores(texts: Sequence[Words]) -> list[float]:
    """BLEU-4 of each text against all others of its set.

    Every n-gram is counted once per text; what the others hold is read off the two largest counts.

    Args:
        texts: words or token ids of at least two texts.

    Returns:
        Number from 0 to 1 per text; 0 for a single text.
    """
    if len(texts) < 2:
        return [0.0] * len(texts)
    matches: list[list[int]] = [[] for _ in texts]
    for order in ORDERS:
        counts = [ngrams(text, order) for text in texts]
        largest: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # count, its text, next largest count
        for number, grams in enumerate(counts):
            for gram, count in grams.items():
                best, owner, second = largest.get(gram, (0, -1, 0))
                if count > best:
                    largest[gram] = (count, number, best)
                elif count > second:
                    largest[gram] = (best, owner, count)
        for number, grams in enumerate(counts):
            found = 0
            for gram, count in grams.items():
                best, owner, second = largest[gram]
                found += min(count, second if owner == number else best)
            matches[number].append(found)
    lengths = [len(text) for text in texts]
    return [
        bleu(found, length, nearest_length(length, lengths[:number] + lengths[number + 1 :]))
        for number, (found, length) in enumerate(zip(matches, lengths, strict=True))
    ]


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of the texts of a set against each other, over words between spaces.

    Args:
        texts: a set.

    Returns:
        Number from 0 to 1; lower is more diverse.
    """
    scores = self_bleu_scores([text.split() for text in texts])
    return sum(scores) / max(1, len(scores))


class SelfBLEU(SetMetric):
    """Mean `self_bleu` of sets of texts; lower is more diverse (Zhu et al., 2018).

    Args:
        options: see `SetMetric`.
    """

    name = "self_bleu"
    higher_is_better = False

    def value(self, texts: Sequence[str]) -> float:
        """See `self_bleu`."""
        return self_bleu(texts)
