"""The recorder on causal language models of transformers: losses, accuracy, BLEU and ROUGE-L of answers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from callbacks.dynamics import TrainingDynamicsRecorder
from callbacks.recorder.causal import Accuracy, CausalOutputs
from lit_models.recording import DynamicsRun
from tests.callbacks.tiny import trainer

ROOT = Path(__file__).parents[2]
LENGTHS = [(3, 2), (6, 1), (2, 4), (5, 2), (4, 1)]
"""Tokens of prompt and answer."""


class Rows(Dataset):
    """Token ids with a prompt and an answer each."""

    def __init__(self, num: int, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.rows = []
        for number in range(num):
            prompt, answer = LENGTHS[number % len(LENGTHS)]
            ids = torch.randint(3, 300, (prompt + answer,), generator=draw)
            labels = ids.clone()
            labels[:prompt] = -100
            self.rows.append({"id": number, "input_ids": ids, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Pad:
    """Padding on either side."""

    def __init__(self, left=False):
        self.left = left

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)

        def pad(row, value):
            size = width - len(row)
            return F.pad(row, (size, 0) if self.left else (0, size), value=value)

        return {
            "id": torch.tensor([row["id"] for row in rows]),
            "input_ids": torch.stack([pad(row["input_ids"], 0) for row in rows]),
            "attention_mask": torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in rows]),
            "labels": torch.stack([pad(row["labels"], -100) for row in rows]),
        }


class LM(LightningModule):
    """Any module with a language model inside."""

    def __init__(self, folder, kind="llama", left=False):
        super().__init__()
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

        self.folder, self.left = folder, left
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if kind == "llama":
            self.net = AutoModelForCausalLM.from_pretrained(folder).train()
        else:  # with dropout
            torch.manual_seed(0)
            sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
            self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).train()

    def training_step(self, batch, batch_idx):
        return self.net(**{key: value for key, value in batch.items() if key != "id"}).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(Rows(12), batch_size=4, collate_fn=Pad(self.left))


def fit(folder, model, record=True, **options):
    seed_everything(5, verbose=False)
    defaults = {"test_dataset": Rows(7, seed=1), "max_eval_batch_size": 3}
    made = [TrainingDynamicsRecorder(str(folder / "run"), **(defaults | options))] if record else []
    trainer(folder, callbacks=made, max_epochs=1, limit_val_batches=0).fit(model)
    return DynamicsRun.open(folder / "run") if record else None


def own_losses(net, rows):
    with torch.no_grad():
        return [float(net(row["input_ids"][None], labels=row["labels"][None]).loss) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("left", [False, True])
def test_loss_is_the_mean_over_the_answer_of_each_example(tiny_lm, tmp_path, kind, left):
    model = LM(tiny_lm, kind, left)
    before = own_losses(LM(tiny_lm, kind).net.eval(), Rows(7, seed=1))
    run = fit(tmp_path, model)
    np.testing.assert_allclose(run.values()[0], before, rtol=1e-4)
    np.testing.assert_allclose(run.values()[-1], own_losses(model.net.eval(), Rows(7, seed=1)), rtol=1e-4)
    assert run.rec_step.tolist() == [0, 1, 2, 3]
    assert [row.tolist() for row in run.ids] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_training_goes_on_as_without_it_even_where_answers_are_drawn(tiny_lm, tmp_path):
    drawn = {"sample": True, "max_new_tokens": 4, "temperature": 2.0}
    metrics = {"loss": None, "accuracy": None, "bleu": drawn | {"every_n_steps": 2}, "rougeL": drawn}
    with_it, without = LM(tiny_lm, "gpt2"), LM(tiny_lm, "gpt2")
    run = fit(tmp_path / "a", with_it, metrics=metrics)
    fit(tmp_path / "b", without, record=False)
    assert all(torch.equal(*pair) for pair in zip(with_it.parameters(), without.parameters(), strict=True))
    again = fit(tmp_path / "c", LM(tiny_lm, "gpt2"), metrics=metrics)
    for metric in metrics:
        np.testing.assert_array_equal(run.values(metric), again.values(metric))
    assert run.rec_step[run.measured("bleu").all(1)].tolist() == [0, 2, 3]


def test_an_example_without_an_answer_has_no_loss(tiny_lm, tmp_path):
    rows = Rows(3, seed=1)
    rows.rows[1]["labels"].fill_(-100)
    with pytest.warns(UserWarning, match="loss of test 1 is NaN at step 0"):
        run = fit(tmp_path, LM(tiny_lm), test_dataset=rows, metrics={"loss": None, "accuracy": None})
    assert np.isnan(run.values("loss")).tolist() == [[False, True, False]] * 4
    assert np.isnan(run.values("accuracy")).tolist() == [[False, True, False]] * 4


def outputs(folder, left=False, num=7, **changes):
    module = LM(folder).eval()
    return CausalOutputs(module.net, Pad(left)([*Rows(num, seed=1)]) | changes, module, 0, False)


@pytest.mark.parametrize("left", [False, True])
def test_accuracy_without_choices_asks_for_the_likeliest_tokens(tiny_lm, left):
    made = outputs(tiny_lm, left)
    with torch.no_grad():
        for row in range(0, 7, 2):  # put there what the model says, token by token
            for place in (made.labels[row] != -100).nonzero().flatten().tolist():
                made.ids[row, place] = made.labels[row, place] = made.forward(made.ids, made.mask)[
                    row, place - 1
                ].argmax()
        assert Accuracy()(made).tolist() == [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 2, 3)])
def test_accuracy_with_choices_takes_the_likeliest_answer(tiny_lm, left, normalize, lengths):
    draw = torch.Generator().manual_seed(2)
    choices = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in lengths]
    rows = []
    for number, row in enumerate(Rows(6, seed=1)):
        prompt = row["input_ids"][row["labels"] == -100]
        answer = torch.tensor(choices[number % 3] + [2])  # ended by another token
        labels = torch.cat([torch.full_like(prompt, -100), answer])
        rows.append({"id": number, "input_ids": torch.cat([prompt, answer]), "labels": labels})
    module = LM(tiny_lm).eval()
    with torch.no_grad():
        made = CausalOutputs(module.net, Pad(left)(rows), module, 0, False)
        result = Accuracy(choices, normalize=normalize)(made)
        expected = []
        for number, row in enumerate(rows):
            prompt = row["input_ids"][row["labels"] == -100]
            scores = []
            for choice in choices:
                ids = torch.cat([prompt, torch.tensor(choice)])[None]
                logs = module.net(ids).logits[0].log_softmax(-1)
                picked = [logs[len(prompt) + k - 1, token] for k, token in enumerate(choice)]
                scores.append(float(sum(picked)) / (len(choice) if normalize else 1))
            expected.append(float(np.argmax(scores) == number % 3))
    assert result.tolist() == expected
    assert 0 < sum(expected) < 6


def test_choices_as_texts_and_answers_that_are_none_of_them(tiny_lm):
    made = outputs(tiny_lm, num=1)
    tokens = made.module.tokenizer("dog", add_special_tokens=False)["input_ids"]
    row = {"id": 0, "input_ids": torch.tensor([5, 6, *tokens]), "labels": torch.tensor([-100, -100, *tokens])}
    with torch.no_grad():
        fine = CausalOutputs(made.network, Pad()([row]), made.module, 0, False)
        assert Accuracy(["dog", "film"])(fine).tolist() in ([0.0], [1.0])
        with pytest.raises(
            ValueError, match=r"metrics\.accuracy\.choices: the answer with the token ids .* is none of"
        ):
            Accuracy(["film", "music"])(fine)


def test_answers_without_a_prompt(tiny_lm):
    from callbacks.recorder.causal import RougeL

    tokens = torch.tensor([5, 6, 7])
    rows = [{"id": 0, "input_ids": tokens, "labels": tokens}, {"id": 1, "input_ids": tokens, "labels": tokens.clone()}]
    rows[1]["labels"][:1] = -100
    module = LM(tiny_lm).eval()
    with torch.no_grad():
        for left in (False, True):
            made = CausalOutputs(module.net, Pad(left)(rows), module, 0, False)
            assert made.prompted.tolist() == [False, True]
            assert np.isnan(Accuracy([[5], [6]])(made)).tolist() == [True, False]
            assert np.isnan(Accuracy([[5, 6], [6]])(made)).tolist() == [True, False]
            assert len(RougeL(2)(made)) == 2


def test_texts_are_compared_with_targets(tiny_lm):
    from callbacks.recorder.causal import BLEU, RougeL

    made = outputs(tiny_lm, num=3)
    with torch.no_grad():
        options = (8, False, 0.95, 0.2)
        generated = made.texts(made.module.tokenizer, *options)
        alone = []
        for prompt in made.prompts():
            out = made.network.generate(prompt[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
            alone.append(made.module.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
        assert generated == alone
        made._texts[options] = ["the cat sat on the mat", "a dog", "a dog"]
        made.batch["target"] = ["the cat sat on the mat", "nothing like it", ""]
        assert BLEU(8)(made).tolist() == pytest.approx([100, 0, 0], abs=1e-3)
        assert RougeL(8)(made).tolist() == pytest.approx([1, 0, 0])
        del made.batch["target"]
        tokens = made.module.tokenizer("a dog", return_tensors="pt")["input_ids"][0]
        made.labels = torch.cat([torch.full((3, 2), -100), tokens.expand(3, -1)], 1)
        made._texts[options] = ["a dog", "a film", "no"]
        assert RougeL(8)(made).tolist() == pytest.approx([1, 0.5, 0])
    assert BLEU().score("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(100)
    assert 0 < BLEU().score("the cat sat on a mat", "the cat sat on the mat") < 100
    assert RougeL().score("the cat sat", "the cat is sat") == pytest.approx(6 / 7)


def test_loss_and_accuracy_share_a_forward_pass_and_texts_one_generation(tiny_lm, tmp_path):
    model = LM(tiny_lm)
    forwards, generations = [], []
    forward, generate = model.net.forward, model.net.generate

    def counted(*args, **options):
        forwards.append(model.net.training)
        return forward(*args, **options)

    def counted_generation(*args, **options):
        generations.append(options["max_new_tokens"])
        return generate(*args, **options)

    model.net.forward, model.net.generate = counted, counted_generation
    fit(
        tmp_path / "a",
        model,
        metrics={"loss": None, "accuracy": None},
    )
    assert forwards.count(False) == 4 * 3  # 4 records of 3 batches
    fit(
        tmp_path / "b", model, metrics={"bleu": {"max_new_tokens": 2}, "rougeL": {"max_new_tokens": 2}}, every_n_steps=3
    )
    assert generations == [2] * 6


def test_modules_with_metrics_of_their_own_get_the_others_too(tiny_lm, tmp_path):
    class Own(LM):
        def per_example_metrics(self, batch):
            return {"loss": torch.arange(len(batch["id"])).float()}

    run = fit(tmp_path, Own(tiny_lm), metrics={"loss": None, "accuracy": None, "rougeL": {"max_new_tokens": 2}})
    assert set(run.values("loss").flatten().tolist()) <= {0.0, 1.0, 2.0}
    assert run.measured("rougeL").all()


def test_batches_that_are_no_texts(tiny_lm, tmp_path):
    class Other(LM):
        def train_dataloader(self):
            return DataLoader([{"id": 0, "x": 1.0}], batch_size=1)

    tests = [{"id": 0, "x": 1.0}]
    with pytest.raises(ValueError, match=r"need `input_ids` and `labels`, got \['id', 'x'\]"):
        fit(tmp_path, Other(tiny_lm), test_dataset=tests)


def test_texts_need_a_tokenizer(tiny_lm, tmp_path):
    model = LM(tiny_lm)
    del model.tokenizer
    with pytest.raises(ValueError, match="LM has no tokenizer; set `tokenizer` there"):
        fit(tmp_path / "a", model, metrics={"bleu": None})
    run = fit(tmp_path / "b", model, metrics={"bleu": {"tokenizer": str(tiny_lm), "max_new_tokens": 2}})
    assert run.measured("bleu").all()


def test_our_fine_tuning_is_recorded_as_it_is(tiny_lm, tmp_path):
    from datamodules import InstructionData
    from lit_models import FromPretrained
    from lit_models.sft import LitSFT

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"q": "a film of {number}", "a": " good {number}"}}\n' for number in range(9)))
    data = InstructionData(
        str(texts), str(tiny_lm), prompt_column="q", completion_column="a", batch_size=2, val_split="train"
    )
    model = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    recorder = TrainingDynamicsRecorder(str(tmp_path / "run"), test_dataloader="val", id_source="sampler")
    seed_everything(1, verbose=False)
    trainer(tmp_path, callbacks=[recorder], max_epochs=1).fit(model, datamodule=data)
    run = DynamicsRun.open(tmp_path / "run", strict=True)
    assert run.values().shape == (5, 9)
    assert not np.isnan(run.values()).any()
    assert sorted(run.ids.values.tolist()) == sorted(set(run.ids.values.tolist()))
    assert run.values()[-1].mean() < run.values()[0].mean()


SHARDED = """
import sys
import lit_models._compat
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from callbacks.dynamics import TrainingDynamicsRecorder
from tests.callbacks.test_text_dynamics import LM, Rows

