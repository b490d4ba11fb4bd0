"""Continuing strips patch by patch, and reading strips token by token.

Shapes: B strips, C channels, H rows of pixels, p pixels per side of a patch, L patches of the given strips, N new
patches or tokens, K = p·p·C, V vocabulary entries.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_models.pixel import functional

STOP_BELOW = 0.1
"""A predicted patch with a lower mean is the separator."""


class Continuation(NamedTuple):
    """New patches of strips.

    Args:
        patches: (B, N, K) float32 in [0, 1]; white after the end of a row.
        mask: (B, N) int64, 1 for new patches, the separator included.
        pixel_values: (B, C, H, (L+N)·p) float32, the attended part of each strip, its continuation, and white.
        pixel_mask: (B, L+N) int64, mask of that.
    """

    patches: Tensor
    mask: Tensor
    pixel_values: Tensor
    pixel_mask: Tensor


def pick_tokens(
    logits: Tensor,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token per row.

    Args:
        logits: (B, V) in any floating dtype.
        do_sample: draw at random; the most likely token otherwise.
        temperature: divisor of the logits.
        top_k: draw among the k most likely tokens; None for all.
        top_p: draw among the most likely tokens that hold this probability; 1 for all.
        generator: source of the random numbers, on any device; torch's default one on the CPU if None.

    Returns:
        (B,) int64.
    """
    if not do_sample:
        return logits.argmax(-1)
    ordered, tokens = (logits.float() / temperature).sort(dim=-1, descending=True)
    probabilities = ordered[:, :top_k].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(len(logits), 1, generator=generator, device=device).to(logits.device)
    place = torch.searchsorted(cumulative, uniform * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # where rounding goes past the last possible token
    return tokens.gather(1, torch.minimum(place, last)).squeeze(1)


class _Ink:
    """Mean and contrast to give to predictions that were made without them."""

    def __init__(self, patches: Tensor, mask: Tensor, count: int) -> None:
        self.mean, self.scale, self.found = functional.recent_ink(patches, mask, count)

    def apply(self, prediction: Tensor) -> Tensor:
        """De-normalise (B, K) by the average of what was found, or as usual text where nothing was."""
        number = self.found.sum(1, keepdim=True)
        mean, scale = (
            torch.where(number > 0, (values * self.found).sum(1, keepdim=True) / number.clamp(min=1), usual)
            for values, usual in zip((self.mean, self.scale), functional.TYPICAL_INK, strict=True)
        )
        return functional.denormalize_patches(prediction, mean, scale)

    def add(self, patches: Tensor) -> None:
        """Move on by new patches (B, K) where these have ink."""
        new = functional.inked(patches)[:, None]
        statistics = functional.patch_statistics(patches)
        self.mean, self.scale, self.found = (
            torch.where(new, torch.cat([old[:, 1:], value], 1), old)
            for old, value in ((self.mean, statistics[0]), (self.scale, statistics[1]), (self.found, new))
        )


class PixelGeneration:
    """Generation for `PixelForCausalLM`, with keys and values cached; one forward pass per new patch or token."""

    config: Any

    @torch.no_grad()
    def continue_strip(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        max_new_patches: int = 32,
        ink_patches: int = 8,
        ink: Literal["running", "prompt"] = "running",
        binarize: bool = False,
        all_done: Callable[[bool], bool] = bool,
    ) -> Continuation:
        """Write on: predict the next patch, append it, and so forth.

        A strip ends after `max_new_patches`, where a stop head says that the separator comes, or, for plain pixels,
        with a patch that is almost black. Models of normalised patches predict neither mean nor contrast; these are
        averages over the last patches with ink. A squared error makes predictions blurred, which adds up over steps;
        `binarize` stops that.

        Args:
            pixel_values: (B, C, H, L·p), uint8 with white 255, or floating with white 1.
            pixel_mask: (B, L), what to continue; leave the separator out. Rows may differ in length.
            max_new_patches: patches at most.
            ink_patches: how many patches give mean and contrast.
            ink: whether new patches count among these, or only those of the prompt, so that contrast can't fade.
            binarize: make new pixels black or white.
            all_done: turns "this process has finished" into "all processes have", for sharded models.

        Returns:
            The new patches.

        Raises:
            ValueError: if a strip has several rows of patches or nothing to continue, or a number is not positive.
        """
        config = self.config
        if config.image_size[0] != config.patch_size:
            raise ValueError("image_size: only strips of one row of patches can be continued")
        if max_new_patches < 1 or ink_patches < 1:
            raise ValueError(
                f"max_new_patches and ink_patches must be positive, got {max_new_patches} and {ink_patches}"
            )
        if pixel_mask is None:
            pixel_mask = _ones(pixel_values, pixel_values.shape[3] // config.patch_size)
        if not bool(pixel_mask.any(1).all()):
            raise ValueError("pixel_mask: a strip without any attended patch can't be continued")
        mask = pixel_mask.long()
        with _evaluating(self) as model:
            output = model(pixel_values=pixel_values, pixel_mask=mask, use_cache=True, return_loss=False)
            prompt = output.patches
            last = functional.last_position(mask)
            prediction, stop = _at(output.pixel_pred, last), _at(output.stop_logits, last)
            statistics = _Ink(prompt, mask, ink_patches)
            position = last[:, None] + 1
            alive = torch.ones_like(last, dtype=torch.bool)
            patches, steps = [], []
            for step in range(max_new_patches):
                patch, ends = self._decode(prediction, stop, statistics, binarize)
                patch = torch.where(alive[:, None], patch, 1.0)
                patches.append(patch)
                steps.append(alive)
                if ink == "running":
                    statistics.add(patch)
                alive = alive & ~ends
                if step + 1 == max_new_patches or all_done(not bool(alive.any())):
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                output = model(
                    pixel_values=functional.unpatchify(patch[:, None], config.patch_size),
                    pixel_mask=mask,
                    position_ids=position + step,
                    cache=output.cache,
                    use_cache=True,
                    return_loss=False,
                )
                prediction, stop = _at(output.pixel_pred), _at(output.stop_logits)
        return self._continuation(prompt, pixel_mask, torch.stack(patches, 1), torch.stack(steps, 1).long())

    def _decode(
        self, prediction: Tensor, stop: Tensor | None, statistics: _Ink, binarize: bool
    ) -> tuple[Tensor, Tensor]:
        """Patch (B, K) in [0, 1] of a prediction, and the rows (B,) bool that it ends."""
        prediction = prediction.float()
        if self.config.norm_pix_loss:
            patch = statistics.apply(prediction)
        else:
            patch = prediction.sigmoid() if self.config.pixel_loss == "bce" else prediction
        patch = patch.clamp(0, 1)
        if binarize:
            patch = (patch > 0.5).float()
        # Normalised predictions say nothing about blackness.
        ends = torch.zeros_like(patch[:, 0], dtype=torch.bool)
        if not self.config.norm_pix_loss:
            ends = patch.mean(-1) < STOP_BELOW
        if stop is not None:
            ends = ends | (stop > 0)
        return torch.where(ends[:, None], 0.0, patch), ends

    def _continuation(self, prompt: Tensor, pixel_mask: Tensor, patches: Tensor, mask: Tensor) -> Continuation:
        """Put prompts and new patches together without the padding between them."""
        size, length = self.config.patch_size, prompt.shape[1] + patches.shape[1]
        both = torch.cat([pixel_mask.long(), mask], 1)
        order, _ = functional.pair_sequence(pixel_mask, mask, compact=True)
        whole = torch.cat([prompt, patches], 1).gather(1, order[..., None].expand(-1, -1, prompt.shape[2]))
        whole_mask = (torch.arange(length, device=both.device) < both.sum(1, keepdim=True)).long()
        whole = torch.where(whole_mask[..., None].bool(), whole, 1.0)
        return Continuation(patches, mask, functional.unpatchify(whole, size), whole_mask)

    @torch.no_grad()
    def read(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        all_done: Callable[[bool], bool] = bool,
    ) -> Tensor:
        """Read strips: generate the tokens of a text from its image, as in a pair whose text is not known.

        Args:
            pixel_values: (B, C, H, L·p), uint8 with white 255, or floating with white 1.
            pixel_mask: (B, L), all ones by default. Rows may differ in length.
            max_new_tokens: tokens at most.
            do_sample: see `pick_tokens`.
            temperature: see there.
            top_k: see there.
            top_p: see there.
            generator: see there.
            all_done: see `continue_strip`.

        Returns:
            (B, N) int64 with N up to `max_new_tokens`: the tokens after the beginning of text, with the end of text,
            and padding after it.

        Raises:
            ValueError: if an option is out of its range or the model puts text before images.
        """
        config = self.config
        if config.pair_order == "text_image":
            raise ValueError("pair_order: a model of text_image can't read, since its tokens never see patches")
        if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
            raise ValueError(
                "max_new_tokens and top_k must be at least 1, temperature above 0 and top_p in (0, 1], got "
                f"{max_new_tokens}, {top_k}, {temperature} and {top_p}"
            )
        if config.bos_token_id is None or config.eos_token_id is None:
            raise ValueError("bos_token_id and eos_token_id must be set in the configuration for reading")
        ends = torch.tensor(config.eos_token_id, device=pixel_values.device).view(-1)
        pad = ends[0] if config.pad_token_id is None else config.pad_token_id
        start = _ones(pixel_values, 1)
        done = torch.zeros_like(start[:, 0], dtype=torch.bool)
        tokens = []
        with _evaluating(self) as model:
            output = model(
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                input_ids=start * config.bos_token_id,
                attention_mask=start,
                pair_order="image_text",
                use_cache=True,
                return_loss=False,
            )
            mask = output.attention_mask
            # The padded layout counts padding in its positions.
            position = mask.sum(1, keepdim=True) if config.pair_layout == "compact" else start * mask.shape[1]
            for step in range(max_new_tokens):
                token = pick_tokens(output.logits[:, -1], do_sample, temperature, top_k, top_p, generator)
                token = torch.where(done, pad, token)
                tokens.append(token)
                done = done | torch.isin(token, ends)
                if step + 1 == max_new_tokens or all_done(bool(done.all())):
                    break
                mask = torch.cat([mask, start], 1)
                output = model(
                    input_ids=token[:, None],
                    attention_mask=mask,
                    position_ids=position + step,
                    cache=output.cache,
                    use_cache=True,
                    return_loss=False,
                )
        return torch.stack(tokens, 1)


@contextmanager
def _evaluating(model: Any) -> Iterator[Any]:  # noqa: ANN401
    """Evaluation mode; training mode may drop the cache."""
    assert isinstance(model, nn.Module)
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _ones(pixel_values: Tensor, length: int) -> Tensor:
    """(B, length) int64."""
    return torch.ones(len(pixel_values), length, dtype=torch.long, device=pixel_values.device)


def _at(values: Any, index: Tensor | None = None) -> Any:  # noqa: ANN401
    """Entries of (B, L, ...) at one position per row, by default the last one; None of None."""
    if values is None:
        return None
    return values[:, -1] if index is None else values[torch.arange(len(values), device=values.device), index]
