"""Labelled texts, pairs and tagged words as strips and tokens."""

import math
import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from datamodules.pixel_tasks import (
    Glue,
    PixelSnippetRatings,
    PixelTagging,
    PixelTask,
    Xnli,
    glue_clean,
)
from datamodules.rendering import TextRenderer
from tests.datamodules.pixel_fakes import Bars


def batch(data, stage="fit"):
    """All rows of a small data set, in their order."""
    data.setup(stage)
    dataset = data.datasets[{"fit": "train", "validate": "val"}.get(stage, stage)]
    return data.collator()([dataset[row] for row in range(len(dataset))])


def pixels_of(strips):
    return [strip.trimmed.tolist() for strip in strips]


SINGLE = [{"text": "a b", "label": 1}, {"text": "c", "label": 0}]
PAIRS = [{"a": "a", "b": "b c", "label": 1}, {"a": "d", "b": "e", "label": 0}]


def test_one_text(write):
    renderer = Bars()
    got = batch(PixelTask(write(SINGLE), renderer))
    assert set(got) == {"pixel_values", "pixel_mask", "num_text_patches", "label"}
    assert got["label"].tolist() == [1, 0]
    assert got["label"].dtype == torch.int64
    assert got["num_text_patches"].tolist() == [4, 2]
    strip = renderer.render("a b").trimmed
    assert got["pixel_values"][0, 0, :, : strip.shape[1]].tolist() == strip.tolist()


def test_tokens(write, words, words_without_bos):
    for tokenizer in (words, words_without_bos):
        got = batch(PixelTask(write(SINGLE), Bars(), tokenizer, input="text"))
        assert set(got) == {"input_ids", "attention_mask", "label"}
        assert got["input_ids"].tolist() == [[1, 4, 5], [1, 6, 0]]
        assert got["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        data = PixelTask(write(PAIRS), Bars(), tokenizer, "pair", "a", "b")
        got = batch(data)
        assert got["input_ids"].tolist() == [[1, 4, 1, 5, 6], [1, 7, 1, 8, 0]]
        assert set(got) == {
            "pixel_values",
            "pixel_mask",
            "num_text_patches",
            "input_ids",
            "attention_mask",
            "label",
        }


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b c d e f g", "h", [1, 4, 5, 6, 1, 11]),
        ("a", "b c d e f g h", [1, 4, 1, 5, 6, 7]),
        ("a b c d e f g", "b c d e f g h", [1, 4, 5, 1, 5, 6]),
        ("a b", "c d", [1, 4, 5, 1, 6, 7]),
    ],
)
def test_tokens_of_long_pairs_are_cut(write, words, first, second, expected):
    path = write([{"a": first, "b": second, "label": 0}])
    assert batch(PixelTask(path, Bars(6), words, "text", "a", "b"))["input_ids"].tolist() == [expected]
    path = write([{"a": first, "label": 0}])
    assert batch(PixelTask(path, Bars(6), words, "text", "a"))["input_ids"].shape[1] <= 6


@pytest.mark.parametrize("lengths", [(400, 3), (3, 400), (400, 400), (4, 5)])
def test_long_pairs_keep_both_texts(write, lengths):
    first, second = (" ".join(["word"] * length) for length in lengths)
    renderer = TextRenderer(max_seq_length=24)
    got = batch(PixelTask(write([{"a": first, "b": second, "label": 0}]), renderer, None, "pixel", "a", "b"))
    patches = got["pixel_values"][0, 0].unfold(1, 16, 16).permute(1, 0, 2).flatten(1)
    black = torch.nonzero((patches == 0).all(1)).flatten()
    assert len(black) == 2
    assert black[1] == got["num_text_patches"][0] == got["pixel_mask"].sum() - 1
    assert (patches[: black[0]] < 255).any(1).all()
    assert (patches[black[0] + 1 : black[1]] < 255).any(1).all()


def test_regression(write):
    rows = [{"text": "a", "label": 2}, {"text": "b", "label": 0.5}]
    got = batch(PixelTask(write(rows), Bars(), task="regression"))
    assert got["label"].tolist() == [2.0, 0.5]
    assert got["label"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"^data\.labels: a regression has no classes"):
        PixelTask(write(rows), Bars(), task="regression", labels=["a"])


