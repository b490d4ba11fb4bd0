"""Runs that are told to stop, at every place, however they were started; resumed, they end as if nothing had been."""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from callbacks.pace import Pace
from callbacks.requeue import EXIT_CODE, Requeue
from callbacks.stopped_runs import newest_checkpoint, saved_runs
from lit_models import signals
from lit_models.__main__ import main
from lit_models.slurm import Job
from tests.stopping import added
from tests.test_kill import same_state

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")  # the children start with everything imported
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
# Two epochs of four batches, each with a validation of three.
SMALL = [
    "--trainer.max_steps=8",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=3",
    "--trainer.val_check_interval=1.0",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1",
]
PARTS = ["state_dict", "optimizer_states", "lr_schedulers", "ppo", "global_step", "epoch"]


def run(folder, stage, *args):
    """A run of a tiny preset in this process; its exit code."""
    folder.mkdir(exist_ok=True)
    os.environ["LIT_RUNS"] = str(folder)
    try:
        main(["fit", "--config", f"{stage}/tiny.yaml", *args, *QUIET])
    except SystemExit as end:
        return end.code
    return 0


def assert_same_rows(one, two):
    """The same logged values, whatever the order of the columns, times aside."""
    logged = []
    for folder in (one, two):
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        logged.append(
            [
                {
                    name: value
                    for name, value in row.items()
                    if value and not name.startswith(("perf/", "time/")) and not name.endswith("_per_s")
                }
                for row in rows
            ]
        )
    assert logged[0] == logged[1]
    assert len(logged[0]) > 3


def assert_equal(whole, other, stage):
    """The same weights, states, logged values and files."""
    one, two = whole / f"{stage}-tiny", other / f"{stage}-tiny"
    same_state(one / "checkpoints/last.ckpt", two / "checkpoints/last.ckpt", PARTS)
    assert_same_rows(one, two)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LIT_RUNS", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "sft", *SMALL) == 0
    return folder


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "at", "steps"),
    [
        ("start", 1, 1),  # before the first batch: heeded after it
        ("batch", 2, 2),
        ("batch", 4, 4),  # the last batch of an epoch, before its validation
        ("validation", 2, 4),  # within it
        ("validation", 3, 5),  # at its last batch: heeded after the next batch
        ("epoch", 1, 5),
        ("batch", 8, 8),  # the last batch of the run, before its validation
        ("validation", 4, 8),  # within the last validation of the run
    ],
)
def test_a_signal_anywhere_changes_nothing_in_the_end(whole, tmp_path, place, at, steps):
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    name = "SIGTERM" if at % 2 else "SIGUSR1"
    assert run(tmp_path, "sft", *SMALL, *added(tmp_path, "SignalAt", place=place, at=at, name=name)) == EXIT_CODE
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)] == before
    folder = tmp_path / "sft-tiny"
    (saved,) = saved_runs(folder)
    assert torch.load(saved, weights_only=True)["global_step"] == steps
    assert not (folder / "export").exists()  # it is not ready
    assert run(tmp_path, "sft", *SMALL, "--ckpt_path=last") == 0
    assert_equal(whole, tmp_path, "sft")


def test_a_run_that_ends_anyway_ends_normally(whole, tmp_path):
    assert run(tmp_path, "sft", *SMALL, *added(tmp_path, "SignalAt", place="validation", at=6)) == 0
    assert_equal(whole, tmp_path, "sft")


def test_a_run_stopped_at_every_step(whole, tmp_path):
    stop = added(tmp_path, "SignalAt", place="start")
    codes = [run(tmp_path, "sft", *SMALL, *stop, "--ckpt_path=last") for _ in range(4)]
    assert codes == [EXIT_CODE] * 4
    assert [path.name for path in saved_runs(tmp_path / "sft-tiny")] == ["hpc_ckpt_4.ckpt"]
    assert run(tmp_path, "sft", *SMALL, "--ckpt_path=last") == 0
    assert_equal(whole, tmp_path, "sft")


