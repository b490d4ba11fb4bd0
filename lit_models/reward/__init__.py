"""Reward models trained on pairs of texts."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"LitRewardModel": "module", "RewardLoss": "module"})
