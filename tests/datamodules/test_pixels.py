"""Mixtures of modes, batches of strips and tokens, exact resume, renderers and checkpoints."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.mixture import EvaluationBatches, Mixture, MixtureSampler
from datamodules.pixel_collate import PixelCollator, StripLayout
from datamodules.pixels import PixelSnippets, PixelTexts, TextTable
from datamodules.rendering import TextRenderer
from datamodules.sources import load_rows
from tests.datamodules.pixel_fakes import Bars

DUAL = {"image": 4, "text": 4, "pair": 2}
ROWS = [{"text": "abcdefghij"[number % 10] + " " + "abcdefghij"[number // 10]} for number in range(23)]


def mode_of(batch):
    return {(True, False): "image", (False, True): "text", (True, True): "pair"}[
        "pixel_values" in batch, "input_ids" in batch
    ]


def contents(batch):
    """Mode and everything in a batch, as plain lists."""
    return (mode_of(batch), {key: value.tolist() for key, value in batch.items()})


@pytest.fixture
def make(write, words):
    path = write(ROWS)

    def data(renderer=None, tokenizer=words, **options):
        options = {"modes": DUAL, "batch_size": 4} | options
        return PixelTexts(path, renderer or Bars(), tokenizer, **options)

    return data


# -- mixture -----------------------------------------------------------------------------------------------------------


def test_shares_of_modes():
    mixture = Mixture(DUAL, seed=3)
    drawn = [mixture.mode(0, 0, batch) for batch in range(4000)]
    counts = Counter(drawn)
    for mode, share in {"image": 0.4, "text": 0.4, "pair": 0.2}.items():
        assert counts[mode] / 4000 == pytest.approx(share, abs=0.03)
    assert drawn == [Mixture(dict(reversed(DUAL.items())), seed=3).mode(0, 0, batch) for batch in range(4000)]
    for other in (Mixture(DUAL, 4), mixture):
        again = [other.mode(other is mixture, 0, batch) for batch in range(40)]
        assert again != drawn[:40]
    assert [mixture.mode(0, 1, batch) for batch in range(40)] != drawn[:40]


def test_mode_without_a_share_never_comes():
    mixture = Mixture({"image": 1, "pair": 0.0}, 0)
    assert mixture.modes == ("image",)
    assert {mixture.mode(0, 0, batch) for batch in range(50)} == {"image"}


def test_cycle():
    cycle = ["image", "text", "image", "text", "pair"]
    mixture = Mixture(cycle, 0)
    assert [mixture.mode(1, 1, batch) for batch in range(12)] == [*cycle, *cycle, "image", "text"]
    assert mixture.shares == {"image": 0.4, "text": 0.4, "pair": 0.2}


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({"pixel": 1}, r"^data\.modes: 'pixel' is not one of image, text, pair$"),
        ({}, r"^data\.modes: name at least one of image, text, pair$"),
        ({"image": 0}, r"^data\.modes: \{'image': 0\} must be shares >= 0 of which one is positive"),
        ({"image": 2, "text": -1}, "must be shares >= 0"),
        (["image", "both"], "'both' is not one of"),
    ],
)
def test_wrong_mixtures(modes, message):
    with pytest.raises(ValueError, match=message):
        Mixture(modes, 0)


def pretend_ranks(monkeypatch, rank, world):
    monkeypatch.setattr("datamodules.loaders.rank_and_world", lambda: (rank, world))


def test_modes_and_rows_do_not_depend_on_the_ranks(monkeypatch):
    def batches(rank, world):
        pretend_ranks(monkeypatch, rank, world)
        indices = list(MixtureSampler(range(50), 4 // world, Mixture(DUAL, 1), seed=1))
        return [indices[start : start + 4 // world] for start in range(0, len(indices), 4 // world)]

    alone, left, right = batches(0, 1), batches(0, 2), batches(1, 2)
    assert len(alone) == len(left) == len(right) == 12
    assert len({mode for batch in alone for _, mode in batch}) == 3
    for batch, one, two in zip(alone, left, right, strict=True):
        assert len({mode for _, mode in (*batch, *one, *two)}) == 1
        assert sorted(batch) == sorted(one + two)


def test_one_short_batch_has_one_mode():
    assert {mode for _, mode in MixtureSampler(range(3), 8, Mixture(["text", "image"], 0))} == {"text"}


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_evaluation_gives_every_row_once_in_each_mode(monkeypatch, rows):
    seen = []
    for rank in range(3):
        pretend_ranks(monkeypatch, rank, 3)
        sampler = EvaluationBatches(range(rows), 2, ("image", "pair"))
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(len({mode for _, mode in batch}) == 1 for batch in batches)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == sorted((row, mode) for row in range(rows) for mode in ("image", "pair"))


# -- batches -----------------------------------------------------------------------------------------------------------


def first_batch(data, stage="fit"):
    data.setup(stage)
    return next(iter(data.train_dataloader()))


def test_strips(write, words):
    """Two strips of Bars: a margin of 2 pixels, 8 pixels per character, a black patch of 8."""
    renderer = Bars()
    data = PixelTexts(write([{"text": "a"}, {"text": "a b"}]), renderer, words, batch_size=2, pad_to=3)
    got = first_batch(data)
    assert set(got) == {"pixel_values", "pixel_mask", "num_text_patches"}
    order = np.argsort(got["num_text_patches"].tolist())
    pixels, mask = got["pixel_values"][order], got["pixel_mask"][order]
    assert pixels.shape == (2, 1, 8, 48)  # 5 attended patches, rounded up to 6
    assert pixels.dtype == torch.uint8
    assert got["num_text_patches"][order].tolist() == [2, 4]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert mask.dtype == got["num_text_patches"].dtype == torch.int64
    shade = 255 - (ord("a") % 200 + 20)
    assert pixels[0, 0, 3].tolist() == [255] * 2 + [shade] * 6 + [255] * 8 + [0] * 8 + [255] * 24
    assert torch.equal(pixels[1, 0, :, :40], torch.from_numpy(renderer.render("a b").trimmed.copy()))


def test_padding_to_the_maximum_and_colour(write):
    data = PixelTexts(write([{"text": "a"}]), Bars(channels=3), batch_size=1, pad_to_max=True)
    got = first_batch(data)
    assert got["pixel_values"].shape == (1, 3, 8, 64)
    assert got["pixel_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    expected = torch.from_numpy(Bars(channels=3).render("a").pixel_values).permute(2, 0, 1)
    assert torch.equal(got["pixel_values"][0], expected)


def test_length_never_exceeds_the_maximum(write):
    data = PixelTexts(write([{"text": "abcdefgh"}]), Bars(), batch_size=1, pad_to=5, split_long=False)
    got = first_batch(data)
    assert got["pixel_values"].shape == (1, 1, 8, 64)
    assert got["num_text_patches"].tolist() == [7]
    assert got["pixel_mask"].tolist() == [[1] * 8]
    assert (got["pixel_values"][..., -8:] == 0).all()


@pytest.mark.parametrize("tokenizer", ["words", "words_without_bos"])
def test_tokens_begin_and_end(write, request, tokenizer):
    path = write([{"text": "a b c"}, {"text": "d"}])
    data = PixelTexts(path, Bars(), request.getfixturevalue(tokenizer), modes=["text"], batch_size=2)
    got = first_batch(data)
    assert set(got) == {"input_ids", "attention_mask", "labels"}
    order = np.argsort(got["attention_mask"].sum(1).tolist())
    assert got["input_ids"][order].tolist() == [[1, 7, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert got["attention_mask"][order].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert got["labels"][order].tolist() == [[1, 7, 2, -100, -100], [1, 4, 5, 6, 2]]


def test_tokens_are_cut(write, words):
    data = PixelTexts(write([{"text": "a b c d"}]), Bars(20), words, modes=["pair"], max_tokens=3, batch_size=1)
    assert first_batch(data)["input_ids"].tolist() == [[1, 4, 5]]
    data = PixelTexts(write([{"text": "a b c d"}]), Bars(9), words, modes=["pair"], split_long=False, batch_size=1)
    assert data.max_tokens == 9


def test_pairs_hold_the_same_text(make):
    renderer = Bars()
    data = make(modes=["pair"], batch_size=8)
    got = first_batch(data)
    assert set(got) == {
        "pixel_values",
        "pixel_mask",
        "num_text_patches",
        "input_ids",
        "attention_mask",
        "labels",
    }
    for ids, mask, pixels in zip(got["input_ids"], got["attention_mask"], got["pixel_values"], strict=True):
        text = data.tokenizer.decode(ids[1 : mask.sum() - 1])
        strip = renderer.render(text).trimmed.copy()
        assert torch.equal(pixels[0, :, : strip.shape[1]], torch.from_numpy(strip))


def test_long_documents_become_several_rows(write, words):
    data = PixelTexts(write([{"text": "a b c d\n\ne f"}, {"text": "g"}]), Bars(), words, modes=["pair"], batch_size=1)
    data.setup("fit")
    strips = data.datasets["train"]
    assert [document["text"] for document in strips.documents] == ["a b c", "d e f", "g"]
    ids = [strips[row, "pair"]["ids"].tolist() for row in range(3)]
    assert ids == [[1, 4, 5, 6, 2], [1, 7, 8, 9, 2], [1, 10, 2]]


def test_packed_strips(write):
    path = write([{"text": text} for text in ("a", "bc", "d", "ef", "ghijk")])
    renderer = Bars(max_seq_length=9)
    data = PixelTexts(path, renderer, pack=True, val_split="train", batch_size=2, pad_to_max=True)
    data.setup("fit")
    assert data.datasets["train"].starts.tolist() == [0, 2, 4, 5]  # 3 + 4, 3 + 4, 7 patches of 9
    got = next(iter(data.val_dataloader()))
    assert got["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, -1, -1]] * 2
    assert got["num_text_patches"].tolist() == [6, 6]
    assert torch.equal(got["pixel_mask"], (got["document_ids"] >= 0).long())
    for pixels, texts in zip(got["pixel_values"], (("a", "bc"), ("d", "ef")), strict=True):
        strips = np.concatenate([renderer.render(text).trimmed for text in texts], axis=1)
        assert torch.equal(pixels[0, :, :56], torch.from_numpy(strips))
        assert (pixels[..., 56:] == 255).all()


def test_packing_is_for_images(make):
    with pytest.raises(ValueError, match=r"^data\.pack: a strip of several documents has no row of tokens; set"):
        make(pack=True)
    assert make(pack=True, modes=None, tokenizer=None).pack


def test_mixed_rows_are_refused():
    rows = [{"ids": [1]}, {"pixels": np.zeros((8, 8), np.uint8), "num_text_patches": 0}]
    with pytest.raises(ValueError, match=r"^data: a batch mixes rows of the modes image, text, but every batch holds"):
        PixelCollator(StripLayout(8, 1, 8))(rows)


def test_modes_need_a_tokenizer(make, words):
    with pytest.raises(ValueError, match=r"^data\.tokenizer: data\.modes asks for tokens; set it"):
        make(tokenizer=None)
    with pytest.raises(ValueError, match=r"^data\.val_modes: 'all' is not one of image, text, pair$"):
        make(val_modes=["all"])


def test_tokenizer_without_a_beginning(write, words, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"^data\.tokenizer: .* has no beginning token"):
        PixelTexts(write(ROWS), Bars(), str(tmp_path / "tokenizer"), modes=["text"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a"}], r"^data\.text_column: there is no column 'text'; the nearest name is 'body'"),
        ([{"text": "a"}, {"text": None}], r"^data\.text_column: column 'text' of row 1 holds None instead of text"),
        ([{"text": " "}, {"text": ""}], r"^data: the train split \['train'\] has no row with text"),
    ],
)
def test_unusable_rows(write, rows, message):
    with pytest.raises(ValueError, match=message):
        PixelTexts(write(rows), Bars()).setup("fit")


def test_empty_rows_are_counted(write):
    data = PixelTexts(write([{"text": "a"}, {"text": "\n"}, {"text": "b"}]), Bars())
    with pytest.warns(UserWarning, match=r"^dropped 1 of 3 rows of the train split that have no text$"):
        data.setup("fit")
    assert len(data.datasets["train"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"data\.val_fraction must lie between 0 and 1, got 1\.0"),
        ({"val_fraction": 0.1, "val_split": "train"}, r"data\.val_fraction and data\.val_split both say"),
        ({"val_fraction": 0.1, "streaming": True}, r"data\.val_fraction: a stream has no length"),
        ({"pad_to": 0}, r"data\.pad_to: 0 patches must be at least 1"),
    ],
)
def test_contradicting_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_plain_text_files(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "one.txt").write_text("a b\nc\n\nd\n")
    (tmp_path / "corpus" / "two.txt").write_text("e\n")

    def texts(name, **options):
        data = PixelTexts(str(tmp_path / name), Bars(), **options)
        data.setup("fit")
        return [document["text"] for document in data.datasets["train"].documents]

    with pytest.warns(UserWarning, match="dropped 1 of 4 rows"):
        assert texts("corpus/one.txt") == ["a b", "c", "d"]
    assert texts("corpus/one.txt", text_unit="paragraph") == ["a b c", "d"]
    assert texts("corpus", text_unit="document") == ["a b c", "d", "e"]
    rows = load_rows(str(tmp_path), "train", data_files={"train": "corpus/two.txt"})
    assert rows["text"][:] == ["e"]


def test_texts_in_arrays():
    table = TextTable(["ä", "", "日本", "\ud800"])
    assert [document["text"] for document in table] == ["ä", "", "日本", "\ud800"]
    assert len(TextTable([])) == 0


def test_held_out_rows(make):
    data = make(val_fraction=0.25, limit_val=3, limit_train=11)
    data.setup("fit")
    train, val = data.datasets["train"].documents, data.datasets["val"].documents
    assert (len(train), len(val)) == (11, 3)
    assert not {document["text"] for document in train} & {document["text"] for document in val}


# -- loaders -----------------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Remembers everything that every step got."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, *contents(batch)))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(contents(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return contents(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtTheEnd(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def trainer_in(folder, save=None, **options):
    return Trainer(
        accelerator="cpu",
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


def run(data, folder, ckpt_path=None, save=None, **options):
    model = Recorder()
    trainer_in(folder, save, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.seen


@pytest.mark.parametrize("streaming", [False, True])
def test_exact_resume(make, tmp_path, streaming):
    """With a mixture of modes, in the middle of an epoch and later, with other numbers of workers."""
    options = {"streaming": streaming, "shuffle_buffer": 7}
    whole = run(make(**options), tmp_path, max_steps=13)
    assert len({mode for _, mode, _ in whole}) == 3
    for stop, before, after in ((3, 0, 2), (8, 2, 0)):
        first = run(make(num_workers=before, **options), tmp_path, save=tmp_path / "a.ckpt", max_steps=stop)
        rest = run(make(num_workers=after, **options), tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=13)
        assert first + rest == whole


def test_overfitting_on_few_batches(make, tmp_path):
    seen = run(make(val_split="train"), tmp_path, max_steps=4, overfit_batches=2)
    assert [batch for _, *batch in seen[:2]] == [batch for _, *batch in seen[2:]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_once_per_evaluation(make, tmp_path, streaming, workers):
    data = make(
        val_split="train",
        test_split="train",
        val_modes=["image", "text"],
        streaming=streaming,
        num_workers=workers,
        val_batch_size=5,
    )
    model, trainer = Recorder(), trainer_in(tmp_path)
    trainer.validate(model, datamodule=data, verbose=False)
    assert [mode for mode, _ in model.evaluated] == ["image", "text"] * 5
    tokens = [ids for mode, batch in model.evaluated if mode == "text" for ids in batch["input_ids"]]
    letters = {letter: number for number, letter in enumerate("abcdefghij", 4)}
    assert tokens == [[1, *(letters[letter] for letter in row["text"].split()), 2] for row in ROWS]
    pixels = [strip for mode, batch in model.evaluated if mode == "image" for strip in batch["pixel_values"]]
    assert np.array(pixels)[:, 0, :, :40].tolist() == [Bars().render(row["text"]).trimmed.tolist() for row in ROWS]
    before, model.evaluated = model.evaluated, []
    trainer.test(model, datamodule=data, verbose=False)
    assert model.evaluated == before
    assert trainer.predict(model, datamodule=data) == before


def test_streamed_evaluation_of_packed_strips(write):
    path = write([{"text": text} for text in ("a", "bc", "d", "ef", "ghijk")])
    got = []
    for streaming in (False, True):
        data = PixelTexts(path, Bars(9), pack=True, val_split="train", batch_size=2, streaming=streaming)
        data.setup("validate")
        got.append([contents(batch) for batch in data.val_dataloader()])
    assert got[0] == got[1]
    assert len(got[0]) == 2


def test_limits_of_streams(make):
    data = make(streaming=True, shuffle_buffer=0, modes=["text"], limit_train=9, val_split="train", limit_val=3)
    data.setup("fit")
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 8
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [3]


class TwoRanks(Recorder):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps([self.seen, self.evaluated]))


def test_two_ranks(make, tmp_path):
    """The same modes and the same global batches as on one rank, and every validation row once."""
    options = {"val_split": "train", "val_modes": ["text"]}
    alone = run(make(**options), tmp_path, max_steps=7)
    trainer = trainer_in(tmp_path, devices=2, strategy="ddp_fork", max_steps=7)
    trainer.fit(TwoRanks(tmp_path), datamodule=make(batch_size=2, **options))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    key = {"image": "num_text_patches", "text": "input_ids", "pair": "input_ids"}
    for (epoch, mode, batch), *parts in zip(alone, *(seen for seen, _ in ranks), strict=True):
        assert all(part[:2] == [epoch, mode] for part in parts)
        assert sorted(batch[key[mode]]) == sorted(parts[0][2][key[mode]] + parts[1][2][key[mode]])
    rows = [row for _, evaluated in ranks for _, batch in evaluated for row in batch["input_ids"]]
    assert len(rows) == 23
    assert len({tuple(row) for row in rows}) == 23


# -- renderers ---------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_fingerprint(make, tmp_path):
    run(make(), tmp_path, save=tmp_path / "a.ckpt", max_steps=1)
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["PixelTexts"] == {"renderer": Bars().fingerprint()}
    assert "renderer" not in stored["datamodule_hyper_parameters"]
    other = make(Bars(shade=7))
    with pytest.warns(
        UserWarning, match=r"^data\.renderer: the checkpoint was trained on strips drawn with other valu"
    ):
        run(other, tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=2)
    with pytest.warns(UserWarning, match=r"values of shade \(0, now 7\); results may differ$"):
        other.load_state_dict(make().state_dict())


@pytest.mark.filterwarnings("error")
def test_equal_renderers_are_fine(make):
    make().load_state_dict(make().state_dict())
    make().load_state_dict({})
    make(Bars(max_seq_length=12)).load_state_dict(make().state_dict())


def test_real_renderer_in_workers():
    """The same pixels from two workers as from this process, and data sets that travel light."""
    batches = []
    for workers in (0, 2):
        data = PixelSnippets(
            TextRenderer(max_seq_length=32), modes=DUAL, limit_train=40, batch_size=8, num_workers=workers
        )
        data.setup("fit")
        batches.append([contents(batch) for batch in data.train_dataloader()])
        assert len(pickle.dumps(data.datasets["train"].maker.renderer)) < 5000
    assert batches[0] == batches[1]
    assert len({mode for mode, _ in batches[0]}) > 1


def test_snippets():
    data = PixelSnippets(TextRenderer(max_seq_length=64), modes={"pair": 1}, limit_val=20)
    data.setup("fit")
    data.setup("test")
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [9105, 20, 1000]
    texts = [{document["text"] for document in data.datasets[split].documents} for split in ("train", "val", "test")]
    assert not texts[0] & texts[1]
    batch = next(iter(data.val_dataloader()))
    assert batch["pixel_values"].shape[2:] == (16, 1024)
    assert (batch["input_ids"][:, 0] == 1).all()
    data = PixelSnippets(TextRenderer(max_seq_length=64), split_long=True, limit_train=50)
    data.setup("fit")
    assert len(data.datasets["train"]) > 50
