"""Checks of batches of sound and texts, whose messages say what to change."""

from typing import Any

import torch
from torch import Tensor

from lit_models.diffusion.functional import valid_mask
from lit_models.diffusion.options import WaveformLoss

Batch = dict[str, Any]


def check_batch(batch: Batch, unet: Any, has_text: bool, loss: WaveformLoss, needs_audio: bool = True) -> None:  # noqa: ANN401
    """Make sure that a network can use a batch; it should be on the CPU still.

    Args:
        batch: see `LitWaveform`.
        unet: network with a configuration of diffusers.
        has_text: whether there is a text encoder.
        loss: options of the loss.
        needs_audio: whether a batch without sound is an error.

    Raises:
        ValueError: naming the key to change.
    """
    sizes: dict[str, int] = {}
    if "audio" in batch:
        _check_audio(batch["audio"], batch.get("index"), unet.config.in_channels)
        sizes["audio"] = len(batch["audio"])
        _check_valid(batch, loss)
    elif needs_audio:
        raise ValueError(
            f"data: a batch holds only {', '.join(map(str, batch)) or 'nothing'}, but there must be `audio`, (clips, "
            "channels, samples)"
        )
    width = getattr(unet, "text_dim", None)
    if has_text:
        _check_texts(batch.get("text"))
        sizes["text"] = len(batch["text"])
    elif width is not None and "embedding" not in batch:
        raise ValueError(
            f"model.text: it is null, but the network reads texts of width {width}; set it, or give the batches an "
            "`embedding`"
        )
    if "embedding" in batch and not has_text:
        _check_embedding(batch["embedding"], unet)
        sizes["embedding"] = len(batch["embedding"])
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"data: a batch holds {' and '.join(f'{size} of {name}' for name, size in sizes.items())}; give one of "
            "each for every clip"
        )


def _check_audio(audio: Any, index: Any, channels: int) -> None:  # noqa: ANN401
    if not isinstance(audio, Tensor) or audio.ndim != 3 or 0 in audio.shape or not audio.is_floating_point():
        found = f"{audio.dtype} of shape {tuple(audio.shape)}" if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"data: `audio` is {found}, but must be floating point of shape (clips, channels, samples)")
    if audio.shape[1] != channels:
        raise ValueError(
            f"data.channels: the clips have {audio.shape[1]} channels, but the network reads {channels}; set it to "
            f"that, or model.backbone.in_channels to {audio.shape[1]}"
        )
    finite = torch.isfinite(audio).flatten(1).all(1)
    if not finite.all():
        row = int(finite.float().argmin())
        name = f"clip {int(index[row])}" if index is not None else f"clip {row} of a batch"
        raise ValueError(f"data: {name} holds samples that are NaN or infinite; repair it or leave it out")


def _check_valid(batch: Batch, loss: WaveformLoss) -> None:
    valid, audio = batch.get("valid_length"), batch["audio"]
    if loss.mask and valid is None:
        raise ValueError("model.loss.mask: the batches have no `valid_length`; give them one, or set it to false")
    if valid is not None and (valid.shape != (len(audio),) or valid.min() < 0 or valid.max() > audio.shape[-1]):
        raise ValueError(
            f"data: `valid_length` must be one number from 0 to {audio.shape[-1]} for each of {len(audio)} clips, got "
            f"{valid.tolist()}"
        )
    longest = max(loss.stft_sizes)
    if loss.stft and audio.shape[-1] <= longest // 2:
        raise ValueError(
            f"model.loss.stft_sizes: a window of {longest} samples is too long for clips of {audio.shape[-1]}; use "
            "shorter ones"
        )


def _check_texts(texts: Any) -> None:  # noqa: ANN401
    if texts is None:
        raise ValueError("model.text: the batches hold no `text` to encode; give them one, or set it to null")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("data: `text` must be a list of strings, one for each clip")


def _check_embedding(embedding: Any, unet: Any) -> None:  # noqa: ANN401
    width = getattr(unet, "text_dim", None)
    if not getattr(unet, "uses_vector", False):
        raise ValueError(
            "model.backbone.text_dim: the batches hold an `embedding`, but the network reads no vector; set it to "
            "their width"
        )
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or embedding.shape[1] != width:
        found = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise ValueError(
            f"model.backbone.text_dim: `embedding` must have shape (clips, {width}), got {found}; set it to their width"
        )
    if getattr(unet, "uses_tokens", False):
        raise ValueError(
            "model.backbone.text_attention: the batches hold an `embedding`, which has no tokens to attend to; set it "
            "to false"
        )


def deviation(batch: Batch) -> float:
    """Standard deviation of the sound of a batch around 0, without its padding; 0 for silence.

    Args:
        batch: `audio` (B,C,T) and, if there is padding, `valid_length` (B,).
    """
    power = batch["audio"].double().square()
    if "valid_length" in batch:
        power = power[valid_mask(batch["valid_length"], power.shape[-1]).expand_as(power)]
    return float(power.mean().sqrt()) if power.numel() else 0.0
