"""Fitting of training-run simulators under the Trainer."""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lit_models._ranks import warn
from lit_models.base import LitBase, all_reduce_sum
from lit_models.influence import functional, rows
from lit_models.influence.closed_form import ClosedForm, Ridge
from lit_models.influence.configuration import SimulatorConfig, SimulatorOptions
from lit_models.influence.functional import Factors
from lit_models.influence.metrics import TrajectoryErrors, mean_trajectory, persistence
from lit_models.influence.rows import Batch
from lit_models.nn.sharding import Sharding, is_sharded, run_gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_models.influence.modeling import InfluenceSimulator

SAMPLES = 4
"""Trajectories of the newest evaluated batch that `samples` shows."""
VALUES = ("history", "target", "mask", "start", "values")
"""Keys whose last axes are metrics, if there are several, and tests."""
PARTS = ("model", "persistence", "mean_trajectory")
"""The simulator and the trivial predictions beside it."""
HEADLINES = ("all_steps_mse", "all_steps_mae", "final_spearman")
"""Errors that are logged of the trivial predictions too."""


@dataclass(frozen=True)
class RolloutLoss:
    """A loss of free-running predictions beside teacher forcing.

    Args:
        weight: weight of it; 0 for none.
        window: steps that are simulated from a recorded value.

    Raises:
        ValueError: if a value is out of range.
    """

    weight: float = 0.0
    window: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        if self.weight < 0 or self.window < 2:
            raise ValueError(
                f"model.rollout: weight must be at least 0 and window at least 2, got {self.weight} and {self.window}"
            )


@dataclass(frozen=True)
class EarlyStop:
    """When to end training because validation no longer improves.

    Args:
        patience: validations in a row without improvement; null never stops.
        reference: an improvement is a smaller error than the "best" one so far; the released code compares with the
            "previous" one.

    Raises:
        ValueError: if a value is out of range.
    """

    patience: int | None = None
    reference: Literal["best", "previous"] = "best"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"model.stop.patience must be at least 1 or null, got {self.patience}")
        if self.reference not in ("best", "previous"):
            raise ValueError(f"model.stop.reference must be best or previous, got {self.reference!r}")


