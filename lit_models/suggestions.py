"""Messages of the configuration parser, completed by the nearest valid key or class."""

import inspect
import re
import sys
from difflib import get_close_matches
from typing import Any

PACKAGES = ("lit_models", "datamodules", "callbacks")
UNKNOWN = (
    r"Option '([^']+)' is not accepted",
    r"does not accept option '([^']+)'",
    r"unrecognized arguments: --([\w.]+)",
    r"has no attribute '([^']+)'",
    r"No module named '([^']+)'",
    r"'?class_path'?: '?([\w.]+)'?",
)


KEY = re.compile(r'Parser key "([^"]+)"')
GIVEN = re.compile(r"(?:Given|Got) value: (.*)")
EXPECTED = re.compile(r"Expected a (?:<class '([^']+)'>|typing\.Literal\[([^\]]+)\]|(dot import path) string)")


def wrong_value(message: str) -> str | None:
    """One sentence for a value of a wrong type or outside of a closed set.

    Args:
        message: of the parser.

    Returns:
        The key, what was given and what is valid; None for other messages.
    """
    key, given, expected = KEY.search(message), GIVEN.search(message), EXPECTED.findall(message)
    if key is None or given is None or not expected:
        return None
    value = given.group(1).strip()
    choices = [choice.strip().strip("'") for _, literal, _ in expected for choice in literal.split(",") if literal]
    types = [kind.rpartition(".")[2].replace("NoneType", "null") for kind, _, _ in expected if kind]
    classes = ["the name of a class" for _, _, path in expected if path]
    *most, last = dict.fromkeys(choices + types + classes)
    valid = f"{', '.join(most)} or {last}" if most else last
    near = get_close_matches(value, choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key.group(1)} must be {valid}, got {value!r}{hint}"


def explain(message: str, parser: Any) -> str:  # noqa: ANN401
    """Add the nearest valid names to a message about an unknown key or class.

    Args:
        message: of the parser.
        parser: the parser that failed.

    Returns:
        The message; followed by `; did you mean ...?` where a valid name is near.
    """
    found = next((match for pattern in UNKNOWN if (match := re.search(pattern, message))), None)
    if found is None:
        return wrong_value(message) or message
    unknown = found.group(1)
    owners = _parameters() | {option: "" for option in _options(parser)}
    last = unknown.rpartition(".")[2]
    elsewhere = owners.pop(last, None) is not None  # a name of another class, so only a very near option is meant
    if elsewhere:
        owners = {name: owner for name, owner in owners.items() if not owner}
    near = get_close_matches(unknown, owners, n=1, cutoff=0.8)
    near = near or get_close_matches(last, owners, n=2, cutoff=0.8 if elsewhere else 0.6)
    if not near or (elsewhere and "ption" not in message):
        return message
    named = " or ".join(f"{name!r} (of {owners[name]})" if owners[name] else repr(name) for name in near)
    first_line = message.strip().splitlines()[0] if "Given value" in message else message.strip()
    return f"{first_line}; did you mean {named}?"


def _options(parser: Any) -> list[str]:  # noqa: ANN401
    """Dotted names that a parser and its sub-commands accept."""
    names: set[str] = set()
    pending = [parser]
    while pending:
        for action in pending.pop()._actions:
            names.update(option.lstrip("-") for option in action.option_strings)
            choices = getattr(action, "choices", None)
            if isinstance(choices, dict):
                pending += [choice for choice in choices.values() if hasattr(choice, "_actions")]
    return sorted(names)


def _parameters() -> dict[str, str]:
    """Arguments and names of this collection's imported classes, with the class they belong to."""
    owners: dict[str, str] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] not in PACKAGES:
            continue
        for name, value in list(vars(module).items()):
            if inspect.isclass(value) and value.__module__.split(".")[0] in PACKAGES:
                owners.setdefault(name, "")
                for parameter in inspect.signature(value.__init__).parameters:
                    owners.setdefault(parameter, name)
    owners.pop("self", None)
    return owners
