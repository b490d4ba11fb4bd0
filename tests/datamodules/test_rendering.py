import math
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from datamodules.rendering import PygameRenderer, TextRenderer, bidi
from datamodules.rendering.__main__ import main
from datamodules.rendering.fonts import FontChain, bundled, resolve

LATIN = "The quick brown fox; “naïve” café, Ångström – AVATAR ffi. Jj"
TEXTS = {
    "latin": LATIN,
    "arabic": "مرحبا بالعالم، كتبتُ 1990 رسالة (اليوم) in English",
    "hebrew": "abc אבג def, 12.5 שלום!",
    "hindi": "नमस्ते दुनिया, हिंदी क्षत्रिय",
    "thai": "สวัสดีชาวโลก ภาษาไทยน้ำ",
    "chinese": "你好世界，天气很好。日本語テスト ok",
    "emoji": "😀🎉👍🏽 ok 🚀❤️ 👨\u200d👩\u200d👧 1",
}


@pytest.fixture(scope="module")
def noto():
    return TextRenderer(128, fonts=["noto"])


def ink(strip):
    """Pixels before the last separator, as darkness."""
    return 255 - strip.pixel_values[:, : strip.patch_size * strip.num_text_patches].astype(int)


@pytest.mark.parametrize("name", TEXTS)
def test_strips_are_the_same_however_they_are_drawn(noto, name):
    text = TEXTS[name]
    once = noto.render(text).pixel_values
    assert (once < 128).sum() > 100
    assert once.dtype == np.uint8
    assert once.shape == (16, 16 * 128)
    np.testing.assert_array_equal(once, noto.render(text).pixel_values)
    np.testing.assert_array_equal(once, TextRenderer(128, fonts=["noto"], cache=False).render(text).pixel_values)
    copy = pickle.loads(pickle.dumps(noto))
    np.testing.assert_array_equal(once, copy.render(text).pixel_values)
    assert copy.fingerprint() == noto.fingerprint()
    # What was drawn before must not matter, be it at other fractions of a pixel.
    other = TextRenderer(128, fonts=["noto"])
    other.render("".join(reversed(text)))
    other.render("x" + text)
    np.testing.assert_array_equal(once, other.render(text).pixel_values)


def draw(renderer):
    return [renderer.render(text).pixel_values for text in TEXTS.values()]


def test_workers_draw_the_same(noto):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for here, there in zip(draw(noto), pool.submit(draw, noto).result(), strict=True):
            np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("seed", range(20))
