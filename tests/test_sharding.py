"""Sharding (FSDP2) on two CPU processes over gloo: every method equals one process, saves, resumes and exports."""

import ctypes
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn

from callbacks import AtomicCheckpointIO
from lit_models import export
from lit_models.backbones import FromModule, FromPretrained
from lit_models.base import CheckpointMismatchError, LitBase
from lit_models.nn.sharding import (
    Sharding,
    ShardingNeeds,
    block_classes,
    checkpoint_activations,
    is_sharded,
    wrapping_units,
)
from lit_models.sft import LitSFT
from lit_models.shards import is_in_shards, merge_shards, read_shards
from lit_models.strategies import DRAFT, OLD, FullyShardStrategy, _take_place
from tests import sharding_cases as tiny
from tests.sharding_cases import ADAM, LLAMA, cases, config, together, whole_state

METHODS = [
    "sft",
    "sft_lora",
    "reward",
    "ppo",
    "ppo_lora",
    "pixel",
    "pixel_images",
    "mae",
    "task",
    "influence",
    "waveform",
]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def every_case(tiny_tokenizer, tiny_lm):
    return cases(str(tiny_tokenizer), str(tiny_lm))


@pytest.fixture(scope="module")
def single(every_case, folder):
    """Each case on one process."""
    return {name: case.fit(folder / f"{name}-single")[1] for name, case in every_case.items()}


@pytest.fixture(scope="module")
def pair(every_case, single, folder):
    """Each case on two processes, with blocks computed again: whole, resumed from shards, and from one file."""

    def work(rank):
        results = {}
        for name, case in every_case.items():
            module, whole = case.fit(folder / f"{name}-pair", sharded=True)
            whole |= {"units": units_of(module), "tied": tied(module)}
            module.export_pretrained(folder / f"{name}-live")
            shards, file = folder / f"{name}-pair/epoch=0.ckpt", folder / f"{name}-single/epoch=0.ckpt"
            _, resumed = case.fit(folder / f"{name}-resumed", sharded=True, ckpt_path=shards, seed=8)
            _, from_file = case.fit(folder / f"{name}-file", sharded=False, ckpt_path=file, seed=9)
            results[name] = {"whole": whole, "resumed": resumed, "file": from_file}
        return results

    return together(work, folder / "results")


def units_of(module):
    """Number of modules of each class that are gathered one at a time, by network."""
    found = {}
    for path, part in module.named_modules():
        if is_sharded(part):
            name = type(part).__name__.removeprefix("FSDP")
            counts = found.setdefault(path.split(".")[0], {})
            counts[name] = counts.get(name, 0) + 1
    return found


def tied(module):
    net = getattr(module, "net", None)
    return hasattr(net, "lm_head") and net.lm_head.weight is net.model.embed_tokens.weight


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_what_one_gives(method, single, pair):
    one, two = single[method], [rank[method]["whole"] for rank in pair]
    assert one["steps"] >= 4
    assert [run["steps"] for run in two] == [one["steps"]] * 2
    for run in two:
        assert_close(one["weights"], run["weights"])  # averages too
        assert one["norms"] == pytest.approx(run["norms"], abs=1e-5)
        for before, after in zip([*one["values"], one["last"]], [*run["values"], run["last"]], strict=True):
            assert after == pytest.approx(before, abs=1e-5, rel=1e-5)
    assert any(name.startswith("val/") for name in one["last"])
    if method.startswith("ppo"):
        lengths = {run["last"]["response/len_mean"] for run in (one, *two)}
        assert len(lengths) == 1
        assert 1 < lengths.pop() < 8


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_from_shards_is_bitwise_exact(method, pair):
    for rank in pair:
        assert_equal(rank[method]["whole"]["weights"], rank[method]["resumed"]["weights"])


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_run_resumes_from_a_file_of_one_process(method, single, pair):
    for rank in pair:
        assert_close(single[method]["weights"], rank[method]["file"]["weights"])


@pytest.mark.parametrize("method", METHODS)
def test_one_process_resumes_from_shards_and_from_a_file_of_two(method, every_case, single, pair, folder):
    case = every_case[method]
    path = folder / f"{method}-pair/epoch=0.ckpt"
    assert is_in_shards(path)
    assert_close(single[method]["weights"], case.fit(folder / "s", ckpt_path=path, seed=10)[1]["weights"])
    path = folder / f"{method}-file/epoch=1.ckpt"
    assert path.is_file()
    assert_close(single[method]["weights"], whole_state(LitBase.load_from_checkpoint(path)))


