import itertools
import math

import pytest
import torch

from datamodules import FolkWave
from lit_models.diffusion.metrics.tagger import SoundFeatures, SoundTagger, add_noise, collect

RATE = 4000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tone(frequency, seconds=1.0, rate=RATE, harmonics=(1.0, 0.5, 0.3), decay=0.0):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    parts = [
        a * (2 * math.pi * k * frequency * time).sin() for k, a in enumerate(harmonics, 1) if k * frequency < rate / 2
    ]
    return (0.3 * torch.stack(parts).sum(0) * (-decay * time).exp()).float()


def plucks(frequency, seconds, rate=RATE, decay=12.0):
    note = tone(frequency, 0.25, rate, decay=decay)
    return note.repeat(math.ceil(seconds * 4))[: round(seconds * rate)]


# Features


@pytest.mark.parametrize("rate", [4000, 16_000])
def test_features_see_neither_padding_nor_channels_nor_level(rate):
    features = SoundFeatures(rate)
    lengths = [rate + 77, 1024, 100, 1, 3 * rate // 2]
    clips = [0.1 * normal(length, seed=length).cumsum(0) for length in lengths]
    alone = torch.cat([features(clip[None]) for clip in clips])
    assert alone.shape == (5, features.num_features)
    assert alone.isfinite().all()
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=math.nan)
    torch.testing.assert_close(features(batch, torch.tensor(lengths)), alone, rtol=1e-3, atol=1e-3)
    stereo = torch.stack([1.5 * batch, 0.5 * batch], 1)
    torch.testing.assert_close(features(stereo, torch.tensor(lengths)), alone, rtol=1e-3, atol=1e-3)
    for factor in (-1.0, 1e-3, 100.0):
        torch.testing.assert_close(features(factor * batch, torch.tensor(lengths)), alone, rtol=1e-3, atol=1e-3)


def test_features_do_not_depend_on_the_batch(monkeypatch):
    features, clips = SoundFeatures(RATE), normal(7, 1, 700)
    expected = features(clips)
    monkeypatch.setattr("lit_models.diffusion.metrics.tagger.CHUNK_SAMPLES", 2048)
    torch.testing.assert_close(features(clips), expected, rtol=1e-4, atol=1e-4)
    assert features(clips[:0]).shape == (0, features.num_features)


def test_silence_has_features():
    rows = SoundFeatures(RATE)(torch.zeros(2, 1, 900))
    assert rows.isfinite().all()
    assert torch.equal(rows[0], rows[1])


def test_features_in_half_precision():
    """The sound is rounded; what is computed of it is not, nor do casts of the module around it matter."""
    clips = torch.stack([tone(200), plucks(500, 1.0)])
    features = SoundFeatures(RATE)
    expected = features(clips.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features(clips.bfloat16()), expected)
    torch.testing.assert_close(torch.nn.Sequential(features).bfloat16()(clips.bfloat16()), expected)


@pytest.mark.parametrize(
    ("rate", "frequency"), [(4000, 82.4), (4000, 440.0), (4000, 1396.9), (16_000, 440.0), (48_000, 98.0)]
)
def test_features_know_pitch_and_harmonics(rate, frequency):
    """The mean pitch is the fourth but last of the middle part, in octaves above 48 Hz."""
    features = SoundFeatures(rate)
    row = features(tone(frequency, 1.0, rate)[None])[0, 64:76]
    shares, octaves, spread, steps = row[:9], row[9], row[10], row[11]
    assert float(octaves) == pytest.approx(math.log2(frequency / 48), abs=0.06)
    assert float(spread) < 0.1
    assert float(steps) < 0.05
    count = sum(number * frequency < rate / 2 for number in (1, 2, 3))
    energies = torch.tensor([1.0, 0.25, 0.09])[:count]
    expected = (energies / energies.sum()).log()
    torch.testing.assert_close(shares[:count], expected, atol=0.5, rtol=0)
    assert (shares[count:8] < -4).all()


