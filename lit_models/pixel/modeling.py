"""Networks of pixel language models: a Llama that reads strips of pixels, tokens, or both of the same text.

`PixelForCausalLM` is PixelGPT, TextGPT, MonoGPT or DualGPT, which differ in the data they saw and not in the network.
The names of the weights are those of the released checkpoints. Importing this module registers the classes with the
Auto classes of transformers.

Shapes: B rows, C channels, p pixels per side of a patch, L patches, T tokens, V vocabulary entries, d the width of the
trunk, K = p·p·C, N the length of the sequence that the trunk sees.
Source: arXiv 2404.10710 and its released code, whose pair mode and pooling are repaired here.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from lit_models._ranks import warn
from lit_models.pixel import functional
from lit_models.pixel.configuration import PairOrder, PixelLMConfig
from lit_models.pixel.generation import PixelGeneration

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""Name of the argument that takes keys and values; transformers renamed it."""
LANGUAGE_MODEL_HEADS = [r"^lm_(token|pixel|stop)_head\."]
"""Weights that a classifier has no use for."""


@dataclass
class PixelTrunkOutput(ModelOutput):
    """What the trunk returns.

    States are those after the final norm, and without meaning where the mask of their segment is 0.

    Args:
        pixel_states: (B, L, d).
        text_states: (B, T, d).
        patches: (B, L, K) float32 in [0, 1].
        text_first: (B,) bool, rows of a pair whose tokens come before the patches; None if there is no such row.
        attention_mask: (B, N) int64, mask of the sequence that the trunk saw.
        hidden_states: embeddings and the output of every layer, each (B, N, d), if asked for; the last one is normed.
        cache: keys and values, if asked for.
    """

    pixel_states: Tensor | None = None
    text_states: Tensor | None = None
    patches: Tensor | None = None
    text_first: Tensor | None = None
    attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cache: Any = None


@dataclass
class PixelLMOutput(ModelOutput):
    """What `PixelForCausalLM` returns; what the input does not ask for is None.

    Args:
        loss: () float32, the weighted sum of the losses below.
        loss_npp: () float32, mean over the predicted patches of the batch.
        loss_ntp: () float32, mean over the predicted tokens of the batch.
        loss_stop: () float32, mean over the predicted patches of the batch.
        npp_sum: () float32, sum behind `loss_npp`.
        npp_count: () float32, number of predicted patches.
        ntp_sum: () float32, sum behind `loss_ntp`.
        ntp_count: () float32, number of predicted tokens.
        stop_sum: () float32, sum behind `loss_stop`.
        pixel_pred: (B, L, K); entry i is about patch i+1: normalised or plain pixels, or logits with `pixel_loss: bce`.
        logits: (B, T, V).
        stop_logits: (B, L); entry i is about patch i+1.
        pixel_states: (B, L, d), states after the final norm.
        text_states: (B, T, d), states after the final norm.
        patches: (B, L, K) float32 in [0, 1].
        attention_mask: (B, N) int64, mask of the sequence that the trunk saw.
        hidden_states: embeddings and the output of every layer, each (B, N, d), if asked for.
        cache: keys and values, if asked for.
    """

    loss: Tensor | None = None
    loss_npp: Tensor | None = None
    loss_ntp: Tensor | None = None
    loss_stop: Tensor | None = None
    npp_sum: Tensor | None = None
    npp_count: Tensor | None = None
    ntp_sum: Tensor | None = None
    ntp_count: Tensor | None = None
    stop_sum: Tensor | None = None
    pixel_pred: Tensor | None = None
    logits: Tensor | None = None
    stop_logits: Tensor | None = None
    pixel_states: Tensor | None = None
    text_states: Tensor | None = None
    patches: Tensor | None = None
    attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cache: Any = None


@dataclass
class PixelTaskOutput(ModelOutput):
    """What the classifier and the tagger return.

    Args:
        loss: () float32, if labels were given.
        logits: (B, labels) or, for tags, (B, N, labels); float32.
        states: (B, d) or (B, N, d), what the head read.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


class PatchEmbeddings(nn.Module):
    """Linear map of each patch, and a layer norm.

    The map is stored as the kernel of a convolution, like the released weights, but computed as one matrix product.

    Args:
        config: options.
    """

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, side, stride=side)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches.

        Args:
            patches: (B, L, K) in [0, 1].

        Returns:
            (B, L, d).
        """
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # to the order (row, column, channel)
        embedded: Tensor = self.norm(linear(patches.to(weight.dtype), weight, self.projection.bias))
        return embedded