@pytest.mark.parametrize("method", METHODS)
def test_one_command_makes_folders_of_shards(method, pair, folder, capsys):
    out, live = folder / f"{method}-out", folder / f"{method}-live"
    export.main([str(folder / f"{method}-pair/epoch=1.ckpt"), str(out)])
    names = {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {path.name for path in live.iterdir()} == {path.name for path in out.iterdir()}
    weights = pair[0][method]["whole"]["weights"]
    files = sorted(path.relative_to(out) for path in out.rglob("*.safetensors"))
    assert len(files) >= len(names)
    for file in files:
        written = load_file(out / file)
        assert_close(written, load_file(live / file))  # adapters are folded in two ways
        prefix = origin(method, *file.parts)
        known = {key: weights[f"{prefix}.{key}"] for key in written if f"{prefix}.{key}" in weights}
        assert ("lora" in method and "critic" not in prefix) == (known == {})
        assert_equal(known, {key: written[key] for key in known})


def origin(method, folder, *file):
    """Network of a module whose weights a file of an export holds."""
    if method == "waveform":
        return f"ema.{file[0]}"
    network = {"model": "net"}.get(folder, folder)
    return f"{network}.model" if method == "reward" or network == "critic" else network


LLAMA_UNITS = {"LlamaDecoderLayer": 2}
UNITS = {
    "sft": {name: {"LlamaForCausalLM": 1, **LLAMA_UNITS} for name in ("net", "ema")},
    "sft_lora": {name: {"LlamaForCausalLM": 1, **LLAMA_UNITS} for name in ("net", "ema")},
    "reward": {name: {"TokenScorer": 1, **LLAMA_UNITS} for name in ("net", "ema")},
    "ppo": {
        **{name: {"LlamaForCausalLM": 1, **LLAMA_UNITS} for name in ("actor", "reference", "ema")},
        **{name: {"TokenScorer": 1, **LLAMA_UNITS} for name in ("critic", "reward_networks")},
        "icm": {"ICM": 1, "Sequential": 2},
    },
    "pixel": {name: {"PixelForCausalLM": 1, **LLAMA_UNITS} for name in ("net", "ema")},
    "mae": {name: {"PIXELForPreTraining": 1, "PIXELLayer": 3} for name in ("net", "ema")},
    "task": {name: {"PixelForSequenceClassification": 1, **LLAMA_UNITS} for name in ("net", "ema")},
    "influence": {name: {"InfluenceSimulator": 1} for name in ("net", "ema")},
    "waveform": {name: {"WaveformNet": 1, "HalfLevel": 4, "TimeFeatures": 1, "T5Block": 2} for name in ("net", "ema")},
}
UNITS["pixel_images"] = UNITS["pixel"]
UNITS["ppo_lora"] = {name: units for name, units in UNITS["ppo"].items() if name != "reference"}


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_every_network_are_gathered_one_at_a_time(method, pair):
    assert pair[0][method]["whole"]["units"] == UNITS[method]


def test_tied_weights_stay_tied(pair):
    assert pair[0]["sft"]["whole"]["tied"]
    assert not pair[0]["sft_lora"]["whole"]["tied"]


# -- networks without weights ------------------------------------------------------------------------------------------


class Watched(LitSFT):
    """Keeps what building it gave, before it is sharded."""

    def place(self, name, network):
        self.seen = {
            "meta": {key: value.is_meta for key, value in network.named_parameters()},
            "tied": network.lm_head.weight is network.model.embed_tokens.weight,
            "buffers": {key: value.clone() for key, value in network.named_buffers()},
            "training": network.training,
        }
        super().place(name, network)


def trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "strategy": FullyShardStrategy(),
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_epochs": 1,
    }
    return L.Trainer(**(settings | options))


