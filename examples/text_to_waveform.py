"""A few sounds from texts, and one picture of all of them.

`python examples/text_to_waveform.py [FOLDER] [OUT]` loads the pipeline that training exported to FOLDER and writes WAV
files into the folder OUT. `lit-models fit --config diffusion/folkwave.yaml` trains one on a laptop in
minutes.
"""

import os
import sys
from pathlib import Path

import torch

from lit_models.diffusion.pipeline import TextToWaveformPipeline
from lit_models.diffusion.sounds import measure, write_picture, write_sound

PROMPTS = (
    "a solo for flute in the high register, medium, in 3/4 time",
    "a solo for flute in the low register, medium, in 3/4 time",
    "a solo for violin in the high register, medium, in 3/4 time",
    "a solo for harp in the low register, medium, in 3/4 time",
)
EXPORT = Path(os.environ.get("LIT_RUNS", "runs")) / "diffusion-folkwave/export/model"


def main(folder: str, out: str) -> None:
    """Generate, write and measure one clip per prompt, all from the same noise."""
    if not Path(folder).is_dir():
        sys.exit(f"there is no {folder}; train a model with: lit-models fit --config diffusion/folkwave.yaml")
    pipeline = TextToWaveformPipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(3) for _ in PROMPTS]
    audios = pipeline(list(PROMPTS), guidance_scale=3.0, num_inference_steps=50, generator=generators).audios
    for number, (prompt, audio) in enumerate(zip(PROMPTS, audios, strict=True)):
        write_sound(Path(out) / f"{number}.wav", audio, pipeline.sample_rate)
        print(f"{out}/{number}.wav: {prompt}: {measure(audio, pipeline.sample_rate)}")
    write_picture(Path(out) / "sounds.png", list(audios), pipeline.sample_rate, PROMPTS)
    print(f"{out}/sounds.png")


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("", "")][:2]
    main(arguments[0] or str(EXPORT), arguments[1] or "sounds")
