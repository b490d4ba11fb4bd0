"""Precisions of the Trainer: what is rounded to 16 bits, and what never is; compiled networks."""

from dataclasses import dataclass, replace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from torch import nn

from callbacks import EMA, AtomicCheckpointIO
from lit_models.nn.casting import cast_inputs, cast_weights
from lit_models.nn.clipping import clip_gradients, total_norm
from lit_models.nn.sharding import Sharding
from lit_models.ppo.states import StateRecorder
from tests import sharding_cases as tiny
from tests.sharding_cases import together

METHODS = ["sft", "sft_lora", "reward", "ppo", "ppo_lora", "pixel", "mae", "task", "influence", "waveform"]
EXACT = {"icm", "ema"}  # networks that stay in float32
FLOATS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.fixture(scope="module")
def every_case(tiny_tokenizer, tiny_lm):
    return tiny.cases(str(tiny_tokenizer), str(tiny_lm))


@pytest.fixture(scope="module")
def exact(every_case, tmp_path_factory):
    """Each case in float32."""
    folder = tmp_path_factory.mktemp("exact")
    return {name: every_case[name].fit(folder / name, precision="32-true", epochs=1)[1] for name in METHODS}


class Watch(L.Callback):
    """What batches and new tensors are, and what the average was when training began."""

    def on_train_start(self, trainer, module):
        self.average = [value.clone() for value in module.ema.parameters()]

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def on_before_backward(self, trainer, module, loss):
        self.default, self.loss = torch.zeros(()).dtype, loss.dtype


def check_types(module, dtype, method):
    for name, parameter in module.named_parameters():
        is_exact = name.split(".")[0] in EXACT or method == "influence" or ".time_features." in name
        assert parameter.dtype == (torch.float32 if is_exact else dtype), name


def losses(run):
    names = ("train/loss", "policy/loss", "value/loss", "icm/loss", "train/penalty")
    return [values[name] for values in run["values"] for name in names if name in values]


# -- weights of another type -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "precision"),
    [(method, "bf16-true") for method in METHODS] + [(method, "64-true") for method in ("ppo", "mae", "influence")],
)
def test_only_weights_are_of_another_type(method, precision, every_case, exact, tmp_path):
    watch = Watch()
    case = replace(every_case[method], more=[watch])
    module, run = case.fit(tmp_path, epochs=1, precision=precision)
    check_types(module, FLOATS[precision], method)
    assert all(bool(value.isfinite().all()) for value in module.parameters())
    average = list(module.ema.parameters())
    assert any(not torch.equal(before, after) for before, after in zip(watch.average, average, strict=True))
    assert (watch.default, watch.loss) == (torch.float32, torch.float32)
    for name, value in watch.batch.items():  # neither cast nor rounded
        expected = case.batches[-1][name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
    # Actions of a policy may differ after the first update.
    count = len(losses(run)) // len(run["values"]) if method.startswith("ppo") else None
    tolerance = {"bf16-true": {"rel": 2e-2, "abs": 2e-3}, "64-true": {"rel": 1e-5, "abs": 1e-6}}[precision]
    assert losses(run)[:count] == pytest.approx(losses(exact[method])[:count], **tolerance)
    if method == "influence":
        assert losses(run) == losses(exact[method])
    module.export_pretrained(tmp_path / "export")


@pytest.mark.parametrize("method", ["sft", "ppo", "waveform"])
def test_weights_in_16_bits_resume_to_the_bit(method, every_case, tmp_path):
    case = every_case[method]
    _, whole = case.fit(tmp_path / "whole", precision="bf16-true")
    _, resumed = case.fit(tmp_path / "more", precision="bf16-true", ckpt_path=tmp_path / "whole/epoch=0.ckpt", seed=8)
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name


def test_simulators_compute_in_float32_under_mixed_precision(every_case, exact, tmp_path):
    _, run = every_case["influence"].fit(tmp_path, epochs=1, precision="bf16-mixed")
    assert run["values"] == exact["influence"]["values"]
    assert run["norms"] == exact["influence"]["norms"]


def test_float16_weights_are_for_evaluation_only(every_case, tmp_path):
    case = every_case["sft"]
    with pytest.raises(ValueError, match=r"trainer\.precision: 16-true .* take bf16-true"):
        case.fit(tmp_path, precision="16-true")
    module = case.make(Sharding())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(precision="16-true", **quiet)
    (metrics,) = trainer.validate(module, case.loader(), verbose=False)
    assert {value.dtype for value in module.parameters()} == {torch.float16}
    assert metrics["val/loss"] == pytest.approx(5.7, abs=0.1)
    assert type(trainer.precision_plugin) is HalfPrecision  # as it was, for modules that rely on it


def test_a_module_is_trained_on_in_another_precision(every_case, tmp_path):
    case = every_case["pixel_images"]
    module = case.make(Sharding())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"max_epochs": 1, "enable_checkpointing": False}
    L.Trainer(precision="32-true", **quiet).fit(module, case.loader())
    L.Trainer(precision="bf16-true", **quiet).fit(module, case.loader())
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    L.Trainer(precision="bf16-true", callbacks=[EMA(0.5)], **quiet).fit(module, case.loader())
    assert {value.dtype for value in module.ema.parameters()} == {torch.float32}
    output = module.ema(**tiny.strips(2, 0))  # which does not cast as its model does
    assert output.pixel_pred.dtype == torch.float32
    L.Trainer(precision="bf16-mixed", **quiet).fit(module, case.loader())


