import csv
import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from torch import multiprocessing, nn

from callbacks import AppendingCSVLogger, Throughput
from callbacks import throughput as module_under_test
from callbacks.peaks import KINDS, peak_tflops
from callbacks.throughput import CudaClock, HostClock, compute_kind, peak_memory
from lit_models.nn.clipping import total_norm
from tests.callbacks.tiny import Tiny, trainer

KEYS = {f"perf/{name}_s" for name in ("data", "step", "other", "forward", "backward", "optimizer")}
KEYS |= {"perf/tokens_per_s", "perf/memory_gib", "perf/grad_norm"}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class FakeTime:
    """Seconds that pass only when something says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(module_under_test, "time", fake)
    return fake


class Timed(Tiny):
    """A module whose parts take known times."""

    def __init__(self, clock, data=0.0, forward=0.0, backward=0.0, optimizer=0.0, validation=0.0):
        super().__init__()
        self.clock = clock
        self.times = {"data": data, "forward": forward, "backward": backward, "optimizer": optimizer}
        self.times["validation"] = validation

    def takes(self, part):
        self.clock.passes(self.times[part])

    def training_step(self, batch, batch_idx):
        self.takes("forward")
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(lambda _: self.takes("backward"))
        return loss

    def validation_step(self, batch, batch_idx):
        self.takes("validation")

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.takes("optimizer"))
        return optimizer

    def train_dataloader(self):
        loader = super().train_dataloader()
        collate = loader.collate_fn

        def slow(rows):
            self.takes("data")
            return collate(rows)

        loader.collate_fn = slow
        return loader


class Rows(Callback):
    """What was there after each batch in which something was logged."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("perf/")}
        if found and (not self.rows or found != self.rows[-1]):
            self.rows.append(found)


class Slow(Callback):
    """A callback that takes its time after each batch, and a checkpoint that does."""

    def __init__(self, clock, batch=0.0, checkpoint=0.0):
        self.clock, self.batch, self.checkpoint = clock, batch, checkpoint

    def on_train_batch_end(self, *_):
        self.clock.passes(self.batch)

    def on_save_checkpoint(self, *_):
        self.clock.passes(self.checkpoint)


def fit(folder, model, *callbacks, window=1, watch=None, **options):
    rows = Rows()
    watch = watch or Throughput(window=window)
    trainer(folder, callbacks=[watch, *callbacks, rows], **({"max_epochs": 1} | options)).fit(model)
    return rows.rows


# -- times -------------------------------------------------------------------------------------------------------------


def test_all_keys_are_logged_and_finite(tmp_path):
    row = fit(tmp_path, Tiny(), window=4)[-1]
    assert row.keys() == KEYS
    assert all(0 <= value < 1e9 for value in row.values())
    assert row["perf/step_s"] > 0
    assert row["perf/tokens_per_s"] == pytest.approx(100 / (row["perf/step_s"] + row["perf/data_s"]), rel=1e-3)


def test_every_part_is_counted_where_it_belongs(tmp_path, clock):
    model = Timed(clock, data=1, forward=2, backward=3, optimizer=4, validation=100)
    slow = Slow(clock, batch=5, checkpoint=1000)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    options = {"enable_checkpointing": True, "limit_train_batches": 4, "val_check_interval": 3, "limit_val_batches": 1}
    rows = fit(tmp_path, model, slow, saver, window=4, num_sanity_val_steps=0, **options)
    expected = {"data": 1, "step": 9, "forward": 2, "backward": 3, "optimizer": 4}
    assert len(rows) == 4
    for number, row in enumerate(rows, 1):
        assert {name: row[f"perf/{name}_s"] for name in expected} == pytest.approx(expected)
        assert row["perf/tokens_per_s"] == pytest.approx(10)  # of 100 tokens in 10 s
        outside = 1005 * (number - 1) + (100 if number == 4 else 0)
        assert row["perf/other_s"] == pytest.approx(outside / number)


def test_callbacks_before_it_take_no_time_of_the_step(tmp_path, clock):
    rows = Rows()
    callbacks = [Slow(clock, batch=50), Throughput(window=1), rows]
    trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Timed(clock, forward=1))
    assert {row["perf/step_s"] for row in rows.rows} == {1.0}
    assert rows.rows[-1]["perf/other_s"] == 50


def test_the_optimizer_is_spread_over_accumulated_batches(tmp_path, clock):
    model = Timed(clock, forward=1, backward=1, optimizer=4)
    rows = fit(tmp_path, model, Slow(clock, batch=0.5), window=2, accumulate_grad_batches=2)
    assert len(rows) == 3  # one for each optimizer step
    for row in rows:
        assert (row["perf/forward_s"], row["perf/backward_s"], row["perf/optimizer_s"]) == (1.0, 1.0, 2.0)


