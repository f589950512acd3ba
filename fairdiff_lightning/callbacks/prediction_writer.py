"""Writes predicted masks to files while predicting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from fairdiff_lightning.callbacks.manifest import Manifest
from fairdiff_lightning.callbacks.step_outputs import require_keys
from fairdiff_lightning.data.native import atomic_path

_PREDICTION = {
    "mask": "class indices (B, 1, H, W), or a list of (1, H, W)",
    "id": "a name for each mask, unique in the data",
}
_COLUMNS = ("id", "file")


class PredictionWriter(BasePredictionWriter):
    """Writes each predicted mask as soon as its batch is done, and at the end ``manifest.csv`` (id, file).

    Works with any LightningModule whose ``predict_step`` returns a dict with ``mask``, int (B, 1, H, W) or a list of
    (1, H, W) class indices, and ``id``, a list of B names. The data module's ``write_mask(directory, id, mask)``, where
    there is one, writes the data set's own format; otherwise the file is ``<id>.png`` (8-bit grey, the value of a pixel
    is its class), with what a file name cannot hold in the id percent-encoded. Files are replaced whole, so a run
    that was killed can be repeated. Nothing is kept in memory. A data module of slices, one with
    ``write_joined(directory, ids)``, then writes the volumes that they make, beside them.

    Args:
        output_dir: folder of the files; by default ``predictions`` below the trainer's log folder.

    Raises:
        ValueError: while predicting, when the step's output lacks a key, or a mask does not fit an 8-bit PNG.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self.directory = Path(output_dir or "predictions")
        self.manifest = Manifest(self.directory, _COLUMNS)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle on the folder, and begin this process's part of the manifest."""
        log_dir = trainer.log_dir or trainer.default_root_dir  # asks all processes
        self.directory = Path(self.output_dir or Path(log_dir) / "predictions")
        self.manifest = Manifest(self.directory, _COLUMNS)
        self.manifest.start(trainer.global_rank, afresh=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the masks of a batch."""
        prediction = require_keys(prediction, _PREDICTION, f"{type(pl_module).__name__}.predict_step", self)
        write_mask = getattr(getattr(trainer, "datamodule", None), "write_mask", write_png)
        rows = []
        for sample_id, mask in zip(map(str, prediction["id"]), prediction["mask"], strict=True):
            path = Path(write_mask(self.directory, sample_id, mask.detach().cpu()))
            rows.append((sample_id, os.path.relpath(path, self.directory)))
        self.manifest.append(trainer.global_rank, rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts of all processes into ``manifest.csv``, an id that several wrote once."""
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self.manifest.merge(keep=False)
            write_joined = getattr(getattr(trainer, "datamodule", None), "write_joined", None)
            if write_joined is not None:
                written = write_joined(self.directory, list(self.manifest.rows()))
                rank_zero_info(f"{len(written)} volumes of predicted slices: {self.directory.resolve()}")


def write_png(directory: Path, sample_id: str, mask: Tensor) -> Path:
    """Write a mask (1, H, W) or (H, W) of class indices as an 8-bit grey PNG named after the sample, atomically.

    Raises:
        ValueError: the mask is not of this shape, or holds a value outside [0, 255].
    """
    if mask.dim() not in (2, 3) or mask.shape[:-2] not in ((), (1,)) or int(mask.min()) < 0 or int(mask.max()) > 255:
        raise ValueError(
            f"mask of '{sample_id}': shape {tuple(mask.shape)}, values {int(mask.min())} to {int(mask.max())}; "
            "expected (1, H, W) class indices 0 to 255. Give the data module a write_mask for another format."
        )
    path = directory / f"{quote(sample_id, safe=' ')}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(mask.byte().reshape(mask.shape[-2:]).numpy()).save(temporary, format="PNG")
    return path
