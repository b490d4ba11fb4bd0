"""Presets that need nothing trained before run one batch of everything."""

import pytest

from lit_models.cli import main

PRESETS = ["sft/tiny.yaml", "reward/tiny.yaml", "ppo/tiny.yaml", "sft/snippets.yaml"]


@pytest.mark.parametrize("name", PRESETS)
def test_one_batch_of_everything(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    cli = main(["fit", "--config", name, "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"])
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize("methods", [["ma"], ["cd"], ["ma", "cd"]])
def test_methods_on_the_tiny_preset(methods, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    files = [argument for method in methods for argument in ("--config", f"ppo/method-{method}.yaml")]
    options = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    metrics = main(["fit", "--config", "ppo/tiny.yaml", *files, *options]).trainer.callback_metrics
    assert ("macro/num_mean" in metrics) == ("ma" in methods)
    assert ("icm/loss" in metrics) == ("cd" in methods)
