"""Base class of the data modules."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from datamodules.loaders import ResumableLoader, evaluation_loader, train_loader
from datamodules.positions import TrainerProgress

Split: TypeAlias = Literal["train", "val", "test", "predict"]
Collator: TypeAlias = Callable[[list[Any]], dict[str, Any]]
_NEEDED: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class LitData(LightningDataModule):
    """Loaders over the data sets that a subclass builds.

    A subclass implements `build(split)` and `collator()`. The training loader shuffles, drops the last incomplete
    global batch and continues exactly where a checkpoint left it; the other loaders give every row once, in order.
    Ranks share the rows; which rows make a global batch does not depend on their number.

    Args:
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows.
    """

    def __init__(
        self, batch_size: int = 8, val_batch_size: int | None = None, num_workers: int = 0, seed: int = 1234
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"data.{key}: {value} must be at least 1")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.datasets: dict[Split, Any] = {}

    def build(self, split: Split) -> Any:  # noqa: ANN401
        """Build the data set of one split.

        Args:
            split: which one.

        Returns:
            A data set, or None if the user asked for none.
        """
        raise NotImplementedError

    def collator(self) -> Collator:
        """Function from rows of a data set to a batch.

        It travels to the worker processes, so it must not be a method of the data module.

        Returns:
            The function; the subclass documents the keys of the batch.
        """
        raise NotImplementedError

    @property
    def even(self) -> bool:
        """Whether all ranks must evaluate equally many batches: sharded networks communicate in each of them."""
        return self.trainer is not None and isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy))

    def setup(self, stage: str) -> None:
        """Build the data sets of a stage that are not there yet.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
        """
        for split in _NEEDED[stage]:
            if split not in self.datasets and (dataset := self.build(split)) is not None:
                self.datasets[split] = dataset

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the training rows."""
        options: dict[str, Any] = {"collate_fn": self.collator(), "num_workers": self.num_workers}
        return self._follow(train_loader(self._dataset("train"), self.batch_size, self.seed, **options))

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Loader of the validation rows; none while fitting without a validation split."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fitting or "val" in self.datasets:
            return self._evaluation("val")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """Loader of the test rows."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loader of the rows to predict."""
        return self._evaluation("predict")

    def _evaluation(self, split: Split) -> DataLoader[Any]:
        options = {"collate_fn": self.collator(), "num_workers": self.num_workers}
        return evaluation_loader(self._dataset(split), self.val_batch_size, self.even, **options)

    def _dataset(self, split: Split) -> Any:  # noqa: ANN401
        if split not in self.datasets:
            key = "data.test_split or data.val_split" if split == "predict" else f"data.{split}_split"
            raise ValueError(f"{key}: this data module has no rows for {split}; set it to the split to use")
        return self.datasets[split]

    def _follow(self, loader: ResumableLoader) -> ResumableLoader:
        """Let the position of a loader be that of the batches which the trainer has taken."""
        if self.trainer is not None and loader.position is not None:
            loader.position.follow(TrainerProgress(self.trainer))
        return loader
