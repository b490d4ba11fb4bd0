import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ViTConfig,
    ViTModel,
)

from lit_models.pixel.functional import normalize_patches, patchify
from lit_models.pixel.mae_recipes import FromPIXELConfig, FromPIXELPretrained
from lit_models.pixel.modeling_mae import (
    PIXELConfig,
    PIXELForPreTraining,
    PIXELForSequenceClassification,
    PIXELForTokenClassification,
    PIXELModel,
    sincos_table,
)

from ..reference.loading import DEFAULT_ROOT

P, L = 4, 16
OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": [P, P * L],
    "patch_size": P,
    "num_channels": 1,
    "decoder_hidden_size": 12,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 24,
}


def config(**values):
    return PIXELConfig(**(OPTIONS | values))


def make(model_class=PIXELForPreTraining, seed=0, **values):
    torch.manual_seed(seed)
    model = model_class(config(initializer_range=0.2, **values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # fresh biases are 0, which would hide their omission
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def strips(lengths=(16, 7), length=L, channels=1, seed=0):
    """Strips with ink up to the separator, and white beyond."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    pixels = torch.randint(0, 256, (len(lengths), channels, P, length * P), dtype=torch.uint8, generator=generator)
    attended = mask.repeat_interleave(P, 1)[:, None, None].bool()
    return torch.where(attended, pixels, 255).to(torch.uint8), mask


def noise(rows=2, length=L, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


# -- sizes and weights -------------------------------------------------------------------------------------------------


def test_size_of_pixel_base():
    with torch.device("meta"):
        model = PIXELForPreTraining(PIXELConfig())
    encoder = sum(parameter.numel() for parameter in model.vit.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert (encoder, everything) == (85_647_360, 111_655_680)
    tables = sum(buffer.numel() for buffer in model.buffers())
    assert tables == 530 * (768 + 512)
    # The paper's numbers, whether or not they count the fixed tables of positions.
    assert round(encoder / 1e6) == round((encoder + 530 * 768) / 1e6) == 86
    assert round(everything / 1e6) == round((everything + tables) / 1e6) == 112
    assert model.config.num_patches == 529


def test_weights_round_trip_under_their_official_names(tmp_path, pixel_names):
    model = make()
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) == pixel_names
    loaded, info = PIXELForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert {name: getattr(loaded.config, name) for name in OPTIONS} == OPTIONS


@pytest.fixture
def pixel_names():
    with safe_open(DEFAULT_ROOT / "pixel" / "pixel_mae_weights.safetensors", "pt") as file:
        return set(file.keys())


def test_auto_classes_know_the_models(tmp_path):
    make().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PIXELConfig)
    for auto, expected in [
        (AutoModel, PIXELModel),
        (AutoModelForPreTraining, PIXELForPreTraining),
        (AutoModelForSequenceClassification, PIXELForSequenceClassification),
        (AutoModelForTokenClassification, PIXELForTokenClassification),
    ]:
        assert type(auto.from_pretrained(tmp_path)) is expected


def test_the_encoder_is_the_one_of_transformers(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    options = {name: OPTIONS[name] for name in names}
    vit = ViTModel.from_pretrained(tmp_path, config=ViTConfig(**options, num_channels=1), add_pooling_layer=False)
    pixels, mask = strips()
    expected = vit.eval()(pixels / 255, attention_mask=nn.functional.pad(mask, (1, 0), value=1)).last_hidden_state
    torch.testing.assert_close(model.vit(pixels, mask).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_loading_fills_what_a_folder_lacks(tmp_path):
    model = make()
    state = {name: value for name, value in model.state_dict().items() if "pos" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PIXELForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.vit.embeddings.position_embeddings[0], sincos_table(L, 16))
    assert torch.equal(loaded.decoder.decoder_pos_embed[0], sincos_table(L, 12))


# -- positions ---------------------------------------------------------------------------------------------------------


def test_positions_lay_a_square_over_the_strip():
    table = sincos_table(9, 8)
    assert table.shape == (10, 8)
    assert not table[0].any()
    torch.testing.assert_close(table[1, :8], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    frequencies = torch.tensor([1.0, 0.01])
    column, row = 2, 1  # patch 5 of a grid of side 3
    expected = torch.cat([wave(place * frequencies) for place in (column, row) for wave in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[1 + 5], expected)
    assert torch.equal(sincos_table(8, 8), table[:9])  # a grid that is not full


def test_shorter_strips_take_the_first_positions():
    model = make()
    pixels, mask = strips((5, 8))
    whole = model.vit(pixels, mask).last_hidden_state
    cut = model.vit(pixels[..., : 8 * P], mask[:, :8]).last_hidden_state
    torch.testing.assert_close(cut[1], whole[1, :9], rtol=0, atol=1e-6)
    torch.testing.assert_close(cut[0, :6], whole[0, :6], rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_tables_are_trained_only_on_request(learned, tmp_path):
    model = make(learn_positions=learned)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ("vit.embeddings.position_embeddings" in trained) == learned
    assert "decoder.decoder_pos_embed" not in trained
    make(learn_positions=not learned).save_pretrained(tmp_path)  # either kind loads into the other
    loaded = PIXELForPreTraining.from_pretrained(tmp_path, learn_positions=learned)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert ("vit.embeddings.position_embeddings" in trained) == learned


# -- pre-training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_is_the_error_of_hidden_attended_patches(normalised):
    model = make(norm_pix_loss=normalised)
    pixels, mask = strips()
    output = model(pixels, mask, noise=noise())
    target = patchify(pixels / 255, P)
    if normalised:
        target = normalize_patches(target)
    counted = [(row, patch) for row in range(2) for patch in range(L) if output.mask[row, patch] and mask[row, patch]]
    assert 0 < len(counted) < output.mask.sum()
    errors = [(output.logits[at] - target[at]).square().mean() for at in counted]
    assert output.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)
    assert output.targets.sum() == len(counted)
    assert output.errors.shape == (2, L)
    assert (output.mask.sum(1) == 4).all()


def test_hidden_patches_are_not_seen():
    model = make()
    pixels, mask = strips()
    output = model(pixels, mask, noise=noise())
    hidden = output.mask.repeat_interleave(P, 1)[:, None, None].bool()
    changed = model(torch.where(hidden, 255 - pixels, pixels), mask, noise=noise())
    assert torch.equal(changed.logits, output.logits)
    visible = model(torch.where(hidden, pixels, 255 - pixels), mask, noise=noise())
    assert not torch.allclose(visible.logits, output.logits, atol=1e-3)


def test_padding_has_no_influence():
    model = make()
    pixels, mask = strips()
    output = model(pixels, mask, noise=noise())
    changed = model(torch.where(mask.repeat_interleave(P, 1)[:, None, None] == 1, pixels, 0), mask, noise=noise())
    assert torch.equal(changed.loss, output.loss)
    assert torch.equal(changed.logits[mask == 1], output.logits[mask == 1])


@pytest.mark.parametrize("length", [8, 12])
def test_more_padding_leaves_the_loss_where_masks_are_equal(length):
    model = make()
    pixels, mask = strips((8, 5), length)
    hidden = torch.zeros(2, L)
    hidden[0, [1, 6]] = hidden[1, [0, 3]] = 1
    short, long = hidden[:, :length].clone(), hidden.clone()
    for masks in (short, long):  # the rest of the quota falls on padding
        rest = masks.shape[1] // 4 - 2
        if rest:
            masks[:, -rest:] = 1
    wide = nn.functional.pad(pixels, (0, (L - length) * P), value=255)
    outputs = [
        model(pixels, mask, short, noise(length=length)),
        model(wide, nn.functional.pad(mask, (0, L - length)), long, noise()),
    ]
    assert torch.equal(outputs[0].mask, short)
    assert torch.equal(outputs[1].mask, long)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=1e-6)


def test_rows_do_not_influence_each_other():
    model = make()
    pixels, mask = strips((16, 7, 9))
    whole = model(pixels, mask, noise=noise(3))
    for row in range(3):
        alone = model(pixels[row : row + 1], mask[row : row + 1], noise=noise(3)[row : row + 1])
        torch.testing.assert_close(alone.errors[0], whole.errors[row], rtol=0, atol=1e-5)


def test_bytes_and_floats_are_the_same_and_no_mask_attends_to_all():
    model = make()
    pixels, _ = strips()
    expected = model(pixels, torch.ones(2, L, dtype=torch.long), noise=noise()).loss
    assert torch.equal(model(pixels / 255, None, noise=noise()).loss, expected)


def test_noise_is_drawn_where_none_is_given():
    model = make()
    pixels, mask = strips((16,) * 8)
    one, two = model(pixels, mask), model(pixels, mask)
    assert (one.mask.sum(1) == 4).all()
    assert not torch.equal(one.mask, two.mask)


def test_nothing_to_predict_is_no_error():
    model = make().train()
    pixels, mask = strips((2, 2))
    patch_mask = torch.zeros(2, L)
    patch_mask[:, 8:12] = 1
    loss = model(pixels, mask, patch_mask, noise()).loss
    assert loss == 0
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tiny_strips(length):
    pixels, mask = strips((length, 1), length)
    output = make()(pixels, mask, noise=noise(length=length))
    assert output.logits.shape == (2, length, P * P)
    assert torch.isfinite(output.loss)


def test_every_parameter_is_trained():
    model = make().train()
    model(*strips(), noise=noise()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_computes_targets_and_loss_in_float32(autocast):
    model = make()
    pixels, mask = strips()
    expected = model(pixels, mask, noise=noise())
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(pixels, mask, noise=noise())
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.errors.dtype == torch.float32
    assert torch.equal(output.mask, expected.mask)
    target = normalize_patches(patchify(pixels, P) / 255)
    exact = (output.logits.float() - target).square().mean(-1)
    torch.testing.assert_close(output.errors, exact, rtol=1e-6, atol=1e-6)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = make().train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.vit.encoder.layer[0].gradient_checkpointing
        model(*strips(), noise=noise()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_dropout_acts_in_training_only():
    pixels, mask = strips()
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = make(**{name: 0.5})
        assert torch.equal(model(pixels, mask, noise=noise()).loss, model(pixels, mask, noise=noise()).loss)
        model.train()
        assert not torch.equal(model(pixels, mask, noise=noise()).loss, model(pixels, mask, noise=noise()).loss)


# -- classification and tagging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "attention"])
def test_pooling_ignores_padding(pooling):
    model = make(PIXELForSequenceClassification, pooling=pooling, num_labels=3)
    pixels, mask = strips((9, 7))
    logits = model(pixels, mask).logits
    assert logits.shape == (2, 3)
    cut = model(pixels[..., : 9 * P], mask[:, :9]).logits
    torch.testing.assert_close(cut, logits, rtol=0, atol=1e-5)
    black = torch.where(mask.repeat_interleave(P, 1)[:, None, None] == 1, pixels, 0)
    torch.testing.assert_close(model(black, mask).logits, logits, rtol=0, atol=1e-5)
    hidden = model.vit(pixels, mask).last_hidden_state
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    head = model.pooler
    states = head.ln(nn.functional.gelu(head.linear(hidden)))
    text = states[1, 1:8]
    expected = {
        "mean": text.mean(0),
        "max": text.amax(0),
        "cls": states[1, 0],
        "attention": (head.weights(text).softmax(0) * text).sum(0) if pooling == "attention" else None,
    }[pooling]
    torch.testing.assert_close(logits[1], model.classifier(expected), rtol=0, atol=1e-5)
    whole = model(pixels).logits
    torch.testing.assert_close(whole, model(pixels, torch.ones_like(mask)).logits, rtol=0, atol=1e-5)


def test_labels_and_numbers_have_their_losses():
    pixels, mask = strips()
    model = make(PIXELForSequenceClassification, num_labels=3)
    output = model(pixels, mask, torch.tensor([2, 0]))
    assert output.loss.item() == pytest.approx(
        nn.functional.cross_entropy(output.logits, torch.tensor([2, 0])).item(), rel=1e-6
    )
    model = make(PIXELForSequenceClassification, num_labels=1)
    output = model(pixels, mask, torch.tensor([0.5, 2.0]))
    expected = (output.logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.bfloat16()(pixels, mask).logits.dtype == torch.float32


def test_words_are_tagged_at_their_patches():
    model = make(PIXELForTokenClassification, num_labels=5)
    pixels, mask = strips()
    places = torch.tensor([[0, 3, 9], [2, -100, -100]])
    tags = torch.tensor([[4, -100, 1], [0, -100, -100]])
    output = model(pixels, places, mask, tags)
    states = model.vit(pixels, mask).last_hidden_state[:, 1:]
    scores = model.classifier(torch.stack([states[0, 0], states[0, 9], states[1, 2]]))
    torch.testing.assert_close(output.logits[[0, 0, 1], [0, 2, 0]], scores, rtol=0, atol=1e-6)
    expected = nn.functional.cross_entropy(scores, torch.tensor([4, 1, 0]))
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(pixels, places, mask, torch.full_like(tags, -100)).loss == 0


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes_build_all_networks(tmp_path):
    recipe = FromPIXELConfig(OPTIONS)
    model = recipe.build()
    assert isinstance(model, PIXELForPreTraining)
    assert model.training
    assert isinstance(recipe.build_classifier(3), PIXELForSequenceClassification)
    model.save_pretrained(tmp_path)
    recipe = FromPIXELPretrained(str(tmp_path), overrides={"pooling": "max", "hidden_dropout_prob": 0.25})
    classifier = recipe.build_classifier(7)
    assert classifier.training
    assert classifier.classifier.out_features == 7
    assert classifier.pooler.pooling == "max"
    assert classifier.vit.encoder.layer[0].dropout.p == 0.25
    assert torch.equal(classifier.vit.layernorm.weight, model.vit.layernorm.weight)
    assert torch.equal(
        classifier.vit.encoder.layer[1].output.dense.weight, model.vit.encoder.layer[1].output.dense.weight
    )
    tagger = recipe.build_tagger(4)
    assert isinstance(tagger, PIXELForTokenClassification)
    assert tagger.classifier.out_features == 4
    assert FromPIXELConfig(OPTIONS, dtype="bfloat16").build().dtype == torch.bfloat16
    assert FromPIXELPretrained(str(tmp_path), dtype="bfloat16").build().dtype == torch.bfloat16


def test_a_classifier_keeps_its_head(tmp_path):
    model = make(PIXELForSequenceClassification, num_labels=3, pooling="attention")
    model.save_pretrained(tmp_path)
    loaded = FromPIXELPretrained(str(tmp_path)).build_classifier(3).eval()
    assert torch.equal(loaded(*strips()).logits, model(*strips()).logits)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_colour_weights_read_grey_strips(mode, tmp_path):
    colour = make(num_channels=3)
    colour.save_pretrained(tmp_path)
    grey = FromPIXELPretrained(str(tmp_path), channels=mode, overrides={"num_channels": 1}).build().eval()
    pixels, mask = strips()
    copied = pixels.expand(-1, 3, -1, -1)
    expected, output = colour(copied, mask, noise=noise()), grey(pixels, mask, noise=noise())
    assert output.logits.shape == (2, L, P * P)
    same = torch.allclose(output.logits, expected.logits.unflatten(-1, (-1, 3)).mean(-1), rtol=0, atol=1e-5)
    assert same == (mode == "sum")
    kernel = colour.vit.embeddings.patch_embeddings.projection.weight
    merged = grey.vit.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(merged, getattr(kernel, mode)(1, keepdim=True))
    grey.save_pretrained(tmp_path / "grey")
    again = FromPIXELPretrained(str(tmp_path / "grey")).build().eval()
    assert torch.equal(again(pixels, mask, noise=noise()).loss, output.loss)
    assert FromPIXELPretrained(str(tmp_path), overrides={"num_channels": 1}).build_classifier(2)(pixels).logits.any()


def test_other_channels_than_one_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"overrides\.num_channels: .* have 1 channels, which cannot become 3"):
        FromPIXELPretrained(str(tmp_path), overrides={"num_channels": 3}).build()


def test_unknown_overrides_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overrides: 'hiden_size' is not an option"):
        FromPIXELConfig({"hiden_size": 3}).build()
    with pytest.raises(ValueError, match=r"overrides: 'pool' is not an option"):
        FromPIXELPretrained(str(tmp_path), overrides={"pool": "max"}).build()
    with pytest.raises(ValueError, match=r"name: .* is neither a model on the hub nor a local folder"):
        FromPIXELPretrained(str(tmp_path / "none")).build()
    with pytest.raises(ValueError, match="dtype: 'float31'"):
        FromPIXELConfig(OPTIONS, dtype="float31").build()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 64), r"num_channels: the model takes 1, but strips have 3; set the renderer's colour to gray"),
        ((2, 1, 8, 64), r"image_size: .* height 4 .* they are 8 x 64; set the renderer's patch_size to 4"),
        ((2, 1, 4, 66), r"image_size: .* they are 4 x 66; set the renderer's patch_size to 4"),
        ((2, 1, 4, 68), r"image_size: .* 16 patches, but strips have 17; set the renderer's max_seq_length to 16"),
        ((2, 4, 64), r"pixel_values: strips have the shape \(B,C,H,W\)"),
    ],
)
def test_strips_of_another_size_are_refused(shape, message):
    pixels = torch.zeros(shape, dtype=torch.uint8)
    for model in (make(), make(PIXELForSequenceClassification)):
        with pytest.raises(ValueError, match=message):
            model(pixels)


def test_a_mask_of_another_length_is_refused():
    pixels, mask = strips()
    with pytest.raises(ValueError, match=r"pixel_mask: 2 strips of 16 patches need the shape \(2, 16\), got \(2, 15\)"):
        make()(pixels, mask[:, 1:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 3}, "^hidden_size: 16 must be a multiple of 4 and of num_attention_heads, 3"),
        ({"decoder_hidden_size": 6}, "^decoder_hidden_size: 6 must be a multiple of 4"),
        ({"image_size": [8, 64]}, r"image_size: a strip is .*\[4, n \* 4\], got \[8, 64\]"),
        ({"image_size": [4, 66]}, r"image_size: .* got \[4, 66\]"),
        ({"mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1, got 1.0"),
        ({"pooling": "median"}, "pooling must be one of mean, max, cls, attention, got 'median'"),
    ],
)
def test_impossible_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_official_configuration_loads(tmp_path):
    values = {"model_type": "pixel", "architectures": ["PIXELForPreTraining"], "image_size": [16, 8464]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PIXELConfig)
    assert loaded.num_patches == 529
    assert (loaded.hidden_dropout_prob, loaded.layer_norm_eps) == (0.1, 1e-12)


def test_training_on_one_batch_lowers_the_loss():
    torch.manual_seed(0)
    model = PIXELForPreTraining(config()).train()
    pixels, mask = strips()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(pixels, mask, noise=noise()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.1
