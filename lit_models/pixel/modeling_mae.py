"""PIXEL: a vision transformer that reads strips of text and restores hidden patches of them.

Shapes: B strips, L patches of p·p·C values, K visible patches, d the width of the encoder. Weights have the names of
the official release, so its checkpoints load, and what is saved here loads there. The encoder is that of transformers'
`ViTModel`; its layers are written out here because transformers has renamed their weights within its fifth version.

Sources: PIXEL (arXiv 2207.06991), masked autoencoders (arXiv 2111.06377).
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import ModelOutput

from lit_models.nn.sharding import ShardingNeeds
from lit_models.pixel.functional import (
    ChannelMerge,
    merge_head_channels,
    merge_kernel_channels,
    patchify,
    pixel_targets,
    to_unit,
)
from lit_models.pixel.masking import Kept, keep_lowest, num_kept, random_keep, random_scores

Pooling: TypeAlias = Literal["mean", "max", "cls", "attention"]


class PIXELConfig(PretrainedConfig):
    """Sizes and options of PIXEL; the defaults are those of PIXEL-base.

    Args:
        hidden_size: width of the encoder.
        num_hidden_layers: layers of the encoder.
        num_attention_heads: attention heads of the encoder.
        intermediate_size: width of the encoder's feed-forward layers.
        hidden_act: activation of the feed-forward layers.
        hidden_dropout_prob: dropout after attention and feed-forward layers, and in the pooling head.
        attention_probs_dropout_prob: dropout on attention probabilities.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: added to variances in layer normalisation.
        image_size: height and greatest width of a strip, in pixels. Shorter strips take the first rows of the table of
            positions, as the official fine-tuning does.
        patch_size: side of a patch, in pixels.
        num_channels: 1 for grey and binary strips, 3 for coloured ones.
        qkv_bias: whether queries, keys and values have biases.
        decoder_hidden_size: width of the decoder.
        decoder_num_hidden_layers: layers of the decoder.
        decoder_num_attention_heads: attention heads of the decoder.
        decoder_intermediate_size: width of the decoder's feed-forward layers.
        mask_ratio: share of hidden patches in pre-training.
        norm_pix_loss: predict patches with mean 0 and variance 1 instead of plain pixels.
        learn_positions: train the encoder's table of positions, as the official fine-tuning does.
        pooling: how a classifier makes one vector of the patches: masked mean or maximum, the state of the class token,
            or a mean with learned weights.
        **kwargs: see `transformers.PretrainedConfig`.

    Raises:
        ValueError: if sizes do not fit together or a value is out of range.
    """

    model_type = "pixel"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        image_size: list[int] | tuple[int, int] = (16, 8464),
        patch_size: int = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 2048,
        mask_ratio: float = 0.25,
        norm_pix_loss: bool = True,
        learn_positions: bool = False,
        pooling: Pooling = "mean",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.hidden_act, self.qkv_bias = hidden_act, qkv_bias
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        self.image_size, self.patch_size, self.num_channels = list(image_size), patch_size, num_channels
        self.decoder_hidden_size, self.decoder_num_hidden_layers = decoder_hidden_size, decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = decoder_intermediate_size
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.learn_positions, self.pooling = learn_positions, pooling
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for prefix in ("", "decoder_"):
            width, heads = (getattr(self, f"{prefix}{name}") for name in ("hidden_size", "num_attention_heads"))
            if width % heads or width % 4:
                raise ValueError(
                    f"{prefix}hidden_size: {width} must be a multiple of 4 and of {prefix}num_attention_heads, {heads}"
                )
        if len(self.image_size) != 2 or self.image_size[0] != self.patch_size or self.image_size[1] % self.patch_size:
            raise ValueError(
                f"image_size: a strip is [patch_size, a multiple of it], here [{self.patch_size}, n * "
                f"{self.patch_size}], got {self.image_size}"
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")
        if self.pooling not in (names := ("mean", "max", "cls", "attention")):
            raise ValueError(f"pooling must be one of {', '.join(names)}, got {self.pooling!r}")

    @property
    def num_patches(self) -> int:
        """Patches of the longest strip."""
        return self.image_size[1] // self.patch_size

    def decoder(self) -> "PIXELConfig":
        """The same configuration with the sizes of the decoder in place of those of the encoder."""
        values = self.to_dict()
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return PIXELConfig(**values | {name: values[f"decoder_{name}"] for name in names})


@dataclass
class PIXELForPreTrainingOutput(ModelOutput):
    """What `PIXELForPreTraining` returns.

    Args:
        loss: float32 scalar, mean squared error over the patches of `targets`.
        logits: (B,L,p·p·C) predictions for all patches, in the order row, column, channel.
        mask: (B,L) float32, 1 where a patch was hidden.
        ids_restore: (B,L) int64, see `masking.Kept`.
        errors: (B,L) float32, mean squared error of each patch.
        targets: (B,L) bool, patches that count in the loss: those both hidden and attended.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    errors: Tensor | None = None
    targets: Tensor | None = None


