"""Which experts of a mixture serve which group."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fairdiff_lightning.metrics.functional import sum_by_group


class ExpertUsage(Metric):
    """Share of the gates that each expert receives, for each group.

    ``compute`` returns (num_groups + 1, num_experts): a row sums to 1, is NaN for a group without images, and the last
    one is the unknown group's (-1). Every image weighs the same, whatever its number of tokens.

    Args:
        num_experts: number of experts.
        num_groups: number of groups of the attribute.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    shares: Tensor

    def __init__(self, num_experts: int, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.num_groups = num_groups
        self.add_state("shares", torch.zeros(num_groups + 1, num_experts), dist_reduce_fx="sum")

    def update(self, gates: Tensor, group: Tensor) -> None:
        """Add the gates of a batch.

        Args:
            gates: (L, B, N, E) of L layers, or (B, N, E), at least 0.
            group: (B,) group of each image, -1 for unknown.

        Raises:
            ValueError: the shape is another one.
        """
        if gates.dim() not in (3, 4) or gates.shape[-1] != self.num_experts:
            raise ValueError(
                f"gates has shape {tuple(gates.shape)}, expected (L, B, N, {self.num_experts}) or "
                f"(B, N, {self.num_experts}) for num_experts={self.num_experts}."
            )
        per_image = gates.detach().float().mean(-2)
        per_image = per_image.mean(0) if gates.dim() == 4 else per_image
        self.shares += sum_by_group(per_image, group, self.num_groups)

    def compute(self) -> Tensor:
        """Return the shares."""
        return self.shares / self.shares.sum(1, keepdim=True)
