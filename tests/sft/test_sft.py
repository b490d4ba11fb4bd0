import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lit_models.backbones import FromConfig, FromPretrained
from lit_models.nn.logprobs import position_ids
from lit_models.sft import LitSFT

SGD = partial(torch.optim.SGD, lr=0.1)


def batch(lengths, prompt=2, seed=0, width=None):
    """Right-padded texts of the given lengths whose first `prompt` tokens are not trained."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (len(lengths), width), generator=generator)
    columns = torch.arange(width)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    labels = torch.where((columns >= prompt) & mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(batches):
    return DataLoader(batches, batch_size=None)


def manual_loss(net, rows, reduction="mean"):
    logits = net(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        position_ids=position_ids(rows["attention_mask"]),
    ).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction=reduction)


def joined(batches):
    return {key: torch.cat([rows[key] for rows in batches]) for key in batches[0]}


class Recorder(Callback):
    def __init__(self):
        self.losses, self.tokens, self.sanity = [], [], 0

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.tokens.append(module.step_stats()["tokens"])


@pytest.fixture
def module(tiny_lm):
    built = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm), optimizer=SGD)
    built.configure_model()
    return built


@pytest.fixture
def reference(module):
    return copy.deepcopy(module.net)


def test_training_loss_is_the_mean_over_trained_tokens(module, reference, quiet_trainer):
    rows = batch([9, 4, 6])
    recorder = Recorder()
    assert module.step_stats() == {}
    quiet_trainer(max_steps=1, callbacks=[recorder]).fit(module, loader([rows]))
    assert recorder.losses[0] == pytest.approx(float(manual_loss(reference, rows)), abs=1e-5)
    assert recorder.tokens == [19]


def test_first_prompt_and_padding_tokens_have_no_influence(module):
    module.eval()
    rows = batch([9, 4])
    changed = copy.deepcopy(rows)
    changed["input_ids"][1, 4:] = 77
    module._trainer = None
    nll, counted = module._nll(rows)
    other, _ = module._nll(changed)
    assert counted.sum() == 7 + 2
    assert torch.equal(nll, other)
    assert (nll[~counted] == 0).all()


def test_accumulated_batches_give_the_gradient_of_the_mean_over_all_their_tokens(module, reference, quiet_trainer):
    batches = [batch([9, 8], seed=0), batch([3, 4], seed=1), batch([12, 5], seed=2)]  # last window holds one batch
    quiet_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(batches))
    optimizer = SGD(reference.parameters())
    for window in (batches[:2], batches[2:]):
        tokens = sum(int((rows["labels"] != -100).sum()) for rows in window)
        loss = sum(manual_loss(reference, rows, "sum") for rows in window) / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


def test_clipping_sees_the_rescaled_gradient(module, reference, quiet_trainer):
    batches = [batch([9, 8], seed=0), batch([3, 4], seed=1)]
    quiet_trainer(max_steps=1, accumulate_grad_batches=2, gradient_clip_val=0.05).fit(module, loader(batches))
    tokens = sum(int((rows["labels"] != -100).sum()) for rows in batches)
    (sum(manual_loss(reference, rows, "sum") for rows in batches) / tokens).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    SGD(reference.parameters()).step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(module.net.get_parameter(name), parameter, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_weighs_tokens_not_batches(module, quiet_trainer, stage):
    batches = [batch([12, 11], seed=0, width=12), batch([3], seed=1, width=12)]
    trainer = quiet_trainer()
    for _ in range(2):  # totals start anew
        (metrics,) = getattr(trainer, stage)(module, loader(batches), verbose=False)
    expected = float(manual_loss(module.net, joined(batches)))
    key = "val" if stage == "validate" else "test"
    assert metrics[f"{key}/loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics[f"{key}/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_prediction_rates_rows(module, quiet_trainer):
    rows = batch([9, 4, 2])  # nothing is trained in the last row
    (prediction,) = quiet_trainer().predict(module, loader([rows]))
    single = {key: value[:1] for key, value in rows.items()}
    assert prediction["nll"][0].item() == pytest.approx(float(manual_loss(module.net, single)), abs=1e-5)
    assert prediction["perplexity"][0].item() == pytest.approx(math.exp(prediction["nll"][0]), rel=1e-5)
    assert prediction["tokens"].tolist() == [7, 2, 0]
    assert prediction["nll"][2] == 0


def test_samples_show_texts_without_padding(module, quiet_trainer):
    assert module.samples() == []
    ids = module.tokenizer("A dog<eos>", return_tensors="pt")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 3))
    rows = {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]}
    quiet_trainer().validate(module, loader([rows | {"labels": ids.new_full(padded.shape, -100)}]), verbose=False)
    assert module.samples() == [{"text": "A dog<eos>", "nll": 0.0}]


def test_loss_falls_and_checkpoint_resumes_bitwise(tiny_lm, quiet_trainer, tmp_path):
    def build():
        return LitSFT(
            FromPretrained(str(tiny_lm)), str(tiny_lm), optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)
        )

    batches = [batch([9, 4, 6], seed=seed) for seed in range(4)]
    recorder = Recorder()
    whole = build()
    trainer = quiet_trainer(
        max_epochs=6,
        callbacks=[recorder, ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)],
        enable_checkpointing=True,
    )
    trainer.fit(whole, loader(batches))
    assert recorder.losses[-1] < recorder.losses[0] - 1
    resumed = build()
    quiet_trainer(max_epochs=6).fit(resumed, loader(batches), ckpt_path=tmp_path / "epoch=2.ckpt")
    for (name, one), two in zip(whole.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_missing_padding_token_is_refused_before_training(tiny_lm):
    module = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm), pad_token="<eos>")
    with pytest.raises(ValueError, match=r"pad_token.*another token"):
        module.configure_model()


def test_vocabulary_larger_than_the_model_is_refused(tiny_tokenizer, llama_options):
    backbone = FromConfig("llama", llama_options(vocab_size=200))
    with pytest.raises(ValueError, match=r"model\.tokenizer: .* has 300 tokens, but LlamaForCausalLM embeds only 200"):
        LitSFT(backbone, str(tiny_tokenizer)).configure_model()


def test_configure_model_runs_once(module):
    net = module.net
    module.configure_model()
    assert module.net is net
    assert net.training
    assert net.config.pad_token_id == 0
