"""Reward models: pairs per second, of `LitRewardModel` under the Trainer and of TRL's RewardTrainer.

Both train the same tiny GPT-2 scorer from the same weights on batches of 32 pairs of texts of 64 tokens, in float32 on
the CPU, with gradients clipped to norm 1.
"""

import tempfile
from functools import partial
from typing import Any

from common import (
    FIRST_ORDINARY_TOKEN,
    TOKENIZER,
    VOCABULARY,
    Stopwatch,
    compare,
    lightning_trainer,
    tiny_gpt2,
    trl_lap,
    trl_options,
)

PAIRS, LENGTH = 32, 64
LEARNING_RATE = 1e-4


def texts(count: int) -> Any:
    """(count,64) int64 random texts."""
    import torch

    return torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, (count, LENGTH))


def ours(steps: int) -> Stopwatch:
    """Train with this collection."""
    from torch.optim import AdamW
    from torch.utils.data import DataLoader

    from datamodules.preference import collate_pairs
    from lit_models import FromModule, LitRewardModel

    module = LitRewardModel(
        FromModule(tiny_gpt2(scorer=True)),
        TOKENIZER,
        optimizer=partial(AdamW, lr=LEARNING_RATE, weight_decay=0.0),
    )
    sides = texts(steps * PAIRS).numpy(), texts(steps * PAIRS).numpy()
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(*sides, strict=True)]
    loader = DataLoader(rows, PAIRS, shuffle=True, collate_fn=partial(collate_pairs, pad_id=0))
    watch = Stopwatch()
    lightning_trainer(watch, steps, gradient_clip_val=1.0).fit(module, loader)
    return watch


def trl(steps: int) -> Stopwatch:
    """Train with TRL."""
    model = tiny_gpt2(scorer=True)  # first, since this also prepares the import of transformers' models
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from lit_models.tokenization import load_tokenizer

    columns = {"chosen_ids": texts(steps * PAIRS).tolist(), "rejected_ids": texts(steps * PAIRS).tolist()}
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            **trl_options(steps, PAIRS, folder),
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
        )
        RewardTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=load_tokenizer(TOKENIZER),
            callbacks=[trl_lap(watch)],
        ).train()
    return watch


if __name__ == "__main__":
    compare({"ours": ours, "trl": trl}, steps=50, units={"pairs": PAIRS})
