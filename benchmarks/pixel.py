"""What pixel language models learn, on 23,655 rated English sentences; about 20 minutes per seed on two CPU cores.

`python benchmarks/pixel.py [a] [b1] [probe] [--seeds 1 2 3]`

a      next-patch prediction against repeating a patch, the mean patch, and ridge regression from one patch to the next
b1     reading: next-token prediction in pairs, given the right strip and that of another text
probe  source of a sentence from frozen states (b2), and the same on misspelt sentences (c): PixelGPT, DualGPT, TextGPT,
       and trunks that were never trained

The sentences come from the source distribution of vaderSentiment 3.3.2 (MIT), which pip fetches once into `runs`.
"""

import argparse
import csv
import html
import io
import json
import math
import random
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path("runs/pixel")
SOURCES = ("movieReviewSnippets", "nytEditorialSnippets", "tweets", "amazonReviewSnippets")
TEST = 2000
TRUNK = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "patch_size": 16,
    "num_channels": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


# -- data ------------------------------------------------------------------------------------------------------------


def sentences() -> tuple[list[str], list[int]]:
    """Sentences and the number of their source, test sentences first."""
    archive = ROOT / "data/vaderSentiment-3.3.2.tar.gz"
    if not archive.is_file():
        fetch = [
            "download",
            "-q",
            "--no-binary",
            ":all:",
            "--no-deps",
            "-d",
            str(archive.parent),
            "vaderSentiment==3.3.2",
        ]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        data = packed.read()
    rows: list[tuple[str, int]] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        for label, source in enumerate(SOURCES):
            name = next(m for m in files.getmembers() if m.name.endswith(f"{source}_GroundTruth.txt"))
            stream = files.extractfile(name)
            assert stream is not None
            lines = stream.read().decode("utf-8", "replace").splitlines()
            texts = [row[2] for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 3]
            rows += [(" ".join(html.unescape(text).split()), label) for text in texts]
    rows = [row for row in rows if len(row[0]) >= 8]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[index][0] for index in order], [rows[index][1] for index in order]


def write_rows(path: Path, texts: Iterable[str]) -> str:
    """A JSONL file of texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return str(path)


def tokenizer(texts: list[str], size: int, spaced: bool = False) -> str:
    """Folder of a byte-level BPE of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = ROOT / f"data/bpe-{size}"
    if not folder.is_dir():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        bpe.decoder = decoders.ByteLevel()
        special = ["<pad>", "<s>", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
        )
        names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    return str(folder)


