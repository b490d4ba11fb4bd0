"""Curiosity in PPO: CD-RLHF."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ICM": "modeling",
        "Curiosity": "shaper",
        "SentRewards": "sent_rewards",
    },
)
