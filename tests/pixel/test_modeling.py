import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lit_models.hyperparameters import plain
from lit_models.pixel import functional
from lit_models.pixel.configuration import PixelLMConfig
from lit_models.pixel.modeling import (
    PixelForCausalLM,
    PixelForSequenceClassification,
    PixelForTokenClassification,
    PixelLMModel,
)
from lit_models.pixel.recipes import FromPixelConfig, FromPixelPretrained

SIZE, LENGTHS, TEXTS = 4, [6, 9, 2], [5, 3, 7]


def options(**changes):
    return {
        "image_size": [SIZE, 64 * SIZE],
        "patch_size": SIZE,
        "num_channels": 1,
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # so that predictions depend on what they see
        **changes,
    }


def build(model_class=PixelForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    return model_class(PixelLMConfig(**options(**changes))).eval()


def strips(lengths=LENGTHS, width=None, channels=1, seed=0):
    """White strips with noise on the attended patches, the last of which is the black separator."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(lengths), channels, SIZE, max(lengths) * SIZE), generator=generator)
    pixels = torch.nn.functional.pad(pixels, (0, (width - max(lengths)) * SIZE), value=255)
    columns = torch.arange(width * SIZE)
    ends = SIZE * torch.tensor(lengths)[:, None, None, None]
    pixels = torch.where(columns < ends, pixels, 255)
    pixels = torch.where((columns < ends) & (columns >= ends - SIZE), 0, pixels)
    mask = functional.pixel_mask(torch.tensor(lengths) - 1, width)
    return {"pixel_values": pixels.to(torch.uint8), "pixel_mask": mask}


def tokens(lengths=TEXTS, width=None, seed=0):
    """Right-padded texts that open with 1 and close with 2, which is the padding too."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=generator)
    ids = torch.nn.functional.pad(ids, (0, width - max(lengths)))
    ids[:, 0] = 1
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids[torch.arange(len(ids)), torch.tensor(lengths) - 1] = 2
    ids = ids.masked_fill(mask == 0, 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows(batch, index):
    return {key: value[index] for key, value in batch.items()}


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_never_changes_a_loss(layout, attention):
    model = build(pair_layout=layout, attn_implementation=attention, stop_head=True)
    narrow = [strips(), tokens(), strips() | tokens()]
    wide = [strips(width=14), tokens(width=12), strips(width=14) | tokens(width=12)]
    for index, (batch, other) in enumerate(zip(narrow, wide, strict=True)):
        first, second = model(**batch), model(**other)
        names = ["loss_npp", "npp_count", "loss_ntp", "ntp_count", "loss_stop"]
        if layout == "padded" and index == 2:  # where padded strips move the text, by definition
            names = ["loss_npp", "npp_count", "loss_stop"]
        for name in names:
            value, expected = getattr(second, name), getattr(first, name)
            assert (value is None) == (expected is None)
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_content_of_padding_never_matters():
    model = build()
    batch, other = strips() | tokens(), strips() | tokens()
    other["pixel_values"] = torch.where(
        other["pixel_mask"].repeat_interleave(SIZE, 1)[:, None, None].bool(), other["pixel_values"], 77
    ).to(torch.uint8)
    other["input_ids"] = other["input_ids"].masked_fill(other["attention_mask"] == 0, 33)
    other["labels"] = other["input_ids"]  # padding with real labels does not count either
    first, second = model(**batch), model(**other)
    assert torch.equal(first.loss_npp, second.loss_npp)
    assert torch.equal(first.loss_ntp, second.loss_ntp)


def test_rows_are_independent():
    model = build()
    batch = strips() | tokens()
    whole = model(**batch)
    npp = ntp = 0
    for row in range(3):
        one = rows(batch, slice(row, row + 1))
        one["pixel_values"] = one["pixel_values"][..., : LENGTHS[row] * SIZE]
        one["pixel_mask"] = one["pixel_mask"][:, : LENGTHS[row]]
        one = one | {key: one[key][:, : TEXTS[row]] for key in ("input_ids", "attention_mask", "labels")}
        single = model(**one)
        npp, ntp = npp + single.npp_sum, ntp + single.ntp_sum
        torch.testing.assert_close(
            single.logits[0], whole.logits[row, : TEXTS[row]], rtol=1e-4, atol=1e-4, msg=f"row {row}"
        )
    torch.testing.assert_close(npp, whole.npp_sum)
    torch.testing.assert_close(ntp, whole.ntp_sum)
    assert whole.npp_count == sum(LENGTHS) - 3
    assert whole.ntp_count == sum(TEXTS) - 3


def test_weights_of_the_losses():
    batch = strips() | tokens()
    plain_sum = build(stop_head=True)(**batch)
    torch.testing.assert_close(plain_sum.loss, plain_sum.loss_npp + plain_sum.loss_ntp + plain_sum.loss_stop)
    model = build(stop_head=True, pixel_weight=0.5, text_weight=2.0, stop_weight=0.25)
    output = model(**batch)
    expected = 0.5 * output.loss_npp + 2 * output.loss_ntp + 0.25 * output.loss_stop
    torch.testing.assert_close(output.loss, expected)
    assert model(**batch, return_loss=False).loss is None
    batch.pop("labels")
    assert model(**batch).loss_ntp is None


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_pair_without_text_weight_equals_pixel_mode(layout):
    model = build(text_weight=0.0, pair_layout=layout)
    grads = []
    for batch in (strips() | tokens(), strips()):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        grads.append((output, copy.deepcopy({name: value.grad for name, value in model.named_parameters()})))
    (pair, pair_grads), (pixel, pixel_grads) = grads
    torch.testing.assert_close(pair.loss, pixel.loss)
    for name, value in pixel_grads.items():
        if value is not None:
            torch.testing.assert_close(pair_grads[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "bce"])
def test_plain_pixels_can_be_predicted(kind):
    model = build(norm_pix_loss=False, pixel_loss=kind)
    output = model(**strips())
    counted = functional.target_mask(strips()["pixel_mask"])
    expected = functional.npp_loss(output.pixel_pred, output.patches, counted, kind).mean
    assert torch.equal(output.loss, expected)
    assert not torch.equal(output.loss, build().forward(**strips()).loss)


def test_training_learns_a_batch():
    model = build(initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch = strips() | tokens()
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_bytes_and_floats_of_odd_widths(channels, width):
    model = build(num_channels=channels)
    batch = strips([width], channels=channels)
    output = model(**batch)
    assert output.pixel_pred.shape == (1, width, SIZE * SIZE * channels)
    assert output.npp_count == width - 1
    as_float = model(batch["pixel_values"] / 255, batch["pixel_mask"])
    torch.testing.assert_close(output.pixel_pred, as_float.pixel_pred)
    assert torch.equal(model(batch["pixel_values"]).loss, output.loss)  # all ones is the default mask


def test_patches_are_embedded_as_by_a_convolution():
    model = build(num_channels=3)
    embedding = model.model.embed_patches.patch_embeddings
    pixels = strips(channels=3)["pixel_values"] / 255
    expected = embedding.norm(embedding.projection(pixels).flatten(2).transpose(1, 2))
    first = model(pixels, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_left_padded_tokens_are_masked():
    model = build()
    ids = tokens([5], width=5)["input_ids"]
    padded = torch.cat([torch.full((1, 2), 2), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    output = model(input_ids=padded, attention_mask=mask)
    torch.testing.assert_close(output.logits[:, 2:], model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_hidden_states_of_layers():
    output = build()(**strips(), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.pixel_states)


def test_bfloat16_is_close_to_float32():
    model = build(initializer_range=0.05)
    batch = strips() | tokens()
    exact = model(**batch)
    rough = copy.deepcopy(model).bfloat16()(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    for output in (rough, mixed):
        assert output.logits.dtype == torch.bfloat16
        for name in ("loss", "loss_npp", "loss_ntp"):
            assert output[name].dtype == torch.float32
            torch.testing.assert_close(output[name], exact[name], rtol=0.02, atol=0)


def test_gradient_checkpointing_changes_nothing():
    model = build().train()
    batch = strips() | tokens()
    model(**batch).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], msg=name)
    assert {"LlamaDecoderLayer"} <= set(model._no_split_modules)


def test_end_of_text_is_trained_although_it_is_the_padding():
    model = build().train()
    model(**tokens()).loss.backward()
    assert model.model.embed_tokens.weight[2].any()
    batch = tokens([4])
    batch["input_ids"][0, 1] = 2
    model.zero_grad()
    model(**batch).loss.backward()
    assert model.model.embed_tokens.weight.grad[2].any()


def test_long_sequences_run_with_a_warning():
    model = build(max_position_embeddings=8)
    with pytest.warns(UserWarning, match=r"config\.max_position_embeddings \(8\)"):
        model(**strips())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**strips([8]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "neither pixel_values nor input_ids"),
        ({"pixel_values": torch.zeros(1, 1, 8, 16)}, "image_size: .*8 pixels high.*4.*renderer"),
        ({"pixel_values": torch.zeros(1, 1, SIZE, 18)}, "patch_size: .*18 pixels wide.*renderer"),
        ({"pixel_values": torch.zeros(1, 3, SIZE, 16)}, "num_channels: .*3 channels.*colour to gray"),
        ({"pixel_values": torch.zeros(1, 1, SIZE, 16), "pixel_mask": torch.ones(1, 5)}, r"pixel_mask has .*\(1, 4\)"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}, "attention_mask has"),
        ({"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 4).long()}, "labels"),
        ({"pixel_values": torch.zeros(1, 1, SIZE, 16), "labels": torch.ones(1, 4).long()}, "labels"),
        ({"pixel_values": torch.zeros(1, 1, SIZE, 16), "input_ids": torch.ones(2, 3).long()}, "got 1 and 2"),
        ({"input_ids": torch.ones(2, 3).long(), "document_ids": torch.zeros(2, 3).long()}, "document_ids"),
        (
            {"pixel_values": torch.zeros(1, 1, SIZE, 16), "document_ids": torch.zeros(1, 3).long()},
            r"document_ids have shape \(1, 3\)",
        ),
    ],
)
def test_unfit_input_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        build()(**inputs)


def test_grey_strips_for_a_colour_model_are_refused():
    with pytest.raises(ValueError, match="set num_channels to 1, or the renderer's colour to rgb"):
        build(num_channels=3)(**strips())


# -- pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["image_text", "text_image"])
def test_layouts_agree_where_nothing_is_padded(order):
    batch = strips([6, 6]) | tokens([5, 5])
    compact = build(pair_layout="compact", pair_order=order)(**batch)
    padded = build(pair_layout="padded", pair_order=order)(**batch)
    torch.testing.assert_close(compact.logits, padded.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compact.pixel_pred, padded.pixel_pred, rtol=1e-4, atol=1e-4)
    assert compact.attention_mask.shape == padded.attention_mask.shape == (2, 11)


def test_compact_layout_shortens_the_sequence():
    batch = strips() | tokens()
    longest = max(image + text for image, text in zip(LENGTHS, TEXTS, strict=True))
    mask = build()(**batch).attention_mask
    assert mask.shape == (3, longest)
    assert mask.sum(1).tolist() == [image + text for image, text in zip(LENGTHS, TEXTS, strict=True)]
    assert build(pair_layout="padded")(**batch).attention_mask.shape == (3, max(LENGTHS) + max(TEXTS))


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("order", ["image_text", "text_image"])
def test_only_the_second_part_sees_the_first(layout, order):
    model = build(pair_layout=layout, pair_order=order)
    batch = strips() | tokens()
    other_text, other_image = batch | tokens(seed=1), batch | strips(seed=1)
    output = model(**batch)
    image_changes = not torch.allclose(model(**other_text).loss_npp, output.loss_npp)
    text_changes = not torch.allclose(model(**other_image).loss_ntp, output.loss_ntp)
    assert (image_changes, text_changes) == (order == "text_image", order == "image_text")


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_random_order_is_drawn_per_row_from_the_generator(layout):
    model = build(pair_layout=layout, pair_order="random")
    batch = {key: value[[0] * 40] for key, value in (strips() | tokens()).items()}
    first, second = model(**batch, pair_order="image_text"), model(**batch, pair_order="text_image")
    assert torch.equal(model(**batch).logits, first.logits)  # no chance outside training
    model.train()
    drawn = model(**batch, generator=torch.Generator().manual_seed(3))
    again = model(**batch, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn.logits, again.logits)
    image_first = torch.isclose(drawn.logits, first.logits, atol=1e-4).flatten(1).all(1)
    text_first = torch.isclose(drawn.logits, second.logits, atol=1e-4).flatten(1).all(1)
    assert (image_first ^ text_first).all()
    assert 8 < image_first.sum() < 32
    image_first_pixels = torch.isclose(drawn.pixel_pred, first.pixel_pred, atol=1e-4)[:, : LENGTHS[0]].flatten(1).all(1)
    assert torch.equal(image_first, image_first_pixels)


# -- packed strips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_strip_do_not_see_each_other(attention):
    model = build(attn_implementation=attention)
    first, second = strips([6]), strips([5], seed=1)
    packed = torch.cat([first["pixel_values"], second["pixel_values"]], 3)
    packed = torch.nn.functional.pad(packed, (0, 3 * SIZE), value=255)
    mask = functional.pixel_mask(torch.tensor([10]), 14)
    ids = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 3])
    output = model(packed, mask, document_ids=ids)

    changed = packed.clone()
    changed[..., : 6 * SIZE] = strips([6], seed=2)["pixel_values"]
    other = model(changed, mask, document_ids=ids)
    assert torch.equal(other.pixel_pred[:, 6:11], output.pixel_pred[:, 6:11])
    assert not torch.allclose(other.pixel_pred[:, :6], output.pixel_pred[:, :6])
    assert not torch.allclose(model(packed, mask).pixel_pred[:, 6:11], output.pixel_pred[:, 6:11], atol=1e-3)

    apart = [model(**first), model(**second)]
    torch.testing.assert_close(output.pixel_pred[:, :6], apart[0].pixel_pred, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pixel_pred[:, 6:11], apart[1].pixel_pred, rtol=1e-4, atol=1e-4)
    assert output.npp_count == apart[0].npp_count + apart[1].npp_count == 9
    torch.testing.assert_close(output.npp_sum, apart[0].npp_sum + apart[1].npp_sum)


def test_packed_strips_in_bfloat16_and_other_kernels():
    for attention in ("sdpa", "eager"):
        model = build(attn_implementation=attention).bfloat16()
        assert model(**strips(), document_ids=strips()["pixel_mask"] - 1).loss.isfinite()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn: packed strips need sdpa or eager attention, not flex_attention"):
        model(**strips(), document_ids=strips()["pixel_mask"] - 1)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("order", ["image_text", "text_image", "random"])
def test_classifier_reads_the_last_attended_state(layout, order):
    model = build(PixelForSequenceClassification, num_labels=3, pair_layout=layout, pair_order=order)
    batch = strips() | {key: value for key, value in tokens().items() if key != "labels"}
    label = torch.tensor([0, 2, 1])
    output = model(**batch, label=label)
    trunk = model.model(**batch)
    last = [trunk.text_states[row, TEXTS[row] - 1] for row in range(3)]
    if order == "text_image":
        last = [trunk.pixel_states[row, LENGTHS[row] - 1] for row in range(3)]
    torch.testing.assert_close(output.states, torch.stack(last))
    torch.testing.assert_close(output.logits, model.score(torch.stack(last)))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, label))
    pixels = model(**strips()).states
    states = model.model(**strips()).pixel_states
    torch.testing.assert_close(pixels, torch.stack([states[row, LENGTHS[row] - 1] for row in range(3)]))
    whole = model(strips([4])["pixel_values"]).states
    torch.testing.assert_close(whole, model.model(strips([4])["pixel_values"]).pixel_states[:, -1])


def test_classifier_in_random_order_in_training():
    model = build(PixelForSequenceClassification, num_labels=3, pair_order="random").train()
    batch = {key: value[[0] * 12] for key, value in (strips() | tokens()).items() if key != "labels"}
    states = model(**batch, generator=torch.Generator().manual_seed(0)).states
    image_first, text_first = (model(**batch, pair_order=order).states for order in ("image_text", "text_image"))
    is_first = torch.isclose(states, image_first, atol=1e-4).all(1)
    assert (is_first ^ torch.isclose(states, text_first, atol=1e-4).all(1)).all()
    assert 0 < is_first.sum() < 12


def test_one_label_is_fitted_by_the_squared_error():
    model = build(PixelForSequenceClassification, num_labels=1)
    label = torch.tensor([0.5, 4.0, 2.5])
    output = model(**strips(), label=label)
    assert output.logits.shape == (3, 1)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - label).square().mean())
    assert model.bfloat16()(**strips(), label=label).loss.dtype == torch.float32


