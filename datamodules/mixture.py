"""Which mode (images, tokens, both) every batch has, and the loaders that know it."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from datamodules.loaders import EvaluationSampler, EvenBatches, ResumableSampler

Mode: TypeAlias = Literal["image", "text", "pair"]
Index: TypeAlias = tuple[int, Mode]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_modes(modes: Sequence[str], key: str) -> tuple[Mode, ...]:
    """Check names of modes.

    Args:
        modes: the names.
        key: configuration key they come from.

    Returns:
        The modes.

    Raises:
        ValueError: if there is none or one is unknown.
    """
    if not modes:
        raise ValueError(f"{key}: name at least one of {', '.join(MODES)}")
    for name in modes:
        if name not in MODES:
            raise ValueError(f"{key}: {name!r} is not one of {', '.join(MODES)}")
    return tuple(mode for name in modes for mode in MODES if mode == name)


class Mixture:
    """The mode of every batch, the same on all ranks and for every number of ranks and workers.

    Batch k of a pass draws its mode from a generator of its own, seeded by (seed, epoch, pass, k). With gradient
    accumulation every micro-batch is a batch. All batches are equally large, so shares count sequences.

    Args:
        modes: mode -> share, such as `{image: 4, text: 4, pair: 2}`; or the modes of successive batches, such as
            `[image, text, image, text, pair]`, a cycle that begins anew with every pass.
        seed: seed of the draws.

    Raises:
        ValueError: if a mode is unknown, a share negative or none positive.
    """

    def __init__(self, modes: Mapping[str, float] | Sequence[str], seed: int) -> None:
        names = check_modes(list(modes), "data.modes")
        self.seed = seed
        self._cycle: tuple[Mode, ...] | None = None
        shares = dict.fromkeys(MODES, 0.0)
        if isinstance(modes, Mapping):
            shares |= {mode: float(modes[mode]) for mode in names}
        else:
            self._cycle = names
            for mode in names:
                shares[mode] += 1
        if min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf"):
            raise ValueError(f"data.modes: {dict(modes)} must be shares >= 0 of which one is positive")  # type: ignore[arg-type]
        total = sum(shares.values())
        self.shares: dict[Mode, float] = {mode: shares[mode] / total for mode in MODES if shares[mode] > 0}
        self._bounds = np.cumsum(list(self.shares.values()))[:-1]

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes that occur."""
        return tuple(self.shares)

    def mode(self, epoch: int, pass_: int, batch: int) -> Mode:
        """Mode of one batch.

        Args:
            epoch: epoch of the trainer.
            pass_: number of the pass through the data in this epoch.
            batch: number of the batch in this pass.
        """
        if self._cycle is not None:
            return self._cycle[batch % len(self._cycle)]
        draw = np.random.default_rng([self.seed, epoch, pass_, batch]).random()
        return self.modes[int(np.searchsorted(self._bounds, draw, side="right"))]


class MixtureSampler(ResumableSampler):
    """Row numbers as `ResumableSampler` gives them, each with the mode of its batch.

    Args:
        data_source: data set with a length.
        batch_size: rows per batch and rank.
        mixture: modes of the batches.
        seed: seed of the orders.
    """

    def __init__(self, data_source: Sized, batch_size: int, mixture: Mixture, seed: int = 0) -> None:
        super().__init__(data_source, batch_size, seed=seed)
        self.mixture = mixture

    def __iter__(self) -> Iterator[Any]:
        """(row number, mode) from the position to the end of the pass."""
        place = self.position  # moves on while batches are taken, so it is read before the first one
        epoch, pass_, first = place.epoch, place.pass_, place.batches
        mode = self.mixture.mode(epoch, pass_, first)
        for number, row in enumerate(super().__iter__()):
            if number % self.batch_size == 0:
                mode = self.mixture.mode(epoch, pass_, first + number // self.batch_size)
            yield row, mode


class EvaluationBatches(EvaluationSampler):
    """Every row exactly once in every mode, over all ranks together, as whole batches of one mode.

    The batches of a mode hold the rows in their order; those of all modes alternate, so that the first batches of an
    evaluation show all modes. A loader of it has `batch_size=None`.

    Args:
        data_source: data set with a length.
        batch_size: most rows per batch and rank.
        modes: the modes.
        even: give all ranks equally many batches; see `datamodules.loaders.EvenBatches`.

    Raises:
        ValueError: if the batches cannot be divided evenly.
    """

    def __init__(self, data_source: Sized, batch_size: int, modes: Sequence[Mode], even: bool = False) -> None:
        super().__init__(data_source)
        self.modes = tuple(modes)
        starts = range(0, len(self.order), batch_size)
        self.batches = [list(self.order[start : start + batch_size]) for start in starts]
        if even:
            self.batches = EvenBatches(data_source, batch_size).batches

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.batches) * len(self.modes)

    def __iter__(self) -> Iterator[Any]:
        """Lists of (row number, mode)."""
        for rows in self.batches:
            for mode in self.modes:
                yield [(row, mode) for row in rows]
