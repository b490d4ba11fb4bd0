"""Blind listening tests: sheets for raters, and what the filled-in sheets say."""

import csv
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

COLUMNS = ("clip", "prompt", "file", "mark")


@dataclass(frozen=True)
class Rating:
    """Marks of one system.

    Args:
        count: number of marks.
        mean: mean mark.
        top: share of the best mark.
        bottom: share of the worst mark.
        intervals: `mean`, `top`, `bottom` -> ends of the 95 % confidence interval.
    """

    count: int
    mean: float
    top: float
    bottom: float
    intervals: dict[str, tuple[float, float]]


def write_sheet(
    folder: str | Path, prompts: Sequence[str], files: Mapping[str, Sequence[str]], rater: str, seed: int = 0
) -> tuple[Path, Path]:
    """Write a sheet in which nothing but the sound tells the systems apart, and the key to it.

    The clips of a prompt stay together, in an order that depends on the seed, the rater and the prompt; so does the
    order of the prompts. The rater gets the sheet and the clips, renamed as its column `file` says.

    Args:
        folder: to write into; it is made if needed.
        prompts: (N) texts.
        files: system -> (N) audio files, one for each prompt.
        rater: name, used in the names of both files.
        seed: of the order.

    Returns:
        `RATER.csv` with the columns clip, prompt, file and an empty mark, and `RATER.key.csv` with clip, prompt
        number, system and the original file.

    Raises:
        ValueError: if there is no prompt or no system, or a system has not one file for each prompt.
    """
    wrong = sorted(system for system, paths in files.items() if len(paths) != len(prompts))
    if not prompts or not files or wrong:
        raise ValueError(
            f"files: each of one or more systems needs one file for each of one or more prompts, here {len(prompts)}; "
            f"wrong: {', '.join(wrong) or 'none'}"
        )
    order = random.Random(f"{seed}/{rater}")
    numbers = list(range(len(prompts)))
    order.shuffle(numbers)
    sheet: list[tuple[object, ...]] = [COLUMNS]
    key: list[tuple[object, ...]] = [("clip", "number", "system", "file")]
    for number in numbers:
        systems = sorted(files)
        order.shuffle(systems)
        for system in systems:
            clip, source = len(key), files[system][number]
            sheet.append((clip, prompts[number], f"{clip:04d}{Path(source).suffix}", ""))
            key.append((clip, number, system, source))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{rater}.csv", folder / f"{rater}.key.csv"
    for path, rows in zip(paths, (sheet, key), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return paths


def read_sheets(sheets: Sequence[str | Path], best: int, worst: int = 1) -> dict[str, dict[int, list[int]]]:
    """Read filled-in sheets, each with its key beside it.

    Args:
        sheets: files as of `write_sheet`, their marks filled in.
        best: largest mark: 5 for quality, the number of systems for relevance (the best rank gets the most points).
        worst: smallest mark.

    Returns:
        System -> number of the prompt -> marks of all raters.

    Raises:
        ValueError: if a mark is missing or out of range.
    """
    marks: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sheet in map(Path, sheets):
        with sheet.open(newline="", encoding="utf-8-sig") as file:
            given = {row["clip"]: row["mark"].strip() for row in csv.DictReader(file)}
        with sheet.with_suffix(".key.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                mark = given.get(row["clip"], "")
                if not mark.isdecimal() or not worst <= int(mark) <= best:
                    raise ValueError(
                        f"{sheet.name}: the mark of clip {row['clip']} is {mark!r}; "
                        f"fill in a whole number from {worst} to {best}"
                    )
                marks[row["system"]][int(row["number"])].append(int(mark))
    return {system: dict(prompts) for system, prompts in marks.items()}


def rate(
    marks: Mapping[str, Mapping[int, Sequence[int]]], best: int, worst: int = 1, draws: int = 10_000, seed: int = 0
) -> dict[str, Rating]:
    """Mean mark, top and bottom rate of each system, with bootstrap intervals.

    Prompts are drawn with replacement, not single marks: marks of different raters for one clip are not independent.

    Args:
        marks: as of `read_sheets`.
        best: largest mark.
        worst: smallest mark.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        System -> rating; an interval of one prompt is NaN.
    """
    ratings = {}
    for system, prompts in sorted(marks.items()):
        # Per prompt: number of marks, their sum, and how many are the best and the worst.
        sums = torch.tensor(
            [[len(row), sum(row), row.count(best), row.count(worst)] for row in map(list, prompts.values())],
            dtype=torch.float64,
        )
        total = sums.sum(0)
        chosen = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(seed))
        drawn = sums[chosen].sum(1)
        ends = (drawn[:, 1:] / drawn[:, :1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
        if len(sums) == 1:
            ends = torch.full_like(ends, math.nan)
        intervals = {
            name: (low, high) for name, (low, high) in zip(("mean", "top", "bottom"), ends.tolist(), strict=True)
        }
        mean, top, bottom = (total[1:] / total[0]).tolist()
        ratings[system] = Rating(int(total[0]), mean, top, bottom, intervals)
    return ratings
