import importlib.util
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from datamodules import FolkWave
from lit_models.diffusion import metrics
from lit_models.diffusion.evaluation import Evaluation, SampleMetrics, load_embeddings, save_embeddings
from lit_models.diffusion.metrics.clap import ClapEmbedding
from lit_models.diffusion.metrics.tagger import SoundTagger
from lit_models.hyperparameters import plain
from tests.diffusion.test_clap import save_clap
from tests.diffusion.test_tagger import sounds

RATE = 4000


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """Folder of a tagger of held and plucked, low and high notes."""
    clips, labels = sounds(40)
    folder = tmp_path_factory.mktemp("tagger")
    SoundTagger.fit(clips, labels, RATE, steps=40).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("clap"))


def values(found):
    return {name: float(value) for name, value in found.items()}


def measure(options, *args, rate=RATE, **kwargs):
    measured = options.build(rate)
    measured.update(*args, **kwargs)
    return values(measured.compute())


def normal(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Distances


def test_distances_are_those_of_logmel_windows():
    generated, real = normal(6, 1, 3 * RATE), normal(5, 1, 3 * RATE, seed=1).cumsum(-1)
    found = measure(Evaluation(kad=True), generated[:5], real)
    logmel, expected = metrics.LogMel(RATE), {}
    for name, metric in (
        ("fad", metrics.FrechetAudioDistance(128, logmel)),
        ("kad", metrics.KernelAudioDistance(logmel)),
    ):
        metric.update(real, reference=True)
        metric.update(generated[:5], reference=False)
        expected[name] = float(metric.compute())
    assert found["fad"] == pytest.approx(expected["fad"], rel=1e-4)
    assert found["kad"] == pytest.approx(expected["kad"], rel=1e-4)
    assert (found["clips"], found["invalid"]) == (5, 0)
    assert found["rms"] == pytest.approx(0.1, rel=0.02)
    assert found["real/rms"] == pytest.approx(float(real.square().mean().sqrt()), rel=1e-4)


def test_ends_of_clips_do_not_count():
    """Neither what lies behind the end of a real clip, nor what was generated for that time."""
    lengths = torch.tensor([2 * RATE, 5000, 700, 0])
    generated, real = normal(4, 1, 2 * RATE), normal(4, 1, 2 * RATE, seed=1)
    behind = torch.arange(2 * RATE) >= lengths[:, None, None]
    options = Evaluation(kad=True)
    expected = measure(options, generated.masked_fill(behind, 0), real.masked_fill(behind, 0), lengths)
    found = measure(options, generated.masked_fill(behind, 5), real.masked_fill(behind, math.nan), lengths)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["clips"] == 4
    without = measure(options, generated[:3], real[:3], lengths[:3])
    assert {**without, "clips": 4} == pytest.approx(expected, rel=1e-5)


def test_longer_clips_go_on_where_the_data_does():
    lengths = torch.tensor([RATE, 3000])
    generated = normal(2, 1, 2 * RATE)
    measured = Evaluation().build(RATE)
    made, _ = measured._clips(generated, normal(2, 1, RATE), lengths, 2, RATE)
    assert made.lengths.tolist() == [2 * RATE, 3000]


def test_clips_shorter_than_a_window_are_a_window():
    found = measure(
        Evaluation(kad=True, key=True, tempo=True, pitch=True),
        normal(20, 1, 300),
        normal(20, 1, 300, seed=1),
        columns={"key": ["C major"] * 20, "tempo": ["slow"] * 20},
    )
    assert found["fad"] > 0
    assert found["tempo/accuracy"] == 0
    assert 0 <= found["key/accuracy"] <= 1


def test_other_rates_and_channels():
    wave = torch.stack([torch.sin(2 * math.pi * f * torch.arange(2 * 16_000) / 16_000) for f in (220, 330, 470, 600)])
    found = measure(Evaluation(), wave[:, None], wave[:, None].expand(-1, 2, -1), sample_rate=16_000)
    assert found["fad"] == pytest.approx(0, abs=1e-3)
    assert found["rms"] == pytest.approx(0.5**0.5, rel=0.01)


def test_what_is_no_number_is_counted_and_left_out():
    generated, real = normal(5, 1, RATE), normal(5, 1, RATE, seed=1)
    expected = measure(Evaluation(), generated[[0, 2, 4]], real[[0, 2, 4]])
    broken = generated.clone()
    broken[1, 0, 7], broken[3, 0, 9] = math.nan, 1e30
    found = measure(Evaluation(), broken[[0, 1, 2, 3, 4]], real)
    assert (found["clips"], found["invalid"]) == (5, 2)
    assert found["rms"] == pytest.approx(expected["rms"], rel=1e-5)
    assert math.isfinite(found["fad"])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_clips_are_said_to_be(count):
    measured = Evaluation(kad=True).build(RATE)
    measured.update(normal(count, 1, RATE), normal(count, 1, RATE))
    with pytest.warns(UserWarning, match="fad is not measured: .* windows were seen, but at least 2"):
        found = measured.compute()
    assert found["clips"] == count
    assert not {"fad", "kad"} & found.keys()


def test_half_precision_is_only_that_of_the_sound():
    generated, real = normal(8, 1, RATE).bfloat16(), normal(8, 1, RATE, seed=1).bfloat16()
    options = Evaluation(kad=True, key=True, tempo=True, pitch=True)
    columns = {"key": ["C major", "A minor"] * 4, "tempo": ["96 bpm", 120] * 4}
    expected = measure(options, generated.float(), real.float(), columns=columns)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            holder = nn.Sequential(options.build(RATE)).bfloat16()
            holder[0].update(generated, real, columns=columns)
            found = values(holder[0].compute())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx(expected, rel=1e-4)


# What prompts ask for


def test_agreement_of_generated_and_of_real_clips(tagger):
    """Real clips agree with their columns; generated ones are those of the next prompt."""
    real, labels = sounds(16, seconds=2.0)
    swapped = real.roll(1, 0)  # the register is the other one for each, the kind for every second
    found = measure(Evaluation(fad=False, tagger=tagger), swapped, real, columns=labels)
    assert found["real/relevance/register"] == found["real/relevance/kind"] == found["real/relevance/all"] == 1
    assert found["relevance/register"] == found["relevance/all"] == 0
    assert found["relevance/kind"] == 0.5
    assert found["kl/register"] > 1
    assert 1.5 < found["inception/register"] <= 2
    same = measure(Evaluation(fad=False, tagger=tagger), real, real, columns=labels)
    assert same["kl/kind"] == pytest.approx(0, abs=1e-6)
    assert same["relevance/all"] == 1


def test_several_clips_for_each_prompt(tagger):
    real, labels = sounds(8, seconds=1.0)
    options = Evaluation(tagger=tagger, diversity=True, samples_per_prompt=2)
    generated = real.repeat_interleave(2, 0).clone()
    same = measure(options, generated, real, columns=labels)
    assert same["diversity"] == pytest.approx(0, abs=1e-6)
    assert same["kl/kind"] == pytest.approx(0, abs=1e-6)
    assert same["clips"] == 16
    generated[1::2] = generated[1::2].roll(1, 0)
    found = measure(options, generated, real, columns=labels)
    assert found["relevance/register"] == 0.5
    assert found["diversity"] > 1


def test_diversity_takes_equal_texts_as_one_prompt():
    generated = normal(4, 1, RATE)
    generated[2] = generated[0]
    options, text = Evaluation(fad=False, diversity=True), ["one", "two", "one", "three"]
    assert measure(options, generated, None, text=text)["diversity"] == pytest.approx(0, abs=1e-6)
    with pytest.warns(UserWarning, match=r"no prompt has two clips; set evaluation\.samples_per_prompt"):
        assert "diversity" not in measure(options, generated, None, text=list("abcd"))


def test_keys_and_tempos_of_folk_tunes():
    data = FolkWave(
        sample_rate=16_000, length=81_920, instruments=["organ"], registers=["high"], tempos={"fast": 144.0}
    )
    data.setup("test")
    rows = [data.build("train")[row] for row in range(7)]
    clips = torch.stack([row["audio"] for row in rows])
    columns = {name: [row["columns"][name] for row in rows] for name in ("key", "tempo", "title")}
    found = measure(Evaluation(fad=False, key=True, tempo=True, pitch=True), clips, clips, columns=columns, rate=16_000)
    assert found["key/accuracy"] == found["real/key/accuracy"] > 0.2
    assert found["key/weighted"] >= found["key/accuracy"]
    assert found["tempo/octave_accuracy"] == found["real/tempo/octave_accuracy"] > 0.4
    assert found["pitch/accuracy"] == 1
    assert "real/pitch/accuracy" not in found
    slow = {**columns, "tempo": ["fast"] * 7}
    other = measure(Evaluation(fad=False, tempo=True, tempos={"fast": 100.0}), clips, clips, columns=slow, rate=16_000)
    assert other["tempo/octave_accuracy"] < found["tempo/octave_accuracy"]


def test_pitches_can_be_given():
    clips, _ = sounds(4, seconds=1.0)
    tracks = [[100.0 * 2**0.5] * 90, np.full(50, 500.0), torch.zeros(3), []]
    found = measure(Evaluation(fad=False, pitch=True), clips, clips, columns={"pitches": tracks})
    assert found["pitch/accuracy"] == found["real/pitch/accuracy"]
    assert found["pitch/chroma_accuracy"] >= found["pitch/accuracy"]


def test_missing_columns_are_named_once(tagger):
    clips, labels = sounds(4, seconds=1.0)
    measured = Evaluation(key=True, tempo=True, tagger=tagger).build(RATE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            measured.update(clips, clips, columns={"kind": labels["kind"], "tempo": ["", "brisk", None, "x"]})
        found = measured.compute()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3
    for part in (
        "no column 'key', so agreement with the key is not measured; its columns are: kind, tempo",
        "no column 'register', so relevance of the register is not measured",
        "column 'tempo': 'brisk' is neither a number nor one of slow, medium, fast",
    ):
        assert sum(part in message for message in messages) == 1
    assert {"relevance/kind", "kl/register", "fad"} <= found.keys()
    assert not {name for name in found if "key" in name or "tempo" in name or name == "relevance/register"}


def test_columns_that_tell_nothing_are_named():
    clips = normal(2, 1, RATE)
    with pytest.warns(UserWarning, match="key is not measured: no clip of the data tells what to expect"):
        measure(Evaluation(fad=False, key=True), clips, clips, columns={"key": ["", ""]})
    with pytest.warns(UserWarning, match=r"column 'key': key 'H dur' is unknown.*such a key are left out"):
        found = measure(Evaluation(fad=False, key=True), clips, clips, columns={"key": ["H dur", "C major"]})
    assert "key/accuracy" in found


def test_prompts_without_real_sound(tagger):
    clips, labels = sounds(4, seconds=1.0)
    with pytest.warns(UserWarning, match="fad is not measured: .* 0 reference windows"):
        found = measure(Evaluation(tagger=tagger), clips, None, columns=labels)
    assert found["relevance/all"] == 1
    assert not {name for name in found if name.startswith(("real/", "kl/", "fad"))}


# Embeddings


def test_copies_of_training_clips_are_found(tmp_path):
    data = FolkWave(sample_rate=RATE, length=RATE, batch_size=16)
    data.setup("fit")
    data.setup("test")
    path = tmp_path / "new" / "known.safetensors"
    assert save_embeddings(path, data.train_dataloader(), RATE, limit=40) == 40
    batch = next(iter(data.test_dataloader()))
    options = Evaluation(fad=False, known=str(path))
    fresh = measure(options, batch["audio"], batch["audio"], batch["valid_length"])
    copied = next(iter(data.train_dataloader()))
    copies = measure(options, copied["audio"], copied["audio"], copied["valid_length"])
    assert copies["nearest/copies"] == 1
    assert copies["nearest/mean"] == pytest.approx(1, abs=1e-4)
    assert fresh["nearest/mean"] < 0.95
    assert fresh["nearest/copies"] < 0.5


def test_clap_compares_sounds_with_prompts(clap, tmp_path):
    generated, real = normal(6, 1, 3 * RATE), normal(6, 1, 3 * RATE, seed=1)
    text = ["a flute", "a violin", "low", "a low flute", "a low violin", ""]
    path = tmp_path / "known.safetensors"
    batches = [{"audio": real, "valid_length": torch.full((6,), 3 * RATE)}]
    assert save_embeddings(path, batches, RATE, clap=clap) == 6
    options = Evaluation(kad=True, clap=clap, known=str(path))
    found = measure(options, generated, real, text=text)
    assert {"fad", "kad", "fad_clap", "kad_clap", "clap", "real/clap", "retrieval/R@1", "nearest/max"} <= found.keys()
    network = ClapEmbedding(clap, RATE)
    score = metrics.TextAudioSimilarity()
    score.update(network.clips(generated), network.texts(text))
    assert found["clap"] == pytest.approx(float(score.compute()), abs=1e-5)
    assert measure(options, real, real, text=text)["nearest/max"] == pytest.approx(1, abs=1e-5)
    with pytest.warns(UserWarning, match="the data has no prompts, so no CLAP score is measured"):
        assert "clap" not in measure(options, generated, real)
    with pytest.raises(ValueError, match=r"evaluation\.known: .*known.safetensors holds embeddings of .*set it"):
        Evaluation(known=str(path)).build(RATE)


def test_files_that_hold_no_embeddings(tmp_path):
    (tmp_path / "text").write_text("hello")
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=r"evaluation\.known: .* is no file of embeddings"):
            load_embeddings(tmp_path / name)
    with pytest.raises(ValueError, match="1 clips are too few"):
        save_embeddings(tmp_path / "x", [{"audio": normal(2, 1, 99), "valid_length": torch.tensor([99, 0])}], RATE)


# As a part of a module


def test_it_adds_nothing_to_the_module(tagger, clap):
    holder = nn.Sequential(Evaluation(tagger=tagger, clap=clap, key=True).build(RATE))
    assert not holder.state_dict()
    assert not list(holder.parameters())
    assert not list(holder.buffers())
    holder.load_state_dict({})
    clips, labels = sounds(4, seconds=1.0)
    holder.train().to("meta").cpu()  # as where weights are made later
    holder[0].update(clips, clips, columns=labels, text=["a"] * 4)
    assert values(holder[0].compute())["relevance/all"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_follows_to_the_gpu(tagger, clap):
    clips, labels = sounds(8, seconds=1.0)
    columns = labels | {"key": ["C major"] * 8, "tempo": ["slow"] * 8}
    options = Evaluation(kad=True, key=True, tempo=True, pitch=True, diversity=True, tagger=tagger, clap=clap)
    found = []
    for device in ("cpu", "cuda"):
        holder = nn.Sequential(options.build(RATE)).to(device)
        real = clips.roll(2, 0).to(device)
        holder[0].update(clips.to(device), real, torch.full((8,), 3000), columns, text=["a", "low"] * 4)
        found.append(values(holder[0].compute()))
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-2)


def test_it_can_be_built_where_weights_are_made_later():
    with torch.device("meta"):
        measured = Evaluation(kad=True).build(RATE)
    measured.update(normal(3, 1, RATE), normal(3, 1, RATE, seed=1))
    assert values(measured.compute())["fad"] > 0


def test_limit_and_reset():
    measured = Evaluation(limit=5, kad=True).build(RATE)
    assert measured.room(4) == 4
    measured.update(normal(4, 1, RATE), normal(4, 1, RATE, seed=1))
    before = values(measured.compute())
    assert (measured.room(4), measured.room(1)) == (1, 1)
    measured.update(normal(1, 1, RATE), normal(1, 1, RATE, seed=1))
    assert measured.room(4) == 0
    measured.reset()
    assert measured.room(4) == 4
    measured.update(normal(4, 1, RATE), normal(4, 1, RATE, seed=1))
    assert values(measured.compute()) == before
    assert Evaluation().build(RATE).room(7) == 7


class Judge(LightningModule):
    """Evaluates noise against other noise; the second process of two sees nothing in its last batch."""

    def __init__(self, options, skip=()):
        super().__init__()
        self.measured = options.build(RATE)
        self.skip, self.found = skip, {}

    def test_step(self, batch, batch_idx):
        rows = [row for row in batch[:, 0].long().tolist() if row not in self.skip]
        if rows:
            clips, labels = sounds(16, seconds=0.5)
            real, _ = sounds(16, seed=3, seconds=0.5)
            texts = [f"prompt {row % 8}" for row in rows]
            columns = {name: [label[row] for row in rows] for name, label in labels.items()}
            self.measured.update(clips[rows], real[rows], columns=columns, text=texts)

    def on_test_epoch_end(self):
        self.log_dict(self.measured.compute(), sync_dist=True)
        self.measured.reset()


@pytest.mark.parametrize("skip", [(), range(1, 16, 2)], ids=["even", "one idle"])
def test_two_processes_agree_with_one(quiet_trainer, tagger, clap, skip):
    rows = DataLoader(torch.arange(16)[:, None].float(), batch_size=4)
    options = Evaluation(kad=True, diversity=True, tagger=tagger, clap=clap)
    results = []
    for ranks in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no prompt has two clips.*")
            results.append(quiet_trainer(**ranks).test(Judge(options, skip), rows, verbose=False)[0])
    assert {"fad", "kad", "diversity", "relevance/all", "kl/kind", "clap", "retrieval/R@1"} <= results[0].keys()
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-6)
    assert results[1]["clips"] == 16 - len(skip)


