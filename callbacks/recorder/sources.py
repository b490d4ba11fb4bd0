"""Which examples a training batch holds."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from callbacks.recorder.causal import OPTION
from callbacks.recorder.examples import entry, rows_in_whole


class IdSource:
    """Ids of the examples of training batches.

    Args:
        source: `batch`, `sampler` or a function from a batch to its ids.
        key: entry or attribute of batches that holds the ids, for `batch`.
    """

    def __init__(self, source: str | Callable[[Any], Any], key: str) -> None:
        self.source, self.key = source, key
        self._changed: list[tuple[DataLoader[Any], str, Any]] = []
        self._tap: _Tap | None = None
        self._rows: NDArray[np.int64] | None = None
        self._ids: Any = None

    @property
    def by_row(self) -> bool:
        """Whether ids are row numbers of the data set."""
        return self.source == "sampler"

    # -- watching samplers -------------------------------------------------------------------------------------------

    def watch(self, trainer: Trainer) -> None:
        """Have the training loader watched from before it begins, once the trainer has made it."""
        if not self.by_row:
            return
        process = trainer.strategy.process_dataloader

        def process_and_tap(loader: object) -> object:
            if trainer.training:
                self._put_tap(trainer, loader)
            return process(loader)

        vars(trainer.strategy)["process_dataloader"] = process_and_tap

    def _put_tap(self, trainer: Trainer, loader: object) -> None:
        key = f"{OPTION}.id_source: sampler"
        if not isinstance(loader, DataLoader):
            raise ValueError(f"{key} needs a torch DataLoader, got {type(loader).__name__}; use `batch` or a function")
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"{key} can't number the rows of the iterable {type(loader.dataset).__name__}; let the batches hold "
                "ids and use id_source: batch"
            )
        if not getattr(loader, "in_order", True):
            raise ValueError(f"{key} needs batches in the order they are drawn; set in_order=True, or use `batch`")
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        self._tap = _Tap(inner, lambda: bool(trainer.training))
        # A loader refuses other samplers since its iterators would not notice; this one has none yet.
        object.__setattr__(loader, name, self._tap)
        if getattr(loader, "_iterator", None) is not None:  # workers kept from an earlier run know another sampler
            loader._iterator = None
        self._changed.append((loader, name, inner))

    def start(self, trainer: Trainer) -> None:
        """Check the training loader.

        Raises:
            ValueError: if there are several and ids are row numbers.
        """
        loader: Any = trainer.train_dataloader
        if self.by_row:
            if not isinstance(loader, DataLoader):
                raise ValueError(
                    f"{OPTION}.id_source: sampler needs exactly one training loader; use `batch` or a function"
                )
            self._rows, _ = rows_in_whole(loader.dataset)

    def release(self, trainer: Trainer) -> None:
        """Leave strategy and loaders as they were."""
        vars(trainer.strategy).pop("process_dataloader", None)
        for loader, name, inner in self._changed:
            object.__setattr__(loader, name, inner)
        self._changed, self._tap = [], None

    # -- ids ---------------------------------------------------------------------------------------------------------

    def before(self, batch: Any) -> None:  # noqa: ANN401
        """Note what a batch holds before the module may change it."""
        self._ids = None if self.by_row else self.of(batch)

    def after(self) -> Any:  # noqa: ANN401
        """Ids of the batch that was trained on."""
        return self._drawn() if self.by_row else self._ids

    def of(self, batch: Any) -> Any:  # noqa: ANN401
        """Ids of a batch that holds them; tensors stay on their device.

        Raises:
            ValueError: if the batch has none.
        """
        ids = self.source(batch) if callable(self.source) else entry(batch, self.key)
        if ids is None:
            held = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"{OPTION}.id_key: training batches hold no {self.key!r} but {held}; let the data give ids, set "
                "id_key, or use id_source: sampler"
            )
        return ids.detach().clone() if isinstance(ids, Tensor) else np.array(ids)

    def _drawn(self) -> NDArray[np.int64]:
        """Ids of the oldest batch that the sampler gave and nothing was trained on."""
        if self._tap is None or not self._tap.batches:
            raise ValueError(
                f"{OPTION}.id_source: sampler saw no rows for this batch, so it comes from elsewhere; use `batch` or "
                "a function"
            )
        rows = np.asarray(self._tap.batches.popleft(), np.int64).reshape(-1)
        return rows if self._rows is None else self._rows[rows]


class _Tap:
    """Stands before a sampler and keeps what it drew until it is trained on.

    Loaders draw ahead for their workers, and so does the trainer where the data has no length; batches come out in the
    order they were drawn.

    Args:
        inner: batch sampler, or sampler of single rows.
        training: whether rows are being drawn for training and not for validation with the same loader.
    """

    def __init__(self, inner: Any, training: Callable[[], bool]) -> None:  # noqa: ANN401
        self._inner, self._training = inner, training
        self.batches: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        """What the inner sampler gives."""
        if not self._training():
            yield from self._inner
            return
        # A new pass; what an abandoned one drew ahead was never trained on.
        batches: deque[Any] = deque()
        self.batches = batches
        for rows in self._inner:
            batches.append(rows)
            yield rows

    def __len__(self) -> int:
        """Length of the inner sampler."""
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)
