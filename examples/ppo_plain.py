"""PPO without the Trainer: the same steps in a loop of your own.

A tiny random language model learns to answer in about eight tokens. Paste it into a notebook, or run
`python examples/ppo_plain.py`; it takes a few seconds on a CPU.
"""

import copy

import torch

from datamodules.assets import asset_path
from lit_models.backbones import FromConfig
from lit_models.ppo import (
    GAE,
    FunctionReward,
    KLPenalty,
    PPOLoss,
    RowNoise,
    Sampler,
    ScoreOptions,
    Updates,
    steps,
)
from lit_models.tokenization import load_tokenizer

torch.manual_seed(0)
tokenizer = load_tokenizer(asset_path("movie_snippets/tokenizer"))
backbone = FromConfig("gpt2", {"vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64})
actor, critic = backbone.build(), backbone.build_scorer()
for network in (actor, critic):
    steps.disable_dropout(network)
reference = copy.deepcopy(actor).requires_grad_(False)

sampler = Sampler(max_new_tokens=24)
sampler.prepare(tokenizer)
# A reward is any function of the rollout; `lit_models.ppo.RewardModel` is one that holds a network.
reward = FunctionReward(lambda rollout: -(rollout.lengths - 8).abs() / 8)
reward.build(tokenizer)
optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
shapers, updates, loss = [KLPenalty(coef=0.02)], Updates(epochs=2, minibatch_size=32), PPOLoss()

prompts = tokenizer(["<bos>The film", "<bos>A movie"] * 32, return_tensors="pt", add_special_tokens=False)
batch = {"prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"]}
for number in range(20):
    rollout = steps.generate(actor, sampler, tokenizer, batch, RowNoise(seed=0, rollout=number, total=64))
    steps.score(rollout, actor, critic, reference, [reward], [None])
    steps.shape(rollout, shapers, ScoreOptions())
    steps.advantages(rollout, GAE())
    for micro_batches in steps.minibatches(rollout, updates, torch.Generator().manual_seed(number)):
        optimizer.zero_grad()
        for micro in micro_batches:
            result = steps.losses(micro, actor, critic, loss, shapers)
            (result.policy + result.value).backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
    if number % 5 == 4:
        print(f"rollout {number + 1}: score {rollout.scores.mean():.2f}, length {rollout.lengths.float().mean():.1f}")
