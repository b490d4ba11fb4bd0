import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lit_models.diffusion import sounds
from lit_models.diffusion.__main__ import main
from lit_models.diffusion.modeling import WaveformUNet1DModel
from lit_models.diffusion.module import LitWaveform
from lit_models.diffusion.pipeline import TextToWaveformPipeline
from lit_models.diffusion.recipes import WaveformUNet
from lit_models.diffusion.samplers import VDDIMScheduler
from lit_models.diffusion.text import SmallText
from lit_models.sft import LitSFT

SIZES = {
    "sample_size": 800,
    "sample_rate": 4000,
    "in_channels": 1,
    "channels": [16, 32],
    "patch": 4,
    "rep": 1,
    "attn_from_level": 2,
    "data_scale": 5.0,
}
FAST = ["--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a pipeline that reads texts."""
    torch.manual_seed(0)
    encoder, tokenizer = SmallText("byt5").build()
    network = WaveformUNet1DModel(**SIZES, text_dim=64)
    path = tmp_path_factory.mktemp("model") / "pipeline"
    TextToWaveformPipeline(network, VDDIMScheduler(), encoder, tokenizer).save_pretrained(path)
    return path


def tone(hertz=440.0, seconds=0.5, rate=4000, channels=1):
    time = np.arange(round(seconds * rate)) / rate
    return np.tile(0.5 * np.sin(2 * np.pi * hertz * time), (channels, 1)).astype(np.float32)


def run(folder, *options, prompt="a reel", out="out.wav"):
    main([prompt, str(out), "--model", str(folder), *FAST, *map(str, options)])


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_sound_file_and_a_picture_are_written(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out.wav"
    run(folder, "--seconds", 0.3, "--picture", tmp_path / "out.png", "--seed", 3, out=out)
    info = soundfile.info(out)
    assert (info.samplerate, info.channels, info.frames, info.format) == (4000, 1, 1200, "WAV")
    expected = TextToWaveformPipeline.from_pretrained(folder)(
        "a reel", num_inference_steps=2, audio_length_in_s=0.3, generator=torch.Generator().manual_seed(3)
    ).audios[0]
    written, _ = soundfile.read(out, dtype="float32", always_2d=True)
    np.testing.assert_allclose(written.T, expected, atol=2**-15)
    assert Image.open(tmp_path / "out.png").width > 500
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: 0.30 s, ")
    level = 20 * math.log10(np.sqrt(np.mean(expected**2)))
    assert f"level {level:.1f} dB" in line
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.wav"]


def test_an_old_file_is_replaced(folder, tmp_path):
    out = tmp_path / "out.wav"
    out.write_text("old")
    run(folder, out=out)
    assert soundfile.info(out).frames == 800
    first = out.read_bytes()
    run(folder, out=out)
    assert out.read_bytes() == first  # the seed has a default
    run(folder, "--seed", 1, out=out)
    assert out.read_bytes() != first
    run(folder, "--negative", "noise", "--guidance", 5, out=out)
    assert out.read_bytes() != first


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    out = tmp_path / "out.wav"
    sounds.write_sound(out, tone(), 4000)
    before = out.read_bytes()
    with pytest.raises(TypeError):
        sounds.write_sound(out, tone(), "fast")
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_each_line_of_a_file_is_a_prompt(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a reel\n\n  a slow waltz in a very low register \nein Marsch für Flöte\n", encoding="utf-8")
    run(folder, "--batch", 2, "--picture", tmp_path / "p.png", prompt=str(prompts), out=tmp_path / "out.wav")
    names = [f"{stem}-{number:03d}.{end}" for stem, end in (("out", "wav"), ("p", "png")) for number in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "prompts.txt"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    run(folder, prompt="a slow waltz in a very low register", out=tmp_path / "alone.wav")
    alone, together = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("alone", "out-001"))
    np.testing.assert_allclose(alone, together, atol=2**-14)


def test_sound_may_be_varied(folder, tmp_path):
    # In stereo and at twice the rate, both of which are converted.
    soundfile.write(tmp_path / "in.wav", tone(rate=8000, channels=2).T, 8000, subtype="FLOAT")
    run(folder, "--init", tmp_path / "in.wav", "--strength", 0.02, out=tmp_path / "near.flac")
    run(folder, "--init", tmp_path / "in.wav", out=tmp_path / "half.ogg")
    near, rate = soundfile.read(tmp_path / "near.flac")
    assert (len(near), rate) == (2000, 4000)
    assert np.corrcoef(near[100:-100], tone()[0, 100:-100])[0, 1] > 0.95
    half, _ = soundfile.read(tmp_path / "half.ogg")
    assert abs(np.corrcoef(half[: len(near)], tone()[0, : len(half)])[0, 1]) < 0.95


def test_checkpoints_are_models_too(tmp_path, capsys):
    torch.manual_seed(0)
    module = LitWaveform(WaveformUNet(**SIZES), SmallText("byt5"), train_text_encoder=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.configure_model()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run(tmp_path / "last.ckpt", out=tmp_path / "one.wav")
    module._trainer = None
    module.pipeline().save_pretrained(tmp_path / "export" / "model")
    run(tmp_path / "export" / "model", out=tmp_path / "other.wav")
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "other.wav").read_bytes()
    with pytest.raises(SystemExit, match=r"error: model: the folder .* did you mean '.*export/model'"):
        run(tmp_path / "export")


def test_models_without_text_take_an_empty_prompt(tmp_path):
    torch.manual_seed(0)
    pipeline = TextToWaveformPipeline(WaveformUNet1DModel(**{**SIZES, "in_channels": 2}), VDDIMScheduler())
    pipeline.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", prompt="", out=tmp_path / "out.wav")
    assert soundfile.info(tmp_path / "out.wav").channels == 2
    with pytest.raises(SystemExit, match=r"error: prompt: this model was trained without texts"):
        run(tmp_path / "model", out=tmp_path / "out.wav")
    soundfile.write(tmp_path / "in.wav", tone(channels=3).T, 4000)
    with pytest.raises(SystemExit, match=r"error: init: .* has 3 channels but the model makes 2"):
        run(tmp_path / "model", "--init", tmp_path / "in.wav", prompt="", out=tmp_path / "out.wav")


def test_diverged_networks_are_told(tmp_path):
    network = WaveformUNet1DModel(**SIZES)
    with torch.no_grad():
        next(network.down_levels.parameters()).fill_(torch.nan)
    TextToWaveformPipeline(network, VDDIMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"error: model: the network gives NaN"):
        run(tmp_path / "model", prompt="", out=tmp_path / "out.wav")
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "out.doc"}, "out: '.*out.doc' is no sound file"),
        ({"prompt": "nowhere.txt"}, "prompt: there is no file 'nowhere.txt'"),
        ({"options": ["--picture", "p.doc2"]}, "picture: 'p.doc2' is no picture"),
        ({"options": ["--init", "nowhere.wav"]}, "init: there is no file 'nowhere.wav'"),
        ({"options": ["--init", __file__]}, "init: .* is no sound file"),
        ({"options": ["--strength", 0.5]}, "strength: there is no sound"),
        ({"options": ["--seconds", -1]}, "audio_length_in_s: -1.0 is not a length"),
        ({"options": ["--batch", 0]}, "batch: 0"),
        ({"options": ["--device", "toaster"]}, "device: 'toaster' cannot be used"),
    ],
)
def test_errors_are_one_sentence(folder, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(folder, *options.get("options", []), prompt=options.get("prompt", ""), out=options.get("out", "out.wav"))
    assert not list(tmp_path.iterdir())


def test_models_of_other_kinds_are_told(tmp_path, tiny_lm):
    with pytest.raises(SystemExit, match=r"error: model: there is no .*nowhere"):
        run(tmp_path / "nowhere")
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(SystemExit, match=r"error: model: .* is no checkpoint; give one"):
        run(tmp_path / "text")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.ckpt")
    with pytest.raises(SystemExit, match=r"error: model: .* is no checkpoint of this collection"):
        run(tmp_path / "weights.ckpt")
    with pytest.raises(SystemExit, match=r"error: model: the folder .* is no exported pipeline; give one"):
        run(tiny_lm)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "x"]}')
    with pytest.raises(SystemExit, match=r"error: model: .* is a DDPMPipeline, not a TextToWaveformPipeline"):
        run(tmp_path / "images")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit, match=r"error: prompt: .* holds no prompt"):
        run(tmp_path / "images", prompt=str(tmp_path / "empty.txt"))


