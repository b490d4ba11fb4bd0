"""Every stored number is really compared: changing it makes the check of its file fail."""

import copy
from collections.abc import Iterator

import pytest

from ..loading import load, load_tensors
from . import checks, curiosity_checks, macro_checks, step_checks
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
    "boundaries": macro_checks.check_boundaries,
    "parsing": macro_checks.check_parsing,
    "macro_values": macro_checks.check_macro_values,
    "macro_gae": macro_checks.check_macro_gae,
    "macro_losses": macro_checks.check_macro_losses,
    "spec_macro_batch": macro_checks.check_spec_macro_batch,
    "icm": lambda data: curiosity_checks.check_icm(data, load_tensors("rlhf", "icm_weights")),
    "gate": curiosity_checks.check_gate,
    "diversity": curiosity_checks.check_diversity,
    "selfbleu_monitor": curiosity_checks.check_selfbleu_monitor,
    "full_step_ma": lambda data: step_checks.check_full_step_ma(data, load_tensors("rlhf", "full_step_ma")),
    "full_step_cd": lambda data: step_checks.check_full_step_cd(data, load_tensors("rlhf", "full_step_cd")),
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
    "old_values",
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
    # One macro action has no successor, and a single token whose ratio or value is clipped no gradient.
    ("macro_gae", "cases", 3, "gamma"),
    ("macro_gae", "cases", 3, "lam"),
    ("spec_macro_batch", "cases", 3, "lam"),
    ("icm", "cases", 0, "clip"),
    ("icm", "cases", 1, "clip"),
    *(
        ("spec_macro_batch", "cases", case, key, row)
        for case in range(7)
        for key in ("new_values", "logprobs", "old_logprobs")
        for row in (1, 2)
    ),
    # An answer is the content of the last message; roles and earlier messages are not read.
    *(
        ("ultrafeedback_format", "sample", side, *key)
        for side in ("chosen", "rejected")
        for key in ((0, "role"), (0, "content"), (1, "role"))
    ),
}
# Scale changes no order and no angle, prompt columns are not read, and no ratio or value of these updates is clipped.
WITHOUT_SCALE = {
    ("boundaries", "ppl"),
    ("spec_macro_batch", "ppl"),
    ("icm", "hidden_states"),
    ("icm", "action_embeddings"),
    ("icm", "scores"),
    ("gate", "scores_step_major"),
    ("diversity", "embeddings"),
    ("full_step_ma", "cliprange"),
    ("full_step_ma", "cliprange_value"),
    ("full_step_cd", "cliprange"),
    ("full_step_cd", "cliprange_value"),
}
# Files in which options and inputs may change without an effect: there, the results among integers and texts count.
RESULTS = {
    "boundaries": {"official", "clean", "segment_ids", "segment_ids_isolated", "official_when_ppl_nested_as_released"},
    "parsing": {"official", "official_relative", "leaf_token_counts"},
    "macro_values": {"segment_ids", "boundaries", "clean_boundaries"},
    "spec_macro_batch": {"segment_ids", "num_tokens", "num_macros", "valid_lens"},
    "icm": {"valid_lens"},
    "gate": {"gate", "kept_rows"},
    "diversity": {"unique", "total"},
    "full_step_ma": {"boundaries", "input_ids", "param_names"},
    "full_step_cd": {"input_ids", "param_names"},
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
            ineffective |= any((name, key) in WITHOUT_SCALE for key in path)
            if not is_float and name in RESULTS:
                ineffective = not RESULTS[name].intersection(path)
            if is_float == (kind is float) and not ineffective:
                cases.append(pytest.param(name, path, id=f"{name}:{'.'.join(map(str, path))}"))
    return cases


@pytest.mark.parametrize(("name", "path"), _cases(float))
def test_one_percent_fails(name, path):
    data = load("rlhf", name)
    with pytest.raises((AssertionError, ValueError)):  # a discount may leave its range
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


@pytest.mark.parametrize(
    ("name", "key"), sorted(pair for pair in WITHOUT_SCALE if pair[0] in ("icm", "gate", "diversity"))
)
def test_other_inputs_fail(name, key):
    def flipped(value: object) -> object:
        return [flipped(entry) for entry in value[::-1]] if isinstance(value, list) else -value

    data = load("rlhf", name)
    data["cases"][0][key] = flipped(data["cases"][0][key])
    with pytest.raises(AssertionError):
        CHECKS[name](data)


@pytest.mark.parametrize("name", CHECKS)
def test_unaltered_passes(name):
    CHECKS[name](load("rlhf", name))
