"""What all generators share: training on a loss, a few samples while validating, and answers to requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from fairdiff_lightning.callbacks import warn_about_lost_ema
from fairdiff_lightning.data.provenance import refuse_seen
from fairdiff_lightning.data.sample import Sample
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import generators
from fairdiff_lightning.diffusion.noise import Generators
from fairdiff_lightning.modules.optimization import configure

TRAINING_CASES = "training_cases"
"""Where checkpoints of modules and of data modules tell which real cases were trained on."""

CARRIED = ("id", "attributes", "seed", "source", "condition", "prompt", "affine")
"""What a generated sample takes over from its request."""


class GenerativeModule(LightningModule, ABC):
    """Base of the generators; a subclass says what its loss is and how it answers requests.

    Args:
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer; one of :mod:`~fairdiff_lightning.modules.schedules` learns the run's
            length by itself.
        lr_interval: when the scheduler steps.
        num_validation_samples: samples that each validation generates, over all devices, for pictures and metrics.

    Attributes:
        training_cases: :func:`~fairdiff_lightning.data.provenance.marks` of the real cases that it was trained on, kept
            in checkpoints; empty where they are not known.
    """

    monitor: str = "val/loss"
    """The logged value that tells the best checkpoint."""
    monitor_mode: Literal["min", "max"] = "min"

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["step", "epoch"],
        num_validation_samples: int,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.lr_interval: Literal["step", "epoch"] = lr_interval
        self.num_validation_samples = num_validation_samples
        self._validation_budget = 0
        self.training_cases: frozenset[str] = frozenset()

    @abstractmethod
    def losses(self, batch: Sample) -> dict[str, Tensor]:
        """Named loss terms, ``loss`` is what is minimised.

        Noise and steps come from :meth:`draws`: from the batch's ``seed`` where it has one, but never in training.
        """

    @abstractmethod
    def generate(self, requests: Sample) -> dict[str, Any]:
        """Answer a batch of requests: ``image`` in [0, 1] and ``mask``, or one of them.

        Everything random comes from ``requests["seed"]`` (B,) int64, or from ``round`` (B,), which sample of its
        condition each one is, where samples of all conditions are to share what is random.
        """

    def draws(self, batch: Sample) -> Generators | None:
        """A generator for each sample of a batch with ``seed``; None in training, where every epoch needs new noise."""
        return generators(batch["seed"]) if "seed" in batch and not self.training else None

    def on_train_start(self) -> None:
        """Note what the data module trains on, and what it knows that an earlier run did.

        Raises:
            ValueError: for weights to start from that have seen cases which are held out here, naming them.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        name = f"what {type(self).__name__} starts from"
        refuse_seen(name, self.training_cases, getattr(data, "held_out_records", ()))
        told = data.state_dict() if data is not None else {}
        self.training_cases |= frozenset(told.get(TRAINING_CASES, ()))

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """One step on a batch of the contract."""
        losses = self.losses(batch)
        named = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(named, prog_bar=True, batch_size=len(batch["id"]))
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        """Allow this process its share of the samples."""
        share = -(-self.num_validation_samples // self.trainer.world_size)
        self._validation_budget = 0 if self.trainer.sanity_checking else share

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        """Losses of a batch, with noise that is the same at every validation, and ``generated`` for its first samples.

        Returns:
            ``generated``: a batch of the contract made for the first samples of ``batch`` as requests (same groups,
            same masks), None when enough have been made.
        """
        size = len(batch["id"])
        seeds = torch.tensor([derive_seed("validation", name) for name in batch["id"]])
        batch = cast(Sample, {**batch, "seed": seeds, "round": torch.zeros_like(seeds)})
        losses = {f"val/{name}": value for name, value in self.losses(batch).items()}
        self.log_dict(losses, batch_size=size, sync_dist=True)
        count = min(self._validation_budget, self.num_requests(batch))
        self._validation_budget -= count
        return {"generated": self.predict_step(first(batch, count)) if count else None}

    def num_requests(self, batch: Sample) -> int:
        """How many of a batch's first samples can be requests."""
        return len(batch["id"])

    def predict_step(self, batch: Sample, batch_idx: int = 0) -> dict[str, Any]:
        """Samples of the contract for a batch of requests."""
        carried = {key: batch[key] for key in CARRIED if key in batch}  # type: ignore[literal-required]
        synthetic = torch.ones(len(batch["id"]), dtype=torch.bool)
        return {**carried, "synthetic": synthetic, **self.generate(batch)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which cases were trained on with the weights, whoever loads them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[TRAINING_CASES] = sorted(self.training_cases)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Learn which cases were trained on; warn when training would go on from averaged weights."""
        self.training_cases |= frozenset(checkpoint.get(TRAINING_CASES, ()))
        warn_about_lost_ema(checkpoint, self._trainer)

    def configure_optimizers(self) -> Any:
        """The optimizer on what is trainable, and its schedule."""
        return configure(self, self.optimizer, self.lr_scheduler, self.lr_interval, self.monitor)


def rounds_of(requests: Sample, needed: bool) -> Tensor:
    """Which sample of its condition each request is (B,), from 0; all 0 where that is not needed.

    Raises:
        ValueError: when it is needed and they do not tell.
    """
    given = dict[str, Any](requests)
    if not needed:
        return torch.zeros_like(requests["seed"])
    if "round" not in given:
        raise ValueError(
            f"the requests '{requests['id'][0]}' ... have {sorted(given)}, but noises or phrases are shared by all "
            "conditions: 'round' (B,) is needed, which sample of its condition each one is, from 0. The requests of a "
            "data module have it."
        )
    return torch.as_tensor(given["round"])


def first(batch: Sample, count: int) -> Sample:
    """The first samples of a batch."""
    return cast(Sample, {key: _first(value, count) for key, value in batch.items()})


def _first(value: Any, count: int) -> Any:
    return {k: _first(v, count) for k, v in value.items()} if isinstance(value, dict) else value[:count]
