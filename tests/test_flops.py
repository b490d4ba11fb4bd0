"""Operations of networks: by hand, by torch's counter, and of one training step of every method."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lit_models.backbones import FromConfig, FromModule, LoRA
from lit_models.diffusion.modeling import WaveformUNet1DModel
from lit_models.nn.flops import TransformerCost, counted_flops, forward_flops, training_flops, transformer_cost
from lit_models.pixel import FromPixelConfig, LitPixelLM
from lit_models.pixel.finetune import LitPixelTask
from lit_models.pixel.mae_module import LitPIXEL
from lit_models.pixel.mae_recipes import FromPIXELConfig
from lit_models.ppo import FunctionReward, LitPPO, RewardModel, Sampler, Updates
from lit_models.reward import LitRewardModel
from lit_models.sft import LitSFT

SGD = partial(torch.optim.SGD, lr=0.1)
B, T = 3, 40


@pytest.fixture
def llama(llama_options):
    """Function that makes a Llama whose attention torch's counter sees."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**values):
        return LlamaForCausalLM(LlamaConfig(**llama_options(attn_implementation="eager", **values)))

    return make


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def test_a_llama_by_hand(llama):
    cost = transformer_cost(llama())
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # queries and output, keys and values of half the heads, gated MLP
    assert cost == TransformerCost(2 * layer + 300 * 32, 2 * layer + 300 * 32, 2 * 4 * 8)
    lengths = torch.tensor([5, 3])
    by_hand = 8 * 6 * cost.weights + 12 * 64 * (5 * 5 + 3 * 3)
    assert float(training_flops(cost, lengths)) == by_hand
    assert float(forward_flops(cost, lengths)) == by_hand / 3


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": True}, {"head_dim": 16, "num_key_value_heads": 4}])
def test_a_llama_by_the_counter(llama, values):
    model, ids = llama(**values), torch.randint(0, 300, (B, T))
    lengths = torch.full((B,), T)
    forward = counted(lambda: model(input_ids=ids, use_cache=False))
    assert forward_flops(transformer_cost(model), lengths) == forward
    both = counted(lambda: model(input_ids=ids, use_cache=False).logits.sum().backward())
    assert training_flops(transformer_cost(model), lengths) == both


def test_transposed_layers_of_gpt2_count():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager"))
    forward = counted(lambda: model(input_ids=torch.ones(B, T, dtype=torch.long), use_cache=False))
    assert forward_flops(transformer_cost(model), torch.full((B,), T)) == forward


def test_weights_that_are_not_trained_take_less(llama):
    model = llama()
    LoRA(r=2).apply(model)
    cost = transformer_cost(model)
    assert cost.trained < cost.weights / 5
    both = counted(lambda: model(input_ids=torch.ones(B, T, dtype=torch.long), use_cache=False).logits.sum().backward())
    assert float(training_flops(cost, torch.full((B,), T))) == pytest.approx(both, rel=0.05)


def test_nothing_depends_on_the_device_of_the_weights(llama):
    with torch.device("meta"):
        model = llama()
    assert transformer_cost(model) == transformer_cost(llama())


def test_long_texts_of_large_models_are_no_overflow():
    cost = TransformerCost(10**12, 10**12, 10**6)
    lengths = torch.full((4096,), 10**6, dtype=torch.int32)
    assert float(training_flops(cost, lengths)) == pytest.approx(6e12 * 4096e6 + 12e6 * 4096e12, rel=1e-5)


@pytest.mark.parametrize("text_dim", [None, 8])
def test_a_unet_by_shapes_alone(text_dim):
    sizes = {"in_channels": 1, "channels": (16, 32, 32), "rep": 2, "attn_from_level": 3, "text_dim": text_dim}
    network = WaveformUNet1DModel(**sizes)
    inputs = [torch.randn(2, 1, 512), torch.rand(2)]
    inputs += [] if text_dim is None else [torch.randn(2, 8), torch.randn(2, 5, 8)]
    with torch.no_grad():
        expected = counted(lambda: network(*inputs))
    found = counted_flops(network, *inputs)
    assert found == expected > 0
    assert counted_flops(network, *(value.to("meta") for value in inputs)) == found
    assert 3 * found == pytest.approx(counted(lambda: network(*inputs).sample.sum().backward()), rel=0.02)


# -- methods -----------------------------------------------------------------------------------------------------------


def of_one_step(module, rows, trainer):
    """Counted operations of one training step, and what the module says."""
    run = trainer(max_steps=1)
    module.configure_model()
    assert module.step_flops() is None
    assert module.step_stats() == {}
    found = counted(lambda: run.fit(module, DataLoader([rows], batch_size=None)))
    return found, float(module.step_flops())


