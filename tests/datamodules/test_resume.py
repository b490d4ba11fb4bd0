"""Loaders in real training runs: interrupted at any place, on one and two ranks, with and without workers."""

import json

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from datamodules import InstructionData, PromptData, PromptsWithText
from datamodules.loaders import (
    EvaluationSampler,
    ResumableLoader,
    ResumableSampler,
    evaluation_loader,
    train_loader,
)
from datamodules.positions import Position

ROWS = [{"prompt": "abcdefghij"[number % 10], "number": number} for number in range(23)]


class Recorder(LightningModule):
    """Remembers which rows every step got."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.evaluated = []
        self.places = []

    def training_step(self, batch, batch_idx):
        prompts = batch.get("prompt", batch)
        self.places.append((self.current_epoch, batch_idx, self.trainer.global_step))
        self.seen.append((self.current_epoch, prompts["columns"]["number"], *ptx(batch)))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch["columns"]["number"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtTheEnd(Callback):
    """Writes a checkpoint after the last step, before the trainer counts the broken epoch as finished."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def ptx(batch):
    return [batch["ptx"]["input_ids"].tolist()] if "ptx" in batch else []


def run(data, folder, ckpt_path=None, save=None, model=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        max_epochs=-1,
        callbacks=[] if save is None else [SaveAtTheEnd(save)],
        **options,
    )
    model = model or Recorder()
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.seen


@pytest.fixture
def make(write, words):
    path = write(ROWS)

    def data(**options):
        return PromptData(path, words, keep_columns=["number"], batch_size=4, **options)

    return data


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return run(
        PromptData(str(folder / "rows.jsonl"), words, keep_columns=["number"], batch_size=4), folder, max_steps=14
    )


def test_epochs_differ_and_drop_the_rest(uninterrupted):
    assert [epoch for epoch, _ in uninterrupted] == [0] * 5 + [1] * 5 + [2] * 4
    epochs = [[row for number, rows in uninterrupted if number == epoch for row in rows] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert all(len(set(epoch)) == 20 for epoch in epochs)


# within the first epoch, at its end, at the first step of the second, within the second
@pytest.mark.parametrize("stop", [3, 5, 6, 8])
def test_same_batches_after_an_interruption(make, tmp_path, uninterrupted, stop):
    first = run(make(), tmp_path, save=tmp_path / "a.ckpt", max_steps=stop)
    rest = run(make(), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=14)
    assert first + rest == uninterrupted


def test_second_interruption(make, tmp_path, uninterrupted):
    seen = run(make(), tmp_path, save=tmp_path / "a.ckpt", max_steps=2)
    seen += run(make(), tmp_path, ckpt_path=tmp_path / "a.ckpt", save=tmp_path / "b.ckpt", max_steps=8)
    seen += run(make(), tmp_path, ckpt_path=tmp_path / "b.ckpt", max_steps=14)
    assert seen == uninterrupted


def test_interruptions_at_the_ends_of_two_epochs(make, tmp_path, uninterrupted):
    """With a validation in between, after which the trainer alone would go through the second epoch twice."""
    validates = {"val_check_interval": 2, "check_val_every_n_epoch": 1}
    seen, ckpt_path = [], None
    for number, stop in enumerate((5, 10, 14)):
        path = tmp_path / f"{number}.ckpt"
        seen += run(make(val_split="train[:3]"), tmp_path, ckpt_path=ckpt_path, save=path, max_steps=stop, **validates)
        ckpt_path = path
    assert seen == uninterrupted


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 1)])
def test_number_of_workers_may_change(make, tmp_path, uninterrupted, before, after):
    first = run(make(num_workers=before), tmp_path, save=tmp_path / "a.ckpt", max_steps=8)
    rest = run(make(num_workers=after), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=14)
    assert first + rest == uninterrupted


