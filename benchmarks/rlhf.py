"""What macro actions and curiosity do on the embedded human ratings, against PPO.

`python benchmarks/rlhf.py m2|m3|m4|c2|c3 --seeds 1 2 3` runs every arm of an experiment for every seed and prints a
table. The fine-tuning and the reward model of `benchmarks/acceptance.py` come first where they are missing; runs lie
under `runs/acceptance/SEED`. `docs/results.md` holds what was measured.

m2  credit over distance: the score is earned in the first 12 tokens and paid at token 56
m3  no free lunch: the score of the whole response, and a critic that starts as the reward model
m4  dilution of the KL penalty by averaged rewards
c2  the curiosity module learns, and unseen text surprises it more than seen text
c3  diversity at equal reward
"""

import argparse
import csv
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from acceptance import QUIET, a2

from lit_models.cli import main

ROOT = Path("runs/acceptance")
Arm = dict[str, Any]


def advantage(name: str = "GAE", **options: Any) -> Arm:
    """Part of the configuration that chooses the estimator."""
    defaults = {"gamma": 1.0, "lam": 0.95, "whiten_advantages": False}
    return {"advantage": {"class_path": f"lit_models.ppo.{name}", "init_args": defaults | options}}


def macro(n: int, **options: Any) -> Arm:
    """Macro actions of n tokens."""
    return advantage("MacroGAE", rule="fixed", n=n, **options)


def penalty(coef: float) -> dict[str, Any]:
    """KL penalty."""
    return {"class_path": "lit_models.ppo.KLPenalty", "init_args": {"coef": coef}}


def adam(lr: float) -> Arm:
    """Adam with one learning rate."""
    options = {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.0}
    return {"optimizer": {"class_path": "torch.optim.Adam", "init_args": options}}


def sampler(length: int, shortest: int = 0) -> Arm:
    """Sampler at temperature 1."""
    options = {"max_new_tokens": length, "min_new_tokens": shortest, "temperature": 1.0}
    return {"generator": {"class_path": "lit_models.ppo.Sampler", "init_args": options}}


def pretrained(seed: int, stage: str) -> dict[str, Any]:
    """Network of an earlier stage."""
    path = ROOT / str(seed) / f"{stage}-snippets/export/model"
    return {"class_path": "lit_models.backbones.FromPretrained", "init_args": {"name": str(path)}}


def prepare(seed: int) -> None:
    """Run the earlier stages where they are missing."""
    os.environ["LIT_RUNS"] = str(ROOT / str(seed))
    if not (ROOT / str(seed) / "reward-snippets/export").is_dir():
        a2(ROOT / str(seed), seed)


def run(seed: int, name: str, model: Arm, rollouts: int, batch: int, every: int | None = None) -> list[dict[str, str]]:
    """Train one arm, unless that was done before, and return its logged rows."""
    folder = ROOT / str(seed) / f"ppo-{name}"
    if not (folder / "metrics.csv").is_file() or len(rows(folder)) < rollouts:
        prepare(seed)
        saver = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": every or rollouts, "save_top_k": -1}
        config = {
            "seed_everything": seed,
            "model": {"init_args": model},
            "data": {"init_args": {"batch_size": batch}},
            "trainer": {
                "max_steps": rollouts,
                "limit_val_batches": 0,
                "default_root_dir": str(folder),
                "callbacks": [
                    {
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": saver | {"filename": "{step}"},
                    }
                ],
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "arm.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", "ppo/snippets.yaml", "--config", str(folder / "arm.yaml"), *QUIET])
    return rows(folder)


def rows(folder: Path) -> list[dict[str, str]]:
    """Logged rollouts."""
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("score/mean")]


def window(history: list[dict[str, str]], key: str, first: int, last: int | None = None) -> float:
    """Mean of a logged value over rollouts."""
    return mean(float(row[key]) for row in history[first:last])