def batch_of(texts: list[str], renderer: Any = None, tokens: Any = None, length: int = 48) -> dict[str, Tensor]:
    """Texts as strips, tokens, or both, padded to full length."""
    batch: dict[str, Tensor] = {}
    if renderer is not None:
        strips = [renderer.render(text) for text in texts]
        attended = torch.tensor([strip.num_attended for strip in strips])
        pixels = torch.stack([torch.from_numpy(strip.pixel_values) for strip in strips])[:, None]
        batch |= {
            "pixel_values": pixels,
            "pixel_mask": (torch.arange(renderer.max_seq_length) < attended[:, None]).long(),
        }
    if tokens is not None:
        rows = [[1, *ids, 2][:length] for ids in tokens(texts, add_special_tokens=False)["input_ids"]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        batch |= {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return batch


# -- training --------------------------------------------------------------------------------------------------------


def train(
    seed: int,
    data: Any,
    tokenizer_name: str | None,
    steps: int,
    measured: dict[int, Callable[[Any], None]] | None = None,
    lr: float = 1e-3,
    warmup: int = 30,
    **options: Any,
) -> Any:
    """Pre-train a small model, and look at its network after some steps; untrained for no steps."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from lit_models.nn import WarmupCosine
    from lit_models.pixel import FromPixelConfig, LitPixelLM

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if measured and trainer.global_step in measured:
                module.net.eval()
                measured[trainer.global_step](module.net)
                module.net.train()

    seed_everything(seed, verbose=False)
    module = LitPixelLM(
        FromPixelConfig(TRUNK | options),
        tokenizer_name,
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=partial(WarmupCosine, total=max(1, steps), warmup=warmup, floor=0.1),
    )
    if steps == 0:
        module.configure_model()
        return module.eval()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Look()],
    )
    trainer.fit(module, datamodule=data)
    return module.eval()


def strips_of(seed: int, path: str, tokens: str | None, modes: list[str], **options: Any) -> Any:
    """Data module of the sentences."""
    from datamodules import PixelTexts

    settings = {"renderer": renderer(), "max_tokens": 48, "batch_size": 32, "split_long": False} | options
    return PixelTexts(path, tokenizer=tokens, modes=modes, seed=seed, **settings)


def renderer(**options: Any) -> Any:
    """Grey strips of 64 patches."""
    from datamodules.rendering import TextRenderer

    return TextRenderer(**({"max_seq_length": 64} | options))


# -- a: next patches -------------------------------------------------------------------------------------------------


def patch_pairs(batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised patches, the ones after them, and whether those have ink; of attended targets."""
    from lit_models.pixel.functional import inked, normalize_patches, patchify, to_unit

    before, after, ink = [], [], []
    for batch in batches:
        patches = to_unit(patchify(batch["pixel_values"], 16))
        target = normalize_patches(patches)
        counted = batch["pixel_mask"][:, 1:].bool()
        before.append(target[:, :-1][counted])
        after.append(target[:, 1:][counted])
        ink.append(inked(patches)[:, 1:][counted])
    return torch.cat(before), torch.cat(after), torch.cat(ink)


def a(seed: int) -> dict[str, float]:
    """Next-patch prediction beats the trivial predictors."""
    texts, _ = sentences()
    path = write_rows(ROOT / "data/train.jsonl", texts[TEST:])
    draw = renderer()
    test = [batch_of(texts[start : start + 50], draw) for start in range(0, 1000, 50)]
    sample = [batch_of(texts[start : start + 50], draw) for start in range(TEST, TEST + 8000, 50)]
    x, y, ink = patch_pairs(sample)
    average = y[ink].mean(0)
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    weights = torch.linalg.solve(x1.T @ x1 + torch.eye(x1.shape[1]).double(), x1.T @ y.double()).float()
    x, y, ink = patch_pairs(test)
    x, y = x[ink], y[ink]
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
    result = {
        "zero": float((y**2).mean()),
        "copy": float(((x - y) ** 2).mean()),
        "mean patch": float(((average - y) ** 2).mean()),
        "ridge": float(((x1 @ weights - y) ** 2).mean()),
    }

    def look(net: Any, steps: int) -> None:
        result[f"model, {steps} steps"] = inked_error(net, test)

    look(train(seed, None, None, 0, vocab_size=8).net, 0)
    measured = {steps: partial(look, steps=steps) for steps in (50, 100, 200, 400)}
    train(seed, strips_of(seed, path, None, ["image"]), None, 400, measured, vocab_size=8)
    return result


@torch.no_grad()
def inked_error(net: Any, batches: list[dict[str, Tensor]]) -> float:
    """Normalised squared error on attended targets with ink."""
    from lit_models.pixel.functional import inked, normalize_patches

    total, count = 0.0, 0
    for batch in batches:
        output = net(**batch)
        counted = batch["pixel_mask"][:, 1:].bool() & inked(output.patches)[:, 1:]
        error = (output.pixel_pred[:, :-1] - normalize_patches(output.patches)[:, 1:]) ** 2
        total += float(error.mean(-1)[counted].sum())
        count += int(counted.sum())
    return total / count


# -- b1: reading -----------------------------------------------------------------------------------------------------


def fragments(texts: list[str], count: int, seed: int) -> list[str]:
    """Random runs of four words."""
    draws = random.Random(seed)
    found = []
    while len(found) < count:
        words = draws.choice(texts).split()
        if len(words) >= 4:
            start = draws.randrange(len(words) - 3)
            found.append(" ".join(words[start : start + 4]))
    return found


def b1(seed: int) -> dict[str, float]:
    """Pairs bind image and text."""
    from transformers import AutoTokenizer

    texts, _ = sentences()
    name = tokenizer(texts[TEST:], 1024, spaced=True)
    tokens = AutoTokenizer.from_pretrained(name)
    draw = renderer(max_seq_length=14, mode="words")
    parts = fragments(texts[:TEST], 500, 0)
    batch = batch_of(parts, draw, tokens, 14)
    turned = batch | {key: batch[key].roll(1, 0) for key in ("pixel_values", "pixel_mask")}
    path = write_rows(ROOT / f"data/fragments-{seed}.jsonl", fragments(texts[TEST:], 600 * 128, seed + 1))
    result = {}

    @torch.no_grad()
    def look(net: Any, steps: int) -> None:
        right, wrong = (float(net(**given).loss_ntp) for given in (batch, turned))
        read = net.read(batch["pixel_values"], batch["pixel_mask"], max_new_tokens=14)
        same = [tokens.decode(ids, skip_special_tokens=True).strip() for ids in read]
        result[f"right strip, {steps} steps"] = right
        result[f"wrong strip, {steps} steps"] = wrong
        result[f"read exactly, {steps} steps"] = statistics.mean(a == b for a, b in zip(same, parts, strict=True))

    shape = {"vocab_size": 1024, "pair_layout": "padded"}
    look(train(seed, None, name, 0, **shape).net, 0)
    measured = {steps: partial(look, steps=steps) for steps in (200, 400, 600)}
    data = strips_of(seed, path, name, ["pair"], renderer=draw, max_tokens=14, batch_size=128, pad_to_max=True)
    train(seed, data, name, 600, measured, 1.5e-3, 40, **shape)
    return result


# -- b2 and c: frozen states -----------------------------------------------------------------------------------------


@torch.no_grad()
def states(net: Any, texts: list[str], draw: Any, tokens: Any) -> Tensor:
    """Second layer and last state, averaged over attended positions."""
    found = []
    for start in range(0, len(texts), 100):
        batch = batch_of(texts[start : start + 100], draw, tokens)
        output = net.model(**{key: value for key, value in batch.items() if key != "labels"}, output_hidden_states=True)
        mask = output.attention_mask[..., None].float()
        levels = (output.hidden_states[2], output.hidden_states[-1])
        found.append(torch.cat([(level * mask).sum(1) / mask.sum(1) for level in levels], 1))
    return torch.cat(found)


def probe(features: Tensor, labels: Tensor, c: float = 0.02) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features: 1/2 |w|² + c · sum of the losses, biases free."""
    mean, deviation = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-8)
    x = ((features - mean) / deviation).double()
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (weight**2).sum() + c * torch.nn.functional.cross_entropy(
            x @ weight + bias, labels, reduction="sum"
        )
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return lambda other: (((other - mean) / deviation).double() @ weight + bias).argmax(1)


def probe_experiment(seed: int) -> dict[str, float]:
    """Classification from frozen states, on clean and on misspelt sentences."""
    from transformers import AutoTokenizer

    from datamodules.noise import LookAlikes, Typos
    from lit_models.pixel.metrics import retention

    texts, sources = sentences()
    labels = torch.tensor(sources)
    path = write_rows(ROOT / "data/train.jsonl", texts[TEST:])
    name = tokenizer(texts[TEST:], 2048)
    tokens, draw = AutoTokenizer.from_pretrained(name), renderer()
    majority = float(labels[:TEST].bincount().max()) / TEST
    test = {"clean": texts[:TEST]}
    for kind in (LookAlikes, Typos):
        for rate in (0.1, 0.3):
            draws = random.Random(0)
            test[f"{kind.__name__} {rate}"] = [kind(rate)(text, draws) for text in texts[:TEST]]
    cycle = ["image", "text", "image", "text", "pair"]
    models = {
        "untrained": (cycle, 0, ("pixel", "token", "pair")),
        "PixelGPT": (["image"], 600, ("pixel",)),
        "DualGPT": (cycle, 600, ("pixel", "token", "pair")),
        "TextGPT": (["text"], 300, ("token",)),
    }
    result: dict[str, float] = {"majority": majority}
    for model, (modes, steps, inputs) in models.items():
        net = train(seed, strips_of(seed, path, name, modes), name, steps, vocab_size=2048).net
        for given in inputs:
            sides = (draw if given != "token" else None, tokens if given != "pixel" else None)
            classify = probe(states(net, texts[TEST : TEST + 4000], *sides), labels[TEST : TEST + 4000])
            for kind, noisy in test.items():
                if kind != "clean" and model == "DualGPT":
                    continue
                if kind != "clean" and given == "pair":
                    continue
                guess = classify(states(net, noisy, *sides))
                accuracy = float((guess == labels[:TEST]).float().mean())
                result[f"{model}, {given}, {kind}"] = accuracy
                if kind != "clean":
                    kept = retention(accuracy, result[f"{model}, {given}, clean"], majority)
                    result[f"{model}, {given}, {kind}, retention"] = kept
    return result


PARTS = {"a": a, "b1": b1, "probe": probe_experiment}


def main() -> None:
    """Run the parts and print means, and the values of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.parts or PARTS:
        runs = [PARTS[part](seed) for seed in options.seeds]
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            listed = " ".join(f"{value:.3f}" for value in values)
            print(f"{part} {key:42} {statistics.mean(values):7.3f} +- {spread:.3f}   seeds: {listed}", flush=True)


if __name__ == "__main__":
    main()
