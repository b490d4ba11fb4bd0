"""What causal language models say about test examples: loss, accuracy and metrics of generated answers."""

import inspect
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

OPTION = "callbacks.TrainingDynamicsRecorder"


def causal_network(module: LightningModule) -> nn.Module | None:
    """The one causal language model of transformers that a module trains, adapters included; None if there is no such.

    Args:
        module: it, or the module that holds it as a direct sub-module.
    """
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    def is_causal(network: nn.Module) -> bool:
        base = _base(network)
        return (
            isinstance(base, PreTrainedModel)
            and base.can_generate()
            and not getattr(base.config, "is_encoder_decoder", False)
            and any(parameter.requires_grad for parameter in network.parameters())
        )

    # An averaged copy is not trained by gradients, and so has none that require them.
    found = [network for network in (module, *module.children()) if is_causal(network)]
    return found[0] if len(found) == 1 else None


def _base(network: nn.Module) -> Any:  # noqa: ANN401
    """The model under adapters."""
    get: Any = getattr(network, "get_base_model", None)
    return network if get is None else get()


class CausalOutputs:
    """What a causal language model says about a batch, computed once for all metrics.

    Batches hold `input_ids` (B,T) int64, `labels` (B,T) int64, -100 where a token is none of the answer, and
    `attention_mask` (B,T) int64 where there is padding.

    Args:
        network: the model.
        batch: the batch.
        module: the trained module; its `tokenizer` is the default one.
        seed: of sampled answers.
        sharded: whether other processes must run the same number of forward passes.
    """

    def __init__(
        self, network: nn.Module, batch: Mapping[str, Any], module: LightningModule, seed: int, sharded: bool
    ) -> None:
        self.network, self.batch, self.module = network, batch, module
        self.seed, self.sharded = seed, sharded
        self.ids: Tensor = batch["input_ids"]
        self.labels: Tensor = batch["labels"]
        mask = batch.get("attention_mask")
        self.mask: Tensor = torch.ones_like(self.ids) if mask is None else mask
        self._texts: dict[Any, list[str]] = {}

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B,T,V) of any rows."""
        options: dict[str, Any] = {"use_cache": False}
        if "position_ids" in inspect.signature(_base(self.network).forward).parameters:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.network(input_ids=ids, attention_mask=mask, **options).logits
        return logits

    @cached_property
    def logits(self) -> Tensor:
        """(B,T,V)."""
        return self.forward(self.ids, self.mask)

    @cached_property
    def counted(self) -> Tensor:
        """(B,T-1) bool, positions whose next token belongs to the answer."""
        return self.labels[:, 1:] != -100

    def nll(self) -> Tensor:
        """(B,T-1) float32, cross entropy of each token of the answer, 0 elsewhere."""
        kept = self.counted.nonzero(as_tuple=True)  # answers are short, and float32 rows of a vocabulary long
        values = F.cross_entropy(self.logits[:, :-1][kept].float(), self.labels[:, 1:][kept], reduction="none")
        return values.new_zeros(self.counted.shape).index_put(kept, values)

    @cached_property
    def starts(self) -> Tensor:
        """(B,) int64, position of the first token of each answer; the width without one."""
        kept = self.labels != -100
        return torch.where(kept.any(1), kept.int().argmax(1), kept.shape[1])

    @cached_property
    def prompted(self) -> Tensor:
        """(B,) bool, whether there are tokens before the answer, as its first token needs them."""
        before = torch.arange(self.ids.shape[1], device=self.ids.device) < self.starts[:, None]
        return (self.mask.bool() & before).any(1)

    def prompts(self) -> list[Tensor]:
        """Token ids before each answer."""
        rows = zip(self.ids, self.mask, self.starts.tolist(), strict=True)
        return [ids[:start][mask[:start].bool()] for ids, mask, start in rows]

    def answers(self) -> list[Tensor]:
        """Token ids of each answer."""
        return [labels[labels != -100] for labels in self.labels]

    def tokenizer(self, name: str | None) -> Any:  # noqa: ANN401
        """A tokenizer by name, or that of the module.

        Raises:
            ValueError: if there is neither.
        """
        if name is not None:
            return _tokenizer(name)
        own = getattr(self.module, "tokenizer", None)
        if own is None:
            raise ValueError(f"{OPTION}.metrics: {type(self.module).__name__} has no tokenizer; set `tokenizer` there")
        return own

    def texts(self, tokenizer: Any, max_new_tokens: int, sample: bool, top_p: float, temperature: float) -> list[str]:  # noqa: ANN401
        """Generated answers, the same for all metrics that ask for them in the same way."""
        key = (max_new_tokens, sample, top_p, temperature)
        if key not in self._texts:
            pad = next(id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None)
            first = next(id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id, pad) if id is not None)
            # Nothing can be generated from nothing.
            prompts = [prompt if len(prompt) else prompt.new_tensor([first]) for prompt in self.prompts()]
            width = max(len(prompt) for prompt in prompts)
            ids = torch.stack([F.pad(prompt, (width - len(prompt), 0), value=pad) for prompt in prompts])
            mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
            drawing = {"top_p": top_p, "temperature": temperature, "top_k": 0} if sample else {}
            if sample:  # the states of all generators are restored afterwards
                torch.default_generator.manual_seed(self.seed)
                if ids.is_cuda:
                    torch.cuda.manual_seed(self.seed)
            generate: Any = self.network.generate
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=sample,
                    pad_token_id=pad,
                    synced_gpus=self.sharded,
                    **drawing,
                )
            self._texts[key] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return self._texts[key]


def _tokenizer(name: str) -> Any:  # noqa: ANN401
    if name not in _TOKENIZERS:
        from lit_models.tokenization import load_tokenizer

        _TOKENIZERS[name] = load_tokenizer(name)
    return _TOKENIZERS[name]


_TOKENIZERS: dict[str, Any] = {}


class CausalMetric(ABC):
    """A metric of the tests of a causal language model."""

    @abstractmethod
    def __call__(self, outputs: CausalOutputs) -> Tensor:
        """Value of each test, (B,) float."""


class AnswerLoss(CausalMetric):
    """Cross entropy of the tokens of the answer in nats, their mean; NaN without an answer."""

    def __call__(self, outputs: CausalOutputs) -> Tensor:
        """Value of each test, (B,) float32."""
        return outputs.nll().sum(1) / outputs.counted.sum(1)


class Accuracy(CausalMetric):
    """Whether the answer is the likeliest one; 0 or 1.

    Args:
        choices: possible answers, as texts or as token ids. Without any, every token of the answer must be the
            likeliest one after those before it.
        tokenizer: hub id or folder, for choices given as texts; the module's by default.
        normalize: compare mean log likelihoods per token in place of sums.
    """

    def __init__(
        self,
        choices: Sequence[str] | Sequence[list[int]] | None = None,
        tokenizer: str | None = None,
        normalize: bool = False,
    ) -> None:
        if choices is not None and len(choices) < 2:
            raise ValueError(f"{OPTION}.metrics.accuracy.choices: there must be at least 2, got {len(choices)}")
        self.choices, self.tokenizer, self.normalize = choices, tokenizer, normalize

    def __call__(self, outputs: CausalOutputs) -> Tensor:
        """Value of each test, (B,) float32; NaN without an answer, and for choices also without a prompt."""
        empty = ~outputs.counted.any(1)
        if self.choices is None:
            right = (outputs.logits[:, :-1].argmax(-1) == outputs.labels[:, 1:]) | ~outputs.counted
            result = right.all(1).float()
        else:
            choices = self._tokens(outputs)
            wanted = [self._wanted(answer.tolist(), choices, outputs) for answer in outputs.answers()]
            result = (self._scores(outputs, choices).argmax(1).cpu() == torch.tensor(wanted)).float().to(empty.device)
            empty = empty | ~outputs.prompted
        return torch.where(empty, torch.nan, result)

    def _tokens(self, outputs: CausalOutputs) -> list[list[int]]:
        assert self.choices is not None
        if not isinstance(self.choices[0], str):
            return [list(choice) for choice in self.choices]  # type: ignore[arg-type]
        tokenizer = outputs.tokenizer(self.tokenizer)
        return [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in self.choices]

    def _wanted(self, answer: list[int], choices: list[list[int]], outputs: CausalOutputs) -> int:
        """Number of the choice that an answer is, whatever ends it; -1 for an empty answer."""
        fitting = [number for number, choice in enumerate(choices) if answer[: len(choice)] == choice]
        if not fitting and answer:
            raise ValueError(
                f"{OPTION}.metrics.accuracy.choices: the answer with the token ids {answer} is none of them; "
                "write them as they stand in the data, blanks included"
            )
        return max(fitting, key=lambda number: len(choices[number])) if answer else -1

    def _scores(self, outputs: CausalOutputs, choices: list[list[int]]) -> Tensor:
        """(B,C), log likelihood of each choice."""
        device = outputs.ids.device
        if all(len(choice) == 1 for choice in choices):  # the forward pass of the loss says it all
            last = (outputs.starts - 1).clamp(min=0)
            rows = outputs.logits[torch.arange(len(last), device=device), last].float()
            return rows[:, [choice[0] for choice in choices]]
        scores = []
        for choice in choices:
            added = torch.tensor(choice, device=device)
            whole = [torch.cat([prompt, added]) for prompt in outputs.prompts()]
            ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
            lengths = torch.tensor([len(row) for row in whole], device=device)
            mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
            logits = outputs.forward(ids, mask).float().log_softmax(-1)
            places = lengths[:, None] - len(choice) + torch.arange(len(choice), device=device)  # (B,c)
            picked = logits[torch.arange(len(whole), device=device)[:, None], (places - 1).clamp(min=0), added]
            scores.append(picked.mean(1) if self.normalize else picked.sum(1))
        return torch.stack(scores, 1)


class _TextMetric(CausalMetric):
    """A metric of a generated answer.

    Args:
        max_new_tokens: longest answer.
        sample: draw the answer, with a seed that depends on the step only; otherwise every token is the likeliest one.
        top_p: share of probability that tokens are drawn from.
        temperature: of the distribution that tokens are drawn from.
        tokenizer: hub id or folder; the module's by default.
    """

    def __init__(
        self,
        max_new_tokens: int = 64,
        sample: bool = False,
        top_p: float = 0.95,
        temperature: float = 0.2,
        tokenizer: str | None = None,
    ) -> None:
        self.max_new_tokens, self.sample, self.top_p, self.temperature = max_new_tokens, sample, top_p, temperature
        self.tokenizer = tokenizer

    def __call__(self, outputs: CausalOutputs) -> Tensor:
        """Value of each test, (B,) float32."""
        tokenizer = outputs.tokenizer(self.tokenizer)
        generated = outputs.texts(tokenizer, self.max_new_tokens, self.sample, self.top_p, self.temperature)
        wanted = outputs.batch.get("target")
        if wanted is None:
            wanted = tokenizer.batch_decode(outputs.answers(), skip_special_tokens=True)
        pairs = zip(generated, wanted, strict=True)
        return torch.tensor([self.score(text.strip(), target.strip()) for text, target in pairs])

    @abstractmethod
    def score(self, text: str, target: str) -> float:
        """Value of one answer."""


class BLEU(_TextMetric):
    """BLEU of single answers, 0 to 100, as SacreBLEU counts it with its tokens `13a`, smoothed for sentences.

    The target is the batch's `target` (texts), or the answer in `labels`. Options: `max_new_tokens`, `sample`, `top_p`,
    `temperature`, `tokenizer`.
    """

    def score(self, text: str, target: str) -> float:
        """BLEU of one answer."""
        from torchmetrics.functional.text import sacre_bleu_score

        return 100 * float(sacre_bleu_score([text], [[target]], smooth=True)) if text and target else 0.0


class RougeL(_TextMetric):
    """ROUGE-L of single answers, 0 to 1: F measure of the longest common subsequence of words.

    Target and options as those of `BLEU`.
    """

    def score(self, text: str, target: str) -> float:
        """ROUGE-L of one answer."""
        from torchmetrics.functional.text import rouge_score

        return float(rouge_score(text, target, rouge_keys="rougeL")["rougeL_fmeasure"])


METRICS: dict[str, type[CausalMetric]] = {"loss": AnswerLoss, "accuracy": Accuracy, "bleu": BLEU, "rougeL": RougeL}
"""What can be measured of causal language models, by name."""
