"""Other curricula, examples left out, effects of single examples, rankings and chosen batches."""

import json

import numpy as np
import pytest
import torch

from lit_models.influence import functional, tables
from lit_models.influence.configuration import SimulatorConfig
from lit_models.influence.counterfactual import (
    Change,
    leave_out,
    mean_effects,
    occurrences,
    prune,
    rank,
    select_batches,
    simulate,
    sort_effects,
    stack,
    trajectory_effects,
    what_if,
)
from lit_models.influence.curricula import as_ids, mean_of_runs, read_curriculum, read_run
from lit_models.influence.functional import Factors
from lit_models.influence.modeling import InfluenceSimulator
from lit_models.recording import write_run

N, M, D = 12, 5, 6
CURRICULUM = [[3, 1], [4, 1, 7], [0, 3], [9, 9]]


def linear(seed=0, **options):
    """A simulator whose free factors are random numbers."""
    generator = torch.Generator().manual_seed(seed)
    options = {"kind": "linear", "lr_scaling": False, "num_train": N, "num_test": M, "batch_reference": 2} | options
    net = InfluenceSimulator(SimulatorConfig(**options))
    columns = M * len(net.config.metrics)
    net.set_examples(test_ids=torch.tensor([10, 20, 30, 40, 50]))
    A = torch.randn(net.config.order, N, columns, generator=generator) / 10
    net.set_factors(Factors(A, torch.randn(N, columns, generator=generator) / 10))
    return net


def featured(**options):
    """A simulator with features, some of whose ids are not their rows."""
    torch.manual_seed(0)
    options = {"kind": "feat_mlp", "lr_reference": 0.1, "num_train": N, "num_test": M, "feature_dim": D} | options
    net = InfluenceSimulator(SimulatorConfig(**options))
    net.set_examples(torch.arange(N) + 100, torch.arange(M) + 10, torch.randn(N, D), torch.randn(M, D))
    return net


def start_of(seed=1):
    return torch.rand(M, generator=torch.Generator().manual_seed(seed)) + 1


# -- curricula ---------------------------------------------------------------------------------------------------------


def test_lists_become_a_padded_table():
    assert as_ids(CURRICULUM).tolist() == [[3, 1, -1], [4, 1, 7], [0, 3, -1], [9, 9, -1]]
    assert as_ids([np.array([1, 2]), np.array([3])]).tolist() == [[1, 2], [3, -1]]
    with pytest.raises(ValueError, match="curriculum must be a table of ids"):
        as_ids(torch.zeros(2, 3))


def test_curricula_of_other_lengths_are_stacked_and_stay_what_they_are():
    net, start = linear(), start_of()
    ids, lengths = stack([CURRICULUM, CURRICULUM[:2]])
    assert ids.shape == (2, 4, 3)
    assert lengths.tolist() == [4, 2]
    both = simulate(net, ids, start, lengths=lengths)
    assert torch.allclose(both[0], simulate(net, CURRICULUM, start))
    assert torch.allclose(both[1, :3], simulate(net, CURRICULUM[:2], start))
    assert torch.equal(both[1, 4], both[1, 2])


def test_dropped_examples_leave_a_hole_and_no_trace_in_the_original():
    table = as_ids(CURRICULUM)
    kept = table.clone()
    assert leave_out(table, [1, 9]).tolist() == [[3, -1, -1], [4, -1, 7], [0, 3, -1], [-1, -1, -1]]
    assert torch.equal(table, kept)
    assert torch.equal(leave_out(table, [5]), table)
    assert torch.equal(leave_out(table, [-1]), table)


