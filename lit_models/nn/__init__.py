"""Building blocks in plain torch that several methods share."""

from lit_models._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Sharding": "sharding",
        "ShardingNeeds": "sharding",
        "TokenScorer": "scoring",
        "WarmupConstant": "schedules",
        "WarmupCosine": "schedules",
        "WarmupLinear": "schedules",
        "gather_logprobs": "logprobs",
        "gathered": "sharding",
        "position_ids": "logprobs",
        "shard": "sharding",
        "token_nll": "logprobs",
    },
)
