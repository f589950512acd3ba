"""Sizes of lesions: those that training showed, for new lesions in anatomy that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairdiff_lightning.diffusion.noise import Generators


class SphereBank(nn.Module):
    """Radii of the training lesions' spheres, kept in the checkpoint.

    Attributes:
        radii: (N,), voxels.
    """

    radii: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("radii", torch.zeros(0))

    def measure(self, spheres: Tensor) -> None:
        """Keep the radii of spheres (N, 4); those of empty masks are left out."""
        self.radii = spheres[spheres[:, 3] >= 0, 3].float().to(self.radii.device)

    def draw(self, boundary: Tensor, random: Generators) -> Tensor:
        """Draw a sphere (B, 4) for each sample: a voxel of the boundary, and the radius of any training lesion.

        Args:
            boundary: (B, 1, H, W, D), other than 0 where a lesion may lie.
            random: one for each sample.

        Raises:
            ValueError: before anything was measured, or for a boundary without a voxel.
        """
        if not len(self.radii):
            raise ValueError("no training lesion was measured, so that no size can be drawn; train first.")
        return torch.stack([self._sphere(region, one) for region, one in zip(boundary, random, strict=True)])

    def _sphere(self, region: Tensor, random: torch.Generator) -> Tensor:
        voxels = region[0].nonzero()
        if not len(voxels):
            raise ValueError("a mask without a voxel of the boundary classes: there is no place for a lesion.")
        place, size = (int(torch.randint(n, (1,), generator=random)) for n in (len(voxels), len(self.radii)))
        return torch.cat([voxels[place].to(self.radii), self.radii[size : size + 1]])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}radii")
        if saved is not None and saved.dim() == 1:  # as many as that run had
            self.radii = self.radii.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