def test_replaced_examples_come_from_the_rest_of_the_curriculum():
    table = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(t))[:6] for t in range(40)])
    table[3, 4:] = -1
    removed = [0, 5, 7, 11]
    new = leave_out(table, removed, "replace", torch.Generator().manual_seed(0))
    assert not torch.isin(new, torch.tensor(removed)).any()
    gone = torch.isin(table, torch.tensor(removed))
    assert torch.equal(new[~gone], table[~gone])
    assert torch.equal((new >= 0).sum(1), (table >= 0).sum(1))
    assert torch.isin(new[gone], table[~gone]).all()
    for row in new:
        row = row[row >= 0]
        assert len(row.unique()) == len(row)
    assert torch.equal(new, leave_out(table, removed, "replace", torch.Generator().manual_seed(0)))
    assert not torch.equal(new, leave_out(table, removed, "replace", torch.Generator().manual_seed(1)))
    assert len(new[gone].unique()) > 8  # substitutes are drawn, and not one of them for all


def test_substitutes_repeat_only_where_there_are_too_few():
    new = leave_out([[0, 1, 2], [3, 4, 0]], [0, 1, 2], "replace", torch.Generator().manual_seed(0))
    assert set(new[0].tolist()) == {3, 4}
    assert sorted(new[1].tolist())[:2] in ([3, 3], [3, 4])
    with pytest.raises(ValueError, match="nothing can replace them; drop them"):
        leave_out([[0, 1]], [0, 1], "replace")
    with pytest.raises(ValueError, match="mode must be drop or replace, got 'swap'"):
        leave_out([[0, 1]], [0], "swap")


# -- simulations -------------------------------------------------------------------------------------------------------


def test_simulations_follow_the_recurrence():
    net, value = linear(), start_of()
    A, B = (part.detach() for part in net.factors())
    expected = [value]
    for batch in CURRICULUM:
        value = value + sum(A[0, i] * value + B[i] for i in batch)
        expected.append(value)
    result = simulate(net, CURRICULUM, start_of())
    assert torch.allclose(result, torch.stack(expected), atol=1e-6)
    some = simulate(net, CURRICULUM, start_of()[[3, 0]], tests=[40, 10])
    assert torch.allclose(some, result[:, [3, 0]])


def test_one_of_several_metrics_with_its_own_bounds():
    net = linear(metrics=["loss", "bleu"], clamp={"loss": [0.0, None], "bleu": [0.9, 1.1]})
    table = Factors(*(part.unflatten(-1, (2, M)) for part in net.factors()))
    single = linear()
    single.set_factors(Factors(table.A[:, :, 1], table.B[:, 1]))
    free = simulate(single, CURRICULUM, start_of())
    bounded = simulate(net, CURRICULUM, start_of(), metric="bleu")
    assert bounded[1:].min() >= 0.9
    assert bounded[1:].max() <= 1.1
    assert torch.allclose(bounded[1], free[1].clamp(0.9, 1.1))
    with pytest.raises(ValueError, match="metric: 'rougeL' is not simulated; take one of loss, bleu"):
        simulate(net, CURRICULUM, start_of(), metric="rougeL")