def test_features_tell_plucked_from_held_notes():
    features = SoundFeatures(RATE)
    held, plucked = features(torch.stack([tone(200, 2.0), plucks(200, 2.0)]))[:, -28:]
    # Median change of the logarithm of the energy in 8 steps of 8 ms: exp(-12 t) loses 24 a second.
    assert float(held[-5]) == pytest.approx(0, abs=0.1)
    assert float(plucked[-5]) == pytest.approx(-24 * 8 * 0.008, rel=0.15)


def test_rates_that_carry_nothing():
    with pytest.raises(ValueError, match="sounds are told apart from 500 Hz on"):
        SoundFeatures(100)


# Tagger


def sounds(count, seed=0, rate=RATE, seconds=0.3):
    """Held and plucked notes of two registers, and their labels."""
    pitches = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    kinds = list(itertools.islice(itertools.cycle(itertools.product(("held", "plucked"), ("low", "high"))), count))
    clips = []
    for (kind, register), place in zip(kinds, pitches.tolist(), strict=True):
        frequency = (100 if register == "low" else 400) * 2**place
        clips.append((tone if kind == "held" else plucks)(frequency, seconds, rate))
    return torch.stack(clips)[:, None], {"kind": [kind for kind, _ in kinds], "register": [name for _, name in kinds]}


def accuracy(tagger, clips, labels, **options):
    found = tagger(clips, **options)
    return {
        name: float((found[name].argmax(-1) == index).float().mean()) for name, index in tagger.indices(labels).items()
    }


@pytest.fixture(scope="module")
def tagger():
    clips, labels = sounds(80)
    return SoundTagger.fit(clips, labels, RATE, steps=60)


def test_a_tagger_hears_what_it_was_taught(tagger):
    clips, labels = sounds(40, seed=1)
    assert tagger.attributes == {"kind": ("held", "plucked"), "register": ("high", "low")}
    assert not tagger.training
    assert not any(parameter.requires_grad for parameter in tagger.parameters())
    assert min(accuracy(tagger, clips, labels).values()) == 1
    noisy = add_noise(clips, torch.Generator().manual_seed(3))
    assert min(accuracy(tagger, noisy, labels).values()) > 0.9
    assert min(accuracy(tagger, 0.01 * clips.bfloat16(), labels).values()) == 1
    other, labels = sounds(20, seed=2, rate=16_000)
    assert min(accuracy(tagger, other, labels, sample_rate=16_000).values()) == 1


def test_a_tagger_does_not_hear_padding(tagger):
    clips, _ = sounds(4, seed=5)
    lengths = torch.tensor([1200, 900, 401, 1100])
    padded = torch.nn.functional.pad(clips, (0, 500))
    dirty = padded.masked_fill(torch.arange(padded.shape[-1]) >= lengths[:, None, None], 7.0)
    for rate in (RATE, 6000):
        found = tagger(dirty, lengths, rate)
        for place, length in enumerate(lengths.tolist()):
            alone = tagger(clips[place : place + 1, :, :length], sample_rate=rate)
            for name, values in found.items():
                torch.testing.assert_close(values[place], alone[name][0], rtol=1e-2, atol=5e-2)


def test_a_tagger_can_be_saved(tagger, tmp_path):
    clips, _ = sounds(6)
    tagger.save_pretrained(tmp_path)
    loaded = SoundTagger.from_pretrained(tmp_path)
    assert (loaded.attributes, loaded.sample_rate) == (tagger.attributes, RATE)
    for name, logits in tagger(clips).items():
        assert torch.equal(loaded(clips)[name], logits)
    assert {key.split(".")[0] for key in loaded.state_dict()} == {"mean", "scale", "net"}


def test_training_is_repeatable_and_leaves_random_states_alone():
    clips, labels = sounds(16)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nets = [SoundTagger.fit(clips, labels, RATE, steps=5, seed=seed).net[0].weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])
    with torch.no_grad():  # as in a validation step
        assert torch.equal(SoundTagger.fit(clips, labels, RATE, steps=5).net[0].weight, nets[0])


