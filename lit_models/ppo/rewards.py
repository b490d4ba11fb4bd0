"""Rewards: what scores a response. Several are summed with weights."""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_models.backbones import Backbone
from lit_models.ppo.functional import position_ids
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def import_function(function: str | Callable[..., Any], key: str) -> Callable[..., Any]:
    """A function given by its import path.

    Args:
        function: import path, or the function itself.
        key: of the configuration, for the message.

    Returns:
        The function.

    Raises:
        ValueError: if there is no such function.
    """
    if callable(function):
        return function
    module, _, name = function.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: there is no function {function!r} to import ({error})") from error
    return found


class Reward(ABC):
    """Scores the responses of a rollout.

    A reward of your own subclasses this, or is a plain function named by `FunctionReward`.
    """

    weight: float = 1.0

    @property
    def label(self) -> str:
        """Name in logs and messages."""
        return type(self).__name__

    def build(self, tokenizer: "PreTrainedTokenizerBase") -> nn.Module | None:
        """Make the frozen network the reward needs, if any; called once, when models are built."""
        return None

    @abstractmethod
    def score(self, rollout: Rollout, network: nn.Module | None) -> Tensor:
        """Score every row.

        Args:
            rollout: prompts and responses; nothing later than `ended` is filled in.
            network: what `build` made.

        Returns:
            (B,) float32 scores of whole responses, or (B,R) rewards of single tokens.
        """


