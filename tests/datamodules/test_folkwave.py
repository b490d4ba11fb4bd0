"""ABC notation, synthetic instruments and the data module made of them."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from datamodules import folkwave, synth
from datamodules.abc_notation import key_signature, parse_abc, parse_notes, read_abc
from datamodules.folkwave import ClipCache, FolkWave, facts_of, fill, load_tunes, split_of, usable_templates
from datamodules.synth import INSTRUMENTS, Instrument, num_samples, render

HEAD = "X:1\nM:4/4\nL:1/4\nK:C\n"
SINE = Instrument((1.0,), 0.01, np.inf, 0.05, 0)
SMALL = {"sample_rate": 4000, "length": 512, "clip_seconds": 1.0, "batch_size": 4}


def events(body, head=HEAD):
    (tune,) = parse_abc(head + body)
    return list(tune.events)


# --- ABC notation


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("C c C, c'", [(60, 1), (72, 1), (48, 1), (84, 1)]),
        ("C2 C/ C// C3/2 C/4 z", [(60, 2), (60, 0.5), (60, 0.25), (60, 1.5), (60, 0.25), (None, 1)]),
        ("^F F f | F __B =B", [(66, 1), (66, 1), (77, 1), (65, 1), (69, 1), (71, 1)]),
        ("(3CDE F", [(60, 2 / 3), (62, 2 / 3), (64, 2 / 3), (65, 1)]),
        ("(3:2:2CD E (2FG A", [(60, 2 / 3), (62, 2 / 3), (64, 1), (65, 1.5), (67, 1.5), (69, 1)]),
        ("C>D E<F C>>D", [(60, 1.5), (62, 0.5), (64, 0.5), (65, 1.5), (60, 1.75), (62, 0.25)]),
        ("C-C D- | D2 E-F", [(60, 2), (62, 3), (64, 1), (65, 1)]),
        ("^F- | F F", [(66, 2), (65, 1)]),
        ("[CEG]2 [E2G2] C", [(60, 2), (64, 2), (60, 1)]),
        ('"Am"C {de}D !trill!E "^x|y"vF ~G .A % B c', [(60, 1), (62, 1), (64, 1), (65, 1), (67, 1), (69, 1)]),
        ("|:C [K:G]F [L:1/8]F:|2 F [1F ::F", [(60, 1), (66, 1), (66, 0.5), (66, 0.5), (66, 0.5), (66, 0.5)]),
        ("C\\\nD\nw: la la\nK:D\nF Z", [(60, 1), (62, 1), (66, 1), (None, 4)]),
        ("A:|B", [(69, 1), (71, 1)]),
        ("A:|\nB:|", [(69, 1), (71, 1)]),
        ("`C`D", [(60, 1), (62, 1)]),
        ("> - C", [(60, 1)]),
    ],
)
def test_notes(body, expected):
    found = events(body)
    assert [pitch for pitch, _ in found] == [pitch for pitch, _ in expected]
    assert [duration for _, duration in found] == pytest.approx([duration for _, duration in expected])


def test_signature_and_a_broken_rhythm_across_grace_notes():
    assert events("F>{g}c B", "X:1\nM:2/2\nL:1/8\nK:Ador\n") == [(66, 0.75), (72, 0.25), (71, 0.5)]


@pytest.mark.parametrize(
    ("meter", "quarters"),
    [("4/4", 0.5), ("3/4", 0.5), ("C", 0.5), ("C|", 0.5), ("2/4", 0.25), ("6/8", 0.5), ("none", 0.5)],
)
def test_unit_follows_from_the_meter(meter, quarters):
    assert events("C", f"X:1\nM:{meter}\nK:C\n") == [(60, quarters)]


@pytest.mark.parametrize(
    ("text", "name", "signature"),
    [
        ("G", "G major", {"F": 1}),
        (" D Mixolydian", "D mixolydian", {"F": 1}),
        ("Ador", "A dorian", {"F": 1}),
        ("Gm", "G minor", {"B": -1, "E": -1}),
        ("E Minor treble", "E minor", {"F": 1}),
        ("Bphr", "B phrygian", {"F": 1}),
        ("Glyd", "G lydian", {"F": 1, "C": 1}),
        ("Bloc", "B locrian", {}),
        ("F#", "F# major", dict.fromkeys("FCGDAE", 1)),
        ("Cb", "Cb major", dict.fromkeys("BEADGCF", -1)),
        ("G#", "G# major", dict.fromkeys("CGDAEB", 1) | {"F": 2}),
        ("Am ^g", "A minor", {"G": 1}),
        ("Hp", "A mixolydian", {"F": 1, "C": 1}),
        ("none", "C major", {}),
        ("", "C major", {}),
    ],
)
def test_keys(text, name, signature):
    assert key_signature(text) == (name, signature)


def test_fields_of_several_tunes(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = "% a file\nX:3\nT:THE HARE'S FOOT -- REEL\nT:again\nC:J. DOE.\nR:Reel\nM:C|\nK:G\nGA\n\n"
    text += "X: 7\nT:Rose, The\nK:D\nX:8\nT:Chère\nK:C\nC"
    (folder / "two.abc").write_bytes(text.encode("latin-1"))
    first, second, third = read_abc(folder / "two.abc")
    assert (first.source, first.title, first.composer, first.rhythm) == (
        "mine/two.abc#3",
        "The Hare's Foot",
        "J. Doe",
        "reel",
    )
    assert (first.meter, first.key, first.num_notes, first.quarters) == ("2/2", "G major", 2, 1.0)
    assert (second.source, second.title, second.events) == ("mine/two.abc#7", "The Rose", ())
    assert third.title == "Chère"


def test_compact_notation():
    assert parse_notes("C4 F#4:1.5 r:2 Bb3:.25 Cb4") == ((60, 1), (66, 1.5), (None, 2), (58, 0.25), (59, 1))
    for wrong in ("H4", "C", "C4:", "C4:x"):
        with pytest.raises(ValueError, match=r"^notes: .*correct it$"):
            parse_notes(f"C4 {wrong}")


# --- instruments


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_window_is_a_part_of_the_whole(name):
    notes = parse_notes("C4:.5 E4 r:.3 G4:.7 C5:2")
    whole = render(notes, INSTRUMENTS[name], 100, 8000)
    assert len(whole) == num_samples(notes, INSTRUMENTS[name], 100, 8000)
    window = render(notes, INSTRUMENTS[name], 100, 8000, start=5001, samples=4000)
    part = whole[5001:9001]
    np.testing.assert_allclose(window, part * (0.9 / np.abs(part).max()), rtol=0, atol=1e-5)


def test_one_note_by_its_formula():
    rate = 8000
    voice = Instrument((1, 0, 0.5), 0.02, 0.3, 0.1, 0.5)
    wave = render([(None, 1), (69, 1)], voice, 120, rate, transpose=-12)
    time = np.arange(int(0.6 * rate)) / rate
    phase = 2 * np.pi * 220 * time
    phase += 220 * (2 ** (0.5 / 12) - 1) / 5.5 * (1 - np.cos(2 * np.pi * 5.5 * time))
    sound = np.sin(phase) * np.exp(-time / 0.3) + 0.5 * np.sin(3 * phase) * np.exp(-time * np.sqrt(3) / 0.3)
    sound *= np.minimum(time / 0.02, 1) * np.clip((0.6 - time) / 0.1, 0, 1)
    expected = np.concatenate([np.zeros(rate // 2), sound])
    np.testing.assert_allclose(wave, expected * 0.9 / np.abs(expected).max(), atol=1e-5)


@pytest.mark.parametrize("rate", [4000, 8000, 16000])
def test_no_aliasing_and_the_same_pitch_at_every_rate(rate):
    wave = render([(93, 4)], INSTRUMENTS["violin"], 60, rate)  # 1,760 Hz
    power = np.abs(np.fft.rfft(wave[rate : 2 * rate] * np.hanning(rate))) ** 2
    assert abs(int(power.argmax()) - 1760) < 30
    near = np.zeros(len(power), bool)
    for harmonic in range(1760, rate // 2, 1760):
        near[max(harmonic - 40 * harmonic // 1760, 0) : harmonic + 40 * harmonic // 1760] = True
    assert power[~near].sum() < 1e-3 * power.sum()


def test_overlapping_notes_add_up():
    first, second = [(60, 1)], [(None, 1), (67, 1)]
    both = render([(60, 1), (67, 1)], SINE, 60, 1000, level=1e-9)
    parts = [render(notes, SINE, 60, 1000, samples=len(both), level=1e-9) for notes in (first, second)]
    peaks = [np.abs(part).max() for part in (both, *parts)]
    ratio = (both / peaks[0])[:900] / np.where(parts[0] == 0, 1, parts[0] / peaks[1])[:900]
    np.testing.assert_allclose(ratio[1:][np.abs(parts[0][1:900]) > 1e-10], ratio[5], rtol=1e-4)
    assert np.abs(both[1000:1050]).max() > 0


def test_strength_and_silence():
    notes = parse_notes("C4 E4")
    loud = render(notes, SINE, 60, 1000, samples=4000, scale="std", level=0.9)
    heard = num_samples(notes, SINE, 60, 1000)
    assert heard == 2050
    assert loud[:heard].std() == pytest.approx(0.9, abs=1e-6)
    assert not loud[heard:].any()
    assert np.abs(render(notes, SINE, 60, 1000, level=0.5)).max() == pytest.approx(0.5)
    for silent in ([(None, 4)], []):
        assert not render(silent, SINE, 60, 1000, samples=100).any()
        assert len(render(silent, SINE, 60, 1000)) == 0
    assert not render([(69, 1)], SINE, 60, 800, samples=100).any()  # 440 Hz is above the top
    assert not render(notes, SINE, 60, 1000, start=5000, samples=10).any()
    assert len(render(notes, SINE, 60, 1000, start=2000)) == 50


@pytest.mark.parametrize("wrong", [{"bpm": 0}, {"sample_rate": 0}, {"level": 0.0}, {"start": -1}, {"scale": "rms"}])
def test_numbers_out_of_range(wrong):
    options = {"bpm": 60.0, "sample_rate": 1000, **wrong}
    with pytest.raises(ValueError, match=r"^data[.:]"):
        render([(60, 1)], SINE, **options)


# --- texts


def test_every_template_is_used_for_some_tune():
    tunes = load_tunes("builtin")
    usable = [set(usable_templates(facts_of(tune, "organ", "low", "slow"))) for tune in tunes]
    assert set.union(*usable) == set(folkwave.TEMPLATES)
    assert len(folkwave.TEMPLATES) >= 8
    for tune in tunes:
        facts = facts_of(tune, "organ", "low", "slow")
        for template in usable_templates(facts):
            text = fill(template, facts)
            assert "{" not in text
            assert "organ" in text
            assert "low" in text
            assert "slow" in text


def test_unknown_facts_are_left_out():
    (tune,) = parse_abc("X:1\nK:Am\nA")
    facts = facts_of(tune, "harp", "high", "fast")
    templates = usable_templates(facts)
    assert 0 < len(templates) < 8
    for template in templates:
        assert not {"{title}", "{composer}", "{mood}", "{meter}"} & set(template.split())
        assert "A minor" in fill(template, facts) or "{key}" not in template
    assert fill("a {mood} {genre} and A {tempo} one in {key}", facts | {"mood": "elegant", "tempo": "easy"}) == (
        "an elegant tune and An easy one in A minor"
    )


# --- data module


def build(split="train", **options):
    return FolkWave(**(SMALL | options)).build(split)


def test_no_tune_is_in_two_splits():
    splits = {split: {tune.source for tune in build(split).tunes} for split in ("train", "val", "test")}
    assert all(splits.values())
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 12
    assert all(split_of(source) == split for split, sources in splits.items() for source in sources)
    # written down, so that a tune never moves to another split
    assert split_of("folk_tunes/tunes.jsonl#6") == "test"
    assert split_of("folk_tunes/tunes.jsonl#2") == "val"
    assert build("predict").tunes == build("test").tunes


def test_every_combination_occurs_once():
    clips = build(windows=2, instruments=["harp", "flute"], registers=["low", "high"], tempos={"brisk": 120})
    seen = [
        (clip["source"], clip["window"], clip["instrument"], clip["register"], clip["tempo"])
        for clip in (clips[row]["columns"] for row in range(len(clips)))
    ]
    assert len(set(seen)) == len(seen) == 7 * 2 * 2 * 2
    assert {entry[2:] for entry in seen} == set(itertools.product(["harp", "flute"], ["low", "high"], ["brisk"]))


def test_windows_are_full_and_may_be_all():
    clips = build(windows=None, clip_seconds=4.0, instruments=["flute"], registers=["low"], length=16000)
    fastest = {tune.source: tune.quarters * 60 / 144 for tune in clips.tunes}
    counts = dict.fromkeys(fastest, 0)
    for row in range(len(clips)):
        example = clips[row]
        counts[example["columns"]["source"]] += 1
        assert example["valid_length"] == 16000
        assert example["audio"].abs().max() == pytest.approx(0.9)
    assert counts == {source: 3 * int(seconds / 4) for source, seconds in fastest.items()}
    assert len(build(clip_seconds=60.0, windows=None)) == len(build())  # shorter tunes have one


def test_short_tunes_are_padded():
    clips = build("test", sample_rate=1000, length=40000, clip_seconds=60.0, tempos={"fast": 144})
    for index in (0, (0, 0, 0)):
        example = clips[index]
        valid = example["valid_length"]
        assert 12000 < valid < 21000
        assert not example["audio"][:, valid:].any()
        assert example["audio"][:, valid - 100 : valid].any()


def test_random_crops_lie_within_the_tune():
    clips = build(clip_seconds=2.0, length=1000, instruments=["harp"])  # its sound never repeats exactly
    clip, valid = clips.clip(3)
    starts = set()
    for epoch in range(20):
        example = clips[3, epoch, 0]
        assert example["valid_length"] == 1000
        crop = example["audio"][0].numpy()
        (start,) = [s for s in range(valid - 999) if clip[s] == crop[0] and np.array_equal(clip[s : s + 1000], crop)]
        starts.add(start)
    assert len(starts) > 15
    assert max(starts) <= valid - 1000
    assert np.array_equal(clips[3]["audio"][0].numpy(), clip[:1000])


def test_choices_follow_from_seed_epoch_pass_and_row():
    one, other, reseeded = build(), build(), build(seed=5)
    draws = [(row, epoch, pass_) for row in (0, 1) for epoch in (0, 1) for pass_ in (0, 1)]
    for draw in draws:
        assert torch.equal(one[draw]["audio"], other[draw]["audio"])
        assert one[draw]["text"] == other[draw]["text"] == one.text(draw)
    many = [(row, 0, 0) for row in range(40)]
    assert [one.text(draw) for draw in many] != [reseeded.text(draw) for draw in many]
    assert [one.text(draw) for draw in many] != [one.text((row, 1, 0)) for row, *_ in many]
    assert [one.text(row) for row in range(40)] == [reseeded.text(row) for row in range(40)]
    assert len({tuple(clip["audio"][0, :9].tolist()) for clip in (one[0, epoch, 0] for epoch in range(9))}) == 9


def test_formats():
    tags = build(prompt_format="tags")
    example = tags[0]
    assert example["text"] == ", ".join(example["columns"]["tags"])
    assert example["columns"]["tags"] == [example["columns"][name] for name in folkwave.TAGS]
    orders = {tags.text((0, epoch, 0)) for epoch in range(20)}
    assert len(orders) > 10
    assert {tuple(sorted(order.split(", "))) for order in orders} == {tuple(sorted(example["columns"]["tags"]))}
    assert build(prompt_format="tags", tag_fields=["key", "instrument"])[0]["text"].split(", ") == [
        example["columns"]["key"],
        example["columns"]["instrument"],
    ]
    mixed = build(prompt_format="mixed")
    formats = [mixed[row, 0, 0]["columns"]["format"] for row in range(100)]
    assert 30 < formats.count("tags") < 70
    assert len({mixed[0]["columns"]["format"] for _ in range(5)}) == 1
    assert {build()[row, 0, 0]["columns"]["format"] for row in range(20)} == {"free"}


def test_gain_and_polarity_change_nothing_but_the_sound():
    plain, varied = build(), build(gain_db=6.0, flip=True)
    ratios = []
    for row in range(40):
        one, two = plain[row, 0, 0], varied[row, 0, 0]
        place = one["audio"].abs().argmax()
        ratios.append(float(two["audio"].flatten()[place] / one["audio"].flatten()[place]))
        assert torch.allclose(two["audio"], one["audio"] * ratios[-1], atol=1e-5)
        assert one["text"] == two["text"]
        assert torch.equal(plain[row]["audio"], varied[row]["audio"])
    assert 5 < sum(ratio < 0 for ratio in ratios) < 35
    assert 0.5 < min(map(abs, ratios)) < 0.6
    assert 0.9 < max(map(abs, ratios)) <= 1


def test_batches():
    data = FolkWave(**SMALL, channels=2, val_batch_size=3, limit_val=7)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (4, 2, 512)
    assert batch["audio"].dtype == torch.float32
    assert torch.equal(batch["audio"][:, 0], batch["audio"][:, 1])
    assert batch["valid_length"].tolist() == [512] * 4
    assert batch["valid_length"].dtype == batch["index"].dtype == torch.int64
    assert len(batch["text"]) == len(batch["columns"]["title"]) == 4
    batches = list(data.val_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(7))
    data.setup("test")
    data.setup("predict")
    (one, *_), (other, *_) = data.test_dataloader(), data.predict_dataloader()
    assert one["text"] == other["text"]


def same(one, other):
    return one["text"] == other["text"] and all(
        torch.equal(one[key], other[key]) for key in ("audio", "valid_length", "index")
    )


def test_workers_change_nothing():
    alone, helped = (FolkWave(**SMALL, limit_train=20, num_workers=workers) for workers in (0, 2))
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
def test_an_interrupted_run_goes_on_exactly(quiet_trainer, tmp_path, workers):
    def run(steps, ckpt_path=None, num_workers=0):
        callbacks = [SaveAtTheEnd(tmp_path / f"{steps}.ckpt")]
        trainer, model = quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks), Recorder()
        data = FolkWave(
            **SMALL, limit_train=17, limit_val=0, gain_db=3.0, prompt_format="mixed", num_workers=num_workers
        )
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.batches

    whole = run(10)
    parts = run(6, num_workers=workers) + run(10, tmp_path / "6.ckpt")
    assert len(whole) == len(parts) == 10
    assert all(itertools.starmap(same, zip(whole, parts, strict=True)))
    assert len({tuple(batch["text"]) for batch in whole}) == 10


def test_clips_are_rendered_once(monkeypatch):
    clips, rendered = build(limit_train=5), []
    monkeypatch.setattr(folkwave, "render", lambda *args: rendered.append(args) or synth.render(*args))
    for row in [*range(5), *range(5)]:
        assert torch.equal(clips[row]["audio"], clips[row]["audio"])
    assert len(rendered) == 5
    assert len(pickle.dumps(clips.cache)) < 500


def test_the_oldest_clip_is_forgotten():
    made = []

    def get(row, size=2**18):
        return cache.get(row, lambda: row, lambda: made.append(row) or np.full(size, row, np.float32))[0]

    cache = ClipCache(2, None)  # two clips of 1 MiB
    assert [get(row) for row in (0, 1, 0, 2, 0, 1)] == [0, 1, 0, 2, 0, 1]
    assert made == [0, 1, 2, 1]
    get(7, 2**20)  # larger than the whole memory
    assert get(1) == 1
    assert made == [0, 1, 2, 1, 7]


def test_clips_on_disk_are_shared_by_content(monkeypatch, tmp_path):
    folder = str(tmp_path / "clips")
    first = build(cache_dir=folder, limit_train=4)
    expected = [first[row]["audio"] for row in range(4)]
    assert len(list((tmp_path / "clips").iterdir())) == 4
    build(cache_dir=folder, limit_train=4, instruments=["harp"])[0]
    assert len(list((tmp_path / "clips").glob("*.npy"))) == 5
    monkeypatch.setattr(folkwave, "render", None)
    again = build(cache_dir=folder, limit_train=4, prompt_format="tags")
    assert all(torch.equal(again[row]["audio"], expected[row]) for row in range(4))


def test_files_of_the_user(tmp_path):
    names = "".join(
        f"X:{number}\nT:Tune {number}\nM:4/4\nL:1/4\nK:G\n{'GABc' * (3 + number)}\n" for number in range(1, 41)
    )
    (tmp_path / "a.abc").write_text(names)
    for source in (tmp_path, tmp_path / "a.abc"):
        data = FolkWave(sources=["builtin", str(source)], **SMALL)
        assert len(data.tunes) == 12 + 40
    assert len(FolkWave(sources=[str(tmp_path)], min_notes=40, **SMALL).tunes) == 40 - 6
    fewer = FolkWave(sources=["builtin", str(tmp_path)], limit_tunes=9, **SMALL).tunes
    assert len(fewer) == 9
    assert set(fewer) < set(FolkWave(sources=["builtin", str(tmp_path)], limit_tunes=20, **SMALL).tunes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, r"data\.sample_rate: 0 must be at least 1"),
        ({"length": 0}, r"data\.length"),
        ({"windows": 0}, r"data\.windows"),
        ({"gain_db": -1.0}, r"data\.gain_db"),
        ({"limit_train": 0}, r"data\.limit_train"),
        ({"limit_val": -1}, r"data\.limit_val"),
        ({"level": 0.0}, r"data\.level"),
        ({"level": 1.5}, r"data\.level: .* at most 1"),
        ({"channels": 3}, r"data\.channels"),
        ({"clip_seconds": 0.1}, r"data\.clip_seconds: 0\.1 s are 400 samples, fewer than data\.length 512"),
        ({"instruments": ["kazoo"]}, r"data\.instruments: 'kazoo' is not one of organ"),
        ({"instruments": []}, r"data\.instruments: name at least one"),
        ({"registers": ["low", "low"]}, r"data\.registers: .* each once"),
        ({"tempos": {"slow": 0.0}}, r"data\.tempos\.slow"),
        ({"tempos": {}}, r"data\.tempos"),
        ({"prompt_format": "poem"}, r"data\.prompt_format"),
        ({"tag_fields": ["colour"]}, r"data\.tag_fields"),
        ({"scale": "rms"}, r"data\.scale"),
        ({"batch_size": 0}, r"data\.batch_size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FolkWave(**(SMALL | options))


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^data\.sources: 'nowhere' is neither an ABC file"):
        FolkWave(sources=["nowhere"]).build("train")
    with pytest.raises(ValueError, match=r"^data\.sources: .* holds no tunes"):
        FolkWave(sources=[str(tmp_path)]).build("train")
    monkeypatch.setattr(folkwave.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^data\.sources: ryansMammoth is part of the package music21; run `pip"):
        FolkWave(sources=["ryansMammoth"]).build("train")


def test_a_split_without_tunes():
    with pytest.raises(
        ValueError, match=r"^data\.sources: none of the 0 tunes falls to val; .*or set data\.limit_val: 0$"
    ):
        FolkWave(min_notes=1000).build("val")
    with pytest.raises(ValueError, match=r"falls to train; .*lower data\.min_notes$"):
        FolkWave(min_notes=1000).build("train")
    data = FolkWave(limit_val=0)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"^data\.limit_val: 0 leaves nothing"):
        data.val_dataloader()


@pytest.mark.skipif(folkwave.importlib.util.find_spec("music21") is None, reason="the files are part of music21")
def test_collections_of_music21():
    assert len(FolkWave(sources=["ryansMammoth"]).tunes) == 1059
    assert len(FolkWave(sources=list(folkwave.COLLECTIONS)).tunes) == pytest.approx(4246, abs=5)
