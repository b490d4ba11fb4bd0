"""The command line of what-if questions, and the example that asks them of somebody else's module."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lit_models.influence import LitInfluence, SimulatorOptions
from lit_models.influence.__main__ import load_simulator, main
from lit_models.influence.configuration import SimulatorConfig
from lit_models.influence.counterfactual import leave_out, mean_effects, rank, simulate, trajectory_effects, what_if
from lit_models.influence.curricula import mean_of_runs, read_run
from lit_models.influence.mislabels import inspect, self_alpha
from lit_models.influence.modeling import InfluenceSimulator
from lit_models.influence.tables import read_table
from lit_models.recording import DynamicsRun, write_examples, write_run

N, M, D, T = 10, 4, 6, 5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Folder with a saved simulator, a few recorded runs and the texts of the pool."""
    folder = tmp_path_factory.mktemp("experiment")
    torch.manual_seed(0)
    net = InfluenceSimulator(
        SimulatorConfig(kind="feat_shared", num_train=N, num_test=M, feature_dim=D, lr_reference=0.1)
    )
    net.set_examples(torch.arange(N), torch.arange(M) + 20, torch.randn(N, D), torch.randn(M, D))
    net.save_pretrained(folder / "simulator")
    for number in range(3):
        generator = np.random.default_rng(number)
        ids = [generator.permutation(N)[:3] for _ in range(T)]
        values = {"loss": generator.random((T + 1, M))}
        write_run(
            folder / f"runs/run-{number}", {"test_ids": [20, 21, 22, 23]}, ids, np.full(T, 0.05), range(T + 1), values
        )
    write_examples(folder / "runs/pool.jsonl", [{"id": i, "text": f"text {i}"} for i in range(N)])
    return folder


@pytest.fixture
def ask(experiment, tmp_path, capsys):
    """Function that runs a command and gives its line and the table it wrote."""

    def run(command, *options):
        capsys.readouterr()
        main([command, str(experiment / "simulator"), *map(str, options), "--out", str(tmp_path / "out")])
        lines = capsys.readouterr().out.splitlines()
        for file in lines:
            if file.endswith(".png"):
                assert Path(file).read_bytes().startswith(b"\x89PNG")
        (table,) = [line for line in lines if line.endswith(".parquet")]
        assert Path(table).with_suffix(".png").is_file()
        return "\n".join(lines), read_table(table)

    return run


def test_simulating_a_recorded_run_tells_how_well(ask, experiment):
    text, table = ask("simulate", experiment / "runs/run-1")
    net = load_simulator(experiment / "simulator")
    run = read_run(experiment / "runs/run-1", net)
    values = simulate(net, run.ids, run.start, lr=run.lr)
    assert table["loss"].tolist() == values.flatten().tolist()
    assert table["recorded"].tolist() == run.values.flatten().tolist()
    error = (values - run.values)[1:].square().mean()
    assert f"all-steps MSE {float(error):.4g}" in text


def test_curricula_of_files_start_like_a_run(ask, experiment, tmp_path):
    file = tmp_path / "curriculum.json"
    file.write_text("[[0, 1], [2], [3, 9, 9]]")
    _, table = ask("simulate", file, "--start", experiment / "runs/run-0", "--lr", 0.02, "--tests", "22,20")
    net = load_simulator(experiment / "simulator")
    start = read_run(experiment / "runs/run-0", net, [22, 20]).start
    assert (
        table["loss"].tolist() == simulate(net, json.loads(file.read_text()), start, [22, 20], 0.02).flatten().tolist()
    )
    assert table["test_id"][:2].tolist() == [22, 20]


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_leaving_out(ask, experiment, mode):
    _, table = ask("leave-out", experiment / "runs/run-0", "--remove", "1,4", "--mode", mode, "--draws", 2, "--seed", 3)
    net = load_simulator(experiment / "simulator")
    run, generator = read_run(experiment / "runs/run-0", net), torch.Generator().manual_seed(3)
    changed = [leave_out(run.ids, [1, 4], mode, generator) for _ in range(2 if mode == "replace" else 1)]
    change = what_if(net, run.ids, torch.stack(changed), run.start, lr=run.lr)
    assert table["difference"].tolist() == change.difference.tolist()
    assert table["test_id"].tolist() == [20, 21, 22, 23]