def test_epochs_with_accumulation_workers_and_validation_in_between(tmp_path):
    options = [
        "--trainer.max_steps=-1",
        "--trainer.max_epochs=2",
        "--model.lr_scheduler.init_args.total=6",
        "--trainer.limit_train_batches=5",
        "--trainer.limit_val_batches=3",
        "--trainer.val_check_interval=3",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accumulate_grad_batches=2",
        "--data.num_workers=1",
    ]
    assert run(tmp_path / "whole", "sft", *options) == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for place, at, steps in (("batch", 1, 1), ("validation", 1, 2), ("batch", 1, 4)):
        stop = added(broken, "SignalAt", place=place, at=at)
        assert run(broken, "sft", *options, *stop, "--ckpt_path=last") == EXIT_CODE
        (saved,) = saved_runs(broken / "sft-tiny")
        assert torch.load(saved, weights_only=True)["global_step"] == steps  # never between two steps
    assert run(broken, "sft", *options, "--ckpt_path=last") == 0
    assert_equal(tmp_path / "whole", broken, "sft")


def test_manual_optimization_with_generation_in_validation(tmp_path):
    options = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=2"]
    assert run(tmp_path / "whole", "ppo", *options) == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for place, at in (("batch", 2), ("validation", 1)):
        stop = added(broken, "SignalAt", place=place, at=at)
        assert run(broken, "ppo", *options, *stop, "--ckpt_path=last") == EXIT_CODE
    assert run(broken, "ppo", *options, "--ckpt_path=last") == 0
    assert_equal(tmp_path / "whole", broken, "ppo")


def test_tensorboard_goes_on_in_the_same_folder(tmp_path):
    logger = ["--config", "logger/tensorboard.yaml"]
    assert run(tmp_path, "sft", *SMALL, *logger, *added(tmp_path, "SignalAt", place="batch", at=3)) == EXIT_CODE
    assert run(tmp_path, "sft", *SMALL, *logger, "--ckpt_path=last") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


def test_evaluation_stops_and_is_not_saved(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    last = whole / "sft-tiny/checkpoints/last.ckpt"
    stop = added(tmp_path, "SignalAt", place="test")
    with pytest.raises(SystemExit) as end:
        main(["test", "--config", "sft/tiny.yaml", *stop, f"--ckpt_path={last}", *QUIET])
    assert end.value.code == EXIT_CODE
    assert not list(tmp_path.rglob("*.ckpt"))


def test_without_the_command_line(tmp_path):
    from callbacks import RNGState
    from tests.callbacks.tiny import Tiny, trainer
    from tests.stopping import SignalAt

    def fit(*extra, ckpt_path=None):
        model = Tiny()
        parts = [Requeue(), RNGState(), *extra]
        trainer(tmp_path, callbacks=parts).fit(model, ckpt_path=ckpt_path, weights_only=True)
        return model

    before = signal.getsignal(signal.SIGUSR1)
    torch.manual_seed(0)
    whole = fit()
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match=str(EXIT_CODE)):
        fit(SignalAt("batch", 3))
    assert signal.getsignal(signal.SIGUSR1) == before
    resumed = fit(ckpt_path="hpc")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert saved_runs(tmp_path) == []


def test_on_a_file_system_of_another_kind():
    import fsspec

    from callbacks import RNGState
    from tests.callbacks.tiny import Tiny, trainer
    from tests.stopping import SignalAt

    memory = fsspec.filesystem("memory")
    with pytest.raises(SystemExit, match=str(EXIT_CODE)):
        trainer("memory://run", callbacks=[Requeue(), RNGState(), SignalAt("batch", 3)]).fit(Tiny())
    assert memory.find("/run") == ["/run/hpc_ckpt_1.ckpt"]
    again = trainer("memory://run", callbacks=[Requeue(), RNGState()])
    assert newest_checkpoint(again) == "memory://run/hpc_ckpt_1.ckpt"
    again.fit(Tiny(), ckpt_path=newest_checkpoint(again), weights_only=True)
    assert again.global_step == 12
    assert memory.find("/run") == []


