"""Options and configuration of training-run simulators."""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from lit_models.influence.functional import BatchReduce, HistoryPad

Kind = Literal["linear", "vector", "feat_shared", "feat_concat", "feat_linear", "feat_mlp"]
Init = Literal["zeros", "identity", "normal"]
Compat = Literal["released"]
Clamp = list[float | None]

FREE = ("linear", "vector")
"""Kinds with numbers of their own for every pair, which say nothing about unseen examples."""
TOWERS = ("feat_shared", "feat_linear", "feat_mlp")
"""Kinds whose factors are inner products."""
CHOICES = {"kind": Kind, "history_pad": HistoryPad, "batch_reduce": BatchReduce, "init": Init}
OURS: dict[str, Any] = {
    "identity_offset": 1.0,
    "tower_scale": "1/P",
    "separate_towers": True,
    "lr_scaling": True,
    "standardize": True,
    "batch_reduce": "sum",
    "history_pad": "repeat",
}
RELEASED: dict[str, Any] = {
    "identity_offset": 0.0,
    "tower_scale": 1.0,
    "separate_towers": False,
    "lr_scaling": False,
    "standardize": False,
    "batch_reduce": "sum",
    "history_pad": "zero",
    "init": "normal",
}


@dataclass(frozen=True)
class SimulatorOptions:
    """How a simulator turns pairs of a pool and a test example into factors, and factors into trajectories.

    What is None takes the value of `compat`, or else ours, which is named with the option.

    Args:
        kind: "linear": free factors for every pair (Simfluence); "vector": a small network on free vectors of every
            pair; "feat_shared": inner products of features behind one two-layer network (GPTfluence as released);
            "feat_concat": a network on both features together; "feat_linear": inner products of linear maps, another
            one for each side (GPTfluence as in the paper); "feat_mlp": the same with two-layer networks.
        order: n, how many past values a prediction uses.
        width: P, numbers that "feat_linear" and "feat_mlp" map features to.
        hidden_width: hidden units of "vector" and "feat_concat".
        embedding_dim: numbers that "vector" keeps for every pair.
        norder: parameters of "feat_shared" and "feat_concat" in the released form for any order, which for the latter
            is another network; by default only where the order is above 1.
        compat: "released" turns all of the changes below off.
        identity_offset: o, the part of the last value that stays without any examples; 1, released 0. Only with 1 can
            an example be taken out of a batch.
        tower_scale: factor of inner products; "1/P" divides by their number of terms, released 1.
        separate_towers: other maps for pool than for test examples in "feat_linear" and "feat_mlp"; true, released
            false. Self-influence needs shared ones.
        lr_scaling: multiply the effect of a step by its learning rate over the reference rate; true, released false.
        standardize: take the pool mean out of features and give each the length sqrt(D); true, released false.
        batch_reduce: "sum", or "mean" to divide sums by the size of the batch, relative to the reference size.
        history_pad: what stands for values before the first one: "repeat" it, released "zero"; "skip" trains on no row
            that lacks one.
        init: start of the table of "linear": "zeros", which predicts no change with the offset; "identity", which does
            so without it; "normal", released. By default the one of the first two that goes with the offset.
        l2_norm: λ of the released penalty, the sum of the norms of the columns of the table of "linear", or of the
            first two of that of "vector".
        freeze_features: keep features as they are; false trains them too.
        clamp: least and greatest value of roll-outs, null for none, such as [0, null] for losses; or these by metric.
        metrics: what is simulated; several metrics share all but the last layer.
        metric_weights: weight of each metric in loss and monitored error, since units differ; 1 by default.

    Raises:
        ValueError: if an option is out of its range or contradicts another, naming it.
    """

    kind: Kind = "feat_mlp"
    order: int = 1
    width: int = 64
    hidden_width: int = 100
    embedding_dim: int = 2
    norder: bool | None = None
    compat: Compat | None = None
    identity_offset: float | None = None
    tower_scale: float | Literal["1/P"] | None = None
    separate_towers: bool | None = None
    lr_scaling: bool | None = None
    standardize: bool | None = None
    batch_reduce: BatchReduce | None = None
    history_pad: HistoryPad | None = None
    init: Init | None = None
    l2_norm: float = 0.0
    freeze_features: bool = True
    clamp: Clamp | dict[str, Clamp] | None = None
    metrics: tuple[str, ...] = ("loss",)
    metric_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self.resolved()

    def resolved(self) -> dict[str, Any]:
        """All options but `compat`, with values for those that were None.

        Raises:
            ValueError: see the class.
        """
        if self.compat not in (None, "released"):
            raise ValueError(f"compat must be released or null, got {self.compat!r}")
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "compat"}
        values = {"clamp": None, **(RELEASED if self.compat == "released" else OURS), **given}
        values.setdefault("norder", self.order > 1)
        values.setdefault("init", "zeros" if values["identity_offset"] else "identity")
        values["metrics"] = list(values["metrics"])
        values["metric_weights"] = list(values.get("metric_weights") or [1.0] * len(values["metrics"]))
        _check(values)
        return values


OPTIONS = tuple(item.name for item in fields(SimulatorOptions))


