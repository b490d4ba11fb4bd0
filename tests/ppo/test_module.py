"""LitPPO under the Trainer: updates, resume, checkpoints, processes."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_models.backbones import FromModule, FromPretrained, LoRA
from lit_models.base import CheckpointMismatchError, GroupOptions, LitBase
from lit_models.nn import WarmupLinear
from lit_models.ppo import (
    GAE,
    FunctionReward,
    KLPenalty,
    LitPPO,
    PPOLoss,
    RewardModel,
    Sampler,
    ScoreOptions,
    Updates,
)


class Prompts(Dataset):
    def __init__(self, rows=24):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, 100, (rows, 4), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"prompt_ids": self.ids[row], "prompt_mask": torch.ones(4, dtype=torch.long)}


def loader(batch_size=8, world=1, rank=0):
    data = Prompts()
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    return DataLoader(data, batch_size, sampler=sampler)


def module(tiny_lm, tiny_reward, tiny_tokenizer, **options):
    settings = {
        "actor": FromPretrained(str(tiny_lm)),
        "tokenizer": str(tiny_tokenizer),
        "rewards": [RewardModel(FromPretrained(str(tiny_reward)))],
        "generator": Sampler(max_new_tokens=6),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "scores": ScoreOptions(clip=2.5),
    }
    return LitPPO(**(settings | options))


@pytest.fixture
def make(tiny_lm, tiny_reward, tiny_tokenizer):
    return partial(module, tiny_lm, tiny_reward, tiny_tokenizer)


def trainer(tmp_path, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(settings | options))


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_updates_both_networks_and_leaves_the_others(make, tmp_path):
    model = make()
    model.configure_model()
    before = weights(model.actor), weights(model.critic), weights(model.reference), weights(model.reward_networks)
    run = trainer(tmp_path)
    run.fit(model, loader())
    assert run.global_step == 3
    assert model.rollouts == 3
    after = weights(model.actor), weights(model.critic), weights(model.reference), weights(model.reward_networks)
    assert any(not torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert any(not torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert_equal_weights(before[2], after[2])
    assert_equal_weights(before[3], after[3])


def test_logs_the_promised_keys(make, tmp_path):
    run = trainer(tmp_path)
    run.fit(make(), loader())
    promised = """score/mean score/std score/min score/max reward/total kl/ref kl/old_new kl/coef
        policy/loss policy/clip_frac
        policy/entropy policy/ratio_mean policy/ratio_max policy/grad_norm policy/lr value/loss
        value/clip_frac value/mean
        value/explained_variance value/grad_norm value/lr adv/mean adv/std return/mean return/std response/len_mean
        response/len_max response/eos_frac response/truncated_frac time/generate time/score time/update tokens_per_s"""
    assert set(promised.split()) <= set(run.callback_metrics)
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


def test_checkpoint_holds_actor_and_critic_only(make, tmp_path):
    model, run = make(), trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"actor", "critic"}
    count = sum(parameter.numel() for network in (model.actor, model.critic) for parameter in network.parameters())
    size = (tmp_path / "a.ckpt").stat().st_size
    assert size < 1.35 * 12 * count  # weights and two moments in float32


def test_single_update_takes_old_values_from_its_own_forward_pass(make, tmp_path):
    """One forward pass for scoring and updating gives the weights that two passes give."""
    results = []
    for updates in (Updates(), Updates(micro_batch_size=4)):
        model = make(updates=updates)
        trainer(tmp_path).fit(model, loader())
        results.append(weights(model.actor))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-4)


def test_resume_from_a_checkpoint_is_bitwise_exact(make, tmp_path):
    options = {
        "updates": Updates(epochs=2, minibatch_size=4, micro_batch_size=2),
        "lr_scheduler": partial(WarmupLinear, total=20, warmup=2),
    }
    whole = make(**options)
    trainer(tmp_path, max_epochs=3).fit(whole, loader())
    first, run = make(**options), trainer(tmp_path, max_epochs=2)
    first.adapt_kl = lambda *args: None
    run.fit(first, loader())
    first.kl_coef = 0.05
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = make(**options)
    trainer(tmp_path, max_epochs=3).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert second.rollouts == whole.rollouts == 9
    assert_equal_weights(weights(whole.actor), weights(second.actor))
    assert_equal_weights(weights(whole.critic), weights(second.critic))


def test_kl_coefficient_survives_a_resume(make, tmp_path):
    model, run = make(), trainer(tmp_path)
    run.fit(model, loader())
    model.adapt_kl(target=0.001, horizon=10)
    assert model.kl_coef != 0.05
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.kl_coef == model.kl_coef
    assert loaded.rollouts == 3


def test_reference_of_a_model_in_memory_is_saved(make, tmp_path, tiny_lm):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype="float32")
    model, run = make(actor=FromModule(lm)), trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_equal_weights(weights(lm), weights(loaded.reference))
    assert_equal_weights(weights(model.actor), weights(loaded.actor))


def test_adapters_make_the_reference_and_are_all_that_is_saved(make, tmp_path, tiny_lm):
    actor = FromPretrained(str(tiny_lm), lora=LoRA(r=2, alpha=4))
    model, run = make(actor=actor), trainer(tmp_path)
    run.fit(model, loader())
    assert model.reference is None
    assert float(run.callback_metrics["kl/ref"]) != 0
    run.save_checkpoint(tmp_path / "a.ckpt")
    names = [
        name for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"] if name.startswith("actor")
    ]
    assert names
    assert all("lora_" in name for name in names)
    again = make(actor=actor)
    trainer(tmp_path, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt")


def test_critic_warmup_leaves_the_actor(make, tmp_path):
    model = make(critic_warmup_rollouts=3, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0))
    model.configure_model()
    actor, critic = weights(model.actor), weights(model.critic)
    trainer(tmp_path).fit(model, loader())
    assert_equal_weights(actor, weights(model.actor))
    assert any(not torch.equal(critic[name], value) for name, value in weights(model.critic).items())


def test_huge_kl_coefficient_keeps_the_policy_at_the_reference(make, tmp_path):
    losses = {}
    for coef in (0.0, 10.0):
        model = make(shapers=[KLPenalty(coef)], optimizer=partial(torch.optim.Adam, lr=3e-3))
        run = trainer(tmp_path, max_epochs=6)
        run.fit(model, loader())
        losses[coef] = abs(float(run.callback_metrics["kl/ref"]))
    assert losses[10.0] < 0.5
    assert losses[10.0] < losses[0.0]


def test_groups_have_their_own_rates_and_vectors_do_not_decay(make):
    model = make(actor_group=GroupOptions(lr=1e-4), critic_group=GroupOptions(lr=2e-4, weight_decay=0.3))
    model.configure_model()
    optimizer = model.configure_optimizers()
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"actor", "actor_no_decay", "critic", "critic_no_decay"}
    assert (groups["actor"]["lr"], groups["critic"]["lr"]) == (1e-4, 2e-4)
    assert (groups["critic"]["weight_decay"], groups["critic_no_decay"]["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim > 1 for parameter in groups["actor"]["params"])


def test_max_rollouts_stops(make, tmp_path):
    model = make(max_rollouts=2, updates=Updates(epochs=2))
    run = trainer(tmp_path, max_epochs=5)
    run.fit(model, loader())
    assert model.rollouts == 2
    assert run.global_step == 4


def test_pretraining_loss_pulls_towards_the_texts(make, tmp_path):
    texts = torch.randint(3, 100, (8, 10), generator=torch.Generator().manual_seed(9))
    ptx = [{"input_ids": texts, "attention_mask": torch.ones_like(texts), "labels": texts}] * 3
    results = []
    for coef in (0.0, 20.0):
        model = make(ptx_coef=coef)
        from lightning.pytorch.utilities import CombinedLoader

        run = trainer(tmp_path, max_epochs=4)
        run.fit(model, CombinedLoader({"prompt": loader(), "ptx": DataLoader(ptx, batch_size=None)}, "max_size_cycle"))
        logits = model.actor(texts).logits[:, :-1]
        results.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())))
    assert results[1] < results[0] - 0.05


def test_validation_test_and_prediction(make, tmp_path):
    model, run = make(eval_temperature=0.0, predict_samples=2), trainer(tmp_path)
    run.validate(model, loader(), verbose=False)
    assert {"val/score", "val/kl", "val/length", "val/eos_frac"} <= set(run.callback_metrics)
    rows = [row for batch in run.predict(model, loader()) for row in batch]
    assert len(rows) == 24
    assert all(len(row["responses"]) == len(row["scores"]) == 2 for row in rows)
    assert rows[0]["responses"][0] == rows[0]["responses"][1]  # greedy
    assert model.generator.temperature == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"loss": PPOLoss(norm="sequence", dual_clip=3.0, clip_high=0.28, entropy_coef=0.01)},
        {
            "loss": PPOLoss(norm="micro_batch", value_clip=None),
            "advantage": GAE(whiten_advantages=True, whiten_rewards=True),
        },
        {"shapers": [KLPenalty(0.1, "k3", "loss")], "samples_per_prompt": 2, "logprob_temperature": 1.0},
        {"scores": ScoreOptions(position="after_last", missing_eos_penalty=1.0), "zero_critic_head": True},
    ],
)
def test_options_train_with_finite_losses(make, tmp_path, options):
    run = trainer(tmp_path)
    run.fit(make(updates=Updates(epochs=2, minibatch_size=6, micro_batch_size=2), **options), loader())
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


def test_bfloat16_mixed_trains_on_the_cpu(make, tmp_path):
    model = make()
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(model, loader())
    assert next(model.actor.parameters()).dtype == torch.float32
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


def test_float16_is_refused_before_training(make, tmp_path):
    model = make()
    run = trainer(tmp_path)
    model._trainer = run
    run.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match=r"trainer\.precision.*bf16-mixed"):
        model.on_fit_start()


def test_a_checkpoint_of_another_model_is_refused(make, tmp_path):
    run, model = trainer(tmp_path), make()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    saved["state_dict"] = {name.replace("actor", "policy"): value for name, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointMismatchError, match="of another model than LitPPO"):
        trainer(tmp_path, max_epochs=2).fit(make(), loader(), ckpt_path=tmp_path / "b.ckpt")


def test_a_tokenizer_larger_than_the_model_is_refused(make, tiny_lm):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tiny_lm)
    lm.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"tokenizer.*embeds only 50"):
        make(actor=FromModule(lm)).configure_model()


def test_no_rewards_is_refused(make):
    with pytest.raises(ValueError, match=r"model\.rewards is empty"):
        make(rewards=[])


def test_nan_reward_stops_before_the_update(make, tmp_path):
    def nan(rollout):
        return [float("nan")] * len(rollout)

    model = make(rewards=[FunctionReward(nan)])
    model.configure_model()
    before = weights(model.actor)
    with pytest.raises(FloatingPointError, match="NaN for the text"):
        trainer(tmp_path).fit(model, loader())
    assert_equal_weights(before, weights(model.actor))


class GlobalBatches(L.LightningDataModule):
    """The same global batches for any number of processes."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return loader(self.size // world, world, rank)


