"""Every shipped configuration: all are parsed; tiny ones are run through fit, test, resume, prediction and export."""

from pathlib import Path

import pytest
import torch
import yaml

from lit_models.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml"))
COMPLETE = [name for name in PRESETS if name.split("/")[0] not in ("trainer", "logger") and "-" not in Path(name).stem]
MODELS = [name for name in PRESETS if Path(name).stem.startswith("model-")]
DATA = [name for name in PRESETS if Path(name).stem.startswith("data-")]
TINY = [name for name in PRESETS if name.endswith("/tiny.yaml")]
FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(capsys, *files):
    configs = [argument for file in files for argument in ("--config", file)]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_presets_parse(capsys, name):
    config = parse(capsys, name)
    assert config["model"]["class_path"].startswith("lit_models.")
    assert config["data"]["class_path"].startswith("datamodules.")


@pytest.mark.parametrize("model", MODELS)
def test_paper_models_parse_with_every_data_set(capsys, model):
    stage = model.split("/")[0]
    data = [name for name in DATA if name.startswith(f"{stage}/")]
    assert data
    for name in data:
        config = parse(capsys, model, name, "trainer/fsdp2.yaml")
        arguments, options = config["model"]["init_args"], config["data"]["init_args"]
        assert arguments["lr_scheduler"]["init_args"]["total"] is None  # follows the length of the run
        if options.get("streaming"):  # has no length of its own
            assert config["trainer"]["max_steps"] > 0
        else:
            assert config["trainer"]["max_epochs"] >= 1
            assert config["trainer"]["max_steps"] == -1
        assert options.get("tokenizer") == arguments.get("tokenizer")  # none where there are only images or sounds


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sft/gemma-2b-webgpt.yaml", "model.init_args.optimizer.init_args.lr", 1e-4),
        ("sft/gemma-7b-webgpt.yaml", "trainer.max_epochs", 5),
        ("reward/gemma-2b-webgpt.yaml", "model.init_args.optimizer.init_args.lr", 2e-5),
        ("reward/gemma-7b-hh.yaml", "data.init_args.batch_size", 8),
        ("reward/gemma-7b-webgpt.yaml", "data.init_args.batch_size", 4),
        ("ppo/gemma-7b-webgpt.yaml", "model.init_args.shapers.0.init_args.coef", 0.1),
        ("ppo/gemma-7b-tldr.yaml", "model.init_args.shapers.0.init_args.coef", 0.01),
    ],
)
def test_exceptions_of_the_table_override_one_value(capsys, name, key, value):
    stage, file = name.split("/")
    model, data = file.removesuffix(".yaml").rsplit("-", 1)
    found = parse(capsys, f"{stage}/model-{model}.yaml", f"{stage}/data-{data}.yaml", name)
    for part in key.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == value


@pytest.mark.parametrize("data", ["tldr", "ultrafeedback"])
@pytest.mark.parametrize(
    ("model", "eta", "rates"),
    [
        ("gemma-2b", (0.04, 0.04), (8e-6, 1e-5)),
        ("gemma-7b", (0.04, 0.04), (5e-4, 5e-4)),
        ("llama-3.2-1b", (0.06, 0.04), (1e-5, 1e-5)),
        ("llama-3.2-3b", (0.08, 0.08), (5e-6, 8e-6)),
    ],
)
def test_curiosity_of_the_paper(capsys, model, data, eta, rates):
    column = ["tldr", "ultrafeedback"].index(data)
    files = [f"ppo/model-{model}.yaml", f"ppo/data-{data}.yaml", f"ppo/cd-{model}-{data}.yaml"]
    arguments = parse(capsys, *files)["model"]["init_args"]
    kl, curiosity = (shaper["init_args"] for shaper in arguments["shapers"])
    assert curiosity["eta"] == eta[column]
    assert (curiosity["topk"], curiosity["lr"]) == (1, 1e-5)
    assert kl["coef"] == (0.1 if model == "llama-3.2-3b" else 0.05)
    assert arguments["actor_group"]["lr"] == rates[column]
    assert (arguments["actor"]["init_args"]["lora"] is not None) == (model == "gemma-7b")
    assert (
        arguments["generator"]["init_args"] | {"top_k": None, "temperature": 1.0} == arguments["generator"]["init_args"]
    )