class Sharded(LM):
    def configure_model(self):
        if self.device_mesh is not None:
            for layer in self.net.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

seed_everything(5, verbose=False)
folder, lm, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
recorder = TrainingDynamicsRecorder(
    folder, test_dataset=Rows(7, seed=1), max_eval_batch_size=2, grad_norm=True,
    metrics={"loss": None, "rougeL": {"max_new_tokens": 2, "every_n_steps": 2}},
)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if devices == 2 else "auto"
Trainer(
    accelerator="cpu", devices=devices, strategy=strategy, callbacks=[recorder], max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=True,
).fit(Sharded(lm))
"""


@pytest.mark.slow
def test_sharded_networks(tiny_lm, tmp_path, free_port):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    command = [sys.executable, *launcher, str(script), str(tmp_path / "pair"), str(tiny_lm), "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = DynamicsRun.open(tmp_path / "pair", strict=True)
    assert run.values().shape == (3, 7)
    assert run.measured("loss").all()
    assert run.measured("rougeL").all(1).tolist() == [True, False, True]
    np.testing.assert_allclose(run.values()[0], own_losses(LM(tiny_lm).net.eval(), Rows(7, seed=1)), rtol=1e-4)
    assert run.ids.sizes.tolist() == [8, 4]
    assert sorted(run.ids.values.tolist()) == list(range(12))
    assert np.isfinite(run.grad_norm).all()
