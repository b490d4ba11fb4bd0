"""Where macro actions end: the termination rules of MA-RLHF, text chunkers, and functions of your own."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_models.ppo.macro.functional import ordinals, segments_from_starts
from lit_models.ppo.macro.offsets import decode, rows_of, starts_at, token_ends
from lit_models.ppo.macro.parsing import (
    ClauseParser,
    ConstituencyParser,
    TokenMismatchError,
    Tree,
    clauses_of,
    constituent_starts,
    leaf_spans,
    sentences,
)
from lit_models.ppo.rewards import import_function
from lit_models.ppo.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RuleName = Literal["token", "fixed", "randomized", "parsing", "ppl", "sequence", "sentence", "line", "punct"]


class Segmenter(ABC):
    """Cuts responses into macro actions.

    One of your own subclasses this, or is a plain function named by `FunctionSegmenter`.
    """

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: B027 (nothing to do by default)
        """Take what is needed from the tokenizer, once, before training."""

    @abstractmethod
    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut.

        Args:
            rollout: with responses, texts and log-probabilities of the reference.

        Returns:
            (B,R) int64: number of the macro action of each token, 0, 1, 2, ... in every row and -1 outside the response
            mask; and named (B,) values per row to log.
        """


@dataclass
class Token(Segmenter):
    """Every token is a macro action of its own: token-level PPO."""

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        return ordinals(rollout.response_mask), {}


@dataclass
class Sequence(Segmenter):
    """The whole response is one macro action: a contextual bandit."""

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        return segments_from_starts(torch.zeros_like(rollout.response_mask), rollout.response_mask), {}


@dataclass
class Fixed(Segmenter):
    """n-grams.

    Args:
        n: tokens of a macro action.
        n_end: tokens after `schedule` rollouts, reached in a straight line; the same by default.
        schedule: rollouts over which `n` becomes `n_end`.
    """

    n: int = 5
    n_end: int | None = None
    schedule: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        for name, value in (("n", self.n), ("n_end", self.n_end)):
            if value is not None and value < 1:
                raise ValueError(f"advantage.rule.{name} must be at least 1, got {value}")
        if self.schedule < 0 or (self.n_end is not None and self.schedule < 1):
            raise ValueError(
                "advantage.rule.schedule must be the number of rollouts after which n is n_end, at least 1; "
                f"got {self.schedule}"
            )

    def present(self, rollout: int) -> int:
        """Tokens of a macro action in a rollout, counted from 0."""
        if self.n_end is None:
            return self.n
        return round(self.n + (self.n_end - self.n) * min(1.0, rollout / self.schedule))

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        n = self.present(0 if rollout.noise is None else rollout.noise.rollout)
        order = ordinals(rollout.response_mask)
        return order.div(n, rounding_mode="floor").masked_fill(order < 0, -1), {}


