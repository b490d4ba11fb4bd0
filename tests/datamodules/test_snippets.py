import numpy as np
import pytest

from datamodules import SnippetInstructions, SnippetPreferences, SnippetPrompts, asset_path
from datamodules.snippets import draw_pairs, load_snippets, train_tokenizer
from lit_models.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(asset_path("movie_snippets/tokenizer"))


def test_snippets():
    assert len(load_snippets("all")) == 10605
    assert load_snippets("all")[2] == (-0.6, "Effective but too tepid biopic")
    train, test = load_snippets("train"), load_snippets("test")
    assert (len(train), len(test)) == (9605, 1000)
    assert sorted(train + test) == sorted(load_snippets("all"))
    with pytest.raises(ValueError, match="split: 'val' is not one of all, train, test"):
        load_snippets("val")


def test_shipped_tokenizer(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 1000
    texts = [snippet.text for snippet in load_snippets("all")]
    ids = tokenizer(texts)["input_ids"]
    assert all(row[0] == 1 and 2 not in row for row in ids)
    lengths = np.array([len(row) + 1 for row in ids])
    assert lengths.mean() == pytest.approx(43.7, abs=0.5)
    assert np.percentile(lengths, 90) == pytest.approx(69, abs=1)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids[:200]] == texts[:200]


def test_training_the_tokenizer():
    trained = train_tokenizer(["a warm film"] * 9 + ["a cold film"] * 9, 270)
    assert trained("a warm film")["input_ids"][0] == 1
    assert len(trained) == 270


def test_pairs_differ_and_repeat():
    pairs = draw_pairs(load_snippets("test"), 50)
    assert pairs == draw_pairs(load_snippets("test"), 50)
    assert min(pair.chosen.rating - pair.rejected.rating for pair in pairs) >= 1.0
    with pytest.raises(ValueError, match=r"data\.min_gap: no two ratings differ by 9"):
        draw_pairs(load_snippets("test"), 1, 9)


def test_instructions(tokenizer):
    data = SnippetInstructions(limit_train=64, limit_val=5)
    data.setup("fit")
    got = next(iter(data.train_dataloader()))
    assert got["input_ids"].shape[1] <= 64
    assert (got["input_ids"][:, 0] == 1).all()
    assert ((got["labels"] == -100) == (got["attention_mask"] == 0)).all()
    assert len(data.datasets["val"]) == 5


def test_preferences():
    data = SnippetPreferences(n_train_pairs=40, n_test_pairs=10)
    data.setup("fit")
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (40, 10)
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 64


def test_prompts(tokenizer):
    data = SnippetPrompts(limit_train=50, keep_columns=["rating", "text"])
    data.setup("fit")
    got = next(iter(data.train_dataloader()))
    assert got["prompt_ids"].shape == (48, 5)
    texts = got["columns"]["text"]
    assert got["prompt_ids"].tolist() == [row[:5] for row in tokenizer(texts)["input_ids"]]
    assert texts[0] == load_snippets("train")[int(got["index"][0])].text


def test_assets():
    with pytest.raises(ValueError, match=r"asset: 'nothing' is not shipped; choose one of .*movie_snippets/tokenizer"):
        asset_path("nothing")
