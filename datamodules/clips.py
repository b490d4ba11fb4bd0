"""What data modules of sounds with texts share: random draws, crops, texts and batches."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from datamodules.base import Collator, LitData
from datamodules.loaders import ResumableLoader, ResumableSampler

Draw: TypeAlias = tuple[int, int, int]
"""Row number, epoch and pass."""
PromptFormat: TypeAlias = Literal["free", "tags", "mixed"]


class DrawSampler(ResumableSampler):
    """Row numbers as `ResumableSampler` gives them, each with epoch and pass, from which its random choices follow."""

    def __iter__(self) -> Iterator[Any]:
        """(row number, epoch, pass) from the position to the end of the pass."""
        place = self.position  # moves on while batches are taken, so it is read before the first one
        epoch, pass_ = place.epoch, place.pass_
        for row in super().__iter__():
            yield row, epoch, pass_


def generators(seeds: Sequence[int]) -> tuple[np.random.Generator, np.random.Generator]:
    """Generators for sound and for text, so that options of one do not change the other.

    Args:
        seeds: non-negative numbers from which both follow.

    Returns:
        The two generators.
    """
    sound, text = np.random.SeedSequence(list(seeds)).spawn(2)
    return np.random.default_rng(sound), np.random.default_rng(text)


def random_crop(
    samples: int, length: int, gain_db: float, flip: bool, rng: np.random.Generator
) -> tuple[int, np.float32]:
    """Draw a crop and its gain.

    Args:
        samples: of the whole sound.
        length: of the crop; a crop reaches beyond the end only if the sound is shorter.
        gain_db: the crop is made quieter by 0 to this.
        flip: turn half of the crops upside down.
        rng: takes three numbers from it, whatever the options are.

    Returns:
        First sample and factor, negative for a crop that is turned.
    """
    place, loss, sign = rng.random(3)
    first = int(place * (max(samples - length, 0) + 1))
    return first, np.float32(10 ** (-loss * gain_db / 20) * (-1 if flip and sign < 0.5 else 1))


def choose_format(prompt_format: PromptFormat, rng: np.random.Generator) -> Literal["free", "tags"]:
    """Decide what the text of an example is made of.

    Args:
        prompt_format: `mixed` is either with equal probability.
        rng: takes a number from it if it is `mixed`.

    Returns:
        `free` or `tags`.
    """
    if prompt_format == "mixed":
        return "free" if rng.random() < 0.5 else "tags"
    return prompt_format


def join_tags(tags: Sequence[str], rng: np.random.Generator | None) -> str:
    """Write tags as a text.

    Args:
        tags: the tags.
        rng: puts them into random order; None keeps theirs.

    Returns:
        The tags, joined by commas.
    """
    words = list(tags)
    if rng is not None:
        rng.shuffle(words)
    return ", ".join(words)


def collate_clips(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put examples into a batch.

    Args:
        rows: examples with `audio` (C,T), `text`, `valid_length`, `index` and `columns`, or prompts with `text`,
            `index` and perhaps `seconds`.

    Returns:
        The batch: `audio` (B,C,T) float32, `text` list[str], `valid_length` and `index` (B,) int64 and `columns`, a
        dict of lists; of prompts `text`, `index` and `seconds` (B,) float32.
    """
    # Tensors first: the trainer takes the size of a batch from the first thing in it.
    batch: dict[str, Any] = {"index": torch.tensor([row["index"] for row in rows])}
    if "audio" in rows[0]:
        batch["audio"] = torch.stack([row["audio"] for row in rows])
        batch["valid_length"] = torch.tensor([row["valid_length"] for row in rows])
        batch["columns"] = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
    if "seconds" in rows[0]:
        batch["seconds"] = torch.tensor([row["seconds"] for row in rows], dtype=torch.float32)
    return batch | {"text": [row["text"] for row in rows]}


class ClipData(LitData):
    """Base class of data modules of sounds with texts; training examples are random crops.

    Args:
        sample_rate: Hz.
        channels: of an example.
        length: samples of an example.
        batch_size: training examples per batch and rank.
        val_batch_size: examples per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the examples and of random crops and texts.

    Raises:
        ValueError: naming the key, if a number is too small.
    """

    def __init__(
        self,
        sample_rate: int,
        channels: int,
        length: int,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed)
        check_least(("sample_rate", sample_rate, 1), ("channels", channels, 1), ("length", length, 1))
        self.sample_rate, self.channels, self.length = sample_rate, channels, length

    def collator(self) -> Collator:
        """Function from examples to a batch."""
        return collate_clips

    def train_dataloader(self) -> ResumableLoader:
        """Loader of random crops of the training clips."""
        dataset = self._dataset("train")
        loader = ResumableLoader(
            dataset,
            self.batch_size,
            sampler=DrawSampler(dataset, self.batch_size, seed=self.seed),
            collate_fn=self.collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # not the global one
        )
        return self._follow(loader)


def check_least(*numbers: tuple[str, float | None, float]) -> None:
    """Check numbers of the configuration.

    Args:
        numbers: key, value and the least that is allowed; None is always allowed.

    Raises:
        ValueError: naming the first key whose value is smaller, or no number.
    """
    for key, value, least in numbers:
        if value is not None and not value >= least:
            raise ValueError(f"data.{key}: {value} must be at least {least}")
