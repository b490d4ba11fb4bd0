"""Every data module on one to four ranks: no row twice, none lost, the same global batches, exact resumes."""

import json
import multiprocessing
import pickle
from collections import Counter
from functools import partial
from itertools import chain, zip_longest

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import IterableDataset

import datamodules.pixels
from datamodules import (
    AudioTexts,
    DynamicsData,
    FolkWave,
    Glue,
    InstructionData,
    PixelSnippetRatings,
    PixelSnippets,
    PixelTagging,
    PixelTask,
    PixelTexts,
    PoolData,
    PreferenceData,
    PromptData,
    PromptsWithText,
    SnippetInstructions,
    SnippetPreferences,
    SnippetPrompts,
    Xnli,
    asset_path,
    snippets,
)
from datamodules.loaders import (
    EvaluationLoader,
    EvenBatches,
    ResumableSampler,
    evaluation_loader,
    even_bounds,
    train_loader,
)
from datamodules.mixture import EvaluationBatches
from datamodules.snippets import load_snippets
from datamodules.streams import StreamedBatches
from tests.datamodules.pixel_fakes import Bars

FORK = multiprocessing.get_context("fork")
GLOBAL = 12  # rows of a batch on all ranks
ROWS, EVALUATED = 29, 13
LETTERS = "abcdefghij"


