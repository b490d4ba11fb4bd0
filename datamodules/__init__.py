"""Data modules for language-model training; each works with any model that reads the same batch keys.

Names are imported on first use, so `import datamodules` itself is instant.
"""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AudioReader": "audio_io",
        "AudioTexts": "audio",
        "Confusables": "noise",
        "DynamicsData": "dynamics",
        "FolkWave": "folkwave",
        "Glue": "pixel_tasks",
        "InstructionData": "instruction",
        "Leet": "noise",
        "LitData": "base",
        "LookAlikes": "noise",
        "PixelSnippetRatings": "pixel_tasks",
        "PixelSnippets": "pixels",
        "PixelTagging": "pixel_tasks",
        "PixelTask": "pixel_tasks",
        "PixelTexts": "pixels",
        "PoolData": "pool",
        "PreferenceData": "preference",
        "PromptData": "prompts",
        "PromptsWithText": "mixed",
        "ReleasedRun": "gptdynamics",
        "SnippetInstructions": "snippets",
        "SnippetPreferences": "snippets",
        "SnippetPrompts": "snippets",
        "Typos": "noise",
        "Xnli": "pixel_tasks",
        "asset_path": "assets",
        "export_gptdynamics": "gptdynamics",
        "import_gptdynamics": "gptdynamics",
    },
)
