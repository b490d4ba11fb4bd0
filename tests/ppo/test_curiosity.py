"""Curiosity: equivalences, gate in the sampling loop, whitening, schedules, checkpoints, and what is refused."""

import copy
from functools import partial

import pytest
import torch

from lit_models.backbones import FromPretrained, LoRA
from lit_models.ppo import (
    Curiosity,
    HuggingFaceGenerate,
    KLPenalty,
    LitPPO,
    MacroGAE,
    PPOLoss,
    RewardModel,
    RowNoise,
    Sampler,
    ScoreOptions,
    SentRewards,
    Updates,
    steps,
)
from lit_models.ppo.curiosity import ICM
from lit_models.ppo.curiosity.functional import intrinsic_reward
from lit_models.ppo.curiosity.modeling import icm_loss, prediction_error
from lit_models.ppo.curiosity.shaper import feature_spread
from lit_models.ppo.gate import Gate
from lit_models.ppo.states import StateRecorder, embed_actions
from lit_models.tokenization import load_tokenizer
from tests.ppo.test_module import assert_equal_weights, loader, trainer, weights
from tests.reference.rlhf.macro_checks import rollout_of


@pytest.fixture
def make(tiny_lm, tiny_reward, tiny_tokenizer):
    """Function that makes a module on the tiny networks."""

    def module(cls=LitPPO, **options):
        settings = {
            "actor": FromPretrained(str(tiny_lm)),
            "tokenizer": str(tiny_tokenizer),
            "rewards": [RewardModel(FromPretrained(str(tiny_reward)))],
            "generator": Sampler(max_new_tokens=6),
            "optimizer": partial(torch.optim.AdamW, lr=1e-3),
            "scores": ScoreOptions(clip=2.5),
        }
        return cls(**(settings | options))

    return module


def fit(model, folder, **options):
    run = trainer(folder, **options)
    run.fit(model, loader())
    return run


# -- equivalences ------------------------------------------------------------------------------------------------------


def test_without_weight_it_is_ppo_bit_for_bit(make, tmp_path):
    plain, curious = make(shapers=[KLPenalty()]), make(shapers=[KLPenalty(), Curiosity(eta=0.0)])
    for model in (plain, curious):
        fit(model, tmp_path)
    assert not hasattr(curious, "icm")
    assert_equal_weights(weights(plain.actor), weights(curious.actor))
    assert_equal_weights(weights(plain.critic), weights(curious.critic))


def test_likeliest_tokens_are_never_gated(tiny_lm, tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    model = FromPretrained(str(tiny_lm)).build().eval()
    sampler = Sampler(8, temperature=0.0)
    sampler.prepare(tokenizer)
    sampler.gate = Gate("topk", 1)
    prompts = torch.randint(3, 100, (4, 3))
    result = sampler.generate(model, prompts, torch.ones_like(prompts), RowNoise(0, 0, 4))
    assert result.gate.shape == result.response_ids.shape
    assert not result.gate.any()


@pytest.mark.parametrize(
    "gate", [Gate("topk", 20), Gate("topk", 100), Gate("prob", threshold=1 / 300, temperature=0.7)]
)
@pytest.mark.parametrize("kind", [Sampler, HuggingFaceGenerate])
def test_the_gate_is_that_of_recomputed_logits(tiny_lm, tiny_tokenizer, gate, kind):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    model = FromPretrained(str(tiny_lm)).build().eval()
    generator = kind(8, temperature=0.7)
    generator.prepare(tokenizer)
    generator.gate = gate
    batch = {"prompt_ids": torch.randint(3, 100, (6, 3)), "prompt_mask": torch.ones(6, 3, dtype=torch.long)}
    rollout = steps.generate(model, generator, tokenizer, batch, RowNoise(0, 0, 6))
    with torch.no_grad():
        logits = steps.policy_logits(model, rollout)
    if kind is HuggingFaceGenerate:
        gate = copy.copy(gate)
        gate.temperature = 0.7
    expected = torch.stack([gate(logits[:, step], rollout.response_ids[:, step]) for step in range(logits.shape[1])], 1)
    valid = rollout.response_mask.bool()
    assert torch.equal(rollout.gate & valid, rollout.gate)
    assert torch.equal(rollout.gate, expected & valid)
    assert 0 < rollout.gate.float().mean() < 1


# -- the module --------------------------------------------------------------------------------------------------------


def test_errors_are_half_the_distance_and_their_gradient_is_finite_at_zero():
    icm = ICM(4, 8, encoder="identity")
    for parameter in icm.parameters():
        torch.nn.init.zeros_(parameter)
    hidden = torch.zeros(1, 3, 4)
    hidden[0, 2] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    prediction = icm(hidden, torch.zeros(1, 2, 4))
    torch.testing.assert_close(prediction_error(prediction), torch.tensor([[0.0, 2.5]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(icm_loss(prediction, torch.zeros(1, 2, 4), "squared"), torch.tensor([[0.0, 12.5]]))
    prediction_error(prediction).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in icm.parameters())


@pytest.mark.parametrize("encoder", ["mlp", "identity", "random_frozen"])
def test_encoders_learn_or_not(encoder):
    icm = ICM(4, 8, encoder=encoder)
    trained = {name.split(".")[0] for name, parameter in icm.named_parameters() if parameter.requires_grad}
    assert trained == ({"encoder", "forward_model"} if encoder == "mlp" else {"forward_model"})
    icm_loss(icm(torch.randn(2, 4, 4), torch.randn(2, 3, 4)), torch.randn(2, 3, 4)).sum().backward()


def test_targets_are_detached_where_asked_for_and_actions_predicted():
    hidden, actions = torch.randn(2, 4, 4), torch.randn(2, 3, 4)
    assert ICM(4, 8)(hidden, actions).target.requires_grad
    assert not ICM(4, 8, detach_target=True)(hidden, actions).target.requires_grad
    with_inverse = ICM(4, 8, inverse_model=True)(hidden, actions)
    plain = icm_loss(with_inverse._replace(action=None), actions)
    extra = 0.5 * (with_inverse.action - actions).square().sum(-1)
    torch.testing.assert_close(icm_loss(with_inverse, actions), plain + extra)


def test_half_precision_inputs_are_computed_in_full():
    icm, hidden, actions = ICM(4, 8), torch.randn(2, 4, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        prediction = icm(hidden, actions)
    assert prediction.predicted.dtype == torch.float32
    torch.testing.assert_close(prediction.predicted, icm(hidden.float(), actions.float()).predicted)


# -- rewards -----------------------------------------------------------------------------------------------------------

ERRORS = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 9.0, 9.0, 9.0]])
MASK = torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])


