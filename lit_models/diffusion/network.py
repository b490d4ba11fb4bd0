"""The network of the training step: the UNet and, if it is trained, the text encoder before it."""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_1d import UNet1DModel
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from lit_models.diffusion.modeling import WaveformUNet1DModel
from lit_models.diffusion.text import Pooling, TextStates, encode
from lit_models.nn.sharding import ShardingNeeds


@dataclass(frozen=True)
class NetworkInput:
    """Noisy sound and its condition.

    Args:
        z: (B, C, L) float32.
        t: (B,) float32.
        tokens: what `text.tokenize` returns, for the encoder in the network.
        states: what another encoder made of the texts.
        vector: (B, E) float32, a condition without tokens, such as a class.
        drop: (B,) bool, true where the condition is taken away; None for nowhere.
    """

    z: Tensor
    t: Tensor
    tokens: dict[str, Tensor] | None = None
    states: TextStates | None = None
    vector: Tensor | None = None
    drop: Tensor | None = None


class WaveformNet(nn.Module):
    """All that is trained, as one network to average, shard and compile.

    Args:
        unet: `WaveformUNet1DModel`, or diffusers' `UNet1DModel`.
        text_encoder: trained encoder of texts; None for a frozen one elsewhere, or none.
        pooling: how the encoder makes one vector of a text, "first" or "mean".
    """

    sharding_needs = ShardingNeeds(cast_inputs=False)  # times and noisy sound lose too much in 16 bits

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.pooling: Pooling = pooling
        if text_encoder is not None:  # what is not used must not wait for a gradient
            for name, parameter in text_encoder.named_parameters():
                if "pooler" in name:
                    parameter.requires_grad_(False)

    def forward(self, inputs: NetworkInput) -> Tensor:
        """Predict the velocity.

        Args:
            inputs: noisy sound and its condition.

        Returns:
            (B, C, L) float32.
        """
        if not isinstance(self.unet, WaveformUNet1DModel):
            return _plain_velocity(self.unet, inputs.z, inputs.t)
        vector, states, mask = inputs.vector, None, None
        condition = inputs.states
        if inputs.tokens is not None:
            assert self.text_encoder is not None
            condition = encode(self.text_encoder, inputs.tokens, self.pooling)
        if condition is not None:
            vector = condition.vector if self.unet.uses_vector else None
            if self.unet.uses_tokens:
                states, mask = condition.states, condition.mask
        if inputs.drop is not None:
            vector, mask = self.unet.drop_condition(inputs.drop, vector, mask)
        velocity: Tensor = self.unet(inputs.z, inputs.t, vector, states, mask).sample
        return velocity


def _plain_velocity(unet: Any, z: Tensor, t: Tensor) -> Tensor:  # noqa: ANN401
    """Velocity by diffusers' network, which leaves it to the caller to pad and to choose the type."""
    unit = 2 ** len(unet.config.block_out_channels)
    length = z.shape[-1]
    padded = max(-(-length // unit), 3) * unit
    sample = pad(z, (0, padded - length)).to(next(unet.parameters()).dtype)
    velocity: Tensor = unet(sample, t).sample
    return velocity[..., :length].float()


def forward_flops(unet: Any, length: int) -> float:  # noqa: ANN401
    """Operations of the network for one clip, counted by running it without numbers.

    Args:
        unet: with a configuration of diffusers; sharded or not.
        length: L in samples.

    Returns:
        Additions and multiplications of convolutions, matrix products and attention, without those for a text.
    """
    kind: Any = WaveformUNet1DModel if isinstance(unet, WaveformUNet1DModel) else UNet1DModel
    with torch.device("meta"):
        empty = kind.from_config(unet.config)
        z, t = torch.zeros(1, unet.config.in_channels, length), torch.zeros(1)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        WaveformNet(empty)(NetworkInput(z, t))
    return float(counter.get_total_flops())