def test_only_the_first_process_builds_with_weights(tmp_path, tiny_tokenizer, tiny_lm):
    from transformers import AutoModelForCausalLM

    case = tiny.sft(str(tiny_tokenizer))

    def work(rank):
        calls = []
        load = FromPretrained.load
        FromPretrained.load = lambda self: (calls.append(self.name), load(self))[1]
        module = Watched(FromPretrained(str(tiny_lm)), str(tiny_tokenizer), optimizer=ADAM)
        torch.manual_seed(rank)
        trainer(tmp_path, max_steps=1).fit(module, case.loader())
        tied_config = Watched(config(tie_word_embeddings=True), str(tiny_tokenizer), optimizer=partial(ADAM, lr=0.0))
        torch.manual_seed(3)
        trainer(tmp_path, max_steps=1).fit(tied_config, case.loader())
        return {
            "calls": calls,
            "seen": module.seen,
            "tied": tied_config.seen["tied"],
            "buffers": dict(module.net.named_buffers()),
            "drawn": whole_state(tied_config.net),
            "random": torch.rand(1),
        }

    first, second = together(work, tmp_path / "r")
    assert (first["calls"], second["calls"]) == ([str(tiny_lm)], [])
    assert not any(first["seen"]["meta"].values())
    assert all(second["seen"]["meta"].values())
    assert first["tied"]
    assert second["tied"]
    assert first["seen"]["training"]
    assert second["seen"]["training"]
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_lm).named_buffers())
    assert any("inv_freq" in name for name in plain)  # not in any state dict
    for result in (first, second):
        assert_equal(plain, result["seen"]["buffers"])
        assert_equal(plain, result["buffers"])
    torch.manual_seed(3)
    expected = config(tie_word_embeddings=True).build()
    assert_equal(expected.state_dict(), first["drawn"])
    assert_equal(first["drawn"], second["drawn"])
    assert torch.equal(first["random"], second["random"])  # random numbers go on alike


