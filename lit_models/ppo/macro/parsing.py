"""Constituents as macro actions: trees, parsers, and the walk that cuts a sentence into small constituents."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

SENTENCE = re.compile(r"(?<=[.!?])(?= +)|\n+")
BRACKETS = re.compile(r"\(|\)|[^\s()]+")


class TokenMismatchError(ValueError):
    """The leaves of a tree and the policy's tokens do not cover the same text."""


@dataclass
class Tree:
    """A constituent: its label and either its children or its word.

    Args:
        label: category, such as `NP`.
        children: smaller constituents from left to right.
        word: text of a leaf.
    """

    label: str = ""
    children: "list[Tree]" = field(default_factory=list)
    word: str | None = None

    @property
    def leaves(self) -> list[str]:
        """Words from left to right."""
        if self.word is not None:
            return [self.word]
        return [word for child in self.children for word in child.leaves]

    @classmethod
    def from_brackets(cls, text: str) -> "Tree":
        """Read `(S (NP (DT The) (NN cat)) (VP (VBD sat)))`.

        Args:
            text: one tree in the format of the Penn Treebank.

        Returns:
            The tree.

        Raises:
            ValueError: if the brackets do not match.
        """
        stack: list[Tree] = [cls()]
        fresh = False
        for token in BRACKETS.findall(text):
            if token == "(":
                stack.append(cls())
                fresh = True
                continue
            if token == ")":
                if len(stack) < 2:
                    raise ValueError(f"unbalanced brackets in {text!r}")
                done = stack.pop()
                stack[-1].children.append(done)
            elif fresh:
                stack[-1].label = token
            else:
                stack[-1].children.append(cls(word=_unescape(token)))
            fresh = False
        if len(stack) != 1 or len(stack[0].children) != 1:
            raise ValueError(f"unbalanced brackets in {text!r}")
        return stack[0].children[0]


def _unescape(word: str) -> str:
    """Brackets as the treebank writes them."""
    return {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}.get(word, word)


def sentences(text: str) -> list[tuple[int, int]]:
    """Cut a text after `.`, `!` and `?` before spaces, and at line breaks.

    Args:
        text: any.

    Returns:
        First and last-plus-one character of each sentence; spaces open the sentence after them, and line breaks
        belong to none.
    """
    spans, start = [], 0
    for match in SENTENCE.finditer(text):
        spans.append((start, match.start()))
        start = match.end()
    spans.append((start, len(text)))
    return [(first, end) for first, end in spans if text[first:end].strip()]


def leaf_spans(sentence: str, leaves: list[str]) -> list[tuple[int, int]]:
    """Characters of each word of a tree, with the spaces before it.

    Args:
        sentence: the text that was parsed.
        leaves: words of the tree.

    Returns:
        First and last-plus-one character per leaf; the last one reaches the end of the sentence.

    Raises:
        TokenMismatchError: if the words are not those of the sentence.
    """
    spans, position = [], 0
    for number, word in enumerate(leaves):
        found = sentence.find(word, position)
        if found < 0 or sentence[position:found].strip():
            raise TokenMismatchError(f"the parser's word {word!r} is not next in {sentence[position:]!r}")
        end = len(sentence) if number == len(leaves) - 1 else found + len(word)
        spans.append((position, end))
        position = end
    if leaves and sentence[spans[-1][0] :].strip() != leaves[-1]:
        raise TokenMismatchError(f"the parser's words end before {sentence!r} does")
    return spans


def constituent_starts(tree: Tree, leaf_tokens: list[int], cutoff: int) -> list[int]:
    """Cut a sentence at its largest constituents of fewer than `cutoff` tokens.

    A single word joins the macro action before it (MA-RLHF, the released parsing rule).

    Args:
        tree: of the sentence.
        leaf_tokens: tokens of each leaf.
        cutoff: constituents with fewer tokens are not cut further.

    Returns:
        Starts of the macro actions in tokens from 0; the last one is the number of all tokens, where what follows the
        sentence begins.

    Raises:
        TokenMismatchError: if there is not one token count per leaf.
    """
    if len(tree.leaves) != len(leaf_tokens):
        raise TokenMismatchError(f"{len(leaf_tokens)} token counts for {len(tree.leaves)} words")
    counts = iter(leaf_tokens)
    sizes: dict[int, list[int]] = {}

    def measure(node: Tree) -> list[int]:
        own = [next(counts)] if node.word is not None else [size for child in node.children for size in measure(child)]
        sizes[id(node)] = own
        return own

    measure(tree)
    starts, total = [0], 0

    def walk(node: Tree) -> None:
        nonlocal total
        own = sizes[id(node)]
        if len(own) == 1:
            total += own[0]
            starts[-1] = total
        elif sum(own) < cutoff:
            total += sum(own)
            starts.append(total)
        else:
            for child in node.children:
                walk(child)

    walk(tree)
    return sorted({0, *starts})


