import pytest
from transformers import AutoTokenizer

from datamodules.formats import ChatFormat, TemplateFormat, apps, make_format, webgpt, without_citations

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(words):
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_templates():
    columns = {"prompt": "question", "chosen": "best.text", "rejected": "worst"}
    convert = TemplateFormat(columns, "Human: {question} Assistant:", " {response}")
    assert convert({"question": "Why?", "best": {"text": "So."}, "worst": "No."}) == {
        "prompt": "Human: Why? Assistant:",
        "chosen": " So.",
        "rejected": " No.",
    }


def test_template_with_unknown_column():
    with pytest.raises(ValueError, match=r"data\.prompt_template: .* names 'questoin', but the columns are question"):
        TemplateFormat({"prompt": "question"}, "{questoin}")({"question": "Why?"})


def test_missing_field_of_a_record():
    with pytest.raises(ValueError, match=r"no field 'txt' of column 'answer\.txt'"):
        TemplateFormat({"prompt": "answer.txt"})({"answer": {"text": "So."}})


def test_chat_with_text_and_with_messages(chat):
    convert = ChatFormat(chat, {"prompt": "prompt", "completion": "answer"})
    expected = {"prompt": "<user>Hi|<assistant>", "completion": "Hello"}
    assert convert({"prompt": "Hi", "answer": "Hello"}) == expected
    messages = [{"role": "user", "content": "Hi"}]
    assert convert({"prompt": messages, "answer": [*messages, {"role": "assistant", "content": "Hello"}]}) == expected


def test_chat_without_template(words):
    with pytest.raises(ValueError, match=r"data\.format: tokenizer .* has no chat template"):
        ChatFormat(AutoTokenizer.from_pretrained(words), {"prompt": "prompt"})


def test_chat_template_that_changes_the_prompt(chat):
    chat.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="renders the prompt differently"):
        ChatFormat(chat, {"prompt": "prompt", "completion": "answer"})({"prompt": "Hi", "answer": "Hello"})


def test_templates_only_with_plain(chat):
    with pytest.raises(ValueError, match="only format plain uses them, not hh"):
        make_format("hh", {}, chat, prompt_template="{prompt}")


def test_citations_but_no_prose():
    assert without_citations("A [1][2, 3] b (4). See (this) [note].") == "A b. See (this) [note]."


def test_webgpt_tie_chooses_the_first():
    row = {"question": {"full_text": "Q"}, "answer_0": "x", "answer_1": "y", "score_0": 0, "score_1": "0.0"}
    assert webgpt(row)["chosen"] == " x"
    assert webgpt({**row, "score_1": 0.1})["chosen"] == " y"


def test_apps():
    row = {"question": "Double it.", "solutions": '["print(2)", "x"]', "starter_code": "", "input_output": ""}
    assert apps(row) == {
        "prompt": "\nQUESTION:\nDouble it.\n\nUse Standard Input format\n\nANSWER:\n",
        "chosen": "print(2)",
    }
    called = apps(row | {"input_output": '{"fn_name": "f"}', "solutions": "", "starter_code": "def f():"})
    assert called["prompt"] == "\nQUESTION:\nDouble it.\ndef f():\n\nUse Call-Based format\n\nANSWER:\n"
    assert called["chosen"] == ""
