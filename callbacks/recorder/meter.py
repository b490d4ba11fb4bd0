"""Measuring test batches in the middle of training."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.recorder.causal import METRICS, OPTION, CausalMetric, CausalOutputs, causal_network
from callbacks.recorder.single import SingleLoss
from callbacks.rng import RandomState


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule, grad: bool = False) -> Iterator[None]:
    """Evaluate in the middle of training and leave no trace.

    Args:
        trainer: the trainer, for the precision of its forward passes.
        module: set to evaluation; the mode of each of its sub-modules is restored, and so are the random states.
        grad: keep gradients; otherwise they are off. Inference mode is not used, since modules that keep tensors from
            one call to the next (rotary tables) could not be trained with those.
    """
    state = RandomState.now()
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.set_grad_enabled(grad), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, training in modes:
            part.training = training
        state.restore()


@dataclass
class Measure:
    """A metric that is recorded.

    Attributes:
        name: its name on disk.
        every_n_steps: steps between two measurements.
        function: how it is measured; None leaves it to the module.
    """

    name: str
    every_n_steps: int
    function: Callable[..., Any] | None


def parse_metrics(metrics: Mapping[str, Any] | None, every_n_steps: int) -> list[Measure]:
    """Metrics as they stand in a configuration.

    Args:
        metrics: see `callbacks.TrainingDynamicsRecorder`.
        every_n_steps: interval of those that have none of their own.

    Returns:
        The metrics.

    Raises:
        ValueError: naming the key, if a function can't be imported or an option is wrong.
    """
    measures = []
    for name, spec in (metrics or {"loss": None}).items():
        key = f"{OPTION}.metrics.{name}"
        options = dict(spec) if isinstance(spec, Mapping) else {"function": spec}
        interval = options.pop("every_n_steps", every_n_steps)
        if type(interval) is not int or interval < 1:
            raise ValueError(f"{key}.every_n_steps must be a whole number of at least 1, got {interval!r}")
        function = options.pop("function", None)
        if function is None and options:
            function = name  # options of a metric that has this name
        if isinstance(function, str):
            function = METRICS.get(function) or imported(function, f"{key}.function")
        try:
            if isinstance(function, type):
                function = function(**options)
            elif options:
                function = partial(function, **options)
        except TypeError as error:
            raise ValueError(f"{key}: {error}; remove the option") from error
        if function is not None and not callable(function):
            raise ValueError(f"{key} must be a function, its import path or options, got {function!r}")
        measures.append(Measure(name, interval, function))
    return measures


def imported(path: str, key: str) -> Any:  # noqa: ANN401
    """What an import path names.

    Raises:
        ValueError: naming the key, if there is nothing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(METRICS)
        raise ValueError(f"{key}: {path!r} can't be imported; give `package.module.name`, or one of {known}") from error


class Meter:
    """Measures test batches in the best way that a module offers.

    Args:
        module: the trained module.
        measures: what to measure.
        sharded: whether processes must run the same number of forward passes.

    Raises:
        ValueError: if the module offers no way to one of them.
    """

    def __init__(self, module: LightningModule, measures: Sequence[Measure], sharded: bool = False) -> None:
        self.module, self.sharded = module, sharded
        self.measures = {measure.name: measure for measure in measures}
        self.network = causal_network(module)
        self.single: SingleLoss | None = None
        self._functions = {measure.name: self._function(measure) for measure in measures}

    @property
    def one_by_one(self) -> bool:
        """Whether batches must hold a single example."""
        return self.single is not None

    def _function(self, measure: Measure) -> Callable[..., Any] | None:
        """How to measure; None for what `per_example_metrics` gives."""
        if measure.function is not None:
            if isinstance(measure.function, CausalMetric) and self.network is None:
                raise ValueError(
                    f"{OPTION}.metrics.{measure.name} needs a module with one causal language model of transformers; "
                    "name a function (pl_module, batch) instead"
                )
            return measure.function
        if hasattr(self.module, "per_example_metrics"):
            return None
        if self.network is not None and measure.name in METRICS:
            return METRICS[measure.name]()
        if measure.name == "loss":
            self.single = SingleLoss(self.module)
            return self.single
        raise ValueError(
            f"{OPTION}.metrics.{measure.name}: {type(self.module).__name__} has no per_example_metrics(batch) that "
            "could give it; add that method, or name a function (pl_module, batch)"
        )

    def begin(self) -> None:
        """To be called before every measurement, of any number of batches."""
        if self.single is not None:
            self.single.begin()

    def __call__(self, batch: Any, num: int, names: Sequence[str], step: int = 0) -> dict[str, Tensor]:  # noqa: ANN401
        """Measure a batch.

        Args:
            batch: on the device.
            num: its number of examples.
            names: which metrics.
            step: present step, the seed of sampled answers.

        Returns:
            (num,) float by name.

        Raises:
            ValueError: naming the metric, if the result has another form.
        """
        results: dict[str, Any] = {}
        outputs: CausalOutputs | None = None
        given: Mapping[str, Any] | None = None
        for name in names:
            function = self._functions[name]
            if function is None:
                if given is None:
                    ask: Any = self.module.per_example_metrics
                    given = ask(batch)
                if name not in given and self.network is not None and name in METRICS:
                    self._functions[name] = function = METRICS[name]()
                elif name not in given:
                    raise ValueError(
                        f"{OPTION}.metrics.{name}: per_example_metrics of {type(self.module).__name__} gives only "
                        f"{sorted(given)}; add it there, or name a function"
                    )
                else:
                    results[name] = given[name]
            if isinstance(function, CausalMetric):
                if outputs is None:
                    assert self.network is not None
                    outputs = self._outputs(batch, step)
                results[name] = function(outputs)
            elif function is not None:
                results[name] = function(self.module, batch)
        return {name: self._checked(name, value, num) for name, value in results.items()}

    def _outputs(self, batch: Any, step: int) -> CausalOutputs:  # noqa: ANN401
        assert self.network is not None
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{OPTION}.metrics: batches of tests need `input_ids` and `labels`, got {keys}; give "
                f"{type(self.module).__name__} per_example_metrics(batch), or name a function"
            )
        return CausalOutputs(self.network, batch, self.module, step, self.sharded)

    def _checked(self, name: str, value: Any, num: int) -> Tensor:  # noqa: ANN401
        values: Tensor = torch.as_tensor(value).detach() if not isinstance(value, Tensor) else value
        if values.shape != (num,):
            raise ValueError(
                f"{OPTION}.metrics.{name}: {num} examples must give {num} values in one dimension, got shape "
                f"{tuple(values.shape)}; return one value per example"
            )
        return values
