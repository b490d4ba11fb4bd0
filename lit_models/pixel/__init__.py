"""Language models that read text as pixels, as tokens, or as both."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FromPIXELConfig": "mae_recipes",
        "FromPIXELPretrained": "mae_recipes",
        "FromPixelConfig": "recipes",
        "FromPixelPretrained": "recipes",
        "LitPIXEL": "mae_module",
        "LitPixelLM": "module",
        "LitPixelTask": "finetune",
        "PIXELConfig": "modeling_mae",
        "PIXELForPreTraining": "modeling_mae",
        "PIXELForSequenceClassification": "modeling_mae",
        "PIXELForTokenClassification": "modeling_mae",
        "PixelForCausalLM": "modeling",
        "PixelForSequenceClassification": "modeling",
        "PixelForTokenClassification": "modeling",
        "PixelLMConfig": "configuration",
    },
)
