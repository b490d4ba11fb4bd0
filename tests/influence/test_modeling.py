"""Simulators of all kinds: row and matrix form, examples, features, several metrics, saving."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from lit_models.influence import functional
from lit_models.influence.configuration import SimulatorConfig, SimulatorOptions
from lit_models.influence.modeling import InfluenceSimulator

N, M, D = 11, 5, 6
KINDS = {
    "linear": {"kind": "linear", "init": "normal"},
    "linear, order 3": {"kind": "linear", "init": "normal", "order": 3},
    "vector": {"kind": "vector", "embedding_dim": 3, "hidden_width": 7},
    "vector, order 2": {"kind": "vector", "order": 2},
    "feat_shared": {"kind": "feat_shared"},
    "feat_shared, order 2": {"kind": "feat_shared", "order": 2},
    "feat_shared, norder": {"kind": "feat_shared", "norder": True},
    "feat_concat": {"kind": "feat_concat", "hidden_width": 9},
    "feat_concat, order 3": {"kind": "feat_concat", "order": 3},
    "feat_concat, norder": {"kind": "feat_concat", "norder": True},
    "feat_linear": {"kind": "feat_linear", "width": 4},
    "feat_linear, order 2": {"kind": "feat_linear", "width": 4, "order": 2},
    "feat_mlp": {"kind": "feat_mlp", "width": 4},
    "feat_mlp, order 2": {"kind": "feat_mlp", "width": 4, "order": 2},
    "feat_mlp, shared": {"kind": "feat_mlp", "width": 4, "separate_towers": False},
    "feat_mlp, free features": {"kind": "feat_mlp", "width": 4, "freeze_features": False},
}
FEATURES = {name: options for name, options in KINDS.items() if options["kind"].startswith("feat")}
TWO = {"metrics": ["loss", "rougeL"], "metric_weights": [1.0, 4.0]}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"num_train": N, "num_test": M, "feature_dim": D, "batch_reference": 3}
    model = InfluenceSimulator(SimulatorConfig(**sizes, **options))
    if model.config.has_features:
        model.set_examples(train_features=draw(N, D) + 1, test_features=draw(M, D, seed=1) + 1)
    return model


def rows(order, seed=0):
    """Ten steps: ids (with a repeat, padding and an empty one), values before, values after."""
    ids = torch.randint(0, N, (10, 4), generator=torch.Generator().manual_seed(seed))
    ids[0, 1] = ids[0, 0]
    ids[1, 2:], ids[2] = -1, -1
    return ids, draw(10, order, M, seed=seed + 1), draw(10, M, seed=seed + 2)


def all_rows(model, ids, history, rate):
    """Predictions of every step and test in the row form, (R,M)."""
    number = len(ids)
    tests = model.test_ids.repeat(number)
    prediction = model(
        ids.repeat_interleave(M, 0), tests, history.transpose(1, 2).flatten(0, 1), rate.repeat_interleave(M)
    )
    return prediction.reshape(number, M)


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compat", [None, "released"])
def test_matrix_form_equals_row_form(name, compat):
    """Values and gradients."""
    model = make(**({"compat": compat} | KINDS[name]))
    ids, history, target = rows(model.config.order)
    rate, before = torch.rand(10), ids.clone()
    row = all_rows(model, ids, history, rate)
    loss = functional.masked_mse(row, target)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, parameters.values())
    matrix = model.forward_matrix(ids, history, rate)
    gradients = torch.autograd.grad(functional.masked_mse(matrix, target), parameters.values())
    torch.testing.assert_close(matrix, row, rtol=1e-4, atol=1e-5)
    for key, gradient, own in zip(parameters, gradients, expected, strict=True):
        scale = float(own.abs().max())
        torch.testing.assert_close(gradient, own, rtol=1e-3, atol=1e-5 * scale, msg=key)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("name", KINDS)
def test_row_form_equals_factors_pair_by_pair(name):
    """The sum over a batch, one pair at a time, each pair from its own inputs."""
    model = make(**KINDS[name])
    ids, history, _ = rows(model.config.order)
    rate = torch.rand(10)
    with torch.no_grad():
        factors = model.factors()
        prediction = all_rows(model, ids, history, rate)
    for row in range(3):
        for test in range(M):
            change = sum(
                sum(float(factors.A[k, i, test] * history[row, k, test]) for k in range(model.config.order))
                + float(factors.B[i, test])
                for i in ids[row].tolist()
                if i >= 0
            )
            expected = float(history[row, -1, test]) + change * float(rate[row])
            assert float(prediction[row, test]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", FEATURES)
def test_factors_of_features_are_those_of_the_published_networks(name):
    """Each pair by itself through the networks, without any of the shortcuts."""
    model = make(**FEATURES[name])
    config, factors = model.config, model.factors()
    train, test = model.train_features, model.test_features
    table = torch.cat([factors.A, factors.B[None]])
    for i, j in ((0, 0), (3, 2), (N - 1, M - 1)):
        for role in range(config.order + 1):
            if config.kind == "feat_concat":
                both = torch.cat([train[i], test[j]])
                hidden = model.mlp(both) if config.norder else torch.relu(model.fc(both))
                head = model.fc_layers[role] if config.norder else (model.fca, model.fcb)[role]
                expected = head(hidden)[0]
            else:
                left, right = (model.get_submodule(names[role]) for names in model.form.names)
                a, b = left(train[i]), right(test[j])
                expected = (a * b).sum() / len(a)
            torch.testing.assert_close(table[role, i, j], expected)


def test_tables_are_indexed_by_test_and_then_by_example():
    model = make(**KINDS["linear"])
    factors = model.factors()
    assert torch.equal(factors.A[0, 7, 3], model.emb.weight[N * 3 + 7, 0])
    assert torch.equal(factors.B[7, 3], model.emb.weight[N * 3 + 7, 1])
    other = make(seed=1, **KINDS["linear"])
    other.set_factors(factors)
    assert torch.equal(other.emb.weight, model.emb.weight)
    with pytest.raises(ValueError, match="the factors of feat_mlp are not free"):
        make().set_factors(factors)


@pytest.mark.parametrize("name", ["linear", "feat_mlp", "feat_concat", "vector"])
def test_only_some_tests_and_occurring_examples(name):
    model = make(**KINDS[name])
    ids, history, _ = rows(1)
    whole = model.forward_matrix(ids, history)
    tests = torch.tensor([3, 0, 4, 1, 2])
    some = model.forward_matrix(ids[:2], history[:2][..., tests], test_ids=tests)
    torch.testing.assert_close(some, whole[:2][:, tests])
    few = model.forward_matrix(ids[:2], history[:2][..., [4, 1]], test_ids=torch.tensor([4, 1]))
    torch.testing.assert_close(few, whole[:2][:, [4, 1]])
    factors, places = model.occurring(ids[:2])
    assert len(factors.B) == len(set(ids[:2].flatten().tolist()) - {-1}) < N
    torch.testing.assert_close(model.forward_matrix(places, history[:2], factors=factors), whole[:2])


def test_work_in_parts_changes_nothing(monkeypatch):
    for name in ("feat_concat, order 3", "feat_mlp", "vector", "linear"):
        model = make(**KINDS[name])
        with torch.no_grad():
            whole = model.factors()
            monkeypatch.setattr(functional, "ELEMENTS", 1)
            parts = model.factors()
            monkeypatch.undo()
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", ["linear, order 3", "feat_mlp"])
def test_steps_that_follow_one_another(name):
    """Rows of several steps, of which only the last value is known, against a roll-out."""
    model = make(**KINDS[name])
    ids = torch.randint(0, N, (6, 3, 2), generator=torch.Generator().manual_seed(0))
    history, rate, lengths = draw(6, model.config.order, M), torch.rand(6, 3), torch.tensor([3, 1, 2, 3, 3, 1])
    rollout = model.rollout(history, ids, rate, lengths)
    torch.testing.assert_close(model.forward_matrix(ids, history, rate, lengths=lengths), rollout[:, -1])
    single = model.forward_matrix(ids[1:2, 0], history[1:2], rate[1:2, 0])
    torch.testing.assert_close(rollout[1, -1], single[0])


def test_a_batch_of_one_row_and_one_example():
    model = make()
    value = model(torch.tensor([[2]]), torch.tensor([1]), torch.tensor([0.5]))
    assert value.shape == (1,)
    factors = model.factors()
    assert value.item() == pytest.approx((0.5 + 0.5 * factors.A[0, 2, 1] + factors.B[2, 1]).item())
    empty = model(torch.tensor([[-1, -1]]), torch.tensor([1]), torch.tensor([0.5]))
    assert empty.item() == 0.5
    assert model.forward_matrix(torch.full((2, 3), -1), torch.ones(2, M)).tolist() == [[1.0] * M] * 2


def test_inputs_in_half_precision_are_raised():
    model = make()
    ids, history, _ = rows(1)
    half = history.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = model.forward_matrix(ids, half, torch.rand(10).bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(model.forward_matrix(ids, half), model.forward_matrix(ids, half.float()))
    row = model(ids, torch.zeros(10, dtype=torch.int64), half[:, :, 0])
    torch.testing.assert_close(row, model.forward_matrix(ids, half)[:, 0])
    assert torch.equal(
        model.bfloat16().forward_matrix(ids, half), model.forward_matrix(ids, half)
    )  # weights may be narrow, results are not
    assert model.factors().B.dtype == torch.float32


# -- options -----------------------------------------------------------------------------------------------------------


def test_released_options_turn_every_change_off():
    ours, released = SimulatorOptions().resolved(), SimulatorOptions(compat="released").resolved()
    expected = {
        "identity_offset": (1.0, 0.0),
        "tower_scale": ("1/P", 1.0),
        "separate_towers": (True, False),
        "lr_scaling": (True, False),
        "standardize": (True, False),
        "history_pad": ("repeat", "zero"),
        "init": ("zeros", "normal"),
    }
    assert {name: (ours[name], released[name]) for name in ours if ours[name] != released[name]} == expected
    one = SimulatorOptions(compat="released", identity_offset=1.0, history_pad="skip").resolved()
    assert (one["identity_offset"], one["history_pad"], one["tower_scale"]) == (1.0, "skip", 1.0)


def test_each_change_has_a_switch():
    ids, history, _ = rows(1)
    rate = torch.full((10,), 0.5)
    base = make()
    weights = base.state_dict()

    def predict(**options):
        model = make(**options)
        model.load_state_dict(weights, strict=False)
        if not options.get("standardize", True):
            model.set_examples(train_features=draw(N, D) + 1, test_features=draw(M, D, seed=1) + 1)
        with torch.no_grad():
            return model.forward_matrix(ids, history, rate)

    ours, last = predict(), history[:, -1]
    torch.testing.assert_close(predict(identity_offset=0.0, lr_scaling=False), 2 * (ours - last))
    torch.testing.assert_close(predict(lr_scaling=False) - last, 2 * (ours - last))
    torch.testing.assert_close(predict(tower_scale=1.0) - last, 64 * (ours - last), rtol=1e-4, atol=1e-4)
    size = (ids >= 0).sum(1, keepdim=True)
    mean = torch.where(size > 0, 3 / size.clamp(min=1), 0.0)
    torch.testing.assert_close(predict(batch_reduce="mean") - last, mean * (ours - last), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(standardize=False), ours)
    assert not torch.allclose(predict(separate_towers=False), ours)


def test_starts_of_free_factors():
    history = torch.rand(4, 1, M)
    ids = torch.randint(0, N, (4, 3))
    assert torch.equal(make(kind="linear").forward_matrix(ids, history), history[:, 0])
    identity = make(kind="linear", identity_offset=0.0, lr_scaling=False)
    assert identity.config.init == "identity"
    torch.testing.assert_close(identity.forward_matrix(ids, history), history[:, 0])
    longer = make(kind="linear", identity_offset=0.0, lr_scaling=False, order=2, metrics=["a", "b"])
    both = torch.rand(4, 2, 2 * M)
    torch.testing.assert_close(longer.forward_matrix(ids, both), both[:, -1])
    released = make(kind="linear", compat="released").emb.weight
    assert 0.8 < float(released.std()) < 1.2


def test_released_penalty():
    model = make(kind="linear", init="normal", l2_norm=0.5)
    table = model.emb.weight
    assert model.penalty().item() == pytest.approx(0.5 * (table[:, 0].norm() + table[:, 1].norm()).item())
    wide = make(kind="vector", embedding_dim=4, l2_norm=0.5)
    assert wide.penalty().item() == pytest.approx(0.5 * wide.emb.weight[:, :2].norm(dim=0).sum().item())
    assert make().penalty() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bert"}, "kind: 'bert' is not one of linear"),
        ({"order": 0}, "order must be at least 1"),
        ({"kind": "feat_shared", "order": 2, "norder": False}, "norder: feat_shared of order 2 exists"),
        ({"identity_offset": 0.0}, "lr_scaling: effects are scaled"),
        ({"identity_offset": 0.5}, "identity_offset must be 0 or 1"),
        ({"tower_scale": "1/D"}, "tower_scale must be a number or 1/P"),
        ({"l2_norm": 0.1}, "l2_norm: feat_mlp has no table to penalise; use weight_decay"),
        ({"l2_norm": -0.1, "kind": "linear"}, "l2_norm must not be negative"),
        ({"metrics": ["loss", "loss"]}, "metrics must be different names"),
        ({"metrics": []}, "metrics must be different names"),
        ({"metrics": ["rouge.l"]}, "without dots"),
        ({"metric_weights": [1.0, 2.0]}, "metric_weights must be one weight"),
        ({"clamp": [1.0, 0.0]}, "clamp: .* of loss must be a least and a greater value"),
        ({"clamp": {"bleu": [0.0, 1.0]}}, "clamp: 'bleu' is not one of metrics"),
        ({"compat": "paper"}, "compat must be released or null"),
        ({"history_pad": "mirror"}, "history_pad: 'mirror' is not one of zero, repeat, skip"),
        ({"num_train": None}, "num_train must be at least 1, got None"),
        ({"feature_dim": None}, "feature_dim must be at least 1"),
        ({"batch_reduce": "mean", "batch_reference": None}, "batch_reference: batch_reduce: mean needs"),
        (
            {"kind": "linear", "identity_offset": 0.0, "lr_scaling": False, "batch_reference": None},
            "batch_reference: init: identity needs",
        ),
        ({"lr_reference": 0.0}, "lr_reference must be positive"),
    ],
)
def test_bad_options_are_explained(options, message):
    sizes = {"num_train": N, "num_test": M, "feature_dim": D, "batch_reference": 3}
    with pytest.raises(ValueError, match=message):
        InfluenceSimulator(SimulatorConfig(**(sizes | options)))


# -- examples ----------------------------------------------------------------------------------------------------------


def test_ids_are_mapped_to_rows():
    model, other = make(), make()
    train_ids, test_ids = torch.randperm(50)[:N] + 7, torch.tensor([40, 2, 9, 11, 0])
    other.set_examples(train_ids, test_ids)
    ids, history, _ = rows(1)
    named = torch.where(ids < 0, -1, train_ids[ids])
    torch.testing.assert_close(other.forward_matrix(named, history), model.forward_matrix(ids, history))
    one = other(named, test_ids[[3]].expand(10), history[:, :, 3])
    torch.testing.assert_close(one, model.forward_matrix(ids, history)[:, 3])
    two = other.rollout(history[:, 0, :2], named[:, None], test_ids=test_ids[:2])
    torch.testing.assert_close(two[:, 1], model.forward_matrix(ids, history)[:, :2])
    with pytest.raises(ValueError, match="train_ids: id 1000 is not one of the 11"):
        other.forward_matrix(torch.tensor([[1000]]), history[:1])
    with pytest.raises(ValueError, match="test_ids: id 3 is not one of the 5"):
        other(named[:1], torch.tensor([3]), history[:1, 0, 0])
    with pytest.raises(ValueError, match="train_ids: id -2"):
        other.forward_matrix(torch.tensor([[-2]]), history[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_ids": torch.arange(3)}, "train_ids have shape"),
        ({"train_ids": torch.zeros(N, dtype=torch.int64)}, "train_ids must be different"),
        ({"test_ids": torch.arange(M) - 1}, "test_ids must be different and not negative"),
        ({"train_features": torch.zeros(N, D + 1)}, "train_features have shape"),
        ({"test_features": torch.full((M, D), torch.nan)}, "test_features must be finite; example 0"),
    ],
)
def test_bad_examples_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().set_examples(**arguments)
    with pytest.raises(ValueError, match="linear reads no features"):
        make(kind="linear").set_examples(train_features=draw(N, D))


@pytest.mark.parametrize("name", FEATURES)
def test_unseen_examples(name):
    """Factors from given features with the saved statistics; the own features give the own factors."""
    model = make(**FEATURES[name])
    train, test = draw(N, D) + 1, draw(M, D, seed=1) + 1
    with torch.no_grad():
        own = model.factors()
        torch.testing.assert_close(model.factors(train, test), own)
        torch.testing.assert_close(
            model.factors(train[2:5].bfloat16().float()[:, :], None).B[0], own.B[2], atol=0.05, rtol=1
        )
        new = model.factors(draw(3, D, seed=5), draw(2, D, seed=6))
        other = model.with_examples(
            torch.tensor([100, 101, 102]), draw(3, D, seed=5), torch.tensor([100, 101]), draw(2, D, seed=6)
        )
        whole = other.factors()
    assert new.A.shape == (model.config.order, 3, 2)
    torch.testing.assert_close(whole.A[:, :N, :M], own.A)
    torch.testing.assert_close(whole.B[N:, M:], new.B)
    assert (model.config.num_train, len(model.train_ids), len(model.train_features)) == (N, N, N)
    assert (other.config.num_train, len(other.test_ids)) == (N + 3, M + 2)
    ids = torch.tensor([[[0, 101]], [[102, -1]]])
    value = other.rollout(torch.ones(2, 1), ids, test_ids=torch.tensor([100]))
    assert value[0, 1, 0].item() == pytest.approx(
        1 + (whole.A[:, [0, N + 1], M].sum() + whole.B[[0, N + 1], M].sum()).item(), rel=1e-5
    )


def test_unseen_examples_that_do_not_fit():
    model = make()
    with pytest.raises(ValueError, match="train_ids: unseen examples need ids other than"):
        model.with_examples(torch.tensor([0]), draw(1, D))
    with pytest.raises(ValueError, match="train_features have 1 rows for 2 ids"):
        model.with_examples(torch.tensor([20, 21]), draw(1, D))
    with pytest.raises(ValueError, match="test_ids and test_features of unseen examples belong together"):
        model.with_examples(test_ids=torch.tensor([20]))
    for call in (
        lambda model: model.factors(draw(1, D)),
        lambda model: model.with_examples(torch.tensor([20]), draw(1, D)),
    ):
        with pytest.raises(ValueError, match="linear knows no unseen examples"):
            call(make(kind="linear"))


def test_statistics_are_those_of_the_pool():
    model = make()
    torch.testing.assert_close(model.pool_mean, (draw(N, D) + 1).mean(0))
    expected = functional.standardize(draw(M, D, seed=1) + 1, model.pool_mean)
    torch.testing.assert_close(model.test_features, expected)


def test_self_influence():
    shared = make(kind="feat_shared")
    own = shared.self_influence()
    torch.testing.assert_close(own.A[0], shared.mlp_a(shared.train_features).square().sum(1) / D)
    assert (own.B >= 0).all()
    concat = make(kind="feat_concat")
    both = torch.cat([concat.train_features, concat.train_features], 1)
    torch.testing.assert_close(concat.self_influence().B, concat.fcb(torch.relu(concat.fc(both))).squeeze(1))
    separate = make(order=2).self_influence()
    assert separate.A.shape == (2, N)
    torch.testing.assert_close(shared.self_influence(draw(N, D) + 1).A, own.A)
    with pytest.raises(ValueError, match="linear has no factors of an example with itself; use feat_shared"):
        make(kind="linear").self_influence()


# -- several metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_several_metrics_have_heads_of_their_own(name):
    """Columns of the first metric come first; only the last layer tells the metrics apart."""
    model = make(**KINDS[name], **TWO)
    order = model.config.order
    ids, history, _ = rows(order)
    both = torch.cat([history, 2 * history], -1)
    matrix = model.forward_matrix(ids, both)
    assert matrix.shape == (10, 2 * M)
    for number in range(2):
        tests = model.test_ids.repeat(10)
        past = both[..., number * M : (number + 1) * M].transpose(1, 2).flatten(0, 1)
        row = model(ids.repeat_interleave(M, 0), tests, past, metric=torch.full((10 * M,), number))
        torch.testing.assert_close(matrix[:, number * M : (number + 1) * M], row.reshape(10, M), rtol=1e-4, atol=1e-5)
    factors, second = model.factors(), model.factors(metric="rougeL")
    torch.testing.assert_close(factors.A[..., M:], second.A)
    assert not torch.allclose(factors.B[:, :M], factors.B[:, M:])
    single = make(**KINDS[name])
    shapes = {key: value.shape for key, value in single.named_parameters()}
    grown = {key for key, value in model.named_parameters() if value.shape != shapes[key]}
    assert all(key.startswith(("emb", "fc", "mlp", "train_m", "test_m")) for key in grown)
    assert grown
    with pytest.raises(ValueError, match="metric: 'bleu' is not simulated"):
        model.factors(metric="bleu")


def test_bounds_by_metric():
    model = make(metrics=["loss", "accuracy"], clamp={"loss": [0.0, None], "accuracy": [0.0, 1.0]})
    low, high = model.bounds(2 * M)
    assert low.tolist() == [0.0] * 2 * M
    assert high.tolist() == [torch.inf] * M + [1.0] * M
    value = model.rollout(torch.full((1, 2 * M), 5.0), torch.full((1, 1, 1), -1))
    assert value[0, 1].tolist() == [5.0] * M + [1.0] * M
    assert make().bounds(M) is None


# -- roll-outs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_roll_out_repeats_single_steps(name):
    model = make(**KINDS[name])
    order = model.config.order
    ids = torch.randint(0, N, (3, 5, 2), generator=torch.Generator().manual_seed(3))
    start, rate = draw(3, M), torch.rand(3, 5)
    with torch.no_grad():
        trajectory = model.rollout(start, ids, rate)
        past = [start] * order
        for time in range(5):
            past.append(model.forward_matrix(ids[:, time], torch.stack(past[-order:], 1), rate[:, time]))
            torch.testing.assert_close(trajectory[:, time + 1], past[-1], rtol=1e-4, atol=1e-5)
        factors = model.factors()
        torch.testing.assert_close(model.rollout(start, ids, rate, factors=factors), trajectory, rtol=1e-4, atol=1e-5)
        counts = functional.counts(ids, N)
        torch.testing.assert_close(
            model.rollout(start, counts, rate, factors=factors), trajectory, rtol=1e-4, atol=1e-5
        )


def test_divergence_is_explained_by_names():
    model = make(kind="linear", init="normal")
    model.set_examples(test_ids=torch.tensor([70, 71, 72, 73, 74]))
    with torch.no_grad():
        model.emb.weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"roll-out: run base, test 7\d becomes .* at step \d"):
        model.rollout(torch.ones(1, M), torch.zeros(1, 5, 2, dtype=torch.int64), runs=["base"])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_read_again(name, tmp_path):
    model = make(**KINDS[name], **TWO)
    model.set_examples(torch.arange(N) + 5, torch.arange(M) + 3)
    model.save_pretrained(tmp_path)
    loaded, info = InfluenceSimulator.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {key: value.tolist() for key, value in loaded.state_dict().items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }
    auto = AutoModel.from_pretrained(tmp_path)
    assert type(auto) is InfluenceSimulator
    with torch.no_grad():
        torch.testing.assert_close(auto.factors(), model.factors())
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == loaded.config.to_dict()
    assert config.kind == model.config.kind


def test_saved_options_are_resolved(tmp_path):
    SimulatorConfig(compat="released", identity_offset=1.0).save_pretrained(tmp_path)
    config = SimulatorConfig.from_pretrained(tmp_path)
    assert (config.identity_offset, config.tower_scale, config.history_pad) == (1.0, 1.0, "zero")


def test_released_files_with_encoder_and_features():
    model = make(kind="feat_concat", compat="released")
    state = {key: value for key, value in model.state_dict().items() if key.startswith("fc")}
    state |= {"mlp_a.0.weight": torch.ones(D, D), "encoder.layer.0.weight": torch.ones(3)}
    state |= {"embed.weight": draw(N, D), "test_embed.weight": draw(M, D, seed=1)}
    before = dict(state)
    loaded = InfluenceSimulator.from_released(state)
    assert state.keys() == before.keys()
    assert torch.equal(loaded.train_features, state["embed.weight"])
    assert torch.equal(loaded.test_features, state["test_embed.weight"])
    assert (loaded.config.num_train, loaded.config.num_test, loaded.config.identity_offset) == (N, M, 0.0)
    with pytest.raises(ValueError, match="are not the weights of a released simulator"):
        InfluenceSimulator.from_released({"head.weight": torch.ones(1)})
    del state["fcb.bias"]
    with pytest.raises(ValueError, match=r"the weights lack 'fcb\.bias', which feat_concat needs"):
        InfluenceSimulator.from_released(state)
    with pytest.raises(ValueError, match="num_train must be at least 1"):
        InfluenceSimulator.from_released({"emb.weight": torch.ones(4, 2)})
