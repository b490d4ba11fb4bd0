"""How fast sounds reach the network: rendered tunes, and windows of sound files beside whole files.

`python benchmarks/waveform_data.py [--clips 64] [--minutes 3]`

FolkWave renders clips of 5.12 s at 16 kHz the first time and reads them from memory afterwards. `AudioTexts` reads
windows of 5.12 s from stereo files at 44.1 kHz and resamples them to 16 kHz mono; the peer decodes and resamples the
whole file and cuts the same window out of it, as loaders without seeking do. Rates are per CPU second, in one process.
"""

import lit_models._compat  # noqa: F401  (must run before torchaudio is imported)

# isort: split
import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio.functional as audio

from datamodules import AudioTexts, FolkWave

RATE, LENGTH, FILE_RATE = 16000, 81920, 44100


def rate(read: Callable[[int], Any], count: int) -> float:
    """Clips per CPU second."""
    start = time.process_time()
    for number in range(count):
        read(number)
    return count / (time.process_time() - start)


def folkwave(count: int) -> None:
    """Rendering, and reading what was rendered."""
    data = FolkWave(limit_train=count, batch_size=1)
    data.setup("fit")
    clips = data.datasets["train"]
    first = rate(lambda number: clips[(number, 0, 0)], count)
    again = rate(lambda number: clips[(number, 1, 0)], count)
    print(f"FolkWave: {first:.0f} clips per CPU second when rendered, {again:.0f} from memory")


def files(count: int, minutes: float) -> None:
    """Windows of files, and whole files."""
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{number}.{kind}" for kind in ("wav", "flac", "mp3") for number in range(4)]
        samples = round(minutes * 60 * FILE_RATE)
        for name in names:
            sound = 0.1 * noise.standard_normal((samples, 2)).astype(np.float32)
            with soundfile.SoundFile(Path(folder) / name, "w", FILE_RATE, 2) as file:
                for start in range(0, samples, 4096):
                    file.write(sound[start : start + 4096])
        for kind in ("wav", "flac", "mp3"):
            mine = [name for name in names if name.endswith(kind)]
            rows = "".join(f"{name},a sound\n" for name in mine)
            (Path(folder) / "metadata.csv").write_text(f"file_name,text\n{rows}")
            data = AudioTexts(folder, sample_rate=RATE, length=LENGTH, batch_size=1)
            data.setup("fit")
            clips = data.datasets["train"]

            def window(number: int, clips: Any = clips) -> Any:
                return clips[(number % len(clips), number, 0)]["audio"]

            def whole(number: int, mine: list[str] = mine) -> Any:
                sound, _ = soundfile.read(Path(folder) / mine[number % len(mine)], dtype="float32", always_2d=True)
                mono = torch.from_numpy(sound.mean(1))
                place = int(noise.random() * (len(mono) * RATE // FILE_RATE - LENGTH))
                return audio.resample(mono, FILE_RATE, RATE)[place : place + LENGTH]

            window(0)  # the filter of the resampler
            whole(0)
            ours, peer = rate(window, count), rate(whole, max(count // 8, 4))
            print(f"{kind}, {minutes:g} minutes: {ours:.1f} windows, {peer:.1f} whole files: {ours / peer:.1f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0, help="length of the files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folkwave(options.clips)
    files(options.clips, options.minutes)


if __name__ == "__main__":
    main()
