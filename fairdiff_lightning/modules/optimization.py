"""The optimizer and the schedule of any module of ours."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from fairdiff_lightning.modules.schedules import RunLengthSchedule


def configure(
    module: LightningModule,
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    interval: Literal["step", "epoch"],
    monitor: str,
) -> Any:
    """What ``configure_optimizers`` returns: the optimizer on what is trainable, and its schedule.

    Args:
        module: whose parameters are optimised.
        optimizer: built on the trainable parameters.
        lr_scheduler: built on the optimizer; a :class:`RunLengthSchedule` without a length gets the run's.
        interval: when the scheduler steps.
        monitor: logged value for schedulers that look at one.
    """
    built = optimizer(p for p in module.parameters() if p.requires_grad)
    if lr_scheduler is None:
        return built
    scheduler = lr_scheduler(built)
    if isinstance(scheduler, RunLengthSchedule) and scheduler.total_steps is None:
        scheduler.set_length(_run_length(module, interval))
    return {
        "optimizer": built,
        "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
    }


def _run_length(module: LightningModule, interval: str) -> int:
    trainer = module.trainer
    length = trainer.max_epochs if interval == "epoch" else trainer.estimated_stepping_batches
    if length is None or not 0 < length < math.inf:
        raise ValueError(
            f"the schedule's length cannot be told from max_epochs={trainer.max_epochs}, max_steps="
            f"{trainer.max_steps}: set one of them, or the scheduler's total_steps."
        )
    return int(length)
