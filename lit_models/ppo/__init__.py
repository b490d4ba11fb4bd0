"""PPO for language models: rollouts, rewards, shaping, advantages and updates as replaceable parts."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdvantageEstimator": "advantages",
        "Curiosity": "curiosity",
        "FunctionReward": "rewards",
        "GAE": "advantages",
        "Generation": "generation",
        "Generator": "generation",
        "HTTPReward": "rewards",
        "HuggingFaceGenerate": "generation",
        "KLPenalty": "shapers",
        "LitPPO": "module",
        "MacroGAE": "macro",
        "PPOLoss": "steps",
        "ProgramReward": "programs",
        "Reward": "rewards",
        "RewardModel": "rewards",
        "Rollout": "rollout",
        "RowNoise": "generation",
        "Sampler": "generation",
        "ScoreOptions": "steps",
        "SentRewards": "curiosity",
        "Shaper": "shapers",
        "Updates": "steps",
    },
)
