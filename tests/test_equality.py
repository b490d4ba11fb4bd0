"""One process and two (gloo) with the same global batches: the same losses, weights and evaluation for every method.

Every case trains for three updates and then evaluates rows that two processes cannot divide equally, or a single row,
of which the second process has none.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import SGD

from callbacks import EMA
from datamodules import (
    DynamicsData,
    FolkWave,
    PixelSnippetRatings,
    PixelSnippets,
    PromptsWithText,
    SnippetInstructions,
    SnippetPreferences,
    SnippetPrompts,
    asset_path,
)
from lit_models.backbones import FromConfig, FromPretrained, LoRA
from lit_models.diffusion import LitWaveform, SmallText, Times, WaveformUNet
from lit_models.influence import LitInfluence, SimulatorOptions
from lit_models.influence.module import RolloutLoss
from lit_models.pixel import FromPIXELConfig, FromPixelConfig, LitPIXEL, LitPixelLM, LitPixelTask
from lit_models.ppo import (
    Curiosity,
    FunctionReward,
    KLPenalty,
    LitPPO,
    MacroGAE,
    PPOLoss,
    RewardModel,
    Sampler,
    SentRewards,
    Updates,
)
from lit_models.reward import LitRewardModel
from lit_models.reward.module import RewardLoss
from lit_models.sft import LitSFT
from lit_models.strategies import FullyShardStrategy
from tests.datamodules.pixel_fakes import Bars
from tests.sharding_cases import timeless, together

GLOBAL = 8  # rows of a batch on all processes
UPDATES = 3
TOKENIZER = asset_path("movie_snippets/tokenizer")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STRIPS = {"image_size": [8, 512], "patch_size": 8, "num_channels": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {f"decoder_{name}": value for name, value in SMALL.items()}
MAE = {**SMALL, **STRIPS, **NO_DROPOUT, **DECODER, "image_size": [8, 128]}
UNET = {"sample_size": 256, "sample_rate": 1000, "in_channels": 1, "channels": [16, 32], "patch": 8, "rep": 1}
UNET |= {"attn_from_level": 2}
TUNES = {"sample_rate": 1000, "length": 256, "instruments": ["flute", "harp"], "scale": "std", "level": 0.15}
DYNAMICS = {"runs": asset_path("dynamics_tiny"), "features": asset_path("dynamics_tiny/features.safetensors")}

# Of steep SGD, since Adam takes a whole step into a gradient that is almost 0, whose sign is not reliable.
OPTIMIZER = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
TOLERANCE = 1e-5


PRETRAINED = {}  # folder of a network to adapt


@pytest.fixture(autouse=True, scope="module")
def pretrained(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("pretrained"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama().build().save_pretrained(path)
    PRETRAINED["path"] = path


def llama():
    return FromConfig("llama", LLAMA)


def adapted():
    """With adapters that learn fast, since one of their factors is 0 at first."""
    return FromPretrained(PRETRAINED["path"], lora=LoRA(r=4, alpha=64, targets=["q_proj", "down_proj"]))


def ppo(world, actor=None, **options):
    """Minibatches of half a rollout, in two parts each."""
    rewards = [FunctionReward("lit_models.ppo.rewards.target_length", arguments={"target": 4}), RewardModel(llama())]
    updates = Updates(epochs=2, minibatch_size=8 // world, micro_batch_size=4 // world)
    options = {"generator": Sampler(max_new_tokens=6), "updates": updates, "samples_per_prompt": 2} | options
    return LitPPO(actor or llama(), TOKENIZER, rewards, optimizer=OPTIMIZER, **options)


def macro(world):
    estimator = MacroGAE("randomized", whiten_advantages=True)
    return ppo(world, advantage=estimator, loss=PPOLoss(ratio="macro", value_loss="macro"))


def curious(world):
    shapers = [KLPenalty(), Curiosity(eta=0.1, whiten="running", lr=1e-3), SentRewards(0.1, 0.1, sample_size=5)]
    return ppo(world, shapers=shapers)


def pixel_lm(world):
    net = FromPixelConfig({**LLAMA, **STRIPS, "max_position_embeddings": 128})
    return LitPixelLM(net, TOKENIZER, max_read_tokens=0, optimizer=OPTIMIZER)


def pixel_task(world, **options):
    net = FromPixelConfig({**LLAMA, **STRIPS, "max_position_embeddings": 128})
    return LitPixelTask(net, tokenizer=TOKENIZER, optimizer=OPTIMIZER, **options)


def simulator(world, **options):
    return LitInfluence(SimulatorOptions("feat_mlp", width=8), optimizer=OPTIMIZER, **options)


def waveform(world, **options):
    text = SmallText(asset_path("folk_words"), d_model=16, num_layers=1, num_heads=2, d_ff=32, max_tokens=24)
    return LitWaveform(WaveformUNet(**UNET), text, train_text_encoder=True, optimizer=OPTIMIZER, **options)


def texts(rows, limit_train=64, **sizes):
    return SnippetInstructions(limit_train=limit_train, limit_val=rows, **sizes)


def few(data, rows, **sizes):
    """Five training rows, fewer than a batch: one process takes three of them and the other two."""
    return data(rows, limit_train=5, **sizes)


def pairs(rows, limit_train=64, **sizes):
    return SnippetPreferences(n_train_pairs=limit_train, n_test_pairs=rows, **sizes)


def prompts(rows, **sizes):
    return SnippetPrompts(limit_train=64, limit_val=rows, **sizes)


def prompts_with_texts(rows, **sizes):
    return PromptsWithText(prompts(rows, **sizes), texts(rows, **sizes))


def pixels(rows, modes, **sizes):
    return PixelSnippets(Bars(64), modes=modes, limit_train=64, limit_val=rows, **sizes)


def packed(rows, **sizes):
    return PixelSnippets(Bars(64), limit_train=300, limit_val=3 * rows, pack=True, **sizes)


def whole_strips(rows, **sizes):
    """Strips of one length, since a share of all patches of a batch is hidden, padding included."""
    return PixelSnippets(Bars(16), limit_train=64, limit_val=rows, pad_to_max=True, **sizes)


def ratings(rows, **sizes):
    return PixelSnippetRatings(Bars(64), input="pair", limit_train=64, limit_val=rows, **sizes)


def recorded(rows, **options):
    return DynamicsData(**DYNAMICS, val_runs=rows, test_runs=0, **options)


CYCLE = ["image", "text", "pair"]
# Module for a number of processes, data module for a number of rows to evaluate, that number, accumulated batches.
CASES = {
    "sft": (lambda world: LitSFT(llama(), TOKENIZER, optimizer=OPTIMIZER), texts, 5, 1),
    "sft accumulated": (lambda world: LitSFT(llama(), TOKENIZER, optimizer=OPTIMIZER), texts, 1, 2),
    "sft lora": (lambda world: LitSFT(adapted(), TOKENIZER, optimizer=OPTIMIZER), texts, 5, 1),
    "reward": (
        lambda world: LitRewardModel(llama(), TOKENIZER, optimizer=OPTIMIZER),
        pairs,
        5,
        1,
    ),
    "reward per token": (
        lambda world: LitRewardModel(llama(), TOKENIZER, loss=RewardLoss("per_token"), optimizer=OPTIMIZER),
        pairs,
        1,
        2,
    ),
    "sft, few": (lambda world: LitSFT(llama(), TOKENIZER, optimizer=OPTIMIZER), partial(few, texts), 5, 1),
    "reward, few": (lambda world: LitRewardModel(llama(), TOKENIZER, optimizer=OPTIMIZER), partial(few, pairs), 5, 1),
    "ppo": (ppo, prompts, 5, 1),
    "ppo with texts": (partial(ppo, ptx_coef=0.5), prompts_with_texts, 1, 1),
    "ppo lora": (lambda world: ppo(world, actor=adapted(), critic=llama()), prompts, 1, 1),
    "ppo macro": (macro, prompts, 5, 1),
    "ppo curious": (curious, prompts, 1, 1),
    "pixel strips": (pixel_lm, partial(pixels, modes=["image"]), 5, 1),
    "pixel pairs": (pixel_lm, partial(pixels, modes=["pair"]), 1, 1),
    "pixel mixed accumulated": (pixel_lm, partial(pixels, modes=CYCLE), 5, 3),
    "pixel packed": (pixel_lm, packed, 5, 1),
    "mae": (lambda world: LitPIXEL(FromPIXELConfig(MAE), optimizer=OPTIMIZER), whole_strips, 5, 1),
    "mae accumulated": (lambda world: LitPIXEL(FromPIXELConfig(MAE), optimizer=OPTIMIZER), whole_strips, 1, 2),
    "pixel task": (partial(pixel_task, labels=["negative", "positive"]), ratings, 5, 2),
    "pixel regression": (
        partial(pixel_task, task="regression", num_labels=1),
        partial(ratings, task="regression"),
        1,
        1,
    ),
    "influence": (simulator, recorded, 3, 1),
    "influence whole": (simulator, lambda rows, batch_size, **sizes: recorded(rows, batch_size=None, **sizes), 1, 1),
    "influence runs": (partial(simulator, rollout=RolloutLoss(0.5, 4)), partial(recorded, mode="runs"), 5, 1),
    "influence pairs": (simulator, partial(recorded, mode="pairs"), 1, 2),
    "waveform": (waveform, lambda rows, **sizes: FolkWave(**TUNES, limit_val=rows, **sizes), 5, 1),
    "waveform, few": (
        partial(waveform, times=Times(sequence="stratified")),
        lambda rows, **sizes: FolkWave(**TUNES, limit_train=5, limit_val=rows, **sizes),
        5,
        1,
    ),
    "waveform accumulated": (waveform, lambda rows, **sizes: FolkWave(**TUNES, limit_val=rows, **sizes), 1, 2),
}


class Record(Callback):
    """Metrics after every batch, and those of the evaluation."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(numbers(trainer))

    def on_fit_end(self, trainer, module):
        self.seen.append(numbers(trainer))