class PixelEmbeddings(nn.Module):
    """Holds the patch embedding under its released name.

    Args:
        config: options.
    """

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches; see `PatchEmbeddings.forward`."""
        embedded: Tensor = self.patch_embeddings(patches)
        return embedded


class PixelPreTrainedModel(LlamaPreTrainedModel):
    """What all networks here share: initialisation, and loading of weights with other channels or without heads."""

    config: PixelLMConfig
    config_class = PixelLMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            inputs = module.weight[0].numel()
            bound = (6 / (inputs + module.out_channels)) ** 0.5  # Xavier for the kernel as a matrix
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -(inputs**-0.5), inputs**-0.5)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
        resize_channels: functional.ChannelMerge | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load weights by the names of the released checkpoints.

        Args:
            pretrained_model_name_or_path: hub id or folder.
            *args: see `PreTrainedModel.from_pretrained`.
            resize_channels: how the kernel of colour weights becomes one for grey strips, "mean" or "sum"; used if
                `num_channels=1` is given too and the weights have 3.
            **kwargs: see `PreTrainedModel.from_pretrained`.

        Returns:
            The model in evaluation mode; with `output_loading_info`, also what was missing.

        Raises:
            ValueError: if the weights have other channels than asked for, and `resize_channels` can't help.

        Warns:
            UserWarning: if the weights lack a part of the network, which then starts untrained; not about the new head
                of a classifier or tagger, which is expected.
        """
        channels = kwargs.pop("num_channels", None)
        wants_info = kwargs.pop("output_loading_info", False)
        load: Any = super().from_pretrained
        model, info = load(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted({key.rpartition(".")[0] for key in info["missing_keys"]} - {"score"})
        if missing:
            warn(
                f"{pretrained_model_name_or_path} has no weights for {', '.join(missing)}, which therefore start "
                "untrained; train them before use",
                stacklevel=2,
            )
        if channels not in (None, model.config.num_channels):
            if resize_channels is None or channels != 1:
                raise ValueError(
                    f"num_channels: the weights of {pretrained_model_name_or_path} have {model.config.num_channels} "
                    f"channels, not {channels}; 3 become 1 with resize_channels mean or sum"
                )
            model.merge_channels(resize_channels)
        return (model, info) if wants_info else model

    @torch.no_grad()
    def merge_channels(self, mode: functional.ChannelMerge = "mean") -> None:
        """Turn a network for colour strips into one for grey strips, in place.

        Args:
            mode: see `functional.merge_kernel_channels`; a pixel head always predicts the mean of its channels.
        """
        projection: Any = self.base_model.get_submodule("embed_patches.patch_embeddings.projection")
        projection.weight = nn.Parameter(functional.merge_kernel_channels(projection.weight, mode))
        projection.in_channels = 1
        head: Any = getattr(self, "lm_pixel_head", None)
        if head is not None:
            head.weight = nn.Parameter(functional.merge_head_channels(head.weight, self.config.num_channels))
            head.out_features = len(head.weight)
        self.config.num_channels = 1


class PixelLMModel(PixelPreTrainedModel, LlamaModel):
    """The trunk: a Llama with an embedding of patches beside that of tokens.

    Args:
        config: options.
    """

    def __init__(self, config: PixelLMConfig) -> None:
        config.check()
        super().__init__(config)
        # A plain table: with a padding index, the end of text, which is the padding too, would never be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_patches = PixelEmbeddings(config)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        pair_order: PairOrder | None = None,
        generator: torch.Generator | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,  # noqa: ANN401
        use_cache: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> PixelTrunkOutput:
        """Read strips, tokens, or pairs of both, depending on which are given.

        Args:
            pixel_values: (B, C, H, L·p), uint8 with white 255, or floating with white 1.
            pixel_mask: (B, L), all ones by default.
            input_ids: (B, T) int64.
            attention_mask: (B, T), all ones by default.
            document_ids: (B, L) int64, -1 at padding: documents that share a strip and do not see each other.
            pair_order: replaces the one of the configuration.
            generator: draws the order "random" in training, on the generator's device; torch's default one if None.
                Outside training images come first.
            position_ids: (B, N), positions of what is given; by default they follow those of the cache.
            cache: keys and values of what came before; the masks then cover that too, in its columns.
            use_cache: whether to return keys and values.
            **kwargs: see `LlamaModel.forward`, for example `output_hidden_states`.

        Returns:
            The states.

        Raises:
            ValueError: if neither input is given, or their shapes don't fit each other or the configuration.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("neither pixel_values nor input_ids is given; give one of them, or both for pairs")
        past = 0 if cache is None else cache.get_seq_length()
        patches = pixels = tokens = None
        if pixel_values is not None:
            patches = self._patches(pixel_values)
            pixels = self.embed_patches(patches)
            pixel_mask = _checked_mask("pixel_mask", pixel_mask, pixels, past)
        if input_ids is not None:
            tokens = self.embed_tokens(input_ids)
            attention_mask = _checked_mask("attention_mask", attention_mask, tokens, past)
        if document_ids is not None and (pixels is None or tokens is not None or cache is not None):
            raise ValueError("document_ids belong to strips that are packed without tokens; leave them out here")

        text_first = place = None
        right_padded = False
        if pixels is None or tokens is None:
            embeds, mask = (tokens, attention_mask) if pixels is None else (pixels, pixel_mask)
        elif cache is not None or len(pixels) != len(tokens):
            raise ValueError(
                f"a pair needs as many strips as rows of input_ids and no cache, got {len(pixels)} and {len(tokens)}"
            )
        else:
            assert pixel_mask is not None
            assert attention_mask is not None
            text_first = self._text_first(pair_order or self.config.pair_order, pixels, generator)
            embeds, mask, place = self._join(pixels, pixel_mask, tokens, attention_mask, text_first)
            right_padded = self.config.pair_layout == "compact"

        assert embeds is not None
        assert mask is not None
        if past + embeds.shape[1] > self.config.max_position_embeddings:
            warn(
                f"a sequence of {past + embeds.shape[1]} positions is longer than config.max_position_embeddings "
                f"({self.config.max_position_embeddings}); the rotary embedding goes on, untrained there",
                stacklevel=2,
            )
        output = super().forward(
            inputs_embeds=embeds,
            attention_mask=self._attention(mask, right_padded, document_ids, cache),
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        hidden = output.last_hidden_state
        if pixels is None or tokens is None:
            states = {"text_states" if pixels is None else "pixel_states": hidden}
        else:
            if place is not None:
                hidden = _take(hidden, place.clamp(max=hidden.shape[1] - 1))
            length = pixels.shape[1]
            states = {"pixel_states": hidden[:, :length], "text_states": hidden[:, length:]}
        return PixelTrunkOutput(
            **states,
            patches=patches,
            text_first=text_first,
            attention_mask=mask,
            hidden_states=output.hidden_states,
            cache=getattr(output, CACHE),
        )

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """(B, L, K) float32 in [0, 1]."""
        _, channels, height, width = pixel_values.shape
        config = self.config
        if channels != config.num_channels:
            raise ValueError(
                f"num_channels: pixel_values have {channels} channels and the model {config.num_channels}; set "
                f"num_channels to {channels}, or the renderer's colour to {'rgb' if channels == 1 else 'gray'}"
            )
        if height != config.image_size[0] or height % config.patch_size:
            raise ValueError(
                f"image_size: pixel_values are {height} pixels high and the model reads {config.image_size[0]} with "
                f"patch_size {config.patch_size}; give the renderer the same patch_size"
            )
        if width % config.patch_size:
            raise ValueError(
                f"patch_size: pixel_values are {width} pixels wide, not a multiple of {config.patch_size}; give the "
                "renderer the same patch_size"
            )
        return functional.to_unit(functional.patchify(pixel_values, config.patch_size))

    def _text_first(self, order: PairOrder, pixels: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """(B,) bool, or None if images come first in all rows."""
        if order == "text_image":
            return torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        if order == "image_text" or not self.training:
            return None
        device = "cpu" if generator is None else generator.device
        return (torch.rand(len(pixels), generator=generator, device=device) < 0.5).to(pixels.device)

    def _join(
        self, pixels: Tensor, pixel_mask: Tensor, tokens: Tensor, text_mask: Tensor, text_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sequence (B, N, d) of patches and tokens, its mask, and the place of each patch and token in it."""
        embeds = torch.cat([pixels, tokens], 1)
        mask = torch.cat([pixel_mask, text_mask], 1)
        compact = self.config.pair_layout == "compact"
        if not compact and text_first is None:
            return embeds, mask, None
        order, place = functional.pair_sequence(pixel_mask, text_mask, compact, text_first)
        if compact:
            order = order[:, : int(mask.sum(1).max())]
        return _take(embeds, order), mask.gather(1, order), place

    def _attention(
        self,
        mask: Tensor,
        right_padded: bool,
        document_ids: Tensor | None,
        cache: Any,  # noqa: ANN401
    ) -> Tensor | None:
        """What the trunk needs beside causality: nothing where padding is on the right, which no patch or token sees.

        Without a mask, attention runs in the fast causal kernels. Flash attention leaves padding out by the mask.
        """
        kind = self.config._attn_implementation or "eager"
        if document_ids is not None:
            if kind not in ("sdpa", "eager"):
                raise ValueError(f"attn: packed strips need sdpa or eager attention, not {kind}")
            if document_ids.shape != mask.shape:
                raise ValueError(
                    f"document_ids have shape {tuple(document_ids.shape)}, but there are {mask.shape[1]} patches in "
                    f"{len(mask)} strips"
                )
            allowed = functional.document_mask(document_ids.masked_fill(mask == 0, -1))
            return allowed if kind == "sdpa" else torch.where(allowed, 0.0, torch.finfo(self.dtype).min).to(self.dtype)
        if cache is not None or "flash" in kind:
            return mask
        if not right_padded and not torch.compiler.is_compiling():  # the answer is known to the host only at run time
            right_padded = bool(functional.is_right_padded(mask))
        return None if right_padded else mask


class PixelForCausalLM(PixelPreTrainedModel, PixelGeneration):
    """Predicts the next patch and the next token.

    Args:
        config: options.
    """

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        self.model = PixelLMModel(config)
        self.lm_token_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_pixel_head = nn.Linear(config.hidden_size, config.patch_values, bias=False)
        self.lm_stop_head = nn.Linear(config.hidden_size, 1) if config.stop_head else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The token head."""
        return self.lm_token_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the token head."""
        self.lm_token_head = new_embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        pair_order: PairOrder | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> PixelLMOutput:
        """Predict, and compare with the input.

        The loss is `pixel_weight` · next-patch + `text_weight` · next-token (+ `stop_weight` · stop), each a mean over
        the batch, of those that the input allows. Patches never predict tokens, nor tokens patches.

        Args:
            pixel_values: see `PixelLMModel.forward`.
            pixel_mask: see there.
            input_ids: see there.
            attention_mask: see there.
            labels: (B, T) int64, the tokens themselves, -100 where they don't count; padding never counts.
            document_ids: see `PixelLMModel.forward`.
            pair_order: see there.
            generator: see there.
            return_loss: whether losses are computed.
            **kwargs: see there.

        Returns:
            Predictions and losses.

        Raises:
            ValueError: see `PixelLMModel.forward`; or if labels don't have the shape of `input_ids`.
        """
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise ValueError("labels must have the shape of input_ids")
        trunk = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            document_ids=document_ids,
            pair_order=pair_order,
            generator=generator,
            **kwargs,
        )
        values: dict[str, Any] = {}
        losses: list[tuple[float, Tensor]] = []
        if trunk.pixel_states is not None:
            values["pixel_pred"] = self.lm_pixel_head(trunk.pixel_states)
            if self.lm_stop_head is not None:
                values["stop_logits"] = self.lm_stop_head(trunk.pixel_states).squeeze(-1)
            if return_loss:
                losses += self._pixel_losses(trunk.patches, pixel_mask, document_ids, values)
        if trunk.text_states is not None:
            values["logits"] = self.lm_token_head(trunk.text_states)
            if return_loss and labels is not None:
                if attention_mask is not None:
                    labels = labels.masked_fill(attention_mask == 0, -100)
                loss = functional.ntp_loss(values["logits"], labels)
                values |= {"loss_ntp": loss.mean, "ntp_sum": loss.total, "ntp_count": loss.number}
                losses.append((self.config.text_weight, loss.mean))
        return PixelLMOutput(
            loss=torch.stack([weight * loss for weight, loss in losses]).sum() if losses else None,
            **values,
            pixel_states=trunk.pixel_states,
            text_states=trunk.text_states,
            patches=trunk.patches,
            attention_mask=trunk.attention_mask,
            hidden_states=trunk.hidden_states,
            cache=trunk.cache,
        )

    def _pixel_losses(
        self, patches: Tensor | None, mask: Tensor | None, document_ids: Tensor | None, values: dict[str, Any]
    ) -> list[tuple[float, Tensor]]:
        """Weights and losses on patches; their parts are added to `values`, which hold the predictions."""
        assert patches is not None
        config = self.config
        mask = patches.new_ones(patches.shape[:2]) if mask is None else mask
        counted = functional.target_mask(mask, document_ids)
        target = functional.pixel_targets(patches, config.norm_pix_loss)
        loss = functional.npp_loss(values["pixel_pred"], target, counted, config.pixel_loss)
        values |= {"loss_npp": loss.mean, "npp_sum": loss.total, "npp_count": loss.number}
        losses = [(config.pixel_weight, loss.mean)]
        if "stop_logits" in values:
            loss = functional.stop_loss(values["stop_logits"], patches, counted)
            values |= {"loss_stop": loss.mean, "stop_sum": loss.total}
            losses.append((config.stop_weight, loss.mean))
        return losses


