"""What macro actions, curiosity and diversity metrics cost; every comparison takes turns in one process.

`python benchmarks/macro.py [advantages|rollout|bleu]`

advantages  macro actions of 5 tokens for 256 responses of 512 tokens, against a loop over rows, macro actions and
            tokens as in the published algorithm
rollout     a PPO step with macro actions, and with curiosity, against one without
bleu        SelfBLEU of 500 sets of 10 texts of 60 words against fast_bleu (`pip install fast_bleu`)
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPETITIONS = 5
N = 5


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(sides: dict[str, Callable[[], Any]], repetitions: int = REPETITIONS) -> None:
    """Print the median and the least time of each side, and their ratios to those of the first one."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(repetitions):
        for name, run in sides.items():
            times[name].append(seconds(run))
    first = next(iter(times.values()))
    for name, runs in times.items():
        parts = [
            f"{label} {1000 * pick(runs):10.2f} ms  x {pick(runs) / pick(first):.3f}"
            for label, pick in (("median", statistics.median), ("least", min))
        ]
        print(f"  {name:24} {'   '.join(parts)}", flush=True)


def advantages() -> None:
    """Advantages over macro actions."""
    from lit_models.ppo import GAE, MacroGAE
    from lit_models.ppo.rollout import Rollout

    rows, width = 256, 512
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).float()
    rewards, values = (torch.randn(rows, width, generator=generator) * mask for _ in "rv")
    empty = torch.zeros(rows, 0, dtype=torch.int64)
    rollout = Rollout(empty, empty, empty, mask, [], [], empty, rewards=rewards, old_values=values, reward_mask=mask)
    estimator = MacroGAE("fixed", n=N)
    looped = loop(rewards, values, lengths.tolist())
    torch.testing.assert_close(estimator.estimate(rollout)[0], looped, atol=1e-4, rtol=1e-4)
    compare(
        {
            "macro actions": lambda: estimator.estimate(rollout),
            "tokens (GAE)": lambda: GAE().estimate(rollout),
            "loop over macro actions": lambda: loop(rewards, values, lengths.tolist()),
        }
    )


def loop(rewards: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The published algorithm, one row after the other: sums, a reverse scan, and a copy to each token."""
    result = torch.zeros_like(rewards)
    for row, length in enumerate(lengths):
        starts = list(range(0, length, N))
        ends = [*starts[1:], length]
        macro_rewards = [sum(rewards[row, k] for k in range(a, b)) for a, b in zip(starts, ends, strict=True)]
        macro_values = [sum(values[row, k] for k in range(a, b)) / (b - a) for a, b in zip(starts, ends, strict=True)]
        advantage, following = 0.0, 0.0
        for number in reversed(range(len(starts))):
            delta = macro_rewards[number] + following - macro_values[number]
            advantage = delta + 0.95 * advantage
            following = macro_values[number]
            for column in range(starts[number], ends[number]):
                result[row, column] = advantage
    return result


def rollout() -> None:
    """PPO steps of a tiny GPT-2."""
    from common import TOKENIZER, VOCABULARY, tiny_gpt2
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from lit_models import FromModule, LitPPO
    from lit_models.ppo import GAE, Curiosity, FunctionReward, KLPenalty, MacroGAE, Sampler

    torch.manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (32, 5))
    batch = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts)}

    def stepper(estimator: Any, *shapers: Any) -> Callable[[], Any]:
        module = LitPPO(
            FromModule(tiny_gpt2()),
            TOKENIZER,
            [FunctionReward(lambda rollout: rollout.lengths.float())],
            critic=FromModule(tiny_gpt2(scorer=True)),
            generator=Sampler(32, min_new_tokens=32),
            shapers=[KLPenalty(), *shapers],
            advantage=estimator,
        )

        def steps() -> None:
            Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=10,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, DataLoader([None] * 10, collate_fn=lambda _: batch))

        return steps

    compare(
        {
            "token": stepper(MacroGAE("token")),
            "fixed": stepper(MacroGAE("fixed", n=N)),
            "PPO (GAE)": stepper(GAE()),
            "curiosity": stepper(GAE(), Curiosity(eta=0.05, intermediate_size=512)),
            "small curiosity": stepper(GAE(), Curiosity(eta=0.05, intermediate_size=128, encoder="identity")),
        },
        9,
    )


def bleu() -> None:
    """SelfBLEU."""
    import fast_bleu

    from lit_models.metrics.bleu import self_bleu_scores

    draws = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    sets = [[draws.choices(words, k=60) for _ in range(10)] for _ in range(500)]
    weights = {"4": (0.25, 0.25, 0.25, 0.25)}
    worst = max(
        abs(ours - theirs)
        for texts in sets[:50]
        for ours, theirs in zip(
            self_bleu_scores(texts), fast_bleu.SelfBLEU(texts, weights).get_score()["4"], strict=True
        )
    )
    print(f"  largest difference {worst:.1e}")
    compare(
        {
            "fast_bleu (C++)": lambda: [fast_bleu.SelfBLEU(texts, weights).get_score() for texts in sets],
            "ours": lambda: [self_bleu_scores(texts) for texts in sets],
        },
        3,
    )


PARTS = {"advantages": advantages, "rollout": rollout, "bleu": bleu}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.parts or PARTS:
        print(name, flush=True)
        PARTS[name]()
