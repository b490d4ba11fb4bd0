"""Supervised fine-tuning of causal language models."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"LitSFT": "module"})