class ConstituencyParser(ABC):
    """Parses sentences into constituency trees."""

    @abstractmethod
    def parse(self, sentences: list[str]) -> list[Tree | None]:
        """Parse.

        Args:
            sentences: one sentence each, perhaps with spaces before it.

        Returns:
            Tree per sentence; None where there is none, and the row falls back.
        """


@dataclass
class ClauseParser(ConstituencyParser):
    """Flat trees of clauses, without any model: the default, which works everywhere.

    A sentence is cut at `, ; : . ! ? ( )` and before coordinating conjunctions; pieces of fewer than `min_words` words
    join the piece before.

    Args:
        min_words: words of a clause at least.
    """

    min_words: int = 2

    def parse(self, sentences: list[str]) -> list[Tree | None]:
        """Parse; see `ConstituencyParser.parse`."""
        trees: list[Tree | None] = []
        for sentence in sentences:
            clauses = [
                Tree("X", [Tree("W", word=word) for word in sentence[first:end].split()])
                for first, end in clauses_of(sentence, self.min_words)
            ]
            trees.append(Tree("S", [clause for clause in clauses if clause.children]))
        return trees


CLAUSE = re.compile(r"(?<=[,;:.!?)\n])|(?=\()|(?= (?:and|or|but|nor|so|yet|for) )")


def clauses_of(text: str, min_words: int = 2) -> list[tuple[int, int]]:
    """Cut a text at punctuation, brackets, line breaks and before coordinating conjunctions.

    Args:
        text: any.
        min_words: shorter pieces join the piece before.

    Returns:
        First and last-plus-one character of each piece.
    """
    cuts = sorted({0, len(text), *(match.start() for match in CLAUSE.finditer(text))})
    pieces: list[tuple[int, int]] = []
    for first, end in pairwise(cuts):
        if pieces and len(text[first:end].split()) < min_words:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((first, end))
    return pieces


@dataclass
class BeneparParser(ConstituencyParser):
    """The Berkeley neural parser (needs `pip install benepar` and its model).

    Args:
        model: name of the model, such as `benepar_en3`, or its folder.
    """

    model: str = "benepar_en3"

    def parse(self, sentences: list[str]) -> list[Tree | None]:
        """Parse; see `ConstituencyParser.parse`."""
        if not hasattr(self, "_parser"):
            try:
                import benepar
            except ImportError as error:
                raise ImportError(
                    "advantage.rule.parser: BeneparParser needs benepar; pip install benepar, or leave the parser out"
                ) from error
            self._parser = benepar.Parser(self.model)
        return [from_nltk(tree) for tree in self._parser.parse_sents(sentences)]


@dataclass
class SpacyParser(ConstituencyParser):
    """Constituents of a spaCy pipeline with the `benepar` component (needs `pip install spacy benepar`).

    Args:
        pipeline: name or folder of the pipeline, such as `en_core_web_md`.
        model: benepar model that is added where the pipeline has no such component.
    """

    pipeline: str = "en_core_web_md"
    model: str = "benepar_en3"

    def parse(self, sentences: list[str]) -> list[Tree | None]:
        """Parse; see `ConstituencyParser.parse`."""
        if not hasattr(self, "_pipeline"):
            try:
                import benepar  # noqa: F401  (registers the component)
                import spacy
            except ImportError as error:
                raise ImportError(
                    "advantage.rule.parser: SpacyParser needs spaCy and benepar; pip install spacy benepar, or leave "
                    "the parser out"
                ) from error
            self._pipeline: Any = spacy.load(self.pipeline)
            if "benepar" not in self._pipeline.pipe_names:
                self._pipeline.add_pipe("benepar", config={"model": self.model})
        trees: list[Tree | None] = []
        for document in self._pipeline.pipe(sentences):
            parts = [Tree.from_brackets(part._.parse_string) for part in document.sents]
            trees.append(parts[0] if len(parts) == 1 else Tree("S", parts))
        return trees


def from_nltk(tree: Any) -> Tree:  # noqa: ANN401
    """Take over an `nltk.Tree`.

    Args:
        tree: `nltk.Tree` whose leaves are words.

    Returns:
        The same tree.
    """
    if isinstance(tree, str):
        return Tree(word=tree)
    return Tree(tree.label(), [from_nltk(child) for child in tree])
