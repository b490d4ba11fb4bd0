"""What the stages must reach on the embedded human ratings.

`python benchmarks/acceptance.py a1|a2|a3|a4|f --seeds 1234 1235` runs one experiment per seed and prints what was
measured beside what is expected; earlier stages of the same seed are run first where they are missing. Runs lie under
`runs/acceptance/SEED`. See `docs/results.md` for a table.

a1  fine-tuning: cross entropy on the test sentences
a2  reward model: accuracy on test pairs, Pearson correlation with the human ratings
a3  PPO: score, KL and length of the last rollouts
a4  over-optimisation: a high learning rate and a weak penalty
f   a huge penalty keeps the policy at the reference
"""

import argparse
import csv
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch

from datamodules.snippets import load_snippets
from lit_models.cli import main
from lit_models.reward import LitRewardModel

EXPECTED = {
    "a1": "test loss <= 4.15 nats/token",
    "a2": "accuracy >= 0.68, Pearson >= 0.40",
    "a3": "score from about 0 to >= 1.2, KL 4-20, length 26 -> 32",
    "a4": "score > 2.5, KL > 20, distinct-2 falls to <= 0.85",
    "f": "KL < 0.5 and score near 0",
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def run(stage: str, seed: int, *more: str) -> None:
    """Run one stage's preset with a seed."""
    main(["fit", "--config", f"{stage}/snippets.yaml", f"--seed_everything={seed}", *QUIET, *more])


def rows(folder: Path, key: str) -> list[dict[str, str]]:
    """Logged rows that hold a key."""
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


def a1(root: Path, seed: int) -> dict[str, float]:
    """Fine-tuning."""
    folder = root / "sft-snippets"
    if not (folder / "export").is_dir():
        run("sft", seed)
    return {"loss": float(rows(folder, "val/loss")[-1]["val/loss"])}


def a2(root: Path, seed: int) -> dict[str, float]:
    """Reward model."""
    folder = root / "reward-snippets"
    if not (folder / "export").is_dir():
        a1(root, seed)
        run("reward", seed)
    module = LitRewardModel.load_from_checkpoint(folder / "checkpoints/last.ckpt").eval()
    snippets = load_snippets("test")
    with torch.no_grad():
        scores = torch.cat([module.score_texts([s.text for s in snippets[i : i + 100]]) for i in range(0, 1000, 100)])
    ratings = torch.tensor([snippet.rating for snippet in snippets])
    correlation = torch.corrcoef(torch.stack([scores.float(), ratings]))[0, 1]
    return {"accuracy": float(rows(folder, "val/accuracy")[-1]["val/accuracy"]), "pearson": float(correlation)}


def ppo(root: Path, seed: int, name: str, *more: str) -> dict[str, float]:
    """PPO, and the mean of its first and last three rollouts."""
    folder = root / f"ppo-{name}"
    if not (folder / "export").is_dir():
        a2(root, seed)
        run("ppo", seed, f"--trainer.default_root_dir={folder}", *more)
    history = rows(folder, "score/mean")
    measured = {}
    for key in ("score/mean", "kl/ref", "response/len_mean"):
        values = [float(row[key]) for row in history]
        measured |= {f"{key} first": mean(values[:3]), f"{key} last": mean(values[-3:])}
    return measured


def a3(root: Path, seed: int) -> dict[str, float]:
    """PPO as in the preset."""
    return ppo(root, seed, "a3")


def a4(root: Path, seed: int) -> dict[str, float]:
    """Over-optimisation, with the share of distinct bigrams in sampled responses."""
    more = (
        "--model.init_args.optimizer.init_args.lr=1.0e-3",
        "--trainer.max_steps=60",
    )
    weak = root / "weak.yaml"
    weak.parent.mkdir(parents=True, exist_ok=True)
    weak.write_text(
        "model:\n  init_args:\n    shapers:\n    - {class_path: lit_models.ppo.KLPenalty, init_args: {coef: 0.02}}\n"
        "trainer:\n  callbacks:\n"
        "  - {class_path: callbacks.SampleTable, init_args: {every_n_steps: 1, num_rows: 48}}\n"
        "  - callbacks.ExportPretrained\n"
    )
    measured = ppo(root, seed, "a4", "--config", str(weak), *more)
    history = rows(root / "ppo-a4", "kl/ref")
    measured |= {
        "kl/ref highest": max(float(row["kl/ref"]) for row in history),
        "score of the best response": max(float(row["score/max"]) for row in history),
        "score of the best human sentence": best_human_score(root),
    }
    return measured | distinct_bigrams(root / "ppo-a4/samples.jsonl")


def best_human_score(root: Path) -> float:
    """Normalised score of the human sentence that the reward model likes best: about where the model saturates."""
    module = LitRewardModel.load_from_checkpoint(root / "reward-snippets/checkpoints/last.ckpt").eval()
    scores = module.score_texts([snippet.text for snippet in load_snippets()], batch_size=200)
    return float((scores.max() - module.reward_mean) / module.reward_std)


def f(root: Path, seed: int) -> dict[str, float]:
    """A penalty of 10."""
    strong = root / "strong.yaml"
    strong.parent.mkdir(parents=True, exist_ok=True)
    strong.write_text(
        "model:\n  init_args:\n    shapers:\n    - {class_path: lit_models.ppo.KLPenalty, init_args: {coef: 10.0}}\n"
    )
    return ppo(root, seed, "f", "--config", str(strong))


def distinct_bigrams(path: Path) -> dict[str, float]:
    """Distinct word bigrams over all bigrams, pooled over the first and the last three rollouts."""
    import json

    texts: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            texts.setdefault(row["step"], []).append(row["response"])
    steps = sorted(texts)
    shares = {}
    for name, chosen in (("first", steps[:3]), ("last", steps[-3:])):
        words = [text.split() for step in chosen for text in texts[step]]
        pairs = [pair for text in words for pair in pairwise(text)]
        shares[f"distinct-2 {name}"] = len(set(pairs)) / len(pairs)
    return shares


def cli() -> None:
    """Run an experiment for each seed and print the results with their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPECTED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    options = parser.parse_args()
    measured = []
    for seed in options.seeds:
        root = Path("runs/acceptance") / str(seed)
        os.environ["LIT_RUNS"] = str(root)
        measured.append(globals()[options.experiment](root, seed))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in measured[-1].items()))
    print(f"expected: {EXPECTED[options.experiment]}")
    if len(measured) > 1:
        for name in measured[0]:
            values = [result[name] for result in measured]
            print(f"{name}: mean {mean(values):.3f}, standard deviation {stdev(values):.3f} over {len(values)} seeds")


if __name__ == "__main__":
    cli()