def m2(seed: int) -> dict[str, dict[str, float]]:
    """Credit over distance."""
    shared = adam(3e-4) | sampler(56, 56) | {"shapers": [penalty(0.05)], "zero_critic_head": True}
    shared["critic"] = pretrained(seed, "sft")
    reward = {"backbone": pretrained(seed, "reward"), "normalize": True, "response_tokens": 12}
    shared["rewards"] = [{"class_path": "lit_models.ppo.RewardModel", "init_args": reward}]
    arms = {"ppo": advantage(), "ma5": macro(5), "ma10": macro(10), "ppo-lam1": advantage(lam=1.0)}
    result = {}
    for name, arm in arms.items():
        history = run(seed, f"m2-{name}", shared | arm, 60, 48)
        result[name] = {
            "score first 5": window(history, "score/mean", 0, 5),
            "score last 10": window(history, "score/mean", -10),
            "KL last 10": window(history, "kl/ref", -10),
        }
    return result


def m3(seed: int) -> dict[str, dict[str, float]]:
    """No free lunch."""
    shared = adam(1e-4) | sampler(40) | {"shapers": [penalty(0.05)], "critic_group": {"lr": 3e-4}}
    result = {}
    for name, arm in {"ppo": advantage(), "ma5": macro(5)}.items():
        history = run(seed, f"m3-{name}", shared | arm, 70, 48)
        result[name] = {
            "score last 10": window(history, "score/mean", -10),
            "KL last 10": window(history, "kl/ref", -10),
        }
    return result


def m4(seed: int) -> dict[str, dict[str, float]]:
    """Dilution of the KL penalty."""
    shared = adam(1e-3) | sampler(32) | {"shapers": [penalty(0.15)]}
    arms = {
        "ppo": advantage(),
        "ma5 sum": macro(5, isolate_last=True),
        "ma5 weighted": macro(5, isolate_last=True, reward_aggregation="weighted"),
    }
    result = {}
    for name, arm in arms.items():
        history = run(seed, f"m4-{name.replace(' ', '-')}", shared | arm, 60, 48)
        result[name] = {
            f"{label} {part}": window(history, key, first, last)
            for label, key in (("score", "score/mean"), ("KL", "kl/ref"), ("length", "response/len_mean"))
            for part, first, last in (("20-30", 20, 30), ("last 10", -10, None))
        }
    return result


def c2(seed: int) -> dict[str, dict[str, float]]:
    """The curiosity module learns."""
    from datamodules import SnippetPrompts, asset_path
    from lit_models import FromPretrained
    from lit_models.ppo import Curiosity, RowNoise, Sampler, steps
    from lit_models.tokenization import load_tokenizer

    prepare(seed)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(asset_path("movie_snippets/tokenizer"))
    policy = FromPretrained(pretrained(seed, "sft")["init_args"]["name"]).build().eval()
    data = SnippetPrompts(batch_size=256)
    data.setup("fit")
    generator = Sampler(32)
    generator.prepare(tokenizer)

    def sample(number: int) -> Any:
        batch = data.collator()([data.datasets["train"][row] for row in range(256 * number, 256 * (number + 1))])
        rollout = steps.generate(policy, generator, tokenizer, batch, RowNoise(seed, number, 256))
        recorder = steps.StateRecorder(policy, "ref_last")
        with torch.no_grad(), recorder:
            steps.policy_logits(policy, rollout)
        rollout.hidden = recorder.states(rollout.response_ids.shape[1])
        rollout.action_embeddings = steps.embed_actions(policy, rollout.response_ids)
        return rollout

    seen, unseen = sample(0), sample(1)

    arms = {"released": {}, "detached target": {"detach_target": True}, "identity encoder": {"encoder": "identity"}}
    return {name: learn(Curiosity(**options), policy, seen, unseen) for name, options in arms.items()}


