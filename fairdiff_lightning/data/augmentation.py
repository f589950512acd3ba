"""Random rotation and flip of a whole batch, each sample its own, on the batch's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomRotateFlip(nn.Module):
    """The papers' augmentation in one resampling of the batch by MONAI (dMoE and FairSeg training transform).

    With probability ``p`` a rotation by 0, 90, 180 or 270 degrees and then a flip of a random axis, always one;
    else with probability ``p`` a rotation by whole degrees in [-degrees, degrees), zero outside; else nothing.
    Images that are not square are turned by 0 or 180 degrees only.

    Args:
        p: probability of either branch.
        degrees: largest angle of the free rotation.
        interpolation: of the image; ``nearest`` is the reference's.
    """

    def __init__(
        self, p: float = 0.5, degrees: int = 20, interpolation: Literal["bilinear", "nearest"] = "bilinear"
    ) -> None:
        super().__init__()
        self.p, self.degrees, self.interpolation = p, degrees, interpolation

    def forward(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Transform image (B, C, H, W) and mask (B, 1, H, W) alike.

        Args:
            image: floating point.
            mask: class indices.
            generator: CPU generator of the draws; the global one when None.

        Returns:
            Image and mask of the same shapes.
        """
        return self.transform(image, mask, self.draw(len(image), image.shape[-2] == image.shape[-1], generator))

    def transform(self, image: Tensor, mask: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Resample image (B, C, H, W) and mask (B, 1, H, W) about their centre.

        Args:
            image: floating point.
            mask: class indices.
            matrices: (B, 2, 2), output to input coordinates (row, column) in pixels.
        """
        from monai.networks.layers import AffineTransform

        theta = F.pad(matrices, (0, 1)).to(image.device, image.dtype, non_blocking=True)
        settings = {"align_corners": False, "zero_centered": True}
        moved: Tensor = AffineTransform(mode=self.interpolation, **settings)(image, theta)
        labels: Tensor = AffineTransform(mode="nearest", **settings)(mask.to(image.dtype), theta)
        return moved, labels.to(mask.dtype)

    def draw(self, count: int, square: bool, generator: torch.Generator | None = None) -> Tensor:
        """Draw the (count, 2, 2) matrices that map output to input coordinates (row, column)."""
        branch = torch.rand(2, count, generator=generator) < self.p
        turns, step = (4, 1) if square else (2, 2)
        quarter = torch.randint(turns, (count,), generator=generator) * step
        axis = torch.randint(2, (count,), generator=generator)
        free = torch.randint(-self.degrees, max(self.degrees, 1 - self.degrees), (count,), generator=generator)
        angle = torch.where(branch[0], quarter * (torch.pi / 2), free * (torch.pi / 180) * branch[1])
        cos, sin = angle.cos(), angle.sin()
        rotation = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)
        signs = torch.ones(count, 2)
        signs[torch.arange(count), axis] = 1 - 2 * branch[0].float()
        return rotation * signs[:, None]


class RandomMirror(nn.Module):
    """Mirrors volumes, each sample its own, and changes their intensities a little.

    Args:
        axes: along which a volume may be mirrored, 0 for H, 1 for W, 2 for D; of each with probability ``p``.
        p: probability of each mirroring.
        intensity: largest relative change of scale, and absolute one of level.
        p_intensity: probability of a change of scale, and of one of level.
    """

    def __init__(
        self, axes: Sequence[int] = (0,), p: float = 0.5, intensity: float = 0.0, p_intensity: float = 0.1
    ) -> None:
        super().__init__()
        self.axes, self.p, self.intensity, self.p_intensity = tuple(axes), p, intensity, p_intensity

    def forward(self, image: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Transform image (B, C, H, W, D) in [0, 1] and mask (B, 1, H, W, D); the image stays in [0, 1].

        Args:
            image: floating point.
            mask: class indices.
            generator: CPU generator of the draws; the global one when None.
        """
        chosen = torch.rand(len(self.axes), len(image), generator=generator) < self.p
        happens = torch.rand(2, len(image), generator=generator) < self.p_intensity
        change = (torch.rand(2, len(image), generator=generator) * 2 - 1) * self.intensity * happens
        per_sample = (-1, *[1] * (image.dim() - 1))
        for axis, mirrored in zip(self.axes, chosen.to(image.device), strict=True):
            where = mirrored.view(per_sample)
            image = torch.where(where, image.flip(axis + 2), image)
            mask = torch.where(where, mask.flip(axis + 2), mask)
        if self.intensity:
            scale, level = change.to(image.device, image.dtype)
            image = (image * (1 + scale.view(per_sample)) + level.view(per_sample)).clamp(0, 1)
        return image, mask


def random_patch(size: Sequence[int], side: int, generator: torch.Generator | None = None) -> tuple[slice, slice]:
    """Rows and columns of a square patch at a random place.

    Args:
        size: height and width of the image, pixels.
        side: of the patch, pixels.
        generator: CPU generator of the draws; the global one when None.

    Raises:
        ValueError: when the patch is larger than the image.
    """
    if side > min(size):
        raise ValueError(f"patch_size={side} is larger than the image, {size[0]} x {size[1]} pixels.")
    top, left = (int(torch.randint(length - side + 1, (1,), generator=generator)) for length in size)
    return slice(top, top + side), slice(left, left + side)
