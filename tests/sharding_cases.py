"""Tiny modules of every method with global batches, and processes to run them in."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from callbacks import EMA, AtomicCheckpointIO
from lit_models.nn.sharding import Sharding
from lit_models.pixel.mae_module import LitPIXEL
from lit_models.strategies import FullyShardStrategy

FORK = multiprocessing.get_context("fork")  # the children start with everything imported
ADAM = partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)
LLAMA = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDE = 4


# -- processes ---------------------------------------------------------------------------------------------------------


def together(work, folder, world=2, seconds=240):
    """What a function of the rank returns in each of some processes that know each other.

    Args:
        work: called with the rank; what it returns must be something that `torch.save` takes.
        folder: for the results.
        world: number of processes.
        seconds: after which all are ended, as one waits for another that never comes.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = [FORK.Process(target=_process, args=(work, folder, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    errors = [(folder / f"{rank}.txt").read_text() for rank in range(world) if (folder / f"{rank}.txt").is_file()]
    assert codes == [0] * world, "\n".join([f"exit codes {codes}", *errors])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _process(work, folder, rank, world, port):
    """Body of a process: the variables of torch's launcher, the work, and its result in a file."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {name: str(value) for name, value in variables.items()}
    try:
        torch.save(work(rank), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


# -- runs --------------------------------------------------------------------------------------------------------------


class Batches(Dataset):
    """This process's rows of global batches."""

    def __init__(self, batches, take):
        self.batches, self.take = batches, take

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        return self.take(self.batches[number], rank, world)


def every(batch, rank, world):
    """Rows rank, rank + world, ... of everything."""
    return {name: value[rank::world] for name, value in batch.items()}


def every_pair(batch, rank, world):
    """The same of pairs, whose first rows are the chosen texts and whose last the rejected ones."""
    return {name: value.unflatten(0, (2, -1))[:, rank::world].flatten(0, 1) for name, value in batch.items()}


class Record(Callback):
    """Logged values and gradient norms of every optimizer step."""

    def __init__(self):
        self.values, self.norms = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items() if timeless(name)})


def timeless(name):
    """Whether a logged value does not depend on the clock."""
    return "time" not in name and "per_s" not in name


@dataclass
class Case:
    """A module and its data.

    Args:
        make: builds the module from its sharding options.
        batches: global batches of an epoch.
        take: takes the rows of a process.
        options: of the trainer.
        ema: part to average; None for none.
        sharding: options of sharded runs, beside recomputation.
        more: further callbacks.
    """

    make: Any
    batches: list[Any]
    take: Any = every
    options: dict[str, Any] = field(default_factory=lambda: {"gradient_clip_val": 0.5})
    ema: str | None = "net"
    sharding: dict[str, Any] = field(default_factory=dict)
    more: list[Callback] = field(default_factory=list)

    def loader(self):
        return DataLoader(Batches(self.batches, self.take), batch_size=None)

    def fit(self, folder, sharded=None, epochs=2, ckpt_path=None, seed=7, **options):
        """Train; sharded writes checkpoints in shards (True) or in one file (False), None trains without sharding."""
        torch.manual_seed(seed)
        module = self.make(Sharding() if sharded is None else Sharding(activation_checkpointing=True, **self.sharding))
        record = Record()
        callbacks = [
            record,
            *self.more,
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ]
        if self.ema is not None:
            callbacks.append(EMA(0.9, self.ema))
        settings = {
            "accelerator": "cpu",
            "devices": int(os.environ.get("WORLD_SIZE", "1")),
            "strategy": "auto" if sharded is None else FullyShardStrategy(save_distributed_checkpoint=sharded),
            "plugins": [AtomicCheckpointIO()] if sharded is None else None,
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "max_epochs": epochs,
            "check_val_every_n_epoch": epochs,
            "callbacks": callbacks,
        }
        trainer = L.Trainer(**(settings | self.options | options))
        trainer.fit(module, self.loader(), self.loader(), ckpt_path=ckpt_path)
        return module, {
            "weights": whole_state(module),
            "values": record.values,
            "norms": record.norms,
            "steps": trainer.global_step,
            "last": {name: float(value) for name, value in trainer.callback_metrics.items() if timeless(name)},
        }


def whole_state(module):
    """State of a module, gathered where it is sharded."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    return {name: value.detach().cpu().clone() for name, value in state.items()}


# -- data --------------------------------------------------------------------------------------------------------------


def texts(rows, seed, width=9, prompt=2):
    """Right-padded rows of tokens whose first ones are not trained."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(prompt + 1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(3, 300, (rows, width), generator=generator) * mask
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < prompt), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pairs(count, seed):
    """Pairs of texts that begin alike."""
    rows = texts(2 * count, seed)
    rows["input_ids"][count:, :2] = rows["input_ids"][:count, :2]
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


