import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread

from callbacks.strips import GAP, StripImages, stack_images
from tests.callbacks.tiny import Tiny, trainer


class Drawing(Tiny):
    """Five strips of 3 x 20 pixels, whose grey is the step's number."""

    def strips(self):
        step = self.trainer.global_step
        return {f"row {row}": np.full((3, 20), 10 * row + step, np.uint8) for row in range(5)}


def run(folder, callback, ckpt_path=None, model=None, **options):
    trainer(folder, callbacks=[callback], **options).fit(model or Drawing(), ckpt_path=ckpt_path)
    return sorted(path.name for path in (folder / "strips").glob("*"))


def pixels(path):
    return (imread(path)[..., :3] * 255).round().astype(int)


def test_pictures_every_n_batches_and_after_validation(tmp_path):
    files = run(tmp_path, StripImages(4, num_rows=2))
    assert files == ["step=12-val.png", "step=12.png", "step=4.png", "step=6-val.png", "step=8.png"]
    picture = pixels(tmp_path / "strips/step=8.png")
    assert picture.shape == (3 + GAP + 3, 20, 3)
    assert (picture[:3] == 8).all()
    assert (picture[-3:] == 18).all()


def test_long_and_unequal_images_are_stacked():
    grey = np.arange(50, dtype=np.uint8).reshape(1, 50)
    colour = np.stack([np.full((2, 3), channel, np.uint8) for channel in (1, 2, 3)], -1)
    picture = stack_images([grey, colour], wrap=20)
    assert picture.shape == (1 + GAP + 1 + GAP + 1 + GAP + 2, 20, 3)
    assert picture[0, :, 1].tolist() == list(range(20))
    assert picture[2 * (1 + GAP), :10, 0].tolist() == list(range(40, 50))
    assert picture[-1, 2].tolist() == [1, 2, 3]
    assert len(np.unique(picture[-2:, 3:])) == 1  # nothing but ground beside a narrow image
    assert stack_images([grey]).shape == (1, 50, 3)
    with pytest.raises(ValueError, match="no images"):
        stack_images([])


def test_pictures_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    assert run(tmp_path, StripImages(2), logger=logger, max_steps=4) == ["step=2.png", "step=4.png"]
    images = EventAccumulator(logger.log_dir).Reload().Images("strips/train")
    assert [(image.step, image.width, image.height) for image in images] == [(2, 20, 4 * 3 + 3 * GAP)] * 1 + [
        (4, 20, 4 * 3 + 3 * GAP)
    ]


def test_a_resumed_run_has_the_pictures_of_a_whole_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(whole, StripImages(2))
    saver = ModelCheckpoint(broken, filename="seven", every_n_train_steps=7)
    trainer(broken, callbacks=[StripImages(2), saver], enable_checkpointing=True).fit(Drawing())
    (broken / "strips/step=99.png").write_bytes(b"of a run that went further")
    (broken / "strips/mine.png").write_bytes(b"not ours")
    (broken / "strips/step=6.png").write_bytes(b"before the checkpoint")
    files = run(broken, StripImages(2), broken / "seven.ckpt")
    assert files == sorted([*expected, "mine.png"])
    assert (broken / "strips/step=6.png").read_bytes() == b"before the checkpoint"
    assert (broken / "strips/step=8.png").read_bytes() == (whole / "strips/step=8.png").read_bytes()


def test_a_new_run_begins_a_new_folder(tmp_path):
    run(tmp_path, StripImages(1))
    assert run(tmp_path, StripImages(3), max_steps=4) == ["step=3.png"]


def test_nothing_to_draw_writes_nothing(tmp_path):
    model = Drawing()
    model.strips = dict
    assert run(tmp_path, StripImages(1), model=model, max_steps=2) == []


def test_a_module_without_strips_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.StripImages needs a module with strips, and Tiny has none"):
        run(tmp_path, StripImages(1), model=Tiny())


@pytest.mark.parametrize("name", ["every_n_steps", "num_rows", "wrap"])
def test_arguments_out_of_range(name):
    with pytest.raises(ValueError, match=rf"callbacks\.StripImages\.{name} must be at least 1, got 0"):
        StripImages(**{name: 0})
