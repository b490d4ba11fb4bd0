"""Training steps of pixel language models beside a plain Llama of the same trunk, and the data loader beside both.

`python benchmarks/pixel_speed.py [--repetitions 3] [--steps 20]`

16 rows of 256 positions, width 128, 4 layers, float32, AdamW; the sides take turns, after three steps of warm-up. The
Llama reads tokens of a vocabulary of 256, the values of a grey patch, so that both heads cost the same; the pixel model
reads strips, or the same tokens. "trainer" is the step of `LitPixelLM` under the Lightning Trainer. Rates are attended
positions per CPU second; those of the loader are by the clock.
"""

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, VOCABULARY, WARM_UP = 16, 256, 256, 3
TRUNK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full strips of film reviews, and as many tokens."""
    from datamodules.rendering import TextRenderer
    from datamodules.snippets import load_snippets

    text = " ".join(snippet.text for snippet in load_snippets())
    renderer = TextRenderer(LENGTH)
    strips = [renderer.render(text[3000 * row : 3000 * (row + 1)]).pixel_values for row in range(BATCH)]
    pixels = torch.stack([torch.from_numpy(strip) for strip in strips])[:, None]
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    ones = torch.ones_like(ids)
    return {"pixel_values": pixels, "pixel_mask": ones}, {"input_ids": ids, "attention_mask": ones, "labels": ids}


def loop(model: Any, batch: dict[str, Tensor]) -> Iterator[None]:
    """A plain training loop, step by step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    while True:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        yield


def rate(steps: Iterator[None], count: int) -> float:
    """Positions per CPU second of some more steps."""
    start = time.process_time()
    for _ in range(count):
        next(steps)
    return count * BATCH * LENGTH / (time.process_time() - start)


def trainer_rate(batch: dict[str, Tensor], count: int) -> float:
    """Positions per CPU second under the Trainer."""
    from common import Stopwatch, lightning_trainer
    from torch.utils.data import DataLoader

    from lit_models.pixel import FromPixelConfig, LitPixelLM

    watch = Stopwatch()
    module = LitPixelLM(
        FromPixelConfig(TRUNK | {"num_channels": 1, "image_size": [16, 16 * LENGTH]}),
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
    )
    trainer = lightning_trainer(watch, count + WARM_UP)
    trainer.fit(module, DataLoader([None] * (count + WARM_UP), collate_fn=lambda _: dict(batch)))
    return BATCH * LENGTH / watch.result()["cpu"]


def loader_rate(workers: int, length: int) -> float:
    """Strips per second of the data module at batch 32, all drawn anew."""
    from datamodules import PixelSnippets
    from datamodules.rendering import TextRenderer

    data = PixelSnippets(TextRenderer(length), batch_size=32, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    steps = iter(loader)
    next(steps)
    start = time.perf_counter()
    count = sum(len(batch["pixel_values"]) for batch in steps)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    from lit_models.pixel import PixelForCausalLM, PixelLMConfig

    strips, tokens = batches()
    own = PixelLMConfig(**TRUNK, num_channels=1, image_size=[16, 16 * LENGTH])
    sides: dict[str, Callable[[int], float]] = {
        "Llama, tokens": partial(rate, loop(LlamaForCausalLM(LlamaConfig(**TRUNK)), tokens)),
        "pixel model, tokens": partial(rate, loop(PixelForCausalLM(own), tokens)),
        "pixel model, strips": partial(rate, loop(PixelForCausalLM(own), strips)),
        "strips, trainer": partial(trainer_rate, strips),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for run in list(sides.values())[:3]:
        run(WARM_UP)
    for _ in range(options.repetitions):
        for name, run in sides.items():
            rates[name].append(run(options.steps))
    first = statistics.median(rates["Llama, tokens"])
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name:22} {middle:9.0f} positions/CPU s   x {middle / first:.3f}", flush=True)
    for workers in (0, 1):
        print(
            f"loader, {workers} workers, sentences of 64 patches: {loader_rate(workers, 64):7.0f} strips/s", flush=True
        )


if __name__ == "__main__":
    main()
