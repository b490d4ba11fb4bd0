"""Gradients of the loss of single examples, of any PyTorch model and at any of its checkpoints.

Shapes: N train examples, M test examples, b examples at a time, P numbers in the chosen parameters, D numbers of a
gradient that is compared (P, or the dimensions of a random projection). Gradients are float32, or float64 where the
weights are, whatever type a model was trained in, and are taken without dropout.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_models._ranks import warn
from lit_models.influence.cache import RowCache, digest_of
from lit_models.influence.checkpoints import Checkpoint, state_of
from lit_models.influence.examples import TEXT_KEYS, Batch, Examples, causal_lm_loss, map_tensors, right_padded

LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]
Block: TypeAlias = tuple[Tensor, ...]
"""Gradients of b examples, in one (b, p) tensor or several whose columns belong behind each other."""
PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
PROJECTION_PIECE = 2**18
"""Numbers of a projection that are drawn at a time; another value gives other matrices from the same seed."""


class Weights(NamedTuple):
    """What a model computes with at one checkpoint.

    Args:
        chosen: parameters that gradients are taken of, by name.
        rest: other parameters and buffers.
    """

    chosen: dict[str, Tensor]
    rest: dict[str, Tensor]


def chosen_parameters(model: nn.Module, params: str) -> list[str]:
    """Names of the parameters that gradients are taken of.

    Args:
        model: the model.
        params: `all` that are trainable; `last_layer`, which is the output embedding of a language model and the last
            layer with parameters of another one; `lora`, the adapters; or a regular expression that is searched for in
            the names.

    Returns:
        Names, each tensor once.

    Raises:
        ValueError: if there are none.
    """
    parameters = dict(model.named_parameters())
    if params == "all":
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
        remedy = "call requires_grad_() on the model"
    elif params == "lora":
        names = [name for name in parameters if "lora_" in name]
        remedy = "add adapters to the model, or use all"
    elif params == "last_layer":
        head = getattr(model, "get_output_embeddings", lambda: None)() or _last_layer(model)
        own = {id(parameter) for parameter in head.parameters()}
        names = [name for name, parameter in parameters.items() if id(parameter) in own]
        remedy = "name the layer by a regular expression"
    else:
        try:
            names = [name for name in parameters if re.search(params, name)]
        except re.error as error:
            raise ValueError(
                f"params: {params!r} is neither all, last_layer or lora nor a regular expression ({error})"
            ) from error
        remedy = f"the model has names such as {', '.join(list(parameters)[:3])}"
    if not names:
        raise ValueError(f"params: {params!r} matches no parameter of {type(model).__name__}; {remedy}")
    return names


def _last_layer(model: nn.Module) -> nn.Module:
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return layers[-1] if layers else model


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No dropout, no autocast, and attention that vmap knows; every sub-module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    # transformers looks for padding in ids that come without a mask, only to warn; vmap can't look at values.
    warning = [module for module in model.modules() if hasattr(module, PADDING_WARNING)]
    for module in warning:
        module.__dict__[PADDING_WARNING] = lambda *_: None
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    try:
        with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True
        for module in warning:
            del module.__dict__[PADDING_WARNING]


@dataclass
class GradientOptions:
    """How gradients of single examples are computed and kept.

    Args:
        params: `all` trainable parameters, `last_layer`, `lora`, or a regular expression for names of parameters.
        max_grad_elements: numbers of gradients in memory at a time; half of them for the side that is kept, half for
            the one that passes by. A projection of at most as many numbers is kept too.
        batch_size: examples that are differentiated together.
        proj_dim: dimensions of a Gaussian random projection of the gradients; None compares them as they are.
        proj_seed: seed of the projection.
        cache_dir: folder that keeps gradients by weights and content of the example; None computes them anew. Another
            `loss_fn` of the same name needs another folder.
    """

    params: str = "all"
    max_grad_elements: int = 2**27
    batch_size: int = 32
    proj_dim: int | None = None
    proj_seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_grad_elements", "batch_size", "proj_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")


class Projection:
    """Gaussian random projection, with entries from N(0, 1) / sqrt(dims), that is never whole in memory unless small.

    Each parameter tensor has a generator of its own on the CPU, seeded by the seed and the tensor's name, so the same
    tensor is projected in the same way anywhere and beside whatever others.

    Args:
        sizes: numbers of each parameter tensor, by name.
        dims: dimensions that are left.
        seed: seed.
        keep: numbers of the matrix up to which it is kept.
    """

    def __init__(self, sizes: Mapping[str, int], dims: int, seed: int, keep: int) -> None:
        self.sizes, self.dims, self.seed = dict(sizes), dims, seed
        self._keep = sum(sizes.values()) * dims <= keep
        self._kept: dict[str, list[Tensor]] = {}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Rows of the matrix of one tensor, from the first to the last; each (rows, dims) float32."""
        if name in self._kept:
            yield from self._kept[name]
            return
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        draws = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows, size, drawn = max(1, PROJECTION_PIECE // self.dims), self.sizes[name], []
        for start in range(0, size, rows):
            piece = torch.randn(min(rows, size - start), self.dims, generator=draws) / self.dims**0.5
            if self._keep:
                drawn.append(piece)
            yield piece
        if self._keep:
            self._kept[name] = drawn

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Project.

        Args:
            gradients: (b, p) of each tensor by its name.

        Returns:
            (b, dims).
        """
        total: Tensor | None = None
        for name, block in gradients.items():
            if total is None:
                total = block.new_zeros(len(block), self.dims)
            start = 0
            for piece in self.pieces(name):
                total.addmm_(block[:, start : start + len(piece)], piece.to(block))
                start += len(piece)
        assert total is not None
        return total


class _Loss(nn.Module):
    """The loss as a module, so that `functional_call` reaches the model inside whatever computes the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, example: Any) -> Tensor:  # noqa: ANN401
        loss = self.loss_fn(self.model, example)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must give one number, a () tensor, for one example, got {shape}")
        return loss