def test_checkpoints_of_other_methods_are_told(tmp_path, tiny_lm):
    from lit_models.backbones import FromPretrained

    module = LitSFT(FromPretrained(str(tiny_lm)), tokenizer=str(tiny_lm))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.configure_model()
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(SystemExit, match=r"error: model: .* is a LitSFT, which makes no waveforms"):
        run(tmp_path / "sft.ckpt")


def test_the_example_runs(folder, tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples/text_to_waveform.py"
    spec = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(folder), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.wav", "1.wav", "2.wav", "3.wav", "sounds.png"]
    assert len(capsys.readouterr().out.splitlines()) == 5
    with pytest.raises(SystemExit, match="train a model"):
        example.main(str(tmp_path / "nowhere"), str(tmp_path))


def test_help_needs_no_model():
    printed = subprocess.run(
        [sys.executable, "-m", "lit_models.diffusion", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--guidance" in printed
    assert "waltz-000.wav" in printed


# -- what is heard -----------------------------------------------------------------------------------------------------


def test_measures_against_a_known_tone():
    measures = sounds.measure(tone(hertz=440.0, seconds=1.0), 4000)
    assert measures.seconds == 1.0
    assert measures.pitch == pytest.approx(440, rel=2e-3)
    assert measures.pitched > 0.9
    assert measures.level == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.01)
    assert measures.peak == pytest.approx(20 * math.log10(0.5), abs=0.05)
    assert str(measures) == f"1.00 s, pitch {measures.pitch:.1f} Hz in 98 %, level -9.0 dB, peak -6.0 dB"


@pytest.mark.parametrize("rate", [100, 4000])
def test_silence_and_low_rates_have_no_pitch(rate):
    measures = sounds.measure(np.zeros((2, 50), np.float32), rate)
    assert (measures.pitch, measures.pitched, measures.level) == (None, 0.0, -math.inf)
    assert str(measures) == f"{50 / rate:.2f} s, no pitch, silent"


@pytest.mark.parametrize("samples", [1, 5, 4000])
def test_pictures_of_any_length(samples, tmp_path):
    clips = [np.zeros((1, samples), np.float32), tone(channels=2)[:, :samples]]
    sounds.write_picture(tmp_path / "p.png", clips, 4000, ["silence", "cost: 3$ and 4$"])
    assert Image.open(tmp_path / "p.png").height > 300


def test_values_beyond_one_are_clipped(tmp_path):
    sounds.write_sound(tmp_path / "x.wav", np.array([[2.0, -2.0, 0.5]], np.float32), 4000)
    written, _ = soundfile.read(tmp_path / "x.wav")
    np.testing.assert_allclose(written, [1, -1, 0.5], atol=1e-4)


@pytest.mark.parametrize("end", ["wav", "flac", "ogg"])
def test_long_sounds_are_written(end, tmp_path):
    audio = tone(hertz=100, seconds=40, rate=16000, channels=2)
    sounds.write_sound(tmp_path / f"x.{end}", audio, 16000)
    written, rate = soundfile.read(tmp_path / f"x.{end}", always_2d=True)
    assert (written.shape, rate) == ((640000, 2), 16000)
    assert np.corrcoef(written[:, 1], audio[1])[0, 1] > 0.99