def row(number):
    """Something for every data module; no two rows have the same."""
    one, two = LETTERS[number % 10], LETTERS[number // 10]
    return {
        "number": number,
        "prompt": f"{one} {two}",
        "uneven": f"{one} {two}" if number % 3 else f"{one} {two} a",
        "text": f"{one} {two}",
        "completion": f" {two} {one}",
        "chosen": f" {one} a",
        "rejected": f" {two} b",
        "words": [one, two],
        "tags": [0, 1],
        "label": number % 2,
        "sentence": f"{one} {two}",
        "premise": one,
        "hypothesis": two,
        "id": number,
        "context": f"{one} {two}",
        "target": f" {two}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with `train.jsonl`, `validation.jsonl` and `test.jsonl`, and one of sounds, `sounds`."""
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", ROWS), ("validation", EVALUATED), ("test", EVALUATED + 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)))
    (folder / "sounds").mkdir()
    table = ""
    for number in range(ROWS + EVALUATED):
        soundfile.write(folder / f"sounds/{number}.wav", np.full(90, (number + 1) / 64, np.float32), 1000)
        table += json.dumps({"file_name": f"{number}.wav", "text": f"sound {number}"}) + "\n"
    (folder / "sounds/metadata.jsonl").write_text(table)
    return folder


SPLITS = {"val_split": "validation", "test_split": "test"}
STREAM = {**SPLITS, "streaming": True, "shuffle_buffer": 5}
LIMITS = {"limit_train": ROWS, "limit_val": EVALUATED}
MODES = {"modes": ["image", "text", "pair"]}
TUNES = {"sample_rate": 1000, "length": 64, "clip_seconds": 0.2, "instruments": ["flute", "organ"], "gain_db": 6.0}
SOUNDS = {"train_split": f"train[:{ROWS}]", "val_split": f"train[{ROWS}:]", "test_split": f"train[{ROWS - 1}:]"}
DYNAMICS = {"runs": asset_path("dynamics_tiny"), "features": asset_path("dynamics_tiny/features.safetensors")}


def prompts_with_text(folder, words, **options):
    texts = InstructionData(folder, words, train_split="test", **options)
    return PromptsWithText(PromptData(folder, words, **SPLITS, **options), texts)


# By name of the class and of the case: function from a folder of files, a tokenizer and sizes to the data module.
BUILDERS = {
    "AudioTexts": {
        "": lambda f, t, **o: AudioTexts(f"{f}/sounds", sample_rate=1000, length=64, gain_db=6.0, **SOUNDS, **o),
    },
    "DynamicsData": {
        "matrix": lambda f, t, **o: DynamicsData(**DYNAMICS, limit_train=2, **o),
        "pairs": lambda f, t, **o: DynamicsData(**DYNAMICS, limit_train=1, mode="pairs", step_threshold=16, **o),
        "runs": lambda f, t, **o: DynamicsData(**DYNAMICS, mode="runs", val_runs=3, test_runs=1, **o),
        "whole": lambda f, t, **o: DynamicsData(**DYNAMICS, limit_train=1, **o | {"batch_size": None}),
    },
    "FolkWave": {"": lambda f, t, **o: FolkWave(**TUNES, **LIMITS, limit_test=14, flip=True, **o)},
    "Glue": {"": lambda f, t, **o: Glue("sst2", Bars(), path=f, test_split="test", **o)},
    "InstructionData": {
        "": lambda f, t, **o: InstructionData(f, t, **SPLITS, **o),
        "stream": lambda f, t, **o: InstructionData(f, t, **STREAM, **o),
    },
    "PixelSnippetRatings": {"": lambda f, t, **o: PixelSnippetRatings(Bars(32), input="pair", **LIMITS, **o)},
    "PixelSnippets": {"": lambda f, t, **o: PixelSnippets(Bars(32), **LIMITS, **MODES, **o)},
    "PixelTagging": {"": lambda f, t, **o: PixelTagging(f, Bars(), **SPLITS, **o)},
    "PixelTask": {"": lambda f, t, **o: PixelTask(f, Bars(), t, input="pair", **SPLITS, **o)},
    "PixelTexts": {
        "": lambda f, t, **o: PixelTexts(f, Bars(), t, **MODES, **SPLITS, **o),
        "packed": lambda f, t, **o: PixelTexts(f, Bars(10), pack=True, **SPLITS, **o),
        "stream": lambda f, t, **o: PixelTexts(f, Bars(), t, **MODES, **STREAM, **o),
        "packed stream": lambda f, t, **o: PixelTexts(f, Bars(10), pack=True, **STREAM, **o),
    },
    "PoolData": {"": lambda f, t, **o: PoolData(f"{f}/train.jsonl", f"{f}/validation.jsonl", t, sample=29, **o)},
    "PreferenceData": {
        "": lambda f, t, **o: PreferenceData(f, t, **SPLITS, **o),
        "stream": lambda f, t, **o: PreferenceData(f, t, **STREAM, **o),
    },
    "PromptData": {
        "": lambda f, t, **o: PromptData(f, t, **SPLITS, **o),
        "stream": lambda f, t, **o: PromptData(f, t, **STREAM, **o),
        "stream that drops": lambda f, t, **o: PromptData(f, t, "uneven", max_prompt_length=3, **STREAM, **o),
    },
    "PromptsWithText": {"": prompts_with_text},
    "SnippetInstructions": {"": lambda f, t, **o: SnippetInstructions(**LIMITS, **o)},
    "SnippetPreferences": {"": lambda f, t, **o: SnippetPreferences(n_train_pairs=ROWS, n_test_pairs=13, **o)},
    "SnippetPrompts": {"": lambda f, t, **o: SnippetPrompts(**LIMITS, **o)},
    "Xnli": {"": lambda f, t, **o: Xnli(Bars(), t, "pair", languages=["en", "de"], path=f, **o)},
}
CASES = [pytest.param(name, case, id=f"{name} {case}".strip()) for name, cases in BUILDERS.items() for case in cases]


def test_every_data_module_is_here():
    exported = {name: getattr(datamodules, name) for name in datamodules.__all__}
    modules = {
        name for name, item in exported.items() if isinstance(item, type) and issubclass(item, LightningDataModule)
    }
    assert set(BUILDERS) == modules - {"LitData"}, "give each data module a builder in BUILDERS"


# -- what a batch holds ------------------------------------------------------------------------------------------------


def rows_of(batch):
    """Something hashable for every row of a batch, by which it is known."""
    if "prompt" in batch and "ptx" in batch:
        return [(name, *key) for name in ("prompt", "ptx") for key in rows_of(batch[name])]
    number = next(len(batch[key]) for key in ("run", "label", "index", "pixel_values", "input_ids") if key in batch)
    if "margin" in batch or set(batch) == {"input_ids", "attention_mask"}:  # chosen texts, then rejected ones
        number //= 2
        sides = [{key: value[part] for key, value in batch.items()} for part in (slice(number), slice(number, None))]
        return [chosen + rejected for chosen, rejected in zip(*map(rows_of_texts, sides), strict=True)]
    if "run" in batch:
        known = [batch[key].tolist() for key in ("run", "step", "test_ids") if len(batch.get(key, ())) == number]
        return list(zip(*known, strict=True))
    return rows_of_texts(batch)


def rows_of_texts(batch):
    """All of a row but its padding."""
    parts = []
    if "pixel_values" in batch:
        width = batch["pixel_values"].shape[-1] // batch["pixel_mask"].shape[1]
        ends = (batch["pixel_mask"].sum(1) * width).tolist()
        parts.append(
            [strip[..., :end].numpy().tobytes() for strip, end in zip(batch["pixel_values"], ends, strict=True)]
        )
    for key, mask in (("input_ids", "attention_mask"), ("prompt_ids", "prompt_mask")):
        if key in batch:
            pairs = zip(batch[key], batch[mask].bool(), strict=True)
            parts.append([tuple(ids[keep].tolist()) for ids, keep in pairs])
    for key in ("index", "id", "label", "text"):
        if key in batch:
            parts.append(batch[key] if isinstance(batch[key], list) else batch[key].tolist())
    if "audio" in batch:
        parts.append([clip.numpy().tobytes() for clip in batch["audio"]])
    return list(zip(*parts, strict=True))


def together(ranks):
    """Global batches, from those of every rank."""
    batches = []
    for parts in zip_longest(*ranks, fillvalue=[]):
        batches.append([item for items in zip_longest(*parts) for item in items if item is not None])
    return batches


def read(loader):
    return [rows_of(batch) for batch in loader]


# -- without processes -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_snippets(monkeypatch):
    """Of the shipped sentences those that are needed."""
    for module, train, test in ((snippets, 999, 99), (datamodules.pixels, ROWS + EVALUATED, 14)):
        few = {"train": load_snippets("train")[:train], "test": load_snippets("test")[:test]}
        monkeypatch.setattr(module, "load_snippets", few.__getitem__)
    monkeypatch.setattr(datamodules.pixels, "SNIPPET_VALIDATION", EVALUATED)


HOOKS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}


@pytest.fixture(scope="module")
def built():
    """Data modules that were made, by name and case: only sizes change, and rank and world."""
    return {}


@pytest.fixture
def make(monkeypatch, folder, words, built):
    """Function that gives the loaders of a data module on every rank, as this process would have them there."""

    def build(name, case, world=1, stage="fit", workers=0):
        size = GLOBAL // world
        if (name, case) not in built:
            built[name, case] = BUILDERS[name][case](str(folder), words, batch_size=size, val_batch_size=size)
        data = built[name, case]
        if "stream" not in case:
            data.setup(stage)
        for rank in range(world):
            for part in (data.prompts, data.ptx) if name == "PromptsWithText" else (data,):
                part.batch_size = part.val_batch_size = size
                part.num_workers = workers
            if "stream" in case:
                data.datasets.clear()  # they know their rank
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
                patch.setattr(torch.distributed, "get_world_size", lambda *_: world)
                patch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
                data.setup(stage)
                loader = getattr(data, HOOKS.get(stage, f"{stage}_dataloader"))()
            yield loaders_in(loader)

    return build


def loaders_in(loader):
    """The loaders that a hook gave."""
    if isinstance(loader, CombinedLoader):
        return loader.flattened
    return loader if isinstance(loader, list) else [loader]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_training(make, name, case):
    """The same global batches on all numbers of ranks, in their order, and nothing left out but the incomplete one."""
    ((*loaders,),) = make(name, case)
    alone = [read(loader) for loader in loaders]
    for loader, batches in zip(loaders, alone, strict=True):
        seen = list(chain(*batches))
        assert len(set(seen)) == len(seen) > 0, "a row came twice"
        if case in ("whole", "runs"):
            assert len(batches) == 1
            assert len(seen) == len(loader.dataset)
        else:
            assert {len(batch) for batch in batches} == {GLOBAL}
        if case == "stream" or not (case or isinstance(loader.dataset, IterableDataset)):
            rows = ROWS if case else len(loader.dataset)
            assert len(batches) == rows // GLOBAL
    for world, workers in ((2, 2), (3, 0), (4, 0)):
        parts = [[read(loader) for loader in loaders] for loaders in make(name, case, world, workers=workers)]
        assert [together(ranks) for ranks in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize(("name", "case"), CASES)
def test_epochs(make, name, case):
    """Every epoch has an order of its own; those of the ranks still fit together."""

    def both(loader):
        first = read(loader)
        if not isinstance(loader.dataset, IterableDataset):
            loader.sampler.set_epoch(1)
        return first, read(loader)

    (alone,) = (both(loaders[0]) for loaders in make(name, case))
    assert (alone[0] == alone[1]) == (case == "whole")
    ranks = [both(loaders[0]) for loaders in make(name, case, 2)]
    assert tuple(together(parts) for parts in zip(*ranks, strict=True)) == alone


@pytest.mark.parametrize(("name", "case"), CASES)
def test_resuming(make, name, case):
    """From the middle of a pass on, with another number of workers and with another number of ranks."""
    (alone,) = (read(loaders[0]) for loaders in make(name, case))
    states = []
    for world, before, after in ((1, 0, 0), (2, 2, 0), (3, 0, 0), (4, 0, 0)):
        first, broken, resumed = [], [], []
        pairs = zip(make(name, case, world, workers=before), make(name, case, world, workers=after), strict=True)
        for (loader, *_), (other, *_) in pairs:
            batches = iter(loader)
            first.append([rows_of(next(batches))])
            states.append(loader.state_dict())
            broken.append([rows_of(batch) for batch in batches])
            other.load_state_dict(json.loads(json.dumps(states[-1])))
            resumed.append(read(other))
        assert resumed == broken
        assert together(first) + together(resumed) == alone
    if case != "whole":
        assert all(state == states[0] for state in states)
    ((loader, *_),) = make(name, case)
    loader.load_state_dict(states[-1])
    assert read(loader) == alone[1:]


def count(case, loader):
    """Rows of an evaluation, once in every mode; of streams, those that the files hold."""
    if isinstance(loader.dataset, IterableDataset):
        rows = loader.dataset.rows
        found = len({item["number"] for item in rows})
        dropped = sum(item["number"] % 3 == 0 for item in rows) if case == "stream that drops" else 0
        return {"packed stream": -(-found // 2)}.get(case, found - dropped) * len(modes_of(loader.dataset))
    return len(loader.dataset) * len(getattr(loader.sampler, "modes", (None,)))


def modes_of(stream):
    return stream.mixture.modes if hasattr(stream, "mixture") else (None,)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_evaluation(make, name, case, stage):
    """Every row once (in every mode), although their number cannot be divided."""
    ((*loaders,),) = make(name, case, stage=stage)
    alone = [read(loader) for loader in loaders]
    for loader, batches in zip(loaders, alone, strict=True):
        seen = Counter(chain(*batches))
        assert set(seen.values()) == {1}
        assert len(seen) == count(case, loader)
    for world, workers in ((2, 2 if stage == "validate" else 0), (3, 0), (4, 0)):
        parts = [[read(loader) for loader in loaders] for loaders in make(name, case, world, stage, workers=workers)]
        assert [together(ranks) for ranks in zip(*parts, strict=True)] == alone


# -- in two processes --------------------------------------------------------------------------------------------------


def in_two_processes(function, folder, *args):
    """Call a function on two ranks, and give what it returned on each."""
    children = [FORK.Process(target=_rank, args=(rank, function, folder, *args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]


def _rank(rank, function, folder, *args):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(function(*args)))
    torch.distributed.destroy_process_group()


def everything(folder, words, size, cases=None):
    """Training and validation rows of all data modules on this rank."""
    found = {}
    for name, case in cases or [(name, case) for name, cases in BUILDERS.items() for case in cases]:
        data = BUILDERS[name][case](folder, words, batch_size=size, val_batch_size=size)
        data.setup("fit")
        hooks = (data.train_dataloader, data.val_dataloader)
        found[name, case] = [[read(loader) for loader in loaders_in(hook())] for hook in hooks]
    return found


def test_two_processes(folder, words, tmp_path):
    """As above, with ranks that really are two processes."""
    alone = everything(str(folder), words, GLOBAL)
    ranks = in_two_processes(everything, tmp_path, str(folder), words, GLOBAL // 2)
    for key, hooks in alone.items():
        for number, loaders in enumerate(hooks):
            parts = zip(*(rank[key][number] for rank in ranks), strict=True)
            assert [together(part) for part in parts] == loaders, key


def passes(path, words, steps, **options):
    """Rows of successive passes over a stream that ranks divide, on this rank."""
    data = PromptData(path, words, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    return [[batch["columns"]["number"] for batch in loader] for _ in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("files", [1, 2])
def test_streams_by_source_end_together(write, words, tmp_path, workers, files):
    """One rank has fewer rows than the other: from a smaller file, or since its texts are dropped."""
    rows = [{"prompt": "a", "number": number} for number in range(40)]
    for number in range(0, 20 if files == 1 else 0, 2):
        rows[number]["prompt"] = "a b c"
    parts = [rows] if files == 1 else [rows[:10], rows[10:]]
    paths = [write(part, f"part{number}.jsonl") for number, part in enumerate(parts)]
    options = {"data_files": {"train": paths}, "max_prompt_length": 2, "keep_columns": ["number"], "batch_size": 4}
    shares = {"streaming": True, "stream_shares": "sources", "shuffle_buffer": 4 * (files - 1), "num_workers": workers}
    ranks = in_two_processes(partial(passes, "json", words, 2, **options, **shares), tmp_path)
    for first, second in zip(*ranks, strict=True):
        assert len(first) == len(second) == 2  # of 10 rows against 30 or 20
        seen = [number for batch in first + second for number in batch]
        assert len(set(seen)) == len(seen) == 16


def test_a_rank_without_a_batch_of_its_source(write, words, tmp_path):
    """Three rows, of which the second rank has one; together they would be a batch."""
    path = write([{"prompt": "a", "number": number} for number in range(3)])
    options = {"keep_columns": ["number"], "streaming": True, "stream_shares": "sources", "batch_size": 2}

    def refused(path, words):
        with pytest.raises(ValueError, match=r"^data\.stream_shares: .* one of the processes has not a single batch"):
            passes(path, words, 1, **options)
        return passes(path, words, 1, **options | {"stream_shares": "batches", "batch_size": 1})

    (first,), (second,) = in_two_processes(refused, tmp_path, path, words)
    assert len(first) == len(second) == 1


# -- corners -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks(monkeypatch):
    """Function that lets this process be one rank of several."""

    def be(rank, world):
        monkeypatch.setattr("datamodules.loaders.rank_and_world", lambda: (rank, world))
        monkeypatch.setattr("datamodules.streams.rank_and_world", lambda: (rank, world))

    return be


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_fewer_rows_than_a_batch_are_not_repeated(ranks, rows):
    alone = list(ResumableSampler(range(rows), 12))
    for world in (2, 3):
        parts = []
        for rank in range(world):
            ranks(rank, world)
            sampler = ResumableSampler(range(rows), 12 // world)
            (batch,) = [rows.tolist() for rows in train_loader(list(range(rows)), 12 // world, 0)]
            assert len(batch) == len(sampler) == len(list(sampler))
            parts.append([batch])
        assert together(parts) == [alone]


def test_fewer_rows_than_ranks(ranks):
    ranks(1, 4)
    with pytest.raises(ValueError, match=r"^data: 3 training rows cannot be divided among 4 processes; give more rows"):
        train_loader([1, 2, 3], 1, 0)


def test_another_global_batch_goes_on_at_the_same_row(ranks):
    """Two ranks of 4 rows, then three of 4: row 16 lies in the second batch of 12."""

    def loader(world):
        ranks(0, world)
        return train_loader(list(range(72)), 4, 0)

    before = loader(2)
    batches = iter(before)
    for _ in range(2):
        next(batches)
    after = loader(3)
    with pytest.warns(
        UserWarning, match=r"^data\.batch_size: the checkpoint was written with 8 rows .* 4 rows seen twice$"
    ):
        after.load_state_dict(before.state_dict())
    assert after.position.batches == 1
    assert len(list(after)) == 5


def test_positions_of_earlier_checkpoints():
    loader = train_loader(list(range(8)), 2, 0)
    loader.load_state_dict({"epoch": 0, "pass": 0, "batches": 3})
    assert len(list(loader)) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_even_evaluation(ranks, world, batch):
    """As many batches on every rank, each of at least one row, all rows once and in their order."""
    for rows in range(30):
        left = rows % (world * batch)
        if 0 < left < world and (rows < world or batch == 1):
            with pytest.raises(ValueError, match=r"^data\.val_batch_size: \d+ rows in batches of \d .*; take"):
                even_bounds(rows, batch, world)
            continue
        parts, streamed = [], []
        for rank in range(world):
            ranks(rank, world)
            parts.append([rows.tolist() for rows in evaluation_loader(list(range(rows)), batch, even=True)])
            stream = StreamedBatches(Numbers(rows), lambda rows, numbers: rows, batch, drop_last=False, even=True)
            streamed.append([[row["number"] for row in batch] for batch in stream])
            modes = list(EvaluationBatches(range(rows), batch, ["image", "text"], even=True))
            assert [[row for row, _ in batch] for batch in modes[::2]] == parts[-1]
        assert parts == streamed
        assert len({len(batches) for batches in parts}) == 1
        assert all(0 < len(rows) <= batch for batches in parts for rows in batches)
        assert list(chain(*together(parts))) == list(range(rows))


class Numbers:
    """Rows as a stream has them."""

    def __init__(self, rows):
        self.rows = rows

    def iter(self, batch_size):
        for first in range(0, self.rows, batch_size):
            yield {"number": list(range(first, min(self.rows, first + batch_size)))}


def test_even_batches_only_where_the_rows_cannot_be_divided(ranks):
    for rows in (8, 10, 11):
        ranks(1, 2)
        plain = [batch.tolist() for batch in evaluation_loader(list(range(rows)), 2)]
        assert EvenBatches(range(rows), 2).batches == plain


def test_a_rank_without_rows_still_evaluates(ranks):
    """The trainer would skip the evaluation on this rank alone, and the others would wait for it."""
    ranks(2, 3)
    loader = evaluation_loader([1, 2], 4)
    assert isinstance(loader, EvaluationLoader)
    assert len(loader) == 1
    assert list(loader) == []
    assert len(evaluation_loader([], 4)) == 0