def strips(rows, seed, width=8):
    """Strips of random patches, the last ones of some rows white."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 1, SIDE, width * SIDE), generator=generator, dtype=torch.uint8)
    mask = (torch.arange(width) < torch.randint(4, width + 1, (rows, 1), generator=generator)).long()
    seen = mask.repeat_interleave(SIDE, 1)[:, None, None].bool()
    return {"pixel_values": torch.where(seen, pixels, 255).to(torch.uint8), "pixel_mask": mask}


# -- methods -----------------------------------------------------------------------------------------------------------


def config(**changes):
    from lit_models.backbones import FromConfig

    return FromConfig("llama", LLAMA | changes)


def sft(tokenizer):
    from lit_models.sft import LitSFT

    backbone = config(tie_word_embeddings=True)
    return Case(lambda s: LitSFT(backbone, tokenizer, optimizer=ADAM, sharding=s), [texts(6, n) for n in range(2)])


def sft_lora(tokenizer, lm):
    from lit_models.backbones import FromPretrained, LoRA
    from lit_models.sft import LitSFT

    backbone = FromPretrained(lm, lora=LoRA(r=2, alpha=4))
    options = {"accumulate_grad_batches": 2}
    return Case(
        lambda s: LitSFT(backbone, tokenizer, optimizer=ADAM, sharding=s),
        [texts(6, n) for n in range(4)],
        options=options,
    )


def reward(tokenizer, lm):
    from lit_models.backbones import FromPretrained
    from lit_models.reward import LitRewardModel

    return Case(
        lambda s: LitRewardModel(FromPretrained(lm), tokenizer, optimizer=ADAM, sharding=s),
        [pairs(4, n) for n in range(2)],
        every_pair,
    )


def prompts(rows, seed):
    ids = torch.randint(3, 300, (rows, 4), generator=torch.Generator().manual_seed(seed))
    return {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids)}


def ppo(tokenizer, lm=None, gather=True, **options):
    """With macro actions, curiosity and a reward model; the responses differ in length."""
    from lit_models.backbones import FromPretrained, LoRA
    from lit_models.ppo import Curiosity, KLPenalty, LitPPO, MacroGAE, PPOLoss, RewardModel, Sampler, Updates

    actor = config() if lm is None else FromPretrained(lm, lora=LoRA(r=2, alpha=4, targets=["q_proj", "up_proj"]))

    def make(sharding):
        sharding.gather_to_generate = gather
        settings = {
            "rewards": [RewardModel(config())],
            "generator": Sampler(max_new_tokens=8, extra_eos_tokens=many_tokens(tokenizer)),
            "shapers": [KLPenalty(0.1), Curiosity(states="ref_last" if lm is None else "actor_last", epochs=1)],
            "advantage": MacroGAE(),
            "loss": PPOLoss(ratio="macro", value_loss="macro"),
            "updates": Updates(epochs=2, minibatch_size=None, micro_batch_size=2, max_grad_norm=0.5),
            "optimizer": ADAM,
        }
        return LitPPO(actor, tokenizer, **(settings | options), sharding=sharding)

    return Case(make, [prompts(6, n) for n in range(2)], options={}, ema="actor")


def many_tokens(tokenizer):
    """Every fourth token of a vocabulary: a response ends with one of them, sooner or later."""
    from transformers import AutoTokenizer

    return sorted(AutoTokenizer.from_pretrained(tokenizer).get_vocab())[::4]


PIXEL = LLAMA | {"image_size": [SIDE, 16 * SIDE], "patch_size": SIDE, "num_channels": 1, "max_position_embeddings": 64}
del PIXEL["pad_token_id"], PIXEL["bos_token_id"], PIXEL["eos_token_id"]


def pixel(tokenizer, modes=("pixel", "text", "pair", "pixel")):
    """Two batches for each step, which differ in what they hold."""
    from lit_models.pixel import FromPixelConfig, LitPixelLM

    made = {
        "pixel": lambda n: strips(6, n),
        "text": lambda n: texts(6, n),
        "pair": lambda n: strips(6, n) | texts(6, n),
    }
    return Case(
        lambda s: LitPixelLM(FromPixelConfig(PIXEL), tokenizer, max_read_tokens=6, optimizer=ADAM, sharding=s),
        [made[mode](n) for n, mode in enumerate(modes)],
        options={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    )


class Masked(LitPIXEL):
    """Takes the masks of the batches, which belong to their rows."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


