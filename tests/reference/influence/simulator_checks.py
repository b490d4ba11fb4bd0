"""What simulators and their metrics compute for the inputs of the reference vectors, beside the stored results."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_models.influence import functional, metrics
from lit_models.influence.configuration import SimulatorConfig
from lit_models.influence.modeling import InfluenceSimulator


class Result(NamedTuple):
    """A computed tensor, and how near the stored one must be."""

    value: Tensor
    relative: float
    absolute: float


Results = dict[str, Result]
# As the vectors state, or closer where 1 % of many numbers would not be noticed.
FORWARD, ROLLOUT, RIDGE, METRIC = (0.0, 1e-5), (1e-5, 1e-5), (0.0, 1e-6), (0.0, 1e-6)
GRADIENT = 1e-4


@dataclass
class Vectors:
    """Everything that belongs to the formulas."""

    simulators: dict[str, Tensor]
    extensions: dict[str, Tensor]
    meta: dict

    @property
    def variants(self) -> list[str]:
        """Names of the networks that were run on single rows."""
        return sorted({name.split(".out.")[0] for name in self.simulators if ".out." in name})

    @property
    def rollouts(self) -> list[str]:
        """Names of the networks that were rolled out."""
        names = [name for name in self.simulators if name.startswith("rollout.") and name.endswith(".pred")]
        return sorted(name.removeprefix("rollout.").removesuffix(".pred") for name in names)

    def stored(self) -> dict[str, Tensor]:
        """All tensors, and the numbers of the metrics by their path."""
        return {**self.simulators, **self.extensions, **dict(numbers(self.meta))}


def numbers(node: object, path: str = "") -> list[tuple[str, Tensor]]:
    """Rectangular lists and numbers of a tree as tensors, by their path."""
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in numbers(value, f"{path}.{key}".lstrip("."))]
    return [] if node is None or isinstance(node, str) else [(path, torch.tensor(node, dtype=torch.float64))]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def compare(results: Results, stored: dict[str, Tensor]) -> None:
    """Compare shapes and values."""
    for name, (value, relative, absolute) in results.items():
        torch.testing.assert_close(
            value.double(), stored[name].double(), rtol=relative, atol=absolute, msg=lambda text, name=name: name + text
        )


def simulator(vectors: Vectors, variant: str) -> InfluenceSimulator:
    """The network with the stored weights under their released names, and the stored features."""
    penalty = re.search(r"_l([\d.]+)$", variant)
    model = InfluenceSimulator.from_released(
        under(vectors.simulators, f"{variant}.param."),
        num_train=vectors.meta["n_train"],
        num_test=vectors.meta["n_test"],
        l2_norm=float(penalty[1]) if penalty else 0.0,
    )
    if model.config.has_features:
        assert model.config.feature_dim == vectors.meta["embed_dim"]
        model.set_examples(
            train_features=vectors.simulators["in.h_train"], test_features=vectors.simulators["in.h_test"]
        )
    return model


def batches(vectors: Vectors, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, tests, histories and targets of single rows."""
    data = vectors.simulators
    assert data["in.order_ids"].shape == (vectors.meta["rows"], vectors.meta["run_batch"])
    history = data.get(f"{variant}.in.prev_n", data["in.before"][:, None])
    return data["in.order_ids"], data["in.test_ids"], history, data["in.after"]


def row_form(model: InfluenceSimulator, ids: Tensor, tests: Tensor, history: Tensor) -> Tensor:
    """Every row from its own factors."""
    return model(ids, tests, history)


def matrix_form(model: InfluenceSimulator, ids: Tensor, tests: Tensor, history: Tensor) -> Tensor:
    """Every row with all tests, of which one is taken."""
    columns = history[..., None].expand(-1, -1, len(model.test_ids))
    return model.forward_matrix(ids, columns).gather(1, tests[:, None]).squeeze(1)


