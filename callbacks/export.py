"""Hugging Face folders of the trained networks."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ExportPretrained(Callback):
    """Writes every network as a folder that plain transformers loads, when training ends and every n steps.

    Args:
        dirpath: parent of the folders; `export` in the run's folder by default.
        every_n_steps: batches between two exports; only at the end by default.
        push_to_hub: hub repository prefix such as `me/my-run`; each network goes to `PREFIX-NAME`.

    Note:
        Each export replaces the one before.

    Example::

        Trainer(callbacks=[ExportPretrained("export")])
    """

    def __init__(
        self, dirpath: str | None = None, every_n_steps: int | None = None, push_to_hub: str | None = None
    ) -> None:
        self.dirpath, self.every_n_steps, self.push_to_hub = dirpath, every_n_steps, push_to_hub
        self._ended = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Export every n batches."""
        if self.every_n_steps and (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0:
            self._export(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is exported yet."""
        self._ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, and push where asked for."""
        self._ended = True
        folders = self._export(trainer, pl_module)
        if self.push_to_hub and trainer.is_global_zero:
            from huggingface_hub import HfApi

            api = HfApi()
            for name, folder in folders.items():
                repository = f"{self.push_to_hub}-{name}"
                api.create_repo(repository, exist_ok=True)
                api.upload_folder(repo_id=repository, folder_path=folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export a run that was killed after its last step: when it resumes, nothing is left to train and to end."""
        if not self._ended:
            pl_module.to(trainer.strategy.root_device)  # the trainer has put it aside, but shards are gathered there
            self.on_train_end(trainer, pl_module)
            pl_module.cpu()

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Path]:
        export: Any = pl_module.export_pretrained
        folders: dict[str, Path] = export(self.dirpath or Path(trainer.default_root_dir) / "export")
        return folders