class Plan(NamedTuple):
    """How pairs of examples are computed.

    Args:
        rows: examples whose gradients are held at a time.
        train: whether those are train examples; else test examples.
        gradients: how many are computed in all.
    """

    rows: int
    train: bool
    gradients: int


class PerSampleGradients:
    """Gradients of the loss of each example by itself.

    They are computed for many examples together with `vmap(grad(...))`, or in a loop where a model can't be traced by
    it, which is said once. The model's own weights and modes stay as they are.

    Args:
        model: the network, on the device to compute on; its weights count where no checkpoint is given.
        loss_fn: `(model, example) -> ()`, of one example without a batch axis; by default `causal_lm_loss`, for which
            padding may be on either side as long as `attention_mask` tells it. The first token of a text is never
            predicted.
        options: which parameters, and how much at a time.
        collate: makes a batch of a list of examples; by default rows of unequal length are padded.

    Example::

        source = PerSampleGradients(model, options=GradientOptions(params="last_layer"))
        scores = tracin_cp(source, ["step=0.ckpt", "step=10.ckpt"], [1e-3, 8e-4], train, test)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None = None,
        options: GradientOptions | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self.model, self.options, self.collate = model, options or GradientOptions(), collate
        self.loss_fn = loss_fn or causal_lm_loss
        self.names = chosen_parameters(model, self.options.params)
        sizes = {name: model.get_parameter(name).numel() for name in self.names}
        self.size = sum(sizes.values())
        """P."""
        self.width = self.options.proj_dim or self.size
        """D."""
        self.loops = False
        """Whether the model turned out to need a loop over examples."""
        self._projection: Projection | None = None
        if self.options.proj_dim is not None:
            self._projection = Projection(
                sizes, self.options.proj_dim, self.options.proj_seed, self.options.max_grad_elements
            )
        self._loss = _Loss(model, self.loss_fn)
        self._vmapped = {
            "gradients": vmap(grad(self._call), in_dims=(None, None, 0)),
            "losses": vmap(self._call, in_dims=(None, None, 0)),
        }

    # -- what users call ---------------------------------------------------------------------------------------------

    def examples(self, data: Any) -> Examples:  # noqa: ANN401
        """Examples in the form that is computed with.

        Args:
            data: a batch of all examples, as a tensor, tuple or dict of tensors, or a list or data set of examples.
        """
        if isinstance(data, Examples):
            return data
        return Examples(data, self.collate, TEXT_KEYS if self.loss_fn is causal_lm_loss else None)

    def load(self, checkpoint: Checkpoint = None) -> Weights:
        """Weights of a checkpoint, in at least float32, on the model's device.

        Args:
            checkpoint: see `checkpoints.state_of`; None takes the weights of the model.

        Raises:
            ValueError: if it is a checkpoint of another model.
        """
        device = self.model.get_parameter(self.names[0]).device
        weights = Weights({}, {})
        for name, value in state_of(self.model, checkpoint).items():
            if value.is_floating_point():
                value = value.to(device, torch.promote_types(value.dtype, torch.float32))
            (weights.chosen if name in self.names else weights.rest)[f"model.{name}"] = value.to(device)
        return weights

    @torch.no_grad()
    def losses(self, data: Any, checkpoint: Checkpoint = None) -> Tensor:  # noqa: ANN401
        """Loss of each example.

        Args:
            data: N examples.
            checkpoint: see `load`.

        Returns:
            (N,) float32 on the CPU.
        """
        examples, weights = self.examples(data), self.load(checkpoint)
        losses = torch.empty(len(examples))
        for rows in _chunks(examples.order(), self.options.batch_size):
            losses[rows] = self._run("losses", weights, self._batch(examples, rows), len(rows))[0].float().cpu()
        return losses

    def matrix(self, data: Any, checkpoint: Checkpoint = None) -> Tensor:  # noqa: ANN401
        """Gradients of all examples.

        Args:
            data: N examples.
            checkpoint: see `load`.

        Returns:
            (N, D) float32 on the CPU; with `proj_dim` these are features of the examples.
        """
        examples, weights = self.examples(data), self.load(checkpoint)
        table = torch.empty(len(examples), self.width)
        for rows, block in self._blocks(weights, examples, examples.order()):
            table[rows] = torch.cat(block, dim=1).float().cpu()
        return table

    def norms(self, data: Any, checkpoint: Checkpoint = None) -> Tensor:  # noqa: ANN401
        """Norm of the gradient of each example.

        Args:
            data: N examples.
            checkpoint: see `load`.

        Returns:
            (N,) float32 on the CPU.
        """
        examples, weights = self.examples(data), self.load(checkpoint)
        norms = torch.empty(len(examples))
        for rows, block in self._blocks(weights, examples, examples.order()):
            norms[rows] = _norms(block).float().cpu()
        return _finite(norms)

    def dots(
        self,
        train: Any,  # noqa: ANN401
        test: Any,  # noqa: ANN401
        checkpoint: Checkpoint = None,
        normalize: bool = False,
        aggregate: bool = False,
    ) -> Tensor:
        """Inner products of the gradients of train and test examples at one checkpoint.

        Gradients are computed once for each example while one side fits into `max_grad_elements`; else that side is
        taken in blocks, and the other one is computed anew, or read from the cache, for every block.

        Args:
            train: N examples.
            test: M examples.
            checkpoint: see `load`.
            normalize: divide gradients by their norms, which gives cosines.
            aggregate: sum over the test examples first.

        Returns:
            (N, M) float64 on the CPU, or (N,) of the aggregate.

        Raises:
            ValueError: if a gradient isn't finite.
        """
        train, test, weights = self.examples(train), self.examples(test), self.load(checkpoint)
        if aggregate:
            table = torch.empty(len(train), 1, dtype=torch.float64)
            whole = self._sum(weights, test, normalize)
            for rows, block in self._blocks(weights, train, train.order()):
                table[rows] = _dot(_unit(block) if normalize else block, whole)
            return _finite(table)[:, 0]
        rows_held, transposed, _ = self.plan(len(train), len(test))
        held, passing = (train, test) if transposed else (test, train)
        table = torch.empty(len(passing), len(held), dtype=torch.float64)
        for columns in _chunks(held.order(), rows_held):
            kept = self._hold(weights, held, columns, normalize)
            for rows, block in self._blocks(weights, passing, passing.order()):
                block = _unit(block) if normalize else block
                table[torch.tensor(rows)[:, None], torch.tensor(columns)] = _dot(block, kept)
        return _finite(table.T if transposed else table)

    def plan(self, train: int, test: int) -> "Plan":
        """How `dots` divides N train and M test examples, for the fewest gradients.

        Args:
            train: N.
            test: M.
        """
        rows = max(1, self.options.max_grad_elements // 2 // self.width)
        by_test, by_train = test + train * -(-test // rows), train + test * -(-train // rows)
        computed = min(by_test, by_train) if self.options.cache_dir is None else train + test
        return Plan(rows, by_train < by_test, computed)

    @property
    def chunk(self) -> int:
        """Examples that are differentiated together."""
        return max(1, min(self.options.batch_size, self.options.max_grad_elements // 2 // self.size))

    def compute(self, weights: Weights, examples: Examples, rows: Sequence[int]) -> Block:
        """Gradients of at most `chunk` examples.

        Args:
            weights: see `load`.
            examples: see `examples`.
            rows: b of them.

        Returns:
            (b, p) of each chosen tensor, or one (b, D) of the projection.
        """
        block = self._run("gradients", weights, self._batch(examples, rows), len(rows))
        if self._projection is not None:
            return (self._projection(dict(zip(self.names, block, strict=True))),)
        return block

    # -- parts -------------------------------------------------------------------------------------------------------

    def _call(self, chosen: dict[str, Tensor], rest: dict[str, Tensor], example: Batch) -> Tensor:
        return functional_call(self._loss, (chosen, rest), (example,))

    def _batch(self, examples: Examples, rows: Sequence[int]) -> Batch:
        batch = examples.batch(rows)
        if self.loss_fn is causal_lm_loss:
            batch = right_padded(batch)
        device = self.model.get_parameter(self.names[0]).device
        return map_tensors(lambda tensor: tensor.to(device), batch)

    def _run(self, what: Literal["gradients", "losses"], weights: Weights, batch: Batch, count: int) -> Block:
        """Gradients of each chosen tensor as (b, p), or the (b,) losses, of one batch."""
        with _still(self.model):
            failure: Exception | None = None
            if not self.loops:
                try:
                    return self._flat(self._vmapped[what](*weights, batch))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever the model is at fault for, the loop raises as well
                    failure = error
            values = self._loop(what, weights, batch, count)
        if failure is not None:
            self.loops = True
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            warn(
                f"{type(self.model).__name__} can't be traced by vmap ({reason[:200]}); "
                "gradients are computed one example at a time",
                stacklevel=3,
            )
        return values

    def _flat(self, values: Tensor | dict[str, Tensor]) -> Block:
        if isinstance(values, Tensor):
            return (values,)
        return tuple(values[f"model.{name}"].reshape(len(values[f"model.{name}"]), -1) for name in self.names)

    def _loop(self, what: str, weights: Weights, batch: Batch, count: int) -> Block:
        chosen = {name: value.detach().requires_grad_() for name, value in weights.chosen.items()}
        found: list[Block] = []
        for row in range(count):
            example = map_tensors(lambda tensor, row=row: tensor[row], batch)  # type: ignore[misc]
            with torch.set_grad_enabled(what == "gradients"):
                loss = self._call(chosen, weights.rest, example)
            if what == "losses":
                found.append((loss[None],))
                continue
            gradients = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True, materialize_grads=True)
            named = dict(zip(chosen, gradients, strict=True))
            found.append(self._flat({name: value[None] for name, value in named.items()}))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    def _blocks(self, weights: Weights, examples: Examples, rows: Sequence[int]) -> Iterator[tuple[list[int], Block]]:
        """Gradients of some examples, a few at a time, beside their rows."""
        cache = self._cache(weights)
        for chunk in _chunks(rows, self.chunk):
            if cache is None:
                yield chunk, self.compute(weights, examples, chunk)
                continue
            digests = [digest_of(examples[row]) for row in chunk]
            if missing := cache.missing(digests):
                block = self.compute(weights, examples, [chunk[number] for number in missing])
                cache.write([digests[number] for number in missing], torch.cat(block, dim=1))
            device = next(iter(weights.chosen.values())).device
            yield chunk, (cache.read(digests).to(device),)

    def _cache(self, weights: Weights) -> RowCache | None:
        if self.options.cache_dir is None:
            return None
        config: Any = getattr(self.model, "config", None)
        described = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else ""
        key = digest_of(
            {
                "weights": [weights.chosen, weights.rest],
                "model": [type(self.model).__module__, type(self.model).__qualname__, described],
                "loss": [self.loss_fn.__module__, getattr(self.loss_fn, "__qualname__", type(self.loss_fn).__name__)],
                "projection": [self.options.proj_dim, self.options.proj_seed],
            }
        )
        return RowCache(Path(self.options.cache_dir) / key[:32])

    def _hold(self, weights: Weights, examples: Examples, rows: Sequence[int], normalize: bool) -> Block:
        """Gradients of some examples, all in memory, in the order of their rows."""
        held: Block | None = None
        start = 0
        for chunk, block in self._blocks(weights, examples, rows):
            if len(chunk) == len(rows):
                held = block
            if held is None:
                held = tuple(part.new_empty(len(rows), part.shape[1]) for part in block)
            if held is not block:
                for whole, part in zip(held, block, strict=True):
                    whole[start : start + len(chunk)] = part
            start += len(chunk)
        assert held is not None
        return _unit(held) if normalize else held

    def _sum(self, weights: Weights, examples: Examples, normalize: bool) -> Block:
        total: list[Tensor] = []
        for _, block in self._blocks(weights, examples, examples.order()):
            parts = [part.sum(0, keepdim=True) for part in (_unit(block) if normalize else block)]
            total = [old + new for old, new in zip(total, parts, strict=True)] if total else parts
        return tuple(total)


def _chunks(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def _dot(first: Block, second: Block) -> Tensor:
    """(b, c) inner products of b and c gradients, float64 on the CPU."""
    total = first[0] @ second[0].T
    for left, right in zip(first[1:], second[1:], strict=True):
        total = total.addmm(left, right.T)
    return total.double().cpu()


def _norms(block: Block) -> Tensor:
    total = block[0].square().sum(1)
    for part in block[1:]:
        total = total + part.square().sum(1)
    return total.sqrt()


def _unit(block: Block) -> Block:
    """Gradients of norm 1; a gradient of 0 stays 0."""
    norms = _norms(block)[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    return tuple(part / norms for part in block)


def _finite(table: Tensor) -> Tensor:
    """Pass on a table of numbers, or name the example whose gradient isn't finite."""
    bad = ~table.isfinite().reshape(len(table), -1)
    if bool(bad.any()):
        whole = bad.all(0) & (len(bad) > 1)
        side, example = ("test", whole) if bool(whole.any()) and table.ndim > 1 else ("given", bad.any(1))
        raise ValueError(
            f"the gradient of the {side} example {int(example.nonzero()[0])} is not finite; "
            "check the example and the checkpoint"
        )
    return table
