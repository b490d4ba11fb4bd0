"""What-if questions from the command line: `python -m lit_models.influence COMMAND SIMULATOR ...`.

Each command writes a Parquet table and a picture of the same name into the folder of `--out`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_models.influence import counterfactual, curricula, mislabels, plots, tables
from lit_models.influence.curricula import Recorded
from lit_models.recording import find_runs, read_examples, write_atomically

if TYPE_CHECKING:
    from lit_models.influence.modeling import InfluenceSimulator


# -- what is read ------------------------------------------------------------------------------------------------------


def load_simulator(path: str | Path) -> "InfluenceSimulator":
    """Read a simulator.

    Args:
        path: folder that `lit_models.export` or `save_pretrained` wrote, or a Lightning checkpoint of `LitInfluence`.

    Returns:
        The simulator, on the CPU.

    Raises:
        ValueError: if the path holds no simulator.
    """
    from lit_models.influence.modeling import InfluenceSimulator

    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
            if kind != InfluenceSimulator.config_class.model_type:
                raise ValueError(f"{folder} holds a model of type {kind!r}; name the export of a LitInfluence")
            return InfluenceSimulator.from_pretrained(folder).eval()
    if not path.exists():
        raise ValueError(f"{path}: there is no such simulator; name an exported folder or a checkpoint")
    from lit_models.base import LitBase

    module = LitBase.load_from_checkpoint(path, map_location="cpu")
    net = getattr(module, "net", None)
    if not isinstance(net, InfluenceSimulator):
        raise ValueError(f"{path} is a checkpoint of {type(module).__name__}; name one of LitInfluence")
    return net.eval()


def add_unseen(simulator: "InfluenceSimulator", path: str | Path) -> "InfluenceSimulator":
    """Add the examples of a file of features that the simulator doesn't know yet.

    Args:
        simulator: a simulator with features.
        path: safetensors file with `pool_ids` (N',) and `pool` (N', D), or `test_ids` and `tests`, or both, such as the
            recorder writes.

    Returns:
        The simulator with all of them.

    Raises:
        ValueError: if the file has none of these.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; name one with pool_ids and pool, or test_ids and tests")
    arrays = load_file(path)
    new: dict[str, Tensor] = {}
    for side, ids, features in (("train", "pool_ids", "pool"), ("test", "test_ids", "tests")):
        if ids in arrays and features in arrays:
            unknown = ~torch.isin(arrays[ids], getattr(simulator, f"{side}_ids"))
            if bool(unknown.any()):
                new |= {f"{side}_ids": arrays[ids][unknown], f"{side}_features": arrays[features][unknown]}
        elif ids in arrays or features in arrays:
            raise ValueError(f"{path}: {ids} and {features} belong together; write both")
    if not arrays:
        raise ValueError(f"{path} is empty; write pool_ids and pool, or test_ids and tests")
    return simulator.with_examples(**new) if new else simulator


def read_ids(text: str) -> list[int]:
    """Ids from the command line: numbers with commas between them, or `@FILE` with a JSON list."""
    try:
        if text.startswith("@"):
            return [int(example) for example in json.loads(Path(text[1:]).read_text())]
        return [int(part) for part in text.split(",")]
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{text!r} is no list of ids; write 3,17,4 or @FILE with a JSON list") from None


