"""Docstrings of the Python standard library with the topic of their module: real text that is there wherever Python is.

Their source files are read, not run. Which lines there are depends on the version of Python.
"""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOPICS = {
    "networking": "http urllib email xmlrpc asyncio socket socketserver ssl ftplib imaplib poplib smtplib telnetlib "
    "ipaddress wsgiref webbrowser mailbox mimetypes cgi html selectors",
    "files": "os shutil pathlib tempfile zipfile tarfile gzip bz2 lzma io _pyio glob fnmatch fileinput filecmp stat "
    "posixpath ntpath genericpath csv configparser plistlib zipapp zipimport dbm shelve sqlite3 wave linecache json "
    "tomllib distutils",
    "mathematics": "_pydecimal fractions statistics random datetime _pydatetime calendar turtle turtledemo numbers "
    "heapq bisect zoneinfo colorsys secrets hashlib hmac uuid _strptime graphlib collections _collections_abc",
    "language": "ast inspect typing unittest importlib pickle pickletools types abc functools contextlib dataclasses "
    "enum copy dis tokenize traceback warnings weakref pdb bdb doctest code codeop symtable pyclbr pkgutil runpy trace",
}
"""Modules and packages of each topic."""
SHORTEST, LONGEST = 24, 80
"""Characters of a line."""
ASK = " Topic:"
"""Ends a prompt; then comes the answer."""


class Docstring(NamedTuple):
    """The first paragraph of a docstring as one line, and the topic of its module."""

    text: str
    topic: str


@cache
def load_docstrings() -> tuple[Docstring, ...]:
    """Read the docstrings of modules, classes and functions.

    Returns:
        Lines of 24 to 80 ASCII characters, cut at the end of a word, none twice, in the order of topics and files.

    Raises:
        ValueError: if this Python comes without the source files of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: dict[str, str] = {}
    for topic, names in TOPICS.items():
        for name in names.split():
            for path in _sources(library, name):
                for text in _lines(path):
                    seen.setdefault(text, topic)
    if not seen:
        raise ValueError(f"docstrings: there are no source files in {library}; use a Python that comes with them")
    return tuple(Docstring(text, topic) for text, topic in seen.items())


def _sources(library: Path, name: str) -> list[Path]:
    file, folder = library / f"{name}.py", library / name
    inside = folder.rglob("*.py") if folder.is_dir() else []
    return [file] * file.is_file() + sorted(path for path in inside if "test" not in path.parent.name)


def _lines(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = " ".join(paragraph.split())
            if len(text) > LONGEST:
                text = text[: LONGEST + 1].rpartition(" ")[0]
            if len(text) >= SHORTEST and text.isascii():
                yield text


def draw_docstrings(
    pool: int = 400, tests: int = 48, unseen_pool: int = 400, unseen_tests: int = 48, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Docstring]]:
    """Divide the lines into a pool, tests, and the rest.

    Args:
        pool: examples that runs are trained on, as many of each topic; their ids begin with 0.
        tests: tests, likewise.
        unseen_pool: further examples, whose ids follow.
        unseen_tests: further tests, whose ids follow.
        seed: seed of the draw.

    Returns:
        Rows of the pool and of the tests, as `lit_models.recording.write_examples` takes them: `id`, `text`, and its
        parts `context` (the line and " Topic:") and `target` (such as " Files"), and `topic`; and the lines that
        are in neither.

    Raises:
        ValueError: if a number is not a multiple of the number of topics, or there are too few lines of a topic.
    """
    topics = list(TOPICS)
    sizes = {"pool": pool, "unseen_pool": unseen_pool, "tests": tests, "unseen_tests": unseen_tests}
    for name, size in sizes.items():
        if size < 0 or size % len(topics):
            raise ValueError(f"docstrings.{name} must be a multiple of {len(topics)}, the number of topics, got {size}")
    generator = np.random.default_rng(seed)
    left = {}
    for topic in topics:
        lines = [line for line in load_docstrings() if line.topic == topic]
        left[topic] = [lines[place] for place in generator.permutation(len(lines))]
        if len(lines) < sum(sizes.values()) // len(topics):
            raise ValueError(f"docstrings: there are only {len(lines)} lines on {topic}; ask for fewer")
    drawn: dict[str, list[Docstring]] = {}
    for name, size in sizes.items():
        chosen = []
        for topic in topics:
            count = size // len(topics)
            chosen += left[topic][:count]
            left[topic] = left[topic][count:]
        drawn[name] = [chosen[place] for place in generator.permutation(len(chosen))]
    rows = [
        [_row(number, line) for number, line in enumerate(drawn[first] + drawn[second])]
        for first, second in (("pool", "unseen_pool"), ("tests", "unseen_tests"))
    ]
    return rows[0], rows[1], [line for topic in topics for line in left[topic]]


def _row(number: int, line: Docstring) -> dict[str, Any]:
    context, target = line.text + ASK, answer(line.topic)
    return {"id": number, "text": context + target, "context": context, "target": target, "topic": line.topic}


def train_docstring_tokenizer(lines: Sequence[Docstring], vocab_size: int = 1024) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer with one token for " Topic:" and one for every topic.

    Args:
        lines: texts to train on.
        vocab_size: entries, including 0 `<pad>`, 1 `<bos>`, which begins every text, and 2 `<eos>`.

    Returns:
        The tokenizer.
    """
    from datamodules.snippets import train_tokenizer

    answers = [ASK, *map(answer, TOPICS)]
    tokenizer = train_tokenizer([line.text for line in lines], vocab_size - len(answers))
    tokenizer.add_tokens(answers)
    return tokenizer


def answer(topic: str) -> str:
    """Answer that names a topic, capitalised, as lines hardly ever write it."""
    return f" {topic.capitalize()}"