def test_float16_with_scaled_losses(every_case, exact, tmp_path):
    """The scaler of GPUs, on the CPU."""
    for method in ("sft", "pixel", "waveform"):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler), AtomicCheckpointIO()]
        _, run = every_case[method].fit(tmp_path / method, epochs=1, plugins=plugins)
        assert losses(run) == pytest.approx(losses(exact[method]), rel=1e-3)
        assert run["norms"] == pytest.approx(exact[method]["norms"], rel=1e-2)
    with pytest.raises(ValueError, match=r"trainer\.precision: PPO .* use bf16-mixed"):
        every_case["ppo"].fit(tmp_path / "ppo", plugins=plugins)


# -- two processes -----------------------------------------------------------------------------------------------------

SHARDED = ["sft", "ppo", "influence", "waveform"]


def gradients():
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(size, generator=generator)).bfloat16() for size in ((7, 5), (3,), (1, 4))]


def with_gradient(value):
    parameter = nn.Parameter(torch.zeros_like(value))
    parameter.grad = value
    return parameter


class Clipped(L.Callback):
    """Norms of clipped gradients."""

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if found:
            self.norms.append(float(total_norm(found)))


def test_sharded_weights_in_16_bits(every_case, exact, tmp_path):
    def work(rank):
        results = {}
        for method in SHARDED:
            watch, clipped = Watch(), Clipped()
            case = replace(every_case[method], more=[watch, clipped])
            folder = tmp_path / method
            module, run = case.fit(folder, sharded=True, epochs=1, precision="bf16-true")
            check_types(module, torch.bfloat16, method)
            pairs = zip(watch.average, module.ema.parameters(), strict=True)
            run["moves"] = any(not torch.equal(before.to_local(), after.to_local()) for before, after in pairs)
            run["clipped"] = clipped.norms
            module.export_pretrained(folder / "export")
            if method == "waveform":
                _, whole = case.fit(folder / "whole", sharded=True, precision="bf16-true")
                last = folder / "epoch=0.ckpt"
                _, resumed = case.fit(folder / "more", sharded=True, precision="bf16-true", ckpt_path=last, seed=8)
                equal = [torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items()]
                assert all(equal)
            results[method] = run
        case = every_case["mae"]
        _, run = case.fit(tmp_path / "ddp", epochs=1, strategy="ddp", precision="bf16-true")
        results["ddp"] = run
        # Gradients of one process, in parts.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        parts = [with_gradient(distribute_tensor(value, mesh, [Shard(0)])) for value in gradients()]
        norm = clip_gradients([*parts, with_gradient(torch.ones(4))], 1.0)
        results["norm"] = norm, [parameter.grad.full_tensor() for parameter in parts]
        return results

    results = together(work, tmp_path / "results")[0]
    norm, parts = results.pop("norm")
    whole = [with_gradient(value) for value in [*gradients(), torch.ones(4)]]
    expected = torch.cat([parameter.grad.float().flatten() for parameter in whole]).norm()
    torch.testing.assert_close(clip_gradients(whole, 1.0), expected)
    torch.testing.assert_close(norm, expected)
    for one, parameter in zip(parts, whole, strict=False):
        assert torch.equal(one, parameter.grad)
    assert losses(results.pop("ddp")) == pytest.approx(losses(exact["mae"]), rel=1e-2)
    for method, run in results.items():
        count = len(losses(run)) // len(run["values"]) if method == "ppo" else None
        assert losses(run)[:count] == pytest.approx(losses(exact[method])[:count], rel=2e-2, abs=2e-3)
        assert run["moves"]
        assert all(value.isfinite().all() for value in run["weights"].values() if value.is_floating_point())
        if method in ("sft", "waveform"):
            assert run["clipped"] == pytest.approx([0.5] * len(run["clipped"]), rel=4e-3)


