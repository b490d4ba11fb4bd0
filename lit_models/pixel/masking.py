"""Which patches of a strip the masked model does not see.

Shapes: B strips, L patches. Masks hold 1 where a patch is hidden.
Sources: span masks of PIXEL (arXiv 2207.06991), after BEiT (arXiv 2106.08254); random masks of the masked autoencoder
(arXiv 2111.06377).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Spacing: TypeAlias = Literal["span"] | int
_AHEAD = 32
TRIES = 100
"""Draws in a row without a new masked patch after which a mask is left as it is."""


@dataclass(frozen=True)
class SpanMasking:
    """How spans of patches are drawn.

    Args:
        cumulative_weights: cumulative probabilities of the lengths 1, 2, ...; their number is the longest span.
        spacing: visible patches that a new span must have on both of its sides; "span" asks for as many as it is long.
            The more patches are masked, the less space there is: PIXEL advises "span" up to a mask ratio of 0.4, 1 up
            to 0.7 and 0 beyond.

    Raises:
        ValueError: if a value is out of range.
    """

    cumulative_weights: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    spacing: Spacing = "span"

    def __post_init__(self) -> None:
        """Check the options."""
        weights = (0.0, *self.cumulative_weights)
        if len(weights) == 1 or weights[-1] <= 0 or any(a > b for a, b in pairwise(weights)):
            raise ValueError(
                "model.masking.cumulative_weights must rise from above 0 to a positive last value, such as "
                f"[0.5, 1.0], got {list(self.cumulative_weights)}"
            )
        if self.spacing != "span" and (not isinstance(self.spacing, int) or self.spacing < 0):
            raise ValueError(
                f"model.masking.spacing must be 'span' or a number of patches from 0 on, got {self.spacing!r}"
            )

    @property
    def longest(self) -> int:
        """The longest span, in patches."""
        return len(self.cumulative_weights)

    def space(self, span: int) -> int:
        """Visible patches that a span needs on both sides."""
        return span if self.spacing == "span" else self.spacing


class Kept(NamedTuple):
    """A choice of patches."""

    ids_keep: Tensor
    """(B,K) int64, the visible patches in the order in which the encoder reads them."""
    mask: Tensor
    """(B,L) float32, 1 where a patch is hidden."""
    ids_restore: Tensor
    """(B,L) int64, place of every patch in the sequence of visible, then hidden patches."""


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of a strip of `num_patches`: the share 1 - `mask_ratio`, rounded down."""
    return int(num_patches * (1 - mask_ratio))


def span_mask(
    num_patches: int,
    num_masked: int,
    num_text_patches: int,
    rng: random.Random,
    masking: SpanMasking = SpanMasking(),
) -> NDArray[np.int64]:
    """Draw one span mask, with the random numbers in the order of the official code.

    Spans are drawn one after another. The first draw puts the left end on the text, so that something with ink is
    masked; this draw is spent even if the span is then refused.

    Args:
        num_patches: L.
        num_masked: patches to mask. There may be fewer in the end, and never more.
        num_text_patches: patches with text, the separator included.
        rng: its state advances.
        masking: how spans are drawn.

    Returns:
        (L,) of 0 and 1.
    """
    lengths, weights = range(1, masking.longest + 1), masking.cumulative_weights
    mask = bytearray(num_patches)
    missing, tries = num_masked, TRIES
    on_text = True
    while missing > 0 and tries > 0:
        tries -= 1
        (span,) = rng.choices(lengths, cum_weights=weights)
        if span >= num_patches:
            continue
        left = rng.randint(0, max(0, min(num_text_patches, num_patches) - span) if on_text else num_patches - span)
        on_text = False
        right, space = left + span, masking.space(span)
        new = span - sum(mask[left:right])
        near = any(mask[max(0, left - space) : left]) or any(mask[right : right + space])
        if not near and 0 < new <= min(missing, masking.longest):
            mask[left:right] = b"\1" * span
            missing -= new
            tries = TRIES
    return np.frombuffer(bytes(mask), dtype=np.uint8).astype(np.int64)


