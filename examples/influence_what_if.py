"""What would a classifier know without these twenty sentences? A simulator answers first, and then training itself.

`python examples/influence_what_if.py [FOLDER]` takes a minute on a CPU. `Sentiment` is a module as anybody may have it,
with a plain `DataLoader` and nothing of this collection. Short fits on parts of a pool of film-review sentences are
recorded; a simulator learns from them what each sentence does to the losses of test sentences; then it is asked about
fits that never took place. Those are done after all, to compare.
"""

import logging
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers.utils.logging import disable_progress_bar

from callbacks.dynamics import TrainingDynamicsRecorder
from datamodules.dynamics import DynamicsData
from datamodules.snippets import load_snippets
from lit_models.influence import LitInfluence, SimulatorOptions
from lit_models.influence.counterfactual import Change, leave_out, rank, simulate, what_if
from lit_models.influence.curricula import mean_of_runs, read_run
from lit_models.influence.plots import plot_change, plot_trajectories
from lit_models.recording import find_runs, write_examples

WORDS, WIDTH = 1500, 16
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


# -- what the user has: a module, data, a way to train -----------------------------------------------------------------


class Sentiment(LightningModule):
    """Mean of word vectors, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, words):
        """(n, length) int64, 0 at padding -> (n, 2)."""
        return self.head(self.words(words))

    def training_step(self, batch, batch_idx):
        """Cross entropy of a batch."""
        words, labels = batch
        return F.cross_entropy(self(words), labels)

    def configure_optimizers(self):
        """Adam, down to a rate of 0."""
        optimizer = torch.optim.Adam(self.parameters(), lr=0.005)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sentences(split, count):
    """Clearly good and clearly bad sentences."""
    return [snippet for snippet in load_snippets(split) if abs(snippet.rating) > 0.7][:count]


def dataset(snippets, length=24):
    """Words (n, length) and labels (n,)."""
    words = Counter(word for snippet in load_snippets("train") for word in snippet.text.lower().split())
    numbers = {word: number for number, (word, _) in enumerate(words.most_common(WORDS - 1), 1)}
    rows = torch.zeros(len(snippets), length, dtype=torch.int64)
    for row, snippet in zip(rows, snippets, strict=True):
        known = [numbers[word] for word in snippet.text.lower().split() if word in numbers][:length]
        row[: len(known)] = torch.tensor(known, dtype=torch.int64)
    return TensorDataset(rows, torch.tensor([int(snippet.rating > 0) for snippet in snippets]))


def batches(pool, part, size, epochs, seed):
    """Rows of each batch of a fit on a part of the pool that leans to one class, in a new order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.rand(1, generator=generator)
    odds = torch.where(pool.tensors[1] == 1, lean, 1 - lean).clamp(min=0.25)
    chosen = odds.multinomial(part, generator=generator)
    return torch.cat([chosen[torch.randperm(part, generator=generator)].reshape(-1, size) for _ in range(epochs)])


# -- what is added: one callback ---------------------------------------------------------------------------------------


def per_example_loss(module, batch):
    """Loss of each sentence of a batch; without it, tests would run one by one."""
    words, labels = batch
    return F.cross_entropy(module(words), labels, reduction="none")


def fit(pool, tests, order, folder, name, features=None):
    """Train on the batches of a table with a row per step, -1 for none, and record it."""
    recorder = TrainingDynamicsRecorder(
        str(folder),
        name,
        test_dataset=tests,
        metrics={"loss": per_example_loss},
        id_source="sampler",
        grad_features=features,
    )
    rows = [[example for example in batch if example >= 0] for batch in order.tolist()]
    seed_everything(0, verbose=False)  # all fits start from the same weights
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[recorder], **QUIET)
    trainer.fit(Sentiment(), DataLoader(pool, batch_sampler=rows))
    return Path(folder) / name


# -- the simulator, and questions --------------------------------------------------------------------------------------


