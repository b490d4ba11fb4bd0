"""Waveform diffusion with sharded networks (FSDP2) on two CPU processes over gloo."""

import csv

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from lit_models import export
from lit_models.cli import main
from tests.sharding_cases import together
from tests.test_fsdp2 import QUIET, SHARDED

PRESET = ["--config", "diffusion/tiny.yaml", "--model.init_args.text.init_args.dropout=0.0", *QUIET]
TWO = [*SHARDED, "--data.init_args.batch_size=4"]
FOLDER = "diffusion-tiny"


def last_row(folder):
    with (folder / FOLDER / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    return {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}


def sounds(folder):
    return [soundfile.read(path)[0] for path in sorted((folder / FOLDER / "predictions").glob("*.wav"))]


def in_shards(command, *options, folder):
    """Run a command in two processes that share the weights."""
    together(lambda rank: main([command, *PRESET, *TWO, *options]).trainer.global_step, folder)


@pytest.mark.slow
def test_sharded_run_equals_one_process_validates_samples_and_exports(tmp_path, monkeypatch):
    pair, single = tmp_path / "pair", tmp_path / "single"
    monkeypatch.setenv("LIT_RUNS", str(pair))
    in_shards("fit", folder=tmp_path / "fit")
    in_shards("predict", "--ckpt_path=last", folder=tmp_path / "predict")
    monkeypatch.setenv("LIT_RUNS", str(single))
    main(["fit", *PRESET])
    main(["predict", *PRESET, "--ckpt_path=last"])
    assert last_row(pair) == pytest.approx(last_row(single), rel=1e-4)
    assert (pair / FOLDER / "sounds/step=20-val/generated-1.wav").is_file()
    assert len(sounds(pair)) == len(sounds(single)) == 8
    for one, other in zip(sounds(pair), sounds(single), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)

    export.main([str(pair / FOLDER / "checkpoints/last.ckpt"), str(pair / "out")])
    folders = [single / FOLDER / "export", pair / FOLDER / "export", pair / "out"]
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        expected, live, offline = (load_file(folder / "model" / f"{name}.safetensors") for folder in folders)
        assert expected.keys() == live.keys() == offline.keys()
        for key, value in expected.items():
            torch.testing.assert_close(live[key], value, atol=1e-5, rtol=1e-5)
            assert torch.equal(live[key], offline[key]), key


@pytest.mark.slow
def test_shards_in_bfloat16_resume_as_if_nothing_had_happened(tmp_path, monkeypatch):
    fit = ["--model.init_args.sharding.param_dtype=bfloat16", "--model.init_args.lr_scheduler.init_args.total=20"]
    runs = {"whole": [[]], "broken": [["--trainer.max_steps=10"], ["--ckpt_path=last"]]}
    states = []
    for name, parts in runs.items():
        monkeypatch.setenv("LIT_RUNS", str(tmp_path / name))
        for number, options in enumerate(parts):
            in_shards("fit", *fit, *options, folder=tmp_path / f"{name}{number}")
        states.append(load_file(tmp_path / name / FOLDER / "export/model/unet/diffusion_pytorch_model.safetensors"))
    complete, resumed = states
    assert complete.keys() == resumed.keys()
    for name, value in complete.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, resumed[name]), name
