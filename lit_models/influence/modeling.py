"""Networks that simulate training runs: Simfluence, GPTfluence as published and as released, and our variants.

All kinds give factors for pairs of a pool and a test example; `functional` turns these into trajectories. The names of
the weights of the released kinds are those of the released code. Importing this module registers the classes with the
Auto classes of transformers.

Shapes: N pool examples, M tests, Q metrics, D features, K runs, T steps, R rows, b places of a batch, n the order.
Where there are several metrics, the columns of histories, predictions and factors are Q·M: all tests of the first
metric, then all of the second one, and so on. Weights and results are float32.
Sources: Simfluence (arXiv 2303.08114), GPTfluence (arXiv 2404.07840) and its released code.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init

from lit_models.influence import functional
from lit_models.influence.configuration import SimulatorConfig, clamps
from lit_models.influence.forms import FORMS
from lit_models.influence.functional import Factors
from lit_models.nn.sharding import ShardingNeeds

RENAMED = {"embed.weight": "train_features", "test_embed.weight": "test_features"}
"""Tables of features by their released names."""


class InfluenceSimulator(PreTrainedModel):
    """Predicts how a metric of test examples moves while a model trains on examples of a pool.

    Pool and test examples are given by their ids, which `train_ids` and `test_ids` map to rows; an id of -1 is padding.
    The learning rate of a step is given over the reference rate (`lr_scale`), and is ignored without `lr_scaling`.

    Args:
        config: options.
    """

    config: SimulatorConfig
    config_class = SimulatorConfig
    base_model_prefix = ""
    main_input_name = "order_ids"
    sharding_needs = ShardingNeeds(units=(), float32=("InfluenceSimulator",))

    train_ids: Tensor
    """(N,) int64, id of each row of the pool."""
    test_ids: Tensor
    """(M,) int64, id of each row of the tests."""
    train_features: Tensor
    """(N, D) as the networks see them, standardised where that is asked for; only with features."""
    test_features: Tensor
    """(M, D) likewise."""
    pool_mean: Tensor
    """(D,) mean of the pool's features, for unseen examples."""

    def __init__(self, config: SimulatorConfig) -> None:
        config.check()
        super().__init__(config)
        assert config.num_train is not None
        assert config.num_test is not None
        self.register_buffer("train_ids", torch.arange(config.num_train))
        self.register_buffer("test_ids", torch.arange(config.num_test))
        if config.has_features:
            assert config.feature_dim is not None
            for name, size in (("train_features", config.num_train), ("test_features", config.num_test)):
                table = torch.zeros(size, config.feature_dim)
                if config.freeze_features:
                    self.register_buffer(name, table)
                else:
                    self.register_parameter(name, nn.Parameter(table))
            self.register_buffer("pool_mean", torch.zeros(config.feature_dim))
        self.form = FORMS[config.kind](config)
        for name, network in self.form.build(config).items():
            self.add_module(name, network)
        self.register_load_state_dict_pre_hook(_read_released)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own start of linear layers; tables as `init` says."""
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            config = self.config
            if config.kind == "vector" or config.init == "normal":
                init.normal_(module.weight)
                return
            init.zeros_(module.weight)
            if config.init == "identity":
                assert config.batch_reference is not None
                start = torch.zeros(config.order + 1, device=module.weight.device)
                start[-2] = 1 / config.batch_reference
                init.copy_(module.weight, start.repeat(len(config.metrics)).expand_as(module.weight))

    # -- examples ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_examples(
        self,
        train_ids: Tensor | None = None,
        test_ids: Tensor | None = None,
        train_features: Tensor | None = None,
        test_features: Tensor | None = None,
    ) -> None:
        """Tell which examples the rows stand for; what is None stays as it is.

        Args:
            train_ids: (N,) int64, none twice.
            test_ids: (M,) int64, none twice.
            train_features: (N, D); their mean becomes the statistics of `standardize`.
            test_features: (M, D); needs the statistics, so that of the pool go first.

        Raises:
            ValueError: if a shape does not fit the configuration, an id occurs twice or is negative, or a feature is
                not finite.
        """
        for name, ids in (("train_ids", train_ids), ("test_ids", test_ids)):
            if ids is not None:
                self._fits(name, ids)
                if ids.min() < 0 or len(ids.unique()) < len(ids):
                    raise ValueError(f"{name} must be different and not negative; give every example an id of its own")
                getattr(self, name).copy_(ids)
        for name, features in (("train_features", train_features), ("test_features", test_features)):
            if features is None:
                continue
            if not self.config.has_features:
                raise ValueError(f"{name}: {self.config.kind} reads no features; leave them out or set another kind")
            self._fits(name, features)
            if not bool(features.isfinite().all()):
                raise ValueError(f"{name} must be finite; example {int((~features.isfinite()).nonzero()[0, 0])} is not")
            if name == "train_features":
                self.pool_mean.copy_(functional.feature_mean(features))
            getattr(self, name).copy_(self.prepared(features))

    def _fits(self, name: str, value: Tensor) -> None:
        if value.shape != getattr(self, name).shape:
            raise ValueError(
                f"{name} have shape {tuple(value.shape)} but num_train, num_test and feature_dim ask for "
                f"{tuple(getattr(self, name).shape)}; give both the same"
            )

    def prepared(self, features: Tensor) -> Tensor:
        """Features of any examples as the networks see them: (..., D) in any floating dtype -> float32."""
        return functional.standardize(features, self.pool_mean) if self.config.standardize else features.float()

    def with_examples(
        self,
        train_ids: Tensor | None = None,
        train_features: Tensor | None = None,
        test_ids: Tensor | None = None,
        test_features: Tensor | None = None,
    ) -> "InfluenceSimulator":
        """A simulator with the same weights and further, unseen examples after its own.

        Args:
            train_ids: (N',) int64.
            train_features: (N', D), not standardised.
            test_ids: (M',) int64.
            test_features: (M', D), not standardised.

        Returns:
            The simulator, which shares its networks with this one and is not for training.

        Raises:
            ValueError: if this kind knows pairs of the training runs only, or ids and features do not fit.
        """
        if not self.config.has_features:
            raise ValueError(f"kind: {self.config.kind} knows no unseen examples; use a kind with features")
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        other._buffers, other._parameters = dict(self._buffers), dict(self._parameters)
        for side, ids, features in (("train", train_ids, train_features), ("test", test_ids, test_features)):
            if ids is None and features is None:
                continue
            if ids is None or features is None:
                raise ValueError(f"{side}_ids and {side}_features of unseen examples belong together; give both")
            own_ids, own = getattr(self, f"{side}_ids"), getattr(self, f"{side}_features").detach()
            if len(ids) != len(features):
                raise ValueError(f"{side}_features have {len(features)} rows for {len(ids)} ids; give one per id")
            all_ids = torch.cat([own_ids, ids.to(own_ids)])
            if len(all_ids.unique()) < len(all_ids):
                raise ValueError(f"{side}_ids: unseen examples need ids other than those of the training runs")
            other._parameters.pop(f"{side}_features", None)
            other._buffers[f"{side}_ids"] = all_ids
            other._buffers[f"{side}_features"] = torch.cat([own, self.prepared(features.to(own.device)).to(own)])
            setattr(other.config, f"num_{side}", len(all_ids))
        return other

    def train_rows(self, ids: Tensor) -> Tensor:
        """Rows of pool ids, any shape; -1 stays.

        Raises:
            ValueError: if an id is unknown.
        """
        return _rows(ids, self.train_ids, "train_ids")

    def test_rows(self, ids: Tensor) -> Tensor:
        """Rows of test ids, any shape.

        Raises:
            ValueError: if an id is unknown.
        """
        return _rows(ids, self.test_ids, "test_ids")

    def _inputs(self, side: str, rows: Tensor | None) -> Tensor:
        """What the form reads of some rows, or of all."""
        if self.config.has_features:
            features: Tensor = getattr(self, f"{side}_features")
            return features if rows is None else features[rows]
        size = self.config.num_train if side == "train" else self.config.num_test
        return torch.arange(cast(int, size), device=self.device) if rows is None else rows

    def _given(self, side: str, features: Tensor | None) -> Tensor:
        if features is None:
            return self._inputs(side, None)
        if not self.config.has_features:
            raise ValueError(f"kind: {self.config.kind} knows no unseen examples; use a kind with features")
        return self.prepared(features.to(self.device))

    # -- factors -----------------------------------------------------------------------------------------------------

    def factors(
        self, train_features: Tensor | None = None, test_features: Tensor | None = None, metric: str | None = None
    ) -> Factors:
        """Factors of all pairs.

        Args:
            train_features: (N', D), pool examples, seen or not, standardised with the saved statistics here; the own
                pool by default.
            test_features: (M', D), tests likewise.
            metric: one of the metrics; all by default.

        Returns:
            A (n, N', Q·M') and B (N', Q·M'), or with M' columns for one metric.

        Raises:
            ValueError: if features are given for a kind that knows pairs of the training runs only.
        """
        table = self._table(self._given("train", train_features), self._given("test", test_features))
        if metric is None:
            return _as_factors(table.flatten(2))
        return _as_factors(table[:, :, self._metric(metric)])

    def _metric(self, name: str) -> int:
        if name not in self.config.metrics:
            raise ValueError(f"metric: {name!r} is not simulated; it simulates {', '.join(self.config.metrics)}")
        return self.config.metrics.index(name)

    def _table(self, train: Tensor, test: Tensor) -> Tensor:
        """(n+1, N, Q, M) float32, part by part where no gradient is wanted."""
        with torch.autocast(self.device.type, enabled=False):
            if self.config.has_features:
                train, test = train.to(self.dtype), test.to(self.dtype)
            width = len(test)
            if not torch.is_grad_enabled():
                width = max(1, functional.ELEMENTS // max(1, len(train) * self.form.elements(self.config)))
            parts = [self.form.table(self, train, chunk) for chunk in test.split(max(1, width))]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def pair_factors(self, order_ids: Tensor, test_ids: Tensor, metric: Tensor | None = None) -> Factors:
        """Factors of each pool example of some batches with one test each.

        Args:
            order_ids: (R, b) int64, -1 at padding.
            test_ids: (R,) int64.
            metric: (R,) int64, number of the metric; the first one by default.

        Returns:
            A (n, R, b) and B (R, b), 0 at padding.
        """
        rows = self.train_rows(order_ids)
        real = rows >= 0
        pool, left = rows.clamp(min=0).unique(return_inverse=True)
        tests, right = self.test_rows(test_ids).unique(return_inverse=True)
        train, test = self._inputs("train", pool), self._inputs("test", tests)
        with torch.autocast(self.device.type, enabled=False):
            if self.config.has_features:
                train, test = train.to(self.dtype), test.to(self.dtype)
            table = self.form.pairs(self, train, test, left, right[:, None].expand_as(left))
        if metric is None:
            table = table[..., 0]
        else:
            table = table.gather(-1, metric[:, None, None].expand(*table.shape[:-1], 1)).squeeze(-1)
        return _as_factors(torch.where(real, table, 0.0))

    def self_influence(self, train_features: Tensor | None = None, metric: str | None = None) -> Factors:
        """Factors of each example with itself, its features on both sides.

        With shared networks these are scaled squared norms; with separate ones, nothing in training has shaped them.

        Args:
            train_features: (N', D); the own pool by default.
            metric: one of the metrics; the first one by default.

        Returns:
            A (n, N') and B (N',).

        Raises:
            ValueError: if the kind has no features.
        """
        if not self.config.has_features:
            raise ValueError(f"kind: {self.config.kind} has no factors of an example with itself; use feat_shared")
        chosen = 0 if metric is None else self._metric(metric)
        features = self._given("train", train_features)
        rows = torch.arange(len(features), device=features.device)
        with torch.autocast(self.device.type, enabled=False):
            features = features.to(self.dtype)
            return _as_factors(self.form.pairs(self, features, features, rows, rows)[..., chosen])

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Write the table of kind `linear`.

        Args:
            factors: A (n, N, Q·M) and B (N, Q·M), such as `functional.ridge` gives.

        Raises:
            ValueError: if the kind has no table of factors.
        """
        if self.config.kind != "linear":
            raise ValueError(f"kind: the factors of {self.config.kind} are not free; set it to linear")
        table = torch.cat([factors.A, factors.B[None]]).unflatten(2, (len(self.config.metrics), -1))
        weight: Tensor = self.get_parameter("emb.weight")
        weight.copy_(table.permute(3, 1, 2, 0).flatten(2).flatten(0, 1))

    # -- predictions -------------------------------------------------------------------------------------------------

    def scale(self, ids: Tensor, lr_scale: Tensor | None) -> Tensor | None:
        """Factor of each step; see `functional.step_scale`."""
        config = self.config
        scale = lr_scale if config.lr_scaling else None
        return functional.step_scale(ids, scale, config.batch_reduce, config.batch_reference)

    def history(self, values: Tensor) -> Tensor:
        """(..., k, M) values, the oldest first, filled up to (..., n, M) as `history_pad` says."""
        return functional.pad_history(values, self.config.order, self.config.history_pad)

    def forward(
        self,
        order_ids: Tensor,
        test_ids: Tensor,
        prev: Tensor,
        lr_scale: Tensor | None = None,
        metric: Tensor | None = None,
    ) -> Tensor:
        """Predict single values, each from its own batch and history (the row form).

        Args:
            order_ids: (R, b) int64, pool ids of the step, -1 at padding; not changed.
            test_ids: (R,) int64.
            prev: (R, n) in any floating dtype, values before the step, the oldest first; or (R,), the last one.
            lr_scale: (R,); None for 1.
            metric: (R,) int64, number of the metric; the first one by default.

        Returns:
            (R,) float32.
        """
        A, B = self.pair_factors(order_ids, test_ids, metric)
        history = self.history((prev[:, None] if prev.ndim == 1 else prev)[..., None].float())
        scale = self.scale(order_ids, lr_scale)
        value = functional.step(history, A.sum(-1)[..., None], B.sum(-1)[:, None], self.config.identity_offset, scale)
        return value.squeeze(-1)

    def occurring(self, ids: Tensor, test_ids: Tensor | None = None) -> tuple[Factors, Tensor]:
        """Factors of those pool examples that occur in some batches.

        Args:
            ids: (..., b) int64, pool ids, -1 at padding.
            test_ids: (M,) int64, tests of the columns; all by default.

        Returns:
            A (n, N', Q·M) and B (N', Q·M), and the batches (..., b) as rows of these, -1 at padding.
        """
        rows = self.train_rows(ids)
        present = rows.unique()
        present = present[present >= 0]
        if not len(present):  # nothing but padding
            present = rows.new_zeros(1)
        tests = None if test_ids is None else self.test_rows(test_ids)
        table = self._table(self._inputs("train", present), self._inputs("test", tests))
        return _as_factors(table.flatten(2)), torch.searchsorted(present, rows.clamp(min=0)).masked_fill(rows < 0, -1)

    def forward_matrix(
        self,
        ids: Tensor,
        history: Tensor,
        lr_scale: Tensor | None = None,
        test_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        factors: Factors | None = None,
    ) -> Tensor:
        """Predict the values of many tests after the same steps (the matrix form, which is the fast one).

        Factors are computed once, for the pool examples that occur, and then summed: the numbers and gradients of
        `forward` at a fraction of the cost.

        Args:
            ids: (R, b) int64, pool ids of the step, -1 at padding, or rows of `factors`; or (R, k, b) of k steps, each
                from the prediction before it.
            history: (R, n, Q·M) in any floating dtype, values before the first step, the oldest first; or (R, Q·M).
            lr_scale: (R,) or (R, k); None for 1.
            test_ids: (M,) int64, tests of the columns; all by default, and not used with `factors`.
            lengths: (R,) int64, steps of each row where these differ.
            factors: such as `occurring` gives.

        Returns:
            (R, Q·M) float32, values after the last step.

        Raises:
            ValueError: if the columns of the history are not those of the tests.
        """
        if factors is None:
            factors, ids = self.occurring(ids, test_ids)
        history = self.history(history[:, None] if history.ndim == 2 else history)
        if history.shape[-1] != factors.B.shape[1]:
            raise ValueError(
                f"history has {history.shape[-1]} columns, not the {factors.B.shape[1]} of all metrics and tests; name "
                "the tests of the columns in test_ids"
            )
        if ids.ndim == 3:
            return self._scan(history, ids, factors, lr_scale, lengths, clamp=False, check=False)[:, -1]
        alpha, beta = functional.alpha_beta(*factors, ids)
        return functional.step(history, alpha, beta, self.config.identity_offset, self.scale(ids, lr_scale))

    def rollout(
        self,
        start: Tensor,
        ids: Tensor,
        lr_scale: Tensor | None = None,
        lengths: Tensor | None = None,
        test_ids: Tensor | None = None,
        factors: Factors | None = None,
        clamp: bool = True,
        check: bool = True,
        runs: Sequence[object] | None = None,
    ) -> Tensor:
        """Simulate runs, each step from the predictions before it.

        Args:
            start: (K, Q·M), values before the first step; or (K, k, Q·M), the last k values, the oldest first.
            ids: (K, T, b) int64, pool ids of every step, -1 at padding. With `factors`, rows of these; then also
                (K, T, N) floating counts, which may be fractions and carry a gradient.
            lr_scale: (K, T); None for 1.
            lengths: (K,) int64, steps of each run; T by default. Afterwards a trajectory keeps its last value.
            test_ids: (M,) int64, tests of the columns; all by default. With `factors`, only names in messages.
            factors: from `factors`, so that they are not computed again, or of unseen examples.
            clamp: whether the bounds of the configuration hold.
            check: whether infinite or undefined predictions are an error.
            runs: names of the runs in its message.

        Returns:
            (K, T+1, Q·M) float32, the start value first.

        Raises:
            ValueError: if a prediction is not finite, naming run, step and test.
        """
        names = self.column_names(test_ids)
        if factors is None:
            factors, ids = self.occurring(ids, test_ids)
        tests = names if len(names) == factors.B.shape[1] else None  # factors of other tests have no names
        return self._scan(start, ids, factors, lr_scale, lengths, clamp, check, runs, tests)

    def column_names(self, test_ids: Tensor | None = None) -> list[str]:
        """Test of each column, with its metric where there are several."""
        tests = (self.test_ids if test_ids is None else test_ids).tolist()
        if len(self.config.metrics) == 1:
            return [str(test) for test in tests]
        return [f"{test} ({metric})" for metric in self.config.metrics for test in tests]

    def _scan(
        self,
        start: Tensor,
        rows: Tensor,
        factors: Factors,
        lr_scale: Tensor | None,
        lengths: Tensor | None,
        clamp: bool,
        check: bool,
        runs: Sequence[object] | None = None,
        tests: Sequence[object] | None = None,
    ) -> Tensor:
        config = self.config
        return functional.rollout(
            start,
            rows,
            *factors,
            scale=self.scale(rows, lr_scale),
            offset=config.identity_offset,
            clamp=self.bounds(factors.B.shape[1]) if clamp else None,
            history_pad=config.history_pad,
            lengths=lengths,
            check=check,
            runs=runs,
            tests=tests,
        )

    def bounds(self, columns: int) -> tuple[Tensor, Tensor] | None:
        """Least and greatest value of each column, as the configuration says; None without any."""
        bounds = clamps(self.config.clamp, self.config.metrics)
        if all(value is None for pair in bounds.values() for value in pair):
            return None
        repeats = columns // len(bounds)
        low, high = (
            torch.tensor(
                [default if pair[side] is None else pair[side] for pair in bounds.values()], device=self.device
            ).repeat_interleave(repeats)
            for side, default in ((0, -torch.inf), (1, torch.inf))
        )
        return low, high

    def penalty(self) -> Tensor:
        """() float32, the released penalty of free factors, already times λ; 0 without one."""
        if not self.config.l2_norm:
            return torch.zeros((), device=self.device)
        table: Tensor = self.get_parameter("emb.weight")
        columns = table if self.config.kind == "linear" else table[:, :2]
        return self.config.l2_norm * functional.l2_norms(columns)

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor], **options: Any) -> "InfluenceSimulator":  # noqa: ANN401
        """Read weights of the released code.

        Args:
            state: its state dict; the text encoder in it is left out.
            **options: of `SimulatorConfig`, for `num_train` and `num_test` where the weights do not tell them, and to
                change `compat: released`.

        Returns:
            The simulator.

        Raises:
            ValueError: if the weights are not those of a released kind, or a size is missing.
        """
        model = cls(SimulatorConfig(**{"compat": "released", **released_options(state), **options}))
        given = {RENAMED.get(name, name) for name in state}
        missing = {name for name, _ in model.named_parameters()} - given
        if missing:
            raise ValueError(f"state: the weights lack {sorted(missing)[0]!r}, which {model.config.kind} needs")
        model.load_state_dict(model.state_dict() | dict(state))
        return model


def released_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Kind, order and sizes of released weights.

    Args:
        state: state dict.

    Returns:
        Options of `SimulatorConfig`.

    Raises:
        ValueError: if no released kind has such weights.
    """
    options: dict[str, Any] = {}
    if "fc_layers.0.weight" in state:
        roles = len({name.split(".")[1] for name in state if name.startswith("fc_layers.")})
        options = {"kind": "feat_concat", "norder": True, "order": roles - 1}
        options |= {"feature_dim": state["mlp.0.weight"].shape[1] // 2, "hidden_width": len(state["mlp.2.weight"])}
    elif "mlp_layers.0.0.weight" in state:
        roles = len({name.split(".")[1] for name in state if name.startswith("mlp_layers.")})
        options = {"kind": "feat_shared", "norder": True, "order": roles - 1}
        options["feature_dim"] = state["mlp_layers.0.0.weight"].shape[1]
    elif "fca.weight" in state:
        options = {"kind": "feat_concat", "feature_dim": state["fc.weight"].shape[1] // 2}
        options["hidden_width"] = len(state["fc.weight"])
    elif "mlp_a.0.weight" in state:
        options = {"kind": "feat_shared", "feature_dim": state["mlp_a.0.weight"].shape[1]}
    elif "fc1.weight" in state:
        hidden, width = state["fc1.weight"].shape
        options = {"kind": "vector", "hidden_width": hidden, "embedding_dim": width}
    elif "emb.weight" in state:
        options = {"kind": "linear"}
    else:
        raise ValueError(f"state: {', '.join(sorted(state)[:3])} … are not the weights of a released simulator")
    for name, option in (("embed.weight", "num_train"), ("test_embed.weight", "num_test")):
        if name in state:
            options[option] = len(state[name])
    return options


def _read_released(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:  # noqa: ANN401
    """Rename and drop what released weights hold beyond ours, before they are loaded."""
    unused = ("encoder.", "mlp_a.", "mlp_b.") if prefix + "fca.weight" in state else ("encoder.",)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.startswith(unused):
            del state[key]
        elif name in RENAMED:
            state[prefix + RENAMED[name]] = state.pop(key)


def _as_factors(table: Tensor) -> Factors:
    return Factors(table[:-1], table[-1])


def _rows(ids: Tensor, known: Tensor, name: str) -> Tensor:
    """Rows of ids in a table of known ones."""
    ordered, order = known.sort()
    place = torch.searchsorted(ordered, ids.clamp(min=0)).clamp(max=len(known) - 1)
    unknown = (ordered[place] != ids) & (ids != -1)
    if bool(unknown.any()):
        raise ValueError(
            f"{name}: id {int(ids[unknown][0])} is not one of the {len(known)} of the simulator; add unseen examples "
            "with their features (with_examples), or leave it out"
        )
    return torch.where(ids == -1, -1, order[place])


AutoConfig.register(SimulatorConfig.model_type, SimulatorConfig)
AutoModel.register(SimulatorConfig, InfluenceSimulator)
