"""Rows of strips and tokens to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.collate import pad_right
from datamodules.rendering.base import Renderer

Item: TypeAlias = dict[str, Any]
IGNORED = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class StripLayout:
    """Size of the strips of a batch.

    Args:
        patch_size: p, side of a patch in pixels.
        channels: 1 or 3.
        max_seq_length: S, most patches.
        pad_to: strips are padded to the longest one of the batch, rounded up to a multiple of so many patches.
        pad_to_max: pad all strips to S patches.

    Raises:
        ValueError: if `pad_to` is not positive.
    """

    patch_size: int
    channels: int
    max_seq_length: int
    pad_to: int = 16
    pad_to_max: bool = False

    def __post_init__(self) -> None:
        if self.pad_to < 1:
            raise ValueError(f"data.pad_to: {self.pad_to} patches must be at least 1")

    @classmethod
    def of(cls, renderer: Renderer, pad_to: int, pad_to_max: bool) -> "StripLayout":
        """Layout of the strips of a renderer."""
        return cls(renderer.patch_size, renderer.channels, renderer.max_seq_length, pad_to, pad_to_max)

    def length(self, longest: int) -> int:
        """Patches of all strips of a batch whose longest one has so many attended patches."""
        if self.pad_to_max:
            return self.max_seq_length
        return min(-(-longest // self.pad_to) * self.pad_to, self.max_seq_length)


def collate_strips(rows: Sequence[Item], layout: StripLayout) -> dict[str, Tensor]:
    """Pad strips with white on the right.

    Args:
        rows: items with `pixels` (H, p*n) or (H, p*n, 3) uint8, `num_text_patches`, and `document_ids` (n,) if packed.
        layout: size of the result.

    Returns:
        `pixel_values` (B, C, H, p*L) uint8, `pixel_mask` (B, L) int64, `num_text_patches` (B,) int64, and
        `document_ids` (B, L) int64 with -1 at padding if packed.
    """
    p = layout.patch_size
    strips: list[NDArray[np.uint8]] = [row["pixels"] for row in rows]
    length = layout.length(max(strip.shape[1] for strip in strips) // p)
    canvas = np.full((len(rows), strips[0].shape[0], p * length, *strips[0].shape[2:]), 255, np.uint8)
    for target, strip in zip(canvas, strips, strict=True):
        target[:, : strip.shape[1]] = strip
    pixels = torch.from_numpy(canvas)
    pixels = pixels.permute(0, 3, 1, 2).contiguous() if pixels.dim() == 4 else pixels[:, None]
    count = torch.tensor([row["num_text_patches"] for row in rows], dtype=torch.int64)
    mask = (torch.arange(length) <= count[:, None]).long()
    batch = {"pixel_values": pixels, "pixel_mask": mask, "num_text_patches": count}
    if "document_ids" in rows[0]:
        batch["document_ids"] = pad_right([row["document_ids"] for row in rows], -1, length)[0]
    return batch


@dataclass(frozen=True)
class PixelCollator:
    """Function from items of one mode to the batch that `datamodules.pixels.PixelTexts` describes.

    Args:
        layout: size of the strips.
        pad_id: id that fills token rows on the right.
        learn: give token labels.
    """

    layout: StripLayout
    pad_id: int = 0
    learn: bool = True

    def __call__(self, rows: Sequence[Item] | Item) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: items, all with the same keys; or a single one, where the trainer took the batches apart to overfit.

        Returns:
            The batch.

        Raises:
            ValueError: if the items are of several modes.
        """
        rows = [rows] if isinstance(rows, dict) else rows
        modes = {("pixels" in row, "ids" in row) for row in rows}
        if len(modes) > 1:
            names = {(True, False): "image", (False, True): "text", (True, True): "pair"}
            raise ValueError(
                f"data: a batch mixes rows of the modes {', '.join(sorted(names[mode] for mode in modes))}, but every "
                "batch holds one mode; use the loaders of the data module, whose samplers see to that"
            )
        batch: dict[str, Tensor] = {}
        if "pixels" in rows[0]:
            batch |= collate_strips(rows, self.layout)
        if "ids" in rows[0]:
            ids, mask = pad_right([row["ids"] for row in rows], self.pad_id)
            batch |= {"input_ids": ids, "attention_mask": mask}
            if self.learn:
                batch["labels"] = ids.masked_fill(mask == 0, IGNORED)
        if "label" in rows[0]:
            batch["label"] = torch.from_numpy(np.stack([row["label"] for row in rows]))
        for key, fill in (("word_patches", 0), ("tags", IGNORED)):
            if key in rows[0]:
                batch[key] = pad_right([row[key] for row in rows], fill)[0]
        return batch
