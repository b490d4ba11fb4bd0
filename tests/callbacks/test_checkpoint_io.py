import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import AtomicCheckpointIO
from tests.callbacks.tiny import Tiny, trainer

FORK = multiprocessing.get_context("fork")


def save_with_small_files(path, answer):
    """Try to save four megabytes where the system allows files of 200 kB, and send the error's text."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    except OSError as error:
        answer.send(str(error))


def save_for_ever(path):
    """Replace one checkpoint over and over."""
    for number in range(10**9):
        weights = torch.full((300_000,), float(number))
        AtomicCheckpointIO().save_checkpoint({"number": number, "weights": weights}, path)


def load(path):
    return torch.load(path, weights_only=True)


def test_saves_what_weights_only_loads(tmp_path):
    path = tmp_path / "new" / "folder" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3), "step": 4}, path)
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3), "step": 5}, str(path))
    assert load(path)["step"] == 5
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save_with_small_files, args=(path, sender))
    process.start()
    message = receiver.recv()
    process.join()
    assert message.startswith(f"the checkpoint {path} could not be written ([Errno 27] File too large)")
    assert "written before are intact" in message
    assert load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_when_the_file_is_moved(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written \(\[Errno 28\] No space left on device\)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_blamed_on_the_disk(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("a sharded tensor has no file form")

    with pytest.raises(RuntimeError, match="a sharded tensor has no file form"):
        AtomicCheckpointIO().save_checkpoint({"bad": Unwritable()}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_never_leaves_a_broken_checkpoint(tmp_path):
    path = tmp_path / "hpc_ckpt_1.ckpt"
    for delay in (0.0, 0.013, 0.029, 0.05, 0.07):
        path.unlink(missing_ok=True)
        process = FORK.Process(target=save_for_ever, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        state = load(path)
        assert (state["weights"] == state["number"]).all()
        assert [file for file in tmp_path.iterdir() if "ckpt" in file.name] == [path]  # drafts look like nothing
    AtomicCheckpointIO().save_checkpoint({}, path)
    assert list(tmp_path.iterdir()) == [path]


class Readable(AtomicCheckpointIO):
    """Checks before and after every write and removal that some checkpoint can be read."""

    def __init__(self, folder):
        self.folder, self.started, self.looks = Path(folder), False, 0

    def look(self):
        if self.started:
            self.looks += 1
            assert load(self.folder / "last.ckpt")["global_step"] >= 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.look()
        super().save_checkpoint(checkpoint, path, storage_options)
        self.started |= Path(path).name == "last.ckpt"
        self.look()

    def remove_checkpoint(self, path):
        super().remove_checkpoint(path)
        self.look()


def test_some_last_checkpoint_is_always_readable(tmp_path):
    plugin = Readable(tmp_path)
    saver = ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=1, save_top_k=2, save_last=True)
    trainer(tmp_path, plugins=[plugin], callbacks=[saver], enable_checkpointing=True).fit(Tiny())
    assert plugin.looks > 20
    assert load(tmp_path / "last.ckpt")["global_step"] == 12