def sincos_table(num_patches: int, width: int) -> Tensor:
    """Fixed positions of the class token and of the cells of a square grid.

    The strip fills the grid row by row, with side sqrt(L) rounded up; the first half of the channels tells the column,
    the second the row, each by sines, then cosines.

    Args:
        num_patches: L.
        width: channels, a multiple of 4.

    Returns:
        (1+L, width) float32; the class token has zeros.
    """
    side = next(side for side in range(1, num_patches + 1) if side * side >= num_patches)
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.arange(num_patches)
    angles = [place.double()[:, None] * frequencies for place in (places % side, places // side)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), table.float()])


class PIXELProjections(nn.Module):
    """Queries, keys and values."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias) for _ in range(3)
        )


class PIXELDense(nn.Module):
    """A linear layer under the name it has in checkpoints."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer."""
        return self.dense(hidden)


class PIXELAttention(nn.Module):
    """Attention of all patches to those with text."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.attention = PIXELProjections(config)
        self.output = PIXELDense(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        """Mix positions.

        Args:
            hidden: (B,T,d).
            attended: (B,1,1,T) bool, or None for all.

        Returns:
            (B,T,d).
        """
        layers = (self.attention.query, self.attention.key, self.attention.value)
        query, key, value = (layer(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attended, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class PIXELLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each after a layer normalisation and with a residual connection."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.attention = PIXELAttention(config)
        self.intermediate = PIXELDense(config.hidden_size, config.intermediate_size)
        self.output = PIXELDense(config.intermediate_size, config.hidden_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, attended: Tensor | None = None) -> Tensor:
        """Transform (B,T,d), attending to positions with `attended` (B,1,1,T), or to all."""
        hidden = hidden + self.dropout(self.attention(self.layernorm_before(hidden), attended))
        widened = self.activation(self.intermediate(self.layernorm_after(hidden)))
        return hidden + self.dropout(self.output(widened))


class PIXELEncoder(nn.Module):
    """The layers of the encoder."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(PIXELLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        """Apply the layers to (B,T,d)."""
        for layer in self.layer:
            hidden = layer(hidden, attended)
        return hidden


class PIXELPatchEmbeddings(nn.Module):
    """Linear map from patches to the width of the encoder."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        side = config.patch_size
        # Checkpoints hold a convolution kernel; a matrix product gives the same and embeds visible patches only.
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=side, stride=side)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches (B,K,p·p·C) in the order row, column, channel."""
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.projection.bias)


class PIXELEmbeddings(nn.Module):
    """Patch embeddings with positions, after a class token."""

    position_embeddings: Tensor

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = PIXELPatchEmbeddings(config)
        table = self.table(config)
        if config.learn_positions:
            self.position_embeddings = nn.Parameter(table)
        else:
            self.register_buffer("position_embeddings", table)

    @staticmethod
    def table(config: PIXELConfig) -> Tensor:
        """Initial positions, (1,1+L,d)."""
        return sincos_table(config.num_patches, config.hidden_size)[None]

    def forward(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Embed the visible patches.

        Args:
            patches: (B,L,p·p·C) float.
            ids_keep: (B,K) int64, or None for all.

        Returns:
            (B,1+K,d), the class token first.
        """
        positions = self.position_embeddings[:, : 1 + patches.shape[1]]
        of_class, of_patches = positions[:, :1], positions[:, 1:]
        if ids_keep is not None:
            patches = patches.take_along_dim(ids_keep[..., None], dim=1)
            of_patches = of_patches[0, ids_keep]
        embedded = self.patch_embeddings(patches) + of_patches
        return torch.cat([(self.cls_token + of_class).expand(len(patches), -1, -1), embedded], dim=1)


class PIXELDecoder(nn.Module):
    """Smaller transformer that predicts all patches from the visible ones."""

    decoder_pos_embed: Tensor

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", self.table(config))
        small = config.decoder()
        self.decoder_layers = nn.ModuleList(PIXELLayer(small) for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width)  # with the default epsilon of 1e-5, as released
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    @staticmethod
    def table(config: PIXELConfig) -> Tensor:
        """Fixed positions, (1,1+L,width)."""
        return sincos_table(config.num_patches, config.decoder_hidden_size)[None]

    def forward(self, hidden: Tensor, ids_restore: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Predict patches.

        Args:
            hidden: (B,1+K,d) of the encoder.
            ids_restore: (B,L) int64.
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.

        Returns:
            (B,L,p·p·C).
        """
        visible = self.decoder_embed(hidden)
        batch, total = ids_restore.shape
        hidden_patches = self.mask_token.to(visible.dtype).expand(batch, total + 1 - visible.shape[1], -1)
        patches = torch.cat([visible[:, 1:], hidden_patches], dim=1).take_along_dim(ids_restore[..., None], dim=1)
        states = torch.cat([visible[:, :1], patches], dim=1) + self.decoder_pos_embed[:, : total + 1]
        attended = with_class_token(pixel_mask)
        for layer in self.decoder_layers:
            states = layer(states, attended)
        return self.decoder_pred(self.decoder_norm(states))[:, 1:]


def with_class_token(pixel_mask: Tensor | None) -> Tensor | None:
    """Attention mask (B,1,1,1+K) bool of patches (B,K) after a class token, which is always attended."""
    return None if pixel_mask is None else F.pad(pixel_mask.bool(), (1, 0), value=True)[:, None, None]


class PIXELPreTrainedModel(PreTrainedModel):
    """What all PIXEL models share."""

    config: PIXELConfig
    config_class = PIXELConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["PIXELLayer"]  # noqa: RUF012
    sharding_needs = ShardingNeeds(units=("PIXELLayer",), cast_inputs=False)  # noise in 16 bits would have ties
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^pooler\.", r"^classifier\."]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint does not hold."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, PIXELEmbeddings):
            init.normal_(module.cls_token, std=std)
            init.copy_(module.position_embeddings, module.table(self.config))
        elif isinstance(module, PIXELDecoder):
            init.normal_(module.mask_token, std=std)
            init.copy_(module.decoder_pos_embed, module.table(self.config))

    @torch.no_grad()
    def merge_channels(self, mode: ChannelMerge = "mean") -> None:
        """Turn a model for coloured strips into one for grey ones, in place.

        Args:
            mode: see `functional.merge_kernel_channels`; the decoder predicts the mean of its channels.
        """
        old: Any = self.get_input_embeddings()
        old.projection.weight = nn.Parameter(merge_kernel_channels(old.projection.weight, mode))
        old.projection.in_channels = 1
        decoder = getattr(self, "decoder", None)
        if decoder is not None:
            head, channels = decoder.decoder_pred, self.config.num_channels
            head.weight = nn.Parameter(merge_head_channels(head.weight, channels))
            head.bias = nn.Parameter(merge_head_channels(head.bias, channels))
            head.out_features = len(head.bias)
        self.config.num_channels = 1

    def patches(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Cut strips into patches.

        Args:
            pixel_values: (B,C,H,W) uint8, or float in [0,1].
            pixel_mask: (B,L) or None.

        Returns:
            (B,L,p·p·C) float32 in [0,1], in the order row, column, channel.

        Raises:
            ValueError: if the strips have another size than the model takes.
        """
        check_strips(pixel_values, pixel_mask, self.config)
        return to_unit(patchify(pixel_values, self.config.patch_size))


def check_strips(pixel_values: Tensor, pixel_mask: Tensor | None, config: PIXELConfig) -> None:
    """Compare the shape of strips with the configuration.

    Raises:
        ValueError: names the key of the configuration and the option of the renderer that disagree.
    """
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values: strips have the shape (B,C,H,W), got {tuple(pixel_values.shape)}")
    batch, channels, height, width = pixel_values.shape
    side = config.patch_size
    if channels != config.num_channels:
        raise ValueError(
            f"num_channels: the model takes {config.num_channels}, but strips have {channels}; set the renderer's "
            f"colour to {'rgb' if config.num_channels == 3 else 'gray'}, or num_channels of the model to {channels}"
        )
    if height != side or width % side:
        raise ValueError(
            f"image_size: the model takes strips of height {side} and a multiple of it as width, but they are {height} "
            f"x {width}; set the renderer's patch_size to {side}, or image_size and patch_size of the model"
        )
    length = width // side
    if length > config.num_patches:
        raise ValueError(
            f"image_size: the model has positions for {config.num_patches} patches, but strips have {length}; set the "
            f"renderer's max_seq_length to {config.num_patches}, or image_size of the model to [{side}, {width}]"
        )
    if pixel_mask is not None and pixel_mask.shape != (batch, length):
        raise ValueError(
            f"pixel_mask: {batch} strips of {length} patches need the shape {(batch, length)}, "
            f"got {tuple(pixel_mask.shape)}"
        )


class PIXELModel(PIXELPreTrainedModel):
    """The encoder."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__(config)
        self.embeddings = PIXELEmbeddings(config)
        self.encoder = PIXELEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.embeddings.patch_embeddings

    def encode(self, patches: Tensor, pixel_mask: Tensor | None, ids_keep: Tensor | None = None) -> Tensor:
        """Encode the visible patches.

        Args:
            patches: (B,L,p·p·C) in [0,1].
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.
            ids_keep: (B,K) int64, or None for all.

        Returns:
            (B,1+K,d), the class token first.
        """
        if pixel_mask is not None and ids_keep is not None:
            pixel_mask = pixel_mask.gather(1, ids_keep)
        hidden = self.encoder(self.embeddings(patches, ids_keep), with_class_token(pixel_mask))
        return self.layernorm(hidden)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> BaseModelOutput:
        """Encode whole strips.

        Args:
            pixel_values: (B,C,H,W) uint8, or float in [0,1].
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.

        Returns:
            `last_hidden_state` (B,1+L,d), the class token first.

        Raises:
            ValueError: if the strips have another size than the model takes.
        """
        return BaseModelOutput(last_hidden_state=self.encode(self.patches(pixel_values, pixel_mask), pixel_mask))


class PIXELForPreTraining(PIXELPreTrainedModel):
    """Encoder and decoder, trained to restore hidden patches."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__(config)
        self.vit = PIXELModel(config)
        self.decoder = PIXELDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.vit.get_input_embeddings()

    def choose(self, pixel_mask: Tensor, patch_mask: Tensor | None, noise: Tensor | None) -> Kept:
        """Choose the visible patches.

        Args:
            pixel_mask: (B,L), 1 where a patch is attended.
            patch_mask: (B,L), 1 where a patch is to be hidden, or None to hide any.
            noise: (B,L) float32, uniform in [0, 1), which decides what the mask leaves open; drawn if None.

        Returns:
            The choice.
        """
        noise = torch.rand(pixel_mask.shape, device=pixel_mask.device) if noise is None else noise
        keep = num_kept(pixel_mask.shape[1], self.config.mask_ratio)
        if patch_mask is None:
            return keep_lowest(random_scores(pixel_mask, noise), keep)
        return random_keep(patch_mask, noise, keep)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PIXELForPreTrainingOutput:
        """Hide patches and predict them.

        Target and loss are computed in float32 whatever the type of the weights.

        Args:
            pixel_values: (B,C,H,W) uint8, or float in [0,1].
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.
            patch_mask: see `choose`.
            noise: see `choose`.

        Returns:
            Predictions, masks and loss.

        Raises:
            ValueError: if the strips have another size than the model takes.
        """
        patches = self.patches(pixel_values, pixel_mask)
        attended = torch.ones_like(patches[..., 0]) if pixel_mask is None else pixel_mask
        ids_keep, mask, ids_restore = self.choose(attended, patch_mask, noise)
        hidden = self.vit.encode(patches, pixel_mask, ids_keep)
        pred = self.decoder(hidden, ids_restore, pixel_mask)
        errors = (pred.float() - pixel_targets(patches, self.config.norm_pix_loss)).square().mean(-1)
        targets = mask.bool() & attended.bool()
        loss = torch.where(targets, errors, 0.0).sum() / targets.sum().clamp(min=1)
        return PIXELForPreTrainingOutput(
            loss=loss, logits=pred, mask=mask, ids_restore=ids_restore, errors=errors, targets=targets
        )


class PIXELPooler(nn.Module):
    """Head that makes one vector of the states of a strip.

    Args:
        config: names the pooling.
    """

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__()
        self.pooling: Pooling = config.pooling
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.ln = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if self.pooling == "attention":
            self.weights = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Pool the states.

        Args:
            hidden: (B,1+L,d), the class token first.
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.

        Returns:
            (B,d).
        """
        hidden = hidden[:, :1] if self.pooling == "cls" else hidden[:, 1:]
        states: Tensor = self.dropout(self.ln(F.gelu(self.linear(hidden))))
        if self.pooling == "cls":
            return states[:, 0]
        attended = torch.ones_like(states[..., :1]) if pixel_mask is None else pixel_mask[..., None]
        if self.pooling == "max":
            return states.masked_fill(attended == 0, -torch.inf).amax(1)
        if self.pooling == "attention":
            scores = self.weights(states).float().masked_fill(attended == 0, -torch.inf)
            return (scores.softmax(1).to(states.dtype) * states).sum(1)
        attended = attended.to(states.dtype)
        return (states * attended).sum(1) / attended.sum(1).clamp(min=1)


class PIXELForSequenceClassification(PIXELPreTrainedModel):
    """Encoder with a pooling head and a linear layer to labels.

    Fine-tuned models of the release with mean or maximum pooling load; those that pool the class token or by attention
    have other layers there.
    """

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__(config)
        self.vit = PIXELModel(config)
        self.pooler = PIXELPooler(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.vit.get_input_embeddings()

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, label: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Classify strips.

        Args:
            pixel_values: (B,C,H,W) uint8, or float in [0,1].
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.
            label: (B,) int64 classes; or, with one output, (B,) numbers, which are fitted by the squared error.

        Returns:
            `logits` (B,labels) float32 and, with labels, `loss`, a float32 scalar.

        Raises:
            ValueError: if the strips have another size than the model takes.
        """
        hidden = self.vit(pixel_values, pixel_mask).last_hidden_state
        logits = self.classifier(self.pooler(hidden, pixel_mask)).float()
        loss = None
        if label is not None:
            one = self.config.num_labels == 1
            loss = F.mse_loss(logits.squeeze(1), label.float()) if one else F.cross_entropy(logits, label)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class PIXELForTokenClassification(PIXELPreTrainedModel):
    """Encoder with a linear layer that tags words by the state at one patch of each."""

    def __init__(self, config: PIXELConfig) -> None:
        super().__init__(config)
        self.vit = PIXELModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.vit.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        word_patches: Tensor,
        pixel_mask: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Tag words.

        Args:
            pixel_values: (B,C,H,W) uint8, or float in [0,1].
            word_patches: (B,N) int64, the patch whose state stands for a word; a negative one is padding.
            pixel_mask: (B,L), 1 where a patch is attended, or None for all.
            tags: (B,N) int64, -100 where they do not count.

        Returns:
            `logits` (B,N,labels) float32 and, with tags, `loss`, a float32 scalar.

        Raises:
            ValueError: if the strips have another size than the model takes.
        """
        states = self.vit(pixel_values, pixel_mask).last_hidden_state[:, 1:]
        states = states.take_along_dim(word_patches.clamp(min=0)[..., None], dim=1)
        logits = self.classifier(self.dropout(states)).float()
        loss = None
        if tags is not None:
            total = F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-100, reduction="sum")
            loss = total / (tags != -100).sum().clamp(min=1)
        return TokenClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(PIXELConfig.model_type, PIXELConfig, exist_ok=True)
AutoModel.register(PIXELConfig, PIXELModel, exist_ok=True)
AutoModelForPreTraining.register(PIXELConfig, PIXELForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(PIXELConfig, PIXELForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(PIXELConfig, PIXELForTokenClassification, exist_ok=True)
