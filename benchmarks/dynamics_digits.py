"""Wrong labels among handwritten digits, for `benchmarks/dynamics.py`."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from dynamics_data import is_whole, trainer
from dynamics_methods import fit_simulator
from lightning.pytorch import LightningModule, seed_everything
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from callbacks.dynamics import TrainingDynamicsRecorder
from datamodules.dynamics import DynamicsData
from lit_models.influence import GradientOptions, InfluenceSimulator, PerSampleGradients, SimulatorOptions, tracin_self
from lit_models.influence.mislabels import inspect, mean_effect, self_alpha
from lit_models.nn import WarmupLinear

PRETRAINING, POOL, TESTS = 150, 200, 100
"""Images; the others tell the accuracy."""
FLIPPED = 0.4
RUNS, SAMPLE, BATCH, EPOCHS = 40, 128, 4, 2
WIDTH = 32


class Digits(nn.Module):
    """One block of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(8 * WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(n,8,8) -> (n,10)."""
        x = self.rows(images) + self.places
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.second(x))
        return self.head(x.flatten(1))


class LitDigits(LightningModule):
    """Training of it, from given weights."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        super().__init__()
        self.net = Digits()
        self.net.load_state_dict(start)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss."""
        return self.per_example_metrics(batch)["loss"].mean()

    def per_example_metrics(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each image."""
        return {"loss": F.cross_entropy(self.net(batch["image"]), batch["label"], reduction="none")}

    def configure_optimizers(self) -> Any:
        """AdamW, down to a rate of 0."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = WarmupLinear(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Images(Dataset[Any]):
    """Images with labels and ids."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One of them."""
        return {"id": row, "image": self.images[row], "label": self.labels[row]}


def train(start: dict[str, Tensor], data: Any, seed: int, *callbacks: Any) -> Digits:
    """Two epochs over some images."""
    seed_everything(seed, verbose=False)
    module = LitDigits(start)
    trainer(max_epochs=EPOCHS, callbacks=list(callbacks)).fit(module, DataLoader(data, BATCH, shuffle=True))
    return module.net.eval()


def pretrained(images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Weights after 40 steps on all of a few images."""
    seed_everything(seed, verbose=False)
    net = Digits()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.state_dict()


def loss_of(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of one image."""
    image, label = example
    return F.cross_entropy(net(image[None]), label[None])


class Material:
    """Images of a seed, and the weights that training starts from.

    Args:
        seed: decides about all of it.
        folder: for recorded runs and features.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SystemExit("e3 needs the digits of scikit-learn; pip install scikit-learn") from error
        self.seed, self.folder = seed, folder
        raw = load_digits()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(raw.target), generator=generator)
        images, labels = torch.tensor(raw.images).float()[order] / 16, torch.tensor(raw.target).long()[order]
        sizes = [PRETRAINING, POOL, TESTS, len(order) - PRETRAINING - POOL - TESTS]
        parts = [Images(*pair) for pair in zip(images.split(sizes), labels.split(sizes), strict=True)]
        first, pool, self.tests, self.others = parts
        wrong = torch.randperm(POOL, generator=generator)[: round(FLIPPED * POOL)]
        self.is_flipped = torch.zeros(POOL, dtype=torch.bool)
        self.is_flipped[wrong] = True
        shifted = (pool.labels + torch.randint(1, 10, (POOL,), generator=generator)) % 10
        self.pool = Images(pool.images, torch.where(self.is_flipped, shifted, pool.labels))
        self.start = pretrained(first.images, first.labels, seed)
        self.model = Digits()
        self.model.load_state_dict(self.start)

    def examples(self) -> tuple[Tensor, Tensor]:
        """The pool as one batch."""
        return self.pool.images, self.pool.labels

    def record(self) -> None:
        """Record runs on parts of the pool, and one further run over all of it, whose weights are kept."""
        generator = torch.Generator().manual_seed(self.seed)
        for number in range(RUNS + 1):
            last = number == RUNS
            rows = torch.arange(POOL) if last else torch.randperm(POOL, generator=generator)[:SAMPLE]
            kind, name = ("whole", "run") if last else ("runs", f"run-{number}")
            if is_whole(self.folder / kind / name):
                continue
            recorder = TrainingDynamicsRecorder(
                str(self.folder / kind), name, test_dataset=self.tests, pool=POOL, max_eval_batch_size=TESTS,
                save_checkpoints_at=list(range(0, POOL // BATCH + 1, 10)) if last else None, overwrite=True,
            )  # fmt: skip
            train(self.start, torch.utils.data.Subset(self.pool, rows.tolist()), number, recorder)

    def features(self, kind: str) -> str:
        """File of features: `grad`, of the loss with the label as it is, or `pixels`, with the label."""
        path = self.folder / f"{kind}.safetensors"
        if kind == "grad":
            options = GradientOptions(proj_dim=192)
            source = PerSampleGradients(self.model, loss_of, options)
            tables = {
                side: source.matrix((images.images, images.labels))
                for side, images in (("pool", self.pool), ("tests", self.tests))
            }
        else:
            tables = {
                side: torch.cat([images.images.flatten(1), F.one_hot(images.labels, 10).float()], 1)
                for side, images in (("pool", self.pool), ("tests", self.tests))
            }
        save_file(tables, path)
        return str(path)

    def simulator(self, kind: str, features: str | None, steps: int) -> tuple[Any, Tensor]:
        """A simulator of the recorded runs, and their mean trajectory."""
        data = DynamicsData(str(self.folder / "runs"), val_runs=0, test_runs=0, features=features, batch_size=None)
        module = fit_simulator(data, SimulatorOptions(kind=kind), steps, self.seed)
        return module.net.eval(), data.mean_trajectory

    def accuracy(self, kept: Tensor) -> float:
        """Share of right answers after training on a part of the pool."""
        net = train(self.start, torch.utils.data.Subset(self.pool, kept.tolist()), self.seed)
        return self.score(net)

    @torch.no_grad()
    def score(self, net: nn.Module) -> float:
        """Share of right answers."""
        return float((net(self.others.images).argmax(1) == self.others.labels).float().mean())


def scores_of(material: Material) -> dict[str, Tensor]:
    """Scores of the pool by all methods."""
    simulate = partial(material.simulator, steps=200)
    generator = torch.Generator().manual_seed(material.seed)
    found = {"random": torch.rand(POOL, generator=generator)}
    kept = material.folder / "whole/run/checkpoints"
    steps = range(0, POOL // BATCH, 10)
    source = PerSampleGradients(material.model, loss_of)
    total = EPOCHS * POOL // BATCH
    found["TracIn-CP self-influence"] = tracin_self(
        source, [str(kept / f"step-{step}.ckpt") for step in steps], [1e-3 * (1 - step / total) for step in steps],
        material.examples(),
    )  # fmt: skip
    grad, pixels = material.features("grad"), material.features("pixels")
    for name, file in (("grad", grad), ("pixels + label", pixels)):
        net, mean = simulate("feat_shared", file)
        found[f"feat_shared, {name}, self alpha"] = self_alpha(net)
        if file == grad:
            found["feat_shared, grad, mean effect on tests"] = mean_effect(net, mean)
            untrained = InfluenceSimulator(net.config)
            untrained.train_features.copy_(net.train_features)
            found["feat_shared, grad, untrained, self alpha"] = self_alpha(untrained)
    net, mean = material.simulator("feat_mlp", grad, 100)
    with torch.no_grad():  # `self_alpha` refuses this
        found["feat_mlp, grad, self alpha"] = net.self_influence().A.sum(0)
    found["feat_mlp, grad, mean effect on tests"] = mean_effect(net, mean)
    net, mean = simulate("linear", None)
    found["Simfluence, mean effect on tests"] = mean_effect(net, mean)
    after = str(kept / f"step-{POOL // BATCH}.ckpt")
    found["training loss after one epoch"] = source.losses(material.examples(), after)
    return found


def wrong_labels(seed: int, root: Path) -> dict[str, dict[str, float]]:
    """How well each score finds wrong labels, and what training is worth without what is suspected."""
    material = Material(seed, root / f"digits-{seed}")
    material.record()
    scores = scores_of(material)
    found = {}
    for name, values in scores.items():
        result = inspect(values, material.is_flipped)
        found[name] = {"AUC": result.values["auc"], "at 40%": result.values["found_40"]}
    material.model.load_state_dict(material.start)
    found["accuracy"] = {
        "start": material.score(material.model.eval()),
        "all data": material.accuracy(torch.arange(POOL)),
    }
    for label, name in (("self alpha", "feat_shared, grad, self alpha"), ("TracIn", "TracIn-CP self-influence")):
        kept = inspect(scores[name], material.is_flipped).order[round(FLIPPED * POOL) :]
        found["accuracy"][f"without the top 40%, {label}"] = material.accuracy(kept)
    found["accuracy"]["right labels only"] = material.accuracy((~material.is_flipped).nonzero().flatten())
    return found
