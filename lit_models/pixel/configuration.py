"""Configuration of pixel language models."""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from typing import Any, Literal, get_args

from transformers import LlamaConfig

from lit_models.pixel.functional import PixelLoss

PairLayout = Literal["compact", "padded"]
PairOrder = Literal["image_text", "text_image", "random"]
Pooling = Literal["last", "official"]

CHOICES = {"pixel_loss": PixelLoss, "pair_layout": PairLayout, "pair_order": PairOrder, "pooling": Pooling}


class PixelLMConfig(LlamaConfig):
    """Options of a Llama that reads strips of pixels, tokens, or both.

    The defaults are those of PixelGPT (arXiv 2404.10710). Its released `config.json` loads, and as a file or dict of
    another `model_type` gives the padded layout that those weights were trained with; `rope_theta` may be given and
    read as there, and is saved in `rope_parameters` as transformers does.

    Args:
        image_size: height of a strip and its usual width in pixels; strips of any width are accepted.
        patch_size: side of a patch in pixels.
        num_channels: 1 for grey and binary strips, 3 for colour.
        norm_pix_loss: whether patches are predicted without their mean and contrast.
        pixel_loss: "mse", "smooth_l1", or "bce" for binary strips, which needs `norm_pix_loss: false`.
        pixel_weight: weight of the loss of next-patch prediction.
        text_weight: weight of the loss of next-token prediction.
        pair_layout: "compact" takes padding out between patches and tokens; "padded" counts it in the positions, as the
            released models do.
        pair_order: which of the two comes first; "random" draws it per row in training.
        stop_head: whether a third head tells when the next patch is the separator.
        stop_weight: weight of its loss.
        pooling: state that a classifier reads: "last" is the last attended one; "official" repeats the position of the
            released code in pairs, which is wrong for rows without padding.
        vocab_size: number of tokens.
        hidden_size: width of the trunk.
        intermediate_size: width of its feed-forward layers.
        num_hidden_layers: number of its layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads.
        max_position_embeddings: length the model was trained with; longer sequences run with a warning.
        rms_norm_eps: see `LlamaConfig`.
        pad_token_id: fills rows of tokens after their end.
        bos_token_id: opens every text.
        eos_token_id: closes it.
        rope_theta: base of the rotary embedding; by default that of `rope_parameters`, or 10000.
        **kwargs: other options of `LlamaConfig`.

    Raises:
        ValueError: if a value is out of its range or contradicts another, naming it.
    """

    model_type = "pixel_lm"

    def __init__(
        self,
        image_size: list[int] | tuple[int, int] = (16, 16384),
        patch_size: int = 16,
        num_channels: int = 3,
        norm_pix_loss: bool = True,
        pixel_loss: PixelLoss = "mse",
        pixel_weight: float = 1.0,
        text_weight: float = 1.0,
        pair_layout: PairLayout = "compact",
        pair_order: PairOrder = "image_text",
        stop_head: bool = False,
        stop_weight: float = 1.0,
        pooling: Pooling = "last",
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 8,
        max_position_embeddings: int = 1024,
        rms_norm_eps: float = 1e-5,
        pad_token_id: int | None = 2,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        rope_theta: float | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.norm_pix_loss = norm_pix_loss
        self.pixel_loss = pixel_loss
        self.pixel_weight = pixel_weight
        self.text_weight = text_weight
        self.pair_layout = pair_layout
        self.pair_order = pair_order
        self.stop_head = stop_head
        self.stop_weight = stop_weight
        self.pooling = pooling
        if rope_theta is not None:  # transformers would let the saved value win over the one given
            kwargs["rope_parameters"] = (kwargs.get("rope_parameters") or {}) | {"rope_theta": rope_theta}
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=rms_norm_eps,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Read a saved configuration.

        Args:
            config_dict: content of a `config.json`, ours or a released one.
            **kwargs: see `PreTrainedConfig.from_dict`.

        Returns:
            The configuration; with `return_unused_kwargs`, also what is not an option.
        """
        if config_dict.get("model_type") != cls.model_type:  # ours leave out what is the default
            config_dict = {"pair_layout": "padded"} | config_dict
        return super().from_dict(config_dict, **kwargs)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding."""
        parameters = self.__dict__.get("rope_parameters") or {}
        if "rope_theta" not in parameters:  # transformers asks while it fills in the default
            raise AttributeError("rope_theta is not known yet")
        return float(parameters["rope_theta"])

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = (self.rope_parameters or {}) | {"rope_theta": value}

    @property
    def patch_values(self) -> int:
        """Number of values of a patch."""
        return self.patch_size**2 * self.num_channels

    def check(self) -> None:
        """Check what this class adds; models call it, since options may be set after construction.

        Raises:
            ValueError: naming the option.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if self.patch_size < 2 or self.num_channels not in (1, 3):
            raise ValueError(
                f"patch_size must be at least 2 and num_channels 1 or 3, got {self.patch_size} and {self.num_channels}"
            )
        if len(self.image_size) != 2 or any(side < 1 or side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size must be the height and width of a strip in multiples of patch_size {self.patch_size}, "
                f"got {self.image_size}"
            )
        if self.pixel_loss == "bce" and self.norm_pix_loss:
            raise ValueError("pixel_loss: bce predicts plain pixels; set norm_pix_loss to false")
        if min(self.pixel_weight, self.text_weight, self.stop_weight) < 0:
            raise ValueError(
                "pixel_weight, text_weight and stop_weight must not be negative, got "
                f"{self.pixel_weight}, {self.text_weight} and {self.stop_weight}"
            )
        if self.pooling == "official" and (self.pair_layout, self.pair_order) != ("padded", "image_text"):
            raise ValueError(
                "pooling: official reads positions of the padded layout; set pair_layout to padded and pair_order to "
                "image_text, or pooling to last"
            )
        groups = self.num_key_value_heads or self.num_attention_heads
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % groups:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}, "
                f"and that one of num_key_value_heads {groups}"
            )
