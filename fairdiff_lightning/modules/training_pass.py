"""One pass over the training data of all processes, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from fairdiff_lightning.data.sample import Sample


def over_training(module: LightningModule, measure: Callable[[Sample], Sequence[Tensor]]) -> list[Tensor]:
    """Measure every training batch of every process, and join what is found on real samples.

    Args:
        module: attached to a trainer that is about to fit.
        measure: gives tensors with a row for each sample of a batch; those of samples that a generator made are left
            out, so that nothing is learned from a generator about what real cases look like.
    """
    module.trainer.fit_loop.setup_data()
    loader = cast(Iterable[Sample], module.trainer.train_dataloader)
    batches = ((measure(batch), _is_real(batch)) for batch in loader)
    kept = ([rows[real] for rows in found] for found, real in batches)
    found = [torch.cat(rows).to(module.device) for rows in zip(*kept, strict=True)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [torch.cat(gather_all_tensors(part)) for part in found]
    return found


def _is_real(batch: Sample) -> Tensor:
    """Which samples (B,) no generator made; all of them where the batch does not tell."""
    return ~batch.get("synthetic", torch.zeros(len(batch["id"]), dtype=torch.bool))