def test_learning_rates_are_taken_over_the_reference():
    net = featured()
    ids, start = torch.tensor([[100, 103], [104, 111]]), start_of()
    whole = simulate(net, ids, start, lr=0.1)
    assert torch.allclose(whole, simulate(net, ids, start, lr=[0.1, 0.1]))
    half = simulate(net, ids, start, lr=torch.tensor([0.05, 0.0]))
    assert torch.allclose(half[1] - start, (whole[1] - start) / 2, atol=1e-6)
    assert torch.equal(half[2], half[1])
    for lr, message in (
        (None, "lr: the simulator scales effects by the learning rate; give that of every step, or one for all"),
        ([0.1] * 3, "lr has 3 rates for 2 steps"),
        ([0.1, float("nan")], "lr holds a rate that is no finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(net, ids, start, lr=lr)


def test_unseen_examples_are_simulated_from_their_features():
    net = featured()
    features = torch.randn(2, D)
    more = net.with_examples(torch.tensor([7, 8]), features)
    result = simulate(more, [[100, 7], [8, 7]], start_of(), lr=0.1)
    A, B = (part.detach()[..., 0, :] for part in net.factors(features[:1]))
    start = start_of()
    assert torch.allclose(simulate(more, [[7]], start, lr=0.1)[1], start + A[0] * start + B, atol=1e-6)
    known = simulate(more, [[100, 103]], start_of(), lr=0.1)
    assert torch.allclose(known, simulate(net, [[100, 103]], start_of(), lr=0.1))
    assert result.shape == (3, M)
    assert not torch.allclose(result[1], simulate(more, [[100]], start_of(), lr=0.1)[1])
    with pytest.raises(ValueError, match="id 7 is not one of the 12"):
        simulate(net, [[100, 7]], start_of(), lr=0.1)


def test_starts_must_fit_and_be_known():
    with pytest.raises(ValueError, match="start has 4 columns for 5 tests"):
        simulate(linear(), CURRICULUM, torch.ones(4))
    start = start_of()
    start[2] = torch.nan
    with pytest.raises(ValueError, match="test 30 before step 1 is nan"):
        simulate(linear(), CURRICULUM, start)


def test_histories_of_higher_order_start_from_several_values():
    net = linear(order=2, history_pad="skip")
    history = torch.stack([start_of(1), start_of(2)])
    A, B = (part.detach() for part in net.factors())
    batch = CURRICULUM[0]
    first = history[1] + sum(A[0, i] * history[0] + A[1, i] * history[1] + B[i] for i in batch)
    assert torch.allclose(simulate(net, CURRICULUM, history)[1], first, atol=1e-6)
    effects = trajectory_effects(net, CURRICULUM, history)
    assert effects.shape == (4, N)


def test_what_if_compares_the_ends():
    net, start = linear(), start_of()
    change = what_if(net, CURRICULUM, leave_out(CURRICULUM, [9]), start)
    assert torch.equal(change.before, simulate(net, CURRICULUM, start))
    assert torch.equal(change.difference, change.after[-1] - change.before[-1])
    assert torch.allclose(change.after[-1], change.before[-2])  # the last batch is empty now
    draws = torch.stack([leave_out(CURRICULUM, [9], "replace", torch.Generator().manual_seed(s)) for s in range(3)])
    several = what_if(net, CURRICULUM, draws, start)
    assert several.after.shape == (3, 5, M)
    assert torch.allclose(several.difference, several.after[:, -1].mean(0) - several.before[-1])


def test_smaller_batches_need_the_identity_offset():
    net = linear(identity_offset=0.0, init="normal")
    with pytest.raises(ValueError, match="identity_offset, whose values follow the number of examples"):
        what_if(net, CURRICULUM, leave_out(CURRICULUM, [0]), start_of())
    replaced = leave_out(CURRICULUM, [0], "replace", torch.Generator().manual_seed(0))
    assert what_if(net, CURRICULUM, replaced, start_of()).difference.shape == (M,)
    with pytest.raises(ValueError, match="trajectory_effects: one more example means nothing"):
        trajectory_effects(net, CURRICULUM, start_of())


# -- effects -----------------------------------------------------------------------------------------------------------


def test_mean_effects_are_changes_at_the_mean_value():
    net, reference = linear(), torch.rand(7, M) + 1
    effects = mean_effects(net, reference)
    mean = reference.mean(0)
    for example in (0, 5):
        one = simulate(net, [[example]], mean)[1] - mean
        assert torch.allclose(effects[example], one, atol=1e-6)
    reference[2, 1] = torch.nan
    assert mean_effects(net, reference).isfinite().all()
    reference[:, 1] = torch.nan
    with pytest.raises(ValueError, match="reference: column 1 has no finite value"):
        mean_effects(net, reference)


def test_mean_effects_without_offset_count_from_the_share_of_an_example():
    plain, mean = linear(), start_of()
    A, B = (part.detach() for part in plain.factors())
    net = linear(identity_offset=0.0, init="identity")
    net.set_factors(Factors(A + 0.5, B))  # the same simulator for batches of 2
    assert torch.allclose(mean_effects(net, mean), mean_effects(plain, mean), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"batch_reduce": "mean"}, {"order": 3}, {"clamp": [0.0, None]}])
