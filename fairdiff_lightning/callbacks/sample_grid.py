"""Pictures of validation samples with their predictions, while training goes on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fairdiff_lightning.callbacks.cases import take_picture
from fairdiff_lightning.callbacks.figures import log_figure, sample_grid
from fairdiff_lightning.callbacks.step_outputs import require_keys

_OUTPUTS = {"prediction": "class indices (B, 1, H, W), or a list of (1, H, W)"}
_BATCH = {"image": "(B, C, H, W)", "mask": "class indices (B, 1, H, W)"}


class SampleGrid(Callback):
    """Logs image, truth and prediction of the first validation samples as ``val/samples``.

    Works with any LightningModule whose ``validation_step`` returns a dict with ``prediction``, int (B, 1, H, W) class
    indices. Where predictions are at the files' own size, the truth is the batch's ``native_mask``.

    Args:
        num_samples: samples in the grid, at most a batch.
        every_n_epochs: logs in epochs 0, n, 2 n and so on.

    Raises:
        ValueError: while validating, when the step or the batch lacks a key.
    """

    def __init__(self, num_samples: int = 8, every_n_epochs: int = 1) -> None:
        self.num_samples, self.every_n_epochs = num_samples, every_n_epochs

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first batch of the first process."""
        first = batch_idx == 0 and dataloader_idx == 0 and trainer.is_global_zero
        if not first or trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs:
            return
        outputs = require_keys(outputs, _OUTPUTS, f"{type(pl_module).__name__}.validation_step", self)
        batch = require_keys(batch, _BATCH, "the validation batch", self)
        shown = [take_picture(outputs, batch, index) for index in range(min(self.num_samples, len(batch["image"])))]
        figure = sample_grid(
            [picture.image for picture in shown],
            [picture.truth for picture in shown],
            [picture.prediction for picture in shown],
        )
        log_figure(trainer, "val/samples", figure, trainer.global_step)
