import json
import shutil

import pytest

from ..loading import DEFAULT_ROOT, load, load_tensors
from . import checks, curiosity_checks, macro_checks, step_checks


def test_kl_rewards(rlhf):
    checks.check_kl_rewards(rlhf("kl_rewards"))


def test_token_ppo(rlhf):
    checks.check_token_ppo(rlhf("token_ppo"))


def test_reward_model(rlhf):
    checks.check_reward_model(rlhf("reward_model"))


def test_gathered_logprobs_and_averages(rlhf):
    checks.check_misc(rlhf("data_and_misc"))


@pytest.mark.parametrize(
    "name", ["boundaries", "parsing", "macro_values", "macro_gae", "macro_losses", "spec_macro_batch"]
)
def test_macro_actions(rlhf, name):
    getattr(macro_checks, f"check_{name}")(rlhf(name))


@pytest.mark.parametrize("name", ["gate", "diversity", "selfbleu_monitor"])
def test_curiosity_and_diversity(rlhf, name):
    getattr(curiosity_checks, f"check_{name}")(rlhf(name))


def test_icm(rlhf):
    curiosity_checks.check_icm(rlhf("icm"), load_tensors("rlhf", "icm_weights"))


@pytest.mark.parametrize("name", ["full_step_ma", "full_step_cd"])
def test_full_steps(rlhf, name):
    getattr(step_checks, f"check_{name}")(rlhf(name), load_tensors("rlhf", name))


@pytest.mark.parametrize("folder", ["rlhf", "."])
def test_root_from_the_environment(folder, tmp_path, monkeypatch):
    target = tmp_path / folder
    target.mkdir(exist_ok=True)
    shutil.copy(DEFAULT_ROOT / "rlhf" / "kl_rewards.json", target)
    data = json.loads((target / "kl_rewards.json").read_text())
    data["cases"][0]["kl_ctl"] *= 1.01
    (target / "kl_rewards.json").write_text(json.dumps(data))
    monkeypatch.setenv("REFERENCE_ROOT", str(tmp_path))
    with pytest.raises(AssertionError):
        checks.check_kl_rewards(load("rlhf", "kl_rewards"))
    with pytest.raises(FileNotFoundError, match="token_ppo"):
        load("rlhf", "token_ppo")
