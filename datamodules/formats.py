"""Conversion of raw rows to prompt, chosen and rejected text; pure functions."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row: TypeAlias = Mapping[str, Any]
Texts: TypeAlias = dict[str, str]
Format: TypeAlias = Callable[[Row], Texts]
FormatName: TypeAlias = Literal["plain", "tldr", "hh", "webgpt", "ultrafeedback", "apps", "chat"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "tldr": ("info", "summaries", "choice"),
    "hh": ("prompt", "chosen", "rejected"),
    "webgpt": ("question", "answer_0", "answer_1", "score_0", "score_1"),
    "ultrafeedback": ("prompt", "chosen", "rejected"),
    "apps": ("question", "solutions", "starter_code", "input_output"),
}
"""Columns that each format of a known data set reads."""

_SQUARE_CITATION = re.compile(r"\s*\[\d[\d,\s]*\]")
_ROUND_CITATION = re.compile(r"\s*\(\d[\d,\s]*\)")


def tldr(row: Row) -> Texts:
    """Format a row of `openai/summarize_from_feedback`, configuration `comparisons`.

    Args:
        row: columns `info` (`post`, `subreddit`, `article`), `summaries` (two records with `text`), `choice` (0 or 1).

    Returns:
        `prompt`, `chosen` and `rejected`.
    """
    info = row["info"]
    if info.get("post"):
        subreddit = f"Subreddit: r/{info['subreddit']}\n" if info.get("subreddit") else ""
        body = f"POST\n{subreddit}{info['post']}"
    else:
        body = f"ARTICLE\n{info['article']}"
    chosen = int(row["choice"])
    texts = [summary["text"] for summary in row["summaries"]]
    return {"prompt": f"{body}\nTL;DR: ", "chosen": texts[chosen], "rejected": texts[1 - chosen]}


def hh(row: Row) -> Texts:
    r"""Format a row of `Dahoas/full-hh-rlhf`.

    Args:
        row: columns `prompt` (ends with `\n\nAssistant:`), `chosen` and `rejected` (begin with a space).

    Returns:
        The three columns as they are.
    """
    return {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}


def without_citations(text: str) -> str:
    """Remove references such as `[1, 2]` and `(3)` together with the space before them.

    Args:
        text: an answer.

    Returns:
        The text without them.
    """
    return _ROUND_CITATION.sub("", _SQUARE_CITATION.sub("", text))


def webgpt(row: Row) -> Texts:
    """Format a row of `openai/webgpt_comparisons`.

    Args:
        row: columns `question` (record with `full_text`), `answer_0`, `answer_1`, `score_0`, `score_1` (numbers or
            text); the first answer is chosen when its score is at least the second's.

    Returns:
        `prompt`, `chosen` and `rejected`; the answers without citations and with one space before them.
    """
    answers = [f" {without_citations(row[column])}" for column in ("answer_0", "answer_1")]
    if float(row["score_0"]) < float(row["score_1"]):
        answers.reverse()
    prompt = f" Human: {row['question']['full_text']} Assistant:"
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def ultrafeedback(row: Row) -> Texts:
    """Format a row of `HuggingFaceH4/ultrafeedback_binarized`.

    Args:
        row: columns `prompt`, `chosen` and `rejected` (message lists; the last message is the answer).

    Returns:
        `prompt`, `chosen` and `rejected`. The prompt ends after the user's turn; the assistant's header belongs to
        the answers.
    """
    answers = {
        name: f"<|im_start|>assistant\n{row[name][-1]['content']}\n<|im_end|>\n" for name in ("chosen", "rejected")
    }
    return {"prompt": f"<|im_start|>user\n{row['prompt']}\n<|im_end|>\n", **answers}


def apps(row: Row) -> Texts:
    """Format a row of `codeparrot/apps` with the prompt of the APPS paper (Hendrycks et al., 2021).

    Args:
        row: columns `question`, `solutions` (JSON list of programs), `starter_code`, `input_output` (JSON object).

    Returns:
        `prompt`, and the first solution as `chosen`, empty where there is none.
    """
    starter, tests = row["starter_code"], row["input_output"]
    calls = bool(starter) or (bool(tests) and "fn_name" in json.loads(tests))
    kind = "Call-Based" if calls else "Standard Input"
    code = f"{starter}\n" if starter else ""
    solutions = json.loads(row["solutions"]) if row["solutions"] else []
    return {
        "prompt": f"\nQUESTION:\n{row['question']}\n{code}\nUse {kind} format\n\nANSWER:\n",
        "chosen": solutions[0] if solutions else "",
    }


def lookup(row: Row, column: str) -> Any:  # noqa: ANN401
    """Read a column, or with dots a field of a column of records.

    Args:
        row: one row.
        column: name such as `prompt` or `answer.text`.

    Returns:
        The value.

    Raises:
        ValueError: if there is no such column or field.
    """
    value: Any = row
    if column in row:
        return row[column]
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"data: there is no field {part!r} of column {column!r} in a row with columns {list(row)}")
        value = value[part]
    return value


@dataclass(frozen=True)
class TemplateFormat:
    """Texts from columns, with or without format strings.

    Args:
        columns: field (`prompt`, `chosen`, `rejected`, `completion`) -> column.
        prompt_template: format string over the row's columns, e.g. `Human: {question} Assistant:`; None takes the
            prompt column as it is.
        response_template: format string of every other field over the row's columns and `{response}`, the field's own
            column, e.g. ` {response}`; None takes the column as it is.
    """

    columns: Mapping[str, str]
    prompt_template: str | None = None
    response_template: str | None = None

    def __call__(self, row: Row) -> Texts:
        """Give the text of every field."""
        texts = {field: lookup(row, column) for field, column in self.columns.items()}
        if self.prompt_template is not None:
            texts["prompt"] = _fill(self.prompt_template, "data.prompt_template", row)
        if self.response_template is not None:
            for field in texts.keys() - {"prompt"}:
                texts[field] = _fill(
                    self.response_template, "data.response_template", {**row, "response": texts[field]}
                )
        return texts


def _fill(template: str, key: str, row: Row) -> str:
    try:
        return template.format(**row)
    except KeyError as error:
        raise ValueError(f"{key}: {template!r} names {error}, but the columns are {', '.join(row)}") from error


@dataclass(frozen=True)
class ChatFormat:
    """Texts through the chat template of a tokenizer.

    Args:
        tokenizer: tokenizer with a chat template.
        columns: field -> column. The prompt is a text (one user turn) or a list of messages; the other fields are
            texts or lists of messages whose last one is the answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    columns: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check the tokenizer.

        Raises:
            ValueError: if it has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"data.format: tokenizer {self.tokenizer.name_or_path!r} has no chat template; use format plain with "
                "data.prompt_template or a chat model's tokenizer"
            )

    def __call__(self, row: Row) -> Texts:
        """Give the text of every field; the prompt ends with the header of the assistant's turn."""
        prompt = lookup(row, self.columns["prompt"])
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        texts = {"prompt": self._render(messages, True)}
        for field in self.columns.keys() - {"prompt"}:
            answer = lookup(row, self.columns[field])
            content = answer if isinstance(answer, str) else answer[-1]["content"]
            texts[field] = self._answer(texts["prompt"], messages, content)
        return texts

    def _render(self, messages: list[dict[str, str]], open_turn: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))

    def _answer(self, prompt: str, messages: list[dict[str, str]], content: str) -> str:
        """Text behind the prompt, up to the end-of-sequence token, which is appended as an id."""
        whole = self._render([*messages, {"role": "assistant", "content": content}], False)
        if not whole.startswith(prompt):
            raise ValueError(
                "data.format: the chat template renders the prompt differently once an answer follows, so the two "
                "cannot be told apart; use format plain with data.prompt_template"
            )
        answer = whole[len(prompt) :]
        end = answer.rfind(self.tokenizer.eos_token)
        return answer if end < 0 else answer[:end]


def make_format(
    name: FormatName,
    columns: Mapping[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    prompt_template: str | None = None,
    response_template: str | None = None,
) -> Format:
    """Choose the conversion of rows.

    Args:
        name: `plain` (columns and templates), `chat` (chat template) or one of the known data sets.
        columns: field -> column, for `plain` and `chat`.
        tokenizer: tokenizer, for `chat`.
        prompt_template: see `TemplateFormat`.
        response_template: see `TemplateFormat`.

    Returns:
        Function from a row to its texts.

    Raises:
        ValueError: if templates are given to a format that does not use them.
    """
    if name == "plain":
        return TemplateFormat(columns, prompt_template, response_template)
    if prompt_template is not None or response_template is not None:
        raise ValueError(f"data.prompt_template, data.response_template: only format plain uses them, not {name}")
    if name == "chat":
        return ChatFormat(tokenizer, columns)
    return {"tldr": tldr, "hh": hh, "webgpt": webgpt, "ultrafeedback": ultrafeedback, "apps": apps}[name]
