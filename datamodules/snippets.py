"""Shipped data: film-review sentences rated by people, small enough to train all stages on a laptop.

See `datamodules/assets/movie_snippets/README.md` for source and licence.
"""

import gzip
import random
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from datamodules.assets import asset_path
from datamodules.instruction import InstructionData
from datamodules.preference import PreferenceData
from datamodules.prompts import PromptData
from datamodules.sources import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEST_SNIPPETS = 1000
SPLIT_SEED = 1234
_FILE = "movie_snippets/snippets.tsv.gz"
_TOKENIZER = "movie_snippets/tokenizer"


class Snippet(NamedTuple):
    """A sentence and the mean of its human ratings, from -4 (bad) to 4 (good)."""

    rating: float
    text: str


class Pair(NamedTuple):
    """Two sentences; people rated the chosen one higher."""

    chosen: Snippet
    rejected: Snippet


@cache
def load_snippets(split: str = "all") -> tuple[Snippet, ...]:
    """Read the sentences.

    Args:
        split: `all` in the order of the file, or `train` or `test`: the lines shuffled with
            `random.Random(1234).shuffle`, of which the last 1,000 are for testing.

    Returns:
        The sentences with their ratings.

    Raises:
        ValueError: if there is no such split.
    """
    with gzip.open(asset_path(_FILE), "rt", encoding="utf-8") as file:
        lines = file.read().rstrip("\n").split("\n")
    if split != "all":
        random.Random(SPLIT_SEED).shuffle(lines)
    parts = {"all": slice(None), "train": slice(-TEST_SNIPPETS), "test": slice(-TEST_SNIPPETS, None)}
    if split not in parts:
        raise ValueError(f"split: {split!r} is not one of {', '.join(parts)}")
    fields = [line.split("\t") for line in lines[parts[split]]]
    return tuple(Snippet(float(rating), text) for _, rating, text in fields)


def draw_pairs(snippets: Sequence[Snippet], count: int, min_gap: float = 1.0, seed: int = SPLIT_SEED) -> list[Pair]:
    """Draw pairs of sentences with clearly different ratings.

    Args:
        snippets: sentences to draw from.
        count: number of pairs; a sentence may be in several.
        min_gap: least difference of the two ratings.
        seed: seed of the draw.

    Returns:
        The pairs.

    Raises:
        ValueError: if no two sentences differ by as much.
    """
    ratings = [snippet.rating for snippet in snippets]
    if max(ratings) - min(ratings) < min_gap:
        raise ValueError(
            f"data.min_gap: no two ratings differ by {min_gap}; the widest gap is {max(ratings) - min(ratings):g}"
        )
    generator = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        rejected, chosen = sorted(
            (snippets[generator.randrange(len(snippets))] for _ in range(2)), key=lambda s: s.rating
        )
        if chosen.rating - rejected.rating >= min_gap:
            pairs.append(Pair(chosen, rejected))
    return pairs


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1000) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer that puts a beginning token before every text.

    Args:
        texts: texts to train on.
        vocab_size: entries, including 0 `<pad>`, 1 `<bos>` and 2 `<eos>`.

    Returns:
        The tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def _table(columns: dict[str, list[Any]]) -> Rows:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def _texts(split: str) -> Rows:
    snippets = load_snippets(split)
    return _table({"text": [snippet.text for snippet in snippets], "rating": [snippet.rating for snippet in snippets]})


class SnippetInstructions(InstructionData):
    """Film-review sentences as training text: beginning token, text, end token; everything is learnt.

    Validation and test both use the 1,000 test sentences. Batch: see `InstructionData`.

    Args:
        max_length: tokens at which a text is cut.
        tokenizer: hub id or folder of the tokenizer; None takes the shipped one.
        limit_train: use only the first training sentences.
        limit_val: use only the first validation sentences.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows.
    """

    def __init__(
        self,
        max_length: int = 64,
        tokenizer: str | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(
            asset_path(_FILE),
            tokenizer or asset_path(_TOKENIZER),
            prompt_column=None,
            completion_column="text",
            max_length=max_length,
            loss_on="all",
            val_split="test",
            test_split="test",
            limit_train=limit_train,
            limit_val=limit_val,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)

    def rows(self, split: str) -> Rows:
        """The shipped sentences."""
        return _texts(split)


class SnippetPreferences(PreferenceData):
    """Pairs of film-review sentences; the chosen one was rated higher by people.

    Validation and test both use pairs of the 1,000 test sentences, drawn with a fixed seed; `load_snippets("test")`
    gives those sentences with their ratings. Batch: see `PreferenceData`.

    Args:
        n_train_pairs: pairs drawn from the training sentences.
        n_test_pairs: pairs drawn from the test sentences.
        min_gap: least difference of the two ratings.
        max_length: tokens at which a text is cut.
        tokenizer: hub id or folder of the tokenizer; None takes the shipped one.
        batch_size: training pairs per batch and rank.
        val_batch_size: pairs per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows and of the training pairs.
    """

    def __init__(
        self,
        n_train_pairs: int = 16000,
        n_test_pairs: int = 600,
        min_gap: float = 1.0,
        max_length: int = 64,
        tokenizer: str | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        self.n_train_pairs, self.n_test_pairs, self.min_gap = n_train_pairs, n_test_pairs, min_gap
        super().__init__(
            asset_path(_FILE),
            tokenizer or asset_path(_TOKENIZER),
            prompt_column=None,
            max_length=max_length,
            val_split="test",
            test_split="test",
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)

    def rows(self, split: str) -> Rows:
        """Pairs of the shipped sentences."""
        count, seed = (self.n_train_pairs, self.seed) if split == "train" else (self.n_test_pairs, SPLIT_SEED)
        pairs = draw_pairs(load_snippets(split), count, self.min_gap, seed)
        return _table(
            {"chosen": [pair.chosen.text for pair in pairs], "rejected": [pair.rejected.text for pair in pairs]}
        )


class SnippetPrompts(PromptData):
    """Beginnings of film-review sentences as prompts: the beginning token and the first tokens of the text.

    Validation and test both use the 1,000 test sentences. Batch: see `PromptData`.

    Args:
        prompt_tokens: tokens of the text in a prompt, besides the beginning token.
        keep_columns: columns passed on with each row: `text` (the whole sentence), `rating`.
        tokenizer: hub id or folder of the tokenizer; None takes the shipped one.
        limit_train: use only the first training sentences.
        limit_val: use only the first validation sentences.
        batch_size: training rows per batch and rank.
        val_batch_size: rows per batch and rank outside training; None takes `batch_size`.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows.
    """

    def __init__(
        self,
        prompt_tokens: int = 4,
        keep_columns: list[str] | None = None,
        tokenizer: str | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        batch_size: int = 48,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(
            asset_path(_FILE),
            tokenizer or asset_path(_TOKENIZER),
            prompt_column="text",
            max_prompt_length=prompt_tokens + 1,
            prompt_tokens=prompt_tokens,
            keep_columns=keep_columns,
            val_split="test",
            test_split="test",
            limit_train=limit_train,
            limit_val=limit_val,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)

    def rows(self, split: str) -> Rows:
        """The shipped sentences."""
        return _texts(split)
