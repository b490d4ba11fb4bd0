"""Sampling of responses, with randomness that depends on neither batch layout nor number of processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_models.ppo.functional import position_ids, response_mask
from lit_models.ppo.gate import Gate, GateRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class RowNoise:
    """Random numbers owned by rows: row i of a global batch gets the same ones however the batch is split.

    Args:
        seed: seed of the run.
        rollout: counter of the rollout; each one has its own numbers.
        total: prompts of the global batch.
        samples: responses per prompt, which are consecutive rows.
        rank: rank of this process, which holds the prompts rank, rank + world size, ...
        world_size: number of processes.
    """

    seed: int
    rollout: int
    total: int
    samples: int = 1
    rank: int = 0
    world_size: int = 1

    def generator(self, stream: int = 0) -> torch.Generator:
        """The CPU generator behind the numbers of this rollout; each stream has its own."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.rollout + stream * 15_485_863_001)

    def uniforms(self, length: int, stream: int = 0) -> Tensor:
        """(B,length) float32 in [0, 1) for the rows of this process; stream 0 is that of sampling."""
        numbers = torch.rand(self.total, self.samples, length, generator=self.generator(stream))
        return numbers[self.rank :: self.world_size].flatten(0, 1)


class Generation(NamedTuple):
    """Sampled responses.

    Ids (B,R) int64, mask (B,R) float32, whether each row ended by itself (B,) bool, and where the generator has a gate
    what it decided, (B,R) bool.
    """

    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    gate: Tensor | None = None


class Generator(ABC):
    """Samples responses from the policy.

    A generator of your own subclasses this and is named in YAML by its class path. `temperature` is the one that
    log-probabilities are computed at.
    """

    temperature: float = 1.0
    truncates: bool = False
    """Whether tokens are ruled out (top-k, top-p), so that samples don't follow the policy's own distribution."""
    gate: Gate | None = None
    """Marks tokens while they are sampled; set by the module where a shaper needs it."""

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: B027 (nothing to do by default)
        """Take what is needed from the tokenizer, once, before training."""

    @abstractmethod
    def generate(
        self,
        model: "PreTrainedModel",
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        noise: RowNoise,
        all_done: Callable[[bool], bool] = bool,
    ) -> Generation:
        """Sample one response per row.

        Args:
            model: causal language model in evaluation mode.
            prompt_ids: (B,P) int64, left-padded.
            prompt_mask: (B,P) int64.
            noise: random numbers of this rollout.
            all_done: turns "this process has finished" into "all processes have", for sharded models.

        Returns:
            The responses.
        """


