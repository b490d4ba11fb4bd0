"""Every stored number is really compared: changing it makes the check of its file fail."""

import copy
from collections.abc import Iterator

import pytest

from ..loading import load
from . import checks
from . import test_data_vectors as data_checks


def _check_data_and_misc(data: dict) -> None:
    checks.check_misc(data)
    data_checks.test_left_padding(data)
    data_checks.test_stage_split(data)
    data_checks.test_formats(data)


CHECKS = {
    "kl_rewards": checks.check_kl_rewards,
    "token_ppo": checks.check_token_ppo,
    "reward_model": checks.check_reward_model,
    "data_and_misc": _check_data_and_misc,
    "ultrafeedback_format": lambda data: data_checks.test_ultrafeedback(lambda _: data),
}
# Results are compared one by one. Inputs are altered as whole rows only, because single ones may have no effect by
# definition: padding, prompt columns, scores beyond the clip, ratios and values beyond the clip.
INPUTS = {
    "action_mask",
    "input_ids",
    "labels",
    "logits",
    "logprobs",
    "new_values",
    "old_logprobs",
    "per_token_scores",
    "ref_logprobs",
    "rewards",
    "scores",
    "valid_lens",
    "values",
}
WITHOUT_EFFECT = {
    # Only where the text ends matters here, and neither a full row nor the column to search from decides that.
    ("reward_model", "forward_value", 0, "prompt_length"),
    ("reward_model", "forward_value", 0, "input_ids", 0),
    # An answer is the content of the last message; roles and earlier messages are not read.
    *(
        ("ultrafeedback_format", "sample", side, *key)
        for side in ("chosen", "rejected")
        for key in ((0, "role"), (0, "content"), (1, "role"))
    ),
}
# 1 % of smaller numbers is within the tolerance of 1e-5.
SMALLEST = 2e-3


def _numbers(node: object) -> bool:
    return isinstance(node, (int, float)) and not isinstance(node, bool)


def _rows(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of the texts, of the single numbers and of the innermost lists of numbers."""
    if isinstance(node, str) or _numbers(node) or (isinstance(node, list) and node and all(map(_numbers, node))):
        yield path
    elif isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _rows(value, (*path, key))


def _get(data: object, path: tuple) -> object:
    for key in path:
        data = data[key]
    return data


def _altered(data: object, path: tuple) -> object:
    """Copy with the value or the row at `path` changed: floats by 1 %, integers by 1, texts by one letter."""

    def change(value: object) -> object:
        if isinstance(value, list):
            return [change(entry) for entry in value]
        if isinstance(value, str):
            return value + "x"
        return value * 1.01 if isinstance(value, float) else value + 1

    data = copy.deepcopy(data)
    _get(data, path[:-1])[path[-1]] = change(_get(data, path))
    return data


def _cases(kind: type) -> list:
    """Float rows and numbers, or everything else; without rows of zeros, which 1 % does not change."""
    cases = []
    for name in CHECKS:
        data = load("rlhf", name)
        for path in _rows(data):
            row = _get(data, path)
            values = row if isinstance(row, list) else [row]
            is_float = any(isinstance(value, float) for value in values)
            ineffective = (is_float and not any(values)) or (name, *path) in WITHOUT_EFFECT
            if is_float == (kind is float) and not ineffective:
                cases.append(pytest.param(name, path, id=f"{name}:{'.'.join(map(str, path))}"))
    return cases


@pytest.mark.parametrize(("name", "path"), _cases(float))
def test_one_percent_fails(name, path):
    data = load("rlhf", name)
    with pytest.raises(AssertionError):
        CHECKS[name](_altered(data, path))
    row = _get(data, path)
    if isinstance(row, list) and not INPUTS.intersection(path):
        for column, value in enumerate(row):
            if abs(value) > SMALLEST:
                with pytest.raises(AssertionError):
                    CHECKS[name](_altered(data, (*path, column)))


@pytest.mark.parametrize(("name", "path"), _cases(object))
def test_other_integer_or_text_fails(name, path):
    # Other lengths and ids may also lead to columns that do not exist, or to pairs without a common prompt.
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        CHECKS[name](_altered(load("rlhf", name), path))


@pytest.mark.parametrize("name", CHECKS)
def test_unaltered_passes(name):
    CHECKS[name](load("rlhf", name))
