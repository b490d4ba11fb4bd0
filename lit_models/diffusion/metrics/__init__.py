"""Metrics of generated music, as functions and as torchmetrics."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ClapEmbedding": "clap",
        "ExtrapolatedFrechetAudioDistance": "distances",
        "FrechetAudioDistance": "distances",
        "InceptionScore": "scores",
        "KernelAudioDistance": "distances",
        "KeyAgreement": "music",
        "LogMel": "embeddings",
        "NearestCosine": "diversity",
        "PitchAgreement": "music",
        "PromptDiversity": "diversity",
        "Rating": "ratings",
        "RelevanceAccuracy": "scores",
        "Retrieval": "scores",
        "STFTDistance": "spectral",
        "SoundFeatures": "tagger",
        "SoundTagger": "tagger",
        "TaggerDivergence": "scores",
        "TempoAgreement": "music",
        "TextAudioSimilarity": "scores",
        "rate": "ratings",
        "read_sheets": "ratings",
        "write_sheet": "ratings",
    },
)
