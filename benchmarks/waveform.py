"""Acceptance experiments of text-to-waveform diffusion.

`python benchmarks/waveform.py b|c|d|g --seeds 1 2 3 [--steps 1200] [--no-adaln]`

b: does the text steer? Tunes of Ryan's Mammoth Collection (the package music21, of which only files are read) on flute,
   violin and harp in two registers, at 4 kHz; a network of 0.38 million parameters learns crops of a quarter of a
   second with free descriptions. 72 prompts of test tunes, 12 for each instrument and register, give 72 sounds each
   without guidance and with a scale of 3. A tagger that learnt from real training crops, clean and noisy, tells the
   instrument; the share of energy below a threshold, fitted on real training clips, tells the register.
c: the same with tags that have no word for the register.
d: the same with the descriptions of a batch shuffled: a control.
g: one crop learnt by heart.

Each run prints one line of JSON.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

import callbacks
from datamodules import FolkWave
from lit_models.diffusion import LitWaveform, Sampling, SmallText, SoundTagger, WaveformUNet
from lit_models.diffusion.text import word_tokenizer
from lit_models.nn.schedules import WarmupLinear

RATE, LENGTH = 4000, 1024
INSTRUMENTS, REGISTERS = ("flute", "violin", "harp"), ("low", "high")
PROMPTS = 12  # for each instrument and register
SAMPLING_STEPS = 30
LANDMARKS = (200, 300, 500, 1000)
SPLIT_HZ, N_FFT, HOP = 260.0, 512, 128
NULL_WORDS = {"free": None, "tags": ["instrument", "genre", "key"]}


def data(seed: int, prompt_format: str) -> FolkWave:
    """The tunes of the experiment."""
    return FolkWave(
        sources=["ryansMammoth"],
        limit_tunes=96,
        sample_rate=RATE,
        length=LENGTH,
        clip_seconds=8.192,
        instruments=list(INSTRUMENTS),
        registers=list(REGISTERS),
        tempos={"medium": 96.0},
        scale="std",
        prompt_format=prompt_format,
        tag_fields=NULL_WORDS[prompt_format],
        batch_size=32,
        limit_val=0,
        seed=seed,
    )


class ShuffledText(Callback):
    """Gives each sound of a batch the description of another."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: dict[str, Any], index: int) -> None:
        """Shuffle."""
        order = torch.randperm(len(batch["text"]), generator=torch.Generator().manual_seed(index)).tolist()
        batch["text"] = [batch["text"][place] for place in order]


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Note the loss."""
        self.losses.append(float(outputs["loss"]))

    def landmarks(self) -> dict[int, float]:
        """Mean of the 100 losses before each landmark."""
        found = {step: self.losses[step - 100 : step] for step in (*LANDMARKS, len(self.losses))}
        return {step: round(statistics.mean(losses), 3) for step, losses in found.items() if len(losses) == 100}


def module(tokenizer: Path, steps: int, adaln: bool, p_uncond: float = 0.1) -> LitWaveform:
    """The network of the experiment, and how it is trained."""
    return LitWaveform(
        WaveformUNet(
            sample_size=LENGTH,
            sample_rate=RATE,
            in_channels=1,
            channels=[48, 96],
            patch=8,
            rep=1,
            attn_from_level=2,
            adaln=adaln,
        ),
        text=SmallText(str(tokenizer), max_tokens=32),
        train_text_encoder=True,
        text_lr_scale=1.0,
        p_uncond=p_uncond,
        sampler=Sampling(steps=SAMPLING_STEPS),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3),
        lr_scheduler=partial(WarmupLinear, total=steps, warmup=40, floor=0.05),
    )


def fit(model: LitWaveform, loader: Iterable[Any], steps: int, more: list[Callback]) -> tuple[Losses, float]:
    """Train, and tell the losses and the CPU seconds."""
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callbacks.EMA(0.995, warmup="ratio", delay=0), losses, *more],
    )
    start = time.process_time()
    trainer.fit(model, loader)
    return losses, time.process_time() - start


def low_share(clips: Tensor) -> Tensor:
    """(B,) share of the energy of (B,1,T) clips below the split."""
    window = torch.hann_window(N_FFT)
    power = torch.stft(clips[:, 0], N_FFT, HOP, window=window, return_complex=True).abs().square().sum(-1)
    low = torch.arange(power.shape[1]) * RATE / N_FFT < SPLIT_HZ
    return power[:, low].sum(1) / power.sum(1).clamp(min=1e-12)


class Ear:
    """What real training crops teach about instruments and registers."""

    def __init__(self, folk: FolkWave, seed: int) -> None:
        clips, labels = self.crops(folk, "train")
        self.tagger = SoundTagger.fit(clips, {"instrument": labels["instrument"]}, RATE, seed=seed)
        shares, low = low_share(clips), torch.tensor([word == "low" for word in labels["register"]])
        candidates = torch.linspace(0.02, 0.98, 97)
        right = [float(((shares > place) == low).float().mean()) for place in candidates]
        self.threshold = float(candidates[right.index(max(right))])

    @staticmethod
    def crops(folk: FolkWave, split: str) -> tuple[Tensor, dict[str, list[str]]]:
        """Two crops of every clip of a split that sounds all through."""
        folk.setup("fit" if split == "train" else "test")
        dataset = folk.datasets[split]
        rows = [dataset[(row, 0, number)] for row in range(len(dataset)) for number in range(2)]
        rows = [row for row in rows if row["valid_length"] == LENGTH]
        names = ("instrument", "register")
        return torch.stack([row["audio"] for row in rows]), {n: [row["columns"][n] for row in rows] for n in names}

    def accuracy(self, clips: Tensor, labels: dict[str, list[str]]) -> dict[str, float]:
        """Shares of clips that are heard as what they are labelled."""
        names = self.tagger.attributes["instrument"]
        heard = [names[place] for place in self.tagger(clips)["instrument"].argmax(-1)]
        pairs = zip(heard, labels["instrument"], strict=True)
        low = low_share(clips) > self.threshold
        wanted = torch.tensor([word == "low" for word in labels["register"]])
        return {
            "instrument": round(statistics.mean(one == other for one, other in pairs), 3),
            "register": round(float((low == wanted).float().mean()), 3),
        }


def prompts(folk: FolkWave) -> tuple[list[str], dict[str, list[str]]]:
    """Descriptions of test clips, the same number for each instrument and register, and what they ask for."""
    folk.setup("test")
    dataset = folk.datasets["test"]
    texts: list[str] = []
    labels: dict[str, list[str]] = {"instrument": [], "register": []}
    for instrument in INSTRUMENTS:
        for register in REGISTERS:
            rows = [dataset[row] for row in range(len(dataset))]
            wanted = [
                row["text"]
                for row in rows
                if (row["columns"]["instrument"], row["columns"]["register"]) == (instrument, register)
            ]
            texts += [wanted[number % len(wanted)] for number in range(PROMPTS)]
            labels["instrument"] += [instrument] * PROMPTS
            labels["register"] += [register] * PROMPTS
    return texts, labels


def conditioning(experiment: str, seed: int, steps: int, adaln: bool) -> dict[str, Any]:
    """Experiments b, c and d."""
    seed_everything(seed, verbose=False)
    folk = data(seed, "tags" if experiment == "c" else "free")
    folk.setup("fit")
    train = folk.datasets["train"]
    texts = [train.text((row, epoch, 0)) for row in range(len(train)) for epoch in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer(texts, min_count=2).save_pretrained(folder)
        model = module(Path(folder), steps, adaln)
        more = [ShuffledText()] if experiment == "d" else []
        losses, seconds = fit(model, folk.train_dataloader(), steps, more)
    ear = Ear(folk, seed)
    asked, labels = prompts(folk)
    result: dict[str, Any] = {
        "experiment": experiment,
        "seed": seed,
        "steps": steps,
        "adaln": adaln,
        "parameters": sum(parameter.numel() for parameter in model.net.parameters()),
        "cpu_s": round(seconds, 1),
        "loss": losses.landmarks(),
        "real": ear.accuracy(*ear.crops(folk, "test")),
    }
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for scale in (1.0, 3.0):
        sound = pipeline(
            asked,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=scale,
            audio_length_in_s=LENGTH / RATE,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            clip=False,
        ).audios
        result[f"w={scale:g}"] = ear.accuracy(sound, labels) | {"std": round(float(sound.std()), 3)}
    return result


def overfit(seed: int, steps: int) -> dict[str, Any]:
    """Experiment g: one crop, without a text."""
    seed_everything(seed, verbose=False)
    folk = data(seed, "free")
    folk.setup("fit")
    row = folk.datasets["train"][(seed, 0, 0)]
    batch = {
        "audio": row["audio"][None].expand(32, -1, -1).contiguous(),
        "text": [row["text"]] * 32,
        "valid_length": torch.full((32,), LENGTH),
        "index": torch.zeros(32, dtype=torch.int64),
        "columns": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer([row["text"]], min_count=1).save_pretrained(folder)
        model = module(Path(folder), steps, adaln=True, p_uncond=0.0)
        losses, seconds = fit(model, DataLoader([batch] * steps, batch_size=None), steps, [])
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    sound = pipeline(
        row["text"], num_inference_steps=50, guidance_scale=1.0, generator=generator, output_type="pt", clip=False
    ).audios[0, 0]
    pair = torch.stack([sound, row["audio"][0]])
    return {
        "experiment": "g",
        "seed": seed,
        "steps": steps,
        "cpu_s": round(seconds, 1),
        "loss": losses.landmarks(),
        "correlation": round(float(torch.corrcoef(pair)[0, 1]), 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["b", "c", "d", "g"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="500 for g, else 1200")
    parser.add_argument("--no-adaln", action="store_true", help="the paper's network, without modulated norms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        if options.experiment == "g":
            result = overfit(seed, options.steps or 500)
        else:
            result = conditioning(options.experiment, seed, options.steps or 1200, not options.no_adaln)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