def test_checkpoints_of_callbacks(make, tmp_path, uninterrupted):
    """Written after a step, after validation within an epoch, and at the end of an epoch."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    for number, options in enumerate([{"every_n_train_steps": 4}, {"every_n_epochs": 1}]):
        folder = tmp_path / str(number)
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **options)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=11,
            max_epochs=-1,
            val_check_interval=2,
            callbacks=[saver],
        )
        trainer.fit(Recorder(), datamodule=make(val_split="train[:3]"))
        checkpoints = sorted(folder.glob("*.ckpt"))
        assert len(checkpoints) >= 2
        for checkpoint in checkpoints:
            rest = run(make(), tmp_path, ckpt_path=checkpoint, max_steps=14)
            assert rest == uninterrupted[int(checkpoint.stem) :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}])
def test_streams_continue(make, tmp_path, workers, options):
    """Without a length the trainer fetches one batch ahead; it must not be lost."""
    stream = {"streaming": True, "shuffle_buffer": 7, "num_workers": workers}
    whole = run(make(**stream), tmp_path, max_steps=14, **options)
    assert len({tuple(rows) for _, rows in whole}) == 14
    for stop in (2, 5, 7):
        first = run(make(**stream), tmp_path, save=tmp_path / "a.ckpt", max_steps=stop, **options)
        rest = run(
            make(streaming=True, shuffle_buffer=7), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=14, **options
        )
        assert first + rest == whole


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 2},
    ],
    ids=str,
)
def test_streams_continue_after_the_last_batch_of_an_epoch(make, tmp_path, options):
    """The next epoch begins, with its first batch and its own count of them, on which accumulation depends."""

    def stream():
        return make(streaming=True, shuffle_buffer=7)

    whole = Recorder()
    run(stream(), tmp_path, max_steps=7, model=whole, **options)
    ends = [number for number, (_, batch, _) in enumerate(whole.places) if batch == 0 and number]
    for end in ends[:2]:
        steps = whole.places[end][-1]
        run(stream(), tmp_path, save=tmp_path / "a.ckpt", max_steps=steps, **options)
        rest = Recorder()
        run(stream(), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=7, model=rest, **options)
        assert rest.places == whole.places[end:]
        assert rest.seen == whole.seen[end:]


def test_a_second_run_over_a_stream_starts_anew(make, tmp_path):
    data = make(streaming=True, shuffle_buffer=7)
    assert run(data, tmp_path, max_steps=3) == run(data, tmp_path, max_steps=3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("before", "stop", "after"), [(4, 2, 2), (2, 4, 4)])
def test_an_epoch_is_completed_in_batches_of_another_size(make, tmp_path, streaming, before, stop, after):
    """No row of it is lost or seen twice, and what belongs to its end takes place."""

    def data(size):
        module = make(streaming=streaming, val_split="train[:3]" if not streaming else None)
        module.batch_size = size
        return module

    first = run(data(before), tmp_path, save=tmp_path / "a.ckpt", max_steps=stop)
    rest = Recorder()
    with pytest.warns(UserWarning, match=r"training goes on at the same row of the data$"):
        run(data(after), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=stop + 8, model=rest)
    seen = [row for epoch, rows in first + rest.seen if epoch == 0 for row in rows]
    assert len(seen) == len(set(seen)) == 23 // after * after
    assert [batch for epoch, batch, _ in rest.places if epoch == 0] == list(range(8 // after, 23 // after))
    assert rest.places[len([place for place in rest.places if place[0] == 0])][:2] == (1, 0)
    assert streaming or rest.evaluated[-3:] == [0, 1, 2]


def test_streams_keep_order_and_drop_the_same_rows(write, words):
    path = write([{"prompt": "a b c" if number % 5 == 0 else "a", "number": number} for number in range(20)])
    expected = [number for number in range(20) if number % 5]
    for workers in (0, 2):
        data = PromptData(
            path,
            words,
            max_prompt_length=2,
            keep_columns=["number"],
            streaming=True,
            shuffle_buffer=0,
            num_workers=workers,
            batch_size=3,
            val_split="train",
            limit_val=4,
        )
        data.setup("fit")
        loader = data.train_dataloader()
        got = [row for batch in loader for row in batch["columns"]["number"]]
        assert got == expected[:15]
        assert [batch["columns"]["number"] for batch in loader] == [expected[k : k + 3] for k in range(0, 15, 3)]
        data.setup("validate")
        assert [batch["columns"]["number"] for batch in data.val_dataloader()] == [[1, 2, 3]]


def test_streams_have_no_stages(write, words):
    with pytest.raises(ValueError, match=r"data\.stage_fractions: a stream has no length"):
        PromptData(write(ROWS), words, streaming=True, stage_fractions=[1.0])


def test_two_loaders_in_one_step(make, write, words, tmp_path):
    texts = write([{"text": letter} for letter in "abcdefg"], "texts.jsonl")

    def data():
        return PromptsWithText(
            make(), InstructionData(texts, words, prompt_column=None, completion_column="text", batch_size=2)
        )

    whole = run(data(), tmp_path, max_steps=9)
    for stop in (2, 3, 4, 7):
        first = run(data(), tmp_path, save=tmp_path / "a.ckpt", max_steps=stop)
        assert first + run(data(), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=9) == whole


def test_overfitting_on_few_batches(make, tmp_path):
    seen = run(make(), tmp_path, max_steps=4, overfit_batches=2)
    assert [rows for _, rows in seen[:2]] == [rows for _, rows in seen[2:]]


class TwoRanks(Recorder):
    """Writes what each rank saw."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        path = self.folder / f"rank{self.global_rank}.json"
        path.write_text(json.dumps([self.seen, self.evaluated]))