def mae():
    from lit_models.pixel.mae_recipes import FromPIXELConfig

    values = {name: LLAMA[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    sizes = values | {f"decoder_{name}": value for name, value in values.items()}
    sizes |= {"num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "hidden_dropout_prob": 0.0}
    sizes |= {
        "attention_probs_dropout_prob": 0.0,
        "image_size": [SIDE, 16 * SIDE],
        "patch_size": SIDE,
        "num_channels": 1,
    }
    batches = [strips(6, n) | {"noise": torch.rand(6, 8, generator=torch.Generator().manual_seed(n))} for n in range(2)]
    return Case(lambda s: Masked(FromPIXELConfig(sizes), None, optimizer=ADAM, sharding=s), batches)


def task():
    from lit_models.pixel import FromPixelConfig, LitPixelTask

    batches = [strips(6, n) | {"label": torch.tensor([0, 1, 2, 0, 1, 2])} for n in range(2)]
    return Case(lambda s: LitPixelTask(FromPixelConfig(PIXEL), num_labels=3, optimizer=ADAM, sharding=s), batches)


def influence():
    from lit_models.influence import LitInfluence, SimulatorOptions

    def draw(seed, *shape):
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

    def make(sharding):
        sizes = {"num_train": 10, "num_test": 5, "feature_dim": 6, "lr_reference": 1e-3, "batch_reference": 3}
        module = LitInfluence(SimulatorOptions(kind="feat_mlp", width=8), **sizes, optimizer=ADAM, sharding=sharding)
        module._asked = {
            "pool_ids": torch.arange(10),
            "test_ids": torch.arange(5),
            "train_features": draw(1, 10, 6),
            "test_features": draw(2, 5, 6),
        }.get
        return module

    ids = torch.randint(0, 10, (2, 6, 4, 3), generator=torch.Generator().manual_seed(0))
    batches = [
        {"ids": ids[n], "values": 1 + draw(n, 6, 5, 5), "lr_scale": torch.ones(6, 4), "run": torch.arange(6)}
        for n in range(2)
    ]
    return Case(make, batches)


def waveform():
    """With a trained text encoder."""
    from lit_models.diffusion import LitWaveform, SmallText, WaveformUNet

    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "max_tokens": 8}
    text = SmallText("byt5", **sizes)
    unet = WaveformUNet(
        sample_size=64,
        sample_rate=4000,
        in_channels=1,
        channels=[8, 16],
        rep=1,
        attn_from_level=2,
        head_dim=8,
        time_dim=4,
    )

    def make(sharding):
        return LitWaveform(unet, text=text, train_text_encoder=True, optimizer=ADAM, sharding=sharding)

    def batch(number):
        generator = torch.Generator().manual_seed(number)
        words = ["a flute", "a harp, slow", "drums", "one low note", "a choir", "rain"]
        return {
            "audio": torch.randn(6, 1, 64, generator=generator),
            "text": words[number:] + words[:number],
            "valid_length": torch.full((6,), 64),
            "index": torch.arange(6 * number, 6 * number + 6),
        }

    return Case(make, [batch(0), batch(1)])


def cases(tokenizer, lm):
    """All of them by name."""
    return {
        "sft": sft(tokenizer),
        "sft_lora": sft_lora(tokenizer, lm),
        "reward": reward(tokenizer, lm),
        "ppo": ppo(tokenizer),
        "ppo_lora": ppo(tokenizer, lm, gather=False),
        "pixel": pixel(tokenizer),
        "pixel_images": pixel(tokenizer, ("pixel",) * 4),
        "mae": mae(),
        "task": task(),
        "influence": influence(),
        "waveform": waveform(),
    }
