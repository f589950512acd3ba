"""Nested structures of a mask, and how a point's third coordinate names its structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StructureSpec:
    """Structures that lie one inside the other, outermost first.

    Class 0 of a mask is background; class k is what lies inside the outline of structure k but outside that of
    structure k + 1. The region of structure k, which its outline encloses, is thus every pixel of class k or higher:
    the outline of the rim is that of the optic disc.

    Args:
        names: of the mask's classes from 1 on, outermost first.
    """

    names: tuple[str, ...] = ("rim", "cup")

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"structures need at least one name and no name twice, but are {self.names}.")

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """Classes of the mask by index."""
        return ", ".join(f"{k} {name}" for k, name in enumerate(("background", *self.names)))

    def tags(self, z: float) -> Tensor:
        """Third coordinate (K,) of each structure's points: equally spaced from -z to z, -z for a single structure."""
        if not z > 0:
            raise ValueError(f"z must be positive to tell structures apart, but is {z}.")
        return torch.linspace(-z, z, len(self), dtype=torch.float64)

    def classify(self, third: Tensor, z: float) -> Tensor:
        """Index (...) of the structure whose tag is nearest to each third coordinate (...): its sign, for two."""
        return (third[..., None] - self.tags(z).to(third.device)).abs().argmin(-1)

    def quotas(self, num_points: int) -> list[int]:
        """Points of each structure: equal shares, the first structures one more where the number does not divide."""
        share, rest = divmod(num_points, len(self))
        if share < 3:
            raise ValueError(
                f"num_points must be at least {3 * len(self)}, 3 for each of {len(self)} structures, "
                f"but is {num_points}."
            )
        return [share + (k < rest) for k in range(len(self))]


DISC_AND_CUP = StructureSpec()
