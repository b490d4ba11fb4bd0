import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import PredictionWriter, SampleTable
from callbacks.samples import as_rows, markdown_table
from tests.callbacks.tiny import Tiny, json_lines, trainer


def table_steps(folder, table, ckpt_path=None, **options):
    """Step of each line after a run."""
    trainer(folder, callbacks=[table], **options).fit(Tiny(), ckpt_path=ckpt_path)
    return [row["step"] for row in json_lines(folder / table.filename)]


def test_writes_rows_every_n_batches_across_epochs(tmp_path):
    steps = table_steps(tmp_path, SampleTable(every_n_steps=4, num_rows=2), limit_val_batches=0)
    assert steps == [4, 4, 8, 8, 12, 12]
    first = json_lines(tmp_path / "samples.jsonl")[0]
    assert first == {"step": 4, "split": "train", "prompt": "p0|4", "response": "two\nlines", "score": 0.0}


def test_writes_rows_after_validation(tmp_path):
    steps = table_steps(tmp_path, SampleTable(every_n_steps=100, num_rows=1, filename="a.jsonl"))
    assert steps == [6, 12]
    assert [row["split"] for row in json_lines(tmp_path / "a.jsonl")] == ["val", "val"]


def test_rows_are_printed_where_asked_for(tmp_path, capsys):
    model = Tiny()
    model.samples = lambda: [{"response": "[red]two", "score": 1 / 3}]
    trainer(tmp_path, callbacks=[SampleTable(1, 1, print_rows=True)], max_steps=1).fit(model)
    printed = capsys.readouterr().out
    assert "step 1, train" in printed
    assert "[red]two" in printed
    assert "0.333" in printed


def test_tables_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, callbacks=[SampleTable(2, 1)], logger=logger, max_steps=4).fit(Tiny())
    events = EventAccumulator(logger.log_dir).Reload()
    texts = events.Tensors("samples/train/text_summary")
    assert [event.step for event in texts] == [2, 4]
    assert texts[0].tensor_proto.string_val[0].decode().startswith("| prompt | response | score |\n")


def test_a_module_without_samples_writes_nothing(tmp_path):
    model = Tiny()
    model.samples = list
    trainer(tmp_path, callbacks=[SampleTable(1)], max_steps=2).fit(model)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_repeats_no_step(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="seven", every_n_train_steps=7)
    whole = table_steps(tmp_path, SampleTable(2, 1), limit_val_batches=0)
    table = SampleTable(2, 1)
    trainer(tmp_path, callbacks=[table, saver], enable_checkpointing=True, limit_val_batches=0).fit(Tiny())
    lines = (tmp_path / "samples.jsonl").read_text()
    assert table_steps(tmp_path, SampleTable(2, 1), tmp_path / "seven.ckpt", limit_val_batches=0) == whole
    assert (tmp_path / "samples.jsonl").read_text() == lines


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_resumed_around_a_validation_repeats_no_step(tmp_path, step):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    options = {"val_check_interval": 3}
    trainer(tmp_path, callbacks=[SampleTable(100, 1), saver], enable_checkpointing=True, **options).fit(Tiny())
    path = tmp_path / f"step={step}.ckpt"
    assert table_steps(tmp_path, SampleTable(100, 1), path, **options) == [3, 6, 9, 12]


def test_a_new_run_begins_a_new_file(tmp_path):
    table_steps(tmp_path, SampleTable(1, 1))
    assert table_steps(tmp_path, SampleTable(2, 1), max_steps=4) == [2, 4]


def test_a_resume_drops_half_a_line_and_keeps_unusual_line_separators(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="seven", every_n_train_steps=7)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=8).fit(Tiny())
    path = tmp_path / "samples.jsonl"
    whole = json.dumps({"step": 2, "response": "one\u2028two\x85three"}, ensure_ascii=False) + "\n"
    path.write_bytes(whole.encode() + '{"step": 6, "response": "ü'.encode()[:-1])
    run = trainer(tmp_path, callbacks=[SampleTable(100)], max_steps=8, limit_val_batches=0)
    run.fit(Tiny(), ckpt_path=tmp_path / "seven.ckpt")
    assert path.read_bytes() == whole.encode()


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"num_rows": 0}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=r"callbacks\.SampleTable: every_n_steps and num_rows must be at least 1"):
        SampleTable(**options)


def test_markdown_keeps_rows_on_one_line():
    table = markdown_table([{"text": "a|b\nc", "score": 1 / 3}])
    assert table.splitlines() == ["| text | score |", "| --- | --- |", "| a\\|b<br>c | 0.333 |"]


class Predicting(Tiny):
    """Predicts columns for the even batches and rows for the odd ones."""

    def predict_step(self, batch, batch_idx):
        names = [f"ü{batch_idx}-{row}" for row in range(len(batch))]
        if batch_idx % 2:
            return [{"name": name, "sum": 0.0} for name in names]
        return {"name": names, "sum": batch.sum(1)}

    predict_dataloader = Tiny.val_dataloader


def test_predictions_are_json_lines_and_replace_those_of_the_run_before(tmp_path):
    for _ in range(2):
        model = Predicting()
        trainer(tmp_path, callbacks=[PredictionWriter("new/a.jsonl")]).predict(model, return_predictions=False)
    written = json_lines(tmp_path / "new" / "a.jsonl")
    assert [row["name"] for row in written] == [f"ü{batch}-{row}" for batch in range(2) for row in range(6)]
    batch = next(iter(model.val_dataloader()))
    assert [row["sum"] for row in written[:6]] == batch.sum(1).tolist()
    assert "ü" in (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")


def test_columns_become_rows():
    rows = as_rows({"text": ["a", "b"], "score": torch.tensor([0.5, 1.0])})
    assert rows == [{"text": "a", "score": 0.5}, {"text": "b", "score": 1.0}]
    assert json.dumps(rows)
    with pytest.raises(ValueError, match="shorter"):
        as_rows({"text": ["a", "b"], "score": torch.tensor([0.5])})
