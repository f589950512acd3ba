"""A diffusion loss by noise level: where along the way a model is good."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class LossByNoise(Metric):
    """Mean loss of the samples whose step lies in each of a number of equal ranges of steps.

    Args:
        num_steps: steps of the noise schedule.
        num_levels: ranges.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_steps: int, num_levels: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_steps, self.num_levels = num_steps, num_levels
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(num_levels), dist_reduce_fx="sum")

    def update(self, losses: Tensor, steps: Tensor) -> None:
        """Add the losses (B,) of samples noised to steps (B,)."""
        level = steps * self.num_levels // self.num_steps
        self.total.index_add_(0, level, losses.detach().to(self.total))
        self.count.index_add_(0, level, torch.ones_like(losses, dtype=self.count.dtype))

    def compute(self) -> Tensor:
        """Means (num_levels,), least noise first; NaN where no sample was."""
        return self.total / self.count