def memory(key):
    """An entry of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells and resets the peak of its memory")
def test_other_processes_take_no_memory_for_the_whole_network(tmp_path, tiny_tokenizer):
    big = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 7, "vocab_size": 4000}
    config().build()  # imports what the processes need

    def work(rank):
        module = LitSFT(config(**big), str(tiny_tokenizer))
        run = trainer(tmp_path, max_epochs=0)
        run.strategy.connect(module)
        run.strategy.setup_environment()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        module.configure_model()
        return memory("VmHWM") - before, sum(p.numel() for p in module.parameters()) * 4

    (first, size), (second, _) = together(work, tmp_path / "r")
    assert size > 2e8
    assert first - second > 0.7 * size  # one has it whole, and then its shard
    assert second < 0.9 * size  # the other its shard, and one tensor at a time; the rest is code that is paged in


def test_an_error_while_building_reaches_all_processes(tmp_path, tiny_tokenizer):
    def work(rank):
        module = LitSFT(FromPretrained("no such folder"), str(tiny_tokenizer))
        with pytest.raises(ValueError, match="neither a model on the hub nor a local folder") as caught:
            trainer(tmp_path).fit(module, tiny.sft(str(tiny_tokenizer)).loader())
        return str(caught.value)

    first, second = together(work, tmp_path / "r")
    assert first == second


def test_what_can_not_be_sent_is_built_everywhere(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    def work(rank):
        torch.manual_seed(rank)  # the first process counts
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
        model.secret = lambda: 0
        module = LitSFT(FromModule(model), str(tiny_tokenizer))
        run = trainer(tmp_path, max_steps=0)
        if rank:
            with pytest.warns(UserWarning, match="LlamaForCausalLM can't be sent between processes"):
                run.fit(module, tiny.sft(str(tiny_tokenizer)).loader())
        else:
            run.fit(module, tiny.sft(str(tiny_tokenizer)).loader())
        return whole_state(module.net)

    first, second = together(work, tmp_path / "r")
    assert_equal(first, second)
    torch.manual_seed(0)
    assert_equal(LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict(), first)


# -- generation --------------------------------------------------------------------------------------------------------


def test_responses_of_unequal_length_are_those_of_one_process(tmp_path, tiny_tokenizer):
    """Both with gathered weights and with a gather for each token, where the ranks stop together."""
    prompts = tiny.prompts(6, 5)
    networks = {gather: tiny.ppo(str(tiny_tokenizer), gather=gather) for gather in (True, False)}

    def responses(gather):
        torch.manual_seed(0)
        module = networks[gather].make(Sharding(gather_to_generate=gather))
        batch = tiny.every(prompts, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        run = trainer(tmp_path, strategy=FullyShardStrategy() if "RANK" in os.environ else "auto")
        run.strategy.connect(module)
        module._trainer = run
        run.strategy.setup_environment()
        module.configure_model()
        gathers = []
        handle = module.actor.model.layers[1].register_forward_pre_hook(
            lambda layer, _: gathers.append(type(layer.mlp.up_proj.weight).__name__), prepend=True
        )
        rollouts = [module.generate(batch, number) for number in range(2)]
        handle.remove()
        sharded = type(module.actor.model.layers[1].mlp.up_proj.weight).__name__
        return {
            "ids": [rollout.response_ids for rollout in rollouts],
            "lengths": [rollout.lengths for rollout in rollouts],
            "kinds": set(gathers),
            "passes": len(gathers),
            "afterwards": sharded,
        }

    expected = responses(True)
    for gather in (True, False):
        ranks = together(lambda rank, gather=gather: responses(gather), tmp_path / f"r{gather}")
        for number, lengths in enumerate(expected["lengths"]):
            assert len(lengths.unique()) > 2
            for rank, result in enumerate(ranks):
                assert torch.equal(result["lengths"][number], lengths[rank::2])
                width = int(lengths[rank::2].max())
                assert torch.equal(result["ids"][number][:, :width], expected["ids"][number][rank::2, :width])
        passes = {result["passes"] for result in ranks}
        assert len(passes) == (2 if gather else 1)  # each its own number of them, or both as many
        assert [result["kinds"] for result in ranks] == [{"Parameter"} if gather else {"DTensor"}] * 2
        assert [result["afterwards"] for result in ranks] == ["DTensor"] * 2


def test_strips_are_read_although_ranks_hold_other_things(tmp_path, tiny_tokenizer):
    case = tiny.pixel(str(tiny_tokenizer))
    alone = {0: tiny.strips(3, 0), 1: tiny.texts(3, 1)}

    def predict(batches):
        torch.manual_seed(0)
        module = case.make(Sharding())
        sharded = "RANK" in os.environ
        run = trainer(tmp_path, strategy=FullyShardStrategy() if sharded else "auto")
        found = run.predict(module, tiny.DataLoader(batches, batch_size=None))
        return found, module.samples()

    results = together(lambda rank: predict([alone[rank], alone[1 - rank]]), tmp_path / "r")
    for rank, (found, samples) in enumerate(results):
        expected, shown = predict([alone[rank], alone[1 - rank]])
        assert samples == shown
        for one, two in zip(expected, found, strict=True):
            assert one.keys() == two.keys()
            assert one.get("read") == two.get("read")
    assert any("read" in rows for rows in results[0][0])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_optimizers_without_state_resume(tmp_path, tiny_tokenizer):
    def make(sharding):
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return LitSFT(config(), str(tiny_tokenizer), optimizer=optimizer, sharding=sharding)

    case = tiny.Case(make, [tiny.texts(6, n) for n in range(2)])

    def work(rank):
        results = []
        for sharded in (True, False):
            folder = tmp_path / f"sharded-{sharded}"
            whole = case.fit(folder, sharded=sharded)[1]
            resumed = case.fit(tmp_path / "resumed", sharded=sharded, ckpt_path=folder / "epoch=0.ckpt", seed=8)[1]
            results.append((whole["weights"], resumed["weights"]))
        return results

    for results in together(work, tmp_path / "r"):
        for whole, resumed in results:
            assert_equal(whole, resumed)  # averages too, which torch's own steps must not move
    whole = case.fit(tmp_path / "single")[1]["weights"]
    for sharded in (True, False):
        path = tmp_path / f"sharded-{sharded}/epoch=0.ckpt"
        assert_close(whole, case.fit(tmp_path / "s", ckpt_path=path, seed=9)[1]["weights"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer):
    """The same run of one epoch: as one file, and in shards of two processes."""
    folder = tmp_path_factory.mktemp("saved")
    case = tiny.sft(str(tiny_tokenizer))
    case.fit(folder / "file", epochs=1)
    together(lambda rank: case.fit(folder / "shards", sharded=True, epochs=1)[1]["steps"], folder / "r")
    return {name: folder / name / "epoch=0.ckpt" for name in ("file", "shards")}


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path, tiny_tokenizer):
    def other(sharding, **changes):
        return LitSFT(config(tie_word_embeddings=True, **changes), str(tiny_tokenizer), optimizer=ADAM)

    def work(rank):
        messages = []

        def refused(path, text, ema="net", **changes):
            case = tiny.Case(partial(other, **changes), [tiny.texts(6, 0)], ema=ema)
            with pytest.raises(ValueError, match=text) as caught:
                case.fit(tmp_path / "x", sharded=True, ckpt_path=path)
            messages.append((type(caught.value), str(caught.value)))

        for path in saved.values():
            refused(path, r"another model than LitSFT.*18 keys missing.*set ckpt_path", num_hidden_layers=3)
            refused(path, r"another model than LitSFT.*has shape", hidden_size=32)
            refused(path, r"add callbacks\.EMA", ema=None)
        refused(tmp_path / "nothing.ckpt", "there is no checkpoint at")
        return messages

    first, second = together(work, tmp_path / "r")
    assert first == second
    assert [kind for kind, _ in first] == [CheckpointMismatchError] * 6 + [ValueError]


@pytest.mark.parametrize("world", [1, 3])
def test_other_numbers_of_processes_resume_from_shards(world, saved, tmp_path, tiny_tokenizer):
    case = tiny.sft(str(tiny_tokenizer))
    expected = case.fit(tmp_path / "single")[1]["weights"]

    def work(rank):
        return case.fit(tmp_path / "b", sharded=True, ckpt_path=saved["shards"])[1]["weights"]

    for weights in together(work, tmp_path / "r", world):
        assert_close(expected, weights)


def test_a_module_out_of_a_checkpoint_is_sharded(saved, tmp_path, tiny_tokenizer):
    """Its networks exist before any process knows of others."""
    case = tiny.sft(str(tiny_tokenizer))

    def fit(sharded):
        module = LitBase.load_from_checkpoint(saved["file"])
        assert not is_sharded(module.net)
        run = trainer(tmp_path, strategy=FullyShardStrategy() if sharded else "auto")
        run.fit(module, case.loader())
        return whole_state(module), is_sharded(module.net), is_sharded(module.ema)

    expected = fit(False)[0]
    for state, *both in together(lambda rank: fit(True), tmp_path / "r"):
        assert both == [True, True]
        assert_close({name: expected[name] for name in state}, state)


def test_shards_read_as_lightning_would_have_saved(saved, tmp_path):
    whole, file = read_shards(saved["shards"]), torch.load(saved["file"], weights_only=True)
    assert whole.keys() == file.keys()
    assert_close(file["state_dict"], whole["state_dict"])
    for mine, theirs in zip(whole["optimizer_states"], file["optimizer_states"], strict=True):
        assert [group["params"] for group in mine["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
        assert mine["param_groups"][0]["lr"] == theirs["param_groups"][0]["lr"]
        assert mine["state"].keys() == theirs["state"].keys()
        for number, values in theirs["state"].items():
            assert_close(values, mine["state"][number])
    lean = torch.load(merge_shards(saved["shards"], tmp_path / "a.ckpt", optimizers=False), weights_only=True)
    assert "optimizer_states" not in lean
    assert_equal(whole["state_dict"], lean["state_dict"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder, but not one with a sharded checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "empty")


def test_a_checkpoint_takes_the_place_of_another_of_any_kind(tmp_path, monkeypatch):
    def write(path, text):
        path.mkdir()
        (path / "meta.pt").write_text(text)
        return path

    target = tmp_path / "last.ckpt"
    target.write_text("a file")
    _take_place(write(tmp_path / DRAFT, "one"), target)
    _take_place(write(tmp_path / DRAFT, "two"), target)
    assert (target / "meta.pt").read_text() == "two"
    monkeypatch.setattr("lit_models.strategies._exchange", lambda one, two: False)  # on other systems
    _take_place(write(tmp_path / DRAFT, "three"), target)
    assert (target / "meta.pt").read_text() == "three"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    AtomicCheckpointIO().save_checkpoint({"step": 4}, target)
    assert torch.load(target) == {"step": 4}


def test_a_killed_save_leaves_the_checkpoint_before_it(tmp_path, tiny_tokenizer):
    case = tiny.sft(str(tiny_tokenizer))
    path = tmp_path / "run/last.ckpt"

    def work(rank, killed):
        module = case.make(Sharding())
        run = trainer(tmp_path / "run", max_steps=1)
        run.fit(module, case.loader())
        if killed:
            import lit_models.strategies

            lit_models.strategies._sync_files = lambda folder: os._exit(9)  # all is written, but not in its place
        run.save_checkpoint(path)
        return whole_state(module)

    first = together(lambda rank: work(rank, False), tmp_path / "a")[0]
    with pytest.raises(AssertionError, match=r"exit codes \[9, "):
        together(lambda rank: work(rank, True), tmp_path / "b", seconds=60)
    assert (tmp_path / "run" / DRAFT).is_dir()
    assert_equal(first, read_shards(path)["state_dict"])

    def full(rank, place):
        import torch.distributed.checkpoint.filesystem

        import lit_models.strategies

        def fail(*args, **options):
            raise OSError(28, "No space left on device")

        if place == "end":  # on the first process
            lit_models.strategies._sync_files = fail
        else:  # of torch, which puts it into an exception of its own
            torch.distributed.checkpoint.filesystem._write_files_from_queue = fail
        with pytest.raises(OSError, match=r"could not be written .*written before are intact") as caught:
            work(rank, False)
        return str(caught.value)

    for place in ("end", "middle"):
        assert "([Errno 28] No space left on device)" in together(partial(full, place=place), tmp_path / place)[0]
        assert not (tmp_path / "run" / DRAFT).exists()
        assert_equal(first, read_shards(path)["state_dict"])
    together(lambda rank: work(rank, False), tmp_path / "c")
    assert not (tmp_path / "run" / DRAFT).exists()
    assert not (tmp_path / "run" / OLD).exists()
    assert is_in_shards(path)


# -- types, blocks, recomputation --------------------------------------------------------------------------------------


class Types(L.Callback):
    """Types that layers compute in, by network."""

    def __init__(self):
        self.found = {}

    def on_fit_start(self, trainer, module):
        for path, part in module.named_modules():
            if type(part).__name__ in ("Linear", "Embedding"):
                kinds = self.found.setdefault(path.split(".")[0], set())
                part.register_forward_hook(lambda part, _, out, kinds=kinds: kinds.add(out.dtype))


def test_networks_compute_in_16_bits_where_they_can(tmp_path, every_case, single):
    """Gathered in bfloat16, kept and reduced in float32; what needs its digits keeps them."""
    names = ["sft", "mae", "ppo", "influence"]

    def work(rank):
        results = {}
        for name in names:
            types = Types()
            case = replace(every_case[name], sharding={"param_dtype": "bfloat16"}, more=[types])
            module, run = case.fit(tmp_path / name, sharded=True, epochs=1)
            results[name] = run, types.found, {parameter.dtype for parameter in module.parameters()}
        return results

    results = together(work, tmp_path / "r")[0]
    for name in names:
        run, found, kept = results[name]
        assert kept == {torch.float32}
        for part, kinds in found.items():
            exact = part in ("icm",) or name == "influence"
            assert kinds <= {torch.float32 if exact else torch.bfloat16}, (name, part)
        if name != "ppo":  # other numbers sample other responses
            assert run["values"][0]["train/loss"] == pytest.approx(single[name]["values"][0]["train/loss"], rel=3e-2)
    assert results["ppo"][1]["icm"] == {torch.float32}
    assert results["mae"][1]["net"] == {torch.bfloat16}
    assert results["mae"][0]["values"][0]["train/loss"] != single["mae"]["values"][0]["train/loss"]


class Plain(nn.Module):
    """A network that declares nothing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3))
        self.pairs = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])])
        self.head = nn.Linear(4, 1)

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            x = x + block(x)
        for layer in self.pairs[0]:
            x = layer(x)
        return scale * self.head(x)


