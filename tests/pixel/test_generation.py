import pytest
import torch

from lit_models.pixel import functional
from lit_models.pixel.configuration import PixelLMConfig
from lit_models.pixel.generation import pick_tokens
from lit_models.pixel.modeling import PixelForCausalLM

SIZE = 4
NEVER = 99
"""Not in the vocabulary."""


def build(seed=0, **changes):
    torch.manual_seed(seed)
    options = {
        "image_size": [SIZE, 64 * SIZE],
        "patch_size": SIZE,
        "num_channels": 1,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        **changes,
    }
    return PixelForCausalLM(PixelLMConfig(**options)).eval()


def strips(lengths, width=None, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    pixels = torch.randint(0, 256, (len(lengths), channels, SIZE, width * SIZE), generator=generator)
    mask = functional.pixel_mask(torch.tensor(lengths) - 1, width)
    white = mask.repeat_interleave(SIZE, 1)[:, None, None] == 0
    return pixels.masked_fill(white, 255).to(torch.uint8), mask


def row_of(pixels, mask, row):
    length = int(mask[row].sum())
    return pixels[row : row + 1, ..., : length * SIZE], mask[row : row + 1, :length]


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compact", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reading_equals_teacher_forcing_without_a_cache(layout, attention):
    model = build(pair_layout=layout, attn_implementation=attention, eos_token_id=NEVER)
    pixels, mask = strips([5, 2, 9])
    read = model.read(pixels, mask, max_new_tokens=7)
    assert read.shape == (3, 7)
    given = torch.cat([torch.ones(3, 1, dtype=torch.long), read], 1)
    logits = model(pixels, mask, given).logits
    assert torch.equal(logits[:, :-1].argmax(-1), read)
    for steps in range(1, 8):
        assert torch.equal(model(pixels, mask, given[:, :steps]).logits[:, -1].argmax(-1), read[:, steps - 1])


def test_rows_read_alone_give_the_same():
    model = build(eos_token_id=NEVER)
    pixels, mask = strips([5, 2, 9])
    read = model.read(pixels, mask, max_new_tokens=6)
    for row in range(3):
        assert torch.equal(model.read(*row_of(pixels, mask, row), max_new_tokens=6)[0], read[row])
    assert len({tuple(ids) for ids in read.tolist()}) > 1
    assert torch.equal(model.read(pixels[2:]), model.read(pixels[2:], mask[2:]))


def test_rows_end_by_themselves():
    model = build(eos_token_id=NEVER, pad_token_id=0)
    pixels, mask = strips([5, 2, 9])
    free = model.read(pixels, mask, max_new_tokens=6)
    model.config.eos_token_id = [int(free[1, 2]), 38]
    read = model.read(pixels, mask, max_new_tokens=6)
    for row in range(3):
        ends = torch.isin(free[row], torch.tensor(model.config.eos_token_id)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 6
        assert torch.equal(read[row, :length], free[row, :length])
        assert not read[row, length:].any()
    model.config.eos_token_id = int(free[1, 0])
    assert model.read(*row_of(pixels, mask, 1), max_new_tokens=6).shape == (1, 1)


def test_sampling_follows_the_generator():
    model = build(eos_token_id=NEVER)
    pixels, mask = strips([5, 2, 9])

    def sample(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.read(pixels, mask, 12, do_sample=True, generator=generator, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    greedy = model.read(pixels, mask, 12)
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(1, top_p=1e-6), greedy)
    assert torch.equal(sample(1, temperature=1e-4), greedy)


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    for options, kept in (
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.7}, [0, 2]),
        ({"top_k": 3, "top_p": 0.99}, [0, 1, 2]),
        ({"top_k": 9, "temperature": 2.0}, [0, 1, 2, 3]),
    ):
        drawn = pick_tokens(logits, True, generator=generator, **options)
        share = torch.bincount(drawn, minlength=4) / 4000
        expected = torch.full((4,), -torch.inf)
        expected[kept] = logits[0, kept] / options.get("temperature", 1.0)
        torch.testing.assert_close(share, expected.softmax(0), atol=0.03, rtol=0)
        assert set(drawn.tolist()) == set(kept)


def test_generation_leaves_the_mode_as_it_was():
    model = build(pair_order="random").train()
    model.gradient_checkpointing_enable()
    pixels, mask = strips([5, 2])
    expected = build(pair_order="random").read(pixels, mask, 4)
    assert torch.equal(model.read(pixels, mask, 4), expected)
    assert model.training
    model.continue_strip(pixels, mask, 2)
    assert model.training


def test_finished_processes_wait_for_the_others():
    calls = []

    def others_go_on(done):
        calls.append(done)
        return False

    model = build(eos_token_id=NEVER, pad_token_id=0, norm_pix_loss=False)
    pixels, mask = strips([5])
    model.config.eos_token_id = int(model.read(pixels, mask, 1)[0, 0])
    assert model.read(pixels, mask, 4, all_done=others_go_on).tolist() == [[model.config.eos_token_id, 0, 0, 0]]
    torch.nn.init.zeros_(model.lm_pixel_head.weight)
    assert model.continue_strip(pixels, mask, 4, all_done=others_go_on).mask.tolist() == [[1, 0, 0, 0]]
    assert calls == [True] * 6


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"pair_order": "text_image"}, {}, "pair_order"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens"),
        ({}, {"temperature": 0.0}, "temperature"),
        ({}, {"top_p": 1.5}, "top_p"),
        ({}, {"top_k": 0}, "top_k"),
        ({"bos_token_id": None}, {}, "bos_token_id"),
    ],
)
def test_unfit_reading_is_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        build(**changes).read(*strips([3]), **options)


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_a_trained_model_reads(layout):
    model = build(pair_layout=layout, initializer_range=0.02, pixel_weight=0.0).train()
    pixels, mask = strips([6, 3, 8, 4, 5, 7])
    ids = torch.randint(3, 40, (6, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 4], ids[1:, 4], ids[0, 3] = 1, 2, 2, 2
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 4] = 0
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": ids.masked_fill(attention_mask == 0, -100)}
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        loss = model(pixels, mask, **batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.read(pixels, mask), ids[:, 1:])