def test_norms_are_not_rounded_to_16_bits():
    parameters = [with_gradient(torch.full((1000,), 1.0 + number / 64).bfloat16()) for number in range(3)]
    expected = torch.cat([parameter.grad.double() for parameter in parameters]).norm()
    assert float(clip_gradients(parameters, float("inf"))) == pytest.approx(float(expected), rel=1e-6)
    assert float(parameters[0].grad[0]) == 1.0
    clip_gradients(parameters, 1.0)
    assert float(total_norm([parameter.grad for parameter in parameters])) == pytest.approx(1.0, rel=4e-3)
    assert float(clip_gradients([nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    wide = with_gradient(torch.ones(3, dtype=torch.float64))
    assert clip_gradients([wide, *parameters], 1.0).dtype == torch.float64


# -- casting -----------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    value: torch.Tensor
    more: dict[str, torch.Tensor]


class Taker(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.tensor([1 / 3]))

    def forward(self, inputs, *others, **named):
        self.seen = (inputs.value, *inputs.more.values(), *others[0], *named.values())
        return inputs.value


def test_inputs_are_cast_wherever_they_are():
    module = Taker()
    cast_weights(module, torch.bfloat16, {module.two})
    assert module.one.weight is module.two.weight
    assert (module.one.bias.dtype, module.two.bias.dtype) == (torch.bfloat16, torch.float32)
    assert module.table.dtype == torch.float32
    cast_inputs(module, torch.float64)
    cast_inputs(module, torch.bfloat16)  # the newest counts
    whole = torch.arange(2)
    inputs = Inputs(torch.ones(2), {"a": torch.ones(2), "b": whole})
    module(inputs, [torch.ones(1), "text"], named=(torch.ones(1),))
    first, second, ids, third, text, (fourth,) = module.seen
    assert {value.dtype for value in (first, second, third, fourth)} == {torch.bfloat16}
    assert ids is whole
    assert text == "text"
    assert inputs.value.dtype == torch.float32


# -- compiled networks -------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """Networks are compiled to the very operations that they hold, which is fast and exact."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["sft", "influence"])
def test_compiled_networks_train_alike(method, every_case, exact, tmp_path, traced):
    case = every_case[method]

    def make(sharding):
        sharding.compile = True
        return case.make(sharding)

    torch._dynamo.utils.counters.clear()
    module, run = replace(case, make=make).fit(tmp_path, epochs=1)
    assert module.net._compiled_call_impl is not None
    assert bool(torch._dynamo.utils.counters["frames"]) == (method != "influence")
    assert losses(run) == pytest.approx(losses(exact[method]), abs=1e-4)
    assert run["weights"].keys() == exact[method]["weights"].keys()


def test_states_of_a_compiled_policy_are_recorded(llama_options, traced):
    from lit_models.backbones import FromConfig

    model = FromConfig("llama", llama_options(hidden_size=16, intermediate_size=16)).build().eval()
    model.compile()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for _ in range(2):  # a recorder for each rollout
            with StateRecorder(model, "actor_last") as recorder:
                model(input_ids=ids, use_cache=False)
            states = recorder.states(6)
            torch.testing.assert_close(model.lm_head(states), before)
        assert model(input_ids=ids, use_cache=False).logits.shape == before.shape


# -- what is computed outside of networks ------------------------------------------------------------------------------


def test_likeness_of_texts_is_not_rounded_under_mixed_precision():
    from lit_models.ppo.curiosity import SentRewards
    from tests.ppo.test_curiosity import rollout_of

    def measured(enabled):
        shaper = SentRewards(bleu_coef=2.0, cosine_coef=1.0)
        held = rollout_of(torch.ones(2, 3), reward_mask=torch.ones(2, 3))
        for texts in (["the cat sat on the mat", "something else"], ["the cat sat on a mat", "some other thing else"]):
            held.responses = texts
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                rewards, metrics = shaper.shape(held, torch.zeros(2, 3))
        return rewards, metrics["sent/cosine"]

    for rounded, exact in zip(measured(True), measured(False), strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, exact)