def test_blocks_are_found_where_none_are_declared():
    network = Plain()
    assert wrapping_units(network) == [network.pairs[0][0], *reversed(network.blocks)]
    network.__class__ = type("Whole", (Plain,), {"sharding_needs": ShardingNeeds(units=())})
    assert wrapping_units(network) == []
    network.__class__ = type("Named", (Plain,), {"sharding_needs": ShardingNeeds(units=("Linear",))})
    assert len(wrapping_units(network)) == 5
    assert block_classes(config().build()) == {"LlamaDecoderLayer"}


def test_blocks_without_an_option_for_it_are_recomputed():
    plain, other = Plain(), Plain()
    other.load_state_dict(plain.state_dict())
    checkpoint_activations(other)
    calls = []
    for block in other.blocks:
        block[0].register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for network in (plain, other):
        torch.manual_seed(0)  # dropout is drawn again as it was
        network(torch.ones(2, 4), scale=2.0).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert len(calls) == 6
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        other(torch.ones(2, 4))
    assert len(calls) == 9
    assert other.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["diffusers", "waveform", "icm", "pixel", "mae", "llama"])
def test_every_kind_of_network_recomputes_its_blocks(name):
    networks = {
        "diffusers": lambda: diffusers_network(),
        "waveform": lambda: waveform_network(),
        "icm": lambda: curiosity_network(),
        "pixel": lambda: tiny.pixel("none").make(Sharding()).backbone.build(),
        "mae": lambda: tiny.mae().make(Sharding()).backbone.build(),
        "llama": lambda: config().build(),
    }
    network = networks[name]().train()
    with_dropout(network)
    expected = seeded_gradients(name, network)
    checkpoint_activations(network)
    units = wrapping_units(network)
    assert units
    inside = {
        unit: next(part for part in unit.modules() if next(iter(part.parameters(recurse=False)), None) is not None)
        for unit in units
    }
    calls = {unit: 0 for unit in units}

    def count(unit):
        def hook(*_):
            calls[unit] += 1

        return hook

    for unit, part in inside.items():
        part.register_forward_hook(count(unit))
    found = seeded_gradients(name, network)
    assert all(number >= 2 for number in calls.values()), calls
    for one, two in zip(expected, found, strict=True):  # what dropout drew is drawn again
        assert torch.equal(one, two)


