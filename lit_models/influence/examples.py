"""Examples that gradients are taken of, and the loss of a text.

Shapes: N examples, b of them at a time, L tokens.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Any
"""A tensor, or a tuple or dict of tensors, whose first axis counts examples; an example is the same without it."""
TEXT_KEYS = ("input_ids", "attention_mask", "labels")
IGNORED = -100


def causal_lm_loss(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of one text over its own labelled tokens.

    Args:
        model: causal language model; it gets (1, L) ids and gives logits, by themselves or as `.logits`.
        example: `input_ids` (L,) int64 and `labels` (L,) int64, which repeat the ids and are -100 where a token doesn't
            count. Padding stands on the right, where a causal model can't see it.

    Returns:
        () in nats; NaN with a zero gradient if no token counts.
    """
    ids, labels = example["input_ids"], example["labels"]
    named = inspect.signature(model.forward).parameters
    anything = any(item.kind is item.VAR_KEYWORD for item in named.values())
    options = {"use_cache": False} if "use_cache" in named or (anything and hasattr(model, "config")) else {}
    inputs = {"input_ids": ids[None]} if anything or "input_ids" in named else {}
    output = model(**inputs, **options) if inputs else model(ids[None], **options)
    logits = output if isinstance(output, Tensor) else output.logits
    targets = labels[1:]
    counted = targets != IGNORED
    logits = logits[0, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    # By gather, since vmap can't index with a tensor that differs between examples.
    nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    total, number = torch.where(counted, nll, 0.0).sum(), counted.sum()
    return torch.where(number > 0, total / number.clamp(min=1), torch.nan)


def right_padded(batch: Batch) -> dict[str, Tensor]:
    """Move texts to the left end of their rows, so that a causal model needs no mask to read them.

    Args:
        batch: `input_ids` (b, L) int64, `labels` (b, L) int64, and `attention_mask` (b, L) where there is padding.

    Returns:
        `input_ids` and `labels`, no longer than the longest text.

    Raises:
        ValueError: if ids or labels are missing.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise ValueError(
            "examples must be dicts with input_ids and labels for the loss of language models; give loss_fn for others"
        )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if mask is None:
        return {"input_ids": ids, "labels": labels}
    order = (mask == 0).long().argsort(dim=1, stable=True)[:, : max(2, int(mask.sum(1).max()))]
    labels = labels.masked_fill(mask == 0, IGNORED)
    return {"input_ids": ids.gather(1, order), "labels": labels.gather(1, order)}


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor of a batch or an example.

    Args:
        function: what to apply.
        batch: tensors.

    Returns:
        The same structure with the results.

    Raises:
        ValueError: if there is something else in it.
    """
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(map_tensors(function, value) for value in batch)
    if not isinstance(batch, Tensor):
        raise ValueError(f"examples must hold tensors only, got {type(batch).__name__}; remove other entries")
    return function(batch)


def _leaves(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return found


def pad_and_stack(items: Sequence[Any], fill: int = 0) -> Batch:
    """Make one batch of examples.

    Args:
        items: b examples of one structure: tensors, lists or numbers, or tuples or dicts of them.
        fill: what rows of unequal length end with; `labels` end with -100.

    Returns:
        The same structure with (b, ...) tensors.

    Raises:
        ValueError: if shapes differ other than in the length of rows, or something is no number.
    """
    first = items[0]
    if isinstance(first, Mapping):
        return {
            key: pad_and_stack([item[key] for item in items], IGNORED if key == "labels" else fill) for key in first
        }
    if isinstance(first, tuple):
        return tuple(pad_and_stack(column, fill) for column in zip(*items, strict=True))
    try:
        tensors = [torch.as_tensor(item) for item in items]
        if tensors[0].ndim == 1:
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
        return torch.stack(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"examples can't be put into one batch ({error}); give tensors of one shape, rows of numbers, or collate"
        ) from error


class Examples:
    """Examples by row, whichever way they are given.

    Args:
        data: a batch of all of them, or a list or data set of single examples.
        collate: makes a batch of a list of examples; `pad_and_stack` by default.
        keys: entries of dicts to keep; all by default.
    """

    def __init__(
        self,
        data: Any,  # noqa: ANN401
        collate: Callable[[list[Any]], Batch] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        def kept(item: Any) -> Any:  # noqa: ANN401
            if keys is None or not isinstance(item, Mapping):
                return item
            return {key: item[key] for key in keys if key in item}

        self.collate = collate or pad_and_stack
        self._items: list[Any] | None = None
        self._stacked: Batch = None
        if isinstance(data, (Mapping, tuple, Tensor)):
            self._stacked = kept(data)
            lengths = {len(tensor) for tensor in _leaves(self._stacked)}
            if len(lengths) != 1:
                raise ValueError(
                    f"examples must be tensors of one length, got lengths {sorted(lengths)}; "
                    "give a list if each entry is an example"
                )
            self._length = lengths.pop()
        else:
            self._items = [kept(data[row]) for row in range(len(data))]
            self._length = len(self._items)
        if not self._length:
            raise ValueError("examples: there are none; give at least one")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:  # noqa: ANN401
        return self._items[row] if self._items is not None else map_tensors(lambda tensor: tensor[row], self._stacked)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some examples as tensors with b rows."""
        if self._items is not None:
            return self.collate([self._items[row] for row in rows])
        places = torch.as_tensor(list(rows))
        return map_tensors(lambda tensor: tensor[places.to(tensor.device)], self._stacked)

    def subset(self, rows: Sequence[int]) -> "Examples":
        """Some examples by themselves."""
        if self._items is not None:
            return Examples([self._items[row] for row in rows], self.collate)
        return Examples(self.batch(rows), self.collate)

    def order(self) -> list[int]:
        """All rows, texts of like length beside each other, which saves padding."""
        rows = list(range(len(self)))
        if self._items and isinstance(self._items[0], Mapping) and "input_ids" in self._items[0]:
            rows.sort(key=lambda row: len(self[row]["input_ids"]))
        return rows
