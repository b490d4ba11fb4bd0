import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from datamodules.sources import chunks, load_rows, require_columns

ROWS = [{"prompt": f"p{number}", "score": number} for number in range(20)]


def text_of(rows):
    return [row["prompt"] for chunk in chunks(rows, 3) for row in chunk]


EXPECTED = [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(tmp_path, suffix, streaming):
    path = tmp_path / f"rows.{suffix}"
    table = Dataset.from_list(ROWS)
    if suffix == "csv":
        path.write_text("prompt,score\n" + "".join(f"{row['prompt']},{row['score']}\n" for row in ROWS))
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        opener = gzip.open if suffix.endswith("gz") else open
        with opener(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
    assert text_of(load_rows(str(path), "train", streaming=streaming)) == EXPECTED


def test_slices_of_one_file(write):
    path = write(ROWS)
    assert text_of(load_rows(path, "train[:90%]")) == EXPECTED[:18]
    assert text_of(load_rows(path, "train[90%:]")) == EXPECTED[18:]


def test_saved_to_disk(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "both")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert text_of(load_rows(str(tmp_path / "both"), "test")) == EXPECTED[:2]
    assert text_of(load_rows(str(tmp_path / "one"), "train[5:8]")) == EXPECTED[5:8]
    assert text_of(load_rows(str(tmp_path / "both"), "train", streaming=True)) == EXPECTED
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        load_rows(str(tmp_path / "both"), "val")
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load_rows(str(tmp_path / "one"), "test")


def test_one_file_per_split(write, tmp_path):
    write(ROWS, "a.jsonl")
    write(ROWS[:3], "b.jsonl")
    files = {"train": "a.jsonl", "test": ["b.jsonl"]}
    assert text_of(load_rows(str(tmp_path), "test", data_files=files)) == EXPECTED[:3]
    absolute = {"train": str(tmp_path / "a.jsonl")}
    assert text_of(load_rows("json", "train", data_files=absolute)) == EXPECTED
    with pytest.raises(ValueError, match=r"data\.data_files: there is no file .*c\.jsonl"):
        load_rows(str(tmp_path), "train", data_files={"train": "c.jsonl"})
    with pytest.raises(ValueError, match="no split 'val'"):
        load_rows(str(tmp_path), "val", data_files=files)


def test_folder_of_files(write, tmp_path):
    write(ROWS, "train.jsonl")
    write(ROWS[:3], "test.jsonl")
    assert text_of(load_rows(str(tmp_path), "test")) == EXPECTED[:3]


def test_no_such_data():
    with pytest.raises(ValueError, match=r"data\.path: 'no/such-data' is neither a local file or folder"):
        load_rows("no/such-data", "train")


def test_single_file_holds_only_train(write):
    with pytest.raises(ValueError, match="holds only the split 'train', not 'test'"):
        load_rows(write(ROWS), "test")


def test_unknown_type(tmp_path):
    (tmp_path / "rows.doc").write_text("x")
    with pytest.raises(ValueError, match=r"data\.path: files of type '\.doc' cannot be read"):
        load_rows(str(tmp_path / "rows.doc"), "train")


def test_slice_of_a_stream(write):
    with pytest.raises(ValueError, match=r"data\.streaming: the slice 'train\[:5\]' needs all rows"):
        load_rows(write(ROWS), "train[:5]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column(write, streaming):
    rows = load_rows(write(ROWS), "train", streaming=streaming)
    require_columns(rows, {"data.prompt_column": "prompt"})
    with pytest.raises(
        ValueError,
        match=r"data\.prompt_column: there is no column 'promt'; the nearest name is 'prompt'; the columns are prompt",
    ):
        require_columns(rows, {"data.prompt_column": "promt"})


def test_no_progress_bars(write, capfd):
    load_rows(write(ROWS), "train")
    assert "it/s" not in capfd.readouterr().err
