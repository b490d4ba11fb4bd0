"""Pre-training of PIXEL, the masked autoencoder of rendered text, under the Trainer."""

import warnings
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_models.base import LitBase, all_reduce_sum
from lit_models.nn.flops import training_flops, transformer_cost
from lit_models.nn.sharding import Sharding
from lit_models.pixel.functional import denormalize_patches, inked, patch_statistics, unpatchify
from lit_models.pixel.mae_recipes import PIXELBackbone
from lit_models.pixel.masking import SpanMasking, draw_masks
from lit_models.pixel.modeling_mae import PIXELForPreTraining, PIXELForPreTrainingOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
SAMPLES = 4
"""Rows of the newest batch that `samples` and `strips` show."""
_TRAIN, _EVALUATE = 0, 1  # first number after the seed, so that no two batches share their masks
_FIRST = (_TRAIN, 0)  # stage and loader of training


class LitPIXEL(LitBase):
    """Pre-train PIXEL: hide spans of patches and predict their pixels from the others.

    Batches hold strips: `pixel_values` (B,C,H,W) uint8, white 255 and black ink 0, and `pixel_mask` (B,L) int64, ones
    at the patches with text and at the black separator after it. Other keys are ignored.

    The loss is the mean squared error over all patches that are both hidden and attended, of an optimizer step with its
    ranks and accumulated batches, or of all the data in validation and test. Masks depend on the seed, the number of
    the batch and of the row in it alone: a resumed run draws those that the whole run would have drawn, ranks draw
    those that one process would, and every validation hides the same patches.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2207.06991

    Args:
        backbone: the model to train.
        masking: how spans of hidden patches are drawn; null hides single patches at random. How many are hidden is the
            model's `mask_ratio`.
        seed: seed of the masks.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.

    Raises:
        ValueError: if the seed is negative.
    """

    net: PIXELForPreTraining
    """Encoder and decoder; made in `configure_model`."""

    def __init__(
        self,
        backbone: PIXELBackbone,
        masking: SpanMasking | None = SpanMasking(),
        seed: int = 1234,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        if seed < 0:
            raise ValueError(f"model.seed must be at least 0, got {seed}")
        self.backbone, self.masking, self.seed = backbone, masking, seed
        self.net = None  # type: ignore[assignment]
        self._masked: Counter[tuple[int, int]] = Counter()  # masked batches (rows in evaluation) by stage and loader
        self._window: list[Tensor] = []  # target patches of each batch since the last optimizer step
        self._step_lengths: Tensor | None = None  # (2,B) attended and visible patches of the newest training batch
        self._totals = torch.zeros(2, 2, dtype=torch.float64)  # error and number of target patches: all, inked
        self._newest: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Build the network."""
        if self.net is not None:
            return self.shard_built()
        self.place("net", self.build(self.backbone.build))
        self.check_ema()

    def trained_networks(self) -> dict[str, nn.Module]:
        """The network, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """Encoder and decoder, and their average where one is kept."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema}  # type: ignore[dict-item]

    def setup(self, stage: str) -> None:
        """Keep Lightning from warning that batches are prepared here and not by the data module.

        Args:
            stage: "fit" and so on.
        """
        super().setup(stage)
        warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`")

    # -- masks -------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the masks of a batch while its lengths are still on the CPU.

        Args:
            batch: strips, see above.
            dataloader_idx: number of the loader.

        Returns:
            The batch with `noise` (B,L) float32 and, for spans, `patch_mask` (B,L) int64.

        Raises:
            ValueError: if the batch holds no strips.
        """
        if "pixel_values" not in batch or "pixel_mask" not in batch:
            raise ValueError(
                f"data.modes: PIXEL reads strips, but a batch holds only {', '.join(batch)}; set it to [image]"
            )
        stage = _TRAIN if self._trainer is None or self._trainer.training else _EVALUATE
        lengths = batch["pixel_mask"].sum(1).cpu().numpy()
        # Rows of training are counted within their batch; those of an evaluation, whose batches may vary, on the whole.
        masked = self._masked[stage, dataloader_idx]
        number, first = (masked, 0) if stage == _TRAIN else (0, masked)
        self._masked[stage, dataloader_idx] += 1 if stage == _TRAIN else len(lengths)
        world, rank = (1, 0) if self._trainer is None else (self.trainer.world_size, self.global_rank)
        patch_mask, noise = draw_masks(
            batch["pixel_mask"].shape[1],
            self.net.config.mask_ratio,
            lengths,
            (self.seed, stage, dataloader_idx, number),
            self.masking,
            range(rank + world * first, world * (first + len(lengths)), world),  # ranks take rows in turns
        )
        drawn = {"noise": noise} if patch_mask is None else {"noise": noise, "patch_mask": patch_mask}
        return batch | drawn

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of the next batch."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["masked_batches"] = self._masked[_FIRST]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the masks of the next batch."""
        super().on_load_checkpoint(checkpoint)
        self._masked[_FIRST] = checkpoint["masked_batches"]

    def _mask_anew(self) -> None:
        """Begin an evaluation with the masks of the first batch."""
        self._masked = Counter({_FIRST: self._masked[_FIRST]})

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> PIXELForPreTrainingOutput:
        """Hide patches and predict them.

        Args:
            batch: strips and masks.

        Returns:
            Predictions, masks and errors.
        """
        output: PIXELForPreTrainingOutput = self.net(
            batch["pixel_values"], batch["pixel_mask"], batch.get("patch_mask"), batch["noise"]
        )
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, for the gradient of the mean over all target patches of the optimizer step."""
        output = self(batch)
        error = torch.where(output.targets, output.errors, 0.0).sum()
        total, patches = all_reduce_sum(self, torch.stack([error.detach(), output.targets.sum().float()]))
        self._window.append(patches)
        attended = batch["pixel_mask"]
        self._step_lengths = torch.stack([attended.sum(1), torch.where(output.mask.bool(), 0, attended).sum(1)])
        self._keep(batch, output)
        self.log("train/loss", total / patches.clamp(min=1), prog_bar=True, batch_size=len(output.errors))
        # Data-parallel strategies average gradients over ranks, where a sum is needed.
        return error * self.trainer.world_size / self._window[0].clamp(min=1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See `LitBase.rescale_gradients`."""
        self.rescale_gradients(self.net, self._window)
        self._window.clear()

    def step_stats(self) -> dict[str, float | Tensor]:
        """Attended `patches` of the last training step on this rank, which are the `tokens` as well."""
        if self._step_lengths is None:
            return {}
        patches = self._step_lengths[0].sum()
        return {"tokens": patches, "patches": patches}

    def step_flops(self) -> Tensor | None:
        """Operations of the last training step on this rank; the encoder reads visible patches only."""
        if self._step_lengths is None:
            return None
        attended, visible = self._step_lengths + 1  # the class token
        config = self.net.config
        width = config.decoder_num_hidden_layers * config.decoder_hidden_size
        decoder = replace(transformer_cost(self.net.decoder, config={}), attention=width)
        return training_flops(transformer_cost(self.net.vit), visible) + training_flops(decoder, attended)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        output = self(batch)
        counted = torch.stack([output.targets, output.targets & inked(self.net.patches(batch["pixel_values"]))])
        sums = torch.where(counted, output.errors, 0.0).sum((1, 2))
        self._totals += torch.stack([sums, counted.sum((1, 2)).float()]).cpu()
        self._keep(batch, output)

    def _log_totals(self, stage: str) -> None:
        errors, patches = all_reduce_sum(self, self._totals)
        self._totals = torch.zeros_like(self._totals)
        loss, inked_loss = (errors / patches.clamp(min=1)).tolist()
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/loss_inked", inked_loss, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Begin with the masks of the first batch."""
        self._mask_anew()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/loss_inked`, that of patches that are not of one colour, over all ranks."""
        self._log_totals("val")

    def on_test_epoch_start(self) -> None:
        """Begin with the masks of the first batch."""
        self._mask_anew()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/loss_inked` over all patches and ranks."""
        self._log_totals("test")

    def on_predict_epoch_start(self) -> None:
        """Begin with the masks of the first batch."""
        self._mask_anew()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Rate every strip.

        Returns:
            `loss` (B,) float32, the mean over the target patches of a strip, and their number `patches` (B,) int64.
        """
        output = self(batch)
        self._keep(batch, output)
        return {"loss": _row_means(output.errors, output.targets), "patches": output.targets.sum(1)}

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    def _keep(self, batch: Batch, output: PIXELForPreTrainingOutput) -> None:
        """Copy the first rows, so that the rest of the batch can go."""
        rows = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        rows |= {name: getattr(output, name) for name in ("logits", "mask", "errors", "targets")}
        self._newest = {name: value[:SAMPLES].detach().clone() for name, value in rows.items()}

    def samples(self) -> list[dict[str, str | float]]:
        """A few rows of the newest batch: attended `patches`, how many of them are `hidden`, and their `loss`."""
        if not self._newest:
            return []
        newest = self._newest
        losses = _row_means(newest["errors"], newest["targets"])
        columns = (newest["pixel_mask"].sum(1).tolist(), newest["targets"].sum(1).tolist(), losses.tolist())
        names = ("patches", "hidden", "loss")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def strips(self) -> dict[str, NDArray[np.uint8]]:
        """A few strips of the newest batch as pictures.

        Each shows three strips with thin lines between them: the text, what the model sees of it, with hidden patches
        in grey, and the text with these patches as predicted. Predictions without mean and contrast are given those of
        the true patches.

        Returns:
            (3H+2,W) or (3H+2,W,3) uint8 by the number of the row, cut behind the last attended patch.
        """
        if not self._newest:
            return {}
        true = self.net.patches(self._newest["pixel_values"])
        pred = self._newest["logits"].float()
        if self.net.config.norm_pix_loss:
            pred = denormalize_patches(pred, *patch_statistics(true))
        hidden = self._newest["mask"].bool()[..., None]
        rows = [true, torch.where(hidden, 0.5, true), torch.where(hidden, pred.clamp(0, 1), true)]
        strips = [unpatchify(row, self.net.config.patch_size) for row in rows]
        line = torch.full_like(strips[0][:, :, :1], 0.5)
        images = torch.cat([strips[0], line, strips[1], line, strips[2]], dim=2)
        stacked = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        ends = (self.net.config.patch_size * self._newest["pixel_mask"].sum(1)).tolist()
        cut = [image[:, :end] for image, end in zip(stacked, ends, strict=True)]
        return {f"row {n}": image if image.shape[-1] == 3 else image[..., 0] for n, image in enumerate(cut)}


def _row_means(errors: Tensor, targets: Tensor) -> Tensor:
    return torch.where(targets, errors, 0.0).sum(1) / targets.sum(1).clamp(min=1)
