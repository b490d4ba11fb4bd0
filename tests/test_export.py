import copy
import subprocess
import sys

import pytest
import torch

from lit_models.backbones import FromConfig, FromPretrained, LoRA
from lit_models.export import export_checkpoint, kind_of, main
from lit_models.nn.logprobs import position_ids
from lit_models.reward import LitRewardModel
from lit_models.sft import LitSFT


@pytest.fixture
def padded():
    """Ids and mask of three right-padded texts."""
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    return ids * mask, mask


def forward(model, padded):
    with torch.no_grad():
        return model.eval()(input_ids=padded[0], attention_mask=padded[1]).logits


def checkpoint(module, trainer, path):
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def shake(module):
    """Move adapters and head away from their start, so that they matter."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_language_model_round_trip(lora, tiny_lm, tmp_path, padded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = LitSFT(FromPretrained(str(tiny_lm), lora=lora), str(tiny_lm))
    module.enable_ema(0.5)
    module.configure_model()
    shake(module.net)
    expected = forward(module.net, padded)
    folders = module.export_pretrained(tmp_path)
    assert folders == {"model": tmp_path / "model", "ema": tmp_path / "ema"}
    loaded, info = AutoModelForCausalLM.from_pretrained(folders["model"], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(forward(loaded, padded), expected, rtol=0, atol=1e-5)
    average = AutoModelForCausalLM.from_pretrained(folders["ema"])
    torch.testing.assert_close(forward(average, padded), forward(module.ema, padded), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (300, 0, 2)
    assert loaded.config.pad_token_id == 0


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_reward_model_round_trip(lora, tiny_lm, tmp_path, padded):
    from transformers import AutoModelForSequenceClassification

    module = LitRewardModel(FromPretrained(str(tiny_lm), lora=lora), str(tiny_lm))
    module.configure_model()
    shake(module.net)
    loaded = AutoModelForSequenceClassification.from_pretrained(module.export_pretrained(tmp_path)["model"])
    ids, mask = padded
    with torch.no_grad():
        tokens = module.net.eval()(ids, mask, position_ids(mask))
    last = tokens.gather(1, mask.sum(1, keepdim=True) - 1)
    torch.testing.assert_close(forward(loaded, padded), last, rtol=0, atol=1e-5)
    assert last.std() > 0.01


def test_tied_embeddings_stay_tied(tiny_tokenizer, llama_options, tmp_path, padded):
    from transformers import AutoModelForCausalLM

    module = LitSFT(FromConfig("llama", llama_options(tie_word_embeddings=True)), str(tiny_tokenizer))
    module.configure_model()
    loaded = AutoModelForCausalLM.from_pretrained(module.export_pretrained(tmp_path)["model"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(forward(loaded, padded), forward(module.net, padded), rtol=0, atol=1e-5)


def test_export_leaves_the_live_model_alone(tiny_lm, tmp_path):
    module = LitSFT(FromPretrained(str(tiny_lm), lora=LoRA(r=2)), str(tiny_lm))
    module.configure_model()
    state = copy.deepcopy(module.net.state_dict())
    config = module.net.config
    before = config.to_dict()
    module.export_pretrained(tmp_path)
    assert module.net.config is config
    assert config.to_dict() == before
    assert module.net.training
    assert state.keys() == module.net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in module.net.state_dict().items())


def test_card_says_what_it_is(tiny_lm, quiet_trainer, tmp_path):
    ids = torch.randint(3, 300, (2, 6))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    module = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm))
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    quiet_trainer(max_steps=1).fit(module, loader)
    card = (module.export_pretrained(tmp_path)["model"] / "README.md").read_text()
    assert "Written by `lit_models.sft.LitSFT` of lit-models after 1 optimizer steps." in card
    assert "| train/loss |" in card


def test_command_exports_a_checkpoint(tiny_lm, quiet_trainer, tmp_path, padded, capsys):
    from transformers import AutoModelForCausalLM

    module = LitSFT(FromPretrained(str(tiny_lm)), str(tiny_lm))
    module.enable_ema(0.9)
    module.configure_model()
    path = checkpoint(module, quiet_trainer(), tmp_path / "a.ckpt")
    main([str(path), str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        f"model: {tmp_path}/out/model",
        f"ema: {tmp_path}/out/ema",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(forward(loaded, padded), forward(module.net, padded))


def test_command_works_in_a_fresh_process(tiny_reward, quiet_trainer, tmp_path):
    module = LitRewardModel(FromPretrained(str(tiny_reward)), str(tiny_reward))
    module.configure_model()
    path = checkpoint(module, quiet_trainer(), tmp_path / "a.ckpt")
    command = [sys.executable, "-m", "lit_models.export", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_other_paths_are_refused_with_advice(tiny_lm, tmp_path, capsys):
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").touch()
    (tmp_path / "file.ckpt").touch()
    kinds = {tiny_lm: "huggingface", tmp_path / "sharded": "sharded", tmp_path: "unknown", tmp_path / "x": "unknown"}
    assert {path: kind_of(path) for path in kinds} == kinds
    assert kind_of(tmp_path / "file.ckpt") == "lightning"
    for path, words in [
        (tiny_lm, "already is"),
        (tmp_path / "sharded", "but not one with a sharded"),
        (tmp_path / "x", "no checkpoint at"),
    ]:
        with pytest.raises(ValueError, match=words):
            export_checkpoint(path, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: there is no checkpoint at"):
        main([str(tmp_path / "x"), str(tmp_path / "out")])
