"""Supervised fine-tuning under the Trainer."""

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_models.backbones import Backbone
from lit_models.base import LitBase, all_reduce_sum
from lit_models.nn.flops import training_flops, transformer_cost
from lit_models.nn.logprobs import position_ids, token_nll
from lit_models.nn.sharding import Sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
SAMPLES = 4
"""Rows of the newest validation batch that `samples` shows."""


class LitSFT(LitBase):
    """Fine-tune a causal language model on texts with the cross entropy of the next token.

    Batches hold right-padded texts: `input_ids` (B,T) int64, `attention_mask` (B,T) int64 and `labels` (B,T) int64,
    which repeat the ids and are -100 where a token is not trained, such as in prompts.

    The training loss is the mean over all trained tokens of an optimizer step, over ranks and accumulated batches:
    a token weighs the same wherever it stands. Validation and test report the mean over all tokens of the data.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2203.02155

    Args:
        backbone: the language model to train.
        tokenizer: hub id or folder; exported beside the model.
        pad_token: token of the vocabulary to pad with instead of the tokenizer's own.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.
    """

    net: "PreTrainedModel"
    """The language model; made in `configure_model`."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: str,
        pad_token: str | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        self.backbone = backbone
        self.tokenizer_name, self.pad_token = tokenizer, pad_token
        self.net = None  # type: ignore[assignment]
        self._window: list[Tensor] = []  # trained tokens of each batch since the last optimizer step
        self._step_lengths: Tensor | None = None  # of the texts of the newest training batch
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._newest: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Load the tokenizer and build the network."""
        if self.net is not None:
            return self.shard_built()
        from lit_models.tokenization import check_vocabulary, load_tokenizer

        self.tokenizer = load_tokenizer(self.tokenizer_name, self.pad_token)
        net = self.build(self.backbone.build)
        check_vocabulary(self.tokenizer, net)
        net.config.pad_token_id = self.tokenizer.pad_token_id
        self.place("net", net)
        self.check_ema()

    def trained_networks(self) -> dict[str, nn.Module]:
        """The language model, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """The language model, and its average where one is kept."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema}  # type: ignore[dict-item]

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Predict the next token at every position.

        Args:
            input_ids: (B,T) int64.
            attention_mask: (B,T) int64, 1 for tokens on whichever side the padding is.

        Returns:
            (B,T,V) logits.
        """
        positions = position_ids(attention_mask)
        output = self.net(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return token_nll(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of one batch, for the gradient of the mean over all tokens of the optimizer step."""
        nll, counted = self._nll(batch)
        local = torch.stack([nll.detach().sum(), counted.sum().float()])
        total, tokens = all_reduce_sum(self, local)
        self._window.append(tokens)
        self._step_lengths = batch["attention_mask"].sum(1)
        self.log("train/loss", total / tokens.clamp(min=1), prog_bar=True, batch_size=len(nll))
        # Data-parallel strategies average gradients over ranks, where a sum is needed.
        return nll.sum() * self.trainer.world_size / self._window[0].clamp(min=1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See `LitBase.rescale_gradients`."""
        self.rescale_gradients(self.net, self._window)
        self._window.clear()

    def step_stats(self) -> dict[str, float | Tensor]:
        """Processed `tokens` of the last training step on this rank, padding not counted."""
        return {} if self._step_lengths is None else {"tokens": self._step_lengths.sum()}

    def step_flops(self) -> Tensor | None:
        """Operations of the last training step on this rank."""
        return None if self._step_lengths is None else training_flops(transformer_cost(self.net), self._step_lengths)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        nll, counted = self._nll(batch)
        self._totals += torch.stack([nll.sum(), counted.sum()]).cpu().double()
        ids, mask = batch["input_ids"][:SAMPLES], batch["attention_mask"][:SAMPLES]
        self._newest = {"ids": ids, "mask": mask, "nll": _row_means(nll, counted)[:SAMPLES]}

    def _log_totals(self, stage: str) -> None:
        nll, tokens = all_reduce_sum(self, self._totals).tolist()
        self._totals = torch.zeros_like(self._totals)
        loss = nll / max(tokens, 1.0)
        perplexity = math.exp(min(loss, 700.0))  # beyond this, not even a double holds it
        self.log_dict({f"{stage}/loss": loss, f"{stage}/perplexity": perplexity}, prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` in nats per token and `val/perplexity`, over all tokens and ranks."""
        self._log_totals("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` in nats per token and `test/perplexity`, over all tokens and ranks."""
        self._log_totals("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Rate every text.

        Returns:
            `nll`, the mean over the trained tokens of a row in nats, and `perplexity`, both (B,) float32; their number
            `tokens` (B,) int64.
        """
        nll, counted = self._nll(batch)
        means = _row_means(nll, counted)
        return {"nll": means, "perplexity": means.exp(), "tokens": counted.sum(1)}

    def samples(self) -> list[dict[str, str | float]]:
        """A few rows of the newest validation or test batch: `text` and `nll` per trained token."""
        if not self._newest:
            return []
        rows = zip(self._newest["ids"], self._newest["mask"], self._newest["nll"].tolist(), strict=True)
        return [{"text": str(self.tokenizer.decode(ids[mask.bool()])), "nll": nll} for ids, mask, nll in rows]


def _row_means(nll: Tensor, counted: Tensor) -> Tensor:
    return nll.sum(1) / counted.sum(1).clamp(min=1)
