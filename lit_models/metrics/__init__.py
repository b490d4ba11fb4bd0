"""Metrics of generated text, as functions and as torchmetrics."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Diversity": "diversity",
        "ExpectationAdjustedDistinct": "diversity",
        "HashedNgrams": "sentences",
        "MiniLM": "sentences",
        "SelfBLEU": "bleu",
        "SentenceSimilarity": "sentences",
        "SetMetric": "base",
    },
)
