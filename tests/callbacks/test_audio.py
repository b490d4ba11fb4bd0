import csv
import warnings

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from torch.utils.data import DataLoader

from callbacks.audio import (
    FLOOR_DB,
    AudioSamples,
    AudioWriter,
    as_waveform,
    file_names,
    spectrogram,
    spectrogram_picture,
    write_wav,
)
from callbacks.rng import RNGState
from tests.callbacks.tiny import Tiny, trainer

RATE = 4000


def tone(frequency, seconds=0.25, rate=RATE, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


class Singer(Tiny):
    """Three real and three generated sounds, the latter as loud as the step says, and drawn from global states."""

    def sounds(self):
        assert not torch.is_grad_enabled()
        noise = torch.randn(2, 1000) * self.trainer.global_step / 100
        real = {f"real/{number}": (tone(200 * (number + 1)), RATE) for number in range(3)}
        return real | {f"generated/{number}": (noise, RATE) for number in range(3)}

    def sound_texts(self):
        return {"real/0": 'a "low" flute, slow', "generated/0": "ein hoher Ton für $x_1$"}


def run(folder, callback, ckpt_path=None, model=None, callbacks=(), **options):
    trainer(folder, callbacks=[callback, *callbacks], **options).fit(model or Singer(), ckpt_path=ckpt_path)
    return sorted(str(path.relative_to(folder / "sounds")) for path in (folder / "sounds").rglob("*") if path.is_file())


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Files


def test_spectrogram_has_decibels_of_full_scale():
    sound = tone(1000, 1.0, amplitude=1.0)
    levels = spectrogram(sound, RATE)
    size = 2 * (len(levels) - 1)
    middle = levels[:, levels.shape[1] // 2]
    assert middle.argmax() * RATE / size == pytest.approx(1000, abs=RATE / size)
    assert middle.max() == pytest.approx(0, abs=1.5)  # a tone between two bins loses up to 1.4 dB
    assert levels[-1, 2:-2].max() < -60
    assert (spectrogram(np.zeros(500, np.float32), RATE) == FLOOR_DB).all()
    assert spectrogram(sound * 0.1, RATE)[:, 10].max() == pytest.approx(levels[:, 10].max() - 20, abs=0.01)


@pytest.mark.parametrize(("length", "rate"), [(1, 4000), (7, 48_000), (100, 8000), (48_000 * 60, 48_000)])
def test_spectrograms_of_any_length_are_small(length, rate):
    levels = spectrogram(np.full(length, 0.1, np.float32), rate)
    assert 1 <= levels.shape[1] <= 2001
    assert np.isfinite(levels).all()


def test_pictures_show_every_channel():
    mono = spectrogram_picture(tone(500)[None], RATE, "a prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stereo = spectrogram_picture(np.stack([tone(500), tone(900)]), RATE, "$x_1 静かな笛 " * 50)
    assert mono.dtype == np.uint8
    assert mono.shape[2] == 3
    assert stereo.shape[0] > 1.5 * mono.shape[0]
    loud, quiet = (spectrogram_picture(tone(500, amplitude=a)[None], RATE) for a in (1.0, 0.01))
    assert loud.mean() > quiet.mean()  # brighter is louder, whatever else is shown


def test_wav_formats(tmp_path):
    sound = np.stack([tone(300), 3 * tone(500)])
    for kind, subtype, expected in (("pcm16", "PCM_16", sound / 1.5), ("float32", "FLOAT", sound)):
        path = tmp_path / "new" / f"{kind}.wav"
        write_wav(path, sound, RATE, kind)
        found, rate = soundfile.read(path, dtype="float32")
        assert np.abs(sound).max() == pytest.approx(1.5, abs=1e-6)
        assert (rate, soundfile.info(path).subtype) == (RATE, subtype)
        np.testing.assert_allclose(found.T, expected, atol=2**-15 if kind == "pcm16" else 0)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["float32.wav", "pcm16.wav"]


def test_sounds_in_odd_forms():
    assert as_waveform(torch.zeros(5, dtype=torch.bfloat16, requires_grad=True), "x").shape == (1, 5)
    assert as_waveform(np.zeros((2, 5), np.float64), "x").dtype == np.float32
    with pytest.warns(UserWarning, match="sound 'a/0': 2 samples are no numbers"):
        assert as_waveform(np.array([1, np.nan, np.inf]), "a/0").tolist() == [[1, 0, 0]]
    for shape in ((0,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"waveforms are \(channels, samples\)"):
            as_waveform(np.zeros(shape), "x")


def test_file_names_stay_in_their_folder():
    names = ["real/0", "real-0", "REAL/0", "../../etc/passwd", "a b: ü", "///", ""]
    found = file_names(names)
    assert list(found) == names
    assert found["real/0"] == "real-0"
    assert found["a b: ü"] == "a-b-ü"
    assert len({name.lower() for name in found.values()}) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in found.values())


# Samples while training


def test_sounds_every_n_batches_and_after_validation(tmp_path):
    files = run(tmp_path, AudioSamples(4, num_sounds=2, pictures=False))
    names = [f"{kind}-{number}.wav" for kind in ("generated", "real") for number in (0, 1)]
    steps = ["step=12", "step=12-val", "step=4", "step=6-val", "step=8"]
    assert files == sorted(f"{step}/{name}" for step in steps for name in [*names, "sounds.csv"])
    folder = tmp_path / "sounds/step=8"
    found, rate = soundfile.read(folder / "generated-0.wav", dtype="float32")
    assert (rate, found.shape) == (RATE, (1000, 2))
    assert 0.06 < found.std() < 0.1
    rows = {row["name"]: row for row in table(folder / "sounds.csv")}
    assert rows["real/0"] == {
        "name": "real/0",
        "file": "real-0.wav",
        "text": 'a "low" flute, slow',
        "seconds": "0.25",
        "peak": "0.5",
    }
    assert rows["generated/0"]["text"] == "ein hoher Ton für $x_1$"
    assert rows["generated/1"]["text"] == ""


def test_each_sound_has_a_picture(tmp_path):
    files = run(tmp_path, AudioSamples(2, num_sounds=1), max_steps=2)
    assert files == [
        f"step=2/{name}" for name in ("generated-0.png", "generated-0.wav", "real-0.png", "real-0.wav", "sounds.csv")
    ]
    pictures = [imread(tmp_path / f"sounds/step=2/{kind}-0.png") for kind in ("real", "generated")]
    assert pictures[1].shape[0] > 1.5 * pictures[0].shape[0]  # of two channels


def test_floats_keep_what_is_too_loud(tmp_path):
    model = Singer()
    model.sounds = lambda: {"loud": (3 * tone(100), RATE)}
    assert run(tmp_path, AudioSamples(1, sample_format="float32", pictures=False), model=model, max_steps=1) == [
        "step=1/loud.wav",
        "step=1/sounds.csv",
    ]
    found, _ = soundfile.read(tmp_path / "sounds/step=1/loud.wav", dtype="float32")
    assert np.array_equal(found, 3 * tone(100))
    row = table(tmp_path / "sounds/step=1/sounds.csv")[0]
    assert float(row["peak"]) == pytest.approx(1.5, abs=0.01)


def test_sounds_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    run(tmp_path, AudioSamples(1, num_sounds=1), logger=logger, max_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    for name in ("real/0", "generated/0"):
        sounds = events.Audio(f"sounds/train/{name}")
        assert [(sound.step, sound.sample_rate) for sound in sounds] == [(1, RATE)]
        assert [image.step for image in events.Images(f"sounds/train/{name}")] == [1]


@pytest.mark.parametrize("order", [1, -1])
def test_training_draws_the_same_numbers(tmp_path, order):
    """Whether or not random states have a callback of their own, and wherever it stands."""

    def weights(name, callbacks):
        torch.manual_seed(5)
        model = Singer()
        trainer(tmp_path / name, callbacks=callbacks).fit(model)
        return model.net[0].weight

    for name, others in (("plain", []), ("streams", [RNGState])):
        samples = [AudioSamples(1, num_sounds=1, pictures=False), *(make() for make in others)][::order]
        assert torch.equal(weights(f"{name}-with", samples), weights(name, [make() for make in others]))


def test_a_resumed_run_has_the_sounds_of_a_whole_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def callback():
        return AudioSamples(2, num_sounds=1, pictures=False)

    torch.manual_seed(0)
    expected = run(whole, callback(), callbacks=[RNGState()])
    saver = ModelCheckpoint(broken, filename="seven", every_n_train_steps=7)
    torch.manual_seed(0)
    trainer(broken, callbacks=[callback(), RNGState(), saver], enable_checkpointing=True).fit(Singer())
    for name in ("step=99", "step=100-val", "mine"):
        (broken / "sounds" / name).mkdir()
        (broken / "sounds" / name / "x.wav").write_bytes(b"of a run that went further, or not ours")
    (broken / "sounds/step=6/real-0.wav").write_bytes(b"before the checkpoint")
    files = run(broken, callback(), broken / "seven.ckpt", callbacks=[RNGState()])
    assert files == sorted([*expected, "mine/x.wav"])
    assert (broken / "sounds/step=6/real-0.wav").read_bytes() == b"before the checkpoint"
    for name in ("step=8/generated-0.wav", "step=12-val/generated-0.wav"):
        assert (broken / "sounds" / name).read_bytes() == (whole / "sounds" / name).read_bytes()


def test_a_new_run_begins_a_new_folder(tmp_path):
    run(tmp_path, AudioSamples(1, pictures=False), max_steps=2)
    files = run(tmp_path, AudioSamples(3, num_sounds=1, pictures=False), max_steps=4)
    assert {name.split("/")[0] for name in files} == {"step=3"}


def test_no_sounds_write_nothing(tmp_path):
    model = Singer()
    model.sounds = dict
    assert run(tmp_path, AudioSamples(1), model=model, max_steps=2) == []


class Choir(Singer):
    """Sounds that need all processes."""

    def sounds(self):
        self.trainer.strategy.barrier()
        total = self.trainer.strategy.reduce(torch.ones(()), reduce_op="sum")
        return {"all": (tone(100 * (self.global_rank + 1)), RATE), "ranks": (total[None] / 10, RATE)}


def test_all_processes_sing_and_one_writes(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "max_steps": 2, "limit_val_batches": 0}
    callback = AudioSamples(2, sample_format="float32", pictures=False)
    files = run(tmp_path, callback, model=Choir(), **options)
    assert files == ["step=2/all.wav", "step=2/ranks.wav", "step=2/sounds.csv"]
    found = {
        name: soundfile.read(tmp_path / f"sounds/step=2/{name}.wav", dtype="float32")[0] for name in ("all", "ranks")
    }
    assert np.array_equal(found["all"], tone(100))
    assert found["ranks"] == pytest.approx([0.2])


def test_a_module_without_sounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.AudioSamples needs a module with sounds, and Tiny has none"):
        run(tmp_path, AudioSamples(1), model=Tiny())


@pytest.mark.parametrize("name", ["every_n_steps", "num_sounds"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=rf"callbacks\.AudioSamples\.{name} must be at least 1, got 0"):
        AudioSamples(**{name: 0})


@pytest.mark.parametrize("callback", [AudioSamples, AudioWriter])
def test_unknown_formats(callback):
    with pytest.raises(ValueError, match=rf"callbacks\.{callback.__name__}\.sample_format: 'mp3' is unknown"):
        callback(sample_format="mp3")


# Predictions


class Player(LightningModule):
    """Tones for row numbers, as `predict_step` of a diffusion model gives sounds."""

    def __init__(self, change=lambda prediction: prediction):
        super().__init__()
        self.change = change

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        rows = batch[:, 0].long()
        sounds = [torch.from_numpy(tone(100 * (int(row) + 1))) for row in rows]
        return self.change(
            {
                "audio": torch.stack(sounds)[:, None],
                "sample_rate": RATE,
                "text": [f"tone {int(row)}, 'quoted'" for row in rows],
                "index": rows,
            }
        )


def numbers(count):
    return torch.arange(count)[:, None].float()


def predict(folder, model=None, callback=None, loaders=None, **options):
    loaders = loaders or DataLoader(numbers(5), batch_size=2)
    trainer(folder, callbacks=[callback or AudioWriter()], **options).predict(model or Player(), loaders)
    return sorted(path.name for path in (folder / "predictions").iterdir())


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_are_files_with_a_table(tmp_path, ranks):
    """Two processes make six predictions of five rows; the table has five."""
    options = {} if ranks == 1 else {"devices": 2, "strategy": "ddp_fork"}
    files = predict(tmp_path, **options)
    assert files == [*(f"{number:06d}.wav" for number in range(5)), "prompts.csv"]
    rows = table(tmp_path / "predictions/prompts.csv")
    assert rows[3] == {"index": "3", "text": "tone 3, 'quoted'", "file": "000003.wav", "seconds": "0.25"}
    assert [row["index"] for row in rows] == list("01234")
    for number in range(5):
        found, rate = soundfile.read(tmp_path / f"predictions/{number:06d}.wav", dtype="float32")
        assert rate == RATE
        np.testing.assert_allclose(found, tone(100 * (number + 1)), atol=2**-15)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sounds_without_numbers_get_those_of_the_data(tmp_path, ranks):
    def strip(prediction):
        return {name: prediction[name] for name in ("audio", "sample_rate")}

    options = {} if ranks == 1 else {"devices": 2, "strategy": "ddp_fork"}
    predict(tmp_path, Player(strip), **options)
    rows = table(tmp_path / "predictions/prompts.csv")
    assert [(row["index"], row["text"]) for row in rows] == [(str(number), "") for number in range(5)]
    found, _ = soundfile.read(tmp_path / "predictions/000004.wav", dtype="float32")
    np.testing.assert_allclose(found, tone(500), atol=2**-15)


def test_several_sounds_of_a_prompt_and_their_lengths(tmp_path):
    def double(prediction):
        audio = list(prediction["audio"].bfloat16().repeat_interleave(2, 0))
        index = prediction["index"].repeat_interleave(2)
        text = [text for text in prediction["text"] for _ in range(2)]
        lengths = torch.arange(len(audio)) * 400
        return {**prediction, "audio": audio, "index": index, "text": text, "valid_length": lengths}

    files = predict(tmp_path, Player(double), loaders=DataLoader(numbers(2), batch_size=2))
    assert files == ["000000-2.wav", "000000.wav", "000001-2.wav", "000001.wav", "prompts.csv"]
    rows = {row["file"]: (row["index"], float(row["seconds"])) for row in table(tmp_path / "predictions/prompts.csv")}
    assert rows == {
        "000000.wav": ("0", 0.0003),  # a sound has a sample
        "000000-2.wav": ("0", 0.1),
        "000001.wav": ("1", 0.2),
        "000001-2.wav": ("1", 0.25),
    }


def test_loaders_have_files_of_their_own(tmp_path):
    loaders = [DataLoader(numbers(2), batch_size=2), DataLoader(numbers(1), batch_size=2)]
    files = predict(tmp_path, loaders=loaders)
    assert files == ["0-000000.wav", "0-000001.wav", "1-000000.wav", "prompts.csv"]


def test_an_earlier_prediction_is_replaced_and_nothing_else(tmp_path):
    folder = tmp_path / "predictions"
    predict(tmp_path)
    (folder / "000001.wav").rename(folder / "kept.wav")
    (folder / "prompts-mine.csv").write_text("file,text\n000000.wav,not ours\n")
    (folder / "prompts.7.csv").write_text("index,text,file,seconds\n9,x,000009.wav,1\n8,x,../kept.wav,1\n")
    (folder / "000009.wav").write_bytes(b"of a run that was killed")
    (tmp_path / "kept.wav").write_bytes(b"elsewhere")
    files = predict(tmp_path, loaders=DataLoader(numbers(1), batch_size=1))
    assert files == ["000000.wav", "kept.wav", "prompts-mine.csv", "prompts.csv"]
    assert (tmp_path / "kept.wav").exists()


@pytest.mark.parametrize("prediction", [{"text": ["a"]}, torch.zeros(2), None, {}])
def test_predictions_without_sound_are_refused(tmp_path, prediction):
    with pytest.raises(ValueError, match=r"callbacks\.AudioWriter needs predictions with audio and sample_rate"):
        predict(tmp_path, Player(lambda _: prediction))