def test_average_of_the_actor_is_saved_loaded_and_exported(make, tmp_path):
    model, run = make(), trainer(tmp_path)
    model.enable_ema(0.9)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.rollouts == 3
    assert_equal_weights(weights(model.ema), weights(loaded.ema))
    assert any(not torch.equal(value, weights(model.actor)[name]) for name, value in weights(model.ema).items())
    assert set(loaded.export_pretrained(tmp_path / "out")) == {"actor", "critic", "ema"}


@pytest.mark.parametrize(
    ("updates", "limits", "steps"),
    [
        (Updates(), {"max_epochs": 2}, 6),
        (Updates(epochs=2, minibatch_size=4), {"max_epochs": 2}, 24),
        (Updates(epochs=2, minibatch_size=3), {"max_epochs": 1}, 18),
        (Updates(epochs=2), {"max_steps": 5, "max_epochs": None}, 5),
    ],
)
def test_a_schedule_without_a_total_ends_with_the_run(make, tmp_path, updates, limits, steps):
    model, run = make(updates=updates, lr_scheduler=partial(WarmupLinear, warmup=0.5)), trainer(tmp_path, **limits)
    data = GlobalBatches(8)
    data.batch_size = 8
    run.fit(model, datamodule=data)
    assert model.lr_schedulers().total == steps
    if "max_steps" not in limits:
        assert run.global_step == steps
        assert model.optimizers().param_groups[0]["lr"] == 0.0
