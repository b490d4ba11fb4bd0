"""Reward models under the Trainer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW

from lit_models.backbones import Backbone
from lit_models.base import LitBase, all_reduce_sum
from lit_models.nn.flops import training_flops, transformer_cost
from lit_models.nn.logprobs import position_ids
from lit_models.nn.scoring import TokenScorer
from lit_models.nn.sharding import Sharding
from lit_models.reward.modeling import end_index, end_scores, end_token_loss, pad_end, per_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
SAMPLES = 4
"""Pairs of the newest validation batch that `samples` shows."""


@dataclass(frozen=True)
class RewardLoss:
    """How pairs are compared.

    Args:
        kind: "end_token" compares the scores at the last tokens (InstructGPT); "per_token" compares all positions from
            the first difference of the two texts on (DeepSpeed-Chat).
        center_coefficient: weight of the squared sum of the two scores, which keeps them around 0; for "end_token".
        num_padding_at_beginning: padding tokens that open every text (1 for OPT). If not 0, texts end at the first
            padding token after those instead of where the attention mask ends.

    Raises:
        ValueError: if a value is out of range or the options contradict each other.
    """

    kind: Literal["end_token", "per_token"] = "end_token"
    center_coefficient: float = 0.0
    num_padding_at_beginning: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.kind not in ("end_token", "per_token"):
            raise ValueError(f"model.loss.kind must be end_token or per_token, got {self.kind!r}")
        if self.center_coefficient < 0:
            raise ValueError(f"model.loss.center_coefficient must be at least 0, got {self.center_coefficient}")
        if self.center_coefficient and self.kind == "per_token":
            raise ValueError("model.loss.center_coefficient needs model.loss.kind end_token; set it to 0 for per_token")
        if self.num_padding_at_beginning < 0:
            raise ValueError(
                f"model.loss.num_padding_at_beginning must be at least 0, got {self.num_padding_at_beginning}"
            )


class LitRewardModel(LitBase):
    """Train a scalar score of texts on pairs, of which one text is preferred (Bradley-Terry model).

    Batches hold 2B right-padded texts, the B chosen ones first: `input_ids` (2B,T) int64, `attention_mask` (2B,T) int64
    and optionally `margin` (B,) float32, by how much the chosen score should at least be higher.

    At the end of a validation, mean and standard deviation of all its scores, chosen and rejected, become `reward_mean`
    and `reward_std` of the module, its checkpoints and the exported `config.json`, where PPO finds them.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2203.02155

    Args:
        backbone: the language model under the score, or a reward model to train further.
        tokenizer: hub id or folder; exported beside the model.
        pad_token: token of the vocabulary to pad with instead of the tokenizer's own.
        loss: how pairs are compared.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.
    """

    net: TokenScorer
    """The scorer; made in `configure_model`."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: str,
        pad_token: str | None = None,
        loss: RewardLoss = RewardLoss(),
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        self.backbone, self.loss = backbone, loss
        self.tokenizer_name, self.pad_token = tokenizer, pad_token
        self.net = None  # type: ignore[assignment]
        self.reward_mean, self.reward_std = 0.0, 1.0
        self._step_lengths: Tensor | None = None  # of the texts of the newest training batch
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._scores: list[Tensor] = []  # (2, B) end scores of each evaluated batch, chosen first
        self._newest: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Load the tokenizer and build the scorer."""
        if self.net is not None:
            return self.shard_built()
        from lit_models.tokenization import check_vocabulary, load_tokenizer

        self.tokenizer = load_tokenizer(self.tokenizer_name, self.pad_token)
        net = self.build(self.backbone.build_scorer)
        check_vocabulary(self.tokenizer, net.model)
        config = net.model.config
        config.pad_token_id = self.tokenizer.pad_token_id  # transformers finds the last token by it
        self.reward_mean = float(getattr(config, "reward_mean", self.reward_mean))
        self.reward_std = float(getattr(config, "reward_std", self.reward_std))
        self.place("net", net)
        self.check_ema()

    def trained_networks(self) -> dict[str, nn.Module]:
        """The scorer, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """The sequence-classification model, and its average where one is kept."""
        models: dict[str, PreTrainedModel] = {"model": self.net.model}
        if self.ema is not None:
            models["ema"] = self.ema.model  # type: ignore[assignment]
        return models

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position.

        Args:
            input_ids: (B,T) int64.
            attention_mask: (B,T) int64, 1 for tokens on whichever side the padding is.

        Returns:
            (B,T) float32.
        """
        scores: Tensor = self.net(input_ids, attention_mask, position_ids(attention_mask))
        return scores

    def _compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and its (2,B) end scores."""
        ids, mask, margin = batch["input_ids"], batch["attention_mask"], batch.get("margin")
        scores = self(ids, mask)
        opening = self.loss.num_padding_at_beginning
        lengths = pad_end(ids, self.tokenizer.pad_token_id, opening) if opening else end_index(mask)
        ends = end_scores(scores, lengths).unflatten(0, (2, -1)).detach()
        if self.loss.kind == "end_token":
            return end_token_loss(scores, lengths, margin, self.loss.center_coefficient), ends
        if margin is not None:
            raise ValueError(
                "model.loss.kind: per_token knows no margins; set it to end_token, or data.margin_column to null"
            )
        return per_token_loss(scores, ids, lengths)[0], ends

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, for the gradient of the mean over its pairs on all ranks."""
        loss, ends = self._compare(batch)
        self._step_lengths = batch["attention_mask"].sum(1)
        # Data-parallel strategies average over ranks, which may hold different numbers of pairs.
        pairs = loss.new_full((), ends.shape[1])
        loss = loss * (pairs * self.trainer.world_size / all_reduce_sum(self, pairs))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=ends.shape[1])
        return loss

    def step_stats(self) -> dict[str, float | Tensor]:
        """Processed `tokens` of the last training step on this rank, padding not counted."""
        return {} if self._step_lengths is None else {"tokens": self._step_lengths.sum()}

    def step_flops(self) -> Tensor | None:
        """Operations of the last training step on this rank."""
        if self._step_lengths is None:
            return None
        return training_flops(transformer_cost(self.net.model), self._step_lengths)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        loss, ends = self._compare(batch)
        pairs = ends.shape[1]
        self._loss_sum += pairs * loss.double().cpu()
        self._scores.append(ends.cpu())
        ids, mask = (batch[key].unflatten(0, (2, pairs))[:, :SAMPLES] for key in ("input_ids", "attention_mask"))
        self._newest = {"ids": ids, "mask": mask, "scores": ends[:, :SAMPLES]}

    def _log_evaluation(self, stage: str) -> tuple[float, float]:
        """Log the metrics of all batches and ranks; return mean and standard deviation of the scores."""
        scores = torch.cat([torch.zeros(2, 0), *self._scores], dim=1).double()  # a rank may have no batch
        chosen, rejected = scores
        sums = [self._loss_sum, (chosen > rejected).sum(), chosen.sum(), rejected.sum(), torch.tensor(scores.shape[1])]
        loss, correct, chosen_sum, rejected_sum, pairs = all_reduce_sum(
            self, torch.stack([x.double() for x in sums])
        ).tolist()
        metrics = {
            "loss": loss / pairs,
            "accuracy": correct / pairs,
            "chosen_mean": chosen_sum / pairs,
            "rejected_mean": rejected_sum / pairs,
            "margin": (chosen_sum - rejected_sum) / pairs,
        }
        mean = (chosen_sum + rejected_sum) / (2 * pairs)
        squares = float(all_reduce_sum(self, (scores - mean).square().sum()))
        self._loss_sum.zero_()
        self._scores.clear()
        shown = ("loss", "accuracy")
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in shown, sync_dist=True)
        return mean, (squares / max(2 * pairs - 1, 1)) ** 0.5

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the scores of a batch."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/{loss,accuracy,chosen_mean,rejected_mean,margin}` over all pairs; store score statistics."""
        mean, std = self._log_evaluation("val")
        if not self.trainer.sanity_checking:
            self._store_statistics(mean, std)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the scores of a batch."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/{loss,accuracy,chosen_mean,rejected_mean,margin}` over all pairs and ranks."""
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Score every pair.

        Returns:
            `chosen` and `rejected`, both (B,) float32.
        """
        chosen, rejected = self._compare(batch)[1]
        return {"chosen": chosen, "rejected": rejected}

    @torch.no_grad()
    def score_texts(self, texts: list[str], batch_size: int = 16) -> Tensor:
        """Score complete texts, each a prompt with its response; dropout is off meanwhile.

        Args:
            texts: N texts as in training; the end-of-sequence token is appended where it is missing.
            batch_size: texts per forward pass.

        Returns:
            (N,) float32 on the CPU; subtract `reward_mean` and divide by `reward_std` for comparable units.
        """
        self.configure_model()
        end = self.tokenizer.eos_token_id
        rows = [ids if ids[-1:] == [end] else [*ids, end] for ids in self.tokenizer(texts)["input_ids"]]
        training = self.net.training
        self.net.eval()
        scores = []
        for start in range(0, len(rows), batch_size):
            chunk = [torch.tensor(ids, device=self.device) for ids in rows[start : start + batch_size]]
            ids = pad_sequence(chunk, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in chunk], batch_first=True)
            scores.append(end_scores(self(ids, mask), end_index(mask)).cpu())
        self.net.train(training)
        return torch.cat(scores)

    def samples(self) -> list[dict[str, str | float]]:
        """A few pairs of the newest validation or test batch: `chosen`, `rejected`, and the scores of both."""
        if not self._newest:
            return []
        texts = [
            [self.tokenizer.decode(row[keep.bool()]) for row, keep in zip(*side, strict=True)]
            for side in zip(self._newest["ids"], self._newest["mask"], strict=True)
        ]
        names = ("chosen", "rejected", "chosen_score", "rejected_score")
        return [
            dict(zip(names, row, strict=True)) for row in zip(*texts, *self._newest["scores"].tolist(), strict=True)
        ]

    # -- score statistics --------------------------------------------------------------------------------------------

    def _store_statistics(self, mean: float, std: float) -> None:
        self.reward_mean, self.reward_std = mean, std
        for model in self.exported_models().values():
            model.config.reward_mean, model.config.reward_std = mean, std

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the score statistics, once there are any."""
        super().on_save_checkpoint(checkpoint)
        if hasattr(self.net.model.config, "reward_mean"):
            checkpoint["reward_statistics"] = {"mean": self.reward_mean, "std": self.reward_std}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the score statistics back."""
        super().on_load_checkpoint(checkpoint)
        statistics = checkpoint.get("reward_statistics")
        if statistics is not None:
            self._store_statistics(statistics["mean"], statistics["std"])
