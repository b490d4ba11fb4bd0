"""Windows of sound files, and the data module of sounds with texts."""

import csv
import itertools
import json
import pickle
import warnings
from pathlib import Path

import lit_models._compat  # noqa: F401  (must run before torchaudio is imported)

# isort: split
import datasets
import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import Callback, LightningModule
from torchaudio.functional import resample

from datamodules import audio_io
from datamodules.abc_notation import parse_notes
from datamodules.audio import AudioTexts, on_rank_zero, read_prompts, scale_to
from datamodules.audio_io import AudioError, AudioReader, mix, resampled_length
from datamodules.audio_rows import hold_out, tags_in, texts_in
from datamodules.synth import INSTRUMENTS, render

TUNE = parse_notes("C4:.5 E4 r:.3 G4:.7 C5 A4:.4 F4 D4:2")
RATE = 4000
SMALL = {"sample_rate": RATE, "length": 500, "batch_size": 4}


def sound(seconds, rate, channels=1, name="violin"):
    """A tune and a little noise, another one in each channel: (samples, channels) float32."""
    samples = round(seconds * rate)
    tunes = (render(TUNE, INSTRUMENTS[name], 60 + 30 * number, rate) for number in range(channels))
    wave = np.stack([np.resize(tune, samples) for tune in tunes], 1)
    return (0.5 * wave + np.random.default_rng(0).normal(0, 0.001, wave.shape)).astype(np.float32)


def write(path, wave, rate, **options):
    """Write in pieces: libsndfile crashes on long pieces of Vorbis."""
    with soundfile.SoundFile(path, "w", rate, wave.shape[1], **options) as file:
        for start in range(0, len(wave), 4096):
            file.write(wave[start : start + 4096])
    return path


def decoded(path):
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(np.ascontiguousarray(wave.T)), rate


# --- windows


@pytest.mark.parametrize("rate", [44100, 22050, 8000, 48000, 16000, 11025, 44056])
def test_a_window_is_a_part_of_the_whole_resampled_file(tmp_path, rate):
    path = write(tmp_path / "a.wav", sound(1.3, rate, 2), rate, subtype="FLOAT")
    whole = resample(decoded(path)[0], rate, 16000).numpy()
    length = whole.shape[1]
    assert length == resampled_length(round(1.3 * rate), rate, 16000)
    with AudioReader(path, 16000) as reader:
        assert reader.num_samples == length
        for first in (0, 1, 159, 160, 161, 1237, 7919, length - 4000, length - 321, length - 2, length - 1):
            for samples in (1, 7, 4001):
                window = reader.read(first, samples)
                assert window.dtype == np.float32
                np.testing.assert_allclose(window, whole[:, first : first + samples], rtol=0, atol=1e-4)
        np.testing.assert_allclose(reader.read(), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(441, 160), (1, 2), (3, 1), (441, 320), (147, 160)])