@pytest.mark.parametrize("whitening", ["mean_std", "std_only", "running", "none"])
def test_whitening_knows_valid_tokens_only(whitening):
    valid = torch.tensor([1.0, 2, 3, 4])
    std = valid.std(correction=0)
    expected = {
        "mean_std": (valid - 2.5) / std,
        "std_only": valid / std,
        "running": valid / 2,
        "none": valid,
    }[whitening]
    found = intrinsic_reward(ERRORS, MASK, None, whitening, torch.tensor(2.0))
    torch.testing.assert_close(found[MASK.bool()], expected)
    assert not found[~MASK.bool()].any()


def test_a_gate_of_nothing_a_single_token_and_equal_errors_give_zero():
    assert not intrinsic_reward(ERRORS, MASK, torch.zeros(2, 4).bool()).any()
    assert not intrinsic_reward(ERRORS[1:], MASK[1:], None).any()
    assert intrinsic_reward(torch.ones(2, 4), MASK, None).abs().max() < 1e-3
    assert torch.isfinite(intrinsic_reward(ERRORS, torch.zeros(2, 4), None)).all()


def test_statistics_of_groups_of_rows():
    found = intrinsic_reward(ERRORS, MASK, None, rows=1)
    torch.testing.assert_close(found[0, :3], (torch.tensor([1.0, 2, 3]) - 2) / (2 / 3) ** 0.5)
    assert found[1, 0] == 0


def prepared(shaper, tiny_lm, rows=4, width=5):
    """A shaper with its network, and a rollout that it can shape."""
    model = FromPretrained(str(tiny_lm)).build().eval()
    torch.manual_seed(0)
    shaper.build(model, model)
    mask = torch.ones(rows, width)
    held = rollout_of(mask, reward_mask=mask, old_logprobs=torch.full((rows, width), -2.0))
    held.hidden, held.action_embeddings = torch.randn(rows, width + 1, 32), torch.randn(rows, width, 32)
    held.gate = torch.ones(rows, width).bool()
    held.noise = RowNoise(0, 0, rows)
    return held


def test_linear_schedule(tiny_lm):
    shaper = Curiosity(eta=0.0, schedule="linear", eta_end=1.0, schedule_rollouts=4)
    held = prepared(shaper, tiny_lm)
    reached = []
    for number in (0, 1, 4, 9):
        held.noise = RowNoise(0, number, 4)
        shaper.shape(held, torch.zeros(4, 5))
        reached.append(shaper.present_eta)
    assert reached == [0.0, 0.25, 1.0, 1.0]


