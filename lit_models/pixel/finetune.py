"""Classification, regression and tagging of text that is read as pixels, as tokens, or as both, under the Trainer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from lit_models.base import LitBase, all_reduce_sum
from lit_models.nn.flops import forward_flops, training_flops, transformer_cost
from lit_models.nn.sharding import Sharding
from lit_models.pixel.recipes import PixelBackbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Any]
Task = Literal["classification", "regression", "tagging"]
MetricName = Literal["accuracy", "mcc", "f1", "spearman", "pearson"]

SAMPLES = 4
"""Rows of the newest validation batch that `samples` shows."""
_EMBEDDINGS = {"pixel_values": "embed_patches", "input_ids": "embed_tokens"}
IGNORED = -100
"""Tag of words that do not count, and of padding."""
_INPUTS = ("pixel_values", "pixel_mask", "input_ids", "attention_mask")


def make_metric(name: MetricName, num_labels: int) -> Metric:
    """Make a metric of predictions and targets, both (N,); higher is better for all of them.

    Args:
        name: `accuracy`; `mcc`, the Matthews correlation; `f1`, of label 1 for two labels and the mean over labels for
            more; `spearman`, of the ranks, and `pearson`, both for regression.
        num_labels: number of labels.

    Returns:
        The metric.
    """
    if name == "accuracy":
        return MulticlassAccuracy(num_labels, average="micro")
    if name == "mcc":
        return MulticlassMatthewsCorrCoef(num_labels)
    if name == "f1":
        return BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro")
    with warnings.catch_warnings():  # it keeps all predictions, as a correlation of ranks must
        warnings.filterwarnings("ignore", message=".*will save all targets and predictions")
        return SpearmanCorrCoef() if name == "spearman" else PearsonCorrCoef()


class Meter(nn.Module):
    """Mean loss and metrics of one evaluation set, over all its rows and ranks.

    Args:
        names: metrics besides the loss.
        num_labels: number of labels.
    """

    def __init__(self, names: Sequence[MetricName], num_labels: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.metrics = nn.ModuleDict({name: make_metric(name, num_labels) for name in names})

    def update(self, losses: Tensor, predictions: Tensor, targets: Tensor) -> None:
        """Add rows, or words where those are what is labelled.

        Args:
            losses: (N,) float32.
            predictions: (N,) float32 for regression, otherwise int64.
            targets: (N,) of the same type.
        """
        if losses.numel():
            self.loss.update(losses)
            for metric in self.metrics.values():
                cast(Metric, metric).update(predictions, targets)

    def compute(self) -> dict[str, float]:
        """Values by name; a correlation with something constant is undefined and counts as 0."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The variance of predictions or target is close to zero")
            # Of many ranks, some may have no row of a small set.
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
            values = {name: float(cast(Metric, metric).compute()) for name, metric in self.metrics.items()}
            loss = float(self.loss.compute())
        return {"loss": loss, **{name: 0.0 if value != value else value for name, value in values.items()}}