def test_unknown_labels_teach_nothing():
    clips, labels = sounds(24)
    partly = {**labels, "register": [*labels["register"][:12], *[""] * 12]}
    tagger = SoundTagger.fit(clips, partly, RATE, steps=40, hidden=0)
    assert tagger.attributes["register"] == ("high", "low")
    assert tagger.indices({"register": ["low", "", "middle"], "mood": ["sad"]})["register"].tolist() == [1, -1, -1]
    assert accuracy(tagger, clips, labels)["register"] == 1


def test_lengths_matter_in_training():
    clips, labels = sounds(24)
    lengths = torch.full((24,), 800)
    cut = SoundTagger.fit(clips[..., :800], labels, RATE, steps=3)
    dirty = clips.masked_fill(torch.arange(clips.shape[-1]) >= 800, 0.0)
    padded = SoundTagger.fit(dirty, labels, RATE, steps=3, lengths=lengths, noise_copies=0)
    plain = SoundTagger.fit(clips[..., :800], labels, RATE, steps=3, noise_copies=0)
    torch.testing.assert_close(padded.mean, plain.mean, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(cut.mean, plain.mean, rtol=1e-3, atol=1e-3)


def test_noise_has_the_energy_that_was_asked_for():
    clips = torch.cat([0.01 * normal(200, 1, 2000), normal(200, 1, 2000, seed=1)])
    lengths = torch.full((400,), 1000)
    padded = clips.masked_fill(torch.arange(2000) >= 1000, 0.0)
    for sound, given in ((clips, None), (padded, lengths)):
        noise = add_noise(sound, torch.Generator().manual_seed(0), given) - sound
        energy = sound[..., :1000].square().mean((1, 2))
        ratio = 10 * (energy / noise.square().mean((1, 2))).log10()
        assert 4.5 < float(ratio.min()) < 8
        assert 27 < float(ratio.max()) < 30.5
        assert float(ratio.mean()) == pytest.approx(17.5, abs=1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [({"kind": ["a"]}, "has 1 values for 4 clips"), ({"kind": ["a"] * 4}, "two or more"), ({}, "at least one")],
)
def test_labels_that_teach_nothing(labels, message):
    with pytest.raises(ValueError, match=message):
        SoundTagger.fit(normal(4, 500), labels, RATE)


def test_clips_must_be_numbers():
    clips = normal(4, 500)
    clips[1, 2] = math.nan
    with pytest.raises(ValueError, match="samples that are no numbers"):
        SoundTagger.fit(clips, {"kind": ["a", "b"] * 2}, RATE)


# Folk tunes


def test_instruments_of_folk_tunes_are_told_apart():
    """Quarter seconds of tunes that were not heard in training."""
    data = FolkWave(
        sample_rate=RATE,
        length=1024,
        clip_seconds=8.192,
        instruments=["flute", "violin", "harp"],
        registers=["low", "high"],
        tempos={"medium": 96.0},
        scale="std",
        batch_size=32,
    )
    data.setup("fit")
    data.setup("test")
    clips, lengths, labels = collect(data.train_dataloader(), ["instrument", "register"])
    tagger = SoundTagger.fit(clips, labels, RATE, lengths=lengths)
    heard, ends, asked = collect(data.test_dataloader(), ["instrument", "register"])
    found = accuracy(tagger, heard, asked, lengths=ends)
    assert found["instrument"] > 0.8
    assert found["register"] > 0.8


def test_collecting_takes_what_is_there():
    batch = {"audio": normal(3, 1, 9), "valid_length": torch.tensor([9, 8, 7]), "columns": {"kind": ["a", "b", ""]}}
    clips, lengths, labels = collect([batch, batch, batch], ["kind"], limit=5)
    assert clips.shape == (5, 1, 9)
    assert lengths.tolist() == [9, 8, 7, 9, 8]
    assert labels == {"kind": ["a", "b", "", "a", "b"]}
    with pytest.raises(ValueError, match=r"no column 'mood'; choose attributes among its columns: kind"):
        collect([batch], ["mood"])
    with pytest.raises(ValueError, match="no clips to collect"):
        collect([], ["kind"])