def texts(rows=B):
    ids = torch.randint(3, 300, (rows, T))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def strips(side, number, rows=B):
    pixels = torch.randint(0, 256, (rows, 1, side, number * side), dtype=torch.uint8)
    return {"pixel_values": pixels, "pixel_mask": torch.ones(rows, number, dtype=torch.long)}


def backbone(options, **values):
    return FromConfig("llama", options(**values), attn="eager")


def test_fine_tuning(llama_options, tiny_tokenizer, quiet_trainer):
    module = LitSFT(backbone(llama_options), str(tiny_tokenizer), optimizer=SGD)
    found, told = of_one_step(module, texts(), quiet_trainer)
    assert told == found
    assert module.step_stats() == {"tokens": B * T}


def test_reward_models(llama_options, tiny_tokenizer, quiet_trainer):
    module = LitRewardModel(backbone(llama_options), str(tiny_tokenizer), optimizer=SGD)
    rows = texts(4)
    del rows["labels"]
    found, told = of_one_step(module, rows, quiet_trainer)
    assert told == found


PIXEL = {
    "image_size": [4, 64],
    "patch_size": 4,
    "num_channels": 1,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("mode", ["pixel", "text", "pair"])
def test_pixel_language_models(tiny_tokenizer, quiet_trainer, mode):
    module = LitPixelLM(FromPixelConfig(PIXEL), str(tiny_tokenizer), optimizer=SGD)
    rows = (strips(4, 16) if mode != "text" else {}) | (texts() if mode != "pixel" else {})
    found, told = of_one_step(module, rows, quiet_trainer)
    assert told == pytest.approx(found, rel=0.03)
    patches, tokens = (16 * B if mode != "text" else 0), (T * B if mode != "pixel" else 0)
    assert module.step_stats() == {"tokens": patches + tokens, "patches": patches}


MAE = {
    "image_size": [4, 64],
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "decoder_hidden_size": 24,
    "decoder_intermediate_size": 48,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


def test_masked_autoencoders(quiet_trainer):
    module = LitPIXEL(FromPIXELConfig(MAE), optimizer=SGD)
    found, told = of_one_step(module, strips(4, 16), quiet_trainer)
    assert told == pytest.approx(found, rel=0.05)
    assert module.step_stats() == {"tokens": 16 * B, "patches": 16 * B}


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("recipe", [FromPixelConfig(PIXEL), FromPIXELConfig(MAE)], ids=["gpt", "mae"])
def test_labels_on_strips(quiet_trainer, recipe, probe):
    module = LitPixelTask(recipe, labels=["no", "yes"], linear_probe=probe, optimizer=SGD)
    rows = strips(4, 16) | {"label": torch.tensor([0, 1, 1])}
    found, told = of_one_step(module, rows, quiet_trainer)
    assert told == pytest.approx(found, rel=0.1)  # of which the class token and the pooling are most
    assert module.step_stats() == {"tokens": 16 * B, "patches": 16 * B}


@pytest.mark.parametrize("updates", [Updates(), Updates(epochs=2, minibatch_size=4)], ids=["one", "several"])
@pytest.mark.parametrize("scored", [False, True])
def test_rollouts(llama_options, tiny_tokenizer, quiet_trainer, updates, scored):
    rewards = [FunctionReward("lit_models.ppo.rewards.target_length", arguments={"target": 4})]
    if scored:
        rewards.append(RewardModel(backbone(llama_options)))
    module = LitPPO(
        backbone(llama_options),
        str(tiny_tokenizer),
        rewards,
        generator=Sampler(max_new_tokens=16, min_new_tokens=16),
        updates=updates,
        optimizer=SGD,
    )
    prompts = {"prompt_ids": torch.randint(3, 300, (8, 24)), "prompt_mask": torch.ones(8, 24, dtype=torch.long)}
    run = quiet_trainer(max_epochs=1)
    assert module.step_stats() == {}
    assert module.step_flops() is None
    found = counted(lambda: run.fit(module, DataLoader([prompts], batch_size=None)))
    assert float(module.step_flops()) == pytest.approx(found, rel=0.05)
    stats = module.step_stats()
    assert (stats["tokens"], stats["responses"]) == (8 * 40, 8)
    assert stats["generate_s"] > 0
    assert stats["score_s"] > 0
    norms = [float(run.callback_metrics[f"{name}/grad_norm"]) for name in ("policy", "value")]
    assert stats["grad_norm"] == pytest.approx(torch.tensor(norms).norm().item())


def test_a_module_that_was_given_its_network(llama, tiny_tokenizer, quiet_trainer):
    module = LitSFT(FromModule(llama()), str(tiny_tokenizer), optimizer=SGD)
    found, told = of_one_step(module, texts(), quiet_trainer)
    assert told == found