def two_ranks(data, folder, ckpt_path=None, save=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        max_epochs=-1,
        num_sanity_val_steps=0,
        callbacks=[] if save is None else [SaveAtTheEnd(save)],
        **options,
    )
    trainer.fit(TwoRanks(folder), datamodule=data, ckpt_path=ckpt_path)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks(write, words, tmp_path, uninterrupted):
    """The same global batches as on one rank, exact resume, and every validation row once."""

    def data(workers=0):
        return PromptData(path, words, keep_columns=["number"], batch_size=2, val_split="train", num_workers=workers)

    path = write(ROWS)
    (first, evaluated), (second, more) = two_ranks(
        data(), tmp_path, save=tmp_path / "a.ckpt", max_steps=8, check_val_every_n_epoch=1
    )
    assert sorted(evaluated + more) == list(range(23))
    (third, _), (fourth, _) = two_ranks(data(2), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=14)
    for (epoch, left), (_, right), (expected_epoch, expected) in zip(
        first + third, second + fourth, uninterrupted, strict=True
    ):
        assert epoch == expected_epoch
        assert [left[0], right[0], left[1], right[1]] == expected


def test_another_number_of_ranks_goes_on_with_the_same_global_batches(write, words, tmp_path, uninterrupted):
    path = write(ROWS)

    def data(batch_size):
        return PromptData(path, words, keep_columns=["number"], batch_size=batch_size)

    seen = run(data(4), tmp_path, save=tmp_path / "a.ckpt", max_steps=3)
    ranks = two_ranks(data(2), tmp_path, tmp_path / "a.ckpt", tmp_path / "b.ckpt", max_steps=8)
    for (epoch, left), (_, right) in zip(*(rows for rows, _ in ranks), strict=True):
        seen.append((epoch, [left[0], right[0], left[1], right[1]]))
    seen += run(data(4), tmp_path, ckpt_path=tmp_path / "b.ckpt", max_steps=14)
    assert seen == uninterrupted


# without a trainer


def pretend_ranks(monkeypatch, rank, world):
    monkeypatch.setattr("datamodules.loaders.rank_and_world", lambda: (rank, world))


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_evaluation_gives_every_row_once(monkeypatch, rows):
    seen = []
    for rank in range(3):
        pretend_ranks(monkeypatch, rank, 3)
        sampler = EvaluationSampler(range(rows))
        assert len(list(sampler)) == len(sampler)
        seen += [int(row) for batch in evaluation_loader(list(range(rows)), 2) for row in batch]
    assert sorted(seen) == list(range(rows))


def place(loader):
    return tuple(loader.state_dict()[key] for key in ("epoch", "pass", "batches"))


def test_passes_within_an_epoch_differ_and_an_abandoned_one_is_left():
    loader = train_loader(list(range(8)), 2, seed=0)
    first = [batch.tolist() for batch in loader]
    second = [batch.tolist() for batch in loader]
    assert first != second
    next(iter(loader))
    assert place(loader) == (0, 2, 1)
    assert len(list(loader)) == 4
    assert place(loader) == (0, 4, 0)
    loader.sampler.set_epoch(1)
    assert place(loader) == (1, 0, 0)


def test_state_of_a_loader():
    loader = train_loader(list(range(10)), 2, seed=0)
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    next(batches), next(batches)
    other = train_loader(list(range(10)), 2, seed=0, num_workers=1)
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(3)
    assert len(other) == len(loader) == 5
    assert [batch.tolist() for batch in other] == [batch.tolist() for batch in batches]


@pytest.mark.parametrize(
    ("rows", "seed", "message"),
    [
        (12, 0, r"^data: the checkpoint was written with 10 training rows, and now there are 12, so this pass"),
        (10, 1, r"^data\.seed: the checkpoint was written with 0, and now it is 1, so this pass"),
    ],
)
def test_other_rows_or_another_order_are_told_of(rows, seed, message):
    before = train_loader(list(range(10)), 2, seed=0)
    next(iter(before))
    with pytest.warns(UserWarning, match=message):
        train_loader(list(range(rows)), 2, seed=seed).load_state_dict(before.state_dict())


def test_order_without_shuffling():
    assert list(ResumableSampler(range(5), 2, shuffle=False)) == [0, 1, 2, 3]


def test_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(train_loader(list(range(4)), 2, seed=0))
    list(evaluation_loader(list(range(4)), 2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # there need not be a GPU
@pytest.mark.parametrize("uses_gpu", [False, True])
def test_memory_is_pinned_where_the_process_uses_a_gpu(monkeypatch, uses_gpu):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_gpu)
    loaders = [train_loader(list(range(4)), 2, 1), evaluation_loader(list(range(4)), 2)]
    assert [len(list(loader)) for loader in loaders] == [2, 2]
    assert [loader.pin_memory for loader in loaders] == [uses_gpu] * 2


def test_loader_without_a_position():
    loader = ResumableLoader(list(range(4)), 2)
    assert isinstance(loader, DataLoader)
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    assert len(list(loader)) == 2


def test_position_within_its_epoch():
    position = Position()
    position.batches = 2
    position.set_epoch(0)
    assert position.batches == 2
    position.begin()
    assert (position.pass_, position.batches) == (1, 0)