def test_rates_with_few_common_divisors_take_the_same_sums(monkeypatch, tmp_path, old, new):
    scale = -(-4000 // min(old, new))
    path = write(tmp_path / "a.wav", sound(0.7, old * scale, 2), old * scale, subtype="FLOAT")
    with AudioReader(path, new * scale) as reader:
        expected = reader.read(33, 500)
        monkeypatch.setattr(audio_io, "_LARGEST_KERNEL", 0)
        np.testing.assert_allclose(reader.read(33, 500), expected, rtol=0, atol=1e-5)


def test_coprime_rates_need_little_memory(tmp_path):
    wave = np.sin(2 * np.pi * 440 * np.arange(44101) / 44101)[:, None]  # torchaudio would make a filter of 5 GB
    with AudioReader(write(tmp_path / "a.wav", wave, 44101), 16000) as reader:
        window = reader.read(8000, 1000)[0]
    np.testing.assert_allclose(window, np.sin(2 * np.pi * 440 * np.arange(8000, 9000) / 16000), atol=1e-3)


def test_long_sounds_are_resampled_in_pieces(monkeypatch, tmp_path):
    path = write(tmp_path / "a.flac", sound(1.0, 22050, 2), 22050)
    with AudioReader(path, 16000, 1) as reader:
        whole = reader.read(5)
        monkeypatch.setattr(audio_io, "_PIECE", 777)
        np.testing.assert_allclose(reader.read(5), whole, atol=1e-6)


LOSSY = {
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus.ogg": {"format": "OGG", "subtype": "OPUS"},
}


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize(("rate", "seconds", "channels"), [(48000, 6.3, 2), (8000, 41.3, 1)])
def test_jumps_in_lossy_files_are_exact(tmp_path, kind, rate, seconds, channels):
    path = write(tmp_path / f"a.{kind}", 0.1 * sound(seconds, rate, channels, "flute"), rate, **LOSSY[kind])
    whole = decoded(path)[0]
    samples = whole.shape[1]
    data = path.read_bytes()
    # Near the end Vorbis is misplaced after a plain jump, and all of them are right after a jump only by and by.
    places = [0, 1, rate, 7919, samples // 2, *(samples - back for back in (1, 5, 132, 500, 3001, rate, 5 * rate))]
    with AudioReader(path) as reader:
        assert reader.num_samples == samples
        for first in [*places, *reversed(places)]:
            expected = whole[:, first : first + 300].numpy()
            np.testing.assert_allclose(reader.read(first, 300), expected, rtol=0, atol=1e-5)
            with AudioReader(data) as fresh:
                np.testing.assert_allclose(fresh.read(first, 300), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff"])
def test_only_the_window_is_decoded(monkeypatch, tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", sound(20, 8000), 8000)
    taken, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, count, **kw: taken.append(count) or read(self, count, **kw)
    )
    with AudioReader(path, 4000) as reader:
        reader.read(30001, 100)
    assert sum(taken) < 300


def test_a_part_of_a_file(tmp_path):
    path = write(tmp_path / "a.wav", sound(3, 8000), 8000)
    whole = resample(decoded(path)[0], 8000, 5000).numpy()
    with AudioReader(path, 5000, start=1.2, duration=0.5) as reader:
        assert reader.num_samples == 2500
        np.testing.assert_allclose(reader.read(), whole[:, 6000:8500], atol=1e-6)
        np.testing.assert_allclose(reader.read(2400, 1000), whole[:, 8400:8500], atol=1e-6)
        for outside in (-1, 2500):
            with pytest.raises(ValueError, match=f"sample {outside} is not one of its 2500"):
                reader.read(outside, 5)
    with AudioReader(path, start=2.5, duration=9) as reader:
        assert reader.num_samples == 4000
    with pytest.raises(AudioError, match=r"a\.wav: the part from 3 s on is empty; the file has 3\.00 s"):
        AudioReader(path, start=3)
    for start, duration in ((-1, None), (float("nan"), None), (0, 0), (0, -2.0), (0, float("inf"))):
        with pytest.raises(AudioError, match="does not exist"):
            AudioReader(path, start=start, duration=duration)


def test_channels(tmp_path):
    wave = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(mix(wave, 1), wave.mean(0, keepdims=True))
    assert np.array_equal(mix(wave[:1], 2), wave[[0, 0]])
    assert np.array_equal(mix(wave, 2), wave[:2])
    with pytest.raises(ValueError, match="3 channels cannot become 4"):
        mix(wave, 4)
    path = write(tmp_path / "a.wav", sound(0.5, 8000, 2), 8000)
    whole = resample(decoded(path)[0], 8000, 4000)
    with AudioReader(path, 4000, 1) as reader:
        np.testing.assert_allclose(reader.read(7, 99), whole.mean(0, keepdim=True)[:, 7:106], atol=1e-6)
    with pytest.raises(AudioError, match=r"a\.wav: its 2 channels cannot become 3"):
        AudioReader(path, 4000, 3)


def damaged(tmp_path):
    """Files that cannot be used -> what is said of them."""
    tone = sound(2, 8000)
    flac, mp3 = write(tmp_path / "cut.flac", sound(9, 8000), 8000), write(tmp_path / "cut.mp3", tone, 8000)
    for path in (flac, mp3):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = bytearray(write(tmp_path / "piped.flac", tone, 8000).read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # total samples unknown
    (tmp_path / "piped.flac").write_bytes(data)
    holed = tone.copy()
    holed[9000] = np.nan
    write(tmp_path / "nan.wav", holed, 8000, subtype="FLOAT")
    write(tmp_path / "empty.wav", tone[:0], 8000)
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    (tmp_path / "folder.wav").mkdir()
    return {
        "cut.flac": "it is damaged",
        "cut.mp3": r"it is damaged; it ends after [\d.]+ s instead of 2\.00 s",
        "piped.flac": "its header does not tell its length",
        "nan.wav": "it holds samples that are not finite",
        "empty.wav": "it is empty",
        "text.wav": "it cannot be read as a sound; Format not recognised$",
        "nothing.wav": "it cannot be read as a sound",
        "a.raw": "it cannot be read as a sound",
        "folder.wav": "there is no such file",
        "missing.wav": "there is no such file",
    }


def test_damaged_files(tmp_path):
    for name, message in damaged(tmp_path).items():
        with pytest.raises(AudioError, match=f"{name}: {message}"), AudioReader(tmp_path / name) as reader:
            reader.read(reader.num_samples - 8000, 8000)
    with pytest.raises(AudioError, match=r"^bytes: it cannot be read as a sound"):
        AudioReader(b"abc")
    with AudioReader(tmp_path / "cut.flac") as reader:
        assert reader.read(100, 500).any()  # before the damage


# --- cells


def test_texts_and_tags():
    assert texts_in("  a song ") == ["a song"]
    assert texts_in(["a", "", None, "b"]) == ["a", "b"]
    assert [texts_in(value) for value in (None, float("nan"), "", " ", [])] == [[]] * 5
    assert [texts_in(value) for value in (12.0, 7, 1.5)] == [["12"], ["7"], ["1.5"]]
    assert tags_in("slow, piano ,,") == ["slow", "piano"]
    assert tags_in(["slow, sad", "piano"]) == ["slow, sad", "piano"]
    assert tags_in("['slow, sad', 'piano']") == ["slow, sad", "piano"]
    assert tags_in("[live], piano") == ["[live]", "piano"]
    assert tags_in(None) == []


def test_no_file_is_in_both_parts():
    names = [f"{row // 3}.wav" for row in range(90)] + [None] * 10
    held = hold_out(names, 0.2, 1)
    assert 20 <= held.sum() <= 22
    assert not {names[row] for row in np.flatnonzero(held)} & {names[row] for row in np.flatnonzero(~held)} - {None}
    assert not np.array_equal(held, hold_out(names, 0.2, 2))
    assert hold_out(["a", "b"], 0.999, 1).sum() == hold_out(["a", "b"], 0.001, 1).sum() == 1
    with pytest.raises(ValueError, match=r"^data\.val_fraction: 2 rows of 1 file cannot be divided"):
        hold_out(["a", "a"], 0.5, 1)


# --- data module


def table(folder, rows, name="metadata.csv"):
    if name.endswith(".csv"):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Folder of twelve sounds of three formats and rates, the first ones mono, with metadata.csv."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "songs").mkdir()
    rows = []
    for number in range(12):
        rate, suffix = [4000, 8000, 11025][number % 3], ["wav", "flac", "ogg"][number % 3]
        name = list(INSTRUMENTS)[number % len(INSTRUMENTS)]
        file = f"songs/{number:02}.{suffix}"
        write(folder / file, np.roll(sound(1 + number / 10, rate, 1 + number // 6, name), number * 500, 0), rate)
        rows.append(
            {"file_name": file, "text": f"a song on the {name}, No. {number}", "tags": f"{name}, solo, no{number}"}
            | {"number": number, "mood": "sad" if number % 2 else ""}
        )
    return table(folder, rows)


def build(path, split="train", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "data.sample_rate")
        return AudioTexts(path, **(SMALL | options)).build(split)


def reference(path, rate=RATE):
    wave, present = decoded(path)
    return resample(wave, present, rate).clip(-1, 1)


def test_batches_of_a_folder_with_metadata(library):
    data = AudioTexts(library, **SMALL, channels=2, val_split="train[8:]", val_batch_size=3, train_split="train[:8]")
    with pytest.warns(
        UserWarning, match=r"data\.sample_rate: the 8 .* are 3 with 4000 Hz, 3 with 8000 Hz, 2 with 11025 Hz; all"
    ):
        data.setup("fit")
    assert (data.sample_rate, data.channels, data.length) == (RATE, 2, 500)
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (4, 2, 500)
    assert batch["audio"].dtype == torch.float32
    assert batch["audio"].abs().amax() <= 1
    assert batch["valid_length"].tolist() == [500] * 4
    assert batch["valid_length"].dtype == batch["index"].dtype == torch.int64
    for row, number in enumerate(batch["index"].tolist()):
        columns = {name: values[row] for name, values in batch["columns"].items()}
        assert columns["number"] == number
        assert columns["mood"] == ("sad" if number % 2 else None)
        assert columns["file_name"].startswith(f"songs/{number:02}.")
        assert columns["source"] == f"{library}/{columns['file_name']}"
        assert columns["tags"][1:] == ["solo", f"no{number}"]
        assert columns["format"] == "free"
        assert batch["text"][row] == columns["text"] == f"a song on the {columns['tags'][0]}, No. {number}"
        assert torch.equal(*batch["audio"][row]) == (number < 6)  # mono is repeated
    batches = list(data.val_dataloader())
    assert [len(batch["text"]) for batch in batches] == [3, 1]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3]  # in the slice
    assert batches[0]["columns"]["number"] == [8, 9, 10]
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["text"] == batches[0]["text"]


def test_crops_are_parts_of_the_resampled_files(library):
    clips = build(library, length=3000, channels=2)
    centred = build(library, length=3000, channels=2, eval_crop="centre")
    for place in range(12):
        whole = reference(clips.source(place)[0])
        whole = whole.expand(2, -1)
        middle = (whole.shape[1] - 3000) // 2
        assert torch.allclose(clips[place]["audio"], whole[:, :3000], atol=1e-4)
        assert torch.allclose(centred[place]["audio"], whole[:, middle : middle + 3000], atol=1e-4)
        starts = set()
        for epoch in range(6):
            crop = clips[place, epoch, 0]["audio"]
            beginnings = whole[0, :-2800].unfold(0, 200, 1)
            start = int((beginnings - crop[0, :200]).abs().amax(1).argmin())
            assert torch.allclose(crop, whole[:, start : start + 3000], atol=1e-4)
            starts.add(start)
        assert len(starts) > 3


def test_short_sounds_are_padded(library):
    clips = build(library, length=20000, channels=1)
    for index in (0, (0, 0, 0)):
        example = clips[index]
        assert example["valid_length"] == 4000
        assert example["audio"].shape == (1, 20000)
        assert example["audio"][:, 3990:4000].any()
        assert not example["audio"][:, 4000:].any()
    assert clips[(1, 3, 0)]["valid_length"] == 4400
    assert torch.equal(build(library, length=20000, eval_crop="centre")[0]["audio"], clips[0]["audio"])


def test_formats_of_texts(library):
    free, tags, mixed = (build(library, prompt_format=name) for name in ("free", "tags", "mixed"))
    assert free[3]["text"] == free[3, 5, 0]["text"] == free[3]["columns"]["text"]
    assert tags[3]["text"] == ", ".join(tags[3]["columns"]["tags"])
    orders = {tags.text((3, epoch, 0)) for epoch in range(30)}
    assert len(orders) == 6
    assert {tuple(sorted(order.split(", "))) for order in orders} == {tuple(sorted(tags[3]["columns"]["tags"]))}
    formats = [mixed[place, epoch, 0]["columns"]["format"] for place in range(12) for epoch in range(5)]
    assert 15 < formats.count("tags") < 45
    for place in range(12):
        assert mixed[place]["text"] == mixed[place]["text"] == mixed.text(place)
        assert mixed[place, 1, 0]["text"] == mixed.text((place, 1, 0))
    assert len({mixed[place]["columns"]["format"] for place in range(12)}) == 2


def test_choices_follow_from_seed_epoch_pass_and_row(library):
    one, other, reseeded = build(library), build(library), build(library, seed=5)
    for draw in itertools.product((0, 7), (0, 1), (0, 1)):
        assert torch.equal(one[draw]["audio"], other[draw]["audio"])
        assert not torch.equal(one[draw]["audio"], reseeded[draw]["audio"])
    for place in (0, 7):
        crops = {tuple(one[place, *draw]["audio"][0, :9].tolist()) for draw in itertools.product((0, 1), (0, 1))}
        assert len(crops) == 4
        assert torch.equal(one[place]["audio"], reseeded[place]["audio"])


def test_strength(library):
    plain = build(library)
    varied = build(library, gain_db=6.0, flip=True)
    ratios = []
    for draw in itertools.product(range(12), range(3), (0,)):
        one, two = plain[draw]["audio"].flatten(), varied[draw]["audio"].flatten()
        place = one.abs().argmax()
        ratios.append(float(two[place] / one[place]))
        assert torch.allclose(two, one * ratios[-1], atol=1e-5)
        assert torch.equal(plain[draw[0]]["audio"], varied[draw[0]]["audio"])
    assert 8 < sum(ratio < 0 for ratio in ratios) < 28
    assert 0.5 < min(map(abs, ratios)) < 0.65
    assert 0.85 < max(map(abs, ratios)) <= 1
    assert build(library, scale="peak", level=0.7)[2, 0, 0]["audio"].abs().max() == pytest.approx(0.7)
    assert build(library, scale="std", level=1.0)[2, 0, 0]["audio"].std(correction=0) == pytest.approx(1)
    padded = build(library, scale="std", level=0.3, length=20000)[2]
    assert padded["audio"][:, : padded["valid_length"]].std(correction=0) == pytest.approx(0.3)
    silence = np.full((1, 9), 1e-5, np.float32)
    assert np.array_equal(scale_to(silence, "peak", 1.0), silence)
    assert not scale_to(0 * silence, "std", 1.0).any()


def test_samples_are_clipped(tmp_path):
    write(tmp_path / "loud.wav", 3 * sound(1, RATE), RATE, subtype="FLOAT")
    clips = build(table(tmp_path, [{"file_name": "loud.wav", "text": "loud"}]), length=4000)
    assert clips[0]["audio"].abs().max() == 1
    assert torch.equal(clips[0]["audio"], reference(tmp_path / "loud.wav"))


def same(one, other):
    return one["text"] == other["text"] and all(
        torch.equal(one[key], other[key]) for key in ("audio", "valid_length", "index")
    )


def test_workers_change_nothing(library):
    alone, helped = (AudioTexts(library, **SMALL, num_workers=workers) for workers in (0, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone.setup("fit")
        helped.setup("fit")
    loaders = alone.train_dataloader(), helped.train_dataloader()
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        assert all(itertools.starmap(same, zip(*loaders, strict=True)))


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 0

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtTheEnd(Callback):
    """Writes a checkpoint after the last step, before the trainer counts the broken epoch as finished."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_goes_on_exactly(quiet_trainer, tmp_path, library, workers):
    def run(steps, ckpt_path=None, num_workers=0):
        callbacks = [SaveAtTheEnd(tmp_path / f"{steps}.ckpt")]
        trainer, model = quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks), Recorder()
        data = AudioTexts(library, **SMALL, prompt_format="mixed", gain_db=3.0, num_workers=num_workers)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.batches

    whole = run(7)
    parts = run(4, num_workers=workers) + run(7, tmp_path / "4.ckpt")
    assert len(whole) == len(parts) == 7
    assert all(itertools.starmap(same, zip(whole, parts, strict=True)))
    assert len({tuple(batch["text"]) for batch in whole}) == 7


# --- sources


def test_lines_of_json_and_parts_of_files(tmp_path, library):
    rows = [
        {"file_name": f"{library}/songs/0{number}.{suffix}", "text": ["one", "two"], "tags": ["a, b", "c"]}
        | {"start_s": start, "end_s": end, "seconds": None if end is None else end - start}
        for number, suffix, start, end in ((0, "wav", 0.25, 0.75), (1, "flac", None, None), (2, "ogg", 0.5, 0.6))
    ]
    path = table(tmp_path, rows, "metadata.jsonl")
    by_end = build(path, start_column="start_s", end_column="end_s", prompt_format="mixed", length=3000)
    by_length = build(path, start_column="start_s", duration_column="seconds", length=3000)
    for place, (row, valid) in enumerate(zip(rows, (2000, 3000, 400), strict=True)):
        whole = reference(row["file_name"])
        first = round(RATE * (row["start_s"] or 0))
        for clips in (by_end, by_length):
            example = clips[place]
            assert example["valid_length"] == valid
            assert torch.allclose(example["audio"][:, :valid], whole[:, first : first + valid], atol=1e-4)
            assert example["columns"]["tags"] == ["a, b", "c"]
    assert by_length[0]["text"] == "one"
    assert {by_length.text((0, epoch, 0)) for epoch in range(20)} == {"one", "two"}
    with pytest.raises(ValueError, match=r"^data\.path: 3 of 3 .* column 'text' holds 'one' instead of seconds"):
        build(path, start_column="text")


def test_folders_of_splits(tmp_path, library):
    for split, rows in (("train", (0, 3)), ("validation", (6,))):
        (tmp_path / split).mkdir()
        entries = [{"file_name": f"{library}/songs/0{row}.wav", "text": f"{split} {row}"} for row in rows]
        table(tmp_path / split, entries, "metadata.jsonl" if split == "train" else "metadata.csv")
    data = AudioTexts(str(tmp_path), **SMALL, val_split="validation", test_split="validation[:1]")
    assert [len(data.build(split)) for split in ("train", "val", "test", "predict")] == [2, 1, 1, 1]
    assert data.build("val")[0]["text"] == "validation 6"
    with pytest.raises(ValueError, match="'test'"):
        build(str(tmp_path), "test", test_split="test")


def test_folders_without_a_table(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.wav", sound(0.5, RATE), RATE)
    (tmp_path / "2.txt").write_text(" a quiet song\n")
    with pytest.warns(UserWarning, match=r"^data\.text_column: 3 of 4 rows of the split 'train' have no text"):
        clips = build(str(tmp_path))
    assert [clips[0]["text"], clips[0]["index"], len(clips)] == ["a quiet song", 2, 1]
    everything = build(str(tmp_path), missing_text="keep")
    assert [everything.text(place) for place in range(4)] == ["", "", "a quiet song", ""]
    assert everything.text((2, 0, 0)) == "a quiet song"
    parts = (build(str(tmp_path), train_split=part, missing_text="keep") for part in ("train[:1]", "train[1:]"))
    assert [len(part) for part in parts] == [1, 3]
    with pytest.raises(ValueError, match=r"^data: the folder .* holds only the split 'train', not 'test'"):
        build(str(tmp_path), "test", test_split="test")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"^data\.path: .* holds no sounds .*metadata\.csv"):
        build(str(tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["disk", "parquet", "records", "bytes"])
def test_encoded_sounds(tmp_path, library, kind):
    files = [f"{library}/songs/0{number}.{suffix}" for number, suffix in ((3, "wav"), (4, "flac"), (5, "ogg"))]
    contents = [Path(file).read_bytes() for file in files]
    write(tmp_path / "a.mp3", sound(1, 8000), 8000)
    files.append(str(tmp_path / "a.mp3"))
    contents.append((tmp_path / "a.mp3").read_bytes())
    cells = contents if kind == "bytes" else [{"bytes": data, "path": f"{row}.x"} for row, data in enumerate(contents)]
    rows = datasets.Dataset.from_dict({"audio": cells, "text": ["a", "b", "c", "d"], "aspects": ["['x, y', 'z']"] * 4})
    if kind in ("disk", "parquet"):
        rows = rows.cast_column("audio", datasets.Audio())
    path = str(tmp_path / ("rows" if kind == "disk" else "rows.parquet"))
    rows.save_to_disk(path) if kind == "disk" else rows.to_parquet(path)
    clips = build(path, tags_column="aspects", length=3000)
    assert [clips.text(place) for place in range(4)] == ["a", "b", "c", "d"]
    for place, file in enumerate(files):
        example = clips[place]
        assert torch.allclose(example["audio"], reference(file)[:, :3000], atol=1e-4)
        assert set(example["columns"]) == {"text", "aspects", "source", "tags", "format"}
        assert example["columns"]["tags"] == ["x, y", "z"]
        assert example["columns"]["source"] == ("bytes" if kind == "bytes" else f"{place}.x")


def test_paths_in_a_table_of_any_name(tmp_path, library):
    rows = [{"clip": f"songs/0{number}.wav", "caption": f"text {number}"} for number in (0, 3, 6, 9)]
    (tmp_path / "songs").symlink_to(f"{library}/songs")
    table(tmp_path, rows, "mine.csv")
    clips = build(str(tmp_path / "mine.csv"), audio_column="clip", text_column="caption", keep_columns=["caption"])
    assert clips[2]["columns"] == {
        "caption": "text 6",
        "source": f"{tmp_path}/songs/06.wav",
        "tags": [],
        "format": "free",
    }
    other = build(str(tmp_path), data_files={"train": "mine.csv"}, audio_column="clip", text_column="caption")
    assert torch.equal(other[2]["audio"], clips[2]["audio"])
    with pytest.raises(ValueError, match=r"^data\.audio_column: there is no column 'audio'; .* 'clip'|'caption'"):
        build(str(tmp_path / "mine.csv"))
    with pytest.raises(ValueError, match=r"^data\.text_column: there is no column 'text'"):
        build(str(tmp_path / "mine.csv"), audio_column="clip")
    with pytest.raises(ValueError, match=r"^data\.tags_column: there is no column 'tags'"):
        build(str(tmp_path / "mine.csv"), audio_column="clip", text_column="caption", prompt_format="mixed")
    with pytest.raises(ValueError, match=r"^data\.start_column: there is no column 'start'"):
        build(str(tmp_path / "mine.csv"), audio_column="clip", text_column="caption", start_column="start")
    with pytest.raises(ValueError, match=r"^data\.keep_columns\[0\]: there is no column 'mood'"):
        build(str(tmp_path / "mine.csv"), audio_column="clip", text_column="caption", keep_columns=["mood"])


def test_fields_of_records(tmp_path, library):
    rows = [
        {"clip": {"path": f"{library}/songs/03.wav", "from": 0.5}, "about": {"text": "a", "tags": ["b"]}, "x.y": "c"}
    ]
    path = table(tmp_path, rows, "rows.jsonl") + "/rows.jsonl"
    options = {"audio_column": "clip.path", "tags_column": "about.tags", "start_column": "clip.from"}
    example = build(path, text_column="about.text", **options)[0]
    assert torch.allclose(example["audio"], reference(f"{library}/songs/03.wav")[:, 2000:2500], atol=1e-4)
    assert (example["text"], example["columns"]["tags"]) == ("a", ["b"])
    assert build(path, text_column="x.y", **options)[0]["text"] == "c"


def test_validation_by_fraction_and_limits(library):
    data = AudioTexts(library, **SMALL, val_fraction=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {split: set(data.build(split).numbers.tolist()) for split in ("train", "val", "predict")}
        limited = AudioTexts(library, **SMALL, val_fraction=0.25, limit_train=4, limit_val=1)
        sizes = [len(limited.build(split)) for split in ("train", "val", "predict")]
    assert parts["train"] | parts["val"] == set(range(12))
    assert not parts["train"] & parts["val"]
    assert len(parts["val"]) == 3
    assert parts["predict"] == parts["val"]
    assert sizes == [4, 1, 1]
    data.setup("test")
    with pytest.raises(ValueError, match=r"^data\.test_split"):
        data.test_dataloader()


# --- bad files and texts


def test_texts_that_are_missing(tmp_path, library):
    rows = [
        {"file_name": f"{library}/songs/00.wav", "text": text, "tags": tags}
        for text, tags in (("a", "x"), ("", "y"), ("c", ""), (" ", ""))
    ]
    path = table(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"^data\.text_column: 2 of 4 rows .* left out, e\.g\. row 1"):
        assert build(path).numbers.tolist() == [0, 2]
    with pytest.warns(UserWarning, match=r"^data\.tags_column: 2 of 4 rows .* left out, e\.g\. row 2"):
        assert build(path, prompt_format="tags").numbers.tolist() == [0, 1]
    with pytest.warns(UserWarning, match=r"^data\.text_column: 1 of 4 rows"):
        mixed = build(path, prompt_format="mixed")
    assert {mixed.text((1, epoch, 0)) for epoch in range(9)} == {"y"}
    assert {mixed.text((2, epoch, 0)) for epoch in range(9)} == {"c"}
    assert {mixed.text((0, epoch, 0)) for epoch in range(9)} == {"a", "x"}
    with pytest.raises(ValueError, match=r"^data\.text_column: 2 of 4 .* column 'text', e\.g\. row 1; fill it in"):
        build(path, missing_text="error")
    with pytest.raises(ValueError, match=r"^data\.text_column: 1 of 1 .* set data\.missing_text to keep$"):
        build(path, train_split="train[1:2]")
    assert len(build(path, missing_text="keep")) == 4


def test_files_that_cannot_be_opened_are_left_out(tmp_path):
    good = [f"{number}.wav" for number in range(5)]
    for name in good:
        write(tmp_path / name, sound(2, RATE), RATE)
    write(tmp_path / "short.wav", sound(0.1, RATE), RATE)
    bad = [name for name in damaged(tmp_path) if name not in ("cut.flac", "cut.mp3", "nan.wav")]
    rows = [{"file_name": name, "text": "a"} for name in (*good, *bad, "short.wav", "")]
    path = table(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"^data\.path: 9 of 14 sounds of the split 'train' .* e\.g\. row 5: .*piped"):
        clips = build(path, min_seconds=0.5)
    assert clips.numbers.tolist() == [0, 1, 2, 3, 4]
    assert clips.failures == 0
    with pytest.raises(ValueError, match=r"^data\.path: row 5: .*piped\.flac: .*; repair it, or set data\.unreadable"):
        build(path, unreadable="error")
    with pytest.raises(ValueError, match=r"^data\.path: 1 of 1 sounds .*: it has 0\.10 s, less than data\.min_sec"):
        build(path, train_split="train[12:13]", min_seconds=0.5)
    with pytest.raises(ValueError, match=r"^data\.path: 1 of 1 .*row 0: data\.audio_column .* holds None instead"):
        build(path, train_split="train[13:14]")
    with pytest.raises(ValueError, match=r"^data\.path: 9 of 9 sounds"):
        build(path, train_split="train[5:]", min_seconds=0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_sound_takes_the_place_of_an_unusable_one(tmp_path, workers):
    wave = sound(1, RATE)
    for number in range(8):
        write(tmp_path / f"{number}.wav", wave if number % 4 else wave * np.nan, RATE, subtype="FLOAT")
    path = table(tmp_path, [{"file_name": f"{number}.wav", "text": f"No. {number}"} for number in range(8)])

    def batches():
        data = AudioTexts(path, **SMALL, val_split="train", num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        taken = [*loader, *data.val_dataloader()]
        return taken, data.datasets["train"].failures, data.datasets["val"].failures

    if workers:  # they tell it on their own
        taken, *failures = batches()
    else:
        with pytest.warns(UserWarning, match=r"^data\.path: another sound .* 1 times so far; .*wav: it holds samples"):
            taken, *failures = batches()
    assert min(failures) >= 2
    assert [len(batch["text"]) for batch in taken] == [4] * 4
    for batch in taken:
        assert batch["audio"].isfinite().all()
        assert batch["text"] == [f"No. {number}" for number in batch["index"].tolist()]
    assert not {0, 4} & {number for batch in taken for number in batch["index"].tolist()}
    assert [batch["index"].tolist() for batch in taken] == [batch["index"].tolist() for batch in batches()[0]]
    data = AudioTexts(path, **SMALL, unreadable="error")
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^data\.path: row 4: .*4\.wav: .* set data\.unreadable to skip"):
        data.datasets["train"][4]


@pytest.mark.filterwarnings("ignore:data.path")
def test_a_set_of_unusable_sounds_comes_to_an_end(tmp_path):
    write(tmp_path / "a.wav", np.full((4000, 1), np.inf), RATE, subtype="FLOAT")
    clips = build(table(tmp_path, [{"file_name": "a.wav", "text": "a"}] * 150), check_files=3)
    for index in (5, (5, 1, 0)):
        with pytest.raises(ValueError, match=r"^data\.path: 100 sounds .* the last one is row \d+: .*a\.wav"):
            clips[index]
    assert clips.failures == 202
    assert pickle.loads(pickle.dumps(clips)).failures == 202
    with pytest.raises(ValueError, match="less than data"):
        build(str(tmp_path), check_files=3, min_seconds=2.0)


def test_only_some_files_are_opened_before_training(tmp_path):
    write(tmp_path / "a.wav", sound(1, RATE), RATE)
    path = table(tmp_path, [{"file_name": "a.wav" if row != 50 else "b.wav", "text": "a"} for row in range(100)])
    assert len(build(path, check_files=2)) == 100  # the first and the last
    assert len(build(path, check_files=0)) == 100
    for number in (None, 1000):
        with pytest.warns(UserWarning, match="1 of 100 sounds"):
            assert len(build(path, check_files=number)) == 99


def test_no_rows(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"^data"):
        build(str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.path: 'nowhere/at/all' is neither"):
        build("nowhere/at/all")
    with pytest.raises(ValueError, match=r"^data\.path: there is nothing to train on"):
        build(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, r"data\.sample_rate: 0 must be at least 1"),
        ({"length": 0}, r"data\.length"),
        ({"channels": 0}, r"data\.channels"),
        ({"gain_db": -1.0}, r"data\.gain_db"),
        ({"gain_db": float("nan")}, r"data\.gain_db"),
        ({"min_seconds": -1.0}, r"data\.min_seconds"),
        ({"check_files": -1}, r"data\.check_files"),
        ({"limit_train": 0}, r"data\.limit_train"),
        ({"limit_val": 0}, r"data\.limit_val"),
        ({"seed": -1}, r"data\.seed"),
        ({"level": 0.0}, r"data\.level"),
        ({"scale": "peak", "level": 1.5}, r"data\.level: .* at most 1"),
        ({"scale": "rms"}, r"data\.scale: 'rms' is not one of none, peak, std"),
        ({"eval_crop": "last"}, r"data\.eval_crop"),
        ({"prompt_format": "poem"}, r"data\.prompt_format"),
        ({"missing_text": "skip"}, r"data\.missing_text"),
        ({"unreadable": "drop"}, r"data\.unreadable"),
        ({"val_fraction": 1.0}, r"data\.val_fraction"),
        ({"val_fraction": 0.5, "val_split": "val"}, r"data\.val_fraction and data\.val_split"),
        ({"end_column": "a", "duration_column": "b"}, r"data\.end_column and data\.duration_column"),
        ({"seconds": 3.0}, r"data\.seconds: .* data\.prompts"),
        ({"batch_size": 0}, r"data\.batch_size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AudioTexts("somewhere", **(SMALL | options))


# --- prompts


def test_prompts_are_predicted(quiet_trainer, tmp_path):
    data = AudioTexts(prompts=["a flute", "", "a harp"], seconds=2.5, val_batch_size=2)
    first, second = quiet_trainer().predict(Recorder(), datamodule=data)
    assert set(first) == {"text", "index", "seconds"}
    assert first["text"] + second["text"] == ["a flute", "", "a harp"]
    assert first["index"].tolist() + second["index"].tolist() == [0, 1, 2]
    assert first["seconds"].tolist() == [2.5, 2.5]
    assert first["seconds"].dtype == torch.float32
    (tmp_path / "prompts.txt").write_text("a flute\n\n  eine Flöte \n", encoding="utf-8")
    data = AudioTexts("never/opened", prompts=str(tmp_path / "prompts.txt"))
    (batch,) = quiet_trainer().predict(Recorder(), datamodule=data)
    assert set(batch) == {"text", "index"}
    assert batch["text"] == ["a flute", "eine Flöte"]


def test_tables_of_prompts(tmp_path):
    rows = [{"text": "a", "seconds": 1.5}, {"text": "b", "seconds": None}]
    table(tmp_path, rows, "prompts.jsonl")
    path = str(tmp_path / "prompts.jsonl")
    prompts = read_prompts(path, 9.0)
    assert [prompts[row] for row in range(2)] == [
        {"text": "a", "index": 0, "seconds": 1.5},
        {"text": "b", "index": 1, "seconds": 9.0},
    ]
    with pytest.raises(ValueError, match=r"^data\.seconds: some prompts have no length"):
        read_prompts(path, None)
    with pytest.raises(ValueError, match=r"^data\.text_column: there is no column 'caption'"):
        AudioTexts(prompts=path, text_column="caption")
    with pytest.raises(ValueError, match=r"^data\.prompts: there is no file 'a flute'"):
        AudioTexts(prompts="a flute")
    with pytest.raises(ValueError, match=r"^data\.prompts: there is no text"):
        AudioTexts(prompts=[])
    with pytest.raises(ValueError, match=r"^data\.seconds: 0\.0 must be positive"):
        AudioTexts(prompts=["a"], seconds=0.0)
    data = AudioTexts("somewhere")
    data.split_names["predict"] = None
    data.setup("predict")
    with pytest.raises(ValueError, match=r"^data\.prompts, data\.test_split, data\.val_split"):
        data.predict_dataloader()


# --- several processes and the configuration


def _on_two_ranks(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = [on_rank_zero(lambda: {"rank": rank})]
    try:
        on_rank_zero(lambda: [][rank])
    except (IndexError, RuntimeError) as error:
        seen.append(repr(error))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def test_what_rank_0_sees_holds_for_all(tmp_path):
    torch.multiprocessing.start_processes(_on_two_ranks, (tmp_path,), 2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == [{"rank": 0}, "IndexError('list index out of range')"]
    assert second[0] == {"rank": 0}
    assert second[1].startswith("RuntimeError")
    assert "list index out of range" in second[1]


def test_configuration(tmp_path, library):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(AudioTexts, "data")
    (tmp_path / "data.yaml").write_text(
        f"data:\n  class_path: datamodules.audio.AudioTexts\n  init_args:\n    path: {library}\n    scale: none\n"
        "    prompts: [a flute, a harp]\n    seconds: 3\n    check_files: null\n    val_fraction: 0.25\n"
    )
    data = parser.instantiate(parser.parse_path(tmp_path / "data.yaml")).data
    assert (data.options.scale, data.prompts.texts, data.check_files) == ("none", ["a flute", "a harp"], None)