def test_names_of_classes(write, tmp_path):
    path = write([{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}])
    assert batch(PixelTask(path, Bars(), labels=["good", "bad"]))["label"].tolist() == [1, 0]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    Dataset.from_list([{"text": "a", "label": "y"}], features).save_to_disk(tmp_path / "set")
    assert batch(PixelTask(str(tmp_path / "set"), Bars()))["label"].tolist() == [1]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a", "label": 2},
            {"labels": ["x", "y"]},
            r"holds 2, which is not one of the 2 classes x, y; set data",
        ),
        (
            {"text": "a", "label": -1},
            {},
            r"^data\.label_column: column 'label' of row 1 holds -1, which is not a class",
        ),
        ({"text": "a", "label": None}, {}, r"holds None, which is not a class number from 0"),
        ({"text": "a", "label": 0.5}, {}, r"holds 0\.5, which is not a class number from 0"),
        ({"text": "a", "label": None}, {"task": "regression"}, "holds None, which is no number to learn"),
        ({"text": " ", "label": 0}, {}, r"^data\.text_column: column 'text' of row 1 is empty; remove the row or set"),
        ({"text": None, "label": 0}, {}, r"^data\.text_column: column 'text' of row 1 holds None instead of text"),
        ({"text": "a", "label": 0}, {"second_column": "b"}, r"^data\.second_column: there is no column 'b'"),
        ({"text": "a", "label": 0}, {"label_column": "gold"}, r"^data\.label_column: there is no column 'gold'"),
        ({"text": "a", "label": 0}, {"text_column": "body"}, r"^data\.text_column: there is no column 'body'"),
    ],
)
def test_unusable_rows(write, row, options, message):
    path = write([{"text": "a", "label": 0}, row])
    with pytest.raises(ValueError, match=message):
        PixelTask(path, Bars(), **options).setup("fit")


def test_labels_without_a_list_of_names(write):
    with pytest.raises(ValueError, match=r"^data\.labels: column 'label' holds names of classes; list them"):
        PixelTask(write([{"text": "a", "label": "x"}]), Bars()).setup("fit")
    with pytest.raises(ValueError, match=r"^data\.tokenizer: data\.input=text asks for tokens"):
        PixelTask(write(SINGLE), Bars(), input="text")


def test_empty_texts_may_be_kept(write):
    got = batch(PixelTask(write([{"text": "", "label": 0}]), Bars(), empty_text="keep"))
    assert got["num_text_patches"].tolist() == [1]


def test_prediction_needs_no_labels(write):
    for row in ({"text": "a", "label": -1}, {"text": "a"}):
        path = write([row])
        data = PixelTask(path, Bars(), test_split="train")
        assert batch(data, "predict")["label"].tolist() == [-1]
        with pytest.raises(ValueError, match=r"^data\.label_column: "):
            data.setup("test")
    data = PixelTask(path, Bars(), test_split="train", task="regression")
    assert math.isnan(batch(data, "predict")["label"].item())


def test_clean_up():
    """Literal replacements in their order; the tokens keep the spaces."""
    text = "He said , `` ( no ) '' ! It 's # 1 / 2 [ of ] \" two \" ? I do n't ."
    assert glue_clean(text) == "He said, `` (no)''! It's# 1/ 2 [of]\"two\"? I don't."
    assert glue_clean("a ' b") == "a'b"
    assert glue_clean(' " , x') == '", x'
    assert glue_clean('a " " b') == 'a""b'


def test_clean_up_is_for_pixels(write, words):
    renderer = Bars(20)
    path = write([{"text": "a , b", "label": 0}])
    for clean, drawn in ((False, "a , b"), (True, "a, b")):
        got = batch(PixelTask(path, renderer, words, "pair", clean_up=clean))
        assert got["input_ids"].tolist() == [[1, 4, 3, 5]]
        strip = renderer.render(drawn).trimmed
        assert got["pixel_values"][0, 0, :, : strip.shape[1]].tolist() == strip.tolist()