def with_dropout(network):
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
        for key in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, key, None), float):
                setattr(part, key, 0.3)


def seeded_gradients(name, network):
    network.zero_grad()
    torch.manual_seed(0)
    run_network(name, network).backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def diffusers_network():
    from lit_models.diffusion.recipes import UnconditionalUNet1D

    return UnconditionalUNet1D(sample_size=64, in_channels=1, channels=[32, 32], attn_from_level=2, time_dim=4).build()


def waveform_network():
    from lit_models.diffusion.modeling import WaveformUNet1DModel

    return WaveformUNet1DModel(in_channels=1, channels=[8, 8, 8], rep=1, attn_from_level=3, head_dim=4, time_dim=4)


def curiosity_network():
    from lit_models.ppo.curiosity import ICM

    return ICM(8, 16)


def run_network(name, network):
    """A loss of a network."""
    if name == "icm":
        prediction = network(torch.randn(2, 4, 8).requires_grad_(), torch.randn(2, 3, 8))
        return (prediction.predicted - prediction.target).square().sum()
    if name == "pixel":
        return network(**tiny.strips(2, 0)).loss
    if name == "mae":
        return network(**tiny.strips(2, 0)).loss
    if name == "llama":
        return network(**tiny.texts(2, 0)).loss
    sample = torch.randn(2, 1, 64)
    time = torch.full((2,), 0.5)
    return network(sample, time).sample.square().sum()


