"""Strings of 2,000 characters drawn per CPU second on one core, against PyGame and PangoCairo; sides take turns.

`python benchmarks/render.py [--strings 100] [--repetitions 3]`

PyGame is `PygameRenderer`, which draws as the released code does. PangoCairo takes part where it is installed
(`pip install pangocairocffi`, and Pango with the Noto fonts from the system). "cold" draws every string for the first
time, "warm" again. Words of each language are shuffled, so that no string is drawn twice; the English film reviews are
whole sentences as they come.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

LENGTH, PATCHES = 2000, 1024
SENTENCES = {
    "en": "the quick brown fox jumps over a lazy dog while forty-two pigeons look on and nobody says a word about it",
    "ar": "كل إنسان يولد حرا وله كرامة وحقوق مثل غيره والناس يكتبون الكلمات من اليمين إلى اليسار في 1990 كتابا جديدا",
    "hi": "सभी मनुष्य जन्म से स्वतंत्र हैं और उनके अधिकार समान हैं क्योंकि शब्द बाएँ से दाएँ लिखे जाते हैं नमस्ते दुनिया",
    "th": "มนุษย์ทุกคนเกิดมามีอิสระ และเสมอภาคกัน ในศักดิ์ศรีและสิทธิ ต่างมีเหตุผล และควรปฏิบัติต่อกัน ด้วยน้ำใจ สวัสดีชาวโลก",
    "zh": "人人生而自由 在尊严和权利上一律平等 他们赋有理性和良心 今天天气很好 我们去公园散步 看见许多鸟和花",
    "mixed": "hello мир 你好 नमस्ते مرحبا สวัสดี 😀 Größe Ωμέγα שלום 12.5",
    "emoji": "😀 🎉 ok 🚀 nice ❤️ 🐙 hm 🍎 🌍 👍 wow",
}


def shuffled(words: list[str], count: int) -> list[str]:
    """Strings of random words."""
    draws = random.Random(0)
    return [" ".join(draws.choices(words, k=LENGTH))[:LENGTH] for _ in range(count)]


def reviews(count: int) -> list[str]:
    """Real English, cut at every 2,000th character."""
    from datamodules.snippets import load_snippets

    text = " ".join(snippet.text for snippet in load_snippets())
    return [text[start : start + LENGTH] for start in range(0, len(text) - LENGTH, LENGTH)][:count]


def pango() -> Callable[[str], np.ndarray] | None:
    """Draw as PIXEL's PangoCairo renderer does, in grey."""
    try:
        import cairocffi
        import pangocairocffi
        import pangocffi
    except (ImportError, OSError) as error:
        print(f"without PangoCairo: {error}")
        return None
    width, height = 16 * PATCHES, 16
    font = pangocffi.FontDescription()
    font.family = "Noto Sans"
    font.set_absolute_size(pangocffi.units_from_double(8 * 120 / 72))

    def draw(text: str) -> np.ndarray:
        surface = cairocffi.ImageSurface(cairocffi.FORMAT_A8, width, height)
        context = cairocffi.Context(surface)
        layout = pangocairocffi.create_layout(context)
        layout.font_description = font
        layout.text = text
        _, extents = layout.get_extents()
        context.move_to(2, 8 - pangocffi.units_to_double(extents.height) / 2)
        pangocairocffi.show_layout(context, layout)
        rows = np.frombuffer(surface.get_data(), np.uint8).reshape(height, surface.get_stride())
        return 255 - rows[:, :width]

    return draw


def rate(draw: Callable[[str], object], strings: list[str]) -> float:
    """Strings per CPU second."""
    start = time.process_time()
    for text in strings:
        draw(text)
    return len(strings) / (time.process_time() - start)


def main() -> None:
    """Print one row per language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    from datamodules.rendering import PygameRenderer, TextRenderer
    from datamodules.rendering.fonts import resolve

    texts = {name: shuffled(sentence.split(), options.strings) for name, sentence in SENTENCES.items()}
    texts["reviews"] = reviews(10 * options.strings)
    peers: dict[str, Callable[[str], object] | None] = {
        "pygame": PygameRenderer(PATCHES, font=resolve(["noto"])[0]).render,
        "pango": pango(),
    }
    print(f"{'':8} {'cold':>7} {'warm':>7} {'pygame':>7} {'pango':>7}   warm / pygame, warm / pango, cold / pango")
    for name, strings in texts.items():
        rates: dict[str, list[float]] = {side: [] for side in ("cold", "warm", "pygame", "pango")}
        for _ in range(options.repetitions):
            ours = TextRenderer(PATCHES, fonts=["noto"])
            rates["cold"].append(rate(ours.render, strings))
            rates["warm"].append(rate(ours.render, strings))
            for side, draw in peers.items():
                if draw is not None:
                    rates[side].append(rate(draw, strings[: options.strings]))
        cold, warm, pygame, pangocairo = (statistics.median(runs) if runs else float("nan") for runs in rates.values())
        ratios = f"{warm / pygame:5.2f} {warm / pangocairo:5.2f} {cold / pangocairo:5.2f}"
        print(f"{name:8} {cold:7.0f} {warm:7.0f} {pygame:7.0f} {pangocairo:7.0f}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