def test_a_row_averages_over_all_batches_since_the_one_before(tmp_path, clock):
    model = Timed(clock)
    seconds = itertools.count(1)
    model.takes = lambda part: clock.passes(next(seconds) if part == "forward" else 0)
    logger = AppendingCSVLogger(str(tmp_path))
    fit(tmp_path, model, logger=logger, log_every_n_steps=3)
    table = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    found = [float(row["perf/step_s"]) for row in table if row["perf/step_s"]]
    assert found == [2.0, 5.0]  # of 1, 2, 3 and of 4, 5, 6


def test_nothing_is_logged_where_the_trainer_logs_nothing(tmp_path):
    assert fit(tmp_path, Tiny(), log_every_n_steps=0) == []
    assert fit(tmp_path, Tiny(), log_every_n_steps=7) == []


class ByHand(Timed):
    """Optimizes by itself, and measures parts."""

    automatic_optimization = False

    def __init__(self, clock, norm=None):
        super().__init__(clock, forward=1, backward=2, optimizer=3)
        self.automatic_optimization = False
        self.norm = norm

    def training_step(self, batch, batch_idx):
        self.clock.passes(20)
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def step_stats(self):
        return {"tokens": 100.0, "generate_s": 20.0} | ({} if self.norm is None else {"grad_norm": self.norm})


def test_a_module_that_optimizes_by_itself_tells_its_own_parts(tmp_path, clock):
    row = fit(tmp_path, ByHand(clock))[-1]
    expected = {"step": 32, "generate": 20, "forward": 2, "backward": 4, "optimizer": 6}
    assert {name: row[f"perf/{name}_s"] for name in expected} == pytest.approx(expected)
    assert row["perf/grad_norm"] > 0
    assert fit(tmp_path, ByHand(clock, norm=7.0))[-1]["perf/grad_norm"] == 7


def test_a_run_resumed_within_an_epoch_did_not_wait_since_the_machine_started(tmp_path, clock):
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=3).fit(Tiny())
    rows = Rows()
    resumed = trainer(tmp_path, callbacks=[Throughput(window=1), rows], max_steps=4)
    resumed.fit(Timed(clock, data=1, forward=2), ckpt_path=tmp_path / "two.ckpt")
    assert [row["perf/data_s"] for row in rows.rows[-1:]] == [1.0]


class Counting(Tiny):
    """Counts other things than tokens."""

    def step_stats(self):
        return {"patches": torch.tensor(12), "examples": 3}


def test_everything_a_module_counts_becomes_a_rate(tmp_path, clock):
    model = Timed(clock, forward=4)
    model.step_stats = Counting().step_stats
    row = fit(tmp_path, model)[-1]
    assert (row["perf/patches_per_s"], row["perf/examples_per_s"]) == (3.0, 0.75)
    assert "perf/tokens_per_s" not in row


def test_a_module_that_counts_nothing_still_has_its_times(tmp_path):
    model = Tiny()
    model.step_stats = dict
    assert fit(tmp_path, model)[-1].keys() == KEYS - {"perf/tokens_per_s"}


# -- gradients ---------------------------------------------------------------------------------------------------------


class Scaled(Tiny):
    """Finishes its gradients just before the optimizer step, and keeps their norm."""

    norms = ()

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.mul_(3)
        self.norms = [*self.norms, torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item()]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_norm_is_that_of_finished_gradients_before_clipping(tmp_path, accumulated):
    model = Scaled()
    rows = fit(tmp_path, model, accumulate_grad_batches=accumulated, gradient_clip_val=1e-3, limit_val_batches=0)
    assert [row["perf/grad_norm"] for row in rows] == pytest.approx(model.norms)
    assert max(model.norms) > 0.01
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-2)


def test_the_norm_is_left_out_where_it_is_not_wanted(tmp_path):
    row = fit(tmp_path, Tiny(), watch=Throughput(grad_norm=False))[-1]
    assert row.keys() == KEYS - {"perf/grad_norm"}


def test_weights_are_those_of_a_run_that_is_not_watched(tmp_path):
    weights = []
    for callbacks in ([], [Throughput(peak_tflops=1.0)]):
        torch.manual_seed(0)
        model = Tiny()
        options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
        trainer(tmp_path, callbacks=callbacks, **options).fit(model)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_norms_of_nothing_and_of_several_types():
    assert total_norm([]) == 0
    parts = [torch.full((4,), 2.0), torch.full((3, 3), 1.0, dtype=torch.bfloat16)]
    assert total_norm(parts) == pytest.approx(5.0)