def test_two_processes_without_clips(quiet_trainer):
    rows = DataLoader(torch.arange(16)[:, None].float(), batch_size=4)
    judge = Judge(Evaluation(kad=True), range(16))
    found = quiet_trainer(devices=2, strategy="ddp_fork").test(judge, rows, verbose=False)[0]
    assert found == {"clips": 0, "invalid": 0}


# Options


def test_options_can_be_saved():
    options = Evaluation(tagger="x", tempos={"slow": 60.0}, limit=3)
    assert Evaluation(**plain(options)) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, r"evaluation\.samples_per_prompt: 0 must be at least 1"),
        ({"steps": 0}, r"evaluation\.steps"),
        ({"limit": 0}, r"evaluation\.limit"),
        ({"tempos": {"slow": 0.0}}, r"evaluation\.tempos: 'slow' is 0\.0 beats per minute"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**options)


def test_no_tagger(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.tagger: .* holds no SoundTagger .*train one with"):
        Evaluation(tagger=str(tmp_path)).build(RATE)
    with pytest.raises(ValueError, match="need at least 500 Hz"):
        SampleMetrics(Evaluation(), 100)


@pytest.mark.parametrize(
    ("generated", "real", "options"),
    [(4, 3, {}), (3, 3, {"text": ["a"]}), (3, 3, {"columns": {"key": ["C major"]}}), (3, 0, {})],
)
def test_numbers_that_do_not_fit(generated, real, options):
    with pytest.raises(ValueError, match=f"generated: {generated} clips do not fit the rest of the batch"):
        Evaluation().build(RATE).update(normal(generated, 1, 99), normal(real, 1, 99), **options)


# Do the numbers mean anything?


def balanced(data, count, sides=2, seed=0, **kwargs):
    """Sets of clips of different tunes, with the same instruments and registers in each."""
    rows = data.build("train")
    groups = {}
    for row in np.random.default_rng(seed).permutation(len(rows)):
        facts = rows._facts(int(row))
        groups.setdefault((facts["instrument"], facts["register"]), []).append(int(row))
    chosen = [[] for _ in range(sides)]
    for number in range(count):
        group = list(groups.values())[number % len(groups)]
        for side in chosen:
            side.append(group.pop())
    return [torch.stack([rows[row]["audio"] for row in side]) for side in chosen]


def distances(count, sources=None):
    """FAD from real clips of other real clips, of one instrument, of noisy ones, and of noise alone."""
    options = {"sources": sources, "sample_rate": 16_000, "length": 81_920}
    reference, real = balanced(FolkWave(**options), count)
    (organ,) = balanced(FolkWave(**options, instruments=["organ"]), count, sides=1, seed=1)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    strength = real.square().mean((1, 2), keepdim=True).sqrt()
    sets = {"real": real, "organ": organ}
    sets |= {f"{snr} dB": real + noise * strength * 10 ** (-snr / 20) for snr in (30, 20, 10)}
    sets["noise"] = 0.1 * noise
    measured, found = Evaluation().build(16_000), {}
    for name, clips in sets.items():
        measured.reset()
        measured.update(clips, reference)
        found[name] = float(measured.compute()["fad"])
    return found


def test_distances_order_sets_of_folk_tunes():
    found = distances(24)
    assert found["real"] < found["organ"] < found["noise"]
    assert found["real"] < found["30 dB"] < found["20 dB"] < found["10 dB"] < found["noise"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("music21") is None, reason="needs the tunes of music21")
def test_distances_of_96_clips_are_as_published():
    found = distances(96, ["ryansMammoth"])
    assert found["real"] < found["organ"] < found["noise"]
    expected = {"real": 24.6, "organ": 170, "30 dB": 115, "20 dB": 482, "10 dB": 1293, "noise": 1619}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.2)