# -- continuing --------------------------------------------------------------------------------------------------------

KINDS = {
    "normalised": {},
    "pixels": {"norm_pix_loss": False},
    "binary": {"norm_pix_loss": False, "pixel_loss": "bce"},
    "colour": {"num_channels": 3},
}


def grow(model, pixels, steps, ink="running", binarize=False, count=8):
    """One strip, continued without a cache and in the plainest way."""
    strip = pixels.float() / 255
    statistics = [
        (patch.mean(), (patch.var() + 1e-6).sqrt())
        for patch in functional.patchify(strip, SIZE)[0]
        if patch.var() > 1e-6
    ]
    for _ in range(steps):
        prediction = model(strip).pixel_pred[0, -1]
        if model.config.norm_pix_loss:
            recent = torch.tensor(statistics[-count:])
            prediction = prediction * recent[:, 1].mean() + recent[:, 0].mean()
        elif model.config.pixel_loss == "bce":
            prediction = prediction.sigmoid()
        patch = prediction.clamp(0, 1)
        patch = (patch > 0.5).float() if binarize else patch
        if ink == "running" and patch.var() > 1e-6:
            statistics.append((patch.mean(), (patch.var() + 1e-6).sqrt()))
        strip = torch.cat([strip, functional.unpatchify(patch[None, None], SIZE)], 3)
    return strip


@pytest.mark.parametrize("ink", ["running", "prompt"])
@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_rows_of_different_lengths_equal_plain_growth(kind, binarize, ink):
    model = build(**KINDS[kind])
    channels = model.config.num_channels
    lengths = [5, 2, 9]
    pixels, mask = strips(lengths, channels=channels)
    result = model.continue_strip(pixels, mask, max_new_patches=6, ink_patches=4, ink=ink, binarize=binarize)
    assert result.patches.shape == (3, 6, SIZE * SIZE * channels)
    assert result.mask.all()
    assert result.pixel_values.shape == (3, channels, SIZE, 15 * SIZE)
    assert result.pixel_mask.sum(1).tolist() == [11, 8, 15]
    for row, length in enumerate(lengths):
        expected = grow(model, row_of(pixels, mask, row)[0], 6, ink, binarize, count=4)
        strip = result.pixel_values[row : row + 1, ..., : (length + 6) * SIZE]
        torch.testing.assert_close(strip, expected, rtol=1e-3, atol=1e-3)
        assert (result.pixel_values[row, ..., (length + 6) * SIZE :] == 1).all()
        torch.testing.assert_close(functional.patchify(strip, SIZE)[0, length:], result.patches[row])
    if binarize:
        assert set(result.patches.unique().tolist()) <= {0.0, 1.0}
    assert result.patches.std(1).mean() > 0.05  # they are not all the same