def test_gradients_over_the_curriculum_equal_finite_differences(options):
    net, start = linear(**options), start_of().double()
    effects = trajectory_effects(net, CURRICULUM, start, tests=None)
    A, B = (part.detach().double() for part in net.factors())
    table = functional.counts(as_ids(CURRICULUM), N)

    def final(counts):
        # In double precision, without what the simulator shares with the function under test.
        window = [start] * net.config.order
        for row in counts:
            scale = 2 / row.sum() if options.get("batch_reduce") else 1.0
            change = sum((row @ A[lag]) * window[lag] for lag in range(net.config.order)) + row @ B
            value = window[-1] + scale * change
            value = value.clamp(min=0) if "clamp" in options else value
            window = [*window[1:], value]
        return window[-1].mean()

    step = 1e-4
    for t, i in ((0, 0), (1, 7), (2, 11), (3, 9)):
        shift = torch.zeros(4, N, dtype=torch.float64)
        shift[t, i] = step
        slope = (final(table.double() + shift) - final(table.double() - shift)) / (2 * step)
        assert float(effects[t, i]) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


def test_gradients_tell_what_leaving_out_a_little_does():
    net, start = linear(), start_of()
    net.set_factors(Factors(*(part / 50 for part in net.factors())))  # small effects, where first order is enough
    effects, counts = trajectory_effects(net, CURRICULUM, start), occurrences(net, CURRICULUM)
    assert counts.sum(1).tolist() == [2, 3, 2, 2]
    assert counts[3, 9] == 2
    for example in (1, 3, 9):
        change = what_if(net, CURRICULUM, leave_out(CURRICULUM, [example]), start).difference.mean()
        assert float(-(effects * counts)[:, example].sum()) == pytest.approx(float(change), rel=0.05)


def test_gradients_are_taken_where_no_gradients_are_wanted():
    with torch.no_grad():
        assert trajectory_effects(linear(), CURRICULUM, start_of()).abs().sum() > 0


def test_gradients_of_a_simulator_with_features_follow_its_ids():
    net = featured()
    ids = torch.tensor([[100, 103], [104, 111]])
    effects = trajectory_effects(net, ids, start_of()[2:3], lr=[0.1, 0.05], tests=[12])
    assert effects.shape == (2, N)
    bigger = simulate(net, [[100, 103], [104, 111, 106]], start_of()[2:3], lr=[0.1, 0.05], tests=[12])
    smaller = simulate(net, ids, start_of()[2:3], lr=[0.1, 0.05], tests=[12])
    assert float(effects[1, 6]) == pytest.approx(float(bigger[-1, 0] - smaller[-1, 0]), rel=1e-3, abs=1e-6)


# -- ranking and selection ---------------------------------------------------------------------------------------------


