import json
import shutil

import pytest

from ..loading import DEFAULT_ROOT, load
from . import checks


def test_kl_rewards(rlhf):
    checks.check_kl_rewards(rlhf("kl_rewards"))


def test_token_ppo(rlhf):
    checks.check_token_ppo(rlhf("token_ppo"))


def test_reward_model(rlhf):
    checks.check_reward_model(rlhf("reward_model"))


def test_gathered_logprobs_and_averages(rlhf):
    checks.check_misc(rlhf("data_and_misc"))


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
