"""What is known of the training clouds: the statistics that normalise points, and how many clouds each group has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

UNKNOWN = -1


class CloudStatistics(nn.Module):
    """Normalises points (..., 3), and knows which groups were trained.

    Before anything is measured, points are centred in the frame and scaled by an eighth of it.

    Args:
        size: height and width of the frame, pixels.
        tag: third coordinate of the innermost structure's points, the outermost having its opposite.
        num_groups: G, 0 without groups.
        attribute: whose groups they are, for messages.
        normalization: ``per_axis`` statistics, the tag at -1 to 1, or the ``reference``'s one deviation for all axes.

    Attributes:
        shift: (3,) what is subtracted.
        scale: (3,) what is divided by.
        measured: whether both are those of clouds.
        num_clouds: (G + 1,) training clouds of each group, the unknown one last; 0 when none were counted.
    """

    shift: Tensor
    scale: Tensor
    measured: Tensor
    num_clouds: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        tag: float,
        num_groups: int = 0,
        attribute: str | None = None,
        normalization: Literal["per_axis", "reference"] = "per_axis",
    ) -> None:
        super().__init__()
        self.tag, self.attribute, self.normalization = tag, attribute, normalization
        height, width = size
        self.register_buffer("shift", torch.tensor([(height - 1) / 2, (width - 1) / 2, 0.0]))
        self.register_buffer("scale", torch.tensor([height / 8, width / 8, tag]))
        self.register_buffer("measured", torch.tensor(False))
        self.register_buffer("num_clouds", torch.zeros(num_groups + 1, dtype=torch.int64))

    @property
    def complete(self) -> bool:
        """Whether clouds were measured and counted."""
        return bool(self.measured) and bool(self.num_clouds.any())

    def normalize(self, points: Tensor) -> Tensor:
        """Points in pixels (..., 3) to what the network sees."""
        return (points - self.shift) / self.scale

    def denormalize(self, points: Tensor) -> Tensor:
        """What the network sees (..., 3) to points in pixels."""
        shift, scale = self.shift.to(points.device), self.scale.to(points.device)
        return points * scale.to(points.dtype) + shift.to(points.dtype)

    def measure(
        self,
        clouds: Iterable[tuple[Tensor, Tensor]],
        reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
        count_only: bool = False,
    ) -> None:
        """Set the statistics to those of clouds.

        Args:
            clouds: batches of points (B, N, 3) and their groups (B,).
            reduce: sums a tensor over all devices.
            count_only: leave shift and scale as they are.

        Raises:
            ValueError: for a group that there is not.
        """
        sums = torch.zeros(3, 3, dtype=torch.float64)  # count, sum and sum of squares of each axis
        counts = torch.zeros_like(self.num_clouds, device="cpu")
        for batch, group in clouds:
            points, group = batch.double().cpu(), group.cpu()
            sums += torch.stack([torch.full_like(points, 1), points, points.square()]).sum((1, 2))
            self.check_known(group)
            counts += torch.bincount(group.where(group != UNKNOWN, len(counts) - 1), minlength=len(counts))
        self.num_clouds.copy_(reduce(counts))
        if not count_only:
            shift, scale = self._moments(reduce(sums))
            self.set(shift, scale)

    def set(self, shift: Tensor, scale: Tensor) -> None:
        """Take shift (3,) and scale (3,), or (1,) for all axes, as measured."""
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self.measured.fill_(True)

    def check_known(self, groups: Tensor) -> None:
        """Refuse indices that are no groups."""
        known = len(self.num_clouds) - 1
        foreign = sorted(set(groups.tolist()) - set(range(UNKNOWN, known)))
        if foreign:
            has = f"'{self.attribute}' has groups 0 to {known - 1}" if known else "the model has no groups"
            raise ValueError(f"group {foreign} was found, but {has}; -1 (or None) is no group in particular.")

    def check_trained(self, groups: Tensor) -> None:
        """Refuse groups that cannot be generated; a model that was never trained generates for all groups alike."""
        self.check_known(groups)
        counts = self.num_clouds.tolist()
        absent = sorted(g for g in set(groups.tolist()) - {UNKNOWN} if not counts[g])
        if absent and any(counts):
            raise ValueError(
                f"group {absent} of '{self.attribute}' was asked for, but had no training cloud (clouds of each group: "
                f"{counts[:-1]}): it cannot be generated."
            )

    def trained(self, groups: Tensor) -> Tensor:
        """The groups (B,), unknown where they had no training cloud."""
        self.check_known(groups)
        return groups.where(self.num_clouds[groups] > 0, UNKNOWN)

    def _moments(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of count, sum and sum of squares (3, 3) of the axes."""
        shift = sums[1] / sums[0]
        if self.normalization == "reference":
            sums = sums.sum(1, keepdim=True).expand(3, 3)
        mean = sums[1] / sums[0]
        scale = ((sums[2] - sums[0] * mean.square()) / (sums[0] - 1)).sqrt()
        if self.normalization == "reference":
            return shift, scale
        return torch.cat([shift[:2], shift.new_zeros(1)]), torch.cat([scale[:2], scale.new_tensor([self.tag])])