def test_ranking_by_mean_effects_and_by_a_run(ask, experiment):
    _, table = ask("rank", "--runs", experiment / "runs")
    net = load_simulator(experiment / "simulator")
    reference = mean_of_runs([experiment / f"runs/run-{number}" for number in range(3)], net)
    ranking = rank(net, reference)
    assert table["id"].tolist() == ranking.ids.tolist()
    assert table["effect"].tolist() == ranking.effects.tolist()
    assert table["text"][0] == f"text {int(ranking.ids[0])}"
    _, table = ask("rank", "--curriculum", experiment / "runs/run-0", "--goal", "max")
    run = read_run(experiment / "runs/run-0", net)
    effects = trajectory_effects(net, run.ids, run.start, lr=run.lr)
    expected = {i: float(sum(effects[t, i] for t in range(T) if i in run.ids[t])) for i in run.ids.unique().tolist()}
    assert dict(zip(table["id"].tolist(), table["effect"].tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)
    assert table["effect"].tolist() == sorted(table["effect"].tolist(), reverse=True)


def test_pruning_writes_what_is_left(ask, experiment, tmp_path):
    text, table = ask("prune", experiment / "runs/run-2", "--runs", experiment / "runs", "--fraction", 0.3)
    assert table["kept"].tolist() == [True] * 7 + [False] * 3
    left = tmp_path / "out/curriculum.json"
    assert str(left) in text
    dropped = set(table["id"][7:].tolist())
    assert not dropped & {example for batch in json.loads(left.read_text())["ids"] for example in batch}
    again, _ = ask("simulate", left)
    assert "simulated at step 5" in again


def test_wrong_labels_are_looked_for(ask, experiment, tmp_path):
    losses = tmp_path / "losses.json"
    losses.write_text(json.dumps({str(i): i / 10 for i in range(N)}))
    options = ["--score", "self_alpha", "--score", "mean_effect", "--values", f"train_loss={losses}"]
    text, table = ask("mislabels", *options, "--runs", experiment / "runs", "--flipped", "7,8,9")
    net = load_simulator(experiment / "simulator")
    assert table["self_alpha"].tolist() == self_alpha(net).tolist()
    reference = mean_of_runs([experiment / f"runs/run-{number}" for number in range(3)], net)
    assert table["mean_effect"].tolist() == mean_effects(net, reference).mean(1).tolist()
    assert table["flipped"].tolist() == [False] * 7 + [True] * 3
    assert "train_loss: AUC 1.000, 100% found at 40%" in text
    found = inspect(self_alpha(net), torch.from_numpy(table["flipped"]))
    assert f"self_alpha: AUC {found.values['auc']:.3f}" in text
    text, table = ask("mislabels", "--score", "self_alpha")
    assert list(table) == ["id", "self_alpha"]
    assert text.startswith(f"most suspicious by self_alpha: {int(self_alpha(net).argmax())}, ")


def test_unseen_examples_come_from_a_file(ask, experiment, tmp_path):
    features = torch.randn(3, D)
    save_file({"pool_ids": torch.tensor([2, 30, 31]), "pool": features}, tmp_path / "features.safetensors")
    unseen = ["--unseen", tmp_path / "features.safetensors"]
    _, table = ask("rank", "--runs", experiment / "runs", *unseen)
    assert sorted(table["id"].tolist()) == [*range(N), 30, 31]
    net = load_simulator(experiment / "simulator").with_examples(torch.tensor([30, 31]), features[1:])
    reference = mean_of_runs([experiment / f"runs/run-{number}" for number in range(3)], net)
    assert table["effect"].tolist() == rank(net, reference).effects.tolist()


def test_checkpoints_are_read_like_exports(quiet_trainer, tmp_path):
    options = SimulatorOptions(kind="linear", lr_scaling=False)
    module = LitInfluence(options, num_train=N, num_test=M)
    rows = [{"ids": torch.randint(N, (2, 3)), "history": torch.rand(2, 1, M), "target": torch.rand(2, M)}]
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(load_simulator(tmp_path / "a.ckpt").factors().B, module.net.factors().B)
    module.export_pretrained(tmp_path / "export")
    assert torch.equal(load_simulator(tmp_path / "export").factors().B, module.net.factors().B)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["simulate", "nowhere", "x"], "nowhere: there is no such simulator; name an exported folder or a checkpoint"),
        (["simulate", "SIM", "x.json"], "x.json: there is no such run or file"),
        (["rank", "SIM"], "--runs: name the folders of recorded runs"),
        (["leave-out", "SIM", "RUN", "--remove", "a"], "'a' is no list of ids; write 3,17,4 or @FILE"),
        (["leave-out", "SIM", "RUN", "--remove", "@none"], "'@none' is no list of ids"),
        (["mislabels", "SIM"], "--score: name one of self_alpha and mean_effect"),
        (["mislabels", "SIM", "--values", "loss=none"], "'loss=none' must be NAME=FILE with a JSON object"),
        (["simulate", "SIM", "RUN", "--metric", "bleu"], "metric 'bleu' was not recorded"),
        (["simulate", "SIM", "RUN", "--tests", "3"], "test 3 was not recorded"),
    ],
)
def test_mistakes_end_with_one_sentence(experiment, command, message, tmp_path):
    places = {"SIM": str(experiment / "simulator"), "RUN": str(experiment / "runs/run-0")}
    with pytest.raises(SystemExit) as stopped:
        main([*(places.get(part, part) for part in command), "--out", str(tmp_path)])
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)


# -- the example -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("influence_what_if", ROOT / "examples/influence_what_if.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_leans_on_nothing_of_ours_for_its_module(example):
    assert [base.__module__.split(".")[0] for base in example.Sentiment.__mro__][1] == "lightning"
    pool = example.dataset(example.sentences("train", 60))
    assert 20 < int(pool.tensors[1].sum()) < 40
    order = example.batches(pool, 24, 4, 2, seed=3)
    assert order.shape == (12, 4)
    assert torch.equal(order[:6].flatten().sort().values, order[6:].flatten().sort().values)
    assert len(order.unique()) == 24


@pytest.mark.filterwarnings("ignore")
def test_the_example_records_learns_asks_and_compares(example, tmp_path, capsys):
    answers = example.main(
        tmp_path / "what-if", runs=6, pool_size=40, num_tests=12, part=16, size=4, epochs=2, group=3, steps=20
    )
    assert list(answers) == ["most helpful", "most harmful", "random"]
    assert all(np.isfinite(pair).all() for pair in answers.values())
    folder = tmp_path / "what-if"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["held-out.png", "without-most-harmful.png", "without-most-helpful.png", "without-random.png"]
    text = capsys.readouterr().out
    assert "on 4 fits that it has not seen" in text
    # Those fits have the batches of a recorded one, without three examples.
    recorded = [DynamicsRun.open(path).ids for path in (folder / "recorded").glob("run-*")]
    for path in (folder / "retrained").iterdir():
        again = DynamicsRun.open(path).ids
        whole = [ids for ids in recorded if all(set(a) <= set(b) for a, b in zip(again, ids, strict=True))]
        assert [len(set(ids.values.tolist()) - set(again.values.tolist())) for ids in whole] == [3]