def variant_results(vectors: Vectors, variant: str, form: Callable[..., Tensor] = row_form) -> Results:
    """Predictions, losses and gradients of one network."""
    model = simulator(vectors, variant)
    ids, tests, history, target = batches(vectors, variant)
    before = ids.clone()
    prediction = form(model, ids, tests, history)
    assert torch.equal(ids, before)
    mse, penalty = functional.masked_mse(prediction, target), model.penalty()
    (mse + penalty).backward()
    values = {"predict_loss": prediction, "mse_loss": mse, "tot_loss": mse + penalty, "L2_loss": penalty}
    results = {
        f"{variant}.out.{name}": Result(value.detach(), 1e-5, 1e-5)
        for name, value in values.items()
        if f"{variant}.out.{name}" in vectors.simulators
    }
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max()) * (1e-6 if model.config.has_features else 1e-7)
        results[f"{variant}.grad.{name}"] = Result(parameter.grad, GRADIENT, scale)
    return results


def factor_results(vectors: Vectors) -> Results:
    """Factors of single pairs, and of examples with themselves."""
    variant = "enc_shared"
    model = simulator(vectors, variant)
    ids, tests, _, _ = batches(vectors, variant)
    with torch.no_grad():
        pairs, table, own = model.pair_factors(ids, tests), model.factors(), model.self_influence()
    torch.testing.assert_close(table.A[0][ids, tests[:, None]], pairs.A[0])
    torch.testing.assert_close(table.B[ids, tests[:, None]], pairs.B)
    values = {
        "a_per_example": pairs.A[0],
        "b_per_example": pairs.B,
        "self_influence_a": own.A[0],
        "self_influence_b": own.B,
    }
    return {f"{variant}.out.{name}": Result(value, *FORWARD) for name, value in values.items()}