def planted(seed=0):
    """Factors of a system in which example 7 helps and example 2 harms, and recorded runs of it."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(1, N, M, generator=generator) / 200 - 0.01
    B = torch.randn(N, M, generator=generator) / 100
    B[7], B[2] = -0.2, 0.2
    ids = torch.stack([torch.randperm(N, generator=generator)[: N // 2 * 2].reshape(-1, 2) for _ in range(60)])
    values = functional.rollout(torch.rand(60, M, generator=generator) + 2, ids, A, B)
    return Factors(A, B), ids, values


def fitted():
    """A simulator in closed form of the planted system, and the mean of its runs."""
    _, ids, values = planted()
    net = linear()
    history, target = values[:, :-1].reshape(-1, 1, M), values[:, 1:].reshape(-1, M)
    (fit,) = functional.ridge(ids.flatten(0, 1), history, target, N, [1e-6])
    net.set_factors(Factors(fit.A.float(), fit.B.float()))
    return net, values.mean(0)


def test_the_planted_examples_are_found_from_runs_alone():
    net, mean = fitted()
    ranking = rank(net, mean)
    assert ranking.ids[0] == 7
    assert ranking.ids[-1] == 2
    assert (ranking.effects.diff() >= 0).all()
    true, _, _ = planted()
    expected = (true.A[0] * mean.mean(0) + true.B).mean(1)
    assert torch.allclose(ranking.effects, expected[ranking.ids], atol=1e-3)
    assert rank(net, mean, goal="max").ids[0] == 2
    assert rank(net, mean, pool=[1, 2, 3]).ids[-1] == 2
    single = rank(net, mean[:, [4]], tests=[50])
    assert torch.equal(single.effects, mean_effects(net, mean)[:, 4][single.ids])
    with pytest.raises(ValueError, match="goal must be min or max, got 'low'"):
        rank(net, mean, goal="low")
    with pytest.raises(ValueError, match="reference has 1 columns for 5 tests"):
        rank(net, mean[:, :1])


def test_unseen_examples_are_ranked_among_the_others():
    net = featured().with_examples(torch.tensor([7]), torch.randn(1, D))
    ranking = rank(net, start_of())
    assert sorted(ranking.ids.tolist()) == [7, *range(100, 112)]
    assert rank(net, start_of(), pool=[7]).ids.tolist() == [7]


def test_pruning_drops_the_most_harmful():
    ranking = sort_effects(torch.tensor([5, 6, 7, 8]), torch.tensor([0.3, -0.1, 0.0, 0.2]))
    assert ranking.ids.tolist() == [6, 7, 8, 5]
    kept, dropped = prune(ranking, 0.5)
    assert kept.tolist() == [6, 7]
    assert dropped.tolist() == [5, 8]
    assert prune(ranking, 0).kept.tolist() == [5, 6, 7, 8]
    assert prune(ranking, 1).dropped.tolist() == [5, 8, 7, 6]
    with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1, got 1\.5"):
        prune(ranking, 1.5)


def test_chosen_batches_are_the_best_ones_at_every_step():
    net, start = linear(), start_of()
    ids, trajectory = select_batches(net, start, 3, 2)
    assert torch.allclose(trajectory, simulate(net, ids, start), atol=1e-6)
    assert len(ids.unique()) == 6
    pairs = torch.combinations(torch.arange(N))
    steps = simulate(net, pairs[:, None], start).mean(-1)[:, 1]
    assert ids[0].tolist() == pairs[steps.argmin()].tolist()
    assert trajectory[-1].mean() < min(
        simulate(net, torch.randperm(N)[:6].reshape(3, 2), start)[-1].mean() for _ in range(20)
    )
    up, _ = select_batches(net, start, 3, 2, goal="max")
    assert up[0].tolist() == pairs[steps.argmax()].tolist()
    often, again = select_batches(net, start, 3, 2, uses=None)
    assert torch.equal(often[0], ids[0])
    assert again[-1].mean() <= trajectory[-1].mean()


@pytest.mark.parametrize(("pool", "batch", "steps", "uses"), [(3, 2, 3, 2), (4, 3, 4, 3), (5, 2, 5, 2), (5, 4, 5, 4)])
def test_a_pool_that_is_just_large_enough_fills_all_batches(pool, batch, steps, uses):
    ids, _ = select_batches(linear(), start_of(), steps, batch, pool=range(pool), uses=uses)
    assert ids.shape == (steps, batch)
    assert all(len(row.unique()) == batch for row in ids)
    assert ids.flatten().bincount().tolist() == [uses] * pool
    with pytest.raises(ValueError, match=f"pool: {pool} examples, at most {uses} times each, do not fill {steps + 1}"):
        select_batches(linear(), start_of(), steps + 1, batch, pool=range(pool), uses=uses)


def test_batches_are_chosen_with_learning_rates_and_bounds():
    net = featured(clamp=[1.2, None], batch_reduce="mean", batch_reference=4)
    ids, trajectory = select_batches(net, start_of() + 1, 4, 2, lr=[0.1, 0.1, 0.05, 0.0])
    assert torch.allclose(trajectory, simulate(net, ids, start_of() + 1, lr=[0.1, 0.1, 0.05, 0.0]), atol=1e-6)
    assert torch.equal(trajectory[4], trajectory[3])
    assert ids.min() >= 100
    with pytest.raises(ValueError, match="pool: 12 examples, any number of times, do not fill 1 batches of 13"):
        select_batches(net, start_of(), 1, 13, lr=0.1, uses=None)


# -- recorded runs and files -------------------------------------------------------------------------------------------


def record(folder, skipped=(), order=(10, 20, 30, 40, 50), values=None):
    """Write a run of four steps whose values are 10·step + column, and open none of it."""
    table = np.arange(5)[:, None] * 10.0 + np.arange(M) if values is None else values
    ids = [[0, 1], [2, 3], [4], [5, 6]]
    flags = [step in skipped for step in range(1, 5)]
    lr = [[0.1, 0.3], [0.1, 0.1], [0.05, 0.05], [0.02, 0.04]]
    write_run(folder, {"test_ids": list(order)}, ids, lr, range(5), {"loss": table}, flags)
    return folder


def test_recorded_runs_become_curricula(tmp_path):
    net = linear()
    run = read_run(record(tmp_path / "a"), net)
    assert run.ids.tolist() == [[0, 1], [2, 3], [4, -1], [5, 6]]
    assert run.lr.tolist() == pytest.approx([0.2, 0.1, 0.05, 0.03])
    assert run.start.tolist() == [0, 1, 2, 3, 4]
    assert run.values[3].tolist() == [30, 31, 32, 33, 34]
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    other = read_run(record(tmp_path / "b", order=(50, 10, 20, 30, 40)), net, tests=[10, 50])
    assert other.start.tolist() == [1, 0]
    with pytest.raises(ValueError, match="test 11 was not recorded"):
        read_run(tmp_path / "a", net, tests=[11])


def test_skipped_steps_are_no_steps(tmp_path):
    run = read_run(record(tmp_path / "a", skipped=(2,)), linear())
    assert run.ids.tolist() == [[0, 1], [4, -1], [5, 6]]
    assert run.steps.tolist() == [0, 1, 3, 4]
    assert run.values[:, 0].tolist() == [0, 20, 30, 40]  # what stood after the skipped step is the newest value


def test_runs_start_where_all_tests_are_known(tmp_path):
    values = np.arange(5)[:, None] * 10.0 + np.arange(M)
    values[0, 2] = np.nan
    values[3, 1] = np.nan
    run = read_run(record(tmp_path / "a", values=values), linear())
    assert run.start.tolist() == [10, 11, 12, 13, 14]
    assert run.ids.tolist() == [[2, 3], [4, -1], [5, 6]]
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert run.values.isnan().nonzero().tolist() == [[2, 1]]
    net = linear(order=2, history_pad="skip")
    assert read_run(tmp_path / "a", net).start[:, 0].tolist() == [10, 20]
    assert len(read_run(tmp_path / "a", net).ids) == 2
    values[:, 4] = np.nan
    record(tmp_path / "b", values=values)
    with pytest.raises(ValueError, match="no step has values of all tests to start from"):
        read_run(tmp_path / "b", linear())


def test_the_mean_of_runs_is_taken_step_by_step(tmp_path):
    record(tmp_path / "a")
    record(tmp_path / "b", values=np.full((5, M), 2.0))
    mean = mean_of_runs([tmp_path / "a", tmp_path / "b"], linear())
    assert mean[:, 0].tolist() == [1, 6, 11, 16, 21]
    with pytest.raises(ValueError, match="runs: there are none"):
        mean_of_runs([], linear())


def test_curricula_are_read_from_files(tmp_path):
    file = tmp_path / "curriculum.json"
    file.write_text(json.dumps(CURRICULUM))
    found = read_curriculum(file, linear())
    assert torch.equal(found.ids, as_ids(CURRICULUM))
    assert found.start is None
    start = {str(test): test / 10 for test in (10, 20, 30, 40, 50)}
    file.write_text(json.dumps({"ids": CURRICULUM, "lr": 0.1, "start": start}))
    found = read_curriculum(file, linear(), tests=[30, 10])
    assert found.start.tolist() == [3, 1]
    assert found.lr == pytest.approx(0.1)
    file.write_text(json.dumps([{"ids": CURRICULUM, "start": [list(range(5)), list(range(5, 10))]}]))
    two = linear(metrics=["loss", "bleu"])
    assert read_curriculum(file, two, tests=[30, 10], metric="bleu").start.tolist() == [7, 5]
    assert read_curriculum(record(tmp_path / "run"), linear()).start.tolist() == [0, 1, 2, 3, 4]
    for text, message in (
        ("{", "it holds no curriculum; write a list"),
        ('{"lr": 1}', "'ids' is missing"),
        ("[1, 2]", "it holds no curriculum"),
        ('{"ids": [[1]], "start": {"10": 1}}', "20 is missing"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_curriculum(file, linear())
    with pytest.raises(ValueError, match="there is no such run or file"):
        read_curriculum(tmp_path / "none", linear())


# -- tables ------------------------------------------------------------------------------------------------------------


def test_trajectories_come_back_from_parquet(tmp_path):
    net = linear()
    ids, lengths = stack([CURRICULUM, CURRICULUM[:2]])
    values = simulate(net, ids, start_of(), lengths=lengths)
    columns = tables.trajectory_table(values, net.test_ids, "loss", ["long", "short"], lengths)
    found = tables.read_table(tables.write_table(tmp_path / "deep" / "a.parquet", columns))
    assert list(found) == ["run", "step", "test_id", "loss"]
    assert len(found["loss"]) == (5 + 3) * M
    short = found["run"] == "short"
    assert found["step"][short].max() == 2
    row = short & (found["step"] == 2) & (found["test_id"] == 40)
    assert found["loss"][row].tolist() == [float(values[1, 2, 3])]
    single = tables.trajectory_table(values[0], net.test_ids, "bleu", steps=torch.tensor([0, 1, 3, 4, 6]))
    assert list(single) == ["step", "test_id", "bleu"]
    assert sorted(set(single["step"].tolist())) == [0, 1, 3, 4, 6]
    assert single["bleu"].tolist() == values[0].flatten().tolist()


def test_changes_and_rankings_come_back_from_parquet(tmp_path):
    before = torch.rand(4, M)
    change = Change(before, torch.rand(3, 4, M))
    found = tables.read_table(tables.write_table(tmp_path / "c.parquet", tables.change_table(change, range(M))))
    assert found["difference"].tolist() == change.difference.tolist()
    assert np.allclose(found["after"], change.after[:, -1].mean(0))
    ranking = sort_effects(torch.tensor([5, 6, 7]), torch.tensor([0.3, -0.1, 0.0]))
    columns = tables.ranking_table(ranking, prune(ranking, 1 / 3), {5: "ä", 7: "b"})
    found = tables.read_table(tables.write_table(tmp_path / "r.parquet", columns))
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["id"].tolist() == [6, 7, 5]
    assert found["kept"].tolist() == [True, True, False]
    assert found["text"].tolist() == ["", "b", "ä"]
    with pytest.raises(ValueError, match="columns differ in length"):
        tables.write_table(tmp_path / "x.parquet", {"a": [1], "b": [1, 2]})