class PixelForSequenceClassification(PixelPreTrainedModel):
    """Classifies, or rates with one label, by the state at the last attended position.

    Args:
        config: options; `num_labels` outputs.
    """

    _keys_to_ignore_on_load_unexpected = LANGUAGE_MODEL_HEADS

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        self.model = PixelLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 2, bias=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        label: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> PixelTaskOutput:
        """Classify strips, tokens, or pairs.

        Args:
            pixel_values: see `PixelLMModel.forward`.
            pixel_mask: see there.
            input_ids: see there.
            attention_mask: see there.
            label: (B,) int64 classes; or, with one label, (B,) numbers, which are fitted by the squared error.
            **kwargs: see there.

        Returns:
            Logits (B, labels), the pooled states, and the mean loss if labels are given.
        """
        trunk = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
        states = self._pool(trunk, pixel_mask, input_ids, attention_mask)
        logits = self.score(states).float()
        loss = None
        if label is not None:
            one = self.config.num_labels == 1
            loss = mse_loss(logits.squeeze(-1), label.float()) if one else cross_entropy(logits, label)
        return PixelTaskOutput(loss=loss, logits=logits, states=states)

    def _pool(
        self, trunk: PixelTrunkOutput, pixel_mask: Tensor | None, input_ids: Tensor | None, text_mask: Tensor | None
    ) -> Tensor:
        """States (B, d) at the last attended position."""
        pixels, text = trunk.pixel_states, trunk.text_states
        if pixels is not None and text is not None and self.config.pooling == "official":
            assert input_ids is not None
            pad = self.config.pad_token_id
            if pad is None:
                raise ValueError("pooling: official finds padding by pad_token_id, which is not set")
            position = functional.official_pair_position(input_ids, pad, pixels.shape[1])
            return _take(torch.cat([pixels, text], 1), position[:, None]).squeeze(1)
        if text is None:
            assert pixels is not None
            return _last(pixels, pixel_mask)
        if pixels is None or trunk.text_first is None:
            return _last(text, text_mask)
        return torch.where(trunk.text_first[:, None], _last(pixels, pixel_mask), _last(text, text_mask))


