"""Pre-training of pixel language models under the Trainer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import AdamW, Optimizer
from torchmetrics import Metric

from lit_models.base import LitBase, all_reduce_sum
from lit_models.nn.flops import training_flops, transformer_cost
from lit_models.nn.logprobs import token_nll
from lit_models.nn.sharding import Sharding
from lit_models.pixel import functional
from lit_models.pixel.metrics import PatchErrors, TokenErrors
from lit_models.pixel.recipes import PixelBackbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_models.pixel.modeling import PixelForCausalLM, PixelLMOutput

Batch = dict[str, Any]
Mode = Literal["pixel", "text", "pair"]

SAMPLES = 4
"""Rows of the newest batch that `samples` and `strips` show."""
PIXEL_KEYS = ("pixel_values", "pixel_mask")
TEXT_KEYS = ("input_ids", "attention_mask", "labels")
_INPUTS = (*PIXEL_KEYS, *TEXT_KEYS, "document_ids")
_OWN_PARTS = (("model.embed_patches.", "lm_pixel_head.", "lm_stop_head."), ("model.embed_tokens.", "lm_token_head."))
"""Parts of the network that only patches use, and only tokens."""


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the losses; they become part of the model's configuration.

    Args:
        pixel: weight of next-patch prediction, whose loss starts at about 1.
        text: weight of next-token prediction, whose loss starts at the logarithm of the vocabulary size.
        stop: weight of telling whether the next patch ends the text, for models with a stop head.

    Raises:
        ValueError: if a weight is negative or nothing is trained.
    """

    pixel: float = 1.0
    text: float = 1.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("pixel", "text", "stop"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.weights.{name} must be at least 0, got {getattr(self, name)}")
        if self.pixel == self.text == 0:
            raise ValueError("model.weights: pixel and text are both 0, so nothing would be trained; raise one of them")


class LitPixelLM(LitBase):
    """Pre-train a language model that reads text as pixels, as tokens, or as both.

    Each batch has one mode, which its keys tell:

    * pixel: `pixel_values` (B,C,H,W) uint8, white 255 and black ink 0, and `pixel_mask` (B,L) int64, 1 at the patches
      with text and at the black separator after it; for packed strips also `document_ids` (B,L) int64, -1 at padding;
    * text: `input_ids` (B,T) int64, `attention_mask` (B,T) int64 and `labels` (B,T) int64, which repeat the ids and are
      -100 where a token is not trained; padding is on the right;
    * pair: the keys of both, of the same texts.

    `num_bytes` (B,) int64, the length of each text in UTF-8, is counted from the labels where a batch lacks it.

    The loss of an optimizer step is weights.pixel · next-patch error + weights.text · next-token cross entropy. Each is
    the mean over all of its targets, on all ranks and in all accumulated batches, and counts by the share of rows that
    have such targets: the proportions of a mixture hold however its rows are divided. Within one step of accumulated
    batches that have both kinds of targets, the proportion of the two is that of its first batches; see the README.
    Validation and test report the same loss over all of the data.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2404.10710

    Args:
        backbone: the model to train.
        tokenizer: hub id or folder; needed for batches with tokens, and exported beside the model.
        pad_token: token of the vocabulary to pad with instead of the tokenizer's own.
        weights: weights of the losses.
        max_read_tokens: tokens after which reading a strip ends, in `samples` and in prediction; 0 reads nothing.
        strip_scale: pictures of `strips` show normalised predictions with the mean and contrast of the true patches
            ("target"), or as they are, cut to [0, 1] ("none"), as the released code does.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.

    Raises:
        ValueError: if an option is out of range.
    """

    frozen = ("meters",)
    net: "PixelForCausalLM"
    """The language model; made in `configure_model`."""

    def __init__(
        self,
        backbone: PixelBackbone,
        tokenizer: str | None = None,
        pad_token: str | None = None,
        weights: ObjectiveWeights = ObjectiveWeights(),
        max_read_tokens: int = 64,
        strip_scale: Literal["target", "none"] = "target",
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        if max_read_tokens < 0:
            raise ValueError(f"model.max_read_tokens must be at least 0, got {max_read_tokens}")
        if strip_scale not in ("target", "none"):
            raise ValueError(f"model.strip_scale must be target or none, got {strip_scale!r}")
        self.backbone, self.weights = backbone, weights
        self.tokenizer_name, self.pad_token = tokenizer, pad_token
        self.max_read_tokens, self.strip_scale = max_read_tokens, strip_scale
        self.net = None  # type: ignore[assignment]
        self.meters = nn.ModuleDict()
        self._losses: dict[str, Tensor | float] = {}  # of the newest batch of each kind, by key
        self._window: list[Tensor] = []  # sums of each batch since the last optimizer step
        self._step_lengths: Tensor | None = None  # (2,B) attended patches and tokens of the newest training batch
        self._totals: Tensor | None = None  # sums of the evaluated batches
        self._newest: dict[str, Tensor] = {}  # rows of the newest batch
        self._drawn: dict[str, Tensor] = {}  # rows of the newest batch with strips

    def configure_model(self) -> None:
        """Load the tokenizer, if there is one, and build the network."""
        if self.net is not None:
            return self.shard_built()
        if self.tokenizer_name is not None:
            from lit_models.tokenization import load_tokenizer

            self.tokenizer = load_tokenizer(self.tokenizer_name, self.pad_token)
        net = self.build(self.backbone.build)
        if self.tokenizer_name is not None:
            from lit_models.tokenization import check_vocabulary

            check_vocabulary(self.tokenizer, net)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(net.config, name, getattr(self.tokenizer, name))
        config = net.config
        config.pixel_weight, config.text_weight = self.weights.pixel, self.weights.text
        config.stop_weight = self.weights.stop
        patches = {"size": config.patch_values, "normalize": config.norm_pix_loss, "loss": config.pixel_loss}
        meters = {
            "pixel": [PatchErrors(**patches)],
            "text": [TokenErrors()],
            "pair": [PatchErrors(**patches), TokenErrors()],
        }
        self.meters.update({mode: nn.ModuleList(parts) for mode, parts in meters.items()})
        self.place("net", net)
        self.check_ema()

    def trained_networks(self) -> dict[str, nn.Module]:
        """The language model, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """The language model, and its average where one is kept."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema}  # type: ignore[dict-item]

    def _checked_mode(self, batch: Batch, labelled: bool = True) -> Mode:
        """Make sure that a batch can be read; only keys and shapes are looked at.

        Args:
            batch: what the data module made.
            labelled: whether tokens need labels.

        Returns:
            Its mode.

        Raises:
            ValueError: if the keys tell no mode, or the model cannot read what they hold.
        """
        mode = batch_mode(batch)
        if mode != "text":
            self._check_strips(batch["pixel_values"], batch["pixel_mask"])
        if mode != "pixel" and self.tokenizer_name is None:
            raise ValueError("model.tokenizer: the batches hold tokens; set it to the tokenizer of the data")
        if mode != "pixel" and labelled and "labels" not in batch:
            raise ValueError("data: the batches hold tokens without labels, so there is nothing to train; add labels")
        return mode

    def _check_strips(self, images: Tensor, mask: Tensor) -> None:
        config = self.net.config
        if images.ndim != 4 or images.shape[1] != config.num_channels:
            raise ValueError(
                f"data.renderer.colour: the strips have shape {tuple(images.shape)}, but the model reads "
                f"{config.num_channels} channels; use rgb for 3 and gray or binary for 1, or set num_channels of "
                "model.backbone"
            )
        _, _, height, width = images.shape
        if height != config.image_size[0] or width % config.patch_size:
            raise ValueError(
                f"data.renderer.patch_size: the strips are {height} x {width} pixels, but the model reads strips "
                f"{config.image_size[0]} high in patches of {config.patch_size}; give both the same patch_size"
            )
        if mask.shape != (len(images), width // config.patch_size):
            raise ValueError(
                f"data: pixel_mask has shape {tuple(mask.shape)} for {len(images)} strips of "
                f"{width // config.patch_size} patches; it needs one entry per patch"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any], **options: Any) -> "PixelLMOutput":  # noqa: ANN401
        """Predict the next patches, the next tokens, or both.

        Args:
            batch: see above; other keys are ignored.
            **options: see `PixelForCausalLM.forward`.

        Returns:
            Predictions, and sums and numbers of targets of the losses.
        """
        output: PixelLMOutput = self.net(**{key: batch[key] for key in _INPUTS if key in batch}, **options)
        return output

    def _sums(self, output: "PixelLMOutput", rows: int) -> Tensor:
        """(9,) float32: see `mean_loss`; and the plain losses of patches and of tokens."""
        none = torch.zeros((), device=self.device)
        npp, ntp, stop = (none if part is None else part for part in (output.npp_sum, output.ntp_sum, output.stop_sum))
        pixel, text = (
            [none, none] if count is None else [count, none + rows] for count in (output.npp_count, output.ntp_count)
        )
        weights = self.weights
        sums = [weights.pixel * npp + weights.stop * stop, *pixel, weights.text * ntp, *text, none + rows, npp, ntp]
        return torch.stack(sums)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, for the gradient of the mean over all targets of the optimizer step."""
        mode, output, rows = self._checked_mode(batch), self(batch), _rows(batch)
        local = self._sums(output, rows)
        total = all_reduce_sum(self, local.detach())
        self._window.append(total)
        self._step_lengths = _attended(batch)
        self._keep(batch, output)
        self.log("train/loss", mean_loss(total), prog_bar=True, batch_size=rows)
        means = {"npp": total[7] / total[1].clamp(min=1), "ntp": total[8] / total[4].clamp(min=1)}
        for name in {"pixel": ["npp"], "text": ["ntp"], "pair": ["npp", "ntp"]}[mode]:
            self._losses[f"train/{mode}/{name}"] = means[name]
        for key, value in self._losses.items():
            self.log(key, value, batch_size=rows)
        # Data-parallel strategies average gradients over ranks, where a sum is needed.
        return self.trainer.world_size * (local[:6:3] * self._scales()).sum() + self._idle_term(mode)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the losses that the next batches of other kinds are logged with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pixel_losses"] = {key: float(value) for key, value in self._losses.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with these losses."""
        super().on_load_checkpoint(checkpoint)
        self._losses = dict(checkpoint.get("pixel_losses", {}))

    def _scales(self) -> Tensor:
        """(2,) factors of the loss sums of patches and tokens, from the first batch of the step that has either."""
        window = torch.stack(self._window)
        sums = window[:, :6].unflatten(1, (2, 3))
        first = (sums[..., 1] > 0).float().argmax(0)
        _, targets, rows = sums[first, torch.arange(2, device=window.device)].unbind(1)
        return rows / targets.clamp(min=1) / window[0, 6]

    def _idle_term(self, mode: Mode) -> Tensor:
        """Zero, by way of the parts that a mode leaves out: data parallelism waits for the gradient of every part."""
        parts = {"pixel": _OWN_PARTS[1], "text": _OWN_PARTS[0], "pair": ()}[mode]
        term = torch.zeros((), device=self.device)
        for name, parameter in self.net.named_parameters():
            if name.startswith(parts) and parameter.requires_grad:
                term = term + 0.0 * parameter.sum()
        return term

    def on_train_start(self) -> None:
        """Begin a step; under sharding, complete the optimizer's state, since sharded checkpoints need all of it."""
        self._window.clear()
        if self.device_mesh is not None:
            complete_state(cast(Optimizer, self.optimizers(use_pl_optimizer=False)))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Give gradients their final scale, and none to the parts that no batch of the step has used.

        The batches were scaled by the targets of the first ones, because those of the later ones were not known yet.
        Unused parts are left alone by the optimizer: neither momentum nor weight decay moves them.
        """
        sums = torch.stack(self._window).sum(0)
        loss_sums, all_rows = sums[:6].unflatten(0, (2, 3)), sums[6]
        _, targets, rows = loss_sums.unbind(1)
        factor = 1.0
        if self.trainer.accumulate_grad_batches > 1:
            stop = self.weights.stop if self.net.config.stop_head else 0.0
            weights = rows.new_tensor([self.weights.pixel + stop, self.weights.text])
            wanted, given = (weights * rows).sum() / all_rows, (weights * targets * self._scales()).sum()
            factor = self.trainer.accumulate_grad_batches * float(wanted / given.clamp(min=1e-12))
        idle = [parts for parts, any_rows in zip(_OWN_PARTS, rows.tolist(), strict=True) if not any_rows]
        unused = tuple(prefix for parts in idle for prefix in parts)
        for name, parameter in self.net.named_parameters():
            if name.startswith(unused):
                parameter.grad = None
            elif factor != 1 and parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._window.clear()

    def step_stats(self) -> dict[str, float | Tensor]:
        """Attended patches and tokens of the last training step on this rank.

        Returns:
            `patches`, and `tokens`, which are patches and tokens together: positions of the trunk.
        """
        if self._step_lengths is None:
            return {}
        return {"tokens": self._step_lengths.sum(), "patches": self._step_lengths[0].sum()}

    def step_flops(self) -> Tensor | None:
        """Operations of the last training step on this rank; packed strips count as one text."""
        if self._step_lengths is None:
            return None
        patches, tokens = self._step_lengths
        modules = dict(self.net.named_modules())
        flops = training_flops(transformer_cost(self.net, skip=(*_OWN_PARTS[0], *_OWN_PARTS[1])), patches + tokens)
        for parts, lengths in zip(_OWN_PARTS, (patches, tokens), strict=True):
            for part in (modules[name[:-1]] for name in parts if name[:-1] in modules):
                flops = flops + training_flops(transformer_cost(part, config={}), lengths)
        return flops

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        mode, output = self._checked_mode(batch), self(batch)
        sums = self._sums(output, _rows(batch)).double()
        self._totals = sums if self._totals is None else self._totals + sums
        ntp = None
        for meter in cast(nn.ModuleList, self.meters[mode]):
            if isinstance(meter, PatchErrors):
                meter.update(output.pixel_pred, output.patches, _targets(batch))
            elif isinstance(meter, TokenErrors):
                nll, counted = token_nll(cast(Tensor, output.logits), _labels(batch))
                meter.update(nll, counted, self._num_bytes(batch))
                ntp = _row_means(nll, counted)
        self._keep(batch, output, ntp)

    def _num_bytes(self, batch: Batch) -> Tensor:
        """(B,) bytes of the texts."""
        if "num_bytes" in batch:
            return cast(Tensor, batch["num_bytes"])
        return torch.tensor([len(text.encode()) for text in self._texts(_labels(batch))], device=self.device)

    def _texts(self, labels: Tensor) -> list[str]:
        """Texts of rows of tokens; negative ones are left out, and so are tokens that stand for no text."""
        rows = [row[row >= 0] for row in labels.cpu()]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]

    def _log_evaluation(self, stage: str) -> None:
        totals = torch.zeros(9, device=self.device, dtype=torch.float64) if self._totals is None else self._totals
        self._totals = None
        self.log(f"{stage}/loss", mean_loss(all_reduce_sum(self, totals)).float(), prog_bar=True, sync_dist=True)
        values: dict[str, Tensor] = {}
        with warnings.catch_warnings():  # not every mode occurs
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
            for mode, parts in self.meters.items():
                for meter in cast(nn.ModuleList, parts):
                    numbers: dict[str, Tensor] = cast(Metric, meter).compute()
                    values |= {f"{stage}/{mode}/{name}": value for name, value in numbers.items()}
                    cast(Metric, meter).reset()
        self.log_dict(values, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Forget the strips of training."""
        self._drawn = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/MODE/*` over all targets and ranks; see `PatchErrors` and `TokenErrors`."""
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Forget the strips of other data."""
        self._drawn = {}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/MODE/*` over all targets and ranks; see `PatchErrors` and `TokenErrors`."""
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Rate every row, and read its strip.

        Returns:
            Of strips, `npp` (B,) float32, the mean error of a row's patches, and their number `patches` (B,) int64; of
            tokens, the mean `ntp` in nats, its exponential `perplexity`, both (B,) float32, and their number `tokens`;
            `read`, B texts read off the strips, if there is a tokenizer; and `text`, the B texts of the tokens.
        """
        self._checked_mode(batch, labelled=False)
        with self.gathered(self.net):  # ranks may have other numbers of tokens to read, or none
            return self._rate(batch)

    def _rate(self, batch: Batch) -> dict[str, Any]:
        output = self(batch)
        rated: dict[str, Any] = {}
        if output.pixel_pred is not None:
            rated["npp"], rated["patches"] = self._row_errors(output, batch)
        if output.logits is not None:
            nll, counted = token_nll(output.logits, _labels(batch))
            rated["ntp"] = _row_means(nll, counted)
            rated |= {"perplexity": rated["ntp"].exp(), "tokens": counted.sum(1), "text": self._texts(_labels(batch))}
        if output.pixel_pred is not None and self._can_read:
            rated["read"] = self._read(batch["pixel_values"], batch["pixel_mask"])
        self._keep(batch, output, rated.get("ntp"))
        return rated

    def _row_errors(self, output: "PixelLMOutput", batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean error and number of the target patches of every row."""
        config = self.net.config

        def of_row(prediction: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
            return functional.npp_loss(prediction[None], target[None], counted[None], config.pixel_loss)

        target = functional.pixel_targets(cast(Tensor, output.patches), config.norm_pix_loss)
        total, count = torch.vmap(of_row)(cast(Tensor, output.pixel_pred), target, _targets(batch))
        return total / count.clamp(min=1), count.long()

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    @property
    def _can_read(self) -> bool:
        """Whether strips can be turned into text."""
        wanted = self.tokenizer_name is not None and self.max_read_tokens > 0
        return wanted and self.net.config.pair_order != "text_image"

    def _read(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[str]:
        return self._texts(self.net.read(pixel_values, pixel_mask, max_new_tokens=self.max_read_tokens))

    def _keep(self, batch: Batch, output: "PixelLMOutput", ntp: Tensor | None = None) -> None:
        """Copy the first rows, so that the rest of the batch can go; logits are too large to look at in training."""
        rows: dict[str, Tensor] = {key: batch[key] for key in PIXEL_KEYS if key in batch}
        if output.logits is not None:
            rows["labels"] = _labels(batch)
        if ntp is not None:
            rows["ntp"] = ntp
        self._newest = _first_rows(rows)
        if output.pixel_pred is not None:
            self._drawn = _first_rows({"prediction": output.pixel_pred, "targets": _targets(batch)})
            self._drawn |= {key: self._newest[key] for key in PIXEL_KEYS}

    def samples(self) -> list[dict[str, str | float]]:
        """A few rows of the newest batch; where networks are sharded, all processes must ask for theirs.

        Returns:
            `text` of rows with tokens, and outside training their `ntp` in nats per token; `read`, the text read off
            the strip, of rows with strips, if there is a tokenizer.
        """
        newest = self._newest
        with self.gathered(self.net):
            return self._shown(newest)

    def _shown(self, newest: dict[str, Tensor]) -> list[dict[str, str | float]]:
        columns: dict[str, list[Any]] = {}
        if "labels" in newest:
            columns["text"] = self._texts(newest["labels"])
        if "pixel_values" in newest and self._can_read:
            columns["read"] = self._read(newest["pixel_values"], newest["pixel_mask"])
        if "ntp" in newest:
            columns["ntp"] = newest["ntp"].tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def strips(self) -> dict[str, NDArray[np.uint8]]:
        """A few strips of the newest batch that has any: the text, a thin line, and the patches as predicted.

        Every predicted patch stands under the true one and is predicted from all that is left of that; what nothing
        predicts is grey. See `strip_scale` about the contrast.

        Returns:
            (2H+1,W) or (2H+1,W,3) uint8 by the number of the row, cut behind the last attended patch; nothing if there
            were no strips, in this evaluation or in training.
        """
        if not self._drawn:
            return {}
        config, newest = self.net.config, self._drawn
        true = functional.to_unit(functional.patchify(newest["pixel_values"], config.patch_size))
        guess = pad(newest["prediction"].float()[:, :-1], (0, 0, 1, 0))
        if config.pixel_loss == "bce":
            guess = guess.sigmoid()
        elif config.norm_pix_loss and self.strip_scale == "target":
            guess = functional.denormalize_patches(guess, *functional.patch_statistics(true))
        guess = torch.where(newest["targets"][..., None], guess.clamp(0, 1), 0.5)
        upper, lower = (functional.unpatchify(patches, config.patch_size) for patches in (true, guess))
        both = torch.cat([upper, torch.full_like(upper[:, :, :1], 0.5), lower], 2)
        images = (both * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        ends = (config.patch_size * newest["pixel_mask"].sum(1)).tolist()
        cut = [image[:, :end] for image, end in zip(images, ends, strict=True)]
        return {f"row {n}": image if image.shape[-1] == 3 else image[..., 0] for n, image in enumerate(cut)}


def batch_mode(batch: Mapping[str, Any]) -> Mode:
    """What a batch holds.

    Args:
        batch: see `LitPixelLM`.

    Returns:
        "pixel", "text" or "pair".

    Raises:
        ValueError: if keys are missing.
    """
    pixel, text = "pixel_values" in batch, "input_ids" in batch
    needed = PIXEL_KEYS * pixel + ("input_ids", "attention_mask") * text
    known = {*PIXEL_KEYS, *TEXT_KEYS} - ({"labels"} if text else set())
    if not needed or known & set(batch) != set(needed):
        raise ValueError(
            f"data: a batch with the keys {', '.join(sorted(batch))} has no mode; strips need pixel_values and "
            "pixel_mask, tokens need input_ids, attention_mask and labels, and pairs need all of them"
        )
    return "pair" if pixel and text else "pixel" if pixel else "text"


def mean_loss(sums: Tensor) -> Tensor:
    """Loss over all that was summed up: the mean over targets, by the share of rows that have them.

    Args:
        sums: (7 or more,): of patches and then of tokens the weighted loss, targets and rows with any; and all rows.

    Returns:
        () of the same type.
    """
    loss, targets, rows = sums[:6].unflatten(0, (2, 3)).unbind(1)
    return (loss / targets.clamp(min=1) * rows).sum() / sums[6].clamp(min=1)


def complete_state(optimizer: Optimizer) -> None:
    """Make the state of parameters that have none yet, as it is before their first step.

    Args:
        optimizer: its parameters, and the states that exist, are left as they are; gradients are dropped.
    """
    new = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter not in optimizer.state
    ]
    if not new:
        return
    optimizer.zero_grad()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in new:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(closure=None)  # said aloud, as torch does in its own steps without effect; averages leave them out
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in new:
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                value.zero_()


def _rows(batch: Batch) -> int:
    return len(batch["pixel_values"] if "pixel_values" in batch else batch["input_ids"])


def _attended(batch: Batch) -> Tensor:
    """(2,B) int64, attended patches and tokens of each row."""
    masks = ("pixel_mask", "attention_mask")
    counts = {key: batch[key].sum(1) for key in masks if key in batch}
    none = torch.zeros_like(next(iter(counts.values())))
    return torch.stack([counts.get(key, none) for key in masks])


def _first_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:SAMPLES].detach().clone() for name, value in tensors.items()}


def _row_means(nll: Tensor, counted: Tensor) -> Tensor:
    return nll.sum(1) / counted.sum(1).clamp(min=1)


def _targets(batch: Batch) -> Tensor:
    """(B,L) bool, patches that are predicted."""
    return functional.target_mask(batch["pixel_mask"], batch.get("document_ids"))


def _labels(batch: Batch) -> Tensor:
    """(B,T) int64 labels, -100 at padding; all tokens where a batch to predict has none."""
    labels: Tensor = batch["labels" if "labels" in batch else "input_ids"]
    return labels.masked_fill(batch["attention_mask"] == 0, -100)