def test_last_is_whatever_was_saved_last(tmp_path):
    from types import SimpleNamespace

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    run = SimpleNamespace(default_root_dir=tmp_path, checkpoint_callbacks=[SimpleNamespace(dirpath=str(folder))])
    assert newest_checkpoint(run) is None
    for number, name in enumerate(["hpc_ckpt_9.ckpt", "hpc_ckpt_10.ckpt", "hpc_ckpt_x.ckpt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    assert newest_checkpoint(run) == tmp_path / "hpc_ckpt_10.ckpt"
    (folder / "last.ckpt").touch()
    os.utime(folder / "last.ckpt", (0, 0))
    assert newest_checkpoint(run) == tmp_path / "hpc_ckpt_10.ckpt"
    os.utime(folder / "last.ckpt", (5, 5))
    assert newest_checkpoint(run) is None


# -- the time limit ----------------------------------------------------------------------------------------------------

FAKE_SCONTROL = """#!{python}
import json, sys, time
folder = "{folder}"
with open(folder + "/calls", "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[1] == "requeue":
    sys.exit("slurm_requeue error: not allowed" if "{state}" == "REFUSED" else 0)
with open(folder + "/ends") as file:
    ends = json.load(file)
end = ends.pop(0) if len(ends) > 1 else ends[0]
with open(folder + "/ends", "w") as file:
    json.dump(ends, file)
clock = lambda seconds: time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
state = "RUNNING" if "{state}" == "REFUSED" else "{state}"
print("JobId=7 JobState=" + state, "StartTime=" + clock(time.time() - 3600), "EndTime=" + clock(time.time() + end))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Function that pretends to be job 7, with an end in so many seconds at each question; gives the list of calls."""

    def make(*ends, state="RUNNING"):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "ends").write_text(json.dumps(ends))
        program = folder / "scontrol"
        program.write_text(FAKE_SCONTROL.format(python=sys.executable, folder=folder, state=state))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return lambda: (folder / "calls").read_text().splitlines()

    return make


SHOW = "show job --oneliner 7"


def test_a_job_about_to_end_saves_itself_and_is_requeued(job, whole, tmp_path, monkeypatch):
    calls = job(60)
    assert run(tmp_path, "sft", *SMALL) == EXIT_CODE
    assert calls() == [SHOW, SHOW, SHOW, "requeue 7"]
    monkeypatch.delenv("SLURM_JOB_ID")
    assert run(tmp_path, "sft", *SMALL, "--ckpt_path=last") == 0
    (tmp_path / "bin/calls").unlink()
    assert_equal(whole, tmp_path, "sft")


def test_a_limit_that_was_raised_is_noticed(job, tmp_path):
    calls = job(60, 36000)
    assert run(tmp_path, "sft", *SMALL) == 0
    assert calls() == [SHOW, SHOW]


@pytest.mark.parametrize(
    ("state", "options", "words", "asked"),
    [
        (
            "CANCELLED",
            {},
            "job 7 is not requeued, since SLURM has its state as CANCELLED; go on with",
            False,
        ),
        ("REFUSED", {}, "could not be requeued (slurm_requeue error: not allowed)", True),
        ("RUNNING", {"requeue": False}, "is not requeued, since callbacks.Requeue.requeue is off", False),
        ("RUNNING", {"max_requeues": 2}, "is not requeued, since it was 2 times", False),
    ],
)
def test_a_job_that_is_not_requeued(job, tmp_path, monkeypatch, caplog, state, options, words, asked):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    calls = job(36000, state=state)
    extra = tmp_path / "requeue.yaml"
    entry = json.dumps({"class_path": "callbacks.requeue.Requeue", "init_args": options})
    extra.write_text(f"trainer:\n  callbacks+:\n    - {entry}\n")
    stop = added(tmp_path, "SignalAt", place="batch", at=2)
    with caplog.at_level("INFO"):
        assert run(tmp_path, "sft", *SMALL, "--config", str(extra), *stop) == EXIT_CODE
    assert words in caplog.text
    assert ("requeue 7" in calls()) == asked
    assert len(saved_runs(tmp_path / "sft-tiny")) == 1


def test_the_margin_is_learnt(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    assert pace.margin() == 60 + 2 * 120

    def later(seconds):
        now[0] += seconds

    pace.lap(counts=False)
    later(5)
    pace.lap()  # a batch
    later(2)
    pace.begin_save()
    later(7)
    pace.lap()  # is not counted as a batch
    assert pace.margin() == 60 + 2 * 5 + 2 * 7
    for _ in range(100):
        later(1)
        pace.lap()
    assert pace.margin() == pytest.approx(60 + 2 * 1 + 2 * 7, abs=0.1)


def test_jobs(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert Job.of_process() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert Job.of_process() is None
    monkeypatch.setenv("SLURM_JOB_NAME", "mine")
    assert Job.of_process().id == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")  # the others of its tasks go on
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert Job.of_process().id == "10_3"
    monkeypatch.setenv("PATH", str(tmp_path))  # a container without scontrol
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 100))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 300))
    job = Job.of_process()
    assert not job.ends_within(50)
    assert not job.ends_within(1000)  # never before half of the time is over
    assert not job.half_over()
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 400))
    assert Job.of_process().ends_within(1000)
    assert Job.of_process().half_over()
    assert "could not be requeued" in job.requeue()
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert not Job.of_process().ends_within(1e9)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"margin": -1.0}, "margin"), ({"every_n_batches": 0}, "every_n_batches"), ({"max_requeues": -1}, "max_requeues")],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=f"callbacks.Requeue.{words} must"):
        Requeue(**options)


