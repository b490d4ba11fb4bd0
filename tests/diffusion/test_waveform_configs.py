"""Presets of waveform diffusion: sizes, composition, and a run on one's own sounds."""

import csv
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lit_models.cli import main
from lit_models.diffusion.modeling import WaveformUNet1DModel
from lit_models.diffusion.network import forward_flops
from lit_models.diffusion.pipeline import TextToWaveformPipeline
from lit_models.diffusion.recipes import UnconditionalUNet1D, WaveformUNet

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
DATA = sorted(path.name for path in CONFIGS.glob("data-*.yaml"))
FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name):
    return yaml.safe_load((CONFIGS / name).read_text())


def parse(capsys, *files, options=()):
    configs = [argument for file in files for argument in ("--config", file)]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, *options, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def backbone(name):
    return read(name)["model"]["init_args"]["backbone"]["init_args"]


def millions(network):
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1)


def test_recipe_has_the_arguments_of_the_network_with_their_defaults():
    arguments = inspect.signature(WaveformUNet1DModel).parameters
    fields = {field.name: getattr(WaveformUNet(), field.name) for field in dataclasses.fields(WaveformUNet)}
    assert list(fields) == list(arguments)
    for name, parameter in arguments.items():
        default = parameter.default
        assert fields[name] == (list(default) if isinstance(default, tuple) else default), name


def test_sizes_of_the_paper():
    options = backbone("model-ernie-music.yaml")
    with torch.device("meta"):
        without, reading = WaveformUNet(**options).build(), WaveformUNet(**options).build(768)
        assert millions(without) == 227.7
        assert millions(reading) == 261.4  # 33.7 M of it read the text
        assert options["sample_size"] / options["sample_rate"] == 20.48
        assert WaveformUNet(**options).build().padded_length(options["sample_size"]) == options["sample_size"]
    attending = [level for level, half in enumerate(without.down_levels, 1) if half.attentions]
    assert attending == list(range(8, 15))
    assert forward_flops(reading, options["sample_size"]) / 1e12 == pytest.approx(3.577, abs=1e-3)


def test_sizes_of_dance_diffusion():
    with torch.device("meta"):
        network = UnconditionalUNet1D(**backbone("model-dance-diffusion.yaml")).build()
    assert millions(network) == 251.6
    assert [kind for kind in network.config.down_block_types].count("AttnDownBlock1D") == 7
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == ["time_proj.weight"]


@pytest.mark.parametrize("data", DATA)
def test_data_follow_the_model(capsys, data):
    config = parse(capsys, "diffusion/model-ernie-music.yaml", f"diffusion/{data}", "trainer/ddp.yaml")
    options = config["data"]["init_args"]
    assert (options["sample_rate"], options["channels"], options["length"]) == (16000, 2, 327680)
    assert config["trainer"]["max_epochs"] > 1
    mono = ["--model.init_args.backbone.init_args.in_channels=1"]
    config = parse(capsys, "diffusion/model-dance-diffusion.yaml", f"diffusion/{data}", options=mono)
    assert config["data"]["init_args"]["channels"] == 1
    small = parse(capsys, "diffusion/folkwave.yaml", f"diffusion/{data}")
    assert small["data"]["init_args"]["sample_rate"] == 4000
    assert small["data"]["class_path"] == read(data)["data"]["class_path"]


def test_small_presets_hear_what_their_texts_say(capsys):
    config = parse(capsys, "diffusion/folkwave.yaml")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    for prompt in model["prompts"]:
        assert any(name in prompt for name in data["instruments"])
        assert any(f"the {name} register" in prompt for name in data["registers"])
    more = parse(capsys, "diffusion/folkwave.yaml", "diffusion/data-ryansmammoth.yaml")["data"]["init_args"]
    assert (more["sources"], more["batch_size"], more["instruments"]) == (["ryansMammoth"], 32, data["instruments"])


@pytest.fixture
def music(tmp_path):
    """Folder with six tones and their names."""
    import soundfile

    folder = tmp_path / "music"
    folder.mkdir()
    rows = []
    for number in range(6):
        sound = 0.5 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(6000) / 8000)
        soundfile.write(folder / f"{number}.wav", sound.astype(np.float32), 8000)
        rows.append({"file_name": f"{number}.wav", "text": f"tone {number}", "tags": "tone, high"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_own_sounds_train_and_own_prompts_predict(music, runs):
    import soundfile

    files = ["--config", "diffusion/tiny.yaml", "--config", "diffusion/data-folder.yaml"]
    small = ["--data.init_args.num_workers=0", "--data.init_args.batch_size=2", "--data.init_args.val_fraction=0.3"]
    text = ["--model.init_args.text.init_args.tokenizer=byt5"]
    options = [*files, f"--data.init_args.path={music}", *small, *text, *FAST]
    fitted = main(["fit", *options, "--trainer.max_steps=4", "--trainer.val_check_interval=2"])
    assert fitted.trainer.global_step == 4
    assert fitted.trainer.callback_metrics["val/loss"] > 0
    last = runs / "diffusion-tiny/checkpoints/last.ckpt"
    prompts = ["--data.init_args.prompts=[a low tone, a high tone]", "--data.init_args.seconds=0.1"]
    main(["predict", *options, *prompts, f"--ckpt_path={last}"])
    with (runs / "diffusion-tiny/predictions/prompts.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["a low tone", "a high tone"]
    sound, rate = soundfile.read(runs / "diffusion-tiny/predictions/000001.wav")
    assert (sound.shape, rate) == ((400,), 4000)


def test_unconditional_preset_runs(runs):
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.init_args.batch_size=4"]
    limits = ["--data.init_args.limit_val=4", "--data.init_args.limit_test=4", "--model.init_args.sampler.steps=2"]
    main(["fit", "--config", "diffusion/unconditional.yaml", *options, *limits, *FAST])
    pipeline = TextToWaveformPipeline.from_pretrained(runs / "diffusion-unconditional/export/model")
    audio = pipeline(num_waveforms_per_prompt=2, num_inference_steps=2, audio_length_in_s=0.1).audios
    assert audio.shape == (2, 1, 400)
    sounds = runs / "diffusion-unconditional/sounds/step=2-val"
    assert {path.name for path in sounds.glob("*.wav")} >= {"real-0.wav", "generated-0.wav"}


def test_python_of_the_readme_runs(music, runs):
    """With a small encoder and network, and two steps."""
    from transformers import T5Config, T5EncoderModel

    from lit_models.diffusion.text import word_tokenizer

    T5EncoderModel(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained("t5")
    word_tokenizer(["tone 0 1 2 3 4 5"], min_count=1).save_pretrained("t5")
    readme = (CONFIGS.parents[1] / "lit_models" / "diffusion" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    changes = {
        '"my_music"': f'"{music}"',
        '"xlm-roberta-base"': '"t5"',
        "65536": "2048",
        "[64, 64, 128, 128, 256, 256]": "[8, 8, 8, 8, 32, 32]",
        "batch_size=16": "batch_size=2",
        "val_fraction=0.05": "val_fraction=0.3",
        "max_steps=100_000": "max_steps=2, enable_progress_bar=False, logger=False",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["pipeline"](num_inference_steps=1, prompt="tone 1").audios.shape == (1, 1, 2048)
    assert names["pipeline"].sample_rate == 16000