def test_entropy_schedule_and_its_resume(tiny_lm):
    shaper = Curiosity(eta=1.0, schedule="entropy", target_entropy=4.0)
    shaper.shape(prepared(shaper, tiny_lm), torch.zeros(4, 5))  # an entropy of 2 nats per token is too low
    assert shaper.present_eta == pytest.approx(1.1)
    other = Curiosity(eta=1.0, schedule="entropy", target_entropy=1.0)
    other.load_state_dict(shaper.state_dict())
    other.shape(prepared(other, tiny_lm), torch.zeros(4, 5))
    assert other.present_eta == pytest.approx(1.1 * 0.9)


def test_running_deviation_is_that_of_all_errors_so_far(tiny_lm):
    shaper = Curiosity(whiten="running")
    held = prepared(shaper, tiny_lm)
    seen = []
    for seed in range(3):
        held.hidden = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            rewards, _ = shaper.shape(held, torch.zeros(4, 5))
            seen.append(prediction_error(shaper.network(held.hidden, held.action_embeddings)))
    std = torch.stack(seen).std(correction=0)
    torch.testing.assert_close(rewards, 0.04 * seen[-1] / std, rtol=1e-4, atol=1e-6)


def test_collapsed_features_are_warned_of_once(tiny_lm):
    shaper = Curiosity()
    held = prepared(shaper, tiny_lm)
    torch.nn.init.zeros_(shaper.network.encoder[-1].weight)
    with pytest.warns(UserWarning, match=r"features of Curiosity hardly differ .* shapers\.detach_target"):
        shaper.shape(held, torch.zeros(4, 5))
    assert feature_spread(torch.ones(1, 1, 3), torch.ones(1, 1)) == 0


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["ref_last", "ref_layer_1", "ref_layer_2"])
def test_states_are_those_that_transformers_returns(tiny_lm, states):
    model = FromPretrained(str(tiny_lm)).build().eval()
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad(), StateRecorder(model, states) as recorder:
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    expected = hidden[-1] if states == "ref_last" else hidden[int(states[-1])]
    if states == "ref_layer_2":  # transformers returns this one after the last norm
        expected = hidden[-1]
        torch.testing.assert_close(model.model.norm(recorder.states(8)), expected)
        return
    torch.testing.assert_close(recorder.states(4), expected[:, -5:])


def test_embeddings_are_rows_of_the_table_and_need_no_gradient(tiny_lm):
    model = FromPretrained(str(tiny_lm)).build()
    ids = torch.randint(3, 100, (2, 5))
    found = embed_actions(model, ids)
    assert not found.requires_grad
    assert torch.equal(found, model.get_input_embeddings().weight[ids])


# -- in training -------------------------------------------------------------------------------------------------------


def test_the_module_learns_is_logged_saved_and_resumed_exactly(make, tmp_path):
    options = {
        "shapers": [KLPenalty(), Curiosity(eta=0.1, lr=1e-2, whiten="running"), SentRewards(0.1, 0.1, sample_size=3)],
        "updates": Updates(epochs=2, minibatch_size=4, micro_batch_size=2),
        "advantage": MacroGAE("randomized"),
        "loss": PPOLoss(ratio="macro_geo", value_loss="macro"),
    }
    torch.manual_seed(7)  # of the new module's weights
    whole = make(**copy.deepcopy(options))
    run = fit(whole, tmp_path / "whole", max_epochs=2)
    logged = run.callback_metrics
    for name in ("loss", "raw_mean", "raw_std", "gate_frac", "bonus_mean", "phi_std", "grad_norm", "lr"):
        assert f"icm/{name}" in logged
    for name in ("macro/num_mean", "macro/len_max", "sent/bleu", "reward/intrinsic", "reward/extrinsic"):
        assert name in logged
    assert float(logged["icm/lr"]) == pytest.approx(1e-2)

    torch.manual_seed(7)
    first = make(**copy.deepcopy(options))
    run = fit(first, tmp_path / "half", max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"actor", "critic", "icm"}
    assert len(saved["ppo"]["shapers"][2]["pool"]) == 24
    resumed = make(**copy.deepcopy(options))
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    for name in ("actor", "critic", "icm"):
        assert_equal_weights(weights(getattr(whole, name)), weights(getattr(resumed, name)))