def read_values(text: str) -> tuple[str, dict[int, float]]:
    """`NAME=FILE` with a JSON object of values by id."""
    name, _, file = text.partition("=")
    try:
        return name, {int(example): float(value) for example, value in json.loads(Path(file).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{text!r} must be NAME=FILE with a JSON object of a value for every id") from None


class Question:
    """What all commands read.

    Args:
        options: parsed command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.simulator = load_simulator(options.simulator)
        if options.unseen:
            self.simulator = add_unseen(self.simulator, options.unseen)
        self.metric: str = options.metric or self.simulator.config.metrics[0]
        self.tests = self.simulator.test_ids if options.tests is None else torch.tensor(read_ids(options.tests))
        self.out = Path(options.out)

    def curriculum(self) -> Recorded:
        """The curriculum with start and learning rates, from wherever these are given.

        Raises:
            ValueError: if there is no start.
        """
        options = self.options
        found = curricula.read_curriculum(options.curriculum, self.simulator, self.tests, self.metric)
        if options.start:
            other = curricula.read_run(options.start, self.simulator, self.tests, self.metric)
            found = found._replace(start=other.start, lr=other.lr if found.lr is None else found.lr)
        if options.lr is not None:
            found = found._replace(lr=torch.tensor(options.lr))
        if found.start is None:
            raise ValueError("--start: the curriculum has no values to start from; name a recorded run")
        return found

    def runs(self) -> list[Path]:
        """Folders of the recorded runs.

        Raises:
            ValueError: if there are none.
        """
        folders = [run for folder in self.options.runs or [] for run in find_runs(folder)]
        if not folders:
            raise ValueError("--runs: name the folders of recorded runs, which tell the usual values of the tests")
        return folders

    def reference(self) -> Tensor:
        """Mean trajectory of the recorded runs, (T+1, M)."""
        return curricula.mean_of_runs(self.runs(), self.simulator, self.tests, self.metric)

    def ranking(self) -> counterfactual.Ranking:
        """The pool by its mean effects."""
        options = self.options
        return counterfactual.rank(self.simulator, self.reference(), self.tests, metric=self.metric, goal=options.goal)

    def texts(self) -> dict[int, str] | None:
        """Texts of the pool, where they are kept beside the runs."""
        given = [Path(self.options.examples)] if self.options.examples else []
        beside = [Path(folder) / "pool.jsonl" for folder in self.options.runs or []]
        for path in [*given, *(path for path in beside if path.is_file())]:
            return {row["id"]: row["text"] for row in read_examples(path)}
        return None

    def write(self, name: str, columns: tables.Columns, draw: Callable[[Path], Path]) -> list[Path]:
        """Write the table and the picture of a command."""
        table = tables.write_table(self.out / f"{name}.parquet", columns)
        return [table, draw(self.out / f"{name}.png")]


# -- commands ----------------------------------------------------------------------------------------------------------


def simulate(ask: Question) -> tuple[str, list[Path]]:
    """Simulate a curriculum; beside a recorded run, also tell how well."""
    run = ask.curriculum()
    assert run.start is not None
    values = counterfactual.simulate(ask.simulator, run.ids, run.start, ask.tests, run.lr, ask.metric)
    columns = tables.trajectory_table(values, ask.tests, ask.metric, steps=run.steps)
    caption = (
        f"mean {ask.metric} over {len(ask.tests)} tests: {float(values[0].mean()):.4g} at step {int(run.steps[0])}, "
        f"{float(values[-1].mean()):.4g} simulated at step {int(run.steps[-1])}"
    )
    if run.values is not None:
        columns["recorded"] = run.values.flatten().numpy()
        caption = f"{caption}\n{plots.trajectory_caption(values, run.values)}"

    def draw(path: Path) -> Path:
        return plots.plot_trajectories(
            values, run.values, ask.tests, path, ask.metric, str(ask.options.curriculum), steps=run.steps
        )

    return caption, ask.write("simulate", columns, draw)


def leave_out(ask: Question) -> tuple[str, list[Path]]:
    """Simulate a curriculum with and without some examples."""
    options, run = ask.options, ask.curriculum()
    assert run.start is not None
    removed = read_ids(options.remove)
    generator = torch.Generator().manual_seed(options.seed)
    draws = options.draws if options.mode == "replace" else 1
    changed = torch.stack([counterfactual.leave_out(run.ids, removed, options.mode, generator) for _ in range(draws)])
    change = counterfactual.what_if(ask.simulator, run.ids, changed, run.start, ask.tests, run.lr, ask.metric)
    title = f"without {len(removed)} examples ({options.mode})"

    def draw(path: Path) -> Path:
        return plots.plot_change(change, path, None, ask.metric, title, ("with all", "without"), run.steps)

    return plots.change_caption(change), ask.write("leave-out", tables.change_table(change, ask.tests), draw)


def rank(ask: Question) -> tuple[str, list[Path]]:
    """Rank the pool, by mean effects or, with a curriculum, by what its examples do in that run."""
    options = ask.options
    if options.curriculum is None:
        ranking = ask.ranking()
    else:
        run = ask.curriculum()
        assert run.start is not None
        effects = counterfactual.trajectory_effects(ask.simulator, run.ids, run.start, ask.tests, run.lr, ask.metric)
        counts = counterfactual.occurrences(ask.simulator, run.ids)
        used = counts.sum(0) > 0
        ids = ask.simulator.train_ids[used]
        ranking = counterfactual.sort_effects(ids, (effects * counts).sum(0)[used], options.goal)
    texts = ask.texts()

    def draw(path: Path) -> Path:
        what = "one occurrence" if options.curriculum is None else "all occurrences in the run"
        what = f"effect of {what} on the {ask.metric}, the most helpful on top"
        return plots.plot_ranking(ranking, path, texts, what=what)

    best, worst = ranking.ids[0], ranking.ids[-1]
    line = (
        f"most helpful {int(best)} ({float(ranking.effects[0]):+.3g}), most harmful {int(worst)} "
        f"({float(ranking.effects[-1]):+.3g})"
    )
    return line, ask.write("rank", tables.ranking_table(ranking, texts=texts), draw)


def prune(ask: Question) -> tuple[str, list[Path]]:
    """Drop the most harmful examples of the pool, and simulate the curriculum without them."""
    options, run = ask.options, ask.curriculum()
    assert run.start is not None
    ranking = ask.ranking()
    pruned = counterfactual.prune(ranking, options.fraction)
    generator = torch.Generator().manual_seed(options.seed)
    changed = counterfactual.leave_out(run.ids, pruned.dropped, options.mode, generator)
    change = counterfactual.what_if(ask.simulator, run.ids, changed, run.start, ask.tests, run.lr, ask.metric)
    kept = ask.out / "curriculum.json"
    content: dict[str, Any] = {"ids": [[example for example in batch if example >= 0] for batch in changed.tolist()]}
    if run.lr is not None:
        content["lr"] = run.lr.tolist()
    if run.start.ndim == 1:
        whole = options.tests is None and len(ask.simulator.config.metrics) == 1
        values = run.start.tolist()
        content["start"] = values if whole else dict(zip(ask.tests.tolist(), values, strict=True))
    write_atomically(kept, json.dumps(content).encode())
    title = f"without the {len(pruned.dropped)} most harmful of {len(ranking.ids)} examples"

    def draw(path: Path) -> Path:
        return plots.plot_change(change, path, None, ask.metric, title, ("with all", "pruned"), run.steps)

    files = ask.write("prune", tables.ranking_table(ranking, pruned, ask.texts()), draw)
    return plots.change_caption(change), [*files, kept]


def find_mislabels(ask: Question) -> tuple[str, list[Path]]:
    """Rank the pool by how likely labels are wrong; where it is known which are, draw how many are found."""
    options, ids = ask.options, ask.simulator.train_ids
    scores: dict[str, Tensor] = {}
    for score in options.score or []:
        reference = ask.reference() if score == "mean_effect" else None
        scores[score] = mislabels.suspicion(
            score, ask.simulator, reference, ask.tests, metric=ask.metric, goal=options.goal
        )
    for text in options.values or []:
        name, known = read_values(text)
        missing = [example for example in ids.tolist() if example not in known]
        if missing:
            raise ValueError(f"--values: {name} has no value for example {missing[0]}; give one for every id")
        scores[name] = torch.tensor([known[example] for example in ids.tolist()])
    if not scores:
        raise ValueError("--score: name one of self_alpha and mean_effect, or give --values NAME=FILE")
    columns: tables.Columns = {"id": ids.numpy(), **{name: value.numpy() for name, value in scores.items()}}
    if options.flipped is None:
        first = next(iter(scores))
        order = scores[first].argsort(descending=True, stable=True)
        ranking = counterfactual.Ranking(ids[order], scores[first][order])
        texts = ask.texts()

        def draw(path: Path) -> Path:
            return plots.plot_ranking(ranking, path, texts, what=f"{first}, the most suspicious on top")

        line = f"most suspicious by {first}: {', '.join(str(example) for example in ranking.ids[:10].tolist())}"
        return line, ask.write("mislabels", columns, draw)
    flipped = torch.isin(ids, torch.tensor(read_ids(options.flipped)))
    columns["flipped"] = flipped.numpy()
    curves = {name: mislabels.inspect(value, flipped) for name, value in scores.items()}
    files = ask.write("mislabels", columns, lambda path: plots.plot_inspection(curves, path))
    return plots.inspection_caption(curves), files


COMMANDS: dict[str, Callable[[Question], tuple[str, list[Path]]]] = {
    "simulate": simulate,
    "leave-out": leave_out,
    "rank": rank,
    "prune": prune,
    "mislabels": find_mislabels,
}


# -- the command line --------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lit_models.influence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        _add_options(commands.add_parser(name, help=function.__doc__, description=function.__doc__), name)
    return parser


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    def add(flag: str, text: str, **options: Any) -> None:  # noqa: ANN401
        command.add_argument(flag, help=text, **options)

    add("simulator", "exported folder, or checkpoint of LitInfluence")
    add("--out", "folder for tables and pictures; the present one by default", default=".")
    add("--metric", "one of the simulated metrics; the first by default")
    add("--tests", "ids of the tests of interest, 3,17,4 or @FILE; all by default")
    add("--unseen", "safetensors file with features of further examples")
    if name in ("simulate", "leave-out", "prune", "rank"):
        text = "recorded run, or JSON file with the ids of each step"
        if name == "rank":
            add("--curriculum", f"{text}, to rank by what its examples do there")
        else:
            add("curriculum", text)
        add("--start", "recorded run whose start and learning rates are used for a curriculum without them")
        add("--lr", "learning rate of all steps, in place of that of the curriculum", type=float)
    if name in ("rank", "prune", "mislabels"):
        add("--runs", "folders of recorded runs, which tell the usual values of the tests", nargs="+")
        add("--examples", "pool.jsonl with the texts; by default the one beside the runs")
        add("--goal", "whether the metric should be small or large", choices=("min", "max"), default="min")
    if name in ("leave-out", "prune"):
        add("--mode", "smaller batches, or other examples in their places", choices=("drop", "replace"), default="drop")
        add("--seed", "seed of the substitutes", type=int, default=0)
    if name == "leave-out":
        add("--remove", "ids to leave out, 3,17,4 or @FILE with a JSON list", required=True)
        add("--draws", "draws of substitutes to average over", type=int, default=8)
    if name == "prune":
        add("--fraction", "part of the pool to drop", type=float, default=0.1)
    if name == "mislabels":
        add("--score", "score of the simulator", action="append", choices=("self_alpha", "mean_effect"))
        add("--values", "NAME=FILE, further scores as JSON by id, such as losses", action="append")
        add("--flipped", "ids whose labels are known to be wrong, 3,17,4 or @FILE")


def main(args: list[str] | None = None) -> None:
    """Answer one question.

    Args:
        args: arguments after the program's name; those of the process by default.
    """
    from transformers.utils import logging

    options = make_parser().parse_args(args)
    logging.disable_progress_bar()
    try:
        line, files = COMMANDS[options.command](Question(options))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(line)
    for file in files:
        print(file)


if __name__ == "__main__":
    main()
