"""Simulators and gradient methods on recorded runs, for `benchmarks/dynamics.py`."""

from functools import partial
from typing import Any

import torch
from dynamics_data import POOL, STEPS, TESTS, Draw, checkpoints, trainer
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from datamodules.dynamics import DynamicsData
from lit_models.backbones import FromPretrained
from lit_models.influence import (
    GradFeatures,
    LitInfluence,
    PerSampleGradients,
    SimulatorOptions,
    TrajectoryErrors,
    predict_trajectory,
    trajectory_influence,
    trajectory_scale,
)
from lit_models.influence.module import RolloutLoss
from lit_models.nn import WarmupLinear
from lit_models.recording import DynamicsRun

Numbers = dict[str, float]
SHOWN = {"all_steps_mse": "MSE", "all_steps_mae": "MAE", "final_spearman": "rho"}


# -- simulators ------------------------------------------------------------------------------------------------------


class Best(Callback):
    """Keeps the weights with the smallest error in validation, in memory."""

    def __init__(self) -> None:
        self.error, self.weights = float("inf"), {}

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Compare."""
        error = float(trainer.callback_metrics["val/all_steps_mse"])
        if error < self.error or not self.weights:
            self.error, self.weights = error, {key: value.clone() for key, value in module.net.state_dict().items()}

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Go back to the best weights, if there was a validation."""
        if self.weights:
            module.net.load_state_dict(self.weights)


def data_of(draw: Draw, features: str | None = None, **options: Any) -> DynamicsData:
    """The recorded runs, all rows of which are one batch."""
    file = None if features is None else str(draw.folder / f"{features}.safetensors")
    settings = {
        "val_runs": draw.validation,
        "test_runs": draw.tested,
        "train_ranges": [[0, POOL - 1]],
        "test_ranges": [[0, TESTS - 1]],
        "features": file,
        "batch_size": None,
    }
    return DynamicsData(str(draw.folder / "runs"), **(settings | options))


