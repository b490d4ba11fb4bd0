"""Comparison of PIXEL with the reference vectors: one function per file, which raises AssertionError."""

import random

import torch
from torch import Tensor

from lit_models.pixel.masking import SpanMasking, span_mask
from lit_models.pixel.modeling_mae import PIXELConfig, PIXELForPreTraining, PIXELPooler, sincos_table


def assert_near(actual: Tensor, expected: Tensor, absolute: float = 2e-5, relative: float = 1e-4) -> None:
    """Compare shape and values, with the tolerances of the reference's README unless told otherwise."""
    torch.testing.assert_close(actual, expected.float(), rtol=relative, atol=absolute)


def check_span_masks(data: list) -> None:
    """The masks of three calls in a row, for every configuration."""
    assert {case["spacing"] for case in data} == {"span", 0, 1}
    for case in data:
        rng = random.Random(case["seed"])
        masking = SpanMasking(tuple(case["cumulative_span_weights"]), case["spacing"])
        assert masking.longest == case["max_span_length"]
        for call in case["calls"]:
            mask = span_mask(
                case["num_patches"], case["num_masking_patches"], call["num_text_patches"], rng, masking
            ).tolist()
            assert mask == call["mask"]


def load_network(config: dict, weights: dict[str, Tensor]) -> PIXELForPreTraining:
    """The network with the stored weights, whose names must be those of the network."""
    network = PIXELForPreTraining(PIXELConfig(**config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    network.load_state_dict(weights, strict=True)
    return network.eval()


def check_pretraining(config: dict, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    """Predictions, masks and loss."""
    network = load_network(config, weights)
    with torch.no_grad():
        output = network(io["pixel_values"], io["attention_mask"], io["patch_mask"], io["noise"])
    assert torch.equal(output.mask, io["mask"].float())
    assert torch.equal(output.ids_restore, io["ids_restore"])
    # Attention adds little to the states of so small a network; with wider tolerances some weights would not count.
    assert_near(output.logits, io["pred"], absolute=1e-6, relative=0.0)
    assert_near(output.loss[None], io["loss"], absolute=1e-6, relative=0.0)


def check_random_masks(config: dict, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    """The masks drawn without spans from the same noise."""
    kept = load_network(config, weights).choose(io["attention_mask"], None, io["noise"])
    assert torch.equal(kept.mask, io["random_masking.mask"].float())
    assert torch.equal(kept.ids_restore, io["random_masking.ids_restore"])


def check_positions(config: dict, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    """The fixed tables of encoder and decoder."""
    length = config["image_size"][1] // config["patch_size"]
    assert_near(sincos_table(length, config["hidden_size"]), io["sincos"], absolute=1e-6)
    fresh = PIXELForPreTraining(PIXELConfig(**config)).state_dict()
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        assert_near(fresh[name], weights[name], absolute=1e-6)


def check_pooling(config: dict, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    """The head that classifiers pool with; its layer norm is fresh."""
    hidden = io["pool.hidden"]
    with_class_token = torch.cat([torch.full_like(hidden[:, :1], torch.nan), hidden], dim=1)
    for pooling in ("mean", "max"):
        head = PIXELPooler(PIXELConfig(**config, pooling=pooling, hidden_dropout_prob=0.0))
        head.linear.load_state_dict({"weight": io["pool.linear.weight"], "bias": io["pool.linear.bias"]})
        with torch.no_grad():
            pooled = head(with_class_token, io["attention_mask"])
        assert_near(pooled, io[f"pool.{pooling}"])