def _check(values: dict[str, Any]) -> None:
    for name, choices in CHOICES.items():
        if values[name] not in get_args(choices):
            raise ValueError(f"{name}: {values[name]!r} is not one of {', '.join(get_args(choices))}")
    for name in ("order", "width", "hidden_width", "embedding_dim"):
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
    kind, scale = values["kind"], values["tower_scale"]
    if values["order"] > 1 and not values["norder"] and kind in ("feat_shared", "feat_concat"):
        raise ValueError(
            f"norder: {kind} of order {values['order']} exists in the form norder: true only; leave it out"
        )
    if values["identity_offset"] not in (0, 1):
        raise ValueError(f"identity_offset must be 0 or 1, got {values['identity_offset']}")
    if values["lr_scaling"] and not values["identity_offset"]:
        raise ValueError("lr_scaling: effects are scaled, so it needs identity_offset 1; set that, or lr_scaling false")
    if isinstance(scale, str) and scale != "1/P":
        raise ValueError(f"tower_scale must be a number or 1/P, got {scale!r}")
    if values["l2_norm"] < 0:
        raise ValueError(f"l2_norm must not be negative, got {values['l2_norm']}")
    if values["l2_norm"] and kind not in FREE:
        raise ValueError(f"l2_norm: {kind} has no table to penalise; use weight_decay of the optimizer instead")
    if kind == "vector" and values["embedding_dim"] < 2 and values["l2_norm"]:
        raise ValueError("l2_norm penalises two columns of the table; set embedding_dim to at least 2")
    names, weights = values["metrics"], values["metric_weights"]
    if not names or len(set(names)) < len(names) or any("." in name for name in names):
        raise ValueError(f"metrics must be different names without dots, at least one, got {names}")
    if len(weights) != len(names) or min(weights) < 0 or not any(weights):
        raise ValueError(f"metric_weights must be one weight of at least 0 per metric, got {weights} for {names}")
    for name, bounds in clamps(values["clamp"], names).items():
        known = [bound for bound in bounds if bound is not None]
        if len(bounds) != 2 or (len(known) == 2 and known[0] >= known[1]):
            raise ValueError(f"clamp: {bounds} of {name} must be a least and a greater value, or null for none")


def clamps(clamp: Clamp | dict[str, Clamp] | None, metrics: list[str]) -> dict[str, Clamp]:
    """Bounds of each metric.

    Args:
        clamp: option of `SimulatorOptions`.
        metrics: names.

    Returns:
        Least and greatest value by metric.

    Raises:
        ValueError: if a bound belongs to no metric.
    """
    if not isinstance(clamp, dict):
        return {name: [None, None] if clamp is None else clamp for name in metrics}
    unknown = sorted(set(clamp) - set(metrics))
    if unknown:
        raise ValueError(f"clamp: {unknown[0]!r} is not one of metrics, {', '.join(metrics)}")
    return {name: clamp.get(name, [None, None]) for name in metrics}


class SimulatorConfig(PretrainedConfig):
    """Configuration of an `InfluenceSimulator`; it is saved with resolved options, so `compat` is not kept.

    Args:
        num_train: N, examples of the pool.
        num_test: M, test examples.
        feature_dim: D, features of an example; kinds without features ignore it.
        lr_reference: learning rate whose factor is 1, usually the greatest one of the recorded runs.
        batch_reference: batch size whose factor is 1 with `batch_reduce: mean`, and that of `init: identity`.
        **kwargs: options of `SimulatorOptions`, and those of `PretrainedConfig`.

    Raises:
        ValueError: see `SimulatorOptions`.
    """

    model_type = "influence_simulator"

    kind: Kind
    order: int
    width: int
    hidden_width: int
    embedding_dim: int
    norder: bool
    identity_offset: float
    tower_scale: float | Literal["1/P"]
    separate_towers: bool
    lr_scaling: bool
    standardize: bool
    batch_reduce: BatchReduce
    history_pad: HistoryPad
    init: Init
    l2_norm: float
    freeze_features: bool
    clamp: Clamp | dict[str, Clamp] | None
    metrics: list[str]
    metric_weights: list[float]

    def __init__(
        self,
        num_train: int | None = None,
        num_test: int | None = None,
        feature_dim: int | None = None,
        lr_reference: float | None = None,
        batch_reference: int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.num_train, self.num_test, self.feature_dim = num_train, num_test, feature_dim
        self.lr_reference, self.batch_reference = lr_reference, batch_reference
        own = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        for name, value in SimulatorOptions(**own).resolved().items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    @property
    def has_features(self) -> bool:
        """Whether factors are computed from features, and so exist for unseen examples."""
        return self.kind not in FREE

    @property
    def is_shared(self) -> bool:
        """Whether pool and test examples go through the same network, as self-influence asks for."""
        return self.kind == "feat_shared" or (self.kind in TOWERS and not self.separate_towers)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes that a model needs."""
        return ("num_train", "num_test", "feature_dim") if self.has_features else ("num_train", "num_test")

    @property
    def given(self) -> int:
        """Values at the start of a recorded run that roll-outs take as given."""
        return self.order if self.history_pad == "skip" else 1

    def check(self) -> None:
        """Check what a model needs beyond the options.

        Raises:
            ValueError: naming what is missing.
        """
        _check({name: getattr(self, name) for name in OPTIONS if name != "compat"})
        for name in ("num_train", "num_test", *(["feature_dim"] if self.has_features else [])):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}; it is that of the recorded runs"
                )
        identity = self.kind == "linear" and self.init == "identity"
        if (identity or self.batch_reduce == "mean") and not self.batch_reference:
            option = "init: identity" if identity else "batch_reduce: mean"
            raise ValueError(f"batch_reference: {option} needs the batch size of the recorded runs")
        if self.lr_reference is not None and self.lr_reference <= 0:
            raise ValueError(f"lr_reference must be positive, got {self.lr_reference}")
