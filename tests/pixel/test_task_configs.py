"""The files of GLUE and XNLI against the tables of the papers; the sentiment preset is run."""

import io
import itertools
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from datamodules.pixel_tasks import Glue
from lit_models.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "pixel"
GRID = "64/5e-5"
"""What the files have where only a grid is known."""
MODELS = ["pixelgpt", "textgpt", "mono-pixel", "mono-text", "dual-pixel", "dual-text"]
# Effective batch / learning rate / steps.
GLUE = {
    "cola": "256/3e-5/2000 32/1e-5/2000 64/1e-5/2000 64/1e-5/500 256/5e-5/2000 512/3e-5/500",
    "mnli": f"64/5e-5/15000 64/3e-5/15000 64/5e-5/15000 64/5e-5/15000 {GRID}/15000 64/5e-5/8000",
    "mrpc": "32/5e-5/2000 32/5e-5/2000 256/3e-5/500 64/5e-5/500 64/5e-5/250 64/3e-5/2000",
    "qnli": "64/5e-5/8000 64/5e-5/8000 256/1e-5/8000 64/5e-5/8000 64/3e-5/8000 64/5e-5/8000",
    "qqp": "256/5e-5/15000 64/3e-5/15000 256/3e-5/15000 256/5e-5/15000 256/5e-5/15000 256/5e-5/15000",
    "rte": "32/3e-5/2000 64/1e-5/2000 64/3e-5/500 32/5e-5/2000 64/1e-5/250 32/5e-5/500",
    "sst2": "32/5e-5/8000 64/3e-5/8000 256/5e-5/8000 256/5e-5/8000 256/5e-5/8000 64/1e-5/8000",
    "stsb": "256/5e-5/500 64/5e-5/2000 256/3e-5/2000 32/5e-5/2000 64/5e-5/2000 64/3e-5/2000",
    "wnli": f"{GRID}/250 32/3e-5/250 {GRID}/250 {GRID}/250 {GRID}/250 {GRID}/250",
}
# Warm-up, steps between evaluations, metric of the selection.
EVALUATION = {
    "cola": (10, 50, "mcc"),
    "mnli": (100, 500, "accuracy"),
    "mrpc": (10, 50, "f1"),
    "qnli": (100, 250, "accuracy"),
    "qqp": (100, 500, "f1"),
    "rte": (10, 50, "accuracy"),
    "sst2": (100, 250, "accuracy"),
    "stsb": (10, 50, "spearman"),
    "wnli": (10, 5, "accuracy"),
}
WITHOUT_CELL = {  # input, S, effective batch, learning rate, steps if not those of the task
    "mono-pair": ("pair", 512, 64, 5e-5, None),
    "dual-pair": ("pair", 512, 64, 5e-5, None),
    "pixel": ("pixel", 256, 64, 3e-5, 15000),
}
XNLI = {
    "pixelgpt": ("pixel", 256, 256, 5e-5, 15000),
    "textgpt": ("text", 768, 64, 5e-5, 30000),
    "mono-pixel": ("pixel", 256, 256, 5e-5, 15000),
    "mono-text": ("text", 768, 64, 5e-5, 15000),
    "mono-pair": ("pair", 256, 256, 5e-5, 30000),
    "dual-pixel": ("pixel", 256, 256, 5e-5, 15000),
    "dual-text": ("text", 768, 64, 5e-5, 15000),
    "dual-pair": ("pair", 256, 256, 5e-5, 30000),
    "pixel": ("pixel", 196, 128, 2e-5, 50000),
}
PROCESSES = 8
SOURCES = {
    "pixelgpt": "baidu/PixelGPT",
    "mono": "baidu/MonoGPT",
    "dual": "baidu/DualGPT",
    "pixel": "Team-PIXEL/pixel-base",
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*files):
    configs = [argument for file in files for argument in ("--config", f"pixel/{file}.yaml")]
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stdout(printed):
        main(["fit", *configs, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(printed.getvalue())


def callbacks(config):
    return {entry["class_path"].rpartition(".")[2]: entry["init_args"] for entry in config["trainer"]["callbacks"]}


def check_shared(config, warmup, every, monitor):
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert config["seed_everything"] == 42
    assert config["data"]["init_args"]["seed"] == 42
    assert model["optimizer"]["init_args"]["betas"] == [0.9, 0.999]
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert model["lr_scheduler"]["class_path"].endswith(".WarmupLinear")
    assert model["lr_scheduler"]["init_args"] == {"warmup": warmup, "total": trainer["max_steps"], "floor": 0.0}
    assert (trainer["val_check_interval"], trainer["check_val_every_n_epoch"]) == (every, None)
    assert trainer["gradient_clip_val"] == 1
    assert model["metrics"][0] == monitor
    stopping, saving = callbacks(config)["EarlyStopping"], callbacks(config)["ModelCheckpoint"]
    assert (stopping["monitor"], stopping["mode"], stopping["patience"]) == (f"val/{monitor}", "max", 8)
    assert (saving["monitor"], saving["mode"], saving["save_top_k"]) == (f"val/{monitor}", "max", 1)


def check_model(config, model, kind, length, batch, rate, steps):
    arguments, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["input"] == kind
    assert data["renderer"]["init_args"]["max_seq_length"] == length
    assert data["batch_size"] * PROCESSES == batch
    assert arguments["optimizer"]["init_args"]["lr"] == pytest.approx(rate)
    assert config["trainer"]["max_steps"] == steps
    assert arguments["tokenizer"] == data["tokenizer"]
    assert arguments["pad_token"] == data["pad_token"]
    assert (data["tokenizer"] is None) == (kind == "pixel")
    backbone = arguments["backbone"]
    assert backbone["class_path"].endswith("FromPIXELPretrained" if model == "pixel" else "FromPixelPretrained")
    name = backbone["init_args"]["name"]
    assert (
        name == SOURCES[model.partition("-")[0]] if model != "textgpt" else name.endswith("/pixel-textgpt/export/model")
    )
    layout = backbone["init_args"]["overrides"].get("pair_layout")
    assert (layout, data["pad_to_max"]) == (("padded", True) if kind == "pair" else (None, False))


def check_glue(task, model):
    if model in WITHOUT_CELL:
        config = parse(f"glue-{task}", f"glue-model-{model}")
        *expected, steps = WITHOUT_CELL[model]
        check_model(config, model, *expected, steps or max(int(cell.split("/")[2]) for cell in GLUE[task].split()))
    else:
        others = [f"glue/{task}-{other}" for other in MODELS if other != model]  # parsed too, and then replaced
        config = parse(f"glue-{task}", f"glue-model-{model}", *others, f"glue/{task}-{model}")
        batch, rate, steps = GLUE[task].split()[MODELS.index(model)].split("/")
        check_model(config, model, "text" if "text" in model else "pixel", 768, int(batch), float(rate), int(steps))
        assert config["trainer"]["default_root_dir"].endswith(f"/glue-{task}-{model}")
        assert callbacks(config)["ModelCheckpoint"]["dirpath"].endswith(f"/glue-{task}-{model}/checkpoints")
    check_shared(config, *EVALUATION[task])
    arguments = config["model"]["init_args"]
    assert config["data"]["init_args"]["task"] == task
    assert arguments["labels"] == Glue.LABELS[task]
    assert arguments["task"] == ("regression" if task == "stsb" else "classification")
    if model == "pixel":
        assert arguments["backbone"]["init_args"]["overrides"]["pooling"] == "mean"


def check_xnli(setting, model):
    config = parse(f"xnli-{setting}", f"xnli-model-{model}")
    check_model(config, model, *XNLI[model])
    check_shared(config, 100, 500, "accuracy")
    arguments, data = config["model"]["init_args"], config["data"]["init_args"]
    assert data["translate_train"] == (setting == "translate-train")
    assert data["languages"] is None  # all 15
    assert arguments["labels"] == ["entailment", "neutral", "contradiction"]
    if model == "pixel":
        assert arguments["backbone"]["init_args"]["overrides"]["pooling"] == "cls"


SETTINGS = ["translate-train", "cross-lingual"]


@pytest.mark.parametrize(
    ("task", "model"),
    [*zip(GLUE, [*MODELS, *WITHOUT_CELL], strict=True), *zip(list(GLUE)[6:], MODELS[3:], strict=True)],
)
def test_glue_files_parse_and_hold_the_values_of_the_table(task, model):
    check_glue(task, model)


@pytest.mark.parametrize(("setting", "model"), zip(itertools.cycle(SETTINGS), XNLI))
def test_xnli_files_parse_and_hold_the_values_of_the_table(setting, model):
    check_xnli(setting, model)


@pytest.mark.parametrize("task", GLUE)
def test_cells_hold_the_values_of_the_table(task):
    for model, cell in zip(MODELS, GLUE[task].split(), strict=True):
        assert (
            f"pixel/glue-{task}.yaml and pixel/glue-model-{model}.yaml"
            in (CONFIGS / f"glue/{task}-{model}.yaml").read_text()
        )
        values = yaml.safe_load((CONFIGS / f"glue/{task}-{model}.yaml").read_text())
        found = (
            values["data"]["init_args"]["batch_size"] * PROCESSES,
            values["model"]["init_args"]["optimizer"]["init_args"]["lr"],
            values["trainer"]["max_steps"],
        )
        assert found == tuple(float(value) for value in cell.split("/"))


def test_there_is_no_other_file():
    tasks, models = [f"glue-{task}" for task in GLUE], [*MODELS, *WITHOUT_CELL]
    expected = {*tasks, *(f"{stem}-model-{model}" for stem in ("glue", "xnli") for model in models)}
    expected |= {"xnli-translate-train", "xnli-cross-lingual"}
    assert {path.stem for pattern in ("glue-*", "xnli-*") for path in CONFIGS.glob(f"{pattern}.yaml")} == expected
    cells = {f"{task}-{model}" for task in GLUE for model in MODELS}
    assert {path.stem for path in (CONFIGS / "glue").iterdir()} == cells


FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--data.batch_size=8",
    "--data.limit_val=16",
    "--data.limit_train=64",
    "--model.backbone.init_args.overrides.hidden_size=32",
    "--model.backbone.init_args.overrides.intermediate_size=64",
]


@pytest.mark.parametrize("kind", ["pixel", "text"])
def test_sentiment_preset_takes_either_input(kind):
    cli = main(["fit", "--config", "pixel/task.yaml", f"--data.input={kind}", *SMALL, *FAST])
    assert {"val/loss", "val/accuracy", "val/mcc"} <= set(cli.trainer.callback_metrics)
    keys = {"pixel_values", "pixel_mask"} if kind == "pixel" else {"input_ids", "attention_mask"}
    assert keys <= set(next(iter(cli.datamodule.val_dataloader())))


def test_sentiment_preset_fits_tests_predicts_and_exports(runs):
    options = ["--config", "pixel/task.yaml", "--data.input=pair", *SMALL, *FAST]
    main(["fit", *options])
    last = f"--ckpt_path={runs / 'pixel-task/checkpoints/last.ckpt'}"
    limits = ["--trainer.limit_test_batches=2", "--trainer.limit_predict_batches=2"]
    tested = main(["test", *options, last, *limits]).trainer
    assert {"test/loss", "test/accuracy", "test/mcc"} <= set(tested.callback_metrics)
    predictions = main(["predict", *options, last, *limits]).trainer.predict_loop.predictions
    assert {name for batch in predictions for name in batch["prediction"]} <= {"negative", "positive"}
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(runs / "pixel-task/export/model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    saved = torch.load(runs / "pixel-task/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved[f"net.{key}"]), key
