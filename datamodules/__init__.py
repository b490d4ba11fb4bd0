"""Data modules for language-model training; each works with any model that reads the same batch keys.

Names are imported on first use, so `import datamodules` itself is instant.
"""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "InstructionData": "instruction",
        "LitData": "base",
        "PreferenceData": "preference",
        "PromptData": "prompts",
        "PromptsWithText": "mixed",
        "SnippetInstructions": "snippets",
        "SnippetPreferences": "snippets",
        "SnippetPrompts": "snippets",
        "asset_path": "assets",
    },
)
