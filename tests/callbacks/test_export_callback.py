from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import ExportPretrained
from tests.callbacks.tiny import Tiny, trainer


def exports(folder, callback, ckpt_path=None, **options):
    """Step and folder of each export."""
    model = Tiny()
    trainer(folder, callbacks=[callback], **options).fit(model, ckpt_path=ckpt_path)
    return model.exports


def test_exports_once_at_the_end(tmp_path):
    assert exports(tmp_path, ExportPretrained()) == [(12, tmp_path / "export")]


def test_exports_into_the_given_folder(tmp_path):
    target = tmp_path / "elsewhere"
    assert exports(tmp_path, ExportPretrained(str(target))) == [(12, target)]


def test_exports_every_n_batches_across_epochs(tmp_path):
    steps = [step for step, _ in exports(tmp_path, ExportPretrained(every_n_steps=4))]
    assert steps == [4, 8, 12, 12]  # an epoch has six batches; the last one is that of the end


def test_exports_though_an_epoch_is_shorter_than_the_interval(tmp_path):
    assert [step for step, _ in exports(tmp_path, ExportPretrained(every_n_steps=8))] == [8, 12]


def test_a_resumed_run_keeps_the_interval(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="seven", every_n_train_steps=7)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(Tiny())
    resumed = exports(tmp_path, ExportPretrained(every_n_steps=4), ckpt_path=tmp_path / "seven.ckpt")
    assert [step for step, _ in resumed] == [8, 12, 12]


def test_a_run_killed_after_its_last_step_exports_when_it_resumes(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=12)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=12).fit(Tiny())
    assert exports(tmp_path, ExportPretrained(), ckpt_path=tmp_path / "last.ckpt", max_steps=12) == [
        (12, tmp_path / "export")
    ]
