"""Hidden states and token embeddings of a forward pass, for shapers that look inside the models."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StateRecorder:
    """Keeps hidden states of every forward pass while it is entered.

    Args:
        model: causal language model.
        states: `ref_last` or `actor_last`, the states after the last layer and its norm, or `ref_layer_N`, those after
            N layers.

    Raises:
        ValueError: if the model has not that many layers.
    """

    def __init__(self, model: "PreTrainedModel", states: str) -> None:
        trunk: Any = model.base_model
        self._module: nn.Module = trunk
        if "_layer_" in states:
            layers = max((m for m in trunk.modules() if isinstance(m, nn.ModuleList)), key=len)
            number = int(states.rpartition("_")[2])
            if number > len(layers):
                raise ValueError(f"shapers.states: {states!r} of a reference with {len(layers)} layers")
            self._module = layers[number - 1]
        self._kept: list[Tensor] = []

    def __enter__(self) -> "StateRecorder":
        self._handle = self._module.register_forward_hook(self._keep)
        self._eager: Any = torch.compiler.set_stance("force_eager")  # compiled code passes over new hooks
        self._eager.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._eager.__exit__(*error)
        self._handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        state = getattr(output, "last_hidden_state", None)
        if state is None:
            state = output[0] if isinstance(output, tuple) else output
        self._kept.append(state.detach())

    def states(self, length: int) -> Tensor:
        """States before the first response token and after each one.

        Args:
            length: R, columns of the responses.

        Returns:
            (B,R+1,H) of all passes.
        """
        return torch.cat([state[:, -length - 1 :] for state in self._kept])


@torch.no_grad()
def embed_actions(actor: "PreTrainedModel", ids: Tensor) -> Tensor:
    """Rows of the policy's embedding table, without the factor some families apply after it.

    Args:
        actor: causal language model; adapters on the table are left out.
        ids: (B,R) int64.

    Returns:
        (B,R,H).
    """
    table: Any = actor.get_input_embeddings()
    weight = (table.get_base_layer() if hasattr(table, "get_base_layer") else table).weight
    if hasattr(weight, "full_tensor"):  # sharded: its module gathers it only within the model's forward pass
        weight = weight.full_tensor()
    return torch.nn.functional.embedding(ids, weight)
