"""Macro actions as text."""

from typing import TYPE_CHECKING

from lit_models.ppo.macro.offsets import decode, rows_of, token_ends
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def macro_texts(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Cut responses into their macro actions, each with its advantage.

    Args:
        rollout: with `segment_ids` and `advantages`.
        tokenizer: of the policy.

    Returns:
        Text per row, such as `The film [+0.12] | is dull. [-0.40]`. Whitespace at the borders is shown as it is, and
        special tokens write nothing.

    Raises:
        ValueError: if the rollout was not cut.
    """
    if rollout.segment_ids is None or rollout.advantages is None:
        raise ValueError("the rollout has no macro actions; take its advantages with MacroGAE first")
    ids = rows_of(rollout.response_ids, rollout.response_mask)
    texts, ends = decode(tokenizer, ids), token_ends(tokenizer, ids)
    shown = []
    for row, (text, row_ends) in enumerate(zip(texts, ends, strict=True)):
        keep = rollout.response_mask[row].bool()
        segments = rollout.segment_ids[row][keep].tolist()
        advantages = rollout.advantages[row][keep].tolist()
        pieces, start = [], 0
        for token, segment in enumerate(segments):
            if token + 1 == len(segments) or segments[token + 1] != segment:
                pieces.append(f"{text[start : row_ends[token]]} [{advantages[token]:+.2f}]")
                start = row_ends[token]
        shown.append(" | ".join(pieces))
    return shown