def runs(vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Ids (K,T,b) of the steps after the start, and recorded values (K,T+1,M)."""
    ids, values = vectors.simulators["rollout.in.ids"], vectors.simulators["rollout.in.y"]
    assert ids.shape[:2] == values.shape[:2]
    return ids[:, 1:], values


def rollout_results(vectors: Vectors, variant: str) -> Results:
    """Trajectories, and the errors of the stored ones."""
    ids, values = runs(vectors)
    name = f"rollout.{variant}"
    with torch.no_grad():
        prediction = simulator(vectors, name).rollout(values[:, 0], ids)
    stored = vectors.simulators[f"{name}.pred"]
    errors, rho = metrics.trajectory_errors(stored, values), metrics.final_spearman(stored, values)
    meter = metrics.TrajectoryErrors()
    meter.update(stored[:1], values[:1])
    meter.update(stored[1:], values[1:])
    computed = meter.compute()
    found = {
        "all_steps_mse_mean": (errors.mse.mean(), computed["all_steps_mse"]),
        "all_steps_mse_std": (errors.mse.std(correction=0), computed["all_steps_mse_std"]),
        "all_steps_mae_mean": (errors.mae.mean(), computed["all_steps_mae"]),
        "all_steps_mae_std": (errors.mae.std(correction=0), computed["all_steps_mae_std"]),
        "final_spearman_mean": (rho.mean(), computed["final_spearman"]),
        "final_spearman_std": (rho.std(correction=0), computed["final_spearman_std"]),
    }
    for exact, single in found.values():
        torch.testing.assert_close(single, exact.float())
    found["final_spearman_per_run"] = (rho, rho)
    results = {f"{name}.{key}": Result(exact, *METRIC) for key, (exact, _) in found.items()}
    return results | {f"{name}.pred": Result(prediction, *ROLLOUT)}


def ridge_results(vectors: Vectors, form: str = "primal") -> Results:
    """The closed form on all runs."""
    ids, values = runs(vectors)
    names = [name for name in vectors.extensions if name.startswith("ridge_l")]
    penalties = sorted({float(name.removeprefix("ridge_l").rpartition(".")[0]) for name in names})
    fits = functional.ridge(
        ids.flatten(0, 1),
        values[:, :-1].flatten(0, 1)[:, None],
        values[:, 1:].flatten(0, 1),
        vectors.meta["n_train"],
        penalties,
        offset=0.0,
        prior=(1 / vectors.meta["run_batch"], 0.0),
        form=form,
    )
    results: Results = {}
    for penalty, fit in zip(penalties, fits, strict=True):
        results[f"ridge_l{penalty:g}.A"] = Result(fit.A[0], *RIDGE)
        results[f"ridge_l{penalty:g}.B"] = Result(fit.B, *RIDGE)
    return results


def linear_towers(vectors: Vectors, lr_scaling: bool) -> InfluenceSimulator:
    """Separate linear maps with the stored weights."""
    data = vectors.extensions
    features, width = data["feat.in.W"].shape
    config = SimulatorConfig(
        kind="feat_linear",
        num_train=vectors.meta["n_train"],
        num_test=vectors.meta["n_test"],
        feature_dim=features,
        width=width,
        tower_scale=0.02 / width,
        standardize=False,
        lr_scaling=lr_scaling,
    )
    model = InfluenceSimulator(config)
    weights = {
        "train_maps.0.weight": data["feat.in.W"].T,
        "train_maps.1.weight": data["feat.in.W_b"].T,
        "test_maps.0.weight": data["feat.in.U"].T,
        "test_maps.1.weight": data["feat.in.U_b"].T,
    }
    model.load_state_dict(model.state_dict() | weights)
    model.set_examples(train_features=vectors.simulators["in.h_train"], test_features=vectors.simulators["in.h_test"])
    return model


@torch.no_grad()
def extension_results(vectors: Vectors) -> Results:
    """Separate towers, their scale, the identity offset and the scaling by learning rates."""
    ids, values = runs(vectors)
    plain, scaled = linear_towers(vectors, False), linear_towers(vectors, True)
    factors, rate = plain.factors(), vectors.extensions["feat.in.lr"]
    assert rate.shape == (ids.shape[1],)
    rate = (rate / rate[0]).expand(len(ids), -1)
    torch.testing.assert_close(plain.rollout(values[:, 0], ids, rate), plain.rollout(values[:, 0], ids))
    return {
        "feat.A": Result(factors.A[0], *FORWARD),
        "feat.B": Result(factors.B, *FORWARD),
        "feat.offset.pred": Result(plain.rollout(values[:, 0], ids), *ROLLOUT),
        "feat.offset_lr.pred": Result(scaled.rollout(values[:, 0], ids, rate), *ROLLOUT),
    }


def metric_results(vectors: Vectors) -> Results:
    """Scale of influence, rank correlation, wrong labels and retrained subsets."""
    given = {name: value for name, value in numbers(vectors.meta["metrics"]) if "subset_ids" not in name}
    fit = metrics.fit_scale(given["rescale.cum_influence"].T, given["rescale.gt"].T)
    constant = metrics.spearman(given["spearman_constant.a"], given["spearman_constant.b"])
    assert constant.isnan() == (vectors.meta["metrics"]["spearman_constant"]["rho"] is None)
    meter = metrics.MislabelDetection()
    meter.update(given["mislabel.score"], given["mislabel.is_noise"])
    torch.testing.assert_close(
        meter.compute()["auc"].double(), metrics.auc(given["mislabel.score"], given["mislabel.is_noise"].bool())
    )
    found, vain = meter.curve()
    subsets = vectors.meta["metrics"]["lds"]["subset_ids"]
    start, influence = given["rescale.gt"][:, :1], given["rescale.cum_influence"]
    values = {
        "rescale.pred": torch.cat([start, start - influence], 1),
        "rescale.scale": fit.scale,
        "rescale.min_sse": fit.residual,
        "spearman_ties.rho": metrics.spearman(given["spearman_ties.a"], given["spearman_ties.b"]),
        "mislabel.auc": metrics.auc(given["mislabel.score"], given["mislabel.is_noise"].bool()),
        "mislabel.tpr": found,
        "mislabel.fpr": vain,
        "lds.rho": metrics.datamodeling_scores(given["lds.score"], subsets, given["lds.subset_target"]),
    }
    return {f"metrics.{name}": Result(value, *METRIC) for name, value in values.items()}


def all_results(vectors: Vectors) -> dict[str, Callable[[Vectors], Results]]:
    """Functions that compute everything, by name."""

    def bound(function: Callable[..., Results], *arguments: object) -> Callable[[Vectors], Results]:
        return lambda vectors: function(vectors, *arguments)

    functions: dict[str, Callable[[Vectors], Results]] = {
        "factors": factor_results,
        "extensions": extension_results,
        "metrics": metric_results,
    }
    for form in (row_form, matrix_form):
        functions |= {f"{form.__name__}:{name}": bound(variant_results, name, form) for name in vectors.variants}
    functions |= {f"rollout:{name}": bound(rollout_results, name) for name in vectors.rollouts}
    return functions | {f"ridge:{form}": bound(ridge_results, form) for form in ("primal", "dual")}
