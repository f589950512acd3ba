"""Learning-rate schedules whose length is the run's own, so that a configuration need not know it."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class RunLengthSchedule(LRScheduler):
    """Base of schedules over a whole run, stepped after every optimizer step.

    Args:
        optimizer: whose learning rates are set.
        total_steps: optimizer steps of the run; our modules fill it in when None.
        last_epoch: steps taken before a resume, as in PyTorch.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, last_epoch: int = -1) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int, total_steps: int) -> float:
        """What the base learning rates are multiplied by at a step."""
        raise NotImplementedError

    def set_length(self, total_steps: int) -> None:
        """Fix the length of the run, and with it the learning rate of the step that comes next."""
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """State without the length, which is that of the run that goes on: a prolonged run gets a longer schedule."""
        return {name: value for name, value in super().state_dict().items() if name != "total_steps"}

    def get_lr(self) -> list[Any]:
        """Learning rates of the step that comes next."""
        if self.last_epoch > 0 and self.total_steps is None:
            raise ValueError(f"{type(self).__name__} needs total_steps: give it, or let a module of ours fill it in.")
        total = self.total_steps or 1
        factor = self.factor(min(self.last_epoch, total), total)
        return [base * factor for base in self.base_lrs]


class PolynomialDecay(RunLengthSchedule):
    """lr (1 - t/T)^power, as dMoE, FairSeg and TransUNet train with.

    Args:
        optimizer: whose learning rates are set.
        total_steps: T; the run's own when None.
        power: exponent.
        lag: let the rate of step t be that of step t - 1, as the papers' code does (it sets the rate after the step).
        last_epoch: steps taken before a resume, as in PyTorch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        power: float = 0.9,
        lag: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.power, self.lag = power, lag
        super().__init__(optimizer, total_steps, last_epoch)

    def factor(self, step: int, total_steps: int) -> float:
        """(1 - t/T)^power."""
        return float((1 - max(step - self.lag, 0) / total_steps) ** self.power)


class LinearDecay(LRScheduler):
    """The base learning rate, then a straight line to a last one that stays, as FairDiff's outlines train with.

    Args:
        optimizer: whose learning rates are set.
        start: step at which the decay begins.
        end: step at which it has ended, after ``start``.
        end_lr: the last learning rate.
        last_epoch: steps taken before a resume, as in PyTorch.
    """

    def __init__(self, optimizer: Optimizer, start: int, end: int, end_lr: float, last_epoch: int = -1) -> None:
        if not 0 <= start < end:
            raise ValueError(f"LinearDecay needs 0 <= start < end, but start={start} and end={end}.")
        self.start, self.end, self.end_lr = start, end, end_lr
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Learning rates of the step that comes next."""
        share = min(max((self.last_epoch - self.start) / (self.end - self.start), 0.0), 1.0)
        return [base + share * (self.end_lr - base) for base in self.base_lrs]


class WarmupCosine(RunLengthSchedule):
    """Linear warm-up from 0 and then a half cosine to 0.

    Args:
        optimizer: whose learning rates are set.
        total_steps: length of both together; the run's own when None.
        warmup: share of the steps that warm up, in [0, 1).
        last_epoch: steps taken before a resume, as in PyTorch.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.warmup = warmup
        super().__init__(optimizer, total_steps, last_epoch)

    def factor(self, step: int, total_steps: int) -> float:
        """(t + 1)/w while warming up, so that no step is lost at rate 0, then (1 + cos)/2."""
        warm = self.warmup * total_steps
        if step + 1 < warm:
            return (step + 1) / warm
        return (
            0.5 * (1 + math.cos(math.pi * min((step - warm) / max(total_steps - warm, 1), 1))) if step > warm else 1.0
        )