def train_simulator(folder, steps=300):
    """Learn from all recorded runs but four, on which the simulator is tested."""
    seed_everything(0, verbose=False)
    data = DynamicsData(
        str(folder), val_runs=0, test_runs=4, features=str(find_runs(folder)[0]), batch_size=None, val_batch_size=None
    )
    # Batches become smaller where examples are left out, and the loss is a mean over them: hence `mean`.
    options = SimulatorOptions(kind="feat_mlp", batch_reduce="mean")
    module = LitInfluence(options, optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.0))
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=1, **QUIET)
    trainer.fit(module, datamodule=data)
    (errors,) = trainer.test(module, datamodule=data, verbose=False)
    module.export_pretrained(Path(folder).parent / "simulator")
    return module.net.eval(), errors, [data.run_names[number] for number in data.split_runs["test"]]


def main(folder="runs/what-if", runs=32, pool_size=200, num_tests=100, part=96, size=8, epochs=4, group=20, steps=300):
    """Record, learn, ask, compare; returns the mean changes, simulated and true, by question."""
    started, folder = time.time(), Path(folder)
    chosen, asked = sentences("train", pool_size), sentences("test", num_tests)
    pool, tests = dataset(chosen), dataset(asked)
    write_examples(folder / "recorded/pool.jsonl", [{"id": i, "text": row.text} for i, row in enumerate(chosen)])
    for number in range(runs):
        order = batches(pool, part, size, epochs, number)
        # The first fit also keeps gradients of all examples, by which the simulator tells them apart.
        fit(pool, tests, order, folder / "recorded", f"run-{number}", 192 if number == 0 else None)
    print(f"{runs} fits recorded after {time.time() - started:.0f} s")

    simulator, errors, held_out = train_simulator(folder / "recorded", steps)
    print(f"simulator trained after {time.time() - started:.0f} s; on {len(held_out)} fits that it has not seen:")
    for part, label in (("", "simulated"), ("persistence/", "no change"), ("mean_trajectory/", "mean of other fits")):
        mse, rho = errors[f"test/{part}all_steps_mse"], errors[f"test/{part}final_spearman"]
        print(f"  {label}: all-steps MSE {mse:.4f}, final-step Spearman {rho:.2f}")

    path = folder / "recorded" / held_out[0]
    run = read_run(path, simulator)
    values = simulate(simulator, run.ids, run.start, lr=run.lr)
    plot_trajectories(values, run.values, simulator.test_ids, folder / "held-out.png", title=f"{path.name}, not seen")

    # What do single sentences of this fit do to the losses of good sentences?
    good = tests.tensors[1].nonzero().flatten()
    run = read_run(path, simulator, good)
    known = [other for other in find_runs(folder / "recorded") if other.name not in held_out]
    ranking = rank(simulator, mean_of_runs(known, simulator, good), good, pool=run.ids.unique())
    shuffled = ranking.ids[torch.randperm(len(ranking.ids), generator=torch.Generator().manual_seed(0))]
    questions = {"most helpful": ranking.ids[:group], "most harmful": ranking.ids[-group:], "random": shuffled[:group]}
    answers = {}
    for name, removed in questions.items():
        changed = leave_out(run.ids, removed)
        simulated = what_if(simulator, run.ids, changed, run.start, good, run.lr)
        again = read_run(fit(pool, tests, changed, folder / "retrained", name.replace(" ", "-")), simulator, good)
        truth = Change(run.values, again.values)
        title = f"{path.name} without its {group} {name} sentences"
        picture = folder / f"without-{name.replace(' ', '-')}.png"
        plot_change(simulated, picture, truth, title=title, names=("all", "without them"))
        answers[name] = float(simulated.difference.mean()), float(truth.difference.mean())
        print(f"without the {group} {name}: loss {answers[name][0]:+.3f} simulated, {answers[name][1]:+.3f} retrained")
    print(f"pictures in {folder}; {time.time() - started:.0f} s")
    return answers


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)
    disable_progress_bar()
    main(*sys.argv[1:])
