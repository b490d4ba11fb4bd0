"""Research systems as Lightning modules; see the README for the list.

Names are imported on first use, so `import lit_models` itself is instant.
"""

from lit_models._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FromCheckpoint": "backbones",
        "FromConfig": "backbones",
        "FromGGUF": "backbones",
        "FromModule": "backbones",
        "FromPretrained": "backbones",
        "FullyShardStrategy": "strategies",
        "LitBase": "base",
        "LitInfluence": "influence",
        "LitPIXEL": "pixel",
        "LitPPO": "ppo",
        "LitPixelLM": "pixel",
        "LitPixelTask": "pixel",
        "LitRewardModel": "reward",
        "LitSFT": "sft",
        "LitWaveform": "diffusion",
        "LoRA": "backbones",
    },
)