def test_geometry(seed):
    draws = random.Random(seed)
    patch = draws.choice([8, 16, 24])
    renderer = TextRenderer(draws.randint(8, 40), patch, font_size=patch / 2, dpi=draws.choice([96, 120]))
    words = LATIN.split()
    text, other = (" ".join(draws.choices(words, k=draws.randint(0, 12))) for _ in range(2))
    limit = patch * (renderer.max_seq_length - 1)

    def after(x):
        return min(patch * math.ceil(x / patch), limit)

    strip = renderer.render(text)
    end = after(2 + renderer.width(text) + 2)
    assert strip.sep_patches == (end // patch,)
    assert strip.num_text_patches == end // patch
    assert strip.num_attended == min(end // patch + 1, renderer.max_seq_length)
    assert (strip.pixel_values[:, end : end + patch] == 0).all()
    assert (strip.pixel_values[:, end + patch :] == 255).all()
    assert (strip.pixel_values[:, :1] == 255).all()
    assert strip.trimmed.shape == (patch, patch * strip.num_attended)

    pair = renderer.render_pair(text, other)
    first, second = (math.ceil((2 + renderer.width(part) + 2) / patch) for part in (text, other))
    if first + second + 2 <= renderer.max_seq_length:
        assert pair.sep_patches == (first, first + 1 + second)
        np.testing.assert_array_equal(pair.pixel_values[:, : patch * first], strip.pixel_values[:, : patch * first])
    else:
        assert pair.sep_patches[0] < pair.sep_patches[1] <= renderer.max_seq_length - 1
        assert pair.sep_patches[1] >= renderer.max_seq_length - 3  # no room is wasted
    assert pair.num_text_patches == pair.sep_patches[1]

    listed = renderer.render_words(words)
    x, starts = 2, [0]
    for word in words[:-1]:
        x = after(x + renderer.width(word + " "))
        starts.append(x // patch)
        if x == limit:
            break
    else:
        x = after(x + renderer.width(words[-1]) + 2)
        starts.append(x // patch)
    assert listed.word_starts == tuple(starts)
    assert listed.sep_patches == (x // patch,)


@pytest.mark.parametrize(("first", "second"), [(LATIN * 9, "short"), ("short", LATIN * 9), (LATIN * 9, LATIN * 9)])
def test_both_texts_of_a_long_pair_are_kept(first, second):
    renderer = TextRenderer(31)
    strip = renderer.render_pair(first, second)
    a, b = strip.sep_patches
    assert b in (29, 30)
    for text, low, high in ((first, 0, a), (second, a + 1, b)):
        part = 255 - strip.pixel_values[:, 16 * low : 16 * high].astype(int)
        assert part.sum() > 0
        whole = ink(renderer.render(text))
        if text == "short":
            np.testing.assert_array_equal(part, whole)
        else:  # the beginning of the text, up to the last character that fits
            columns = 16 * (high - low) - 32
            np.testing.assert_array_equal(part[:, :columns], whole[:, :columns])
            assert high - low >= 14
    official = TextRenderer(31, truncation="official").render_pair(LATIN * 9, "short")
    assert official.sep_patches == (30, 30)


def test_truncation_keeps_clusters_whole():
    renderer = TextRenderer(8)
    for length in range(1, 40):
        text = "xe\u0301" * length
        kept = renderer.prefix(text, 60)
        assert text.startswith(kept)
        assert not text[len(kept) :].startswith("\u0301")
        assert renderer.width(kept) + 4 <= 60


@pytest.mark.parametrize("text", ["", "\x00\x07\x1b", "\u200b", "\u200d\ufe0f"])
def test_nothing_to_draw_is_a_blank_patch(text):
    strip = TextRenderer(16).render(text)
    assert strip.sep_patches == (1,)
    assert (ink(strip) == 0).all()


def test_blanks_controls_and_surrogates():
    renderer = TextRenderer(32)
    for text, same in [("a\nb\tc\r", "a b c "), ("a\x00b\x1fc", "abc"), ("a\ud800b", "a\ufffdb")]:
        np.testing.assert_array_equal(renderer.render(text).pixel_values, renderer.render(same).pixel_values)
    assert renderer.width("a  b") > renderer.width("a b") > renderer.width("ab")


def test_a_long_text_is_cut():
    renderer = TextRenderer(64)
    for text in ("word " * 250_000, "x" * 1_000_000, "e\u0301" * 300_000, "好" * 500_000, "a" + "\u0301" * 500_000):
        strip = renderer.render(text)
        assert strip.pixel_values.shape == (16, 1024)
        part = strip.pixel_values if text.startswith("a") else renderer.render(text[:400]).pixel_values
        np.testing.assert_array_equal(strip.pixel_values, part)
    assert renderer.render("word " * 250_000).sep_patches == (63,)


@pytest.mark.parametrize("mode", ["continuous", "words", "mono", "bigrams"])
def test_a_long_right_to_left_text_keeps_its_beginning(mode):
    text = " ".join(f"{number} שלום" for number in range(100_000))
    strip = TextRenderer(32, fonts=["noto"], mode=mode).render(text, offsets=True)
    spans = [span for span in strip.offset_mapping if span != (0, 0)]
    assert min(start for start, _ in spans) == 0
    assert max(end for _, end in spans) < 100
    assert spans[-1][0] < spans[0][0]  # read from the right


@pytest.mark.parametrize("mode", ["continuous", "words", "mono", "bigrams"])
@pytest.mark.parametrize("text", [LATIN, "WWWW MMMM ", TEXTS["arabic"], "ككككك للللل ", "iiiiii llllll "])
def test_looking_at_the_beginning_of_a_long_text_changes_nothing(text, mode, monkeypatch):
    text = (text + " ") * (16_000 // len(text))
    seen = TextRenderer(512, fonts=["noto"], mode=mode).render(text).pixel_values
    monkeypatch.setattr("datamodules.rendering.harfbuzz.CHUNK", 1 << 30)
    np.testing.assert_array_equal(seen, TextRenderer(512, fonts=["noto"], mode=mode).render(text).pixel_values)


def test_equal_words_are_equal_pixels():
    """Words begin on whole pixels, on one baseline."""
    renderer = TextRenderer(64)
    strip = renderer.render("queue lilac queue")
    begin = 2 + renderer.width("queue lilac ")
    width = renderer.width("queue")
    dark = ink(strip)
    np.testing.assert_array_equal(dark[:, 2 : 2 + width], dark[:, begin : begin + width])
    ace, deep = ink(renderer.render("ace")), ink(renderer.render("acegp"))
    np.testing.assert_array_equal(ace[:, 2:18], deep[:, 2:18])


def test_width_adds_up():
    renderer = TextRenderer(512)
    exact = sum(position.x_advance for position in _positions(renderer, LATIN)) / 64
    assert abs(renderer.width(LATIN) - exact) <= 0.5 * len(LATIN.split())
    assert renderer.width(LATIN + " " + LATIN) == renderer.width(LATIN + " ") + renderer.width(LATIN)


def _positions(renderer, text):
    from datamodules.rendering.shaping import shape_run

    return shape_run(renderer.chain.faces[0].font, text, False)[1]


@pytest.mark.parametrize("name", ["latin", "hebrew", "arabic", "hindi", "thai", "chinese", "emoji"])
@pytest.mark.parametrize("order", ["visual", "logical"])
@pytest.mark.parametrize("mode", ["continuous", "words", "mono", "bigrams"])
def test_offsets_cover_the_text(name, order, mode):
    renderer = TextRenderer(128, fonts=["noto"], rtl_order=order, mode=mode)
    text = TEXTS[name]
    strip = renderer.render(text, offsets=True)
    covered = set()
    for patch, (start, end) in enumerate(strip.offset_mapping):
        assert 0 <= start <= end <= len(text)
        covered |= set(range(start, end))
        if (start, end) == (0, 0) and patch < strip.num_text_patches:
            assert (ink(strip)[:, 16 * patch + 3 : 16 * patch + 13] == 0).all(), patch
    missing = {number for number in range(len(text)) if text[number] != " "} - covered
    assert not missing
    assert strip.offset_mapping[strip.num_text_patches :] == ((0, 0),) * (128 - strip.num_text_patches)


def test_offsets_of_latin_text_are_in_place():
    renderer = TextRenderer(64)
    text = "iiii WWWW iiii"
    strip = renderer.render(text, offsets=True)
    for number in range(1, len(text)):
        x = 2 + renderer.width(text[:number]) + 1  # a pixel right of the character's left edge, up to rounding
        start, end = strip.offset_mapping[x // 16]
        assert start - 1 <= number < end + 1
    pair = renderer.render_pair(text, "second one", offsets=True)
    begin = pair.sep_patches[0] + 1
    assert pair.offset_mapping[begin][0] == 0
    assert max(end for _, end in pair.offset_mapping[begin:]) == len("second one")


def test_logical_order_is_reading_order():
    text = "אבגדהוז חטיכלמנ abc def"
    renderer = TextRenderer(64, fonts=["noto"], rtl_order="logical")
    strip = renderer.render(text, offsets=True)
    starts = [start for start, end in strip.offset_mapping if end]
    assert starts == sorted(starts)
    visual = TextRenderer(64, fonts=["noto"]).render(text, offsets=True)
    shown = [start for start, end in visual.offset_mapping if end]
    assert shown != sorted(shown)
    for latin in ("plain text", "größer, Größe"):
        a, b = (TextRenderer(64, fonts=["noto"], rtl_order=order).render(latin) for order in ("visual", "logical"))
        np.testing.assert_array_equal(a.pixel_values, b.pixel_values)


def test_direction_can_be_set():
    auto, rtl = (TextRenderer(64, fonts=["noto"], direction=direction) for direction in ("auto", "rtl"))
    text = "abc אבג!"
    assert not np.array_equal(auto.render(text).pixel_values, rtl.render(text).pixel_values)
    assert np.array_equal(auto.render("אבג abc!").pixel_values, rtl.render("אבג abc!").pixel_values)


def test_modes_put_text_into_cells():
    words = TextRenderer(64, mode="words")
    strip = words.render("one twentytwo three")
    np.testing.assert_array_equal(
        strip.pixel_values, TextRenderer(64).render_words(["one", "twentytwo", "three"]).pixel_values
    )
    mono = TextRenderer(64, mode="mono")
    strip = mono.render("abcabc")
    assert strip.num_text_patches == 3
    patches = strip.pixel_values[:, :48].reshape(16, 3, 16).swapaxes(0, 1)
    one, two = patches[0], mono.render("bcabca").pixel_values[:, 8:24]
    assert not np.array_equal(patches[0], patches[1])
    np.testing.assert_array_equal(one[:, :8], two[:, 8:])
    bigrams = TextRenderer(64, mode="bigrams")
    strip = bigrams.render("theme the WWW")
    assert strip.num_text_patches == 3 + 2 + 2
    patches = [strip.pixel_values[:, 16 * k : 16 * k + 16] for k in range(7)]
    np.testing.assert_array_equal(patches[0], patches[3])  # "th" twice
    assert (patches[5] < 255).any(axis=0).sum() >= 15  # "WW" is wider than a patch and is narrowed into it
    arabic = TextRenderer(64, mode="bigrams", fonts=["noto"])
    right, left = (arabic.render(text) for text in ("مرحبا", "با"))
    assert right.num_text_patches == 3
    assert left.num_text_patches == 1


def test_colours(noto):
    text = "A ❤️"
    gray = TextRenderer(32, fonts=["noto"]).render(text)
    colour = TextRenderer(32, fonts=["noto"], colour="rgb").render(text)
    assert colour.pixel_values.shape == (16, 512, 3)
    np.testing.assert_array_equal(colour.pixel_values, np.repeat(gray.pixel_values[..., None], 3, 2))  # outlines only
    binary = TextRenderer(32, fonts=["noto"], colour="binary").render(text)
    np.testing.assert_array_equal(binary.pixel_values, np.where(gray.pixel_values > 127, 255, 0))


@pytest.fixture(scope="module")
def colour_font(tmp_path_factory):
    """A font with one red and transparent picture, built in code."""
    fonttools = pytest.importorskip("fontTools.fontBuilder")
    from fontTools.colorLib.builder import buildCOLR, buildCPAL
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    builder = fonttools.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "heart", "square"])
    builder.setupCharacterMap({0x2764: "heart"})
    pen = TTGlyphPen(None)
    for step, point in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "heart": square, "square": square})
    builder.setupHorizontalMetrics({name: (1000, 100) for name in (".notdef", "heart", "square")})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Emoji", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.font["COLR"] = buildCOLR({"heart": [("square", 0)]})
    builder.font["CPAL"] = buildCPAL([[(1.0, 0.0, 0.0, 1.0)]])
    path = tmp_path_factory.mktemp("fonts") / "TestEmoji.ttf"
    builder.save(path)
    return str(path)


def test_colour_glyphs(colour_font):
    fonts = [bundled("DejaVuSans.ttf"), colour_font]
    pixels = TextRenderer(16, fonts=fonts, colour="rgb").render("❤\ufe0f").pixel_values[:, :16].reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() > 30
    gray = TextRenderer(16, fonts=fonts).render("❤\ufe0f").pixel_values[:, :16]
    assert (abs(gray.astype(int) - round(255 * 0.299)) <= 1).sum() > 30  # luminance of red
    plain = TextRenderer(16, fonts=fonts, colour="rgb").render("❤\ufe0e").pixel_values[:, :16]
    assert (plain[..., 0] == plain[..., 1]).all()  # asked for as text: the outline of the first font


def draw_all(renderer, *texts):
    return [renderer.render(text) for text in texts]


def test_missing_scripts_are_named_once():
    renderer = TextRenderer(32)
    with pytest.warns(UserWarning, match=r"DEVANAGARI characters, such as U\+0928.*lit-models\[fonts\]") as caught:
        draw_all(renderer, "नमस्ते", "दुनिया")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="THAI"):
        renderer.render("ไทย")
    assert renderer.chain.missing.keys() == {"DEVANAGARI", "THAI"}
    assert (ink(renderer.render("ไทย")) > 0).any()  # boxes, not nothing
    with pytest.raises(ValueError, match=r"CJK characters, such as U\+4F60"):
        TextRenderer(32, on_missing="raise").render("你好")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fonts": ["/no/such/font.ttf"]}, r"renderer.fonts: there is no font file '/no/such/font.ttf'"),
        ({"fonts": []}, "renderer.fonts: the list is empty"),
        ({"fonts": [__file__]}, "is no font that HarfBuzz can read"),
        ({"max_seq_length": 2}, "renderer.max_seq_length: 2 patches"),
        ({"patch_size": 1}, "renderer.patch_size: 1 pixels"),
        ({"font_size": 0}, "renderer.font_size and renderer.dpi must be positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TextRenderer(**options)


def test_bad_texts():
    renderer = TextRenderer(16)
    for text in (None, 3, ["a"], b"a"):
        with pytest.raises(TypeError, match="the renderer takes str, got"):
            renderer.render(text)
    with pytest.raises(ValueError, match="words: the list is empty"):
        renderer.render_words([])


def test_fonts_from_the_environment(monkeypatch):
    assert [Path(path).name for path in resolve(None)] == ["DejaVuSans.ttf"]
    monkeypatch.setenv("LIT_FONTS", f"{bundled('DejaVuSerif.ttf')}:noto")
    assert [Path(path).name for path in resolve(None)][:2] == ["DejaVuSerif.ttf", "NotoSans[wght].ttf"]
    assert [Path(path).name for path in resolve([bundled("DejaVuSans.ttf")])] == ["DejaVuSans.ttf"]
    monkeypatch.setenv("LIT_FONTS", "/none.ttf")
    with pytest.raises(ValueError, match=r"LIT_FONTS: there is no font file '/none.ttf'"):
        TextRenderer(16)


def test_fallback_fonts_draw_what_the_first_one_lacks():
    chain = FontChain(resolve(["noto"]), 13.3)
    names = [Path(path).name for path in chain.paths]
    for text, font in [
        ("Grüße", "NotoSans[wght].ttf"),
        ("ไทย", "NotoSansThai[wght].ttf"),
        ("नमः", "NotoSansDevanagari[wght].ttf"),
        ("你", "NotoSansCJK-VF.otf.ttc"),
        ("😀", "NotoEmoji[wght].ttf"),
    ]:
        assert [names[number] for number, _, _ in chain.runs(text)] == [font]
    assert [text for _, start, end in chain.runs("a😀 b") for text in ["a😀 b"[start:end]]] == ["a", "😀", " b"]


def test_fit_makes_letters_smaller():
    tall = TextRenderer(64, fonts=["noto"])
    fitted = TextRenderer(64, fonts=["noto"], fit=True)
    ascent, descent = fitted.chain.extents()
    assert sum(tall.chain.extents()) > 16 >= round(ascent + descent, 1) - 0.1
    assert fitted.width(LATIN) < tall.width(LATIN)


@pytest.mark.parametrize("seed", range(200))
def test_stretches_do_not_change_levels(seed):
    draws = random.Random(seed)
    letters = "abאבمر 12,.+-$%()\u0651\u05b0\u200e\u200f!?\u202b\u202c /"
    text = "".join(draws.choices(letters, k=draws.randint(1, 30)))
    base = bidi.base_level(text)
    slow = bidi._resolve(text, base)
    blanks = len(text) - len(text.rstrip())
    slow[len(text) - blanks :] = [base] * blanks
    assert bidi.embedding_levels(text) == slow


def test_pygame():
    renderer = PygameRenderer(32)
    strip = renderer.render("Hello, world!")
    np.testing.assert_array_equal(
        strip.pixel_values, pickle.loads(pickle.dumps(renderer)).render("Hello, world!").pixel_values
    )
    assert renderer.width("Hello, world!") + 4 <= 16 * strip.num_text_patches
    assert renderer.render("a\ud800\x00b").num_text_patches >= 1
    pair = renderer.render_pair("long " * 100, "short")
    assert pair.sep_patches[0] < pair.sep_patches[1]
    with pytest.raises(ValueError, match="cannot tell where characters are"):
        renderer.render("a", offsets=True)
    assert renderer.fingerprint()["backend"] == "pygame"
    assert renderer.fingerprint() != TextRenderer(32).fingerprint()


def test_the_command_writes_a_picture(tmp_path, capsys):
    from PIL import Image

    main(["Hello", "world", str(tmp_path / "pair.png"), "--max_seq_length", "32", "--zoom", "2"])
    image = Image.open(tmp_path / "pair.png")
    strip = TextRenderer(32).render_pair("Hello", "world")
    assert image.size == (2 * strip.trimmed.shape[1], 32)
    np.testing.assert_array_equal(np.asarray(image)[::2, ::2], strip.trimmed)
    assert "separators at" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no font file"):
        main(["Hello", str(tmp_path / "a.png"), "--fonts", "none.ttf"])