# -- two processes -----------------------------------------------------------------------------------------------------

STRATEGIES = {
    "ddp": "strategy: ddp",
    "shards": """strategy:
    class_path: lit_models.strategies.FullyShardStrategy
    init_args: {save_distributed_checkpoint: true}""",
}


def strategy(folder, name):
    path = folder / f"{name}.yaml"
    path.write_text(f"trainer:\n  accelerator: cpu\n  devices: 2\n  {STRATEGIES[name]}\n")
    return ["--config", str(path), "--data.batch_size=4"]


def one_rank(rank, port, folder, args):
    """What torchrun starts."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "LIT_RUNS": str(folder),
    }
    sys.stderr = (folder / f"stderr{rank}.txt").open("a")
    main(args)


def two_ranks(folder, port, stage, *args):
    """A run in two processes; their exit codes."""
    folder.mkdir(exist_ok=True)
    command = ["fit", "--config", f"{stage}/tiny.yaml", *args, *QUIET]
    processes = [FORK.Process(target=one_rank, args=(rank, port, folder, command)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "the run hangs"
    if 1 in codes:
        raise AssertionError("\n".join(path.read_text()[-3000:] for path in folder.glob("stderr*.txt")))
    return codes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("ddp", "sft"), ("shards", "ppo")])
def test_one_of_two_processes_gets_the_signal(name, stage, tmp_path, free_port):
    options = [*SMALL, *strategy(tmp_path, name)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert two_ranks(whole, free_port, stage, *options) == [0, 0]
    broken.mkdir()
    for place, at, rank in (("batch", 2, 1), ("validation", 1, 0)):
        stop = added(broken, "SignalAt", place=place, at=at, rank=rank)
        codes = two_ranks(broken, free_port, stage, *options, *stop, "--ckpt_path=last")
        assert codes == [EXIT_CODE, 0]
        (saved,) = saved_runs(broken / f"{stage}-tiny")
        assert saved.is_dir() == (name == "shards")
    assert two_ranks(broken, free_port, stage, *options, "--ckpt_path=last") == [0, 0]
    files = [folder / f"{stage}-tiny/checkpoints/last.ckpt" for folder in (whole, broken)]
    if name == "shards":
        from lit_models.shards import merge_shards

        files = [merge_shards(file, tmp_path / f"{number}.ckpt") for number, file in enumerate(files)]
    same_state(*files, PARTS)
    assert_same_rows(*(folder / f"{stage}-tiny" for folder in (whole, broken)))


@pytest.mark.slow
def test_the_launcher_of_lightning_lets_all_processes_save(tmp_path, free_port):
    """`lit-models fit` with two devices starts the second process itself; a signal goes to the first one only."""
    options = [*SMALL, *strategy(tmp_path, "ddp")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert two_ranks(whole, free_port, "sft", *options) == [0, 0]
    broken.mkdir()
    waits = broken / "waits"
    command = [sys.executable, "-m", "lit_models", "fit", "--config", "sft/tiny.yaml", *options, *QUIET]
    wait = added(broken, "WaitAt", place="batch", at=3, file=str(waits))
    environment = os.environ | {"LIT_RUNS": str(broken)}
    process = subprocess.Popen([*command, *wait], env=environment, stderr=subprocess.PIPE, text=True)
    while not waits.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, errors
    assert "stopped by SIGTERM after 3 steps" in errors
    assert two_ranks(broken, free_port, "sft", *options, "--ckpt_path=last") == [0, 0]
    assert_equal(whole, broken, "sft")


@pytest.mark.slow
def test_the_parent_of_forked_processes_passes_signals_on(tmp_path):
    fork = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_fork", "--data.batch_size=4"]
    options = [*SMALL, *fork, "--trainer.max_steps=4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, "sft", *options) == 0
    broken.mkdir()
    stop = added(broken, "SignalAt", place="batch", at=2, rank=1, name="SIGTERM", parent=True)
    assert run(broken, "sft", *options, *stop) == EXIT_CODE
    assert [path.name for path in saved_runs(broken / "sft-tiny")] == ["hpc_ckpt_1.ckpt"]
    assert run(broken, "sft", *options, "--ckpt_path=last") == 0
    assert_equal(whole, broken, "sft")


# -- signals -----------------------------------------------------------------------------------------------------------


def python(code):
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see when handlers are there")
def test_a_signal_before_anything_is_imported_is_heeded(whole, tmp_path):
    command = [sys.executable, "-m", "lit_models", "fit", "--config", "sft/tiny.yaml", *SMALL, *QUIET]
    process = subprocess.Popen(command, env=os.environ | {"LIT_RUNS": str(tmp_path)}, stderr=subprocess.PIPE, text=True)

    def caught():
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)

    while not caught() & 1 << (signal.SIGUSR1 - 1):
        assert process.poll() is None
        time.sleep(0.001)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == EXIT_CODE, errors
    assert "stopped by SIGUSR1 after 1 steps" in errors
    assert run(tmp_path, "sft", *SMALL, "--ckpt_path=last") == 0
    assert_equal(whole, tmp_path, "sft")


def test_importing_installs_nothing():
    code = "import signal, lit_models, lit_models.signals; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    assert python(code).communicate()[0] == "True\n"


def test_noted_signals_are_forgotten_afterwards():
    with signals.noted():
        assert signals.received() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received() == "SIGUSR1"
        with signals.noted():  # listens already
            assert signals.received() == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher, too
        assert signals.received() == "SIGUSR1"
    assert signals.received() is None
    assert not signals.listening()


def test_handlers_belong_to_the_main_thread():
    begun = []
    thread = threading.Thread(target=lambda: begun.append(signals.install()))
    thread.start()
    thread.join()
    assert begun == [False]


def test_a_second_sigterm_ends_the_process(monkeypatch):
    code = (
        "import sys, time; from lit_models import signals\n"
        "with signals.noted():\n"
        "    print('ready', flush=True)\n"
        "    while signals.received() is None: time.sleep(0.01)\n"
        "    print('noted', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "noted\n"
    time.sleep(signals.REPEAT_S + 0.2)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def forked_child(path):
    path.touch()
    time.sleep(60)


def test_forked_children_obey(tmp_path):
    with signals.noted():
        child = FORK.Process(target=forked_child, args=(tmp_path / "started",))
        child.start()
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGUSR1)  # a scheduler signals all processes of a job: no reason to die
        time.sleep(0.05)
        assert child.is_alive()
        child.terminate()  # a pool ends its workers so
        child.join(30)
        assert child.exitcode == -signal.SIGTERM


def test_forked_processes_that_do_the_work_listen_at_once(tmp_path):
    with signals.noted(), signals.relayed():
        os.kill(os.getpid(), signal.SIGUSR1)  # before they are there
        heard = FORK.SimpleQueue()
        child = FORK.Process(target=lambda: heard.put((signals.listening(), signals.received())))
        child.start()
        assert heard.get() == (True, "SIGUSR1")
        child.join()


CHILD = """
import sys, time
from lit_models import signals
with signals.noted():
    print("ready", flush=True)
    while signals.received() is None:
        time.sleep(0.01)
    open(sys.argv[1], "w").write(signals.received())
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
child.stdout.readline()
"""


@pytest.mark.parametrize("started_by", ["torchrun", "a shell"])
def test_the_end_of_torchrun_is_a_reason_to_stop(started_by, tmp_path, monkeypatch):
    if started_by == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    said = tmp_path / "said"
    process = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(said)], start_new_session=True)
    try:
        assert process.wait(60) == 0
        if started_by == "torchrun":
            deadline = time.monotonic() + 30
            while not said.exists() or not said.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert said.read_text() == "the end of torchrun"
        else:
            time.sleep(0.3)
            assert not said.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


GROUP = """
import os, signal, time
import torch
from torch.utils.data import DataLoader
from lit_models import signals

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, row):
        time.sleep(0.05)
        return row

with signals.noted():
    loader = DataLoader(Rows(), num_workers=2, worker_init_fn=signals.shield_worker)
    for number, row in enumerate(loader):
        print(int(row), flush=True)
        while number == 1 and signals.received() is None:
            time.sleep(0.01)
    print(signals.received())
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_workers_survive_a_signal_to_the_whole_group():
    process = python(GROUP)
    lines = [process.stdout.readline() for _ in range(2)]
    os.killpg(process.pid, signal.SIGUSR1)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line.strip() for line in [*lines, *output.splitlines()]] == [*"012345", "SIGUSR1"]