def fit_simulator(
    data: DynamicsData, options: SimulatorOptions, steps: int = 300, seed: int = 0, form: str = ""
) -> LitInfluence:
    """Train a simulator; every 20 steps the validation runs are simulated, where there are any.

    Args:
        data: recorded runs.
        options: of the simulator.
        steps: of the optimizer.
        seed: of the weights.
        form: name of the method; `ridge` in it is the closed form, `roll-outs` adds a loss of roll-outs over 4 steps.
    """
    ridge, free = "ridge" in form, float("roll-outs" in form)
    seed_everything(seed, verbose=False)
    module = LitInfluence(
        options,
        solver="ridge" if ridge else "adam",
        rollout=RolloutLoss(weight=free, window=4),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        lr_scheduler=partial(WarmupLinear, warmup=steps // 3, total=steps),
    )
    settings = {"max_epochs": 1} if ridge else {"max_steps": steps, "max_epochs": -1, "callbacks": [Best()]}
    every = 1 if ridge else 20
    trainer(check_val_every_n_epoch=every, num_sanity_val_steps=0, log_every_n_steps=100, **settings).fit(
        module, datamodule=data
    )
    return module


def errors_of(module: LitInfluence, data: DynamicsData, part: str = "") -> Numbers:
    """Errors on the test runs, of the simulator or of a trivial prediction."""
    (values,) = trainer().test(module, datamodule=data, verbose=False)
    return {short: values[f"test/{part}{name}"] for name, short in SHOWN.items()}


SIMFLUENCE = {
    "Simfluence, N(0,1) start": {"compat": "released"},
    "Simfluence, identity start": {"lr_scaling": False},
    "Simfluence, ridge": {"lr_scaling": False},
    "Simfluence, identity start, lr scaling": {},
    "Simfluence, identity start, lr scaling, roll-outs": {},
}
GPTFLUENCE = {
    "feat_shared, MiniLM": {"kind": "feat_shared", "lr_scaling": False},
    "feat_linear, MiniLM": {"kind": "feat_linear", "lr_scaling": False},
    "feat_mlp, MiniLM": {"lr_scaling": False},
    "feat_mlp, MiniLM, lr scaling": {},
    "feat_linear n = 2, MiniLM, lr scaling": {"kind": "feat_linear", "order": 2},
    "feat_mlp, grad, lr scaling": {},
    "feat_mlp, MiniLM, lr scaling, roll-outs": {},
    "feat_mlp, grad, lr scaling, roll-outs": {},
}
UNSEEN = {
    "unseen training examples": "unseen_train",
    "unseen tests": "unseen_test",
    "both unseen": "unseen_both",
}


def simulators(draw: Draw, minilm: bool) -> dict[str, Numbers]:
    """Errors of all simulators, and of the trivial predictions."""
    found: dict[str, Numbers] = {}
    data = data_of(draw)
    for name, options in SIMFLUENCE.items():
        module = fit_simulator(data, SimulatorOptions(kind="linear", **options), form=name)
        found[name] = errors_of(module, data)
    for part in ("persistence", "mean_trajectory"):
        found[part.replace("_", " ")] = errors_of(module, data, f"{part}/")
    for name, options in GPTFLUENCE.items():
        features = "minilm" if "MiniLM" in name else "grad"
        if features == "minilm" and not minilm:
            continue
        data = data_of(draw, features, order=options.get("order", 1))
        module = fit_simulator(data, SimulatorOptions(**options), form=name)
        found[f"GPTfluence, {name}"] = errors_of(module, data)
        if name.startswith("feat_mlp") and name.endswith("lr scaling"):
            for label, kind in UNSEEN.items():
                other = data_of(draw, features, test_on=kind, unseen_train=str(draw.folder / "unseen"))
                found[f"{label}: {features}"] = errors_of(module, other)
                found[f"{label}: persistence"] = errors_of(module, other, "persistence/")
    return found


# -- gradient methods ------------------------------------------------------------------------------------------------


class Gradients:
    """Gradient methods on the test runs of a draw.

    Args:
        draw: the runs.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        start = str(draw.folder / "start")
        encoder = GradFeatures(192, FromPretrained(start), start)
        self.pool, self.tests = encoder.encode(draw.rows("pool")[:POOL]), encoder.encode(draw.rows("tests")[:TESTS])
        self.source = PerSampleGradients(FromPretrained(start).build())
        self.runs = {name: DynamicsRun.open(draw.folder / "runs" / name) for name in draw.tested}
        self.truths = [torch.from_numpy(run.values()[:, :TESTS]) for run in self.runs.values()]
        self.difference = float((self.source.losses(self.tests) - self.truths[0][0]).abs().max())
        """Between the losses of the gradients and those that were recorded, at the start."""

    def influence(self, steps: list[int], of: str | None = None, as_of: list[int] | None = None) -> list[Tensor]:
        """Summed influence in each test run (T,M), with weights of this run or of another one after some steps."""
        found = []
        for name, run in self.runs.items():
            weights, rates = checkpoints(self.draw, of or name, steps), run.lr[:, 0]
            found.append(
                trajectory_influence(self.source, weights, as_of or steps, run.ids, rates, self.pool, self.tests)
            )
        return found

    def errors(self, influence: list[Tensor], scale: str = "raw") -> Numbers:
        """Errors of the trajectories that they predict."""
        factor = trajectory_scale(scale, tested=list(zip(influence, self.truths, strict=True)))
        meter = TrajectoryErrors()
        for one, truth in zip(influence, self.truths, strict=True):
            meter.update(predict_trajectory(truth[0], one, factor)[None], truth[None])
        values = meter.compute()
        return {short: float(values[name]) for name, short in SHOWN.items()}


def gradient_methods(draw: Draw) -> dict[str, Numbers]:
    """Errors of Grad-Dot and TracIn-CP."""
    gradients = Gradients(draw)
    print(f"  losses at the start differ by {gradients.difference:.1e} from the recorded ones", flush=True)
    every, ten, four = list(range(STEPS)), list(range(0, STEPS, 5)), list(range(0, STEPS, 12))
    whole, few = gradients.influence(every), gradients.influence(ten)
    return {
        "Grad-Dot, raw": gradients.errors(gradients.influence([STEPS], as_of=[0])),
        "TracIn-CP all steps, own run, raw": gradients.errors(whole),
        "TracIn-CP all steps, own run, oracle scale": gradients.errors(whole, "oracle"),
        "TracIn-CP 10 checkpoints, own run, oracle scale": gradients.errors(few, "oracle"),
        "TracIn-CP 4 checkpoints of a training run, raw": gradients.errors(gradients.influence(four, "run-0")),
    }
