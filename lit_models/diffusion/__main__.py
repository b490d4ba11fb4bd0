"""Sound files from texts: `python -m lit_models.diffusion "a slow waltz on the harp" waltz.wav --model PATH`.

The model is the folder of an exported pipeline, or a Lightning checkpoint of a waveform model. A text file with one
prompt per line in place of the prompt gives `waltz-000.wav`, `waltz-001.wav` and so on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lit_models.diffusion import sounds


def prompts_of(text: str) -> tuple[list[str], bool]:
    """The prompts that a command asks for.

    Args:
        text: a prompt, or the name of a text file (.txt) with one per line; empty lines are left out.

    Returns:
        The prompts, and whether they come from a file.

    Raises:
        ValueError: if there is no such file, or nothing in it.
    """
    if not text.endswith(".txt"):
        return [text], False
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"prompt: there is no file {text!r}; give a prompt, or a text file with one per line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompt: {text!r} holds no prompt; write one per line")
    return prompts, True


def numbered(path: str, number: int, several: bool) -> Path:
    """File name of one of several clips: `out.wav` becomes `out-003.wav`."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}-{number:03d}{whole.suffix}") if several else whole


def _moved(pipeline: Any, device: str | None) -> Any:  # noqa: ANN401
    import torch

    try:
        return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device: {device!r} cannot be used here; leave it out for the best there is") from error


def generate(options: argparse.Namespace) -> list[Path]:
    """Make, write and measure what a command asks for.

    Args:
        options: see `parse`.

    Returns:
        The sound files.

    Raises:
        ValueError: if an option does not fit, naming it.
    """
    sounds.sound_format(options.out)
    if options.picture is not None:
        sounds.picture_format(options.picture)
    prompts, several = prompts_of(options.prompt)
    if options.batch < 1:
        raise ValueError(f"batch: {options.batch} is not a number of clips; use 1 or more")

    import numpy as np
    import torch

    pipeline = _moved(sounds.load_pipeline(options.model), options.device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    rate = pipeline.sample_rate
    if rate is None:
        raise ValueError(f"model: the network of {options.model!r} has no sample_rate; set it in its config.json")
    if any(prompts) and not (pipeline.reads_vector or pipeline.reads_tokens):
        raise ValueError('prompt: this model was trained without texts; give "" as the prompt')
    settings: dict[str, Any] = {
        "negative_prompt": options.negative,
        "audio_length_in_s": options.seconds,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "strength": options.strength,
    }
    if options.init is not None:
        settings["init_audio"] = sounds.read_sound(options.init, rate, pipeline.channels)

    paths = []
    for first in range(0, len(prompts), options.batch):
        texts = prompts[first : first + options.batch]
        # Each clip starts from the noise of the seed, as it would alone.
        generators = [torch.Generator().manual_seed(options.seed) for _ in texts]
        audios = pipeline(texts if any(texts) else None, generator=generators, **settings).audios
        if not np.isfinite(audios).all():
            raise ValueError("model: the network gives NaN or infinite values; its training diverged")
        for number, (text, audio) in enumerate(zip(texts, audios, strict=True), first):
            path = numbered(options.out, number, several)
            sounds.write_sound(path, audio, rate)
            if options.picture is not None:
                sounds.write_picture(numbered(options.picture, number, several), [audio], rate, [text])
            print(f"{path}: {sounds.measure(audio, rate)}", flush=True)
            paths.append(path)
    return paths


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m lit_models.diffusion", description=__doc__)
    add = parser.add_argument
    add("prompt", help='what to hear, or a text file (.txt) with one prompt per line; "" for anything')
    add("out", help="sound file: .wav, .flac or .ogg; replaced if it is there")
    add("--model", required=True, help="folder of an exported pipeline, or Lightning checkpoint")
    add("--seconds", type=float, help="length; by default that of the training clips, or of --init")
    add("--steps", type=int, default=50, help="steps of the sampler (default 50)")
    add("--guidance", type=float, default=3.0, help="weight of the prompt; 1 is without guidance (default 3)")
    add("--seed", type=int, default=0, help="of the noise; equal seeds give equal sound (default 0)")
    add("--negative", help="what it should not sound like")
    add("--init", help="sound file to vary")
    add("--strength", type=float, help="how much it is varied, from 0 to 1 (default 0.5)")
    add("--picture", help="file for a spectrogram, for example out.png")
    add("--batch", type=int, default=8, help="clips that are made together (default 8)")
    add("--device", help="for example cpu or cuda:1 (default: cuda if there is one)")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Command line of the waveform models.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    options = parse(args)
    try:
        generate(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
