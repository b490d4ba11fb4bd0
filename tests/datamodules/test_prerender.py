"""Strips drawn before training: the same pixels, interrupted runs, other people's files."""

import base64
import io
import os
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow

from datamodules.pixels import PixelTexts
from datamodules.prerender import decode_strip, differing_keys, main, prerender, stored_fingerprint
from datamodules.rendering import TextRenderer
from tests.datamodules.pixel_fakes import Bars

ROWS = [{"text": f"{'abcdefghij'[number % 10]} {'abc' * (number % 7)}\nd"} for number in range(23)]


def batches(data):
    data.setup("validate")
    return [{key: value.tolist() for key, value in batch.items()} for batch in data.val_dataloader()]


@pytest.mark.parametrize(
    "renderer",
    [Bars(), Bars(channels=3), TextRenderer(max_seq_length=12), TextRenderer(max_seq_length=12, colour="rgb")],
    ids=["bars", "coloured bars", "gray", "rgb"],
)
@pytest.mark.parametrize("modes", [["image"], ["pair", "text"]])
def test_round_trip(write, words, tmp_path, renderer, modes):
    """Stored strips and their texts give bit for bit the batches that drawing while training gives."""
    path = write(ROWS)
    options = {"tokenizer": words, "modes": modes, "val_split": "train"}
    drawn = batches(PixelTexts(path, renderer, **options))
    prerender(path, str(tmp_path / "strips"), renderer, rows_per_shard=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batches(PixelTexts(str(tmp_path / "strips"), renderer, **options)) == drawn
    streamed = PixelTexts(str(tmp_path / "strips"), renderer, streaming=True, **options)
    assert batches(streamed) == drawn


def test_round_trip_of_packed_strips(write, tmp_path):
    path, renderer = write(ROWS), Bars(16)
    prerender(path, str(tmp_path / "strips"), renderer)
    drawn = batches(PixelTexts(path, renderer, pack=True, val_split="train"))
    assert batches(PixelTexts(str(tmp_path / "strips"), renderer, pack=True, val_split="train")) == drawn


def test_columns(write, tmp_path):
    renderer = Bars()
    assert prerender(write([{"text": "ab"}, {"text": ""}, {"text": "abcdefgh"}]), str(tmp_path / "out"), renderer) == 3
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "train-00000.parquet"
    table = pq.read_table(file)
    assert table.column_names == ["image", "num_patches", "sep_patches", "text"]
    assert table["text"].to_pylist() == ["ab", "abcde", "fgh"]
    strips = [renderer.render(text) for text in ("ab", "abcde", "fgh")]
    assert table["num_patches"].to_pylist() == [strip.num_text_patches for strip in strips] == [3, 6, 4]
    assert table["sep_patches"].to_pylist() == [[3], [6], [4]]
    for image, strip in zip(table["image"].to_pylist(), strips, strict=True):
        assert (np.asarray(Pillow.open(io.BytesIO(image))) == strip.trimmed).all()
    assert stored_fingerprint(str(tmp_path / "out")) == stored_fingerprint(str(file)) == renderer.fingerprint()


def contents(folder):
    return {file.name: pq.read_table(file).to_pydict() for file in folder.glob("*.parquet")}


def test_interrupted_runs_go_on(write, tmp_path):
    path, renderer = write(ROWS), Bars()
    options = {"rows_per_shard": 5}
    total = prerender(path, str(tmp_path / "whole"), renderer, **options)
    expected = contents(tmp_path / "whole")
    assert len(expected) == 5

    class Interrupted(Bars):
        drawn = 0

        def render(self, text, offsets=False):
            if self.drawn == 20:
                raise KeyboardInterrupt
            self.drawn += 1
            return super().render(text, offsets)

    with pytest.raises(KeyboardInterrupt):
        prerender(path, str(tmp_path / "part"), Interrupted(), **options)
    done = contents(tmp_path / "part")
    assert 0 < len(done) < 5
    assert done == {name: expected[name] for name in done}
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part").iterdir()}
    (tmp_path / "part" / f".train-00004.parquet.{os.getpid()}.tmp").write_bytes(b"half a file")
    written = prerender(path, str(tmp_path / "part"), renderer, num_workers=2, **options)
    assert written == total - sum(len(table["text"]) for table in done.values())
    assert contents(tmp_path / "part") == expected
    assert sorted(file.name for file in (tmp_path / "part").iterdir()) == sorted(expected)
    assert times.items() <= {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part").iterdir()}.items()
    assert prerender(path, str(tmp_path / "part"), renderer, **options) == 0


@pytest.mark.parametrize(
    ("renderer", "options", "keys"),
    [
        (Bars(shade=3), {}, "shade"),
        (Bars(12), {}, "max_seq_length"),
        (Bars(), {"rows_per_shard": 9, "split_long": False}, "rows_per_shard, split_long"),
    ],
)
def test_other_settings_in_the_same_folder(write, tmp_path, renderer, options, keys):
    path = write(ROWS)
    prerender(path, str(tmp_path / "out"), Bars())
    with pytest.raises(
        ValueError, match=rf"^--out: .*train-00000\.parquet was written with other values of {keys}; ch"
    ):
        prerender(path, str(tmp_path / "out"), renderer, **options)


def test_unusable_texts(write, tmp_path):
    with pytest.raises(ValueError, match=r"^--text_column: there is no column 'body'"):
        prerender(write(ROWS), str(tmp_path / "out"), Bars(), text_column="body")
    with pytest.raises(ValueError, match=r"^--text_column: column 'text' of row 0 holds 3 instead of text"):
        prerender(write([{"text": 3}]), str(tmp_path / "other"), Bars())
    with pytest.raises(ValueError, match=r"^--rows_per_shard: 0 must be at least 1"):
        prerender(write(ROWS), str(tmp_path / "out"), Bars(), rows_per_shard=0)


def test_another_renderer_than_that_of_the_strips(write, tmp_path):
    prerender(write(ROWS), str(tmp_path / "out"), Bars())
    data = PixelTexts(str(tmp_path / "out"), Bars(shade=3))
    with pytest.warns(
        UserWarning, match=r"^data\.renderer: the strips of data\.path=.* other values of shade \(0, now"
    ):
        data.setup("fit")
    assert differing_keys({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a", "b", "c"]
    assert differing_keys({"a": "1"}, {"a": "1"}) == []


def released(renderer, layout):
    """Rows as in the released data sets: strips of full width."""
    rows = []
    for text in ("a", "abcdef", "ab"):
        strip = renderer.render(text)
        picture = Pillow.fromarray(strip.pixel_values)
        file = io.BytesIO()
        picture.save(file, "PNG")
        value = base64.b64encode(file.getvalue()).decode() if layout == "image" else picture
        rows.append({layout: value, "num_patches": strip.num_text_patches})
    table = Dataset.from_list(rows)
    return table.cast_column(layout, Image()) if layout == "pixel_values" else table


@pytest.mark.parametrize("layout", ["image", "pixel_values"])
def test_released_layouts(tmp_path, layout):
    renderer = Bars(16)
    released(renderer, layout).save_to_disk(tmp_path / "set")
    data = PixelTexts(str(tmp_path / "set"), renderer, val_split="train", batch_size=3, pad_to_max=True)
    (batch,) = batches(data)
    strips = [renderer.render(text) for text in ("a", "abcdef", "ab")]
    assert batch["pixel_values"] == [[strip.pixel_values.tolist()] for strip in strips]
    assert batch["num_text_patches"] == [strip.num_text_patches for strip in strips]
    coloured = PixelTexts(str(tmp_path / "set"), Bars(16, channels=3), val_split="train", batch_size=3)
    coloured.setup("validate")
    assert next(iter(coloured.val_dataloader()))["pixel_values"].shape == (3, 3, 8, 128)
    shorter = PixelTexts(str(tmp_path / "set"), Bars(6), val_split="train", batch_size=3)
    (batch,) = batches(shorter)
    assert batch["num_text_patches"] == [2, 5, 3]
    pixels = torch.tensor(batch["pixel_values"])
    assert (pixels[1, ..., 40:] == 0).all()  # cut, with the separator on the last patch
    assert torch.equal(pixels[1, 0, :, :40], torch.from_numpy(strips[1].pixel_values[:, :40].copy()))


def test_strips_without_text_have_no_tokens(tmp_path, words):
    released(Bars(16), "image").save_to_disk(tmp_path / "set")
    data = PixelTexts(str(tmp_path / "set"), Bars(16), words, modes={"image": 1, "pair": 1})
    with pytest.raises(
        ValueError, match=r"^data\.text_column: the drawn strips of .* have no column 'text' to tokenise"
    ):
        data.setup("fit")


def test_strips_of_another_size():
    strip = Bars(patch_size=10).render("ab")
    with pytest.raises(
        ValueError, match=r"^data\.path: a stored strip has 10 x 80 pixels and 2 num_patches, which does"
    ):
        decode_strip(Pillow.fromarray(strip.pixel_values), strip.num_text_patches, Bars())
    with pytest.raises(ValueError, match=r"set data\.renderer to the one that drew the strips"):
        decode_strip(Pillow.fromarray(Bars().render("ab").pixel_values[:, :16]), 3, Bars())


def test_text_up_to_the_end_of_a_strip():
    """Files that count the last patch as text although the separator lies on it."""
    pixels = Bars().render("abcdefghij").pixel_values
    found, count = decode_strip(Pillow.fromarray(pixels), 8, Bars())
    assert (found == pixels).all()
    assert count == 7


def test_command_line(write, tmp_path, capsys):
    settings = tmp_path / "renderer.yaml"
    settings.write_text("class_path: datamodules.rendering.TextRenderer\ninit_args: {max_seq_length: 20}\n")
    arguments = ["--path", write(ROWS), "--out", str(tmp_path / "out"), "--renderer", str(settings)]
    main(arguments)
    assert capsys.readouterr().out == "wrote 23 strips\n"
    assert stored_fingerprint(str(tmp_path / "out")) == TextRenderer(max_seq_length=20).fingerprint()
    short = ["--renderer", "TextRenderer", "--renderer.max_seq_length", "20", "--rows_per_shard", "9"]
    main([*arguments[:2], "--out", str(tmp_path / "other"), *short])
    assert len(contents(tmp_path / "other")) == 3
    with pytest.raises(SystemExit, match=r"^error: --out: .* other values of rows_per_shard"):
        main([*arguments[:4], *short])