class LitInfluence(LitBase):
    """Fit a simulator of training runs to recorded ones.

    Shapes: N pool examples, M tests, D features, K runs, T steps, R rows, b places of a batch, n the order. With
    several metrics, all values have an axis of metrics before that of tests: (R,n,Q,M) and so on. Values are floating
    of any width, NaN where not measured.

    Training batches have one of three forms:

    * matrix, rows are steps: `ids` (R,b) int64, pool ids of the step, -1 padded; `history` (R,n,M), recorded values
      before it, the oldest first; `target` (R,M), values after it; and, if present, `mask` (R,M) bool, entries that
      count, `lr_scale` (R,) float32, learning rate of the step over the reference rate, `step` (R,) and `run` (R,)
      int64. Where values are recorded every k steps: `ids` (R,k,b), `lr_scale` (R,k), the target after the last of
      them. Missing steps at the end of a row are all -1;
    * pairs, rows are steps of one test: `order_ids` (R,b), `test_ids` (R,) int64, `prev` (R,n), `target` (R,), and, if
      present, `lr_scale` (R,), and `metric` (R,) int64, the number of the metric;
    * runs: the keys of evaluation.

    Batches of evaluation hold whole runs: `ids` (K,T,b); `values` (K,T+1,M), recorded from the start value on; and, if
    present, `start` (K,M) or (K,n,M), the last recorded values before the first step, by default the first of `values`,
    `lr_scale` (K,T), `length` (K,) int64, steps of each run, and `run` (K,) int64. Tests of a run whose start was not
    measured do not count. Prediction needs `start` in place of `values`. Matrix and run batches may name the tests of
    their columns in `test_ids` (M,) int64; by default these are all tests of the simulator in their order.

    What is None among the sizes and references below is asked of the data module, in `configure_model`, by these
    attributes: `pool_ids` (N,) and `test_ids` (M,) int64, none twice; `train_features` (N,D) and `test_features` (M,D)
    float32, not standardised, for kinds with features; `lr_reference` float and `batch_reference` int. If present,
    evaluation also asks for `mean_trajectory` (T+1,M) float32, the mean of the training runs at each step, and for
    further examples that occur in evaluated runs only: `unseen_pool_ids` with `unseen_train_features`, and
    `unseen_test_ids` with `unseen_test_features`. Where evaluation has several loaders, `val_names` and `test_names`
    name them. Tensors, arrays and lists will do.

    The loss is the mean squared error of predictions from recorded values, over all entries that count, plus the
    released penalty and the loss of free-running windows where these are asked for. Evaluation simulates whole runs
    from their start.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2404.07840
    * https://arxiv.org/abs/2303.08114

    Args:
        simulator: options of the simulator.
        num_train: N; that of the data by default.
        num_test: M; that of the data by default.
        feature_dim: D; that of the data by default.
        lr_reference: learning rate whose factor is 1; that of the data by default.
        batch_reference: batch size whose factor is 1; that of the data by default.
        solver: "adam" trains with the optimizer; "ridge" solves for the factors of kind "linear" in closed form, from
            the rows of an epoch in matrix or runs form, which needs one epoch and changes nothing in further ones.
        ridge: options of the closed form.
        rollout: loss of free-running predictions; its windows are found among the rows of a batch by `run` and `step`,
            so batches should hold whole runs.
        tests_per_step: tests that a training step draws at random from a batch in matrix or runs form, to bound memory;
            all by default.
        seed: seed of these draws.
        monitor: logged error by which training stops early.
        stop: when to end training early.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding and compilation; simulators are sharded as a whole, and always computed in float32.

    Raises:
        ValueError: if an option is out of range or contradicts another.
    """

    frozen = ("meters",)
    net: "InfluenceSimulator"
    """The simulator; made in `configure_model`."""

    def __init__(
        self,
        simulator: SimulatorOptions = SimulatorOptions(),
        num_train: int | None = None,
        num_test: int | None = None,
        feature_dim: int | None = None,
        lr_reference: float | None = None,
        batch_reference: int | None = None,
        solver: Literal["adam", "ridge"] = "adam",
        ridge: Ridge = Ridge(),
        rollout: RolloutLoss = RolloutLoss(),
        tests_per_step: int | None = None,
        seed: int = 1234,
        monitor: str = "val/all_steps_mse",
        stop: EarlyStop = EarlyStop(),
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        if solver not in ("adam", "ridge"):
            raise ValueError(f"model.solver must be adam or ridge, got {solver!r}")
        if solver == "ridge" and simulator.kind != "linear":
            raise ValueError(
                f"model.solver: ridge solves for the factors of kind linear, not {simulator.kind}; use adam for that"
            )
        if tests_per_step is not None and tests_per_step < 1:
            raise ValueError(f"model.tests_per_step must be at least 1 or null, got {tests_per_step}")
        self.options = simulator
        self.sizes: dict[str, Any] = {
            "num_train": num_train,
            "num_test": num_test,
            "feature_dim": feature_dim,
            "lr_reference": lr_reference,
            "batch_reference": batch_reference,
        }
        self.rollout, self.stop = rollout, stop
        self.tests_per_step, self.seed, self.monitor = tests_per_step, seed, monitor
        self.closed_form = ClosedForm(ridge) if solver == "ridge" else None
        self.net = None  # type: ignore[assignment]
        self.meters = nn.ModuleDict()
        self._stopping: dict[str, float] = {"rises": 0, "best": math.inf, "previous": math.inf}
        self._whole: tuple[InfluenceSimulator] | None = None  # a tuple, so that it is no part of this module
        self._evaluated: tuple[InfluenceSimulator, Factors] | None = None
        self._newest: dict[str, Any] = {}
        self._step_examples: Tensor | None = None

    # -- networks ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the simulator, with sizes and features of the data where the configuration leaves them out."""
        if self.net is not None:
            return self.shard_built()
        from lit_models.influence.modeling import InfluenceSimulator

        options = self.options.resolved()
        pool, tests = self._asked("pool_ids"), self._asked("test_ids")
        train, targets = self._asked("train_features"), self._asked("test_features")
        found = {
            "num_train": None if pool is None else len(pool),
            "num_test": None if tests is None else len(tests),
            "feature_dim": None if train is None else train.shape[1],
            "lr_reference": self._attribute("lr_reference"),
            "batch_reference": self._attribute("batch_reference"),
        }
        for name, value in found.items():
            if self.sizes[name] is None and value is not None:
                self.sizes[name] = float(value) if name == "lr_reference" else int(value)
        config = SimulatorConfig(**self.sizes, **options)
        for name in config.sizes:
            if self.sizes[name] is None:
                source = "train_features" if name == "feature_dim" else "pool_ids and test_ids"
                raise ValueError(f"model.{name} is not set, and the data module has no {source} to tell it; set it")

        def make() -> InfluenceSimulator:
            net = InfluenceSimulator(config)
            if config.has_features:
                net.set_examples(pool, tests, train, targets)
            else:
                net.set_examples(pool, tests)
            return net

        self.place("net", self.build(make))
        self.check_ema()

    def _attribute(self, name: str) -> Any:  # noqa: ANN401
        """Attribute of the data module; None without one."""
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return getattr(data, name, None)

    def _asked(self, name: str) -> Tensor | None:
        """Attribute of the data module as a tensor on the device of this module."""
        value = self._attribute(name)
        return None if value is None else torch.as_tensor(value, device=self.device)

    def trained_networks(self) -> dict[str, nn.Module]:
        """The simulator, in the parameter groups `model` and `model_no_decay`."""
        return {"model": self.net}

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """The simulator, and its average where one is kept."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema}  # type: ignore[dict-item]

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """The optimizer and its schedule; for the closed form one that changes nothing, so that steps are counted."""
        if self.closed_form is not None:
            return SGD(self.net.parameters(), lr=0.0)
        return super().configure_optimizers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add sizes, so that the checkpoint loads without data, the state of early stopping and collected rows."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] |= self.sizes
        checkpoint["stopping"] = dict(self._stopping)
        if self.closed_form is not None:
            checkpoint["closed_form"] = {"rows": self.closed_form.rows, "solved": self.closed_form.solved}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of early stopping and collected rows."""
        super().on_load_checkpoint(checkpoint)
        self._stopping = dict(checkpoint.get("stopping", self._stopping))
        if self.closed_form is not None and "closed_form" in checkpoint:
            state = checkpoint["closed_form"]
            self.closed_form.rows, self.closed_form.solved = list(state["rows"]), state["solved"]

    def _prepare_for(self, rest: dict[str, Any]) -> None:
        """Take over the sizes that the data has told elsewhere."""
        super()._prepare_for(rest)
        self.sizes = {name: rest[self.CHECKPOINT_HYPER_PARAMS_KEY][name] for name in self.sizes}

    # -- batches -----------------------------------------------------------------------------------------------------

    def _flat(self, batch: Batch) -> Batch:
        """The batch with metrics and tests in one axis of columns, in float32."""
        several = len(self.net.config.metrics) > 1 and "order_ids" not in batch
        flat = dict(batch)
        for name in VALUES:
            if name in batch:
                value = batch[name].flatten(-2) if several else batch[name]
                flat[name] = value if name == "mask" else value.float()
        if self.net.config.lr_scaling and "lr_scale" not in batch:
            raise ValueError(
                "model.simulator.lr_scaling: the batches have no lr_scale; record learning rates, or set it to false"
            )
        return flat

    def _require(self, batch: Batch, *names: str) -> None:
        missing = [name for name in names if name not in batch]
        if missing:
            raise ValueError(
                f"data: a batch with {', '.join(sorted(batch))} lacks {missing[0]}; see LitInfluence for the forms"
            )

    def _rows(self, batch: Batch) -> Batch:
        """Rows of the matrix form, from that or from whole runs, with a mask and without NaN."""
        batch = self._flat(batch)
        if "values" in batch:
            batch = rows.run_rows(batch, self.net.config.order, self.net.config.history_pad)
        self._require(batch, "ids", "history", "target")
        return rows.clean_rows(batch)

    def _weights(self, columns: int) -> Tensor | None:
        """(Q·M,) weight of each column; None if all are 1."""
        weights = self.net.config.metric_weights
        if set(weights) == {1.0}:
            return None
        return torch.tensor(weights, device=self.device).repeat_interleave(columns // len(weights))

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Predict single values; see `InfluenceSimulator.forward`."""
        return cast(Tensor, self.net(*args, **kwargs))

    def on_fit_start(self) -> None:
        """Make sure that there is something to learn from.

        Raises:
            ValueError: if features are missing, or the closed form is asked for on several devices.
        """
        kind = self.net.config.kind
        with self.gathered(self.net):
            learns = not self.net.config.has_features or bool(self.net.train_features.any())
        if not learns:
            raise ValueError(
                f"data: kind {kind} reads features, but the data has none; give the data module a featurizer, or set "
                "model.simulator.kind to linear"
            )
        if self.closed_form is not None and (self.trainer.world_size > 1 or self.device_mesh is not None):
            raise ValueError(
                "model.solver: ridge needs all rows in one process; set trainer.devices to 1, without trainer.strategy"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; for the closed form, only collect its rows."""
        ids = batch.get("order_ids", batch.get("ids"))
        self._step_examples = None if ids is None else (ids >= 0).sum()
        if self.closed_form is not None:
            return self._collect(batch, self.closed_form)
        return run_gathered(self.net, lambda: self._loss(batch))

    def _loss(self, batch: Batch) -> Tensor:
        loss = self._pairs_loss(batch) if "order_ids" in batch else self._matrix_loss(batch)
        if self.net.config.l2_norm:
            penalty = self.net.penalty()
            self.log("train/penalty", penalty.detach(), batch_size=1)
            loss = loss + penalty
        return loss

    def _matrix_loss(self, batch: Batch) -> Tensor:
        """Teacher forcing, and free-running windows where asked for."""
        net, config = self.net, self.net.config
        whole = self._rows(batch)
        drawn = rows.draw_tests(
            whole, self.tests_per_step, net.test_ids, len(config.metrics), self.seed + self.global_step
        )
        factors, places = net.occurring(drawn["ids"], drawn.get("test_ids"))
        prediction = net.forward_matrix(
            places, drawn["history"], drawn.get("lr_scale"), None, rows.last_steps(places), factors
        )
        weights = self._weights(prediction.shape[1])
        loss = self._mean_error(prediction, drawn["target"], drawn["mask"], weights)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(places), sync_dist=True)
        if not self.rollout.weight:
            return loss
        free = self._free_running(drawn, places, factors, weights)
        self.log("train/rollout_loss", free.detach(), batch_size=len(places), sync_dist=True)
        return loss + self.rollout.weight * free

    def _pairs_loss(self, batch: Batch) -> Tensor:
        """Teacher forcing in the row form."""
        if self.rollout.weight:
            raise ValueError("model.rollout.weight: rows of pairs have no windows; set data.mode to runs or matrix")
        batch = self._flat(batch)
        self._require(batch, "test_ids", "prev", "target")
        prev, target, metric = batch["prev"].float(), batch["target"], batch.get("metric")
        clean = rows.clean_rows(
            {"history": prev.reshape(len(prev), -1, 1), "target": target[:, None]}
            | ({"mask": batch["mask"][:, None]} if "mask" in batch else {})
        )
        prediction = self(
            batch["order_ids"], batch["test_ids"], clean["history"].squeeze(-1), batch.get("lr_scale"), metric
        )
        weights = None if metric is None else torch.tensor(self.net.config.metric_weights, device=self.device)[metric]
        loss = self._mean_error(prediction, clean["target"].squeeze(1), clean["mask"].squeeze(1), weights)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(target), sync_dist=True)
        return loss

    def _mean_error(self, prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
        """Mean over the entries that count, of all ranks once their gradients are averaged."""
        counted = mask.sum().float()
        share = counted * self.trainer.world_size / all_reduce_sum(self, counted).clamp(min=1)
        return share * functional.masked_mse(prediction, target, mask, weights)

    def _free_running(self, batch: Batch, places: Tensor, factors: Factors, weights: Tensor | None) -> Tensor:
        """Loss of roll-outs over windows of the rows of a batch, () float32."""
        if places.ndim == 3:
            raise ValueError("model.rollout.weight: windows need values of every step; record these, or set it to 0")
        self._require(batch, "run", "step")
        window = rows.windows(batch["run"], batch["step"], self.rollout.window)
        if not len(window):
            raise ValueError(
                f"model.rollout.window: no batch holds {self.rollout.window} steps of one run in a row; set data.mode "
                "to runs, or in a single process data.batch_size to all rows"
            )
        first = window[:, 0]
        rate = batch["lr_scale"][window] if "lr_scale" in batch else None
        prediction = self.net.rollout(
            batch["history"][first], places[window], rate, factors=factors, clamp=False, check=False
        )
        mask = batch["mask"][window] & batch["known"][first][:, None]
        return self._mean_error(prediction[:, 1:], batch["target"][window], mask, weights)

    def _collect(self, batch: Batch, closed_form: ClosedForm) -> Tensor:
        """Keep the rows of a batch; nothing is trained."""
        if "order_ids" in batch or ("values" not in batch and batch["ids"].ndim == 3):
            raise ValueError(
                "model.solver: ridge needs rows of single steps of all tests; set data.mode to matrix and record every "
                "step, or set solver to adam"
            )
        if "test_ids" in batch and not torch.equal(batch["test_ids"], self.net.test_ids):
            raise ValueError("model.solver: ridge needs all tests in every batch; leave test_ids out")
        closed_form.collect(self.net, self._rows(batch))
        return 0.0 * self.net.get_parameter("emb.weight").sum()

    def on_train_epoch_end(self) -> None:
        """Solve the closed form where no validation did, and forget its rows."""
        if self.closed_form is not None:
            self.closed_form.end_epoch(self.net)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        """Forget the factors of earlier weights; of a sharded simulator, take a whole copy on every process."""
        self._evaluated = self._whole = None
        if not is_sharded(self.net):
            return
        from lit_models.influence.modeling import InfluenceSimulator

        state: dict[str, Any] = self.net.state_dict()
        whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
        with torch.random.fork_rng(devices=[]):
            net: Any = InfluenceSimulator(copy.deepcopy(self.net.config))
        net.load_state_dict(whole)
        self._whole = (net.to(self.device).requires_grad_(False).eval(),)

    def _simulator(self) -> "tuple[InfluenceSimulator, Factors]":
        """The simulator with all examples that evaluated runs may hold, and its factors; made once per evaluation."""
        if self._evaluated is None:
            net = self.net if self._whole is None else self._whole[0]
            if net.config.has_features:
                sides = {"train": "unseen_pool_ids", "test": "unseen_test_ids"}
                unseen = {f"{side}_ids": self._asked(ids) for side, ids in sides.items()}
                unseen |= {f"{side}_features": self._asked(f"unseen_{side}_features") for side in sides}
                if any(value is not None for value in unseen.values()):
                    net = net.with_examples(**unseen)
            with torch.no_grad():
                self._evaluated = net, net.factors()
        return self._evaluated

    def _start(self, batch: Batch) -> tuple[Tensor, int]:
        """Values before the first simulated step, (K,M) or (K,k,M), and how many steps of the batch they cover."""
        given = self.net.config.given
        if given > 1 and "values" in batch:
            return batch["values"][:, :given], given - 1
        if "start" not in batch:
            self._require(batch, "values")
        return batch["start"] if "start" in batch else batch["values"][:, 0], 0

    def _simulate(
        self, batch: Batch, start: Tensor, covered: int, check: bool, factors: Factors | None = None
    ) -> Tensor:
        """Trajectories of a flat batch from what `_start` gave, (K,T+1,Q·M), the given values first."""
        net, own = self._simulator()
        factors = own if factors is None else factors
        tests = batch.get("test_ids", self.net.test_ids)
        if not torch.equal(tests, net.test_ids):
            metrics = torch.arange(len(net.config.metrics), device=tests.device)
            columns = (metrics[:, None] * len(net.test_ids) + net.test_rows(tests)).flatten()
            factors = Factors(factors.A[..., columns], factors.B[:, columns])
        if start.shape[-1] != factors.B.shape[1]:
            raise ValueError(
                f"data: the start of a run has {start.shape[-1]} values, but there are {factors.B.shape[1]} of all "
                "tests; name the tests of the columns in test_ids"
            )
        rate, length = batch.get("lr_scale"), batch.get("length")
        prediction = net.rollout(
            start,
            net.train_rows(batch["ids"][:, covered:]),
            None if rate is None else rate[:, covered:],
            None if length is None else (length - covered).clamp(min=0),
            factors=factors,
            check=False,
        )
        if covered:
            prediction = torch.cat([start[:, :covered], prediction], 1)
        if check:
            runs = batch["run"].tolist() if "run" in batch else None
            functional.check_finite(prediction, runs, net.column_names(tests))
        return prediction

    def _guesses(self, batch: Batch) -> dict[str, Tensor]:
        """The trivial predictions for a flat batch, (K,T+1,Q·M)."""
        truth = batch["values"]
        steps = truth.shape[1] - 1
        guesses = {"persistence": persistence(truth[:, self.net.config.given - 1], steps)}
        mean = self._asked("mean_trajectory")
        if mean is not None and "test_ids" not in batch:
            mean = mean_trajectory(mean.flatten(1)[None].float())
            mean = torch.cat([mean, mean[-1:].expand(max(0, steps + 1 - len(mean)), -1)])[: steps + 1]
            guesses["mean_trajectory"] = mean.expand_as(truth)
        return guesses

    def _meters(self, loader: int) -> dict[str, nn.ModuleDict]:
        """Meters of `PARTS` by metric, for the runs of one loader."""
        key, config = str(loader), self.net.config
        if key not in self.meters:
            sets = {metric: {part: TrajectoryErrors(config.given) for part in PARTS} for metric in config.metrics}
            self.meters[key] = nn.ModuleDict({metric: nn.ModuleDict(parts) for metric, parts in sets.items()})
            self.meters.to(self.device)
        return cast(dict[str, nn.ModuleDict], self.meters[key])

    def _by_metric(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.chunk(len(self.net.config.metrics), -1)

    def _evaluate(self, batch: Batch, loader: int, check: bool) -> None:
        self._require(batch, "ids", "values")
        batch = self._flat(batch)
        start, covered = self._start(batch)
        known = start.isfinite() if start.ndim == 2 else start.isfinite().all(1)
        start = torch.where(known if start.ndim == 2 else known[:, None], start, 0.0)
        batch["values"] = torch.where(known[:, None], batch["values"], torch.nan)
        truth, length = self._by_metric(batch["values"]), batch.get("length")
        for candidate in [] if self.closed_form is None or loader else self.closed_form.candidates:
            parts = self._by_metric(self._simulate(batch, start, covered, False, candidate.factors))
            for meter, part, true in zip(candidate.meters, parts, truth, strict=True):
                meter.update(part, true, length)
        prediction = self._simulate(batch, start, covered, check)
        if not self.trainer.sanity_checking and not bool(prediction.isfinite().all()):
            warn(
                "roll-outs of validation leave the range of numbers and count as infinitely wrong; test and predict "
                "stop with an error there, so set model.simulator.clamp, or identity_offset 1 and tower_scale 1/P",
                stacklevel=2,
            )
        meters = self._meters(loader)
        for name, guess in ({"model": prediction} | self._guesses(batch)).items():
            for metric, part, true in zip(self.net.config.metrics, self._by_metric(guess), truth, strict=True):
                cast(TrajectoryErrors, meters[metric][name]).update(part, true, length)
        self._keep(batch, prediction)

    def _log_errors(self, stage: str) -> dict[str, Tensor]:
        """Log errors of the model and of the trivial predictions, by loader and metric where there are several."""
        config, names = self.net.config, self._attribute(f"{stage}_names")
        values: dict[str, Tensor] = {}
        for loader, by_metric in self._filled_meters(stage).items():
            root = stage if loader == 0 else f"{stage}/{loader if names is None else names[loader]}"
            found: dict[str, Tensor] = {}
            for metric, meters in by_metric.items():
                prefix = root if len(config.metrics) == 1 else f"{root}/{metric}"
                for name, errors in meters.items():
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
                        numbers: dict[str, Tensor] = errors.compute()
                    errors.reset()
                    part, shown = (prefix, numbers) if name == "model" else (f"{prefix}/{name}", HEADLINES)
                    found |= {f"{part}/{key}": numbers[key] for key in shown}
            if len(config.metrics) > 1 and found:
                weights = torch.tensor(config.metric_weights, device=self.device)
                for key in HEADLINES:
                    means = torch.stack([found[f"{root}/{metric}/{key}"] for metric in config.metrics])
                    found[f"{root}/{key}"] = (means * weights).sum() / weights.sum()
            values |= found
        for key, value in values.items():
            self.log(key, value, prog_bar=key == f"{stage}/all_steps_mse", sync_dist=True)
        return values

    def _filled_meters(self, stage: str) -> dict[int, dict[str, dict[str, TrajectoryErrors]]]:
        """Meters that hold something on any rank, by loader, metric and part, the same on all ranks."""
        batches = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        found: dict[int, dict[str, dict[str, TrajectoryErrors]]] = {}
        for loader in range(len(batches) if isinstance(batches, list) else 1):
            for metric, meters in self._meters(loader).items():
                parts = {name: cast(TrajectoryErrors, meter) for name, meter in meters.items()}
                called = torch.tensor([float(meter.update_called) for meter in parts.values()], device=self.device)
                anywhere = all_reduce_sum(self, called).tolist()
                filled = {name for name, times in zip(parts, anywhere, strict=True) if times}
                found.setdefault(loader, {})[metric] = {name: parts[name] for name in parts if name in filled}
        return found

    @property
    def _fitting(self) -> bool:
        """Whether this is an evaluation in the course of a fit."""
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    def on_validation_epoch_start(self) -> None:
        """Solve the closed form of what was collected, and forget the factors of earlier weights."""
        if self.closed_form is not None and self._fitting and not self.closed_form.solved:
            self.closed_form.solve(self.net)
        self._begin_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Simulate the runs of a batch."""
        self._evaluate(batch, dataloader_idx, check=False)

    def on_validation_epoch_end(self) -> None:
        """Log `val/all_steps_mse` and the other errors of `TrajectoryErrors`; choose λ; stop where nothing improves.

        The errors of the trivial predictions stand under `val/persistence/` and `val/mean_trajectory/`. With several
        metrics, all of these stand under `val/METRIC/`, and `val/all_steps_mse` is their mean by `metric_weights`.
        Those of a second loader stand under `val/NAME/`, by the names of the data module or else by number.
        """
        if self.closed_form is not None and self.closed_form.candidates:
            best = self.closed_form.choose(self.net)
            for metric, meter in zip(self.net.config.metrics, best.meters, strict=True):
                self._meters(0)[metric]["model"] = meter
            self.log("ridge/penalty", best.penalty)
        values = self._log_errors("val")
        self._evaluated = self._whole = None
        if self._fitting and self.stop.patience is not None:
            self._watch(values, self.stop.patience)

    def _watch(self, values: dict[str, Tensor], patience: int) -> None:
        """Count validations without improvement, and stop after too many."""
        if self.monitor not in values:
            raise ValueError(f"model.monitor: {self.monitor!r} is not logged; take one of {', '.join(sorted(values))}")
        value, state = float(values[self.monitor]), self._stopping
        improved = value < state["best"] if self.stop.reference == "best" else value <= state["previous"]
        state["rises"] = 0 if improved else state["rises"] + 1
        state["best"], state["previous"] = min(state["best"], value), value
        if state["rises"] >= patience:
            self.trainer.should_stop = True

    def on_test_epoch_start(self) -> None:
        """Forget the factors of earlier weights."""
        self._begin_evaluation()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Simulate the runs of a batch."""
        self._evaluate(batch, dataloader_idx, check=True)

    def on_test_epoch_end(self) -> None:
        """Log `test/all_steps_mse` and so on; see `on_validation_epoch_end`."""
        self._log_errors("test")
        self._evaluated = self._whole = None

    def on_predict_epoch_start(self) -> None:
        """Forget the factors of earlier weights."""
        self._begin_evaluation()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Simulate curricula.

        Returns:
            `trajectory` (K,T+1,M) float32, or (K,T+1,Q,M) for several metrics, the start value first and, after the end
            of a shorter run, its last value; `length` (K,) int64, steps of each run; and `run` (K,) int64.

        Raises:
            ValueError: if a prediction is not finite, naming run, step and test.
        """
        self._require(batch, "ids")
        flat = self._flat(batch)
        prediction = self._simulate(flat, *self._start(flat), check=True)
        self._keep(flat, prediction)
        number, steps = flat["ids"].shape[:2]
        numbers = torch.arange(number, device=prediction.device)
        metrics = len(self.net.config.metrics)
        return {
            "run": batch.get("run", numbers),
            "length": batch.get("length", torch.full_like(numbers, steps)),
            "trajectory": prediction if metrics == 1 else prediction.unflatten(-1, (metrics, -1)),
        }

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    def step_stats(self) -> dict[str, float | Tensor]:
        """Pool `examples` in the steps of the last training batch on this rank, each as often as it occurs."""
        return {} if self._step_examples is None else {"examples": self._step_examples}

    def _keep(self, batch: Batch, prediction: Tensor) -> None:
        """Copy a few trajectories of the first run, so that the rest of the batch can go."""
        last = int(batch["length"][0]) if "length" in batch else prediction.shape[1] - 1
        names = self.net.column_names(batch.get("test_ids"))[:SAMPLES]
        self._newest = {
            "run": str(int(batch["run"][0]) if "run" in batch else 0),
            "test": names,
            "start": prediction[0, 0, : len(names)].tolist(),
            "simulated": prediction[0, last, : len(names)].tolist(),
        }
        if "values" in batch:
            self._newest["recorded"] = batch["values"][0, last, : len(names)].tolist()

    def samples(self) -> list[dict[str, str | float]]:
        """A few tests of the first run of the newest evaluated batch.

        Returns:
            `run`, `test`, the value at the `start`, and the `simulated` and, if known, the `recorded` value at the end.
        """
        columns = {name: value for name, value in self._newest.items() if name != "run"}
        return [
            {"run": self._newest["run"], **dict(zip(columns, row, strict=True))}
            for row in zip(*columns.values(), strict=True)
        ]