@dataclass
class RewardModel(Reward):
    """A trained reward model, read at the last token of the response.

    Args:
        backbone: where the model comes from.
        weight: factor in the sum of rewards.
        normalize: subtract the mean and divide by the standard deviation of the scores on the validation set, which
            `LitRewardModel` stores as `reward_mean` and `reward_std` in the model's configuration.
        mean: overrides the stored mean.
        std: overrides the stored standard deviation.
        tokenizer: hub id or folder, where the reward model does not share the policy's tokenizer; texts are then
            tokenised again.
        batch_size: rows per forward pass; None for all.
        response_tokens: score only so many tokens of the response; None for all.
    """

    backbone: Backbone
    weight: float = 1.0
    normalize: bool = False
    mean: float | None = None
    std: float | None = None
    tokenizer: str | None = None
    batch_size: int | None = None
    response_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option.
        """
        if self.response_tokens is not None and (self.response_tokens < 1 or self.tokenizer is not None):
            raise ValueError(
                "rewards.response_tokens must be at least 1 and counts the policy's tokens, so that it does not go "
                f"with rewards.tokenizer; got {self.response_tokens}"
            )

    def build(self, tokenizer: "PreTrainedTokenizerBase") -> nn.Module:
        """Load the network and the statistics of its scores.

        Raises:
            ValueError: if normalization is asked for and there are no statistics.
        """
        network = self.backbone.build_scorer()
        if self.normalize:
            config = network.model.config
            self._mean: Any = self.mean if self.mean is not None else getattr(config, "reward_mean", None)
            self._std: Any = self.std if self.std is not None else getattr(config, "reward_std", None)
            if self._mean is None or not self._std:
                raise ValueError(
                    "rewards.normalize: the reward model stores no reward_mean and reward_std; "
                    "validate it with LitRewardModel before exporting, or give rewards.mean and rewards.std"
                )
        self._tokenizer = None
        if self.tokenizer is not None:
            from lit_models.tokenization import load_tokenizer

            self._tokenizer = load_tokenizer(self.tokenizer)
        return network

    def score(self, rollout: Rollout, network: nn.Module | None) -> Tensor:
        """Score every row; (B,) float32."""
        assert network is not None
        pieces = [self._score(piece, network) for piece in rollout.split(self.batch_size)]
        scores = torch.cat(pieces)
        if self.normalize:
            scores = (scores - self._mean) / self._std
        return scores

    @torch.no_grad()
    def _score(self, rollout: Rollout, network: nn.Module) -> Tensor:
        if self._tokenizer is None:
            ids, mask = rollout.input_ids, rollout.attention_mask
            width, lengths = rollout.prompt_ids.shape[1], rollout.lengths
            if self.response_tokens is not None:
                lengths = lengths.clamp(max=self.response_tokens)
                ids, mask = (x[:, : width + self.response_tokens] for x in (ids, mask))
            end = width + lengths - 1
        else:
            eos = self._tokenizer.eos_token or ""
            texts = [
                prompt + response + (eos if ended else "")
                for prompt, response, ended in zip(
                    rollout.prompts, rollout.responses, rollout.ended.tolist(), strict=True
                )
            ]
            batch = self._tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(
                rollout.prompt_ids.device
            )
            ids, mask = batch["input_ids"], batch["attention_mask"]
            end = mask.sum(1) - 1
        scores: Tensor = network(ids, mask, position_ids(mask)).gather(1, end[:, None]).squeeze(1)
        return scores


@dataclass
class FunctionReward(Reward):
    """A Python function `(rollout, **arguments) -> scores`, found by import path.

    Args:
        function: import path such as `my_package.rewards.brevity`, or in Python the function itself.
        weight: factor in the sum of rewards.
        arguments: keyword arguments of the function.
    """

    function: str | Callable[..., Any]
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name in logs and messages."""
        return self.function if isinstance(self.function, str) else self.function.__qualname__

    def build(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Import the function.

        Raises:
            ValueError: if there is no such function.
        """
        self._function = import_function(self.function, "rewards.function")

    def score(self, rollout: Rollout, network: nn.Module | None) -> Tensor:
        """Call the function; lists become tensors."""
        scores = self._function(rollout, **self.arguments)
        return torch.as_tensor(scores, dtype=torch.float32, device=rollout.response_mask.device)


@dataclass
class HTTPReward(Reward):
    """A scoring service: POSTs `{"prompts": [...], "responses": [...]}` and reads `{"scores": [...]}`.

    Args:
        url: address of the service.
        weight: factor in the sum of rewards.
        timeout: seconds to wait for an answer.
    """

    url: str
    weight: float = 1.0
    timeout: float = 60.0

    def score(self, rollout: Rollout, network: nn.Module | None) -> Tensor:
        """Ask the service; (B,) float32."""
        import json
        import urllib.request

        body = json.dumps({"prompts": rollout.prompts, "responses": rollout.responses}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            scores = json.load(answer)["scores"]
        return torch.tensor(scores, dtype=torch.float32, device=rollout.response_mask.device)


def total_scores(
    rollout: Rollout, rewards: Sequence[Reward], networks: Sequence[nn.Module | None]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Sum the rewards of a rollout.

    Args:
        rollout: prompts and responses.
        rewards: what to sum.
        networks: what each reward's `build` made.

    Returns:
        (B,) float32 weighted sum of scores; (B,R) weighted sum of token rewards or None; (B,) score per reward label.

    Raises:
        ValueError: if a reward returns another shape.
        FloatingPointError: if a score is not a finite number; the message holds the text.
    """
    size, width = rollout.response_mask.shape
    total = rollout.response_mask.new_zeros(size)
    tokens: Tensor | None = None
    parts = {}
    for reward, network in zip(rewards, networks, strict=True):
        scores = reward.score(rollout, network).detach().float()
        if scores.shape not in ((size,), (size, width)):
            raise ValueError(
                f"rewards: {reward.label} returned shape {tuple(scores.shape)}; it must return ({size},), "
                f"a score per response, or ({size}, {width}), a reward per token"
            )
        if scores.ndim == 2:
            scores = scores * rollout.response_mask
        _require_finite(scores, reward.label, rollout)
        if scores.ndim == 2:
            tokens = reward.weight * scores + (0 if tokens is None else tokens)
            scores = scores.sum(1)
        else:
            total = total + reward.weight * scores
        parts[reward.label] = scores
    return total, tokens, parts


def _require_finite(scores: Tensor, label: str, rollout: Rollout) -> None:
    finite = torch.isfinite(scores.reshape(len(rollout), -1)).all(1)
    if finite.all():
        return
    row = int((~finite).nonzero()[0])
    values = scores[row].flatten()
    value = float(values[~torch.isfinite(values)][0])
    kind = "NaN" if math.isnan(value) else str(value)
    raise FloatingPointError(
        f"rewards: {label} scored {kind} for the text {rollout.prompts[row] + rollout.responses[row]!r}; "
        "check the reward, nothing was updated with it"
    )


def target_length(rollout: Rollout, target: int) -> Tensor:
    """Reward minus the distance of the response length from a target, in units of the target.

    Args:
        rollout: prompts and responses.
        target: wanted number of tokens.

    Returns:
        (B,) float32, at most 0.
    """
    return -(rollout.lengths - target).abs().float() / target
