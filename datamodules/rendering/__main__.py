"""`python -m datamodules.rendering TEXT FILE.png`: look at a text as a pixel language model sees it."""

import argparse
import sys
from pathlib import Path

from datamodules.rendering.harfbuzz import TextRenderer


def main(args: list[str] | None = None) -> None:
    """Draw a text, or a pair of texts, and write a PNG.

    Args:
        args: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m datamodules.rendering", description=__doc__)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="one text, or two for a pair")
    parser.add_argument("file", help="PNG to write")
    parser.add_argument("--max_seq_length", type=int, default=1024, help="patches of the strip")
    parser.add_argument("--patch_size", type=int, default=16, help="pixels")
    parser.add_argument("--font_size", type=float, default=8.0, help="points")
    parser.add_argument("--dpi", type=int, default=120, help="dots per inch")
    parser.add_argument("--mode", choices=["continuous", "words", "mono", "bigrams"], default="continuous")
    parser.add_argument("--colour", choices=["gray", "rgb", "binary"], default="gray")
    parser.add_argument("--fonts", nargs="+", help="font files in the order they are tried, or noto")
    parser.add_argument("--rtl_order", choices=["visual", "logical"], default="visual")
    parser.add_argument("--zoom", type=int, default=1, help="enlargement")
    options = vars(parser.parse_args(args))
    texts, file, zoom = (options.pop(name) for name in ("texts", "file", "zoom"))
    if len(texts) > 2:
        parser.error("give one text or two, in quotation marks, and then the file")
    try:
        renderer = TextRenderer(**options)
        strip = renderer.render(texts[0]) if len(texts) == 1 else renderer.render_pair(*texts)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from PIL import Image

    image = Image.fromarray(strip.trimmed)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)
    print(f"{file}: {strip.num_text_patches} patches of {strip.patch_size} pixels, separators at {strip.sep_patches}")


if __name__ == "__main__":
    main()
