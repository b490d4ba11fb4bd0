import numpy as np
import pytest
import torch

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from transformers import AutoFeatureExtractor, ClapConfig, ClapFeatureExtractor, ClapModel

from lit_models.diffusion import metrics
from lit_models.diffusion.metrics.clap import ClapEmbedding

RATE = 8000
SECONDS = 2
"""The longest clip that the model takes at once."""


def save_clap(folder, fusion=False, padding="repeatpad"):
    """A random CLAP model with its feature extractor and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    audio = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "enable_fusion": fusion,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12))
        for parameter in model.parameters():  # visible differences between sounds
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=80,
        max_length_s=SECONDS,
        fft_window_size=256,
        frequency_max=RATE // 2,
        truncation="fusion" if fusion else "rand_trunc",
        padding=padding,
    ).save_pretrained(folder)
    words = ["<pad>", "<unk>", "a", "low", "flute", "violin"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=1000
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("clap"))


def noise(length, seed=0):
    """Coloured noise, different for each seed."""
    rows = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    return 0.1 * torch.nn.functional.avg_pool1d(rows[None, None], 1 + 2 * seed, 1, seed)[0, 0]


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_windows_are_what_the_feature_extractor_sees(tmp_path, fusion, padding):
    name = save_clap(tmp_path, fusion, padding)
    clap = ClapEmbedding(name, batch_size=2)
    extractor = AutoFeatureExtractor.from_pretrained(name)
    whole = SECONDS * RATE
    lengths = torch.tensor([5 * whole // 2, 3001, 1, whole])
    clips = torch.nn.utils.rnn.pad_sequence([noise(int(n), seed) for seed, n in enumerate(lengths)], batch_first=True)
    rows, owners = clap.windows(clips, lengths)
    assert owners.tolist() == [0, 0, 0, 0, 1, 2, 3]
    heard = [clips[0, start : start + whole] for start in range(0, 3 * whole // 2 + 1, whole // 2)]
    heard += [clips[place, :length] for place, length in enumerate(lengths.tolist()) if place]
    for row, sound in zip(rows, heard, strict=True):
        inputs = extractor(sound.numpy(), sampling_rate=RATE, return_tensors="pt")
        inputs["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)  # chosen at random by the extractor
        with torch.no_grad():
            expected = clap.model.get_audio_features(**inputs).pooler_output[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert (rows[4] - rows[6]).abs().max() > 0.01


def test_numpy_draws_nothing(folder):
    state = np.random.get_state()[1].copy()
    ClapEmbedding(folder)(noise(100)[None])
    assert np.array_equal(np.random.get_state()[1], state)


def test_clips_are_directions_of_mean_windows(folder):
    clap = ClapEmbedding(folder, hop_seconds=0.5)
    clips = torch.stack([noise(5 * RATE, seed) for seed in (1, 4)])
    rows = clap(clips)
    assert rows.shape == (2 * 7, clap.num_features)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(14))
    expected = torch.nn.functional.normalize(rows.view(2, 7, -1).mean(1), dim=-1)
    torch.testing.assert_close(clap.clips(clips), expected)
    assert clap(clips[:0]).shape == (0, 12)
    assert clap.clips(clips[:0]).shape == (0, 12)


def test_padding_channels_and_precision_do_not_matter(folder):
    clap = ClapEmbedding(folder)
    lengths = torch.tensor([9000, 4000])
    clips = torch.stack([noise(20_000, 3), noise(20_000, 5)]).bfloat16()
    expected = torch.cat([clap(clip[None, :length].float()) for clip, length in zip(clips, lengths, strict=True)])
    places = torch.arange(20_000)
    dirty = clips.masked_fill(places >= lengths[:, None], torch.nan)
    with torch.autocast("cpu", torch.bfloat16):
        found = clap(torch.stack([dirty, dirty], 1), lengths)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.nn.Sequential(clap).bfloat16()[0].model.dtype == torch.float32


def test_other_rates_are_resampled(folder):
    time = torch.arange(2 * 16_000) / 16_000
    sound = 0.3 * (2 * torch.pi * 440 * time).sin()[None]
    high, low = ClapEmbedding(folder, 16_000)(sound), ClapEmbedding(folder)(sound[:, ::2])
    assert float(torch.nn.functional.cosine_similarity(high, low)[0]) > 0.98


def test_texts(folder):
    clap = ClapEmbedding(folder, batch_size=2)
    texts = ["a low flute", "violin", "a low flute", "flute " * 500, ""]
    found = clap.texts(texts)
    assert found.shape == (5, 12)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01
    torch.testing.assert_close(clap.texts(["violin"])[0], found[1], rtol=1e-4, atol=1e-5)
    assert clap.texts([""]).isfinite().all()
    assert clap.texts([]).shape == (0, 12)


def test_it_serves_the_metrics(folder):
    clap = ClapEmbedding(folder)
    clips = torch.stack([noise(3 * RATE, seed) for seed in range(6)])
    distance = metrics.FrechetAudioDistance(clap.num_features, clap)
    distance.update(clips, reference=True)
    distance.update(clips, reference=False, lengths=torch.full((6,), 3 * RATE))
    assert float(distance.compute()) == pytest.approx(0, abs=1e-6)
    score = metrics.TextAudioSimilarity()
    score.update(clap.clips(clips), clap.texts(["a flute"] * 6))
    assert -1 <= float(score.compute()) <= 1


@pytest.mark.parametrize("options", [{"sample_rate": 0}, {"hop_seconds": -1.0}, {"batch_size": 0}])
def test_arguments(folder, options):
    with pytest.raises(ValueError, match="must be positive"):
        ClapEmbedding(folder, **options)


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"could not be loaded .*give a folder or hub id of a CLAP model"):
        ClapEmbedding(str(tmp_path / "nothing"))