class LitPixelTask(LitBase):
    """Fine-tune a pixel language model, or PIXEL, to label texts or words.

    Batches hold strips, tokens, or both of the same text, and labels:

    * `pixel_values` (B,C,H,W) uint8, white 255, with `pixel_mask` (B,L) int64, ones at attended patches;
    * `input_ids` (B,T) int64 with `attention_mask` (B,T) int64, padded on the right;
    * `label` (B,) int64 for classification, float32 for regression; or, for tagging, `word_patches` (B,N) int64, the
      patch at which each word is read, 0 or -100 at padding, and `tags` (B,N) int64, -100 where there is none.

    The losses are the cross entropy and, for regression, the squared error; training averages over all rows (or tagged
    words) of an optimizer step, over ranks and accumulated batches, and evaluation over all of the data. With several
    validation or test sets, the numbers of set NAME are logged as `val/NAME/accuracy` and so on, and their plain means
    over the sets as `val/accuracy`, where the number of a single set is.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2404.10710
    * https://arxiv.org/abs/2207.06991

    Args:
        backbone: the pre-trained trunk under the head, or a fine-tuned model to train further.
        task: what is predicted: one label for each text, one number for each text, or one label for each word.
        labels: names of the labels, in the order of their numbers; they become `id2label` of the exported model.
        num_labels: number of labels, where they have no names; 1 for regression.
        metrics: what is logged besides the loss: `accuracy`, `mcc`, `f1`, or, for regression, `spearman` and
            `pearson`; accuracy, or both correlations, by default.
        val_names: names of the validation sets, if there are several; those that the data module gives by default.
        test_names: names of the test sets, likewise.
        linear_probe: train the head only, on a trunk that stays as it is and in evaluation mode.
        tokenizer: hub id or folder; needed for input with tokens, and exported beside the model.
        pad_token: token of the vocabulary to pad with instead of the tokenizer's own.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.

    Raises:
        ValueError: if the options contradict each other.
    """

    net: "PreTrainedModel"
    """Trunk and head; made in `configure_model`."""

    def __init__(
        self,
        backbone: PixelBackbone,
        task: Task = "classification",
        labels: list[str] | None = None,
        num_labels: int | None = None,
        metrics: list[MetricName] | None = None,
        val_names: list[str] | None = None,
        test_names: list[str] | None = None,
        linear_probe: bool = False,
        tokenizer: str | None = None,
        pad_token: str | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        self.backbone, self.task = backbone, task
        self.labels = _label_names(task, labels, num_labels)
        self.metric_names = _metric_names(task, metrics)
        self.set_names = {"val": _set_names("val", val_names), "test": _set_names("test", test_names)}
        self.linear_probe = linear_probe
        self.tokenizer_name, self.pad_token = tokenizer, pad_token
        self.net = None  # type: ignore[assignment]
        self._meters: dict[str, Meter] = {}  # by set of the evaluation that runs; "" is the name of the only one
        self._window: list[Tensor] = []  # labels of each batch since the last optimizer step
        self._seen: set[str] = set()  # keys of these batches
        self._step_lengths: Tensor | None = None  # (2,B) attended patches and tokens of the newest training batch
        self._newest: Batch = {}

    def configure_model(self) -> None:
        """Load the tokenizer, if there is one, and build the network."""
        if self.net is not None:
            return self.shard_built()
        source = getattr(self.backbone, "name", None)
        if isinstance(source, str) and source.endswith(".ckpt"):
            raise ValueError(
                f"model.backbone.name: {source!r} is a checkpoint of the Trainer; export it with "
                "python -m lit_models.export, and name the folder that this writes"
            )
        if self.tokenizer_name is not None:
            from lit_models.tokenization import load_tokenizer

            self.tokenizer = load_tokenizer(self.tokenizer_name, self.pad_token)
        build = self.backbone.build_tagger if self.task == "tagging" else self.backbone.build_classifier
        try:
            net = self.build(lambda: build(len(self.labels)))
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"model.labels or model.num_labels: the head in {source!r} does not have {len(self.labels)} outputs; "
                "give the labels it was trained with, or start from the model before its fine-tuning"
            ) from error
        if self.tokenizer_name is not None:
            from lit_models.tokenization import check_vocabulary

            check_vocabulary(self.tokenizer, net)
            net.config.pad_token_id = self.tokenizer.pad_token_id
        net.config.id2label = dict(enumerate(self.labels))
        net.config.label2id = {label: number for number, label in enumerate(self.labels)}
        if self.task != "tagging":
            net.config.problem_type = "regression" if self.task == "regression" else "single_label_classification"
        if self.linear_probe:
            net.base_model.requires_grad_(False).eval()
        self.place("net", net)
        self.check_ema()

    def train(self, mode: bool = True) -> "LitPixelTask":
        """Set training mode, except for the trunk under a linear probe."""
        super().train(mode)
        if self.linear_probe and self.net is not None:
            self.net.base_model.eval()
        return self

    def trained_networks(self) -> dict[str, nn.Module]:
        """The network, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """The network with its head, and its average where one is kept."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema}  # type: ignore[dict-item]

    # -- checks before and beside training ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make sure that what callbacks monitor will be logged.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: if a callback monitors something of this module that it does not log.
        """
        super().setup(stage)
        # Lightning tells that the data module might have one too; ours has none.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        if stage != "fit":
            return
        numbers = ("loss", *self.metric_names)
        sets = self.set_names["val"] or self._loader_names("val")
        known = [f"val/{number}" for number in numbers]
        known += [f"val/{name}/{number}" for name in sets for number in numbers]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            key = getattr(callback, "monitor", None)
            if isinstance(key, str) and key.startswith("val/") and key not in known:
                raise ValueError(
                    f"trainer.callbacks: {type(callback).__name__}.monitor is {key!r}, which is never logged; take one "
                    f"of {', '.join(known)}, or add to model.metrics or model.val_names"
                )

    def _loader_names(self, stage: str) -> list[str]:
        """Names that the data module gives to its evaluation sets, if there are several."""
        names = getattr(self.trainer.datamodule, "loader_names", {}).get(stage, [])  # type: ignore[attr-defined]
        return list(names) if len(names) > 1 else []

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check a batch while it is still on the CPU.

        Args:
            batch: what the data module made.
            dataloader_idx: number of the loader.

        Returns:
            The batch.

        Raises:
            ValueError: if it cannot be read or labelled by this module as configured.
        """
        if "input_ids" in batch and not hasattr(self.net.base_model, "embed_tokens"):
            raise ValueError(
                f"data: {type(self.net).__name__} reads strips only, but the batches hold tokens; see data.input"
            )
        if "input_ids" in batch and self.tokenizer_name is None:
            raise ValueError("model.tokenizer: the batches hold tokens; set it to the tokenizer of the data")
        if self.task == "tagging" and "word_patches" not in batch:
            raise ValueError("model.task: tagging needs word_patches in the batches; use a data module of tagged words")
        if self._trainer is None or not self._trainer.predicting:
            self._check_labels(batch)
        return batch

    def _check_labels(self, batch: Batch) -> None:
        key = "tags" if self.task == "tagging" else "label"
        if key not in batch:
            raise ValueError(f"model.task: {self.task} needs {key} in the batches; use a data module that has them")
        labels: Tensor = batch[key]
        if self.task == "regression":
            return
        if labels.is_floating_point():
            raise ValueError("model.task: the labels are real numbers; set it to regression")
        wrong = (labels < 0) | (labels >= len(self.labels))
        if self.task == "tagging":
            wrong &= labels != IGNORED
        if wrong.any():
            raise ValueError(
                f"model.labels or model.num_labels: the data holds label {int(labels[wrong][0])}, but labels go from 0 "
                f"to {len(self.labels) - 1}; give all of them, or take a split whose labels are public"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Score the labels.

        Args:
            batch: the input keys of a batch; others are ignored.

        Returns:
            (B,C) float32, or (B,N,C) for tagging.
        """
        keys = (*_INPUTS, "word_patches") if self.task == "tagging" else _INPUTS
        logits: Tensor = self.net(**{key: batch[key] for key in keys if key in batch}).logits
        return logits.float()

    def _targets(self, batch: Batch) -> Tensor:
        """Labels in the order of the rows or words."""
        if self.task == "tagging":
            return cast(Tensor, batch["tags"])
        return batch["label"].float() if self.task == "regression" else batch["label"]

    def _rate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of all rows or tagged words (N,), scores (B,C) or (B,N,C), and targets (B,) or (B,N)."""
        scores, targets = self(batch), self._targets(batch)
        if self.task == "regression":
            return F.mse_loss(scores[:, 0], targets, reduction="none"), scores, targets
        counted = targets != IGNORED
        return F.cross_entropy(scores[counted], targets[counted], reduction="none"), scores, targets

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, for the gradient of the mean over all labels of the optimizer step."""
        losses, _, _ = self._rate(batch)
        local = torch.stack([losses.detach().sum(), losses.new_full((), losses.numel())])
        total, count = all_reduce_sum(self, local)
        self._window.append(count)
        self._step_lengths = _attended(batch)
        self.log("train/loss", total / count.clamp(min=1), prog_bar=True, batch_size=_rows(batch))
        # Data-parallel strategies average gradients over ranks, where a sum is needed.
        loss = losses.sum() * self.trainer.world_size / self._window[0].clamp(min=1)
        self._seen |= batch.keys()
        if self.trainer.world_size > 1 and self.device_mesh is None:  # DDP waits for a gradient of every parameter
            loss = loss + sum(0.0 * parameter.sum() for parameter in self._idle(batch))
        return loss

    def _idle(self, keys: Collection[str]) -> list[nn.Parameter]:
        """Parameters of the embedding that input with these keys does without."""
        modules = [getattr(self.net.base_model, name, None) for key, name in _EMBEDDINGS.items() if key not in keys]
        parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See `LitBase.rescale_gradients`."""
        self.rescale_gradients(self.net, self._window)
        for parameter in self._idle(self._seen):
            parameter.grad = None
        self._window.clear()
        self._seen.clear()

    def step_stats(self) -> dict[str, float | Tensor]:
        """Attended patches and tokens of the last training step on this rank.

        Returns:
            `patches`, and `tokens`, which are patches and tokens together: positions of the trunk.
        """
        if self._step_lengths is None:
            return {}
        return {"tokens": self._step_lengths.sum(), "patches": self._step_lengths[0].sum()}

    def step_flops(self) -> Tensor | None:
        """Operations of the last training step on this rank; a linear probe only runs the trunk forwards."""
        if self._step_lengths is None:
            return None
        lengths, cost = self._step_lengths.sum(0), transformer_cost(self.net)
        if not self.linear_probe:
            return training_flops(cost, lengths)
        trunk = transformer_cost(self.net.base_model)
        return forward_flops(trunk, lengths) + training_flops(cost - trunk, lengths)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch, number: int) -> None:
        losses, scores, targets = self._rate(batch)
        predictions = self._predictions(scores)
        counted = slice(None) if self.task == "regression" else targets != IGNORED
        list(self._meters.values())[number].update(losses, predictions[counted], targets[counted])
        shown = {"predictions": predictions, "targets": targets} | batch
        keys = ("predictions", "targets", "input_ids", "attention_mask")
        self._newest = {key: shown[key][:SAMPLES] for key in keys if key in shown}

    def _predictions(self, scores: Tensor) -> Tensor:
        """The number, or the number of the best label."""
        return scores[:, 0] if self.task == "regression" else scores.argmax(-1)

    def _begin(self, stage: str, batches: Any) -> None:  # noqa: ANN401
        """Make a meter for every set.

        Args:
            stage: `val` or `test`.
            batches: number of batches of every set.
        """
        sets = len(batches) if isinstance(batches, list) else 1
        names = self.set_names[stage]
        if names and len(names) != sets:
            raise ValueError(
                f"model.{stage}_names: there are {len(names)} names, but the data has {sets} sets for this; give one "
                "name for each set, or null to take those of the data"
            )
        names = names or self._loader_names(stage)
        if len(names) != sets:
            names = [str(number) for number in range(sets)] if sets > 1 else [""]
        self._meters = {name: Meter(self.metric_names, len(self.labels)).to(self.device) for name in names}

    def _finish(self, stage: str) -> None:
        """Log the numbers of every set, and their means over the sets."""
        values = {name: meter.compute() for name, meter in self._meters.items()}
        for name, numbers in values.items():
            if name:
                self.log_dict({f"{stage}/{name}/{key}": value for key, value in numbers.items()}, sync_dist=True)
        keys = ("loss", *self.metric_names)
        means = {f"{stage}/{key}": sum(numbers[key] for numbers in values.values()) / len(values) for key in keys}
        self.log_dict(means, prog_bar=True, sync_dist=True)

    def on_train_start(self) -> None:
        """Find out now whether the validation sets fit their names, rather than at the first validation."""
        if self.trainer.num_val_batches:
            self._begin("val", self.trainer.num_val_batches)

    def on_validation_start(self) -> None:
        """Begin new numbers."""
        self._begin("val", self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Begin new numbers."""
        self._begin("test", self.trainer.num_test_batches)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the numbers of its set."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log loss and metrics of every validation set, and their means."""
        self._finish("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the numbers of its set."""
        self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss and metrics of every test set, and their means."""
        self._finish("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Label every text or word; labels in the batch are not looked at.

        Returns:
            For classification `prediction`, B names of labels, `probability` of it (B,) float32 and `probabilities` of
            all labels (B,C) float32. For regression `prediction` (B,) float32. For tagging `prediction` and
            `probability`, a list with one entry for each word of a text.
        """
        scores = self(batch)
        best = self._predictions(scores)
        if self.task == "regression":
            return {"prediction": best}
        probabilities = scores.softmax(-1)
        probability = probabilities.amax(-1)
        if self.task == "classification":
            names = [self.labels[number] for number in best.tolist()]
            return {"prediction": names, "probability": probability, "probabilities": probabilities}
        words = batch["word_patches"] > 0
        words[:, 0] |= batch["word_patches"][:, 0] == 0  # elsewhere 0 is padding, like -100
        rows = list(zip(best, probability, words, strict=True))
        return {
            "prediction": [[self.labels[number] for number in tags[keep].tolist()] for tags, _, keep in rows],
            "probability": [values[keep].tolist() for _, values, keep in rows],
        }

    def samples(self) -> list[dict[str, str | float]]:
        """A few rows of the newest validation or test batch: `label` and `prediction`, and `text` if it has tokens."""
        if not self._newest:
            return []
        pairs = zip(self._newest["targets"], self._newest["predictions"], strict=True)
        rows = [{"label": self._shown(label, label), "prediction": self._shown(best, label)} for label, best in pairs]
        if "input_ids" in self._newest:
            texts = zip(self._newest["input_ids"], self._newest["attention_mask"], strict=True)
            for row, (ids, mask) in zip(rows, texts, strict=True):
                row["text"] = str(self.tokenizer.decode(ids[mask.bool()]))
        return rows

    def _shown(self, values: Tensor, label: Tensor) -> str | float:
        """A number, the name of a label, or the names of the labels of all tagged words."""
        if self.task == "regression":
            return float(values)
        return " ".join(self.labels[number] for number in values[label != IGNORED].reshape(-1).tolist())


def _attended(batch: Batch) -> Tensor:
    """(2,B) int64, attended patches and tokens of each row."""
    masks = ("pixel_mask", "attention_mask")
    counts = {key: batch[key].sum(1) for key in masks if key in batch}
    none = torch.zeros_like(next(iter(counts.values())))
    return torch.stack([counts.get(key, none) for key in masks])


def _rows(batch: Batch) -> int:
    return len(batch["pixel_values"] if "pixel_values" in batch else batch["input_ids"])


def _label_names(task: Task, labels: list[str] | None, num_labels: int | None) -> list[str]:
    """Checked names of the labels."""
    if task == "regression":
        if labels is not None:
            raise ValueError("model.labels: regression predicts a number; set it to null, or model.task to another one")
        if num_labels not in (None, 1):
            raise ValueError(f"model.num_labels: regression has one output, got {num_labels}; set it to 1 or null")
        return ["LABEL_0"]
    if labels is None and num_labels is None:
        raise ValueError(f"model.labels: {task} needs the names of the labels; give them, or model.num_labels")
    if labels is not None and num_labels not in (None, len(labels)):
        raise ValueError(f"model.num_labels: {num_labels} differs from the {len(labels)} model.labels; set it to null")
    names = labels if labels is not None else [f"LABEL_{number}" for number in range(num_labels or 0)]
    if len(names) < 2:
        raise ValueError(
            f"model.num_labels: {task} needs at least 2 labels, got {len(names)}; for real numbers set model.task to "
            "regression"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"model.labels: {twice!r} stands there twice; every label needs a name of its own")
    return list(names)


def _metric_names(task: Task, metrics: list[MetricName] | None) -> list[MetricName]:
    """Checked names of the metrics."""
    fitting: tuple[MetricName, ...] = ("spearman", "pearson") if task == "regression" else ("accuracy", "mcc", "f1")
    if metrics is None:
        return list(fitting) if task == "regression" else ["accuracy"]
    for name in metrics:
        if name not in fitting:
            raise ValueError(f"model.metrics: {name!r} is not a metric of {task}; take some of {', '.join(fitting)}")
    return list(metrics)


def _set_names(stage: str, names: list[str] | None) -> list[str]:
    """Checked names of the evaluation sets."""
    names = list(names or [])
    if len(set(names)) < len(names) or any(not name or "/" in name for name in names):
        raise ValueError(f"model.{stage}_names: {names} must be different words without slashes")
    return names
