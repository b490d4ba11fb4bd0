"""Macro actions in PPO: MA-RLHF."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BeneparParser": "parsing",
        "ClauseParser": "parsing",
        "ConstituencyParser": "parsing",
        "Fixed": "segmenters",
        "FunctionSegmenter": "segmenters",
        "Lines": "segmenters",
        "MacroGAE": "estimator",
        "Parsing": "segmenters",
        "Pattern": "segmenters",
        "Perplexity": "segmenters",
        "Punctuation": "segmenters",
        "Randomized": "segmenters",
        "Segmenter": "segmenters",
        "Sentences": "segmenters",
        "Sequence": "segmenters",
        "SpacyParser": "parsing",
        "Token": "segmenters",
        "Tree": "parsing",
        "macro_texts": "view",
    },
)
