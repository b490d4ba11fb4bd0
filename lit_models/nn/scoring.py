"""A scalar per token: the network behind reward models and critics."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenScorer(nn.Module):
    """Per-token scores from a Hugging Face sequence-classification model with one label.

    The wrapped model pools one position in its own `forward`; reward and value functions need all of them. What
    `save_pretrained` of the wrapped model writes is loaded by plain `AutoModelForSequenceClassification`.

    Args:
        model: a model with a `score` head (hidden size -> 1) on top of `base_model`.

    Raises:
        TypeError: if the model has no `score` head of one output.
    """

    model: Any

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Module) or getattr(model.config, "num_labels", None) != 1:
            raise TypeError(f"{type(model).__name__} has no one-label `score` head; use a decoder-only language model")
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Score every position.

        Args:
            input_ids: (B,T) int64.
            attention_mask: (B,T) int64, 1 for real tokens on whichever side the padding is.
            position_ids: (B,T) int64.

        Returns:
            (B,T) float32.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        scores: Tensor = self.model.score(hidden).squeeze(-1).float()
        return scores


def init_score_head(model: Any, zero: bool = False) -> None:  # noqa: ANN401
    """Initialise a scalar head as N(0, (1/(H+1))²), or with zeros.

    Args:
        model: model with a linear `score` head of H inputs.
        zero: start from a constant zero score.
    """
    weight = model.score.weight
    with torch.no_grad():
        weight.zero_() if zero else weight.normal_(0.0, 1.0 / (weight.shape[-1] + 1))


def scorer_from_lm(lm: "PreTrainedModel") -> "PreTrainedModel":
    """Put a fresh scalar head on the trunk of a causal language model.

    Args:
        lm: the language model; its trunk is taken over, not copied.

    Returns:
        The sequence-classification model of the same family with one label.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    with torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(config)
    setattr(scorer, scorer.base_model_prefix, lm.base_model)
    reference = next(lm.base_model.parameters())
    scorer.score = nn.Linear(scorer.score.in_features, 1, bias=False, dtype=reference.dtype, device=reference.device)
    if reference.device.type != "meta":
        init_score_head(scorer)
    return scorer
