"""Comparison of the metrics with the reference vectors: functions that raise AssertionError."""

import pytest
import torch

from lit_models.diffusion.metrics import distances, music, scores, spectral

SETS = ("basic", "rank_deficient", "same", "one_dim")
KERNELS = ("gaussian", "iq", "imq")


def near(value, expected, rel=1e-6, absolute=1e-9):
    assert float(value) == pytest.approx(expected, rel=rel, abs=absolute)


def halves(*tensors):
    """The tensors, in two uneven batches."""
    cut = len(tensors[0]) // 3
    yield tuple(tensor[:cut] for tensor in tensors)
    yield tuple(tensor[cut:] for tensor in tensors)


def filled(metric, generated, reference):
    """A metric that has seen both sets in batches."""
    for (part,) in halves(generated):
        metric.update(part, reference=False)
    for (part,) in halves(reference):
        metric.update(part, reference=True)
    return metric


def check_frechet(inputs, expected):
    for name in SETS:
        a, b = inputs[f"{name}.a"], inputs[f"{name}.b"]
        # Implementations differ by this much where covariances are singular.
        rel = 1e-5 if name == "rank_deficient" else 1e-6
        direct = distances.frechet_distance(*distances.moments(a), *distances.moments(b))
        metric = filled(distances.FrechetAudioDistance(a.shape[1]), b, a).compute()
        for key in ("fad_fadtk", "fad_gudgud96", "fad_eig", "fad_torchmetrics"):
            near(direct, expected[name][key], rel)
            near(metric, expected[name][key], rel)


def check_kernel(inputs, expected):
    for name in SETS:
        a, b, stored = inputs[f"{name}.a"], inputs[f"{name}.b"], expected[name]
        near(distances.median_distance(b), stored["kad_bandwidth"])
        for kernel in KERNELS:
            near(distances.kernel_distance(a, b, kernel), stored[f"kad_{kernel}"])
            near(filled(distances.KernelAudioDistance(kernel=kernel), a, b).compute(), stored[f"kad_{kernel}"])
        near(distances.kernel_distance(a, b, bandwidth=1.5), stored["kad_gaussian_bw1.5"])


def check_tagger(inputs, expected):
    stored = expected["tagger"]
    inception = scores.InceptionScore(inputs["logits_ref"].shape[1])
    softmax, sigmoid = scores.TaggerDivergence(), scores.TaggerDivergence("sigmoid")
    for generated, reference in halves(inputs["logits_gen"], inputs["logits_ref"]):
        inception.update(reference)
        softmax.update(generated, reference)
        sigmoid.update(generated, reference)
    near(inception.compute(), stored["inception_score"])
    near(softmax.compute(), stored["kl_softmax_paired"])
    near(sigmoid.compute(), stored["kl_sigmoid_paired"])


def check_similarity(inputs, expected):
    similarity, retrieval = scores.TextAudioSimilarity(), scores.Retrieval((1,))
    for pairs in halves(inputs["clap_audio"], inputs["clap_text"]):
        similarity.update(*pairs)
        retrieval.update(*pairs)
    near(similarity.compute(), expected["clap_score_mean_cosine"])
    near(retrieval.compute()["R@1"], expected["retrieval_R@1_audio_to_text"])


def check_spectral(inputs, expected):
    for n_ffts, key in (((512, 256, 128), "mrstft_auraloss"), ((256,), "stft_single_auraloss")):
        metric = spectral.STFTDistance(n_ffts)
        for pair in zip(inputs["wav_x"], inputs["wav_y"], strict=True):
            metric.update(*pair)
        near(metric.compute(), expected[key])


def check_keys(inputs, expected):
    weights = expected["krumhansl_weights"]
    assert (list(music.MAJOR), list(music.MINOR)) == (weights["major"], weights["minor"])
    correlations, found = music.key_correlations(inputs["pc_hist"]).max(-1)
    assert len(found) == len(expected["key_ks"])
    for correlation, key, (name, stored) in zip(correlations, found, expected["key_ks"], strict=True):
        assert music.key_name(int(key)) == name
        near(correlation, stored)


CHECKS = (check_frechet, check_kernel, check_tagger, check_similarity, check_spectral, check_keys)


def check_all(inputs, expected):
    for check in CHECKS:
        check({name: tensor.clone() for name, tensor in inputs.items()}, expected)


def rolled(tensor):
    """The values at other places: another set, in which every row is different."""
    return torch.roll(tensor.flatten(), 1).reshape(tensor.shape) * 1.01