def test_tagger_reads_the_patches_of_words():
    model = build(PixelForTokenClassification, num_labels=4)
    words = torch.tensor([[0, 3, 5], [2, 8, -1], [0, -1, -1]])
    tags = torch.tensor([[1, 0, 3], [2, -100, -100], [3, -100, -100]])
    output = model(**strips(), word_patches=words, tags=tags)
    states = model.model(**strips()).pixel_states
    assert torch.equal(output.states[1, 1], states[1, 8])
    counted = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    terms = [torch.nn.functional.cross_entropy(output.logits[place], tags[place]) for place in counted]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    assert model(**strips(), word_patches=words, tags=torch.full_like(tags, -100)).loss == 0


# -- configuration, names, files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_loss": "l2"}, "pixel_loss: 'l2' is not one of mse, bce, smooth_l1"),
        ({"pair_layout": "dense"}, "pair_layout"),
        ({"pair_order": "both"}, "pair_order"),
        ({"pooling": "max"}, "pooling"),
        ({"num_channels": 2}, "num_channels"),
        ({"patch_size": 1}, "patch_size"),
        ({"image_size": [SIZE + 1, 64]}, "image_size"),
        ({"pixel_loss": "bce"}, "bce predicts plain pixels; set norm_pix_loss to false"),
        ({"text_weight": -1.0}, "text_weight"),
        ({"pooling": "official"}, "set pair_layout to padded"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_unfit_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PixelLMConfig(**options(**changes))


def test_options_set_later_are_checked_by_the_model():
    config = PixelLMConfig(**options())
    config.pixel_loss = "bce"
    with pytest.raises(ValueError, match="norm_pix_loss"):
        PixelForCausalLM(config)


def test_defaults_are_those_of_the_paper():
    config = PixelLMConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (1024, 24, 2816)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (16, 8, 32000)
    assert (config.patch_values, config.rope_theta, config.norm_pix_loss) == (768, 10000.0, True)


def test_number_of_parameters_at_paper_scale():
    def count(model):
        return sum(value.numel() for value in model.parameters())

    with torch.device("meta"):
        assert count(PixelForSequenceClassification(PixelLMConfig(num_labels=3))) == 316_726_272
        model = PixelForCausalLM(PixelLMConfig())
    assert count(model) == 316_726_272 - 3 * 1024 + 32000 * 1024 + 768 * 1024 == 350_277_632
    assert count(model.model.layers) + count(model.model.norm) == pytest.approx(283.2e6, abs=0.1e6)


def test_initialisation():
    model = build(num_channels=3, hidden_size=64, initializer_range=0.02, stop_head=True)
    embedding = model.model.embed_patches.patch_embeddings
    inputs = 3 * SIZE * SIZE
    bound = (6 / (inputs + 64)) ** 0.5
    assert bound * 0.95 < embedding.projection.weight.abs().max() <= bound
    assert inputs**-0.5 * 0.7 < embedding.projection.bias.abs().max() <= inputs**-0.5
    assert embedding.norm.eps == 1e-5
    assert (embedding.norm.weight == 1).all()
    for weight in (model.model.embed_tokens.weight, model.lm_token_head.weight, model.lm_pixel_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert weight.mean().abs() < 0.002
    assert model.lm_token_head.weight is not model.model.embed_tokens.weight
    with torch.no_grad():
        loss = model(**strips(channels=3) | tokens())
    assert loss.loss_ntp == pytest.approx(torch.tensor(50.0).log().item(), rel=0.05)


def test_names_are_the_released_ones():
    names = set(build().state_dict())
    prefix = "model.embed_patches.patch_embeddings."
    assert {
        f"{prefix}projection.weight",
        f"{prefix}projection.bias",
        f"{prefix}norm.weight",
        f"{prefix}norm.bias",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_token_head.weight",
        "lm_pixel_head.weight",
    } <= names
    assert build(num_channels=3).state_dict()[f"{prefix}projection.weight"].shape == (32, 3, SIZE, SIZE)
    assert names.isdisjoint({"lm_stop_head.weight"})


@pytest.mark.parametrize(
    ("model_class", "auto"),
    [
        (PixelLMModel, AutoModel),
        (PixelForCausalLM, AutoModelForCausalLM),
        (PixelForSequenceClassification, AutoModelForSequenceClassification),
        (PixelForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_saved_models_come_back(tmp_path, model_class, auto):
    model = build(model_class, num_labels=5, rope_theta=500.0, pair_order="text_image", stop_head=True)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert (loaded.config.rope_theta, loaded.config.pair_order, loaded.config.num_labels) == (500.0, "text_image", 5)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    base = (model, loaded) if model_class is PixelLMModel else (model.model, loaded.model)
    outputs = [trunk(**strips()).pixel_states for trunk in base]
    assert torch.equal(*outputs)
    assert torch.equal(base[0].rotary_emb.inv_freq, base[1].rotary_emb.inv_freq)


def test_base_of_the_rotary_embedding():
    config = PixelLMConfig(**options(rope_theta=500.0))
    assert config.to_dict()["rope_parameters"]["rope_theta"] == 500.0
    assert PixelLMConfig(**(config.to_dict() | {"rope_theta": 70.0})).rope_theta == 70.0
    config.rope_theta = 90.0
    frequencies = PixelLMModel(config).rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 90.0 ** -(torch.arange(0, 8, 2) / 8))


@pytest.fixture
def released(tmp_path):
    """Folder as the released checkpoints are: without our model type."""

    def write(model, drop=()):
        config = {name: getattr(model.config, name) for name in options()}
        config |= {"rope_theta": 10000.0, "norm_pix_loss": True, "pad_token_id": 2, "model_type": "ernie_pixel"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(drop))}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return write


def test_released_folders_load(released):
    model = build()
    loaded = PixelForCausalLM.from_pretrained(released(model))
    assert loaded.config.pair_layout == "padded"
    assert torch.equal(loaded(**strips()).pixel_pred, model(**strips()).pixel_pred)
    assert PixelForCausalLM.from_pretrained(released(model), pair_layout="compact").config.pair_layout == "compact"


def test_missing_heads_are_named(released):
    folder = released(build(), drop=["lm_token_head", "model.embed_tokens"])
    with pytest.warns(UserWarning, match=r"no weights for lm_token_head, model\.embed_tokens, which.*untrained"):
        model = PixelForCausalLM.from_pretrained(folder)
    assert model.lm_token_head.weight.std().item() == pytest.approx(0.3, rel=0.1)
    with pytest.warns(UserWarning, match=r"no weights for model\.embed_tokens, which"):
        model = PixelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.score.weight.shape == (3, 32)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_colour_weights_for_grey_strips(released, mode):
    colour = build(num_channels=3)
    folder = released(colour)
    with pytest.raises(ValueError, match=r"num_channels: .* 3 channels, not 1; 3 become 1 with resize_channels"):
        PixelForCausalLM.from_pretrained(folder, num_channels=1)
    grey = PixelForCausalLM.from_pretrained(folder, num_channels=1, resize_channels=mode)
    kernel = colour.model.embed_patches.patch_embeddings.projection.weight
    expected = kernel.mean(1) if mode == "mean" else kernel.sum(1)
    assert torch.equal(grey.model.embed_patches.patch_embeddings.projection.weight[:, 0], expected)
    assert grey(**strips()).pixel_pred.shape == (3, 9, SIZE * SIZE)
    tripled = strips()["pixel_values"].expand(-1, 3, -1, -1)
    same = torch.allclose(
        grey(**strips()).pixel_states, colour(tripled, strips()["pixel_mask"]).pixel_states, atol=1e-4
    )
    assert same == (mode == "sum")


def test_colour_weights_for_a_grey_classifier_survive_saving(released, tmp_path_factory):
    folder = released(build(num_channels=3))
    model = FromPixelPretrained(folder, overrides={"num_channels": 1}).build_classifier(2)
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    loaded = PixelForSequenceClassification.from_pretrained(saved)
    assert loaded.config.num_channels == 1
    assert torch.equal(loaded(**strips()).logits, model(**strips()).logits)


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipe_from_scratch():
    recipe = FromPixelConfig(options(), dtype="bfloat16", attn="eager")
    model = recipe.build()
    assert type(model) is PixelForCausalLM
    assert model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert type(recipe.build_tagger(7)) is PixelForTokenClassification
    classifier = recipe.build_classifier(4)
    assert classifier.training
    assert classifier.score.weight.shape == (4, 32)


def test_recipe_from_files(tmp_path):
    model = build(PixelForCausalLM)
    model.save_pretrained(tmp_path)
    recipe = FromPixelPretrained(str(tmp_path), overrides={"text_weight": 0.5}, attn="eager")
    built = recipe.build()
    assert built.training
    assert built.config.text_weight == 0.5
    assert built.config._attn_implementation == "eager"
    assert torch.equal(built.lm_pixel_head.weight, model.lm_pixel_head.weight)
    classifier = recipe.build_classifier(1)
    assert classifier.config.num_labels == 1
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)


def test_recipes_are_plain_data():
    recipe = FromPixelPretrained("folder", overrides={"num_channels": 1})
    saved = plain(recipe)
    assert saved["class_path"] == "lit_models.pixel.recipes.FromPixelPretrained"
    assert FromPixelPretrained(**saved["init_args"]) == recipe
    assert plain(FromPixelConfig({"hidden_size": 8}))["init_args"]["overrides"] == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (FromPixelConfig({"hiden_size": 8}), "overrides: 'hiden_size' is not an option"),
        (FromPixelConfig({"num_channels": 2}), "num_channels"),
        (FromPixelConfig(options(), dtype="float"), None),
        (FromPixelConfig(options(), dtype="real"), "dtype: 'real'"),
        (FromPixelPretrained("/no/such/folder"), "name: '/no/such/folder' is neither"),
        (FromPixelPretrained("/no/such/folder", overrides={"layers": 2}), "overrides: 'layers'"),
    ],
)
def test_unfit_recipes_are_refused(recipe, message):
    if message is None:
        assert recipe.build().dtype == torch.float32
    else:
        with pytest.raises(ValueError, match=message):
            recipe.build()
