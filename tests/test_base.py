import copy
import dataclasses
import functools
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_models.backbones import FromConfig, FromModule, FromPretrained, LoRA
from lit_models.base import CheckpointMismatchError, GroupOptions, LitBase
from lit_models.hyperparameters import plain
from lit_models.nn.schedules import WarmupCosine
from lit_models.nn.sharding import Sharding
from lit_models.reward import LitRewardModel, RewardLoss
from lit_models.sft import LitSFT


class Averaging(Callback):
    """Asks for an average as `callbacks.EMA` does, and follows it by hand."""

    def __init__(self, decay):
        self.decay, self.expected = decay, None

    def setup(self, trainer, module, stage):
        module.enable_ema(self.decay)

    def on_train_start(self, trainer, module):
        self.expected = [parameter.detach().clone() for parameter in module.ema.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            online = module.net.parameters()
            self.expected = [
                self.decay * old + (1 - self.decay) * new.detach()
                for old, new in zip(self.expected, online, strict=True)
            ]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        ids = torch.randint(3, 300, (2, 8), generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return DataLoader(data, batch_size=None)


@pytest.fixture
def sft(tiny_lm):
    def build(backbone=None, **options):
        optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        backbone = backbone or FromPretrained(str(tiny_lm))
        return LitSFT(backbone, str(tiny_lm), optimizer=optimizer, **options)

    return build


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# -- hyperparameters and loading ---------------------------------------------------------------------------------------


def test_python_made_module_loads_from_its_checkpoint(sft, batches, quiet_trainer, tmp_path):
    options = {
        "backbone": FromConfig("gpt2", {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2}),
        "lr_scheduler": partial(WarmupCosine, total=10, warmup=0.1),
        "sharding": Sharding(activation_checkpointing=True),
    }
    module = sft(**options)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["_class_path"] == "lit_models.sft.module.LitSFT"
    assert saved["hyper_parameters"]["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    for cls in (LitBase, LitSFT):
        loaded = cls.load_from_checkpoint(tmp_path / "a.ckpt")
        assert type(loaded) is LitSFT
        assert loaded.backbone == options["backbone"]
        assert loaded.sharding == options["sharding"]
        assert_same(weights(loaded), weights(module))
        optimizer = loaded.configure_optimizers()["optimizer"]
        assert optimizer.defaults["lr"] == 1e-2
        assert isinstance(loaded.configure_optimizers()["lr_scheduler"]["scheduler"], WarmupCosine)


def test_module_of_a_loaded_checkpoint_saves_and_loads_again(sft, batches, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(sft(), batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = quiet_trainer(max_steps=1)
    second.fit(LitBase.load_from_checkpoint(tmp_path / "a.ckpt"), batches)
    second.save_checkpoint(tmp_path / "b.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "b.ckpt")
    assert_same(weights(loaded), weights(second.lightning_module))


def test_optimizer_keeps_its_own_defaults(tiny_lm, batches, quiet_trainer, tmp_path):
    module = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm), optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt").configure_optimizers()
    assert loaded.defaults == module.configure_optimizers().defaults  # no weight decay of AdamW


def test_nested_recipes_come_back(tiny_reward, quiet_trainer, tmp_path):
    backbone = FromPretrained(str(tiny_reward), lora=LoRA(r=2, targets=["q_proj"]))
    module = LitRewardModel(backbone, str(tiny_reward), loss=RewardLoss("per_token"))
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    module.configure_model()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.backbone == backbone
    assert loaded.loss == RewardLoss("per_token")


def test_model_from_memory_is_saved_as_its_architecture(sft, tiny_lm, batches, quiet_trainer, tmp_path):
    source = FromPretrained(str(tiny_lm)).build()
    module = sft(FromModule(source))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(loaded.backbone, FromConfig)
    assert_same(weights(loaded), weights(module))
    assert not torch.equal(source.lm_head.weight, module.net.lm_head.weight)  # the given model was copied


def test_wrong_class_is_refused(sft, batches, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(sft(), batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"was written by lit_models\.sft\.module\.LitSFT, not by"):
        LitRewardModel.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("changes", "words"), [({"num_hidden_layers": 3}, r"9 keys missing, 0 unknown"), ({"hidden_size": 16}, "shape")]
)
def test_checkpoint_of_another_model_is_refused(changes, words, sft, llama_options, batches, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(sft(FromConfig("llama", llama_options())), batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = sft(FromConfig("llama", llama_options(**changes)))
    with pytest.raises(
        CheckpointMismatchError, match=f"another model than LitSFT as configured .*{words}.*set ckpt_path"
    ):
        quiet_trainer(max_steps=2).fit(other, batches, ckpt_path=tmp_path / "a.ckpt")


def test_plain_form_of_arguments():
    assert plain({"a": (1, None, "x"), "b": torch.float32}) == {"a": [1, None, "x"], "b": "float32"}
    assert plain(functools.partial(WarmupCosine, total=3)) == {
        "class_path": "lit_models.nn.schedules.WarmupCosine",
        "init_args": {"total": 3, "warmup": 0, "floor": 0.0},
    }
    optimizer = plain(torch.optim.AdamW)
    assert optimizer["class_path"] == "torch.optim.adamw.AdamW"
    assert optimizer["init_args"]["betas"] == [0.9, 0.999]
    assert plain(LoRA(r=2)) == {"r": 2, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}
    assert plain(FromPretrained("x"))["class_path"] == "lit_models.backbones.FromPretrained"
    with pytest.raises(TypeError, match="Linear can't be saved"):
        plain(torch.nn.Linear(1, 1))


# -- optimizer groups --------------------------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay(sft):
    module = sft()
    module.configure_model()
    groups = {group["name"]: group for group in module.configure_optimizers().param_groups}
    assert groups.keys() == {"model", "model_no_decay"}
    assert all(parameter.ndim > 1 for parameter in groups["model"]["params"])
    assert all(parameter.ndim == 1 for parameter in groups["model_no_decay"]["params"])
    assert (groups["model"]["weight_decay"], groups["model_no_decay"]["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in groups.values()) == len(list(module.net.parameters()))


def test_group_options_replace_the_optimizers(sft):
    class Other(LitSFT):
        def group_options(self):
            return {"model": GroupOptions(lr=0.5, weight_decay=0.3)}

    module = sft()
    module.__class__ = Other
    module.configure_model()
    values = {
        group["name"]: (group["lr"], group["weight_decay"]) for group in module.configure_optimizers().param_groups
    }
    assert values == {"model": (0.5, 0.3), "model_no_decay": (0.5, 0.0)}


# -- averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_moves_once_per_optimizer_step(accumulate, sft, batches, quiet_trainer):
    module, averaging = sft(), Averaging(0.9)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[averaging]).fit(module, batches)
    for average, expected in zip(module.ema.parameters(), averaging.expected, strict=True):
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in module.ema.parameters())
    assert not torch.equal(module.ema.lm_head.weight, module.net.lm_head.weight)


def test_average_resumes_bitwise(sft, batches, quiet_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, resumed = sft(), sft()
    quiet_trainer(max_epochs=3, callbacks=[Averaging(0.9), saving], enable_checkpointing=True).fit(whole, batches)
    quiet_trainer(max_epochs=3, callbacks=[Averaging(0.9)]).fit(resumed, batches, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(weights(resumed), weights(whole))
    loaded = LitBase.load_from_checkpoint(tmp_path / "epoch=2.ckpt")  # no callback asks for the average here
    assert_same(weights(loaded), weights(whole))
    assert not loaded.ema.training
    assert set(loaded.exported_models()) == {"model", "ema"}


def test_average_can_start_on_a_loaded_module(sft, batches, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(sft(), batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded, averaging = LitBase.load_from_checkpoint(tmp_path / "a.ckpt"), Averaging(0.5)
    quiet_trainer(max_steps=2, callbacks=[averaging]).fit(loaded, batches)
    for average, expected in zip(loaded.ema.parameters(), averaging.expected, strict=True):
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)


def test_average_and_checkpoint_must_agree_on_resume(sft, batches, quiet_trainer, tmp_path):
    with_average = quiet_trainer(max_steps=1, callbacks=[Averaging(0.9)])
    with_average.fit(sft(), batches)
    with_average.save_checkpoint(tmp_path / "with.ckpt")
    without = quiet_trainer(max_steps=1)
    without.fit(sft(), batches)
    without.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"add callbacks\.EMA to trainer\.callbacks"):
        quiet_trainer(max_steps=2).fit(sft(), batches, ckpt_path=tmp_path / "with.ckpt")
    trainer = quiet_trainer(max_steps=2, callbacks=[Averaging(0.9)])
    with pytest.raises(CheckpointMismatchError, match=r"holds no averaged weights.*remove it"):
        trainer.fit(sft(), batches, ckpt_path=tmp_path / "without.ckpt")


def test_average_of_an_unknown_part_is_refused(sft):
    module = sft()
    module.enable_ema(0.9, part="critic")
    with pytest.raises(ValueError, match=r"callbacks\.EMA\.part: LitSFT has no 'critic'; it trains net"):
        module.configure_model()


def test_warm_up_of_the_average_goes_on_after_a_resume(sft, batches, quiet_trainer, tmp_path):
    def build():
        module = sft()
        module.enable_ema(0.9, warmup="ratio", delay=0)
        return module

    seen = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(weights(module.net)["model.norm.weight"].clone())

    whole = build()
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    trainer = quiet_trainer(max_epochs=2, callbacks=[saving, Weights()], enable_checkpointing=True)
    trainer.fit(whole, batches)
    expected = seen[0]  # decays of the updates: 0, 0, 2/11, 3/12, ...
    for step, online in enumerate(seen):
        decay = step / (9 + step) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * online
    assert torch.allclose(weights(whole.ema)["model.norm.weight"], expected, atol=1e-6)
    resumed = build()
    quiet_trainer(max_epochs=2).fit(resumed, batches, ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(weights(resumed), weights(whole))
    assert_same(weights(LitBase.load_from_checkpoint(tmp_path / "step=8.ckpt")), weights(whole))


def test_average_of_16_bit_weights_is_kept_in_float32(sft, tiny_lm):
    module = sft(FromPretrained(str(tiny_lm), dtype="bfloat16"))
    module.enable_ema(0.999)
    module.configure_model()
    assert {parameter.dtype for parameter in module.ema.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module.net.parameters()} == {torch.bfloat16}


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_train_alone_and_are_saved_alone(sft, tiny_lm, batches, quiet_trainer, tmp_path):
    module = sft(FromPretrained(str(tiny_lm), lora=LoRA(r=4)))
    module.configure_model()
    before = weights(module)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, batches)
    after = weights(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {name for name in before if "lora_" in name}
    loaded = LitBase.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert_same(weights(loaded), after)
    torch.manual_seed(3)
    resumed = sft(FromPretrained(str(tiny_lm), lora=LoRA(r=4)))
    quiet_trainer(max_epochs=2).fit(resumed, batches, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(weights(resumed), after)


def test_score_head_trains_beside_adapters(tiny_lm, quiet_trainer, tmp_path):
    ids = torch.randint(3, 300, (4, 8))
    data = DataLoader([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], batch_size=None)
    module = LitRewardModel(FromPretrained(str(tiny_lm), lora=LoRA(r=2)), str(tiny_lm))
    trainer = quiet_trainer(max_steps=2, callbacks=[Averaging(0.5)])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert {"net.model.score.weight", "ema.model.score.weight"} <= keys
    assert all("lora_" in key or "score" in key for key in keys)
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights(loaded), weights(module))


# -- modes -------------------------------------------------------------------------------------------------------------


def test_average_stays_in_evaluation_mode(sft):
    module = sft()
    module.enable_ema(0.9)
    module.configure_model()
    module.train()
    assert module.net.training
    assert not module.ema.training


def test_frozen_networks_are_neither_trained_nor_saved(sft, batches, quiet_trainer, tmp_path):
    class WithReference(LitSFT):
        frozen = ("reference",)

        def configure_model(self):
            super().configure_model()
            self.reference = copy.deepcopy(self.net).requires_grad_(False).eval()

    module = sft()
    module.__class__ = WithReference
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("net.") for key in saved)
    assert not module.train().reference.training
    assert len(module.configure_optimizers().param_groups) == 2


def test_option_groups_are_plain_data():
    assert dataclasses.asdict(GroupOptions(lr=0.1)) == {"lr": 0.1, "weight_decay": None}
    assert GroupOptions(lr=0.1).values() == {"lr": 0.1}