def sharded_norms(rank, folder):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    network, plain = nn.Linear(5, 3), nn.Parameter(torch.ones(4))
    inputs = torch.randn(2, 5)
    network(inputs[rank : rank + 1]).sum().backward()
    plain.grad = torch.full((4,), 2.0)
    mean = [parameter.grad.clone() for parameter in network.parameters()]
    for grad in mean:
        torch.distributed.all_reduce(grad)
        grad /= 2
    network.zero_grad()
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    network(inputs[rank : rank + 1]).sum().backward()
    found = total_norm([*(parameter.grad for parameter in network.parameters()), plain.grad])
    torch.testing.assert_close(found, total_norm([*mean, plain.grad]))
    (folder / f"{rank}").write_text(f"{float(found)} {float(total_norm([plain.grad]))}")
    destroy_process_group()


def test_norms_of_sharded_and_of_whole_gradients(tmp_path):
    multiprocessing.start_processes(sharded_norms, (tmp_path,), nprocs=2, start_method="fork")
    first, second = ((tmp_path / name).read_text().split() for name in "01")
    assert first == second
    assert float(first[0]) > float(first[1]) == 4.0


# -- several processes -------------------------------------------------------------------------------------------------


class Unequal(Tiny):
    """Each process has its own number of tokens, time, and operations."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.passes(2.0 + 2.0 * self.global_rank)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        loader = super().train_dataloader()
        collate = loader.collate_fn

        def slow(rows):
            self.clock.passes(1.0 * self.global_rank)
            return collate(rows)

        loader.collate_fn = slow
        return loader

    def step_stats(self):
        return {"tokens": 100.0 + 200.0 * self.global_rank}

    def step_flops(self):
        return 7e12 * (1 + self.global_rank)


def test_processes_are_taken_together_and_log_once(tmp_path, clock):
    logger = AppendingCSVLogger(str(tmp_path))
    watch = Throughput(window=1, peak_tflops=1.5)
    run = trainer(tmp_path, callbacks=[watch], logger=logger, devices=2, strategy="ddp_fork", max_epochs=1)
    run.fit(Unequal(clock))
    table = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    row = {key: float(value) for key, value in table[-1].items() if key.startswith("perf/")}
    assert [row["step"] for row in table] == ["0", "1", "2"]  # one for each step of both processes
    assert (row["perf/step_s"], row["perf/data_s"], row["perf/data_max_s"]) == (3.0, 0.5, 1.0)
    assert row["perf/tokens_per_s"] == pytest.approx(400 / 3.5)
    assert row["perf/mfu"] == pytest.approx(21 / (3.5 * 2 * 1.5))
    assert row["perf/grad_norm"] > 0


# -- use of the device -------------------------------------------------------------------------------------------------


def test_the_use_of_a_device_is_what_the_model_needs_over_what_it_could_do(tmp_path, clock):
    model = Timed(clock, data=1, forward=3)
    model.step_flops = lambda: torch.tensor(6e12)
    assert "perf/mfu" not in fit(tmp_path, model)[-1]
    assert fit(tmp_path, model, watch=Throughput(peak_tflops=5.0))[-1]["perf/mfu"] == pytest.approx(6 / (4 * 5))


@pytest.mark.parametrize("flops", [None, "missing"])
def test_a_module_that_does_not_know_what_it_needs_logs_no_use(tmp_path, flops):
    model = Tiny()
    if flops is None:
        model.step_flops = lambda: None
    assert "perf/mfu" not in fit(tmp_path, model, watch=Throughput(peak_tflops=5.0))[-1]


@pytest.mark.parametrize(
    ("device", "kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "tf32", 156.0),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "tf32", 183.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", 80.0),
        ("AMD Instinct MI250X/MI250", "bfloat16", 191.5),
        ("NVIDIA A100-SXM4-80GB", "float64", None),
        ("NVIDIA RTX A6000", "bfloat16", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
        ("Tesla V100-PCIE-16GB", "float16", 112.0),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7),
        ("Tesla T4", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        ("NVIDIA A1000", "bfloat16", None),
        ("Riva 128", "float32", None),
    ],
)
def test_known_devices(device, kind, peak):
    assert peak_tflops(device, kind) == peak


def test_peaks_rise_with_shorter_types():
    for _, peaks in module_under_test.peak_tflops.__globals__["_PEAKS"]:
        known = [peak for peak in peaks if peak]
        assert known == sorted(known)
    assert len(KINDS) == 4


def kind_of(precision, dtype=torch.float32, mesh=None, param_dtype="float32"):
    model = Tiny().to(dtype)
    stand_in = SimpleNamespace(
        parameters=model.parameters, device_mesh=mesh, sharding=SimpleNamespace(param_dtype=param_dtype)
    )
    return compute_kind(SimpleNamespace(precision=precision), stand_in)


def test_the_type_that_is_computed_in():
    assert kind_of("bf16-mixed") == kind_of("bf16-true") == kind_of("32-true", torch.bfloat16) == "bfloat16"
    assert kind_of("16-mixed") == kind_of("32-true", torch.float16) == "float16"
    assert kind_of("32-true") == kind_of("32-true", param_dtype="bfloat16") == "float32"
    assert kind_of("64-true", torch.float64) == "float64"
    assert kind_of("32-true", mesh=object(), param_dtype="bfloat16") == "bfloat16"
    torch.set_float32_matmul_precision("high")
    try:
        assert kind_of("32-true") == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_unknown_devices_are_told_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Riva 128")
    model = SimpleNamespace(
        device=torch.device("cuda"), device_mesh=None, parameters=Tiny().parameters, step_flops=lambda: 1.0
    )
    with pytest.warns(UserWarning, match="peak_tflops: what a Riva 128 can do in float32 is not known"):
        assert Throughput()._find_peak(SimpleNamespace(precision="32-true"), model) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")
    assert Throughput()._find_peak(SimpleNamespace(precision="bf16-mixed"), model) == 312
    assert Throughput(peak_tflops=9.0)._find_peak(SimpleNamespace(precision="bf16-mixed"), model) == 9


def test_peak_memory_is_that_of_a_python_process():
    assert 0.01 < peak_memory() < 200
    assert peak_memory(torch.device("cpu")) == pytest.approx(peak_memory(), rel=0.1)


class FakeEvent:
    """An event of a device that is always one second behind the last one."""

    log: tuple[str, ...] = ()
    numbers = itertools.count()

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.number = next(FakeEvent.numbers)
        FakeEvent.log += ("record",)

    def synchronize(self):
        FakeEvent.log += ("wait",)

    def elapsed_time(self, end):
        return 1000.0 * (end.number - self.number)


def test_a_device_is_waited_for_once_per_row(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(module_under_test, "HostClock", CudaClock)
    FakeEvent.log = ()
    row = fit(tmp_path, Tiny(), log_every_n_steps=3)[-1]
    batch = ["record"] * 6  # fetched, begun, two of the backward pass and two of the optimizer step
    assert list(FakeEvent.log[:37]) == [*batch * 3, "wait", *batch * 3]
    assert (row["perf/data_s"], row["perf/step_s"], row["perf/backward_s"], row["perf/optimizer_s"]) == (1, 4, 1, 1)


@NEEDS_GPU
def test_times_and_memory_of_a_gpu(tmp_path):
    row = fit(tmp_path, Tiny(), accelerator="gpu", window=4)[-1]
    assert row["perf/step_s"] > 0
    assert 0 < row["perf/memory_gib"] < 1


@NEEDS_GPU
def test_clocks_of_host_and_gpu_agree():
    torch.cuda._sleep(10**6)  # the first one takes longer
    torch.cuda.synchronize()
    spans = []
    for clock in (HostClock(), CudaClock()):
        begin = clock.mark()
        torch.cuda._sleep(10**9)
        if isinstance(clock, HostClock):
            torch.cuda.synchronize()
        end = clock.mark()
        clock.settle(end)
        spans.append(clock.seconds(begin, end))
    assert spans[0] == pytest.approx(spans[1], rel=0.1)


# -- manners -----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(tmp_path):
    model, watch, profiler = Tiny(), Throughput(), SimpleProfiler()
    run = trainer(tmp_path, callbacks=[watch], profiler=profiler, max_epochs=1)
    run.fit(model)
    assert "start" not in vars(profiler)
    assert "[_TrainingEpochLoop].train_dataloader_next" in profiler.recorded_durations
    assert "configure_gradient_clipping" not in vars(model)
    assert not run.optimizers[0]._optimizer_step_post_hooks
    assert watch.state_dict() == {}


class Broken(Tiny):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


def test_nothing_is_left_behind_by_an_error(tmp_path):
    model, profiler = Broken(), SimpleProfiler()
    run = trainer(tmp_path, callbacks=[Throughput()], profiler=profiler, max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(model)
    assert "start" not in vars(profiler)
    assert "configure_gradient_clipping" not in vars(model)


@pytest.mark.parametrize("options", [{"window": 0}, {"peak_tflops": 0.0}, {"peak_tflops": -1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"callbacks.Throughput.{next(iter(options))} must be"):
        Throughput(**options)
