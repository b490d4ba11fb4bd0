"""How long a run needs to stop."""

import time

UNKNOWN_SAVE_S = 120.0
"""Seconds that writing a checkpoint is taken to need before the first one was written."""


class Pace:
    """How long batches and checkpoints take, learnt while they pass."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._save_begun: float | None = None
        self.batch_s = 0.0  # longest of the recent ones
        self.save_s: float | None = None

    def lap(self, counts: bool = True) -> None:
        """Note that a batch, or something else, has ended."""
        now = time.monotonic()
        if self._save_begun is not None:
            self.save_s = max(now - self._save_begun, self.save_s or 0.0)
        elif counts and self._last is not None:
            self.batch_s = max(now - self._last, 0.95 * self.batch_s)  # forgets a long first batch slowly
        self._last, self._save_begun = now, None

    def begin_save(self) -> None:
        """Note that a checkpoint is begun; the next lap ends it."""
        self._save_begun = self._save_begun or time.monotonic()

    def margin(self) -> float:
        """Seconds that stopping needs for sure."""
        save_s = UNKNOWN_SAVE_S if self.save_s is None else self.save_s
        return 60.0 + 2 * self.batch_s + 2 * save_s
