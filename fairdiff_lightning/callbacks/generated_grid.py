"""Pictures of what a generator makes, beside the real samples of the same groups, while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fairdiff_lightning.callbacks.figures import class_colours, log_figure, picture_grid
from fairdiff_lightning.callbacks.slices import flat
from fairdiff_lightning.callbacks.step_outputs import require_keys

_OUTPUTS = {"generated": "a batch of generated samples for the first samples of the batch, or None"}


class GeneratedGrid(Callback):
    """Logs real and generated samples of the first validation batch as ``val/generated``, a column for each.

    Works with any LightningModule whose ``validation_step`` returns a dict with ``generated``: None, or ``image``
    (N, C, H, W) in [0, 1] and ``mask`` (N, 1, H, W), or one of them, made for the first N samples of the batch. Masks
    that are the batch's own, as image generators follow them, are shown once. Columns are named after the group of
    ``pl_module.attribute``. Of volumes the slice is shown that has most of the mask, always with the mask.

    Args:
        num_samples: columns of the grid, at most.
        every_n_epochs: logs in epochs 0, n, 2 n and so on.
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
        made = require_keys(outputs, _OUTPUTS, f"{type(pl_module).__name__}.validation_step", self)["generated"]
        if made is None:
            return
        count = min(self.num_samples, len(made["id"]))
        rows: dict[str, list[Any]] = {}
        asked_for = "mask" in made and torch.equal(made["mask"][:count], batch["mask"][:count])
        for label, samples in (("real", batch), ("generated", made)):
            masks = (samples if "mask" in samples else batch)["mask"][:count].cpu()
            if "image" in made:
                pairs = zip(samples["image"][:count].detach().float().cpu(), masks, strict=True)
                rows[label] = [flat(image, mask) for image, mask in pairs]
            if "mask" in made and (label == "real" or not asked_for):
                rows[f"{label} mask"] = [class_colours(flat(mask, mask)) for mask in masks]
        log_figure(
            trainer, "val/generated", picture_grid(rows, _titles(trainer, pl_module, batch, count)), trainer.global_step
        )


def _titles(trainer: Trainer, pl_module: LightningModule, batch: Any, count: int) -> list[str]:
    attribute: Any = getattr(pl_module, "attribute", None)
    if attribute is None:
        return [""] * count
    names = getattr(getattr(trainer, "datamodule", None), "attribute_groups", {}).get(attribute, ())
    groups = batch["attributes"][attribute][:count].tolist()
    return ["unknown" if g < 0 else names[g] if g < len(names) else f"group {g}" for g in groups]