@pytest.mark.parametrize("model", [Path(name).stem for name in MODELS if name.startswith("ppo/")])
@pytest.mark.parametrize("method", ["method-ma", "compat-official", "ma-apps", "method-cd"])
def test_methods_compose_with_every_paper_model(capsys, model, method):
    data = "data-apps" if "codegemma" in model else "data-tldr"
    arguments = parse(capsys, f"ppo/{model}.yaml", f"ppo/{data}.yaml", f"ppo/{method}.yaml")["model"]["init_args"]
    if method == "method-cd":
        assert arguments["shapers"][1]["class_path"].endswith(".Curiosity")
    else:
        options = arguments["advantage"]["init_args"]
        assert (options["n"], options["lam"]) == (10 if method == "ma-apps" else 5, 0.95)
        assert options["compat"] == ("official" if method == "compat-official" else None)


@pytest.mark.parametrize("name", sorted((CONFIGS / "architectures").glob("*.json")), ids=lambda path: path.stem)
def test_paper_networks_exist_on_the_meta_device(name):
    from lit_models.backbones import FromConfig

    billions = {
        "gemma-2b": 2.506,
        "gemma-7b": 8.538,
        "gemma-2-27b": 27.227,
        "codegemma-2b": 2.506,
        "codegemma-7b": 8.538,
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
    }
    from lit_models.ppo import Curiosity

    with torch.device("meta"):
        model = FromConfig(str(name)).build()
        scorer = FromConfig(str(name)).build_scorer()
        icm = Curiosity().build(model, model)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    assert icm.encoder[0].weight.shape == (2 * width, width)
    assert icm.forward_model.hidden[0].weight.shape == (inner, 2 * width)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions[name.stem]
    assert scorer.model.score.weight.device.type == "meta"


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_fit_test_predict_resume_and_export(name, runs):
    stage = name.split("/")[0]
    folder = runs / f"{stage}-tiny"
    cli = main(["fit", "--config", name, *FAST])
    steps = cli.trainer.max_steps
    assert cli.trainer.global_step == steps
    whole = weights(folder / "checkpoints/last.ckpt")
    exported = sorted(path.name for path in (folder / "export").iterdir())
    assert exported == (["actor", "critic"] if stage == "ppo" else ["model"])
    last = f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"
    main(["test", "--config", name, last, *FAST])
    assert main(["predict", "--config", name, last, *FAST]).trainer.predict_loop.predictions

    half = runs / "half"
    root = f"--trainer.default_root_dir={half}"
    with pytest.raises(Interrupted):
        main(["fit", "--config", name, "--config", str(stop_after(runs, steps // 2)), root, *FAST])
    resumed = main(["fit", "--config", name, root, "--ckpt_path=last", *FAST])
    assert resumed.trainer.global_step == steps
    for key, value in weights(half / "checkpoints/last.ckpt").items():
        assert torch.equal(whole[key], value), key


def stop_after(folder, batches):
    """A configuration that interrupts a run, as a signal would, so that schedules stay those of the whole run."""
    path = folder / "stop.yaml"
    path.write_text(
        "trainer:\n  callbacks+:\n    - class_path: tests.test_presets.StopAfter\n"
        f"      init_args: {{batches: {batches}}}\n"
    )
    return path


from lightning.pytorch import Callback  # noqa: E402


class Interrupted(Exception):
    """Stands for whatever ends a run too early."""


class StopAfter(Callback):
    """Ends a run after some batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.seen = 0

    def on_train_batch_start(self, *args):
        if self.seen == self.batches:
            raise Interrupted
        self.seen += 1