def span_masks(
    num_patches: int,
    num_masked: int,
    num_text_patches: Sequence[int] | NDArray[np.int64],
    rng: np.random.Generator | Sequence[np.random.Generator],
    masking: SpanMasking = SpanMasking(),
) -> NDArray[np.int64]:
    """Draw the span masks of a batch, all rows at a time.

    The masks have the distribution of `span_mask`, from another source of random numbers.

    Args:
        num_patches: L.
        num_masked: patches to mask in every row, at most.
        num_text_patches: (B,) patches with text, the separator included.
        rng: its state advances; or one for each row, whose mask then depends on nothing else in the batch.
        masking: how spans are drawn.

    Returns:
        (B,L) of 0 and 1.
    """
    text = np.minimum(np.asarray(num_text_patches, dtype=np.int64), num_patches)
    weights = np.asarray(masking.cumulative_weights)
    margin = masking.space(masking.longest)
    # Margins of visible patches stand for what lies beyond the two ends of the strip.
    masks = np.zeros((len(text), margin + num_patches + masking.longest + margin), dtype=bool)
    window = np.arange(-margin, masking.longest + margin)
    missing = np.full(len(text), num_masked)
    tries = np.full(len(text), TRIES)
    on_text = np.ones(len(text), dtype=bool)
    rows = np.flatnonzero(missing > 0)
    draw = _draws(rng)
    while rows.size:
        lengths, ends = draw(rows)
        # As in `random.choices`: the last length also takes what rounding leaves above the last weight.
        span = np.minimum(np.searchsorted(weights, lengths * weights[-1], side="right"), len(weights) - 1) + 1
        fits = span < num_patches
        last = np.where(on_text[rows], np.maximum(text[rows] - span, 0), num_patches - span)
        left = np.where(fits, (ends * (last + 1)).astype(np.int64), 0)
        on_text[rows] &= ~fits
        space = span if masking.spacing == "span" else np.full_like(span, masking.spacing)
        columns = margin + left[:, None] + window
        taken = masks[rows[:, None], columns]
        within = (window >= 0) & (window < span[:, None])
        near = (window >= -space[:, None]) & (window < (span + space)[:, None]) & ~within
        new = span - (taken & within).sum(1)
        accepted = fits & ~(taken & near).any(1) & (new > 0) & (new <= np.minimum(missing[rows], masking.longest))
        chosen, place = np.nonzero(within & accepted[:, None])
        masks[rows[chosen], columns[chosen, place]] = True
        missing[rows] -= np.where(accepted, new, 0)
        tries[rows] = np.where(accepted, TRIES, tries[rows] - 1)
        rows = rows[(missing[rows] > 0) & (tries[rows] > 0)]
    return masks[:, margin : margin + num_patches].astype(np.int64)


def _draws(
    rng: np.random.Generator | Sequence[np.random.Generator],
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Function that gives (2,n) random numbers for n rows, each time no other rows than before."""
    if isinstance(rng, np.random.Generator):
        return lambda rows: rng.random((2, rows.size))
    ahead = np.empty((_AHEAD, 2, len(rng)))  # drawn many at a time, which is faster
    times = 0

    def draw(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        nonlocal times
        if times % _AHEAD == 0:
            for row in rows:
                ahead[..., row] = rng[row].random((_AHEAD, 2))
        times += 1
        return ahead[(times - 1) % _AHEAD][:, rows]

    return draw


def keep_lowest(scores: Tensor, keep: int) -> Kept:
    """Keep the patches with the lowest scores.

    Args:
        scores: (B,L) float.
        keep: K, the number of visible patches.

    Returns:
        The choice.
    """
    order = scores.argsort(dim=1, stable=True)
    ids_restore = order.argsort(dim=1)
    return Kept(order[:, :keep], (ids_restore >= keep).float(), ids_restore)


def random_keep(mask: Tensor, noise: Tensor, keep: int) -> Kept:
    """Keep patches outside of a mask; where the mask hides too few, hide others at random.

    Args:
        mask: (B,L) 0 or 1, for example of `span_masks`.
        noise: (B,L) float32, uniform in [0, 1).
        keep: K, the number of visible patches.

    Returns:
        The choice.
    """
    return keep_lowest(mask.float() + noise / 100, keep)


def random_scores(attention_mask: Tensor, noise: Tensor) -> Tensor:
    """Scores for `keep_lowest` that hide patches at random, among them at least one that is attended.

    Args:
        attention_mask: (B,L) 0 or 1.
        noise: (B,L) float32, uniform in [0, 1).

    Returns:
        (B,L) float32.
    """
    hidden = (noise * attention_mask).argmax(dim=1, keepdim=True)
    return noise.scatter(1, hidden, 100.0)


def draw_masks(
    num_patches: int,
    mask_ratio: float,
    num_text_patches: Sequence[int] | NDArray[np.int64],
    seed: Sequence[int],
    masking: SpanMasking | None = SpanMasking(),
    rows: Sequence[int] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Draw all that is random in the masks of a batch.

    Args:
        num_patches: L.
        mask_ratio: share of hidden patches.
        num_text_patches: (B,) patches with text, the separator included.
        seed: numbers from 0 on that name the batch, for example seed and step; the same ones give the same masks.
        masking: how spans are drawn; None draws none, which leaves masks without any order.
        rows: (B,) numbers of the rows in the batch of all ranks, which has the same masks however it is divided; by
            default 0, 1, ...

    Returns:
        Span mask (B,L) int64 or None, and noise (B,L) float32, both on the CPU.
    """
    count = len(num_text_patches)
    generators = [np.random.default_rng([*seed, row]) for row in (range(count) if rows is None else rows)]
    noise = np.empty((count, num_patches), np.float32)
    for values, rng in zip(noise, generators, strict=True):
        rng.random(out=values, dtype=np.float32)
    if masking is None:
        return None, torch.from_numpy(noise)
    masked = num_patches - num_kept(num_patches, mask_ratio)
    masks = span_masks(num_patches, masked, num_text_patches, generators, masking)
    return torch.from_numpy(masks), torch.from_numpy(noise)
