"""Runs over a pool: samples, ids in batches, both forms of files; docstrings as such a pool."""

import json
from collections import Counter

import numpy as np
import pytest

from datamodules.docstrings import (
    LONGEST,
    SHORTEST,
    TOPICS,
    draw_docstrings,
    load_docstrings,
    train_docstring_tokenizer,
)
from datamodules.pool import PoolData, read_pool
from lit_models.recording import write_examples

POOL = [{"id": 10 + number, "context": "a b", "target": " c" if number % 2 else " d"} for number in range(20)]
POOL = [{**row, "text": row["context"] + row["target"]} for row in POOL]


@pytest.fixture
def files(tmp_path):
    write_examples(tmp_path / "pool.jsonl", POOL)
    write_examples(tmp_path / "tests.jsonl", POOL[:3])
    return {"path": str(tmp_path / "pool.jsonl"), "tests": str(tmp_path / "tests.jsonl")}


def ids(data):
    data.setup("fit")
    return [row["id"] for row in data.datasets["train"]]


def test_every_run_draws_its_own_sample(files, words):
    samples = [ids(PoolData(**files, tokenizer=words, sample=8, run=run)) for run in range(4)]
    assert all(len(set(sample)) == 8 for sample in samples)
    assert all(set(sample) <= set(range(10, 30)) for sample in samples)
    assert len(set(map(tuple, samples))) == 4
    assert ids(PoolData(**files, tokenizer=words, sample=8, run=2)) == samples[2]
    assert ids(PoolData(**files, tokenizer=words, sample=8, run=2, seed=5)) != samples[2]
    assert ids(PoolData(**files, tokenizer=words, sample=None)) == list(range(10, 30))


def test_samples_of_groups(files, words):
    groups = [[10, 14], [20, 29]]
    for run in range(3):
        sample = ids(PoolData(**files, tokenizer=words, sample=4, groups=groups, run=run))
        assert sorted(Counter(number >= 20 for number in sample).items()) == [(False, 4), (True, 4)]
        assert not set(sample) & set(range(15, 20))


def test_mixtures_of_groups(files, words):
    groups = [[10, 19], [20, 29]]
    shares = []
    for run in range(40):
        sample = ids(PoolData(**files, tokenizer=words, sample=8, groups=groups, run=run, mixture=0.3))
        assert len(set(sample)) == 8
        shares.append(np.mean([number >= 20 for number in sample]))
    assert min(shares) == 0
    assert max(shares) == 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.2)
    assert len(set(ids(PoolData(**files, tokenizer=words, sample=20, groups=groups, mixture=0.3)))) == 20


def test_batches_hold_ids(files, words):
    data = PoolData(**files, tokenizer=words, sample=None, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "id"}
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6 if number % 2 else 7] for number in batch["id"].tolist()]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6 if number % 2 else 7] for number in batch["id"].tolist()]
    (tests,) = list(data.val_dataloader())
    assert tests["id"].tolist() == [10, 11, 12]


def test_the_order_differs_from_run_to_run(files, words):
    orders = []
    for run in (0, 1):
        data = PoolData(**files, tokenizer=words, sample=None, batch_size=4, run=run)
        data.setup("fit")
        orders.append([number for batch in data.train_dataloader() for number in batch["id"].tolist()])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_an_end_token(files, words):
    data = PoolData(**files, tokenizer=words, end_token=True, sample=1)
    data.setup("fit")
    assert data.datasets["train"][0]["ids"].tolist()[-1] == 2


def test_texts_that_are_too_long_are_left_out(files, words):
    with pytest.raises(ValueError, match="has no usable row"):
        ids(PoolData(**files, tokenizer=words, sample=4, max_length=3))
    rows = [*POOL[1:], {"id": 10, "context": "a b c d e f", "target": " a", "text": "a b c d e f a"}]
    write_examples(files["path"], rows)
    with pytest.warns(UserWarning, match="dropped 1 of 20"):
        sample = ids(PoolData(**files, tokenizer=words, sample=None, max_length=4))
    assert sample == list(range(11, 30))


def test_released_files(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"id": 3, "input": "text yes", "context": "text"}) + "\n")
    assert read_pool(path) == [{"id": 3, "text": "text yes", "context": "text", "target": " yes"}]


@pytest.mark.parametrize("row", [{"text": "a b"}, {"text": "a b", "context": "b"}, {"text": "a", "context": "a"}])
def test_examples_without_an_answer(tmp_path, row):
    write_examples(tmp_path / "pool.jsonl", [{"id": 3, **row}])
    with pytest.raises(ValueError, match=r"pool\.jsonl: example 3 has no answer; add its `context`"):
        read_pool(tmp_path / "pool.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": -1}, r"^data\.run must be at least 0"),
        ({"sample": 0}, r"data\.sample at least 1"),
        ({"mixture": 0.0}, r"data\.mixture positive"),
        ({"sample": 30}, r"^data\.sample: 30 examples cannot be drawn from 20; set a smaller number$"),
        ({"sample": 6, "groups": [[10, 14], [15, 29]]}, r"^data\.sample: 6 examples cannot be drawn from 5"),
        ({"groups": [[14, 10]]}, r"^data\.groups: .* are no ranges"),
    ],
)
def test_wrong_options(files, words, options, message):
    with pytest.raises(ValueError, match=message):
        ids(PoolData(**files, tokenizer=words, **options))


def test_missing_file(files, words, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: there is no such file"):
        ids(PoolData(str(tmp_path / "nowhere.jsonl"), files["tests"], words))


# -- docstrings --------------------------------------------------------------------------------------------------------


def test_docstrings_of_the_library():
    lines = load_docstrings()
    assert len(lines) > 2500
    assert len({line.text for line in lines}) == len(lines)
    assert all(line.text.isascii() and SHORTEST <= len(line.text) <= LONGEST for line in lines)
    assert all("\n" not in line.text and "  " not in line.text for line in lines)
    assert min(Counter(line.topic for line in lines).values()) > 400
    assert set(TOPICS) == {line.topic for line in lines}


def test_docstrings_are_divided():
    pool, tests, rest = draw_docstrings(40, 8, 20, 4, seed=3)
    assert [row["id"] for row in pool] == list(range(60))
    assert [row["id"] for row in tests] == list(range(12))
    for rows, sizes in ((pool, (40, 20)), (tests, (8, 4))):
        for part, size in ((rows[: sizes[0]], sizes[0]), (rows[sizes[0] :], sizes[1])):
            assert set(Counter(row["topic"] for row in part).values()) == {size // 4}
    assert all(row["text"] == row["context"] + row["target"] for row in pool + tests)
    used = {row["context"].removesuffix(" Topic:") for row in pool + tests}
    assert len(used) == 72
    assert not used & {line.text for line in rest}
    assert len(rest) == len(load_docstrings()) - 72
    assert draw_docstrings(40, 8, 20, 4, seed=3)[0] == pool
    assert draw_docstrings(40, 8, 20, 4, seed=4)[0] != pool
    with pytest.raises(ValueError, match=r"^docstrings\.pool must be a multiple of 4"):
        draw_docstrings(41)
    with pytest.raises(ValueError, match=r"there are only .* lines on .*; ask for fewer"):
        draw_docstrings(40000)


def test_answers_are_single_tokens():
    pool, _, rest = draw_docstrings(40, 4, 0, 0)
    tokenizer = train_docstring_tokenizer(rest[:300], 512)
    assert len(tokenizer) == 512
    ids = tokenizer(pool[0]["text"])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[-2:]) == [" Topic:", pool[0]["target"]]
    assert ids[0] == tokenizer.bos_token_id
