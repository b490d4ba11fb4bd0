import pytest

from datamodules.collate import pad_left
from datamodules.formats import hh, tldr, ultrafeedback, webgpt
from datamodules.splits import stage_split

FORMATS = {
    "openai/summarize_from_feedback (config comparisons)": tldr,
    "Dahoas/full-hh-rlhf": hh,
    "openai/webgpt_comparisons": webgpt,
}


@pytest.fixture
def vectors(rlhf):
    return rlhf("data_and_misc")


def check_format(convert, case):
    got = convert(case["sample"])
    assert got["prompt"] == case["prompt"]
    for side in ("chosen", "rejected"):
        assert got["prompt"] + got[side] == case[f"prompt_and_{side}"]
        assert got[side] == case.get(side, got[side])


def test_left_padding(vectors):
    for case in vectors["left_pad_collator"]:
        ids, mask = pad_left(case["prompts"], case["pad_id"], case["max_prompt_seq_len"])
        assert ids.tolist() == case["prompt"]
        assert mask.tolist() == case["prompt_att_mask"]


def test_stage_split(vectors):
    for case in vectors["split_index"]:
        pieces = stage_split(case["size"], [float(part) for part in case["split"].split(",")], case["seed"])
        assert [len(piece) for piece in pieces] == case["lengths"]
        assert [piece[:10].tolist() for piece in pieces] == case["first10"]
        if case["full"] is not None:
            assert [piece.tolist() for piece in pieces] == case["full"]


def test_formats(vectors):
    assert {case["dataset"] for case in vectors["prompt_formats"]} == set(FORMATS)
    for case in vectors["prompt_formats"]:
        check_format(FORMATS[case["dataset"]], case)


def test_ultrafeedback(rlhf):
    check_format(ultrafeedback, rlhf("ultrafeedback_format"))
