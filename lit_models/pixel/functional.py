"""Patches, targets, masks and losses of pixel language models, without any state.

Shapes: B strips, C channels, H rows of pixels, p pixels per side of a patch, L patches, T tokens, K = p·p·C values of a
patch in the order (row, column, channel). Masks hold 1 for what is attended. Targets and losses are float32 whatever
the dtype of the networks.
Sources: PixelGPT (arXiv 2404.10710), PIXEL (arXiv 2207.06991), PIXAR (arXiv 2401.03321).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_models.nn.logprobs import token_nll

PixelLoss = Literal["mse", "bce", "smooth_l1"]
ChannelMerge = Literal["mean", "sum"]

EPSILON = 1e-6
"""Added to the variance of a patch; a patch whose variance is above it has ink on it."""
TYPICAL_INK = (0.86, 0.28)
"""Mean and scale of inked patches in DejaVu Sans at 8 pt and 120 dpi, for strips that give none themselves."""


class MaskedMean(NamedTuple):
    """A mean that can still be taken over several batches or ranks.

    Args:
        total: sum over what counts, float32.
        number: number of what counts, () float32.
    """

    total: Tensor
    number: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean; 0 where nothing counts."""
        return self.total / self.number.clamp(min=1)


def _masked_mean(values: Tensor, counted: Tensor) -> MaskedMean:
    # Not a product, since what does not count may be infinite.
    return MaskedMean(torch.where(counted, values, 0.0).sum(), counted.sum().float())


# -- patches -----------------------------------------------------------------------------------------------------------


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1].

    Args:
        pixels: integers in [0, 255], or floats that already are in [0, 1]; any shape.
    """
    return pixels.float() if pixels.is_floating_point() else pixels.float() / 255


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: (B, C, H, W) in any dtype; H and W are multiples of `patch_size`.
        patch_size: p.

    Returns:
        (B, H/p · W/p, p·p·C), each patch in the order (row, column, channel).
    """
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    cut = images.unflatten(2, (rows, patch_size)).unflatten(4, (columns, patch_size))  # B, C, rows, p, columns, p
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, columns: int | None = None, fill: float = 1.0) -> Tensor:
    """Lay patches side by side, as one strip or wrapped for display.

    Args:
        patches: (B, L, p·p·C).
        patch_size: p.
        columns: patches per line; None for one strip.
        fill: value of the places left over on the last line.

    Returns:
        (B, C, p · lines, p · columns).
    """
    columns = columns or patches.shape[1]
    lines = -(-patches.shape[1] // max(1, columns))
    patches = F.pad(patches, (0, 0, 0, lines * columns - patches.shape[1]), value=fill)
    grid = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (lines, columns))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale of each patch, which normalisation removes.

    Args:
        patches: (..., K) in any floating dtype.

    Returns:
        Mean and sqrt(unbiased variance + 1e-6), both (..., 1) float32.
    """
    patches = patches.float()
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + EPSILON).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Take mean and scale out of each patch; a constant patch, black or white, becomes exactly 0.

    Args:
        patches: (..., K) in any floating dtype.

    Returns:
        (..., K) float32.
    """
    patches = patches.float()
    patches = patches - patches[..., :1]  # the mean of equal values is not always that value in floating point
    mean, scale = patch_statistics(patches)
    return (patches - mean) / scale