def learn(curiosity: Any, policy: Any, seen: Any, unseen: Any) -> dict[str, float]:
    """Train a curiosity module for 200 steps on one rollout."""
    from lit_models.ppo.functional import masked_mean

    icm = curiosity.build(policy, policy)

    def loss(rollout: Any) -> torch.Tensor:
        return masked_mean(curiosity.network_loss(rollout), rollout.response_mask)

    optimizer = torch.optim.Adam(icm.parameters(), lr=1e-3)
    before = float(loss(seen).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss(seen).backward()
        optimizer.step()
    after = float(loss(seen).detach())
    return {"before": before, "after": after, "unseen / seen": float(loss(unseen).detach()) / after}


CHECKPOINTS = (30, 40, 50, 60, 70)


def c3(seed: int) -> dict[str, dict[str, float]]:
    """Diversity at equal reward."""
    shared = adam(5e-4) | sampler(32) | advantage()
    curiosity = {"eta": 0.05, "topk": 1, "lr": 1e-3, "intermediate_size": 512}
    bonus = {"class_path": "lit_models.ppo.Curiosity", "init_args": curiosity}
    arms = {"ppo": [penalty(0.05)], "cd": [penalty(0.05), bonus]}
    measured: dict[str, dict[int, dict[str, float]]] = {}
    result = {}
    for name, shapers in arms.items():
        history = run(seed, f"c3-{name}", shared | {"shapers": shapers}, 70, 40, every=10)
        folder = ROOT / str(seed) / f"ppo-c3-{name}/checkpoints"
        measured[name] = {step: evaluate(folder / f"step={step}.ckpt", seed) for step in (20, *CHECKPOINTS)}
        keys = measured[name][30]
        result[name] = {key: mean(measured[name][step][key] for step in CHECKPOINTS) for key in keys}
        result[name]["KL in training"] = window(history, "kl/ref", 30)
    differences = [matched(measured["ppo"], measured["cd"][step]) for step in CHECKPOINTS]
    result["cd - ppo at matched score"] = {
        "diversity": mean(differences),
        "positive of 5": sum(d > 0 for d in differences),
    }
    return result


def matched(ppo: dict[int, dict[str, float]], cd: dict[str, float]) -> float:
    """Difference in diversity to the checkpoint of PPO with the nearest score."""
    nearest = min(ppo.values(), key=lambda other: abs(other["score"] - cd["score"]))
    return cd["diversity"] - nearest["diversity"]


@torch.no_grad()
def evaluate(checkpoint: Path, seed: int) -> dict[str, float]:
    """Score and diversity of 10 responses to each of the first 30 test prompts."""
    from datamodules import SnippetPrompts
    from lit_models.base import LitBase
    from lit_models.metrics import Diversity, ExpectationAdjustedDistinct, SelfBLEU
    from lit_models.ppo.metrics import sequence_scores

    module = LitBase.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data = SnippetPrompts(batch_size=30)
    data.setup("test")
    batch = data.collator()([data.datasets["test"][row] for row in range(30)])
    rollout = module.generate(batch, 0, samples=10, stream=3)
    module.score(rollout)
    sets = [rollout.responses[start : start + 10] for start in range(0, len(rollout), 10)]
    values = {"score": float(sequence_scores(rollout).mean())}
    for metric in (Diversity(), ExpectationAdjustedDistinct(), SelfBLEU()):
        metric.update(sets)
        values[metric.name] = float(metric.compute())
    return values


EXPERIMENTS = {"m2": m2, "m3": m3, "m4": m4, "c2": c2, "c3": c3}


def cli() -> None:
    """Run an experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    measured = {seed: EXPERIMENTS[options.experiment](seed) for seed in options.seeds}
    first = next(iter(measured.values()))
    for arm, values in first.items():
        for key in values:
            runs = [measured[seed][arm][key] for seed in options.seeds]
            spread = f" +- {stdev(runs):.4f}" if len(runs) > 1 else ""
            line = f"{options.experiment} {arm:26} {key:20} {mean(runs):8.4f}{spread}"
            print(f"{line}   seeds: {' '.join(f'{x:.4f}' for x in runs)}")


if __name__ == "__main__":
    cli()
