"""Comparison of the networks with the reference vectors: functions that raise AssertionError."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from lit_models.pixel import functional
from lit_models.pixel.modeling import PixelForCausalLM, PixelForSequenceClassification, PixelLMConfig

ABSOLUTE, RELATIVE = 2e-5, 1e-4


@dataclass
class Vectors:
    """Everything that belongs to one set of weights."""

    config: dict
    weights: dict[str, Tensor]
    io: dict[str, Tensor]
    classifier: dict[str, Tensor]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare shape and values; a stored loss is a vector of one number."""
    if actual.ndim == 0:
        assert expected.numel() == 1
        expected = expected.reshape(())
    torch.testing.assert_close(actual, expected, rtol=RELATIVE, atol=ABSOLUTE)


def assert_near_where(actual: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Compare shapes, and the values of attended positions."""
    assert actual.shape == expected.shape
    assert_near(actual[mask.bool()], expected[mask.bool()])


def language_model(vectors: Vectors, **options: object) -> PixelForCausalLM:
    model = PixelForCausalLM(PixelLMConfig(**{"pair_layout": "padded", **vectors.config, **options}))
    model.load_state_dict(vectors.weights)
    return model.eval()


def _pixels(io: dict) -> dict:
    return {"pixel_values": io["pixel_values"], "pixel_mask": io["pixel_mask"]}


def _tokens(io: dict) -> dict:
    return {"input_ids": io["input_ids"], "attention_mask": io["text_mask"]}


def check_names(vectors: Vectors) -> None:
    shapes = {name: value.shape for name, value in language_model(vectors).state_dict().items()}
    assert shapes == {name: value.shape for name, value in vectors.weights.items()}


def check_masks(vectors: Vectors) -> None:
    io = vectors.io
    mask = functional.pixel_mask(io["num_text_patches"], io["pixel_mask"].shape[1])
    assert torch.equal(mask.float(), io["pixel_mask"].float())
    assert torch.equal(io["labels"], io["input_ids"].masked_fill(io["text_mask"] == 0, -100))


def check_patches(vectors: Vectors) -> None:
    io, size = vectors.io, vectors.config["patch_size"]
    patches = functional.patchify(io["pixel_values"], size)
    assert_near(patches, io["patches"])
    assert torch.equal(functional.unpatchify(patches, size), io["pixel_values"])

    target = functional.normalize_patches(patches)
    assert_near(target, io["target_norm"])
    constant = patches.amax(-1) == patches.amin(-1)
    assert not target[constant].any()
    assert not io["target_norm"][constant].any()


def check_pixel_losses(vectors: Vectors) -> None:
    io = vectors.io
    patches = functional.patchify(io["pixel_values"], vectors.config["patch_size"])
    target = functional.normalize_patches(patches)
    counted = functional.target_mask(io["pixel_mask"])
    assert_near(functional.npp_loss(io["rand_pred"], target, counted).mean, io["loss_norm"])
    assert_near(functional.npp_loss(io["rand_pred"], patches, counted).mean, io["loss_raw"])
    baselines = functional.baseline_losses(target, counted)
    assert_near(baselines["copy"].mean, io["base_copy"])
    assert_near(baselines["zero"].mean, io["base_zero"])


@torch.no_grad()
def check_text(vectors: Vectors) -> None:
    io, mask = vectors.io, vectors.io["text_mask"]
    output = language_model(vectors)(**_tokens(io), labels=io["labels"], output_hidden_states=True)
    assert_near_where(output.hidden_states[0], io["text.embed"], mask)
    assert_near_where(output.text_states, io["text.last_hidden"], mask)
    assert_near_where(output.hidden_states[-1], io["text.last_hidden"], mask)
    assert_near_where(output.logits, io["text.logits"], mask)
    assert_near(output.loss, io["text.loss"])
    assert_near(output.loss_ntp, io["text.loss"])


@torch.no_grad()
def check_pixel(vectors: Vectors) -> None:
    io, mask = vectors.io, vectors.io["pixel_mask"]
    output = language_model(vectors)(**_pixels(io), output_hidden_states=True)
    assert_near_where(output.hidden_states[0], io["pixel.embed"], mask)
    assert_near_where(output.pixel_states, io["pixel.last_hidden"], mask)
    assert_near_where(output.pixel_pred, io["pixel.pred"], mask)
    assert_near(output.loss, io["pixel.loss"])
    assert_near(output.loss_npp, io["pixel.loss"])
    target = io["target_norm"] if vectors.config["norm_pix_loss"] else io["patches"]
    loss = functional.npp_loss(io["pixel.pred"], target, functional.target_mask(mask))
    assert_near(loss.mean, io["pixel.loss"])


@torch.no_grad()
def check_pair(vectors: Vectors) -> None:
    io = vectors.io
    output = language_model(vectors)(**_pixels(io), **_tokens(io), labels=io["labels"])
    assert_near_where(output.pixel_pred, io["pair.pred"], io["pixel_mask"])
    assert_near_where(output.logits, io["pair.logits"], io["text_mask"])
    assert_near(output.loss_npp, io["pair.loss_npp"])
    assert_near(output.loss_ntp, io["pair.loss_ntp"])
    assert_near(output.loss, io["pair.loss"])
    assert_near(io["pair.loss_npp"] + io["pair.loss_ntp"], io["pair.loss"])


@torch.no_grad()
def check_llama(vectors: Vectors) -> None:
    """The weights without those of patches are a plain Llama."""
    config = {name: vectors.config[name] for name in vectors.config.keys() & LlamaConfig().to_dict().keys()}
    trunk = LlamaModel(LlamaConfig(**config, rope_theta=vectors.config["rope_theta"])).eval()
    names = {name.removeprefix("model."): value for name, value in vectors.weights.items() if name[:6] == "model."}
    trunk.load_state_dict({name: value for name, value in names.items() if not name.startswith("embed_patches.")})
    io = vectors.io
    states = trunk(input_ids=io["input_ids"], attention_mask=io["text_mask"]).last_hidden_state
    assert_near_where(states, io["text.last_hidden"], io["text_mask"])
    states = trunk(inputs_embeds=io["pixel.embed"], attention_mask=io["pixel_mask"]).last_hidden_state
    assert_near_where(states, io["pixel.last_hidden"], io["pixel_mask"])


@torch.no_grad()
def check_classifier(vectors: Vectors) -> None:
    io, stored = vectors.io, vectors.classifier
    heads = {"lm_token_head.weight", "lm_pixel_head.weight"}
    weights = {name: value for name, value in vectors.weights.items() if name not in heads}
    weights["score.weight"] = stored["score.weight"]

    def classify(inputs: dict, pooling: str = "last") -> tuple[Tensor, Tensor]:
        options = {"pair_layout": "padded", "pooling": pooling, "num_labels": len(stored["score.weight"])}
        model = PixelForSequenceClassification(PixelLMConfig(**(vectors.config | options))).eval()
        model.load_state_dict(weights)
        output = model(**inputs, label=stored["labels"])
        return output.logits, output.loss

    pixels, tokens = _pixels(io), _tokens(io)
    for kind, inputs in (("text", tokens), ("pixel", pixels)):
        logits, loss = classify(inputs)
        assert_near(logits, stored[f"{kind}.logits"])
        assert_near(loss, stored[f"{kind}.loss"])
    assert_near(classify(pixels | tokens)[0], stored["pair.logits_correct"])
    assert_near(classify(pixels | tokens, "official")[0], stored["pair.logits_official"])

    correct = functional.pair_last_position(io["pixel_mask"], io["text_mask"], compact=False)
    assert torch.equal(correct, stored["pair.index_correct"])
    length, pad = io["pixel_mask"].shape[1], vectors.config["pad_token_id"]
    official = functional.official_pair_position(io["input_ids"], pad, length)
    assert torch.equal(official, stored["pair.index_official"])


def check_attention_mask(cases: list[dict]) -> None:
    assert cases
    for case in cases:
        mask = functional.pixel_mask(torch.tensor([case["num_text_patches"]]), case["seq_length"])
        assert mask.shape == (1, case["seq_length"])
        assert int(mask.sum()) == case["mask_sum"]
        assert mask[0, : case["mask_sum"]].all()
        assert int(functional.last_position(mask)) == case["mask_sum"] - 1


CHECKS = {
    "names": check_names,
    "masks": check_masks,
    "patches": check_patches,
    "pixel_losses": check_pixel_losses,
    "text": check_text,
    "pixel": check_pixel,
    "pair": check_pair,
    "llama": check_llama,
    "classifier": check_classifier,
}


def check_all(vectors: Vectors) -> None:
    for check in CHECKS.values():
        check(vectors)
