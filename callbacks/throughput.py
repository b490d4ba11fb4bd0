"""How fast a run is, what its time goes into, and how much of the device it uses."""

import functools
import math
import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.optim import Optimizer

from callbacks.peaks import Kind, peak_tflops
from lit_models.nn.clipping import total_norm

Mark = Any
"""A point in time of a clock."""
PARTS = ("data", "step", "other", "backward", "optimizer")
"""What is measured of every batch: between batches, in them, and inside of that."""
FETCH = "train_dataloader_next"
"""Ending of the name under which the Trainer's profiler hears of a batch being fetched."""


class HostClock:
    """Time of the process."""

    def mark(self) -> Mark:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks that are settled."""
        return float(end - start)

    def settle(self, mark: Mark) -> None:
        """Wait until all marks up to this one can be read."""


class CudaClock:
    """Time of the device: a mark is an event in its queue, which the process does not wait for."""

    def mark(self) -> Mark:
        """When the device has done what it was given until now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks that are settled."""
        return float(start.elapsed_time(end)) / 1000

    def settle(self, mark: Mark) -> None:
        """Wait until all marks up to this one can be read."""
        mark.synchronize()


@dataclass
class Batch:
    """What is known of one training batch.

    Args:
        intervals: by the names of `PARTS`, pairs of marks.
        counts: what was processed, by name.
        seconds: of the parts that the module measures itself, by name.
        flops: operations that the model needs for it, if they are asked for and known.
    """

    intervals: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, float | Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flops: float | Tensor | None = None


class Throughput(Callback):
    """Logs rates, the parts of a step's time, peak memory, the norm of gradients and the use of the device.

    What a module counts in `step_stats()` is logged as rates of all processes together: `perf/tokens_per_s`,
    `perf/patches_per_s`, `perf/examples_per_s` and so on. Times are seconds per batch, means over all processes:

    * `perf/data_s` is spent waiting for a batch and moving it to the device, `perf/data_max_s` by the process that
      waits longest (with several processes), `perf/step_s` is spent training on it, and `perf/other_s` is everything
      between batches: other callbacks, loggers, validation, checkpoints. Rates do not count the last one;
    * of a step, `perf/backward_s` and `perf/optimizer_s` (with clipping and averages of weights; spread over
      accumulated batches), what the module measures itself, such as `perf/generate_s` and `perf/score_s` in PPO, and
      `perf/forward_s`, the rest.

    `perf/memory_gib` is the most that a process had allocated on its GPU since the last row, otherwise the most memory
    that a process ever took. `perf/grad_norm` is the norm of all gradients together before they are clipped, in the
    newest optimizer step. `perf/mfu` is the model-FLOPs utilisation of PaLM: the operations that the model needs for
    what was processed, as the module's `step_flops()` tells, over what the devices can do in the time.

    Args:
        window: batches that are averaged over; more where rows are logged less often, so that every batch counts.
        grad_norm: whether to measure the norm of gradients, which reads all of them in each step that is logged.
        peak_tflops: what one device can do at most, in 10^12 operations per second; for GPUs that are known it is
            looked up by the type that is computed in, and without it there is no utilisation.

    Raises:
        ValueError: if an argument is not positive.

    Note:
        Values are made when the Trainer logs a row (`log_every_n_steps`), with one collective call of all processes,
        and another for the norm of sharded gradients. In between only marks are set. On a GPU they are events of the
        device, which is waited for once per row; so the times are those of its work, and data counts as waited for only
        while the device had nothing to do. Where a module optimizes by itself, it may give `grad_norm` in
        `step_stats()`; otherwise the norm is that at its newest optimizer step. It is not measured under FSDPStrategy
        and DeepSpeedStrategy. PyTorch's counter of peak memory on the GPU is set back with each row.

    Example::

        Trainer(callbacks=[Throughput()])
    """

    def __init__(self, window: int = 10, grad_norm: bool = True, peak_tflops: float | None = None) -> None:
        if window < 1:
            raise ValueError(f"callbacks.Throughput.window must be at least 1, got {window}")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"callbacks.Throughput.peak_tflops must be positive or null, got {peak_tflops}")
        self.window, self.grad_norm, self.peak_tflops = window, grad_norm, peak_tflops
        self._undo: list[Callable[[], None]] = []  # what ends the watch over a fit
        self._clear(maxlen=window)

    def _clear(self, maxlen: int) -> None:
        self._batches: deque[Batch] = deque(maxlen=maxlen)
        self._clock: HostClock | CudaClock = HostClock()
        self._batch: Batch | None = None  # the one that is trained on
        self._begun: Mark = None
        self._opened: Mark = None  # begin of a backward pass or optimizer step
        self._fetched: Mark = None  # begin of the newest wait for data
        self._ended: Mark = None  # end of what was last seen of the batch
        self._due = False  # whether a row is logged with the optimizer step that comes
        self._stepping = False
        self._peak: float | None = None
        self._measures_norm = False
        self._norm: Tensor | None = None

    # -- begin and end of a fit --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._release()
        self._clear(max(self.window, _log_every(trainer) * trainer.accumulate_grad_batches))
        self._peak = self._find_peak(trainer, pl_module)
        if pl_module.device.type == "cuda":
            self._clock = CudaClock()
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        # Those strategies leave each process a part of the gradients that does not say whose it is.
        self._measures_norm = self.grad_norm and not isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy))
        profiler = trainer.profiler  # type: ignore[attr-defined]
        self._undo.append(_wrapped(profiler, "start", self._on_action))
        if self._measures_norm and pl_module.automatic_optimization:
            # Its own hook comes too early: modules finish accumulated gradients in theirs, which is called after it.
            self._undo.append(_wrapped(pl_module, "configure_gradient_clipping", self._on_clipping))
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_post_hook(self._on_stepped).remove)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the watch."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the watch."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the watch, if it is still on."""
        self._release()

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._clear(self.window)

    def _find_peak(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        if not hasattr(pl_module, "step_flops"):
            return None
        if self.peak_tflops is not None or pl_module.device.type != "cuda":
            return self.peak_tflops
        name, kind = torch.cuda.get_device_name(pl_module.device), compute_kind(trainer, pl_module)
        peak = peak_tflops(name, kind)
        if peak is None:
            rank_zero_warn(
                f"callbacks.Throughput.peak_tflops: what a {name} can do in {kind} is not known, so perf/mfu is not "
                "logged; set it"
            )
        return peak

    # -- marks -------------------------------------------------------------------------------------------------------

    def _on_action(self, start: Callable[[str], None], action_name: str) -> None:
        """Hear of what the Trainer's profiler is told."""
        if action_name.endswith(FETCH):
            self._fetched = self._clock.mark()
        start(action_name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Begin a step."""
        self._begun = self._clock.mark()
        self._batch = Batch()
        if self._fetched is not None:
            self._batch.intervals["data"].append((self._fetched, self._begun))
            if self._ended is not None:
                self._batch.intervals["other"].append((self._ended, self._fetched))
        self._fetched = self._ended = self._opened = None
        self._stepping = False
        self._due = self._is_due(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begin a backward pass."""
        self._opened = self._clock.mark()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a backward pass."""
        self._close("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin an optimizer step."""
        self._opened = self._clock.mark()
        self._stepping = True
        if self._measures_norm and not pl_module.automatic_optimization and self._due:
            self._norm = total_norm(_gradients(optimizer))

    def _on_clipping(self, clip: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Measure gradients as they are before the module clips them."""
        if self._due:
            self._norm = total_norm(_gradients(optimizer))
        clip(optimizer, *args, **kwargs)

    def _on_stepped(self, *_: object) -> None:
        """End an optimizer step."""
        self._close("optimizer")

    def _close(self, part: str) -> None:
        if self._batch is not None and self._opened is not None:
            self._ended = self._clock.mark()
            self._batch.intervals[part].append((self._opened, self._ended))
            self._opened = None

    # -- rows --------------------------------------------------------------------------------------------------------

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the Trainer logs a row with this optimizer step; the same on all processes, unlike its own answer."""
        every = _log_every(trainer)
        return every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """End a step, and log averages where a row is due."""
        if self._batch is None:
            return
        if self._stepping:
            self._close("optimizer")  # where the step was left out, as scaled gradients may be
        if self._ended is None or not pl_module.automatic_optimization:
            self._ended = self._clock.mark()
        self._batch.intervals["step"].append((self._begun, self._ended))
        self._count(pl_module, self._batch)
        self._batches.append(self._batch)
        self._batch = None
        if self._due and (self._stepping or not pl_module.automatic_optimization):
            self._clock.settle(self._ended)
            pl_module.log_dict(self._row(trainer, pl_module))

    def _count(self, pl_module: LightningModule, batch: Batch) -> None:
        """Ask the module for what it did."""
        stats: Any = getattr(pl_module, "step_stats", dict)
        for name, value in stats().items():
            if name == "grad_norm":
                self._norm = torch.as_tensor(value)
            elif name.endswith("_s"):
                batch.seconds[name.removesuffix("_s")] = value
            else:
                batch.counts[name] = value
        if self._peak is not None:
            flops: Any = pl_module.step_flops
            batch.flops = flops()

    def _row(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Averages over the newest batches and all processes; collective."""
        number, world = len(self._batches), trainer.world_size
        own = self._sums()
        own["memory", "gib"] = peak_memory(pl_module.device)
        values = torch.tensor([list(own.values())], dtype=torch.float64)
        if world > 1:
            values = values.to(trainer.strategy.root_device)
            ranks = [torch.empty_like(values) for _ in range(world)]
            distributed.all_gather(ranks, values)
            values = torch.cat(ranks).cpu()
        sums = dict(zip(own, values.sum(0).tolist(), strict=True))
        most = dict(zip(own, values.max(0).values.tolist(), strict=True))
        spent = max((sums["seconds", "data"] + sums["seconds", "step"]) / world, 1e-9)
        row: dict[str, float] = {}
        for (kind, name), value in sums.items():
            if kind == "seconds":
                row[f"perf/{name}_s"] = value / number / world
            elif kind == "count":
                row[f"perf/{name}_per_s"] = value / spent
        if world > 1:
            row["perf/data_max_s"] = most["seconds", "data"] / number
        row["perf/memory_gib"] = most["memory", "gib"]
        if self.grad_norm and self._norm is not None:
            row["perf/grad_norm"] = float(self._norm)
        flops = sums.get(("flops", ""), math.nan)
        if self._peak is not None and not math.isnan(flops):
            row["perf/mfu"] = flops / (spent * world * self._peak * 1e12)
        return row

    def _sums(self) -> dict[tuple[str, str], float]:
        """Sums over the newest batches of this process: seconds, what was counted, and operations."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for batch in self._batches:
            for part, intervals in batch.intervals.items():
                seconds[part] += sum(self._clock.seconds(*interval) for interval in intervals)
            for name, spent in batch.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
        inner = sum(spent for name, spent in seconds.items() if name not in ("data", "step", "other"))
        seconds["forward"] = max(seconds["step"] - inner, 0.0)
        sums = {("seconds", name): spent for name, spent in seconds.items()}
        for name in self._batches[-1].counts:
            sums["count", name] = float(sum(batch.counts.get(name, 0.0) for batch in self._batches))
        if self._peak is not None:
            flops = [math.nan if batch.flops is None else batch.flops for batch in self._batches]
            sums["flops", ""] = float(sum(flops))
        return sums


def _log_every(trainer: Trainer) -> int:
    """Optimizer steps between two rows; 0 for no rows."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def compute_kind(trainer: Trainer, pl_module: LightningModule) -> Kind:
    """Type in which matrix products are computed.

    Args:
        trainer: its precision decides, if it is not that of the weights.
        pl_module: its `sharding.param_dtype` decides where networks are sharded, otherwise its largest trained weight.

    Returns:
        Name of the type; "tf32" where `torch.set_float32_matmul_precision` allows it.
    """
    precision = str(trainer.precision)
    if precision.startswith(("bf16", "transformer-engine")):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    dtype = max(trained, key=lambda parameter: parameter.numel()).dtype if trained else torch.float32
    if pl_module.device_mesh is not None:
        dtype = getattr(torch, getattr(getattr(pl_module, "sharding", None), "param_dtype", ""), dtype)
    if dtype is torch.bfloat16:
        return "bfloat16"
    if dtype is torch.float16:
        return "float16"
    if dtype is torch.float64:
        return "float64"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def peak_memory(device: torch.device | None = None) -> float:
    """Peak memory in GiB.

    Args:
        device: where memory is asked for; that of CUDA counts since the last call with this device.

    Returns:
        What was allocated there at most; the most that the process ever took, if the device is not a GPU.
    """
    if device is not None and device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak / 2**30)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _wrapped(thing: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:  # noqa: ANN401
    """Put a function around a method of one object, which it gets as its first argument; returns what takes it off."""
    own = vars(thing).get(name)
    setattr(thing, name, functools.partial(around, getattr(thing, name)))

    def undo() -> None:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)

    return undo
