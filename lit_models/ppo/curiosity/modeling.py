"""The intrinsic curiosity module of CD-RLHF: how badly the next hidden state is predicted."""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_models.nn.sharding import ShardingNeeds

Encoder = Literal["mlp", "identity", "random_frozen"]
ERROR_FLOOR = 1e-12
"""Below this squared norm the gradient of a norm is cut off, as it is not defined at 0."""


class Prediction(NamedTuple):
    """What the module says of a batch of tokens, (B,R,H) float32 each; `action` only with an inverse model."""

    target: Tensor
    predicted: Tensor
    action: Tensor | None


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        sizes: width of the input, of each hidden layer and of the output.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] if number else []
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


class ForwardModel(nn.Module):
    """Predicts the features of the next state from those of the present one and the action.

    Args:
        hidden_size: H of states and actions.
        intermediate_size: D of the hidden layers.
        num_layers: linear layers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_layers: int = 3) -> None:
        super().__init__()
        self.hidden = mlp([2 * hidden_size, *[intermediate_size] * (num_layers - 1), hidden_size])

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """(B,R,H) prediction of features (B,R,H) and actions (B,R,H)."""
        predicted: Tensor = self.hidden(torch.cat([features, actions], -1))
        return predicted


class ICM(nn.Module):
    """Encoder of states and forward model over its features (CD-RLHF, section 3.1; released code of it).

    Args:
        hidden_size: H of hidden states and token embeddings.
        intermediate_size: D of the forward model.
        num_layers: linear layers of both; the released code has 3, the paper 2.
        encoder: `mlp` learns features; `identity` uses the states themselves; `random_frozen` never trains the
            encoder, as in random network distillation.
        detach_target: no gradient into the features of the next state, so that they cannot shrink to be predictable.
        inverse_model: also predict the action from both features, which keeps them informative (Pathak et al. 2017).
    """

    sharding_needs = ShardingNeeds(units=("Sequential",), float32=("ICM",))

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int = 3,
        encoder: Encoder = "mlp",
        detach_target: bool = False,
        inverse_model: bool = False,
    ) -> None:
        super().__init__()
        self.detach_target = detach_target
        self.encoder: nn.Module = nn.Identity()
        if encoder != "identity":
            self.encoder = mlp([hidden_size, *[2 * hidden_size] * (num_layers - 1), hidden_size])
        if encoder == "random_frozen":
            self.encoder.requires_grad_(False)
        self.forward_model = ForwardModel(hidden_size, intermediate_size, num_layers)
        self.inverse = mlp([2 * hidden_size, 2 * hidden_size, hidden_size]) if inverse_model else None
        # Count, sum and sum of squares of all errors so far, for whitening that keeps their decay.
        self.error_moments: Tensor
        self.register_buffer("error_moments", torch.zeros(3, dtype=torch.float64))

    def forward(self, hidden: Tensor, actions: Tensor) -> Prediction:
        """Predict every next state.

        Args:
            hidden: (B,R+1,H), the state before the first token and after each one.
            actions: (B,R,H), embeddings of the tokens.

        Returns:
            Features of the next states and their predictions.
        """
        # Errors are small differences of similar vectors, so that they are computed in float32 under autocast too.
        with torch.autocast(hidden.device.type, enabled=False):
            features = self.encoder(hidden.float())
            actions = actions.float()
            target = features[:, 1:]
            predicted = self.forward_model(features[:, :-1], actions)
            inverse = None if self.inverse is None else self.inverse(torch.cat([features[:, :-1], target], -1))
        return Prediction(target.detach() if self.detach_target else target, predicted, inverse)


def prediction_error(prediction: Prediction) -> Tensor:
    """Half the distance between predicted and actual features.

    Args:
        prediction: of `ICM`.

    Returns:
        (B,R) float32.
    """
    squared = (prediction.predicted - prediction.target).square().sum(-1)
    return 0.5 * squared.clamp(min=ERROR_FLOOR).sqrt()


def icm_loss(prediction: Prediction, actions: Tensor, kind: Literal["norm", "squared"] = "norm") -> Tensor:
    """Loss of each token.

    Args:
        prediction: of `ICM`.
        actions: (B,R,H), embeddings of the tokens, for the inverse model.
        kind: `norm` is half the distance (released code), `squared` half its square (paper).

    Returns:
        (B,R) float32.
    """
    if kind == "norm":
        loss = prediction_error(prediction)
    else:
        loss = 0.5 * (prediction.predicted - prediction.target).square().sum(-1)
    if prediction.action is not None:
        loss = loss + 0.5 * (prediction.action - actions.float()).square().sum(-1)
    return loss