def denormalize_patches(normalized: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Give mean and scale back to normalised patches.

    Args:
        normalized: (..., K).
        mean: (..., 1), as `patch_statistics` returns it.
        scale: (..., 1).

    Returns:
        (..., K) float32, not clipped.
    """
    return normalized.float() * scale + mean


def pixel_targets(patches: Tensor, normalize: bool) -> Tensor:
    """What is to be predicted of each patch: normalised or plain pixels, (..., K) float32."""
    return normalize_patches(patches) if normalize else patches.float()


def inked(patches: Tensor) -> Tensor:
    """Patches with something on them: those whose unbiased variance is above 1e-6.

    Args:
        patches: (..., K) in [0, 1], in any floating dtype.

    Returns:
        (...) bool.
    """
    return patches.float().var(-1) > EPSILON


def separators(patches: Tensor) -> Tensor:
    """Patches that end a text: those that are black all over.

    Args:
        patches: (..., K) in [0, 1].

    Returns:
        (...) bool.
    """
    return patches.amax(-1) < 0.5 / 255


def recent_ink(patches: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale of the last attended patches with ink.

    Args:
        patches: (B, L, K) in [0, 1].
        mask: (B, L), 1 for attended patches.
        count: how many patches.

    Returns:
        Means and scales, both (B, count) float32 with the last patch in the last column, and the (B, count) bool mask
        of the columns that hold one.
    """
    length = patches.shape[1]
    places = torch.arange(length, device=patches.device)
    found = torch.where(inked(patches) & mask.bool(), places, -1)
    found = F.pad(found, (count, 0), value=-1).topk(count, dim=1).values.flip(1)
    mean, scale = (value.squeeze(-1).gather(1, found.clamp(min=0)) for value in patch_statistics(patches))
    return mean, scale, found >= 0


# -- masks and positions -----------------------------------------------------------------------------------------------


def pixel_mask(num_text_patches: Tensor, length: int) -> Tensor:
    """Mask of a strip: its text and the separator after it.

    Args:
        num_text_patches: (B,) int64.
        length: L.

    Returns:
        (B, L) int64 with min(num_text_patches + 1, L) ones.
    """
    places = torch.arange(length, device=num_text_patches.device)
    return (places <= num_text_patches[:, None]).long()


def is_right_padded(mask: Tensor) -> Tensor:
    """Whether in every row all ones come before all zeros, () bool."""
    return (mask[:, 1:] <= mask[:, :-1]).all()


def last_position(mask: Tensor) -> Tensor:
    """Column of the last attended position.

    Args:
        mask: (B, N).

    Returns:
        (B,) int64; 0 for a row without any.
    """
    return (torch.arange(mask.shape[1], device=mask.device) * mask.bool()).amax(1)


def pair_last_position(pixel_mask: Tensor, text_mask: Tensor, compact: bool) -> Tensor:
    """Position of the last token in the sequence of patches and tokens.

    Args:
        pixel_mask: (B, L).
        text_mask: (B, T), right padded.
        compact: whether padding was taken out between patches and tokens.

    Returns:
        (B,) int64.
    """
    last = last_position(text_mask)
    return last + (pixel_mask.bool().sum(1) if compact else pixel_mask.shape[1])


def official_pair_position(input_ids: Tensor, pad_token_id: int, num_patches: int) -> Tensor:
    """The position that the released code pools in a padded pair, which is wrong for rows without padding.

    Args:
        input_ids: (B, T) int64.
        pad_token_id: the padding is found by this id.
        num_patches: L.

    Returns:
        (B,) int64; L - 1, a patch, where no token is padding.
    """
    return num_patches + (input_ids == pad_token_id).long().argmax(1) - 1


def pair_sequence(
    pixel_mask: Tensor, text_mask: Tensor, compact: bool, text_first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Order in which the patches and tokens of a pair stand in one sequence.

    Args:
        pixel_mask: (B, L).
        text_mask: (B, T).
        compact: move padding of both to the end.
        text_first: (B,) bool, rows whose tokens come before the patches; None for no row.

    Returns:
        `order` and its inverse `place`, both (B, L+T) int64: element i of the sequence is entry `order[i]` of patches
        followed by tokens, and entry k of these is element `place[k]`.
    """
    rows = len(pixel_mask)
    is_text = torch.zeros(rows, pixel_mask.shape[1] + text_mask.shape[1], dtype=torch.bool, device=pixel_mask.device)
    is_text[:, pixel_mask.shape[1] :] = True
    rank = (is_text if text_first is None else is_text ^ text_first[:, None]).long()
    if compact:
        rank = rank.masked_fill(~torch.cat([pixel_mask, text_mask], 1).bool(), 2)
    order = rank.argsort(stable=True, dim=1)
    return order, order.argsort(1)


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents that share a strip.

    Args:
        document_ids: (B, L) int64, -1 at padding.

    Returns:
        (B, 1, L, L) bool, True where the row attends to the column. Padding attends to padding only, so that no row is
        without any column.
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :]))[:, None]


def target_mask(pixel_mask: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Patches that are predicted: attended ones, except the first of a strip or of a document in it.

    Args:
        pixel_mask: (B, L).
        document_ids: (B, L) int64, -1 at padding; None for one document per strip.

    Returns:
        (B, L) bool.
    """
    counted = F.pad(pixel_mask[:, 1:].bool(), (1, 0))
    if document_ids is not None:
        same = document_ids[:, 1:] == document_ids[:, :-1]
        counted &= F.pad(same, (1, 0)) & (document_ids >= 0)
    return counted


# -- losses ------------------------------------------------------------------------------------------------------------


def npp_loss(prediction: Tensor, target: Tensor, counted: Tensor, kind: PixelLoss = "mse") -> MaskedMean:
    """Loss of next-patch prediction, a mean over the values of each patch and over patches.

    Args:
        prediction: (B, L, K) in any floating dtype; entry i is about patch i+1, the last one about nothing. Logits if
            `kind` is "bce".
        target: (B, L, K) float32, see `pixel_targets`.
        counted: (B, L), patches to predict, see `target_mask`; column 0 is not read.
        kind: squared error, binary cross-entropy, or absolute error that is squared below 1.

    Returns:
        Sum over patches, and their number.
    """
    prediction, target = prediction[:, :-1].float(), target[:, 1:]
    if kind == "mse":
        loss = (prediction - target).square()
    elif kind == "bce":
        loss = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    else:
        loss = F.smooth_l1_loss(prediction, target, reduction="none")
    return _masked_mean(loss.mean(-1), counted[:, 1:].bool())


def ntp_loss(logits: Tensor, labels: Tensor) -> MaskedMean:
    """Cross-entropy of next-token prediction in nats.

    Args:
        logits: (B, T, V) in any floating dtype; entry j is about token j+1.
        labels: (B, T) int64, the tokens themselves, -100 where they don't count.

    Returns:
        Sum over tokens, and their number.
    """
    return _masked_mean(*token_nll(logits, labels))


def stop_loss(logits: Tensor, patches: Tensor, counted: Tensor) -> MaskedMean:
    """Logistic loss of telling whether the next patch is a separator.

    Args:
        logits: (B, L) in any floating dtype; entry i is about patch i+1.
        patches: (B, L, K) in [0, 1].
        counted: (B, L), see `target_mask`.

    Returns:
        Sum over patches, and their number.
    """
    ends = separators(patches[:, 1:]).float()
    loss = F.binary_cross_entropy_with_logits(logits[:, :-1].float(), ends, reduction="none")
    return _masked_mean(loss, counted[:, 1:].bool())


# -- trivial predictors ------------------------------------------------------------------------------------------------


def mean_patch(target: Tensor, counted: Tensor) -> MaskedMean:
    """The best constant prediction in the sense of the squared error.

    Args:
        target: (B, L, K) float32.
        counted: (B, L), see `target_mask`.

    Returns:
        Sum of the targets, (K,), and their number, so that the mean can be taken over much data.
    """
    counted = counted[:, 1:].bool()
    total = torch.where(counted[..., None], target[:, 1:], 0.0).sum((0, 1))
    return MaskedMean(total, counted.sum().float())


def baseline_losses(target: Tensor, counted: Tensor, constant: Tensor | None = None) -> dict[str, MaskedMean]:
    """Squared error of predictors that have learnt nothing, on the targets of the model.

    Args:
        target: (B, L, K) float32, see `pixel_targets`.
        counted: (B, L), see `target_mask`; and it with `inked` for patches with ink only.
        constant: (K,) patch that "mean" predicts, of training data for example; None for the mean of these targets.

    Returns:
        `copy`, which repeats the patch before, `zero` and `mean`. Over data seen in parts, the loss of their mean patch
        m is that of `zero` minus mean(m²).
    """
    constant = mean_patch(target, counted).mean if constant is None else constant
    guesses = {"copy": target, "zero": torch.zeros_like(target), "mean": constant.float().expand_as(target)}
    return {name: npp_loss(guess, target, counted) for name, guess in guesses.items()}


# -- channels ----------------------------------------------------------------------------------------------------------


def merge_kernel_channels(kernel: Tensor, mode: ChannelMerge) -> Tensor:
    """Make the kernel of a patch embedding one for grey strips.

    Args:
        kernel: (d, C, p, p).
        mode: "mean" as the released fine-tuning does; "sum" keeps the projection of grey input as it was.

    Returns:
        (d, 1, p, p).
    """
    return kernel.mean(1, keepdim=True) if mode == "mean" else kernel.sum(1, keepdim=True)


def merge_head_channels(weight: Tensor, channels: int) -> Tensor:
    """Make a pixel head predict grey patches: the mean of what it predicts for the channels.

    Args:
        weight: (p·p·C, d), rows in the order (row, column, channel).
        channels: C.

    Returns:
        (p·p, d).
    """
    return weight.unflatten(0, (-1, channels)).mean(1)
