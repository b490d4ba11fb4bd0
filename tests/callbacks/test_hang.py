import ctypes
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from callbacks.hang import HEADER, HangWatch
from tests.callbacks.tiny import Tiny, trainer


def sleep_while_others_wait(seconds):
    time.sleep(seconds)


def sleep_in_c_code_that_holds_the_lock(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def signal_to_oneself():
    os.kill(os.getpid(), signal.SIGUSR2)


class Stuck(Tiny):
    """Does something odd in the third batch."""

    def __init__(self, action=None, rank=0):
        super().__init__()
        self.action, self.rank = action, rank

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.trainer.current_epoch == 0 and self.global_rank == self.rank and self.action:
            self.action()
        return super().training_step(batch, batch_idx)


class StuckInValidation(Tiny):
    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            sleep_while_others_wait(0.6)


def files(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("hang-*"))}


def test_both_processes_tell_where_they_are_and_go_on(tmp_path, capfd):
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=[HangWatch(0.5)], max_epochs=1)
    run.fit(Stuck(lambda: sleep_while_others_wait(1.5), rank=1))
    found = files(tmp_path)
    assert list(found) == ["hang-rank=0.txt", "hang-rank=1.txt"]
    assert "in sleep_while_others_wait" in found["hang-rank=1.txt"]
    assert "in sleep_while_others_wait" not in found["hang-rank=0.txt"]
    assert "in backward" in found["hang-rank=0.txt"] or "in all_reduce" in found["hang-rank=0.txt"]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("HangWatch: ")]
    for rank, text in enumerate(found.values()):
        assert text.startswith(f"rank {rank} of 2, host {os.uname().nodename}, pid ")
        assert "most recent call first" in text
        mine = [line for line in told if line.startswith(f"HangWatch: rank {rank} of 2, host ")]
        assert mine
        assert f"; stacks are in {tmp_path}/hang-rank={rank}.txt; still waiting" in mine[0]
    assert any("since training batch 2 of epoch 0, step 2" in line for line in told if "rank 1" in line)


def test_nothing_is_left_of_a_run_that_never_stood_still(tmp_path, capfd):
    watch, threads = HangWatch(5), threading.active_count()
    run = trainer(tmp_path, callbacks=[watch])
    run.fit(Tiny())
    run.test(Tiny())
    assert files(tmp_path) == {}
    assert threading.active_count() == threads
    assert "HangWatch" not in capfd.readouterr().err
    assert watch.state_dict() == {}


def test_validation_is_watched(tmp_path):
    trainer(tmp_path, callbacks=[HangWatch(0.2)], max_epochs=1, limit_val_batches=1).fit(StuckInValidation())
    (text,) = files(tmp_path).values()
    assert "since validation batch 0 after step 6" in text
    assert "in sleep_while_others_wait" in text


def test_c_code_that_holds_the_lock_is_found(tmp_path):
    run = trainer(tmp_path, callbacks=[HangWatch(0.2)], max_epochs=1)
    run.fit(Stuck(lambda: sleep_in_c_code_that_holds_the_lock(1.6)))
    (text,) = files(tmp_path).values()
    assert "in sleep_in_c_code_that_holds_the_lock" in text
    assert "Timeout" in text  # the mark of the alarm without Python


def test_a_signal_writes_stacks_at_once_and_is_nobodys_afterwards(tmp_path):
    trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(Stuck(signal_to_oneself))
    (text,) = files(tmp_path).values()
    assert "in signal_to_oneself" in text
    assert "Timeout" not in text
    received = []
    before = signal.signal(signal.SIGUSR2, lambda *_: received.append(1))
    signal_to_oneself()
    signal.signal(signal.SIGUSR2, before)
    assert received == [1]


def test_a_signal_that_somebody_else_waits_for_is_left_alone(tmp_path):
    received = []
    before = signal.signal(signal.SIGUSR2, lambda *_: received.append(1))
    try:
        trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(Stuck(signal_to_oneself))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [1]
    assert files(tmp_path) == {}


def test_a_run_that_must_not_wait_ends_with_an_error(tmp_path, capfd):
    run = trainer(tmp_path, strategy="ddp_fork", callbacks=[HangWatch(0.3, abort=True)], max_epochs=1)
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        run.fit(Stuck(lambda: sleep_while_others_wait(60)))
    (text,) = files(tmp_path).values()
    assert "in sleep_while_others_wait" in text
    assert "; the process ends" in capfd.readouterr().err


def test_weights_are_those_of_a_run_that_is_not_watched(tmp_path):
    weights = []
    for callbacks in ([], [HangWatch(0.001)]):  # goes off all the time
        torch.manual_seed(0)
        model = Tiny()
        trainer(tmp_path, callbacks=callbacks).fit(model)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert files(tmp_path)


def test_what_an_earlier_run_wrote_is_kept(tmp_path):
    path = tmp_path / "hang-rank=0.txt"
    path.write_text("stacks of yesterday\n")
    trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(Tiny())
    assert path.read_text() == "stacks of yesterday\n"
    trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(Stuck(signal_to_oneself))
    text = path.read_text()
    assert text.startswith("stacks of yesterday\nrank 0 of 1, ")
    assert "in signal_to_oneself" in text


def test_the_last_of_several_watches(tmp_path, capfd):
    watches = [HangWatch(0.1), HangWatch(60)]
    threads = threading.active_count()
    run = trainer(tmp_path, callbacks=watches, max_epochs=1)
    run.fit(Stuck(lambda: sleep_while_others_wait(0.4)))
    assert files(tmp_path) == {}
    assert threading.active_count() == threads
    assert "HangWatch" not in capfd.readouterr().err


def test_a_signal_that_is_ignored_is_listened_to(tmp_path):
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(Stuck(signal_to_oneself))
        signal_to_oneself()  # does no harm
    finally:
        signal.signal(signal.SIGUSR2, before)
    (text,) = files(tmp_path).values()
    assert "in signal_to_oneself" in text


class Killed(Exception):
    """Stands for any error."""


def test_an_error_ends_the_watch(tmp_path):
    def fail():
        raise Killed

    watch, threads = HangWatch(60), threading.active_count()
    with pytest.raises(Killed):
        trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(Stuck(fail))
    assert threading.active_count() == threads
    assert files(tmp_path) == {}


def test_the_first_line_tells_the_batch_at_any_time(tmp_path):
    seen = []
    path = tmp_path / "hang-rank=0.txt"
    model = Stuck(lambda: seen.append(path.read_text()))
    trainer(tmp_path, callbacks=[HangWatch(60)], max_epochs=1).fit(model)
    assert len(seen[0]) == HEADER
    assert "training batch 2 of epoch 0, step 2" in seen[0]


def test_it_can_be_pickled_while_it_watches(tmp_path):
    copies = []
    watch = HangWatch(60, dirpath=str(tmp_path / "stacks"))
    model = Stuck(lambda: copies.append(pickle.loads(pickle.dumps(watch))))
    trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(model)
    assert (copies[0].timeout_s, copies[0].abort, copies[0].dirpath) == (60, False, str(tmp_path / "stacks"))
    assert copies[0]._watch is None


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        HangWatch(0)
