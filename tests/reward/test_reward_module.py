import copy
import json
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lit_models.backbones import FromConfig, FromPretrained
from lit_models.base import LitBase
from lit_models.reward import LitRewardModel, RewardLoss

SGD = partial(torch.optim.SGD, lr=0.1)
METRICS = ("loss", "accuracy", "chosen_mean", "rejected_mean", "margin")


def pairs(count, seed=0, width=12, prompt=2):
    """Batch of right-padded pairs that share their first tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (2 * count, width), generator=generator)
    ids[count:, :prompt] = ids[:count, :prompt]
    lengths = torch.randint(prompt + 1, width + 1, (2 * count,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def loader(batches):
    return DataLoader(batches, batch_size=None)


def end_scores_by_transformers(model, rows):
    return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, 0]


@pytest.fixture
def module(tiny_reward):
    built = LitRewardModel(FromPretrained(str(tiny_reward)), str(tiny_reward), optimizer=SGD)
    built.configure_model()
    return built


def expected_metrics(model, batches):
    sides = [end_scores_by_transformers(model, rows).detach().chunk(2) for rows in batches]
    chosen, rejected = (torch.cat(side) for side in zip(*sides, strict=True))
    return {
        "loss": -logsigmoid(chosen - rejected).mean(),
        "accuracy": (chosen > rejected).float().mean(),
        "chosen_mean": chosen.mean(),
        "rejected_mean": rejected.mean(),
        "margin": (chosen - rejected).mean(),
    }, torch.cat([chosen, rejected])


def test_statistics_of_the_source_are_taken_over(module):
    assert (module.reward_mean, module.reward_std) == (0.5, 2.0)


@pytest.mark.parametrize(("stage", "key"), [("validate", "val"), ("test", "test")])
def test_evaluation_weighs_pairs_not_batches(module, quiet_trainer, stage, key):
    batches = [pairs(5, seed=0), pairs(1, seed=1)]
    trainer = quiet_trainer()
    for _ in range(2):  # totals start anew
        (metrics,) = getattr(trainer, stage)(module, loader(batches), verbose=False)
    expected, scores = expected_metrics(module.net.model, batches)
    assert metrics == pytest.approx({f"{key}/{name}": float(expected[name]) for name in METRICS}, abs=1e-5)
    if stage == "validate":
        assert module.reward_mean == pytest.approx(float(scores.mean()), abs=1e-5)
        assert module.reward_std == pytest.approx(float(scores.std()), abs=1e-5)
        assert module.net.model.config.reward_mean == module.reward_mean
        assert module.net.model.config.reward_std == module.reward_std
    else:
        assert (module.reward_mean, module.reward_std) == (0.5, 2.0)


def test_equal_scores_are_no_success(module, quiet_trainer):
    rows = pairs(3)
    same = {key: torch.cat([value[:3], value[:3]]) for key, value in rows.items()}
    (metrics,) = quiet_trainer().validate(module, loader([same]), verbose=False)
    assert metrics["val/accuracy"] == 0
    assert metrics["val/margin"] == 0


def test_sanity_check_leaves_the_statistics(module, quiet_trainer):
    batches = loader([pairs(2)])
    quiet_trainer(max_epochs=0, num_sanity_val_steps=1).fit(module, batches, batches)
    assert (module.reward_mean, module.reward_std) == (0.5, 2.0)


def test_statistics_travel_with_checkpoint_and_export(module, quiet_trainer, tmp_path, tiny_reward):
    trainer = quiet_trainer()
    trainer.validate(module, loader([pairs(4)]), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitBase.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(loaded, LitRewardModel)
    assert (loaded.reward_mean, loaded.reward_std) == (module.reward_mean, module.reward_std)
    folder = loaded.export_pretrained(tmp_path)["model"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (module.reward_mean, module.reward_std)
    again = FromPretrained(str(folder)).build_scorer()
    assert again.model.config.reward_mean == module.reward_mean


def test_fresh_scorer_has_no_statistics_until_it_is_validated(tiny_tokenizer, llama_options, quiet_trainer, tmp_path):
    module = LitRewardModel(FromConfig("llama", llama_options()), str(tiny_tokenizer))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader([pairs(2)]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitRewardModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.reward_mean, loaded.reward_std) == (0.0, 1.0)
    assert not hasattr(loaded.net.model.config, "reward_mean")


def test_training_step_is_the_bradley_terry_gradient(module, quiet_trainer):
    rows = pairs(3) | {"margin": torch.tensor([0.0, 0.5, 1.0])}
    reference = copy.deepcopy(module.net.model)
    chosen, rejected = end_scores_by_transformers(reference, rows).chunk(2)
    loss = -logsigmoid(chosen - rejected - rows["margin"]).mean() + 0.1 * (chosen + rejected).square().mean()
    loss.backward()
    SGD(reference.parameters()).step()
    module.loss = RewardLoss(center_coefficient=0.1)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader([rows]))
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()), abs=1e-5)
    assert module.step_stats() == {"tokens": float(rows["attention_mask"].sum())}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.model.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["end_token", "per_token"])
def test_accuracy_rises_on_learnable_pairs(kind, tiny_tokenizer, llama_options, quiet_trainer):
    torch.manual_seed(0)
    batches = [pairs(8, seed=seed) for seed in range(4)]
    for rows in batches:  # good texts end with one token, bad ones with another
        ends = rows["attention_mask"].sum(1) - 1
        rows["input_ids"].scatter_(1, ends[:, None], torch.tensor([10] * 8 + [11] * 8)[:, None])
    module = LitRewardModel(
        FromConfig("llama", llama_options()),
        str(tiny_tokenizer),
        loss=RewardLoss(kind),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(module, loader(batches), loader(batches))
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    assert trainer.callback_metrics["val/loss"] < 0.5


def test_resume_is_bitwise(tiny_lm, quiet_trainer, tmp_path):
    def build():
        torch.manual_seed(0)
        backbone = FromPretrained(str(tiny_lm))
        return LitRewardModel(backbone, str(tiny_lm), optimizer=partial(torch.optim.AdamW, lr=1e-3))

    batches = [pairs(2, seed=seed) for seed in range(3)]
    whole, resumed = build(), build()
    saving = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    quiet_trainer(max_epochs=3, callbacks=[saving], enable_checkpointing=True).fit(whole, loader(batches))
    torch.manual_seed(7)
    quiet_trainer(max_epochs=3).fit(resumed, loader(batches), ckpt_path=tmp_path / "epoch=0.ckpt")
    for (name, one), two in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_prediction_and_samples(module, quiet_trainer):
    assert module.samples() == []
    rows = pairs(6)
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    chosen, rejected = end_scores_by_transformers(module.net.model.eval(), rows).detach().chunk(2)
    torch.testing.assert_close(prediction["chosen"], chosen)
    torch.testing.assert_close(prediction["rejected"], rejected)
    quiet_trainer().validate(module, loader([rows]), verbose=False)
    samples = module.samples()
    assert len(samples) == 4
    length = int(rows["attention_mask"][7].sum())
    assert samples[1]["rejected"] == module.tokenizer.decode(rows["input_ids"][7, :length])
    assert samples[1]["rejected_score"] == pytest.approx(float(rejected[1]), abs=1e-5)
    assert samples[1]["chosen_score"] == pytest.approx(float(chosen[1]), abs=1e-5)


def test_texts_are_scored_at_their_end_token(module):
    texts = ["A dull film", "A funny, warm and clever film", "A dull film<eos>"]
    scores = module.score_texts(texts, batch_size=2)
    ids = module.tokenizer("A funny, warm and clever film<eos>", return_tensors="pt")
    with torch.no_grad():
        alone = module.net.model.eval()(**{key: ids[key] for key in ("input_ids", "attention_mask")}).logits[0, 0]
    assert scores[1].item() == pytest.approx(alone.item(), abs=1e-5)
    assert scores[0].item() == pytest.approx(scores[2].item(), abs=1e-6)
    assert scores.dtype == torch.float32


def test_texts_are_scored_without_dropout_and_training_goes_on(tiny_tokenizer):
    gpt2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    module = LitRewardModel(FromConfig("gpt2", gpt2), str(tiny_tokenizer))
    first, second = module.score_texts(["A film"]), module.score_texts(["A film"])
    assert torch.equal(first, second)
    assert module.net.training


def test_opening_padding_token_does_not_end_a_text(tiny_reward, quiet_trainer):
    module = LitRewardModel(
        FromPretrained(str(tiny_reward)), str(tiny_reward), loss=RewardLoss(num_padding_at_beginning=1)
    )
    rows = pairs(3, prompt=1)
    rows["input_ids"][:, 0] = 0
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    module.loss = RewardLoss()
    (by_mask,) = quiet_trainer().predict(module, loader([rows]))
    assert torch.equal(prediction["chosen"], by_mask["chosen"])
    assert torch.equal(prediction["rejected"], by_mask["rejected"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "last"}, "loss.kind must be end_token or per_token"),
        ({"center_coefficient": -1.0}, "center_coefficient must be at least 0"),
        ({"kind": "per_token", "center_coefficient": 0.1}, "center_coefficient needs model.loss.kind end_token"),
        ({"num_padding_at_beginning": -1}, "num_padding_at_beginning must be at least 0"),
    ],
)
def test_contradicting_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RewardLoss(**options)


def test_margins_need_the_end_token_loss(module, quiet_trainer):
    module.loss = RewardLoss("per_token")
    rows = pairs(2) | {"margin": torch.ones(2)}
    with pytest.raises(ValueError, match=r"loss\.kind: per_token knows no margins"):
        quiet_trainer(max_steps=1).fit(module, loader([rows]))