# -- presets -----------------------------------------------------------------------------------------------------------


TINY = ["sft", "reward", "ppo", "pixel", "influence"]


@pytest.mark.parametrize(
    "files",
    [(f"{name}/tiny.yaml", "trainer/fsdp2.yaml") for name in TINY]
    + [("pixel/mae.yaml", "trainer/fsdp2.yaml"), ("pixel/task.yaml", "pixel/glue-cola.yaml", "trainer/fsdp2.yaml")]
    + [("sft/tiny.yaml", f"trainer/{name}.yaml") for name in ("gpu", "ddp")],
    ids=lambda files: " ".join(Path(file).stem if "/tiny" not in file else file.split("/")[0] for file in files),
)
def test_trainer_presets_compose_with_every_method(files, capsys, monkeypatch, tmp_path):
    from lit_models.cli import main

    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *[argument for file in files for argument in ("--config", file)], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    found = yaml.safe_load(capsys.readouterr().out)
    options = found["trainer"]
    assert options["accelerator"] == "gpu"
    if "fsdp2" not in files[-1]:
        assert options["precision"] == "bf16-mixed"
        return
    assert options["strategy"]["class_path"] == "lit_models.strategies.FullyShardStrategy"
    sharding = found["model"]["init_args"]["sharding"]
    assert (sharding["param_dtype"], sharding["activation_checkpointing"]) == ("bfloat16", True)


def test_all_devices_of_all_nodes_share_the_weights(monkeypatch):
    seen = {}
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: seen.update(vars(self)))
    strategy = FullyShardStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 4, 2
    strategy.setup_environment()
    assert (seen["_data_parallel_size"], seen["_tensor_parallel_size"]) == (8, 1)
