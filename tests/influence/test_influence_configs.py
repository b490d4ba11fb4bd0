"""The files of recorded runs and of simulators against the tables of the paper; those of our own are run."""

import io
from contextlib import redirect_stdout

import pytest
import yaml

from lit_models.cli import main

# Name, learning rate, batch, epochs, steps, most tokens.
RECORDED = {
    "14m": ("EleutherAI/pythia-14m", 5e-7, 8, 3, 288, 2048),
    "70m": ("EleutherAI/pythia-70m-deduped", 5e-7, 8, 3, 288, 2048),
    "160m": ("EleutherAI/pythia-160m-deduped", 5e-7, 8, 3, 288, 2048),
    "410m": ("EleutherAI/pythia-410m-deduped", 2e-7, 8, 3, 288, 2048),
    "1b": ("EleutherAI/pythia-1b-deduped", 2e-7, 8, 2, 192, 2048),
    "2.8b": ("EleutherAI/pythia-2.8b-deduped", 1e-5, 8, 2, 192, 1024),
}
# Learning rate, ranges of seen tests and of unseen ones.
TASKS = {
    "rte": (5e-7, [[0, 199]], [[200, 276]]),
    "sst2": (5e-7, None, None),
    "boolq": (5e-7, None, None),
    "webnlg": (1e-6, [[0, 99]], [[100, 177]]),
    "wmt16": (5e-7, None, None),
}
# Files, kind, optimizer, learning rate, weight decay, penalty, most epochs.
SIMULATORS = {
    "gptfluence-instruction": (["instruction"], "feat_shared", "AdamW", 1e-5, 1e-5, 0.0, 50),
    "gptfluence-finetune": (["finetune-sst2"], "feat_shared", "AdamW", 1e-4, 1e-5, 0.0, 300),
    "gptfluence-rte": (["finetune-rte", "gptfluence-finetune"], "feat_shared", "AdamW", 1e-6, 1e-5, 0.0, 300),
    "simfluence": (["finetune-webnlg"], "linear", "AdamW", 1e-3, 0.0, 1e-5, 300),
    "demo": (["finetune-rte"], "feat_shared", "Adam", 1e-4, 1e-5, 0.0, 1),
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*files):
    configs = [argument for file in files for argument in ("--config", f"influence/{file}.yaml")]
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stdout(printed):
        main(["fit", *configs, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(printed.getvalue())


def steps(config):
    """Optimizer steps of a recorded run."""
    options = config["data"]["init_args"]
    examples = options["sample"] * len(options["groups"])
    assert examples % options["batch_size"] == 0
    return examples // options["batch_size"] * config["trainer"]["max_epochs"]


def recorder(config, runs):
    (options,) = [
        item["init_args"]
        for item in config["trainer"]["callbacks"]
        if item["class_path"].endswith("TrainingDynamicsRecorder")
    ]
    assert options["run_id"] == f"run-{config['data']['init_args']['run']}"
    assert options["test_dataloader"] == "val"
    assert options["out_dir"].startswith(str(runs))
    assert options["every_n_steps"] == 1
    return options


@pytest.mark.parametrize("size", RECORDED)
def test_recorded_instruction_tuning(size, runs):
    name, lr, batch, epochs, expected_steps, length = RECORDED[size]
    config = parse(f"record-pythia-{size}", "record-instruction")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    backbone = model["backbone"]["init_args"]
    assert backbone["name"] == model["tokenizer"] == data["tokenizer"] == name
    assert (data["batch_size"], data["max_length"], config["trainer"]["max_epochs"]) == (batch, length, epochs)
    assert steps(config) == expected_steps
    assert data["sample"] == 128
    assert data["groups"] == [[first, first + 199] for first in range(0, 1200, 200)]
    optimizer = model["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    options = optimizer["init_args"]
    assert (options["lr"], options["eps"], options["weight_decay"]) == (lr, 1e-6, 0.001)
    assert list(options["betas"]) == [0.9, 0.999]
    schedule = model["lr_scheduler"]
    assert schedule["class_path"].endswith("WarmupLinear")
    assert (schedule["init_args"]["warmup"], schedule["init_args"]["total"]) == (0, None)
    assert config["trainer"]["precision"] == "32-true"
    adapters = {"r": 8, "alpha": 4, "dropout": 0.05, "targets": ["query_key_value"]}
    assert backbone["lora"] == (adapters if size == "2.8b" else None)
    assert recorder(config, runs)["metrics"] == {"loss": None}


@pytest.mark.parametrize("task", TASKS)
def test_recorded_fine_tuning(task, runs):
    config = parse("record-pythia-410m", f"record-finetune-{task}")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == TASKS[task][0]
    data = config["data"]["init_args"]
    assert (data["batch_size"], data["sample"], data["groups"]) == (4, 128, [[0, 199]])
    assert data["path"].split("/")[1] == data["tests"].split("/")[1] == "sft_tasks"
    assert steps(config) == 96
    metrics = recorder(config, runs)["metrics"]
    assert set(metrics) == ({"loss", "bleu", "rougeL"} if task in ("webnlg", "wmt16") else {"loss"})
    for name in set(metrics) - {"loss"}:
        assert metrics[name] == {"sample": True, "top_p": 0.95, "temperature": 0.2}


@pytest.mark.parametrize("name", SIMULATORS)
def test_simulators_of_the_paper(name):
    files, kind, optimizer, lr, decay, penalty, epochs = SIMULATORS[name]
    config = parse(f"runs-{files[0]}", *(f"simulator-{file}" for file in [*files[1:], name]))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    simulator = model["simulator"]
    assert (simulator["kind"], simulator["order"], simulator["compat"]) == (kind, 1, "released")
    assert simulator["l2_norm"] == penalty
    assert model["optimizer"]["class_path"] == f"torch.optim.{optimizer}"
    options = model["optimizer"]["init_args"]
    assert (options["lr"], options["eps"], options["weight_decay"]) == (lr, 1e-8, decay)
    assert list(options["betas"]) == [0.9, 0.999]
    assert model["lr_scheduler"]["class_path"].endswith("WarmupLinear")
    assert model["lr_scheduler"]["init_args"] == {"warmup": 200, "total": None, "floor": 0.0}
    assert model["stop"] == {"patience": 10, "reference": "previous"}
    assert model["monitor"] == "val/all_steps_mse"
    assert (data["mode"], data["gap"], data["history_pad"], data["order"]) == ("pairs", "released", "zero", 1)
    assert data["batch_size"] == 128
    trainer = config["trainer"]
    assert (trainer["max_epochs"], trainer["precision"], config["seed_everything"]) == (epochs, "32-true", 42)
    assert (data["val_runs"], data["test_runs"], data["split_seed"]) == (2, 5, 42)
    keeps = [item["init_args"] for item in trainer["callbacks"] if item["class_path"].endswith("ModelCheckpoint")]
    assert [(keep["monitor"], keep["mode"], keep["save_top_k"]) for keep in keeps] == [("val/all_steps_mse", "min", 1)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("simulator", ["gptfluence-finetune", "simfluence", "ours", "ridge"])
def test_seen_and_unseen_examples_of_the_tasks(task, simulator):
    _, seen, unseen = TASKS[task]
    options = parse(f"runs-finetune-{task}", f"simulator-{simulator}")["data"]["init_args"]
    assert options["train_ranges"] == [[0, 199]]
    assert (options["test_ranges"], options["unseen_test"]) == (seen, unseen)


def test_our_simulator():
    config = parse("runs-instruction", "simulator-ours")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    simulator = model["simulator"]
    assert (simulator["kind"], simulator["width"], simulator["compat"]) == ("feat_mlp", 64, None)
    assert model["optimizer"]["init_args"]["lr"] == 1e-3
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert model["lr_scheduler"]["init_args"] == {"warmup": 100, "total": 300, "floor": 0.0}
    assert (data["mode"], data["gap"], data["batch_size"]) == ("matrix", "unroll", None)
    assert (config["trainer"]["max_steps"], config["trainer"]["val_check_interval"]) == (300, 20)
    assert data["train_ranges"] == [[0, 1199]]


FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.mark.parametrize("simulator", ["ours", "ridge", "gptfluence-finetune", "simfluence"])
def test_simulators_run_on_the_shipped_runs(simulator, runs):
    from datamodules.assets import asset_path

    data = [f"--data.runs={asset_path('dynamics_tiny')}", "--data.test_runs=2", "--data.train_ranges=[[0,31]]"]
    if simulator not in ("ridge", "simfluence"):
        data.append(f"--data.features={asset_path('dynamics_tiny/features.safetensors')}")
    files = ["--config=influence/runs-instruction.yaml", f"--config=influence/simulator-{simulator}.yaml"]
    short = ["--trainer.max_steps=20"] if simulator != "ridge" else []
    metrics = main(["fit", *files, *data, *short, *FAST]).trainer.callback_metrics
    assert metrics["val/all_steps_mse"] >= 0
    assert (runs / "simulator-instruction/checkpoints/best.ckpt").is_file()
    if simulator == "ridge":
        assert metrics["val/all_steps_mse"] < metrics["val/persistence/all_steps_mse"]


def test_recording_runs_on_a_tiny_model(runs, tiny_lm):
    from datamodules.assets import asset_path
    from lit_models.recording import DynamicsRun

    files = [f"--config=influence/record-{name}.yaml" for name in ("pythia-14m", "instruction")]
    options = [
        f"--model.backbone.init_args.name={tiny_lm}",
        "--model.pad_token=<pad>",
        f"--data.path={asset_path('dynamics_tiny/pool.jsonl')}",
        f"--data.tests={asset_path('dynamics_tiny/tests.jsonl')}",
        "--data.groups=[[0,15],[16,31]]",
        "--data.sample=8",
        "--data.run=3",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
    ]
    main(["fit", *files, *options, *FAST])
    run = DynamicsRun.open(runs / "dynamics-instruction/run-3", strict=True)
    assert run.values().shape == (5, 12)
    assert sorted(run.ids[:2].values.tolist()) == sorted(run.ids[2:].values.tolist())
    assert run.info["seed"] == 3


def test_unseen_tests_and_a_curriculum_with_the_tiny_preset(runs):
    fit = ["--config=influence/tiny.yaml", "--data.test_ranges=[[0,7]]", *FAST]
    cli = main(["fit", *fit, "--trainer.max_steps=40"])
    assert cli.model.net.test_ids.tolist() == list(range(8))
    last = f"--ckpt_path={runs / 'influence-tiny/checkpoints/last.ckpt'}"
    seen = main(["test", *fit, last]).trainer.callback_metrics
    unseen = main(["test", *fit, last, "--data.test_on=unseen_test"]).trainer.callback_metrics
    for metrics in (seen, unseen):
        assert metrics["test/all_steps_mse"] < metrics["test/persistence/all_steps_mse"]
    assert unseen["test/all_steps_mse"] != seen["test/all_steps_mse"]
    (runs / "curricula.json").write_text('[{"ids": [[0, 1, 2], [3], []]}, {"ids": [[16, 17, 18, 19]]}]')
    predictor = main(["predict", *fit, last, f"--data.curricula={runs / 'curricula.json'}"])
    (prediction,) = predictor.trainer.predict_loop.predictions
    assert prediction["trajectory"].shape == (2, 4, 8)
    assert prediction["length"].tolist() == [3, 1]
    bad, good = prediction["trajectory"][0, 3], prediction["trajectory"][1, 1]
    start = predictor.datamodule.mean_trajectory[0]
    tests = start.new_tensor([number % 2 for number in range(8)]).bool()  # they alternate, good ones first
    assert ((bad - start)[tests] < (bad - start)[~tests].min()).all()  # bad examples help bad tests
    assert ((good - start)[~tests] < (good - start)[tests].min()).all()