@dataclass
class Randomized(Segmenter):
    """n-grams of shuffled lengths; tokens after the last of them are one more macro action.

    Args:
        lengths: pool of lengths; the released code also has 1 in it.
        repeat: how often each length is in the list that is shuffled for every row.
    """

    lengths: list[int] = field(default_factory=lambda: [2, 3, 5, 10])
    repeat: int = 3

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        if not self.lengths or min(self.lengths) < 1 or self.repeat < 1:
            raise ValueError(
                "advantage.rule.lengths must be numbers of tokens >= 1 and advantage.rule.repeat at least 1, got "
                f"{self.lengths} and {self.repeat}"
            )

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`. The order depends on seed, rollout and row alone."""
        pool = torch.tensor(self.lengths * self.repeat, device=rollout.response_ids.device)
        if rollout.noise is None:
            numbers = torch.rand(len(rollout), len(pool))
        else:
            numbers = rollout.noise.uniforms(len(pool), stream=1)
        shuffled = pool[numbers.to(pool.device).argsort(1)]
        return segments_of_lengths(shuffled, rollout.response_mask), {}


def segments_of_lengths(lengths: Tensor, mask: Tensor) -> Tensor:
    """Macro actions of given lengths, one after the other.

    Args:
        lengths: (B,K) int64, tokens of each macro action; what is left after the last forms one more.
        mask: (B,R).

    Returns:
        (B,R) int64.
    """
    order = ordinals(mask)
    ends = lengths.cumsum(1)
    ids = torch.searchsorted(ends, order.clamp(min=0), right=True)
    return ids.masked_fill(order < 0, -1)


@dataclass
class Perplexity(Segmenter):
    """A macro action ends before a token that the reference finds more surprising than the token before.

    Args:
        kind: `token` compares the perplexities of tokens, `prefix` those of the response up to each token.
    """

    kind: Literal["token", "prefix"] = "token"

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        assert rollout.ref_logprobs is not None
        nll = -rollout.ref_logprobs
        valid = rollout.response_mask.bool()
        if self.kind == "prefix":
            sums = nll.masked_fill(~valid, 0.0).cumsum(1)
            nll = sums / valid.cumsum(1).clamp(min=1)
        return segments_of_rises(nll, rollout.response_mask), {}


def segments_of_rises(values: Tensor, mask: Tensor) -> Tensor:
    """Begin a macro action wherever a value is strictly greater than that of the valid token before.

    Args:
        values: (B,R).
        mask: (B,R).

    Returns:
        (B,R) int64.
    """
    valid = mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    latest = columns.where(valid, -1).cummax(1).values
    before = torch.cat([latest.new_full((len(latest), 1), -1), latest[:, :-1]], 1)
    previous = values.gather(1, before.clamp(min=0))
    return segments_from_starts((values > previous) & (before >= 0), mask)


class TextSegmenter(Segmenter):
    """Cuts at characters of the decoded response."""

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Keep the tokenizer, which tells the characters of the generated tokens."""
        self._tokenizer = tokenizer

    @abstractmethod
    def boundaries(self, text: str) -> list[int]:
        """Characters at which pieces of a text begin, ascending."""

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        ids = rows_of(rollout.response_ids, rollout.response_mask)
        texts, ends = decode(self._tokenizer, ids), token_ends(self._tokenizer, ids)
        cuts = [starts_at(end, self.boundaries(text)) for text, end in zip(texts, ends, strict=True)]
        return segments_of_cuts(cuts, rollout.response_mask), {}


def segments_of_cuts(cuts: list[list[int]], mask: Tensor) -> Tensor:
    """Begin macro actions at given tokens.

    Args:
        cuts: numbers of the tokens, per row.
        mask: (B,R).

    Returns:
        (B,R) int64.
    """
    order = ordinals(mask)
    chosen = torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.bool)
    rows = [row for row, tokens in enumerate(cuts) for _ in tokens]
    chosen[rows, [token for tokens in cuts for token in tokens]] = True
    starts = chosen.to(mask.device).gather(1, order.clamp(min=0))
    return segments_from_starts(starts & (order >= 0), mask)


@dataclass
class Sentences(TextSegmenter):
    """Sentences, which end at `.`, `!` or `?` before a space, or at a line break."""

    def boundaries(self, text: str) -> list[int]:
        """Characters at which sentences begin."""
        return [first for first, _ in sentences(text)]


@dataclass
class Lines(TextSegmenter):
    """Lines, such as those of code; a line break belongs to the line it ends."""

    def boundaries(self, text: str) -> list[int]:
        """Characters after line breaks."""
        return [0, *(match.end() for match in re.finditer("\n", text))]


@dataclass
class Punctuation(TextSegmenter):
    """Clauses: pieces between punctuation, brackets, line breaks and coordinating conjunctions.

    Args:
        min_words: shorter pieces join the piece before.
    """

    min_words: int = 2

    def boundaries(self, text: str) -> list[int]:
        """Characters at which clauses begin."""
        return [first for first, _ in clauses_of(text, self.min_words)]


@dataclass
class Pattern(TextSegmenter):
    """Pieces that begin at every match of a regular expression, such as a tag of turns or of reasoning steps.

    Args:
        pattern: regular expression, such as `<step>`.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Check the expression.

        Raises:
            ValueError: if it is none.
        """
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"advantage.rule.pattern: {self.pattern!r} is no regular expression: {error}") from error

    def boundaries(self, text: str) -> list[int]:
        """Characters at which matches begin."""
        return [0, *(match.start() for match in re.finditer(self.pattern, text))]


@dataclass
class Parsing(Segmenter):
    """Constituents of fewer than `cutoff` tokens (MA-RLHF, parsing-based termination).

    A response that cannot be parsed is cut into n-grams instead and counted in `macro/parse_fallback_frac`.

    Args:
        cutoff: constituents with fewer tokens are one macro action.
        parser: constituency parser; clauses, found without any model, by default.
        fallback_n: tokens of a macro action where there is no tree.
    """

    cutoff: int = 5
    parser: ConstituencyParser = field(default_factory=ClauseParser)
    fallback_n: int = 5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the option.
        """
        if self.cutoff < 1 or self.fallback_n < 1:
            raise ValueError(
                "advantage.rule.cutoff and advantage.rule.fallback_n must be at least 1, got "
                f"{self.cutoff} and {self.fallback_n}"
            )

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Keep the tokenizer, which tells the characters of the generated tokens."""
        self._tokenizer = tokenizer

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`. Every distinct sentence is parsed once."""
        ids = rows_of(rollout.response_ids, rollout.response_mask)
        texts, ends = decode(self._tokenizer, ids), token_ends(self._tokenizer, ids)
        spans = [sentences(text) for text in texts]
        distinct = list(dict.fromkeys(text[a:b] for text, row in zip(texts, spans, strict=True) for a, b in row))
        trees = dict(zip(distinct, self.parser.parse(distinct), strict=True))
        cuts, failed = [], []
        for text, row_spans, row_ends in zip(texts, spans, ends, strict=True):
            found = self._row(text, row_spans, row_ends, trees)
            failed.append(found is None)
            cuts.append(list(range(0, len(row_ends), self.fallback_n)) if found is None else found)
        fallback = torch.tensor(failed, dtype=torch.float32, device=rollout.response_mask.device)
        return segments_of_cuts(cuts, rollout.response_mask), {"macro/parse_fallback_frac": fallback}

    def _row(
        self, text: str, spans: list[tuple[int, int]], ends: list[int], trees: dict[str, Tree | None]
    ) -> list[int] | None:
        """First tokens of the macro actions of a row, or None where a sentence has no fitting tree."""
        if ends and ends[-1] != len(text):  # the tokenizer changes a text in ways that its pieces do not show
            return None
        cuts = {0}
        for first, end in spans:
            tree = trees[text[first:end]]
            if tree is None:
                return None
            try:
                leaves = leaf_spans(text[first:end], tree.leaves)
            except TokenMismatchError:
                return None
            borders = torch.tensor([first, *(first + stop for _, stop in leaves)])
            # A token belongs to the word in which it begins.
            begins = torch.tensor([0, *ends[:-1]])
            places = torch.searchsorted(begins, borders)
            counts = places.diff().tolist()
            offset, last = int(places[0]), (first, end) == spans[-1]
            starts = constituent_starts(tree, counts, self.cutoff)
            # Line breaks behind a sentence belong to its last macro action; behind the last one the end token begins.
            cuts |= {offset + start for start in (starts if last else starts[:-1])}
        return sorted(token for token in cuts if token < len(ends))


@dataclass
class FunctionSegmenter(Segmenter):
    """Macro actions by a function of your own.

    Args:
        function: import path, such as `my_package.cut`, or the function; it takes the rollout and `arguments` and
            returns the ids described in `Segmenter.segment`.
        arguments: keyword arguments of the function.
    """

    function: str | Callable[..., Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Import the function.

        Raises:
            ValueError: if there is none of that name.
        """
        self._function = import_function(self.function, "advantage.rule.function")

    def segment(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut; see `Segmenter.segment`."""
        return self._function(rollout, **self.arguments), {}


RULES: dict[str, type[Segmenter]] = {
    "token": Token,
    "fixed": Fixed,
    "randomized": Randomized,
    "parsing": Parsing,
    "ppl": Perplexity,
    "sequence": Sequence,
    "sentence": Sentences,
    "line": Lines,
    "punct": Punctuation,
}