def test_later_epochs_leave_the_module_alone(make, tmp_path):
    models = [make(shapers=[Curiosity(eta=0.0, schedule="linear", eta_end=1e-9, schedule_rollouts=9)]) for _ in "ab"]
    models[1].updates = Updates(epochs=3)
    for model in models:
        torch.manual_seed(3)
        fit(model, tmp_path, limit_train_batches=1)
    for name, value in weights(models[0].icm).items():
        torch.testing.assert_close(value, models[1].icm.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_adapters_take_the_states_of_the_base_model(make, tmp_path, tiny_lm):
    pytest.importorskip("peft")
    model = make(actor=FromPretrained(str(tiny_lm), lora=LoRA(r=2)), shapers=[KLPenalty(), Curiosity()])
    run = fit(model, tmp_path, limit_train_batches=1)
    assert model.reference is None
    assert float(run.callback_metrics["icm/loss"]) > 0


def test_mixed_precision_trains(make, tmp_path):
    model = make(shapers=[KLPenalty(), Curiosity(eta=0.1)], advantage=MacroGAE("fixed", n=2))
    run = fit(model, tmp_path, precision="bf16-mixed")
    assert torch.isfinite(run.callback_metrics["icm/loss"])
    assert next(model.icm.parameters()).dtype == torch.float32


# -- Sent-Rewards ------------------------------------------------------------------------------------------------------


def test_repeated_responses_are_penalised():
    shaper = SentRewards(bleu_coef=2.0, cosine_coef=1.0)
    mask = torch.tensor([[1.0, 1, 1], [1.0, 1, 0]])
    held = rollout_of(mask, reward_mask=mask)
    held.responses = ["the cat sat on the mat", "something else entirely"]
    rewards, _ = shaper.shape(held, torch.zeros(2, 3))
    assert not rewards.any()  # nothing to be compared with yet
    held.responses = ["the cat sat on the mat", "no such words here"]
    rewards, metrics = shaper.shape(held, torch.zeros(2, 3))
    assert metrics["sent/bleu"].tolist() == [1.0, 0.0]
    assert rewards[0, 2] == pytest.approx(-(2 + float(metrics["sent/cosine"][0])))
    assert rewards[1, 1] == pytest.approx(-float(metrics["sent/cosine"][1]))
    assert float(metrics["sent/cosine"][0]) > float(metrics["sent/cosine"][1])
    assert rewards[0, :2].tolist() == [0, 0]


def test_the_pool_keeps_the_newest():
    shaper = SentRewards(pool_size=3)
    held = rollout_of(torch.ones(2, 1), reward_mask=torch.ones(2, 1))
    for number in range(3):
        held.responses = [f"a {number}", f"b {number}"]
        shaper.shape(held, torch.zeros(2, 1))
    assert shaper.state_dict() == {"pool": ["b 1", "a 2", "b 2"]}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": -0.1}, r"shapers\.eta of Curiosity must be at least 0, got -0\.1"),
        ({"topk": 0}, r"shapers\.topk of Curiosity must be at least 1"),
        ({"schedule": "linear"}, r"shapers\.schedule: linear needs shapers\.schedule_rollouts"),
        ({"schedule": "entropy"}, r"shapers\.schedule: entropy needs shapers\.target_entropy"),
        ({"states": "ref_layer_0"}, r"shapers\.states must be ref_last"),
        ({"whiten_rows": 0}, r"shapers\.whiten_rows must be"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        Curiosity(**options)


def test_a_reference_of_another_width_is_refused_before_training(
    make, tiny_lm, llama_options, tiny_tokenizer, tmp_path
):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**llama_options(hidden_size=16, num_attention_heads=2))).save_pretrained(tmp_path)
    model = make(reference=FromPretrained(str(tmp_path)), shapers=[Curiosity()])
    with pytest.raises(ValueError, match=r"shapers: Curiosity needs .* got 32 and 16"):
        model.configure_model()
    make(reference=FromPretrained(str(tmp_path)), shapers=[Curiosity(states="actor_last")]).configure_model()


def test_a_generator_without_a_gate_is_named(tiny_lm):
    shaper = Curiosity()
    held = prepared(shaper, tiny_lm)
    held.gate = None
    with pytest.raises(ValueError, match=r"shapers\.gate: the generator returns no Generation\.gate"):
        shaper.shape(held, torch.zeros(4, 5))


def test_shapers_that_disagree_are_refused(make):
    with pytest.raises(ValueError, match=r"model\.shapers: two of them differ in gate"):
        make(shapers=[Curiosity(topk=1), Curiosity(topk=2)])
    model = make(shapers=[Curiosity(), Curiosity()])
    with pytest.raises(ValueError, match=r"the network name 'icm' is taken"):
        model.configure_model()
    with pytest.raises(ValueError, match=r"shapers\.states: 'ref_layer_9' of a reference with 2 layers"):
        StateRecorder(FromPretrained(str(model.actor_source.name)).build(), "ref_layer_9")
