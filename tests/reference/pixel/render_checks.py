"""Comparison of renderers with stored strips, glyphs and reading orders."""

import math

import numpy as np

from datamodules.rendering import PygameRenderer, TextRenderer, bidi
from datamodules.rendering.fonts import FontChain, resolve
from datamodules.rendering.shaping import shape_run


def renderers(data):
    options = {
        "max_seq_length": data["max_seq_length"],
        "patch_size": data["pixels_per_patch"],
        "font_size": data["font_size"],
        "dpi": data["dpi"],
        "truncation": "official",
    }
    return PygameRenderer(**options), TextRenderer(**options)


def strips(renderer, data):
    """Name, stored record and drawn strip of every case."""
    draw = {
        "single": renderer.render,
        "pair": lambda texts: renderer.render_pair(*texts),
        "words": renderer.render_words,
    }
    for kind, render in draw.items():
        for number, case in enumerate(data[kind]):
            yield f"{kind}_{number}", case, render(case["words" if kind == "words" else "text"])


def check_released(data, images):
    """PyGame's strips are equal to the pixel."""
    renderer, _ = renderers(data)
    seen = set()
    for name, case, strip in strips(renderer, data):
        assert strip.num_text_patches == case["num_text_patches"], name
        assert list(strip.sep_patches) == case["sep_patches"], name
        assert list(strip.word_starts or ()) == case.get("word_starts", []), name
        if "n_attend" in case:
            assert strip.num_attended == case["n_attend"], name
        if name in images:
            seen.add(name)
            np.testing.assert_array_equal(strip.pixel_values, images[name].numpy(), err_msg=name)
    assert seen == set(images)


def check_widths(data):
    """Other rasterisers take about as many patches."""
    _, renderer = renderers(data)
    for name, case, strip in strips(renderer, data):
        stored = case["num_text_patches"]
        assert abs(strip.num_text_patches - stored) <= max(1, 0.03 * stored), name
        assert len(strip.sep_patches) == len(case["sep_patches"]), name


def check_shaping(data):
    chain = FontChain(resolve(None), data["scale"] / 64)
    font = chain.faces[0].font
    assert font.scale == (data["scale"], data["scale"])
    for case in data["shape"]:
        infos, positions = shape_run(font, case["text"], case["direction"] == "rtl")
        assert [font.glyph_to_string(info.codepoint) for info in infos] == case["glyphs"]
        assert [info.cluster for info in infos] == case["clusters"]
        assert [position.x_advance for position in positions] == case["advances_26_6"]
        assert [[position.x_offset, position.y_offset] for position in positions] == case["offsets_26_6"]
        width = sum(position.x_advance for position in positions) / 64
        assert width == case["width_px"]
        assert max(1, math.ceil((math.ceil(width) + 4) / 16)) == case["num_text_patches_16"]
    for case in data["bidi"]:
        text = case["text"]
        assert bidi.base_level(text) == case["base_level"]
        assert bidi.embedding_levels(text) == case["levels"]
        runs = bidi.visual_order(bidi.runs(text))
        parts = [text[run.start : run.end] for run in runs]
        shown = "".join(part[::-1] if run.level % 2 else part for part, run in zip(parts, runs, strict=True))
        assert shown == case["visual"]