def test_padding_of_the_prompt_does_not_matter():
    model = build()
    pixels, mask = strips([5, 2, 4])
    other = model.continue_strip(
        torch.nn.functional.pad(pixels, (0, 3 * SIZE), value=9), torch.nn.functional.pad(mask, (0, 3)), 5
    )
    result = model.continue_strip(pixels, mask, 5)
    torch.testing.assert_close(other.patches, result.patches)
    torch.testing.assert_close(other.pixel_values[..., : 10 * SIZE], result.pixel_values)
    as_float = model.continue_strip(pixels / 255, mask, 5)
    torch.testing.assert_close(as_float.patches, result.patches)
    whole = model.continue_strip(pixels[:1], None, 5)
    torch.testing.assert_close(whole.patches, result.patches[:1])


def test_black_patches_end_strips_of_plain_pixels():
    model = build(norm_pix_loss=False)
    torch.nn.init.zeros_(model.lm_pixel_head.weight)
    result = model.continue_strip(*strips([5, 2]), 6)
    assert result.mask.tolist() == [[1], [1]]
    assert not result.patches.any()
    assert result.pixel_mask.sum(1).tolist() == [6, 3]
    torch.nn.init.constant_(model.lm_pixel_head.weight, 0.0)
    model.config.norm_pix_loss = True  # where a prediction of zero says nothing about blackness
    assert model.continue_strip(*strips([5, 2]), 6).mask.sum() == 12


def test_strips_without_ink_get_that_of_usual_text():
    model = build()
    torch.nn.init.zeros_(model.lm_pixel_head.weight)
    blank = torch.full((1, 1, SIZE, 3 * SIZE), 255, dtype=torch.uint8)
    result = model.continue_strip(blank, max_new_patches=2)
    torch.testing.assert_close(result.patches, torch.full((1, 2, 16), functional.TYPICAL_INK[0]))


@torch.no_grad()
def test_the_stop_head_ends_rows_one_by_one():
    model = build(stop_head=True)
    pixels, mask = strips([5, 2, 9])
    model.lm_stop_head.bias.fill_(-1e3)
    endless = model.continue_strip(pixels, mask, 6)
    assert endless.mask.all()
    model.lm_stop_head.bias.fill_(0.0)
    logits = model(pixels, mask).stop_logits[torch.arange(3), mask.sum(1) - 1].sort().values
    model.lm_stop_head.bias -= logits[1:].mean()  # between the highest and the next one
    result = model.continue_strip(pixels, mask, 6)
    first = int(model(pixels, mask).stop_logits[torch.arange(3), mask.sum(1) - 1].argmax())
    assert result.mask[first].sum() == 1
    assert not result.patches[first, 0].any()
    assert (result.patches[first, 1:] == 1).all()
    others = [row for row in range(3) if row != first]
    assert (result.mask[others, 1] == 1).all()
    torch.testing.assert_close(result.patches[others, 0], endless.patches[others, 0])
    for row in others:  # a row is white after its end and goes on as before until then
        length = int(result.mask[row].sum())
        going = length - 1 if length < result.mask.shape[1] else length
        torch.testing.assert_close(result.patches[row, :going], endless.patches[row, :going])
        assert (result.patches[row, length:] == 1).all()


@torch.no_grad()
def test_a_trained_model_continues_a_pattern():
    model = build(norm_pix_loss=False, stop_head=True, initializer_range=0.02).train()
    generator = torch.Generator().manual_seed(0)
    period = (torch.rand(1, 3, 16, generator=generator) > 0.5).float()
    whole = torch.cat([period.repeat(1, 3, 1), torch.zeros(1, 1, 16)], 1)  # nine patches and the separator
    strip = functional.unpatchify(whole, SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        with torch.enable_grad():
            loss = model(strip).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = model.continue_strip(strip[..., : 4 * SIZE], max_new_patches=12, binarize=True)
    assert torch.equal(result.patches, whole[:, 4:])
    assert torch.equal(result.pixel_values[..., : 10 * SIZE], strip)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"image_size": [2 * SIZE, 64]}, {}, "image_size: only strips of one row"),
        ({}, {"max_new_patches": 0}, "max_new_patches"),
        ({}, {"ink_patches": 0}, "ink_patches"),
        ({}, {"pixel_mask": torch.zeros(1, 3)}, "pixel_mask: a strip without any attended patch"),
        ({}, {"pixel_mask": torch.ones(1, 4)}, "pixel_mask has shape"),
    ],
)
def test_unfit_continuation_is_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        build(**changes).continue_strip(strips([3])[0], **options)
