"""A renderer whose pixels can be computed in the head."""

import numpy as np

from datamodules.rendering.base import MARGIN, Line, Renderer


class Bars(Renderer):
    """Draws every character as a bar of 6 of 8 pixels whose shade is its code point; a blank is white."""

    step = 8

    def __init__(self, max_seq_length=8, patch_size=8, channels=1, shade=0):
        super().__init__(max_seq_length, patch_size, channels)
        self.shade = shade

    def _ink(self, text):
        codes = np.array([0 if c == " " else (ord(c) + self.shade) % 200 + 20 for c in text], np.uint8)
        ink = np.zeros((len(text), self.step), np.uint8)
        ink[:, :6] = codes[:, None]
        columns = np.broadcast_to(ink.reshape(-1, 1), (ink.size, self.height))
        return columns if self.channels == 1 else np.repeat(columns[..., None], 3, axis=2)

    def line(self, text, limit, offsets=False):
        ink = self._ink(text)
        blank = np.zeros((MARGIN, *ink.shape[1:]), np.uint8)
        return Line(np.concatenate([blank, ink]), MARGIN + len(ink) + MARGIN)

    def word(self, text, last):
        ink = self._ink(text)
        return ink, len(ink) + (0 if last else self.step)

    def fingerprint(self):
        return {"backend": "bars", "patch_size": str(self.patch_size), "shade": str(self.shade)}