@dataclass
class Sampler(Generator):
    """Ancestral sampling with a key-value cache, one forward pass per token.

    Args:
        max_new_tokens: response tokens at most.
        min_new_tokens: end-of-sequence tokens are ruled out before this many tokens.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the most likely tokens that hold this probability; 1 for all.
        stop_strings: a response also ends once its text contains one of them.
        extra_eos_tokens: tokens that end a response besides the tokenizer's own.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    extra_eos_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                "generator.max_new_tokens must be at least 1 and generator.min_new_tokens between 0 and it, got "
                f"{self.max_new_tokens} and {self.min_new_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(
                "generator.temperature must be >= 0, generator.top_p in (0, 1] and generator.top_k >= 1 or null, got "
                f"{self.temperature}, {self.top_p} and {self.top_k}"
            )
        self.truncates = self.temperature > 0 and (self.top_k is not None or self.top_p < 1)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read end-of-sequence and padding ids.

        Raises:
            ValueError: if an extra end token is not in the vocabulary.
        """
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in self.extra_eos_tokens if token not in vocabulary]
        if unknown:
            raise ValueError(f"generator.extra_eos_tokens: {unknown[0]!r} is not in the tokenizer's vocabulary")
        self._tokenizer = tokenizer
        self._eos = torch.tensor([tokenizer.eos_token_id, *(vocabulary[token] for token in self.extra_eos_tokens)])
        self._pad = int(tokenizer.pad_token_id)

    @torch.no_grad()
    def generate(
        self,
        model: "PreTrainedModel",
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        noise: RowNoise,
        all_done: Callable[[bool], bool] = bool,
    ) -> Generation:
        """Sample one response per row; see `Generator.generate`."""
        rows, width = prompt_ids.shape
        device = prompt_ids.device
        eos = self._eos.to(device)
        uniforms = noise.uniforms(self.max_new_tokens).to(device)
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows, self.max_new_tokens)], 1)
        position = prompt_mask.sum(1, keepdim=True)
        response = prompt_ids.new_full((rows, self.max_new_tokens), self._pad)
        alive = prompt_mask.new_zeros(rows, self.max_new_tokens)
        marks = prompt_mask.new_zeros(rows, self.max_new_tokens, dtype=torch.bool)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        output = model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=position_ids(prompt_mask),
            use_cache=True,
            logits_to_keep=1,
        )
        length = self.max_new_tokens
        for step in range(self.max_new_tokens):
            logits = output.logits[:, -1].float()
            if step < self.min_new_tokens:
                logits = logits.index_fill(1, eos, -torch.inf)
            token = self.pick(logits, uniforms[:, step]).masked_fill(done, self._pad)
            response[:, step] = token
            alive[:, step] = ~done
            if self.gate is not None:
                marks[:, step] = self.gate(logits, token) & ~done
            done = done | torch.isin(token, eos) | self._stopped(response[:, : step + 1])
            if all_done(bool(done.all())):
                length = step + 1
                break
            if step + 1 < self.max_new_tokens:
                output = model(
                    input_ids=token[:, None],
                    attention_mask=mask[:, : width + step + 1],
                    position_ids=position + step,
                    use_cache=True,
                    **_cache(output),
                )
        kept = alive[:, :length].float()
        return Generation(response[:, :length], kept, done, None if self.gate is None else marks[:, :length])

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Choose a token per row by inverting the cumulative distribution.

        Args:
            logits: (B,V) float32.
            uniform: (B,) float32 in [0, 1).

        Returns:
            (B,) int64.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        order = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, order = logits.topk(self.top_k, dim=-1)
        elif self.top_p < 1:
            logits, order = logits.sort(dim=-1, descending=True)
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        index = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        last = (cumulative < total).sum(-1, keepdim=True)  # where rounding pushes past the last possible token
        index = torch.minimum(index, last)
        return (index if order is None else order.gather(1, index)).squeeze(1)

    def _stopped(self, response: Tensor) -> Tensor | bool:
        """Rows whose text contains a stop string; only the tail can newly contain one."""
        if not self.stop_strings:
            return False
        tail = max(len(stop) for stop in self.stop_strings) + 8
        texts = self._tokenizer.batch_decode(response[:, -tail:])
        hits = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(hits, device=response.device)


@dataclass
class HuggingFaceGenerate(Generator):
    """Responses by `model.generate`, for its further decoding options.

    Args:
        max_new_tokens: response tokens at most.
        temperature: logits are divided by it.
        options: further arguments of `transformers.GenerationConfig`, such as `top_k` or `repetition_penalty`.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read end-of-sequence and padding ids."""
        self.truncates = bool({"top_k", "top_p", "min_p", "typical_p"} & set(self.options))
        self._eos, self._pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)

    @torch.no_grad()
    def generate(
        self,
        model: "PreTrainedModel",
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        noise: RowNoise,
        all_done: Callable[[bool], bool] = bool,
    ) -> Generation:
        """Sample one response per row; see `Generator.generate`. The numbers depend on the batch layout."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._eos,
            pad_token_id=self._pad,
            **({"top_k": 0} | self.options),
        )
        recorder = None if self.gate is None else GateRecorder(self.gate)
        devices = [prompt_ids.device] if prompt_ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(noise.generator().initial_seed() * 8191 + noise.rank)
            ids = model.generate(  # type: ignore[operator]
                prompt_ids,
                attention_mask=prompt_mask,
                generation_config=config,
                synced_gpus=all_done is not bool,
                logits_processor=None if recorder is None else [recorder],
            )
        response = ids[:, prompt_ids.shape[1] :]
        mask = response_mask(response, [self._eos])
        marks = None if recorder is None else recorder.marks(response[:, -1]) & mask.bool()
        return Generation(response, mask, (response == self._eos).any(1), marks)


def _cache(output: Any) -> dict[str, Any]:  # noqa: ANN401
    """The key-value cache of an output under the argument name that belongs to it."""
    name = "cache" if getattr(output, "cache", None) is not None else "past_key_values"
    return {name: output[name]}
