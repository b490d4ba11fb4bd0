"""Recording of a training run: which examples every step used, and the metrics of test examples after it."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from callbacks.recorder.causal import OPTION
from callbacks.recorder.examples import Examples, IdsFrom, Share, TestBatch, collate_of, rows_in_whole
from callbacks.recorder.facts import pool_facts, run_facts
from callbacks.recorder.gradients import ProjectedGradients, features
from callbacks.recorder.meter import Meter, imported, parse_metrics, undisturbed
from callbacks.recorder.sources import IdSource
from lit_models.nn.clipping import total_norm
from lit_models.recording import RunWriter, read_info, write_features


class TrainingDynamicsRecorder(Callback):
    """Records the dynamics of a `fit` for simulators of training runs: see `lit_models.recording` for the files.

    Every optimizer step gets a row: the ids of the training examples it used, its learning rates, its training loss and
    whether its update was skipped. Before the first step and after every `every_n_steps`-th one, metrics of the test
    examples are measured. Training itself goes on bit for bit as without the recorder: modes of all sub-modules and the
    random states are restored, and forward passes run without gradients.

    The loss of a test example is, by preference: what `per_example_metrics(batch)` of the module returns (a dict of
    tensors (B,)); the mean cross entropy of the answer tokens (`labels` other than -100) where the module trains one
    causal language model of transformers; or what the module's `validation_step`, else its `training_step`, gives for
    batches of one example, which is slow.

    Args:
        out_dir: folder of the experiment; with `run_id` null, folder of the run.
        run_id: name of the run, a folder in `out_dir`.
        test_dataset: test examples, whose ids stand under `id_key`; they are put together like training examples.
        test_dataloader: test examples as a `DataLoader`; or `val`, those of the validation loader.
        metrics: what to measure, by name; null is `{loss: null}`. A value is null for the default of that name; the
            import path of a function `(pl_module, batch) -> Tensor (B,)`; or a mapping with `function` (such a path, or
            one of `loss`, `accuracy`, `bleu`, `rougeL`; by default the name), `every_n_steps`, and options of the
            function.
        every_n_steps: steps between two measurements.
        record_start: measure before the first step as well.
        record_end: measure after the last step whatever had not been measured there.
        tests_per_record: measure only that many tests at a time (those of all processes together), in turns; the start
            and the end get all of them. What was not measured is NaN on disk.
        id_source: where the ids of training examples come from: `batch`, an entry or attribute `id_key` of every batch;
            `sampler`, the row numbers in the data set (in the whole one, for a `Subset` of it), whatever the batches
            hold; or the import path of a function from a batch to its ids.
        id_key: entry or attribute of batches and test examples.
        test_ids: `key`, test ids stand under `id_key`; `position`, they are row numbers of the data set; `auto`, the
            former where examples have that key, the latter with `test_dataloader: val` or `id_source: sampler`.
        flush_every: steps per file on disk.
        dtype: of the metrics on disk.
        max_eval_batch_size: most tests in a batch.
        save_checkpoints_at: weights to keep for gradient methods: steps (0 is before training), or how many, spread
            evenly from 0 to the last step (with manual optimization, give steps). They are written to
            `checkpoints/step-N.ckpt` in the folder of the run.
        grad_features: dimensions of random projections of the loss gradients of all tests and, where they have row
            numbers, pool examples before the first step, written to `features-rRANK.safetensors`; or the import path
            of a function `(pl_module, batch) -> Tensor (B,D)` that gives other features.
        pool: `pool.jsonl` of the experiment, or the number of its examples; by default `out_dir/pool.jsonl` where it
            exists, else the size of the data set with `id_source: sampler`.
        reduce: entry or attribute of test examples that names their group, a whole number; the means of groups are
            kept in place of values of single tests, and the groups are the test ids.
        grad_norm: record the norm of the gradient before clipping, which reads all gradients once more.
        seed: of sampled answers and of the projections of `grad_features`.
        overwrite: replace a run that is in the way.

    Raises:
        ValueError: in one sentence that names the option, wherever recording could not be right.

    Note:
        Processes never wait for each other here. Each one writes its own rows, with its share of the tests, so
        `out_dir` must be the same folder for all of them. All of them run equally many forward passes, as sharded
        networks need it; the module is called as it is, which `FSDPStrategy` (not `ModelParallelStrategy`) allows for
        wrapped sub-modules only.

        With manual optimization a step is a batch in which an optimizer stepped, however often; its learning rates are
        those of the last time. Gradients of an open accumulation are not part of Lightning's checkpoints, so a run that
        is resumed there records only the batches that took part in the update.

        A run is resumed with rows after the checkpoint removed. With `fast_dev_run` everything is tried in a folder
        that is removed again.

    Example::

        Trainer(callbacks=[TrainingDynamicsRecorder("runs/sst2", "run-0", test_dataset=tests, id_source="sampler")])
    """

    def __init__(
        self,
        out_dir: str,
        run_id: str | None = None,
        test_dataset: Dataset | None = None,  # type: ignore[type-arg]  # the command line takes no Dataset[Any]
        test_dataloader: DataLoader | Literal["val"] | None = None,  # type: ignore[type-arg]
        metrics: dict[str, Any] | None = None,
        every_n_steps: int = 1,
        record_start: bool = True,
        record_end: bool = True,
        tests_per_record: int | None = None,
        id_source: str | Callable[[Any], Any] = "batch",
        id_key: str = "id",
        test_ids: IdsFrom = "auto",
        flush_every: int = 50,
        dtype: Literal["float32", "float16"] = "float32",
        max_eval_batch_size: int = 64,
        save_checkpoints_at: list[int] | int | None = None,
        grad_features: int | str | Callable[[LightningModule, Any], Tensor] | None = None,
        pool: str | int | None = None,
        reduce: str | None = None,
        grad_norm: bool = False,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        for name, number in (
            ("every_n_steps", every_n_steps),
            ("flush_every", flush_every),
            ("max_eval_batch_size", max_eval_batch_size),
            ("tests_per_record", 1 if tests_per_record is None else tests_per_record),
        ):
            if number < 1:
                raise ValueError(f"{OPTION}.{name} must be at least 1, got {number}")
        if (test_dataset is None) == (test_dataloader is None):
            raise ValueError(f"{OPTION}: set test_dataset or test_dataloader, and only one of them")
        if isinstance(test_dataloader, str) and test_dataloader != "val":
            raise ValueError(f"{OPTION}.test_dataloader must be a DataLoader or `val`, got {test_dataloader!r}")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"{OPTION}.dtype must be float32 or float16, got {dtype!r}")
        if test_ids not in ("auto", "key", "position"):
            raise ValueError(f"{OPTION}.test_ids must be auto, key or position, got {test_ids!r}")
        if isinstance(save_checkpoints_at, int) and save_checkpoints_at < 2:
            raise ValueError(
                f"{OPTION}.save_checkpoints_at: a number of checkpoints must be at least 2, for the start and the end, "
                f"got {save_checkpoints_at}; give a list for single steps"
            )
        if reduce is not None and tests_per_record is not None:
            raise ValueError(f"{OPTION}.reduce needs all tests every time; remove tests_per_record")
        if reduce is not None and grad_features is not None:
            raise ValueError(f"{OPTION}.reduce keeps no single tests that grad_features could describe; remove one")
        self.folder = Path(out_dir) if run_id is None else Path(out_dir) / run_id
        self.run_id = self.folder.name
        self.tests = test_dataloader if test_dataset is None else test_dataset
        self.measures = parse_metrics(metrics, every_n_steps)
        self.record_start, self.record_end = record_start, record_end
        self.tests_per_record = tests_per_record
        if isinstance(id_source, str) and id_source not in ("batch", "sampler"):
            id_source = imported(id_source, f"{OPTION}.id_source (batch, sampler or a function)")
        self.ids, self.test_ids = IdSource(id_source, id_key), test_ids
        self.flush_every, self.dtype, self.max_eval_batch_size = flush_every, dtype, max_eval_batch_size
        self.save_checkpoints_at = save_checkpoints_at
        if isinstance(grad_features, str):
            grad_features = imported(grad_features, f"{OPTION}.grad_features")
        self.grad_features = grad_features
        shared = Path(out_dir) / "pool.jsonl"
        self.pool = str(shared) if pool is None and run_id is not None and shared.is_file() else pool
        self.reduce, self.grad_norm, self.seed, self.overwrite = reduce, grad_norm, seed, overwrite

        self.step = 0
        """Steps recorded so far."""
        self._global_step = 0
        self._loaded: dict[str, Any] | None = None
        self._occupied = self._empty = False
        self._scratch: str | None = None
        self._writer: RunWriter | None = None
        self._writes = False
        self._blocks: list[list[TestBatch]] = []
        self._measured: dict[str, set[int]] = {}
        self._saves: set[int] = set()
        self._reset()

    def _reset(self) -> None:
        """Forget the batches since the last step."""
        self._open: list[Any] = []
        self._losses: list[Tensor] = []
        self._rates: dict[int, list[float]] = {}
        self._norm: Tensor | None = None
        self._skipped = False

    # -- beginning ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go before all other callbacks, and watch the sampler where it tells the ids."""
        if stage != "fit":
            return
        # What others do at the end of a batch, such as saving, must find the step recorded.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.remove(self)
        callbacks.insert(0, self)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._scratch = tempfile.mkdtemp(prefix="dynamics-")
            self.folder = Path(self._scratch) / self.run_id
        # Asked by all processes now, since one of them makes the file later. A run without a step is in nobody's way.
        self._occupied = (self.folder / "run.json").exists()
        self._empty = self._occupied and read_info(self.folder)["n_steps"] == 0
        self.ids.watch(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the tests, begin or continue the files, and measure the start."""
        rank, world, self._writes = _processes(trainer)
        sharded = isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy))
        if sharded and self.grad_features is not None:
            raise ValueError(f"{OPTION}.grad_features needs whole parameters, which sharding strategies do not keep")
        self.ids.start(trainer)
        if self._loaded is not None:
            self.step = int(self._loaded["step"])
        elif trainer.global_step != self._global_step:  # else an earlier `fit` goes on
            self.step = trainer.global_step
        self._global_step = trainer.global_step
        self._meter = Meter(pl_module, self.measures, sharded)
        self._reset()
        self._measured = {}
        self._saves = self._save_steps(trainer)
        with undisturbed(trainer, pl_module):
            examples = self._examples(trainer)
            ids = examples.ids(self.ids.key, self.test_ids, self.tests == "val" or self.ids.by_row)
            places = None
            if self.reduce is not None:
                ids, places = examples.groups(self.reduce)
            self._share = Share(ids, rank, world, places)
            size = 1 if self._meter.one_by_one else self.max_eval_batch_size
            together = None if self.tests_per_record is None else -(-self.tests_per_record // world)
            with _evaluating(trainer):
                self._blocks = self._share.blocks(examples, together, size, _placer(trainer, pl_module))
        columns = None if world == 1 else self._share.columns.tolist()
        info = self._info(trainer, pl_module, ids, world)
        self._writer = RunWriter(self.folder, info, rank, world, columns, self.flush_every, self.dtype)
        if self._resumed(trainer, self._writer):
            return
        if self.record_start:
            self._measure(trainer, pl_module, everything=True)
        if self.grad_features is not None:
            self._write_features(trainer, pl_module, examples, ids)
        self._save_checkpoint(trainer)

    def _examples(self, trainer: Trainer) -> Examples:
        collate = collate_of(trainer.train_dataloader)
        if not isinstance(self.tests, str):
            return Examples.of(self.tests, collate)
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        loaders = source.dataloader() if source.is_defined() else None
        if isinstance(loaders, Sequence) and len(loaders) == 1:
            loaders = loaders[0]
        if not isinstance(loaders, DataLoader):
            found = type(loaders).__name__ if loaders else "none"
            raise ValueError(
                f"{OPTION}.test_dataloader: val needs one validation DataLoader, found {found}; set the validation "
                "split of the data, or give test_dataset"
            )
        return Examples.of(loaders, collate)

    def _info(self, trainer: Trainer, pl_module: LightningModule, tests: list[int], world: int) -> dict[str, Any]:
        """Contents of `run.json`."""
        return {
            "run_id": self.run_id,
            "metrics": [measure.name for measure in self.measures],
            "test_ids": tests,
            "world_size": world,
            **pool_facts(self.pool, trainer, self.ids.by_row),
            **run_facts(trainer, pl_module),
            "recorder": {
                "every_n_steps": {measure.name: measure.every_n_steps for measure in self.measures},
                "tests_per_record": self.tests_per_record,
                "id_source": self.ids.source if isinstance(self.ids.source, str) else "function",
                "reduce": self.reduce,
                "steps": "optimizer steps" if pl_module.automatic_optimization else "batches with optimizer steps",
            },
        }

    def _resumed(self, trainer: Trainer, writer: RunWriter) -> bool:
        """Begin the files, or continue those that are there; whether they were continued."""
        if not self._occupied or (self.step == 0 and (self.overwrite or self._empty)):
            if self.step and writer.rank == 0:
                warnings.warn(
                    f"{self.folder} holds no run, so recording begins at step {self.step}, where training goes on",
                    stacklevel=2,
                )
            if self._writes:
                writer.begin(overwrite=self._occupied)
            return False
        there = read_info(self.folder)
        if self.step == 0:
            raise ValueError(
                f"{OPTION}.out_dir: {self.folder} already holds the run {there['run_id']!r} with {there['n_steps']} "
                "steps; choose another run_id, resume from its checkpoint, or set overwrite"
            )
        if self._loaded is not None and there["run_id"] != self._loaded["run_id"]:
            raise ValueError(
                f"{OPTION}.out_dir: {self.folder} holds the run {there['run_id']!r}, but the checkpoint is of the run "
                f"{self._loaded['run_id']!r}; set out_dir and run_id to those of the checkpoint"
            )
        last = writer.resume(self.step) if self._writes else self.step
        if last != self.step and not (last == -1 and writer.rank > 0):  # a process more than before
            raise ValueError(
                f"{OPTION}.out_dir: {self.folder} ends at step {last}, but training goes on at step {self.step}; "
                "restore the missing files, resume from an earlier checkpoint, or record into another folder"
            )
        for path in (self.folder / "checkpoints").glob("step-*.ckpt") if trainer.is_global_zero else ():
            number = path.stem.removeprefix("step-")
            if path.is_file() and number.isdigit() and int(number) > self.step:
                path.unlink()
        return True

    # -- steps -------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Note the ids of a batch, before the module may change it."""
        self.ids.before(batch)
        self._scale = _scale(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rates of the step, before a schedule changes them."""
        number = next((number for number, other in enumerate(trainer.optimizers) if other is optimizer), 0)
        self._rates[number] = [float(group["lr"]) for group in optimizer.param_groups]
        if self.grad_norm:
            every = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
            norm = total_norm(gradient for gradient in every if gradient is not None)
            # Of all optimizers of the step together.
            self._norm = norm if self._norm is None or number == 0 else torch.hypot(self._norm, norm)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Add the batch to the step, and close the step if the optimizer has stepped."""
        ids = self.ids.after()
        if batch is None:  # the loader gave none, and nothing was trained
            return
        self._open.append(ids)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() if parts == 1 else loss.detach() * parts)  # it was divided by them
        scale = _scale(trainer)
        self._skipped |= scale is not None and self._scale is not None and scale < self._scale
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._close(trainer)
        self._measure(trainer, pl_module)
        self._save_checkpoint(trainer)
        assert self._writer is not None
        if self._writes and self._writer.ready():
            self._writer.flush()

    def _close(self, trainer: Trainer) -> None:
        """Write the row of a step."""
        self.step += 1
        rates = [
            rate
            for number, optimizer in enumerate(trainer.optimizers)
            for rate in self._rates.get(number, [float("nan")] * len(optimizer.param_groups))
        ]
        losses = [loss.float().reshape(()) for loss in self._losses] if len(self._losses) > 1 else self._losses
        loss = torch.stack(losses).mean() if len(losses) > 1 else next(iter(losses), None)
        if self._writes:
            assert self._writer is not None
            self._writer.step(self.step, self._open, rates, self._skipped, loss, self._norm)
        self._reset()

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule, everything: bool = False) -> None:
        """Measure what is due after the present step, or whatever has not been measured there."""
        due: dict[int, list[str]] = {}
        blocks = len(self._blocks)
        for measure in self.measures:
            turn, rest = divmod(self.step, measure.every_n_steps)
            regular = set() if rest else {turn % blocks}
            done = self._measured.get(measure.name, set())
            for block in sorted(set(range(blocks)) - done) if everything else regular:
                due.setdefault(block, []).append(measure.name)
        if not everything:
            self._measured = {}
        if not due:
            return
        found: dict[str, list[tuple[NDArray[np.int64], Tensor]]] = {}
        self._meter.begin()
        with undisturbed(trainer, pl_module):
            for block, names in due.items():
                for test in self._blocks[block]:
                    values = self._meter(test.batch, test.num, names, self.seed + self.step)
                    for name, value in values.items():
                        found.setdefault(name, []).append((test.rows, value[: len(test.rows)].float()))
                for name in names:
                    self._measured.setdefault(name, set()).add(block)
        for name, parts in found.items():
            rows = np.concatenate([part for part, _ in parts])
            self._record(name, rows, torch.cat([part for _, part in parts]))

    def _record(self, name: str, rows: NDArray[np.int64], values: Tensor) -> None:
        if not self._writes or not len(rows):
            return
        assert self._writer is not None
        if self.reduce is None:
            self._writer.record(self.step, name, values, rows)
        else:
            groups, means = self._share.reduced(rows, values.double().cpu().numpy())
            self._writer.record(self.step, name, means, groups)

    def _write_features(
        self, trainer: Trainer, pl_module: LightningModule, examples: Examples, ids: Sequence[int]
    ) -> None:
        """Features of this process's tests and share of the pool before the first step."""
        assert self._writer is not None
        rank, world = self._writer.rank, self._writer.world_size
        dataset = rows_in_whole(getattr(trainer.train_dataloader, "dataset", None))[1]
        numbered = dataset is not None and not isinstance(dataset, IterableDataset)
        rows = np.arange(rank, len(dataset) if numbered else 0, world)
        collate = collate_of(trainer.train_dataloader)
        place, size = _placer(trainer, pl_module), self.max_eval_batch_size
        projected = isinstance(self.grad_features, int)
        with undisturbed(trainer, pl_module, grad=projected), _evaluating(trainer):
            function: Any = self.grad_features
            if projected:
                meter = self._meter if "loss" in self._meter.measures else None
                function = ProjectedGradients(pl_module, meter, function, self.seed)
            own = (examples.items[number] for number in self._share.own)
            tests = features(function, pl_module, own, examples.collate, place, size)
            pool = features(function, pl_module, (dataset[int(row)] for row in rows), collate, place, size)
            pool_ids = rows
            if not self.ids.by_row:
                pool_ids = np.array([np.asarray(self.ids.of(collate([dataset[int(row)]]))).item() for row in rows])
        own_ids = np.asarray(ids)[self._share.own]
        write_features(self.folder, rank, own_ids, tests.numpy(), pool_ids, pool.numpy())

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_steps(self, trainer: Trainer) -> set[int]:
        """Steps after which weights are kept."""
        if self.save_checkpoints_at is None:
            return set()
        if not isinstance(self.save_checkpoints_at, int):
            return set(self.save_checkpoints_at)
        last = trainer.estimated_stepping_batches
        if last == float("inf"):
            raise ValueError(
                f"{OPTION}.save_checkpoints_at: the run has no end that is known before, so checkpoints can't be "
                "spread; give a list of steps, or set trainer.max_steps"
            )
        return {round(step) for step in np.linspace(0, last, self.save_checkpoints_at).tolist()}

    def _save_checkpoint(self, trainer: Trainer) -> None:
        if self.step in self._saves:
            self._saves.remove(self.step)
            trainer.save_checkpoint(self.folder / "checkpoints" / f"step-{self.step}.ckpt", weights_only=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write all rows, since a run resumed from this checkpoint won't record them again."""
        self._flush()

    def state_dict(self) -> dict[str, Any]:
        """The last recorded step and the name of the run; the files say the rest."""
        return {"step": self.step, "run_id": self.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._loaded = state_dict

    # -- end ---------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is missing after the last step, and mark the run as complete."""
        if self._writer is None:
            return
        if isinstance(self.save_checkpoints_at, int) and self._saves:  # it ended early
            self._saves = {self.step}
            self._save_checkpoint(trainer)
        if self._writes:
            self._writer.end_part()
        if self.record_end and self.step:
            self._measure(trainer, pl_module, everything=True)
        if self._writes:
            self._writer.flush(extra=True)
            self._writer.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write all rows of a run that ends early."""
        self._flush()

    def _flush(self) -> None:
        if self._writer is not None and self._writes:
            self._writer.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave loaders and strategy as they were."""
        if stage != "fit":
            return
        self.ids.release(trainer)
        self._writer, self._loaded, self._blocks = None, None, []
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _processes(trainer: Trainer) -> tuple[int, int, bool]:
    """Number of this process among those with batches of their own, their number, and whether this one writes."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mesh = trainer.strategy.device_mesh
        assert mesh is not None
        split = trainer.strategy.distributed_sampler_kwargs
        return split["rank"], split["num_replicas"], mesh["tensor_parallel"].get_local_rank() == 0
    return trainer.global_rank, trainer.world_size, True


@contextmanager
def _evaluating(trainer: Trainer) -> Iterator[None]:
    """Let the hooks of batches know that these are not to be trained on, since some augment those."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


def _placer(trainer: Trainer, pl_module: LightningModule) -> Callable[[Any], Any]:
    """Function that moves a batch to the device as the trainer does."""

    def place(batch: Any) -> Any:  # noqa: ANN401
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return place


def _scale(trainer: Trainer) -> float | None:
    """Factor of the loss under automatic mixed precision with 16 bits."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
