"""Recorded training runs as data for simulators of training runs."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Collator, LitData, Split
from datamodules.dynamics_rows import CurriculumRows, MatrixRows, PairRows, RunRows, as_it_is, read_curricula
from datamodules.example_features import Features, read_features, rows_of
from datamodules.gptdynamics import Recorded, open_run
from datamodules.loaders import ResumableLoader, rank_and_world, train_loader
from datamodules.trajectories import (
    Gap,
    HistoryPad,
    Paths,
    Ranges,
    StepTable,
    Trajectories,
    align,
    find_recorded,
    in_ranges,
    measured_tests,
)
from lit_models.recording import read_examples

Mode: TypeAlias = Literal["matrix", "pairs", "runs"]
TestOn: TypeAlias = Literal["seen", "unseen_train", "unseen_test", "unseen_both"]


class DynamicsData(LitData):
    """Recorded training runs, split by run, for fitting and testing simulators of training runs.

    Runs are those of `callbacks.TrainingDynamicsRecorder` or of GPTDynamics as released; all of them must have the same
    pool and the same tests. Simulations start at the first step after which all tests were measured. Steps whose update
    was skipped changed nothing and are left out.

    Shapes: K runs, T steps, R rows, b places of the longest step, k steps between two values, Q metrics, M tests, n the
    order. With several metrics all values have an axis of metrics before that of tests. Training batches by `mode`:

    * `matrix`, rows are steps:
        * `ids`: (R,b) int64, pool ids, -1 padded; (R,k,b) where values are recorded every k steps
        * `history`: (R,n,M) float32, values before it, the oldest first, NaN where not measured
        * `target`: (R,M) float32, values after it, NaN where not measured
        * `mask`: (R,M) bool, entries that count
        * `lr_scale`: (R,) or (R,k) float32, learning rate over `lr_reference`; only where it was recorded
        * `step`: (R,) int64, optimizer step of the target
        * `run`: (R,) int64, number in `run_names`
    * `pairs`, rows are steps of one test: `order_ids` (R,b), `test_ids` (R,), `prev` (R,n), `target` (R,), `lr_scale`,
      `step`, `run`, and with several metrics `metric` (R,) int64, its number
    * `runs`, rows are runs, as in evaluation

    Batches of evaluation, one run per row:
        * `ids`: (K,T,b) int64, -1 padded
        * `values`: (K,T+1,M) float32, from the start on, NaN where not measured
        * `start`: (K,M) float32, the first of them
        * `lr_scale`: (K,T) float32; only where it was recorded
        * `length`: (K,) int64, steps of each run
        * `run`: (K,) int64
        * `test_ids`: (M,) int64, tests of the columns; only where these are not those of training

    Prediction gives the test runs, or with `curricula` these, without `values`.

    Args:
        runs: folders of runs or of their parents, or patterns such as `runs/seed-*`.
        metric: what is simulated; several metrics are simulated together.
        order: n, values of a history.
        val_runs: how many runs to validate on, or their names.
        test_runs: how many runs to test on, or their names. Of the other runs in a list shuffled with `split_seed`, the
            first are for validation, the next for testing, and the rest is trained on.
        split_seed: seed of the shuffle (`random.Random`).
        limit_train: train on the first so many training runs only.
        mode: form of the training batches.
        gap: what becomes of steps between values: `unroll` simulates them, with a loss where there is a value;
            `released` gives every step the values at both ends of its interval, as the released code does.
        interval: train on every so manieth value only; null for all, and for the recorded distance with `released`.
        history_pad: what stands for values before the start: `repeat` the first value, `zero` as released, or `skip`
            rows without; null for `repeat`.
        step_threshold: train on steps from this one on only.
        tests: ids of the tests; null for all.
        test_ranges: use the tests in these ranges of ids only, ends included: `[[0, 199], [300, 310]]`, or as in the
            released code the starts and the ends, `["0,300", "199,310"]`.
        train_ranges: pool examples that runs may be trained on, as ranges of ids; others are unseen. Null for all.
        unseen_train: runs on unseen pool examples, to test on.
        unseen_test: unseen tests, as ranges of ids; null for all that `tests` and `test_ranges` leave out.
        test_on: what to test on: the runs and tests of the split (`seen`), runs on unseen pool examples
            (`unseen_train`), unseen tests (`unseen_test`), or both. Unseen examples need features.
        features: files with features of examples: those of the recorder (or a folder with them), or any safetensors
            file with `pool` (N,D), `pool_ids` (N,), `tests` (M,D) and `test_ids` (M,); or `{pool: FILE, tests: FILE}`,
            whose files may also be `.npy`, or safetensors with `features` and `ids`. Without ids, rows are ids from 0.
        initial_lr: learning rate of the first step of runs that recorded none (such as the released ones), from which
            it falls linearly to 0.
        lr_reference: learning rate whose scale is 1; null for the greatest one of the training runs.
        infer_skipped: take steps after which all losses are exactly those before as skipped updates.
        curricula: JSON file with what to predict: lists of pool ids, one for each step; or an object with these in
            `ids` and maybe `lr`, a number or one for each step (null for those of the training runs), and `start`,
            values of all tests (null for the mean start of the training runs); or a list of such objects.
        batch_size: training rows (runs in mode `runs`) per batch and rank; null for all of them in one batch.
        val_batch_size: runs per batch and rank outside training; null for all of them.
        num_workers: processes that read ahead, per rank and loader.
        seed: seed of the order of the rows.

    Raises:
        ValueError: if an option is out of range or contradicts another.
    """

    pool_ids: Tensor
    """(N,) int64, pool examples of the training runs; known after `setup`, as are all others here."""
    test_ids: Tensor
    """(M,) int64."""
    train_features: Tensor | None = None
    """(N,D) float32, as they stand in the files."""
    test_features: Tensor | None = None
    """(M,D) float32."""
    unseen_pool_ids: Tensor | None = None
    """(N',) int64, further pool examples that runs to evaluate may hold."""
    unseen_train_features: Tensor | None = None
    """(N',D) float32."""
    unseen_test_ids: Tensor | None = None
    """(M',) int64."""
    unseen_test_features: Tensor | None = None
    """(M',D) float32."""
    batch_reference: int
    """The most frequent number of examples of a training step."""
    mean_trajectory: Tensor
    """(T+1,M) or (T+1,Q,M) float32, mean of the training runs at each step."""
    run_names: list[str]
    """Names of all runs, to which `run` refers."""

    def __init__(
        self,
        runs: Paths,
        metric: str | list[str] = "loss",
        order: int = 1,
        val_runs: int | list[str] = 2,
        test_runs: int | list[str] = 5,
        split_seed: int = 42,
        limit_train: int | None = None,
        mode: Mode = "matrix",
        gap: Gap = "unroll",
        interval: int | None = None,
        history_pad: HistoryPad | None = None,
        step_threshold: int | None = None,
        tests: list[int] | None = None,
        test_ranges: Ranges | None = None,
        train_ranges: Ranges | None = None,
        unseen_train: Paths | None = None,
        unseen_test: Ranges | None = None,
        test_on: TestOn = "seen",
        features: str | list[str] | dict[str, str] | None = None,
        initial_lr: float | None = None,
        lr_reference: float | None = None,
        infer_skipped: bool = False,
        curricula: str | None = None,
        batch_size: int | None = 128,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
    ) -> None:
        super().__init__(1 if batch_size is None else batch_size, val_batch_size, num_workers, seed)
        self.save_hyperparameters(logger=False)
        self.full_batch, self.all_runs = batch_size is None, val_batch_size is None
        for key, number in (("order", order), ("interval", interval), ("limit_train", limit_train)):
            if number is not None and number < 1:
                raise ValueError(f"data.{key} must be at least 1, got {number}")
        for key, rate in (("initial_lr", initial_lr), ("lr_reference", lr_reference)):
            if rate is not None and rate <= 0:
                raise ValueError(f"data.{key} must be positive, got {rate}")
        if mode == "runs" and (step_threshold is not None or gap == "released" or interval is not None):
            raise ValueError(
                "data.mode: rows of runs are whole ones, so data.step_threshold, data.gap and data.interval have no "
                "meaning; set data.mode to matrix"
            )
        if test_on in ("unseen_train", "unseen_both") and unseen_train is None:
            raise ValueError(f"data.test_on: {test_on} needs runs on unseen examples; name them in data.unseen_train")
        self.runs, self.unseen_train, self.unseen_test = runs, unseen_train, unseen_test
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"data.metric must be different names, at least one, got {metric}")
        self.order, self.mode, self.gap, self.interval = order, mode, gap, interval
        self.history_pad: HistoryPad = history_pad or "repeat"
        self.step_threshold = step_threshold
        self.split_counts: dict[Split, int | list[str]] = {"val": val_runs, "test": test_runs}
        self.split_seed, self.limit_train = split_seed, limit_train
        self.tests, self.test_ranges, self.train_ranges = tests, test_ranges, train_ranges
        self.test_on, self.feature_files = test_on, features
        self.initial_lr, self.infer_skipped, self.curricula = initial_lr, infer_skipped, curricula
        self.lr_reference = lr_reference
        self.split_runs: dict[Split, list[int]] = {}
        self._whole: Trajectories | None = None

    # -- runs --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read the runs once, and build the data sets of a stage.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: in one sentence that names option, file or step, if runs are missing, broken, too short or of
                different pools or tests, or features are missing.
        """
        if self._whole is None:
            self._load()
        super().setup(stage)

    def _load(self) -> None:
        paths = find_recorded(self.runs, "data.runs")
        unseen_runs: list[int] = []
        if self.unseen_train is not None:
            beyond = find_recorded(self.unseen_train, "data.unseen_train")
            places = {path.resolve() for path in beyond}
            paths = [path for path in paths if path.resolve() not in places]
            if self._tests_unseen("train"):
                unseen_runs = list(range(len(paths), len(paths) + len(beyond)))
                paths += beyond
        opened = [open_run(path) for path in paths]
        _check_same(opened)
        self.split_runs = self._split([run.run_id for run in opened], unseen_runs, paths)
        features = read_features(self.feature_files)
        seen_tests, unseen_tests = self._choose_tests(opened)
        self._check_metrics(opened)
        seen_tests = measured_tests(opened, self.metrics, seen_tests)
        if unseen_tests:
            unseen_tests = measured_tests(opened, self.metrics, unseen_tests)
        whole = align(opened, self.metrics, seen_tests + unseen_tests, self.initial_lr, self.infer_skipped)
        self.run_names = whole.names
        self._seen = len(seen_tests)
        self.test_ids = whole.test_ids[: self._seen]
        everything = _all_pool_ids(opened, features)
        inside = in_ranges(everything, self.train_ranges, "data.train_ranges")
        self.pool_ids = torch.from_numpy(everything[inside])
        unseen = everything[~inside]
        if not self._tests_unseen("train"):  # a curriculum may name those that have features
            unseen = unseen[np.isin(unseen, features["pool"][0] if features and self.curricula else [])]
        self._check_ids(opened, whole, unseen, unseen_runs)
        self._take_features(features, torch.from_numpy(unseen), torch.tensor(unseen_tests, dtype=torch.int64))
        self._whole = whole
        self._train = whole.select(self.split_runs["train"])
        self._take_references()

    def _tests_unseen(self, side: Literal["train", "test"]) -> bool:
        return self.test_on in (f"unseen_{side}", "unseen_both")

    def _split(self, names: Sequence[str], unseen: Sequence[int], paths: Sequence[Path]) -> dict[Split, list[int]]:
        """Numbers of the runs of each split."""
        left = [number for number in range(len(names)) if number not in unseen]
        result: dict[Split, list[int]] = {"val": [], "test": []}
        counts: list[Split] = ["val", "test"]
        for part in counts:
            wanted = self.split_counts[part]
            if isinstance(wanted, int):
                continue
            for name in wanted:
                found = [number for number in left if name in (names[number], str(paths[number]))]
                if len(found) != 1:
                    raise ValueError(
                        f"data.{part}_runs: {name!r} is {'none' if not found else 'several'} of the "
                        f"{len(left)} runs that are left; name runs such as {names[left[0]] if left else 'run-0'!r}"
                    )
                result[part] += found
                left.remove(found[0])
        random.Random(self.split_seed).shuffle(left)
        for part in counts:
            wanted = self.split_counts[part]
            if isinstance(wanted, int):
                result[part], left = left[:wanted], left[wanted:]
        if not left:
            raise ValueError(
                f"data.val_runs, data.test_runs: of {len(names) - len(unseen)} runs none is left to train on; set "
                "smaller numbers, or record more runs"
            )
        if unseen:
            result["test"] = list(unseen)
        return result | {"train": left[: self.limit_train]}

    def _choose_tests(self, runs: Sequence[Recorded]) -> tuple[list[int], list[int]]:
        """Seen tests, and unseen ones to test on."""
        every = runs[0].test_ids
        if self.tests is not None:
            lacking = sorted(set(self.tests) - set(every.tolist()))
            if lacking:
                raise ValueError(f"data.tests: test {lacking[0]} is none of the {len(every)} recorded ones; remove it")
            chosen = np.isin(every, self.tests)
        else:
            chosen = np.ones(len(every), np.bool_)
        chosen &= in_ranges(every, self.test_ranges, "data.test_ranges")
        if not chosen.any():
            raise ValueError("data.tests, data.test_ranges: no recorded test is left; widen them")
        unseen: list[int] = []
        if self._tests_unseen("test"):
            others = ~chosen & in_ranges(every, self.unseen_test, "data.unseen_test")
            unseen = every[others].tolist()
            if not unseen:
                raise ValueError(
                    "data.unseen_test: no recorded test is left that is not trained on; leave some out of "
                    "data.test_ranges"
                )
        return every[chosen].tolist(), unseen

    def _check_metrics(self, runs: Sequence[Recorded]) -> None:
        for run in runs:
            for metric in self.metrics:
                if metric not in run.metrics:
                    raise ValueError(
                        f"data.metric: {run.folder} recorded no {metric!r}; set one of {', '.join(run.metrics)}"
                    )

    def _check_ids(
        self, runs: Sequence[Recorded], whole: Trajectories, unseen: NDArray[np.int64], unseen_runs: Sequence[int]
    ) -> None:
        """Runs that are not for unseen examples hold pool examples only."""
        known = self.pool_ids.numpy()
        for number, run in enumerate(runs):
            allowed = np.concatenate([known, unseen]) if number in unseen_runs else known
            ids = whole.ids[number].numpy()
            wrong = ~np.isin(ids, allowed) & (ids >= 0)
            if wrong.any():
                step, place = np.argwhere(wrong)[0]
                raise ValueError(
                    f"{run.folder}: step {int(whole.steps[number, step + 1])} used id {ids[step, place]}, which is not "
                    f"one of the {len(allowed)} pool examples; widen data.train_ranges, or name the run in "
                    "data.unseen_train"
                )

    def _take_features(self, features: Features, unseen_pool: Tensor, unseen_tests: Tensor) -> None:
        if not features:
            if self.test_on != "seen":
                raise ValueError(f"data.test_on: {self.test_on} needs features of unseen examples; set data.features")
            return
        self.train_features = rows_of(features, "pool", self.pool_ids)
        self.test_features = rows_of(features, "tests", self.test_ids)
        if self.train_features.shape[1] != self.test_features.shape[1]:
            raise ValueError(
                f"data.features: pool examples have {self.train_features.shape[1]} features and tests "
                f"{self.test_features.shape[1]}; make both in the same way"
            )
        if len(unseen_pool):
            self.unseen_pool_ids = unseen_pool
            self.unseen_train_features = rows_of(features, "pool", unseen_pool)
        if len(unseen_tests):
            self.unseen_test_ids, self.unseen_test_features = unseen_tests, rows_of(features, "tests", unseen_tests)

    def _take_references(self) -> None:
        """Learning rate, batch size and mean trajectory of the training runs."""
        train = self._train
        if self.lr_reference is None and train.lr is not None and float(train.lr.max()) > 0:
            self.lr_reference = float(train.lr.max())
        inside = torch.arange(train.ids.shape[1]) < train.length[:, None]
        self.batch_reference = max(1, int((train.ids >= 0).sum(-1)[inside].mode().values))
        self.mean_trajectory = self._plain(train.values[..., : self._seen].double().nanmean(0).float())

    def _plain(self, values: Tensor) -> Tensor:
        """(..., Q,M) without the axis of metrics where there is one of them only."""
        return values if len(self.metrics) > 1 else values.squeeze(-2)

    # -- data sets ---------------------------------------------------------------------------------------------------

    def build(self, split: Split) -> "Dataset[Any] | None":
        """Build the data set of one split.

        Args:
            split: which one.

        Returns:
            Rows, runs or curricula; None if no run is set aside for it.
        """
        assert self._whole is not None
        if split == "predict" and self.curricula is not None:
            return self._curricula(self.curricula)
        if split == "predict":
            split = "test" if self.split_runs["test"] else "val"
        numbers = self.split_runs[split]
        if not numbers:
            return None
        runs = self._whole.select(numbers)
        columns = torch.arange(self._seen)
        if split == "test" and self._tests_unseen("test"):
            columns = torch.arange(self._seen, len(runs.test_ids))
        runs.values, runs.test_ids = runs.values[..., columns], runs.test_ids[columns]
        if split == "train" and self.mode != "runs":
            return self._rows(runs, numbers)
        if split == "train":
            values = runs.values.isfinite().flatten(2)
            if not (values[:, 1:] & values[:, :-1]).any():
                raise ValueError(
                    "data.mode: rows of runs need values of successive steps, which no training run has; set data.mode "
                    "to matrix"
                )
        return RunRows(runs, self.lr_reference, numbers, named=split == "test" and self._tests_unseen("test"))

    def _rows(self, runs: Trajectories, numbers: Sequence[int]) -> "Dataset[Any]":
        table = StepTable(runs, self.order, self.gap, self.interval, self.history_pad, self.step_threshold)
        if self.mode == "matrix":
            return MatrixRows(table, self.lr_reference, numbers, keep=self.full_batch)
        if table.longest > 1:
            raise ValueError(
                f"data.mode: rows of pairs are single steps, but up to {table.longest} steps lie between two values; "
                "set data.mode to matrix, or data.gap to released"
            )
        return PairRows(table, self.lr_reference, numbers)

    def collator(self) -> Collator:
        """Data sets give whole batches, so there is nothing to do."""
        return as_it_is  # type: ignore[return-value]

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the training rows, in their order where all of them are one batch."""
        if not self.full_batch:
            return super().train_dataloader()
        rows = self._dataset("train")
        size = -(-len(rows) // rank_and_world()[1])
        options = {"collate_fn": self.collator(), "num_workers": self.num_workers}
        loader = train_loader(rows, size, self.seed, shuffle=False, **options)
        return self._follow(loader)

    @property
    def even(self) -> bool:
        """Never, since every rank evaluates a whole simulator."""
        return False

    def _evaluation(self, split: Split) -> Any:  # noqa: ANN401
        if self.all_runs:
            self.val_batch_size = len(self._dataset(split))
        return super()._evaluation(split)

    def _dataset(self, split: Split) -> Any:  # noqa: ANN401
        if split not in self.datasets:
            part = "test" if split == "predict" else split
            raise ValueError(f"data.{part}_runs: no run is set aside for {split}; set it to 1 or more")
        return self.datasets[split]

    # -- prediction --------------------------------------------------------------------------------------------------

    def _curricula(self, path: str) -> CurriculumRows:
        assert self._whole is not None
        known = self.pool_ids if self.unseen_pool_ids is None else torch.cat([self.pool_ids, self.unseen_pool_ids])
        curricula = read_curricula(path)
        start = self._train.values[:, 0, :, : self._seen].double().nanmean(0).float()
        starts = []
        for curriculum in curricula:
            curriculum.check(known)
            starts.append(self._plain(curriculum.start(start)))
        scales = None
        if self._train.lr is not None and self.lr_reference is not None:
            inside = torch.arange(self._train.ids.shape[1]) < self._train.length[:, None]
            mean = torch.where(inside, self._train.lr, torch.nan).double().nanmean(0).float()
            scales = [curriculum.rates(mean) / self.lr_reference for curriculum in curricula]
        return CurriculumRows([curriculum.ids for curriculum in curricula], torch.stack(starts), scales)


# -- facts about runs --------------------------------------------------------------------------------------------------


def _check_same(runs: Sequence[Recorded]) -> None:
    """Refuse runs of another pool or of other tests."""
    for key, what in (("pool_fingerprint", "another pool"), ("pool_size", "a pool of another size")):
        known = [run for run in runs if run.info.get(key) is not None]
        for run in known[1:]:
            if run.info[key] != known[0].info[key]:
                raise ValueError(
                    f"{run.folder / 'run.json'}: the run was recorded with {what} than {known[0].folder}; leave one of "
                    "them out of data.runs"
                )
    first = set(runs[0].test_ids.tolist())
    for run in runs[1:]:
        others = first.symmetric_difference(run.test_ids.tolist())
        if others:
            raise ValueError(
                f"{run.folder}: test {min(others)} was recorded here or in {runs[0].folder}, but not in both; leave "
                "one of the runs out of data.runs"
            )


def _all_pool_ids(runs: Sequence[Recorded], features: Features) -> NDArray[np.int64]:
    """Ids of all pool examples, in ascending order."""
    for run in runs:
        if run.info.get("pool_ids") is not None:
            return np.unique(np.asarray(run.info["pool_ids"], np.int64))
    for run in runs:
        if run.info.get("pool_size") is not None:
            return np.arange(int(run.info["pool_size"]))
    texts = runs[0].folder.parent / "pool.jsonl"
    if texts.is_file():
        return np.unique([row["id"] for row in read_examples(texts)]).astype(np.int64)
    if "pool" in features:
        return np.unique(features["pool"][0])
    return np.unique(np.concatenate([run.ids.values for run in runs])).astype(np.int64)
