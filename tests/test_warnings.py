"""Warnings of code without Lightning: once per run, not once per process."""

import warnings

import pytest
import torch

from lit_models._ranks import VARIABLES, is_first_process, warn


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"RANK": ""}, True),
    ],
)
def test_launchers_tell_the_rank(monkeypatch, variables, first):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_have_met_know_better(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(1 - rank))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    assert is_first_process() == (rank == 0)


def test_others_are_silent_and_the_place_is_that_of_the_caller(monkeypatch):
    with pytest.warns(UserWarning, match="once") as found:
        warn("once")
    assert found[0].filename == __file__
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("never")


def test_texts_that_are_cut_are_told_once_per_run(monkeypatch):
    from lit_models.diffusion import text

    monkeypatch.setattr(text._CutTexts, "number", 0)
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text._count_cut(2, 8, 16)
    assert text.cut_texts() == 2
    monkeypatch.setattr(text._CutTexts, "number", 0)
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match="max_tokens: 2 of 8 texts are longer than 16 tokens"):
        text._count_cut(2, 8, 16)
