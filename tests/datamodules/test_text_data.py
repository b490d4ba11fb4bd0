"""Prompts, pairs and demonstrations: literal rows in, literal batches out, and every error."""

import numpy as np
import pytest
import torch

from datamodules import InstructionData, PreferenceData, PromptData, PromptsWithText, asset_path
from datamodules.encoding import Encoder
from datamodules.splits import stage_indices
from lit_models.tokenization import load_tokenizer


def batch(data, stage="fit", size=None):
    data.setup(stage)
    split = {"fit": "train"}.get(stage, stage)
    rows = list(data.datasets[split])
    return data.collator()(rows[:size])


PAIRS = [{"prompt": "a b", "chosen": " c", "rejected": " d e"}, {"prompt": "c", "chosen": " a", "rejected": " a"}]


def test_prompts(write, words):
    rows = [{"prompt": "a b c", "id": "x"}, {"prompt": "d", "id": "y"}]
    got = batch(PromptData(write(rows), words, keep_columns=["id"]))
    assert got["prompt_ids"].tolist() == [[1, 4, 5, 6], [0, 0, 1, 7]]
    assert got["prompt_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert got["index"].tolist() == [0, 1]
    assert got["columns"] == {"id": ["x", "y"]}


def test_prompts_padded_to_the_maximum(write, words):
    data = PromptData(write([{"prompt": "a"}]), words, max_prompt_length=4, pad_to_max=True)
    assert batch(data)["prompt_ids"].tolist() == [[0, 0, 1, 4]]


def test_long_prompts_are_left_out_and_counted(write, words_without_bos):
    data = PromptData(
        write([{"prompt": "a b c"}, {"prompt": "a"}, {"prompt": "b c"}]), words_without_bos, max_prompt_length=2
    )
    with pytest.warns(UserWarning, match=r"^dropped 1 of 3 prompts longer than data\.max_prompt_length=2$"):
        got = batch(data)
    assert got["prompt_ids"].tolist() == [[0, 4], [5, 6]]
    assert got["index"].tolist() == [1, 2]


def test_no_prompt_is_left(write, words):
    with pytest.raises(ValueError, match=r"has no usable row; dropped 1 of 1 prompts longer than data\.max_prompt_len"):
        PromptData(write([{"prompt": "a b c"}]), words, max_prompt_length=2).setup("fit")


def test_first_tokens_as_prompt(write, words):
    data = PromptData(write([{"prompt": "a b c d e"}, {"prompt": "a"}]), words, prompt_tokens=2)
    assert batch(data)["prompt_ids"].tolist() == [[1, 4, 5], [0, 1, 4]]


def test_empty_prompt(write, words, words_without_bos):
    path = write([{"prompt": "a"}, {"prompt": ""}])
    assert batch(PromptData(path, words))["prompt_ids"].tolist() == [[1, 4], [0, 1]]
    with pytest.raises(ValueError, match=r"data\.prompt_column: column 'prompt' of row 1 is empty and the tokenizer"):
        PromptData(path, words_without_bos).setup("fit")


def test_prompt_that_is_no_text(write, words):
    with pytest.raises(ValueError, match=r"data\.prompt_column: column 'prompt' of row 0 holds 3 instead of text"):
        PromptData(write([{"prompt": 3}]), words).setup("fit")


def test_pairs(write, words):
    got = batch(PreferenceData(write(PAIRS), words))
    assert got["input_ids"].tolist() == [[1, 4, 5, 6, 2, 0], [1, 6, 4, 2, 0, 0], [1, 4, 5, 7, 8, 2], [1, 6, 4, 2, 0, 0]]
    assert got["attention_mask"].sum(1).tolist() == [5, 4, 6, 4]
    assert set(got) == {"input_ids", "attention_mask"}


def test_pairs_with_margin_and_cut(write, words):
    data = PreferenceData(
        write([{**PAIRS[0], "gap": 1}, {**PAIRS[1], "gap": 0.5}]), words, margin_column="gap", max_length=3
    )
    got = batch(data)
    assert got["input_ids"].tolist() == [[1, 4, 5], [1, 6, 4], [1, 4, 5], [1, 6, 4]]
    assert got["margin"].tolist() == [1.0, 0.5]
    assert got["margin"].dtype == torch.float32


def test_margin_that_is_no_number(write, words):
    data = PreferenceData(write([{**PAIRS[0], "gap": "big"}]), words, margin_column="gap")
    with pytest.raises(ValueError, match=r"data\.margin_column: column 'gap' of row 0 holds 'big', which is no number"):
        data.setup("fit")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_answer(write, words, side):
    with pytest.raises(ValueError, match=rf"data\.{side}_column: column '{side}' of row 1 is empty"):
        PreferenceData(write([PAIRS[0], {**PAIRS[1], side: ""}]), words).setup("fit")


def test_empty_answer_of_a_known_data_set(write, words):
    with pytest.raises(ValueError, match=r"data\.format: hh: the chosen text of row 0 is empty"):
        PreferenceData(write([{**PAIRS[1], "chosen": ""}]), words, format="hh").setup("fit")


DEMONSTRATIONS = [{"prompt": "a b", "completion": " c"}, {"prompt": "a", "completion": " b c d"}]


def test_loss_on_completion(write, words):
    got = batch(InstructionData(write(DEMONSTRATIONS), words))
    assert got["input_ids"].tolist() == [[1, 4, 5, 6, 2, 0], [1, 4, 5, 6, 7, 2]]
    assert got["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert got["labels"].tolist() == [[-100, -100, -100, 6, 2, -100], [-100, -100, 5, 6, 7, 2]]


def test_loss_on_all(write, words):
    got = batch(InstructionData(write(DEMONSTRATIONS), words, loss_on="all"))
    assert got["labels"].tolist() == [[1, 4, 5, 6, 2, -100], [1, 4, 5, 6, 7, 2]]


def test_loss_as_in_the_official_code(write, words):
    got = batch(InstructionData(write(DEMONSTRATIONS), words, loss_on="official", max_length=7))
    assert got["labels"].tolist() == [[1, 4, 5, 6, 2, 0, 0], [1, 4, 5, 6, 7, 2, 0]]
    assert torch.equal(got["labels"], got["input_ids"])
    assert got["attention_mask"].sum(1).tolist() == [5, 6]


def test_prompt_that_fills_everything(write, words):
    data = InstructionData(write(DEMONSTRATIONS), words, max_length=3)
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 rows whose prompt alone fills data\.max_length=3"):
        assert batch(data)["labels"].tolist() == [[-100, -100, 5]]


def test_whole_texts(write, words):
    data = InstructionData(write([{"text": "a b"}]), words, prompt_column=None, completion_column="text")
    assert batch(data)["labels"].tolist() == [[-100, 4, 5, 2]]


def test_joint_tokens_are_kept():
    """The border never changes the ids: they are those of the whole text."""
    tokenizer = load_tokenizer(asset_path("movie_snippets/tokenizer"))
    encoder = Encoder(tokenizer)
    prompts, answers = ["The film is w", "A", "", "Well: "], ["onderful, and warm", " film", "All of it", "yes"]
    ids, borders = encoder.encode_pairs(prompts, answers)
    for prompt, answer, row, border in zip(prompts, answers, ids, borders, strict=True):
        assert row.tolist() == [*tokenizer(prompt + answer)["input_ids"], 2]
        assert (prompt + answer).endswith(tokenizer.decode(row[border:-1]))
        assert len(tokenizer.decode(row[1:border])) >= len(prompt)


def test_special_tokens_come_once(words, words_without_bos):
    assert Encoder(load_tokenizer(words)).encode(["<bos> a <eos>", "a"], True)[0].tolist() == [1, 4, 2]
    assert Encoder(load_tokenizer(words_without_bos)).encode(["a"], True)[0].tolist() == [4, 2]
    assert Encoder(load_tokenizer(words)).encode([], True) == []


def test_missing_column_names_the_key(write, words):
    with pytest.raises(
        ValueError, match=r"data\.chosen_column: there is no column 'choosen'.*nearest name is 'chosen'"
    ):
        PreferenceData(write(PAIRS), words, chosen_column="choosen").setup("fit")
    with pytest.raises(ValueError, match=r"data\.keep_columns\[0\]: there is no column 'idd'"):
        PromptData(write(PAIRS), words, keep_columns=["idd"]).setup("fit")
    with pytest.raises(ValueError, match=r"data\.format=tldr \(column info\): there is no column 'info'"):
        PromptData(write(PAIRS), words, format="tldr").setup("fit")
    with pytest.raises(ValueError, match=r"data\.margin_column: there is no column 'margins'"):
        PreferenceData(write(PAIRS), words, margin_column="margins").setup("fit")


def test_stages_share_one_data_set(write, words):
    path = write([{"prompt": "a"}] * 37)
    options = {"stage_fractions": [0.2, 0.4, 0.4], "val_split": "train", "test_split": "train"}
    seen = []
    for stage in range(3):
        data = PromptData(path, words, stage=stage, **options)
        index = batch(data)["index"]
        assert index.tolist() == stage_indices(37, stage, [0.2, 0.4, 0.4]).tolist()
        assert [row["index"] for row in data.datasets["val"]] == index.tolist()
        data.setup("test")
        assert len(data.datasets["test"]) == 37
        seen += index.tolist()
    assert sorted(seen) == list(range(37))


def test_limits(write, words):
    data = PromptData(write([{"prompt": "a"}] * 9), words, val_split="train", limit_train=4, limit_val=2)
    data.setup("fit")
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (4, 2)


def test_nothing_for_a_stage(write, words):
    data = PromptData(write([{"prompt": "a"}]), words)
    for stage, key in [
        ("test", "data.test_split"),
        ("validate", "data.val_split"),
        ("predict", "data.test_split or data.val_split"),
    ]:
        data.setup(stage)
        loader = {"test": data.test_dataloader, "validate": data.val_dataloader, "predict": data.predict_dataloader}
        with pytest.raises(ValueError, match=rf"^{key}: this data module has no rows for"):
            loader[stage]()


def test_held_out_rows_are_drawn_with_the_seed(write, words):
    from datasets import Dataset

    rows = [{"prompt": letter} for letter in "abcdefghij"]
    path = write(rows)

    def letters(data, split):
        data.setup("fit")
        return [row["ids"][-1] - 4 for row in data.datasets[split]]

    expected = Dataset.from_list([{"n": n} for n in range(10)]).train_test_split(0.25, seed=7)
    data = PromptData(path, words, val_fraction=0.25, seed=7)
    assert letters(data, "val") == expected["test"]["n"]
    assert letters(data, "train") == expected["train"]["n"]
    assert sorted(letters(data, "train") + letters(data, "val")) == list(range(10))
    other = PromptData(path, words, val_fraction=0.25, seed=8)
    assert letters(other, "val") != letters(data, "val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"data\.val_fraction must lie between 0 and 1, got 1\.0"),
        ({"val_fraction": 0.1, "val_split": "train"}, r"data\.val_fraction and data\.val_split both say"),
        ({"val_fraction": 0.1, "streaming": True}, r"data\.val_fraction: a stream has no length"),
    ],
)
def test_contradicting_validation_is_refused(write, words, options, message):
    with pytest.raises(ValueError, match=message):
        PromptData(write([{"prompt": "a"}]), words, **options)


def test_empty_data(write, words):
    with pytest.raises(ValueError, match="has no usable row; it is empty"):
        PromptData(write([{"prompt": "a"}]), words, limit_train=0).setup("fit")


def test_batch_size_must_be_positive(write, words):
    with pytest.raises(ValueError, match=r"data\.val_batch_size: 0 must be at least 1"):
        PromptData(write([{"prompt": "a"}]), words, val_batch_size=0)


def test_shipped_pairs_through_templates(words):
    data = PreferenceData(
        asset_path("hh_rlhf_sample"),
        asset_path("movie_snippets/tokenizer"),
        prompt_column="question",
        chosen_column="pos_answer.answer",
        rejected_column="neg_answer.answer",
        prompt_template="\n\nHuman: {question}\n\nAssistant:",
        response_template=" {response}",
        test_split="test",
    )
    got = batch(data, "test", 1)
    text = data.tokenizer.decode(got["input_ids"][0][got["attention_mask"][0] == 1])
    assert text.startswith("<bos>\n\nHuman: How can I steal")
    assert "\n\nAssistant: I could start" in text
    assert text.endswith("house.<eos>")


def test_prompts_with_text(write, words):
    prompts = PromptData(write([{"prompt": "a"}] * 6, "p.jsonl"), words, batch_size=2, val_split="train")
    texts = InstructionData(write(DEMONSTRATIONS, "t.jsonl"), words, batch_size=1)
    data = PromptsWithText(prompts, texts)
    data.prepare_data()
    data.setup("fit")
    batches = [got for got, _, _ in data.train_dataloader()]
    assert len(batches) == 3
    assert set(batches[0]) == {"prompt", "ptx"}
    assert batches[0]["prompt"]["prompt_ids"].shape == (2, 2)
    assert batches[0]["ptx"]["labels"].shape[0] == 1
    with pytest.raises(ValueError, match=r"data\.ptx\.streaming"):
        PromptsWithText(prompts, InstructionData(write(DEMONSTRATIONS), words, streaming=True))


def test_options_are_hyperparameters(write, words):
    data = PromptData(write([{"prompt": "a"}]), words, batch_size=3, format="plain")
    assert data.hparams["batch_size"] == 3
    assert data.hparams["max_prompt_length"] == 512
    assert np.all([not isinstance(value, torch.Tensor) for value in data.hparams.values()])
