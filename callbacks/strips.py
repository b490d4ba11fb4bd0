"""Pictures of rendered text and of what a model predicts for it, during training."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from callbacks.samples import SampleTable, remove_later

Image: TypeAlias = NDArray[np.uint8]

GAP = 6
"""Rows of grey pixels between two images."""
_GREY = 190
_NAME = re.compile(r"step=(\d+)(-val)?\.png")


def stack_images(images: Iterable[Image], wrap: int = 1024) -> Image:
    """Put images under each other, long ones in several lines.

    Args:
        images: (H,W) or (H,W,3) uint8 each, of any sizes.
        wrap: width in pixels at which an image goes on in the next line.

    Returns:
        (H',W',3) uint8, W' at most `wrap`; grey where there is no image.

    Raises:
        ValueError: if there is no image.
    """
    coloured = [image if image.ndim == 3 else image[..., None].repeat(3, -1) for image in images]
    if not coloured:
        raise ValueError("there are no images to stack")
    width = min(wrap, max(image.shape[1] for image in coloured))
    lines = [image[:, start : start + width] for image in coloured for start in range(0, image.shape[1], width)]
    canvas = np.full((sum(len(line) + GAP for line in lines) - GAP, width, 3), _GREY, np.uint8)
    top = 0
    for line in lines:
        canvas[top : top + len(line), : line.shape[1]] = line
        top += len(line) + GAP
    return canvas


def write_png(image: Image, path: Path) -> None:
    """Write a picture in one move, so that nobody sees half of it.

    Args:
        image: (H,W,3) uint8.
        path: file to write or to replace; its folder is made.
    """
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    imsave(draft, image, format="png")
    os.replace(draft, path)


class StripImages(SampleTable):
    """Writes the images of the module's `strips()` to PNG files and to TensorBoard.

    The files are `step=N.png` for the newest training batch and `step=N-val.png` for the newest validation batch.

    Args:
        every_n_steps: batches between two pictures.
        num_rows: images in each picture.
        folder: name of the folder of the files, in the run's folder.
        wrap: width in pixels at which a long strip goes on in the next line.

    Raises:
        ValueError: if a number is not positive, or the module has no strips.

    Note:
        The module must have `strips()`, which returns uint8 images (H,W) or (H,W,3) by name. A resumed run removes the
        files after the step it resumes from; a new run removes all of them.

    Example::

        Trainer(callbacks=[StripImages(every_n_steps=1000)])
    """

    def __init__(self, every_n_steps: int = 100, num_rows: int = 4, folder: str = "strips", wrap: int = 1024) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_rows", num_rows), ("wrap", wrap)):
            if value < 1:
                raise ValueError(f"callbacks.StripImages.{name} must be at least 1, got {value}")
        super().__init__(every_n_steps, num_rows, folder)
        self.wrap = wrap

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module has strips."""
        if stage == "fit" and not hasattr(pl_module, "strips"):
            raise ValueError(
                f"callbacks.StripImages needs a module with strips, and {type(pl_module).__name__} has none; "
                "take it out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove pictures of steps that will be run again."""
        folder = self._path(trainer)  # on all ranks, since log_dir is broadcast
        if trainer.is_global_zero:
            remove_later(folder, _NAME, trainer.global_step)

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        folder = self._path(trainer)  # on all ranks, since log_dir is broadcast
        strips: Any = pl_module.strips
        images: dict[str, Image] = strips() if trainer.is_global_zero else {}
        if not images:
            return
        step = trainer.global_step
        picture = stack_images(list(images.values())[: self.num_rows], self.wrap)
        write_png(picture, folder / f"step={step}{'' if split == 'train' else '-val'}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"{self.filename}/{split}", picture, step, dataformats="HWC")
