"""Rows that a simulator is trained on, made from batches of recorded runs.

Shapes: K runs, T steps, R rows (steps of any runs), M columns, b places of a batch, n the order. See `LitInfluence` for
the keys of batches.
"""

from typing import Any

import torch
from torch import Tensor

from lit_models.influence.functional import HistoryPad

Batch = dict[str, Any]
BY_COLUMN = ("history", "target", "mask", "known")
"""Keys of a matrix row whose last axis are columns."""


def run_rows(batch: Batch, order: int, pad: HistoryPad) -> Batch:
    """Every step of whole runs as a row of the matrix form.

    Args:
        batch: whole runs, `ids` (K,T,b), `values` (K,T+1,M) and so on.
        order: n.
        pad: what stands for values before the first one; a row that lacks one is NaN there with "skip".

    Returns:
        Rows, run after run.
    """
    values, ids = batch["values"], batch["ids"]
    number, steps = ids.shape[:2]
    places = torch.arange(steps, device=ids.device)
    before = places[:, None] + torch.arange(1 - order, 1, device=ids.device)  # (T, n) positions of the history
    history = values[:, before.clamp(min=0)]
    if pad != "repeat":
        history = torch.where((before >= 0)[..., None], history, 0.0 if pad == "zero" else torch.nan)
    length = batch.get("length", torch.full((number,), steps, device=ids.device))
    target = torch.where((places < length[:, None])[..., None], values[:, 1:], torch.nan)
    run = batch.get("run", torch.arange(number, device=ids.device))
    rows = {
        "ids": ids,
        "history": history,
        "target": target,
        "run": run[:, None].expand(-1, steps),
        "step": (places + 1).expand(number, -1),
    }
    if "lr_scale" in batch:
        rows["lr_scale"] = batch["lr_scale"]
    flat = {name: value.flatten(0, 1) for name, value in rows.items()}
    return flat | {name: batch[name] for name in ("test_ids",) if name in batch}


def clean_rows(batch: Batch) -> Batch:
    """Rows of the matrix form without NaN.

    Args:
        batch: rows with `history` (R,n,M) or (R,M) and `target` (R,M) float32, and perhaps `mask` (R,M) bool.

    Returns:
        The rows with `history` (R,n,M), `known` (R,M) bool, where all of it was measured, and `mask`, what counts.
    """
    history, target = batch["history"], batch["target"]
    history = history[:, None] if history.ndim == 2 else history
    known = history.isfinite().all(1)
    mask = known & target.isfinite()
    if "mask" in batch:
        mask = mask & batch["mask"]
    return batch | {
        "history": torch.where(known[:, None], history, 0.0),
        "target": torch.where(mask, target, 0.0),
        "mask": mask,
        "known": known,
    }


def draw_tests(batch: Batch, number: int | None, own: Tensor, metrics: int, seed: int) -> Batch:
    """Leave some tests of clean rows, drawn at random.

    Args:
        batch: rows of `clean_rows`, with `test_ids` (M,) unless their tests are `own`.
        number: tests to leave; None for all.
        own: (M,) int64, tests of the simulator.
        metrics: number of metrics; the columns are all tests of the first one, and so on.
        seed: the draw depends on nothing else.

    Returns:
        The rows, with `test_ids` if some are left out.
    """
    tests = batch.get("test_ids", own)
    if number is None or number >= len(tests):
        return batch
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(tests), generator=generator)[:number].sort().values.to(tests.device)
    columns = (torch.arange(metrics, device=tests.device)[:, None] * len(tests) + chosen).flatten()
    return batch | {name: batch[name][..., columns] for name in BY_COLUMN} | {"test_ids": tests[chosen]}


def last_steps(ids: Tensor) -> Tensor | None:
    """Steps of each row of (R,k,b) ids up to the last one with an example, (R,) int64; None for rows of one step."""
    if ids.ndim == 2:
        return None
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.where((ids >= 0).any(-1), places, 0).amax(1)


def windows(run: Tensor, step: Tensor, size: int) -> Tensor:
    """Find stretches of steps that follow one another in a run.

    Args:
        run: (R,) int64.
        step: (R,) int64.
        size: w, steps of a window.

    Returns:
        (S, w) int64, rows of each window in the order of steps; windows of a run do not overlap.
    """
    order = torch.argsort(step, stable=True)
    order = order[torch.argsort(run[order], stable=True)]
    run, step = run[order], step[order]
    if len(run) < size:
        return order.new_empty(0, size)
    follows = (run[1:] == run[:-1]) & (step[1:] == step[:-1] + 1)
    places = torch.arange(len(run), device=run.device)
    first = torch.where(torch.cat([follows.new_zeros(1), follows]), 0, places).cummax(0).values  # of each row's stretch
    inside = places[: len(run) - size + 1]
    whole = first[inside] == first[inside + size - 1]
    starts = inside[whole & ((inside - first[inside]) % size == 0)]
    return order[starts[:, None] + torch.arange(size, device=run.device)]
