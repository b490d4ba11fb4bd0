"""How diverse the responses to one prompt are, while training."""

from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from callbacks.samples import Row, SampleTable


class DiversityTable(SampleTable):
    """Samples several responses to a few validation prompts, logs metrics of each prompt's set and writes a table.

    Logs `diversity/NAME` for each metric and `diversity/score`, the mean score. Lines of the file hold `step`,
    `prompt`, `responses` and `scores`.

    Args:
        metrics: metrics of sets of texts, such as those of `lit_models.metrics`, with a `name`.
        num_prompts: validation prompts, on each process.
        num_samples: responses per prompt.
        every_n_steps: batches between two tables; in PPO a batch is a rollout.
        num_rows: prompts that are written.
        filename: name of the JSONL file in the run's folder.
        print_rows: also print each table.

    Raises:
        ValueError: if a number is not positive, or the module cannot sample sets.

    Note:
        The module must have `sample_sets(batch, samples)`, which returns a dict with `prompt`, `responses` and `scores`
        per prompt. A resumed run removes the lines after the step it resumes from.

    Example::

        Trainer(callbacks=[DiversityTable([Diversity(), SelfBLEU()], every_n_steps=10)])
    """

    def __init__(
        self,
        metrics: list[Metric],
        num_prompts: int = 8,
        num_samples: int = 10,
        every_n_steps: int = 10,
        num_rows: int = 4,
        filename: str = "diversity.jsonl",
        print_rows: bool = False,
    ) -> None:
        super().__init__(every_n_steps, num_rows, filename, print_rows)
        if num_prompts < 1 or num_samples < 2:
            raise ValueError(
                "callbacks.DiversityTable: num_prompts must be at least 1 and num_samples at least 2, got "
                f"{num_prompts} and {num_samples}"
            )
        self.metrics, self.num_prompts, self.num_samples = metrics, num_prompts, num_samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can sample sets."""
        if stage == "fit" and not hasattr(pl_module, "sample_sets"):
            raise ValueError(
                f"callbacks.DiversityTable needs a module with sample_sets, and {type(pl_module).__name__} has none; "
                "take it out of trainer.callbacks"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Sample, log and write every `every_n_steps` batches."""
        self._batches += 1
        if self._batches % self.every_n_steps:
            return
        sets = self._sample(trainer, pl_module)
        for metric in self.metrics:
            metric.to(pl_module.device).reset()  # where processes can sum it
            metric.update([row["responses"] for row in sets])
            pl_module.log(f"diversity/{metric.name}", float(metric.compute()))
        scores = [score for row in sets for score in row["scores"]]
        pl_module.log("diversity/score", sum(scores) / max(1, len(scores)), sync_dist=True)
        self._write_rows(trainer, [{"step": trainer.global_step, **row} for row in sets[: self.num_rows]])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing, other than for sample tables."""

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> list[Row]:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        sample: Any = pl_module.sample_sets
        sets: list[Row] = []
        for batch in islice(loader, self.num_prompts):
            sets += sample(trainer.strategy.batch_to_device(batch), self.num_samples)
            if len(sets) >= self.num_prompts:
                break
        return sets[: self.num_prompts]