def numbers(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items() if timeless(name)}


def processes(folder, world, sharded, **options):
    """Trainer of one of some processes, which says nothing."""
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardStrategy() if sharded else "ddp" if world > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        **options,
    )


def fit(case, folder, world=1, sharded=False, rows=None):
    """Train and evaluate as one of some processes; returns metrics and weights."""
    make_model, make_data, usual_rows, accumulate = CASES[case]
    evaluated = (4 if rows else 2) // world
    make_model = partial(make_model, eval_temperature=0.0) if rows and case == "ppo" else make_model
    data = make_data(rows or usual_rows, batch_size=GLOBAL // world, val_batch_size=evaluated)
    record = Record()
    trainer = processes(
        folder,
        world,
        sharded,
        enable_checkpointing=False,
        enable_model_summary=False,
        max_epochs=UPDATES if case.endswith(("few", "whole", "runs")) else 1,
        limit_train_batches=(1 if rows else UPDATES) * accumulate,
        num_sanity_val_steps=0,
        callbacks=[record],
        **({} if accumulate == 1 else {"accumulate_grad_batches": accumulate}),
    )
    module = make_model(world)
    torch.manual_seed(0)
    trainer.fit(module, datamodule=data)
    return record.seen, {} if sharded else module.state_dict()


def assert_same(alone, seen):
    assert len(seen) == len(alone)
    for step, (one, two) in enumerate(zip(alone, seen, strict=True)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), (step, name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, tmp_path):
    alone, weights = fit(case, tmp_path)
    losses = [name for name in alone[0] if "loss" in name]
    moved = [abs(alone[0][name] - seen[name]) for seen in alone[:-1] for name in losses]
    assert max(moved) > 100 * TOLERANCE, "nothing was learnt"
    assert any(name.startswith("val/") for name in alone[-1])
    for seen, state in together(lambda rank: fit(case, tmp_path, 2), tmp_path):
        assert_same(alone, seen)
        assert state.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@pytest.mark.parametrize("case", ["reward", "influence", "waveform, few"])
def test_forked_processes_hand_everything_back(case, tmp_path):
    """To a parent that has neither built networks, nor seen data or callbacks."""
    make_model, make_data, rows, _ = CASES[case]
    ends = []
    for world in (1, 2):
        module = make_model(world)
        options = {"limit_train_batches": 2, "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy="auto" if world == 1 else "ddp_fork",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            callbacks=[EMA(0.5)],
            **options,
        )
        torch.manual_seed(0)
        trainer.fit(module, datamodule=make_data(rows, batch_size=GLOBAL // world, val_batch_size=2))
        rest = {}
        module.on_save_checkpoint(rest)
        again = make_data(rows, batch_size=GLOBAL // world, val_batch_size=2)
        (metrics,) = trainer.validate(module, again, verbose=False)
        ends.append((rest, module.state_dict(), metrics))
    (rest, weights, metrics), (other_rest, other_weights, other_metrics) = ends
    assert any(name.startswith("ema.") for name in weights)
    assert other_rest.keys() == rest.keys()
    assert other_rest["hyper_parameters"] == rest["hyper_parameters"]
    assert other_rest["ema_updates"] == rest["ema_updates"] > 0
    torch.testing.assert_close(other_weights, weights, atol=TOLERANCE, rtol=TOLERANCE)
    assert other_metrics == pytest.approx(metrics, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)


SHARDED = ["sft", "reward", "ppo", "pixel mixed accumulated", "mae", "pixel task", "influence", "waveform"]


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_processes_evaluate_rows_that_cannot_be_divided(case, tmp_path):
    """Every batch needs both processes, and of the last row, after two batches of two, one would have none."""
    alone, _ = fit(case, tmp_path, rows=5)
    for seen, _ in together(lambda rank: fit(case, tmp_path, 2, sharded=True, rows=5), tmp_path, seconds=60):
        assert_same(alone, seen)


def predict(case, folder, world=1, sharded=False):
    """Predictions of this process for five rows, by the name of a value."""
    make_model, make_data, *_ = CASES[case]
    data = make_data(5, batch_size=GLOBAL // world, val_batch_size=4 // world)
    data.setup("predict")
    whole = data.datasets["predict"]
    data.datasets["predict"] = few_of(whole)
    trainer = processes(folder, world, sharded)
    torch.manual_seed(0)
    batches = trainer.predict(make_model(world), datamodule=data)
    name = {"sft": "nll", "mae": "loss", "pixel task": "probability", "reward": "chosen"}[case]
    return [value for batch in batches for value in batch[name].tolist()]


def few_of(rows):
    """The first five rows of a data set."""
    if isinstance(rows, list):
        return rows[:5]
    small = copy.copy(rows)
    for name in ("starts", "labels"):
        if hasattr(small, name):
            setattr(small, name, getattr(small, name)[: 6 if name == "starts" else 5])
    return small


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("case", ["sft", "reward", "mae", "pixel task"])
def test_every_row_is_predicted_once(case, sharded, tmp_path):
    alone = predict(case, tmp_path)
    ranks = together(lambda rank: predict(case, tmp_path, 2, sharded), tmp_path, seconds=60)
    assert [len(values) for values in ranks] == [3, 2]
    merged = [value for pair in itertools.zip_longest(*ranks) for value in pair if value is not None]
    assert merged == pytest.approx(alone, abs=TOLERANCE)


def test_ppo_refuses_prompts_that_cannot_be_divided(tmp_path):
    def refused(rank):
        data = SnippetPrompts(limit_train=5, limit_val=2, batch_size=4)
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
        with pytest.raises(ValueError, match=r"^data\.batch_size: the 5 prompts of a rollout cannot be divided"):
            trainer.fit(ppo(2), datamodule=data)

    together(refused, tmp_path)
