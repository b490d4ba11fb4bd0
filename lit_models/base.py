"""The base of every LightningModule here: optimizer groups, lean checkpoints, plain hyperparameters, export."""

import copy
import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lit_models.backbones import has_adapters
from lit_models.hyperparameters import plain
from lit_models.nn.averaging import EMASchedule, EMAWarmup, ema_
from lit_models.nn.clipping import clip_gradients
from lit_models.nn.groups import GroupOptions as GroupOptions
from lit_models.nn.meta import build_once, whole_weights, without_weights
from lit_models.nn.sharding import Sharding, free_gathered, gathered, has_shards, is_sharded, keep_weights_in, shard
from lit_models.precision import give_back, take_over, weight_type
from lit_models.shards import merge_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
HANDED_BACK = "_rest_of_checkpoint"
"""Key under which the state of a forked process has what else the process that waits for it needs to know."""


class CheckpointMismatchError(ValueError):
    """A checkpoint does not belong to the module it is loaded into."""


class LitBase(LightningModule):
    """What all methods share.

    Networks are made in `configure_model`. Sub-modules named in `frozen` are never trained, never written to
    checkpoints and rebuilt from their own source on resume. An averaged copy of one network (`ema`) is part of the
    checkpoint.

    Args:
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation of the trained networks.
    """

    frozen: tuple[str, ...] = ()
    """Names of sub-modules that are neither trained nor saved, since their source gives them back."""
    tokenizer: "PreTrainedTokenizerBase"
    """Loaded in `configure_model` by methods on text."""
    ema_part = "net"
    """Name of the sub-module that `callbacks.EMA` averages unless told otherwise."""

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, sharding: Sharding | None
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.sharding = sharding or Sharding()
        # Networks, the options to shard them by, and whether they stay in float32.
        self._placed: list[tuple[nn.Module, Sharding, bool]] = []
        self.strict_loading = False  # checked by load_state_dict below, which knows what may be missing
        self.ema: nn.Module | None = None
        self._ema_schedule: EMASchedule | None = None
        self._ema_updates = 0

    # -- networks ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Have `trainer.precision` concern the weights of networks only; see `lit_models.precision`.

        Args:
            stage: "fit" and so on.

        Raises:
            ValueError: if the device has no float64, or nothing can be trained in that precision.
        """
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                "trainer.accelerator: GPUs of Apple have no float64, in which sums and metrics are kept; set it to cpu"
            )
        take_over(self.trainer, stage)

    def teardown(self, stage: str) -> None:
        """Leave the trainer as it was.

        Args:
            stage: "fit" and so on.
        """
        give_back(self.trainer)

    def trained_networks(self) -> dict[str, nn.Module]:
        """Trained networks by the name of their parameter groups."""
        raise NotImplementedError(f"{type(self).__name__} must define trained_networks()")

    def exported_models(self) -> "dict[str, PreTrainedModel]":
        """Hugging Face models to export, by folder name."""
        raise NotImplementedError(f"{type(self).__name__} must define exported_models()")

    def build(self, make: Callable[[], T]) -> T:
        """Make a network; every `configure_model` makes its networks with this.

        Of processes that share the weights, only the first one calls the function. The others get the same structure
        with parameters on the meta device, which nothing may read before the network is placed or frozen.

        Args:
            make: returns a network, or a container with networks and what belongs to them.

        Returns:
            What the function returned.
        """
        return make() if self.device_mesh is None else build_once(make)

    def shard(
        self,
        network: nn.Module,
        weights: dict[str, Tensor] | None = None,
        options: Sharding | None = None,
        exact: bool = False,
    ) -> nn.Module:
        """Apply sharding options to a network for the current strategy; see `lit_models.nn.shard`.

        Args:
            network: built and not yet sharded.
            weights: see there.
            options: in place of the module's own.
            exact: keep the weights in float32 whatever `trainer.precision` is.

        Returns:
            The same network.
        """
        options = options or self.sharding
        self._placed.append((network, options, exact))
        return shard(network, self.device_mesh, options, weights, None if exact else weight_type(self._trainer))

    def shard_built(self) -> None:
        """Shard networks that were built without a trainer, such as those of a loaded checkpoint.

        Every `configure_model` returns with this where its networks exist already.
        """
        own = set(self.modules())
        for network, options, exact in self._placed:
            dtype = None if exact else weight_type(self._trainer)
            if network not in own or is_sharded(network):
                continue
            if self.device_mesh is not None:
                shard(network, self.device_mesh, options, dtype=dtype)
            elif dtype is not None:
                keep_weights_in(network, dtype)

    def gathered(self, network: nn.Module) -> AbstractContextManager[None]:
        """Keep all weights of a network on every process for many uses in a row; see `lit_models.nn.sharding.gathered`.

        All processes must enter and leave it. Networks that are not sharded stay as they are.
        """
        return nullcontext() if self.device_mesh is None else gathered(network)

    def enable_ema(
        self,
        decay: float,
        part: str | None = None,
        warmup: EMAWarmup = "none",
        power: float = 0.75,
        delay: int = 1,
    ) -> None:
        """Keep an exponential moving average of one network; to be called before training starts.

        Args:
            decay: weight of the old average at each optimizer step, after the warm-up.
            part: name of the averaged sub-module, `ema_part` by default.
            warmup: see `lit_models.nn.averaging.ema_decay`, as are the others.
            power: exponent of the warm-up "power".
            delay: first updates of a warm-up that copy the weights.
        """
        self._ema_schedule = EMASchedule(decay, warmup, power, delay)
        self.ema_part = part or self.ema_part
        network = getattr(self, self.ema_part, None)
        if isinstance(network, nn.Module) and self.ema is None:  # built before, for example by load_from_checkpoint
            if is_sharded(network):
                raise ValueError(
                    "callbacks.EMA: the networks are sharded already; have the callback in trainer.callbacks of the "
                    "first run of this module"
                )
            self.ema = copy.deepcopy(network).float().requires_grad_(False).eval()
            keep_weights_in(self.ema, torch.float32)  # if the network casts its inputs to another type
            self._placed.append((self.ema, self.sharding, True))

    def place(self, name: str, network: nn.Module) -> None:
        """Shard a trained network and keep it as attribute `name`, with its averaged copy where one is wanted.

        Every `configure_model` ends its work on a trained network with this. The average is kept in float32, since a
        small step rounds away in 16 bits.

        Args:
            name: attribute.
            network: built and not yet sharded.
        """
        if self._ema_schedule is not None and name == self.ema_part:
            average, weights = self._copied(network)
            self.ema = self.shard(average.float().requires_grad_(False).eval(), weights, exact=True)
        setattr(self, name, self.shard(network))

    def place_frozen(self, network: nn.Module) -> nn.Module:
        """Shard a network that is not trained.

        Args:
            network: built and not yet sharded.

        Returns:
            The same network without gradients, in evaluation mode.
        """
        return self.shard(network.requires_grad_(False).eval())

    def frozen_copy(self, network: nn.Module) -> nn.Module:
        """A copy of a network that is not trained, sharded.

        Args:
            network: built and not yet sharded.

        Returns:
            The copy.
        """
        copied, weights = self._copied(network)
        return self.shard(copied.requires_grad_(False).eval(), weights)

    def _copied(self, network: nn.Module) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Copy of a network to shard, and the weights to do it with, which are not copied where they are scattered."""
        if self.device_mesh is None:
            return copy.deepcopy(network), None
        return without_weights(network), whole_weights(network)

    def check_ema(self) -> None:
        """Last line of every `configure_model`: the network to average must be one that was placed."""
        if self._ema_schedule is not None and self.ema is None:
            names = ", ".join(name for name, module in self.named_children() if name not in self.frozen)
            raise ValueError(f"callbacks.EMA.part: {type(self).__name__} has no {self.ema_part!r}; it trains {names}")

    def _update_ema(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._ema_schedule is not None
        assert self.ema is not None
        if "closure" in kwargs and kwargs["closure"] is None:
            return  # a step without effect, which torch's sharded checkpoints take to have the state made
        online = getattr(self, self.ema_part)
        for network in (self.ema, online):
            free_gathered(network)  # an average is used in validation, after which no backward pass frees it
        own, theirs = ([_local(value) for value in network.parameters()] for network in (self.ema, online))
        ema_(own, theirs, self._ema_schedule.at(self._ema_updates))
        self._ema_updates += 1

    def train(self, mode: bool = True) -> "LitBase":
        """Set training mode, except for frozen and averaged networks, which have nothing to train."""
        super().train(mode)
        for module in self.children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def on_validation_model_eval(self) -> None:
        """Set evaluation mode, in which ranks may have different numbers of batches, or none."""
        super().on_validation_model_eval()
        wrapper = self.trainer.model
        if isinstance(wrapper, DistributedDataParallel):
            # Its next forward pass would broadcast the buffers, and wait for ranks that have no row. None has changed.
            wrapper.require_forward_param_sync = False

    # -- optimization ------------------------------------------------------------------------------------------------

    def group_options(self) -> dict[str, GroupOptions]:
        """Per-network settings of the optimizer, by the names of `trained_networks`."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups `NAME` and `NAME_no_decay` (biases and norms) of every trained network."""
        groups = []
        for name, network in self.trained_networks().items():
            options = self.group_options().get(name, GroupOptions()).values()
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            groups.append({"params": matrices, "name": name, **options})
            groups.append({"params": vectors, "name": f"{name}_no_decay", **options, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """One optimizer over the named groups, and its schedule per optimizer step.

        Raises:
            ValueError: if a network is trained in shards without having been placed.
        """
        for name, network in self.trained_networks().items():
            if self.device_mesh is not None and not has_shards(network):
                raise ValueError(
                    f"trainer.strategy: {type(self).__name__} does not shard its network {name!r}; place it with "
                    "self.place in configure_model, or take the strategy ddp"
                )
        optimizer: Optimizer = self.optimizer(self.param_groups())
        if self.ema is not None:
            optimizer.register_step_post_hook(self._update_ema)
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = self.lr_scheduler(optimizer)
        if getattr(scheduler, "total", 0) is None:
            scheduler.total = self.optimizer_steps()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_steps(self) -> int:
        """Optimizer steps that the trainer will take.

        Raises:
            ValueError: if the data has no length and the trainer no limit.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("lr_scheduler.total: the run has no end that is known before; set it or trainer.max_steps")
        return int(steps)

    def rescale_gradients(self, network: nn.Module, counts: list[Tensor]) -> None:
        """Turn the average of accumulated gradients into the gradient of the mean over all that was counted.

        To be called before the optimizer step, where every loss was divided by the count of the first batch, because
        those of the later ones were not known yet.

        Args:
            network: its gradients are scaled in place.
            counts: targets of each accumulated batch over all ranks.
        """
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated == 1:
            return
        factor = accumulated * counts[0].clamp(min=1) / torch.stack(counts).sum().clamp(min=1)
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to, but by a norm in float32 where gradients have 16 bits.

        Args:
            optimizer: whose gradients to clip.
            gradient_clip_val: limit.
            gradient_clip_algorithm: "norm", the default, or "value".
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kinds = {parameter.grad.dtype for parameter in parameters if parameter.grad is not None}
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and kinds & {torch.bfloat16, torch.float16}:
            clip_gradients(parameters, gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _left_out(self) -> Iterable[str]:
        """State-dict keys that are rebuilt from their source: frozen networks, and the base weights under adapters."""
        prefixes = tuple(f"{name}." for name in self.frozen)
        adapted = tuple(f"{name}." for name, module in self.named_children() if has_adapters(module))
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        for key in super().state_dict():
            online = f"{self.ema_part}.{key.removeprefix('ema.')}" if key.startswith("ema.") else key
            if (prefixes and key.startswith(prefixes)) or (
                adapted and key.startswith(adapted) and online not in trained
            ):
                yield key

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # noqa: ANN401
        """State of what is trained and of the average; frozen networks are left out."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in self._left_out():
            state.pop(prefix + key, None)
        if self._hands_back():
            state[HANDED_BACK] = {}
            self.on_save_checkpoint(state[HANDED_BACK])
        return state

    def _hands_back(self) -> bool:
        """Whether this is a forked process whose training is over; all it gives to its parent are the weights."""
        trainer = self._trainer
        return (
            trainer is not None
            and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
            and trainer.state.finished
            and trainer.state.fn == TrainerFn.FITTING
        )

    def _prepare_for(self, rest: dict[str, Any]) -> None:
        """Get ready to build the networks of a forked process, with neither its data nor its callbacks.

        Args:
            rest: what `on_save_checkpoint` wrote there.
        """
        if "ema" in rest:
            self.enable_ema(**rest["ema"])

    def check_state(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make sure that a checkpoint belongs to this module.

        Args:
            shapes: of the tensors in it, by name.

        Raises:
            CheckpointMismatchError: if keys or shapes belong to another model.
        """
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        unexpected = sorted(set(shapes) - set(own) - set(self._left_out()))
        missing = sorted(set(own) - set(shapes))
        if unexpected and all(key.startswith("ema.") for key in unexpected) and not missing:
            raise CheckpointMismatchError(
                "the checkpoint holds averaged weights (ema.*), but this run keeps none; "
                "add callbacks.EMA to trainer.callbacks"
            )
        if missing and all(key.startswith("ema.") for key in missing) and not unexpected:
            raise CheckpointMismatchError(
                "the checkpoint holds no averaged weights (ema.*), but trainer.callbacks has callbacks.EMA; remove it"
            )
        other = [key for key in own if key in shapes and own[key] != tuple(shapes[key])]
        if unexpected or missing or other:
            examples = [f"{key!r} is missing" for key in missing[:1]]
            examples += [f"{key!r} is unknown" for key in unexpected[:1]]
            examples += [f"{key!r} has shape {tuple(shapes[key])} instead of {own[key]}" for key in other[:1]]
            raise CheckpointMismatchError(
                f"the checkpoint is of another model than {type(self).__name__} as configured "
                f"({len(missing)} keys missing, {len(unexpected)} unknown, {len(other)} of another shape; for example "
                f"{', '.join(examples)}); set ckpt_path to a checkpoint of this model, "
                "or the model options to those of the checkpoint"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load what `state_dict` saved.

        Args:
            state_dict: keys and tensors of a checkpoint.
            strict: ignored, since every key must match except those of frozen networks.
            assign: see `torch.nn.Module.load_state_dict`.

        Raises:
            CheckpointMismatchError: if keys or shapes belong to another model.
        """
        state_dict = dict(state_dict)
        rest = state_dict.pop(HANDED_BACK, None)
        if rest is not None:
            self._prepare_for(rest)
            self.configure_model()
            self.on_load_checkpoint(rest)
        self.check_state({name: tuple(value.shape) for name, value in state_dict.items()})
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Rebuild the module a checkpoint was written by, whichever subclass it is.

        Args:
            checkpoint_path: checkpoint file, or folder of a sharded checkpoint.
            *args: see `LightningModule.load_from_checkpoint`.
            **kwargs: see `LightningModule.load_from_checkpoint`; hyperparameters given here replace those in the file.

        Returns:
            The module with its weights.

        Raises:
            CheckpointMismatchError: if another class wrote the checkpoint.
        """
        if Path(checkpoint_path).is_dir():
            with tempfile.TemporaryDirectory() as folder:
                whole = merge_shards(Path(checkpoint_path), Path(folder) / "whole.ckpt", optimizers=False)
                return cls.load_from_checkpoint(whole, *args, **kwargs)
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        path = saved.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("_class_path", "")
        module, _, name = path.rpartition(".")
        written_by = getattr(importlib.import_module(module), name) if module else cls
        if not issubclass(written_by, cls):
            raise CheckpointMismatchError(
                f"{checkpoint_path} was written by {path}, not by {cls.__name__}; "
                "use LitBase.load_from_checkpoint for any class"
            )
        load: Any = super(LitBase, written_by).load_from_checkpoint  # type: ignore[misc]
        return load(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write hyperparameters in the CLI's plain form, which loads with `weights_only=True`."""
        key = self.CHECKPOINT_HYPER_PARAMS_KEY
        values = {name: plain(value) for name, value in checkpoint.get(key, {}).items()}
        values.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        values["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        checkpoint[key] = values
        if self._ema_schedule is not None:
            checkpoint["ema"] = {**dataclasses.asdict(self._ema_schedule), "part": self.ema_part}
            checkpoint["ema_updates"] = self._ema_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on the updates of an average; outside a run, where no callback asks for one, make room for it."""
        self._ema_updates = checkpoint.get("ema_updates", 0)
        if self._trainer is None and "ema" in checkpoint:
            self.enable_ema(**checkpoint["ema"])

    # -- what callbacks ask for --------------------------------------------------------------------------------------

    def samples(self) -> list[dict[str, str | float]]:
        """Rows worth reading from the newest batch; none by default."""
        return []

    def step_stats(self) -> Mapping[str, float | Tensor]:
        """What the last training step did on this rank, for `callbacks.Throughput`.

        Returns:
            Numbers of what was processed, such as `tokens`, without padding; seconds of parts of the step, under names
            that end with `_s`, if the module measures some itself; and `grad_norm`, if it clips gradients itself. The
            names are the same on all ranks. Tensors stay on their device, so that nothing has to wait for it.
        """
        return {}

    def step_flops(self) -> float | Tensor | None:
        """Floating-point operations that the model needs for the last training step on this rank; None if unknown."""
        return None

    def export_pretrained(self, directory: str | Path) -> dict[str, Path]:
        """Write each exported model as a folder that plain transformers loads.

        All ranks must call it; rank 0 writes.

        Args:
            directory: parent of the folders.

        Returns:
            Folder per part.
        """
        from lit_models.export import write_pretrained

        return write_pretrained(self.exported_models(), directory, self._export_tokenizer(), self._export_card())

    def _export_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        return getattr(self, "tokenizer", None)

    def _export_card(self) -> dict[str, Any]:
        """Facts for the model card: class, steps and the newest metrics."""
        metrics = self._trainer.callback_metrics if self._trainer is not None else {}
        return {
            "class": f"{type(self).__module__.rsplit('.', 1)[0]}.{type(self).__name__}",
            "steps": self._trainer.global_step if self._trainer is not None else 0,
            "metrics": {name: round(float(value), 4) for name, value in metrics.items()},
        }


def _local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which changes with it; other tensors as they are."""
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
    return part


def all_reduce_sum(module: LightningModule, value: Tensor) -> Tensor:
    """Sum a tensor over all ranks of a module's trainer; the tensor itself without a trainer or with one rank."""
    trainer = module._trainer
    if trainer is None or trainer.world_size == 1:
        return value
    # Collectives need the tensor on the strategy's device, wherever it was accumulated.
    reduced: Tensor = trainer.strategy.reduce(value.to(trainer.strategy.root_device, copy=True), reduce_op="sum")
    return reduced.to(value.device)
