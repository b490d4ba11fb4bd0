"""Tokenisation of prompts and of prompts with answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = NDArray[np.int32]


class Encoder:
    """Text to ids: the beginning token only where the tokenizer itself adds it, the end token exactly once.

    Args:
        tokenizer: fast tokenizer with an end-of-sequence token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        probe = tokenizer("a")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self.prefix: list[int] = probe[:1] if adds_bos else []

    def encode(self, texts: Sequence[str], end: bool, max_length: int | None = None) -> list[Ids]:
        """Tokenise texts in one call.

        Args:
            texts: the texts.
            end: append the end-of-sequence token to texts that do not end with it.
            max_length: keep only so many tokens; None keeps all.

        Returns:
            Ids of every text, int32.
        """
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [self._finish(ids, end)[:max_length] for ids in rows]

    def encode_pairs(
        self, prompts: Sequence[str], answers: Sequence[str], max_length: int | None = None
    ) -> tuple[list[Ids], list[int]]:
        """Tokenise prompts with their answers as one text each, ended by the end-of-sequence token.

        Args:
            prompts: the prompts.
            answers: as many answers.
            max_length: keep only so many tokens; None keeps all.

        Returns:
            Ids of every text, int32, and the number of tokens before the answer's first one. A token that spans the
            border belongs to the prompt.

        Raises:
            ValueError: if the tokenizer cannot tell where its tokens begin.
        """
        if not prompts:
            return [], []
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"data.tokenizer: {self.tokenizer.name_or_path!r} is not a fast tokenizer, so the answer's tokens "
                "cannot be found; use one with a tokenizer.json or set data.loss_on to all"
            )
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows, borders = [], []
        for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts = np.array([start for start, _ in offsets], dtype=np.int64)
            rows.append(self._finish(ids, True)[:max_length])
            borders.append(len(self._missing_prefix(ids)) + int(np.count_nonzero(starts < len(prompt))))
        return rows, borders

    def _missing_prefix(self, ids: list[int]) -> list[int]:
        return [] if ids[:1] == self.prefix else self.prefix  # chat templates write the beginning token themselves

    def _finish(self, ids: list[int], end: bool) -> Ids:
        eos = self.tokenizer.eos_token_id
        suffix = [eos] if end and ids[-1:] != [eos] else []
        return np.array([*self._missing_prefix(ids), *ids, *suffix], dtype=np.int32)
