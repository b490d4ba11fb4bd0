"""PPO: seconds per rollout with its update, of `LitPPO` under the Trainer and of TRL's PPOTrainer.

Both train the same tiny GPT-2 from the same weights: 32 prompts of 5 tokens, responses of 32 tokens, one epoch of one
minibatch, float32 on the CPU, temperature 1, advantages whitened, no gradient clipping.
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

PROMPTS, PROMPT_LENGTH, RESPONSE_LENGTH = 32, 5, 32
LEARNING_RATE, KL_COEF, VF_COEF = 3e-6, 0.05, 0.1  # so small a rate keeps responses at their full length


def models() -> tuple[Any, Any, Any]:
    """Policy, reward model and critic, the same ones on each side."""
    return tiny_gpt2(), tiny_gpt2(scorer=True), tiny_gpt2(scorer=True)


def prompts(count: int) -> Any:
    """(count,5) int64 random prompts."""
    import torch

    return torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, (count, PROMPT_LENGTH))


def ours(steps: int) -> Stopwatch:
    """Train with this collection."""
    from torch.optim import AdamW
    from torch.utils.data import DataLoader

    from datamodules.prompts import collate_prompts
    from lit_models import FromModule, LitPPO
    from lit_models.ppo import GAE, KLPenalty, PPOLoss, RewardModel, Sampler, Updates

    policy, reward, critic = models()
    module = LitPPO(
        FromModule(policy),
        TOKENIZER,
        [RewardModel(FromModule(reward))],
        FromModule(critic),
        generator=Sampler(max_new_tokens=RESPONSE_LENGTH, temperature=1.0),
        shapers=[KLPenalty(coef=KL_COEF)],
        advantage=GAE(whiten_advantages=True),
        loss=PPOLoss(vf_coef=VF_COEF),
        updates=Updates(max_grad_norm=None),
        optimizer=partial(AdamW, lr=LEARNING_RATE, weight_decay=0.0),
    )
    rows = [{"ids": ids, "index": index, "columns": {}} for index, ids in enumerate(prompts(steps * PROMPTS).numpy())]
    collate = partial(collate_prompts, pad_id=0, length=None, columns=[])
    watch = Stopwatch()
    lightning_trainer(watch, steps).fit(module, DataLoader(rows, PROMPTS, shuffle=True, collate_fn=collate))
    return watch


def trl(steps: int) -> Stopwatch:
    """Train with TRL."""
    policy, reward, critic = models()  # first, since this also prepares the import of transformers' models
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from lit_models.tokenization import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.padding_side = "left"
    dataset = Dataset.from_dict({"input_ids": prompts(steps * PROMPTS).tolist()})
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            **trl_options(steps, PROMPTS, folder),
            total_episodes=steps * PROMPTS,
            response_length=RESPONSE_LENGTH,
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
            stop_token="eos",
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            kl_coef=KL_COEF,
            vf_coef=VF_COEF,
        )
        PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward,
            value_model=critic,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(PROMPTS)),  # must be there, is not used
            callbacks=[trl_lap(watch)],
        ).train()
    return watch


if __name__ == "__main__":
    tokens = PROMPTS * (PROMPT_LENGTH + RESPONSE_LENGTH)
    compare({"ours": ours, "trl": trl}, steps=20, units={"tokens": tokens})