class PixelForTokenClassification(PixelPreTrainedModel):
    """Tags the words of a strip by the state at one patch of each.

    Args:
        config: options; `num_labels` tags.
    """

    _keys_to_ignore_on_load_unexpected = LANGUAGE_MODEL_HEADS

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__(config)
        self.model = PixelLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 2, bias=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        word_patches: Tensor,
        pixel_mask: Tensor | None = None,
        tags: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> PixelTaskOutput:
        """Tag words.

        Args:
            pixel_values: see `PixelLMModel.forward`.
            word_patches: (B, N) int64, patch whose state stands for the word; a negative one is padding. The trunk is
                causal, so that the last patch of a word has seen all of it and the first has not.
            pixel_mask: see `PixelLMModel.forward`.
            tags: (B, N) int64, -100 where they don't count.
            **kwargs: see there.

        Returns:
            Logits (B, N, labels), the states behind them, and the mean loss over all tags if these are given.
        """
        trunk = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, **kwargs)
        states = _take(trunk.pixel_states, word_patches.clamp(min=0))
        logits = self.score(states).float()
        loss = None
        if tags is not None:
            total = cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-100, reduction="sum")
            loss = total / (tags != -100).sum().clamp(min=1)
        return PixelTaskOutput(loss=loss, logits=logits, states=states)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, N, d) at (B, M) positions: (B, M, d)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _last(states: Tensor, mask: Tensor | None) -> Tensor:
    """States (B, d) at the last attended position of a segment."""
    if mask is None:
        return states[:, -1]
    return _take(states, functional.last_position(mask)[:, None]).squeeze(1)


def _checked_mask(name: str, mask: Tensor | None, embeds: Tensor, past: int) -> Tensor:
    """The mask as int64, ones by default.

    Raises:
        ValueError: if it has another shape than the embeddings, with cached positions in front.
    """
    shape = (embeds.shape[0], past + embeds.shape[1])
    if mask is None:
        return torch.ones(shape, dtype=torch.long, device=embeds.device)
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but its input needs {shape}")
    return mask.long()


AutoConfig.register(PixelLMConfig.model_type, PixelLMConfig, exist_ok=True)
AutoModel.register(PixelLMConfig, PixelLMModel, exist_ok=True)
AutoModelForCausalLM.register(PixelLMConfig, PixelForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(PixelLMConfig, PixelForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(PixelLMConfig, PixelForTokenClassification, exist_ok=True)
