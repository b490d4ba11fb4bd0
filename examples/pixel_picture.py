"""Lines in six scripts as a pixel language model sees them, and below each what it expects next, patch by patch.

`python examples/pixel_picture.py [FILE.png]` first trains `pixel/multilingual.yaml`, a few minutes on a CPU, unless its
export is there. Every predicted patch stands below the true one and is predicted from all true patches left of it.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.rendering import TextRenderer
from lit_models.cli import main
from lit_models.pixel import PixelForCausalLM
from lit_models.pixel.functional import denormalize_patches, patch_statistics, unpatchify

LINES = (
    "Everyone has the right to freedom of thought",
    "لكل شخص الحق في حرية التفكير والضمير والدين",
    "प्रत्येक व्यक्ति को विचार, अन्तरात्मा और धर्म की",
    "ทุกคนมีสิทธิในอิสรภาพแห่งความคิด มโนธรรม",
    "人人有思想、良心和宗教自由的权利",
    "😀 🎉 🚀 ❤️ 🌍 👍",
)
PATCHES = 20
ZOOM, GAP = 3, 6


@torch.no_grad()
def predicted(model: PixelForCausalLM, pixels: Tensor) -> Tensor:
    """Next patches with the contrast of the true ones, (1, H, W) in [0, 1]; nothing predicts the first one."""
    output = model(pixels)
    mean, scale = patch_statistics(output.patches)
    patches = denormalize_patches(output.pixel_pred.roll(1, 1), mean, scale).clamp(0, 1)
    patches[:, 0] = 0.5
    return unpatchify(patches, model.config.patch_size)[:, 0]


def picture(model: PixelForCausalLM) -> Image.Image:
    """Every line, and its prediction in blue."""
    renderer = TextRenderer(PATCHES, fonts=["noto"])
    rows = []
    for text in LINES:
        strip = renderer.render(text)
        pixels = torch.from_numpy(strip.trimmed)[None, None]
        guess = (255 * predicted(model, pixels)[0]).round().byte().numpy()
        height, width = strip.pixel_values.shape
        seen, expected = np.full((2, height, width, 3), 255, np.uint8)
        seen[:, : guess.shape[1]] = strip.trimmed[..., None]
        expected[:, : guess.shape[1], :2] = guess[..., None]
        rows += [seen, expected, np.full((GAP, width, 3), 255, np.uint8)]
    image = Image.fromarray(np.concatenate(rows[:-1]))
    return image.resize((ZOOM * image.width, ZOOM * image.height), Image.Resampling.NEAREST)


if __name__ == "__main__":
    export = Path(os.environ.get("LIT_RUNS", "runs")) / "pixel-multilingual/export/model"
    if not export.is_dir():
        main(["fit", "--config", "pixel/multilingual.yaml"])
    file = sys.argv[1] if len(sys.argv) > 1 else "pixels.png"
    picture(PixelForCausalLM.from_pretrained(export).eval()).save(file)
    print(file)
