"""The Sent-Rewards baseline of CD-RLHF: a penalty for responses that resemble earlier ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_models.metrics.bleu import bleu_against
from lit_models.metrics.sentences import Encoder, HashedNgrams, encode
from lit_models.ppo.functional import AllReduce, place_scores
from lit_models.ppo.rollout import Rollout
from lit_models.ppo.shapers import Shaper


@dataclass
class SentRewards(Shaper):
    """Subtracts the likeness to earlier responses from the score, by words and by sentence embeddings.

    Responses of all processes are kept, the newest `pool_size` of them; each rollout is compared with a random part of
    the pool before it joins. The first rollout has nothing to be compared with.

    Args:
        bleu_coef: weight of BLEU-4 against the earlier responses.
        cosine_coef: weight of the mean cosine similarity of sentence embeddings to them.
        encoder: function or class `list[str] -> (N,d)`; hashed character n-grams by default.
        sample_size: earlier responses to compare with; null for all.
        pool_size: earlier responses to keep.
    """

    bleu_coef: float = 1.0
    cosine_coef: float = 1.0
    encoder: Encoder | None = None
    sample_size: int | None = 128
    pool_size: int = 2048

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option.
        """
        if self.bleu_coef < 0 or self.cosine_coef < 0:
            raise ValueError(
                "shapers.bleu_coef and shapers.cosine_coef of SentRewards must not be negative, got "
                f"{self.bleu_coef} and {self.cosine_coef}"
            )
        if self.pool_size < 1 or (self.sample_size is not None and self.sample_size < 1):
            raise ValueError(
                "shapers.pool_size and shapers.sample_size of SentRewards must be at least 1, got "
                f"{self.pool_size} and {self.sample_size}"
            )
        self._encoder: Any = self.encoder or HashedNgrams()
        self._pool: list[str] = []

    def shape(
        self, rollout: Rollout, rewards: Tensor, all_reduce: AllReduce | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Subtract the likeness at the last token of each response."""
        assert rollout.reward_mask is not None
        references = self._references(rollout)
        everything, own = gather(rollout.responses, 1 if rollout.noise is None else rollout.noise.samples)
        device = rewards.device
        words = torch.zeros(len(rollout), device=device)
        cosine = torch.zeros(len(rollout), device=device)
        if references:
            split = [text.split() for text in references]
            words = torch.tensor([bleu_against(text.split(), split) for text in rollout.responses], device=device)
            # One call for both sides and for all processes, so that an encoder's statistics are the same.
            with torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False):
                vectors = encode(self._encoder, [*everything, *references])
                unit = torch.nn.functional.normalize(vectors, dim=-1)
                new, old = unit[own], unit[len(everything) :]
                cosine = (new @ old.T).mean(1).to(device)
        self._pool = (self._pool + everything)[-self.pool_size :]
        penalty = self.bleu_coef * words + self.cosine_coef * cosine
        metrics = {"sent/bleu": words, "sent/cosine": cosine, "reward/sent": -penalty}
        return rewards - place_scores(penalty, rollout.reward_mask), metrics

    def _references(self, rollout: Rollout) -> list[str]:
        """The part of the pool to compare with: the same on all processes."""
        if self.sample_size is None or self.sample_size >= len(self._pool):
            return self._pool
        generator = torch.Generator().manual_seed(0) if rollout.noise is None else rollout.noise.generator(stream=2)
        return [self._pool[row] for row in torch.randperm(len(self._pool), generator=generator)[: self.sample_size]]

    def state_dict(self) -> dict[str, Any]:
        """The pool."""
        return {"pool": list(self._pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the pool back."""
        self._pool = list(state["pool"])


def gather(texts: list[str], samples: int = 1) -> tuple[list[str], list[int]]:
    """Texts of all processes, in the order in which a single process would have them.

    Args:
        texts: of this process, which has every W-th prompt.
        samples: texts per prompt, which follow each other.

    Returns:
        The texts of all, and the places of this process's texts among them.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return texts, list(range(len(texts)))
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, texts)
    order = [
        (rank, text)
        for start in range(0, max(map(len, gathered)), samples)
        for rank, own in enumerate(gathered)
        for text in own[start : start + samples]
    ]
    return [text for _, text in order], [place for place, (rank, _) in enumerate(order) if rank == dist.get_rank()]
