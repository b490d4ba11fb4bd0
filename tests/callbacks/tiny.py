"""A module of two linear layers, and a loader that continues mid-epoch."""

import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

BATCHES = 6


class Rows(Dataset):
    """Twelve rows of four numbers."""

    def __init__(self):
        self.rows = torch.randn(2 * BATCHES, 4, generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class ResumableLoader(DataLoader):
    """Batches in order, from the one after the last that was yielded before the checkpoint."""

    yielded = 0
    skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        self.yielded = 0
        for batch in super().__iter__():
            self.yielded += 1
            if self.yielded > skip:
                yield batch

    def state_dict(self):
        return {"yielded": self.yielded % len(self)}

    def load_state_dict(self, state):
        self.skip = state["yielded"]


class Tiny(LightningModule):
    """Dropout between two layers, and the methods that callbacks ask modules for."""

    def __init__(self, workers=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.workers = workers
        self.kls = iter(())
        self.last_kl, self.last_episodes, self.adapted = 0.0, 0, []
        self.exports = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        self.log("constant", 1.0)
        self.last_kl = next(self.kls, 0.0)
        self.log("kl/ref", self.last_kl)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.net(batch) + torch.rand(1)).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return ResumableLoader(Rows(), batch_size=2, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(Rows(), batch_size=6)

    test_dataloader = val_dataloader

    def step_stats(self):
        return {"tokens": 100.0}

    def samples(self):
        step = self.trainer.global_step
        return [{"prompt": f"p{row}|{step}", "response": "two\nlines", "score": row / 3} for row in range(5)]

    def adapt_kl(self, target, horizon):
        self.adapted.append((target, horizon))

    def export_pretrained(self, directory):
        self.exports.append((self.trainer.global_step, Path(directory)))
        return {"model": Path(directory) / "model"}


def trainer(folder, **options):
    """CPU trainer that logs every step and is silent."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 2,
    }
    return Trainer(**(defaults | options))


def json_lines(path):
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
