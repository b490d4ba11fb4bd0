"""Losses and scores of reward models, on per-token scores and without any state.

Shapes: B pairs, T columns. A pair batch has 2B rows, the B chosen texts first, then the B rejected ones in the same
order, padded together on the right. `lengths` hold for every row the column right after its last token.
Sources: Bradley-Terry loss on the last token (Ouyang et al., 2022), per-token loss (DeepSpeed-Chat, MA-RLHF),
RLHF base.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def end_index(mask_or_lengths: Tensor) -> Tensor:
    """Column right after the last token of each row.

    Args:
        mask_or_lengths: (B, T) attention mask with padding on either side or both; or (B,) lengths of right-padded
            rows, which come back as they are.

    Returns:
        (B,) int64; 0 for a row without tokens.
    """
    if mask_or_lengths.ndim == 1:
        return mask_or_lengths.long()
    order = torch.arange(1, mask_or_lengths.shape[1] + 1, device=mask_or_lengths.device)
    return (mask_or_lengths.bool() * order).amax(1)


def pad_end(input_ids: Tensor, pad_id: int, num_padding_at_beginning: int = 0) -> Tensor:
    """Column of the first padding token after the text, found by its id.

    For data that comes without an attention mask; with one, `end_index` also works when texts contain `pad_id`.

    Args:
        input_ids: (B, T) int64, right padded.
        pad_id: Padding token.
        num_padding_at_beginning: Number of padding tokens that open every text (1 for OPT tokenizers).

    Returns:
        (B,) int64; T for rows that are full.
    """
    padding = input_ids == pad_id
    in_text = padding.cumsum(1) <= num_padding_at_beginning
    return in_text.sum(1)


def end_scores(scores: Tensor, lengths: Tensor) -> Tensor:
    """Score of each text, which is the one at its last token.

    Args:
        scores: (B, T) in any floating dtype.
        lengths: (B,) int64, at least 1.

    Returns:
        (B,) float32.
    """
    return scores.float().gather(1, lengths[:, None] - 1).squeeze(1)


def divergence(
    ids_chosen: Tensor, ids_rejected: Tensor, lengths_chosen: Tensor, lengths_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """Columns in which the two texts of a pair are compared: from their first difference to the end of the longer.

    Two identical texts are compared in the last column alone.

    Args:
        ids_chosen: (B, T) int64.
        ids_rejected: (B, T) int64.
        lengths_chosen: (B,) int64.
        lengths_rejected: (B,) int64.

    Returns:
        First column and the column after the last one, both (B,) int64.

    Raises:
        ValueError: If two texts differ in their first token, so that they share no prompt.
    """
    columns = ids_chosen.shape[1]
    differs = ids_chosen != ids_rejected
    identical = ~differs.any(1)
    first = torch.where(identical, columns - 1, differs.long().argmax(1))
    end = torch.where(identical, columns, torch.maximum(lengths_chosen, lengths_rejected))
    if (first == 0).any():
        row = int((first == 0).long().argmax())
        raise ValueError(f"Pair {row} has no common prompt: its texts must begin with the same token.")
    return first, end


def end_token_loss(
    scores: Tensor, lengths: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of the scores at the last tokens, averaged over pairs.

    Args:
        scores: (2B, T), chosen rows first.
        lengths: (2B,) int64.
        margin: (B,) by how much the chosen score should at least be higher; None for 0.
        center_coefficient: Weight of the squared sum of the two scores, which keeps scores around 0
            (Eisenstein et al., 2023).

    Returns:
        float32 scalar.
    """
    chosen, rejected = end_scores(scores, lengths).chunk(2)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin.float()
    loss = -logsigmoid(difference).mean()
    if center_coefficient:
        loss = loss + center_coefficient * (chosen + rejected).square().mean()
    return loss


def per_token_loss(scores: Tensor, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bradley-Terry loss in all columns from the first difference on, averaged over columns, then over pairs.

    Where one text is longer, its scores are compared with those the other one has at padding.

    Args:
        scores: (2B, T), chosen rows first.
        input_ids: (2B, T) int64.
        lengths: (2B,) int64.

    Returns:
        Loss, a float32 scalar; and the mean scores over the compared columns of the chosen and of the rejected
        texts, both (B,) float32.

    Raises:
        ValueError: If the two texts of a pair differ in their first token.
    """
    first, end = divergence(*input_ids.chunk(2), *lengths.chunk(2))
    columns = torch.arange(scores.shape[1], device=scores.device)
    compared = (columns >= first[:, None]) & (columns < end[:, None])
    chosen, rejected = scores.float().chunk(2)
    count = compared.sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(compared, values, 0.0).sum(1) / count

    return mean(-logsigmoid(chosen - rejected)).mean(), mean(chosen), mean(rejected)


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """How well scores order the pairs.

    Args:
        chosen: (B,) scores of the chosen texts.
        rejected: (B,) scores of the rejected texts.

    Returns:
        float32 scalars: `accuracy` (share of pairs with the chosen score strictly higher), `chosen_mean`,
        `rejected_mean` and `margin` (mean difference).
    """
    chosen, rejected = chosen.float(), rejected.float()
    return {
        "accuracy": (chosen > rejected).float().mean(),
        "chosen_mean": chosen.mean(),
        "rejected_mean": rejected.mean(),
        "margin": (chosen - rejected).mean(),
    }