class Noise:
    """Appends random letters."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, text: str, generator: random.Random) -> str:
        return text + "".join(f" {generator.choice('abcdefghij')}" for _ in range(self.count))


def test_perturbed_evaluation(write, words):
    """Only outside training, the same noise for pixels and tokens, alike in every batch and epoch."""
    renderer = Bars(20)
    rows = [{"text": "a", "label": 0} for _ in range(9)]
    data = PixelTask(write(rows), renderer, words, "pair", perturb=Noise(3), val_split="train", test_split="train")
    assert set(map(tuple, batch(data)["input_ids"].tolist())) == {(1, 4)}
    noisy = batch(data, "validate")
    assert noisy["input_ids"].shape == (9, 5)
    assert len({tuple(row) for row in noisy["input_ids"].tolist()}) > 1
    for ids, pixels in zip(noisy["input_ids"], noisy["pixel_values"], strict=True):
        strip = renderer.render(data.tokenizer.decode(ids[1:])).trimmed
        assert pixels[0, :, : strip.shape[1]].tolist() == strip.tolist()
    again = [row for part in data.val_dataloader() for row in part["input_ids"].tolist()]
    assert again == noisy["input_ids"].tolist() == batch(data, "test")["input_ids"].tolist()
    other = PixelTask(write(rows), renderer, words, "text", perturb=Noise(3), val_split="train", seed=1)
    assert batch(other, "validate")["input_ids"].tolist() != again


def test_perturbation_from_a_configuration(write):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(PixelTask, "data")
    settings = {
        "class_path": "datamodules.pixel_tasks.PixelTask",
        "init_args": {
            "path": write(SINGLE),
            "renderer": {"class_path": "datamodules.rendering.TextRenderer", "init_args": {"max_seq_length": 9}},
            "perturb": {"class_path": f"{__name__}.Noise", "init_args": {"count": 2}},
            "val_split": ["train", "train"],
        },
    }
    data = parser.instantiate(parser.parse_object({"data": settings})).data
    assert data.perturb("a", random.Random(0)).startswith("a ")
    assert data.renderer.max_seq_length == 9
    data.setup("validate")
    assert len(data.val_dataloader()) == 2


# -- known data sets ---------------------------------------------------------------------------------------------------


def glue_rows(task):
    first, second = Glue.COLUMNS[task]
    texts = {first: "a , b"} | ({second: "c"} if second else {})
    labels = [0.5, 4.0] if task == "stsb" else [0, len(Glue.LABELS[task]) - 1]
    return [{**texts, "label": label, "idx": number} for number, label in enumerate(labels)]


@pytest.mark.parametrize("task", sorted(Glue.COLUMNS))
def test_glue(tmp_path, task):
    splits = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    for split in ("train", *splits):
        Dataset.from_list(glue_rows(task)).to_json(tmp_path / f"{split}.jsonl")
    files = {split: f"{split}.jsonl" for split in ("train", *splits)}
    renderer = Bars(20)
    data = Glue(task, renderer, path=str(tmp_path), data_files=files)
    got = batch(data)
    assert got["label"].tolist() == [row["label"] for row in glue_rows(task)]
    strip = renderer.render("a, b") if Glue.COLUMNS[task][1] is None else renderer.render_pair("a, b", "c")
    assert got["pixel_values"][0, 0, :, : strip.trimmed.shape[1]].tolist() == strip.trimmed.tolist()
    assert data.task == ("regression" if task == "stsb" else "classification")
    for stage, loader in (("validate", data.val_dataloader), ("test", data.test_dataloader)):
        data.setup(stage)
        found = loader()
        if task == "mnli":
            assert data.loader_names["val"] == data.loader_names["test"] == ["matched", "mismatched"]
            assert len(found) == 2
        assert all(len(part["label"]) == 2 for one in (found if task == "mnli" else [found]) for part in one)


def test_unknown_glue_task():
    with pytest.raises(ValueError, match=r"^data\.task: 'sst' is not one of cola, mnli"):
        Glue("sst", Bars())


def xnli_folder(tmp_path, languages):
    for number, language in enumerate(languages):
        rows = [{"premise": "a b", "hypothesis": language, "label": label} for label in range(3)]
        splits = {"train": rows[: 2 + number % 2], "validation": rows, "test": rows[1:]}
        DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()}).save_to_disk(tmp_path / language)
    return str(tmp_path / "{language}")


@pytest.mark.parametrize("translate", [False, True])
def test_xnli(tmp_path, translate):
    languages = ["de", "en", "th"]
    path = xnli_folder(tmp_path, languages)
    data = Xnli(Bars(20), languages=languages, translate_train=translate, path=path, val_batch_size=2)
    data.prepare_data()
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert len(data.datasets["train"]) == (2 + 3 + 2 if translate else 3)
    assert len(data.datasets["val"]) == (9 if translate else 3)
    loaders = data.test_dataloader()
    assert data.loader_names["test"] == languages
    assert [part["label"].tolist() for loader in loaders for part in loader] == [[1, 2]] * 3
    strips = [Bars(20).render_pair("a b", language).trimmed for language in languages]
    for loader, strip in zip(loaders, strips, strict=True):
        assert next(iter(loader))["pixel_values"][0, 0, :, : strip.shape[1]].tolist() == strip.tolist()


def test_xnli_with_one_language_and_named_files(tmp_path):
    for split in ("train", "validation", "test"):
        rows = [{"premise": "a", "hypothesis": split, "label": 2}]
        Dataset.from_list(rows).to_json(tmp_path / f"xnli-en-{split}.jsonl")
    files = {split: f"xnli-{{language}}-{split}.jsonl" for split in ("train", "validation", "test")}
    data = Xnli(Bars(20), languages=["en"], path=str(tmp_path), data_files=files)
    assert batch(data, "test")["label"].tolist() == [2]
    with pytest.raises(ValueError, match=r"^data\.languages: 'xx'; choose among ar, bg"):
        Xnli(Bars(), languages=["xx"])
    with pytest.raises(ValueError, match=r"^data\.languages: the list is empty; choose among"):
        Xnli(Bars(), languages=[])


def test_shipped_ratings():
    data = PixelSnippetRatings(TextRenderer(max_seq_length=32), limit_train=30, limit_val=10, input="pair")
    got = batch(data)
    assert set(got["label"].tolist()) == {0, 1}
    assert got["input_ids"].shape[1] <= 64
    data.setup("test")
    assert [len(data.datasets[split]) for split in ("val", "test")] == [10, 1000]
    scores = batch(PixelSnippetRatings(TextRenderer(max_seq_length=32), limit_train=30, task="regression"))["label"]
    assert scores.dtype == torch.float32
    assert ((scores > 0).long() == got["label"]).all()


# -- tagging -----------------------------------------------------------------------------------------------------------

TAGGED = [{"words": ["a", "bcd", "e"], "tags": [1, 0, 2]}, {"words": ["f"], "tags": [0]}]


@pytest.mark.parametrize(
    ("word_patch", "expected"), [("first", [[0, 3, 7], [0, 0, 0]]), ("last", [[2, 6, 8], [1, 0, 0]])]
)
def test_tagging(write, word_patch, expected):
    """A margin of 2 pixels and "a" with its blank (16) end in the third patch of 8, and so on."""
    got = batch(PixelTagging(write(TAGGED), Bars(12), word_patch=word_patch))
    assert got["word_patches"].tolist() == expected
    assert got["tags"].tolist() == [[1, 0, 2], [0, -100, -100]]
    assert got["word_patches"].dtype == got["tags"].dtype == torch.int64
    strip = Bars(12).render_words(TAGGED[0]["words"])
    assert strip.word_starts == (0, 3, 7, 9)
    assert got["pixel_values"][0, 0, :, : strip.trimmed.shape[1]].tolist() == strip.trimmed.tolist()


def test_words_behind_the_end_are_left_out(write):
    got = batch(PixelTagging(write([{"words": ["ab", "cd", "ef"], "tags": [0, 1, 2]}]), Bars(5)))
    assert got["word_patches"].tolist() == [[3]]
    assert got["tags"].tolist() == [[0]]
    assert got["num_text_patches"].tolist() == [4]


def test_words_of_the_real_renderer(write):
    """A causal model reads a tag where the word has been seen, before the next one begins."""
    words = ["The", "", "plot", "makes", "unbelievably", "little", "sense", "."]
    got = batch(PixelTagging(write([{"words": words, "tags": [0] * 8}]), TextRenderer(max_seq_length=40)))
    strip = TextRenderer(max_seq_length=40).render_words(words)
    starts = np.array(strip.word_starts)
    patches = got["word_patches"][0].numpy()
    assert (patches >= starts[:-1]).all()
    assert (patches[:-1] <= np.maximum(starts[1:-1] - 1, starts[:-2])).all()
    assert patches[-1] == strip.num_text_patches - 1


def test_names_of_tags(write, tmp_path):
    rows = [{"words": ["a", "b", "c"], "tags": ["N", "_", "V"]}]
    assert batch(PixelTagging(write(rows), Bars(20), tags=["V", "N"]))["tags"].tolist() == [[1, -100, 0]]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["N", "V"]))})
    Dataset.from_dict({"words": [["a"]], "tags": [[1]]}, features).save_to_disk(tmp_path / "set")
    data = PixelTagging(str(tmp_path / "set"), Bars())
    assert batch(data)["tags"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("words", "tags", "options", "message"),
    [
        (
            ["a"],
            [0, 1],
            {},
            r"^data\.tags_column: column 'tags' of row 0 holds \[0, 1\], which is not one tag for each o",
        ),
        ([], [], {}, r"^data\.words_column: column 'words' of row 0 holds \[\] instead of a list of words"),
        (["a"], [2], {"tags": ["x", "y"]}, r"of row 0 holds 2, which is not one of the 2 tags x, y; set data\.tags"),
        (["a"], [-1], {}, r"holds -1, which is not a tag number from 0"),
        (["a"], ["x"], {}, r"^data\.tags: column 'tags' holds names of tags; list them"),
        (["a"], ["z"], {"tags": ["x"]}, r"holds 'z', which is not one of the 1 tags x"),
        (["a"], [0], {"words_column": "tokens"}, r"^data\.words_column: there is no column 'tokens'"),
    ],
)
def test_unusable_tags(write, words, tags, options, message):
    with pytest.raises(ValueError, match=message):
        PixelTagging(write([{"words": words, "tags": tags}]), Bars(), **options).setup("fit")
