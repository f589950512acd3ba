"""Randomness of a training epoch from the run's seed and the epoch's number, so that a resumed run repeats it."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fairdiff_lightning.data.seeding import derive_seed


class EpochSeed(Callback):
    """Reseeds Python, NumPy and PyTorch when a training epoch starts.

    What an epoch draws (dropout, router noise) then depends on the seed, the epoch and the rank, not on what ran before
    it in this process: a run that was killed and resumed at an epoch's end reaches the weights of an unbroken one.

    Args:
        seed: of the run; that of ``seed_everything`` when None.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the three global generators."""
        seed = self.seed if self.seed is not None else os.environ.get("PL_GLOBAL_SEED", 0)
        derived = derive_seed(seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(derived)
        random.seed(derived)
        np.random.seed(derived % 2**32)  # noqa: NPY002 - what other libraries draw from
