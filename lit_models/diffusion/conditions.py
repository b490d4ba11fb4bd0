"""What a network is told about the sound to make: texts, vectors, or nothing, for guided and unguided rows.

Shapes: B rows, n tokens, E width of the text encoder.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_models.diffusion.samplers import Branch


class Condition(NamedTuple):
    """What the network reads of texts; without any part, the null condition.

    Args:
        vector: (B, E), or None.
        states: (B, n, E), or None.
        mask: (B, n) bool, which is there if the states are.
    """

    vector: Tensor | None = None
    states: Tensor | None = None
    mask: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(next(part for part in self if part is not None))

    def spread(self, rows: int) -> "Condition":
        """Repeat each row until there are so many."""
        return Condition(*(None if part is None else spread(part, rows) for part in self))


def spread(values: Tensor, rows: int) -> Tensor:
    """Repeat each row of a tensor until there are so many; their number must be a multiple of what there are."""
    return values.repeat_interleave(rows // len(values), 0)


def common_rows(sizes: Mapping[str, int]) -> int:
    """Number of rows that inputs have, each of which may also have a single one.

    Args:
        sizes: rows by the name of the input.

    Returns:
        The largest number; 1 without inputs.

    Raises:
        ValueError: if another one is neither 1 nor the same.
    """
    largest = max(sizes.values(), default=1)
    for name, size in sizes.items():
        if size not in (1, largest):
            most = max(sizes, key=lambda key: sizes[key])
            raise ValueError(f"{name}: {size} of them do not fit {largest} of {most}; give one, or equally many")
    return largest


def pair(positive: Condition | None, negative: Condition | None, rows: int, unet: nn.Module) -> Condition:
    """Rows of a condition, followed by as many of another.

    Args:
        positive: of `rows` rows; None for the null condition.
        negative: the same.
        rows: number of each.
        unet: whose null vector stands for a missing vector. Missing tokens are masked.

    Returns:
        2 · rows rows.
    """
    chosen = [condition or Condition() for condition in (positive, negative)]
    vector = states = mask = None
    if vectors := [condition.vector for condition in chosen if condition.vector is not None]:
        null: Any = getattr(unet, "null_vector", None)
        if hasattr(null, "full_tensor"):
            null = null.full_tensor()  # it is divided among ranks
        null = vectors[0].new_zeros(vectors[0].shape[-1]) if null is None else null.to(vectors[0])
        vector = torch.cat([null.expand(rows, -1) if item.vector is None else item.vector for item in chosen])
    if known := [condition.states for condition in chosen if condition.states is not None]:
        longest = max(item.shape[1] for item in known)
        nothing = known[0].new_zeros(rows, 0, known[0].shape[-1])
        all_states = [nothing if item.states is None else item.states for item in chosen]
        all_masks = [nothing[..., 0].bool() if item.mask is None else item.mask for item in chosen]
        states = torch.cat([pad(item, (0, 0, 0, longest - item.shape[1])) for item in all_states])
        mask = torch.cat([pad(item, (0, longest - item.shape[1])) for item in all_masks])
    return Condition(vector, states, mask)


def conditioned(unet: Any, condition: Condition, rows: int) -> Callable[[Tensor, Tensor, Branch], Tensor]:  # noqa: ANN401
    """A network together with what it is told.

    Keys and values of the text are computed here, once for all steps.

    Args:
        unet: takes z, t, and what it is told by the names of `WaveformUNet1DModel.forward`.
        condition: of `rows` rows, or what `pair` gave.
        rows: number of clips.

    Returns:
        Function for `Guidance.predictor`; the branches "unconditional" and "both" need a pair.
    """
    keys_values: Any = None
    if condition.states is not None and hasattr(unet, "text_key_values") and not _is_sharded(unet):
        keys_values = unet.text_key_values(condition.states)
    whole_text = condition.mask is None or bool(condition.mask.all())
    parts = {"conditional": slice(rows), "unconditional": slice(rows, None), "both": slice(None)}
    casts = not hasattr(unet, "padded_length")  # ours changes the dtype of its input by itself

    def network(z: Tensor, t: Tensor, branch: Branch) -> Tensor:
        part = parts[branch]
        options: dict[str, Any] = {}
        if condition.vector is not None:
            options["text_vector"] = condition.vector[part]
        if keys_values is not None:
            options["text_key_values"] = tuple((keys[part], values[part]) for keys, values in keys_values)
        elif condition.states is not None:
            options["text_states"] = condition.states[part]
        if condition.mask is not None and not whole_text:
            options["text_mask"] = condition.mask[part]
        if casts and (parameter := next(unet.parameters(), None)) is not None:
            z = z.to(parameter.dtype)
        output: Any = unet(z, t, **options)
        if isinstance(output, Tensor):
            return output
        velocity: Tensor = output.sample if hasattr(output, "sample") else output[0]
        return velocity

    return network


def _is_sharded(network: nn.Module) -> bool:
    """Whether parameters are divided among ranks, so that parts of the network cannot be called by themselves."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in network.parameters())
