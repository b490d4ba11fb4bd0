"""Two data modules whose batches are used in one training step."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from datamodules.base import LitData


class PromptsWithText(LightningDataModule):
    """Prompts for generation together with texts for a language-model loss.

    Training batch: `{"prompt": <batch of prompts>, "ptx": <batch of texts>}`; an epoch ends with the longer of the two
    and the shorter one starts again. All other batches are those of `prompts`. Both sides resume exactly; neither may
    stream.

    Args:
        prompts: data module of the prompts, e.g. `PromptData`.
        ptx: data module of the texts, e.g. `InstructionData`; only its training split is used.
    """

    def __init__(self, prompts: LitData, ptx: LitData) -> None:
        super().__init__()
        for key, part in (("prompts", prompts), ("ptx", ptx)):
            if getattr(part, "streaming", False):
                raise ValueError(f"data.{key}.streaming: a stream has no length to combine; set it to false")
        self.prompts, self.ptx = prompts, ptx

    def prepare_data(self) -> None:
        """Prepare both."""
        self.prompts.prepare_data()
        self.ptx.prepare_data()

    def setup(self, stage: str) -> None:
        """Build both."""
        self.prompts.trainer = self.ptx.trainer = self.trainer
        self.prompts.setup(stage)
        if stage == "fit":
            self.ptx.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """Both loaders side by side."""
        loaders = {"prompt": self.prompts.train_dataloader(), "ptx": self.ptx.train_dataloader()}
        shorter = min(loaders.values(), key=len).position
        assert shorter is not None
        shorter.leads = False
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> Any:  # noqa: ANN401
        """Loader of the validation prompts."""
        return self.prompts.val_dataloader()

    def test_dataloader(self) -> Any:  # noqa: ANN401
        """Loader of the test prompts."""
        return self.prompts.test_dataloader()

    def predict_dataloader(self) -> Any:  # noqa: ANN401
        """Loader of the prompts to predict."""
        return self.prompts.predict_dataloader()
