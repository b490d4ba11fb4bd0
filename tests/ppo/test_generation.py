import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_models.ppo import HuggingFaceGenerate, RowNoise, Sampler


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def prompts(rows=6, width=5, seed=0):
    ids = torch.randint(3, 100, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % (width - 1)] = 0
    return ids * mask, mask


def sample(lm, tokenizer, ids, mask, noise=None, **options):
    sampler = Sampler(**options)
    sampler.prepare(tokenizer)
    return sampler.generate(lm, ids, mask, noise or RowNoise(1, 0, len(ids)))


def test_greedy_equals_transformers_generate(lm, tokenizer):
    ids, mask = prompts()
    ours = sample(lm, tokenizer, ids, mask, max_new_tokens=9, temperature=0)
    theirs = lm.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=9, pad_token_id=0, eos_token_id=2)
    assert torch.equal(ours.response_ids, theirs[:, ids.shape[1] :])


def test_samples_depend_on_neither_padding_nor_batch_layout(lm, tokenizer):
    ids, mask = prompts()
    whole = sample(lm, tokenizer, ids, mask, max_new_tokens=8)
    padded_ids, padded_mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    padded = sample(lm, tokenizer, padded_ids, padded_mask, max_new_tokens=8)
    assert torch.equal(whole.response_ids, padded.response_ids)
    halves = [
        sample(lm, tokenizer, ids[rank::2], mask[rank::2], RowNoise(1, 0, len(ids), 1, rank, 2), max_new_tokens=8)
        for rank in (0, 1)
    ]
    for rank, half in enumerate(halves):
        width = half.response_ids.shape[1]
        assert torch.equal(half.response_ids, whole.response_ids[rank::2, :width])


def test_several_samples_per_prompt_keep_their_numbers_across_processes():
    whole = RowNoise(3, 5, total=4, samples=3).uniforms(7)
    parts = [RowNoise(3, 5, 4, 3, rank, 2).uniforms(7) for rank in (0, 1)]
    assert torch.equal(whole.view(4, 3, 7)[1::2].flatten(0, 1), parts[1])
    assert not torch.equal(whole, RowNoise(3, 6, 4, 3).uniforms(7))


def test_distribution_of_samples_follows_the_probabilities():
    sampler = Sampler(temperature=0.7)
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    uniform = (torch.arange(20000) + 0.5) / 20000
    tokens = sampler.pick(logits.expand(20000, -1), uniform)
    shares = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "allowed"), [({"top_k": 2}, {3, 0}), ({"top_p": 0.6}, {3}), ({"top_p": 0.95}, {3, 0, 1})]
)
def test_truncation_rules_tokens_out(options, allowed):
    sampler = Sampler(**options)
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(1000, -1)
    tokens = sampler.pick(logits, torch.linspace(0, 0.9999, 1000))
    assert set(tokens.tolist()) == allowed


def test_extreme_uniforms_never_pick_an_impossible_token():
    logits = torch.full((3, 10), -torch.inf)
    logits[:, 4:6] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2**-24])
    assert Sampler().pick(logits, uniform).tolist() == [4, 5, 5]


def test_mask_ends_with_the_first_end_token(lm, tokenizer):
    ids, mask = prompts(rows=40)
    with torch.no_grad():
        bias = torch.zeros(lm.config.vocab_size)
        bias[2] = 5.0
    hook = lm.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    out = sample(lm, tokenizer, ids, mask, max_new_tokens=20)
    early = sample(lm, tokenizer, ids, mask, max_new_tokens=20, min_new_tokens=4)
    hook.remove()
    assert out.ended.any()
    for row in range(len(ids)):
        length = int(out.response_mask[row].sum())
        assert (out.response_ids[row, : length - 1] != 2).all()
        assert bool(out.ended[row]) == (out.response_ids[row, length - 1].item() == 2)
        assert (out.response_ids[row, length:] == 0).all()
    assert (early.response_ids[:, :4] != 2).all()
    assert (early.response_mask.sum(1) > 4).all()


def test_one_token_and_stop_strings(lm, tokenizer):
    ids, mask = prompts()
    assert sample(lm, tokenizer, ids, mask, max_new_tokens=1).response_ids.shape == (6, 1)
    free = sample(lm, tokenizer, ids, mask, max_new_tokens=12)
    text = tokenizer.decode(free.response_ids[0, 3:5])
    stopped = sample(lm, tokenizer, ids, mask, max_new_tokens=12, stop_strings=[text])
    assert stopped.ended[0]
    assert text in tokenizer.decode(stopped.response_ids[0, stopped.response_mask[0].bool()])
    assert stopped.response_mask[0].sum() <= 5


def test_transformers_generation_is_repeatable_and_leaves_the_global_state(lm, tokenizer):
    ids, mask = prompts()
    generator = HuggingFaceGenerate(max_new_tokens=6, options={"top_k": 20})
    generator.prepare(tokenizer)
    before = torch.get_rng_state()
    first = generator.generate(lm, ids, mask, RowNoise(1, 4, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.response_ids, generator.generate(lm, ids, mask, RowNoise(1, 4, 6)).response_ids)
    assert not torch.equal(first.response_ids, generator.generate(lm, ids, mask, RowNoise(1, 5, 6)).response_ids)
    assert generator.truncates


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 200}, "min_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_options_out_of_range_are_named(options, key):
    with pytest.raises(ValueError, match=f"generator.{key}"):
        Sampler(**options)


def test_unknown_end_token_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"extra_eos_tokens.*nonsense"):
        Sampler(extra_eos_tokens=["<nonsense>"]).prepare(tokenizer)
