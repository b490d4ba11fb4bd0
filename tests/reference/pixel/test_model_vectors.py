import pytest
import torch

from . import model_checks
from .model_checks import CHECKS, Vectors


@pytest.fixture
def vectors(pixel, pixel_tensors):
    return Vectors(
        pixel("model_config"), pixel_tensors("model_weights"), pixel_tensors("model_io"), pixel_tensors("classifier")
    )


@pytest.mark.parametrize("name", CHECKS)
def test_network(vectors, name):
    CHECKS[name](vectors)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(vectors, attention):
    vectors.config["attn_implementation"] = attention
    assert model_checks.language_model(vectors).config._attn_implementation == attention
    for name in ("text", "pixel", "pair", "classifier"):
        CHECKS[name](vectors)


def test_attention_mask(pixel):
    model_checks.check_attention_mask(pixel("attention_mask"))


def test_bfloat16_computes_losses_in_float32(vectors):
    io = vectors.io
    model = model_checks.language_model(vectors).to(torch.bfloat16)
    with torch.no_grad():
        output = model(
            pixel_values=io["pixel_values"],
            pixel_mask=io["pixel_mask"],
            input_ids=io["input_ids"],
            attention_mask=io["text_mask"],
            labels=io["labels"],
        )
    assert output.pixel_pred.dtype == output.logits.dtype == torch.bfloat16
    for name in ("loss", "loss_npp", "loss_ntp"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], io[f"pair.{name}"].squeeze(), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_released_weights_for_one_channel(vectors, mode):
    if vectors.config["num_channels"] == 1:
        pytest.skip("the weights are for grey strips")
    model = model_checks.language_model(vectors)
    grey = vectors.io["pixel_values"].mean(1, keepdim=True)
    colour = grey.expand(-1, vectors.config["num_channels"], -1, -1)
    with torch.no_grad():
        before = model(pixel_values=colour)
        model.merge_channels(mode)
        after = model(pixel_values=grey)
    same = torch.allclose(before.pixel_states, after.pixel_states, atol=1e-4)
    assert same == (mode == "sum")
    if same:
        channels = before.pixel_pred.unflatten(2, (-1, vectors.config["num_channels"]))
        torch.testing.assert_close(after.pixel_pred, channels.mean(-1), rtol=1e-3, atol=1e-4)
